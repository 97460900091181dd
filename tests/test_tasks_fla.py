"""flash-linear-attention's own model against ours: its weights, its code, and on a CPU its own PyTorch references."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers import random_tokens
from modeling_fox import FoxForCausalLM, compare, conversion_fox
from modeling_fox.aliases_fox import FlaAlias
from modeling_fox.conversion_fox import FLA
from modeling_fox.convert import convert

pytest.importorskip("fla", reason="flash-linear-attention is not installed: make test-tasks")
pytestmark = [
    pytest.mark.tasks,
    pytest.mark.filterwarnings("ignore"),  # Of that package, at its import; nothing of ours.
]
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 96,
    "fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False,
}  # fmt: skip
CONFIGS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "norm": {"qk_norm": True},
    "gate": {"use_output_gate": True},
    "all": {"num_kv_heads": 2, "qk_norm": True, "use_output_gate": True},
    "tied": {"qk_norm": True, "tie_word_embeddings": True},
}


@pytest.fixture
def their_model(tmp_path, monkeypatch):
    """Saves a random model of theirs, which computes with the references that its own tests compare kernels with."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, FLA, FlaAlias)
    from fla.layers import forgetting_attn
    from fla.models.forgetting_transformer import ForgettingTransformerConfig, ForgettingTransformerForCausalLM
    from fla.modules import mlp
    from fla.modules.norm.layernorm import GroupNormRef
    from fla.ops.forgetting_attn.naive import naive_forgetting_attn

    monkeypatch.setattr(forgetting_attn, "GroupNorm", GroupNormRef)
    monkeypatch.setattr(forgetting_attn, "parallel_forgetting_attn", lambda *qkvf, **_: naive_forgetting_attn(*qkvf))
    monkeypatch.setattr(mlp, "swiglu", lambda gate, x: torch.nn.functional.silu(gate) * x)

    def make(name):
        model = ForgettingTransformerForCausalLM(ForgettingTransformerConfig(**(SIZES | CONFIGS[name]))).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter_name, parameter in model.named_parameters():
            values = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values + ("norm" in parameter_name))
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_computes_what_theirs_computes(their_model, name):
    theirs, folder = their_model(name)
    ours, tokens = FoxForCausalLM.from_pretrained(folder), random_tokens(2, 40)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        error = (ours(tokens, use_cache=False).logits - expected).abs().max()
    assert expected.std() > 1 and error < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_converted_and_back_it_loads_into_their_class_with_every_bit(their_model, tmp_path, name):
    theirs, folder = their_model(name)
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "fla")
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    before, after = (
        json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (folder, tmp_path / "back")
    )
    # None means as many as query heads.
    before["num_kv_heads"] = before["num_kv_heads"] or before["num_heads"]
    changed = {field for field in after if field in before and after[field] != before[field]}
    assert changed <= {"transformers_version"}


def test_the_comparison_tells_agreement_from_difference(their_model, tmp_path, monkeypatch, capsys):
    """On a CPU and with the references above; on a GPU it compares with their kernels."""
    small = {"device": "cpu", "dtype": torch.bfloat16, "num_tokens": 40}
    theirs, folder = their_model("all")
    assert compare.compare(theirs, folder, **small).agrees
    arguments = ["fla", str(folder), "--device", "cpu", "--tokens", "40"]
    assert compare.main(arguments) == 0 and capsys.readouterr().out.count(" agrees") == 1
    # Another eps in the norms, as a wrong conversion would give.
    monkeypatch.setattr(conversion_fox, "QK_NORM_EPS", 1.0)
    assert compare.main(arguments) == 1 and "DIFFERS" in capsys.readouterr().out


def test_once_their_package_is_imported_the_auto_classes_give_its_model(their_model, monkeypatch):
    theirs, folder = their_model("plain")
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, FLA, type(theirs.config))
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(theirs)
    assert type(FoxForCausalLM.from_pretrained(folder)) is FoxForCausalLM
