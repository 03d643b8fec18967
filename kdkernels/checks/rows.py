"""One value per row or per token: labels, ids, weights, masks, and what the sum is divided by."""

from __future__ import annotations

import math
from typing import Any, Optional, Union, get_args

import torch
from torch import Tensor

from kdkernels.backends import cpu
from kdkernels.checks.tensors import (
    dtype_name,
    floating,
    integers,
    is_dtensor,
    no_tensor,
    plain,
    reads_values,
    same_device,
    sum_dtype,
    tensor,
    with_slots,
)
from kdkernels.checks.values import choice, in_sums, number
from kdkernels.choices import Reduction


def labels_like(value: Any, student: Tensor, columns: int, ignore_index: int) -> Optional[Tensor]:
    """Integer labels of the student's leading shape, each ``ignore_index`` or in ``[0, columns)``."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise no_tensor("labels", value)
    plain("labels", value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {dtype_name(value.dtype)}{_no_labels(value, student)}")
    if value.device != student.device:
        raise ValueError(f"labels must be on the student's device {student.device}, got {value.device}")
    if value.shape != student.shape[:-1]:
        wanted = tuple(student.shape[:-1])
        raise ValueError(f"labels must have shape {wanted}, got {tuple(value.shape)}{_no_labels(value, student)}")
    flat = value.reshape(-1).to(torch.int64).contiguous()
    if reads_values(value) and value.numel():
        worst = out_of_range(flat, columns, ignore_index)
        if worst is not None:
            raise ValueError(f"labels must be in [0, {columns}) or equal to ignore_index {ignore_index}, got {worst}")
    return flat


def _no_labels(value: Tensor, student: Tensor) -> str:
    """The end of an error: a guess of what was passed as labels."""
    if value.shape == student.shape:
        if value.is_floating_point():
            return "; probabilities of classes are a teacher, with teacher_form='probs'"
        return "; they are classes: of one-hot rows labels.argmax(-1)"
    if value.is_floating_point() and value.shape == student.shape[:-1]:
        return "; numbers of rows go by their names, such as row_weight or tail_logprob"
    if student.dim() > 2 and value.shape == (*student.shape[:1], *student.shape[2:]):
        return "; where classes are in dimension 1, kd_loss takes dim=1"
    return ""


def labels_of(options: Any, value: Any, student: Tensor, columns: int) -> Optional[Tensor]:
    """As ``labels_like``, of an objective that may need them."""
    flat = labels_like(value, student, columns, options.ignore_index)
    # This way round a graph with labels serves a weight of 0 too.
    if flat is None and options.scalars["ce_weight"]:
        raise ValueError("labels are required when ce_weight is not 0")
    return flat


def out_of_range(ids: Tensor, columns: int, *none: int) -> Optional[int]:
    """An id that is neither in ``[0, columns)`` nor one of those that stand for none."""
    if cpu.why_not(ids.device.type) is None and torch.ops.kdkernels.labels_are_sound(ids.view(-1), columns, none[0]):
        return None
    for nothing in none:
        ids = torch.where(ids == nothing, 0, ids)
    low, high = (int(v) for v in torch.aminmax(ids))
    return low if low < 0 else high if high >= columns else None


def token_ids(value: Any, logits: Tensor, columns: int, ignore_index: int) -> Tensor:
    """Integer ids of the logits' leading shape, or of that and K slots: int64 ``[N, K]``, contiguous.

    Each is in ``[0, columns)``, or -1 or ``ignore_index`` for no token.
    """
    tensor("ids", value)
    integers("ids", value)
    same_device("ids", value, logits, "the logits'")
    leading = tuple(logits.shape[:-1])
    several = value.dim() == logits.dim()
    if not (value.shape == leading or (several and value.shape[:-1] == leading and value.shape[-1] > 0)):
        wanted = f"{leading} or {with_slots(leading)} with K >= 1"
        raise ValueError(f"ids must have shape {wanted}, got {tuple(value.shape)}")
    flat = value.reshape(-1, value.shape[-1] if several else 1).to(torch.int64).contiguous()
    if reads_values(value) and value.numel():
        worst = out_of_range(flat, columns, ignore_index, -1)
        if worst is not None:
            expected = f"in [0, {columns}), or -1 or ignore_index {ignore_index} for none"
            raise ValueError(f"ids must be {expected}, got {worst}")
    return flat


def slots_of_rows(ids: Tensor, logits: Tensor) -> None:
    """Ids have a dimension of slots after those of the rows."""
    if ids.dim() != logits.dim():
        raise ValueError(f"ids must have shape {with_slots(logits.shape[:-1])}, got {tuple(ids.shape)}")


def token_numbers(name: str, value: Any, like: Optional[Tensor] = None, *, expand: bool = False) -> None:
    """A floating tensor with one number per token, of any shape or that of ``like``; 1 expands where it may."""
    tensor(name, value)
    floating(name, value)
    if like is not None:
        _of_token_shape(name, value, like, expand)
    # Where a mask leaves some out anything may stand, so that one alone tells nothing.
    if name.endswith("logprobs") and reads_values(value) and value.numel() > 1 and float(value.detach().amin()) > 0:
        raise ValueError(f"{name} must be natural log-probabilities, at most 0, got only numbers above 0: pass p.log()")


def token_mask(value: Any, like: Tensor) -> Optional[Tensor]:
    """A mask of the tokens, which is True where one counts, as bool and of the shape of ``like``."""
    if value is None:
        return None
    tensor("mask", value)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(
            f"mask must be bool or of integers, got {dtype_name(value.dtype)}: pass mask.bool() where it is 0 and 1; "
            "weights multiply the losses instead"
        )
    _of_token_shape("mask", value, like, True)
    if value.dtype != torch.bool and reads_values(value) and value.numel():
        low, high = (int(x) for x in torch.aminmax(value))
        if low < 0 or high > 1:
            raise ValueError(f"mask must hold 0 and 1, got {low if low < 0 else high}: are they tokens, or labels?")
    return value.bool().expand_as(like)


def _of_token_shape(name: str, value: Tensor, like: Tensor, expand: bool) -> None:
    same_device(name, value, like, "the tokens'")
    same = value.dim() == like.dim()
    for size, wanted in zip(value.shape, like.shape, strict=False):
        same = same and (size == wanted or (expand and size == 1))
    if not same:
        some = ", or 1 in some dimensions" if expand else ""
        raise ValueError(f"{name} must have the tokens' shape {tuple(like.shape)}{some}, got {tuple(value.shape)}")


def per_row(
    name: str,
    value: Any,
    student: Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive: bool = True,
    why_no_grad: Optional[str] = "it gets no gradient",
) -> Union[float, Tensor]:
    """A Python number, or a tensor of one value per row (or one value), returned as a float or as ``[N]``.

    With ``why_no_grad`` None what comes back is differentiable.
    """
    positive = exclusive and low == 0.0 and high == math.inf
    if not isinstance(value, Tensor):
        value = number(name, value, low=low, high=high, exclusive_low=exclusive and low > -math.inf)
        in_sums(name, value, positive=positive)
        return value
    plain(name, value)
    if not value.dtype.is_floating_point and value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be a number or a tensor of numbers, got {dtype_name(value.dtype)}")
    if value.requires_grad and why_no_grad is not None:
        raise ValueError(f"{name} must not require grad: {why_no_grad}; detach it")
    if value.device != student.device and value.dim() > 0:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {value.device}")
    rows = student.shape[:-1]
    if value.numel() != 1 and value.shape != rows:
        raise ValueError(
            f"{name} must be a number or have one value per row, shape {tuple(rows)}, got {tuple(value.shape)}"
        )
    flat = value.to(device=student.device, dtype=sum_dtype(student))
    if why_no_grad is not None:
        flat = flat.detach()
    if reads_values(value) and value.numel():
        # As the sums know them: numbers of fp64 may be 0 or infinite in fp32.
        known = flat.detach().to(value.device)
        bad = ~torch.isfinite(known) | (known < low) | (known > high)
        if exclusive:
            bad |= (known == low) | (known == high)
        if positive:
            bad |= known < torch.finfo(flat.dtype).smallest_normal
        if bool(bad.any()):
            worst = value[bad].reshape(-1)[0].item()
            expected = f"{'>' if exclusive else '>='} {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            sums = "" if not math.isfinite(worst) or value.dtype == flat.dtype else f" in {dtype_name(flat.dtype)}"
            raise ValueError(
                f"{name} must be finite{'' if low == -math.inf else f' and {expected}'}{sums}, got {worst}"
            )
    num_rows = math.prod(student.shape[:-1])
    return flat.reshape(()).expand(num_rows) if value.numel() == 1 and num_rows != 1 else flat.reshape(-1)


def normalizer_like(value: Any, reduction: str, student: Optional[Tensor] = None) -> Any:
    """A positive number or a tensor of one, for the reductions that it can stand in for."""
    if value is None:
        return None
    if reduction not in ("sum", "mean"):
        raise ValueError(f"normalizer needs reduction 'sum' or 'mean', got {reduction!r}")
    if not isinstance(value, Tensor):
        value = number("normalizer", value, low=0.0, exclusive_low=True)
        in_sums("normalizer", value, positive=True)
        return value
    if student is None and is_dtensor(value):
        # The loss of all ranks sees to it.
        return value
    plain("normalizer", value)
    if value.numel() != 1:
        raise ValueError(f"normalizer must be a number or a tensor of one element, got shape {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError("normalizer must not require grad: it gets no gradient; detach it")
    if reads_values(value):
        if not 0.0 < float(value) < math.inf:
            raise ValueError(f"normalizer must be finite and > 0, got {float(value)}")
        in_sums("normalizer", float(value), positive=True)
    return value.detach().to(value.device if student is None else student.device)


def reduction_name(reduction: Any, student: Optional[Tensor] = None) -> None:
    """One of the four reductions; "batchmean" needs a batch dimension."""
    choice("reduction", reduction, get_args(Reduction))
    if reduction == "batchmean" and student is not None:
        batch_dimension(student)


def batch_dimension(student: Tensor) -> None:
    """Logits that "batchmean" can divide by the first dimension of."""
    if student.dim() < 2:
        raise ValueError(f"reduction 'batchmean' needs a batch dimension, got student of shape {tuple(student.shape)}")
