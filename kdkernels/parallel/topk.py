"""``topk_kd_loss`` over a sharded vocabulary.

The loss is a function of the student's log-probabilities at the teacher's ids and of its mass outside them, which
``tokens`` has from one read of the logits, with a gradient from another. A tail that looks at every column by itself
("uniform", and those with a divergence that is not linear in q where p is 0) is plain PyTorch on this rank's columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import checks, ops, reference
from kdkernels.autograd import reduced
from kdkernels.divergences import by_name
from kdkernels.launch import Launch, topk_launch, with_stats
from kdkernels.objective import TopKObjective
from kdkernels.parallel.calls import facts_of
from kdkernels.parallel.dense import counted_rows, terms_of_rows
from kdkernels.parallel.models import temperatures
from kdkernels.parallel.reduce import OfAllShards, SumOfShards
from kdkernels.parallel.shards import Shards, outside_graphs, shards_of
from kdkernels.parallel.tokens import call_of, picked_logits, rows_of, sharded_values
from kdkernels.reference import divergences
from kdkernels.reference.dense import apply_softcap, column, is_there
from kdkernels.stats import TopKStats


@outside_graphs
def topk_kd_loss(given: TopKObjective, student: Any, ids: Any, logprobs: Any, labels: Any, tail_logprob: Any) -> Any:
    """``kdkernels.topk_kd_loss`` of a shard."""
    checks.shard("student", student)
    if given.inplace:
        raise ValueError("inplace cannot be combined with process_group in topk_kd_loss")
    facts = facts_of(given.function, given, student, ids=getattr(ids, "shape", None), labels=labels is not None)
    if _each_column(given.tail, given.resolved.name):
        # Backward has a sum over the ranks.
        facts["student.requires_grad"] = student.requires_grad and torch.is_grad_enabled()

    def check(total: int) -> Launch:
        launch = topk_launch(given, student, (ids, logprobs), labels, tail_logprob, total)
        checks.reverse_mode_only(None, student, ids, logprobs, labels, tail_logprob, *given.tensors)
        return launch

    shards, launch = shards_of(given.process_group, student, given.vocab_size, facts, check)
    loss, stats = losses_of_rows(launch, shards, student)
    return with_stats(reduced(loss, given, student), stats, student, TopKStats)


class _Student(NamedTuple):
    """The student's numbers of a row's distinct ids ``[N, K]``, of all others together, and of its label."""

    picked: Tensor  # log-probabilities at the loss's temperature
    log_outside: Tensor
    lse: Tensor
    label_logprob: Optional[Tensor]  # at temperature 1
    lse1: Optional[Tensor]


def losses_of_rows(launch: Launch, shards: Shards, student: Tensor) -> tuple[Tensor, Optional[Tensor]]:
    """Losses ``[N]`` with all that multiplies them, and the statistics that are asked for."""
    options, rows = launch.options, launch.rows
    if _each_column(options["tail"], options["divergence"]):
        # The gradient has two parts, which may all but cancel: of 16 bits their sum is rounded, not each of them.
        student = student.to(checks.sum_dtype(student))
    counted = counted_rows(launch, student)
    given_ids, given_logprobs = launch.sparse_teacher
    exact = torch.float32 if student.device.type == "mps" else torch.float64
    ids = torch.where(counted.unsqueeze(-1), given_ids, -1)
    spoilt = reference.topk.out_of_range(ids, given_logprobs, shards.total)
    ids, given, used = reference.topk.distinct(ids, given_logprobs.to(exact), shards.total)
    outside = shards.total - used.sum(-1)
    log_rest = None if rows.tail_rows is None else rows.tail_rows.to(exact)
    if rows.tail_rows is not None:
        spoilt = spoilt | (rows.tail_rows.isnan() & used.any(-1))
    teacher = reference.topk.resolve_teacher(
        given,
        used,
        outside,
        options["tail"],
        temperatures(launch)[1],
        log_rest,
        options["min_tail"],
        options["tail_rounding"],
    )
    found = _of_student(launch, shards, student, torch.where(used, ids, -1), counted)
    zero = torch.zeros_like(found.lse)
    d = _divergence(launch, shards, student, found, ids, used, outside, teacher, counted)
    d = torch.where(teacher.known, d, 0.0) + torch.where(spoilt | (found.lse.isnan() & counted), torch.nan, 0.0)
    ce = None
    if found.label_logprob is not None:
        smoothing = options["label_smoothing"]
        ce = -(1 - smoothing) * found.label_logprob
        if smoothing:
            assert found.lse1 is not None
            ce = ce + smoothing * (found.lse1 - _mean_logit(launch, shards, student, counted))
    loss = zero
    of_label = ce if is_there(options["ce_weight"]) else None
    for weight, value in terms_of_rows(launch, d, of_label, found.lse1):
        loss = loss + (torch.where(weight != 0, weight * value, zero) if isinstance(weight, Tensor) else weight * value)
    if torch.is_grad_enabled() and student.requires_grad and not loss.requires_grad:
        # Without a term the gradient is 0, and is there.
        loss = loss + rows_of(student)[:, :0].sum(-1).to(loss.dtype)
    loss = torch.where(counted, loss * options["scale"], zero)
    loss = loss if rows.row_weight is None else loss * rows.row_weight
    if not options["stats"]:
        return loss, None
    assert found.lse1 is not None
    with torch.no_grad():
        nan = torch.where(spoilt | found.lse.isnan(), torch.nan, zero)
        told = [d, zero if ce is None else ce, found.lse1]
        told += [torch.where(used, x, -torch.inf).exp().sum(-1).to(zero.dtype) for x in (given, found.picked)]
        told.append(_overlap(shards, student, torch.where(used, ids, -1), used).to(zero.dtype) + nan)
        told[3] = told[3] + torch.where(spoilt, torch.nan, zero)
        return loss, torch.stack([torch.where(counted, item, zero) for item in told], -1)


def _overlap(shards: Shards, student: Tensor, ids: Tensor, used: Tensor) -> Tensor:
    """``TopKStats.overlap``, of the largest logits of every rank and those of the ids, in one gathering."""
    K, here = used.shape[1], shards.here(ids) & used
    dtype = checks.sum_dtype(student)
    largest = student.detach()[..., : shards.columns].topk(min(K, shards.columns), -1).values
    largest = rows_of(largest)
    largest = torch.nn.functional.pad(largest.to(dtype), (0, K - largest.shape[1]), value=-torch.inf)
    picked = picked_logits(student.detach(), shards.local(ids), 0.0, dtype)
    every = shards.gathered(torch.cat([largest, torch.where(here, picked, -torch.inf)], 1))
    logits = torch.cat([item[:, :K] for item in every], 1)
    return reference.topk.overlap(logits, torch.stack([item[:, K:] for item in every]).amax(0), used)


def _of_student(launch: Launch, shards: Shards, student: Tensor, ids: Tensor, counted: Tensor) -> _Student:
    options, labels = launch.options, launch.rows.labels
    temperature = temperatures(launch)[0]
    with_label = labels is not None and (is_there(options["ce_weight"]) or options["stats"])
    hard = with_label or is_there(options["z_loss_weight"]) or options["stats"]
    at_one = not isinstance(temperature, Tensor) and temperature == 1
    K = ids.shape[1]
    label = torch.full_like(ids[:, 0], -1)
    if with_label:
        assert labels is not None
        label = torch.where(counted, labels, -1)
    among = ids == label.unsqueeze(-1)
    known = among.any(-1)
    # At one temperature the label is one more id, unless it is one already.
    aside = ~known & (label != -1) if at_one else torch.zeros_like(known)
    slots = torch.cat([ids, torch.where(aside, label, -1).unsqueeze(-1)], 1)
    # A row is read for its ids.
    lone = (slots == -1).all(-1) & counted
    slots[:, K] = torch.where(lone, ops.ELSEWHERE, slots[:, K])
    logprobs, _, lse, log_outside, _ = sharded_values(
        call_of(launch.backend, temperature, options["student_softcap"], tail_mass=True), student, slots, shards
    )
    picked, of_label = logprobs[:, :K], torch.where(aside, logprobs[:, K], 0.0)
    # The gradient of the sum of nothing and nothing is NaN.
    added = aside & ~torch.isneginf(of_label)
    log_outside = torch.where(added, torch.logaddexp(log_outside, torch.where(added, of_label, 0.0)), log_outside)
    label_logprob = lse1 = None
    if hard and at_one:
        at = among.to(torch.int8).argmax(-1, keepdim=True)
        label_logprob = torch.where(known, picked.gather(1, at).squeeze(1), of_label) if with_label else None
        lse1 = lse
    elif hard:
        slot = torch.where(counted & (label == -1), ops.ELSEWHERE, label).unsqueeze(-1)
        of_label, _, lse1, _, _ = sharded_values(
            call_of(launch.backend, 1.0, options["student_softcap"]), student, slot, shards
        )
        label_logprob = of_label.squeeze(-1) if with_label else None
    return _Student(picked, log_outside, lse, label_logprob, lse1)


def _each_column(tail: str, divergence: str) -> bool:
    """True where the divergence is a sum over all columns, of which each is looked at by itself."""
    if tail in ("renormalize", "drop"):
        return not by_name(divergence).linear_without_teacher
    return tail == "uniform"


def _divergence(
    launch: Launch,
    shards: Shards,
    student: Tensor,
    found: _Student,
    ids: Tensor,
    used: Tensor,
    outside: Tensor,
    teacher: reference.topk.Teacher,
    counted: Tensor,
) -> Tensor:
    options, rows = launch.options, launch.rows
    name, tail = options["divergence"], options["tail"]
    param0 = options["param0"] if rows.param_rows is None else rows.param_rows[:, None, None]

    def pointwise(logp: Tensor, logq: Tensor) -> Tensor:
        """``f`` of every element of ``[N, M]``."""
        return divergences.TABLE[name](logp.to(logq.dtype)[..., None], logq[..., None], param0, options["param1"])

    picked, present = found.picked, used
    if tail == "renormalize_both":
        present = used & teacher.known[:, None]
        # A row without entries must not take the log-softmax of nothing.
        picked = torch.log_softmax(torch.where(used | ~teacher.known[:, None], picked, -torch.inf), -1)
    # p = q = 1 stands in for slots that are not used.
    f = pointwise(torch.where(present, teacher.logp, 0.0), torch.where(present, picked, 0.0))
    d = torch.where(present, f, 0.0).sum(-1)
    if tail == "renormalize_both":
        return d
    if tail == "bucket":
        assert teacher.log_rest is not None
        # Of no column f may have no gradient.
        logp, logq = (torch.where(outside > 0, x, 0.0)[:, None] for x in (teacher.log_rest, found.log_outside))
        return d + torch.where(outside > 0, pointwise(logp, logq).squeeze(1), 0.0)
    if not _each_column(tail, name):
        # The terms at p = 0 add up to f(0, 1) sum q.
        one = torch.zeros_like(d)[:, None]
        return d + pointwise(one - torch.inf, one).squeeze(1) * found.log_outside.exp()
    log_each = torch.full_like(d, -torch.inf) if teacher.log_each is None else teacher.log_each
    # Every column by itself: of this rank's, in plain PyTorch.
    local = shards.local(torch.where(used, ids, -1))
    x = _logits(launch, shards, student, counted)
    logq = x / column(temperatures(launch)[0]) - OfAllShards.apply(found.lse, shards).unsqueeze(-1)
    among = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
    among = among.scatter(1, torch.where(local >= 0, local, x.shape[1]), True)[:, :-1]
    f = pointwise(log_each[:, None].expand_as(logq), torch.where(among, 0.0, logq))
    return d + SumOfShards.apply(torch.where(among, 0.0, f).sum(-1), shards)


def _logits(launch: Launch, shards: Shards, student: Tensor, counted: Tensor) -> Tensor:
    """This rank's logits ``[N, V]`` after the softcap, in the dtype of the sums."""
    x = rows_of(student)[:, : shards.columns].to(checks.sum_dtype(student))
    return apply_softcap(torch.where(counted.unsqueeze(-1), x, 0.0), launch.options["student_softcap"])


def _mean_logit(launch: Launch, shards: Shards, student: Tensor, counted: Tensor) -> Tensor:
    return SumOfShards.apply((_logits(launch, shards, student, counted) / shards.total).sum(-1), shards)
