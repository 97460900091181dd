# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""The Forgetting Transformer (FoX) for Transformers v5.

Importing this package is what makes Transformers know `model_type: "fox"`:

```python
>>> import modeling_fox
>>> from transformers import AutoModelForCausalLM

>>> model = AutoModelForCausalLM.from_pretrained("path/to/a/fox/model")
```
"""

import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto, tokenization_auto

from .aliases_fox import register_aliases
from .cache_fox import FoxDynamicLayer, FoxStaticLayer
from .configuration_fox import FoxConfig
from .context_parallel_fox import ContextParallel, enable_context_parallel
from .diagnostics_fox import PruningStats, forget_gates, pruning_stats
from .eviction_fox import CacheReport, FoxEvictingCache
from .graphed_fox import FusedStep, GraphedStep
from .modeling_fox import FoxForCausalLM, FoxModel, FoxPreTrainedModel
from .modeling_heads_fox import FoxForQuestionAnswering, FoxForSequenceClassification, FoxForTokenClassification
from .tokenization_fox import JSONGPT2Tokenizer

# exist_ok: a second import of this package under another name, as in a notebook that reloads it, must not fail.
AutoConfig.register("fox", FoxConfig, exist_ok=True)
register_aliases()
AutoModel.register(FoxConfig, FoxModel, exist_ok=True)
AutoModelForCausalLM.register(FoxConfig, FoxForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(FoxConfig, FoxForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(FoxConfig, FoxForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(FoxConfig, FoxForQuestionAnswering, exist_ok=True)

# Parts of Transformers look the class name up here and not in the registries above. One of them is Trainer, which
# would take the loss with label smoothing of unshifted labels for a class that it does not find.
modeling_auto.MODEL_MAPPING_NAMES["fox"] = "FoxModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fox"] = "FoxForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["fox"] = "FoxForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["fox"] = "FoxForTokenClassification"
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["fox"] = "FoxForQuestionAnswering"

# TRL (1.16) looks the class that config.json names up in the module itself, before it asks the Auto classes. Not as
# `import transformers` binds it: Transformers runs its `__init__` twice, the second time when models are imported.
for model_class in (
    FoxModel,
    FoxForCausalLM,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxForQuestionAnswering,
):
    setattr(sys.modules["transformers"], model_class.__name__, model_class)

# By its name only: FoX has no tokenizer of its own, so `AutoTokenizer.register(FoxConfig, ...)` would say too much.
tokenization_auto.REGISTERED_TOKENIZER_CLASSES["JSONGPT2Tokenizer"] = JSONGPT2Tokenizer

__all__ = [
    "CacheReport",
    "ContextParallel",
    "FoxConfig",
    "FoxDynamicLayer",
    "FoxEvictingCache",
    "FoxForCausalLM",
    "FoxForQuestionAnswering",
    "FoxForSequenceClassification",
    "FoxForTokenClassification",
    "FoxModel",
    "FoxPreTrainedModel",
    "FoxStaticLayer",
    "FusedStep",
    "GraphedStep",
    "JSONGPT2Tokenizer",
    "PruningStats",
    "enable_context_parallel",
    "forget_gates",
    "pruning_stats",
]
