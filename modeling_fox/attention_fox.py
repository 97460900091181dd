# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""The four attention backends of FoX, their masks, and which of them is the default.

All compute, for the query at position i of each head,

    o_i = sum_{j <= i} p_ij v_j,    p_i = softmax_j(scaling * q_i . k_j + c_i - c_j),    c = cumsum(log f)

c_i is the same for all keys of a query and cancels in the softmax; backends may drop or replace it.

| name             | how                                                     | memory | notes                         |
| ---------------- | ------------------------------------------------------- | ------ | ----------------------------- |
| `eager`          | the formula, softmax in fp32                            | T * S  | the definition, gives weights |
| `sdpa`           | `-c_j` as extra channels of the keys, PyTorch's kernels | T + S  | packed documents: T * S bits  |
| `flex_attention` | `c_i - c_j` in a score_mod                              | T + S  | backward needs a GPU          |
| `fox_acp`        | `fox_kernels.forgetting_attention`                      | T + S  | the only one that prunes      |

Letters:  B batch, H query heads, H_kv key heads, T queries, S keys, D head dim. The queries are the last T of the S
positions, except in a static cache, whose unfilled end is masked and holds gates of 1.
Tensors:  query (B, H, T, D);  key, value (B, H_kv, S, D);  log_fgate (B, H, S) fp32 nats, 0 at padding;
          document_starts (B, S) bool or None: no token at or after such a position sees one before it.
Every backend takes `(module, query, key, value, attention_mask, scaling, log_fgate, ...)` and returns the output as
`(B, T, H, D)` and the attention weights or None.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.import_utils import is_torchdynamo_compiling, is_tracing

from .cache_fox import is_exporting, use_operator

try:
    from fox_kernels import forgetting_attention
    from fox_kernels.decode import MAX_DECODE_QUERIES, forgetting_attention_decode
except ImportError:
    forgetting_attention = None
INSTALLED = forgetting_attention is not None
hub_kernel: str | None = None  # the repository that the operator was loaded from

FOX_BACKENDS = ("eager", "sdpa", "flex_attention", "fox_acp")
"""Values of `attn_implementation` that carry the forget gates. Any other would drop them without a word."""

KERNELS_MISSING = (
    "`attn_implementation='fox_acp'` needs the package fox_kernels, which is not installed. Run "
    "`pip install 'fox-transformers[kernels]'`, name a kernel of the Hub that was made from it, as in "
    "`attn_implementation='someone/fox-kernels'`, or use 'sdpa', which computes the same without pruning."
)
# Version of the interface of fox_kernels as a kernel of the Hub, see `kernels/build_hub_kernel.py`.
HUB_KERNEL_VERSION = 1

# Decoding: up to this many keys one token takes a plain row of scores and prunes nothing. A step of two layers of 12
# heads on one CPU core takes 14 ms so and 25 ms from the running sums at 1024 keys, 34 and 27 ms at 4096, 61 and 40 ms
# at 16384 (pruned at log eps = -10). On an H100 a row took six layers from 19 to 54 tokens/s, much of it for kernels
# that need not be compiled.
ONE_QUERY_KEYS = 2048

# Products in fp16 must stay below 65504. A factor of 1024 on the query side lets the first channel of a key stand
# for decays up to 8e6 nats; the two channels after it hold what rounding to 11 bits left over.
FP16_FACTOR = 1024.0


def default_attn_implementation() -> str:
    """The fastest exact backend of this machine.

    `fox_acp` where there is a CUDA device and fox_kernels is installed, else `sdpa`. Milliseconds of a training step
    of FoX (Pro) by `kernels/benchmarks/bench_backends.py`: two layers of width 192 on two CPU cores in float32; four
    of width 768 on an H100 in bfloat16, the time of a step and, after it, of the GPU's kernels. The gates keep 1 to
    10,000 tokens, log_pruning_tolerance=-10 skips 8 to 58 % by the paper's rule:

    | batch x tokens | `sdpa`        | `fox_acp`     | `fox_acp`, pruned |
    | -------------- | ------------- | ------------- | ----------------- |
    | CPU 16 x 256   | 531           | 546           | 543               |
    | CPU 4 x 1024   | 643           | 702           | 673               |
    | CPU 1 x 4096   | 1249          | 1285          | 1232              |
    | H100 32 x 512  | 34.3, 27.8    | 34.2, 25.0    | 34.2, 25.0        |
    | H100 8 x 2048  | 36.0, 29.8    | 39.6, 26.5    | 41.2, 26.0        |
    | H100 2 x 8192  | 42.3, 37.4    | 40.7, 32.2    | 39.4, 29.0        |
    | H100 1 x 32768 | 127.7, 125.9  | 110.3, 107.1  | 75.3, 71.5        |

    On the H100 the kernels of `fox_acp` take less time at every length; at 8 x 2048 the step waits for Python, which
    has more to launch. `eager` and `flex_attention` were slower everywhere (198 and 109 ms for two layers at
    2 x 8192, where `sdpa` took 21).
    """
    return "fox_acp" if forgetting_attention is not None and torch.cuda.is_available() else "sdpa"


def check_attn_implementation(name: str | None, allow_all_kernels: bool = False) -> str | None:
    """Refuse a backend that cannot carry the gates or is not installed; `None`, the default, is always fine.

    Args:
        name: One of `FOX_BACKENDS`, or, where fox_kernels is not installed, the repository of a kernel on the Hub
            made from it, `"someone/fox-kernels"`, with `@` and a revision if need be: then that is `fox_acp`.
        allow_all_kernels: Whether its code may be run.

    Returns:
        The name of the backend.

    Raises:
        ValueError: If `name` is none of these, or a kernel that may not be run.
        ImportError: If it is `"fox_acp"` and fox_kernels is missing, or a kernel and `kernels` is missing.
    """
    if name is not None and name.count("/") == 1 and hub_kernel in (name, None) and not INSTALLED:
        load_hub_kernel(name, allow_all_kernels)
        return "fox_acp"
    if name is not None and name not in FOX_BACKENDS:
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported: it must be one of {FOX_BACKENDS}, as others '
            "have no place for the forget gates. Use 'sdpa' for PyTorch's FlashAttention."
        )
    if name == "fox_acp" and forgetting_attention is None:
        raise ImportError(KERNELS_MISSING)
    return name


def load_hub_kernel(name: str, allow_all_kernels: bool) -> None:
    """Take the operator from a kernel of the Hub, by the package `kernels`; a process has one of them."""
    global MAX_DECODE_QUERIES, forgetting_attention, forgetting_attention_decode, hub_kernel
    if hub_kernel == name:
        return
    if not allow_all_kernels:
        raise ValueError(
            f'`attn_implementation="{name}"` runs code of that repository. If you trust it, pass '
            "`allow_all_kernels=True` too; `pip install 'fox-transformers[kernels]'` needs no code of the Hub."
        )
    try:
        from kernels import get_kernel
    except ImportError as error:
        raise ImportError(f'`attn_implementation="{name}"` needs `pip install kernels`.') from error

    repository, _, revision = name.partition("@")
    wanted = {"revision": revision} if revision else {"version": HUB_KERNEL_VERSION}
    kernel = get_kernel(repository, trust_remote_code=True, **wanted)
    decode, gates = (import_module(f"{kernel.__name__}.{part}") for part in ("decode", "gates"))
    use_operator(decode, gates)
    hub_kernel, forgetting_attention = name, kernel.forgetting_attention
    forgetting_attention_decode, MAX_DECODE_QUERIES = decode.forgetting_attention_decode, decode.MAX_DECODE_QUERIES


def repeat_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Copy every key head for the query heads that share it: `(B, H_kv, S, D)` to `(B, num_heads, S, D)`."""
    groups = num_heads // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def running_sum(log_fgate: torch.Tensor, document_starts: torch.Tensor | None) -> torch.Tensor:
    """Sum of the gates up to each token, `(B, H, S)` fp64 nats, from the start of its document if it has one.

    In fp32, all that Apple's GPUs have, the sums are wrong by 2^-24 of themselves, and every difference of them too.
    """
    wide = torch.float32 if log_fgate.device.type == "mps" else torch.float64
    running = log_fgate.to(wide).cumsum(dim=-1)
    if document_starts is None:
        return running
    position = torch.arange(document_starts.shape[-1], device=document_starts.device)
    start = (position * document_starts).cummax(dim=-1).values[:, None].expand_as(running)
    return running - running.gather(-1, start)


def split_in_two(running: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low fp32 part of a tensor; its gradient flows through the low one.

    `(high_i - high_j) + (low_i - low_j)` is right to 2^-24 of the difference.
    """
    high = running.detach().float()
    return high, (running - high.to(running.dtype)).float()


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, log_fgate, document_starts=None, **kwargs
):
    """The definition, with the whole score matrix in memory. Weights: `(B, H, T, S)`, dtype of `query`."""
    num_heads, num_queries = query.shape[1:3]
    key, value = repeat_heads(key, num_heads), repeat_heads(value, num_heads)
    high, low = split_in_two(running_sum(log_fgate, document_starts))
    # In a static cache the last positions are not the queries; c_i is then off by the same amount for every key.
    decay = (high[..., -num_queries:, None] - high[..., None, :]) + (low[..., -num_queries:, None] - low[..., None, :])
    # Future keys are masked below; their "decay" is positive and could overflow.
    scores = (query @ key.transpose(-1, -2)).float() * scaling + decay.clamp(max=0.0)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def decay_channels(running: torch.Tensor, scaling: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Channels to append to 16-bit keys so that a dot product with `(factor, 1, 1)`, times `scaling`, gives `-c_j`.

    Three of them add up to the bits of fp32: with fewer the decay itself would be wrong by whole nats after some
    hundred tokens.

    Args:
        running: c, `(B, H, S)` fp64 nats.

    Returns:
        `(B, H, S, 3)` of `dtype`, and the factor that the query needs in the first of them.
    """
    offset = running.float() / -scaling
    factor = FP16_FACTOR if dtype == torch.float16 else 1.0
    high = (offset / factor).to(dtype)
    # What is left over is found without gradient: it flows through `high`, whose gradient is that of the whole sum.
    with torch.no_grad():
        rest = offset - high.float() * factor
        middle = rest.to(dtype)
        low = (rest - middle.float()).to(dtype)
    return torch.stack((high, middle, low), dim=-1), factor


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest fp32 number of 11 significant bits, which a tensor core multiplies without rounding it."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def fold_decay_fp32(query, key, running, scaling, tensor_cores):
    """Return q' and k' whose product, times `scaling`, is the score of forgetting attention, for fp32.

    `c_i - c_j` comes first, as `(high_i, 1, low_i, 1) . (1, -high_j, 1, -low_j)`: a product adds its channels up in
    order, so the large sums cancel before anything small is added to them.

    On tensor cores PyTorch's kernel cuts every fp32 number to 22 bits and sums 8 channels in one step, in which small
    terms lose what is 2^-26 of the largest. There the high parts have 11 bits and a step of their own, so that
    nothing is cut that matters: the scores of 4,000 tokens are then off by 2e-5 where they were off by 2e-3.
    """
    num_queries, groups = query.shape[2], query.shape[1] // key.shape[1]
    high, low = split_in_two(running / scaling)
    zeros = []
    if tensor_cores:
        rounded = round_to_tf32(high)
        high, low = rounded, low + (high - rounded)
        zeros = [torch.zeros_like(high)] * 6
    one = high.new_ones(()).expand_as(high)
    # The query's own sum is the same for all keys: it only keeps the numbers small, and has no gradient.
    rows = torch.stack((high, one, *zeros, low.detach(), one), dim=-1)[:, :, -num_queries:]
    keys = torch.stack((one, -high, *zeros, one, -low), dim=-1)
    key = repeat_heads(key, query.shape[1]) if groups > 1 else key
    return torch.cat((rows, query), dim=-1), torch.cat((keys, key), dim=-1)


def fold_decay(query, key, value, running, scaling):
    """Return q', k', v' such that ordinary attention of them, cut back to D channels, is forgetting attention."""
    num_heads, head_dim = query.shape[1], query.shape[-1]
    # GPU kernels want rows of 16 bytes.
    multiple = 16 // query.element_size() if query.is_cuda else 1
    if query.dtype not in (torch.bfloat16, torch.float16):
        query, key = fold_decay_fp32(query, key, running, scaling, tensor_cores=query.is_cuda)
        num_zeros = -query.shape[-1] % multiple
        query, key = (F.pad(x, (0, num_zeros)) if num_zeros else x for x in (query, key))
    else:
        channels, factor = decay_channels(running, scaling, query.dtype)
        num_zeros = -(head_dim + channels.shape[-1]) % multiple
        row = query.new_ones(())
        parts = [query, (row * factor).expand(*query.shape[:-1], 1), row.expand(*query.shape[:-1], 2)]
        keys = [repeat_heads(key, num_heads), channels]
        if num_zeros:
            parts.append(row.new_zeros(()).expand(*query.shape[:-1], num_zeros))
            keys.append(row.new_zeros(()).expand(*channels.shape[:-1], num_zeros))
        query, key = torch.cat(parts, dim=-1), torch.cat(keys, dim=-1)
    # Equal widths throughout: PyTorch's flash kernels take no other.
    value = F.pad(repeat_heads(value, num_heads), (0, query.shape[-1] - head_dim))
    return query, key, value


@lru_cache
def prefers_cudnn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch takes cuDNN's attention there, which makes a plan for every number of keys: 40 ms a token."""
    is_taken = device.type == "cuda" and torch.version.cuda is not None and dtype in (torch.bfloat16, torch.float16)
    return is_taken and torch.cuda.get_device_capability(device)[0] >= 9


def attend_one_query(query, key, value, attention_mask, scaling, log_fgate, cache_layer=None):
    """Decoding, T = 1: the decay is a single row, so it goes in as a mask and keys and values need no copy."""
    batch, num_heads, _, head_dim = query.shape
    bias = cache_layer.decay_to_last(query.dtype) if hasattr(cache_layer, "decay_to_last") else None
    is_aligned = bias is not None
    if bias is None:
        # Summed from the end, so that the recent tokens, which matter, are exact.
        bias = (log_fgate.flip(-1).cumsum(dim=-1).flip(-1) - log_fgate).to(query.dtype)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        bias.unsqueeze(2).masked_fill_(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        bias.unsqueeze(2).add_(attention_mask)
    # The query heads of a group become rows that share its keys.
    grouped = (batch, key.shape[1], -1)
    rows, bias = query.reshape(*grouped, head_dim), bias.view(*grouped, key.shape[2])
    if is_aligned and head_dim % 8 == 0 and key.dtype == query.dtype and prefers_cudnn(query.device, query.dtype):
        # The kernel that PyTorch would take without cuDNN, by name: switches for it are those of the whole process.
        out = torch._scaled_dot_product_efficient_attention(rows, key, value, bias, False, scale=scaling)[0]
    else:
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(batch, 1, num_heads, head_dim)


def sdpa_attention_forward(
    module, query, key, value, attention_mask, scaling, log_fgate, document_starts=None, cache_layer=None, **kwargs
):
    """PyTorch's own kernels on keys widened by the decay: linear memory, forward and backward."""
    num_queries, head_dim = query.shape[2:]
    if num_queries == 1:
        return attend_one_query(query, key, value, attention_mask, scaling, log_fgate, cache_layer), None
    if attention_mask is None and key.shape[2] > num_queries:
        # Transformers makes no mask for the first tokens in a static cache; the rest of it is still empty.
        key, value, log_fgate = key[:, :, :num_queries], value[:, :, :num_queries], log_fgate[..., :num_queries]
    if module.config.fgate_type == "none":
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    else:
        query, key, value = fold_decay(query, key, value, running_sum(log_fgate, document_starts), scaling)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=attention_mask is None
    )
    return out[..., :head_dim].transpose(1, 2).contiguous(), None


@lru_cache
def flex_attention_of_cpus() -> Callable:
    """Compiled for each shape anew: what PyTorch 2.13 writes for any shape, with a decay in it, no compiler takes."""
    return torch.compile(flex_attention, dynamic=False)


def flex_attention_forward(
    module, query, key, value, attention_mask, scaling, log_fgate, document_starts=None, cache_layer=None, **kwargs
):
    """FlexAttention with the decay in its score_mod. `attention_mask` is a `BlockMask`."""
    num_heads, num_queries = query.shape[1:3]
    if num_queries == 1:
        # A row of the mask costs nothing, while FlexAttention compiles anew as the keys grow.
        row = create_mask(attention_mask.mask_mod, query.shape[0], 1, 1, key.shape[2], device=query.device)
        return attend_one_query(query, key, value, row, scaling, log_fgate, cache_layer), None
    groups = num_heads // key.shape[1]
    # FlexAttention shares keys between a power of two of heads only.
    if groups & (groups - 1):
        key, value = repeat_heads(key, num_heads), repeat_heads(value, num_heads)
    high, low = split_in_two(running_sum(log_fgate, document_starts))
    # Two tensors, as FlexAttention cannot differentiate one that is indexed twice. The gradient of the queries' part
    # is zero anyway: it adds the same amount to every score of a row.
    query_high, query_low = (x.detach()[..., -num_queries:].contiguous() for x in (high, low))

    def add_decay(score, batch, head, query_idx, key_idx):
        far = query_high[batch, head, query_idx] - high[batch, head, key_idx]
        return score + (far + (query_low[batch, head, query_idx] - low[batch, head, key_idx]))

    if query.device.type == "cpu" and not is_torchdynamo_compiling():
        attend = flex_attention_of_cpus()
    else:
        attend = partial(compile_friendly_flex_attention, training=module.training)
    out = attend(
        query,
        key,
        value,
        score_mod=add_decay,
        block_mask=attention_mask,
        enable_gqa=key.shape[1] != num_heads,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def decodes_from_sums(query, document_starts, cache_layer) -> bool:
    """Whether the running sums in the cache stand for the gates: a few tokens of one document, without gradients."""
    if not hasattr(cache_layer, "gate_sums") or document_starts is not None:
        return False
    # The sums of a cache that grows are kept up by Python, those of a static one by the graph itself.
    is_static = keys_in_use(cache_layer) is not None
    if is_tracing(query) and (not is_static or is_exporting()):
        return False
    return query.shape[2] <= MAX_DECODE_QUERIES and not (torch.is_grad_enabled() and query.requires_grad)


def keys_in_use(cache_layer) -> torch.Tensor | None:
    """How many places of a static cache are filled, one integer on the device; `None` for any other cache."""
    return cache_layer.cumulative_length if getattr(cache_layer, "is_compileable", False) else None


def mask_of_static_cache(query, num_places: int, num_keys: torch.Tensor, key_start: torch.Tensor | None):
    """What T queries, the last of `num_keys` keys in `num_places`, may see: bool `(B or 1, 1, T, num_places)`.

    Nothing of it needs to be known while compiling.
    """
    place = torch.arange(num_places, device=query.device)
    position = torch.arange(query.shape[2], device=query.device) + (num_keys - query.shape[2])
    visible = (place <= position[:, None])[None, None]
    return visible if key_start is None else visible & (place >= key_start[:, None, None, None])


def fox_acp_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    log_fgate,
    document_starts=None,
    num_keys=None,
    cache_layer=None,
    **kwargs,
):
    """`fox_kernels.forgetting_attention`, with adaptive computation pruning if the config asks for it.

    Args:
        attention_mask: What `fox_acp_mask` returned: `None`, `(B,)` the first real token of each sequence, or a 4D
            mask. The operator takes no 4D mask; `sdpa` then computes the same without pruning.
        num_keys: Keys in use in a static cache, where Python knows it; `None` means all or what the cache says.
        cache_layer: Where the keys are from; one that has `gate_sums` lets a few tokens decode without a look at all
            of the past.
    """
    sink = getattr(module, "pruning_sink", None)
    context = (module, query, key, value)
    used = keys_in_use(cache_layer)
    is_row = sink is None and used is None and query.shape[2] == 1 and key.shape[2] <= ONE_QUERY_KEYS
    from_sums = sink is None and not is_row and decodes_from_sums(query, document_starts, cache_layer)
    if used is not None:
        # Made with the prompt, which `generate` leaves uncompiled, for the steps after it.
        cache_layer.gate_sums()
    is_dense = attention_mask is not None and attention_mask.dim() == 4
    if used is not None and not is_dense and not from_sums and num_keys is None:
        attention_mask, is_dense = mask_of_static_cache(query, key.shape[2], used, attention_mask), True
    if is_dense:
        if sink is not None:
            nothing = log_fgate.new_zeros(query.shape[1])
            sink(nothing, nothing)
        return sdpa_attention_forward(*context, attention_mask, scaling, log_fgate, document_starts, cache_layer)
    if from_sums:
        return decode_from_sums(*context, attention_mask, scaling, cache_layer, used), None
    if num_keys is not None:
        key, value, log_fgate = key[:, :, :num_keys], value[:, :, :num_keys], log_fgate[..., :num_keys]
    if document_starts is not None:
        log_fgate = log_fgate.masked_fill(document_starts[:, None, :], float("-inf"))
    if is_row:
        visible = None
        if attention_mask is not None:
            position = torch.arange(key.shape[2], device=key.device)
            visible = torch.where(position >= attention_mask[:, None], 0.0, torch.finfo(query.dtype).min / 2)
            visible = visible.to(query.dtype)[:, None, None]
        return attend_one_query(query, key, value, visible, scaling, log_fgate, cache_layer), None
    tolerance = module.config.log_pruning_tolerance
    out = forgetting_attention(
        query,
        key,
        value,
        log_fgate,
        scale=scaling,
        log_pruning_tolerance=tolerance,
        pruning_rule=module.config.pruning_rule,
        logit_bound=None if tolerance is None else module.logit_bound(query.shape[1], query.dtype),
        key_start=attention_mask,
        return_stats=sink is not None,
    )
    if sink is not None:
        out, stats = out
        sink(stats.pruned_fraction, stats.lost_mass_bound)
    return out.transpose(1, 2), None


def decode_from_sums(module, query, key, value, key_start, scaling, cache_layer, num_keys) -> torch.Tensor:
    """`(B, T, H, D)` of a few queries, from the running sums in the cache.

    Pruned by the rule of the config; without QK-norm not at all, as to measure a bound would take all keys.
    """
    tolerance = module.config.log_pruning_tolerance
    bound = None if tolerance is None else module.logit_bound(query.shape[1], query.dtype)
    out = forgetting_attention_decode(
        query,
        key,
        value,
        cache_layer.gate_sums(),
        num_keys=num_keys,
        scale=scaling,
        log_pruning_tolerance=None if bound is None else tolerance,
        pruning_rule=module.config.pruning_rule,
        logit_bound=bound,
        key_start=key_start,
    )
    return out.transpose(1, 2)


def fox_acp_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> torch.Tensor | None:
    """Mask of `fox_acp`, with the signature of Transformers' mask functions.

    The operator is causal by itself, learns of documents by closed gates, and takes the start of each sequence, which
    says all about left padding. Padding on the right needs no mask either: only padding sees it.

    Returns:
        `None` if nothing is padded; `(B,)` int32, the first real token of each sequence; or a bool `(B, 1, T, S)`
        where that is not enough: padding between real tokens, and while tracing, when the values of a mask cannot be
        looked at.
    """
    if attention_mask is None:
        return None
    real = attention_mask[:, :kv_length]
    is_static = isinstance(q_offset, torch.Tensor)
    if not is_tracing(attention_mask):
        if not is_static and real.all():
            return None
        first = real.int().argmax(dim=-1).to(torch.int32)
        # More than one run of real tokens: padding in between, as after a padded turn of a chat. A mask that ends in
        # padding is cut short too, unless the whole of it belongs to this call, when only padding follows.
        runs = (real[:, 1:] & ~real[:, :-1]).sum(dim=-1) + real[:, 0]
        last_first, most_runs = torch.stack((first.max(), runs.max())).tolist()
        if most_runs <= 1:
            return first if last_first else None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )


AttentionInterface.register("fox_acp", fox_acp_attention_forward)
AttentionMaskInterface.register("fox_acp", fox_acp_mask)

__all__ = ["FOX_BACKENDS", "check_attn_implementation", "default_attn_implementation"]
