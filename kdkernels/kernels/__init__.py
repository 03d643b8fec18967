"""Triton kernels and their launchers. Importing the package imports no Triton; ``launchers()`` does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from kdkernels import ops


def launchers() -> dict[str, Callable[..., Any]]:
    """The launcher of every pattern, by the name of its op."""
    from kdkernels.kernels.capture import capture_topk
    from kdkernels.kernels.dense import dense_fwd
    from kdkernels.kernels.dkd import dkd_fwd
    from kdkernels.kernels.mapped import mapped_fwd
    from kdkernels.kernels.mse import mse_fwd
    from kdkernels.kernels.scale import scale_grad
    from kdkernels.kernels.shards import shard_fwd
    from kdkernels.kernels.tokens import token_bwd, token_fwd
    from kdkernels.kernels.topk import topk_fwd
    from kdkernels.kernels.uld import uld_fwd

    by_name: dict[str, Callable[..., Any]] = {
        "dense_fwd": dense_fwd,
        "pixel_fwd": mapped_fwd,
        "topk_fwd": topk_fwd,
        "capture_topk": capture_topk,
        "dkd_fwd": dkd_fwd,
        "mse_fwd": mse_fwd,
        "shard_fwd": shard_fwd,
        "uld_fwd": uld_fwd,
        "token_fwd": token_fwd,
        "token_bwd": token_bwd,
    }
    return {
        **{pattern: functools.partial(_unpacked, pattern, launcher) for pattern, launcher in by_name.items()},
        "scale_grad": scale_grad,
    }


def _unpacked(
    pattern: str,
    launcher: Callable[..., Any],
    *tensors: Any,
    numbers: Sequence[float],
    choices: Sequence[int],
    **others: Any,
) -> Any:
    return launcher(*tensors, **ops.named(pattern, numbers, choices), **others)
