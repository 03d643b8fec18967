"""The Triton backend: registers the launchers of ``kdkernels.kernels`` as ``kdkernels::*_triton`` on first use."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from typing import Optional

import torch

DEVICES = ("cuda", "xpu")


def why_not(device_type: str) -> Optional[str]:
    """None on GPU tensors when Triton is there; CPU tensors only under Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type not in DEVICES and not (device_type == "cpu" and interpreted):
        return f"it runs on GPU tensors, not on {device_type} (set TRITON_INTERPRET=1 for Triton's slow interpreter)"
    if importlib.util.find_spec("triton") is None:
        return _not_installed()
    _register()
    return None


@functools.cache
def _not_installed() -> str:
    # A build of torch for GPUs depends on the one release that it was made with.
    wanted = (item.partition(";")[0].strip() for item in importlib.metadata.requires("torch") or ())
    release = next((item for item in wanted if "triton" in item), "triton")
    return f"the package triton is not installed; run `{shlex.quote(sys.executable)} -m pip install {release!r}`"


@functools.cache
def _register() -> None:
    from kdkernels import kernels

    library = torch.library.Library("kdkernels", "IMPL")
    for pattern, launcher in kernels.launchers().items():
        library.impl(f"{pattern}_triton", launcher, "CompositeExplicitAutograd")
    _kept.append(library)


_kept: list[torch.library.Library] = []
