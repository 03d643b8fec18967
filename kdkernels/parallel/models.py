"""The logits of student and teachers as a shard's kernels read them.

A plain teacher's are read where they stand. The logits of a mixture, of probabilities, beside a bias, or without a
column are made of some rows at a time, so that there is never more than a block of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import checks, ops
from kdkernels.autograd import pieces
from kdkernels.launch import Launch, as_rows
from kdkernels.parallel.shards import Shards
from kdkernels.parallel.tokens import Part, call_of, part_of
from kdkernels.reference.dense import PerRow, apply_softcap
from kdkernels.reference.shards import shard_rows


class Block(NamedTuple):
    """Some rows: which they are, and their logits ``[B, L, V]``."""

    rows: slice
    student: Tensor
    teachers: list[Tensor]
    gradient: Optional[Tensor]


class Models:
    """Student and teachers of a call, of this rank's columns.

    ``norms`` has the largest logit and the log of the sum of exponentials of each teacher ``[N]``, where a mixture of
    probabilities needs them; ``without`` the column of each row ``[N]`` that both sides are without, -1 for none.
    """

    def __init__(
        self,
        launch: Launch,
        shards: Shards,
        student: Tensor,
        teachers: Sequence[Tensor],
        without: Optional[Tensor] = None,
    ) -> None:
        rows, options = launch.rows, launch.options
        self.launch, self.shards, self.student, self.teachers = launch, shards, student, tuple(teachers)
        self.dtype = checks.sum_dtype(student)
        self.norms: list[tuple[Tensor, Tensor]] = []
        self.without = without
        self.mixture = options.get("mixture") if rows.mixture_weights is not None else None
        self.of_probs = options.get("teacher_form", "logits") == "probs"
        self.makes_student = rows.student_offsets is not None or without is not None
        self.makes_teacher = bool(teachers) and (
            self.mixture is not None or self.of_probs or rows.teacher_offsets is not None or without is not None
        )

    @property
    def teacher_softcap(self) -> float:
        """The cap that is left to the kernels."""
        return 0.0 if self.mixture is not None or self.of_probs else self.launch.options.get("teacher_softcap", 0.0)

    def _blocks(self, made: bool, gradient: Optional[Tensor] = None) -> Iterator[Block]:
        """All rows at once, or some at a time where logits are ``made``."""
        more = () if gradient is None else (gradient,)
        views = as_rows((self.student, *self.teachers, *more))
        whole = not made or self.shards.columns == 0
        for batch, length, rows in pieces(views[0], whole=whole):
            student, *rest = (view[batch, length] for view in views)
            own = rest.pop() if gradient is not None else None
            yield Block(rows, student, rest, own)

    def _student_of(self, block: Block) -> Tensor:
        if not self.makes_student:
            return block.student
        found = block.student[..., : self.shards.columns].to(self.dtype)
        if self.launch.rows.student_offsets is not None:
            found = found + self.launch.rows.student_offsets[: self.shards.columns]
        return self._without(found, block.rows)

    def _teacher_of(self, block: Block, k: Optional[int] = None) -> Tensor:
        """Logits of the teacher, of the mixture of all, or of one in it."""
        if not self.makes_teacher:
            return block.teachers[0]
        if self.mixture is None:
            return self._without(self._one(block.teachers[0]), block.rows)
        if k is not None:
            return self._capped(block.teachers[k])
        weights = self.launch.rows.mixture_weights
        assert weights is not None
        shape = (*block.student.shape[:2], 1)
        each = [weight.reshape(shape) for weight in weights[block.rows].unbind(1)]
        return self._sum_of_logits(block, each) if self.mixture != "probs" else self._sum_of_probs(block, each)

    def _one(self, teacher: Tensor) -> Tensor:
        found = teacher[..., : self.shards.columns].to(self.dtype)
        found = found.log() if self.of_probs else found
        offsets = self.launch.rows.teacher_offsets
        return found if offsets is None else found + offsets[: self.shards.columns]

    def _capped(self, teacher: Tensor) -> Tensor:
        found = self._one(teacher)
        return found if self.of_probs else apply_softcap(found, self.launch.options["teacher_softcap"])

    def _sum_of_logits(self, block: Block, weights: list[Tensor]) -> Tensor:
        # An outcome that one teacher rules out stays so, whatever the sign of its weight; weight 0 counts nothing.
        total: Optional[Tensor] = None
        for teacher, weight in zip(block.teachers, weights, strict=True):
            logits = self._capped(teacher)
            term = torch.where(torch.isneginf(logits), logits, weight * logits)
            term = torch.where(weight != 0, term, 0.0)
            total = term if total is None else total + term
        assert total is not None
        return total

    def _sum_of_probs(self, block: Block, weights: list[Tensor]) -> Tensor:
        """The log-probabilities of the mixture."""
        temperature, total = temperatures(self.launch)[1], None
        shape = (*block.student.shape[:2], 1)
        if isinstance(temperature, Tensor):
            temperature = temperature[block.rows].view(shape)
        for teacher, weight, (top, log_z) in zip(block.teachers, weights, self.norms, strict=True):
            logits = self._capped(teacher)
            term = (logits - top[block.rows].view(shape)) / temperature - log_z[block.rows].view(shape) + weight.log()
            term = torch.where(weight != 0, term, -torch.inf)
            total = term if total is None else torch.logaddexp(total, term)
        assert total is not None
        return total

    def _without(self, logits: Tensor, rows: slice) -> Tensor:
        if self.without is None:
            return logits
        column = self.without[rows].view(*logits.shape[:2], 1)
        here = torch.arange(logits.shape[-1], device=logits.device) == column
        return logits.masked_fill(here, -torch.inf)

    def student_part(self, counted: Tensor, temperature: PerRow, *, mean: bool = False) -> Part:
        """The part of this rank's columns in the student's softmax."""
        cap = self.launch.options.get("student_softcap", 0.0)
        return self._part(self._student_of, self.makes_student, counted, temperature, cap, mean=mean)

    def teacher_part(self, counted: Tensor, k: Optional[int] = None) -> Part:
        """The same of the teacher, or of one in a mixture of probabilities."""
        temperature = temperatures(self.launch)[1]
        return self._part(
            lambda block: self._teacher_of(block, k), self.makes_teacher, counted, temperature, self.teacher_softcap
        )

    def _part(
        self,
        logits_of: Callable[[Block], Tensor],
        made: bool,
        counted: Tensor,
        temperature: PerRow,
        cap: float,
        *,
        mean: bool = False,
    ) -> Part:
        ids = torch.where(counted, ops.ELSEWHERE, -1).unsqueeze(-1)
        found = []
        for block in self._blocks(made):
            of_rows = temperature[block.rows] if isinstance(temperature, Tensor) else temperature
            call = call_of(self.launch.backend, of_rows, cap, stats=mean)
            found.append(part_of(call, logits_of(block), ids[block.rows], self.shards))
        columns: Any = (
            None if items[0] is None else torch.cat(items).to(self.dtype) for items in zip(*found, strict=True)
        )
        return Part(*columns)

    def label_logits(self, labels: Tensor) -> Tensor:
        """The student's logits after the softcap of labels that are columns here, 0 of others; all ``[N]``."""
        local = self.shards.local(labels, self.launch.options["ignore_index"])
        return self._picked(self.student, local, self.launch.rows.student_offsets, "student_softcap")

    def teacher_label_logits(self, labels: Tensor) -> Tensor:
        """The same of a single teacher's logits."""
        local = self.shards.local(labels, self.launch.options["ignore_index"])
        return self._picked(self.teachers[0], local, None, "teacher_softcap")

    def _picked(self, logits: Tensor, local: Tensor, offsets: Optional[Tensor], cap: str) -> Tensor:
        if logits.shape[-1] == 0:
            return torch.zeros(local.shape, dtype=self.dtype, device=logits.device)
        column = local.clamp(min=0)
        found = logits.gather(-1, column.view(*logits.shape[:-1], 1)).reshape(-1).to(self.dtype)
        found = found if offsets is None else found + offsets[column]
        return torch.where(local >= 0, apply_softcap(found, self.launch.options.get(cap, 0.0)), 0.0)

    def sums(self, numbers: Tensor, divergence: str, *, stats: bool = False) -> Tensor:
        """``shard_fwd`` of ``numbers``: the sums of this rank's columns."""
        if self.shards.columns == 0:
            return numbers.new_zeros((len(numbers), len(ops.SHARD_SUMS) if stats else 2))
        made = self.makes_student or self.makes_teacher
        found = [
            self._run(block, self._student_of(block), self._teacher_of(block), None, None, numbers, divergence, stats)
            for block in self._blocks(made)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def write_gradient(
        self, gradient: Tensor, labels: Optional[Tensor], numbers: Tensor, divergence: str, *, soft: bool
    ) -> None:
        """``shard_fwd`` of ``numbers``: the gradient of this rank's columns, in place of the student's logits or not.

        Where nothing is ``soft`` the teacher is not read.
        """
        made = self.makes_student or (soft and self.makes_teacher)
        for block in self._blocks(made, gradient):
            assert block.gradient is not None
            student = self._student_of(block)
            teacher = self._teacher_of(block) if soft else student
            if not self.makes_student:
                self._run(block, student, teacher, block.gradient, labels, numbers, divergence, False)
                continue
            self._run(block, student, teacher, student, labels, numbers, divergence, False)
            block.gradient[..., : self.shards.columns].copy_(student)
            block.gradient[..., self.shards.columns :] = 0

    def _run(
        self,
        block: Block,
        student: Tensor,
        teacher: Tensor,
        gradient: Optional[Tensor],
        labels: Optional[Tensor],
        numbers: Tensor,
        divergence: str,
        stats: bool,
    ) -> Tensor:
        get, rows, param = self.launch.options, block.rows, self.launch.rows.param_rows
        options = {
            "divergence": divergence,
            "param0": get.get("param0", 0.0),
            "param1": get.get("param1", 0.0),
            "student_softcap": get.get("student_softcap", 0.0),
            "teacher_softcap": self.teacher_softcap,
            "vocab_size": self.shards.columns,
            "stats": stats,
        }
        operands = (
            student,
            teacher,
            gradient,
            None if labels is None else labels[rows],
            numbers[rows],
            None if param is None else param[rows],
        )
        if self.launch.backend == "torch":
            return shard_rows(*operands, **options)
        return ops.call("shard_fwd", self.launch.backend, operands, options)

    def most_likely(self) -> Tensor:
        """Of each row the largest logit of student and teacher here, and 1 where both are the first of a column:
        ``[N, 3]``."""
        count = self.student.shape[:-1].numel()
        if self.shards.columns == 0:
            lowest = torch.full((count,), -torch.inf, dtype=self.dtype, device=self.student.device)
            return torch.stack([lowest, lowest, torch.zeros_like(lowest)], -1)
        found = []
        for block in self._blocks(self.makes_student or self.makes_teacher):
            sides = [
                (self._student_of(block), self.launch.options.get("student_softcap", 0.0)),
                (self._teacher_of(block), self.teacher_softcap),
            ]
            values, columns = [], []
            for logits, cap in sides:
                largest = logits[..., : self.shards.columns].max(-1)
                values.append(apply_softcap(largest.values.reshape(-1).to(self.dtype), cap))
                columns.append(largest.indices.reshape(-1))
            found.append(torch.stack([*values, (columns[0] == columns[1]).to(self.dtype)], -1))
        return torch.cat(found)


def temperatures(launch: Launch) -> tuple[PerRow, PerRow]:
    """Of student and teacher, numbers or ``[N]``."""
    rows, options = launch.rows, launch.options
    of_student, of_teacher = rows.student_temperature_rows, rows.teacher_temperature_rows
    return (
        options["temperature"] if of_student is None else of_student,
        options["teacher_temperature"] if of_teacher is None else of_teacher,
    )
