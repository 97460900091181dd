"""The memory policy: one step at a time is the same as whole windows, across resets, saving and weight updates."""

import pytest
import torch
from transformers import AutoModel

from fox_rl.policy import FoxPolicyConfig, FoxPolicyModel


def policy(seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"observation_size": 3, "hidden_size": 32, "intermediate_size": 32, "action_size": 5}
    model = FoxPolicyModel(FoxPolicyConfig(**(sizes | config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)  # so that memory shows in the outputs
    return model


def observations_of(config, batch, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if config.observation_type == "discrete":
        return torch.randint(0, config.observation_size, (batch, steps), generator=generator)
    if config.observation_type == "pixels":
        shape = (batch, steps, config.observation_size, 84, 84)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(batch, steps, config.observation_size, generator=generator)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        pytest.param({}, 120, id="vector"),
        pytest.param({"observation_type": "discrete", "action_type": "continuous"}, 60, id="discrete-continuous"),
        pytest.param({"fgate_decay_time_max": 4.0}, 200, id="short-memory-with-eviction"),
        pytest.param({"observation_type": "pixels", "encoder": "nature"}, 6, id="pixels"),
    ],
)
@torch.no_grad()
def test_acting_step_by_step_is_the_window_in_parallel(config, steps):
    model = policy(**config)
    observations = observations_of(model.config, 3, steps)
    is_init = torch.rand(3, steps, generator=torch.Generator().manual_seed(2)) < 0.05
    is_init[:, 0] = True
    is_init[1, steps // 2] = True
    window = model(observations, is_init)
    cache = model.new_cache()
    for t in range(steps):
        action, log_prob, value = model.act(observations[:, t], is_init[:, t], cache)
        torch.testing.assert_close(value, window.value[:, t], rtol=0, atol=1e-4)
        expected = window.distribution().log_prob(
            action[:, None].expand(3, steps, *action.shape[1:]) if action.ndim > 1 else action[:, None]
        )[:, t]
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-4)
    if "fgate_decay_time_max" in config:
        assert int(cache.report().live_keys.max()) < steps // 2


@torch.no_grad()
def test_episodes_packed_in_a_window_are_the_episodes_alone():
    model = policy()
    observations = observations_of(model.config, 1, 30)
    is_init = torch.zeros(1, 30, dtype=torch.bool)
    is_init[0, [0, 7, 8, 20]] = True
    window = model(observations, is_init).logits
    for begin, end in ((0, 7), (7, 8), (8, 20), (20, 30)):
        alone = model(observations[:, begin:end]).logits
        torch.testing.assert_close(window[:, begin:end], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(window[:, 20:], model(observations).logits[:, 20:], atol=1e-3)  # memory does matter


def test_gradients_do_not_cross_the_start_of_an_episode():
    model = policy()
    observations = observations_of(model.config, 1, 12).requires_grad_()
    is_init = torch.zeros(1, 12, dtype=torch.bool)
    is_init[0, 5] = True
    model(observations, is_init).logits[0, 11].sum().backward()
    size = observations.grad[0].abs().sum(-1)
    assert size[:5].max() < 1e-12 * size[5:].min()


def test_a_cache_is_refused_after_a_weight_update():
    model = policy()
    cache, observation = model.new_cache(), observations_of(model.config, 2, 1)[:, 0]
    model.act(observation, torch.tensor([True, True]), cache)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(observation[:, None]).value.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="must be computed with the present weights"):
        model.act(observation, torch.tensor([False, False]), cache)


@torch.no_grad()
def test_it_is_saved_and_loaded_like_any_model(tmp_path):
    model = policy(action_type="continuous")
    model.log_std.fill_(-0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    observations = observations_of(model.config, 2, 9)
    assert isinstance(loaded, FoxPolicyModel) and loaded.config.action_type == "continuous"
    assert torch.equal(loaded(observations).logits, model(observations).logits)
    assert torch.equal(loaded.log_std, model.log_std)


def test_it_starts_with_a_nearly_uniform_policy_and_spread_gates():
    torch.manual_seed(0)
    model = FoxPolicyModel(FoxPolicyConfig(observation_size=3, action_size=4))
    with torch.no_grad():
        probabilities = model(torch.randn(8, 5, 3)).logits.softmax(-1)
    assert (probabilities - 0.25).abs().max() < 0.02
    gates = model.model.layers[0].self_attn.fgate_proj.bias.sigmoid()
    times = -1 / gates.log()
    torch.testing.assert_close(times, torch.tensor([2.0, 12.699, 80.635, 512.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FoxPolicyConfig(observation_type="text"), "`observation_type` must be one of .*; got 'text'"),
        (lambda: FoxPolicyConfig(action_size=0), "`action_size` must be at least 1; got 0"),
        (lambda: policy()(torch.zeros(2, 4, 5)), r"`observations` must be \(B, T, 3\); got \(2, 4, 5\)"),
        (lambda: policy()(torch.zeros(2, 4, 3), torch.ones(2, 3)), r"`is_init` must be \(2, 4\), one flag a step"),
        (lambda: policy(use_qk_norm=False).new_cache(), "`use_qk_norm` must be True for safe eviction"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
