"""AdamW on salient rows or columns on the CPU: one pass where numba is installed, ATen block by block otherwise."""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longact_kernels.cpu import native
from longact_kernels.reference.sparse_adamw import AdamWCall, hash32, moment_key, random_key, stochastic_round

# Elements of one task: large beside the cost of handing it out, small beside a core's share of the work.
_TASK = 1 << 16
# Elements that the ATen form works on at a time, so that what it writes in between stays in the cache.
_BLOCK = 1 << 16


def sparse_adamw_(call: AdamWCall) -> None:
    """See :func:`longact_kernels.ops.sparse_adamw_`."""
    if call.found_inf is not None and call.found_inf.item():
        return
    along = 0 if call.axis == "rows" else 1
    # Whole sets are dense AdamW, and shall have its bits: ATen's square root (MKL's) is not always the nearest number.
    whole = all(
        len(index) == weight.shape[along] and not (index[:1] < 0).any()
        for index, weight in zip(call.rows, call.weights, strict=True)
    )
    packed = call.compact or any(g.shape != w.shape for g, w in zip(call.grads, call.weights, strict=True))
    fits = _fits_native(call.weights, call.grads, call.exp_avgs, call.exp_avg_sqs, call.masters)
    native_runs = native.available() and fits and not whole and not (along == 1 and packed)
    (_native if native_runs else _aten)(call)


def _fits_native(*groups: list[Tensor]) -> bool:
    """Whether the elements of every row lie side by side, in a format that the native code reads."""
    return all(t.stride(1) == 1 and t.dtype != torch.float16 for group in groups for t in group)


def _native(call: AdamWCall) -> None:
    from longact_kernels.cpu.native import sparse_adamw as kernels

    along_rows = call.axis == "rows"
    # Plain arrays: with many small weights the time of tensor calls would show.
    table, numbers, firsts, ends = array("q"), array("q"), array("q"), array("q")
    kept = []  # what is made here and must live until the kernels are done
    for i, (weight, grad) in enumerate(zip(call.weights, call.grads, strict=True)):
        N, K = weight.shape
        index = call.rows[i].contiguous()
        S = index.shape[0]
        m, v = call.exp_avgs[i], call.exp_avg_sqs[i]
        master = (call.masters[i].data_ptr(), call.masters[i].stride(0)) if call.masters else (0, 0)
        scratch = () if along_rows else (torch.empty(3 * K), torch.empty(K + 3, dtype=torch.int64))
        kept.append((index, *scratch))
        table.extend((
            weight.data_ptr(), weight.stride(0), grad.data_ptr(), grad.stride(0),
            m.data_ptr(), m.stride(0), v.data_ptr(), v.stride(0), *master, call.steps[i].data_ptr(), index.data_ptr(),
            N, K, weight.dtype == torch.bfloat16, grad.dtype == torch.bfloat16, call.compact, grad.shape != weight.shape,
            S, *((0, 0) if along_rows else (part.data_ptr() for part in scratch)), m.dtype == torch.bfloat16,
        ))  # fmt: skip
        count = S if along_rows else N
        size = max(1, _TASK // max(1, K))
        for first in range(0, count, size):
            numbers.append(i)
            firsts.append(first)
            ends.append(min(first + size, count))
    scale = 0.0 if call.grad_scale is None else call.grad_scale.item()
    sign = -1 if call.maximize else 1
    scalars = array("d", (call.lr.item(), call.beta1, call.beta2, call.eps, call.weight_decay, scale, sign))
    seed = -1 if call.seed is None else call.seed & 0xFFFFFFFF
    args = [*(values.buffer_info()[0] for values in (table, scalars, numbers, firsts, ends)), 0, seed]
    passes = [(kernels.column_factors, len(call.weights)), (kernels.columns, len(numbers))]
    for kernel, count in [(kernels.rows, len(numbers))] if along_rows else passes:
        if native.run(kernel, count, args)[-2]:
            raise IndexError(f"rows: an index outside the weight's {call.axis}")


def _aten(call: AdamWCall) -> None:
    dim = 0 if call.axis == "rows" else 1
    lr = call.lr.item()
    for i, (weight, index) in enumerate(zip(call.weights, call.rows, strict=True)):
        empty = int((index == -1).sum())
        index = index[empty:]

        def filled(tensor: Tensor, compact: bool, first: int = empty, count: int = len(index)) -> Tensor:
            return tensor.narrow(dim if tensor.ndim == 2 else 0, first, count) if compact else tensor

        compact_grad = call.grads[i].shape != weight.shape
        grad = filled(call.grads[i], compact_grad)
        exp_avg, exp_avg_sq, steps = (
            filled(states[i], call.compact) for states in (call.exp_avgs, call.exp_avg_sqs, call.steps)
        )
        master = filled(call.masters[i], call.compact) if call.masters else weight
        stepped = ... if call.compact else index
        steps[stepped] += 1
        tau = steps[stepped].unsqueeze(1 - dim)
        step_size = (lr / (1 - call.beta1 ** tau.double())).float()
        correction = (1 - call.beta2 ** tau.double()).sqrt().float()
        key = None if call.seed is None else random_key(call.seed, i, index.unsqueeze(1 - dim), tau)
        for block in _blocks(weight, index, dim):
            g = block.take(grad, compact_grad).float()
            g = g if call.grad_scale is None else g / call.grad_scale
            g = -g if call.maximize else g
            w = block.take(master, call.compact and bool(call.masters)).float()
            m = block.take(exp_avg, call.compact).float().lerp_(g, 1 - call.beta1)
            v = block.take(exp_avg_sq, call.compact).float().mul_(call.beta2).addcmul_(g, g, value=1 - call.beta2)
            denom = v.sqrt().div_(correction[block.slots]).add_(call.eps)
            w.mul_(1 - lr * call.weight_decay).addcdiv_(m * step_size[block.slots], denom, value=-1)
            if call.masters and not call.compact:
                block.put(master, w)
            if key is not None:
                if weight.dtype != torch.float32 and not call.masters:
                    w = stochastic_round(w, hash32(key[block.slots] ^ block.places), weight.dtype)
                if exp_avg.dtype == torch.bfloat16:
                    bits = hash32(moment_key(key[block.slots]) ^ block.places)
                    m = stochastic_round(m, bits, torch.bfloat16)
                    v = stochastic_round(v, bits << 16 & 0xFFFFFFFF, torch.bfloat16)
            block.put(weight, w.to(weight.dtype))
            block.put(exp_avg, m.to(exp_avg.dtype), call.compact)
            block.put(exp_avg_sq, v.to(exp_avg.dtype), call.compact)


class _Block(NamedTuple):
    """Some of a weight's salient elements: `channels` along `dim` in the rows `of_whole` of a tensor of its shape; in
    a compact tensor, the rows `of_compact`. `slots` are the channels' places in the set, `places` the elements' places
    in a channel."""

    dim: int
    channels: Tensor
    of_whole: slice
    of_compact: slice
    slots: slice
    places: Tensor

    def take(self, tensor: Tensor, compact: bool = False) -> Tensor:
        """A copy of these elements; of a compact tensor a view."""
        return tensor[self.of_compact] if compact else tensor[self.of_whole].index_select(self.dim, self.channels)

    def put(self, tensor: Tensor, value: Tensor, compact: bool = False) -> None:
        if compact:
            tensor[self.of_compact] = value
        else:
            tensor[self.of_whole].index_copy_(self.dim, self.channels, value)


def _blocks(weight: Tensor, index: Tensor, dim: int) -> Iterator[_Block]:
    whole = slice(None)
    places = torch.arange(weight.shape[1 - dim]).unsqueeze(dim)
    if dim == 0:
        size = max(1, _BLOCK // max(1, weight.shape[1]))
        for first in range(0, len(index), size):
            own = slice(first, first + size)
            yield _Block(dim, index[own], whole, own, own, places)
    else:
        size = max(1, _BLOCK // max(1, len(index)))
        for first in range(0, len(weight), size):
            own = slice(first, first + size)
            yield _Block(dim, index, own, own, whole, places[own])
