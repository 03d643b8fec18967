"""The compiled CUDA backend: loads ``_C_cuda``, which registers the ``kdkernels::*_cuda`` ops, on first use."""

from __future__ import annotations

import functools
from typing import Optional

import torch

from kdkernels.backends.cpu import find_library, load


@functools.cache
def load_error() -> Optional[str]:
    """Load the library once; None on success, else why it is not there."""
    path = find_library("_C_cuda")
    if path is None:
        return "the CUDA extension was not built (it needs nvcc and a CUDA build of torch at installation)"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is not a CUDA build"
    return load(path)


def why_not(device_type: str) -> Optional[str]:
    """None on CUDA tensors when the library loads."""
    if device_type != "cuda":
        return f"it runs on CUDA tensors, not on {device_type}"
    return load_error()
