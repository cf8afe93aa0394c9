"""The compiled products and the refresh (sm_80, sm_90), executed instruction by instruction on the CPU."""

import importlib
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ptx import PtxLauncher, without_barrier
from test_refresh import chosen_of
from test_salient_wgrad import check, randn, some

from longact_kernels.reference.channel_stats import channel_stats
from longact_kernels.reference.refresh import carry_


@pytest.fixture(params=["sm_80", "sm_90"])
def on_ptx(request, monkeypatch):
    """Makes the launches of a kernel file execute PTX compiled for a target, and returns its module of `ops`."""

    def use(name, **options):
        kernels = importlib.import_module(f"longact_kernels.csrc_triton.{name}")
        for attribute, fn in list(vars(kernels).items()):
            if attribute.endswith("_kernel"):
                fn = fn.fn if isinstance(fn, PtxLauncher) else fn
                monkeypatch.setattr(kernels, attribute, PtxLauncher(fn, request.param, **options))
        ops = importlib.import_module(f"longact_kernels.ops.{name}")
        monkeypatch.setattr(ops, "target", lambda device: request.param, raising=False)
        return ops

    return use


def check_linear_stats(ops, dtype, N, K, cu_seqlens=None):
    x, weight, bias = randn(140, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1), randn(N, dtype=dtype, seed=2)
    mask = randn(140, seed=3) > -0.5
    y, absmax, sumsq = ops._fused(x, weight, bias, mask, cu_seqlens, True)
    exact = x.double() @ weight.double().T + bias.double()
    unit = torch.finfo(dtype).eps / 2
    assert ((y - exact).abs() <= unit * exact.abs() + 1e-4).all()
    seen_max, seen_sums = channel_stats(y, mask, cu_seqlens)
    assert torch.equal(absmax.to(dtype).float(), seen_max)
    torch.testing.assert_close(sumsq, seen_sums, rtol=2.1 * unit + 1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_stats(on_ptx, dtype):
    check_linear_stats(on_ptx("linear_stats"), dtype, 272, 144)


def test_linear_stats_packed(on_ptx):
    check_linear_stats(on_ptx("linear_stats"), torch.bfloat16, 32, 64, torch.tensor([3, 64, 64, 128, 139]))


def test_linear_stats_unaligned(on_ptx):
    check_linear_stats(on_ptx("linear_stats"), torch.bfloat16, 70, 37)
    check_linear_stats(on_ptx("linear_stats"), torch.float32, 70, 37)


def test_a_missing_barrier_in_linear_stats_shows(on_ptx):
    ops = on_ptx("linear_stats", edit=without_barrier(4))
    with pytest.raises((AssertionError, RuntimeError)):
        check_linear_stats(ops, torch.bfloat16, 32, 64)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    ("axis", "dtype", "compact"),
    [("rows", torch.bfloat16, False), ("columns", torch.float16, True), ("columns", torch.bfloat16, False)],
)
def test_salient_wgrad(on_ptx, monkeypatch, packs, axis, dtype, compact):
    ops = on_ptx("salient_wgrad")
    monkeypatch.setattr("longact_kernels.csrc_triton.salient_wgrad.pays", lambda *sizes: packs)
    monkeypatch.setattr(ops, "_plan", ops._plan.__wrapped__)  # it keeps what `pays` has said
    dy, x = randn(30, 32, dtype=dtype), randn(30, 304, dtype=dtype, seed=1)
    rows = some(32 if axis == "rows" else 304, 20, empty=3)
    problem = dy, x, rows, axis, compact
    check(ops._kernels(*problem, None, False), *problem)


def test_salient_wgrad_of_one_channel_added_to_a_gradient_unaligned(on_ptx):
    ops = on_ptx("salient_wgrad")
    dy, x, rows = randn(100, 32), randn(100, 37, seed=1), some(32, 1)
    before = randn(32, 37, seed=2)
    check(ops._kernels(dy, x, rows, "rows", False, before.clone(), True), dy, x, rows, "rows", False, before)


def test_select(on_ptx):
    values = torch.randint(0, 40, (1300,), generator=torch.Generator().manual_seed(0)).float()
    values[[3, 700]], values[[5, 900]] = float("nan"), float("inf")
    chosen = on_ptx("refresh")._select_kernel(values, [1200, 100], [360, 30])
    parts = values[:1200].tolist(), values[1200:].tolist()
    assert chosen.tolist() == chosen_of(parts[0], 360) + [1200 + i for i in chosen_of(parts[1], 30)]


def run_carry(on_ptx, **options):
    """Sets that move both ways, longer than a block of slots; rows that are aligned, that are not, and step counts."""
    old, new = [some(90, 70), some(300, 70)], [some(90, 70, seed=1), some(300, 70, seed=1)]
    states = [randn(70, K) for K in (520, 8, 37)] + [torch.arange(1, 71, dtype=torch.int32)]
    layers = [0, 1, 0, 1]
    expected = [state.clone() for state in states]
    carry_(expected, layers, old, new)
    on_ptx("refresh", tables=states, **options)._carry_kernel(states, layers, old, new, False)
    for state, moved in zip(states, expected, strict=True):
        assert torch.equal(state, moved)


def test_carry(on_ptx):
    run_carry(on_ptx)


def test_a_missing_barrier_in_carry_shows(on_ptx):
    """A warp that stores before another one has read would hand on what it wrote."""
    with pytest.raises(AssertionError):
        for seed in range(4):
            run_carry(on_ptx, edit=without_barrier(0), seed=seed)
