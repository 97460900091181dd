"""A run before its first step: output folder, processes, data, model and optimizers."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from . import checkpoint as ckpt
from . import provenance
from .batches import Plan, RowsByIndex, RowsInOrder, plan_batches
from .energy import PowerMeter
from .guard import Guard
from .losses import use_loss
from .models import build_model, num_parameters
from .optimizers import WeightAverage, build_optimizers
from .parallel import Parallel, plain_accelerate
from .pipeline import load_data
from .recipe import Recipe, RecipeError, SparsityRecipe, save_recipe, summary
from .sparsity import DEFAULT_EXCLUDE, MaskedPruner, SparsityConfig
from .token_stream import TokenStream
from .tracking import MetricsLog, Progress, Stopwatch

try:
    import fcntl
except ImportError:  # Windows has no flock; there the folder is not locked
    fcntl = None


@dataclass
class Run:
    """Everything a step needs, in one place."""

    recipe: Recipe
    accelerator: Accelerator
    out: Path
    tokenizer: Any
    model: Any  # what is evaluated and saved
    forward: Any  # the same, wrapped for DDP and compiled: what is trained
    optimizers: list[torch.optim.Optimizer]
    average: WeightAverage | None
    pruner: MaskedPruner | None
    parallel: Parallel
    plan: Plan
    validation: TokenStream | None
    fingerprint: str
    autocast: bool
    data: dict[str, Any]  # for data.json
    arguments: list[str]  # of the command line
    progress: Progress | None = None
    metrics: MetricsLog | None = None
    heads: MetricsLog | None = None
    guard: Guard = field(init=False)
    checkpoints: ckpt.CheckpointFolder = field(init=False)
    watch: Stopwatch = field(default_factory=Stopwatch)
    power: PowerMeter | None = None
    best: dict[str, float] | None = None  # {"step", "loss"} of the lowest validation loss
    loss_sum: Any = None  # (), fp64 on the device: loss since the last logged step
    loss_steps: int = 0
    stop_signal: int = 0

    def __post_init__(self):
        self.guard = Guard(self.recipe.run.stop_on_spike)
        processes = ckpt.Processes(
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.accelerator.wait_for_everyone,
            gather_object,
        )
        keep_last = self.recipe.checkpoint.keep_last
        self.checkpoints = ckpt.CheckpointFolder(self.out / "checkpoints", keep_last, processes)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def tokens_per_step(self) -> int:
        return self.plan.rows * self.recipe.data.sequence_length

    def precision(self):
        """Autocast around a forward pass. Accelerate's own would also copy all logits to fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def averaged(self):
        """Block in which the model has the weights that are evaluated and exported."""
        return self.average.in_place() if self.average is not None else contextlib.nullcontext()


def open_output(recipe: Recipe) -> Path:
    """The output folder, tested for writing before any work is done."""
    out = Path(recipe.run.output_dir).expanduser()
    probe = out / f".write_test_{os.getpid()}"
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"run.output_dir must be a folder that can be written to; got {out} ({error}).") from error
    return out


@contextlib.contextmanager
def lock_output(out: Path, is_main: bool):
    """Hold the folder for this run inside the block; the system lets go of it however the process ends.

    Raises:
        RecipeError: If another run holds it: two runs would overwrite each other's checkpoints.
    """
    if fcntl is None or not is_main:
        yield
        return
    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(
                f"another process trains in run.output_dir {out}. Stop it, or use another folder."
            ) from error
        yield


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate for one process per device. FSDP2, tensor and context parallelism are `parallel.Parallel`'s.

    Raises:
        RecipeError: If the launcher started more processes than Accelerate sees, or with a plugin this loop ignores.
    """
    cpu = recipe.run.device == "cpu" or not torch.cuda.is_available()
    log_with = recipe.tracking.trackers or None
    # "no": the loop opens autocast itself, see Run.precision.
    with plain_accelerate():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",
            log_with=log_with,
            project_dir=recipe.run.output_dir if log_with else None,
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RecipeError(
            f"the launcher started {launched} processes (WORLD_SIZE) and Accelerate sees {accelerator.num_processes}: "
            "each would train alone. On a machine without GPU use torchrun --nproc_per_node, else accelerate launch."
        )
    allowed = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in allowed:
        raise RecipeError(
            f"distributed_type must be NO, MULTI_GPU or MULTI_CPU; got {accelerator.distributed_type.value}. "
            "Use a file of training/accelerate/."
        )
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    if recipe.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return accelerator


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether autocast to bf16 is on.

    On a CPU only when asked for: processors without bf16 units are slower with it than without.

    Raises:
        RecipeError: If the launcher asks for a precision this loop has not.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise RecipeError(f"the launcher's mixed_precision must be no or bf16; got {launched}. fp16 is not offered.")
    if recipe.run.precision == "auto" and launched == "bf16":
        return True
    if recipe.run.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.run.precision == "bf16"


def set_up(
    recipe: Recipe, accelerator: Accelerator, out: Path, arguments: list[str]
) -> tuple[Run, RowsByIndex | RowsInOrder]:
    """Data, tokenizer, model and optimizers of a run, all as at step 0."""
    accelerator.print(summary(recipe))
    parallel = Parallel.from_environment(accelerator.num_processes)
    plan = plan_batches(recipe.data, parallel.data_rank, parallel.data_processes)
    with accelerator.main_process_first():
        tokenizer, rows, validation, description = load_data(recipe, is_main=accelerator.is_main_process)
    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe.model, tokenizer).to(accelerator.device)
    if recipe.run.loss != "full" and parallel.tensor > 1:
        raise RecipeError(
            f"run.loss must be full with tensor parallelism, which cuts the output layer; got {recipe.run.loss}."
        )
    if recipe.optimizer.name == "kron" and parallel.is_collective:
        raise RecipeError("optimizer.name kron needs whole matrices; got weights that are spread. Use DDP, or muon.")
    use_loss(model, recipe.run.loss)
    forward = parallel.prepare(
        model, accelerator, compile=recipe.run.compile, checkpointing=recipe.run.activation_checkpointing
    )
    optimizers = parallel.prepare_optimizers(build_optimizers(model, recipe.optimizer))
    decay = recipe.optimizer.ema_decay
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        out=out,
        tokenizer=tokenizer,
        model=model,
        forward=forward,
        optimizers=optimizers,
        average=WeightAverage(model, decay) if decay > 0 else None,
        pruner=build_pruner(model, recipe.sparsity, recipe.schedule.steps),
        parallel=parallel,
        plan=plan,
        validation=validation,
        fingerprint=description["fingerprint"],
        autocast=uses_bf16(recipe, accelerator.device),
        data=description,
        arguments=arguments,
    )
    run.loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
    run.power = PowerMeter(run.device)
    # Each process its own random numbers from here on; the weights above are the same on all.
    torch.manual_seed(recipe.run.seed + 1 + parallel.random_rank)
    np.random.seed((recipe.run.seed + 1 + parallel.random_rank) % 2**32)
    accelerator.print(describe_run(run, description))
    return run, rows


def build_pruner(model: Any, recipe: SparsityRecipe, steps: int) -> MaskedPruner | None:
    """The pruner of the recipe, not yet attached; None for a dense training.

    Raises:
        RecipeError: If the settings do not go together, or leave nothing to prune.
    """
    if recipe.method == "none":
        return None
    settings = asdict(recipe)
    settings["exclude"] = DEFAULT_EXCLUDE if recipe.exclude is None else recipe.exclude
    try:
        return MaskedPruner(model, SparsityConfig(**settings), steps)
    except re.error as error:
        raise RecipeError(
            f"sparsity.include and sparsity.exclude must be regular expressions; {error.pattern!r} is none: {error}."
        ) from error
    except ValueError as error:
        raise RecipeError(f"sparsity: {error}") from error


def write_descriptions(run: Run) -> None:
    """recipe.yaml, data.json and environment.json; only once it is certain that this run goes on in this folder."""
    save_recipe(run.recipe, run.out / "recipe.yaml")
    for name, values in (("data.json", run.data), ("environment.json", environment(run))):
        (run.out / name).write_text(json.dumps(values, indent=1), encoding="utf-8")


def environment(run: Run) -> dict[str, Any]:
    """Command, commit, hardware and versions of this run, for the model card."""
    described = provenance.describe(provenance.command_line("fox_training.train", run.arguments))
    precision = "bf16" if run.autocast else "fp32"
    return described | {"processes": run.accelerator.num_processes, "mixed_precision": precision}


def describe_run(run: Run, description: dict[str, Any]) -> str:
    """Three lines on what is about to happen."""
    total, body = num_parameters(run.model)
    plan, length = run.plan, run.recipe.data.sequence_length
    train = description.get("train")
    epochs = f", {run.recipe.schedule.steps * run.tokens_per_step / train['tokens']:.1f} epochs" if train else ""
    size = (
        f"{train['documents']:,} documents, {train['bytes']:,} bytes, {train['tokens']:,} tokens"
        if train
        else "stream"
    )
    return (
        f"model    {run.model.config.model_type}, {total:,} weights ({body:,} without the embedding), attention "
        f"{run.model.config._attn_implementation}, {'bf16 autocast' if run.autocast else 'fp32'} on {run.device}"
        f"{', ' + run.parallel.describe() if run.parallel.is_collective else ''}\n"
        f"data     {size}, fingerprint {description['fingerprint']}\n"
        f"batch    {run.tokens_per_step:,} tokens = {plan.micro_rows} rows x {length} tokens x {plan.accumulation} "
        f"accumulation x {plan.processes} processes; {run.recipe.schedule.steps:,} steps{epochs}"
    )
