"""The tests that Transformers has for its own models, against FoX; run by `python tests/transformers_suite.py`.

None of them is switched off here. What they skip by themselves, and what it says of FoX, is the table SKIPS there.
"""

import os
import sys
import unittest
from unittest.mock import patch

import pytest

SUITE = os.environ.get("FOX_TRANSFORMERS_SUITE")
if SUITE is None:
    pytest.skip(
        os.environ.get("FOX_TRANSFORMERS_MISSING")
        or "run by `python tests/transformers_suite.py`, which fetches them",
        allow_module_level=True,
    )
sys.path.insert(0, SUITE)

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # noqa: E402

from modeling_fox import (  # noqa: E402
    FoxConfig,
    FoxForCausalLM,
    FoxForQuestionAnswering,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxModel,
)
from tests import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402

# The distributed tests run for the models that these lists name.
for module, name in ((test_tensor_parallel_mixin, "TP"), (test_fsdp_mixin, "FSDP")):
    getattr(module, f"{name}_DISTRIBUTED_TEST_MODEL_TYPES").add("fox")


class FoxModelTester(CausalLMModelTester):
    """Names of the classes, which Transformers would look for in its own package, and sizes of a tiny model."""

    config_class = FoxConfig
    base_model_class = FoxModel
    causal_lm_class = FoxForCausalLM
    sequence_classification_class = FoxForSequenceClassification
    token_classification_class = FoxForTokenClassification
    question_answering_class = FoxForQuestionAnswering

    def __init__(self, parent):
        super().__init__(parent, batch_size=3, num_attention_heads=4, num_key_value_heads=2)


class TestFox(CausalLMModelTest, unittest.TestCase):
    model_tester_class = FoxModelTester
    # What `test_torch_compile_for_training` trains; without it that test is skipped. Not with `fox_acp`, the default
    # there: its labels are at padding too, of which `fox_acp` computes what it likes; see test_modeling_gpu.py.
    _torch_compile_train_cls = FoxForCausalLM
    _torch_compile_train_attn_implementation = "sdpa"

    def is_pipeline_test_to_skip(self, *args, **kwargs):
        return False

    def test_sdpa_can_dispatch_non_composite_models(self):
        # It asks whether "sdpa" is the default, which on a GPU is `fox_acp`: the one that prunes.
        with patch("modeling_fox.modeling_fox.default_attn_implementation", lambda: "sdpa"):
            super().test_sdpa_can_dispatch_non_composite_models()

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args, **kwargs):
        # The flag is False for engines that bring an attention of their own. The tests ask it whether packing works.
        with patch.object(FoxForCausalLM, "_supports_attention_backend", True):
            super().attention_mask_padding_matches_padding_free_with_position_ids(*args, **kwargs)
