"""Every kernel on small awkward shapes, for NVIDIA's compute-sanitizer to watch.

    python kernels/benchmarks/sanitize.py --quick --workers 8    compiles the kernels, which the next two then find
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1      an allocation for each tensor, so that a step outside of one is seen
    compute-sanitizer --tool memcheck --error-exitcode 1 python kernels/benchmarks/sanitize.py --quick
    compute-sanitizer --tool racecheck --error-exitcode 1 python kernels/benchmarks/sanitize.py --quick

The sanitizer prints `ERROR SUMMARY: 0 errors` (racecheck: `0 hazards`) where all is well. Forward and backward in one
pass and in two, one past a tile, shared keys, fewer queries than keys, padding, closed gates, a window, packed
sequences, both rules of pruning with the bound given and measured; decoding with 1 to 16 queries, appending gates, and
pages. `--quick` launches every kernel that there is, checked against the list of them, in one width and dtype;
without it all widths and dtypes, which takes minutes to compile. `--cases` names some. Each result is compared,
roughly, with the dense definition, which runs on the CPU, out of the sanitizer's sight: the tests are what measures
errors. Without a GPU it only tries itself out.
"""

import argparse
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

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
from fox_kernels.paged import PagedKeys
from fox_kernels.paged_attention import paged_attention
from fox_kernels.paged_step import paged_step

# name: dtype, batch, heads, key heads, queries, keys, head dim, options. No length is a multiple of 16, so that the
# cases of QUICK share their kernels, which take longer to compile than to run.
CASES = {
    "plain": ("bfloat16", 1, 4, 2, 257, 257, 64, {}),
    "two-passes": ("bfloat16", 1, 4, 2, 257, 257, 64, {"deterministic": True}),
    "without-gluon": ("bfloat16", 1, 4, 2, 129, 257, 64, {"gluon": "0"}),
    "prefill-padded": ("bfloat16", 2, 4, 2, 201, 333, 64, {"key_start": True}),
    "window-closed-gates": ("bfloat16", 1, 4, 2, 301, 301, 64, {"window": 100, "close": True}),
    "packed": ("bfloat16", 1, 4, 2, 401, 401, 64, {"packed": [1, 0, 130, 64, 5, 201]}),
    "paper": ("bfloat16", 1, 4, 2, 701, 701, 64, {"pruning_rule": "paper"}),
    "tight": ("bfloat16", 1, 4, 2, 701, 1301, 64, {"pruning_rule": "tight"}),
    "tight-bound-given": ("bfloat16", 1, 4, 2, 701, 701, 64, {"pruning_rule": "tight", "logit_bound": 30.0}),
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
    "decode-pruned": ("bfloat16", 2, 4, 2, 3, 3000, 64, {"logit_bound": 3.0, "log_pruning_tolerance": -6.0}),
    "decode-tight": (
        "bfloat16",
        2,
        4,
        2,
        3,
        3000,
        64,
        {"logit_bound": 8.0, "log_pruning_tolerance": -6.0, "pruning_rule": "tight"},
    ),
    "decode-16-pruned": ("bfloat16", 1, 4, 1, 16, 3000, 128, {"logit_bound": 3.0, "log_pruning_tolerance": -6.0}),
    "decode-window-float32": ("float32", 1, 2, 2, 3, 257, 64, {"window": 100}),
}
PAGED_CASES = {
    "pages": ("bfloat16", 2, 4, 2, 3, 200, 64, {}),
    "pages-float32": ("float32", 1, 2, 2, 1, 130, 64, {}),
}
QUICK = [
    "plain", "two-passes", "without-gluon", "window-closed-gates", "packed", "paper", "tight", "decode",
    "decode-pruned", "decode-tight", "pages", "pages-float32",
]  # fmt: skip
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def tensors(dtype, batch, heads, kv_heads, queries, keys, dim, where):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, dim).to(getattr(torch, dtype))
    k, v = torch.randn(2, batch, kv_heads, keys, dim).to(getattr(torch, dtype))
    # From heads that forget at once to heads that do not: pruned everywhere, and nowhere.
    decay = torch.logspace(0, -4, heads)[:, None]
    return [x.to(where) for x in (q, k, v, -decay * torch.rand(batch, heads, keys))]


def close_enough(name, dtype, got, expected):
    got, expected = got.detach().cpu().double(), expected.detach().double()
    error = float((got - expected).abs().max())
    allowed = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    print(f"{name:26} error {error:.1e}", flush=True)
    if not error <= allowed:
        raise SystemExit(f"{name}: error {error} > {allowed}. Run the tests before the sanitizer.")


def copies(leaves):
    """On the CPU, in float32, with gradients of their own."""
    return [x.detach().cpu().float().requires_grad_() for x in leaves]


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
    on_cpu = copies(leaves)
    kept = {
        name: x.cpu() if name == "key_start" else x for name, x in options.items() if name in ("key_start", "window")
    }
    with mock.patch.dict("os.environ", {"FOX_KERNELS_GLUON": options.pop("gluon", "1")}):
        if lengths:
            cu = torch.tensor([0, *lengths], device=where).cumsum(0).int()
            packed = (x[0].transpose(0, 1) for x in leaves)
            out = forgetting_attention_varlen(*packed, cu).transpose(0, 1)[None]
            parts = zip(*(x.split(lengths, dim=2) for x in on_cpu), strict=True)
            expected = torch.cat([forgetting_attention_reference(*x) for x in parts], dim=2)
        else:
            out = forgetting_attention(*leaves, **options)
            expected = forgetting_attention_reference(*on_cpu, **kept)
        grad_out = torch.randn(out.shape).to(out.dtype)
        close_enough(name, sizes[0], out, expected)
        got = torch.autograd.grad(out, leaves, grad_out.to(where))
    wanted = torch.autograd.grad(expected, on_cpu, grad_out.float())
    for part, x, y in zip(("dq", "dk", "dv", "dgates"), got, wanted, strict=True):
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
    close_enough(name, sizes[0], got, forgetting_attention_reference(*copies((q, k, v, gates)), **kept))


def pages(name, where):
    """A chunk of a prompt, then three steps; those of one token from a row of products, the last time."""
    *sizes, _ = PAGED_CASES[name]
    q, k, v, gates = tensors(*sizes, where)
    steps, keys = q.shape[2], k.shape[2]
    q = torch.randn(*q.shape[:2], keys, q.shape[3]).to(q)
    batch, heads, _, dim = q.shape
    cache = PagedKeys(1, batch, heads, k.shape[1], dim, dtype=q.dtype, device=where, log_tolerance=-10.0)
    cache.set_logit_bound(0, torch.full((heads,), 30.0))
    expected = forgetting_attention_reference(*copies((q, k, v, gates)))
    for begin, end in ((0, keys - 3 * steps), *((keys - i * steps, keys - (i - 1) * steps) for i in (3, 2, 1))):
        part = slice(begin, end)
        if steps == 1 and end == keys:
            logits = gates[..., -1] - (-gates[..., -1].expm1()).log()  # of which the sigmoid is the gate
            row = torch.cat([*(x[:, :, -1].flatten(1) for x in (q, k, v)), logits.to(q)], dim=1)
            ends = [0, *torch.tensor([heads * dim, *[k.shape[1] * dim] * 2]).cumsum(0).tolist()]
            got = paged_step(row, cache, 0, (*ends[:3], None, None, ends[3]))[:, :, None]
        else:
            with mock.patch("fox_kernels.paged_attention.WORTH_A_PLAN", 0):
                got = paged_attention(q[:, :, part], k[:, :, part], v[:, :, part], gates[..., part], cache, 0)
        close_enough(f"{name} {begin}", sizes[0], got, expected[:, :, part])


KINDS = {attend: CASES, decode: DECODE_CASES, pages: PAGED_CASES}


@contextmanager
def watched():
    """The names of all kernels of the package, and of those that were launched."""
    from triton.runtime.jit import JITFunction

    from fox_kernels.launch import kernel_modules

    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    modules = kernel_modules(gluon=is_hopper)
    names = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    launched = set()
    run = JITFunction.run

    def noted(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", noted):
        yield names, launched


def compile_all(names, workers):
    """Run the cases in so many processes: what they compile stays in Triton's cache."""
    command = [sys.executable, __file__, "--cases"]
    running = [subprocess.Popen([*command, *names[i::workers]]) for i in range(min(workers, len(names)))]
    sys.exit(max(process.wait() for process in running))


def main():
    every = [name for cases in KINDS.values() for name in cases]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=every, metavar="CASE", help=f"of {', '.join(every)}")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--workers", type=int, default=1, help="processes to compile in; default: %(default)s")
    options = parser.parse_args()
    names = options.cases or (QUICK if options.quick else every)
    if options.workers > 1:
        compile_all(names, options.workers)
    where = device()
    print(f"{torch.cuda.get_device_name() if where == 'cuda' else 'CPU: none of the kernels runs'}")
    with watched() as (kernels, launched):
        for name in names:
            next(run for run, cases in KINDS.items() if name in cases)(name, where)
    missing = kernels - launched
    print(f"{len(names)} cases done, {len(kernels & launched)} of {len(kernels)} kernels launched")
    if where == "cuda" and not options.cases and missing:
        raise SystemExit(f"Not launched: {', '.join(sorted(missing))}. Add a case that does.")


if __name__ == "__main__":
    main()
