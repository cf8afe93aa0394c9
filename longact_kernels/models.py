"""Finding the query and key projections of a model, and putting other linear modules in their place."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from longact_kernels.modules import SalientLinear

LinearT = TypeVar("LinearT", bound=nn.Linear)

PROJECTIONS = ("q_proj", "k_proj")


class Projection(NamedTuple):
    """A query or key projection: its module name, the module, and the channels of one head."""

    name: str
    linear: nn.Linear
    head_dim: int


def find_projections(model: nn.Module) -> list[Projection]:
    """The `q_proj` and `k_proj` linear layers of a model, in the order of its modules.

    Raises:
        ValueError: if there are none (naming the linear layers seen), if one is not a plain `nn.Linear` (quantised,
            adapted or already salient), or if the size of a head cannot be told.
    """
    found = []
    for name, parent in model.named_modules():
        for child in PROJECTIONS:
            module = getattr(parent, child, None)
            if isinstance(module, nn.Module):
                path = f"{name}.{child}" if name else child
                linear = _plain(path, module)
                found.append(Projection(path, linear, _head_dim(path, parent, linear, model)))
    if not found:
        seen = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"model: no query or key projections in {type(model).__name__}; looked for linear layers named "
            f"{' and '.join(PROJECTIONS)}, saw {', '.join(seen) or 'no linear layers at all'}"
        )
    return found


def _plain(path: str, module: nn.Module) -> nn.Linear:
    if type(module) is nn.Linear:
        return module
    if isinstance(module, SalientLinear):
        raise ValueError(f"model: {path} is a SalientLinear already; call restore() on the LongAct that swapped it in")
    raise ValueError(
        f"model: {path} is a {type(module).__module__}.{type(module).__name__}; needed a plain torch.nn.Linear "
        "(quantised or adapter-wrapped projections cannot be trained row by row)"
    )


def _head_dim(path: str, attention: nn.Module, linear: nn.Linear, model: nn.Module) -> int:
    config: Any = getattr(attention, "config", None) or getattr(model, "config", None)
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    if head_dim is None and hasattr(config, "num_attention_heads"):
        head_dim = config.hidden_size // config.num_attention_heads
    if not isinstance(head_dim, int) or linear.out_features % head_dim:
        raise ValueError(
            f"model: cannot tell the head size of {path}: got {head_dim} for {linear.out_features} output channels; "
            "needed `head_dim` on the attention module or in the model's config, dividing the channels"
        )
    return head_dim


def replace_linear(model: nn.Module, name: str, cls: type[LinearT]) -> LinearT:
    """Puts a `cls` with the very same parameter objects in the place of the linear layer `name`, and returns it."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = cls(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    new.weight, new.bias = old.weight, old.bias
    new.train(old.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return new


def token_models(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are called with tokens and their padding mask: a language model and what it wraps."""
    for module in model.modules():
        parameters = inspect.signature(module.forward).parameters
        if "input_ids" in parameters and "attention_mask" in parameters:
            yield module


def token_mask(module: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The bool [B, T] token mask in a call of one of `token_models`, or None where the call has none."""
    call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    mask = call.get("attention_mask", call.get("kwargs", {}).get("attention_mask"))
    return mask != 0 if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
