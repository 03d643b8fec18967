"""Teachers of K ids and log-probabilities a row that are packed into one buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch

from kdkernels.checks.sequences import extras_of_tokens
from kdkernels.checks.tensors import dtype_name, floating, integers, reads_values, tensor
from kdkernels.checks.values import flag, integer

PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_layout(rows: Any, dtype: Any, exact: Any, extras: Any) -> tuple[tuple[int, ...], dict[str, torch.dtype]]:
    """The shape of the rows and the dtypes of the further tensors."""
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(f"rows must be the shape of the rows, such as (B, L), got {type(rows).__name__}")
    if dtype not in PACKED_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    flag("exact", exact)
    return tuple(integer(f"rows[{k}]", size, low=0) for k, size in enumerate(rows)), extras_of_tokens(extras)


def packed_buffer(buffer: Any, nbytes: Optional[int]) -> None:
    """A buffer of bytes, of the size of its layout where that is known."""
    tensor("buffer", buffer)
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError(
            f"buffer must be uint8 of one dimension, got {dtype_name(buffer.dtype)} of shape {tuple(buffer.shape)}"
        )
    if nbytes is not None and len(buffer) != nbytes:
        raise ValueError(f"buffer must have the {nbytes} bytes of its layout, got {len(buffer)}")


def to_be_packed(
    ids: Any, logprobs: Any, tail_logprob: Any, extras: Mapping[str, Any], rows: tuple[int, ...], layout: Any
) -> None:
    """Tensors of a layout; ids that do not fit would be others on arrival."""
    given = {"ids": ids, "logprobs": logprobs, "tail_logprob": tail_logprob, **extras}
    for name, value in given.items():
        tensor(name, value)
        shape = (*rows, layout.k) if name in ("ids", "logprobs") else rows
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if value.device != ids.device:
            raise ValueError(f"{name} must be on the device of ids, {ids.device}, got {value.device}")
    integers("ids", ids)
    floating("logprobs", logprobs)
    floating("tail_logprob", tail_logprob)
    if reads_values(ids) and ids.numel():
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < -1 or high >= layout.vocab_size:
            worst = low if low < -1 else high
            raise ValueError(f"ids must be in [0, {layout.vocab_size}) or -1 for an unused slot, got {worst}")
