"""`longact::channel_stats`: absmax and per-sequence sums of squares of an activation, from one read."""

import torch
from torch import Tensor

from longact_kernels.ops.device import target
from longact_kernels.ops.dispatch import implementation
from longact_kernels.reference.channel_stats import channel_stats as _reference


def channel_stats(
    y: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, l2: bool = True
) -> tuple[Tensor, Tensor]:
    """Per-channel magnitude of an activation.

    Equivalent torch code, for `y` of shape [B, T, N] and `kept = y[mask]`::

        absmax = kept.float().abs().amax(0)
        sumsq = (y.float() * mask[..., None]).square().sum(1)

    The paper's L2 statistic (LongAct, arXiv 2604.14922) is `sumsq.sqrt().mean(0)`.

    Args:
        y: activation [..., T, N] in fp32, fp16 or bf16; every index of the leading dimensions is one sequence of T
            tokens, and a 2-D `y` is a single sequence.
        mask: bool [..., T], True where a token counts. Tokens left out add nothing, not even their NaN.
        cu_seqlens: int [B + 1], ascending within 0 .. T, the bounds of packed sequences in a 2-D `y`; tokens outside
            count for nothing. Kernels on a GPU hold bounds that lie beyond within 0 .. T.
        l2: whether to take the sums of squares as well.

    Returns:
        absmax fp32 [N] (exact; NaN and Inf survive; 0 without tokens) and sumsq fp32 [B, N] ([0, N] if not `l2`).

    Raises:
        ValueError: for shapes or dtypes that do not fit, naming the argument; on a CPU for such bounds.
    """
    if y.ndim == 0 or y.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"y: got {y.dtype} {list(y.shape)}, needed fp32, fp16 or bf16 [..., T, N]")
    if mask is not None and (mask.shape != y.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask: got {mask.dtype} {list(mask.shape)}, needed torch.bool {list(y.shape[:-1])}, one value a token of y"
        )
    if cu_seqlens is not None and y.ndim != 2:
        raise ValueError(f"cu_seqlens: goes with packed y of shape [tokens, N], got y {list(y.shape)}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"cu_seqlens: got {cu_seqlens.dtype} {list(cu_seqlens.shape)}, needed int32 or int64 [B + 1]")
    return _channel_stats(y, mask, cu_seqlens, l2)


@torch.library.custom_op("longact::channel_stats", mutates_args=())
def _channel_stats(y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    return run(y, mask, cu_seqlens, l2)


def run(y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    """What the op does: also for another op, whose arguments have been checked, to take part in."""
    return implementation("channel_stats", y, _kernel, _reference)(y, mask, cu_seqlens, l2)


@_channel_stats.register_fake
def _(y, mask, cu_seqlens, l2):
    N = y.shape[-1]
    B = _sequences(y, cu_seqlens) if l2 else 0
    return y.new_empty(N, dtype=torch.float32), y.new_empty((B, N), dtype=torch.float32)


def _sequences(y: Tensor, cu_seqlens: Tensor | None) -> int:
    return y.shape[:-2].numel() if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _kernel(y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    from longact_kernels.csrc_triton.channel_stats import (
        MERGE,
        channel_stats_merge,
        channel_stats_partial,
        chunk_of,
        partial_config,
    )

    B, N, T = _sequences(y, cu_seqlens), y.shape[-1], y.shape[-2] if y.ndim > 1 else 1
    chunk = chunk_of(T if cu_seqlens is not None else B * T, N)
    chunks = -(-T // chunk)
    # Every bound between two packed sequences may cut a piece in two.
    pieces = B * chunks if cu_seqlens is None else chunks + B - 1 if B and T else 0
    absmax = y.new_empty(N, dtype=torch.int32)
    sumsq = y.new_empty((B if l2 else 0, N), dtype=torch.float32)
    if pieces == 0 or N == 0:
        return absmax.zero_().view(torch.float32), sumsq.zero_()

    y = (y if y.stride(-1) == 1 else y.contiguous()).reshape(-1, T, N)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    is_aligned = y.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in (N, y.stride(0), y.stride(1)))
    config = partial_config(target(y.device), y.itemsize, is_aligned)
    partial_absmax = y.new_empty((pieces, N), dtype=torch.int32)
    partial_sumsq = y.new_empty((pieces, N), dtype=torch.float32)
    channel_stats_partial[(pieces, -(-N // config["BLOCK_N"]))](
        y, mask, cu_seqlens, partial_absmax, partial_sumsq, B, T, N, chunk, chunks, y.stride(0), y.stride(1), **config
    )
    channel_stats_merge[(1 + len(sumsq), -(-N // MERGE["BLOCK_N"]))](
        partial_absmax, partial_sumsq, cu_seqlens, absmax, sumsq, pieces, T, N, chunk, chunks, **MERGE
    )
    return absmax.view(torch.float32), sumsq
