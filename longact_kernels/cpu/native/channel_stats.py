"""Channel statistics of chunks of tokens: one read of the activation, accumulators in the first-level cache."""

import numpy as np
from numba import njit, uint16, uint32

from longact_kernels.cpu.native import compile_kernel
from longact_kernels.cpu.native.intrinsics import (
    absmax_of_four,
    advance,
    float32_at,
    float64_at,
    int64_at,
    next_task,
    prefetch_of,
    squares_of_four,
    uint8_at,
    uint16_at,
    uint32_at,
)

_LANES = 64
# Tokens whose squares are summed in fp32 before that sum goes to fp64.
_RUN = 64

_prefetch = prefetch_of(_LANES)
_absmax_vector = absmax_of_four(_LANES)
_absmax_single = absmax_of_four(1)
_squares_vector = squares_of_four(_LANES)
_squares_single = squares_of_four(1)


def _chunk_kernel(l2):
    # Known when it is compiled, so that the loop of absmax alone keeps its masks in registers.
    @njit
    def _chunk(y, stride, N, first, end, mask, sign, zero, absmax, sumsq, run):
        """Adds the tokens [first, end) to `absmax` and `sumsq`; `sign` is the bit mask that takes the sign away."""
        last = end - 1
        for start in range(first, end, _RUN):
            if l2:
                for n in range(N):
                    run[n] = 0
            for t in range(start, min(start + _RUN, end), 4):
                # Beyond the last token a group of four reads that one again and keeps none of its bits.
                t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
                k0 = sign
                k1, k2, k3 = (
                    (sign if t + 1 <= last else zero),
                    (sign if t + 2 <= last else zero),
                    (sign if t + 3 <= last else zero),
                )
                if mask != 0:
                    kept = uint8_at(mask)
                    k0, k1 = (k0 if kept[t] else zero), (k1 if kept[t1] else zero)
                    k2, k3 = (k2 if kept[t2] else zero), (k3 if kept[t3] else zero)
                y0, y1, y2, y3 = (
                    advance(y, t * stride),
                    advance(y, t1 * stride),
                    advance(y, t2 * stride),
                    advance(y, t3 * stride),
                )
                n = 0
                while n + _LANES <= N:
                    a, b, c, d = advance(y0, n), advance(y1, n), advance(y2, n), advance(y3, n)
                    # Hardware looks ahead within a page, and a token is often a page of its own.
                    _prefetch(advance(a, 4 * stride))
                    _prefetch(advance(b, 4 * stride))
                    _prefetch(advance(c, 4 * stride))
                    _prefetch(advance(d, 4 * stride))
                    _absmax_vector(advance(absmax, n), a, b, c, d, k0, k1, k2, k3)
                    if l2:
                        _squares_vector(advance(run, n), a, b, c, d, k0, k1, k2, k3)
                    n += _LANES
                while n < N:
                    a, b, c, d = advance(y0, n), advance(y1, n), advance(y2, n), advance(y3, n)
                    _absmax_single(advance(absmax, n), a, b, c, d, k0, k1, k2, k3)
                    if l2:
                        _squares_single(advance(run, n), a, b, c, d, k0, k1, k2, k3)
                    n += 1
            if l2:
                for n in range(N):
                    sumsq[n] += run[n]

    return _chunk


_absmax = _chunk_kernel(l2=False)
_both = _chunk_kernel(l2=True)


@njit
def _merge(peaks, count, N, shift, absmax):
    """What the chunks' largest bits come to, in the first chunk's; as the bits of fp32 numbers in `absmax`."""
    for chunk in range(1, count):
        more = advance(peaks, chunk * N)
        for n in range(N):
            peaks[n] = max(peaks[n], more[n])
    for n in range(N):
        absmax[n] = uint32(peaks[n]) << shift


@njit
def _sum(squares, count, N, sequences, sumsq):
    """The sum of each sequence, whose chunks follow one another."""
    for chunk in range(count):
        total = advance(squares, chunk * N)
        if chunk > 0 and sequences[chunk] == sequences[chunk - 1]:
            before = advance(squares, (chunk - 1) * N)
            for n in range(N):
                total[n] += before[n]
        of_sequence = advance(sumsq, sequences[chunk] * N)
        for n in range(N):
            of_sequence[n] = total[n]


@compile_kernel
def channel_stats(args):
    """Args: y; bytes of its elements (2: bf16, for absmax alone also fp16; 4: fp32), stride, N; mask or 0; int64
    [3, chunks], first token, end and sequence of each; scratch [chunks, N], in the width of y and in fp64 or 0; absmax
    [N], the bits of y's numbers at the upper end of 32; sumsq fp32 [sequences, N], zero at first; 0."""
    y, width, stride, N, mask, chunks, bits, squares, absmax, sumsq = (
        args[2], args[3], args[4], args[5], args[6], args[7], args[8], args[9], args[10], args[11],
    )  # fmt: skip
    count = args[1]
    firsts = int64_at(chunks)
    ends, sequences = advance(firsts, count), advance(firsts, 2 * count)
    buffer = np.empty(N, np.float32)
    run = float32_at(buffer.ctypes.data)
    while True:
        task = next_task(args)
        if task >= count:
            break
        first, end = firsts[task], ends[task]
        total = advance(float64_at(squares), task * N)
        if squares != 0:
            for n in range(N):
                total[n] = 0
        if width == 2:
            source, peak, sign, zero = uint16_at(y), advance(uint16_at(bits), task * N), uint16(0x7FFF), uint16(0)
            for n in range(N):
                peak[n] = 0
            if squares != 0:
                _both(source, stride, N, first, end, mask, sign, zero, peak, total, run)
            else:
                _absmax(source, stride, N, first, end, mask, sign, zero, peak, total, run)
        else:
            words, tops = uint32_at(y), advance(uint32_at(bits), task * N)
            for n in range(N):
                tops[n] = 0
            if squares != 0:
                _both(words, stride, N, first, end, mask, uint32(0x7FFFFFFF), uint32(0), tops, total, run)
            else:
                _absmax(words, stride, N, first, end, mask, uint32(0x7FFFFFFF), uint32(0), tops, total, run)
        if next_task(advance(args, 12)) == count - 1:  # all others are done
            if width == 2:
                _merge(uint16_at(bits), count, N, 16, uint32_at(absmax))
            else:
                _merge(uint32_at(bits), count, N, 0, uint32_at(absmax))
            if squares != 0:
                _sum(float64_at(squares), count, N, sequences, float32_at(sumsq))
