"""``dkd_loss`` and ``logit_mse_loss`` over a sharded vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import backends, checks
from kdkernels.autograd import RowLoss, graph_is_kept, has_saved_tensor_hooks, reduced, refuse_second_derivative
from kdkernels.launch import Launch, flat, row_tensors, run_reference
from kdkernels.objective import DKDObjective, MSEObjective
from kdkernels.parallel.calls import facts_of
from kdkernels.parallel.dense import LINEAR, Rows, counted_rows, linear_parts, numbers_of, of_linear, rising
from kdkernels.parallel.models import Models
from kdkernels.parallel.reduce import SumOfShards
from kdkernels.parallel.shards import Shards, outside_graphs, shards_of
from kdkernels.parallel.tokens import empty_gradient


def _launch(given: Any, pattern: str, of_op: str, student: Tensor, teacher: Any, labels: Any, total: int) -> Launch:
    checks.teacher_shard("teacher", teacher, student)
    checks.teacher_gets_none(given.function, teacher)
    checks.apart_in_place(given, student, {"labels": labels}, (teacher,))
    backend = backends.choose(given.backend, student, pattern=of_op)
    checks.reverse_mode_only(None, student, teacher, labels, *given.tensors)
    labels = checks.labels_like(labels, student, total, given.ignore_index)
    scale, rows = row_tensors(given, student, labels)
    return Launch(pattern, backend, rows, {**given.scalars, "scale": scale, "vocab_size": total})


def _begin(given: Any, student: Any, labels: Any) -> dict[str, Any]:
    checks.shard("student", student)
    if given.inplace:
        checks.inplace_allowed(student)
    return facts_of(given.function, given, student, labels=labels is not None)


@outside_graphs
def logit_mse_loss(given: MSEObjective, student: Any, teacher: Any, labels: Any) -> Tensor:
    """``kdkernels.logit_mse_loss`` of a shard: of the mean over all columns each rank has its part."""
    facts = _begin(given, student, labels)

    def check(total: int) -> Launch:
        if given.centered:
            # Its gradient has the mean of all columns in it.
            raise ValueError(f"centered cannot be combined with process_group in {given.function}")
        return _launch(given, "mse_fwd", "mse_fwd", student, teacher, labels, total)

    shards, launch = shards_of(given.process_group, student, given.vocab_size, facts, check)
    columns = shards.columns
    if columns == 0:
        rows = student[..., :0].sum(-1, dtype=checks.sum_dtype(student)).reshape(-1)
    else:
        options = {**launch.options, "scale": launch.options["scale"] * columns / shards.total, "vocab_size": columns}
        launch = launch._replace(options=options, gradient_size=1024.0 / columns)
        if launch.backend == "torch":
            rows = run_reference(launch, flat(student), [flat(teacher.detach())])[0]
        else:
            rows = RowLoss.apply(student, teacher.detach(), (), launch, None, True, given.inplace, None)
    return reduced(SumOfShards.apply(rows, shards), given, student)


@outside_graphs
def dkd_loss(given: DKDObjective, student: Any, teacher: Any, labels: Any) -> Tensor:
    """``kdkernels.dkd_loss`` of a shard: forward KL of models without the column of a row's label, and of the label."""
    facts = _begin(given, student, labels)

    def check(total: int) -> Launch:
        launch = _launch(given, "dkd_fwd", "shard_fwd", student, teacher, labels, total)
        return launch._replace(options={**launch.options, "divergence": "forward_kl"})

    shards, launch = shards_of(given.process_group, student, given.vocab_size, facts, check)
    return reduced(_ShardedDKD.apply(student, teacher.detach(), launch, shards, given.inplace), given, student)


class _ShardedDKD(torch.autograd.Function):
    """Losses of rows [N]; backward writes the gradient of this rank's columns."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, launch: Launch, shards: Shards, inplace: bool) -> Tensor:
        student = student.detach()
        counted = counted_rows(launch, student)
        models = _without_labels(launch, shards, student, teacher)
        found, excess, loss = _of_rows(models, counted)
        ctx.save_for_backward(student, teacher, counted, excess, *found)
        ctx.launch, ctx.shards, ctx.inplace, ctx.shared = launch, shards, inplace, has_saved_tensor_hooks()
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative(sharded=True)
        student, teacher, counted, excess, *found = ctx.saved_tensors
        over = ctx.inplace and not ctx.shared and not graph_is_kept()
        nothing = (None,) * 4
        if ctx.shards.columns == 0 or ctx.shards.total == 1:
            return torch.zeros_like(student), *nothing
        gradient = student if over else empty_gradient(student)
        models = _without_labels(ctx.launch, ctx.shards, student, teacher)
        _differentiate(models, gradient, counted, Rows(*found), excess, dloss)
        if over:
            torch.autograd.graph.increment_version(student)
        return gradient, *nothing


def _without_labels(launch: Launch, shards: Shards, student: Tensor, teacher: Tensor) -> Models:
    assert launch.rows.labels is not None
    local = shards.local(launch.rows.labels, launch.options["ignore_index"])
    return Models(launch, shards, student, (teacher,), without=local)


def _factor(launch: Launch) -> float:
    return launch.options["scale"] * (launch.options["temperature"] ** 2 if launch.options["scale_by_t_squared"] else 1)


def _of_rows(models: Models, counted: Tensor) -> tuple[Rows, Tensor, Tensor]:
    """The numbers of the classes beside the label over all ranks, q - p of the label, and the losses."""
    launch, shards, options = models.launch, models.shards, models.launch.options
    labels = launch.rows.labels
    assert labels is not None
    temperatures = {"student": options["temperature"], "teacher": options["teacher_temperature"]}
    parts: dict[Any, Any] = {
        "student": models.student_part(counted, temperatures["student"]),
        "teacher": models.teacher_part(counted),
    }
    tops = dict(zip(parts, shards.largest(*(part.top for part in parts.values())), strict=True))
    zero = torch.zeros_like(tops["student"])
    here = shards.here(labels) & counted
    picked = {"student": models.label_logits(labels), "teacher": models.teacher_label_logits(labels)}
    sums: dict[Any, Tensor] = {name: rising(parts[name], tops[name], temperatures[name]).exp() for name in parts}
    sums |= {f"label of {name}": torch.where(here, picked[name] - tops[name], zero) for name in parts}
    sums["of_p"], sums["of_q"] = linear_parts(models, counted, LINEAR["forward_kl"], parts, tops)
    sums = dict(zip(sums, shards.sum(*sums.values()), strict=True))
    log = {name: torch.where(sums[name] == 0, torch.nan, sums[name]).log() for name in parts}
    found = Rows(tops["student"], log["student"], tops["teacher"], log["teacher"], *(zero,) * 7)
    found = of_linear(found, LINEAR["forward_kl"], sums, log, torch.ones_like(zero))
    # The label and all others as two classes.
    two = {
        name: torch.log_softmax(torch.stack([sums[f"label of {name}"] / temperatures[name], log[name]], -1), -1)
        for name in parts
    }
    p, q = two["teacher"].exp(), two["student"].exp()
    of_two = (p * torch.where(p == 0, 0.0, two["teacher"] - two["student"])).sum(-1)
    # Of two numbers next to 1 the difference is that of what they lack.
    sure = (p[:, 0] > 0.5) & (q[:, 0] > 0.5)
    excess = torch.where(sure, p[:, 1] - q[:, 1], q[:, 0] - p[:, 0])
    loss = zero
    if options["alpha"]:
        loss = loss + options["alpha"] * of_two.clamp(min=0.0)
    if options["beta"]:
        loss = loss + options["beta"] * found.divergence.clamp(min=0.0)
    # Of one class alone there is nothing to say.
    loss = torch.where(counted, loss * _factor(launch), zero) if shards.total > 1 else zero
    return found, excess, loss if launch.rows.row_weight is None else loss * launch.rows.row_weight


def _differentiate(
    models: Models, gradient: Tensor, counted: Tensor, found: Rows, excess: Tensor, dloss: Tensor
) -> None:
    launch, options = models.launch, models.launch.options
    zero = torch.zeros_like(excess)
    each = torch.where(counted, dloss.reshape(-1).to(zero.dtype) * (_factor(launch) / options["temperature"]), zero)
    if launch.rows.row_weight is not None:
        each = each * launch.rows.row_weight
    of_two, of_others = each * options["alpha"], each * options["beta"]
    at_label = torch.where(of_two != 0, of_two * excess, zero)
    factors = {
        "of_score": of_others,
        # All others lose as much as the label gains.
        "of_q": torch.where(of_others != 0, of_others * found.score, zero) + at_label,
        "at_label": at_label,
    }
    numbers = numbers_of(models, counted, found, **factors)
    labels = models.without
    assert labels is not None
    models.write_gradient(gradient, labels.contiguous(), numbers, "forward_kl", soft=True)


LOSSES: dict[str, Any] = {"dkd_fwd": dkd_loss, "mse_fwd": logit_mse_loss}
