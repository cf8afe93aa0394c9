"""What the statistics add to the forward of a projection."""

import torch
from torch.ao.quantization import PerChannelMinMaxObserver
from torch.nn.functional import linear

from bench.race import DEVICE, ours
from longact_kernels import ops
from longact_kernels.reference.linear_stats import linear_stats as reference

TOKENS, N, K = 8192, 2048, 2048


def hooked(hook):
    """A linear layer whose forward hook takes the statistic."""
    layer = torch.nn.Linear(K, N, bias=False, device=DEVICE, dtype=torch.bfloat16)

    def forget_result(module, inputs, y):
        # What a hook returns would replace y.
        hook(y)

    layer.register_forward_hook(forget_result)
    return torch.no_grad()(layer)


def test_overhead(race):
    x = torch.randn(TOKENS, K, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16)
    with_hook = hooked(lambda y: y.abs().amax(0))
    with_observer = hooked(PerChannelMinMaxObserver(ch_axis=1).to(DEVICE))

    def check():
        y, absmax, sumsq = ops.linear_stats(x, weight)
        wanted = reference(x, weight)
        torch.testing.assert_close(y, wanted[0])
        # The fused kernel takes them before the output is rounded.
        torch.testing.assert_close(absmax, wanted[1], rtol=2**-8, atol=0)
        torch.testing.assert_close(sumsq, wanted[2], rtol=2**-7, atol=0)

    absmax = ours(lambda: ops.linear_stats(x, weight, l2=False))
    both = {f"{name}, with L2": run for name, run in ours(lambda: ops.linear_stats(x, weight)).items()}

    race(
        "projection with statistics",
        f"bf16 {TOKENS} tokens, {N}x{K}",
        {
            **absmax,
            **both,
            "F.linear alone": lambda: linear(x, weight),
            "forward hook": lambda: with_hook(x),
            "forward hook, observer": lambda: with_observer(x),
        },
        peer="F.linear alone",
        check=check,
        bars={"ours": 1.04, "ours, with L2": 1.06, "ours, no numba": 1.10, "ours, no numba, with L2": 1.15},
        budget=15.0,
    )
