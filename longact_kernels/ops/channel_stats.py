"""`longact::channel_stats`: absmax and per-sequence sums of squares of an activation, from one read."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from longact_kernels.ops.arguments import check_tensor
from longact_kernels.ops.device import target
from longact_kernels.ops.dispatch import device_code, implementation, library, runs_at_once
from longact_kernels.reference.channel_stats import channel_stats as _reference

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    return measure(y, mask, cu_seqlens, l2)


def measure(y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    """`channel_stats` of an activation that is known to be a strided tensor."""
    if y.dtype not in _FLOATS or y.ndim == 0:
        raise ValueError(f"y: got {y.dtype} {list(y.shape)}, needed fp32, fp16 or bf16 [..., T, N]")
    if mask is not None or cu_seqlens is not None:
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
    B = 0 if not l2 else y.shape[:-2].numel() if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return y.new_empty(N, dtype=torch.float32), y.new_empty((B, N), dtype=torch.float32)


def _kernel(y: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    if y.ndim not in (2, 3):
        y = y.unsqueeze(0) if y.ndim == 1 else y.flatten(0, -3)
    strides = y.stride()
    if strides[-1] != 1:
        y = y.contiguous()
        strides = y.stride()
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    packed = None
    if cu_seqlens is not None:
        cu_seqlens, packed = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
    launch = _plan(y.shape, strides, y.dtype, y.device, y.data_ptr() % 16 == 0, packed, l2)
    return launch(y, mask, cu_seqlens)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    packed: int | None,
    l2: bool,
) -> Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]:
    """The launches for activations of a layout.

    Args:
        shape, strides, dtype, device: of the activation.
        aligned: whether it begins at a multiple of 16 bytes.
        packed: how many packed sequences it has; None for others.
        l2: as of `channel_stats`.
    """
    kernels = device_code("channel_stats")
    *rows, T, N = shape
    B = math.prod(rows) if packed is None else packed
    chunk = kernels.chunk_of(B * T if packed is None else T, N)
    chunks = -(-T // chunk)
    # Every bound between two packed sequences may cut a piece in two.
    pieces = B * chunks if packed is None else chunks + B - 1
    blocks = -(-N // kernels.BLOCK_N)
    stride_yb, stride_ym = strides[0], strides[-2]
    aligned = aligned and N % 16 == stride_yb % 16 == stride_ym % 16 == 0
    config = kernels.partial_config(target(device), dtype.itemsize, aligned)
    sizes = T, N, pieces, chunk, chunks
    empty = not (B and T and N)
    with torch.inference_mode(False):  # whoever asks first, all may use it
        no_sums = torch.empty(0, N, device=device)
    new_empty, merge_config = no_sums.new_empty, kernels.MERGE  # quicker than to name device and dtype anew
    numbers, grid, merge_grid = (B, *sizes, stride_yb, stride_ym), (pieces, blocks), (1 + B if l2 else 1, blocks)

    def launch(y, mask, cu_seqlens):
        absmax = new_empty(N)
        sumsq = new_empty(B, N) if l2 else no_sums
        if empty:
            return absmax.zero_(), sumsq.zero_()
        partial = new_empty(2, pieces, N)
        kernels.channel_stats_partial[grid](y, mask, cu_seqlens, partial, *numbers, **config)
        kernels.channel_stats_merge[merge_grid](partial, cu_seqlens, absmax, sumsq, *sizes, **merge_config)
        return absmax, sumsq

    return launch
