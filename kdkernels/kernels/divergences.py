"""The divergences as the Triton kernels see them: the only place under ``kernels`` that knows a name.

With teacher ``p, logp`` and student ``q, logq`` (fp32 blocks, natural logarithms, ``-inf`` where a probability is 0),
a divergence ``D = sum_v f(p, logp, q, logq)`` is given in one of two ways:

- linear in the log-probabilities: four coefficients, ``f = p (c_pp logp + c_pq logq) + q (c_qp logp + c_qq logq)``.
  The sum of the scores is then known after one sweep, so loss and gradient take two sweeps over the logits;
- a pair of ``@triton.jit`` functions ``value(p, logp, q, logq, param0, param1)`` = f and ``score(...)`` = df/dlogq
  with ``dq/dlogq = q``; three sweeps. Where p and q are known to be distributions, which the dense kernels know of
  logits, both may leave out what sums up to nothing then, see ``Full``.

A term of weight 0 must count 0 whatever its logarithm is (``rows.mul0``), also where ``p`` and ``q`` underflow to 0,
and NaN must pass through. Where both logarithms are -inf the kernels count 0 without asking.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import triton
import triton.language as tl

from kdkernels.divergences import by_name
from kdkernels.kernels.rows import LN2, LOG2E, LOWEST, TINY, fast_log, fast_log2, fast_reciprocal, mul0, step_of
from kdkernels.kernels.terms import overlap_decides

Coefficients = tuple[float, float, float, float]


class Full(NamedTuple):
    """A pair of functions that may assume that p and q sum up to the same.

    The value may then have any multiple of q - p in it, and the score any multiple of q: neither changes the loss or a
    gradient, and what cancels depends on them. ``offset(z_t, z_s, overlap)``, a number of the row, is handed to both in
    place of param1: from the sums of both sides' exponentials, of which the largest is 1, and, with ``overlapping``,
    the sum of their products, or the part of it around the student's largest, where ``terms.overlap_decides``.
    """

    value: Any
    score: Any
    offset: Any
    overlapping: bool = False


class TritonDivergence(NamedTuple):
    """Either ``linear = (c_pp, c_pq, c_qp, c_qq)`` or both ``value`` and ``score``; ``total`` and ``full`` as in
    ``register``. The others are flags of the divergence's class.
    """

    linear: Optional[Coefficients] = None
    value: Optional[Any] = None
    score: Optional[Any] = None
    linear_without_teacher: bool = False
    total: bool = False
    # The kernels take the row's largest p as the unit, which keeps logarithms, and their rounding, small.
    scalable: bool = False
    full: Optional[Full] = None
    # The function of the distance before its gradient, see terms.outer_value; or 3: the full pair's score lacks forward
    # KL's part, which weighs 1 less the row's parameter.
    outer: int = 0


_TABLE: dict[str, TritonDivergence] = {}
# Divergences whose functions ask ``_fractions``.
_FRACTIONS = frozenset({"jsd", "skew_kl", "skew_reverse_kl", "mixed_kl"})


def register(
    name: str,
    *,
    linear: Optional[Coefficients] = None,
    value: Optional[Any] = None,
    score: Optional[Any] = None,
    total: bool = False,
    full: Optional[Full] = None,
    outer: int = 0,
) -> None:
    """Enter a divergence into the table, by its coefficients or by its pair of ``@triton.jit`` functions.

    Args:
        total: whether both functions give 0 where p = q = 0 and both logarithms are -inf, so that the kernels need not
            see to it (four instructions an element).
        full: the pair of functions to take where both sides are known to be distributions.
        outer: what is made of their sum, see ``terms.outer_value``; 0 for the sum itself.

    Raises:
        ValueError: when the name is taken, or when not exactly one of the two forms is given.
    """
    if name in _TABLE:
        raise ValueError(f"divergence {name!r} is registered already")
    if (linear is None) == (value is None) or (value is None) != (score is None):
        raise ValueError(f"divergence {name!r} needs either linear coefficients or both value and score")
    if linear is not None:
        c_pp, c_pq, c_qp, c_qq = (float(c) for c in linear)
        linear = (c_pp, c_pq, c_qp, c_qq)
    cls = by_name(name)
    total = total or linear is not None
    scalable = cls.homogeneous and linear is None
    _TABLE[name] = TritonDivergence(linear, value, score, cls.linear_without_teacher, total, scalable, full, outer)


def remove(name: str) -> None:
    """Take a registered divergence out of the table."""
    del _TABLE[name]


def lookup(name: str) -> TritonDivergence:
    """The entry of a name.

    Raises:
        ValueError: for a name that has no entry.
    """
    if name not in _TABLE:
        raise ValueError(
            f"divergence {name!r} has no Triton functions: pass them to register(), or use another backend"
        )
    return _TABLE[name]


def names() -> tuple[str, ...]:
    return tuple(_TABLE)


def coded(name: str, param0: float) -> float:
    """A divergence's first number as its functions take it.

    Of a fraction above 1/2 the kernels are told the other one with a minus sign: next to 1, ``1 - param0`` of a number
    in fp32 would be little but its rounding.
    """
    rest = 1.0 - param0
    return -rest if name in _FRACTIONS and param0 > 0.5 and rest > 0 else param0


@triton.jit
def _fractions(code):
    """A fraction and 1 less it, from what ``coded`` gave, or from the fraction itself."""
    return tl.where(code < 0, 1.0 + code, code), tl.where(code < 0, -code, 1.0 - code)


@triton.jit
def _over_mixture(wp, p, wq, q):
    """1 / m of m = wp p + wq q, finite where m underflows."""
    return fast_reciprocal(tl.fma(q, wq, tl.fma(p, wp, TINY)))


@triton.jit
def _log_share(x, inverse_m):
    """log2(x / m), finite where x is 0: its weight is 0 there."""
    return fast_log2(tl.fma(x, inverse_m, TINY))


# With h = (q - p) / m and w = 1 - beta, f = m (beta psi(-w h) + w psi(beta h)) for psi(x) = (1 + x) log(1 + x) - x: the
# terms of first order, whose sum is 0, are left out of every element. Of the series the first four terms are
# right to 1e-6 for |h| < 1/8 and beta = 1/2; beyond that the logarithms of p / m and q / m are large enough themselves.
@triton.jit
def _jsd_value(p, logp, q, logq, code, _):
    beta, w = _fractions(code)
    inverse_m = _over_mixture(beta, p, w, q)
    difference = q - p
    h = difference * inverse_m
    w2 = w * w
    beta2 = beta * beta
    c = beta * w
    c3 = c * (w2 - beta2) * (1.0 / 6.0)
    c4 = c * (w2 * w + beta2 * beta) * (1.0 / 12.0)
    c5 = c * (w2 * w2 - beta2 * beta2) * (1.0 / 20.0)
    near = difference * h * tl.fma(h, tl.fma(h, tl.fma(h, c5, c4), c3), 0.5 * c)
    far = tl.fma(p * (beta * LN2), _log_share(p, inverse_m), q * (w * LN2) * _log_share(q, inverse_m))
    return tl.where(tl.abs(h) < 0.125, near, far)


@triton.jit
def _jsd_score(p, logp, q, logq, code, _):
    beta, w = _fractions(code)
    return q * (w * LN2) * _log_share(q, _over_mixture(beta, p, w, q))


@triton.jit
def _tvd_value(p, logp, q, logq, _0, _1):
    return 0.5 * tl.abs(p - q)


@triton.jit
def _tvd_score(p, logp, q, logq, _, offset):
    """q times the sign of q - p over 2, and an offset."""
    # 0 times a NaN of q is one.
    return q * ((offset + 0.5) - step_of(p - q))


@triton.jit
def _tvd_offset(z_t, z_s, _):
    """So that the score is exactly 0 where q is above p: of models that hardly overlap the mean is then nothing either.
    None for equal rows, whose scores are 0 as they are."""
    return tl.where(z_t == z_s, 0.0, -0.5)


@triton.jit
def _skew_kl_value(p, logp, q, logq, code, _):
    alpha, w = _fractions(code)
    return mul0(p, logp - fast_log(alpha * p + w * q))


@triton.jit
def _skew_kl_score(p, logp, q, logq, code, _):
    alpha, w = _fractions(code)
    wq = w * q
    m = alpha * p + wq
    return -p * tl.where(m < TINY, 0.0, wq / m)


@triton.jit
def _skew_reverse_kl_value(p, logp, q, logq, code, _):
    alpha, w = _fractions(code)
    return mul0(q, logq - fast_log(alpha * q + w * p))


@triton.jit
def _skew_reverse_kl_score(p, logp, q, logq, code, _):
    alpha, w = _fractions(code)
    wq = alpha * q
    m = wq + w * p
    return mul0(q, logq - fast_log(m) + 1.0 - tl.where(m < TINY, 0.0, wq / m))


@triton.jit
def _less_first_order(weight, log2_share, x, first):
    """weight log2_share - first, which is m psi(x) for a share of 1 + x, first = m x, psi(x) = (1 + x) log(1 + x) - x.

    Near 0 psi is its series, of which the last two terms are spread over the others: right to 4e-6 for |x| < 1/8.
    """
    series = tl.fma(x, tl.fma(x, tl.fma(x, -0.050465, 0.083854), -1.0 / 6.0), 0.5)
    return tl.where(tl.abs(x) < 0.125, first * x * series, tl.fma(weight, log2_share, -first))


@triton.jit
def _skew_kl_full_value(p, logp, q, logq, code, _):
    alpha, w = _fractions(code)
    inverse_m = _over_mixture(alpha, p, w, q)
    first = (p - q) * w
    return _less_first_order(p * LN2, _log_share(p, inverse_m), first * inverse_m, first)


@triton.jit
def _skew_kl_full_score(p, logp, q, logq, code, offset):
    """-w p q / m, and where the offset is 1 that and w q: w^2 (q - p) q / m."""
    alpha, w = _fractions(code)
    numerator = tl.fma((p - q) * w, -w * offset, p * (w * (offset - 1.0)))
    return q * _over_mixture(alpha, p, w, q) * numerator


@triton.jit
def _skew_kl_offset(z_t, z_s, overlap):
    """1 for equal rows, and where few tokens have most of both: the score is nearly a multiple of q there. Where p and
    q do not overlap it is nothing as it is."""
    return tl.where((overlap > 0.25) & overlap_decides(z_t, z_s), 1.0, 0.0)


@triton.jit
def _skew_reverse_kl_full_value(p, logp, q, logq, code, _):
    alpha, w = _fractions(code)
    inverse_m = _over_mixture(w, p, alpha, q)
    first = (q - p) * w
    return _less_first_order(q * LN2, _log_share(q, inverse_m), first * inverse_m, first)


@triton.jit
def _skew_reverse_kl_full_score(p, logp, q, logq, code, _):
    """Less w q: where p and q are near each other nothing is left of first order but the difference."""
    alpha, w = _fractions(code)
    inverse_m = _over_mixture(w, p, alpha, q)
    x = (q - p) * w * inverse_m
    return (q * LN2) * tl.fma(x, -alpha * LOG2E, _log_share(q, inverse_m))


@triton.jit
def _mixed_kl_value(p, logp, q, logq, code, _):
    r, w = _fractions(code)
    return mul0(p * w, logp - logq) + mul0(q * r, logq - logp)


@triton.jit
def _mixed_kl_score(p, logp, q, logq, code, _):
    r, w = _fractions(code)
    wq = q * r
    return mul0(wq, logq - logp) + (wq - p * w)


@triton.jit
def _mixed_kl_full_value(p, logp, q, logq, code, _):
    """Of d = log q - log p the sum of p (e^d - 1 - d) and q (e^-d - 1 + d), each by its weight: none is below 0."""
    r, w = _fractions(code)
    difference = q - p
    far = mul0(q * r, logq - logp) - mul0(p * w, logq - logp) + (w - r) * difference
    d = tl.where((p == 0) | (q == 0), 1.0, logq - logp)
    # p (e^d - 1 - d) = p d^2 (1/2 + d/6 + ..), q (e^-d - 1 + d) = p d^2 (1/2 + d/3 + ..).
    rising = tl.fma(d, tl.fma(d, tl.fma(d, 1.0 / 120, 1.0 / 24), 1.0 / 6), 0.5)
    falling = tl.fma(d, tl.fma(d, tl.fma(d, 1.0 / 30, 1.0 / 8), 1.0 / 3), 0.5)
    return tl.where(tl.abs(d) < 0.125, p * d * d * tl.fma(r, falling, w * rising), far)


@triton.jit
def _mixed_kl_full_score(p, logp, q, logq, code, _):
    """That of reverse KL, less a multiple of q; the kernels add the gradient of forward KL (outer)."""
    r, _ = _fractions(code)
    return mul0(q * r, logq - logp)


@triton.jit
def _triangular_value(p, logp, q, logq, _0, _1):
    difference = q - p
    return difference * difference * fast_reciprocal(p + q + TINY)


@triton.jit
def _triangular_score(p, logp, q, logq, _0, _1):
    inverse = fast_reciprocal(p + q + TINY)
    return q * ((q - p) * inverse) * tl.fma(p * inverse, 2.0, (p + q) * inverse)


@triton.jit
def _no_offset(z_t, z_s, _):
    return 0.0


@triton.jit
def _powers(a, logp, b, logq):
    """p^a q^b in one exponential, of two probabilities given by their logarithms; x^0 = 1 also at 0."""
    logp = tl.maximum(logp, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    logq = tl.maximum(logq, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(tl.fma(logp, a * LOG2E, logq * (b * LOG2E)))


@triton.jit
def _power(a, logp):
    """p^a."""
    return tl.exp2(tl.maximum(logp, LOWEST, propagate_nan=tl.PropagateNan.ALL) * (a * LOG2E))


@triton.jit
def _slope(low, high, k, d):
    """(high - low) / k, where high = low exp(k d): also where k d is near 0, and low d where k is 0."""
    g = tl.where(k == 0, 0.0, k * d)
    series = tl.fma(g, tl.fma(g, tl.fma(g, tl.fma(g, 1.0 / 720, 1.0 / 120), 1.0 / 24), 1.0 / 6), 0.5)
    near = mul0(low, d * tl.fma(g, series, 1.0))
    return tl.where(tl.abs(g) < 0.3, near, (high - low) * (1.0 / tl.where(k == 0, 1.0, k)))


# With s = a + b and d = logp - logq, f = q^s d^2 exp[0, a d, s d], the second divided difference of exp: of the family
# and its limits (a, b or s = 0) alike, and never negative. Near each other it is its series about the mean of the three
# nodes. Apart it is a difference of two slopes, from the node in the middle to the one at the greater distance, which
# cannot cancel then, and to the other, which can.
@triton.jit
def _alpha_beta_value(p, logp, q, logq, a, b):
    s = a + b
    d = logp - logq
    # Distances between 0, a and s are |a|, |b| and |s|; the middle node is opposite the greatest.
    middle_is_0 = (tl.abs(b) >= tl.abs(a)) & (tl.abs(b) >= tl.abs(s))
    middle_is_a = (middle_is_0 == 0) & (tl.abs(s) >= tl.abs(a))
    middle = tl.where(middle_is_0, 0.0, tl.where(middle_is_a, a, s))
    distance_0 = tl.abs(middle)
    distance_a = tl.abs(a - middle)
    distance_s = tl.abs(s - middle)
    far_is_0 = (distance_0 >= distance_a) & (distance_0 >= distance_s)
    far_is_a = (far_is_0 == 0) & (distance_a >= distance_s)
    near_is_0 = (middle_is_0 == 0) & (far_is_0 == 0)
    near_is_a = (middle_is_a == 0) & (far_is_a == 0)
    k_far = tl.where(far_is_0, 0.0, tl.where(far_is_a, a, s))
    k_near = tl.where(near_is_0, 0.0, tl.where(near_is_a, a, s))
    w_middle = _powers(middle, logp, s - middle, logq)
    w_far = _powers(k_far, logp, s - k_far, logq)
    w_near = _powers(k_near, logp, s - k_near, logq)
    width = k_far - k_near
    safe = tl.where(width == 0, 1.0, width)
    slope = (w_far - w_middle) * (1.0 / tl.where(k_far == middle, 1.0, k_far - middle))
    apart = (slope - _slope(w_middle, w_near, k_near - middle, d)) * (1.0 / safe)
    # Of two infinite powers the greater counts.
    apart = tl.where((apart != apart) & (d == d), float("inf"), apart)

    mean = (a + s) * (1.0 / 3.0)
    u0, ua, us = -mean, a - mean, s - mean
    e2 = u0 * ua + ua * us + us * u0
    e3 = u0 * ua * us
    y = tl.where(width == 0, 0.0, d)
    series = tl.fma(y, -e2 * e3 * (1.0 / 2520), e2 * e2 * (1.0 / 720))
    series = tl.fma(y, tl.fma(y, series, e3 * (1.0 / 120)), -e2 * (1.0 / 24))
    near = _powers(mean, logp, s - mean, logq) * d * d * tl.fma(y * y, series, 0.5)
    return tl.where(tl.abs(width * y) < 1.0, near, apart)


@triton.jit
def _alpha_beta_score(p, logp, q, logq, a, b):
    # The slope between the nodes 0 and a.
    return -_slope(_power(a + b, logq), _powers(a, logp, b, logq), a, logp - logq)


register("forward_kl", linear=(1, -1, 0, 0))
register("reverse_kl", linear=(0, 0, -1, 1))
register("jeffreys", linear=(1, -1, -1, 1))
register("soft_ce", linear=(0, -1, 0, 0))
register("dual_soft_ce", linear=(0, 0, -1, 0))
register("jsd", value=_jsd_value, score=_jsd_score, total=True)
register("tvd", value=_tvd_value, score=_tvd_score, full=Full(_tvd_value, _tvd_score, _tvd_offset), total=True)
register(
    "skew_kl",
    value=_skew_kl_value,
    score=_skew_kl_score,
    full=Full(_skew_kl_full_value, _skew_kl_full_score, _skew_kl_offset, overlapping=True),
    total=True,
)
register(
    "skew_reverse_kl",
    value=_skew_reverse_kl_value,
    score=_skew_reverse_kl_score,
    full=Full(_skew_reverse_kl_full_value, _skew_reverse_kl_full_score, _no_offset),
    total=True,
)
register(
    "mixed_kl",
    value=_mixed_kl_value,
    score=_mixed_kl_score,
    full=Full(_mixed_kl_full_value, _mixed_kl_full_score, _no_offset),
    total=True,
    outer=3,
)
register("triangular", value=_triangular_value, score=_triangular_score, total=True)
_TVD = Full(_tvd_value, _tvd_score, _tvd_offset)
register("lk_nla", value=_tvd_value, score=_tvd_score, full=_TVD, total=True, outer=1)
register("lk_hybrid", value=_tvd_value, score=_tvd_score, full=_TVD, total=True, outer=2)
register("alpha_beta", value=_alpha_beta_value, score=_alpha_beta_score)
