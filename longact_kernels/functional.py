"""Everything on plain tensors, usable with none of our classes: the kernels' ops, and the autograd function over them.

Each op's docstring gives the equivalent torch code. `sparse_adamw_` and `carry_` change tensors in place, all others
return new ones; only `salient_linear` is differentiable.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longact_kernels.ops import carry_, channel_stats, linear_stats, salient_wgrad, select, sparse_adamw_

__all__ = [
    "RunningStats",
    "carry_",
    "channel_stats",
    "linear_stats",
    "salient_linear",
    "salient_wgrad",
    "select",
    "sparse_adamw_",
]


class RunningStats(NamedTuple):
    """Running activation statistics of one projection; plain fp32 tensors that are updated in place.

    Attributes:
        absmax: [N], the largest magnitude seen.
        l2_sum: [N], the per-sequence L2 norms added up; None to leave them out.
        sequences: [], how many sequences were added up.
    """

    absmax: Tensor
    l2_sum: Tensor | None = None
    sequences: Tensor | None = None

    def merge_(self, absmax: Tensor, sumsq: Tensor) -> None:
        """Takes in the statistics of one more activation, as `channel_stats` returns them."""
        torch.maximum(self.absmax, absmax, out=self.absmax)
        if self.l2_sum is not None and self.sequences is not None:
            self.l2_sum.add_(sumsq.sqrt().sum(0))
            # A sequence of nothing but padding is no sequence.
            self.sequences.add_((sumsq != 0).any(1).sum())


class _SalientLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, stats, mask, cu_seqlens):
        ctx.stats = stats
        if stats is None:
            y = torch.nn.functional.linear(x, weight, bias)
            ctx.save_for_backward(x, weight, rows)
        else:
            y, absmax, sumsq = linear_stats(x, weight, bias, mask, cu_seqlens, stats.l2_sum is not None)
            ctx.save_for_backward(x, weight, rows, absmax, sumsq)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rows, *new = ctx.saved_tensors
        if ctx.stats is not None:
            # Merged here and not in forward: a forward that activation checkpointing repeats, or that no gradient
            # comes from, would otherwise count as well.
            ctx.stats.merge_(*new)
        dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy2 @ weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            # The whole gradient is written as autograd writes it for F.linear, so that it has the same bits.
            dw = (x2.T @ dy2).T if rows is None else salient_wgrad(dy2, x2, rows)
        if ctx.needs_input_grad[2]:
            db = dy2.sum(0)
        return dx, dw, db, None, None, None, None


def salient_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    stats: RunningStats | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A linear projection whose weight gradient exists for the salient rows only.

    Equivalent torch code::

        y = F.linear(x, weight, bias)
        ...                                             # in backward
        dx = dy @ weight                                # as ever
        db = dy.sum(tokens)                             # as ever
        dw = torch.zeros_like(weight)
        dw[rows] = dy[..., rows].T @ x                  # LongAct, arXiv 2604.14922
        stats.absmax = maximum(stats.absmax, abs(y[mask]).amax(0))

    Args:
        x: [..., T, K].
        weight: [N, K].
        bias: [N] or None; its gradient is never masked.
        rows: int64 [S], ascending, the salient set; None for the whole gradient.
        stats: running statistics that backward merges those of `y` into: they cover just the activations that a
            gradient came from, each once, also under activation checkpointing.
        mask: bool [..., T], True where a token counts in the statistics.
        cu_seqlens: int [B + 1], bounds of packed sequences for the statistics of a 2-D `y`.

    Returns:
        y [..., T, N].
    """
    return _SalientLinear.apply(x, weight, bias, rows, stats, mask, cu_seqlens)
