"""`longact::linear_stats`: a linear projection and the channel statistics of its output."""

from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from longact_kernels.ops import impl_table
from longact_kernels.ops.arguments import check_tensor
from longact_kernels.ops.channel_stats import _run as channel_stats
from longact_kernels.ops.channel_stats import check_tokens
from longact_kernels.ops.device import matmul_precision, target
from longact_kernels.ops.dispatch import launch, library, runs_at_once, runs_triton

# The smallest magnitude that rounds to infinity.
_OVERFLOW = {torch.float32: float("inf"), torch.float16: 65520.0, torch.bfloat16: 2.0**128 - 2.0**119}
# Below this many tokens a sequence, its partly empty last tile costs too much.
_FUSED_TOKENS = 1024


def linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    l2: bool = True,
    impl: Literal["auto", "fused", "separate"] = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear projection and the channel statistics of its output.

    Equivalent torch code::

        y = F.linear(x, weight, bias)
        absmax, sumsq = channel_stats(y, mask, cu_seqlens, l2)

    "separate" is just that. "fused" is one kernel that takes the statistics from the product's fp32 accumulator, before
    it is rounded to y's dtype, so that they cost no memory traffic: `absmax` rounded to y's dtype is exactly the
    largest magnitude in y, and channels that rounding would tie keep their order; `sumsq` differs from that of y by its
    rounding, at most 2⁻⁷ (bf16) or 2⁻¹⁰ (fp16) of it. What overflows in y is infinite in the statistics.

    Args:
        x: [..., T, K] in fp32, fp16 or bf16.
        weight: [N, K], of x's dtype.
        bias: [N] or None.
        mask, cu_seqlens, l2: as in :func:`longact_kernels.ops.channel_stats`.
        impl: "auto" is "fused" where `longact tune` measured that to be faster on this machine's GPU at the nearest
            shape, and "separate" everywhere else.

    Returns:
        y [..., T, N], absmax fp32 [N], sumsq fp32 [B, N] ([0, N] if not `l2`).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them; for "fused" where no kernel can run.
    """
    if impl not in ("auto", "fused", "separate"):
        raise ValueError(f"impl: got {impl!r}, needed 'auto', 'fused' or 'separate'")
    check_tensor("x", x)
    check_tensor("weight", weight, x.device)
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x, weight: got {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}, "
            "needed [..., T, K] and [N, K] of one dtype"
        )
    if x.dtype not in _OVERFLOW:
        raise ValueError(f"x: got {x.dtype}, needed fp32, fp16 or bf16")
    if bias is not None:
        check_tensor("bias", bias, x.device)
        if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
            raise ValueError(f"bias: got {bias.dtype} {list(bias.shape)}, needed {x.dtype} [{len(weight)}]")
    check_tokens("x", x, mask, cu_seqlens)
    if impl == "fused" and not x.device.type == "meta" and not runs_triton(x):
        raise ValueError(
            f"impl: 'fused' needs tensors on a CUDA or ROCm GPU and triton, got {x.device}; use impl='auto'"
        )
    run = _run if runs_at_once(x) else torch.ops.longact.linear_stats.default
    return run(x, weight, bias, mask, cu_seqlens, l2, impl)


library.define(
    "linear_stats(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? cu_seqlens, bool l2, str impl)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(library, "linear_stats", "CompositeExplicitAutograd")
def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if (_choose(x, weight, cu_seqlens) if impl == "auto" else impl) == "fused":
        return launch(x, _fused, x, weight, bias, mask, cu_seqlens, l2)
    y = torch.nn.functional.linear(x, weight, bias)
    return y, *channel_stats(y, mask, cu_seqlens, l2)


@torch.library.register_fake("longact::linear_stats")
def _(x, weight, bias, mask, cu_seqlens, l2, impl):
    N = weight.shape[0]
    if not l2:
        B = 0
    elif cu_seqlens is not None:
        B = cu_seqlens.shape[0] - 1
    else:
        B = x.shape[:-2].numel()
    return x.new_empty(*x.shape[:-1], N), *(x.new_empty(shape, dtype=torch.float32) for shape in ((N,), (B, N)))


def may_fuse() -> bool:
    """Whether there may be a shape for which "auto" is "fused"."""
    return is_compiling() or bool(impl_table.measured())


def _choose(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> impl_table.Impl:
    if not (x.is_cuda and runs_triton(x) and impl_table.measured()):
        return "separate"
    tokens = x.shape[-2] if cu_seqlens is None else len(x) // max(1, len(cu_seqlens) - 1)
    if tokens < _FUSED_TOKENS:
        return "separate"
    gpu, dtype = torch.cuda.get_device_name(x.device), str(x.dtype).removeprefix("torch.")
    M = x.shape[:-1].numel()
    return impl_table.choose(impl_table.measured(), gpu, dtype, M, *weight.shape)


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from longact_kernels.csrc_triton.linear_stats import launch_config, linear_stats_kernel

    (N, K), T = weight.shape, x.shape[-2]
    y = x.new_empty(*x.shape[:-1], N)
    # The statistic's bits: see the kernel.
    absmax = torch.zeros(N, dtype=torch.int32, device=x.device)
    x2 = x.reshape(x.shape[:-1].numel(), K)
    x2, weight = (t if t.stride(1) == 1 or K == 1 else t.contiguous() for t in (x2, weight))
    bias = None if bias is None else bias.contiguous()
    mask = None if mask is None else mask.contiguous().view(-1).view(torch.uint8)
    M = len(x2)
    aligned = all(size % 16 == 0 for size in (N, K, x2.stride(0), weight.stride(0)))
    config = launch_config(target(x.device), x.itemsize, aligned)
    BLOCK_M = config["BLOCK_M"]
    if cu_seqlens is None:
        B = x.shape[:-2].numel()
        num_pid_m = B * -(-T // BLOCK_M)
    else:
        B = len(cu_seqlens) - 1
        # The kernel and the sums follow them: held within the tokens, and ascending.
        cu_seqlens = cu_seqlens.clamp(0, M).cummax(0).values.to(torch.int32)
        num_pid_m = -(-M // BLOCK_M) + B + 1
    partial = x.new_empty((num_pid_m, N), dtype=torch.float32) if l2 else None
    if not (M and N):
        return y, absmax.view(torch.float32), x.new_zeros((B if l2 else 0, N), dtype=torch.float32)
    linear_stats_kernel[(num_pid_m * -(-N // config["BLOCK_N"]),)](
        x2, weight, bias, y, mask, cu_seqlens, absmax, partial,
        M, N, K, T, B, num_pid_m, x2.stride(0), weight.stride(0),
        OVERFLOW=_OVERFLOW[x.dtype], EVEN_K=K % config["BLOCK_K"] == 0, PRECISION=matmul_precision(x), **config,
    )  # fmt: skip
    if partial is None:
        sumsq = x.new_zeros((0, N), dtype=torch.float32)
    elif cu_seqlens is None:
        sumsq = partial.view(B, num_pid_m // max(B, 1), N).sum(1)
    else:
        # Sequence b has the tiles cu_seqlens[b] // BLOCK_M + b + 1 up to those of b + 1, a tile without tokens among
        # them.
        first = cu_seqlens // BLOCK_M + torch.arange(1, B + 2, dtype=torch.int32, device=x.device)
        sumsq = torch.segment_reduce(partial, "sum", offsets=first.long(), axis=0, unsafe=True, initial=0)
    return y, absmax.view(torch.float32), sumsq
