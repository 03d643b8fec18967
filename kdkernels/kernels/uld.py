"""Universal logit distillation of 16-bit logits: the distance of sorted probabilities, without a sort.

A program takes rows in turn. It counts a row's logits by their bits in memory of its own, which L2 holds, in the order
from the largest down; the running sum of the counters is the rank at which a value begins. Spread over the ranks, the
values of both models are compared rank by rank; the signs of a value's ranks are a difference of running sums. So loss
and gradient take three reads of the logits and a write, and a pass over the counters and the ranks each. Counts are
integers: the result is the same every time.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels.arguments import (
    Logits,
    Rows,
    logits,
    num_rows,
    on_device_of,
    row_arguments,
    row_tensors,
)
from kdkernels.kernels.rows import row_offset

# Counters of a row and side: one for each number of 16 bits.
COUNTERS = 65536
BLOCK = 4096
NUM_WARPS = 16
# Rows at a time where a device does not say how many multiprocessors it has.
PROGRAMS = 64
LOG2E = tl.constexpr(1.4426950408889634)
# An exponential of 2^-150 is 0.
LOWEST = tl.constexpr(150.0)


@triton.jit
def key_of(x):
    """The place of a 16-bit number among all, as an integer: larger for larger numbers, one for both zeros."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    bits = tl.where(bits == 0x8000, 0, bits)
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


@triton.jit
def number_of(key, DTYPE: tl.constexpr):
    """The number at a place, in fp32."""
    bits = tl.where(key >= 0x8000, key - 0x8000, 0xFFFF - key)
    return bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def power(x, top, scale):
    return tl.exp2((x - top) * scale)


@triton.jit
def count_row(row_ptr, V, scale, counts, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Counts a row, the largest number first, and replaces the counters by the ranks at which they begin.

    Returns the place of the largest number, how many places there are whose exponentials are not 0, the ranks they
    take, the sum of exponentials, and whether the row has a distribution.
    """
    # The keys of infinity and its negative.
    HIGHEST: tl.constexpr = 0xFF80 if DTYPE == tl.bfloat16 else 0xFC00
    NOTHING: tl.constexpr = 0xFFFF - HIGHEST
    offs = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], NOTHING, tl.int32)
    low = tl.full([BLOCK], HIGHEST, tl.int32)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + offs, mask=start + offs < V, other=float("-inf"))
        key = key_of(x)
        high = tl.maximum(high, key)
        low = tl.minimum(low, key)
    first = tl.max(high, axis=0)
    # NaN is above infinity or below its negative.
    sound = (first < HIGHEST) & (first > NOTHING) & (tl.min(low, axis=0) >= NOTHING)
    top = tl.max(number_of(tl.full([BLOCK], 0, tl.int32) + first, DTYPE), axis=0)
    furthest = key_of((tl.zeros([BLOCK], tl.float32) + (top - LOWEST / scale)).to(DTYPE))
    places = tl.where(sound, first - tl.max(furthest, axis=0) + 1, 0)
    for start in range(0, places, BLOCK):
        tl.store(counts + start + offs, 0, mask=start + offs < places)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        inside = start + offs < V
        x = tl.load(row_ptr + start + offs, mask=inside, other=float("-inf"))
        place = first - key_of(x)
        tl.atomic_add(counts + place, 1, mask=inside & (place < places) & (place >= 0), sem="relaxed")
    tl.debug_barrier()
    ranks = 0
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, places, BLOCK):
        place = start + offs
        here = tl.load(counts + place, mask=place < places, other=0, cache_modifier=".cg")
        ends = tl.cumsum(here, axis=0) + ranks
        x = number_of(tl.maximum(first - place, 0), DTYPE)
        total += tl.where(here > 0, here.to(tl.float32) * power(x, top, scale), 0.0)
        tl.store(counts + place, ends - here, mask=place < places)
        ranks += tl.sum(here, axis=0)
    tl.debug_barrier()
    return first, places, ranks, top, tl.sum(total, axis=0), sound


@triton.jit
def begins_and_ends(counts, place, places, ranks):
    """The ranks of a place: from the first to past the last."""
    begin = tl.load(counts + place, mask=place < places, other=0, cache_modifier=".cg")
    end = tl.load(counts + place + 1, mask=place + 1 < places, other=0, cache_modifier=".cg")
    return begin, tl.where(place + 1 < places, end, tl.where(place < places, ranks, 0))


@triton.jit
def spread(counts, places, ranks, by_rank, BLOCK: tl.constexpr):
    """Writes to the first rank of every place that has some which place it is, and -1 to the others."""
    offs = tl.arange(0, BLOCK)
    for start in range(0, ranks, BLOCK):
        tl.store(by_rank + start + offs, -1, mask=start + offs < ranks)
    tl.debug_barrier()
    for start in range(0, places, BLOCK):
        place = start + offs
        begin, end = begins_and_ends(counts, place, places, ranks)
        tl.store(by_rank + begin, place, mask=end > begin)
    tl.debug_barrier()


@triton.jit
def probability(by_rank, rank, ranks, before, first, top, scale, z, DTYPE: tl.constexpr):
    """The probabilities at some ranks, and the place at the last of them."""
    place = tl.load(by_rank + rank, mask=rank < ranks, other=-1, cache_modifier=".cg")
    place = tl.maximum(tl.associative_scan(place, 0, larger), before)
    x = number_of(tl.maximum(first - place, 0), DTYPE)
    return tl.where(rank < ranks, power(x, top, scale) / z, 0.0), tl.max(place, axis=0)


@triton.jit(do_not_specialize=["N", "L", "ignore_index"])
def uld_fwd_kernel(
    student: Logits,  # [B, L, V]
    teacher: Logits,  # [B, L, teacher_V]
    dstudent: Logits,  # [B, L, pad_width or V]
    rows: Rows,
    scratch,  # int32 [programs, 2 * 65536 + 2 * width]
    N,
    L,
    V,
    teacher_V,
    width,
    pad_width,
    ignore_index,
    scale,
    temperature,
    teacher_temperature,
    COUNTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    S_DTYPE: tl.constexpr = student.ptr.dtype.element_ty
    T_DTYPE: tl.constexpr = teacher.ptr.dtype.element_ty
    offs = tl.arange(0, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    of_student = scratch + program * (2 * COUNTERS + 2 * width)
    of_teacher = of_student + COUNTERS
    student_ranks = of_teacher + COUNTERS
    teacher_ranks = student_ranks + width
    for before in range(0, N - tl.program_id(0), tl.num_programs(0)):
        row = program + before
        counted = True
        if rows.labels is not None:
            counted = tl.load(rows.labels + row) != ignore_index
        row_scale = scale
        if rows.weight is not None:
            row_scale *= tl.load(rows.weight + row * rows.weight_stride)
        T = temperature
        if rows.temperature is not None:
            T = tl.load(rows.temperature + row)
        T_t = teacher_temperature
        if rows.teacher_temperature is not None:
            T_t = tl.load(rows.teacher_temperature + row)
        s_scale = LOG2E / T
        t_scale = LOG2E / T_t
        s_ptr = student.ptr + row_offset(row, L, student.stride_b, student.stride_l)
        t_ptr = teacher.ptr + row_offset(row, L, teacher.stride_b, teacher.stride_l)
        if counted:
            first, places, ranks, top, z, sound = count_row(s_ptr, V, s_scale, of_student, S_DTYPE, BLOCK)
            t_first, t_places, t_ranks, t_top, t_z, t_sound = count_row(
                t_ptr, teacher_V, t_scale, of_teacher, T_DTYPE, BLOCK
            )
            spread(of_student, places, ranks, student_ranks, BLOCK)
            spread(of_teacher, t_places, t_ranks, teacher_ranks, BLOCK)
            area = tl.zeros([BLOCK], tl.float32)
            place = -1
            t_place = -1
            signs = 0
            for start in range(0, tl.maximum(ranks, t_ranks), BLOCK):
                rank = start + offs
                q, place = probability(student_ranks, rank, ranks, place, first, top, s_scale, z, S_DTYPE)
                p, t_place = probability(teacher_ranks, rank, t_ranks, t_place, t_first, t_top, t_scale, t_z, T_DTYPE)
                area += tl.abs(q - p)
                if GRAD:
                    # Equal but for rounding is equal: 64 epsilons.
                    least = q * 7.62939453125e-06
                    sign = (q - p > least).to(tl.int32) - (p - q > least).to(tl.int32)
                    tl.store(student_ranks + rank, tl.cumsum(sign, axis=0) + signs, mask=rank < ranks)
                    signs += tl.sum(sign, axis=0)
            loss = tl.where(sound & t_sound, tl.sum(area, axis=0), float("nan"))
            tl.store(rows.loss + row, loss * row_scale)
            if GRAD:
                tl.debug_barrier()
                mean = tl.zeros([BLOCK], tl.float32)
                for start in range(0, places, BLOCK):
                    at = start + offs
                    begin, end = begins_and_ends(of_student, at, places, ranks)
                    some = end > begin
                    upto = tl.load(student_ranks + end - 1, mask=some, other=0, cache_modifier=".cg")
                    until = tl.load(student_ranks + begin - 1, mask=some & (begin > 0), other=0, cache_modifier=".cg")
                    sums = (upto - until).to(tl.float32)
                    x = number_of(tl.maximum(first - at, 0), S_DTYPE)
                    mean += tl.where(some, power(x, top, s_scale) / z * sums, 0.0)
                    each = tl.where(some, sums / tl.maximum(end - begin, 1).to(tl.float32), 0.0)
                    # The teacher's counters are done with.
                    tl.store(of_teacher + at, each.to(tl.int32, bitcast=True), mask=at < places)
                tl.debug_barrier()
                less = tl.sum(mean, axis=0)
                slope = tl.where(sound & t_sound, row_scale / T, float("nan"))
                d_ptr = dstudent.ptr + row_offset(row, L, dstudent.stride_b, dstudent.stride_l)
                for start in range(0, V, BLOCK):
                    inside = start + offs < V
                    x = tl.load(s_ptr + start + offs, mask=inside, other=float("-inf"))
                    at = first - key_of(x)
                    counts = inside & (at < places) & (at >= 0)
                    each = tl.load(of_teacher + at, mask=counts, other=0, cache_modifier=".cg")
                    q = tl.where(counts, power(x.to(tl.float32), top, s_scale) / z, 0.0)
                    dx = slope * (q * (each.to(tl.float32, bitcast=True) - less))
                    tl.store(d_ptr + start + offs, dx.to(S_DTYPE), mask=inside)
                if pad_width is not None:
                    for start in range(0, pad_width - V, BLOCK):
                        tl.store(
                            d_ptr + V + start + offs, tl.zeros([BLOCK], S_DTYPE), mask=V + start + offs < pad_width
                        )
                # The next row begins with this memory.
                tl.debug_barrier()
        else:
            tl.store(rows.loss + row, 0.0)
            if GRAD:
                d_ptr = dstudent.ptr + row_offset(row, L, dstudent.stride_b, dstudent.stride_l)
                end = V if pad_width is None else pad_width
                for start in range(0, end, BLOCK):
                    tl.store(d_ptr + start + offs, tl.zeros([BLOCK], S_DTYPE), mask=start + offs < end)


def uld_fwd(
    student: Tensor,
    teacher: Tensor,
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_weight: Optional[Tensor],
    student_temperature_rows: Optional[Tensor],
    teacher_temperature_rows: Optional[Tensor],
    *,
    vocab_size: int,
    teacher_vocab_size: int,
    ignore_index: int,
    scale: float,
    temperature: float,
    teacher_temperature: float,
    exact: bool,
) -> Tensor:
    """Loss of every row, and its gradient where dstudent is given, in one launch.

    Args:
        student: logits [B, L, V] or [N, V] of 16 bits with unit last stride.
        teacher: the same of another width; the dtypes may differ.
        dstudent: written, of the student's shape; may be the student itself.
        labels: int64 [N] or None. row_weight: fp32 [N], any stride. temperatures: fp32 [N] or None.
        exact: counts of 16-bit logits are.

    Returns:
        Loss fp32 [N].
    """
    N = num_rows(student)
    loss = student.new_empty(N, dtype=torch.float32)
    if N == 0:
        return loss
    width = max(vocab_size, teacher_vocab_size)
    programs = min(N, _multiprocessors(student.device))
    scratch = torch.empty(programs, 2 * (COUNTERS + width), dtype=torch.int32, device=student.device)
    with on_device_of(student):
        uld_fwd_kernel[(programs,)](
            **row_arguments(student, [teacher], dstudent, vocab_size),
            teacher=logits(teacher),
            rows=row_tensors(
                loss,
                labels,
                row_weight,
                temperature=student_temperature_rows,
                teacher_temperature=teacher_temperature_rows,
            ),
            scratch=scratch,
            N=N,
            teacher_V=teacher_vocab_size,
            width=width,
            ignore_index=ignore_index,
            scale=scale,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            COUNTERS=COUNTERS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return loss


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
