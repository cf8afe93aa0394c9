"""Compact optimizer state carried over to new salient sets on the CPU, in place."""

from array import array

import torch
from torch import Tensor

from longact_kernels.cpu import native
from longact_kernels.reference import refresh as _reference


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
