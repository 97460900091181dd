"""Adaptive computation pruning: which keys a query may skip, and the proof of what it loses at most.

Letters:  B batch, H query heads, H_kv key heads, T queries, S keys, D head dim; the queries are the last T of the S
    positions.
Units:    nats, unless a name ends in `_bits`.
"""

import math
from typing import NamedTuple

import torch

from .gates import GATE_BLOCK, LOG2_E, GateSums

try:
    from . import triton_pruning
except ImportError:  # no Triton: forgetting_attention.py gives the reason when a CUDA tensor comes
    triton_pruning = None

# Pruning decides on blocks of this many queries by this many keys, on every device, so that results do not depend on
# the tile sizes of a GPU.
PRUNING_BLOCK_T = 128
PRUNING_BLOCK_S = 64

PRUNING_RULES = ("paper", "tight")

# The tight rule asks for this much more than it needs, nats, for all its roundings but those of products q . k. These
# it bounds by DOT_ERROR * |scale| ||q|| ||k||: tf32 loses 2**-9 of it, 256 sums in float32 on tensor cores 2**-14. A
# mean of keys is rounded to their type besides, and so is the square of their spread summed over 128 channels.
TIGHT_SLACK = 2.0**-5
DOT_ERROR = {torch.float32: 2.0**-8, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-12}
CENTER_ERROR = {torch.float32: 2.0**-7, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-8}
SPREAD_ERROR = {torch.float32: 2.0**-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-11}
SPREAD_DIM = 128  # wider heads do without
LEAST_NORM = 2.0**-50  # smaller norms count as this: their squares underflow

# Blocks of keys that the tight rule must be able to win before it looks at scores, and the least log of a tolerance:
# below it float32 weights would underflow while they still count.
MIN_GAIN = 2
LEAST_LOG_TOLERANCE = -60.0
# A row's sum of weights counts keys by their means: 16 groups of `WINDOW` keys before the block's first row, and 48 of
# `GATE_BLOCK` before those.
WINDOW = 16
NEAR_CENTERS = 16
FAR_CENTERS = 48
_BLOCKS_AT_ONCE = 4  # of keys: fewer Python steps, and up to 3 blocks tested for nothing
_MAX_SCORES = 1 << 21  # in memory at a time

# The paper's rule takes its threshold this much lower, relative: the float32 norms of up to 256 channels and the
# threshold's own operations are off by less than 2**-20, the running sums by 2**-47 of themselves.
PAPER_SLACK = 2.0**-16


class PruningStats(NamedTuple):
    """What adaptive computation pruning did in one call.

    Attributes:
        pruned_fraction: `(H,)` float32. Share of the visible (query, key) pairs of a head that were skipped.
        lost_mass_bound: `(H,)` float32. No row of the head lost more attention mass than this to skipping.
    """

    pruned_fraction: torch.Tensor
    lost_mass_bound: torch.Tensor


def prune(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: GateSums,
    first_visible: torch.Tensor,
    key_start: torch.Tensor | None,
    *,
    scale: float,
    rule: str,
    log_tolerance: float,
    logit_bound: torch.Tensor | None,
) -> torch.Tensor:
    """First key that each query attends to after pruning, `(B, H, T)` int32, `>= first_visible`, never decreasing.

    On a GPU one kernel for the paper's rule, two where the bound has to be measured, and four for the tight rule.
    Nothing waits for the device.

    Args:
        q: `(B, H, T, D)`, last dimension contiguous.
        k: `(B, H_kv, S, D)`, last dimension contiguous.
        sums: From `gates.gate_sums`.
        first_visible: `(B, H, T)` int32, from `gates.first_visible_key`.
        key_start: `(B,)` integers; what is before it may hold anything.
        rule: One of `PRUNING_RULES`.
        log_tolerance: Log of the attention mass that a row may lose.
        logit_bound: At least every `|scale * q . k|`, nats; expands to `(B, H)`. None: measured.
    """
    tensors = (q, k, sums, first_visible, key_start)
    options = dict(scale=scale, log_tolerance=log_tolerance, logit_bound=logit_bound)
    if q.device.type == "cuda" and triton_pruning is not None:
        if rule == "tight":
            return triton_pruning.tight_rule(*tensors, **options)[0]
        return triton_pruning.paper_rule(*tensors, **options)
    if rule == "tight":
        return _expand_to_rows(tight_rule(*tensors, **options)[0], first_visible, k.shape[2])
    if logit_bound is None:
        logit_bound = measured_logit_bound(q, k, scale, key_start)
    threshold = pruning_threshold(logit_bound.expand(q.shape[:2]), k.shape[2], log_tolerance)
    return first_kept_key(sums, first_visible, threshold)


class _QueryBlocks:
    """Positions and running sums (bits, float64) of the blocks of queries; M blocks, N blocks of keys."""

    def __init__(self, sums: GateSums, first_visible: torch.Tensor):
        self.num_keys, self.num_queries = sums.within.shape[-1], first_visible.shape[-1]
        self.first_visible = first_visible  # (B, H, T)
        self.running = sums.running()  # (B, H, S)
        self.at_block_end = self.running[..., PRUNING_BLOCK_S - 1 :: PRUNING_BLOCK_S].contiguous()  # (B, H, N)
        self.at_group_start = sums.starts[0].double() + sums.starts[1].double()  # (B, H, groups)
        self.at_group_end = self.running[..., GATE_BLOCK - 1 :: GATE_BLOCK]  # (B, H, whole groups)
        self.first = torch.arange(
            self.num_keys - self.num_queries, self.num_keys, PRUNING_BLOCK_T, device=first_visible.device
        )  # (M,)
        self.at_first = self.running[..., self.first]  # (B, H, M)

    def ends_below(self, limit: torch.Tensor) -> torch.Tensor:
        """How many blocks of keys have decayed below `limit`, bits, at each block's first query, `(B, H, M)` int64."""
        limit = limit.double() - self.at_first
        return torch.minimum(torch.searchsorted(-self.at_block_end, limit), self.first // PRUNING_BLOCK_S)

    def largest_of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Largest of every block's rows: `(B, H, T)`, not negative, to `(B, H, M)`."""
        pad = len(self.first) * PRUNING_BLOCK_T - self.num_queries
        return torch.nn.functional.pad(x, (0, pad)).unflatten(-1, (-1, PRUNING_BLOCK_T)).amax(dim=-1)


class _KeySummaries:
    """What the tight rule knows of every group of `GATE_BLOCK` keys, padding taken as 0.

    Attributes:
        norm: `(B, H_kv, groups)` float32, largest norm.
        largest: `(B, H_kv, M)` float32, largest norm up to the last key that a block of queries sees.
        spread: `(B, H_kv, groups)` float32, at most 1: for every q the squares of `q . k` sum up to at most
            `GATE_BLOCK * spread * ||q||^2 * norm^2`.
        center: `(B, H_kv, groups, 9, D)` of the type of k: the mean of every `WINDOW` keys and that of all, divided by
            `norm`.
    """

    def __init__(self, k: torch.Tensor, key_start: torch.Tensor | None, blocks: _QueryBlocks):
        num_keys, dim = k.shape[2:]
        if key_start is not None:
            padding = torch.arange(num_keys, device=k.device) < key_start[:, None]
            k = k.masked_fill(padding[:, None, :, None], 0.0)
        groups = torch.nn.functional.pad(k, (0, 0, 0, -num_keys % GATE_BLOCK)).unflatten(2, (-1, GATE_BLOCK)).float()
        self.norm = groups.norm(dim=-1).amax(dim=-1).clamp_(min=LEAST_NORM)
        last = (blocks.first + PRUNING_BLOCK_T).clamp_(max=num_keys) - 1
        self.largest = self.norm.cummax(dim=-1).values[..., last // GATE_BLOCK]
        square = self.norm * self.norm
        usable = (self.norm > LEAST_NORM) & square.isfinite()
        means = groups.unflatten(3, (-1, WINDOW)).mean(dim=4)
        means = torch.cat((means, means.mean(dim=3, keepdim=True)), dim=3) / self.norm[..., None, None]
        self.center = means.where(usable[..., None, None], 0.0).to(k.dtype)
        self.spread = torch.ones_like(self.norm)
        if dim <= SPREAD_DIM:
            # Gershgorin: no eigenvalue of sum k k^T is larger than a sum of absolute values in a row of it.
            row = (groups.transpose(-1, -2) @ groups).abs_().sum(dim=-1).amax(dim=-1)
            spread = row / (GATE_BLOCK * square) * (1.0 + 2.0**-10) + SPREAD_ERROR[k.dtype]
            self.spread = torch.where(usable & (spread < 1.0), spread, 1.0)


def tight_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: GateSums,
    first_visible: torch.Tensor,
    key_start: torch.Tensor | None,
    *,
    scale: float,
    log_tolerance: float,
    logit_bound: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of keys that each block of queries drops under the tight rule, and the mass that a row of it can lose.

    What the paper's rule drops with the norms of the block's own rows is dropped. Where more is left to win, the rule
    adds up the mass of one block of keys after the other, from the scores themselves, until eps is spent; it starts
    where a bound without scores ends. Theorem and proof: kernels/README.md. Arguments: see `prune`.

    Returns:
        `(B, H, M)` int64 and `(B, H, M)` float32, for M blocks of `PRUNING_BLOCK_T` queries.
    """
    blocks = _QueryBlocks(sums, first_visible)
    keys = _KeySummaries(k, key_start, blocks)
    block_bound = _block_bounds(q, scale, key_start, logit_bound, blocks, keys)
    hidden = first_visible[..., ::PRUNING_BLOCK_T].long() // PRUNING_BLOCK_S
    dropped = blocks.ends_below(pruning_threshold(block_bound, k.shape[2], log_tolerance) * LOG2_E)
    # So many keys as near as the nearest of them. What is hidden has no mass.
    nearest = blocks.running.gather(-1, (dropped * PRUNING_BLOCK_S - 1).clamp_(min=0))
    mass = dropped * PRUNING_BLOCK_S * torch.exp2(2 * LOG2_E * block_bound + (blocks.at_first - nearest).float())
    mass = torch.where(dropped > hidden, mass, 0.0)
    dropped = torch.maximum(dropped, hidden)
    # Decay alone hides a block from an average row; nothing in the proof depends on this guess.
    possible = blocks.ends_below(torch.full_like(block_bound, log_tolerance * LOG2_E))
    worth = (possible - dropped >= MIN_GAIN) & block_bound.isfinite() & (log_tolerance >= LEAST_LOG_TOLERANCE)
    at_once = max(1, _MAX_SCORES // (PRUNING_BLOCK_T * PRUNING_BLOCK_S * _BLOCKS_AT_ONCE))
    for index in worth.nonzero().split(at_once):
        b, h, m = index.unbind(1)
        bound = None if logit_bound is None else block_bound[b, h, m]
        tested = _test_blocks(
            q, k, blocks, keys, bound, hidden[b, h, m], possible[b, h, m], index, scale, log_tolerance
        )
        better = tested > dropped[b, h, m]
        dropped[b, h, m] = torch.where(better, tested, dropped[b, h, m])
        mass[b, h, m] = torch.where(better, math.exp(log_tolerance - TIGHT_SLACK), mass[b, h, m])
    return dropped, mass


def _block_bounds(q, scale, key_start, logit_bound, blocks, keys) -> torch.Tensor:
    """At least every `|scale * q_i . k_j|` of the rows of a block, nats, `(B, H, M)` float32."""
    batch, num_heads, num_queries, _ = q.shape
    if logit_bound is not None:
        return logit_bound.float().expand(batch, num_heads)[..., None].expand(batch, num_heads, len(blocks.first))
    q_norm = q.float().norm(dim=-1).clamp_(min=LEAST_NORM)
    if key_start is not None:
        position = torch.arange(blocks.num_keys - num_queries, blocks.num_keys, device=q.device)
        q_norm = q_norm.masked_fill(position < key_start[:, None, None], 0.0)
    largest = keys.largest.repeat_interleave(num_heads // keys.norm.shape[1], dim=1)
    return _norm_factor(scale) * blocks.largest_of_rows(q_norm) * largest


def _norm_factor(scale: float) -> float:
    return abs(scale) * (1.0 + PAPER_SLACK)  # the norms are off by less than 2**-17 each


def _keys(k, head, index, position, first_visible):
    """Keys at the positions `(A, W)` of A blocks of queries, `(A, W, D)` float32, 0 where they are not visible."""
    keys = k[index[:, 0, None], head[:, None], position.clamp(0, k.shape[2] - 1)].float()
    visible = (position >= first_visible[:, None]) & (position < k.shape[2])
    return keys if visible.all() else keys.masked_fill(~visible[..., None], 0.0)


def _log_sum(exponent: torch.Tensor) -> torch.Tensor:
    """Of `exp2` along the last dimension, bits; of nothing it is -inf."""
    largest = exponent.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    return exponent.sub(largest).exp2_().sum(dim=-1).log2_() + largest[..., 0]


def _least_log_sum(rows, q_norm, head, blocks, summaries, index, cut, scale_bits, center_error):
    """At most the log of the sum of each row's weights less its decay since the block's first query, `(A, R)` bits.

    Every group of keys counts as if all of them were their mean (Jensen) and had decayed since the key before it.
    """
    b, h, m = index.unbind(1)
    end = blocks.first[m, None] // WINDOW
    near = end - NEAR_CENTERS + torch.arange(NEAR_CENTERS, device=rows.device)  # (A, near), in windows
    windows = GATE_BLOCK // WINDOW
    far = ((end - NEAR_CENTERS) // windows - FAR_CENTERS + torch.arange(FAR_CENTERS, device=rows.device)) * windows
    start = torch.cat((near, far), dim=1)
    size = torch.cat((torch.full_like(near, WINDOW), torch.full_like(far, GATE_BLOCK)), dim=1)
    part = torch.cat((near % windows, torch.full_like(far, windows)), dim=1)
    at = (b[:, None], head[:, None], (start // windows).clamp_(min=0))
    norm = summaries.norm[at]
    means = rows @ summaries.center[(*at, part)].float().transpose(1, 2) * (norm * scale_bits)[:, None]
    before = blocks.running[b[:, None], h[:, None], (start * WINDOW - 1).clamp_(min=0)].where(start > 0, 0.0)
    decay = torch.log2(size) + (blocks.at_first[b, h, m, None] - before).float()
    # Keys too small for their squares have no mean here.
    hidden = (start * WINDOW < cut[:, None]) | (start < 0) | (norm <= LEAST_NORM)
    means += decay.masked_fill_(hidden, float("-inf"))[:, None]
    return _log_sum(means) - center_error * abs(scale_bits) * q_norm * summaries.largest[b, head, m][:, None]


def _far_groups(summaries, blocks, head, index, to_row, norm_bound, row_bits, bound, end, log_eps):
    """Groups of keys that hold at most half of eps together, from norms alone, and the share of it that they hold.

    Args:
        to_row: `(A, R)` bits, what a score and the decay up to the block's first query are added to.
        norm_bound: `(A, R)` nats, at least every `|scale| ||q_i|| ||k||`.
        row_bits: `(A, R)` bits, at least every `|scale q_i . k|`.
        bound: `(A,)` nats, at least every `|scale q_i . k|`, or None.
        end: `(A,)` groups that may be dropped.
    """
    b, h, m = index.unbind(1)
    largest = lambda x: torch.where(x.isnan(), math.inf, x).amax(dim=-1, keepdim=True)  # noqa: E731
    reach = largest(to_row + row_bits)
    # exp(s) <= 1 + s + (exp(u) - 1 - u) (s / u)^2 for s <= u, summed over a group; u is the bound, s a norm's at most.
    largest_norm = largest(norm_bound)
    square = 1.0 if bound is None else (largest_norm / bound[:, None]).clamp_(min=1.0).square_()
    linear = (1.0 + largest_norm) * torch.exp2(largest(to_row) - reach)
    group = torch.arange(blocks.at_group_end.shape[-1], device=b.device)
    relative = summaries.norm[b, head] / summaries.largest[b, head, m][:, None]
    spread = summaries.spread[b, head] * (relative * relative).nan_to_num(nan=1.0)
    factor = (square * spread[:, : len(group)] + linear).clamp_(max=1.0)  # a NaN stays one
    room = log_eps - 1.0 - reach
    decay = (blocks.at_first[b, h, m, None] - blocks.at_group_end[b, h]).float()
    share = torch.exp2((decay + math.log2(GATE_BLOCK) - room).clamp_(max=100.0)) * factor
    share = share.masked_fill_(group >= end[:, None], math.inf).double().cumsum(dim=-1)
    count = (share <= 1.0).sum(dim=-1)
    held = torch.cat((torch.zeros_like(share[:, :1]), share), dim=-1).gather(-1, count[:, None])
    return count, held[:, 0].float()


def _test_blocks(q, k, blocks, summaries, bound, hidden, possible, index, scale, log_tolerance):
    """Blocks of keys that A blocks of queries may drop, `(A,)` int64.

    Args:
        bound: `(A,)` nats, at least every `|scale q . k|`, or None: norms are used.
        hidden: `(A,)` blocks of keys before the first visible one.
        possible: `(A,)` blocks of keys at which to stop.
        index: `(A, 3)`: batch, head and number of each block of queries.
    """
    b, h, m = index.unbind(1)
    head = h // (q.shape[1] // k.shape[1])
    offset = blocks.num_keys - blocks.num_queries
    scale_bits = scale * LOG2_E
    log_eps = (log_tolerance - TIGHT_SLACK) * LOG2_E

    # 1. The rows, (A, R). What a row does not see, or is padding, has no mass to lose.
    position = blocks.first[m, None] + torch.arange(PRUNING_BLOCK_T, device=q.device)
    t = (position - offset).clamp_(max=blocks.num_queries - 1)
    row_first = blocks.first_visible[b[:, None], h[:, None], t]
    empty = (row_first > position) | (position >= blocks.num_keys)
    cut = row_first.masked_fill(empty, 0).amax(dim=-1)
    rows = q[b[:, None], h[:, None], t].float().masked_fill_(empty[..., None], 0.0)
    q_norm = rows.norm(dim=-1).clamp_(min=LEAST_NORM)
    k_norm = summaries.largest[b, head, m][:, None]
    lam_first = blocks.at_first[b, h, m]  # (A,)

    # 2. At most so much is the log of the sum of a row's weights, bits.
    log_sum = _least_log_sum(rows, q_norm, head, blocks, summaries, index, cut, scale_bits, CENTER_ERROR[k.dtype])
    # A row's own key weighs at least exp(-u), and decays by nothing.
    norm_bound = _norm_factor(scale) * q_norm * k_norm
    row_bound = norm_bound if bound is None else torch.minimum(norm_bound, bound[:, None])
    row_bits = row_bound * ((1.0 + PAPER_SLACK) * LOG2_E)
    log_sum = torch.where(q_norm * k_norm < math.inf, torch.maximum(log_sum, -row_bits), log_sum)
    # A row weighs a key l by exp2(score + to_row + lam_first - lam_l): its own decay is in both.
    to_row = -log_sum.masked_fill_(empty, float("inf"))

    # 3. Without scores: 128 keys as near as the last of them.
    end = blocks.first[m] // PRUNING_BLOCK_S
    count, share = _far_groups(
        summaries, blocks, head, index, to_row, norm_bound, row_bits, bound, blocks.first[m] // GATE_BLOCK, log_eps
    )
    start = count * (GATE_BLOCK // PRUNING_BLOCK_S)
    spent = torch.where(start > hidden, 0.5 * 2.0**log_eps * share, 0.0)[:, None].repeat(1, PRUNING_BLOCK_T)
    dropped = torch.maximum(start, hidden)

    # 4. With scores, block after block, until eps is spent.
    to_row = to_row + abs(scale_bits) * DOT_ERROR[q.dtype] * q_norm * k_norm
    end = torch.minimum(end, possible)
    dropped = torch.where(cut <= blocks.first[m], dropped, 0)
    active = ((dropped < end) & (cut <= blocks.first[m])).nonzero()[:, 0]
    width = _BLOCKS_AT_ONCE
    while len(active):
        first = dropped[active]
        at = first[:, None] * PRUNING_BLOCK_S + torch.arange(width * PRUNING_BLOCK_S, device=q.device)
        keys = _keys(k, head[active], index[active], at, row_first[active, 0])
        window_end = at[:, WINDOW - 1 :: WINDOW].clamp(max=blocks.num_keys - 1)
        decay = (lam_first[active, None] - blocks.running[b[active, None], h[active, None], window_end]).float()
        scores = (rows[active] @ keys.transpose(1, 2)).mul_(scale_bits).unflatten(-1, (-1, 2, 4, 2))
        # Four keys weigh at most four times the largest of them, as near as the last of the window.
        scores = scores.amax(dim=(3, 5)) + (decay[:, None] + to_row[active, :, None])[..., None]
        weights = scores.exp2_().flatten(2).unflatten(-1, (width, -1)).sum(dim=-1).mul_(4.0)
        total = spent[active, :, None] + weights.cumsum(dim=-1)
        passes = (total <= 2.0**log_eps).all(dim=1)
        passes &= first[:, None] + torch.arange(width, device=q.device) < end[active, None]
        count = passes.long().cumprod(dim=-1).sum(dim=-1)
        spent[active] = total[..., -1]
        dropped[active] += count
        active = active[count == width]
    return dropped


def measured_logit_bound(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_start: torch.Tensor | None
) -> torch.Tensor:
    """`|scale| * max ||q|| * max ||k||` of each head, at least every `|logit|` (Cauchy-Schwarz). `(B, H)` float32.

    Summed in float64, so that the order of the sums does not matter: in bfloat16 the bound itself is off by up to 2.6
    nats and the guarantee is gone.
    """
    q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (q, k))
    if key_start is not None:
        position = torch.arange(k.shape[2], device=k.device)
        padding = position < key_start[:, None, None]
        k_norm = k_norm.masked_fill(padding, 0.0)
        q_norm = q_norm.masked_fill(padding[..., k.shape[2] - q.shape[2] :], 0.0)
    groups = q.shape[1] // k.shape[1]
    return abs(scale) * q_norm.amax(dim=-1).float() * k_norm.amax(dim=-1).float().repeat_interleave(groups, dim=1)


def pruning_threshold(logit_bound: torch.Tensor, num_keys: int, log_pruning_tolerance: float) -> torch.Tensor:
    """A pair may be dropped when its decay is below `-2U - log S + log eps` nats. `(B, H)` float32, as `logit_bound`.

    A pair below it weighs less than `exp(U) * exp(-2U) * eps / S` before normalisation, and the row's own key at least
    `exp(-U)`: the at most S dropped pairs of a row hold less than eps of its mass. Source: "Adaptive Computation
    Pruning for the Forgetting Transformer", arXiv:2504.06949. Lower than that by `PAPER_SLACK`, for rounding.
    """
    threshold = (2.0 * logit_bound.float() + paper_budget(num_keys, log_pruning_tolerance)) * -(1.0 + PAPER_SLACK)
    # A bound that is not a number (padding can hold anything) must never prune.
    return threshold.nan_to_num(nan=float("-inf"))


def paper_budget(num_keys: int, log_pruning_tolerance: float) -> float:
    """`log S - log eps`, nats."""
    return math.log(num_keys) - log_pruning_tolerance


def first_kept_key(sums: GateSums, first_visible: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """First key that each query attends to under the paper's rule, `(B, H, T)` int32, `>= first_visible`.

    A block is dropped when its largest decay, from its last key to its first query, is below the threshold. The
    running sum never increases, so the dropped blocks of a row of blocks are a prefix and one sorted search finds its
    end.

    Args:
        sums: From `gates.gate_sums`.
        first_visible: `(B, H, T)` int32, from `first_visible_key`.
        threshold: `(B, H)` float32, nats, from `pruning_threshold`.
    """
    num_keys, num_queries = sums.within.shape[-1], first_visible.shape[-1]
    offset = num_keys - num_queries
    running = sums.running()
    at_block_end = running[..., PRUNING_BLOCK_S - 1 :: PRUNING_BLOCK_S].contiguous()
    # Gates above 0 are not allowed, but must not break the order that the backward pass relies on.
    at_first_query = running[..., offset::PRUNING_BLOCK_T].flip(-1).cummax(dim=-1).values.flip(-1)
    # Dropped: running[first query] - running[block end] < threshold.
    limit = (threshold * LOG2_E).double()[..., None] - at_first_query
    num_dropped = torch.searchsorted(-at_block_end, limit.contiguous())  # (B, H, blocks of queries)
    return _expand_to_rows(num_dropped, first_visible, num_keys)


def _expand_to_rows(num_dropped: torch.Tensor, first_visible: torch.Tensor, num_keys: int) -> torch.Tensor:
    """First key of every row, `(B, H, T)` int32, from the blocks of keys that its block of queries drops."""
    num_queries, device = first_visible.shape[-1], first_visible.device
    # A block that reaches past its first query holds a decay of 0: never drop it, whatever the gates are.
    first_query = torch.arange(num_keys - num_queries, num_keys, PRUNING_BLOCK_T, device=device)
    num_dropped = torch.minimum(num_dropped, first_query // PRUNING_BLOCK_S)
    num_dropped = num_dropped.flip(-1).cummin(dim=-1).values.flip(-1)  # fewer are as safe, and the order must hold
    kept = (num_dropped * PRUNING_BLOCK_S).to(torch.int32)
    block_of_query = torch.arange(num_queries, device=device) // PRUNING_BLOCK_T
    return torch.maximum(first_visible, kept[..., block_of_query]).contiguous()


def statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: GateSums,
    first_visible: torch.Tensor,
    first_key: torch.Tensor,
    key_start: torch.Tensor | None,
    *,
    scale: float,
    rule: str,
    log_tolerance: float | None,
    logit_bound: torch.Tensor | None,
) -> PruningStats:
    """What `prune` did, from its arguments and its result; a `log_tolerance` of None means that it was not called."""
    if log_tolerance is None:
        return pruning_stats(sums, first_visible, first_key, None)
    if rule == "tight":
        on_gpu = q.device.type == "cuda" and triton_pruning is not None
        _, mass = (triton_pruning.tight_rule if on_gpu else tight_rule)(
            q, k, sums, first_visible, key_start, scale=scale, log_tolerance=log_tolerance, logit_bound=logit_bound
        )
        # The sums can be short by their roundings, and the proof allows eps and no more.
        bound = (mass.amax(dim=(0, 2)) * math.exp(TIGHT_SLACK)).clamp_(max=math.exp(log_tolerance))
        return pruning_stats(sums, first_visible, first_key, None)._replace(lost_mass_bound=bound)
    if logit_bound is None:
        logit_bound = measured_logit_bound(q, k, scale, key_start)
    return pruning_stats(sums, first_visible, first_key, logit_bound.expand(q.shape[:2]))


def pruning_stats(
    sums: GateSums, first_visible: torch.Tensor, first_key: torch.Tensor, logit_bound: torch.Tensor | None
) -> PruningStats:
    """Count what was skipped and bound what it can have weighed; see `PruningStats`.

    The bound of a row is `skipped * exp(2U + decay of the nearest skipped key)`.
    """
    num_keys, num_queries = sums.within.shape[-1], first_key.shape[-1]
    offset = num_keys - num_queries
    query = torch.arange(offset, num_keys, device=first_key.device)
    # Clamped: a row of padding sees nothing, so it can skip nothing.
    visible = (query + 1 - first_visible).clamp_(min=0)
    skipped = torch.minimum((first_key - first_visible).clamp_(min=0), visible)
    fraction = skipped.double().sum(dim=(0, 2)) / visible.double().sum(dim=(0, 2)).clamp_(min=1)
    if logit_bound is None:
        return PruningStats(fraction.float(), torch.zeros_like(fraction, dtype=torch.float32))
    running = sums.running() / LOG2_E
    nearest = running.gather(-1, (first_key.long() - 1).clamp_(min=0))
    bound = skipped * torch.exp(2.0 * logit_bound.double()[..., None] + running[..., offset:] - nearest)
    bound = torch.where(skipped > 0, bound, 0.0)
    return PruningStats(fraction.float(), bound.amax(dim=(0, 2)).float())
