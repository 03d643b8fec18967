"""The losses on hidden states: the logits are projected chunk by chunk and never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, overload

import torch
from torch import Tensor

from kdkernels import backends, checks, distributed, modules, symbols, transforms
from kdkernels.autograd import reduced
from kdkernels.capture import TeacherExpectation
from kdkernels.chunked import Call, Expectation, LinearLoss, LinearRows, execute, projects_columns, whole
from kdkernels.chunks import Rows
from kdkernels.launch import dense_launch, flat, topk_launch, uniform_launch, with_stats, without_teacher
from kdkernels.objective import LinearLKObjective, LinearObjective, LinearTopKObjective, takes
from kdkernels.reduction import num_rows
from kdkernels.stats import KDStats, TopKStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.options import LinearLKOptions, LinearOptions, LinearTopKOptions

Head = Union[Tensor, torch.nn.Module]


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_hidden: Optional[Union[Tensor, Sequence[Tensor]]] = None,
    teacher_weight: Optional[Union[Head, Sequence[Head]]] = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Union[Tensor, Sequence[Optional[Tensor]]]] = None,
    teacher_logits: Optional[Callable[[Rows], Any]] = None,
    teacher_expectation: Optional[TeacherExpectation] = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_hidden: Optional[Union[Tensor, Sequence[Tensor]]] = None,
    teacher_weight: Optional[Union[Head, Sequence[Head]]] = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Union[Tensor, Sequence[Optional[Tensor]]]] = None,
    teacher_logits: Optional[Callable[[Rows], Any]] = None,
    teacher_expectation: Optional[TeacherExpectation] = None,
    return_stats: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, KDStats]: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_hidden: Optional[Union[Tensor, Sequence[Tensor]]] = None,
    teacher_weight: Optional[Union[Head, Sequence[Head]]] = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Union[Tensor, Sequence[Optional[Tensor]]]] = None,
    teacher_logits: Optional[Callable[[Rows], Any]] = None,
    teacher_expectation: Optional[TeacherExpectation] = None,
    return_stats: bool,
    **options: Unpack[LinearOptions],
) -> Union[Tensor, tuple[Tensor, KDStats]]: ...
@takes(LinearObjective)
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_hidden: Optional[Union[Tensor, Sequence[Tensor]]] = None,
    teacher_weight: Optional[Union[Head, Sequence[Head]]] = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Union[Tensor, Sequence[Optional[Tensor]]]] = None,
    teacher_logits: Optional[Callable[[Rows], Any]] = None,
    teacher_expectation: Optional[TeacherExpectation] = None,
    **options: Any,
) -> Any:
    r"""``kd_loss`` of the logits ``hidden @ weight.T + bias`` of student and teacher, which are never stored whole.

    Rows go through the heads in chunks. In each the loss is computed and its gradient written over the student's
    logits, from where it is multiplied into the gradients of hidden states, head and bias. Gradients of inputs that do
    not require grad are not computed. The head's gradient is summed over the chunks in fp32.

    Args:
        student_hidden: ``(..., D)``, float32, bfloat16 or float16 (float64 on the CPU).
        student_weight: the head ``[V, D]``: a plain tensor, with everything that makes the logits in it; or the module
            that it is the weight of, such as a model's ``lm_head`` (an ``nn.Linear`` or a tied ``nn.Embedding``), whose
            bias then counts too; or that module with peft's LoRA on it, whose factors learn, or in ``modules_to_save``;
            or the whole model (transformers), whose factor and softcap of the logits then count too. A module that
            does more (other adapters, hooks, quantised weights) is an error: its weight alone would be another model. A
            sharded parameter is gathered first: FSDP2 does it in the forward of the module it shards, and elsewhere
            ``weight.full_tensor(grad_placements=[Partial("avg")])`` has the gradient that FSDP2 means, see
            docs/guide/hidden-states.md.
        teacher_hidden, teacher_weight: the same of the teacher, ``(..., D')`` and ``[V, D']``; or sequences of up to 4
            for a mixture, see ``teacher_weights``. They get no gradient, whether they require one or not: they are
            detached. A teacher's module that does more than multiply, such as a quantised one, is called on the hidden
            states of a chunk, in eager mode. Neither is given where ``kd_weight`` is the number 0: cross entropy and
            z-loss alone.
        labels: as in ``kd_loss``. Rows equal to ``ignore_index``, and rows of ``row_weight`` 0 unless ``return_stats``,
            are left out of the products. On a GPU the number of the others is waited for, once.
        student_bias, teacher_bias: ``[V]`` or None.
        teacher_logits: in place of the teacher's hidden states and head, a function called as ``teacher_logits(rows)``
            that returns logits ``[R, V]`` on any device (a sequence of them for a mixture). ``rows`` counts the
            flattened rows: a ``slice``, or an int64 tensor where rows are left out; it indexes a tensor ``[N, ...]``.
            With reduction "none" ``backward`` calls it again, and needs the same logits. Eager only.
        teacher_expectation: in place of the teacher's hidden states and head, what ``capture_expectation`` made of them
            with this very head of the student, which is frozen: it gets no gradient. For forward KL and soft cross
            entropy, with all options but the statistics, ``standardize`` and a softcap; the teacher's temperature must
            be that of the capture. Loss and gradient are exact, see docs/guide/hidden-states.md.
        chunk_bytes: of the logits of a chunk, student's and teachers' together; by default 96 MiB on a CPU and 512 MiB
            on a GPU, or half of its L2 cache where that holds enough rows. It bounds the memory, whatever N is, down
            to one row.
        logits_dtype: for products of 16-bit operands, their dtype asks for logits rounded to it, in chunks of twice as
            many rows. The gradient is a difference of two distributions, which then drowns in rounding where the
            teacher is near: see docs/guide/hidden-states.md. By default logits are float32.
        teacher_form: as in ``kd_loss``, for ``teacher_logits``; products are "logits".
        reduction: as in ``kd_loss``. The gradient of "none" is made in ``backward``, where each row's ``grad_output``
            is known: it repeats the products of the rows whose ``grad_output`` is not 0. Where the weights of the rows
            are known before, ``row_weight`` and "sum" do without.
        divergence, teacher_temperature, scale_by_t_squared, kd_weight, ce_weight, z_loss_weight: as in ``kd_loss``.
        temperature: as in ``kd_loss``; it gets no gradient.
        label_smoothing, ignore_index, row_weight, normalizer, teacher_weights, mixture: as in ``kd_loss``.
        student_softcap, teacher_softcap, standardize, teacher_lse, row_param, return_stats: as in ``kd_loss``.
        backend: as in ``kd_loss``.
        vocab_size: as in ``kd_loss``; columns from there on are not even projected.
        process_group: ranks of which each has some rows of the heads, and all have the same hidden states and labels,
            see docs/guide/devices.md. ``student_weight`` and its bias are this rank's rows, in the order of the ranks;
            the teacher's are the same rows, or all of them. The gradient of the hidden states is the whole, the same on
            all ranks: do not add it up again. That of the head is of this rank's rows.

    Under autocast the operands of the products are rounded to its dtype. Sums, losses and statistics are float32.
    Under ``torch.compile`` the loop is one op of the graph; backend "torch" makes all logits at once there.

    Returns:
        As ``kd_loss``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched; for what ``teacher_logits`` returns,
            when it does.

    Example:
        >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 100)
        >>> teacher_hidden, teacher_head = torch.randn(8, 24), torch.nn.Linear(24, 100)
        >>> linear_kd_loss(hidden, head, teacher_hidden, teacher_head, temperature=2.0).backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([8, 16]), torch.Size([100, 16]))
    """
    return dense(
        LinearObjective.of(options),
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        teacher_logits=teacher_logits,
        teacher_expectation=teacher_expectation,
    )


@takes(LinearLKObjective)
def linear_lk_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_hidden: Optional[Union[Tensor, Sequence[Tensor]]] = None,
    teacher_weight: Optional[Union[Head, Sequence[Head]]] = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Union[Tensor, Sequence[Optional[Tensor]]]] = None,
    teacher_logits: Optional[Callable[[Rows], Any]] = None,
    **options: Unpack[LinearLKOptions],
) -> Any:
    r"""``lk_loss`` of the logits ``hidden @ weight.T + bias``, which are never stored whole.

    A drafter with a part of the target's vocabulary takes the rows of the target's head that it has
    (``teacher_weight[columns]``), and for the true acceptance rate ``teacher_lse``.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias,
            teacher_logits: as in ``linear_kd_loss``.
        kind, eta, eps: as in ``lk_loss``.
        options: the other keyword arguments of ``linear_kd_loss``, but for ``divergence`` and ``row_param``.

    Returns:
        As ``linear_kd_loss``.

    Raises:
        TypeError, ValueError: as ``linear_kd_loss``.

    Example:
        >>> head = torch.eye(4, 2)
        >>> round(linear_lk_loss(torch.zeros(1, 2), head, torch.tensor([[2.0, 1]]), head).item(), 3)
        0.447
    """
    return dense(
        LinearLKObjective.of(options),
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        teacher_logits=teacher_logits,
        teacher_expectation=None,
    )


@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    tail_logprob: Optional[Tensor] = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearTopKOptions],
) -> Tensor: ...
@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    tail_logprob: Optional[Tensor] = None,
    return_stats: Literal[True],
    **options: Unpack[LinearTopKOptions],
) -> tuple[Tensor, TopKStats]: ...
@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    tail_logprob: Optional[Tensor] = None,
    return_stats: bool,
    **options: Unpack[LinearTopKOptions],
) -> Union[Tensor, tuple[Tensor, TopKStats]]: ...
@takes(LinearTopKObjective)
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Head,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    tail_logprob: Optional[Tensor] = None,
    **options: Any,
) -> Any:
    r"""``topk_kd_loss`` of the logits ``hidden @ weight.T + bias``, which are never stored whole.

    With ``tail="renormalize_both"`` the student is normalised within the K ids, so that only their K rows of the head
    are multiplied: ``N K D`` operations in place of ``N V D``, and a head gradient in these rows alone. Cross entropy,
    z-loss and statistics need all V logits, and with any of them all are projected.

    Args:
        student_hidden, student_weight, student_bias, reduction: as in ``linear_kd_loss``.
        teacher_ids, teacher_logprobs, tail_logprob, min_tail: as in ``topk_kd_loss``.
        labels: as in ``linear_kd_loss``.
        chunk_bytes: as in ``linear_kd_loss``, of the student's logits; of the gathered rows of the head where only
            these are multiplied.
        logits_dtype: as in ``linear_kd_loss``. The logits of K columns alone are float32 in any case.
        sparse_grad: give ``student_weight`` its gradient as a sparse COO tensor of the rows that have one, as
            ``torch.nn.Embedding(sparse=True)`` does, for ``torch.optim.SparseAdam`` or ``SGD``. Eager only, and only
            where only K columns are projected.
        tail, divergence, temperature, teacher_temperature, scale_by_t_squared, kd_weight: as in ``topk_kd_loss``.
        ce_weight, z_loss_weight, label_smoothing, ignore_index, row_weight, normalizer: as in ``topk_kd_loss``.
        vocab_size, student_softcap, row_param, return_stats, backend: as in ``topk_kd_loss``.
        process_group: as in ``linear_kd_loss``. Where K columns alone are projected, their K logits travel.

    Returns:
        As ``topk_kd_loss``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched.

    Example:
        >>> from kdkernels import capture_topk
        >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 100)
        >>> teacher = capture_topk(torch.randn(8, 100), 5)
        >>> linear_topk_kd_loss(hidden, head, *teacher[:2], tail_logprob=teacher.tail_logprob).backward()
        >>> hidden.grad.shape
        torch.Size([8, 16])
    """
    return topk(
        LinearTopKObjective.of(options),
        student_hidden,
        student_weight,
        teacher_ids,
        teacher_logprobs,
        labels,
        student_bias=student_bias,
        tail_logprob=tail_logprob,
    )


def dense(
    objective: LinearObjective,
    hidden: Any,
    weight: Any,
    teacher_hidden: Any,
    teacher_weight: Any,
    labels: Any,
    *,
    student_bias: Any,
    teacher_bias: Any,
    teacher_logits: Any,
    teacher_expectation: Any,
) -> Any:
    """``linear_kd_loss`` of an objective."""
    if checks.is_dtensor(hidden):
        arguments = {
            "student_hidden": hidden,
            "student_weight": weight,
            "teacher_hidden": teacher_hidden,
            "teacher_weight": teacher_weight,
            "labels": labels,
            "student_bias": student_bias,
            "teacher_bias": teacher_bias,
            "teacher_logits": teacher_logits,
        }
        acceptance = isinstance(objective, LinearLKObjective)
        arguments |= {} if acceptance else {"teacher_expectation": teacher_expectation}
        loss = linear_lk_loss if acceptance else linear_kd_loss
        return distributed.of_heads(loss, {**arguments, **objective.given()})
    objective, hidden, weight, student_bias = modules.student(objective, hidden, weight, student_bias)
    if objective.process_group is not None:
        from kdkernels.parallel.linear import linear_kd_loss as of_shards

        others = {"teacher_logits": teacher_logits, "teacher_expectation": teacher_expectation}
        teacher = teacher_hidden, teacher_weight, teacher_bias
        return of_shards(objective, (hidden, weight, student_bias), teacher, labels, others)
    if teacher_expectation is not None:
        checks.expectation_alone(objective, teacher_hidden, teacher_weight, teacher_bias, teacher_logits)
        return _of_expectation(objective, hidden, weight, teacher_expectation, labels, student_bias)
    head, bias, product_dtype, logits = as_student(objective, hidden, weight, student_bias)
    columns = checks.student_of(objective, logits)
    single = objective.teacher_weights is None and not isinstance(teacher_hidden, (list, tuple))
    called = None
    if teacher_logits is None:
        given = modules.teachers(objective, teacher_hidden, teacher_weight, teacher_bias)
        objective, teacher_hidden, teacher_weight, teacher_bias = given
        called = modules.called(teacher_hidden, teacher_weight, teacher_bias, logits.shape[:-1])
    alone = all(item is None for item in (teacher_hidden, teacher_weight, teacher_bias, teacher_logits))
    teachers: list[tuple[Any, Any, Any]] = []
    if alone:
        checks.without_teacher(objective, "teacher_hidden")
        count = 0
    elif called is not None:
        (teacher_logits, count), form = called, objective.teacher_form
        if form != "logits":
            raise ValueError(f"teacher_form must be 'logits' unless teacher_logits is given, got {form!r}")
    elif teacher_logits is None:
        teachers = teachers_of(teacher_hidden, teacher_weight, teacher_bias)
        for teacher in teachers:
            checks.head("teacher_", *teacher, product_dtype is not None)
            checks.teacher_head(*teacher[:2], logits, objective.vocab_size)
        count, form = len(teachers), objective.teacher_form
        if form != "logits":
            raise ValueError(f"teacher_form must be 'logits' unless teacher_logits is given, got {form!r}")
    else:
        checks.teacher_callable(teacher_logits, teacher_hidden, teacher_weight, teacher_bias)
        count = 1 if objective.teacher_weights is None else _count(objective.teacher_weights)
    weights = checks.mixture_weights(objective, count, logits, single=single)
    backend = backends.choose(
        objective.backend,
        logits,
        divergence=objective.resolved.name,
        cuda_lacks=backends.cuda.lacks_dense(objective, logits, (), mixed=weights is not None),
    )
    hiddens, heads, biases = zip(*teachers, strict=True) if teachers else ((), (), ())
    call = Call(
        dense_launch(objective, logits, labels, columns, backend, weights, checks.mixture_of(objective)),
        objective.chunk_bytes,
        product_dtype,
        objective.logits_dtype,
        tuple(flat(states.detach()) for states in hiddens),
        tuple(item.detach() for item in heads),
        tuple(None if item is None else item.detach() for item in biases),
        teacher_logits,
        count,
        objective.teacher_form == "probs",
    )
    tensors = [item for teacher in teachers for item in teacher]
    result = result_of(objective, call, hidden, head, bias, [*tensors, labels], KDStats)
    return without_teacher(result) if alone else result


def _of_expectation(
    objective: LinearObjective, hidden: Any, weight: Any, teacher: TeacherExpectation, labels: Any, student_bias: Any
) -> Any:
    """The loss of a uniform teacher, by the kernel, and of what is known of this one, see ``chunked.Expectation``."""
    head, bias, product_dtype, logits = as_student(objective, hidden, weight, student_bias)
    columns = checks.student_of(objective, logits)
    checks.frozen_head(head, bias)
    checks.expectation(teacher, objective.of_teacher, hidden, logits, bias)
    num = num_rows(logits)
    expectation = Expectation(
        flat(teacher.expectation.detach()),
        None if teacher.bias is None else teacher.bias.detach().reshape(num),
        teacher.entropy.detach().reshape(num) if objective.resolved.entropy_weight else None,
    )
    launch = uniform_launch(objective, logits, labels, columns)
    call = Call(launch, objective.chunk_bytes, product_dtype, objective.logits_dtype, expectation=expectation)
    frozen = head.detach(), None if bias is None else bias.detach()
    return result_of(objective, call, hidden, *frozen, [labels, *expectation], KDStats)


def topk(
    objective: LinearTopKObjective,
    hidden: Any,
    weight: Any,
    ids: Any,
    logprobs: Any,
    labels: Any,
    *,
    student_bias: Any,
    tail_logprob: Any,
) -> Any:
    """``linear_topk_kd_loss`` of an objective."""
    if checks.is_dtensor(hidden):
        tensors = {
            "student_hidden": hidden,
            "student_weight": weight,
            "teacher_ids": ids,
            "teacher_logprobs": logprobs,
            "labels": labels,
            "student_bias": student_bias,
            "tail_logprob": tail_logprob,
        }
        return distributed.of_heads(linear_topk_kd_loss, {**tensors, **objective.given()})
    objective, hidden, weight, student_bias = modules.student(objective, hidden, weight, student_bias)
    if objective.process_group is not None:
        from kdkernels.parallel.linear import linear_topk_kd_loss as of_shards

        return of_shards(objective, (hidden, weight, student_bias), ids, logprobs, labels, tail_logprob)
    head, bias, product_dtype, logits = as_student(objective, hidden, weight, student_bias)
    columns = checks.student_of(objective, logits)
    launch = topk_launch(objective, logits, (ids, logprobs), labels, tail_logprob, columns)
    checks.sparse_grad_allowed(objective.sparse_grad, projects_columns(launch))
    call = Call(launch, objective.chunk_bytes, product_dtype, objective.logits_dtype, sparse_grad=objective.sparse_grad)
    return result_of(objective, call, hidden, head, bias, [ids, logprobs, labels, tail_logprob], TopKStats)


def as_student(
    objective: Any, hidden: Any, weight: Any, bias: Any, side: str = "student_", *, least: int = 1
) -> tuple[Tensor, Optional[Tensor], Optional[torch.dtype], Tensor]:
    """The head's weight of ``least`` rows and bias, the dtype that autocast wants of products, and what stands for the
    logits."""
    product_dtype = autocast_dtype(hidden)
    head, bias = checks.head_tensors(side, weight, bias)
    checks.head(side, hidden, head, bias, product_dtype is not None, least=least)
    checks.logits_dtype(objective.logits_dtype, product_dtype or hidden.dtype)
    return head, bias, product_dtype, stand_in(hidden, head, product_dtype)


def autocast_dtype(hidden: Any) -> Optional[torch.dtype]:
    """The dtype that autocast, where it is on, wants of the operands of a product; it leaves fp64 alone."""
    if not isinstance(hidden, Tensor) or hidden.dtype == torch.float64 or hidden.is_meta:
        return None
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def stand_in(hidden: Tensor, weight: Tensor, product_dtype: Optional[torch.dtype]) -> Tensor:
    """A tensor of the shape, dtype and device of the logits and the memory of one row: what all checks need of them."""
    row = hidden.new_empty(weight.shape[0], dtype=product_dtype or hidden.dtype)
    return row.expand(*hidden.shape[:-1], -1)


def teachers_of(hidden: Any, weight: Any, bias: Any) -> list[tuple[Any, Any, Any]]:
    sides = {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}
    for name in ("teacher_hidden", "teacher_weight"):
        if sides[name] is None:
            raise TypeError(f"{name} is required unless teacher_logits is given")
    if not isinstance(hidden, (list, tuple)):
        return [(hidden, *checks.head_tensors("teacher_", weight, bias))]
    checks.several(hidden)
    if bias is None:
        bias = [None] * len(hidden)
    for name, value in (("teacher_weight", weight), ("teacher_bias", bias)):
        if not isinstance(value, (list, tuple)) or len(value) != len(hidden):
            raise ValueError(f"{name} must be a sequence of {len(hidden)} as teacher_hidden is")
    heads = (checks.head_tensors("teacher_", *head) for head in zip(weight, bias, strict=True))
    return [(states, *head) for states, head in zip(hidden, heads, strict=True)]


def _count(teacher_weights: Any) -> int:
    return teacher_weights.shape[-1] if isinstance(teacher_weights, Tensor) else len(teacher_weights)


def result_of(
    objective: Any,
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    others: Sequence[Optional[Tensor]],
    kind: Any,
) -> Any:
    """The result of a call whose ``others`` are the tensors beside the student's."""
    inputs = tuple(item for item in (hidden, weight, bias) if item is not None)
    given = (*inputs, *(item for item in (*others, *objective.tensors) if item is not None))
    checks.reverse_mode_only(call.launch.backend, *given)
    transformed = call.launch.backend == "torch" and is_transformed(given)
    needs_grad = torch.is_grad_enabled() and any(item.requires_grad for item in inputs)
    needs_grad = needs_grad and not symbols.traces_ops()  # as autograd.evaluate
    checks.linear_mode_allowed(call.teacher_logits is not None, call.sparse_grad, transformed)
    if call.launch.backend == "torch" and (transformed or torch.compiler.is_compiling()):
        # No graph and no transform holds the autograd within the loop.
        rows, stats = whole(call, hidden, weight, bias)
        loss = reduced(rows, objective, hidden)
    elif needs_grad and objective.reduction == "none":
        rows, stats = LinearRows.apply(flat(hidden), weight, bias, call)
        loss = reduced(rows, objective, hidden)
    elif needs_grad:
        loss, stats = LinearLoss.apply(flat(hidden), weight, bias, call)
    else:
        offset = None if bias is None else bias.detach()
        rows, stats = execute(call, flat(hidden.detach()), weight.detach(), offset, [False] * 3)[:2]
        loss = reduced(rows, objective, hidden)
    return with_stats(loss, stats, hidden, kind) if objective.return_stats else loss


def is_transformed(tensors: tuple[Tensor, ...]) -> bool:
    """True if ``torch.func`` or forward mode has a tensor of these, or a Function of theirs would be in it."""
    return not torch.compiler.is_compiling() and any(map(transforms.takes_part, tensors))
