"""Dense losses with operands that change how rows are read, and those whose rows lie next to each other.

A program has a tile of some rows and some columns, with any stride in either: columns side by side make the rows of
``(..., V)``, rows side by side those of ``(B, C, *spatial)``. A bias is added where a logit is loaded, and a teacher of
other columns is gathered there. Rows that fit a tile are read once (2 reads and 1 write of [N, V]); of wider ones every
sweep reads both sides: normalisers, the sums of a divergence with terms in q, gradient (6 and 1, or 4 and 1). Of a
student's log-probabilities nothing is normalised, so that the teacher's normaliser and one sweep do (3 and 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import divergences
from kdkernels.kernels.arguments import Logits, Rows, Weights, num_rows, on_device_of, row_tensors, term_weights
from kdkernels.kernels.online import defined
from kdkernels.kernels.rows import LN2, LOG2E, LOWEST, NEG_INF, begin_row, reciprocal, soft_cap
from kdkernels.kernels.terms import (
    NOWHERE,
    NUM_STATS,
    divergence_scale,
    hard_terms,
    label_gradient,
    nonnegative,
    score_of,
    smoothing_center,
    statistics_of,
    through_cap,
    value_of,
    weighed,
)

PROBS_FORMS = ("probs", "unnormalized_probs")
# Elements of a tile, and columns of rows that fit one.
TILE, WIDEST = 4096, 256


class Side(NamedTuple):
    """One model's logits [B, L, V]: their stride in V, and what is added to them [V]; None: nothing."""

    logits: Any
    stride_v: Any
    offsets: Any


@triton.jit
def first_elements(logits, batch, row):
    """The first elements of some rows of an image."""
    return logits.ptr + batch.to(tl.int64) * logits.stride_b + row.to(tl.int64) * logits.stride_l


@triton.jit
def load_side(side, first, counted, offs_v, V, softcap, columns, width, PROBS: tl.constexpr):
    """Logits in fp32 of a tile [BLOCK_N, BLOCK_V], -inf from column V on, and 0 in rows that do not count."""
    real = offs_v < V
    if columns is not None:
        ids = tl.load(columns + offs_v, mask=real, other=-1)
        inside = (ids >= 0) & (ids < width)
        at = tl.where(inside, ids, 0)
        ptrs = first[:, None] + at.to(tl.int64)[None, :] * side.stride_v
        x = tl.load(ptrs, mask=counted[:, None] & inside[None, :], other=0.0).to(tl.float32)
        nothing = 0.0 if PROBS else NEG_INF
        # A column out of range is nobody's; its number must not be one.
        x = tl.where(inside[None, :], x, tl.where(ids == -1, nothing, float("nan"))[None, :])
    else:
        ptrs = first[:, None] + offs_v.to(tl.int64)[None, :] * side.stride_v
        x = tl.load(ptrs, mask=counted[:, None] & real[None, :], other=0.0).to(tl.float32)
    if PROBS:
        x = tl.log2(x) * LN2
    if side.offsets is not None:
        x += tl.load(side.offsets + offs_v, mask=real, other=0.0)[None, :]
    if softcap is not None:
        x = soft_cap(x, softcap)
    x = tl.where(counted[:, None], x, 0.0)
    return tl.where(real[None, :], x, NEG_INF)


@triton.jit
def add_to_norm(m, z, x, scale):
    """One tile more in the maxima of rows and their sums of exponentials; scale: [BLOCK_N]."""
    new = tl.maximum(m, tl.max(x, axis=1))
    return new, z * tl.exp2((m - new) * scale) + tl.sum(tl.exp2((x - new[:, None]) * scale[:, None]), axis=1)


@triton.jit
def probabilities(x, m, z, scale):
    """p and log p of a tile."""
    a = (x - m[:, None]) * scale[:, None]
    return tl.exp2(a) / z[:, None], (a - tl.log2(z)[:, None]) * LN2


@triton.jit
def add_best(best, best_at, x, offs_v):
    """The largest logit of every row and the lowest column that has it."""
    top = tl.max(x, axis=1)
    at = tl.min(tl.where(x == top[:, None], offs_v[None, :], NOWHERE), axis=1)
    take = (top > best) | ((top == best) & (at < best_at))
    return tl.where(take, top, best), tl.where(take, at, best_at)


@triton.jit(do_not_specialize=["blocks", "ignore_index"])
def mapped_fwd_kernel(
    student: Side,
    teacher: Side,
    teacher_columns,  # [V], or None
    dstudent: Logits,  # [B, L, width]
    stride_dv,
    rows: Rows,
    blocks,  # of rows, in an image
    L,
    V,
    width,
    teacher_width,
    ignore_index,
    scale,
    temperature,
    teacher_temperature,
    weights: Weights,
    student_softcap,
    teacher_softcap,
    param0,
    param1,
    COEFFICIENTS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    TOTAL: tl.constexpr,
    SCALABLE: tl.constexpr,
    TEACHER_PROBS: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    STATS: tl.constexpr = rows.stats is not None
    CE: tl.constexpr = weights.ce is not None
    LABELLED: tl.constexpr = CE or (STATS and rows.labels is not None)
    KD: tl.constexpr = weights.kd is not None
    TEACHER: tl.constexpr = KD or STATS
    # Cross entropy of log-probabilities has no normaliser, but statistics tell it.
    NORMAL: tl.constexpr = not LOG_PROBS or STATS
    HARD: tl.constexpr = (CE or weights.z_loss is not None or STATS) and NORMAL
    if COEFFICIENTS is None:
        OF_TEACHER: tl.constexpr = False
        TOTAL_SCORE: tl.constexpr = 0.0
    else:
        OF_TEACHER: tl.constexpr = COEFFICIENTS[2] == 0 and COEFFICIENTS[3] == 0
        TOTAL_SCORE: tl.constexpr = COEFFICIENTS[1]
    # The sum of the scores is a constant, or nobody asks for it.
    KNOWN: tl.constexpr = OF_TEACHER or LOG_PROBS
    VALUE_SWEEP: tl.constexpr = TEACHER and (not KNOWN or not GRAD)

    batch = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < L
    index = batch.to(tl.int64) * L + row
    offs_tile = tl.arange(0, BLOCK_V)
    first_s = first_elements(student.logits, batch, row)
    first_t = first_elements(teacher.logits, batch, row)
    values = begin_row(
        None,
        None,
        rows,
        index=index,
        span=None,
        pad_stop=None,
        TILE=None,
        ignore_index=ignore_index,
        scale=scale,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        param=param0,
        exists=exists,
    )
    counted = values.ignored == 0
    zeros = tl.zeros([BLOCK_N], tl.float32)
    row_scale = zeros + values.scale
    unit_s = reciprocal(zeros + values.temperature)
    scale_s = LOG2E * unit_s
    scale_t = LOG2E * reciprocal(zeros + values.teacher_temperature)
    param = (zeros + values.param)[:, None]
    label = tl.zeros([BLOCK_N], tl.int64) - 1
    label_logit = zeros
    center = None
    if LABELLED:
        label = tl.where(counted, values.label, -1)
        known = (label >= 0) & (label < V)
        at = tl.where(known, label, 0)
        label_logit = tl.load(first_s + at * student.stride_v, mask=known, other=float("nan")).to(tl.float32)
        if student.offsets is not None:
            label_logit += tl.load(student.offsets + at, mask=known, other=0.0)
        if student_softcap is not None:
            label_logit = soft_cap(label_logit, student_softcap)
        if weights.label_smoothing is not None:
            center = smoothing_center(label_logit)

    if ONE_TILE:
        s = load_side(student, first_s, counted, offs_tile, V, student_softcap, None, width, False)
        if TEACHER:
            t = load_side(
                teacher, first_t, counted, offs_tile, V, teacher_softcap, teacher_columns, teacher_width, TEACHER_PROBS
            )

    ms = zeros + LOWEST
    mt = zeros + LOWEST
    zs = zeros
    zt = zeros
    z1 = zeros
    centered_sum = zeros
    if NORMAL or TEACHER or center is not None:
        for start in range(0, V, BLOCK_V):
            offs_v = start + offs_tile
            if not ONE_TILE and (NORMAL or center is not None):
                s = load_side(student, first_s, counted, offs_v, V, student_softcap, None, width, False)
            if not ONE_TILE and TEACHER:
                t = load_side(
                    teacher, first_t, counted, offs_v, V, teacher_softcap, teacher_columns, teacher_width, TEACHER_PROBS
                )
            if NORMAL:
                new, zs = add_to_norm(ms, zs, s, scale_s)
                if HARD:
                    z1 = z1 * tl.exp2((ms - new) * LOG2E)
                    z1 += tl.sum(tl.exp2((s - new[:, None]) * LOG2E), axis=1)
                ms = new
            if center is not None:
                centered_sum += tl.sum(tl.where((offs_v < V)[None, :], s - center[:, None], 0.0), axis=1)
            if TEACHER:
                mt, zt = add_to_norm(mt, zt, t, scale_t)
    # NaN where nothing in a row is finite.
    ms, _, _, _, zs = defined((ms, zeros, zeros, zeros, zs))
    mt, _, _, _, zt = defined((mt, zeros, zeros, zeros, zt))

    value = zeros
    score_sum = zeros + TOTAL_SCORE
    forward = zeros
    reverse = zeros
    entropy_p = zeros
    entropy_q = zeros
    overlap = zeros
    best_s = zeros + NEG_INF
    best_t = zeros + NEG_INF
    at_s = tl.zeros([BLOCK_N], tl.int32)
    at_t = tl.zeros([BLOCK_N], tl.int32)
    if VALUE_SWEEP or STATS:
        if not KNOWN:
            score_sum = zeros
        for start in range(0, V, BLOCK_V):
            offs_v = start + offs_tile
            if not ONE_TILE:
                s = load_side(student, first_s, counted, offs_v, V, student_softcap, None, width, False)
                t = load_side(
                    teacher, first_t, counted, offs_v, V, teacher_softcap, teacher_columns, teacher_width, TEACHER_PROBS
                )
            p, logp = probabilities(t, mt, zt, scale_t)
            if LOG_PROBS:
                q = tl.exp2(s * LOG2E)
                logq = s
            else:
                q, logq = probabilities(s, ms, zs, scale_s)
            if VALUE_SWEEP:
                value += tl.sum(value_of(p, logp, q, logq, param, param1, COEFFICIENTS, VALUE, TOTAL), axis=1)
                if not KNOWN:
                    score_sum += tl.sum(score_of(p, logp, q, logq, param, param1, COEFFICIENTS, SCORE, TOTAL), axis=1)
            if STATS:
                f, r, e_p, e_q, o = statistics_of(p, logp, q, logq)
                forward += tl.sum(f, axis=1)
                reverse += tl.sum(r, axis=1)
                entropy_p += tl.sum(e_p, axis=1)
                entropy_q += tl.sum(e_q, axis=1)
                overlap += tl.sum(o, axis=1)
                best_s, at_s = add_best(best_s, at_s, s, offs_v)
                best_t, at_t = add_best(best_t, at_t, t, offs_v)

    if LOG_PROBS:
        ce, lse, hard_loss, hard_scale, lse_scale = hard_terms(
            zeros, zeros, label_logit, centered_sum, V, row_scale, weights, rows, index, LABELLED, counted
        )
        if STATS:
            lse = ms + tl.log2(z1) * LN2
    else:
        ce, lse, hard_loss, hard_scale, lse_scale = hard_terms(
            ms, tl.log2(z1), label_logit, centered_sum, V, row_scale, weights, rows, index, LABELLED, counted
        )
    if KD:
        kd_scale = divergence_scale(row_scale, weights, values.temperature, rows, index, counted)

    if GRAD:
        # All reads of a row, by any thread, come before its gradient may take its place.
        tl.debug_barrier()
        first_d = first_elements(dstudent, batch, row)
        for start in range(0, V, BLOCK_V):
            offs_v = start + offs_tile
            if not ONE_TILE:
                s = load_side(student, first_s, counted, offs_v, V, student_softcap, None, width, False)
                if KD:
                    t = load_side(
                        teacher,
                        first_t,
                        counted,
                        offs_v,
                        V,
                        teacher_softcap,
                        teacher_columns,
                        teacher_width,
                        TEACHER_PROBS,
                    )
            g = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            if KD:
                p, logp = probabilities(t, mt, zt, scale_t)
                if LOG_PROBS:
                    q = tl.exp2(s * LOG2E)
                    logq = s
                else:
                    q, logq = probabilities(s, ms, zs, scale_s)
                if not VALUE_SWEEP:
                    value += tl.sum(value_of(p, logp, q, logq, param, param1, COEFFICIENTS, VALUE, TOTAL), axis=1)
                g = score_of(p, logp, q, logq, param, param1, COEFFICIENTS, SCORE, TOTAL)
                if not LOG_PROBS:
                    g = (g - q * score_sum[:, None]) * unit_s[:, None]
                g = weighed(kd_scale[:, None], kd_scale[:, None] * g, rows)
            if (CE or weights.z_loss is not None) and not LOG_PROBS:
                g += lse_scale[:, None] * tl.exp2((s - ms[:, None]) * LOG2E) / z1[:, None]
            if CE:
                g = label_gradient(g, offs_v[None, :], label[:, None], V, hard_scale[:, None], weights.label_smoothing)
            g = through_cap(g, s, student_softcap)
            g = tl.where(counted[:, None], g, 0.0).to(dstudent.ptr.dtype.element_ty)
            to = first_d[:, None] + offs_v.to(tl.int64)[None, :] * stride_dv
            tl.store(to, g, mask=exists[:, None] & (offs_v < V)[None, :])
        for start in range(V, width, BLOCK_V):
            offs_v = start + offs_tile
            to = first_d[:, None] + offs_v.to(tl.int64)[None, :] * stride_dv
            nothing = tl.zeros([BLOCK_N, BLOCK_V], dstudent.ptr.dtype.element_ty)
            tl.store(to, nothing, mask=exists[:, None] & (offs_v < width)[None, :])

    if not LOG_PROBS:
        value = nonnegative(value, COEFFICIENTS, SCALABLE)
    loss = zeros + hard_loss
    if KD:
        loss += weighed(kd_scale, kd_scale * value, rows)
    tl.store(rows.loss + index, tl.where(counted, loss, 0.0), mask=exists)
    if STATS:
        to = rows.stats + index * NUM_STATS
        if not LOG_PROBS:
            forward = nonnegative(forward, None, True)
            reverse = nonnegative(reverse, None, True)
        agreement = tl.where(at_s == at_t, 1.0, 0.0)
        found = (value, zeros + ce, zeros + lse, forward, reverse, entropy_p, entropy_q, agreement, overlap)
        for k in tl.static_range(len(found)):
            tl.store(to + k, tl.where(counted, found[k], 0.0), mask=exists)


def _side(x: Tensor, offsets: Optional[Tensor]) -> Side:
    return Side(Logits(x, x.stride(0), x.stride(1)), x.stride(2), offsets)


def mapped_fwd(
    student: Tensor,
    teacher: Tensor,
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_weight: Optional[Tensor],
    student_temperature_rows: Optional[Tensor],
    teacher_temperature_rows: Optional[Tensor],
    param_rows: Optional[Tensor],
    kd_weight_rows: Optional[Tensor],
    ce_weight_rows: Optional[Tensor],
    z_loss_weight_rows: Optional[Tensor],
    student_offsets: Optional[Tensor] = None,
    teacher_offsets: Optional[Tensor] = None,
    teacher_columns: Optional[Tensor] = None,
    *,
    divergence: str,
    param0: float,
    param1: float,
    vocab_size: int,
    ignore_index: int,
    scale: float,
    temperature: float,
    teacher_temperature: float,
    kd_weight: float,
    ce_weight: float,
    z_loss_weight: float,
    label_smoothing: float,
    scale_by_t_squared: bool,
    teacher_form: str,
    student_form: str,
    student_softcap: float,
    teacher_softcap: float,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of every row, and its gradient where dstudent is given, in one launch.

    Args:
        student, teacher, dstudent: [B, L, V] or [N, V] with stride 1 in L or in V; dstudent may be the student itself.
        student_offsets, teacher_offsets: fp32 [vocab_size]. teacher_columns: int32 [vocab_size].

    Returns:
        As ``dense_fwd``, whose other arguments these are.
    """
    N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    row_stats = student.new_empty((N, NUM_STATS.value if stats else 0), dtype=torch.float32)
    if N == 0:
        return loss, row_stats
    student, teacher = (x if x.dim() == 3 else x[None] for x in (student, teacher))
    if dstudent is not None and dstudent.dim() == 2:
        dstudent = dstudent[None]
    entry = divergences.lookup(divergence)
    probs = teacher_form in PROBS_FORMS
    B, L, width = student.shape
    neighbours = student.stride(2) != 1 and width > 1
    columns = triton.next_power_of_2(vocab_size)
    if neighbours:
        BLOCK_V = columns if columns <= WIDEST else 64
        BLOCK_N = max(16, min(128, TILE // BLOCK_V))
    else:
        BLOCK_V = min(columns, TILE)
        BLOCK_N = max(1, 1024 // BLOCK_V)
    num_warps = max(1, min(8, BLOCK_N * BLOCK_V // 512))
    blocks = triton.cdiv(L, BLOCK_N)
    with on_device_of(student):
        mapped_fwd_kernel[(B * blocks,)](
            student=_side(student, student_offsets),
            teacher=_side(teacher, teacher_offsets),
            teacher_columns=teacher_columns,
            dstudent=Logits(None, None, None)
            if dstudent is None
            else Logits(dstudent, dstudent.stride(0), dstudent.stride(1)),
            stride_dv=None if dstudent is None else dstudent.stride(2),
            rows=row_tensors(
                loss,
                labels,
                row_weight,
                temperature=student_temperature_rows,
                teacher_temperature=teacher_temperature_rows,
                param=param_rows,
                kd_weight=kd_weight_rows,
                ce_weight=ce_weight_rows,
                z_loss_weight=z_loss_weight_rows,
                stats=row_stats if stats else None,
            ),
            blocks=blocks,
            L=L,
            V=vocab_size,
            width=width,
            teacher_width=teacher.shape[2],
            ignore_index=ignore_index,
            scale=scale,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            weights=term_weights(
                kd_weight=kd_weight,
                ce_weight=ce_weight,
                z_loss_weight=z_loss_weight,
                label_smoothing=label_smoothing,
                scale_by_t_squared=scale_by_t_squared,
                stats=stats,
            ),
            student_softcap=student_softcap or None,
            teacher_softcap=None if probs else teacher_softcap or None,
            param0=divergences.coded(divergence, param0),
            param1=param1,
            COEFFICIENTS=entry.linear,
            VALUE=entry.value,
            SCORE=entry.score,
            TOTAL=entry.total,
            SCALABLE=entry.scalable,
            TEACHER_PROBS=probs,
            LOG_PROBS=student_form == "log_probs",
            ONE_TILE=columns <= BLOCK_V,
            BLOCK_N=BLOCK_N,
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return loss, row_stats
