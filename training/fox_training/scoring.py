"""Log-likelihood of held-out documents under a causal language model, token by token.

Every document is scored by itself, from its start token (BOS) on; the start token and an end token are not scored.
A document longer than the context is cut into windows. Each window but the first begins at least `overlap` tokens
before the first token it scores: those are read but not scored again, so every token is scored exactly once. The last
window of a document is moved left until it is full. Windows of one length share a batch; nothing is padded.

Letters: L tokens in a window, B windows in a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel


class Window(NamedTuple):
    """Inputs are `tokens[start:stop]`; of the targets, those from `first_target` to `stop` are scored."""

    document: int
    start: int
    stop: int
    first_target: int


def cut_windows(num_tokens: int, context: int, overlap: int, document: int = 0) -> Iterator[Window]:
    """Windows over one document of `num_tokens` tokens, the start token included.

    Args:
        num_tokens: Tokens of the document with its start token.
        context: Most tokens that the model reads at once.
        overlap: Fewest tokens of context before the first scored token of a later window, less than `context`.
        document: Number that the windows carry.

    Raises:
        ValueError: If `context` is below 2 or `overlap` is not in [0, context).
    """
    if context < 2:
        raise ValueError(f"`context` must be at least 2 tokens, got {context}. Pass e.g. the length of training.")
    if not 0 <= overlap < context:
        raise ValueError(f"`overlap` must be in [0, {context}), the context; got {overlap}. Half of it is usual.")
    last = num_tokens - 1
    scored = 0
    while scored < last:
        stop = min(last, context if scored == 0 else scored - overlap + context)
        yield Window(document, max(0, stop - context), stop, scored + 1)
        scored = stop


@dataclass
class Scores:
    """What `score` adds up, all in fp64 or integers.

    `nats` and `num_tokens` have one entry per document; the three `position_*` arrays one per number of tokens of
    context minus 1, so entry 0 is a prediction from the start token alone.
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    num_correct: np.ndarray
    position_nats: np.ndarray
    position_squares: np.ndarray
    position_tokens: np.ndarray
    heads: HeadReport | None = None

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all scored tokens, in nats."""
        return math.fsum(self.nats) / int(self.num_tokens.sum())


@dataclass
class HeadReport:
    """What only FoX can tell, each `(num_layers, num_heads)` fp64; None where the model does not offer it."""

    pruned_share: np.ndarray | None = None
    half_life_tokens: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    context: int,
    overlap: int,
    tokens_per_batch: int = 16384,
    progress: bool = True,
) -> Scores:
    """Score documents of token ids, each beginning with the start token.

    Args:
        model: Any causal language model, in evaluation mode.
        documents: Token ids, start token first.
        context: Most tokens the model reads at once.
        overlap: See `cut_windows`.
        tokens_per_batch: Bound on B * L; at least one window is always read. Logits take B * L * V numbers.
        progress: Show a bar where stderr is a terminal.

    Raises:
        ValueError: If no document holds a token to score, or a likelihood is NaN or 0.
    """
    scores = _empty_scores(len(documents), context)
    observer = HeadObserver(model)
    batches = list(_batches(documents, context, overlap, tokens_per_batch))
    if not batches:
        raise ValueError(f"documents must hold at least one token to score, got {len(documents)} empty documents.")
    total = sum(window.stop - window.start for batch in batches for window in batch)
    with tqdm(total=total, unit="token", unit_scale=True, desc="score", disable=None if progress else True) as bar:
        for batch in batches:
            tokens = torch.tensor([documents[w.document][w.start : w.stop + 1] for w in batch])
            inputs, targets = tokens[:, :-1].to(model.device), tokens[:, 1:].to(model.device)
            with observer.watch(inputs.shape):
                logits = model(input_ids=inputs, use_cache=False).logits  # (B, L, V)
            nats, correct = _per_token(logits, targets)
            if not np.isfinite(nats).all():
                number = batch[int(np.argwhere(~np.isfinite(nats))[0, 0])].document
                raise ValueError(
                    f"the model gives a token of document {number} a loss that is not finite. "
                    "Try --dtype float32; if that does not help the weights are broken."
                )
            _add(scores, batch, nats, correct)
            bar.update(inputs.numel())
    scores.heads = observer.report()
    return scores


def _empty_scores(num_documents: int, context: int) -> Scores:
    return Scores(
        nats=np.zeros(num_documents),
        num_tokens=np.zeros(num_documents, dtype=np.int64),
        num_correct=np.zeros(num_documents, dtype=np.int64),
        position_nats=np.zeros(context),
        position_squares=np.zeros(context),
        position_tokens=np.zeros(context, dtype=np.int64),
    )


def _batches(documents, context: int, overlap: int, tokens_per_batch: int) -> Iterator[list[Window]]:
    """Batches of windows of equal length, the longest first: a lack of memory shows at once."""
    by_length: dict[int, list[Window]] = defaultdict(list)
    for number, tokens in enumerate(documents):
        for window in cut_windows(len(tokens), context, overlap, number):
            by_length[window.stop - window.start].append(window)
    for length in sorted(by_length, reverse=True):
        size = max(1, tokens_per_batch // length)
        windows = by_length[length]
        yield from (windows[i : i + size] for i in range(0, len(windows), size))


def _per_token(logits: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Nats (fp64 from fp32) and whether the first guess is right, both `(B, L)`."""
    # Row by row: the fp32 copy of a bf16 batch would be the largest tensor of all.
    rows = zip(logits, targets, strict=True)
    nats = torch.stack([F.cross_entropy(row.float(), target, reduction="none") for row, target in rows])
    return nats.cpu().double().numpy(), (logits.argmax(-1) == targets).cpu().numpy()


def _add(scores: Scores, batch: list[Window], nats: np.ndarray, correct: np.ndarray):
    for window, row, right in zip(batch, nats, correct, strict=True):
        skip = window.first_target - window.start - 1
        scored, positions = row[skip:], slice(skip, len(row))
        scores.nats[window.document] += scored.sum()
        scores.num_tokens[window.document] += len(scored)
        scores.num_correct[window.document] += right[skip:].sum()
        scores.position_nats[positions] += scored
        scores.position_squares[positions] += scored**2
        scores.position_tokens[positions] += 1


class HeadObserver:
    """Collects pruned shares and forget gates of a FoX model during its forward calls; does nothing for others."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.is_fox = model.config.model_type == "fox"
        self.prunes = self.is_fox and model.config._attn_implementation == "fox_acp"
        self._pruned: np.ndarray | float = 0.0
        self._pairs = 0
        self._decay: np.ndarray | float = 0.0
        self._gates: np.ndarray | float = 0.0

    @property
    def notes(self) -> list[str]:
        """One line for each report that this model cannot give."""
        if not self.is_fox:
            return [f"no pruned share and gate half-lives: model_type is {self.model.config.model_type}, not fox"]
        if not self.prunes:
            return [f"no pruned share: attention is {self.model.config._attn_implementation}, not fox_acp"]
        return []

    def watch(self, shape: tuple[int, int]):
        """Context around one forward call on inputs of `shape` (B, L)."""
        return _Watch(self, shape) if self.is_fox else ExitStack()

    def add(self, shape: tuple[int, int], pruned: torch.Tensor | None, gates: Iterable[torch.Tensor]):
        """Add one forward call: pruned `(layers, heads)`, per layer gates `(B, H, L)` in nats."""
        batch, length = shape
        pairs = batch * length * (length + 1) // 2
        if pruned is not None:
            self._pruned = self._pruned + pairs * pruned.double().cpu().numpy()
            self._pairs += pairs
        # A gate of exactly 0 (log -inf) is a document boundary, not a decay that a head has learned.
        finite = [gate.double().masked_fill(gate.isinf(), 0.0) for gate in gates]
        if finite:
            self._decay = self._decay - torch.stack([gate.sum((0, 2)) for gate in finite]).cpu().numpy()
            self._gates = self._gates + torch.stack([gate.isfinite().sum((0, 2)) for gate in gates]).cpu().numpy()

    def report(self) -> HeadReport:
        """The pruned share weighted by attended pairs, and the half-life of the mean decay, in tokens."""
        report = HeadReport(notes=self.notes)
        if self._pairs:
            report.pruned_share = self._pruned / self._pairs
        if isinstance(self._decay, np.ndarray):
            with np.errstate(divide="ignore"):
                report.half_life_tokens = math.log(2) * self._gates / self._decay
        return report


class _Watch:
    """`with`-block of `HeadObserver.watch` for a FoX model."""

    def __init__(self, observer: HeadObserver, shape: tuple[int, int]):
        self.observer, self.shape = observer, shape

    def __enter__(self):
        from modeling_fox import forget_gates, pruning_stats

        self.stack = ExitStack()
        self.gates = self.stack.enter_context(forget_gates(self.observer.model))
        self.stats = self.stack.enter_context(pruning_stats(self.observer.model)) if self.observer.prunes else None

    def __exit__(self, *error):
        self.stack.__exit__(*error)
        if error[0] is None:
            self.observer.add(self.shape, self.stats.pruned_fraction if self.stats else None, list(self.gates))


class PositionBin(NamedTuple):
    """Mean loss over the predictions made from `first` to `last` tokens of context, start token included."""

    first: int
    last: int
    tokens: int
    nats_per_token: float
    standard_error: float


def position_curve(scores: Scores, bins: int = 40) -> list[PositionBin]:
    """Loss over the length of the visible context, in log-spaced bins; empty bins are left out.

    The standard error takes tokens as independent, which neighbouring tokens are not: it is a lower bound.
    """
    context = len(scores.position_nats)
    edges = np.unique(np.round(np.geomspace(1, context + 1, bins + 1)).astype(int))
    curve = []
    for first, following in pairwise(edges):
        inside = slice(first - 1, following - 1)
        tokens = int(scores.position_tokens[inside].sum())
        if not tokens:
            continue
        mean = scores.position_nats[inside].sum() / tokens
        variance = max(0.0, scores.position_squares[inside].sum() / tokens - mean**2)
        curve.append(PositionBin(int(first), int(following) - 1, tokens, float(mean), math.sqrt(variance / tokens)))
    return curve


def context_gain(scores: Scores) -> float | None:
    """Loss from T/16 to T/8 tokens of context minus loss from T/2 to T, in nats: is the far context used?

    None if one of the two ranges holds no token, or the context is below 32.
    """
    context = len(scores.position_nats)
    if context < 32:
        return None
    means = []
    for first, last in ((context // 16, context // 8), (context // 2, context)):
        tokens = scores.position_tokens[first:last].sum()
        if not tokens:
            return None
        means.append(scores.position_nats[first:last].sum() / tokens)
    return float(means[0] - means[1])
