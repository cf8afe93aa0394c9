"""What every op asks of a tensor, so that no kernel follows an address or a stride that does not hold."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


def check_tensor(name: str, value: Any, device: torch.device | None = None) -> None:
    """Whether a kernel can follow an argument.

    Args:
        name: of the argument.
        value: what came.
        device: where the op's other tensors lie.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is a sparse one, a negated view, or lies on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got a {type(value).__name__}, needed a tensor")
    if not is_compiling():  # which can trace neither question, and copies negated views by itself
        if value.layout is not torch.strided:
            raise ValueError(
                f"{name}: got a tensor of layout {value.layout}, needed a strided one, as to_dense() gives"
            )
        if value.is_neg():
            raise ValueError(
                f"{name}: got a view that is negated where it is read, needed its values, as resolve_neg() gives"
            )
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got one on {value.device}, needed {device}, where the other tensors lie")


def check_tensors(name: str, values: Any, device: torch.device | None = None) -> None:
    """`check_tensor` of a list of them."""
    check_list(name, values)
    for i, value in enumerate(values):
        check_tensor(f"{name}[{i}]", value, device)


def check_list(name: str, values: Any) -> None:
    """Raises TypeError for what is no list of something."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}: got a {type(values).__name__}, needed a list")


def check_apart(what: str, tensors: Sequence[Tensor]) -> None:
    """Raises ValueError if two tensors that an op writes to share memory; of those with gaps, if they begin as one."""
    if is_compiling():
        return  # there are no addresses yet
    spans = sorted(
        (start, start + (t.nbytes if t.is_contiguous() else 1))
        for t in tensors
        if t.numel() and (start := t.data_ptr())
    )
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError(f"{what} share memory; needed a place for each")


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory, so that what is written to one shows in another."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel():
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False
