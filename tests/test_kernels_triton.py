"""The Triton kernels against float64: in the interpreter on a CPU (TRITON_INTERPRET=1), as machine code on a GPU.

The interpreter multiplies bit patterns of bfloat16, so there only float32 and float16 are tested.
"""

import math
import os
from unittest import mock

import pytest
import torch

from fox_kernels import forgetting_attention, forgetting_attention_reference
from fox_kernels.gates import first_visible_key, gate_gradient, gate_sums
from fox_kernels.pruning import prune
from helpers import assert_as_accurate_as_torch, attention_inputs, output_and_gradients

triton_forward = pytest.importorskip("fox_kernels.triton_forward", reason="Triton has wheels for Linux only")
from fox_kernels import triton_backward  # noqa: E402
from fox_kernels.tile_sizes import TileSizes  # noqa: E402

NAMES = ("output", "dq", "dk", "dv", "dlog_fgate")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpret = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1 to run the kernels on a CPU"),
]
# Small and unequal, so that a short sequence has several tiles of each kind.
QUERY_TILES, KEY_TILES = TileSizes(32, 16, 4, 2), TileSizes(16, 32, 4, 2)


def triton_attention(inputs, grad_out, key_start=None, log_tolerance=None):
    """Output and gradients through the launch functions themselves, with small tiles, on any device."""
    q, k, v, log_fgate = inputs
    scale = q.shape[-1] ** -0.5
    sums, first = gate_sums(log_fgate), first_visible_key(log_fgate, key_start, q.shape[2])
    if log_tolerance is not None:
        options = dict(scale=scale, rule="paper", log_tolerance=log_tolerance, logit_bound=None)
        first = prune(q, k, sums, first, key_start, **options)
    out, lse = triton_forward.forward(q, k, v, sums, first, scale, QUERY_TILES)
    dq, dk, dv, column_sum = triton_backward.backward(
        grad_out.to(q.dtype), q, k, v, out, lse, sums, first, scale, False, QUERY_TILES, KEY_TILES
    )
    return [out, dq, dk, dv, gate_gradient(column_sum, log_fgate)]


INTERPRETER_CASES = [
    pytest.param(dict(queries=65, heads=2), torch.float32, id="float32-one-past-a-tile"),
    pytest.param(dict(queries=40, keys=110, heads=4, kv_heads=2, dim=40), torch.float32, id="float32-prefill-grouped"),
    pytest.param(dict(queries=1, keys=47, heads=2), torch.float32, id="float32-decode"),
    pytest.param(dict(queries=100, heads=1, gate_logits=(-20.0, 20.0)), torch.float32, id="float32-extreme-gates"),
    pytest.param(dict(queries=70, heads=2, kv_heads=1, dim=16), torch.float16, id="float16-multi-query"),
]


@pytest.mark.parametrize(
    ("shape", "dtype"), [pytest.param(*p.values, id=p.id, marks=interpret) for p in INTERPRETER_CASES]
)
def test_interpreted_kernels_match_the_definition(shape, dtype, poisoned_memory):
    inputs = attention_inputs(**shape, dtype=dtype)
    key_start = torch.tensor([0, 7])
    inputs[3][1:, :, 30] = -math.inf
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    doubles = [x.double() for x in inputs]
    exact = output_and_gradients(forgetting_attention_reference, doubles, grad_out.double(), key_start=key_start)
    same = output_and_gradients(forgetting_attention_reference, inputs, grad_out, key_start=key_start)
    got = triton_attention(inputs, grad_out, key_start)
    for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
        assert_as_accurate_as_torch(x, y, z, name=name)


@pytest.mark.parametrize("_", [pytest.param(None, marks=interpret, id="float32")])
def test_interpreted_kernels_prune_the_pairs_that_the_cpu_path_prunes(_, poisoned_memory):
    inputs = attention_inputs(batch=1, heads=2, queries=260, keys=300, dim=16, gate_logits=(-1.0, 4.0))
    grad_out = torch.randn(inputs[0].shape)
    got = triton_attention(inputs, grad_out, log_tolerance=-4.0)
    expected = output_and_gradients(forgetting_attention, inputs, grad_out, log_pruning_tolerance=-4.0)
    stats = forgetting_attention(*inputs, log_pruning_tolerance=-4.0, return_stats=True)[1]
    assert float(stats.pruned_fraction.min()) > 0.1
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.float(), y, atol=5e-5, rtol=0)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpret), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_tile_of_keys_knows_which_queries_see_it(device, poisoned_memory):
    first = torch.randint(0, 200, (2, 3, 150), dtype=torch.int32).sort(-1).values.to(device)
    rows = triton_backward.queries_of_key_tiles(first, 200, 64)
    for tile in range(4):
        last = min(64 * tile + 64, 200) - 1
        assert torch.equal(rows[0, ..., tile], (first <= 64 * tile).sum(-1).int())
        assert torch.equal(rows[1, ..., tile], (first <= last).sum(-1).int())


GPU_LENGTHS = [(1, 1), (1, 1000), (63, 63), (64, 64), (65, 200), (1000, 1000), (1000, 1711), (4096, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("dim", [16, 40, 64, 96, 128, 256])
@pytest.mark.parametrize(("queries", "keys"), GPU_LENGTHS)
def test_gpu_kernels_match_the_definition(queries, keys, dim, dtype, poisoned_memory):
    inputs = attention_inputs(
        batch=2,
        heads=2,
        kv_heads=1,
        queries=queries,
        keys=keys,
        dim=dim,
        gate_logits=(-20.0, 20.0),
        dtype=dtype,
        device="cuda",
    )
    options = dict(key_start=torch.tensor([0, keys // 3], device="cuda"))
    # Rounded before it is given to all three: it is an input, and its rounding nobody's error.
    grad_out = torch.randn(inputs[0].shape, device="cuda").to(dtype)
    doubles = [x.double() for x in inputs]
    exact = output_and_gradients(forgetting_attention_reference, doubles, grad_out.double(), **options)
    same = output_and_gradients(forgetting_attention_reference, inputs, grad_out, **options)
    got = output_and_gradients(forgetting_attention, inputs, grad_out, **options)
    for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
        assert_as_accurate_as_torch(x, y, z, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("gate_logits", [(-20.0, 20.0), (2.0, 6.0)], ids=["extreme", "usual"])
@pytest.mark.parametrize("dim", [48, 64, 128])
@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(200, 200, 4), (1000, 1711, 2), (4096, 4096, 1)])
def test_gpu_kernels_and_hoppers_agree_with_the_definition(queries, keys, kv_heads, dim, gate_logits, poisoned_memory):
    """Both passes backward, in bfloat16: what Hopper does by default, what is deterministic, and the plain twins.

    Forward Hopper's kernel for short sequences of 64 channels, and that for long ones.
    """
    inputs = attention_inputs(
        batch=1, heads=4, kv_heads=kv_heads, queries=queries, keys=keys, dim=dim, gate_logits=gate_logits,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    inputs[3][:, 1, keys // 2] = -math.inf
    options = dict(key_start=torch.tensor([keys // 5], device="cuda"))
    grad_out = torch.randn(inputs[0].shape, device="cuda").bfloat16()
    doubles = [x.double() for x in inputs]
    exact = output_and_gradients(forgetting_attention_reference, doubles, grad_out.double(), **options)
    same = output_and_gradients(forgetting_attention_reference, inputs, grad_out, **options)
    hopper = triton_forward.gluon_forward
    for deterministic, gluon, sizes in ((False, "1", hopper.SHORT), (True, "1", hopper.LONG), (False, "0", None)):
        tuned = hopper.WIDE if dim > 64 else sizes
        with (
            mock.patch.dict(os.environ, {"FOX_KERNELS_GLUON": gluon}),
            mock.patch.object(hopper, "tuned", lambda *_, tuned=tuned: tuned),
        ):
            got = output_and_gradients(forgetting_attention, inputs, grad_out, deterministic=deterministic, **options)
        for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
            assert_as_accurate_as_torch(x, y, z, name=f"{name}, {deterministic=}, {gluon=}, {sizes=}")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
def test_gpu_scores_that_outgrow_the_diagonal_take_the_running_maximum(dtype, dim, poisoned_memory):
    """Keys far back with scores of hundreds of nats: the frozen maximum of the diagonal overflows on them."""
    inputs = attention_inputs(queries=700, heads=4, dim=dim, gate_logits=(8.0, 20.0), dtype=dtype, device="cuda")
    inputs[1][:, :2, 100:110] *= 40.0
    grad_out = torch.randn(inputs[0].shape, device="cuda").to(dtype)
    doubles = [x.double() for x in inputs]
    exact = output_and_gradients(forgetting_attention_reference, doubles, grad_out.double())
    same = output_and_gradients(forgetting_attention_reference, inputs, grad_out)
    got = output_and_gradients(forgetting_attention, inputs, grad_out)
    for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
        assert_as_accurate_as_torch(x, y, z, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("gate_logits", [(2.0, 6.0), (-20.0, -20.0), (20.0, 20.0)], ids=["usual", "closed", "open"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
def test_gpu_and_cpu_prune_alike(gate_logits, dtype, poisoned_memory):
    inputs = attention_inputs(
        queries=1500, keys=2048, heads=4, kv_heads=2, dim=64, gate_logits=gate_logits, dtype=dtype
    )
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    options = dict(log_pruning_tolerance=-10.0, key_start=torch.tensor([0, 700]))
    expected = output_and_gradients(forgetting_attention, [x.float() for x in inputs], grad_out, **options)
    options["key_start"] = options["key_start"].cuda()
    on_gpu = [x.cuda() for x in inputs]
    got = output_and_gradients(forgetting_attention, on_gpu, grad_out.cuda(), **options)
    same = output_and_gradients(
        forgetting_attention_reference, on_gpu, grad_out.cuda(), key_start=options["key_start"]
    )
    for name, x, y, z in zip(NAMES, got, same, expected, strict=True):
        assert_as_accurate_as_torch(x.cpu(), y.cpu(), z, floor=2e-4, name=name)
    stats = forgetting_attention(*on_gpu, **options, return_stats=True)[1]
    options["key_start"] = options["key_start"].cpu()
    on_cpu = forgetting_attention(*inputs, **options, return_stats=True)[1]
    torch.testing.assert_close(stats.pruned_fraction.cpu(), on_cpu.pruned_fraction)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_gradients_are_bitwise_reproducible_on_demand(dim):
    inputs = attention_inputs(queries=1000, dim=dim, dtype=torch.bfloat16, device="cuda")
    grad_out = torch.randn(inputs[0].shape, device="cuda")
    first = output_and_gradients(forgetting_attention, inputs, grad_out, deterministic=True)
    for _ in range(5):
        again = output_and_gradients(forgetting_attention, inputs, grad_out, deterministic=True)
        for x, y in zip(again, first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["transposed", "fused"])
def test_gpu_kernels_read_strided_inputs_in_place(layout):
    fused = torch.randn(2, 300, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    parts = fused.unbind(2) if layout == "fused" else [x.contiguous() for x in fused.unbind(2)]
    q, k, v = (x.transpose(1, 2) for x in parts)
    log_fgate = torch.nn.functional.logsigmoid(torch.randn(2, 4, 300, device="cuda"))
    expected = forgetting_attention(q.contiguous(), k.contiguous(), v.contiguous(), log_fgate)
    assert torch.equal(forgetting_attention(q, k, v, log_fgate), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [None, -10.0])
@pytest.mark.parametrize("deterministic", [True, False])
def test_gpu_forward_and_backward_replay_from_a_cuda_graph(deterministic, tolerance):
    """Nothing may look at a value on the host: a replay on new inputs gives what a fresh call gives."""
    inputs = [x.requires_grad_() for x in attention_inputs(queries=300, dim=64, dtype=torch.bfloat16, device="cuda")]

    def step():
        out = forgetting_attention(*inputs, log_pruning_tolerance=tolerance, deterministic=deterministic)
        return torch.autograd.grad(out.float().square().sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, new in zip(inputs, attention_inputs(queries=300, dim=64, seed=5), strict=True):
            x.copy_(new)
    graph.replay()
    for x, y in zip([x.clone() for x in captured], step(), strict=True):
        if deterministic:
            assert torch.equal(x, y)
        else:  # sums in any order
            torch.testing.assert_close(x, y, rtol=1.6e-2, atol=1e-4 * float(y.float().abs().max()))


@pytest.mark.gpu
def test_gpu_op_compiles_into_one_graph():
    inputs = [x.requires_grad_() for x in attention_inputs(queries=256, dim=64, dtype=torch.bfloat16, device="cuda")]

    def step(*args):
        return forgetting_attention(*args, log_pruning_tolerance=-10.0, deterministic=True).float().square().sum()

    expected = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True)
    for x, y in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [None, -10.0])
def test_gpu_custom_op_keeps_pytorchs_contract(tolerance):
    inputs = attention_inputs(queries=70, dim=64, dtype=torch.bfloat16, device="cuda")
    key_start = torch.tensor([0, 3], device="cuda")
    arguments = [x.requires_grad_() for x in inputs] + [0.125, tolerance, "paper", None, key_start]
    torch.library.opcheck(torch.ops.fox_kernels.forgetting_attention.default, arguments)
