"""The GEMM of `linear_stats.py` with warps that load and two groups of warps that multiply, each half of a tile's rows.

One group multiplies while the other takes its statistics.
"""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bench.gpu.trials.linear_stats import PEERS, ROUND, check, greater, inputs, persistent

__all__ = ["CANDIDATES", "PEERS", "check", "inputs"]


@gluon.jit
def produce(
    x_desc, w_desc, x_bufs, w_bufs, full, empty, tiles, k_tiles, num_pid_n, span,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    step = 0
    for i in range(tiles):
        unit = gl.program_id(0) + i // span * gl.num_programs(0)
        first_m = (unit // num_pid_n * span + i % span) * BLOCK_M
        first_n = unit % num_pid_n * BLOCK_N
        for k in range(k_tiles):
            s = step % STAGES
            mbarrier.wait(empty.index(s), (step // STAGES & 1) ^ 1)
            bar = full.index(s)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(w_desc, [first_n, k * BLOCK_K], bar, w_bufs.index(s))
            tma.async_copy_global_to_shared(x_desc, [first_m, k * BLOCK_K], bar, x_bufs.index(2 * s))
            tma.async_copy_global_to_shared(x_desc, [first_m + HALF, k * BLOCK_K], bar, x_bufs.index(2 * s + 1))
            step += 1


@gluon.jit
def consume(
    x_bufs, w_bufs, y_buf, full, empty, y_desc, partial_ptr, tiles, k_tiles, num_pid_n, span, pieces, N,
    WHICH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    # For its statistics, y is read back from shared memory in rows: so a thread has few channels, and few accumulators.
    # A row takes BLOCK_N / 8 loads of 16 bytes, which 128 threads make of ROWS rows at once.
    ROWS: gl.constexpr = 1024 // BLOCK_N
    STEP: gl.constexpr = 4 * ROWS if HALF > 4 * ROWS else HALF
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [ROWS // 4, 128 // ROWS], [4, 1], [1, 0])
    acc = gl.zeros((HALF, BLOCK_N), gl.float32, layout)
    absmax = gl.zeros((ROWS, BLOCK_N), gl.float32, rows)
    sumsq = gl.zeros((ROWS, BLOCK_N), gl.float32, rows)
    step = 0
    for i in range(tiles):
        unit = gl.program_id(0) + i // span * gl.num_programs(0)
        first_m = (unit // num_pid_n * span + i % span) * BLOCK_M + WHICH * HALF
        first_n = unit % num_pid_n * BLOCK_N
        for k in range(k_tiles):
            s = step % STAGES
            mbarrier.wait(full.index(s), step // STAGES & 1)
            x, w = x_bufs.index(2 * s + WHICH), w_bufs.index(s).permute((1, 0))
            acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before is done with its buffers.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        tma.store_wait(0)
        y_buf.store(gl.inline_asm_elementwise(ROUND, "=r,r,r", [acc], dtype=gl.bfloat16, is_pure=True, pack=2))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [first_m, first_n], y_buf)
        for part in gl.static_range(HALF // STEP):
            value = y_buf.slice(part * STEP, STEP, dim=0).load(rows).to(gl.float32)
            value = gl.reshape(value, (STEP // ROWS, ROWS, BLOCK_N))
            most = gl.reduce(gl.abs(value), 0, greater)
            absmax = greater(absmax, gl.convert_layout(most, rows, assert_trivial=True))
            sumsq += gl.convert_layout(gl.sum(value * value, 0), rows, assert_trivial=True)
        if i % span == span - 1:
            # Each of the four warps has a row of partial results.
            bits = gl.max(gl.reshape(absmax.to(gl.int32, bitcast=True), (4, ROWS // 4, BLOCK_N)), 1)
            total = gl.sum(gl.reshape(sumsq, (4, ROWS // 4, BLOCK_N)), 1)
            offs_n = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, bits.type.layout))
            row = (2 * (unit // num_pid_n) + WHICH) * 4 + gl.arange(0, 4, layout=gl.SliceLayout(1, bits.type.layout))
            at_ptrs = partial_ptr + row.to(gl.int64)[:, None] * N + offs_n[None, :]
            # All rows are there; but a mask has the shape of what is stored.
            mask = (offs_n < N)[None, :] & (row >= 0)[:, None]
            gl.store(at_ptrs, bits.to(gl.float32, bitcast=True), mask=mask)
            gl.store(at_ptrs + 8 * pieces.to(gl.int64) * N, total, mask=mask)
            absmax = gl.zeros((ROWS, BLOCK_N), gl.float32, rows)
            sumsq = gl.zeros((ROWS, BLOCK_N), gl.float32, rows)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "K", "span", "pieces"])
def linear_stats_specialized(
    x_desc, w_desc, y_desc, partial_ptr, N, K, span, pieces,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF, BLOCK_K], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    y_bufs = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, BLOCK_N], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    programs, num_pid_n, k_tiles = gl.num_programs(0), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    tiles = (pieces * num_pid_n - gl.program_id(0) + programs - 1) // programs * span
    gl.warp_specialize(
        [
            (consume, (x_bufs, w_bufs, y_bufs.index(0), full, empty, y_desc, partial_ptr, tiles, k_tiles, num_pid_n,
                       span, pieces, N, 0, BLOCK_M, BLOCK_N, STAGES, ROUND)),
            (consume, (x_bufs, w_bufs, y_bufs.index(1), full, empty, y_desc, partial_ptr, tiles, k_tiles, num_pid_n,
                       span, pieces, N, 1, BLOCK_M, BLOCK_N, STAGES, ROUND)),
            (produce, (x_desc, w_desc, x_bufs, w_bufs, full, empty, tiles, k_tiles, num_pid_n, span, BLOCK_M, BLOCK_N,
                       BLOCK_K, STAGES)),
        ],
        [4, 1],  # warps, and their registers, of those beside the first four
        [240, 24],
    )  # fmt: skip


def launch_gluon(grid, x, weight, y, *numbers, BLOCK_M, BLOCK_N, BLOCK_K, STAGES):
    blocks = (x, [BLOCK_M // 2, BLOCK_K]), (weight, [BLOCK_N, BLOCK_K]), (y, [BLOCK_M // 2, BLOCK_N])
    described = [
        TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))
        for tensor, block in blocks
    ]
    linear_stats_specialized[grid](*described, *numbers, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ROUND, num_warps=4)


CANDIDATES = {
    f"gluon {m} x {n}, {stages} stages": partial(persistent, launch_gluon, BLOCK_M=m, BLOCK_N=n, STAGES=stages, rows=8)
    for m, n, stages in ((256, 128, 3), (128, 128, 6), (256, 64, 4), (128, 64, 6))
}
