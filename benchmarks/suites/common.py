"""Shared by the suites over student and teacher logits ``[N, V]``: inputs, fp64 truth, and how to build candidates."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.model import Absent, Candidate, Candidates, Case, Outcome, Run
from kdkernels import memory, ops, testing
from kdkernels.backends import Availability, available
from kdkernels.objective import Objective

TEMPERATURE = 2.0
# Elements of a block of rows that goes through fp64.
CPU_BLOCK, GPU_BLOCK = 2**22, 2**26
FUSED = ("cpu", "triton")

# From (inputs or a block of their rows, backend, reduction, inplace) to kdkernels' loss.
Ours = Callable[[Any, str, str, bool], Tensor]
Loss = Callable[..., Tensor]
Arguments = Callable[[Any], tuple[Any, ...]]


class LogitInputs:
    """Logits as language models give them: a broad body, and a likely token that student and teacher mostly share.

    Every tensor in ``PER_ROW`` has one row per token, so that the truth can be computed in blocks of rows.
    """

    PER_ROW: Sequence[str] = ("pristine", "teacher", "labels")

    def __init__(self, case: Case, seed: int) -> None:
        rows, columns = case.shape
        generator = torch.Generator(case.device).manual_seed(seed)
        made: dict[str, Any] = {"generator": generator, "device": case.device}
        labels = torch.randint(0, columns, (rows, 1), **made)
        self.labels = labels.squeeze(1)
        self.pristine, self.teacher = (
            torch.empty(rows, columns, dtype=case.torch_dtype, device=case.device) for _ in range(2)
        )
        # On a GPU in blocks: the fp32 numbers of all rows may not fit beside the rest.
        step = rows if case.device == "cpu" else max(1, GPU_BLOCK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            teacher = torch.randn(labels[part].shape[0], columns, **made).mul_(2)
            teacher.scatter_add_(1, labels[part], torch.full_like(labels[part], 8.0, dtype=torch.float32))
            student = torch.randn(teacher.shape, **made).add_(teacher, alpha=0.8)
            self.pristine[part], self.teacher[part] = student, teacher
        self.student = self.pristine.clone().requires_grad_()
        self.leaves = (self.student,)
        self.out = torch.empty_like(self.pristine)

    @torch.no_grad()
    def reset(self) -> None:
        """Put the student's logits back and drop its gradient: every candidate finds the caches in the same state."""
        self.student.grad = None
        self.student.copy_(self.pristine)

    def poison(self) -> None:
        """Fill the preallocated output with NaN, so that an element left out shows."""
        self.out.fill_(float("nan"))

    def block(self, part: slice) -> SimpleNamespace:
        """Some rows in fp64, on their device."""
        picked = {name: getattr(self, name)[part] for name in self.PER_ROW}
        block = {name: t.double() if t.is_floating_point() else t for name, t in picked.items()}
        return SimpleNamespace(**block, student=block["pristine"].clone().requires_grad_())


def kd_loss(name: Any) -> Ours:
    """``kd_loss`` with a divergence, at the temperature of all suites."""

    def loss(inputs: Any, backend: Any, reduction: Any, inplace: bool) -> Tensor:
        options = {"reduction": reduction, "inplace": inplace, "backend": backend}
        return kd.kd_loss(inputs.student, inputs.teacher, divergence=name, temperature=TEMPERATURE, **options)

    return loss


def truth(inputs: Any, ours: Ours) -> Outcome:
    """Loss and gradient of the reference in fp64, in blocks of rows, for the sake of the intermediates' size."""
    rows, columns = inputs.pristine.shape
    device = inputs.pristine.device
    step = max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // columns)
    total = torch.zeros((), dtype=torch.float64, device=device)
    gradient = torch.empty(rows, columns, dtype=torch.float64, device=device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        block = inputs.block(part)
        with testing.float64_anywhere():
            value = ours(block, "torch", "none", False).sum() / rows
        value.backward()
        total += value.detach()
        gradient[part] = block.student.grad
    return Outcome(total, (gradient,))


def logits_and_labels(inputs: Any) -> tuple[Any, ...]:
    """The arguments of most eager formulations."""
    return inputs.student, inputs.teacher, inputs.labels, TEMPERATURE


def autograd(loss: Loss, arguments: Arguments = logits_and_labels) -> Run:
    """Loss and backward as a training step does them; gradients end in the ``grad`` of ``inputs.leaves``."""

    def run(inputs: Any) -> Outcome:
        value = loss(*arguments(inputs))
        value.backward()
        return Outcome(value, tuple(leaf.grad for leaf in inputs.leaves))

    return run


def eager(name: str, group: str, loss: Loss, arguments: Arguments = logits_and_labels) -> Candidate:
    """An eager formulation."""
    return Candidate(name, group, "eager", lambda: autograd(loss, arguments))


def compiled(
    name: str, group: str, loss: Loss, case: Case, arguments: Arguments = logits_and_labels
) -> Union[Candidate, Absent]:
    """torch.compile of an eager formulation, for one fixed shape."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if case.device == "cpu" and not shutil.which(compiler):
        return Absent(name, group, f"torch.compile needs a C++ compiler on the CPU, and {compiler} is not on PATH")
    return Candidate(
        name, group, "compile", lambda: autograd(torch.compile(loss, dynamic=False, fullgraph=True), arguments)
    )


def each_backend(
    group: str,
    case: Case,
    label: str,
    build: Callable[[str], Run],
    *,
    backends: Sequence[str] = FUSED,
    pattern: str = "dense_fwd",
    family: str = "kdkernels",
) -> Candidates:
    """A candidate for each backend, ``build`` of its name; ``label`` has a place for the name."""
    found: Candidates = []
    for backend in availability(case, backends, pattern):
        name = label.format(backend.name)
        if backend.ok:
            found.append(Candidate(name, group, family, partial(build, backend.name)))
        else:
            found.append(Absent(name, group, backend.reason))
    return found


def ours(
    group: str,
    loss: Ours,
    case: Case,
    *,
    inplace: bool = False,
    pattern: str = "dense_fwd",
    backends: Sequence[str] = FUSED,
) -> Candidates:
    """kdkernels through autograd, one candidate per backend."""
    label = "kdkernels {}, in place" if inplace else "kdkernels {}"
    return each_backend(group, case, label, partial(_build_ours, loss, inplace), pattern=pattern, backends=backends)


def availability(case: Case, names: Sequence[str] = FUSED, pattern: str = "dense_fwd") -> list[Availability]:
    """The backends that have the op ``pattern`` and run on the case's device, and why the others do not."""
    found = [backend for backend in available(case.device) if backend.name in names]
    lacking = ops.LACKING.get(pattern, {})
    return [Availability(b.name, False, lacking[b.name]) if b.name in lacking else b for b in found]


def _build_ours(loss: Ours, inplace: bool, backend: str) -> Run:
    return autograd(lambda inputs: loss(inputs, backend, "batchmean", inplace), lambda inputs: (inputs,))


def reference(group: str, loss: Ours, case: Case) -> Candidates:
    """Plain PyTorch, which is not called by kdkernels' name."""
    build, label = partial(_build_ours, loss, False), "plain PyTorch, the reference"
    return each_backend(group, case, label, build, backends=("torch",), family="reference")


def fresh_pages(group: str, loss: Ours, case: Case) -> list[Candidate]:
    """On the CPU without the memory that kdkernels keeps for gradients: its pages are mapped anew in every run."""
    if case.device != "cpu" or not next(answer.ok for answer in availability(case) if answer.name == "cpu"):
        return []

    def build() -> Run:
        run = _build_ours(loss, False, "cpu")

        def cold(inputs: Any) -> Outcome:
            memory.empty_cache()
            return run(inputs)

        return cold

    return [Candidate("kdkernels cpu, fresh pages", group, "kdkernels", build)]


def kernels(
    group: str, case: Case, build: Optional[Callable[[str], Run]] = None, pattern: str = "dense_fwd"
) -> Candidates:
    """An op alone, its gradient written to memory that is there already: no autograd, no allocation.

    ``build`` makes its run from a backend's name; the op is forward KL of dense logits where there is none.
    """
    label = "{} kernel, output allocated"
    return each_backend(group, case, label, build or _build_kernel, pattern=pattern, family="kernel")


def _build_kernel(backend: str) -> Run:
    op, scalars = ops.op("dense_fwd", backend), Objective(temperature=TEMPERATURE).scalars

    def run(inputs: Any) -> Outcome:
        rows, columns = inputs.pristine.shape
        student, teacher, out = (t.detach().unsqueeze(0) for t in (inputs.student, inputs.teacher, inputs.out))
        options = {**scalars, "mixture": "probs", "scale": 1.0 / rows, "vocab_size": columns}
        # Labels, weights, temperatures, the divergence's parameter, the terms' and the mixture's weights.
        per_row = (None,) * len(ops.ROW_TENSORS["dense_fwd"])
        loss, _ = op(student, [teacher], out, *per_row, **ops.packed("dense_fwd", options))
        return Outcome(loss.sum(), (inputs.out,))

    return run


def add_probe(group: str) -> Candidate:
    """``torch.add(s, t, out=g)``: two reads and one write of the same tensors, a yardstick for memory-bound kernels."""

    def run(inputs: Any) -> Outcome:
        torch.add(inputs.student.detach(), inputs.teacher, out=inputs.out)
        return Outcome(torch.zeros(()), (inputs.out,))

    return Candidate("torch.add(s, t, out=g)", group, "probe", lambda: run, _added)


class _Nothing(torch.autograd.Function):
    """A loss of 0 with the gradient it is given."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return leaf.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


# Without the Python half of apply, as kdkernels calls its own: 20 us less, and a least is to be the least.
_apply_nothing = super(torch.autograd.Function, _Nothing).apply


def nothing_through_autograd(group: str, case: Case) -> list[Candidate]:
    """On the CPU what a loss written as an ``autograd.Function`` takes however little it does, for a single number."""
    if case.device != "cpu":
        return []
    leaf, gradient = torch.zeros(1, 1, requires_grad=True), torch.ones(1, 1)

    def run(inputs: Any) -> Outcome:
        leaf.grad = None
        value = _apply_nothing(leaf, gradient)
        value.backward()
        assert leaf.grad is not None
        return Outcome(value, (leaf.grad,))

    expected = Outcome(torch.zeros(()), (gradient,))
    return [Candidate("autograd.Function, no work", group, "fixed", lambda: run, lambda inputs: expected)]


def add_through_autograd(group: str) -> Candidate:
    """The cost of autograd, and an addition for the memory."""

    def run(inputs: Any) -> Outcome:
        gradient = memory.empty_like(inputs.student)
        torch.add(inputs.student.detach(), inputs.teacher, out=gradient)
        value = _apply_nothing(inputs.student, gradient)
        value.backward()
        return Outcome(value, (inputs.student.grad,))

    return Candidate("torch.add through autograd", group, "kernel", lambda: run, _added)


def _added(inputs: Any) -> Outcome:
    return Outcome(torch.zeros(()), (inputs.pristine.double() + inputs.teacher.double(),))
