"""torchrl: the FoX policy as a TensorDict module, in place of `LSTMModule` or `GRUModule`.

memory = FoxMemory(policy)
actor = ProbabilisticActor(memory, in_keys=["logits"], distribution_class=torch.distributions.Categorical,
                           return_log_prob=True)
loss = ClipPPOLoss(actor, memory.critic())

The environment needs torchrl's `InitTracker`. As with torchrl's own recurrent modules, `set_recurrent_mode(True)` says
that a TensorDict holds windows of time and not one step. Advantages: `GAE(..., shifted=True)`, which reads all states
as one row, after `data["next", "is_init"] = torch.zeros_like(data["is_init"])`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fox_rl.policy import FoxPolicyModel

try:
    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModuleBase, dispatch
    from torchrl.modules import recurrent_mode
except ImportError as error:
    raise ImportError(
        "fox_rl.adapters.torchrl needs torchrl and the tensordict of its release: "
        "pip install 'fox-transformers[rl-torchrl]'."
    ) from error


class FoxMemory(TensorDictModuleBase):
    """Observations and `is_init` to `logits` (or `loc` and `scale`) and `state_value`.

    One step: the module keeps the rollout cache itself; it is no part of the TensorDict, so it never gets into a
    replay buffer. After a weight update, and where the number of environments changes, memory begins anew: what was
    collected before the update is known to the policy only if it is in the windows that it is trained on.

    Args:
        policy: Any `FoxPolicyModel`.
        observation_key: Of observations, `(..., *observation)`.
        is_init_key: Of the flags that `InitTracker` writes, `(..., 1)` bool.
    """

    def __init__(self, policy: FoxPolicyModel, observation_key: str = "observation", is_init_key: str = "is_init"):
        super().__init__()
        self.policy = policy
        self.is_discrete = policy.config.action_type == "discrete"
        self.in_keys = [observation_key, is_init_key]
        self.out_keys = ["logits", "state_value"] if self.is_discrete else ["loc", "scale", "state_value"]
        self._cache: Any = None
        self._count = -1

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the outputs into the TensorDict, whose batch is `(..., T)` in recurrent mode and `(...)` else."""
        observation, is_init = (tensordict.get(key) for key in self.in_keys)
        if is_init is None:
            raise ValueError(
                f"tensordict must have {self.in_keys[1]!r}; got {sorted(map(str, tensordict.keys()))}. Add torchrl's "
                "InitTracker() to the environment."
            )
        batch, is_init = tensordict.batch_size, is_init.squeeze(-1)
        steps = batch[-1] if recurrent_mode() else 1
        kept = observation.shape[len(batch) :]
        observation, is_init = observation.reshape(-1, steps, *kept), is_init.reshape(-1, steps)
        outputs = self.policy(observation, is_init) if recurrent_mode() else self._step(observation, is_init[:, 0])
        values = {"state_value": outputs.value.reshape(*batch, 1)}
        logits = outputs.logits.reshape(*batch, -1)
        if self.is_discrete:
            values["logits"] = logits
        else:
            values |= {"loc": logits, "scale": outputs.log_std.exp().expand_as(logits)}
        for key in self.out_keys:
            tensordict.set(key, values[key])
        return tensordict

    @torch.no_grad()
    def _step(self, observation: Tensor, is_init: Tensor) -> Any:
        if self._cache is not None:
            try:
                self._cache.check_weights()
            except ValueError:
                self._cache = None
        if self._cache is None or self._count != len(is_init):
            self._cache, self._count = self.policy.new_cache(), len(is_init)
        elif bool(is_init.any()):
            self._cache.start_over(is_init)
        return self.policy(observation, past_key_values=self._cache, use_cache=True)

    def critic(self) -> FoxMemory:
        """The same policy as a module that writes `state_value` alone."""
        critic = FoxMemory(self.policy, *self.in_keys)
        critic.out_keys = ["state_value"]
        return critic
