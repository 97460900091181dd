"""Other implementations of the same attention: PyTorch's own, and packages that may be installed.

`contenders` names what it found; for each of the others it says why it is not there.
"""

import inspect

import torch
from _common import LOG_TOLERANCE, logit_bound
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


def contenders(q, k, v, log_fgate):
    """name -> (function of no arguments, tensors that get gradients), and the options of ours that prune."""
    every = (q, k, v, log_fgate)
    rules = {
        f"fox-acp-{rule}": dict(
            log_pruning_tolerance=LOG_TOLERANCE, logit_bound=logit_bound(q.shape[-1]), pruning_rule=rule
        )
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
    peers = {
        "flex-attention": lambda: _flex_attention(*every),
        "flash-linear-attention": lambda: _flash_linear_attention(*every),
        "official": lambda: _official(*every),
        "official-acp": lambda: _official(*every, adaptive_threshold="auto"),
    }
    for name, make in peers.items():
        try:
            found[name] = (make(), every)
        except Exception as error:  # not installed, or made for other versions: either way it is said
            print(f"{name}: not measured, {type(error).__name__}: {error}", flush=True)
    return found, rules
