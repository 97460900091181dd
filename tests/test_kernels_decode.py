"""Decoding against float64 and against the operator: on a CPU, in the interpreter, as machine code on a GPU.

The interpreter multiplies bit patterns of bfloat16, so there only float32 and float16 are tested.
"""

import math
import os

import pytest
import torch

from fox_kernels import forgetting_attention_reference
from fox_kernels.decode import (
    append_gates,
    empty_sums,
    first_decoded_key,
    forgetting_attention_decode,
    rewind_gates,
)
from fox_kernels.gates import GATE_BLOCK, GateSums, first_visible_key, gate_sums
from fox_kernels.pruning import first_kept_key, paper_budget, pruning_threshold
from helpers import assert_as_accurate_as_torch, attention_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpret = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1 to run the kernels on a CPU"),
]
# Where and how: the CPU path, the kernels in the interpreter, the kernels.
PATHS = [
    pytest.param("cpu"),
    pytest.param("interpreter", marks=interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CASES = [
    pytest.param(dict(queries=1, keys=1, heads=2), id="first-token"),
    pytest.param(dict(queries=1, keys=301, heads=3), id="one-query"),
    pytest.param(dict(queries=16, keys=16, heads=2), id="all-are-queries"),
    pytest.param(dict(queries=5, keys=260, heads=4, kv_heads=2, dim=40), id="grouped"),
    pytest.param(dict(queries=16, keys=200, heads=8, kv_heads=1, dim=16), id="multi-query-128-rows"),
    pytest.param(dict(queries=3, keys=129, heads=6, kv_heads=2), id="groups-of-three"),
    pytest.param(dict(queries=7, keys=200, heads=2, gate_logits=(-20.0, 20.0)), id="extreme-gates"),
]


def decode(
    path, q, k, v, sums, *, num_keys=None, first_key=None, key_start=None, tolerance=None, bound=None, rule="paper"
):  # fmt: skip
    """Through the public function, or, on a CPU, through the launch function of the kernels."""
    if path != "interpreter":
        return forgetting_attention_decode(
            q, k, v, sums, num_keys=num_keys, first_key=first_key, key_start=key_start,
            log_pruning_tolerance=tolerance, logit_bound=bound, pruning_rule=rule,
        )  # fmt: skip
    from fox_kernels import triton_decode

    length = num_keys if isinstance(num_keys, torch.Tensor) else None
    num_keys = k.shape[2] if num_keys is None or length is not None else num_keys
    budget = 0.0 if tolerance is None else paper_budget(num_keys, tolerance)
    bound = None if tolerance is None else torch.as_tensor(bound).expand(q.shape[:2])
    scale = q.shape[-1] ** -0.5
    tight = tolerance if rule == "tight" else None
    return triton_decode.forward(
        q, k, v, sums, num_keys, length, scale, first_key, key_start, bound, budget, tight=tight
    )


def on(path, *tensors):
    device = "cuda" if path == "cuda" else "cpu"
    return [x.to(device) for x in tensors]


def dtypes_of(path):
    return {
        "cpu": [torch.float32, torch.bfloat16],
        "interpreter": [torch.float32, torch.float16],
        "cuda": [torch.float32, torch.float16, torch.bfloat16],
    }[path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", CASES)
def test_matches_the_definition(shape, path, poisoned_memory):
    for dtype in dtypes_of(path):
        q, k, v, log_fgate = on(path, *attention_inputs(**shape, dtype=dtype))
        num_queries, num_keys = q.shape[2], k.shape[2]
        log_fgate[1:, 1, num_keys // 2] = -math.inf
        (key_start,) = on(path, torch.tensor([0, num_keys // 3]))
        first_key = first_visible_key(log_fgate, None, num_queries)
        got = decode(path, q, k, v, gate_sums(log_fgate), first_key=first_key, key_start=key_start)
        exact = forgetting_attention_reference(q.double(), k.double(), v.double(), log_fgate, key_start=key_start)
        same = forgetting_attention_reference(q, k, v, log_fgate, key_start=key_start)
        assert got.dtype == dtype and got.stride() == q.stride()
        assert_as_accurate_as_torch(got, same, exact, name=f"output in {dtype}")


@pytest.mark.parametrize("path", PATHS)
def test_nothing_hidden_takes_the_shorter_way_and_gives_the_same(path, poisoned_memory):
    q, k, v, log_fgate = on(path, *attention_inputs(queries=4, keys=260, kv_heads=2))
    got = decode(path, q, k, v, gate_sums(log_fgate))
    same = forgetting_attention_reference(q, k, v, log_fgate)
    exact = forgetting_attention_reference(*(x.double() for x in (q, k, v)), log_fgate)
    assert_as_accurate_as_torch(got, same, exact)


@pytest.mark.parametrize("path", PATHS)
def test_a_sequence_of_padding_gives_zeros(path, poisoned_memory):
    q, k, v, log_fgate = on(path, *attention_inputs(queries=2, keys=128, heads=2))
    (key_start,) = on(path, torch.tensor([128, 127]))
    got = decode(path, q, k, v, gate_sums(log_fgate), key_start=key_start)
    assert not got[0].any() and not got[1, :, 0].any()
    torch.testing.assert_close(got[1, :, 1], v[1, :, 127])


def pruning_case(seed, num_keys, num_queries, heads=4, path="cpu"):
    """Gates that forget within 1 to 1000 tokens and a few strong ones: boundaries everywhere."""
    generator = torch.Generator().manual_seed(seed)
    log_fgate = -(10.0 ** (-3.0 * torch.rand(2, heads, 1, generator=generator))) * torch.rand(
        2, heads, num_keys, generator=generator
    )
    log_fgate = torch.where(torch.rand(log_fgate.shape, generator=generator) < 0.01, -20.0, log_fgate)
    key_start = torch.tensor([0, num_keys // 5])
    bound = 2.0 + 4.0 * torch.rand(2, heads, generator=generator)
    return on(path, log_fgate, key_start, bound)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_queries", [1, 5, 16])
def test_drops_the_keys_that_the_operator_drops(num_queries, path, poisoned_memory):
    pruned = 0
    for seed, num_keys in enumerate([16, 63, 64, 65, 127, 128, 129, 192, 193, 640, 1000, 3000, 30000]):
        log_fgate, key_start, bound = pruning_case(seed, num_keys, num_queries, path=path)
        sums = gate_sums(log_fgate)
        visible = first_visible_key(log_fgate, key_start, num_queries)
        expected = first_kept_key(sums, visible, pruning_threshold(bound, num_keys, -6.0))
        if path == "cpu":
            got = first_decoded_key(sums, num_keys, None, key_start, bound, -6.0, num_queries)
        else:
            from fox_kernels import triton_decode

            budget = paper_budget(num_keys, -6.0)
            shape = (2, 4, 2, num_queries)
            got, lowest = triton_decode.plan(shape, sums, num_keys, None, None, key_start, bound, budget)
            assert torch.equal(lowest, expected.unflatten(1, (2, 2)).amin((2, 3)).clamp(max=num_keys - 1))
        assert torch.equal(got, expected), num_keys
        pruned += int((expected > visible).sum())
    assert pruned >= 48


@pytest.mark.parametrize("rows_of_exact_ties", [1, 127, 128, 129, 500])
def test_a_block_exactly_at_the_threshold_is_kept(rows_of_exact_ties):
    # Every sum is a whole number of bits, so that equality happens.
    log_fgate = torch.full((1, 1, 640), -math.log(2.0))
    sums = gate_sums(log_fgate)
    for limit in (rows_of_exact_ties, rows_of_exact_ties + 0.5):
        visible = first_visible_key(log_fgate, None, 1)
        threshold = torch.full((1, 1), -limit * math.log(2.0))
        expected = first_kept_key(sums, visible, threshold)
        bound = (-threshold / (1.0 + 2.0**-16) - paper_budget(640, -1.0)) / 2.0
        got = first_decoded_key(sums, 640, None, None, bound, -1.0, 1)
        rebuilt = first_kept_key(sums, visible, pruning_threshold(bound, 640, -1.0))
        assert torch.equal(got, rebuilt)
        assert abs(int(got) - int(expected)) <= 64


@pytest.mark.parametrize("path", PATHS)
def test_pruned_rows_lose_less_than_the_tolerance_and_read_nothing_before_the_boundary(path, poisoned_memory):
    q, k, v, _ = attention_inputs(queries=3, keys=1500, heads=4, kv_heads=2, dim=16)
    q, k = (x / x.norm(dim=-1, keepdim=True) * 16**0.5 for x in (q, k))
    log_fgate, key_start, _ = pruning_case(3, 1500, 3)
    bound = 1.01 * 16**0.5
    sums = gate_sums(log_fgate)
    first = first_decoded_key(sums, 1500, None, key_start, torch.full((2, 4), bound), -6.0, 3)
    assert (first.amin(-1) > key_start[:, None]).sum() >= 4

    # The mass that every row loses, in float64.
    running = sums.running() * math.log(2.0)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 16**-0.5
    scores += running[..., -3:, None] - running[..., None, :]
    key, query = torch.arange(1500), torch.arange(1497, 1500)
    visible = (key <= query[:, None]) & (key >= key_start[:, None, None, None])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    assert (weights * (key < first[..., None])).sum(-1).max() <= math.exp(-6.0)

    # Memory before the smallest boundary of a key head, and after the last key, may hold anything.
    lowest = first.unflatten(1, (2, 2)).amin((2, 3))
    gone = key < lowest[..., None]
    after = torch.full((2, 2, 70, 16), math.nan)
    longer = [torch.cat([x.masked_fill(gone[..., None], math.nan), after], 2) for x in (k, v)]
    long_sums = empty_sums(2, 4, 1570)
    append_gates(long_sums, log_fgate, 0)
    arguments = on(path, q, *longer), GateSums(*on(path, *long_sums.sums)), *on(path, key_start)
    for num_keys in (1500, on(path, torch.tensor(1500))[0]):
        got = decode(
            path, *arguments[0], arguments[1], num_keys=num_keys, key_start=arguments[2], tolerance=-6.0, bound=bound
        )
        kept = [x.double() for x in (q, k, v)]
        exact = forgetting_attention_reference(*kept, log_fgate, key_start=key_start)
        assert not got.isnan().any()
        assert (got.cpu() - exact).abs().max() <= 2 * math.exp(-6.0) * v.abs().max()


def bounded_scores(kind, num_keys, num_queries, bound, seed, dtype=torch.float32):
    """q and k of 4 and 2 heads with `|q . k| * 16 ** -0.5 <= bound`."""
    q, k, v, _ = attention_inputs(queries=num_queries, keys=num_keys, heads=4, kv_heads=2, dim=16, seed=seed)
    if kind == "common":
        k = k + 3.0 * k[..., :1, :]
        q = q + 3.0 * k[..., :1, :].repeat_interleave(2, 1)
    elif kind == "worst":  # far keys at +U, the nearest 200 at -U
        sign = torch.where(torch.arange(num_keys) < num_keys - 200, 1.0, -1.0)[:, None]
        k = sign * k[..., :1, :]
        q = k[..., :1, :].repeat_interleave(2, 1).expand(q.shape)
    q, k = (x / x.norm(dim=-1, keepdim=True) * (0.99 * bound) ** 0.5 * 2.0 for x in (q, k))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def plan_of(path, q, k, log_fgate, bound, tolerance, rule, **options):
    """First key of each row; `options`: key_start, window."""
    num_keys, num_queries = k.shape[2], q.shape[2]
    sums = gate_sums(log_fgate)
    key_start, window = options.get("key_start"), options.get("window")
    if path == "cpu":
        scored = (q, k, 16**-0.5) if rule == "tight" else None
        return first_decoded_key(sums, num_keys, None, key_start, bound, tolerance, num_queries, window, scored)
    from fox_kernels import triton_decode

    tight = triton_decode.TightInputs(q, k, 16**-0.5, tolerance) if rule == "tight" else None
    budget = paper_budget(num_keys, tolerance)
    shape = (*q.shape[:2], k.shape[1], num_queries)
    first, lowest = triton_decode.plan(shape, sums, num_keys, None, None, key_start, bound, budget, window, tight)
    assert torch.equal(lowest, first.unflatten(1, (2, 2)).amin((2, 3)).clamp(max=num_keys - 1))
    return first.cpu()


def lost_mass(q, k, log_fgate, first, key_start=None, window=None):
    """Share of each row's attention before `first`, float64."""
    num_keys, num_queries = k.shape[2], q.shape[2]
    lam = log_fgate.double().cumsum(-1)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 16**-0.5
    scores += lam[..., -num_queries:, None] - lam[..., None, :]
    key, query = torch.arange(num_keys), torch.arange(num_keys - num_queries, num_keys)[:, None]
    visible = (key <= query) & (key > query - (window or num_keys))
    if key_start is not None:
        visible = visible & (key >= key_start[:, None, None, None])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return weights.masked_fill(key >= first[..., None], 0.0).nansum(-1)  # a row of padding has no weights


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["random", "common", "worst"])
def test_the_tight_rule_keeps_its_promise_and_drops_more_than_the_papers(kind, path, poisoned_memory):
    """Bounds from 1 to 16 nats, tolerances from e^-3 to e^-20; similar scores come close to the tolerance."""
    more = fewer_blocks = 0
    worst = 0.0
    for seed, (num_keys, num_queries) in enumerate([(3000, 1), (1300, 5), (20000, 2), (130, 16)]):
        bound, tolerance = (1.0, 4.0, 8.0, 16.0)[seed % 4], (-3.0, -10.0, -20.0)[seed % 3]
        q, k, _ = bounded_scores(kind, num_keys, num_queries, bound, seed)
        log_fgate, key_start, _ = pruning_case(seed, num_keys, num_queries)
        options = dict(key_start=key_start) if seed % 2 else dict(window=num_keys // 2)
        bounds = torch.full((2, 4), bound)
        there = on(path, q, k, log_fgate, bounds)
        at = {name: on(path, x)[0] if name == "key_start" else x for name, x in options.items()}
        paper = plan_of(path, *there, tolerance, "paper", **at)
        tight = plan_of(path, *there, tolerance, "tight", **at)
        assert (tight >= paper).all()
        lost = lost_mass(q, k, log_fgate, tight, **options)
        assert lost.max() <= math.exp(tolerance), (seed, float(lost.max()))
        worst = max(worst, float(lost.max()) / math.exp(tolerance))
        more += int((tight - paper).sum())
        # The kernel and the CPU path round differently: now and then a block that lies on the edge.
        same = plan_of("cpu", q, k, log_fgate, bounds, tolerance, "tight", **options)
        assert ((tight - same).abs() <= GATE_BLOCK).all()
        fewer_blocks += int((tight != same).sum())
    assert more > 500
    assert fewer_blocks <= 2
    assert kind != "common" or worst > 0.01


@pytest.mark.parametrize("path", PATHS)
def test_the_tight_rule_reads_nothing_before_its_boundary_but_the_nearest_keys(path, poisoned_memory):
    for dtype in dtypes_of(path):
        q, k, v = bounded_scores("random", 1500, 3, 4.0, 0, dtype)
        log_fgate, key_start, _ = pruning_case(3, 1500, 3)
        key_start[1] = 1490  # within the nearest keys
        bounds = torch.full((2, 4), 4.1)
        there = on(path, q, k, v, log_fgate, key_start, bounds)
        first = plan_of(path, *there[:2], there[3], there[5], -6.0, "tight", key_start=there[4])
        lowest = first.unflatten(1, (2, 2)).amin((2, 3))
        assert (lowest[0] > 64).all() and (lowest[1] >= 1490).all()
        # The rule itself looks at the last 128 keys that a row sees.
        seen = torch.tensor([[1500 - GATE_BLOCK], [1490]])
        gone = (torch.arange(1500) < torch.minimum(lowest, seen)[..., None])[..., None]
        hidden = on(path, *(x.masked_fill(gone, math.nan) for x in (k, v)))
        got = decode(
            path, there[0], *hidden, gate_sums(there[3]), key_start=there[4], tolerance=-6.0, bound=4.1, rule="tight"
        )
        exact = forgetting_attention_reference(q.double(), k.double(), v.double(), log_fgate, key_start=key_start)
        assert not got.isnan().any()
        assert (got.cpu() - exact).abs().max() <= 2 * math.exp(-6.0) * v.abs().max() + 0.02


@pytest.mark.parametrize("cuts", [[1] * 300, [5, 123, 1, 127, 44], [128, 128, 44], [300], [0, 300]], ids=str)
def test_sums_of_pieces_have_the_bits_of_the_whole(cuts):
    log_fgate = attention_inputs(queries=300, gate_logits=(-20.0, 20.0))[3]
    log_fgate[1, 2, 150] = -math.inf
    growing, num_keys = empty_sums(2, 4, 400), 0
    for length in cuts:
        append_gates(growing, log_fgate[..., num_keys : num_keys + length], num_keys)
        num_keys += length
    whole = gate_sums(log_fgate)
    assert torch.equal(growing.sums.within[..., :300], whole.within)
    assert torch.equal(growing.sums.starts[..., : whole.starts.shape[-1]], whole.starts)


@pytest.mark.parametrize("num_left", [0, 1, 127, 128, 129, 256, 299])
def test_sums_go_on_from_where_they_were_rewound_to(num_left):
    log_fgate, other = (attention_inputs(queries=300, seed=seed)[3] for seed in (0, 1))
    growing = empty_sums(2, 4, 300)
    append_gates(growing, log_fgate, 0)
    mixed = torch.cat([log_fgate[..., :num_left], other[..., num_left:]], -1)
    rewind_gates(growing, log_fgate, num_left)
    append_gates(growing, mixed[..., num_left:], num_left)
    whole = gate_sums(mixed)
    assert torch.equal(growing.sums.within, whole.within)
    assert torch.equal(growing.sums.starts, whole.starts)


@pytest.mark.parametrize("path", PATHS[1:])
def test_the_append_kernel_sums_as_pytorch_does(path, poisoned_memory):
    from fox_kernels import triton_decode

    (log_fgate,) = on(path, attention_inputs(queries=700, gate_logits=(-20.0, 20.0))[3])
    log_fgate[1, 2, 150] = -math.inf
    device = log_fgate.device
    strided = log_fgate.transpose(1, 2).contiguous().transpose(1, 2)
    # Token by token from the first one and over the end of a block; the interpreter takes 0.1 s for each.
    one_by_one = [1] * 140 if path == "cuda" else [1] * 6 + [118] + [1] * 16
    for cuts in ([300, 1, 1, 82, 128, 188], [*one_by_one, 560], [700]):
        growing, num_keys = empty_sums(2, 4, 720, device), 0
        for length in cuts:
            on_device = torch.tensor(num_keys, device=device) if num_keys % 2 else None
            piece = strided[..., num_keys : num_keys + length]
            triton_decode.append_gates(growing.sums, growing.totals, piece, num_keys, on_device)
            num_keys += length
        whole = gate_sums(log_fgate)
        got = GateSums(growing.sums.within[..., :700], growing.sums.starts[..., : -(-700 // GATE_BLOCK)])
        torch.testing.assert_close(got.running(), whole.running(), rtol=1e-14, atol=1e-13)
        # Both are differences of float64 sums of up to 7000 bits.
        torch.testing.assert_close(got.within[0], whole.within[0], rtol=1e-6, atol=4e-12)


def test_says_what_is_wrong_with_the_input():
    q, k, v, log_fgate = attention_inputs(queries=3, keys=40)
    sums = gate_sums(log_fgate)
    with pytest.raises(ValueError, match="q must have at most 16 positions; got 17. Use forgetting_attention."):
        forgetting_attention_decode(k[:, :, :17], k, v, sums)
    with pytest.raises(ValueError, match="num_keys must be between the 3 positions of q and the 40 of k; got 41"):
        forgetting_attention_decode(q, k, v, sums, num_keys=41)
    with pytest.raises(ValueError, match="logit_bound must be given to prune while decoding; got None"):
        forgetting_attention_decode(q, k, v, sums, log_pruning_tolerance=-10.0)
    with pytest.raises(ValueError, match=r"pruning_rule must be one of \('paper', 'tight'\); got 'tightest'"):
        forgetting_attention_decode(q, k, v, sums, pruning_rule="tightest")
    with pytest.raises(ValueError, match=r"gate_sums.starts must be \(2, 2, 4, 1\) or longer; got \(2, 2, 4, 0\)"):
        forgetting_attention_decode(q, k, v, GateSums(sums.within, sums.starts[..., :0]))
    with pytest.raises(ValueError, match=r"gate_sums.within must be \(2, 2, 4, 40\) or longer; got \(2, 2, 4, 39\)"):
        forgetting_attention_decode(q, k, v, GateSums(sums.within[..., :39], sums.starts))
    with pytest.raises(ValueError, match="gate_sums.starts must be float32 on cpu; got torch.float64 on cpu"):
        forgetting_attention_decode(q, k, v, GateSums(sums.within, sums.starts.double()))
    with pytest.raises(ValueError, match=r"first_key must be \(2, 4, 3\) int32; got \(2, 4, 1\) torch.int32"):
        forgetting_attention_decode(q, k, v, sums, first_key=torch.zeros(2, 4, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"num_keys must be one int32 or int64; got \(2,\) torch.int64"):
        forgetting_attention_decode(q, k, v, sums, num_keys=torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="the sums have room for 40 keys; got 2 new ones after 39"):
        append_gates(empty_sums(2, 4, 40), log_fgate[..., :2], 39)
    with pytest.raises(ValueError, match=r"log_fgate must be \(2, 4, 'T'\) float32"):
        append_gates(empty_sums(2, 4, 40), log_fgate.double(), 0)


def test_compiles_into_one_graph_and_keeps_pytorchs_contract():
    q, k, v, log_fgate = attention_inputs(queries=3, keys=200, kv_heads=2)
    sums = gate_sums(log_fgate)
    options = dict(log_pruning_tolerance=-6.0, logit_bound=3.0, num_keys=torch.tensor(180))

    def step(q, k, v, sums):
        return forgetting_attention_decode(q, k, v, sums, **options)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, sums), step(q, k, v, sums))
    bound = torch.full((2, 4), 3.0)
    arguments = [q, k, v, *sums, 200, torch.tensor(180), 0.2, None, torch.tensor([0, 3]), bound, -6.0]
    torch.library.opcheck(torch.ops.fox_kernels.forgetting_attention_decode.default, arguments)


GPU_SHAPES = [
    pytest.param(dict(batch=1, heads=24, queries=1, keys=16384, dim=64), id="many-heads"),
    pytest.param(dict(batch=1, heads=2, queries=1, keys=131_072, dim=64), id="two-heads-long"),
    pytest.param(dict(batch=2, heads=16, kv_heads=2, queries=16, keys=5000, dim=128), id="grouped-128-rows"),
    pytest.param(dict(batch=3, heads=8, kv_heads=2, queries=4, keys=4097, dim=256), id="wide"),
    pytest.param(dict(batch=65, heads=5, queries=2, keys=333, dim=96), id="large-batch"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_gpu_kernels_match_the_definition_at_length(shape, dtype, poisoned_memory):
    q, k, v, log_fgate = attention_inputs(**shape, gate_logits=(2.0, 12.0), dtype=dtype, device="cuda")
    batch, num_heads, num_queries, dim = q.shape
    key_start = torch.randint(0, k.shape[2] // 2, (batch,), device="cuda")
    got = forgetting_attention_decode(q, k, v, gate_sums(log_fgate), key_start=key_start)
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), log_fgate, key_start=key_start)
    same = forgetting_attention_reference(q, k, v, log_fgate, key_start=key_start)
    assert_as_accurate_as_torch(got, same, exact)
    again = forgetting_attention_decode(q, k, v, gate_sums(log_fgate), key_start=key_start)
    assert torch.equal(got, again)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [None, -10.0])
def test_gpu_decoding_replays_from_a_cuda_graph_at_growing_length(tolerance):
    capacity, prompt = 3000, 500
    shape = dict(batch=2, heads=4, kv_heads=2, keys=capacity, dim=64, dtype=torch.bfloat16, device="cuda")
    q, k, v, log_fgate = attention_inputs(queries=capacity, gate_logits=(-1.0, 6.0), **{**shape, "keys": None})
    length = torch.tensor(prompt, dtype=torch.int32, device="cuda")
    growing = empty_sums(2, 4, capacity, "cuda")
    append_gates(growing, log_fgate[..., :prompt], 0)
    query, gate = q[:, :, :1].clone(), log_fgate[..., :1].clone()
    options = dict(log_pruning_tolerance=tolerance, logit_bound=16.0, key_start=torch.tensor([0, 90], device="cuda"))

    def step():
        append_gates(growing, gate, length)
        length.add_(1)
        return forgetting_attention_decode(query, k, v, growing.sums, num_keys=length, **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    length.fill_(prompt)
    rewind_gates(growing, log_fgate, prompt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for position in range(prompt, capacity):
        query.copy_(q[:, :, position : position + 1])
        gate.copy_(log_fgate[..., position : position + 1])
        graph.replay()
        if position % 500 in (0, 11, 139):
            keys = slice(None, position + 1)
            inputs = query, k[:, :, keys], v[:, :, keys], log_fgate[..., keys]
            same = forgetting_attention_reference(*inputs, key_start=options["key_start"])
            doubles = [x.double() for x in inputs[:3]]
            exact = forgetting_attention_reference(*doubles, inputs[3], key_start=options["key_start"])
            assert_as_accurate_as_torch(captured, same, exact, floor=2e-4, name=f"after {position} keys")
    assert int(length) == capacity


@pytest.mark.gpu
@pytest.mark.parametrize("num_keys", [1025, 5000])
def test_gpu_sums_of_a_prompt_and_of_its_pieces_are_those_of_pytorch(num_keys, poisoned_memory):
    log_fgate = attention_inputs(queries=num_keys + 200, gate_logits=(-20.0, 20.0), device="cuda")[3]
    growing = empty_sums(2, 4, num_keys + 300, "cuda")
    append_gates(growing, log_fgate[..., :num_keys], 0)
    for position in range(num_keys, num_keys + 200):
        append_gates(growing, log_fgate[..., position : position + 1], position)
    whole = gate_sums(log_fgate)
    num_blocks = whole.starts.shape[-1]
    got = GateSums(growing.sums.within[..., : num_keys + 200], growing.sums.starts[..., :num_blocks])
    torch.testing.assert_close(got.running(), whole.running(), rtol=1e-13, atol=1e-13)


@pytest.mark.gpu
def test_gpu_kernels_read_strided_caches_in_place():
    cache = torch.randn(2, 700, 2, 4, 64, device="cuda", dtype=torch.bfloat16)  # (B, C, keys and values, H_kv, D)
    k, v = (x.transpose(1, 2) for x in cache.unbind(2))
    q = torch.randn(2, 3, 8, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    log_fgate = torch.nn.functional.logsigmoid(torch.randn(2, 8, 700, device="cuda") + 3)
    sums = gate_sums(log_fgate)
    peak = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = forgetting_attention_decode(q, k, v, sums, num_keys=650)
    assert torch.cuda.max_memory_allocated() - peak < k.numel() * k.element_size()
    assert torch.equal(got, forgetting_attention_decode(q, k.contiguous(), v.contiguous(), sums, num_keys=650))
