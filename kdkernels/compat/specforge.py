"""The losses of drafters in SpecForge.

``LogSoftmaxLoss`` is the cross entropy with the target's probabilities, times a mask of positions, and its mean is over
all positions, masked ones too. ``compute_acceptance_rate`` takes probabilities of the target as well; its means are
over the mask. ``compute_lk_loss`` combines numbers.

Where SpecForge is wrong: a position whose acceptance is 0 counts as one that is accepted for sure in the log rate, with
no gradient; here its log is that of the smallest float. The gradient of the acceptance is not rounded to the target's
dtype.

Source: sgl-project/SpecForge a6b6b02, ``specforge/core/loss.py`` and ``lk_loss.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks


def log_softmax_loss(logits: Tensor, target_p: Tensor, position_mask: Tensor) -> Tensor:
    """``LogSoftmaxLoss.apply``: logits and probabilities ``(B, T, V)``, a mask ``(B, T, 1)``."""
    return kd.kd_loss(
        logits,
        target_p,
        divergence="soft_ce",
        teacher_form="probs",
        row_weight=position_mask.reshape(logits.shape[:-1]).to(checks.sum_dtype(logits)),
    )


class LogSoftmaxLoss:
    """``LogSoftmaxLoss``, for its ``apply``."""

    apply = staticmethod(log_softmax_loss)


def compute_acceptance_rate(
    *,
    logits: Tensor,
    target_probs: Tensor,
    position_mask: Tensor,
    eps: float = 1e-8,
    reduce_fn: Optional[Callable[..., tuple[Tensor, Tensor]]] = None,
) -> tuple[Tensor, Tensor]:
    """``compute_acceptance_rate``: the masked means of the acceptance and of its log."""
    distance = kd.kd_loss(logits, target_probs, divergence="tvd", teacher_form="probs", reduction="none")
    rate, mask = 1 - distance, position_mask.reshape(distance.shape).to(distance.dtype)
    logs = rate.clamp_min(torch.finfo(rate.dtype).tiny).log()
    means = []
    for values in (rate, logs):
        total, count = (values * mask).sum(), mask.sum().clamp_min(eps)
        if reduce_fn is not None:
            total, count = reduce_fn(local_correct=total, local_denom=count)
        means.append(total / count.clamp_min(eps))
    return means[0], means[1]


def compute_lk_loss(
    *,
    kl_loss: Tensor,
    acceptance_rate: Tensor,
    log_acceptance_rate: Tensor,
    lk_loss_type: str,
    kl_scale: float,
    kl_decay: float,
) -> Tensor:
    """``compute_lk_loss``: "alpha" is minus the log rate, "lambda" the blend of KL and 1 less the rate."""
    checks.choice("lk_loss_type", lk_loss_type, ("alpha", "lambda"))
    if lk_loss_type == "alpha":
        return -log_acceptance_rate
    weight = kl_scale * torch.exp(-kl_decay * acceptance_rate.detach())
    return weight * kl_loss + (1 - weight) * (1 - acceptance_rate)
