"""Weight gradient of the salient rows or columns: pack the salient channels, multiply, reduce over the token splits.

The channels are packed once because a tile that gathered them itself would touch nearly every 32-byte sector of the
full operand again for every tile of the other one; packed, both operands stream in 128-bit accesses.
"""

import itertools

import triton
import triton.language as tl

from longact_kernels.csrc_triton.variant import Variant

# Targets that share a tile.
TARGETS = [("sm_80", "sm_90"), ("sm_100",), ("sm_89", "sm_120"), ("gfx90a", "gfx942"), ("gfx1100",)]


@triton.jit
def pack_kernel(
    x_ptr,  # [M, ..]; 1 between channels
    index_ptr,  # int64 [S]; -1 for an empty slot
    packed_ptr,  # [M, P]
    M,
    S,
    P,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`packed[:, :S] = x[:, index]`; columns of empty slots, and S .. P, which are alignment, are zero."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_m = offs_m < M
    channel = tl.load(index_ptr + offs_s, mask=offs_s < S, other=-1)
    x = tl.load(
        x_ptr + offs_m[:, None] * stride_xm + channel[None, :], mask=in_m[:, None] & (channel >= 0)[None, :], other=0.0
    )
    tl.store(packed_ptr + offs_m[:, None] * P + offs_s[None, :], x, mask=in_m[:, None] & (offs_s < P)[None, :])


@triton.jit
def wgrad_kernel(
    a_ptr,  # [M, P]; 1 between columns
    b_ptr,  # [M, Q]; 1 between columns
    index_ptr,  # int64 [S]: the channels of a (of b, if COLUMNS); -1 for an empty slot
    partial_ptr,  # fp32 [splits, P, Q]
    M,
    P,
    Q,
    S,
    tokens,
    stride_am,
    stride_bm,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    """`partial[split] = a[split's tokens].T @ b[split's tokens]`, fp32 [P, Q]; a split is `tokens` long."""
    pid = tl.program_id(0)
    num_pid_p = tl.cdiv(P, BLOCK_P)
    num_pid_q = tl.cdiv(Q, BLOCK_Q)
    group = pid // (GROUP_P * num_pid_q)
    first_pid_p = group * GROUP_P
    group_size = min(num_pid_p - first_pid_p, GROUP_P)
    pid_p = first_pid_p + pid % (GROUP_P * num_pid_q) % group_size
    pid_q = pid % (GROUP_P * num_pid_q) // group_size

    split = tl.program_id(1)
    start = split * tokens
    end = tl.minimum(start + tokens, M)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = pid_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_m = tl.arange(0, BLOCK_M)
    in_p = offs_p < P
    in_q = offs_q < Q
    rows = (start + offs_m).to(tl.int64)
    a_ptrs = a_ptr + rows[None, :] * stride_am + offs_p[:, None]
    b_ptrs = b_ptr + rows[:, None] * stride_bm + offs_q[None, :]

    acc = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
    for m in range(start, end, BLOCK_M):
        in_m = offs_m < end - m
        a = tl.load(a_ptrs, mask=in_p[:, None] & in_m[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=in_m[:, None] & in_q[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_M * stride_am
        b_ptrs += BLOCK_M * stride_bm

    # Its packed zeros alone would not do: 0 times Inf or NaN of the other operand is NaN.
    if COLUMNS:
        acc = tl.where((tl.load(index_ptr + offs_q, mask=offs_q < S, other=0) < 0)[None, :], 0.0, acc)
    else:
        acc = tl.where((tl.load(index_ptr + offs_p, mask=offs_p < S, other=0) < 0)[:, None], 0.0, acc)
    partial_ptrs = partial_ptr + (split.to(tl.int64) * P + offs_p)[:, None] * Q + offs_q[None, :]
    tl.store(partial_ptrs, acc, mask=in_p[:, None] & in_q[None, :])


@triton.jit
def reduce_kernel(
    partial_ptr,  # fp32 [splits, .., Q], of which [P, S] a split are wanted
    index_ptr,  # int64 [P] (rows) or [S] (columns): where in out they go, -1 for nowhere; None if out is compact
    out_ptr,
    splits,
    S,
    Q,
    stride_split,
    stride_out,
    COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Writes the sum of the splits, taken in their order, to `out`, or adds it to what is there."""
    p = tl.program_id(0).to(tl.int64)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_s = offs_s < S
    if index_ptr is None:
        out_ptrs = out_ptr + p * stride_out + offs_s
    elif COLUMNS:
        column = tl.load(index_ptr + offs_s, mask=in_s, other=-1)
        in_s = column >= 0
        out_ptrs = out_ptr + p * stride_out + column
    else:
        row = tl.load(index_ptr + p)
        in_s = in_s & (row >= 0)
        out_ptrs = out_ptr + row * stride_out + offs_s
    partial_ptrs = partial_ptr + p * Q + offs_s
    acc = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for _ in range(splits):
        acc += tl.load(partial_ptrs, mask=in_s, other=0.0)
        partial_ptrs += stride_split
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=in_s, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_s)


PACK_CONFIG = {"BLOCK_M": 16, "BLOCK_S": 128, "num_warps": 4}
# A scattered column costs a thread the registers of its 64-bit index as well.
REDUCE_CONFIG = {"rows": {"BLOCK_S": 1024, "num_warps": 4}, "columns": {"BLOCK_S": 512, "num_warps": 4}}


def launch_config(target: str, itemsize: int, aligned: bool) -> dict[str, int]:
    """Tile and pipeline of :func:`wgrad_kernel` for a target such as "sm_90" and 2- or 4-byte elements.

    `aligned`: whether P, Q and the strides are multiples of 16.
    """
    if itemsize == 4 or not aligned:
        # IEEE fp32 runs on the plain cores, and unaligned 16-bit loads go through registers: a larger tile only spills.
        wide = target in ("sm_100", "gfx1100")
        tile = {"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_M": 16, "num_warps": 8 if wide else 4, "num_stages": 2}
    elif target in ("sm_80", "sm_90"):
        tile = {"BLOCK_P": 128, "BLOCK_Q": 256, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
    elif target == "sm_100":
        tile = {"BLOCK_P": 128, "BLOCK_Q": 128, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
    elif target.startswith("sm_"):
        # 99 KiB of shared memory.
        tile = {"BLOCK_P": 128, "BLOCK_Q": 128, "BLOCK_M": 32, "num_warps": 8, "num_stages": 4}
    elif target.startswith("gfx9"):
        # 64 KiB of shared memory.
        tile = {"BLOCK_P": 128, "BLOCK_Q": 128, "BLOCK_M": 32, "num_warps": 8, "num_stages": 2}
    else:
        # RDNA's 32-wide waves have half the registers for a tile.
        tile = {"BLOCK_P": 128, "BLOCK_Q": 64, "BLOCK_M": 32, "num_warps": 8, "num_stages": 2}
    return {**tile, "GROUP_P": 8}


def split_tokens(M: int, P: int, Q: int, config: dict[str, int], programs: int) -> tuple[int, int]:
    """How many splits of the tokens, and how long each: what takes least time on `programs` multiprocessors on paper.

    The time of a split is that of its waves of tiles, and each split beyond the first adds an fp32 [P, Q] written and
    read at 256 operations a byte (an H100 does 798 TFLOP/s in bf16 and copies at 3.0 TB/s).
    """
    block = config["BLOCK_M"]
    tiles = -(-P // config["BLOCK_P"]) * -(-Q // config["BLOCK_Q"])

    def operations(splits: int) -> int:
        waves = -(-tiles * splits // programs)
        tokens = -(-M // splits)
        return waves * programs * 2 * tokens * config["BLOCK_P"] * config["BLOCK_Q"] + 256 * 8 * splits * P * Q

    longest = max(1, min(64, M // 512))
    splits = min(range(1, longest + 1), key=operations)
    tokens = max(block, -(-M // (splits * block)) * block)
    return max(1, -(-M // tokens)), tokens


def variants() -> list[Variant]:
    """What :func:`longact_kernels.ops.salient_wgrad` launches: every tile, aligned and not."""
    found = []
    for dtype, aligned in itertools.product(("bf16", "fp16", "fp32"), (True, False)):
        config = dict(PACK_CONFIG)
        found.append(
            Variant(
                kernel="salient_wgrad",
                label=f"pack {dtype}" + ("" if aligned else " unaligned"),
                fn=pack_kernel,
                types={"x_ptr": f"*{dtype}", "index_ptr": "*i64", "packed_ptr": f"*{dtype}"}
                | dict.fromkeys(("M", "S", "P", "stride_xm"), "i32"),
                num_warps=config.pop("num_warps"),
                constants=config,
                divisible=("x_ptr", "index_ptr", "packed_ptr", "P", *(("stride_xm",) if aligned else ())),
                main=dtype == "bf16" and aligned,
            )
        )
        precisions = ("ieee", "tf32") if dtype == "fp32" else ("ieee",)
        # Along columns, where only the epilogue differs, one dtype will do.
        axes = ("rows", "columns") if dtype == "bf16" and aligned else ("rows",)
        for precision, targets, axis in itertools.product(precisions, TARGETS, axes):
            if precision == "tf32" and not targets[0].startswith("sm_"):
                continue
            config = launch_config(targets[0], 4 if dtype == "fp32" else 2, aligned)
            num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
            pointers = ("a_ptr", "b_ptr", "partial_ptr")
            found.append(
                Variant(
                    kernel="salient_wgrad",
                    label=f"product {dtype}{' tf32' * (precision == 'tf32')}{' columns' * (axis == 'columns')}"
                    + ("" if aligned else " unaligned"),
                    fn=wgrad_kernel,
                    types={"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "index_ptr": "*i64", "partial_ptr": "*fp32"}
                    | dict.fromkeys(("M", "P", "Q", "S", "tokens", "stride_am", "stride_bm"), "i32"),
                    constants={"COLUMNS": axis == "columns", "PRECISION": precision, **config},
                    # The packed operand is aligned whatever the other one is.
                    divisible=("a_ptr", "P", "stride_am", *((*pointers, "Q", "stride_bm") if aligned else ())),
                    num_warps=num_warps,
                    num_stages=num_stages,
                    # wgmma takes TF32 operands with tokens innermost only, so that they are transposed in narrow loads.
                    aligned=aligned and precision == "ieee",
                    main=dtype == "bf16" and aligned and axis == "rows",
                    memory_bound=False,
                    tensor_core=dtype != "fp32" or precision == "tf32",
                    targets=targets,
                )
            )
    layouts = [("rows", "bf16", False), ("rows", "fp16", True), ("rows", "fp32", True), ("columns", "bf16", True)]
    for axis, dtype, accumulate in [*layouts, ("compact", "fp32", False), ("compact", "fp32", True)]:
        config = dict(REDUCE_CONFIG["columns" if axis == "columns" else "rows"])
        compact = axis == "compact"
        found.append(
            Variant(
                kernel="salient_wgrad",
                label=f"reduce {dtype} {axis}" + (" added" if accumulate else ""),
                fn=reduce_kernel,
                types={"partial_ptr": "*fp32", "out_ptr": f"*{dtype}"}
                | ({} if compact else {"index_ptr": "*i64"})
                | dict.fromkeys(("splits", "S", "Q", "stride_split", "stride_out"), "i32"),
                num_warps=config.pop("num_warps"),
                constants={"COLUMNS": axis == "columns", "ACCUMULATE": accumulate}
                | ({"index_ptr": None} if compact else {})
                | config,
                divisible=("partial_ptr", "out_ptr", "S", "Q", "stride_split", "stride_out"),
                aligned=axis != "columns",
                main=(axis, dtype) == ("rows", "bf16"),
            )
        )
    return found
