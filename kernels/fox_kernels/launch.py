"""Launches that do not prepare again what Triton prepared before.

For each launch Triton sorts every argument into a class, compares every global that the kernel reads with its value at
compilation, and turns the whole into text under which it looks for the compiled kernel: 50 to 100 us of Python, longer
than many of the kernels run. Here the compiled kernel is remembered under what can change it: options and constants,
dtypes, whether a pointer is a multiple of 16 bytes, and of a number only what Triton distinguishes. That this is all
that Triton distinguishes is tried out once per process; where it is not, and on AMD, Triton launches as always.

FOX_KERNELS_LAUNCHER=0 leaves every launch to Triton.
"""

import os
import pkgutil
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from triton.runtime import JITFunction, driver

MOST_REMEMBERED = 16384  # kernels, and forms of descriptors: beyond, everything is forgotten
_remembered: dict = {}
_templates: dict = {}


def launch(kernel, grid: tuple[int, ...], tensors, numbers: tuple, **constants) -> None:
    """`kernel[grid](*tensors, *numbers, **constants)`; constants are the kernel's constexprs and Triton's options."""
    if not isinstance(kernel, JITFunction) or not _knows_what_matters():  # the interpreter's kernels, or a test's
        kernel[grid](*tensors, *numbers, **constants)
        return
    pointers = [(x.dtype, x.data_ptr() & 15) if isinstance(x, torch.Tensor) else x.launch_key for x in tensors]
    place = (id(kernel), driver.active.get_current_device(), *pointers, *constants.items())
    key = (*place, numbers, *map(type, numbers))  # 1 == 1.0 == True: the types as well
    found = _remembered.get(key)
    if found is None:
        by_class = (*place, *(_class_of(x) if type(x) is int else type(x) for x in numbers))
        found = _remembered.get(by_class)
        if found is None:
            compiled = kernel[grid](*tensors, *numbers, **constants)
            rest = [constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
            _make_room(_remembered)[by_class] = compiled, rest
            return
        _make_room(_remembered)[key] = found
    compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *rest)


def kernel_modules(*, gluon: bool = True) -> list[ModuleType]:
    """The modules of the package whose names in `_kernel` are kernels; without `gluon` those for any GPU."""
    kinds = ("triton_", "gluon_") if gluon else ("triton_",)
    names = sorted(module.name for module in pkgutil.iter_modules([os.path.dirname(__file__)]))
    return [import_module(f".{name}", __package__) for name in names if name.startswith(kinds)]


def described(make, x: torch.Tensor, *block: int):
    """`make(x, *block)`, a descriptor of tiles of `x`; of a form that was seen before without its many checks.

    `x` must start at a multiple of 16 bytes.
    """
    form = (make, x.dtype, x.shape, x.stride(), block)
    template = _templates.get(form)
    if template is None:
        out = make(x, *block)
        out.launch_key = (make.__name__, x.dtype, block)
        _make_room(_templates)[form] = type(out), {**vars(out), "base": None}
        return out
    kind, fields = template
    out = object.__new__(kind)
    out.__dict__.update(fields)
    out.base = x
    return out


def _make_room(memory: dict) -> dict:
    if len(memory) >= MOST_REMEMBERED:
        memory.clear()
    return memory


def _class_of(x: int) -> int:
    """Numbers of one class are the same to Triton: 1, multiples of 16 and others, of 32 bits or of 64."""
    kind = 1 if x == 1 else (16 if x & 15 == 0 else 0)
    return kind if -(2**31) <= x < 2**31 else kind + 2


@lru_cache
def _knows_what_matters() -> bool:
    if os.environ.get("FOX_KERNELS_LAUNCHER") == "0" or torch.version.hip:
        return False
    try:
        return classes_hold(driver.active.get_current_target())
    except (ImportError, AttributeError, TypeError):  # another Triton
        return False


def classes_hold(target) -> bool:
    """Whether Triton's own function gives all numbers of a class the same type and the same specialisation."""
    from triton._C.libtriton import native_specialize_impl
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    seen = {}
    powers = [2**n for n in range(63)]
    for x in {0, *powers, *(n - 1 for n in powers), *(3 * n for n in powers[:61]), *(-n for n in powers)}:
        special = native_specialize_impl(backend, x, False, True, True)
        if seen.setdefault(_class_of(x), special) != special:
            return False
    floats = {native_specialize_impl(backend, x, False, True, True) for x in (0.0, 1.0, -2.5, 16.0, 1e300)}
    return len(floats) == 1
