"""Addresses far apart in memory that exists only where it is touched, and single programs of interpreted kernels."""

import mmap
from contextlib import contextmanager

import torch

MAP_NORESERVE = 0x4000  # Linux's; Python has the name from 3.13 on


class SparseMemory:
    """So many elements before and behind an address, that a kernel takes as a tensor.

    Those before it are there for offsets that wrap around: they read zeros, in place of crashing.
    """

    def __init__(self, elements: int, dtype: torch.dtype):
        self.dtype, self.origin = dtype, elements * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.memory = mmap.mmap(-1, 2 * self.origin + 2**16, flags=flags)

    def at(self, offset: int, count: int = 1) -> torch.Tensor:
        start = self.origin + offset * self.dtype.itemsize
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=start)


@contextmanager
def program(*index: int):
    """Launches with a grid of one run the program of this index instead."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    builder.create_get_program_id = lambda axis: TensorHandle(numpy.array([index[axis]], dtype=numpy.int32), tl.int32)
    try:
        yield
    finally:
        del builder.create_get_program_id
