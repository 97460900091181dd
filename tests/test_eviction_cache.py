"""The cache that forgets, in the model: the same text and logits, bounded memory, and a bound that is never passed."""

import contextlib
import copy
import math

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from twenty_thousand_steps import lost_by_the_operator

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxEvictingCache, FoxModel, eviction_fox
from modeling_fox.eviction_fox import FoxEvictingLayer

NUM_NEW = 80


def forgetful(**config):
    times = {"fgate_decay_time_min": 1.5, "fgate_decay_time_max": 6.0, "pad_token_id": 0}
    return tiny_fox(hidden_size=32, intermediate_size=32, **(times | config))


def padded_batch():
    """Two prompts of 20 and 13 tokens, the second padded on the left with token 0."""
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    tokens[1, :7] = mask[1, :7] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model, inputs, **options):
    return model.generate(**inputs, **({"max_new_tokens": NUM_NEW, "do_sample": False} | options))


@torch.no_grad()
def step(model, tokens, cache, mask=None):
    return model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)[0]


def live(cache):
    return int(cache.report().live_keys.sum())


def test_models_keep_their_own_layer():
    assert not any(isinstance(x, FoxEvictingLayer) for x in DynamicCache(config=forgetful().config).layers)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prefill_chunk_size": 6}, id="chunked-prefill"),
        pytest.param({"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 50}, id="beams"),
    ],
)
def test_the_text_is_that_of_the_full_cache(options):
    model, inputs = forgetful(), padded_batch()
    expected = generate(model, inputs, **options)
    got = generate(
        model, inputs, cache_implementation="fox", cache_config={"page_size": 16}, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    assert torch.equal(got.sequences, expected)
    cache = got.past_key_values
    assert isinstance(cache, FoxEvictingCache) and cache.get_seq_length() == expected.shape[1] - 1
    assert live(cache) < (0.95 if "num_beams" in options else 0.85) * cache.report().full_keys


def test_a_generation_config_chooses_it():
    config = GenerationConfig(cache_implementation="fox", max_new_tokens=3, do_sample=False, pad_token_id=0)
    got = forgetful().generate(**padded_batch(), generation_config=config, return_dict_in_generate=True)
    assert isinstance(got.past_key_values, FoxEvictingCache)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 25}, "assistant"])
def test_assisted_decoding_gives_the_greedy_text_and_still_forgets(options):
    model, prompt = forgetful(), random_tokens(1, 6).repeat(1, 4)
    options = {"assistant_model": forgetful(num_hidden_layers=1)} if options == "assistant" else options
    inputs, cache = {"input_ids": prompt}, FoxEvictingCache(model.config, page_size=16)
    expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs, past_key_values=cache, **options), expected)
    assert live(cache) < 0.85 * cache.report().full_keys


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 300, [100, 1, 1, 60, 120, 18]], ids=["steps", "chunks"])
def test_logits_are_those_of_the_full_cache_and_memory_stays_bounded(cuts):
    model, tokens = forgetful(), random_tokens(2, 300)
    cache, pieces, most = FoxEvictingCache(model.config, page_size=16), [], []
    for piece in tokens.split(cuts, dim=1):
        pieces.append(step(model, piece, cache))
        most.append(cache.memory_bytes())
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens, use_cache=False).logits, rtol=0, atol=1e-3)
    report = cache.report()
    assert 0 < report.lost_mass_bound <= math.exp(-10) and report.is_proven
    assert report.num_tokens == 300 and report.full_keys == 2 * 2 * 2 * 300 == 300 * report.live_keys.numel()
    assert int(report.live_keys.sum()) < 0.45 * report.full_keys and most[-1] <= 1.3 * max(most[: len(most) // 2])
    assert "of 2400 keys live" in str(report) and "proven" in str(report)


@torch.no_grad()
def test_no_row_of_attention_ever_had_more_on_what_was_dropped():
    """The true weights in float64, from the whole sequence at once, over what was gone by the time of each query."""
    model, tokens = forgetful(num_hidden_layers=1), random_tokens(1, 200)
    model.model.layers[0].self_attn.q_norm.weight.mul_(1.7)  # sharper attention, and with it a larger bound
    cache, first = FoxEvictingCache(model.config, log_pruning_tolerance=-4.0, page_size=16), []
    for t in range(200):
        step(model, tokens[:, t : t + 1], cache)
        first.append(t + 1 - cache.report().live_keys[0, 0])  # (H_kv,)
    model.double().set_attn_implementation("eager")
    weights = model(tokens, use_cache=False, output_attentions=True).attentions[0][0]  # (H, T, S)
    gone = torch.arange(200) < torch.stack(first).T.repeat_interleave(2, 0)[..., None]
    lost = float((weights * gone).sum(-1).max())
    assert 0 < lost <= cache.lost_mass_bound() <= math.exp(-4.0)


def test_with_trained_gates_no_row_loses_more_than_eps():
    """At the worst scores that the bound allows; `python tests/twenty_thousand_steps.py` takes 20,000 steps."""
    found = [head[1:] for head in lost_by_the_operator(300, torch.bfloat16) if "worst  scores, trained" in head[0]]
    assert len(found) == 10 and sum(dropped > 100 for dropped, *_ in found) >= 5
    assert all(lost <= reported <= math.exp(-10.0) for _, lost, _, reported in found)
    assert max(lost for _, lost, *_ in found) > 1e-7


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
def test_open_gates_keep_everything(dtype):
    model = forgetful(fgate_decay_time_min=1e6, fgate_decay_time_max=1e7).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.fgate_proj.weight.zero_()
    cache = FoxEvictingCache(model.config, page_size=16)
    for tokens in (random_tokens(1, 50), random_tokens(1, 1)):
        step(model, tokens, cache)
    assert cache.evict() == 0 and live(cache) == cache.report().full_keys and cache.lost_mass_bound() == 0.0


@torch.no_grad()
def test_a_limit_is_kept_and_the_bound_says_so():
    model, tokens = forgetful(fgate_decay_time_max=60.0), random_tokens(1, 300)
    limit = 40_000
    cache, free = FoxEvictingCache(model.config, page_size=16, max_cache_bytes=limit), FoxEvictingCache(model.config)
    for piece in tokens.split([100, *[1] * 150, 50], dim=1):
        step(model, piece, cache)
        (store,) = cache.pages.stores.values()
        assert len(store.keys) * store.page_bytes() <= limit
    step(model, tokens, free)
    report = cache.report()
    assert free.memory_bytes() > 1.5 * limit and free.report().is_proven and not report.is_proven
    assert math.exp(-10.0) < report.lost_mass_bound <= 1.0 and "NOT within the tolerance" in str(report)
    with pytest.raises(ValueError, match="`max_cache_bytes` must be at least .*, two pages of 64 tokens for each"):
        step(model, tokens, FoxEvictingCache(model.config, max_cache_bytes=limit // 10))
    with pytest.raises(ValueError, match="`max_cache_bytes` must be None for assisted decoding, which goes back"):
        cache.activate_past_recording()


@torch.no_grad()
def test_without_qk_norm_a_given_bound_is_checked_at_every_step():
    model, tokens = forgetful(use_qk_norm=False), random_tokens(1, 200)
    cache = FoxEvictingCache(model.config, page_size=16, logit_bound=30.0)
    got = torch.cat([step(model, x, cache) for x in tokens.split([100, *[1] * 100], dim=1)], dim=1)
    torch.testing.assert_close(got, model(tokens, use_cache=False).logits, rtol=0, atol=1e-3)
    cache = FoxEvictingCache(model.config, logit_bound=30.0)
    step(model, tokens[:, :50], cache)
    model.model.layers[1].self_attn.q_proj.weight.data *= 1e3  # behind the back of the version counter
    with pytest.raises(ValueError, match=r"`logit_bound` must be at least every \|scaling \* q . k\|; got 30.0, and"):
        step(model, tokens[:, 50:51], cache)


def test_changed_weights_are_refused():
    model, tokens = forgetful(), random_tokens(1, 4)
    cache = FoxEvictingCache(model.config)
    step(model, tokens, cache)
    cache.check_weights()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="must be computed with the present weights; they were updated since"):
        cache.check_weights()
    with pytest.raises(ValueError, match="must be computed with the present weights; they were updated since"):
        step(model, tokens, cache)
    cache.reset()
    assert step(model, tokens, cache).shape == (1, 4, 97)
    with pytest.raises(ValueError, match="they were updated since, or are those of another model. Build a new cache"):
        step(copy.deepcopy(model), tokens, cache)
    (store,) = cache.pages.stores.values()
    store.device = torch.device("meta")
    with pytest.raises(ValueError, match="must be on the device of its layer, cpu; got pages on meta. Build a new"):
        step(model, tokens, cache)
    cache.reset()
    step(model, tokens, cache)
    # The keys of later layers are made of what the MLP gave.
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    with pytest.raises(ValueError, match="they were updated since"):
        step(model, tokens, cache)


@torch.no_grad()
def test_where_there_is_no_room_the_token_can_be_fed_again(monkeypatch):
    model, tokens = forgetful(fgate_decay_time_max=200.0), random_tokens(1, 90)
    cache = FoxEvictingCache(model.config, page_size=16)
    step(model, tokens[:, :64], cache)
    (store,) = cache.pages.stores.values()
    for t in range(64, 90):
        before = len(store.keys)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_zeros", lambda *_, **__: refuse_memory())
            try:
                got = step(model, tokens[:, t : t + 1], cache)
            except torch.OutOfMemoryError:
                patch.undo()
                got = step(model, tokens[:, t : t + 1], cache)
                assert len(store.keys) > before
                break
    else:
        pytest.fail("the pool never had to grow")
    expected = model(tokens[:, : t + 1], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def refuse_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("where", "number"), [("append", 1), ("_step_on_cpu", 1), ("mlp", 1), ("_chunk", 40), ("extend", 40)]
)
def test_an_interrupted_call_leaves_no_cache_to_go_on_with(where, number, layer, monkeypatch):
    model, tokens = forgetful(), random_tokens(2, 80)
    cache = FoxEvictingCache(model.config, page_size=16)
    step(model, tokens[:, :30], cache)
    (store,) = cache.pages.stores.values()
    paged_attention = eviction_fox.operators()[1]
    place = {"append": store, "extend": store, "mlp": model.model.layers[layer].mlp}.get(where, paged_attention)
    where = "forward" if where == "mlp" else where
    original, calls = getattr(place, where), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == layer + 1 or where == "forward":
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, where, interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            step(model, tokens[:, 30 : 30 + number], cache)
    if (where, layer) == ("forward", 1):  # the last layer's MLP: all keys are there
        expected = model(tokens[:, : 31 + number], use_cache=False).logits[:, -1:]
        got = step(model, tokens[:, 30 + number : 31 + number], cache)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        return
    with pytest.raises(
        ValueError, match="a call was interrupted, for want of memory or by a signal. Build a new cache"
    ):
        step(model, tokens[:, 30 : 30 + number], cache)
    cache.reset()
    step(model, tokens[:, :30], cache)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "fox_acp"])
def test_a_sequence_that_starts_over_sees_nothing_before(backend):
    model, tokens = forgetful(model_class=FoxModel), random_tokens(3, 150)
    model.set_attn_implementation(backend)
    cache, starts = FoxEvictingCache(model.config, page_size=16), {40: [1], 90: [0, 1], 91: [2]}
    begin = [0, 0, 0]
    for t in range(150):
        if t in starts:
            cache.start_over(torch.tensor([row in starts[t] for row in range(3)]))
            for row in starts[t]:
                begin[row] = t
        got = step(model, tokens[:, t : t + 1], cache)
        if t in (40, 41, 90, 91, 100, 149):
            for row in range(3):
                alone = model(tokens[row : row + 1, begin[row] : t + 1], use_cache=False).last_hidden_state[:, -1]
                torch.testing.assert_close(got[row], alone, rtol=0, atol=1e-4)
    assert int(cache.report().live_keys.max()) < 110


@torch.no_grad()
def test_sequences_can_be_selected_repeated_and_cropped():
    model, tokens = forgetful(), random_tokens(3, 120)
    cache = FoxEvictingCache(model.config, page_size=16)
    cache.activate_past_recording()
    for piece in tokens[:, :100].split(10, dim=1):
        step(model, piece, cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-5)
    got = step(model, tokens[[2, 2, 0, 0], 95:], cache)
    expected = model(tokens[[2, 2, 0, 0]], use_cache=False).logits[:, 95:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert cache.get_seq_length() == 120
    with pytest.raises(RuntimeError, match="`tokens_to_remove` must reach back at most 2[0-9] tokens; got -100. Call"):
        cache.crop(-100)
    with pytest.raises(ValueError, match="`tokens_to_remove` must be 0 or negative; got 1"):
        cache.crop(1)


@torch.no_grad()
def test_a_copy_looks_ahead_without_touching_the_original():
    model, tokens = forgetful(), random_tokens(1, 40)
    cache = FoxEvictingCache(model.config, page_size=16)
    for t in range(38):
        step(model, tokens[:, t : t + 1], cache)
    copied = copy.deepcopy(cache)
    ahead = torch.cat([step(model, tokens[:, t : t + 1], copied) for t in (38, 39)], dim=1)
    copied.check_weights()
    assert (cache.get_seq_length(), copied.get_seq_length()) == (38, 40)
    got = torch.cat([step(model, tokens[:, t : t + 1], cache) for t in (38, 39)], dim=1)
    assert torch.equal(got, ahead)


@torch.no_grad()
def test_it_goes_on_after_inference_mode_and_with_rotary_positions():
    model, tokens = forgetful(use_rope=True), random_tokens(1, 60)
    cache = FoxEvictingCache(model.config, page_size=16)
    with torch.inference_mode():
        first = step(model, tokens[:, :40], cache)
    rest = [step(model, x, cache) for x in tokens[:, 40:].split(1, dim=1)]
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_compiled_attention_leaves_its_graph_for_the_cache():
    model, tokens = forgetful(num_hidden_layers=1), random_tokens(1, 43)
    expected, attention = model(tokens, use_cache=False).logits, model.model.layers[0].self_attn
    attention.forward = torch.compile(attention.forward, backend="eager")
    cache = FoxEvictingCache(model.config, page_size=16)
    got = torch.cat([step(model, x, cache) for x in tokens.split([41, 1, 1], dim=1)], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_says_what_cannot_be():
    model = forgetful()
    with pytest.raises(ValueError, match=r"`cache_config` may hold \['log_pruning_tolerance', .*; got \['pages'\]"):
        generate(model, padded_batch(), cache_implementation="fox", cache_config={"pages": 3})
    with pytest.raises(ValueError, match="`use_qk_norm` must be True for safe eviction; got False"):
        FoxEvictingCache(forgetful(use_qk_norm=False).config)
    with pytest.raises(ValueError, match="must be negative; got 0.5"):
        FoxEvictingCache(model.config, log_pruning_tolerance=0.5)
    with pytest.raises(ValueError, match="`page_size` must be a power of 2 and at least 16; got 48"):
        FoxEvictingCache(model.config, page_size=48)
    with pytest.raises(ValueError, match="`max_cache_bytes` must be a positive whole number; got 0"):
        FoxEvictingCache(model.config, max_cache_bytes=0)
    with pytest.raises(
        ValueError, match="`max_cache_bytes` must be a positive whole number; got '1GB'. A gigabyte is"
    ):
        FoxEvictingCache(model.config, max_cache_bytes="1GB")
    with pytest.raises(ValueError, match="`cache_config` must be a dict of options of FoxEvictingCache; got a int. F"):
        generate(model, padded_batch(), cache_implementation="fox", cache_config=64)
    with pytest.raises(ValueError, match="`logit_bound` must be a positive number of nats; got -1"):
        FoxEvictingCache(model.config, logit_bound=-1)
    with pytest.raises(ValueError, match="`config` must be that of a FoX model; got a GenerationConfig"):
        FoxEvictingCache(GenerationConfig())
    cache, tokens = FoxEvictingCache(model.config), random_tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="`attention_mask` must be 0 before the first token of a sequence only"):
        step(model, tokens, cache, mask)
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(batch, 6\) with an evicting cache"):
        step(model, tokens, cache, torch.ones(2, 9))
    other = FoxEvictingCache(forgetful(num_hidden_layers=1).config)
    with pytest.raises(
        ValueError, match="`past_key_values` must be built with the config of its model, of 2 layers; g"
    ):
        step(model, tokens, other)
    step(model, tokens, cache)
    with pytest.raises(
        ValueError, match="`past_key_values` must hold as many sequences as there are new ones, 1; got"
    ):
        step(model, tokens[:1], cache)
    with pytest.raises(ValueError, match="an evicting cache cannot be offloaded"):
        cache.layers[0].offload()
    with pytest.raises(ValueError, match="continuous batching is not for FoX"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
