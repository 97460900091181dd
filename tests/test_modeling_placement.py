"""Where the weights are put when a model is loaded: by `device_map`, on disk, from shards, converted on the way."""

import pytest
import torch
from test_modeling_conversion import OFFICIAL, PRO, write_checkpoint

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxForCausalLM

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@torch.no_grad()
def logits(model):
    return model(random_tokens(2, 9), use_cache=False).logits


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": "cpu"}], ids=str)
def test_device_map_gives_the_same_model(tmp_path, device_map):
    model = tiny_fox()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    loaded = FoxForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(loaded), logits(model))


def test_a_layer_on_disk_computes_and_generates_as_in_memory(tmp_path):
    model = tiny_fox()
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    loaded = FoxForCausalLM.from_pretrained(tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "disk")
    assert loaded.model.layers[1].self_attn.q_proj.weight.is_meta
    assert torch.equal(logits(loaded), logits(model))
    prompt = random_tokens(1, 5)
    new = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **new), model.generate(prompt, **new))
    with pytest.raises(ValueError, match="`device_map` must keep layer 1 where it computes, to bound its scores"):
        loaded.generate(prompt, cache_implementation="fox", **new)
    loaded.set_attn_implementation("fox_acp")
    loaded.config.log_pruning_tolerance = -10.0
    with pytest.raises(ValueError, match="got norms that wait on the CPU or the disk. Set `log_pruning_tolerance`"):
        logits(loaded)


def test_a_layer_of_an_official_checkpoint_is_converted_to_disk(tmp_path):
    write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO, shards=3)
    expected = logits(FoxForCausalLM.from_pretrained(tmp_path / "theirs"))
    loaded = FoxForCausalLM.from_pretrained(tmp_path / "theirs", device_map=ON_DISK, offload_folder=tmp_path / "disk")
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(loaded), expected)


def test_a_layer_is_never_split_between_devices():
    from accelerate import infer_auto_device_map

    model = tiny_fox(num_hidden_layers=4)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.model.layers[0].parameters())
    memory = {"cpu": int(2.5 * size)}
    placed = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
    assert {name for name in placed if "layers." in name} == {f"model.layers.{i}" for i in range(4)}
    assert set(placed.values()) == {"cpu", "disk"}


def test_exported_it_computes_the_same():
    """`torch.export` takes the whole model, prompts of any length included."""
    model, tokens = tiny_fox(attn_implementation="sdpa"), random_tokens(2, 12)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model, (), {"input_ids": tokens, "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None}, strict=False,
    )  # fmt: skip
    for number in (12, 31):
        other = random_tokens(2, number, seed=number)
        got = program.module()(input_ids=other, use_cache=False).logits
        torch.testing.assert_close(got, model(other, use_cache=False).logits, rtol=0, atol=1e-5)
