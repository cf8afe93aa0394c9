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
        sequences = [magnitude[start:end] for start, end in pairwise(cu_seqlens.tolist())]
    else:
        length = y.shape[-2] if y.ndim > 1 else 1
        sequences = list(magnitude.reshape(y.shape[:-2].numel() if y.ndim > 2 else 1, length, N))
    zero = magnitude.new_zeros(N)
    absmax = torch.stack([zero, *(sequence.amax(0) for sequence in sequences if len(sequence))]).amax(0)
    sumsq = torch.stack([zero, *(sequence.square().sum(0) for sequence in sequences)])[1:]
    return absmax, sumsq if l2 else sumsq[:0]
