"""Copying rows with ATen."""

import torch
from torch import Tensor


def copy_rows_(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """`target.index_copy_(0, rows, values)` in the widest elements that rows allow: it copies one by one."""
    lengths = target.shape[1], target.stride(0)
    starts = target.storage_offset(), values.storage_offset()
    sizes = (target.data_ptr(), values.data_ptr(), *(length * target.itemsize for length in (*lengths, *starts)))
    wide = target.numel() > 0 and target.stride(1) == 1 and not any(size % 16 for size in sizes)
    dtype = torch.complex128 if wide else target.dtype
    target.view(dtype).index_copy_(0, rows, values.view(dtype))
