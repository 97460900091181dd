"""Running sums and the gate gradient: exact in pairs of float32, and the Triton twins give what PyTorch gives."""

import math

import pytest
import torch

from fox_kernels.gates import GATE_BLOCK, GateSums, first_visible_key, gate_gradient, gate_sums
from helpers import DEVICES


def random_gates(length, device="cpu"):
    """`(2, 3, length)` log gates in a transposed layout, with two closed ones."""
    log_fgate = torch.nn.functional.logsigmoid(5 * torch.randn(2, length, 3)).transpose(1, 2)
    log_fgate[0, 1, length // 2] = -math.inf
    log_fgate[1, 2, length // 3] = -2e4
    return log_fgate.to(device)


@pytest.mark.parametrize("length", [1, GATE_BLOCK, GATE_BLOCK + 1, 1000])
def test_sums_are_exact_to_the_last_bits_of_two_floats(length):
    log_fgate = random_gates(length)
    exact = log_fgate.masked_fill(log_fgate <= -1e4, 0.0).double().cumsum(-1) / math.log(2.0)
    sums = gate_sums(log_fgate)
    assert sums.starts.shape == (2, 2, 3, -(-length // GATE_BLOCK))
    torch.testing.assert_close(sums.running(), exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("keys", "queries", "padded"), [(1, 1, False), (129, 60, True), (2500, 2500, True)])
def test_triton_sums_are_those_of_pytorch(device, keys, queries, padded, poisoned_memory):
    triton_gates = pytest.importorskip("fox_kernels.triton_gates", reason="Triton has wheels for Linux only")
    log_fgate = random_gates(keys, device)
    key_start = torch.tensor([0, keys // 2], device=device) if padded else None
    within, starts, first_key = triton_gates.prepare(log_fgate, key_start, queries)
    expected = gate_sums(log_fgate)
    torch.testing.assert_close(GateSums(within, starts).running(), expected.running(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(within[0], expected.within[0], rtol=1e-6, atol=1e-30)
    assert torch.equal(first_key, first_visible_key(log_fgate, key_start, queries))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", [1, 129, 2500])
def test_triton_gate_gradient_is_that_of_pytorch(device, keys, poisoned_memory):
    triton_gates = pytest.importorskip("fox_kernels.triton_gates", reason="Triton has wheels for Linux only")
    log_fgate, columns = random_gates(keys, device), torch.randn(2, 3, keys, device=device)
    expected = gate_gradient(columns.cpu(), log_fgate.cpu())
    got = triton_gates.gate_gradient(columns, log_fgate)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "lengths", [[1], [1000, 24], [0, 700, 1, 323, 0, 1024, 452, 0], [100, 3000, 60], [1024, 1024, 400]], ids=str
)
def test_triton_gates_of_packed_sequences_are_those_of_each(lengths, device, poisoned_memory):
    triton_gates = pytest.importorskip("fox_kernels.triton_gates", reason="Triton has wheels for Linux only")
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    total, window = sum(lengths), 700
    log_fgate, columns = random_gates(total, device)[:1, 1:2], torch.randn(1, 1, total, device=device)
    _, _, first_key = triton_gates.prepare(log_fgate, None, total, window, cu_seqlens)
    gradient = triton_gates.gate_gradient(columns, log_fgate, cu_seqlens)
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        of = slice(start, start + length)
        if length:
            expected = first_visible_key(log_fgate[..., of], None, length, window)
            assert torch.equal(first_key[..., of], expected + start)
            expected = gate_gradient(columns[..., of].cpu(), log_fgate[..., of].cpu())
            torch.testing.assert_close(gradient[..., of].cpu(), expected, rtol=1e-6, atol=1e-6)
