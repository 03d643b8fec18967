"""First sweeps over a row: normalisers, and the sums that can be had while they are found."""

import triton
import triton.language as tl

from kdkernels.kernels.rows import (
    LOG2E,
    NEG_INF,
    empty_tile,
    fold_max,
    fold_product,
    fold_sum,
    inside,
    lane_lowest,
    lane_zeros,
    load_tile,
    logits_of,
    mix_logs,
    mul0,
    part_begin,
    part_end,
    part_step,
    parts,
    rescale,
    rescale_excess,
    spread,
    tile_offsets,
)

# A lane adds its columns up before they are weighed against the row: masks of -3e38 must not pass fp32's range there.
SMALL = tl.constexpr(2.0**-12)


@triton.jit
def share_of(share, x, SIGNED: tl.constexpr):
    """A row's part of a mixture of logits; what it rules out stays ruled out, also where the share is below 0."""
    part = mul0(share, x)
    if SIGNED:
        # An infinite logit is no number.
        bound = tl.where(x == NEG_INF, NEG_INF, tl.where(x == float("inf"), float("nan"), part))
        part = tl.where(share < 0, bound, part)
    return part


@triton.jit
def load_mixed(
    row_ptrs,
    shares,
    start,
    span,
    softcap,
    PROBS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr = 0,
    SIGNED: tl.constexpr = False,
):
    """One tile of a row of logits; of several rows the sum, weighted by their shares, which may be SIGNED."""
    offs_v = start + tile_offsets(TILE)
    x = logits_of(load_tile(row_ptrs[0], start, span, TILE, PART), offs_v, span, softcap, PROBS)
    if len(row_ptrs) > 1:
        x = share_of(shares[0], x, SIGNED)
        for k in tl.static_range(1, len(row_ptrs)):
            t = logits_of(load_tile(row_ptrs[k], start, span, TILE, PART), offs_v, span, softcap, PROBS)
            x += share_of(shares[k], t, SIGNED)
        x = tl.where(inside(offs_v, span), x, NEG_INF)
    return x


@triton.jit
def add_exps(old_max, z, x, loaded, scale):
    """One tile more in the maxima of the lanes and their sums of exponentials; loaded: x, or what it was made of."""
    new_max = tl.maximum(old_max, fold_max(loaded))
    z = z * tl.exp2((old_max - new_max) * scale) + fold_sum(tl.exp2((x - spread(new_max)) * scale))
    return new_max, z


@triton.jit
def add_hard(hard, old_max, new_max, s, counted, center):
    """Lane sums for cross entropy at temperature 1: sum exp(s - max), and sum (s - center) if labels are smoothed."""
    z, total = hard
    z = z * tl.exp2((old_max - new_max) * LOG2E) + fold_sum(tl.exp2((s - spread(new_max)) * LOG2E))
    if center is not None:
        total += fold_sum(tl.where(counted, s - center, 0.0))
    return z, total


@triton.jit
def fold_norm(lane_max, lane_z, scale):
    """The row's norm, see rows.softmax, and its z, from the maxima and sums of the lanes."""
    row_max = tl.max(lane_max, axis=0)
    z = tl.sum(lane_z * tl.exp2((lane_max - row_max) * scale), axis=0)
    return row_max, scale, tl.log2(z), 1.0 / z, z


@triton.jit
def defined(norm):
    """The norm of a row, NaN where nothing in it is finite."""
    row_max, scale, log2_z, inverse_z, z = norm
    nothing = tl.where(z == 0, float("nan"), 0.0)
    return row_max, scale + nothing, log2_z, inverse_z + nothing, z + nothing


@triton.jit
def elsewhere(norm):
    """The norm of a teacher that is normalised elsewhere, and whether nothing of it is here: then all p are 0."""
    row_max, scale, log2_z, inverse_z, z = norm
    nothing = z == 0
    norm = (
        tl.where(nothing, 0.0, row_max),
        scale,
        tl.where(nothing, 0.0, log2_z),
        tl.where(nothing, 1.0, inverse_z),
        tl.where(nothing, 1.0, z),
    )
    return norm, nothing


@triton.jit
def linear_sweep(
    student_ptr,
    teacher_ptrs,
    shares,
    span,
    student_scale,
    teacher_scale,
    ratio,
    COEFFICIENTS: tl.constexpr,
    TILE: tl.constexpr,
    skipped=None,
    center=None,
    student_softcap=None,
    teacher_softcap=None,
    BOTH: tl.constexpr = False,
    TEACHER_PROBS: tl.constexpr = False,
    HARD: tl.constexpr = False,
    SIGNED: tl.constexpr = False,
):
    """First sweep of a linear divergence, from the end: the norms of both sides, and its means over p and over q.

    The means are over logits less their maxima, see rows.mix_logs: ``terms.linear_value`` makes the divergence of them,
    or of BOTH Kullback-Leibler divergences ``terms.both_mean``, and then they are sum (es - et) x / zt and the mean of
    x over q. skipped: a column that is left out, or None. Then come zs - zt, the student's norm at temperature 1, and
    its sum (s - center), and the first tile of both sides as it was loaded last, of several teachers of one.
    """
    # Logits are what was loaded: of 16 bits two maxima are one operation.
    CAPPED: tl.constexpr = student_softcap is not None or teacher_softcap is not None
    PLAIN: tl.constexpr = len(teacher_ptrs) == 1 and not CAPPED and not TEACHER_PROBS and skipped is None
    C_PP: tl.constexpr = COEFFICIENTS[0]
    C_PQ: tl.constexpr = COEFFICIENTS[1]
    if BOTH:
        C_QP: tl.constexpr = 1
        C_QQ: tl.constexpr = -1
    else:
        C_QP: tl.constexpr = COEFFICIENTS[2]
        C_QQ: tl.constexpr = COEFFICIENTS[3]
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    offs_tile = tile_offsets(TILE)
    ms = lane_lowest(TILE)
    mt = lane_lowest(TILE)
    zs = lane_zeros(TILE)
    zt = lane_zeros(TILE)
    sum_p = lane_zeros(TILE)
    sum_q = lane_zeros(TILE)
    excess_z = lane_zeros(TILE)
    hard = (lane_zeros(TILE), lane_zeros(TILE))
    small_s = student_scale * (1.0 / SMALL)
    small_t = teacher_scale * (1.0 / SMALL)
    raw_s = empty_tile(student_ptr, TILE)
    raw_t = empty_tile(teacher_ptrs[0], TILE)
    num_tiles = tl.cdiv(span.stop, BLOCK_V)
    # From the end; the first tile comes last, and of a row that cuts vectors with the tile at its other end.
    for PART in tl.static_range(1, parts(TILE)):
        for k in range(
            part_begin(num_tiles, PART, False, TILE),
            part_end(num_tiles, PART, TILE),
            part_step(num_tiles, PART, False),
        ):
            start = (num_tiles - 1 - k) * BLOCK_V
            offs_v = start + offs_tile
            raw_s = load_tile(student_ptr, start, span, TILE, PART)
            s = logits_of(raw_s, offs_v, span, student_softcap, False)
            if len(teacher_ptrs) == 1:
                raw_t = load_tile(teacher_ptrs[0], start, span, TILE, PART)
                t = logits_of(raw_t, offs_v, span, teacher_softcap, TEACHER_PROBS)
            else:
                t = load_mixed(teacher_ptrs, shares, start, span, teacher_softcap, TEACHER_PROBS, TILE, PART, SIGNED)
            if skipped is not None:
                s = tl.where(offs_v == skipped, NEG_INF, s)
                t = tl.where(offs_v == skipped, NEG_INF, t)
            ns = tl.maximum(ms, fold_max(raw_s if PLAIN else s))
            nt = tl.maximum(mt, fold_max(raw_t if PLAIN else t))
            shift_s = (ms - ns) * SMALL
            shift_t = (mt - nt) * SMALL
            factor_s = tl.exp2(shift_s * small_s)
            factor_t = tl.exp2(shift_t * small_t)
            # The difference and the small unit in one operation: a power of two rounds nothing.
            a = tl.fma(s, SMALL, -spread(ns * SMALL))
            b = tl.fma(t, SMALL, -spread(nt * SMALL))
            es = tl.exp2(a * small_s)
            et = tl.exp2(b * small_t)
            if BOTH:
                shift = mix_logs(1, shift_t, -1, shift_s, ratio)
                x = mix_logs(1, b, -1, a, ratio)
                excess = es - et
                sum_p = rescale_excess(sum_p, excess_z, sum_q, zt, factor_s, factor_t, shift) + fold_sum(
                    mul0(excess, x)
                )
                sum_q = rescale(sum_q, zs, factor_s, shift) + fold_product(es, x)
                excess_z = tl.fma(excess_z, factor_s, zt * (factor_s - factor_t)) + fold_sum(excess)
                zt = tl.fma(zt, factor_t, fold_sum(et))
                zs = zt + excess_z
            else:
                if C_PP != 0 or C_PQ != 0:
                    sum_p = rescale(sum_p, zt, factor_t, mix_logs(C_PP, shift_t, C_PQ, shift_s, ratio))
                    sum_p += fold_product(et, mix_logs(C_PP, b, C_PQ, a, ratio))
                if C_QP != 0 or C_QQ != 0:
                    sum_q = rescale(sum_q, zs, factor_s, mix_logs(C_QP, shift_t, C_QQ, shift_s, ratio))
                    sum_q += fold_product(es, mix_logs(C_QP, b, C_QQ, a, ratio))
                zs = tl.fma(zs, factor_s, fold_sum(es))
                zt = tl.fma(zt, factor_t, fold_sum(et))
            if HARD:
                hard = add_hard(hard, ms, ns, s, inside(offs_v, span), center)
            ms = ns
            mt = nt

    student_norm = fold_norm(ms, zs, student_scale)
    teacher_norm = fold_norm(mt, zt, teacher_scale)
    shift_s = (ms - student_norm[0]) * SMALL
    shift_t = (mt - teacher_norm[0]) * SMALL
    factor_s = tl.exp2(shift_s * small_s)
    factor_t = tl.exp2(shift_t * small_t)
    mean_p = 0.0
    mean_q = 0.0
    if BOTH:
        shift = mix_logs(1, shift_t, -1, shift_s, ratio)
        moved = rescale_excess(sum_p, excess_z, sum_q, zt, factor_s, factor_t, shift)
        mean_p = tl.sum(moved, axis=0) * teacher_norm[3]
        mean_q = tl.sum(rescale(sum_q, zs, factor_s, shift), axis=0) * student_norm[3]
        excess_z = tl.sum(tl.fma(excess_z, factor_s, zt * (factor_s - factor_t)), axis=0)
    else:
        if C_PP != 0 or C_PQ != 0:
            moved = mix_logs(C_PP, shift_t, C_PQ, shift_s, ratio)
            mean_p = tl.sum(rescale(sum_p, zt, factor_t, moved), axis=0) * teacher_norm[3]
        if C_QP != 0 or C_QQ != 0:
            moved = mix_logs(C_QP, shift_t, C_QQ, shift_s, ratio)
            mean_q = tl.sum(rescale(sum_q, zs, factor_s, moved), axis=0) * student_norm[3]
        excess_z = student_norm[4] - teacher_norm[4]
    hard_norm = fold_norm(ms, hard[0], LOG2E)
    mean_p *= 1.0 / SMALL
    mean_q *= 1.0 / SMALL
    return student_norm, teacher_norm, mean_p, mean_q, excess_z, hard_norm, tl.sum(hard[1], axis=0), raw_s, raw_t


@triton.jit
def norm_sweep(
    row_ptrs,
    shares,
    span,
    softcap,
    scale,
    TILE: tl.constexpr,
    skipped=None,
    center=None,
    PROBS: tl.constexpr = False,
    HARD: tl.constexpr = False,
    OVERLAPPING: tl.constexpr = False,
    SIGNED: tl.constexpr = False,
):
    """The norm of a row of logits, or of a weighted sum of several; one column, skipped, may be left out.

    With HARD also the norm at temperature 1 and the sum (s - center), with OVERLAPPING where the tile of the largest
    logit starts; then the first tile of the first row as it was loaded, the last of the sweep.
    """
    # Logits are what was loaded: of 16 bits two maxima are one operation.
    PLAIN: tl.constexpr = len(row_ptrs) == 1 and softcap is None and not PROBS and skipped is None
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    offs_tile = tile_offsets(TILE)
    m = lane_lowest(TILE)
    z = lane_zeros(TILE)
    hard = (lane_zeros(TILE), lane_zeros(TILE))
    tile = tl.zeros(m.shape, tl.int32)
    raw = empty_tile(row_ptrs[0], TILE)
    num_tiles = tl.cdiv(span.stop, BLOCK_V)
    # From the end; the first tile comes last, and of a row that cuts vectors with the tile at its other end.
    for PART in tl.static_range(1, parts(TILE)):
        for k in range(
            part_begin(num_tiles, PART, False, TILE),
            part_end(num_tiles, PART, TILE),
            part_step(num_tiles, PART, False),
        ):
            start = (num_tiles - 1 - k) * BLOCK_V
            offs_v = start + offs_tile
            if len(row_ptrs) == 1:
                raw = load_tile(row_ptrs[0], start, span, TILE, PART)
                s = logits_of(raw, offs_v, span, softcap, PROBS)
            else:
                s = load_mixed(row_ptrs, shares, start, span, softcap, PROBS, TILE, PART, SIGNED)
            counted = inside(offs_v, span)
            if skipped is not None:
                s = tl.where(offs_v == skipped, NEG_INF, s)
                counted = counted & (offs_v != skipped)
            n, z = add_exps(m, z, s, raw if PLAIN else s, scale)
            if OVERLAPPING:
                tile = tl.where(n > m, start, tile)
            if HARD:
                hard = add_hard(hard, m, n, s, counted, center)
            m = n
    norm = fold_norm(m, z, scale)
    best_tile = 0
    if OVERLAPPING:
        best_tile = tl.max(tl.where(m == norm[0], tile, 0), axis=0)
    return norm, fold_norm(m, hard[0], LOG2E), tl.sum(hard[1], axis=0), best_tile, raw


@triton.jit
def overlap_of_tile(
    student_ptr,
    student_norm,
    teacher_ptrs,
    shares,
    norm,
    start,
    span,
    student_softcap,
    teacher_softcap,
    TEACHER_PROBS: tl.constexpr,
    TILE: tl.constexpr,
    SIGNED: tl.constexpr = False,
):
    """Of one tile the sum of the products of both sides' exponentials."""
    offs_v = start + tile_offsets(TILE)
    s = logits_of(load_tile(student_ptr, start, span, TILE), offs_v, span, student_softcap, False)
    t = load_mixed(teacher_ptrs, shares, start, span, teacher_softcap, TEACHER_PROBS, TILE, 0, SIGNED)
    es = tl.exp2((s - student_norm[0]) * student_norm[1])
    et = tl.exp2((t - norm[0]) * norm[1])
    return tl.sum(fold_sum(es * et), axis=0)
