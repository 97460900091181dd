"""Adaptive computation pruning: the guarantee, measured in float64, and that pruned blocks really cost nothing."""

import math

import pytest
import torch

from fox_kernels import blockwise, forgetting_attention, forgetting_attention_reference
from fox_kernels.gates import first_visible_key, gate_sums
from fox_kernels.pruning import (
    PRUNING_BLOCK_S,
    PRUNING_BLOCK_T,
    first_kept_key,
    measured_logit_bound,
    pruning_threshold,
)
from helpers import assert_as_accurate_as_torch, attention_inputs, output_and_gradients


def kept_keys(q, k, log_fgate, log_tolerance, logit_bound=None, key_start=None):
    """First key that each query attends to, by the operator's own rule, `(B, H, T)`."""
    scale = q.shape[-1] ** -0.5
    bound = measured_logit_bound(q, k, scale, key_start) if logit_bound is None else logit_bound
    visible = first_visible_key(log_fgate, key_start, q.shape[2])
    return first_kept_key(gate_sums(log_fgate), visible, pruning_threshold(bound, k.shape[2], log_tolerance))


def lost_mass(q, k, log_fgate, first_key):
    """Attention mass before `first_key` in float64, `(B, H, T)`, from the dense softmax."""
    q, k, log_fgate = q.double(), k.double(), log_fgate.double()
    offset = k.shape[2] - q.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    running = log_fgate.cumsum(-1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + running[:, :, offset:, None] - running[:, :, None]
    key = torch.arange(k.shape[2])
    weights = scores.masked_fill(key > torch.arange(offset, k.shape[2])[:, None], -math.inf).softmax(-1)
    return (weights * (key < first_key[..., None])).sum(-1)


def adversarial(batch, keys, dim, generator, norm):
    """The worst case of the proof: a query opposed to its own key and aligned with the keys of the past."""
    direction = torch.nn.functional.normalize(torch.randn(batch, 1, 1, dim, generator=generator), dim=-1) * norm
    half = torch.arange(keys)[:, None] < keys // 2
    k = torch.where(half, direction, -direction).expand(batch, 1, keys, dim)
    return direction.expand(batch, 1, keys, dim), k


@pytest.mark.parametrize("log_tolerance", [-2.0, -10.0])
@pytest.mark.parametrize("kind", ["random", "adversarial", "jumps"])
def test_no_row_loses_more_mass_than_the_tolerance(kind, log_tolerance):
    generator = torch.Generator().manual_seed(7)
    worst, pruned = 0.0, 0
    for decay in (0.02, 0.1, 0.5, 3.0, 20.0):
        for norm in (1.0, 2.5):
            keys, dim = 700, 16
            q, k = torch.randn(2, 4, 1, keys, dim, generator=generator) * norm
            if kind == "adversarial":
                q, k = adversarial(4, keys, dim, generator, 2 * norm)
            log_fgate = -decay * torch.empty(4, 1, keys).exponential_(generator=generator)
            if kind == "jumps":  # open gates, then one that lands just around the threshold
                log_fgate = torch.zeros(4, 1, keys)
                bound = measured_logit_bound(q, k, dim**-0.5, None)
                edge = pruning_threshold(bound, keys, log_tolerance)
                log_fgate[:, :, 256] = edge * torch.tensor([[0.99], [0.9999], [1.0001], [1.01]])
            first = kept_keys(q, k, log_fgate, log_tolerance)
            pruned += int((first > 0).sum())
            worst = max(worst, float(lost_mass(q, k, log_fgate, first).max()))
    assert pruned > 0, "nothing was pruned: the test would pass on a rule that does nothing"
    assert worst <= math.exp(log_tolerance)


def test_the_guarantee_is_used_up_by_the_worst_case():
    """Equality up to the last block: the bound is sharp, so a threshold that is a little too high would break it."""
    keys, dim, bound = 256, 4, 3.0
    direction = torch.tensor([1.0, 0.0, 0.0, 0.0]) * math.sqrt(bound * 2)  # scale is 1 / 2
    q = direction.expand(1, 1, keys, dim)
    k = torch.where(torch.arange(keys)[:, None] < 128, direction, -direction).expand(1, 1, keys, dim)
    log_fgate = torch.zeros(1, 1, keys)
    log_fgate[..., 128] = -2 * bound - math.log(keys) - 2.0 - 1e-3
    lost = lost_mass(q, k, log_fgate, kept_keys(q, k, log_fgate, -2.0, torch.full((1, 1), bound)))
    # 128 of the 256 keys that the rule budgets for; the row at 128 has only its own key besides.
    assert 0.4 * math.exp(-2.0) < float(lost.max()) <= 0.5 * math.exp(-2.0)


def test_blocks_are_dropped_exactly_when_the_published_rule_says_so():
    """A plain double loop over blocks, in float64, from the inequality of arXiv:2504.06949."""
    q, k, _, _ = attention_inputs(queries=500, keys=611, heads=2, dim=16)
    log_fgate = -0.3 * torch.empty(2, 2, 611).exponential_()
    bound = torch.tensor([1.0, 4.0]).expand(2, 2)
    got = kept_keys(q, k, log_fgate, -5.0, bound)
    running = log_fgate.double().cumsum(-1)
    for b in range(2):
        for h in range(2):
            limit = -2 * float(bound[b, h]) - math.log(611) - 5.0
            for start in range(0, 500, PRUNING_BLOCK_T):
                dropped = 0
                for block in range(611 // PRUNING_BLOCK_S):
                    last = (block + 1) * PRUNING_BLOCK_S - 1
                    if last < 111 + start and float(running[b, h, 111 + start] - running[b, h, last]) < limit:
                        dropped = block + 1
                assert (got[b, h, start : start + PRUNING_BLOCK_T] == dropped * PRUNING_BLOCK_S).all(), (b, h, start)


def test_forward_and_backward_leave_out_the_same_pairs():
    """Gradients of the pruned operator are those of a dense attention whose pruned pairs are masked."""
    q, k, v, log_fgate = attention_inputs(queries=400, heads=2, dim=16, gate_logits=(-1.0, 3.0))
    first = kept_keys(q, k, log_fgate, -3.0)
    assert (first > 0).any()

    def masked(q, k, v, log_fgate):
        running = log_fgate.double().cumsum(-1)
        scores = q @ k.transpose(-1, -2) / 4.0 + (running[..., :, None] - running[..., None, :]).to(q.dtype)
        key = torch.arange(400)
        hidden = (key > key[:, None]) | (key < first[..., None])
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v

    grad_out = torch.randn(q.shape)
    exact = output_and_gradients(masked, [x.double() for x in (q, k, v, log_fgate)], grad_out.double())
    same = output_and_gradients(masked, (q, k, v, log_fgate), grad_out)
    got = output_and_gradients(forgetting_attention, (q, k, v, log_fgate), grad_out, log_pruning_tolerance=-3.0)
    for name, x, y, z in zip(("output", "dq", "dk", "dv", "dlog_fgate"), got, same, exact, strict=True):
        assert_as_accurate_as_torch(x, y, z, name=name)


def test_pruned_keys_are_never_read():
    q, k, v, log_fgate = attention_inputs(queries=512, dim=16, gate_logits=(-1.0, 1.0))
    first = kept_keys(q, k, log_fgate, -10.0, torch.full((2, 4), 30.0))
    everywhere_pruned = int(first[:, :, -1].min())
    assert everywhere_pruned >= 256
    tail = slice(512 - PRUNING_BLOCK_T, 512)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, :, :everywhere_pruned], poisoned_v[:, :, :everywhere_pruned] = math.nan, math.nan
    options = dict(log_pruning_tolerance=-10.0, logit_bound=30.0)
    got = forgetting_attention(q[:, :, tail], poisoned_k, poisoned_v, log_fgate, **options)
    assert torch.equal(got, forgetting_attention(q[:, :, tail], k, v, log_fgate, **options))


def test_pruning_skips_the_work_on_a_cpu(monkeypatch):
    """Multiply-adds counted at the score product, not time: a block that is skipped is not computed and masked."""
    counted = []
    original = blockwise._scores
    monkeypatch.setattr(
        blockwise,
        "_scores",
        lambda q, k, block, scale: counted.append(q[..., 0].numel() * k.shape[1]) or original(q, k, block, scale),
    )
    q, k, v, log_fgate = attention_inputs(batch=1, heads=2, queries=1024, dim=16, gate_logits=(0.0, 0.0))
    forgetting_attention(q, k, v, log_fgate)
    full = sum(counted)
    counted.clear()
    _, stats = forgetting_attention(q, k, v, log_fgate, log_pruning_tolerance=-10.0, return_stats=True)
    # Diagonal blocks are computed whole, half of each for nothing: add them to the pairs that stay.
    pairs = 1024 * 1025 / 2
    diagonal_waste = 8 * 128 * 127 / 2
    kept = (1 - float(stats.pruned_fraction.mean())) * pairs
    assert sum(counted) / full == pytest.approx((kept + diagonal_waste) / (pairs + diagonal_waste), rel=0.02)
    assert float(stats.pruned_fraction.min()) > 0.5


def test_stats_count_the_visible_pairs_and_bound_the_loss():
    q, k, v, log_fgate = attention_inputs(queries=600, heads=3, dim=16, gate_logits=(-2.0, 4.0))
    key_start = torch.tensor([0, 130])
    _, stats = forgetting_attention(
        q, k, v, log_fgate, log_pruning_tolerance=-4.0, key_start=key_start, return_stats=True
    )
    first = kept_keys(q, k, log_fgate, -4.0, key_start=key_start)
    pairs = torch.arange(600) + 1 - key_start[:, None, None]
    visible = pairs.clamp(min=0).double().expand(2, 3, 600)
    skipped = (first - key_start[:, None, None]).double().minimum(visible)
    torch.testing.assert_close(stats.pruned_fraction.double(), skipped.sum((0, 2)) / visible.sum((0, 2)))
    assert stats.pruned_fraction.min() > 0
    k[1, :, :130] = -100 * q[1, :, :130]  # no weight on padding, so that its mass does not count
    lost = lost_mass(q[:1], k[:1], log_fgate[:1], first[:1]).amax((0, 2))
    assert (lost <= stats.lost_mass_bound.double()).all()
    assert (stats.lost_mass_bound <= math.exp(-4.0)).all()
    _, nothing = forgetting_attention(q, k, v, log_fgate, return_stats=True)
    assert (nothing.pruned_fraction == 0).all() and (nothing.lost_mass_bound == 0).all()


def test_a_given_bound_prunes_like_the_same_bound_measured():
    q, k, v, log_fgate = attention_inputs(queries=400, heads=4, kv_heads=2, dim=16, gate_logits=(-1.0, 2.0))
    bound = measured_logit_bound(q, k, 0.25, None)
    torch.testing.assert_close(bound, 0.25 * q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1).repeat_interleave(2, 1))
    assert ((q @ k.repeat_interleave(2, 1).transpose(-1, -2)).abs().amax((-1, -2)) * 0.25 <= bound).all()
    expected = forgetting_attention(q, k, v, log_fgate, log_pruning_tolerance=-10.0)
    given = forgetting_attention(q, k, v, log_fgate, log_pruning_tolerance=-10.0, logit_bound=bound)
    assert torch.equal(given, expected)
    _, tight = forgetting_attention(q, k, v, log_fgate, log_pruning_tolerance=-10.0, return_stats=True)
    _, loose = forgetting_attention(
        q, k, v, log_fgate, log_pruning_tolerance=-10.0, logit_bound=40.0, return_stats=True
    )
    assert (loose.pruned_fraction < tight.pruned_fraction).all()


def test_a_bound_that_is_not_a_number_prunes_nothing():
    q, k, v, log_fgate = attention_inputs(queries=300, batch=1, heads=1, gate_logits=(-3.0, -3.0))
    got = forgetting_attention(q, k, v, log_fgate, log_pruning_tolerance=-10.0, logit_bound=torch.tensor([math.nan]))
    torch.testing.assert_close(got, forgetting_attention_reference(q, k, v, log_fgate), atol=2e-6, rtol=0)
