"""The dense pattern in one pass: a row of student and teacher stays in registers, of a block or of a cluster of blocks.

2 reads and 1 write of [N, V], whatever the divergence; ``tuning.dense_plans`` says when it is taken. One program is one
row in a cluster of up to 16 blocks (sm_90 on), one row in a block, or several narrow rows in a block. A thread holds
PIECES vectors of VEC columns of each tensor (more, where LANES is a multiple of the threads) and keeps their
exponentials for the gradient, or of the widest rows a block can hold the logits alone.

Pieces are [LANES, VEC] and numbers of the row scalars; of several rows pieces are [ROWS, LANES, VEC], and their numbers
[ROWS, 1, 1], so that one text serves both. A row that is ignored, or does not exist, has no column inside its span.

A reduction over a cluster costs barriers over all its blocks, so they are taken together: first the two maxima, then
every sum over exponentials, which is all that a linear divergence needs; a pair of functions or statistics take one
more group. Several teachers and standardised logits are left to two sweeps.

Everything is taken relative to the row's two maxima, and a maximum is subtracted before anything is multiplied: the
largest exponential is then exactly 1, which is what keeps q - p of two confident rows from being noise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.kernels.arguments import Logits, Rows, Weights
from kdkernels.kernels.rows import (
    LOG2E,
    Span,
    add_product,
    begin_row,
    end_of,
    fast_exp2,
    fast_reciprocal,
    fold_pieces_max,
    grid_pointer,
    inside,
    load_vectors,
    log_ratio,
    logits_of,
    mix_logs,
    mul0,
    row_skew,
    store_vectors,
    temper,
    widen,
)
from kdkernels.kernels.terms import (
    NOWHERE,
    NUM_STATS,
    both_mean,
    divergence_scale,
    hard_terms,
    has_both,
    label_gradient,
    linear_value,
    nonnegative,
    outer_value,
    part_of_teacher,
    rest_of,
    score_of,
    smoothing_center,
    statistics_of,
    through_cap,
    value_of,
    weighed,
)


# Triton wants a function of 2 n scalars for a reduction of n tensors: no tuples, no defaults, so one for each n.
@triton.jit
def _max2(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _min2(a, b, c, d):
    return tl.minimum(a, c), tl.minimum(b, d)


@triton.jit
def _sum2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sum4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sum5(a, b, c, d, e, f, g, h, i, j):
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def _sum6(a, b, c, d, e, f, g, h, i, j, k, m):
    return a + g, b + h, c + i, d + j, e + k, f + m


@triton.jit
def _sum7(a, b, c, d, e, f, g, h, i, j, k, m, n, o):
    return a + h, b + i, c + j, d + k, e + m, f + n, g + o


@triton.jit
def _sum_together(folded, AXIS: tl.constexpr):
    if len(folded) == 1:
        sums = (tl.sum(folded[0], axis=AXIS),)
    elif len(folded) == 2:
        sums = tl.reduce(folded, AXIS, _sum2)
    elif len(folded) == 3:
        sums = tl.reduce(folded, AXIS, _sum3)
    elif len(folded) == 4:
        sums = tl.reduce(folded, AXIS, _sum4)
    elif len(folded) == 5:
        sums = tl.reduce(folded, AXIS, _sum5)
    elif len(folded) == 6:
        sums = tl.reduce(folded, AXIS, _sum6)
    else:
        sums = tl.reduce(folded, AXIS, _sum7)
    return sums


@triton.jit
def _sum_apart(folded, AXIS: tl.constexpr):
    sums = ()
    for k in tl.static_range(len(folded)):
        sums = sums + (tl.sum(folded[k], axis=AXIS),)
    return sums


# The interpreter adds the elements of a joint reduction up one after another, where a GPU takes them in pairs.
if triton.knobs.runtime.interpret:
    _sum_together = _sum_apart


@triton.jit
def of_rows(numbers, RANK: tl.constexpr):
    """One number a row each, in the shape that goes with pieces of this rank: [ROWS, 1, 1], or of one row scalars."""
    if RANK == 3:
        shaped = ()
        for k in tl.static_range(len(numbers)):
            shaped = shaped + (numbers[k][:, None, None],)
        numbers = shaped
    return numbers


@triton.jit
def reduce_sums(lanes):
    """Sums over the lanes of each row of a tuple of [.., LANES, VEC] accumulators, in one exchange."""
    RANK: tl.constexpr = len(lanes[0].shape)
    folded = ()
    for k in tl.static_range(len(lanes)):
        folded = folded + (tl.sum(lanes[k], axis=RANK - 1),)
    return of_rows(_sum_together(folded, RANK - 2), RANK)


@triton.jit
def reduce_tops(student_pieces, teacher_pieces):
    """The largest logit of both sides."""
    RANK: tl.constexpr = len(student_pieces[0].shape)
    folded = (fold_pieces_max(student_pieces), fold_pieces_max(teacher_pieces))
    return of_rows(tl.reduce(folded, RANK - 2, _max2), RANK)


@triton.jit
def store_number(ptr, x, ignored, exists):
    """Store a row's number; of several rows 0 for those that are ignored."""
    if exists is None:
        tl.store(ptr, x)
    else:
        tl.store(ptr, tl.where(ignored, 0.0, x), mask=exists)


@triton.jit
def plus(k: tl.constexpr, total, x):
    """total + x, and x alone in the first piece: adding it to 0 is an instruction too."""
    if k == 0:
        total = x
    else:
        total += x
    return total


# Of a row that cuts vectors at its ends the first piece has the first vector, in its last lane, and the last ones in
# the others. The rest are whole, but for the last piece where a row may end there, by where it starts: CUT is 2.
@triton.constexpr_function
def at_end(k, TILE):
    """True if a piece can reach beyond its row, and of one that cuts vectors has to move columns one by one."""
    return k == 0 or (TILE[3] == 2 and k == TILE[0] - 1) if TILE[3] else k == TILE[0] - 1


@triton.constexpr_function
def one_piece(TILE):
    return (1, *TILE[1:4])


@triton.constexpr_function
def piece_start(k, TILE):
    """The first column of a piece; its vectors are counted from there."""
    if TILE[3]:
        return 0 if k == 0 else ((k - 1) * TILE[1] + 1) * TILE[2]
    return k * TILE[1] * TILE[2]


@triton.jit
def piece_heads(k: tl.constexpr, heads, TILE: tl.constexpr):
    """The first columns of a piece's vectors, from its start on; heads are those of a plain one."""
    if TILE[3] and k == 0:
        lanes = heads // TILE[2]
        # The product last: of a choice between two the compiler does not see that it is a vector's boundary.
        heads = tl.where(lanes == TILE[1] - 1, 0, lanes + ((TILE[0] - 1) * TILE[1] + 1)) * TILE[2]
    return heads


@triton.jit
def piece_columns(k: tl.constexpr, heads, TILE: tl.constexpr):
    return piece_heads(k, heads, TILE) + tl.arange(0, TILE[2]) + piece_start(k, TILE)


@triton.jit
def load_pieces(row_ptr, heads, span, softcap, PROBS: tl.constexpr, TILE: tl.constexpr):
    """A row, or several, as PIECES tensors of vectors in its own dtype, -inf outside it (fp32 with a softcap, or of
    probabilities' logarithms)."""
    PIECES: tl.constexpr = TILE[0]
    loaded = ()
    for k in tl.static_range(PIECES):
        x = load_vectors(
            row_ptr,
            piece_start(k, TILE),
            piece_heads(k, heads, TILE),
            at_end(k, TILE),
            span,
            TILE,
            TILE[4] == 1 and not at_end(k, TILE),
        )
        loaded = loaded + (x,)
    pieces = ()
    for k in tl.static_range(PIECES):
        x = loaded[k]
        if PROBS or softcap is not None:
            x = logits_of(x, piece_columns(k, heads, TILE), span, softcap, PROBS)
        pieces = pieces + (x,)
    return pieces


@triton.jit(do_not_specialize=["N", "L", "ignore_index"])
def dense_cluster_fwd_kernel(
    student: Logits,  # [B, L, V]
    teachers,  # a tuple of one Logits [B, L, V]
    dstudent: Logits,  # [B, L, pad_width or V]
    rows: Rows,
    N,
    L,
    V,
    pad_width,
    ignore_index,
    scale,
    temperature,
    teacher_temperature,
    weights: Weights,
    student_softcap,
    teacher_softcap,
    param0,
    param1,
    COEFFICIENTS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    OFFSET: tl.constexpr,
    OVERLAPPING: tl.constexpr,
    TOTAL: tl.constexpr,
    SCALABLE: tl.constexpr,
    OUTER: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
    TILE: tl.constexpr,  # (PIECES, LANES, VEC, CUT, ROWS, KEEP)
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    STATS: tl.constexpr = rows.stats is not None
    CE: tl.constexpr = weights.ce is not None
    # Statistics have the cross entropy too.
    LABELLED: tl.constexpr = CE or (STATS and rows.labels is not None)
    KD: tl.constexpr = weights.kd is not None
    HARD: tl.constexpr = CE or STATS or weights.z_loss is not None
    HARD_GRAD: tl.constexpr = CE or weights.z_loss is not None
    # A term of weight 0 is not computed, and its teacher not read.
    TEACHER: tl.constexpr = KD or STATS
    LINEAR: tl.constexpr = COEFFICIENTS is not None and TEACHER
    PAIR: tl.constexpr = COEFFICIENTS is None and TEACHER
    P_TERMS: tl.constexpr = LINEAR and (COEFFICIENTS[0] != 0 or COEFFICIENTS[1] != 0)
    Q_TERMS: tl.constexpr = LINEAR and (COEFFICIENTS[2] != 0 or COEFFICIENTS[3] != 0)
    BOTH: tl.constexpr = LINEAR and has_both(COEFFICIENTS)
    SMOOTH: tl.constexpr = weights.label_smoothing is not None
    PART_OF_TEACHER: tl.constexpr = rows.teacher_lse is not None and TEACHER
    PIECES: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    STEP: tl.constexpr = LANES * VEC

    ROWS: tl.constexpr = TILE[4]
    RANK: tl.constexpr = 2 if ROWS == 1 else 3
    # Exponentials stay for the gradient, or are computed once more: of the widest rows there is room for logits only.
    KEEP: tl.constexpr = TILE[5]

    heads = tl.arange(0, LANES)[:, None] * VEC
    exists = None
    if ROWS == 1:
        index = tl.program_id(0).to(tl.int64)
    else:
        index = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
        exists = index < N
        heads = heads[None, :, :]
    skew = row_skew(student, index, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    pad_stop = span.stop if pad_width is None else end_of(skew, pad_width, TILE)
    student_ptr = grid_pointer(student, index, skew, L, TILE)
    teacher_ptr = grid_pointer(teachers[0], index, skew, L, TILE)
    dstudent_ptr = grid_pointer(dstudent, index, skew, L, TILE) if GRAD else None
    # The label's logit is read before any block can write in place: the reductions below are barriers.
    row = begin_row(
        student_ptr,
        dstudent_ptr,
        rows,
        index=index,
        span=span,
        pad_stop=pad_stop,
        TILE=one_piece(TILE),
        ignore_index=ignore_index,
        scale=scale,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        param=param0,
        softcap=student_softcap,
        exists=exists,
        LABEL_LOGIT=LABELLED,
        NUM_STATS=NUM_STATS,
    )
    stored = span
    if ROWS == 1:
        if row.ignored:
            return
    else:
        # A row that is ignored has no columns to read, and one that does not exist none to write.
        span = Span(skew, tl.where(row.ignored, 0, span.stop))
        stored = Span(skew, tl.where(exists, stored.stop, 0))
        pad_stop = tl.where(exists, pad_stop, 0)
    if CE:
        # 32 bits: a comparison an element.
        label_v = tl.where((row.label >= 0) & (row.label < V), skew + row.label, -1).to(tl.int32)
    if SMOOTH:
        center = smoothing_center(row.label_logit)

    student_pieces = load_pieces(student_ptr, heads, span, student_softcap, False, TILE)
    if BOTH:
        C_P: tl.constexpr = 1
        C_Q: tl.constexpr = -1
    elif Q_TERMS:
        C_P: tl.constexpr = COEFFICIENTS[2]
        C_Q: tl.constexpr = COEFFICIENTS[3]
    if TEACHER:
        teacher_pieces = load_pieces(teacher_ptr, heads, span, teacher_softcap, TEACHER_PROBS, TILE)
        top_s, top_t = reduce_tops(student_pieces, teacher_pieces)
        if PART_OF_TEACHER:
            # All p are 0 where nothing of it is here.
            top_t = tl.where(top_t == float("-inf"), 0.0, top_t)
    else:
        top_s = of_rows((tl.max(fold_pieces_max(student_pieces), axis=RANK - 2),), RANK)[0]

    unit_s, unit_t, ratio = temper(row.temperature, row.teacher_temperature)
    scale_s = LOG2E * unit_s
    scale_t = LOG2E * unit_t
    # Of the sums over logits; without the teacher's logarithms the student's temperature is the better one.
    unit = unit_t
    if LINEAR:
        if COEFFICIENTS[0] == 0 and COEFFICIENTS[2] == 0:
            unit = unit_s
            ratio = 1.0
    zeros = tl.zeros(student_pieces[0].shape, tl.float32)
    zs = zeros
    zt = zeros
    sum_p = zeros
    sum_q = zeros
    zh = zeros
    centered = zeros
    overlap = zeros
    exps_s = ()
    exps_t = ()
    for k in tl.static_range(PIECES):
        ds = widen(student_pieces[k]) - top_s
        es = fast_exp2(ds * scale_s)
        if KEEP:
            exps_s = exps_s + (es,)
        if TEACHER:
            dt = widen(teacher_pieces[k]) - top_t
            et = fast_exp2(dt * scale_t)
            zt = plus(k, zt, et)
            if OVERLAPPING:
                overlap = tl.fma(es, et, overlap)
            if KEEP:
                exps_t = exps_t + (et,)
        # A term of weight 0 counts 0 also where its logarithm is infinite.
        if BOTH:
            excess = es - et
            x = mix_logs(C_P, dt, C_Q, ds, ratio)
            zs = plus(k, zs, excess)
            sum_p = add_product(sum_p, excess, x)
            sum_q = add_product(sum_q, es, x)
        else:
            zs = plus(k, zs, es)
            if P_TERMS:
                sum_p = add_product(sum_p, et, mix_logs(COEFFICIENTS[0], dt, COEFFICIENTS[1], ds, ratio))
            if Q_TERMS:
                sum_q = add_product(sum_q, es, mix_logs(C_P, dt, C_Q, ds, ratio))
        if HARD:
            zh = plus(k, zh, fast_exp2(ds * LOG2E))
        if SMOOTH:
            if ROWS == 1 and not at_end(k, TILE):
                centered += widen(student_pieces[k]) - center
            else:
                centered += tl.where(
                    inside(piece_columns(k, heads, TILE), span), widen(student_pieces[k]) - center, 0.0
                )
    wanted = (zs,)
    if TEACHER:
        wanted = wanted + (zt,)
    if P_TERMS:
        wanted = wanted + (sum_p,)
    if Q_TERMS:
        wanted = wanted + (sum_q,)
    if HARD:
        wanted = wanted + (zh,)
    if SMOOTH:
        wanted = wanted + (centered,)
    if OVERLAPPING:
        wanted = wanted + (overlap,)
    sums = reduce_sums(wanted)

    AFTER_Z: tl.constexpr = 2 if TEACHER else 1
    AFTER_P: tl.constexpr = AFTER_Z + 1 if P_TERMS else AFTER_Z
    AFTER_Q: tl.constexpr = AFTER_P + 1 if Q_TERMS else AFTER_P
    total_s = sums[0]
    if BOTH:
        total_s += sums[1]
    # Known only now, so that what is computed once more is not kept instead.
    late_s = tl.where(total_s == total_s, scale_s, total_s)
    late_top_s = tl.where(total_s == total_s, top_s, total_s)
    inverse_zs = fast_reciprocal(total_s)
    if TEACHER:
        total_t = sums[1]
        late_t = tl.where(total_t == total_t, scale_t, total_t)
        late_top_t = tl.where(total_t == total_t, top_t, total_t)
        mass = 1.0
        if PART_OF_TEACHER:
            nothing = total_t == 0
            total_t = tl.where(nothing, 1.0, total_t)
            log_mass, z_elsewhere = part_of_teacher(rows, row.index, top_t, unit_t, total_t, nothing, exists)
            mass = fast_exp2(log_mass * LOG2E)
            if PAIR:
                # p by a normaliser of its own; a sum over it is what it is.
                total_t = z_elsewhere
        inverse_zt = fast_reciprocal(total_t)
        excess_z = sums[0] if BOTH else total_s - total_t
        # Of the two normalisers only the ratio matters to most divergences, and near 1 it keeps what they would round.
        log_zt_zs = log_ratio(total_t, total_s)
    ce = 0.0
    lse = 0.0
    hard_loss = 0.0
    if HARD:
        ce, lse, hard_loss, hard_scale, lse_scale = hard_terms(
            top_s,
            log_ratio(sums[AFTER_Q], 1.0) * LOG2E,
            row.label_logit,
            sums[AFTER_Q + 1] if SMOOTH else 0.0,
            V,
            row.scale,
            weights,
            rows,
            row.index,
            LABELLED,
            exists,
        )
        hard_factor = lse_scale * fast_reciprocal(sums[AFTER_Q])
    divergence = 0.0
    mean_q = 0.0
    if LINEAR:
        mean_p = 0.0
        if P_TERMS:
            mean_p = sums[AFTER_Z] * inverse_zt
        if Q_TERMS:
            mean_q = sums[AFTER_P] * inverse_zs
        if BOTH:
            mean_p = both_mean(COEFFICIENTS, mean_p, mean_q, excess_z * inverse_zt)
            divergence = mean_p * unit + (COEFFICIENTS[1] + COEFFICIENTS[3]) * log_zt_zs
            mean_q *= COEFFICIENTS[2]
        else:
            divergence = linear_value(COEFFICIENTS, (mean_p + mean_q) * unit, total_t, total_s, log_zt_zs)
        if PART_OF_TEACHER:
            # Linear in p: that of the distribution, and of its mass.
            divergence = mass * (nonnegative(divergence, COEFFICIENTS, SCALABLE) + COEFFICIENTS[0] * log_mass)

    score_sum = 0.0
    scores = ()
    # Of a pair that takes p and q on any common scale: their own exponentials, and logarithms that are as small.
    if PAIR or STATS:
        log_zt = log_ratio(total_t, 1.0)
    if PAIR:
        if OFFSET is not None:
            param1 = OFFSET(total_t, total_s, sums[len(sums) - 1] if OVERLAPPING else 0.0)
        if SCALABLE:
            factor_q = tl.where(total_t == total_s, 1.0, total_t * inverse_zs)
            post = inverse_zt
        else:
            factor_q = inverse_zs
            post = 1.0
    if PAIR or STATS:
        value = zeros
        score_total = zeros
        rate = zeros
        kl = zeros
        forward = zeros
        reverse = zeros
        entropy_p = zeros
        entropy_q = zeros
        overlap = zeros
        at_s = tl.full(zeros.shape, NOWHERE, tl.int32)
        at_t = tl.full(zeros.shape, NOWHERE, tl.int32)
        for k in tl.static_range(PIECES):
            ds = widen(student_pieces[k]) - top_s if KEEP else student_pieces[k].to(tl.float32) - late_top_s
            dt = widen(teacher_pieces[k]) - top_t if KEEP else teacher_pieces[k].to(tl.float32) - late_top_t
            logp = dt * unit_t
            logq = tl.fma(ds, unit_s, log_zt_zs)
            es = exps_s[k] if KEEP else fast_exp2(ds * late_s)
            et = exps_t[k] if KEEP else fast_exp2(dt * late_t)
            if PAIR:
                if SCALABLE:
                    p, lp, q, lq = et, logp, es * factor_q, logq
                else:
                    p, lp, q, lq = et * inverse_zt, logp - log_zt, es * factor_q, logq - log_zt
                value = plus(k, value, value_of(p, lp, q, lq, row.param, param1, COEFFICIENTS, VALUE, TOTAL))
                if (OUTER == 1 or OUTER == 2) and not STATS:
                    rate = plus(k, rate, tl.where(p < q, p, q))
                if OUTER == 2 and not STATS:
                    kl = plus(k, kl, mul0(p, lp - lq))
                if GRAD and KD:
                    score = score_of(p, lp, q, lq, row.param, param1, COEFFICIENTS, SCORE, TOTAL)
                    score_total = plus(k, score_total, score)
                    scores = scores + (score,)
            if STATS:
                new_forward, new_reverse, new_entropy_p, new_entropy_q, new_overlap = statistics_of(
                    et * inverse_zt, logp, es * inverse_zs, logq
                )
                forward = plus(k, forward, new_forward)
                reverse = plus(k, reverse, new_reverse)
                entropy_p = plus(k, entropy_p, new_entropy_p)
                entropy_q = plus(k, entropy_q, new_entropy_q)
                overlap = plus(k, overlap, new_overlap)
                at_s = tl.minimum(at_s, tl.where(ds == 0, piece_columns(k, heads, TILE), NOWHERE))
                at_t = tl.minimum(at_t, tl.where(dt == 0, piece_columns(k, heads, TILE), NOWHERE))
        wanted = ()
        if STATS:
            wanted = (forward, reverse, entropy_p, entropy_q, overlap)
        if PAIR:
            wanted = wanted + (value,)
            if GRAD and KD:
                wanted = wanted + (score_total,)
        AFTER_PAIR: tl.constexpr = len(wanted)
        # Statistics have both.
        if (OUTER == 1 or OUTER == 2) and not STATS:
            wanted = wanted + (rate,)
        if OUTER == 2 and not STATS:
            wanted = wanted + (kl,)
        sums = reduce_sums(wanted)
        AFTER_STATS: tl.constexpr = 5 if STATS else 0
        if PAIR:
            divergence = sums[AFTER_STATS] * post
            if GRAD and KD:
                score_sum = sums[AFTER_STATS + 1] * post
            if PART_OF_TEACHER:
                divergence += 0.5 * (1.0 - mass)
            if OUTER == 3:
                of_kl = rest_of(row.param)
            elif OUTER:
                if STATS:
                    accepted, of_teacher = sums[4], sums[0]
                elif OUTER == 2:
                    accepted, of_teacher = sums[AFTER_PAIR] * post, sums[AFTER_PAIR + 1] * post
                else:
                    accepted, of_teacher = sums[AFTER_PAIR] * post, 0.0
                divergence, of_kl, of_distance = outer_value(divergence, accepted, of_teacher, row.param, OUTER)
                score_sum *= of_distance
    if TEACHER and not PART_OF_TEACHER:
        divergence = nonnegative(divergence, COEFFICIENTS, SCALABLE)

    loss = hard_loss
    if KD:
        kd_scale = divergence_scale(row.scale, weights, row.temperature, rows, row.index, exists)
        loss += weighed(kd_scale, kd_scale * divergence, rows)
    store_number(rows.loss + index, loss, row.ignored, exists)
    if STATS:
        at = (tl.min(at_s, axis=RANK - 1), tl.min(at_t, axis=RANK - 1))
        at_s, at_t = of_rows(tl.reduce(at, RANK - 2, _min2), RANK)
        row_ptr = rows.stats + index * NUM_STATS
        store_number(row_ptr, divergence, row.ignored, exists)
        store_number(row_ptr + 1, ce, row.ignored, exists)
        store_number(row_ptr + 2, lse, row.ignored, exists)
        store_number(row_ptr + 3, nonnegative(sums[0], None, True), row.ignored, exists)
        store_number(row_ptr + 4, nonnegative(sums[1], None, True), row.ignored, exists)
        store_number(row_ptr + 5, sums[2] + log_zt, row.ignored, exists)
        store_number(row_ptr + 6, sums[3] + log_zt, row.ignored, exists)
        store_number(row_ptr + 7, tl.where(at_s == at_t, 1.0, 0.0), row.ignored, exists)
        store_number(row_ptr + 8, sums[4], row.ignored, exists)

    if GRAD:
        if KD:
            g_scale = kd_scale * unit_s
            if LINEAR and PART_OF_TEACHER:
                g_scale *= mass
        if LINEAR:
            # Exactly 1 for equal rows, so that their gradient is exactly 0: es - z_ratio * et with one rounding.
            excess_z *= inverse_zt
            z_ratio = 1.0 + excess_z
        for k in tl.static_range(PIECES):
            ds = widen(student_pieces[k]) - top_s if KEEP else student_pieces[k].to(tl.float32) - late_top_s
            es = exps_s[k] if KEEP else fast_exp2(ds * late_s)
            if TEACHER:
                dt = widen(teacher_pieces[k]) - top_t if KEEP else teacher_pieces[k].to(tl.float32) - late_top_t
                et = exps_t[k] if KEEP else fast_exp2(dt * late_t)
            if not KD:
                g = zeros
            elif LINEAR:
                if BOTH:
                    # Where one outcome has all but 1e-8 of both, the ratio's excess over 1 is what there is.
                    g = tl.fma(et, -excess_z, es - et)
                else:
                    g = tl.fma(et, -z_ratio, es)
                g *= -COEFFICIENTS[1] * g_scale * inverse_zs
                if Q_TERMS:
                    # The normalisers cancel: what is left of a logarithm is as small as the rows are near.
                    slope = mix_logs(COEFFICIENTS[2], dt, COEFFICIENTS[3], ds, ratio) - mean_q
                    rest = mul0(es, slope * (g_scale * unit * inverse_zs))
                    g = rest if COEFFICIENTS[1] == 0 else g + rest
            else:
                score = scores[k]
                if OUTER == 1 or OUTER == 2:
                    score *= of_distance
                g = tl.fma(es, -(score_sum * factor_q), score)
                if OUTER >= 2:
                    # That of forward KL by itself: beside a large logarithm it would be lost.
                    g += of_kl * (es * (factor_q * mass) - et)
                g *= g_scale * post
            if KD:
                g = weighed(kd_scale, g, rows)
            if HARD_GRAD:
                g += hard_factor * fast_exp2(ds * LOG2E)
            if CE:
                g = label_gradient(g, piece_columns(k, heads, TILE), label_v, V, hard_scale, weights.label_smoothing)
            g = through_cap(g, student_pieces[k], student_softcap)
            if ROWS > 1:
                g = tl.where(row.ignored, 0.0, g)
            store_vectors(
                dstudent_ptr,
                piece_start(k, TILE),
                piece_heads(k, heads, TILE),
                at_end(k, TILE),
                stored,
                g,
                TILE,
                ROWS == 1 and not at_end(k, TILE),
            )
        if pad_width is not None:
            for begin in range(V // VEC * VEC, pad_width + VEC, STEP):
                store_vectors(dstudent_ptr, begin, heads, True, Span(stored.stop, pad_stop), zeros, TILE)
