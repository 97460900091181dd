"""The `evaluate` modules of the package against the formulas, loaded both ways, without a network."""

import math

import evaluate
import pytest

from fox_training import metrics

NATS = [5.25, 0.125, 7.0, 1e-3, 2.5]
COUNTS = [7, 1, 3, 1, 2]
ARGUMENTS = {
    "bits_per_byte": {"nats": NATS, "num_bytes": COUNTS},
    "perplexity": {"nats": NATS, "num_tokens": COUNTS},
    "next_token_accuracy": {"num_correct": [6, 0, 3, 1, 0], "num_tokens": COUNTS},
}
EXPECTED = {
    "bits_per_byte": 14.876 / math.log(2) / 14,
    "perplexity": math.exp(14.876 / 14),
    "next_token_accuracy": 10 / 14,
}


@pytest.fixture(autouse=True, scope="module")
def no_network(tmp_path_factory):
    """Module scope: Python keeps the first `evaluate_modules` package it has imported, with that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize("name", metrics.CLASSES)
def test_equals_the_formula(name):
    assert metrics.load(name).compute(**ARGUMENTS[name])[name] == pytest.approx(EXPECTED[name], rel=1e-14)


@pytest.mark.parametrize("name", metrics.CLASSES)
def test_loads_by_path_and_gives_the_same_number(name, tmp_path):
    by_path = evaluate.load(metrics.path(name), cache_dir=str(tmp_path))
    assert by_path.compute(**ARGUMENTS[name]) == metrics.load(name).compute(**ARGUMENTS[name])


@pytest.mark.parametrize("name", metrics.CLASSES)
def test_accumulating_in_batches_changes_nothing(name):
    whole, parts = metrics.load(name), metrics.load(name)
    for i in (3, 0, 4, 1, 2):
        parts.add_batch(**{key: values[i : i + 1] for key, values in ARGUMENTS[name].items()})
    assert parts.compute() == whole.compute(**ARGUMENTS[name])


@pytest.mark.parametrize("name", metrics.CLASSES)
def test_refuses_an_empty_text(name):
    nothing = {key: [0] for key in ARGUMENTS[name]}
    with pytest.raises(ValueError, match="must sum to at least 1, got 0"):
        metrics.load(name).compute(**nothing)


def test_names_the_nearest_metric():
    with pytest.raises(ValueError, match="Did you mean 'perplexity'"):
        metrics.load("perplexitty")
