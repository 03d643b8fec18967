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


def _forward_kl(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logp.exp(), logp - logq).sum(-1)


def _reverse_kl(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return weighted(logq.exp(), logq - logp).sum(-1)


def _jsd(logp: Tensor, logq: Tensor, beta: Param, _1: Param) -> Tensor:
    logm = log_mix(logp, logq, beta)
    return (beta * weighted(logp.exp(), logp - logm) + (1 - beta) * weighted(logq.exp(), logq - logm)).sum(-1)


def _tvd(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def _skew_kl(logp: Tensor, logq: Tensor, alpha: Param, _1: Param) -> Tensor:
    return weighted(logp.exp(), logp - log_mix(logp, logq, alpha)).sum(-1)


def _skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: Param, _1: Param) -> Tensor:
    return weighted(logq.exp(), logq - log_mix(logq, logp, alpha)).sum(-1)


def _alpha_beta(logp: Tensor, logq: Tensor, alpha: Param, beta: Param) -> Tensor:
    a, b = float(alpha), float(beta)
    p_ab, q_ab = (a * logp).exp(), (b * logq).exp()
    if a == 0.0 and b == 0.0:
        return 0.5 * (logp - logq).square().sum(-1)
    if a == 0.0:
        return (weighted(q_ab, b * (logq - logp)) - q_ab + (b * logp).exp()).sum(-1) / b**2
    if b == 0.0:
        return (weighted(p_ab, a * (logp - logq)) - p_ab + (a * logq).exp()).sum(-1) / a**2
    if a + b == 0.0:
        ratio = a * (logp - logq)
        return (ratio.exp() - ratio - 1).sum(-1) / a**2
    p_sum, q_sum = ((a + b) * logp).exp(), ((a + b) * logq).exp()
    return -(p_ab * q_ab - a / (a + b) * p_sum - b / (a + b) * q_sum).sum(-1) / (a * b)


def _jeffreys(logp: Tensor, logq: Tensor, _0: Param, _1: Param) -> Tensor:
    return _forward_kl(logp, logq, 0, 0) + _reverse_kl(logp, logq, 0, 0)


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
