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
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels.backends import cpu


class Rung(NamedTuple):
    """A way to take a loss, by the memory that it needs beside models and hidden states.

    logits: tensors ``[N, V]`` at the peak, the logits of the models included. entries: K ids (int32) and
    log-probabilities (float32) a row. chunks: a chunk of logits, and the gradients of head and hidden states.
    """

    call: str
    logits: int
    entries: int
    chunks: int


LADDER = (
    Rung("F.kl_div", 7, 0, 0),
    Rung("kd_loss", 3, 0, 0),
    Rung("kd_loss, inplace", 2, 0, 0),
    Rung("topk_kd_loss", 2, 1, 0),
    Rung("topk_kd_loss, inplace", 1, 1, 0),
    Rung("linear_kd_loss", 0, 0, 1),
    Rung("linear_topk_kd_loss", 0, 1, 1),
)


def estimate(
    rows: int,
    vocab_size: int,
    *,
    hidden_size: Optional[int] = None,
    k: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    chunk_bytes: Optional[int] = None,
) -> dict[str, int]:
    """Bytes that a loss and its gradient need beside models and hidden states, for each rung of the ladder.

    Args:
        rows: N, the tokens of a step: batch times length.
        vocab_size: V.
        hidden_size: D of the student; without it the losses on hidden states are left out.
        k: K of a sparse teacher.
        dtype: of the logits of both models, and of the hidden states.
        chunk_bytes: of the losses on hidden states, by default that of a GPU, 512 MiB.

    Example:
        >>> from kdkernels import memory
        >>> {call: size // 2**20 for call, size in memory.estimate(8192, 151936).items()}["kd_loss"]
        7122
    """
    from kdkernels.chunks import GPU_CHUNK_BYTES

    one = rows * vocab_size * dtype.itemsize
    chunk = GPU_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    # Logits of a chunk are float32, of student and teacher.
    chunk = min(chunk, 2 * 4 * rows * vocab_size)
    found = {}
    for rung in LADDER:
        if rung.chunks and hidden_size is None:
            continue
        gradients = (4 * vocab_size + rows * dtype.itemsize) * (hidden_size or 0) if rung.chunks else 0
        found[rung.call] = rung.logits * one + rung.entries * rows * k * 8 + rung.chunks * chunk + gradients
    return found


def ladder_table() -> str:
    """``LADDER`` as the table of docs/guide/memory.md, from which the calculator of that page reads its numbers."""
    lines = ["| call | tensors [N, V] | K entries a row | a chunk and gradients |", "| --- | --- | --- | --- |"]
    lines += [f"| `{rung.call}` | {rung.logits} | {rung.entries} | {rung.chunks} |" for rung in LADDER]
    return "\n".join(lines)


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
