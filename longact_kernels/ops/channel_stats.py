"""`longact::channel_stats`: absmax and per-sequence sums of squares of an activation, from one read."""

import functools

import torch
from torch import Tensor

from longact_kernels.ops.arguments import check_tensor
from longact_kernels.ops.device import target
from longact_kernels.ops.dispatch import device_code, implementation, library, runs_at_once
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
        TypeError, ValueError: for arguments that do not fit, naming them; on a CPU for such bounds too.
    """
    check_tensor("y", y)
    if y.ndim == 0 or y.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"y: got {y.dtype} {list(y.shape)}, needed fp32, fp16 or bf16 [..., T, N]")
    check_tokens("y", y, mask, cu_seqlens)
    run = _run if runs_at_once(y) else torch.ops.longact.channel_stats.default
    return run(y, mask, cu_seqlens, l2)


def check_tokens(name: str, y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What is said of the tokens of an activation [..., T, N], which is the argument `name`.

    Raises:
        TypeError, ValueError: it does not fit; the message names the argument.
    """
    if mask is not None:
        check_tensor("mask", mask, y.device)
        if mask.shape != y.shape[:-1] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: got {mask.dtype} {list(mask.shape)}, needed torch.bool {list(y.shape[:-1])}, one value a token "
                f"of {name}"
            )
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, y.device)
        if y.ndim != 2:
            raise ValueError(f"cu_seqlens: goes with packed {name} of two dimensions, got {name} {list(y.shape)}")
        if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens: got {cu_seqlens.dtype} {list(cu_seqlens.shape)}, needed int32 or int64 [B + 1]"
            )


library.define("channel_stats(Tensor y, Tensor? mask, Tensor? cu_seqlens, bool l2) -> (Tensor, Tensor)")


@torch.library.impl(library, "channel_stats", "CompositeExplicitAutograd")
def _run(y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    return implementation("channel_stats", y, _kernel, _reference)(y, mask, cu_seqlens, l2)


@torch.library.register_fake("longact::channel_stats")
def _(y, mask, cu_seqlens, l2):
    N = y.shape[-1]
    B = _sequences(y, cu_seqlens) if l2 else 0
    return y.new_empty(N, dtype=torch.float32), y.new_empty((B, N), dtype=torch.float32)


def _sequences(y: Tensor, cu_seqlens: Tensor | None) -> int:
    return y.shape[:-2].numel() if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _kernel(y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    kernels = device_code("channel_stats")
    B, N, T = _sequences(y, cu_seqlens), y.shape[-1], y.shape[-2] if y.ndim > 1 else 1
    absmax = y.new_empty(N, dtype=torch.float32)
    sumsq = y.new_empty((B, N), dtype=torch.float32) if l2 else _no_sums(N, y.device)
    if 0 in (B, T, N):
        return absmax.zero_(), sumsq.zero_()

    y = y if y.stride(-1) == 1 else y.contiguous()
    y = y if y.ndim == 3 or (B == 1 and y.ndim == 2) else y.reshape(-1, T, N)
    stride_yb, stride_ym = y.stride(0), y.stride(-2)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    is_aligned = y.data_ptr() % 16 == 0 and N % 16 == stride_yb % 16 == stride_ym % 16 == 0
    chunk, chunks, pieces, blocks, config = _launch(
        target(y.device), y.itemsize, is_aligned, cu_seqlens is not None, B, T, N
    )
    partial = y.new_empty((2, pieces, N), dtype=torch.float32)
    kernels.channel_stats_partial[(pieces, blocks)](
        y, mask, cu_seqlens, partial, B, T, N, pieces, chunk, chunks, stride_yb, stride_ym, **config
    )
    kernels.channel_stats_merge[(1 + B if l2 else 1, blocks)](
        partial, cu_seqlens, absmax, sumsq, T, N, pieces, chunk, chunks, **kernels.MERGE
    )
    return absmax, sumsq


@functools.lru_cache(maxsize=1024)
def _no_sums(N: int, device: torch.device) -> Tensor:
    """What a call without sums of squares returns: to make a tensor takes the host as long as a launch."""
    with torch.inference_mode(False):  # whoever asks first, all may use it
        return torch.empty(0, N, device=device)


@functools.lru_cache(maxsize=1024)
def _launch(
    target: str, itemsize: int, aligned: bool, packed: bool, B: int, T: int, N: int
) -> tuple[int, int, int, int, dict[str, int]]:
    """Tokens of a piece, pieces of an unpacked sequence and of all, blocks of channels, and the tile."""
    from longact_kernels.csrc_triton import channel_stats as kernels

    chunk = kernels.chunk_of(T if packed else B * T, N)
    chunks = -(-T // chunk)
    # Every bound between two packed sequences may cut a piece in two.
    pieces = chunks + B - 1 if packed else B * chunks
    return chunk, chunks, pieces, -(-N // kernels.BLOCK_N), kernels.partial_config(target, itemsize, aligned)
