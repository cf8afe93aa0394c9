"""Packing of salient channels: a transposing gather."""

import numpy as np
from numba import njit

from longact_kernels.cpu.native import compile_kernel
from longact_kernels.cpu.native.intrinsics import advance, int64_at, next_task, uint16_at, uint32_at

# Tokens of a task: they fill whole cache lines of what is packed.
TOKENS = 64
# Tokens that are read side by side. Mostly they lie a power of two apart, so that a first-level cache of eight ways
# holds no more of their lines.
_SIDE_BY_SIDE = 8
# Channels whose tokens are put together at a time: they stay in the second-level cache.
_CHANNELS = 1024


@njit
def _block(x, stride, index, S, packed, M, first, buffer):
    count = min(TOKENS, M - first)
    for s0 in range(0, S, _CHANNELS):
        channels = min(_CHANNELS, S - s0)
        for t0 in range(0, count, _SIDE_BY_SIDE):
            tokens = advance(x, (first + t0) * stride)
            whole = t0 + _SIDE_BY_SIDE <= count
            for s in range(channels):
                source = advance(tokens, index[s0 + s])
                target = advance(buffer, s * TOKENS + t0)
                if whole:
                    for t in range(_SIDE_BY_SIDE):  # a number that the compiler knows
                        target[t] = source[t * stride]
                else:
                    for t in range(count - t0):
                        target[t] = source[t * stride]
        for s in range(channels):
            source = advance(buffer, s * TOKENS)
            target = advance(packed, (s0 + s) * M + first)
            for t in range(count):
                target[t] = source[t]


@compile_kernel
def pack(args):
    """Args: x; bytes of its elements (2 or 4), stride, M; index, S; packed [S, M]. A task is a block of tokens."""
    x, width, stride, M, index, S, packed = args[2], args[3], args[4], args[5], args[6], args[7], args[8]
    scratch = np.empty(TOKENS * min(S, _CHANNELS), np.uint32)
    buffer = scratch.ctypes.data
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        first = task * TOKENS
        if width == 2:
            _block(uint16_at(x), stride, int64_at(index), S, uint16_at(packed), M, first, uint16_at(buffer))
        else:
            _block(uint32_at(x), stride, int64_at(index), S, uint32_at(packed), M, first, uint32_at(buffer))
