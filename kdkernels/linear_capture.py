"""A teacher's expectations under the head of a student that is frozen: all that forward KL needs of the teacher."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.capture import PerRow, TeacherExpectation
from kdkernels.chunked import no_autocast, product_dtypes
from kdkernels.chunks import chunk_rows, even_chunks
from kdkernels.heads import Fp16Range, Head, Scratch, sum_dtype
from kdkernels.launch import flat
from kdkernels.linear import autocast_dtype, stand_in
from kdkernels.reduction import num_rows


@torch.no_grad()
def capture_expectation(
    teacher: Tensor,
    student_weight: Union[Tensor, torch.nn.Module],
    *,
    student_bias: Optional[Tensor] = None,
    teacher_weight: Optional[Union[Tensor, torch.nn.Module]] = None,
    teacher_bias: Optional[Tensor] = None,
    temperature: PerRow = 1.0,
    vocab_size: Optional[int] = None,
    softcap: Optional[float] = None,
    chunk_bytes: Optional[int] = None,
) -> TeacherExpectation:
    r"""All that a student whose head is frozen needs of a teacher for the exact forward KL: D numbers a token, not V.

    With the teacher's ``p = softmax(t / T)`` and the student's head W ``[V, D]`` and bias b, the loss and its gradient
    in the student's hidden states h are ::

        KL(p || q) = logsumexp((h W + b) / T) - (h (p W) + p b) / T - H(p)          dh = (q W - p W) / T

    so that ``p W``, ``p b`` and ``H(p)``, captured once, stand for the teacher in every epoch::

        teacher = kd.capture_expectation(teacher_logits, model.lm_head, temperature=2.0)
        loss = kd.linear_kd_loss(hidden, model.lm_head, teacher_expectation=teacher, temperature=2.0)

    The head must be the one that is trained with, at every step: adapters below it are fine, on it they are not. Under
    autocast the head is rounded to its dtype, as in training: capture under the autocast that training runs under.

    Args:
        teacher: logits ``(..., V)``; or hidden states ``(..., D')`` where ``teacher_weight`` is given, whose logits are
            then made in chunks and never stored. float32, bfloat16 or float16 (float64 on the CPU).
        student_weight, student_bias: the student's head ``[V, D]`` and ``[V]``, or the module; see ``linear_kd_loss``.
            The bias must be finite.
        teacher_weight, teacher_bias: the teacher's head.
        temperature: the teacher's T > 0, a number or one value per row.
        vocab_size: columns from there on are padding: no probability. That of the loss.
        softcap: cap > 0 of ``cap * tanh(t / cap)``, of the teacher's logits, applied first.
        chunk_bytes: of the teacher's logits and probabilities of a chunk of rows; by default 96 MiB on a CPU and 512
            MiB on a GPU.

    Returns:
        ``TeacherExpectation``, float32 (float64 for a head in float64), in products and sums of that dtype. A row with
        NaN or +inf, or of -inf only, has no distribution: all of it is NaN. No gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, before anything is computed.

    Example:
        >>> head = torch.nn.Linear(16, 100).requires_grad_(False)
        >>> capture_expectation(torch.randn(8, 100), head).expectation.shape
        torch.Size([8, 16])
    """
    head, offset = checks.head_tensors("student_", student_weight, student_bias)
    checks.lone_head("student_", head, offset, teacher)
    product_dtype = autocast_dtype(teacher)
    rounded = product_dtype if head.dtype != torch.float64 else None
    if teacher_weight is None:
        checks.logits("teacher", teacher)
        if teacher_bias is not None:
            raise ValueError("teacher_bias goes with teacher_weight, and teacher is taken for logits without it")
        logits, source = teacher, None
    else:
        matrix, bias = checks.head_tensors("teacher_", teacher_weight, teacher_bias)
        checks.head("teacher_", teacher, matrix, bias, product_dtype is not None, name="teacher")
        logits, source = stand_in(teacher, matrix, product_dtype), (matrix, bias)
    columns = checks.vocabulary(vocab_size, logits, "teacher" if source is None else "teacher_weight")
    checks.rows_of_head(head, logits.shape[-1], vocab_size)
    temperature = checks.per_row("temperature", temperature, logits, low=0.0)
    cap = checks.softcap("softcap", softcap)
    if chunk_bytes is not None:
        checks.integer("chunk_bytes", chunk_bytes, low=1)
    checks.finite_bias("student_bias", offset)

    rows_shape, num = logits.shape[:-1], num_rows(logits)
    scratch = Scratch(teacher)
    product = rounded or head.dtype
    sums = sum_dtype(product)
    with no_autocast(teacher):
        made = Head(head, None, columns=columns, dtype=product, logits_dtype=sums, scratch=scratch)
        given = flat(teacher)
        projection: Optional[Head] = None
        dtype = logits.dtype
        if source is not None:
            rounding, dtype = product_dtypes(teacher, product_dtype, None)
            projection = Head(*source, columns=columns, dtype=rounding, logits_dtype=dtype, scratch=scratch)
            given = given.to(rounding).contiguous()
        expectation = teacher.new_empty((num, head.shape[1]), dtype=sums)
        entropy = teacher.new_empty(num, dtype=sums)
        weighted = None if offset is None else offset[:columns].to(product).to(sums)
        of_bias = None if weighted is None else torch.empty_like(entropy)
        fp16_range = Fp16Range(entropy.new_ones(()), False) if product == torch.float16 else None
        nothing = made.weight.new_zeros(())
        widened = 0 if dtype == sums else sums.itemsize
        row_bytes = made.row_bytes(columns) + columns * (dtype.itemsize + widened)
        for rows, count in even_chunks(None, num, chunk_rows(chunk_bytes, teacher.device, row_bytes)):
            scores = scratch.logits("teacher logits", count, columns, dtype)
            if projection is None:
                scores.copy_(given[rows, :columns])
            else:
                projection.project(given[rows], scores)
            scores = scratch.converted("teacher scores", scores, sums)
            p = scratch.logits("probabilities", count, columns, sums)
            some = temperature[rows] if isinstance(temperature, Tensor) else temperature
            entropy[rows] = _probabilities(scores, p, some, cap)
            if of_bias is not None and weighted is not None:
                of_bias[rows] = torch.mv(p, weighted)
            # Of p all bits of the sums count: what it loses here no training gets back.
            found = made.backward(
                p,
                nothing.expand(count, head.shape[1]),
                wants_dhidden=True,
                dweight=None,
                dbias=None,
                fp16_range=fp16_range,
                with_residual=True,
            )
            assert found is not None
            expectation[rows] = found
    return TeacherExpectation(
        expectation.reshape(*rows_shape, head.shape[1]),
        entropy.reshape(rows_shape),
        None if of_bias is None else of_bias.reshape(rows_shape),
        temperature.reshape(rows_shape) if isinstance(temperature, Tensor) else temperature,
    )


def _probabilities(scores: Tensor, out: Tensor, temperature: PerRow, softcap: float) -> Tensor:
    """Write ``softmax(scores / T)`` to ``out [R, V]`` and return its entropy ``[R]``; the scores are gone then."""
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    # The largest is taken off first: logits of 1e4 keep their bits.
    scores.sub_(scores.amax(-1, keepdim=True))
    scores.div_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    torch.exp(scores, out=out)
    total = out.sum(-1, keepdim=True)
    out.div_(total)
    # 0 log 0 is 0; a row that is NaN stays so.
    scores.clamp_(min=torch.finfo(scores.dtype).min).mul_(out)
    return total.log().squeeze(-1) - scores.sum(-1)
