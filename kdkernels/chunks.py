"""The rows of the chunks of a loop: how many, which, and their gradients; of shards those that all ranks have alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from kdkernels import checks, memory, symbols
from kdkernels.heads import sum_dtype
from kdkernels.launch import Launch
from kdkernels.objective import TERMS

if TYPE_CHECKING:
    from kdkernels.parallel.shards import Shards

Rows = Union[slice, Tensor]

# Of all logits of a chunk. On a CPU the heads are packed anew for every chunk: a fifth of a projection at 256 rows, a
# tenth at 512; these are 393 rows of 32000 logits of student and teacher, 98 of 128256. On a GPU a product needs about
# 1000 rows before it is bound by arithmetic and not by reading the head.
CPU_CHUNK_BYTES = 96 * 2**20
GPU_CHUNK_BYTES = 512 * 2**20
# A chunk stays in half of a GPU's L2 cache where it may be so small: with that many rows, with products that take
# longer than the launches around them (100 us on an H100), and where it moves fewer bytes of the heads than it saves.
GPU_PRODUCT_ROWS = 1024
GPU_CHUNK_OPERATIONS = 8e10


class Products(NamedTuple):
    """The matrix products of a chunk."""

    row_operations: int
    head_bytes: int  # of heads and sums, read and written once a chunk

    @classmethod
    def of(
        cls, columns: int, hidden: Tensor, dtype: torch.dtype, teachers: Sequence[Tensor], needs: Sequence[bool]
    ) -> Products:
        """For the loop's arguments, operands in ``dtype``; the hidden states of the teachers are such already."""
        width, of_teachers = hidden.shape[1], sum(states.shape[1] for states in teachers)
        moved = width * dtype.itemsize * (1 + needs[0]) + width * 2 * sum_dtype(dtype).itemsize * needs[1]
        moved += sum(states.shape[1] * states.dtype.itemsize for states in teachers)
        return cls(2 * columns * (width * (1 + sum(needs[:2])) + of_teachers), columns * moved)


def chunk_rows(
    chunk_bytes: Optional[int], device: torch.device, row_bytes: int, products: Optional[Products] = None
) -> int:
    """Rows of a chunk of ``row_bytes`` a row."""
    if chunk_bytes is not None:
        return chunk_bytes // row_bytes
    if device.type == "cpu":
        return CPU_CHUNK_BYTES // row_bytes
    return gpu_chunk_rows(memory.l2_bytes(device), row_bytes, products)


def gpu_chunk_rows(l2_bytes: int, row_bytes: int, products: Optional[Products]) -> int:
    """As ``chunk_rows``: what half of the L2 cache holds, if that is enough for the products.

    A logit in the cache saves about twice the bytes that it has in a chunk, so that the chunk saves ``l2_bytes``.
    """
    rows = l2_bytes // 2 // row_bytes
    if products is not None and rows >= GPU_PRODUCT_ROWS and products.head_bytes <= l2_bytes:
        if rows * products.row_operations >= GPU_CHUNK_OPERATIONS:
            return rows
    return GPU_CHUNK_BYTES // row_bytes


def chunks(launch: Launch, num_rows: int, size: int) -> Iterator[tuple[Rows, int]]:
    return even_chunks(kept_rows(launch), num_rows, size)


def even_chunks(kept: Optional[Tensor], num_rows: int, size: int) -> Iterator[tuple[Rows, int]]:
    """Index and length of chunks of at most ``size`` of the rows ``kept`` (None: all), none longer than the first."""
    total = num_rows if kept is None else len(kept)
    count = -(-total // max(size, 1))
    for k in range(count):
        start, stop = -(-k * total // count), -(-(k + 1) * total // count)
        yield (slice(start, stop) if kept is None else kept[start:stop]), stop - start


def agreed_chunks(
    shards: Optional[Shards], kept: Optional[Tensor], num_rows: int, size: int, like: Tensor
) -> list[tuple[Rows, int]]:
    """``even_chunks``, the same on all ranks."""
    if shards is not None and checks.reads_values(like):
        # Or a reduction would wait for another of a different size.
        shards.agree("rows that count", num_rows if kept is None else len(kept), like.device)
    return list(even_chunks(kept, num_rows, size))


def kept_rows(launch: Launch) -> Optional[Tensor]:
    """The rows whose products are worth computing; None for all.

    Their number is the one thing that the host must know, which waits for a GPU once per call with labels or row
    weights, before any product is queued. A CUDA graph cannot wait: while one is captured every row is computed.
    """
    labels, weight = launch.rows.labels, launch.rows.row_weight
    counts = None if labels is None else labels != launch.options["ignore_index"]
    # One weight for all rows is a normaliser; statistics are taken of rows of weight 0 too.
    if weight is not None and (weight.stride(0) or len(weight) == 1) and not launch.options["stats"]:
        counts = weight != 0 if counts is None else counts & (weight != 0)
    weights = launch.rows.weights_of_terms()
    others = [name for name in TERMS if getattr(launch.rows, f"{name}_rows") is None]
    if weights and not launch.options["stats"] and not any(launch.options[name] for name in others):
        # A row in which no term has a weight.
        has_term = torch.stack(weights).amax(0) != 0
        counts = has_term if counts is None else counts & has_term
    return None if counts is None else indices(counts)


def indices(counts: Tensor) -> Optional[Tensor]:
    """The rows that count; None for all, and where their number cannot be asked for."""
    if not symbols.has_values(counts) or (counts.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    kept = counts.nonzero().squeeze(1)
    return None if len(kept) == len(counts) else kept


class Ahead:
    """The logits of chunks, each made once: when it is asked for, or before."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self._make, self._left = make, iter(range(count))
        self._found: dict[int, Any] = {}

    def prepare(self) -> None:
        """Make the next ones, unless some are waiting."""
        if not self._found:
            for k in self._left:
                self._found[k] = self._make(k)
                return

    def take(self, k: int) -> Any:
        self.prepare()
        return self._found.pop(k)


class HiddenGrad:
    """The gradient of hidden states ``[N, D]``: of shards the sum over all ranks, of a chunk at a time."""

    def __init__(self, zeros: Tensor, shards: Optional[Shards]) -> None:
        self._whole, self._shards = zeros, shards
        self._last: Callable[[], None] = lambda: None

    def add(self, rows: Rows, part: Tensor) -> None:
        """Begin with the sum of a chunk's, and end with that of the chunk before."""
        if self._shards is None:
            self._whole[rows] = part.to(self._whole.dtype)
            return
        total = part.to(sum_dtype(part.dtype), copy=True)
        wait, self._last = self._last, self._ending(self._shards, rows, total)
        wait()

    def finish(self) -> Tensor:
        self._last()
        return self._whole

    def _ending(self, shards: Shards, rows: Rows, total: Tensor) -> Callable[[], None]:
        wait = shards.started(total) if total.numel() else lambda: None

        def end() -> None:
            wait()
            self._whole[rows] = total.to(self._whole.dtype)

        return end
