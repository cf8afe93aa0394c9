"""Per-channel activation magnitude: absmax over tokens, and the sum of squares of every sequence."""

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
    tokens = magnitude.reshape(-1, N)
    absmax = tokens.amax(0) if len(tokens) else tokens.new_zeros(N)
    if not l2:
        return absmax, tokens.new_zeros(0, N)
    squares = tokens.square()
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        sumsq = [squares[start:end].sum(0) for start, end in zip(bounds, bounds[1:], strict=False)]
        return absmax, torch.stack(sumsq) if sumsq else tokens.new_zeros(0, N)
    sequences = y.shape[:-2].numel() if y.ndim > 2 else 1
    length = y.shape[-2] if y.ndim > 1 else 1
    return absmax, squares.reshape(sequences, length, N).sum(1)
