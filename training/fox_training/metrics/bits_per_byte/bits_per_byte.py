"""Bits per byte of a language model on a text: comparable between models with different tokenizers."""

import math

import datasets
import evaluate

DESCRIPTION = """
Bits per byte: the negative log2-likelihood that a language model gives to a text, divided by the number of UTF-8
bytes of the text. Unlike perplexity it does not depend on how the tokenizer cuts the text. 8 is a uniform guess.
"""

KWARGS_DESCRIPTION = """
Args:
    nats (list of float): Negative natural log-likelihoods, summed over any share of the text: one per token, per
        document or per batch, all give the same result. Tokens that stand for no text (BOS) are left out.
    num_bytes (list of int): UTF-8 bytes of the text behind each entry of `nats`.

Returns:
    bits_per_byte (float): sum(nats) / ln 2 / sum(num_bytes).

Examples:
    >>> metric = evaluate.load("path/to/bits_per_byte")
    >>> metric.add_batch(nats=[6.0], num_bytes=[10])
    >>> metric.add_batch(nats=[2.0, 3.0], num_bytes=[5, 1])
    >>> round(metric.compute()["bits_per_byte"], 4)
    0.992
"""


class BitsPerByte(evaluate.Metric):
    """Sum of nats over sum of bytes, so that accumulation over batches and processes is exact."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=KWARGS_DESCRIPTION,
            features=datasets.Features({"nats": datasets.Value("float64"), "num_bytes": datasets.Value("int64")}),
        )

    def _compute(self, nats, num_bytes):
        total = sum(num_bytes)
        if total <= 0:
            raise ValueError(f"`num_bytes` must sum to at least 1, got {total}. Was an empty text evaluated?")
        return {"bits_per_byte": math.fsum(nats) / math.log(2) / total}
