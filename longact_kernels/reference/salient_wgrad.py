"""The weight gradient of a linear projection, for the salient rows only."""

from torch import Tensor


def salient_wgrad(dy: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """See :func:`longact_kernels.ops.salient_wgrad`, whose meaning this defines."""
    dw = dy.new_zeros(dy.shape[1], x.shape[1])
    dw[rows] = dy[:, rows].T @ x
    return dw
