"""Compact state and compact gradients save what they promise, as the allocator counts it."""

from pathlib import Path

import pytest
import torch
from models import QWEN3_8B, backward, tiny_model, tokens
from transformers import AutoModelForCausalLM, Qwen3Config

from bench.memory import steps
from longact_kernels import LongAct, SalientAdamW

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"


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
    assert both.qk_gradients == weights * 4 * 19 / 64 + 4 * 4  # a flag for each layer
    assert full.qk_gradients == compact.qk_gradients == dense.qk_gradients
    assert both.peak < compact.peak < full.peak


@pytest.mark.parametrize("density", [0.3, 0.1, 0.01])
def test_bytes_of_qwen3_8b_with_all_linear_layers_sparse(density):
    config = Qwen3Config(**QWEN3_8B)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    longact = LongAct(model, target_modules="all-linear", density=density, grad="compact")
    optimizer = SalientAdamW(model.parameters(), longact=longact, state="compact")
    state = 0
    for layer in longact.layers.values():
        salient = layer.salient
        kept = layer.weight.detach().index_select(salient.dim, salient.index)
        kinds = optimizer.new_state(layer.weight, kept, salient.dim)
        state += (
            sum(held.nbytes for held in kinds.values()) + 2 * salient.index.nbytes
        )  # the set, and that of the state
        salient.chosen = True
    longact.compact.begin_step()
    # The same by hand: rows by layer, and of each row moments, master and gradient.
    q, kv, hidden, mlp = (max(1, int(density * n + 0.5)) for n in (128, 1024, 4096, 12288))
    elements = 36 * 4096 * ((32 + 8) * q + kv + hidden + 2 * mlp + 3 * hidden)
    rows = 36 * ((32 + 8) * q + kv + 2 * hidden + 2 * mlp)
    assert state == elements * 12 + rows * (4 + 16)
    gradients = longact.compact.flat.buffer.nbytes
    assert gradients == 4 * (elements + 252)  # and a flag for each layer
    weights = sum(p.nbytes for p in model.parameters())
    told = [weights, state, gradients, weights + state + gradients]
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| density {density} |"))
    assert [float(cell) for cell in row.split("|")[2:6]] == [round(size / 1e9, 2) for size in told]
