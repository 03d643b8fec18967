"""``kd_loss`` over a sharded vocabulary, ``lk_loss`` and ``taid_loss``.

Phases: each rank reads its columns once for the normalisers, once more for the sums of the divergence, and in backward
for the gradient. Between them go a maximum and one or two sums of numbers per row: of a divergence that is linear in
the log-probabilities the sums relative to a shard's own normalisers tell those relative to all, so that one will do.
Statistics need the normalisers of all, and are gathered with the second sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import backends, checks, ops, symbols
from kdkernels.autograd import graph_is_kept, has_saved_tensor_hooks, reduced, refuse_second_derivative
from kdkernels.launch import Launch, dense_launch, dual, with_stats, without_teacher
from kdkernels.objective import Objective, TAIDObjective
from kdkernels.parallel.calls import facts_of
from kdkernels.parallel.models import Models, temperatures
from kdkernels.parallel.shards import Shards, outside_graphs, shards_of
from kdkernels.parallel.tokens import Part, empty_gradient
from kdkernels.reduction import num_rows
from kdkernels.reference import divergences
from kdkernels.reference.dense import PerRow, is_there
from kdkernels.stats import KDStats

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
    """``kdkernels.kd_loss`` and ``kdkernels.lk_loss`` of a shard."""
    checks.shard("student", student)
    if given.inplace:
        checks.inplace_allowed(student)
    single = not isinstance(teacher, (list, tuple))
    several: tuple[Any, ...] = (teacher,) if single else tuple(teacher)
    several = () if teacher is None else several
    student_bias, teacher_bias = of_columns[:2] or (None, None)
    learns = torch.is_grad_enabled() and any(getattr(item, "requires_grad", False) for item in several)
    facts = facts_of(
        given.function,
        given,
        student,
        labels=labels is not None,
        teacher=len(several) if single else -len(several),
        teacher_grad=learns,
        student_bias=student_bias is not None,
    )

    def check(total: int) -> Launch:
        refuse_what_is_missing(given, of_columns)
        if teacher is None:
            checks.without_teacher(given)
            weights = None
        else:
            if not single:
                checks.several(several)
            for k, item in enumerate(several):
                checks.teacher_shard("teacher" if len(several) == 1 else f"teacher[{k}]", item, student)
            weights = checks.mixture_weights(given, len(several), student, single=single)
        why = checks.why_no_teacher_grad(given, mixed=weights is not None) if learns else None
        if why:
            raise ValueError(f"teacher must not require grad with process_group: {why}")
        offsets = checks.of_columns(given, student, several, student.shape[-1], student_bias, teacher_bias, None)
        backend = backends.choose(given.backend, student, divergence=given.resolved.name, pattern="shard_fwd")
        checks.reverse_mode_only(None, student, *several, labels, *offsets.values(), *given.tensors)
        others = {"labels": labels, "student_bias": student_bias, "teacher_bias": teacher_bias}
        checks.apart_in_place(given, student, others, several)
        mixture = given.mixture if teacher is None else checks.mixture_of(given)
        launch = dense_launch(given, student, labels, total, backend, weights, mixture, offsets)
        for k, item in enumerate(several):
            checks.shard_of_probabilities(given, "teacher" if single else f"teacher[{k}]", item, launch.rows.labels)
        if learns:
            dual(launch, given, teacher)
        return launch

    shards, launch = shards_of(given.process_group, student, given.vocab_size, facts, check)
    found = _evaluate(given, launch, shards, student, several)
    if learns:
        swapped = dual(launch, given, teacher)
        of_teacher = ShardedLoss.apply(teacher, student.detach(), swapped, shards, False)
        found = (_AndGradient.apply(found[0], of_teacher), *found[1:])
    result = _shaped(given, student, *found)
    return without_teacher(result) if teacher is None else result


@outside_graphs
def taid_loss(given: TAIDObjective, student: Any, teacher: Any, labels: Any) -> Any:
    """``kdkernels.taid_loss`` of a shard: a mixture of logits, one of them the student's own."""
    checks.shard("student", student)
    if given.inplace:
        checks.inplace_allowed(student)
    facts = facts_of(given.function, given, student, labels=labels is not None)

    def check(total: int) -> Launch:
        refuse_what_is_missing(given, ())
        checks.teacher_shard("teacher", teacher, student)
        checks.teacher_gets_none(given.function, teacher)
        share = checks.per_row("interpolation", given.interpolation, student, low=0.0, high=1.0, exclusive=False)
        if not isinstance(share, Tensor):
            share = symbols.as_tensor(share, checks.sum_dtype(student), student.device)
        weights = torch.stack([1 - share, share], -1).expand(num_rows(student), 2)
        checks.apart_in_place(given, student, {"labels": labels}, (teacher,))
        backend = backends.choose(given.backend, student, divergence=given.resolved.name, pattern="shard_fwd")
        checks.reverse_mode_only(None, student, teacher, labels, *given.tensors)
        return dense_launch(given, student, labels, total, backend, weights, "logits")

    shards, launch = shards_of(given.process_group, student, given.vocab_size, facts, check)
    return _shaped(given, student, *_evaluate(given, launch, shards, student, (student.detach(), teacher)))


def _evaluate(
    given: Objective, launch: Launch, shards: Shards, student: Tensor, teachers: Sequence[Tensor]
) -> tuple[Tensor, Optional[Tensor]]:
    """Losses of rows ``[N]``, and their statistics."""
    first = teachers[0].detach() if teachers else None
    more, bias = tuple(item.detach() for item in teachers[1:]), launch.rows.student_offsets
    result = ShardedLoss.apply(student, first, launch, shards, given.inplace, more, bias)
    return result if isinstance(result, tuple) else (result, None)


def _shaped(given: Objective, student: Tensor, loss: Tensor, stats: Optional[Tensor]) -> Any:
    return with_stats(reduced(loss, given, student), stats, student, KDStats)


def refuse_what_is_missing(given: Objective, of_columns: Sequence[Any]) -> None:
    """Options that a sharded vocabulary has no kernel for."""
    missing = {
        # A column's partner may be on any rank, and would have to travel.
        "teacher_columns": len(of_columns) > 2 and of_columns[2] is not None,
        f"dim={given.dim}": given.dim != -1,
        # The gradient through a row's deviation is one more sum of it, and one more term of every column.
        "standardize": given.standardize,
    }
    for what, is_wanted in missing.items():
        if is_wanted:
            raise ValueError(f"{what} cannot be combined with process_group in {given.function}")


class Rows(NamedTuple):
    """Of rows [N], over all shards."""

    student_top: Tensor  # a logit that all are relative to
    student_log_z: Tensor  # the log of the sum at the temperature
    teacher_top: Tensor
    teacher_log_z: Tensor
    log_z1: Tensor  # of the student at temperature 1
    divergence: Tensor
    # With these the gradient of the divergence by logits over T is factor df/dlogq + of_p p - q score.
    factor: Tensor
    of_p: Tensor
    score: Tensor
    label_logit: Tensor  # less the student's top
    mean: Tensor  # mean logit less that


class ShardedLoss(torch.autograd.Function):
    """Losses of rows [N], the same on all ranks; backward writes the gradient of this rank's columns.

    Where the launch asks for statistics forward returns the losses and these.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Optional[Tensor],
        launch: Launch,
        shards: Shards,
        inplace: bool,
        more_teachers: tuple[Tensor, ...] = (),
        student_offsets: Optional[Tensor] = None,
    ) -> Any:
        student = student.detach()
        launch = _detached(launch)
        teachers = () if teacher is None else (teacher, *more_teachers)
        counted = counted_rows(launch, student)
        # Of no teacher the statistics are of a student that stands for it.
        stand_in = not teachers and launch.options["stats"]
        models = Models(launch, shards, student, (student,) if stand_in else teachers)
        found, stats = _summed(models, counted, with_teacher=bool(teachers))
        loss = _losses(launch, found, counted)
        norms = [item for norm in models.norms for item in norm]
        ctx.save_for_backward(student, counted, *found, *norms, *teachers)
        ctx.launch, ctx.shards, ctx.inplace, ctx.shared = launch, shards, inplace, has_saved_tensor_hooks()
        ctx.num_teachers = len(teachers)
        if stats is None:
            return loss
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_derivative(sharded=True)
        student, counted, *rest = ctx.saved_tensors
        found, rest = Rows(*rest[: len(Rows._fields)]), rest[len(Rows._fields) :]
        norms, teachers = rest[: len(rest) - ctx.num_teachers], rest[len(rest) - ctx.num_teachers :]
        models = Models(ctx.launch, ctx.shards, student, teachers)
        models.norms = list(zip(norms[::2], norms[1::2], strict=True))
        over = ctx.inplace and not ctx.shared and not graph_is_kept()
        if ctx.shards.columns == 0:
            gradient = torch.zeros_like(student)
        else:
            gradient = student if over else empty_gradient(student)
            _differentiate(models, gradient, counted, found, dloss)
            if over:
                torch.autograd.graph.increment_version(student)
        of_offsets = None
        if len(ctx.needs_input_grad) > 6 and ctx.needs_input_grad[6]:
            offsets = ctx.launch.rows.student_offsets
            rows = list(range(gradient.dim() - 1))
            of_offsets = gradient.sum(rows, dtype=models.dtype)[: len(offsets)]
        return (gradient, None, None, None, None, None, of_offsets)[: len(ctx.needs_input_grad)]


class _AndGradient(torch.autograd.Function):
    """A loss, with the gradient of the same loss by another tensor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, same: Tensor) -> Tensor:
        ctx.dtype = same.dtype
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient, gradient.to(ctx.dtype)


def _detached(launch: Launch) -> Launch:
    offsets = launch.rows.student_offsets
    if offsets is None or not offsets.requires_grad:
        return launch
    return launch._replace(rows=launch.rows._replace(student_offsets=offsets.detach()))


def counted_rows(launch: Launch, student: Tensor) -> Tensor:
    """Rows ``[N]`` that are not ignored."""
    labels = launch.rows.labels
    if labels is None:
        return torch.ones(student.shape[:-1].numel(), dtype=torch.bool, device=student.device)
    return labels != launch.options["ignore_index"]


def _summed(models: Models, counted: Tensor, *, with_teacher: bool) -> tuple[Rows, Optional[Tensor]]:
    """The numbers of rows over all ranks, and the statistics that were asked for."""
    launch, shards = models.launch, models.shards
    options, rows = launch.options, launch.rows
    temperature, teacher_temperature = temperatures(launch)
    stats, free = options["stats"], options["student_form"] == "log_probs"
    with_ce = rows.labels is not None and (is_there(options["ce_weight"]) or stats)
    smoothed = bool(options["label_smoothing"]) and with_ce
    # Of log-probabilities nothing is normalised, but for the statistics.
    hard = stats or (not free and (is_there(options["z_loss_weight"]) or with_ce))
    at_one = not isinstance(temperature, Tensor) and temperature == 1
    soft = stats or (with_teacher and is_there(options["kd_weight"]))
    parts: dict[Any, Part] = {}
    if (soft and not free) or (hard and at_one) or (smoothed and free):
        parts["student"] = models.student_part(counted, temperature, mean=smoothed and at_one)
    if hard and not at_one:
        parts["hard"] = models.student_part(counted, 1.0, mean=smoothed)
    of_teachers = list(range(len(models.teachers))) if models.mixture == "probs" else ["teacher"]
    for k in of_teachers if soft else ():
        parts[k] = models.teacher_part(counted, k if isinstance(k, int) else None)
    zero = torch.zeros(counted.shape, dtype=models.dtype, device=counted.device)
    tops = dict(zip(parts, shards.largest(*(part.top for part in parts.values())), strict=True)) if parts else {}
    student_top: Tensor = tops.get("student", tops.get("hard", zero))  # type: ignore[assignment]
    sums: dict[Any, Tensor] = {}
    for name, part in parts.items():
        of_rows = 1.0 if name == "hard" else temperature if name == "student" else teacher_temperature
        sums[name] = rising(part, tops[name], of_rows).exp()
    # Log-probabilities are relative to nothing.
    base = zero if free else student_top
    if with_ce:
        assert rows.labels is not None
        here = shards.here(rows.labels) & counted
        sums["label"] = torch.where(here, models.label_logits(rows.labels) - base, zero)
    if smoothed:
        # Of logits less their top, or an offset would be most of it.
        mean = parts["hard" if "hard" in parts else "student"].mean
        assert mean is not None
        sums["mean"] = torch.where(counted, mean - base * (shards.columns / shards.total), zero)
    linear = LINEAR.get(options["divergence"])
    linear = linear if soft and not free and not stats and models.mixture != "probs" else None
    if linear is not None:
        sums["of_p"], sums["of_q"] = linear_parts(models, counted, linear, parts, tops)
    if sums:
        sums = dict(zip(sums, shards.sum(*sums.values()), strict=True))
    # A row without a distribution is NaN.
    log = {name: torch.where(sums[name] == 0, torch.nan, sums[name]).log() for name in parts}
    log_z1 = log.get("student", zero)
    if "hard" in parts:
        # Of each temperature the top is but near the largest logit: relative to the other one a sum may overflow.
        log_z1 = log["hard"] + (tops["hard"] - student_top)
    of_student = (zero, zero) if free else (student_top, log.get("student", zero))
    of_teacher, mass = (zero, zero), torch.ones_like(zero)
    if soft and models.mixture == "probs":
        models.norms = [(tops[k], log[k]) for k in of_teachers]
    elif soft:
        of_teacher = tops["teacher"], log["teacher"]
        if rows.teacher_lse_rows is not None:
            of_teacher = tops["teacher"], rows.teacher_lse_rows - tops["teacher"] / teacher_temperature
            # A teacher has no mass here where all of a row is -inf.
            mass = torch.where(sums["teacher"] == 0, 0.0, (log["teacher"] - of_teacher[1]).exp())
    found = Rows(
        *of_student,
        *of_teacher,
        log_z1,
        divergence=zero,
        factor=torch.ones_like(zero),
        of_p=zero,
        score=zero,
        label_logit=sums.get("label", zero),
        mean=sums.get("mean", zero),
    )
    told = None
    if linear is not None:
        found = of_linear(found, linear, sums, log, mass)
    elif soft:
        found, told = _of_sums(models, counted, found, mass, stats=stats)
    if soft and options["divergence"] in divergences.BUILT_IN and rows.teacher_lse_rows is None and not free:
        # Of two distributions none is negative: that is rounding.
        found = found._replace(divergence=torch.where(found.divergence < 0, zero, found.divergence))
    if told is None:
        return found, None
    ce = _cross_entropy(launch, found) if with_ce else zero
    told = [found.divergence, ce, student_top + log_z1, *told]
    return found, torch.stack([torch.where(counted, item, zero) for item in told], -1)


def _of_sums(
    models: Models, counted: Tensor, found: Rows, mass: Tensor, *, stats: bool
) -> tuple[Rows, Optional[list[Tensor]]]:
    """The divergence and its score from sums over all columns, and of statistics the KLs, entropies, agreement and
    acceptance."""
    options, shards = models.launch.options, models.shards
    name, acceptance = options["divergence"], _acceptance_of(models.launch)
    with_distances = stats or acceptance is not None
    numbers = numbers_of(models, counted, found)
    sums = models.sums(numbers, "tvd" if acceptance else name, stats=with_distances)
    agreement = found.divergence
    # A row without a distribution, whose NaN a summand may have lost.
    spoilt = found.student_log_z.isnan() | found.teacher_log_z.isnan()
    for k, (_, log_z) in enumerate(models.norms):
        weights = models.launch.rows.mixture_weights
        assert weights is not None
        spoilt = spoilt | (log_z.isnan() & (weights[:, k] != 0))
    if stats:
        # Not a reduction: of equal logits the first rank's is the first.
        every = torch.stack(shards.gathered(torch.cat([sums, models.most_likely()], 1)))
        sums = every[..., : len(ops.SHARD_SUMS)].sum(0)
        s, t = (every[..., k].argmax(0) for k in (-3, -2))
        same = every[..., -1].gather(0, s.unsqueeze(0)).squeeze(0)
        agreement = torch.where((s == t) & ~spoilt, same, 0.0)
    else:
        (sums,) = shards.sum(sums)
    of = dict(zip(ops.SHARD_SUMS, sums.unbind(-1), strict=False))
    of |= {
        key: torch.where(spoilt & counted, torch.nan, of[key]) for key in ("value", "score", "acceptance") if key in of
    }
    value, score = of["value"], of["score"]
    if models.launch.rows.teacher_lse_rows is not None and (acceptance or name == "tvd"):
        # The outcomes that are not here.
        value = value + 0.5 * (1 - mass)
    if acceptance is None:
        found = found._replace(divergence=value, score=score)
    elif acceptance == "lk_nla":
        rate, least = of["acceptance"], options["param0"]
        near = (value < 0.5) & (1 - value > least)
        factor = 1 / torch.where(near, 1 - value, rate.clamp(min=least))
        loss = divergences.negative_log_acceptance(rate, value, least)
        found = found._replace(divergence=loss, factor=factor, score=factor * score)
    else:
        share = (-options["param0"] * of["acceptance"]).exp()
        found = found._replace(
            divergence=share * of["forward_kl"] + (1 - share) * value,
            factor=1 - share,
            of_p=-share,
            score=(1 - share) * score - share * mass,
        )
    if not stats:
        return found, None
    distances = [of[name] for name in ("forward_kl", "reverse_kl", "teacher_entropy", "student_entropy")]
    if options["student_form"] != "log_probs":
        distances = [torch.where(item < 0, 0.0, item) for item in distances]
    return found, [*distances, agreement, of["acceptance"]]


def _acceptance_of(launch: Launch) -> Optional[str]:
    """The loss of acceptance that a launch has in the place of a divergence."""
    name = launch.options["divergence"]
    return name if name in ("lk_nla", "lk_hybrid") else None


def rising(part: Part, top: Tensor, temperature: PerRow) -> Tensor:
    """The log of a shard's sum of exponentials relative to the largest logit of all shards."""
    return torch.where(part.z == 0, -torch.inf, (part.top - top) / temperature + part.z.log())


def numbers_of(models: Models, counted: Tensor, found: Rows, **factors: Tensor) -> Tensor:
    """``row_numbers`` of ``shard_fwd``."""
    temperature, teacher_temperature = temperatures(models.launch)
    zero = torch.zeros_like(found.divergence)
    # A mixture of probabilities has its temperature in it.
    of_teacher = zero + 1 if models.mixture == "probs" else zero + 1 / teacher_temperature
    given = {
        "student_unit": torch.where(counted, zero + 1 / temperature, zero),
        "student_top": found.student_top,
        "student_log_z": found.student_log_z,
        "teacher_unit": of_teacher,
        "teacher_top": found.teacher_top,
        "teacher_log_z": found.teacher_log_z,
        **factors,
    }
    return torch.stack([given.get(name, zero) for name in ops.SHARD_NUMBERS], -1)


def linear_parts(
    models: Models, counted: Tensor, coefficients: tuple[float, ...], parts: dict[Any, Part], tops: dict[Any, Tensor]
) -> list[Tensor]:
    """The parts in p and in q of a linear divergence, times the shard's sums of exponentials."""
    temperature, teacher_temperature = temperatures(models.launch)
    of_student, of_teacher = parts["student"], parts["teacher"]
    own_s, own_t = (torch.where(part.z == 0, 0.0, part.z.log()) for part in (of_student, of_teacher))
    zero = torch.zeros_like(own_s)
    own = Rows(of_student.top, own_s, of_teacher.top, own_t, *(zero,) * 7)
    sums = models.sums(numbers_of(models, counted, own), models.launch.options["divergence"])
    value, score = sums.unbind(-1)
    c_pp, c_pq, c_qp, c_qq = coefficients
    # A shard without any mass of a model is none of it.
    log_s = rising(of_student, tops["student"], temperature)
    log_t = rising(of_teacher, tops["teacher"], teacher_temperature)
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


def of_linear(
    found: Rows, coefficients: tuple[float, ...], sums: dict[Any, Tensor], log: dict[Any, Tensor], mass: Tensor
) -> Rows:
    """A linear divergence, and the sum of its scores, of a teacher with a ``mass`` of probability here."""
    c_pp, c_pq, c_qp, c_qq = coefficients
    log_teacher, log_z = found.teacher_log_z, found.student_log_z
    of_p = mass * (sums["of_p"] / sums["teacher"] - c_pp * log_teacher - c_pq * log_z)
    of_p = torch.where((mass == 0) & ~log_z.isnan(), 0.0, of_p)
    of_q = sums["of_q"] / sums["student"] - c_qp * log_teacher - c_qq * log_z
    return found._replace(divergence=of_p + of_q, score=c_pq * mass + c_qq + of_q)


def _losses(launch: Launch, found: Rows, counted: Tensor) -> Tensor:
    """The loss of each row, with all that multiplies it."""
    options, zero = launch.options, torch.zeros_like(found.divergence)
    ce = None
    if launch.rows.labels is not None and is_there(options["ce_weight"]):
        ce = _cross_entropy(launch, found)
    loss = zero
    for weight, value in terms_of_rows(launch, found.divergence, ce, found.student_top + found.log_z1):
        loss = loss + (torch.where(weight != 0, weight * value, zero) if isinstance(weight, Tensor) else weight * value)
    loss = torch.where(counted, loss * options["scale"], zero)
    return loss if launch.rows.row_weight is None else loss * launch.rows.row_weight


def _cross_entropy(launch: Launch, found: Rows) -> Tensor:
    smoothing = launch.options["label_smoothing"]
    log_z = 0.0 if launch.options["student_form"] == "log_probs" else found.log_z1
    ce = log_z - (1 - smoothing) * found.label_logit
    return ce - smoothing * found.mean if smoothing else ce


def _weight(launch: Launch, term: str) -> PerRow:
    of_rows = getattr(launch.rows, f"{term}_rows")
    return launch.options[term] if of_rows is None else of_rows


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


def _differentiate(models: Models, gradient: Tensor, counted: Tensor, found: Rows, dloss: Tensor) -> None:
    """Write the gradient of this rank's columns."""
    launch, shards = models.launch, models.shards
    options, rows = launch.options, launch.rows
    zero = torch.zeros_like(found.divergence)
    each = torch.where(counted, dloss.reshape(-1).to(zero.dtype) * options["scale"], zero)
    if rows.row_weight is not None:
        each = each * rows.row_weight
    temperature = temperatures(launch)[0]
    factors = {}
    free = options["student_form"] == "log_probs"
    soft = bool(models.teachers) and is_there(options["kd_weight"])
    if soft:
        weight = each * _weight(launch, "kd_weight")
        weight = weight * temperature if options["scale_by_t_squared"] else weight / temperature
        # Of log-probabilities each is by itself.
        given = {"of_score": found.factor, "of_q": zero if free else found.score, "of_p": found.of_p}
        factors = {name: torch.where(weight != 0, weight * value, zero) for name, value in given.items()}
    hard, labels = zero, None
    if rows.labels is not None and is_there(options["ce_weight"]):
        hard = each * _weight(launch, "ce_weight")
        smoothing = options["label_smoothing"]
        labels = shards.local(rows.labels, options["ignore_index"]).contiguous()
        factors["at_label"] = -hard * (1 - smoothing)
        factors["constant"] = -hard * (smoothing / shards.total) if smoothing else zero
    if is_there(options["z_loss_weight"]):
        lse = found.student_top + found.log_z1
        hard = torch.where(counted, hard + 2 * lse * (each * _weight(launch, "z_loss_weight")), zero)
    factors["of_hard"], factors["hard_log_z"] = zero if free else hard, found.log_z1
    numbers = numbers_of(models, counted, found, **factors)
    name = options["divergence"] if _acceptance_of(launch) is None else "tvd"
    models.write_gradient(gradient, labels, numbers, name, soft=soft)
