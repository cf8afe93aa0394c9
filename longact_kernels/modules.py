"""`SalientLinear`: an `nn.Linear` that feeds activation statistics and updates its salient rows only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longact_kernels.functional import RunningStats, salient_linear

if TYPE_CHECKING:
    from longact_kernels.saliency import LongAct


@dataclass(eq=False)
class SalientChannels:
    """The salient set of one projection: carried by its `SalientLinear` and, as `weight.salient`, by its weight.

    Attributes:
        name: the projection's module name.
        owner: the controller that chooses the set.
        stats: this projection's part of the controller's statistics.
        group: channels that compete with one another: those of a head, or all.
        count: how many of each group are salient.
        rows: the set, int64 [S] ascending; None until the first refresh.
        fixed: whether the set holds for the step under way, so that backward may compute its rows alone.
        fed: whether a training forward has come since the last refresh.
    """

    name: str
    owner: LongAct
    stats: RunningStats
    group: int
    count: int
    rows: Tensor | None = None
    fixed: bool = False
    fed: bool = False


def salient_channels(weight: Tensor) -> SalientChannels | None:
    """The salient set that a weight carries; None for an ordinary parameter."""
    return getattr(weight, "salient", None)


class SalientLinear(nn.Linear):
    """An `nn.Linear` with the same parameters, state-dict keys, forward values and input gradient.

    While it is training with gradients on, its activation's magnitude is recorded for every output channel, and the
    gradient of `weight` is zero outside the salient set. With `salient` None it is a plain `nn.Linear`.
    """

    salient: SalientChannels | None = None

    def bind(self, salient: SalientChannels | None) -> None:
        """Makes the layer and its weight carry a salient set, or none."""
        self.salient = salient
        if salient is None:
            del self.weight.salient  # type: ignore[attr-defined]
        else:
            self.weight.salient = salient  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        salient = self.salient
        if salient is None or not (self.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not look inside an autograd.Function: cast as it casts for F.linear.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        salient.fed = True
        rows = salient.rows if salient.fixed else None
        return salient_linear(
            x, weight, bias, rows, salient.owner.stats_on(salient, x.device), salient.owner.mask_for(x)
        )
