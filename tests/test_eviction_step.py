"""Fused decoding steps over the cache that forgets: the logits of the model itself, whatever it is made of."""

from functools import partial

import pytest
import torch

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxEvictingCache, FusedStep, GraphedStep

PROMPT, LENGTH = 150, 170
NO_GATES = {"fgate_type": "none", "fgate_decay_time_min": None, "fgate_decay_time_max": None}


@torch.no_grad()
def forgetful(**config):
    """Every weight is drawn, the norms' and the gates' as well: one that was left out would show."""
    times = {"fgate_decay_time_min": 1.5, "fgate_decay_time_max": 6.0}
    model = tiny_fox(**({"hidden_size": 32, "intermediate_size": 32} | times | config)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or "norm" in name:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator).to(weight))
    return model


@torch.no_grad()
def both(model, make_step, batch=2, steps=LENGTH - PROMPT):
    """Logits of the model and of the step, `(B, T, V)` each, and their caches."""
    tokens, caches = random_tokens(batch, PROMPT + steps).to(model.device), []
    mask = torch.ones(batch, PROMPT, dtype=torch.int64, device=model.device)
    mask[-1, :7] = 0
    for _ in range(2):
        caches.append(FoxEvictingCache(model.config, page_size=16))
        model(tokens[:, :PROMPT], attention_mask=mask, past_key_values=caches[-1], use_cache=True)
    step, pieces = make_step(model, caches[1]), ([], [])
    for token in tokens[:, PROMPT:].split(1, dim=1):
        pieces[0].append(model(token, past_key_values=caches[0], use_cache=True).logits)
        pieces[1].append(step(token).clone())
    return *(torch.cat(x, dim=1) for x in pieces), *caches


def fused(model, cache, how="plain"):
    step = FusedStep(model, how)
    return lambda ids: step(ids, cache)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 1},
        {"use_output_gate": False, "use_output_norm": False, "use_k_shift": False, "qk_norm_shared": True},
        {"fgate_type": "bias_only", "use_v_shift": False, "tie_word_embeddings": True},
        NO_GATES | {"use_multi_skip": True},
    ],
    ids=["pro", "grouped", "parts-left-out", "bias-only", "no-gates-multi-skip"],
)
def test_a_fused_step_gives_the_logits_of_the_model(config):
    expected, got, plain, used = both(forgetful(**config), fused)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert torch.equal(plain.report().live_keys, used.report().live_keys) and used.get_seq_length() == LENGTH
    assert config.get("fgate_type") == "none" or int(used.report().live_keys.min()) < LENGTH


def test_it_is_one_graph_for_the_compiler(monkeypatch):
    """And compiled once: neither the number of keys nor the sizes of the pool are a part of it."""
    counted = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: counted.append(1) or graph))
    expected, got, *_ = both(forgetful(), partial(fused, how="compiled"))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert len(counted) == 1


def test_half_precision_is_as_far_from_float32_as_the_model():
    model = forgetful().bfloat16()
    expected, got, *_ = both(model, fused)
    exact, *_ = both(model.float(), fused)
    error = [float((x.float() - exact).square().mean().sqrt()) for x in (got, expected)]
    assert 0 < error[0] < 1.2 * error[1]


@torch.no_grad()
def test_says_what_a_fused_step_cannot_do():
    with pytest.raises(ValueError, match=r"`model` must be on one device, without RoPE, .* use_rope=True. Call the"):
        FusedStep(forgetful(use_rope=True))
    model, token = forgetful(), random_tokens(1, 1)
    step, cache = FusedStep(model, "plain"), FoxEvictingCache(model.config)
    with pytest.raises(ValueError, match="`cache` must hold a prompt, .*; got 0 tokens, logit_bound=None, recording"):
        step(token, cache)
    with pytest.raises(ValueError, match="`model` must be on one CUDA device, without RoPE, and `cache` hold"):
        GraphedStep(step, cache)
    model(random_tokens(1, 5), past_key_values=cache, use_cache=True)
    assert step(token, cache).shape == (1, 1, model.config.vocab_size)
    with pytest.raises(ValueError, match="`how` must be one of .*; got 'kernels'. Kernels "):
        FusedStep(forgetful(use_multi_skip=True), "kernels")
    with pytest.raises(ValueError, match="`how` must be one of .*; got 'fast'. Take the first."):
        FusedStep(model, "fast")
    model.model.layers[1].mlp.up_proj.weight.mul_(2.0)
    with pytest.raises(ValueError, match="`model` must not change under its fused step; its weights did. Build a new"):
        step(token, cache)
    model.model.layers[0].self_attn.fgate_proj.half()
    with pytest.raises(
        ValueError, match="`model` must be of one dtype for a fused step; got .'torch.float16', 'torch.f"
    ):
        FusedStep(model)
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match="`model` must have plain linear layers for a fused step; got a Sequential"):
        FusedStep(model)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("kind", ["eager", "kernels", "compiled", "plain"])
def test_gpu_replayed_steps_give_the_logits_of_the_model(kind):
    def make(model, cache):
        return GraphedStep(model if kind == "eager" else FusedStep(model, kind), cache)

    model = forgetful(hidden_size=128, intermediate_size=128).cuda()
    expected, got, plain, used = both(model, make)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert used.get_seq_length() == LENGTH and torch.equal(plain.report().live_keys, used.report().live_keys)
