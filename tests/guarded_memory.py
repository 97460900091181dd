"""A memory check for interpreted Triton kernels: what they touch lies in the tensors that they are launched with."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch


@contextmanager
def guarded_memory():
    """Within, an access of an interpreted kernel outside of its arguments' storages is an AssertionError."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    ends = {}  # first byte of a storage -> the byte behind its last

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
        starts = np.array(sorted(ends), dtype=np.int64)
        stops = np.array([ends[start] for start in starts], dtype=np.int64)
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        place = np.searchsorted(starts, address, side="right") - 1
        inside = (place >= 0) & (address + size <= stops[np.maximum(place, 0)])
        assert inside.all(), f"{what} of {(~inside).sum()} elements outside of every tensor of the launch"

    init, load = GridExecutor._init_args_hst, InterpreterBuilder.create_masked_load
    store, atomic = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_atomic_rmw

    def init_args(self, args_dev, kwargs):
        args, kwargs = init(self, args_dev, kwargs)
        ends.clear()
        remember([*args, *kwargs.values()])
        return args, kwargs

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
        mock.patch.object(GridExecutor, "_init_args_hst", init_args),
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", atomic_rmw),
    ):
        yield
