"""What a step of decoding costs the host, in numbers that are the same on every machine, beside a Qwen3 of equal size.

At one token a step the GPU waits for Python: what counts is how many functions run and how many operations PyTorch
dispatches, of which those that are no view start a kernel.
"""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxConfig, FoxForCausalLM, attention_fox

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


def qwen3():
    sizes = SIZES | {"intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**sizes)).to(torch.bfloat16).eval()


def fox(backend, **config):
    model = FoxForCausalLM(FoxConfig.pro(**SIZES, **config)).to(torch.bfloat16).eval()
    model.set_attn_implementation(backend)
    return model


class Dispatched(TorchDispatchMode):
    """Counts operations. RMSNorm is one where it is one kernel of PyTorch; on a CPU that takes itself apart."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts, self.is_within = Counter(), False
        rms_norm = torch.rms_norm

        def as_one(*args):
            self.counts["rms_norm"] += 1
            self.is_within = True
            out = rms_norm(*args)
            self.is_within = False
            return out

        monkeypatch.setattr(torch, "rms_norm", as_one)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.is_within:
            self.counts[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def count_calls(function):
    """How many functions, Python's and C's, `function` calls."""
    calls = 0

    def seen(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@torch.no_grad()
def cost_of_a_step(model, monkeypatch):
    """Kernels, all dispatched operations and function calls of one new token, with cache and mask as in `generate`."""
    cache, tokens = DynamicCache(config=model.config), random_tokens(1, 20)
    mask = torch.ones(1, 40, dtype=torch.int64)
    model(tokens, past_key_values=cache, attention_mask=mask[:, :20])

    def step(length):
        return model(tokens[:, :1], past_key_values=cache, attention_mask=mask[:, :length], logits_to_keep=1)

    # The first steps make the memory of the cache.
    for length in (21, 22, 23):
        step(length)
    calls = count_calls(lambda: step(24))
    with monkeypatch.context() as patch, Dispatched(patch) as dispatched:
        step(25)
    counts = dispatched.counts
    return sum(n for name, n in counts.items() if name not in VIEWS), counts.total(), calls


@pytest.mark.parametrize("backend", ["sdpa", "fox_acp"])
def test_a_step_of_decoding_costs_the_host_about_what_one_of_qwen3_does(backend, monkeypatch):
    kernels, dispatched, calls = cost_of_a_step(fox(backend), monkeypatch)
    of_qwen3 = cost_of_a_step(qwen3(), monkeypatch)
    assert kernels < 0.9 * of_qwen3[0]
    assert dispatched < 1.15 * of_qwen3[1]
    assert calls < 1.3 * of_qwen3[2]


def test_on_hopper_the_kernel_without_plans_gets_rows_that_it_can_read(monkeypatch):
    # Where PyTorch prefers cuDNN its memory-efficient kernel is called by name. It wants rows of a mask to start at
    # multiples of 8 elements, which PyTorch sees to only where it chooses itself.
    masks = []

    def kernel(query, key, value, bias, compute_log_sumexp, scale):
        masks.append(bias)
        scores = query @ key.mT * scale + bias
        return (scores.softmax(dim=-1) @ value,)

    monkeypatch.setattr(attention_fox, "prefers_cudnn", lambda device, dtype: True)
    monkeypatch.setattr(torch, "_scaled_dot_product_efficient_attention", kernel)
    model = tiny_fox(attn_implementation="fox_acp", num_key_value_heads=2, pad_token_id=0)
    tokens = random_tokens(2, 20)
    padding = (torch.arange(20) >= torch.tensor([[0], [7]])).long()
    options = {"attention_mask": padding, "max_new_tokens": 12, "do_sample": False}
    got = model.generate(tokens, **options)
    assert len(masks) == 2 * 11 and masks[-1].shape == (2, 2, 2, 31)
    assert all(stride % 8 == 0 for mask in masks for stride in mask.stride()[:3])
    assert torch.equal(got, model.generate(tokens, use_cache=False, **options))
