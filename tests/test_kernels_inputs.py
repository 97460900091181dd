"""What users feed it: any width up to 256, any strides without a copy, more than 2**31 elements."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fox_kernels import (
    append_gates,
    empty_sums,
    forgetting_attention,
    forgetting_attention_decode,
    forgetting_attention_reference,
)
from fox_kernels.forgetting_attention import on_device_of
from helpers import assert_as_accurate_as_torch, attention_inputs, output_and_gradients

NAMES = ("output", "dq", "dk", "dv", "dlog_fgate")
ON = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def needs_gib(count):
    """Skip where the GPU has less memory than that."""
    if torch.cuda.mem_get_info()[0] < count * 2**30:
        pytest.skip(f"needs {count} GiB of GPU memory")


def assert_same_numbers(got, expected, name):
    """But for sums in another order: a wrong address gives something else altogether."""
    got, expected = got.detach(), expected.detach()
    error, largest = float((got - expected).abs().max()), float(expected.abs().max())
    assert error <= 0.01 * largest, f"{name}: off by {error} of {largest}"


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dim", [1, 3, 8, 17, 80, 100, 129, 255])
def test_any_width_up_to_256(dim, device, poisoned_memory):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = attention_inputs(
            batch=1, heads=2, kv_heads=1, queries=70, keys=150, dim=dim, dtype=dtype, device=device
        )
        grad_out = torch.randn(inputs[0].shape, device=device).to(dtype)
        exact = output_and_gradients(forgetting_attention_reference, [x.double() for x in inputs], grad_out.double())
        same = output_and_gradients(forgetting_attention_reference, inputs, grad_out)
        got = output_and_gradients(forgetting_attention, inputs, grad_out)
        for name, x, y, z in zip(NAMES, got, same, exact, strict=True):
            assert_as_accurate_as_torch(x, y, z, name=f"{name} in {dtype}")


def views(q, k, v, log_fgate, layout):
    """The same numbers in another layout; `fused` is one projection, `strided` skips rows and columns."""
    if layout == "length-first":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, log_fgate)]
    if layout == "fused":
        whole = torch.stack((q, k, v), dim=1).permute(0, 3, 1, 2, 4).contiguous()  # (B, T, 3, H, D)
        return [*(x.transpose(1, 2) for x in whole.unbind(2)), log_fgate.transpose(0, 2).contiguous().transpose(0, 2)]
    if layout == "strided":
        return [torch.stack((x, x + 1), dim=3).flatten(2, 3)[:, :, ::2] for x in (q, k, v, log_fgate)]
    if layout == "sliced":  # rows that start at any byte: no tensor memory accelerator
        return [torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in (q, k, v, log_fgate)]
    last = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    return [*last, torch.stack((log_fgate, log_fgate), dim=-1)[..., 0]]


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("layout", ["length-first", "fused", "strided", "sliced", "channels-before-length"])
def test_layouts_give_the_same_numbers(layout, device, poisoned_memory):
    """To the rounding of sums: other addresses may mean other tiles. Gradients come in the layout of their tensor."""
    inputs = attention_inputs(queries=200, dim=32, dtype=torch.bfloat16, device=device)
    other = views(*inputs, layout)
    assert all(torch.equal(x, y) for x, y in zip(inputs, other, strict=True))
    assert all(x.stride() != y.stride() for x, y in zip(inputs, other, strict=True))
    grad_out = torch.randn(inputs[0].shape, device=device).bfloat16()
    options = dict(log_pruning_tolerance=-10.0, pruning_rule="tight", window=150)
    expected = output_and_gradients(forgetting_attention, inputs, grad_out, **options)
    got = output_and_gradients(forgetting_attention, other, views(grad_out, *inputs[1:], layout)[0], **options)
    for name, x, y in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2, msg=lambda text, name=name: f"{name}: {text}")
    if layout == "length-first":
        for x, y in zip(got[:4], (other[0], *other[:3]), strict=True):
            assert x.stride() == y.stride()


@pytest.mark.parametrize("device", ON)
def test_one_key_head_seen_by_all_and_one_gradient_for_all(device, poisoned_memory):
    """Expanded tensors: a step of 0 between heads, and the gradient of a sum, which is one number everywhere."""
    q, k, v, log_fgate = attention_inputs(queries=140, heads=4, kv_heads=1, dim=32, device=device)
    expanded = [q, k.expand(2, 4, 140, 32), v.expand(2, 4, 140, 32), log_fgate[:, :1].expand(2, 4, 140)]
    one = torch.ones((), device=device).expand(q.shape)
    got = output_and_gradients(forgetting_attention, expanded, one)
    doubles = [x.double() for x in (q, k, v, log_fgate[:, :1])]
    exact = output_and_gradients(
        lambda q, k, v, g: forgetting_attention_reference(q, k, v, g.expand(2, 4, 140)), doubles, one.double()
    )
    for name, x, y in zip(NAMES, got, exact, strict=True):
        x = x.double() if x.shape == y.shape else x.double().sum(dim=1, keepdim=True)
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["heads-first", "length-first"])
def test_gpu_inputs_are_not_copied(layout):
    """Forward: nothing beyond the output, a float per row, the sums of the gates and a few numbers per block."""
    shape = (2, 8, 8192, 64) if layout == "heads-first" else (2, 8192, 8, 64)
    q, k, v = torch.randn(3, *shape, device="cuda", dtype=torch.bfloat16).unbind()
    log_fgate = -torch.rand(2, 8, 8192, device="cuda")
    if layout == "length-first":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            out = forgetting_attention(q, k, v, log_fgate)
        peak = torch.cuda.max_memory_allocated() - before
        size = out.numel() * out.element_size()
        assert out.stride() == q.stride()
        del out
    assert peak < 1.5 * size, f"{peak / size:.2f} outputs"


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [None, "paper", "tight"])
def test_gpu_more_than_two_to_the_31_queries_times_channels(rule):
    """The last heads, whose addresses do not fit 32 bits, against a call of them alone."""
    needs_gib(40)
    batch, heads, length, dim = 33, 8, 65536, 128
    assert batch * heads * length * dim > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    k, v = torch.randn(2, batch, 1, length, dim, device="cuda", dtype=torch.bfloat16, generator=generator).unbind()
    log_fgate = -torch.rand(batch, heads, length, device="cuda", generator=generator)
    options = dict(window=300)
    if rule is not None:
        options |= dict(log_pruning_tolerance=-10.0, pruning_rule=rule)
    grad_out = torch.randn(1, 1, length, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    inputs = [x.requires_grad_() for x in (q, k, v, log_fgate)]
    out = forgetting_attention(*inputs, **options)
    grads = torch.autograd.grad(out, inputs, grad_out.expand_as(out))
    alone = [x.detach()[-1:].requires_grad_() for x in inputs]
    expected = forgetting_attention(*alone, **options)
    wanted = torch.autograd.grad(expected, alone, grad_out.expand_as(expected))
    for name, x, y in zip(NAMES, (out, *grads), (expected, *wanted), strict=True):
        assert_same_numbers(x[-1:], y, name)


@pytest.mark.gpu
def test_gpu_more_than_two_to_the_31_keys_times_channels():
    """Few queries against keys whose addresses do not fit 32 bits: the last head against a call of it alone."""
    needs_gib(40)
    heads, keys, dim = 16, 1_100_000, 128
    assert heads * keys * dim > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    k, v = (
        torch.randn(1, heads, keys, dim, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2)
    )
    q = torch.randn(1, heads, 64, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    log_fgate = -1e-5 * torch.rand(1, heads, keys, device="cuda", generator=generator)
    grad_out = torch.randn(1, 1, 64, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    inputs = [x.requires_grad_() for x in (q, k, v, log_fgate)]
    out = forgetting_attention(*inputs)
    grads = torch.autograd.grad(out, inputs, grad_out.expand_as(out))
    alone = [x.detach()[:, -1:].requires_grad_() for x in inputs]
    expected = forgetting_attention(*alone)
    wanted = torch.autograd.grad(expected, alone, grad_out)
    for name, x, y in zip(NAMES, (out, *grads), (expected, *wanted), strict=True):
        assert_same_numbers(x[:, -1:], y, name)
    growing = empty_sums(1, heads, keys, "cuda")
    append_gates(growing, log_fgate.detach(), 0)
    decoded = forgetting_attention_decode(q.detach()[:, :, -1:], k, v, growing.sums)
    torch.testing.assert_close(decoded, out.detach()[:, :, -1:], atol=2e-3, rtol=1e-2)


@pytest.mark.gpu
def test_gpu_a_batch_in_the_middle_of_a_larger_tensor():
    """Steps beyond 2**31 between sequences and heads, though the tensors themselves are small."""
    needs_gib(12)
    storage = torch.zeros(2, 2, 2**30 + 64, device="cuda", dtype=torch.bfloat16)
    small = attention_inputs(queries=200, heads=2, dim=64, dtype=torch.bfloat16, device="cuda")
    spread = storage[..., : 200 * 64].unflatten(-1, (200, 64))
    assert spread.stride(0) > 2**31
    spread.copy_(small[1])
    expected = forgetting_attention(*small)
    assert torch.equal(forgetting_attention(small[0], spread, *small[2:]), expected)
    assert torch.equal(forgetting_attention(small[0], small[1], spread.copy_(small[2]), small[3]), expected)
    got = forgetting_attention(spread.copy_(small[0]), *small[1:])
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("of_tensor", "current", "switches"), [("cuda:1", 0, True), ("cuda:0", 0, False)])
def test_kernels_are_launched_on_the_device_of_the_tensors(of_tensor, current, switches, monkeypatch):
    """A model that is spread over several GPUs leaves the current device at the first; Triton launches on that."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device)))
    with on_device_of(SimpleNamespace(device=torch.device(of_tensor))):
        assert entered == ([torch.device(of_tensor)] if switches else [])


@pytest.mark.gpu
def test_gpu_tensors_of_the_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = attention_inputs(queries=300, dim=64, dtype=torch.bfloat16)
    on_first, on_second = ([x.to(f"cuda:{i}") for x in inputs] for i in range(2))
    options = dict(log_pruning_tolerance=-10.0, pruning_rule="tight")
    grad_out = torch.randn(inputs[0].shape).bfloat16()
    with torch.cuda.device(0):
        expected = output_and_gradients(forgetting_attention, on_first, grad_out.to("cuda:0"), **options)
        got = output_and_gradients(forgetting_attention, on_second, grad_out.to("cuda:1"), **options)
        forgetting_attention(*on_second, **options, return_stats=True)
        growing = empty_sums(2, 4, 300, "cuda:1")
        append_gates(growing, on_second[3], 0)
        decoded = forgetting_attention_decode(on_second[0][:, :, -1:], *on_second[1:3], growing.sums)
    for name, x, y in zip(NAMES, got, expected, strict=True):
        assert_same_numbers(x.cpu().float(), y.cpu().float(), name)
    torch.testing.assert_close(decoded.cpu(), expected[0][:, :, -1:].cpu(), atol=1e-2, rtol=1e-2)
