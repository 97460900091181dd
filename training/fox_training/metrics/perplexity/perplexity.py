"""Perplexity of a language model from summed log-likelihoods."""

import math

import datasets
import evaluate

DESCRIPTION = """
Perplexity: exp of the mean negative log-likelihood per token. It depends on the tokenizer, so compare it only between
models that share one. Unlike the module of the same name on the Hub this one does not run the model: it takes the
log-likelihoods, so windowing, precision and device are the caller's.
"""

KWARGS_DESCRIPTION = """
Args:
    nats (list of float): Negative natural log-likelihoods, summed over any number of tokens.
    num_tokens (list of int): Number of predicted tokens behind each entry of `nats`.

Returns:
    perplexity (float): exp(sum(nats) / sum(num_tokens)).

Examples:
    >>> metric = evaluate.load("path/to/perplexity")
    >>> round(metric.compute(nats=[2.0, 4.0], num_tokens=[1, 3])["perplexity"], 4)
    4.4817
"""


class Perplexity(evaluate.Metric):
    """Mean over tokens, not over batches, so that batches of unequal length are weighted right."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=KWARGS_DESCRIPTION,
            features=datasets.Features({"nats": datasets.Value("float64"), "num_tokens": datasets.Value("int64")}),
        )

    def _compute(self, nats, num_tokens):
        total = sum(num_tokens)
        if total <= 0:
            raise ValueError(f"`num_tokens` must sum to at least 1, got {total}. Was an empty text evaluated?")
        return {"perplexity": math.exp(math.fsum(nats) / total)}
