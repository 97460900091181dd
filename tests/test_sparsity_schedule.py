"""Schedule and allocation against PyTorch's cubic scheduler, its pruning functions, and published figures."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fox_training.sparsity import SparsityConfig, SparsitySchedule, erk_sparsities, kept_weights
from fox_training.sparsity.rules import RULES, highest


def test_the_schedule_is_the_published_one():
    schedule = SparsitySchedule(final_sparsity=0.95, start_step=20, end_step=80)
    table = {0: 0, 20: 0, 30: 0.400, 40: 0.669, 50: 0.831, 60: 0.915, 70: 0.946, 80: 0.950, 100: 0.950}
    assert {t: schedule.sparsity(t) for t in table} == pytest.approx(table, abs=6e-4)


def test_the_schedule_is_that_of_torch_ao():
    ao = pytest.importorskip("torch.ao.pruning")
    sparsifier = ao.WeightNormSparsifier(sparsity_level=0.9)
    sparsifier.prepare(nn.Sequential(nn.Linear(4, 4)), [{"tensor_fqn": "0.weight"}])
    theirs = ao.CubicSL(sparsifier, init_sl=0.0, init_t=7, delta_t=1, total_t=53)
    ours = SparsitySchedule(final_sparsity=0.9, start_step=7, end_step=60)
    for step in range(70):
        assert ours.sparsity(step) == pytest.approx(sparsifier.groups[0]["sparsity_level"], abs=1e-9)
        sparsifier.step()
        theirs.step()


def test_the_target_is_reached_where_the_period_does_not_divide_the_window():
    schedule = SparsitySchedule(final_sparsity=0.5, start_step=10, end_step=35, every_steps=10)
    refreshes = [t for t in range(100) if schedule.is_refresh(t)]
    assert refreshes == [20, 30, 35]
    assert schedule.sparsity(refreshes[-1]) == 0.5


def test_start_and_end_in_one_step_prune_at_once():
    schedule = SparsitySchedule(final_sparsity=0.5, start_step=10, end_step=10)
    assert [schedule.sparsity(t) for t in (9, 10)] == [0.0, 0.5]
    assert [t for t in range(20) if schedule.is_refresh(t)] == [10]


def impala(width, num_actions=18):
    """Shapes of the IMPALA encoder on four 84 x 84 frames, the dense layer behind it and the head."""
    channels = [4, 16 * width, 32 * width, 32 * width]
    shapes = {}
    for stack, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
        shapes[f"stack{stack}.first"] = (after, before, 3, 3)
        for block in range(4):
            shapes[f"stack{stack}.block{block}"] = (after, after, 3, 3)
    return shapes | {"dense": (512, 121 * channels[-1]), "head": (num_actions, 512)}


@pytest.mark.parametrize(
    ("width", "first", "stack_0", "stacks_1_2", "dense"),
    [(1, 0.18, 0.70, 0.86, 0.96), (3, 0.23, 0.89, 0.945, 0.953)],
)
def test_erk_gives_the_figures_of_the_pruned_network_paper(width, first, stack_0, stacks_1_2, dense):
    """What `dist_type="erk"` of JaxPruner gives for the paper's networks at 95 % (arXiv:2402.12479)."""
    shapes = impala(width)
    got = erk_sparsities(shapes, 0.95)
    assert got["stack0.first"] == pytest.approx(first, abs=0.005)
    assert got["stack0.block0"] == pytest.approx(stack_0, abs=0.005)
    assert got["stack1.block0"] == got["stack2.first"] == pytest.approx(stacks_1_2, abs=0.005)
    assert got["dense"] == pytest.approx(dense, abs=0.005)
    assert got["head"] == 0.0
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    zeros = sum(n - kept_weights(n, got[name]) for name, n in sizes.items())
    assert zeros / sum(sizes.values()) == pytest.approx(0.95, abs=1e-4)


def test_erk_is_dense_where_everything_has_to_be():
    assert erk_sparsities({"a": (2, 2), "b": (3, 2)}, 0.0) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("amount", [0, 1, 37, 95, 199])
def test_the_mask_is_the_one_of_torch_prune(amount):
    layer = nn.Linear(20, 10)
    mask = highest(RULES["magnitude"](layer.weight), 200 - amount)
    prune.l1_unstructured(layer, "weight", amount=amount)
    assert torch.equal(mask, layer.weight_mask.bool())


def test_equal_scores_are_kept_in_memory_order_and_counted_exactly():
    mask = highest(torch.ones(3, 5), 7)
    assert mask.flatten().tolist() == [True] * 7 + [False] * 8
    mask = highest(torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0]), 3)
    assert mask.tolist() == [True, True, False, True, False]


def test_a_layer_keeps_at_least_one_weight():
    assert kept_weights(3, 0.999) == 1
    assert kept_weights(1000, 0.95) == 50


@pytest.mark.parametrize("name", sorted(set(RULES) - {"random"}))
def test_every_rule_ranks_a_dead_weight_last(name):
    weight = torch.randn(50)
    weight[17] = 0.0
    assert RULES[name](weight, torch.randn(50)).argmin() == 17


def test_random_scores_depend_on_name_and_seed_only():
    weight = torch.randn(40, 5)
    one = RULES["random"](weight, name="a", seed=3)
    assert torch.equal(one, RULES["random"](weight * 2, name="a", seed=3))
    assert not torch.equal(one, RULES["random"](weight, name="b", seed=3))
    assert not torch.equal(one, RULES["random"](weight, name="a", seed=4))
    assert one.min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(final_sparsity=95), r"final_sparsity must be in \[0, 1\); got 95. It is a fraction"),
        (dict(method="movement"), "method must be one of magnitude, .*rigl; got 'movement'"),
        (dict(allocation="layerwise"), "allocation must be one of uniform, erk, global; got 'layerwise'"),
        (dict(start_fraction=0.9, end_fraction=0.2), "0 <= start <= end <= 1; got 0.9 and 0.2"),
        (dict(every_steps=0), "every_steps must be at least 1; got 0"),
        (dict(method="rigl", allocation="global"), "global must go with a gradual method"),
        (dict(layer_sparsities={"a": 1.5}), r"layer_sparsities\['a'\] must be in \[0, 1\); got 1.5"),
        (dict(power=0), "power must be above 0; got 0"),
        (dict(rigl_drop_fraction=0), r"rigl_drop_fraction must be in \(0, 1\]; got 0"),
    ],
)
def test_says_what_is_wrong_with_a_setting(change, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**{"final_sparsity": 0.5, **change})


def test_fractions_become_steps():
    schedule = SparsityConfig(final_sparsity=0.9).schedule(2_500_000)
    assert (schedule.start_step, schedule.end_step, schedule.every_steps) == (500_000, 2_000_000, 1000)
    assert SparsityConfig(final_sparsity=0.9).schedule(500).every_steps == 3
    assert SparsityConfig(final_sparsity=0.9, method="rigl").schedule(100).start_step == 0
    config = SparsityConfig(final_sparsity=0.9, exclude=["head"], layer_sparsities={"a": 0.5})
    assert SparsityConfig(**config.to_dict()) == config
