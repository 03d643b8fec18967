"""Losses of logits that are DTensors: every rank takes the rows it has, and sums are made over all ranks.

No module of ``torch.distributed`` is imported before a DTensor is met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kdkernels import checks

# Arguments that have a dimension after those of the rows; all others have one number a row, or for all.
WIDE = ("teacher", "teacher_ids", "teacher_logprobs", "teacher_weights")
PLAIN = (Tensor, torch.nn.Parameter, type(None), str, float, int, bool)


def among(values: Iterable[Any]) -> bool:
    """True if there is a DTensor among values, or in a list or tuple among them."""
    for value in values:
        if type(value) in PLAIN:
            continue
        if among(value) if isinstance(value, (list, tuple)) else checks.is_dtensor(value):
            return True
    return False


def of_all_ranks(loss: Callable[..., Any], student: Any, arguments: Mapping[str, Any]) -> Any:
    """``loss(student, **arguments)`` of DTensors, as one process would compute it; the results are DTensors.

    Rows have nothing to do with each other but in the reduction. The sum of a rank's rows is divided by what the sum of
    all rows is divided by, and the quotients are summed over the ranks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    checks.sharded_student(student, [name for name, value in arguments.items() if among([value])])
    mesh, placements, rows = student.device_mesh, student.placements, student.shape[:-1]
    local = {name: _local(name, value, student) for name, value in arguments.items()}
    reduction, normalizer = local.get("reduction", "mean"), local.get("normalizer")
    checks.reduction_name(reduction, student)
    checks.normalizer_like(normalizer, reduction)
    # A loss is a sum over the ranks that share the rows, and the same on those that have the same rows.
    summed = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    everywhere = [Replicate()] * mesh.ndim
    if summed != everywhere and reduction in ("mean", "batchmean"):
        if normalizer is None:
            count: Any = rows[0] if reduction == "batchmean" else rows.numel()
            if reduction == "mean" and local.get("labels") is not None:
                counted = (local["labels"] != local.get("ignore_index", -100)).sum()
                count = DTensor.from_local(counted, mesh, summed).full_tensor()
                # On a CPU a number is less work than a weight for every row.
                count = count.clamp(min=1) if _stays_on_device(count) else int(count)
            local["normalizer"] = count if isinstance(count, Tensor) else max(count, 1)
        local["reduction"] = "sum"

    shared = summed != everywhere and reduction != "none"
    try:
        result = loss(_to_local(student), **local)
    except Exception:
        if shared and not torch.compiler.is_compiling():
            # An error in the values of this rank's rows alone: the other ranks wait for its sum, and get a NaN.
            nothing = torch.full((), torch.nan, dtype=checks.sum_dtype(student), device=_to_local(student).device)
            DTensor.from_local(nothing, mesh, summed).redistribute(placements=everywhere)
        raise
    value, stats = result if isinstance(result, tuple) else (result, None)

    def of_rows(values: Tensor) -> Tensor:
        strides = torch.empty(rows, device="meta").stride()
        return DTensor.from_local(values, mesh, placements, shape=rows, stride=strides)

    if reduction == "none":
        value = of_rows(value)
    else:
        value = DTensor.from_local(value, mesh, summed).redistribute(placements=everywhere)
    return value if stats is None else (value, type(stats)(*map(of_rows, stats)))


def _local(name: str, value: Any, student: Any) -> Any:
    """This rank's part of an argument; of one with a value for every row, the values of its rows."""
    if isinstance(value, (list, tuple)):
        return [_local(f"{name}[{k}]", item, student) for k, item in enumerate(value)]
    return _local_tensor(name, value, student) if isinstance(value, Tensor) else value


def _local_tensor(name: str, value: Any, student: Any) -> Tensor:
    rows = student.shape[:-1]
    num_dims = len(rows) + (name.partition("[")[0] in WIDE)
    by_row = value.dim() == num_dims and (value.numel() != 1 or value.shape[: len(rows)] == rows)
    checks.sharded_argument(name, value, student, by_row=by_row)
    if not checks.is_dtensor(value):
        return value
    if by_row and value.placements != student.placements:
        # All of it is here: a slice, and nothing is sent.
        value = value.redistribute(placements=student.placements)
    return _to_local(value)


def _to_local(value: Any) -> Tensor:
    # The gradient of a row is where the row is, and whole.
    return value.to_local(grad_placements=value.placements)


def _stays_on_device(count: Tensor) -> bool:
    return not count.is_cpu or torch.compiler.is_compiling()
