"""The kernels as functions on plain tensors, and autograd functions made of them. They need none of our classes.

Docstrings give equivalent torch code. `sparse_adamw_` and `carry_` change tensors in place; all others return new ones.
Only `salient_linear` and `observe` are differentiable.
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from longact_kernels.ops import carry_, channel_stats, linear_stats, salient_wgrad, select, sparse_adamw_
from longact_kernels.ops.arguments import check_tensor
from longact_kernels.ops.channel_stats import measure
from longact_kernels.ops.linear_stats import may_fuse
from longact_kernels.ops.salient_wgrad import multiply

__all__ = [
    "RunningStats",
    "carry_",
    "channel_stats",
    "linear_stats",
    "observe",
    "salient_linear",
    "salient_wgrad",
    "select",
    "sparse_adamw_",
]

Axis = Literal["rows", "columns"]


class RunningStats(NamedTuple):
    """Running activation statistics of one projection: fp32 tensors that are updated in place.

    Attributes:
        absmax: [N], the largest magnitude so far.
        l2_sum: [N], the sum of the L2 norms of all sequences; None to leave it out.
        sequences: [], the number of these sequences.
    """

    absmax: Tensor
    l2_sum: Tensor | None = None
    sequences: Tensor | None = None

    @property
    def l2(self) -> bool:
        """Whether L2 norms are summed."""
        return self.l2_sum is not None

    def merge_(self, absmax: Tensor, sumsq: Tensor) -> None:
        """Adds the statistics of one more activation, as returned by `channel_stats`."""
        torch.maximum(self.absmax, absmax, out=self.absmax)
        if self.l2_sum is not None and self.sequences is not None:
            # A sequence of nothing but padding is no sequence.
            if sumsq.shape[0] == 1:
                self.l2_sum.add_(sumsq[0].sqrt())
                self.sequences.add_(sumsq.any())
            else:
                self.l2_sum.add_(sumsq.sqrt().sum(0))
                self.sequences.add_(sumsq.any(1).sum())


class Merges(Protocol):
    """What takes the statistics of an activation in, when its gradient comes."""

    @property
    def l2(self) -> bool:
        """Whether sums of squares are needed."""

    def merge_(self, absmax: Tensor, sumsq: Tensor) -> None:
        """Takes them in, as `channel_stats` returns them."""


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, stats, mask, cu_seqlens, channels):
        # On the node itself, as in `_Project`.
        ctx.stats, ctx.measured = stats, channel_stats(channels, mask, cu_seqlens, stats.l2)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        ctx.stats.merge_(*ctx.measured)
        return dy, None, None, None, None


def observe(
    y: Tensor,
    stats: Merges,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """The identity, whose backward merges the statistics of `y` into running ones.

    Args:
        y, mask, cu_seqlens: as in `channel_stats`.
        stats: running statistics of the channels of `y`. They cover those activations that get a gradient, each once,
            also under activation checkpointing.
        channels: the values of `y` as [..., T, N], if `y` has another layout.

    Returns:
        `y`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them.
    """
    check_tensor("y", y)
    measured = y if channels is None else channels
    check_tensor("channels", measured, y.device)
    _check_stats(stats, measured.shape[-1])
    return _Observe.apply(y, stats, mask, cu_seqlens, measured.detach())


class Target(Protocol):
    """What the gradient of a projection's weight goes to: the salient set of a layer, or what a caller gives.

    Attributes:
        axis, transposed: as in `salient_linear`.
        grad: the accumulator of a compact gradient; None for the weight's own gradient.
    """

    axis: Axis
    transposed: bool
    grad: Tensor | None

    def begin(self, measured: tuple[Tensor, ...]) -> Tensor | None:
        """Takes the statistics of the activation, when its gradient comes; returns the set, None for every channel."""

    def accumulator(self) -> tuple[Tensor, bool]:
        """What a compact gradient is written to, and whether it is added to what is there."""


class _Given:
    """The target that `salient_linear` is given in parts."""

    def __init__(self, index, stats, axis, transposed, grad):
        self.index, self.stats, self.axis, self.transposed, self.grad = index, stats, axis, transposed, grad

    def begin(self, measured):
        if measured:
            self.stats.merge_(*measured)
        return self.index

    def accumulator(self):
        return self.grad, True


def reaches(node: Any) -> bool:
    """Whether the backward under way goes on to a node; None stands for an input without a gradient."""
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


def captured(node: Any) -> bool:
    """Whether the backward under way is `torch.autograd.grad` of what a node leads to: who called it gets that."""
    while node.next_functions and node.next_functions[0][0] is not None:  # autocast has cast the weight
        node = node.next_functions[0][0]
    try:
        torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True
    return False


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, l2, mask, cu_seqlens):
        matrix = weight.t() if target.transposed else weight
        along_rows = target.axis == "rows"
        if not along_rows:
            check_tensor("x", x)  # of which kernels read the channels
        # On the node itself, not among its saved tensors: where non-reentrant checkpointing repeats the forward and
        # refills those, these stay what the first one measured, with the tokens of its own call.
        ctx.target = target
        ctx.save_for_backward(x, weight)
        if l2 is not None and along_rows and may_fuse():
            # Packed sequences are measured as rows of tokens; what is saved keeps one shape, packed or not.
            tokens = x if cu_seqlens is None else x.flatten(0, -2)
            y, *ctx.measured = linear_stats(tokens, matrix, bias, mask, cu_seqlens, l2)
            return y if tokens is x else y.view(*x.shape[:-1], len(matrix))
        y = torch.nn.functional.linear(x, matrix, bias)
        if l2 is None:
            ctx.measured = ()
        else:
            tokens = y if along_rows else x
            tokens = tokens if cu_seqlens is None else tokens.flatten(0, -2)
            ctx.measured = measure(tokens, mask, cu_seqlens, l2)
        return y

    @staticmethod
    def backward(ctx, dy):
        # With gradients off, as nearly always, what that adds would only take time.
        if torch.is_grad_enabled():
            return _Project.once(ctx, dy)
        x, weight = ctx.saved_tensors
        target, needs = ctx.target, ctx.needs_input_grad
        transposed = target.transposed
        # Of `torch.autograd.grad(loss, inputs)` the weight gets no gradient, and nothing counts.
        counts = is_compiling() or reaches(ctx.next_functions[1][0])
        # Merged here and not in forward: a forward that activation checkpointing repeats, or that no gradient comes
        # from, would otherwise count as well.
        index = target.begin(ctx.measured) if counts else None
        dy2 = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
        x2 = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if needs[0]:
            dx = torch.mm(dy2, weight.t() if transposed else weight)
            dx = dx if x2 is x else dx.view_as(x)
        if needs[1] and counts:
            # The whole gradients are written as autograd writes them for F.linear, so that they have the same bits.
            if index is None:
                dw = x2.T @ dy2 if transposed else (x2.T @ dy2).T
            else:
                left, right, along = dy2.resolve_neg(), x2, target.axis  # kernels read the values that lie there
                if transposed:
                    # A weight stored [K, N] is that of the swapped product, its other dimension along the set.
                    left, right, along = right, left, "columns" if along == "rows" else "rows"
                if target.grad is None or (not is_compiling() and captured(ctx.next_functions[1][0])):
                    dw = multiply(left, right, index, along)
                else:
                    multiply(left, right, index, along, True, *target.accumulator())
        if needs[2]:
            db = dy2.sum(0)
        return dx, dw, db, None, None, None, None

    once = staticmethod(once_differentiable(backward))


# Without the steps that functorch's transforms need, which take as long as a kernel's launch.
_apply = super(torch.autograd.Function, _Project).apply


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    l2: bool | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`salient_linear` whose set, statistics and gradient are looked up in `target` when backward comes.

    Args:
        x, weight, bias: as in `salient_linear`.
        mask: bool, as in `salient_linear`; [tokens] with `cu_seqlens`.
        cu_seqlens: int [B + 1], bounds of packed sequences among all tokens of `x`.
        target: where to look.
        l2: whether statistics need sums of squares; None to take none.
    """
    traced = is_compiling() or _are_functorch_transforms_active()
    return (_Project.apply if traced else _apply)(x, weight, bias, target, l2, mask, cu_seqlens)


def salient_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    stats: RunningStats | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    axis: Axis = "rows",
    transposed: bool = False,
    grad: Tensor | None = None,
) -> Tensor:
    """A linear projection whose weight gradient exists for the salient rows (or columns) only.

    Equivalent torch code::

        y = F.linear(x, weight, bias)
        ...                                             # in backward
        dx = dy @ weight                                # as usual
        db = dy.sum(tokens)                             # as usual
        dw = torch.zeros_like(weight)
        dw[rows] = dy[..., rows].T @ x                  # LongAct, arXiv 2604.14922
        stats.absmax = maximum(stats.absmax, abs(y[mask]).amax(0))

    Args:
        x: [..., T, K].
        weight: [N, K].
        bias: [N] or None; its gradient is never masked.
        rows: int64 [S], ascending, the salient set; None for the whole gradient.
        stats: running statistics, to which backward adds those of `y` (of `x` along columns). They cover those
            activations that get a gradient, each once, also under activation checkpointing.
        mask: bool [..., T], True where a token counts in the statistics.
        cu_seqlens: int [B + 1], bounds of packed sequences for the statistics of a 2-D `y`.
        axis: "rows": the set has output channels; "columns": input channels.
        transposed: `weight` and its gradient are stored as [K, N]; a row is still an output channel.
        grad: fp32 accumulator for the gradient of the salient channels, [S, K] ([N, S] along columns; both transposed
            if the weight is). Backward adds to it, and `weight` gets no gradient; only `torch.autograd.grad` of the
            weight returns one instead. Needs `rows`.

    Returns:
        y [..., T, N].

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them.
    """
    _check_linear(x, weight, bias, rows, stats, axis, transposed, grad)
    l2 = None if stats is None else stats.l2
    return project(x, weight, bias, _Given(rows, stats, axis, transposed, grad), l2, mask, cu_seqlens)


def _check_linear(x, weight, bias, rows, stats, axis, transposed, grad) -> None:
    check_tensor("x", x)
    device, dtype = x.device, x.dtype
    check_tensor("weight", weight, device)
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis: got {axis!r}, needed 'rows' or 'columns'")
    shape = weight.shape
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != shape[not transposed] or dtype != weight.dtype:
        raise ValueError(
            f"x, weight: got {dtype} {list(x.shape)} and {weight.dtype} {list(shape)}, needed [..., T, K] and "
            f"{'[K, N]' if transposed else '[N, K]'} of one dtype"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"x: got {dtype}, needed fp32, fp16 or bf16")
    N, K = shape[::-1] if transposed else shape
    if bias is not None:
        check_tensor("bias", bias, device)
        if bias.shape != (N,) or bias.dtype != dtype:
            raise ValueError(f"bias: got {bias.dtype} {list(bias.shape)}, needed {dtype} [{N}]")
    if rows is not None:
        check_tensor("rows", rows, device)
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows: got {rows.dtype} {list(rows.shape)}, needed torch.int64 [S]")
    if stats is not None:
        _check_stats(stats, N if axis == "rows" else K)
    if grad is not None:
        check_tensor("grad", grad, device)
        S = -1 if rows is None else rows.shape[0]
        shape = (S, K) if axis == "rows" else (N, S)
        if grad.shape != (shape[::-1] if transposed else shape) or grad.dtype != torch.float32:
            raise ValueError(
                f"grad: got {grad.dtype} {list(grad.shape)}, needed torch.float32 of the channels in `rows` alone"
            )


def _check_stats(stats: Any, channels: int) -> None:
    if isinstance(stats, RunningStats):
        absmax, l2_sum, sequences = stats
        _check_stat("stats.absmax", absmax, channels)
        if l2_sum is not None:
            _check_stat("stats.l2_sum", l2_sum, channels, absmax.device)
            _check_stat("stats.sequences", sequences, None, absmax.device)
    elif not hasattr(stats, "merge_"):
        raise TypeError(f"stats: got a {type(stats).__name__}, needed RunningStats")


def _check_stat(name: str, tensor: Any, channels: int | None, device: torch.device | None = None) -> None:
    check_tensor(name, tensor, device)
    shape = () if channels is None else (channels,)
    if tensor.shape != shape or tensor.dtype != torch.float32:
        raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, needed torch.float32 {list(shape)}")
