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
from kdkernels.kernels.arguments import Logits, Rows, logits, num_rows, on_device_of, row_arguments, row_tensors
from kdkernels.kernels.rows import (
    begin_row,
    fold_sum,
    lane_zeros,
    load_logits,
    row_pointer,
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
    student: Logits,  # [B, L, V]
    teacher: Logits,  # [B, L, V]
    dstudent: Logits,  # [B, L, pad_width or V]
    rows: Rows,
    L,
    V,
    load_width,
    pad_width,
    ignore_index,
    scale,
    CENTERED: tl.constexpr,
    TILE: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    student_ptr = row_pointer(student, L)
    teacher_ptr = row_pointer(teacher, L)
    dstudent_ptr = row_pointer(dstudent, L) if GRAD else None
    offs_tile = tile_offsets(TILE)
    row = begin_row(
        student_ptr,
        dstudent_ptr,
        rows,
        offs_v=offs_tile,
        V=V,
        pad_width=pad_width,
        ignore_index=ignore_index,
        scale=scale,
    )
    if row.ignored:
        return

    num_tiles = tl.cdiv(V, BLOCK_V)
    slope = 2.0 * row.scale / V
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
        zero_columns(dstudent_ptr, offs_tile, num_tiles * BLOCK_V, pad_width)
    tl.store(rows.loss + row.index, loss * row.scale)


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
    N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    if N == 0:
        return loss
    shape = tuning.shape(vocab_size, max(student.element_size(), teacher.element_size()))
    with on_device_of(student):
        mse_fwd_kernel[(N,)](
            **row_arguments(student, [teacher], dstudent, vocab_size),
            teacher=logits(teacher),
            rows=row_tensors(loss, labels, row_weight),
            ignore_index=ignore_index,
            scale=scale,
            CENTERED=centered,
            TILE=shape.TILE,
            num_warps=shape.num_warps,
            enable_fp_fusion=True,
        )
    return loss
