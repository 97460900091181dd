"""Other implementations of the same attention: PyTorch's own, and packages that may be installed.

`contenders` names what it found; for each of the others it says why it is not there. The packages are timed in a
process of their own that may be stopped: what they compile, and how often, is theirs. Triton's autotuner takes the
first configuration of each of their kernels: trying all of them takes flash-linear-attention minutes a shape.
"""

import inspect
from functools import partial

import torch
from _common import LOG_TOLERANCE
from torch.nn.attention import SDPBackend, sdpa_kernel

from fox_kernels import forgetting_attention


def _dense(backend, q, k, v):
    def run():
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def _flex_attention(q, k, v, log_fgate):
    """FlexAttention with the decay as a score modification.

    It differentiates a tensor that is read once only. The row's half of the gradient of lam is 0 and is left out.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention)

    def run():
        lam = log_fgate.cumsum(-1)
        of_row = lam.detach()

        def decay(score, b, h, i, j):
            return score + of_row[b, h, i] - lam[b, h, j]

        return compiled(q, k, v, score_mod=decay, block_mask=mask)

    return run


def _flash_linear_attention(q, k, v, log_fgate):
    """Heads after length, as that package has them; the inputs are laid out so before anything is timed."""
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    def run():
        inputs = (x.transpose(1, 2) for x in (q, k, v, log_fgate))
        return parallel_forgetting_attn(*inputs).transpose(1, 2)

    return run


def _official(q, k, v, log_fgate, **options):
    """The package of the paper's authors, github.com/zhixuan-lin/forgetting-transformer."""
    try:
        from forgetting_transformer import forgetting_attention as official
    except ImportError:
        from forgetting_transformer.ops.forgetting_attention import forgetting_attention as official
    missing = set(options) - set(inspect.signature(official).parameters)
    if missing:
        raise ImportError(f"the installed version has no {', '.join(sorted(missing))}")
    return lambda: official(q, k, v, log_fgate, head_first=True, **options)


PEERS = {
    "flex-attention": _flex_attention,
    "flash-linear-attention": _flash_linear_attention,
    "official": _official,
    "official-acp": partial(_official, adaptive_threshold="auto"),
}
NOTES = {
    "flash-linear-attention": "first configuration of its autotuner",
    "official": "first configuration of its autotuner",
    "official-acp": "first configuration of its autotuner",
}


def without_autotuning():
    """From now on every autotuned Triton kernel takes the first of its configurations."""
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_first(self, *args, **kwargs):
        self.configs = self.configs[:1]
        return run(self, *args, **kwargs)

    Autotuner.run = run_first


def contenders(q, k, v, log_fgate, bound):
    """name -> (function of no arguments, tensors that get gradients), and the options of ours that prune."""
    every = (q, k, v, log_fgate)
    rules = {
        f"fox-acp-{rule}": dict(log_pruning_tolerance=LOG_TOLERANCE, logit_bound=bound, pruning_rule=rule)
        for rule in ("paper", "tight")
    }
    found = {
        "sdpa-cudnn": (_dense(SDPBackend.CUDNN_ATTENTION, q, k, v), (q, k, v)),
        "sdpa-flash2": (_dense(SDPBackend.FLASH_ATTENTION, q, k, v), (q, k, v)),
        "fox": (lambda: forgetting_attention(*every), every),
        **{
            name: (lambda options=options: forgetting_attention(*every, **options), every)
            for name, options in rules.items()
        },
    }
    return found, rules
