"""Weight gradient of the salient rows or columns on the CPU: pack the salient channels, then one matrix product."""

from collections.abc import Callable

import torch
from torch import Tensor

from longact_kernels.cpu import native
from longact_kernels.cpu.rows import copy_rows_
from longact_kernels.reference.channels import check_channels

# Tokens that the ATen form packs at a time: their salient channels are taken while they are in the cache.
_CHUNK = 256


def salient_wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    axis: str = "rows",
    compact: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """See :func:`longact_kernels.ops.salient_wgrad`."""
    along_rows = axis == "rows"
    salient, other = (dy, x) if along_rows else (x, dy)
    if compact and along_rows and _multiplies(dy, x):
        return _product(dy, x, rows, out, accumulate)
    if native.available():
        packed, empty = _pack(salient, rows)
    else:
        check_channels("rows", [rows], [salient.shape[1]])
        empty = int((rows < 0).sum())
        if dy.dtype == torch.float32:
            # MKL's product runs as fast on a transposed view, oneDNN's 16-bit one does not.
            packed = salient.index_select(1, rows[empty:]).t()
        else:
            packed = _pack_aten(salient, rows[empty:])
    # In 16 bits it is rounded to them, as ATen's product is: that of a micro-batch before it is added up in fp32.
    dw = torch.mm(packed, other)
    if out is None:
        shape = [dy.shape[1], x.shape[1]]
        if compact:
            shape[not along_rows] = len(rows)
        out = dy.new_zeros(shape, dtype=torch.float32 if compact else dy.dtype)
    target = out if along_rows else out.t()
    if compact:
        if empty:
            if not accumulate:
                target[:empty] = 0
            target = target[empty:]
        target.add_(dw) if accumulate else target.copy_(dw)
    elif accumulate:
        target.index_add_(0, rows[empty:], dw)
    else:
        copy_rows_(target, rows[empty:], dw)
    return out


def _pack(source: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """`source[:, channels].T`, contiguous: the layout in which the product runs at full speed.

    Also how many slots of `rows` hold no channel.
    """
    from longact_kernels.cpu.native.salient_wgrad import pack

    packed = source.new_empty(len(rows), len(source))
    empty = _run(pack, source, rows, packed)
    return packed[: len(rows) - empty] if empty else packed, empty


def _run(pack: Callable, source: Tensor, rows: Tensor, packed: Tensor) -> int:
    """Packs; returns how many slots hold no channel. Whether this is a set is seen in the same call."""
    from longact_kernels.cpu.native.salient_wgrad import TOKENS

    source = source if source.stride(1) == 1 else source.contiguous()
    rows = rows.contiguous()
    M, N = source.shape
    args = [
        source.data_ptr(), source.element_size(), source.stride(0), M, N, rows.data_ptr(), len(rows),
        packed.data_ptr(), 0,
    ]  # fmt: skip
    empty = native.run(pack, max(1, -(-M // TOKENS)), args)[-1]
    if empty < 0:
        check_channels("rows", [rows], [N])  # says what is wrong
    return empty


def _multiplies(dy: Tensor, x: Tensor) -> bool:
    """Whether `_product` takes these, and is faster than packing, ATen's product and widening, one by one."""
    if dy.dtype != torch.bfloat16 or not len(dy) or not native.available():
        return False
    from longact_kernels.cpu.native.salient_wgrad import COLUMNS, multiplies

    return multiplies() and x.shape[1] % COLUMNS == 0 and x.stride(1) == 1


def _product(dy: Tensor, x: Tensor, rows: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    """The compact gradient of rows, added up in fp32 and never rounded."""
    from longact_kernels.cpu.native.salient_wgrad import COLUMNS, ROWS, pack_pairs, product

    (M, K), S = x.shape, len(rows)
    packed = torch.empty(-(-S // ROWS) * (M + M % 2) * ROWS, dtype=torch.bfloat16)
    empty = _run(pack_pairs, dy, rows, packed)
    out = torch.zeros(S, K) if out is None else out
    if empty and not accumulate:
        out[:empty] = 0
    args = [
        packed.data_ptr(), S - empty, M, x.data_ptr(), x.stride(0),
        out.data_ptr() + empty * out.stride(0) * out.element_size(), out.stride(0), accumulate,
    ]  # fmt: skip
    native.run(product, K // COLUMNS, args)
    return out


def _pack_aten(source: Tensor, channels: Tensor) -> Tensor:
    """As `_pack`, in ATen operations on blocks that fit the cache."""
    packed = source.new_empty(len(channels), len(source))
    for first in range(0, len(source), _CHUNK):
        tokens = slice(first, first + _CHUNK)
        packed[:, tokens] = source[tokens].t().index_select(0, channels)
    return packed
