"""Vectors and their attention: hidden states, queries and keys, and masks of bools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.checks.tensors import dtype_name, floating, same_device, tensor


def features(student: Any, teacher: Any) -> None:
    """Hidden states ``(..., D)`` of one shape and device."""
    for name, value in (("student", student), ("teacher", teacher)):
        tensor(name, value)
        floating(name, value)
        if value.dim() == 0 or value.shape[-1] == 0:
            raise ValueError(f"{name} must have shape (..., D) with D >= 1, got {tuple(value.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}; project the "
            "student to the teacher's width where they differ"
        )
    same_device("teacher", teacher, student)
    _without_gradient("teacher", teacher)


def _without_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad: vectors of a teacher get no gradient; run the teacher under torch.no_grad, "
            "or detach them"
        )


def attention_operands(names: Sequence[str], operands: Sequence[Any]) -> None:
    """Queries and keys ``(B, H, n, d)`` of student and teacher, in the order of the names."""
    for name, value in zip(names, operands, strict=True):
        tensor(name, value)
        floating(name, value)
        if value.dim() != 4 or 0 in value.shape[1:]:
            raise ValueError(f"{name} must have shape (B, H, n, d), none of them 0 but B, got {tuple(value.shape)}")
        same_device(name, value, operands[0], f"{names[0]}'s")
    for name, value in zip(names[2:], operands[2:], strict=True):
        _without_gradient(name, value)
    query = operands[0]
    for k in (0, 2):
        a, b = operands[k], operands[k + 1]
        if (a.shape[0], a.shape[1], a.shape[2]) != query.shape[:3]:
            raise ValueError(
                f"{names[k]} must have {names[0]}'s B, H and n {tuple(query.shape[:3])}, got {tuple(a.shape[:3])}"
            )
        if b.dtype != a.dtype:
            raise TypeError(
                f"{names[k + 1]} must have {names[k]}'s dtype {dtype_name(a.dtype)}, got {dtype_name(b.dtype)}"
            )
        if (b.shape[0], b.shape[2], b.shape[3]) != (a.shape[0], a.shape[2], a.shape[3]):
            expected = (a.shape[0], "H'", *a.shape[2:])
            raise ValueError(f"{names[k + 1]} must have shape {expected}, got {tuple(b.shape)}")
        if a.shape[1] % b.shape[1]:
            raise ValueError(
                f"{names[k + 1]} must have a number of heads that divides {names[k]}'s {a.shape[1]}, got {b.shape[1]}"
            )
    if (query.dtype == torch.float64) != (operands[2].dtype == torch.float64):
        raise TypeError(
            f"{names[2]} must be float64 where {names[0]} is, and only there, got {dtype_name(operands[2].dtype)}"
        )


def relation_vectors(name: str, value: Any, heads: int) -> None:
    """Vectors ``(B, n, d)`` that split into heads."""
    tensor(name, value)
    if value.dim() != 3 or 0 in value.shape[1:]:
        raise ValueError(f"{name} must have shape (B, n, d), none of them 0 but B, got {tuple(value.shape)}")
    if value.shape[-1] % heads:
        raise ValueError(f"heads must divide the width of {name}, {value.shape[-1]}, got {heads}")


def attention_mask(mask: Any, query: Tensor) -> None:
    """One bool for each token of each sequence."""
    _mask(mask, query, (query.shape[0], query.shape[2]), "tokens")


def sample_mask(mask: Any, logits: Tensor) -> None:
    """One bool for each row."""
    _mask(mask, logits, tuple(logits.shape[:-1]), "rows")


def _mask(mask: Any, like: Tensor, shape: tuple[int, ...], what: str) -> None:
    tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for {what} that count, got {dtype_name(mask.dtype)}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask must have shape {shape}, got {tuple(mask.shape)}")
    same_device("mask", mask, like, f"the {what}'")
