"""Several processes: what Accelerate's configuration asks for, done to a model of Transformers.

`accelerate launch` says by its environment how the processes are arranged; `Parallel.from_environment` reads it with
Accelerate's own classes. What is done then is PyTorch's: DistributedDataParallel, or `fully_shard` (FSDP2) over the
processes that hold different rows, also in groups that hold copies of each other (hybrid sharding); tensor
parallelism by the plan of the model; context parallelism by `modeling_fox`. Accelerate's own context parallelism is
never used: it knows nothing of forget gates.

The processes form a mesh: copies x shards x context x tensor, the last moving fastest. Processes that differ only in
context or tensor share their rows.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn

from . import checkpoint as ckpt
from .recipe import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
NAMES = ("dp_replicate", "dp_shard", "context", "tp")


@dataclass
class Parallel:
    """How the processes of a run are arranged.

    Attributes:
        replicate: Groups that hold copies of the weights.
        shard: Processes over which FSDP2 spreads the weights.
        context: Processes over which a row is cut up.
        tensor: Processes over which every matrix is cut up.
        style: Of context parallelism: "ring" by Accelerate's cp_size, "ulysses" by its sp_size.
        fsdp: Accelerate's settings of FSDP2, or None.
        mesh: What PyTorch needs to know of it; None for one process and for DDP.
        checkpointing: Whether the launcher asks for activation checkpointing.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    style: str = "ulysses"
    fsdp: Any = None
    mesh: DeviceMesh | None = None
    checkpointing: bool = False
    _cut: Any = field(default=None, repr=False)
    _disk: Any = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, processes: int) -> Parallel:
        """Read what `accelerate launch` has set.

        Args:
            processes: How many there are.

        Raises:
            RecipeError: If it asks for something that this loop has not, or the sizes do not make up `processes`.
        """
        from accelerate.utils import FullyShardedDataParallelPlugin

        names = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
        is_set = _is_on("ACCELERATE_USE_PARALLELISM_CONFIG")
        sizes = {x: int(os.environ.get(f"PARALLELISM_CONFIG_{x.upper()}", "1")) if is_set else 1 for x in names}
        if sizes["cp_size"] > 1 and sizes["sp_size"] > 1:
            raise RecipeError(
                f"cp_size {sizes['cp_size']} and sp_size {sizes['sp_size']} are two ways to cut up rows: set one to 1."
            )
        found = cls(
            replicate=sizes["dp_replicate_size"],
            shard=sizes["dp_shard_size"],
            context=max(sizes["cp_size"], sizes["sp_size"]),
            tensor=sizes["tp_size"],
            style="ring" if sizes["cp_size"] > 1 else "ulysses",
            fsdp=FullyShardedDataParallelPlugin() if _is_on("ACCELERATE_USE_FSDP") else None,
        )
        found._fill_up(processes)
        found._check(processes)
        if processes == 1 and found.fsdp is not None:
            found.checkpointing, found.fsdp = found.fsdp.activation_checkpointing, None  # nothing to spread
        return found

    def _fill_up(self, processes: int) -> None:
        """Without sizes, all processes share out the rows: FSDP2 over all of them, or DDP."""
        if self.replicate * self.shard * self.context * self.tensor == processes:
            return
        if self.replicate == self.shard == 1:
            rest = processes // (self.context * self.tensor)
            self.replicate, self.shard = (1, rest) if self.fsdp is not None else (rest, 1)

    def _check(self, processes: int) -> None:
        product = self.replicate * self.shard * self.context * self.tensor
        if product != processes:
            raise RecipeError(
                f"dp_replicate_size {self.replicate} x dp_shard_size {self.shard} x cp_size or sp_size {self.context} "
                f"x tp_size {self.tensor} must be the number of processes, {processes}; got {product}."
            )
        if self.fsdp is not None and self.fsdp.fsdp_version != 2:
            raise RecipeError(
                f"fsdp_version must be 2; got {self.fsdp.fsdp_version}. See training/accelerate/fsdp2.yaml."
            )
        if self.shard > 1 and self.fsdp is None:
            raise RecipeError(f"dp_shard_size {self.shard} needs distributed_type FSDP with fsdp_version 2.")
        if self.fsdp is not None and getattr(self.fsdp.cpu_offload, "pin_memory", None) is not None:
            raise RecipeError("fsdp_offload_params must be false: weights on the CPU are not tried here.")
        if self.tensor > 1 and (self.fsdp is not None or self.replicate > 1 or self.context > 1):
            raise RecipeError(
                f"tp_size {self.tensor} must be all {processes} processes: with data or context parallelism beside it "
                "nothing is tried here. Use FSDP2, or cp_size for long rows."
            )

    @property
    def data_processes(self) -> int:
        """Processes that hold different rows."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which of them this process is, or belongs to."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return rank // (self.context * self.tensor)

    @property
    def random_rank(self) -> int:
        """Which random numbers this process draws: those that share out a matrix must draw the same."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return rank // self.tensor

    @property
    def gradient_parts(self) -> int:
        """Over how many processes DDP or FSDP2 take the mean of the gradients."""
        return self.data_processes * self.context

    @property
    def is_collective(self) -> bool:
        """Whether a forward pass is one of all processes, so that all must make the same number of them."""
        return self.fsdp is not None or self.context > 1 or self.tensor > 1

    def describe(self) -> str:
        """One word or a few."""
        parts = [] if self.fsdp is None else ["FSDP2" if self.replicate == 1 else f"FSDP2 x {self.replicate} copies"]
        parts += [f"{self.style} {self.context}"] if self.context > 1 else []
        parts += [f"tensor {self.tensor}"] if self.tensor > 1 else []
        return ", ".join(parts) or ("DDP" if self.replicate > 1 else "one process")

    def prepare(self, model: PreTrainedModel, accelerator: Accelerator, *, compile: bool, checkpointing: bool) -> Any:
        """Spread `model` over the processes, in place, before the optimizers are built.

        Args:
            model: On its device, the same on every process.
            accelerator: Wraps the model for DDP.
            compile: torch.compile each layer and the loss.
            checkpointing: Recompute the activations of each layer in the backward pass.

        Returns:
            What is trained: the model, or DDP around it.
        """
        asked = self.fsdp.activation_checkpointing if self.fsdp is not None else self.checkpointing
        if checkpointing or asked:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.is_collective:
            shape = (self.replicate, self.shard, self.context, self.tensor)
            self.mesh = dist.init_device_mesh(accelerator.device.type, shape, mesh_dim_names=NAMES)
        if self.tensor > 1:
            split_matrices(model, self.mesh["tp"])
        if self.context > 1:
            self._cut = self._cut_rows(model)
        if compile:
            compile_layers(model)
        if self.fsdp is not None:
            shard_weights(model, self._fsdp_mesh(), reshard=self.fsdp.reshard_after_forward)
            return model
        return model if self.tensor > 1 else accelerator.prepare_model(model)

    def _cut_rows(self, model: PreTrainedModel):
        from modeling_fox import enable_context_parallel

        if model.config.model_type != "fox":
            raise RecipeError(
                f"cp_size and sp_size need model.type fox; got {model.config.model_type}. Train it with FSDP2 or DDP."
            )
        try:
            return enable_context_parallel(model, self.mesh["context"].get_group(), self.style)
        except ValueError as error:
            raise RecipeError(f"cp_size or sp_size {self.context}: {error}") from error

    def _fsdp_mesh(self) -> DeviceMesh:
        """Weights are spread over the processes of a row too: they would only hold copies."""
        mesh = self.mesh["dp_shard", "context"]._flatten("dp_shard_context") if self.context > 1 else None
        if self.replicate == 1:
            return self.mesh["dp_shard"] if mesh is None else mesh
        return self.mesh["dp_replicate", "dp_shard" if mesh is None else "dp_shard_context"]

    def prepare_optimizers(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Under tensor parallelism some weights are spread and some are not: one kernel for all cannot take both."""
        for optimizer in optimizers if self.tensor > 1 else ():
            for group in optimizer.param_groups:
                group.update({name: False for name in ("foreach", "fused") if name in group})
        return optimizers

    def in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of this process; where a forward pass needs all, as many as the one with most of them has.

        The missing ones are copies whose labels are all ignored.
        """
        last = None
        for batch in batches:
            if self.is_collective and not self._anybody(True):
                return
            yield batch
            last = batch
        while self.is_collective and self._anybody(False):
            yield last._replace(labels=torch.full_like(last.labels, -100))

    def _anybody(self, mine: bool) -> bool:
        flag = torch.tensor(float(mine), device=self.mesh.device_type)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def disk_group(self) -> dist.ProcessGroup:
        """All processes, for the thread that writes checkpoints: on the CPU, and apart from what training sends."""
        if self._disk is None:
            self._disk = dist.new_group(backend="gloo")
        return self._disk

    def local(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's part of a batch that it shares with others; the batch itself without context parallelism."""
        return batch if self._cut is None else self._cut.local(batch)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


@contextlib.contextmanager
def plain_accelerate():
    """Block in which Accelerate sees plain processes: FSDP2 and the mesh are `Parallel`'s, on a CPU as on GPUs."""
    held = {name: os.environ.pop(name) for name in SWITCHES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile every layer and the loss, in place.

    All layers are one piece of code, so it is compiled once: the first step of 24 layers waits as long as that of one.
    What stands between them (embedding, last norm, output layer) is single kernels that a compiler cannot make faster.
    """
    for layer in model.base_model.layers:
        layer.compile()
    model.loss_function = torch.compile(model.loss_function)


def shard_weights(model: PreTrainedModel, mesh: DeviceMesh, *, reshard: bool) -> None:
    """FSDP2 in place: each layer a unit, the embedding one, the last norm and the output layer one.

    Args:
        model: Its weights stay fp32; the loop's autocast computes in bf16.
        mesh: One dimension, or copies and shards.
        reshard: Let go of a layer's weights after its forward pass; False keeps them for the backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    base = model.base_model
    for layer in base.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if is_tied:
        # One weight must not be in two units; all that is left is then one, with the whole model's.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return
    fully_shard(model.get_input_embeddings(), mesh=mesh, reshard_after_forward=reshard)
    fully_shard([base.norm, model.get_output_embeddings()], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def split_matrices(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Tensor parallelism in place, by the model's plan and Transformers' styles; the weights keep their values."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    weights = whole_weights(model)
    if hasattr(model, "_expand_parallel_plan"):  # Transformers 5.18 and newer
        apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(dict(model.tp_plan)))
    else:
        apply_tensor_parallelism(model, mesh)
    load_weights(model, weights)


def is_spread(held: torch.Tensor | nn.Module) -> bool:
    """Whether this process holds only a part of a tensor, or of a weight of a model."""
    if isinstance(held, nn.Module):
        return any(map(is_spread, held.parameters()))
    return hasattr(held, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached. All processes must ask for it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_spread(tensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this process holds of `like`, in its dtype and on its device."""
    tensor = tensor.to(device=like.device, dtype=like.dtype)
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_tensors(tensors: dict[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU. All processes must ask together; those that need nothing `keep` nothing."""
    found = {}
    for name, value in tensors.items():
        value = whole(value)
        if keep:
            found[name] = value.cpu().contiguous()
    return found


def parts_like(tensors: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`part_like` by name."""
    return {name: part_like(value, like[name]) for name, value in tensors.items()}


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """All weights and buffers on the CPU, tied ones once; see `whole_tensors`."""
    return whole_tensors({names[0]: value for names, value in tensors_with_names(model)}, keep=keep)


def tensors_with_names(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Every weight and buffer with all its names: tied ones have several."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        found.setdefault(id(value), ([], value))[0].append(name)
    return list(found.values())


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of `whole_weights`: every process has all of it and takes its part.

    Raises:
        ValueError: If a weight is missing or has another shape.
    """
    for names, value in tensors_with_names(model):
        name = next((name for name in names if name in tensors), None)
        if name is None:
            raise ValueError(f"there is no weight {names[0]}")
        if tuple(tensors[name].shape) != tuple(value.shape):
            raise ValueError(f"{name} is {tuple(tensors[name].shape)} instead of {tuple(value.shape)}")
        value.copy_(part_like(tensors[name], value))


def read_weights(model: nn.Module, path: Path) -> None:
    """Load what `checkpoint.save_weights` wrote, however the weights are spread now.

    Raises:
        CheckpointError: If the file is not of this model.
    """
    if not is_spread(model):
        ckpt.load_weights(model, path)
        return
    try:
        load_weights(model, ckpt.load_tensors(path))
    except ValueError as error:
        raise ckpt.CheckpointError(f"{path} does not fit the model: {error}.") from error


def read_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load what `checkpoint.save_optimizer` wrote, however the weights are spread now.

    Raises:
        CheckpointError: If the file cannot be read or is of other weights.
    """
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    if not any(map(is_spread, weights)):
        ckpt.load_optimizer(optimizer, path)
        return
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in ckpt.load_tensors(path).items():
        number, _, name = key.partition(".")
        weight = weights[int(number)]
        # What has another shape, like the count of steps, is the same on all processes.
        part = part_like(value, weight) if value.shape == weight.shape else value
        state.setdefault(int(number), {})[name] = part
    held = optimizer.state_dict()
    held["state"] = state
    try:
        optimizer.load_state_dict(held)
    except ValueError as error:
        raise ckpt.CheckpointError(f"{path} does not fit the optimizer: {error}") from error


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale all gradients so that their common norm is at most `largest`; returns the norm before, on the device.

    Like `torch.nn.utils.clip_grad_norm_`, also where some weights are spread and others are not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = {}
    for gradient in gradients:
        kinds.setdefault((is_spread(gradient), getattr(gradient, "placements", None)), []).append(gradient)
    if len(kinds) <= 1:
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        return whole(norm)
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in kinds.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if math.isfinite(largest):
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            (gradient.to_local() if is_spread(gradient) else gradient).mul_(factor)
    return norm


__all__ = ["Parallel", "plain_accelerate"]
