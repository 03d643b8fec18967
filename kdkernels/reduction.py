"""From ``reduction`` to what multiplies each row's loss, on the device and without a host synchronisation."""

from __future__ import annotations

import math
from typing import Optional, Union

import torch
from torch import Tensor

from kdkernels import checks, symbols, transforms


def num_rows(student: Tensor) -> int:
    # Not Size.numel(), which would pin symbols to the sizes of the moment.
    return math.prod(student.shape[:-1])


def row_weights(
    reduction: str,
    student: Tensor,
    labels: Optional[Tensor],
    ignore_index: int,
    row_weight: Optional[Tensor],
    normalizer: Optional[Union[int, float, Tensor]],
) -> tuple[float, Optional[Tensor]]:
    """Return ``(scale, weight)`` such that the reduced loss is ``sum_i scale * weight_i * loss_i``.

    Args:
        reduction: one of ``kdkernels.choices.Reduction``.
        student: the logits of the N rows; weights are in the dtype of their sums.
        labels: ``[N]`` or None; rows equal to ``ignore_index`` do not count (the kernels drop them).
        row_weight: ``[N]`` or None.
        normalizer: replaces the denominator of "mean"; divides the "sum".

    Returns:
        A Python float, and None or a tensor ``[N]`` that may have stride 0. The float is never a symbol: what a
        compiler knows by one is in the tensor.
    """
    scale = 1.0
    divisor: Optional[Tensor] = None
    if normalizer is not None:
        if isinstance(normalizer, Tensor):
            divisor = normalizer.to(checks.sum_dtype(student)).reshape(())
        elif symbols.is_symbol(normalizer):
            divisor = symbols.as_tensor(normalizer, checks.sum_dtype(student), student.device)
        else:
            scale = 1.0 / float(normalizer)
    elif reduction in ("mean", "batchmean"):
        if reduction == "batchmean" or labels is None:
            number = num_rows(student) if reduction == "mean" else student.shape[0] if student.dim() > 1 else 1
            if symbols.is_symbol(number):
                divisor = symbols.as_tensor(number, checks.sum_dtype(student), student.device).clamp(min=1)
            else:
                scale = 1.0 / max(number, 1)
        else:
            # No counted row gives a loss of 0, not 0/0. On a CPU the number is there at once, and one number is less
            # work than a weight for every row.
            count = (labels != ignore_index).sum()
            if labels.device.type == "cpu" and _is_known(labels):
                scale = 1.0 / max(int(count), 1)
            else:
                divisor = count.clamp(min=1).to(checks.sum_dtype(student))
    if divisor is None:
        return scale, row_weight
    if row_weight is None:
        return scale, divisor.reciprocal().expand(num_rows(student))
    return scale, row_weight / divisor


def _is_known(labels: Tensor) -> bool:
    """True if the labels have values, and not one per sample of ``torch.func.vmap``."""
    if torch.compiler.is_compiling() or not symbols.has_values(labels):
        return False
    return not (transforms.active() and transforms.stands_for_others(labels))
