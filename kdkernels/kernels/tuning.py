"""Launch shapes, chosen from V, the dtype and the weight of the sweep: no timing runs, one compilation a call site."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

# One warp covers 32 lanes of a CUDA GPU, 64 of a CDNA one.
WARP = 64 if torch.version.hip else 32

# Columns of one tensor a thread holds at a time: four independent 16-byte loads of two bf16 tensors, eight of fp32.
ELEMENTS = 16
# More threads would leave them fewer registers than they need: 64, 128 and 255 a thread.
LIGHT, MEDIUM, HEAVY = range(3)
MAX_THREADS = (1024, 512, 256)


class Shape(NamedTuple):
    """A tile (ROLL, LANES, VEC) of ROLL * LANES * VEC columns, and the warps that hold its LANES."""

    TILE: tuple[int, int, int]
    num_warps: int


def shape(V: int, itemsize: int, *, load: int = LIGHT, warp: int = WARP) -> Shape:
    """The tile of a sweep over rows of V columns.

    Args:
        itemsize: bytes of the widest element that is loaded; its accesses are 16 bytes wide.
        load: how many values a thread keeps alive: LIGHT (sums of a linear divergence), MEDIUM (a pair of functions, or
            more than one term), HEAVY (statistics, mixtures of probabilities).
        warp: threads in a warp.
    """
    # 1024 threads leave 64 registers each and fill a multiprocessor with one row: the fewer rows are in flight, the
    # more of a wide row the next sweep finds in L2 (132 rows of two 128k bf16 tensors are 68 MB, an H100 has 50). Two
    # rows of up to 128 KB a tensor fit, and hide each other's reductions. Narrow rows get the threads for one tile.
    most = 256 if V * itemsize <= 16384 else 512 if V * itemsize <= 131072 else 1024
    threads = min(triton.next_power_of_2(V) // ELEMENTS, most, MAX_THREADS[load])
    num_warps = max(1, threads // warp)
    vec = 16 // itemsize
    return Shape((ELEMENTS // vec, num_warps * warp, vec), num_warps)
