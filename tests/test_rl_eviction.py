"""Eviction: bounded memory, the same outputs, and a bound on the lost attention that is never passed."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxModel
from modeling_fox.eviction_fox import FoxEvictingCache, FoxEvictingLayer


def forgetful_model(**config):
    times = {"fgate_decay_time_min": 1.5, "fgate_decay_time_max": 5.0}
    return tiny_fox(model_class=FoxModel, hidden_size=32, intermediate_size=32, **(times | config))


@torch.no_grad()
def step(model, token, cache, mask=None):
    return model(token, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state


def test_models_keep_their_own_layer():
    assert not any(isinstance(x, FoxEvictingLayer) for x in DynamicCache(config=forgetful_model().config).layers)


@torch.no_grad()
def test_memory_stays_bounded_and_outputs_stay_the_same():
    model, tokens = forgetful_model(), random_tokens(2, 300)
    full, cache = DynamicCache(config=model.config), FoxEvictingCache(model)
    most, dropped = 0, 0
    for t in range(tokens.shape[1]):
        expected = step(model, tokens[:, t : t + 1], full)
        got = step(model, tokens[:, t : t + 1], cache)
        dropped += cache.evict()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert cache.get_seq_length() + dropped == t + 1
        if t == 150:
            most = cache.memory_bytes()
    assert dropped > 100 and cache.memory_bytes() <= 1.3 * most
    assert 0 < cache.lost_mass_bound() <= math.exp(-10)


@torch.no_grad()
def test_no_row_of_attention_ever_had_more_on_what_was_dropped():
    """The true weights, from the whole sequence at once, over the tokens that were gone by the time of each query."""
    model, tokens = forgetful_model(num_hidden_layers=1), random_tokens(1, 300)
    model.layers[0].self_attn.q_norm.weight.mul_(1.7)  # sharper attention, and with it a larger bound
    cache, gone = FoxEvictingCache(model, log_tolerance=-4.0), []
    total = 0
    for t in range(tokens.shape[1]):
        gone.append(total)
        step(model, tokens[:, t : t + 1], cache)
        total += cache.evict(force=True)
    assert total > 100
    model.double().set_attn_implementation("eager")
    weights = model(tokens, use_cache=False, output_attentions=True).attentions[0][0]  # (H, T, S)
    lost = max(float(weights[:, t, : gone[t]].sum(-1).max()) for t in range(300) if gone[t])
    assert 0 < lost <= math.exp(-4.0)


def test_the_bound_is_reached_by_the_worst_queries_and_never_passed():
    """Every score at its worst: U with what was dropped, -U with the query's own token; one token more is too many."""
    bound, tolerance = 3.0, -6.0
    layer = FoxEvictingLayer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gates = -0.2 * torch.rand(1, 2, 200, generator=generator)
        layer.update(torch.zeros(1, 2, 200, 4), torch.zeros(1, 2, 200, 4))
        layer.update_gate(gates)
        number = layer.num_droppable(torch.full((2,), tolerance - 2 * bound))
    decay = gates.double().flip(-1).cumsum(-1).flip(-1) - gates.double()

    def worst_mass(count):
        prefix = (bound + decay[0, :, :count]).exp().sum(-1)
        return float((prefix / (prefix + math.exp(-bound))).max())

    assert 0 < number < 150
    assert worst_mass(number) <= math.exp(tolerance)
    old = (bound + decay[0, :, : number + 1]).exp().sum(-1) / math.exp(-bound)
    assert float(old.max()) > math.exp(tolerance)


@torch.no_grad()
def test_the_tolerance_is_spent_once_and_not_at_every_eviction():
    layer, limit = FoxEvictingLayer(), torch.full((1,), -8.0)
    generator = torch.Generator().manual_seed(0)
    history = torch.zeros(1, 1, 0)
    dropped = 0
    for _ in range(400):
        gate = -0.3 * torch.rand(1, 1, 1, generator=generator)
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        layer.update_gate(gate)
        history = torch.cat([history, gate], dim=-1).double()
        number = layer.num_droppable(limit)
        if number:
            layer.drop(number)
            dropped += number
        decay = history.flip(-1).cumsum(-1).flip(-1) - history
        assert dropped == 0 or float(decay[0, 0, :dropped].logsumexp(0)) <= -8.0 + 1e-4
        if dropped:
            assert float(layer.evicted_mass) == pytest.approx(float(decay[0, 0, :dropped].logsumexp(0)), abs=1e-3)
    assert dropped > 300


@torch.no_grad()
def test_open_gates_keep_everything():
    model = forgetful_model(fgate_decay_time_min=1e6, fgate_decay_time_max=1e7)
    for layer in model.layers:
        layer.self_attn.fgate_proj.weight.zero_()
    cache = FoxEvictingCache(model, every=1)
    for _ in range(80):
        step(model, random_tokens(1, 1), cache)
        assert cache.evict(force=True) == 0
    assert cache.get_seq_length() == 80 and cache.lost_mass_bound() == 0.0


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa", "fox_acp"])
def test_a_sequence_that_starts_over_sees_nothing_before(backend):
    model, tokens = forgetful_model(), random_tokens(3, 150)
    model.set_attn_implementation(backend)
    cache, starts = FoxEvictingCache(model, every=8), {40: [1], 90: [0, 1], 91: [2]}
    begin = [0, 0, 0]
    for t in range(150):
        if t in starts:
            cache.start_over(torch.tensor([row in starts[t] for row in range(3)]))
            for row in starts[t]:
                begin[row] = t
        got = step(model, tokens[:, t : t + 1], cache, cache.attention_mask())
        cache.evict()
        if t in (40, 41, 89, 90, 91, 100, 149):
            for row in range(3):
                alone = model(tokens[row : row + 1, begin[row] : t + 1], use_cache=False).last_hidden_state[:, -1]
                torch.testing.assert_close(got[row], alone, rtol=0, atol=1e-4)
    assert cache.get_seq_length() < 150


@torch.no_grad()
def test_sequences_can_be_selected_and_repeated():
    model, tokens = forgetful_model(), random_tokens(3, 120)
    cache = FoxEvictingCache(model)
    for t in range(100):
        step(model, tokens[:, t : t + 1], cache)
    cache.evict(force=True)
    cache.batch_select_indices(torch.tensor([2, 0]))
    for t in range(100, 120):
        got = step(model, tokens[[2, 0], t : t + 1], cache)
    expected = model(tokens[[2, 0]], use_cache=False).last_hidden_state[:, -1:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert cache.layers[0].evicted_mass.shape[0] == 2


@torch.no_grad()
def test_a_copy_looks_ahead_without_touching_the_original_or_the_model():
    model, tokens = forgetful_model(), random_tokens(1, 9)
    cache = FoxEvictingCache(model)
    for t in range(8):
        step(model, tokens[:, t : t + 1], cache)
    copied = copy.deepcopy(cache)
    ahead = step(model, tokens[:, 8:], copied)
    copied.check_weights()
    assert (cache.get_seq_length(), copied.get_seq_length()) == (8, 9)
    assert copied._attention[0] is model.layers[0].self_attn
    torch.testing.assert_close(step(model, tokens[:, 8:], cache), ahead)


def test_weights_that_changed_are_noticed():
    model = forgetful_model()
    cache = FoxEvictingCache(model)
    step(model, random_tokens(1, 4), cache)
    cache.check_weights()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(random_tokens(1, 4), use_cache=False).last_hidden_state.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="must be computed with the present weights; they were updated since"):
        cache.check_weights()


def test_says_what_cannot_be():
    with pytest.raises(ValueError, match="`use_qk_norm` must be True for safe eviction; got False"):
        FoxEvictingCache(forgetful_model(use_qk_norm=False))
    with pytest.raises(ValueError, match="`use_rope` must be False for eviction; got True"):
        FoxEvictingCache(forgetful_model(use_rope=True))
    with pytest.raises(ValueError, match="must be negative; got 0.5"):
        FoxEvictingCache(forgetful_model(), log_tolerance=0.5)
    with pytest.raises(ValueError, match="`every` must be at least 1; got 0"):
        FoxEvictingCache(forgetful_model(), every=0)
    with pytest.raises(ValueError, match="`model` must have FoX layers; got Linear"):
        FoxEvictingCache(nn.Linear(2, 2))
    model = forgetful_model()
    cache = FoxEvictingCache(model)
    step(model, random_tokens(1, 4), cache)
    with pytest.raises(ValueError, match="`tokens_to_remove` must be 0 in an evicting cache; got -1"):
        cache.layers[0].crop(-1)
