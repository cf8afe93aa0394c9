"""What numba has no word for: raw addresses, bit casts, an atomic counter, and a few operations on whole vectors."""

from llvmlite import ir
from llvmlite.binding import initialize_native_asmparser
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_I32 = ir.IntType(32)
_F32 = ir.FloatType()
_BYTES = ir.IntType(8).as_pointer()


@intrinsic
def next_task(typingctx, counter):
    """The value of an int64 counter, which it raises by one: no two threads get the same.

    Who gets a value sees what others wrote before they got theirs.
    """

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(counter), codegen


def _pointer(element):
    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return pointer


int32_at = _pointer(types.int32)
int64_at = _pointer(types.int64)
uint8_at = _pointer(types.uint8)
uint16_at = _pointer(types.uint16)
uint32_at = _pointer(types.uint32)
float32_at = _pointer(types.float32)
float64_at = _pointer(types.float64)


@intrinsic
def advance(typingctx, pointer, elements):
    """The pointer that many elements on."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


def _bytes(element):
    return element.width // 8 if isinstance(element, ir.IntType) else 4


def _load(builder, pointer, lanes):
    element = pointer.type.pointee
    vector = builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())
    return builder.load(vector, align=_bytes(element))


def _store(builder, value, pointer):
    target = builder.bitcast(pointer, value.type.as_pointer())
    builder.store(value, target, align=_bytes(pointer.type.pointee))


def _offset(builder, pointer, elements):
    return builder.gep(pointer, [ir.Constant(_I32, elements)])


def _masked(builder, pointers, keeps, lanes):
    """The bits that the keep masks leave of one vector of every token."""
    for pointer, keep in zip(pointers, keeps, strict=True):
        bits = _load(builder, pointer, lanes)
        first = builder.insert_element(ir.Constant(bits.type, ir.Undefined), keep, ir.Constant(_I32, 0))
        splat = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))
        yield builder.and_(bits, splat)


def prefetch_of(lanes):
    """Makes `f(pointer)`: asks for the cache lines of `lanes` elements, at any address, valid or not."""

    @intrinsic
    def prefetch(typingctx, pointer):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
            start = builder.bitcast(args[0], _BYTES)
            for offset in range(0, lanes * args[0].type.pointee.width // 8, 64):
                line = builder.gep(start, [ir.Constant(_I32, offset)])
                # To read (0), into the second-level cache (2), as data (1): the first one waits for few lines at once.
                builder.call(function, [line, *(ir.Constant(_I32, value) for value in (0, 2, 1))])
            return context.get_dummy_value()

        return types.void(pointer), codegen

    return prefetch


def _tree(builder, combine, values):
    values = list(values)
    while len(values) > 1:
        values = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def absmax_of_four(lanes):
    """Makes `f(acc, y0, y1, y2, y3, k0, k1, k2, k3)`: acc = max(acc, y & k), unsigned, over `lanes` channels."""

    @intrinsic
    def absmax(typingctx, acc, y0, y1, y2, y3, k0, k1, k2, k3):
        def codegen(context, builder, signature, args):
            def larger(a, b):
                return builder.select(builder.icmp_unsigned(">", a, b), a, b)

            new = _tree(builder, larger, _masked(builder, args[1:5], args[5:], lanes))
            _store(builder, larger(_load(builder, args[0], lanes), new), args[0])
            return context.get_dummy_value()

        return types.void(acc, y0, y1, y2, y3, k0, k1, k2, k3), codegen

    return absmax


def squares_of_four(lanes):
    """Makes `f(acc, y0, …, k3)`: acc += the squares of fp32 (or, from uint16, bf16) numbers, over `lanes` channels."""

    @intrinsic
    def squares(typingctx, acc, y0, y1, y2, y3, k0, k1, k2, k3):
        def codegen(context, builder, signature, args):
            def square(bits):
                if bits.type.element.width == 16:
                    wide = ir.VectorType(_I32, lanes)
                    bits = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * lanes))
                number = builder.bitcast(bits, ir.VectorType(_F32, lanes))
                return builder.fmul(number, number)

            new = _tree(builder, builder.fadd, map(square, _masked(builder, args[1:5], args[5:], lanes)))
            target = builder.bitcast(args[0], ir.VectorType(_F32, lanes).as_pointer())
            builder.store(builder.fadd(builder.load(target, align=4), new), target, align=4)
            return context.get_dummy_value()

        return types.void(acc, y0, y1, y2, y3, k0, k1, k2, k3), codegen

    return squares


def _call(builder, name, *args):
    """An LLVM intrinsic on vectors of fp32 numbers."""
    vector = args[0].type
    kind = ir.FunctionType(vector, [vector] * len(args))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{vector.count}f32")
    return builder.call(function, args)


def has(feature):
    """Whether the processor that is compiled for has something, by LLVM's name."""
    return f"+{feature}" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


def compresses():
    """Whether `compress_of` and `expand_of` may be used: what they are made of, AVX-512 alone has."""
    return has("avx512f")


def _pick(builder, name, numbers, rest, bits):
    """`numbers` moved together, or apart, where bits are set; `rest` where there are none."""
    vector, mask = numbers.type, ir.VectorType(ir.IntType(1), numbers.type.count)
    kind = ir.FunctionType(vector, [vector, vector, mask])
    function = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.x86.avx512.mask.{name}.v{numbers.type.count}f32"
    )
    chosen = builder.bitcast(builder.trunc(bits, ir.IntType(mask.count)), mask)
    return builder.call(function, [numbers, rest, chosen])


def compress_of(lanes):
    """Makes `f(source, target, bits)`: the numbers of a vector whose bits are set, side by side; writes all lanes."""

    @intrinsic
    def compress(typingctx, source, target, bits):
        def codegen(context, builder, signature, args):
            numbers = _load(builder, args[0], lanes)
            _store(builder, _pick(builder, "compress", numbers, numbers, args[2]), args[1])
            return context.get_dummy_value()

        return types.void(source, target, bits), codegen

    return compress


def expand_of(lanes):
    """Makes `f(source, target, bits)`: numbers side by side to the places whose bits are set; undoes `compress_of`."""

    @intrinsic
    def expand(typingctx, source, target, bits):
        def codegen(context, builder, signature, args):
            numbers, rest = (_load(builder, pointer, lanes) for pointer in args[:2])
            _store(builder, _pick(builder, "expand", numbers, rest, args[2]), args[1])
            return context.get_dummy_value()

        return types.void(source, target, bits), codegen

    return expand


@intrinsic
def interleave(typingctx, even, odd, target):
    """32 pairs of 16-bit numbers, one of each, from two rows."""

    def codegen(context, builder, signature, args):
        rows = [_load(builder, pointer, 32) for pointer in args[:2]]
        for first in (0, 16):
            order = [place for lane in range(first, first + 16) for place in (lane, 32 + lane)]
            pairs = builder.shuffle_vector(*rows, ir.Constant(ir.VectorType(_I32, 32), order))
            _store(builder, builder.bitcast(pairs, ir.VectorType(_I32, 16)), _offset(builder, args[2], first))
        return context.get_dummy_value()

    return types.void(even, odd, target), codegen


def products_of(rows):
    """Makes `f(left, right, pairs, tile)`: the fp32 tile [rows, 32] of products of bf16 numbers, summed over pairs.

    `left` is [pairs, rows] and `right` [pairs, 32], each word two numbers, as AVX512-BF16 takes them.
    """

    @intrinsic
    def products(typingctx, left, right, pairs, tile):
        def codegen(context, builder, signature, args):
            initialize_native_asmparser()
            left, right, pairs, tile = args
            words, numbers = ir.VectorType(_I32, 16), ir.VectorType(_F32, 16)
            zero = ir.Constant(numbers, None)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(rows)]
            kind = ir.FunctionType(numbers, [words, words, numbers])
            with cgutils.for_range(builder, pairs) as loop:
                of_left = builder.gep(left, [builder.mul(loop.index, ir.Constant(loop.index.type, rows))])
                of_right = builder.gep(right, [builder.mul(loop.index, ir.Constant(loop.index.type, 32))])
                vectors = [_load(builder, _offset(builder, of_right, first), 16) for first in (0, 16)]
                for row, own in enumerate(sums):
                    pair = builder.load(_offset(builder, of_left, row))
                    one = builder.insert_element(ir.Constant(words, ir.Undefined), pair, ir.Constant(_I32, 0))
                    splat = builder.shuffle_vector(one, one, ir.Constant(words, [0] * 16))
                    for place, vector in zip(own, vectors, strict=True):
                        args = [splat, vector, builder.load(place)]
                        # By its name: llvmlite has no type for the operands of LLVM's function.
                        builder.store(builder.asm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0", args, False), place)
            for row, own in enumerate(sums):
                for first, place in zip((0, 16), own, strict=True):
                    _store(builder, builder.load(place), _offset(builder, tile, 32 * row + first))
            return context.get_dummy_value()

        return types.void(left, right, pairs, tile), codegen

    return products


def adamw_of(lanes, masked):
    """Makes `f(w, g, m, v, step_size, floor, decay, weight1, beta2, weight2)`: AdamW on `lanes` neighbours.

    If `masked`, step sizes and floors are one an element, and an element whose floor is negative stays as it is; else
    they are numbers. A loop of so few elements would mostly test whether its operands overlap.
    """

    @intrinsic
    def adamw(typingctx, w, g, m, v, step_size, floor, decay, weight1, beta2, weight2):
        def codegen(context, builder, signature, args):
            def splat(value):
                first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
                return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))

            vector = ir.VectorType(_F32, lanes)
            w, g, m, v = (_load(builder, pointer, lanes) for pointer in args[:4])
            step_size, floor = (_load(builder, arg, lanes) if masked else splat(arg) for arg in args[4:6])
            decay, weight1, beta2, weight2 = map(splat, args[6:])
            # torch.lerp starts from the nearer end.
            near = builder.fcmp_ordered("<", weight1, ir.Constant(vector, [0.5] * lanes))
            share = builder.select(near, weight1, builder.fsub(weight1, ir.Constant(vector, [1.0] * lanes)))
            new_m = _call(builder, "fma", share, builder.fsub(g, m), builder.select(near, m, g))
            # ATen's products are contracted with the sums that take them.
            new_v = _call(builder, "fma", builder.fmul(weight2, g), g, builder.fmul(v, beta2))
            denominator = builder.fadd(_call(builder, "sqrt", new_v), floor)
            update = builder.fdiv(builder.fmul(new_m, step_size), denominator)
            new_w = builder.fsub(builder.fmul(w, decay), update)
            salient = builder.fcmp_ordered(">=", floor, ir.Constant(vector, [0.0] * lanes))
            for pointer, new, old in zip((args[0], args[2], args[3]), (new_w, new_m, new_v), (w, m, v), strict=True):
                _store(builder, builder.select(salient, new, old) if masked else new, pointer)
            return context.get_dummy_value()

        parameters = (w, g, m, v, step_size, floor, decay, weight1, beta2, weight2)
        return types.void(*parameters), codegen

    return adamw


@intrinsic
def bits_set(typingctx, word):
    """How many bits of an integer are 1."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return word(word), codegen


@intrinsic
def float_of(typingctx, bits):
    """The fp32 number of these bits: uint32 holds fp32, uint16 holds bf16."""

    def codegen(context, builder, signature, args):
        word = args[0]
        if signature.args[0] == types.uint16:
            word = builder.shl(builder.zext(word, _I32), ir.Constant(_I32, 16))
        return builder.bitcast(word, _F32)

    return types.float32(bits), codegen


def _word(value):
    return ir.Constant(_I32, value)


def _nearest_bf16(builder, number):
    bits = builder.bitcast(number, _I32)
    odd = builder.and_(builder.lshr(bits, _word(16)), _word(1))
    nearest = builder.lshr(builder.add(builder.add(bits, _word(0x7FFF)), odd), _word(16))
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.select(is_nan, _word(0x7FC0), nearest)


@intrinsic
def bf16_of(typingctx, number):
    """The bits of the bf16 number nearest to an fp32 number, ties to even."""

    def codegen(context, builder, signature, args):
        return builder.trunc(_nearest_bf16(builder, args[0]), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def bf16_by_chance(typingctx, number, bits):
    """The bits of a bf16 neighbour of an fp32 number: the upper one if the lower half of `bits` is too large."""

    def codegen(context, builder, signature, args):
        number = builder.bitcast(args[0], _I32)
        noise = builder.and_(args[1], _word(0xFFFF))
        exponent = _word(0x7F800000)
        is_finite = builder.icmp_unsigned("!=", builder.and_(number, exponent), exponent)
        drawn = builder.lshr(builder.add(number, noise), _word(16))
        chosen = builder.select(is_finite, drawn, _nearest_bf16(builder, args[0]))
        return builder.trunc(chosen, ir.IntType(16))

    return types.uint16(types.float32, types.uint32), codegen
