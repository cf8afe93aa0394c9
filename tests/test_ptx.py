"""The compiled kernels (sm_80, sm_90) against the reference, executed instruction by instruction on the CPU."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ptx import PtxLauncher, without_barrier
from test_sparse_adamw import Case, check

from longact_kernels.csrc_triton import channel_stats, sparse_adamw
from longact_kernels.ops.channel_stats import _kernel as channel_stats_op
from longact_kernels.ops.sparse_adamw import GradLayout, Launcher
from longact_kernels.reference.channel_stats import channel_stats as reference_stats
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as reference_adamw

FUNCTIONS = {
    channel_stats: (channel_stats.channel_stats_partial, channel_stats.channel_stats_merge),
    sparse_adamw: (sparse_adamw.sparse_adamw,),
}


@pytest.fixture(params=["sm_80", "sm_90"])
def on_ptx(request, monkeypatch):
    """Makes the launches of a kernel module execute PTX compiled for a target."""

    def use(module, **options):
        for fn in FUNCTIONS[module]:
            monkeypatch.setattr(module, fn.__name__, PtxLauncher(fn, request.param, **options))

    return use


def check_stats(y, mask=None, cu_seqlens=None):
    absmax, sumsq = channel_stats_op(y, mask, cu_seqlens, True)
    want_absmax, want_sumsq = reference_stats(y, mask, cu_seqlens, True)
    assert torch.equal(absmax.nan_to_num(nan=-1.0), want_absmax.nan_to_num(nan=-1.0))
    torch.testing.assert_close(sumsq, want_sumsq, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_channel_stats(on_ptx, dtype):
    on_ptx(channel_stats)
    y = torch.randn(2, 40, 144).to(dtype)
    y[0, 3, 5], y[1, 39, 143], y[1, 0, 7] = torch.nan, -torch.inf, -100.0
    check_stats(y, torch.rand(2, 40) < 0.8)


def test_channel_stats_unaligned_and_packed(on_ptx):
    on_ptx(channel_stats)
    y = torch.randn(1100, 37).bfloat16()
    check_stats(y, None, torch.tensor([2, 30, 30, 1090], dtype=torch.int32))


def test_a_missing_barrier_in_channel_stats_shows(on_ptx):
    on_ptx(channel_stats, edit=without_barrier(0))
    with pytest.raises((AssertionError, RuntimeError)):
        check_stats(torch.randn(1, 40, 128))


def tensors_of(case):
    return [tensor for tensors in case.held.values() for tensor in tensors]


def sparse_adamw_op(call):
    Launcher(call)(call, GradLayout.of(call.grads))


def run_adamw(on_ptx, case, **options):
    on_ptx(sparse_adamw, tables=tensors_of(case))
    case.run(sparse_adamw_op, **options)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("master, compact", [(True, True), (False, False)])
def test_sparse_adamw(on_ptx, axis, master, compact):
    # Shapes of two kinds, one of them longer than a tile, in one launch.
    dtype = torch.bfloat16 if master else torch.float16
    case = Case([(6, 1040, 2), (8, 64, 3)], dtype, axis=axis, master=master, compact=compact)
    before = case.copy()
    run_adamw(on_ptx, case, maximize=True, grad_scale=2.0, found_inf=0.0)
    check(before, case, maximize=True, grad_scale=2.0)


def test_sparse_adamw_unaligned(on_ptx):
    case = Case([(6, 37, 2)], torch.bfloat16, grad_compact=True)
    before = case.copy()
    run_adamw(on_ptx, case)
    check(before, case)


def test_sparse_adamw_skips_at_an_overflow(on_ptx):
    case = Case([(6, 64, 2)], torch.float16, master=True)
    before = case.copy()
    run_adamw(on_ptx, case, grad_scale=2.0, found_inf=1.0)
    for name, tensors in before.held.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, case.held[name], strict=True)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_adamw_rounds_stochastically(on_ptx, dtype):
    case = Case([(6, 512, 3)], dtype)
    case.held["weights"][0][:, ::3] *= 1e-6
    other = case.copy()
    run_adamw(on_ptx, case, seed=9)
    other.run(reference_adamw, seed=9)
    assert (case.held["weights"][0] != other.held["weights"][0]).sum() <= 3


def test_a_missing_barrier_before_the_step_count_shows(on_ptx):
    """A program's last warps would read the step count that its first one has already raised."""

    def run(seed, **mutation):
        case = Case([(6, 1024, 3)], torch.float32)
        case.held["steps"][0].zero_()
        before = case.copy()
        on_ptx(sparse_adamw, tables=tensors_of(case), seed=seed, **mutation)
        case.run(sparse_adamw_op)
        check(before, case)

    orders = range(4)
    for seed in orders:
        run(seed)
    # The order in which the first warp comes last shows nothing; the others do.
    with pytest.raises(AssertionError):
        for seed in orders:
            run(seed, edit=without_barrier(0))
