"""The knowledge distillation losses of torchtune.

All take logits at temperature 1 and labels that are a mask alone, and divide by the rows that count unless
``normalize=False``. ``ForwardKLLoss`` is the cross entropy ``-sum p log q``: larger than KL by the teacher's entropy,
with the same gradient. ``sym_kd_ratio`` 1 is forward, 0 is reverse. The chunked losses take lists of chunks along
dimension 1.

Where torchtune is wrong or differs: a token whose logit is -inf in the student is left out of its sums although the
teacher gives it probability, where the loss is infinite; a teacher that requires grad gets a gradient in both; the
reverse and symmetric chunked losses divide 0 by 0 where no row counts, here 0.

Source: torchtune 0.6.1, ``modules/loss/kd_losses.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd


def _of(student: Tensor, teacher: Tensor, labels: Tensor, index: int, normalize: bool, **options: Any) -> Tensor:
    """One divergence over rows, whatever the shape of the labels, with the gradient of none where no row counts."""
    rows = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    mask = torch.where(labels.reshape(-1) != index, 0, -100)
    return kd.kd_loss(*rows, mask, reduction="mean" if normalize else "sum", **options)


class ForwardKLLoss(torch.nn.Module):
    """``ForwardKLLoss``: the cross entropy between teacher and student."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        return _of(student_logits, teacher_logits, labels, self.ignore_index, normalize, divergence="soft_ce")


class ReverseKLLoss(torch.nn.Module):
    """``ReverseKLLoss``."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        return _of(student_logits, teacher_logits, labels, self.ignore_index, normalize, divergence="reverse_kl")


class SymmetricKLLoss(torch.nn.Module):
    """``SymmetricKLLoss``: ``sym_kd_ratio`` of the forward, the rest of the reverse one."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        if not 0.0 <= sym_kd_ratio <= 1.0:
            raise ValueError(f"sym_kd_ratio must be in the range [0, 1], got {sym_kd_ratio}")
        self.sym_kd_ratio, self.ignore_index = sym_kd_ratio, ignore_index
        self.fkl, self.rkl = ForwardKLLoss(ignore_index), ReverseKLLoss(ignore_index)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        call = student_logits, teacher_logits, labels, normalize
        return self.sym_kd_ratio * self.fkl(*call) + (1 - self.sym_kd_ratio) * self.rkl(*call)


class _Chunked(torch.nn.Module):
    """A loss of lists of chunks, summed one by one and divided once."""

    loss: torch.nn.Module

    def __init__(self, num_output_chunks: int, ignore_index: int) -> None:
        super().__init__()
        self.num_output_chunks, self.ignore_index = num_output_chunks, ignore_index

    def forward(self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        # The chunks say where they end: releases differ in how they cut.
        parts = labels.split([chunk.shape[1] for chunk in student_logits], dim=1)
        chunks = zip(student_logits, teacher_logits, parts, strict=True)
        total = torch.stack([self.loss(*chunk, normalize=False) for chunk in chunks]).sum()
        return total / (labels != self.ignore_index).sum().clamp_min(1)


class ForwardKLWithChunkedOutputLoss(_Chunked):
    """``ForwardKLWithChunkedOutputLoss``. One call on whole logits needs no more memory, and is faster."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.loss = ForwardKLLoss(ignore_index)


class ReverseKLWithChunkedOutputLoss(_Chunked):
    """``ReverseKLWithChunkedOutputLoss``."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.loss = ReverseKLLoss(ignore_index)


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    """``SymmetricKLWithChunkedOutputLoss``."""

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.loss = SymmetricKLLoss(sym_kd_ratio, ignore_index)
