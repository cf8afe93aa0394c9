"""Every controller in use: what optimizers find salient weights by."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from longact_kernels.sparse.layer import SalientLayer

_registry: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(longact: Any) -> None:
    _registry[id(longact)] = longact


def controllers() -> list[Any]:
    """Every `LongAct` in use. Threads may make others meanwhile."""
    return [longact for reference in _registry.valuerefs() if (longact := reference()) is not None]


def salient_weights() -> dict[int, tuple[Any, SalientLayer]]:
    """The controller and the layer of every weight that has a salient set, by the id of the parameter.

    Read from the layers at each call: FSDP2 and others replace parameter objects.
    """
    return {id(layer.weight): (longact, layer) for longact in controllers() for layer in longact.layers.values()}


def params_of(groups: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The parameters of an optimizer's groups in order, or what stands for them in a state dict."""
    for group in groups:
        yield from group["params"]


def ids_of(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer holds."""
    return {id(p) for p in params_of(optimizer.param_groups)}


def _refuse_strangers(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Before any optimizer's step: one that we do not know of would train salient weights densely."""
    if getattr(optimizer, "steps_salient_weights", False) or not _registry:
        return
    known = getattr(optimizer, "_longact", None)
    salient = salient_weights()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in salient and p.requires_grad and salient[id(p)][0] is not known:
                raise RuntimeError(
                    f"LongAct: an optimizer ({type(optimizer).__name__}) that knows nothing of it is about to train "
                    f"{salient[id(p)][1].salient.name} densely; call longact.attach(optimizer), or use SalientAdamW"
                )


def _note_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """After any optimizer's step."""
    for longact in controllers():
        longact.batch.stepped(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_pre_hook(_refuse_strangers)
register_optimizer_step_post_hook(_note_step)
