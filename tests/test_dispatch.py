"""Which implementation runs where."""

import os

import pytest
import torch

from longact_kernels.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernel():
    """Stands for a launcher."""


def reference():
    """Stands for a definition."""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_run_the_cpu_code_where_there_is_some():
    from longact_kernels.cpu.channel_stats import channel_stats

    assert dispatch.implementation("channel_stats", torch.zeros(1), kernel, reference) is channel_stats
    assert dispatch.implementation("no_such_op", torch.zeros(1), kernel, reference) is reference


def test_another_device_runs_the_reference_and_says_so_once(recwarn):
    dispatch.warn_reference.cache_clear()
    tensor = torch.zeros(1, device="meta")
    if INTERPRETED:
        assert dispatch.implementation("channel_stats", tensor, kernel, reference) is kernel
        return
    for _ in range(2):
        assert dispatch.implementation("channel_stats", tensor, kernel, reference) is reference
    assert [str(w.message) for w in recwarn if "no kernel for 'channel_stats' on meta" in str(w.message)] != []
    assert len(recwarn) == 1
