"""``dkd_loss`` and ``kd_loss`` of mdistiller, the repository of decoupled knowledge distillation.

Logits ``(N, V)``, a mean over the batch, times T^2, all arguments positional. mdistiller's trainer adds cross entropy
with a weight of its own, and multiplies DKD by ``min(epoch / warmup, 1)``: that stays outside.

Where mdistiller is wrong: ``-1000`` masks the label, so that it comes back once another class lies 1000 below at T, and
for two classes or a sure student its logarithms of 0 give inf; here the sums leave the label out, and are finite.

Source: megvii-research/mdistiller a08d46f, ``mdistiller/distillers/DKD.py`` and ``KD.py``.
"""

from __future__ import annotations

from torch import Tensor

import kdkernels as kd


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """``dkd_loss``."""
    return kd.dkd_loss(
        logits_student,
        logits_teacher.detach(),
        target.reshape(-1),
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        reduction="batchmean",
    )


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """``kd_loss``: Hinton's, times T^2."""
    return kd.kd_loss(logits_student, logits_teacher, temperature=temperature)
