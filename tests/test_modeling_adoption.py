"""A Llama, Mistral or Qwen3 with open gates added: the same at the start, able to forget after."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from helpers import random_tokens
from modeling_fox import FoxForCausalLM, forget_gates
from modeling_fox.adoption import add_gates, fox_config_of
from modeling_fox.convert import main

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
SOURCES = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "mistral": MistralConfig(**SIZES, head_dim=24, sliding_window=None),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
}


def save_source(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def largest_difference(one, other, tokens, mask=None):
    with torch.no_grad():
        got, expected = (model(tokens, attention_mask=mask, use_cache=False).logits for model in (one, other))
    assert expected.std() > 0.3
    real = 1 if mask is None else mask[..., None]
    return float(((got - expected) * real).abs().max())


@pytest.mark.parametrize("name", SOURCES)
def test_converted_it_has_the_logits_of_the_source(tmp_path, name):
    source = save_source(tmp_path / "source", SOURCES[name])
    main([str(tmp_path / "source"), str(tmp_path / "fox"), "--add-gates"])
    fox = FoxForCausalLM.from_pretrained(tmp_path / "fox")
    assert largest_difference(fox, source, random_tokens(2, 60)) < 1e-5
    assert fox.config.tie_word_embeddings == (fox.lm_head.weight is fox.model.embed_tokens.weight)
    prompt, new = random_tokens(1, 7), {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(fox.generate(prompt, **new), source.generate(prompt, **new))


def test_padding_on_the_left_is_as_in_the_source(tmp_path):
    source = save_source(tmp_path, SOURCES["qwen3"])
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    assert largest_difference(add_gates(tmp_path), source, tokens, mask) < 1e-5


def test_the_dtype_of_the_source_is_kept(tmp_path):
    AutoModelForCausalLM.from_config(SOURCES["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    model = add_gates(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_fine_tuned_its_gates_close_where_that_helps(tmp_path):
    """Two documents of one repeated token each: the first tells nothing of the second."""
    save_source(tmp_path, SOURCES["qwen3"])
    model = add_gates(tmp_path)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def batch_of(step):
        # Token 3 separates them.
        one, two = random_tokens(32, 1, seed=step), random_tokens(32, 1, seed=step + 10**6)
        mark = torch.full((32, 1), 3)
        return torch.cat([one.expand(-1, 10), mark, two.expand(-1, 10)], dim=1)

    with torch.no_grad(), forget_gates(model) as before:
        model(batch_of(10**7))
    losses = []
    for step in range(150):
        tokens = batch_of(step)
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad(), forget_gates(model) as after:
        model(batch_of(10**7))
    assert losses[-1] < 0.5 * losses[0]
    assert max(float(-gates.min()) for gates in before) < 1e-6
    # Some head of some layer has learned to forget a tenth or more at a token.
    assert max(float(-gates.min()) for gates in after) > 0.1


@pytest.mark.parametrize(
    "config, message",
    [
        (Qwen2Config(), "`model_type` must be one of .'llama', 'mistral', 'qwen3'. to add gates; got 'qwen2'"),
        (MistralConfig(sliding_window=512), "`sliding_window` must be off to add gates; got 512"),
        (LlamaConfig(attention_bias=True), "`attention_bias` must be off to add gates; got True"),
        (LlamaConfig(mlp_bias=True), "`mlp_bias` must be off"),
        (Qwen3Config(use_sliding_window=True), "`use_sliding_window` must be off"),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
            "`rope_type` must be off to add gates; got 'linear'",
        ),
    ],
)
def test_says_what_gates_cannot_be_added_to(config, message):
    with pytest.raises(ValueError, match=message):
        fox_config_of(config)


def test_loaded_as_if_it_were_fox_it_is_refused_and_told_how(tmp_path):
    """Its gates would be random."""
    SOURCES["llama"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model_type` must be 'fox'; got 'llama' in .* --add-gates"):
        FoxForCausalLM.from_pretrained(tmp_path)
