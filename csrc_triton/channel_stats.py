"""Per-channel absmax and per-sequence sums of squares of an activation, from one read.

Two launches, no atomics: `channel_stats_partial` reduces pieces of at most `chunk` tokens, none of which straddles two
sequences, to one row of partial results each; `channel_stats_merge` reduces those rows in a fixed order.
"""

import itertools
from dataclasses import replace

import triton
import triton.language as tl

from longact_kernels.csrc_triton.variant import Variant

# Targets that share a tile.
TARGETS = [("sm_80", "sm_89", "sm_90", "sm_120", "gfx1100"), ("sm_100",), ("gfx90a", "gfx942")]

BLOCK_N = 64
MERGE = {"BLOCK_P": 64, "BLOCK_N": BLOCK_N, "num_warps": 8}
# A piece writes and reads 16 bytes a channel: 0.8% of 1024 tokens in 16 bits.
LONGEST = 1024
# That many keep every multiprocessor of an H100 or H200 (132) busy, with others in wait.
PROGRAMS = 1000


SHORTEST = 16


def partial_config(target: str, itemsize: int, aligned: bool) -> dict[str, int]:
    """Tile of :func:`channel_stats_partial` for a target such as "sm_90" and 2- or 4-byte elements.

    Where rows are aligned, a thread has four loads of 16 bytes under way, which are added up before its accumulators.
    """
    tile = {"BLOCK_M": 16, "UNROLL": 8 // itemsize} if aligned else {"BLOCK_M": 8, "UNROLL": 2}
    if target == "sm_100":
        # Its two-wide fp32 additions take the registers of half of them.
        tile["UNROLL"] //= 2
    waves_of_64 = target.startswith("gfx9")
    return {**tile, "BLOCK_N": BLOCK_N, "num_warps": 2 if waves_of_64 else 4}


def chunk_of(tokens: int, N: int) -> int:
    """Tokens of a piece: as many as leave PROGRAMS programs to run."""
    chunk = LONGEST
    while chunk > SHORTEST and -(-tokens // chunk) * -(-N // BLOCK_N) < PROGRAMS:
        chunk //= 2
    return chunk


@triton.jit
def _bound(cu_seqlens_ptr, b, T):
    """A bound of packed sequences, held within the tokens that there are."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), T).to(tl.int32)


@triton.jit
def channel_stats_partial(
    y_ptr,  # [B, T, N], or [T, N] if packed; 1 between channels
    mask_ptr,  # uint8 [B, T] or None
    cu_seqlens_ptr,  # int32 or int64 [B + 1] or None
    partial_ptr,  # fp32 [2, pieces, N]: absmax, sums of squares
    B,
    T,
    N,
    pieces,
    chunk,
    chunks,  # pieces a sequence, if not packed
    stride_yb,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    piece = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if cu_seqlens_ptr is None:
        sequence = piece // chunks
        start = (piece % chunks) * chunk
        count = tl.minimum(chunk, T - start)
        token = sequence.to(tl.int64) * T + start
        y_ptr += sequence.to(tl.int64) * stride_yb
    else:
        # Sequence b has the pieces start // chunk + b to (end - 1) // chunk + b: every bound adds one piece.
        after = tl.zeros((), tl.int32)
        above = after + B
        while after < above:
            middle = (after + above) // 2
            begun = _bound(cu_seqlens_ptr, middle, T) // chunk + middle <= piece
            after = tl.where(begun, middle + 1, after)
            above = tl.where(begun, above, middle)
        sequence = tl.maximum(after - 1, 0)
        first = (piece - sequence) * chunk
        start = tl.maximum(_bound(cu_seqlens_ptr, sequence, T), first)
        # Where no sequence has begun, the first bound lies beyond this piece.
        count = tl.minimum(_bound(cu_seqlens_ptr, sequence + 1, T), first + chunk) - start
        token = start
    y_ptr += start.to(tl.int64) * stride_ym

    # With the sign cleared, the bits of floats order as integers do, Inf above every number and NaN above Inf: an
    # integer maximum loses neither, where a float one drops NaN.
    absmax = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    sumsq = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tile: tl.constexpr = UNROLL * BLOCK_M
    y_ptrs = y_ptr + tl.arange(0, tile).to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    step = tl.full((), tile, tl.int64) * stride_ym
    for m in range(0, count, tile):
        offs_m = m + tl.arange(0, tile)
        kept = offs_m < count
        if mask_ptr is not None:
            kept &= tl.load(mask_ptr + token + offs_m, mask=kept, other=0) != 0
        y = tl.load(y_ptrs, mask=kept[:, None] & (offs_n < N)[None, :], other=0.0).to(tl.float32)
        y_ptrs += step
        bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        absmax = tl.maximum(absmax, tl.max(tl.reshape(bits, (UNROLL, BLOCK_M, BLOCK_N)), 0))
        sumsq += tl.sum(tl.reshape(y * y, (UNROLL, BLOCK_M, BLOCK_N)), 0)

    absmax_ptrs = partial_ptr + piece.to(tl.int64) * N + offs_n
    sumsq_ptrs = partial_ptr + (pieces + piece.to(tl.int64)) * N + offs_n
    tl.store(absmax_ptrs, tl.max(absmax, 0).to(tl.float32, bitcast=True), mask=offs_n < N)
    tl.store(sumsq_ptrs, tl.sum(sumsq, 0), mask=offs_n < N)


@triton.jit
def channel_stats_merge(
    partial_ptr,  # fp32 [2, pieces, N]
    cu_seqlens_ptr,  # int32 or int64 [B + 1] or None
    absmax_ptr,  # fp32 [N]
    sumsq_ptr,  # fp32 [B, N]
    T,
    N,
    pieces,
    chunk,
    chunks,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if row == 0:  # absmax, over all pieces
        absmax = tl.zeros([BLOCK_P, BLOCK_N], tl.int32)
        for p in range(0, pieces, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            ptrs = partial_ptr + offs_p.to(tl.int64)[:, None] * N + offs_n[None, :]
            part = tl.load(ptrs, mask=(offs_p < pieces)[:, None] & (offs_n < N)[None, :], other=0.0)
            absmax = tl.maximum(absmax, part.to(tl.int32, bitcast=True))
        tl.store(absmax_ptr + offs_n, tl.max(absmax, 0).to(tl.float32, bitcast=True), mask=offs_n < N)
    else:  # sum of squares of one sequence, over its pieces
        sequence = row - 1
        if cu_seqlens_ptr is None:
            first = sequence * chunks
            last = first + chunks
        else:
            skipped = _bound(cu_seqlens_ptr, sequence, T) // chunk
            first = skipped + sequence
            last = tl.minimum(first + tl.cdiv(_bound(cu_seqlens_ptr, sequence + 1, T), chunk) - skipped, pieces)
        sumsq = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for p in range(first, last, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            ptrs = partial_ptr + (pieces + offs_p.to(tl.int64))[:, None] * N + offs_n[None, :]
            sumsq += tl.load(ptrs, mask=(offs_p < last)[:, None] & (offs_n < N)[None, :], other=0.0)
        tl.store(sumsq_ptr + sequence.to(tl.int64) * N + offs_n, tl.sum(sumsq, 0), mask=offs_n < N)


def variants() -> list[Variant]:
    """Every specialisation that :func:`longact_kernels.ops.channel_stats` can launch."""
    found = []
    for masked, packed, aligned in itertools.product((False, True), repeat=3):
        given = {"mask_ptr": "*u8"} if masked else {}
        given |= {"cu_seqlens_ptr": "*i32"} if packed else {}
        absent = {"mask_ptr": None, "cu_seqlens_ptr": None}
        divisible = ("y_ptr", "partial_ptr", "N", "stride_yb", "stride_ym") if aligned else ()
        divisible += ("chunk",)
        words = (["masked"] if masked else []) + (["packed"] if packed else []) + ([] if aligned else ["unaligned"])
        for dtype, targets in itertools.product(("bf16", "fp16", "fp32"), TARGETS):
            types = {"y_ptr": f"*{dtype}", "partial_ptr": "*fp32", **given}
            types |= dict.fromkeys(("B", "T", "N", "pieces", "chunk", "chunks", "stride_yb", "stride_ym"), "i32")
            constants = partial_config(targets[0], 4 if dtype == "fp32" else 2, aligned)
            num_warps = constants.pop("num_warps")
            constants |= {name: None for name in absent if name not in given}
            found.append(
                Variant(
                    kernel="channel_stats",
                    label=" ".join(["partial", dtype, *words]),
                    fn=channel_stats_partial,
                    types=types,
                    constants=constants,
                    divisible=divisible,
                    num_warps=num_warps,
                    aligned=aligned,
                    targets=targets,
                    main=aligned and dtype == "bf16" and not given,
                )
            )
        if not masked:
            types = dict.fromkeys(("partial_ptr", "absmax_ptr", "sumsq_ptr"), "*fp32") | given
            types |= dict.fromkeys(("T", "N", "pieces", "chunk", "chunks"), "i32")
            constants = {name: MERGE[name] for name in ("BLOCK_P", "BLOCK_N")}
            pointers = ("partial_ptr", "absmax_ptr", "sumsq_ptr", "N")
            found.append(
                Variant(
                    kernel="channel_stats",
                    label=" ".join(["merge", *words]),
                    fn=channel_stats_merge,
                    types=types,
                    constants=constants | ({} if packed else {"cu_seqlens_ptr": None}),
                    divisible=(*pointers, "chunk") if aligned else ("chunk",),
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
