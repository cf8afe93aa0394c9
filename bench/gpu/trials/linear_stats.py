"""A persistent projection GEMM that loads through tensor descriptors and takes the statistics of y in its epilogue."""

import os
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu.kernels import OURS, randn
from bench.gpu.models import Model
from longact_kernels.csrc_triton.channel_stats import MERGE, channel_stats_merge
from longact_kernels.functional import linear_stats

BLOCK_K = 64
# Left to itself, the compiler rounds one by one before the statistics, at an eighth of the speed.
ROUND = None if os.environ.get("TRITON_INTERPRET") == "1" else "cvt.rn.bf16x2.f32 $0, $2, $1;"


@triton.jit
def greater(a, b):
    """A maximum that keeps NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["N", "K", "span", "pieces"])
def linear_stats_persistent(
    x_desc,  # [M, K]
    w_desc,  # [N, K]
    y_desc,  # [M, N]
    partial_ptr,  # fp32 [2, pieces, N]: absmax, sums of squares
    N,
    K,
    span,  # tiles of a piece, all of which a program takes one after the other
    pieces,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    ROUND: tl.constexpr,
):
    programs, num_pid_n, k_tiles = tl.num_programs(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tiles = (pieces * num_pid_n - tl.program_id(0) + programs - 1) // programs * span
    # A thread's rows of a wgmma tile lie together in dimensions 0 and 2 of this: reducing these takes no shuffles.
    shape: tl.constexpr = (BLOCK_M // (16 * WARPS), WARPS, 2, 8, BLOCK_N)
    absmax = tl.zeros((WARPS, 8, BLOCK_N), tl.float32)
    sumsq = tl.zeros((WARPS, 8, BLOCK_N), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over the steps of all tiles: a tile's loads are under way in the epilogue of the one before. Steps that
    # load run ahead of those that multiply, with counters of their own; a unit is a piece of a block of channels.
    unit, at, k, first_m, first_n = tl.program_id(0), -1, k_tiles - 1, 0, 0
    unit_done, at_done, k_done = tl.program_id(0), 0, 0
    for _ in tl.range(0, tiles * k_tiles):
        k = tl.where(k == k_tiles - 1, 0, k + 1)
        if k == 0:
            at += 1
            if at == span:
                at = 0
                unit += programs
            first_m = (unit // num_pid_n * span + at) * BLOCK_M
            first_n = unit % num_pid_n * BLOCK_N
        x = x_desc.load([first_m, k * BLOCK_K])
        w = w_desc.load([first_n, k * BLOCK_K])
        acc = tl.dot(x, w.T, acc)
        k_done += 1
        if k_done == k_tiles:
            piece, column = unit_done // num_pid_n, unit_done % num_pid_n * BLOCK_N
            if ROUND is None:
                y = acc.to(y_desc.dtype)
            else:
                y = tl.inline_asm_elementwise(ROUND, "=r,r,r", [acc], dtype=y_desc.dtype, is_pure=True, pack=2)
            y_desc.store([(piece * span + at_done) * BLOCK_M, column], y)
            value = tl.reshape(y.to(tl.float32), shape)
            absmax = greater(absmax, tl.reduce(tl.reduce(tl.abs(value), 2, greater), 0, greater))
            sumsq += tl.sum(tl.sum(value * value, 2), 0)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            k_done = 0
            at_done += 1
            if at_done == span:
                at_done = 0
                unit_done += programs
                offs_n = column + tl.arange(0, BLOCK_N)
                at_ptrs = partial_ptr + piece.to(tl.int64) * N + offs_n
                bits = tl.reshape(absmax.to(tl.int32, bitcast=True), (8 * WARPS, BLOCK_N))
                tl.store(at_ptrs, tl.max(bits, 0).to(tl.float32, bitcast=True), mask=offs_n < N)
                at_ptrs += pieces.to(tl.int64) * N
                tl.store(at_ptrs, tl.sum(tl.reshape(sumsq, (8 * WARPS, BLOCK_N)), 0), mask=offs_n < N)
                absmax = tl.zeros((WARPS, 8, BLOCK_N), tl.float32)
                sumsq = tl.zeros((WARPS, 8, BLOCK_N), tl.float32)


def inputs(model: Model, N: int, M: int) -> tuple[Tensor, Tensor]:
    x, weight = randn(M, model.K), randn(N, model.K) * model.K**-0.5
    weight[3, 1] = float("nan")
    return x, weight


def persistent(
    launch: Callable, x: Tensor, weight: Tensor, BLOCK_M: int, BLOCK_N: int, rows: int = 1, **options: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches a persistent kernel, of which a piece has so many rows of partial results, and merges these."""
    (M, K), N = x.shape, len(weight)
    tiles, num_pid_n = -(-M // BLOCK_M), -(-N // BLOCK_N)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4

    def until_the_last_ends(span: int) -> float:
        """In tiles; what is done once for a piece takes about a tenth of a tile's time."""
        return -(-num_pid_n * -(-tiles // span) // programs) * (span + 0.1)

    span = min(range(1, tiles + 1), key=until_the_last_ends)
    pieces = -(-tiles // span)
    y, absmax, sumsq = x.new_empty(M, N), x.new_empty(N, dtype=torch.float32), x.new_empty(1, N, dtype=torch.float32)
    found = absmax.new_empty(2, rows * pieces, N)
    grid = (min(programs, pieces * num_pid_n),)
    launch(grid, x, weight, y, found, N, K, span, pieces, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, **options)
    channel_stats_merge[(2, -(-N // MERGE["BLOCK_N"]))](
        found, None, absmax, sumsq, M, N, rows * pieces, span * BLOCK_M, rows * pieces, **MERGE
    )
    return y, absmax, sumsq


def launch_plain(grid, x, weight, y, *numbers, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages):
    blocks = (x, [BLOCK_M, BLOCK_K]), (weight, [BLOCK_N, BLOCK_K]), (y, [BLOCK_M, BLOCK_N])
    described = [TensorDescriptor.from_tensor(tensor, block) for tensor, block in blocks]
    linear_stats_persistent[grid](
        *described, *numbers, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, ROUND, num_warps=num_warps, num_stages=num_stages
    )


def check(got: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor) -> None:
    y, absmax, sumsq = got
    torch.testing.assert_close(y.float(), linear(x.float(), weight.float()), rtol=2**-7, atol=2**-7, equal_nan=True)
    wanted = y.float().abs().amax(0), y.double().square().sum(0, keepdim=True).float()
    torch.testing.assert_close((absmax, sumsq), wanted, rtol=1e-5, atol=0, equal_nan=True)


PEERS = {OURS: partial(linear_stats, impl="separate"), "F.linear": linear}
CANDIDATES = {
    f"{m} x {n}, {warps} warps, {stages} stages": partial(
        persistent, launch_plain, BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages
    )
    for m, n, warps, stages in ((128, 128, 8, 4), (256, 128, 8, 3))
}
