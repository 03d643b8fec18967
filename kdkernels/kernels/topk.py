"""The sparse top-k pattern: a teacher of K ids and log-probabilities a row, one program a row.

The K entries live in registers: their student logits are gathered before anything is stored. Of the columns outside
them most tails need two numbers: the mass of q there, and one factor, for their gradient is proportional to q. The K
entries overwrite it after a barrier.

A row that fits into the registers of a block is read once, whatever the tail, and a narrow one takes a block of one
warp: ``tuning.sparse_plans``. A wider row is swept:

    reads and writes of [N, V]              loss   with gradient
    bucket, renormalize, drop               1R     2R + 1W
    renormalize_both                        0R     1W            (no column outside the entries matters)
      with cross entropy, z-loss or stats   1R     2R + 1W
    uniform, and p = 0 outside where the    2R     3R + 1W       (values and scores of all columns are computed)
      divergence is not linear in q there

The mass outside is the sum over all columns but the likeliest entry, less the other entries. Where that cancels more
than the divergence bears, the program reads the row once more, without the entries.

Equal ids are found by comparing each entry with all, K^2 comparisons a row shared by its threads: they stay below the
cost of the sweeps up to some 500 entries, and are most of the work at 2048.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import divergences, tuning
from kdkernels.kernels.arguments import (
    Logits,
    Rows,
    Weights,
    contiguous,
    logits,
    num_rows,
    on_device_of,
    row_arguments,
    row_tensors,
    term_weights,
    thrown_away,
    vectors,
)
from kdkernels.kernels.dense_cluster import (
    at_end,
    load_pieces,
    one_piece,
    piece_columns,
    piece_heads,
    piece_start,
    reduce_sums,
)
from kdkernels.kernels.online import add_exps, fold_norm, norm_sweep
from kdkernels.kernels.rows import (
    LN2,
    LOG2E,
    LOWEST,
    NEG_INF,
    Span,
    begin_row,
    end_of,
    fast_exp2,
    fold_sum,
    grid_pointer,
    inside,
    lane_lowest,
    lane_zeros,
    load_tile,
    logits_of,
    mul0,
    part_begin,
    part_end,
    part_step,
    parts,
    row_skew,
    soft_cap,
    softmax,
    spread,
    store_tile,
    store_vectors,
    tile_offsets,
    widen,
    zero_tiles,
)
from kdkernels.kernels.terms import (
    NOWHERE,
    divergence_scale,
    hard_terms,
    label_gradient,
    score_of,
    smoothing_center,
    through_cap,
    value_of,
    weighed,
)

NUM_STATS = tl.constexpr(6)
# As in kdkernels.reference.topk.
NO_ENTRY = tl.constexpr(-9000.0)
# Bits of the word in which a lane marks the columns it holds.
WORD = tl.constexpr(64)
# The mass outside may be a difference of numbers up to this many times larger.
CANCELLATION = tl.constexpr(2.0**18)
# fp32 elements a thread holds while equal ids are looked for.
PAIRS = 8


@triton.jit
def load_ids(ids_ptr, logprobs_ptr, offs_k, K):
    """Ids as they were given, in int32, and -1 in slots that are unused: one out of range has spoilt its row before."""
    inside = offs_k < K
    given = tl.load(logprobs_ptr + offs_k, mask=inside, other=NEG_INF).to(tl.float32)
    return tl.where(given <= NO_ENTRY, -1, tl.load(ids_ptr + offs_k, mask=inside, other=-1).to(tl.int32))


@triton.jit
def merge_equal(ids, used, ids_ptr, logprobs_ptr, K, K_TILE: tl.constexpr):
    """Of equal ids the first keeps its slot and gets the sum of their probabilities: used, p, log2 p."""
    CHUNK: tl.constexpr = K_TILE[0]
    BLOCK_K: tl.constexpr = K_TILE[1]
    offs_k = tl.arange(0, BLOCK_K)
    high = tl.full([BLOCK_K], NEG_INF, tl.float32)
    earlier = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, CHUNK):
        offs_j = start + tl.arange(0, CHUNK)
        equal = load_ids(ids_ptr, logprobs_ptr, offs_j, K)[:, None] == ids[None, :]
        given = tl.load(logprobs_ptr + offs_j, mask=offs_j < K, other=NEG_INF).to(tl.float32)
        high = tl.maximum(high, tl.max(tl.where(equal, given[:, None], NEG_INF), axis=0))
        earlier += tl.sum((equal & (offs_j[:, None] < offs_k[None, :])).to(tl.int32), axis=0)
    high = tl.where(high == NEG_INF, 0.0, high)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, CHUNK):
        offs_j = start + tl.arange(0, CHUNK)
        equal = load_ids(ids_ptr, logprobs_ptr, offs_j, K)[:, None] == ids[None, :]
        given = tl.load(logprobs_ptr + offs_j, mask=offs_j < K, other=NEG_INF).to(tl.float32)
        part = tl.exp2((given[:, None] - high[None, :]) * LOG2E)
        total += tl.sum(tl.where(equal, part, 0.0), axis=0)
    used = used & (earlier == 0)
    p = tl.where(used, tl.exp2(high * LOG2E) * total, 0.0)
    return used, p, tl.where(used, high * LOG2E + tl.log2(total), NEG_INF)


@triton.jit
def read_entries(ids_ptr, logprobs_ptr, K, V, K_TILE: tl.constexpr):
    """The distinct entries of a row.

    Returns ids [BLOCK_K], NOWHERE in slots that are not used; p and log2 p as they were given; the sum of p in fp64,
    for 1 less that sum has to be exact; and whether an id was out of range.
    """
    CHUNK: tl.constexpr = K_TILE[0]
    BLOCK_K: tl.constexpr = K_TILE[1]
    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + offs_k, mask=offs_k < K, other=-1)
    given = tl.load(logprobs_ptr + offs_k, mask=ids != -1, other=NEG_INF)
    entry = (ids != -1) & ((given.to(tl.float32) <= NO_ENTRY) == 0)
    used = entry & (ids >= 0) & (ids < V)
    invalid = tl.max((entry & (used == 0)).to(tl.int32), axis=0) != 0
    ids = tl.where(used, ids, NOWHERE).to(tl.int32)
    exact = tl.where(used, tl.exp(given.to(tl.float64)), 0.0)
    mass = tl.sum(exact, axis=0)
    p = exact.to(tl.float32)
    log2p = tl.where(used, given.to(tl.float32) * LOG2E, NEG_INF)

    pairs = tl.zeros([CHUNK, BLOCK_K], tl.int32)
    for start in range(0, K, CHUNK):
        pairs += (load_ids(ids_ptr, logprobs_ptr, start + tl.arange(0, CHUNK), K)[:, None] == ids[None, :]).to(tl.int32)
    if tl.sum(tl.sum(pairs, axis=1), axis=0) > tl.sum(used.to(tl.int32), axis=0):
        used, p, log2p = merge_equal(ids, used, ids_ptr, logprobs_ptr, K, K_TILE)
    return tl.where(used, ids, NOWHERE), p, log2p, mass, invalid


@triton.jit
def renormalize(p, log2p, log2_rest, outside, teacher_temperature, UNIFORM: tl.constexpr):
    """The teacher at its temperature over the entries, with UNIFORM also over the columns outside them.

    Returns p, log2 p, p and log2 p of each column outside, and whether there is any probability.
    """
    log2p = log2p / teacher_temperature
    high = tl.max(log2p, axis=0)
    log2_each = NEG_INF
    if UNIFORM:
        each = (log2_rest - tl.log2(outside.to(tl.float32))) / teacher_temperature
        log2_each = tl.where(outside > 0, each, NEG_INF)
        high = tl.maximum(high, log2_each)
    known = high > NEG_INF
    high = tl.where(known, high, 0.0)
    z = tl.sum(tl.exp2(log2p - high), axis=0)
    if UNIFORM:
        z += mul0(tl.exp2(log2_each - high), outside.to(tl.float32))
    log2_z = tl.where(known, tl.log2(z), 0.0)
    log2p = log2p - high - log2_z
    log2_each = log2_each - high - log2_z
    return tl.exp2(log2p), log2p, tl.exp2(log2_each), log2_each, known


@triton.jit
def mark_entries(ids_ptr, logprobs_ptr, K, skew, start, TILE: tl.constexpr):
    """For every lane a word with a bit for each of its columns that is an entry, in the tiles from column start on."""
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    lane = tl.arange(0, LANES)
    word = tl.zeros([LANES], tl.int64)
    one = tl.full([LANES], 1, tl.int64)
    for k in range(K):
        given = tl.load(ids_ptr + k).to(tl.int64)
        at = given + skew - start
        used = (given >= 0) & ((tl.load(logprobs_ptr + k).to(tl.float32) <= NO_ENTRY) == 0)
        here = used & (at >= 0) & (at < WORD * LANES)
        at = tl.where(here, at, 0).to(tl.int32)
        bit = at // (LANES * VEC) * VEC + at % VEC
        word |= tl.where((lane == at // VEC % LANES) & here, one << bit, 0)
    return word


@triton.jit
def marked(word, tile, TILE: tl.constexpr):
    """The columns of a tile that are entries, counted from the first one that the word marks."""
    ROLL: tl.constexpr = TILE[0]
    VEC: tl.constexpr = TILE[2]
    bits = (word >> (tile * (ROLL * VEC))).to(tl.int32)
    position = tl.arange(0, ROLL)[:, None, None] * VEC + tl.arange(0, VEC)[None, None, :]
    return ((spread(bits) >> position) & 1) != 0


@triton.jit
def sweep_outside(student_ptr, ids_ptr, logprobs_ptr, K, span, softcap, student_scale, TILE: tl.constexpr):
    """Maximum and sum of exponentials of the columns outside the entries, from the last to the first."""
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    SPAN: tl.constexpr = WORD * TILE[1]
    offs_tile = tile_offsets(TILE)
    m = lane_lowest(TILE)
    z = lane_zeros(TILE)
    spans = tl.cdiv(span.stop, SPAN)
    for k in range(spans):
        first = (spans - 1 - k) * SPAN
        word = mark_entries(ids_ptr, logprobs_ptr, K, span.start, first, TILE)
        tiles = tl.cdiv(tl.minimum(span.stop - first, SPAN), BLOCK_V)
        for j in range(tiles):
            tile = tiles - 1 - j
            start = first + tile * BLOCK_V
            s = logits_of(load_tile(student_ptr, start, span, TILE), start + offs_tile, span, softcap, False)
            s = tl.where(marked(word, tile, TILE), NEG_INF, s)
            m, z = add_exps(m, z, s, s, student_scale)
    norm = fold_norm(m, z, student_scale)
    return norm[0], norm[4]


@triton.jit
def terms_outside(
    s, outside, norm, p, log2p, param0, param1, COEFFICIENTS: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr
):
    """Values and scores of the columns of a tile that are outside the entries, each of the teacher's p; else 0."""
    # Not by log2 q, which ends before the difference of two logits does.
    logq = (s - norm[0]) * (norm[1] * LN2) - norm[2] * LN2
    tile_p = tl.where(outside, p, 0.0)
    logp = tl.where(outside, log2p, NEG_INF) * LN2
    q = tl.where(outside, softmax(s, norm)[0], 0.0)
    logq = tl.where(outside, logq, NEG_INF)
    value = value_of(tile_p, logp, q, logq, param0, param1, COEFFICIENTS, VALUE, False)
    return value, score_of(tile_p, logp, q, logq, param0, param1, COEFFICIENTS, SCORE, False)


@triton.jit
def evaluate_outside(
    student_ptr,
    ids_ptr,
    logprobs_ptr,
    norm,
    p,
    log2p,
    K,
    span,
    softcap,
    param0,
    param1,
    COEFFICIENTS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of the values and of the scores of the columns outside the entries, which have the teacher's p each."""
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    SPAN: tl.constexpr = WORD * TILE[1]
    offs_tile = tile_offsets(TILE)
    lane_value = lane_zeros(TILE)
    lane_score = lane_zeros(TILE)
    spans = tl.cdiv(span.stop, SPAN)
    for k in range(spans):
        first = (spans - 1 - k) * SPAN
        word = mark_entries(ids_ptr, logprobs_ptr, K, span.start, first, TILE)
        tiles = tl.cdiv(tl.minimum(span.stop - first, SPAN), BLOCK_V)
        for j in range(tiles):
            tile = tiles - 1 - j
            start = first + tile * BLOCK_V
            offs_v = start + offs_tile
            s = logits_of(load_tile(student_ptr, start, span, TILE), offs_v, span, softcap, False)
            outside = inside(offs_v, span) & (marked(word, tile, TILE) == 0)
            value, score = terms_outside(s, outside, norm, p, log2p, param0, param1, COEFFICIENTS, VALUE, SCORE)
            lane_value += fold_sum(value)
            lane_score += fold_sum(score)
    return tl.sum(lane_value, axis=0), tl.sum(lane_score, axis=0)


# The same of a row that stays in registers, in pieces [LANES, VEC], see dense_cluster. Vectors of marks are counted as
# the pieces hold them: of a row that is cut the first piece has the vectors at both ends, and comes last.
@triton.constexpr_function
def words_of(TILE):
    return -(-TILE[0] * TILE[2] // 64)


@triton.constexpr_function
def place_of_piece(k, TILE):
    """The first bit of a piece among the marks."""
    return (TILE[0] + k - 1) % TILE[0] * TILE[2] if TILE[3] else TILE[2] * k


@triton.jit
def mark_pieces(ids_ptr, logprobs_ptr, K, span, TILE: tl.constexpr):
    """For every lane words with a bit for each of its columns that is an entry."""
    PIECES: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    lane = tl.arange(0, LANES)
    one = tl.full([LANES], 1, tl.int64)
    words = ()
    for _ in tl.static_range(words_of(TILE)):
        words = words + (tl.zeros([LANES], tl.int64),)
    for k in range(K):
        at = tl.load(ids_ptr + k).to(tl.int64)
        used = (at >= 0) & ((tl.load(logprobs_ptr + k).to(tl.float32) <= NO_ENTRY) == 0)
        if TILE[3]:
            at += span.start - VEC
            at = tl.where(used & (at < 0), at + PIECES * LANES * VEC, at)
        used = used & (at >= 0) & (at < PIECES * LANES * VEC)
        at = tl.where(used, at, 0).to(tl.int32)
        bit = at // (LANES * VEC) * VEC + at % VEC
        mine = (lane == at // VEC % LANES) & used
        more = ()
        for number in tl.static_range(words_of(TILE)):
            here = mine & (bit // WORD == number)
            more = more + (words[number] | tl.where(here, one << (bit % WORD), 0),)
        words = more
    return words


@triton.jit
def marked_piece(words, k: tl.constexpr, TILE: tl.constexpr):
    """The columns of a piece that are entries."""
    PLACE: tl.constexpr = place_of_piece(k, TILE)
    bits = (words[PLACE // 64] >> (PLACE % 64)).to(tl.int32)
    return ((bits[:, None] >> tl.arange(0, TILE[2])[None, :]) & 1) != 0


@triton.jit
def max_of_pieces(pieces):
    """The largest logit, and of no logits the lowest number."""
    top = tl.full(pieces[0].shape, LOWEST, tl.float32)
    for k in tl.static_range(len(pieces)):
        top = tl.maximum(top, pieces[k])
    return tl.max(tl.max(top, axis=1), axis=0)


@triton.jit
def norm_of_pieces(
    pieces, heads, span, scale, skipped, center, HARD: tl.constexpr, KEEP: tl.constexpr, TILE: tl.constexpr
):
    """As norm_sweep without the column skipped: maximum, z, z at temperature 1, sum (s - center), and to KEEP the
    exponentials."""
    PIECES: tl.constexpr = TILE[0]
    masked = ()
    for k in tl.static_range(PIECES):
        masked = masked + (tl.where(piece_columns(k, heads, TILE) == skipped, NEG_INF, widen(pieces[k])),)
    top = max_of_pieces(masked)
    zeros = tl.zeros(pieces[0].shape, tl.float32)
    z = zeros
    hard_z = zeros
    centered = zeros
    exps = ()
    for k in tl.static_range(PIECES):
        if KEEP:
            s = masked[k]
        else:
            # Another instruction than above, so that it is computed anew and not kept.
            s = tl.where(piece_columns(k, heads, TILE) == skipped, NEG_INF, pieces[k].to(tl.float32))
        e = fast_exp2((s - top) * scale)
        z += e
        if KEEP:
            exps = exps + (e,)
        if HARD:
            hard_z += fast_exp2((s - top) * LOG2E)
            if center is not None:
                offs_v = piece_columns(k, heads, TILE)
                centered += tl.where(inside(offs_v, span) & (offs_v != skipped), s - center, 0.0)
    wanted = (z,)
    if HARD:
        wanted = wanted + (hard_z, centered)
    sums = reduce_sums(wanted)
    if not HARD:
        sums = sums + (0.0, 0.0)
    return top, sums[0], sums[1], sums[2], exps


@triton.jit
def sum_pieces_outside(pieces, ids_ptr, logprobs_ptr, K, span, scale, KEEP: tl.constexpr, TILE: tl.constexpr):
    """Maximum, sum and to KEEP the exponentials of the columns outside the entries."""
    words = mark_pieces(ids_ptr, logprobs_ptr, K, span, TILE)
    masked = ()
    for k in tl.static_range(TILE[0]):
        masked = masked + (tl.where(marked_piece(words, k, TILE), NEG_INF, pieces[k].to(tl.float32)),)
    top = max_of_pieces(masked)
    z = tl.zeros(pieces[0].shape, tl.float32)
    exps = ()
    for k in tl.static_range(TILE[0]):
        e = fast_exp2((masked[k] - top) * scale)
        z += e
        if KEEP:
            exps = exps + (e,)
    return top, reduce_sums((z,))[0], exps


@triton.jit
def evaluate_pieces_outside(
    pieces,
    heads,
    ids_ptr,
    logprobs_ptr,
    norm,
    p,
    log2p,
    K,
    span,
    param0,
    param1,
    COEFFICIENTS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    TILE: tl.constexpr,
):
    """As evaluate_outside."""
    words = mark_pieces(ids_ptr, logprobs_ptr, K, span, TILE)
    values = tl.zeros(pieces[0].shape, tl.float32)
    scores = values
    for k in tl.static_range(TILE[0]):
        outside = inside(piece_columns(k, heads, TILE), span) & (marked_piece(words, k, TILE) == 0)
        value, score = terms_outside(
            pieces[k].to(tl.float32), outside, norm, p, log2p, param0, param1, COEFFICIENTS, VALUE, SCORE
        )
        values += value
        scores += score
    return reduce_sums((values, scores))


@triton.jit
def evaluate_one(
    p, log2p, q, log2q, param0, param1, COEFFICIENTS: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr
):
    """Value and score of one outcome."""
    p = tl.full([1], p, tl.float32)
    log2p = tl.full([1], log2p, tl.float32)
    q = tl.full([1], q, tl.float32)
    log2q = tl.full([1], log2q, tl.float32)
    value = tl.sum(value_of(p, log2p * LN2, q, log2q * LN2, param0, param1, COEFFICIENTS, VALUE, False), axis=0)
    return value, tl.sum(score_of(p, log2p * LN2, q, log2q * LN2, param0, param1, COEFFICIENTS, SCORE, False), axis=0)


@triton.jit
def hard_gradient(s, offs_v, norm, label, V, lse_scale, hard_scale, label_smoothing, CE: tl.constexpr):
    """Of cross entropy and z-loss, in logits s of the columns offs_v."""
    g = lse_scale * softmax(s, norm)[0]
    if CE:
        g = label_gradient(g, offs_v, label, V, hard_scale, label_smoothing)
    return g


@triton.jit
def gradient_outside(
    x,
    out_max,
    scale,
    norm,
    p,
    log2p,
    score_sum,
    slope,
    g_scale,
    param0,
    param1,
    COEFFICIENTS: tl.constexpr,
    SCORE: tl.constexpr,
    POINTWISE: tl.constexpr,
    RESTRICTED: tl.constexpr,
):
    """Of the divergence, in logits x outside the entries."""
    if POINTWISE:
        q, log2q = softmax(x, norm)
        logp = tl.full(x.shape, log2p, tl.float32) * LN2
        score = score_of(
            tl.full(x.shape, p, tl.float32), logp, q, log2q * LN2, param0, param1, COEFFICIENTS, SCORE, False
        )
        g = mul0(g_scale, score - q * score_sum)
    elif RESTRICTED:
        g = tl.zeros(x.shape, tl.float32)
    else:
        g = tl.exp2((x - out_max) * scale) * mul0(g_scale, slope)
    return g


@triton.jit(do_not_specialize=["K", "L", "ignore_index"])
def topk_fwd_kernel(
    student: Logits,  # [B, L, V]
    dstudent: Logits,  # [B, L, pad_width or V]
    teacher_ids_ptr,  # [N, K]
    teacher_logprobs_ptr,  # [N, K]
    tail_ptr,  # [N]
    rows: Rows,
    K,
    L,
    V,
    pad_width,
    ignore_index,
    scale,
    temperature,
    teacher_temperature,
    weights: Weights,
    student_softcap,
    min_tail,
    tail_rounding,
    param0,
    param1,
    COEFFICIENTS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    TAIL: tl.constexpr,
    POINTWISE: tl.constexpr,
    K_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    GRAD: tl.constexpr = dstudent.ptr is not None
    STATS: tl.constexpr = rows.stats is not None
    CE: tl.constexpr = weights.ce is not None
    # Statistics have the cross entropy too.
    LABELLED: tl.constexpr = CE or (STATS and rows.labels is not None)
    HARD_GRAD: tl.constexpr = CE or weights.z_loss is not None
    HARD: tl.constexpr = HARD_GRAD or STATS
    RESTRICTED: tl.constexpr = TAIL == "renormalize_both"
    SWEPT: tl.constexpr = HARD or not RESTRICTED
    # The row stays in registers, in PIECES [LANES, VEC]; of it KEEP leaves the exponentials only.
    RESIDENT: tl.constexpr = len(TILE) > 4
    KEEP: tl.constexpr = RESIDENT and TILE[len(TILE) - 1]
    TILE_V: tl.constexpr = one_piece(TILE) if RESIDENT else TILE
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]

    index = tl.program_id(0).to(tl.int64)
    skew = row_skew(student, index, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    pad_stop = span.stop if pad_width is None else end_of(skew, pad_width, TILE)
    student_ptr = grid_pointer(student, index, skew, L, TILE)
    dstudent_ptr = grid_pointer(dstudent, index, skew, L, TILE) if GRAD else None
    offs_tile = tile_offsets(TILE_V)
    row = begin_row(
        student_ptr,
        dstudent_ptr,
        rows,
        index=index,
        span=span,
        pad_stop=pad_stop,
        TILE=TILE_V,
        ignore_index=ignore_index,
        scale=scale,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        param=param0,
        softcap=student_softcap,
        LABEL_LOGIT=LABELLED,
        NUM_STATS=NUM_STATS,
    )
    if row.ignored:
        return
    label = skew + row.label
    temperature = row.temperature
    center = None
    if weights.label_smoothing is not None:
        center = smoothing_center(row.label_logit)
    if RESIDENT:
        heads = tl.arange(0, TILE[1])[:, None] * TILE[2]
        pieces = load_pieces(student_ptr, heads, span, student_softcap, False, TILE)

    # The teacher.
    ids_ptr = teacher_ids_ptr + row.index * K
    logprobs_ptr = teacher_logprobs_ptr + row.index * K
    ids, p, log2p, mass, invalid = read_entries(ids_ptr, logprobs_ptr, K, V, K_TILE)
    used = ids != NOWHERE
    ids = tl.where(used, ids + skew, NOWHERE)
    count = tl.sum(used.to(tl.int32), axis=0)
    outside = V - count
    if tail_ptr is None:
        rest = tl.maximum(1.0 - mass, 0.0).to(tl.float32)
        log2_rest = tl.log2(rest)
    else:
        log2_rest = tl.load(tail_ptr + row.index) * LOG2E
        rest = tl.exp2(log2_rest)
        invalid = invalid | ((rest != rest) & (count > 0))
    if min_tail is not None:
        floor = min_tail + tail_rounding * tl.sum(mul0(p, tl.abs(log2p)), axis=0) * LN2
        log2_rest = tl.where(rest < floor, tl.log2(floor), log2_rest)
        rest = tl.where(rest < floor, floor, rest)
    # A row without entries is all tail, whatever was captured for it.
    log2_rest = tl.where(outside > 0, tl.where(count > 0, log2_rest, 0.0), NEG_INF)
    rest = tl.where(outside > 0, tl.where(count > 0, rest, 1.0), 0.0)
    known = True
    each = 0.0
    log2_each = NEG_INF
    if TAIL != "bucket" and TAIL != "drop":
        p, log2p, each, log2_each, known = renormalize(
            p, log2p, log2_rest, outside, row.teacher_temperature, TAIL == "uniform"
        )

    # The student on the entries, before anything is stored: the gradient may overwrite it.
    student_scale = LOG2E / temperature
    s = tl.load(student_ptr + ids, mask=used, other=NEG_INF).to(tl.float32)
    if student_softcap is not None:
        s = tl.where(used, soft_cap(s, student_softcap), NEG_INF)
    top = tl.max(s, axis=0)
    high = top
    centered_sum = 0.0
    if SWEPT:
        skipped = tl.min(tl.where((s == top) & (s > NEG_INF), ids, NOWHERE), axis=0)
        if RESIDENT:
            out_max, out_z, hard_z, centered_sum, exps = norm_of_pieces(
                pieces, heads, span, student_scale, skipped, center, HARD, KEEP, TILE
            )
        else:
            out_norm, hard_norm, centered_sum, _, raw = norm_sweep(
                (student_ptr,),
                (1.0,),
                span=span,
                softcap=student_softcap,
                scale=student_scale,
                TILE=TILE,
                skipped=skipped,
                center=center,
                HARD=HARD,
            )
            out_max = out_norm[0]
            out_z = out_norm[4]
            hard_z = hard_norm[4]
        high = tl.maximum(top, out_max)
    a = (s - high) * student_scale
    q = tl.where(used, tl.exp2(a), 0.0)
    z = tl.sum(q, axis=0)
    fine = z > 0
    if SWEPT:
        # Without a column to skip the maximum is one of the sweep's.
        student_mass = z
        z = tl.where(skipped == NOWHERE, 0.0, tl.exp2((top - high) * student_scale))
        z += out_z * tl.exp2((out_max - high) * student_scale)
        student_mass /= z
        fine = z > 0
        others_z = tl.sum(tl.where(used & (ids != skipped), tl.exp2((s - out_max) * student_scale), 0.0), axis=0)
        out_z = tl.where(outside > 0, out_z - others_z, 0.0)
    hard_norm = (high, LOG2E, 0.0, 1.0)
    if HARD:
        hard_z = hard_z * tl.exp2((out_max - high) * LOG2E)
        hard_z += tl.where(skipped == NOWHERE, 0.0, tl.exp2((top - high) * LOG2E))
        hard_norm = (high, LOG2E, tl.log2(hard_z), 1.0 / hard_z)
        if center is not None:
            centered_sum += tl.where(skipped == NOWHERE, 0.0, top - center)
    if RESTRICTED:
        a = (s - top) * student_scale
        q = tl.where(used, tl.exp2(a), 0.0)
        z = tl.sum(q, axis=0)
        fine = (fine & (z > 0)) | (count == 0)
    # A NaN among the logits, or nothing but -inf; functors may take what is NaN for 0.
    spoilt = tl.where(fine & (mass == mass) & (invalid == 0), 0.0, float("nan"))
    log2_z = tl.log2(z)
    norm = (high, student_scale, log2_z, 1.0 / z)
    q = q / z
    log2q = tl.where(used, a - log2_z, NEG_INF)

    # The divergence: sums of values and scores over its outcomes.
    divergence = tl.sum(value_of(p, log2p * LN2, q, log2q * LN2, row.param, param1, COEFFICIENTS, VALUE, False), axis=0)
    score = score_of(p, log2p * LN2, q, log2q * LN2, row.param, param1, COEFFICIENTS, SCORE, False)
    score_sum = tl.sum(score, axis=0)
    # Outside the entries the gradient is slope * exp2((s - out_max) * student_scale), unless it is POINTWISE.
    slope = 0.0
    if POINTWISE:
        if RESIDENT:
            value_outside, score_outside = evaluate_pieces_outside(
                pieces,
                heads,
                ids_ptr,
                logprobs_ptr,
                norm,
                each,
                log2_each,
                K,
                span,
                row.param,
                param1,
                COEFFICIENTS,
                VALUE,
                SCORE,
                TILE,
            )
        else:
            value_outside, score_outside = evaluate_outside(
                student_ptr,
                ids_ptr,
                logprobs_ptr,
                norm,
                each,
                log2_each,
                K,
                span,
                student_softcap,
                row.param,
                param1,
                COEFFICIENTS,
                VALUE,
                SCORE,
                TILE,
            )
        divergence += value_outside
        score_sum += score_outside
    elif TAIL == "bucket":
        shift = (out_max - high) * student_scale
        q_outside = out_z * tl.exp2(shift) / z
        log2q_outside = shift + tl.log2(out_z) - log2_z
        value_outside, score_outside = evaluate_one(
            rest, log2_rest, q_outside, log2q_outside, row.param, param1, COEFFICIENTS, VALUE, SCORE
        )
        # The score times the relative error of the difference is an error of the loss; a NaN is no answer.
        exact = (others_z == 0) | (outside == 0)
        trusted = (out_z * CANCELLATION > others_z) & (tl.abs(score_outside) * (out_z + others_z) <= 4.0 * out_z)
        if (exact | trusted) == 0:
            if RESIDENT:
                # Loaded once more: else its registers would be taken all the time.
                again = load_pieces(student_ptr, heads, span, student_softcap, False, TILE)
                out_max, out_z, exps = sum_pieces_outside(
                    again, ids_ptr, logprobs_ptr, K, span, student_scale, KEEP, TILE
                )
            else:
                out_max, out_z = sweep_outside(
                    student_ptr, ids_ptr, logprobs_ptr, K, span, student_softcap, student_scale, TILE
                )
            shift = (out_max - high) * student_scale
            q_outside = out_z * tl.exp2(shift) / z
            log2q_outside = shift + tl.log2(out_z) - log2_z
            value_outside, score_outside = evaluate_one(
                rest, log2_rest, q_outside, log2q_outside, row.param, param1, COEFFICIENTS, VALUE, SCORE
            )
        divergence += value_outside
        score_sum += score_outside
        slope = tl.where(out_z == 0, 0.0, (score_outside - q_outside * score_sum) / out_z)
    elif not RESTRICTED:
        # Homogeneous: f(0, q) = q f(0, 1), and so is the score.
        value_outside, score_outside = evaluate_one(
            0.0, NEG_INF, 1.0, 0.0, row.param, param1, COEFFICIENTS, VALUE, SCORE
        )
        factor = tl.exp2((out_max - high) * student_scale) / z
        q_outside = tl.where(out_z < 0, 0.0, out_z) * factor
        divergence += value_outside * q_outside
        score_sum += score_outside * q_outside
        slope = (score_outside - score_sum) * factor
    divergence = tl.where(known, divergence, 0.0) + spoilt

    if center is not None:
        # Passed the largest number, or met a logit of -inf.
        centered_sum = tl.where(centered_sum < float("inf"), centered_sum, NEG_INF)
    ce, lse, loss, hard_scale, lse_scale = hard_terms(
        hard_norm[0],
        hard_norm[2],
        row.label_logit,
        centered_sum,
        V,
        row.scale,
        weights,
        rows,
        row.index,
        LABELLED,
    )
    g_scale = 0.0
    if weights.kd is not None:
        kd_scale = divergence_scale(row.scale, weights, temperature, rows, row.index)
        loss += weighed(kd_scale, kd_scale * divergence, rows)
        g_scale = tl.where(known, kd_scale / temperature, 0.0)
    tl.store(rows.loss + row.index, loss)
    if STATS:
        stats_ptr = rows.stats + row.index * NUM_STATS
        tl.store(stats_ptr, divergence)
        tl.store(stats_ptr + 1, ce)
        tl.store(stats_ptr + 2, lse)
        tl.store(stats_ptr + 3, mass.to(tl.float32) + spoilt)
        tl.store(stats_ptr + 4, student_mass)
        tl.store(stats_ptr + 5, 0.0)  # the overlap is the caller's

    if GRAD:
        # Every warp has its entries: what is written from here on may be their logits.
        tl.debug_barrier()
        if (RESTRICTED or weights.kd is None) and not HARD_GRAD:
            zero_tiles(dstudent_ptr, Span(span.start, pad_stop), TILE_V)
        elif RESIDENT:
            factor = mul0(g_scale, slope)
            for k in tl.static_range(TILE[0]):
                if KEEP:
                    g = exps[k] * factor
                else:
                    x = pieces[k].to(tl.float32)
                    offs_v = piece_columns(k, heads, TILE)
                    g = gradient_outside(
                        x,
                        out_max,
                        student_scale,
                        norm,
                        each,
                        log2_each,
                        score_sum,
                        slope,
                        g_scale,
                        row.param,
                        param1,
                        COEFFICIENTS,
                        SCORE,
                        POINTWISE,
                        RESTRICTED,
                    )
                    if HARD_GRAD:
                        g += hard_gradient(
                            x, offs_v, hard_norm, label, V, lse_scale, hard_scale, weights.label_smoothing, CE
                        )
                    g = through_cap(g, x, student_softcap)
                store_vectors(
                    dstudent_ptr,
                    piece_start(k, TILE),
                    piece_heads(k, heads, TILE),
                    at_end(k, TILE),
                    span,
                    g,
                    TILE,
                    not at_end(k, TILE),
                )
            if pad_width is not None:
                zero_tiles(dstudent_ptr, Span(span.stop, pad_stop), TILE_V)
        else:
            num_tiles = tl.cdiv(span.stop, BLOCK_V)
            # The first tile is here still, where there are registers for it.
            KEPT: tl.constexpr = not POINTWISE and student.ptr.dtype.element_ty.primitive_bitwidth == 16
            for PART in tl.static_range(0 if KEPT else 1, parts(TILE)):
                for k in range(
                    part_begin(num_tiles, PART, KEPT, TILE),
                    part_end(num_tiles, PART, TILE),
                    part_step(num_tiles, PART, KEPT),
                ):
                    start = k * BLOCK_V
                    offs_v = start + offs_tile
                    if PART > 0:
                        raw = load_tile(student_ptr, start, span, TILE, PART)
                    x = logits_of(raw, offs_v, span, student_softcap, False)
                    g = gradient_outside(
                        x,
                        out_max,
                        student_scale,
                        norm,
                        each,
                        log2_each,
                        score_sum,
                        slope,
                        g_scale,
                        row.param,
                        param1,
                        COEFFICIENTS,
                        SCORE,
                        POINTWISE,
                        RESTRICTED,
                    )
                    if HARD_GRAD:
                        g += hard_gradient(
                            x, offs_v, hard_norm, label, V, lse_scale, hard_scale, weights.label_smoothing, CE
                        )
                    store_tile(dstudent_ptr, start, span, through_cap(g, x, student_softcap), TILE)
            if pad_width is not None:
                zero_tiles(dstudent_ptr, Span(span.stop, pad_stop), TILE)
        tl.debug_barrier()
        g = mul0(g_scale, score - q * score_sum)
        if HARD_GRAD:
            g += hard_gradient(s, ids, hard_norm, label, V, lse_scale, hard_scale, weights.label_smoothing, CE)
        g = through_cap(g, s, student_softcap)
        if weights.kd is not None:
            g += weighed(kd_scale, spoilt, rows)
        tl.store(dstudent_ptr + ids, g.to(dstudent_ptr.dtype.element_ty), mask=used)


def topk_fwd(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_weight: Optional[Tensor],
    student_temperature_rows: Optional[Tensor],
    teacher_temperature_rows: Optional[Tensor],
    param_rows: Optional[Tensor],
    kd_weight_rows: Optional[Tensor],
    ce_weight_rows: Optional[Tensor],
    z_loss_weight_rows: Optional[Tensor],
    tail_rows: Optional[Tensor],
    *,
    tail: str,
    min_tail: float,
    tail_rounding: float,
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
    student_softcap: float,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of every row, and its gradient where dstudent is given, in one launch.

    Args:
        student: logits [B, L, V] or [N, V] with unit last stride; rows are numbered b * L + l.
        teacher_ids: int32 or int64 [N, K], contiguous; equal ids add up, an id out of range makes the row NaN.
        teacher_logprobs: [N, K], contiguous, of any float dtype; in a slot of id -1, or of -9000 and less, is no entry.
        dstudent: written, of the student's shape; may be the student itself.
        labels: int64 [N]. row_weight: fp32 [N], any stride.
        student_temperature_rows, teacher_temperature_rows, param_rows, the weights of terms, tail_rows: fp32 [N].

    Returns:
        Loss fp32 [N], and statistics fp32 [N, 6] in the order of ``kdkernels.ops.TOPK_STATS``, the overlap left at 0
        ([N, 0] unless asked for).
    """
    N = num_rows(student)
    K = teacher_ids.shape[-1]
    loss = student.new_empty(N, dtype=torch.float32)
    row_stats = student.new_empty((N, NUM_STATS.value if stats else 0), dtype=torch.float32)
    if N == 0:
        return loss, row_stats
    entry = divergences.lookup(divergence)
    pointwise = tail == "uniform" or (tail in ("renormalize", "drop") and not entry.linear_without_teacher)
    floored = min_tail > 0 or tail_rounding > 0
    alone = not (ce_weight or z_loss_weight or stats or student_softcap or pointwise)
    vec, cut = vectors(vocab_size, student, dstudent)
    plans = tuning.sparse_plans(
        vocab_size,
        student.element_size(),
        K,
        load=tuning.LIGHT if alone else tuning.HEAVY if pointwise or stats else tuning.MEDIUM,
        vec=vec,
        cut=cut,
        # Nothing of [N, V] is read.
        swept=tail != "renormalize_both" or bool(ce_weight or z_loss_weight or stats),
        arch=tuning.architecture(student.device),
    )
    shared: dict[str, Any] = {
        **row_arguments(student, [], dstudent, vocab_size),
        # Also where L could be None: without the division ptxas aims at 32 registers for renormalize_both, and spills.
        "L": student.shape[-2],
        "teacher_ids_ptr": teacher_ids.contiguous(),
        "teacher_logprobs_ptr": teacher_logprobs.contiguous(),
        "tail_ptr": contiguous(tail_rows),
        "rows": row_tensors(
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
        "K": K,
        "ignore_index": ignore_index,
        "scale": scale,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "weights": term_weights(
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            z_loss_weight=z_loss_weight,
            label_smoothing=label_smoothing,
            scale_by_t_squared=scale_by_t_squared,
            stats=stats,
        ),
        "student_softcap": student_softcap or None,
        "min_tail": min_tail if floored else None,
        "tail_rounding": tail_rounding,
        "param0": divergences.coded(divergence, param0),
        "param1": param1,
        "COEFFICIENTS": entry.linear,
        "VALUE": entry.value,
        "SCORE": entry.score,
        "TAIL": tail,
        "POINTWISE": pointwise,
        "enable_fp_fusion": True,
    }

    def launch(plan: tuning.Plan, rows: int, gradient: Logits, warmup: bool = False) -> Any:
        TILE: tuple[int, ...] = (*plan.TILE, cut)
        if plan.pattern == "resident":
            pieces, lanes, width = plan.TILE
            # By where it starts a row that is cut may end in the last piece, or in the vectors that the first has.
            ends = cut + (cut and vocab_size <= ((pieces - 1) * lanes + 1) * width)
            TILE = (*plan.TILE, int(ends), 1, plan.keep)
        arguments = {
            **shared,
            "dstudent": gradient,
            "K_TILE": entries_tile(K, plan.num_warps * tuning.WARP),
            "TILE": TILE,
            "num_warps": plan.num_warps,
        }
        return topk_fwd_kernel.warmup(grid=(rows,), **arguments) if warmup else topk_fwd_kernel[(rows,)](**arguments)

    def trial(plan: tuning.Plan) -> None:
        """The first rows, into a gradient that is thrown away: the real one may be the student."""
        rows = min(N, tuning.TRIAL_ROWS)
        launch(plan, rows, thrown_away(dstudent, rows, student.shape[-2]))

    def compiled(plan: tuning.Plan) -> Any:
        return launch(plan, N, logits(dstudent), warmup=True)

    with on_device_of(student):
        key = ("topk", divergence, tail, vocab_size, student.element_size(), K, alone, vec, cut, dstudent is not None)
        plan = tuning.fastest(plans, key, student, N * vocab_size, trial, compiled)
        launch(plan, N, logits(dstudent))
    return loss, row_stats


def entries_tile(K: int, lanes: int) -> tuple[int, int]:
    """(CHUNK, BLOCK_K): the power of two that holds K entries, and how many of them are compared with all at a time."""
    block = max(16, triton.next_power_of_2(K))
    return max(1, min(block, PAIRS * lanes // block)), block
