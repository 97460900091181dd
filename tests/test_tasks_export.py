"""`torch.export` takes a whole FoX with its operator; with `sdpa` it is tested in test_modeling_placement.py."""

import pytest
import torch
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from helpers import random_tokens, tiny_fox


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # of PyTorch 2.11
@torch.no_grad()
def test_saved_and_loaded_it_computes_prompts_of_any_size(tmp_path):
    model = tiny_fox(attn_implementation="fox_acp", log_pruning_tolerance=-10.0)
    sizes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(
        model, (), {"input_ids": random_tokens(2, 12), "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "use_cache": None}, strict=False,
    )  # fmt: skip
    torch.export.save(program, tmp_path / "fox.pt2")
    loaded = torch.export.load(tmp_path / "fox.pt2").module()
    for shape in ((1, 2), (3, 31), (8, 64)):
        tokens = random_tokens(*shape)
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(loaded(input_ids=tokens, use_cache=False).logits, expected, rtol=0, atol=1e-5)


def test_a_step_that_would_lose_its_gates_is_refused():
    model = tiny_fox(attn_implementation="sdpa")
    model.generation_config.cache_implementation = "static"
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32)
    first = {"input_ids": torch.tensor([[1]]), "cache_position": torch.tensor([0])}
    with pytest.raises(ValueError, match="`past_key_values` must not be a static cache when the model is exported"):
        exportable.export(**first, strict=False)
