"""Train a Forgetting Transformer on text.

One GPU or CPU:   python -m fox_training.train --recipe training/recipes/demo.yaml
Several GPUs:     accelerate launch -m fox_training.train --recipe training/recipes/fox_pro_125m.yaml
A first try:      python -m fox_training.train --recipe training/recipes/demo.yaml --schedule.steps 20

Every field of a recipe can be changed by its dotted name, as `--optimizer.learning_rate 1e-3` or
`optimizer.learning_rate=1e-3`. The run writes recipe.yaml, data.json, metrics.jsonl, checkpoints/ and at the end
model/ under run.output_dir; started again with the same run.output_dir it goes on from the newest complete checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from . import checkpoint as ckpt
from . import parallel, sharded
from .batches import Batches, evaluation_batches
from .card import write_card
from .flops import flops_per_token, peak_flops
from .models import export_model, pruned_share, prunes
from .optimizers import WeightAverage, set_learning_rate
from .recipe import Recipe, RecipeError, UserError, changed_keys, load_recipe, recipe_to_dict
from .recipe_help import describe_fields
from .run import Run, lock_output, open_output, set_up, start_accelerator, write_descriptions
from .sparsity import MaskedPruner
from .tracking import MetricsLog, Progress, check_trackers, start_trackers
from .watching import by_layer, has_gates, observe_heads


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status.

    Args:
        argv: Arguments without the program's name; None takes them from the command line.
    """
    parser = argparse.ArgumentParser(prog="fox_training.train", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--allow-recipe-change", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    arguments = sys.argv[1:] if argv is None else list(argv)
    known, overrides = parser.parse_known_args(arguments)
    if known.help:
        print(help_text())
        return 0
    try:
        if known.recipe is None:
            raise RecipeError("--recipe FILE is missing. A first one to try: training/recipes/demo.yaml")
        recipe = load_recipe(known.recipe, overrides)
        train(recipe, allow_recipe_change=known.allow_recipe_change, arguments=arguments)
    except UserError as error:
        if os.environ.get("FOX_TRACEBACK"):
            raise
        print(f"fox_training.train: error: {error}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    """What --help prints."""
    options = (
        "  --recipe FILE\n        YAML file with the sections below; a field that it leaves out has its default.\n"
        "  --allow-recipe-change\n        Resume although model, data or optimizer are not those of the checkpoint.\n"
    )
    return f"{__doc__}\n{options}\n{describe_fields()}"


def train(
    recipe: Recipe, *, allow_recipe_change: bool = False, arguments: list[str] | tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train from a recipe, or go on with a run that was interrupted.

    Args:
        recipe: See `recipe.Recipe`.
        allow_recipe_change: Resume although model, data or optimizer differ from the checkpoint's recipe.
        arguments: Command line, for environment.json.

    Returns:
        The last evaluation, with `step`; just the step if nothing is held out.

    Raises:
        UserError: If something is wrong that the user can mend; nothing that was saved is lost.
    """
    out = open_output(recipe)
    check_trackers(recipe.tracking)
    accelerator = start_accelerator(recipe)
    with lock_output(out, accelerator.is_main_process):
        with one_error_for_a_lost_process(accelerator, lambda: _STARTING):
            run, rows = set_up(recipe, accelerator, out, list(arguments))
            first, data_state = resume(run, allow_recipe_change)
        if run.pruner is not None:
            run.pruner.attach(*run.optimizers)
        if first >= recipe.schedule.steps and (out / "model" / "config.json").is_file():
            accelerator.print(f"{out} is complete at step {first}. Raise schedule.steps to go on.")
            return {"step": first}
        steps, warmup = recipe.schedule.steps, recipe.schedule.warmup_steps
        if warmup > steps:
            accelerator.print(
                f"schedule.warmup_steps {warmup} are more than schedule.steps {steps}: the learning rate ends at "
                f"{steps / warmup:.0%} of its peak."
            )
        if run.is_main:
            write_descriptions(run)
            run.metrics = MetricsLog(out / "metrics.jsonl", after_step=first)
            run.heads = MetricsLog(out / "heads.jsonl", after_step=first)
        start_trackers(accelerator, recipe.tracking, recipe_to_dict(recipe)["schedule"], first)
        run.progress = Progress(recipe.schedule.steps, first, enabled=run.is_main)
        batches = Batches(rows, run.plan, run.device, data_state, workers=recipe.data.workers)
        try:
            with one_error_for_a_lost_process(accelerator, lambda: newest_checkpoint(run)):
                last = train_to_the_end(run, batches, first)
                run.checkpoints.wait()
            return last
        finally:
            batches.close()
            run.checkpoints.close()
            run.progress.close()
            for log_file in (run.metrics, run.heads):
                if log_file is not None:
                    log_file.close()
            if recipe.tracking.trackers:
                accelerator.end_training()


@contextlib.contextmanager
def one_error_for_a_lost_process(accelerator: Accelerator, state: Callable[[], str]):
    """Turn what gloo and NCCL say when another process is gone into one line; `state` says what is not lost."""
    try:
        yield
    except RuntimeError as error:
        said = next((words for words in _LOST if words in str(error)), None)
        if said is None and isinstance(error, torch.distributed.DistError):
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if accelerator.num_processes == 1 or said is None:
            raise
        raise UserError(
            f"another process of this run is gone ({said}). {state()}; the same command, on any number of processes, "
            "goes on from there."
        ) from error


_STARTING = "No step was done since the newest checkpoint, if there is one"
# gloo raises a plain RuntimeError.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


def train_to_the_end(run: Run, batches: Batches, first: int) -> dict[str, Any]:
    """All steps from `first` on and the export, unless a signal asks to stop before."""
    with catch_signals(run):
        last = train_steps(run, batches, first)
    if run.stop_signal:
        name = signal.Signals(run.stop_signal).name
        run.checkpoints.wait()
        run.progress.say(f"stopped by {name}; the same command goes on from the checkpoint.")
        return {"step": last["step"]}
    finish(run)
    return last


def train_steps(run: Run, batches: Batches, first: int) -> dict[str, Any]:
    """The loop: step, log, evaluate, save. Returns the last evaluation with its step."""
    recipe, steps = run.recipe, run.recipe.schedule.steps
    last: dict[str, Any] = {"step": first}
    run.forward.train()
    run.watch.start()
    for step in range(first + 1, steps + 1):  # `step` counts the optimizer steps done when this round is over
        micro_batches = [run.parallel.local(batch) for batch in next(batches)]
        share = set_learning_rate(run.optimizers, step - 1, recipe.schedule)
        loss, grad_norm = optimizer_step(run, micro_batches, step)
        run.guard.add(step, loss, grad_norm, micro_batches)
        run.progress.step()

        stopping = False
        if step % recipe.tracking.log_every_steps == 0 or step == steps:
            log(run, step, share * recipe.optimizer.learning_rate, grad_norm, micro_batches[0], batches.waited())
            stopping = should_stop(run)
        elif run.accelerator.num_processes == 1:
            stopping = bool(run.stop_signal)

        run.watch.stop()
        if is_due(step, steps, recipe.evaluation.every_steps) and run.validation is not None:
            last = {"step": step, **evaluate(run, step)}
        needed = recipe.checkpoint.final or step < steps
        if stopping or (needed and is_due(step, steps, recipe.checkpoint.every_steps)):
            save(run, step, batches.state_dict())
        if stopping:
            return {**last, "step": step}
        run.watch.start()
    run.watch.stop()
    return last if last["step"] == steps else {**last, "step": steps}


def is_due(step: int, steps: int, every: int) -> bool:
    """Every `every` steps and at the end; with 0 only at the end."""
    return step == steps or (every > 0 and step % every == 0)


def optimizer_step(
    run: Run, micro_batches: list[dict[str, torch.Tensor]], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over all micro-batches; returns loss and gradient norm before clipping, on the device.

    The loss of a micro-batch is its sum over the tokens of the whole step, times the number of processes because DDP
    and FSDP2 take the mean over them: accumulation and the number of processes change nothing but rounding.
    """
    recipe = run.recipe
    labels = run.plan.rows * (recipe.data.sequence_length - 1) / run.parallel.gradient_parts
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
    for number, batch in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)
        with contextlib.nullcontext() if is_last else run.accelerator.no_sync(run.forward):
            with run.precision():
                loss = run.forward(**batch, use_cache=False, num_items_in_batch=labels).loss
            loss.backward()
        loss_sum += loss.detach()
    parameters = [p for group in run.optimizers for g in group.param_groups for p in g["params"]]
    grad_norm = parallel.clip_gradients(parameters, recipe.optimizer.max_grad_norm or math.inf)
    for optimizer in run.optimizers:
        optimizer.step()
    for optimizer in run.optimizers:  # after all steps: rigl and saliency look at the gradients of the last one
        optimizer.zero_grad(set_to_none=True)
    if run.average is not None:
        run.average.update(step - 1)
        if run.pruner is not None:
            run.pruner.apply_to(run.average.state_dict())
    run.loss_sum += loss_sum
    run.loss_steps += 1
    return loss_sum, grad_norm


def log(run: Run, step: int, learning_rate: float, grad_norm: torch.Tensor, batch: dict[str, torch.Tensor],
        waited: float) -> None:  # fmt: skip
    """Write the figures since the last logged step. The first place where the device is waited for.

    `data_wait` is the share of the time in which this process had no batch, `mfu` the share of the devices' peak that
    `flops.FORMULA` counts.
    """
    loss = total_loss(run) / max(1, run.loss_steps)
    norm = grad_norm.item()
    seconds = run.watch.lap()
    check_losses(run)
    speed = run.loss_steps * run.tokens_per_step / seconds if seconds > 0 else 0.0
    values = {
        "step": step,
        "tokens": step * run.tokens_per_step,
        "loss": loss,
        "lr": learning_rate,
        "grad_norm": norm,
        "tokens_per_second": speed,
        "data_wait": min(1.0, waited / seconds) if seconds > 0 else 0.0,
        "train_seconds": run.watch.seconds,
    }
    peak = peak_flops(torch.cuda.get_device_name(run.device)) if run.device.type == "cuda" else None
    if peak is not None:
        needed = speed * flops_per_token(run.model, run.recipe.data.sequence_length)
        values["mfu"] = needed / (peak * run.accelerator.num_processes)
    watts = run.power.lap()
    if watts is not None:
        values["gpu_watts"] = run.accelerator.reduce(torch.tensor(watts, device=run.device), reduction="sum").item()
    if run.pruner is not None:
        values["sparsity"] = run.pruner.sparsity()
    if run.recipe.tracking.pruning and prunes(run.model):
        with run.precision():
            values["pruned_fraction"] = pruned_share(run.model, batch)
    run.loss_sum.zero_()
    run.loss_steps = 0
    write_metrics(run, values)
    run.progress.log(values)


def total_loss(run: Run) -> float:
    """Sum over the steps since the last logged one, mean over all processes, in nats per token."""
    return run.accelerator.reduce(run.loss_sum.clone(), reduction="mean").item()


def check_losses(run: Run) -> None:
    """Stop if a step since the last check went wrong, and write its batch to OUT/offending_step_*.

    Raises:
        UserError: With the step, the files and what to do. No checkpoint holds weights from after that step.
    """
    found = run.guard.check(lambda losses: run.accelerator.reduce(losses, reduction="mean"))
    if found is None:
        return
    name = f"offending_step_{found.step:08d}"
    with contextlib.suppress(OSError):  # the reason to stop is worth more than the batch
        run.guard.save_batch(run.out / f"{name}_process_{run.accelerator.process_index:05d}.safetensors")
    batch = f"The batch of that step is in {run.out / name}_process_*.safetensors."
    if found.expected is None:
        raise diverged(run, found.step, found.loss, found.grad_norm, batch)
    raise UserError(
        f"the loss at step {found.step} jumped to {found.loss:.4f} from {found.expected:.4f}, more than "
        f"run.stop_on_spike {run.recipe.run.stop_on_spike}, with gradient norm {found.grad_norm:.3g}. {batch} "
        f"{newest_checkpoint(run)}. Look at that batch; go on by the same command with a larger run.stop_on_spike or "
        "null, or with a lower optimizer.learning_rate and --allow-recipe-change."
    )


def newest_checkpoint(run: Run) -> str:
    """Where a run that stops would go on, in words."""
    with contextlib.suppress(ckpt.CheckpointError, RuntimeError):  # the save behind it has ended as the run does
        run.checkpoints.wait()
    found = run.checkpoints.all()
    return f"The newest checkpoint is {found[-1].name}" if found else "There is no checkpoint yet"


def diverged(run: Run, step: int, loss: float, norm: float, batch: str = "") -> UserError:
    """The error for a loss that is no number."""
    return UserError(
        f"the loss at step {step} is {loss} with gradient norm {norm}: training has diverged and stops. "
        f"{newest_checkpoint(run)}. {batch}{' ' if batch else ''}"
        "Lower optimizer.learning_rate, or raise schedule.warmup_steps, and use a new run.output_dir."
    )


def write_metrics(run: Run, values: dict[str, Any]) -> None:
    """One line of metrics.jsonl, and the same to the trackers."""
    if run.metrics is not None:
        run.metrics.write(values)
    if run.recipe.tracking.trackers:
        step = values["step"]
        run.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=step)


@torch.no_grad()
def validation_loss(run: Run) -> dict[str, float]:
    """Nats per token and bits per UTF-8 byte over all text tokens of the validation documents."""
    recipe = run.recipe
    length = recipe.evaluation.sequence_length or recipe.data.sequence_length
    rows = recipe.evaluation.batch_size or run.plan.micro_rows
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # nats, tokens
    batches = evaluation_batches(
        run.validation,
        length,
        rows,
        overlap=recipe.evaluation.overlap,
        rank=run.plan.rank,
        processes=run.plan.processes,
    )
    for batch in run.parallel.in_step(batches):
        inputs = run.parallel.local({name: value.to(run.device) for name, value in batch._asdict().items()})
        with run.precision():
            nats = run.model(**inputs, use_cache=False, num_items_in_batch=1).loss
        sums[0] += nats
        sums[1] += (inputs["labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]).ge(0).sum()
    # The processes that share out a matrix have all come to the same sums.
    nats, tokens = (run.accelerator.reduce(sums, reduction="sum") / run.parallel.tensor).tolist()
    return {
        "eval_loss": nats / tokens,
        "eval_bits_per_byte": nats / math.log(2) / run.validation.num_bytes,
        "eval_tokens": int(tokens),
    }


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Validation loss at this step; the best weights so far go to checkpoints/best if the recipe exports them."""
    run.model.eval()
    with run.averaged():
        values = validation_loss(run)
        if not math.isfinite(values["eval_loss"]):
            raise diverged(run, step, values["eval_loss"], math.nan)
        # Until the last weight is pruned, the best weights are not those that were asked for.
        is_final = run.pruner is None or run.pruner.is_final
        is_best = is_final and (run.best is None or values["eval_loss"] < run.best["loss"])
        if is_best:
            run.best = {"step": step, "loss": values["eval_loss"]}
            if run.recipe.checkpoint.export == "best":
                save_best(run)
        # A forward pass of one process alone, or of all where they need each other for it.
        if run.recipe.tracking.heads and has_gates(run.model) and (run.is_main or run.parallel.is_collective):
            watch_heads(run, step)
    run.model.train()
    write_metrics(run, {"step": step, **values, "train_seconds": run.watch.seconds})
    mark = " (best so far)" if is_best else ""
    run.progress.say(
        f"eval step {step}: {values['eval_loss']:.4f} nats/token, {values['eval_bits_per_byte']:.4f} bits/byte{mark}"
    )
    return values


def watch_heads(run: Run, step: int) -> None:
    """Half-life and pruned share of every head on the first validation rows: one line of heads.jsonl."""
    rows = run.recipe.evaluation.batch_size or run.plan.micro_rows
    length = run.recipe.evaluation.sequence_length or run.recipe.data.sequence_length
    batch = next(evaluation_batches(run.validation, length, rows))
    inputs = run.parallel.local({name: value.to(run.device) for name, value in batch._asdict().items()})
    with run.precision():
        observed = observe_heads(run.model, inputs)
    if run.heads is not None:
        run.heads.write({"step": step, **observed})
    if run.recipe.tracking.trackers:
        run.accelerator.log(by_layer(observed), step=step)


def save_best(run: Run) -> None:
    """Weights of the lowest validation loss, and which step they are of."""
    write_tensors, write_parts = tensor_writers(run.model, group=run.parallel.disk_group)

    def write_main(folder: Path) -> None:
        write_tensors(folder)
        ckpt.save_state({"best": run.best}, folder)

    run.checkpoints.save_best(write_main, write_parts, background=run.recipe.checkpoint.background)


def tensor_writers(model, optimizers=(), average=None, *, group) -> tuple[Callable, Callable | None]:
    """What writes weights and optimizers into a folder: by the main process, and by all where they hold parts."""
    if parallel.is_spread(model):
        tensors = sharded.collect(model, optimizers, average)
        return (
            lambda folder: sharded.write_replicated(tensors, folder),
            lambda folder: sharded.Writing(tensors, folder, group()),
        )

    def write_main(folder: Path) -> None:
        ckpt.save_weights(model, folder / "model.safetensors")
        if average:
            ckpt.save_tensors(average, folder / "average.safetensors")
        for number, optimizer in enumerate(optimizers):
            ckpt.save_optimizer(optimizer, folder / f"optimizer_{number}.safetensors")

    return write_main, None


def save(run: Run, step: int, data_state: dict[str, Any]) -> None:
    """Write a resumable checkpoint; never of weights that are no numbers."""
    loss_sum = total_loss(run)
    check_losses(run)
    state = {
        "step": step,
        "processes": run.accelerator.num_processes,
        "fingerprint": run.fingerprint,
        "data": data_state,
        "loss_sum": loss_sum,
        "loss_steps": run.loss_steps,
        "train_seconds": run.watch.seconds,
        "best": run.best,
        "recipe": recipe_to_dict(run.recipe),
    }

    average = None if run.average is None else run.average.state_dict()
    write_tensors, write_parts = tensor_writers(run.model, run.optimizers, average, group=run.parallel.disk_group)
    # Here and not below: where the processes hold parts, all of them must give theirs.
    masks = {} if run.pruner is None else run.pruner.state_dict()

    def write_main(folder: Path) -> None:
        write_tensors(folder)
        if masks:
            ckpt.save_tensors(masks, folder / "sparsity.safetensors")
        ckpt.save_state(state, folder)

    def write_own(folder: Path) -> None:
        ckpt.save_random_state(folder, run.accelerator.process_index, run.device)

    for log_file in (run.metrics, run.heads):
        if log_file is not None:
            log_file.sync()
    run.checkpoints.save(step, write_main, write_own, write_parts, background=run.recipe.checkpoint.background)


def resume(run: Run, allow_recipe_change: bool) -> tuple[int, dict[str, Any] | None]:
    """Load the newest intact checkpoint; returns the steps done and the data position.

    Raises:
        UserError: If the recipe or the data are not those of the checkpoint, or checkpoint.resume forbids it.
    """
    policy = run.recipe.checkpoint.resume
    folder = run.checkpoints.newest(run.accelerator.print)
    if folder is None:
        if policy == "must":
            raise RecipeError(f"checkpoint.resume is must and {run.checkpoints.root} holds no checkpoint. Use auto.")
        return 0, None
    if policy == "never":
        raise RecipeError(f"checkpoint.resume is never and {folder} exists. Use another run.output_dir, or auto.")
    state = ckpt.load_state(folder)
    check_same_run(run, state, allow_recipe_change)
    read_tensors(folder, run.model, run.optimizers, run.average)
    if run.pruner is not None:
        load_masks(run.pruner, folder)
    if not ckpt.load_random_state(folder, run.accelerator.process_index, run.device):
        run.accelerator.print("random state restarted: the checkpoint was written by fewer processes.")
    run.loss_sum.fill_(state["loss_sum"])
    run.loss_steps, run.best = state["loss_steps"], state["best"]
    run.watch.seconds = state["train_seconds"]
    run.accelerator.print(f"resumed from {folder.name}, written by {state['processes']} process(es)")
    if state["data"] is None:
        raise RecipeError(f"{folder} has the position of a stream in an older form. Use another run.output_dir.")
    return state["step"], state["data"]


def read_tensors(folder: Path, model, optimizers=(), average: WeightAverage | None = None) -> None:
    """Inverse of `tensor_writers`, whichever of the two wrote, and on any number of processes."""
    if sharded.is_sharded(folder):
        sharded.read(folder, model, optimizers, average)
        return
    parallel.read_weights(model, folder / "model.safetensors")
    if average is not None:
        whole = ckpt.load_tensors(folder / "average.safetensors")
        average.load_state_dict(parallel.parts_like(whole, average.state_dict()))
    for number, optimizer in enumerate(optimizers):
        parallel.read_optimizer(optimizer, folder / f"optimizer_{number}.safetensors")


def load_masks(pruner: MaskedPruner, folder: Path) -> None:
    """Masks of a checkpoint; one of a dense training, taken with --allow-recipe-change, has none to load."""
    path = folder / "sparsity.safetensors"
    if not path.is_file():
        pruner.step_count = ckpt.load_state(folder)["step"]
        return
    try:
        pruner.load_state_dict(ckpt.load_tensors(path))
    except ValueError as error:
        raise RecipeError(f"sparsity: the masks of {path} are of other weights: {error}") from error


def check_same_run(run: Run, state: dict[str, Any], allow_recipe_change: bool) -> None:
    """Refuse to go on with another model, other data or another optimizer."""
    changes = changed_keys(state["recipe"], recipe_to_dict(run.recipe))
    if not changes and state["fingerprint"] != run.fingerprint:
        changes = [
            f"data fingerprint: {state['fingerprint']} -> {run.fingerprint} (the files or the tokenizer changed)"
        ]
    if changes and not allow_recipe_change:
        raise RecipeError(
            "the recipe is not that of the checkpoint: "
            + "; ".join(changes)
            + ". Use another run.output_dir, or go on "
            "all the same with --allow-recipe-change."
        )
    for change in changes:
        run.accelerator.print(f"recipe changed: {change}")


def should_stop(run: Run) -> bool:
    """Whether any process was told to stop; asked at logged steps only, because the answer takes a round trip."""
    if run.accelerator.num_processes == 1:
        return bool(run.stop_signal)
    flag = torch.tensor(float(run.stop_signal), device=run.device)
    total = run.accelerator.reduce(flag, reduction="sum").item()
    if total and not run.stop_signal:
        run.stop_signal = signal.SIGTERM
    return total > 0


@contextlib.contextmanager
def catch_signals(run: Run):
    """SIGTERM and the first Ctrl-C ask for a checkpoint and a clean end; the second Ctrl-C ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number, frame):
        run.stop_signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(run: Run) -> None:
    """Write OUT/model, which `from_pretrained` loads."""
    run.checkpoints.wait()
    run.accelerator.wait_for_everyone()
    run.model.eval()
    with run.averaged():
        if run.recipe.checkpoint.export == "best":
            run.checkpoints.verify(run.checkpoints.best)
            read_tensors(run.checkpoints.best, run.model)
        # All that hold a part give theirs.
        weights = parallel.whole_weights(run.model, keep=run.is_main) if parallel.is_spread(run.model) else None
        if run.is_main:
            export_model(run.model, run.tokenizer, run.out / "model", weights)
    if not run.is_main:
        return
    write_card(run.out)
    which = f"step {run.best['step']}, the best" if run.recipe.checkpoint.export == "best" else "the last step"
    run.progress.say(f"saved {run.out / 'model'} ({which}) after {run.watch.seconds:.1f} s of training")


if __name__ == "__main__":
    sys.exit(main())
