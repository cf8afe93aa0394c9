"""Weight gradient of the salient rows."""

import pytest
import torch

from bench.race import DEVICE, ours, seconds
from longact_kernels import ops
from longact_kernels.reference.salient_wgrad import salient_wgrad as reference

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
BARS = {torch.bfloat16: 0.33, torch.float32: 0.36}


def problem(M, N, K, density, dtype):
    dy, x = (torch.randn(M, size, device=DEVICE, dtype=dtype) for size in (N, K))
    rows = torch.randperm(N, device=DEVICE)[: round(density * N)].sort().values

    def check():
        got, wanted = ops.salient_wgrad(dy, x, rows), reference(dy, x, rows)
        tolerance = torch.finfo(dtype).eps * wanted.abs().max().item() * 2
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)

    return dy, x, rows, check


def whole_gradient(dy, x):
    """The faster of the two ways to the whole gradient."""
    ways = [lambda: dy.t() @ x, lambda: dy.t().contiguous() @ x]
    for way in ways:
        way()
    return min(ways, key=lambda way: min(seconds(way) for _ in range(3)))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_salient_rows(race, dtype):
    M, N, K = 4096, 2048, 2048
    dy, x, rows, check = problem(M, N, K, 0.3, dtype)
    packed = dy[:, rows].t().contiguous()
    race(
        "salient weight gradient",
        f"{NAMES[dtype]} {M} tokens, {N}x{K}, 0.30",
        {
            **ours(lambda: ops.salient_wgrad(dy, x, rows)),
            "whole gradient": whole_gradient(dy, x),
            "dy[:, rows].T @ x": lambda: dy.index_select(1, rows).t() @ x,
        },
        peer="whole gradient",
        check=check,
        roof=lambda: packed @ x,
        bars=dict.fromkeys(("ours", "ours, no numba"), BARS[dtype]),
    )


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.5, 1.0])
def test_growth_with_density(race, density):
    dy, x, rows, check = problem(2048, 1024, 1024, density, torch.bfloat16)
    race(
        "salient weight gradient, growth",
        f"bf16 2048 tokens, 1024x1024, {density:.2f}",
        {"ours": lambda: ops.salient_wgrad(dy, x, rows), "whole gradient": whole_gradient(dy, x)},
        peer="whole gradient",
        check=check,
        curve=("Weight gradient", "density", density),
        budget=1.0,
    )
