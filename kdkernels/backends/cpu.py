"""The compiled CPU backend: loads ``_C``, which registers the ``kdkernels::*_cpu`` ops, on first use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Optional

import torch

from kdkernels import build_info


def load(path: Path, backend: str) -> Optional[str]:
    """Load a library that registers ops; None on success, else why it is of no use, and the cure."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        part = build_info.read(path.parent).get(backend, {})
        made_for = f" (built against torch {part['torch']}, this is {torch.__version__})" if part.get("built") else ""
        fault = f"does not load{made_for}: {error.__cause__ or error}"
    else:
        missing = _without_kernel(backend)
        if not missing:
            return None
        fault = f"is older than kdkernels' Python, which calls {missing[0]} too"
    return f"{path} {fault}. To build it again: {build_info.rebuild_command(backend)}"


def _without_kernel(backend: str) -> list[str]:
    """The ops of a backend that its library did not register."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdkernels::"))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(name for name in names if name.endswith(f"_{backend}") and not has(name, backend.upper()))


def library_path() -> Optional[Path]:
    """The CPU library, or None where it was not built."""
    return build_info.find("cpu")


@functools.cache
def load_error() -> Optional[str]:
    """Load the library once; None on success, else why it is not there, and the command that cures it."""
    path = library_path()
    if path is None:
        return build_info.why_missing("cpu")
    # A compiler that traces the first call must not record these questions as a part of it.
    with torch.utils._python_dispatch._disable_current_modes():
        return load(path, "cpu") or torch.ops.kdkernels.cpu_fault() or None


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
