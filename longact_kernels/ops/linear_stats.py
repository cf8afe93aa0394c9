"""`longact::linear_stats`: a linear projection and the channel statistics of its output."""

import torch
from torch import Tensor

from longact_kernels.ops.channel_stats import channel_stats


def linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    l2: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = F.linear(x, weight, bias)` and `channel_stats(y, mask, cu_seqlens, l2)`.

    Args:
        x: [..., T, K].
        weight: [N, K].
        bias: [N] or None.
        mask, cu_seqlens, l2: as in :func:`longact_kernels.ops.channel_stats`.

    Returns:
        y [..., T, N], absmax fp32 [N], sumsq fp32 [B, N].
    """
    y = torch.nn.functional.linear(x, weight, bias)
    return y, *channel_stats(y, mask, cu_seqlens, l2)
