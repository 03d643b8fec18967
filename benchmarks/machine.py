"""The machine a figure was measured on: versions, processor, and the bandwidth it reaches."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
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
from benchmarks import gpu_check, measure
from kdkernels import build_info
from kdkernels.backends import cpu

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
    if device == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            library = _build_streams(folder)
            if library is not None:
                return _stream_limits(library, threads)
    count = (STREAM_BYTES if device == "cpu" else 2**30) // 4
    a, b, c = (torch.ones(count, device=device) for _ in range(3))

    def rate(streams: int, function: Callable[[], Any]) -> float:
        return round(streams * 4 * count / measure.least_seconds(device, function, STREAM_REPEATS) / 1e9, 2)

    return {
        "measured_by": f"torch operations on {4 * count >> 20} MiB",
        "read": rate(1, b.sum),
        "copy": rate(2, lambda: a.copy_(b)),
        "triad": rate(3, lambda: torch.add(b, c, alpha=3.0, out=a)),
    }


def _build_streams(folder: str) -> Optional[ctypes.CDLL]:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    source, target = Path(__file__).with_name("streams.c"), f"{folder}/streams.so"
    command = [compiler or "cc", "-O3", "-ffast-math", native, "-shared", "-fPIC", str(source), "-o", target]
    if compiler is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    library = ctypes.CDLL(target)
    library.read_stream.restype = ctypes.c_float
    return library


def _stream_limits(library: ctypes.CDLL, threads: int) -> dict[str, Any]:
    share = STREAM_BYTES // 4 // threads // 64 * 64
    huge, small = (getattr(mmap, name, None) for name in ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE"))

    def fresh(advice: Optional[int]) -> mmap.mmap:
        # Private: the default is shared memory, which faults differently and takes no advice about huge pages.
        block = mmap.mmap(-1, STREAM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if advice is not None:
            block.madvise(advice)
        return block

    with ThreadPoolExecutor(threads) as pool:

        def parallel(function: Any, *blocks: mmap.mmap) -> None:
            starts = [ctypes.addressof(ctypes.c_char.from_buffer(block)) for block in blocks]

            def part(index: int) -> None:
                function(*(ctypes.c_void_p(x + 4 * share * index) for x in starts), ctypes.c_size_t(share))

            list(pool.map(part, range(threads)))

        def rate(streams: int, seconds: float) -> float:
            return round(streams * 4 * share * threads / seconds / 1e9, 2)

        def stream(function: Any, *blocks: mmap.mmap) -> float:
            return rate(len(blocks), measure.least_seconds("cpu", lambda: parallel(function, *blocks), STREAM_REPEATS))

        def first_touch(advice: Optional[int]) -> float:
            return rate(1, min(measure.seconds("cpu", parallel, library.fill_stream, fresh(advice)) for _ in range(3)))

        a, b, c = blocks = [fresh(huge) for _ in range(3)]
        for block in blocks:
            parallel(library.fill_stream, block)
        return {
            "measured_by": "C, non-temporal stores where the processor has them, huge pages",
            "read": stream(library.read_stream, b),
            "copy": stream(library.copy_stream, a, b),
            "triad": stream(library.triad_stream, a, b, c),
            "first_touch": first_touch(small),
            **({} if huge is None else {"first_touch_huge_pages": first_touch(huge)}),
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


def main() -> int:
    """Print, as one line of JSON, what ``gpu_check`` asks of a machine before all else: its bandwidth is measured."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device")
        return gpu_check.NO_DEVICE
    found: dict[str, Any] = {"limits_gb_per_s": limits(device, 1), "machine": describe(device), "versions": versions()}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        gpu = torch.cuda.get_device_properties(0)
        found |= {"capability": f"{major}.{minor}", "multiprocessors": gpu.multi_processor_count}
        found["devices"] = torch.cuda.device_count()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
