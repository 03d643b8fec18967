"""The losses of logits of NVIDIA's Model Optimizer (``modelopt.torch.distill``).

Forward KL of logits, times T^2, with the reductions of ``F.kl_div``: ``"mean"``, the default of
``LogitsDistillationLoss``, divides by the number of elements, so that it is V times smaller than the mean over rows,
and ``"batchmean"``, that of ``MFTLoss``, by the first dimension. ``"none"`` is one number per row. The teacher gets no
gradient. The losses of its Megatron plugin have no T^2: ``kd_loss(..., scale_by_t_squared=False, reduction="none")``.

Source: nvidia-modelopt 0.47.0, ``torch/distill/losses.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks

REDUCTIONS = ("none", "mean", "batchmean", "sum")


def _reduced(reduction: str, logits: Tensor) -> dict[str, Any]:
    checks.choice("reduction", reduction, REDUCTIONS)
    if reduction == "mean":
        return {"reduction": "sum", "normalizer": max(1, logits.numel())}
    return {"reduction": reduction}


class LogitsDistillationLoss(torch.nn.Module):
    """``LogitsDistillationLoss``."""

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature, self.reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        options = _reduced(self.reduction, logits_s)
        return kd.kd_loss(logits_s, logits_t.detach(), temperature=self.temperature, **options)


class MFTLoss(torch.nn.Module):
    """``MFTLoss`` (arXiv:2506.15702): the teacher is moved towards the label until that leads by ``threshold``.

    The corrected teacher is made in plain PyTorch, as one tensor of probabilities. ``"none"`` is one number per row,
    where Model Optimizer has one per element.
    """

    def __init__(self, temperature: float = 1.0, threshold: float = 0.2, reduction: str = "batchmean") -> None:
        super().__init__()
        self.temperature, self.threshold, self.reduction = temperature, threshold, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor) -> Tensor:
        student = logits_s.reshape(-1, logits_s.shape[-1])
        teacher = self.corrected(logits_t.detach().reshape(-1, logits_t.shape[-1]), labels)
        options = {"temperature": self.temperature, "teacher_temperature": 1.0, **_reduced(self.reduction, student)}
        return kd.kd_loss(student, teacher, teacher_form="probs", **options)

    def corrected(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The teacher's probabilities at T, mixed with the label's by as much as its lead lacks."""
        p = (logits.float() / self.temperature).softmax(-1)
        (top, argmax), of_label = p.max(-1), p.gather(-1, labels[:, None]).squeeze(-1)
        lacking = (top - of_label + self.threshold) / (1 + top - of_label)
        wanted = torch.where(of_label > 1 - self.threshold, 1.0, of_label + self.threshold)
        share = torch.where(argmax != labels, lacking, (wanted - top) / (1 - top).clamp_min(1e-7))[:, None]
        return (p * (1 - share)).scatter_add(-1, labels[:, None], share)
