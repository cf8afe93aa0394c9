"""`longact::salient_wgrad`: the weight gradient of the salient rows or columns only."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from longact_kernels.ops.arguments import check_tensor, overlaps_itself
from longact_kernels.ops.dispatch import device_code, implementation, library, runs_at_once
from longact_kernels.reference.salient_wgrad import salient_wgrad as _reference

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def salient_wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    axis: Literal["rows", "columns"] = "rows",
    compact: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    bias: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weight gradient of `y = x @ weight.T`, computed for the salient rows (or columns) and zero elsewhere.

    Equivalent torch code::

        dw = torch.zeros(N, K)
        dw[rows] = dy[:, rows].T @ x            # axis="rows"
        dw[:, rows] = dy.T @ x[:, rows]         # axis="columns"
        db = dy.sum(0)                          # with bias: the whole gradient of the bias, which is never masked

    The salient channels are packed and multiplied by `torch.mm`, whose accuracy and bits these are: added up in fp32
    and rounded once. Where the products saved are predicted to take less than the packing, all are multiplied and the
    salient ones kept. On a CPU and on ROCm the product of 16-bit tensors is rounded to 16 bits before it is added to
    `out` or widened.

    Args:
        dy: gradient of the output [M, N] in fp32, fp16 or bf16.
        x: input [M, K], in the dtype of `dy`.
        rows: int64 [S], ascending: the salient set, of rows or of columns. It may begin with slots that hold no
            channel, -1: zero in the compact form (where `accumulate` adds nothing to them), absent from the other one.
        axis: "rows" or "columns", along which the salient channels lie.
        compact: return fp32 [S, K] (rows) or [N, S] (columns), slot s belonging to channel `rows[s]`.
        out: a tensor to write to, of the shape and dtype of the result, rows contiguous; channels outside the set keep
            their values.
        accumulate: add to `out` instead of overwriting it.
        bias: return the gradient of the bias as well, [N] in the dtype of `dy`.

    Returns:
        [N, K] in the dtype of `dy`, or the compact form, or `out`; with `bias` a pair of it and the bias gradient.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them.
        IndexError: on a CPU, for a set that does not ascend within the channels; `out` has not changed then. Kernels
            on a GPU leave channels out that there are not.
    """
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis: got {axis!r}, needed 'rows' or 'columns'")
    check_tensor("dy", dy)
    device = dy.device
    check_tensor("x", x, device)
    check_tensor("rows", rows, device)
    if dy.ndim != 2 or x.ndim != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy, x: got shapes {list(dy.shape)} and {list(x.shape)}, needed [M, N] and [M, K]")
    if dy.dtype not in (*_FLOATS, torch.float64):  # the reference takes doubles, for gradcheck
        raise ValueError(f"dy: got {dy.dtype}, needed fp32, fp16 or bf16")
    if dy.dtype != x.dtype:
        raise ValueError(f"x: got {x.dtype}, needed the dtype of dy, {dy.dtype}")
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows: got {rows.dtype} {list(rows.shape)}, needed torch.int64 [S]")
    if accumulate and out is None:
        raise ValueError("accumulate: needs `out`, the gradient to add to")
    if out is not None:
        check_tensor("out", out, device)
        shape = [dy.shape[1], x.shape[1]]
        if compact:
            shape[axis == "columns"] = len(rows)
        dtype = torch.float32 if compact else dy.dtype
        if list(out.shape) != shape or out.dtype != dtype or out.stride(1) != 1 or overlaps_itself(out):
            raise ValueError(
                f"out: got {out.dtype} {list(out.shape)} with strides {out.stride()}, "
                f"needed {dtype} {shape} with rows contiguous, each at a place of its own"
            )
    dw = multiply(dy, x, rows, axis, compact, out, accumulate)
    return (dw, dy.sum(0)) if bias else dw


def multiply(
    dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool = False, out: Tensor | None = None, accumulate=False
) -> Tensor:
    """`salient_wgrad` of arguments that are known to fit."""
    at_once = runs_at_once(dy)
    if out is None:
        return (_run if at_once else torch.ops.longact.salient_wgrad.default)(dy, x, rows, axis, compact)
    write = _write if at_once else torch.ops.longact.salient_wgrad_.default
    write(out, dy, x, rows, axis, compact, accumulate)
    return out


library.define("salient_wgrad(Tensor dy, Tensor x, Tensor rows, str axis, bool compact) -> Tensor")
library.define(
    "salient_wgrad_(Tensor(a!) out, Tensor dy, Tensor x, Tensor rows, str axis, bool compact, bool accumulate) -> ()"
)


@torch.library.impl(library, "salient_wgrad", "CompositeExplicitAutograd")
def _run(dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool) -> Tensor:
    return _implementation(dy)(dy, x, rows, axis, compact, None, False)


@torch.library.register_fake("longact::salient_wgrad")
def _(dy, x, rows, axis, compact):
    if not compact:
        return dy.new_empty(dy.shape[1], x.shape[1])
    shape = (rows.shape[0], x.shape[1]) if axis == "rows" else (dy.shape[1], rows.shape[0])
    return dy.new_empty(shape, dtype=torch.float32)


@torch.library.impl(library, "salient_wgrad_", "CompositeExplicitAutograd")
def _write(out: Tensor, dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool, accumulate: bool) -> None:
    _implementation(dy)(dy, x, rows, axis, compact, out, accumulate)
    torch.autograd.graph.increment_version(out)


@torch.library.register_fake("longact::salient_wgrad_")
def _(out, dy, x, rows, axis, compact, accumulate):
    return None


def _implementation(dy: Tensor) -> Callable[..., Tensor]:
    return _reference if dy.dtype not in _FLOATS else implementation("salient_wgrad", dy, _kernels, _reference)


def _kernels(
    dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool, out: Tensor | None, accumulate: bool
) -> Tensor:
    kernels, (R, C), P, sizes, packing, scattering, config = _plan(
        dy.shape, x.shape, rows.shape[0], dy.itemsize, axis, compact
    )
    fill = not accumulate and (compact or out is None)
    if out is None:
        out = dy.new_empty(R, C, dtype=torch.float32 if compact else dy.dtype)
    if not scattering:
        return out.zero_() if fill else out

    left, right = dy, x
    if P:
        source = x if axis == "columns" else dy
        source = source if source.stride(1) == 1 else source.contiguous()
        packed = source.new_empty(source.shape[0], P)
        if packing:
            kernels.pack_kernel[packing](
                source, rows, packed, *source.shape, sizes[0], P, source.stride(0), **kernels.PACK_CONFIG
            )
        left, right = (dy, packed) if axis == "columns" else (packed, x)
    product = _product(left.t(), right, wide=compact or accumulate)
    kernels.scatter_kernel[scattering](
        product, rows, out, R, C, *sizes, product.stride(0), out.stride(0), ACCUMULATE=accumulate, FILL=fill, **config
    )
    return out


@functools.lru_cache(maxsize=1024)
def _plan(dy: torch.Size, x: torch.Size, S: int, itemsize: int, axis: str, compact: bool) -> tuple[Any, ...]:
    """What is the same for all tensors of such shapes.

    Returns:
        The kernels; the shape of the result; how many channels are packed, 0 for none; S, channels and the bits of S;
        the grids that pack and write, None where there is nothing to do; and the options of the latter.
    """
    kernels = device_code("salient_wgrad")
    (M, N), K, columns = dy, x[1], axis == "columns"
    channels, other = (K, N) if columns else (N, K)
    shape = (N, K) if not compact else (N, S) if columns else (S, K)
    # A multiple of 16 channels keeps every access aligned, whatever the size of the set.
    P = -(-S // 16) * 16
    packs = kernels.pays(M, channels, P, other, itemsize)
    pack, scatter = kernels.PACK_CONFIG, kernels.SCATTER_CONFIG[axis]
    packing = (-(-M // pack["BLOCK_M"]) * -(-P // pack["BLOCK_S"]),) if M else None
    scattering = kernels.scatter_grid(*shape, columns, scatter["BLOCK_C"]) if N and K and S else None
    config = dict(COLUMNS=columns, COMPACT=compact, WHOLE=not packs, **scatter)
    return kernels, shape, P if packs else 0, (S, channels, S.bit_length()), packing, scattering, config


def _product(left: Tensor, right: Tensor, wide: bool) -> Tensor:
    """`left @ right`; if `wide`, in fp32 where the library gives it."""
    if wide and left.is_cuda and not torch.version.hip and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)
