"""Many runs of DQN at once, dense and pruned: the agent of `fox_rl.agents.dqn`, batched.

The networks of all runs are stacked and the agent's own loss is mapped over them, so that an update of all of them is
one of each kernel, on a GPU one CUDA graph. Each run has its own environment, replay, exploration and `MaskedPruner`.

Letters: S runs, B batch, O observation size, C capacity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fox_rl.agents.common import build_q_network
from fox_rl.agents.dqn import Options, epsilon, value_error
from fox_rl.experiments.many_td3 import Graphed, at_host, wait_for
from fox_rl.experiments.workers import EnvironmentPool
from fox_rl.q_network import QNetwork
from fox_rl.replay import MultiStep
from fox_training.optimizers import build_optimizer
from fox_training.sparsity import MaskedPruner, SparsityConfig

METHODS = ("magnitude", "random", "static_random")  # those that read no gradients


class Functional:
    """A network with weights from elsewhere, as the loss of the agent calls it."""

    def __init__(self, network: QNetwork, weights: dict[str, Tensor]):
        self.network, self.weights = network, weights

    def __call__(self, observation: Tensor) -> Tensor:
        return functional_call(self.network, self.weights, (observation,))

    values = __call__


class ManyDQN:
    """Networks, replay and update of S runs on one device.

    Args:
        networks: One for each run.
        capacity: C.
        options: Of DQN; the same for all runs but for seed and pruning.
        device: Of everything.
        graphs: Record CUDA graphs on a GPU.
    """

    def __init__(
        self, networks: list[QNetwork], capacity: int, options: Options, device: torch.device, graphs: bool = True
    ):  # fmt: skip
        self.options, self.device, self.capacity, self.num_runs = options, device, capacity, len(networks)
        self.base = copy.deepcopy(networks[0]).to(device)
        self.observation_size = self.base.trunk.project[0].in_features
        stacked = stack_module_state(networks)[0]
        self.weights = {name: nn.Parameter(x.detach().to(device)) for name, x in stacked.items()}
        self.target = {name: x.detach().clone() for name, x in self.weights.items()}
        self.optimizer = build_optimizer(options.optimizer, list(self.weights.values()), options.learning_rate)
        on_gpu = device.type == "cuda"
        for group in self.optimizer.param_groups:
            group["capturable"] = on_gpu
        self.dropped = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in self.weights.items() if x.ndim > 2}
        # observation, following, action, reward, terminated, factor; the last row takes what is to be forgotten
        self.rows = torch.zeros(self.num_runs * capacity + 1, 2 * self.observation_size + 4, device=device)
        self.sizes, self.places = np.zeros((2, self.num_runs), dtype=np.int64)
        self.size = torch.zeros(self.num_runs, 1, dtype=torch.long, device=device)
        self.first_rows = torch.arange(self.num_runs, device=device)[:, None] * capacity
        # What goes to the device and back.
        most = self.num_runs * options.multi_steps
        self.sent_rows = at_host(device, most, self.rows.shape[1])
        self.sent_places = at_host(device, most, dtype=torch.long)
        self.sent_sizes = at_host(device, self.num_runs, 1, dtype=torch.long)
        self.sent_observation = at_host(device, self.num_runs, self.observation_size)
        self.received_choice = at_host(device, self.num_runs, dtype=torch.long)
        self.generator: torch.Generator | None = None  # PyTorch's own
        self.act, self.receive, self.update = (
            Graphed(x, on_gpu and graphs, self._new_generator) for x in (self._act, self._receive, self._update)
        )

    @property
    def num_graphs(self) -> int:
        """Of the three functions, how many are graphs by now."""
        return sum(x.graph is not None for x in (self.act, self.receive, self.update))

    def _new_generator(self) -> None:
        """A recording that failed leaves PyTorch's generator unusable."""
        self.generator = torch.Generator(self.device).manual_seed(0)

    def network(self, run: int) -> QNetwork:
        """The network of a run, in the same memory."""
        network = copy.deepcopy(self.base)
        for name, parameter in network.named_parameters():
            parameter.data = self.weights[name].data[run]
        return network

    def values(self, observation: Tensor) -> Tensor:
        """`(S, B, O)` to `(S, B, actions)`."""
        return vmap(lambda weights, x: Functional(self.base, weights)(x))(self.weights, observation)

    def choose(self, observation: np.ndarray) -> np.ndarray:
        """The best actions, `(S, O)` to `(S,)`."""
        self.sent_observation.numpy()[:] = observation
        self.act()
        wait_for(self.device)
        return self.received_choice.numpy().copy()

    def add(self, runs: np.ndarray, rows: dict[str, np.ndarray] | None) -> None:
        """Store transitions: the runs that they are of, ascending, and what a `MultiStep` over all runs returned."""
        if rows is None:
            return
        wait_for(self.device)  # for the copies of the call before
        columns = [rows["observation"], rows["following"]]
        columns += [rows[x][:, None] for x in ("action", "reward", "terminated", "factor")]
        np.concatenate(columns, axis=1, out=self.sent_rows.numpy()[: len(runs)], casting="unsafe")
        counts = np.bincount(runs, minlength=self.num_runs)
        nth = np.arange(len(runs)) - (np.cumsum(counts) - counts)[runs]  # of the rows of its run
        self.sent_places.fill_(len(self.rows) - 1)
        self.sent_places.numpy()[: len(runs)] = runs * self.capacity + (self.places[runs] + nth) % self.capacity
        self.places = (self.places + counts) % self.capacity
        self.sizes = np.minimum(self.sizes + counts, self.capacity)
        self.sent_sizes.numpy()[:, 0] = self.sizes
        self.receive()

    def copy_to_target(self) -> None:
        """What the agent does every `target_every` steps."""
        torch._foreach_copy_(list(self.target.values()), [x.data for x in self.weights.values()])

    def drop(self, run: int, masks: dict[str, Tensor]) -> None:
        """Hold the masks of a pruner, True where a weight stays, after every update from now on."""
        for name, keep in masks.items():
            self.dropped[name][run] = ~keep

    @torch.no_grad()
    def _act(self) -> None:
        observation = self.sent_observation.to(self.device, non_blocking=True)[:, None]
        self.received_choice.copy_(self.values(observation)[:, 0].argmax(dim=-1), non_blocking=True)

    @torch.no_grad()
    def _receive(self) -> None:
        places, rows = (x.to(self.device, non_blocking=True) for x in (self.sent_places, self.sent_rows))
        self.rows.index_copy_(0, places, rows)
        self.size.copy_(self.sent_sizes, non_blocking=True)

    def _update(self) -> None:
        shape = (self.num_runs, self.options.batch_size)
        chosen = (torch.rand(shape, device=self.device, generator=self.generator) * self.size).long()
        self.learn(self.rows[self.first_rows + torch.minimum(chosen, self.size - 1)])

    def learn(self, rows: Tensor) -> None:
        """The update of DQN on `(S, B, R)` rows, and the masks."""
        size = self.observation_size
        observation, following, action, reward, terminated, factor = rows.split([size, size, 1, 1, 1, 1], dim=-1)
        batch = {"observation": observation, "following": following, "action": action.squeeze(-1).long()}
        batch |= {"reward": reward.squeeze(-1), "terminated": terminated.squeeze(-1) > 0.5}
        batch["factor"] = factor.squeeze(-1)
        weights = list(self.weights.values())
        gradients = torch.autograd.grad(vmap(self._loss)(self.weights, self.target, batch).sum(), weights)
        norm = torch.cat([g.flatten(1) for g in gradients], dim=1).norm(dim=1)
        scale = (self.options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_, run by run
        for weight, gradient in zip(weights, gradients, strict=True):
            # The fused optimizer reads memory in order, whatever the strides; vmap returns transposed gradients.
            weight.grad = (gradient * scale.view(-1, *[1] * (gradient.ndim - 1))).contiguous()
        self.optimizer.step()
        for name, dropped in self.dropped.items():
            self.weights[name].data.masked_fill_(dropped, 0.0)

    def _loss(self, weights: dict[str, Tensor], target: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        networks = {"network": Functional(self.base, weights), "target": Functional(self.base, target)}
        return value_error(SimpleNamespace(options=self.options, **networks), batch)[0].mean()


def evaluate(many: ManyDQN, pool: EnvironmentPool, episodes: int) -> np.ndarray:
    """Mean return of each run over whole episodes without exploration, `(S,)`, in the pool's other environments."""
    runs, count = many.num_runs, many.num_runs * episodes

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        tensor = torch.as_tensor(observation, dtype=torch.float32, device=many.device)
        values = many.values(tensor.view(episodes, runs, -1).transpose(0, 1))
        return values.argmax(dim=-1).T.reshape(count, 1).cpu().numpy()

    totals = pool.play(runs + np.arange(count), 1000 + np.arange(count) // runs, act)
    return totals.reshape(episodes, runs).mean(axis=0)


def check(runs: list[tuple[str, Options]]) -> None:
    """Raise a ValueError if the runs differ in more than seed and pruning, or need what is not batched."""
    own = ("seed", "final_sparsity", "sparsity_method")
    settings = [{k: v for k, v in asdict(options).items() if k not in own} for _, options in runs]
    different = sorted(k for k, v in settings[0].items() if any(other[k] != v for other in settings))
    if different:
        raise ValueError(f"runs must differ in {', '.join(own)} alone; got different {', '.join(different)}.")
    options = runs[0][1]
    allowed = {"optimizer": "adamw", "num_envs": 1, "num_atoms": 1, "noisy": False, "prioritized": False}
    for name, value in allowed.items():
        if getattr(options, name) != value:
            raise ValueError(f"{name} must be {value} to train many runs at once; got {getattr(options, name)}.")
    for _, own in runs:
        if own.final_sparsity > 0 and own.sparsity_method not in METHODS:
            raise ValueError(f"sparsity_method must be one of {', '.join(METHODS)}; got {own.sparsity_method}.")


def train(
    runs: list[tuple[str, Options]], report: Callable[..., None], *, device: str = "auto", workers: int = 1,
    eval_every: int = 5_000, eval_episodes: int = 20, graphs: bool = True,
    watch: Callable[[int, ManyDQN], None] | None = None,
) -> ManyDQN:  # fmt: skip
    """Train all runs side by side.

    Args:
        runs: Arm and options of each; they may differ in seed, final_sparsity and sparsity_method.
        report: `(arm, seed, step, metric, value)` of everything measured.
        device, workers, eval_every, eval_episodes, graphs, watch: As in `many_td3.train`.
    """
    check(runs)
    options, count = runs[0][1], len(runs)
    seeds = np.array([own.seed for _, own in runs])
    with EnvironmentPool(options.env_id, count * (1 + eval_episodes), workers) as pool:
        spaces = SimpleNamespace(
            single_observation_space=pool.observation_space, single_action_space=pool.action_space
        )
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append(build_q_network(spaces, options, dueling=options.dueling))
        on = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
        many = ManyDQN(networks, min(options.buffer_size, options.total_steps), options, on, graphs)
        pruners = {}
        for i, (_, own) in enumerate(runs):
            if own.final_sparsity > 0:
                config = SparsityConfig(final_sparsity=own.final_sparsity, method=own.sparsity_method, seed=own.seed)
                updates = (options.total_steps - options.start_steps) // options.train_every
                pruners[i] = MaskedPruner(many.network(i), config, max(1, updates))
                many.drop(i, pruners[i].masks)
        many.copy_to_target()
        generators = [np.random.default_rng(seed) for seed in seeds]
        multi_step = MultiStep(count, options.multi_steps, options.discount)
        observation = pool.reset(np.arange(count), seeds + 1).astype(np.float32)
        for step in range(1, options.total_steps + 1):
            action = explore(many, observation, generators, epsilon(options, step - 1))
            # The update of the step before: what waits for it is the next choice, and the environments do not.
            if step > 1:
                learn_after(step - 1, many, pruners)
            following, reward, terminated, truncated = pool.step(np.arange(count), action[:, None])
            following, ended = following.astype(np.float32), terminated | truncated
            rows = multi_step.add(observation, action, reward, following, terminated, ended)
            many.add(multi_step.envs, rows)
            observation = following
            if ended.any():
                observation[ended] = pool.reset(np.flatnonzero(ended))
            if step == options.total_steps:
                learn_after(step, many, pruners)
            if watch is not None:
                watch(step, many)
            if step % eval_every == 0 or step == options.total_steps:
                for i, ((arm, own), score) in enumerate(zip(runs, evaluate(many, pool, eval_episodes), strict=True)):
                    report(arm, own.seed, step, "eval_return", float(score))
                    if i in pruners:
                        report(arm, own.seed, step, "sparsity_network", pruners[i].sparsity())
    return many


def learn_after(step: int, many: ManyDQN, pruners: dict[int, MaskedPruner]) -> None:
    """The update, the masks and the copy to the target that belong to this step, if any do."""
    options = many.options
    if step >= options.start_steps and step % options.train_every == 0:
        many.update()
        refresh(many, pruners, step // options.train_every - (options.start_steps - 1) // options.train_every)
    if step % options.target_every == 0:
        many.copy_to_target()


def refresh(many: ManyDQN, pruners: dict[int, MaskedPruner], updates: int) -> None:
    """New masks where this update is one at which the schedule asks for them."""
    for run, pruner in pruners.items():
        if pruner.schedule.is_refresh(updates):
            pruner.step_count = updates - 1
            pruner.step()
            many.drop(run, pruner.masks)


def explore(
    many: ManyDQN, observation: np.ndarray, generators: list[np.random.Generator], share: float
) -> np.ndarray:  # fmt: skip
    """Actions, `(S,)`: the best ones, or in this share of the runs random ones."""
    count = many.base.num_actions
    drawn = np.array([(g.random(), g.integers(count)) for g in generators])
    explores, random = drawn[:, 0] < share, drawn[:, 1].astype(np.int64)
    return random if explores.all() else np.where(explores, random, many.choose(observation))
