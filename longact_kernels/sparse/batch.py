"""What has gone through backward since gradients were last zeroed: that, and nothing else, counts in the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from longact_kernels.sparse.sharding import is_sharded


@dataclass(eq=False)
class Pass:
    """The passes of one layer through backward, in the step under way.

    Attributes:
        weight: the layer's weight.
        own: the same, if its gradient lies there.
        block: ids of the parameters of the layer's block, which stand for it before others do.
        came: whether a pass has come.
        witness: a parameter that gets its gradient later in the same backward than the layer: while it has one, nobody
            has zeroed the layer's. It stays from step to step.
        version, told: of the witness's gradient after the last backward: which one it was, and its largest magnitude,
            False if nobody looks at that.
    """

    weight: Tensor | None = None
    own: Tensor | None = None
    block: frozenset[int] = frozenset()
    came: bool = False
    witness: Tensor | None = None
    version: int | None = None
    told: Tensor | bool = False
    _without: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets the passes: a step has used them, or they were dropped."""
        self.came, self.version = False, None

    def look_for_witness(self, without: list[Tensor]) -> None:
        """Called when a backward begins.

        Args:
            without: what had no gradient then, of the parameters that get one beside compact ones.
        """
        candidates = without if self.own is None else [self.own]
        self._without = [p for p in candidates if p.grad is None]

    def end(self) -> Tensor | None:
        """Looks at the witness after a backward; returns its gradient if whether that is zero is worth knowing."""
        if self.witness is None:
            reached = [p for p in self._without if p.grad is not None]
            self.witness = min(reached, key=lambda p: (id(p) not in self.block, p.numel()), default=None)
            self._without = []
        grad = None if self.witness is None else self.witness.grad
        if grad is None:  # it trains no more
            self.witness = self.version = None
            return None
        self.version, self.told = grad._version, False
        return grad if 0 < grad.numel() < SMALL else None

    def zeroed(self, begins: bool) -> bool:
        """Whether somebody has zeroed the layer's gradients without telling us.

        Args:
            begins: a backward begins, before which nobody else changes gradients: if they have been, see whether to
                zero. (After one, clipping changes them.)
        """
        if self.version is None or self.witness is None:
            return False
        grad = self.witness.grad
        if grad is None:
            return True
        # One that was zero already, as where all completions earn the same, says nothing.
        return bool(begins and grad._version != self.version and self.told and not grad.any())

    def touched(self) -> bool:
        """Whether somebody has changed the witness's gradient since the last backward (not clipped to no effect)."""
        grad = None if self.witness is None else self.witness.grad
        if grad is None or self.version in (None, grad._version) or not isinstance(self.told, Tensor):
            return False
        return not torch.equal(torch.linalg.vector_norm(grad, inf).to(self.told), self.told)

    def is_zero(self) -> bool:
        """Whether the witness's gradient is nothing but zeros."""
        grad = None if self.witness is None else self.witness.grad
        return grad is None or not grad.any()

    def __getstate__(self) -> dict:
        return {
            **self.__dict__,
            "weight": None,
            "own": None,
            "block": frozenset(),
            "witness": None,
            "version": None,
        }


# Of a witness with more elements, what it holds is not looked at.
SMALL = 2**16


class Unseen:
    """Looks for weights that change without a step that anybody has told of: somebody else trains them, densely."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Tensor]] = {}  # by weight, after its last backward
        self.times = 0

    def note(self, weight: Tensor | None) -> None:
        if weight is not None and not is_sharded(weight):
            self.seen[id(weight)] = weight._version, weight.detach().flatten()[:16].clone()

    def check(self, weight: Tensor | None) -> None:
        """Called when another backward begins.

        Raises:
            RuntimeError: at the second change: a first one may be a checkpoint that was loaded.
        """
        if weight is None or id(weight) not in self.seen:
            return
        version, part = self.seen[id(weight)]
        if version != weight._version or not torch.equal(part, weight.detach().flatten()[:16]):
            self.times += 1
            if self.times > 1:
                raise RuntimeError(
                    "LongAct: salient weights have changed twice without a step that it knows of, so that they "
                    "train densely; step them by SalientAdamW or by an optimizer given to longact.attach(), or "
                    "around a step by hand call longact.mask_gradients() and longact.advance()"
                )
        self.seen.clear()

    def __getstate__(self) -> dict:
        return {"seen": {}, "times": 0}


class Batch:
    """The backward passes of the step under way.

    Salient layers call `enter` in their backward, before anything else.

    Args:
        begin: called when a backward pass begins.
        drop: called with the layers' passes that have been zeroed since they came.
        end: called when a backward pass has ended.
    """

    def __init__(self, begin: Callable[[], None], drop: Callable[[list[Pass]], None], end: Callable[[], None]):
        self.begin, self.drop, self.end = begin, drop, end
        self.passes: list[Pass] = []
        self.beside: Sequence[Tensor] = []  # parameters without a set, where gradients of those with one are compact
        self.without: list[Tensor] = []  # those of them that train, and had no gradient when the pass began
        self.task = -1
        self.compiled = (-1, -1)  # the compiled backward that was looked at last: of which pass, and which one
        self.unseen: Unseen | None = Unseen()  # until a step has been seen

    @property
    def present(self) -> bool:
        """Whether a backward has come."""
        return any(own.came for own in self.passes)

    def clear(self) -> None:
        self.task = -1
        for own in self.passes:
            own.clear()

    def enter(self, own: Pass) -> bool:
        """Says that a layer's backward begins; returns whether the end of the pass will be known."""
        task = torch._C._current_graph_task_id()
        if task != self.task or task == -1:
            self.begin()
            if self.unseen is not None:
                self.unseen.check(own.weight)
            self.drop_zeroed(begins=True)
            self.without = [p for p in self.beside if p.requires_grad and p.grad is None]
            self.task = task
            if task != -1:
                torch.autograd.Variable._execution_engine.queue_callback(self._ended)  # type: ignore[attr-defined]
        if own.witness is None:
            own.look_for_witness(self.without)
        own.came = True
        return task != -1

    def drop_zeroed(self, begins: bool = False) -> None:
        """Drops the passes whose gradients have been zeroed; `begins` as of `Pass.zeroed`."""
        if zeroed := [own for own in self.passes if own.came and own.zeroed(begins)]:
            self.drop(zeroed)

    def _ended(self) -> None:
        self.task = -1
        self.end()
        self.note()
        if self.unseen is not None:
            for own in self.passes:
                if own.came:
                    self.unseen.note(own.weight)

    def note(self) -> None:
        """Remembers what gradients there are: whoever changes them from now on does so without us."""
        looked = [(own, grad) for own in self.passes if own.came and (grad := own.end()) is not None]
        if looked:
            for (own, _), largest in zip(looked, torch._foreach_norm([grad for _, grad in looked], inf), strict=True):
                own.told = largest

    def stepped(self, params: Iterable[Tensor]) -> None:
        """Says that an optimizer has stepped parameters: that it zeroes their gradients now drops nothing."""
        if any(own.version is not None for own in self.passes):
            ids = set(map(id, params))
            for own in self.passes:
                if id(own.witness) in ids:
                    own.version = None


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
