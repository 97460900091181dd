"""Transformers finds FoX by name, saves it and loads it back, in this process and in a new one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.models.auto import modeling_auto

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxConfig, FoxForCausalLM, FoxForSequenceClassification, FoxModel

ROOT = Path(__file__).resolve().parents[1]

RELOAD = """
import sys, torch
import modeling_fox
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save((type(model).__module__, model(tokens, use_cache=False).logits), sys.argv[3])
"""


def reload_in_a_new_process(folder, tokens):
    given, answer = folder.parent / "tokens.pt", folder.parent / "answer.pt"
    torch.save(tokens, given)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", RELOAD, str(folder), str(given), str(answer)]
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(answer)


def test_a_saved_model_gives_the_same_logits_to_the_bit_in_a_new_process(tmp_path):
    model, tokens = tiny_fox(fgate_decay_time_min=2.0, fgate_decay_time_max=64.0), random_tokens(2, 30)
    with torch.no_grad():
        model.model.layers[0].self_attn.fgate_proj.bias.add_(0.3)
        expected = model(tokens, use_cache=False).logits
    model.save_pretrained(tmp_path / "model")
    module, logits = reload_in_a_new_process(tmp_path / "model", tokens)
    assert module == "modeling_fox.modeling_fox"
    assert torch.equal(logits, expected)


def test_auto_classes_know_fox(tmp_path):
    tiny_fox().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FoxConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is FoxModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is FoxForCausalLM
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(classifier) is FoxForSequenceClassification
    assert AutoConfig.for_model("fox", hidden_size=96).hidden_size == 96


def test_name_tables_and_cache_tables_know_fox():
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fox"] == "FoxForCausalLM"
    assert modeling_auto.MODEL_MAPPING_NAMES["fox"] == "FoxModel"
    assert modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["fox"] == "FoxForSequenceClassification"
    assert modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["fox"] == "FoxForTokenClassification"
    assert modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["fox"] == "FoxForQuestionAnswering"
    assert DYNAMIC_LAYER_TYPE_MAPPING["forgetting_attention"].__name__ == "FoxDynamicLayer"
    assert STATIC_LAYER_TYPE_MAPPING["forgetting_attention"].__name__ == "FoxStaticLayer"


def test_a_sharded_checkpoint_loads_to_the_same_weights(tmp_path):
    model = tiny_fox(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    loaded = FoxForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for (name, weight), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_the_base_model_loads_from_the_checkpoint_of_the_language_model(tmp_path):
    model = tiny_fox()
    model.save_pretrained(tmp_path)
    base, report = FoxModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(base.layers[1].self_attn.q_norm.weight, model.model.layers[1].self_attn.q_norm.weight)


def test_a_weight_missing_from_a_checkpoint_is_initialized_not_left_as_it_was(tmp_path):
    from safetensors.torch import save_file

    model = tiny_fox(fgate_decay_time_min=2.0, fgate_decay_time_max=16.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = ["self_attn.fgate_proj.bias", "self_attn.q_norm.weight", "self_attn.k_shift_proj.weight"]
    kept = {name: weight for name, weight in weights.items() if not name.endswith(tuple(missing))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    attention = FoxForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn
    expected = torch.tensor([2.0, 4.0, 8.0, 16.0]).reciprocal().neg().exp()
    torch.testing.assert_close(attention.fgate_proj.bias.detach().sigmoid(), expected)
    assert torch.equal(attention.q_norm.weight, torch.ones(4, 16))
    assert 0.1 < attention.k_shift_proj.weight.std() < 0.3


@pytest.mark.parametrize("damage", ["truncated", "garbage", "absent"])
def test_a_damaged_checkpoint_is_an_error_that_says_so(tmp_path, damage):
    tiny_fox().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\x00" * 64)
    with pytest.raises(Exception, match="(?i)safetensors|header|deserializ|no file named"):
        FoxForCausalLM.from_pretrained(tmp_path)


def test_config_json_names_no_backend_and_no_derived_list(tmp_path):
    tiny_fox(attn_implementation="eager").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "layer_types" not in saved and not any("attn_implementation" in key for key in saved)
    assert set(FoxConfig.__annotations__) <= set(saved)


def test_classifier_reads_the_last_real_token():
    model = tiny_fox(model_class=FoxForSequenceClassification, pad_token_id=0, num_labels=3)
    alone = random_tokens(1, 9)
    left, right = (torch.nn.functional.pad(alone, pad) for pad in ((4, 0), (0, 4)))
    with torch.no_grad():
        expected = model(alone).logits
        for tokens in (left, right):
            got = model(tokens, attention_mask=(tokens != 0).long(), labels=torch.tensor([2]))
            torch.testing.assert_close(got.logits, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(got.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([2])))


def test_classifier_without_padding_token_refuses_a_batch():
    model = tiny_fox(model_class=FoxForSequenceClassification)
    with pytest.raises(ValueError, match="`pad_token_id` must be set to classify a batch of 2"):
        model(random_tokens(2, 5))
