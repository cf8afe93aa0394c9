"""`longact::sparse_adamw_`: AdamW over the salient rows or columns of many weights at once."""

import torch
from torch import Tensor

from longact_kernels.ops.dispatch import implementation
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as _reference

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    axis: str = "rows",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """One AdamW step on the salient channels of every weight, in place; all other channels keep their bits.

    For each row `i` in a weight's `rows`, with its own step count τ (bias correction as if it were trained alone)::

        steps[i] += 1
        g = grad[i] / grad_scale
        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g
        W = (1 - lr * weight_decay) * W - lr * (m / (1 - beta1**tau)) / (sqrt(v / (1 - beta2**tau)) + eps)

    With `axis="columns"` read "column" for "row": it is the same on the transposed weights.

    Args:
        weights: [N, K] each, fp32, fp16 or bf16.
        grads: [N, K] each, fp32, fp16 or bf16, of which the salient rows are read; or [S, K], slot s belonging to row
            `rows[s]` ([N, S] along columns).
        rows: int64 [S] each, ascending: the salient rows, or columns.
        exp_avgs, exp_avg_sqs: fp32 [N, K] each; if `compact`, [S, K] like such gradients ([N, S] along columns).
        steps: int32, one a row (or column), or [S] if `compact`.
        masters: fp32 copies of the weights, shaped as `exp_avgs`, that the update is applied to before it is rounded
            into the weights; or an empty list.
        lr: learning rate, a 0-dim tensor (read on the device).
        beta1, beta2, eps, weight_decay: as for `torch.optim.AdamW`.
        compact: whether the states hold the salient channels only.
        maximize: ascend instead of descend.
        axis: "rows" or "columns", along which the channels lie.
        grad_scale: the scale that the gradients carry, one value (read on the device), as GradScaler hands it to
            torch's fused optimizers. The gradients themselves are left as they are.
        found_inf: one value (read on the device); nonzero skips the step wholly, τ too.
        seed: rounds 16-bit weights that have no master stochastically. The bits depend on the seed's low 32 bits, the
            weight's place in the list, the element and its τ only: the same call gives the same weights.

    Raises:
        ValueError: for lists, shapes, dtypes or an axis that do not fit, naming the argument.
    """
    _check(weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, compact, axis)
    if weights:
        _sparse_adamw_(
            weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr, beta1, beta2, eps, weight_decay,
            compact, maximize, axis, grad_scale, found_inf, seed,
        )  # fmt: skip


def _check(weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, compact, axis):
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis: got {axis!r}, needed 'rows' or 'columns'")
    lists = (weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters or weights)
    if len({len(entries) for entries in lists}) > 1:
        raise ValueError(f"sparse_adamw_: lists of one length needed, got {[len(entries) for entries in lists]}")
    for i, (weight, grad, index) in enumerate(zip(weights, grads, rows, strict=True)):
        if weight.ndim != 2 or weight.dtype not in _FLOATS:
            raise ValueError(f"weights[{i}]: got {weight.dtype} {list(weight.shape)}, needed fp32, fp16 or bf16 [N, K]")
        whole, S = weight.shape, index.numel()
        salient = torch.Size((S, whole[1]) if axis == "rows" else (whole[0], S))
        if grad.shape not in (whole, salient) or grad.dtype not in _FLOATS:
            needed = f"fp32, fp16 or bf16 {list(whole)} or {list(salient)}"
            raise ValueError(f"grads[{i}]: got {grad.dtype} {list(grad.shape)}, needed {needed}")
        held = salient if compact else whole
        for name, states in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs), ("masters", masters)):
            if states and (states[i].shape != held or states[i].dtype != torch.float32):
                raise ValueError(
                    f"{name}[{i}]: got {states[i].dtype} {list(states[i].shape)}, needed torch.float32 {list(held)}"
                )
        channels = held[0 if axis == "rows" else 1]
        if steps[i].shape != (channels,) or steps[i].dtype != torch.int32:
            raise ValueError(
                f"steps[{i}]: got {steps[i].dtype} {list(steps[i].shape)}, needed torch.int32 [{channels}]"
            )


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
    axis: str,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: int | None,
) -> None:
    run = implementation("sparse_adamw_", weights[0], _reference, _reference)
    run(
        weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr, beta1, beta2, eps, weight_decay,
        compact, maximize, axis, grad_scale, found_inf, seed,
    )  # fmt: skip
