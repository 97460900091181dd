"""The caches: decoding with one equals the parallel forward, whatever is done to it in between."""

import copy
import math

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from fox_kernels import decode as decode_module
from fox_kernels.decode import forgetting_attention_decode
from fox_kernels.gates import gate_sums
from helpers import random_tokens, tiny_fox
from modeling_fox import FoxDynamicLayer, FoxStaticLayer, attention_fox
from modeling_fox.cache_fox import GrowingMemory

BACKENDS = ["eager", "sdpa", "fox_acp"]
VARIANTS = {
    "pro": {},
    "rope": {"use_rope": True},
    "k-shift-only": {"use_v_shift": False},
    "open": {"fgate_type": "none"},
}


def new_cache(kind, model, max_cache_len=48):
    return (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=max_cache_len)
    )


@torch.no_grad()
def decode(model, tokens, mask, chunks, cache):
    """Logits `(B, T, V)` of `tokens`, fed in pieces of these lengths; the mask grows as in `generate`."""
    logits, start = [], 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for length in chunks:
        end = start + length
        out = model(
            tokens[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        start = end
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1)


def left_padded(num_padding=9, length=33):
    tokens, mask = random_tokens(2, length), torch.ones(2, length, dtype=torch.int64)
    mask[1, :num_padding] = 0
    return tokens, mask


@torch.no_grad()
def parallel(model, tokens, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([12] + [1] * 21, id="prompt-then-steps"),
        pytest.param([1, 20, 5, 1, 1, 4, 1], id="chunked-prefill"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_the_parallel_forward(variant, chunks, kind, backend):
    model = tiny_fox(attn_implementation=backend, **VARIANTS[variant])
    tokens, mask = left_padded()
    difference = decode(model, tokens, mask, chunks, new_cache(kind, model)) - parallel(model, tokens, mask)
    assert difference[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output_norm", [True, False])  # hides the weight that padding takes from the rest
def test_a_padded_turn_of_a_chat_continues_as_if_it_had_no_padding(output_norm, backend, kind):
    # Two turns; the second is padded on the left for sequence 0, so that its first token must look past the padding
    # for the token before it. Then two tokens are generated.
    model = tiny_fox(attn_implementation=backend, use_output_norm=output_norm)
    tokens, mask = random_tokens(2, 22), torch.ones(2, 22, dtype=torch.int64)
    mask[0, 10:15] = 0
    mask[1, 8:10] = 0  # a first turn padded on the right
    got = decode(model, tokens, mask, [10, 10, 1, 1], new_cache(kind, model))
    for row in range(2):
        real = mask[row].bool()
        alone = tokens[row, real][None]
        expected = parallel(model, alone, torch.ones_like(alone))
        assert (got[row, real] - expected[0]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reordered_beams_go_on_from_the_beam_they_were_copied_from(kind):
    model = tiny_fox()
    prompt, following, order = random_tokens(3, 12), random_tokens(3, 6, seed=2), torch.tensor([2, 0, 0])
    cache = new_cache(kind, model)
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True)
        cache.reorder_cache(order)
        got = torch.cat([model(following[:, t : t + 1], past_key_values=cache).logits for t in range(6)], dim=1)
        expected = model(torch.cat([prompt[order], following], dim=1), use_cache=False).logits[:, 12:]
    assert (got - expected).abs().max() < 1e-4


def test_repeated_and_selected_sequences_keep_all_their_state():
    model, prompt, following = tiny_fox(), random_tokens(2, 12), random_tokens(3, 1, seed=2)
    cache = new_cache("dynamic", model)
    rows = torch.tensor([0, 0, 1, 1])[torch.tensor([3, 1, 2])]
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 1, 2]))
        got = model(following, past_key_values=cache).logits[:, 0]
        expected = model(torch.cat([prompt[rows], following], dim=1), use_cache=False).logits[:, -1]
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("num_removed", [0, 1, 4])
def test_cropped_cache_goes_on_from_what_is_left(num_removed):
    model, tokens, following = tiny_fox(), random_tokens(1, 17), random_tokens(1, 3, seed=2)
    cache = new_cache("dynamic", model)
    with torch.no_grad():
        model(tokens[:, :12], past_key_values=cache, use_cache=True)
        cache.activate_past_recording()
        model(tokens[:, 12:15], past_key_values=cache)
        model(tokens[:, 15:], past_key_values=cache)
        cache.crop(-num_removed)
        kept = tokens[:, : 17 - num_removed]
        assert cache.get_seq_length() == kept.shape[1]
        got = model(following, past_key_values=cache).logits
        expected = model(torch.cat([kept, following], dim=1), use_cache=False).logits[:, -3:]
    assert (got - expected).abs().max() < 1e-4
    # Trimmed by the crop, and again by the next: the recording does not grow with the sequence.
    cache.crop(0)
    assert cache.layers[0].shift_keys.shape == (1, 1, 2, 16)


def test_cropping_further_than_recorded_is_refused_and_changes_nothing():
    model, tokens = tiny_fox(), random_tokens(1, 9)
    cache = new_cache("dynamic", model)
    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimeError, match="reach back at most 0 tokens; got -2. Call `activate_past_recording"):
            cache.crop(-2)
        assert cache.get_seq_length() == 9
        cache.crop(-9)
        assert cache.get_seq_length() == 0
        again = model(tokens, past_key_values=cache).logits
        torch.testing.assert_close(again, model(tokens, use_cache=False).logits, rtol=0, atol=1e-4)


def test_cropping_to_a_length_is_refused():
    with pytest.raises(ValueError, match="`tokens_to_remove` must be 0 or negative; got 5"):
        FoxDynamicLayer().crop(5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_is_as_good_as_new(kind):
    model, tokens = tiny_fox(), random_tokens(2, 9)
    cache = new_cache(kind, model)
    with torch.no_grad():
        model(random_tokens(2, 14, seed=3), past_key_values=cache, use_cache=True)
        cache.reset()
        got = model(tokens, past_key_values=cache, use_cache=True).logits
        assert (got - model(tokens, use_cache=False).logits).abs().max() < 1e-4


def test_caches_are_built_from_our_layers_and_hold_gates_in_fp32():
    model = tiny_fox().to(torch.bfloat16)
    tokens = random_tokens(2, 9)
    for kind, layer_type, length in (("dynamic", FoxDynamicLayer, 9), ("static", FoxStaticLayer, 48)):
        cache = new_cache(kind, model)
        model(tokens, past_key_values=cache, use_cache=True)
        layer = cache.layers[1]
        assert type(layer) is layer_type
        assert layer.log_fgate.shape == (2, 4, length) and layer.log_fgate.dtype == torch.float32
        assert layer.keys.shape == (2, 2, length, 16) and layer.keys.dtype == torch.bfloat16
        assert layer.shift_keys.shape == (2, 1, 2, 16)


def test_static_buffers_stay_where_they_are():
    model, tokens = tiny_fox(num_key_value_heads=4), random_tokens(2, 12)
    cache = new_cache("static", model)
    names = ("keys", "values", "log_fgate", "shift_keys", "shift_values")
    addresses = []
    for step in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:]):
        model(step, past_key_values=cache, use_cache=True)
        addresses.append([getattr(cache.layers[0], name).data_ptr() for name in names])
    assert addresses[0] == addresses[1] == addresses[2]


def test_a_cache_built_without_config_is_filled_while_empty_and_refused_after():
    model, tokens = tiny_fox(), random_tokens(1, 8)
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache, use_cache=True)
        got = model(tokens[:, 5:], past_key_values=cache, use_cache=True).logits
        assert (got - model(tokens, use_cache=False).logits[:, 5:]).abs().max() < 1e-4
    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 0)
    assert type(foreign.layers[0]) is DynamicLayer
    with pytest.raises(ValueError, match="`past_key_values` must hold forget gates beside keys and values; got a Dyn"):
        model(tokens, past_key_values=foreign)


@torch.no_grad()
def test_tokens_are_appended_in_place_until_the_room_is_used_up():
    memory, kept, expected = GrowingMemory(-2), None, torch.zeros(2, 3, 0, 4)
    places = set()
    for length in [5] + [1] * 200 + [90, 1]:
        new = torch.randn(2, 3, length, 4)
        kept = memory.append(kept, new)
        expected = torch.cat([expected, new], dim=-2)
        assert torch.equal(kept, expected)
        places.add(kept.data_ptr())
    # Where the prompt was, then memory with room for 64 more each time.
    assert len(places) <= 1 + 5


@torch.no_grad()
def test_a_shallow_copy_of_a_layer_goes_on_by_itself():
    layer = FoxDynamicLayer()
    for length in (3, 1):
        layer.update(*torch.ones(2, 1, 2, length, 4))
    twin = copy.copy(layer)
    layer.update(*torch.full((2, 1, 2, 1, 4), 2.0))
    twin.update(*torch.full((2, 1, 2, 1, 4), 3.0))
    layer.update(*torch.full((2, 1, 2, 1, 4), 4.0))
    assert layer.keys[0, 0, :, 0].tolist() == layer.values[0, 1, :, 3].tolist() == [1.0, 1.0, 1.0, 1.0, 2.0, 4.0]
    assert twin.keys[0, 0, :, 0].tolist() == twin.values[0, 1, :, 3].tolist() == [1.0, 1.0, 1.0, 1.0, 3.0]


def test_with_gradients_nothing_is_written_over():
    layer, new = FoxDynamicLayer(), torch.ones(1, 2, 1, 4, requires_grad=True)
    with torch.no_grad():
        for length in (3, 1):
            layer.update(*torch.ones(2, 1, 2, length, 4))
    keys, _ = layer.update(new, new)
    squares = keys.square().sum()
    with torch.no_grad():
        layer.update(*torch.ones(2, 1, 2, 1, 4))
    squares.backward()
    assert torch.equal(new.grad, torch.full_like(new, 2.0))


def test_memory_of_inference_mode_is_not_written_to_outside_of_it():
    layer = FoxDynamicLayer()
    with torch.inference_mode():
        for length in (3, 1):
            layer.update(*torch.ones(2, 1, 2, length, 4))
            layer.update_gate(torch.full((1, 2, length), -1.0))
        layer.gate_sums()
    with torch.no_grad():
        layer.update(*torch.ones(2, 1, 2, 1, 4))
        layer.update_gate(torch.full((1, 2, 1), -1.0))
        assert layer.keys.shape == (1, 2, 5, 4)
        assert layer.gate_sums().running()[0, 0, 4] * math.log(2.0) == pytest.approx(-5.0)


@torch.no_grad()
def test_sums_beside_the_gates_have_the_bits_of_all_gates_summed_at_once():
    layer = FoxDynamicLayer()

    def feed(length):
        batch = 1 if layer.keys is None else layer.keys.shape[0]
        layer.update(*torch.zeros(2, batch, 1, length, 4))
        layer.update_gate(torch.nn.functional.logsigmoid(5 * torch.randn(batch, 2, length)))

    def check():
        sums, whole = layer.gate_sums(), gate_sums(layer.log_fgate)
        length = layer.log_fgate.shape[-1]
        assert torch.equal(sums.within[..., :length], whole.within)
        assert torch.equal(sums.starts[..., : whole.starts.shape[-1]], whole.starts)

    feed(200)
    check()
    for _ in range(70):
        feed(1)
    check()
    layer.activate_past_recording()
    for removed in (3, 20, 150):  # within a block, across one, and more than one
        feed(30)
        check()
        layer.crop(-removed)
        feed(2)
        check()
    layer.batch_repeat_interleave(3)
    feed(1)
    check()
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    feed(1)
    check()
    layer.batch_select_indices(torch.tensor([1]))
    feed(400)
    check()
    layer.reset()
    feed(5)
    check()
    # To the sums this would be a closed gate, which they leave out.
    layer.update(*torch.zeros(2, 1, 1, 1, 4))
    layer.update_gate(torch.full((1, 2, 1), -2e4))
    assert layer.gate_sums().running()[0, 0, 5] < -9000.0


@torch.no_grad()
def test_sums_of_a_static_cache_follow_its_gates():
    layer = FoxStaticLayer(max_cache_len=300)
    gates = torch.nn.functional.logsigmoid(5 * torch.randn(3, 2, 300))

    def feed(start, length):
        layer.update(*torch.zeros(2, 3, 1, length, 4))
        layer.update_gate(gates[..., start : start + length])

    def check(length):
        # Unfilled places hold no gates yet: only the sums of those in use say anything.
        sums, whole = layer.gate_sums(), gate_sums(layer.log_fgate[..., :length])
        assert torch.equal(sums.within[..., :length], whole.within)
        num_blocks = -(-length // 128)
        assert torch.equal(sums.starts[..., :num_blocks], whole.starts[..., :num_blocks])

    feed(0, 200)  # made in the middle
    check(200)
    places = [state.data_ptr() for state in layer._sum_states()]
    for start, length in ((200, 1), (201, 60), (261, 1)):
        feed(start, length)
        check(start + length)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    gates = gates[[2, 0, 0]]
    feed(262, 1)
    check(263)
    layer.reset()
    feed(0, 130)
    check(130)
    assert places == [state.data_ptr() for state in layer._sum_states()]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[60] + [1] * 20, [60, 4, 1, 15], [50, 16, 14]], ids=str)
@pytest.mark.parametrize("tolerance", [None, -12.0])
def test_fox_acp_decodes_from_sums(tolerance, chunks, kind, monkeypatch):
    monkeypatch.setattr(attention_fox, "ONE_QUERY_KEYS", 0)
    calls = []

    def decode_and_count(*args, **kwargs):
        calls.append(kwargs)
        return forgetting_attention_decode(*args, **kwargs)

    monkeypatch.setattr(attention_fox, "forgetting_attention_decode", decode_and_count)
    model = tiny_fox(attn_implementation="fox_acp", log_pruning_tolerance=tolerance)
    tokens, mask = left_padded(length=80)
    got = decode(model, tokens, mask, chunks, new_cache(kind, model, max_cache_len=100))
    assert len(calls) == 2 * sum(length <= 16 for length in chunks)
    assert all((call["logit_bound"] is None) == (tolerance is None) for call in calls)
    assert {call["pruning_rule"] for call in calls} == {"tight"}
    difference = got - parallel(model, tokens, mask)
    assert difference[mask.bool()].abs().max() < 1e-4


@torch.no_grad()
def test_the_tight_rule_prunes_a_step_further_and_no_row_loses_more_than_eps(monkeypatch):
    """What a step drops, against the weights of the definition in float64."""
    monkeypatch.setattr(attention_fox, "ONE_QUERY_KEYS", 0)
    find, found, length, begin = decode_module.first_decoded_key, [], 1300, 1200

    def find_and_note(*args, **kwargs):
        found.append(find(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(decode_module, "first_decoded_key", find_and_note)
    times = {"fgate_decay_time_min": 8.0, "fgate_decay_time_max": 40.0, "num_hidden_layers": 1}
    model = tiny_fox(attn_implementation="fox_acp", log_pruning_tolerance=-8.0, **times)
    tokens, dropped = random_tokens(1, length), {}
    for rule in ("paper", "tight"):
        model.config.pruning_rule = rule
        cache = DynamicCache(config=model.config)
        for piece in tokens.split([begin, *[1] * (length - begin)], dim=1):
            model(piece, past_key_values=cache, use_cache=True)
        dropped[rule] = torch.cat(found, dim=-1)[0]  # (H, steps)
        found.clear()
    assert (dropped["tight"] >= dropped["paper"]).all() and (dropped["tight"] > dropped["paper"]).any()
    model.double().set_attn_implementation("eager")
    weights = model(tokens, use_cache=False, output_attentions=True).attentions[0][0][:, begin:]
    lost = (weights * (torch.arange(length) < dropped["tight"][..., None])).sum(-1)
    assert 0 < float(lost.max()) <= math.exp(-8.0)
