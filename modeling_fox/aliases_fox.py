# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""The `model_type`s of the two other implementations, for the Auto classes: their checkpoints load as FoX.

A name that is taken stays as it is. flash-linear-attention takes its own when it is imported, before us or after, and
then the Auto classes give its model; `FoxForCausalLM.from_pretrained` gives ours at any time.
"""

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_fox import FoxConfig
from .conversion_fox import FLA, OFFICIAL, fox_config_dict


class LoadsAsFox(FoxConfig):
    """Stands in the registry under a `model_type` of others; what it loads is a `FoxConfig`."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs) -> FoxConfig:
        return FoxConfig.from_dict(fox_config_dict(config_dict), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> FoxConfig:
        return FoxConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)


class OfficialAlias(LoadsAsFox):
    model_type = OFFICIAL


class FlaAlias(LoadsAsFox):
    model_type = FLA


def register_aliases() -> None:
    """Tell `AutoConfig` the names, but for those that it knows already."""
    for alias in (OfficialAlias, FlaAlias):
        if alias.model_type not in CONFIG_MAPPING:
            AutoConfig.register(alias.model_type, alias)


__all__ = ["register_aliases"]
