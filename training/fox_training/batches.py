"""Rows of fixed length, and which row goes into which batch of which process.

Letters: N tokens in the stream, L tokens in a row, G rows in an optimizer step over all processes.

A row has L tokens and L - 1 targets, because the model shifts the labels itself; rows therefore overlap by one token
and every token is a target once an epoch. The stream is taken as a ring: behind its end stands its first document.

Map mode: row i of the whole run is a pure function of (seed, epoch, index). Step s takes rows s G to (s + 1) G, a
process a contiguous slice of them: any number of processes trains on the same global batches, and nothing but a
counter is saved.

Streaming mode: each process reads the whole stream, packs it, permutes blocks of rows and keeps its own rows of each
step. So here, too, any number of processes trains on the same global batches; the price is that each tokenises
everything, which `prepare` spares. The saved state is the position of the stream at the start of the block and the row
inside it: a resumed run reads the block again and loses nothing.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import multiprocessing
import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from .data import kept_texts, reason
from .recipe import DataRecipe, RecipeError
from .token_stream import TokenStream
from .tokenizers import document_token_id, encode_documents

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
_TEXTS_AT_ONCE = 32
"""Documents that are tokenised together, which `tokenizers` does on several cores."""


class Row(NamedTuple):
    """`tokens` and `positions`, both `(L,)` int64; a position of 0 starts a document (and every row)."""

    tokens: np.ndarray
    positions: np.ndarray


def positions_from_starts(starts: np.ndarray, length: int) -> np.ndarray:
    """Position of each of `length` tokens in its document, given where documents start in the row; 0 is always one."""
    index = np.arange(length)
    begin = np.zeros(length, dtype=np.int64)
    begin[starts] = starts
    return index - np.maximum.accumulate(begin)


class PackedRows:
    """Rows of a `TokenStream` by their index in the whole run.

    Args:
        stream: Tokenised documents.
        length: L, tokens in a row.
        seed: Seed of the order.
        reset: Restart positions at documents.
        shift: Cut at another offset in each epoch.
        shuffle: Permute the rows of each epoch.

    Raises:
        RecipeError: If the stream is shorter than a row.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int, *, reset: bool = True, shift: bool = True,
                 shuffle: bool = True):  # fmt: skip
        if len(stream.tokens) < length:
            raise RecipeError(
                f"data.sequence_length must be at most the {len(stream.tokens)} tokens of the training data; "
                f"got {length}."
            )
        self.stream, self.length, self.seed = stream, length, seed
        self.reset, self.shift, self.shuffle = reset, shift, shuffle
        self.rows_per_epoch = max(1, len(stream.tokens) // (length - 1))
        self._epoch = -1
        self._order: np.ndarray | None = None
        self._offset = 0

    def row(self, index: int) -> Row:
        """Row `index` of the run, counted over all epochs."""
        epoch, inside = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        begin = self._offset + int(self._order[inside]) * (self.length - 1)
        return self._cut(begin % len(self.stream.tokens))

    def _start_epoch(self, epoch: int) -> None:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = generator.permutation(self.rows_per_epoch)
        self._order = order if self.shuffle else np.arange(self.rows_per_epoch)
        self._offset = int(generator.integers(self.length - 1)) if self.shift else 0
        self._epoch = epoch

    def _cut(self, begin: int) -> Row:
        stream, length, total = self.stream, self.length, len(self.stream.tokens)
        end = begin + length
        tokens = np.asarray(stream.tokens[begin:end])
        starts = self._starts_between(begin, min(end, total)) - begin
        if end > total:  # over the seam of the ring, where the first document begins
            tokens = np.concatenate([tokens, stream.tokens[: end - total]])
            starts = np.concatenate([starts, self._starts_between(0, end - total) + total - begin])
        if not self.reset:
            starts = starts[:0]
        return Row(tokens.astype(np.int64), positions_from_starts(starts, length))

    def _starts_between(self, begin: int, end: int) -> np.ndarray:
        low, high = np.searchsorted(self.stream.starts, [begin, end])
        return self.stream.starts[low:high]


class StreamedRows:
    """Rows of an `IterableDataset`, in order, with a state that resumes exactly.

    Args:
        documents: With a `text` column.
        tokenizer: Its document token stands before each document.
        length: L, tokens in a row.
        seed: Seed of the order inside blocks.
        block: Rows that are permuted among each other.
        reset: Restart positions at documents.
    """

    def __init__(self, documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, *,
                 block: int = 1, reset: bool = True):  # fmt: skip
        self.documents, self.tokenizer = documents, tokenizer
        self.length, self.seed, self.block, self.reset = length, seed, block, reset
        self._start = {"block": 0, "epoch": 0, "source": None, "used": 0, "tokens": [], "starts": []}

    def iterate(self, state: dict[str, Any] | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Pairs of a row and the state from which the row after it comes next, without end.

        Raises:
            RecipeError: If a whole epoch gives no row.
        """
        position = copy.deepcopy(state["start"]) if state else copy.deepcopy(self._start)
        skip = state["row"] if state else 0
        packer = _Packer(self, position)
        while True:
            start = packer.state()
            rows = [packer.next_row() for _ in range(self.block)]
            order = np.random.Generator(np.random.PCG64([self.seed, start["block"]])).permutation(self.block)
            packer.blocks += 1
            after = packer.state()
            for index in range(skip, self.block):
                done = index + 1 == self.block
                yield rows[order[index]], {"start": after if done else start, "row": 0 if done else index + 1}
            skip = 0


class _Packer:
    """Turns documents into rows; between rows its `state` is small and complete.

    Documents are read and tokenised a few at a time. `_before` is the position of the source in front of those that
    are at hand, `_used` how many of them are already packed.
    """

    def __init__(self, owner: StreamedRows, state: dict[str, Any]):
        self.owner = owner
        self.epoch, self.blocks = state["epoch"], state["block"]
        self.tokens, self.starts = list(state["tokens"]), list(state["starts"])
        # Before the state: `datasets` ignores a state of another epoch without a word.
        owner.documents.set_epoch(self.epoch)
        if state["source"] is not None:
            owner.documents.load_state_dict(state["source"])
        self._source = iter(owner.documents)
        self._read_any = bool(state["source"])
        self._ids: list[list[int]] = []
        self._used = 0
        self._before = state["source"]
        self._moved = False  # whether this source has been read from since `_before`
        if state["used"]:
            self._fetch()
            self._used = state["used"]

    def state(self) -> dict[str, Any]:
        return {
            "block": self.blocks,
            "epoch": self.epoch,
            "source": copy.deepcopy(self._before),
            "used": self._used,
            "tokens": list(self.tokens),
            "starts": list(self.starts),
        }

    def next_row(self) -> Row:
        length = self.owner.length
        while len(self.tokens) < length:
            self._next_document()
        tokens = np.array(self.tokens[:length], dtype=np.int64)
        starts = np.array([s for s in self.starts if s < length] if self.owner.reset else [], dtype=np.int64)
        self.tokens = self.tokens[length - 1 :]
        self.starts = [s - length + 1 for s in self.starts if s >= length - 1]
        return Row(tokens, positions_from_starts(starts, length))

    def _next_document(self) -> None:
        while self._used == len(self._ids):
            self._fetch()
        self.starts.append(len(self.tokens))
        self.tokens.append(document_token_id(self.owner.tokenizer))
        self.tokens.extend(self._ids[self._used])
        self._used += 1

    def _fetch(self) -> None:
        """The next few documents, of one epoch."""
        if self._moved:
            self._before = copy.deepcopy(self.owner.documents.state_dict())
        try:
            rows = list(itertools.islice(self._source, _TEXTS_AT_ONCE))
        except Exception as error:  # network, broken files: each has its own class
            raise RecipeError(
                f"data.streaming cannot read on: {reason(error)} The same command goes on from the newest checkpoint."
            ) from error
        self._moved = True
        if not rows:
            if not self._read_any:
                raise RecipeError("data.streaming found no text. Check data.path and data.text_column.")
            self.epoch += 1
            self.owner.documents.set_epoch(self.epoch)
            self._source = iter(self.owner.documents)
            self._read_any = self._moved = False
            self._before = None
        texts = kept_texts(row["text"] for row in rows)
        self._read_any = self._read_any or bool(texts)
        self._ids = list(encode_documents(self.owner.tokenizer, texts)) if texts else []
        self._used = 0


class Plan(NamedTuple):
    """How an optimizer step is cut up: `rows` over all processes = micro_rows x accumulation x processes."""

    rows: int
    micro_rows: int
    accumulation: int
    rank: int
    processes: int


def plan_batches(recipe: DataRecipe, rank: int, processes: int) -> Plan:
    """Rows per forward pass and accumulation steps.

    Raises:
        RecipeError: If the batch does not divide evenly.
    """
    if recipe.batch_size % processes:
        raise RecipeError(f"data.batch_size must be a multiple of the {processes} processes; got {recipe.batch_size}.")
    local = recipe.batch_size // processes
    micro = recipe.micro_batch_size or local
    # Asked for more at once than one process has: that is no accumulation.
    micro = min(micro, local)
    if local % micro:
        raise RecipeError(
            f"data.micro_batch_size must divide the {local} rows of a process (data.batch_size {recipe.batch_size} "
            f"over {processes} processes); got {micro}."
        )
    return Plan(recipe.batch_size, micro, local // micro, rank, processes)


class RowsByIndex(Protocol):
    """Map mode: `PackedRows` or `MixedRows`."""

    def row(self, index: int) -> Row: ...


class RowsInOrder(Protocol):
    """Streaming mode: `StreamedRows` or `MixedStream`."""

    def iterate(self, state: dict[str, Any] | None = None) -> Iterator[tuple[Row, dict[str, Any]]]: ...


class Batches:
    """Optimizer steps of one process, prepared by a thread or by processes while the device works.

    Iterating gives lists of micro-batches, dicts of `(rows, L)` int64 tensors `input_ids`, `position_ids`, `labels` on
    `device`. `state_dict()` is the position after the step that was given out last, not that of the workers.

    Args:
        rows: In either mode.
        plan: See `plan_batches`.
        device: Where the tensors go; from pinned memory and without waiting on CUDA.
        state: What `state_dict` returned, on any number of processes.
        ahead: Steps that may be ready in advance.
        workers: Processes that prepare steps; 0 = a thread of this process. In streaming mode one is all that helps.
    """

    def __init__(self, rows: RowsByIndex | RowsInOrder, plan: Plan, device: torch.device, state: dict | None = None,
                 ahead: int = 4, workers: int = 0):  # fmt: skip
        self.rows, self.plan, self.device = rows, plan, device
        self._state = state or {"rows": 0}
        self._waited = 0.0
        pin = device.type == "cuda"
        if workers and "fork" in multiprocessing.get_all_start_methods():
            self._items = _Processes(_Steps(rows, plan, self._state), workers, ahead, pin)
        else:
            self._items = _Thread(_Steps(rows, plan, self._state), ahead, pin)

    def __iter__(self):
        return self

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        began = time.perf_counter()
        parts, state = self._items.get()
        self._waited += time.perf_counter() - began
        self._state = json.loads(state)
        moved = [{k: v.to(self.device, non_blocking=True) for k, v in part.items()} for part in parts]
        return [part | {"labels": part["input_ids"]} for part in moved]

    def waited(self) -> float:
        """Seconds that `next` has waited for data since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready position, the same on all processes."""
        return self._state

    def close(self) -> None:
        """Stop the thread or the processes."""
        self._items.close()


class _Steps(torch.utils.data.IterableDataset):
    """Pairs of the micro-batches of a step, in host memory, and the position behind it as JSON."""

    def __init__(self, rows: RowsByIndex | RowsInOrder, plan: Plan, state: dict[str, Any]):
        self.rows, self.plan, self.state = rows, plan, state
        self.by_index = hasattr(rows, "row")

    def __iter__(self) -> Iterator[tuple[list[dict[str, torch.Tensor]], str]]:
        worker = torch.utils.data.get_worker_info()
        every, first = (worker.num_workers, worker.id) if worker else (1, 0)
        steps = self._by_index(every, first) if self.by_index else self._in_order()
        for rows, state in steps:
            yield self._cut(rows), json.dumps(state)

    def _by_index(self, every: int, first: int) -> Iterator[tuple[list[Row], dict[str, Any]]]:
        plan, local = self.plan, self.plan.rows // self.plan.processes
        for step in itertools.count(first, every):
            begin = self.state["rows"] + step * plan.rows
            mine = begin + plan.rank * local
            yield [self.rows.row(i) for i in range(mine, mine + local)], {"rows": begin + plan.rows}

    def _in_order(self) -> Iterator[tuple[list[Row], dict[str, Any]]]:
        plan, local = self.plan, self.plan.rows // self.plan.processes
        source, count = self.rows.iterate(self.state.get("stream")), self.state["rows"]
        while True:
            pairs = [next(source) for _ in range(plan.rows)]
            count += plan.rows
            mine = pairs[plan.rank * local : (plan.rank + 1) * local]
            yield [row for row, _ in mine], {"rows": count, "stream": pairs[-1][1]}

    def _cut(self, rows: list[Row]) -> list[dict[str, torch.Tensor]]:
        size = self.plan.micro_rows
        parts = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        return [
            {
                "input_ids": torch.from_numpy(np.stack([row.tokens for row in part])),
                "position_ids": torch.from_numpy(np.stack([row.positions for row in part])),
            }
            for part in parts
        ]


class _Thread:
    """Prepares steps in a thread: NumPy and the tokenizers let go of the interpreter where they work long."""

    def __init__(self, steps: _Steps, ahead: int, pin: bool):
        self._steps, self._pin = steps, pin
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="fox-batches")
        self._thread.start()

    def get(self) -> tuple[list[dict[str, torch.Tensor]], str]:
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(timeout=5)

    def _fill(self) -> None:
        try:
            for parts, state in self._steps:
                if self._pin:
                    parts = [{name: value.pin_memory() for name, value in part.items()} for part in parts]
                while not self._stop.is_set():
                    try:
                        self._queue.put((parts, state), timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
        except Exception as error:  # given to the training loop, which raises it
            self._queue.put(error)


class _Processes:
    """Prepares steps in worker processes: worker w of W takes steps w, w + W, ...; they come out in order."""

    def __init__(self, steps: _Steps, workers: int, ahead: int, pin: bool):
        workers = workers if steps.by_index else 1
        self._loader = iter(
            torch.utils.data.DataLoader(
                _Reporting(steps),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=max(2, -(-ahead // workers)),
                pin_memory=pin,
                multiprocessing_context="fork",
                # A generator of its own: the loader would otherwise draw from the one that dropout draws from.
                generator=torch.Generator(),
            )
        )

    def get(self) -> tuple[list[dict[str, torch.Tensor]], str]:
        try:
            item = next(self._loader)
        except RuntimeError as error:  # a worker was killed: PyTorch's message says which and by what signal
            raise RecipeError(
                f"a process of data.workers died: {str(error).splitlines()[0]} Start the same command again; with "
                "data.workers 0 the data is read in the training process."
            ) from error
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._loader._shutdown_workers()


class _Reporting(torch.utils.data.IterableDataset):
    """Hands an error over as it is, where PyTorch would wrap it in a traceback of text."""

    def __init__(self, steps: _Steps):
        self.steps = steps

    def __iter__(self):
        try:
            yield from self.steps
        except Exception as error:
            yield error


class EvaluationBatch(NamedTuple):
    """One forward pass of the evaluation; all `(rows, L)` int64, `labels` is -100 where nothing is scored."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor


def evaluation_batches(stream: TokenStream, length: int, rows: int, *, overlap: int = 0, rank: int = 0,
                       processes: int = 1) -> Iterator[EvaluationBatch]:  # fmt: skip
    """Every text token of the documents as a label exactly once over all processes; document tokens are not scored.

    Args:
        stream: Validation documents.
        length: L, tokens in a row; a shorter stream gives one shorter row.
        rows: Rows in a batch.
        overlap: Tokens after the first of a row that only give context; the row before scores them. Where all fits
            into one row there is none.
        rank: This process.
        processes: Number of processes; each takes every `processes`-th batch.
    """
    total = len(stream.tokens)
    length = min(length, total)
    overlap = min(overlap, length - 2)
    stride = length - 1 - overlap
    begins = list(range(0, max(1, total - 1 - overlap), stride))
    is_start = np.zeros(total, dtype=bool)
    is_start[stream.starts] = True
    for number, first in enumerate(range(0, len(begins), rows)):
        if number % processes != rank:
            continue
        parts = [_evaluation_row(stream, is_start, begin, length, overlap) for begin in begins[first : first + rows]]
        yield EvaluationBatch(*(torch.from_numpy(np.stack(column)) for column in zip(*parts, strict=True)))


def _evaluation_row(stream: TokenStream, is_start: np.ndarray, begin: int, length: int, overlap: int):
    tokens = np.asarray(stream.tokens[begin : begin + length]).astype(np.int64)
    labels = np.where(is_start[begin : begin + length], IGNORE, tokens)
    labels[0] = IGNORE
    if begin > 0:
        labels[: overlap + 1] = IGNORE
    starts = np.flatnonzero(is_start[begin : begin + length])
    missing = length - len(tokens)
    if missing:  # causal: what stands behind the last token changes nothing before it
        tokens = np.pad(tokens, (0, missing))
        labels = np.pad(labels, (0, missing), constant_values=IGNORE)
    return tokens, positions_from_starts(starts, length), labels
