"""Which weights decay, which Muon takes, and schedules against hand-worked numbers."""

import math

import pytest
import torch
from torch import nn

from fox_training.optimizers import WeightAverage, build_optimizers, decays, set_learning_rate
from fox_training.recipe import OptimizerRecipe, RecipeError, ScheduleRecipe
from fox_training.schedule import learning_rate_factor
from modeling_fox import FoxConfig, FoxForCausalLM


@pytest.fixture
def model():
    config = FoxConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return FoxForCausalLM(config)


def test_norms_and_biases_do_not_decay_and_everything_else_does(model):
    undecayed = {name for name, p in model.named_parameters() if not decays(name, p)}
    kinds = {name.split("layers.")[-1].split(".", 1)[-1] for name in undecayed}
    assert kinds == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.output_norm.weight",
        "self_attn.fgate_proj.bias",
        "norm.weight",
    }


def test_the_groups_hold_every_weight_once_with_the_decay_of_its_kind(model):
    (optimizer,) = build_optimizers(model, OptimizerRecipe(weight_decay=0.3))
    decay_of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert decay_of[id(model.model.embed_tokens.weight)] == 0.3
    assert decay_of[id(model.model.layers[0].self_attn.fgate_proj.bias)] == 0.0
    assert decay_of[id(model.model.layers[0].self_attn.q_norm.weight)] == 0.0


def test_embeddings_can_be_spared(model):
    (optimizer,) = build_optimizers(model, OptimizerRecipe(decay_embeddings=False))
    decay_of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay_of[id(model.model.embed_tokens.weight)] == 0.0
    assert decay_of[id(model.lm_head.weight)] == 0.1


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon")
def test_muon_takes_the_matrices_of_the_blocks_but_no_projection_to_heads(model):
    muon, adamw = build_optimizers(model, OptimizerRecipe(name="muon"))
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)].split(".")[-2] for g in muon.param_groups for p in g["params"]}
    assert taken == {"q_proj", "k_proj", "v_proj", "o_proj", "ogate_proj", "gate_proj", "up_proj", "down_proj"}
    count = sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups)
    assert count == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["muon", "kron"])
def test_a_model_without_hidden_matrices_is_refused(name):
    layer = nn.Linear(3, 2)
    layer.config = None
    with pytest.raises(RecipeError, match="of which Linear has none. Use adamw"):
        build_optimizers(layer, OptimizerRecipe(name=name))


def test_a_step_of_adamw_is_the_formula():
    layer = nn.Linear(3, 2)
    layer.config = None
    before = layer.weight.detach().clone()
    (optimizer,) = build_optimizers(layer, OptimizerRecipe(learning_rate=0.1, weight_decay=0.5, epsilon=1e-8))
    set_learning_rate([optimizer], 0, ScheduleRecipe(steps=10, warmup_steps=2))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # Half of the peak rate; the first AdamW step moves by lr * sign(gradient), and the gradient is 1.
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.05 * 0.5) - 0.05)


def factor(step, **options):
    return learning_rate_factor(step, steps=100, warmup_steps=10, **options)


def test_warm_up_starts_above_zero_and_ends_at_the_peak():
    assert [factor(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate_factor(0, steps=10) == 1.0


def test_schedules_pass_through_known_points():
    assert factor(10) == 1.0
    assert factor(55) == pytest.approx(0.5)
    assert factor(55, final_fraction=0.2) == pytest.approx(0.6)
    assert factor(100) == pytest.approx(0.0, abs=1e-12)
    assert factor(32.5) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert factor(55, kind="linear") == pytest.approx(0.5)
    assert factor(55, kind="constant") == 1.0
    assert [factor(s, kind="wsd", decay_fraction=0.2) for s in (79, 90, 100)] == pytest.approx([1, 0.5, 0])
    assert factor(10**6, final_fraction=0.1) == pytest.approx(0.1)


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="cosine, linear, wsd, constant; got 'step'"):
        factor(50, kind="step")


def test_the_weight_average_is_the_recursion_and_swaps_in_and_out():
    layer = nn.Linear(2, 1, bias=False)
    average = WeightAverage(layer, decay=0.15)
    mean = layer.weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            layer.weight.add_(1.0)
        decay = min(0.15, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * layer.weight.detach()
        average.update(step)
    own = layer.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(layer.weight.detach(), mean)
    assert torch.equal(layer.weight, own)
    other = WeightAverage(layer, decay=0.15)
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(other.state_dict()["weight"], mean)
