"""What kernels have to know of a set of channels before they use it as addresses."""

from numba import njit


@njit
def empty_slots(index, slots, channels):
    """How many slots hold no channel, -1, before the others; -1 if this is no ascending set of so many channels."""
    empty = 0
    while empty < slots and index[empty] == -1:
        empty += 1
    before = -1
    for slot in range(empty, slots):
        if index[slot] <= before or index[slot] >= channels:
            return -1
        before = index[slot]
    return empty
