"""`longact::sparse_adamw_`: AdamW over the salient rows or columns of many weights at once."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longact_kernels.ops.arguments import check_apart, check_list, check_tensors, overlaps_itself
from longact_kernels.ops.dispatch import launch, runs_triton, warn_reference
from longact_kernels.ops.uploads import upload
from longact_kernels.reference.sparse_adamw import AdamWCall
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as _reference


def sparse_adamw_(*args: Any, **kwargs: Any) -> None:
    """One AdamW step on the salient channels of every weight, in place; all other channels keep their bits.

    For each row `i` in a weight's `index`, with its own step count τ (bias correction as if it were trained alone)::

        steps[i] += 1
        g = grad[i] / grad_scale
        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g
        W = (1 - lr * weight_decay) * W - lr * (m / (1 - beta1**tau)) / (sqrt(v / (1 - beta2**tau)) + eps)

    With `axis="columns"` read "column" for "row": it is the same on the transposed weights. Whoever steps the same
    weights again and again makes an :class:`AdamWPlan`, whose step costs the host a fraction of this.

    Args:
        weights: [N, K] each, fp32, fp16 or bf16.
        grads: [N, K] each, fp32, fp16 or bf16, of which the salient rows are read; or [S, K], slot s belonging to row
            `index[s]` ([N, S] along columns). One of the weight's own shape is always taken as the former.
        index: int64 [S] each, ascending: the salient rows, or columns. It may begin with entries of -1, slots without a
            channel: nothing of theirs is read or written. An empty list: no sets, all of every weight is stepped. Then
            weights are of any shape and contiguous, all that goes with them is of their shape, and `steps` are 0-dim
            fp32, as `torch.optim.AdamW` keeps them. (On a CPU its own fused form is the faster one for that.)
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
        TypeError, ValueError: for arguments that do not fit, naming them; nothing has changed then.
        IndexError: on a CPU, for a set that does not ascend within its weight; nothing has changed then. Kernels on a
            GPU leave channels out that the weight has not.
    """
    call = AdamWCall(*args, **kwargs)
    _check_held(call)
    _check_numbers(call)
    if call.weights:
        _check_grads(call)
        torch.ops.longact.sparse_adamw_.default(*call)


sparse_adamw_.__signature__ = inspect.signature(AdamWCall)  # type: ignore[attr-defined]


class AdamWPlan:
    """The weights of a step and what stays with them: checked once, and put into the kernel's table once.

    `AdamWPlan(weights, index, exp_avgs, exp_avg_sqs, steps, masters).step(grads, lr, ...)` does what
    :func:`sparse_adamw_` does, which explains the arguments. All tensors but the gradients, the learning rate and the
    scaler's have to stay where they are, as :meth:`fits` tells; what they hold may change, the salient sets too.

    Under CUDA graphs: what a graph reads of the plan's own stays valid as long as the graph does, even without the
    plan. As with any graph, the tensors handed over must live on and stay where they are, gradients too: zero them in
    place, or make them inside the captured part. A learning rate that changes between replays is a tensor on the
    device, written in place. Nothing in a step waits for the device; warm-up, replays and eager calls may be on streams
    of their own, if these wait for one another as the tensors need it.

    Raises:
        ValueError: for lists, shapes, dtypes or an axis that do not fit, naming the argument.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        index: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        masters: Sequence[Tensor] = (),
        *,
        compact: bool = False,
        axis: str = "rows",
    ):
        lists = weights, index, exp_avgs, exp_avg_sqs, steps, masters
        for name, tensors in zip(_HELD, lists, strict=True):
            check_list(name, tensors)
        self._held: dict[str, Any] = {name: [*tensors] for name, tensors in zip(_HELD, lists, strict=True)}
        self._options: dict[str, Any] = dict(compact=compact, axis=axis)
        call = self._call([])
        _check_held(call)
        self._addresses = _addresses(*lists)
        self._changed = [tensor for name in _MUTATED for tensor in self._held[name]]
        self._seen: GradLayout | None = None
        self._run = _prepare(call) if weights else None

    def fits(self, *lists: Sequence[Tensor]) -> bool:
        """Whether the tensors, lists in the constructor's order, lie where the plan's do: one look at each address."""
        return _addresses(*lists) == self._addresses

    def step(
        self,
        grads: Sequence[Tensor],
        lr: Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        """One step on these gradients.

        Raises:
            TypeError, ValueError: for gradients or numbers that do not fit, naming the argument.
            IndexError: as of :func:`sparse_adamw_`.
        """
        check_list("grads", grads)
        call = self._call(
            list(grads), lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize,
            grad_scale=grad_scale, found_inf=found_inf, seed=seed,
        )  # fmt: skip
        _check_numbers(call)
        if torch.compiler.is_compiling():
            torch.ops.longact.sparse_adamw_.default(*call)
            return
        try:
            layout = GradLayout.of(call.grads)
        except (AttributeError, RuntimeError):
            check_tensors("grads", call.grads)
            raise
        if layout != self._seen:
            if self._seen is None or layout.kinds != self._seen.kinds:
                _check_grads(call)
            self._seen = layout
        if self._run is not None:
            self._run(call, self._seen)
            torch.autograd.graph.increment_version(self._changed)

    def _call(self, grads: list[Tensor], **numbers: Any) -> AdamWCall:
        arguments: dict[str, Any] = {**_NO_NUMBERS, **self._held, **self._options, **numbers}
        return AdamWCall(grads=grads, **arguments)


_HELD = ("weights", "index", "exp_avgs", "exp_avg_sqs", "steps", "masters")
_MUTATED = ("weights", "exp_avgs", "exp_avg_sqs", "steps", "masters")
_MOST = torch.finfo(torch.float32).max  # what a kernel computes with
_BELOW = {"beta1": 1.0, "beta2": 1.0, "eps": math.inf, "weight_decay": math.inf}
_NO_NUMBERS: dict[str, Any] = dict(lr=torch.zeros(()), beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)


def _addresses(*lists: Sequence[Tensor]) -> list[list[int]]:
    return [[tensor.data_ptr() for tensor in tensors] for tensors in lists]


class GradLayout(NamedTuple):
    """All that a kernel is told of gradients; a plan looks closer only when it has changed."""

    addresses: list[int]
    strides: list[tuple[int, ...]]
    kinds: tuple[list[torch.Size], list[torch.dtype], list[torch.device], list[bool]]

    @classmethod
    def of(cls, grads: list[Tensor]) -> "GradLayout":
        return cls(
            [grad.data_ptr() for grad in grads],
            [grad.stride() for grad in grads],
            (
                [grad.shape for grad in grads],
                [grad.dtype for grad in grads],
                [grad.device for grad in grads],
                [grad.is_neg() for grad in grads],
            ),
        )


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {
    "weights": _FLOATS,
    "index": (torch.int64,),
    "exp_avgs": (torch.float32, torch.bfloat16),
    "exp_avg_sqs": (torch.float32, torch.bfloat16),
    "steps": (torch.int32,),
    "masters": (torch.float32,),
}


def _check_held(call: AdamWCall) -> None:
    """List by list rather than weight by weight: with many small weights the time that it takes would show."""
    if call.axis not in ("rows", "columns"):
        raise ValueError(f"axis: got {call.axis!r}, needed 'rows' or 'columns'")
    lists = {name: getattr(call, name) for name in _HELD}
    for name, tensors in lists.items():
        check_tensors(name, tensors)
    lengths = {name: len(tensors) for name, tensors in lists.items() if tensors or name not in ("index", "masters")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"sparse_adamw_: lists of one length needed, got {lengths}")
    devices = {tensor.device for tensors in lists.values() for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"sparse_adamw_: tensors of one device needed, got {', '.join(sorted(map(str, devices)))}")
    check_apart("sparse_adamw_: two of the weights and states", [t for name in _MUTATED for t in lists[name]])
    for name, tensors in lists.items():
        _check_dtypes(name, tensors, (torch.float32,) if name == "steps" and not call.index else _DTYPES[name])
    _check_dtypes("exp_avgs, exp_avg_sqs", call.exp_avgs[:1] + call.exp_avg_sqs[:1], _DTYPES["exp_avgs"])
    if not call.index:
        if call.compact or call.axis != "rows":
            raise ValueError("index: got no sets, needed some with compact=True or axis='columns'")
        whole = [weight.shape for weight in call.weights]
        for name in ("weights", "exp_avgs", "exp_avg_sqs", "masters"):
            _check_shapes(name, lists[name], whole[: len(lists[name])])
        _check_shapes("steps", call.steps, [()] * len(whole))
        return

    for i, weight in enumerate(call.weights):
        if weight.ndim != 2 or not _has_plain_rows(weight) or overlaps_itself(weight):
            raise _misfit("weights", i, weight, "[N, K], rows apart and elements of a row next to one another")
    _check_shapes("index", call.index, [(index.numel(),) for index in call.index])
    along = 0 if call.axis == "rows" else 1
    held = _salient_shapes(call) if call.compact else [weight.shape for weight in call.weights]
    for name in ("exp_avgs", "exp_avg_sqs", "masters"):
        if lists[name]:
            _check_shapes(name, lists[name], held)
    _check_shapes("steps", call.steps, [(shape[along],) for shape in held])


def _check_grads(call: AdamWCall) -> None:
    check_tensors("grads", call.grads)
    if len(call.grads) != len(call.weights):
        raise ValueError(f"grads: got {len(call.grads)}, needed one for each of {len(call.weights)} weights")
    _check_dtypes("grads", call.grads, _FLOATS)
    for i, (grad, weight, salient) in enumerate(zip(call.grads, call.weights, _salient_shapes(call), strict=True)):
        if grad.device != weight.device:
            raise ValueError(f"grads[{i}]: got one on {grad.device}, needed {weight.device}, where its weight is")
        if grad.shape != weight.shape and grad.shape != salient:
            raise _misfit("grads", i, grad, f"{list(weight.shape)} or {list(salient)}")


def _check_numbers(call: AdamWCall) -> None:
    for name in _BELOW:
        check_number(name, getattr(call, name))
    if call.seed is not None and (not isinstance(call.seed, int) or not -(2**63) <= call.seed < 2**63):
        raise ValueError(f"seed: got {call.seed!r}, needed a whole number of 64 bits, or None")
    for name in ("lr", "grad_scale", "found_inf"):
        if (value := getattr(call, name)) is not None or name == "lr":
            check_scalar(name, value)


def check_number(name: str, value: Any) -> None:
    """Raises ValueError for a hyperparameter that is no number, or out of its range."""
    below = _BELOW.get(name, math.inf)
    if not isinstance(value, (int, float)) or not (0 <= value < below and value <= _MOST):
        needed = "a number of at least 0 and below 1" if below == 1 else "a finite float32 number of at least 0"
        raise ValueError(f"{name}: got {value!r}, needed {needed}")


def check_scalar(name: str, value: Any) -> None:
    """Raises ValueError for what is no tensor of one element, or holds none of its numbers."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {kind}, needed a tensor of one element")
    # What lies on a device is read there alone.
    if value.is_cpu and not torch.compiler.is_compiling() and name != "found_inf":
        number = value.item()
        if not 0 <= number <= _MOST or (name == "grad_scale" and not number):
            least = "above 0" if name == "grad_scale" else "of at least 0"
            raise ValueError(f"{name}: got {number}, needed a finite float32 number {least}")


def _salient_shapes(call: AdamWCall) -> Sequence[tuple[int, ...]]:
    if not call.index:
        return [weight.shape for weight in call.weights]
    sizes = [(weight.shape, index.numel()) for weight, index in zip(call.weights, call.index, strict=True)]
    return [(S, K) if call.axis == "rows" else (N, S) for (N, K), S in sizes]


def _check_dtypes(name: str, tensors: list[Tensor], allowed: tuple[torch.dtype, ...]) -> None:
    dtypes = {tensor.dtype for tensor in tensors}
    for i, tensor in enumerate(tensors if not dtypes.issubset(allowed) else ()):
        if tensor.dtype not in allowed:
            raise ValueError(f"{name}[{i}]: got {tensor.dtype}, needed {' or '.join(map(str, allowed))}")
    if len(dtypes) > 1:
        raise ValueError(f"{name}: one dtype needed in a call, got {', '.join(sorted(map(str, dtypes)))}")


def _check_shapes(name: str, tensors: list[Tensor], shapes: Sequence[Sequence[int]]) -> None:
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise _misfit(name, i, tensor, f"{list(shape)}, contiguous")


def _misfit(name: str, i: int, tensor: Tensor, needed: str) -> ValueError:
    return ValueError(f"{name}[{i}]: got {list(tensor.shape)} with strides {list(tensor.stride())}, needed {needed}")


def _prepare(call: AdamWCall) -> Callable[[AdamWCall, GradLayout], None]:
    """What steps the weights of a call, and of all later ones with the same tensors but for the gradients."""
    weight = call.weights[0]
    if runs_triton(weight):
        prepared = Launcher(call)
        return lambda call, layout: launch(weight, prepared, call, layout)
    if weight.is_cpu and call.index:
        from longact_kernels.cpu.sparse_adamw import Prepared

        return Prepared(call)
    if not weight.is_cpu:
        warn_reference("sparse_adamw_", weight.device.type)
    return lambda call, layout: _reference(call)


# Not `torch.library.custom_op`: with hundreds of tensors, what it adds to a call takes longer than small weights' step.
def _run(*args: Any) -> None:
    call = AdamWCall(*args)
    _prepare(call)(call, GradLayout.of(call.grads))
    torch.autograd.graph.increment_version([tensor for name in _MUTATED for tensor in getattr(call, name)])


_run.__signature__ = inspect.signature(AdamWCall).replace(return_annotation=None)  # type: ignore[attr-defined]
_library = torch.library.Library("longact", "FRAGMENT")
_library.define("sparse_adamw_" + torch.library.infer_schema(_run, mutates_args=_MUTATED))
_library.impl("sparse_adamw_", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("longact::sparse_adamw_")
def _(*args) -> None:
    return None


class Launcher:
    """Launches the kernel on the tensors of a call, with a table of their addresses that is made once."""

    def __init__(self, call: AdamWCall):
        from longact_kernels.csrc_triton.sparse_adamw import CHUNK, FIELDS, LAYOUTS, launch_config

        self._device, self._whole, chunk = call.weights[0].device, not call.index, CHUNK.value
        if self._whole:
            sizes = [weight.numel() for weight in call.weights]
            channels = [(0, -(-size // chunk), 1, size, chunk, chunk) for size in sizes]
        else:
            along = 1 if call.axis == "rows" else 0
            channels = [
                (
                    *(index.data_ptr(), index.numel(), weight.shape[1 - along], weight.shape[along]),
                    *(weight.stride(0), exp_avg.stride(0)),
                )
                for weight, index, exp_avg in zip(call.weights, call.index, call.exp_avgs, strict=True)
            ]
        longest = chunk if self._whole else max(length for _, _, _, length, *_ in channels)
        self._configs = {layout: launch_config(layout, longest, call.exp_avgs[0].itemsize) for layout in LAYOUTS}
        block = self._configs["columns" if call.axis == "columns" else "aligned"]["BLOCK_C"]
        lists = (call.weights, call.exp_avgs, call.exp_avg_sqs, call.steps, call.masters or call.weights)
        lines, programs = [], [0]
        for (index, count, size, length, stride_weight, stride_state), *tensors in zip(channels, *lists, strict=True):
            weight, exp_avg, exp_avg_sq, step, master = map(Tensor.data_ptr, tensors)
            line = {
                "weight": weight,
                "channels": index,
                "exp_avg": exp_avg,
                "exp_avg_sq": exp_avg_sq,
                "steps": step,
                "master": master,
                "count": count,
                "size": size,
                "length": length,
                "stride_weight": stride_weight,
                "stride_state": stride_state,
                "state_compact": int(call.compact),
                "first_program": programs[-1],
            }
            lines.append([line.get(field, 0) for field in FIELDS])
            programs.append(programs[-1] - (-count // block))
        self._programs = programs[-1]
        matrices = call.weights + call.exp_avgs + call.exp_avg_sqs + call.masters
        rows = [tensor.view(1, -1) if self._whole else tensor for tensor in matrices]
        self._aligned = all(_is_aligned(tensor.data_ptr(), tensor.stride(0), tensor.shape[1]) for tensor in rows)
        self._table = torch.tensor(lines)
        self._weight_of = torch.arange(len(lines), dtype=torch.int32).repeat_interleave(torch.tensor(programs).diff())
        self._of_grads = [FIELDS.index(field) for field in ("grad", "stride_grad", "grad_compact")]
        # By stream: only there is a copy in order with what uses it.
        self._copies: dict[Any, tuple[GradLayout, Tensor, Tensor, str]] = {}

    def __call__(self, call: AdamWCall, layout: GradLayout) -> None:
        import triton.language as tl

        from longact_kernels.csrc_triton.sparse_adamw import FIELDS, sparse_adamw

        grads, dtype = call.grads, call.weights[0].dtype
        plain = Tensor.is_contiguous if self._whole else _has_plain_rows
        if not (grads[0].dtype in (dtype, torch.float32) and all(map(plain, grads))):
            grads = [grad if grad.dtype in (dtype, torch.float32) else grad.float() for grad in grads]
            grads = [grad if plain(grad) else grad.contiguous() for grad in grads]
            layout = GradLayout.of(grads)
        if self._whole:
            # As torch's own fused form: the kernel reads the counts, of which many programs share one.
            stepped = 1.0 if call.found_inf is None else (call.found_inf.reshape(()) == 0).to(torch.float32)
            torch._foreach_add_(call.steps, stepped)
        if self._programs == 0:
            return
        table, weight_of, kind = self._on_device(call, layout)
        types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        scalars = (self._scalar(name, getattr(call, name)) for name in ("lr", "grad_scale", "found_inf"))
        sparse_adamw[(self._programs,)](
            table, weight_of, *scalars, _log(call.beta1), _log(call.beta2), 1 - call.beta1, call.beta2,
            1 - call.beta2, call.eps, call.weight_decay, -1.0 if call.maximize else 1.0,
            0 if call.seed is None else _signed(call.seed), int(call.seed is not None),
            WEIGHT=types[dtype], GRAD=types[grads[0].dtype], MOMENT=types[call.exp_avgs[0].dtype],
            HAS_MASTER=bool(call.masters), COLUMNS=kind == "columns", WHOLE=self._whole, ALIGNED=kind == "aligned",
            WIDTH=len(FIELDS), **self._configs[kind],
        )  # fmt: skip

    def _on_device(self, call: AdamWCall, layout: GradLayout) -> tuple[Tensor, Tensor, str]:
        """The table, with these gradients in it; the line of it that each program works for; the tiles' layout."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        found = None if capturing else self._copies.get(stream)
        if found is not None and found[0] == layout:
            return found[1:]
        table: Tensor = self._table.clone()
        shapes = layout.kinds[0]
        strides = [0 if self._whole else stride[0] for stride in layout.strides]
        compact = [shape != weight.shape for shape, weight in zip(shapes, call.weights, strict=True)]
        table[:, self._of_grads] = torch.tensor([layout.addresses, strides, compact]).T
        lengths = [shape.numel() if self._whole else shape[1] for shape in shapes]
        aligned = self._aligned and all(map(_is_aligned, layout.addresses, strides, lengths))
        kind = "columns" if call.axis == "columns" else "aligned" if aligned else "unaligned"
        (table,) = upload(self._device, table)
        (weight_of,) = upload(self._device, self._weight_of) if found is None else found[2:3]
        if not capturing:
            self._copies[stream] = layout, table, weight_of, kind
        return table, weight_of, kind

    def _scalar(self, name: str, value: Tensor | None) -> Tensor | None:
        if value is None or value.device == self._device:
            return value if value is None else value.to(torch.float32)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{name}: got a tensor on {value.device}, which a CUDA graph cannot follow; needed one on "
                f"{self._device}, written in place"
            )
        # A number among the arguments of a launch: nothing waits for a copy.
        return torch.full((), value.item(), dtype=torch.float32, device=self._device)


def _has_plain_rows(tensor: Tensor) -> bool:
    return tensor.stride()[1] == 1 or tensor.shape[1] <= 1


def _is_aligned(address: int, stride: int, length: int) -> bool:
    """Whether every row of a matrix starts at a multiple of 16 bytes and of 8 elements."""
    return address % 16 == 0 and stride % 8 == 0 and length % 8 == 0


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _signed(seed: int) -> int:
    """The low 32 bits of a seed as the int32 with the same bits."""
    return (seed & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
