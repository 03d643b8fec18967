"""The sparse top-k objective in plain PyTorch: a teacher of K ids and log-probabilities a row."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from kdkernels.divergences import Divergence, by_name
from kdkernels.reference import divergences
from kdkernels.reference.dense import (
    PerRow,
    apply_softcap,
    column,
    cross_entropy,
    is_there,
    log_softmax,
    squared,
    term,
)

# Collators and servers put -inf, -1e9 or -9999 where they have no log-probability; no teacher gives as little.
NO_ENTRY = -9000.0


class TopKRows(NamedTuple):
    """Unreduced and unweighted: the objective of each row ``[N]``, and on request ``ops.TOPK_STATS`` ``[N, 6]``."""

    loss: Tensor
    stats: Optional[Tensor] = None


class Teacher(NamedTuple):
    """The teacher's distribution over its distinct ids, and what it says of the others."""

    logp: Tensor  # [N, K]
    log_rest: Optional[Tensor]  # [N], of all other ids together; only for the bucket
    log_each: Optional[Tensor]  # [N], of each other id; only for the uniform tail
    known: Tensor  # [N], whether there is any to learn from


def finite_without_teacher(divergence: Divergence) -> bool:
    """True if the divergence is finite at ``p = 0``."""
    known = divergence.finite_without_teacher
    return _is_finite_without_teacher(divergence.name, *divergence.params()) if known is None else known


def _is_finite_without_teacher(divergence: str, param0: float, param1: float) -> bool:
    # A number of its own, also where the tensors of the call are fake or on "meta".
    with torch.utils._python_dispatch._disable_current_modes():
        zero = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
        return bool(torch.isfinite(divergences.TABLE[divergence](zero - torch.inf, zero, param0, param1)))


# As backends.select: asked once while torch.compile traces.
_is_finite_without_teacher._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unused(ids: Tensor, logprobs: Tensor) -> Tensor:
    """The slots without an entry: of id -1, or with a log-probability of ``NO_ENTRY`` or less."""
    return (ids == -1) | (logprobs <= NO_ENTRY)


def out_of_range(ids: Tensor, logprobs: Tensor, columns: int) -> Tensor:
    """The rows ``[N]`` that have an id in a slot that is used, and no column for it."""
    return (((ids < 0) | (ids >= columns)) & ~unused(ids, logprobs)).any(-1)


def distinct(ids: Tensor, logprobs: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the ids of each row and add up the probabilities of equal ones.

    Returns:
        ids ``[N, K]``, ``columns`` in slots that are not used; log-probabilities ``[N, K]``; which slots are used.
    """
    valid = (ids >= 0) & (ids < columns) & ~unused(ids, logprobs)
    ids, order = torch.where(valid, ids, columns).long().sort(-1)
    logp = torch.where(valid, logprobs, 0.0).gather(1, order)
    first = torch.ones_like(valid)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(-1) - 1  # of each slot's id among the distinct ones
    high = torch.full_like(logp, -torch.inf).scatter_reduce(1, place, logp, "amax")
    shift = torch.where(torch.isneginf(high), 0.0, high)
    total = torch.zeros_like(logp).scatter_add(1, place, (logp - shift.gather(1, place)).exp())
    ids = torch.full_like(ids, columns).scatter(1, place, ids)
    return ids, shift + total.log(), ids < columns


def resolve_teacher(
    logp: Tensor,
    used: Tensor,
    outside: Tensor,
    tail: str,
    teacher_temperature: PerRow,
    log_rest: Optional[Tensor] = None,
    min_tail: float = 0.0,
    tail_rounding: float = 0.0,
) -> Teacher:
    """Make the given log-probabilities a distribution.

    Args:
        outside: ``[N]``, the number of ids that are not among the given ones.
        log_rest: ``[N]``, the log of their mass; by default of what is missing to 1. A row without entries has all of
            its mass there.
        min_tail, tail_rounding: that mass is at least ``min_tail + tail_rounding * sum p |log p|``.
    """
    logp = torch.where(used, logp, -torch.inf)
    if log_rest is None:
        log_rest = (1 - logp.exp().sum(-1)).clamp(min=0.0).log()
    if min_tail or tail_rounding:
        log_rest = torch.maximum(log_rest, (min_tail + tail_rounding * nats(logp)).log())
    log_rest = torch.where(used.any(-1), log_rest, 0.0)
    log_rest = torch.where(outside > 0, log_rest, -torch.inf)
    known = torch.ones_like(log_rest, dtype=torch.bool)
    if tail == "drop":
        return Teacher(logp, None, None, known)
    if tail == "bucket":
        # All of both is in the bucket of a row without entries.
        return Teacher(logp, log_rest, None, used.any(-1))
    scores = logp / column(teacher_temperature)
    log_z, log_each = torch.logsumexp(scores, -1), None
    if tail == "uniform":
        count = outside.to(logp.dtype)
        log_each = (log_rest - count.log()) / teacher_temperature
        log_each = torch.where(torch.isneginf(log_rest), -torch.inf, log_each)
        log_z = torch.logaddexp(log_z, torch.where(torch.isneginf(log_rest), -torch.inf, log_each + count.log()))
    known = ~torch.isneginf(log_z)
    log_z = torch.where(known, log_z, 0.0)
    return Teacher(scores - log_z[:, None], None, None if log_each is None else log_each - log_z, known)


def nats(logp: Tensor) -> Tensor:
    """``sum p |log p|`` of each row: a relative rounding of log p by half an epsilon moves sum p by that much of it."""
    return (logp.exp() * torch.where(torch.isneginf(logp), 0.0, logp).abs()).sum(-1)


def overlap(logq: Tensor, picked: Tensor, used: Tensor) -> Tensor:
    """The fraction of a row's K' used entries whose ``picked`` log-probability is at least the K'-th of the row."""
    count = used.sum(-1, keepdim=True)
    largest = logq.topk(min(used.shape[1], logq.shape[1]), -1).values
    among = used & (picked >= largest.gather(1, (count - 1).clamp(min=0)))
    return among.sum(-1) / count.squeeze(1).clamp(min=1)


def student_overlap(
    student: Tensor, ids: Tensor, logprobs: Tensor, labels: Optional[Tensor], options: dict[str, Any]
) -> Tensor:
    """``overlap`` of logits ``(..., V)`` for kernels that do not compute it: 0 where ignored, NaN where the row is."""
    columns = options["vocab_size"]
    s = student.detach().reshape(-1, student.shape[-1])[:, :columns]
    spoilt = out_of_range(ids, logprobs, columns) | s.isnan().any(-1)
    ids, _, used = distinct(ids, logprobs, columns)
    shared = overlap(s, s.gather(1, ids.clamp(max=columns - 1)), used).float()
    shared = torch.where(spoilt, torch.nan, shared)
    return shared if labels is None else torch.where(labels == options["ignore_index"], 0.0, shared)


def topk_rows(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    tail: str,
    divergence: str,
    tail_rows: Optional[Tensor] = None,
    min_tail: float = 0.0,
    tail_rounding: float = 0.0,
    params: tuple[Union[float, Tensor], float] = (0.0, 0.0),
    temperature: PerRow = 1.0,
    teacher_temperature: PerRow = 1.0,
    scale_by_t_squared: bool = True,
    kd_weight: PerRow = 1.0,
    ce_weight: PerRow = 0.0,
    z_loss_weight: PerRow = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    vocab_size: Optional[int] = None,
    student_softcap: float = 0.0,
    stats: bool = False,
) -> TopKRows:
    """The objective of each row, by the formulas in ``kdkernels.topk_kd_loss``.

    Args:
        student: logits ``[N, V]``. ids, logprobs: ``[N, K]``; an id out of range in a slot that is used is a NaN row.
        labels: ``[N]`` int64; rows equal to ``ignore_index`` give 0 everywhere and pass no gradient.
        tail_rows: ``[N]``, the log of the teacher's mass outside the ids, where it is known. min_tail, tail_rounding:
            as in ``resolve_teacher``.
        temperature, teacher_temperature, params[0], the weights of terms: a float or ``[N]``.

    Returns:
        ``TopKRows``; statistics are detached, and None unless ``stats``.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = vocab_size or student.shape[-1]
    s = student[:, :columns].to(dtype)
    counted = torch.ones(s.shape[0], dtype=torch.bool, device=s.device) if labels is None else labels != ignore_index
    # Ignored rows are replaced before any arithmetic, so that their NaN or -inf reach neither loss nor gradient.
    s = torch.where(counted[:, None], s, 0.0)
    ids = torch.where(counted[:, None], ids, -1)
    capped = apply_softcap(s, student_softcap)
    logq = log_softmax(capped, column(temperature), steep=divergence == "alpha_beta")

    spoilt = out_of_range(ids, logprobs, columns)
    # The teacher is small: fp64 keeps the tail of a teacher that is nearly sure.
    exact = dtype if s.device.type == "mps" else torch.float64
    ids, given, used = distinct(ids, logprobs.to(exact), columns)
    outside = columns - used.sum(-1)
    log_rest = None if tail_rows is None else tail_rows.to(exact)
    if tail_rows is not None:
        spoilt = spoilt | (tail_rows.isnan() & used.any(-1))
    teacher = resolve_teacher(given, used, outside, tail, teacher_temperature, log_rest, min_tail, tail_rounding)
    picked = logq.gather(1, ids.clamp(max=columns - 1))  # [N, K]
    student_mass = torch.where(used, picked, -torch.inf).exp().sum(-1)
    d = _divergence(logq, picked, ids, used, outside, teacher, tail, divergence, params)
    if tail == "bucket":
        spoilt = spoilt | (logq[:, 0].isnan() & ~teacher.known)
    d = torch.where(teacher.known, d, 0.0) + torch.where(spoilt, torch.nan, 0.0)
    # As in dense_rows: the derivative of a NaN need not be NaN.
    d = d * torch.where(torch.isnan(d), d.detach(), torch.ones_like(d))

    zero = torch.zeros_like(d)
    # A loss without any term is 0, and so is its gradient, which is there.
    loss = capped[:, :0].sum(-1)
    if is_there(kd_weight):
        loss = term(kd_weight, (squared(temperature) if scale_by_t_squared else 1.0) * d)
    lse = torch.logsumexp(capped, -1) if is_there(z_loss_weight) or stats else zero
    ce = zero
    if labels is not None and (is_there(ce_weight) or stats):
        ce = cross_entropy(capped, labels, counted, label_smoothing)
    if is_there(ce_weight) and labels is not None:
        loss = loss + term(ce_weight, ce)
    if is_there(z_loss_weight):
        loss = loss + term(z_loss_weight, lse.square())
    loss = torch.where(counted, loss, zero)
    if not stats:
        return TopKRows(loss)
    teacher_mass = torch.where(used, given, -torch.inf).exp().sum(-1).to(dtype)
    nan = torch.where(spoilt, torch.nan, 0.0)
    shared = torch.where(logq[:, 0].isnan(), torch.nan, overlap(logq, picked, used))
    found = [d, ce, lse, teacher_mass + nan, student_mass, shared + nan]
    return TopKRows(loss, torch.stack([torch.where(counted, item.detach(), zero) for item in found], -1))


def _divergence(
    logq: Tensor,
    picked: Tensor,
    ids: Tensor,
    used: Tensor,
    outside: Tensor,
    teacher: Teacher,
    tail: str,
    divergence: str,
    params: tuple[Union[float, Tensor], float],
) -> Tensor:
    param0 = params[0][:, None, None] if isinstance(params[0], Tensor) else params[0]

    def pointwise(logp: Tensor, logq: Tensor) -> Tensor:
        """``f`` of every element of ``[N, M]``: the sum over one outcome."""
        return divergences.TABLE[divergence](logp.to(logq.dtype)[..., None], logq[..., None], param0, params[1])

    if tail == "renormalize_both":
        present = used & teacher.known[:, None]
        # A row without entries must not take the log-softmax of nothing.
        picked = torch.log_softmax(torch.where(used | ~teacher.known[:, None], picked, -torch.inf), -1)
    else:
        present = used
    # p = q = 1 stands in for slots that are not used.
    f = pointwise(torch.where(present, teacher.logp, 0.0), torch.where(present, picked, 0.0))
    d = torch.where(present, f, 0.0).sum(-1)
    if tail == "renormalize_both":
        return d

    among = torch.zeros(logq.shape[0], logq.shape[1] + 1, dtype=torch.bool, device=logq.device)
    among = among.scatter(1, ids, True)[:, :-1]  # [N, V], the teacher's ids
    log_each = teacher.log_each
    if tail in ("renormalize", "drop") and not by_name(divergence).linear_without_teacher:
        log_each = torch.full_like(d, -torch.inf)
    if log_each is not None:
        f = pointwise(log_each[:, None].expand_as(logq), torch.where(among, 0.0, logq))
        return d + torch.where(among, 0.0, f).sum(-1)
    alive = (~among & ~torch.isneginf(logq)).any(-1)
    log_q = torch.logsumexp(torch.where(among & alive[:, None], -torch.inf, logq), -1)
    log_q = torch.where(alive, log_q, -torch.inf)
    if tail == "bucket":
        assert teacher.log_rest is not None
        f = pointwise(teacher.log_rest[:, None], log_q[:, None]).squeeze(1)
        return d + torch.where(outside > 0, f, 0.0)
    # The terms at p = 0 add up to f(0, 1) sum q.
    one = torch.zeros_like(d)[:, None]
    return d + pointwise(one - torch.inf, one).squeeze(1) * log_q.exp()
