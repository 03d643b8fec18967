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


def log_mix(logp: Tensor, logq: Tensor, weight_p: Param) -> Tensor:
    """``log(w p + (1 - w) q)`` for ``w`` in [0, 1]; -inf where both are 0, with gradient 0 there."""
    weight = weight_p.to(logp) if isinstance(weight_p, Tensor) else symbols.as_tensor(weight_p, logp.dtype, logp.device)
    dead = torch.isneginf(logp) & torch.isneginf(logq)
    zero = torch.zeros_like(logp)
    mixed = torch.logaddexp(
        torch.where(dead, zero, logp) + weight.log(), torch.where(dead, zero, logq) + (1 - weight).log()
    )
    return torch.where(dead, logp, mixed)


def over_mix(logp: Tensor, logq: Tensor, weight_p: Param) -> Tensor:
    """``log p - log(w p + (1 - w) q)``, to the last bits also where p and q are nearly the same."""
    close = (logp - logq).detach().abs() < 1
    change = torch.expm1(torch.where(close, logq - logp, torch.zeros_like(logp)))
    return torch.where(close, -torch.log1p((1 - weight_p) * change), logp - log_mix(logp, logq, weight_p))


def _forward_kl(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logp.exp(), logp - logq).sum(-1)


def _reverse_kl(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logq.exp(), logq - logp).sum(-1)


def _jsd(logp: Tensor, logq: Tensor, beta: Param, _1: Param) -> Tensor:
    of_p, of_q = over_mix(logp, logq, beta), over_mix(logq, logp, 1 - beta)
    return (beta * weighted(logp.exp(), of_p) + (1 - beta) * weighted(logq.exp(), of_q)).sum(-1)


def _tvd(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def _skew_kl(logp: Tensor, logq: Tensor, alpha: Param, _1: Param) -> Tensor:
    return weighted(logp.exp(), over_mix(logp, logq, alpha)).sum(-1)


def _skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: Param, _1: Param) -> Tensor:
    return weighted(logq.exp(), over_mix(logq, logp, alpha)).sum(-1)


def _rise(low: Tensor, high: Tensor, gap: float, size: Tensor) -> Tensor:
    """``|high - low| / gap`` of exponentials whose logarithms are ``gap * size`` apart, ``size >= 0``."""
    larger = torch.maximum(low, high)
    return weighted(larger, size) if gap == 0 else larger * -torch.expm1(-gap * size) / gap


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
    "soft_ce": _soft_ce,
    "dual_soft_ce": _dual_soft_ce,
}

# A divergence that is registered later may be negative.
BUILT_IN = frozenset(TABLE)
