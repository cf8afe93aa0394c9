"""Packing of salient channels, a transposing gather; and products of what is packed in pairs of tokens."""

import functools

import numpy as np
from numba import njit, uint32

from longact_kernels.cpu.native import compile_kernel
from longact_kernels.cpu.native.intrinsics import (
    advance,
    float32_at,
    has,
    int64_at,
    interleave,
    next_task,
    prefetch_of,
    products_of,
    uint16_at,
    uint32_at,
)
from longact_kernels.cpu.native.sets import empty_slots

# Tokens of a task: they fill whole cache lines of what is packed.
TOKENS = 64
# Tokens that are read side by side. Mostly they lie a power of two apart, so that a first-level cache of eight ways
# holds no more of their lines.
_SIDE_BY_SIDE = 8
# Channels whose tokens are put together at a time: they stay in the second-level cache.
_CHANNELS = 1024
# Salient channels and columns of a tile of the product, whose sums fill the registers.
ROWS, COLUMNS = 12, 32
# Pairs of tokens whose columns stay in the second-level cache.
_PAIRS = 1024
# How many pairs ahead memory is asked for rows of x, one line of each at a time, and for whole rows of dy.
_AHEAD, _NEAR = 8, 2


_prefetch = prefetch_of(COLUMNS)
_products = products_of(ROWS)


@njit
def _channels(args):
    """Where the channels of a set begin, and how many; -1 if it is none. Every thread says in args[10] what is empty,
    the same."""
    index, S = int64_at(args[7]), args[8]
    empty = empty_slots(index, S, args[6])
    args[10] = empty
    return advance(index, max(empty, 0)), S - empty if empty >= 0 else -1


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
    """Args: x; bytes of its elements (2 or 4), stride, M, N; index, S; packed [S, M]; what `empty_slots` says, slots
    that packed does not have. A task is a block of tokens."""
    x, width, stride, M, packed = args[2], args[3], args[4], args[5], args[9]
    index, S = _channels(args)
    if S < 0:
        return
    scratch = np.empty(TOKENS * min(S, _CHANNELS), np.uint32)
    buffer = scratch.ctypes.data
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        first = task * TOKENS
        if width == 2:
            _block(uint16_at(x), stride, index, S, uint16_at(packed), M, first, uint16_at(buffer))
        else:
            _block(uint32_at(x), stride, index, S, uint32_at(packed), M, first, uint32_at(buffer))


@functools.cache
def multiplies():
    """Whether `product` can run, and nothing faster: oneDNN has AMX where there is that."""
    return has("avx512bf16") and not has("amx-bf16")


@compile_kernel
def pack_pairs(args):
    """`pack` of bf16 numbers as uint32 [S / ROWS, M / 2, ROWS], zeros in the rest: pairs of tokens side by side."""
    stride, M, N, packed = args[4], args[5], args[6], uint32_at(args[9])
    index, S = _channels(args)
    if S < 0:
        return
    pairs = (M + 1) // 2
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        for pair in range(task * TOKENS // 2, min((task + 1) * TOKENS // 2, pairs)):
            even = advance(uint16_at(args[2]), 2 * pair * stride)
            odd = advance(even, stride)
            whole = 2 * pair + 1 < M
            for n in range(0, N, COLUMNS):
                _prefetch(advance(even, 2 * _NEAR * stride + n))
                _prefetch(advance(odd, 2 * _NEAR * stride + n))
            for s0 in range(0, S, ROWS):
                target = advance(packed, (s0 // ROWS * pairs + pair) * ROWS)
                for r in range(S - s0, ROWS):
                    target[r] = 0
                for r in range(min(ROWS, S - s0)):
                    channel = index[s0 + r]
                    target[r] = even[channel]
                    if whole:
                        target[r] |= uint32(odd[channel]) << 16


@compile_kernel
def product(args):
    """Args: what `pack_pairs` made, S, M; x, its stride; fp32 out [S, K], its stride, whether to add to it. A task is
    COLUMNS of x, which has no others left over."""
    packed, S, M, x, stride, out, stride_out, adds = (
        uint32_at(args[2]), args[3], args[4], uint16_at(args[5]), args[6], float32_at(args[7]), args[8], args[9],
    )  # fmt: skip
    scratch = np.empty((_PAIRS + ROWS) * COLUMNS + 16, np.uint32)
    aligned = (scratch.ctypes.data + 63) // 64 * 64
    columns, tile = uint32_at(aligned), float32_at(aligned + 4 * _PAIRS * COLUMNS)
    none = np.zeros(COLUMNS, np.uint16)
    pairs = (M + 1) // 2
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        first = task * COLUMNS
        for start in range(0, pairs, _PAIRS):
            count = min(_PAIRS, pairs - start)
            for pair in range(count):
                even = advance(x, 2 * (start + pair) * stride + first)
                odd = advance(even, stride)
                _prefetch(advance(even, 2 * _AHEAD * stride))
                _prefetch(advance(odd, 2 * _AHEAD * stride))
                odd = odd if 2 * (start + pair) + 1 < M else uint16_at(none.ctypes.data)
                interleave(even, odd, advance(columns, pair * COLUMNS))
            for s0 in range(0, S, ROWS):
                _products(advance(packed, (s0 // ROWS * pairs + start) * ROWS), columns, count, tile)
                for r in range(min(ROWS, S - s0)):
                    target, own = advance(out, (s0 + r) * stride_out + first), advance(tile, r * COLUMNS)
                    if adds or start > 0:
                        for c in range(COLUMNS):
                            target[c] += own[c]
                    else:
                        for c in range(COLUMNS):
                            target[c] = own[c]
