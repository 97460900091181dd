# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""What `generate` does differently for FoX: which caches there are, and what compiles over the one that forgets."""

from collections.abc import Callable

from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .eviction_fox import FoxEvictingCache, make_evicting_cache

logger = logging.get_logger(__name__)


class DecodesFox:
    """Comes before `PreTrainedModel` and `GenerationMixin`.

    Transformers compiles the model where the cache is static. Over an evicting cache, whose shapes change, a
    `compile_config` makes each token after the prompt a `FusedStep`, which does not see them, and on a CUDA device a
    `GraphedStep`. Its other options are for the model itself and are not read. The step copies the matrices that meet
    the same input, some 70 % of all weights but embeddings, stays with the model, and is made and compiled anew when
    weights have changed.
    """

    _fused_step = None

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "`cache_implementation` must not be 'quantized' for FoX: it has no place for the forget gates. "
                "Use 'dynamic', 'static', 'offloaded', or 'fox', which keeps what is not forgotten."
            )
        has_own = model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False
        if generation_config.cache_implementation == "fox" and not has_own:
            model_kwargs["past_key_values"] = make_evicting_cache(self.config, generation_config)
            # `generate` works on a copy, and hands it to an assistant, which has made a cache for itself by then.
            generation_config.cache_implementation = None
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: the pages of continuous batching hold keys and values only."""
        raise ValueError(
            "continuous batching is not for FoX: its pages have no place for the forget gates. Use `generate` with a "
            "batch padded on the left."
        )

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        cache, compile_config = model_kwargs.get("past_key_values"), generation_config.compile_config
        if not isinstance(cache, FoxEvictingCache):
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if compile_config is None or generation_config.disable_compile:
            return False
        reason = None
        if self.device.type != "cuda" and not compile_config._compile_all_devices:
            reason = f"the model is on {self.device}"
        elif generation_config.output_attentions or generation_config.output_hidden_states:
            reason = "a fused step has no attentions or hidden states to give out"
        elif generation_config.prefill_chunk_size == 1:
            reason = "the pieces of the prompt are single tokens, of which some may be padding"
        elif self.training and self.config.hidden_dropout:
            reason = "the model is training, and a fused step drops nothing; call `model.eval()`"
        elif not cache.allows_steps:
            reason = "the cache is for assisted decoding or has a logit_bound"
        else:
            try:
                self._current_step()
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            logger.warning_once(f"`compile_config` is set, but nothing is compiled: {reason}")
        return reason is None

    def get_compiled_call(self, compile_config) -> Callable:
        """That of Transformers; over an evicting cache one step a token."""
        usual, compiled, step = super().get_compiled_call, None, None

        def call(**inputs):
            nonlocal compiled, step
            cache, tokens = inputs.get("past_key_values"), inputs.get("input_ids")
            if not isinstance(cache, FoxEvictingCache):
                compiled = compiled or usual(compile_config)
                return compiled(**inputs)
            if tokens is None or tokens.shape[1] != 1 or cache.get_seq_length() == 0:  # a piece of the prompt
                return self(**inputs)
            step = step or self._step_over(cache)
            return CausalLMOutputWithPast(logits=step(tokens), past_key_values=cache)

        return call

    def _current_step(self):
        # Here, as it defines an operator: a second copy of this file, of code from the Hub, would define it again.
        from .graphed_fox import FusedStep

        if self._fused_step is None or not self._fused_step.is_current():
            self._fused_step = FusedStep(self)
        return self._fused_step

    def _step_over(self, cache: FoxEvictingCache) -> Callable:
        from .graphed_fox import GraphedStep

        fused = self._current_step()
        return GraphedStep(fused, cache) if self.device.type == "cuda" else lambda input_ids: fused(input_ids, cache)


__all__ = ["DecodesFox"]
