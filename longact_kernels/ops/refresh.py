"""Choosing the salient set, and carrying compact optimizer state over to it: fixed shapes, nothing read on the host."""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from longact_kernels.ops.arguments import check_apart, check_list, check_tensor, check_tensors, overlaps_itself
from longact_kernels.ops.dispatch import implementation, runs_at_once
from longact_kernels.ops.uploads import upload
from longact_kernels.reference import refresh as _reference


def select(saliency: Tensor, group: int | Sequence[int], count: int | Sequence[int]) -> Tensor:
    """The indices of the largest values in every group of neighbouring channels; of equal values the lower index wins.

    Equivalent torch code for one group (`topk` promises no order among equals)::

        saliency.sort(descending=True, stable=True).indices[:count].sort().values

    NaN ranks above Inf, and so is always chosen; whoever would rather not choose by it looks for it before.

    Args:
        saliency: fp32 [n]; several layers may lie one after the other.
        group: how many values compete with one another: `head_dim` for scope "head", a layer's N for scope "layer"; or
            the sizes of all groups in their order, which may differ.
        count: how many to choose in each group, or in each of the sizes.

    Returns:
        int64 indices into `saliency`, ascending; as many as the counts add up to.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them; if `saliency` does not divide into such
            groups, or a count is not in 1..group.
    """
    check_tensor("saliency", saliency)
    if saliency.ndim != 1 or saliency.dtype != torch.float32:
        raise ValueError(f"saliency: got {saliency.dtype} {list(saliency.shape)}, needed torch.float32 [n]")
    groups, counts = _whole_numbers("group", group), _whole_numbers("count", count)
    n, same = saliency.numel(), not isinstance(group, Sequence)
    counts = counts if isinstance(count, Sequence) else counts * len(groups)
    in_each = len(counts) == len(groups) and all(1 <= c <= g for g, c in zip(groups, counts, strict=True))
    if not in_each or (n % groups[0] if same else n != sum(groups)):
        raise ValueError(f"select: cannot choose {count} of every {group} among {n} channels")
    return (_run_select if runs_at_once(saliency) else _select)(saliency, groups, counts)


def _whole_numbers(name: str, numbers: int | Sequence[int]) -> list[int]:
    try:
        return [operator.index(number) for number in (numbers if isinstance(numbers, Sequence) else [numbers])]
    except TypeError:
        raise TypeError(f"{name}: got a {type(numbers).__name__}, needed a whole number, or a list of some") from None


@torch.library.custom_op("longact::select", mutates_args=())
def _select(saliency: Tensor, groups: list[int], counts: list[int]) -> Tensor:
    """A single size stands for all groups."""
    return _run_select(saliency, groups, counts)


def _run_select(saliency: Tensor, groups: list[int], counts: list[int]) -> Tensor:
    return implementation("select", saliency, _select_kernel, _reference.select)(saliency, groups, counts)


@_select.register_fake
def _(saliency, groups, counts):
    chosen = saliency.shape[0] // groups[0] * counts[0] if len(groups) == 1 else sum(counts)
    return saliency.new_empty(chosen, dtype=torch.int64)


def _select_kernel(saliency: Tensor, groups: list[int], counts: list[int]) -> Tensor:
    from longact_kernels.csrc_triton.refresh import LARGE_GROUP, SELECT_CONFIG, select_kernel

    if max(groups, default=0) > LARGE_GROUP:
        # One kind of zero and of NaN, which a radix sort would tell apart by their signs.
        return _reference.select(torch.where(saliency.isnan(), torch.nan, saliency + 0.0), groups, counts)
    if len(groups) == 1:
        times = saliency.numel() // groups[0]
        groups, counts = groups * times, counts * times
    index = torch.empty(sum(counts), dtype=torch.int64, device=saliency.device)
    if groups:
        bounds = upload(saliency.device, _bounds(tuple(groups)), _bounds(tuple(counts)))
        select_kernel[(len(groups),)](saliency.contiguous(), *bounds, index, **SELECT_CONFIG)
    return index


@functools.lru_cache(maxsize=64)
def _bounds(sizes: tuple[int, ...]) -> Tensor:
    """Where each of these begins, and where the last one ends."""
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def carry_(
    states: Sequence[Sequence[Tensor]],
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    axis: Literal["rows", "columns"] = "rows",
) -> list[Tensor]:
    """Moves compact optimizer state of many layers from their old salient sets to the new ones, in place.

    Equivalent torch code, for each state of a layer::

        kept = torch.isin(new, old) & (new >= 0)
        moved = torch.zeros_like(state)
        moved[kept] = state[torch.isin(old, new) & (old >= 0)]
        state.copy_(moved)

    One launch moves the states of all layers; their addresses stay what they were.

    Args:
        states: for each layer its state tensors, fp32 or int32: [S, ..] whose slot s belongs to channel `old[s]`; with
            axis "columns" [.., S].
        old: for each layer int64 [S], ascending; sets may begin with slots that hold no channel, -1.
        new: for each layer int64 [S], ascending; state of its empty slots is zeroed, and they count as not kept.
        axis: "rows" or "columns", along which the channels lie.

    Returns:
        For each layer bool [S], True where a channel stays; state of the others is zero.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them.
        IndexError: on a CPU, for sets that do not ascend; no state has changed then.
    """
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis: got {axis!r}, needed 'rows' or 'columns'")
    check_list("states", states)
    check_tensors("old", old)
    check_tensors("new", new, old[0].device if old else None)
    if not len(states) == len(old) == len(new):
        raise ValueError(f"carry: got states, old and new of {len(states)}, {len(old)} and {len(new)} layers")
    for name, sets in (("old", old), ("new", new)):
        for i, index in enumerate(sets):
            if index.ndim != 1 or index.dtype != torch.int64:
                raise ValueError(f"{name}[{i}]: got {index.dtype} {list(index.shape)}, needed torch.int64 [S]")
    sizes = [len(before) for before in old]
    for i, after in enumerate(new):
        if len(after) != sizes[i]:
            raise ValueError(f"new[{i}]: got {list(after.shape)}, needed the shape of the old set, [{sizes[i]}]")
        check_tensors(f"states[{i}]", states[i], after.device)
        for state in states[i]:
            fits = state.ndim in (1, 2) and state.shape[-1 if axis == "columns" else 0] == sizes[i]
            if not fits or state.dtype not in (torch.float32, torch.int32) or overlaps_itself(state):
                raise ValueError(
                    f"states[{i}]: got {state.dtype} {list(state.shape)} with strides {state.stride()}, needed fp32 or "
                    f"int32 in one or two dimensions with {sizes[i]} slots along {axis}, each at a place of its own"
                )
    if not sum(sizes):
        return [torch.empty_like(after, dtype=torch.bool) for after in new]
    layers = [i for i, layer in enumerate(states) for _ in layer]
    flat = [state for layer in states for state in layer]
    check_apart("states: two of them", flat)
    run = _run_carry_ if runs_at_once(old[0]) else _carry_
    return list(run(flat, layers, list(old), list(new), axis == "columns").split(sizes))


@torch.library.custom_op("longact::carry_", mutates_args=("states",))
def _carry_(states: list[Tensor], layers: list[int], old: list[Tensor], new: list[Tensor], columns: bool) -> Tensor:
    return _run_carry_(states, layers, old, new, columns)


def _run_carry_(states: list[Tensor], layers: list[int], old: list[Tensor], new: list[Tensor], columns: bool) -> Tensor:
    kept = implementation("carry_", old[0], _carry_kernel, _reference.carry_)(states, layers, old, new, columns)
    torch.autograd.graph.increment_version(states)
    return kept


@_carry_.register_fake
def _(states, layers, old, new, columns):
    return old[0].new_empty(sum(len(after) for after in new), dtype=torch.bool)


# The largest channel that a set may hold.
_MOST = 2**31 - 1


def _carry_kernel(
    states: list[Tensor], layers: list[int], old: list[Tensor], new: list[Tensor], columns: bool
) -> Tensor:
    from longact_kernels.csrc_triton.refresh import CARRY_CONFIG, carry_kernel

    device = old[0].device
    sizes = tuple(len(before) for before in old)
    layer_of, first, bounds = upload(device, *_slots(sizes), _bounds(sizes))
    # All layers are looked up at once: the layer is what comes first in the order.
    # Below the layer's bits, whatever the sets hold.
    before, after = (torch.cat(sets).clamp(-1, _MOST) + layer_of for sets in (old, new))
    place = torch.searchsorted(before, after, out_int32=True).clamp_(max=len(before) - 1)
    # The layer in the high bits keeps -1, a slot without a channel, below the layer's own channels.
    kept = (before[place] == after) & (torch.cat(new) >= 0)
    source = torch.where(kept, place - first, -1)
    movers, counts = _movers(source, first, layer_of >> 32, bounds)

    starts = [0, *itertools.accumulate(sizes)]
    rows: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
    for state, layer in zip(states, layers, strict=True):
        slots = state.unsqueeze(1) if state.ndim == 1 else state.T if columns else state
        K, (stride_slot, stride_lane) = slots.shape[1], slots.stride()
        aligned = stride_lane == 1 and K % 4 == 0 and stride_slot % 4 == 0 and state.data_ptr() % 16 == 0
        rows[aligned].append((state.data_ptr(), layer, starts[layer], sizes[layer], K, stride_slot, stride_lane))
    for aligned, entries in rows.items():
        if entries:
            config = CARRY_CONFIG[aligned]
            blocks = -(-max(entry[4] for entry in entries) // config["BLOCK_K"])
            (table,) = upload(device, torch.tensor(entries))
            carry_kernel[(blocks, len(entries))](table, source, movers, counts, len(sizes), ALIGNED=aligned, **config)
    return kept


@functools.lru_cache(maxsize=64)
def _slots(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """For every slot of all layers: its layer, in the high bits; and that layer's first slot."""
    layers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return layers << 32, _bounds(sizes)[layers]


def _movers(source: Tensor, first: Tensor, layer: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of each layer whose state changes, and how many: int32 [all slots] and [2, layers].

    In a layer's part of the list, those whose source is ahead of them stand at its front; those whose source is behind,
    or that have none, at its end; both ascend.
    """
    slots = torch.arange(len(source), dtype=torch.int32, device=source.device) - first
    moving = torch.stack([source > slots, source < slots])
    # How many such slots come before each one and, at the end, in all.
    earlier = torch.nn.functional.pad(moving.cumsum(1, dtype=torch.int32), (1, 0))
    of_layer = earlier[:, bounds]
    counts = of_layer.diff(dim=1)
    ahead = first + earlier[0, :-1] - of_layer[0][layer]
    behind = bounds[layer + 1] + earlier[1, :-1] - of_layer[1][layer + 1]
    # What does not move goes where nobody looks.
    place = torch.where(moving[0], ahead, torch.where(moving[1], behind, len(source)))
    return slots.new_empty(len(source) + 1).scatter_(0, place.long(), slots), counts
