"""Tokenised documents behind one another, each behind the document token (BOS), mapped from one file or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class MappedTokens:
    """Several arrays of tokens as one: `len`, and slices that copy no more than they return.

    Args:
        parts: `(N_i,)` each, mapped files or arrays, of one dtype.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self.dtype = self.parts[0].dtype
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, end, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of tokens must have step 1; got {step}.")
        found = []
        number = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            offset = int(self._ends[number]) - len(self.parts[number])
            stop = min(end, int(self._ends[number]))
            found.append(self.parts[number][begin - offset : stop - offset])
            begin, number = stop, number + 1
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, dtype=self.dtype)


@dataclass(frozen=True)
class TokenStream:
    """Tokenised documents, memory-mapped.

    tokens: `(N,)` uint16 or uint32, every document behind one document token.
    starts: `(num_documents,)` int64, position of each document token.
    document_bytes: `(num_documents,)` int64, UTF-8 bytes of each text.
    fingerprint: Hash of the texts and the tokenizer.
    """

    tokens: np.ndarray | MappedTokens
    starts: np.ndarray
    document_bytes: np.ndarray
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.document_bytes.sum())

    def first_documents(self, count: int) -> TokenStream:
        """The first `count` documents."""
        if count >= len(self.starts):
            return self
        end = int(self.starts[count])
        return TokenStream(self.tokens[:end], self.starts[:count], self.document_bytes[:count], self.fingerprint)

    def describe(self) -> dict[str, Any]:
        """Counts for data.json."""
        return {
            "fingerprint": self.fingerprint,
            "documents": len(self.starts),
            "tokens": len(self.tokens),
            "bytes": self.num_bytes,
        }
