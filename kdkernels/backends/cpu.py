"""The compiled CPU backend: loads ``_C``, which registers the ``kdkernels::*_cpu`` ops, on first use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Optional

import torch


def find_library(name: str) -> Optional[Path]:
    """A compiled library beside the package, or None where it was not built."""
    found = sorted(Path(__file__).resolve().parent.parent.glob(f"{name}.*"))
    return next((path for path in found if path.suffix in (".so", ".dylib", ".pyd")), None)


def load(path: Path) -> Optional[str]:
    """Load a library that registers ops; None on success, else why it does not load."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


def library_path() -> Optional[Path]:
    """The CPU library, or None where it was not built."""
    return find_library("_C")


@functools.cache
def load_error() -> Optional[str]:
    """Load the library once; None on success, else why it is not there."""
    path = library_path()
    if path is None:
        return "the C++ extension was not built (KDKERNELS_BUILD=none, or no C++ compiler at installation)"
    return load(path) or torch.ops.kdkernels.cpu_fault() or None


def isa() -> str:
    """The instruction set in use; ``KDKERNELS_CPU_ISA`` in the environment may ask for a lower one.

    Raises:
        RuntimeError: the library is not there, with the reason.
    """
    error = load_error()
    if error is not None:
        raise RuntimeError(f"no instruction set is in use: {error}")
    return torch.ops.kdkernels.cpu_isa()


def why_not(device_type: str) -> Optional[str]:
    """None on CPU tensors when the library loads."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, not on {device_type}"
    return load_error()
