"""AdamW on salient rows or columns of many weights in one parallel run.

What the kernels find in `args`, from 2 on; see `longact_kernels.cpu.sparse_adamw`, which writes it:

- addresses: of every weight, then every gradient, set, exp_avg, exp_avg_sq, step count, and master, if there are any
- sizes: for every weight N, K, S, strides of weight and gradient, whether the gradient is compact, tasks of the weights
  before, channels of a task (along columns: rows), and int64 words that those before take of the scratch for columns
- scalars: lr, beta1, beta2, eps, weight decay, gradient scale (0: none), sign of the gradient
- scratch for columns; number of weights; whether weights, gradients and moments are bf16; whether there are masters;
  whether states are compact; seed (-1: round to nearest); whether channels are columns; and, set by `check`, whether
  an index is wrong

The operations are those of `torch.optim.AdamW`, except that its two divisions are one. Moments have its bits; weights
differ in the last one or two.
"""

import math

import numpy as np
from numba import float32, njit, uint32

from longact_kernels.cpu.native import compile_kernel
from longact_kernels.cpu.native.intrinsics import (
    adamw_of,
    advance,
    bf16_by_chance,
    bf16_of,
    bits_set,
    compress_of,
    compresses,
    expand_of,
    float32_at,
    float64_at,
    float_of,
    int32_at,
    int64_at,
    next_task,
    prefetch_of,
    uint8_at,
    uint16_at,
    uint32_at,
)

# Elements worked on at a time: the fp32 vectors of that many stay in the first-level cache.
_BLOCK = 1024
# Neighbouring columns that share a cache line, of which either all are read and written or none.
_LINE = 16
# Lines are left out where at least this many times as many hold no salient column.
_FEW = 3
# Salient columns worked on at a time where states are compact: so few that reading ahead goes on meanwhile.
_GROUP = 96
# Elements along the salient rows between those worked on and those asked for.
_AHEAD = 512
# int64 words of one weight in `sizes`.
_WORDS = 9

_prefetch_line = prefetch_of(64)
_compress, _expand = compress_of(_LINE), expand_of(_LINE)
_COMPRESSES = compresses()
_line, _single = adamw_of(_LINE, masked=False), adamw_of(1, masked=False)
_masked_line, _masked_single = adamw_of(_LINE, masked=True), adamw_of(1, masked=True)


@njit(error_model="numpy")
def _factors(tau, scalars):
    """What is left of the bias corrections c1 = 1 - beta1^τ and c2 = sqrt(1 - beta2^τ): lr * c2 / c1 and eps * c2."""
    c2 = math.sqrt(1.0 - math.pow(scalars[2], tau))
    return float32(scalars[0] * c2 / (1.0 - math.pow(scalars[1], tau))), float32(scalars[3] * c2)


@njit(error_model="numpy")
def _constants(scalars):
    lr, beta1, beta2, decay = scalars[0], scalars[1], scalars[2], scalars[4]
    return float32(1.0 - lr * decay), float32(1.0 - beta1), float32(beta2), float32(1.0 - beta2)


@njit(error_model="numpy", forceinline=True)
def _read(source, is_bf16, start, count, buffer, scale, sign):
    """`count` numbers from `start` on, as fp32: where they lie if nothing changes them, else in `buffer`."""
    if is_bf16:
        half = advance(uint16_at(source), start)
        for k in range(count):
            buffer[k] = float_of(half[k])
    else:
        single = advance(float32_at(source), start)
        if scale == 0 and sign > 0:
            return single
        for k in range(count):
            buffer[k] = single[k]
    if scale != 0:
        for k in range(count):
            buffer[k] /= scale
    if sign < 0:
        for k in range(count):
            buffer[k] = -buffer[k]
    return buffer


@njit
def _hash(x):
    x = uint32((x ^ (x >> uint32(16))) * uint32(0x7FEB352D))
    x = uint32((x ^ (x >> uint32(15))) * uint32(0x846CA68B))
    return uint32(x ^ (x >> uint32(16)))


@njit
def _key(seed, layer, channel, tau):
    """As `random_key` of the reference."""
    key = _hash(uint32(uint32(seed) ^ _hash(uint32(layer))))
    return _hash(uint32(_hash(uint32(key ^ uint32(channel))) ^ uint32(tau)))


@njit
def _write(target, start, count, numbers, by_chance, key, place, shift):
    """Numbers as bf16: the nearest ones, or by chance with 16 of each element's bits, from bit `shift` on."""
    half = advance(uint16_at(target), start)
    if by_chance:
        for k in range(count):
            half[k] = bf16_by_chance(numbers[k], uint32(_hash(uint32(key ^ uint32(place + k))) >> shift))
    else:
        for k in range(count):
            half[k] = bf16_of(numbers[k])


@njit
def _weight_of(task, number, count, sizes):
    """The weight that a task works for; `number` is one at or before it."""
    while number + 1 < count and sizes[(number + 1) * _WORDS + 6] <= task:
        number += 1
    return number


@njit
def _prefetch(source, is_bf16, start):
    _prefetch_line(uint8_at(source + start * (2 if is_bf16 else 4)))


@compile_kernel
def check(args):
    """One task a weight: notes whether its set does not ascend within its channels. Changes nothing else."""
    addresses, sizes, count_of_weights, along_columns = int64_at(args[2]), int64_at(args[3]), args[6], args[13]
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        size, index = advance(sizes, task * _WORDS), int64_at(addresses[2 * count_of_weights + task])
        channels = size[1] if along_columns else size[0]
        before = -1
        for slot in range(size[2]):
            channel = index[slot]
            if channel < before or (channel == before and channel != -1) or channel >= channels:
                args[14] = 1
            before = channel


@compile_kernel
def rows(args):
    """A task has some of a weight's slots."""
    addresses, sizes, scalars, count_of_weights = int64_at(args[2]), int64_at(args[3]), float64_at(args[4]), args[6]
    weight_is_bf16, grad_is_bf16, moment_is_bf16, has_master, compact, seed = (
        args[7], args[8], args[9], args[10], args[11], args[12],
    )  # fmt: skip
    decay, weight1, beta2, weight2 = _constants(scalars)
    divisor, sign = float32(scalars[5]), float32(scalars[6])
    scratch = np.empty(4 * _BLOCK, np.float32)
    w_buffer = float32_at(scratch.ctypes.data)
    g_buffer, m_buffer, v_buffer = (
        advance(w_buffer, _BLOCK),
        advance(w_buffer, 2 * _BLOCK),
        advance(w_buffer, 3 * _BLOCK),
    )
    number, last_tau = 0, 0
    step_size, floor = float32(0.0), float32(0.0)
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        number = _weight_of(task, number, count_of_weights, sizes)
        size, at = advance(sizes, number * _WORDS), advance(addresses, number)
        K, S, weight_stride, grad_stride, compact_grad = size[1], size[2], size[3], size[4], size[5]
        weight, grad, index = at[0], at[count_of_weights], int64_at(at[2 * count_of_weights])
        exp_avg, exp_avg_sq, step = (
            at[3 * count_of_weights],
            at[4 * count_of_weights],
            int32_at(at[5 * count_of_weights]),
        )
        master = at[6 * count_of_weights] if has_master else 0
        held, held_is_bf16 = (master, 0) if master != 0 else (weight, weight_is_bf16)
        first = (task - size[6]) * size[7]
        for slot in range(first, min(first + size[7], S)):
            row = index[slot]
            if row == -1:
                continue
            state = slot if compact else row
            tau = step[state] + 1
            step[state] = tau
            if tau != last_tau:
                step_size, floor = _factors(tau, scalars)
                last_tau = tau
            key = _key(seed, number, row, tau)
            # Hardware looks ahead along a row, not to the next salient one.
            ahead, jump = min(_AHEAD, K), index[min(slot + 1, S - 1)] - row
            grad_jump = (1 if compact_grad else jump) * grad_stride + ahead - K
            state_jump = (1 if compact else jump) * K + ahead - K
            held_jump = state_jump if master != 0 else jump * weight_stride + ahead - K
            for k0 in range(0, K, _BLOCK):
                count = min(_BLOCK, K - k0)
                here, state_here = row * weight_stride + k0, state * K + k0
                grad_here = (slot if compact_grad else row) * grad_stride + k0
                g = _read(grad, grad_is_bf16, grad_here, count, g_buffer, divisor, sign)
                if master != 0:
                    w = advance(float32_at(master), state_here)
                else:
                    w = _read(weight, weight_is_bf16, here, count, w_buffer, float32(0.0), float32(1.0))
                m = _read(exp_avg, moment_is_bf16, state_here, count, m_buffer, float32(0.0), float32(1.0))
                v = _read(exp_avg_sq, moment_is_bf16, state_here, count, v_buffer, float32(0.0), float32(1.0))
                held_here = state_here if master != 0 else here
                k = 0
                while k + _LINE <= count:
                    same_row = k0 + k + ahead < K
                    state_ahead = state_here + k + (ahead if same_row else state_jump)
                    _prefetch(grad, grad_is_bf16, grad_here + k + (ahead if same_row else grad_jump))
                    _prefetch(exp_avg, moment_is_bf16, state_ahead)
                    _prefetch(exp_avg_sq, moment_is_bf16, state_ahead)
                    _prefetch(held, held_is_bf16, held_here + k + (ahead if same_row else held_jump))
                    _line(
                        advance(w, k), advance(g, k), advance(m, k), advance(v, k),
                        step_size, floor, decay, weight1, beta2, weight2,
                    )  # fmt: skip
                    k += _LINE
                while k < count:
                    _single(
                        advance(w, k), advance(g, k), advance(m, k), advance(v, k),
                        step_size, floor, decay, weight1, beta2, weight2,
                    )  # fmt: skip
                    k += 1
                if moment_is_bf16:
                    moment_key = _hash(uint32(key ^ uint32(1)))
                    _write(exp_avg, state_here, count, m, seed >= 0, moment_key, k0, 16)
                    _write(exp_avg_sq, state_here, count, v, seed >= 0, moment_key, k0, 0)
                if weight_is_bf16:
                    _write(weight, here, count, w, seed >= 0 and master == 0, key, k0, 16)
                elif master != 0:
                    single = advance(float32_at(weight), here)
                    for k in range(count):
                        single[k] = w[k]


@njit
def _write_salient(target, start, count, numbers, floor, by_chance, keys, is_moment, row, shift):
    """As `_write`, where `floor` is not negative; `keys` are the columns'."""
    half = advance(uint16_at(target), start)
    if by_chance:
        for k in range(count):
            key = _hash(uint32(keys[k] ^ uint32(1))) if is_moment else keys[k]
            drawn = bf16_by_chance(numbers[k], uint32(_hash(uint32(key ^ uint32(row))) >> shift))
            half[k] = drawn if floor[k] >= 0 else half[k]
    else:
        for k in range(count):
            half[k] = bf16_of(numbers[k]) if floor[k] >= 0 else half[k]


@compile_kernel
def column_factors(args):
    """One task a weight: raises τ of its salient columns, and fills its scratch: step sizes, floors (-1 where there is
    no salient column) and keys of all columns, then the number of runs of neighbouring lines with salient columns, and
    first and end column of each; or, where states are compact, the first three for the set's slots, then the lines of
    every group of slots from its first slot on: first column times 2^16, and a bit for each salient one."""
    addresses, sizes, scalars, count_of_weights = int64_at(args[2]), int64_at(args[3]), float64_at(args[4]), args[6]
    compact, seed = args[11], args[12]
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        size = advance(sizes, task * _WORDS)
        K, S, scratch = size[1], size[2], args[5] + 8 * size[8]
        width = S if compact else K
        step_size, floor, keys = float32_at(scratch), float32_at(scratch + 4 * width), uint32_at(scratch + 8 * width)
        index = int64_at(addresses[2 * count_of_weights + task])
        step = int32_at(addresses[5 * count_of_weights + task])
        for k in range(width):
            step_size[k], floor[k] = float32(0.0), float32(-1.0)
        last_tau = 0
        for slot in range(S):
            k = index[slot]
            if k == -1:
                continue
            place = slot if compact else k
            tau = step[place] + 1
            step[place] = tau
            if tau != last_tau:
                factors = _factors(tau, scalars)
                last_tau = tau
            step_size[place], floor[place] = factors
            keys[place] = _key(seed, task, k, tau)
        if compact:
            lines, line, empty = int64_at(scratch + 8 * (3 * S // 2 + 1)), 0, 0
            for slot in range(S):
                k = index[slot]
                if k == -1:
                    empty += 1
                    continue
                start = min(k // _LINE * _LINE, K - _LINE)
                if (slot - empty) % _GROUP == 0:
                    line = slot
                    lines[line] = start << 16
                elif lines[line] >> 16 != start:
                    line += 1
                    lines[line] = start << 16
                lines[line] |= 1 << (k - start)
            continue
        runs = int64_at(scratch + 8 * (3 * K // 2 + 1))
        count, lines, open_run = 0, 0, False
        for line in range(0, K, _LINE):
            end = min(line + _LINE, K)
            salient = False
            for k in range(line, end):
                salient |= floor[k] >= 0
            if salient:
                lines += 1
                if not open_run:
                    count += 1
                    runs[2 * count - 1] = line
                runs[2 * count] = end
            open_run = salient
        if lines * _LINE * _FEW > K:
            # Leaving lines out costs more than it saves.
            count, runs[1], runs[2] = 1, 0, K
        runs[0] = count


@compile_kernel
def columns(args):
    """As `rows`, after `column_factors`; a task has some rows of a weight."""
    addresses, sizes, scalars, count_of_weights = int64_at(args[2]), int64_at(args[3]), float64_at(args[4]), args[6]
    weight_is_bf16, grad_is_bf16, moment_is_bf16, has_master, seed = args[7], args[8], args[9], args[10], args[12]
    decay, weight1, beta2, weight2 = _constants(scalars)
    divisor, sign = float32(scalars[5]), float32(scalars[6])
    scratch = np.empty(4 * _BLOCK, np.float32)
    w_buffer = float32_at(scratch.ctypes.data)
    g_buffer, m_buffer, v_buffer = (
        advance(w_buffer, _BLOCK),
        advance(w_buffer, 2 * _BLOCK),
        advance(w_buffer, 3 * _BLOCK),
    )
    number = 0
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        number = _weight_of(task, number, count_of_weights, sizes)
        size, at = advance(sizes, number * _WORDS), advance(addresses, number)
        N, K, weight_stride, grad_stride = size[0], size[1], size[3], size[4]
        weight, grad, exp_avg, exp_avg_sq = (
            at[0],
            at[count_of_weights],
            at[3 * count_of_weights],
            at[4 * count_of_weights],
        )
        master = at[6 * count_of_weights] if has_master else 0
        scratch = args[5] + 8 * size[8]
        runs = int64_at(scratch + 8 * (3 * K // 2 + 1))
        # Hardware does not see ahead where lines are left out: the next row's are asked for.
        gaps = runs[0] > 1
        first = (task - size[6]) * size[7]
        for row in range(first, min(first + size[7], N)):
            for run in range(runs[0]):
                end = runs[2 * run + 2]
                for k0 in range(runs[2 * run + 1], end, _BLOCK):
                    count = min(_BLOCK, end - k0)
                    step_size = float32_at(scratch + 4 * k0)
                    floor, keys = advance(step_size, K), uint32_at(scratch + 8 * K + 4 * k0)
                    here, state_here = row * weight_stride + k0, row * K + k0
                    g = _read(grad, grad_is_bf16, row * grad_stride + k0, count, g_buffer, divisor, sign)
                    if master != 0:
                        w = advance(float32_at(master), state_here)
                    else:
                        w = _read(weight, weight_is_bf16, here, count, w_buffer, float32(0.0), float32(1.0))
                    m = _read(exp_avg, moment_is_bf16, state_here, count, m_buffer, float32(0.0), float32(1.0))
                    v = _read(exp_avg_sq, moment_is_bf16, state_here, count, v_buffer, float32(0.0), float32(1.0))
                    k = 0
                    while k + _LINE <= count:
                        if gaps:
                            _prefetch(exp_avg, moment_is_bf16, state_here + K + k)
                            _prefetch(exp_avg_sq, moment_is_bf16, state_here + K + k)
                            _prefetch(grad, grad_is_bf16, (row + 1) * grad_stride + k0 + k)
                            if master != 0:
                                _prefetch(master, 0, state_here + K + k)
                            else:
                                _prefetch(weight, weight_is_bf16, here + weight_stride + k)
                        _masked_line(
                            advance(w, k), advance(g, k), advance(m, k), advance(v, k),
                            advance(step_size, k), advance(floor, k), decay, weight1, beta2, weight2,
                        )  # fmt: skip
                        k += _LINE
                    while k < count:
                        _masked_single(
                            advance(w, k), advance(g, k), advance(m, k), advance(v, k),
                            advance(step_size, k), advance(floor, k), decay, weight1, beta2, weight2,
                        )  # fmt: skip
                        k += 1
                    if moment_is_bf16:
                        _write_salient(exp_avg, state_here, count, m, floor, seed >= 0, keys, True, row, 16)
                        _write_salient(exp_avg_sq, state_here, count, v, floor, seed >= 0, keys, True, row, 0)
                    if weight_is_bf16:
                        by_chance = seed >= 0 and master == 0
                        _write_salient(weight, here, count, w, floor, by_chance, keys, False, row, 16)
                    elif master != 0:
                        single = advance(float32_at(weight), here)
                        for k in range(count):
                            single[k] = w[k] if floor[k] >= 0 else single[k]


@njit(forceinline=True)
def _gather(source, is_bf16, start, places, lines, count, buffer):
    """Numbers of some columns of a row, as fp32; overwrites up to a line more of the buffer."""
    half, single = advance(uint16_at(source), start), advance(float32_at(source), start)
    if is_bf16:
        for k in range(count):
            buffer[k] = float_of(half[places[k]])
    elif _COMPRESSES and lines[0] >= 0:  # rows shorter than a line have none
        line, k = 0, 0
        while k < count:
            bits = lines[line]
            _compress(advance(single, bits >> 16), advance(buffer, k), bits)
            k += bits_set(bits & 0xFFFF)
            line += 1
    else:
        for k in range(count):
            buffer[k] = single[places[k]]


@njit(forceinline=True)
def _scatter(target, is_bf16, start, places, lines, count, numbers, by_chance, keys, row):
    """Writes numbers to some columns of a row."""
    half, single = advance(uint16_at(target), start), advance(float32_at(target), start)
    if by_chance:
        for k in range(count):
            half[places[k]] = bf16_by_chance(numbers[k], uint32(_hash(uint32(keys[k] ^ uint32(row))) >> uint32(16)))
    elif is_bf16:
        for k in range(count):
            half[places[k]] = bf16_of(numbers[k])
    elif _COMPRESSES and lines[0] >= 0:
        line, k = 0, 0
        while k < count:
            bits = lines[line]
            _expand(advance(numbers, k), advance(single, bits >> 16), bits)
            k += bits_set(bits & 0xFFFF)
            line += 1
    else:
        for k in range(count):
            single[places[k]] = numbers[k]


@compile_kernel
def gathered_columns(args):
    """As `columns`, where the states hold the salient columns only: what else is whole, is picked row by row."""
    addresses, sizes, scalars, count_of_weights = int64_at(args[2]), int64_at(args[3]), float64_at(args[4]), args[6]
    weight_is_bf16, grad_is_bf16, moment_is_bf16, has_master, seed = args[7], args[8], args[9], args[10], args[12]
    decay, weight1, beta2, weight2 = _constants(scalars)
    divisor, sign = float32(scalars[5]), float32(scalars[6])
    scratch = np.empty(4 * _BLOCK, np.float32)
    gathered = scratch.ctypes.data + 4 * _BLOCK
    w_buffer, g_buffer = float32_at(scratch.ctypes.data), float32_at(gathered)
    m_buffer, v_buffer = advance(w_buffer, 2 * _BLOCK), advance(w_buffer, 3 * _BLOCK)
    number = 0
    while True:
        task = next_task(args)
        if task >= args[1]:
            break
        number = _weight_of(task, number, count_of_weights, sizes)
        size, at = advance(sizes, number * _WORDS), advance(addresses, number)
        N, S, weight_stride, grad_stride, compact_grad = size[0], size[2], size[3], size[4], size[5]
        weight, grad, index = at[0], at[count_of_weights], int64_at(at[2 * count_of_weights])
        exp_avg, exp_avg_sq = at[3 * count_of_weights], at[4 * count_of_weights]
        master = at[6 * count_of_weights] if has_master else 0
        first, empty = (task - size[6]) * size[7], 0
        while empty < S and index[empty] == -1:
            empty += 1
        lines = int64_at(args[5] + 8 * (size[8] + 3 * S // 2 + 1))
        for row in range(first, min(first + size[7], N)):
            for s0 in range(empty, S, _GROUP):
                count, here, state_here = min(_GROUP, S - s0), row * weight_stride, row * S + s0
                places, own_lines = advance(index, s0), advance(lines, s0)
                step_size = float32_at(args[5] + 8 * size[8] + 4 * s0)
                floor, keys = advance(step_size, S), uint32_at(args[5] + 8 * size[8] + 8 * S + 4 * s0)
                if compact_grad:
                    g = _read(grad, grad_is_bf16, row * grad_stride + s0, count, g_buffer, divisor, sign)
                else:
                    _gather(grad, grad_is_bf16, row * grad_stride, places, own_lines, count, g_buffer)
                    g = _read(gathered, 0, 0, count, g_buffer, divisor, sign)
                if master != 0:
                    w = advance(float32_at(master), state_here)
                else:
                    _gather(weight, weight_is_bf16, here, places, own_lines, count, w_buffer)
                    w = w_buffer
                m = _read(exp_avg, moment_is_bf16, state_here, count, m_buffer, float32(0.0), float32(1.0))
                v = _read(exp_avg_sq, moment_is_bf16, state_here, count, v_buffer, float32(0.0), float32(1.0))
                k = 0
                while k + _LINE <= count:
                    _masked_line(
                        advance(w, k), advance(g, k), advance(m, k), advance(v, k),
                        advance(step_size, k), advance(floor, k), decay, weight1, beta2, weight2,
                    )  # fmt: skip
                    k += _LINE
                while k < count:
                    _masked_single(
                        advance(w, k), advance(g, k), advance(m, k), advance(v, k),
                        advance(step_size, k), advance(floor, k), decay, weight1, beta2, weight2,
                    )  # fmt: skip
                    k += 1
                if moment_is_bf16:
                    _write_salient(exp_avg, state_here, count, m, floor, seed >= 0, keys, True, row, 16)
                    _write_salient(exp_avg_sq, state_here, count, v, floor, seed >= 0, keys, True, row, 0)
                by_chance = seed >= 0 and weight_is_bf16 and master == 0
                _scatter(weight, weight_is_bf16, here, places, own_lines, count, w, by_chance, keys, row)
