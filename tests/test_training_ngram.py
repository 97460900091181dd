"""The n-gram yardstick against hand-worked numbers and a dictionary implementation written here."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from fox_training.ngram import WittenBellNgrams

DOCUMENTS = [b"the cat sat on the mat. ", b"a cat is not a mat, is it?", b"x", b""]
HELD_OUT = [b"the mat sat on a cat!", b"is the cat it?"]


def bits_by_dictionaries(order, documents, held_out):
    """Witten-Bell by the recursion, byte by byte, with one Counter per history."""
    after = defaultdict(Counter)
    for document in documents:
        for i, byte in enumerate(document):
            for length in range(min(order - 1, i) + 1):
                after[document[i - length : i]][byte] += 1

    def probability(byte, history):
        shorter = probability(byte, history[1:]) if history else 1 / 256
        counts = after[history]
        if not counts:
            return shorter
        return (counts[byte] + len(counts) * shorter) / (counts.total() + len(counts))

    return [
        -math.log2(probability(byte, document[max(0, i - order + 1) : i]))
        for document in held_out
        for i, byte in enumerate(document)
    ]


def test_order_one_matches_hand_worked_numbers():
    # "aab": 3 bytes, 2 types. P(a) = (2 + 2/256) / 5, an unseen byte gets (2/256) / 5.
    model = WittenBellNgrams(max_order=1).fit([b"aab"])
    probability = model.probabilities(b"", order=1)
    assert probability[ord("a")] == pytest.approx((2 + 2 / 256) / 5, rel=1e-15)
    assert probability[ord("z")] == pytest.approx(2 / 256 / 5, rel=1e-15)


def test_order_two_matches_hand_worked_numbers():
    # After "a" in "aab": a once, b once. P(b | a) = (1 + 2 P(b)) / 4 with P(b) = (1 + 2/256) / 5.
    model = WittenBellNgrams(max_order=2).fit([b"aab"])
    expected = (1 + 2 * (1 + 2 / 256) / 5) / 4
    assert model.probabilities(b"xa", order=2)[ord("b")] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("order", range(1, 7))
def test_equals_the_dictionary_implementation_for_every_byte(order):
    bits = WittenBellNgrams(max_order=6).fit(DOCUMENTS).bits(HELD_OUT)
    np.testing.assert_allclose(bits[order - 1], bits_by_dictionaries(order, DOCUMENTS, HELD_OUT), rtol=1e-12)


@pytest.mark.parametrize("history", [b"", b"t", b"he cat", b"\xff\xff\xff", b"never seen here", b"\x00\x00"])
@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_probabilities_of_the_256_bytes_sum_to_one(history, order):
    probability = WittenBellNgrams(max_order=8).fit(DOCUMENTS).probabilities(history, order)
    assert probability.shape == (256,)
    assert probability.sum() == pytest.approx(1.0, abs=1e-12)
    assert probability.min() > 0


def test_bits_are_the_logarithm_of_the_probabilities():
    model = WittenBellNgrams(max_order=4).fit(DOCUMENTS)
    text = HELD_OUT[0]
    expected = [-math.log2(model.probabilities(text[:i], order=4)[byte]) for i, byte in enumerate(text)]
    np.testing.assert_allclose(model.bits([text])[3], expected, rtol=1e-12)


def test_no_ngram_reaches_across_a_document_boundary():
    model = WittenBellNgrams(max_order=3).fit([b"ab", b"cd"])
    order_three = model.probabilities(b"ab", order=3)
    np.testing.assert_array_equal(order_three, model.probabilities(b"ab", order=2))
    bits = model.bits([b"a", b"b"])[2]
    np.testing.assert_array_equal(bits, model.bits([b"a", b"b"])[0])


def test_order_of_the_documents_does_not_matter():
    forward = WittenBellNgrams(max_order=5).fit(DOCUMENTS).bits_per_byte(HELD_OUT)
    backward = WittenBellNgrams(max_order=5).fit(DOCUMENTS[::-1]).bits_per_byte(HELD_OUT[::-1])
    np.testing.assert_allclose(forward, backward, rtol=1e-12)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"`max_order` must be in \[1, 8\], got 9"):
        WittenBellNgrams(max_order=9)
    with pytest.raises(ValueError, match="at least one byte, got 1 documents"):
        WittenBellNgrams().fit([b""])
    with pytest.raises(ValueError, match="Call `fit`"):
        WittenBellNgrams().bits([b"text"])
    with pytest.raises(ValueError, match=r"`order` must be in \[1, 2\], got 3"):
        WittenBellNgrams(max_order=2).fit([b"text"]).probabilities(b"", order=3)
