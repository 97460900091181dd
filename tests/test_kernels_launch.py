"""Launches that remember compiled kernels, and calls that pass the dispatcher only where something needs them to."""

import pytest
import torch

from fox_kernels import forgetting_attention
from fox_kernels.dispatch import needs_op
from helpers import attention_inputs

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
gpu = pytest.mark.gpu


def test_classes_of_numbers_are_those_of_triton():
    from triton.backends.compiler import GPUTarget

    from fox_kernels import launch

    assert launch.classes_hold(GPUTarget("cuda", 90, 32))
    # What Triton tells apart is told apart: 1, multiples of 16, 64 bits.
    kinds = [launch._class_of(x) for x in (1, 3, 16, 2**31 + 1, 2**31 + 16)]
    assert len(set(kinds)) == len(kinds)


def test_a_rule_that_no_class_follows_is_noticed(monkeypatch):
    from triton.backends.compiler import GPUTarget

    from fox_kernels import launch

    monkeypatch.setattr(launch, "_class_of", lambda x: 0 if x == 1 else 1)
    assert not launch.classes_hold(GPUTarget("cuda", 90, 32))


@gpu
@pytest.mark.parametrize("lengths", [(512, 513, 768, 512, 513, 769)])
def test_remembered_launches_compute_what_tritons_do(lengths, monkeypatch):
    from fox_kernels import launch

    def run(length):
        tensors = attention_inputs(queries=length, dim=64, dtype=torch.bfloat16, device="cuda", seed=length)
        tensors = [x.requires_grad_() for x in tensors]
        out = forgetting_attention(*tensors, log_pruning_tolerance=-10.0, deterministic=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    launch._remembered.clear()
    by_memory = [run(length) for length in lengths]
    assert launch._remembered
    monkeypatch.setattr(launch, "_knows_what_matters", lambda: False)
    for length, ours in zip(lengths, by_memory, strict=True):
        for x, y in zip(ours, run(length), strict=True):
            assert torch.equal(x, y), length


def inputs():
    return [x.requires_grad_() for x in attention_inputs(queries=40, dim=8)]


def test_eager_calls_equal_calls_of_the_op():
    """Under a dispatch mode the custom op runs; without, its Python function."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def run():
        tensors = inputs()
        out = forgetting_attention(*tensors, log_pruning_tolerance=-3.0)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    plain = run()
    with Watch():
        assert needs_op(torch.zeros(1))
        watched = run()
    assert any("forgetting_attention" in name for name in seen)
    for x, y in zip(plain, watched, strict=True):
        assert torch.equal(x, y)


def test_who_needs_the_op():
    class Subclass(torch.Tensor):
        pass

    x = torch.zeros(2)
    assert not needs_op(x, torch.nn.Parameter(x))
    assert needs_op(x, x.as_subclass(Subclass))
    assert torch.func.vmap(lambda y: y + needs_op(y))(x).tolist() == [1.0, 1.0]
    assert torch.compile(lambda y: y + needs_op(y), backend="eager", fullgraph=True)(x).tolist() == [1.0, 1.0]


def test_second_derivatives_are_refused():
    tensors = inputs()
    out = forgetting_attention(*tensors)
    (dq,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
