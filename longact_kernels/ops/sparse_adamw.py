"""`longact::sparse_adamw_`: AdamW over the salient rows or columns of many weights at once."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longact_kernels.ops.dispatch import implementation
from longact_kernels.reference.sparse_adamw import AdamWCall
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
            `rows[s]` ([N, S] along columns). One of the weight's own shape is always taken as the former.
        rows: int64 [S] each, ascending: the salient rows, or columns. It may begin with entries of -1, slots without a
            channel: nothing of theirs is read or written.
        exp_avgs, exp_avg_sqs: [N, K] each; if `compact`, [S, K] like such gradients ([N, S] along columns). All fp32,
            or all bf16, computed in fp32 and rounded at the end. Rounding to nearest stops most second moments at a
            `beta2` of 0.999, whose changes are less than half of a last digit: give a `seed`.
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
        seed: rounds bf16 moments, and 16-bit weights that have no master, stochastically. The bits depend on the seed's
            low 32 bits, the weight's place in the list, the element and its τ only: the same call gives the same bits.

    Raises:
        ValueError: for lists, shapes, dtypes or an axis that do not fit, naming the argument.
    """
    call = AdamWCall(
        weights, grads, rows, exp_avgs, exp_avg_sqs, steps, masters, lr, beta1, beta2, eps, weight_decay,
        compact, maximize, axis, grad_scale, found_inf, seed,
    )  # fmt: skip
    _check(call)
    if weights:
        torch.ops.longact.sparse_adamw_.default(*call)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {
    "weights": _FLOATS,
    "grads": _FLOATS,
    "rows": (torch.int64,),
    "exp_avgs": (torch.float32, torch.bfloat16),
    "exp_avg_sqs": (torch.float32, torch.bfloat16),
    "steps": (torch.int32,),
    "masters": (torch.float32,),
}


def _check(call: AdamWCall) -> None:
    """List by list rather than weight by weight: with many small weights the time that it takes would show."""
    if call.axis not in ("rows", "columns"):
        raise ValueError(f"axis: got {call.axis!r}, needed 'rows' or 'columns'")
    lists = {name: getattr(call, name) for name in _DTYPES}
    lengths = [len(tensors) for name, tensors in lists.items() if tensors or name != "masters"]
    if len(set(lengths)) > 1:
        raise ValueError(f"sparse_adamw_: lists of one length needed, got {lengths}")
    devices = {tensor.device for tensors in lists.values() for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"sparse_adamw_: tensors of one device needed, got {', '.join(sorted(map(str, devices)))}")
    for name, tensors in lists.items():
        _check_dtypes(name, tensors, _DTYPES[name])
    _check_dtypes("exp_avgs, exp_avg_sqs", call.exp_avgs[:1] + call.exp_avg_sqs[:1], _DTYPES["exp_avgs"])

    whole = [weight.shape for weight in call.weights]
    for i, weight in enumerate(call.weights):
        if len(whole[i]) != 2 or not _has_plain_rows(weight):
            raise _misfit("weights", i, weight, "[N, K], elements of a row next to one another")
    slots = [index.numel() for index in call.rows]
    _check_shapes("rows", call.rows, [(S,) for S in slots])
    along = 0 if call.axis == "rows" else 1
    salient = [(S, K) if along == 0 else (N, S) for (N, K), S in zip(whole, slots, strict=True)]
    for i, shape in enumerate([grad.shape for grad in call.grads]):
        if shape != whole[i] and shape != salient[i]:
            raise _misfit("grads", i, call.grads[i], f"{list(whole[i])} or {list(salient[i])}")
    held = salient if call.compact else whole
    for name in ("exp_avgs", "exp_avg_sqs", "masters"):
        if lists[name]:
            _check_shapes(name, lists[name], held)
    _check_shapes("steps", call.steps, [(shape[along],) for shape in held])


def _check_dtypes(name: str, tensors: list[Tensor], allowed: tuple[torch.dtype, ...]) -> None:
    dtypes = {tensor.dtype for tensor in tensors}
    for i, tensor in enumerate(tensors if not dtypes.issubset(allowed) else ()):
        if tensor.dtype not in allowed:
            raise ValueError(f"{name}[{i}]: got {tensor.dtype}, needed {' or '.join(map(str, allowed))}")
    if len(dtypes) > 1:
        raise ValueError(f"{name}: one dtype needed in a call, got {', '.join(sorted(map(str, dtypes)))}")


def _check_shapes(name: str, tensors: list[Tensor], shapes: Sequence[Sequence[int]]) -> None:
    if [tensor.shape for tensor in tensors] == shapes and all(map(Tensor.is_contiguous, tensors)):
        return
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise _misfit(name, i, tensor, f"{list(shape)}, contiguous")


def _misfit(name: str, i: int, tensor: Tensor, needed: str) -> ValueError:
    return ValueError(f"{name}[{i}]: got {list(tensor.shape)} with strides {list(tensor.stride())}, needed {needed}")


# Not `torch.library.custom_op`: with hundreds of tensors, what it adds to a call takes longer than small weights' step.
_library = torch.library.Library("longact", "FRAGMENT")
_library.define(
    "sparse_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] rows, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] masters, Tensor lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool compact, bool maximize, str axis, Tensor? grad_scale, Tensor? found_inf, "
    "int? seed) -> ()"
)


@torch.library.impl(_library, "sparse_adamw_", "CompositeExplicitAutograd")
def _run(*args) -> None:
    call = AdamWCall(*args)
    run = implementation("sparse_adamw_", call.weights[0], _kernel, _reference)
    run(call)
    for changed in (call.weights, call.exp_avgs, call.exp_avg_sqs, call.steps, call.masters):
        torch.autograd.graph.increment_version(changed)


@torch.library.register_fake("longact::sparse_adamw_")
def _(*args) -> None:
    return None


def _kernel(call: AdamWCall) -> None:
    import triton.language as tl

    from longact_kernels.csrc_triton.sparse_adamw import FIELDS, launch_config, sparse_adamw

    device, dtype, moment = call.weights[0].device, call.weights[0].dtype, call.exp_avgs[0].dtype
    grads = [grad if grad.dtype in (dtype, torch.float32) else grad.float() for grad in call.grads]
    grads = [grad if _has_plain_rows(grad) else grad.contiguous() for grad in grads]
    held = list(zip(call.weights, grads, *call[2:6], call.masters or call.weights, strict=True))
    columns = call.axis == "columns"
    layout = "columns" if columns else "aligned" if all(map(_is_aligned, held)) else "unaligned"
    config = launch_config(layout, moment.itemsize)
    lines, programs = [], 0
    for weight, grad, index, exp_avg, exp_avg_sq, step, master in held:
        count = index.numel()
        line = {
            "weight": weight.data_ptr(),
            "grad": grad.data_ptr(),
            "channels": index.data_ptr(),
            "exp_avg": exp_avg.data_ptr(),
            "exp_avg_sq": exp_avg_sq.data_ptr(),
            "steps": step.data_ptr(),
            "master": master.data_ptr(),
            "count": count,
            "length": weight.shape[0 if columns else 1],
            "stride_weight": weight.stride(0),
            "stride_grad": grad.stride(0),
            "stride_state": exp_avg.stride(0),
            "grad_compact": int(grad.shape != weight.shape),
            "state_compact": int(call.compact),
            "first_program": programs,
        }
        lines.append(tuple(line[field] for field in FIELDS))
        programs += -(-count // config["BLOCK_C"])
    if programs == 0:
        return
    table, weight_of = _table(tuple(lines), config["BLOCK_C"], device)
    scalars = (None if s is None else s.to(device, torch.float32) for s in (call.lr, call.grad_scale, call.found_inf))
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    sparse_adamw[(programs,)](
        table, weight_of, *scalars, _log(call.beta1), _log(call.beta2), 1 - call.beta1, call.beta2, 1 - call.beta2,
        call.eps, call.weight_decay, -1.0 if call.maximize else 1.0,
        0 if call.seed is None else _signed(call.seed), int(call.seed is not None),
        WEIGHT=types[dtype], GRAD=types[grads[0].dtype], MOMENT=types[moment], HAS_MASTER=bool(call.masters),
        COLUMNS=columns, ALIGNED=layout == "aligned", WIDTH=len(FIELDS), **config,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _table(lines: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernel's table of addresses and sizes, and the table's line that each program works for.

    Kept until an address changes, so that a step neither builds nor copies anything.
    """
    from longact_kernels.csrc_triton.sparse_adamw import FIELDS

    counts = torch.tensor([line[FIELDS.index("count")] for line in lines])
    weight_of = torch.arange(len(lines), dtype=torch.int32).repeat_interleave((counts + block - 1) // block)
    made = torch.tensor(lines), weight_of
    if device.type != "cuda":
        return made
    # From pinned memory, the copy does not wait for the device.
    pinned = [tensor.pin_memory() for tensor in made]
    table = pinned[0].to(device, non_blocking=True), pinned[1].to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append((pinned, table))
    return table


_captured: list[tuple] = []
"""Tables that a CUDA graph copies anew, from these addresses, at every replay."""


def _has_plain_rows(tensor: Tensor) -> bool:
    return tensor.stride()[1] == 1 or tensor.shape[1] <= 1


def _is_aligned(tensors: tuple[Tensor, ...]) -> bool:
    """Whether every row of the matrices among a weight's tensors starts at a multiple of 16 bytes and of 8 elements."""
    matrices = [tensor for tensor in tensors if tensor.ndim == 2]
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.shape[1] % 8 == 0 for t in matrices)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _signed(seed: int) -> int:
    """The low 32 bits of a seed as the int32 with the same bits."""
    return (seed & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
