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


class LocalSets:
    """What of the salient sets of sharded weights lies on this rank, of all layers at once and at addresses that stay.

    Args:
        weights: each with its set.

    Attributes:
        of: for each weight, its channels as this rank counts them, behind empty slots (-1): as many as there can be.
    """

    def __init__(self, weights: list[tuple[Any, Any]]):
        self.weights = weights
        self.versions: list[int] = []
        places = [bounds(p, salient.dim) for p, salient in weights]
        device, sizes = weights[0][0].device, torch.tensor([salient.size for _, salient in weights])
        # Each layer's channels as numbers of their own, so that one sort serves all.
        width = 2 + max(count for _, count in places)
        columns = torch.tensor([(start, start + count, i * width) for i, (start, count) in enumerate(places)])
        self.start, self.stop, self.base = columns.repeat_interleave(sizes, 0).to(device).unbind(1)
        self.index = torch.full_like(self.start, -1)
        most = [
            salient.most(start, start + count) for (start, count), (_, salient) in zip(places, weights, strict=True)
        ]
        parts = self.index.split(sizes.tolist())
        self.of = {p: part[len(part) - m :] for (p, _), part, m in zip(weights, parts, most, strict=True)}

    def fits(self, weights: list[tuple[Any, Any]]) -> bool:
        """Whether they are those of the same weights and sets, on their device."""
        same = len(weights) == len(self.weights) and all(
            p is q and one is other for (p, one), (q, other) in zip(weights, self.weights, strict=True)
        )
        return same and weights[0][0].device == self.index.device

    def follow(self, always: bool = False) -> None:
        """Reads the sets again if they have changed, or always."""
        versions = [salient.version for _, salient in self.weights]
        if versions == self.versions and not always:
            return
        self.versions = versions
        index = torch.cat([salient.index for _, salient in self.weights])
        here = (index >= self.start) & (index < self.stop)
        own = torch.where(here, index - self.start, -1) + self.base
        self.index.copy_(own.sort().values - self.base)


def spread(held: Tensor, places: Tensor, size: int, dim: int, weight: Any, channels: int) -> Tensor:
    """What ranks hold for some of a set's channels each, as a DTensor for all of it, which can be placed anew.

    Args:
        held: of this rank.
        places: of its channels in the set.
        size: of the set.
        dim: of `held`, that the channels lie along.
        weight: a DTensor, sharded over the ranks.
        channels: the weight's dimension that the channels lie along.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    shape = list(held.shape)
    shape[dim] = size
    whole = held.new_zeros(shape).index_copy_(dim, places, held)
    split = [shard_dim(one) for one in weight.placements]
    # Along the other dimension as the weight is: FSDP2 over tensor parallelism shards it in another order than `Shard`.
    others = weight.placements if held.ndim > 1 else [Replicate()] * len(split)
    added = [
        Replicate() if of is None else Partial() if of == channels else other
        for of, other in zip(split, others, strict=True)
    ]
    placed = [Shard(dim) if one.is_partial() else one for one in added]
    if held.ndim > 1:
        shape[1 - dim] = weight.shape[1 - channels]
    stride = torch.empty(shape, device="meta").stride()
    one = DTensor.from_local(whole, weight.device_mesh, added, run_check=False, shape=torch.Size(shape), stride=stride)
    return one.redistribute(placements=placed)


def assembled(tensor: Any) -> Tensor:
    """A tensor of which ranks hold parts, on each of them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
