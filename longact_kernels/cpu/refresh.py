"""Salient sets chosen on the CPU, and compact optimizer state carried over to them, in place."""

import functools
import itertools
from array import array

import torch
from torch import Tensor

from longact_kernels.cpu import native
from longact_kernels.reference import refresh as _reference


def select(saliency: Tensor, groups: list[int], counts: list[int]) -> Tensor:
    """See :func:`longact_kernels.ops.select`; a single size stands for all groups."""
    if not native.available():
        return _reference.select(saliency, groups, counts)
    from longact_kernels.cpu.native.refresh import select as kernel

    if len(groups) == 1:
        times = len(saliency) // groups[0]
        groups, counts = groups * times, counts * times
    saliency, table = saliency.contiguous(), _groups(tuple(groups), tuple(counts))
    ranks, index = torch.empty_like(saliency), saliency.new_empty(sum(counts), dtype=torch.int64)
    args = [saliency.data_ptr(), ranks.data_ptr(), table.buffer_info()[0], index.data_ptr()]
    native.run(kernel, len(groups), args)
    return index


@functools.lru_cache(maxsize=64)
def _groups(groups: tuple[int, ...], counts: tuple[int, ...]) -> array:
    firsts, places = (itertools.accumulate(sizes, initial=0) for sizes in (groups, counts))
    return array("q", itertools.chain.from_iterable(zip(firsts, groups, places, counts, strict=False)))


def carry_(
    states: list[Tensor], layers: list[int], old: list[Tensor], new: list[Tensor], columns: bool = False
) -> Tensor:
    """See :func:`longact_kernels.ops.carry_`; `states[i]` belongs to layer `layers[i]`."""
    if not native.available():
        return _reference.carry_(states, layers, old, new, columns)
    from longact_kernels.cpu.native import refresh as kernels

    before, after = ([index.contiguous() for index in sets] for sets in (old, new))
    sets, slots = array("q"), 0
    for a, b in zip(before, after, strict=True):
        sets.extend((a.data_ptr(), b.data_ptr(), slots, len(b), 0))
        slots += len(b)
    table = array("q")
    for state, layer in zip(states, layers, strict=True):
        along = state.ndim - 1 if columns else 0
        lanes, stride_lane = (state.shape[1 - along], state.stride(1 - along)) if state.ndim > 1 else (1, 1)
        table.extend((state.data_ptr(), layer, lanes, state.stride(along), stride_lane))
    source, kept = torch.empty(slots, dtype=torch.int64), torch.empty(slots, dtype=torch.bool)
    args = (sets.buffer_info()[0], source.data_ptr(), kept.data_ptr(), table.buffer_info()[0], 0)
    if native.run(kernels.match, len(new), args)[-1]:
        return _reference.carry_(states, layers, old, new, columns)  # says which set it is
    native.run(kernels.carry, len(states), args)
    return kept
