"""Log-probabilities of given tokens, one program a row: forward 1 read of [N, V], backward 1 read and 1 write.

Forward keeps the largest logit of a row and its sum of exponentials, from which backward makes q in one sweep. The
logits of the ids are gathered before it: 32 bytes each, where finding them in the tiles would take two instructions of
every column. Backward writes the part of the gradient that is proportional to q, and after a barrier the columns of the
ids once more.

The sum outside the ids, for a sparse teacher's tail, is made in the same read by a kernel of its own: K steps for every
64 columns a lane holds mark the columns that it leaves out.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.kernels import tuning
from kdkernels.kernels.arguments import Logits, contiguous, num_rows, on_device_of, vectors
from kdkernels.kernels.arguments import logits as logits_argument
from kdkernels.kernels.rows import (
    LN2,
    LOG2E,
    NEG_INF,
    Span,
    end_of,
    fast_exp2,
    fold_max,
    fold_sum,
    grid_pointer,
    inside,
    is_at_end,
    lane_lowest,
    lane_zeros,
    load_vectors,
    logits_of,
    reciprocal,
    row_skew,
    soft_cap,
    spread,
    store_vectors,
    tile_heads,
    tile_offsets,
    widen,
    zero_tiles,
)
from kdkernels.kernels.terms import through_cap

# A token whose column is in another shard of the vocabulary.
ELSEWHERE = tl.constexpr(ops.ELSEWHERE)
# An exponent whose power of two is 0, in place of -inf: 0 * FLOOR is 0.
FLOOR = tl.constexpr(-65536.0)
# Bits of the word in which a lane marks the columns it holds.
WORD = tl.constexpr(64)
# Pairs of ids a thread compares at a time.
PAIRS = 8
# One tensor is loaded, once: a thread has twice the columns of the other sweeps in flight, and no row has to wait in L2
# for a second sweep, so that small blocks may hide each other's ends.
MAX_WARPS = 8


@triton.jit
def load_ids(ids_ptr, K, V, ignore_index, BLOCK_K: tl.constexpr):
    """The ids of a row, which slots have one, and which of these are columns."""
    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + offs_k, mask=offs_k < K, other=-1)
    used = (ids != -1) & (ids != ignore_index) & (offs_k < K)
    return ids, used, used & (ids >= 0) & (ids < V)


@triton.jit
def gather_logits(row_ptr, ids, known, softcap):
    x = tl.load(row_ptr + tl.where(known, ids, 0), mask=known, other=0.0).to(tl.float32)
    if softcap is not None:
        x = soft_cap(x, softcap)
    return x


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32), axis=0) != 0


@triton.jit
def of_row(temperature, temperature_ptr, row, stride_tn):
    """1 / T of a row, and log2(e) / T."""
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row * stride_tn)
    unit = reciprocal(temperature)
    return unit, unit * LOG2E


@triton.jit
def defined(z):
    """The sum of exponentials of a row, NaN where nothing in it is finite."""
    return tl.where(z == 0, float("nan"), z)


# A sweep goes over the tiles that lie in the row as a whole, whose loads have no mask, and then over those at its ends:
# of a row whose ends cut vectors the first and the last, of another the last, if any.
@triton.jit
def inner_end(num_tiles, span, TILE: tl.constexpr):
    if TILE[3]:
        end = num_tiles - 1
    else:
        end = span.stop // (TILE[0] * TILE[1] * TILE[2])
    return end


@triton.jit
def ends_begin(num_tiles, span, TILE: tl.constexpr):
    if TILE[3]:
        begin = 0
    else:
        begin = inner_end(num_tiles, span, TILE)
    return begin


@triton.jit
def ends_step(num_tiles, TILE: tl.constexpr):
    if TILE[3]:
        step = tl.maximum(num_tiles - 1, 1)
    else:
        step = 1
    return step


@triton.jit
def load_part(row_ptr, start, offs_v, span, softcap, INNER: tl.constexpr, TILE: tl.constexpr):
    """Logits of one tile in fp32, -inf outside the row."""
    x = load_vectors(row_ptr, start, tile_heads(TILE), True, span, TILE, INNER)
    if INNER:
        x = widen(x)
        if softcap is not None:
            x = soft_cap(x, softcap)
    else:
        x = logits_of(x, offs_v, span, softcap, False)
    return x


@triton.jit
def add_tile(m, z, total, squares, x, scale, ENTROPY: tl.constexpr, STATS: tl.constexpr):
    """Lane maxima, sums of e = exp2(a), e a and e^2, where a = (x - m) scale, with one tile more."""
    n = tl.maximum(m, fold_max(x))
    a = (x - spread(n)) * scale
    shift = tl.maximum((m - n) * scale, FLOOR)
    factor = fast_exp2(shift)
    e = fast_exp2(a)
    if ENTROPY:
        # A NaN would lose to FLOOR, but e has it too.
        total = tl.fma(total, factor, tl.fma(z * factor, shift, fold_sum(e * tl.maximum(a, FLOOR))))
    if STATS:
        squares = tl.fma(squares, factor * factor, fold_sum(e * e))
    return n, tl.fma(z, factor, fold_sum(e)), total, squares


@triton.jit(do_not_specialize=["L", "ignore_index"])
def token_fwd_kernel(
    logits: Logits,  # [B, L, V]
    ids_ptr,  # [N, K]
    temperature_ptr,  # [N]
    logprobs_ptr,  # [N, K]
    entropy_ptr,  # [N]
    lse_ptr,  # [N]
    norm_ptr,  # [N, 2]
    stats_ptr,  # [N, 2 + K]
    stride_tn,
    K,
    L,
    V,
    ignore_index,
    temperature,
    softcap,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    ENTROPY: tl.constexpr = entropy_ptr is not None
    STATS: tl.constexpr = stats_ptr is not None
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    logprobs_ptr += row64 * K + offs_k
    norm_ptr += row64 * 2
    ids, used, known = load_ids(ids_ptr + row64 * K, K, V, ignore_index, BLOCK_K)
    if any_of(used) == 0:
        tl.store(logprobs_ptr, tl.zeros([BLOCK_K], tl.float32), mask=offs_k < K)
        if ENTROPY:
            tl.store(entropy_ptr + row64, 0.0)
        tl.store(lse_ptr + row64, 0.0)
        tl.store(norm_ptr, 0.0)
        tl.store(norm_ptr + 1, 0.0)
        if STATS:
            tl.store(stats_ptr + row64 * (2 + K) + 2 + offs_k, tl.zeros([BLOCK_K], tl.float32), mask=offs_k < K)
            tl.store(stats_ptr + row64 * (2 + K), 0.0)
            tl.store(stats_ptr + row64 * (2 + K) + 1, 0.0)
        return
    skew = row_skew(logits, row64, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    row_ptr = grid_pointer(logits, row64, skew, L, TILE)
    unit, scale = of_row(temperature, temperature_ptr, row64, stride_tn)
    picked = gather_logits(row_ptr + skew, ids, known, softcap)

    offs_tile = tile_offsets(TILE)
    m = lane_lowest(TILE)
    z = lane_zeros(TILE)
    total = lane_zeros(TILE)
    squares = lane_zeros(TILE)
    mean = lane_zeros(TILE)
    each = 1.0 / V
    num_tiles = tl.cdiv(span.stop, BLOCK_V)
    for k in range(1 if TILE[3] else 0, inner_end(num_tiles, span, TILE)):
        start = k * BLOCK_V
        x = load_part(row_ptr, start, start + offs_tile, span, softcap, True, TILE)
        m, z, total, squares = add_tile(m, z, total, squares, x, scale, ENTROPY, STATS)
        if STATS:
            mean += fold_sum(x * each)
    for k in range(ends_begin(num_tiles, span, TILE), num_tiles, ends_step(num_tiles, TILE)):
        start = k * BLOCK_V
        x = load_part(row_ptr, start, start + offs_tile, span, softcap, False, TILE)
        m, z, total, squares = add_tile(m, z, total, squares, x, scale, ENTROPY, STATS)
        if STATS:
            mean += fold_sum(tl.where(inside(start + offs_tile, span), x * each, 0.0))
    top = tl.max(m, axis=0)
    shift = tl.maximum((m - top) * scale, FLOOR)
    if STATS:
        squares = tl.sum(squares * fast_exp2(shift + shift), axis=0)
    z *= fast_exp2(shift)
    if ENTROPY:
        total = tl.sum(tl.fma(total, fast_exp2(shift), z * shift), axis=0)
    all_z = tl.sum(z, axis=0)
    z = defined(all_z)
    log_z = tl.log(z)

    logp = (picked - top) * unit - log_z
    logp = tl.where(used, tl.where(known, logp, float("nan")), 0.0)
    tl.store(logprobs_ptr, logp, mask=offs_k < K)
    if ENTROPY:
        tl.store(entropy_ptr + row64, log_z - total / z * LN2)
    tl.store(lse_ptr + row64, top * unit + log_z)
    tl.store(norm_ptr, top)
    tl.store(norm_ptr + 1, all_z)
    if STATS:
        stats_ptr += row64 * (2 + K)
        largest = tl.where(z > 0, tl.where(known & (picked == top), 1.0, 0.0), 0.0)
        tl.store(stats_ptr + 2 + offs_k, largest, mask=offs_k < K)
        log_squares = tl.log(squares) - 2 * log_z
        tl.store(stats_ptr, tl.where(log_squares > 0, 0.0, log_squares))
        # NaN where there is no distribution.
        tl.store(stats_ptr + 1, tl.sum(mean, axis=0) + 0 * log_z)


@triton.jit
def mark_ids(ids_ptr, K, ignore_index, start, TILE: tl.constexpr):
    """For every lane a word with a bit for each of its columns that is an id, in the tiles from column start on."""
    LANES: tl.constexpr = TILE[1]
    VEC: tl.constexpr = TILE[2]
    lane = tl.arange(0, LANES)
    word = tl.zeros([LANES], tl.int64)
    one = tl.full([LANES], 1, tl.int64)
    for k in range(K):
        token = tl.load(ids_ptr + k)
        at = token - start
        inside = (at >= 0) & (at < WORD * LANES) & (token != ignore_index) & (token >= 0)
        at = tl.where(inside, at, 0).to(tl.int32)
        bit = at // (LANES * VEC) * VEC + at % VEC
        word |= tl.where((lane == at // VEC % LANES) & inside, one << bit, 0)
    return word


@triton.jit
def marked(word, tile, TILE: tl.constexpr):
    """The columns of a tile that are ids, counted from the first one that the word marks."""
    ROLL: tl.constexpr = TILE[0]
    VEC: tl.constexpr = TILE[2]
    bits = (word >> (tile * (ROLL * VEC))).to(tl.int32)
    position = tl.arange(0, ROLL)[:, None, None] * VEC + tl.arange(0, VEC)[None, None, :]
    return ((spread(bits) >> position) & 1) != 0


@triton.jit(do_not_specialize=["L", "ignore_index"])
def token_tail_kernel(
    logits: Logits,  # [B, L, V]
    ids_ptr,  # [N, K]
    temperature_ptr,  # [N]
    logprobs_ptr,  # [N, K]
    lse_ptr,  # [N]
    tail_ptr,  # [N]
    norm_ptr,  # [N, 2]
    stride_tn,
    K,
    L,
    V,
    ignore_index,
    temperature,
    softcap,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """As token_fwd_kernel, with the log of the mass outside the ids, no two of which are equal."""
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    SPAN: tl.constexpr = WORD * TILE[1]
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    ids_ptr += row64 * K
    logprobs_ptr += row64 * K + offs_k
    norm_ptr += row64 * 2
    ids, used, known = load_ids(ids_ptr, K, V, ignore_index, BLOCK_K)
    if any_of(used) == 0:
        tl.store(logprobs_ptr, tl.zeros([BLOCK_K], tl.float32), mask=offs_k < K)
        tl.store(lse_ptr + row64, 0.0)
        tl.store(tail_ptr + row64, 0.0)
        tl.store(norm_ptr, 0.0)
        tl.store(norm_ptr + 1, 0.0)
        return
    skew = row_skew(logits, row64, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    row_ptr = grid_pointer(logits, row64, skew, L, TILE)
    unit, scale = of_row(temperature, temperature_ptr, row64, stride_tn)
    picked = gather_logits(row_ptr + skew, ids, known, softcap)

    offs_tile = tile_offsets(TILE)
    m = lane_lowest(TILE)
    z = lane_zeros(TILE)
    for first in range(0, span.stop, SPAN):
        word = mark_ids(ids_ptr, K, ignore_index, first - skew, TILE)
        for tile in range(tl.cdiv(tl.minimum(span.stop - first, SPAN), BLOCK_V)):
            start = first + tile * BLOCK_V
            raw = load_vectors(row_ptr, start, tile_heads(TILE), is_at_end(start, span, TILE), span, TILE)
            x = logits_of(raw, start + offs_tile, span, softcap, False)
            x = tl.where(marked(word, tile, TILE), NEG_INF, x)
            n = tl.maximum(m, fold_max(x))
            z = tl.fma(z, fast_exp2((m - n) * scale), fold_sum(fast_exp2((x - spread(n)) * scale)))
            m = n
    outer = tl.max(m, axis=0)
    outer_z = tl.sum(z * fast_exp2((m - outer) * scale), axis=0)
    top = tl.maximum(outer, tl.max(tl.where(known, picked, NEG_INF), axis=0))
    inner_z = tl.sum(tl.where(known, fast_exp2((picked - top) * scale), 0.0), axis=0)
    all_z = inner_z + outer_z * fast_exp2((outer - top) * scale)
    z = defined(all_z)
    log_z = tl.log(z)

    logp = (picked - top) * unit - log_z
    tl.store(logprobs_ptr, tl.where(used, tl.where(known, logp, float("nan")), 0.0), mask=offs_k < K)
    tail = (outer - top) * unit + (tl.log(outer_z) - log_z)
    # Nothing outside, in a row that has a distribution.
    tail = tl.where((outer_z == 0) & (z > 0), NEG_INF, tail)
    tl.store(tail_ptr + row64, tl.where(tail > 0, 0.0, tail))
    tl.store(lse_ptr + row64, top * unit + log_z)
    tl.store(norm_ptr, top)
    tl.store(norm_ptr + 1, all_z)


@triton.jit
def sum_equal(ids, g, known, ids_ptr, g_ptr, K, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """For each slot the sum of g over all slots of its id, and whether it is the first of them."""
    offs_k = tl.arange(0, BLOCK_K)
    if BLOCK_K == 1:
        return g, known
    total = tl.zeros([BLOCK_K], tl.float32)
    earlier = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, CHUNK):
        offs_j = start + tl.arange(0, CHUNK)
        equal = tl.load(ids_ptr + offs_j, mask=offs_j < K, other=-1)[:, None] == ids[None, :]
        given = tl.load(g_ptr + offs_j, mask=offs_j < K, other=0.0)
        total += tl.sum(tl.where(equal, given[:, None], 0.0), axis=0)
        earlier += tl.sum((equal & (offs_j[:, None] < offs_k[None, :])).to(tl.int32), axis=0)
    return total, known & (earlier == 0)


@triton.jit(do_not_specialize=["L", "ignore_index"])
def token_bwd_kernel(
    logits: Logits,  # [B, L, V]
    ids_ptr,  # [N, K]
    norm_ptr,  # [N, 2]
    entropy_ptr,  # [N]
    dlogprobs_ptr,  # [N, K]
    dentropy_ptr,  # [N]
    dlogits: Logits,  # [B, L, pad_width or V]
    temperature_ptr,  # [N]
    stride_tn,
    K,
    L,
    V,
    pad_width,
    ignore_index,
    temperature,
    softcap,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    ENTROPY: tl.constexpr = dentropy_ptr is not None
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    ids_ptr += row64 * K
    dlogprobs_ptr += row64 * K
    skew = row_skew(logits, row64, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    pad_stop = span.stop if pad_width is None else end_of(skew, pad_width, TILE)
    dlogits_ptr = grid_pointer(dlogits, row64, skew, L, TILE)
    ids, used, known = load_ids(ids_ptr, K, V, ignore_index, BLOCK_K)
    g = tl.load(dlogprobs_ptr + offs_k, mask=used, other=0.0)
    counted = any_of(g != 0)
    if ENTROPY:
        h = tl.load(dentropy_ptr + row64)
        counted = counted | ((h != 0) & any_of(used))
    if counted == 0:
        zero_tiles(dlogits_ptr, Span(span.start, pad_stop), TILE)
        return
    row_ptr = grid_pointer(logits, row64, skew, L, TILE)
    unit, scale = of_row(temperature, temperature_ptr, row64, stride_tn)
    top = tl.load(norm_ptr + row64 * 2)
    z = tl.load(norm_ptr + row64 * 2 + 1)
    spoilt = tl.where(any_of(used & (known == 0) & (ids != ELSEWHERE)), float("nan"), 0.0)
    slope = tl.sum(g, axis=0) + spoilt
    if ENTROPY:
        # log q + H is a ln 2 less its mean: a in powers of two, and H - log z of the mean.
        slope += h * (tl.load(entropy_ptr + row64) - tl.log(z))
    slope *= -unit / z
    bend = 0.0
    if ENTROPY:
        bend = -h * LN2 * unit / z
    picked = gather_logits(row_ptr + skew, ids, known, softcap)
    # The stores from here on may go to the logits.
    tl.debug_barrier()

    offs_tile = tile_offsets(TILE)
    num_tiles = tl.cdiv(span.stop, BLOCK_V)
    for k in range(1 if TILE[3] else 0, inner_end(num_tiles, span, TILE)):
        start = k * BLOCK_V
        x = load_part(row_ptr, start, start + offs_tile, span, softcap, True, TILE)
        d = through_cap(q_part(x, top, scale, slope, bend, ENTROPY), x, softcap)
        store_vectors(dlogits_ptr, start, tile_heads(TILE), True, span, d, TILE, True)
    for k in range(ends_begin(num_tiles, span, TILE), num_tiles, ends_step(num_tiles, TILE)):
        start = k * BLOCK_V
        x = load_part(row_ptr, start, start + offs_tile, span, softcap, False, TILE)
        d = through_cap(q_part(x, top, scale, slope, bend, ENTROPY), x, softcap)
        store_vectors(dlogits_ptr, start, tile_heads(TILE), True, span, d, TILE)
    if pad_width is not None:
        zero_tiles(dlogits_ptr, Span(span.stop, pad_stop), TILE)
    tl.debug_barrier()
    total, first = sum_equal(ids, g, known, ids_ptr, dlogprobs_ptr, K, BLOCK_K, CHUNK)
    d = through_cap(total * unit + q_part(picked, top, scale, slope, bend, ENTROPY), picked, softcap)
    tl.store(dlogits_ptr + skew + tl.where(known, ids, 0), d.to(dlogits_ptr.dtype.element_ty), mask=first)


@triton.jit
def q_part(x, top, scale, slope, bend, ENTROPY: tl.constexpr):
    """The part of the gradient that has a factor q."""
    a = (x - top) * scale
    if ENTROPY:
        a = tl.maximum(a, FLOOR)
        d = fast_exp2(a) * tl.fma(a, bend, slope)
    else:
        d = fast_exp2(a) * slope
    return d


def tile_of(V: int, *tensors: Tensor) -> tuple[tuple[int, int, int, bool], int]:
    """The tile of a sweep over rows of these tensors, and its warps."""
    vec, cut = vectors(V, *tensors)
    (ROLL, LANES, VEC), num_warps = tuning.shape(V, tensors[0].element_size(), vec=vec)
    warps = min(num_warps, MAX_WARPS)
    lanes = LANES // num_warps * warps
    return (2 * ROLL if V > ROLL * lanes * VEC else ROLL, lanes, VEC, cut), warps


def token_fwd(
    logits: Tensor,
    ids: Tensor,
    temperature_rows: Optional[Tensor],
    *,
    vocab_size: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    tail_mass: bool,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``kdkernels.ops`` says, in one launch; the tail with anything else takes two.

    Args:
        logits: [B, L, V] or [N, V] with unit last stride; rows are numbered b * L + l.
        ids: int64 [N, K], contiguous.
        temperature_rows: fp32 [N], any stride.

    Returns:
        Log-probabilities [N, K], entropy [N] or [0], lse [N], tail [N] or [0], norm [N, 2], stats [N, 2 + K] or [0],
        in fp32.
    """
    L, N = logits.shape[-2], num_rows(logits)
    K = ids.shape[-1]
    logprobs = logits.new_empty((N, K), dtype=torch.float32)
    of_entropy = logits.new_empty(N if entropy else 0, dtype=torch.float32)
    tail = logits.new_empty(N if tail_mass else 0, dtype=torch.float32)
    lse = logits.new_empty(N, dtype=torch.float32)
    norm = logits.new_empty((N, 2), dtype=torch.float32)
    of_stats = logits.new_empty((N, 2 + K) if stats else (0,), dtype=torch.float32)
    results = logprobs, of_entropy, lse, tail, norm, of_stats
    if N == 0:
        return results
    TILE, num_warps = tile_of(vocab_size, logits)
    ids = ids.contiguous()
    stride_tn = None if temperature_rows is None else temperature_rows.stride(0)
    BLOCK_K = triton.next_power_of_2(K)
    with on_device_of(logits):
        if tail_mass:
            token_tail_kernel[(N,)](
                logits=logits_argument(logits),
                ids_ptr=ids,
                temperature_ptr=temperature_rows,
                logprobs_ptr=logprobs,
                lse_ptr=lse,
                tail_ptr=tail,
                norm_ptr=norm,
                stride_tn=stride_tn,
                K=K,
                L=L,
                V=vocab_size,
                ignore_index=ignore_index,
                temperature=temperature,
                softcap=softcap or None,
                BLOCK_K=BLOCK_K,
                TILE=TILE,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
        if entropy or stats or not tail_mass:
            token_fwd_kernel[(N,)](
                logits=logits_argument(logits),
                ids_ptr=ids,
                temperature_ptr=temperature_rows,
                logprobs_ptr=logprobs,
                entropy_ptr=of_entropy if entropy else None,
                lse_ptr=lse,
                norm_ptr=norm,
                stats_ptr=of_stats if stats else None,
                stride_tn=stride_tn,
                K=K,
                L=L,
                V=vocab_size,
                ignore_index=ignore_index,
                temperature=temperature,
                softcap=softcap or None,
                BLOCK_K=BLOCK_K,
                TILE=TILE,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return results


def token_bwd(
    logits: Tensor,
    ids: Tensor,
    norm: Tensor,
    entropy: Optional[Tensor],
    dlogprobs: Tensor,
    dentropy: Optional[Tensor],
    dlogits: Tensor,
    temperature_rows: Optional[Tensor],
    /,
    *,
    vocab_size: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    **_: bool,
) -> None:
    """Write the gradient to dlogits, which may be the logits, as ``kdkernels.ops`` says."""
    L, N = logits.shape[-2], num_rows(logits)
    K = ids.shape[-1]
    if N == 0:
        return
    width = logits.shape[-1]
    TILE, num_warps = tile_of(vocab_size, logits, dlogits)
    BLOCK_K = triton.next_power_of_2(K)
    with on_device_of(logits):
        token_bwd_kernel[(N,)](
            logits=logits_argument(logits),
            ids_ptr=ids.contiguous(),
            norm_ptr=norm,
            entropy_ptr=None if dentropy is None else contiguous(entropy),
            dlogprobs_ptr=dlogprobs.contiguous(),
            dentropy_ptr=contiguous(dentropy),
            dlogits=logits_argument(dlogits),
            temperature_ptr=temperature_rows,
            stride_tn=None if temperature_rows is None else temperature_rows.stride(0),
            K=K,
            L=L,
            V=vocab_size,
            pad_width=None if width == vocab_size else width,
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap or None,
            BLOCK_K=BLOCK_K,
            CHUNK=max(1, min(BLOCK_K, PAIRS * TILE[1] // BLOCK_K)),
            TILE=TILE,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
