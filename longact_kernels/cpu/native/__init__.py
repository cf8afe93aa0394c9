"""Kernels compiled by numba (extra `cpu`), run on PyTorch's own OpenMP threads.

numba's threading layers are left alone: `workqueue` aborts on concurrent calls, and `omp` brings a second libgomp whose
threads fight those of PyTorch for the cores. Instead a kernel is a C function that takes tasks from a shared counter
until none is left, and the libgomp that PyTorch has loaded runs it on all its threads. Which thread takes which task
never shows in the result.
"""

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from longact_kernels.warning import LongActWarning

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# libgomp's threads do not survive a fork, and a parallel region in the child would wait for them for ever.
os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def available() -> bool:
    """Whether numba is installed, fits the installed numpy, and is allowed to compile; warns, once, where it is not."""
    try:
        import numba
    except ImportError as error:
        warnings.warn(
            f"without numba ({error}) work on a CPU takes up to several times as long; pip install numba",
            LongActWarning,
            stacklevel=2,
        )
        return False
    return not numba.config.DISABLE_JIT


@functools.cache
def _gomp_parallel() -> Callable | None:
    """libgomp's entry to a parallel region; None where PyTorch does not run on libgomp."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def compile_kernel(function: Callable) -> Callable:
    """Compiles `function(args)`, `args` an array of int64, at its first use, and keeps the machine code on disk."""

    @functools.cache
    def compiled():
        from numba import cfunc

        def build(cache):
            # The error model of numpy: a division by zero gives Inf or NaN, where Python's would test and raise.
            return cfunc("void(CPointer(int64))", cache=cache, error_model="numpy")(function)

        try:
            return build(cache=True)
        except RuntimeError:  # nowhere to keep it: a read-only installation and home
            return build(cache=False)

    return compiled


def run(kernel: Callable, tasks: int, args: Sequence[int]) -> Sequence[int]:
    """Runs a compiled kernel until all tasks are done.

    Args:
        kernel: made by :func:`compile_kernel`.
        tasks: how many there are.
        args: what the kernel finds in `args[2:]`; `args[0]` is the counter and `args[1]` the number of tasks. Whoever
            passes the address of a tensor keeps the tensor alive until this returns.

    Returns:
        `args` as the kernel left them.
    """
    table = (ctypes.c_int64 * (2 + len(args)))(0, tasks, *args)
    threads = min(torch.get_num_threads(), tasks)
    parallel = _gomp_parallel()
    if threads > 1 and parallel is not None and not _forked:
        parallel(kernel().address, table, threads, 0)
    elif tasks:
        kernel().ctypes(table)
    return table[2:]
