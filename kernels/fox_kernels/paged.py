"""Keys and values of a sequence that never ends, in pages that go back to a pool once their head has forgotten them.

Every key head of every layer and sequence has its own live range: from its first page that is not forgotten to the
newest key. Page n holds the keys [n * page, (n + 1) * page). With U at least every `|scale * q . k|` of a query head,
those to come included, and lam its running sum of gates, a prefix of the keys goes for good as soon as

    log sum_{j in prefix} exp(lam_i - lam_j)  <=  log eps - 2 U        for all query heads that share the keys

at some time i. The sum runs over all that went before as well and lam never grows, so the prefix never holds more than
eps of any later row: kernels/README.md has the theorem. Nothing here asks the device anything within a page.

Letters:  L layers, B batch, H query heads, H_kv key heads, G query heads per key head, T new tokens, S tokens so far,
    P pages of the pool, C columns of the table (a power of 2; page n of a sequence is in column n mod C), D head dim.
Units:    bits in `within`, `starts` and `totals`, as the kernels read them; nats everywhere else.
"""

import math
from functools import wraps
from typing import NamedTuple

import torch

from .gates import LOG2_E

try:
    from . import triton_paged
except ImportError:  # no Triton: paged_attention.py gives the reason when a CUDA tensor comes
    triton_paged = None

# exp(-9000) is 0 in every format: a gate below is stored as this, so that the sums stay finite.
LOWEST_GATE = -9000.0
MAX_STEP = 16
# Of the bound, in nats: float64 sums and logarithms, and lam in two floats, see kernels/README.md.
ROUNDING = 1e-3
# Beyond it two floats no longer hold lam to ROUNDING.
LARGEST_SUM_BITS = 2.0**37
# Numbers of one temporary tensor of `evict`; more layers are looked at one after another.
LARGEST_LOOK = 2**22
LN_2 = math.log(2.0)


def outside_of_autograd(function):
    """Without a graph; and not in inference mode, whose tensors could not be written to outside of it."""

    @wraps(function)
    def plain(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return plain


class Prefixes(NamedTuple):
    """What dropping the live pages of a head up to each of them would cost, of some layers.

    Attributes:
        mass: `(L, B, H_kv, pages, G)` float64 nats, log of the sum of exp(lam_now - lam) up to the end of the page and
            over all that went before.
        excess: `(L, B, H_kv, pages)` float64 nats, how far that is above what eps allows for the worst head of a
            group; -inf for pages that went before, inf for one that is not full.
        is_live: Same shape, bool: pages that can be dropped.
    """

    layers: slice
    mass: torch.Tensor
    excess: torch.Tensor
    is_live: torch.Tensor


class PagedKeys:
    """Cache of L layers on one device; see the top of the file. Works in place and keeps no graph.

    Attributes:
        keys, values: The pool, `(P, page, D)`.
        within: `(P, 2, G, page)` float32 bits, sum of the gates from the start of the page, high and low part.
        starts: `(P, 2, G)` float32 bits, sum of all gates before the page.
        masses: `(P, G)` float64 nats, log of the sum of exp(-within) over a page, once it is full.
        table: `(L, B, H_kv, C)` int32, numbers of pages.
        first_key: `(L, B, H_kv)` int32, where the live range starts.
        totals: `(L, B, H)` float64 bits, lam of the newest key.
        lengths: `(L,)` int32, S as the kernels read it; `num_keys` is the same for Python.
        evicted: `(L, B, H)` float64 nats, log of the sum of exp(lam_at - lam) over all that was dropped.
        evicted_at: `(L, B, H)` float64 bits, that lam_at. Only differences of lam are taken: they lose nothing.
        worst: `(L, B, H)` float64 nats, the largest that the log of the sum of exp(lam_now - lam) was at any drop.
        key_start: `(B,)` int32, what lies before is padding or another episode; None if nothing does.

    Args:
        page_size: Keys of a page, a power of 2, at least 16. A head drops whole pages and never its newest one.
        log_tolerance: log eps, negative.
        max_pages: Pages of the pool at most. Where it would need more, the most decayed go first and `worst` says what
            that may cost. Default: None, no limit.

    Raises:
        ValueError: If an argument is not one of the above.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        page_size: int = 64,
        log_tolerance: float = -10.0,
        max_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if page_size < 16 or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of 2 and at least 16; got {page_size}. 64 suits most models.")
        if not log_tolerance < 0.0:
            raise ValueError(
                f"log_tolerance is the log of a probability and must be negative; got {log_tolerance}. For 4.5e-5 "
                "pass -10.0."
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide the {num_heads} query heads; got {num_kv_heads}. As many query heads "
                "share each key head."
            )
        self.page_size, self.log_tolerance, self.max_pages = page_size, float(log_tolerance), max_pages
        self.num_layers, self.batch, self.num_heads, self.num_kv_heads = num_layers, batch, num_heads, num_kv_heads
        self.groups, self.head_dim = num_heads // num_kv_heads, head_dim
        # With its index: "cuda" is not equal to the "cuda:0" of the tensors to come.
        self.device = torch.empty(0, device="cpu" if device is None else device).device
        pool = {"device": self.device, "dtype": dtype}
        self.keys = torch.empty(0, page_size, head_dim, **pool)
        self.values = torch.empty(0, page_size, head_dim, **pool)
        self.within = torch.empty(0, 2, self.groups, page_size, device=self.device)
        self.starts = torch.empty(0, 2, self.groups, device=self.device)
        per_head = {"dtype": torch.float64, "device": self.device}
        self.masses = torch.empty(0, self.groups, **per_head)
        heads, kv_heads = (num_layers, batch, num_heads), (num_layers, batch, num_kv_heads)
        self.table = torch.zeros(*kv_heads, 2, dtype=torch.int32, device=self.device)
        self.first_key = torch.zeros(kv_heads, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(num_layers, dtype=torch.int32, device=self.device)
        self.totals = torch.zeros(heads, **per_head)
        self.evicted = torch.full(heads, -torch.inf, **per_head)
        self.evicted_at = torch.zeros(heads, **per_head)
        self.worst = torch.full(heads, -torch.inf, **per_head)
        self.logit_bound = torch.full((num_layers, num_heads), torch.inf, **per_head)
        self.key_start: torch.Tensor | None = None
        self._page_bytes: int | None = None
        self.free = torch.empty(0, dtype=torch.int32, device=self.device)
        # What Python knows without asking the device.
        self.is_bounded = [False] * num_layers
        self.num_keys = [0] * num_layers
        self.pages_end = [0] * num_layers
        self.full_pages = [0] * num_layers
        self.most_live = [0] * num_layers
        self.opened: list[torch.Tensor | None] = [None] * num_layers  # lam before the newest page, for single keys
        self.is_whole = True  # False while keys are added, and from then on if that was interrupted
        self.changes = 0  # grows whenever pages come or go
        self.looked_up = {}  # of paged_attention.py: where the live keys of a layer are, as of `changes`
        self.committed = [0] * num_layers  # keys that there were when something was dropped

    def set_logit_bound(self, layer: int, bound: torch.Tensor) -> None:
        """U of the query heads of a layer, `(H,)` nats, before its first key."""
        self.logit_bound[layer] = bound.to(self.logit_bound)
        self.is_bounded[layer] = True

    def check_whole(self) -> None:
        """Raise a ValueError after a call that ran out of memory, or was interrupted, in the middle of its changes."""
        if not self.is_whole:
            raise ValueError("cache must be whole; got one whose change was interrupted. Start a new cache.")

    # -- Appending ----------------------------------------------------------------------------------------------------

    @outside_of_autograd
    def make_room(self, layer: int, num_new: int, may_evict: bool = True) -> None:
        """Look for what can be dropped and allocate, if the next `num_new` keys of `layer` begin another page.

        Layers that stand at the same key are served with it: the others then find nothing to do.
        """
        end = -(-(self.num_keys[layer] + num_new) // self.page_size)
        begin = self.pages_end[layer]
        if end <= begin:
            return
        if may_evict and self.num_keys[layer]:
            self.evict(only=layer)
        state = (self.num_keys[layer], begin)
        together = [layer] if state == (0, 0) else []
        together = together or [x for x in range(self.num_layers) if (self.num_keys[x], self.pages_end[x]) == state]
        shape = (len(together), self.batch, self.num_kv_heads, end - begin)
        pages = self.take(math.prod(shape)).view(shape)
        self.fit_table(max(self.most_live[x] for x in together) + end - begin)
        columns = torch.arange(begin, end, device=self.device) % self.table.shape[-1]
        layers = torch.tensor(together, device=self.device)[:, None]
        self.table[layers, :, :, columns] = pages.permute(0, 3, 1, 2)
        self.changes += 1
        for x in together:
            self.pages_end[x] = end
            self.most_live[x] += end - begin

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, log_fgate: torch.Tensor) -> None:
        """Add up to 16 keys and values, `(B, H_kv, T, D)`, and their gates, `(B, H, T)` float32 nats.

        On a GPU it is one kernel; `make_room` must have come before it.
        """
        num_new = k.shape[2]
        self.lengths[layer].add_(num_new)
        begin = self.num_keys[layer]
        self.num_keys[layer] = begin + num_new
        if self.device.type == "cuda":
            triton_paged.append(
                k, v, log_fgate, self.keys, self.values, self.within, self.starts, self.totals[layer],
                self.table[layer], self.lengths[layer],
            )  # fmt: skip
        elif num_new == 1:
            self._append_one(layer, begin, k, v, log_fgate)
        else:
            lam = self._lam(layer, log_fgate)
            self._write(layer, begin, k, v, lam)
            self.totals[layer] = lam[..., -1]

    def _append_one(self, layer, begin, k, v, log_fgate):
        """As `_write`, with fewer calls: on a CPU they are what a short step takes."""
        slot, number = begin % self.page_size, begin // self.page_size
        pages = self.table[layer, ..., number % self.table.shape[-1]].long()  # (B, H_kv)
        total, start = self.totals[layer], self.opened[layer]
        if slot == 0:
            start = total.clone()
            self.starts[pages] = in_two(start.view(*pages.shape, -1)).movedim(0, 2)
        elif start is None:
            start = self.starts[pages].double().sum(dim=2).flatten(1)
        self.opened[layer] = start
        total.add_(log_fgate[..., 0].clamp(min=LOWEST_GATE), alpha=LOG2_E)
        within = (total - start).view(*pages.shape, -1)
        self.within[pages, :, :, slot] = in_two(within).movedim(0, 2)
        self.keys[pages, slot] = k[:, :, 0]
        self.values[pages, slot] = v[:, :, 0]

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, log_fgate: torch.Tensor, may_evict: bool = True
    ) -> None:
        """Add any number of keys, as `append`; of the new pages only those are kept that still matter at the end."""
        begin, size = self.num_keys[layer], self.page_size
        first_new = self.pages_end[layer]
        self.changes += 1
        end = begin + k.shape[2]
        lam = self._lam(layer, log_fgate)
        # What fits the last page goes there.
        room = min(first_new * size, end) - begin
        if room:
            self._write(layer, begin, k[:, :, :room], v[:, :, :room], lam[..., :room])
        before = lam[..., room - 1] if room else self.totals[layer].clone()
        self.num_keys[layer], self.totals[layer] = end, lam[..., -1]
        self.lengths[layer] = end
        new = -(-end // size) - first_new
        if new <= 0:
            return
        # The others form pages that are not in the pool yet: (B, H_kv, pages, G, page).
        missing = new * size - (end - begin - room)
        lam = torch.cat((lam[..., room:], lam[..., -1:].expand(-1, -1, missing)), dim=-1)
        lam = lam.view(self.batch, self.num_kv_heads, self.groups, new, size).transpose(2, 3)
        before = before.view(self.batch, self.num_kv_heads, 1, self.groups)
        starts = torch.cat((before, lam[:, :, :-1, :, -1]), dim=2)
        within = lam - starts[..., None]
        masses = within.mul(-LN_2).logsumexp(dim=-1)
        if may_evict:
            decay = (lam[:, :, -1:, :, -1] - starts) * LN_2
            self.evict(math.prod(masses.shape[:3]), (layer, first_new, masses + decay))
        page = torch.arange(first_new, first_new + new, device=self.device)
        kept = page >= (self.first_key[layer] // size)[..., None]  # (B, H_kv, pages)
        pages = self.take(int(kept.sum()))
        first = int(self.first_key[layer].amin()) // size
        self.most_live[layer] = first_new + new - first
        self.fit_table(self.most_live[layer])
        # Columns of pages that were not kept may be in use by a live page of the same head.
        batch, head, number = kept.nonzero(as_tuple=True)
        self.table[layer, batch, head, page[number] % self.table.shape[-1]] = pages
        pages = pages.long()
        for pool, x in ((self.keys, k), (self.values, v)):
            padded = torch.cat((x[:, :, room:], x.new_zeros(*x.shape[:2], missing, x.shape[-1])), dim=2)
            pool[pages] = padded.unflatten(2, (new, size))[kept].to(pool.dtype)
        self.within[pages] = in_two(within[kept]).transpose(0, 1)
        self.starts[pages] = in_two(starts[kept]).transpose(0, 1)
        self.masses[pages] = masses[kept]
        self.pages_end[layer] = first_new + new
        self._weigh(slice(layer, layer + 1), min(first_new, end // size))
        self.full_pages[layer] = end // size

    def _lam(self, layer, log_fgate) -> torch.Tensor:
        """lam of new keys, `(B, H, T)` float64 bits."""
        gates = log_fgate.clamp(min=LOWEST_GATE).double().mul_(LOG2_E)
        gates[..., 0] += self.totals[layer]
        return gates.cumsum(dim=-1)

    def pages(self, layers: int | slice, page: torch.Tensor) -> torch.Tensor:
        """Where in the pool the pages `page` of all heads are, `(..., B, H_kv, len(page))` int64."""
        return self.table[layers][..., page % self.table.shape[-1]].long()

    def _write(self, layer, begin, k, v, lam):
        """Keys that have a page."""
        self.opened[layer] = None
        position = torch.arange(begin, begin + k.shape[2], device=self.device)
        slot = position % self.page_size
        pages = self.pages(layer, position // self.page_size)  # (B, H_kv, T)
        grouped = lam.unflatten(1, (self.num_kv_heads, self.groups))
        # What opens a page notes lam before it.
        for t in range(-begin % self.page_size, k.shape[2], self.page_size):
            before = grouped[..., t - 1] if t else self.totals[layer].view_as(grouped[..., 0])
            self.starts[pages[..., t]] = in_two(before).movedim(0, 2)
        self.keys[pages, slot] = k.to(self.keys.dtype)
        self.values[pages, slot] = v.to(self.values.dtype)
        within = grouped.transpose(2, 3) - self.starts[pages].double().sum(dim=-2)  # (B, H_kv, T, G)
        self.within[pages, :, :, slot] = in_two(within).movedim(0, 3)

    # -- Going back and changing places -------------------------------------------------------------------------------

    @outside_of_autograd
    def crop(self, layer: int, num_keys: int) -> None:
        """Forget the newest keys of a layer but the first `num_keys`; their pages stay reserved for what comes next.

        Raises:
            ValueError: If something was dropped for queries after `num_keys`: it could matter to earlier ones.
        """
        if num_keys == self.num_keys[layer]:
            return
        if num_keys < self.committed[layer]:
            raise ValueError(
                f"num_keys must be at least {self.committed[layer]}, where keys were dropped for good; got "
                f"{num_keys}. Call activate_past_recording() on the cache before the tokens that may be removed, or "
                "use DynamicCache(config=model.config)."
            )
        self.changes += 1
        self.opened[layer] = None
        self.num_keys[layer] = num_keys
        self.lengths[layer] = num_keys
        self.full_pages[layer] = min(self.full_pages[layer], num_keys // self.page_size)
        self.totals[layer] = 0.0
        if num_keys:
            last = torch.tensor([(num_keys - 1) // self.page_size], device=self.device)
            at = self.pages(layer, last)[..., 0]
            within = self.within[at, :, :, (num_keys - 1) % self.page_size]
            self.totals[layer] = (self.starts[at].double() + within.double()).sum(dim=-2).flatten(1)

    @outside_of_autograd
    def take_sequences(self, index: torch.Tensor) -> None:
        """Sequence b becomes the old sequence `index[b]`, `(new B,)` int64. Full pages are shared, not copied."""
        self.check_whole()
        index, self.is_whole = index.to(self.device), False
        for name in ("table", "first_key", "totals", "evicted", "evicted_at", "worst"):
            setattr(self, name, getattr(self, name).index_select(1, index))
        if self.key_start is not None:
            self.key_start = self.key_start.index_select(0, index)
        self.batch, self.opened = len(index), [None] * self.num_layers
        self.changes += 1
        self._find_free()
        # A page that is still written to must be its sequence's own.
        position = torch.arange(self.batch, device=self.device)
        earlier = (index[:, None] == index) & (position[:, None] > position)
        copies = earlier.any(dim=1).nonzero().flatten()
        for layer in range(self.num_layers):
            first, end = self.num_keys[layer] // self.page_size, self.pages_end[layer]
            if first == end or not len(copies):
                continue
            columns = torch.arange(first, end, device=self.device) % self.table.shape[-1]
            old = self.table[layer, copies][..., columns]
            new = self.take(old.numel()).view_as(old)
            for name in ("keys", "values", "within", "starts", "masses"):
                pool = getattr(self, name)
                pool[new.long()] = pool[old.long()]
            self.table[layer, copies[:, None], :, columns] = new.transpose(1, 2)
        self.is_whole = True

    @outside_of_autograd
    def start_over(self, which: torch.Tensor) -> None:
        """The next key of the sequences `which`, `(B,)` bool, sees nothing before it."""
        which = which.to(self.device)
        self.changes += 1
        start = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        start = start if self.key_start is None else self.key_start
        self.key_start = torch.where(which, max(self.num_keys), start).int()
        self.evicted = self.evicted.masked_fill(which[:, None], -torch.inf)

    # -- The pool -----------------------------------------------------------------------------------------------------

    def take(self, count: int) -> torch.Tensor:
        """Numbers of `count` pages, `(count,)` int32, that are nobody's.

        Raises:
            ValueError: If `max_pages` are not enough for what may not be dropped.
            torch.OutOfMemoryError: If the pool has to grow and the device has no room for it; nothing is lost then.
        """
        if len(self.free) < count:
            # A sixteenth more than is needed: less is copied too often, more is memory for nothing.
            needed = len(self.keys) - len(self.free) + count
            larger = needed + needed // 16
            self._grow(larger if self.max_pages is None else min(larger, self.max_pages))
        for _ in range(8):
            # Sequences that share pages free less than they drop: look again.
            if len(self.free) >= count or not self.evict(count):
                break
        if len(self.free) < count:
            raise ValueError(
                f"max_pages (max_cache_bytes of a model's cache) must be enough for the newest page of every head; "
                f"got {self.max_pages}, of which {len(self.free)} are free where {count} are needed. Allow more "
                "memory, or fewer sequences."
            )
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def _grow(self, num_pages):
        old = len(self.keys)
        if num_pages <= old:
            return
        try:
            # One after another, so that no two are there twice; the keys, by which pages are counted, last.
            for name in ("starts", "within", "masses", "values", "keys"):
                tensor = getattr(self, name)
                # Not empty: 0 times what stood there before could be NaN.
                grown = tensor.new_zeros(num_pages, *tensor.shape[1:])
                grown[:old] = tensor[:old]
                setattr(self, name, grown)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the pool cannot grow from {old} to {num_pages} pages of {self.page_bytes()} bytes. Pass "
                "max_cache_bytes to drop the most decayed keys instead, or take fewer sequences."
            ) from error
        fresh = torch.arange(old, num_pages, dtype=torch.int32, device=self.device)
        self.free = torch.cat((self.free, fresh))

    def fit_table(self, most_live: int) -> None:
        """Give the table so many columns that the live pages of no head meet."""
        columns, old = self.table.shape[-1], self.table
        if most_live <= columns:
            return
        while columns < most_live:
            columns *= 2
        self.table = old.new_zeros(*old.shape[:-1], columns)
        # A column of the old table is that page of the live range which is congruent to it.
        first = (self.first_key // self.page_size)[..., None]
        page = first + torch.arange(old.shape[-1], dtype=torch.int32, device=self.device)
        self.table.scatter_(-1, (page % columns).long(), old.gather(-1, (page % old.shape[-1]).long()))

    def page_bytes(self) -> int:
        """Bytes of one page: keys, values and decays."""
        if self._page_bytes is None:
            pools = (self.keys, self.values, self.within, self.starts, self.masses)
            self._page_bytes = sum(math.prod(x.shape[1:]) * x.element_size() for x in pools)
        return self._page_bytes

    def memory_bytes(self) -> int:
        """Bytes held: the pool, used or not, and the tables."""
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, torch.Tensor))

    def live_keys(self) -> torch.Tensor:
        """Keys of the live range of every head, `(L, B, H_kv)` int32."""
        return self.lengths[:, None, None] - self.first_key

    def dropped_mass(self, layers: int | slice = slice(None)) -> torch.Tensor:
        """Log of the sum of exp(lam_now - lam) over all that was dropped, `(..., B, H)` float64 nats."""
        return self.evicted[layers] + (self.totals[layers] - self.evicted_at[layers]) * LN_2

    def _find_free(self) -> None:
        """What no table names is free, however many name the rest."""
        num_pages = len(self.keys)
        used = torch.zeros(num_pages + 1, dtype=torch.bool, device=self.device)
        for layers in self._alike():
            first = (self.first_key[layers] // self.page_size)[..., None]
            page = first + torch.arange(max(self.most_live[layers]), device=self.device)
            at = self.table[layers].gather(-1, (page % self.table.shape[-1]).long()).long()
            used[at.masked_fill_(page >= self.pages_end[layers.start], num_pages)] = True
        self.free = (~used[:num_pages]).nonzero().flatten().int()

    # -- Forgetting ---------------------------------------------------------------------------------------------------

    @outside_of_autograd
    def evict(self, needed: int = 0, new: tuple[int, int, torch.Tensor] | None = None, only: int | None = None) -> int:
        """Drop the pages that can never matter again; returns their number.

        Args:
            only: Look at the layers that have as many keys as this one.
            needed: Pages for which there must be room. Where the proof does not give it, the pages go whose bound is
                smallest, and `worst` shows it. Without `max_pages` nothing is needed.
            new: Of a layer, keys that are not stored: (layer, their first page, log of the sum of exp(lam_now - lam)
                over each of their pages, `(B, H_kv, pages, G)` float64). Then only this layer is looked at, unless
                pages are short.
        """
        short = 0
        if self.max_pages is not None:
            short = needed - len(self.free) - (self.max_pages - len(self.keys))
        alone = None if new is None else new[0]
        layers = self._alike(alone) if new is None or short > 0 else [slice(alone, alone + 1)]
        parts = []
        for x in layers:
            is_new = alone is not None and x.start == alone
            if only is not None and self.num_keys[x.start] != self.num_keys[only]:
                continue
            if is_new or self.num_keys[x.start] >= self.page_size:
                parts.append(self._prefixes(x, *new[1:]) if is_new else self._prefixes(x))
        if not parts:
            return 0
        threshold = 0.0
        if short > 0:
            excess = torch.cat([x.excess[x.is_live] for x in parts])
            excess = excess[excess < torch.inf]
            if len(excess):
                threshold = max(0.0, float(excess.kthvalue(min(short, len(excess))).values))
        dropped = torch.stack([self._drop(x, threshold) for x in parts]).sum()
        numbers = torch.cat(
            (
                (self.first_key // self.page_size).amin(dim=(1, 2)).double(),
                torch.stack((dropped.double(), self.totals.amin())),
            )
        ).tolist()
        *first, dropped, lowest = numbers
        if lowest < -LARGEST_SUM_BITS:
            raise ValueError(
                f"the gates must add up to more than {-LARGEST_SUM_BITS * LN_2:.1e} nats; got {lowest * LN_2:.1e}. "
                "Start a new cache."
            )
        self.most_live = [max(0, end - int(page)) for end, page in zip(self.pages_end, first, strict=True)]
        self.changes += 1
        if dropped:
            for part in parts:
                self.committed[part.layers] = self.num_keys[part.layers]
            self._find_free()
        return int(dropped)

    def _alike(self, alone: int | None = None):
        """Neighboring layers that stand at the same key, as many as LARGEST_LOOK allows; `alone` by itself."""
        state = list(zip(self.num_keys, self.pages_end, self.full_pages, strict=True))
        begin = 0
        while begin < self.num_layers:
            end, most = begin + 1, self.most_live[begin]
            while end < self.num_layers and state[end] == state[begin] and alone not in (begin, end):
                most = max(most, self.most_live[end], 1)
                if (end + 1 - begin) * self.batch * self.num_heads * most > LARGEST_LOOK:
                    break
                end += 1
            if self.pages_end[begin] or alone == begin:
                yield slice(begin, end)
            begin = end

    def _prefixes(self, layers: slice, first_new: int | None = None, new: torch.Tensor | None = None) -> Prefixes:
        """See `Prefixes`; `new` are masses of pages from `first_new` on that are not in the pool yet."""
        size = self.page_size
        full = self.num_keys[layers.start] // size
        end = min(self.pages_end[layers.start], full)
        self._weigh(layers, end)
        # Heads that have fewer pages than others begin later.
        page = torch.arange(end - min(end, max(self.most_live[layers])), end, device=self.device)
        first = (self.first_key[layers] // size)[..., None]
        grouped = (self.num_kv_heads, self.groups)
        now = self.totals[layers].unflatten(-1, grouped)[..., None, :]
        at = self.pages(layers, page)
        mass = self.masses[at] + (now - self.starts[at].double().sum(dim=-2)) * LN_2
        if new is not None:
            page = torch.cat((page, torch.arange(first_new, first_new + new.shape[2], device=self.device)))
            mass = torch.cat((mass, new[None]), dim=-2)
        is_live = page >= first  # (L, B, H_kv, pages)
        hidden = ~is_live
        if self.key_start is not None:
            hidden = hidden | ((page + 1) * size <= self.key_start[:, None, None])
        mass = mass.masked_fill(hidden[..., None], -torch.inf)
        gone = self.dropped_mass(layers).unflatten(-1, grouped)[..., None, :]
        mass = torch.logaddexp(mass.logcumsumexp(dim=-2), gone)
        allowed = (self.log_tolerance - ROUNDING - 2.0 * self.logit_bound[layers]).unflatten(-1, grouped)
        # What is NaN is kept.
        excess = (mass - allowed[:, None, :, None, :]).amax(dim=-1).nan_to_num_(torch.inf, torch.inf, -torch.inf)
        excess = excess.masked_fill_(~is_live, -torch.inf).masked_fill_(page >= full, torch.inf)
        return Prefixes(layers, mass, excess, is_live & (page < full))

    def _weigh(self, layers: slice, full: int) -> None:
        """Log of the sum of exp(-within) of the pages that were filled since the last look."""
        begin = self.full_pages[layers.start]
        if begin >= full:
            return
        at = self.pages(layers, torch.arange(begin, full, device=self.device))
        within = self.within[at].double().sum(dim=-3)
        self.masses[at] = within.mul_(-LN_2).logsumexp(dim=-1)
        self.full_pages[layers] = [full] * len(self.full_pages[layers])

    def _drop(self, found: Prefixes, threshold: float) -> torch.Tensor:
        """Move the live ranges past all prefixes whose excess is at most `threshold`; how many pages, a tensor."""
        layers, mass, excess, is_live = found
        # It grows along the pages but for rounding; only what is a prefix goes.
        is_dropped = (excess <= threshold).cumprod(dim=-1, dtype=torch.int32)
        run = is_dropped.sum(dim=-1)[..., None, None]
        count = (is_dropped * is_live).sum(dim=-1, dtype=torch.int32)
        if not mass.shape[-2]:
            return count.sum()
        now = mass.gather(-2, (run - 1).clamp_(min=0).expand(*count.shape, 1, self.groups))
        now = now.masked_fill_(run == 0, -torch.inf).flatten(-3)
        self.evicted[layers] = torch.maximum(self.dropped_mass(layers), now)
        self.evicted_at[layers] = self.totals[layers]
        self.worst[layers] = torch.maximum(self.worst[layers], self.evicted[layers])
        self.first_key[layers] += count * self.page_size
        return count.sum()


def in_two(x: torch.Tensor) -> torch.Tensor:
    """A float64 tensor as float32 high and low parts, stacked in front."""
    high = x.float()
    return torch.stack((high, (x - high.double()).float()))
