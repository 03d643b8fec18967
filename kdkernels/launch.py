"""A call of an op: its tensors by name, its roles swapped, and the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import backends, checks, objective, ops, reference, symbols
from kdkernels.objective import RowOptions
from kdkernels.reduction import num_rows, row_weights


class RowTensors(NamedTuple):
    """The tensors of a call beside logits: one number per row ``[N]`` each, and the mixture's weights ``[N, M]``; those
    named in ``OF_COLUMNS`` have one number per column ``[V]``."""

    labels: Optional[Tensor] = None
    row_weight: Optional[Tensor] = None
    student_temperature_rows: Optional[Tensor] = None
    teacher_temperature_rows: Optional[Tensor] = None
    param_rows: Optional[Tensor] = None
    kd_weight_rows: Optional[Tensor] = None
    ce_weight_rows: Optional[Tensor] = None
    z_loss_weight_rows: Optional[Tensor] = None
    mixture_weights: Optional[Tensor] = None
    tail_rows: Optional[Tensor] = None
    teacher_lse_rows: Optional[Tensor] = None
    student_offsets: Optional[Tensor] = None
    teacher_offsets: Optional[Tensor] = None
    teacher_columns: Optional[Tensor] = None

    def weights_of_terms(self) -> list[Tensor]:
        """The weights of terms that are tensors."""
        given = (self.kd_weight_rows, self.ce_weight_rows, self.z_loss_weight_rows)
        return [item for item in given if item is not None]

    def chosen(self, rows: Any) -> RowTensors:
        """The tensors of some rows, which are an index."""
        return RowTensors(
            *(
                item if item is None or name in OF_COLUMNS else item[rows]
                for name, item in zip(self._fields, self, strict=True)
            )
        )


OF_COLUMNS = ("student_offsets", "teacher_offsets", "teacher_columns")


class Launch(NamedTuple):
    """A call of ``kdkernels::<pattern>_<backend>`` but for its tensors of logits."""

    pattern: str
    backend: str
    rows: RowTensors
    options: dict[str, Any]  # keyword arguments
    # Ids and log-probabilities [N, K], where they stand for the teacher's logits.
    sparse_teacher: tuple[Tensor, ...] = ()
    # About the largest entry of a row's gradient before ``scale`` and the row's weight; None where nobody knows.
    gradient_size: Optional[float] = 1.0
    # Where the classes stand in the tensors of the caller; before the last the rows lie next to each other.
    class_dim: int = -1

    def operands(self) -> list[Optional[Tensor]]:
        """The tensors that the op takes after ``dstudent``."""
        return [getattr(self.rows, name) for name in ops.ROW_TENSORS[self.pattern]]


def row_tensors(
    options: RowOptions, student: Tensor, labels: Optional[Tensor], *, learns: bool = False
) -> tuple[float, RowTensors]:
    """The tensors of a call with a number per row, checked, and what multiplies the loss of every row.

    ``labels`` are checked and flat. With ``learns`` temperatures keep their gradient.
    """
    normalizer, weight = options.normalizer, options.row_weight
    rows = RowTensors(labels)
    if options.tensors:
        given: dict[str, Any] = {}
        for name, of_rows in _ROWS.items():
            value = getattr(options, name, None)
            if isinstance(value, Tensor):
                high = 1.0 if name == "row_param" else math.inf
                closed = name == "row_param" and options.resolved.row_param_closed  # type: ignore[attr-defined]
                may_be_0 = closed or name in objective.TERMS
                reason: Optional[str] = "it gets no gradient"
                if name in TEMPERATURES:
                    reason = _why_no_gradient(learns)
                given[of_rows] = checks.per_row(
                    name, value, student, low=0.0, high=high, exclusive=not may_be_0, why_no_grad=reason
                )
        rows = rows._replace(**given)
        if getattr(options, "teacher_temperature", 0.0) is None:
            rows = rows._replace(teacher_temperature_rows=rows.student_temperature_rows)
        normalizer = checks.normalizer_like(normalizer, options.reduction, student)
        if isinstance(weight, Tensor):
            weight = checks.per_row("row_weight", weight, student)
    own = weight if isinstance(weight, Tensor) else None
    scale, weights = row_weights(options.reduction, student, labels, options.ignore_index, own, normalizer)
    if weight is not None and not isinstance(weight, Tensor):
        if symbols.is_symbol(weight):
            factor = symbols.as_tensor(weight, checks.sum_dtype(student), student.device)
            weights = factor.expand(num_rows(student)) if weights is None else weights * factor
        else:
            scale = scale * weight
    return scale, rows if weights is None else rows._replace(row_weight=weights)


TEMPERATURES = ("temperature", "teacher_temperature")


def _why_no_gradient(learns: bool) -> Optional[str]:
    if learns or not torch.is_grad_enabled():
        return None
    return "only kd_loss, lk_loss and taid_loss give it a gradient, in plain PyTorch"


def why_temperatures_learn(options: Any) -> Optional[str]:
    """Why a call is one for plain PyTorch: a temperature in it wants its gradient."""
    for name in TEMPERATURES:
        value = getattr(options, name)
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            return f"{name} requires grad, which only plain PyTorch gives it; detach it"
    return None


def dense_launch(
    options: Any,
    student: Tensor,
    labels: Any,
    columns: int,
    backend: str,
    weights: Optional[Tensor],
    mixture: str,
    of_columns: Optional[dict[str, Tensor]] = None,
    class_dim: int = -1,
    *,
    learns: bool = False,
) -> Launch:
    """The call of a dense objective, with the ``weights`` of its mixture ``[N, M]`` and the tensors ``OF_COLUMNS``;
    ``learns`` as ``row_tensors``."""
    labels = checks.labels_of(options, labels, student, columns)
    scale, rows = row_tensors(options, student, labels, learns=learns)
    scalars = {**options.scalars, "mixture": mixture, "scale": scale, "vocab_size": columns}
    rows = rows if weights is None else rows._replace(mixture_weights=weights)
    if options.teacher_lse is not None:
        if weights is not None:
            raise ValueError("teacher_lse needs one teacher, got a sequence of teachers")
        lse = checks.per_row("teacher_lse", options.teacher_lse, student, exclusive=False)
        if not isinstance(lse, Tensor):
            lse = symbols.as_tensor(lse, checks.sum_dtype(student), student.device).expand(num_rows(student))
        rows = rows._replace(teacher_lse_rows=lse)
    rows = rows._replace(**of_columns) if of_columns else rows
    launch = Launch("dense_fwd", backend, rows, scalars, gradient_size=options.gradient_size)
    if class_dim == -1 or backend == "torch":
        return launch
    known = (*ops.NUMBERS["pixel_fwd"], *ops.CHOICES["pixel_fwd"], "divergence", "vocab_size", "stats")
    scalars = {name: scalars[name] for name in known}
    return launch._replace(pattern="pixel_fwd", options=scalars, class_dim=class_dim)


def topk_launch(
    options: Any, student: Tensor, entries: tuple[Any, Any], labels: Any, tail_logprob: Any, columns: int
) -> Launch:
    """The call of a sparse objective, whose ``entries`` are ids and log-probabilities."""
    teacher = checks.sparse_teacher(*entries, student, columns, options.tail)
    backend = backends.choose(options.backend, student, divergence=options.resolved.name, pattern="topk_fwd")
    tail_rows = checks.tail_like(tail_logprob, options.tail, student)
    scale, rows = row_tensors(options, student, checks.labels_of(options, labels, student, columns))
    scalars = options.floor(teacher[1].dtype, tail_is_given=tail_rows is not None)
    scalars = {**scalars, "scale": scale, "vocab_size": columns}
    rows = rows if tail_rows is None else rows._replace(tail_rows=tail_rows)
    return Launch("topk_fwd", backend, rows, scalars, teacher, options.gradient_size)


def uniform_launch(options: Any, student: Tensor, labels: Any, columns: int) -> Launch:
    """The call of a dense objective whose teacher is uniform: a sparse one without entries, all of it tail."""
    backend = backends.choose(options.backend, student, divergence="forward_kl", pattern="topk_fwd")
    scale, rows = row_tensors(options, student, checks.labels_of(options, labels, student, columns))
    number, dtype = num_rows(student), checks.sum_dtype(student)
    rows = rows._replace(
        teacher_temperature_rows=None, tail_rows=torch.zeros(number, dtype=dtype, device=student.device)
    )
    known = (*ops.NUMBERS["topk_fwd"], *ops.CHOICES["topk_fwd"], "stats")
    scalars = {name: value for name, value in options.scalars.items() if name in known}
    scalars |= {
        "divergence": "forward_kl",
        "teacher_temperature": 1.0,
        "tail": "uniform",
        "min_tail": 0.0,
        "tail_rounding": 0.0,
        "scale": scale,
        "vocab_size": columns,
    }
    ids = torch.full((number, 1), -1, dtype=torch.int64, device=student.device)
    logprobs = torch.full((number, 1), -torch.inf, dtype=dtype, device=student.device)
    return Launch("topk_fwd", backend, rows, scalars, (ids, logprobs), options.gradient_size)


def with_stats(loss: Tensor, stats: Optional[Tensor], student: Tensor, kind: Any) -> Any:
    """The loss, with the columns of ``stats`` as a named tuple of type ``kind`` where there are any."""
    if stats is None:
        return loss
    return loss, kind(*(column.reshape(student.shape[:-1]) for column in stats.unbind(-1)))


def without_teacher(result: Any) -> Any:
    """A loss, with or without ``KDStats``, of a student that stood for its own teacher: of that nothing is told."""
    if not isinstance(result, tuple):
        return result
    loss, stats = result
    nothing = torch.full_like(stats.lse, torch.nan)
    told = {"ce": stats.ce, "lse": stats.lse, "student_entropy": stats.student_entropy}
    return loss, stats._replace(**{name: told.get(name, nothing) for name in stats._fields})


_ROWS = {
    "temperature": "student_temperature_rows",
    "teacher_temperature": "teacher_temperature_rows",
    "row_param": "param_rows",
    **{name: f"{name}_rows" for name in objective.TERMS},
}


def dual(launch: Launch, options: Any, teacher: Tensor) -> Launch:
    """The launch whose student is the teacher: roles swapped, without the student's terms."""
    swapped = options.resolved.dual().canonical()
    param0, param1 = swapped.params()
    # Numbers per row are in the dtype of the sums, which is that of whoever is the student.
    dtype = checks.sum_dtype(teacher)
    rows = RowTensors(*(item if item is None or k == 0 else item.to(dtype) for k, item in enumerate(launch.rows)))
    weight, temperatures, param = rows.row_weight, rows.student_temperature_rows, rows.param_rows
    if rows.kd_weight_rows is not None:
        weight = rows.kd_weight_rows if weight is None else weight * rows.kd_weight_rows
    scale = launch.options["scale"]
    if param is not None and swapped.name == options.resolved.name:
        param = 1 - param  # JSD's beta weighs the teacher
    if options.scale_by_t_squared:
        # T of the factor stays the student's, whose role the teacher plays here.
        if temperatures is None:
            scale = scale * launch.options["temperature"] ** 2
        else:
            weight = temperatures**2 if weight is None else weight * temperatures**2
    scalars = {
        **launch.options,
        "divergence": swapped.name,
        "param0": param0,
        "param1": param1,
        "scale": scale,
        "temperature": launch.options["teacher_temperature"],
        "teacher_temperature": launch.options["temperature"],
        "ce_weight": 0.0,
        "z_loss_weight": 0.0,
        "scale_by_t_squared": False,
        "teacher_form": "logits",
        "student_softcap": launch.options["teacher_softcap"],
        "teacher_softcap": launch.options["student_softcap"],
        "stats": False,
    }
    rows = RowTensors(
        rows.labels,
        weight,
        rows.teacher_temperature_rows,
        temperatures,
        param,
        student_offsets=rows.teacher_offsets,
        teacher_offsets=None if rows.student_offsets is None else rows.student_offsets.detach(),
    )
    of_rows = rows.student_temperature_rows is not None or launch.rows.kd_weight_rows is not None
    size = objective.gradient_size(swapped, scalars, rows=of_rows)
    return launch._replace(rows=rows, options=scalars, gradient_size=size)


def run(
    launch: Launch, student: Tensor, teachers: tuple[Tensor, ...], dstudent: Optional[Tensor]
) -> tuple[Tensor, Optional[Tensor]]:
    """Call the op; logits of any leading shape become ``[B, L, V]`` views. Statistics only where they are asked for."""
    views = as_rows((student, *teachers, *(() if dstudent is None else (dstudent,))))
    destination = None if dstudent is None else views[-1]
    operands: list[Any] = list(views[1 : 1 + len(teachers)])
    if launch.pattern == "dense_fwd":
        operands = [operands]
    shared = None
    if launch.pattern == "topk_fwd" and launch.options["stats"] and launch.backend in ("cuda", "triton"):
        # Before the launch, which may overwrite the student.
        ids, logprobs = launch.sparse_teacher
        shared = reference.topk.student_overlap(student, ids, logprobs, launch.rows.labels, launch.options)
    operands = [views[0], *operands, *launch.sparse_teacher, destination, *launch.operands()]
    result = ops.call(launch.pattern, launch.backend, operands, launch.options)
    if isinstance(result, Tensor):
        return result, None
    if not launch.options["stats"]:
        return result[0], None
    if shared is not None:
        result[1][:, -1] = shared
    return result


def run_reference(launch: Launch, student: Tensor, teachers: Sequence[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
    """As ``run`` in plain PyTorch, on logits ``[N, V]``; autograd sees all of it."""
    rows, options = launch.rows, dict(launch.options)
    scale = options.pop("scale")
    if "param0" in options:
        param0, param1 = options.pop("param0"), options.pop("param1")
        options["params"] = (param0 if rows.param_rows is None else rows.param_rows, param1)
    if rows.student_temperature_rows is not None:
        options["temperature"] = rows.student_temperature_rows
    if rows.teacher_temperature_rows is not None:
        options["teacher_temperature"] = rows.teacher_temperature_rows
    for term in objective.TERMS:
        weights = getattr(rows, f"{term}_rows")
        if weights is not None:
            options[term] = weights
    stats: Optional[Tensor] = None
    if launch.pattern == "topk_fwd":
        ids, logprobs = launch.sparse_teacher
        loss, stats = reference.topk_rows(student, ids, logprobs, rows.labels, tail_rows=rows.tail_rows, **options)
    elif launch.pattern == "dense_fwd":
        options |= {"mixture_weights": rows.mixture_weights, "teacher_lse": rows.teacher_lse_rows}
        options |= {name: getattr(rows, name) for name in OF_COLUMNS}
        loss, *columns = reference.dense_rows(student, teachers, rows.labels, **options)
        if options["stats"]:
            stats = torch.stack([column for column in columns if column is not None], -1)
    else:
        of_rows: Any = reference.dkd_rows if launch.pattern == "dkd_fwd" else reference.mse_rows
        loss = of_rows(student, teachers[0], rows.labels, **options)
    return loss * scale if rows.row_weight is None else loss * (scale * rows.row_weight), stats


def as_rows(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """View tensors of one leading shape as ``[B, L, V]`` with a common B and L.

    Any tensor of up to three dimensions is a view already, and so are those whose leading dimensions collapse into two.
    Only what remains (four and more dimensions, cut in two places) is copied; in place that is refused in ``checks``.
    """
    if tensors[0].dim() == 2:
        return [t.unsqueeze(0) for t in tensors]
    leading = tensors[0].shape[:-1]
    if len(leading) <= 2:
        shape = (1, 1) if len(leading) == 0 else (1, leading[0]) if len(leading) == 1 else tuple(leading)
        if len(leading) == 2 and all(_mergeable(t, 0, 2) for t in tensors):
            shape = (1, leading[0] * leading[1])
        return [_view(t, shape) for t in tensors]
    for cut in range(len(leading)):
        if all(_mergeable(t, 0, cut) and _mergeable(t, cut, len(leading)) for t in tensors):
            shape = (math.prod(leading[:cut]), math.prod(leading[cut:]))
            return [_view(t, shape) for t in tensors]
    return [t.reshape(1, math.prod(leading), t.shape[-1]) for t in tensors]


def flat(tensor: Tensor) -> Tensor:
    """``[N, V]``."""
    return tensor.reshape(-1, tensor.shape[-1])


def _view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.view(*shape, tensor.shape[-1])


def _mergeable(tensor: Tensor, start: int, stop: int) -> bool:
    """True if dimensions ``start .. stop - 1`` collapse into one without a copy."""
    return all(
        tensor.shape[d] == 1
        or tensor.shape[d + 1] == 1
        or tensor.stride(d) == tensor.shape[d + 1] * tensor.stride(d + 1)
        for d in range(start, stop - 1)
    )
