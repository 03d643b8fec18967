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
from kdkernels.kernels.rows import (
    Span,
    begin_row,
    end_of,
    fold_sum,
    grid_pointer,
    inside,
    lane_zeros,
    load_tile,
    part_begin,
    part_end,
    parts,
    row_skew,
    store_tile,
    tile_offsets,
    widen,
    zero_tiles,
)


@triton.jit
def difference(raw_s, raw_t, offs_v, span):
    """s - t of one tile, 0 outside the row."""
    return tl.where(inside(offs_v, span), widen(raw_s) - widen(raw_t), 0.0)


@triton.jit(do_not_specialize=["L", "ignore_index"])
def mse_fwd_kernel(
    student: Logits,  # [B, L, V]
    teacher: Logits,  # [B, L, V]
    dstudent: Logits,  # [B, L, pad_width or V]
    rows: Rows,
    L,
    V,
    pad_width,
    ignore_index,
    scale,
    CENTERED: tl.constexpr,
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
    )
    if row.ignored:
        return

    num_tiles = tl.cdiv(span.stop, BLOCK_V)
    slope = 2.0 * row.scale / V
    raw_s = load_tile(student_ptr, 0, span, TILE)
    raw_t = load_tile(teacher_ptr, 0, span, TILE)
    pilot = 0.0
    if CENTERED:
        # Deviations from the first tile's mean: a large common shift of the logits cancels before it is squared.
        pilot = tl.sum(fold_sum(difference(raw_s, raw_t, offs_tile, span)), axis=0)
        pilot /= tl.minimum(V, BLOCK_V - span.start)
    total = lane_zeros(TILE)
    squares = lane_zeros(TILE)
    for PART in tl.static_range(parts(TILE)):
        for k in range(part_begin(num_tiles, PART, True, TILE), part_end(num_tiles, PART, TILE)):
            start = k * BLOCK_V
            if PART > 0:
                raw_s = load_tile(student_ptr, start, span, TILE, PART)
                raw_t = load_tile(teacher_ptr, start, span, TILE, PART)
            d = difference(raw_s, raw_t, start + offs_tile, span)
            if GRAD and not CENTERED:
                store_tile(dstudent_ptr, start, span, d * slope, TILE)
            if CENTERED:
                d = tl.where(inside(start + offs_tile, span), d - pilot, 0.0)
                total += fold_sum(d)
            squares += fold_sum(d * d)
    loss = tl.sum(squares, axis=0) / V
    if CENTERED:
        mean = tl.sum(total, axis=0) / V
        loss -= mean * mean
        if GRAD:
            # From the end, with the tile that is here still.
            for PART in tl.static_range(parts(TILE)):
                for k in range(part_begin(num_tiles, PART, True, TILE), part_end(num_tiles, PART, TILE)):
                    start = (num_tiles - 1 - k) * BLOCK_V
                    if PART > 0:
                        raw_s = load_tile(student_ptr, start, span, TILE, PART)
                        raw_t = load_tile(teacher_ptr, start, span, TILE, PART)
                    d = difference(raw_s, raw_t, start + offs_tile, span)
                    store_tile(dstudent_ptr, start, span, (d - pilot - mean) * slope, TILE)
    if GRAD and pad_width is not None:
        zero_tiles(dstudent_ptr, Span(span.stop, pad_stop), TILE)
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
    vec, cut = vectors(vocab_size, student, teacher, dstudent)
    shape = tuning.shape(vocab_size, max(student.element_size(), teacher.element_size()), wide=True, vec=vec)
    with on_device_of(student):
        mse_fwd_kernel[(N,)](
            **row_arguments(student, [teacher], dstudent, vocab_size),
            teacher=logits(teacher),
            rows=row_tensors(loss, labels, row_weight),
            ignore_index=ignore_index,
            scale=scale,
            CENTERED=centered,
            TILE=(*shape.TILE, cut),
            num_warps=shape.num_warps,
            enable_fp_fusion=True,
        )
    return loss
