"""Rows copied in wide elements are those that `index_copy_` copies."""

import pytest
import torch

from longact_kernels.cpu.rows import copy_rows_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 8, 24])
@pytest.mark.parametrize("offsets", [(0, 0), (0, 1), (1, 0), (8, 8)])
def test_as_index_copy(dtype, columns, offsets):
    """At any alignment of either side."""
    of_target, of_values = offsets
    target = torch.randn(of_target + 9 * columns).to(dtype)[of_target:].view(9, columns)
    values = torch.randn(of_values + 3 * columns).to(dtype)[of_values:].view(3, columns)
    rows = torch.tensor([0, 4, 8])
    wanted = target.clone().index_copy_(0, rows, values)
    copy_rows_(target, rows, values)
    assert torch.equal(target, wanted)
