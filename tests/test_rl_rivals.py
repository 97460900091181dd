"""Memories that FoX is compared with: the same in steps and in windows, and as little as they should see."""

import pytest
import torch

from fox_rl.rivals import RivalPolicy


def policy(memory, **changes):
    torch.manual_seed(0)
    model = RivalPolicy(memory, **{**dict(observation_size=3, hidden_size=16, action_size=4, window=5), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return model


@pytest.mark.parametrize(("memory", "window"), [("gru", 5), ("window", 5), ("window", 1)])
@torch.no_grad()
def test_acting_step_by_step_is_the_window_in_parallel_with_resets(memory, window):
    model, observations = policy(memory, window=window), torch.randn(3, 30, 3)
    is_init = torch.rand(3, 30, generator=torch.Generator().manual_seed(1)) < 0.1
    is_init[:, 0] = True
    whole, cache = model(observations, is_init), model.new_cache()
    for t in range(30):
        action, log_prob, value = model.act(observations[:, t], is_init[:, t], cache)
        torch.testing.assert_close(value, whole.value[:, t], rtol=0, atol=1e-5)
        expected = whole.distribution().log_prob(action[:, None].expand(3, 30))[:, t]
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory", ["gru", "window"])
def test_gradients_reach_what_may_be_seen_and_no_further(memory):
    model = policy(memory, num_layers=2)
    observations = torch.randn(1, 20, 3, requires_grad=True)
    is_init = torch.zeros(1, 20, dtype=torch.bool)
    is_init[0, 3] = True
    model(observations, is_init).value[0, -1].backward()
    seen = observations.grad[0].abs().sum(-1) > 0
    first = 3 if memory == "gru" else 19 - 2 * 4  # two layers of a window of 5
    assert seen.tolist() == [t >= first for t in range(20)]


def test_it_is_saved_and_loaded(tmp_path):
    model = policy("gru", action_type="continuous")
    model.save_pretrained(tmp_path)
    observations = torch.randn(2, 6, 3)
    assert torch.equal(RivalPolicy.from_pretrained(tmp_path)(observations).logits, model(observations).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(memory="lstm"), "memory must be one of gru, window; got 'lstm'"),
        (dict(memory="window", hidden_size=18), "hidden_size a multiple of num_heads 4; got 5 and 18"),
    ],
)
def test_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        policy(**changes)
