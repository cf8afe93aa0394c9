"""A stock optimizer whose steps see masked gradients, and move a controller's sets on: the paper's literal form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longact_kernels.ops.sparse_adamw import check_number
from longact_kernels.sparse.batch import TellingZeroGrad
from longact_kernels.sparse.registry import ids_of


def attach(longact: Any, optimizer: Any) -> None:
    """What `LongAct.attach` does."""
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: got a {type(optimizer).__name__}, needed a torch.optim.Optimizer")
    if not longact.layers:
        longact.check_trains()
    if longact.config.grad == "compact":
        raise ValueError("attach: a stock optimizer does not see compact gradients; needed grad='full'")
    if getattr(optimizer, "steps_salient_weights", False):
        return  # it finds its controllers by itself
    for inner in vars(optimizer).values():
        known = getattr(inner, "steps_salient_weights", False) or getattr(inner, "_longact", None) is longact
        if isinstance(inner, torch.optim.Optimizer) and not known:
            raise ValueError(
                f"attach: this {type(optimizer).__name__} steps by the {type(inner).__name__} in it; attach that "
                "one before it is wrapped, or have SalientAdamW in its place"
            )
    longact.check()
    if not longact.held_by(optimizer):
        raise ValueError(
            f"attach: this {type(optimizer).__name__} holds none of the {len(longact.layers)} salient weights; "
            "needed the optimizer of LongAct's own model"
        )
    attached = getattr(optimizer, "_longact", None)
    if attached is longact:
        return
    if attached is not None and attached.layers:
        raise ValueError(
            "attach: another LongAct is attached to this optimizer, which takes one; use SalientAdamW, which takes "
            "any number, or an optimizer for each model"
        )
    Attached(longact, optimizer)


class Attached:
    """What connects an optimizer with a controller, by the optimizer's hooks.

    Args:
        longact: the controller.
        optimizer: of torch, or like torch's.
    """

    def __init__(self, longact: Any, optimizer: Any):
        self.longact = longact
        self.verdict: Tensor | None = None  # that of the step under way
        optimizer._longact = longact
        TellingZeroGrad(optimizer, lambda: longact.zero_grad(ids_of(optimizer)))
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._check)
        optimizer.register_load_state_dict_post_hook(self._load)
        self._check(optimizer, {"param_groups": optimizer.param_groups})  # what was loaded before
        self._load(optimizer)

    def _before(self, optimizer: Any, args: tuple, kwargs: dict) -> Any:
        if not self.longact.layers:
            return None  # restored
        self.longact.begin_step(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            for name in ("lr", "eps", "weight_decay"):
                if isinstance(value := group.get(name), float):  # not a tensor, which would be waited for
                    check_number(f"param_groups[{i}]: {name}", value)
        # The optimizer itself is the first of a step's arguments.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare(optimizer)
            return None

        def masked_closure() -> Any:
            loss = closure()
            self._prepare(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], masked_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": masked_closure}

    @torch.no_grad()
    def _prepare(self, optimizer: Any) -> None:
        """Masks gradients, and keeps bad ones from the weights.

        A fused optimizer reads a flag on the device, as GradScaler gives it. Others would have to be told on the host,
        which waits for it: they pass over parameters whose gradients are taken away.
        """
        longact = self.longact
        self._untell(optimizer)  # of a step that failed
        longact.prepare_step()
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scaled = getattr(optimizer, "found_inf", None) is not None
        grads = [p.grad for p in params]
        self.verdict = None if scaled else longact.verdict(grads, lambda i: longact.name_of(params[i]))
        if self.verdict is not None and all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = self.verdict.float()
        elif self.verdict is not None and self.verdict:
            for p in params:
                p.grad = None
        longact.mask_again(set(map(id, params)))  # also what did not come through the layers

    def _after(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        if self.longact.layers:
            bad = getattr(optimizer, "found_inf", None) if self.verdict is None else self.verdict
            self.longact.end_step(optimizer, bad)
        self._untell(optimizer)

    def _untell(self, optimizer: Any) -> None:
        if self.verdict is not None:
            optimizer.__dict__.pop("found_inf", None)
            self.verdict = None

    def _save(self, optimizer: Any, saved: dict[str, Any]) -> None:
        longact = self.longact
        saved["param_groups"][0]["longact"] = {
            name: longact.state_for(layer.salient) for name, layer in longact.layers.items()
        }

    def _check(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        """Before anything is loaded, whether the sets can be."""
        groups = state_dict["param_groups"]
        saved = groups[0].get("longact") if groups else None
        if not saved:
            return
        layers = self.longact.layers
        if not isinstance(saved, Mapping) or not all(isinstance(own, Mapping) for own in saved.values()):
            raise ValueError("load_state_dict: 'longact' is no dict of dicts; the checkpoint is damaged")
        if unknown := saved.keys() - layers.keys():
            raise ValueError(
                f"load_state_dict: {min(unknown)} was saved with a salient set, and is no layer of this LongAct; use "
                "the target_modules of the saved run"
            )
        for name, layer in layers.items():
            self.longact.check_state_for(layer.salient, saved.get(name, {}))

    def _load(self, optimizer: Any) -> None:
        saved = optimizer.param_groups[0].pop("longact", None)
        for name, layer in self.longact.layers.items() if saved else ():
            self.longact.load_state_for(layer.salient, saved[name])
