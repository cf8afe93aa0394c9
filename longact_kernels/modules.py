"""`SalientLinear`: a linear layer that feeds activation statistics and updates its salient channels only."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longact_kernels.functional import Axis, salient_linear

if TYPE_CHECKING:
    from longact_kernels.saliency import LongAct


@dataclass(eq=False)
class SalientChannels:
    """The salient set of one projection, carried by its layer.

    Attributes:
        name: the projection's module name.
        plain: the class that the layer had before.
        owner: the controller that chooses the set.
        channels, segments: the projection's part of the controller's statistics: channels, and segments of such.
        heads: how many channels each head has.
        size: how many channels the set holds.
        axis: what a channel is: one of the projection's output ("rows") or input ("columns").
        transposed: whether the weight is stored [in_features, out_features].
        rows: the set, int64 [size] ascending, behind its empty slots (-1); None until the first refresh.
        before: the set of the refresh before, if any.
        first: the set of the first refresh.
        fixed: whether the set holds for the step under way, so that backward may compute its channels alone.
        fed: whether a training forward has come since the last refresh.
    """

    name: str
    plain: type[nn.Module]
    owner: LongAct
    channels: slice
    segments: slice
    heads: list[int]
    size: int
    axis: Axis
    transposed: bool
    rows: Any = None
    before: Any = None
    first: Any = None
    fixed: bool = False
    fed: bool = False

    @property
    def dim(self) -> int:
        """The dimension of the stored weight that the channels lie along."""
        return int((self.axis == "columns") != self.transposed)

    @property
    def grad(self) -> Tensor | None:
        """The fp32 accumulator of the set's gradient, where the controller keeps those in place of whole gradients."""
        grads = self.owner.accumulators
        return None if grads is None else grads.parts[self.name]


controllers: weakref.WeakSet[LongAct] = weakref.WeakSet()
"""Every `LongAct` in use."""


def salient_weights() -> dict[int, SalientChannels]:
    """The salient set of every weight that has one, by the id of the parameter.

    Read from the layers at each call: FSDP2 and others replace parameter objects.
    """
    return {id(layer.weight): layer.salient for owner in controllers for layer in owner.layers.values()}


class SalientLayer(nn.Module):
    """A linear layer with a salient set."""

    salient: SalientChannels = None  # type: ignore[assignment]
    weight: Tensor
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        salient = self.salient
        weight, bias = self.weight, self.bias
        if salient is None:
            return super().forward(x)
        if not (self.training and torch.is_grad_enabled() and weight.requires_grad):
            return salient.plain.forward(self, x)
        owner = salient.owner
        owner.share_weights()
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not look inside an autograd.Function: cast as it casts for F.linear.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        stats = owner.stats_on(salient, salient.segments.start, x.device) if owner.site == "projection" else None
        rows, grad = (salient.rows, salient.grad) if salient.fixed else (None, None)
        mask, cu_seqlens = owner.tokens.of(x)
        if cu_seqlens is None:
            return salient_linear(x, weight, bias, rows, stats, mask, None, salient.axis, salient.transposed, grad)
        y = salient_linear(x[0], weight, bias, rows, stats, None, cu_seqlens, salient.axis, salient.transposed, grad)
        return y.unsqueeze(0)


class SalientLinear(SalientLayer, nn.Linear):
    """An `nn.Linear` with the same parameters, state-dict keys, forward values and input gradient.

    While it is training with gradients on, the magnitude of its activation is recorded for every channel, and the
    gradient of `weight` is zero outside the salient set. `LongAct` makes one of a linear layer by giving it this class;
    with `salient` None it is a plain `nn.Linear`.
    """


class SalientConv1D(SalientLayer):
    """`SalientLinear` for transformers' `Conv1D`, a linear layer whose weight is stored [in_features, out_features]."""


def become_salient(module: nn.Module, salient: SalientChannels) -> SalientLayer:
    """Gives a linear layer a salient set. The module stays itself, with its parameters and hooks."""
    module.__class__ = SalientConv1D if salient.transposed else SalientLinear
    assert isinstance(module, SalientLayer)
    module.salient = salient
    return module
