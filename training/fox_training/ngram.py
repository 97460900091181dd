"""Byte n-gram language models with Witten-Bell interpolation: the yardstick a small trained model must beat.

    P_0(b)     = 1 / 256
    P_m(b | h) = (count(h b) + types(h) * P_{m-1}(b | h')) / (count(h) + types(h))

`h` is the `m - 1` bytes before `b`, `h'` is `h` without its oldest byte, `count(h)` how often `h` was followed by any
byte and `types(h)` by how many different ones. A history that was never seen passes the shorter estimate through.
Source: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991.

Document boundaries: every document stands alone. No n-gram reaches across a boundary, neither in fitting nor in
scoring; byte number `i` of a document (from 0) has `i` bytes of history, so it gets at most order `i + 1`. No
end-of-document symbol is counted or scored. A language model that scores each document from its BOS token predicts
exactly the same bytes from the same history, so the bits per byte of the two can stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# A history and its next byte are packed into one unsigned 64-bit integer.
LARGEST_ORDER = 8


@dataclass(frozen=True)
class _Table:
    """Counts of one order, sorted for binary search. The next byte is the lowest byte of a gram."""

    grams: np.ndarray  # (G,) uint64, distinct (history, next byte)
    gram_counts: np.ndarray  # (G,) int64
    histories: np.ndarray  # (C,) uint64, distinct histories
    history_counts: np.ndarray  # (C,) int64
    history_types: np.ndarray  # (C,) int64, different next bytes


class WittenBellNgrams:
    """Byte n-gram models of orders 1 to `max_order`, fitted together.

    Order `n` predicts a byte from the `n - 1` bytes before it, so order 1 knows byte frequencies only.

    Args:
        max_order: Highest order, 1 to 8.

    Raises:
        ValueError: If `max_order` is out of range.
    """

    def __init__(self, max_order: int = 6):
        if not 1 <= max_order <= LARGEST_ORDER:
            raise ValueError(
                f"`max_order` must be in [1, {LARGEST_ORDER}], got {max_order}. Order 6 suits a few MB of text."
            )
        self.max_order = max_order
        self._tables: list[_Table] = []

    def fit(self, documents: Iterable[bytes]) -> WittenBellNgrams:
        """Count all n-grams of the documents, replacing what was fitted before. Time O(orders * n log n).

        Args:
            documents: Training documents as raw bytes.

        Returns:
            The model itself.

        Raises:
            ValueError: If the documents hold no bytes.
        """
        stream, offset = _join(documents)
        self._tables = []
        grams = np.zeros(len(stream), dtype=np.uint64)
        for order in range(1, self.max_order + 1):
            grams = _extend(grams, stream, order)
            self._tables.append(_count(grams[offset >= order - 1]))
        return self

    def probabilities(self, history: bytes, order: int) -> np.ndarray:
        """Distribution of the next byte after `history`, of which the last `order - 1` bytes count.

        Returns:
            `(256,)` fp64, sums to 1.

        Raises:
            ValueError: If the model is not fitted or `order` was not fitted.
        """
        self._check_fitted()
        if not 1 <= order <= self.max_order:
            raise ValueError(f"`order` must be in [1, {self.max_order}], got {order}. Fit with a higher `max_order`.")
        next_bytes = np.arange(256, dtype=np.uint64)
        probability = np.full(256, 1 / 256)
        for length in range(min(order - 1, len(history)) + 1):
            packed = int.from_bytes(history[len(history) - length :], "big")
            grams = next_bytes + np.uint64(packed << 8)
            probability = _interpolate(self._tables[length], grams, probability)
        return probability

    def bits(self, documents: Iterable[bytes]) -> np.ndarray:
        """Code length of every byte under every order.

        Args:
            documents: Held-out documents as raw bytes; their bytes are concatenated in the result.

        Returns:
            `(max_order, total bytes)` fp64, bits.

        Raises:
            ValueError: If the model is not fitted or the documents hold no bytes.
        """
        self._check_fitted()
        stream, offset = _join(documents)
        probability = np.full(len(stream), 1 / 256)
        grams = np.zeros(len(stream), dtype=np.uint64)
        bits = np.empty((self.max_order, len(stream)))
        for order, table in enumerate(self._tables, start=1):
            grams = _extend(grams, stream, order)
            inside = offset >= order - 1
            probability[inside] = _interpolate(table, grams[inside], probability[inside])
            bits[order - 1] = -np.log2(probability)
        return bits

    def bits_per_byte(self, documents: Iterable[bytes]) -> list[float]:
        """Mean code length over all bytes of the documents, one number per order, in bits."""
        return [float(value) for value in self.bits(documents).mean(axis=1)]

    def _check_fitted(self):
        if not self._tables:
            raise ValueError("The n-gram model holds no counts. Call `fit` with the training documents first.")


def _join(documents: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All bytes in one row, and for each its offset in its own document."""
    parts = [np.frombuffer(document, dtype=np.uint8) for document in documents]
    if not sum(len(part) for part in parts):
        raise ValueError(f"`documents` must hold at least one byte, got {len(parts)} documents without any.")
    return np.concatenate(parts).astype(np.uint64), np.concatenate([np.arange(len(part)) for part in parts])


def _extend(grams: np.ndarray, stream: np.ndarray, order: int) -> np.ndarray:
    """Add the byte `order - 1` places back to every gram; the first ones of the stream are masked by the caller."""
    longer = grams.copy()
    longer[order - 1 :] |= stream[: len(stream) - order + 1] << np.uint64(8 * (order - 1))
    return longer


def _count(grams: np.ndarray) -> _Table:
    distinct, counts = np.unique(grams, return_counts=True)
    histories, starts = np.unique(distinct >> np.uint64(8), return_index=True)
    return _Table(
        grams=distinct,
        gram_counts=counts,
        histories=histories,
        # reduceat refuses an empty index list: an order longer than every document has no grams at all.
        history_counts=np.add.reduceat(counts, starts) if len(starts) else counts,
        history_types=np.diff(np.append(starts, len(distinct))),
    )


def _interpolate(table: _Table, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """One step of the recursion: the estimate of this order from `shorter`, that of the order below."""
    history_counts, seen = _look_up(table.histories, table.history_counts, grams >> np.uint64(8))
    history_types, _ = _look_up(table.histories, table.history_types, grams >> np.uint64(8))
    gram_counts, _ = _look_up(table.grams, table.gram_counts, grams)
    interpolated = (gram_counts + history_types * shorter) / np.maximum(history_counts + history_types, 1)
    return np.where(seen, interpolated, shorter)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of the wanted keys (0 where absent), and which were present."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    present = keys[place] == wanted
    return np.where(present, values[place], 0), present
