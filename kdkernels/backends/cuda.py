"""The compiled CUDA backend: loads ``_C_cuda``, which registers the ``kdkernels::*_cuda`` ops, on first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import build_info
from kdkernels.backends.cpu import load


@functools.cache
def load_error() -> Optional[str]:
    """Load the library once; None on success, else why it is not there, and what cures it."""
    if torch.version.cuda is None:
        cure = build_info.rebuild_command("cuda")
        return f"this torch ({torch.__version__}) is not a CUDA build; install one, then {cure}"
    path = build_info.find("cuda")
    return build_info.why_missing("cuda") if path is None else load(path, "cuda")


def why_not(device_type: str) -> Optional[str]:
    """None on CUDA tensors when the library loads."""
    if device_type != "cuda":
        return f"it runs on CUDA tensors, not on {device_type}"
    return load_error()


def lacks_dense(
    objective: Any, student: Tensor, teachers: tuple[Tensor, ...], *, mixed: bool, changed: Sequence[str] = ()
) -> Optional[str]:
    """Why a dense loss that asks for the CUDA extension is not among those there; None where it is."""
    if objective.backend != "cuda":
        return None
    if changed:
        return f"it has no {changed[0]}"
    if mixed:
        return "it takes one teacher, not a mixture"
    if objective.standardize:
        return "it has no standardize"
    if objective.resolved.of_acceptance:
        return f"it has no {objective.function}"
    if objective.teacher_lse is not None:
        return "it has no teacher_lse"
    if any(isinstance(x, Tensor) for x in (objective.kd_weight, objective.ce_weight, objective.z_loss_weight)):
        return "it takes weights of terms as numbers, not per row"
    if student.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not float64"
    if any(teacher.dtype != student.dtype for teacher in teachers):
        return f"it takes a teacher of the student's dtype, {student.dtype}, not of {teachers[0].dtype}"
    return None
