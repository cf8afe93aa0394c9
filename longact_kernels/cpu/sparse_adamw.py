"""AdamW on salient rows or columns on the CPU: one pass where numba is installed, ATen block by block otherwise."""

from array import array
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
    # Plain arrays: with many small weights the time of tensor calls would show.
    table, numbers, firsts, ends = array("q"), array("q"), array("q"), array("q")
    kept = []  # what is made here and must live until the kernels are done
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        N, K = weight.shape
        index = rows[i].contiguous()
        S = index.shape[0]
        m, v = exp_avgs[i], exp_avg_sqs[i]
        master = (masters[i].data_ptr(), masters[i].stride(0)) if masters else (0, 0)
        scratch = () if along_rows else (torch.empty(2 * K), torch.empty(K + 3, dtype=torch.int64))
        kept.append((index, *scratch))
        table.extend((
            weight.data_ptr(), weight.stride(0), grad.data_ptr(), grad.stride(0),
            m.data_ptr(), m.stride(0), v.data_ptr(), v.stride(0), *master, steps[i].data_ptr(), index.data_ptr(), N, K,
            weight.dtype == torch.bfloat16, grad.dtype == torch.bfloat16, compact, grad.shape != weight.shape, S,
            *((0, 0) if along_rows else (part.data_ptr() for part in scratch)),
        ))  # fmt: skip
        count = S if along_rows else N
        size = max(1, _TASK // max(1, K))
        for first in range(0, count, size):
            numbers.append(i)
            firsts.append(first)
            ends.append(min(first + size, count))
    scalars = array("d", (lr, beta1, beta2, eps, weight_decay, scale, -1 if maximize else 1))
    args = [*(values.buffer_info()[0] for values in (table, scalars, numbers, firsts, ends)), 0]
    passes = [(kernels.column_factors, len(weights)), (kernels.columns, len(numbers))]
    for kernel, count in [(kernels.rows, len(numbers))] if along_rows else passes:
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
