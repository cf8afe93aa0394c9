"""Choosing salient sets from the flat statistics buffer, and moving compact optimizer state to them in place."""

import triton
import triton.language as tl

from longact_kernels.csrc_triton.variant import Variant

# One program chooses in a group, in 35 passes over it; larger groups are left to a sort.
LARGE_GROUP = 1 << 14
SELECT_CONFIG = {"BLOCK": 512, "num_warps": 1}
# By whether a state's rows are aligned: unaligned ones are mostly step counts, one lane wide.
CARRY_CONFIG = {
    True: {"BLOCK_S": 2, "BLOCK_K": 1024, "num_warps": 2},
    False: {"BLOCK_S": 64, "BLOCK_K": 32, "num_warps": 4},
}


@triton.jit
def _order(saliency_ptr, offs, mask):
    """Integers in the order of the floats, all of one kind of zero, every NaN above Inf; -1 where masked."""
    x = tl.load(saliency_ptr + offs, mask=mask, other=0.0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    ordered = tl.where(x != x, 4294967295, ordered)
    return tl.where(mask, ordered, -1)


@triton.jit
def select_kernel(
    saliency_ptr,  # fp32 [n]
    starts_ptr,  # int32 [groups + 1]: where a group begins in the saliency
    chosen_ptr,  # int32 [groups + 1]: where its choice begins in the output
    index_ptr,  # int64 [..]
    BLOCK: tl.constexpr,
):
    """One group: finds the count-th largest value bit by bit, then writes all above it and the first of its equals."""
    group = tl.program_id(0)
    start = tl.load(starts_ptr + group)
    end = tl.load(starts_ptr + group + 1)
    out = tl.load(chosen_ptr + group)
    count = tl.load(chosen_ptr + group + 1) - out

    threshold = tl.zeros((), tl.int64)
    for i in range(32):
        candidate = threshold | (tl.full((), 2147483648, tl.int64) >> i)
        reached = tl.zeros((BLOCK,), tl.int32)
        for s in range(start, end, BLOCK):
            offs = s + tl.arange(0, BLOCK)
            reached += (_order(saliency_ptr, offs, offs < end) >= candidate).to(tl.int32)
        threshold = tl.where(tl.sum(reached, 0) >= count, candidate, threshold)

    above = tl.zeros((BLOCK,), tl.int32)
    for s in range(start, end, BLOCK):
        offs = s + tl.arange(0, BLOCK)
        above += (_order(saliency_ptr, offs, offs < end) > threshold).to(tl.int32)
    wanted = count - tl.sum(above, 0)  # of the values equal to the threshold, lowest index first

    for s in range(start, end, BLOCK):
        offs = s + tl.arange(0, BLOCK)
        value = _order(saliency_ptr, offs, offs < end)
        equal = (value == threshold).to(tl.int32)
        taken = (value > threshold) | ((equal != 0) & (tl.cumsum(equal, 0) <= wanted))
        place = tl.cumsum(taken.to(tl.int32), 0)
        tl.store(index_ptr + out + place - 1, offs.to(tl.int64), mask=taken)
        wanted -= tl.sum(equal, 0)
        out += tl.sum(taken.to(tl.int32), 0)


@triton.jit
def _move(state_ptr, source_ptr, movers_ptr, first, last, lanes, in_lane, stride_slot, BLOCK_S: tl.constexpr):
    """Moves the slots that the list has from `first` on, before `last`."""
    offs = first + tl.arange(0, BLOCK_S)
    slot = tl.load(movers_ptr + offs, mask=offs < last, other=0)
    source = tl.load(source_ptr + slot, mask=offs < last, other=-1)
    ptrs = state_ptr + source.to(tl.int64)[:, None] * stride_slot + lanes[None, :]
    value = tl.load(ptrs, mask=(source >= 0)[:, None] & in_lane[None, :], other=0)
    # Every source of this block is read before any of its slots is written.
    tl.debug_barrier()
    ptrs = state_ptr + slot.to(tl.int64)[:, None] * stride_slot + lanes[None, :]
    tl.store(ptrs, value, mask=(offs < last)[:, None] & in_lane[None, :])


@triton.jit
def carry_kernel(
    table_ptr,  # int64 [states, 7]: address, layer, first slot, slots, lanes, stride of slots, stride of lanes
    source_ptr,  # int32 [all slots]: the slot that each one's state comes from, -1 for none
    movers_ptr,  # int32 [all slots]: of each layer the slots whose source is ahead, a gap, those whose source is behind
    counts_ptr,  # int32 [2, layers]: how many there are of each kind
    layers,
    ALIGNED: tl.constexpr,  # rows of whole 16-byte units at addresses and strides that are multiples of them
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Moves a state's lanes (columns of [S, K]) from old slots to new ones in place; slots without a source are zeroed.

    Both sets ascend, so sources do: no slot that has its source ahead is itself the source of one that has it behind,
    nor the other way round. Those with it ahead move first, ascending; the others, and zeros, after them, descending.
    """
    row = table_ptr + tl.program_id(1) * 7
    K = tl.load(row + 4).to(tl.int32)
    if tl.program_id(0) * BLOCK_K >= K:
        return
    # All state is moved as 32-bit words, whatever they mean.
    state_ptr = tl.load(row).to(tl.pointer_type(tl.int32))
    layer = tl.load(row + 1)
    start = tl.load(row + 2)
    source_ptr += start
    movers_ptr += start
    S = tl.load(row + 3).to(tl.int32)
    stride_slot = tl.load(row + 5)
    ahead = tl.load(counts_ptr + layer)
    behind = tl.load(counts_ptr + layers + layer)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    if ALIGNED:
        state_ptr = tl.multiple_of(state_ptr, 16)
        stride_slot = tl.multiple_of(stride_slot, 4)
        in_lane = offs_k < tl.multiple_of(K, 4)
        lanes = offs_k.to(tl.int64)
    else:
        in_lane = offs_k < K
        lanes = offs_k.to(tl.int64) * tl.load(row + 6)
    for i in range(0, ahead, BLOCK_S):
        _move(state_ptr, source_ptr, movers_ptr, i, ahead, lanes, in_lane, stride_slot, BLOCK_S)
    for i in range(0, behind, BLOCK_S):
        last = S - i
        first = tl.maximum(last - BLOCK_S, S - behind)
        _move(state_ptr, source_ptr, movers_ptr, first, last, lanes, in_lane, stride_slot, BLOCK_S)


def variants() -> list[Variant]:
    """What :func:`longact_kernels.ops.select` and :func:`longact_kernels.ops.carry_` launch."""
    select = dict(SELECT_CONFIG)
    found = [
        Variant(
            kernel="refresh",
            label="select",
            fn=select_kernel,
            types={"saliency_ptr": "*fp32", "starts_ptr": "*i32", "chosen_ptr": "*i32", "index_ptr": "*i64"},
            num_warps=select.pop("num_warps"),
            constants=select,
            divisible=("saliency_ptr", "starts_ptr", "chosen_ptr", "index_ptr"),
            main=True,
            memory_bound=False,
        )
    ]
    tables = ("table_ptr", "source_ptr", "movers_ptr", "counts_ptr")
    for aligned in (True, False):
        carry = dict(CARRY_CONFIG[aligned])
        found.append(
            Variant(
                kernel="refresh",
                label="carry" + ("" if aligned else " unaligned"),
                fn=carry_kernel,
                types={**dict.fromkeys(tables, "*i32"), "table_ptr": "*i64", "layers": "i32"},
                num_warps=carry.pop("num_warps"),
                constants={"ALIGNED": aligned, **carry},
                divisible=tables,
                aligned=aligned,
                main=aligned,
                memory_bound=aligned,
            )
        )
    return found
