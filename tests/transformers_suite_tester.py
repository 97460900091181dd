"""What `tests/causal_lm_tester.py` of Transformers does and the sdist lacks; written for this project.

The tests themselves are those of the mixins in the sdist.
"""

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin

__all__ = ["CausalLMModelTest", "CausalLMModelTester"]


class CausalLMModelTester:
    """A tiny model and inputs for it, under the names that the mixins ask for."""

    is_training = True
    num_labels = 3

    def __init__(self, parent, batch_size, num_attention_heads, num_key_value_heads):
        self.parent = parent
        self.batch_size, self.seq_length = batch_size, 7
        self.vocab_size, self.hidden_size, self.num_hidden_layers = 99, 32, 2
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads

    def get_config(self):
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return self.config_class(
            **{name: getattr(self, name) for name in names},
            intermediate_size=32,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # The second row sees one token less than the first, and so on: right padding.
        mask = torch.ones_like(tokens).tril(self.seq_length - 1 - self.batch_size // 2)
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


class CausalLMModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    FSDPTesterMixin,
):
    def setUp(self):
        self.model_tester = tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(self, config_class=tester.config_class)
        self.pipeline_model_mapping = {
            "feature-extraction": tester.base_model_class,
            "text-generation": tester.causal_lm_class,
            "text-classification": tester.sequence_classification_class,
            "token-classification": tester.token_classification_class,
        }
        self.all_model_classes = (*self.pipeline_model_mapping.values(), tester.question_answering_class)

    def test_config(self):
        self.config_tester.run_common_tests()
