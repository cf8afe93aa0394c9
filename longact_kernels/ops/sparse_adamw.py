"""`longact::sparse_adamw_`: AdamW over the salient rows of many weights at once."""

import torch
from torch import Tensor

from longact_kernels.ops.dispatch import warn_reference
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as _reference


def sparse_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    compact: bool = False,
    maximize: bool = False,
) -> None:
    """One AdamW step on the salient rows of every weight, in place; all other rows keep their bits.

    For each row `i` in a weight's `rows`, with its own step count τ (bias correction as if the row were trained alone)::

        steps[i] += 1
        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g
        W = (1 - lr * weight_decay) * W - lr * (m / (1 - beta1**tau)) / (sqrt(v / (1 - beta2**tau)) + eps)

    Args:
        weights: [N, K] each, fp32, fp16 or bf16.
        grads: as the weights; only the salient rows are read.
        rows: int64 [S] each, ascending.
        exp_avgs, exp_avg_sqs: fp32 [N, K] each, or [S, K] if `compact`, slot s belonging to row `rows[s]`.
        steps: int32 [N] each, or [S] if `compact`.
        masters: fp32 copies of the weights, shaped as `exp_avgs`, that the update is applied to before it is rounded into
            the weights; or an empty list.
        lr: learning rate, a 0-dim tensor (read on the device).
        compact: whether the states hold the salient rows only.
        maximize: ascend instead of descend.

    Raises:
        ValueError: if the lists' lengths differ.
    """
    lists = (weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters or weights)
    if len({len(entries) for entries in lists}) > 1:
        raise ValueError(f"sparse_adamw_: lists of one length needed, got {[len(entries) for entries in lists]}")
    if weights:
        _sparse_adamw_(
            weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr,
            beta1, beta2, eps, weight_decay, compact, maximize,
        )  # fmt: skip


@torch.library.custom_op(
    "longact::sparse_adamw_", mutates_args=("weights", "exp_avgs", "exp_avg_sqs", "steps", "masters")
)
def _sparse_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    compact: bool,
    maximize: bool,
) -> None:
    if not weights[0].is_cpu:
        warn_reference("sparse_adamw_", weights[0].device.type)
    _reference(
        weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr,
        beta1, beta2, eps, weight_decay, compact, maximize,
    )  # fmt: skip
