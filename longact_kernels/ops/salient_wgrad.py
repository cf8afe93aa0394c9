"""`longact::salient_wgrad`: the weight gradient of the salient rows only."""

import torch
from torch import Tensor

from longact_kernels.ops.dispatch import warn_reference
from longact_kernels.reference.salient_wgrad import salient_wgrad as _reference


def salient_wgrad(dy: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Weight gradient of `y = x @ weight.T`, computed for the salient rows and zero elsewhere.

    Equivalent torch code::

        dw = torch.zeros(N, K)
        dw[rows] = dy[:, rows].T @ x

    Args:
        dy: gradient of the output [M, N].
        x: input [M, K], in the dtype of `dy`.
        rows: int64 [S], ascending: the salient set.

    Returns:
        [N, K] in the dtype of `dy`.

    Raises:
        ValueError: if the shapes or dtypes do not fit, naming the argument.
    """
    if dy.ndim != 2 or x.ndim != 2 or len(dy) != len(x):
        raise ValueError(f"dy, x: got shapes {list(dy.shape)} and {list(x.shape)}, needed [M, N] and [M, K]")
    if dy.dtype != x.dtype:
        raise ValueError(f"x: got {x.dtype}, needed the dtype of dy, {dy.dtype}")
    return _salient_wgrad(dy, x, rows)


@torch.library.custom_op("longact::salient_wgrad", mutates_args=())
def _salient_wgrad(dy: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    if not dy.is_cpu:
        warn_reference("salient_wgrad", dy.device.type)
    return _reference(dy, x, rows)


@_salient_wgrad.register_fake
def _(dy, x, rows):
    return dy.new_empty(dy.shape[1], x.shape[1])
