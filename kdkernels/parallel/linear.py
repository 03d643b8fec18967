"""Losses on hidden states over a sharded vocabulary: a rank has the hidden states, and some rows of the heads.

The loop is that of one device, of chunks of this rank's columns. The first numbers of a chunk travel while the next one
is projected, and its gradient of the hidden states, a sum over the ranks, while the next one is differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor

from kdkernels import backends, checks
from kdkernels.autograd import TokenCall
from kdkernels.chunked import (
    Call,
    Sums,
    fp16_range_of,
    of_rows,
    outputs,
    positions,
    run_in_place,
    teacher_heads,
    zeros_for_gradient,
)
from kdkernels.chunks import Ahead, HiddenGrad, Products, agreed_chunks, chunk_rows, kept_rows
from kdkernels.heads import Head, HeadGrad, Scratch, sum_dtype
from kdkernels.launch import Launch, dense_launch, flat, topk_launch, without_teacher
from kdkernels.linear import as_student, result_of, teachers_of
from kdkernels.linear_tokens import LinearTokenCall
from kdkernels.objective import LinearTokenOptions
from kdkernels.parallel import topk
from kdkernels.parallel.calls import facts_of
from kdkernels.parallel.dense import ShardedLoss
from kdkernels.parallel.shards import Shards, outside_graphs, shards_of
from kdkernels.stats import KDStats, TopKStats
from kdkernels.tokens import token_call

_CheckedT = TypeVar("_CheckedT")
Given = tuple[Any, Any, Any]  # hidden states, weight, bias


@outside_graphs
def linear_kd_loss(objective: Any, student: Given, teacher: Given, labels: Any, others: Mapping[str, Any]) -> Any:
    """``kdkernels.linear_kd_loss`` of heads of which this rank has some rows; ``others`` stand for a teacher."""
    head, bias, product_dtype, logits = as_student(objective, *student, least=0)
    alone = all(item is None for item in (*teacher, *others.values()))
    single = objective.teacher_weights is None and not isinstance(teacher[0], (list, tuple))
    missing = {
        f"teacher_form={objective.teacher_form!r}": objective.teacher_form != "logits",
        "standardize": objective.standardize,
        **{name: value is not None for name, value in others.items()},
    }

    def check(total: int) -> tuple[Launch, list[Given]]:
        _refuse(objective.function, missing)
        teachers: list[Given] = []
        if alone:
            checks.without_teacher(objective, "teacher_hidden")
        else:
            teachers = teachers_of(*teacher)
            for each in teachers:
                checks.head("teacher_", *each, product_dtype is not None, least=0)
                checks.teacher_shard_head(*each[:2], logits, total, objective.vocab_size)
        weights = checks.mixture_weights(objective, len(teachers), logits, single=single)
        backend = backends.choose(objective.backend, logits, divergence=objective.resolved.name, pattern="shard_fwd")
        tensors = [item for each in teachers for item in each]
        checks.reverse_mode_only(None, *student, *tensors, labels, *objective.tensors)
        mixture = checks.mixture_of(objective)
        return dense_launch(objective, logits, labels, total, backend, weights, mixture), teachers

    count = len(teacher[0]) if isinstance(teacher[0], (list, tuple)) else int(not alone)
    facts = {"labels": labels is not None, "teachers": count}
    shards, (launch, teachers) = _agreed(objective, (student[0], head, bias), logits, facts, check)
    tensors = [item for each in teachers for item in each]
    own = [_of_this_rank(each, len(head), shards) for each in teachers]
    hiddens, heads, biases = zip(*own, strict=True) if own else ((), (), ())
    options = product_dtype, objective.logits_dtype
    call = Call(launch, objective.chunk_bytes, *options, hiddens, heads, biases, shards=shards)
    result = result_of(objective, call, student[0], head, bias, [*tensors, labels], KDStats)
    return without_teacher(result) if alone else result


def _of_this_rank(teacher: Given, rows: int, shards: Shards) -> Given:
    """Flat hidden states, and this rank's part of a head that may be here whole."""
    hidden, weight, bias = teacher
    own = slice(shards.first, shards.first + shards.columns) if len(weight) != rows else slice(None)
    return flat(hidden.detach()), weight.detach()[own], None if bias is None else bias.detach()[own]


@outside_graphs
def linear_topk_kd_loss(objective: Any, student: Given, ids: Any, logprobs: Any, labels: Any, tail_logprob: Any) -> Any:
    """``kdkernels.linear_topk_kd_loss`` of a head of which this rank has some rows."""
    head, bias, product_dtype, logits = as_student(objective, *student, least=0)

    def check(total: int) -> Launch:
        _refuse("linear_topk_kd_loss", {"sparse_grad": objective.sparse_grad})
        launch = topk_launch(objective, logits, (ids, logprobs), labels, tail_logprob, total)
        checks.reverse_mode_only(None, *student, ids, logprobs, labels, tail_logprob, *objective.tensors)
        return launch

    facts = {"ids": getattr(ids, "shape", None), "labels": labels is not None}
    shards, launch = _agreed(objective, (student[0], head, bias), logits, facts, check)
    call = Call(launch, objective.chunk_bytes, product_dtype, objective.logits_dtype, shards=shards)
    return result_of(objective, call, student[0], head, bias, [ids, logprobs, labels, tail_logprob], TopKStats)


@outside_graphs
def prepared_tokens(
    given: LinearTokenOptions, hidden: Any, weight: Any, ids: Any, bias: Any, side: str
) -> tuple[LinearTokenCall, Tensor, Optional[Tensor], Tensor, Tensor]:
    """As ``linear_tokens`` prepares a call, of a head of which this rank has some rows."""
    head, offset, product_dtype, logits = as_student(given, hidden, weight, bias, side, least=0)

    def check(total: int) -> tuple[Tensor, TokenCall]:
        tokens = checks.token_ids(ids, logits, total, given.ignore_index)
        checks.reverse_mode_only(None, hidden, head, offset, ids, *given.tensors)
        return tokens, token_call(given, logits, tokens, total)

    facts = {"ids": getattr(ids, "shape", None), "side": side}
    shards, (tokens, call) = _agreed(given, (hidden, head, offset), logits, facts, check)
    found = LinearTokenCall(call, given.chunk_bytes, product_dtype, given.logits_dtype, shards)
    return found, head, offset, tokens, logits


def _refuse(function: str, missing: Mapping[str, bool]) -> None:
    for what, is_wanted in missing.items():
        if is_wanted:
            raise ValueError(f"{what} cannot be combined with process_group in {function}")


def _agreed(
    objective: Any, student: Given, logits: Tensor, facts: Mapping[str, Any], check: Callable[[int], _CheckedT]
) -> tuple[Shards, _CheckedT]:
    """The shards of a call of plain tensors, whose ranks must agree on what gets a gradient: its sums travel."""
    checks.shard("student", logits)
    hidden, *head = student
    learns = [item is not None and item.requires_grad and torch.is_grad_enabled() for item in (hidden, *head)]
    of_tensors = {
        "hidden.shape[-1]": hidden.shape[-1],
        "hidden.requires_grad": learns[0],
        "weight.requires_grad": any(learns[1:]),
    }
    facts = facts_of(objective.function, objective, logits, **of_tensors, **facts)
    return shards_of(objective.process_group, logits, objective.vocab_size, facts, check)


def logits_loop(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], needs: Sequence[bool]) -> Sums:
    """As ``chunked``'s, of this rank's columns."""
    launch, shards = call.launch, call.shards
    assert shards is not None
    (dtype, logits_dtype), scratch, columns = call.dtypes(hidden), Scratch(hidden), shards.columns
    head = Head(weight, bias, columns=columns, dtype=dtype, logits_dtype=logits_dtype, scratch=scratch)
    teachers = teacher_heads(call, scratch, columns)
    # A product of 16-bit matrices may read what lies between rows.
    inputs = hidden.to(dtype).contiguous()
    loss, stats = outputs(hidden, launch)
    dhidden = HiddenGrad(zeros_for_gradient(hidden), shards) if needs[0] else None
    dweight = HeadGrad(weight, head.blocks) if needs[1] else None
    dbias = HeadGrad(bias, head.blocks) if needs[2] and bias is not None else None
    fp16_range, launch = fp16_range_of(launch, loss, head) if dtype == torch.float16 and any(needs) else (None, launch)

    # Of the widest shard: all ranks have the same chunks. Two are there at a time, and a sparse teacher's gradient.
    widest, sparse = max(shards.widths), launch.pattern == "topk_fwd"
    row_bytes = sum(widest * teacher.logits_dtype.itemsize for teacher, _ in teachers)
    row_bytes = (3 if sparse else 2) * head.row_bytes(widest) + 2 * row_bytes
    products = Products.of(widest, hidden, dtype, [states for _, states in teachers], needs)
    size = chunk_rows(call.chunk_bytes, hidden.device, row_bytes, products)
    chunks = agreed_chunks(shards, kept_rows(call.launch), len(hidden), size, hidden)

    def project(k: int) -> list[Tensor]:
        rows, count = chunks[k]
        found = []
        for number, (each, states) in enumerate([(head, inputs), *teachers]):
            found.append(scratch.logits(f"logits {number} {k % 2}", count, columns, each.logits_dtype))
            if columns:
                each.project(states[rows], found[-1])
        return found

    ahead = Ahead(project, len(chunks))
    busy = dataclasses.replace(shards, meanwhile=ahead.prepare)
    for k, (rows, _) in enumerate(chunks):
        logits, *targets = ahead.take(k)
        loss[rows], stats[rows] = _run_in_place(of_rows(launch, rows), busy, logits, targets, any(needs))
        h, dh = inputs[rows], None
        if any(needs) and columns:
            dh = head.backward(logits, h, wants_dhidden=needs[0], dweight=dweight, dbias=dbias, fp16_range=fp16_range)
        if dhidden is not None:
            dhidden.add(rows, torch.zeros_like(h, dtype=sum_dtype(dtype)) if dh is None else dh)
    found = None if dhidden is None else dhidden.finish()
    if fp16_range is None:
        return Sums(loss, stats, found, dweight, dbias)
    rest = fp16_range.sums.reciprocal()
    if fp16_range.in_chunk:
        loss *= rest
    return Sums(loss, stats, found, dweight, dbias, rest, rest if fp16_range.in_chunk else None)


def _run_in_place(
    launch: Launch, shards: Shards, logits: Tensor, targets: Sequence[Tensor], with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses and statistics of a chunk of this rank's columns; the gradient takes the place of the logits."""
    first: Optional[Tensor] = targets[0] if targets else None
    with torch.set_grad_enabled(with_grad):
        leaf = logits.detach().requires_grad_(with_grad)
        if launch.pattern == "topk_fwd":
            found = topk.losses_of_rows(launch, shards, leaf)
        else:
            found = ShardedLoss.apply(leaf, first, launch, shards, True, tuple(targets[1:]))
        losses, stats = found if isinstance(found, tuple) else (found, None)
        total = losses.sum()
    if with_grad:
        (gradient,) = torch.autograd.grad(total, leaf)
        if gradient.data_ptr() != logits.data_ptr():
            logits.copy_(gradient)
    return losses.detach(), losses.new_empty(len(losses), 0) if stats is None else stats.detach()


def columns_loop(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], needs: Sequence[bool]) -> Sums:
    """As ``chunked``'s: the logits of the K ids of a row travel, each from the rank that has its column."""
    shards = call.shards
    assert shards is not None
    dtype, scratch = call.product_dtype or hidden.dtype, Scratch(hidden)
    sums, width = sum_dtype(dtype), hidden.shape[1]
    ids, launch = positions(call.launch, shards.total)
    loss, stats = outputs(hidden, launch)
    dhidden = HiddenGrad(zeros_for_gradient(hidden), shards) if needs[0] else None
    whole = [slice(0, len(weight))] if len(weight) else []
    dweight = HeadGrad(weight, whole) if needs[1] else None
    dbias = HeadGrad(bias, whole) if needs[2] and bias is not None else None

    row_bytes = ids.shape[1] * width * (sums.itemsize + (weight.dtype.itemsize if weight.dtype != sums else 0))
    size = chunk_rows(call.chunk_bytes, hidden.device, row_bytes)
    for rows, count in agreed_chunks(shards, kept_rows(launch), len(hidden), size, hidden):
        h, here = hidden[rows].to(dtype).to(sums), shards.here(ids[rows])
        flat_ids = torch.where(here, ids[rows] - shards.first, 0).reshape(-1)
        head = scratch.empty("head", (count, ids.shape[1], width), sums).zero_()
        logits = head.new_zeros(ids[rows].shape)
        if shards.columns:
            head.copy_(weight.index_select(0, flat_ids).to(dtype).view_as(head))
            head.masked_fill_(~here.unsqueeze(-1), 0)
            torch.bmm(head, h[:, :, None], out=logits.unsqueeze(2))
            if bias is not None:
                logits += torch.where(here, bias[flat_ids].to(dtype).view_as(logits), 0.0)
        (logits,) = shards.sum(logits)
        loss[rows], stats[rows] = run_in_place(of_rows(launch, rows), logits, [], any(needs))
        logits = torch.where(here, logits, 0.0)
        if dhidden is not None:
            dhidden.add(rows, torch.bmm(logits[:, None], head).squeeze(1))
        if dbias is not None and shards.columns:
            dbias.sums(whole[0]).index_add_(0, flat_ids, logits.reshape(-1))
        if dweight is not None and shards.columns:
            torch.mul(logits[:, :, None], h[:, None], out=head)  # the gathered rows have done their work
            dweight.sums(whole[0]).index_add_(0, flat_ids, head.view(-1, width))
    return Sums(loss, stats, None if dhidden is None else dhidden.finish(), dweight, dbias)
