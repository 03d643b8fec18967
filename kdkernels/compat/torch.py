"""``F.kl_div`` and ``nn.KLDivLoss`` of PyTorch.

The first argument is the student's log-probabilities and the second the teacher's probabilities, or log-probabilities
with ``log_target=True``; the loss is ``KL(target || input)`` with no temperature. ``"mean"``, the default, divides by
the number of all elements, so that it is V times smaller than the mean over rows (PyTorch warns that its next major
release will change that); ``"batchmean"`` divides by the first dimension alone, whatever the others are. ``"none"`` is
one number per element: PyTorch's own function makes it here, with an ``[N, V]`` tensor for every step.

Differences. PyTorch's loss is one of elements, and the distribution may lie in any dimension or nowhere: here it is the
last, and rows of ``target`` that do not add up to 1 are an error on a CPU. The gradient is PyTorch's, ``-p``.
Take the logits to save that pass and its memory: ``kd_loss(student_logits, teacher_logits, reduction="batchmean")``.

Source: torch 2.13, ``torch/nn/functional.py``.
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels import checks
from kdkernels.compat import _common

REDUCTIONS = ("none", "mean", "batchmean", "sum")


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: Optional[bool] = None,
    reduce: Optional[bool] = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """``torch.nn.functional.kl_div``, with its arguments and reductions."""
    if size_average is not None or reduce is not None:
        warnings.warn("size_average and reduce are PyTorch's old names: pass reduction", stacklevel=2)
        summed = "sum" if size_average is False else "mean"
        reduction = "none" if reduce is False else summed
    checks.choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return F.kl_div(input, target, reduction="none", log_target=log_target)
    student = _common.log_probs("input", input)
    options: dict[str, Any] = {"teacher_form": "log_probs" if log_target else "probs", **_common.LOG_PROBS}
    if reduction == "mean":
        return kd.kd_loss(student, target, reduction="sum", normalizer=max(1, student.numel()), **options)
    options["reduction"] = reduction
    return kd.kd_loss(student, target, **options)


class KLDivLoss(torch.nn.Module):
    """``torch.nn.KLDivLoss``."""

    def __init__(
        self,
        size_average: Optional[bool] = None,
        reduce: Optional[bool] = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__()
        self.size_average, self.reduce = size_average, reduce
        self.reduction, self.log_target = reduction, log_target

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, self.size_average, self.reduce, self.reduction, self.log_target)
