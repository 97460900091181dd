"""Attention to the live pages of a cache: a few new queries, or a chunk of a prompt.

Letters:  B batch, H query heads, H_kv key heads, G query heads per key head, T queries, S tokens so far, D head dim.
"""

import math

import torch
import torch.nn.functional as F

from .forgetting_attention import _check_products, _require_triton, forgetting_attention, on_device_of
from .gates import LOG2_E
from .paged import LOWEST_GATE, MAX_STEP, PagedKeys

try:
    from . import triton_paged
except ImportError:  # no Triton: `_require_triton` gives the reason
    triton_paged = None

# Bytes of keys and values that a chunk of a prompt may gather at a time, beyond those of a single head.
LARGEST_GATHER = 2**28
# On a CPU heads are put together while the shortest has at least this part of the keys of the longest; up to so many
# keys are alike: a call more takes longer. On a GPU a call takes as long as copying a gigabyte.
SIMILAR = 0.75
SHORT = 512
# Bytes of live pages, as many for every head as the longest has, from which on a step looks for what it can skip: a
# kernel more, which takes about 5 us, and a quarter of the bytes less.
WORTH_A_PLAN = 2**28
# Keys that a GPU gathers in front of a chunk are a multiple of these where pages allow: Triton compiles a kernel for
# numbers that 16 divides and one for others, and blocks of 128 keys are such a number.
GATHER_BLOCK = 2048


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_fgate: torch.Tensor,
    cache: PagedKeys,
    layer: int,
    *,
    scale: float | None = None,
    may_evict: bool = True,
) -> torch.Tensor:
    """Add T keys to a layer of `cache` and attend to all that is live in it from the T queries; forward only.

    Up to 16 queries read the pages where they are, in time and memory that follow what is live; their launches
    depend on shapes alone, so that a CUDA graph can replay them between two calls of `cache.make_room`. On a GPU,
    where much is live, they skip by the tight rule what weighs too little to this step. More are a
    chunk of a prompt: the live keys of similar heads are copied together, `forgetting_attention` runs on those and the
    new ones, pruned at the same tolerance, and of the new ones only what still matters is stored.

    Args:
        q: Queries, `(B, H, T, D)`, float32, float16 or bfloat16.
        k: Keys of the same tokens, `(B, H_kv, T, D)`, dtype of `q`; v: values, as `k`.
        log_fgate: Their gates, `(B, H, T)` float32 nats, `<= 0`; below -9000 they count as that.
        scale: Factor on `q . k`. Default: `D ** -0.5`.
        may_evict: False keeps everything, for tokens that may be taken back by `cache.crop`; what was there before
            them is looked at all the same.

    Returns:
        `(B, H, T, D)`, dtype of `q`; rows before `cache.key_start` are 0. No row has lost more than eps of its mass,
        dropped and pruned together, if the logit bound of the layer holds and `cache.max_pages` is None.

    Raises:
        ValueError: If a shape, dtype or device is not one of the above, gradients are asked for, or an earlier call
            was interrupted while it changed `cache`.
        ImportError: For CUDA tensors without Triton.
    """
    _check_products(q, k, v)
    _check_against(cache, q, k, log_fgate)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if q.device.type == "cuda" and q.shape[2] <= MAX_STEP:
        _require_triton()
    # Tensors made in inference mode could not be written to outside of it.
    with torch.inference_mode(False), torch.no_grad(), on_device_of(q):
        if q.shape[2] > MAX_STEP:
            if not may_evict:
                cache.evict(only=layer)
            out = _chunk(q, k, v, log_fgate, cache, layer, scale)
            cache.is_whole = False
            cache.extend(layer, k, v, log_fgate, may_evict)
            cache.is_whole = True
            return out
        if not _is_capturing(q):
            cache.make_room(layer, q.shape[2])
        cache.is_whole = False
        cache.append(layer, k, v, log_fgate)
        if q.device.type == "cuda":
            out = attend_to_live(q if q.stride(-1) == 1 else q.contiguous(), cache, layer, scale)
        else:
            with torch.autocast("cpu", enabled=False):
                out = _step_on_cpu(q, cache, layer, scale)
        cache.is_whole = True
        return out


def skips_in_steps(cache: PagedKeys, layer: int) -> bool:
    """Whether a step looks for what it can skip, by what Python knows; a CUDA graph is of one answer."""
    live = cache.most_live[layer] * cache.batch * cache.num_kv_heads * cache.page_bytes()
    return cache.is_bounded[layer] and live >= WORTH_A_PLAN


def attend_to_live(q: torch.Tensor, cache: PagedKeys, layer: int, scale: float) -> torch.Tensor:
    """Up to 16 queries, `(B, H, T, D)` on a GPU, the last of the keys, against what is live and not too light."""
    pages = (cache.within, cache.starts, cache.table[layer])
    lowest, length = cache.first_key[layer], cache.lengths[layer]
    if skips_in_steps(cache, layer):
        lowest = triton_paged.plan(
            q, cache.keys, *pages, lowest, length, scale, cache.key_start, cache.logit_bound[layer],
            cache.evicted[layer], cache.evicted_at[layer], cache.log_tolerance,
        )  # fmt: skip
    return triton_paged.forward(q, cache.keys, cache.values, *pages, lowest, length, scale, cache.key_start)


def _is_capturing(x):
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_kind(name, x, cache):
    """Refuse what is not of the cache's dtype and device."""
    if x.device != cache.device or x.dtype != cache.keys.dtype:
        raise ValueError(
            f"{name} must be {cache.keys.dtype} on {cache.device}, as the cache; got {x.dtype} on {x.device}. Build a "
            "new cache after the model was moved or cast."
        )


def _check_against(cache, q, k, log_fgate):
    cache.check_whole()
    batch, num_heads, num_new, head_dim = q.shape
    expected = (cache.batch, cache.num_heads, cache.num_kv_heads, cache.head_dim)
    if (batch, num_heads, k.shape[1], head_dim) != expected or k.shape[2] != num_new:
        raise ValueError(
            f"q and k must be of the (batch, heads, key heads, head_dim) of the cache, {expected}, and of one length; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}. Build a new cache for another batch."
        )
    check_kind("q", q, cache)
    if log_fgate.shape != q.shape[:3] or log_fgate.dtype != torch.float32:
        raise ValueError(
            f"log_fgate must be {tuple(q.shape[:3])} float32, one gate per query head and new key; got "
            f"{tuple(log_fgate.shape)} {log_fgate.dtype}."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, log_fgate)):
        raise ValueError("pages have no gradients; got tensors that need them. Call it under torch.no_grad().")


def _live(cache, layer, num_keys):
    """Of every key head: live keys among the first `num_keys`, and hidden keys before them; one look at the device."""
    first, start = cache.first_key[layer], [0] * cache.batch
    if cache.key_start is not None:
        *first, start = torch.cat((first.T, cache.key_start.to(first)[None])).tolist()
        first = zip(*first, strict=True)
    else:
        first = first.tolist()
    lengths, hidden = [], []
    for row, begin in zip(first, start, strict=True):
        lengths += [num_keys - low for low in row]
        hidden += [max(begin - low, 0) for low in row]
    return lengths, hidden


def _alike(lengths: list[int], least: int, most: int, similar: float = SIMILAR):
    """Indices put together by similar length, below `least` all alike; `most` keys in all, or one index alone."""
    together: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if together:
            longest = lengths[together[0]]
            if max(lengths[i], least) < similar * longest or (len(together) + 1) * longest > most:
                yield together
                together = []
        together.append(i)
    yield together


def _ways_to_gather(device):
    """Least part of the longest that the shortest head has, and of what the number of keys is a multiple."""
    return (0.0, GATHER_BLOCK) if device.type == "cuda" else (SIMILAR, 1)


class _Gathered:
    """Pages of the live keys of some heads side by side, as many of each as the longest has; the newest last.

    Attributes:
        begin: First key of the longest; before it, where their number is rounded up, even before the sequence.
        index: Which heads, of `(B * H_kv)`.
        num_hidden: Of each head, the keys from `begin` on that are hidden or not there any more.
    """

    def __init__(self, cache, layer, heads, lengths, hidden, num_keys, multiple=1):
        size, device = cache.page_size, cache.device
        longest = lengths[heads[0]]
        longest += -longest % multiple // size * size
        self.begin = num_keys - longest
        table = cache.table[layer].flatten(0, 1)
        page = torch.arange(self.begin // size, -(-num_keys // size), device=device) % table.shape[-1]
        is_all = len(heads) == len(table)
        self.index = slice(None) if is_all else torch.tensor(heads, device=device)
        order = range(len(table)) if is_all else heads
        at = table[self.index][:, page].long()
        gone = [longest - lengths[i] for i in order]
        self.num_hidden = [g + hidden[i] for g, i in zip(gone, order, strict=True)]
        if any(gone) and len(page):
            # There stands somebody else's page by now: the head's own first one takes the place, hidden.
            low = torch.tensor(gone, device=device)[:, None] // size
            at = at.gather(1, torch.arange(len(page), device=device).maximum(low).clamp_(max=len(page) - 1))
        self.cache, self.at = cache, at
        self.first = torch.tensor(self.num_hidden, device=device)[:, None, None] if any(self.num_hidden) else None
        self.starts = cache.starts[at].double().sum(dim=2)  # (heads, pages, G)

    def rows(self, pool, num_keys):
        """`(heads, S, D)` of the keys or values of the cache."""
        return pool[self.at].flatten(1, 2)[:, : num_keys - self.begin]

    def decay(self, lam, num_keys):
        """How far the keys have decayed at queries of `lam (heads, G, T)` bits: `(heads, G, T, S)` float32 nats."""
        within = self.cache.within[self.at].transpose(1, 2).transpose(2, 3)  # (heads, 2, G, pages, page)
        from_start = (lam[..., None] - self.starts.transpose(1, 2)[:, :, None]).float()  # (heads, G, T, pages)
        decay = from_start[..., None] - within[:, 0, :, None]
        decay.sub_(within[:, 1, :, None]).mul_(1.0 / LOG2_E)
        return decay.flatten(-2)[..., : num_keys - self.begin]

    def lam(self, num_keys):
        """`(heads, G, S)` float64 bits."""
        within = self.cache.within[self.at].double().sum(dim=2)
        return (within + self.starts[..., None]).transpose(1, 2).flatten(-2)[..., : num_keys - self.begin]


def _looked_up(cache, layer):
    """Where the live keys of a layer are; the same until pages come or go."""
    num_keys = cache.num_keys[layer]
    state = (cache.changes, -(-num_keys // cache.page_size))
    seen, gathered = cache.looked_up.get(layer, (None, None))
    if seen != state:
        lengths, hidden = _live(cache, layer, num_keys)
        gathered = [
            _Gathered(cache, layer, heads, lengths, hidden, num_keys)
            for heads in _alike(lengths, SHORT, LARGEST_GATHER)
        ]
        cache.looked_up[layer] = (state, gathered)
    return gathered


def _step_on_cpu(q, cache, layer, scale) -> torch.Tensor:
    """Key heads of similar length take one call of PyTorch's attention."""
    num_keys, groups, num_queries = cache.num_keys[layer], cache.groups, q.shape[2]
    rows = q.unflatten(1, (-1, groups)).flatten(0, 1)  # (B * H_kv, G, T, D)
    lam = cache.totals[layer].view(-1, groups, 1)
    found = _looked_up(cache, layer)
    out = None if len(found) == 1 else torch.empty_like(rows)
    for live in found:
        k, v = (live.rows(pool, num_keys) for pool in (cache.keys, cache.values))
        at_queries = lam[live.index] if num_queries == 1 else live.lam(num_keys)[..., -num_queries:]
        decay = live.decay(at_queries, num_keys)
        if num_queries > 1 or live.first is not None:
            key = torch.arange(num_keys - live.begin)
            position = key[-num_queries:, None]
            is_hidden = key > position if live.first is None else (key > position) | (key < live.first)
            decay.masked_fill_(is_hidden if live.first is None else is_hidden[:, None], -torch.inf)
        mixed = F.scaled_dot_product_attention(
            rows[live.index].flatten(1, 2)[:, None], k[:, None], v[:, None], attn_mask=decay.flatten(1, 2)[:, None],
            scale=scale,
        )  # fmt: skip
        mixed = mixed.view(-1, groups, num_queries, q.shape[-1])
        if live.first is not None:
            mixed = mixed.masked_fill((position < live.first)[:, None], 0.0)  # a row of padding has seen nothing
        if out is None:
            return mixed.view(q.shape)
        out[live.index] = mixed
    return out.view(q.shape)


def _chunk(q, k, v, log_fgate, cache, layer, scale) -> torch.Tensor:
    """T queries against what is live and the T new keys."""
    num_before, num_new, groups = cache.num_keys[layer], q.shape[2], cache.groups
    lengths, hidden = _live(cache, layer, num_before)
    rows = q.unflatten(1, (-1, groups)).flatten(0, 1)
    new_keys, new_values = k.flatten(0, 1), v.flatten(0, 1)
    gates = log_fgate.clamp(min=LOWEST_GATE).unflatten(1, (-1, groups)).flatten(0, 1)
    bound = cache.logit_bound[layer].float().view(-1, groups).repeat(cache.batch, 1)
    is_bounded, (similar, multiple) = cache.is_bounded[layer], _ways_to_gather(q.device)
    most = LARGEST_GATHER // (2 * cache.head_dim * cache.keys.element_size())
    out = torch.empty_like(rows)
    for heads in _alike(lengths, 0, most, similar):
        live = _Gathered(cache, layer, heads, lengths, hidden, num_before, multiple)
        key_start = torch.tensor(live.num_hidden, device=q.device, dtype=torch.int32)
        lam = live.lam(num_before)
        before = lam.diff(dim=-1, prepend=lam[..., :1]).mul_(1.0 / LOG2_E).float()
        longest = lam.shape[-1]
        position = torch.arange(longest, device=q.device)
        before.masked_fill_((position <= key_start[:, None])[:, None], 0.0)
        # The paper's rule counts all keys of a row, the dropped ones too: then both together stay below eps. The
        # tight rule would add the mass of those that are there to that of the dropped ones.
        tolerance = cache.log_tolerance - max(math.log((num_before + num_new) / (longest + num_new)), 0.0)
        out[live.index] = forgetting_attention(
            rows[live.index],
            torch.cat((live.rows(cache.keys, num_before), new_keys[live.index]), dim=1)[:, None],
            torch.cat((live.rows(cache.values, num_before), new_values[live.index]), dim=1)[:, None],
            torch.cat((before, gates[live.index]), dim=-1),
            scale=scale,
            log_pruning_tolerance=tolerance if is_bounded else None,
            pruning_rule="paper",
            logit_bound=bound[live.index] if is_bounded else None,
            key_start=key_start if multiple > 1 or any(live.num_hidden) else None,
        )
    return out.view(q.shape)


__all__ = ["paged_attention"]
