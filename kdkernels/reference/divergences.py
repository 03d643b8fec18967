"""One textbook line per divergence.

Every function maps ``(logp, logq, param0, param1)``, with log-probabilities ``[N, V]`` and parameters that broadcast
against ``[N, 1]``, to the divergence of each row ``[N]``. ``0 * inf`` counts as 0, in the value and in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import torch
from torch import Tensor

from kdkernels import symbols

Param = Union[float, Tensor]
Rows = Callable[[Tensor, Tensor, Param, Param], Tensor]


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value`` where a weight of 0 silences infinities, also in the gradient."""
    return weight * torch.where(weight == 0, torch.zeros_like(value), value)


def over_mix(logp: Tensor, logq: Tensor, weight_p: Param, weight_q: Param) -> Tensor:
    """``log p - log m`` with ``m = weight_p p + weight_q q`` of weights that sum to 1; 0 where p is 0.

    It is ``-log(m / p)``, made of ``q / p`` alone, and so has its last bits where p and q are nearly the same, where
    one is far above the other, and where a weight is next to 0 or 1.
    """
    p, q = (
        weight.to(logp) if isinstance(weight, Tensor) else symbols.as_tensor(weight, logp.dtype, logp.device)
        for weight in (weight_p, weight_q)
    )
    d = torch.where(logp.exp() == 0, torch.zeros_like(logp), logq - logp)
    near = (q * torch.expm1(d)).detach().abs() < 0.5
    log_near = torch.log1p(q * torch.expm1(torch.where(near, d, torch.zeros_like(d))))
    q_is_less = d.detach() <= 0
    # Of the greater of both, so that no exponential overflows and no logarithm is that of 0.
    own, other = torch.where(q_is_less, p, q), torch.where(q_is_less, q, p)
    greater, fall = torch.where(q_is_less, torch.zeros_like(d), d), torch.where(q_is_less, d, -d)
    log_far = greater + (own + other * fall.exp()).log()
    return -torch.where(near, log_near, log_far)


def _forward_kl(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logp.exp(), logp - logq).sum(-1)


def _reverse_kl(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logq.exp(), logq - logp).sum(-1)


def _jsd(logp: Tensor, logq: Tensor, beta: Param, _1: Param) -> Tensor:
    rest = 1 - beta
    of_p, of_q = over_mix(logp, logq, beta, rest), over_mix(logq, logp, rest, beta)
    return (beta * weighted(logp.exp(), of_p) + rest * weighted(logq.exp(), of_q)).sum(-1)


def _tvd(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def _skew_kl(logp: Tensor, logq: Tensor, alpha: Param, _1: Param) -> Tensor:
    return weighted(logp.exp(), over_mix(logp, logq, alpha, 1 - alpha)).sum(-1)


def _skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: Param, _1: Param) -> Tensor:
    return weighted(logq.exp(), over_mix(logq, logp, alpha, 1 - alpha)).sum(-1)


def _rise(low: Tensor, high: Tensor, gap: float, size: Tensor) -> Tensor:
    """``|high - low| / gap`` of exponentials whose logarithms are ``gap * size`` apart, ``size >= 0``."""
    larger = torch.maximum(low, high)
    if gap == 0:
        return weighted(larger, size)
    apart = gap * size
    close = apart.detach() < 1
    # Autograd takes the slope of expm1 from its result, of which far below 0 nothing but -1 is left.
    near, far = -torch.expm1(-torch.where(close, apart, torch.zeros_like(apart))), 1 - torch.exp(-apart)
    return larger * torch.where(close, near, far) / gap


def _alpha_beta(logp: Tensor, logq: Tensor, alpha: Param, beta: Param) -> Tensor:
    """With ``d = log p - log q``, ``q^(a+b) d^2`` times the second divided difference of exp at 0, ``a d, (a+b) d``.

    It has the closed forms of the limits in it, and is the textbook form where a, b and a + b are not near 0.
    """
    a, b = float(alpha), float(beta)
    dead = torch.isneginf(logp) & torch.isneginf(logq)
    x, y = (torch.where(dead, torch.zeros_like(log), log) for log in (logp, logq))
    if a == 0.0 and b == 0.0:
        return 0.5 * (x - y).square().sum(-1)

    def power(k: float, m: float) -> Tensor:
        """``p^k q^m``, and 1 for a power of 0."""
        return (sum((w * log for w, log in ((k, x), (m, y)) if w), torch.zeros_like(x))).exp()

    nodes = [(0.0, power(0.0, a + b)), (a, power(a, b)), (a + b, power(a + b, 0.0))]
    # In order; a graph cannot sort by symbols.
    for k in (0, 1, 0):
        if nodes[k][0] > nodes[k + 1][0]:
            nodes[k], nodes[k + 1] = nodes[k + 1], nodes[k]
    (low, e_low), (middle, e_middle), (high, e_high) = nodes
    d = x - y
    close = d.detach().abs() * (high - low) < 0.5
    # Each side sees harmless numbers where the other one is taken, so that no gradient is 0 * inf.
    near, far = torch.where(close, d, torch.zeros_like(d)), torch.where(close, torch.ones_like(d), d)
    size, sign = far.abs(), far.sign()
    rise = _rise(e_middle, e_high, high - middle, size) - _rise(e_low, e_middle, middle - low, size)
    # sum of h_n(ad, (a+b)d) / (n + 2)!, h the sum of all products of n factors.
    series, h, power_of_y = torch.full_like(d, 0.5), torch.ones_like(d), torch.ones_like(d)
    factorial = 2.0
    for n in range(1, 16):
        power_of_y = power_of_y * (a * near)
        h = h * ((a + b) * near) + power_of_y
        factorial *= n + 2
        series = series + h / factorial
    infinite = torch.isinf(e_low) | torch.isinf(e_middle) | torch.isinf(e_high)
    value = torch.where(close, power(0.0, a + b) * series * near.square(), sign * rise / (high - low))
    value = torch.where(infinite, torch.full_like(value, float("inf")), value)
    return torch.where(dead, torch.zeros_like(value), value).sum(-1)


def _jeffreys(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    # One difference for both: p and q, its factors in the gradient, meet before anything else is added.
    difference = logp - logq
    return (weighted(logp.exp(), difference) - weighted(logq.exp(), difference)).sum(-1)


def _mixed_kl(logp: Tensor, logq: Tensor, reverse: Param, _1: Param) -> Tensor:
    difference = logp - logq
    return (weighted((1 - reverse) * logp.exp(), difference) - weighted(reverse * logq.exp(), difference)).sum(-1)


def _triangular(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    p, q = logp.exp(), logq.exp()
    # Its derivative divides by the sum twice.
    m = torch.where(p + q < torch.finfo(p.dtype).smallest_normal, torch.ones_like(p), p + q)
    return ((p - q) * ((p - q) / m)).sum(-1)


def acceptance(logp: Tensor, logq: Tensor) -> Tensor:
    return torch.minimum(logp.exp(), logq.exp()).sum(-1)


def negative_log_acceptance(rate: Tensor, distance: Tensor, least: Param) -> Tensor:
    """``-log max(rate, least)`` of a rate that is 1 less the distance, with the slope ``-1 / max(rate, least)``."""
    floor = torch.as_tensor(least, dtype=rate.dtype, device=rate.device).reshape(-1)
    near = distance.detach() < 0.5
    # Near 1 the rate is known by what it lacks.
    of_near = -torch.log1p(-torch.where(near, distance, torch.zeros_like(distance)))
    floored = torch.maximum(rate.detach(), floor)
    of_far = -floored.log() - (rate - rate.detach()) / floored
    return torch.where(near & (1 - distance.detach() > floor), of_near, of_far)


def _lk_nla(logp: Tensor, logq: Tensor, least: Param, _1: Param) -> Tensor:
    return negative_log_acceptance(acceptance(logp, logq), _tvd(logp, logq, 0, 0), least)


def _hybrid(kl: Tensor, rate: Tensor, distance: Tensor, eta: Param) -> Tensor:
    share = torch.exp(-eta * rate.detach())
    return share * kl + (1 - share) * distance


def _lk_hybrid(logp: Tensor, logq: Tensor, eta: Param, _1: Param) -> Tensor:
    return _hybrid(_forward_kl(logp, logq, 0, 0), acceptance(logp, logq), _tvd(logp, logq, 0, 0), eta)


def _soft_ce(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logp.exp(), -logq).sum(-1)


def _dual_soft_ce(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logq.exp(), -logp).sum(-1)


TABLE: dict[str, Rows] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "alpha_beta": _alpha_beta,
    "jeffreys": _jeffreys,
    "mixed_kl": _mixed_kl,
    "triangular": _triangular,
    "soft_ce": _soft_ce,
    "dual_soft_ce": _dual_soft_ce,
    "lk_nla": _lk_nla,
    "lk_hybrid": _lk_hybrid,
}


def _rest_of_tvd(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return 1 - acceptance(logp, logq)


def _rest_of_lk_nla(logp: Tensor, logq: Tensor, least: Param, _1: Param) -> Tensor:
    rate = acceptance(logp, logq)
    return negative_log_acceptance(rate, 1 - rate, least)


def _rest_of_lk_hybrid(logp: Tensor, logq: Tensor, eta: Param, _1: Param) -> Tensor:
    rate = acceptance(logp, logq)
    return _hybrid(_forward_kl(logp, logq, 0, 0), rate, 1 - rate, eta)


# Of a teacher with outcomes that are not here, to which the student gives nothing: sums over those that are here, and
# a distance between all outcomes.
PART_OF_TEACHER: dict[str, Rows] = {
    "forward_kl": _forward_kl,
    "soft_ce": _soft_ce,
    "tvd": _rest_of_tvd,
    "lk_nla": _rest_of_lk_nla,
    "lk_hybrid": _rest_of_lk_hybrid,
}

# A divergence that is registered later may be negative.
BUILT_IN = frozenset(TABLE)
