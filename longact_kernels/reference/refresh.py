"""Choosing the salient set anew, and carrying compact optimizer state from the old set to the new one."""

import torch
from torch import Tensor


def select(saliency: Tensor, group: int, count: int) -> Tensor:
    """See :func:`longact_kernels.ops.select`, whose meaning this defines."""
    groups = saliency.view(-1, group)
    # A stable sort keeps equal values in index order, which topk does not promise.
    top = groups.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    return (top + torch.arange(0, saliency.numel(), group, device=saliency.device).unsqueeze(1)).flatten()


def carry(states: list[Tensor], old: Tensor, new: Tensor) -> tuple[list[Tensor], Tensor]:
    """See :func:`longact_kernels.ops.carry`, whose meaning this defines."""
    slot = torch.searchsorted(old, new).clamp_(max=max(old.numel() - 1, 0))
    kept = old[slot] == new
    moved = [state[slot] for state in states]
    return [m.masked_fill_(~kept.view(-1, *[1] * (m.ndim - 1)), 0) for m in moved], kept
