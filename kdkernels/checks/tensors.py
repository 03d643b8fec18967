"""Tensors of any meaning: their type, dtype and device, if their values may be read, and how DTensors are placed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import symbols, transforms

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_dtensor(value: Any) -> bool:
    """True if a value is a DTensor. This imports nothing, and costs next to nothing where it is a plain tensor."""
    kind = type(value)
    return kind is not Tensor and issubclass(kind, Tensor) and hasattr(kind, "full_tensor")


def tensor(name: str, value: Any) -> None:
    """A tensor that is no DTensor."""
    if not isinstance(value, Tensor):
        raise no_tensor(name, value)
    plain(name, value)


def no_tensor(name: str, value: Any) -> TypeError:
    """The error of a value that is no tensor, with the field that was meant."""
    fields = ("last_hidden_state",) if name.endswith("hidden") else ("logits", "logprobs")
    meant = next((field for field in fields if isinstance(getattr(value, field, None), Tensor)), None)
    hint = f"; pass its .{meant}" if meant else ""
    if name.endswith("hidden") and not meant and isinstance(getattr(value, "hidden_states", None), tuple):
        hint = "; pass its .hidden_states[-1]"
    elif name.endswith("hidden") and isinstance(value, tuple) and value and isinstance(value[-1], Tensor):
        hint = "; pass the last of them, [-1]"
    if isinstance(value, (int, float)):
        hint = "; options, temperature among them, are keywords"
    return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{hint}")


def with_slots(rows: Iterable[int]) -> str:
    """A shape of K slots a row, for messages."""
    return f"({', '.join([*map(str, rows), 'K'])})"


def floating(name: str, value: Tensor) -> None:
    """A dtype that logits may have."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype_name(value.dtype)}")


def integers(name: str, value: Tensor) -> None:
    """A dtype that ids may have."""
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {dtype_name(value.dtype)}")


def same_device(name: str, value: Tensor, other: Tensor, whose: str = "the student's") -> None:
    """The device of another tensor of the call."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {whose} device {other.device}, got {value.device}")


def plain(name: str, value: Any) -> None:
    """A value is no DTensor, where only the numbers of this rank are of use."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor here, got a DTensor with placements {_listed(value.placements)}; pass "
            f"{name}.to_local() for what this rank has, or {name}.full_tensor()"
        )


def sum_dtype(student: Tensor) -> torch.dtype:
    """The dtype of sums, losses and per-row numbers: fp64 for fp64, else fp32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def reads_values(value: Tensor) -> bool:
    """True if the values of a tensor may be read for a check."""
    if torch.compiler.is_compiling() or not symbols.has_values(value):
        return False
    if transforms.active() and transforms.stands_for_others(value):
        return False
    return value.device.type == "cpu" or os.environ.get("KDKERNELS_DEBUG") == "1"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without the name of its package."""
    return str(dtype).replace("torch.", "")


def column_dims(value: Any) -> list[int]:
    """The dimensions of a DTensor's mesh over which its last dimension is sharded."""
    last = value.dim() - 1
    return [k for k, placement in enumerate(value.placements) if getattr(placement, "dim", -1) == last]


def same_mesh(name: str, value: Any, student: Any) -> None:
    """A DTensor on the student's mesh."""
    if value.device_mesh != student.device_mesh:
        raise ValueError(f"{name} must be on the student's mesh {student.device_mesh}, got {value.device_mesh}")


def sharded_student(student: Any, others: Sequence[str], *, columns: bool) -> None:
    """The student is a DTensor as ``others`` are, whole on every rank or sharded in dimensions of its rows; ``columns``
    may be sharded over one dimension of the mesh where the loss can take them."""
    if not is_dtensor(student):
        kind = "plain tensor" if isinstance(student, Tensor) else type(student).__name__
        raise TypeError(
            f"student must be a DTensor as {others[0]} is, got a {kind}; pass DTensor.from_local(student, ...), or "
            f"{others[0]}.to_local() for what this rank has"
        )
    if student.dim() == 0:
        raise ValueError("student must have shape (..., V) with V >= 1, got ()")
    if columns and len(column_dims(student)) == 1:
        return
    _sharded_by_rows("student", student, student.dim() - 1)


def sharded_argument(name: str, value: Any, student: Any, *, by_row: bool) -> None:
    """A tensor of a call whose student is a DTensor: placed as its rows are where ``by_row``, else the same anywhere.

    Shapes are compared here, and not by the loss of a rank's rows alone: an error must come to all ranks, or those that
    it does not come to wait for the others.
    """
    whole, rows = _whole(student), tuple(student.shape[:-1])
    if not is_dtensor(value):
        if by_row and not whole:
            placements = _listed(student.placements)
            raise TypeError(
                f"{name} must be a DTensor as the student is, whose placements are {placements}, got a plain tensor; "
                f"pass DTensor.from_local({name}, mesh, {placements}) where it is this rank's part, or "
                f"distribute_tensor({name}, mesh, {placements}) where it is all of it"
            )
        return
    same_mesh(name, value, student)
    if not by_row:
        if not _whole(value):
            raise ValueError(
                f"{name} must have the student's rows {rows} or be the same on all ranks, got shape "
                f"{tuple(value.shape)} with placements {_listed(value.placements)}; pass {name}.full_tensor()"
            )
        return
    if tuple(value.shape[: len(rows)]) != rows:
        raise ValueError(f"{name} must have the student's leading shape {rows}, got {tuple(value.shape)}")
    _sharded_by_rows(name, value, len(rows))
    if any(not p.is_replicate() and p != q for p, q in zip(value.placements, student.placements, strict=True)):
        wanted = _listed(student.placements)
        raise ValueError(
            f"{name} must have the student's placements {wanted}, got {_listed(value.placements)}; pass "
            f"{name}.redistribute(placements={wanted})"
        )


def _sharded_by_rows(name: str, value: Any, num_dims: int) -> None:
    """Of a DTensor whose first dimensions are those of rows no other is cut, and nothing is left to be summed."""
    placements = value.placements
    wrong = [placement.is_partial() or getattr(placement, "dim", -1) >= num_dims for placement in placements]
    if not any(wrong):
        return
    wanted = ", ".join("Replicate()" if bad else _placed(p) for bad, p in zip(wrong, placements, strict=True))
    state, reason = "a sum over ranks that is still to be made", ""
    if not any(placement.is_partial() for placement in placements):
        state = "sharded in its last dimension"
        reason = ": kd_loss and topk_kd_loss take a vocabulary that is sharded over one dimension of the mesh"
    raise ValueError(
        f"{name} must not be {state}, got placements {_listed(placements)}{reason}; pass "
        f"{name}.redistribute(placements=[{wanted}])"
    )


def _whole(value: Any) -> bool:
    return all(placement.is_replicate() for placement in value.placements)


def _listed(placements: Sequence[Any]) -> str:
    """Placements of a DTensor, as one writes them."""
    return f"[{', '.join(map(_placed, placements))}]"


def _placed(value: Any) -> str:
    """A placement of a DTensor, as one writes it."""
    if not torch.compiler.is_compiling():
        return repr(value)
    # Dynamo does not trace the repr of a placement.
    return "Replicate()" if value.is_replicate() else "Partial()" if value.is_partial() else f"Shard(dim={value.dim})"
