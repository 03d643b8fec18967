"""The loop of the linear losses: project a chunk of rows, run the objective in place over it, multiply back.

The gradients of a reduced loss are complete when ``forward`` ends; ``backward`` scales them. ``backward`` makes the
gradients of the rows' losses, by the same loop. The loop is one op, ``kdkernels::linear_dense_fwd`` or
``kdkernels::linear_topk_fwd``, so that no compiler has to see into it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import checks, ops, transforms
from kdkernels.autograd import graph_is_kept, has_saved_tensor_hooks, refuse_second_derivative, scaled
from kdkernels.chunks import Products, Rows, chunk_rows, chunks, kept_rows
from kdkernels.heads import Fp16Range, Head, HeadGrad, Scratch, sum_dtype
from kdkernels.launch import Launch, RowTensors, flat, run, run_reference
from kdkernels.reference.topk import distinct, out_of_range

if TYPE_CHECKING:
    from kdkernels.parallel.shards import Shards

TeacherChunks = Callable[[Rows], Any]


class Expectation(NamedTuple):
    """A teacher of which the expectations under p of a frozen head ``[V, D]`` are known, and no probability.

    The kernel is given a uniform teacher u. Cross entropies are linear in the teacher, so that those of p and u differ
    by a product of hidden states and a vector of D numbers::

        KL(p || q) = KL(u || q) + log V - H(p) + (h (E_u[w] - E_p[w]) + E_u[b] - E_p[b]) / T
    """

    weight: Tensor  # [N, D]
    bias: Optional[Tensor]  # [N]
    entropy: Optional[Tensor]  # [N]; None where the divergence is the cross entropy

    def chosen(self, rows: Rows) -> Expectation:
        bias, entropy = (None if item is None else item[rows] for item in (self.bias, self.entropy))
        return Expectation(self.weight[rows], bias, entropy)

    def rest(self, launch: Launch, hidden: Tensor, mean: tuple[Tensor, Optional[Tensor]]) -> tuple[Tensor, Tensor]:
        """The rest of a uniform teacher's loss ``[R]``, and its gradient ``[R, D]``, with the weights of the rows.

        ``mean`` is that of the head's rows and bias.
        """
        get, rows = launch.options, launch.rows
        temperature = get["temperature"] if rows.student_temperature_rows is None else rows.student_temperature_rows
        sums = mean[0].dtype
        gap = mean[0] - self.weight.to(sums)
        loss = (hidden.to(sums) * gap).sum(-1)
        if self.bias is not None and mean[1] is not None:
            loss = loss + (mean[1] - self.bias.to(sums))
        loss = loss / temperature + math.log(get["vocab_size"])
        if self.entropy is not None:
            loss = loss - self.entropy.to(sums)
        counted = None if rows.labels is None else rows.labels != get["ignore_index"]
        weights = [item for item in (rows.row_weight, rows.kd_weight_rows) if item is not None]
        for weight in weights:
            counted = weight != 0 if counted is None else counted & (weight != 0)
        if counted is not None:
            # Nothing of the other rows is looked at, be it NaN.
            loss, gap = torch.where(counted, loss, 0.0), torch.where(counted[:, None], gap, 0.0)
        factor = get["scale"] * get["kd_weight"] * (temperature**2 if get["scale_by_t_squared"] else 1.0)
        factor = loss.new_ones(()) * factor
        for weight in weights:
            factor = factor * weight
        return loss * factor, gap * (factor / temperature).unsqueeze(-1)


class Call(NamedTuple):
    """A linear loss but for the student's hidden states ``[N, D]`` and head."""

    launch: Launch  # of all N rows
    chunk_bytes: Optional[int]
    product_dtype: Optional[torch.dtype]  # None: each operand's own
    logits_dtype: Optional[torch.dtype]  # None: at least fp32
    teacher_hidden: tuple[Tensor, ...] = ()
    teacher_weight: tuple[Tensor, ...] = ()
    teacher_bias: tuple[Optional[Tensor], ...] = ()
    teacher_logits: Optional[TeacherChunks] = None
    num_teachers: int = 1  # that teacher_logits returns
    teacher_probs: bool = False  # it returns rows that add up to 1
    sparse_grad: bool = False
    expectation: Optional[Expectation] = None  # beside a launch whose sparse teacher is uniform
    shards: Optional[Shards] = None  # of the vocabulary: heads, and logits, are this rank's columns

    def dtypes(self, hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Of the products of these hidden states with their head, and of the logits that they make."""
        return product_dtypes(hidden, self.product_dtype, self.logits_dtype)


def product_dtypes(
    hidden: Tensor, product_dtype: Optional[torch.dtype], logits_dtype: Optional[torch.dtype]
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the products of hidden states with their head, and of the logits that they make."""
    product = product_dtype or hidden.dtype
    if product.itemsize > 2:
        return product, product
    # Of another dtype of 16 bits than was asked for are a teacher's: rounded, as was asked, to its own.
    rounds = logits_dtype is not None and logits_dtype.itemsize == 2
    return product, product if rounds else torch.float32


class Result(NamedTuple):
    """Weighted losses ``[N]``, statistics ``[N, S]`` and gradients; one that is not needed is empty.

    Gradients in fp16 wait for a factor: that of hidden states is in fp32, of which there is little; those of head and
    bias are as large as fp16 allows, and are to be multiplied by ``factors``.
    """

    loss: Tensor
    stats: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
    factors: Tensor  # [2]
    grad_rows: Optional[Tensor] = None  # the rows of the head that dweight holds; None: all


class LinearLoss(torch.autograd.Function):
    """``forward`` returns ``(loss, stats)``, the loss summed; ``backward`` is that of ``autograd.RowLoss``.

    Plain PyTorch can be differentiated again: backward then makes the whole loss once more, with its graph.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], call: Call) -> tuple[Tensor, Tensor]:
        needs = list(ctx.needs_input_grad[:3])
        result = execute(call, hidden, weight, bias, needs)
        grads = (result.dhidden, result.dweight, result.dbias)
        again = call.launch.backend == "torch" and not call.sparse_grad and call.shards is None
        ctx.save_for_backward(
            *(grad if need else None for grad, need in zip(grads, needs, strict=True)),
            result.factors,
            result.grad_rows,
            *((hidden, weight, bias) if again else (None,) * 3),
        )
        ctx.mark_non_differentiable(result.stats)
        ctx.call, ctx.sparse_grad, ctx.sharded = call if again else None, call.sparse_grad, call.shards is not None
        ctx.backend, ctx.head_shape = call.launch.backend, weight.shape
        ctx.dtypes = tuple(None if item is None else item.dtype for item in (hidden, weight, bias))
        ctx.shared = has_saved_tensor_hooks()
        return result.loss.sum(), result.stats

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.call is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*_differentiable(ctx.call, dloss, ctx.saved_tensors[-3:], ctx.needs_input_grad), None)
        _refuse_second_derivative(ctx.sparse_grad, ctx.sharded)
        dhidden, dweight, dbias, factors, grad_rows = ctx.saved_tensors[:5]
        shared = ctx.shared or torch.compiler.is_compiling() or graph_is_kept()
        of_weight, of_bias = (
            factor if dtype == torch.float16 else None
            for factor, dtype in zip(factors.unbind(), ctx.dtypes[1:], strict=True)
        )
        dhidden, dweight, dbias = (
            scaled(grad, dloss, factor, ctx.backend, shared=shared)
            for grad, factor in ((dhidden, None), (dweight, of_weight), (dbias, of_bias))
        )
        if dhidden is not None:
            dhidden = dhidden.to(ctx.dtypes[0])
        return dhidden, _head_grad(dweight, grad_rows, ctx.head_shape), dbias, None


class LinearRows(torch.autograd.Function):
    """``forward`` returns ``(losses, stats)`` of rows ``[N]`` and keeps what it was given.

    ``backward`` repeats the products of the rows that have a gradient, with ``grad_output`` as a weight of the rows.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], call: Call) -> tuple[Tensor, Tensor]:
        loss, stats = execute(call, hidden, weight, bias, [False] * 3)[:2]
        # Autograd sees it when one of them is overwritten before backward, and hooks may move them.
        ctx.call, tensors = _apart(call)
        ctx.save_for_backward(hidden, weight, bias, *tensors)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Any, ...]:
        hidden, weight, bias, *tensors = ctx.saved_tensors
        call, needs = _joined(ctx.call, tensors), list(ctx.needs_input_grad[:3])
        if call.shards is not None:
            checks.one_gradient(dloss)
        if not torch.compiler.is_compiling():
            again = torch.is_grad_enabled()
            if not again or call.launch.backend != "torch" or call.sparse_grad or call.shards is not None:
                _refuse_second_derivative(call.sparse_grad, call.shards is not None)
            if again or transforms.stands_for_others(dloss):
                # Neither a graph nor a batch of gradients goes through the loop.
                return (*_differentiable(call, dloss, (hidden, weight, bias), needs), None)
        launch = call.launch
        given = launch.rows.row_weight
        rows = launch.rows._replace(row_weight=dloss if given is None else given * dloss)
        launch = launch._replace(rows=rows, options={**launch.options, "stats": False})
        result = execute(call._replace(launch=launch), hidden, weight, bias, needs)
        dhidden, dweight, dbias = (
            grad if need else None
            for grad, need in zip((result.dhidden, result.dweight, result.dbias), needs, strict=True)
        )
        if dhidden is not None:
            dhidden = dhidden.to(hidden.dtype)
        shared = torch.compiler.is_compiling()
        of_weight, of_bias = result.factors.unbind()
        if weight.dtype == torch.float16:
            dweight = scaled(dweight, of_weight, None, launch.backend, shared=shared)
        if bias is not None and bias.dtype == torch.float16:
            dbias = scaled(dbias, of_bias, None, launch.backend, shared=shared)
        return dhidden, _head_grad(dweight, result.grad_rows, weight.shape), dbias, None


def _apart(call: Call) -> tuple[Call, list[Optional[Tensor]]]:
    """A call without its tensors, and these."""
    launch, teachers = call.launch, (call.teacher_hidden, call.teacher_weight, call.teacher_bias)
    tensors = [*launch.rows, *launch.sparse_teacher]
    for teacher in teachers:
        tensors.extend(teacher)
    if call.expectation is not None:
        tensors.extend(call.expectation)
    bare = launch._replace(rows=RowTensors(), sparse_teacher=())
    return call._replace(launch=bare, teacher_hidden=(), teacher_weight=(), teacher_bias=(), expectation=None), tensors


def _joined(call: Call, tensors: Sequence[Any]) -> Call:
    """The call that ``_apart`` took apart."""
    count = len(RowTensors._fields)
    rows, rest = RowTensors(*tensors[:count]), tuple(tensors[count:])
    if call.launch.pattern == "topk_fwd":
        expectation = Expectation(*rest[2:]) if len(rest) > 2 else None
        return call._replace(launch=call.launch._replace(rows=rows, sparse_teacher=rest[:2]), expectation=expectation)
    count = len(rest) // 3
    return call._replace(
        launch=call.launch._replace(rows=rows),
        teacher_hidden=rest[:count],
        teacher_weight=rest[count : 2 * count],
        teacher_bias=rest[2 * count :],
    )


def _refuse_second_derivative(sparse_grad: bool, sharded: bool) -> None:
    if sparse_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "sparse_grad=True has no second derivative, and create_graph=True asks for one; leave it out"
        )
    refuse_second_derivative(sharded)


def _head_grad(dweight: Optional[Tensor], grad_rows: Optional[Tensor], shape: torch.Size) -> Optional[Tensor]:
    """The head's gradient, sparse where ``grad_rows`` are the rows that it holds."""
    if grad_rows is None or dweight is None:
        return dweight
    # Sorted and unique by construction.
    return torch.sparse_coo_tensor(grad_rows[None], dweight, shape, check_invariants=False, is_coalesced=True)


def _differentiable(
    call: Call, dloss: Tensor, inputs: Sequence[Optional[Tensor]], needs: Sequence[bool]
) -> list[Optional[Tensor]]:
    """The gradients of hidden states, head and bias in plain PyTorch; with their graph where backward is to have one.

    ``dloss`` is that of the sum of the rows, or one per row.
    """
    hidden, weight, bias = inputs
    assert hidden is not None and weight is not None
    kept = kept_rows(call.launch)
    rows: Rows = slice(0, len(hidden)) if kept is None else kept
    part = call._replace(launch=of_rows(call.launch, rows))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        loss, _ = whole(part, hidden[rows], weight, bias, rows)
    wanted = [item for item, need in zip(inputs, needs, strict=False) if need and item is not None]
    dloss = dloss.expand(len(hidden))[rows]
    found = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=again, allow_unused=True))
    return [next(found) if need and item is not None else None for item, need in zip(inputs, needs, strict=False)]


def whole(
    call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], rows: Optional[Rows] = None
) -> tuple[Tensor, Optional[Tensor]]:
    """Losses and statistics of hidden states ``(..., D)`` in plain PyTorch, of all logits at once: autograd sees all.

    ``rows`` are those that the hidden states are among the rows of the teachers.
    """
    with no_autocast(hidden):
        teachers = [
            _logits(call, states if rows is None else states[rows], head, offset).detach()
            for states, head, offset in zip(call.teacher_hidden, call.teacher_weight, call.teacher_bias, strict=True)
        ]
        logits = _logits(call, flat(hidden), weight, bias)
        if call.teacher_logits is not None:
            asked = slice(0, len(logits)) if rows is None else rows
            teachers = teacher_chunk(call, call.launch, asked, len(logits), logits.device)
        if call.launch.pattern == "dense_fwd" and len(teachers) == 0:
            teachers = [logits.detach()]
        loss, stats = run_reference(call.launch, logits, teachers)
        if call.expectation is not None and call.launch.options["kd_weight"]:
            part = call.expectation if rows is None else call.expectation.chosen(rows)
            loss = loss + part.rest(call.launch, *_operands_and_mean(call, flat(hidden), weight, bias))[0]
        return loss, stats


def _operands_and_mean(
    call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> tuple[Tensor, tuple[Tensor, Optional[Tensor]]]:
    """The hidden states as products know them, and the mean of the head's rows and bias."""
    product, columns = call.dtypes(hidden)[0], call.launch.options["vocab_size"]
    sums = sum_dtype(product)
    mean = weight[:columns].to(product).to(sums).mean(0)
    return hidden.to(product), (mean, None if bias is None else bias[:columns].to(product).to(sums).mean())


def _logits(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return logits_of_whole(*call.dtypes(hidden), hidden, weight, bias)


def logits_of_whole(
    product: torch.dtype, dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """Of operands rounded to ``product``; the sums are fp32, and so are the logits unless ``dtype`` has 16 bits."""

    def operand(item: Tensor) -> Tensor:
        return item.to(product).to(sum_dtype(product))

    offset = None if bias is None else operand(bias)
    return torch.nn.functional.linear(operand(hidden), operand(weight), offset).to(dtype)


def execute(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], needs: list[bool]) -> Result:
    """Run the loop, in its op unless that cannot be: with a function, a sparse result, or autograd in the loop."""
    launch = call.launch
    if call.teacher_logits is not None or call.sparse_grad or call.shards is not None or launch.backend == "torch":
        return _run(call, hidden, weight, bias, needs)
    teachers: tuple[Any, ...] = (*launch.sparse_teacher, *(call.expectation or (None,) * 3))
    if launch.pattern == "dense_fwd":
        teachers = (call.teacher_hidden, call.teacher_weight, call.teacher_bias)
    options = {
        "backend": launch.backend,
        "chunk_bytes": call.chunk_bytes,
        "product_dtype": call.product_dtype,
        "logits_dtype": call.logits_dtype,
        "needs": needs,
        **launch.options,
    }
    return Result(*ops.call_linear(launch.pattern, (hidden, weight, bias, *teachers, *launch.operands()), options))


def projects_columns(launch: Launch) -> bool:
    """True if the objective sees the K columns of the teacher only."""
    options = launch.options
    every_column = options["ce_weight"] or options["z_loss_weight"] or options["stats"]
    return options.get("tail") == "renormalize_both" and not every_column


def _run(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], needs: Sequence[bool]) -> Result:
    loop = _columns_loop if projects_columns(call.launch) else _logits_loop
    if call.shards is not None:
        from kdkernels.parallel.linear import columns_loop, logits_loop

        loop = columns_loop if loop is _columns_loop else logits_loop
    # Operands are rounded to the autocast dtype by the loop; autocast itself would round sums too.
    with torch.no_grad(), no_autocast(hidden):
        loss, stats, dhidden, dweight, dbias, *rest, grad_rows = loop(call, hidden, weight, bias, needs)
        # The buffers of the loop are gone: the rounding of the sums below needs memory of its own.
        one = loss.new_ones(())
        grads = [
            (hidden.new_empty(0), one) if grad is None else grad.finish(by)
            for grad, by in zip((dweight, dbias), rest, strict=True)
        ]
        return Result(
            loss,
            stats,
            hidden.new_empty(0) if dhidden is None else dhidden,
            grads[0][0],
            grads[1][0],
            torch.stack([factor.to(loss.dtype) for _, factor in grads]),
            grad_rows,
        )


class Sums(NamedTuple):
    """A ``Result`` before its sums are rounded."""

    loss: Tensor
    stats: Tensor
    dhidden: Optional[Tensor]
    dweight: Optional[HeadGrad]
    dbias: Optional[HeadGrad]
    # The factors that the sums of dweight and dbias still lack.
    of_weight: Optional[Tensor] = None
    of_bias: Optional[Tensor] = None
    grad_rows: Optional[Tensor] = None


def _logits_loop(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], needs: Sequence[bool]) -> Sums:
    launch, columns, device = call.launch, call.launch.options["vocab_size"], hidden.device
    (dtype, logits_dtype), scratch = call.dtypes(hidden), Scratch(hidden)
    head = Head(weight, bias, columns=columns, dtype=dtype, logits_dtype=logits_dtype, scratch=scratch)
    teachers = teacher_heads(call, scratch, columns)
    expectation = call.expectation if launch.options["kd_weight"] else None
    mean = None if expectation is None else head.mean()
    # A product of 16-bit matrices may read what lies between rows.
    inputs = hidden.to(dtype).contiguous()
    loss, stats = outputs(hidden, launch)
    dhidden = zeros_for_gradient(hidden) if needs[0] else None
    dweight = HeadGrad(weight, head.blocks) if needs[1] else None
    dbias = HeadGrad(bias, head.blocks) if needs[2] and bias is not None else None
    fp16_range, launch = fp16_range_of(launch, loss, head) if dtype == torch.float16 and any(needs) else (None, launch)

    row_bytes = head.row_bytes(columns) + sum(columns * teacher.logits_dtype.itemsize for teacher, _ in teachers)
    products = Products.of(columns, hidden, dtype, [states for _, states in teachers], needs)
    for rows, count in chunks(launch, len(hidden), chunk_rows(call.chunk_bytes, device, row_bytes, products)):
        h, part = inputs[rows], of_rows(launch, rows)
        logits = scratch.logits("student logits", count, columns, logits_dtype)
        head.project(h, logits)
        targets = []
        for k, (teacher, states) in enumerate(teachers):
            targets.append(scratch.logits(f"teacher logits {k}", count, columns, teacher.logits_dtype))
            teacher.project(states[rows], targets[k])
        if call.teacher_logits is not None:
            targets = teacher_chunk(call, part, rows, count, device)
        if launch.pattern == "dense_fwd" and not targets:
            # Of no weight, and read where the student is.
            targets = [logits]
        losses, stats[rows] = run_in_place(part, logits, targets, any(needs))
        added = None
        if expectation is not None and mean is not None:
            more, added = expectation.chosen(rows).rest(part, h, mean)
            losses = losses + more
        loss[rows] = losses
        if any(needs):
            dh = head.backward(
                logits,
                h,
                wants_dhidden=needs[0],
                dweight=dweight,
                dbias=dbias,
                fp16_range=fp16_range,
                with_residual=added is not None,
            )
            if dhidden is not None and dh is not None:
                # Before it is rounded: both are as large as the head, and near a teacher their sum is small.
                dhidden[rows] = (dh if added is None else dh + added).to(dhidden.dtype)
    if fp16_range is None:
        return Sums(loss, stats, dhidden, dweight, dbias)
    rest = fp16_range.sums.reciprocal()
    if fp16_range.in_chunk:
        loss *= rest
    return Sums(loss, stats, dhidden, dweight, dbias, rest, rest if fp16_range.in_chunk else None)


def teacher_chunk(call: Call, launch: Launch, rows: Rows, count: int, device: torch.device) -> list[Tensor]:
    """The logits that ``teacher_logits`` gives for ``count`` rows, whose launch this is."""
    assert call.teacher_logits is not None
    options, labels, weight = launch.options, launch.rows.labels, launch.rows.row_weight
    columns = options["vocab_size"]
    targets = checks.teacher_chunks(call.teacher_logits(rows), count, columns, call.num_teachers, device)
    if options["teacher_form"] == "probs" and options["kd_weight"]:
        counted = None if labels is None else labels != options["ignore_index"]
        if weight is not None:
            counted = weight != 0 if counted is None else counted & (weight != 0)
        for target in targets:
            form = "probs" if call.teacher_probs else "unnormalized_probs"
            checks.teacher_probs("teacher_logits(rows)", target, columns, counted, form)
    return targets


def fp16_range_of(launch: Launch, loss: Tensor, head: Head) -> tuple[Optional[Fp16Range], Launch]:
    """For a gradient of about the size of the constants of the loss; with the launch that makes it."""
    in_chunk = head.logits_dtype == torch.float16
    if head.way == "widened" and not in_chunk:
        return None, launch
    get, weight = launch.options, launch.rows.row_weight
    tempered = get["temperature"] if get["scale_by_t_squared"] else 1 / get["temperature"]
    terms = max(get["kd_weight"] * tempered, get["ce_weight"], get["z_loss_weight"])
    power = 2.0 ** min(max(8 - math.frexp(get["scale"] * terms)[1], -60), 60)
    sums = loss.new_tensor(power)
    of_terms = launch.rows.weights_of_terms()
    if weight is None and of_terms:
        weight = torch.ones_like(loss)
    if weight is not None:
        # Their size is known to the device alone.
        size = torch.linalg.vector_norm(weight, torch.inf)
        if of_terms:
            size = size * torch.stack([torch.linalg.vector_norm(item, torch.inf) for item in of_terms]).amax()
        of_weight = torch.ldexp(torch.ones_like(size), -torch.frexp(size)[1].clamp(-60, 60))
        sums, weight = sums * of_weight, weight * of_weight
    if in_chunk:
        rows = launch.rows._replace(row_weight=weight)
        launch = launch._replace(rows=rows, options={**get, "scale": get["scale"] * power})
    return Fp16Range(sums, in_chunk), launch


def zeros_for_gradient(hidden: Tensor) -> Tensor:
    """In fp32 where the gradient would underflow in fp16 before its loss scale comes."""
    return torch.zeros_like(hidden, dtype=torch.float32 if hidden.dtype == torch.float16 else None)


def _columns_loop(call: Call, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], needs: Sequence[bool]) -> Sums:
    """The loop for ``tail="renormalize_both"``: of the head, the K rows of the teacher's ids are gathered, no more.

    Everything is bound by reading those rows, so that products and sums are fp32 throughout, of rounded operands.
    """
    columns, device = call.launch.options["vocab_size"], hidden.device
    dtype, scratch = call.product_dtype or hidden.dtype, Scratch(hidden)
    sums = sum_dtype(dtype)
    ids, launch = positions(call.launch, columns)
    num_ids, width = ids.shape[1], hidden.shape[1]
    slots, grad_rows = ids, None
    if call.sparse_grad:
        grad_rows, slots = torch.unique(ids, return_inverse=True)
    loss, stats = outputs(hidden, launch)
    dhidden = zeros_for_gradient(hidden) if needs[0] else None
    num_rows = len(weight) if grad_rows is None else len(grad_rows)
    whole = [slice(0, num_rows)]
    dweight = HeadGrad(weight[:num_rows], whole) if needs[1] else None
    dbias = HeadGrad(bias, [slice(0, len(bias))]) if needs[2] and bias is not None else None

    row_bytes = num_ids * width * (sums.itemsize + (weight.dtype.itemsize if weight.dtype != sums else 0))
    for rows, count in chunks(launch, len(hidden), chunk_rows(call.chunk_bytes, device, row_bytes)):
        h, flat = hidden[rows].to(dtype).to(sums), ids[rows].reshape(-1)
        gathered = scratch.empty("gathered", (len(flat), width), weight.dtype)
        torch.index_select(weight, 0, flat, out=gathered)
        if dtype != weight.dtype:
            gathered = gathered.to(dtype)
        head = scratch.converted("head", gathered, sums).view(count, num_ids, width)
        logits = torch.bmm(head, h[:, :, None]).squeeze(2)  # [R, K]
        if bias is not None:
            logits += bias[flat].to(dtype).view_as(logits)
        loss[rows], stats[rows] = run_in_place(of_rows(launch, rows), logits, [], any(needs))
        if dhidden is not None:
            dhidden[rows] = torch.bmm(logits[:, None], head).squeeze(1).to(dhidden.dtype)
        if dbias is not None:
            dbias.sums(slice(0, len(weight))).index_add_(0, flat, logits.reshape(-1))
        if dweight is not None:
            torch.mul(logits[:, :, None], h[:, None], out=head)  # the gathered rows have done their work
            dweight.sums(whole[0]).index_add_(0, slots[rows].reshape(-1), head.view(-1, width))
    return Sums(loss, stats, dhidden, dweight, dbias, grad_rows=grad_rows)


def positions(launch: Launch, columns: int) -> tuple[Tensor, Launch]:
    """Distinct ids ``[N, K]``, 0 in slots not used, and the launch on logits of these columns alone."""
    ids, logprobs = launch.sparse_teacher
    wrong = out_of_range(ids, logprobs, columns)
    ids, logprobs, used = distinct(ids, logprobs.double(), columns)
    num_ids = ids.shape[1]
    places = torch.where(used, torch.arange(num_ids, device=ids.device), -1)
    # Again out of range, in a slot that is used: the row is NaN.
    places[:, 0] = torch.where(wrong, num_ids, places[:, 0])
    logprobs[:, 0] = torch.where(wrong, 0.0, logprobs[:, 0])
    options = {**launch.options, "vocab_size": num_ids}
    return torch.where(used, ids, 0), launch._replace(sparse_teacher=(places, logprobs), options=options)


def teacher_heads(call: Call, scratch: Scratch, columns: int) -> list[tuple[Head, Tensor]]:
    """The heads of the teachers and their hidden states, in the dtypes of their products."""
    found = []
    for hidden, weight, bias in zip(call.teacher_hidden, call.teacher_weight, call.teacher_bias, strict=True):
        dtype, logits_dtype = call.dtypes(hidden)
        head = Head(weight, bias, columns=columns, dtype=dtype, logits_dtype=logits_dtype, scratch=scratch)
        found.append((head, hidden.to(dtype).contiguous()))
    return found


def outputs(hidden: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """Losses ``[N]`` and statistics ``[N, S]``, 0 in the rows that are left out."""
    columns = ops.TOPK_STATS if launch.pattern == "topk_fwd" else ops.STATS
    width = len(columns) if launch.options["stats"] else 0
    dtype = sum_dtype(hidden.dtype)
    return hidden.new_zeros(len(hidden), dtype=dtype), hidden.new_zeros(len(hidden), width, dtype=dtype)


def no_autocast(tensor: Tensor) -> Any:
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def of_rows(launch: Launch, rows: Rows) -> Launch:
    return launch._replace(
        rows=launch.rows.chosen(rows),
        sparse_teacher=tuple(item[rows] for item in launch.sparse_teacher),
    )


def run_in_place(launch: Launch, logits: Tensor, teachers: list[Tensor], with_grad: bool) -> tuple[Tensor, Tensor]:
    """Losses and statistics of a chunk ``[R, V]``; the gradient takes the place of the logits."""
    if launch.backend != "torch":
        loss, stats = run(launch, logits, tuple(teachers), logits if with_grad else None)
    else:
        with torch.set_grad_enabled(with_grad):
            leaf = logits.detach()
            if with_grad:
                leaf.requires_grad_()
            loss, stats = run_reference(launch, leaf, teachers)
            total = loss.sum()
        if with_grad:
            (grad,) = torch.autograd.grad(total, leaf)
            logits.copy_(grad)
    return loss.detach(), loss.new_empty(len(loss), 0) if stats is None else stats


def _register(pattern: str, num_teacher: int) -> None:
    """Enter the loop as the op of a pattern, whose teacher takes ``num_teacher`` arguments."""

    def loop(
        hidden: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        *tensors: Any,
        backend: str,
        chunk_bytes: Optional[int],
        product_dtype: Optional[torch.dtype],
        logits_dtype: Optional[torch.dtype],
        needs: Sequence[bool],
        numbers: Sequence[float],
        choices: Sequence[int],
        **options: Any,
    ) -> tuple[Tensor, ...]:
        options.update(ops.named(pattern, numbers, choices))
        teacher, rows = tensors[:num_teacher], tensors[num_teacher:]
        sparse = pattern == "topk_fwd"
        named = RowTensors(**dict(zip(ops.ROW_TENSORS[pattern], rows, strict=True)))
        launch = Launch(pattern, backend, named, options, teacher[:2] if sparse else ())
        call = Call(launch, chunk_bytes, product_dtype, logits_dtype, *(() if sparse else map(tuple, teacher)))
        if sparse and teacher[2] is not None:
            call = call._replace(expectation=Expectation(*teacher[2:]))
        return _run(call, hidden, weight, bias, needs)[:6]

    ops.implement(f"linear_{pattern}", loop)


_register("dense_fwd", 3)
_register("topk_fwd", 5)
