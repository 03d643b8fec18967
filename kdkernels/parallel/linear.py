"""Losses on hidden states over a sharded vocabulary: a rank has the hidden states, and some rows of the heads.

The loop is that of one device, of chunks of this rank's columns. The first numbers of a chunk travel while the next one
is projected, and its gradient of the hidden states, a sum over the ranks, while the next one is differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import backends, checks
from kdkernels.chunked import (
    Call,
    Products,
    Rows,
    Sums,
    chunk_rows,
    even_chunks,
    fp16_range_of,
    kept_rows,
    of_rows,
    outputs,
    positions,
    run_in_place,
    teacher_heads,
    zeros_for_gradient,
)
from kdkernels.heads import Head, HeadGrad, Scratch, sum_dtype
from kdkernels.launch import Launch, dense_launch, flat, topk_launch
from kdkernels.linear import as_student, result_of
from kdkernels.parallel import topk
from kdkernels.parallel.calls import facts_of
from kdkernels.parallel.dense import ShardedLoss
from kdkernels.parallel.shards import Shards, outside_graphs, shards_of
from kdkernels.stats import KDStats, TopKStats

Given = tuple[Any, Any, Any]  # hidden states, weight, bias


@outside_graphs
def linear_kd_loss(objective: Any, student: Given, teacher: Given, labels: Any, others: Mapping[str, Any]) -> Any:
    """``kdkernels.linear_kd_loss`` of heads of which this rank has some rows; ``others`` stand for a teacher."""
    head, bias, product_dtype, logits = as_student(objective, *student, least=0)
    alone = all(item is None for item in (*teacher, *others.values()))
    missing = {
        "a mixture of teachers": objective.teacher_weights is not None or isinstance(teacher[0], (list, tuple)),
        f"teacher_form={objective.teacher_form!r}": objective.teacher_form != "logits",
        "teacher_lse": objective.teacher_lse is not None,
        "standardize": objective.standardize,
        "return_stats": objective.return_stats,
        **{name: value is not None for name, value in others.items()},
    }
    states, matrix, offset = _teacher_tensors(teacher)

    def check(total: int) -> Launch:
        _refuse("linear_kd_loss", missing)
        if alone:
            checks.without_teacher(objective)
        else:
            checks.head("teacher_", states, matrix, offset, product_dtype is not None, least=0)
            checks.teacher_shard_head(states, matrix, logits, total, objective.vocab_size)
        backend = backends.choose(objective.backend, logits, divergence=objective.resolved.name, pattern="shard_fwd")
        checks.reverse_mode_only(None, *student, states, matrix, offset, labels, *objective.tensors)
        return dense_launch(objective, logits, labels, total, backend, None, objective.mixture)

    facts = {"labels": labels is not None, "teacher": not alone}
    shards, launch = _agreed(objective, student[0], logits, facts, check)
    call = Call(launch, objective.chunk_bytes, product_dtype, objective.logits_dtype, shards=shards)
    if not alone:
        if len(matrix) != len(head):
            # All of it is here.
            own = slice(shards.first, shards.first + shards.columns)
            matrix, offset = matrix[own], None if offset is None else offset[own]
        call = call._replace(
            teacher_hidden=(flat(states.detach()),),
            teacher_weight=(matrix.detach(),),
            teacher_bias=(None if offset is None else offset.detach(),),
        )
    return result_of(objective, call, student[0], head, bias, [states, matrix, offset, labels], KDStats)


@outside_graphs
def linear_topk_kd_loss(objective: Any, student: Given, ids: Any, logprobs: Any, labels: Any, tail_logprob: Any) -> Any:
    """``kdkernels.linear_topk_kd_loss`` of a head of which this rank has some rows."""
    head, bias, product_dtype, logits = as_student(objective, *student, least=0)

    def check(total: int) -> Launch:
        names = ("sparse_grad", "return_stats")
        _refuse("linear_topk_kd_loss", {name: getattr(objective, name) for name in names})
        launch = topk_launch(objective, logits, (ids, logprobs), labels, tail_logprob, total)
        checks.reverse_mode_only(None, *student, ids, logprobs, labels, tail_logprob, *objective.tensors)
        return launch

    facts = {"ids": getattr(ids, "shape", None), "labels": labels is not None}
    shards, launch = _agreed(objective, student[0], logits, facts, check)
    call = Call(launch, objective.chunk_bytes, product_dtype, objective.logits_dtype, shards=shards)
    return result_of(objective, call, student[0], head, bias, [ids, logprobs, labels, tail_logprob], TopKStats)


def _refuse(function: str, missing: Mapping[str, bool]) -> None:
    for what, is_wanted in missing.items():
        if is_wanted:
            raise ValueError(f"{what} cannot be combined with process_group in {function}")


def _teacher_tensors(teacher: Given) -> Given:
    hidden, weight, bias = teacher
    if hidden is None or isinstance(hidden, (list, tuple)):
        return None, None, None
    return hidden, *checks.head_tensors("teacher_", weight, bias)


def _agreed(
    objective: Any, hidden: Tensor, logits: Tensor, facts: Mapping[str, Any], check: Callable[[int], Launch]
) -> tuple[Shards, Launch]:
    """The shards of a call, whose ranks must agree on the gradient of the hidden states."""
    checks.shard("student", logits)
    of_hidden = {
        "student_hidden.shape[-1]": hidden.shape[-1],
        "student_hidden.requires_grad": hidden.requires_grad and torch.is_grad_enabled(),
    }
    facts = facts_of(objective, logits, **of_hidden, **facts)
    return shards_of(objective.process_group, logits, objective.vocab_size, facts, check)


def _chunks(call: Call, num_rows: int, size: int, like: Tensor) -> list[tuple[Rows, int]]:
    kept = kept_rows(call.launch)
    if call.shards is not None and checks.reads_values(like):
        # Or a reduction would wait for another of a different size.
        call.shards.agree("rows that count", num_rows if kept is None else len(kept), like.device)
    return list(even_chunks(kept, num_rows, size))


class _HiddenGrad:
    """The gradient of hidden states ``[N, D]``: the sum over all ranks, of a chunk at a time."""

    def __init__(self, hidden: Tensor, shards: Shards) -> None:
        self.whole, self._shards = zeros_for_gradient(hidden), shards
        self._last: Callable[[], None] = lambda: None

    def add(self, rows: Rows, part: Tensor) -> None:
        """Begin with the sum of a chunk's, and end with that of the chunk before."""
        total = part.to(sum_dtype(part.dtype), copy=True)
        wait, self._last = self._last, self._ending(rows, total)
        wait()

    def finish(self) -> Tensor:
        self._last()
        return self.whole

    def _ending(self, rows: Rows, total: Tensor) -> Callable[[], None]:
        wait = self._shards.started(total) if total.numel() else lambda: None

        def end() -> None:
            wait()
            self.whole[rows] = total.to(self.whole.dtype)

        return end


class _Ahead:
    """The logits of chunks, each made once: when it is asked for, or before."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self._make, self._left = make, iter(range(count))
        self._found: dict[int, Any] = {}

    def prepare(self) -> None:
        """Make the next ones, unless some are waiting."""
        if not self._found:
            for k in self._left:
                self._found[k] = self._make(k)
                return

    def take(self, k: int) -> Any:
        self.prepare()
        return self._found.pop(k)


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
    dhidden = _HiddenGrad(hidden, shards) if needs[0] else None
    dweight = HeadGrad(weight, head.blocks) if needs[1] else None
    dbias = HeadGrad(bias, head.blocks) if needs[2] and bias is not None else None
    fp16_range, launch = fp16_range_of(launch, loss, head) if dtype == torch.float16 and any(needs) else (None, launch)

    # Of the widest shard: all ranks have the same chunks. Two are there at a time, and a sparse teacher's gradient.
    widest, sparse = max(shards.widths), launch.pattern == "topk_fwd"
    row_bytes = sum(widest * teacher.logits_dtype.itemsize for teacher, _ in teachers)
    row_bytes = (3 if sparse else 2) * head.row_bytes(widest) + 2 * row_bytes
    products = Products.of(widest, hidden, dtype, [states for _, states in teachers], needs)
    size = chunk_rows(call.chunk_bytes, hidden.device, row_bytes, products)
    chunks = _chunks(call, len(hidden), size, hidden)

    def project(k: int) -> list[Tensor]:
        rows, count = chunks[k]
        found = []
        for name, (each, states) in zip(("student", "teacher"), [(head, inputs), *teachers], strict=False):
            found.append(scratch.logits(f"{name} logits {k % 2}", count, columns, each.logits_dtype))
            if columns:
                each.project(states[rows], found[-1])
        return found

    ahead = _Ahead(project, len(chunks))
    busy = dataclasses.replace(shards, meanwhile=ahead.prepare)
    for k, (rows, _) in enumerate(chunks):
        logits, *targets = ahead.take(k)
        loss[rows] = _run_in_place(of_rows(launch, rows), busy, logits, targets, any(needs))
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


def _run_in_place(launch: Launch, shards: Shards, logits: Tensor, targets: Sequence[Tensor], with_grad: bool) -> Tensor:
    """Losses of a chunk of this rank's columns; the gradient takes the place of the logits."""
    with torch.set_grad_enabled(with_grad):
        leaf = logits.detach().requires_grad_(with_grad)
        if launch.pattern == "topk_fwd":
            losses = topk.losses_of_rows(launch, shards, leaf)
        else:
            losses = ShardedLoss.apply(leaf, targets[0] if targets else None, launch, shards, True)
        total = losses.sum()
    if with_grad:
        (gradient,) = torch.autograd.grad(total, leaf)
        if gradient.data_ptr() != logits.data_ptr():
            logits.copy_(gradient)
    return losses.detach()


def columns_loop(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], needs: Sequence[bool]) -> Sums:
    """As ``chunked``'s: the logits of the K ids of a row travel, each from the rank that has its column."""
    shards = call.shards
    assert shards is not None
    dtype, scratch = call.product_dtype or hidden.dtype, Scratch(hidden)
    sums, width = sum_dtype(dtype), hidden.shape[1]
    ids, launch = positions(call.launch, shards.total)
    loss, stats = outputs(hidden, launch)
    dhidden = _HiddenGrad(hidden, shards) if needs[0] else None
    whole = [slice(0, len(weight))] if len(weight) else []
    dweight = HeadGrad(weight, whole) if needs[1] else None
    dbias = HeadGrad(bias, whole) if needs[2] and bias is not None else None

    row_bytes = ids.shape[1] * width * (sums.itemsize + (weight.dtype.itemsize if weight.dtype != sums else 0))
    for rows, count in _chunks(call, len(hidden), chunk_rows(call.chunk_bytes, hidden.device, row_bytes), hidden):
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
