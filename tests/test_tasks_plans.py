"""One model over two processes, by the plans that it declares, and the layers that no quantizer may touch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from helpers import tiny_fox

ROOT = Path(__file__).resolve().parents[1]

# On each of two processes: the logits and the text of a model that is split are those of the whole one.
SCRIPT = """
import sys
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_fox
from helpers import random_tokens

distributed.init_process_group("gloo")
tokens, mask = random_tokens(2, 12, vocab_size=96), torch.ones(2, 12, dtype=torch.int64)
tokens[1, :4] = mask[1, :4] = 0

@torch.no_grad()
def run(model):
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    return logits * mask[..., None], model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)

for folder in sys.argv[1:]:
    whole_logits, whole_text = run(AutoModelForCausalLM.from_pretrained(folder))
    for kind in ("tp_size", "pp_size"):
        part = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{kind: 2}))
        mine = sum(x._local_tensor.numel() if hasattr(x, "_local_tensor") else x.numel() for x in part.parameters())
        logits, text = run(part)
        error = float((logits - whole_logits).abs().max())
        sys.stdout.write(f"RESULT {kind} {mine} {error} {torch.equal(text, whole_text)}\\n")
        sys.stdout.flush()
distributed.destroy_process_group()
"""


def test_two_processes_compute_and_generate_what_one_does(tmp_path):
    """By tensor and by pipeline parallelism, from a padded batch, of a model with and one without positions."""
    folders, total = [], 0
    for name, config in (("pro", {}), ("rope", {"use_rope": True, "qk_norm_shared": True, "num_key_value_heads": 4})):
        model = tiny_fox(num_hidden_layers=3, vocab_size=96, pad_token_id=0, **config)
        model.save_pretrained(tmp_path / name, max_shard_size="100KB")
        folders.append(str(tmp_path / name))
        total = max(total, model.num_parameters())
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    paths = [ROOT, ROOT / "kernels", ROOT / "tests"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), *folders], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
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
