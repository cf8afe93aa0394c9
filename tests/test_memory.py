"""Compact state and compact gradients save what they promise, as the allocator counts it."""

import pytest
import torch
from models import backward, tiny_model, tokens

from bench.memory import steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_and_key_memory_is_at_most_31_hundredths_of_dense(dtype):
    def load():
        return tiny_model(hidden_size=512, head_dim=64).to(dtype)

    dense, full, compact, both = steps(load, backward, tokens()).values()
    weights = 2 * (4 + 2) * 64 * 512
    assert dense.qk_state == pytest.approx(weights * (8 if dtype == torch.float32 else 12), rel=1e-3)
    assert dense.qk_gradients == weights * dtype.itemsize
    assert dense.qk_state < full.qk_state < 1.02 * dense.qk_state  # the sets, statistics and step counts
    for step in (compact, both):
        # 19 of the 64 channels of a head.
        assert 19 / 64 < step.qk_state / dense.qk_state < 0.31
        assert dense.state - step.state == pytest.approx(dense.qk_state - step.qk_state, rel=1e-2)
    assert both.qk_gradients == weights * 4 * 19 / 64
    assert full.qk_gradients == compact.qk_gradients == dense.qk_gradients
    assert both.peak < compact.peak < full.peak
