"""AdamW over the salient rows or columns of many weights, in one launch.

A program owns BLOCK_C channels of one weight and goes along them BLOCK elements at a time. It finds its weight in a
table of addresses and sizes, one line a weight, because a launch cannot take hundreds of pointers.

Salient rows cost their share of a dense step's memory traffic. Salient columns lie scattered through every row: at 30%
nearly every half-line of 64 bytes, which is what a load fills, of a weight, gradient or whole state holds one, and only
compact states save traffic. Without sets whole weights are stepped, and a "channel" is CHUNK of the numbers of one.
"""

import itertools

import triton
import triton.language as tl

from longact_kernels.csrc_triton.variant import Variant

# A line of the table, int64 each. Strides and sizes are in elements.
FIELDS = (
    "weight",
    "grad",
    "channels",
    "exp_avg",
    "exp_avg_sq",
    "steps",
    "master",
    "count",  # S, how many salient channels
    "length",  # elements of a channel
    "stride_weight",  # from row to row, here and below
    "stride_grad",
    "stride_state",
    "grad_compact",  # 1: the gradient holds the salient channels only
    "state_compact",  # 1: so do moments, steps and master
    "first_program",
    "size",  # how many channels the weight has: a set that holds another is not followed there
)
LAYOUTS = ("aligned", "unaligned", "columns")


# Numbers of a whole weight that a program steps.
CHUNK = tl.constexpr(1 << 16)


def launch_config(layout: str, length: int, moment_itemsize: int) -> dict[str, int]:
    """Tiles for channels of a length: those that waste the fewest lanes and leave half of the threads resident."""
    if layout == "columns":
        return {"BLOCK_C": 32, "BLOCK": 2 * moment_itemsize, "num_warps": 4}
    block = min((1024, 512, 256, 128), key=lambda size: -(-length // size) * size)
    # As many channels in either layout, since the table of programs serves both.
    return {"BLOCK_C": 1024 // block, "BLOCK": block if layout == "aligned" else block // 2, "num_warps": 4}


@triton.jit
def one_minus_power(log_beta, tau):
    """1 - beta**tau in fp32, without the cancellation that would leave few digits of it for small tau."""
    x = tau.to(tl.float32) * log_beta
    series = tl.full(x.shape, 1.0, tl.float32)  # of expm1(x) / x, enough for x in [-1, 0]
    for k in tl.static_range(12, 1, -1):
        series = 1.0 + series * (x * (1.0 / k))
    return tl.where(x > -1.0, -x * series, 1.0 - tl.exp(x))


@triton.jit
def hash32(x):
    """A bijection of 32 bits with little bias (Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stochastic_round(x, bits, dtype: tl.constexpr):
    """fp32 `x` on the grid of a 16-bit dtype, up or down with odds that make the mean exact; NaN and Inf stay."""
    DROPPED: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    noisy = x.to(tl.uint32, bitcast=True) + (bits >> (32 - DROPPED))
    rounded = ((noisy >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
    if dtype == tl.float16:  # below 2^-14 its numbers lie 2^-24 apart
        scaled = tl.abs(x) * 16777216.0
        whole = tl.floor(scaled)
        up = scaled - whole > (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
        small = (whole + up.to(tl.float32)) * (1.0 / 16777216.0)
        rounded = tl.where(tl.abs(x) < 0.00006103515625, tl.where(x < 0, -small, small), rounded)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit(do_not_specialize=["seed", "stochastic"])
def sparse_adamw(
    table_ptr,  # int64 [L, WIDTH]
    weight_of_ptr,  # int32 [programs]: which line a program works for
    lr_ptr,  # fp32 [1]
    grad_scale_ptr,  # fp32 [1] or None
    found_inf_ptr,  # fp32 [1] or None
    log_beta1,
    log_beta2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    grad_sign,  # -1 to maximize
    seed,
    stochastic,  # 1: 16-bit moments, and 16-bit weights without a master, are rounded stochastically
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,  # no sets: all of every weight, with one step count, fp32, that was raised before
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,  # of a line, len(FIELDS)
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102 (known at compile time, the next one is not)
        if tl.load(found_inf_ptr) != 0:
            return
    line = tl.load(weight_of_ptr + tl.program_id(0))
    entry = table_ptr + line.to(tl.int64) * WIDTH
    weight_ptr = tl.load(entry).to(tl.pointer_type(WEIGHT))
    grad_ptr = tl.load(entry + 1).to(tl.pointer_type(GRAD))
    channels_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.int64))
    exp_avg_ptr = tl.load(entry + 3).to(tl.pointer_type(MOMENT))
    exp_avg_sq_ptr = tl.load(entry + 4).to(tl.pointer_type(MOMENT))
    steps_ptr = tl.load(entry + 5).to(tl.pointer_type(tl.float32 if WHOLE else tl.int32))
    master_ptr = tl.load(entry + 6).to(tl.pointer_type(tl.float32))
    count = tl.load(entry + 7)
    length = tl.load(entry + 8)
    stride_weight = tl.load(entry + 9)
    stride_grad = tl.load(entry + 10)
    stride_state = tl.load(entry + 11)
    grad_compact = tl.load(entry + 12)
    state_compact = tl.load(entry + 13)
    first_program = tl.load(entry + 14)
    first = (tl.program_id(0) - first_program) * BLOCK_C
    if WHOLE:
        length = tl.minimum(length - first * CHUNK, CHUNK)
    length = length.to(tl.int32)
    if ALIGNED:  # the hint holds for a pointer only after the cast to a pointer type
        # Four neighbours a thread whatever their width, so that no number changes threads between its load and store.
        weight_ptr = tl.multiple_of(weight_ptr, WEIGHT.primitive_bitwidth // 2)
        grad_ptr = tl.multiple_of(grad_ptr, GRAD.primitive_bitwidth // 2)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, MOMENT.primitive_bitwidth // 2)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, MOMENT.primitive_bitwidth // 2)
        master_ptr = tl.multiple_of(master_ptr, 16)
        length = tl.multiple_of(length, 8)
        stride_weight = tl.multiple_of(stride_weight, 8)
        stride_grad = tl.multiple_of(stride_grad, 8)
        stride_state = tl.multiple_of(stride_state, 8)

    # Rows lie along the tile's first dimension and columns along its last: neighbours in memory always lie along the
    # last.
    slot = tl.expand_dims(first + tl.arange(0, BLOCK_C), 0 if COLUMNS else 1)
    if WHOLE:
        channel = tl.where(slot < count, slot, -1)
        owned = channel >= 0
        in_grad = channel
        in_state = channel
        stride_grad = stride_state
        tau = tl.load(steps_ptr).to(tl.int32)
    else:
        channel = tl.load(channels_ptr + slot, mask=slot < count, other=-1)
        owned = (channel >= 0) & (channel < tl.load(entry + 15))
        in_grad = tl.where(grad_compact != 0, slot, channel)
        in_state = tl.where(state_compact != 0, slot, channel)
        tau = tl.load(steps_ptr + in_state, mask=owned, other=0) + 1
        # Every thread must have read τ before one of them writes it back.
        tl.debug_barrier()
        tl.store(steps_ptr + in_state, tau, mask=owned)

    lr = tl.load(lr_ptr).to(tl.float32)
    scale = grad_sign
    if grad_scale_ptr is not None:
        scale = tl.div_rn(grad_sign, tl.load(grad_scale_ptr))
    step_size = tl.div_rn(lr, one_minus_power(log_beta1, tau))
    correction = tl.div_rn(1.0, tl.sqrt_rn(one_minus_power(log_beta2, tau)))
    decay = 1.0 - lr * weight_decay
    key = hash32(hash32(seed.to(tl.uint32) ^ hash32(line.to(tl.uint32))) ^ channel.to(tl.uint32))
    key = hash32(key ^ tau.to(tl.uint32))
    moment_key = hash32(key ^ 1)

    weight_ptrs = weight_ptr + channel * (1 if COLUMNS else stride_weight)
    grad_ptrs = grad_ptr + in_grad * (1 if COLUMNS else stride_grad)
    exp_avg_ptrs = exp_avg_ptr + in_state * (1 if COLUMNS else stride_state)
    exp_avg_sq_ptrs = exp_avg_sq_ptr + in_state * (1 if COLUMNS else stride_state)
    master_ptrs = master_ptr + in_state * (1 if COLUMNS else stride_state)
    for start in range(0, length, BLOCK):
        offs = tl.expand_dims(start + tl.arange(0, BLOCK), 1 if COLUMNS else 0)
        mask = owned & (offs < length)
        at_weight = offs * stride_weight if COLUMNS else offs
        at_grad = offs * stride_grad if COLUMNS else offs
        at_state = offs * stride_state if COLUMNS else offs
        g = tl.load(grad_ptrs + at_grad, mask=mask, other=0.0).to(tl.float32) * scale
        m = tl.load(exp_avg_ptrs + at_state, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq_ptrs + at_state, mask=mask, other=0.0).to(tl.float32)
        if HAS_MASTER:
            w = tl.load(master_ptrs + at_state, mask=mask, other=0.0)
        else:
            w = tl.load(weight_ptrs + at_weight, mask=mask, other=0.0).to(tl.float32)

        m += one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        w = w * decay - m * step_size / (tl.sqrt(v) * correction + eps)

        if HAS_MASTER:
            tl.store(master_ptrs + at_state, w, mask=mask)
        elif WEIGHT.primitive_bitwidth == 16:
            w = tl.where(stochastic != 0, stochastic_round(w, hash32(key ^ offs.to(tl.uint32)), WEIGHT), w)
        tl.store(weight_ptrs + at_weight, w.to(WEIGHT), mask=mask)
        if MOMENT.primitive_bitwidth == 16:
            bits = hash32(moment_key ^ offs.to(tl.uint32))  # of which each moment takes half
            m = tl.where(stochastic != 0, stochastic_round(m, bits, MOMENT), m)
            v = tl.where(stochastic != 0, stochastic_round(v, bits << 16, MOMENT), v)
        # In the order that takes the fewest registers.
        tl.store(exp_avg_sq_ptrs + at_state, v.to(MOMENT), mask=mask)
        tl.store(exp_avg_ptrs + at_state, m.to(MOMENT), mask=mask)


def variants() -> list[Variant]:
    """Every specialisation that :func:`longact_kernels.ops.sparse_adamw_` can launch."""
    types = {"table_ptr": "*i64", "weight_of_ptr": "*i32", "lr_ptr": "*fp32", "seed": "i32"}
    scalars = "log_beta1 log_beta2 one_minus_beta1 beta2 one_minus_beta2 eps weight_decay grad_sign"
    types |= dict.fromkeys(scalars.split(), "fp32") | {"stochastic": "i32"}
    scaled = {"grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32"}
    unscaled = dict.fromkeys(scaled)
    dtypes = [("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")]
    names = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    found = []
    # Whole weights are stepped here for their masters' sake; sets in all dtypes, the longest tiles standing for all.
    cases = [*itertools.product(dtypes, (False, True), ("fp32", "bf16"), LAYOUTS, (False,))]
    cases += itertools.product(dtypes, (True,), ("fp32",), LAYOUTS[:2], (True,))
    for (weight, grad), master, moment, layout, whole in cases:
        if master and weight == "fp32":
            continue
        config = launch_config(layout, 4096, names[moment].primitive_bitwidth // 8)
        constants = {"WEIGHT": names[weight], "GRAD": names[grad], "MOMENT": names[moment], "HAS_MASTER": master}
        constants |= {"COLUMNS": layout == "columns", "WHOLE": whole, "ALIGNED": layout == "aligned"}
        constants |= {"WIDTH": len(FIELDS), "BLOCK_C": config["BLOCK_C"], "BLOCK": config["BLOCK"]}
        # Loss scaling goes with fp16 training, and adds two scalar loads only.
        amp = weight == "fp16" and grad == "fp16"
        label = f"{weight}{'' if grad == weight else ' fp32-grad'}{' master' if master else ''}"
        label += f"{'' if moment == 'fp32' else ' bf16-moments'} {layout}{' scaled' if amp else ''}"
        label += " whole" if whole else ""
        # With nothing in 32 bits, the threads of a 64-lane wave have 64 bits each of a tile.
        narrow = moment == "bf16" and grad != "fp32" and not master
        found.append(
            Variant(
                kernel="sparse_adamw",
                label=label,
                fn=sparse_adamw,
                types=types | (scaled if amp else {}),
                constants=constants | ({} if amp else unscaled),
                divisible=("table_ptr", "weight_of_ptr", "lr_ptr"),
                num_warps=config["num_warps"],
                aligned=layout == "aligned" and not narrow,
                main=master and weight == grad == "bf16" and moment == "fp32" and layout != "unaligned",
            )
        )
    return found
