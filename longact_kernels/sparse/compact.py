"""Compact gradients: fp32 sums of the salient channels' gradients alone, outside of `weight.grad`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longact_kernels.sparse import gradients
from longact_kernels.sparse.flat import Flat
from longact_kernels.sparse.layer import SalientLayer
from longact_kernels.sparse.sharding import Ranks, is_sharded

ANYWHERE = None  # the key, beside the layers' names, of whether ranks have put something there


class CompactGradients:
    """The accumulators of all layers, in one flat buffer, and their average over the ranks.

    Args:
        model: the model.
        layers: its layers with a salient set, by name.
        ranks: whose gradients are averaged.

    Attributes:
        flat: the accumulators by layer, but of those that have been frozen all along, and for each layer whether it
            holds anything; None before there is a set.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SalientLayer], ranks: Ranks):
        self.model, self.layers, self.ranks = model, layers, ranks
        self.flat: Flat | None = None
        self._shared = False
        ignored = [f"{name}.weight" for name in layers]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        self._hooks = [layer.register_forward_pre_hook(self._share_weights) for layer in layers.values()]

    @property
    def alone(self) -> bool:
        """Whether nothing else of the model trains."""
        return not any(p.requires_grad for p in self.beside())

    def beside(self) -> list[nn.Parameter]:
        """The model's other parameters."""
        salient = {id(layer.weight) for layer in self.layers.values()}
        return [p for p in self.model.parameters() if id(p) not in salient]

    def undo(self) -> list[Callable[[], Any]]:
        """What leaves the model as it was."""
        ignored = partial(delattr, self.model, "_ddp_params_and_buffers_to_ignore")
        return [ignored, *(hook.remove for hook in self._hooks)]

    def check(self) -> None:
        """Raises ValueError for weights that compact gradients do not go with.

        Those of FSDP's root show that they are sharded only outside of a forward.
        """
        for name, layer in self.layers.items():
            if is_sharded(layer.weight):
                raise ValueError("grad: 'compact' keeps gradients of whole weights, got sharded ones; use grad='full'")
            if layer.weight._backward_hooks or layer.weight._post_accumulate_grad_hooks:
                raise ValueError(
                    f"grad: the weight of {name} has a gradient hook, which would not see its compact gradient; use "
                    "grad='full'"
                )

    def check_untouched(self) -> None:
        """Raises RuntimeError where somebody has scaled or clipped all other gradients and not these.

        Called before all that reads them. DistributedDataParallel changes gradients after a backward, too.
        """
        if not self.ranks.alone:
            return
        for layer in self.layers.values():
            salient = layer.salient
            # A gradient of its own shows that another backward has come, which has changed the others' too.
            if salient.has_grad and layer.weight.grad is None and salient.passes.touched():
                if salient.passes.is_zero():
                    salient.has_grad = False  # zeroed by hand
                    continue
                raise RuntimeError(
                    "grad: gradients were clipped or changed since the backward by something that does not see compact "
                    "ones; clip with longact.clip_grad_norm_(), scale the loss instead of gradients, add penalties to "
                    "it, or use grad='full'"
                )

    def _share_weights(self, *_: Any) -> None:
        """Gives all ranks the first one's weights, once, where DistributedDataParallel was told to ignore them."""
        if self._shared or self.ranks.alone:
            return
        self._shared = True
        for layer in self.layers.values():
            if not is_sharded(layer.weight):
                self.ranks.share(layer.weight.data)

    def place(self, device: torch.device) -> None:
        """Puts the accumulators on a device; tells layers where theirs are, and what gets a gradient beside them."""
        if self.flat is not None:
            self.flat.move(device)
        for name, layer in self.layers.items():
            layer.salient.grad = None if self.flat is None else self.flat.parts.get(name)
            block = self.model.get_submodule(".".join(name.split(".")[:-2]))
            layer.salient.passes.block = frozenset(map(id, block.parameters()))

    def begin_step(self) -> None:
        """Has backward put the gradients of sets into accumulators from now on."""
        held = {} if self.flat is None else self.flat.shapes
        trained = [name for name, layer in self.layers.items() if layer.weight.requires_grad]
        if any(layer.salient.chosen for layer in self.layers.values()) and not held.keys() >= {*trained}:
            shapes: dict[str | None, Sequence[int]] = {**held, ANYWHERE: [len(self.layers)]}
            for name in trained:
                shape = list(self.layers[name].weight.shape)
                shape[self.layers[name].salient.dim] = self.layers[name].salient.size
                shapes[name] = shape
            self.flat = Flat(shapes, next(iter(self.layers.values())).weight.device)
        if self.flat is not None:
            for name, layer in self.layers.items():
                layer.salient.grad, layer.salient.has_grad = self.flat.parts.get(name), False

    def present(self) -> list[Tensor]:
        """Those that backward has put somewhere since they were last zeroed."""
        sets = (layer.salient for layer in self.layers.values())
        return [salient.grad for salient in sets if salient.grad is not None and salient.has_grad]

    def reduce(self) -> None:
        """Averages the gradients of all ranks: those of weights that DistributedDataParallel ignores."""
        if self.ranks.alone:
            return
        grads = self._dense()
        sets = [layer.salient for layer in self.layers.values()]
        if self.flat is not None:
            for layer in self.layers.values():
                salient = layer.salient
                if salient.grad is None:  # frozen
                    continue
                if not salient.has_grad:
                    salient.grad.zero_()
                    salient.has_grad = salient.active and layer.weight.grad is not None
                gradients.compact_grad(layer)
            self.flat.parts[ANYWHERE].copy_(torch.tensor([float(salient.has_grad) for salient in sets]))
            grads.append(self.flat.buffer)
        for grad in grads:
            self.ranks.all_reduce(grad, "sum")
            grad.div_(self.ranks.size)
        if self.flat is not None and not all(salient.has_grad for salient in sets):
            for salient, share in zip(sets, self.flat.parts[ANYWHERE].tolist(), strict=True):
                salient.has_grad = share > 0

    def _is_dense(self, layer: SalientLayer) -> bool:
        return not layer.salient.active or (layer.salient.grad is None and layer.weight.requires_grad)

    def _dense(self) -> list[Tensor]:
        """The gradients of weights without a set, of which a rank may have none where others have one."""
        layers = [layer for layer in self.layers.values() if self._is_dense(layer)]  # the same on all ranks
        if not layers:
            return []
        anywhere = torch.tensor([float(layer.weight.grad is not None) for layer in layers])
        anywhere = anywhere.to(layers[0].weight.device)
        self.ranks.all_reduce(anywhere, "max")
        reached = [layer.weight for layer, there in zip(layers, anywhere.tolist(), strict=True) if there]
        for weight in reached:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return [weight.grad for weight in reached if weight.grad is not None]
