"""`SalientLinear`: a linear layer that feeds activation statistics and updates its salient channels only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longact_kernels.functional import project
from longact_kernels.sparse.salient_set import SalientSet
from longact_kernels.sparse.sharding import is_sharded
from longact_kernels.sparse.tensor_parallel import project_part, wrapped_forward

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SalientLayer(nn.Module):
    """A linear layer with a salient set."""

    salient: SalientSet = None  # type: ignore[assignment]
    weight: Tensor
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        salient = self.salient
        if salient is None:
            return super().forward(x)
        own: dict[str, Any] = self._parameters
        try:  # as attributes, nn.Module looks for each elsewhere first, which takes a microsecond
            weight, bias = own["weight"], own["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        if not (self.training and torch.is_grad_enabled() and weight.requires_grad):
            # A block that reentrant checkpointing will repeat runs without gradients.
            salient.call.unrecorded |= self.training and not torch.is_grad_enabled()
            return salient.plain.forward(self, x)
        plain = type(weight) is nn.Parameter  # seen at once, as nearly always
        if not plain and not isinstance(weight, nn.Parameter):
            raise RuntimeError(
                f"LongAct: the weight of {salient.name} is no parameter of its layer any more (flattened by FSDP1, "
                "made by a parametrisation, given by torch.func); use FSDP2 (fully_shard), plain weights, or restore()"
            )
        if weight.dtype not in _DTYPES:
            raise RuntimeError(f"LongAct: the weight of {salient.name} is {weight.dtype}; needed float32 or 16 bits")
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not look inside an autograd.Function: cast as it casts for F.linear.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        stats = salient.stats
        l2 = mask = bounds = None
        if stats is not None and (tokens := salient.call.tokens_now()) is not None:
            l2 = stats.l2
            if not salient.routed:
                mask, bounds = tokens.of(x, l2, salient.name)
        if not plain and is_sharded(weight):
            return project_part(x, weight, bias, salient, l2, mask, bounds)
        return project(x, weight, bias, salient, l2, mask, bounds)


class SalientLinear(SalientLayer, nn.Linear):
    """An `nn.Linear` with the same parameters, state-dict keys, forward values and input gradient.

    In training mode with gradients on, it measures the magnitude of each channel of its activation, and the gradient of
    `weight` is zero outside the salient set. `LongAct` turns a linear layer into one by changing its class. With
    `salient` None it is a plain `nn.Linear`.
    """


class SalientConv1D(SalientLayer):
    """`SalientLinear` for transformers' `Conv1D`, a linear layer whose weight is stored [in_features, out_features]."""


def become_salient(module: nn.Module, salient: SalientSet) -> SalientLayer:
    """Gives a linear layer a salient set. The module stays itself, with its parameters and hooks."""
    module.__class__ = SalientConv1D if salient.transposed else SalientLinear
    assert isinstance(module, SalientLayer)
    module.salient = salient
    if (cell := wrapped_forward(module)) is not None:
        cell.cell_contents = module.__class__.forward.__get__(module)
    return module


def become_plain(layer: SalientLayer) -> None:
    """Makes a layer what it was before it had a salient set."""
    plain = layer.salient.plain
    del layer.salient
    layer.__class__ = plain  # type: ignore[assignment]
    if (cell := wrapped_forward(layer)) is not None:
        cell.cell_contents = plain.forward.__get__(layer)
