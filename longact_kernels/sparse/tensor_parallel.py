"""Tensor parallelism: projections of which each rank computes some output channels."""

from __future__ import annotations

from types import CellType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from longact_kernels.functional import Axis, project
from longact_kernels.sparse.salient_set import SalientSet
from longact_kernels.sparse.sharding import bounds, local_channels, shard_dim


class Part:
    """What `project` looks up for a part of a layer: the set and the statistics of the channels that lie there.

    Args:
        salient: the set of the whole layer.
        weight: of the layer, a DTensor.
    """

    grad: Tensor | None = None

    def __init__(self, salient: SalientSet, weight: Any):
        self.salient = salient
        self.axis: Axis = salient.axis
        self.transposed = salient.transposed
        self.start, self.count = bounds(weight, salient.dim)
        self.others = self.start, weight.shape[salient.dim] - self.start - self.count
        salient.share = self.count / weight.shape[salient.dim]

    def begin(self, measured: tuple[Tensor, ...]) -> Tensor | None:
        """As of `SalientSet`."""
        index = self.salient.begin(tuple(nn.functional.pad(one, self.others) for one in measured))
        if index is None or not any(self.others):
            return index
        return local_channels(index, self.start, self.count, self.salient.most(self.start, self.start + self.count))

    def accumulator(self) -> NoReturn:
        raise AssertionError("compact gradients are those of whole weights")


def project_part(x: Any, weight: Any, bias: Any, salient: SalientSet, *counted: Any) -> Any:
    """`project` of this rank's output channels: on local tensors, and out again as a DTensor.

    Args:
        x: whole, on every rank.
        counted: the arguments of `project` that say what is measured.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, output = weight.device_mesh, int(salient.transposed)
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if any(shard_dim(one) not in (None, output) for one in weight.placements) or not all(
        one.is_replicate() for one in x.placements
    ):
        raise RuntimeError(
            f"LongAct: the weight of {salient.name} is placed {weight.placements}, its input {x.placements}; needed "
            "ColwiseParallel, which keeps heads whole, with an input that all ranks have"
        )
    split = [shard_dim(one) is not None for one in weight.placements]
    x = x.to_local(grad_placements=[Partial() if of_dim else Replicate() for of_dim in split])
    bias = None if bias is None else bias.to_local()
    y = project(x, weight.to_local(), bias, Part(salient, weight), *counted)
    shape = torch.Size([*y.shape[:-1], weight.shape[output]])
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(y.ndim - 1) if of_dim else Replicate() for of_dim in split]
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=shape, stride=stride)


def wrapped_forward(module: nn.Module) -> CellType | None:
    """Where transformers' tensor parallelism keeps the forward of a layer that it has put its own in front of."""
    forward: Any = vars(module).get("forward")
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel":
        return None
    return dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True)).get("original_forward")
