"""Pieces every row pattern shares: loads in fp32, the online softmax, and the arithmetic of zero times infinity.

A row of V columns is swept in tiles [ROLL, LANES, VEC]: a lane, which is a thread, holds ROLL vectors of VEC columns,
one access of up to 16 bytes each. The state of a sweep is one number a lane, so the loop has no exchange between
threads and no barrier; reductions after the loop fold the lanes. A row that does not start on a vector's boundary is
counted from the boundary before it (``Span``): all but the vectors at its two ends are whole, and moved in one access.

Logits are scaled by log2(e) / T, exponentials are powers of two of
differences to a running maximum, and logarithms are base 2 until they leave the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
# A running maximum starts at the lowest finite fp32, not at -inf: then no difference of two maxima is -inf minus -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
HIGHEST = tl.constexpr(3.4028234663852886e38)
# Triton 3.6 spills what a tile is split into.
SPLITS = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))
# The smallest normal fp32: GPUs flush what is below, some instructions sooner than others.
TINY = tl.constexpr(1.1754943508222875e-38)


class Row(NamedTuple):
    """The values of one row, see ``begin_row``. Never None: Triton 3.6 cannot return that in a tuple."""

    index: Any
    ignored: Any
    label: Any
    label_logit: Any
    scale: Any
    temperature: Any
    teacher_temperature: Any
    param: Any


class Span(NamedTuple):
    """The columns of a row, start up to stop, as pointers of ``grid_pointer`` count them."""

    start: Any
    stop: Any


if triton.knobs.runtime.interpret:

    @triton.jit
    def fast_log2(x):
        return tl.log2(x)

    @triton.jit
    def fast_exp2(x):
        return tl.exp2(x)

    @triton.jit
    def fast_reciprocal(x):
        return 1.0 / x

    @triton.jit
    def widen(x):
        return x.to(tl.float32)

    @triton.jit
    def wider_max(x, y):
        return tl.maximum(x.to(tl.float32), y.to(tl.float32))

    @triton.jit
    def add_product(total, weight, x):
        return tl.fma(weight, tl.where(weight == 0, 0.0, x), total)

    @triton.jit
    def step_of(x):
        return tl.minimum(tl.maximum(tl.fma(x, HIGHEST, 0.5), 0.0), 1.0)

else:

    def _on_cuda(semantic):
        return getattr(semantic.builder.options, "backend_name", None) == "cuda"

    def _inline(asm, constraints, args, dtype, pack, semantic):
        return tl.inline_asm_elementwise(asm, constraints, args, dtype, is_pure=True, pack=pack, _semantic=semantic)

    @tl.core.builtin
    def fast_log2(x, _semantic=None):
        """log2 of fp32 in one instruction on CUDA, where tl.log2 takes 35: more than the rest of a tile."""
        if not _on_cuda(_semantic):
            return tl.log2(x, _semantic=_semantic)
        return _inline("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, 1, _semantic)

    @tl.core.builtin
    def fast_exp2(x, _semantic=None):
        """exp2 of fp32 in one instruction on CUDA: tl.exp2 keeps subnormal results, at three more."""
        if not _on_cuda(_semantic):
            return tl.exp2(x, _semantic=_semantic)
        return _inline("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, 1, _semantic)

    @tl.core.builtin
    def fast_reciprocal(x, _semantic=None):
        """1 / x of a normal fp32 to one ulp, in one instruction on CUDA."""
        if not _on_cuda(_semantic):
            return _semantic.truediv(1.0, _semantic.to_tensor(x))
        return _inline("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, 1, _semantic)

    @tl.core.builtin
    def add_product(total, weight, x, _semantic=None):
        """total + weight * x, and total where the weight is 0 whatever x is: two instructions on CUDA, not three."""
        if not _on_cuda(_semantic):
            x = tl.where(_semantic.equal(weight, 0.0), 0.0, x, _semantic=_semantic)
            return tl.fma(weight, x, total, _semantic=_semantic)
        asm = "{.reg .pred p; setp.neu.f32 p, $2, 0f00000000; @p fma.rn.f32 $0, $2, $3, $0;}"
        return _inline(asm, "=f,0,f,f", [total, weight, x], tl.float32, 1, _semantic)

    @tl.core.builtin
    def step_of(x, _semantic=None):
        """1 where x is above 0, 0 where it is below or NaN, a half where it is 0: in one instruction on CUDA."""
        if not _on_cuda(_semantic):
            x = tl.fma(x, HIGHEST, 0.5, _semantic=_semantic)
            return _semantic.minimum(
                _semantic.maximum(x, _semantic.to_tensor(0.0), tl.core.PropagateNan.NONE),
                _semantic.to_tensor(1.0),
                tl.core.PropagateNan.NONE,
            )
        return _inline("fma.rn.ftz.sat.f32 $0, $1, 0f7F7FFFFF, 0f3F000000;", "=f,f", [x], tl.float32, 1, _semantic)

    @tl.core.builtin
    def widen(x, _semantic=None):
        """To fp32; a pair of bf16 in two instructions on CUDA, where the compiler takes three."""
        if x.dtype != tl.bfloat16 or not _on_cuda(_semantic):
            return _semantic.cast(x, tl.float32)
        asm = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return _inline(asm, "=r,=r,r", [x], tl.float32, 2, _semantic)

    @tl.core.builtin
    def wider_max(x, y, _semantic=None):
        """Maximum of two blocks of one dtype, two columns at a time where that is 16 bits; a NaN loses."""
        if x.dtype.primitive_bitwidth != 16 or not _on_cuda(_semantic):
            return _semantic.maximum(
                _semantic.cast(x, tl.float32), _semantic.cast(y, tl.float32), tl.core.PropagateNan.NONE
            )
        kind = "bf16x2" if x.dtype == tl.bfloat16 else "f16x2"
        return _inline(f"max.{kind} $0, $1, $2;", "=r,r,r", [x, y], x.dtype, 2, _semantic)


@triton.jit
def fast_log(x):
    """Natural logarithm of a block of probabilities, finite also where they underflow."""
    return fast_log2(tl.maximum(x, TINY, propagate_nan=tl.PropagateNan.ALL)) * LN2


@triton.jit
def mul0(weight, x):
    """weight * x, and 0 where the weight is 0 whatever x is: a term of probability 0 counts nothing, not 0 * inf."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def combine(CX: tl.constexpr, x, CY: tl.constexpr, y):
    """CX * x + CY * y without the term whose coefficient is 0, which may be infinite."""
    if CX == 0:
        r = CY * y
    elif CY == 0:
        r = CX * x
    else:
        r = CX * x + CY * y
    return r


@triton.jit
def mix_logs(C_P: tl.constexpr, x, C_Q: tl.constexpr, y, ratio):
    """C_P * x + C_Q * ratio * y of the teacher's and the student's logits less their maxima.

    In units of the teacher's temperature, ratio being the teacher's over the student's: exactly x - y where both are
    one, and no product that overflows before the logits do.
    """
    if C_P == 0:
        r = (C_Q * ratio) * y
    elif C_Q == 0:
        r = C_P * x
    else:
        r = tl.fma(y, C_Q * ratio, C_P * x)
    return r


@triton.jit
def log_ratio(x, y):
    """log(x / y) of two positive numbers, exact to its last bits where they are near each other."""
    a = (x - y) * fast_reciprocal(x + y)
    b = a * a
    near = tl.fma(a * b, tl.fma(b, tl.fma(b, 2.0 / 7.0, 0.4), 2.0 / 3.0), a + a)
    return tl.where(b < 1.0 / 256.0, near, fast_log2(x * fast_reciprocal(y)) * LN2)


@triton.jit
def reciprocal(x):
    """1 / x of one number to the last bit or so; three instructions on CUDA, where a division takes eight."""
    r = fast_reciprocal(x)
    return tl.fma(tl.fma(-x, r, 1.0), r, r)


@triton.jit
def temper(temperature, teacher_temperature):
    """1 / T, 1 / T_t, and T_t / T, which is exactly 1 where they are equal."""
    unit_s = reciprocal(temperature)
    unit_t = reciprocal(teacher_temperature)
    return unit_s, unit_t, tl.where(temperature == teacher_temperature, 1.0, teacher_temperature * unit_s)


@triton.jit
def row_offset(row, L, stride_b, stride_l):
    """Offset in elements of row b * L + l of a [B, L, V] tensor; int64, since N * V passes 2**31.

    L is None where rows lie stride_l apart throughout: an integer division is 20 instructions.
    """
    if L is None:
        offset = row.to(tl.int64) * stride_l
    else:
        offset = (row // L).to(tl.int64) * stride_b + (row % L).to(tl.int64) * stride_l
    return offset


@triton.jit
def row_pointer(logits, L):
    """The first element of this program's row."""
    return logits.ptr + row_offset(tl.program_id(0), L, logits.stride_b, logits.stride_l)


@triton.jit
def row_skew(logits, index, L, TILE: tl.constexpr):
    """Columns by which a row starts after a vector's boundary, in all tensors alike: ``arguments.vectors``."""
    if TILE[3]:
        COLUMN: tl.constexpr = logits.ptr.dtype.element_ty.primitive_bitwidth // 8
        row_ptr = logits.ptr + row_offset(index, L, logits.stride_b, logits.stride_l)
        skew = (row_ptr.to(tl.int64) // COLUMN % TILE[2]).to(tl.int32)
    else:
        skew = 0
    return skew


@triton.jit
def grid_pointer(logits, index, skew, L, TILE: tl.constexpr):
    """A row from the vector's boundary at or before its first element, and known to be on one."""
    VECTOR: tl.constexpr = TILE[2] * (logits.ptr.dtype.element_ty.primitive_bitwidth // 8)
    row_ptr = logits.ptr + (row_offset(index, L, logits.stride_b, logits.stride_l) - skew)
    if len(index.shape) == 3:
        row_ptr = tl.multiple_of(row_ptr, [VECTOR, VECTOR, VECTOR])
    else:
        row_ptr = tl.multiple_of(row_ptr, VECTOR)
    return row_ptr


@triton.jit
def end_of(skew, V, TILE: tl.constexpr):
    """The end of V columns on the grid. Without ends that are cut V is a multiple of VEC, and known to be one."""
    if TILE[3]:
        end = V + skew
    else:
        end = V // TILE[2] * TILE[2]
    return end


@triton.jit
def inside(offs_v, span):
    return (offs_v >= span.start) & (offs_v < span.stop)


@triton.jit
def load_vectors(row_ptr, start, heads, at_end, span, TILE: tl.constexpr, INNER: tl.constexpr = False):
    """The vectors that begin at start + heads [.., 1], of the row's dtype, -inf outside the row.

    at_end: whether the row's ends may cut one of them; only then are there accesses column by column. INNER: all of
    them lie in the row.
    """
    offs_v = heads + tl.arange(0, TILE[2])
    ptrs = row_ptr + start + offs_v
    if INNER:
        x = tl.load(ptrs)
    elif TILE[3]:
        whole = (heads >= span.start - start) & (heads <= span.stop - start - TILE[2])
        x = tl.load(ptrs, mask=whole, other=NEG_INF)
        if at_end:
            cut = (offs_v >= span.start - start) & (offs_v < span.stop - start) & (whole == 0)
            x = tl.where(whole, x, tl.load(ptrs, mask=cut, other=NEG_INF))
    else:
        x = tl.load(ptrs, mask=heads < span.stop - start, other=NEG_INF)
    return x


@triton.jit
def store_vectors(row_ptr, start, heads, at_end, span, x, TILE: tl.constexpr, INNER: tl.constexpr = False):
    """Round and store vectors of the row, as ``load_vectors`` loads them."""
    offs_v = heads + tl.arange(0, TILE[2])
    ptrs = row_ptr + start + offs_v
    x = x.to(row_ptr.dtype.element_ty)
    if INNER:
        tl.store(ptrs, x)
    elif TILE[3]:
        whole = (heads >= span.start - start) & (heads <= span.stop - start - TILE[2])
        tl.store(ptrs, x, mask=whole)
        if at_end:
            cut = (offs_v >= span.start - start) & (offs_v < span.stop - start) & (whole == 0)
            tl.store(ptrs, x, mask=cut)
    else:
        tl.store(ptrs, x, mask=heads < span.stop - start)


@triton.jit
def tile_heads(TILE: tl.constexpr):
    """The first columns of a tile's vectors [ROLL, LANES, 1]."""
    ROLL: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    lane = tl.arange(0, LANES)[None, :, None] * VEC
    return tl.arange(0, ROLL)[:, None, None] * (LANES * VEC) + lane


@triton.jit
def is_at_end(start, span, TILE: tl.constexpr):
    """True if the tile from start on has an end of the row in it."""
    return (start < span.start) | (start + TILE[0] * TILE[1] * TILE[2] > span.stop)


@triton.jit
def load_tile(row_ptr, start, span, TILE: tl.constexpr, PART: tl.constexpr = 0):
    """One tile of a row, in the row's dtype and -inf outside it.

    PART: of the sweep; see ``parts``.
    """
    return load_vectors(row_ptr, start, tile_heads(TILE), True, span, TILE, TILE[3] and PART == 1)


@triton.jit
def empty_tile(row_ptr, TILE: tl.constexpr):
    """The start of a loop that loads tiles."""
    ROLL: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    return tl.zeros([ROLL, LANES, VEC], row_ptr.dtype.element_ty)


@triton.jit
def store_tile(row_ptr, start, span, x, TILE: tl.constexpr):
    store_vectors(row_ptr, start, tile_heads(TILE), is_at_end(start, span, TILE), span, x, TILE)


# A sweep goes over a row's tiles in up to three loops, so that each compiles to what it needs and no more. PART 0 is
# the first tile where it is KEPT from the sweep before, PART 1 the others, of a row whose ends cut vectors but for
# those at the ends, and PART 2 those.
@triton.constexpr_function
def parts(TILE):
    return 3 if TILE[3] else 2


@triton.jit
def part_begin(num_tiles, PART: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr):
    if PART == 2 and KEPT:
        begin = tl.maximum(num_tiles - 1, 1)
    elif PART == 1 and (KEPT or TILE[3]):
        begin = 1
    else:
        begin = 0
    return begin


@triton.jit
def part_end(num_tiles, PART: tl.constexpr, TILE: tl.constexpr):
    if PART == 0:
        end = 1
    elif TILE[3] and PART == 1:
        end = num_tiles - 1
    else:
        end = num_tiles
    return end


@triton.jit
def part_step(num_tiles, PART: tl.constexpr, KEPT: tl.constexpr):
    if PART == 2 and not KEPT:
        step = tl.maximum(num_tiles - 1, 1)
    else:
        step = 1
    return step


@triton.jit
def zero_tiles(row_ptr, span, TILE: tl.constexpr):
    """Zeros in the columns of span."""
    zeros = empty_tile(row_ptr, TILE)
    for start in range(span.start // TILE[2] * TILE[2], span.stop, TILE[0] * TILE[1] * TILE[2]):
        store_tile(row_ptr, start, span, zeros, TILE)


@triton.jit
def logits_of(x, offs_v, span, softcap, PROBS: tl.constexpr):
    """Logits in fp32 of what was loaded; PROBS: of probabilities."""
    x = widen(x)
    if PROBS:
        x = tl.log2(x) * LN2
    if softcap is not None:
        x = soft_cap(x, softcap)
    if softcap is not None or PROBS:
        x = tl.where(inside(offs_v, span), x, NEG_INF)
    return x


@triton.jit
def load_label(row_ptr, label, span, softcap):
    """The label's logit; a label out of range reads nothing and gives NaN."""
    column = span.start + label
    x = tl.load(row_ptr + column, mask=(label >= 0) & (column < span.stop), other=float("nan")).to(tl.float32)
    if softcap is not None:
        x = soft_cap(x, softcap)
    return x


@triton.jit
def begin_row(
    student_ptr,
    dstudent_ptr,
    rows,
    index,
    span,
    pad_stop,
    ignore_index,
    scale,
    TILE: tl.constexpr,
    temperature=1.0,
    teacher_temperature=1.0,
    param=0.0,
    softcap=None,
    exists=None,
    LABEL_LOGIT: tl.constexpr = False,
    NUM_STATS: tl.constexpr = 0,
):
    """The prologue of every row pattern: this program's row, see ``Row``; zeros in its outputs if its label is ignored.

    The kernel then has to return. dstudent_ptr is None without a gradient; pad_stop is where its padding ends.
    The numbers given are those of all rows, which vectors of one value a row replace.

    A program of several rows gives the indices [ROWS, 1, 1] of all and says which exist, and zeros are left to it.
    """
    label = -1
    ignored = False
    if exists is not None:
        ignored = exists == 0
    if rows.labels is not None:
        label = tl.load(rows.labels + index, mask=exists)
        ignored = ignored | (label == ignore_index)
        if exists is None and ignored:
            if dstudent_ptr is not None:
                zero_tiles(dstudent_ptr, Span(span.start, pad_stop), TILE)
            tl.store(rows.loss + index, 0.0)
            if rows.stats is not None:
                for k in tl.static_range(NUM_STATS):
                    tl.store(rows.stats + index * NUM_STATS + k, 0.0)
    if rows.weight is not None:
        scale *= tl.load(rows.weight + index * rows.weight_stride, mask=exists)
    if rows.temperature is not None:
        temperature = tl.load(rows.temperature + index, mask=exists)
    if rows.teacher_temperature is not None:
        teacher_temperature = tl.load(rows.teacher_temperature + index, mask=exists)
    if rows.param is not None:
        param = tl.load(rows.param + index, mask=exists)
    label_logit = 0.0
    if LABEL_LOGIT:
        # An ignored row has no label to read: its zeros may lie in the student by now.
        label = tl.where(ignored, -1, label)
        label_logit = load_label(student_ptr, label, span, softcap)
    return Row(
        index=index,
        ignored=ignored,
        label=label,
        label_logit=label_logit,
        scale=scale,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        param=param,
    )


@triton.jit
def softmax(x, norm):
    """Probabilities and their log2; norm = (maximum, scale, log2 z, 1 / z, ...) of exp2((x - maximum) * scale) / z.

    The difference comes first, so that large logits keep their bits. exp2 of the logarithm would save a multiplication,
    and put the rounding of log2 z, several ulp, into every probability of the row.
    """
    a = (x - norm[0]) * norm[1]
    return tl.exp2(a) * norm[3], a - norm[2]


@triton.jit
def tile_offsets(TILE: tl.constexpr):
    ROLL: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    lane = tl.arange(0, LANES)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    return tl.arange(0, ROLL)[:, None, None] * (LANES * VEC) + lane  # [ROLL, LANES, VEC]


@triton.jit
def lane_zeros(TILE: tl.constexpr):
    LANES: tl.constexpr = TILE[1]
    return tl.zeros([LANES], tl.float32)


@triton.jit
def lane_lowest(TILE: tl.constexpr):
    LANES: tl.constexpr = TILE[1]
    return tl.full([LANES], LOWEST, tl.float32)


@triton.jit
def fold_sum(x):
    """Sum of a tile [ROLL, LANES, VEC] to [LANES]; no thread needs another."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.constexpr_function
def halvings(n):
    return n.bit_length() - 1


@triton.jit
def halves(x):
    """A tile [ROLL, LANES, VEC] as two [ROLL / 2, LANES, VEC]; no thread needs another."""
    HALF: tl.constexpr = x.shape[0] // 2
    LANES: tl.constexpr = x.shape[1]
    VEC: tl.constexpr = x.shape[2]
    return tl.split(tl.permute(tl.reshape(x, [2, HALF, LANES, VEC]), (1, 2, 3, 0)))


@triton.jit
def rolls(x):
    """The pieces [1, LANES, VEC] of a tile."""
    pieces = (x,)
    for _ in tl.static_range(halvings(x.shape[0])):
        halved = ()
        for k in tl.static_range(len(pieces)):
            a, b = halves(pieces[k])
            halved = halved + (a, b)
        pieces = halved
    return pieces


@triton.jit
def fold_product(weight, x):
    """Sum of weight * x to [LANES], with 0 where the weight is 0 whatever x is."""
    if SPLITS:
        weights = rolls(weight)
        terms = rolls(x)
        total = tl.zeros(terms[0].shape, tl.float32)
        for k in tl.static_range(len(terms)):
            total = add_product(total, weights[k], terms[k])
    else:
        total = mul0(weight, x)
    return fold_sum(total)


@triton.jit
def fold_max(x):
    """Maximum of a tile [ROLL, LANES, VEC] to [LANES]; a NaN loses against a number. 16 bits: two columns at a time."""
    if SPLITS:
        top = fold_pieces_max(rolls(x))
    else:
        top = tl.max(widen(x), axis=2)
    return tl.max(top, axis=0)


@triton.jit
def fold_pieces_max(pieces):
    """Maximum of a tuple of [.., LANES, VEC] to [.., LANES], two columns at a time while they are 16 bits."""
    top = pieces[0]
    RANK: tl.constexpr = len(top.shape)
    VEC: tl.constexpr = top.shape[RANK - 1]
    for k in tl.static_range(1, len(pieces)):
        top = wider_max(top, pieces[k])
    if top.dtype.primitive_bitwidth == 16 and VEC >= 4:
        HALF: tl.constexpr = VEC // 2
        QUARTER: tl.constexpr = HALF // 2
        LANES: tl.constexpr = top.numel // VEC
        SHAPE: tl.constexpr = top.shape
        a, b = tl.split(tl.permute(tl.reshape(top, [LANES, 2, HALF]), (0, 2, 1)))
        a, b = tl.split(tl.permute(tl.reshape(wider_max(a, b), [LANES, 2, QUARTER]), (0, 2, 1)))
        top = wider_max(a, b)
        if RANK == 3:
            top = tl.reshape(top, [SHAPE[0], SHAPE[1], QUARTER])
    return tl.max(widen(top), axis=RANK - 1)


@triton.jit
def spread(lane):
    """[LANES] to the shape of a tile."""
    return lane[None, :, None]


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap), by an exponential that cannot overflow."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / cap))
    y = cap * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def rescale(total, mass, factor, shift):
    """Move total = sum e * (x - m) to a new m: e shrinks by factor, x - m by -shift; mass is the old sum of e."""
    moved = mass * factor
    return tl.where(moved == 0, 0.0, tl.fma(total, factor, moved * shift))


@triton.jit
def rescale_excess(total, excess, total_s, mass_t, factor_s, factor_t, shift):
    """Move total = sum (es - et) x to new maxima: es and et shrink by their factors, x grows by shift.

    excess is the old sum of es - et, total_s that of es * x, mass_t that of et. Where both sides shrink alike, only
    differences are added up; where they do not, each side moves for itself.
    """
    moved_t = total_s - total + mul0(mass_t, shift)
    together = mul0(factor_s, total + mul0(excess, shift)) + mul0(factor_s - factor_t, moved_t)
    apart = mul0(factor_s, total_s + mul0(mass_t + excess, shift)) - mul0(factor_t, moved_t)
    moved = tl.where(tl.abs(factor_s - factor_t) < 0.5 * factor_s, together, apart)
    # An infinite logarithm may have made both sums infinite.
    return tl.where(tl.abs(total) == float("inf"), mul0(factor_s + factor_t, total), moved)


@triton.jit
def row_moments(row_ptr, V, span, softcap, PROBS: tl.constexpr, TILE: tl.constexpr):
    """Mean of a row and its standard deviation, that of torch.std; a deviation of 0 counts as 1. Two sweeps.

    The mean comes in two parts whose sum would be rounded: (x - pilot) - rest keeps what a large offset would eat.
    Deviations are squared over a power of two of the row's range: squares of 1e19 and more would pass that of fp32.
    """
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    offs_tile = tile_offsets(TILE)
    # Deviations from the first tile's mean: the sum of squares cannot cancel, and a constant row gives exactly 0.
    lane_top = lane_lowest(TILE)
    lane_fall = lane_lowest(TILE)
    for start in range(0, span.stop, BLOCK_V):
        offs_v = start + offs_tile
        x = logits_of(load_tile(row_ptr, start, span, TILE), offs_v, span, softcap, PROBS)
        lane_top = tl.maximum(lane_top, fold_max(x))
        lane_fall = tl.maximum(lane_fall, fold_max(tl.where(inside(offs_v, span), -x, NEG_INF)))
    half_top = tl.max(lane_top, axis=0) * 0.5
    extent = half_top + tl.max(lane_fall, axis=0) * 0.5
    # The power of two below half of the range, and no farther from 1 than its inverse may be.
    unit = (extent.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.minimum(tl.maximum(unit, 2.0**-126), 2.0**126)
    inverse = 1.0 / unit
    x = logits_of(load_tile(row_ptr, 0, span, TILE), offs_tile, span, softcap, PROBS)
    below = tl.where(inside(offs_tile, span), (x * 0.5 - half_top) * inverse, 0.0)
    half_pilot = half_top + tl.sum(fold_sum(below), axis=0) / tl.minimum(V, BLOCK_V - span.start) * unit
    total = lane_zeros(TILE)
    squares = lane_zeros(TILE)
    for start in range(0, span.stop, BLOCK_V):
        offs_v = start + offs_tile
        x = logits_of(load_tile(row_ptr, start, span, TILE), offs_v, span, softcap, PROBS)
        d = tl.where(inside(offs_v, span), (x * 0.5 - half_pilot) * inverse, 0.0)
        total += fold_sum(d)
        squares += fold_sum(d * d)
    rest = tl.sum(total, axis=0) / V
    variance = (tl.sum(squares, axis=0) - rest * rest * V) / tl.maximum(V - 1, 1)
    # Compared this way round a NaN stays NaN.
    deviation = tl.where(variance <= 0, 1.0, tl.sqrt(variance) * unit * 2.0)
    return half_pilot * 2.0, rest * unit * 2.0, deviation
