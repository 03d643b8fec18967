"""Terms of the objective, from p and q: summands, scores, statistics, and the terms of the hard labels."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.kernels.rows import LN2, LOG2E, NEG_INF, combine, log_ratio, mul0

NUM_STATS = tl.constexpr(9)
# Above every column.
NOWHERE = tl.constexpr(2147483647)


@triton.constexpr_function
def is_homogeneous(coefficients):
    """A linear divergence that is a sum of p (log p - log q) and q (log q - log p), each times a number."""
    return coefficients[0] == -coefficients[1] and coefficients[2] == -coefficients[3]


@triton.constexpr_function
def has_both(coefficients):
    """Both Kullback-Leibler divergences at once: in sums of es - et their terms of first order cancel one by one."""
    return is_homogeneous(coefficients) and coefficients[0] != 0 and coefficients[3] != 0


@triton.jit
def both_dead(logp, logq):
    """Where neither side has any probability: padding, and columns that both mask with -inf."""
    return tl.maximum(logp, logq) == NEG_INF


@triton.jit
def linear_value(COEFFICIENTS: tl.constexpr, mean, z_t, z_s, log_zt_zs):
    """A linear divergence from its mean over logits less their maxima: what the normalisers add to it."""
    OF_P: tl.constexpr = COEFFICIENTS[0] + COEFFICIENTS[2]
    OF_Q: tl.constexpr = COEFFICIENTS[1] + COEFFICIENTS[3]
    if OF_P == 0:
        value = mean - OF_Q * log_ratio(z_s, 1.0)
    else:
        value = mean + OF_Q * log_zt_zs
        if OF_P + OF_Q != 0:
            value -= (OF_P + OF_Q) * log_ratio(z_t, 1.0)
    return value


@triton.jit
def both_mean(COEFFICIENTS: tl.constexpr, mean_excess, mean_q, excess_z):
    """a (mean of x over p) - b (mean of x over q) for x = log p - log q.

    mean_excess is sum((es - et) x) / zt, and excess_z (zs - zt) / zt: the mean over p less that over q is what the two
    make of second order each, where the difference of the means would be of two terms of first order.
    """
    A: tl.constexpr = COEFFICIENTS[0]
    B: tl.constexpr = COEFFICIENTS[3]
    less = mul0(excess_z, mean_q) - mean_excess
    # An infinite logarithm makes both terms infinite; their difference has the sign of the excess.
    less = tl.where(tl.abs(mean_excess) == float("inf"), -mean_excess, less)
    mean = A * less
    if A != B:
        mean += (A - B) * mean_q
    return mean


@triton.jit
def nonnegative(value, COEFFICIENTS: tl.constexpr, SCALABLE: tl.constexpr):
    """A divergence between distributions: what rounding leaves below 0 is 0, and NaN stays NaN."""
    if COEFFICIENTS is None:
        KIND: tl.constexpr = SCALABLE
    else:
        KIND: tl.constexpr = is_homogeneous(COEFFICIENTS) and COEFFICIENTS[0] >= 0 and COEFFICIENTS[3] >= 0
    if KIND:
        value = tl.where(value < 0, 0.0, value)
    return value


@triton.jit
def overlap_decides(z_t, z_s):
    """Two rows may be equal, or have most of their mass on the same few tokens."""
    return (z_t == z_s) | ((z_t < 4.0) & (z_s < 4.0))


@triton.jit
def value_of(p, logp, q, logq, param0, param1, COEFFICIENTS: tl.constexpr, VALUE: tl.constexpr, TOTAL: tl.constexpr):
    """The divergence's summand; TOTAL as in ``divergences.register``."""
    if COEFFICIENTS is None:
        f = VALUE(p, logp, q, logq, param0, param1)
    else:
        f = tl.zeros(p.shape, tl.float32)
        if COEFFICIENTS[0] != 0 or COEFFICIENTS[1] != 0:
            f += mul0(p, combine(COEFFICIENTS[0], logp, COEFFICIENTS[1], logq))
        if COEFFICIENTS[2] != 0 or COEFFICIENTS[3] != 0:
            f += mul0(q, combine(COEFFICIENTS[2], logp, COEFFICIENTS[3], logq))
    if not TOTAL:
        f = tl.where(both_dead(logp, logq), 0.0, f)
    return f


@triton.jit
def score_of(p, logp, q, logq, param0, param1, COEFFICIENTS: tl.constexpr, SCORE: tl.constexpr, TOTAL: tl.constexpr):
    """Derivative of the summand by logq."""
    if COEFFICIENTS is None:
        f = SCORE(p, logp, q, logq, param0, param1)
    else:
        f = COEFFICIENTS[1] * p + COEFFICIENTS[3] * q
        if COEFFICIENTS[2] != 0 or COEFFICIENTS[3] != 0:
            f += mul0(q, combine(COEFFICIENTS[2], logp, COEFFICIENTS[3], logq))
    if not TOTAL:
        f = tl.where(both_dead(logp, logq), 0.0, f)
    return f


@triton.jit
def statistics_of(p, logp, q, logq):
    """Summands of both KLs, both entropies and the overlap."""
    dead = both_dead(logp, logq)
    forward = tl.where(dead, 0.0, mul0(p, logp - logq))
    reverse = tl.where(dead, 0.0, mul0(q, logq - logp))
    # A NaN must not lose against a number.
    return forward, reverse, -mul0(p, logp), -mul0(q, logq), tl.where(p < q, p, q)


@triton.jit
def outer_value(distance, rate, kl, param, OUTER: tl.constexpr):
    """The value of ``lk_loss`` from a row's TVD, acceptance rate and KL; the factors of the gradients of KL and TVD.

    OUTER 1: -log of the rate, which counts as no less than param. 2: KL by exp(-param rate), and TVD by the rest.
    """
    if OUTER == 2:
        of_kl = tl.exp2(rate * (-LOG2E * param))
        of_distance = 1.0 - of_kl
        value = of_kl * kl + of_distance * distance
    else:
        near = distance < 0.5
        d = tl.where(near, distance, 0.5)
        rate = tl.where(near, 1.0 - d, rate)
        # -log(1 - d); near 1 the rate is known by what it lacks.
        series = tl.fma(d, tl.fma(d, tl.fma(d, tl.fma(d, 1.0 / 6, 0.2), 0.25), 1.0 / 3), 0.5)
        of_near = tl.where(d < 0.0625, tl.fma(d * d, series, d), -tl.log2(1.0 - d) * LN2)
        above = rate > param
        rate = tl.maximum(rate, param)
        value = tl.where(near & above, of_near, -tl.log2(rate) * LN2)
        # A NaN is no rate.
        nothing = distance - distance
        value += nothing
        of_kl = 0.0
        of_distance = 1.0 / rate + nothing
    return value, of_kl, of_distance


@triton.jit
def rest_of(code):
    """1 less a fraction, from what ``divergences.coded`` gave, or from the fraction itself."""
    return tl.where(code < 0, -code, 1.0 - code)


@triton.jit
def part_of_teacher(rows, index, top, unit, z, nothing, exists=None):
    """Of a teacher that is normalised elsewhere the log of its mass here, and the z that its p is made by.

    top and z: its largest logit here, and the sum of the exponentials relative to that; unit: 1 / T_t; nothing: all its
    logits are -inf, and the log a number that no mass is left of.
    """
    log_z = tl.load(rows.teacher_lse + index, mask=exists) - top * unit
    # Far above the logits here all p are nothing, but no z is infinite.
    within = tl.minimum(tl.maximum(log_z, -80.0), 80.0)
    return tl.where(nothing, -200.0, log_ratio(z, 1.0) - log_z), tl.exp2(within * LOG2E)


@triton.jit
def smoothing_center(label_logit):
    """Subtracted from logits before smoothed labels add them up: their offset is not lost in the sum."""
    return tl.where(tl.abs(label_logit) < float("inf"), label_logit, 0.0)


@triton.jit
def divergence_scale(scale, weights, temperature, rows, index, exists=None):
    """The factor of the divergence in the loss."""
    if rows.kd_weight is not None:
        scale *= tl.load(rows.kd_weight + index, mask=exists)
    return scale * weights.kd * tl.where(weights.t_squared != 0, temperature * temperature, 1.0)


@triton.jit
def weighed(scale, x, rows):
    """A row's divergence or its gradient where its weight, which scale has, is not 0; it may be NaN where that is."""
    if rows.kd_weight is not None:
        x = tl.where(scale != 0, x, 0.0)
    return x


@triton.jit
def hard_terms(
    top, log2_z, label_logit, centered_sum, V, scale, weights, rows, index, LABELLED: tl.constexpr, exists=None
):
    """Cross entropy, logsumexp, loss of the hard terms, and the factors of the label's and the softmax's gradient."""
    lse = top + log2_z * LN2
    ce = 0.0
    hard_scale = 0.0
    hard_loss = 0.0
    if LABELLED:
        ce = top - label_logit + log2_z * LN2
        if weights.label_smoothing is not None:
            ce -= weights.label_smoothing * centered_sum / V
    if weights.ce is not None:
        hard_scale = scale * weights.ce
        if rows.ce_weight is not None:
            hard_scale *= tl.load(rows.ce_weight + index, mask=exists)
        hard_loss = hard_scale * ce
    lse_scale = hard_scale
    if weights.z_loss is not None:
        z_scale = scale * weights.z_loss
        if rows.z_loss_weight is not None:
            z_scale *= tl.load(rows.z_loss_weight + index, mask=exists)
        hard_loss += z_scale * lse * lse
        lse_scale += 2.0 * z_scale * lse
    return ce, lse, hard_loss, hard_scale, lse_scale


@triton.jit
def label_gradient(g, offs_v, label, V, hard_scale, label_smoothing):
    """g less the target distribution of cross entropy."""
    if label_smoothing is None:
        g -= tl.where(offs_v == label, hard_scale, 0.0)
    else:
        g -= tl.where(offs_v == label, hard_scale * (1.0 - label_smoothing), 0.0)
        g -= hard_scale * label_smoothing / V
    return g


@triton.jit
def through_cap(g, s, softcap):
    """The gradient in logits before the softcap, s being those after it."""
    if softcap is not None:
        g *= 1.0 - (s / softcap) * (s / softcap)
    return g
