"""A linear projection together with the channel statistics of its output."""

import torch
from torch import Tensor

from longact_kernels.reference.channel_stats import channel_stats


def linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    l2: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`longact_kernels.ops.linear_stats`, whose meaning this defines."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y, *channel_stats(y, mask, cu_seqlens, l2)
