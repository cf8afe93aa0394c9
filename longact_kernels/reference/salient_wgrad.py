"""The weight gradient of a linear projection, for the salient rows or columns only."""

import torch
from torch import Tensor


def salient_wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    axis: str = "rows",
    compact: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """See :func:`longact_kernels.ops.salient_wgrad`, whose meaning this defines."""
    left, right = (dy[:, rows], x) if axis == "rows" else (dy, x[:, rows])
    # A product is rounded once: to dy's dtype at its end, or after it was added up in fp32.
    dw = left.T.float() @ right.float() if compact or accumulate else left.T @ right
    if out is None:
        shape = dw.shape if compact else (dy.shape[1], x.shape[1])
        out = dw.new_zeros(shape, dtype=torch.float32 if compact else dy.dtype)
    if compact:
        salient: slice | Tensor | tuple = slice(None)
    else:
        salient = rows if axis == "rows" else (slice(None), rows)
    out[salient] = (out[salient] + dw if accumulate else dw).to(out.dtype)
    return out
