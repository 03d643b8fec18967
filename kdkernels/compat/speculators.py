"""The losses of drafters in speculators: one number per position, from logits at temperature 1.

``tv_loss`` is 1 less the rate at which a draft is accepted, ``neg_log_acceptance_loss`` the negative log of that rate
(at least 1e-5, as there), ``lk_hybrid_loss`` (arXiv:2602.23881) blends KL and TV by a weight that the rate decides, and
``ce_loss`` takes the target's most likely token as the label. The target gets no gradient.

Where speculators is wrong: tokens of logit -inf, as masked vocabularies have them, give NaN; here they count nothing.

Source: speculators 0.9.0, ``losses/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kdkernels as kd

LEAST_ACCEPTANCE = 1e-5


def kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``kl_div_loss``."""
    return kd.kd_loss(logits, targets.detach(), reduction="none")


def reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``reverse_kl_div_loss``."""
    return kd.kd_loss(logits, targets.detach(), divergence="reverse_kl", reduction="none")


def js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``js_div_loss``."""
    return kd.kd_loss(logits, targets.detach(), divergence="jsd", reduction="none")


def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``ce_loss``: of the target's most likely token."""
    return kd.kd_loss(logits, labels=targets.argmax(-1), kd_weight=0.0, ce_weight=1.0, reduction="none")


def tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``tv_loss``."""
    return kd.kd_loss(logits, targets.detach(), divergence="tvd", reduction="none")


def neg_log_acceptance_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``neg_log_acceptance_loss``."""
    return -(1 - tv_loss(logits, targets)).clamp_min(LEAST_ACCEPTANCE).log()


def lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    """``lk_hybrid_loss``: ``w KL + (1 - w) TV`` with ``w = exp(-eta acceptance)``."""
    distance = tv_loss(logits, targets)
    weight = torch.exp(-eta * (1 - distance.detach()))
    return weight * kl_div_loss(logits, targets) + (1 - weight) * distance
