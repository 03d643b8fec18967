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
from kdkernels.kernels.online import linear_sweep
from kdkernels.kernels.rows import (
    LN2,
    LOG2E,
    aligned_width,
    contiguous,
    load_logits,
    log_ratio,
    mul0,
    num_rows,
    on_device_of,
    row_offset,
    row_strides,
    softmax,
    store_gradient,
    temper,
    tile_offsets,
    zero_columns,
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
    student_ptr,  # [B, L, V]
    teacher_ptr,  # [B, L, V]
    dstudent_ptr,  # [B, L, pad_width or V]
    labels_ptr,  # [N]
    row_weight_ptr,  # [N]
    loss_ptr,  # [N]
    stride_sb,
    stride_sl,
    stride_tb,
    stride_tl,
    stride_db,
    stride_dl,
    stride_wn,
    L,
    V,
    load_width,
    pad_width,
    ignore_index,
    scale,
    alpha,
    beta,
    temperature,
    teacher_temperature,
    TILE: tl.constexpr,
):
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    student_ptr += row_offset(row, L, stride_sb, stride_sl)
    teacher_ptr += row_offset(row, L, stride_tb, stride_tl)
    if dstudent_ptr is not None:
        dstudent_ptr += row_offset(row, L, stride_db, stride_dl)
    label = tl.load(labels_ptr + row64)
    if label == ignore_index:
        if dstudent_ptr is not None:
            zero_columns(dstudent_ptr, 0, V if pad_width is None else pad_width, TILE)
        tl.store(loss_ptr + row64, 0.0)
        return
    if row_weight_ptr is not None:
        scale *= tl.load(row_weight_ptr + row64 * stride_wn)

    # A label out of range reads nothing and makes the row's loss NaN.
    inside = (label >= 0) & (label < V)
    label_s = tl.load(student_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    label_t = tl.load(teacher_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    unit_s, unit_t, ratio = temper(temperature, teacher_temperature)
    student_scale = LOG2E * unit_s
    teacher_scale = LOG2E * unit_t
    student_norm, teacher_norm, rest, _, _, _, _ = linear_sweep(
        student_ptr,
        (teacher_ptr,),
        (1.0,),
        None,
        label,
        V,
        load_width,
        None,
        None,
        student_scale,
        teacher_scale,
        ratio,
        _REST,
        False,
        False,
        False,
        TILE,
    )
    rest = linear_value(
        _REST, rest * unit_t, teacher_norm[4], student_norm[4], log_ratio(teacher_norm[4], student_norm[4])
    )
    # With one column there is no rest.
    rest = tl.where(V == 1, 0.0, nonnegative(rest, _REST, False))
    # Log odds of the label against the rest. Of a class and the rest the less likely one is known to its last bits.
    odds_q = (label_s - student_norm[0]) * unit_s - log_ratio(student_norm[4], 1.0)
    odds_p = (label_t - teacher_norm[0]) * unit_t - log_ratio(teacher_norm[4], 1.0)
    logp_y, logp_n = log_sigmoids(odds_p)
    logq_y, logq_n = log_sigmoids(odds_q)
    p_y = tl.exp2(logp_y * LOG2E)
    q_y = tl.exp2(logq_y * LOG2E)
    p_n = tl.exp2(logp_n * LOG2E)
    q_n = tl.exp2(logq_n * LOG2E)
    target = nonnegative(mul0(p_y, logp_y - logq_y) + mul0(p_n, logp_n - logq_n), _REST, False)
    # A term of weight 0 is none, be it infinite.
    tl.store(loss_ptr + row64, (mul0(alpha, target) + mul0(beta, rest)) * scale)

    if dstudent_ptr is not None:
        scale *= unit_s
        away = mul0(scale * alpha, tl.where(odds_p > 0, q_n - p_n, p_y - q_y))
        offs_tile = tile_offsets(TILE)
        num_tiles = tl.cdiv(V, BLOCK_V)
        for k in range(num_tiles):
            offs_v = (num_tiles - 1 - k) * BLOCK_V + offs_tile
            s = load_logits(student_ptr, offs_v, V, load_width, None, False)
            t = load_logits(teacher_ptr, offs_v, V, load_width, None, False)
            q = softmax(s, student_norm)[0]
            p = softmax(t, teacher_norm)[0]
            g = tl.where(offs_v == label, -away, away * q + scale * beta * (q - p))
            store_gradient(dstudent_ptr, offs_v, g, V, pad_width)
        if pad_width is not None:
            zero_columns(dstudent_ptr, num_tiles * BLOCK_V, pad_width, TILE)


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
    L, N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    if N == 0:
        return loss
    if not (alpha or beta):
        # Without any term nothing of the logits counts, be it NaN.
        if dstudent is not None:
            dstudent.zero_()
        return loss.zero_()
    width = student.shape[-1]
    shape = tuning.shape(vocab_size, max(student.element_size(), teacher.element_size()))
    stride_sb, stride_sl = row_strides(student)
    stride_tb, stride_tl = row_strides(teacher)
    stride_db, stride_dl = row_strides(dstudent)
    with on_device_of(student):
        dkd_fwd_kernel[(N,)](
            student,
            teacher,
            dstudent,
            contiguous(labels),
            row_weight,
            loss,
            stride_sb,
            stride_sl,
            stride_tb,
            stride_tl,
            stride_db,
            stride_dl,
            None if row_weight is None else row_weight.stride(0),
            L,
            vocab_size,
            aligned_width(vocab_size, student, teacher),
            None if width == vocab_size else width,
            ignore_index,
            scale * temperature * temperature if scale_by_t_squared else scale,
            alpha,
            beta,
            temperature,
            teacher_temperature,
            TILE=shape.TILE,
            num_warps=shape.num_warps,
            # As in the dense pattern: equal logits must give exactly 0.
            enable_fp_fusion=False,
        )
    return loss
