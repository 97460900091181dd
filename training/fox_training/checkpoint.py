"""Checkpoints that are either complete or not there.

    OUT/checkpoints/step_00000100/
        model.safetensors            weights
        average.safetensors          running mean of the weights, if there is one
        sparsity.safetensors         masks of the weights, if there are any
        optimizer_0.safetensors      state of each optimizer
        parts/, replicated.safetensors   in place of the first, second and fourth where weights are spread (sharded.py)
        rng_00000.safetensors        random state of each process
        state.json                   step, data position, recipe, best validation loss
        manifest.json                size and SHA-256 of every file; written last

A checkpoint is written to `*.tmp`, every file is flushed to disk, and one rename makes it visible: whatever kills the
process, a folder without `.tmp` is complete. Older ones are deleted after the rename, never before. Flushing, hashing
and renaming may happen in a thread while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from .recipe import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
_PREFIX = "step_"
_TEMPORARY = ".tmp"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


def write_folder(final: Path, write: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Create folder `final` with what `write(folder)` puts into it, in one visible step; replaces an older `final`.

    Args:
        final: The folder.
        write: Puts files into the folder it is given.
        manifest: Add manifest.json, for `verify_folder`.

    Raises:
        CheckpointError: If the disk refuses; `final` is then as it was before.
    """
    work = final.with_name(final.name + _TEMPORARY)
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write(work)
        if manifest:
            seal_folder(work)
        else:
            _fsync_all(work)
        _replace(work, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(_cannot_write(final, error)) from error


def seal_folder(folder: Path, known: dict[str, dict[str, Any]] | None = None) -> None:
    """Write the manifest and push every byte to the disk; `known` has the entries of files that were already read."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    names = {p.relative_to(folder).as_posix(): p for p in files}
    manifest = {name: (known or {}).get(name) or manifest_entry(p) for name, p in names.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _fsync_all(folder)


def manifest_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def verify_folder(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check every file against the manifest.

    Args:
        folder: With a manifest.
        share: Which process of how many: each reads its share of the files, and all look at all sizes.

    Raises:
        CheckpointError: Naming the first file that is missing, short or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for number, (name, known) in enumerate(manifest.items()):
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing.")
            if path.stat().st_size != known["bytes"]:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {known['bytes']}.")
            if number % share[1] == share[0] and _sha256(path) != known["sha256"]:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of the manifest.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}.") from error


@dataclass(frozen=True)
class Processes:
    """Those that write and read checkpoints together.

    Attributes:
        rank: Of this one; the main process is 0.
        count: How many there are.
        barrier: Waits for all.
        gather: Takes a list of one object, returns those of all.
    """

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None
    gather: Callable[[list[Any]], list[Any]] = lambda own: own


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        root: OUT/checkpoints.
        keep_last: Newest checkpoints that stay.
        processes: Of the run; default: this one alone.
    """

    def __init__(self, root: Path, keep_last: int, processes: Processes | None = None):
        self.root, self.keep_last, self.processes = root, keep_last, processes or Processes()
        self.best = root / "best"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fox-checkpoint")
        self._pending: tuple[Path, Future] | None = None

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [p for p in self.root.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
        return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """Newest checkpoint whose files are all intact; says which ones it passes over. Every process calls this.

        Raises:
            CheckpointError: If there are checkpoints and none is intact: starting over silently would lose the run.
        """
        found = self.all()
        for path in reversed(found):
            try:
                self.verify(path)
                return path
            except CheckpointError as error:
                say(f"checkpoint {path.name} is not usable: {error} Trying the one before it.")
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self.root} is intact. "
                "Restore one of them, or move the folder away to start over."
            )
        return None

    def verify(self, folder: Path) -> None:
        """`verify_folder` shared out among the processes; every process calls this.

        Raises:
            CheckpointError: On every process, if one of them found something.
        """
        reason = None
        try:
            verify_folder(folder, (self.processes.rank, self.processes.count))
        except CheckpointError as error:
            reason = str(error)
        reasons = [reason for reason in self.processes.gather([reason]) if reason is not None]
        if reasons:
            raise CheckpointError(reasons[0])

    def save(self, step: int, write_main: Callable[[Path], None], write_own: Callable[[Path], None],
             write_parts: Callable[[Path], Any] | None = None, *, background: bool = False) -> Path:  # fmt: skip
        """Write the checkpoint of `step`; every process calls this.

        Args:
            step: Optimizer steps done.
            write_main: Writes what is the same on all processes; called on the main process only.
            write_own: Writes the files of this process, under names of its own.
            write_parts: Begins to write this process's parts of what is spread; returns a `sharded.Writing`.
            background: Return when the files are written, or begun, and let a thread make them durable and visible.

        Raises:
            CheckpointError: If the disk refuses, this time or behind the save before it; the checkpoints before this
                one are untouched.
        """
        return self._write(self.root / f"{_PREFIX}{step:08d}", write_main, write_own, write_parts, background)

    def save_best(self, write_main: Callable[[Path], None], write_parts: Callable[[Path], Any] | None = None,
                  *, background: bool = False) -> Path:  # fmt: skip
        """The same for checkpoints/best, which is replaced."""
        return self._write(self.best, write_main, lambda folder: None, write_parts, background)

    def _write(self, final, write_main, write_own, write_parts, background) -> Path:
        self.wait()
        is_main, barrier = self.processes.rank == 0, self.processes.barrier
        work = final.with_name(final.name + _TEMPORARY)
        try:
            if is_main:
                for stale in self.root.glob(f"*{_TEMPORARY}"):
                    shutil.rmtree(stale, ignore_errors=True)
                work.mkdir(parents=True)
            barrier()
            write_own(work)
            if is_main:
                write_main(work)
            barrier()
            writing = None if write_parts is None else write_parts(work)
            if is_main or writing is not None:
                self._pending = final, self._thread.submit(self._complete, work, final, writing)
            if not background:
                self.wait()
                barrier()
        except (OSError, SafetensorError) as error:
            if is_main:
                shutil.rmtree(work, ignore_errors=True)
            raise CheckpointError(_cannot_write(final, error)) from error
        return final

    def wait(self) -> None:
        """Wait for the save in the background.

        Raises:
            CheckpointError: If it failed.
        """
        if self._pending is None:
            return
        (final, future), self._pending = self._pending, None
        try:
            future.result()
        except (OSError, SafetensorError) as error:
            if self.processes.rank == 0:
                shutil.rmtree(final.with_name(final.name + _TEMPORARY), ignore_errors=True)
            raise CheckpointError(_cannot_write(final, error)) from error

    def close(self) -> None:
        """Let the save in the background end, whatever comes of it."""
        self._thread.shutdown(wait=True)

    def _complete(self, work: Path, final: Path, writing: Any) -> None:
        """Everything behind the last byte: hashes, manifest, rename. With parts, every process is here at once."""
        failed = None
        try:
            known = {} if writing is None else writing.finish()
            if self.processes.rank == 0:
                seal_folder(work, known)
                _replace(work, final)
                self._prune()
        except OSError as error:
            failed = error
        if writing is not None:
            failed = writing.tell(failed) or failed
        if failed is not None:
            raise failed

    def _prune(self) -> None:
        for old in self.all()[: -self.keep_last]:
            # Renamed first: a process that dies inside rmtree leaves no half checkpoint under a valid name.
            doomed = old.with_name(old.name + ".old" + _TEMPORARY)
            os.rename(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def save_weights(model: nn.Module, path: Path) -> None:
    """Weights as safetensors; tied ones are stored once."""
    save_model(model, str(path))


def load_weights(model: nn.Module, path: Path) -> None:
    """Inverse of `save_weights`.

    Raises:
        CheckpointError: If the file is not of this model.
    """
    try:
        load_model(model, str(path), device="cpu")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the model: {str(error).strip().splitlines()[0]}") from error


def save_tokenizer_and_model(
    model: nn.Module, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """What `from_pretrained` loads: config, weights as safetensors (or those given), tokenizer."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """State of every weight as safetensors; hyper-parameters come from the recipe, not from here.

    Numbers stay tensors. What is nested (Kron keeps lists of factors) and what is text stand in the file's metadata,
    with the counters that some optimizers keep in their groups.
    """
    tensors: dict[str, torch.Tensor] = {}
    held = optimizer.state_dict()
    shape = {
        str(index): {name: _take_out(value, f"{index}.{name}", tensors) for name, value in slot.items()}
        for index, slot in held["state"].items()
    }
    counters = [{name: group[name] for name in _COUNTERS if name in group} for group in held["param_groups"]]
    save_file(tensors, str(path), {"state": json.dumps(shape), "counters": json.dumps(counters)})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Inverse of `save_optimizer`, for an optimizer over the same weights.

    Raises:
        CheckpointError: If the file cannot be read or is of other weights.
    """
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
        whole = optimizer.state_dict()
        if "state" in about:
            shape = json.loads(about["state"])
            whole["state"] = {int(i): {n: _put_back(v, tensors) for n, v in slot.items()} for i, slot in shape.items()}
            for group, counters in zip(whole["param_groups"], json.loads(about["counters"]), strict=True):
                group.update(counters)
        else:  # written by `save_tensors`, or before there was a shape
            whole["state"] = {}
            for key, value in tensors.items():
                index, _, name = key.partition(".")
                whole["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(whole)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit the optimizer: {error}") from error


_COUNTERS = ("step", "update_counter")


def _take_out(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of a nested value to `tensors`; returns what JSON can hold, with their names in their place."""
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take_out(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]}
    if value is None or isinstance(value, str):
        return {"value": value}
    tensors[name] = _tensor(value)
    return {"tensor": name}


def _put_back(shape: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = shape.items()
    if kind in ("list", "tuple"):
        items = [_put_back(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return tensors[content] if kind == "tensor" else content


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Named tensors as safetensors."""
    save_file({name: _tensor(value) for name, value in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Inverse of `save_tensors`.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def save_random_state(folder: Path, rank: int, device: torch.device) -> None:
    """Random state of this process. The order of the data has none: it is a function of the seed."""
    # NumPy's global state too: pytorch_optimizer's Kron draws from it.
    _, keys, place, *_ = np.random.get_state()
    tensors = {"cpu": torch.get_rng_state(), "numpy": torch.tensor([*keys.tolist(), place])}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    save_file(tensors, str(folder / f"rng_{rank:05d}.safetensors"))


def load_random_state(folder: Path, rank: int, device: torch.device) -> bool:
    """Restore it; False if the checkpoint has none for this process (it was written by fewer)."""
    path = folder / f"rng_{rank:05d}.safetensors"
    if not path.is_file():
        return False
    tensors = load_file(str(path))
    torch.set_rng_state(tensors["cpu"])
    if "numpy" in tensors:
        *keys, place = tensors["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, 0, 0.0))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    return True


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Everything of a run that is no tensor, as JSON. Floats come back bit for bit."""
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """Inverse of `save_state`."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def _tensor(value: Any) -> torch.Tensor:
    value = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return value.detach().contiguous().cpu()


def _replace(work: Path, final: Path) -> None:
    """Rename `work` to `final`. An older `final` is moved aside first: a folder cannot be renamed onto another."""
    old = final.with_name(final.name + ".old" + _TEMPORARY)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(work, final)
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _cannot_write(final: Path, error: Exception) -> str:
    return f"{final} cannot be written: {error}. What was saved before is intact; mend the disk and start again."
