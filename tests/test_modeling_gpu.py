"""The whole model on a CUDA device: every backend against `eager` in float32, forward, backward and generation."""

import pytest
import torch

from helpers import assert_as_accurate_as_torch, random_tokens, tiny_fox

pytestmark = [
    pytest.mark.gpu,
    # Inductor and flex_attention announce their own deprecations while they compile.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
BACKENDS = ["sdpa", "flex_attention", "fox_acp"]


@pytest.fixture(autouse=True)
def _full_float32():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def gpu_fox(backend, dtype=torch.float32, **config):
    return tiny_fox(attn_implementation=backend, **config).to("cuda", dtype)


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, use_cache=False, **options).logits.float()


def test_the_default_on_a_gpu_is_the_operator():
    assert tiny_fox().config._attn_implementation == "fox_acp"


@pytest.mark.parametrize("length", [17, 300, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_logits_are_those_of_eager(backend, length):
    tokens = random_tokens(2, length).cuda()
    expected = logits(gpu_fox("eager"), tokens)
    torch.testing.assert_close(logits(gpu_fox(backend), tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_logits_are_as_accurate_as_eager(backend):
    tokens = random_tokens(2, 300).cuda()
    exact = logits(gpu_fox("eager"), tokens)
    eager = logits(gpu_fox("eager", torch.bfloat16), tokens)
    assert_as_accurate_as_torch(logits(gpu_fox(backend, torch.bfloat16), tokens), eager, exact)


def test_pruned_logits_stay_within_the_tolerance():
    tokens = random_tokens(2, 1000).cuda()
    options = dict(fgate_decay_time_min=1.0, fgate_decay_time_max=30.0)
    expected = logits(gpu_fox("eager", **options), tokens)
    model = gpu_fox("fox_acp", log_pruning_tolerance=-10.0, **options)
    from modeling_fox import pruning_stats

    with pruning_stats(model) as stats:
        got = logits(model, tokens)
    assert float(stats.pruned_fraction.max()) > 0.1
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_gradients_are_those_of_eager(backend):
    tokens = random_tokens(2, 200).cuda()

    def gradients(name):
        model = gpu_fox(name)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return {key: p.grad for key, p in model.named_parameters()}

    expected, got = gradients("eager"), gradients(backend)
    for name, gradient in expected.items():
        error = float((got[name] - gradient).abs().max())
        assert error <= 2e-4 * float(gradient.abs().max()), f"{name}: {error:.1e}"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["sdpa", "fox_acp"])
def test_generates_what_eager_generates_from_left_padded_prompts(backend, cache):
    tokens = random_tokens(3, 40).cuda()
    mask = torch.ones_like(tokens)
    mask[0, :13], mask[2, :30] = 0, 0
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = gpu_fox("eager").generate(tokens, **options)
    # Uncompiled: what a static cache computes is the question here, not what Inductor makes of it.
    got = gpu_fox(backend).generate(tokens, cache_implementation=cache, disable_compile=True, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("inputs", ["plain", "padded"])
def test_compiled_training_has_the_gradients_of_uncompiled(inputs):
    tokens = random_tokens(2, 200).cuda()
    options = {"labels": tokens, "use_cache": False}
    if inputs == "padded":
        mask = torch.ones_like(tokens)
        mask[0, :60] = 0
        options |= {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    def gradients(compiled):
        model = gpu_fox("fox_acp").train()
        run = torch.compile(model, fullgraph=True, mode="reduce-overhead") if compiled else model
        run(tokens, **options).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    expected, got = gradients(False), gradients(True)
    for name, gradient in expected.items():
        error = float((got[name] - gradient).abs().max())
        assert error <= 2e-4 * float(gradient.abs().max()), f"{name}: {error:.1e}"


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("backend", ["sdpa", "fox_acp"])
def test_a_cache_offloaded_to_the_cpu_generates_the_same(backend, cache):
    tokens = random_tokens(2, 300).cuda()
    model = gpu_fox(backend, num_hidden_layers=4)
    # The device falls behind Python, by some milliseconds a layer: what is not waited for shows.
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *args: torch.cuda._sleep(5_000_000))
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None, disable_compile=True)
    offloaded = dict(cache_implementation=cache, return_dict_in_generate=True)
    for extra in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        out = model.generate(tokens, **options, **extra, **offloaded)
        assert torch.equal(out.sequences, model.generate(tokens, **options, **extra))
        # Only the layer that comes next is on the device.
        devices = [layer.keys.device.type for layer in out.past_key_values.layers]
        assert devices == ["cuda", "cpu", "cpu", "cpu"]


def test_autocast_trains_with_the_gates_in_float32():
    model = gpu_fox("fox_acp").train()
    seen = []
    model.model.layers[0].self_attn.gate_sink = lambda gates: seen.append(gates.dtype)
    tokens = random_tokens(2, 100).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert seen == [torch.float32]
    assert all(float(p.grad.abs().max()) > 0 for name, p in model.named_parameters() if "fgate" in name)
