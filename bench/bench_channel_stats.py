"""Statistics of an activation: absmax alone, and absmax with the sums of squares."""

import pytest
import torch
from torch.ao.quantization import PerChannelMinMaxObserver

from bench.race import DEVICE, ours, read
from longact_kernels import ops
from longact_kernels.reference.channel_stats import channel_stats as reference

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def same_as_reference(y, l2):
    absmax, sumsq = ops.channel_stats(y, l2=l2)
    wanted = reference(y, l2=l2)
    assert torch.equal(absmax, wanted[0])
    torch.testing.assert_close(sumsq, wanted[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_absmax(race, dtype):
    y = torch.randn(8192, 2048, device=DEVICE, dtype=dtype)
    observer = PerChannelMinMaxObserver(ch_axis=1).to(DEVICE)
    race(
        "absmax",
        f"{NAMES[dtype]} 8192x2048",
        {
            **ours(lambda: ops.channel_stats(y, l2=False)),
            "y.abs().amax(0)": lambda: y.abs().amax(0),
            "PerChannelMinMaxObserver": lambda: observer(y),
        },
        peer="y.abs().amax(0)",
        check=lambda: same_as_reference(y, False),
        roof=read(y.nbytes),
        bars={
            "ours": 0.08 if dtype == torch.bfloat16 else 0.14,
            "ours, no numba": 0.20 if dtype == torch.bfloat16 else 0.28,
        },
    )


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_absmax_and_squares(race, dtype):
    y = torch.randn(8192, 2048, device=DEVICE, dtype=dtype)
    race(
        "absmax and L2",
        f"{NAMES[dtype]} 8192x2048",
        {
            **ours(lambda: ops.channel_stats(y)),
            "two torch reductions": lambda: (y.abs().amax(0), y.float().square().sum(0)),
        },
        peer="two torch reductions",
        check=lambda: same_as_reference(y, True),
        roof=read(y.nbytes),
        bars={"ours": 0.10, "ours, no numba": 0.5},
    )


@pytest.mark.parametrize("tokens", [512, 2048, 8192, 32768])
def test_growth_with_tokens(race, full, tokens):
    if tokens > 8192 and not full:
        pytest.skip("with --full")
    y = torch.randn(tokens, 1024, device=DEVICE, dtype=torch.bfloat16)
    race(
        "absmax, growth",
        f"bf16 {tokens}x1024",
        {**ours(lambda: ops.channel_stats(y, l2=False)), "y.abs().amax(0)": lambda: y.abs().amax(0)},
        peer="y.abs().amax(0)",
        check=lambda: same_as_reference(y, False),
        curve=("Statistics", "tokens", tokens),
        budget=1.0,
    )
