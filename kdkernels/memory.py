"""Memory of the CPU for gradients and chunks of logits, kept from one step to the next.

A C library maps a large block anew whenever it is asked for, and the system then finds, clears and maps every page of
it while the gradient is written. That takes as long as the loss itself, and several times as long on a virtual machine
that gives freed pages back to its host (docs/cpu.md). A smaller block fares the same whenever the rest of a step has
made the library give the top of its heap back. So the pages of the last gradient that was freed are kept, or of the
last four where they are small, and those of the last chunks of the losses on hidden states.

They are not withheld from anyone: what is kept is marked with ``MADV_FREE``, all but less than 2 MiB of a block, and
the kernel takes it back when memory gets scarce, without a word to this process and without writing it anywhere. Until
then it counts as resident. ``empty_cache()`` gives it back at once; where ``KDKERNELS_CPU_CACHE=0`` is in the
environment when the package is imported, nothing is kept. On Linux only; elsewhere gradients are what ``torch.empty``
gives.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Below this a gradient stays in the caches, and so does its memory in the C library.
MIN_BYTES = 8 * 2**20
# From this on one block is kept for each use, below it as many as SMALL_BLOCKS.
LARGE_BYTES = 32 * 2**20
SMALL_BLOCKS = 4
HUGE_PAGE = 2 * 2**20
# A kept block is used for what needs at least this part of it; a smaller one would hold memory that nobody needs.
MIN_SHARE = 0.5

_available = sys.platform == "linux" and hasattr(mmap, "MADV_FREE") and os.environ.get("KDKERNELS_CPU_CACHE") != "0"
# By use, large blocks and small ones. Only methods that are atomic touch what is in here: blocks come back from any
# thread, in the middle of anything.
_kept: dict[tuple[str, bool], deque[_Block]] = {}


def empty_cache() -> None:
    """Give the memory that is kept for the next step on the CPU back to the system.

    As ``torch.cuda.empty_cache()``: tensors that are in use keep theirs.
    """
    _kept.clear()


def empty_like(logits: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the shape, dtype and device of logits; a large one is in kept memory."""
    return empty(logits, logits.shape, logits.dtype, "gradient")


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype, use: str) -> Tensor:
    """An uninitialised contiguous tensor on the device of ``like``; a large one is in memory kept for this use."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if not _keeps(like, size):
        return torch.empty(shape, dtype=dtype, device=like.device)
    block = _take(size, use)
    lease = block.lease_type.from_buffer(block.pages, block.offset)
    lease.block = block
    # The tensor holds the lease, and the lease the block: when the last tensor on it is gone, the block comes back.
    return torch.frombuffer(lease, dtype=dtype, count=size // dtype.itemsize).view(*shape)


class _Block:
    """Pages for one tensor at a time."""

    def __init__(self, size: int, use: str) -> None:
        self.use = use
        self.size = size
        # Private: a forked process has pages of its own. The space before the first huge page is not used.
        self.pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.offset = -ctypes.addressof(ctypes.c_char.from_buffer(self.pages)) % HUGE_PAGE
        self.lease_type = _lease_type(size)

    def offer_to_system(self) -> bool:
        """Let the kernel take the pages while they are kept; whether it knows how to.

        What fills no huge page, less than one, stays: to find 500 small pages in use again takes the processor longer
        than all the others.
        """
        try:
            self.pages.madvise(mmap.MADV_FREE, self.offset, self.size // HUGE_PAGE * HUGE_PAGE)
        except OSError:
            return False
        return True


def _lease_type(size: int) -> type[Any]:
    class Lease(ctypes.c_char * size):  # type: ignore[misc]
        block: _Block

        # When the interpreter ends, nothing that this needs may be left.
        def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
            if not ends():
                _give_back(self.block)

    return Lease


def _keeps(like: Tensor, size: int) -> bool:
    # First: a compiler that sees the size would compile again for every other one.
    if torch.compiler.is_compiling() or not _available or size < MIN_BYTES:
        return False
    # A subclass, such as a fake tensor, has its own way to make tensors; and whoever asks for filled memory gets it.
    if type(like) not in (Tensor, torch.nn.Parameter) or not like.is_cpu:
        return False
    deterministic: Any = torch.utils.deterministic
    return not (torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory)


def _blocks(size: int, use: str) -> deque[_Block]:
    large = size >= LARGE_BYTES
    return _kept.setdefault((use, large), deque(maxlen=1 if large else SMALL_BLOCKS))


def _take(size: int, use: str) -> _Block:
    blocks = _blocks(size, use)
    for _ in range(len(blocks)):
        try:
            block = blocks.popleft()
        except IndexError:  # another thread was faster
            break
        if MIN_SHARE * block.size <= size <= block.size:
            return block
        blocks.append(block)
        del block
    # None is of use: the sizes have changed.
    blocks.clear()
    return _Block(size, use)


def _give_back(block: _Block) -> None:
    if block.offer_to_system():
        _blocks(block.size, block.use).append(block)
