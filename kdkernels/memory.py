"""Memory of the CPU for gradients and chunks of logits, kept from one step to the next.

A C library maps a large block anew whenever it is asked for, and the system then finds, clears and maps every page of
it while the gradient is written. That takes as long as the loss itself, and several times as long on a virtual machine
that gives freed pages back to its host (docs/cpu.md). A smaller block fares the same whenever the rest of a step has
made the library give the top of its heap back. So the pages of the last gradient that was freed are kept, or of the
last four where they are small, and those of the last chunks of the losses on hidden states.

They are not withheld from anyone: what is kept is marked with ``MADV_FREE``, and the kernel takes it back when memory
gets scarce, without a word to this process and without writing it anywhere. Until then it counts as resident.
``empty_cache()`` gives it back at once; ``KDKERNELS_CPU_CACHE=0`` in the environment keeps nothing. On Linux only;
elsewhere gradients are what ``torch.empty`` gives.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Below this a gradient stays in the caches, and so does its memory in the C library.
MIN_BYTES = 8 * 2**20
# From this on one block is kept for each use, below it as many as SMALL_BLOCKS.
LARGE_BYTES = 32 * 2**20
SMALL_BLOCKS = 4
# A kept block is used for what needs at least this part of it; a smaller one would hold memory that nobody needs.
MIN_SHARE = 0.5

_available = sys.platform == "linux" and hasattr(mmap, "MADV_FREE")
# By use, large blocks and small ones. Only methods that are atomic touch what is in here: blocks come back from any
# thread, in the middle of anything.
_kept: dict[tuple[str, bool], deque[mmap.mmap]] = {}


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
    # The tensor holds the lease, and the lease the block: when the last tensor on it is gone, the block comes back.
    lease = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(lease, _give_back, block, use).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(shape)


def _keeps(like: Tensor, size: int) -> bool:
    # First: a compiler that sees the size would compile again for every other one.
    if torch.compiler.is_compiling() or not _available or size < MIN_BYTES:
        return False
    if os.environ.get("KDKERNELS_CPU_CACHE") == "0":
        return False
    # A subclass, such as a fake tensor, has its own way to make tensors; and whoever asks for filled memory gets it.
    plain = type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu"
    deterministic: Any = torch.utils.deterministic
    filled = torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory
    return plain and not filled


def _blocks(size: int, use: str) -> deque[mmap.mmap]:
    large = size >= LARGE_BYTES
    return _kept.setdefault((use, large), deque(maxlen=1 if large else SMALL_BLOCKS))


def _take(size: int, use: str) -> mmap.mmap:
    blocks = _blocks(size, use)
    for _ in range(len(blocks)):
        try:
            block = blocks.popleft()
        except IndexError:  # another thread was faster
            break
        if MIN_SHARE * len(block) <= size <= len(block):
            return block
        blocks.append(block)
        del block
    # None is of use: the sizes have changed.
    blocks.clear()
    # Private: a forked process has pages of its own.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _give_back(block: mmap.mmap, use: str) -> None:
    try:
        block.madvise(mmap.MADV_FREE)
    except OSError:  # a kernel that does not know it
        return
    _blocks(len(block), use).append(block)
