"""Tokenise the data of a recipe into shards, once, on all cores: `python -m fox_training.prepare`."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pickle
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .commands import command_parser, errors_of_the_user

# The worker processes import this module too: what is slow to import is imported where it is used.
from .shard_worker import start_worker, write_file, write_shard

USAGE = "--recipe FILE --output FOLDER [options] [--section.field VALUE ...]"
DESCRIPTION = """\
Tokenise the data of a recipe into shards that training maps into memory.

Prepare:       python -m fox_training.prepare --recipe training/recipes/python_files.yaml --output data/python
Train on it:   python -m fox_training.train --recipe R --data.source shards --data.path data/python
Check it:      python -m fox_training.prepare --recipe training/recipes/python_files.yaml --output data/python --verify

Every shard appears under its final name when it is complete. Started again, the command goes on behind the shards that
are there; --verify also compares them with their SHA-256 and writes the damaged ones again. Dotted options change
fields of the recipe. Only its `data` section is read, of which the rows' length and the batch play no part.
"""

FORMAT = 1
# What decides the tokens; the rest of the data section may differ between preparing and training.
_UNUSED = ("sequence_length", "reset_at_documents", "shift_each_epoch", "batch_size", "micro_batch_size", "workers",
           "shuffle_block", "cache_dir", "exclude_shards", "verify_shards")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("prepare", DESCRIPTION, USAGE)
    add = parser.add_argument
    add("--recipe", type=Path, metavar="FILE", help="recipe whose data section is prepared")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of the shards")
    add("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    add("--shard-bytes", type=int, default=64 * 2**20, metavar="N", help="bytes of text in a shard (default: 64 MiB)")
    add("--verify", action="store_true", help="compare finished shards with their SHA-256, write damaged ones again")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    from .recipe import load_recipe

    args, overrides = parser().parse_known_args(argv)
    with errors_of_the_user(parser()):
        recipe = load_recipe(args.recipe, overrides)
        described = prepare(
            recipe, args.output, workers=args.workers, shard_bytes=args.shard_bytes, verify=args.verify, say=print
        )
    print(summary(described, args.output))
    return 0


def prepare(
    recipe: Any, folder: Path, *, workers: int | None = None, shard_bytes: int = 64 * 2**20, verify: bool = False,
    say: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the shards of a recipe, or what is missing of them.

    Args:
        recipe: See `recipe.Recipe`; its `data` section is read.
        folder: Where to.
        workers: Processes; None takes one for each core this process may use.
        shard_bytes: UTF-8 bytes of text after which a shard ends.
        verify: Compare finished shards with their SHA-256.
        say: Called with one line every few seconds.

    Returns:
        What prepared.json holds.

    Raises:
        RecipeError: If the data cannot be read, the folder is one of other data, the disk refuses or a worker dies.
            Finished shards stay.
    """
    from .data import load_documents
    from .recipe import RecipeError, reads_shards
    from .tokenizers import document_token_id, is_all_backend, tokenizer_hash, whole_texts

    if recipe.data.source == "mixture" or reads_shards(recipe.data):
        raise RecipeError(f"prepare takes one source of text; got {recipe.data.source}. Prepare each part by itself.")
    if shard_bytes < 1:
        raise RecipeError(f"--shard-bytes must be at least 1; got {shard_bytes}. The default is 64 MiB.")
    if workers is not None and workers < 1:
        raise RecipeError(f"--workers must be at least 1; got {workers}. Leave it out for one process on each core.")
    began = time.monotonic()
    folder = folder.expanduser()
    train, validation = load_documents(recipe.data)
    _check_plan(folder, recipe, shard_bytes, train)
    tokenizer = _tokenizer(recipe, train, folder)
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    workers = workers or _cores()
    if is_all_backend(tokenizer):
        with whole_texts(tokenizer) as backend:
            portable = backend.to_str()
    else:
        portable = pickle.dumps(tokenizer)
    splits = {}
    with _pool(workers, (portable, document_token_id(tokenizer), dtype)) as pool:
        for split, documents in (("train", train), ("validation", validation)):
            if documents is not None:
                writer = _Writer(folder, split, shard_bytes, verify, pool, workers, say)
                splits[split] = writer.write(documents)
    if not splits["train"]:
        raise RecipeError("the data holds no text: all documents are empty. Check data.path and data.text_column.")
    described = {
        "format": FORMAT,
        "tokenizer": {"hash": tokenizer_hash(tokenizer), "tokens": len(tokenizer)},
        "splits": splits,
        "seconds": round(time.monotonic() - began, 1),
        "workers": workers,
    }
    write_file(folder / "prepared.json", json.dumps(described, indent=1).encode())
    return described


def summary(described: dict[str, Any], folder: Path) -> str:
    """One line for each split, and how long it took."""
    lines = []
    for split, shards in described["splits"].items():
        total = {key: sum(shard[key] for shard in shards) for key in ("documents", "bytes", "tokens")}
        lines.append(
            f"{split:<10} {len(shards)} shards, {total['documents']:,} documents, {total['bytes']:,} bytes, "
            f"{total['tokens']:,} tokens"
        )
    lines.append(f"prepared {folder} in {described['seconds']} s with {described['workers']} processes")
    return "\n".join(lines)


class _Writer:
    """The shards of one split: this process reads the documents, the pool tokenises and writes."""

    def __init__(self, folder: Path, split: str, shard_bytes: int, verify: bool, pool: ProcessPoolExecutor,
                 workers: int, say: Any):  # fmt: skip
        self.folder, self.split, self.shard_bytes, self.verify = folder, split, shard_bytes, verify
        self.pool, self.say = pool, say
        self.ahead = workers + 1
        self.waiting: collections.deque[Future] = collections.deque()
        self.found: dict[str, dict[str, Any]] = {}
        self.told = time.monotonic()

    def write(self, documents: Any) -> list[dict[str, Any]]:
        from .recipe import RecipeError

        try:
            self._write(_Reader(documents))
            return [self.found[name] for name in sorted(self.found)]
        except BrokenProcessPool as error:
            raise RecipeError(
                f"a process that tokenised {self.split} died, probably for lack of memory. Start the same command "
                "again, with fewer --workers: finished shards stay."
            ) from error
        except OSError as error:
            raise RecipeError(
                f"shards cannot be written to {self.folder}: {error}. Mend that and start the same command again: "
                "finished shards stay."
            ) from error
        finally:
            for future in self.waiting:
                future.cancel()

    def _write(self, reader: _Reader) -> None:
        position, number = reader.start, 0
        while True:
            name = f"{self.split}-{number:05d}"
            number += 1
            done = self._finished(name)
            if done is not None:
                self.found[name], position = done, done["following"]
                continue
            texts, position = reader.read(position, self.shard_bytes)
            if not texts:
                break
            self.waiting.append(self.pool.submit(write_shard, str(self.folder), name, texts, position))
            self._collect(self.ahead)
        self._collect(0)

    def _finished(self, name: str) -> dict[str, Any] | None:
        from .shards import damage

        try:
            described = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        reason = damage(self.folder / f"{name}.safetensors", described, self.verify)
        if reason and self.say:
            self.say(f"{name} is written again: {reason}")
        return None if reason else described

    def _collect(self, allowed: int) -> None:
        from .recipe import RecipeError

        while len(self.waiting) > allowed:
            try:
                described = self.waiting.popleft().result()
            except (OSError, BrokenProcessPool):
                raise
            except Exception as error:  # tokenizers raises a bare Exception
                raise RecipeError(f"the text cannot be tokenised: {error}") from error
            self.found[described["name"]] = described
            if self.say and time.monotonic() - self.told > 10:
                self.told = time.monotonic()
                size = sum(shard["bytes"] for shard in self.found.values())
                self.say(f"{self.split}: {len(self.found)} shards, {size:,} bytes of text")


class _Reader:
    """Documents from any position on. A position is a row number, or the state of an `IterableDataset`."""

    def __init__(self, documents: Any):
        self.documents = documents
        self.is_stream = not hasattr(documents, "select")
        self.start = None if self.is_stream else 0
        self._at: Any = self.start
        self._rows: Iterator[dict[str, Any]] | None = None

    def read(self, position: Any, num_bytes: int) -> tuple[list[str], Any]:
        """Documents of at least `num_bytes` UTF-8 bytes, or what is left, and the position behind them."""
        from .data import kept_texts

        if self._rows is None or position != self._at:
            self._rows = self._from(position)
        texts, size, count = [], 0, 0
        while size < num_bytes:
            row = next(self._rows, None)
            if row is None:
                break
            count += 1
            for text in kept_texts([row["text"]]):
                texts.append(text)
                size += len(text.encode())
        self._at = self.documents.state_dict() if self.is_stream else position + count
        return texts, self._at

    def _from(self, position: Any) -> Iterator[dict[str, Any]]:
        if self.is_stream:
            if position is not None:
                self.documents.load_state_dict(position)
            return iter(self.documents)
        return self._map_rows(position)

    def _map_rows(self, position: int) -> Iterator[dict[str, Any]]:
        if position == len(self.documents):
            return
        rest = self.documents.select(range(position, len(self.documents))).select_columns(["text"])
        for batch in rest.iter(256):
            yield from ({"text": text} for text in batch["text"])


def _check_plan(folder: Path, recipe: Any, shard_bytes: int, documents: Any) -> None:
    """Refuse a folder that holds, or was meant to hold, other data."""
    from .recipe import RecipeError

    data = {key: value for key, value in dataclasses.asdict(recipe.data).items() if key not in _UNUSED}
    count = len(documents) if hasattr(documents, "select") else None
    plan = {"format": FORMAT, "shard_bytes": shard_bytes, "documents": count, "data": data}
    path = folder / "plan.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, json.dumps(plan, indent=1).encode())
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--output must be a folder that can be written to; got {folder} ({error}).") from error
    flat = lambda tree: {**tree, **tree["data"], **{f"tokenizer.{k}": v for k, v in tree["data"]["tokenizer"].items()}}  # noqa: E731
    old, new = flat(before), flat(plan)
    changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new} - {"data", "tokenizer"})
               if old.get(k) != new.get(k)]  # fmt: skip
    if changed:
        raise RecipeError(f"{folder} holds shards of other data: {'; '.join(changed)}. Use another --output.")


def _tokenizer(recipe: Any, documents: Iterable[Any], folder: Path) -> Any:
    """The tokenizer in the folder, or a new one that is put there."""
    from .checkpoint import write_folder
    from .data import build_tokenizer
    from .tokenizers import hub_tokenizer, save_tokenizer

    place = folder / "tokenizer"
    if not place.is_dir():
        tokenizer = build_tokenizer(recipe, documents)
        write_folder(place, lambda work: save_tokenizer(tokenizer, work), manifest=False)
    return hub_tokenizer(str(place))


def _pool(workers: int, arguments: tuple) -> ProcessPoolExecutor:
    import multiprocessing

    # forkserver: this process has threads by now, with which a plain fork can deadlock.
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    return ProcessPoolExecutor(workers, context, start_worker, arguments)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
