"""Checkpoints of weights that are spread over processes: each process writes and reads its own part.

    FOLDER/parts/shard-00001-model-00001-of-00001.safetensors    what process 0 holds, and so on
    FOLDER/replicated.safetensors                                what all hold alike, such as the counts of steps

PyTorch's distributed checkpoints do the work, in their safetensors form, so that nothing is pickled: the processes
agree who writes what, each file says which part of each tensor it has, and any number of processes can read it back.
No process ever holds all of a weight. Names: `model.NAME`, `average.NAME`, `optimizer_N.INDEX.NAME`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn

from . import checkpoint as ckpt
from .parallel import is_spread, tensors_with_names

if TYPE_CHECKING:
    from .optimizers import WeightAverage

PARTS = "parts"
REPLICATED = "replicated.safetensors"


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint was written by `write_in_background`."""
    return (folder / PARTS).is_dir()


def collect(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    average: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a run by their names in the checkpoint; tied weights once."""
    found = {f"model.{names[0]}": value.detach() for names, value in tensors_with_names(model)}
    found |= {f"average.{name}": value for name, value in (average or {}).items()}
    for number, optimizer in enumerate(optimizers):
        for index, slot in optimizer.state_dict()["state"].items():
            for name, value in slot.items():
                value = value if torch.is_tensor(value) else torch.tensor(value)
                found[f"optimizer_{number}.{index}.{name}"] = value
    return found


def write_replicated(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what every process has all of; one process does it."""
    ckpt.save_tensors({name: value for name, value in tensors.items() if not is_spread(value)}, folder / REPLICATED)


class Writing:
    """Parts that are being written in a thread. Every process makes one, at the same time.

    Args:
        tensors: Of `collect`; they are copied to the CPU before this returns, and may change afterwards.
        folder: Of the checkpoint.
        group: Processes over gloo, used by nothing else: the thread agrees with the others over it.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup):
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        self.folder, self.group = folder / PARTS, group
        # contiguous(): columns of a matrix are not, and safetensors takes nothing else.
        spread = {name: value.contiguous() for name, value in tensors.items() if is_spread(value)}
        self.folder.mkdir(exist_ok=True)
        writer = HuggingFaceStorageWriter(str(self.folder), save_distributed=True)
        self._saved = async_save(spread, storage_writer=writer, process_group=group)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait for all processes; returns the manifest's entries of all parts on process 0, {} elsewhere.

        Raises:
            OSError: If a process could not write or read its part.
        """
        from torch.distributed.checkpoint import CheckpointException

        try:
            self._saved.result()
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
            raise OSError(f"process {rank}: {cause}") from error
        # A process reads its own file again, on its own machine.
        own = f"shard-{dist.get_rank(self.group) + 1:05d}-"
        try:
            files = sorted(path for path in self.folder.iterdir() if path.name.startswith(own))
            found = {f"{PARTS}/{path.name}": ckpt.manifest_entry(path) for path in files}
        except OSError as error:
            found = error
        is_first = dist.get_rank(self.group) == 0
        gathered = [None] * dist.get_world_size(self.group) if is_first else None
        dist.gather_object(found, gathered, group=self.group)
        for failed in gathered or ():
            if isinstance(failed, OSError):
                raise failed
        return {name: entry for entries in gathered or () for name, entry in entries.items()}

    def tell(self, failed: Exception | None) -> Exception | None:
        """What process 0 has to say, on every process."""
        box = [failed]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]


def read(
    folder: Path,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    average: WeightAverage | None = None,
) -> None:
    """Load a checkpoint into a run, however its weights are spread now. Processes need not wait for each other.

    Args:
        folder: Checkpoint, already verified.
        model: Takes its weights in place.
        optimizers: Take their states.
        average: Takes the running mean of the weights; None leaves it.

    Raises:
        CheckpointError: If it is not a checkpoint of this model and these optimizers.
    """
    replicated = ckpt.load_tensors(folder / REPLICATED)
    held = {name: tuple(value.shape) for name, value in replicated.items()} | _sizes(folder / PARTS)
    targets: dict[str, torch.Tensor] = {}

    def wanted(name: str, like: torch.Tensor) -> None:
        if name not in held:
            raise ckpt.CheckpointError(f"{folder} does not fit the model: there is no {name}.")
        if held[name] != tuple(like.shape):
            raise ckpt.CheckpointError(
                f"{folder} does not fit the model: {name} is {held[name]} instead of {tuple(like.shape)}."
            )
        targets[name] = like.detach()

    for names, value in tensors_with_names(model):
        wanted(next((f"model.{name}" for name in names if f"model.{name}" in held), f"model.{names[0]}"), value)
    means = {name: torch.empty_like(value) for name, value in (average.state_dict() if average else {}).items()}
    for name, value in means.items():
        wanted(f"average.{name}", value)
    states = []
    for number, optimizer in enumerate(optimizers):
        states.append(_empty_state(f"optimizer_{number}.", optimizer, held, replicated))
        targets |= {f"optimizer_{number}.{i}.{n}": v for i, slot in states[-1].items() for n, v in slot.items()}
    _load(folder / PARTS, {name: value for name, value in targets.items() if name not in replicated})
    with torch.no_grad():
        for name, value in targets.items():
            if name in replicated:
                value.copy_(replicated[name])
    for optimizer, state in zip(optimizers, states, strict=True):
        try:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        except ValueError as error:
            raise ckpt.CheckpointError(f"{folder} does not fit the optimizer: {error}") from error
    if average is not None:
        average.load_state_dict(means)


def _empty_state(
    prefix: str, optimizer: torch.optim.Optimizer, held: dict[str, tuple[int, ...]], replicated: dict[str, Any]
) -> dict[int, dict[str, torch.Tensor]]:
    """A state of an optimizer with the tensors that the checkpoint has, laid out as the weights."""
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, shape in held.items():
        if not name.startswith(prefix):
            continue
        index, _, key = name.removeprefix(prefix).partition(".")
        if int(index) >= len(weights) or (name not in replicated and shape != tuple(weights[int(index)].shape)):
            raise ckpt.CheckpointError(f"the checkpoint does not fit the optimizer: {name} is {shape}.")
        weight = weights[int(index)]
        like = torch.empty_like(replicated[name] if shape != tuple(weight.shape) else weight)
        state.setdefault(int(index), {})[key] = like
    return state


def _sizes(parts: Path) -> dict[str, tuple[int, ...]]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    metadata = HuggingFaceStorageReader(str(parts)).read_metadata()
    return {name: tuple(about.size) for name, about in metadata.state_dict_metadata.items()}


def _load(parts: Path, targets: dict[str, torch.Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    if not targets:
        return
    with warnings.catch_warnings():
        # It takes the absence of processes that talk to each other for a mistake.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(parts)), no_dist=True)
