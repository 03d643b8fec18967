"""The machine a figure was measured on: versions, processor, and the bandwidth it reaches."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import torch

import kdkernels
from benchmarks import measure
from kdkernels import build_info
from kdkernels.backends import cpu

STREAMS_SOURCE = Path(__file__).with_name("streams.c")
STREAM_BYTES = 128 * 2**20
STREAM_REPEATS = 7


def versions() -> dict[str, str]:
    """Versions of everything that bears on a figure."""
    found = {"python": platform.python_version()}
    for package in ("torch", "kdkernels", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = getattr(sys.modules.get(package), "__version__", "not installed")
    # Not what a build in place once left beside the sources.
    found["kdkernels"] = build_info.installed_version() or kdkernels.__version__
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler:
        found["c++"] = _first_line([compiler, "--version"])
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def describe(device: str) -> dict[str, Any]:
    """Processor, memory and settings that move figures; no name of the machine."""
    library = cpu.library_path()
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cpus": usable_cpus(),
        "caches": _caches(),
        "vector_isa": torch.backends.cpu.get_cpu_capability(),
        "kdkernels_isa": "not built" if cpu.load_error() else cpu.isa(),
        "kdkernels_build": "none" if library is None else build_info.summary("cpu", build_info.read(library.parent)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "transparent_huge_pages": _huge_pages(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        machine["gpu"] = gpu.name
        machine["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        machine["gpu_l2_mib"] = round(gpu.L2_cache_size / 2**20, 1)
    return machine


def usable_cpus() -> int:
    """Logical processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limits(device: str, threads: int) -> dict[str, Any]:
    """Bandwidths in GB/s (1e9 bytes, each stream counted once): the best of a few runs, for they are limits."""
    return _cuda_limits() if device == "cuda" else _cpu_limits(threads)


def _cpu_limits(threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        library = _build_streams(folder)
        return _torch_limits() if library is None else _stream_limits(library, threads)


def _build_streams(folder: str) -> Optional[ctypes.CDLL]:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    target = os.path.join(folder, "streams.so")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [compiler, "-O3", "-ffast-math", native, "-shared", "-fPIC", str(STREAMS_SOURCE), "-o", target]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    library = ctypes.CDLL(target)
    library.read_stream.restype = ctypes.c_float
    return library


def _stream_limits(library: ctypes.CDLL, threads: int) -> dict[str, Any]:
    count = STREAM_BYTES // 4
    share = count // threads // 64 * 64
    huge = getattr(mmap, "MADV_HUGEPAGE", None)

    def fresh(advice: Optional[int]) -> tuple[mmap.mmap, int]:
        # Private: the default is shared memory, which faults differently and takes no advice about huge pages.
        block = mmap.mmap(-1, STREAM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if advice is not None:
            block.madvise(advice)
        return block, ctypes.addressof(ctypes.c_char.from_buffer(block))

    blocks = [fresh(huge) for _ in range(3)]
    a, b, c = (address for _, address in blocks)
    ctypes.memset(b, 1, STREAM_BYTES)
    ctypes.memset(c, 1, STREAM_BYTES)
    with ThreadPoolExecutor(threads) as pool:

        def parallel(function: Any, *addresses: int) -> None:
            def part(index: int) -> None:
                function(*(ctypes.c_void_p(x + 4 * share * index) for x in addresses), ctypes.c_size_t(share))

            list(pool.map(part, range(threads)))

        def rate(streams: int, function: Any, *addresses: int) -> float:
            seconds = measure.least_seconds("cpu", lambda: parallel(function, *addresses), STREAM_REPEATS)
            return round(streams * 4 * share * threads / seconds / 1e9, 2)

        def first_touch(advice: Optional[int]) -> float:
            seconds = []
            for _ in range(3):
                block, address = fresh(advice)
                seconds.append(measure.seconds("cpu", parallel, library.fill_stream, address))
                del block
            return round(4 * share * threads / min(seconds) / 1e9, 2)

        measured = {
            "measured_by": "C, non-temporal stores where the processor has them, huge pages",
            "read": rate(1, library.read_stream, b),
            "copy": rate(2, library.copy_stream, a, b),
            "triad": rate(3, library.triad_stream, a, b, c),
            "first_touch": first_touch(getattr(mmap, "MADV_NOHUGEPAGE", None)),
        }
        if huge is not None:
            measured["first_touch_huge_pages"] = first_touch(huge)
    return measured


def _torch_limits() -> dict[str, Any]:
    count = STREAM_BYTES // 4
    a, b, c = torch.zeros(count), torch.ones(count), torch.ones(count)

    def rate(streams: int, function: Callable[[], Any], repeats: int = STREAM_REPEATS) -> float:
        return round(streams * STREAM_BYTES / measure.least_seconds("cpu", function, repeats) / 1e9, 2)

    return {
        "measured_by": "torch operations (no C compiler found)",
        "read": rate(1, lambda: torch.dot(b, b)),
        "copy": rate(2, lambda: a.copy_(b)),
        "triad": rate(3, lambda: torch.add(b, c, alpha=3.0, out=a)),
        "first_touch": rate(1, lambda: torch.empty(count).fill_(1.0), repeats=3),
    }


def _cuda_limits() -> dict[str, Any]:
    count = 2**28
    a, b, c = (torch.ones(count, device="cuda") for _ in range(3))

    def rate(streams: int, function: Callable[[], Any]) -> float:
        return round(streams * 4 * count / measure.least_seconds("cuda", function, 2 * STREAM_REPEATS) / 1e9, 1)

    return {
        "measured_by": "torch operations on 1 GiB tensors",
        "read": rate(1, b.sum),
        "copy": rate(2, lambda: a.copy_(b)),
        "triad": rate(3, lambda: torch.add(b, c, alpha=3.0, out=a)),
    }


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = (index / "type").read_text().strip(), (index / "level").read_text().strip()
        if kind != "Instruction":
            found[f"L{level}"] = (index / "size").read_text().strip()
    return found


def _huge_pages() -> str:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return setting.partition("[")[2].partition("]")[0]
