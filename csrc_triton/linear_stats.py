"""Projection GEMM `y = x @ w.T + b` that takes the channel statistics of y in its epilogue, from the fp32 accumulator.

A tile of rows never straddles two sequences, so that its sum of squares belongs to one of them. Equal sequences of T
tokens have `cdiv(T, BLOCK_M)` tiles each. The B + 1 bounds of packed sequences cut the tokens into B + 2 intervals
(the first and the last lie outside every sequence), and every bound adds one tile to the `cdiv(M, BLOCK_M)` that there
would be without it.
"""

import itertools

import triton
import triton.language as tl

from longact_kernels.csrc_triton.variant import Variant

# Targets that share a tile.
TARGETS = [("sm_80", "sm_90"), ("sm_100",), ("sm_89", "sm_120"), ("gfx90a", "gfx942"), ("gfx1100",)]


@triton.jit
def linear_stats_kernel(
    x_ptr,  # [M, K]; 1 between features
    w_ptr,  # [N, K]; 1 between features
    b_ptr,  # [N] or None
    y_ptr,  # [M, N]
    mask_ptr,  # uint8 [M] or None
    cu_seqlens_ptr,  # int32 [B + 1] or None
    absmax_ptr,  # int32 [N], zeros on entry: the bits of fp32 values
    sumsq_ptr,  # fp32 [num_pid_m, N] or None
    M,
    N,
    K,
    T,
    B,
    num_pid_m,
    stride_xm,
    stride_wn,
    OVERFLOW: tl.constexpr,  # the smallest magnitude that y's dtype rounds to infinity
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs of a group share weight columns and input rows in L2.
    pid = tl.program_id(0)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * num_pid_n)
    first_pid_m = group * GROUP_M
    group_size = tl.minimum(num_pid_m - first_pid_m, GROUP_M)
    pid_m = first_pid_m + pid % (GROUP_M * num_pid_n) % group_size
    pid_n = pid % (GROUP_M * num_pid_n) // group_size

    if cu_seqlens_ptr is None:
        tiles = tl.cdiv(T, BLOCK_M)
        start = pid_m // tiles * T + pid_m % tiles * BLOCK_M
        end = tl.minimum(start + BLOCK_M, pid_m // tiles * T + T)
        counted = True
        K_end = K
    else:
        # Interval i has the tiles start // BLOCK_M + i to (end - 1) // BLOCK_M + i.
        interval = tl.zeros((), tl.int32)
        above = interval + B + 1
        while interval < above:
            middle = (interval + above) // 2
            before = tl.load(cu_seqlens_ptr + middle) // BLOCK_M + middle < pid_m
            interval = tl.where(before, middle + 1, interval)
            above = tl.where(before, above, middle)
        start = tl.load(cu_seqlens_ptr + interval - 1, mask=interval > 0, other=0)
        start = tl.maximum(start, (pid_m - interval) * BLOCK_M)
        end = tl.load(cu_seqlens_ptr + interval, mask=interval <= B, other=M)
        end = tl.minimum(end, (pid_m - interval + 1) * BLOCK_M)
        counted = (interval > 0) & (interval <= B)
        # A bound at a tile's edge leaves a tile without tokens.
        K_end = tl.where(start < end, K, 0)

    offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read valid memory and are dropped in the epilogue: no masks in the loop.
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    cols = tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + cols[None, :] * stride_wn + offs_k[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K_end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    in_m = offs_m < end
    in_n = offs_n < N
    if b_ptr is not None:
        acc += tl.load(b_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])

    if mask_ptr is not None:
        in_m = in_m & (tl.load(mask_ptr + offs_m, mask=in_m, other=0) != 0)
    # What overflows when y is stored is infinite in the statistics too.
    value = tl.where(tl.abs(acc) < OVERFLOW, acc, acc * float("inf"))
    value = tl.where((in_m & counted)[:, None], value, 0.0)
    # With the sign cleared, the bits of floats order as integers do, Inf above every number and NaN above Inf; and a
    # maximum of integers does not depend on the order that the programs come in.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(absmax_ptr + offs_n, tl.max(bits, 0), mask=in_n, sem="relaxed")
    if sumsq_ptr is not None:
        tl.store(sumsq_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(value * value, 0), mask=in_n)


def launch_config(target: str, itemsize: int, aligned: bool) -> dict[str, int]:
    """Tile and pipeline of :func:`linear_stats_kernel` for a target such as "sm_90" and 2- or 4-byte elements.

    `aligned`: whether N, K and the strides are multiples of 16.
    """
    if itemsize == 4 or not aligned:
        # IEEE fp32 runs on the plain cores, and unaligned 16-bit loads go through registers: a larger tile only spills.
        rdna = target.startswith("gfx11")
        tile = {
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_K": 16 if rdna else 32,
            "num_warps": 8 if rdna else 4,
            "num_stages": 2,
        }
    elif target in ("sm_80", "sm_90"):
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    elif target == "sm_100":
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    elif target.startswith("sm_"):
        # 99 KiB of shared memory.
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}
    elif target.startswith("gfx9"):
        # 64 KiB of shared memory.
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    else:
        # RDNA's 32-wide waves have half the registers for a tile.
        tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    return {**tile, "GROUP_M": 8}


def variants() -> list[Variant]:
    """What :func:`longact_kernels.ops.linear_stats` launches: every tile, with all of its options and with none."""
    options = [
        # dtype, precision, bias and mask, packed, sums of squares, aligned
        ("bf16", "ieee", False, False, True, True),
        ("bf16", "ieee", True, True, True, True),
        ("bf16", "ieee", True, False, False, False),
        ("fp16", "ieee", True, True, True, True),
        ("fp32", "ieee", False, False, True, True),
        ("fp32", "ieee", True, True, True, False),
        ("fp32", "tf32", True, False, True, True),
    ]
    overflow = {"bf16": 2.0**128 - 2.0**119, "fp16": 65520.0, "fp32": float("inf")}
    found = []
    for (dtype, precision, masked, packed, l2, aligned), targets in itertools.product(options, TARGETS):
        if precision == "tf32" and not targets[0].startswith("sm_"):
            continue
        config = launch_config(targets[0], 4 if dtype == "fp32" else 2, aligned)
        num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
        given = {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "absmax_ptr": "*i32"}
        optional = {
            "b_ptr": f"*{dtype}" if masked else None,
            "mask_ptr": "*u8" if masked else None,
            "cu_seqlens_ptr": "*i32" if packed else None,
            "sumsq_ptr": "*fp32" if l2 else None,
        }
        integers = ("M", "N", "K", "T", "B", "num_pid_m", "stride_xm", "stride_wn")
        types = given | {name: kind for name, kind in optional.items() if kind} | dict.fromkeys(integers, "i32")
        words = [
            dtype if precision == "ieee" else f"{dtype} {precision}",
            *(["bias", "masked"] if masked else []),
            *(["packed"] if packed else []),
            *([] if l2 else ["absmax"]),
        ]
        found.append(
            Variant(
                kernel="linear_stats",
                label=" ".join(words + ([] if aligned else ["unaligned"])),
                fn=linear_stats_kernel,
                types=types,
                constants={name: None for name, kind in optional.items() if not kind}
                | {"OVERFLOW": overflow[dtype], "EVEN_K": aligned, "PRECISION": precision}
                | config,
                divisible=("x_ptr", "w_ptr", "y_ptr", "N", "K", "stride_xm", "stride_wn") if aligned else (),
                num_warps=num_warps,
                num_stages=num_stages,
                aligned=aligned,
                main=dtype == "bf16" and l2 and not masked,
                memory_bound=False,
                tensor_core=dtype != "fp32" or precision == "tf32",
                targets=targets,
            )
        )
    return found
