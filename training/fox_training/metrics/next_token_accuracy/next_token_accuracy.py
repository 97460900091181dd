"""Share of tokens that a language model predicts right with its first guess."""

import datasets
import evaluate

DESCRIPTION = """
Next-token accuracy: how often the most probable next token is the one that follows in the text.
"""

KWARGS_DESCRIPTION = """
Args:
    num_correct (list of int): Right first guesses, counted over any number of tokens.
    num_tokens (list of int): Number of predicted tokens behind each entry of `num_correct`.

Returns:
    next_token_accuracy (float): sum(num_correct) / sum(num_tokens), from 0 to 1.

Examples:
    >>> metric = evaluate.load("path/to/next_token_accuracy")
    >>> metric.compute(num_correct=[3, 0], num_tokens=[4, 1])["next_token_accuracy"]
    0.6
"""


class NextTokenAccuracy(evaluate.Metric):
    """Counts are summed as integers, so the result does not depend on how the text was batched."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"num_correct": datasets.Value("int64"), "num_tokens": datasets.Value("int64")}
            ),
        )

    def _compute(self, num_correct, num_tokens):
        total = sum(num_tokens)
        if total <= 0:
            raise ValueError(f"`num_tokens` must sum to at least 1, got {total}. Was an empty text evaluated?")
        return {"next_token_accuracy": sum(num_correct) / total}
