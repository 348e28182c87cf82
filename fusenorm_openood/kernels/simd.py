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
_NAMES = {I32: "i32", F32: "f32", F64: "f64"}


# An operation of one, two or three arguments: the type of its result, and how to emit it.


def _unary(result, emit):
    @intrinsic
    def operation(context, a):
        return result(a)(a), lambda context, builder, signature, given: emit(builder, *given)

    return operation


def _binary(result, emit):
    @intrinsic
    def operation(context, a, b):
        return result(a)(a, b), lambda context, builder, signature, given: emit(builder, *given)

    return operation


def _ternary(result, emit):
    @intrinsic
    def operation(context, a, b, c):
        return result(b)(a, b, c), lambda context, builder, signature, given: emit(builder, *given)

    return operation


def _same(a):
    return a


def _element(a):
    return a.element


def _define(symbol, emit, kinds, result=_same):
    """Overload a Python operator for vectors of some types."""
    operation = _binary(result, emit)

    @overload(symbol)
    def overloaded(a, b):
        return (lambda a, b: operation(a, b)) if a == b and a in kinds else None


def _comparison(sign):
    def emit(builder, a, b):
        integers = isinstance(a.type.element, ir.IntType)
        return (builder.icmp_signed if integers else builder.fcmp_ordered)(sign, a, b)

    return emit


for _symbol, _for_integers, _for_floats in (
    (operator.add, ir.IRBuilder.add, ir.IRBuilder.fadd),
    (operator.sub, ir.IRBuilder.sub, ir.IRBuilder.fsub),
    (operator.mul, ir.IRBuilder.mul, ir.IRBuilder.fmul),
):
    _define(_symbol, _for_integers, (I32,))
    _define(_symbol, _for_floats, (F32, F64))
_define(operator.truediv, ir.IRBuilder.fdiv, (F32, F64))
_define(operator.rshift, ir.IRBuilder.ashr, (I32,))
_define(operator.and_, ir.IRBuilder.and_, (I32, MASK))
_define(operator.or_, ir.IRBuilder.or_, (I32,))
for _symbol, _sign in ((operator.gt, ">"), (operator.lt, "<"), (operator.ge, ">="),
                       (operator.le, "<="), (operator.eq, "==")):  # fmt: skip
    _define(_symbol, _comparison(_sign), (I32, F32, F64), lambda a: MASK)


def _llvm(builder, name, result, arguments, fastmath=()):
    """Call one of LLVM's intrinsics."""
    found = builder.module.globals.get(name)
    if found is None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        found = ir.Function(builder.module, kind, name)
    return builder.call(found, arguments, fastmath=fastmath)


def _lanewise(name):
    def emit(builder, *arguments):
        element = "f32" if arguments[0].type == F32.ir else "f64"
        return _llvm(builder, f"llvm.{name}.v{LANES}{element}", arguments[0].type, arguments)

    return emit


def _bitcast(to):
    def emit(builder, a):
        return builder.bitcast(a, to.ir if isinstance(a.type, ir.VectorType) else to.ir.element)

    return emit


def _sum(builder, a):
    if a.type == I32.ir:
        return _llvm(builder, f"llvm.vector.reduce.add.v{LANES}i32", a.type.element, [a])
    element = "f32" if a.type == F32.ir else "f64"
    name, start = f"llvm.vector.reduce.fadd.v{LANES}{element}", ir.Constant(a.type.element, -0.0)
    return _llvm(builder, name, a.type.element, [start, a], fastmath=("reassoc",))


def _any(builder, a):
    bits = builder.bitcast(a, ir.IntType(LANES))
    return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


def _splat(builder, a):
    vector = ir.VectorType(a.type, LANES)
    none, index = ir.Constant(vector, ir.Undefined), ir.IntType(32)
    first = builder.insert_element(none, a, index(0))
    return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(index, LANES), None))


# every(a): a vector with the number a in every lane.
every = _unary(lambda a: _VECTORS[a], _splat)
# Over all lanes: the sum, the largest (of integers), whether a mask is true in any.
lane_sum = _unary(_element, _sum)
lane_max = _unary(
    _element,
    lambda b, a: _llvm(b, f"llvm.vector.reduce.smax.v{LANES}i32", a.type.element, [a]),
)
in_any_lane = _unary(_element, _any)

# where(mask, a, b): a where the mask is true, else b. holds(mask): -1 where it is true, else 0.
where = _ternary(_same, ir.IRBuilder.select)
holds = _unary(lambda a: I32, lambda b, a: b.sext(a, I32.ir))
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
to_float = _unary(lambda a: F32, lambda b, a: b.sitofp(a, F32.ir))
to_double = _unary(lambda a: F64, lambda b, a: b.fpext(a, F64.ir))
to_single = _unary(lambda a: F32, lambda b, a: b.fptrunc(a, F32.ir))


def _at(context, builder, signature, number, given, vector):
    """A pointer to a vector in an array: argument ``number``, at the index in the next argument."""
    data = context.make_array(signature.args[number])(context, builder, given[number]).data
    return builder.bitcast(builder.gep(data, [given[number + 1]]), vector.as_pointer())


@intrinsic
def load(context, array, at):
    """The vector ``array[at : at + LANES]``; the array is not checked to be that long."""
    vector = _VECTORS[array.dtype]

    def build(context, builder, signature, given):
        loaded = builder.load(_at(context, builder, signature, 0, given, vector.ir))
        loaded.align = array.dtype.bitwidth // 8
        return loaded

    return vector(array, types.intp), build


@intrinsic
def store(context, array, at, vector):
    """Write a vector to ``array[at : at + LANES]``; the array is not checked to be that long."""

    def build(context, builder, signature, given):
        place = _at(context, builder, signature, 0, given, vector.ir)
        builder.store(given[2], place).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), build


@intrinsic
def transpose(context, source, at, stride, target, to, mask):
    """Copy a block of BLOCK x BLOCK integers, transposed and with a bit mask applied.

    ``target[to + i * LANES + j] = source[at + j * stride + i] & mask`` for i, j < BLOCK.
    """
    vector, intp = ir.VectorType(ir.IntType(32), BLOCK), ir.IntType(64)

    def build(context, builder, signature, given):
        def place(number, step):
            index = builder.add(given[number + 1], step)
            moved = {number: given[number], number + 1: index}
            return _at(context, builder, signature, number, moved, vector)

        rows = []
        for n in range(BLOCK):
            rows.append(builder.load(place(0, builder.mul(given[2], intp(n)))))
            rows[-1].align = 4
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
        none = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(none, given[5], ir.IntType(32)(0))
        kept = builder.shuffle_vector(first, none, ir.Constant(vector, None))
        for n, row in enumerate(rows):
            builder.store(builder.and_(row, kept), place(3, intp(n * LANES))).align = 4
        return context.get_dummy_value()

    return types.none(source, types.int64, types.int64, target, types.int64, types.int32), build


@intrinsic
def prefetch(context, address):
    """Ask for the memory at an address to be brought to the cache; any address is allowed."""

    def build(context, builder, signature, given):
        number, pointer = ir.IntType(32), builder.inttoptr(given[0], ir.IntType(8).as_pointer())
        arguments = [pointer, number(0), number(3), number(1)]  # read, to the nearest cache, data
        _llvm(builder, "llvm.prefetch.p0i8", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.none(types.intp), build


@intrinsic
def pointer_to(context, address):
    """A pointer to what is at an address."""

    def build(context, builder, signature, given):
        return builder.inttoptr(given[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), build


@intrinsic
def fetch_add(context, array, more):
    """The first number of an array; ``more`` is added to it atomically."""

    def build(context, builder, signature, given):
        data = context.make_array(array)(context, builder, given[0]).data
        return builder.atomic_rmw("add", data, given[1], "monotonic")

    return array.dtype(array, array.dtype), build
