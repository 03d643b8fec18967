"""Capturing a teacher: the k largest logits of each row and the log of the mass of the others, one program a row.

1. A threshold that at least k logits reach: the k-th largest, but for its low bits, of the maxima of groups of columns.
2. The columns from the threshold on are candidates, seldom many more than k; the others go into the sum of the mass
   outside, relative to the threshold, so that no term exceeds 1 and nothing is ever subtracted. A lane marks its
   candidates in a word, and those find their places in a list by prefix sums: nothing hangs on the order of threads.
3. Where ties or an order in the row make more candidates than the list holds, the k-th largest logit is searched for
   by bisection, then the id up to which its equals belong to the k: these are k candidates. Only such rows pay for it.
4. Candidates are ranked by logit, equal ones by the lower id: all are compared with all, or many sorted.

A row that fits into a block's registers is read once, a wider one twice (its second sweep finds much in L2). Few rows
are read again: those of the third step, and those whose mass outside is 2**-90 of the k-th largest or less, which is
summed relative to its own maximum.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels import tuning
from kdkernels.kernels.arguments import Logits, num_rows, on_device_of, vectors
from kdkernels.kernels.arguments import logits as logits_argument
from kdkernels.kernels.rows import (
    LOG2E,
    LOWEST,
    NEG_INF,
    Span,
    end_of,
    fast_exp2,
    fold_max,
    fold_sum,
    grid_pointer,
    is_at_end,
    lane_lowest,
    lane_zeros,
    load_vectors,
    reciprocal,
    row_skew,
    tile_heads,
    tile_offsets,
    widen,
)

# Room for candidates: twice the power of two from k on, and at least so many.
LEAST = 64
# Candidates that are compared with all; more are sorted.
COMPARED = 512
# Pairs of candidates a thread compares at a time.
PAIRS = 8
# Under this share of the k-th largest the mass outside may have lost terms.
SMALL = tl.constexpr(2.0**-90)
# The smallest number in the order of ``ordered``, and that of the lowest finite fp32.
FIRST = tl.constexpr(-(2**31))
LOWEST_KEY = tl.constexpr(0x800000 - 2**31)
# Of no candidate.
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def ordered(x):
    """An fp32 as an integer of the same order; -0 is below 0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_any(row_ptr, start, span, TILE: tl.constexpr):
    """Any tile of a row, in its dtype and -inf outside it; column by column only where an end is in it."""
    return load_vectors(row_ptr, start, tile_heads(TILE), is_at_end(start, span, TILE), span, TILE)


@triton.jit
def peaks_of(x, LEVEL: tl.constexpr):
    """The largest logits of the groups of a tile: of lanes, or of a lane and a place in VEC, or of each column."""
    if LEVEL == 0:
        x = fold_max(x)
    elif LEVEL == 1:
        x = tl.max(widen(x), axis=0)
    else:
        x = widen(x)
    return x


@triton.jit
def no_peaks(LEVEL: tl.constexpr, TILE: tl.constexpr):
    ROLL: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    if LEVEL == 0:
        peaks = tl.full([LANES], LOWEST, tl.float32)
    elif LEVEL == 1:
        peaks = tl.full([LANES, VEC], LOWEST, tl.float32)
    else:
        peaks = tl.full([ROLL, LANES, VEC], LOWEST, tl.float32)
    return peaks


@triton.jit
def threshold_of(peaks, k):
    """A finite number that k of the peaks reach, where there are as many: the k-th largest but for its low bits."""
    keys = ordered(peaks)
    bound = tl.where(count_of(keys >= 0) >= k, 0, FIRST)
    step = 1 << 30
    for _ in range(15):
        bound = tl.where(count_of(keys >= bound + step) >= k, bound + step, bound)
        step = step >> 1
    return from_ordered(tl.maximum(bound, LOWEST_KEY))


@triton.jit
def count_of(mask):
    """How many elements of a block of any shape are true."""
    count = mask.to(tl.int32)
    for _ in tl.static_range(len(mask.shape)):
        count = tl.sum(count, axis=0)
    return count


@triton.jit
def word_of(hits, TILE: tl.constexpr):
    """The hits of each lane in a tile, a bit for each of its columns."""
    position = tl.arange(0, TILE[0])[:, None, None] * TILE[2] + tl.arange(0, TILE[2])[None, None, :]
    return fold_sum(tl.where(hits, tl.full(hits.shape, 1, tl.int32) << position, 0))


@triton.jit
def bits_of(word):
    """How many bits of each word are set."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def list_hits(list_ptr, count, word, start, MOST: tl.constexpr, TILE: tl.constexpr):
    """Write the columns that the lanes have marked to the list, as far as it goes; how many have come so far."""
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    mine = bits_of(word)
    found = tl.sum(mine, axis=0)
    if found > 0:
        place = count + tl.cumsum(mine, axis=0) - mine
        first = start + tl.arange(0, LANES) * VEC
        for _ in range(tl.max(mine, axis=0)):
            lowest = word & -word
            # The exponent of a power of two; without its sign that of the highest bit.
            bit = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
            column = first + bit // VEC * (LANES * VEC) + bit % VEC
            tl.store(list_ptr + place, column, mask=(word != 0) & (place < MOST))
            place += 1
            word ^= lowest
    return count + found


@triton.jit
def take_tile(
    list_ptr,
    count,
    rest,
    raw,
    start,
    offs_tile,
    threshold,
    last,
    scale,
    EXACT: tl.constexpr,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Candidates and mass outside of one tile more: from the threshold on, EXACT: of equal ones up to column last."""
    x = widen(raw)
    hits = x >= threshold
    if EXACT:
        hits = (x > threshold) | (hits & (start + offs_tile <= last))
    rest += fold_sum(fast_exp2((tl.where(hits, NEG_INF, x) - threshold) * scale))
    return list_hits(list_ptr, count, word_of(hits, TILE), start, MOST, TILE), rest


@triton.jit
def take_row(
    list_ptr,
    row_ptr,
    kept,
    span,
    threshold,
    last,
    scale,
    EXACT: tl.constexpr,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Candidates of a row, how many there are, and the mass of the others relative to the threshold."""
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    offs_tile = tile_offsets(TILE)
    count = 0
    rest = lane_zeros(TILE)
    if len(kept) > 0:
        for k in tl.static_range(len(kept)):
            count, rest = take_tile(
                list_ptr, count, rest, kept[k], k * BLOCK_V, offs_tile, threshold, last, scale, EXACT, MOST, TILE
            )
    else:
        for start in range(0, span.stop, BLOCK_V):
            raw = load_any(row_ptr, start, span, TILE)
            count, rest = take_tile(
                list_ptr, count, rest, raw, start, offs_tile, threshold, last, scale, EXACT, MOST, TILE
            )
    return count, tl.sum(rest, axis=0)


@triton.jit
def hits_of(x, offs_v, key, at, last, KIND: tl.constexpr):
    """How many logits of a tile are: 0, of a key or more; 1, above at; 2, equal to at, up to column last."""
    if KIND == 0:
        hits = (ordered(x) >= key) & (x > NEG_INF)
    elif KIND == 1:
        hits = x > at
    else:
        hits = (x == at) & (offs_v <= last)
    return tl.sum(tl.sum(hits.to(tl.int32), axis=2), axis=0)


# Steps that few rows need read them once more: else registers would keep them for it.
@triton.jit
def count_in_row(row_ptr, span, key, at, last, KIND: tl.constexpr, TILE: tl.constexpr):
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    offs_tile = tile_offsets(TILE)
    total = tl.zeros([TILE[1]], tl.int32)
    for start in range(0, span.stop, BLOCK_V):
        x = widen(load_any(row_ptr, start, span, TILE))
        total += hits_of(x, start + offs_tile, key, at, last, KIND)
    return tl.sum(total, axis=0)


@triton.jit
def search(row_ptr, span, k, STEPS: tl.constexpr, COLUMN_STEPS: tl.constexpr, TILE: tl.constexpr):
    """The k-th largest of more than k finite logits, and the last column of its equals that are among the k."""
    bound = tl.where(count_in_row(row_ptr, span, 0, 0.0, 0, 0, TILE) >= k, 0, FIRST)
    step = 1 << 30
    for _ in range(STEPS):
        enough = count_in_row(row_ptr, span, bound + step, 0.0, 0, 0, TILE) >= k
        bound = tl.where(enough, bound + step, bound)
        step = step >> 1
    at = from_ordered(bound)
    # Zeros of both signs are equal: here counts what is larger, and not the order of the keys.
    wanted = k - count_in_row(row_ptr, span, 0, at, 0, 1, TILE)
    # The last column before which there are too few.
    before = tl.full([1], -1, tl.int32)
    step = 1 << (COLUMN_STEPS - 1)
    for _ in range(COLUMN_STEPS):
        few = count_in_row(row_ptr, span, 0, at, tl.max(before, axis=0) + step, 2, TILE) < wanted
        before = tl.where(few, before + step, before)
        step = step >> 1
    return at, tl.max(before, axis=0) + 1


@triton.jit
def log_sum_below(row_ptr, span, at, scale, TILE: tl.constexpr):
    """The maximum of the logits below a number, and the log of the sum of their exponentials relative to it."""
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    top = lane_lowest(TILE)
    for start in range(0, span.stop, BLOCK_V):
        x = widen(load_any(row_ptr, start, span, TILE))
        top = tl.maximum(top, fold_max(tl.where(x < at, x, NEG_INF)))
    top = tl.max(top, axis=0)
    total = lane_zeros(TILE)
    for start in range(0, span.stop, BLOCK_V):
        x = widen(load_any(row_ptr, start, span, TILE))
        total += fold_sum(tl.where(x < at, fast_exp2((x - top) * scale), 0.0))
    return top, tl.log(tl.sum(total, axis=0))


@triton.jit
def rank_candidates(list_ptr, row_ptr, count, CHUNK: tl.constexpr, MOST: tl.constexpr):
    """Columns and logits [MOST] of the candidates, -inf where there is none, and their places in the order."""
    offs = tl.arange(0, MOST)
    columns = tl.load(list_ptr + offs, mask=offs < count, other=0)
    # + 0: zeros of both signs are equal, and a maximum of both is either.
    x = tl.load(row_ptr + columns, mask=offs < count, other=NEG_INF).to(tl.float32) + 0.0
    if CHUNK is None:
        # Among equals the lower column has the higher key.
        keys = (ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)
        keys = tl.sort(tl.where(offs < count, keys, NO_KEY), descending=True)
        columns = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
        x = tl.where(offs < count, from_ordered((keys >> 32).to(tl.int32)), NEG_INF)
        rank = offs
    else:
        rank = tl.zeros([MOST], tl.int32)
        for begin in range(0, count, CHUNK):
            others = begin + tl.arange(0, CHUNK)
            other_columns = tl.load(list_ptr + others, mask=others < count, other=0)[:, None]
            y = tl.load(row_ptr + other_columns, mask=others[:, None] < count, other=NEG_INF).to(tl.float32)
            earlier = (y > x[None, :]) | ((y == x[None, :]) & (other_columns < columns[None, :]))
            rank += tl.sum(earlier.to(tl.int32), axis=0)
    return columns, x, rank


@triton.jit(do_not_specialize=["k", "L"])
def capture_kernel(
    teacher: Logits,  # [B, L, V]
    temperature_ptr,  # [N]
    stride_tn,
    ids_ptr,  # [N, K]
    logprobs_ptr,  # [N, K]
    tail_ptr,  # [N]
    list_ptr,  # [N, MOST]
    k,
    L,
    V,
    temperature,
    LEVEL: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    index = tl.program_id(0).to(tl.int64)
    skew = row_skew(teacher, index, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    row_ptr = grid_pointer(teacher, index, skew, L, TILE)
    list_ptr += index * MOST
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + index * stride_tn)
    unit = reciprocal(temperature)
    scale = unit * LOG2E

    kept = ()
    for n in tl.static_range(KEPT):
        kept = kept + (load_any(row_ptr, n * BLOCK_V, span, TILE),)
    peaks = no_peaks(LEVEL, TILE)
    if KEPT > 0:
        for n in tl.static_range(KEPT):
            peaks = tl.maximum(peaks, peaks_of(kept[n], LEVEL))
    else:
        tiles = tl.cdiv(span.stop, BLOCK_V)
        for n in range(tiles):
            # From the end: the next sweep begins with what is in L2 still.
            raw = load_any(row_ptr, (tiles - 1 - n) * BLOCK_V, span, TILE)
            peaks = tl.maximum(peaks, peaks_of(raw, LEVEL))
    threshold = threshold_of(peaks, k)

    count, rest = take_row(list_ptr, row_ptr, kept, span, threshold, 0, scale, False, MOST, TILE)
    tl.debug_barrier()
    if count > MOST:
        threshold, last = search(row_ptr, span, k, STEPS, COLUMN_STEPS, TILE)
        count, rest = take_row(list_ptr, row_ptr, (), span, threshold, last, scale, True, MOST, TILE)
        tl.debug_barrier()
    columns, x, rank = rank_candidates(list_ptr, row_ptr, count, CHUNK, MOST)

    offs = tl.arange(0, MOST)
    here = offs < count
    chosen = here & (rank < k)
    top = tl.max(x, axis=0)
    full = count >= k
    kth = tl.where(full, tl.min(tl.where(chosen, x, float("inf")), axis=0), NEG_INF)
    inner = tl.sum(tl.where(chosen, fast_exp2((x - top) * scale), 0.0), axis=0)
    left = tl.sum(tl.where(here & (rank >= k), fast_exp2((x - kth) * scale), 0.0), axis=0)
    # Of fewer than k finite logits nothing is outside; a NaN among them stays.
    outer = tl.where(full, left + rest * fast_exp2((threshold - kth) * scale), rest)
    z = inner + outer * fast_exp2((kth - top) * scale)
    log_z = tl.log(z)
    log_outer = (kth - top) * unit + tl.log(outer)
    if full & (outer < SMALL):
        below, log_sum = log_sum_below(row_ptr, span, kth, scale, TILE)
        log_outer = (below - top) * unit + log_sum
    tail = tl.where(full, log_outer, NEG_INF) - log_z

    spoilt = (z != z) | (top == float("inf")) | (count == 0)
    place = tl.where(spoilt, offs, tl.where(here, rank, offs))
    logp = tl.where(here, (x - top) * unit - log_z, NEG_INF)
    nan = float("nan")
    tl.store(
        ids_ptr + index * k + place,
        tl.where(spoilt, offs, tl.where(here, columns - skew, -1)),
        mask=place < k,
    )
    tl.store(logprobs_ptr + index * k + place, tl.where(spoilt, nan, logp), mask=place < k)
    tl.store(tail_ptr + index, tl.where(spoilt, nan, tl.where(tail > 0, 0.0, tail)))


def capture_topk(
    teacher: Tensor, temperature_rows: Optional[Tensor], *, k: int, vocab_size: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kdkernels.ops`` says, in one launch.

    Args:
        teacher: logits [B, L, V] or [N, V] with unit last stride; rows are numbered b * L + l.
        temperature_rows: fp32 [N], any stride.

    Returns:
        Ids int32 [N, K], log-probabilities fp32 [N, K], and the log of the mass outside fp32 [N].
    """
    N = num_rows(teacher)
    ids = teacher.new_empty((N, k), dtype=torch.int32)
    logprobs = teacher.new_empty((N, k), dtype=torch.float32)
    tail = teacher.new_empty(N, dtype=torch.float32)
    if N == 0:
        return ids, logprobs, tail
    vec, cut = vectors(vocab_size, teacher)
    plan = tuning.capture_plan(vocab_size, k, vec=vec, cut=cut, arch=tuning.architecture(teacher.device))
    ROLL, LANES, VEC = plan.TILE
    groups = (LANES, LANES * VEC, ROLL * LANES * VEC)
    most = max(LEAST, 2 * triton.next_power_of_2(k))
    threads = plan.num_warps * tuning.WARP
    with on_device_of(teacher):
        capture_kernel[(N,)](
            teacher=logits_argument(teacher),
            temperature_ptr=temperature_rows,
            stride_tn=None if temperature_rows is None else temperature_rows.stride(0),
            ids_ptr=ids,
            logprobs_ptr=logprobs,
            tail_ptr=tail,
            list_ptr=teacher.new_empty((N, most), dtype=torch.int32),
            k=k,
            L=teacher.shape[-2],
            V=vocab_size,
            temperature=temperature,
            LEVEL=next((level for level, number in enumerate(groups) if number >= 2 * k), 2),
            MOST=most,
            CHUNK=max(1, min(most, PAIRS * threads // most)) if most <= COMPARED else None,
            # Of 16 bits the low half of an fp32 is 0, but for fp16, which has three bits more than bf16 there.
            STEPS=15 if teacher.dtype == torch.bfloat16 else 31,
            COLUMN_STEPS=(vocab_size + vec).bit_length(),
            KEPT=plan.kept,
            TILE=(*plan.TILE, cut),
            num_warps=plan.num_warps,
            enable_fp_fusion=True,
        )
    return ids, logprobs, tail
