"""Arguments that the row patterns' kernels have in common, and how launchers make them of tensors.

Triton specialises a kernel to every integer in a tuple, whatever ``do_not_specialize`` says: a number that changes from
batch to batch is an argument of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

# Vectors of the shortest row that is moved in whole vectors but for its ends.
SHORTEST_CUT = 32


class Logits(NamedTuple):
    """A tensor [B, L, V]: row b * L + l starts at b * stride_b + l * stride_l, in elements. All None: no tensor."""

    ptr: Any
    stride_b: Any
    stride_l: Any


class Rows(NamedTuple):
    """Vectors [N] of one value a row, contiguous but for the weight, and statistics [N, NUM_STATS]. None: no such."""

    loss: Any
    labels: Any = None
    weight: Any = None
    weight_stride: Any = None
    temperature: Any = None
    teacher_temperature: Any = None
    param: Any = None
    kd_weight: Any = None
    ce_weight: Any = None
    z_loss_weight: Any = None
    stats: Any = None
    teacher_lse: Any = None


class Mixture(NamedTuple):
    """The weights [N, M] of M teachers, in any strides. All None: one teacher."""

    ptr: Any
    stride_n: Any
    stride_m: Any


class Weights(NamedTuple):
    """Weights of the objective's terms, None where the weight is 0: the term is not compiled. Rows may have factors.

    The smoothing of labels is there also where statistics alone ask for the cross entropy.
    """

    kd: Any
    ce: Any
    z_loss: Any
    label_smoothing: Any
    # 1.0 to multiply the divergence by the temperature squared, or 0.0.
    t_squared: Any


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may be another GPU than the tensors'."""
    return nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)


def contiguous(x: Optional[Tensor]) -> Optional[Tensor]:
    """A vector of one value a row as the kernels index it."""
    return None if x is None else x.contiguous()


def num_rows(x: Tensor) -> int:
    """N = B * L of a [B, L, V] or [N, V] tensor."""
    return x.shape[:-1].numel()


def logits(x: Optional[Tensor]) -> Logits:
    """A [B, L, V] or [N, V] tensor, or none, as the kernels take it."""
    if x is None:
        return Logits(None, None, None)
    if x.dim() == 2 or x.shape[0] == 1:
        return Logits(x, 0, x.stride(-2))
    return Logits(x, x.stride(0), x.stride(1))


def thrown_away(dstudent: Optional[Tensor], rows: int, L: Optional[int]) -> Logits:
    """Memory for the first rows of a gradient, which start where they would from a multiple of 16 bytes."""
    given = logits(dstudent)
    if dstudent is None:
        return given
    last = (rows - 1) * given.stride_l if L is None else (rows - 1) // L * given.stride_b + (L - 1) * given.stride_l
    start = dstudent.data_ptr() // dstudent.element_size() % 16
    return given._replace(ptr=dstudent.new_empty(start + last + dstudent.shape[-1])[start:])


def evenly_spaced(*tensors: Optional[Tensor]) -> bool:
    """True if the rows of all [B, L, V] or [N, V] tensors lie at one distance each."""
    return all(x is None or x.dim() == 2 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)


def vectors(V: int, *tensors: Optional[Tensor]) -> tuple[int, bool]:
    """Columns of one access to rows of all these tensors, and whether the rows' ends cut such vectors.

    Rows that start at one distance from a multiple of 16 bytes, each in all tensors alike, are moved in whole vectors
    but for their ends. Where tensors differ, and in short rows, whose ends are most of them, an access is as wide as
    the largest power of two that divides everything.
    """
    given = [x for x in tensors if x is not None]
    full = 16 // max(x.element_size() for x in given)
    starts = [x.data_ptr() // x.element_size() for x in given]
    steps = [[x.stride(d) for d in range(x.dim() - 1) if x.shape[d] > 1] for x in given]
    fits = math.gcd(full, V, *(x.shape[-1] for x in given if x.shape[-1] != V), *starts, *itertools.chain(*steps))
    if fits < full and V >= SHORTEST_CUT * full:
        skews = {tuple(n % full for n in (start, *step)) for start, step in zip(starts, steps, strict=True)}
        if len(skews) == 1:
            return full, True
    return fits, False


def row_arguments(
    student: Tensor, teachers: Sequence[Tensor], dstudent: Optional[Tensor], vocab_size: int
) -> dict[str, Any]:
    """Arguments of every row pattern: the student, its gradient, and the extent of a row."""
    width = student.shape[-1]
    return {
        "student": logits(student),
        "dstudent": logits(dstudent),
        "L": None if evenly_spaced(student, *teachers, dstudent) else student.shape[-2],
        "V": vocab_size,
        "pad_width": None if width == vocab_size else width,
    }


def row_tensors(
    loss: Tensor,
    labels: Optional[Tensor],
    weight: Optional[Tensor],
    *,
    temperature: Optional[Tensor] = None,
    teacher_temperature: Optional[Tensor] = None,
    param: Optional[Tensor] = None,
    kd_weight: Optional[Tensor] = None,
    ce_weight: Optional[Tensor] = None,
    z_loss_weight: Optional[Tensor] = None,
    stats: Optional[Tensor] = None,
    teacher_lse: Optional[Tensor] = None,
) -> Rows:
    """The tensors of one value a row as the kernels take them."""
    return Rows(
        loss=loss,
        labels=contiguous(labels),
        weight=weight,
        weight_stride=None if weight is None else weight.stride(0),
        temperature=contiguous(temperature),
        teacher_temperature=contiguous(teacher_temperature),
        param=contiguous(param),
        kd_weight=contiguous(kd_weight),
        ce_weight=contiguous(ce_weight),
        z_loss_weight=contiguous(z_loss_weight),
        stats=stats,
        teacher_lse=contiguous(teacher_lse),
    )


def mixture_argument(weights: Optional[Tensor]) -> Mixture:
    return Mixture(None, None, None) if weights is None else Mixture(weights, *weights.stride())


def term_weights(
    *,
    kd_weight: float,
    ce_weight: float,
    z_loss_weight: float,
    label_smoothing: float,
    scale_by_t_squared: bool,
    stats: bool,
) -> Weights:
    return Weights(
        kd=kd_weight or None,
        ce=ce_weight or None,
        z_loss=z_loss_weight or None,
        label_smoothing=(label_smoothing or None) if ce_weight or stats else None,
        t_squared=1.0 if scale_by_t_squared else 0.0,
    )
