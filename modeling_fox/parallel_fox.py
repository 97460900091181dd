# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism for the one kind of module that Transformers has no style for: norms with a weight per head."""

import torch

HEAD_NORM_STYLE = "fox_head_norm"
"""Name of the style, for the plan in the config."""

if torch.distributed.is_available():
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel

    class FoxHeadNormParallel(ColwiseParallel):
        """Split the weight `(num_heads, head_dim)` by heads; input and output hold this rank's heads already."""

        def should_use_local_tensors(self, module):
            return True

        def install_forward(self, module, mesh):
            # Past the check of `ColwiseParallel`, which is for linear layers.
            return super(ColwiseParallel, self).install_forward(module, mesh)

        def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
            return args, kwargs

        def transform_output_post_forward(self, module, output, mesh):
            return output

    ALL_PARALLEL_STYLES.register(HEAD_NORM_STYLE, FoxHeadNormParallel())

__all__ = ["HEAD_NORM_STYLE"]
