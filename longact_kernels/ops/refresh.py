"""Choosing the salient set, and carrying compact optimizer state over to it: fixed shapes, nothing read on the host."""

from torch import Tensor

from longact_kernels.reference import refresh as _reference


def select(saliency: Tensor, group: int, count: int) -> Tensor:
    """The indices of the `count` largest values in every run of `group` values; of equal values the lower index wins.

    Args:
        saliency: fp32 [n], n a multiple of `group`; several layers may lie one after the other.
        group: values that compete with one another: `head_dim` for scope "head", the layer's N for scope "layer".
        count: how many to choose in each group.

    Returns:
        int64 [n // group * count], ascending.

    Raises:
        ValueError: if `saliency` does not divide into groups, or `count` is not in 1..group.
    """
    if saliency.numel() % group or not 1 <= count <= group:
        raise ValueError(f"select: cannot choose {count} of every {group} among {saliency.numel()} channels")
    return _reference.select(saliency, group, count)


def carry(states: list[Tensor], old: Tensor, new: Tensor) -> tuple[list[Tensor], Tensor]:
    """Moves compact state from the old salient set to the new one.

    Args:
        states: tensors [S, ...] whose slot s belongs to channel `old[s]`.
        old: int64 [S], ascending.
        new: int64 [S], ascending.

    Returns:
        New tensors whose slot s belongs to channel `new[s]`: carried over where the channel stays, zero where it is new;
        and bool [S], True where it stays.
    """
    return _reference.carry(states, old, new)
