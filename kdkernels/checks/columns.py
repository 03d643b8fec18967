"""Operands that change how rows are read: log-probabilities, one number for each column, classes before the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.checks.rows import out_of_range
from kdkernels.checks.tensors import floating, integers, reads_values, same_device, sum_dtype, tensor
from kdkernels.checks.values import number


def log_probs_alone(options: Any) -> None:
    """Options that log-probabilities of a student leave a meaning."""
    form = "student_form='log_probs'"
    temperature = options.temperature
    if isinstance(temperature, Tensor) or number("temperature", temperature) != 1:
        got = "a tensor" if isinstance(temperature, Tensor) else temperature
        raise ValueError(
            f"temperature must be 1 with {form}, got {got}: the log-probabilities are of a temperature already. Pass "
            "the teacher's as teacher_temperature, and the factor T^2 as kd_weight"
        )
    for name, nothing in (("z_loss_weight", 0.0), ("student_softcap", None), ("standardize", False)):
        value = getattr(options, name)
        if isinstance(value, Tensor) or value != nothing:
            raise ValueError(f"{name} has no meaning with {form}: it acts on logits")


def of_columns(
    options: Any,
    student: Tensor,
    teachers: Sequence[Tensor],
    columns: int,
    student_bias: Any,
    teacher_bias: Any,
    teacher_columns: Any,
) -> dict[str, Tensor]:
    """The tensors of ``launch.OF_COLUMNS`` that a call has, as the ops take them; ``columns`` is how many count."""
    found: dict[str, Tensor] = {}
    if student_bias is not None:
        if options.student_form == "log_probs":
            raise ValueError("student_bias has no meaning with student_form='log_probs': it acts on logits")
        found["student_offsets"] = _bias("student_bias", student_bias, student, columns)
    for name, value in (("teacher_bias", teacher_bias), ("teacher_columns", teacher_columns)):
        if value is not None and not teachers:
            raise ValueError(f"{name} has no meaning without a teacher")
    if teacher_bias is not None:
        if isinstance(teacher_bias, Tensor) and teacher_bias.requires_grad and torch.is_grad_enabled():
            raise ValueError("teacher_bias must not require grad: it gets no gradient; detach it")
        found["teacher_offsets"] = _bias("teacher_bias", teacher_bias, student, columns).detach()
    if teacher_columns is not None:
        width = min(teacher.shape[-1] for teacher in teachers)
        found["teacher_columns"] = _columns(teacher_columns, student, columns, width)
        unknown = not reads_values(teacher_columns)
        if options.teacher_softcap and options.backend != "torch" and (unknown or bool((teacher_columns == -1).any())):
            # They cap a column that is missing, of -inf, to a number.
            name, wrong = "teacher_columns with -1 in it", "teacher_softcap"
            raise ValueError(f"{name} cannot be combined with {wrong} in the kernels; backend='torch' computes it")
    return found


def _bias(name: str, value: Any, student: Tensor, columns: int) -> Tensor:
    tensor(name, value)
    floating(name, value)
    same_device(name, value, student)
    if tuple(value.shape) not in {(columns,), (student.shape[-1],)}:
        raise ValueError(f"{name} must have shape ({columns},), one number for each column, got {tuple(value.shape)}")
    return value[:columns].to(sum_dtype(student)).contiguous()


def _columns(value: Any, student: Tensor, columns: int, width: int) -> Tensor:
    tensor("teacher_columns", value)
    if value.dtype == torch.bool:
        raise TypeError("teacher_columns must be int64 or int32, got bool: of a mask they are mask.nonzero()[:, 0]")
    integers("teacher_columns", value)
    same_device("teacher_columns", value, student)
    if tuple(value.shape) != (columns,):
        raise ValueError(
            f"teacher_columns must have shape ({columns},), one column of the teacher for each of the student's, got "
            f"{tuple(value.shape)}"
        )
    if reads_values(value):
        worst = out_of_range(value.long().contiguous(), width, -1)
        if worst is not None:
            raise ValueError(f"teacher_columns must be in [0, {width}), or -1 for none, got {worst}")
        if not bool((value >= 0).any()):
            raise ValueError("teacher_columns must not all be -1: the teacher would have no probabilities")
    return value.to(torch.int32).contiguous()


def not_sharded(options: Any, of_columns: Mapping[str, Any]) -> None:
    """Logits that are DTensors have their classes last, and nothing that has one number for each column."""
    given = [name for name, value in of_columns.items() if value is not None]
    if options.dim != -1:
        given.append("dim")
    if given:
        raise ValueError(
            f"{given[0]} takes plain tensors, got DTensors among the logits; pass what this rank has, tensor.to_local()"
        )


def changes_of_reading(options: Any, of_columns: Mapping[str, Tensor], class_dim: int, *, mixed: bool) -> list[str]:
    """The operands of a call that change how rows are read, in a caller's words; the kernels have one teacher, no
    standardize, no ``teacher_lse`` and no losses of acceptance beside them."""
    names = {"student_offsets": "student_bias", "teacher_offsets": "teacher_bias"}
    given = [names.get(name, name) for name in of_columns]
    if options.student_form == "log_probs":
        given.append("student_form='log_probs'")
    if class_dim != -1:
        given.append(f"dim={options.dim}")
    wrong = "a mixture of teachers" if mixed else "standardize" if options.standardize else None
    if options.teacher_lse is not None:
        wrong = "teacher_lse"
    if options.resolved.of_acceptance:
        wrong = "lk_loss"
    if given and wrong and options.backend != "torch":
        raise ValueError(f"{given[0]} cannot be combined with {wrong} in the kernels; backend='torch' computes it")
    return given


def class_dimension(options: Any, student: Any) -> int:
    """``dim`` counted from the front, or -1 for the last one."""
    tensor("student", student)
    dims = student.dim()
    if not -dims <= options.dim < dims:
        raise ValueError(
            f"dim must be in [{-dims}, {dims}) for a student of shape {tuple(student.shape)}, got {options.dim}"
        )
    dim = options.dim % dims
    return -1 if dim == dims - 1 else dim


def same_dims(name: str, value: Any, student: Tensor, dim: int) -> None:
    """As many dimensions as the student, and as many rows in each; ``dim`` is that of the classes."""
    tensor(name, value)
    rows = [(*x.shape[:dim], *x.shape[dim + 1 :]) for x in (value, student)]
    if value.dim() != student.dim() or rows[0] != rows[1]:
        raise ValueError(f"{name} must have the student's shape {tuple(student.shape)}, got {tuple(value.shape)}")


def rows_are_neighbours(dim: int, tensors: Sequence[tuple[str, Tensor]], backend: str) -> bool:
    """True if rows of all tensors, whose classes stand in ``dim``, lie next to each other; False if classes do."""
    classes = [value.shape[dim] == 1 or value.stride(dim) == 1 for _, value in tensors]
    if all(classes):
        return False
    # Plain PyTorch takes any strides.
    if backend == "torch":
        return True
    for name, value in tensors:
        if not _neighbours(dim, value):
            raise ValueError(
                f"{name} must have the rows behind dimension {dim} next to each other, as a contiguous tensor has, or "
                "the classes of all tensors must be so, as channels_last has them; got shape "
                f"{tuple(value.shape)} with strides {tuple(value.stride())}, and no copy is made: pass "
                f"{name}.contiguous(), or {name}.movedim({dim}, -1).contiguous() with dim=-1"
            )
    return True


def _neighbours(dim: int, value: Tensor) -> bool:
    behind = [(n, s) for n, s in zip(value.shape[dim + 1 :], value.stride()[dim + 1 :], strict=True) if n != 1]
    before = [(n, s) for n, s in zip(value.shape[:dim], value.stride()[:dim], strict=True) if n != 1]

    def in_order(sizes: list[tuple[int, int]]) -> bool:
        return all(a == m * b for (_, a), (m, b) in zip(sizes, sizes[1:], strict=False))

    return in_order(behind) and in_order(before) and (not behind or behind[-1][1] == 1)
