"""Checkpoints of the official implementation and of flash-linear-attention: read, written, and computed alike.

There is no such package here. The checkpoints are random weights under the names and shapes of those implementations,
and what they compute is written down below from the equations of the papers, with none of our code.
"""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxConfig, FoxForCausalLM, FoxForSequenceClassification, FoxModel, compare
from modeling_fox.aliases_fox import FlaAlias, OfficialAlias, register_aliases
from modeling_fox.conversion_fox import FLA, FLA_ALWAYS, OFFICIAL, foreign_config_dict, fox_config_dict
from modeling_fox.convert import convert, main

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 96,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PRO = {
    "use_output_gate": True, "use_output_norm": True, "qk_norm": True, "use_k_shift": True, "use_v_shift": True,
}  # fmt: skip
DECAY = {"fgate_bias_init": True, "decay_time_min": 2.0, "decay_time_max": 64.0}
OFFICIAL_CONFIGS = {
    "pro, published": PRO | {"qk_norm_share_param_across_head": True},
    "pro": PRO,
    "llama": {},
    "shift of keys only": {"use_k_shift": True},
    "shift of values only": {"use_v_shift": True},
    "qk-norm only": {"qk_norm": True},
    "gate only": {"use_output_gate": True},
    "silu gate only": {"use_output_gate": True, "ogate_act": "silu"},
    "norm only": {"use_output_norm": True},
    "transformer (pro)": PRO | {"fgate_type": "none", "use_rope": True, "rope_base": 10000.0},
    "learned bias": {"fgate_type": "bias_only"} | DECAY,
    "learned bias from zero": {"fgate_type": "bias_only"},
    "fixed bias": {"fgate_type": "fixed"} | DECAY,
    "tied": PRO | {"tie_word_embeddings": True},
    "sigmoid glu": {"hidden_act": "sigmoid"},
    "other eps": PRO | {"norm_eps": 1e-2},
    "pruning": PRO | {"log_pruning_tolerance": -10.0},
}
FLA_CONFIGS = {
    "plain": {},
    "grouped, norm, gate": {"num_kv_heads": 2, "qk_norm": True, "use_output_gate": True},
    "norm": {"qk_norm": True},
    "tied": {"tie_word_embeddings": True},
}


def attention_shapes(kind, config):
    """Names below `attn` -> shapes, as the two implementations have them."""
    size, heads = config["hidden_size"], config["num_heads"]
    kv_size = size // heads * (config.get("num_kv_heads") or heads)
    shapes = {"q_proj.weight": (size, size), "o_proj.weight": (size, size)}
    for name in "kv":
        if config.get(f"use_{name}_shift"):
            shapes[f"{name}_proj.linear.weight"] = (kv_size, size)
            shapes[f"{name}_proj.shift_proj.weight"] = (heads, size)
        else:
            shapes[f"{name}_proj.weight"] = (kv_size, size)
    if config.get("qk_norm"):
        shared = config.get("qk_norm_share_param_across_head")
        shapes["q_norm.weight"] = (size // heads,) if shared else (size,)
        shapes["k_norm.weight"] = (size // heads,) if shared else (kv_size,)
    if config.get("use_output_norm"):
        shapes["output_norm.weight"] = (size,)
    if config.get("use_output_gate"):
        shapes["ogate_proj.weight" if kind == OFFICIAL else "g_proj.weight"] = (size, size)
    gate = config.get("fgate_type", "full")
    if gate == "full":
        name = {OFFICIAL: "fgate_proj", FLA: "f_proj", "old fla": "g_proj"}[kind]
        shapes |= {f"{name}.weight": (heads, size), f"{name}.bias": (heads,)}
    elif gate != "none":
        shapes["fgate_bias"] = (heads,)
    return shapes


def random_weights(kind, config, seed=0):
    """A whole state dict; norm weights around 1, large enough matrices that every part matters."""
    size, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embeddings.weight": (vocab, size), "model.norm.weight": (size,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, size)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.attn_norm.weight": (size,), f"{prefix}.mlp_norm.weight": (size,)}
        shapes |= {f"{prefix}.attn.{name}": shape for name, shape in attention_shapes(kind, config).items()}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (size, width)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (2 * width if kind == OFFICIAL else width, size)
        if kind != OFFICIAL:
            shapes[f"{prefix}.mlp.up_proj.weight"] = (width, size)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: weight + ("norm" in name) for name, weight in weights.items()}


def write_checkpoint(folder, kind, changes, dtype=torch.float32, shards=1):
    """config.json and safetensors as that implementation saves them: only what differs from its defaults."""
    config = SIZES | changes
    folder.mkdir()
    model_type = FLA if kind == "old fla" else kind
    saved = config | {"model_type": model_type, "torch_dtype": str(dtype)[6:], "transformers_version": "4.44.0"}
    saved |= {"architectures": ["ForgettingTransformerForCausalLM"], "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    weights = {name: weight.to(dtype) for name, weight in random_weights(kind, config).items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return config, weights
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return config, weights


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, base):
    """RoPE on (B, T, H, D): channel i turns with channel i + D/2, by position * base^(-2i/D)."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[1]).float()[:, None]
    angle = position * base ** -(torch.arange(half) / half)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def spec_attention(x, weights, config, old_gate):
    """One layer of forgetting attention on (B, T, E), token by token where the papers have an index."""
    batch, length, size = x.shape
    heads = config["num_heads"]
    dim = size // heads

    def project(name):
        linear = weights.get(f"{name}_proj.linear.weight", weights.get(f"{name}_proj.weight"))
        states = (x @ linear.T).view(batch, length, -1, dim)
        if f"{name}_proj.shift_proj.weight" in weights:
            alpha = torch.sigmoid(x @ weights[f"{name}_proj.shift_proj.weight"].T)[..., None]
            before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
            states = alpha * before + (1 - alpha) * states
        return states

    q, k, v = project("q"), project("k"), project("v")
    if config.get("qk_norm"):
        q = rms_norm(q, weights["q_norm.weight"].view(-1, dim), 1e-5)
        k = rms_norm(k, weights["k_norm.weight"].view(-1, dim), 1e-5)
    if config.get("use_rope"):
        q, k = rotated(q, config["rope_base"]), rotated(k, config["rope_base"])
    gate = "g_proj" if old_gate else "f_proj" if "f_proj.weight" in weights else "fgate_proj"
    log_gate = torch.zeros(batch, length, heads)
    if f"{gate}.weight" in weights:
        log_gate = torch.log(torch.sigmoid(x @ weights[f"{gate}.weight"].T + weights[f"{gate}.bias"]))
    elif "fgate_bias" in weights:
        log_gate = log_gate + torch.log(torch.sigmoid(weights["fgate_bias"]))
    out = torch.zeros(batch, length, heads, dim)
    for h in range(heads):
        kv = h // (heads // k.shape[2])
        for i in range(length):
            decay = torch.stack([log_gate[:, j + 1 : i + 1, h].sum(-1) for j in range(i + 1)], dim=-1)
            scores = (k[:, : i + 1, kv] @ q[:, i, h, :, None])[..., 0] / math.sqrt(dim) + decay
            out[:, i, h] = (scores.softmax(-1)[:, None] @ v[:, : i + 1, kv])[:, 0]
    if "output_norm.weight" in weights:
        out = rms_norm(out, weights["output_norm.weight"].view(heads, dim), config.get("norm_eps", 1e-6))
    out = out.reshape(batch, length, size)
    gate = weights.get("ogate_proj.weight", None if old_gate else weights.get("g_proj.weight"))
    if gate is not None:
        logits = x @ gate.T
        out = out * torch.sigmoid(logits) * (logits if config.get("ogate_act") == "silu" else 1)
    return out @ weights["o_proj.weight"].T


def spec_logits(weights, config, tokens, old_gate=False):
    """The whole model, from the equations."""
    eps = config.get("norm_eps", 1e-6)
    x = weights["model.embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        attention = {name.removeprefix("attn."): weight for name, weight in own.items() if name.startswith("attn.")}
        x = x + spec_attention(rms_norm(x, own["attn_norm.weight"], eps), attention, config, old_gate)
        normed = rms_norm(x, own["mlp_norm.weight"], eps)
        gate_and_up = torch.cat([own[f"mlp.{n}_proj.weight"] for n in ("gate", "up") if f"mlp.{n}_proj.weight" in own])
        gate, up = (normed @ gate_and_up.T).chunk(2, dim=-1)
        act = torch.sigmoid(gate) * (1 if config.get("hidden_act") == "sigmoid" else gate)
        x = x + (act * up) @ own["mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ weights["model.embeddings.weight" if config.get("tie_word_embeddings") else "lm_head.weight"].T


def all_weights(folder):
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].dtype == weight.dtype and torch.equal(got[name], weight), name


@pytest.mark.parametrize(
    "kind, changes",
    [pytest.param(OFFICIAL, changes, id=f"official, {name}") for name, changes in OFFICIAL_CONFIGS.items()]
    + [pytest.param(FLA, changes, id=f"fla, {name}") for name, changes in FLA_CONFIGS.items()]
    + [pytest.param("old fla", {"qk_norm": norm}, id=f"old fla, norm {norm}") for norm in (False, True)],
)
def test_loads_and_computes_what_the_equations_say(tmp_path, kind, changes):
    config, weights = write_checkpoint(tmp_path / "theirs", kind, changes)
    tokens = random_tokens(2, 11)
    model = FoxForCausalLM.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    expected = spec_logits(weights, config, tokens, old_gate=kind == "old fla")
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() <= 1e-4


def test_old_fla_norm_shared_by_the_heads_is_repeated_for_each(tmp_path):
    """Before April 2025 its norm had one weight for all heads, and nothing in the config.json tells."""
    config, weights = write_checkpoint(tmp_path / "theirs", "old fla", {"num_kv_heads": 2, "qk_norm": True})
    weights = {name: weight[:16].clone() if "q_norm" in name or "k_norm" in name else weight
               for name, weight in weights.items()}  # fmt: skip
    save_file(weights, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    model, tokens = FoxForCausalLM.from_pretrained(tmp_path / "theirs"), random_tokens(1, 9)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (4, 16)
    with torch.no_grad():
        error = model(tokens, use_cache=False).logits - spec_logits(weights, config, tokens, old_gate=True)
    assert error.abs().max() <= 1e-4


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in OFFICIAL_CONFIGS]
    # What depends on the dtype does not depend on the other options.
    + [(name, dtype) for name in ("pro", "fixed bias") for dtype in (torch.bfloat16, torch.float16)],
)
def test_official_to_ours_and_back_keeps_every_bit(tmp_path, name, dtype):
    config, weights = write_checkpoint(tmp_path / "theirs", OFFICIAL, OFFICIAL_CONFIGS[name], dtype)
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "back", "official") == []
    assert_same_bits(all_weights(tmp_path / "back"), weights)
    back = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert back["model_type"] == OFFICIAL and back["torch_dtype"] == str(dtype)[6:]
    assert {field: back[field] for field in config} == config


@pytest.mark.parametrize("name", FLA_CONFIGS)
def test_fla_to_ours_and_back_keeps_every_bit(tmp_path, name):
    config, weights = write_checkpoint(tmp_path / "theirs", FLA, FLA_CONFIGS[name])
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "back", "fla") == []
    assert_same_bits(all_weights(tmp_path / "back"), weights)
    back = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert {field: back[field] for field in config} == config


@pytest.mark.parametrize(
    "to, config",
    [
        ("official", {"num_key_value_heads": 4}),
        ("official", {"num_key_value_heads": 4, "qk_norm_shared": True, "tie_word_embeddings": True}),
        ("fla", FLA_ALWAYS | {"use_qk_norm": True}),
    ],
    ids=["official", "official shared", "fla"],
)
def test_ours_to_theirs_and_back_keeps_every_bit(tmp_path, to, config):
    model = tiny_fox(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to)
    convert(tmp_path / "theirs", tmp_path / "back", max_shard_size="50KB")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert_same_bits(all_weights(tmp_path / "back"), load_file(tmp_path / "ours" / "model.safetensors"))
    ours, back = (FoxConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "back"))
    unsaid = {"max_position_embeddings"} if to == "fla" else set()
    assert {name for name in ours if ours[name] != back[name]} <= unsaid


def test_what_is_left_out_is_named(tmp_path, capsys):
    training_only = {"hidden_dropout": 0.1, "fgate_decay_time_min": 1.0, "fgate_decay_time_max": 9.0}
    tiny_fox(num_key_value_heads=4, **training_only).save_pretrained(tmp_path / "ours")
    main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "official"])
    assert "no place for hidden_dropout, fgate_decay_time_min, fgate_decay_time_max:" in capsys.readouterr().err
    fla = FLA_ALWAYS | {"log_pruning_tolerance": -10.0}
    tiny_fox(**fla).save_pretrained(tmp_path / "pruned")
    assert convert(tmp_path / "pruned", tmp_path / "fla", "fla") == ["log_pruning_tolerance"]


def test_a_converted_model_is_saved_under_our_names(tmp_path):
    write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO)
    FoxForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    names = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert names == set(FoxForCausalLM.from_pretrained(tmp_path / "theirs").state_dict())
    saved = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == "fox" and saved["architectures"] == ["FoxForCausalLM"] and "auto_map" not in saved


def test_every_model_class_loads_a_sharded_official_checkpoint(tmp_path):
    config, weights = write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO, shards=3)
    tokens = random_tokens(1, 7)
    base = FoxModel.from_pretrained(tmp_path / "theirs")
    classifier, info = FoxForSequenceClassification.from_pretrained(
        tmp_path / "theirs", num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    with torch.no_grad():
        hidden = base(tokens, use_cache=False).last_hidden_state
        assert torch.equal(hidden, classifier.model(tokens, use_cache=False).last_hidden_state)
        error = hidden @ weights["lm_head.weight"].T - spec_logits(weights, config, tokens)
    assert error.abs().max() <= 1e-4
    assert classifier(tokens).logits.shape == (1, 3)


@pytest.mark.parametrize("kind, alias", [(OFFICIAL, OfficialAlias), (FLA, FlaAlias)])
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}], ids=["", "trusted"])
def test_the_auto_classes_load_theirs_as_ours(tmp_path, monkeypatch, kind, alias, options):
    """Whatever code their config.json points to is not asked for, trusted or not."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, kind, alias)
    write_checkpoint(tmp_path / "theirs", kind, {"qk_norm": True})
    assert type(AutoConfig.from_pretrained(tmp_path / "theirs", **options)) is FoxConfig
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", log_pruning_tolerance=-7.0, **options)
    assert type(model) is FoxForCausalLM and model.config.log_pruning_tolerance == -7.0
    assert_same_bits(model.state_dict(), FoxForCausalLM.from_pretrained(tmp_path / "theirs").state_dict())


def test_a_name_that_its_own_package_has_taken_stays_its_own(tmp_path, monkeypatch):
    class Theirs(PreTrainedConfig):
        model_type = FLA

    write_checkpoint(tmp_path / "theirs", FLA, {})
    # Before us; and after us, when registering theirs replaces ours.
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, FLA, Theirs)
    register_aliases()
    assert CONFIG_MAPPING[FLA] is Theirs
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, FLA, FlaAlias)
    AutoConfig.register(FLA, Theirs, exist_ok=True)
    assert type(AutoConfig.from_pretrained(tmp_path / "theirs")) is Theirs
    assert type(FoxForCausalLM.from_pretrained(tmp_path / "theirs").config) is FoxConfig


def test_loads_a_state_dict_and_a_config_of_ours(tmp_path):
    """The weights tell by their names whose they are; the config need not be theirs."""
    config, weights = write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO)
    loaded = FoxForCausalLM.from_pretrained(tmp_path / "theirs")
    again = FoxForCausalLM.from_pretrained(None, config=loaded.config, state_dict=weights)
    assert_same_bits(again.state_dict(), loaded.state_dict())


def test_options_given_to_from_pretrained_win_over_the_config_json(tmp_path):
    write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO)
    model = FoxForCausalLM.from_pretrained(
        tmp_path / "theirs", log_pruning_tolerance=-7.0, dtype=torch.bfloat16, attn_implementation="fox_acp"
    )
    assert model.config.log_pruning_tolerance == -7.0 and model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "fox_acp"


def test_what_their_config_json_leaves_out_has_their_default():
    """The 760M FoX (Pro) that was published, as far as it differs from the official defaults."""
    published = {
        "model_type": OFFICIAL, "vocab_size": 50257, "hidden_size": 1536, "hidden_ratio": 3.5, "num_heads": 24,
        "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": None, "torch_dtype": "float32",
        "qk_norm_share_param_across_head": True,
    }  # fmt: skip
    config = FoxConfig(**fox_config_dict(published | PRO))
    assert (config.num_hidden_layers, config.intermediate_size, config.head_dim) == (24, 3584, 64)
    assert (config.rms_norm_eps, config.qk_norm_eps, config.max_position_embeddings) == (1e-6, 1e-5, 16384)
    with torch.device("meta"):
        model = FoxForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 836_636_736
    plain = FoxConfig(**fox_config_dict({"model_type": FLA}))
    assert (plain.hidden_size, plain.num_attention_heads, plain.bos_token_id, plain.eos_token_id) == (2048, 32, 1, 2)
    assert plain.vocab_size == 32000 and plain.num_key_value_heads == 32 and not plain.use_output_gate
    assert plain.intermediate_size == FoxConfig.llama(hidden_size=2048, num_attention_heads=32).intermediate_size


def test_a_config_json_of_ours_is_not_touched():
    ours = {"model_type": "fox", "num_heads": 3, "anything": True}
    assert fox_config_dict(ours) is ours


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (OFFICIAL, {"num_kv_heads": 2}, "`num_kv_heads` must be None; got 2"),
        (OFFICIAL, {"hidden_act": "gelu"}, "`hidden_act` must be one of .*; got 'gelu'"),
        (OFFICIAL, PRO | {"ogate_act": "silu"}, "`ogate_act` must be 'sigmoid' with `use_output_norm`; got 'silu'"),
        (OFFICIAL, {"use_attention_sink": True}, "`use_attention_sink` must not be set in a .*; got True"),
        (FLA, {"qkv_bias": True}, "`qkv_bias` must not be set in a 'forgetting_transformer'; got True"),
        (FLA, {"window_size": 512}, "`window_size` must not be set in a 'forgetting_transformer'; got 512"),
        (FLA, {"attnres_block_size": 4}, "`attnres_block_size` must not be set"),
        (FLA, {"use_rope": True}, "`use_rope` must not be set in a 'forgetting_transformer'; got True"),
    ],
)
def test_says_what_fox_cannot_load(tmp_path, kind, changes, message):
    write_checkpoint(tmp_path / "theirs", kind, changes)
    with pytest.raises(ValueError, match=message):
        FoxForCausalLM.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize(
    "removed, added, message",
    [
        ("nothing", "model.layers.1.attn.q_proj.bias", "has weights .* among them layers.1.attn.q_proj.bias"),
        ("1.attn.ogate", None, "lacks .* layers.1.self_attn.ogate_proj.weight"),
        ("1.mlp.gate", None, "lacks .* layers.1.mlp.gate_proj.weight, layers.1.mlp.up_proj.weight"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_no_warning(tmp_path, removed, added, message):
    _, weights = write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO)
    weights = {name: weight for name, weight in weights.items() if removed not in name}
    if added:
        weights[added] = torch.zeros(64)
    save_file(weights, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        FoxForCausalLM.from_pretrained(tmp_path / "theirs")


def test_a_wrong_size_is_an_error(tmp_path, caplog):
    _, weights = write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO)
    weights["model.layers.0.attn.q_norm.weight"] = torch.ones(48)
    save_file(weights, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FoxForCausalLM.from_pretrained(tmp_path / "theirs")
    assert "q_norm.weight | MISMATCH | Reinit due to size mismatch - ckpt: torch.Size([48])" in caplog.text


@pytest.mark.parametrize(
    "target, config, message",
    [
        (OFFICIAL, {"num_key_value_heads": 2}, "`num_key_value_heads` must be 4 .*; got 2"),
        (OFFICIAL, {"head_dim": 32}, "`head_dim` must be 16.0 .*; got 32"),
        (OFFICIAL, {"qk_norm_eps": 1e-6}, "`qk_norm_eps` must be 1e-05 .*; got 1e-06"),
        (OFFICIAL, {"output_gate_act": "silu"}, "`output_gate_act` must be 'sigmoid' .*; got 'silu'"),
        (OFFICIAL, {"hidden_act": "gelu"}, "`hidden_act` must be 'silu' or 'sigmoid' .*; got 'gelu'"),
        (OFFICIAL, {"use_multi_skip": True}, "`use_multi_skip` must be False .*; got True"),
        (FLA, {}, "`use_output_norm` must be False .*; got True"),
        (FLA, FLA_ALWAYS | {"use_multi_skip": True}, "`use_multi_skip` must be False .*; got True"),
        (FLA, FLA_ALWAYS | {"use_k_shift": True}, "`use_k_shift` must be False"),
        (FLA, FLA_ALWAYS | {"use_rope": True}, "`use_rope` must be False"),
        (FLA, FLA_ALWAYS | {"fgate_type": "none"}, "`fgate_type` must be 'full'"),
        (FLA, FLA_ALWAYS | {"qk_norm_shared": True}, "`qk_norm_shared` must be False"),
        (FLA, FLA_ALWAYS | {"hidden_act": "sigmoid"}, "`hidden_act` must be 'silu' "),
    ],
)
def test_says_what_the_others_cannot_compute(target, config, message):
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=message):
        foreign_config_dict(FoxConfig(**(sizes | config)), target)


def test_convert_refuses_what_is_no_language_model_and_a_full_folder(tmp_path, capsys):
    tiny_fox(model_class=FoxForSequenceClassification).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"`source` must be a causal language model; .* lacks lm_head.weight"):
        convert(tmp_path / "classifier", tmp_path / "new")
    with pytest.raises(ValueError, match="`destination` must be a new or empty folder"):
        convert(tmp_path / "classifier", tmp_path / "classifier")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere"), str(tmp_path / "new")])
    assert "nowhere" in capsys.readouterr().err


def test_convert_takes_the_tokenizer_along(tmp_path):
    from fox_training.tokenizers import byte_tokenizer

    write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO)
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    main([str(tmp_path / "theirs"), str(tmp_path / "ours")])
    text = "a\nb"
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(text) == byte_tokenizer()(text)


def test_the_comparison_tunes_no_kernels(monkeypatch):
    Autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    monkeypatch.setattr(Autotuner, "run", lambda self: self.configs)
    with compare.untuned():
        assert Autotuner.run(SimpleNamespace(configs=["first", "second"])) == ["first"]
    assert Autotuner.run(SimpleNamespace(configs=["first", "second"])) == ["first", "second"]


def test_the_comparison_says_how_to_get_what_it_compares_with(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "forgetting_transformer", None)
    with pytest.raises(SystemExit):
        compare.main(["official"])
    said = capsys.readouterr().err
    assert "forgetting_transformer.model.forgetting_transformer cannot be imported" in said
    assert "pip install" in said and "zhixuan-lin/forgetting-transformer" in said
