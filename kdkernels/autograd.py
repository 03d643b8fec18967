"""One torch.autograd.Function for all row losses: the forward launch leaves the gradient, backward only scales it.

Log-probabilities of tokens have one of their own, whose backward makes the gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from kdkernels import memory, ops, reference, symbols, transforms
from kdkernels.launch import Launch, as_rows, flat, run, run_reference
from kdkernels.objective import RowOptions

# A gradient in fp16 holds 2^-24 to 65504. It is kept as large as leaves this much room above Launch.gradient_size.
FP16_ROOM = 2.0**8
# Of the fp32 copy of some rows, where nobody knows how large their gradient is; a CPU's stays in the caches.
PIECE_BYTES, GPU_PIECE_BYTES = 2**22, 2**28


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
    scale, size = launch.options["scale"], launch.gradient_size
    assert size is not None
    if torch.compiler.is_compiling():
        # The numbers may be symbols, of which no logarithm is known.
        scale, factor = FP16_ROOM / size, scale * size / FP16_ROOM
    else:
        scale, factor = _power_of_two(scale, size)
    launch = launch._replace(options={**launch.options, "scale": scale})
    weight = launch.rows.row_weight
    if weight is None:
        return launch, factor
    # A weight of 0 stays one: rows that are left out are not multiplied by anything.
    mantissa, exponent = torch.frexp(weight)
    launch = launch._replace(rows=launch.rows._replace(row_weight=mantissa))
    return launch, torch.ldexp(_as_tensor(factor, mantissa).expand_as(mantissa), exponent)


def run_with_gradient(
    launch: Launch, logits: Tensor, others: tuple[Tensor, ...], gradient: Tensor
) -> tuple[Tensor, Optional[Tensor], Union[None, float, Tensor]]:
    """Losses and statistics of rows, and what the gradient that is written lacks, as ``without_constants`` has it."""
    if not keeps_constants_out(logits):
        return *run(launch, logits, others, gradient), None
    if launch.gradient_size is None:
        return run_in_pieces(launch, logits, others, gradient)
    launch, factor = without_constants(launch)
    rows, stats = run(launch, logits, others, gradient)
    return rows * factor, stats, factor


def run_in_pieces(
    launch: Launch, logits: Tensor, others: tuple[Tensor, ...], gradient: Tensor
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    """As ``run_with_gradient`` of logits in fp16 whose gradient nobody knows the size of.

    It is made in fp32, of some rows at a time, and kept with a power of two of each row: the largest entry then stands
    just below fp16's largest number, so that whatever fits fp16 with the constants is there without them.
    """
    views = as_rows((logits, gradient, *others))
    found, of_stats, factors = [], [], []
    neighbours = launch.class_dim != -1
    for batch, length, rows in pieces(views[0], whole=neighbours):
        source, target, *rest = (view[batch, length] for view in views)
        wide = source.float()
        if neighbours:
            wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
        part = launch._replace(
            rows=launch.rows.chosen(rows), sparse_teacher=tuple(item[rows] for item in launch.sparse_teacher)
        )
        # A graph writes to nothing that it reads; in place a CPU has less to bring into its caches.
        in_place = launch.backend == "cpu" and not torch.compiler.is_compiling()
        made = wide if in_place else empty_gradient(wide, 1 if neighbours else -1)
        loss, stats = run(part, wide, tuple(rest), made)
        # Not vector_norm, which takes a CPU twenty times as long.
        largest = torch.maximum(made.amax(-1), -made.amin(-1))
        # An exponent that fp32 has the power of two of, and its inverse.
        exponent = torch.where(largest.isfinite(), torch.frexp(largest)[1] - 15, 0).clamp(min=-100)
        one = torch.ones_like(largest)
        target.copy_(made.mul_(torch.ldexp(one, -exponent)[..., None]))
        found.append(loss)
        of_stats.append(stats)
        factors.append(torch.ldexp(one, exponent).reshape(-1))
    stats = None if of_stats[0] is None else torch.cat(of_stats)  # type: ignore[arg-type]
    return torch.cat(found), stats, torch.cat(factors)


def empty_gradient(logits: Tensor, class_dim: int = -1) -> Tensor:
    """Memory for the gradient of logits ``(..., V)``, in which the classes stand where the logits' own do."""
    if class_dim == -1:
        return memory.empty_like(logits)
    return memory.empty_like(logits.movedim(-1, class_dim)).movedim(class_dim, -1)


def pieces(logits: Tensor, *, whole: bool = False) -> list[tuple[slice, slice, slice]]:
    """Parts of logits ``[B, L, V]`` in order: of B, of L, and of the rows that these are; one part if ``whole``."""
    everything = slice(None)
    if whole or torch.compiler.is_compiling() or not symbols.has_values(logits):
        return [(everything, everything, everything)]
    batch, length, width = logits.shape
    budget = PIECE_BYTES if logits.device.type == "cpu" else GPU_PIECE_BYTES
    count = max(budget // (4 * width), 1)
    if count >= length:
        step = count // max(length, 1)
        starts = range(0, max(batch, 1), step)
        return [(slice(b, b + step), everything, slice(b * length, (b + step) * length)) for b in starts]
    return [
        (
            slice(b, b + 1),
            slice(start, start + count),
            slice(b * length + start, b * length + min(start + count, length)),
        )
        for b in range(batch)
        for start in range(0, length, count)
    ]


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
        student_offsets: Optional[Tensor] = None,
    ) -> Any:
        dteacher: Optional[Tensor] = None
        dteacher_factor: Union[None, float, Tensor] = None
        dstudent_factor: Union[None, float, Tensor] = None
        if dual is not None and teacher is not None:
            # Before the student's launch, which may overwrite the student.
            if dual.options["kd_weight"] == 0:
                dteacher = torch.zeros_like(teacher)
            else:
                dteacher = empty_gradient(teacher, launch.class_dim)
                dteacher_factor = run_with_gradient(dual, teacher, (student,), dteacher)[2]
        dstudent = None
        teachers = () if teacher is None else (teacher, *more_teachers)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[7]:
            over = inplace and ctx.needs_input_grad[0]
            dstudent = student.detach() if over else empty_gradient(student, launch.class_dim)
            rows, stats, dstudent_factor = run_with_gradient(launch, student, teachers, dstudent)
        else:
            rows, stats = run(launch, student, teachers, None)
        if inplace and ctx.needs_input_grad[0]:
            torch.autograd.graph.increment_version(student)
        factors = (_as_tensor(factor, rows) for factor in (dstudent_factor, dteacher_factor))
        ctx.save_for_backward(dstudent, dteacher, *factors)
        ctx.backend, ctx.shared, ctx.class_dim = launch.backend, has_saved_tensor_hooks(), launch.class_dim
        ctx.num_offsets = 0 if student_offsets is None else len(student_offsets)
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
        dstudent, dteacher = (
            scaled(grad, dloss, factor, ctx.backend, shared=shared, class_dim=ctx.class_dim)
            for grad, factor in zip((dstudent, dteacher), factors, strict=True)
        )
        doffsets = None
        if ctx.needs_input_grad[7]:
            assert dstudent is not None
            # One more read of the gradient; of all rows in a fixed order.
            sums = torch.promote_types(dstudent.dtype, torch.float32)
            doffsets = dstudent.sum(list(range(dstudent.dim() - 1)), dtype=sums)[: ctx.num_offsets]
        return dstudent if ctx.needs_input_grad[0] else None, dteacher, None, None, None, None, None, doffsets


class SummedLoss(torch.autograd.Function):
    """As ``RowLoss``, where one op of the CPU makes the gradient's memory and sums the rows."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, op: Any, options: RowOptions, packed: Tensor, scale: float, operands: tuple[Any, ...]
    ) -> Tensor:
        dstudent = student.detach() if options.inplace else None  # type: ignore[attr-defined]
        factor = None
        if keeps_constants_out(student):
            scale, factor = _power_of_two(scale, options.gradient_size)  # type: ignore[arg-type]
        loss, gradient = op(student, dstudent, packed, scale, True, *operands)
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
            return gradient, None, None, None, None, None
        return scaled(gradient, dloss, ctx.factor, "cpu", shared=shared), None, None, None, None, None


# torch.autograd.Function.apply, in Python, looks for transforms of torch.func before it calls this: 20 us of cold code.
_apply_summed = super(torch.autograd.Function, SummedLoss).apply


def sums_in_one_op(launch: Launch, options: Any, student: Tensor, teachers: tuple[Tensor, ...]) -> bool:
    """True if an op of the CPU makes all of a loss: its rows are summed, and have no tensor but labels and a tail."""
    rows = launch.rows
    return (
        launch.backend == "cpu"
        and options.sums_alike
        and rows.row_weight is None
        and rows.mixture_weights is None
        and rows.teacher_lse_rows is None
        and rows.student_offsets is None
        and rows.teacher_offsets is None
        and rows.teacher_columns is None
        and student.dim() in (2, 3)
        and type(student) in _PLAIN_TENSORS
        and (len(teachers) == 0 or type(teachers[0]) in _PLAIN_TENSORS)
        and not torch.compiler.is_compiling()
        and not transforms.active()
        and (options.gradient_size is not None or student.dtype != torch.float16)
    )


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def summed(launch: Launch, options: Any, student: Tensor, teachers: tuple[Tensor, ...]) -> Tensor:
    """The loss of a launch for which ``sums_in_one_op`` holds."""
    pattern, get = launch.pattern.removesuffix("_fwd"), launch.options
    # Beside the width these depend on a call.
    key = get["vocab_size"], get.get("min_tail"), get.get("tail_rounding")
    packed = options.packed.get(key)
    if packed is None:
        alike = ops.packed(launch.pattern, {name: value for name, value in get.items() if name != "stats"})
        packed = options.packed[key] = ops.op(f"{pattern}_call", "cpu")(student.detach(), **alike)
    op, rows = ops.op(f"{pattern}_loss", "cpu"), launch.rows
    operands = (*teachers, rows.labels) if pattern == "dense" else (*launch.sparse_teacher, rows.labels, rows.tail_rows)
    if student.requires_grad and torch.is_grad_enabled():
        return _apply_summed(student, op, options, packed, get["scale"], operands)
    return op(student, None, packed, get["scale"], False, *operands)[0]


def evaluate(
    launch: Launch, options: Any, student: Tensor, teachers: tuple[Tensor, ...], dual: Optional[Launch] = None
) -> tuple[Tensor, Optional[Tensor]]:
    """The loss of a call, reduced as its options say, and its statistics."""
    if dual is None and launch.pattern in _SUMMED and sums_in_one_op(launch, options, student, teachers):
        return summed(launch, options, student, teachers), None
    per_row = options.reduction == "none"
    if launch.backend == "torch":
        # Autograd differentiates the reference, for the teachers too.
        loss, stats = run_reference(launch, flat(student), [flat(teacher) for teacher in teachers])
        return reduced(loss, options, student), stats
    # An exported program is its ops and no more: none of them could hand out what forward leaves for backward.
    offsets = launch.rows.student_offsets
    offsets = offsets if offsets is not None and offsets.requires_grad else None
    with_grad = torch.is_grad_enabled() and (student.requires_grad or dual is not None or offsets is not None)
    if offsets is not None:
        launch = launch._replace(rows=launch.rows._replace(student_offsets=offsets.detach()))
    if with_grad and not symbols.traces_ops():
        teacher = teachers[0] if teachers else None
        result = RowLoss.apply(student, teacher, teachers[1:], launch, dual, per_row, options.inplace, offsets)
        loss, stats = result if isinstance(result, tuple) else (result, None)
    else:
        loss, stats = run(launch, student.detach(), tuple(item.detach() for item in teachers), None)
        loss = loss if per_row else loss.sum()
    return (loss.reshape(student.shape[:-1]) if per_row else loss), stats


_SUMMED = ("dense_fwd", "topk_fwd")


def reduced(rows: Tensor, options: RowOptions, student: Tensor) -> Tensor:
    """Losses of rows ``[N]`` as ``reduction`` wants them; what divides them is in them."""
    return rows.reshape(student.shape[:-1]) if options.reduction == "none" else rows.sum()


class TokenCall(NamedTuple):
    """A call of ``token_fwd`` and ``token_bwd`` but for the logits and ids."""

    backend: str
    temperature_rows: Optional[Tensor]  # [N]
    options: dict[str, Any]  # keyword arguments

    def reference_options(self) -> dict[str, Any]:
        """The options of ``reference.token_rows``."""
        rows = self.temperature_rows
        return self.options if rows is None else {**self.options, "temperature": rows}

    def gradient_options(self) -> dict[str, Any]:
        """The options of ``reference.token_gradient``."""
        asked_for = ("entropy", "tail_mass", "stats")
        return {name: value for name, value in self.reference_options().items() if name not in asked_for}


class TokenValues(torch.autograd.Function):
    """Log-probabilities ``[N, K]``, entropy ``[N]`` or ``[0]``, and lse and statistics, which pass no gradient.

    Kept for backward are the logits themselves, and of a row its ids, its norm and its entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature_rows: Optional[Tensor],
        backend: str,
        options: dict[str, Any],
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call = TokenCall(backend, temperature_rows, options)
        logprobs, entropy, lse, _, norm, stats = _run_token_fwd(call, logits, ids)
        ctx.save_for_backward(logits, ids, norm, entropy if options["entropy"] else None, temperature_rows)
        ctx.backend, ctx.options = backend, options
        ctx.inplace, ctx.shared = inplace, has_saved_tensor_hooks()
        if options["entropy"]:
            ctx.mark_non_differentiable(lse, stats)
        else:
            ctx.mark_non_differentiable(lse, stats, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, lse, stats

    @staticmethod
    def backward(ctx: Any, dlogprobs: Optional[Tensor], dentropy: Optional[Tensor], *_: Any) -> tuple[Any, ...]:
        refuse_second_derivative()
        nothing = (None,) * 5
        if dlogprobs is None and dentropy is None:
            return None, *nothing
        logits, ids, norm, entropy, temperature_rows = ctx.saved_tensors
        if not ctx.options["entropy"]:
            # A graph hands in a gradient of size 0 for what is not there.
            dentropy = None
        call = TokenCall(ctx.backend, temperature_rows, {**ctx.options, "entropy": dentropy is not None})
        entropy = entropy if dentropy is not None else None
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(ids, dtype=norm.dtype)
        given = (dlogprobs,) if dentropy is None else (dlogprobs, dentropy)
        if not torch.compiler.is_compiling() and any(map(transforms.stands_for_others, given)):
            # A batch of gradients: transforms see no kernel.
            options = call.gradient_options()
            grad = reference.token_gradient(flat(logits), ids, norm, entropy, dlogprobs, dentropy, **options)
            return grad.reshape(logits.shape), *nothing
        # Whoever may look at the logits again finds them as they were.
        over = ctx.inplace and not ctx.shared and not graph_is_kept()
        grad = logits.detach() if over else memory.empty_like(logits)
        rows, destination = as_rows((logits.detach(), grad))
        dentropy = None if dentropy is None else dentropy.contiguous()
        operands = (rows, ids, norm, entropy, dlogprobs.contiguous(), dentropy, destination, temperature_rows)
        ops.call("token_bwd", call.backend, operands, call.options)
        if over:
            torch.autograd.graph.increment_version(logits)
        return grad, *nothing


def token_values(call: TokenCall, logits: Tensor, ids: Tensor, *, inplace: bool = False) -> reference.TokenRows:
    """The results of rows, those that were asked for."""
    options = call.options
    if call.backend == "torch":
        return reference.token_rows(flat(logits), ids, **call.reference_options())
    tail = None
    if torch.is_grad_enabled() and logits.requires_grad and not symbols.traces_ops():
        operands = (logits, ids, call.temperature_rows, call.backend, options, inplace)
        logprobs, entropy, lse, stats = TokenValues.apply(*operands)
    else:
        logprobs, entropy, lse, tail, _, stats = _run_token_fwd(call, logits.detach(), ids)
    return reference.TokenRows(
        logprobs,
        entropy if options["entropy"] else None,
        lse,
        tail if options["tail_mass"] else None,
        stats if options["stats"] else None,
    )


def _run_token_fwd(call: TokenCall, logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    operands = (as_rows((logits,))[0], ids, call.temperature_rows)
    return ops.call("token_fwd", call.backend, operands, call.options)


def scaled(
    grad: Optional[Tensor],
    dloss: Tensor,
    factor: Union[None, float, Tensor],
    backend: str,
    *,
    shared: bool,
    class_dim: int = -1,
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
        grad = empty_gradient(grad, class_dim).copy_(grad)
    if not one and class_dim != -1:
        if dloss.dim() > 0:
            # Of neighbours each has a factor of its own.
            return grad.copy_(grad * dloss.reshape(*grad.shape[:-1], 1))
        ops.op("scale_grad", backend)(as_rows((grad.movedim(-1, class_dim),))[0], dloss)
    elif not one:
        ops.op("scale_grad", backend)(as_rows((grad,))[0], dloss)
    return grad


def refuse_second_derivative(sharded: bool = False) -> None:
    """Raise where the backward that runs is to be differentiated itself (``create_graph=True``).

    What it hands out has no graph: a second derivative would silently leave out all that came through this loss.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if sharded:
            raise RuntimeError(
                "a loss of a sharded vocabulary has no second derivative, and create_graph=True asks for one"
            )
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
