"""Per-channel activation magnitude: absmax over tokens, and the sum of squares of every sequence."""

from itertools import pairwise

import torch
from torch import Tensor


def channel_stats(
    y: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, l2: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`longact_kernels.ops.channel_stats`, whose meaning this defines."""
    N = y.shape[-1]
    magnitude = y.detach().float().abs()
    if mask is not None:
        magnitude = magnitude.masked_fill(~mask.unsqueeze(-1), 0.0)
    if cu_seqlens is not None:
        sequences = [magnitude[start:end] for start, end in pairwise(bounds_of(cu_seqlens, len(y)))]
    else:
        length = y.shape[-2] if y.ndim > 1 else 1
        sequences = list(magnitude.reshape(y.shape[:-2].numel() if y.ndim > 2 else 1, length, N))
    zero = magnitude.new_zeros(N)
    absmax = torch.stack([zero, *(sequence.amax(0) for sequence in sequences if len(sequence))]).amax(0)
    sumsq = torch.stack([zero, *(sequence.square().sum(0) for sequence in sequences)])[1:]
    return absmax, sumsq if l2 else sumsq[:0]


def bounds_of(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The bounds of packed sequences as numbers; ValueError unless they ascend within the tokens that there are."""
    bounds = cu_seqlens.tolist()
    if bounds != sorted(bounds) or (bounds and not 0 <= bounds[0] <= bounds[-1] <= tokens):
        shown = bounds if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:4]))}, ..., {bounds[-1]}]"
        raise ValueError(f"cu_seqlens: got {shown}, needed bounds that ascend within 0 .. {tokens}, y's tokens")
    return bounds
