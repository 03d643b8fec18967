"""The distillation losses of Liger-Kernel.

Students come first, and as log-probabilities (``LigerKLDIVLoss``, ``LigerJSD``), as probabilities (``LigerTVDLoss``),
as logits (``LigerFusedCETVDLoss``) or as hidden states with a head (``LigerFusedLinearJSD``,
``LigerFusedLinearJSDLoss``, ``LigerFusedLinearKLDivLoss``). ``LigerFusedLinearCosineSimilarityLoss``, the angle between
logits, is not here. ``beta`` is GKD's: 0 is forward KL, 1 reverse KL. Means are over the rows whose label counts, and
no loss is multiplied by T^2. ``LigerKLDIVLoss`` takes ``eps`` first; ``liger_kl_div`` and ``liger_tvd`` reduce by
``"mean"`` where the modules take ``"mean"`` and ``"batchmean"``. ``LigerFusedLinearJSDLoss`` mixes in half a cross
entropy by default.

Where Liger is wrong or differs:

- JSD is NaN where both models have a masked token of -inf, and TVD's gradient is -0.5 where they agree in old releases;
  here they are right.
- ``LigerFusedLinearJSDLoss`` gives the padding of a student with a smaller vocabulary the logit 0, and so probability;
  here padding has none.
- Gradients are those of ``q - p``, not of the log-probability or probability itself: they are the same once they have
  gone back through ``log_softmax`` or ``softmax``. Probabilities that are none (negative, or not adding up to 1), which
  ``LigerTVDLoss`` takes, are an error or are divided by their sum.
- Logits of 16-bit hidden states are fp32 here, and rounded to 16 bits there: gradients differ by that rounding, and
  those here are nearer to fp64 (docs/guide/hidden-states.md).
- ``eps``, ``accum_dtype``, ``compiled`` and ``chunk_size`` change nothing: sums are fp32, chunks are bounded in bytes.

Source: liger-kernel 0.8.5, ``transformers/`` and ``chunked_loss/``.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks
from kdkernels.compat import _common
from kdkernels.compat.torch import kl_div

REDUCTIONS = ("none", "mean", "batchmean", "sum")


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """``liger_kernel.transformers.functional.liger_kl_div``; ``size_average`` and ``reduce`` do nothing, as there."""
    return kl_div(input, target, reduction=reduction, log_target=log_target)


class LigerKLDIVLoss(torch.nn.Module):
    """``LigerKLDIVLoss``: the first positional argument is ``eps``."""

    def __init__(
        self,
        eps: float = 1e-10,
        size_average: Optional[bool] = None,
        reduce: Optional[bool] = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.reduction, self.log_target = eps, reduction, log_target

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target)


def liger_jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Optional[Tensor] = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """``liger_jsd``: of log-probabilities, the mean over the rows that count."""
    student = _common.log_probs("input", input)
    return kd.kd_loss(
        student,
        target,
        shift_labels,
        divergence=_common.generalized_jsd(beta),
        ignore_index=ignore_index,
        teacher_form="log_probs",
        **_common.LOG_PROBS,
    )


class LigerJSD(torch.nn.Module):
    """``LigerJSD``: ``forward(log_q, log_p, shift_labels)``, the student first."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Optional[Tensor] = None) -> Tensor:
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


def liger_tvd(
    input: Tensor,
    target: Tensor,
    shift_labels: Optional[Tensor] = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """``liger_tvd``: of probabilities. ``"mean"`` divides by the rows that count and V, ``"batchmean"`` by the rows."""
    checks.choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        raise _common.no_elements("liger_tvd")
    checks.logits("input", input)
    # 0 would be a log-probability of -inf, whose gradient is 0 * inf.
    student = input.clamp_min(torch.finfo(input.dtype).tiny).log()
    loss = kd.kd_loss(
        _common.log_probs("input.log()", student),
        target,
        shift_labels,
        divergence="tvd",
        ignore_index=ignore_index,
        reduction="sum" if reduction == "sum" else "mean",
        teacher_form="probs",
        **_common.LOG_PROBS,
    )
    return loss / input.shape[-1] if reduction == "mean" else loss


class LigerTVDLoss(torch.nn.Module):
    """``LigerTVDLoss``: ``forward(p, q, shift_labels)``; ``p`` is the student, which gets the gradient."""

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Optional[Tensor] = None) -> Tensor:
        return liger_tvd(p, q, shift_labels, self.reduction, self.ignore_index)


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Optional[Tensor] = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """``liger_fused_linear_jsd``: hidden states and heads, no T^2, the mean over the rows that count."""
    return kd.linear_kd_loss(
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        shift_labels,
        divergence=_common.generalized_jsd(jsd_beta),
        ignore_index=ignore_index,
        temperature=temperature,
        scale_by_t_squared=False,
    )


class LigerFusedLinearJSD(torch.nn.Module):
    """``LigerFusedLinearJSD``."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.options = (jsd_beta, ignore_index, temperature, accum_dtype)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Optional[Tensor],
    ) -> Tensor:
        heads = student_input, student_weight, teacher_input, teacher_weight
        return liger_fused_linear_jsd(*heads, shift_labels, *self.options)


def liger_fused_linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Optional[Tensor] = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """``liger_fused_linear_kl_div``: probabilities beside hidden states and a head; the temperature is the student's.

    ``"batchmean"`` is the mean over the rows that count, ``"mean"`` divides that by the vocabulary too.
    """
    checks.choice("reduction", reduction, REDUCTIONS[1:])
    loss = kd.linear_kd_loss(
        student_input,
        student_weight,
        labels=shift_labels,
        teacher_logits=lambda rows: target[rows],
        teacher_form="probs",
        ignore_index=ignore_index,
        temperature=temperature,
        teacher_temperature=1.0,
        scale_by_t_squared=False,
        reduction="sum" if reduction == "sum" else "mean",
    )
    return loss / target.shape[-1] if reduction == "mean" else loss


class LigerFusedLinearKLDivLoss(torch.nn.Module):
    """``LigerFusedLinearKLDivLoss``."""

    def __init__(
        self,
        reduction: Optional[str] = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.options: Any = (reduction, ignore_index, temperature, eps, accum_dtype)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Optional[Tensor] = None,
    ) -> Tensor:
        return liger_fused_linear_kl_div(student_input, student_weight, target, shift_labels, *self.options)


class LigerFusedCETVDLoss(torch.nn.Module):
    """``LigerFusedCETVDLoss``: cross entropy and total variation of each row of logits, not reduced."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        rows: dict[str, Any] = {"reduction": "none", "ignore_index": self.ignore_index}
        ce = kd.kd_loss(student_logits, None, target, kd_weight=0.0, ce_weight=1.0, **rows)
        return ce, kd.kd_loss(student_logits, teacher_logits.detach(), target, divergence="tvd", **rows)


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """``LigerFusedLinearJSDLoss``: ``weight_hard_loss`` of cross entropy at T = 1 beside ``weight_soft_loss`` of JSD.

    Labels are shifted already. With ``return_soft_hard_loss`` the result is ``(loss, soft, hard)``, the latter two
    detached and unweighted.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index, self.return_soft_hard_loss = ignore_index, return_soft_hard_loss
        self.options: dict[str, Any] = {
            "divergence": _common.generalized_jsd(beta),
            "kd_weight": weight_soft_loss,
            "ce_weight": weight_hard_loss,
            "temperature": temperature,
            "scale_by_t_squared": False,
            "ignore_index": ignore_index,
        }

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Optional[Tensor] = None,
        teacher_bias: Optional[Tensor] = None,
    ) -> Union[Tensor, tuple[Tensor, Tensor, Tensor]]:
        sizes = student_weight.shape[0], teacher_weight.shape[0]
        heads = student_input, student_weight, teacher_input, teacher_weight
        options: dict[str, Any] = {"student_bias": student_bias, "teacher_bias": teacher_bias, **self.options}
        if sizes[0] != sizes[1]:
            options["vocab_size"] = min(sizes)
        if not self.return_soft_hard_loss:
            return kd.linear_kd_loss(*heads, true_labels, **options)
        loss, stats = kd.linear_kd_loss(*heads, true_labels, return_stats=True, **options)
        count = (true_labels != self.ignore_index).sum().clamp_min(1)
        return loss, stats.divergence.sum() / count, stats.ce.sum() / count
