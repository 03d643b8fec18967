"""The pattern that runs and its launch shape, chosen from V, the dtype, the load of a thread and the architecture."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import triton
from torch import Tensor

# One warp covers 32 lanes of a CUDA GPU, 64 of a CDNA one.
WARP = 64 if torch.version.hip else 32

# Columns of one tensor a thread holds at a time: four independent 16-byte loads of two bf16 tensors, eight of fp32.
ELEMENTS = 16
# The same of a kernel that is known to have the registers for it, with half the threads: fewer instructions a column.
WIDE_ELEMENTS = 32
# More threads would leave them fewer registers than they need: 64, 128 and 255 a thread.
LIGHT, MEDIUM, HEAVY = range(3)
# Of the resident kernel only: a divergence weighed by q, and what HEAVY does not describe well enough.
LIGHT_Q = 3
STATISTICS = 4
MAX_THREADS = (1024, 512, 256)


class Shape(NamedTuple):
    """A tile (ROLL, LANES, VEC) of ROLL * LANES * VEC columns, and the warps that hold its LANES."""

    TILE: tuple[int, int, int]
    num_warps: int


def shape(
    V: int, itemsize: int, *, load: int = LIGHT, wide: bool = False, vec: Optional[int] = None, warp: int = WARP
) -> Shape:
    """The tile of a sweep over rows of V columns.

    Args:
        itemsize: bytes of the widest element that is loaded.
        load: how many values a thread keeps alive: LIGHT (sums of a linear divergence), MEDIUM (a pair of functions, or
            more than one term), HEAVY (statistics, mixtures of probabilities).
        wide: of LIGHT ones, whether WIDE_ELEMENTS of 16 bits fit into 128 registers.
        vec: columns of one access; 16 bytes of them unless it is given.
        warp: threads in a warp.
    """
    # 1024 threads leave 64 registers each and fill a multiprocessor with one row: the fewer rows are in flight, the
    # more of a wide row the next sweep finds in L2 (132 rows of two 128k bf16 tensors are 68 MB, an H100 has 50). Two
    # rows of up to 128 KB a tensor fit, and hide each other's reductions. Narrow rows get the threads for one tile.
    most = 256 if V * itemsize <= 16384 else 512 if V * itemsize <= 131072 or wide else 1024
    threads = min(triton.next_power_of_2(V) // ELEMENTS, most, MAX_THREADS[load])
    num_warps = max(1, threads // warp)
    lanes = num_warps * warp
    elements = ELEMENTS
    if wide and itemsize == 2:
        # Unless more columns beyond the row's end would have to be taken for it.
        tiles, wide_tiles = (triton.cdiv(V, lanes * n) * n for n in (ELEMENTS, WIDE_ELEMENTS))
        elements = WIDE_ELEMENTS if wide_tiles <= 1.05 * tiles else ELEMENTS
    vec = vec or 16 // itemsize
    return Shape((elements // vec, lanes, vec), num_warps)


# The resident pattern: one pass over a row that stays in registers. These tables alone decide whether it runs, and in
# which shape.

# Rows of up to so many columns share a block, most of them a warp or less a row.
NARROW = 2048
# Blocks in a cluster, by compute capability: 16 is allowed where a GPU processing cluster has that many
# multiprocessors to spare, 8 is what every GPU with clusters takes.
MAX_CTAS = {90: 16, 100: 16, 103: 16}
PORTABLE_CTAS = 8
# (warps of a block, columns a thread may hold) by load, best guess first: what compiles to two or three resident blocks
# of a row of 131072 columns where that is possible, and to no spill. Several entries are a shortlist for ``fastest``.
CLUSTER = {
    LIGHT: ((4, 64), (8, 64), (16, 32)),
    LIGHT_Q: ((4, 64), (8, 64), (16, 32)),
    MEDIUM: ((8, 48), (16, 16)),
    HEAVY: ((8, 32), (16, 16)),
    STATISTICS: ((8, 16),),
}
# The same of one block, which every GPU and every Triton has, and whether exponentials are kept for the gradient (if
# not, of 16 bits and on CUDA only: logits of 32 bits, or twice the threads, take the registers themselves). What
# has no entry wide enough is swept: pairs of functions above 16384 columns, whose scores need registers too.
ONE_BLOCK = {
    LIGHT: ((4, 64, True), (8, 64, True), (16, 48, True), (16, 64, False)),
    LIGHT_Q: ((4, 64, True), (8, 64, True), (16, 48, True), (16, 64, False)),
    MEDIUM: ((8, 32, True), (16, 32, True)),
    HEAVY: ((8, 32, True), (16, 16, True)),
    STATISTICS: ((8, 16, True),),
}
# (warps, columns a thread may hold) of one block of the sparse pattern, which has one tensor. All threads work on the
# entries alike, so that few are best. LIGHT: exponentials stay for the gradient, and the logits do not. HEAVY: every
# column has a value and a score of its own, or there are statistics.
SPARSE = {
    LIGHT: ((1, 64), (2, 64), (4, 64), (8, 64), (16, 64)),
    MEDIUM: ((1, 32), (2, 32), (4, 32), (8, 32), (16, 32)),
    HEAVY: ((1, 32), (2, 32), (4, 32), (8, 32)),
}
# Entries a thread holds.
SPARSE_ENTRIES = 4
# Warps of a block that captures a teacher's rows of up to 64 columns a thread.
CAPTURE_WARPS = (1, 2, 4, 8, 16)
# Pieces of a row that are written out one after another. They let sums be folded into fused multiply-adds. Of clusters
# they are fewer, and wider: the pass of Triton 3.8 that places the blocks gives up at 10000 steps, and of 64 columns
# four pieces leave a third block resident, at half an instruction a column.
MAX_PIECES = 8
MAX_CLUSTER_PIECES = {LIGHT: 8, LIGHT_Q: 4, MEDIUM: 4, HEAVY: 2, STATISTICS: 2}


class Plan(NamedTuple):
    """How a pattern runs: in "sweeps" (TILE as in ``Shape``), or with the row in registers (TILE = PIECES, LANES, VEC).

    The latter is a "cluster" of the dense pattern, which may be one block, that may take several rows, and "resident"
    in one block of the sparse one. keep: exponentials stay for the gradient.
    """

    pattern: str
    TILE: tuple[int, int, int]
    num_warps: int
    num_ctas: int = 1
    rows: int = 1
    keep: bool = True


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
    V: int,
    itemsize: int,
    *,
    load: int,
    resident_load: Optional[int],
    arch: int,
    wide: bool = False,
    vec: Optional[int] = None,
    cut: bool = False,
    gradient: bool = True,
    warp: int = WARP,
) -> list[Plan]:
    """The ways to run rows of V columns, the best guess first; the last one is always two sweeps.

    Args:
        itemsize: bytes of the widest element that is loaded.
        load, wide: of two sweeps, as in ``shape``.
        resident_load: of one pass; None when its kernel does not know the objective.
        arch: from ``architecture``.
        vec, cut: from ``arguments.vectors``; 16 bytes and rows of whole vectors unless given.
        gradient: whether there is one.
        warp: threads in a warp.
    """
    vec = vec or 16 // itemsize
    # The vectors' boundaries may add one vector to a row that is cut.
    columns = V + vec - 1 if cut else V
    swept = Plan("sweeps", *shape(V, itemsize, load=load, wide=wide, vec=vec, warp=warp))
    plans: list[Optional[Plan]] = []
    # Other devices than those of CUDA and ROCm: nobody knows what fits into their registers.
    if resident_load is not None and (arch or warp == 64):
        several = _several_rows(columns, vec, resident_load, warp) if columns <= NARROW else None
        if several is not None:
            return [several, swept]
        if arch >= 90 and triton_has_clusters():
            most_ctas = MAX_CTAS.get(arch, PORTABLE_CTAS)
            most_pieces = MAX_CLUSTER_PIECES[resident_load]
            for warps, most in CLUSTER[resident_load]:
                plans.append(_resident(columns, vec, warp, warps, most, True, most_ctas, most_pieces, gradient))
        if not any(plan is not None and plan.num_ctas == 1 for plan in plans):
            entries = [entry for entry in ONE_BLOCK[resident_load] if entry[2] or itemsize == 2 and warp == 32]
            alone = [_resident(columns, vec, warp, *entry) for entry in entries]
            fitting = [plan for plan in alone if plan is not None]
            # Two are enough, of which the second computes no exponential twice.
            plans += fitting[:1] + [plan for plan in fitting[1:2] if plan.keep]
    found = list(dict.fromkeys(plan for plan in plans if plan is not None))
    return [*found, swept]


def sparse_plans(
    V: int,
    itemsize: int,
    K: int,
    *,
    load: int,
    arch: int,
    swept: bool = True,
    vec: Optional[int] = None,
    cut: bool = False,
    warp: int = WARP,
) -> list[Plan]:
    """The ways to run the sparse pattern, as ``dense_plans``. load: of SPARSE; swept: if logits are read.

    Narrow rows take a block of one warp each, which their entries fill.
    """
    vec = vec or 16 // itemsize
    sweeps = Plan("sweeps", *shape(V, itemsize, load=min(load, MEDIUM), wide=load == LIGHT, vec=vec, warp=warp))
    if not swept or not (arch or warp == 64):
        return [sweeps]
    columns = V + vec - 1 if cut else V
    for warps, most in SPARSE[load]:
        plan = _resident(columns, vec, warp, warps, most, load == LIGHT)
        if plan is not None and K <= SPARSE_ENTRIES * warps * warp:
            return [plan._replace(pattern="resident"), sweeps]
    return [sweeps]


class CapturePlan(NamedTuple):
    """How a teacher is captured: in sweeps of a tile, or of a row that ``kept`` tiles hold in registers."""

    TILE: tuple[int, int, int]
    num_warps: int
    kept: int


def capture_plan(V: int, k: int, *, arch: int, vec: int, cut: bool = False, warp: int = WARP) -> CapturePlan:
    """The tiles of ``capture_topk``: a lane marks the columns it has in one of them in a word of 32 bits."""
    columns = V + vec - 1 if cut else V
    # Other devices than those of CUDA and ROCm: nobody knows what fits into their registers.
    for num_warps in CAPTURE_WARPS if arch or warp == 64 else ():
        lanes = num_warps * warp
        if warp == 64 and num_warps > 8:
            break  # a block of 1,024 threads has 128 registers for each, which do not hold the columns
        if columns <= 64 * lanes and k <= SPARSE_ENTRIES * lanes:
            roll = min(32 // vec, triton.next_power_of_2(triton.cdiv(columns, lanes * vec)))
            return CapturePlan((roll, lanes, vec), num_warps, triton.cdiv(columns, roll * lanes * vec))
    num_warps = 8 if k <= 1024 else 16
    return CapturePlan((32 // vec, num_warps * warp, vec), num_warps, 0)


def _resident(
    columns: int,
    vec: int,
    warp: int,
    num_warps: int,
    most: int,
    keep: bool,
    most_ctas: int = 1,
    most_pieces: int = MAX_PIECES,
    third: bool = False,
) -> Optional[Plan]:
    """The fewest blocks whose threads hold at most ``most`` columns each, or None.

    third: whether fewer and wider pieces make room for a third block of four warps.
    """
    num_ctas = 1
    while num_ctas <= most_ctas:
        lanes = num_ctas * num_warps * warp
        vectors = triton.cdiv(columns, lanes * vec)
        repeat = triton.next_power_of_2(triton.cdiv(vectors, most_pieces))
        if third and num_warps == 4 and vectors == MAX_PIECES:
            repeat = max(repeat, 2)
        pieces = triton.cdiv(vectors, repeat)
        if pieces * repeat * vec <= most:
            return Plan("cluster", (pieces, lanes * repeat, vec), num_warps, num_ctas, keep=keep)
        num_ctas *= 2
    return None


def _several_rows(columns: int, vec: int, load: int, warp: int) -> Optional[Plan]:
    """Two rows a block or more, whose threads hold half as many columns as those of a wide row where that is enough."""
    num_warps, most = 4, CLUSTER[load][0][1]
    for most_lanes, each in ((warp, most // 2), (warp, most), (num_warps * warp // 2, most)):
        vectors = max(1, min(each // vec, MAX_PIECES))
        lanes = triton.next_power_of_2(triton.cdiv(columns, vectors * vec))
        if lanes <= most_lanes:
            pieces = triton.cdiv(columns, lanes * vec)
            return Plan("cluster", (pieces, lanes, vec), num_warps, rows=num_warps * warp // lanes)
    return None


# Fewer elements than this are not worth a trial, whatever runs them.
WORTH_A_TRIAL = 2**24
TRIAL_ROWS = 512


def fastest(
    plans: list[Plan], key: tuple, x: Tensor, numel: int, trial: Callable[[Plan], None], compiled: Callable[[Plan], Any]
) -> Plan:
    """The plan to run: by trial on a GPU, once per key and kind of GPU; else the first that the GPU can place.

    The result is kept in ``kdkernels/dense_plans.json`` in Triton's cache directory, unless a trial failed. None is
    made while a CUDA graph is captured, with ``torch.use_deterministic_algorithms``, or with ``KDKERNELS_AUTOTUNE=0``
    in the environment: the table decides then, for every process alike.

    Args:
        trial: runs a plan.
        compiled: its kernel, not run.
    """
    if len(plans) == 1 or x.device.type != "cuda":
        return plans[0]
    name = " ".join(map(str, (torch.cuda.get_device_name(x.device), triton.__version__, *key)))

    def fits(plan: Plan) -> bool:
        return plan.num_ctas == 1 or _placeable(plan, name, x.device.index, compiled)

    by_table = numel < WORTH_A_TRIAL or os.environ.get("KDKERNELS_AUTOTUNE") == "0"
    by_table = by_table or torch.are_deterministic_algorithms_enabled()
    by_name = {str(tuple(plan)): plan for plan in plans}
    if not by_table:
        chosen = by_name.get({**_chosen(), **_CHOSEN_NOW}.get(name, ""))
        if chosen is not None and fits(chosen):
            return chosen
    if by_table or torch.cuda.is_current_stream_capturing():
        # To ask about a cluster takes its kernel: those of plans behind the first that fits are not compiled.
        return next(filter(fits, plans))
    plans = list(filter(fits, plans))
    if len(plans) == 1:
        return plans[0]
    seconds = {plan: _seconds(plan, trial) for plan in plans}
    # Of what is alike, or fails alike, the last: sweeps want least.
    fastest_plan = min(reversed(plans), key=seconds.__getitem__)
    if math.inf in seconds.values():
        _CHOSEN_NOW[name] = str(tuple(fastest_plan))
    else:
        _chosen()[name] = str(tuple(fastest_plan))
        _keep(_chosen())
    return fastest_plan


# Choices of this process that others are not to inherit: a trial failed.
_CHOSEN_NOW: dict[str, str] = {}
_PLACEABLE: dict[tuple, bool] = {}


def _placeable(plan: Plan, name: str, device: Optional[int], compiled: Callable[[Plan], Any]) -> bool:
    """True if the GPU, of which this process may have a part, has room for one cluster of the plan."""
    key = (plan, name, device)
    if key not in _PLACEABLE:
        try:
            kernel = compiled(plan)
            kernel._init_handles()
            utils = triton.runtime.driver.active.utils
            clusters = utils.cuOccupancyMaxActiveClusters(kernel.function, kernel.metadata.shared, plan.num_ctas)
            _PLACEABLE[key] = clusters > 0
        except (RuntimeError, triton.TritonError):
            _PLACEABLE[key] = False
    return _PLACEABLE[key]


def _seconds(plan: Plan, trial: Callable[[Plan], None]) -> float:
    try:
        return triton.testing.do_bench(lambda: trial(plan), warmup=5, rep=20)
    except (RuntimeError, triton.TritonError):
        # Memory for the trial, for one.
        return math.inf


def _cache_file() -> Path:
    return Path(triton.knobs.cache.dir) / "kdkernels" / "dense_plans.json"


@functools.cache
def _chosen() -> dict[str, str]:
    try:
        found = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    # Another program may have written it: what is no name of a plan is no choice.
    return {name: plan for name, plan in found.items() if isinstance(plan, str)} if isinstance(found, dict) else {}


def _keep(chosen: dict[str, str]) -> None:
    """Best effort: a cache that cannot be written costs a trial in the next process."""
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(chosen, file)
        os.replace(file.name, path)
    except OSError:
        pass
