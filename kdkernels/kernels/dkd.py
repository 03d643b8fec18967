"""Decoupled distillation (Zhao et al. 2022): the label's class against the rest, and the rest among themselves.

With y the label, p^ and q^ the softmax over the other columns, and (p_y, 1 - p_y) against (q_y, 1 - q_y):
loss = tau (alpha KL_2(p_y, q_y) + beta KL(p^, q^)), whose gradient is tau / T times alpha (q_y - p_y) in column y and
alpha (p_y - q_y) q^_v + beta (q^_v - p^_v) elsewhere. Two sweeps: 4 reads and 1 write of [N, V].
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import tuning
from kdkernels.kernels.arguments import (
    Logits,
    Rows,
    logits,
    num_rows,
    on_device_of,
    row_arguments,
    row_tensors,
    vectors,
)
from kdkernels.kernels.online import linear_sweep
from kdkernels.kernels.rows import (
    LN2,
    LOG2E,
    Span,
    begin_row,
    end_of,
    grid_pointer,
    load_label,
    load_tile,
    log_ratio,
    mul0,
    part_begin,
    part_end,
    parts,
    row_skew,
    softmax,
    store_tile,
    temper,
    tile_offsets,
    widen,
    zero_tiles,
)
from kdkernels.kernels.terms import linear_value, nonnegative

# Of the other columns' KL: p^ logp^ - p^ logq^.
_REST = tl.constexpr((1.0, -1.0, 0.0, 0.0))


@triton.jit
def log_sigmoids(x):
    """log(1 / (1 + exp(-x))) and log(1 / (1 + exp(x))), without overflow and of the likelier to its last bits."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    rest = tl.where(e < 0.125, log_ratio(1.0 + e, 1.0), tl.log2(1.0 + e) * LN2)
    # Below the rounding of 1 + e.
    rest = tl.where(e < 2.0**-12, e - 0.5 * e * e, rest)
    return tl.minimum(x, 0.0) - rest, tl.minimum(-x, 0.0) - rest


@triton.jit(do_not_specialize=["L", "ignore_index"])
def dkd_fwd_kernel(
    student: Logits,  # [B, L, V]
    teacher: Logits,  # [B, L, V]
    dstudent: Logits,  # [B, L, pad_width or V]
    rows: Rows,
    L,
    V,
    pad_width,
    ignore_index,
    scale,
    alpha,
    beta,
    temperature,
    teacher_temperature,
    TILE: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    index = tl.program_id(0).to(tl.int64)
    skew = row_skew(student, index, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    pad_stop = span.stop if pad_width is None else end_of(skew, pad_width, TILE)
    student_ptr = grid_pointer(student, index, skew, L, TILE)
    teacher_ptr = grid_pointer(teacher, index, skew, L, TILE)
    dstudent_ptr = grid_pointer(dstudent, index, skew, L, TILE) if GRAD else None
    offs_tile = tile_offsets(TILE)
    row = begin_row(
        student_ptr,
        dstudent_ptr,
        rows,
        index=index,
        span=span,
        pad_stop=pad_stop,
        TILE=TILE,
        ignore_index=ignore_index,
        scale=scale,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        LABEL_LOGIT=True,
    )
    if row.ignored:
        return

    label = skew + row.label
    scale = row.scale
    label_t = load_label(teacher_ptr, row.label, span, None)
    unit_s, unit_t, ratio = temper(temperature, teacher_temperature)
    student_scale = LOG2E * unit_s
    teacher_scale = LOG2E * unit_t
    student_norm, teacher_norm, rest, _, _, _, _, raw_s, raw_t = linear_sweep(
        student_ptr,
        (teacher_ptr,),
        (1.0,),
        span=span,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        ratio=ratio,
        COEFFICIENTS=_REST,
        TILE=TILE,
        skipped=label,
    )
    rest = linear_value(
        _REST, rest * unit_t, teacher_norm[4], student_norm[4], log_ratio(teacher_norm[4], student_norm[4])
    )
    # With one column there is no rest.
    rest = tl.where(V == 1, 0.0, nonnegative(rest, _REST, False))
    # Log odds of the label against the rest. Of a class and the rest the less likely one is known to its last bits.
    odds_q = (row.label_logit - student_norm[0]) * unit_s - log_ratio(student_norm[4], 1.0)
    odds_p = (label_t - teacher_norm[0]) * unit_t - log_ratio(teacher_norm[4], 1.0)
    logp_y, logp_n = log_sigmoids(odds_p)
    logq_y, logq_n = log_sigmoids(odds_q)
    p_y = tl.exp2(logp_y * LOG2E)
    q_y = tl.exp2(logq_y * LOG2E)
    p_n = tl.exp2(logp_n * LOG2E)
    q_n = tl.exp2(logq_n * LOG2E)
    target = nonnegative(mul0(p_y, logp_y - logq_y) + mul0(p_n, logp_n - logq_n), _REST, False)
    # A term of weight 0 is none, be it infinite.
    tl.store(rows.loss + row.index, (mul0(alpha, target) + mul0(beta, rest)) * scale)

    if GRAD:
        scale *= unit_s
        away = mul0(scale * alpha, tl.where(odds_p > 0, q_n - p_n, p_y - q_y))
        num_tiles = tl.cdiv(span.stop, BLOCK_V)
        # The tile that the sweep before ended with is here still: it is written out before the others.
        for PART in tl.static_range(parts(TILE)):
            for k in range(part_begin(num_tiles, PART, True, TILE), part_end(num_tiles, PART, TILE)):
                start = k * BLOCK_V
                if PART > 0:
                    raw_s = load_tile(student_ptr, start, span, TILE, PART)
                    raw_t = load_tile(teacher_ptr, start, span, TILE, PART)
                q = softmax(widen(raw_s), student_norm)[0]
                p = softmax(widen(raw_t), teacher_norm)[0]
                g = tl.where(start + offs_tile == label, -away, away * q + scale * beta * (q - p))
                store_tile(dstudent_ptr, start, span, g, TILE)
        if pad_width is not None:
            zero_tiles(dstudent_ptr, Span(span.stop, pad_stop), TILE)


def dkd_fwd(
    student: Tensor,
    teacher: Tensor,
    dstudent: Optional[Tensor],
    labels: Tensor,
    row_weight: Optional[Tensor],
    *,
    alpha: float,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    vocab_size: int,
    ignore_index: int,
    scale: float,
    scale_by_t_squared: bool,
) -> Tensor:
    """Loss of every row, and its gradient where dstudent is given, in one launch.

    Args:
        student, teacher: logits [B, L, V] or [N, V] with unit last stride.
        dstudent: written, of the student's shape; may be the student itself.
        labels: int64 [N]. row_weight: fp32 [N], any stride.

    Returns:
        Loss fp32 [N].
    """
    N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    if N == 0:
        return loss
    if not (alpha or beta):
        # Without any term nothing of the logits counts, be it NaN.
        if dstudent is not None:
            dstudent.zero_()
        return loss.zero_()
    vec, cut = vectors(vocab_size, student, teacher, dstudent)
    shape = tuning.shape(vocab_size, max(student.element_size(), teacher.element_size()), load=tuning.MEDIUM, vec=vec)
    with on_device_of(student):
        dkd_fwd_kernel[(N,)](
            **row_arguments(student, [teacher], dstudent, vocab_size),
            teacher=logits(teacher),
            rows=row_tensors(loss, labels, row_weight),
            ignore_index=ignore_index,
            scale=scale * temperature * temperature if scale_by_t_squared else scale,
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            TILE=(*shape.TILE, cut),
            num_warps=shape.num_warps,
            # As in the dense pattern: equal logits must give exactly 0.
            enable_fp_fusion=False,
        )
    return loss
