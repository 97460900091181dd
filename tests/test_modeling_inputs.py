"""What a FoX model may be given and asked for beside tokens: each against the plain forward of the same text.

Padding, and positions that contradict it, are in test_modeling_backends.py, `logits_to_keep` too.
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening, StaticCache

from helpers import random_tokens, tiny_fox
from modeling_fox.attention_fox import FOX_BACKENDS

DENSE = ["eager", "sdpa", "fox_acp"]


@pytest.fixture
def documents():
    return [random_tokens(1, length, seed=length) for length in (9, 1, 14)]


@torch.no_grad()
def alone(model, documents):
    return torch.cat([model(tokens, use_cache=False).logits for tokens in documents], dim=1)


@pytest.mark.parametrize("backend", DENSE)
@pytest.mark.parametrize("options", [{}, {"use_rope": True}], ids=["pro", "rope"])
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens", "both"])
@torch.no_grad()
def test_packed_documents_are_as_if_alone(given, options, backend, documents):
    model = tiny_fox(attn_implementation=backend, **options)
    features = [{"input_ids": tokens[0].tolist()} for tokens in documents]
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(features)
    batch.pop("labels")
    if given == "position_ids":
        batch = {name: batch[name] for name in ("input_ids", "position_ids")}
    elif given == "cu_seq_lens":
        batch.pop("position_ids")
    got = model(**batch, use_cache=False).logits
    torch.testing.assert_close(got, alone(model, documents), rtol=0, atol=1e-4)


def test_boundaries_are_for_one_row(documents):
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q` must be one list of boundaries .* \(3,\) for 2 rows"):
        tiny_fox()(random_tokens(2, 6), cu_seq_lens_q=torch.tensor([0, 2, 6]), use_cache=False)


@pytest.mark.parametrize("lengths", [[4, 2], [0, 4, 2], [0, 4, 7]], ids=["lengths", "going back", "past the end"])
def test_lengths_are_no_boundaries(lengths):
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q` must rise from 0 to at most 6 tokens; got \[.*running sum"):
        tiny_fox()(random_tokens(1, 6), cu_seq_lens_q=torch.tensor(lengths), use_cache=False)


@pytest.mark.parametrize("backend", DENSE)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_a_mask_of_every_pair_is_obeyed(dtype, backend):
    """True or 0.0 where a token may look; with a cache too."""
    model, tokens = tiny_fox(attn_implementation=backend, use_k_shift=False, use_v_shift=False), random_tokens(2, 12)
    sees = torch.ones(12, 12, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    sees[:, :, 7:, :7] = False
    mask = sees if dtype == torch.bool else torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(dtype).min)
    expected = alone(model, [tokens[:, :7], tokens[:, 7:]])
    torch.testing.assert_close(model(tokens, attention_mask=mask, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    cache = model(tokens[:, :9], attention_mask=mask[:, :, :9, :9]).past_key_values
    rest = model(tokens[:, 9:], attention_mask=mask[:, :, 9:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 9:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "backend, shape, dtype, message",
    [
        ("eager", (2, 1, 12, 12), torch.int64, "of 4 dimensions must be bool or floating point; got torch.int64"),
        ("eager", (2, 12, 12), torch.bool, r"must be \(B, S\) or \(B, 1, T, S\); got \(2, 12, 12\)"),
        ("flex_attention", (2, 1, 12, 12), torch.bool, "must be `None` or \\(B, S\\) with 'flex_attention'"),
        ("sdpa", (2, 7), torch.int64, r"must cover all 12 tokens, cached and new; got \(2, 7\)"),
    ],
)
@torch.no_grad()
def test_says_what_is_wrong_with_a_mask(backend, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        tiny_fox(attn_implementation=backend)(random_tokens(2, 12), attention_mask=torch.ones(shape, dtype=dtype))


@torch.no_grad()
def test_a_mask_of_the_new_tokens_alone_is_refused():
    model, tokens = tiny_fox(), random_tokens(2, 12)
    cache = model(tokens[:, :8]).past_key_values
    with pytest.raises(ValueError, match=r"must cover all 12 tokens, cached and new; got \(2, 4\)"):
        model(tokens[:, 8:], attention_mask=torch.ones(2, 4), past_key_values=cache)
    assert cache.get_seq_length() == 8


@torch.no_grad()
def test_embeddings_stand_for_tokens():
    model, tokens = tiny_fox(), random_tokens(2, 12)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    text = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False), text[:, 12:])


@torch.no_grad()
def test_attention_weights_are_those_that_the_output_is_made_of():
    model, tokens = tiny_fox(attn_implementation="eager", num_key_value_heads=4), random_tokens(2, 12)
    attention, seen = model.model.layers[1].self_attn, {}
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(output=args[0]))
    attention.v_proj.register_forward_hook(lambda module, args, out: seen.update(value=out))
    attention.v_shift_proj.register_forward_hook(lambda module, args, out: seen.update(shift=out))
    attention.ogate_proj.register_forward_hook(lambda module, args, out: seen.update(gate=out))
    weights = model(tokens, output_attentions=True, use_cache=False).attentions
    assert [tuple(x.shape) for x in weights] == [(2, 4, 12, 12)] * 2
    assert torch.equal(weights[1], weights[1].tril())
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 4, 12))
    value = seen["value"].view(2, 12, 4, 16)
    before = torch.nn.functional.pad(value, (0, 0, 0, 0, 1, 0))[:, :-1]
    value = torch.lerp(value, before, seen["shift"].sigmoid()[..., None])
    mixed = torch.einsum("bhts,bshd->bthd", weights[1], value)
    expected = attention.output_norm(mixed).reshape(2, 12, 64) * seen["gate"].sigmoid()
    torch.testing.assert_close(seen["output"], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_hidden_states_are_those_between_the_layers():
    model, tokens = tiny_fox(), random_tokens(2, 12)
    states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == 3 and torch.equal(states[0], model.get_input_embeddings()(tokens))
    layers = model.model.layers
    assert torch.equal(layers[0](states[0]), states[1])
    torch.testing.assert_close(model.model.norm(layers[1](states[1])), states[2])
    assert torch.equal(model.lm_head(states[2]), model(tokens, use_cache=False).logits)


def test_backends_without_gates_are_refused_with_the_list_of_those_with():
    with pytest.raises(ValueError, match="no place for the forget gates") as error:
        tiny_fox().set_attn_implementation("flash_attention_2")
    assert all(backend in str(error.value) for backend in FOX_BACKENDS)


@pytest.mark.parametrize("backend", DENSE)
@torch.no_grad()
def test_compiled_code_tells_padding_from_documents(backend):
    """It sees no values: a mask with positions may mean either, and is not to be dropped for the other."""
    model, tokens = tiny_fox(attn_implementation=backend, num_hidden_layers=1), random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    padded = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    positions = torch.cat((torch.arange(7), torch.arange(5))).expand(2, -1)
    packed = dict(attention_mask=torch.ones_like(tokens), position_ids=positions)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for inputs, real in ((padded, mask.bool()), (packed, mask >= 0)):
        expected, got = (f(tokens, use_cache=False, **inputs).logits[real] for f in (model, compiled))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", DENSE)
@torch.no_grad()
def test_a_mask_may_be_as_wide_as_a_static_cache(backend):
    """One shape for all steps, which is what compiled code wants."""
    model, tokens = tiny_fox(attn_implementation=backend), random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    cache = StaticCache(config=model.config, max_cache_len=20)
    expected = model(tokens, attention_mask=mask).logits
    got = []
    for part in (slice(0, 2), slice(2, 9), slice(9, 10), slice(10, 12)):
        wide = torch.nn.functional.pad(mask[:, : part.stop], (0, 20 - part.stop))
        got.append(model(tokens[:, part], attention_mask=wide, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)
