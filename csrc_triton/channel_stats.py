"""Per-channel absmax and per-sequence sums of squares of an activation, from one read.

Two launches, no atomics: `channel_stats_partial` reduces pieces of at most CHUNK tokens, none of which straddles two
sequences, to one row of partial results each; `channel_stats_merge` reduces those rows in a fixed order.
"""

import itertools
from dataclasses import replace

import triton
import triton.language as tl

from longact_kernels.csrc_triton.variant import Variant

# A piece writes and reads 16 bytes a channel: 0.8% of 1024 tokens in 16 bits.
CHUNK = 1024
# Tiles are the largest whose registers leave half of the threads resident (64 each).
PARTIAL = {
    "aligned": {"CHUNK": CHUNK, "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_B": 128, "num_warps": 4},
    "unaligned": {"CHUNK": CHUNK, "BLOCK_M": 8, "BLOCK_N": 128, "BLOCK_B": 128, "num_warps": 4},
}
MERGE = {"CHUNK": CHUNK, "BLOCK_P": 16, "BLOCK_N": 64, "num_warps": 4}


@triton.jit
def channel_stats_partial(
    y_ptr,  # [B, T, N], or [T, N] if packed; 1 between channels
    mask_ptr,  # uint8 [B, T] or None
    cu_seqlens_ptr,  # int32 [B + 1] or None
    absmax_ptr,  # int32 [pieces, N]: the bits of fp32 values
    sumsq_ptr,  # fp32 [pieces, N]
    B,
    T,
    N,
    chunks,  # pieces a sequence, if not packed
    stride_yb,
    stride_ym,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    piece = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if cu_seqlens_ptr is None:
        sequence = piece // chunks
        start = (piece % chunks) * CHUNK
        count = tl.minimum(CHUNK, T - start)
        token = sequence.to(tl.int64) * T + start
        y_ptr += sequence.to(tl.int64) * stride_yb
    else:
        # Sequence b has the pieces start // CHUNK + b to (end - 1) // CHUNK + b: every bound adds one piece.
        before = tl.zeros([BLOCK_B], tl.int32)
        for b in range(0, B, BLOCK_B):
            offs_b = b + tl.arange(0, BLOCK_B)
            starts = tl.load(cu_seqlens_ptr + offs_b, mask=offs_b < B, other=0)
            before += ((starts // CHUNK + offs_b <= piece) & (offs_b < B)).to(tl.int32)
        sequence = tl.sum(before, 0) - 1
        chunk = (piece - sequence) * CHUNK
        start = tl.maximum(tl.load(cu_seqlens_ptr + sequence, mask=sequence >= 0, other=0), chunk)
        end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence >= 0, other=0), T)
        count = tl.minimum(end, chunk + CHUNK) - start
        token = start
    y_ptr += start.to(tl.int64) * stride_ym

    # With the sign cleared, the bits of floats order as integers do, Inf above every number and NaN above Inf: an
    # integer maximum loses neither, where a float one drops NaN.
    absmax = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    sumsq = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(0, count, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        kept = offs_m < count
        if mask_ptr is not None:
            kept &= tl.load(mask_ptr + token + offs_m, mask=kept, other=0) != 0
        y = tl.load(
            y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :],
            mask=kept[:, None] & (offs_n < N)[None, :],
            other=0.0,
        ).to(tl.float32)
        absmax = tl.maximum(absmax, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        sumsq += y * y

    out = piece.to(tl.int64) * N + offs_n
    tl.store(absmax_ptr + out, tl.max(absmax, 0), mask=offs_n < N)
    tl.store(sumsq_ptr + out, tl.sum(sumsq, 0), mask=offs_n < N)


@triton.jit
def channel_stats_merge(
    partial_absmax_ptr,  # int32 [pieces, N]
    partial_sumsq_ptr,  # fp32 [pieces, N]
    cu_seqlens_ptr,  # int32 [B + 1] or None
    absmax_ptr,  # int32 [N]: the bits of fp32 values
    sumsq_ptr,  # fp32 [B, N]
    pieces,
    N,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if row == 0:  # absmax, over all pieces
        absmax = tl.zeros([BLOCK_P, BLOCK_N], tl.int32)
        for p in range(0, pieces, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            ptrs = partial_absmax_ptr + offs_p.to(tl.int64)[:, None] * N + offs_n[None, :]
            part = tl.load(ptrs, mask=(offs_p < pieces)[:, None] & (offs_n < N)[None, :], other=0)
            absmax = tl.maximum(absmax, part)
        tl.store(absmax_ptr + offs_n, tl.max(absmax, 0), mask=offs_n < N)
    else:  # sum of squares of one sequence, over its pieces
        sequence = row - 1
        if cu_seqlens_ptr is None:
            first = sequence * chunks
            last = first + chunks
        else:
            start = tl.load(cu_seqlens_ptr + sequence)
            end = tl.load(cu_seqlens_ptr + sequence + 1)
            first = start // CHUNK + sequence
            last = tl.minimum(first + tl.cdiv(end, CHUNK) - start // CHUNK, pieces)
        sumsq = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for p in range(first, last, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            ptrs = partial_sumsq_ptr + offs_p.to(tl.int64)[:, None] * N + offs_n[None, :]
            sumsq += tl.load(ptrs, mask=(offs_p < last)[:, None] & (offs_n < N)[None, :], other=0.0)
        tl.store(sumsq_ptr + sequence.to(tl.int64) * N + offs_n, tl.sum(sumsq, 0), mask=offs_n < N)


def variants() -> list[Variant]:
    """Every specialisation that :func:`longact_kernels.ops.channel_stats` can launch."""
    found = []
    for masked, packed, aligned in itertools.product((False, True), repeat=3):
        given = {"mask_ptr": "*u8"} if masked else {}
        given |= {"cu_seqlens_ptr": "*i32"} if packed else {}
        absent = {"mask_ptr": None, "cu_seqlens_ptr": None}
        divisible = ("y_ptr", "absmax_ptr", "sumsq_ptr", "N", "stride_yb", "stride_ym") if aligned else ()
        words = (["masked"] if masked else []) + (["packed"] if packed else []) + ([] if aligned else ["unaligned"])
        for dtype in ("bf16", "fp16", "fp32"):
            types = {"y_ptr": f"*{dtype}", "absmax_ptr": "*i32", "sumsq_ptr": "*fp32", **given}
            types |= dict.fromkeys(("B", "T", "N", "chunks", "stride_yb", "stride_ym"), "i32")
            config = PARTIAL["aligned" if aligned else "unaligned"]
            constants = {name: config[name] for name in ("CHUNK", "BLOCK_M", "BLOCK_N", "BLOCK_B")}
            constants |= {name: None for name in absent if name not in given}
            found.append(
                Variant(
                    kernel="channel_stats",
                    label=" ".join(["partial", dtype, *words]),
                    fn=channel_stats_partial,
                    types=types,
                    constants=constants,
                    divisible=divisible,
                    num_warps=config["num_warps"],
                    aligned=aligned,
                    main=aligned and dtype == "bf16" and not given,
                )
            )
        if not masked:
            types = dict.fromkeys(("partial_absmax_ptr", "absmax_ptr"), "*i32")
            types |= dict.fromkeys(("partial_sumsq_ptr", "sumsq_ptr"), "*fp32") | given
            types |= dict.fromkeys(("pieces", "N", "chunks"), "i32")
            constants = {name: MERGE[name] for name in ("CHUNK", "BLOCK_P", "BLOCK_N")}
            pointers = ("partial_absmax_ptr", "partial_sumsq_ptr", "absmax_ptr", "sumsq_ptr", "N")
            found.append(
                Variant(
                    kernel="channel_stats",
                    label=" ".join(["merge", *words]),
                    fn=channel_stats_merge,
                    types=types,
                    constants=constants | ({} if packed else {"cu_seqlens_ptr": None}),
                    divisible=pointers if aligned else (),
                    num_warps=MERGE["num_warps"],
                    aligned=aligned,
                    main=aligned and not given,
                )
            )
    # Triton makes constants of integers that are 1: here, of a single sequence of one piece.
    single = {"B", "chunks", "pieces"}
    for variant in [variant for variant in found if variant.main]:
        ones = {name: 1 for name in variant.types if name in single}
        types = {name: kind for name, kind in variant.types.items() if name not in single}
        label = f"{variant.label} single"
        found.append(replace(variant, label=label, types=types, constants=variant.constants | ones, main=False))
    return found
