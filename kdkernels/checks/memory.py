"""Gradients written over the student's logits: which tensors may share memory with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import symbols, transforms


def inplace_allowed(student: Tensor, option: str = "inplace", name: str = "student", *, two_dims: bool = False) -> None:
    """``inplace`` is for eager mode, for a student that gets a gradient, and for rows that are views of their own.

    two_dims: those of the rows are known to make two.
    """
    if torch.compiler.is_compiling():
        raise ValueError(f"{option}=True works in eager mode only; under torch.compile leave it out")
    if torch.is_grad_enabled() and not student.requires_grad:
        raise ValueError(f"{option}=True needs a {name} that requires grad: there is no gradient to write otherwise")
    if student.dim() > 3 and not two_dims and not student.is_contiguous():
        raise ValueError(
            f"{option} needs a contiguous {name} or at most 3 dimensions, got strides {tuple(student.stride())}"
        )
    extent = 1
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1 and stride < extent and student.numel() > 0:
            raise ValueError(
                f"{option} needs a {name} whose rows share no memory, for they are overwritten one by one; got shape "
                f"{tuple(student.shape)} with strides {tuple(student.stride())}: pass {name}.contiguous()"
            )
        extent += (size - 1) * stride


def apart_in_place(options: Any, student: Tensor, others: Mapping[str, Any], teachers: Sequence[Tensor] = ()) -> None:
    """Where the gradient is written over the student's rows, no other tensor of the call has memory of these.

    A teacher's row may be the student's own row of that number: it is read before it is written.
    """
    if not getattr(options, "inplace", False) or not torch.is_grad_enabled():
        return
    named = {"teacher" if len(teachers) == 1 else f"teacher[{k}]": item for k, item in enumerate(teachers)}
    tensors = {**named, **others, **{name: getattr(options, name) for name in options.defaults}}
    tensors = {name: item for name, item in tensors.items() if isinstance(item, Tensor)}
    if not all(_has_memory(item) for item in (student, *tensors.values())):
        return
    first, last = _bytes_of(student)
    for name, item in tensors.items():
        start, end = _bytes_of(item)
        if (
            end <= first
            or last <= start
            or (name in named and _same_rows(item, student))
            or _interleaved(item, student)
        ):
            continue
        raise ValueError(
            f"inplace=True overwrites the student's rows one by one, and {name} may share memory with other rows of "
            f"it: {name} of shape {tuple(item.shape)} and strides {tuple(item.stride())} has bytes {start} to {end}, "
            f"the student of shape {tuple(student.shape)} and strides {tuple(student.stride())} has {first} to {last}; "
            f"pass {name}.clone()"
        )


def _has_memory(tensor: Tensor) -> bool:
    return symbols.has_values(tensor) and not (transforms.active() and transforms.stands_for_others(tensor))


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor to past the last one."""
    start = tensor.data_ptr()
    return start, start + _extent(tensor) * tensor.element_size()


def _extent(tensor: Tensor, below: float = math.inf) -> int:
    """The elements from the first to past the last one, of the dimensions whose stride is ``below`` a number."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum(
        (size - 1) * stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride < below
    )


def _same_rows(teacher: Tensor, student: Tensor) -> bool:
    """True if every row of the teacher stands where the student's row of that number does."""
    leading = zip(teacher.shape, teacher.stride(), student.stride(), strict=True)
    return (
        teacher.data_ptr() == student.data_ptr()
        and teacher.dtype == student.dtype
        and all(mine == other for size, mine, other in leading if size > 1)
    )


def _interleaved(other: Tensor, student: Tensor) -> bool:
    """True if both repeat after a common number of bytes, and lie in different parts of it."""
    size, other_size = student.element_size(), other.element_size()
    strides = {n * size for length, n in zip(student.shape, student.stride(), strict=True) if length > 1 and n > 1}
    others = {n * other_size for length, n in zip(other.shape, other.stride(), strict=True) if length > 1 and n > 1}
    for period in strides & others:
        if any(n > period and n % period for n in strides | others):
            continue
        ahead = (other.data_ptr() - student.data_ptr()) % period
        width = _extent(student, period / size) * size
        if ahead >= width and ahead + _extent(other, period / other_size) * other_size <= period:
            return True
    return False
