"""The divergences as the Triton kernels see them: the only place under ``kernels`` that knows a name.

With teacher ``p, logp`` and student ``q, logq`` (fp32 blocks, natural logarithms, ``-inf`` where a probability is 0),
a divergence ``D = sum_v f(p, logp, q, logq)`` is given in one of two ways:

- linear in the log-probabilities: four coefficients, ``f = p (c_pp logp + c_pq logq) + q (c_qp logp + c_qq logq)``.
  The sum of the scores is then known after one sweep, so loss and gradient take two sweeps over the logits;
- a pair of ``@triton.jit`` functions ``value(p, logp, q, logq, param0, param1)`` = f and ``score(...)`` = df/dlogq
  with ``dq/dlogq = q``; three sweeps.

A term of weight 0 must count 0 whatever its logarithm is (``rows.mul0``), also where ``p`` and ``q`` underflow to 0,
and NaN must pass through. Where both logarithms are -inf the kernels count 0 without asking.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import triton
import triton.language as tl

from kdkernels.kernels.rows import LN2, LOG2E, TINY, fast_log, fast_log2, fast_reciprocal, mul0

Coefficients = tuple[float, float, float, float]


class TritonDivergence(NamedTuple):
    """Either ``linear = (c_pp, c_pq, c_qp, c_qq)`` or both ``value`` and ``score``; ``total`` as in ``register``."""

    linear: Optional[Coefficients] = None
    value: Optional[Any] = None
    score: Optional[Any] = None
    homogeneous: bool = False
    total: bool = False
    scalable: bool = False


_TABLE: dict[str, TritonDivergence] = {}


def register(
    name: str,
    *,
    linear: Optional[Coefficients] = None,
    value: Optional[Any] = None,
    score: Optional[Any] = None,
    homogeneous: bool = False,
    total: bool = False,
    scalable: bool = False,
) -> None:
    """Enter a divergence into the table, by its coefficients or by its pair of ``@triton.jit`` functions.

    Args:
        homogeneous: whether ``f(0, q) = q f(0, 1)`` and finite, so that outcomes without a teacher are known by their
            mass. Where that is not said they are computed one by one.
        total: whether both functions give 0 where p = q = 0 and both logarithms are -inf, so that the kernels need not
            see to it (four instructions an element).
        scalable: whether ``f(c p, c q) = c f(p, q)``, and the sum of f is never negative for two distributions. The
            kernels then take the row's largest p as the unit, which keeps the logarithms, and their rounding, small.

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
    _TABLE[name] = TritonDivergence(linear, value, score, homogeneous, total or linear is not None, scalable)


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


@triton.jit
def _over_mixture(wp, wq):
    """1 / m of m = wp + wq, finite where m underflows."""
    return fast_reciprocal(tl.maximum(wp + wq, TINY))


@triton.jit
def _log_share(x, inverse_m):
    """log2(x / m), finite where x is 0: its weight is 0 there."""
    return fast_log2(tl.maximum(x * inverse_m, TINY))


# With h = (q - p) / m and w = 1 - beta, f = m (beta psi(-w h) + w psi(beta h)) for psi(x) = (1 + x) log(1 + x) - x: the
# terms of first order, whose sum is 0, are left out of every element. Of the series of psi the first five terms are
# right to 1e-6 for |h| < 1/8; beyond that the logarithms of p / m and q / m are large enough themselves.
@triton.jit
def _jsd_value(p, logp, q, logq, beta, _):
    w = 1.0 - beta
    wp = beta * p
    wq = w * q
    inverse_m = _over_mixture(wp, wq)
    difference = q - p
    h = difference * inverse_m
    w2 = w * w
    beta2 = beta * beta
    c = beta * w
    c3 = c * (w2 - beta2) * (1.0 / 6.0)
    c4 = c * (w2 * w + beta2 * beta) * (1.0 / 12.0)
    c5 = c * (w2 * w2 - beta2 * beta2) * (1.0 / 20.0)
    c6 = c * (w2 * w2 * w + beta2 * beta2 * beta) * (1.0 / 30.0)
    near = difference * h * tl.fma(h, tl.fma(h, tl.fma(h, tl.fma(h, c6, c5), c4), c3), 0.5 * c)
    far = tl.fma(wp, _log_share(p, inverse_m), wq * _log_share(q, inverse_m)) * LN2
    return tl.where(tl.abs(h) < 0.125, near, far)


@triton.jit
def _jsd_score(p, logp, q, logq, beta, _):
    wq = (1.0 - beta) * q
    return wq * _log_share(q, _over_mixture(beta * p, wq)) * LN2


@triton.jit
def _tvd_value(p, logp, q, logq, _0, _1):
    return 0.5 * tl.abs(p - q)


@triton.jit
def _tvd_score(p, logp, q, logq, _0, _1):
    half = 0.5 * q
    # half * 0 where p == q keeps a NaN.
    return tl.where(q > p, half, tl.where(q < p, -half, half * 0.0))


@triton.jit
def _skew_kl_value(p, logp, q, logq, alpha, _):
    return mul0(p, logp - fast_log(alpha * p + (1.0 - alpha) * q))


@triton.jit
def _skew_kl_score(p, logp, q, logq, alpha, _):
    wq = (1.0 - alpha) * q
    m = alpha * p + wq
    return -p * tl.where(m < TINY, 0.0, wq / m)


@triton.jit
def _skew_reverse_kl_value(p, logp, q, logq, alpha, _):
    return mul0(q, logq - fast_log(alpha * q + (1.0 - alpha) * p))


@triton.jit
def _skew_reverse_kl_score(p, logp, q, logq, alpha, _):
    wq = alpha * q
    m = wq + (1.0 - alpha) * p
    return mul0(q, logq - fast_log(m) + 1.0 - tl.where(m < TINY, 0.0, wq / m))


@triton.jit
def _power(logx, exponent):
    """x ** exponent of a probability given by its logarithm; x ** 0 = 1 also at 0."""
    return tl.exp2(tl.where(exponent == 0, 0.0, logx * exponent) * LOG2E)


# With s = a + b, x = p^a q^b and d = logp - logq, the family and its limits are one form with other coefficients,
# A (p^s - x) + B (q^s - x) + D x d + E d + F d^2: a branch on a or b would keep a whole tile alive across it.
#
#             A         B         D      E      F
#   a, b, s   1/(b s)   1/(a s)
#   b = 0     -1/a^2    1/a^2     1/a
#   a = 0     1/b^2     -1/b^2    -1/b
#   s = 0     -1/a^2                     -1/a
#   a = b = 0                                   1/2
@triton.jit
def _alpha_beta_value(p, logp, q, logq, a, b):
    s = a + b
    a_is_0 = a == 0
    b_is_0 = b == 0
    s_is_0 = s == 0
    limit = a_is_0 | b_is_0
    both = a_is_0 & b_is_0
    safe_a = tl.where(a_is_0, 1.0, a)
    safe_b = tl.where(b_is_0, 1.0, b)
    safe_s = tl.where(s_is_0, 1.0, s)
    # b^2 where a = 0, a^2 where b = 0 or a + b = 0.
    square = tl.where(a_is_0, safe_b * safe_b, safe_a * safe_a)
    sign = tl.where(a_is_0, 1.0, -1.0)
    A = tl.where(both, 0.0, tl.where(limit | s_is_0, sign / square, 1.0 / (safe_b * safe_s)))
    B = tl.where(s_is_0, 0.0, tl.where(limit, -sign / square, 1.0 / (safe_a * safe_s)))
    D = tl.where(both | (limit == 0), 0.0, tl.where(a_is_0, -1.0 / safe_b, 1.0 / safe_a))
    E = tl.where(s_is_0 & (a_is_0 == 0), -1.0 / safe_a, 0.0)
    F = tl.where(both, 0.5, 0.0)
    x = mul0(_power(logp, a), _power(logq, b))
    d = logp - logq
    f = mul0(A, _power(logp, s) - x) + mul0(B, _power(logq, s) - x) + mul0(D * x, d) + mul0(E, d) + mul0(F, d * d)
    # A negative power of 0: its two infinities may have opposite signs.
    return tl.where(x == float("inf"), -(A + B) * x, f)


@triton.jit
def _alpha_beta_score(p, logp, q, logq, a, b):
    a_is_0 = a == 0
    inverse = 1.0 / tl.where(a_is_0, 1.0, a)
    x = mul0(_power(logp, a), _power(logq, b))
    limit = mul0(x, logq - logp)
    return tl.where(a_is_0, limit, (_power(logq, a + b) - x) * inverse)


register("forward_kl", linear=(1, -1, 0, 0), homogeneous=True)
register("reverse_kl", linear=(0, 0, -1, 1))
register("jeffreys", linear=(1, -1, -1, 1))
register("soft_ce", linear=(0, -1, 0, 0), homogeneous=True)
register("dual_soft_ce", linear=(0, 0, -1, 0))
_DENSITY: dict[str, bool] = {"homogeneous": True, "total": True, "scalable": True}
register("jsd", value=_jsd_value, score=_jsd_score, **_DENSITY)
register("tvd", value=_tvd_value, score=_tvd_score, **_DENSITY)
register("skew_kl", value=_skew_kl_value, score=_skew_kl_score, **_DENSITY)
register("skew_reverse_kl", value=_skew_reverse_kl_value, score=_skew_reverse_kl_score, **_DENSITY)
register("alpha_beta", value=_alpha_beta_value, score=_alpha_beta_score)
