"""AdamW on salient rows or columns on the CPU: one pass where numba is installed, ATen block by block otherwise."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longact_kernels.cpu import native
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as _reference

# Elements of one task: large beside the cost of handing it out, small beside a core's share of the work.
_TASK = 1 << 16
# Elements that the ATen form works on at a time, so that what it writes in between stays in the cache.
_BLOCK = 1 << 16


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
    """See :func:`longact_kernels.ops.sparse_adamw_`."""
    if found_inf is not None and found_inf.item():
        return
    if seed is not None and not masters and any(weight.dtype != torch.float32 for weight in weights):
        _reference(
            weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr, beta1, beta2, eps, weight_decay,
            compact, maximize, axis, grad_scale, found_inf, seed,
        )  # fmt: skip
        return
    scale = 0.0 if grad_scale is None else grad_scale.item()
    # Whole sets are dense AdamW, and shall have its bits: ATen's square root (MKL's) is not always the nearest number.
    whole = all(len(index) == weight.shape[axis != "rows"] for index, weight in zip(rows, weights, strict=True))
    packed = compact or any(grad.shape != weight.shape for grad, weight in zip(grads, weights, strict=True))
    fits = _fits_native(weights, grads, exp_avgs, exp_avg_sqs, masters) and (axis == "rows" or not packed)
    run = _native if native.available() and fits and not whole else _aten
    run(
        weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr.item(), beta1, beta2, eps, weight_decay,
        compact, maximize, axis, scale,
    )  # fmt: skip


def _fits_native(*groups: list[Tensor]) -> bool:
    """Whether the elements of every row lie side by side, in a format that the native code reads."""
    return all(t.stride(1) == 1 and t.dtype != torch.float16 for group in groups for t in group)


def _native(
    weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr, beta1, beta2, eps, weight_decay,
    compact, maximize, axis, scale,
):  # fmt: skip
    from longact_kernels.cpu.native import sparse_adamw as kernels

    along_rows = axis == "rows"
    kept = []  # alive until the kernels are done with their addresses

    def address(tensor: Tensor) -> int:
        kept.append(tensor)
        return tensor.data_ptr()

    table: list[int] = []
    tasks: list[tuple[int, int, int]] = []
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        (N, K), S = weight.shape, len(rows[i])
        for tensor in (weight, grad, exp_avgs[i], exp_avg_sqs[i], *masters[i : i + 1]):
            table += address(tensor), tensor.stride(0)
        table += [0, 0] * (not masters)
        table += address(steps[i]), address(rows[i].contiguous()), N, K
        table += weight.dtype == torch.bfloat16, grad.dtype == torch.bfloat16, compact, grad.shape != weight.shape, S
        if along_rows:
            table += 0, 0
        else:
            table += address(torch.empty(2 * K)), address(torch.empty(K + 3, dtype=torch.int64))
        count, length = (S, K) if along_rows else (N, K)
        size = max(1, _TASK // max(1, length))
        tasks += ((i, first, min(first + size, count)) for first in range(0, count, size))
    scalars = torch.tensor([lr, beta1, beta2, eps, weight_decay, scale, -1 if maximize else 1], dtype=torch.float64)
    work = torch.tensor(tasks, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    args = [address(torch.tensor(table)), scalars.data_ptr(), *(part.data_ptr() for part in work), 0]
    passes = [(kernels.column_factors, len(weights)), (kernels.columns, len(tasks))]
    for kernel, count in [(kernels.rows, len(tasks))] if along_rows else passes:
        if native.run(kernel, count, args)[-1]:
            raise IndexError(f"rows: an index outside the weight's {axis}")


def _aten(
    weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr, beta1, beta2, eps, weight_decay,
    compact, maximize, axis, scale,
):  # fmt: skip
    dim = 0 if axis == "rows" else 1
    for i, (weight, grad, index) in enumerate(zip(weights, grads, rows, strict=True)):
        stepped = ... if compact else index
        steps[i][stepped] += 1
        tau = steps[i][stepped].double().unsqueeze(1 - dim)
        step_size = (lr / (1 - beta1**tau)).float()
        correction = (1 - beta2**tau).sqrt().float()
        for block in _blocks(weight, index, dim):
            g = block.take(grad, grad.shape != weight.shape).float()
            g = g / scale if scale else g
            g = -g if maximize else g
            w = block.take(masters[i], compact) if masters else block.take(weight).float()
            m = block.take(exp_avgs[i], compact).lerp_(g, 1 - beta1)
            v = block.take(exp_avg_sqs[i], compact).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denom = v.sqrt().div_(correction[block.slots]).add_(eps)
            w.mul_(1 - lr * weight_decay).addcdiv_(m * step_size[block.slots], denom, value=-1)
            if not compact:
                block.put(exp_avgs[i], m)
                block.put(exp_avg_sqs[i], v)
            if masters and not compact:
                block.put(masters[i], w)
            block.put(weight, w.to(weight.dtype))


class _Block(NamedTuple):
    """Some of a weight's salient elements: `channels` along `dim` in the rows `of_whole` of a tensor of its shape; in
    a compact tensor, the rows `of_compact`. `slots` are the channels' places in the set."""

    dim: int
    channels: Tensor
    of_whole: slice
    of_compact: slice
    slots: slice

    def take(self, tensor: Tensor, compact: bool = False) -> Tensor:
        """A copy of these elements; of a compact tensor a view."""
        return tensor[self.of_compact] if compact else tensor[self.of_whole].index_select(self.dim, self.channels)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        tensor[self.of_whole].index_copy_(self.dim, self.channels, value)


def _blocks(weight: Tensor, index: Tensor, dim: int) -> Iterator[_Block]:
    whole = slice(None)
    if dim == 0:
        size = max(1, _BLOCK // max(1, weight.shape[1]))
        for first in range(0, len(index), size):
            own = slice(first, first + size)
            yield _Block(dim, index[own], whole, own, own)
    else:
        size = max(1, _BLOCK // max(1, len(index)))
        for first in range(0, len(weight), size):
            own = slice(first, first + size)
            yield _Block(dim, index, own, own, whole)
