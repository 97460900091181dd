"""Compile the kernels exactly as the Python code launches them, for GPUs that are not there.

The launch functions run on CPU tensors with the kernel replaced by a recorder; signature, constants and options come
from the recorded call, so what is compiled here is what a GPU would run.
"""

import os
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from fox_kernels import (
    triton_backward,
    triton_decode,
    triton_forward,
    triton_gates,
    triton_paged,
    triton_pruning,
    triton_step,
)
from fox_kernels.decode import empty_sums
from fox_kernels.gates import gate_sums
from fox_kernels.launch import kernel_modules
from fox_kernels.paged import PagedKeys

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float64: "fp64",
}


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` remembers the call."""

    def __init__(self, kernel):
        self.kernel, self.call = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.call = (args, kwargs)

        return launch


MODULES = kernel_modules()


def kernel_names():
    """Every kernel of the package: what ends in `_kernel` in a module of kernels."""
    return [name for module in MODULES for name in vars(module) if name.endswith("_kernel")]


def record_launches(head_dim, dtype, target, heads=4, kv_heads=2, queries=512, keys=4096):
    """Every kernel with the arguments that a GPU like `target` would launch it with, by its name."""
    arch = TARGETS[target].arch if target.startswith("sm_") else 0
    places = [(module, name) for module in MODULES for name in vars(module) if name.endswith("_kernel")]
    kernels = {name: getattr(module, name) for module, name in places}
    recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
    with_architecture = [module for module in MODULES if hasattr(module, "architecture")]
    architecture = triton_forward.architecture
    try:
        for module in with_architecture:
            module.architecture = lambda device: arch
        for module, name in places:
            setattr(module, name, recorders[name])
        _launch_everything(head_dim, dtype, heads, kv_heads, queries, keys)
    finally:
        for module in with_architecture:
            module.architecture = architecture
        for module, name in places:
            setattr(module, name, kernels[name])
    return recorders


def _launch_everything(head_dim, dtype, heads, kv_heads, queries, keys):
    q = torch.empty(1, heads, queries, head_dim, dtype=dtype)
    k = torch.empty(1, kv_heads, keys, head_dim, dtype=dtype)
    gates = torch.zeros(1, heads, keys)
    sums, first = gate_sums(gates), torch.zeros(1, heads, queries, dtype=torch.int32)
    packed = torch.zeros(3, dtype=torch.int32)
    triton_gates.prepare(gates, None, queries, 100, packed)
    # Where Hopper's kernels apply, they are launched as well; the last launch of a kernel is the one that counts.
    out, lse = triton_forward.forward(q, k, k, sums, first, 1.0)
    column_sum = triton_backward.backward(out, q, k, k, out, lse, sums, first, 1.0)[-1]
    with mock.patch.dict(os.environ, {"FOX_KERNELS_GLUON": "0"}):
        triton_forward.forward(q, k, k, sums, first, 1.0)
        triton_backward.backward(out, q, k, k, out, lse, sums, first, 1.0)
    triton_gates.gate_gradient(column_sum, gates, packed)
    rule = dict(scale=1.0, log_tolerance=-10.0, logit_bound=None)
    for prune in (triton_pruning.paper_rule, triton_pruning.tight_rule):
        prune(q, k, sums, first, torch.zeros(1, dtype=torch.int64), **rule)
    growing = empty_sums(1, heads, keys)
    bound = torch.zeros(1, heads)
    tight = dict(logit_bound=bound, budget=18.0, window=99, tight=-10.0)
    triton_decode.forward(q[:, :, :4], k, k, growing.sums, keys, None, 1.0, **tight)
    triton_decode.append_gates(*growing, gates[..., :4], 0, None)
    pages = PagedKeys(1, 1, heads, kv_heads, head_dim, dtype=dtype)
    pages.make_room(0, 4)
    pool, table = (pages.keys, pages.values, pages.within, pages.starts), pages.table[0]
    length, start = pages.lengths[0], torch.zeros(1, dtype=torch.int32)
    triton_paged.append(k[:, :, :4], k[:, :, :4], gates[..., :4], *pool, pages.totals[0], table, length)
    triton_paged.forward(q[:, :, :4], *pool, table, pages.first_key[0], length, 1.0, start)
    found = (pages.logit_bound[0], pages.evicted[0], pages.evicted_at[0], -10.0)
    triton_paged.plan(q[:, :, :4], pool[0], *pool[2:], table, pages.first_key[0], length, 1.0, start, *found)
    past, columns = torch.empty(1, 1, kv_heads, head_dim, dtype=dtype), (0, 1, 2, 3, 4, 5)
    norms = [torch.empty(count, head_dim, dtype=dtype) for count in (heads, kv_heads)]
    parts = torch.empty(1, 4 * heads * head_dim, dtype=dtype)
    rest = (pages.totals[0], table, length)
    triton_step.prepare(parts, columns, past, past, *norms, torch.empty(heads), 1e-6, *pool, *rest)


def compile_launch(recorder, target):
    """Return Triton's compiled kernel for a `TARGETS` name."""
    args, kwargs = recorder.call
    kernel = recorder.kernel
    options = {name: kwargs[name] for name in _LAUNCH_OPTIONS if name in kwargs}
    constants = {name: value for name, value in kwargs.items() if name not in _LAUNCH_OPTIONS}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(args[index], GluonDescriptor):
            descriptor = args[index]
            kind = _TYPES[descriptor.base.dtype]
            signature[name] = f"tensordesc<{kind}{list(descriptor.block_shape)},{descriptor.layout!r}>"
        elif isinstance(args[index], TensorDescriptor):
            descriptor = args[index]
            signature[name] = f"tensordesc<{_TYPES[descriptor.base.dtype]}{list(descriptor.block_shape)}>"
        elif isinstance(args[index], torch.Tensor):
            signature[name] = "*" + _TYPES[args[index].dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(args[index], float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if args[index] % 16 == 0 and not kernel.params[index].do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    Source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = Source(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def _loops(sass):
    """Innermost loops of a kernel as lists of instructions: from the target of a backward branch to the branch."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    spans = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [x for x in spans if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    return [[text for address, text in code if first <= address <= last] for first, last in inner]


def _cuobjdump(compiled, flag):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


@lru_cache(maxsize=1)
def _loops_with_products(compiled):
    loops = _loops(_cuobjdump(compiled, "-sass"))
    hot = [x for x in loops if any(re.search(r"\b(HGMMA|HMMA|UTCHMMA|FFMA)\b", line) for line in x)]
    assert hot, "found no loop with a matrix product: has the disassembly changed its form?"
    return hot


def fences_in_loops(compiled):
    """How often each loop with products waits for or commits some of a warpgroup, of a kernel for Hopper."""
    loops = _loops_with_products(compiled)
    assert all(any("HGMMA" in line for line in loop) for loop in loops), "a loop multiplies without the warpgroup"
    return [sum("WARPGROUP" in line for line in loop) for loop in loops]


def resources(compiled):
    """Registers, bytes of stack, shared memory, and spills inside loops that multiply matrices, of an NVIDIA kernel.

    A spill outside of them is paid once per tile of the output; inside, once per tile of keys. Registers spill to the
    stack: without one there are none, and nothing is disassembled, which takes a second.
    """
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(compiled, "-res-usage")).groups()
    loops = _loops_with_products(compiled) if int(stack) else []
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "spills_in_loops": [sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop) for loop in loops],
    }
