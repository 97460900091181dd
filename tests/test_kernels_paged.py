"""Pages: what is dropped, against float64; what is computed, against the definition; and that memory is given back.

The Triton kernels are compared with the path of the CPU, in the interpreter and on a GPU.
"""

import math
import os

import pytest
import torch

from fox_kernels import forgetting_attention_reference
from fox_kernels.gates import GateSums
from fox_kernels.paged import PagedKeys
from fox_kernels.paged_attention import paged_attention
from helpers import assert_as_accurate_as_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = [
    pytest.param(
        "interpreter",
        marks=[
            pytest.mark.interpret,
            pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1 to run the kernels on a CPU"),
        ],
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def gates_of(kind, batch, heads, length, seed=0):
    """Log gates `(B, H, S)` float32, of heads that forget fast (0) to slowly (H - 1)."""
    generator = torch.Generator().manual_seed(seed)
    rate = 10.0 ** (-1.3 * torch.arange(heads) / max(heads - 1, 1))[:, None]
    gates = -rate * torch.rand(batch, heads, length, generator=generator)
    chance = torch.rand(gates.shape, generator=generator)
    if kind == "bursts":
        # Nothing for long, then most of it at once.
        gates = torch.where(chance < 0.03, -9.0 * chance / 0.03, 0.01 * gates)
    elif kind == "closed":
        gates = torch.where(chance < 0.01, -torch.inf, gates)
    elif kind == "open":
        gates = torch.zeros_like(gates)
    elif kind == "edge":
        # A prefix that lands on the tolerance to the last bit of its page, again and again.
        gates = -rate * torch.ones_like(gates)
    return gates


def unit_norm(x):
    return x / x.norm(dim=-1, keepdim=True)


def scores_of(kind, batch, heads, kv_heads, length, dim, bound, seed=1):
    """q and k with `|q . k| * dim ** -0.5 <= bound`; "worst": the far keys at +bound, all near ones at -bound."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "worst":
        direction = unit_norm(torch.randn(dim, generator=generator))
        sign = torch.where(torch.arange(length) % 160 < 80, 1.0, -1.0)
        k = (sign[:, None] * direction).expand(batch, kv_heads, length, dim)
        # Each query is for what stands 80 keys before it and against its own.
        q = -(sign[:, None] * direction).expand(batch, heads, length, dim)
    else:
        q, k = (torch.randn(batch, h, length, dim, generator=generator) for h in (heads, kv_heads))
    size = (bound * dim**0.5) ** 0.5
    return unit_norm(q) * size, unit_norm(k) * size


def new_cache(q, k, bound, layers=1, **options):
    cache = PagedKeys(
        layers, q.shape[0], q.shape[1], k.shape[1], q.shape[-1], dtype=q.dtype, device=q.device,
        **({"page_size": 16} | options),
    )  # fmt: skip
    for layer in range(layers):
        cache.set_logit_bound(layer, torch.full((q.shape[1],), bound))
    return cache


def run(cache, q, k, v, gates, cuts, layer=0, after=None):
    """Output of all steps, and for every row the first key that was left when it was its turn, `(B, H_kv, S)`."""
    outputs, firsts, t = [], [], 0
    for length in cuts:
        before = cache.first_key[layer].cpu().clone()
        piece = slice(t, t + length)
        outputs.append(
            paged_attention(q[:, :, piece], k[:, :, piece], v[:, :, piece], gates[:, :, piece], cache, layer)
        )
        if length <= 16:  # dropped before the step
            firsts.append(cache.first_key[layer].cpu().clone()[..., None].expand(-1, -1, length))
        else:  # dropped after it
            firsts.append(before[..., None].expand(-1, -1, length))
        t += length
        if after is not None:
            after(cache)
    return torch.cat(outputs, 2), torch.cat(firsts, 2)


def weights_of(q, k, gates, bound_rows=None):
    """Attention of rows to keys in float64, `(B, H, rows, S)`."""
    length = k.shape[2]
    lam = gates.clamp(min=-9000.0).double().cumsum(-1)
    rows = torch.arange(length) if bound_rows is None else bound_rows
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q[:, :, rows].double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores += lam[..., rows, None] - lam[..., None, :]
    return scores.masked_fill(torch.arange(length) > rows[:, None], -torch.inf).softmax(-1)


def lost_mass(weights, firsts, rows=None):
    """Of each row what was dropped by its time, `(B, H, rows)`."""
    rows = torch.arange(firsts.shape[-1]) if rows is None else rows
    firsts = firsts[..., rows].repeat_interleave(weights.shape[1] // firsts.shape[1], 1)
    return (weights * (torch.arange(weights.shape[-1]) < firsts[..., None])).sum(-1)


STEPS = [1] * 40 + [16, 5, 1, 100, 3, 260, 1, 1, 17] + [7] * 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("scores", ["random", "worst"])
@pytest.mark.parametrize("kind", ["random", "bursts", "closed", "edge"])
def test_no_row_ever_loses_more_than_eps(kind, scores, dtype):
    length, bound = sum(STEPS), 2.0
    gates = gates_of(kind, 2, 4, length)
    q, k = scores_of(scores, 2, 4, 2, length, 16, bound)
    q, k = q.to(dtype), k.to(dtype)
    v = torch.randn(2, 2, length, 16).to(dtype)
    tolerance = -3.0
    cache = new_cache(q, k, bound * (1.0 if dtype == torch.float32 else 1.01), log_tolerance=tolerance)
    out, firsts = run(cache, q, k, v, gates, STEPS)
    weights = weights_of(q, k, gates)
    lost = lost_mass(weights, firsts)
    assert (firsts[..., -1] > 0).all()
    assert float(lost.max()) <= math.exp(tolerance)
    assert float(lost.max()) <= float((cache.worst + 2.0 * cache.logit_bound[:, None]).exp().max())
    # Dropped and pruned together: the output moves by at most 2 eps max |v|.
    exact = weights @ v.double().repeat_interleave(2, 1)
    rounding = 0.0 if dtype == torch.float32 else 0.03
    assert float((out.double() - exact).abs().max()) <= (2 * math.exp(tolerance) + rounding) * float(v.abs().max())


def test_the_bound_is_no_larger_than_it_must_be():
    """One page more than was dropped would be too much for queries at the worst of what U allows."""
    length, bound, tolerance = 600, 1.5, -4.0
    gates = gates_of("random", 1, 4, length)
    q, k = scores_of("random", 1, 4, 4, length, 16, bound)
    cache = new_cache(q, k, bound, log_tolerance=tolerance)
    run(cache, q, k, k, gates, [600])
    lam = gates.double().cumsum(-1)
    decay = lam[..., -1:] - lam
    for head in range(4):
        first = int(cache.first_key[0, 0, head])
        assert first > 0
        dropped = decay[0, head, :first].logsumexp(0)
        one_more = decay[0, head, : first + 16].logsumexp(0)
        assert float(dropped) <= tolerance - 2 * bound < float(one_more)
        assert float(cache.dropped_mass(0)[0, head]) == pytest.approx(float(dropped), abs=1e-9)


def test_twenty_thousand_tokens_in_bounded_memory_with_a_bounded_loss():
    length, bound, tolerance = 20_000, 1.0, -6.0
    gates = gates_of("random", 1, 2, length)
    q, k = scores_of("random", 1, 2, 2, length, 16, bound)
    cache, most = new_cache(q, k, bound, log_tolerance=tolerance), []
    out, firsts = run(cache, q, k, k, gates, [16] * 1250, after=lambda x: most.append(x.memory_bytes()))
    assert max(most) <= 1.1 * max(most[:200])  # the slowest head forgets within 600 tokens
    rows = torch.arange(15, length, 16 * 25)
    weights = weights_of(q, k, gates, rows)
    lost = lost_mass(weights, firsts, rows)
    assert 0 < float(lost.max()) <= math.exp(tolerance)
    exact = weights @ k.double()
    assert float((out[:, :, rows] - exact).abs().max()) <= 2 * math.exp(tolerance) * float(k.abs().max())


CASES = [
    pytest.param(dict(heads=3), id="plain"),
    pytest.param(dict(heads=4, kv_heads=2, dim=40), id="grouped"),
    pytest.param(dict(heads=6, kv_heads=2, page_size=64), id="groups-of-three"),
    pytest.param(dict(heads=8, kv_heads=1, dim=16), id="multi-query"),
]


def inputs_of(heads, kv_heads=None, dim=32, length=300, batch=2, page_size=16, dtype=torch.float32, device="cpu"):
    kv_heads = kv_heads or heads
    q, k = scores_of("random", batch, heads, kv_heads, length, dim, 3.0)
    v = torch.randn(batch, kv_heads, length, dim, generator=torch.Generator().manual_seed(3))
    gates = gates_of("random", batch, heads, length)
    return [x.to(device, dtype) for x in (q, k, v)] + [gates.to(device)]


@pytest.mark.parametrize("cuts", [[1] * 60 + [240], [300], [16] * 10 + [140], [33, 1, 15, 17, 64, 70, 100]], ids=str)
@pytest.mark.parametrize("shape", CASES)
def test_matches_the_definition(shape, cuts, poisoned_memory):
    q, k, v, gates = inputs_of(**shape)
    cache = new_cache(q, k, 3.0, log_tolerance=-30.0, page_size=shape.get("page_size", 16))
    got, _ = run(cache, q, k, v, gates, cuts)
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), gates)
    assert_as_accurate_as_torch(got, forgetting_attention_reference(q, k, v, gates), exact)


@pytest.mark.parametrize("multiple", [64, 512])
def test_chunks_as_a_gpu_gathers_them(multiple, monkeypatch, poisoned_memory):
    """All heads together, with hidden keys before their own, and before the sequence."""
    monkeypatch.setattr("fox_kernels.paged_attention._ways_to_gather", lambda device: (0.0, multiple))
    q, k, v, gates = inputs_of(heads=4, kv_heads=2, batch=3)
    cache, start = new_cache(q, k, 3.0, log_tolerance=-30.0), torch.tensor([0, 37, 0])
    cache.key_start = start.int()
    got, _ = run(cache, q, k, v, gates, [33, 1, 15, 50, 101, 100])
    options = {"key_start": start}
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), gates, **options)
    assert_as_accurate_as_torch(got, forgetting_attention_reference(q, k, v, gates, **options), exact)
    assert int(cache.first_key.max()) > 0


@pytest.mark.parametrize("cuts", [[1] * 300, [100, 50, 1, 1, 48, 100]], ids=["steps", "chunks"])
def test_nothing_is_read_that_was_given_back(cuts):
    q, k, v, gates = inputs_of(heads=4, kv_heads=2)
    expected, _ = run(new_cache(q, k, 3.0), q, k, v, gates, cuts)

    def poison(cache):
        for pool in (cache.keys, cache.values, cache.within, cache.starts, cache.masses):
            pool[cache.free.long()] = torch.nan

    cache = new_cache(q, k, 3.0)
    got, _ = run(cache, q, k, v, gates, cuts, after=poison)
    assert torch.equal(got, expected)
    assert int(cache.first_key.max()) > 150 and len(cache.free) + int(-(-cache.live_keys() // 16).sum()) == len(
        cache.keys
    )


def test_pages_of_one_head_are_taken_by_another():
    q, k, v, gates = inputs_of(heads=2, length=800, batch=1)
    gates[:, 1] = torch.where(torch.arange(800) < 400, -1e-3, -2.0)
    gates[:, 0] = torch.where(torch.arange(800) < 400, -2.0, -1e-3)
    cache, sizes = new_cache(q, k, 1.0), []
    run(cache, q, k, v, gates, [8] * 100, after=lambda x: sizes.append(len(x.keys)))
    # Either head alone holds 25 pages at a time: first the second one, then the first.
    assert int(cache.live_keys()[0, 0, 0]) >= 400 > 100 >= int(cache.live_keys()[0, 0, 1])
    assert max(sizes) <= 32


def test_a_limit_drops_the_most_decayed_and_says_what_it_cost():
    q, k, v, gates = inputs_of(heads=4, length=700, batch=1)
    free, limited = new_cache(q, k, 3.0), new_cache(q, k, 3.0, max_pages=40)
    run(free, q, k, v, gates, [1] * 50 + [50, 600])
    out, firsts = run(limited, q, k, v, gates, [1] * 50 + [50] + [100] * 2 + [5] * 80)
    assert len(limited.keys) == 40 < len(free.keys)
    bound = float((limited.worst + 2.0 * limited.logit_bound[:, None]).max())
    lost = float(lost_mass(weights_of(q, k, gates), firsts).max())
    assert math.exp(-10.0) < lost <= math.exp(bound)
    # All heads that gave up something beyond the proof gave up about as much: 16 keys more or less.
    given = limited.dropped_mass(0)[0] + 2.0 * limited.logit_bound[0]
    assert float(given[given > -10.0].min()) > -10.0 and (given > -10.0).sum() >= 2
    # Enough is no limit.
    enough = new_cache(q, k, 3.0, max_pages=200)
    run(enough, q, k, v, gates, [1] * 50 + [50, 600])
    assert torch.equal(enough.first_key, free.first_key) and float(enough.worst.max()) + 6.0 <= -10.0


def test_shared_sequences_go_their_own_ways():
    q, k, v, gates = inputs_of(heads=4, kv_heads=2, batch=3, length=200)
    cache = new_cache(q, k, 3.0)
    run(cache, q, k, v, gates, [100, 1, 1])
    pages = len(cache.keys) - len(cache.free)
    index = torch.tensor([2, 2, 0, 2])
    cache.take_sequences(index)
    # Sequence 1 is gone; of its copies only what is written to is new.
    assert len(cache.keys) - len(cache.free) <= pages + 2 * 2

    def rest(x, seed):
        other = torch.randn(4, *x.shape[1:2], 98, *x.shape[3:], generator=torch.Generator().manual_seed(seed))
        return torch.cat((x[index, :, :102], other.abs().neg() if x is gates else unit_norm(other) * 4.0), dim=2)

    q, k, v, gates = rest(q, 1), rest(k, 2), rest(v, 3), rest(gates, 4)
    got, _ = run(cache, *(x[:, :, 102:] for x in (q, k, v, gates)), [1] * 48 + [50])
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), gates)
    assert float((got - exact[:, :, 102:]).abs().max()) < 3e-4


@pytest.mark.parametrize("num_left", [102, 101, 96, 90])
def test_goes_on_from_where_it_was_cropped(num_left):
    q, k, v, gates = inputs_of(heads=4, kv_heads=2, length=200)
    gates[:, :2] -= 0.5
    cache = new_cache(q, k, 3.0)
    run(cache, *(x[:, :, :90] for x in (q, k, v, gates)), [50, 1, 39])
    t = 90
    for length in (1, 1, 16):  # what is dropped before them does not matter to those after num_left either
        piece = [x[:, :, t : t + length] for x in (q, k, v, gates)]
        paged_attention(*piece, cache, 0)
        t += length
    if num_left < 92:
        assert cache.committed[0] > 60
        with pytest.raises(ValueError, match="num_keys must be at least [6-9][0-9], where keys were dropped for good"):
            cache.crop(0, 30)
        return
    cache.crop(0, num_left)
    got, _ = run(cache, *(x[:, :, num_left:] for x in (q, k, v, gates)), [5, 200 - num_left - 5])
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), gates)[:, :, num_left:]
    assert float((got - exact).abs().max()) < 3e-4


def test_tokens_that_may_be_taken_back_drop_nothing():
    q, k, v, gates = inputs_of(heads=4, length=200)
    cache = new_cache(q, k, 3.0)
    for piece in (slice(0, 60), slice(60, 180)):
        paged_attention(*(x[:, :, piece] for x in (q, k, v, gates)), cache, 0, may_evict=False)
    assert 0 < cache.committed[0] <= 60
    cache.crop(0, 61)
    got = paged_attention(*(x[:, :, 61:] for x in (q, k, v, gates)), cache, 0)
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), gates)[:, :, 61:]
    assert float((got - exact).abs().max()) < 3e-4


@pytest.mark.parametrize("cuts", [[1] * 90, [90], [40, 16, 1, 33]], ids=str)
def test_padding_and_new_episodes_hide_and_free_what_is_before(cuts):
    q, k, v, gates = inputs_of(heads=4, kv_heads=2, batch=3, length=180)
    cache, start = new_cache(q, k, 3.0), torch.tensor([0, 37, 5])
    cache.key_start = start.int()
    first = [x[:, :, :90] for x in (q, k, v, gates)]
    got, _ = run(cache, *first, cuts)
    exact = forgetting_attention_reference(*(x.double() for x in first[:3]), first[3], key_start=start)
    assert float((got - exact).abs().max()) < 3e-4 and not got[1, :, :37].any()
    cache.start_over(torch.tensor([True, False, True]))
    got, _ = run(cache, *(x[:, :, 90:] for x in (q, k, v, gates)), cuts)
    start = torch.tensor([90, 37, 90])
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), gates, key_start=start)[:, :, 90:]
    assert float((got - exact).abs().max()) < 3e-4
    cache.evict()
    assert (cache.first_key[0, [0, 2]] >= 80).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(dict(heads=2, dim=16), id="plain"),
        pytest.param(dict(heads=6, kv_heads=2, dim=40), id="groups-of-three"),
        pytest.param(dict(heads=32, kv_heads=2, dim=64), id="many-rows", marks=pytest.mark.gpu),
    ],
)
def test_the_kernels_do_what_the_cpu_does(shape, path, poisoned_memory):
    from fox_kernels import triton_paged

    # The interpreter takes a second for a few tiles.
    is_fast = path == "cuda"
    device, lengths = ("cuda", (1, 16, 3)) if is_fast else ("cpu", (3,))
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if is_fast else [torch.float32]
    for dtype in dtypes:
        q, k, v, gates = inputs_of(**shape | {"page_size": 64}, dtype=dtype, length=160, batch=2 if is_fast else 1)
        on_cpu = new_cache(q, k, 3.0, log_tolerance=-5.0, page_size=64)
        start = torch.tensor([90, 0][: q.shape[0]])
        on_cpu.key_start = start.int()
        run(on_cpu, *(x[:, :, :126] for x in (q, k, v, gates)), [100, 1, 25])
        t = 126
        for length in lengths:
            piece = [x[:, :, t : t + length] for x in (q, k, v, gates)]
            on_cpu.make_room(0, length)
            names = ("keys", "values", "within", "starts", "totals", "table", "first_key", "lengths", "key_start")
            state = {name: getattr(on_cpu, name).to(device, copy=True) for name in names}
            moved = [x.to(device) for x in piece]
            expected = paged_attention(*piece, on_cpu, 0)
            state["lengths"] += length
            pool = [state[name] for name in names[:4]]
            triton_paged.append(*moved[1:], *pool, state["totals"][0], state["table"][0], state["lengths"][0])
            got = triton_paged.forward(
                moved[0], *pool, state["table"][0], state["first_key"][0], state["lengths"][0],
                q.shape[-1] ** -0.5, state["key_start"],
            ).cpu()  # fmt: skip
            live = torch.ones(len(on_cpu.keys), dtype=torch.bool)
            live[on_cpu.free.long()] = False
            for name in ("keys", "values", "within", "starts"):
                new = getattr(on_cpu, name)[live]
                torch.testing.assert_close(state[name].cpu()[live], new, rtol=0, atol=1e-6, msg=name)
            torch.testing.assert_close(state["totals"].cpu(), on_cpu.totals, rtol=0, atol=1e-9)
            assert got.dtype == dtype
            exact = forgetting_attention_reference(
                *(x[:, :, : t + length].double() for x in (q, k, v)), gates[:, :, : t + length],
                key_start=start,
            )[:, :, t:]  # fmt: skip
            allowed = 2 * float((expected.double() - exact).abs().max()) + 1e-5 + (dtype != torch.float32) * 4e-3
            assert float((got.double() - exact).abs().max()) <= allowed, (dtype, length)
            t += length


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("worth", [0, 2**60], ids=["skipping", "all"])
def test_gpu_steps_replay_as_a_cuda_graph(batch, worth, monkeypatch):
    monkeypatch.setattr("fox_kernels.paged_attention.WORTH_A_PLAN", worth)
    q, k, v, gates = inputs_of(heads=4, kv_heads=2, batch=batch, length=400, dtype=torch.bfloat16, device="cuda")
    plain, graphed = (new_cache(q, k, 3.0, page_size=64) for _ in range(2))
    for cache in (plain, graphed):
        run(cache, *(x[:, :, :300] for x in (q, k, v, gates)), [299, 1])
        cache.make_room(0, 16)
        cache._grow(2 * len(cache.keys))
    static = [x[:, :, 300:301].clone() for x in (q, k, v, gates)]
    graph, lengths = torch.cuda.CUDAGraph(), list(graphed.num_keys)
    with torch.cuda.graph(graph):
        out = paged_attention(*static, graphed, 0)
    graphed.num_keys = lengths
    for t in range(300, 400):
        piece = [x[:, :, t : t + 1] for x in (q, k, v, gates)]
        expected = paged_attention(*piece, plain, 0)
        graphed.make_room(0, 1)
        for to, x in zip(static, piece, strict=True):
            to.copy_(x)
        graph.replay()
        graphed.num_keys[0] += 1
        assert torch.equal(out, expected), t
    assert torch.equal(plain.first_key, graphed.first_key) and int(plain.first_key.max()) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("worth", [0, 2**60], ids=["skipping", "all"])
def test_gpu_chunks_and_steps_lose_at_most_eps(dtype, worth, monkeypatch):
    monkeypatch.setattr("fox_kernels.paged_attention.WORTH_A_PLAN", worth)
    length, bound, tolerance = 3000, 3.0, -8.0
    gates = gates_of("random", 1, 4, length)
    q, k = (x.to(dtype) for x in scores_of("random", 1, 4, 2, length, 64, bound))
    cache = new_cache(q.cuda(), k.cuda(), bound * 1.01, log_tolerance=tolerance, page_size=64)
    out, firsts = run(cache, q.cuda(), k.cuda(), k.cuda(), gates.cuda(), [1000, 1, 1, 14, 984] + [1] * 1000)
    weights = weights_of(q, k, gates)
    lost = lost_mass(weights, firsts)
    assert 0 < float(lost.max()) <= math.exp(tolerance)
    exact = weights @ k.double().repeat_interleave(2, 1)
    allowed = 2 * math.exp(tolerance) + (1e-5 if dtype == torch.float32 else 0.02)
    assert float((out.cpu().double() - exact).abs().max()) <= allowed * float(k.abs().max())


def test_says_what_is_wrong():
    q, k, v, gates = inputs_of(heads=4, kv_heads=2, length=40)
    with pytest.raises(ValueError, match="page_size must be a power of 2 and at least 16; got 48. 64 suits"):
        new_cache(q, k, 3.0, page_size=48)
    with pytest.raises(ValueError, match="log_tolerance is the log of a probability and must be negative; got 0.1"):
        new_cache(q, k, 3.0, log_tolerance=0.1)
    with pytest.raises(ValueError, match="num_kv_heads must divide the 4 query heads; got 3"):
        PagedKeys(1, 1, 4, 3, 16)
    cache = new_cache(q, k, 3.0)
    with pytest.raises(ValueError, match=r"q and k must be of .* the cache, \(2, 4, 2, 32\), .* got \(1, 4, 40, 32\)"):
        paged_attention(q[:1], k[:1], v[:1], gates[:1], cache, 0)
    with pytest.raises(ValueError, match="q must be torch.float32 on cpu, as the cache; got torch.bfloat16 on cpu"):
        paged_attention(*(x.bfloat16() for x in (q, k, v)), gates, cache, 0)
    with pytest.raises(ValueError, match=r"log_fgate must be \(2, 4, 40\) float32, one gate per query head and new"):
        paged_attention(q, k, v, gates.double(), cache, 0)
    with pytest.raises(ValueError, match="pages have no gradients; got tensors that need them"):
        paged_attention(q.requires_grad_(), k, v, gates, cache, 0)
    q = q.detach()
    limited = new_cache(q, k, 3.0, max_pages=3)
    with pytest.raises(
        ValueError, match="max_pages .max_cache_bytes of a model.s cache. must be enough for .* got 3, of which"
    ):
        run(limited, q, k, v, gates, [1] * 40)
    endless = new_cache(q, k, 3.0)
    endless.totals -= 2.0**38
    with pytest.raises(ValueError, match="the gates must add up to more than -9.5e.10 nats; got -1.9e.11"):
        run(endless, q, k, v, gates, [1] * 40)


def test_a_device_without_room_is_named(monkeypatch):
    q, k, v, gates = inputs_of(heads=4, kv_heads=2, length=200)
    cache = new_cache(q, k, 3.0)
    run(cache, *(x[:, :, :64] for x in (q, k, v, gates)), [64])
    held = cache.keys

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", full)
        with pytest.raises(torch.OutOfMemoryError, match="the pool cannot grow from .* Pass max_cache_bytes to drop"):
            cache.make_room(0, 16)
    # Nothing is lost: it goes on when there is room again.
    assert cache.keys is held
    got, _ = run(cache, *(x[:, :, 64:] for x in (q, k, v, gates)), [1] * 136)
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), gates)[:, :, 64:]
    assert float((got - exact).abs().max()) < 3e-4
    # In the middle of a change there is no way back.
    for pieces in ([1], [40]):
        cache = new_cache(q, k, 3.0)
        run(cache, *(x[:, :, :64] for x in (q, k, v, gates)), [64])
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(PagedKeys, "_lam" if pieces == [40] else "_append_one", full)
            run(cache, *(x[:, :, 64 : 64 + pieces[0]] for x in (q, k, v, gates)), pieces)
        with pytest.raises(ValueError, match="cache must be whole; got one whose change was interrupted. Start a new"):
            run(cache, *(x[:, :, 64:65] for x in (q, k, v, gates)), [1])
        with pytest.raises(ValueError, match="cache must be whole"):
            cache.take_sequences(torch.tensor([1, 0]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scores", ["random", "worst"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(dict(heads=3, kv_heads=3), id="plain"),
        pytest.param(dict(heads=4, kv_heads=2, queries=3, padded=True), id="grouped-padded"),
    ],
)
def test_what_a_step_skips_and_what_was_dropped_stay_below_eps_together(shape, scores, path, poisoned_memory):
    from fox_kernels import triton_paged

    heads, kv_heads, queries = shape["heads"], shape["kv_heads"], shape.get("queries", 1)
    length, bound, tolerance, device = 500, 1.5, -4.0, "cuda" if path == "cuda" else "cpu"
    gates = gates_of("random", 2, heads, length) * 0.3
    q, k = scores_of(scores, 2, heads, kv_heads, length, 16, bound)
    if device == "cuda":  # the interpreter multiplies no bfloat16
        q, k = q.bfloat16(), k.bfloat16()
    cache = new_cache(q, k, bound * 1.01, log_tolerance=tolerance)
    start = torch.tensor([0, 77 if shape.get("padded") else 0])
    cache.key_start = start.int()
    run(cache, *(x[:, :, : length - queries] for x in (q, k, k, gates)), [300, 100] + [1] * (100 - queries))
    paged_attention(*(x[:, :, length - queries :] for x in (q, k, k, gates)), cache, 0)
    found = triton_paged.plan(
        q[:, :, length - queries :].to(device),
        *(x.to(device) for x in (cache.keys, cache.within, cache.starts, cache.table[0], cache.first_key[0])),
        cache.lengths[0].to(device), 16**-0.5, cache.key_start.to(device), cache.logit_bound[0].to(device),
        cache.evicted[0].to(device), cache.evicted_at[0].to(device), tolerance,
    ).cpu()  # fmt: skip
    assert (found % 16 == 0).all() and (found >= cache.first_key[0]).all() and (found > cache.first_key[0]).any()
    lam = gates.double().cumsum(-1)
    k64 = k.double().repeat_interleave(heads // kv_heads, 1)
    rows = torch.arange(length - queries, length)
    weights = q[:, :, rows].double() @ k64.transpose(-1, -2) / 4 + lam[..., rows, None] - lam[:, :, None]
    key = torch.arange(length)
    weights = weights.masked_fill((key > rows[:, None]) | (key < start[:, None, None, None]), -torch.inf).softmax(-1)
    first = found.repeat_interleave(heads // kv_heads, 1)[..., None, None]
    assert 0 < float((weights * (key < first)).sum(-1).max()) <= math.exp(tolerance)
    # Nor is it timid: with the true normalizer in place of the one of the last 128 keys, one page more would be much.
    scores = q[:, :, rows].double() @ k64.transpose(-1, -2) / 4
    normalizer = (scores + lam[..., rows, None] - lam[:, :, None]).masked_fill(
        (key > rows[:, None]) | (key < start[:, None, None, None]), -torch.inf
    )
    room = bound - normalizer.logsumexp(-1) + lam[..., rows] - lam[..., rows[:1]]  # (B, H, T)
    ends = lam[..., 15::16][..., : (length - queries) // 16]  # of the pages
    decayed = (lam[..., rows[:1]] - ends).exp() * 16
    page = torch.arange(decayed.shape[-1])
    decayed = decayed * (page >= cache.first_key[0].repeat_interleave(heads // kv_heads, 1)[..., None] // 16)
    decayed = decayed * ((page + 1) * 16 > start[:, None, None])
    gone = cache.dropped_mass(0).exp() * (lam[..., rows[0]] - lam[..., -1]).exp()
    total = (decayed.cumsum(-1) + gone[..., None]) * room.amax(-1).exp()[..., None]
    most = (total <= math.exp(tolerance)).sum(-1).unflatten(1, (kv_heads, -1)).amin(-1) * 16
    assert (found <= most.clamp(min=int(start.max()))).all() and (most - found).max() <= 4 * 16


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_long_prompt_and_its_steps_compile_each_kernel_once(monkeypatch):
    """Whatever the number of heads that are gathered together, of their keys, and of the columns of the table."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from fox_kernels import launch, triton_forward, triton_gates, triton_paged, triton_pruning

    forms = {}

    def recorded(kernel, grid, tensors, numbers, **constants):
        kinds = [x.dtype if isinstance(x, torch.Tensor) else x.launch_key for x in tensors]
        for parameter, x in zip(kernel.params[len(tensors) :], numbers, strict=False):
            if not parameter.do_not_specialize:
                kinds.append(launch._class_of(x) if type(x) is int else type(x))
        forms.setdefault(kernel.__name__, set()).add((*kinds, *constants.items()))

    for module in launch.kernel_modules():
        for name, stand_in in (("launch", recorded), ("architecture", lambda device: 90)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    half = {"dtype": torch.bfloat16}
    for heads, length in ((2, 2048), (2, 18432), (2, 67584), (1, 10240), (16, 4096)):
        q, k = torch.empty(heads, 1, 2048, 64, **half), torch.empty(heads, 1, length, 64, **half)
        start, bound = torch.zeros(heads, dtype=torch.int32), torch.zeros(heads, 1)
        within, starts, first = triton_gates.prepare(torch.empty(heads, 1, length), start, 2048)
        sums = GateSums(within, starts)
        first = triton_pruning.paper_rule(
            q, k, sums, first, start, scale=0.1, log_tolerance=-10.0, logit_bound=bound
        )  # fmt: skip
        triton_forward.forward(q, k, k, sums, first, 0.1)
    assert "gluon_forward_kernel" in forms
    for columns in (2, 8, 16, 64):
        pages = PagedKeys(1, 2, 3, 3, 64, page_size=64, **half)
        pages.make_room(0, 1)
        pages.table = torch.zeros(1, 2, 3, columns, dtype=torch.int32)
        q = torch.empty(2, 3, 1, 64, **half)
        pool = (pages.keys, pages.values, pages.within, pages.starts)
        where = (pages.table[0], pages.first_key[0], pages.lengths[0])
        triton_paged.append(q, q, torch.empty(2, 3, 1), *pool, pages.totals[0], where[0], where[2])
        triton_paged.forward(q, *pool, *where, 1.0)
        triton_paged.plan(
            q, pool[0], *pool[2:], *where, 1.0, None, pages.logit_bound[0], pages.evicted[0], pages.evicted_at[0],
            -10.0,
        )  # fmt: skip
    assert {name: len(found) for name, found in forms.items()} == dict.fromkeys(forms, 1)
