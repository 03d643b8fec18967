"""One torch.autograd.Function for all row losses: the forward launch leaves the gradient, backward only scales it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from kdkernels import memory, ops, reference, symbols, transforms


class Launch(NamedTuple):
    """A call of ``kdkernels::<pattern>_<backend>`` but for its tensors of logits."""

    pattern: str
    backend: str
    tensors: tuple[Any, ...]  # positional arguments after dstudent
    options: dict[str, Any]  # keyword arguments
    # Ids and log-probabilities [N, K], where they stand for the teacher's logits.
    sparse_teacher: tuple[Tensor, ...] = ()
    # About the largest entry of a row's gradient before ``scale`` and the row's weight.
    gradient_size: float = 1.0


# A gradient in fp16 holds 2^-24 to 65504. It is kept as large as leaves this much room above Launch.gradient_size.
FP16_ROOM = 2.0**8


def keeps_constants_out(logits: Tensor) -> bool:
    """True if a gradient of these logits underflows when the constants of the loss are in it before grad_output is."""
    return logits.dtype == torch.float16


def without_constants(launch: Launch) -> tuple[Launch, Union[float, Tensor]]:
    """The launch whose gradient is of the size that fp16 holds, and what its losses and gradients are to be multiplied
    by: a number, or one per row ``[N]``.

    ``scale`` (1/N, the normaliser) and the rows' weights would take the gradient below fp16's smallest number before
    ``grad_output``, which has the loss scale of a ``GradScaler``, could bring it back. The factor is a power of two
    wherever its value is known, so that the product of a power of two in backward rounds nothing a second time.
    """
    scale = launch.options["scale"]
    if torch.compiler.is_compiling():
        # The numbers may be symbols, of which no logarithm is known.
        scale, factor = FP16_ROOM / launch.gradient_size, scale * launch.gradient_size / FP16_ROOM
    else:
        scale, factor = _power_of_two(scale, launch.gradient_size)
    launch = launch._replace(options={**launch.options, "scale": scale})
    weight = launch.tensors[1]
    if weight is None:
        return launch, factor
    # A weight of 0 stays one: rows that are left out are not multiplied by anything.
    mantissa, exponent = torch.frexp(weight)
    launch = launch._replace(tensors=(launch.tensors[0], mantissa, *launch.tensors[2:]))
    return launch, torch.ldexp(_as_tensor(factor, mantissa).expand_as(mantissa), exponent)


class RowLoss(torch.autograd.Function):
    """``forward`` computes the loss and both gradients, which are kept until ``backward``.

    It returns the loss, or ``(loss, stats)`` where the launch asks for statistics.

    The gradient buffer is handed out by the first backward and scaled in place, without a copy. Every backward gets a
    fresh product instead where the buffer may be seen again: where the graph is kept (``retain_graph=True``), and where
    hooks on saved tensors have it.
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
        dteacher = dteacher_factor = dstudent_factor = None
        if dual is not None and teacher is not None:
            # Before the student's launch, which may overwrite the student.
            if keeps_constants_out(teacher):
                dual, dteacher_factor = without_constants(dual)
            if dual.options["kd_weight"] == 0:
                dteacher = torch.zeros_like(teacher)
            else:
                dteacher = memory.empty_like(teacher)
                run(dual, teacher, (student,), dteacher)
        dstudent = None
        if ctx.needs_input_grad[0]:
            dstudent = student.detach() if inplace else memory.empty_like(student)
            if keeps_constants_out(student):
                launch, dstudent_factor = without_constants(launch)
        teachers = () if teacher is None else (teacher, *more_teachers)
        rows, stats = run(launch, student, teachers, dstudent)
        if dstudent_factor is not None:
            rows = rows * dstudent_factor
        if inplace and dstudent is not None:
            torch.autograd.graph.increment_version(student)
        factors = (_as_tensor(factor, rows) for factor in (dstudent_factor, dteacher_factor))
        ctx.save_for_backward(dstudent, dteacher, *factors)
        ctx.backend, ctx.shared = launch.backend, has_saved_tensor_hooks()
        loss = rows if per_row else rows.sum()
        if stats is None:
            return loss
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_derivative()
        dstudent, dteacher, *factors = ctx.saved_tensors
        shared = ctx.shared or torch.compiler.is_compiling() or graph_is_kept()
        grads = (
            scaled(grad, dloss, factor, ctx.backend, shared=shared)
            for grad, factor in zip((dstudent, dteacher), factors, strict=True)
        )
        return (*grads, None, None, None, None, None)


class SummedCall(NamedTuple):
    """A call of ``kdkernels::<pattern>_loss_cpu`` but for its tensors and its scale."""

    op: Any
    call: Tensor  # what all rows share, as <pattern>_call_cpu packs it
    inplace: bool
    gradient_size: float  # as of Launch


class SummedLoss(torch.autograd.Function):
    """As ``RowLoss``, where one op of the CPU makes the gradient's memory and sums the rows."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, summed: SummedCall, scale: float, operands: tuple[Any, ...]) -> Tensor:
        dstudent = student.detach() if summed.inplace else None
        factor = None
        if keeps_constants_out(student):
            scale, factor = _power_of_two(scale, summed.gradient_size)
        loss, gradient = summed.op(student, dstudent, summed.call, scale, True, *operands)
        if dstudent is not None:
            gradient = dstudent
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(gradient)
        ctx.factor, ctx.shared = factor, _hooks(False) is not None
        return loss if factor is None else loss * factor

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        shared = ctx.shared or graph_is_kept()
        # The common case in few steps: all of this is cold.
        if not shared and ctx.factor is None and not transforms.stands_for_others(dloss) and dloss.item() == 1:
            return gradient, None, None, None
        return scaled(gradient, dloss, ctx.factor, "cpu", shared=shared), None, None, None


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
            shape = (math.prod(leading[:cut]), math.prod(leading[cut:]))
            return [_view(t, shape) for t in tensors]
    return [t.reshape(1, math.prod(leading), t.shape[-1]) for t in tensors]


def _view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.view(*shape, tensor.shape[-1])


def _mergeable(tensor: Tensor, start: int, stop: int) -> bool:
    """True if dimensions ``start .. stop - 1`` collapse into one without a copy."""
    return all(
        tensor.shape[d] == 1
        or tensor.shape[d + 1] == 1
        or tensor.stride(d) == tensor.shape[d + 1] * tensor.stride(d + 1)
        for d in range(start, stop - 1)
    )


def scaled(
    grad: Optional[Tensor], dloss: Tensor, factor: Union[None, float, Tensor], backend: str, *, shared: bool
) -> Optional[Tensor]:
    """``grad * (dloss * factor)``, the product in the dtype of the sums and rounded once.

    ``dloss`` and ``factor`` are 0-d or hold one value per row. It is ``grad`` itself, scaled in place, unless that is
    ``shared`` with someone who may look at it later.
    """
    if grad is None:
        return None
    if dloss.dim() > 0:
        dloss = dloss.reshape(-1)
    if factor is not None:
        dloss = dloss * factor
    # A graph cannot write to what forward saved, and transforms see no kernel.
    if backend == "torch" or torch.compiler.is_compiling() or transforms.stands_for_others(dloss):
        if dloss.dim() > 0:
            dloss = dloss.reshape(*grad.shape[:-1], 1)
        return (grad.to(dloss.dtype) * dloss).to(grad.dtype)
    # The value of a number on the CPU costs less than a launch; elsewhere only the kernel looks at it.
    one = dloss.is_cpu and dloss.dim() == 0 and symbols.has_values(dloss) and dloss.item() == 1
    if shared:
        grad = memory.empty_like(grad).copy_(grad)
    if not one:
        ops.op("scale_grad", backend)(as_rows((grad,))[0], dloss)
    return grad


def refuse_second_derivative() -> None:
    """Raise where the backward that runs is to be differentiated itself (``create_graph=True``).

    What it hands out has no graph: a second derivative would silently leave out all that came through this loss.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused losses of kdkernels have no second derivative, and create_graph=True asks for one: forward "
            'leaves the gradient, and not its graph. backend="torch" can be differentiated again'
        )


def has_saved_tensor_hooks() -> bool:
    """True if hooks see the tensors that a Function saves here, and may keep them, or if torch does not tell."""
    return not torch.compiler.is_compiling() and _hooks(False) is not None


_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: ())
# True if the running backward keeps its graph, or if torch does not tell.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _power_of_two(scale: float, gradient_size: float) -> tuple[float, float]:
    """``scale`` in two factors: the one that leaves a gradient of the size that fp16 holds, and a power of two."""
    factor = abs(scale * gradient_size) / FP16_ROOM
    power = 2.0 ** math.floor(math.log2(factor)) if factor else 1.0
    return scale / power, power


def _as_tensor(factor: Any, like: Tensor) -> Any:
    return (
        factor if factor is None or isinstance(factor, Tensor) else symbols.as_tensor(factor, like.dtype, like.device)
    )
