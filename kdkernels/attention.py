"""Losses on attention scores and relations between tokens: blocks of ``[n, n]`` scores, and never all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from kdkernels import backends, checks, ops
from kdkernels.autograd import refuse_second_derivative
from kdkernels.choices import Backend
from kdkernels.chunked import no_autocast, run_in_place
from kdkernels.divergences import Divergence, DivergenceName
from kdkernels.heads import sum_dtype
from kdkernels.launch import Launch, RowTensors, run_reference
from kdkernels.objective import Objective

KINDS = ("divergence", "mse")
REDUCTIONS = ("mean", "sequence_mean", "sum")
IGNORED = -100
# Of a block's scores. A CPU's caches hold these from the products to the products: 124 ms a step where 96 MiB take 203
# (4 x 12 heads of 512 tokens). A GPU needs as many to be busy.
CPU_BLOCK_BYTES = 4 * 2**20
GPU_BLOCK_BYTES = 128 * 2**20


def attention_kd_loss(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    mask: Optional[Tensor] = None,
    causal: bool = False,
    kind: str = "divergence",
    divergence: Union[DivergenceName, Divergence] = "forward_kl",
    temperature: float = 1.0,
    student_scale: Optional[float] = None,
    teacher_scale: Optional[float] = None,
    reduction: str = "mean",
    chunk_bytes: Optional[int] = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""A divergence between the attention of teacher and student, from their queries and keys.

    With ``s = scale Q K^T`` of each head, and the softmax over the keys that a query sees::

        "divergence"    D(softmax(s_teacher / T), softmax(s_student / T)) of each query
        "mse"           mean over the keys of (s_student - s_teacher)^2, before the softmax

    Scores exist for a few heads, or for some queries of one, at a time; their gradient takes their place and is
    multiplied back: ``dQ = scale dS K``, ``dK = scale dS^T Q``. Nothing of size ``[B, H, n, n]`` is stored, in forward
    or for backward.

    Args:
        student_query: ``(B, H, n, d)``, float32, bfloat16 or float16 (float64 on the CPU), as
            ``scaled_dot_product_attention`` takes it; any strides.
        student_key: ``(B, H', n, d)`` where H' divides H: a key head serves ``H / H'`` query heads in a row.
        teacher_query, teacher_key: the same of the teacher, of the same B, H and n and of any width. They get no
            gradient.
        mask: bool ``(B, n)``, True for tokens that count: the others are no keys, and their queries have no loss.
        causal: a query sees the keys up to its own.
        kind: "divergence" or "mse".
        divergence, temperature: as in ``kd_loss``; factor T^2.
        student_scale, teacher_scale: of the products, by default ``1 / sqrt(d)``.
        reduction: "mean" over all queries that count; "sequence_mean" over the sequences of the mean of each (MiniLM's,
            where lengths differ); or "sum".
        chunk_bytes: of the scores at a time, student's and teacher's together; by default 4 MiB on a CPU, whose caches
            then hold them, and 128 MiB on a GPU.
        backend: as in ``kd_loss``, of the divergence. Products are PyTorch's: of 16-bit operands with fp32 results on
            a CUDA device, of operands widened to fp32 elsewhere.

    Returns:
        The loss, float32 (float64 for float64), with a first derivative. Under ``torch.compile`` the blocks are one op
        of the graph; backend "torch" makes all scores at once there.

    Raises:
        TypeError, ValueError: naming the argument, before anything is computed.

    Reference:
        Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, for "mse", which there counts the masked entries as zeros; Wang
        et al. 2020 (MiniLM), arXiv:2002.10957, for the divergence.

    Example:
        >>> query, key, teacher_query, teacher_key = torch.randn(4, 2, 3, 5, 8)  # B, H, n, d
        >>> attention_kd_loss(query, key, teacher_query, teacher_key, causal=True).shape
        torch.Size([])
    """
    call = _checked(
        (student_query, student_key, teacher_query, teacher_key),
        ("student_query", "student_key", "teacher_query", "teacher_key"),
        mask=mask,
        causal=causal,
        kind=kind,
        options={"divergence": divergence, "temperature": temperature, "backend": backend},
        scales=(student_scale, teacher_scale),
        reduction=reduction,
        chunk_bytes=chunk_bytes,
    )
    return _loss(student_query, student_key, call)


def relation_kd_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    heads: int,
    pairs: Sequence[tuple[int, int]] = ((0, 0), (1, 1), (2, 2)),
    weights: Optional[Sequence[float]] = None,
    mask: Optional[Tensor] = None,
    causal: bool = False,
    divergence: Union[DivergenceName, Divergence] = "forward_kl",
    temperature: float = 1.0,
    reduction: str = "mean",
    chunk_bytes: Optional[int] = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""The relations of MiniLMv2: how tokens attend to each other in the vectors of one layer, teacher beside student.

    The vectors ``[B, n, d]`` of queries, keys and values, all heads side by side, are split into ``heads`` relation
    heads of ``d / heads`` numbers, so that teacher and student may have any number of attention heads and any width.
    For a pair (i, j)::

        R = softmax(A_i A_j^T / sqrt(d / heads))        loss = sum_pairs weight D(R_teacher, R_student)

    each with the mean over heads and tokens. Blocks of relations are made and dropped as in ``attention_kd_loss``.

    Args:
        student: tensors ``(B, n, d)``, such as queries, keys and values.
        teacher: as many of the same B and n, of any width. They must not require grad.
        heads: the number of relation heads, which divides both widths.
        pairs: which two of the tensors are multiplied; by default Q-Q, K-K and V-V.
        weights: a number for each pair; by default 1.
        mask, causal, divergence, temperature, reduction, chunk_bytes, backend: as in ``attention_kd_loss``.

    Returns:
        The loss, as ``attention_kd_loss``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is computed.

    Reference:
        Wang et al. 2021 (MiniLMv2), arXiv:2012.15828.

    Example:
        >>> query_key_value, of_teacher = torch.randn(3, 2, 5, 24), torch.randn(3, 2, 5, 64)
        >>> relation_kd_loss([*query_key_value], [*of_teacher], heads=4).shape
        torch.Size([])
    """
    checks.integer("heads", heads, low=1)
    sides = {"student": _split("student", student, heads), "teacher": _split("teacher", teacher, heads)}
    if len(sides["student"]) != len(sides["teacher"]):
        raise ValueError(
            f"teacher must have as many tensors as student, {len(sides['student'])}, got {len(sides['teacher'])}"
        )
    chosen = [_indices(item, len(sides["student"])) for item in pairs]
    if not chosen:
        raise ValueError("pairs must not be empty")
    factors = [1.0] * len(chosen) if weights is None else [checks.number("weights", weight) for weight in weights]
    if len(factors) != len(chosen):
        raise ValueError(f"weights must have a number for each of the {len(chosen)} pairs, got {len(factors)}")
    total: Optional[Tensor] = None
    calls = []
    for i, j in chosen:
        operands = (sides["student"][i], sides["student"][j], sides["teacher"][i], sides["teacher"][j])
        call = _checked(
            operands,
            (f"student[{i}]", f"student[{j}]", f"teacher[{i}]", f"teacher[{j}]"),
            mask=mask,
            causal=causal,
            kind="divergence",
            options={"divergence": divergence, "temperature": temperature, "backend": backend},
            scales=(None, None),
            reduction=reduction,
            chunk_bytes=chunk_bytes,
        )
        calls.append((operands[:2], call))
    for (pair, call), factor in zip(calls, factors, strict=True):
        loss = _loss(*pair, call)
        loss = loss if factor == 1 else loss * factor
        total = loss if total is None else total + loss
    assert total is not None
    return total


class _Call(NamedTuple):
    """A loss but for the student's queries and keys."""

    teacher_query: Tensor
    teacher_key: Tensor
    mask: Optional[Tensor]  # [B, n]
    causal: bool
    kind: str
    options: dict[str, Any]  # of the divergence, as the dense op has them
    backend: str
    scales: tuple[float, float]
    reduction: str
    chunk_bytes: Optional[int]


def _checked(
    operands: tuple[Any, Any, Any, Any],
    names: tuple[str, str, str, str],
    *,
    mask: Any,
    causal: Any,
    kind: Any,
    options: dict[str, Any],
    scales: tuple[Any, Any],
    reduction: Any,
    chunk_bytes: Any,
) -> _Call:
    checks.attention_operands(names, operands)
    checks.flag("causal", causal)
    checks.choice("kind", kind, KINDS)
    checks.choice("reduction", reduction, REDUCTIONS)
    objective = Objective.of({**options, "reduction": "sum"})
    if isinstance(objective.temperature, Tensor):
        raise TypeError("temperature must be a number, got Tensor")
    if kind == "mse" and (objective.temperature != 1 or objective.divergence != "forward_kl"):
        raise ValueError("kind 'mse' compares scores as they are: it takes no temperature and no divergence")
    if chunk_bytes is not None:
        checks.integer("chunk_bytes", chunk_bytes, low=1)
    query, _, teacher_query, teacher_key = operands
    if mask is not None:
        checks.attention_mask(mask, query)
    made = []
    for name, scale, item in zip(("student_scale", "teacher_scale"), scales, (query, teacher_query), strict=True):
        made.append(1 / math.sqrt(item.shape[-1]) if scale is None else checks.number(name, scale))
    like = query.new_empty(1, dtype=sum_dtype(query.dtype)).expand(query.shape[2])
    backend = backends.choose(objective.backend, like, divergence=objective.resolved.name)
    checks.reverse_mode_only("cpu", *operands)
    return _Call(
        teacher_query.detach(),
        teacher_key.detach(),
        mask,
        causal,
        kind,
        {**objective.scalars, "mixture": "probs", "scale": 1.0, "vocab_size": query.shape[2]},
        backend,
        (made[0], made[1]),
        reduction,
        chunk_bytes,
    )


def _split(name: str, tensors: Any, heads: int) -> list[Tensor]:
    """Vectors ``[B, n, d]`` as ``[B, heads, n, d / heads]``, without a copy."""
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise TypeError(f"{name} must be a sequence of tensors, got {type(tensors).__name__}")
    for k, item in enumerate(tensors):
        checks.relation_vectors(f"{name}[{k}]", item, heads)
    return [item.unflatten(-1, (heads, -1)).transpose(1, 2) for item in tensors]


def _indices(pair: Any, count: int) -> tuple[int, int]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(f"pairs must be pairs of indices, got {pair!r}")
    first, second = (checks.integer("pairs", k, low=0, high=count - 1) for k in pair)
    return first, second


def _loss(query: Tensor, key: Tensor, call: _Call) -> Tensor:
    if call.backend == "torch" and torch.compiler.is_compiling():
        # No graph holds the autograd within the loop.
        return _whole(query, key, call)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        if key is query and torch.compiler.is_compiling():
            # Dynamo takes no tensor twice.
            key = key.view_as(key)
        return _AttentionLoss.apply(query, key, call)
    return _execute(query.detach(), key.detach(), call, [False, False])[0]


class _AttentionLoss(torch.autograd.Function):
    """The gradients are complete when ``forward`` ends; ``backward`` multiplies them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, call: _Call) -> Tensor:
        needs = list(ctx.needs_input_grad[:2])
        loss, *grads = _execute(query, key, call, needs)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))
        ctx.dtypes = query.dtype, key.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if grad is None else (grad * dloss).to(dtype) for grad, dtype in grads), None)


def _execute(query: Tensor, key: Tensor, call: _Call, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Run the loop, in its op, so that no compiler sees the blocks; not with autograd in the loop."""
    if call.backend == "torch":
        return _run(query, key, call, needs)
    return torch.ops.kdkernels.attention_loop.default(
        query,
        key,
        call.teacher_query,
        call.teacher_key,
        call.mask,
        causal=call.causal,
        kind=call.kind,
        student_scale=call.scales[0],
        teacher_scale=call.scales[1],
        reduction=call.reduction,
        backend=call.backend,
        chunk_bytes=call.chunk_bytes,
        needs=needs,
        **ops.packed("dense_fwd", call.options),
    )


def _loop(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mask: Optional[Tensor],
    *,
    causal: bool,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    reduction: str,
    backend: str,
    chunk_bytes: Optional[int],
    needs: Sequence[bool],
    numbers: Sequence[float],
    choices: Sequence[int],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = {**ops.named("dense_fwd", numbers, choices), **options}
    scales = (student_scale, teacher_scale)
    call = _Call(teacher_query, teacher_key, mask, causal, kind, options, backend, scales, reduction, chunk_bytes)
    return _run(query, key, call, needs)


ops.implement("attention_loop", _loop)


def _run(query: Tensor, key: Tensor, call: _Call, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients of query and key, or none; in fp32 for fp16, whose loss scale is still to come."""
    sums = sum_dtype(query.dtype)
    batch, heads, length, _ = query.shape
    weights = _weights(call, query)
    loss = torch.zeros((), dtype=sums, device=query.device)
    kept = sums if query.dtype == torch.float16 else query.dtype
    dquery = torch.zeros(query.shape, dtype=kept, device=query.device) if needs[0] else None
    # Summed over the blocks of queries and the heads that share a key.
    dkey = torch.zeros(key.shape, dtype=sums, device=key.device) if needs[1] else None
    room = call.chunk_bytes or (CPU_BLOCK_BYTES if query.device.type == "cpu" else GPU_BLOCK_BYTES)
    size = room // (2 * length * sums.itemsize)
    with torch.no_grad(), no_autocast(query):
        for b, h, r in _blocks(batch, heads, length, size):
            q = query[b, h, r]
            k, where = _keys(key, b, h, heads)
            if call.mask is not None:
                # 0 times what is in a token that does not count, be it NaN.
                others = ~call.mask[b, None, :, None]
                q, k = q.masked_fill(others[:, :, r], 0.0), k.masked_fill(others, 0.0)
            scores = _product(q, k.transpose(-1, -2), sums).mul_(call.scales[0])
            target, _ = _keys(call.teacher_key, b, h, heads)
            target = _product(call.teacher_query[b, h, r], target.transpose(-1, -2), sums).mul_(call.scales[1])
            rows = _rows_loss(call, scores, target, b, r, any(needs))
            loss += (rows.sum((-1, -2)) * weights[b]).sum()
            if any(needs):
                factor = (weights[b] * call.scales[0])[:, None, None, None]
                if dquery is not None:
                    dquery[b, h, r] = (_product(scores, k, sums, like=query.dtype) * factor).to(kept)
                if dkey is not None:
                    dk = _product(scores.transpose(-1, -2), q, sums, like=query.dtype) * factor
                    if where is None:
                        dkey[b, h] += dk
                    else:
                        dkey[b] = dkey[b].index_add(1, where, dk)
    nothing = loss.new_empty(0)
    return (
        loss,
        nothing if dquery is None else dquery,
        nothing.clone() if dkey is None else dkey.to(sums if key.dtype == torch.float16 else key.dtype),
    )


def _rows_loss(call: _Call, scores: Tensor, target: Tensor, b: slice, r: slice, with_grad: bool) -> Tensor:
    """The losses ``[b, h, r]`` of blocks of scores ``[b, h, r, n]``, whose gradient takes their place."""
    length = scores.shape[-1]
    seen, counted = _seen(call, scores, b, r)
    if call.kind == "mse":
        scores -= target
        if seen is not None:
            scores.masked_fill_(~seen, 0.0)
        keys = length if seen is None else seen.sum(-1, keepdim=True).clamp(min=1)
        rows = (scores.square() / keys).sum(-1)
        scores *= 2.0
        scores /= keys
        return rows
    if seen is not None:
        # No outcome on either side.
        scores.masked_fill_(~seen, -torch.inf)
        target.masked_fill_(~seen, -torch.inf)
    flat = scores.view(-1, length)
    rows, _ = run_in_place(_launch(call, flat, counted), flat, [target.view(-1, length)], with_grad)
    return rows.view(scores.shape[:-1])


def _launch(call: _Call, scores: Tensor, counted: Optional[Tensor]) -> Launch:
    """The divergence of scores ``[R, n]``, of the queries that count."""
    labels = None if counted is None else torch.where(counted.reshape(-1), 0, IGNORED)
    return Launch("dense_fwd", call.backend, RowTensors(labels), call.options)


def _seen(call: _Call, scores: Tensor, b: slice, r: slice) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Which keys the queries of a block ``[b, h, r, n]`` see; and which queries ``[b, h, r]`` count."""
    length = scores.shape[-1]
    seen: Optional[Tensor] = None if call.mask is None else call.mask[b, None, None, :]
    if call.causal:
        below = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()[r]
        seen = below if seen is None else seen & below
    counted = None if call.mask is None else call.mask[b, None, r].expand(scores.shape[:-1])
    if seen is not None and counted is not None and call.kind == "mse":
        seen = seen & counted[..., None]
    return seen, counted


def _whole(query: Tensor, key: Tensor, call: _Call) -> Tensor:
    """The loss of all scores at once in plain PyTorch: autograd sees all of it."""
    sums, everything = sum_dtype(query.dtype), slice(None)
    with no_autocast(query):
        made = []
        for q, k, scale in (
            (query, key, call.scales[0]),
            (call.teacher_query, call.teacher_key, call.scales[1]),
        ):
            if call.mask is not None:
                q, k = (torch.where(call.mask[:, None, :, None], item, 0.0) for item in (q, k))
            k = k.to(sums).repeat_interleave(q.shape[1] // k.shape[1], 1)
            made.append(q.to(sums) @ k.transpose(-1, -2) * scale)
        scores, target = made
        seen, counted = _seen(call, scores, everything, everything)
        if call.kind == "mse":
            gap = (scores - target).square()
            rows = gap.mean(-1) if seen is None else torch.where(seen, gap, 0.0).sum(-1) / seen.sum(-1).clamp(min=1)
        else:
            if seen is not None:
                scores, target = (torch.where(seen, item, -torch.inf) for item in made)
            flat = scores.flatten(0, 2)
            rows = run_reference(_launch(call, flat, counted), flat, [target.flatten(0, 2)])[0].view(scores.shape[:-1])
        return (rows.sum((-1, -2)) * _weights(call, query)).sum()


def _weights(call: _Call, query: Tensor) -> Tensor:
    """The factor of the losses of a sequence's queries ``[B]``, on the device."""
    batch, heads, length, _ = query.shape
    ones = torch.ones(batch, dtype=sum_dtype(query.dtype), device=query.device)
    if call.reduction == "sum":
        return ones
    lengths = ones * length if call.mask is None else call.mask.sum(-1).to(ones.dtype)
    if call.reduction == "mean":
        return ones / (lengths.sum() * heads).clamp(min=1)
    return 1 / (lengths * heads).clamp(min=1) / max(batch, 1)


def _blocks(batch: int, heads: int, length: int, size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of sequences, heads and queries of at most ``size`` rows of scores, or of one row."""
    rows = min(max(size, 1), length)
    some_heads = min(max(size // max(length, 1), 1), heads)
    some = min(max(size // max(length * heads, 1), 1), batch)
    for b in range(0, batch, max(some, 1)):
        for h in range(0, heads, max(some_heads, 1)):
            for r in range(0, length, max(rows, 1)):
                yield slice(b, b + some), slice(h, min(h + some_heads, heads)), slice(r, r + rows)


def _keys(key: Tensor, b: slice, h: slice, heads: int) -> tuple[Tensor, Optional[Tensor]]:
    """The keys of some query heads, and the heads that they are of where several share one."""
    if key.shape[1] == heads:
        return key[b, h], None
    where = torch.arange(h.start, h.stop, device=key.device) // (heads // key.shape[1])
    return key[b].index_select(1, where), where


def _product(a: Tensor, b: Tensor, sums: torch.dtype, like: Optional[torch.dtype] = None) -> Tensor:
    """``a @ b`` of ``[b, h, *, *]`` in the dtype of the sums; ``a`` is rounded to ``like`` where products are."""
    shape = (*a.shape[:-1], b.shape[-1])
    if a.is_cuda and b.dtype.itemsize == 2:
        left, right = a.to(like or a.dtype).flatten(0, 1), b.flatten(0, 1)
        return torch.ops.aten.bmm.dtype(left, right, sums).view(shape)
    return torch.bmm(a.to(sums).flatten(0, 1), b.to(sums).flatten(0, 1)).view(shape)
