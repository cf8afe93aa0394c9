"""One small call of each kernel, in sizes that no tile divides: for a sanitizer to watch."""

import os

# Every allocation is one of CUDA's own, so that an access beyond it is one that the sanitizer sees.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from bench.gpu.stage import prepare_interpreter
from bench.race import DEVICE
from longact_kernels.functional import carry_, channel_stats, linear_stats, salient_wgrad, select, sparse_adamw_


def main() -> None:
    prepare_interpreter()
    torch.manual_seed(0)
    M, N, K = 150, 72, 40

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    x, dy, weight = randn(M, K), randn(M, N), randn(N, K)
    bounds = torch.tensor([0, 7, 7, 101, M], device=DEVICE)
    mask = torch.rand(3, M // 3, device=DEVICE) > 0.3
    channel_stats(dy.view(3, M // 3, N), mask)
    channel_stats(dy, None, bounds)
    on_cpu_code = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
    for impl in ("separate",) if on_cpu_code else ("separate", "fused"):
        linear_stats(x, weight, cu_seqlens=bounds, impl=impl)
    for axis, group, count, channels in (("rows", N // 3, 7, N), ("columns", K, 11, K)):
        chosen, later = (select(torch.rand(channels, device=DEVICE), group, count) for _ in range(2))
        salient_wgrad(dy, x, chosen, axis)
        grad = salient_wgrad(dy, x, chosen, axis, compact=True)
        states = [torch.zeros_like(grad) for _ in range(3)]
        steps = torch.zeros(len(chosen), dtype=torch.int32, device=DEVICE)
        sparse_adamw_(
            [weight], [grad], [chosen], [states[0]], [states[1]], [steps], [states[2]],
            torch.tensor(1e-3, device=DEVICE), 0.9, 0.999, 1e-8, 0.01, compact=True, axis=axis,
        )  # fmt: skip
        carry_([[*states, steps]], [chosen], [later], axis)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("one call of each kernel: done")


if __name__ == "__main__":
    main()
