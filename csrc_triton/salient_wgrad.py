"""Weight gradient of the salient rows or columns: pack the salient channels, multiply by the library, scatter.

The product is the library's: a plain Triton product does some 550 TFLOP/s on an H100 where cuBLAS does 798.
"""

import itertools

import triton
import triton.language as tl

from longact_kernels.csrc_triton.variant import Variant

# An H100 does 399e12 multiply-adds a second in bf16 and moves 1.5e12 numbers of 16 bits: so many while it moves one.
PRODUCTS_A_NUMBER = 266
# And so many in the 3 µs that one more dependent launch takes. Predicted, as is the choice that follows from them.
PRODUCTS_A_LAUNCH = 1_200_000_000


def pays(M: int, channels: int, S: int, other: int, itemsize: int) -> bool:
    """Whether to pack S of so many channels, rather than to multiply all of them and keep the salient ones.

    Packing saves products with the `other` operand's channels, and costs a launch and M (channels + S) numbers moved.
    fp32 products are some ten times as slow, so that it always pays for them.
    """
    saved = M * other * (channels - S)
    return itemsize == 4 or saved > M * (channels + S) * PRODUCTS_A_NUMBER + PRODUCTS_A_LAUNCH


@triton.jit(do_not_specialize=["M", "N", "S", "P", "stride_xm"])
def pack_kernel(
    x_ptr,  # [M, N]; 1 between channels
    index_ptr,  # int64 [S]; -1 for an empty slot
    packed_ptr,  # [M, P]
    M,
    N,
    S,
    P,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`packed[:, :S] = x[:, index]`; columns of empty slots, and S .. P, which are alignment, are zero.

    Programs that follow each other work on the same rows. A tile is a row's slots, one a lane: channels ascend, so that
    those of neighbouring lanes lie on few lines. Of tiles with two dimensions, Triton may lay the lanes along rows.
    """
    blocks = tl.cdiv(P, BLOCK_S)
    row = tl.program_id(0) // blocks * BLOCK_M
    offs_s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.load(index_ptr + offs_s, mask=offs_s < S, other=-1)
    in_s = (channel >= 0) & (channel < N)
    channel = channel.to(tl.int32)
    x_ptr += row.to(tl.int64) * stride_xm
    packed_ptr += row.to(tl.int64) * P
    lines = ()
    for m in tl.static_range(BLOCK_M):  # all loads, then all stores: what is loaded after a store waits for it
        lines += (tl.load(x_ptr + channel, mask=in_s & (row + m < M), other=0.0),)
        x_ptr += stride_xm
    for m in tl.static_range(BLOCK_M):
        tl.store(packed_ptr + offs_s, lines[m], mask=(offs_s < P) & (row + m < M))
        packed_ptr += P


@triton.jit
def _move(product_ptrs, out_ptrs, found, inside, ACCUMULATE: tl.constexpr, FILL: tl.constexpr):
    value = tl.load(product_ptrs, mask=found & inside, other=0.0).to(tl.float32)
    if ACCUMULATE:
        value += tl.load(out_ptrs, mask=found & inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, value.to(out_ptrs.dtype.element_ty), mask=inside if FILL else found & inside)


@triton.jit
def scatter_kernel(
    product_ptr,  # a line a slot, or a line a channel if WHOLE; lines are columns if COLUMNS
    index_ptr,  # int64 [S], ascending; -1 for an empty slot
    out_ptr,  # [R, C]: a line a slot if COMPACT, else a line a channel
    R,
    C,
    S,
    channels,
    bits,  # of S
    stride_product,
    stride_out,
    COLUMNS: tl.constexpr,
    COMPACT: tl.constexpr,
    WHOLE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FILL: tl.constexpr,  # whether lines without a salient channel are set to zero
    BLOCK_C: tl.constexpr,
):
    """Writes or adds the product's salient lines to their places in `out`.

    A program looks once for where its row, or its block of columns, comes from, then goes along it. Its tiles lie in
    one row: where those of two dimensions are gathered along columns, Triton may lay the lanes along rows.
    """
    row = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    line = offs_c if COLUMNS else row
    # A line that is not found is never read: the other operand's Inf has made the packed zeros of empty slots NaN.
    if COMPACT:
        channel = tl.load(index_ptr + line, mask=line < S, other=-1)
        found = (channel >= 0) & (channel < channels)
        source = channel.to(tl.int32) if WHOLE else line
    else:
        # How many slots lie before the line's own one, which the search passes if there is one.
        slot = line * 0
        found = line < 0
        for bit in range(bits):
            beyond = slot + (1 << (bits - 1 - bit))
            channel = tl.load(index_ptr + beyond - 1, mask=beyond <= S, other=channels)
            slot = tl.where(channel < line, beyond, slot)
            found |= (channel == line) & (beyond <= S)
        source = line if WHOLE else slot
    if COLUMNS:
        for r in range(row, R, tl.num_programs(0)):
            product_ptrs = product_ptr + tl.cast(r, tl.int64) * stride_product + source
            out_ptrs = out_ptr + tl.cast(r, tl.int64) * stride_out + offs_c
            _move(product_ptrs, out_ptrs, found, offs_c < C, ACCUMULATE, FILL)
    else:
        product_ptrs = product_ptr + source.to(tl.int64) * stride_product + offs_c
        out_ptrs = out_ptr + row.to(tl.int64) * stride_out + offs_c
        for c in range(0, C, BLOCK_C):
            _move(product_ptrs + c, out_ptrs + c, found, offs_c < C - c, ACCUMULATE, FILL)


PACK_CONFIG = {"BLOCK_M": 16, "BLOCK_S": 128, "num_warps": 4}  # as many slots as lanes
# Along columns, a lane keeps the places of its columns; along rows, waves of 64 lanes load 16 bytes each.
SCATTER_CONFIG = {"rows": {"BLOCK_C": 2048, "num_warps": 4}, "columns": {"BLOCK_C": 1024, "num_warps": 4}}
# Along columns, a program goes through so many.
ROWS = 16


def scatter_grid(R: int, C: int, columns: bool, BLOCK_C: int) -> tuple[int, int]:
    """Programs of :func:`scatter_kernel`."""
    return (-(-R // ROWS), -(-C // BLOCK_C)) if columns else (R, 1)


def variants() -> list[Variant]:
    """What :func:`longact_kernels.ops.salient_wgrad` launches."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        config = dict(PACK_CONFIG)
        found.append(
            Variant(
                kernel="salient_wgrad",
                label=f"pack {dtype}",
                fn=pack_kernel,
                types={"x_ptr": f"*{dtype}", "index_ptr": "*i64", "packed_ptr": f"*{dtype}"}
                | dict.fromkeys(("M", "N", "S", "P", "stride_xm"), "i32"),
                num_warps=config.pop("num_warps"),
                constants=config,
                divisible=("x_ptr", "index_ptr", "packed_ptr"),
                main=dtype == "bf16",
            )
        )
    forms = [
        # product, out, compact, accumulate
        ("bf16", "bf16", False, False),
        ("fp16", "fp16", False, False),
        ("fp32", "fp32", False, False),
        ("fp32", "bf16", False, True),
        ("fp32", "fp32", True, False),
        ("fp32", "fp32", True, True),
    ]
    for (product, out, compact, accumulate), columns, whole in itertools.product(forms, (False, True), (False, True)):
        axis = "columns" if columns else "rows"
        config = dict(SCATTER_CONFIG[axis])
        words = ["scatter", out, axis]
        words += ["compact"] * compact + ["added"] * accumulate + ["of all"] * whole
        found.append(
            Variant(
                kernel="salient_wgrad",
                label=" ".join(words),
                fn=scatter_kernel,
                types={"product_ptr": f"*{product}", "index_ptr": "*i64", "out_ptr": f"*{out}"}
                | dict.fromkeys(("R", "C", "S", "channels", "bits", "stride_product", "stride_out"), "i32"),
                num_warps=config.pop("num_warps"),
                constants={"COLUMNS": columns, "COMPACT": compact, "WHOLE": whole, "ACCUMULATE": accumulate}
                | {"FILL": not accumulate, **config},
                divisible=("product_ptr", "index_ptr", "out_ptr", "C", "stride_product", "stride_out"),
                # Along columns it gathers, from lines that its neighbours read as well.
                aligned=not columns,
                main=out == "bf16" and not (accumulate or columns or whole),
            )
        )
    return found
