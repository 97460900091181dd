"""What a model makes of what lies far back: loss beyond the training length, needles in a haystack, recall.

All are scored here, without a judge: a needle by the words of the answer that greedy text repeats in order, recall by
the share of random tokens that are the first guess.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from . import scoring
from .tokenizers import document_token_id, encode_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The needle of the test as FoX's authors ran it (arXiv:2503.02130): easy repeats the question beside the answer.
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"
START = "The best thing to do in San Francisco is"
QUESTION = "What is the best thing to do in San Francisco?"
NEEDLES = {
    "easy": f"\nQuestion: {QUESTION}\nAnswer: {START} {ANSWER}.\n",
    "standard": f" {START} {ANSWER}. ",
}
PROMPT = f"\nQuestion: {QUESTION}\nAnswer: {START}"

CUE, BLOCK = 8, 32  # tokens of a repeated block that are given, and of the block
PAIRS = (4, 16, 64, 256)
SAMPLES = 16


class Progress:
    """Figures of a part, kept in a file, so that a command that was stopped goes on where it was.

    Args:
        path: JSON file.
        key: What the figures depend on; those of another key are dropped.
    """

    def __init__(self, path: Path, key: dict[str, Any]):
        self.path, self.key = path, json.loads(json.dumps(key))
        self.found: dict[str, Any] = {}
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["key"] == self.key:
                self.found = held["found"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing there, or a file that was cut off: begin anew

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The figure of this name, computed and kept if it is not there yet."""
        if name not in self.found:
            self.found[name] = compute()
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text(json.dumps({"key": self.key, "found": self.found}, indent=1), encoding="utf-8")
            os.replace(temporary, self.path)
        return self.found[name]


def loss_beyond(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], length: int, *, factor: int = 4,
    tokens_per_batch: int = 16384, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Loss per position up to `factor` times the length of training.

    Args:
        model: A causal language model; models with positions only up to those that they have.
        documents: Token ids, start token first. If none is long enough they are read as one, one after another.
        length: Tokens in a row of training.
        factor: How far.
        tokens_per_batch: As in `scoring.score`.
        progress: Show a bar.

    Returns:
        `context`, `joined`, `curve` (rows of `scoring.PositionBin`), and `nats`: mean loss with up to half, half to
        all, 1 to 2 and 2 to 4 times the training length of context, where there is such text.
    """
    context = factor * length
    largest = getattr(model.config, "max_position_embeddings", None)
    if model.config.model_type != "fox" and largest:
        context = min(context, largest)
    joined = max(map(len, documents)) <= context
    if joined:
        documents = [[token for document in documents for token in document]]
    scores = scoring.score(
        model, documents, context=context, overlap=0, tokens_per_batch=tokens_per_batch, progress=progress
    )
    edges = [0, length // 2, length, *(length * 2**i for i in range(1, int(math.log2(factor)) + 1))]
    nats = {}
    for first, last in zip(edges, edges[1:], strict=False):
        count = int(scores.position_tokens[first:last].sum())
        if count:
            nats[f"{first + 1}-{last}"] = float(scores.position_nats[first:last].sum() / count)
    curve = [row._asdict() for row in scoring.position_curve(scores)]
    return {"training_length": length, "context": context, "joined": joined, "nats": nats, "curve": curve}


def needle_lengths(length: int, shortest: int, count: int = 11, factor: float = 2.0) -> list[int]:
    """`count` lengths of context evenly spaced up to `factor` times the training length, the first at least
    `shortest` tokens; the paper has 1,000 to 32,000 for 16,384."""
    longest = int(factor * length)
    lengths = np.linspace(max(shortest, longest // 32), longest, count)
    return sorted({int(value) for value in lengths if value >= shortest})


def needle_test(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, haystack: Sequence[str], kind: str, length: int,
    progress: Progress, *, count: int = 11,
) -> dict[str, Any]:  # fmt: skip
    """Hide a sentence at several depths of contexts of several lengths, and ask for it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        haystack: Texts to hide it in, one after another, from the start as often as needed.
        kind: "easy", the question stands beside the hidden answer, or "standard", it does not.
        length: Tokens in a row of training; contexts go to twice that.
        progress: Where scores are kept.
        count: Lengths and depths.

    Returns:
        `lengths`, `depths` (0 the start, 1 the end) and `scores`, `[depth][length]`: the share of the answer's words
        that the text after the question has in their order, 1 for all of them.

    Raises:
        ValueError: If the tokenizer cannot write the needle.
    """
    start = document_token_id(tokenizer)
    needle, prompt, answer = encode_documents(tokenizer, [NEEDLES[kind], PROMPT, f" {ANSWER}."])
    if ANSWER not in tokenizer.decode(answer, clean_up_tokenization_spaces=False):
        raise ValueError("the tokenizer cannot write the sentence that is hidden: it has no such characters.")
    hay = [token for ids in encode_documents(tokenizer, list(haystack)) for token in ids]
    lengths = needle_lengths(length, 2 * len(needle) + len(prompt) + 1, count)
    depths = [round(float(depth), 3) for depth in np.linspace(0, 1, count)]
    scores = np.zeros((len(depths), len(lengths)))
    with tqdm(total=scores.size, unit="needle", desc=f"needles, {kind}", disable=None) as bar:
        for (row, depth), (column, total) in _grid(depths, lengths):
            name = f"{total} tokens, depth {depth}"
            tokens = [start, *hide(tokenizer, hay, needle, total - 1 - len(needle) - len(prompt), depth), *prompt]
            scores[row, column] = progress.get(name, lambda ids=tokens: ask(model, tokenizer, ids, len(answer)))
            bar.update()
    return {"lengths": lengths, "depths": depths, "scores": scores.tolist(), "mean": float(scores.mean())}


def _grid(rows: list[Any], columns: list[Any]) -> Iterator[tuple[tuple[int, Any], tuple[int, Any]]]:
    yield from ((row, column) for column in enumerate(columns) for row in enumerate(rows))


def hide(tokenizer: PreTrainedTokenizerBase, hay: list[int], needle: list[int], size: int, depth: float) -> list[int]:
    """`size` tokens of hay with the needle in them, behind the sentence that ends last before that depth."""
    repeated = (hay * (size // len(hay) + 1))[:size]
    place = round(depth * size)
    if place < size:
        while place > 0 and not tokenizer.decode(repeated[place - 1 : place]).rstrip().endswith((".", "\n", ";")):
            place -= 1
    return [*repeated[:place], *needle, *repeated[place:]]


@torch.no_grad()
def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[int], answer_tokens: int) -> float:
    """Greedy text after the prompt, scored by `words_in_order`."""
    inputs = torch.tensor([tokens], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=answer_tokens + 4,
        pad_token_id=pad,
    )  # fmt: skip
    return words_in_order(tokenizer.decode(written[0, len(tokens) :], skip_special_tokens=True), ANSWER)


def words_in_order(text: str, answer: str) -> float:
    """Share of the words of `answer` in the longest sequence of words that both have in the same order (ROUGE-L)."""
    found, wanted = (re.findall(r"\w+", x.lower()) for x in (text, answer))
    longest = [0] * (len(wanted) + 1)
    for word in found:
        before = 0
        for column, other in enumerate(wanted, start=1):
            held = longest[column]
            longest[column] = before + 1 if word == other else max(longest[column], longest[column - 1])
            before = held
    return longest[-1] / len(wanted)


def recall_test(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, haystack: Sequence[str], length: int,
    progress: Progress, *, tokens_per_batch: int = 16384,
) -> dict[str, Any]:  # fmt: skip
    """Two tasks on random tokens, from nearby to four times the training length.

    `repeat`: a block of random tokens, text, and the block again; after its first tokens the rest is to be guessed.
    `pairs`: random pairs, then their first halves again in another order, each to be followed by its second half (as
    in multi-query associative recall, arXiv:2312.04927, but with a model that was never trained for it).

    Returns:
        Per task the share of right first guesses by length of the whole or number of pairs, and `chance`.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([i for i in range(len(tokenizer)) if i not in special])
    hay = [token for ids in encode_documents(tokenizer, list(haystack)) for token in ids]
    start = document_token_id(tokenizer)
    shortest = 2 * BLOCK + 1
    totals = [length * 2**i // 8 for i in range(6) if length * 2**i // 8 >= shortest]
    found: dict[str, Any] = {"chance": 1 / len(ordinary), "repeat": {}, "pairs": {}}
    with tqdm(total=len(totals) + len(PAIRS), unit="task", desc="recall", disable=None) as bar:
        for total in totals:
            rows = [_repeat_row(generator, ordinary, hay, start, total) for _ in range(SAMPLES)]
            wanted = range(total - BLOCK + CUE, total)
            compute = _accuracy(model, rows, wanted, tokens_per_batch)
            found["repeat"][str(total)] = progress.get(f"repeat {total}", compute)
            bar.update()
        for count in PAIRS:
            rows = [_pairs_row(generator, ordinary, start, count) for _ in range(SAMPLES)]
            wanted = range(2 * count + 2, 4 * count + 1, 2)
            compute = _accuracy(model, rows, wanted, tokens_per_batch)
            found["pairs"][str(count)] = progress.get(f"pairs {count}", compute)
            bar.update()
    return found


def _repeat_row(generator, ordinary: np.ndarray, hay: list[int], start: int, total: int) -> list[int]:
    block = generator.choice(ordinary, BLOCK).tolist()
    size = total - 1 - 2 * BLOCK
    begin = int(generator.integers(len(hay)))
    text = (hay[begin:] + hay * (size // len(hay) + 1))[:size]
    return [start, *block, *text, *block]


def _pairs_row(generator, ordinary: np.ndarray, start: int, count: int) -> list[int]:
    keys = generator.choice(ordinary, count, replace=count > len(ordinary))
    pairs = np.stack((keys, generator.choice(ordinary, count)), axis=1)
    return [start, *pairs.flatten().tolist(), *pairs[generator.permutation(count)].flatten().tolist()]


def _accuracy(model: PreTrainedModel, rows: list[list[int]], wanted: range, tokens_per_batch: int):
    """A function of the share of the places `wanted` in `rows` where the model's first guess is right."""

    @torch.no_grad()
    def compute() -> float:
        right, places = 0, torch.tensor(list(wanted), device=model.device)
        size = max(1, tokens_per_batch // len(rows[0]))
        for first in range(0, len(rows), size):
            tokens = torch.tensor(rows[first : first + size], device=model.device)
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=places - 1).logits
            right += int((logits.argmax(-1) == tokens[:, places]).sum())
        return right / (len(rows) * len(wanted))

    return compute
