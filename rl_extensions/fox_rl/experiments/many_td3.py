"""Many runs of TD3 at once on one GPU, with and without early stops: the agent of `fox_rl.agents.td3`, batched.

The networks of all runs are stacked, so that a step of all of them is one of each kernel, and on a GPU the whole
update is one CUDA graph. The losses are those of the agent. The runs share nothing: each has its own environment,
replay, noise and stopper. While the GPU makes an update, the CPUs step the environments.

Letters: S runs, B batch, O observation size, A action size, C capacity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fox_rl.agents.td3 import Options, actor_loss, critic_loss
from fox_rl.continuous import ActorCritic
from fox_rl.experiments.workers import EnvironmentPool
from fox_rl.learn_to_stop import LearnToStop, RandomResetControl, StopNoise, hazard_for
from fox_rl.returns import td_target

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

    def forward(self, x: Tensor, count: int | None = None) -> Tensor:
        """`(N, B, in)` to `(N, B, out)`, or the same of the first `count` networks alone."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if count is not None:
                weight, bias = weight[:count], bias[:count]
            x = torch.baddbmm(bias, x, weight)
            x = x.relu() if i < last else x
        return x


class StackedCritics(StackedMLP):
    """Both critics of S runs: first all first ones, then all second ones."""

    def __init__(self, networks: list[ActorCritic]):
        super().__init__([net.critics.nets[i] for i in range(2) for net in networks])

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """`(S, B, O)` and `(S, B, A)` to `(2, S, B)`."""
        out = super().forward(torch.cat([observation, action], dim=-1).repeat(2, 1, 1))
        return out.squeeze(-1).unflatten(0, (2, len(observation)))

    def first(self, observation: Tensor, action: Tensor) -> Tensor:
        """The first value alone, `(S, B)`."""
        return super().forward(torch.cat([observation, action], dim=-1), len(observation)).squeeze(-1)


class Graphed:
    """A function of tensors that stay in place: on a GPU recorded as a CUDA graph at its fourth call.

    Args:
        function: Without arguments and results; reads and writes tensors whose addresses do not change.
        is_graphed: False calls it every time.
        on_failure: Called when it cannot be recorded, before it is called as it is from then on.
    """

    def __init__(self, function: Callable[[], None], is_graphed: bool, on_failure: Callable[[], None] | None = None):
        self.function, self.calls, self.is_graphed, self.on_failure = function, 0, is_graphed, on_failure
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
            self.record()
            self()  # recording does not execute
            return
        self.calls += 1

    def record(self) -> None:
        """Make the graph, or say loudly why there is none."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.function()
            self.graph = graph
        except RuntimeError as error:
            sys.stderr.write(f"NO CUDA GRAPH of {self.function}, all goes on much slower without: {error}\n")
            sys.stderr.flush()
            self.is_graphed = False
            if self.on_failure is not None:
                self.on_failure()


def at_host(device: torch.device, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros on the CPU that graphs of `device` read and write themselves."""
    return torch.zeros(*size, dtype=dtype, pin_memory=device.type == "cuda")


def wait_for(device: torch.device) -> None:
    """Until all that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()


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
        self.actor, self.target_actor = (StackedMLP([net.actor for net in networks]).to(device) for _ in range(2))
        self.critics, self.target_critics = (StackedCritics(networks).to(device) for _ in range(2))
        self.target_actor.requires_grad_(False), self.target_critics.requires_grad_(False)
        on_gpu = device.type == "cuda"
        self.actor_optimizer, self.critic_optimizer = (
            torch.optim.Adam(module.parameters(), lr=options.learning_rate, fused=True, capturable=on_gpu)
            for module in (self.actor, self.critics)
        )
        row = 2 * self.observation_size + self.action_size + 2  # observation, action, following, reward, terminated
        self.rows = torch.zeros(self.num_runs, capacity, row, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.size = torch.zeros(1, dtype=torch.long, device=device)
        # What goes to the device and back.
        self.sent_row = at_host(device, self.num_runs, row)
        self.sent_observation = at_host(device, self.num_runs, self.observation_size)
        self.received_action = at_host(device, self.num_runs, self.action_size)
        self.received_values = at_host(device, 2, self.num_runs)
        self.generator: torch.Generator | None = None  # PyTorch's own
        functions = (
            self._receive, self._act, lambda: self._update(with_actor=False), lambda: self._update(with_actor=True)
        )  # fmt: skip
        self.receive, self.act, self.update_critics, self.update_all = (
            Graphed(function, on_gpu and graphs, self._new_generator) for function in functions
        )

    @property
    def num_graphs(self) -> int:
        """Of the four functions, how many are graphs by now."""
        return sum(x.graph is not None for x in (self.receive, self.act, self.update_critics, self.update_all))

    def _new_generator(self) -> None:
        """A recording that failed leaves PyTorch's generator unusable."""
        self.generator = torch.Generator(self.device).manual_seed(0)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows `(..., R)` as a batch of the agent."""
        sizes = [self.observation_size, self.action_size, self.observation_size, 1, 1]
        observation, action, following, reward, terminated = rows.split(sizes, dim=-1)
        return {
            "observation": observation, "action": action, "following": following, "reward": reward.squeeze(-1),
            "terminated": terminated.squeeze(-1) > 0.5,
        }  # fmt: skip

    def choose(self, observation: np.ndarray) -> np.ndarray:
        """The actors' actions in [-1, 1], `(S, O)` to `(S, A)`."""
        self.sent_observation.numpy()[:] = observation
        self.act()
        wait_for(self.device)
        return self.received_action.numpy().copy()

    def add(self, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store a transition of every run, columns as in `split`; returns its value and its squared error, `(S,)`."""
        np.concatenate(columns, axis=1, out=self.sent_row.numpy(), casting="unsafe")
        self.receive()
        wait_for(self.device)
        value, potential = self.received_values.numpy().copy()
        return value, potential

    @torch.no_grad()
    def _act(self) -> None:
        observation = self.sent_observation.to(self.device, non_blocking=True)[:, None]
        self.received_action.copy_(self.actor(observation).tanh()[:, 0], non_blocking=True)

    @torch.no_grad()
    def _receive(self) -> None:
        incoming = self.sent_row.to(self.device, non_blocking=True)[:, None]
        self.rows.index_copy_(1, self.place, incoming)
        self.place.add_(1).remainder_(self.capacity)
        self.size.add_(1).clamp_(max=self.capacity)
        batch = self.split(incoming)
        value = self.critics(batch["observation"], batch["action"]).amin(dim=0)
        following = batch["following"]
        target = self.target_critics(following, self.target_actor(following).tanh()).amin(dim=0)
        target = td_target(batch["reward"], target, batch["terminated"], self.options.discount)
        values = torch.stack([value, (target - value).square()]).squeeze(-1)
        self.received_values.copy_(values, non_blocking=True)

    def _update(self, with_actor: bool) -> None:
        shape = (self.num_runs, self.options.batch_size)
        chosen = (torch.rand(shape, device=self.device, generator=self.generator) * self.size).long()
        chosen = torch.minimum(chosen, self.size - 1)  # float32 rounds up
        runs = torch.arange(self.num_runs, device=self.device)[:, None]
        noise = torch.randn(*shape, self.action_size, device=self.device, generator=self.generator)
        self.learn(self.rows[runs, chosen], noise, with_actor)

    def learn(self, rows: Tensor, noise: Tensor, with_actor: bool) -> None:
        """The update of TD3 on `(S, B, R)` rows, with standard normal noise `(S, B, A)` for the target."""
        batch = self.split(rows)
        loss = critic_loss(self.critics, self.target_critics, self.target_actor, batch, noise, self.options)
        step(self.critic_optimizer, loss)
        if not with_actor:
            return
        step(self.actor_optimizer, actor_loss(self.actor, self.critics, batch["observation"]))
        with torch.no_grad():
            for slow, fast in ((self.target_actor, self.actor), (self.target_critics, self.critics)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), self.options.target_rate)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step on the gradients of this loss; other gradients are not touched."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient.contiguous()  # the fused optimizer reads memory in order, whatever the strides
    optimizer.step()


class Runs:
    """Episodes, stoppers and exploration of all runs, on the CPU.

    Args:
        pool: Its first S environments are those of the runs.
        runs: (arm, seed) of each run; the control of a seed follows the mean episode length of LEAST with that seed.
        options: Of TD3.

    Attributes:
        lengths: Of the finished episodes of each run.
        terminated: Whether they ended by themselves, before the horizon.
        num_stopped: Stopped episodes of each run.
        saved_steps: Steps that these would have had left to the horizon.
    """

    def __init__(self, pool: EnvironmentPool, runs: list[tuple[str, int]], options: Options):
        self.pool, self.runs, self.options = pool, runs, options
        self.numbers = np.arange(len(runs))
        self.horizon = pool.horizon
        start = round(options.stop_start * options.total_steps)
        self.stoppers: list[LearnToStop | RandomResetControl | None] = []
        for arm, seed in runs:
            if arm == "least":
                stopper = LearnToStop(
                    1, self.horizon, start_step=start, omega_scale=options.omega_scale, seed=seed, entropy_every=10
                )
            else:
                stopper = RandomResetControl(1, 0.0, start_step=start, seed=seed) if arm == "random" else None
            self.stoppers.append(stopper)
        self.noise = StopNoise(options.exploration, max(options.exploration, options.noise_max), self.horizon // 4)
        self.deviation = np.full((len(runs), 1), options.exploration)
        self.generators = [np.random.default_rng(seed) for _, seed in runs]
        self.noise_ahead = np.zeros((0, len(runs), 1))
        self.step_index = np.zeros((len(runs), 1), dtype=np.int64)
        self.lengths: list[list[int]] = [[] for _ in runs]
        self.terminated: list[list[bool]] = [[] for _ in runs]
        self.num_stopped, self.saved_steps = np.zeros((2, len(runs)), dtype=np.int64)
        self.low, self.high = pool.action_space.low, pool.action_space.high
        self.observation = pool.reset(self.numbers, np.array([seed for _, seed in runs])).astype(np.float32)

    def scale(self, action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the bounds."""
        return self.low + 0.5 * (action + 1.0) * (self.high - self.low)

    def explore(self, action: np.ndarray | None) -> np.ndarray:
        """Actions in [-1, 1], `(S, A)`: the actors' with noise, or random ones."""
        size = len(self.low)
        if action is None:
            return np.stack([g.uniform(-1, 1, size) for g in self.generators]).astype(np.float32)
        if not len(self.noise_ahead):
            self.noise_ahead = np.stack([g.standard_normal((256, size)) for g in self.generators], axis=1)
        noise, self.noise_ahead = self.noise_ahead[0], self.noise_ahead[1:]
        return np.clip(action + self.deviation * noise, -1, 1).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step of every run: following `(S, O)`, reward, terminated and truncated `(S,)`."""
        following, *rest = self.pool.step(self.numbers, self.scale(action))
        return (following.astype(np.float32), *rest)

    def finish(self, following, terminated, truncated, value, potential) -> None:
        """Let the stoppers decide, and start the episodes anew that are over."""
        self.observation = following
        ended, stopped = terminated | truncated, np.zeros(len(self.runs), dtype=bool)
        for i, stopper in enumerate(self.stoppers):
            if stopper is not None:
                stop = stopper.update(self.step_index[i], value[i : i + 1], potential[i : i + 1])
                stopped[i] = stop[0] and not ended[i]
        ended = ended | stopped
        self.step_index += 1
        if ended.any():
            self.num_stopped += stopped
            self.saved_steps += stopped * (self.horizon - self.step_index[:, 0])
            for i in np.flatnonzero(ended):
                self._end(i, stopped[i : i + 1], bool(terminated[i]))
            self.observation[ended] = self.pool.reset(np.flatnonzero(ended))
            self.step_index[ended] = 0

    def _end(self, i: int, stopped: np.ndarray, terminated: bool) -> None:
        (arm, seed), stopper = self.runs[i], self.stoppers[i]
        self.lengths[i].append(int(self.step_index[i, 0]))
        self.terminated[i].append(terminated)
        if stopper is not None:
            stopper.episode_end(np.array([True]), stopped)
        if arm == "least":
            self.deviation[i] = self.noise.sigma(stopper.stopped_at)
        if arm != "none" and {("least", seed), ("random", seed)} <= set(self.runs):
            self._follow(self.runs.index(("least", seed)), self.runs.index(("random", seed)))

    def _follow(self, least: int, control: int, recent: int = 20) -> None:
        """Give the control the hazard with which its episodes become as long as those of LEAST have been last.

        Both make the same steps, so the same mean length is the same number of episodes: what the control has too
        many or too few it makes up for over as many as `recent`. What ends by itself needs no stop.
        """
        if not self.lengths[least]:
            return
        length = max(1.0, float(np.mean(self.lengths[least][-recent:])))
        own, steps = sum(self.terminated[control][-recent:]), sum(self.lengths[control][-recent:])
        ahead = (len(self.lengths[control]) - len(self.lengths[least])) / recent
        hazard = max(0.0, hazard_for(length, self.horizon) - own / max(1, steps))
        self.stoppers[control].hazard = min(1.0, hazard * min(max(1.0 - ahead, 0.0), 2.0))


def evaluate(many: ManyTD3, world: Runs, episodes: int) -> np.ndarray:
    """Mean return of each run over whole episodes without noise, `(S,)`, in the pool's other environments."""
    runs, count = many.num_runs, many.num_runs * episodes

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        tensor = torch.as_tensor(observation, dtype=torch.float32, device=many.device)
        action = many.actor(tensor.view(episodes, runs, -1).transpose(0, 1)).tanh()
        return world.scale(action.transpose(0, 1).reshape(count, -1).cpu().numpy())

    # Episode by episode, the runs within.
    totals = world.pool.play(runs + np.arange(count), 1000 + np.arange(count) // runs, act)
    return totals.reshape(episodes, runs).mean(axis=0)


def train(
    env_id: str, runs: list[tuple[str, int]], options: Options, report: Callable[..., None], *, device: str = "auto",
    workers: int = 1, eval_every: int = 20_000, eval_episodes: int = 5, graphs: bool = True,
    watch: Callable[[int, ManyTD3], None] | None = None,
) -> ManyTD3:  # fmt: skip
    """Train all runs side by side.

    Args:
        env_id: Gymnasium id.
        runs: (arm, seed) of each, arms of `ARMS`.
        options: Of TD3; `num_envs`, `seed` and what belongs to files is not read.
        report: `(arm, seed, step, metric, value)` of everything measured.
        device: auto: a GPU if there is one.
        workers: Processes that step the environments.
        eval_every: Steps between evaluations.
        eval_episodes: Of one.
        graphs: Record CUDA graphs on a GPU.
        watch: Called after every step with its number.
    """
    if any(arm not in ARMS for arm, _ in runs):
        raise ValueError(f"runs must have an arm of {', '.join(ARMS)}; got {sorted({arm for arm, _ in runs})}.")
    count = len(runs) * (1 + eval_episodes)
    with EnvironmentPool(env_id, count, min(workers, count)) as pool:
        world = Runs(pool, runs, options)
        networks = []
        for _, seed in runs:
            torch.manual_seed(seed)
            networks.append(ActorCritic.for_spaces(pool.observation_space, pool.action_space, width=options.width))
        on = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
        many = ManyTD3(networks, options.total_steps, options, on, graphs)
        for step in range(1, options.total_steps + 1):
            action = None
            if step > options.start_steps:
                action = many.choose(world.observation)
                # Nothing waits for the update before `add`. It learns from all steps but this one.
                (many.update_all if step % options.policy_delay == 0 else many.update_critics)()
            action = world.explore(action)
            following, reward, terminated, truncated = world.step(action)
            columns = [world.observation, action, following, reward[:, None], terminated[:, None]]
            value, potential = many.add(*columns)
            world.finish(following, terminated, truncated, value, potential)
            if watch is not None:
                watch(step, many)
            if step % eval_every == 0 or step == options.total_steps:
                returns = evaluate(many, world, eval_episodes)
                for i, ((arm, seed), score) in enumerate(zip(runs, returns, strict=True)):
                    report(arm, seed, step, "eval_return", float(score))
                    report(arm, seed, step, "num_stopped", world.num_stopped[i])
                    report(arm, seed, step, "saved_steps", world.saved_steps[i])
                    if world.lengths[i]:
                        report(arm, seed, step, "episode_length", float(np.mean(world.lengths[i])))
    return many
