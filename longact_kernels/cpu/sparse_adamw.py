"""AdamW on salient rows or columns on the CPU: one pass where numba is installed, ATen block by block otherwise."""

from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longact_kernels.cpu import native
from longact_kernels.cpu.rows import copy_rows_
from longact_kernels.reference.channels import check_channels
from longact_kernels.reference.sparse_adamw import AdamWCall, hash32, moment_key, random_key, stochastic_round

# Elements of one task: large beside the cost of handing it out, small beside a core's share of the work.
_TASK = 1 << 16
# Elements that the ATen form works on at a time, so that what it writes in between stays in the cache.
_BLOCK = 1 << 18


def sparse_adamw_(call: AdamWCall) -> None:
    """See :func:`longact_kernels.ops.sparse_adamw_`."""
    Prepared(call)(call)


class Prepared:
    """Steps the weights of a call, and of all later ones with the same tensors but for the gradients."""

    def __init__(self, call: AdamWCall):
        self._along_rows = call.axis == "rows"
        self._shapes = [weight.shape for weight in call.weights]
        self._whole = all(
            index.numel() == shape[not self._along_rows] for index, shape in zip(call.index, self._shapes, strict=True)
        )
        # Plain arrays, of which a step writes the gradients' part only: with many small weights the time would show.
        lists = (call.weights, call.weights, call.index, call.exp_avgs, call.exp_avg_sqs, call.steps, call.masters)
        self._addresses = array("q", [tensor.data_ptr() for tensors in lists for tensor in tensors])
        self._sizes, self._tasks, self._scratch = array("q"), 0, 0
        for weight, S in zip(call.weights, map(Tensor.numel, call.index), strict=True):
            N, K = weight.shape
            per_task = max(1, _TASK // max(1, K))
            self._sizes.extend((N, K, S, weight.stride()[0], 0, 0, self._tasks, per_task, self._scratch))
            self._tasks += -(-(S if self._along_rows else N) // per_task)
            self._scratch += 0 if self._along_rows else 3 * max(K, S) + 4
        self._layout: Any = None

    def __call__(self, call: AdamWCall, layout: Any = None) -> None:
        if call.found_inf is not None and call.found_inf.item():
            return
        if native.available() and self._fits_native(call):
            self._native(call, layout)
        else:
            _aten(call)

    def _fits_native(self, call: AdamWCall) -> bool:
        """Whether the native code reads these formats and layouts, and gives the bits that are wanted."""
        if call.weights[0].dtype == torch.float16 or call.grads[0].dtype == torch.float16:
            return False
        if not (self._along_rows or call.compact or [grad.shape for grad in call.grads] == self._shapes):
            return False
        # Whole sets are dense AdamW, and shall have its bits: ATen's square root (MKL's) is not always the nearest
        # number.
        dense = self._whole and not any((index[:1] < 0).any() for index in call.index)
        return not dense and all(stride[1] == 1 for stride in map(Tensor.stride, call.grads))

    def _native(self, call: AdamWCall, layout: Any) -> None:
        from longact_kernels.cpu.native import sparse_adamw as kernels

        count = len(call.weights)
        if layout is None or layout is not self._layout:
            self._layout = layout
            self._addresses[count : 2 * count] = array("q", map(Tensor.data_ptr, call.grads))
            for i, (grad, shape) in enumerate(zip(call.grads, self._shapes, strict=True)):
                self._sizes[9 * i + 4], self._sizes[9 * i + 5] = grad.stride()[0], grad.shape != shape
        scratch = torch.empty(self._scratch, dtype=torch.int64)
        scale = 0.0 if call.grad_scale is None else call.grad_scale.item()
        sign = -1 if call.maximize else 1
        scalars = array("d", (call.lr.item(), call.beta1, call.beta2, call.eps, call.weight_decay, scale, sign))
        args = (
            *(values.buffer_info()[0] for values in (self._addresses, self._sizes, scalars)), scratch.data_ptr(), count,
            *(tensors[0].dtype == torch.bfloat16 for tensors in (call.weights, call.grads, call.exp_avgs)),
            bool(call.masters), call.compact, -1 if call.seed is None else call.seed & 0xFFFFFFFF,
            not self._along_rows, 0,
        )  # fmt: skip
        if native.run(kernels.check, count, args)[-1]:
            _check_sets(call)
        columns = kernels.gathered_columns if call.compact else kernels.columns
        passes = [(kernels.column_factors, count), (columns, self._tasks)]
        for kernel, tasks in [(kernels.rows, self._tasks)] if self._along_rows else passes:
            native.run(kernel, tasks, args)


def _check_sets(call: AdamWCall) -> None:
    along = 0 if call.axis == "rows" else 1
    check_channels("index", call.index, [weight.shape[along] for weight in call.weights])


def _aten(call: AdamWCall) -> None:
    along = 0 if call.axis == "rows" else 1
    lr = call.lr.item()
    _check_sets(call)
    scratch = torch.empty(4, max(_BLOCK, *(max(weight.shape) for weight in call.weights)))
    for i, (weight, index) in enumerate(zip(call.weights, call.index, strict=True)):
        empty = int((index == -1).sum())
        index = index[empty:]
        if not len(index):
            continue
        compact_grad = call.grads[i].shape != weight.shape
        grad = call.grads[i].narrow(along, empty, len(index)) if compact_grad else call.grads[i]
        states = [states[i] for states in (call.exp_avgs, call.exp_avg_sqs, call.masters) if states]
        steps, stepped = call.steps[i], index
        if call.compact:
            states = [state.narrow(along, empty, len(index)) for state in states]
            steps, stepped = steps[empty:], torch.arange(len(index))
        exp_avg, exp_avg_sq, *master = states
        steps[stepped] += 1
        if not weight.numel():
            continue
        tau = steps[stepped].unsqueeze(1 - along)
        step_size = (lr / (1 - call.beta1 ** tau.double())).float()
        correction = (1 - call.beta2 ** tau.double()).sqrt().float()
        key = None if call.seed is None else random_key(call.seed, i, index.unsqueeze(1 - along), tau)
        for block in blocks(weight, index, along):
            G, M, V, W = (numbers[: block.shape.numel()].view(block.shape) for numbers in scratch)
            g = block.take(grad, compact_grad, G)
            g = g if call.grad_scale is None else torch.div(g, call.grad_scale, out=G)
            g = torch.neg(g, out=G) if call.maximize else g
            m = torch.lerp(block.take(exp_avg, call.compact, M), g, 1 - call.beta1, out=M)
            v = torch.mul(block.take(exp_avg_sq, call.compact, V), call.beta2, out=V)
            v.addcmul_(g, g, value=1 - call.beta2)
            if key is not None and exp_avg.dtype == torch.bfloat16:
                bits = hash32(moment_key(key[block.slots]) ^ block.places)
                block.put(exp_avg, call.compact, stochastic_round(m, bits, torch.bfloat16))
                block.put(exp_avg_sq, call.compact, stochastic_round(v, bits << 16 & 0xFFFFFFFF, torch.bfloat16))
            else:
                block.put(exp_avg, call.compact, m)
                block.put(exp_avg_sq, call.compact, v)
            denom = v.sqrt_().div_(correction[block.slots]).add_(call.eps)
            update = m.mul_(step_size[block.slots])
            w = block.take(master[0], call.compact, W) if master else block.take(weight, False, W)
            w = torch.mul(w, 1 - lr * call.weight_decay, out=W).addcdiv_(update, denom, value=-1)
            if master:
                block.put(master[0], call.compact, w)
            elif key is not None and weight.dtype != torch.float32:
                w = stochastic_round(w, hash32(key[block.slots] ^ block.places), weight.dtype)
            block.put(weight, False, w)


class Block(NamedTuple):
    """Some of a weight's salient elements, side by side: `channels` along `dim` in the rows `of_whole` of a tensor of
    its shape; in a compact tensor, the rows `of_compact`. `slots` are the channels' places in the set, `places` the
    elements' places in a channel."""

    shape: torch.Size
    dim: int
    channels: Tensor
    of_whole: slice
    of_compact: slice
    slots: slice
    places: Tensor

    def take(self, tensor: Tensor, compact: bool, out: Tensor) -> Tensor:
        """These elements in fp32, in the tensor itself or in `out`."""
        if compact:
            return _float(tensor[self.of_compact], out)
        if tensor.dtype == torch.float32:
            return torch.index_select(tensor[self.of_whole], self.dim, self.channels, out=out)
        return out.copy_(tensor[self.of_whole].index_select(self.dim, self.channels))

    def put(self, tensor: Tensor, compact: bool, value: Tensor) -> None:
        if compact:
            tensor[self.of_compact] = value
        elif self.dim == 0:
            copy_rows_(tensor, self.channels, value.to(tensor.dtype))
        else:
            tensor[self.of_whole].index_copy_(1, self.channels, value.to(tensor.dtype))


def _float(tensor: Tensor, out: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else out.copy_(tensor)


def blocks(weight: Tensor, index: Tensor, dim: int) -> Iterator[Block]:
    N, K = weight.shape
    if dim == 0:
        places, size = torch.arange(K), max(1, _BLOCK // K)
        for first in range(0, len(index), size):
            own = slice(first, first + size)
            channels = index[own]
            yield Block(torch.Size((len(channels), K)), 0, channels, slice(None), own, own, places)
    else:
        places, size = torch.arange(N).unsqueeze(1), max(1, _BLOCK // len(index))
        for first in range(0, N, size):
            own = slice(first, min(first + size, N))
            shape = torch.Size((own.stop - first, len(index)))
            yield Block(shape, 1, index, own, own, slice(None), places[own])
