"""The dense pattern: loss and gradient of rows of student and teacher logits given in full, one program a row.

With a = s/T, b = t/T_t, q = softmax(a), p = softmax(b) and score = df/dlogq, the gradient of a divergence is
(score - q * sum(score)) / T. A linear divergence is summed while the first sweep finds the normalisers, so the second
sweep can write the gradient (4 reads and 1 write of [N, V] with one teacher, less the tile that stays in registers from
one sweep to the next); others need a sweep between for their sums (6 and 1). Sweeps alternate their direction: each
begins with the columns the one before it left in cache.

The launcher hands rows that fit into the registers of a block, or of a cluster of them, to ``dense_cluster`` (2 and 1);
``tuning`` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import divergences, tuning
from kdkernels.kernels.arguments import (
    Logits,
    Mixture,
    Rows,
    Weights,
    logits,
    mixture_argument,
    num_rows,
    on_device_of,
    row_arguments,
    row_tensors,
    term_weights,
    thrown_away,
    vectors,
)
from kdkernels.kernels.dense_cluster import dense_cluster_fwd_kernel
from kdkernels.kernels.mapped import mapped_fwd
from kdkernels.kernels.online import defined, elsewhere, linear_sweep, load_mixed, norm_sweep, overlap_of_tile
from kdkernels.kernels.rows import (
    LN2,
    LOG2E,
    LOWEST,
    NEG_INF,
    Span,
    begin_row,
    end_of,
    fast_log2,
    fold_max,
    fold_sum,
    grid_pointer,
    inside,
    lane_zeros,
    load_tile,
    log_ratio,
    logits_of,
    mix_logs,
    mul0,
    part_begin,
    part_end,
    part_step,
    parts,
    row_moments,
    row_skew,
    softmax,
    spread,
    store_tile,
    temper,
    tile_offsets,
    zero_tiles,
)
from kdkernels.kernels.terms import (
    NOWHERE,
    NUM_STATS,
    both_mean,
    divergence_scale,
    hard_terms,
    has_both,
    is_homogeneous,
    label_gradient,
    linear_value,
    nonnegative,
    outer_value,
    overlap_decides,
    part_of_teacher,
    rest_of,
    score_of,
    smoothing_center,
    statistics_of,
    through_cap,
    value_of,
    weighed,
)

# The teacher's forms that are probabilities. They need not sum to 1: a row is divided by its sum.
PROBS_FORMS = ("probs", "unnormalized_probs")


@triton.jit
def mixed_softmax(
    teacher_ptrs,
    shares,
    norms,
    start,
    span,
    softcap,
    TEACHER_PROBS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    """p and log2 p of one tile of a mixture of probabilities."""
    offs_v = start + tile_offsets(TILE)
    top = tl.full(offs_v.shape, LOWEST, tl.float32)
    total = tl.zeros(offs_v.shape, tl.float32)
    for k in tl.static_range(len(teacher_ptrs)):
        t = logits_of(load_tile(teacher_ptrs[k], start, span, TILE, PART), offs_v, span, softcap, TEACHER_PROBS)
        # A teacher of weight 0 counts nothing, be it NaN.
        log2p = tl.where(shares[k] == 0, NEG_INF, softmax(t, norms[k])[1] + tl.log2(shares[k]))
        new_top = tl.maximum(top, log2p)
        total = total * tl.exp2(top - new_top) + tl.exp2(log2p - new_top)
        top = new_top
    return tl.exp2(top) * total, top + fast_log2(total)


class Sides(NamedTuple):
    """Both sides of a row after the first sweeps: all that a tile's p and q are made of, but its logits."""

    student_norm: Any
    unit_s: Any
    log_zt_zs: Any
    teacher_ptrs: Any
    shares: Any
    norms: Any
    unit_t: Any


@triton.jit
def relative_pair(
    sides,
    s,
    t,
    start,
    span,
    softcap,
    MIX_PROBS: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    """Of one tile the exponentials of both sides, each relative to its maximum, and their logits less the maximum;
    log(p z) and log(q z) with the teacher's z, which are as small as the logits are; and a key that p grows with.

    Of mixed probabilities there is no z: p itself, and log p and log q. Their teachers are loaded here.
    """
    ds = s - sides.student_norm[0]
    es = tl.exp2(ds * sides.student_norm[1])
    logq = tl.fma(ds, sides.unit_s, sides.log_zt_zs)
    if MIX_PROBS:
        et, key = mixed_softmax(
            sides.teacher_ptrs, sides.shares, sides.norms, start, span, softcap, TEACHER_PROBS, TILE, PART
        )
        dt = key
        logp = key * LN2
    else:
        key = t
        dt = key - sides.norms[0][0]
        et = tl.exp2(dt * sides.norms[0][1])
        logp = dt * sides.unit_t
    return et, logp, es, logq, dt, ds, key


@triton.jit
def new_stats(TILE: tl.constexpr):
    zeros = lane_zeros(TILE)
    LANES: tl.constexpr = TILE[1]
    lowest = tl.full([LANES], NEG_INF, tl.float32)
    first = tl.zeros([LANES], tl.int32)
    return (zeros, zeros, zeros, zeros, zeros, lowest, first, lowest, first)


@triton.jit
def add_best(best, best_at, key, offs_v):
    """The largest key of every lane and the lowest column that has it."""
    top = fold_max(key)
    at = tl.min(tl.min(tl.where(key == spread(top), offs_v, NOWHERE), axis=2), axis=0)
    take = (top > best) | ((top == best) & (at < best_at))
    return tl.where(take, top, best), tl.where(take, at, best_at)


@triton.jit
def add_stats(stats, p, logp, q, logq, s, key, offs_v):
    """Lane sums of both KLs, both entropies and the overlap, and both argmaxes."""
    new_forward, new_reverse, new_entropy_p, new_entropy_q, new_overlap = statistics_of(p, logp, q, logq)
    forward, reverse, entropy_p, entropy_q, overlap, best_s, at_s, best_t, at_t = stats
    forward += fold_sum(new_forward)
    reverse += fold_sum(new_reverse)
    entropy_p += fold_sum(new_entropy_p)
    entropy_q += fold_sum(new_entropy_q)
    overlap += fold_sum(new_overlap)
    best_s, at_s = add_best(best_s, at_s, s, offs_v)
    best_t, at_t = add_best(best_t, at_t, key, offs_v)
    return (forward, reverse, entropy_p, entropy_q, overlap, best_s, at_s, best_t, at_t)


@triton.jit
def fold_best(best, best_at):
    return tl.min(tl.where(best == tl.max(best, axis=0), best_at, NOWHERE), axis=0)


@triton.jit
def store_stats(row_ptr, divergence, ce, lse, stats, log_zt, DISTRIBUTIONS: tl.constexpr):
    """The statistics of a row. log_zt: the part that the summands' logarithms lack; DISTRIBUTIONS: p sums up to 1."""
    forward, reverse, entropy_p, entropy_q, overlap, best_s, at_s, best_t, at_t = stats
    tl.store(row_ptr, divergence)
    tl.store(row_ptr + 1, ce)
    tl.store(row_ptr + 2, lse)
    tl.store(row_ptr + 3, nonnegative(tl.sum(forward, axis=0), None, DISTRIBUTIONS))
    tl.store(row_ptr + 4, nonnegative(tl.sum(reverse, axis=0), None, DISTRIBUTIONS))
    tl.store(row_ptr + 5, tl.sum(entropy_p, axis=0) + log_zt)
    tl.store(row_ptr + 6, tl.sum(entropy_q, axis=0) + log_zt)
    tl.store(row_ptr + 7, tl.where(fold_best(best_s, at_s) == fold_best(best_t, at_t), 1.0, 0.0))
    tl.store(row_ptr + 8, tl.sum(overlap, axis=0))


@triton.jit(do_not_specialize=["L", "ignore_index"])
def dense_fwd_kernel(
    student: Logits,  # [B, L, V]
    teachers,  # a tuple of M Logits [B, L, V]
    mixture: Mixture,
    dstudent: Logits,  # [B, L, pad_width or V]
    rows: Rows,
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
    MIX_PROBS: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    SIGNED: tl.constexpr,
    OUTER: tl.constexpr,
    TILE: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    STATS: tl.constexpr = rows.stats is not None
    CE: tl.constexpr = weights.ce is not None
    # Statistics have the cross entropy too.
    LABELLED: tl.constexpr = CE or (STATS and rows.labels is not None)
    KD: tl.constexpr = weights.kd is not None
    HARD: tl.constexpr = CE or STATS or weights.z_loss is not None
    # A term of weight 0 is not computed, and its teacher not read.
    TEACHER: tl.constexpr = KD or STATS
    ONE_TEACHER: tl.constexpr = TEACHER and len(teachers) == 1
    # Standardised logits and mixed probabilities are known only after a sweep of their own, too late for online sums.
    LINEAR: tl.constexpr = TEACHER and COEFFICIENTS is not None and not STANDARDIZE and not MIX_PROBS
    # A sweep begins with the tile that the one before it has ended with, unless registers are short as it is.
    KEPT: tl.constexpr = (ONE_TEACHER and LINEAR or not TEACHER) and not STATS
    BOTH: tl.constexpr = LINEAR and has_both(COEFFICIENTS)
    if COEFFICIENTS is None:
        Q_TERMS: tl.constexpr = True
    else:
        Q_TERMS: tl.constexpr = COEFFICIENTS[2] != 0 or COEFFICIENTS[3] != 0
    # p and q may be taken relative to the teacher's largest.
    SCALED: tl.constexpr = (SCALABLE if COEFFICIENTS is None else is_homogeneous(COEFFICIENTS)) and not MIX_PROBS
    # Without terms in q the sum of the scores is a constant, so the last sweep can do what is left of the sums.
    SCORE_SUM_KNOWN: tl.constexpr = LINEAR or not (Q_TERMS or STANDARDIZE)
    PART_OF_TEACHER: tl.constexpr = rows.teacher_lse is not None and TEACHER
    VALUE_SWEEP: tl.constexpr = TEACHER and (not SCORE_SUM_KNOWN or (not GRAD and (STATS or not LINEAR)))
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]

    index = tl.program_id(0).to(tl.int64)
    skew = row_skew(student, index, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    pad_stop = span.stop if pad_width is None else end_of(skew, pad_width, TILE)
    student_ptr = grid_pointer(student, index, skew, L, TILE)
    dstudent_ptr = grid_pointer(dstudent, index, skew, L, TILE) if GRAD else None
    offs_tile = tile_offsets(TILE)
    row = begin_row(
        student_ptr,
        dstudent_ptr,
        rows,
        index=index,
        span=span,
        pad_stop=pad_stop,
        TILE=TILE,
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
    center = None
    if weights.label_smoothing is not None:
        center = smoothing_center(row.label_logit)

    teacher_ptrs = ()
    shares = ()
    for k in tl.static_range(len(teachers)):
        teacher_ptrs = teacher_ptrs + (grid_pointer(teachers[k], index, skew, L, TILE),)
        if len(teachers) > 1:
            shares = shares + (tl.load(mixture.ptr + row.index * mixture.stride_n + k * mixture.stride_m),)
        else:
            shares = shares + (1.0,)

    unit_s, unit_t, ratio = temper(row.temperature, row.teacher_temperature)
    teacher_scales = (LOG2E * unit_t,)
    pilot = 0.0
    rest_of_mean = 0.0
    deviation = 1.0
    if STANDARDIZE and TEACHER:
        # Only the deviation matters to a softmax: it acts as a temperature of the row.
        pilot, rest_of_mean, deviation = row_moments(student_ptr, V, span, student_softcap, False, TILE)
        unit_s /= deviation
        teacher_scales = ()
        mixed_weights = ()
        for k in tl.static_range(len(teacher_ptrs)):
            deviation_t = row_moments(teacher_ptrs[k], V, span, teacher_softcap, TEACHER_PROBS, TILE)[2]
            teacher_scales = teacher_scales + (LOG2E * unit_t / deviation_t,)
            mixed_weights = mixed_weights + (mul0(shares[k], 1.0 / deviation_t),)
        if len(teacher_ptrs) == 1:
            unit_t /= deviation_t
        elif not MIX_PROBS:
            shares = mixed_weights
            teacher_scales = (LOG2E * unit_t,)
    elif MIX_PROBS:
        for _k in tl.static_range(len(teacher_ptrs) - 1):
            teacher_scales = teacher_scales + (LOG2E * unit_t,)
    student_scale = LOG2E * unit_s
    # Of the sums over logits; without the teacher's logarithms the student's temperature is the better one.
    unit = unit_t
    if LINEAR:
        if COEFFICIENTS[0] == 0 and COEFFICIENTS[2] == 0:
            unit = unit_s
            ratio = 1.0

    # The sum of p: the shares of a mixture need not add up to 1.
    mass = 1.0
    if LINEAR:
        student_norm, norm, mean_p, mean_q, excess_z, hard_norm, centered_sum, raw_s, raw_t = linear_sweep(
            student_ptr,
            teacher_ptrs,
            shares,
            span=span,
            student_scale=student_scale,
            teacher_scale=teacher_scales[0],
            ratio=ratio,
            COEFFICIENTS=COEFFICIENTS,
            TILE=TILE,
            center=center,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            BOTH=BOTH,
            TEACHER_PROBS=TEACHER_PROBS,
            HARD=HARD,
            SIGNED=SIGNED,
        )
        if PART_OF_TEACHER:
            norm, nothing = elsewhere(norm)
            mean_p = tl.where(nothing, 0.0, mean_p)
        else:
            norm = defined(norm)
        norms = (norm,)
    else:
        student_norm, hard_norm, centered_sum, best_tile, raw_s = norm_sweep(
            (student_ptr,),
            (1.0,),
            span=span,
            softcap=student_softcap,
            scale=student_scale,
            TILE=TILE,
            center=center,
            HARD=HARD,
            OVERLAPPING=OVERLAPPING,
        )
        norms = ()
        if MIX_PROBS:
            mass = 0.0
            for k in tl.static_range(len(teacher_ptrs)):
                mass += shares[k]
                norm, _, _, _, _ = norm_sweep(
                    (teacher_ptrs[k],),
                    (1.0,),
                    span=span,
                    softcap=teacher_softcap,
                    scale=teacher_scales[k],
                    TILE=TILE,
                    PROBS=TEACHER_PROBS,
                )
                norms = norms + (norm,)
        elif TEACHER:
            norm, _, _, _, raw_t = norm_sweep(
                teacher_ptrs,
                shares,
                span=span,
                softcap=teacher_softcap,
                scale=teacher_scales[0],
                TILE=TILE,
                PROBS=TEACHER_PROBS,
                SIGNED=SIGNED,
            )
            if PART_OF_TEACHER:
                # p by a normaliser of its own; a sum over it is what it is.
                norm, nothing = elsewhere(norm)
                log_mass, z_elsewhere = part_of_teacher(rows, row.index, norm[0], unit_t, norm[4], nothing)
                mass = tl.exp2(log_mass * LOG2E)
                norm = (norm[0], norm[1], tl.log2(z_elsewhere), 1.0 / z_elsewhere, z_elsewhere)
            else:
                norm = defined(norm)
            norms = (norm,)

    student_norm = defined(student_norm)
    # Of the two normalisers only the ratio matters to most divergences, and near 1 it keeps what they would round.
    log_zt = 0.0
    inverse_zt = 1.0
    post = 1.0
    inverse_zs = student_norm[3]
    factor_q = inverse_zs
    if MIX_PROBS:
        log_zt_zs = -log_ratio(student_norm[4], 1.0)
    elif TEACHER:
        log_zt = log_ratio(norm[4], 1.0)
        inverse_zt = norm[3]
        log_zt_zs = log_ratio(norm[4], student_norm[4])
        if OFFSET is not None:
            overlap = 0.0
            if OVERLAPPING:
                if overlap_decides(norm[4], student_norm[4]):
                    overlap = overlap_of_tile(
                        student_ptr,
                        student_norm,
                        teacher_ptrs,
                        shares,
                        norm,
                        best_tile,
                        span,
                        student_softcap,
                        teacher_softcap,
                        TEACHER_PROBS,
                        TILE,
                        SIGNED,
                    )
            param1 = OFFSET(norm[4], student_norm[4], overlap)
        if SCALED:
            post = inverse_zt
            factor_q = tl.where(norm[4] == student_norm[4], 1.0, norm[4] * inverse_zs)
    if LINEAR:
        excess_z *= inverse_zt
        if BOTH:
            mean_p = both_mean(COEFFICIENTS, mean_p, mean_q, excess_z)
            divergence = mean_p * unit + (COEFFICIENTS[1] + COEFFICIENTS[3]) * log_zt_zs
            mean_q *= COEFFICIENTS[2]
        else:
            divergence = linear_value(COEFFICIENTS, (mean_p + mean_q) * unit, norm[4], student_norm[4], log_zt_zs)
        if PART_OF_TEACHER:
            # Linear in p: that of the distribution, and of its mass.
            log_mass, _ = part_of_teacher(rows, row.index, norm[0], unit_t, norm[4], nothing)
            mass = tl.exp2(log_mass * LOG2E)
            divergence = nonnegative(divergence, COEFFICIENTS, SCALABLE)
            divergence = mass * (divergence + COEFFICIENTS[0] * log_mass)

    if TEACHER:
        sides = Sides(student_norm, unit_s, log_zt_zs, teacher_ptrs, shares, norms, unit_t)
    num_tiles = tl.cdiv(span.stop, BLOCK_V)
    if STATS:
        stats = new_stats(TILE)
    lane_value = lane_zeros(TILE)
    score_sum = 0.0
    slope_mean = 0.0
    if OUTER:
        lane_rate = lane_zeros(TILE)
        lane_kl = lane_zeros(TILE)
        lane_of_p = lane_zeros(TILE)
    if VALUE_SWEEP:
        lane_score = lane_zeros(TILE)
        lane_slope = lane_zeros(TILE)
        lane_first = lane_zeros(TILE)
        for PART in tl.static_range(0 if KEPT else 1, parts(TILE)):
            for k in range(
                part_begin(num_tiles, PART, KEPT, TILE),
                part_end(num_tiles, PART, TILE),
                part_step(num_tiles, PART, KEPT),
            ):
                start = k * BLOCK_V
                offs_v = start + offs_tile
                if PART > 0:
                    raw_s = load_tile(student_ptr, start, span, TILE, PART)
                    if ONE_TEACHER:
                        raw_t = load_tile(teacher_ptrs[0], start, span, TILE, PART)
                s = logits_of(raw_s, offs_v, span, student_softcap, False)
                if ONE_TEACHER:
                    t = logits_of(raw_t, offs_v, span, teacher_softcap, TEACHER_PROBS)
                elif not MIX_PROBS:
                    t = load_mixed(
                        teacher_ptrs, shares, start, span, teacher_softcap, TEACHER_PROBS, TILE, PART, SIGNED
                    )
                else:
                    t = s
                et, logp, es, logq, dt, ds, key = relative_pair(
                    sides, s, t, start, span, teacher_softcap, MIX_PROBS, TEACHER_PROBS, TILE, PART
                )
                if not LINEAR:
                    q = es * factor_q
                    if SCALED or MIX_PROBS:
                        lane_value += fold_sum(
                            value_of(et, logp, q, logq, row.param, param1, COEFFICIENTS, VALUE, TOTAL)
                        )
                        if OUTER == 1 or OUTER == 2:
                            # A NaN must not lose against a number.
                            lane_rate += fold_sum(tl.where(et < q, et, q))
                        if OUTER == 2:
                            lane_kl += fold_sum(mul0(et, logp - logq))
                        if GRAD:
                            score = score_of(et, logp, q, logq, row.param, param1, COEFFICIENTS, SCORE, TOTAL)
                    else:
                        p = et * inverse_zt
                        lp = logp - log_zt
                        lq = logq - log_zt
                        lane_value += fold_sum(value_of(p, lp, q, lq, row.param, param1, COEFFICIENTS, VALUE, TOTAL))
                        if GRAD:
                            score = score_of(p, lp, q, lq, row.param, param1, COEFFICIENTS, SCORE, TOTAL)
                    if GRAD:
                        lane_score += fold_sum(score)
                        if STANDARDIZE:
                            z = tl.where(inside(offs_v, span), (s - pilot - rest_of_mean) / deviation, 0.0)
                            lane_slope += fold_sum(score * z)
                            lane_first += fold_sum(q * z)
                            if OUTER >= 2:
                                lane_of_p += fold_sum(mul0(et, z))
                if STATS:
                    stats = add_stats(stats, et * inverse_zt, logp, es * inverse_zs, logq, s, key, offs_v)
        score_sum = tl.sum(lane_score, axis=0) * post
        slope = tl.sum(lane_slope, axis=0) - score_sum * tl.sum(lane_first, axis=0)
        slope_mean = slope / tl.maximum(V - 1, 1)
    of_kl = 0.0
    if OUTER == 3:
        of_kl = rest_of(row.param)
    elif OUTER:
        distance = tl.sum(lane_value, axis=0) * post
        if PART_OF_TEACHER:
            distance += 0.5 * (1.0 - mass)
        divergence, of_kl, of_distance = outer_value(
            distance,
            tl.sum(lane_rate, axis=0) * post,
            tl.sum(lane_kl, axis=0) * post,
            row.param,
            OUTER,
        )
        score_sum *= of_distance
        slope_mean *= of_distance
    if OUTER >= 2 and STANDARDIZE and GRAD:
        slope = mass * tl.sum(lane_first, axis=0) - tl.sum(lane_of_p, axis=0)
        slope_mean += of_kl * slope / tl.maximum(V - 1, 1)

    ce, lse, hard_loss, hard_scale, lse_scale = hard_terms(
        hard_norm[0],
        log_ratio(hard_norm[4], 1.0) * LOG2E,
        row.label_logit,
        centered_sum,
        V,
        row.scale,
        weights,
        rows,
        row.index,
        LABELLED,
    )
    if KD:
        kd_scale = divergence_scale(row.scale, weights, row.temperature, rows, row.index)

    if GRAD:
        if KD:
            g_scale = kd_scale * unit_s
            if LINEAR and PART_OF_TEACHER:
                g_scale *= mass
        if LINEAR:
            # Exactly 1 for equal rows, so that their gradient is exactly 0: es - z_ratio * et with one rounding.
            z_ratio = 1.0 + excess_z
        for PART in tl.static_range(0 if KEPT else 1, parts(TILE)):
            for k in range(
                part_begin(num_tiles, PART, KEPT, TILE),
                part_end(num_tiles, PART, TILE),
                part_step(num_tiles, PART, KEPT),
            ):
                start = (num_tiles - 1 - k if VALUE_SWEEP else k) * BLOCK_V
                offs_v = start + offs_tile
                if PART > 0:
                    raw_s = load_tile(student_ptr, start, span, TILE, PART)
                    if ONE_TEACHER:
                        raw_t = load_tile(teacher_ptrs[0], start, span, TILE, PART)
                s = logits_of(raw_s, offs_v, span, student_softcap, False)
                if TEACHER:
                    if ONE_TEACHER:
                        t = logits_of(raw_t, offs_v, span, teacher_softcap, TEACHER_PROBS)
                    elif not MIX_PROBS:
                        t = load_mixed(
                            teacher_ptrs, shares, start, span, teacher_softcap, TEACHER_PROBS, TILE, PART, SIGNED
                        )
                    else:
                        t = s
                    et, logp, es, logq, dt, ds, key = relative_pair(
                        sides, s, t, start, span, teacher_softcap, MIX_PROBS, TEACHER_PROBS, TILE, PART
                    )
                if not KD:
                    g = tl.zeros(s.shape, tl.float32)
                elif LINEAR:
                    if BOTH:
                        # Where one outcome has all but 1e-8 of both, the ratio's excess over 1 is what there is.
                        g = tl.fma(et, -excess_z, es - et)
                    else:
                        g = tl.fma(et, -z_ratio, es)
                    g *= -COEFFICIENTS[1] * g_scale * inverse_zs
                    if Q_TERMS:
                        # The normalisers cancel: what is left of a logarithm is as small as the rows are near.
                        log_mix = mix_logs(COEFFICIENTS[2], dt, COEFFICIENTS[3], ds, ratio) - mean_q
                        rest = mul0(es, log_mix * (g_scale * unit * inverse_zs))
                        g = rest if COEFFICIENTS[1] == 0 else g + rest
                elif SCORE_SUM_KNOWN:
                    g = (g_scale * COEFFICIENTS[1]) * (et - es * inverse_zs * mass)
                else:
                    q = es * factor_q
                    if SCALED or MIX_PROBS:
                        score = score_of(et, logp, q, logq, row.param, param1, COEFFICIENTS, SCORE, TOTAL)
                    else:
                        lp = logp - log_zt
                        lq = logq - log_zt
                        score = score_of(et * inverse_zt, lp, q, lq, row.param, param1, COEFFICIENTS, SCORE, TOTAL)
                    if OUTER == 1 or OUTER == 2:
                        score *= of_distance
                    g = score - q * score_sum
                    if OUTER >= 2:
                        # That of forward KL by itself: beside a large logarithm it would be lost.
                        g += of_kl * (q * mass - et)
                    if STANDARDIZE:
                        g -= (s - pilot - rest_of_mean) / deviation * slope_mean
                    g *= g_scale * post
                if TEACHER and not VALUE_SWEEP:
                    # Only a linear divergence comes here without its value, and only with mixed probabilities.
                    if not LINEAR:
                        q = es * factor_q
                        lane_value += fold_sum(
                            value_of(et, logp, q, logq, row.param, param1, COEFFICIENTS, VALUE, TOTAL)
                        )
                    if STATS:
                        stats = add_stats(stats, et * inverse_zt, logp, es * inverse_zs, logq, s, key, offs_v)
                if KD:
                    g = weighed(kd_scale, g, rows)
                if CE or weights.z_loss is not None:
                    g += lse_scale * softmax(s, hard_norm)[0]
                if CE:
                    g = label_gradient(g, offs_v, skew + row.label, V, hard_scale, weights.label_smoothing)
                g = through_cap(g, s, student_softcap)
                store_tile(dstudent_ptr, start, span, g, TILE)
        if pad_width is not None:
            zero_tiles(dstudent_ptr, Span(span.stop, pad_stop), TILE)

    if not LINEAR and (OUTER == 0 or OUTER == 3):
        divergence = tl.sum(lane_value, axis=0) * post
        if PART_OF_TEACHER:
            divergence += 0.5 * (1.0 - mass)
    if not MIX_PROBS and not PART_OF_TEACHER:
        divergence = nonnegative(divergence, COEFFICIENTS, SCALABLE)
    loss = hard_loss
    if KD:
        loss += weighed(kd_scale, kd_scale * divergence, rows)
    tl.store(rows.loss + row.index, loss)
    if STATS:
        store_stats(rows.stats + row.index * NUM_STATS, divergence, ce, lse, stats, log_zt, not MIX_PROBS)


def linear_in_p(entry: divergences.TritonDivergence) -> bool:
    """True if a divergence is linear in the logarithms and has no term weighed by q."""
    return entry.linear is not None and entry.linear[2:] == (0, 0)


def _resident_load(entry: divergences.TritonDivergence, alone: bool, stats: bool) -> int:
    """The load of the cluster kernel: exponentials, those and scores, or more; alone: no term but the divergence."""
    if stats:
        return tuning.STATISTICS
    if alone and linear_in_p(entry):
        return tuning.LIGHT
    if alone and entry.linear is not None and entry.linear[:2] == (0, 0):
        return tuning.LIGHT_Q
    return tuning.MEDIUM if alone and entry.total else tuning.HEAVY


def dense_fwd(
    student: Tensor,
    teachers: Sequence[Tensor],
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_weight: Optional[Tensor],
    student_temperature_rows: Optional[Tensor],
    teacher_temperature_rows: Optional[Tensor],
    param_rows: Optional[Tensor],
    kd_weight_rows: Optional[Tensor],
    ce_weight_rows: Optional[Tensor],
    z_loss_weight_rows: Optional[Tensor],
    mixture_weights: Optional[Tensor],
    teacher_lse_rows: Optional[Tensor] = None,
    student_offsets: Optional[Tensor] = None,
    teacher_offsets: Optional[Tensor] = None,
    teacher_columns: Optional[Tensor] = None,
    *,
    divergence: str,
    param0: float,
    param1: float,
    mixture: str,
    vocab_size: int,
    ignore_index: int,
    scale: float,
    temperature: float,
    teacher_temperature: float,
    kd_weight: float,
    ce_weight: float,
    z_loss_weight: float,
    label_smoothing: float,
    scale_by_t_squared: bool,
    teacher_form: str,
    student_softcap: float,
    teacher_softcap: float,
    standardize: bool,
    stats: bool,
    student_form: str = "logits",
) -> tuple[Tensor, Tensor]:
    """Loss of every row, and its gradient where dstudent is given, in one launch.

    Args:
        student: logits [B, L, V] or [N, V] with unit last stride; rows are numbered b * L + l.
        teachers: 1 to 4 tensors of the same leading shape, each of any float dtype.
        dstudent: written, of the student's shape; may be the student itself.
        labels: int64 [N]. row_weight: fp32 [N], any stride.
        student_temperature_rows, teacher_temperature_rows, param_rows, the weights of terms: fp32 [N].
        mixture_weights: fp32 [N, M], any strides; read for more than one teacher.
        teacher_lse_rows: fp32 [N], of one teacher.
        student_offsets, teacher_offsets, teacher_columns, student_form: see ``mapped``, whose kernel has them.

    Returns:
        Loss fp32 [N], and statistics fp32 [N, 9] in the order of ``kdkernels.ops.STATS`` ([N, 0] unless asked for).
    """
    of_columns = (student_offsets, teacher_offsets, teacher_columns)
    if student_form != "logits" or any(item is not None for item in of_columns):
        return mapped_fwd(
            student,
            teachers[0],
            dstudent,
            labels,
            row_weight,
            student_temperature_rows,
            teacher_temperature_rows,
            param_rows,
            kd_weight_rows,
            ce_weight_rows,
            z_loss_weight_rows,
            *of_columns,
            divergence=divergence,
            param0=param0,
            param1=param1,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            scale=scale,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            z_loss_weight=z_loss_weight,
            label_smoothing=label_smoothing,
            scale_by_t_squared=scale_by_t_squared,
            teacher_form=teacher_form,
            student_form=student_form,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            stats=stats,
        )
    N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    row_stats = student.new_empty((N, NUM_STATS.value if stats else 0), dtype=torch.float32)
    if N == 0:
        return loss, row_stats
    entry = divergences.lookup(divergence)
    mix_probs = len(teachers) > 1 and mixture == "probs"
    # The weights of a mixture need not sum to 1.
    full = None if mix_probs else entry.full
    itemsize = max(x.element_size() for x in (student, *teachers))
    probs = teacher_form in PROBS_FORMS
    extras = ce_weight or z_loss_weight or student_softcap or teacher_softcap or probs or stats
    alone = not extras and not standardize and not entry.outer and teacher_lse_rows is None
    light = alone and entry.linear is not None and (0, 0) in (entry.linear[:2], entry.linear[2:])
    load = tuning.HEAVY if stats or mix_probs else tuning.LIGHT if light else tuning.MEDIUM
    resident_load = _resident_load(entry, alone, stats) if len(teachers) == 1 and not standardize else None
    vec, cut = vectors(vocab_size, student, *teachers, dstudent)
    arch = tuning.architecture(student.device)
    plans = tuning.dense_plans(
        vocab_size,
        itemsize,
        wide=light and len(teachers) == 1,
        vec=vec,
        cut=cut,
        gradient=dstudent is not None,
        load=load,
        resident_load=resident_load,
        arch=arch,
    )
    # Two blocks of 256 threads fit on a multiprocessor at 128 registers, and two of 512 at 64; the compiler would take
    # more, without need.
    fits_twice = resident_load == tuning.HEAVY and linear_in_p(entry) and not student_softcap
    swept_twice = alone and entry.linear is None and entry.total and not mix_probs and len(teachers) == 1
    shared: dict[str, Any] = {
        **row_arguments(student, teachers, dstudent, vocab_size),
        "teachers": tuple(logits(teacher) for teacher in teachers),
        "rows": row_tensors(
            loss,
            labels,
            row_weight,
            temperature=student_temperature_rows,
            teacher_temperature=teacher_temperature_rows,
            param=param_rows,
            kd_weight=kd_weight_rows,
            ce_weight=ce_weight_rows,
            z_loss_weight=z_loss_weight_rows,
            stats=row_stats if stats else None,
            teacher_lse=teacher_lse_rows,
        ),
        "ignore_index": ignore_index,
        "scale": scale,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "weights": term_weights(
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            z_loss_weight=z_loss_weight,
            label_smoothing=label_smoothing,
            scale_by_t_squared=scale_by_t_squared,
            stats=stats,
        ),
        "student_softcap": student_softcap or None,
        "teacher_softcap": None if probs else teacher_softcap or None,
        "param0": divergences.coded(divergence, param0),
        "param1": param1,
        "COEFFICIENTS": entry.linear,
        "VALUE": full.value if full else entry.value,
        "SCORE": full.score if full else entry.score,
        "OFFSET": full.offset if full else None,
        "OVERLAPPING": bool(full and full.overlapping),
        "TOTAL": entry.total,
        "SCALABLE": entry.scalable,
        # The plain functions of a divergence have all of it.
        "OUTER": 0 if entry.outer == 3 and full is None else entry.outer,
        "TEACHER_PROBS": probs,
        # Equal logits must give exactly 0: a product fused into one of two equal terms would leave its rounding.
        "enable_fp_fusion": False,
    }

    def launch(plan: tuning.Plan, rows: int, gradient: Logits, warmup: bool = False) -> Any:
        arguments = {**shared, "dstudent": gradient, "num_warps": plan.num_warps}
        kernel = dense_fwd_kernel
        if plan.pattern == "cluster":
            kernel = dense_cluster_fwd_kernel
            pieces, lanes, width = plan.TILE
            # By where it starts a row that is cut may end in the last piece, or in the vectors that the first has.
            ends = cut + (cut and vocab_size <= ((pieces - 1) * lanes + 1) * width)
            arguments |= {
                "N": rows,
                "TILE": (*plan.TILE, int(ends), plan.rows, plan.keep),
            }
            if plan.num_ctas > 1:
                arguments["num_ctas"] = plan.num_ctas
            if fits_twice and arch:
                arguments["maxnreg"] = 128
        else:
            arguments |= {
                "TILE": (*plan.TILE, cut),
                "mixture": mixture_argument(mixture_weights if len(teachers) > 1 else None),
                "MIX_PROBS": mix_probs,
                "STANDARDIZE": standardize,
                "SIGNED": len(teachers) > 1 and mixture == "signed",
            }
            if swept_twice and arch and not cut and plan.num_warps == 16:
                arguments["maxnreg"] = 64
        grid = (triton.cdiv(rows, plan.rows),)
        return kernel.warmup(grid=grid, **arguments) if warmup else kernel[grid](**arguments)

    def trial(plan: tuning.Plan) -> None:
        """The first rows, into a gradient that is thrown away: the real one may be the student."""
        rows = min(N, tuning.TRIAL_ROWS)
        launch(plan, rows, thrown_away(dstudent, rows, shared["L"]))

    def compiled(plan: tuning.Plan) -> Any:
        return launch(plan, N, logits(dstudent), warmup=True)

    with on_device_of(student):
        key = (divergence, vocab_size, itemsize, load, resident_load, vec, cut, dstudent is not None)
        plan = tuning.fastest(plans, key, student, N * vocab_size, trial, compiled)
        launch(plan, N, logits(dstudent))
    return loss, row_stats
