"""Choosing the salient set anew, and carrying compact optimizer state from the old set to the new one."""

import itertools

import torch
from torch import Tensor

from longact_kernels.reference.channels import check_channels


def select(saliency: Tensor, groups: list[int], counts: list[int]) -> Tensor:
    """See :func:`longact_kernels.ops.select`, whose meaning this defines."""
    if len(groups) == 1:
        groups, counts = groups * (saliency.numel() // groups[0]), counts * (saliency.numel() // groups[0])
    chosen, start = [saliency.new_empty(0, dtype=torch.int64)], 0
    # Neighbouring groups of one size are sorted together.
    for (group, count), run in itertools.groupby(zip(groups, counts, strict=True)):
        end = start + group * len(list(run))
        values = saliency[start:end].view(-1, group)
        # A stable sort keeps equal values in index order, which topk does not promise.
        top = values.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        chosen.append((top + torch.arange(start, end, group, device=saliency.device).unsqueeze(1)).flatten())
        start = end
    return torch.cat(chosen)


def carry_(
    states: list[Tensor], layers: list[int], old: list[Tensor], new: list[Tensor], columns: bool = False
) -> Tensor:
    """See :func:`longact_kernels.ops.carry_`, whose meaning this defines; `states[i]` belongs to layer `layers[i]`."""
    for name, sets in (("old", old), ("new", new)):
        check_channels(name, sets, [2**31] * len(sets))
    slots = [
        torch.searchsorted(before, after).clamp_(max=len(before) - 1) for before, after in zip(old, new, strict=True)
    ]
    kept = [(before[slot] == after) & (after >= 0) for before, slot, after in zip(old, slots, new, strict=True)]
    for state, layer in zip(states, layers, strict=True):
        along = -1 if columns else 0
        shape = [1] * state.ndim
        shape[along] = -1
        state.copy_(state.index_select(along, slots[layer]).masked_fill_(~kept[layer].view(shape), 0))
    return torch.cat(kept)
