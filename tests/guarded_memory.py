"""A memory check for interpreted Triton kernels: what they touch lies in the tensors that they are launched with."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch


@contextmanager
def guarded_memory():
    """Within, an access of an interpreted kernel outside of its arguments' storages is an AssertionError."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    ends = {}  # first byte of a storage -> the byte behind its last
    starts = stops = np.empty(0, dtype=np.int64)
    patched = set()  # modules, by their globals, whose view of triton.language the running launch has replaced

    def remember(x):
        x = getattr(x, "base", x) if not isinstance(x, torch.Tensor) else x
        if isinstance(x, (tuple, list)):
            for part in x:
                remember(part)
        elif hasattr(x, "untyped_storage"):
            storage = x.untyped_storage()
            ends[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()

    def checked(ptrs, mask, what):
        address = np.asarray(ptrs.data, dtype=np.int64)[np.asarray(mask.data, dtype=bool)].ravel()
        if not address.size:
            return
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        place = np.searchsorted(starts, address, side="right") - 1
        inside = (place >= 0) & (address + size <= stops[np.maximum(place, 0)])
        assert inside.all(), f"{what} of {(~inside).sum()} elements outside of every tensor of the launch"

    init, load = GridExecutor._init_args_hst, InterpreterBuilder.create_masked_load
    store, atomic = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_atomic_rmw
    patch_lang = interpreter._patch_lang

    def init_args(self, args_dev, kwargs):
        nonlocal starts, stops
        args, kwargs = init(self, args_dev, kwargs)
        patched.clear()
        ends.clear()
        remember([*args, *kwargs.values()])
        starts = np.array(sorted(ends), dtype=np.int64)
        stops = np.array([ends[start] for start in starts], dtype=np.int64)
        return args, kwargs

    def patch_once(function):
        # Triton does it again at each call of a function within a kernel, tl.sum included: a third of the time.
        scope = None if id(function.__globals__) in patched else patch_lang(function)
        patched.add(id(function.__globals__))
        return scope

    def masked_load(self, ptrs, mask, *rest):
        checked(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        checked(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    def atomic_rmw(self, op, ptr, value, mask, *rest):
        checked(ptr, mask, "atomic operation")
        return atomic(self, op, ptr, value, mask, *rest)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(GridExecutor, "_init_args_hst", init_args),
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", atomic_rmw),
    ):
        yield
