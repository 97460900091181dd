"""The mask engine: exact zeros after every step of every optimizer, and nothing about the model changes."""

import copy
import importlib.util
import io
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fox_training.sparsity import MaskedPruner, SparsityConfig, kept_weights, sparsify
from helpers import tiny_fox


class Net(nn.Module):
    """Two convolutions, a norm and two linear layers: 8 x 8 pixels to 3 numbers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.norm = nn.LayerNorm(128)
        self.linear = nn.Linear(128, 20)
        self.out = nn.Linear(20, 3)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)
        return self.out(F.relu(self.linear(self.norm(x))))


def make(seed=0):
    torch.manual_seed(seed)
    return Net()


def train_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 2, 8, 8, generator=generator), torch.randn(16, 3, generator=generator)
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def pruned_are_zero(model, pruner):
    parameters = dict(model.named_parameters())
    return all(torch.all(parameters[name][~keep] == 0.0) for name, keep in pruner.masks.items())


def optimizers():
    return {
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
        "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    }


@pytest.mark.parametrize("name", optimizers())
@pytest.mark.parametrize("method", ["magnitude", "saliency", "random", "static_random", "rigl"])
def test_pruned_weights_are_exactly_zero_after_every_step(name, method):
    model = make()
    optimizer = optimizers()[name](model.parameters())
    pruner = sparsify(model, optimizer, total_steps=30, final_sparsity=0.9, method=method)
    for step in range(30):
        train_step(model, optimizer, step)
        assert pruned_are_zero(model, pruner)
    assert pruner.step_count == 30 and pruner.is_final
    for layer, (zeros, total) in pruner.counts().items():
        assert zeros == total - kept_weights(total, pruner.layer_sparsities[layer])
        weight = dict(model.named_parameters())[layer]
        assert int((weight == 0).sum()) == zeros or method in ("static_random", "rigl")
    assert pruner.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_masking_once_or_masking_the_gradient_would_not_be_enough():
    """Why there is a hook: both shorter ways leave almost nothing pruned."""
    for way in ("weights once", "gradients"):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(5):
            train_step(model, optimizer, step)
        mask = torch.rand(model.linear.weight.shape) > 0.9
        with torch.no_grad():
            model.linear.weight.mul_(mask)
        if way == "gradients":
            model.linear.weight.register_hook(lambda grad, mask=mask: grad * mask)
        for step in range(20):
            train_step(model, optimizer, step)
        assert (model.linear.weight[~mask] != 0).float().mean() > 0.9


def test_sparsity_follows_the_schedule_layer_by_layer():
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = sparsify(model, optimizer, total_steps=100, final_sparsity=0.8, allocation="uniform", every_steps=7)
    before = None
    for step in range(1, 101):
        train_step(model, optimizer, step)
        if pruner.schedule.is_refresh(step):
            expected = pruner.schedule.sparsity(step)
            for zeros, total in pruner.counts().values():
                assert total - zeros == max(1, round(total * (1 - expected)))
        else:
            assert before is None or pruner.counts() == before
        before = pruner.counts()
    assert pruner.schedule.is_refresh(80) and not pruner.schedule.is_refresh(87)


@pytest.mark.parametrize("method", ["magnitude", "saliency", "random"])
def test_what_is_pruned_never_comes_back(method):
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    pruner = sparsify(model, optimizer, total_steps=40, final_sparsity=0.9, method=method, every_steps=2)
    support = pruner.masks
    for step in range(40):
        train_step(model, optimizer, step)
        assert all(not torch.any(keep & ~support[name]) for name, keep in pruner.masks.items())
        support = pruner.masks


def test_one_global_refresh_is_torch_prune_global():
    model, theirs = make(), make()
    config = SparsityConfig(final_sparsity=0.7, allocation="global", start_fraction=0, end_fraction=0.01)
    pruner = MaskedPruner(model, config, total_steps=100)
    pruner.step()
    layers = [(theirs.conv1, "weight"), (theirs.conv2, "weight"), (theirs.linear, "weight"), (theirs.out, "weight")]
    total = sum(module.weight.numel() for module, _ in layers)
    prune.global_unstructured(layers, prune.L1Unstructured, amount=total - round(total * (1 - 0.7)))
    for name, keep in pruner.masks.items():
        assert torch.equal(keep, theirs.get_submodule(name.removesuffix(".weight")).weight_mask.bool())


def test_a_global_threshold_leaves_every_layer_a_weight():
    model = make()
    with torch.no_grad():
        model.conv1.weight.mul_(1e-6)
    config = SparsityConfig(final_sparsity=0.9, allocation="global", start_fraction=0, end_fraction=0.01)
    pruner = MaskedPruner(model, config, total_steps=100)
    pruner.step()
    assert [int(keep.sum()) for name, keep in pruner.masks.items() if name == "conv1.weight"] == [1]


def test_constant_weights_are_counted_exactly():
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    config = SparsityConfig(final_sparsity=0.6, allocation="uniform", start_fraction=0, end_fraction=0.01)
    pruner = MaskedPruner(model, config, total_steps=100)
    pruner.step()
    for zeros, total in pruner.counts().values():
        assert total - zeros == round(total * (1 - 0.6))


def test_layers_can_be_chosen_and_given_a_sparsity_of_their_own():
    config = SparsityConfig(
        final_sparsity=0.5, allocation="uniform", exclude=("^out",), layer_sparsities={"conv1": 0.0, "linear": 0.9}
    )
    pruner = MaskedPruner(make(), config, total_steps=10)
    assert pruner.layer_sparsities == {"conv1.weight": 0.0, "conv2.weight": 0.5, "linear.weight": 0.9}
    assert pruner.excluded["out.weight"] == "matches ^out in exclude"
    assert pruner.excluded["norm.weight"] == "fewer than two dimensions"
    assert "dense: matches ^out in exclude" in pruner.describe()
    only = MaskedPruner(make(), SparsityConfig(final_sparsity=0.5, include=("linear",)), total_steps=10)
    assert list(only.masks) == ["linear.weight"]


def test_of_a_fox_the_embedding_norms_gates_shifts_and_head_stay_dense():
    pruner = MaskedPruner(tiny_fox(), SparsityConfig(final_sparsity=0.9), total_steps=10)
    kinds = {name.split(".")[-2] for name in pruner.masks}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "ogate_proj", "gate_proj", "up_proj", "down_proj"}
    dense = {name.split(".")[-2] for name in pruner.excluded}
    assert {"embed_tokens", "lm_head", "fgate_proj", "k_shift_proj", "v_shift_proj", "q_norm", "norm"} <= dense


def test_an_output_layer_tied_to_the_embedding_is_the_embedding():
    pruner = MaskedPruner(
        tiny_fox(tie_word_embeddings=True), SparsityConfig(final_sparsity=0.9, exclude=()), total_steps=10
    )
    assert "model.embed_tokens.weight" in pruner.excluded
    assert not any("embed" in name or "lm_head" in name for name in pruner.masks)


def test_nothing_about_the_model_changes():
    """Same keys, plain tensors, deepcopy after a backward pass; torch.nn.utils.prune fails at the last."""
    model = make()
    keys = list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = sparsify(model, optimizer, total_steps=10, final_sparsity=0.9)
    for step in range(10):
        train_step(model, optimizer, step)
    assert list(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter for p in model.parameters())
    target = copy.deepcopy(model)
    assert pruned_are_zero(target, pruner)
    moved = copy.deepcopy(optimizer)  # the copy has no hook and does not touch our model
    moved.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    assert pruner.step_count == 10


def test_target_networks_take_the_mask():
    model, target = make(0), make(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = sparsify(model, optimizer, total_steps=10, final_sparsity=0.9)
    for step in range(10):
        train_step(model, optimizer, step)
        with torch.no_grad():  # Polyak averaging brings pruned weights back a little every step
            for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
    assert not pruned_are_zero(target, pruner)
    bias = target.linear.bias.clone()
    pruner.apply_to(target)
    assert pruned_are_zero(target, pruner)
    assert torch.equal(target.linear.bias, bias)
    with pytest.raises(ValueError, match="other must have conv1.weight of shape .*; got nothing of that name"):
        pruner.apply_to(nn.Linear(2, 2))


@pytest.mark.parametrize("method", ["magnitude", "random", "static_random", "rigl"])
@pytest.mark.parametrize("stop", [1, 13, 24])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(method, stop):
    def begin():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        config = SparsityConfig(final_sparsity=0.8, method=method, every_steps=3)
        return model, optimizer, MaskedPruner(model, config, total_steps=30)

    whole, optimizer, pruner = begin()
    pruner.attach(optimizer)
    for step in range(30):
        if step == stop:
            saved = [copy.deepcopy(x.state_dict()) for x in (whole, optimizer, pruner)]
        train_step(whole, optimizer, step)

    resumed, optimizer, other = begin()
    with torch.no_grad():
        resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    other.attach(optimizer)
    for step in range(stop, 30):
        train_step(resumed, optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(pruner.masks[name], keep) for name, keep in other.masks.items())


def test_the_state_is_an_eighth_of_a_byte_per_weight_and_of_this_model_only():
    pruner = MaskedPruner(make(), SparsityConfig(final_sparsity=0.5, method="static_random"), total_steps=10)
    state = pruner.state_dict()
    assert state["mask.linear.weight"].numel() == 128 * 20 // 8
    other = MaskedPruner(nn.Linear(5, 5), SparsityConfig(final_sparsity=0.5), total_steps=10)
    with pytest.raises(ValueError, match="state must hold masks of the same parameters"):
        other.load_state_dict(state)


def test_rigl_keeps_the_count_and_moves_as_many_as_its_cosine_says():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = sparsify(
        model, optimizer, total_steps=100, final_sparsity=0.8, method="rigl", end_fraction=0.75, every_steps=25,
        allocation="uniform",
    )  # fmt: skip
    active = kept_weights(128 * 20, 0.8)
    before = pruner.masks["linear.weight"]
    for step in range(1, 101):
        train_step(model, optimizer, step)
        keep = pruner.masks["linear.weight"]
        assert int(keep.sum()) == active
        grown = int((keep & ~before).sum())
        if step in (25, 50, 75):
            most = int(0.3 / 2 * (1 + math.cos(math.pi * step / 75)) * active)
            assert (grown == 0) == (step == 75) and grown <= most
        else:
            assert grown == 0
        before = keep


def test_rigl_grows_where_the_gradient_is_largest_and_starts_there_from_zero():
    layer = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    config = SparsityConfig(final_sparsity=0.5, method="rigl", every_steps=1, rigl_drop_fraction=0.2, end_fraction=1.0)
    pruner = MaskedPruner(layer, config, total_steps=1000).attach(optimizer)
    before = pruner.masks["weight"]
    moved = int(0.2 / 2 * (1 + math.cos(math.pi / 1000)) * 50)
    layer.weight.grad = torch.rand(10, 10)
    score = layer.weight.grad.masked_fill(before, -1.0)
    expected = score.flatten().topk(moved).indices
    weight_before = layer.weight.detach().clone()
    optimizer.step()
    grown = (pruner.masks["weight"] & ~before).flatten().nonzero().squeeze(1)
    # Weights that were just dropped compete as well, so that the new ones are among the highest, not all of them.
    assert 0 < len(grown) <= moved and set(grown.tolist()) <= set(expected.tolist())
    assert torch.all(layer.weight.flatten()[grown] == 0)
    state = optimizer.state[layer.weight]
    assert torch.all(state["exp_avg"].flatten()[grown] == 0) and torch.any(state["exp_avg"] != 0)
    dropped = before & ~pruner.masks["weight"]
    kept = before & pruner.masks["weight"]
    assert weight_before[dropped].abs().max() <= weight_before[kept].abs().sort().values[moved] + 2e-3


def test_rules_that_need_a_gradient_say_so():
    for method in ("saliency", "rigl"):
        config = SparsityConfig(final_sparsity=0.5, method=method, start_fraction=0, every_steps=1)
        pruner = MaskedPruner(make(), config, total_steps=100)
        with pytest.raises(ValueError, match="gradient of conv[12].weight must be there .* got None"):
            pruner.step()


def test_several_optimizers_are_held_and_the_last_one_counts():
    model = make()
    convolutions = [*model.conv1.parameters(), *model.conv2.parameters()]
    taken = {id(p) for p in convolutions}
    first = torch.optim.SGD(convolutions, lr=0.1, momentum=0.9)
    second = torch.optim.Adam([p for p in model.parameters() if id(p) not in taken], lr=1e-2)
    pruner = sparsify(model, first, second, total_steps=10, final_sparsity=0.9, method="static_random")
    for step in range(10):
        train_step(model, first, step)
        assert pruned_are_zero(model, pruner)
        second.step()
        assert pruned_are_zero(model, pruner)
    assert pruner.step_count == 10


def test_accelerate_and_gradient_accumulation_count_optimizer_steps():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    pruner = sparsify(model, optimizer, total_steps=10, final_sparsity=0.9)
    for batch in range(40):
        with accelerator.accumulate(model):
            accelerator.backward(F.mse_loss(model(torch.randn(4, 2, 8, 8)), torch.zeros(4, 3)))
            optimizer.step()
            optimizer.zero_grad()
        assert pruner.step_count == (batch + 1) // 4
        assert pruned_are_zero(accelerator.unwrap_model(model), pruner)
    assert pruner.sparsity() == pytest.approx(0.9, abs=1e-3)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_hand_written_optimizer_calls_step_itself():
    model = make()
    with pytest.raises(ValueError, match="optimizer must be a torch.optim.Optimizer; got object. Call step"):
        sparsify(model, object(), total_steps=10, final_sparsity=0.9)
    pruner = MaskedPruner(model, SparsityConfig(final_sparsity=0.9), total_steps=5)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        pruner.step()
    assert pruned_are_zero(model, pruner) and pruner.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_detached_nothing_is_held_any_more():
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = sparsify(model, optimizer, total_steps=10, final_sparsity=0.9, method="static_random")
    pruner.detach()
    train_step(model, optimizer, 0)
    assert not pruned_are_zero(model, pruner) and pruner.step_count == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_masked_and_the_rest_untouched(dtype):
    layer = nn.Linear(16, 16, bias=False).to(dtype)
    before = layer.weight.detach().clone()
    config = SparsityConfig(final_sparsity=0.5, method="static_random")
    keep = MaskedPruner(layer, config, total_steps=10).masks["weight"]
    assert torch.equal(layer.weight.detach(), torch.where(keep, before, torch.zeros((), dtype=dtype)))


def test_infinite_weights_are_masked_to_zero_and_not_to_nan():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.fill_(math.inf)
    config = SparsityConfig(final_sparsity=0.5, method="static_random")
    keep = MaskedPruner(layer, config, total_steps=10).masks["weight"]
    assert torch.all(layer.weight[~keep] == 0) and torch.all(layer.weight[keep] == math.inf)


def test_a_model_without_anything_to_prune_is_refused():
    with pytest.raises(ValueError, match="must have a prunable parameter; got 2 that stay dense"):
        MaskedPruner(nn.LayerNorm(4), SparsityConfig(final_sparsity=0.5), total_steps=10)
    with pytest.raises(ValueError, match="total_steps must be at least 1; got 0"):
        MaskedPruner(make(), SparsityConfig(final_sparsity=0.5), total_steps=0)


@pytest.mark.skipif(not os.environ.get("FOX_LEARNING"), reason="needs a quiet machine: FOX_LEARNING=1")
def test_masks_cost_less_than_a_twentieth_of_a_step_at_ten_million_parameters():
    path = Path(__file__).resolve().parent.parent / "rl_extensions" / "examples" / "masking_cost.py"
    spec = importlib.util.spec_from_file_location("masking_cost", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.measure() < 0.05


def test_all_layers_together_are_pruned_also_with_channels_last():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plain = [p.detach().clone(memory_format=torch.contiguous_format) for p in model.parameters()]
    settings = {"total_steps": 10, "final_sparsity": 0.7, "allocation": "global", "exclude": (), "every_steps": 1}
    pruner = sparsify(model, optimizer, **settings)
    for _ in range(10):
        model(torch.randn(1, 4, 8, 8)).sum().backward()
        optimizer.step()
    kept = torch.cat([plain[i].abs().flatten() for i in (0, 2)])
    threshold = kept.sort(descending=True).values[round(0.3 * len(kept)) - 1]
    for i, weight in ((0, model[0].weight), (2, model[1].weight)):
        assert torch.equal(weight.detach() != 0, plain[i].abs() >= threshold)
    assert pruner.sparsity() == pytest.approx(0.7, abs=1e-3)
