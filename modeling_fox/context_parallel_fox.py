# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: one sequence over several processes, each with a run of its tokens.

Process r of P holds the tokens `r t` to `(r + 1) t - 1` of every row, t = T / P: input_ids, position_ids and labels of
those, and computes everything but attention on them alone. Three things cross the borders:

- the token before the first one, which the shift of keys and values looks at;
- where documents start, as only the positions of the whole row tell;
- keys, values and gates. Two ways:
  "ulysses" (arXiv:2309.14509): all-to-all, after which a process has all tokens for H / P of the heads; gates go the
  same way, in one all-to-all more. Attention is that of one process, so every backend works.
  "ring" (after arXiv:2310.01889): a process keeps its queries and is sent the keys of the processes before it. Decay
  and documents end a row's view: what lies beyond it is not sent. Needs `fox_acp`, any number of heads.

Letters:  B batch, H query heads, H_kv key heads, T tokens of a whole row, t of this process, P processes, D head dim.
"""

import math
from collections.abc import Callable

import torch
from torch import distributed as dist

from .masks_fox import make_masks

STYLES = ("ulysses", "ring")


def enable_context_parallel(model, group=None, style: str = "ulysses") -> "ContextParallel":
    """Let `model` compute on its process's run of tokens; see the top of this file.

    From then on `input_ids` and `position_ids` are those of this process, `(B, t)`, and so are the labels, which
    `shift_labels` gives already shifted (`ContextParallel.local` cuts a whole batch so). The sum of the losses over
    the group is the loss of the whole rows; gradients are parts that must be added up over the group, as
    DistributedDataParallel and FSDP do.

    Args:
        model: A FoX model, on every process the same.
        group: Process group of the P processes that share rows. None: all processes.
        style: "ulysses" or "ring".

    Returns:
        What the model's layers call.

    Raises:
        ValueError: If the style is unknown, needs another backend, or the heads cannot be dealt out.
    """
    if style not in STYLES:
        raise ValueError(f"`style` must be one of {STYLES}; got {style!r}.")
    size = dist.get_world_size(group)
    layers = [m for m in model.modules() if hasattr(m, "context_parallel") and hasattr(m, "log_forget_gate")]
    if not layers:
        raise ValueError(f"`model` must be a FoX model; got {type(model).__name__}, which has no layer of FoX.")
    for layer in layers:
        heads = layer.q_proj.out_features // layer.head_dim
        if style == "ulysses" and heads % size:
            raise ValueError(
                f"`style='ulysses'` deals {heads} heads out to {size} processes: that must go evenly. Take a divisor "
                "of `num_attention_heads` processes, or `style='ring'`."
            )
    if style == "ring" and layers[0].config._attn_implementation != "fox_acp":
        raise ValueError(
            f"`style='ring'` needs attn_implementation 'fox_acp'; got {layers[0].config._attn_implementation!r}. "
            "Use 'ulysses', which works with every backend."
        )
    context = ContextParallel(dist.group.WORLD if group is None else group, style)
    for module in [*layers, *(m for m in model.modules() if hasattr(m, "embed_tokens"))]:
        module.context_parallel = context
    return context


class ContextParallel:
    """What crosses the borders of the processes of a group; see `enable_context_parallel`.

    Args:
        group: Process group.
        style: "ulysses" or "ring".
    """

    def __init__(self, group, style: str = "ulysses"):
        self.group, self.style = group, style
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.hops_skipped = self.hops = 0
        """Of the ring, since the start: chunks of keys that need not be sent to this process, and all before it."""

    def local(self, batch: dict[str, torch.Tensor], ignore_index: int = -100) -> dict[str, torch.Tensor]:
        """This process's part of a batch of whole rows, labels shifted.

        Args:
            batch: `input_ids`, and if there are `position_ids` and `labels`, all `(B, T)`. T is filled up to a
                multiple of the processes, behind the end, where nothing looks.

        Returns:
            The same with `(B, t)`, and with `shift_labels` beside `labels`.
        """
        length = batch["input_ids"].shape[1]
        missing = -length % self.size
        part = slice(self.rank * (length + missing) // self.size, (self.rank + 1) * (length + missing) // self.size)
        fill = torch.nn.functional.pad
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=batch["input_ids"].device).expand_as(batch["input_ids"])
        found = {"input_ids": fill(batch["input_ids"], (0, missing))[:, part]}
        # Padding goes on counting: it belongs to the last document.
        extra = positions[:, -1:] + torch.arange(1, missing + 1, device=positions.device)
        found["position_ids"] = torch.cat([positions, extra], dim=1)[:, part]
        if batch.get("labels") is not None:
            shifted = fill(batch["labels"][:, 1:], (0, 1 + missing), value=ignore_index)
            found["labels"] = found["shift_labels"] = shifted[:, part].contiguous()
        return {name: value.contiguous() for name, value in found.items()}

    def make_masks(
        self, config, inputs_embeds, attention_mask, position_ids, past_key_values
    ) -> tuple[dict, torch.Tensor]:
        """Like `masks_fox.make_masks` of the whole rows, and the `(B, t)` positions of this process.

        Raises:
            ValueError: If there is padding or a cache.
        """
        if attention_mask is not None:
            raise ValueError(
                "`attention_mask` must be None in context parallelism; got a mask. Pack documents into rows by "
                "`position_ids` instead of padding them."
            )
        if past_key_values is not None:
            raise ValueError("`use_cache` must be False in context parallelism, which is for training; got a cache.")
        batch, num_tokens = inputs_embeds.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(num_tokens, device=inputs_embeds.device) + self.rank * num_tokens
            position_ids = position_ids[None]
        position_ids = position_ids.expand(batch, -1).contiguous()
        whole = self.all_gather(position_ids, dim=1)
        # Only shape, dtype and device of the embeddings are looked at.
        stand_in = inputs_embeds.new_empty(1).expand(batch, whole.shape[1], 1)
        masks = make_masks(config, stand_in, None, whole, None)
        starts = masks["document_starts"]
        masks["whole_document_starts"] = starts
        if starts is not None:
            masks["document_starts"] = starts[:, self.rank * num_tokens : (self.rank + 1) * num_tokens]
        return masks, position_ids

    def previous_token(self, projection: torch.Tensor) -> torch.Tensor:
        """The last token of the process before this one, `(B, 1, H_kv, D)` of `(B, t, H_kv, D)`; zeros on the first.

        Also there it comes out of the collective, or that process would be missing in the backward pass.
        """
        last = gather_with_gradient(projection[:, -1:], self.group, self.size)
        return last[self.rank - 1] * float(self.rank > 0)

    def attend(
        self, interface: Callable, module, query, key, value, attention_mask, *, log_fgate, scaling,
        document_starts=None, whole_document_starts=None, **kwargs,
    ):  # fmt: skip
        """Attention of this process's queries to all tokens before them.

        Args:
            interface: Backend of one process.
            query: `(B, H, t, D)`; key and value `(B, H_kv, t, D)`, log_fgate `(B, H, t)`.
            attention_mask: That of the whole rows.

        Returns:
            `(B, t, H, D)`, and None: no backend gives the weights of a part.
        """
        if self.style == "ring":
            return self._ring(module, query, key, value, log_fgate, scaling, whole_document_starts), None
        heads = query.shape[1]
        key, value = (repeat_for_all(x, self.size) for x in (key, value))
        query, key, value = self._deal_out([query, key, value])
        (gates,) = self._deal_out([log_fgate.unsqueeze(-1)])
        out, _ = interface(
            HeadsOfOne(module, heads, self), query, key, value, attention_mask, log_fgate=gates.squeeze(-1),
            scaling=scaling, document_starts=whole_document_starts, **kwargs,
        )  # fmt: skip
        return self._collect(out), None

    def _deal_out(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """`(B, n, t, D)` of all heads to `(B, n / P, T, D)` of all tokens, in one all-to-all."""
        batch, _, num_tokens, dim = tensors[0].shape
        parts = [x.reshape(batch, self.size, -1, num_tokens, dim) for x in tensors]
        counts = [x.shape[2] for x in parts]
        sent = torch.cat(parts, dim=2).transpose(0, 1)  # (P, B, heads, t, D)
        received = all_to_all(sent, self.group)
        whole = received.permute(1, 2, 0, 3, 4).reshape(batch, sum(counts), self.size * num_tokens, dim)
        return list(whole.split(counts, dim=1))

    def _collect(self, out: torch.Tensor) -> torch.Tensor:
        """`(B, T, H / P, D)` back to `(B, t, H, D)`."""
        batch, length, heads, dim = out.shape
        sent = out.reshape(batch, self.size, length // self.size, heads, dim).transpose(0, 1)
        received = all_to_all(sent, self.group)  # (P, B, t, heads, D)
        return received.permute(1, 2, 0, 3, 4).reshape(batch, length // self.size, self.size * heads, dim)

    def _ring(self, module, query, key, value, log_fgate, scaling, starts) -> torch.Tensor:
        """Attention to the chunks of keys that this process's queries still see."""
        from .attention_fox import forgetting_attention

        num_tokens = query.shape[2]
        if starts is not None:
            own = starts[:, None, self.rank * num_tokens : (self.rank + 1) * num_tokens]
            log_fgate = log_fgate.masked_fill(own, float("-inf"))
        tolerance = module.config.log_pruning_tolerance
        bound, first = self._view(module, query, key, log_fgate, scaling, tolerance)
        keys_values = torch.stack((key, value))
        keys_values, gates = Window.apply(keys_values, log_fgate, self.group, self.rank, first)
        num_keys = gates.shape[-1]
        whole = self.size * num_tokens
        sink = getattr(module, "pruning_sink", None)
        # What a row may lose is shared out evenly among all keys of the row: so many of them are looked at here, and
        # the threshold on the gates is then the same as in one process.
        lost = None if tolerance is None else tolerance + math.log(num_keys / whole)
        out = forgetting_attention(
            query, keys_values[0], keys_values[1], gates, scale=scaling, log_pruning_tolerance=lost,
            pruning_rule=module.config.pruning_rule, logit_bound=bound, return_stats=sink is not None,
        )  # fmt: skip
        if sink is not None:
            out, stats = out
            self._report(sink, stats, starts, num_tokens, num_keys, tolerance)
        return out.transpose(1, 2)

    @torch.no_grad()
    def _view(self, module, query, key, log_fgate, scaling, tolerance) -> tuple[torch.Tensor | None, list[int]]:
        """The bound on scores `(B, H)`, and for each process the first one whose keys its queries see.

        The largest decay from chunk s to chunk r is that from the last key of s to the first query of r: the gate of
        that query and all gates of the chunks between. One look at the device a layer.
        """
        bound, groups = None, query.shape[1] // key.shape[1]
        numbers = [log_fgate[..., 0], log_fgate.sum(-1)]
        if tolerance is not None:
            bound = module.logit_bound(query.shape[1], query.dtype)
            if bound is None:
                norms = [x.float().norm(dim=-1).amax(-1) for x in (query, key)]
                numbers += [norms[0], norms[1].repeat_interleave(groups, dim=1)]
            else:
                bound = bound.expand(query.shape[:2])
        # (P, 2 or 4, B, H), the same on every process, so that all come to the same decision.
        told = self.all_gather(torch.stack([x.float() for x in numbers])[None], dim=0)
        if len(numbers) == 4:
            bound = abs(scaling) * told[:, 2].amax(0) * told[:, 3].amax(0)
        threshold = float("-inf")
        if tolerance is not None:
            threshold = -2 * bound - math.log(self.size * query.shape[2]) + tolerance
        first_gate, total = told[:, 0].double(), told[:, 1].double()
        seen = []
        for r in range(1, self.size):
            decay = first_gate[r].clone()
            for s in range(r - 1, -1, -1):
                # A closed gate, the start of a document, is -inf: nothing before it is seen.
                seen.append(((decay >= threshold) & (decay > -1e4)).any())
                decay += total[s]
        seen = torch.stack(seen).tolist()
        first = [0]
        for r in range(1, self.size):
            row, seen = seen[:r], seen[r:]  # of the processes r - 1, r - 2, ..., 0
            first.append(r - (row.index(False) if False in row else r))
        self.hops += self.rank
        self.hops_skipped += first[self.rank]
        return bound, first

    def _report(self, sink, stats, starts, num_tokens: int, num_keys: int, tolerance) -> None:
        """Pruning statistics of whole rows, from those of the chunks that were looked at."""
        device = stats.pruned_fraction.device
        position = torch.arange(self.size * num_tokens, device=device)
        start = torch.zeros_like(position)[None] if starts is None else (position * starts).cummax(-1).values
        own = slice(self.rank * num_tokens, (self.rank + 1) * num_tokens)
        visible = (position - start + 1)[:, own]
        looked_at = (position - start.clamp(min=own.stop - num_keys) + 1)[:, own]
        pruned = stats.pruned_fraction * looked_at.sum() + (visible - looked_at).sum()
        skipped = 0.0 if tolerance is None else math.exp(tolerance) * (1 - num_keys / (self.size * num_tokens))
        told = torch.stack((pruned, visible.sum().expand_as(pruned).to(pruned), stats.lost_mass_bound + skipped))
        told = self.all_gather(told[None], dim=0)
        sink(told[:, 0].sum(0) / told[:, 1].sum(0), told[:, 2].amax(0))

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`x` of all processes one after the other, without gradient."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)


class HeadsOfOne:
    """What a backend asks its module, for the heads that this process has after the all-to-all."""

    def __init__(self, module, num_heads: int, context: ContextParallel):
        self.config, self.training = module.config, module.training
        self._module, self._heads, self._context = module, num_heads, context
        self.pruning_sink = None if module.pruning_sink is None else self._report

    def logit_bound(self, num_heads: int, dtype: torch.dtype) -> torch.Tensor | None:
        """As `FoxAttention.logit_bound`, of the heads of this process."""
        bound = self._module.logit_bound(self._heads, dtype)
        return None if bound is None else bound[self._context.rank * num_heads :][:num_heads]

    def _report(self, pruned_fraction, lost_mass_bound):
        both = torch.stack((pruned_fraction, lost_mass_bound))
        self._module.pruning_sink(*self._context.all_gather(both, dim=1))


def repeat_for_all(states: torch.Tensor, size: int) -> torch.Tensor:
    """Copy key heads until they can be dealt out to `size` processes."""
    return states.repeat_interleave(size // math.gcd(states.shape[1], size), dim=1)


def all_to_all(x: torch.Tensor, group) -> torch.Tensor:
    """Row i of `(P, ...)` goes to process i; row i of the result comes from it. Differentiable."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

    received = all_to_all_single_autograd(x.contiguous(), None, None, group)
    return wait_tensor(received)


def gather_with_gradient(x: torch.Tensor, group, size: int) -> torch.Tensor:
    """`x` of every process, `(P, ...)`; its gradient is the sum of what all processes make of it."""
    return AllGather.apply(x, group, size)


class AllGather(torch.autograd.Function):
    """For small tensors: the gradients are gathered too and added up here, which every backend can do."""

    @staticmethod
    def forward(ctx, x, group, size):
        ctx.group, ctx.size = group, size
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        parts = [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(ctx.size)]
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        return torch.stack(parts)[:, dist.get_rank(ctx.group)].sum(0), None, None


class Window(torch.autograd.Function):
    """Keys and values `(2, B, H_kv, t, D)` and gates `(B, H, t)` to those of the processes first[r] to r.

    Backward, the gradients go back the same ways and are added up.
    """

    @staticmethod
    def forward(ctx, keys_values, gates, group, rank, first):
        ctx.group, ctx.rank, ctx.first = group, rank, first
        parts = [[torch.empty_like(x, memory_format=torch.contiguous_format) for x in (keys_values, gates)]
                 for _ in range(first[rank], rank)]  # fmt: skip
        own = [keys_values.contiguous(), gates.contiguous()]
        readers = [r for r in range(rank + 1, len(first)) if first[r] <= rank]
        exchange(group, dict.fromkeys(readers, own), dict(zip(range(first[rank], rank), parts, strict=True)))
        columns = zip(*parts, own, strict=True)
        return tuple(torch.cat(column, dim=dim) for column, dim in zip(columns, (3, 2), strict=True))

    @staticmethod
    def backward(ctx, grad_keys_values, grad_gates):
        rank, first = ctx.rank, ctx.first
        count = rank - first[rank] + 1
        chunks = [
            [x.contiguous() for x in grad.chunk(count, dim=dim)]
            for grad, dim in ((grad_keys_values, 3), (grad_gates, 2))
        ]
        pairs = list(zip(*chunks, strict=True))
        readers = [r for r in range(rank + 1, len(first)) if first[r] <= rank]
        received = {r: [torch.empty_like(x) for x in pairs[-1]] for r in readers}
        exchange(ctx.group, dict(zip(range(first[rank], rank), pairs, strict=False)), received)
        sums = [x.clone() for x in pairs[-1]]
        for r in readers:
            for total, part in zip(sums, received[r], strict=True):
                total += part
        return (*sums, None, None, None)


def exchange(group, sent: dict[int, list[torch.Tensor]], received: dict[int, list[torch.Tensor]]) -> None:
    """Send each rank of the group its tensors and fill those expected of others, all at once."""

    def world(rank):
        return dist.get_global_rank(group, rank)

    steps = [dist.P2POp(dist.isend, x, world(r), group) for r, tensors in sent.items() for x in tensors]
    steps += [dist.P2POp(dist.irecv, x, world(r), group) for r, tensors in received.items() for x in tensors]
    for work in dist.batch_isend_irecv(steps) if steps else ():
        work.wait()


__all__ = ["STYLES", "ContextParallel", "enable_context_parallel"]
