"""The kernel in front of a decoding step over pages, against the same operations one after the other.

In the interpreter and on a GPU; `tests/test_eviction_step.py` holds the operations against the model.
"""

import pytest
import torch

from fox_kernels.paged import PagedKeys
from fox_kernels.paged_step import _plain, paged_step
from helpers import DEVICES

POOL = ("keys", "values", "within", "starts")


def products(heads, kv_heads, dim, batch, dtype, shared=False, shift=True, norm=True, gates="both"):
    """Cache of 15 tokens, a row of products for each of three more, columns and what stands beside them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    sizes = [heads * dim, kv_heads * dim, kv_heads * dim, kv_heads, kv_heads, heads]
    wanted = [True, True, True, shift, shift, gates in ("both", "logits")]
    columns, end = [], 0
    for size, is_wanted in zip(sizes, wanted, strict=True):
        columns.append(end if is_wanted else None)
        end += size * is_wanted
    parts = draw(3, batch, end + 5)
    if columns[5] is not None:  # gates from nearly closed to nearly open
        at = columns[5]
        parts[..., at : at + heads] = torch.linspace(-15.0, 12.0, 3 * batch * heads).view(3, batch, heads)
    past = [draw(batch, 1, kv_heads, dim) if shift else None for _ in range(2)]
    norms = [draw(*(() if shared else (count,)), dim) if norm else None for count in (heads, kv_heads)]
    bias = draw(heads) if gates in ("both", "bias") else None
    cache = PagedKeys(1, batch, heads, kv_heads, dim, page_size=16, dtype=dtype)
    cache.set_logit_bound(0, torch.full((heads,), 50.0))
    k, v = (draw(batch, kv_heads, 15, dim).to(dtype) for _ in range(2))
    cache.extend(0, k, v, -draw(batch, heads, 15).abs())
    beside = [None if x is None else x.to(dtype) for x in (*past, *norms)]
    return cache, parts.to(dtype), tuple(columns), sizes, (*beside, bias)


CASES = [
    pytest.param(dict(heads=2, kv_heads=2, dim=16), id="plain"),
    pytest.param(dict(heads=6, kv_heads=2, dim=24, shared=True, gates="logits"), id="groups-of-three"),
    pytest.param(dict(heads=2, kv_heads=1, dim=16, shift=False, norm=False, gates="bias"), id="bias-only"),
    pytest.param(dict(heads=2, kv_heads=1, dim=16, shift=False, gates="none"), id="open"),
]


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", CASES)
def test_the_kernel_writes_what_the_operations_write(shape, device, poisoned_memory):
    from fox_kernels import triton_step

    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        cache, rows, columns, sizes, beside = products(**shape, batch=2, dtype=dtype)
        for parts in rows:
            cache.make_room(0, 1)
            state = [getattr(cache, name).to(device, copy=True) for name in POOL]
            totals, table, lengths = (getattr(cache, x).to(device, copy=True) for x in ("totals", "table", "lengths"))
            moved = [None if x is None else x.to(device, copy=True) for x in beside]
            lengths += 1
            q = triton_step.prepare(
                parts.to(device), columns, *moved, 1e-6, *state, totals[0], table[0], lengths[0]
            )  # fmt: skip
            _plain(parts, cache, 0, columns, sizes, *beside, 1e-6, 0.25)
            used = torch.ones(len(cache.keys), dtype=torch.bool)
            used[cache.free.long()] = False
            exact = 1e-6 if dtype == torch.float32 else 2**-7
            for name, got in zip(POOL, state, strict=True):
                expected = getattr(cache, name)[used].float()
                torch.testing.assert_close(got.cpu()[used].float(), expected, rtol=exact, atol=4e-6, msg=name)
            torch.testing.assert_close(totals.cpu(), cache.totals, rtol=4e-6, atol=1e-6)
            for got, expected in zip(moved[:2], beside[:2], strict=True):
                assert expected is None or torch.equal(got.cpu(), expected)
            dim = shape["dim"]
            query = parts[:, : shape["heads"] * dim].unflatten(-1, (-1, dim))
            if beside[2] is not None:
                query = torch.rms_norm(query, (dim,), None, 1e-6) * beside[2]
            torch.testing.assert_close(q.cpu(), query, rtol=exact, atol=4e-6)


def test_says_what_is_wrong_with_the_products():
    cache, rows, columns, *_ = products(2, 2, 16, 2, torch.float32)
    with pytest.raises(ValueError, match=r"parts must be \(2, 102 or more\), a row for each sequence with queries"):
        paged_step(rows[0][:1], cache, 0, columns)
    with pytest.raises(
        ValueError, match="parts must be torch.float32 on cpu, as the cache; got torch.bfloat16 on cpu"
    ):
        paged_step(rows[0].bfloat16(), cache, 0, columns)
    with pytest.raises(ValueError, match=r"past_value must be \(2, 1, 2, 16\) torch.float32, contiguous, as it is"):
        paged_step(rows[0], cache, 0, columns, past_value=torch.zeros(2, 1, 16, 2).transpose(2, 3))
