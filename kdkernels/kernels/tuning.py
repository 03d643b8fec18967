"""The pattern that runs and its launch shape, chosen from V, the dtype, the load of a thread and the architecture."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

# One warp covers 32 lanes of a CUDA GPU, 64 of a CDNA one.
WARP = 64 if torch.version.hip else 32

# Columns of one tensor a thread holds at a time: four independent 16-byte loads of two bf16 tensors, eight of fp32.
ELEMENTS = 16
# More threads would leave them fewer registers than they need: 64, 128 and 255 a thread.
LIGHT, MEDIUM, HEAVY = range(3)
# Of the cluster kernel only, which HEAVY does not describe well enough.
STATISTICS = 3
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


# The cluster pattern. This table alone decides whether it runs, and in which shape.

# From here on the second sweep's reads no longer hit L1, and keeping the row in registers pays.
NARROWEST_RESIDENT = 2048
# Blocks in a cluster, by compute capability: 16 is allowed where a GPU processing cluster has that many
# multiprocessors to spare, 8 is what every GPU with clusters takes.
MAX_CTAS = {90: 16, 100: 16, 103: 16}
PORTABLE_CTAS = 8
# (warps, columns a thread may hold) by load, best guess first: what compiles to two resident blocks of a row of 131072
# columns where that is possible, and to no spill. More than one entry is a shortlist for ``autotune``.
RESIDENT = {
    LIGHT: ((4, 64), (8, 64), (16, 32)),
    MEDIUM: ((8, 48), (16, 16)),
    HEAVY: ((8, 32), (16, 16)),
    STATISTICS: ((8, 16),),
}
# Pieces of a row that are written out one after another. They let sums be folded into fused multiply-adds, but the pass
# of Triton 3.8 that places the blocks gives up at 10000 steps; wider pieces mean fewer.
MAX_PIECES = {LIGHT: 8, MEDIUM: 4, HEAVY: 2, STATISTICS: 2}


class Plan(NamedTuple):
    """How the dense pattern runs: in "sweeps" (TILE as in ``Shape``) or "cluster" (TILE = PIECES, LANES, VEC)."""

    pattern: str
    TILE: tuple[int, int, int]
    num_warps: int
    num_ctas: int = 1


def triton_has_clusters() -> bool:
    """Triton 3.6 and 3.7 fail on reductions over several blocks."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (major, minor) >= (3, 8)


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA GPU (90 for 9.0), 0 for every other device."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dense_plans(
    V: int, itemsize: int, *, load: int, resident_load: Optional[int], arch: int, warp: int = WARP
) -> list[Plan]:
    """The ways to run rows of V columns, the best guess first; the last one is always two sweeps.

    Args:
        itemsize: bytes of the widest element that is loaded.
        load: of two sweeps, as in ``shape``.
        resident_load: of the cluster kernel; None when it does not know the objective.
        arch: from ``architecture``.
    """
    plans = []
    if resident_load is not None and arch >= 90 and V >= NARROWEST_RESIDENT and triton_has_clusters():
        found = (_resident(V, itemsize, resident_load, arch, *entry) for entry in RESIDENT[resident_load])
        plans = [plan for plan in found if plan is not None]
    return [*plans, Plan("sweeps", *shape(V, itemsize, load=load, warp=warp))]


def _resident(V: int, itemsize: int, load: int, arch: int, num_warps: int, most: int) -> Optional[Plan]:
    """The fewest blocks whose threads hold at most ``most`` columns each, or None."""
    vec = 16 // itemsize
    num_ctas = 1
    while num_ctas <= MAX_CTAS.get(arch, PORTABLE_CTAS):
        lanes = num_ctas * num_warps * 32
        vectors = triton.cdiv(V, lanes * vec)
        repeat = triton.next_power_of_2(triton.cdiv(vectors, MAX_PIECES[load]))
        pieces = triton.cdiv(vectors, repeat)
        if pieces * repeat * vec <= most:
            return Plan("cluster", (pieces, lanes * repeat, vec), num_warps, num_ctas)
        num_ctas *= 2
    return None


# Fewer elements than this are not worth a trial, whatever runs them.
WORTH_A_TRIAL = 2**24
TRIAL_ROWS = 512


def fastest(plans: list[Plan], key: tuple, x: Tensor, numel: int, trial: Callable[[Plan], None]) -> Plan:
    """The plan to run: by trial on a GPU, once per key and kind of GPU; else the first.

    The result is kept in ``kdkernels/dense_plans.json`` in Triton's cache directory. ``KDKERNELS_AUTOTUNE=0`` in the
    environment turns trials off; none is made while a CUDA graph is captured.
    """
    if len(plans) == 1 or x.device.type != "cuda" or numel < WORTH_A_TRIAL:
        return plans[0]
    if os.environ.get("KDKERNELS_AUTOTUNE") == "0":
        return plans[0]
    name = " ".join(map(str, (torch.cuda.get_device_name(x.device), triton.__version__, *key)))
    chosen = _chosen()
    if chosen.get(name) not in range(len(plans)):
        if torch.cuda.is_current_stream_capturing():
            return plans[0]
        seconds = [_seconds(plan, trial) for plan in plans]
        chosen[name] = min(range(len(plans)), key=seconds.__getitem__)
        _keep(chosen)
    return plans[chosen[name]]


def _seconds(plan: Plan, trial: Callable[[Plan], None]) -> float:
    try:
        return triton.testing.do_bench(lambda: trial(plan), warmup=5, rep=20)
    except (RuntimeError, triton.TritonError):
        # This GPU, or this Triton, cannot run it: too large a cluster on a part of a GPU, for one.
        return math.inf


def _cache_file() -> Path:
    return Path(triton.knobs.cache.dir) / "kdkernels" / "dense_plans.json"


@functools.cache
def _chosen() -> dict[str, int]:
    try:
        return json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _keep(chosen: dict[str, int]) -> None:
    """Best effort: a cache that cannot be written costs a trial in the next process."""
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(chosen, file)
        os.replace(file.name, path)
    except OSError:
        pass
