"""``KDLoss`` of torchdistill, with its paths into the dictionaries of the two models' inputs and outputs.

``alpha CE + (1 - alpha) T^2 KL``, cross entropy at T = 1. With ``reduction="batchmean"``, the default, both are divided
by the rows; ``"mean"`` divides KL by the number of elements, as ``F.kl_div`` does.

Where torchdistill is wrong: with ``alpha=None``, ``alpha=0`` or without targets it drops ``beta`` and T^2 together, and
the loss is KL alone; so it is here, to be the same.

Differences: the classes are the last dimension; ``"none"`` is refused; a row whose target is ``ignore_index`` counts in
neither term; of the options of ``nn.CrossEntropyLoss`` only ``ignore_index`` and ``label_smoothing`` are known.

Source: torchdistill 1.1.5, ``losses/mid_level.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks
from kdkernels.compat import _common

REDUCTIONS = ("none", "mean", "batchmean", "sum")


class KDLoss(torch.nn.Module):
    """``KDLoss``."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: Optional[float] = None,
        beta: Optional[float] = None,
        reduction: str = "batchmean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        checks.choice("reduction", reduction, REDUCTIONS)
        if reduction == "none":
            raise _common.no_elements("torchdistill's KDLoss")
        self.student_path = student_module_path, student_module_io
        self.teacher_path = teacher_module_path, teacher_module_io
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.beta = 1 - (alpha or 0.0) if beta is None else beta
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def forward(
        self,
        student_io_dict: Mapping[str, Any],
        teacher_io_dict: Mapping[str, Any],
        targets: Optional[Tensor] = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        student = student_io_dict[self.student_path[0]][self.student_path[1]]
        teacher = teacher_io_dict[self.teacher_path[0]][self.teacher_path[1]]
        options: dict[str, Any] = {"temperature": self.temperature, "reduction": self.reduction}
        # KL alone is divided by V too.
        width = student.shape[-1] if self.reduction == "mean" else 1
        if not self.alpha or targets is None:
            return kd.kd_loss(student, teacher, kd_weight=1 / width, scale_by_t_squared=False, **options)
        return kd.kd_loss(
            student,
            teacher,
            targets,
            kd_weight=self.beta / width,
            ce_weight=self.alpha,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            **options,
        )
