"""The first kernel of `channel_stats` with wider tiles, and with programs that run together sharing rows."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu.kernels import OURS, randn
from bench.gpu.models import Model
from longact_kernels.csrc_triton.channel_stats import MERGE, PROGRAMS, channel_stats_merge
from longact_kernels.functional import channel_stats


@triton.jit(do_not_specialize=["T", "pieces", "chunk"])
def partial_kernel(
    y_ptr, partial_ptr, T, N, pieces, chunk, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """`channel_stats_partial` of one sequence, without a mask; pieces along an axis of the grid."""
    piece, column = tl.program_id(AXIS), tl.program_id(1 - AXIS)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.minimum(chunk, T - piece * chunk)
    absmax = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    sumsq = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    offs_m = tl.arange(0, UNROLL * BLOCK_M)
    y_ptrs = y_ptr + (piece * chunk + offs_m).to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    for m in range(0, count, UNROLL * BLOCK_M):
        mask = (offs_m < count - m)[:, None] & (offs_n < N)[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        y_ptrs += tl.full((), UNROLL * BLOCK_M, tl.int64) * stride_ym
        bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        absmax = tl.maximum(absmax, tl.max(tl.reshape(bits, (UNROLL, BLOCK_M, BLOCK_N)), 0))
        sumsq += tl.sum(tl.reshape(y * y, (UNROLL, BLOCK_M, BLOCK_N)), 0)
    partial_ptr += piece.to(tl.int64) * N
    tl.store(partial_ptr + offs_n, tl.max(absmax, 0).to(tl.float32, bitcast=True), mask=offs_n < N)
    tl.store(partial_ptr + pieces.to(tl.int64) * N + offs_n, tl.sum(sumsq, 0), mask=offs_n < N)


def inputs(model: Model, N: int, M: int) -> tuple[Tensor]:
    y = randn(M, N)
    y[5, 3], y[6, 4] = float("nan"), float("inf")
    return (y,)


def statistics(y: Tensor, BLOCK_M: int, BLOCK_N: int, num_warps: int, AXIS: int) -> tuple[Tensor, Tensor]:
    (T, N), chunk = y.shape, 1024
    blocks = -(-N // BLOCK_N)
    while chunk > 16 and -(-T // chunk) * blocks < PROGRAMS:
        chunk //= 2
    pieces = -(-T // chunk)
    found, absmax, sumsq = (y.new_empty(*shape, dtype=torch.float32) for shape in ((2, pieces, N), (N,), (1, N)))
    partial_kernel[(blocks, pieces) if AXIS == 1 else (pieces, blocks)](
        y, found, T, N, pieces, chunk, N, BLOCK_M, BLOCK_N, 4, AXIS, num_warps=num_warps
    )
    grid = (2, -(-N // MERGE["BLOCK_N"]))
    channel_stats_merge[grid](found, None, absmax, sumsq, T, N, pieces, chunk, pieces, **MERGE)
    return absmax, sumsq


def check(got: tuple[Tensor, Tensor], y: Tensor) -> None:
    wanted = y.float().abs().amax(0), y.double().square().sum(0, keepdim=True).float()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0, equal_nan=True)


PEERS = {OURS: channel_stats, "vector_norm": lambda y: torch.linalg.vector_norm(y, float("inf"), 0)}
CANDIDATES = {
    f"{m} x {n}, {warps} warps{', columns first' * axis}": partial(
        statistics, BLOCK_M=m, BLOCK_N=n, num_warps=warps, AXIS=axis
    )
    for axis in (0, 1)
    for m, n, warps in ((4, 256, 4), (2, 512, 4), (8, 256, 8))
}
