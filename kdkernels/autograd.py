"""One torch.autograd.Function for all row losses: the forward launch leaves the gradient, backward only scales it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import memory, ops, reference


class Launch(NamedTuple):
    """A call of ``kdkernels::<pattern>_<backend>`` but for its tensors of logits."""

    pattern: str
    backend: str
    tensors: tuple[Any, ...]  # positional arguments after dstudent
    options: dict[str, Any]  # keyword arguments
    # Ids and log-probabilities [N, K], where they stand for the teacher's logits.
    sparse_teacher: tuple[Tensor, ...] = ()


class RowLoss(torch.autograd.Function):
    """``forward`` computes the loss and both gradients, which are kept until ``backward``.

    It returns the loss, or ``(loss, stats)`` where the launch asks for statistics.

    The gradient buffer is handed out by the first backward and scaled in place, without a copy; where the graph is kept
    (``retain_graph=True``) every backward gets a fresh product instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Optional[Tensor],
        more_teachers: tuple[Tensor, ...],
        launch: Launch,
        dual: Optional[Launch],
        per_row: bool,
        inplace: bool,
    ) -> Any:
        dteacher = None
        if dual is not None and teacher is not None:
            # Before the student's launch, which may overwrite the student.
            dteacher = memory.empty_like(teacher)
            run(dual, teacher, (student,), dteacher)
        dstudent = None
        if ctx.needs_input_grad[0]:
            dstudent = student.detach() if inplace else memory.empty_like(student)
        teachers = () if teacher is None else (teacher, *more_teachers)
        rows, stats = run(launch, student, teachers, dstudent)
        if inplace and dstudent is not None:
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(dstudent, dteacher)
        ctx.backend = launch.backend
        loss = rows if per_row else rows.sum()
        if stats is None:
            return loss
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        # Turning autograd off and forbidding a second derivative matters only where it is on: create_graph=True.
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, dloss)


def _backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
    dstudent, dteacher = ctx.saved_tensors
    # A graph cannot write to what forward saved.
    backend = "torch" if torch.compiler.is_compiling() else ctx.backend
    return (_scaled(dstudent, dloss, backend), _scaled(dteacher, dloss, backend), None, None, None, None, None)


_backward_once = torch.autograd.function.once_differentiable(_backward)


class SummedCall(NamedTuple):
    """A call of ``kdkernels::<pattern>_loss_cpu`` but for its tensors and its scale."""

    op: Any
    call: Tensor  # what all rows share, as <pattern>_call_cpu packs it
    inplace: bool


class SummedLoss(torch.autograd.Function):
    """As ``RowLoss``, where one op of the CPU makes the gradient's memory and sums the rows."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, summed: SummedCall, scale: float, operands: tuple[Any, ...]) -> Tensor:
        dstudent = student.detach() if summed.inplace else None
        loss, gradient = summed.op(student, dstudent, summed.call, scale, True, *operands)
        if dstudent is not None:
            gradient = dstudent
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _backward_of_sum_once(ctx, dloss)
        # The common case in few steps: all of this is cold.
        if dloss.item() == 1 and not _graph_is_kept():
            return ctx.saved_tensors[0], None, None, None
        return _backward_of_sum(ctx, dloss)


def _backward_of_sum(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return _scaled(gradient, dloss, "cpu"), None, None, None


_backward_of_sum_once = torch.autograd.function.once_differentiable(_backward_of_sum)
# torch.autograd.Function.apply, in Python, looks for transforms of torch.func before it calls this: 20 us of cold code.
_apply_summed = super(torch.autograd.Function, SummedLoss).apply


def run_summed(summed: SummedCall, student: Tensor, scale: float, operands: tuple[Any, ...]) -> Tensor:
    """The loss of a call outside graphs and ``torch.func``; ``operands`` are what the op takes after ``needs_grad``."""
    if student.requires_grad and torch.is_grad_enabled():
        return _apply_summed(student, summed, scale, operands)
    return summed.op(student, None, summed.call, scale, False, *operands)[0]


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
        shared = reference.topk.student_overlap(student, ids, logprobs, launch.tensors[0], launch.options)
    operands = [views[0], *operands, *launch.sparse_teacher, destination, *launch.tensors]
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
    labels, weight, student_rows, teacher_rows, row_param, last = launch.tensors
    options = dict(launch.options)
    scale, param0, param1 = (options.pop(name) for name in ("scale", "param0", "param1"))
    options["params"] = (param0 if row_param is None else row_param, param1)
    if student_rows is not None:
        options["temperature"] = student_rows
    if teacher_rows is not None:
        options["teacher_temperature"] = teacher_rows
    stats: Optional[Tensor] = None
    if launch.pattern == "topk_fwd":
        ids, logprobs = launch.sparse_teacher
        loss, stats = reference.topk_rows(student, ids, logprobs, labels, tail_rows=last, **options)
    else:
        loss, *columns = reference.dense_rows(student, teachers, labels, mixture_weights=last, **options)
        if options["stats"]:
            stats = torch.stack([column for column in columns if column is not None], -1)
    return loss * scale if weight is None else loss * (scale * weight), stats


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
            shape = (leading[:cut].numel(), leading[cut:].numel())
            return [_view(t, shape) for t in tensors]
    return [t.reshape(1, leading.numel(), t.shape[-1]) for t in tensors]


def _view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.view(*shape, tensor.shape[-1])


def _mergeable(tensor: Tensor, start: int, stop: int) -> bool:
    """Whether dimensions ``start .. stop - 1`` collapse into one without a copy."""
    return all(
        tensor.shape[d] == 1
        or tensor.shape[d + 1] == 1
        or tensor.stride(d) == tensor.shape[d + 1] * tensor.stride(d + 1)
        for d in range(start, stop - 1)
    )


def _scaled(grad: Optional[Tensor], dloss: Tensor, backend: str) -> Optional[Tensor]:
    if grad is None:
        return None
    if backend == "torch" or _graph_is_kept():
        factor = dloss if dloss.dim() == 0 else dloss.reshape(*grad.shape[:-1], 1)
        return grad * factor.to(grad.dtype)
    # The value of a number on the CPU costs less than a launch; elsewhere only the kernel looks at it.
    if type(dloss) is Tensor and dloss.is_cpu and dloss.dim() == 0 and dloss.item() == 1:
        return grad
    ops.op("scale_grad", backend)(as_rows((grad,))[0], dloss)
    return grad


# Whether the running backward keeps its graph; where torch does not tell, the safe answer is yes.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
