"""Packing of salient channels: a transposing gather."""

from numba import njit

from longact_kernels.cpu.native import compile_kernel
from longact_kernels.cpu.native.intrinsics import advance, int64_at, next_task, uint16_at, uint32_at

# Tokens of a task: they stay in the second-level cache while channel after channel is taken from them, and fill whole
# cache lines of what is packed.
TOKENS = 64


@njit
def _block(x, stride, index, S, packed, M, first):
    count = min(TOKENS, M - first)
    for s in range(S):
        source = advance(x, first * stride + index[s])
        target = advance(packed, s * M + first)
        for t in range(count):
            target[t] = source[t * stride]


@compile_kernel
def pack(args):
    """Args: x; bytes of its elements (2 or 4), stride, M; index, S; packed [S, M]. A task is a block of tokens."""
    x, width, stride, M, index, S, packed = args[2], args[3], args[4], args[5], args[6], args[7], args[8]
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        first = task * TOKENS
        if width == 2:
            _block(uint16_at(x), stride, int64_at(index), S, uint16_at(packed), M, first)
        else:
            _block(uint32_at(x), stride, int64_at(index), S, uint32_at(packed), M, first)
