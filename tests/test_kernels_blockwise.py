"""What the CPU path does beyond the definition: heads in the order of their decay, keys that cannot count left out."""

import math

import pytest
import torch

from fox_kernels import blockwise, forgetting_attention, forgetting_attention_reference
from helpers import assert_as_accurate_as_torch, attention_inputs, output_and_gradients

NAMES = ("output", "dq", "dk", "dv", "dlog_fgate")


def assert_as_accurate_as_the_definition(inputs):
    grad_out = torch.randn(inputs[0].shape)
    exact = output_and_gradients(forgetting_attention_reference, [x.double() for x in inputs], grad_out.double())
    same = output_and_gradients(forgetting_attention_reference, inputs, grad_out)
    got = output_and_gradients(forgetting_attention, inputs, grad_out)
    for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
        assert_as_accurate_as_torch(x, y, z, name=name)


@pytest.fixture
def share_of_scores(monkeypatch):
    """Call it for the scores computed, as a share of those in blocks that reach back to the first key."""
    computed, blocks = [], blockwise._blocks

    def counting(heads):
        for block in blocks(heads):
            num_heads, num_rows, _ = block.shape
            computed.append((math.prod(block.shape), num_heads * num_rows * block.keys.stop))
            yield block

    monkeypatch.setattr(blockwise, "_blocks", counting)
    return lambda: sum(size for size, _ in computed) / sum(full for _, full in computed)


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_heads_of_any_decay_in_any_order(kv_heads, threads, monkeypatch):
    # Few scores a block, so that the heads of a sequence are spread over many blocks.
    monkeypatch.setattr(blockwise, "_SCORES_PER_THREAD", 1 << 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v, log_fgate = attention_inputs(heads=6, kv_heads=kv_heads, queries=700, dim=16)
    decay = torch.tensor([1e-4, 3.0, 0.01, 0.3, 1.0, 0.0])
    assert_as_accurate_as_the_definition([q, k, v, log_fgate * decay[:, None]])


def test_keys_that_cannot_count_are_not_computed(share_of_scores):
    q, k, v, log_fgate = attention_inputs(batch=1, heads=2, queries=1500, dim=16, gate_logits=(-2.0, 0.0))
    assert_as_accurate_as_the_definition([q, k, v, log_fgate])
    # 1.35 nats a token: 60 for 1e-26 and twice a bound of 11 are 60 tokens. With the diagonal that is 22 %.
    assert share_of_scores() < 0.3


def test_far_keys_with_large_scores_are_computed():
    """A key whose score is 800 above the others has all the weight 294 nats of decay later."""
    q, k, v, log_fgate = attention_inputs(batch=1, heads=2, queries=700, dim=16, gate_logits=(0.541, 0.541))
    assert float(log_fgate.mean()) == pytest.approx(-294 / 640, rel=2e-3)
    q[..., 0], k[..., 0] = 40.0, 0.0
    k[:, :, 10, 0] = 80.0
    inputs = [q, k, v, log_fgate]
    exact = forgetting_attention_reference(*(x.double() for x in inputs))
    torch.testing.assert_close(exact[:, :, 650], v[:, :, 10].double(), atol=1e-6, rtol=0)
    assert_as_accurate_as_the_definition(inputs)


def test_what_is_not_a_number_leaves_nothing_out(share_of_scores):
    q, k, v, log_fgate = attention_inputs(batch=1, heads=1, queries=600, dim=16, gate_logits=(-2.0, 0.0))
    k[:, :, 5] = math.nan
    assert forgetting_attention(q, k, v, log_fgate)[:, :, 5:].isnan().all()
    assert share_of_scores() == 1.0
