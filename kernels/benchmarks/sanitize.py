"""Every kernel on small awkward shapes, for NVIDIA's compute-sanitizer to watch.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1      an allocation for each tensor, so that a step outside of one is seen
    compute-sanitizer --tool memcheck --error-exitcode 1 python kernels/benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python kernels/benchmarks/sanitize.py --quick
    python kernels/benchmarks/sanitize.py        without it, and on a CPU: does the script itself run?

The sanitizer prints `ERROR SUMMARY: 0 errors` (racecheck: `0 hazards`) where all is well. Forward and backward in all
dtypes, one past a tile, shared keys, odd widths, fewer queries than keys, padding, closed gates, a window, packed
sequences and both rules of pruning; decoding with 1 to 16 queries and appending gates. Kernels that the compiler has
not seen take seconds each to compile: `--quick` leaves out all but one width and dtype, `--cases` names them. Each
result is compared with the dense definition, roughly: the tests are what measures errors.
"""

import argparse

import torch
from _common import device

from fox_kernels import (
    append_gates,
    empty_sums,
    forgetting_attention,
    forgetting_attention_decode,
    forgetting_attention_reference,
    forgetting_attention_varlen,
)

# name: dtype, batch, heads, key heads, queries, keys, head dim, options. No length is a multiple of 16, so that the
# cases of QUICK share their kernels, which take longer to compile than to run.
CASES = {
    "plain": ("bfloat16", 1, 4, 2, 257, 257, 64, {}),
    "prefill-padded": ("bfloat16", 2, 4, 2, 201, 333, 64, {"key_start": True}),
    "window-closed-gates": ("bfloat16", 1, 4, 2, 301, 301, 64, {"window": 100, "close": True}),
    "packed": ("bfloat16", 1, 4, 2, 401, 401, 64, {"packed": [1, 0, 130, 64, 5, 201]}),
    "paper": ("bfloat16", 1, 4, 2, 701, 701, 64, {"pruning_rule": "paper"}),
    "tight": ("bfloat16", 1, 4, 2, 701, 1301, 64, {"pruning_rule": "tight"}),
    "several-chunks-of-gates": ("bfloat16", 1, 4, 2, 2101, 2101, 64, {}),
    "plain-128": ("bfloat16", 1, 4, 2, 257, 257, 128, {}),
    "tight-128": ("bfloat16", 1, 4, 2, 701, 701, 128, {"pruning_rule": "tight"}),
    "widest": ("bfloat16", 1, 2, 2, 129, 129, 256, {}),
    "odd-width": ("float16", 1, 2, 1, 130, 130, 40, {}),
    "float32": ("float32", 1, 2, 2, 65, 200, 64, {}),
    "one-query": ("bfloat16", 2, 2, 2, 1, 77, 64, {}),
}
DECODE_CASES = {
    "decode": ("bfloat16", 2, 4, 2, 1, 300, 64, {}),
    "decode-16-pruned": ("bfloat16", 1, 4, 1, 16, 3000, 128, {"logit_bound": 3.0, "log_pruning_tolerance": -6.0}),
    "decode-window-float32": ("float32", 1, 2, 2, 3, 257, 64, {"window": 100}),
}
QUICK = ["plain", "prefill-padded", "window-closed-gates", "packed", "paper", "tight", "decode"]
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def tensors(dtype, batch, heads, kv_heads, queries, keys, dim, where):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, dim, device=where).to(getattr(torch, dtype))
    k, v = torch.randn(2, batch, kv_heads, keys, dim, device=where).to(getattr(torch, dtype))
    # From heads that forget at once to heads that do not: pruned everywhere, and nowhere.
    decay = torch.logspace(0, -4, heads, device=where)[:, None]
    return q, k, v, -decay * torch.rand(batch, heads, keys, device=where)


def close_enough(name, dtype, got, expected):
    error = float((got.detach().double() - expected.detach().double()).abs().max())
    allowed = TOLERANCE[dtype] * max(1.0, float(expected.detach().abs().max()))
    print(f"{name:26} error {error:.1e}", flush=True)
    if not error <= allowed:
        raise SystemExit(f"{name}: error {error} > {allowed}. Run the tests before the sanitizer.")


def attend(name, where):
    *sizes, options = CASES[name]
    q, k, v, gates = tensors(*sizes, where)
    options = dict(options)
    if options.pop("close", False):
        gates[:, 0, 170] = -torch.inf
    if options.pop("key_start", False):
        options["key_start"] = torch.arange(len(q), device=where) * 50
    if "pruning_rule" in options:
        options["log_pruning_tolerance"] = -10.0
    lengths = options.pop("packed", None)
    leaves = [x.requires_grad_() for x in (q, k, v, gates)]
    kept = {name: x for name, x in options.items() if name in ("key_start", "window")}
    if lengths:
        cu = torch.tensor([0, *lengths], device=where).cumsum(0).int()
        packed = (x[0].transpose(0, 1) for x in leaves)
        out = forgetting_attention_varlen(*packed, cu).transpose(0, 1)[None]
        parts = zip(*(x.split(lengths, dim=2) for x in leaves), strict=True)
        expected = torch.cat([forgetting_attention_reference(*x) for x in parts], dim=2)
    else:
        out = forgetting_attention(*leaves, **options)
        expected = forgetting_attention_reference(*leaves, **kept)
    grad_out = torch.randn_like(out)
    close_enough(name, sizes[0], out, expected)
    wanted = torch.autograd.grad(expected, leaves, grad_out)
    for part, x, y in zip(
        ("dq", "dk", "dv", "dgates"), torch.autograd.grad(out, leaves, grad_out), wanted, strict=True
    ):
        close_enough(f"{name} {part}", sizes[0], x, y)


def decode(name, where):
    *sizes, options = DECODE_CASES[name]
    q, k, v, gates = tensors(*sizes, where)
    keys, queries = k.shape[2], q.shape[2]
    growing = empty_sums(len(q), q.shape[1], keys + 5, where)
    append_gates(growing, gates[..., : keys - queries], 0)
    append_gates(growing, gates[..., keys - queries :], torch.tensor(keys - queries, device=where))
    got = forgetting_attention_decode(q, k, v, growing.sums, **options)
    kept = {name: x for name, x in options.items() if name == "window"}
    close_enough(name, sizes[0], got, forgetting_attention_reference(q, k, v, gates, **kept))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *DECODE_CASES], default=[*CASES, *DECODE_CASES])
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    options = parser.parse_args()
    options.cases = QUICK if options.quick else options.cases
    where = device()
    print(f"{torch.cuda.get_device_name() if where == 'cuda' else 'CPU: none of the kernels runs'}")
    for name in options.cases:
        attend(name, where) if name in CASES else decode(name, where)
    print(f"{len(options.cases)} cases done")


if __name__ == "__main__":
    main()
