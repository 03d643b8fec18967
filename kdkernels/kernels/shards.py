"""Some of the columns of rows whose softmax is known, one program a row: the sums of a divergence (2 reads of [N, V]),
or its gradient (2 and 1 write)."""

from __future__ import annotations

from typing import Any, Optional

import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import divergences, tuning
from kdkernels.kernels.arguments import (
    Logits,
    contiguous,
    logits,
    num_rows,
    on_device_of,
    row_arguments,
    vectors,
)
from kdkernels.kernels.rows import (
    LOG2E,
    Span,
    end_of,
    fold_sum,
    grid_pointer,
    inside,
    lane_zeros,
    load_tile,
    logits_of,
    part_begin,
    part_end,
    parts,
    row_skew,
    store_tile,
    tile_offsets,
    zero_tiles,
)
from kdkernels.kernels.terms import score_of, statistics_of, through_cap, value_of
from kdkernels.ops import SHARD_NUMBERS, SHARD_SUMS

COUNT = tl.constexpr(len(SHARD_NUMBERS))
NUM_SUMS = tl.constexpr(len(SHARD_SUMS))


@triton.jit(do_not_specialize=["L"])
def shard_kernel(
    student: Logits,  # [B, L, V]
    teacher: Logits,  # [B, L, V]
    dstudent: Logits,  # [B, L, pad_width or V]
    labels_ptr,  # [N]
    numbers_ptr,  # [N, COUNT]
    param_ptr,  # [N]
    sums_ptr,  # [N, 2], or [N, NUM_SUMS] with STATS
    L,
    V,
    pad_width,
    param0,
    param1,
    student_softcap,
    teacher_softcap,
    COEFFICIENTS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    TOTAL: tl.constexpr,
    STATS: tl.constexpr,
    TILE: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    index = tl.program_id(0).to(tl.int64)
    SUMS: tl.constexpr = NUM_SUMS if STATS else 2
    sums_ptr += index * SUMS
    numbers_ptr += index * COUNT
    unit_s = tl.load(numbers_ptr)
    skew = row_skew(student, index, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    student_ptr = grid_pointer(student, index, skew, L, TILE)
    teacher_ptr = grid_pointer(teacher, index, skew, L, TILE)
    num_tiles = tl.cdiv(span.stop, BLOCK_V)
    offs_tile = tile_offsets(TILE)
    if param_ptr is not None:
        param0 = tl.load(param_ptr + index)
    top_s = tl.load(numbers_ptr + 1)
    log_zs = tl.load(numbers_ptr + 2)
    unit_t = tl.load(numbers_ptr + 3)
    top_t = tl.load(numbers_ptr + 4)
    log_zt = tl.load(numbers_ptr + 5)
    if GRAD:
        dstudent_ptr = grid_pointer(dstudent, index, skew, L, TILE)
        of_score = tl.load(numbers_ptr + 6)
        of_q = tl.load(numbers_ptr + 7)
        of_p = tl.load(numbers_ptr + 8)
        of_hard = tl.load(numbers_ptr + 9)
        log_z1 = tl.load(numbers_ptr + 10)
        constant = tl.load(numbers_ptr + 11)
        at_label = tl.load(numbers_ptr + 12)
        label = -1
        if labels_ptr is not None:
            label64 = tl.load(labels_ptr + index)
            label = tl.where(label64 < 0, -1, label64).to(tl.int32)
        if pad_width is not None:
            zero_tiles(dstudent_ptr, Span(span.stop, end_of(skew, pad_width, TILE)), TILE)
        soft = (of_score != 0) | (of_q != 0) | (of_p != 0)
        if (soft == 0) & (of_hard == 0) & (constant == 0) & ((at_label == 0) | (label < 0)):
            zero_tiles(dstudent_ptr, span, TILE)
            return
    elif unit_s == 0:
        for k in tl.static_range(SUMS):
            tl.store(sums_ptr + k, 0.0)
        return

    raw_s = load_tile(student_ptr, 0, span, TILE)
    raw_t = load_tile(teacher_ptr, 0, span, TILE)
    values = lane_zeros(TILE)
    scores = lane_zeros(TILE)
    forwards = lane_zeros(TILE)
    reverses = lane_zeros(TILE)
    entropies_p = lane_zeros(TILE)
    entropies_q = lane_zeros(TILE)
    overlaps = lane_zeros(TILE)
    for PART in tl.static_range(parts(TILE)):
        for k in range(part_begin(num_tiles, PART, True, TILE), part_end(num_tiles, PART, TILE)):
            start = k * BLOCK_V
            offs_v = start + offs_tile
            if PART > 0:
                raw_s = load_tile(student_ptr, start, span, TILE, PART)
                raw_t = load_tile(teacher_ptr, start, span, TILE, PART)
            s = logits_of(raw_s, offs_v, span, student_softcap, False)
            t = logits_of(raw_t, offs_v, span, teacher_softcap, False)
            logq = (s - top_s) * unit_s - log_zs
            logp = (t - top_t) * unit_t - log_zt
            q = tl.exp2(logq * LOG2E)
            p = tl.exp2(logp * LOG2E)
            score = score_of(p, logp, q, logq, param0, param1, COEFFICIENTS, SCORE, TOTAL)
            if GRAD:
                # A teacher without a factor may be anything.
                g = tl.where(soft, of_score * score - of_q * q + of_p * p, 0.0) + constant
                g += tl.where(of_hard != 0, of_hard * tl.exp2((s - top_s - log_z1) * LOG2E), 0.0)
                g += tl.where(offs_v - span.start == label, at_label, 0.0)
                store_tile(dstudent_ptr, start, span, through_cap(g, s, student_softcap), TILE)
            else:
                value = value_of(p, logp, q, logq, param0, param1, COEFFICIENTS, VALUE, TOTAL)
                here = inside(offs_v, span)
                values += fold_sum(tl.where(here, value, 0.0))
                scores += fold_sum(tl.where(here, score, 0.0))
                if STATS:
                    forward, reverse, entropy_p, entropy_q, overlap = statistics_of(p, logp, q, logq)
                    forwards += fold_sum(tl.where(here, forward, 0.0))
                    reverses += fold_sum(tl.where(here, reverse, 0.0))
                    entropies_p += fold_sum(tl.where(here, entropy_p, 0.0))
                    entropies_q += fold_sum(tl.where(here, entropy_q, 0.0))
                    overlaps += fold_sum(tl.where(here, overlap, 0.0))
    if not GRAD:
        tl.store(sums_ptr, tl.sum(values, axis=0))
        tl.store(sums_ptr + 1, tl.sum(scores, axis=0))
        if STATS:
            tl.store(sums_ptr + 2, tl.sum(forwards, axis=0))
            tl.store(sums_ptr + 3, tl.sum(reverses, axis=0))
            tl.store(sums_ptr + 4, tl.sum(entropies_p, axis=0))
            tl.store(sums_ptr + 5, tl.sum(entropies_q, axis=0))
            tl.store(sums_ptr + 6, tl.sum(overlaps, axis=0))


def shard_fwd(
    student: Tensor,
    teacher: Tensor,
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_numbers: Tensor,
    param_rows: Optional[Tensor],
    /,
    *,
    divergence: str,
    param0: float,
    param1: float,
    student_softcap: float,
    teacher_softcap: float,
    vocab_size: int,
    stats: bool,
) -> Tensor:
    """As ``kdkernels.ops`` says, in one launch.

    Args:
        student, teacher: logits [B, L, V] or [N, V] with unit last stride.
        dstudent: written, of the student's shape; may be the student itself.
        labels: int64 [N]. row_numbers: fp32 [N, 13]. param_rows: fp32 [N], any stride.

    Returns:
        fp32 [N, 2], [N, 7] with stats; without a row where dstudent is given.
    """
    N = num_rows(student)
    sums = row_numbers.new_empty((N if dstudent is None else 0, len(SHARD_SUMS) if stats else 2))
    if N == 0:
        return sums
    entry = divergences.lookup(divergence)
    vec, cut = vectors(vocab_size, student, teacher, dstudent)
    itemsize = max(student.element_size(), teacher.element_size())
    shape = tuning.shape(vocab_size, itemsize, wide=True, vec=vec)
    arguments: dict[str, Any] = row_arguments(student, [teacher], dstudent, vocab_size)
    with on_device_of(student):
        shard_kernel[(N,)](
            **arguments,
            teacher=logits(teacher),
            labels_ptr=contiguous(labels),
            numbers_ptr=row_numbers.contiguous(),
            param_ptr=contiguous(param_rows),
            sums_ptr=sums,
            param0=divergences.coded(divergence, param0),
            param1=param1,
            student_softcap=student_softcap or None,
            teacher_softcap=teacher_softcap or None,
            COEFFICIENTS=entry.linear,
            VALUE=entry.value,
            SCORE=entry.score,
            TOTAL=entry.total,
            STATS=stats,
            TILE=(*shape.TILE, cut),
            num_warps=shape.num_warps,
            enable_fp_fusion=True,
        )
    return sums
