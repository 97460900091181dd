"""One model over two processes, by the plans that it declares, and the layers that no quantizer may touch."""

import pytest
import torch
from processes import run_two
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from worker_plans import compare_all

from helpers import tiny_fox


def test_two_processes_compute_and_generate_what_one_does(tmp_path):
    """By tensor and by pipeline parallelism, from a padded batch, of a model with and one without positions."""
    folders, total = [], 0
    for name, config in (("pro", {}), ("rope", {"use_rope": True, "qk_norm_shared": True, "num_key_value_heads": 4})):
        model = tiny_fox(num_hidden_layers=3, vocab_size=96, pad_token_id=0, **config)
        model.save_pretrained(tmp_path / name, max_shard_size="100KB")
        folders.append(str(tmp_path / name))
        total = max(total, model.num_parameters())
    said = run_two(compare_all, folders, timeout=240)
    results = [line.split()[1:] for text in said for line in text.splitlines() if line.startswith("RESULT")]
    assert sorted(row[0] for row in results) == ["pp_size"] * 4 + ["tp_size"] * 4
    for kind, mine, error, same_text in results:
        # Stages only hand over what they computed; sums over the ranks are in another order than in one process.
        assert float(error) <= (0 if kind == "pp_size" else 5e-5), kind
        assert same_text == "True", kind
        assert int(mine) < 0.75 * total


@pytest.mark.parametrize("skipped_by_user", [None, ["model.layers.0"]], ids=str)
def test_no_quantizer_takes_the_gates(skipped_by_user):
    model = tiny_fox()
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped_by_user, model._keep_in_fp32_modules)
    linear = [name for name, module in model.model.layers[1].named_modules() if isinstance(module, torch.nn.Linear)]
    # Some ask by the name of the module and some by that of its weight.
    for suffix in ("", ".weight"):
        taken = {name for name in linear if should_convert_module(f"model.layers.1.{name}{suffix}", kept)}
        assert set(linear) - taken == {"self_attn.fgate_proj"}


def test_every_module_of_the_plans_exists():
    model = tiny_fox(qk_norm_shared=True)
    names = {name for name, _ in model.named_modules()}
    assert set(model.pp_plan) == {"lm_head", "model.embed_tokens", "model.layers", "model.norm"} <= names
    assert {name.replace("*", "0") for name in model.tp_plan} <= names
