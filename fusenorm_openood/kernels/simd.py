# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""SIMD vectors of LANES numbers in numba, explicit rather than left to LLVM's vectoriser.

A vector is a numba type of its own, for int32 (``I32``), float32 (``F32``), float64 (``F64``) or
truth values (``MASK``), and one LLVM vector in compiled code; LLVM splits it where a register holds
fewer lanes. Arithmetic works lane by lane on two vectors of one type. A comparison gives a mask,
for `where`. ``load`` and ``store`` move vectors between registers and arrays:

    a = as_float(load(array, at))          # array[at : at + LANES], int32 bits read as float32
    kept = where(a > every(limit), a, every(np.float32(0)))
    store(array, at, as_bits(kept))

Each function is a numba intrinsic: a rule for its type, and one that emits LLVM instructions.
"""

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
BLOCK = 8  # rows and columns that `transpose` exchanges: as many as fit in registers


class Vector(types.Type):
    """LANES numbers of one type."""

    def __init__(self, element, element_ir):
        self.element, self.ir = element, ir.VectorType(element_ir, LANES)
        super().__init__(f"{element}x{LANES}")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.ir)


I32 = Vector(types.int32, ir.IntType(32))
F32 = Vector(types.float32, ir.FloatType())
F64 = Vector(types.float64, ir.DoubleType())
MASK = Vector(types.boolean, ir.IntType(1))
_VECTORS = {vector.element: vector for vector in (I32, F32, F64)}
_INDEX, _BYTES = ir.IntType(32), ir.IntType(8).as_pointer()


# A function of one, two or three vectors or numbers, from the type of its result and what it emits.


def _unary(result, emit):
    return intrinsic(lambda context, a: _emitting(result(a)(a), emit))


def _binary(result, emit):
    return intrinsic(lambda context, a, b: _emitting(result(a)(a, b), emit))


def _ternary(result, emit):
    return intrinsic(lambda context, a, b, c: _emitting(result(b)(a, b, c), emit))


def _emitting(signature, emit):
    return signature, lambda context, builder, signature, given: emit(builder, *given)


def _same(a):
    return a


def _element(a):
    return a.element


def _overload(symbol, emit, kinds, result=_same):
    """Overload a Python operator for two vectors of one of these types."""
    operation = _binary(result, emit)

    @overload(symbol)
    def overloaded(a, b):
        return (lambda a, b: operation(a, b)) if a == b and a in kinds else None


def _comparison(sign):
    def emit(builder, a, b):
        integers = isinstance(a.type.element, ir.IntType)
        return (builder.icmp_signed if integers else builder.fcmp_ordered)(sign, a, b)

    return emit


for _name in ("add", "sub", "mul"):
    _overload(getattr(operator, _name), getattr(ir.IRBuilder, _name), (I32,))
    _overload(getattr(operator, _name), getattr(ir.IRBuilder, f"f{_name}"), (F32, F64))
_overload(operator.truediv, ir.IRBuilder.fdiv, (F32, F64))
_overload(operator.rshift, ir.IRBuilder.ashr, (I32,))
_overload(operator.and_, ir.IRBuilder.and_, (I32, MASK))
_overload(operator.or_, ir.IRBuilder.or_, (I32,))
for _name, _sign in {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "=="}.items():
    _overload(getattr(operator, _name), _comparison(_sign), (I32, F32, F64), lambda a: MASK)


def _llvm(name, builder, result, *arguments, suffix=None, fastmath=()):
    """Call one of LLVM's intrinsics, by default the one for vectors like the last argument."""
    suffix = suffix or f"v{LANES}{arguments[-1].type.element.intrinsic_name}"
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.declare_intrinsic(f"llvm.{name}.{suffix}", (), kind)
    return builder.call(function, arguments, fastmath=fastmath)


def _lanewise(name):
    return lambda builder, *given: _llvm(name, builder, given[0].type, *given)


def _bitcast(to):
    def emit(builder, a):
        return builder.bitcast(a, to.ir if isinstance(a.type, ir.VectorType) else to.ir.element)

    return emit


def _sum(builder, a):
    element = a.type.element
    if a.type == I32.ir:
        return _llvm("vector.reduce.add", builder, element, a)
    start = ir.Constant(element, -0.0)
    return _llvm("vector.reduce.fadd", builder, element, start, a, fastmath=("reassoc",))


def _any(builder, a):
    bits = builder.bitcast(a, ir.IntType(LANES))
    return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


def _splat(builder, a, lanes=LANES):
    none = ir.Constant(ir.VectorType(a.type, lanes), ir.Undefined)
    first = builder.insert_element(none, a, _INDEX(0))
    return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(_INDEX, lanes), None))


# every(a): a vector with the number a in every lane.
every = _unary(lambda a: _VECTORS[a], _splat)
# Over all lanes: the sum, the largest (of integers), whether a mask is true in any.
lane_sum = _unary(_element, _sum)
lane_max = _unary(
    _element, lambda builder, a: _llvm("vector.reduce.smax", builder, a.type.element, a)
)
in_any_lane = _unary(_element, _any)

# where(mask, a, b): a where the mask is true, else b. holds(mask): -1 where it is true, else 0.
where = _ternary(_same, ir.IRBuilder.select)
holds = _unary(lambda a: I32, lambda builder, a: builder.sext(a, I32.ir))
# The larger and the smaller of two integers, lane by lane.
larger = _binary(_same, lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
smaller = _binary(_same, lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
# fma(a, b, c): a b + c, rounded once.
fma = _ternary(_same, _lanewise("fma"))
sqrt = _unary(_same, _lanewise("sqrt"))

# The float32 that a bit pattern stands for, and back; of vectors and of single numbers.
as_float = _unary(lambda a: F32 if a == I32 else types.float32, _bitcast(F32))
as_bits = _unary(lambda a: I32 if a == F32 else types.int32, _bitcast(I32))
# The same value in another type: int32 to float32, float32 to float64 and back.
to_float = _unary(lambda a: F32, lambda builder, a: builder.sitofp(a, F32.ir))
to_double = _unary(lambda a: F64, lambda builder, a: builder.fpext(a, F64.ir))
to_single = _unary(lambda a: F32, lambda builder, a: builder.fptrunc(a, F32.ir))

# pointer_to(address): a pointer to what is there.
pointer_to = _unary(lambda a: types.voidptr, lambda builder, a: builder.inttoptr(a, _BYTES))


def _prefetch(builder, address):
    how = _INDEX(0), _INDEX(3), _INDEX(1)  # read, to the nearest cache, data
    _llvm(
        "prefetch", builder, ir.VoidType(), builder.inttoptr(address, _BYTES), *how, suffix="p0i8"
    )
    return ir.Constant(_BYTES, None)  # numba's none


# prefetch(address): ask for the memory there to be brought to the cache; any address is allowed.
prefetch = _unary(lambda a: types.none, _prefetch)


def _place(context, builder, array, value, at):
    """A pointer to the number ``value[at]`` of an array of this type."""
    return builder.gep(context.make_array(array)(context, builder, value).data, [at])


@intrinsic
def fetch_add(context, array, more):
    """The first number of an array; ``more`` is added to it atomically."""

    def build(context, builder, signature, given):
        first = _place(context, builder, array, given[0], _INDEX(0))
        return builder.atomic_rmw("add", first, given[1], "monotonic")

    return array.dtype(array, array.dtype), build


@intrinsic
def load(context, array, at):
    """The vector ``array[at : at + LANES]``; the array is not checked to be that long."""
    vector = _VECTORS[array.dtype]

    def build(context, builder, signature, given):
        place = _place(context, builder, array, *given)
        place = builder.bitcast(place, vector.ir.as_pointer())
        return builder.load(place, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), build


@intrinsic
def store(context, array, at, vector):
    """Write a vector to ``array[at : at + LANES]``; the array is not checked to be that long."""

    def build(context, builder, signature, given):
        place = _place(context, builder, array, *given[:2])
        place = builder.bitcast(place, vector.ir.as_pointer())
        builder.store(given[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), build


@intrinsic
def transpose(context, source, at, stride, target, to, mask):
    """Copy a block of BLOCK x BLOCK integers, transposed and with a bit mask applied.

    ``target[to + i * LANES + j] = source[at + j * stride + i] & mask`` for i, j < BLOCK.
    """
    vector, intp = ir.VectorType(ir.IntType(32), BLOCK), ir.IntType(64)

    def build(context, builder, signature, given):
        def place(array, value, first, step):
            at = _place(context, builder, array, value, builder.add(first, step))
            return builder.bitcast(at, vector.as_pointer())

        read, at, stride, written, to, mask = given
        steps = [builder.mul(stride, intp(n)) for n in range(BLOCK)]
        rows = [builder.load(place(source, read, at, step), align=4) for step in steps]
        distance = BLOCK // 2
        while distance:  # exchange the two off-diagonal blocks of that size
            for n in range(BLOCK):
                if not n & distance:
                    a, b = rows[n], rows[n + distance]
                    ours = [BLOCK + i - distance if i & distance else i for i in range(BLOCK)]
                    theirs = [BLOCK + i if i & distance else i + distance for i in range(BLOCK)]
                    rows[n] = builder.shuffle_vector(a, b, ir.Constant(vector, ours))
                    rows[n + distance] = builder.shuffle_vector(a, b, ir.Constant(vector, theirs))
            distance //= 2
        bits = _splat(builder, mask, BLOCK)
        for n, row in enumerate(rows):
            column = place(target, written, to, intp(n * LANES))
            builder.store(builder.and_(row, bits), column, align=4)
        return context.get_dummy_value()

    return types.none(source, types.int64, types.int64, target, types.int64, types.int32), build
