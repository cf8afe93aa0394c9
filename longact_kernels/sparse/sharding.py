"""Ranks, and weights whose rows are spread over them (FSDP2's DTensors): what of a salient set lies here."""

from typing import Any

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(tensor: Tensor, join: str) -> None:
    """Joins a tensor over all ranks in place, "max" or "sum"; nothing where there are no others."""
    if is_distributed():
        op = torch.distributed.ReduceOp.MAX if join == "max" else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(tensor, op)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; told without importing that class, which takes seconds."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_channels(weight: Tensor, rows: Tensor, dim: int) -> Tensor:
    """The channels of a set that lie on this rank, counted from its first, behind empty slots (-1) for the others."""
    if not is_sharded(weight):
        return rows
    start, count = _bounds(weight, dim)
    return torch.where((rows >= start) & (rows < start + count), rows - start, -1).sort().values


def local_mask(weight: Tensor, mask: Tensor, dim: int) -> Tensor:
    """The part of a mask over a weight's channels that is this rank's."""
    if not is_sharded(weight):
        return mask
    start, count = _bounds(weight, dim)
    return mask[start : start + count]


def zeros_by_channel(weight: Any, dim: int, dtype: torch.dtype) -> Tensor:
    """A zero for each of a weight's channels, sharded as they are."""
    channels = torch.zeros(local(weight).shape[dim], dtype=dtype, device=weight.device)
    if is_sharded(weight):
        from torch.distributed.tensor import DTensor, Shard

        if Shard(dim) not in weight.placements:
            return channels
        placements = [Shard(0) if placement == Shard(dim) else placement for placement in weight.placements]
        shape = torch.Size([weight.shape[dim]])
        return DTensor.from_local(channels, weight.device_mesh, placements, shape=shape, stride=(1,))
    return channels


def _bounds(weight: Any, dim: int) -> tuple[int, int]:
    """This rank's first channel and number of channels."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return offset[dim], shape[dim]
