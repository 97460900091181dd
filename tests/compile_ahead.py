"""Compile the kernels exactly as the Python code launches them, for GPUs that are not there.

The launch functions run on CPU tensors with the kernel replaced by a recorder; signature, constants and options come
from the recorded call, so what is compiled here is what a GPU would run.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fox_kernels import triton_backward, triton_forward
from fox_kernels.gates import gate_sums

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` remembers the call."""

    def __init__(self, kernel):
        self.kernel, self.call = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.call = (args, kwargs)

        return launch


def record_launches(head_dim, dtype, target, heads=4, kv_heads=2, queries=512, keys=1024):
    """The three kernels with the arguments that `forward` and `backward` launch them with on `target`."""
    arch = TARGETS[target].arch if target.startswith("sm_") else 0
    names = {
        "forward": (triton_forward, "forgetting_attention_forward_kernel"),
        "backward_query": (triton_backward, "forgetting_attention_backward_query_kernel"),
        "backward_key": (triton_backward, "forgetting_attention_backward_key_kernel"),
    }
    recorders = {name: Recorder(getattr(module, kernel)) for name, (module, kernel) in names.items()}
    architectures = triton_forward.architecture, triton_backward.architecture
    try:
        triton_forward.architecture = triton_backward.architecture = lambda device: arch
        for name, (module, kernel) in names.items():
            setattr(module, kernel, recorders[name])
        q = torch.empty(1, heads, queries, head_dim, dtype=dtype)
        k = torch.empty(1, kv_heads, keys, head_dim, dtype=dtype)
        sums = gate_sums(torch.zeros(1, heads, keys))
        first = torch.zeros(1, heads, queries, dtype=torch.int32)
        out, lse = triton_forward.forward(q, k, k, sums, first, 1.0)
        triton_backward.backward(out, q, k, k, out, lse, sums, first, 1.0)
    finally:
        triton_forward.architecture, triton_backward.architecture = architectures
        for name, (module, kernel) in names.items():
            setattr(module, kernel, recorders[name].kernel)
    return recorders


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
        elif isinstance(args[index], torch.Tensor):
            signature[name] = "*" + _TYPES[args[index].dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(args[index], float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if args[index] % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
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


def resources(compiled):
    """Registers, bytes of stack, shared memory, and spills inside loops that multiply matrices, of an NVIDIA kernel.

    A spill outside of them is paid once per tile of the output; inside, once per tile of keys.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    hot = [x for x in _loops(sass) if any(re.search(r"\b(HGMMA|HMMA|UTCHMMA|FFMA)\b", line) for line in x)]
    assert hot, "found no loop with a matrix product: has the disassembly changed its form?"
    spills = [sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop) for loop in hot]
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "spills_in_loops": spills,
    }
