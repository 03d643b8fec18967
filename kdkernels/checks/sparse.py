"""Teachers of K ids and log-probabilities a row."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels.backends import cpu
from kdkernels.checks.tensors import (
    floating,
    integers,
    reads_values,
    same_device,
    sum_dtype,
    tensor,
    with_slots,
)
from kdkernels.reference.topk import unused


def sparse_teacher(ids: Any, logprobs: Any, student: Tensor, columns: int, tail: str) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the student's leading shape with K slots, returned as contiguous ``[N, K]``."""
    for name, value in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        tensor(name, value)
        same_device(name, value, student)
    integers("teacher_ids", ids)
    floating("teacher_logprobs", logprobs)
    leading = tuple(student.shape[:-1])
    if ids.dim() != student.dim() or tuple(ids.shape[:-1]) != leading or ids.shape[-1] == 0:
        raise ValueError(f"teacher_ids must have shape {with_slots(leading)} with K >= 1, got {tuple(ids.shape)}")
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"teacher_logprobs must have the shape of teacher_ids {tuple(ids.shape)}, got {tuple(logprobs.shape)}"
        )
    if logprobs.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_logprobs must not require grad: they get no gradient; detach them")
    k = ids.shape[-1]
    ids, logprobs = ids.reshape(-1, k).contiguous(), logprobs.detach().reshape(-1, k).contiguous()
    if reads_values(ids) and reads_values(logprobs) and ids.numel():
        # The weights of sampled ids may be above 1.
        highest = torch.finfo(logprobs.dtype).max if tail == "drop" else highest_logprob(logprobs.dtype)
        _values_of_sparse_teacher(ids, logprobs, columns, highest)
    return ids, logprobs


def highest_logprob(dtype: torch.dtype) -> float:
    """The largest log-probability that may be the rounding of one that is at most 0.

    A logit of up to 32 less a logsumexp of that size, in 16 bits, is off by up to 16 epsilons; wider dtypes get the
    allowance of ``tail_logprob``.
    """
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def _values_of_sparse_teacher(ids: Tensor, logprobs: Tensor, columns: int, highest: float) -> None:
    sound = torch.ops.kdkernels.sparse_teacher_is_sound
    if cpu.why_not(ids.device.type) is None and sound(ids, logprobs, columns, highest):
        return
    # Unused slots may hold anything else.
    used = ~unused(ids, logprobs)
    low, high = (int(v) for v in torch.aminmax(torch.where(used, ids, 0)))
    if low < 0 or high >= columns:
        worst = low if low < 0 else high
        hint = "" if low < 0 else "; capture a teacher that is padded wider with vocab_size=..."
        raise ValueError(f"teacher_ids must be in [0, {columns}) or -1 for an unused slot, got {worst}{hint}")
    logprobs = torch.where(used, logprobs, -torch.inf)
    if not (logprobs < torch.inf).all():
        raise ValueError("teacher_logprobs must not be NaN or +inf, where teacher_ids is not -1")
    if not (logprobs <= highest).all():
        raise ValueError(
            f"teacher_logprobs must be natural log-probabilities, at most 0, got {float(logprobs.amax()):.4g}: "
            "are they probabilities, or logits?"
        )


def tail_like(value: Any, tail: str, student: Tensor) -> Optional[Tensor]:
    """The log of the teacher's mass outside its entries, one per row, in the dtype of the sums."""
    if value is None:
        return None
    tensor("tail_logprob", value)
    if tail not in ("bucket", "uniform"):
        raise ValueError(f"tail_logprob has no meaning with tail {tail!r}, only with 'bucket' and 'uniform'")
    floating("tail_logprob", value)
    same_device("tail_logprob", value, student)
    if value.shape != student.shape[:-1]:
        raise ValueError(f"tail_logprob must have shape {tuple(student.shape[:-1])}, got {tuple(value.shape)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError("tail_logprob must not require grad: it gets no gradient; detach it")
    # A mass of 1 may come out of a sum a few roundings above it.
    if reads_values(value) and value.numel() and not float(value.amax()) <= 1e-3:
        raise ValueError("tail_logprob must hold log-probabilities, at most 0 and not NaN")
    return value.detach().to(sum_dtype(student)).reshape(-1)
