"""The dense pattern: loss and gradient of rows of student and teacher logits given in full, one program a row.

With a = s/T, b = t/T_t, q = softmax(a), p = softmax(b) and score = df/dlogq, the gradient of a divergence is
(score - q * sum(score)) / T. A linear divergence is summed while the first sweep finds the normalisers, so the second
sweep can write the gradient (4 reads and 1 write of [N, V] with one teacher); others need a sweep between for their
sums (6 and 1). Sweeps alternate their direction: each begins with the columns the one before it left in cache.

The launcher hands rows that fit into the registers of a cluster to ``dense_cluster`` (2 and 1); ``tuning`` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import divergences, tuning
from kdkernels.kernels.dense_cluster import dense_cluster_fwd_kernel
from kdkernels.kernels.online import defined, linear_sweep, load_teacher, student_sweep, teacher_sweep
from kdkernels.kernels.rows import (
    LN2,
    LOG2E,
    LOWEST,
    NEG_INF,
    aligned_width,
    contiguous,
    evenly_spaced,
    fast_log2,
    fold_max,
    fold_sum,
    lane_zeros,
    load_logits,
    log_ratio,
    mix_logs,
    mul0,
    num_rows,
    on_device_of,
    row_moments,
    row_offset,
    row_strides,
    soft_cap,
    softmax,
    spread,
    store_gradient,
    temper,
    tile_offsets,
    zero_columns,
)
from kdkernels.kernels.terms import (
    NOWHERE,
    NUM_STATS,
    both_mean,
    hard_terms,
    label_gradient,
    linear_value,
    nonnegative,
    overlap_decides,
    score_of,
    statistics_of,
    through_cap,
    value_of,
)

# Of the teacher's forms those that are probabilities. They need not sum to 1: a row is divided by its sum.
PROBS_FORMS = ("probs", "unnormalized_probs")


@triton.jit
def mixed_softmax(teachers, weights, norms, offs_v, V, load_width, softcap, TEACHER_PROBS: tl.constexpr):
    """p and log2 p of one tile of a mixture of probabilities."""
    top = tl.full(offs_v.shape, LOWEST, tl.float32)
    total = tl.zeros(offs_v.shape, tl.float32)
    for k in tl.static_range(len(teachers)):
        t = load_logits(teachers[k], offs_v, V, load_width, softcap, TEACHER_PROBS)
        # A teacher of weight 0 counts nothing, be it NaN.
        log2p = tl.where(weights[k] == 0, NEG_INF, softmax(t, norms[k])[1] + tl.log2(weights[k]))
        new_top = tl.maximum(top, log2p)
        total = total * tl.exp2(top - new_top) + tl.exp2(log2p - new_top)
        top = new_top
    return tl.exp2(top) * total, top + fast_log2(total)


@triton.jit
def relative_pair(
    s,
    student_norm,
    unit_s,
    log_zt_zs,
    teachers,
    weights,
    norms,
    unit_t,
    offs_v,
    V,
    load_width,
    softcap,
    MIX_PROBS: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
):
    """Of one tile the exponentials of both sides, each relative to its maximum, and their logits less the maximum;
    log(p z) and log(q z) with the teacher's z, which are as small as the logits are; and a key that p grows with.

    Of mixed probabilities there is no z: p itself, and log p and log q.
    """
    ds = s - student_norm[0]
    es = tl.exp2(ds * student_norm[1])
    logq = tl.fma(ds, unit_s, log_zt_zs)
    if MIX_PROBS:
        et, key = mixed_softmax(teachers, weights, norms, offs_v, V, load_width, softcap, TEACHER_PROBS)
        dt = key
        logp = key * LN2
    else:
        key = load_teacher(teachers, weights, offs_v, V, load_width, softcap, TEACHER_PROBS)
        dt = key - norms[0][0]
        et = tl.exp2(dt * norms[0][1])
        logp = dt * unit_t
    return et, logp, es, logq, dt, ds, key


@triton.jit
def overlap_of_tile(
    student_ptr,
    student_norm,
    teachers,
    weights,
    norm,
    start,
    V,
    load_width,
    student_softcap,
    teacher_softcap,
    TEACHER_PROBS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of one tile the sum of the products of both sides' exponentials."""
    offs_v = start + tile_offsets(TILE)
    s = load_logits(student_ptr, offs_v, V, load_width, student_softcap, False)
    t = load_teacher(teachers, weights, offs_v, V, load_width, teacher_softcap, TEACHER_PROBS)
    es = tl.exp2((s - student_norm[0]) * student_norm[1])
    et = tl.exp2((t - norm[0]) * norm[1])
    return tl.sum(fold_sum(es * et), axis=0)


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
    """log_zt: what the logarithms of the summands lack; DISTRIBUTIONS: whether p is known to sum to 1."""
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
    student_ptr,  # [B, L, V]
    teacher_ptr,  # [B, L, V], as are the three below
    teacher1_ptr,
    teacher2_ptr,
    teacher3_ptr,
    dstudent_ptr,  # [B, L, pad_width or V]
    labels_ptr,  # [N]
    row_weight_ptr,  # [N]
    temperature_ptr,  # [N]
    teacher_temperature_ptr,  # [N]
    param_ptr,  # [N]
    mixture_ptr,  # [N, M]
    loss_ptr,  # [N]
    stats_ptr,  # [N, 9]
    stride_sb,
    stride_sl,
    stride_tb,
    stride_tl,
    stride_t1b,
    stride_t1l,
    stride_t2b,
    stride_t2l,
    stride_t3b,
    stride_t3l,
    stride_db,
    stride_dl,
    stride_wn,
    stride_mn,
    stride_mm,
    L,
    V,
    load_width,
    pad_width,
    ignore_index,
    scale,
    temperature,
    teacher_temperature,
    t_squared,
    kd_weight,
    ce_weight,
    z_loss_weight,
    label_smoothing,
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
    TILE: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent_ptr is not None
    STATS: tl.constexpr = stats_ptr is not None
    CE: tl.constexpr = ce_weight is not None
    KD: tl.constexpr = kd_weight is not None
    HARD: tl.constexpr = CE or STATS or z_loss_weight is not None
    # A term of weight 0 is not computed, and its teacher not read.
    TEACHER: tl.constexpr = KD or STATS
    # Standardised logits and mixed probabilities are known only after a sweep of their own, too late for online sums.
    LINEAR: tl.constexpr = TEACHER and COEFFICIENTS is not None and not STANDARDIZE and not MIX_PROBS
    # Both Kullback-Leibler divergences at once, whose terms of first order cancel one by one.
    BOTH: tl.constexpr = (
        LINEAR
        and COEFFICIENTS[0] == -COEFFICIENTS[1]
        and COEFFICIENTS[2] == -COEFFICIENTS[3]
        and COEFFICIENTS[0] != 0
        and COEFFICIENTS[3] != 0
    )
    if COEFFICIENTS is None:
        Q_TERMS: tl.constexpr = True
        HOMOGENEOUS: tl.constexpr = SCALABLE
    else:
        Q_TERMS: tl.constexpr = COEFFICIENTS[2] != 0 or COEFFICIENTS[3] != 0
        HOMOGENEOUS: tl.constexpr = COEFFICIENTS[0] == -COEFFICIENTS[1] and COEFFICIENTS[2] == -COEFFICIENTS[3]
    # p and q may be taken relative to the teacher's largest.
    SCALED: tl.constexpr = HOMOGENEOUS and not MIX_PROBS
    # Without terms in q the sum of the scores is a constant, so the last sweep can do what is left of the sums.
    SCORE_SUM_KNOWN: tl.constexpr = LINEAR or not (Q_TERMS or STANDARDIZE)
    VALUE_SWEEP: tl.constexpr = TEACHER and (not SCORE_SUM_KNOWN or (not GRAD and (STATS or not LINEAR)))
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]

    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    student_ptr += row_offset(row, L, stride_sb, stride_sl)
    if GRAD:
        dstudent_ptr += row_offset(row, L, stride_db, stride_dl)

    if labels_ptr is not None:
        label = tl.load(labels_ptr + row64)
        if label == ignore_index:
            if GRAD:
                zero_columns(dstudent_ptr, 0, V if pad_width is None else pad_width, TILE)
            tl.store(loss_ptr + row64, 0.0)
            if STATS:
                for k in tl.static_range(NUM_STATS):
                    tl.store(stats_ptr + row64 * NUM_STATS + k, 0.0)
            return

    if row_weight_ptr is not None:
        scale *= tl.load(row_weight_ptr + row64 * stride_wn)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row64)
    if teacher_temperature_ptr is not None:
        teacher_temperature = tl.load(teacher_temperature_ptr + row64)
    if param_ptr is not None:
        param0 = tl.load(param_ptr + row64)
    center = None
    if CE:
        # A label out of range reads nothing and makes the row's loss NaN.
        label_logit = tl.load(student_ptr + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        if student_softcap is not None:
            label_logit = soft_cap(label_logit, student_softcap)
        if label_smoothing is not None:
            center = tl.where(tl.abs(label_logit) < float("inf"), label_logit, 0.0)

    teachers = (teacher_ptr + row_offset(row, L, stride_tb, stride_tl),)
    weights = (1.0,)
    if teacher1_ptr is not None:
        mixture_ptr += row64 * stride_mn
        teachers = teachers + (teacher1_ptr + row_offset(row, L, stride_t1b, stride_t1l),)
        weights = (tl.load(mixture_ptr), tl.load(mixture_ptr + stride_mm))
    if teacher2_ptr is not None:
        teachers = teachers + (teacher2_ptr + row_offset(row, L, stride_t2b, stride_t2l),)
        weights = weights + (tl.load(mixture_ptr + 2 * stride_mm),)
    if teacher3_ptr is not None:
        teachers = teachers + (teacher3_ptr + row_offset(row, L, stride_t3b, stride_t3l),)
        weights = weights + (tl.load(mixture_ptr + 3 * stride_mm),)

    unit_s, unit_t, ratio = temper(temperature, teacher_temperature)
    teacher_scales = (LOG2E * unit_t,)
    pilot = 0.0
    rest_of_mean = 0.0
    deviation = 1.0
    if STANDARDIZE and TEACHER:
        # Only the deviation matters to a softmax: it acts as a temperature of the row.
        pilot, rest_of_mean, deviation = row_moments(student_ptr, V, load_width, student_softcap, False, TILE)
        unit_s /= deviation
        teacher_scales = ()
        mixed_weights = ()
        for k in tl.static_range(len(teachers)):
            deviation_t = row_moments(teachers[k], V, load_width, teacher_softcap, TEACHER_PROBS, TILE)[2]
            teacher_scales = teacher_scales + (LOG2E * unit_t / deviation_t,)
            mixed_weights = mixed_weights + (mul0(weights[k], 1.0 / deviation_t),)
        if len(teachers) == 1:
            unit_t /= deviation_t
        elif not MIX_PROBS:
            weights = mixed_weights
            teacher_scales = (LOG2E * unit_t,)
    elif MIX_PROBS:
        for _k in tl.static_range(len(teachers) - 1):
            teacher_scales = teacher_scales + (LOG2E * unit_t,)
    student_scale = LOG2E * unit_s
    # Of the sums over logits; without the teacher's logarithms the student's temperature is the better one.
    unit = unit_t
    if LINEAR:
        if COEFFICIENTS[0] == 0 and COEFFICIENTS[2] == 0:
            unit = unit_s
            ratio = 1.0

    # The sum of p: the weights of a mixture need not add up to 1.
    mass = 1.0
    if LINEAR:
        student_norm, norm, mean_p, mean_q, excess_z, hard_norm, centered_sum = linear_sweep(
            student_ptr,
            teachers,
            weights,
            center,
            None,
            V,
            load_width,
            student_softcap,
            teacher_softcap,
            student_scale,
            teacher_scales[0],
            ratio,
            COEFFICIENTS,
            BOTH,
            TEACHER_PROBS,
            HARD,
            TILE,
        )
        norm = defined(norm)
        norms = (norm,)
    else:
        student_norm, hard_norm, centered_sum, best_tile = student_sweep(
            student_ptr, center, V, load_width, student_softcap, student_scale, HARD, OVERLAPPING, TILE
        )
        norms = ()
        if MIX_PROBS:
            mass = 0.0
            for k in tl.static_range(len(teachers)):
                mass += weights[k]
                norm = teacher_sweep(
                    (teachers[k],),
                    weights,
                    V,
                    load_width,
                    teacher_softcap,
                    teacher_scales[k],
                    TEACHER_PROBS,
                    TILE,
                )
                norms = norms + (norm,)
        elif TEACHER:
            norm = teacher_sweep(
                teachers, weights, V, load_width, teacher_softcap, teacher_scales[0], TEACHER_PROBS, TILE
            )
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
                        teachers,
                        weights,
                        norm,
                        best_tile,
                        V,
                        load_width,
                        student_softcap,
                        teacher_softcap,
                        TEACHER_PROBS,
                        TILE,
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

    offs_tile = tile_offsets(TILE)
    num_tiles = tl.cdiv(V, BLOCK_V)
    if STATS:
        stats = new_stats(TILE)
    lane_value = lane_zeros(TILE)
    score_sum = 0.0
    slope_mean = 0.0
    if VALUE_SWEEP:
        lane_score = lane_zeros(TILE)
        lane_slope = lane_zeros(TILE)
        lane_first = lane_zeros(TILE)
        for k in range(num_tiles):
            offs_v = (num_tiles - 1 - k) * BLOCK_V + offs_tile
            s = load_logits(student_ptr, offs_v, V, load_width, student_softcap, False)
            et, logp, es, logq, dt, ds, key = relative_pair(
                s,
                student_norm,
                unit_s,
                log_zt_zs,
                teachers,
                weights,
                norms,
                unit_t,
                offs_v,
                V,
                load_width,
                teacher_softcap,
                MIX_PROBS,
                TEACHER_PROBS,
            )
            if not LINEAR:
                q = es * factor_q
                if SCALED or MIX_PROBS:
                    lane_value += fold_sum(value_of(et, logp, q, logq, param0, param1, COEFFICIENTS, VALUE, TOTAL))
                    if GRAD:
                        score = score_of(et, logp, q, logq, param0, param1, COEFFICIENTS, SCORE, TOTAL)
                else:
                    p = et * inverse_zt
                    lp = logp - log_zt
                    lq = logq - log_zt
                    lane_value += fold_sum(value_of(p, lp, q, lq, param0, param1, COEFFICIENTS, VALUE, TOTAL))
                    if GRAD:
                        score = score_of(p, lp, q, lq, param0, param1, COEFFICIENTS, SCORE, TOTAL)
                if GRAD:
                    lane_score += fold_sum(score)
                    if STANDARDIZE:
                        z = tl.where(offs_v < V, (s - pilot - rest_of_mean) / deviation, 0.0)
                        lane_slope += fold_sum(score * z)
                        lane_first += fold_sum(q * z)
            if STATS:
                stats = add_stats(stats, et * inverse_zt, logp, es * inverse_zs, logq, s, key, offs_v)
        score_sum = tl.sum(lane_score, axis=0) * post
        slope = tl.sum(lane_slope, axis=0) - score_sum * tl.sum(lane_first, axis=0)
        slope_mean = slope / tl.maximum(V - 1, 1)

    ce, lse, hard_loss, hard_scale, lse_scale = hard_terms(
        hard_norm[0],
        log_ratio(hard_norm[4], 1.0) * LOG2E,
        label_logit if CE else None,
        centered_sum,
        V,
        scale,
        ce_weight,
        z_loss_weight,
        label_smoothing,
    )
    if KD:
        kd_scale = scale * kd_weight * tl.where(t_squared != 0, temperature * temperature, 1.0)

    if GRAD:
        if KD:
            g_scale = kd_scale * unit_s
        if LINEAR:
            # Exactly 1 for equal rows, so that their gradient is exactly 0: es - z_ratio * et with one rounding.
            z_ratio = 1.0 + excess_z
        for k in range(num_tiles):
            offs_v = (k if VALUE_SWEEP else num_tiles - 1 - k) * BLOCK_V + offs_tile
            s = load_logits(student_ptr, offs_v, V, load_width, student_softcap, False)
            if TEACHER:
                et, logp, es, logq, dt, ds, key = relative_pair(
                    s,
                    student_norm,
                    unit_s,
                    log_zt_zs,
                    teachers,
                    weights,
                    norms,
                    unit_t,
                    offs_v,
                    V,
                    load_width,
                    teacher_softcap,
                    MIX_PROBS,
                    TEACHER_PROBS,
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
                    g += mul0(es, log_mix * (g_scale * unit * inverse_zs))
            elif SCORE_SUM_KNOWN:
                g = (g_scale * COEFFICIENTS[1]) * (et - es * inverse_zs * mass)
            else:
                q = es * factor_q
                if SCALED or MIX_PROBS:
                    score = score_of(et, logp, q, logq, param0, param1, COEFFICIENTS, SCORE, TOTAL)
                else:
                    lp = logp - log_zt
                    lq = logq - log_zt
                    score = score_of(et * inverse_zt, lp, q, lq, param0, param1, COEFFICIENTS, SCORE, TOTAL)
                g = score - q * score_sum
                if STANDARDIZE:
                    g -= (s - pilot - rest_of_mean) / deviation * slope_mean
                g *= g_scale * post
            if TEACHER and not VALUE_SWEEP:
                # Only a linear divergence comes here without its value, and only with mixed probabilities.
                if not LINEAR:
                    q = es * factor_q
                    lane_value += fold_sum(value_of(et, logp, q, logq, param0, param1, COEFFICIENTS, VALUE, TOTAL))
                if STATS:
                    stats = add_stats(stats, et * inverse_zt, logp, es * inverse_zs, logq, s, key, offs_v)
            if CE or z_loss_weight is not None:
                g += lse_scale * softmax(s, hard_norm)[0]
            if CE:
                g = label_gradient(g, offs_v, label, V, hard_scale, label_smoothing)
            g = through_cap(g, s, student_softcap)
            store_gradient(dstudent_ptr, offs_v, g, V, pad_width)
        if pad_width is not None:
            zero_columns(dstudent_ptr, num_tiles * BLOCK_V, pad_width, TILE)

    if not LINEAR:
        divergence = tl.sum(lane_value, axis=0) * post
    if not MIX_PROBS:
        divergence = nonnegative(divergence, COEFFICIENTS, SCALABLE)
    loss = hard_loss
    if KD:
        loss += kd_scale * divergence
    tl.store(loss_ptr + row64, loss)
    if STATS:
        store_stats(stats_ptr + row64 * NUM_STATS, divergence, ce, lse, stats, log_zt, not MIX_PROBS)


def linear_in_p(entry: divergences.TritonDivergence) -> bool:
    """True if a divergence is linear in the logarithms and has no term weighed by q."""
    return entry.linear is not None and entry.linear[2:] == (0, 0)


def _resident_load(entry: divergences.TritonDivergence, plain: bool, stats: bool) -> int:
    """How much the cluster kernel keeps alive: exponentials, those and scores, or more."""
    if stats:
        return tuning.STATISTICS
    if plain and entry.linear is not None:
        return tuning.LIGHT if linear_in_p(entry) else tuning.MEDIUM
    return tuning.MEDIUM if plain and entry.total else tuning.HEAVY


def dense_fwd(
    student: Tensor,
    teachers: Sequence[Tensor],
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_weight: Optional[Tensor],
    student_temperature_rows: Optional[Tensor],
    teacher_temperature_rows: Optional[Tensor],
    param_rows: Optional[Tensor],
    mixture_weights: Optional[Tensor],
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
) -> tuple[Tensor, Tensor]:
    """Loss of every row, and its gradient where dstudent is given, in one launch.

    Args:
        student: logits [B, L, V] or [N, V] with unit last stride; rows are numbered b * L + l.
        teachers: 1 to 4 tensors of the same leading shape, each of any float dtype.
        dstudent: written, of the student's shape; may be the student itself.
        labels: int64 [N]. row_weight: fp32 [N], any stride.
        student_temperature_rows, teacher_temperature_rows, param_rows: fp32 [N].
        mixture_weights: fp32 [N, M], any strides; read for more than one teacher.

    Returns:
        Loss fp32 [N], and statistics fp32 [N, 9] in the order of ``kdkernels.ops.STATS`` ([N, 0] unless asked for).
    """
    L, N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    row_stats = student.new_empty((N, NUM_STATS.value if stats else 0), dtype=torch.float32)
    if N == 0:
        return loss, row_stats
    entry = divergences.lookup(divergence)
    teacher, teacher1, teacher2, teacher3 = (*teachers, None, None, None)[:4]
    mix_probs = len(teachers) > 1 and mixture == "probs"
    # The weights of a mixture need not sum to 1.
    full = None if mix_probs else entry.full
    itemsize = max(x.element_size() for x in (student, *teachers))
    probs = teacher_form in PROBS_FORMS
    extras = ce_weight or z_loss_weight or student_softcap or teacher_softcap or probs or stats
    plain = not extras and not standardize
    light = plain and entry.linear is not None
    load = tuning.HEAVY if stats or mix_probs else tuning.LIGHT if light else tuning.MEDIUM
    resident_load = _resident_load(entry, plain, stats) if len(teachers) == 1 and not standardize else None
    plans = tuning.dense_plans(
        vocab_size,
        itemsize,
        load=load,
        resident_load=resident_load,
        arch=tuning.architecture(student.device),
    )
    # Two blocks of 256 threads fit on a multiprocessor at 128 registers; the compiler would take more, without need.
    fits_twice = resident_load == tuning.HEAVY and linear_in_p(entry) and not student_softcap
    width = student.shape[-1]
    stride_sb, stride_sl = row_strides(student)
    stride_tb, stride_tl = row_strides(teacher)
    stride_t1b, stride_t1l = row_strides(teacher1)
    stride_t2b, stride_t2l = row_strides(teacher2)
    stride_t3b, stride_t3l = row_strides(teacher3)
    stride_db, stride_dl = row_strides(dstudent)
    stride_mn, stride_mm = (None, None) if mixture_weights is None else mixture_weights.stride()
    pad_width = None if width == vocab_size else width
    shared: dict[str, Any] = {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "labels_ptr": contiguous(labels),
        "row_weight_ptr": row_weight,
        "temperature_ptr": contiguous(student_temperature_rows),
        "teacher_temperature_ptr": contiguous(teacher_temperature_rows),
        "param_ptr": contiguous(param_rows),
        "loss_ptr": loss,
        "stats_ptr": row_stats if stats else None,
        "stride_sb": stride_sb,
        "stride_sl": stride_sl,
        "stride_tb": stride_tb,
        "stride_tl": stride_tl,
        "stride_wn": None if row_weight is None else row_weight.stride(0),
        "L": None if evenly_spaced(student, *teachers, dstudent) else L,
        "V": vocab_size,
        "load_width": aligned_width(vocab_size, student, *teachers),
        "pad_width": pad_width,
        "ignore_index": ignore_index,
        "scale": scale,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "t_squared": 1.0 if scale_by_t_squared else 0.0,
        "kd_weight": kd_weight or None,
        "ce_weight": ce_weight or None,
        "z_loss_weight": z_loss_weight or None,
        "label_smoothing": (label_smoothing or None) if ce_weight else None,
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
        "TEACHER_PROBS": probs,
        # Equal logits must give exactly 0: a product fused into one of two equal terms would leave its rounding.
        "enable_fp_fusion": False,
    }

    def launch(plan: tuning.Plan, rows: int, dstudent: Optional[Tensor]) -> None:
        stride_db, stride_dl = row_strides(dstudent)
        if plan.pattern == "cluster":
            dense_cluster_fwd_kernel[(rows,)](
                **shared,
                dstudent_ptr=dstudent,
                stride_db=stride_db,
                stride_dl=stride_dl,
                TILE=plan.TILE,
                num_warps=plan.num_warps,
                num_ctas=plan.num_ctas,
                maxnreg=128 if fits_twice else None,
            )
            return
        dense_fwd_kernel[(rows,)](
            **shared,
            dstudent_ptr=dstudent,
            stride_db=stride_db,
            stride_dl=stride_dl,
            teacher1_ptr=teacher1,
            teacher2_ptr=teacher2,
            teacher3_ptr=teacher3,
            mixture_ptr=mixture_weights if len(teachers) > 1 else None,
            stride_t1b=stride_t1b,
            stride_t1l=stride_t1l,
            stride_t2b=stride_t2b,
            stride_t2l=stride_t2l,
            stride_t3b=stride_t3b,
            stride_t3l=stride_t3l,
            stride_mn=stride_mn if len(teachers) > 1 else None,
            stride_mm=stride_mm if len(teachers) > 1 else None,
            MIX_PROBS=mix_probs,
            STANDARDIZE=standardize,
            TILE=plan.TILE,
            num_warps=plan.num_warps,
        )

    def trial(plan: tuning.Plan) -> None:
        """The first rows, into a gradient that nobody reads: the real one may be the student."""
        rows = min(N, tuning.TRIAL_ROWS)
        launch(plan, rows, None if dstudent is None else student.new_empty((rows, width)))

    with on_device_of(student):
        key = (divergence, vocab_size, itemsize, load, resident_load, dstudent is not None)
        launch(tuning.fastest(plans, key, student, N * vocab_size, trial), N, dstudent)
    return loss, row_stats
