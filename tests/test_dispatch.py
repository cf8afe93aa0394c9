"""Which implementation runs where."""

import os
from contextlib import contextmanager

import pytest
import torch

from longact_kernels import ops
from longact_kernels.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernel():
    """Stands for a launcher."""
    return "launched"


def reference():
    """Stands for a definition."""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_run_the_cpu_code_where_there_is_some():
    from longact_kernels.cpu.refresh import carry_
    from longact_kernels.reference import refresh as defined

    assert dispatch.implementation("carry_", torch.zeros(1), kernel, defined.carry_) is carry_
    assert dispatch.implementation("no such op", torch.zeros(1), kernel, defined.select) is defined.select


def test_another_device_runs_the_reference_and_says_so_once(recwarn):
    dispatch.warn_reference.cache_clear()
    tensor = torch.zeros(1, device="meta")
    if INTERPRETED:
        assert dispatch.implementation("channel_stats", tensor, kernel, reference)() == "launched"
        return
    for _ in range(2):
        assert dispatch.implementation("channel_stats", tensor, kernel, reference) is reference
    assert [str(w.message) for w in recwarn if "no kernel for 'channel_stats' on meta" in str(w.message)] != []
    assert len(recwarn) == 1


@pytest.mark.skipif(not INTERPRETED, reason="launches no kernel")
def test_every_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    current, launched, execute = [], {}, GridExecutor.__call__

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def recorded(self, *args, **kwargs):
        launched[self.fn.__name__] = list(current)
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(dispatch, "is_current", lambda tensor: False)
    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    x, weight, rows = torch.randn(4, 16), torch.randn(32, 16), torch.arange(8)
    y, *_ = ops.linear_stats(x, weight, impl="fused")
    ops.channel_stats(y)
    dw = ops.salient_wgrad(y, x, rows)
    states = [torch.zeros_like(dw)], [torch.zeros_like(dw)], [torch.zeros(32, dtype=torch.int32)], []
    ops.sparse_adamw_([weight], [dw], [rows], *states, torch.tensor(1e-3), 0.9, 0.99, 1e-8, 0.0)
    ops.carry_([[dw[:8].contiguous()]], [rows], [ops.select(torch.rand(32), 16, 4)])
    names = "channel_stats_partial channel_stats_merge linear_stats_kernel pack_kernel scatter_kernel"
    assert launched.keys() == {*names.split(), "sparse_adamw", "select_kernel", "carry_kernel"}
    assert all(launched.values()), launched
