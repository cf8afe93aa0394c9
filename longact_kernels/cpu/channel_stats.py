"""Per-channel activation magnitude on the CPU: integer maxima of the bits, chunk by chunk.

With the sign bit cleared, floating-point numbers are ordered as unsigned integers are, with NaN above Inf above the
rest: an integer maximum is exact and loses neither.
"""

import functools
from itertools import pairwise

import torch
from torch import Tensor

from longact_kernels.cpu import native
from longact_kernels.reference.channel_stats import bounds_of

# Tokens of one task: chunks, and so the bits of the result, do not depend on the number of threads.
_CHUNK = 256
# Bytes that the ATen form writes and reads again at a time: they stay in the second-level cache of two cores.
_BLOCK = 1 << 20
# Blocks whose squares it adds up in fp32 before that sum goes to fp64.
_RUN = 32


def channel_stats(
    y: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, l2: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`longact_kernels.ops.channel_stats`."""
    N = y.shape[-1]
    tokens = y.detach().reshape(y.shape[:-1].numel(), N)
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    kept = None if mask is None else mask.reshape(-1).contiguous()
    if cu_seqlens is not None:
        bounds = tuple(bounds_of(cu_seqlens, len(tokens)))
    else:
        length = y.shape[-2] if y.ndim > 1 else 1
        sequences = y.shape[:-2].numel() if y.ndim > 2 else 1
        bounds = tuple(length * b for b in range(sequences + 1)) if l2 else (0, len(tokens))

    use_native = native.available() and not (l2 and y.dtype == torch.float16)
    size = _CHUNK if use_native else max(1, _BLOCK // max(1, N * (8 if l2 else y.element_size())))
    chunks = _chunks(bounds, size)
    sumsq = torch.zeros(len(bounds) - 1, N) if l2 else torch.empty(0, N)
    if not (chunks.shape[1] and N):
        return torch.zeros(N), sumsq
    return (_native if use_native else _aten)(tokens, kept, chunks, sumsq), sumsq


@functools.lru_cache(maxsize=64)
def _chunks(bounds: tuple[int, ...], size: int) -> Tensor:
    """First token, end and sequence [3, chunks] of chunks of at most `size` tokens, none of two sequences."""
    chunks = [
        (first, min(first + size, end), sequence)
        for sequence, (start, end) in enumerate(pairwise(bounds))
        for first in range(start, end, size)
    ]
    return torch.tensor(chunks, dtype=torch.int64).view(-1, 3).T.contiguous()


def _native(y: Tensor, kept: Tensor | None, chunks: Tensor, sumsq: Tensor) -> Tensor:
    """The absmax of all chunks [N]; writes the sums of squares to `sumsq`, zeros [sequences, N], if it has any."""
    from longact_kernels.cpu.native.channel_stats import channel_stats as kernel

    N, width, count = y.shape[1], y.element_size(), chunks.shape[1]
    absmax, bits = torch.empty(N), torch.empty(count * N * width, dtype=torch.uint8)
    squares = torch.empty(count * N, dtype=torch.float64) if len(sumsq) else None
    # One call does it all: in a step, every operation finds its own code out of the caches.
    native.run(
        kernel,
        count,
        [
            y.data_ptr(), width, y.stride(0), N, 0 if kept is None else kept.data_ptr(), chunks.data_ptr(),
            bits.data_ptr(), 0 if squares is None else squares.data_ptr(), absmax.data_ptr(), sumsq.data_ptr(), 0,
        ],
    )  # fmt: skip
    if y.dtype == torch.float16:
        return (absmax.view(torch.int32) >> 16).short().view(torch.float16).float()
    return absmax


def _aten(y: Tensor, kept: Tensor | None, chunks: Tensor, sumsq: Tensor) -> Tensor:
    """As `_native`, in ATen operations on blocks that fit the cache."""
    integer, sign = (torch.int16, 0x7FFF) if y.element_size() == 2 else (torch.int32, 0x7FFFFFFF)
    keep = None if kept is None else torch.where(kept, sign, 0).to(integer).unsqueeze(1)
    words = y.view(integer)
    longest = int((chunks[1] - chunks[0]).max())
    block = torch.empty(longest, y.shape[1], dtype=integer)
    peaks = torch.zeros_like(block)
    l2 = len(sumsq) > 0
    if l2:
        total = torch.zeros_like(sumsq, dtype=torch.float64)
        squares = torch.zeros(longest, y.shape[1])
        values = torch.empty_like(squares)
    table = chunks.T.tolist()
    for i, (first, end, sequence) in enumerate(table):
        bits = block[: end - first]
        torch.bitwise_and(words[first:end], sign if keep is None else keep[first:end], out=bits)
        # Element by element, and once for many blocks over the tokens: that reduction is ATen's slow one.
        peak = peaks[: end - first]
        torch.maximum(peak, bits, out=peak)
        if l2:
            value = bits.view(y.dtype)
            value = value if y.dtype == torch.float32 else values[: end - first].copy_(value)
            squares[: end - first].addcmul_(value, value)
            if i + 1 == len(table) or table[i + 1][2] != sequence or (i + 1) % _RUN == 0:
                total[sequence] += squares.sum(0)
                squares.zero_()
    if l2:
        sumsq.copy_(total)
    return peaks.amax(0).view(y.dtype).float()
