"""Ranks, and weights whose rows are spread over them (FSDP2's DTensors): what of a salient set lies here."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class Ranks:
    """The ranks that train the same layers together, and meet in collectives.

    Args:
        group: a `ProcessGroup`, or a `DeviceMesh` for all ranks of its own; None for all that there are.
        name: of the argument that it comes from, for errors.

    Attributes:
        common: what they must all have in common, compared before they first meet; None for nothing.

    Raises:
        TypeError: for a group of another kind, such as one that this rank is not in.
    """

    def __init__(self, group: Any = None, name: str = "process_group"):
        if hasattr(group, "get_group"):
            group = (group if group.ndim == 1 else group._flatten()).get_group()
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{name}: got {group!r}, needed a torch.distributed.ProcessGroup that this rank is in, or a DeviceMesh"
            )
        self.group = group
        self.common: list[str] | None = None

    @property
    def size(self) -> int:
        there = dist.is_available() and dist.is_initialized()
        return dist.get_world_size(self.group) if there else 1

    @property
    def alone(self) -> bool:
        return self.size == 1

    def all_reduce(self, tensor: Tensor, join: str) -> None:
        """Joins a tensor over the ranks in place, "max" or "sum"; nothing where there are no others."""
        if not self.alone:
            self._compare(tensor.device)
            op = dist.ReduceOp.MAX if join == "max" else dist.ReduceOp.SUM
            dist.all_reduce(tensor, op, self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all of them, one behind another along the last dimension."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def own(self, gathered: Tensor) -> Tensor:
        """This rank's part of what `gather` gives."""
        return gathered.chunk(self.size, -1)[dist.get_rank(self.group)]

    def share(self, tensor: Tensor) -> None:
        """Gives all of them the first one's values."""
        if not self.alone:
            self._compare(tensor.device)
            dist.broadcast(tensor, group=self.group, group_src=0)

    def _compare(self, device: torch.device) -> None:
        """Raises RuntimeError, on every rank, if they have not in common what they must."""
        common, self.common = self.common, None
        if common is None:
            return
        digest = int.from_bytes(hashlib.sha256("\n".join(common).encode()).digest()[:7])
        bounds = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX, self.group)
        if bounds[0] == -bounds[1]:
            return
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, common, self.group)
        other = next(i for i, theirs in enumerate(said) if theirs != said[0])
        one, two = next(both for both in itertools.zip_longest(said[0], said[other]) if both[0] != both[1])
        raise RuntimeError(
            f"process_group: its {self.size} ranks do not train the same layers in the same way: rank 0 has {one}, "
            f"rank {other} has {two}; give those that do (not other pipeline stages, nor ranks with a model of their "
            "own) a group: LongAct(model, process_group=...)"
        )

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self  # a group cannot be copied, and is the copy's too


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; told without importing that class, which takes seconds."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_channels(index: Tensor, start: int, count: int, most: int) -> Tensor:
    """The channels of a set that lie among `count` ones from `start`, counted from there, behind empty slots (-1).

    Args:
        most: how many they can be.
    """
    here = (index >= start) & (index < start + count)
    return torch.where(here, index - start, -1).sort().values[len(index) - most :]


def local_mask(weight: Tensor, mask: Tensor, dim: int) -> Tensor:
    """The part of a mask over a weight's channels that is this rank's."""
    if not is_sharded(weight):
        return mask
    start, count = bounds(weight, dim)
    return mask[start : start + count]


def zeros_by_channel(weight: Any, dim: int, dtype: torch.dtype) -> Tensor:
    """A zero for each of a weight's channels, sharded as they are."""
    channels = torch.zeros(local(weight).shape[dim], dtype=dtype, device=weight.device)
    if not is_sharded(weight) or all(shard_dim(placement) != dim for placement in weight.placements):
        return channels
    from torch.distributed.tensor import DTensor

    shape = torch.Size([weight.shape[dim]])
    return DTensor.from_local(channels, weight.device_mesh, along(weight.placements, dim), shape=shape, stride=(1,))


def shard_dim(placement: Any) -> int | None:
    """The dimension that a placement splits; None for one that splits none. FSDP2 strides over tensor parallelism's."""
    return None if placement.is_replicate() or placement.is_partial() else placement.dim


def along(placements: Any, dim: int) -> list[Any]:
    """How a tensor of one dimension is placed that follows dimension `dim` of another."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if shard_dim(one) != dim else one if dim == 0 else Shard(0) for one in placements]


def bounds(weight: Any, dim: int) -> tuple[int, int]:
    """This rank's first channel and number of channels."""
    if not is_sharded(weight):
        return 0, weight.shape[dim]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return offset[dim], shape[dim]
