"""What has gone through backward since gradients were last zeroed: that, and nothing else, counts in the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longact_kernels.sparse.sharding import is_sharded


class Batch:
    """The backward passes of the step under way.

    Salient layers call `enter` in their backward, before anything else.

    Args:
        model: whose parameters tell whether somebody has zeroed gradients.
        begin: called when a backward pass begins.
        drop: called when what came before has been zeroed since.

    Attributes:
        present: whether a backward has come.
    """

    def __init__(self, model: nn.Module, begin: Callable[[], None], drop: Callable[[], None]):
        self.model, self.begin, self.drop = model, begin, drop
        self.clear()

    def clear(self) -> None:
        """Forgets what came: a step has used it, or it was dropped."""
        self.present = False
        self.task = -1
        self.witness: Tensor | None = None
        self.version = 0  # of its gradient, after the last backward
        self.told: Tensor | bool = False  # whether its gradient was not zero then

    def enter(self) -> None:
        task = torch._C._current_graph_task_id()
        if self.present and task == self.task:
            return
        self.task = task
        self.begin()
        self.drop_zeroed(wait=True)
        self.present, self.task = True, task
        if task != -1:
            torch.autograd.Variable._execution_engine.queue_callback(self._find_witness)  # type: ignore[attr-defined]

    def drop_zeroed(self, wait: bool = False) -> None:
        """Drops a batch whose gradients somebody has zeroed without telling us.

        Args:
            wait: on a GPU too, look at gradients that somebody has changed in place.
        """
        if not self.present or self.witness is None:
            return
        grad = self.witness.grad
        changed = grad is not None and grad._version != self.version and (wait or grad.is_cpu)
        # One that was zero already, as where all completions earn the same, is so after clipping too.
        if grad is None or (changed and self.told and not grad.any()):
            self.drop()

    def _find_witness(self) -> None:
        """A parameter that got a gradient in this backward: as long as it has one, nobody has zeroed them."""
        if self.present and self.witness is None:
            # The smallest: it is read in every backward.
            self.witness = min(
                (p for p in self._parameters() if p.grad is not None), key=lambda p: p.numel(), default=None
            )
        if self.witness is not None and self.witness.grad is not None:
            self.version = self.witness.grad._version
            self.told = self.witness.grad.any()

    def _parameters(self) -> Iterable[Tensor]:
        # Of a sharded parameter, gradients come and go with every backward that is accumulated.
        return (p for p in self.model.parameters() if p.requires_grad and not is_sharded(p))

    def __getstate__(self) -> dict:
        # Copies are made between steps.
        return {**self.__dict__, "witness": None, "told": False, "task": -1}


class TellingZeroGrad:
    """A model's or an optimizer's `zero_grad` that tells when it has run; an object, so that a copy has its own."""

    def __init__(self, owner: Any, tell: Callable[[], None]):
        self.owner, self.tell = owner, tell
        self.own = owner.__dict__.get("zero_grad")  # somebody else's, in place of the class's
        owner.zero_grad = self

    def __call__(self, set_to_none: bool = True) -> None:
        zero_grad = self.own or partial(type(self.owner).zero_grad, self.owner)
        zero_grad(set_to_none)
        self.tell()

    def undo(self) -> None:
        if self.owner.__dict__.get("zero_grad") is self:
            del self.owner.zero_grad
            if self.own is not None:
                self.owner.zero_grad = self.own
