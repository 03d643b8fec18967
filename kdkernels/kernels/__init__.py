"""Triton kernels and their launchers. Importing the package imports no Triton; ``launchers()`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def launchers() -> dict[str, Callable[..., Any]]:
    """The launcher of every pattern, by the name of its op."""
    from kdkernels.kernels.dense import dense_fwd
    from kdkernels.kernels.dkd import dkd_fwd
    from kdkernels.kernels.mse import mse_fwd
    from kdkernels.kernels.scale import scale_grad
    from kdkernels.kernels.topk import topk_fwd

    return {
        "dense_fwd": dense_fwd,
        "topk_fwd": topk_fwd,
        "dkd_fwd": dkd_fwd,
        "mse_fwd": mse_fwd,
        "scale_grad": scale_grad,
    }
