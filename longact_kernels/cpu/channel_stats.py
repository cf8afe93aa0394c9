"""Per-channel activation magnitude on the CPU: integer maxima of the bits, chunk by chunk.

With the sign bit cleared, floating-point numbers are ordered as unsigned integers are, with NaN above Inf above the
rest: an integer maximum is exact and loses neither.
"""

import functools
from itertools import pairwise

import torch
from torch import Tensor

from longact_kernels.cpu import native

# Tokens of one task: chunks, and so the bits of the result, do not depend on the number of threads.
_CHUNK = 256
# Elements that the ATen form works on at a time, so that what it writes in between stays in the cache.
_BLOCK = 1 << 18


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
        bounds = tuple(cu_seqlens.tolist())
    else:
        length = y.shape[-2] if y.ndim > 1 else 1
        sequences = y.shape[:-2].numel() if y.ndim > 2 else 1
        bounds = tuple(length * b for b in range(sequences + 1)) if l2 else (0, len(tokens))

    use_native = native.available() and not (l2 and y.dtype == torch.float16)
    size = _CHUNK if use_native else max(1, _BLOCK // max(1, N))
    chunks = _chunks(bounds, size)
    total = torch.zeros(len(bounds) - 1 if l2 else 0, N, dtype=torch.float64)
    if not chunks.shape[1] or not N:
        return torch.zeros(N), total.float()
    bits, sumsq = (_native if use_native else _aten)(tokens, kept, chunks, l2)
    absmax = bits.amax(0).view(y.dtype).float()
    if sumsq is not None:
        total.index_add_(0, chunks[2], sumsq)
    return absmax, total.float()


@functools.lru_cache(maxsize=64)
def _chunks(bounds: tuple[int, ...], size: int) -> Tensor:
    """First token, end and sequence [3, chunks] of chunks of at most `size` tokens, none of two sequences."""
    chunks = [
        (first, min(first + size, end), sequence)
        for sequence, (start, end) in enumerate(pairwise(bounds))
        for first in range(start, end, size)
    ]
    return torch.tensor(chunks, dtype=torch.int64).view(-1, 3).T.contiguous()


def _native(y: Tensor, kept: Tensor | None, chunks: Tensor, l2: bool) -> tuple[Tensor, Tensor | None]:
    """Every chunk's largest bits [chunks, N], and fp64 sums of squares [chunks, N] or None."""
    from longact_kernels.cpu.native.channel_stats import channel_stats as kernel

    N, width, count = y.shape[1], y.element_size(), chunks.shape[1]
    bits = torch.zeros(count, N, dtype=torch.int16 if width == 2 else torch.int32)
    sumsq = torch.zeros(count, N, dtype=torch.float64) if l2 else None
    native.run(
        kernel,
        count,
        [
            y.data_ptr(), width, y.stride(0), N, 0 if kept is None else kept.data_ptr(),
            chunks[0].data_ptr(), chunks[1].data_ptr(), bits.data_ptr(), 0 if sumsq is None else sumsq.data_ptr(),
        ],
    )  # fmt: skip
    return bits, sumsq


def _aten(y: Tensor, kept: Tensor | None, chunks: Tensor, l2: bool) -> tuple[Tensor, Tensor | None]:
    """As `_native`, in ATen operations on blocks that fit the cache."""
    integer, sign = (torch.int16, 0x7FFF) if y.element_size() == 2 else (torch.int32, 0x7FFFFFFF)
    keep = None if kept is None else torch.where(kept, sign, 0).to(integer).unsqueeze(1)
    words = y.view(integer)
    firsts, ends, _ = chunks.tolist()
    block = torch.empty(int((chunks[1] - chunks[0]).max()), y.shape[1], dtype=integer)
    peaks, sums = [], []
    for first, end in zip(firsts, ends, strict=True):
        bits = block[: end - first]
        torch.bitwise_and(words[first:end], sign if keep is None else keep[first:end], out=bits)
        peaks.append(bits.amax(0))
        if l2:
            values = bits.view(y.dtype).float()
            sums.append(values.mul_(values).sum(0))
    return torch.stack(peaks), torch.stack(sums).double() if l2 else None
