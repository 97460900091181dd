"""The memory policy inside torchrl: its rollouts, its losses, its recurrent mode. Runs where torchrl is installed."""

import pytest
import torch

pytest.importorskip("gymnasium")
pytest.importorskip("torchrl")

from tensordict import TensorDict
from torchrl.envs import GymEnv, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import ProbabilisticActor, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from fox_rl.adapters.torchrl import FoxMemory
from fox_rl.policy import FoxPolicyConfig, FoxPolicyModel

pytestmark = pytest.mark.filterwarnings("ignore")


def memory(**changes):
    torch.manual_seed(0)
    sizes = dict(observation_size=4, action_size=2, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    model = FoxPolicyModel(FoxPolicyConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return FoxMemory(model)


def test_a_rollout_is_the_window_in_parallel_over_resets_and_ppo_learns_from_it():
    module = memory()
    actor = ProbabilisticActor(
        module, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    env = TransformedEnv(
        SerialEnv(2, lambda: GymEnv("CartPole-v1", categorical_action_encoding=True)), InitTracker()
    )  # fmt: skip
    env.set_seed(0)
    data = env.rollout(60, actor, break_when_any_done=False)
    assert bool(data["is_init"][:, 1:].any())
    names = [key for key in dict(data) if "log_prob" in key]
    with torch.no_grad(), set_recurrent_mode(True):
        window = actor.get_dist(data.clone())
        values = module.critic()(data.select("observation", "is_init"))["state_value"]
    torch.testing.assert_close(window.log_prob(data["action"]), data[names[0]], rtol=0, atol=1e-4)
    torch.testing.assert_close(values, data["state_value"], rtol=0, atol=1e-4)

    loss_module = ClipPPOLoss(actor, module.critic())
    with set_recurrent_mode(True):
        # torchrl reads the states of all steps and the last one as one row: no step of the tracker is missing in it.
        data["next", "is_init"] = torch.zeros_like(data["is_init"])
        GAE(gamma=0.99, lmbda=0.95, value_network=module.critic(), shifted=True)(data)
        losses = loss_module(data)
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    assert module.policy.policy_head.weight.grad.abs().sum() > 0
    assert module.policy.encoder.dense.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_memory_begins_anew_after_an_update_and_with_other_environments():
    module = memory()

    def step(observation, first):
        flags = torch.full((len(observation), 1), first)
        data = TensorDict({"observation": observation, "is_init": flags}, batch_size=len(observation))
        return module(data)["state_value"]

    observations = torch.randn(3, 2, 4)
    fresh = step(observations[0], True)
    later = step(observations[1], False)
    assert not torch.allclose(later, step(observations[1], True))
    optimizer = torch.optim.SGD(module.policy.parameters(), lr=0.0)
    for parameter in module.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the weights stay the same, but nobody can know
    module.policy.value_head.bias.add_(0.0)
    torch.testing.assert_close(step(observations[0], False), fresh)
    torch.testing.assert_close(step(observations[0][:1], False), fresh[:1])


def test_continuous_actions_have_loc_and_scale_and_missing_flags_are_named():
    module = memory(action_type="continuous")
    data = TensorDict({"observation": torch.randn(4), "is_init": torch.tensor([True])}, batch_size=[])
    out = module(data)
    assert out["loc"].shape == out["scale"].shape == (2,) and out["state_value"].shape == (1,)
    with pytest.raises(ValueError, match="tensordict must have 'is_init'; got .*InitTracker"):
        module(TensorDict({"observation": torch.randn(4)}, batch_size=[]))
