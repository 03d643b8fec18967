"""Mean squared difference of logits: mean_v d_v^2 with d = s - t, or of d less its row mean (centred).

The gradient is 2 d / V, so the plain form takes one sweep (2 reads and 1 write of [N, V]); the centred one is the row's
variance and takes two (4 and 1).
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import tuning
from kdkernels.kernels.rows import (
    aligned_width,
    contiguous,
    fold_sum,
    lane_zeros,
    load_logits,
    num_rows,
    on_device_of,
    row_offset,
    row_strides,
    store_gradient,
    tile_offsets,
    zero_columns,
)


@triton.jit
def load_difference(student_ptr, teacher_ptr, offs_v, V, load_width):
    """s - t of one tile, 0 in columns from V on."""
    s = load_logits(student_ptr, offs_v, V, load_width, None, False)
    t = load_logits(teacher_ptr, offs_v, V, load_width, None, False)
    return tl.where(offs_v < V, s - t, 0.0)


@triton.jit(do_not_specialize=["L", "ignore_index"])
def mse_fwd_kernel(
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
    CENTERED: tl.constexpr,
    TILE: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent_ptr is not None
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    student_ptr += row_offset(row, L, stride_sb, stride_sl)
    teacher_ptr += row_offset(row, L, stride_tb, stride_tl)
    if GRAD:
        dstudent_ptr += row_offset(row, L, stride_db, stride_dl)
    if labels_ptr is not None:
        if tl.load(labels_ptr + row64) == ignore_index:
            if GRAD:
                zero_columns(dstudent_ptr, 0, V if pad_width is None else pad_width, TILE)
            tl.store(loss_ptr + row64, 0.0)
            return
    if row_weight_ptr is not None:
        scale *= tl.load(row_weight_ptr + row64 * stride_wn)

    offs_tile = tile_offsets(TILE)
    num_tiles = tl.cdiv(V, BLOCK_V)
    slope = 2.0 * scale / V
    pilot = 0.0
    if CENTERED:
        # Deviations from the first tile's mean: a large common shift of the logits cancels before it is squared.
        pilot = tl.sum(
            fold_sum(load_difference(student_ptr, teacher_ptr, offs_tile, V, load_width)), axis=0
        ) / tl.minimum(V, BLOCK_V)
    total = lane_zeros(TILE)
    squares = lane_zeros(TILE)
    for k in range(num_tiles):
        offs_v = k * BLOCK_V + offs_tile
        d = load_difference(student_ptr, teacher_ptr, offs_v, V, load_width)
        if GRAD and not CENTERED:
            store_gradient(dstudent_ptr, offs_v, d * slope, V, pad_width)
        if CENTERED:
            d = tl.where(offs_v < V, d - pilot, 0.0)
            total += fold_sum(d)
        squares += fold_sum(d * d)
    loss = tl.sum(squares, axis=0) / V
    if CENTERED:
        mean = tl.sum(total, axis=0) / V
        loss -= mean * mean
        if GRAD:
            for k in range(num_tiles):
                offs_v = (num_tiles - 1 - k) * BLOCK_V + offs_tile
                d = load_difference(student_ptr, teacher_ptr, offs_v, V, load_width)
                store_gradient(dstudent_ptr, offs_v, (d - pilot - mean) * slope, V, pad_width)
    if GRAD and pad_width is not None:
        zero_columns(dstudent_ptr, num_tiles * BLOCK_V, pad_width, TILE)
    tl.store(loss_ptr + row64, loss * scale)


def mse_fwd(
    student: Tensor,
    teacher: Tensor,
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_weight: Optional[Tensor],
    *,
    centered: bool,
    vocab_size: int,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """Loss of every row, and its gradient where dstudent is given, in one launch.

    Args:
        student, teacher: logits [B, L, V] or [N, V] with unit last stride.
        dstudent: written, of the student's shape; may be the student itself.
        labels: int64 [N] or None. row_weight: fp32 [N], any stride.

    Returns:
        Loss fp32 [N].
    """
    L, N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    if N == 0:
        return loss
    width = student.shape[-1]
    shape = tuning.shape(vocab_size, max(student.element_size(), teacher.element_size()))
    stride_sb, stride_sl = row_strides(student)
    stride_tb, stride_tl = row_strides(teacher)
    stride_db, stride_dl = row_strides(dstudent)
    with on_device_of(student):
        mse_fwd_kernel[(N,)](
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
            scale,
            CENTERED=centered,
            TILE=shape.TILE,
            num_warps=shape.num_warps,
        )
    return loss
