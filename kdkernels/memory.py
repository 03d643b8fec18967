"""Memory of the CPU for gradients and chunks of logits, kept from one step to the next.

A C library maps every large block anew, and the system then finds, clears and maps every page of it while the kernel
writes the gradient. That takes as long as the loss itself, and several times as long on a virtual machine
that gives freed pages back to its host (docs/internals/cpu.md). A smaller block fares the same whenever the rest of a
step has made the library give the top of its heap back. So the compiled backend (csrc/cpu/memory.cpp) keeps the
pages of the last gradient that was freed, or of the last four where they are small, and those of the last chunks of the
losses on hidden states.

Other processes can have these pages: the backend marks them with ``MADV_FREE``, all but less than 2 MiB of a block, and
the system takes them back when memory gets scarce, without telling this process and without writing them anywhere.
Until then they count as resident. ``empty_cache()`` gives them back at once; ``KDKERNELS_CPU_CACHE=0`` in the
environment, when the backend loads, keeps none. Linux with torch 2.11 or newer has this cache; elsewhere gradients are
what ``torch.empty`` gives.

Such a gradient is a tensor as others are but for this: its storage cannot be resized, for torch's stable ABI lends
memory to storages of a fixed size only. ``grad.resize_`` to more elements and ``grad.untyped_storage().resize_``, with
which sharded training frees its own buffers, raise "not resizable"; set ``grad`` to None to free it, or
``KDKERNELS_CPU_CACHE=0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import cpu

# Smaller tensors are not kept (kMinBytes of csrc/cpu/memory.cpp), so torch makes them.
MIN_BYTES = 8 * 2**20


def empty_cache() -> None:
    """Give the memory that is kept for the next step on the CPU back to the system.

    As ``torch.cuda.empty_cache()``: tensors that are in use keep theirs.
    """
    if cpu.load_error() is None:
        torch.ops.kdkernels.kept_release()


def kept_blocks(use: str = "gradient") -> list[int]:
    """The sizes in bytes of the blocks that are kept for gradients, or for another use, and free."""
    return torch.ops.kdkernels.kept_blocks(use) if cpu.load_error() is None else []


def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache, or 0 where torch does not say it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def empty_like(logits: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the shape, dtype and device of logits; a large one is in kept memory."""
    return empty(logits, logits.shape, logits.dtype, "gradient")


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype, use: str) -> Tensor:
    """An uninitialised contiguous tensor on the device of ``like``; a large one is in memory kept for this use."""
    if _keeps(like, math.prod(shape) * dtype.itemsize):
        return torch.ops.kdkernels.kept_empty(shape, dtype, use)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _keeps(like: Tensor, size: int) -> bool:
    # First: a compiler that sees the size would compile again for every other one.
    if torch.compiler.is_compiling() or size < MIN_BYTES or cpu.why_not(like.device.type) is not None:
        return False
    # A subclass, such as a fake tensor, has its own way to make tensors; and whoever asks for filled memory gets it.
    if type(like) not in (Tensor, torch.nn.Parameter):
        return False
    return not is_poisoned()


def is_poisoned() -> bool:
    """True if uninitialised memory gets NaN, as in torch's deterministic mode."""
    deterministic: Any = torch.utils.deterministic
    return torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory
