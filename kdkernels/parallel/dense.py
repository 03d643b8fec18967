"""``kd_loss`` over a sharded vocabulary.

Phases: each rank reads its columns once for the normalisers, once more for the sums of the divergence, and in backward
for the gradient. Between them go a maximum and one or two sums of numbers per row: of a divergence that is linear in
the log-probabilities the sums relative to a shard's own normalisers tell those relative to all, so that one will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import backends, checks, memory, ops
from kdkernels.autograd import graph_is_kept, has_saved_tensor_hooks, refuse_second_derivative
from kdkernels.launch import Launch, as_rows, dense_launch
from kdkernels.objective import Objective
from kdkernels.parallel.calls import facts_of
from kdkernels.parallel.shards import Shards, outside_graphs, shards_of
from kdkernels.parallel.tokens import Part, call_of, part_of, picked_logits, rows_of
from kdkernels.reference import divergences
from kdkernels.reference.dense import PerRow, is_there
from kdkernels.reference.shards import shard_rows

# Divergences that are linear in the log-probabilities: sum p (c_pp log p + c_pq log q) + q (c_qp log p + c_qq log q).
LINEAR = {
    "forward_kl": (1.0, -1.0, 0.0, 0.0),
    "reverse_kl": (0.0, 0.0, -1.0, 1.0),
    "jeffreys": (1.0, -1.0, -1.0, 1.0),
    "soft_ce": (0.0, -1.0, 0.0, 0.0),
    "dual_soft_ce": (0.0, 0.0, -1.0, 0.0),
}


@outside_graphs
def kd_loss(given: Objective, student: Any, teacher: Any, labels: Any, of_columns: Sequence[Any] = ()) -> Any:
    """``kdkernels.kd_loss`` of a shard."""
    checks.shard("student", student)
    if given.inplace:
        checks.inplace_allowed(student)
    facts = facts_of(given, student, labels=labels is not None, teacher=teacher is not None)

    def check(total: int) -> Launch:
        refuse_what_is_missing(given, teacher, of_columns)
        if teacher is None:
            checks.without_teacher(given)
        else:
            checks.teacher_shard("teacher", teacher, student)
        backend = backends.choose(given.backend, student, divergence=given.resolved.name, pattern="shard_fwd")
        others = () if teacher is None else (teacher,)
        checks.reverse_mode_only(None, student, *others, labels, *given.tensors)
        checks.apart_in_place(given, student, {"labels": labels}, others)
        return dense_launch(given, student, labels, total, backend, None, given.mixture)

    shards, launch = shards_of(given.process_group, student, given.vocab_size, facts, check)
    loss = ShardedLoss.apply(student, teacher if teacher is None else teacher.detach(), launch, shards, given.inplace)
    return loss.reshape(student.shape[:-1]) if given.reduction == "none" else loss.sum()


def refuse_what_is_missing(given: Objective, teacher: Any, of_columns: Sequence[Any]) -> None:
    """Options that a sharded vocabulary has no kernel for."""
    missing = {
        "a mixture of teachers": isinstance(teacher, (list, tuple)),
        "teacher_lse": given.teacher_lse is not None,
        "a bias or teacher_columns": any(item is not None for item in of_columns),
        "student_form='log_probs'": given.student_form != "logits",
        f"dim={given.dim}": given.dim != -1,
        f"teacher_form={given.teacher_form!r}": given.teacher_form not in ("logits", "log_probs"),
        "standardize": given.standardize,
        "return_stats": given.return_stats,
    }
    for what, is_wanted in missing.items():
        if is_wanted:
            raise ValueError(f"{what} cannot be combined with process_group in kd_loss")
    if teacher is not None and teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher must not require grad with process_group: it gets no gradient; detach it")


class Rows(NamedTuple):
    """Of rows [N], over all shards."""

    student: tuple[Tensor, Tensor]  # a logit that all are relative to, and the log of the sum at the temperature
    teacher: tuple[Tensor, Tensor]
    log_z1: Tensor  # of the student at temperature 1
    divergence: Tensor
    score: Tensor  # the sum of df/dlogq
    label_logit: Tensor  # less the student's top
    mean: Tensor  # mean logit less that


class ShardedLoss(torch.autograd.Function):
    """Losses of rows [N], the same on all ranks; backward writes the gradient of this rank's columns."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Optional[Tensor], launch: Launch, shards: Shards, inplace: bool
    ) -> Tensor:
        student = student.detach()
        counted = counted_rows(launch, student)
        found = _summed(launch, shards, student, teacher, counted)
        loss = _losses(launch, found, counted)
        ctx.save_for_backward(student, teacher, counted, *found.student, *found.teacher, *found[2:])
        ctx.launch, ctx.shards, ctx.inplace, ctx.shared = launch, shards, inplace, has_saved_tensor_hooks()
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative(sharded=True)
        student, teacher, counted, s_top, s_log_z, t_top, t_log_z, *rest = ctx.saved_tensors
        found = Rows((s_top, s_log_z), (t_top, t_log_z), *rest)
        nothing = (None,) * 4
        if ctx.shards.columns == 0:
            return torch.zeros_like(student), *nothing
        over = ctx.inplace and not ctx.shared and not graph_is_kept()
        gradient = student if over else memory.empty_like(student)
        _differentiate(ctx.launch, ctx.shards, student, teacher, gradient, counted, found, dloss)
        if over:
            torch.autograd.graph.increment_version(student)
        return gradient, *nothing


def counted_rows(launch: Launch, student: Tensor) -> Tensor:
    labels = launch.rows.labels
    if labels is None:
        return torch.ones(student.shape[:-1].numel(), dtype=torch.bool, device=student.device)
    return labels != launch.options["ignore_index"]


def temperatures(launch: Launch) -> tuple[PerRow, PerRow]:
    rows, options = launch.rows, launch.options
    of_student, of_teacher = rows.student_temperature_rows, rows.teacher_temperature_rows
    return (
        options["temperature"] if of_student is None else of_student,
        options["teacher_temperature"] if of_teacher is None else of_teacher,
    )


def _norms(
    launch: Launch, shards: Shards, logits: Tensor, counted: Tensor, temperature: PerRow, cap: float, *, mean: bool
) -> Part:
    """What a shard knows of the softmax of one side, by the kernel that tokens have."""
    call = call_of(launch.backend, temperature, cap, stats=mean)
    ids = torch.where(counted, ops.ELSEWHERE, -1).unsqueeze(-1)
    return part_of(call, rows_of(logits), logits, ids, shards)


def _summed(launch: Launch, shards: Shards, student: Tensor, teacher: Optional[Tensor], counted: Tensor) -> Rows:
    options, rows = launch.options, launch.rows
    temperature, teacher_temperature = temperatures(launch)
    smoothed = bool(options["label_smoothing"]) and rows.labels is not None and is_there(options["ce_weight"])
    hard = is_there(options["z_loss_weight"]) or (rows.labels is not None and is_there(options["ce_weight"]))
    at_one = not isinstance(temperature, Tensor) and temperature == 1
    soft = teacher is not None and is_there(options["kd_weight"])
    cap = options["student_softcap"]
    parts: list[Part] = []
    if soft or (hard and at_one):
        parts.append(_norms(launch, shards, student, counted, temperature, cap, mean=smoothed and at_one))
    if hard and not at_one:
        parts.append(_norms(launch, shards, student, counted, 1.0, cap, mean=smoothed))
    if soft:
        assert teacher is not None
        parts.append(
            _norms(launch, shards, teacher, counted, teacher_temperature, options["teacher_softcap"], mean=False)
        )
    zero = torch.zeros(counted.shape, dtype=checks.sum_dtype(student), device=student.device)
    if not parts:
        return Rows((zero, zero), (zero, zero), zero, zero, zero, zero, zero)
    tops = shards.largest(*(part.top for part in parts))
    of_student, of_hard = parts[0], parts[1 if hard and not at_one and soft else 0]
    of_teacher = parts[-1] if soft else parts[0]
    student_top, teacher_top = tops[0], tops[-1]
    sums = []
    if soft or (hard and at_one):
        sums.append(_rising(of_student, student_top, temperature).exp())
    else:
        sums.append(zero)
    sums.append(_rising(of_hard, student_top, 1.0).exp() if hard and not at_one else zero)
    sums.append(_rising(of_teacher, teacher_top, teacher_temperature).exp() if soft else zero)
    label_logit = zero
    if rows.labels is not None and hard:
        local = shards.local(rows.labels, options["ignore_index"])
        picked = picked_logits(rows_of(student), local.unsqueeze(-1), cap, zero.dtype).squeeze(-1)
        label_logit = torch.where(local >= 0, picked - student_top, zero)
    sums.append(label_logit)
    # Of logits less their top, or an offset would be most of it.
    mean = of_hard.mean if of_hard.mean is not None else zero
    share = shards.columns / shards.total
    sums.append(torch.where(counted, mean - student_top * share, zero) if smoothed else zero)
    name = options["divergence"]
    linear = LINEAR.get(name) if soft else None
    if soft and linear is not None:
        assert teacher is not None
        sums += _linear_parts(
            launch, shards, student, teacher, counted, linear, of_student, of_teacher, student_top, teacher_top
        )
    z, z1, teacher_z, label_logit, mean, *linear_sums = shards.sum(*sums)
    # A row without a distribution is NaN.
    log_z, teacher_log_z = (torch.where(item == 0, torch.nan, item).log() for item in (z, teacher_z))
    log_z1 = log_z if at_one else torch.where(z1 == 0, torch.nan, z1).log()
    divergence, score = zero, zero
    if soft and linear is not None:
        divergence, score = _of_linear(linear, linear_sums, z, teacher_z, log_z, teacher_log_z)
    elif soft:
        assert teacher is not None
        numbers = _numbers(launch, counted, (student_top, log_z), (teacher_top, teacher_log_z))
        local_sums = _shard(launch, shards, student, teacher, None, None, numbers)
        divergence, score = shards.sum(local_sums[:, 0].contiguous(), local_sums[:, 1].contiguous())
    if soft and name in divergences.BUILT_IN:
        # Of two distributions none is negative: that is rounding.
        divergence = torch.where(divergence < 0, zero, divergence)
    return Rows((student_top, log_z), (teacher_top, teacher_log_z), log_z1, divergence, score, label_logit, mean)


def _rising(part: Part, top: Tensor, temperature: PerRow) -> Tensor:
    """The log of a shard's sum of exponentials relative to the largest logit of all shards."""
    return torch.where(part.z == 0, -torch.inf, (part.top - top) / temperature + part.z.log())


def _numbers(
    launch: Launch, counted: Tensor, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], **factors: Tensor
) -> Tensor:
    """``row_numbers`` of ``shard_fwd``."""
    temperature, teacher_temperature = temperatures(launch)
    zero = torch.zeros_like(student[0])
    given = {
        "student_unit": torch.where(counted, zero + 1 / temperature, zero),
        "student_top": student[0],
        "student_log_z": student[1],
        "teacher_unit": zero + 1 / teacher_temperature,
        "teacher_top": teacher[0],
        "teacher_log_z": teacher[1],
        **factors,
    }
    return torch.stack([given.get(name, zero) for name in ops.SHARD_NUMBERS], -1)


def _shard(
    launch: Launch,
    shards: Shards,
    student: Tensor,
    teacher: Optional[Tensor],
    gradient: Optional[Tensor],
    labels: Optional[Tensor],
    numbers: Tensor,
) -> Tensor:
    """Run ``shard_fwd`` on this rank's columns."""
    if shards.columns == 0:
        return numbers.new_zeros((len(numbers), 2))
    names = ("divergence", "param0", "param1", "student_softcap", "teacher_softcap")
    options = {**{name: launch.options[name] for name in names}, "vocab_size": shards.columns}
    source, other, *rest = as_rows(
        (student, student if teacher is None else teacher, *(() if gradient is None else (gradient,)))
    )
    operands = (source, other, rest[0] if rest else None, labels, numbers, launch.rows.param_rows)
    if launch.backend == "torch":
        return shard_rows(*operands, **options)
    return ops.call("shard_fwd", launch.backend, operands, options)


def _linear_parts(
    launch: Launch,
    shards: Shards,
    student: Tensor,
    teacher: Tensor,
    counted: Tensor,
    coefficients: tuple[float, ...],
    of_student: Part,
    of_teacher: Part,
    student_top: Tensor,
    teacher_top: Tensor,
) -> list[Tensor]:
    """The parts in p and in q of a linear divergence, times the shard's sums of exponentials."""
    temperature, teacher_temperature = temperatures(launch)
    own_s, own_t = (torch.where(part.z == 0, 0.0, part.z.log()) for part in (of_student, of_teacher))
    numbers = _numbers(launch, counted, (of_student.top, own_s), (of_teacher.top, own_t))
    value, score = _shard(launch, shards, student, teacher, None, None, numbers).unbind(-1)
    c_pp, c_pq, c_qp, c_qq = coefficients
    # A shard without any mass of a model is none of it.
    log_s = _rising(of_student, student_top, temperature)
    log_t = _rising(of_teacher, teacher_top, teacher_temperature)
    s, t = log_s.exp(), log_t.exp()
    p_is_here, q_is_here = of_teacher.z != 0, of_student.z != 0
    own_q = torch.where(q_is_here, score - c_qq, 0.0) - torch.where(p_is_here, c_pq, 0.0)
    own_p = value - own_q if c_qp or c_qq else value
    if not (c_qp or c_qq):
        own_q = torch.zeros_like(own_q)

    def relative(weight: Tensor, own: Tensor, c_t: float, c_s: float) -> Tensor:
        total = own
        if c_t:
            total = total + c_t * log_t
        if c_s:
            total = total + c_s * log_s
        return torch.where(weight == 0, 0.0, weight * total)

    return [relative(t, own_p, c_pp, c_pq), relative(s, own_q, c_qp, c_qq)]


def _of_linear(
    coefficients: tuple[float, ...],
    sums: list[Tensor],
    z: Tensor,
    teacher_z: Tensor,
    log_z: Tensor,
    log_teacher: Tensor,
) -> tuple[Tensor, Tensor]:
    c_pp, c_pq, c_qp, c_qq = coefficients
    of_p = sums[0] / teacher_z - c_pp * log_teacher - c_pq * log_z
    of_q = sums[1] / z - c_qp * log_teacher - c_qq * log_z
    return of_p + of_q, c_pq + c_qq + of_q


def _losses(launch: Launch, found: Rows, counted: Tensor) -> Tensor:
    """The loss of each row, with all that multiplies it."""
    options, zero = launch.options, torch.zeros_like(found.divergence)
    loss = zero
    for weight, value in _terms(launch, found):
        loss = loss + (torch.where(weight != 0, weight * value, zero) if isinstance(weight, Tensor) else weight * value)
    loss = torch.where(counted, loss * options["scale"], zero)
    return loss if launch.rows.row_weight is None else loss * launch.rows.row_weight


def _weight(launch: Launch, term: str) -> PerRow:
    of_rows = getattr(launch.rows, f"{term}_rows")
    return launch.options[term] if of_rows is None else of_rows


def _terms(launch: Launch, found: Rows) -> list[tuple[PerRow, Tensor]]:
    ce = None
    if launch.rows.labels is not None and is_there(launch.options["ce_weight"]):
        smoothing = launch.options["label_smoothing"]
        ce = found.log_z1 - (1 - smoothing) * found.label_logit
        ce = ce - smoothing * found.mean if smoothing else ce
    return terms_of_rows(launch, found.divergence, ce, found.student[0] + found.log_z1)


def terms_of_rows(
    launch: Launch, divergence: Tensor, ce: Optional[Tensor], lse: Optional[Tensor]
) -> list[tuple[PerRow, Tensor]]:
    """The weights of an objective's terms, and the terms ``[N]``."""
    options, terms = launch.options, []
    temperature = temperatures(launch)[0]
    if is_there(options["kd_weight"]):
        squared = temperature * temperature if options["scale_by_t_squared"] else 1.0
        terms.append((_weight(launch, "kd_weight"), squared * divergence))
    if ce is not None:
        terms.append((_weight(launch, "ce_weight"), ce))
    if lse is not None and is_there(options["z_loss_weight"]):
        terms.append((_weight(launch, "z_loss_weight"), lse.square()))
    return terms


def _differentiate(
    launch: Launch,
    shards: Shards,
    student: Tensor,
    teacher: Optional[Tensor],
    gradient: Tensor,
    counted: Tensor,
    found: Rows,
    dloss: Tensor,
) -> None:
    """Write the gradient of this rank's columns."""
    options, rows = launch.options, launch.rows
    zero = torch.zeros_like(found.divergence)
    each = torch.where(counted, dloss.reshape(-1).to(zero.dtype) * options["scale"], zero)
    if rows.row_weight is not None:
        each = each * rows.row_weight
    temperature = temperatures(launch)[0]
    factors = {}
    if teacher is not None and is_there(options["kd_weight"]):
        of_score = each * _weight(launch, "kd_weight")
        of_score = of_score * temperature if options["scale_by_t_squared"] else of_score / temperature
        factors["of_score"] = of_score
        factors["of_q"] = torch.where(of_score != 0, of_score * found.score, zero)
    hard, labels = zero, None
    if rows.labels is not None and is_there(options["ce_weight"]):
        hard = each * _weight(launch, "ce_weight")
        smoothing = options["label_smoothing"]
        labels = shards.local(rows.labels, options["ignore_index"]).contiguous()
        factors["at_label"] = -hard * (1 - smoothing)
        factors["constant"] = -hard * (smoothing / shards.total) if smoothing else zero
    if is_there(options["z_loss_weight"]):
        lse = found.student[0] + found.log_z1
        hard = torch.where(counted, hard + 2 * lse * (each * _weight(launch, "z_loss_weight")), zero)
    factors["of_hard"], factors["hard_log_z"] = hard, found.log_z1
    numbers = _numbers(launch, counted, found.student, found.teacher, **factors)
    _shard(launch, shards, student, teacher, gradient, labels, numbers)
