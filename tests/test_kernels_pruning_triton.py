"""The Triton kernels of pruning against its PyTorch definition: in the interpreter on a CPU, and on a GPU."""

import math

import pytest
import torch

from fox_kernels import pruning
from fox_kernels.gates import first_visible_key, gate_sums
from helpers import DEVICES, attention_inputs

triton_pruning = pytest.importorskip("fox_kernels.triton_pruning", reason="Triton has wheels for Linux only")

# What a test of one rule varies. Gates between exp(-20) and 1 prune from every block to none.
SHAPES = [
    pytest.param(dict(queries=1, keys=1000), id="one-query"),
    pytest.param(dict(queries=300), id="three-blocks"),
    pytest.param(dict(queries=300, keys=911, dim=40, heads=4, kv_heads=2), id="prefill-grouped"),
    pytest.param(dict(queries=1300, batch=1, heads=2, kv_heads=1, dim=16), id="two-programs"),
]

# Groups of keys that norms alone drop, and some that count by their means.
FAR_GROUPS = pytest.param(dict(queries=200, keys=1600, batch=1, heads=3, dim=32), id="far-groups")
WIDE = pytest.param(dict(queries=100, keys=1100, batch=1, heads=2, kv_heads=1, dim=136), id="wide")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("measured", [False, True], ids=["bound-given", "bound-measured"])
@pytest.mark.parametrize("shape", SHAPES)
def test_papers_rule_gives_exactly_the_keys_of_the_definition(shape, measured, device, poisoned_memory):
    q, k, _, log_fgate = attention_inputs(**shape, gate_logits=(-1.0, 5.0), dtype=torch.float16)
    heads, keys = log_fgate.shape[1:]
    log_fgate[:, 0] *= 8  # one head prunes much, the last nothing
    log_fgate[:, -1] *= 1e-3
    log_fgate[-1, 0, keys // 2] = -math.inf
    key_start = torch.tensor([0, keys // 3])[: len(q)]
    padding = torch.arange(keys) < key_start[:, None]
    k.masked_fill_(padding[:, None, :, None], math.nan)
    q.masked_fill_(padding[:, None, -q.shape[2] :, None], math.nan)
    bound = None if measured else torch.linspace(0.5, 6.0, heads)
    options = dict(scale=-0.2, log_tolerance=-5.0)
    sums, visible = gate_sums(log_fgate), first_visible_key(log_fgate, key_start, q.shape[2])
    expected = pruning.prune(q, k, sums, visible, key_start, rule="paper", logit_bound=bound, **options)
    assert expected.amax((0, 2))[0] > visible.amax((0, 2))[0]
    assert torch.equal(expected[:, -1], visible[:, -1])
    # A transposed layout, and what is not given is not read.
    q, k = (x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    bound = None if bound is None else bound.to(device)
    sums = type(sums)(*(x.to(device) for x in sums))
    got = triton_pruning.paper_rule(q, k, sums, visible.to(device), key_start.to(device), logit_bound=bound, **options)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_papers_rule_keeps_the_order_of_keys_whatever_the_gates(device, poisoned_memory):
    """Gates above 0 are not allowed, but the attention kernels rely on a first key that never decreases."""
    q, k, _, _ = (x.to(device) for x in attention_inputs(batch=1, heads=4, queries=1700, dim=16))
    log_fgate = 5 * torch.randn(1, 4, 1700, device=device)
    visible = first_visible_key(log_fgate, None, 1700)
    got = triton_pruning.paper_rule(
        q, k, gate_sums(log_fgate), visible, None, scale=0.25, log_tolerance=-3.0, logit_bound=torch.ones(1, 1)
        .to(device),
    )  # fmt: skip
    assert (got.diff(dim=-1) >= 0).all()
    assert (got > 0).any()
    assert (got <= torch.arange(1700, device=device)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hole", ["q", "k", "bound"])
def test_what_is_not_a_number_prunes_nothing(hole, device):
    q, k, _, log_fgate = (x.to(device) for x in attention_inputs(batch=1, heads=1, queries=300, dim=16))
    bound = None
    if hole == "bound":
        bound = torch.tensor([math.nan], device=device)
    else:
        {"q": q, "k": k}[hole][0, 0, 200, 3] = math.nan
    visible = first_visible_key(log_fgate, None, 300)
    options = dict(scale=0.25, log_tolerance=-3.0)
    pruned = triton_pruning.paper_rule(
        q.nan_to_num(), k.nan_to_num(), gate_sums(log_fgate), visible, None, logit_bound=None, **options
    )
    assert (pruned > visible).any()
    got = triton_pruning.paper_rule(q, k, gate_sums(log_fgate), visible, None, logit_bound=bound, **options)
    assert torch.equal(got, visible)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "measured"),
    [
        pytest.param(torch.float16, False, id="float16-bound-given"),
        pytest.param(torch.float32, True, id="float32-bound-measured"),
    ],
)
@pytest.mark.parametrize("shape", [*SHAPES, FAR_GROUPS, WIDE])
def test_tight_rule_gives_the_keys_of_the_definition(shape, measured, dtype, device, poisoned_memory):
    q, k, _, log_fgate = attention_inputs(**shape, gate_logits=(0.0, 8.0), dtype=dtype)
    heads, keys = log_fgate.shape[1:]
    log_fgate[:, -1] *= 1e-4
    log_fgate[-1, 0, keys // 2] = -math.inf
    key_start = torch.tensor([0, keys // 3])[: len(q)]
    padding = torch.arange(keys) < key_start[:, None]
    k.masked_fill_(padding[:, None, :, None], math.nan)
    q.masked_fill_(padding[:, None, -q.shape[2] :, None], math.nan)
    scale = q.shape[-1] ** -0.5
    bound = None if measured else pruning.measured_logit_bound(q, k, scale, key_start)
    options = dict(scale=scale, log_tolerance=-5.0)
    tensors = (q, k, gate_sums(log_fgate), first_visible_key(log_fgate, key_start, q.shape[2]), key_start)
    paper = pruning.prune(*tensors, rule="paper", logit_bound=bound, **options)
    expected = pruning.prune(*tensors, rule="tight", logit_bound=bound, **options)
    expected_mass = pruning.tight_rule(*tensors, logit_bound=bound, **options)[1]
    assert (expected >= paper).all() and (expected > paper).any()
    # A transposed layout, and what lies beyond a row is not read.
    wide = (torch.nn.functional.pad(x, (0, 120), value=math.nan).to(device) for x in (q, k))
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2)[..., : q.shape[-1]] for x in wide)
    got, mass = triton_pruning.tight_rule(
        q, k, type(tensors[2])(*(x.to(device) for x in tensors[2])), tensors[3].to(device), key_start.to(device),
        logit_bound=None if measured else bound.to(device), **options,
    )  # fmt: skip
    if device == "cpu":
        assert torch.equal(got, expected)
        # What is too far away to be added up counts as 2**-10 of half of eps.
        torch.testing.assert_close(mass, expected_mass, rtol=1e-4, atol=2.0**-10 * math.exp(-5.0))
    else:  # the tensor cores round differently: a block of keys that all but spends eps may go the other way
        assert ((got.cpu() - expected).abs() <= pruning.PRUNING_BLOCK_S).all()
        assert (got.cpu() != expected).float().mean() < 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hole", ["q", "k", "bound"])
def test_tight_rule_prunes_nothing_for_a_bound_that_is_not_a_number(hole, device):
    q, k, _, log_fgate = (x.to(device) for x in attention_inputs(batch=1, heads=1, queries=300, dim=16))
    visible = first_visible_key(log_fgate, None, 300)
    options = dict(scale=0.25, log_tolerance=-3.0)
    assert (
        triton_pruning.tight_rule(q, k, gate_sums(log_fgate), visible, None, logit_bound=None, **options)[0] > 0
    ).any()
    bound = None
    if hole == "bound":
        bound = torch.tensor([math.nan], device=device)
    else:
        {"q": q, "k": k}[hole][0, 0, 299, 3] = math.nan
    first = triton_pruning.tight_rule(q, k, gate_sums(log_fgate), visible, None, logit_bound=bound, **options)[0]
    assert torch.equal(first[..., 256:], visible[..., 256:])


@pytest.mark.parametrize("device", DEVICES)
def test_tight_rule_keeps_the_order_of_keys_whatever_the_gates(device, poisoned_memory):
    q, k, _, _ = (x.to(device) for x in attention_inputs(batch=1, heads=2, queries=1300, dim=16))
    log_fgate = 2 * torch.randn(1, 2, 1300, device=device) - 0.5
    visible = first_visible_key(log_fgate, None, 1300)
    options = dict(scale=0.25, log_tolerance=-3.0, logit_bound=torch.full((1, 1), 3.0, device=device))
    got, _ = triton_pruning.tight_rule(q, k, gate_sums(log_fgate), visible, None, **options)
    assert (got.diff(dim=-1) >= 0).all()
    assert (got > 0).any()
    assert (got <= torch.arange(1300, device=device)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_tolerance_that_float32_cannot_hold_takes_the_papers_rule(device):
    q, k, _, log_fgate = attention_inputs(batch=1, heads=1, queries=100, keys=1900, dim=16, gate_logits=(2.0, 4.0))
    tensors = (q, k, gate_sums(log_fgate), first_visible_key(log_fgate, None, 100), None)
    on_device = [x if x is None else type(x)(*(y.to(device) for y in x)) if isinstance(x, tuple) else x.to(device)
                 for x in tensors]  # fmt: skip
    for log_tolerance, same in ((-59.0, False), (-61.0, True)):
        options = dict(scale=0.25, log_tolerance=log_tolerance)
        bound = torch.full((1, 1), 6.0)
        paper = pruning.prune(*tensors, rule="paper", logit_bound=bound, **options)
        assert (paper > 0).any()
        for got in (
            pruning.prune(*tensors, rule="tight", logit_bound=bound, **options),
            triton_pruning.tight_rule(*on_device, logit_bound=bound.to(device), **options)[0].cpu(),
        ):
            assert torch.equal(got, paper) == same
