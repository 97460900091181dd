"""The tests that Transformers has for its own models, against FoX; run by `python tests/transformers_suite.py`.

None of them is switched off here. What they skip by themselves, and what it says of FoX, is the table SKIPS there.
"""

import os
import sys
import unittest

import pytest

SUITE = os.environ.get("FOX_TRANSFORMERS_SUITE")
if SUITE is None:
    pytest.skip(
        os.environ.get("FOX_TRANSFORMERS_MISSING")
        or "run by `python tests/transformers_suite.py`, which fetches them",
        allow_module_level=True,
    )
sys.path.insert(0, SUITE)

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402
from tests.test_pipeline_mixin import PipelineTesterMixin  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

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


class FoxModelTester:
    """A tiny model and inputs for it, under the names that the mixins ask for."""

    causal_lm_class = FoxForCausalLM
    base_model_class = FoxModel
    sequence_classification_class = FoxForSequenceClassification
    token_classification_class = FoxForTokenClassification
    question_answering_class = FoxForQuestionAnswering
    is_training = True
    batch_size, seq_length = 3, 7
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4
    num_labels = 3

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return FoxConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), tokens, random_attention_mask([self.batch_size, self.seq_length])

    def prepare_config_and_inputs_for_common(self):
        config, tokens, mask = self.prepare_config_and_inputs()
        return config, {"input_ids": tokens, "attention_mask": mask}


class FoxSuite(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    model_tester = None
    all_model_classes = (
        FoxModel,
        FoxForCausalLM,
        FoxForSequenceClassification,
        FoxForTokenClassification,
        FoxForQuestionAnswering,
    )
    pipeline_model_mapping = {
        "feature-extraction": FoxModel,
        "text-generation": FoxForCausalLM,
        "text-classification": FoxForSequenceClassification,
        "token-classification": FoxForTokenClassification,
    }

    def setUp(self):
        self.model_tester = FoxModelTester(self)
        self.config_tester = ConfigTester(self, config_class=FoxConfig, hidden_size=32, num_attention_heads=4)

    def test_config(self):
        self.config_tester.run_common_tests()

    def is_pipeline_test_to_skip(self, *args, **kwargs):
        return False


class TestFox(FoxSuite, unittest.TestCase):
    """The mixins find their tests on a class that is a test case."""
