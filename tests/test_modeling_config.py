"""FoxConfig: every field does what its documentation says, and nonsense is refused by name."""

import json
import math

import pytest
import torch

import modeling_fox.attention_fox as attention_fox
from helpers import random_tokens, tiny_fox
from modeling_fox import FoxConfig, FoxForCausalLM, pruning_stats

# field: (settings of both models, two values of the field that must give different logits)
CHANGES_LOGITS = {
    "vocab_size": ({}, 97, 98),
    "hidden_size": ({"head_dim": 16}, 64, 80),
    "intermediate_size": ({}, 64, 128),
    "hidden_ratio": ({}, 3.5, 8),
    "num_hidden_layers": ({}, 1, 2),
    "num_attention_heads": ({"head_dim": 16}, 2, 4),
    "num_key_value_heads": ({}, 2, 4),
    "head_dim": ({}, 16, 24),
    "hidden_act": ({}, "silu", "gelu"),
    "initializer_range": ({}, 0.2, 0.1),
    "rms_norm_eps": ({}, 1e-6, 0.5),
    "qk_norm_eps": ({}, 1e-5, 0.5),
    "pad_token_id": ({}, None, int(random_tokens(2, 21)[0, 0])),
    "tie_word_embeddings": ({}, False, True),
    "use_qk_norm": ({}, True, False),
    "use_output_gate": ({}, True, False),
    "output_gate_act": ({}, "sigmoid", "silu"),
    "use_output_norm": ({}, True, False),
    "use_k_shift": ({}, True, False),
    "use_v_shift": ({}, True, False),
    "use_rope": ({}, False, True),
    "rope_theta": ({"use_rope": True}, 500000.0, 100.0),
    "fgate_type": ({}, "full", "none"),
    "fgate_decay_time_min": ({"fgate_decay_time_max": 100.0}, 1.0, 50.0),
    "fgate_decay_time_max": ({"fgate_decay_time_min": 1.0}, 2.0, 1000.0),
}
# field: test of what it does instead
TESTED_BELOW = {
    "hidden_dropout",
    "max_position_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "qk_norm_shared",
    "use_multi_skip",
    "log_pruning_tolerance",
    "pruning_rule",
}


def logits(**config):
    with torch.no_grad():
        return tiny_fox(attn_implementation="eager", **config)(random_tokens(2, 21), use_cache=False).logits


def test_every_field_has_a_test():
    assert set(FoxConfig.__annotations__) == set(CHANGES_LOGITS) | TESTED_BELOW


@pytest.mark.parametrize("field", CHANGES_LOGITS)
def test_changing_the_field_changes_the_output(field):
    settings, one, other = CHANGES_LOGITS[field]
    one, other = logits(**settings, **{field: one}), logits(**settings, **{field: other})
    assert one.shape != other.shape or (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("fgate_type", ["full", "bias_only", "fixed"])
def test_each_gate_type_starts_at_the_decay_times(fgate_type):
    model = tiny_fox(fgate_type=fgate_type, fgate_decay_time_min=2.0, fgate_decay_time_max=128.0)
    attention = model.model.layers[1].self_attn
    bias = attention.fgate_proj.bias if fgate_type == "full" else attention.fgate_bias
    expected = torch.tensor([math.exp(-1 / time) for time in (2.0, 8.0, 32.0, 128.0)])
    torch.testing.assert_close(torch.sigmoid(bias.detach()), expected)
    assert isinstance(bias, torch.nn.Parameter) == (fgate_type != "fixed")


def test_gates_start_at_one_half_without_decay_times():
    assert torch.equal(tiny_fox().model.layers[0].self_attn.fgate_proj.bias, torch.zeros(4))


def test_hidden_dropout_acts_in_training_only():
    plain, dropping, tokens = tiny_fox(), tiny_fox(hidden_dropout=0.25), random_tokens(2, 300)
    assert torch.equal(plain(tokens).logits, dropping(tokens).logits)
    assert torch.equal(plain.train()(tokens).logits, plain.eval()(tokens).logits)
    dropped = []
    for module in (dropping.model, *dropping.model.layers):
        module.dropout.register_forward_hook(lambda module, args, out: dropped.append((out == 0).float().mean()))
    dropping.train()(tokens, use_cache=False)
    # Embeddings, then attention and MLP of each layer: a quarter of each, within five standard deviations.
    torch.testing.assert_close(torch.stack(dropped), torch.full((5,), 0.25), rtol=0, atol=0.012)


def test_output_does_not_depend_on_max_position_embeddings():
    assert torch.equal(logits(max_position_embeddings=4), logits(max_position_embeddings=4096))
    assert FoxConfig(max_position_embeddings=4).to_dict()["max_position_embeddings"] == 4


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_decides_whether_a_cache_is_returned(use_cache):
    assert (tiny_fox(use_cache=use_cache)(random_tokens(1, 5)).past_key_values is not None) == use_cache


def test_bos_and_eos_reach_generation():
    first = int(tiny_fox().generate(random_tokens(1, 5), max_new_tokens=8, do_sample=False)[0, 5])
    stopping = tiny_fox(bos_token_id=3, eos_token_id=first)
    assert stopping.generation_config.bos_token_id == 3
    # The first token generated is the end of the text: nothing follows it.
    assert stopping.generate(random_tokens(1, 5), max_new_tokens=8, do_sample=False).shape == (1, 6)


def test_shared_qk_norm_has_one_weight_for_all_heads():
    shared, own = tiny_fox(qk_norm_shared=True), tiny_fox()
    assert shared.model.layers[0].self_attn.q_norm.weight.shape == (16,)
    assert own.model.layers[0].self_attn.q_norm.weight.shape == (4, 16)
    assert own.model.layers[0].self_attn.k_norm.weight.shape == (2, 16)
    # Both start at ones, so that the published weights can be copied to every head.
    tokens = random_tokens(1, 9)
    torch.testing.assert_close(shared(tokens).logits, own(tokens).logits)


def test_log_pruning_tolerance_switches_pruning_on():
    tokens = random_tokens(1, 512)
    for tolerance, prunes in ((None, False), (-10.0, True)):
        model = tiny_fox(attn_implementation="fox_acp", log_pruning_tolerance=tolerance)
        with torch.no_grad(), pruning_stats(model) as stats:
            model(tokens, use_cache=False)
        assert bool(stats.pruned_fraction.max() > 0.1) == prunes


def test_pruning_rule_reaches_the_operator(monkeypatch):
    asked = []

    def operator(q, *args, pruning_rule, **kwargs):
        asked.append(pruning_rule)
        return torch.zeros_like(q)

    monkeypatch.setattr(attention_fox, "forgetting_attention", operator)
    tiny_fox(attn_implementation="fox_acp", log_pruning_tolerance=-10.0, pruning_rule="paper")(random_tokens(1, 4))
    assert asked == ["paper", "paper"]


@pytest.mark.parametrize(
    "config, num_parameters",
    [
        # Counted on the official models with the GPT-2 vocabulary, see the papers' sizes.
        ({"variant": "llama", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}, 162_259_344),
        ({"variant": "llama", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 411_651_456),
        ({"variant": "pro", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 418_803_072),
        ({"variant": "pro", "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24}, 836_707_392),
    ],
)
def test_has_as_many_parameters_as_the_official_model(config, num_parameters):
    make = getattr(FoxConfig, config.pop("variant"))
    with torch.device("meta"):
        model = FoxForCausalLM(make(vocab_size=50257, **config))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@torch.no_grad()
def test_multi_skip_adds_the_embeddings_after_every_block_once_it_is_trained(tmp_path):
    plain, model, tokens = tiny_fox(), tiny_fox(use_multi_skip=True), random_tokens(2, 21)
    # An untrained one is the model without: nothing is added, and no other weight is drawn differently.
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    scales = {name: weight for name, weight in model.named_parameters() if "skip" in name}
    assert [weight.shape for weight in scales.values()] == [(1,)] * 2
    with torch.enable_grad():
        optimizer = torch.optim.Adam(scales.values(), lr=0.1)
        for _ in range(3):
            loss = model(tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(weight.abs() > 0.01 for weight in scales.values())
    assert model(tokens, labels=tokens).loss < plain(tokens, labels=tokens).loss
    hidden = embeddings = model.model.embed_tokens(tokens)
    for layer, weight in zip(plain.model.layers, scales.values(), strict=True):
        hidden = layer(hidden) + weight * embeddings
    expected = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(FoxForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    # A model without it starts as one with it that has learned nothing of it yet.
    plain.save_pretrained(tmp_path / "plain")
    grown = FoxForCausalLM.from_pretrained(tmp_path / "plain", use_multi_skip=True)
    assert torch.equal(grown(tokens).logits, plain(tokens).logits)


def test_multi_skip_is_refused_in_a_pipeline():
    model = tiny_fox(use_multi_skip=True)
    model.model.layers[0] = torch.nn.Identity()  # as for the layers of another stage
    with pytest.raises(ValueError, match="`use_multi_skip` must be False in a pipeline: .* Split the model with `tp_"):
        model(random_tokens(1, 5))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_multi_skip_has_the_gradients_of_every_way_to_checkpoint():
    tokens, found = random_tokens(2, 21), []
    for reentrant in (None, False, True):
        model = tiny_fox(use_multi_skip=True).train()
        for layer in model.model.layers:
            torch.nn.init.ones_(layer.skip_scale)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        for other in found[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_shared_qk_norm_gives_the_size_of_the_published_checkpoints():
    sizes = {"vocab_size": 50257, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24}
    with torch.device("meta"):
        model = FoxForCausalLM(FoxConfig(**sizes, qk_norm_shared=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == 836_636_736


def test_saved_config_loads_as_it_was(tmp_path):
    config = FoxConfig.llama(hidden_size=96, num_attention_heads=3, log_pruning_tolerance=-7.5, use_rope=True)
    config.save_pretrained(tmp_path)
    assert FoxConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == "fox" and saved["head_dim"] == 32 and saved["use_qk_norm"] is False


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hidden_size": 0}, "`hidden_size` must be at least 1; got 0"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1; got 0"),
        ({"intermediate_size": -1}, "`intermediate_size` must be at least 1; got -1. Leave it None"),
        ({"hidden_size": 70, "num_attention_heads": 4}, "`hidden_size` must be a multiple .* got 70. Set `head_dim`"),
        ({"num_key_value_heads": 5}, r"`num_key_value_heads` must divide `num_attention_heads` \(12\); got 5"),
        ({"head_dim": 15, "use_rope": True}, "`head_dim` must be even with `use_rope`; got 15"),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` must be in \[0, 1\); got 1.0: a fraction, no percentage"),
        ({"hidden_dropout": float("nan")}, "`hidden_dropout` must be in"),
        ({"hidden_ratio": float("nan")}, "`hidden_ratio` must be a positive number; got nan"),
        ({"rms_norm_eps": 0.0}, "`rms_norm_eps` must be a positive number; got 0.0"),
        ({"qk_norm_eps": float("inf")}, "`qk_norm_eps` must be a positive number; got inf"),
        ({"rope_theta": -1.0}, "`rope_theta` must be a positive number; got -1.0"),
        ({"initializer_range": float("nan")}, "`initializer_range` must be 0 or more; got nan"),
        ({"pad_token_id": 32000}, r"`pad_token_id` must be below `vocab_size` \(32000\); got 32000"),
        ({"output_gate_act": "relu"}, "`output_gate_act` must be one of .*; got 'relu'"),
        ({"hidden_act": "swoosh"}, "`hidden_act` must be one of .*; got 'swoosh'"),
        ({"fgate_type": "half"}, "`fgate_type` must be one of .*; got 'half'"),
        ({"fgate_type": "fixed"}, "`fgate_type='fixed'` needs `fgate_decay_time_min`"),
        ({"fgate_decay_time_min": 1.0}, "must be set together; got 1.0 and None"),
        ({"fgate_decay_time_min": 9.0, "fgate_decay_time_max": 2.0}, "in this order; got 9.0 and 2.0"),
        ({"fgate_decay_time_min": float("nan"), "fgate_decay_time_max": 2.0}, "in this order; got nan and 2.0"),
        ({"fgate_decay_time_min": 1, "fgate_decay_time_max": 2, "fgate_type": "none"}, "must be None with"),
        ({"log_pruning_tolerance": 0.0}, "`log_pruning_tolerance` .* must be negative and finite; got 0.0"),
        ({"log_pruning_tolerance": float("nan")}, "must be negative and finite; got nan"),
        ({"log_pruning_tolerance": -math.inf}, "must be negative and finite; got -inf"),
        ({"pruning_rule": "boldest"}, "`pruning_rule` must be one of .*; got 'boldest'"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "`rope_parameters` must be left out; .* Set `use_rope`"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "`rope_scaling` must be left out; .* no scaled RoPE"),
    ],
)
def test_says_what_is_wrong_with_the_config(config, message):
    with pytest.raises(ValueError, match=message):
        FoxConfig(**config)


@pytest.mark.parametrize("config", [{"hidden_size": "64"}, {"use_rope": 1}, {"hidden_ratio": "wide"}])
def test_refuses_a_wrong_type_by_the_name_of_the_field(config):
    with pytest.raises(Exception, match=next(iter(config))):
        FoxConfig(**config)


def test_a_value_spoiled_while_loading_is_refused(tmp_path):
    """An unknown type of gate would be none at all."""
    tiny_fox().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`fgate_type` must be one of .*; got 'half'"):
        FoxForCausalLM.from_pretrained(tmp_path, fgate_type="half")


def test_a_value_spoiled_later_is_not_saved(tmp_path):
    config = FoxConfig()
    config.log_pruning_tolerance = 3.0
    with pytest.raises(Exception, match="log_pruning_tolerance"):
        config.save_pretrained(tmp_path)
