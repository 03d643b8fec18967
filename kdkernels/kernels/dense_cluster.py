"""The dense pattern in one pass: a row of student and teacher stays in the registers of a cluster of thread blocks.

2 reads and 1 write of [N, V], whatever the divergence. Needs thread-block clusters (sm_90 on); ``tuning.dense_plans``
says when it is taken. One program is a cluster of up to 16 blocks. A thread holds PIECES vectors of VEC columns of each
tensor (more, where LANES is a multiple of the threads) and keeps their exponentials for the gradient.

A reduction over the cluster costs barriers over all its blocks, so they are taken together: first the two maxima, then
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
    LN2,
    LOG2E,
    NEG_INF,
    add_product,
    begin_row,
    fast_exp2,
    fast_reciprocal,
    fold_pieces_max,
    log_ratio,
    mix_logs,
    mul0,
    row_pointer,
    soft_cap,
    temper,
    widen,
    zero_columns,
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
def _sum_together(folded):
    if len(folded) == 1:
        sums = (tl.sum(folded[0], axis=0),)
    elif len(folded) == 2:
        sums = tl.reduce(folded, 0, _sum2)
    elif len(folded) == 3:
        sums = tl.reduce(folded, 0, _sum3)
    elif len(folded) == 4:
        sums = tl.reduce(folded, 0, _sum4)
    elif len(folded) == 5:
        sums = tl.reduce(folded, 0, _sum5)
    elif len(folded) == 6:
        sums = tl.reduce(folded, 0, _sum6)
    else:
        sums = tl.reduce(folded, 0, _sum7)
    return sums


@triton.jit
def _sum_apart(folded):
    sums = ()
    for k in tl.static_range(len(folded)):
        sums = sums + (tl.sum(folded[k], axis=0),)
    return sums


# The interpreter adds the elements of a joint reduction up one after another, where a GPU takes them in pairs.
if triton.knobs.runtime.interpret:
    _sum_together = _sum_apart


@triton.jit
def reduce_sums(lanes):
    """Sums over the cluster of a tuple of [LANES, VEC] accumulators, in one exchange."""
    folded = ()
    for k in tl.static_range(len(lanes)):
        folded = folded + (tl.sum(lanes[k], axis=1),)
    return _sum_together(folded)


@triton.jit
def plus(k: tl.constexpr, total, x):
    """total + x, and x alone in the first piece: adding it to 0 is an instruction too."""
    if k == 0:
        total = x
    else:
        total += x
    return total


@triton.jit
def load_pieces(row_ptr, offs_v, V, load_width, softcap, PROBS: tl.constexpr, PIECES: tl.constexpr):
    """A row as PIECES tensors [LANES, VEC] in its own dtype (fp32 with a softcap, or of probabilities' logarithms).

    Only the last piece can reach past V; it is -inf there.
    """
    STEP: tl.constexpr = offs_v.shape[0] * offs_v.shape[1]
    loaded = ()
    for k in tl.static_range(PIECES):
        if k < PIECES - 1:
            x = tl.load(row_ptr + k * STEP + offs_v)
        else:
            x = tl.load(
                row_ptr + k * STEP + offs_v,
                mask=offs_v + k * STEP < (V if load_width is None else load_width),
                other=NEG_INF,
            )
        loaded = loaded + (x,)
    pieces = ()
    for k in tl.static_range(PIECES):
        x = loaded[k]
        if PROBS:
            x = tl.log2(x.to(tl.float32)) * LN2
        if softcap is not None:
            x = soft_cap(x.to(tl.float32), softcap)
        if k == PIECES - 1 and (load_width is not None or softcap is not None or PROBS):
            x = tl.where(offs_v + k * STEP < V, x, NEG_INF)
        pieces = pieces + (x,)
    return pieces


@triton.jit(do_not_specialize=["L", "ignore_index"])
def dense_cluster_fwd_kernel(
    student: Logits,  # [B, L, V]
    teachers,  # a tuple of one Logits [B, L, V]
    dstudent: Logits,  # [B, L, pad_width or V]
    rows: Rows,
    L,
    V,
    load_width,
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
    TEACHER_PROBS: tl.constexpr,
    TILE: tl.constexpr,  # (PIECES, LANES, VEC)
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
    PIECES: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    STEP: tl.constexpr = LANES * VEC

    student_ptr = row_pointer(student, L)
    teacher_ptr = row_pointer(teachers[0], L)
    dstudent_ptr = row_pointer(dstudent, L) if GRAD else None
    offs_v = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    # The label's logit is read before any block can write in place: the reductions below are barriers.
    row = begin_row(
        student_ptr,
        dstudent_ptr,
        rows,
        offs_v=offs_v,
        V=V,
        pad_width=pad_width,
        ignore_index=ignore_index,
        scale=scale,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        param=param0,
        softcap=student_softcap,
        LABEL_LOGIT=LABELLED,
        NUM_STATS=NUM_STATS,
    )
    if row.ignored:
        return
    if CE:
        # 32 bits: a comparison an element.
        label_v = tl.where((row.label >= 0) & (row.label < V), row.label, -1).to(tl.int32)
    if SMOOTH:
        center = smoothing_center(row.label_logit)

    student_pieces = load_pieces(student_ptr, offs_v, V, load_width, student_softcap, False, PIECES)
    if BOTH:
        C_P: tl.constexpr = 1
        C_Q: tl.constexpr = -1
    elif Q_TERMS:
        C_P: tl.constexpr = COEFFICIENTS[2]
        C_Q: tl.constexpr = COEFFICIENTS[3]
    if TEACHER:
        teacher_pieces = load_pieces(teacher_ptr, offs_v, V, load_width, teacher_softcap, TEACHER_PROBS, PIECES)
        top_s, top_t = tl.reduce((fold_pieces_max(student_pieces), fold_pieces_max(teacher_pieces)), 0, _max2)
    else:
        top_s = tl.max(fold_pieces_max(student_pieces), axis=0)

    unit_s, unit_t, ratio = temper(row.temperature, row.teacher_temperature)
    scale_s = LOG2E * unit_s
    scale_t = LOG2E * unit_t
    # Of the sums over logits; without the teacher's logarithms the student's temperature is the better one.
    unit = unit_t
    if LINEAR:
        if COEFFICIENTS[0] == 0 and COEFFICIENTS[2] == 0:
            unit = unit_s
            ratio = 1.0
    zeros = tl.zeros([LANES, VEC], tl.float32)
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
        exps_s = exps_s + (es,)
        if TEACHER:
            dt = widen(teacher_pieces[k]) - top_t
            et = fast_exp2(dt * scale_t)
            zt = plus(k, zt, et)
            if OVERLAPPING:
                overlap = tl.fma(es, et, overlap)
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
            if k < PIECES - 1:
                centered += widen(student_pieces[k]) - center
            else:
                centered += tl.where(offs_v + k * STEP < V, widen(student_pieces[k]) - center, 0.0)
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
    inverse_zs = fast_reciprocal(total_s)
    if TEACHER:
        total_t = sums[1]
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
        forward = zeros
        reverse = zeros
        entropy_p = zeros
        entropy_q = zeros
        overlap = zeros
        at_s = tl.full([LANES, VEC], NOWHERE, tl.int32)
        at_t = tl.full([LANES, VEC], NOWHERE, tl.int32)
        for k in tl.static_range(PIECES):
            ds = widen(student_pieces[k]) - top_s
            dt = widen(teacher_pieces[k]) - top_t
            logp = dt * unit_t
            logq = tl.fma(ds, unit_s, log_zt_zs)
            if PAIR:
                if SCALABLE:
                    p, lp, q, lq = exps_t[k], logp, exps_s[k] * factor_q, logq
                else:
                    p, lp, q, lq = exps_t[k] * inverse_zt, logp - log_zt, exps_s[k] * factor_q, logq - log_zt
                value = plus(k, value, value_of(p, lp, q, lq, row.param, param1, COEFFICIENTS, VALUE, TOTAL))
                if GRAD and KD:
                    score = score_of(p, lp, q, lq, row.param, param1, COEFFICIENTS, SCORE, TOTAL)
                    score_total = plus(k, score_total, score)
                    scores = scores + (score,)
            if STATS:
                new_forward, new_reverse, new_entropy_p, new_entropy_q, new_overlap = statistics_of(
                    exps_t[k] * inverse_zt, logp, exps_s[k] * inverse_zs, logq
                )
                forward = plus(k, forward, new_forward)
                reverse = plus(k, reverse, new_reverse)
                entropy_p = plus(k, entropy_p, new_entropy_p)
                entropy_q = plus(k, entropy_q, new_entropy_q)
                overlap = plus(k, overlap, new_overlap)
                at_s = tl.minimum(at_s, tl.where(ds == 0, offs_v + k * STEP, NOWHERE))
                at_t = tl.minimum(at_t, tl.where(dt == 0, offs_v + k * STEP, NOWHERE))
        wanted = ()
        if STATS:
            wanted = (forward, reverse, entropy_p, entropy_q, overlap)
        if PAIR:
            wanted = wanted + (value,)
            if GRAD and KD:
                wanted = wanted + (score_total,)
        sums = reduce_sums(wanted)
        AFTER_STATS: tl.constexpr = 5 if STATS else 0
        if PAIR:
            divergence = sums[AFTER_STATS] * post
            if GRAD and KD:
                score_sum = sums[AFTER_STATS + 1] * post
    if TEACHER:
        divergence = nonnegative(divergence, COEFFICIENTS, SCALABLE)

    loss = hard_loss
    if KD:
        kd_scale = divergence_scale(row.scale, weights, row.temperature, rows, row.index)
        loss += weighed(kd_scale, kd_scale * divergence, rows)
    tl.store(rows.loss + row.index, loss)
    if STATS:
        at_s, at_t = tl.reduce((tl.min(at_s, axis=1), tl.min(at_t, axis=1)), 0, _min2)
        row_ptr = rows.stats + row.index * NUM_STATS
        tl.store(row_ptr, divergence)
        tl.store(row_ptr + 1, ce)
        tl.store(row_ptr + 2, lse)
        tl.store(row_ptr + 3, nonnegative(sums[0], None, True))
        tl.store(row_ptr + 4, nonnegative(sums[1], None, True))
        tl.store(row_ptr + 5, sums[2] + log_zt)
        tl.store(row_ptr + 6, sums[3] + log_zt)
        tl.store(row_ptr + 7, tl.where(at_s == at_t, 1.0, 0.0))
        tl.store(row_ptr + 8, sums[4])

    if GRAD:
        if KD:
            g_scale = kd_scale * unit_s
        if LINEAR:
            # Exactly 1 for equal rows, so that their gradient is exactly 0: es - z_ratio * et with one rounding.
            excess_z *= inverse_zt
            z_ratio = 1.0 + excess_z
        for k in tl.static_range(PIECES):
            if not KD:
                g = zeros
            elif LINEAR:
                if BOTH:
                    # Where one outcome has all but 1e-8 of both, the ratio's excess over 1 is what there is.
                    g = tl.fma(exps_t[k], -excess_z, exps_s[k] - exps_t[k])
                else:
                    g = tl.fma(exps_t[k], -z_ratio, exps_s[k])
                g *= -COEFFICIENTS[1] * g_scale * inverse_zs
                if Q_TERMS:
                    ds = widen(student_pieces[k]) - top_s
                    dt = widen(teacher_pieces[k]) - top_t
                    # The normalisers cancel: what is left of a logarithm is as small as the rows are near.
                    slope = mix_logs(COEFFICIENTS[2], dt, COEFFICIENTS[3], ds, ratio) - mean_q
                    rest = mul0(exps_s[k], slope * (g_scale * unit * inverse_zs))
                    g = rest if COEFFICIENTS[1] == 0 else g + rest
            else:
                g = tl.fma(exps_s[k], -(score_sum * factor_q), scores[k]) * (g_scale * post)
            if KD:
                g = weighed(kd_scale, g, rows)
            if HARD_GRAD:
                g += hard_factor * fast_exp2((widen(student_pieces[k]) - top_s) * LOG2E)
            if CE:
                g = label_gradient(g, offs_v + k * STEP, label_v, V, hard_scale, weights.label_smoothing)
            g = through_cap(g, student_pieces[k], student_softcap)
            g = g.to(dstudent_ptr.dtype.element_ty)
            if k < PIECES - 1:
                tl.store(dstudent_ptr + k * STEP + offs_v, g)
            elif pad_width is None:
                tl.store(dstudent_ptr + k * STEP + offs_v, g, mask=offs_v + k * STEP < V)
            else:
                tl.store(
                    dstudent_ptr + k * STEP + offs_v,
                    tl.where(offs_v + k * STEP < V, g, tl.zeros(g.shape, g.dtype)),
                    mask=offs_v + k * STEP < pad_width,
                )
        if pad_width is not None:
            zero_columns(dstudent_ptr, offs_v, PIECES * STEP, pad_width)
