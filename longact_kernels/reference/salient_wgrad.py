"""The weight gradient of a linear projection, for the salient rows or columns only."""

import torch
from torch import Tensor

from longact_kernels.reference.channels import check_channels


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
    check_channels("rows", [rows], [(dy if axis == "rows" else x).shape[1]])
    slots = (rows >= 0).nonzero().flatten()
    channels = rows[slots]
    left, right = (dy[:, channels], x) if axis == "rows" else (dy, x[:, channels])
    # A product is rounded once: to dy's dtype at its end, or after it was added up in fp32.
    dw = left.T.float() @ right.float() if compact or accumulate else left.T @ right
    if out is None:
        shape = [dy.shape[1], x.shape[1]]
        if compact:
            shape[axis == "columns"] = len(rows)
        out = dw.new_zeros(shape, dtype=torch.float32 if compact else dy.dtype)
    elif compact and not accumulate:
        out.zero_()
    places = slots if compact else channels
    salient = places if axis == "rows" else (slice(None), places)
    out[salient] = (out[salient] + dw if accumulate else dw).to(out.dtype)
    return out
