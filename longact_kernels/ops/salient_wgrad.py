"""`longact::salient_wgrad`: the weight gradient of the salient rows or columns only."""

import functools
from collections.abc import Callable
from typing import Literal

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
    salient ones kept. On a CPU and on ROCm the product of 16-bit tensors may be rounded to 16 bits before it is
    added to `out` or widened.

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
    if runs_at_once(dy):
        return _at_once(dy, x, rows, axis, compact, out, accumulate)
    if out is None:
        return torch.ops.longact.salient_wgrad(dy, x, rows, axis, compact)
    torch.ops.longact.salient_wgrad_(out, dy, x, rows, axis, compact, accumulate)
    return out


library.define("salient_wgrad(Tensor dy, Tensor x, Tensor rows, str axis, bool compact) -> Tensor")
library.define(
    "salient_wgrad_(Tensor(a!) out, Tensor dy, Tensor x, Tensor rows, str axis, bool compact, bool accumulate) -> ()"
)


@torch.library.impl(library, "salient_wgrad", "CompositeExplicitAutograd")
def _run(dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool) -> Tensor:
    return _at_once(dy, x, rows, axis, compact, None, False)


@torch.library.register_fake("longact::salient_wgrad")
def _(dy, x, rows, axis, compact):
    if not compact:
        return dy.new_empty(dy.shape[1], x.shape[1])
    shape = (rows.shape[0], x.shape[1]) if axis == "rows" else (dy.shape[1], rows.shape[0])
    return dy.new_empty(shape, dtype=torch.float32)


@torch.library.impl(library, "salient_wgrad_", "CompositeExplicitAutograd")
def _write(out: Tensor, dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool, accumulate: bool) -> None:
    _at_once(dy, x, rows, axis, compact, out, accumulate)


@torch.library.register_fake("longact::salient_wgrad_")
def _(out, dy, x, rows, axis, compact, accumulate):
    return None


def _at_once(
    dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool, out: Tensor | None, accumulate: bool
) -> Tensor:
    run = implementation("salient_wgrad", dy, _kernels, _reference) if dy.dtype in _FLOATS else _reference
    dw = run(dy, x, rows, axis, compact, out, accumulate)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return dw


def _kernels(
    dy: Tensor, x: Tensor, rows: Tensor, axis: str, compact: bool, out: Tensor | None, accumulate: bool
) -> Tensor:
    source = x if axis == "columns" else dy
    fill = not accumulate and (compact or out is None)
    launch = _plan(dy.shape, x.shape, source.stride(), rows.shape[0], dy.dtype, axis, compact, accumulate, fill)
    return launch(dy, x, rows, out)


@functools.lru_cache(maxsize=1024)
def _plan(
    dy: torch.Size,
    x: torch.Size,
    strides: tuple[int, int],
    S: int,
    dtype: torch.dtype,
    axis: str,
    compact: bool,
    accumulate: bool,
    fill: bool,
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """The launches for tensors of such shapes.

    Args:
        dy, x, S, dtype: shapes, size of the set, and dtype.
        strides: of the one that has the channels.
        axis, compact, accumulate: as of `salient_wgrad`.
        fill: whether lines outside the set are set to zero.
    """
    kernels = device_code("salient_wgrad")
    (M, N), K, columns = dy, x[1], axis == "columns"
    channels, other = (K, N) if columns else (N, K)
    R, C = (N, K) if not compact else (N, S) if columns else (S, K)
    out_dtype = torch.float32 if compact else dtype
    # A multiple of 16 channels keeps every access aligned, whatever the size of the set.
    P = -(-S // 16) * 16
    packs = kernels.pays(M, channels, P, other, dtype.itemsize)
    pack, scatter = kernels.PACK_CONFIG, kernels.SCATTER_CONFIG[axis]
    packing = (-(-M // pack["BLOCK_M"]) * -(-P // pack["BLOCK_S"]),)
    scattering = kernels.scatter_grid(R, C, columns, scatter["BLOCK_C"])
    gaps = strides[1] != 1
    sizes = M, channels, S, P, channels if gaps else strides[0]
    lines = R, C, S, channels, S.bit_length(), P if packs and columns else K
    options = dict(COLUMNS=columns, COMPACT=compact, WHOLE=not packs, ACCUMULATE=accumulate, FILL=fill, **scatter)
    wide = (compact or accumulate) and dtype != torch.float32 and not torch.version.hip

    def nothing(dy, x, rows, out):
        out = dy.new_empty(R, C, dtype=out_dtype) if out is None else out
        return out.zero_() if fill else out

    def launch(dy, x, rows, out):
        if out is None:
            out = dy.new_empty(R, C, dtype=out_dtype)
        left, right = dy, x
        if packs:
            source = x if columns else dy
            packed = source.new_empty(M, P)
            if M:
                source = source.contiguous() if gaps else source
                kernels.pack_kernel[packing](source, rows, packed, *sizes, **pack)
            left, right = (dy, packed) if columns else (packed, x)
        product = _product(left.t(), right) if wide else torch.mm(left.t(), right)
        kernels.scatter_kernel[scattering](product, rows, out, *lines, out.stride(0), **options)
        return out

    return launch if N and K and S else nothing


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in fp32, where the library gives it."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else torch.mm(left, right)
