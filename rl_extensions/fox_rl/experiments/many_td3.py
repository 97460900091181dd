"""Many runs of TD3 at once on one GPU, with and without early stops: the agent of `fox_rl.agents.td3`, batched.

The networks of all runs are stacked, so that a step of all of them is one of each kernel, and on a GPU the whole
update is one CUDA graph. The runs share nothing: each has its own environment, replay, noise and stopper.

Letters: S runs, B batch, O observation size, A action size, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from fox_rl.agents.common import EpisodeMeter
from fox_rl.agents.td3 import Options
from fox_rl.continuous import ActorCritic
from fox_rl.learn_to_stop import LearnToStop, RandomResetControl, StopNoise, hazard_for

ARMS = ("none", "least", "random")


class StackedMLP(nn.Module):
    """N networks of linear layers with relu between them, as one.

    Args:
        networks: `nn.Sequential` of Linear and ReLU, all of one shape; their weights are copied.
    """

    def __init__(self, networks: list[nn.Sequential]):
        super().__init__()
        columns = zip(*([x for x in net if isinstance(x, nn.Linear)] for net in networks), strict=True)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layers in columns:
            self.weights.append(nn.Parameter(torch.stack([x.weight.detach().T for x in layers])))
            self.biases.append(nn.Parameter(torch.stack([x.bias.detach()[None] for x in layers])))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, B, in)` to `(N, B, out)`."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = x.relu() if i < last else x
        return x


class Graphed:
    """A function of tensors that stay in place: on a GPU recorded as a CUDA graph at its fourth call.

    Args:
        function: Without arguments and results; reads and writes tensors whose addresses do not change.
        is_graphed: False calls it every time.
    """

    def __init__(self, function: Callable[[], None], is_graphed: bool):
        self.function, self.calls, self.is_graphed = function, 0, is_graphed
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.is_graphed:
            self.function()
        elif self.graph is not None:
            self.graph.replay()
        elif self.calls < 3:
            # PyTorch asks for some runs on another stream before a recording.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function()
            self.graph.replay()  # recording does not execute
        self.calls += 1


class ManyTD3:
    """Networks, replay and update of S runs on one device.

    Args:
        networks: One `ActorCritic` for each run.
        capacity: C.
        options: Of TD3.
        device: Of everything.
        graphs: Record CUDA graphs.
    """

    def __init__(
        self, networks: list[ActorCritic], capacity: int, options: Options, device: torch.device, graphs: bool = True
    ):  # fmt: skip
        self.options, self.device, self.capacity = options, device, capacity
        self.num_runs, self.action_size = len(networks), len(networks[0].low)
        self.observation_size = networks[0].actor[0].in_features
        self.actor = StackedMLP([net.actor for net in networks]).to(device)
        # First all first critics, then all second ones.
        self.critics = StackedMLP([net.critics.nets[i] for i in range(2) for net in networks]).to(device)
        self.target_actor = StackedMLP([net.actor for net in networks]).to(device).requires_grad_(False)
        self.target_critics = StackedMLP(
            [net.critics.nets[i] for i in range(2) for net in networks]
        ).to(device).requires_grad_(False)  # fmt: skip
        on_gpu = device.type == "cuda"
        self.actor_optimizer, self.critic_optimizer = (
            torch.optim.Adam(module.parameters(), lr=options.learning_rate, fused=True, capturable=on_gpu)
            for module in (self.actor, self.critics)
        )
        row = 2 * self.observation_size + self.action_size + 2  # observation, action, following, reward, terminated
        self.rows = torch.zeros(self.num_runs, capacity, row, device=device)
        self.incoming = torch.zeros(self.num_runs, row, device=device)
        self.pinned = torch.zeros(self.num_runs, row, pin_memory=on_gpu)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.size = torch.zeros(1, device=device)
        self.observation = torch.zeros(self.num_runs, 1, self.observation_size, device=device)
        self.action = torch.zeros(self.num_runs, 1, self.action_size, device=device)
        self.value_and_potential = torch.zeros(2, self.num_runs, device=device)
        functions = (
            self._receive, self._act, lambda: self._update(with_actor=False), lambda: self._update(with_actor=True)
        )  # fmt: skip
        self.receive, self.act, self.update_critics, self.update_all = (
            Graphed(function, on_gpu and graphs) for function in functions
        )

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows `(..., R)` to observation, action, following `(..., O or A)`, reward and terminated `(...)`."""
        sizes = [self.observation_size, self.action_size, self.observation_size, 1, 1]
        *vectors, reward, terminated = rows.split(sizes, dim=-1)
        return (*vectors, reward.squeeze(-1), terminated.squeeze(-1))

    def twice(self, x: Tensor) -> Tensor:
        """`(S, B, .)` for both critics of every run, `(2 S, B, .)`."""
        return x.repeat(2, 1, 1)

    def lower_value(self, critics: StackedMLP, observation: Tensor, action: Tensor) -> Tensor:
        """The smaller of both values, `(S, B)`."""
        return self.both_values(critics, observation, action).amin(dim=0)

    def both_values(self, critics: StackedMLP, observation: Tensor, action: Tensor) -> Tensor:
        """`(2, S, B)`."""
        out = critics(self.twice(torch.cat([observation, action], dim=-1)))
        return out.squeeze(-1).unflatten(0, (2, self.num_runs))

    @torch.no_grad()
    def _act(self) -> None:
        self.action.copy_(self.actor(self.observation).tanh())

    @torch.no_grad()
    def _receive(self) -> None:
        self.rows.index_copy_(1, self.place, self.incoming[:, None])
        self.place.add_(1).remainder_(self.capacity)
        self.size.add_(1).clamp_(max=self.capacity)
        observation, action, following, reward, terminated = self.split(self.incoming[:, None])
        value = self.lower_value(self.critics, observation, action)
        target = self.lower_value(self.target_critics, following, self.target_actor(following).tanh())
        target = reward + self.options.discount * (1 - terminated) * target
        self.value_and_potential.copy_(torch.stack([value, (target - value).square()]).squeeze(-1))

    def _update(self, with_actor: bool) -> None:
        batch = self.options.batch_size
        chosen = (torch.rand(self.num_runs, batch, device=self.device) * self.size).long().clamp(max=self.capacity - 1)
        runs = torch.arange(self.num_runs, device=self.device)[:, None]
        noise = torch.randn(self.num_runs, batch, self.action_size, device=self.device)
        self.learn(self.rows[runs, chosen], noise, with_actor)

    def learn(self, rows: Tensor, noise: Tensor, with_actor: bool) -> None:
        """The update of TD3 on `(S, B, R)` rows, with standard normal noise `(S, B, A)` for the target."""
        options = self.options
        observation, action, following, reward, terminated = self.split(rows)
        with torch.no_grad():
            noise = (noise * options.target_noise).clamp(-0.5, 0.5)
            next_action = (self.target_actor(following).tanh() + noise).clamp(-1, 1)
            target = self.lower_value(self.target_critics, following, next_action)
            target = reward + options.discount * (1 - terminated) * target
        loss = (self.both_values(self.critics, observation, action) - target).square().mean(dim=-1).sum()
        parameters = list(self.critics.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.critic_optimizer.step()
        if not with_actor:
            return
        value = self.both_values(self.critics, observation, self.actor(observation).tanh())[0]
        parameters = list(self.actor.parameters())
        gradients = torch.autograd.grad(-value.mean(dim=-1).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.actor_optimizer.step()
        with torch.no_grad():
            for slow, fast in ((self.target_actor, self.actor), (self.target_critics, self.critics)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), options.target_rate)


class Runs:
    """Environments, stoppers and meters of all runs, on the CPU.

    Args:
        env_id: Gymnasium id.
        runs: (arm, seed) of each run; the control of a seed has the mean episode length of LEAST with that seed, as
            it has been over its last 20 episodes.
        options: Of TD3.
        threads: That step the environments; MuJoCo lets others run meanwhile.
    """

    def __init__(self, env_id: str, runs: list[tuple[str, int]], options: Options, threads: int):
        self.runs, self.options = runs, options
        self.envs = [gym.make(env_id, disable_env_checker=True) for _ in runs]
        self.horizon = self.envs[0].spec.max_episode_steps
        start = round(options.stop_start * options.total_steps)
        self.stoppers = []
        for arm, seed in runs:
            if arm == "least":
                stopper = LearnToStop(
                    1, self.horizon, start_step=start, omega_scale=options.omega_scale, seed=seed, entropy_every=10
                )
            else:
                stopper = RandomResetControl(1, 0.0, start_step=start, seed=seed)
            self.stoppers.append(stopper)
        self.meters = [EpisodeMeter(1) for _ in runs]
        self.noise = StopNoise(options.exploration, options.noise_max, self.horizon // 4)
        self.generators = [np.random.default_rng(seed) for _, seed in runs]
        self.step_index = np.zeros((len(runs), 1), dtype=np.int64)
        self.observation = np.stack(
            [env.reset(seed=seed)[0] for env, (_, seed) in zip(self.envs, runs, strict=True)]
        ).astype(np.float32)
        self.low, self.high = self.envs[0].action_space.low, self.envs[0].action_space.high
        self.chunks = np.array_split(np.arange(len(runs)), max(1, threads))
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def explore(self, action: np.ndarray | None) -> np.ndarray:
        """Actions in [-1, 1], `(S, A)`: the actors' with noise, or random ones."""
        if action is None:
            return np.stack([g.uniform(-1, 1, len(self.low)) for g in self.generators]).astype(np.float32)
        noisy = []
        for (arm, _), stopper, generator, mean in zip(self.runs, self.stoppers, self.generators, action, strict=True):
            sigma = self.noise.sigma(stopper.stopped_at) if arm == "least" else self.options.exploration
            noisy.append(mean + sigma * generator.standard_normal(len(self.low)))
        return np.clip(np.stack(noisy), -1, 1).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step of every run: following `(S, O)`, reward, terminated and truncated `(S,)`."""
        scaled = self.low + 0.5 * (action + 1.0) * (self.high - self.low)
        results: list[Any] = [None] * len(self.runs)

        def some(chunk: np.ndarray) -> None:
            for i in chunk:
                results[i] = self.envs[i].step(scaled[i])[:4]

        if self.pool is None:
            some(self.chunks[0])
        else:
            list(self.pool.map(some, self.chunks))
        following, reward, terminated, truncated = zip(*results, strict=True)
        return np.stack(following).astype(np.float32), np.array(reward), np.array(terminated), np.array(truncated)

    def finish(self, following, reward, terminated, truncated, value, potential) -> None:
        """Let the stoppers decide, and start the episodes anew that are over."""
        self.observation = following
        for i, ((arm, seed), stopper) in enumerate(zip(self.runs, self.stoppers, strict=True)):
            stop = stopper.update(self.step_index[i], value[i : i + 1], potential[i : i + 1])
            stop = stop & (not terminated[i]) & (not truncated[i])
            ended = np.array([terminated[i] or truncated[i] or stop[0]])
            self.meters[i].update(reward[i : i + 1], ended)
            self.step_index[i] += 1
            if ended[0]:
                stopper.episode_end(ended, stop)
                self.step_index[i] = 0
                self.observation[i] = self.envs[i].reset()[0]
                if arm == "least" and ("random", seed) in self.runs:
                    length = max(1.0, float(np.mean(self.meters[i].finished_lengths[-20:])))
                    self.stoppers[self.runs.index(("random", seed))].hazard = hazard_for(length, self.horizon)


@torch.no_grad()
def evaluate(many: ManyTD3, envs: list[gym.Env], threads: int) -> np.ndarray:
    """Mean return of each run over `len(envs) / S` episodes without noise, `(S,)`."""
    runs, count = many.num_runs, len(envs)
    episodes, horizon = count // runs, envs[0].spec.max_episode_steps
    observations = np.stack([env.reset(seed=1000 + i % episodes)[0] for i, env in enumerate(envs)])
    low, high = envs[0].action_space.low, envs[0].action_space.high
    totals, alive = np.zeros(count), np.ones(count, dtype=bool)
    pool = ThreadPoolExecutor(max(1, threads))
    for _ in range(horizon):
        tensor = torch.as_tensor(observations, dtype=torch.float32, device=many.device).view(runs, episodes, -1)
        action = many.actor(tensor).tanh().cpu().numpy().reshape(count, -1)
        scaled = low + 0.5 * (action + 1.0) * (high - low)

        def some(chunk: np.ndarray, scaled: np.ndarray = scaled) -> None:
            for i in chunk:
                observations[i], reward, terminated, truncated, _ = envs[i].step(scaled[i])
                totals[i] += float(reward)
                alive[i] = not (terminated or truncated)

        list(pool.map(some, np.array_split(np.flatnonzero(alive), max(1, threads))))
        if not alive.any():
            break
    pool.shutdown()
    return totals.reshape(runs, episodes).mean(axis=1)


def train(
    env_id: str, runs: list[tuple[str, int]], options: Options, report: Callable[..., None], *, device: str = "auto",
    threads: int = 1, eval_every: int = 20_000, eval_episodes: int = 5, graphs: bool = True,
) -> ManyTD3:  # fmt: skip
    """Train all runs side by side.

    Args:
        env_id: Gymnasium id.
        runs: (arm, seed) of each, arms of `ARMS`.
        options: Of TD3; `num_envs`, `seed` and what belongs to files is not read.
        report: `(arm, seed, step, metric, value)` of everything measured.
        device: auto: a GPU if there is one.
        threads: That step the environments.
        eval_every: Steps between evaluations.
        eval_episodes: Of one.
        graphs: Record CUDA graphs on a GPU.
    """
    if any(arm not in ARMS for arm, _ in runs):
        raise ValueError(f"runs must have an arm of {', '.join(ARMS)}; got {sorted({arm for arm, _ in runs})}.")
    on = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    world = Runs(env_id, runs, options, threads)
    networks = []
    for _, seed in runs:
        torch.manual_seed(seed)
        networks.append(
            ActorCritic.for_spaces(
                world.envs[0].observation_space, world.envs[0].action_space, width=options.width
            )
        )  # fmt: skip
    many = ManyTD3(networks, options.total_steps, options, on, graphs)
    judges = [gym.make(env_id, disable_env_checker=True) for _ in range(len(runs) * eval_episodes)]
    needs_values = any(arm == "least" for arm, _ in runs)
    value = potential = np.zeros(len(runs))
    for step in range(1, options.total_steps + 1):
        action = None
        if step > options.start_steps:
            many.observation.copy_(torch.from_numpy(world.observation)[:, None])
            many.act()
            action = many.action[:, 0].cpu().numpy()
        action = world.explore(action)
        following, reward, terminated, truncated = world.step(action)
        columns = [world.observation, action, following, reward[:, None], terminated[:, None]]
        many.pinned.copy_(torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32)))
        many.incoming.copy_(many.pinned, non_blocking=True)
        many.receive()
        if needs_values:
            value, potential = many.value_and_potential.cpu().numpy()
        if step >= options.start_steps:
            (many.update_all if step % options.policy_delay == 0 else many.update_critics)()
        world.finish(following, reward, terminated, truncated, value, potential)
        if step % eval_every == 0 or step == options.total_steps:
            returns = evaluate(many, judges, threads)
            for (arm, seed), score, meter, stopper in zip(runs, returns, world.meters, world.stoppers, strict=True):
                report(arm, seed, step, "eval_return", float(score))
                if meter.finished_lengths:
                    report(arm, seed, step, "episode_length", float(np.mean(meter.finished_lengths)))
                report(arm, seed, step, "num_stopped", stopper.num_stopped)
    return many
