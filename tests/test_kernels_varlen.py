"""Packed sequences and sliding windows: one call per sequence in float64, PyTorch's attention, and nothing leaks."""

import math

import pytest
import torch

from fox_kernels import (
    forgetting_attention,
    forgetting_attention_decode,
    forgetting_attention_reference,
    forgetting_attention_varlen,
)
from fox_kernels.gates import GateSums, first_visible_key, gate_sums
from fox_kernels.pruning import prune
from helpers import DEVICES, assert_as_accurate_as_torch, attention_inputs, output_and_gradients

NAMES = ("output", "dq", "dk", "dv", "dlog_fgate")
# Empty, single tokens, one that fills a block, several within a block and one over three.
LENGTHS = [1, 0, 130, 64, 1, 5, 300, 0]
ON = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def packed_inputs(lengths_q=LENGTHS, lengths_k=None, device="cpu", **shape):
    """q, k, v `(total, H, D)`, log gates `(total_k, H)` and the boundaries; half the gates are strong."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q, k, v, log_fgate = attention_inputs(
        batch=1, queries=sum(lengths_q), keys=sum(lengths_k), gate_logits=(-2.0, 8.0), device=device, **shape
    )
    boundaries = [torch.tensor([0, *x]).cumsum(0).int().to(device) for x in (lengths_q, lengths_k)]
    return [x[0].transpose(0, 1).contiguous() for x in (q, k, v, log_fgate)], boundaries


def one_by_one(function, boundaries, **options):
    """`function` of every sequence alone, as a function of packed tensors."""
    slices = [[slice(*x) for x in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)] for cu in boundaries]

    def packed(q, k, v, log_fgate):
        outs = [
            function(*(x[s].transpose(0, 1)[None] for x, s in zip((q, k, v, log_fgate), (a, b, b, b), strict=True)),
                     **options)[0].transpose(0, 1)
            for a, b in zip(*slices, strict=True) if a.stop > a.start
        ]  # fmt: skip
        return torch.cat(outs)

    return packed


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "shape"),
    [
        pytest.param(LENGTHS, None, dict(), id="same-lengths"),
        pytest.param([700], None, dict(heads=2), id="one-sequence"),
        pytest.param(LENGTHS, None, dict(heads=6, kv_heads=2, dim=40), id="grouped-odd-width"),
        pytest.param([70, 0, 1, 33, 20], [333, 4, 90, 33, 150], dict(heads=4, kv_heads=1), id="chunked-prefill"),
    ],
)
def test_packed_sequences_are_those_of_one_call_each(lengths_q, lengths_k, shape, dtype, device, poisoned_memory):
    inputs, boundaries = packed_inputs(lengths_q, lengths_k, device, dtype=dtype, **shape)
    grad_out = torch.randn(inputs[0].shape, device=device).to(dtype)
    for options in (dict(), dict(window=50)):
        alone = one_by_one(forgetting_attention_reference, boundaries, **options)
        exact = output_and_gradients(alone, [x.double() for x in inputs], grad_out.double())
        same = output_and_gradients(alone, inputs, grad_out)
        got = output_and_gradients(
            lambda *x, options=options: forgetting_attention_varlen(*x, *boundaries, **options), inputs, grad_out
        )
        assert got[0].stride() == inputs[0].stride()
        for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
            assert_as_accurate_as_torch(x, y, z, name=f"{name} with {options}")


@pytest.mark.parametrize("device", DEVICES)
def test_the_triton_kernels_see_only_their_own_sequence(device, poisoned_memory):
    """Several sequences in a tile, one over several tiles; small tiles, so that a short sequence has all kinds."""
    triton_forward = pytest.importorskip("fox_kernels.triton_forward", reason="Triton has wheels for Linux only")
    from fox_kernels import triton_backward, triton_gates
    from fox_kernels.tile_sizes import TileSizes

    tiles = TileSizes(32, 16, 4, 2), TileSizes(16, 32, 4, 2)
    inputs, boundaries = packed_inputs([5, 1, 0, 70, 34], heads=2, kv_heads=1, dim=16)
    grad_out = torch.randn(inputs[0].shape)
    alone = one_by_one(forgetting_attention_reference, boundaries, window=40)
    exact = output_and_gradients(alone, [x.double() for x in inputs], grad_out.double())
    same = output_and_gradients(alone, inputs, grad_out)
    q, k, v, log_fgate, grad_out = (x.to(device).transpose(0, 1)[None] for x in (*inputs, grad_out))
    cu = boundaries[0].to(device)
    within, starts, first = triton_gates.prepare(log_fgate, None, q.shape[2], 40, cu)
    sums, scale = GateSums(within, starts), q.shape[-1] ** -0.5
    out, lse = triton_forward.forward(q, k, v, sums, first, scale, tiles[0])
    options = dict(query_tiles=tiles[0], key_tiles=tiles[1])
    *grads, columns = triton_backward.backward(grad_out, q, k, v, out, lse, sums, first, scale, **options)
    got = [out, *grads, triton_gates.gate_gradient(columns, log_fgate, cu)]
    for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
        assert_as_accurate_as_torch(x[0].transpose(0, 1).cpu(), y, z, name=name)


@pytest.mark.parametrize("device", ON)
def test_a_sequence_feels_nothing_of_the_others(device):
    """With a loss a million times larger, or infinite beyond the next one, the gates of the rest keep their digits.

    What is infinite reaches those that share a tile with it: 0 times infinity is no number. The third sequence ends
    with a tile, so that it shares none with the fourth, which does with the fifth.
    """
    lengths = [200, 250, 958, 300, 150, 300]
    inputs, boundaries = packed_inputs(lengths, device=device)
    grad_out = torch.randn(inputs[0].shape, device=device)
    parts = grad_out.split(lengths)
    parts[2].mul_(1e6)
    parts[4].fill_(math.inf)
    got = output_and_gradients(lambda *x: forgetting_attention_varlen(*x, boundaries[0]), inputs, grad_out)[4]
    alone = output_and_gradients(one_by_one(forgetting_attention, boundaries), inputs, grad_out)[4]
    for b, (x, y) in enumerate(zip(got.split(lengths), alone.split(lengths), strict=True)):
        if b < 3:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
            # The first gate is part of every running sum alike.
            assert float(x[0].abs().max()) < 1e-5 * float(x.abs().max())
    assert not got.split(lengths)[4].isfinite().all()


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("rule", ["paper", "tight"])
@pytest.mark.parametrize("window", [None, 200])
def test_pruning_packed_sequences_keeps_its_promise(window, rule, device, poisoned_memory):
    """The lost mass of every row, in float64: with boundaries inside the blocks that are dropped together."""
    lengths = [500, 77, 1, 700, 122, 648]
    (q, k, v, log_fgate), (cu, _) = packed_inputs(lengths, device=device, heads=3)
    log_fgate *= torch.tensor([0.3, 1.0, 3.0], device=device)
    log_tolerance = -6.0
    q, k, log_fgate = (x.transpose(0, 1)[None] for x in (q, k, log_fgate))
    sums, visible = gate_sums(log_fgate), first_visible_key(log_fgate, None, q.shape[2], window, cu)
    scale = q.shape[-1] ** -0.5
    options = dict(scale=scale, rule=rule, log_tolerance=log_tolerance, logit_bound=None)
    first = prune(q.contiguous(), k.contiguous(), sums, visible, None, **options)

    position = torch.arange(q.shape[2], device=device)
    running = log_fgate.double().cumsum(-1)
    scores = q.double() @ k.double().transpose(-1, -2) * scale + running[..., None] - running[..., None, :]
    hidden = (position > position[:, None]) | (position < visible[..., None])
    weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
    lost = weights.masked_fill(position >= first[..., None], 0.0).sum(-1)
    assert float(lost.max()) <= math.exp(log_tolerance)
    dropped = (first > visible).double().mean(-1)
    assert float(dropped[0, -1]) > (0.2 if window is None else 0.05), "the case prunes nothing"
    # The boundary of a window cuts further in the head that forgets least.
    assert window is None or float((visible == position - window + 1).double().mean()) > 0.3

    got, stats = forgetting_attention_varlen(
        *(x[0].transpose(0, 1) for x in (q, k)), v, log_fgate[0].T, cu, log_pruning_tolerance=log_tolerance,
        pruning_rule=rule, window=window, return_stats=True,
    )  # fmt: skip
    skipped = (first - visible).double().sum((0, 2)) / (position + 1 - visible).double().sum((0, 2))
    torch.testing.assert_close(stats.pruned_fraction.double(), skipped, atol=1e-6, rtol=0)
    exact = (weights @ v.double().transpose(0, 1))[0].transpose(0, 1)
    assert float((got - exact).abs().max()) <= 2 * math.exp(log_tolerance) * float(v.abs().max()) + 1e-5


@pytest.mark.filterwarnings("ignore:Memory Efficient attention defaults")  # PyTorch's own backward pass
@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("window", [1, 2, 64, 100, 129, 1000])
def test_a_window_is_pytorchs_band_mask(window, device, poisoned_memory):
    """Open gates, so that nothing but the window is different from PyTorch's attention."""
    q, k, v, log_fgate = attention_inputs(queries=150, keys=333, heads=4, dim=64, device=device)
    log_fgate.zero_()
    grad_out = torch.randn(q.shape, device=device)
    query, key = torch.arange(333 - 150, 333, device=device)[:, None], torch.arange(333, device=device)
    band = (key <= query) & (key > query - window)

    def sdpa(q, k, v, _):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band) + 0 * _.sum().to(q.dtype)

    same = output_and_gradients(sdpa, (q, k, v, log_fgate), grad_out)
    exact = output_and_gradients(sdpa, [x.double() for x in (q, k, v, log_fgate)], grad_out.double())
    got = output_and_gradients(forgetting_attention, (q, k, v, log_fgate), grad_out, window=window)
    for name, x, y, z in zip(NAMES[:4], got, same, exact, strict=False):
        assert_as_accurate_as_torch(x, y, z, name=name)


@pytest.mark.parametrize("device", ON)
def test_a_window_joins_padding_closed_gates_pruning_and_shared_keys(device, poisoned_memory):
    inputs = attention_inputs(
        queries=260, keys=400, heads=4, kv_heads=2, gate_logits=(-2.0, 6.0), dtype=torch.bfloat16, device=device
    )
    inputs[3][:, 1, 300] = -math.inf
    options = dict(window=90, key_start=torch.tensor([0, 350], device=device))
    grad_out = torch.randn(inputs[0].shape, device=device).bfloat16()
    exact = output_and_gradients(
        forgetting_attention_reference, [x.double() for x in inputs], grad_out.double(), **options
    )
    same = output_and_gradients(forgetting_attention_reference, inputs, grad_out, **options)
    for pruning in (
        dict(),
        dict(log_pruning_tolerance=-10.0),
        dict(log_pruning_tolerance=-10.0, pruning_rule="tight"),
    ):
        got = output_and_gradients(forgetting_attention, inputs, grad_out, **options, **pruning)
        for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
            assert_as_accurate_as_torch(x, y, z, floor=2e-4 if pruning else 1e-5, name=f"{name} {pruning}")


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("queries", [1, 5])
def test_decoding_with_a_window_reads_nothing_before_it(queries, device, poisoned_memory):
    q, k, v, log_fgate = attention_inputs(queries=queries, keys=500, heads=4, kv_heads=2, device=device)
    expected = forgetting_attention_reference(*(x.double() for x in (q, k, v)), log_fgate, window=70)
    k[:, :, : 500 - queries - 69], v[:, :, : 500 - queries - 69] = math.nan, math.nan
    key_start = torch.tensor([0, 3], device=device)
    got = forgetting_attention_decode(q, k, v, gate_sums(log_fgate), key_start=key_start, window=70)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [1, 5])
def test_the_plan_of_a_decoding_step_knows_the_window(queries, device, poisoned_memory):
    triton_decode = pytest.importorskip("fox_kernels.triton_decode", reason="Triton has wheels for Linux only")
    log_fgate = attention_inputs(queries=queries, keys=300, heads=4, device=device)[3]
    arguments = (2, 4, 2, queries), gate_sums(log_fgate), 300, None, None, None, None, 0.0
    first, lowest = triton_decode.plan(*arguments, window=40)
    assert torch.equal(first, first_visible_key(log_fgate, None, queries, window=40))
    assert torch.equal(lowest, first[:, ::2, 0])


@pytest.mark.parametrize("tolerance", [None, -10.0])
def test_the_custom_op_keeps_pytorchs_contract(tolerance):
    q, k, v, log_fgate = attention_inputs(queries=20, batch=1, heads=2, dim=16)
    arguments = [x.requires_grad_() for x in (q, k, v, log_fgate)]
    arguments += [0.25, tolerance, "paper", None, None, 7, torch.tensor([0, 3, 20])]
    torch.library.opcheck(torch.ops.fox_kernels.forgetting_attention.default, arguments)


def test_packed_sequences_compile_into_one_graph():
    inputs, (cu, _) = packed_inputs([60, 1, 90], heads=2)

    def function(cu, *inputs):
        return forgetting_attention_varlen(*inputs, cu, log_pruning_tolerance=-10.0, window=50).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in inputs]
    for boundaries in (cu, torch.tensor([0, 3, 151], dtype=torch.int32)):
        expected = torch.autograd.grad(function(boundaries, *inputs), inputs)
        for got, wanted in zip(torch.autograd.grad(compiled(boundaries, *inputs), inputs), expected, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
def test_gpu_packed_gradients_are_bitwise_reproducible_if_asked():
    inputs, (cu, _) = packed_inputs([700, 100, 1500], device="cuda", dtype=torch.bfloat16, dim=64)
    grad_out = torch.randn(inputs[0].shape, device="cuda")
    first, *others = (
        output_and_gradients(lambda *x: forgetting_attention_varlen(*x, cu, deterministic=True), inputs, grad_out)
        for _ in range(4)
    )
    for again in others:
        for x, y in zip(again, first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_gpu_a_cuda_graph_replays_other_boundaries():
    """Nothing of a packed call looks at the boundaries on the host, unless it is asked to check them."""
    inputs, (cu, _) = packed_inputs([700, 100, 1500], device="cuda", dtype=torch.bfloat16, dim=64)
    inputs = [x.requires_grad_() for x in inputs]

    def step():
        out = forgetting_attention_varlen(*inputs, cu, cu.clone(), log_pruning_tolerance=-10.0)
        return torch.autograd.grad(out.float().square().sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    cu.copy_(torch.tensor([0, 64, 65, 2300]))
    graph.replay()
    for x, y in zip([x.clone() for x in captured], step(), strict=True):
        assert float((x - y).abs().max()) <= 1e-2 * float(y.abs().max())
    with pytest.raises(ValueError, match="cu_seqlens_q must go from 0 to 2300"):
        forgetting_attention_varlen(*inputs, cu.clone().fill_(7), check_boundaries=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(1, 2, 9, 8)), r"q must be \(total_q, H, D\), all sequences one after another"),
        (dict(log_fgate=torch.zeros(2, 9)), r"log_fgate must be \(9, 2\), one gate per key and query head"),
        (dict(cu_seqlens_q=torch.tensor([0.0, 9.0])), r"cu_seqlens_q must be \(B \+ 1,\) int32 or int64"),
        (dict(cu_seqlens_q=[0, 4, 9]), r"cu_seqlens_q must be \(B \+ 1,\) int32 or int64.* got \[0, 4, 9\]"),
        (dict(cu_seqlens_q=torch.tensor([0])), r"cu_seqlens_q must be \(B \+ 1,\) int32 or int64"),
        (dict(cu_seqlens_q=torch.tensor([0, 8])), "cu_seqlens_q must go from 0 to 9, the positions"),
        (dict(cu_seqlens_q=torch.tensor([0, 7, 5, 9])), "cu_seqlens_q must go from 0 to 9"),
        (dict(cu_seqlens_q=torch.tensor([1, 9])), "cu_seqlens_q must go from 0 to 9"),
        (dict(cu_seqlens_k=torch.tensor([0, 4, 5, 9])), "cu_seqlens_k must have as many boundaries"),
        (dict(cu_seqlens_k=torch.tensor([0, 3, 9])), "sequence 0 has 4 queries but 3 keys. Pass the cached keys"),
        (dict(window=0), "window must be at least 1, the query's own key; got 0"),
        (dict(q=torch.zeros(5, 2, 8), cu_seqlens_q=torch.tensor([0, 2, 5]), cu_seqlens_k=torch.tensor([0, 4, 9]),
              return_stats=True), "return_stats needs as many queries as keys; got 5 and 9"),
        (dict(logit_bound=torch.zeros(2, 2)), r"logit_bound must be a float, \(2,\) or \(1, 2\)"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_with_the_input(change, message):
    x, cu = torch.zeros(9, 2, 8), torch.tensor([0, 4, 9])
    arguments = dict(q=x, k=x, v=x, log_fgate=torch.zeros(9, 2), cu_seqlens_q=cu)
    with pytest.raises(ValueError, match=message):
        forgetting_attention_varlen(**(arguments | change))


def test_a_window_of_no_keys_is_refused():
    x, gates = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="window must be at least 1"):
        forgetting_attention(x, x, x, gates, window=0)
    with pytest.raises(ValueError, match="window must be at least 1"):
        forgetting_attention_decode(x, x, x, gate_sums(gates), window=0)
