"""`SalientSet`: the salient set of one layer, and what its backward writes to. It knows no controller."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from longact_kernels.functional import Axis, captured, reaches
from longact_kernels.sparse.batch import Batch, Pass
from longact_kernels.sparse.tokens import Call


@dataclass(eq=False)
class SalientSet:
    """The salient set of one projection, carried by its layer.

    Attributes:
        name: the projection's module name.
        plain: the class that the layer had before.
        channels, segments: the projection's part of the statistics: channels, and segments of such.
        heads: how many channels each head has.
        size: how many channels the set holds.
        limits: of which ranges of channels it holds how many at most.
        axis: what a channel is: one of the projection's output ("rows") or input ("columns").
        transposed: whether the weight is stored [in_features, out_features].
        routed: whether it is called with some of the call's tokens, which cannot be told then: all of them count.
        call: the model call under way.
        batch: the backward passes of the step under way.
        index: the set, int64 [size] ascending, behind its empty slots (-1). Written in place.
        chosen: whether the set has been chosen.
        active: whether it holds for the step under way, so that backward computes its channels alone.
        stats: what backward merges the projection's statistics into; None where they are taken elsewhere, or no more.
        grad: the fp32 accumulator of the set's gradient, where those are kept in place of whole gradients.
        has_grad: whether backward has put something there since it was last zeroed.
        version: grows whenever the set may have changed.
        share: which part of the projection's channels this rank computes (tensor parallelism).
        passes: the layer's own passes through backward.
        token: what compiled code writes to in place of all that it cannot see.
    """

    name: str
    plain: type[nn.Module]
    channels: slice
    segments: slice
    heads: list[int]
    size: int
    limits: list[tuple[list[tuple[int, int]], int]]
    axis: Axis
    transposed: bool
    routed: bool
    call: Call
    batch: Batch
    index: Tensor
    chosen: bool = False
    active: bool = False
    stats: Any = None
    grad: Tensor | None = None
    has_grad: bool = False
    version: int = 0
    share: float = 1.0
    passes: Pass = field(default_factory=Pass)
    token: Tensor = field(init=False)

    @property
    def dim(self) -> int:
        """The dimension of the stored weight that the channels lie along."""
        return int((self.axis == "columns") != self.transposed)

    def __post_init__(self) -> None:
        self.token = torch.zeros(1, device=self.index.device)
        self.key = next(_keys)
        _by_key[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, has_grad=False)  # copies of parameters have no gradients
        self.key = next(_keys)  # a copy is another set
        _by_key[self.key] = self

    def most(self, start: int, stop: int) -> int:
        """How many of the channels from start to stop can be in the set at once."""
        return sum(
            min(count, sum(max(0, min(b, stop) - max(a, start)) for a, b in ranges)) for ranges, count in self.limits
        )

    def begin(self, measured: tuple[Tensor, ...]) -> Tensor | None:
        """Called by the layer's backward: takes the statistics in; returns the channels to compute, None for all."""
        if is_compiling():
            written = [self.token] if self.grad is None else [self.token, self.grad]
            index = torch.ops.longact.begin(self.key, self.size, measured, written)
            return index if self.active else None
        ends, stats = self.batch.enter(self.passes), self.stats
        if measured and stats is not None:
            (stats.merge_at_end if ends else stats.merge_)(*measured)
        return self.index if self.active else None

    def accumulator(self) -> tuple[Tensor, bool]:
        """Where a compact gradient goes, and whether it is added to what is there."""
        assert self.grad is not None
        if is_compiling():
            return self.grad, True
        add, self.has_grad = self.has_grad, True
        return self.grad, add


_keys = itertools.count()
_by_key: weakref.WeakValueDictionary[int, SalientSet] = weakref.WeakValueDictionary()


@torch.library.custom_op("longact::begin", mutates_args=("written",))
def _begin(key: int, size: int, measured: list[Tensor], written: list[Tensor]) -> Tensor:
    """`SalientSet.begin` in a compiled backward, which cannot follow what it does.

    It writes to a token, so that nobody leaves it out, and returns a copy of the set, so that what reads the set comes
    later. An accumulator is zeroed here where nothing is in it yet.
    """
    salient = _by_key[key]
    if len(written) > 1:
        _refuse_captured(salient)
    salient.batch.enter(salient.passes)
    if measured and salient.stats is not None:
        salient.stats.merge_(*measured)
    if len(written) > 1 and not salient.has_grad:
        written[1].zero_()
    salient.has_grad = len(written) > 1
    written[0].zero_()
    return salient.index.clone()


def _refuse_captured(salient: SalientSet) -> None:
    """Raises RuntimeError in a compiled backward whose gradients are not all accumulated, but compact ones would be."""
    node = torch._C._current_autograd_node()
    running = torch._C._current_graph_task_id(), id(node)
    if salient.batch.compiled == running:  # one layer has told of all
        return
    salient.batch.compiled = running
    leaves = [n for n, _ in node.next_functions if getattr(n, "variable", None) is salient.passes.weight]
    if any(captured(n) or not reaches(n) for n in leaves if n is not None):
        raise RuntimeError(
            "torch.autograd.grad: of a compiled model it would add to compact gradients, as backward(inputs=...) would;"
            " call it without torch.compile there, or use LongAct(grad='full')"
        )


@_begin.register_fake
def _(key, size, measured, written):
    return written[0].new_empty(size, dtype=torch.int64)
