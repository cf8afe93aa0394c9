"""Weight gradient of the salient rows or columns on the CPU: pack the salient channels, then one matrix product."""

import torch
from torch import Tensor

from longact_kernels.reference.salient_wgrad import salient_wgrad as _reference

# Tokens packed at a time: their salient channels are transposed while they are in the cache.
_CHUNK = 256


def salient_wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    axis: str = "rows",
    compact: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """See :func:`longact_kernels.ops.salient_wgrad`."""
    if dy.dtype != torch.float32 and (compact or accumulate):
        # ATen's product of 16-bit matrices is rounded to 16 bits, too early for a sum or for the fp32 form.
        return _reference(dy, x, rows, axis, compact, out, accumulate)
    along_rows = axis == "rows"
    salient, other = (dy, x) if along_rows else (x, dy)
    # MKL's fp32 product runs as fast on a transposed view; oneDNN's 16-bit one takes twice as long.
    packed = salient.index_select(1, rows).t() if dy.dtype == torch.float32 else _pack(salient, rows)
    dw = packed @ other
    if out is None:
        if compact:
            return dw if along_rows else dw.t().contiguous()
        out = dy.new_zeros(dy.shape[1], x.shape[1])
    target = out if along_rows else out.t()
    if compact:
        target.add_(dw) if accumulate else target.copy_(dw)
    elif accumulate:
        target.index_add_(0, rows, dw)
    else:
        target.index_copy_(0, rows, dw)
    return out


def _pack(source: Tensor, channels: Tensor) -> Tensor:
    """`source[:, channels].T`, contiguous: the layout in which the product runs at full speed."""
    packed = source.new_empty(len(channels), len(source))
    for first in range(0, len(source), _CHUNK):
        tokens = slice(first, first + _CHUNK)
        packed[:, tokens] = source[tokens].index_select(1, channels).t()
    return packed
