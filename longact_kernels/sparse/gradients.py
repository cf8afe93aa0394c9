"""Gradients of salient weights: masked where backward left them dense, and compact ones."""

from __future__ import annotations

import torch
from torch import Tensor

from longact_kernels.sparse.layer import SalientLayer
from longact_kernels.sparse.sharding import local, local_mask


def mask_(layer: SalientLayer, outside: Tensor) -> None:
    """Zeroes the gradient of a layer's weight in the channels of all layers that are in no set, bool [channels]."""
    weight, salient = layer.weight, layer.salient
    if weight.grad is not None:
        own = local_mask(weight, outside[salient.channels], salient.dim)
        local(weight.grad).masked_fill_(own.unsqueeze(1 - salient.dim), 0)


def spill(layer: SalientLayer) -> None:
    """Adds a layer's compact gradient to the weight's own."""
    salient, weight = layer.salient, layer.weight
    if salient.grad is not None and salient.has_grad:
        places = (salient.index >= 0).nonzero().flatten()
        part = salient.grad.index_select(salient.dim, places).to(weight.dtype)
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad.index_add_(salient.dim, salient.index[places], part)
        salient.has_grad = False


def compact_grad(layer: SalientLayer) -> Tensor | None:
    """What backward has put into a layer's accumulator; with a dense gradient beside it, that of both."""
    salient, weight = layer.salient, layer.weight
    if salient.grad is None or not salient.has_grad:
        return None
    if weight.grad is not None:
        # From a pass that was not the layer's own, such as one in evaluation mode.
        filled = salient.index >= 0
        part = weight.grad.index_select(salient.dim, salient.index.clamp(min=0)).float()
        salient.grad += part.masked_fill_(~filled.unsqueeze(1 - salient.dim), 0)
        weight.grad = None
    return salient.grad


def clip_(grads: list[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales gradients as `torch.nn.utils.clip_grads_with_norm_` does those of parameters."""
    if grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
