"""Log-probabilities of tokens from hidden states: the logits are projected chunk by chunk, and again in backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, Union, overload

import torch
from torch import Tensor

from kdkernels import checks, distributed, modules, ops, reference, symbols, transforms
from kdkernels.autograd import TokenCall, refuse_second_derivative, scaled
from kdkernels.capture import TeacherTopK
from kdkernels.chunked import logits_of_whole, no_autocast, product_dtypes
from kdkernels.chunks import Ahead, HiddenGrad, Rows, agreed_chunks, chunk_rows, indices
from kdkernels.heads import Fp16Range, Head, HeadGrad, Scratch, sum_dtype
from kdkernels.launch import flat
from kdkernels.linear import as_student, is_transformed
from kdkernels.objective import LinearTokenOptions, PerRow, takes
from kdkernels.reference.tokens import TokenRows
from kdkernels.stats import TokenStats
from kdkernels.tokens import TokenLogprobs, first_of_equals, shaped, token_call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from kdkernels import options as keywords
    from kdkernels.parallel.shards import Shards


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Union[Tensor, torch.nn.Module],
    ids: Tensor,
    *,
    bias: Optional[Tensor] = None,
    return_stats: Literal[False] = False,
    **options: Unpack[keywords.LinearTokenOptions],
) -> TokenLogprobs: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Union[Tensor, torch.nn.Module],
    ids: Tensor,
    *,
    bias: Optional[Tensor] = None,
    return_stats: Literal[True],
    **options: Unpack[keywords.LinearTokenOptions],
) -> tuple[TokenLogprobs, TokenStats]: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Union[Tensor, torch.nn.Module],
    ids: Tensor,
    *,
    bias: Optional[Tensor] = None,
    return_stats: bool,
    **options: Unpack[keywords.LinearTokenOptions],
) -> Union[TokenLogprobs, tuple[TokenLogprobs, TokenStats]]: ...
@takes(LinearTokenOptions)
def linear_token_logprobs(
    hidden: Tensor,
    weight: Union[Tensor, torch.nn.Module],
    ids: Tensor,
    *,
    bias: Optional[Tensor] = None,
    **options: Any,
) -> Any:
    r"""``token_logprobs`` of the logits ``hidden @ weight.T + bias``, which are never stored whole.

    Forward projects a chunk of rows, takes the values from its logits, and drops these. Backward projects the
    chunk again, writes the gradient over its logits, and multiplies it back: four products, and nothing of size
    ``[N, V]`` at any time.

    Args:
        hidden: ``(..., D)``, float32, bfloat16 or float16 (float64 on the CPU).
        weight: the head ``[V, D]``, or the module that has it; see ``linear_kd_loss``. Only tensors that require grad
            get one, so that a frozen head costs one product less.
        ids: as in ``token_logprobs``. Rows without a token are not multiplied, and in backward neither are rows whose
            upstream gradients are all 0.
        bias: ``[V]``.
        chunk_bytes: of the logits of a chunk; by default 96 MiB on a CPU and 512 MiB on a GPU.
        logits_dtype: as in ``linear_kd_loss``: float32 unless 16 bits are asked for by name.
        temperature, entropy, return_stats, softcap, vocab_size, ignore_index, backend: as in ``token_logprobs``.
        process_group: as in ``linear_kd_loss``.

    Returns:
        ``TokenLogprobs(logprobs, entropy, lse)``, float32 (float64 for float64); with ``return_stats`` a pair
        ``(TokenLogprobs, TokenStats)``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched.
        RuntimeError: a second derivative, or a transform of ``torch.func``, where the backend is not "torch".

    Example:
        Clipped importance weights of sampled tokens, from the hidden states of a language model::

            now = kd.linear_token_logprobs(hidden, model.lm_head, tokens, temperature=0.7).logprobs
            loss = kd.onpolicy.ppo(now, old_logprobs, advantages, mask=mask)

    Example:
        >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16)
        >>> linear_token_logprobs(hidden, head, torch.arange(8)).logprobs.sum().backward()
        >>> hidden.grad.shape
        torch.Size([8, 16])
    """
    given = LinearTokenOptions.of(options)
    if checks.is_dtensor(hidden):
        arguments = {"hidden": hidden, "weight": weight, "ids": ids, "bias": bias, **given.given()}
        return distributed.of_heads(linear_token_logprobs, arguments, "")
    given, hidden, weight, bias = modules.student(given, hidden, weight, bias, "")
    call, head, offset, tokens, logits = _prepared(given, hidden, weight, ids, bias, "")
    inputs = tuple(item for item in (hidden, head, offset) if item is not None)
    checks.reverse_mode_only(call.tokens.backend, *inputs)
    needs_grad = torch.is_grad_enabled() and any(item.requires_grad for item in inputs)
    entropy: Optional[Tensor]
    stats: Optional[Tensor]
    if call.tokens.backend == "torch" and (torch.compiler.is_compiling() or is_transformed(inputs)):
        # No graph and no transform holds the autograd within the loop.
        logprobs, entropy, lse, _, stats = _whole(call, hidden, head, offset, tokens)
    elif needs_grad and not symbols.traces_ops():
        logprobs, entropy, lse, stats = LinearTokens.apply(
            flat(hidden), head, offset, tokens, call.tokens.temperature_rows, call
        )
    else:
        offset = None if offset is None else offset.detach()
        logprobs, entropy, lse, _, _, stats = _forward(call, flat(hidden.detach()), head.detach(), offset, tokens)
    entropy, stats = entropy if given.entropy else None, stats if given.return_stats else None
    return shaped(logprobs, entropy, lse, stats, hidden.shape[:-1], ids.shape)


def linear_gather_logprobs(
    teacher_hidden: Tensor,
    teacher_weight: Union[Tensor, torch.nn.Module],
    ids: Tensor,
    *,
    teacher_bias: Optional[Tensor] = None,
    temperature: PerRow = 1.0,
    vocab_size: Optional[int] = None,
    softcap: Optional[float] = None,
    chunk_bytes: Optional[int] = None,
    logits_dtype: Optional[torch.dtype] = None,
    process_group: Optional[ProcessGroup] = None,
    backend: str = "auto",
) -> TeacherTopK:
    """``gather_logprobs`` of the logits ``hidden @ weight.T + bias``, which are never stored whole.

    Args:
        teacher_hidden, teacher_weight, teacher_bias, chunk_bytes, logits_dtype, process_group: as in
            ``linear_token_logprobs``.
        ids, temperature, vocab_size, softcap, backend: as in ``gather_logprobs``.

    Returns:
        ``TeacherTopK``, as ``gather_logprobs``. No gradient flows to the hidden states or the head.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched.

    Example:
        ``teacher = kd.linear_gather_logprobs(teacher_hidden, teacher.lm_head, kd.capture_topk(logits, 100).ids)``

    Example:
        >>> hidden, head = torch.randn(8, 16), torch.randn(100, 16)
        >>> linear_gather_logprobs(hidden, head, torch.arange(24).reshape(8, 3)).logprobs.shape
        torch.Size([8, 3])
    """
    options = {"temperature": temperature, "vocab_size": vocab_size, "softcap": softcap, "backend": backend}
    given = LinearTokenOptions.of(
        {**options, "chunk_bytes": chunk_bytes, "logits_dtype": logits_dtype, "process_group": process_group}
    )
    if checks.is_dtensor(teacher_hidden):
        arguments = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
        return distributed.of_heads(linear_gather_logprobs, {**arguments, "ids": ids, **given.given()}, "teacher_")
    given = dataclasses.replace(given, ignore_index=-1)
    given, *teacher = modules.student(given, teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    teacher_hidden, teacher_weight, teacher_bias = teacher
    operands = (teacher_hidden, teacher_weight, ids, teacher_bias)
    call, head, offset, tokens, _ = _prepared(given, *operands, "teacher_")
    if ids.dim() != teacher_hidden.dim():
        raise ValueError(f"ids must have shape {checks.with_slots(teacher_hidden.shape[:-1])}, got {tuple(ids.shape)}")
    tokens = first_of_equals(tokens)
    of_tokens = call.tokens._replace(options={**call.tokens.options, "tail_mass": True})
    offset = None if offset is None else offset.detach()
    logprobs, _, _, tail, _, _ = _forward(
        call._replace(tokens=of_tokens), flat(teacher_hidden.detach()), head.detach(), offset, tokens
    )
    return TeacherTopK(
        tokens.to(torch.int32).reshape(ids.shape),
        torch.where(tokens == -1, -torch.inf, logprobs).reshape(ids.shape),
        tail.reshape(teacher_hidden.shape[:-1]),
    )


class LinearTokenCall(NamedTuple):
    """A call but for its hidden states, head and ids."""

    tokens: TokenCall
    chunk_bytes: Optional[int]
    product_dtype: Optional[torch.dtype]
    logits_dtype: Optional[torch.dtype]
    shards: Optional[Shards] = None  # of the vocabulary: the head is this rank's rows

    def op_options(self) -> dict[str, Any]:
        return {
            "backend": self.tokens.backend,
            "chunk_bytes": self.chunk_bytes,
            "product_dtype": self.product_dtype,
            "logits_dtype": self.logits_dtype,
            **self.tokens.options,
        }


class LinearTokens(torch.autograd.Function):
    """As ``autograd.TokenValues``, of hidden states ``[N, D]`` and a head, which are kept in place of logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        ids: Tensor,
        temperature_rows: Optional[Tensor],
        call: LinearTokenCall,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logprobs, entropy, lse, _, norm, stats = _forward(call, hidden, weight, bias, ids)
        with_entropy = call.tokens.options["entropy"]
        ctx.save_for_backward(hidden, weight, bias, ids, norm, entropy if with_entropy else None, temperature_rows)
        ctx.call = call._replace(tokens=call.tokens._replace(temperature_rows=None))
        ctx.mark_non_differentiable(*((lse, stats) if with_entropy else (lse, stats, entropy)))
        ctx.set_materialize_grads(False)
        return logprobs, entropy, lse, stats

    @staticmethod
    def backward(ctx: Any, dlogprobs: Optional[Tensor], dentropy: Optional[Tensor], *_: Any) -> tuple[Any, ...]:
        nothing = (None,) * 3
        if dlogprobs is None and dentropy is None:
            return (*nothing, *nothing)
        hidden, weight, bias, ids, norm, entropy, temperature_rows = ctx.saved_tensors
        call, needs = ctx.call, list(ctx.needs_input_grad[:3])
        if not call.tokens.options["entropy"]:
            # A graph hands in a gradient of size 0 for what is not there.
            dentropy = None
        options = {**call.tokens.options, "entropy": dentropy is not None}
        call = call._replace(tokens=TokenCall(call.tokens.backend, temperature_rows, options))
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(ids, dtype=norm.dtype)
        if not torch.compiler.is_compiling():
            again = torch.is_grad_enabled()
            if again and (call.tokens.backend != "torch" or call.shards is not None):
                refuse_second_derivative(call.shards is not None)
            given = (dlogprobs,) if dentropy is None else (dlogprobs, dentropy)
            if call.shards is not None:
                checks.one_gradient(*given)
            if again or any(map(transforms.stands_for_others, given)):
                # Neither a graph nor a batch of gradients goes through the loop.
                inputs = (hidden, weight, bias)
                return (*_differentiable(call, inputs, ids, dlogprobs, dentropy, needs), *nothing)
        operands = (
            hidden,
            weight,
            bias,
            ids,
            norm,
            entropy if dentropy is not None else None,
            dlogprobs.contiguous(),
            None if dentropy is None else dentropy.contiguous(),
        )
        dhidden, dweight, dbias, factors = _backward(call, operands, needs)
        shared = torch.compiler.is_compiling()
        of_weight, of_bias = factors.unbind()
        if weight.dtype == torch.float16 and needs[1]:
            dweight = scaled(dweight, of_weight, None, call.tokens.backend, shared=shared)
        if bias is not None and bias.dtype == torch.float16 and needs[2]:
            dbias = scaled(dbias, of_bias, None, call.tokens.backend, shared=shared)
        grads = (grad if need else None for grad, need in zip((dhidden, dweight, dbias), needs, strict=True))
        return (*grads, *nothing)


def _prepared(
    given: LinearTokenOptions, hidden: Any, weight: Any, ids: Any, bias: Any, side: str
) -> tuple[LinearTokenCall, Tensor, Optional[Tensor], Tensor, Tensor]:
    """The call, the head's weight and bias, the ids ``[N, K]``, and what stands for the logits."""
    if given.process_group is not None:
        from kdkernels.parallel.linear import prepared_tokens

        return prepared_tokens(given, hidden, weight, ids, bias, side)
    head, offset, product_dtype, logits = as_student(given, hidden, weight, bias, side)
    checks.logits(f"{side}hidden", logits)
    columns = checks.vocabulary(given.vocab_size, logits, f"{side}weight")
    tokens = checks.token_ids(ids, logits, columns, given.ignore_index)
    of_tokens = token_call(given, logits, tokens, columns)
    call = LinearTokenCall(of_tokens, given.chunk_bytes, product_dtype, given.logits_dtype)
    return call, head, offset, tokens, logits


def _whole(call: LinearTokenCall, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], ids: Tensor) -> TokenRows:
    """All logits at once, in plain PyTorch: autograd sees all of it."""
    dtypes = product_dtypes(hidden, call.product_dtype, call.logits_dtype)
    with no_autocast(hidden):
        logits = logits_of_whole(*dtypes, flat(hidden), weight, bias)
        return reference.token_rows(logits, ids, **call.tokens.reference_options())


def _differentiable(
    call: LinearTokenCall,
    inputs: Sequence[Optional[Tensor]],
    ids: Tensor,
    dlogprobs: Tensor,
    dentropy: Optional[Tensor],
    needs: Sequence[bool],
) -> list[Optional[Tensor]]:
    hidden, weight, bias = inputs
    assert hidden is not None and weight is not None
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        found = _whole(call, hidden, weight, bias, ids)
    wanted = [item for item, need in zip(inputs, needs, strict=True) if need and item is not None]
    outputs, given = [found.logprobs], [dlogprobs]
    if dentropy is not None and found.entropy is not None:
        outputs.append(found.entropy)
        given.append(dentropy)
    grads = iter(torch.autograd.grad(outputs, wanted, given, create_graph=again, allow_unused=True))
    return [next(grads) if need and item is not None else None for item, need in zip(inputs, needs, strict=True)]


def _forward(call: LinearTokenCall, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], ids: Tensor) -> Any:
    if call.shards is not None:
        with torch.no_grad(), no_autocast(hidden):
            return _forward_loop(call, hidden, weight, bias, ids)
    return ops.call_linear("token_fwd", (hidden, weight, bias, ids, call.tokens.temperature_rows), call.op_options())


def _backward(call: LinearTokenCall, operands: tuple[Any, ...], needs: Sequence[bool]) -> Any:
    if call.shards is not None:
        loop: Any = _backward_loop
        with torch.no_grad(), no_autocast(operands[0]):
            return loop(call, *operands, needs)
    options = {**call.op_options(), "needs": needs}
    return ops.call_linear("token_bwd", (*operands, call.tokens.temperature_rows), options)


class _Loop(NamedTuple):
    """The parts that forward and backward have in common."""

    head: Head
    inputs: Tensor
    scratch: Scratch
    dtype: torch.dtype
    logits_dtype: torch.dtype
    columns: int
    size: int  # rows of a chunk

    @classmethod
    def of(
        cls, call: LinearTokenCall, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], extra_bytes: int = 0
    ) -> _Loop:
        dtype, logits_dtype = product_dtypes(hidden, call.product_dtype, call.logits_dtype)
        columns, scratch, shards = call.tokens.options["vocab_size"], Scratch(hidden), call.shards
        columns = columns if shards is None else shards.columns
        head = Head(weight, bias, columns=columns, dtype=dtype, logits_dtype=logits_dtype, scratch=scratch)
        # Of shards two chunks are there at a time, of the same rows on all ranks.
        row_bytes = head.row_bytes(columns) if shards is None else 2 * head.row_bytes(max(shards.widths))
        size = chunk_rows(call.chunk_bytes, hidden.device, row_bytes + extra_bytes)
        # A product of 16-bit matrices may read what lies between rows.
        return cls(head, hidden.to(dtype).contiguous(), scratch, dtype, logits_dtype, columns, size)

    def project(self, rows: Rows, count: int, turn: int = 0) -> Tensor:
        logits = self.scratch.logits(f"student logits {turn}", count, self.columns, self.logits_dtype)
        if self.columns:
            self.head.project(self.inputs[rows], logits)
        return logits


def _of_rows(rows: Rows, *tensors: Optional[Tensor]) -> list[Any]:
    return [None if item is None else item[rows] for item in tensors]


def _counted(ids: Tensor, ignore_index: int) -> Tensor:
    return (ids != -1) & (ids != ignore_index)


def _forward_loop(
    call: LinearTokenCall, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], ids: Tensor
) -> tuple[Tensor, ...]:
    options, backend = call.tokens.options, call.tokens.backend
    dtype = sum_dtype(hidden.dtype)

    def zeros(*shape: int) -> Tensor:
        return hidden.new_zeros(shape, dtype=dtype)

    num = len(hidden)
    logprobs, lse, norm = zeros(*ids.shape), zeros(num), zeros(num, 2)
    entropy, tail = zeros(num if options["entropy"] else 0), zeros(num if options["tail_mass"] else 0)
    stats = zeros(num, 2 + ids.shape[1]) if options["stats"] else zeros(0)
    loop = _Loop.of(call, hidden, weight, bias)
    kept = indices(_counted(ids, options["ignore_index"]).any(-1))
    chunks = agreed_chunks(call.shards, kept, num, loop.size, hidden)
    ahead = Ahead(lambda k: loop.project(*chunks[k], 0 if call.shards is None else k % 2), len(chunks))
    for k, (rows, _) in enumerate(chunks):
        logits = ahead.take(k)
        some_ids, temperature = _of_rows(rows, ids, call.tokens.temperature_rows)
        part = call.tokens._replace(temperature_rows=temperature)
        results: Any
        if call.shards is not None:
            from kdkernels.parallel.tokens import values_of

            busy = dataclasses.replace(call.shards, meanwhile=ahead.prepare)
            *results, norm_rows = values_of(part, logits, some_ids, busy)
        elif backend == "torch":
            found = reference.token_rows(logits, some_ids, **part.reference_options())
            results = found
            by = part.reference_options()["temperature"]
            norm_rows = torch.stack([found.lse * by, torch.ones_like(found.lse)], -1)
        else:
            *results, norm_rows, of_stats = ops.call(
                "token_fwd", backend, (logits[None], some_ids, temperature), options
            )
            results.append(of_stats)
        for whole, some in zip((logprobs, entropy, lse, tail, stats), results, strict=True):
            if some is not None and len(whole):
                whole[rows] = some
        norm[rows] = norm_rows
    return logprobs, entropy, lse, tail, norm, stats


def _backward_loop(
    call: LinearTokenCall,
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    ids: Tensor,
    norm: Tensor,
    entropy: Optional[Tensor],
    dlogprobs: Tensor,
    dentropy: Optional[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    tokens, shards = call.tokens, call.shards
    if shards is not None:
        from kdkernels.parallel.tokens import of_own_columns

        tokens, ids, dlogprobs = of_own_columns(tokens, shards, ids, dlogprobs)
    options, backend = tokens.options, tokens.backend
    loop = _Loop.of(call, hidden, weight, bias)
    head, columns = loop.head, loop.columns
    dhidden = HiddenGrad(torch.zeros_like(hidden), shards) if needs[0] else None
    dweight = HeadGrad(weight, head.blocks) if needs[1] else None
    dbias = HeadGrad(bias, head.blocks) if needs[2] and bias is not None else None
    counted = _counted(ids, options["ignore_index"])
    wanted = (dlogprobs != 0) & counted
    counts = wanted.any(-1) if dentropy is None else wanted.any(-1) | ((dentropy != 0) & counted.any(-1))
    fp16_range = rest = None
    if loop.dtype == torch.float16 and (head.way != "widened" or loop.logits_dtype == torch.float16):
        # The gradient in the chunk is as large as fp16 bears.
        sizes = [torch.linalg.vector_norm(item, torch.inf) for item in (dlogprobs, dentropy) if item is not None]
        size = torch.stack(sizes).amax()
        power = torch.ldexp(torch.ones_like(size), (8 - torch.frexp(size)[1]).clamp(-60, 60))
        dlogprobs = dlogprobs * power
        dentropy = None if dentropy is None else dentropy * power
        fp16_range, rest = Fp16Range(power, True), power.reciprocal()
    for rows, count in agreed_chunks(shards, indices(counts), len(hidden), loop.size, hidden):
        logits = loop.project(rows, count)
        some = _of_rows(rows, ids, norm, entropy, dlogprobs, dentropy)
        (temperature,) = _of_rows(rows, tokens.temperature_rows)
        if columns == 0:
            if dhidden is not None:
                dhidden.add(rows, torch.zeros_like(hidden[rows]))
            continue
        if backend == "torch":
            part = tokens._replace(temperature_rows=temperature).gradient_options()
            logits.copy_(reference.token_gradient(logits, *some, **part))
        else:
            ops.call("token_bwd", backend, (logits[None], *some, logits[None], temperature), options)
        dh = head.backward(
            logits[:, :columns],
            loop.inputs[rows],
            wants_dhidden=needs[0],
            dweight=dweight,
            dbias=dbias,
            fp16_range=fp16_range,
        )
        if dhidden is not None and dh is not None:
            dhidden.add(rows, dh)
    one = norm.new_ones(())
    grads = [(hidden.new_empty(0), one) if grad is None else grad.finish(rest) for grad in (dweight, dbias)]
    factors = torch.stack([factor.to(norm.dtype) for _, factor in grads])
    found = hidden.new_empty(0) if dhidden is None else dhidden.finish()
    return found, grads[0][0], grads[1][0], factors


def _call_of(pattern: str, temperature_rows: Optional[Tensor], backend: str, given: dict[str, Any]) -> LinearTokenCall:
    chunk_bytes, product_dtype, logits_dtype = (given.pop(k) for k in ("chunk_bytes", "product_dtype", "logits_dtype"))
    options = {**ops.named(pattern, given.pop("numbers"), given.pop("choices")), **given}
    return LinearTokenCall(TokenCall(backend, temperature_rows, options), chunk_bytes, product_dtype, logits_dtype)


def _fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    ids: Tensor,
    temperature_rows: Optional[Tensor],
    *,
    backend: str,
    **given: Any,
) -> tuple[Tensor, ...]:
    call = _call_of("token_fwd", temperature_rows, backend, given)
    with torch.no_grad(), no_autocast(hidden):
        return _forward_loop(call, hidden, weight, bias, ids)


def _bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    ids: Tensor,
    norm: Tensor,
    entropy: Optional[Tensor],
    dlogprobs: Tensor,
    dentropy: Optional[Tensor],
    temperature_rows: Optional[Tensor],
    *,
    backend: str,
    needs: Sequence[bool],
    **given: Any,
) -> tuple[Tensor, ...]:
    call = _call_of("token_bwd", temperature_rows, backend, given)
    with torch.no_grad(), no_autocast(hidden):
        return _backward_loop(call, hidden, weight, bias, ids, norm, entropy, dlogprobs, dentropy, needs)


ops.implement("linear_token_fwd", _fwd)
ops.implement("linear_token_bwd", _bwd)
