"""Rows from several sources in fixed shares, as a pure function of their number.

Row i of the run comes from the source in whose part of [0, 1) the number frac(u + i phi) falls, with
phi = (sqrt(5) - 1) / 2 and u from the seed. Successive points of that sequence are spread so evenly that after n rows
no source is more than about log(n) rows off its share (Kuipers and Niederreiter, "Uniform Distribution of Sequences",
1974, chapter 2.3).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from .batches import PackedRows, Row, StreamedRows

_GOLDEN = (5**0.5 - 1) / 2
_BLOCK = 4096


class Choice:
    """Which source row i comes from, and which of its rows it is.

    Args:
        weights: Share of each source; need not sum to 1.
        seed: Seed of the run.
    """

    def __init__(self, weights: list[float], seed: int):
        shares = np.cumsum(np.asarray(weights, dtype=np.float64))
        self._edges = shares[:-1] / shares[-1]
        self._start = float(np.random.Generator(np.random.PCG64([seed, len(weights)])).random())
        self._before = [np.zeros(len(weights), dtype=np.int64)]  # rows of each source in front of each block
        self._current = -1
        self._sources = self._places = np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[int, int]:
        block, inside = divmod(index, _BLOCK)
        if block != self._current:
            self._enter(block)
        return int(self._sources[inside]), int(self._places[inside])

    def _enter(self, block: int) -> None:
        while len(self._before) <= block:
            counts = np.bincount(self._choose(len(self._before) - 1), minlength=len(self._before[0]))
            self._before.append(self._before[-1] + counts)
        self._sources = self._choose(block)
        self._places = np.empty(_BLOCK, dtype=np.int64)
        for source, before in enumerate(self._before[block]):
            mine = self._sources == source
            self._places[mine] = before + np.arange(mine.sum())
        self._current = block

    def _choose(self, block: int) -> np.ndarray:
        points = (self._start + np.arange(block * _BLOCK, (block + 1) * _BLOCK) * _GOLDEN) % 1.0
        return np.searchsorted(self._edges, points, side="right")


class MixedRows:
    """Map mode: rows of several `PackedRows` by their index in the whole run.

    Args:
        sources: Rows of each source; each has epochs of its own.
        weights: Share of the rows.
        seed: Seed of the run.
    """

    def __init__(self, sources: list[PackedRows], weights: list[float], seed: int):
        self.sources = sources
        self._choice = Choice(weights, seed)

    def row(self, index: int) -> Row:
        """Row `index` of the run."""
        source, place = self._choice[index]
        return self.sources[source].row(place)


class MixedStream:
    """Streaming mode: rows of several `StreamedRows`, with a state that resumes exactly.

    Args:
        sources: Rows of each source.
        weights: Share of the rows.
        seed: Seed of the run.
    """

    def __init__(self, sources: list[StreamedRows], weights: list[float], seed: int):
        self.sources = sources
        self._choice = Choice(weights, seed)

    def iterate(self, state: dict[str, Any] | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Pairs of a row and the state from which the row after it comes next, without end."""
        index = state["index"] if state else 0
        states = copy.deepcopy(state["sources"]) if state else [None] * len(self.sources)
        running = [rows.iterate(known) for rows, known in zip(self.sources, states, strict=True)]
        while True:
            source, _ = self._choice[index]
            row, states[source] = next(running[source])
            index += 1
            # The states of the others are replaced, never changed in place: a shallow copy stays as it is.
            yield row, {"index": index, "sources": list(states)}
