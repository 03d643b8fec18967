"""Launch shapes, chosen from V, the dtype and the weight of the sweep: no timing runs, one compilation a call site."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

# Beyond 32 values a thread and tensor a sweep over two tensors begins to spill; with 16 warps that is 16384 columns.
MAX_BLOCK_V = 16384
# One warp covers 32 lanes of a CUDA GPU, 64 of a CDNA one.
WARP = 64 if torch.version.hip else 32


class Tile(NamedTuple):
    """A tile of ROLL * LANES columns; LANES of them are side by side, one 16-byte access of every thread."""

    ROLL: int
    LANES: int
    num_warps: int


def tile(V: int, itemsize: int, *, light: bool = True, warp: int = WARP) -> Tile:
    """The tile of a sweep over rows of V columns.

    Args:
        itemsize: bytes of the widest element that is loaded.
        light: few live values an element (sums of a linear divergence); otherwise a thread gets half as many elements.
        warp: threads in a warp.
    """
    # A wide row gets 16 warps and so a multiprocessor almost to itself: the fewer rows in flight, the more of a row the
    # second sweep finds in L2. Narrow rows get few warps, for fewer idle lanes and cheaper reductions.
    num_warps = 16 if V > 16384 else 8 if V > 4096 else 4 if V > 1024 else 1
    num_warps = max(1, num_warps * 32 // warp)
    lanes = min(num_warps * warp * (16 // itemsize), max(triton.next_power_of_2(V), warp))
    elements = 32 if light else 16
    roll = max(1, min(num_warps * warp * elements, MAX_BLOCK_V, triton.next_power_of_2(V)) // lanes)
    return Tile(roll, lanes, num_warps)
