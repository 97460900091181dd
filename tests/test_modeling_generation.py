"""`generate` in every mode gives what the parallel forward says."""

import pytest
import torch
from transformers import StaticCache

from helpers import random_tokens, tiny_fox

BACKENDS = ["eager", "sdpa", "fox_acp"]
NUM_NEW = 12


def padded_batch():
    """Two prompts of 20 and 13 tokens, the second padded on the left with token 0."""
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    tokens[1, :7] = mask[1, :7] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def model_of(backend="sdpa", **config):
    return tiny_fox(attn_implementation=backend, pad_token_id=0, **config)


def generate(model, inputs, **options):
    return model.generate(**inputs, **({"max_new_tokens": NUM_NEW, "do_sample": False} | options))


@torch.no_grad()
def greedy_by_hand(model, prompt):
    """The most likely next token, over and over, without cache, mask or padding."""
    for _ in range(NUM_NEW):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="dynamic"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"prefill_chunk_size": 6}, id="chunked-prefill"),
        pytest.param({"use_cache": False}, id="no-cache"),
    ],
)
def test_greedy_search_of_a_padded_batch_is_that_of_each_prompt(backend, options):
    model, inputs = model_of(backend), padded_batch()
    got = generate(model, inputs, **options)
    for row, start in ((0, 0), (1, 7)):
        assert torch.equal(got[row, start:], greedy_by_hand(model, inputs["input_ids"][row : row + 1, start:])[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_beam_search_with_a_cache_is_that_without(backend):
    model, inputs = model_of(backend), padded_batch()
    options = {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True}
    got, expected = (generate(model, inputs, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, rtol=0, atol=1e-4)


def test_sampling_with_a_cache_is_that_without():
    model, inputs = model_of(), padded_batch()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3}
        drawn.append(generate(model, inputs, use_cache=use_cache, **options))
    assert torch.equal(*drawn)
    assert len({tuple(row.tolist()) for row in drawn[0]}) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompt_lookup_gives_the_greedy_text(backend):
    model = model_of(backend)
    prompt = random_tokens(1, 6).repeat(1, 4)
    got = generate(model, {"input_ids": prompt}, prompt_lookup_num_tokens=4)
    assert torch.equal(got, greedy_by_hand(model, prompt))


def test_assisted_decoding_gives_the_greedy_text():
    model, prompt = model_of(), random_tokens(1, 15)
    # One assistant that is mostly wrong and one that is always right: both ends of what is cropped from the cache.
    for assistant in (model_of(num_hidden_layers=1), model_of()):
        assert torch.equal(
            generate(model, {"input_ids": prompt}, assistant_model=assistant), greedy_by_hand(model, prompt)
        )


def test_a_conversation_goes_on_from_the_returned_cache():
    model, prompt = model_of(), random_tokens(1, 10)
    first = generate(model, {"input_ids": prompt}, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, random_tokens(1, 5, seed=9)], dim=1)
    got = generate(model, {"input_ids": longer}, past_key_values=first.past_key_values)
    assert torch.equal(got, greedy_by_hand(model, longer))


def test_a_static_cache_of_the_user_is_used_twice():
    model, prompt = model_of("fox_acp"), random_tokens(1, 10)
    cache = StaticCache(config=model.config, max_cache_len=40)
    for _ in range(2):
        assert torch.equal(
            generate(model, {"input_ids": prompt}, past_key_values=cache), greedy_by_hand(model, prompt)
        )
        cache.reset()


@torch.no_grad()
def decode_compiled(model, inputs, cache, num_steps, backend):
    """Greedy tokens `(B, num_steps)`: the prompt by plain code, as `generate` does on a GPU, then compiled steps."""
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    sequence, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(num_steps):
        options = {"attention_mask": mask, "past_key_values": cache, "is_first_iteration": step == 0}
        if step:
            options["next_sequence_length"] = 1
        prepared = model.prepare_inputs_for_generation(sequence, **options)
        out = (compiled if step else model)(**prepared, return_dict=True)
        sequence = torch.cat([sequence, out.logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    return sequence[:, -num_steps:]


@pytest.mark.parametrize("backend", ["sdpa", "fox_acp"])
def test_sixty_four_compiled_steps_on_a_static_cache_are_one_graph(backend):
    model, inputs, graphs = model_of(backend), padded_batch(), []
    expected = generate(model, inputs, max_new_tokens=65)[:, 20:]
    torch._dynamo.reset()
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def count(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    cache = StaticCache(config=model.config, max_cache_len=90)
    got = decode_compiled(model, inputs, cache, 65, count)
    assert torch.equal(got, expected)
    assert len(graphs) == 1
    operator = "forgetting_attention_decode" in graphs[0].print_readable(print_output=False)
    assert operator == (backend == "fox_acp")
    # From the start again it needs no other graph.
    cache.reset()
    assert torch.equal(decode_compiled(model, inputs, cache, 5, count), expected[:, :5])
    assert len(graphs) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_a_prompt_may_be_compiled_too():
    # `generate` does so with `prefill_chunk_size` on a GPU. 20 tokens take the dense mask, 4 the decode operator.
    model, tokens = model_of("fox_acp", num_hidden_layers=1), random_tokens(2, 44)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=64)
    pieces = [compiled(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([20, 20, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens, use_cache=False).logits, rtol=0, atol=1e-4)
    torch._dynamo.reset()


def test_caches_without_a_place_for_gates_are_refused_with_those_that_have_one():
    model, inputs = model_of(), padded_batch()
    with pytest.raises(ValueError, match="must not be 'quantized' for FoX: .* 'offloaded', or 'fox', which"):
        generate(model, inputs, cache_implementation="quantized")
    with pytest.raises(ValueError, match="continuous batching is not for FoX: .* Use `generate` with a batch padded"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
