"""Optimizers by name: the learning-rate rule, Kron on a problem that Adam cannot do, masks that hold under it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fox_training.optimizers import build_optimizer, optimizer_spec
from fox_training.sparsity import sparsify


def kron():
    pytest.importorskip("pytorch_optimizer")


def least_squares(seed=0, condition=1e4):
    """Matrix problem `min |A W - Y|^2` whose Hessian has this condition number; loss function and start."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    a = u @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10() / 2, 16)) @ v
    y = a @ torch.randn(16, 16, generator=generator)
    return lambda w: (a @ w - y).square().mean(), torch.zeros(16, 16)


def final_loss(name, learning_rate, steps=400, **options):
    torch.manual_seed(0)
    loss, start = least_squares()
    weight = nn.Parameter(start)
    optimizer = build_optimizer(name, [weight], learning_rate, **options)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.99 if step > steps // 2 else 1.0
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()
    return loss(weight.detach()).item()


def spectral_norm_from_below(a):
    """One step of the power iteration from the longest row or column, as PSGD bounds it (arXiv:2211.04422)."""
    columns, rows = a.square().sum(0), a.square().sum(1)
    if columns.max() > rows.max():
        x = a[:, columns.argmax()] @ a
        return (a @ (x / x.norm())).norm()
    x = a @ a[rows.argmax()]
    return ((x / x.norm()) @ a).norm()


def psgd_kron(gradient, weight, learning_rate, steps, weight_decay):
    """PSGD with a Kronecker-factored preconditioner P = (Q^T Q) x (R^T R), from its equations; yields the weights.

    Q and R are fitted on the group of triangular matrices to probes V: Q <- Q - 0.1 triu(A A^T - B B^T) Q / norm with
    A = Q M R^T and B = Q^-T V R^-1, M the momentum.
    """
    q, r = torch.eye(weight.shape[0]), torch.eye(weight.shape[1])
    mean = torch.zeros_like(weight)
    for step in range(1, steps + 1):
        mean = 0.9 * mean + 0.1 * gradient(weight)
        momentum = mean / (1 - 0.9**step)
        probe = torch.randn_like(weight)
        a, b = q @ momentum @ r.T, torch.linalg.inv(q).T @ probe @ torch.linalg.inv(r)
        new = []
        for factor, left, right in ((q, a @ a.T, b @ b.T), (r, a.T @ a, b.T @ b)):
            size = spectral_norm_from_below(left + right)
            new.append(factor - 0.1 * torch.triu(left - right) @ factor / size)
        q, r = new
        update = q.T @ q @ momentum @ r.T @ r
        update = update * (1.1 / update.square().mean().sqrt()).clamp(max=1.0)
        weight = weight - learning_rate * (update + weight_decay * weight)
        yield weight


def test_kron_goes_the_way_of_its_equations():
    """A quadratic in a matrix, each step against the equations with the same probes."""
    kron()
    generator = torch.Generator().manual_seed(0)
    a, y = torch.randn(12, 8, generator=generator), torch.randn(12, 6, generator=generator)
    weight = nn.Parameter(torch.zeros(8, 6))
    options = dict(backend="pytorch_optimizer", pre_conditioner_update_probability=1.0, balance_prob=0.0, lr=0.03)
    optimizer = build_optimizer("kron", [weight], 1.0, weight_decay=0.1, **options)
    torch.manual_seed(1)
    expected = list(psgd_kron(lambda w: 2 * a.T @ (a @ w - y) / y.numel(), torch.zeros(8, 6), 0.03, 60, 0.1))
    torch.manual_seed(1)
    for step in range(60):
        optimizer.zero_grad()
        (a @ weight - y).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected[step], rtol=1e-3, atol=1e-4)
    assert (a @ expected[-1] - y).square().mean() < 0.5 * y.square().mean()  # it has gone somewhere


def test_both_backends_of_kron_end_at_the_same_place(monkeypatch):
    """Their random probes and their bounds on a norm differ, so the way there does too."""
    kron()
    heavyball = pytest.importorskip("heavyball", reason="heavyball is only needed on a GPU")
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    generator = torch.Generator().manual_seed(0)
    a, y = torch.randn(12, 8, generator=generator), torch.randn(12, 6, generator=generator)
    best = (a @ torch.linalg.lstsq(a, y).solution - y).square().mean()
    settings = {
        "pytorch_optimizer": dict(pre_conditioner_update_probability=1.0),
        "heavyball": dict(
            preconditioner_update_probability=1.0, precond_init_scale=1.0, max_size_triangular=8192, compile_step=False
        ),
    }  # fmt: skip
    curves = {}
    for backend, options in settings.items():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(8, 6))
        optimizer, curve = build_optimizer("kron", [weight], 0.09, backend=backend, **options), []
        for _ in range(200):
            optimizer.zero_grad()
            loss = (a @ weight - y).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves[backend] = torch.tensor(curve)
    first, second = curves.values()
    torch.testing.assert_close(first[:5], second[:5], rtol=0.02, atol=0)
    torch.testing.assert_close(first[-1], second[-1], rtol=0.01, atol=0)
    assert first[-1] < 1.02 * best


def test_kron_solves_what_adam_at_its_best_rate_does_not():
    kron()
    losses = [final_loss("adamw", rate) for rate in (3e-2, 1e-1, 3e-1, 1.0, 3.0)]
    assert min(losses) not in (losses[0], losses[-1])  # the best rate is among them
    assert final_loss("kron", 1e-1) < min(losses) / 10


def test_a_step_of_radam_and_adamw_is_that_of_torch():
    start = torch.randn(4, 3)
    for name, theirs, options in (
        ("radam", torch.optim.RAdam, {"decoupled_weight_decay": True}),
        ("adamw", torch.optim.AdamW, {}),
    ):
        ours, other = (nn.Parameter(start.clone()) for _ in range(2))
        pair = (
            build_optimizer(name, [ours], 1e-2, weight_decay=0.1),
            theirs([other], 1e-2, weight_decay=0.1, **options),
        )
        for _ in range(3):
            for weight, optimizer in zip((ours, other), pair, strict=True):
                weight.grad = weight.detach().sin()
                optimizer.step()
        torch.testing.assert_close(ours, other)


def test_the_learning_rate_is_adams_and_kron_takes_a_third():
    assert optimizer_spec("adamw", 3e-4)[1]["lr"] == 3e-4
    assert optimizer_spec("radam", 3e-4)[1]["lr"] == 3e-4
    if hasattr(torch.optim, "Muon"):
        assert optimizer_spec("muon", 3e-4)[1] == {"lr": 3e-4, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    kron()
    assert optimizer_spec("kron", 3e-4)[1]["lr"] == pytest.approx(1e-4)
    assert optimizer_spec("kron", 3e-4, lr=5e-5)[1]["lr"] == 5e-5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon")
def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """`match_rms_adamw`: root mean square 0.2 of the learning rate, whatever the gradient; AdamW's is 0.2 to 0.4."""
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = build_optimizer("muon", [weight], 1e-2)
    weight.grad = 1e3 * torch.randn(64, 256)
    optimizer.step()
    assert weight.detach().square().mean().sqrt() / 1e-2 == pytest.approx(0.2, rel=0.15)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))


def step(model, optimizer, seed):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    F.mse_loss(model(x), x[:, :2]).backward()
    optimizer.step()


def test_masks_hold_under_kron_whose_preconditioner_moves_every_weight():
    kron()
    model = small_net()
    optimizer = build_optimizer("kron", model.parameters(), 1e-2, weight_decay=0.1)
    pruner = sparsify(model, optimizer, total_steps=20, final_sparsity=0.8)
    for seed in range(20):
        step(model, optimizer, seed)
        assert all(torch.all(model.get_parameter(n)[~keep] == 0) for n, keep in pruner.masks.items())
    assert pruner.sparsity() == pytest.approx(0.8, abs=0.01)


def test_the_state_of_kron_survives_saving():
    kron()
    model, other = small_net(), small_net()
    optimizer = build_optimizer("kron", model.parameters(), 1e-2)
    for seed in range(5):
        step(model, optimizer, seed)
    other.load_state_dict(model.state_dict())
    restored = build_optimizer("kron", other.parameters(), 1e-2)
    for seed in range(2):  # its state is made on the first step
        step(other, restored, seed)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(5, 8):
        for net, its in ((model, optimizer), (other, restored)):
            torch.manual_seed(seed)  # random probes
            step(net, its, seed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["adamw", "radam", "kron"])
def test_a_rate_may_be_a_tensor_and_a_step_needs_no_gradients(name):
    """As torch.compile and schedulers have it; a step inside `no_grad` is the same step."""
    if name == "kron":
        kron()
    weights = []
    for as_tensor in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = build_optimizer(name, [weight], 1e-2)
        (group,) = optimizer.param_groups
        group["lr"] = torch.tensor(group["lr"], dtype=torch.double) if as_tensor else group["lr"]
        for _ in range(3):
            weight.grad = weight.detach().sin()
            with torch.set_grad_enabled(not as_tensor):
                optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)
    assert (weights[0] != 1).all()


def test_says_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match="name must be one of adamw, radam, muon, kron; got 'shampoo'"):
        build_optimizer("shampoo", [nn.Parameter(torch.zeros(2, 2))], 1e-3)
    with pytest.raises(ValueError, match="backend must be auto, heavyball or pytorch_optimizer; got 'x'"):
        build_optimizer("kron", [nn.Parameter(torch.zeros(2, 2))], 1e-3, backend="x")
    with pytest.raises(ValueError, match=r"params of muon must be matrices; got shape \(2,\)"):
        build_optimizer("muon", [nn.Parameter(torch.zeros(2))], 1e-3)
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(
        ImportError, match=r"needs the package pytorch_optimizer: pip install 'fox-transformers\[kron\]"
    ):
        build_optimizer("kron", [nn.Parameter(torch.zeros(2, 2))], 1e-3)
