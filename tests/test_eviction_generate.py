"""`generate` with compiled steps over the cache that forgets: the text that it gives without them."""

import copy
import logging
import pickle

import pytest
import torch
from transformers import CompileConfig
from transformers.utils import logging as transformers_logging

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxEvictingCache
from modeling_fox.graphed_fox import FusedStep

LENGTH = 40


@pytest.fixture
def compiled(monkeypatch):
    """Functions that are compiled, by a compiler that does nothing; test_eviction_step.py has the one that does."""
    functions = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: functions.append(function) or function)
    return functions


@pytest.fixture(scope="module")
def made():
    return tiny_fox(fgate_decay_time_min=1.5, fgate_decay_time_max=6.0).eval()


@pytest.fixture
def model(made):
    return copy.deepcopy(made)


def on_any_device():
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def generated(model, compile_config, batch=2, **options):
    """What `generate` returns for prompts of which one is padded, with the logits."""
    tokens = random_tokens(batch, 30)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    torch.manual_seed(0)
    options = {"cache_implementation": "fox", "cache_config": {"page_size": 16}, "do_sample": False} | options
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=LENGTH, compile_config=compile_config, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def assert_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=2e-5)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
        {"eos_token_id": 7, "prefill_chunk_size": 29},
    ],
)
def test_the_text_is_the_same(model, compiled, options):
    expected = generated(model, None, **options)
    assert model._fused_step is None and not compiled
    assert_same(generated(model, on_any_device(), **options), expected)
    assert model._fused_step is not None and len(compiled) == 1
    assert_same(generated(model, on_any_device(), **options), expected)
    assert len(compiled) == 1  # the second text needs no second compilation


def test_other_weights_are_another_step(model, compiled):
    generated(model, on_any_device())
    first = model._fused_step
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
        model.model.layers[1].self_attn.q_proj.weight.data.mul_(-2.0)
    assert_same(generated(model, on_any_device()), generated(model, None))
    assert model._fused_step is not first


def test_copies_and_files_of_a_model_have_no_step(model, compiled):
    expected = generated(model, on_any_device())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._fused_step is None
        assert_same(generated(other, on_any_device()), expected)
    assert model.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_hidden_states": True}, "hidden states"),
        ({"training": True}, "training"),
        ({"prefill_chunk_size": 1}, "single tokens"),
        ({"past_key_values": "bound"}, "logit_bound"),
        ({"past_key_values": "recording"}, "assisted"),
    ],
)
def test_what_cannot_be_compiled_is_said(model, compiled, caplog, monkeypatch, options, reason):
    options = dict(options)
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    if options.pop("training", False):
        model.train().config.hidden_dropout = 0.1
    if "past_key_values" in options:
        cache = FoxEvictingCache(model.config, logit_bound=20.0 if options["past_key_values"] == "bound" else None)
        if options["past_key_values"] == "recording":
            cache.activate_past_recording()
        options = {"past_key_values": cache, "cache_implementation": None, "cache_config": None}
    generated(model, on_any_device(), **options)
    assert not compiled and model._fused_step is None
    assert reason in caplog.text


def test_a_cpu_is_left_alone_and_so_is_who_disables_compilation(model, compiled):
    expected = generated(model, None)
    assert_same(generated(model, CompileConfig()), expected)
    assert_same(generated(model, on_any_device(), disable_compile=True), expected)
    assert not compiled


def test_quantized_weights_make_no_step(model):
    class Sharded(torch.Tensor):
        pass

    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Sharded))
    with pytest.raises(ValueError, match="plain linear layers.*sharded"):
        FusedStep(model)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_text_from_graphs_is_the_same(made, dtype):
    model = copy.deepcopy(made).to("cuda", dtype)
    tokens = random_tokens(2, 60).cuda()
    texts = [
        model.generate(
            tokens, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0, cache_implementation="fox",
            compile_config=config, return_dict_in_generate=True, output_logits=True,
        )
        for config in (None, CompileConfig(), CompileConfig())
    ]  # fmt: skip
    assert model._fused_step is not None
    for text in texts[1:]:
        tolerance = 1e-3 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(text.logits[0], texts[0].logits[0], rtol=0, atol=tolerance)
        assert dtype != torch.float32 or torch.equal(text.sequences, texts[0].sequences)
    assert torch.equal(texts[1].sequences, texts[2].sequences)
