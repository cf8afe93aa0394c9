"""Weight gradient of the salient rows or columns on the CPU: pack the salient channels, then one matrix product."""

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
    check_channels("rows", [rows], [salient.shape[1]])
    empty = int((rows < 0).sum())
    slots, rows = len(rows), rows[empty:]
    if native.available():
        packed = _pack(salient, rows)
    elif dy.dtype == torch.float32:
        # MKL's product runs as fast on a transposed view, oneDNN's 16-bit one does not.
        packed = salient.index_select(1, rows).t()
    else:
        packed = _pack_aten(salient, rows)
    # In 16 bits it is rounded to them, as ATen's product is: that of a micro-batch before it is added up in fp32.
    dw = packed @ other
    if out is None:
        shape = [dy.shape[1], x.shape[1]]
        if compact:
            shape[not along_rows] = slots
        out = dy.new_zeros(shape, dtype=torch.float32 if compact else dy.dtype)
    target = out if along_rows else out.t()
    if compact:
        if not accumulate:
            target[:empty] = 0
        target = target[empty:]
        target.add_(dw) if accumulate else target.copy_(dw)
    elif accumulate:
        target.index_add_(0, rows, dw)
    else:
        copy_rows_(target, rows, dw)
    return out


def _pack(source: Tensor, channels: Tensor) -> Tensor:
    """`source[:, channels].T`, contiguous: the layout in which the product runs at full speed."""
    from longact_kernels.cpu.native.salient_wgrad import TOKENS, pack

    source = source if source.stride(1) == 1 else source.contiguous()
    channels = channels.contiguous()
    packed = source.new_empty(len(channels), len(source))
    native.run(
        pack,
        -(-len(source) // TOKENS),
        [
            source.data_ptr(), source.element_size(), source.stride(0), len(source),
            channels.data_ptr(), len(channels), packed.data_ptr(),
        ],
    )  # fmt: skip
    return packed


def _pack_aten(source: Tensor, channels: Tensor) -> Tensor:
    """As `_pack`, in ATen operations on blocks that fit the cache."""
    packed = source.new_empty(len(channels), len(source))
    for first in range(0, len(source), _CHUNK):
        tokens = slice(first, first + _CHUNK)
        packed[:, tokens] = source[tokens].t().index_select(0, channels)
    return packed
