"""The one clock and the one measure of memory of all suites, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(device: str, function: Callable[..., Any], *arguments: Any) -> float:
    """The time of one call; on a GPU between events, while launches from Python are queued ahead."""
    if device != "cuda":
        start = time.perf_counter()
        outcome = function(*arguments)
        stop = time.perf_counter()
        del outcome
        return stop - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # About a millisecond of sleep in the queue, so that launches from Python overlap with it and not with the work.
    torch.cuda._sleep(2_000_000)
    start_event.record()
    outcome = function(*arguments)
    end_event.record()
    torch.cuda.synchronize()
    del outcome
    return start_event.elapsed_time(end_event) / 1e3


def least_seconds(device: str, function: Callable[[], Any], repeats: int) -> float:
    """The best of some calls after a first one: for limits."""
    function()
    return min(seconds(device, function) for _ in range(repeats))


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_can_be_reset() -> bool:
    """True if the kernel lets a process reset its peak resident size (Linux; some containers forbid it)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def reset_peak(device: str) -> int:
    """Forget the peak and return what is in use, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # not glibc
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> int:
    """The most memory in use since ``reset_peak``: the resident set on the CPU, the allocator's on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
