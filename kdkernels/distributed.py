"""Losses of logits that are DTensors: every rank takes the rows it has, and sums are made over all ranks.

A vocabulary that is sharded too is taken off first: what is left are DTensors of rows on the rest of the mesh, for a
loss with ``process_group``.

No module of ``torch.distributed`` is imported before a DTensor is met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import checks

# Arguments that have a dimension after those of the rows; all others have one number a row, or for all.
WIDE = ("teacher", "teacher_ids", "teacher_logprobs", "teacher_weights")
# Losses that take a process group of ranks that have some of the columns each.
OF_SHARDS = ("kd_loss", "topk_kd_loss", "lk_loss", "taid_loss", "dkd_loss", "logit_mse_loss")
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

    checks.sharded_student(
        student, [name for name, value in arguments.items() if among([value])], columns=loss.__name__ in OF_SHARDS
    )
    if checks.column_dims(student):
        return _of_shards(loss, student, arguments)
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


def _of_shards(loss: Callable[..., Any], student: Any, arguments: Mapping[str, Any]) -> Any:
    """As ``of_all_ranks``, of a student whose columns are sharded over one dimension of its mesh."""
    from torch.distributed.tensor import DTensor, Replicate

    shards = _Columns(student, arguments.get("process_group"))
    local = {name: shards.argument(name, value) for name, value in arguments.items()}
    local["process_group"] = shards.group
    result = loss(shards.without(student), **local)
    value, stats = result if isinstance(result, tuple) else (result, None)
    rows = student.shape[:-1]
    if arguments.get("reduction") != "none":
        everywhere = [Replicate()] * student.device_mesh.ndim
        value = DTensor.from_local(_whole_of(value), student.device_mesh, everywhere)
    else:
        value = shards.of_rows(value, rows)
    return value if stats is None else (value, type(stats)(*(shards.of_rows(item, rows) for item in stats)))


def of_tokens(function: Callable[..., Any], logits: Any, ids: Any, options: Mapping[str, Any]) -> Any:
    """``function(logits, ids, **options)`` of logits that are a DTensor, for functions whose rows are independent.

    ``ids`` is None where the function takes none.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not checks.is_dtensor(logits):
        raise TypeError("logits must be a DTensor as ids are, got a plain tensor; pass ids.to_local()")
    shards = _Columns(logits, options.get("process_group")) if checks.column_dims(logits) else None
    mesh, rows = logits.device_mesh, logits.shape[:-1]
    placements = [Replicate() if shards is not None and k == shards.dim else p for k, p in enumerate(logits.placements)]
    like = _RowsLike(mesh, placements, torch.Size((*rows, 1)))
    given = [] if ids is None else [_local_tensor("ids", ids, like)]
    local = {name: _local(name, value, like) for name, value in options.items()}
    if shards is not None:
        local["process_group"] = shards.group

    def of_rows(values: Any) -> Any:
        if values is None:
            return None
        shape = torch.Size((*rows, *values.shape[len(rows) :]))
        return DTensor.from_local(
            values, mesh, placements, shape=shape, stride=torch.empty(shape, device="meta").stride()
        )

    def wrapped(result: Any) -> Any:
        if not isinstance(result, tuple):
            return of_rows(result)
        return type(result)(*map(of_rows, result)) if hasattr(result, "_fields") else tuple(map(wrapped, result))

    return wrapped(function(_to_local(logits), *given, **local))


def of_heads(function: Callable[..., Any], arguments: Mapping[str, Any], side: str = "student_") -> Any:
    """``function(**arguments)`` of hidden states that are a DTensor, the same on all ranks.

    Heads are sharded by their rows, or are before the call: of one that is whole each rank takes its part, whose
    gradients are gathered.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    hidden = arguments[f"{side}hidden"]
    if arguments.get("process_group") is not None:
        raise ValueError(f"process_group must not be given where {side}hidden is a DTensor: its mesh tells")
    mesh = hidden.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"{side}hidden must be on a mesh of one dimension, over which the heads are sharded, got {mesh.ndim}; pass "
            "local tensors and process_group=mesh.get_group(...)"
        )

    def local(name: str, value: Any) -> Any:
        of_head = name.endswith(("weight", "bias")) and name != "row_weight"
        if isinstance(value, torch.nn.Module) or (
            of_head and isinstance(value, Tensor) and not checks.is_dtensor(value)
        ):
            raise TypeError(
                f"{name} must be a DTensor as {side}hidden is, got {type(value).__name__}; of a module pass the weight "
                "and the bias"
            )
        if not checks.is_dtensor(value):
            return value
        if value.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of {side}hidden {mesh}, got {value.device_mesh}")
        allowed: tuple[Any, ...] = (Replicate(), Shard(0)) if of_head else (Replicate(),)
        if value.placements[0] not in allowed:
            raise ValueError(f"{name} must have one of the placements {list(allowed)}, got {list(value.placements)}")
        return _to_local(value.redistribute(placements=[Shard(0)]) if of_head else value)

    def whole(result: Any) -> Any:
        if isinstance(result, Tensor):
            return DTensor.from_local(result, mesh, [Replicate()])
        if not isinstance(result, tuple):
            return result
        return type(result)(*map(whole, result)) if hasattr(result, "_fields") else tuple(map(whole, result))

    given = {name: local(name, value) for name, value in arguments.items()}
    return whole(function(**given, process_group=mesh.get_group()))


class _RowsLike(NamedTuple):
    """The placement that an argument's is compared with."""

    device_mesh: Any
    placements: Sequence[Any]
    shape: torch.Size


class _Columns:
    """The dimension of a DTensor's mesh over which the columns are sharded, and the DTensors without it."""

    def __init__(self, student: Any, process_group: Any) -> None:
        if process_group is not None:
            raise ValueError("process_group must not be given for a DTensor whose columns are sharded: its mesh tells")
        self.student, self.mesh = student, student.device_mesh
        (self.dim,) = checks.column_dims(student)
        self.group = self.mesh.get_group(self.dim)
        self.others = [k for k in range(self.mesh.ndim) if k != self.dim]
        names = self.mesh.mesh_dim_names
        if self.others and names is None:
            raise ValueError(
                "student must have a mesh whose dimensions have names (mesh_dim_names) where rows are sharded beside "
                "columns"
            )
        self.rest = self.mesh[tuple(names[k] for k in self.others)] if self.others else None

    def without(self, value: Any) -> Any:
        """A DTensor of rows and this rank's columns on the rest of the mesh; a plain tensor where there is no rest."""
        from torch.distributed.tensor import DTensor

        local = _to_local(value)
        if self.rest is None:
            return local
        rows = len(self.student.shape) - 1
        shape = torch.Size((*value.shape[:rows], *local.shape[rows:]))
        strides = torch.empty(shape, device="meta").stride()
        placements = [value.placements[k] for k in self.others]
        return DTensor.from_local(local, self.rest, placements, shape=shape, stride=strides)

    def argument(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self.argument(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        return self._teacher(value) if name == "teacher" else self._of_rows(name, value)

    def _teacher(self, value: Any) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        if not checks.is_dtensor(value):
            if not all(p.is_replicate() for k, p in enumerate(self.student.placements) if k != self.dim):
                checks.sharded_argument("teacher", value, self.student, by_row=True)
            # All of it is here.
            value = DTensor.from_local(value, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        checks.same_mesh("teacher", value, self.student)
        if tuple(value.shape) != tuple(self.student.shape):
            raise ValueError(
                f"teacher must have the student's shape {tuple(self.student.shape)}, got {tuple(value.shape)}"
            )
        if value.placements[self.dim].is_replicate():
            placements = [self.student.placements[k] if k == self.dim else p for k, p in enumerate(value.placements)]
            value = value.redistribute(placements=placements)
        if value.placements[self.dim] != self.student.placements[self.dim]:
            raise ValueError(
                f"teacher must have the student's placements {list(self.student.placements)}, got "
                f"{list(value.placements)}"
            )
        return self.without(value)

    def _of_rows(self, name: str, value: Any) -> Any:
        if not checks.is_dtensor(value):
            return value
        checks.same_mesh(name, value, self.student)
        if not value.placements[self.dim].is_replicate():
            raise ValueError(
                f"{name} must be the same on all ranks that have columns of a row, got {list(value.placements)}"
            )
        return self.without(value)

    def of_rows(self, value: Any, rows: torch.Size) -> Any:
        """Values of rows on the whole mesh."""
        from torch.distributed.tensor import DTensor, Replicate

        placements = [Replicate() if k == self.dim else p for k, p in enumerate(self.student.placements)]
        strides = torch.empty(rows, device="meta").stride()
        return DTensor.from_local(_whole_of(value), self.mesh, placements, shape=rows, stride=strides)


def _whole_of(value: Any) -> Tensor:
    return _to_local(value) if checks.is_dtensor(value) else value


def _local(name: str, value: Any, student: Any) -> Any:
    """This rank's part of an argument; of one with a value for every row, the values of its rows."""
    if isinstance(value, (list, tuple)):
        return [_local(f"{name}[{k}]", item, student) for k, item in enumerate(value)]
    return _local_tensor(name, value, student) if isinstance(value, Tensor) else value


def _local_tensor(name: str, value: Any, student: Any) -> Tensor:
    rows = student.shape[:-1]
    num_dims = len(rows) + (name.partition("[")[0] in WIDE)
    # Ids of tokens are one or several of a row.
    with_dims = value.dim() == num_dims or (name == "ids" and value.dim() == num_dims + 1)
    by_row = with_dims and (value.numel() != 1 or value.shape[: len(rows)] == rows)
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
