"""Choosing salient sets, and carrying compact state from the old ones to the new ones: only what changes place moves.

What `match` and `carry` find in `args`, from 2 on; see `longact_kernels.cpu.refresh`, which writes it:

- sets: of every layer the addresses of its old and its new set, its first slot among those of all layers, its slots,
  and, set by `match`, whether any of its slots changes
- source: int64 for every slot of all layers, the slot of the same layer that its state comes from, -1 for none
- kept: uint8 for every slot, whether its channel stays
- states: of every state its address, its layer, how many lanes a slot has, strides of slots and of lanes
- whether a set does not ascend; set by `match`
"""

from numba import njit, uint32

from longact_kernels.cpu.native import compile_kernel
from longact_kernels.cpu.native.intrinsics import advance, int64_at, next_task, uint8_at, uint32_at
from longact_kernels.cpu.native.sets import empty_slots

# int64 words of one layer in `sets`, and of one state in `states`.
SET_WORDS = STATE_WORDS = 5
# Those of a group of channels in `select`: its first channel, how many; the first place of its chosen ones, how many.
GROUP_WORDS = 4


@njit
def _rank(bits):
    """Orders fp32 numbers as uint32: zeros alike, and NaN above all."""
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return 0xFFFFFFFF
    if magnitude == 0:
        return 0x80000000
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


@njit
def _count(ranks, size, floor):
    count = 0
    for n in range(size):
        count += ranks[n] >= floor
    return count


@compile_kernel
def select(args):
    """Args: fp32 numbers, uint32 scratch of their count, the groups, int64 chosen ones. One task a group."""
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        group = advance(int64_at(args[4]), task * GROUP_WORDS)
        first, size, place, count = group[0], group[1], group[2], group[3]
        bits, ranks, index = advance(uint32_at(args[2]), first), advance(uint32_at(args[3]), first), int64_at(args[5])
        for n in range(size):
            ranks[n] = _rank(bits[n])
        floor = 0  # in the end, the smallest rank that is chosen, bit by bit
        for bit in range(31, -1, -1):
            if _count(ranks, size, uint32(floor | 1 << bit)) >= count:
                floor |= 1 << bit
        ties = count - (_count(ranks, size, uint32(floor + 1)) if floor < 0xFFFFFFFF else 0)
        for n in range(size):
            if ranks[n] > floor or (ranks[n] == floor and ties > 0):
                ties -= ranks[n] == floor
                index[place] = first + n
                place += 1


@compile_kernel
def match(args):
    """One task a layer: fills its part of `source` and `kept`."""
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        layer = advance(int64_at(args[2]), task * SET_WORDS)
        old, new, slots = int64_at(layer[0]), int64_at(layer[1]), layer[3]
        source, kept = advance(int64_at(args[3]), layer[2]), advance(uint8_at(args[4]), layer[2])
        if empty_slots(old, slots, 2**31) < 0 or empty_slots(new, slots, 2**31) < 0:
            args[6] = 1
            continue
        place, changes = 0, 0
        for slot in range(slots):
            while place < slots and old[place] < new[slot]:
                place += 1
            stays = new[slot] >= 0 and place < slots and old[place] == new[slot]
            source[slot] = place if stays else -1
            kept[slot] = stays
            changes |= source[slot] != slot
        layer[4] = changes


@njit
def _copy(state, stride, lanes, slot, source):
    target, origin = advance(state, slot * stride), advance(state, source * stride)
    for k in range(lanes):
        target[k] = origin[k]


@njit
def _carry(state, source, slots, stride, lanes):
    """Slots ascend in both sets: what comes from ahead is taken in ascending order, from behind in descending order."""
    for slot in range(slots):
        if source[slot] > slot:
            _copy(state, stride, lanes, slot, source[slot])
    for slot in range(slots - 1, -1, -1):
        if 0 <= source[slot] < slot:
            _copy(state, stride, lanes, slot, source[slot])
    for slot in range(slots):
        if source[slot] < 0:
            target = advance(state, slot * stride)
            for k in range(lanes):
                target[k] = 0


@compile_kernel
def carry(args):
    """One task a state, of words of 32 bits; after `match`."""
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        one = advance(int64_at(args[5]), task * STATE_WORDS)
        state, lanes, stride, stride_lane = uint32_at(one[0]), one[2], one[3], one[4]
        layer = advance(int64_at(args[2]), one[1] * SET_WORDS)
        source, slots = advance(int64_at(args[3]), layer[2]), layer[3]
        if layer[4] == 0:
            continue
        if stride_lane == 1:
            _carry(state, source, slots, stride, lanes)
        else:
            for lane in range(lanes):
                _carry(advance(state, lane * stride_lane), source, slots, stride, 1)
