"""Shared by the modules: divergences by ``beta``, masks, students of log-probabilities."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks

# Options of a loss whose student is log-probabilities, which are the leaf.
LOG_PROBS: dict[str, Any] = {"student_form": "log_probs"}
# How far the first row of log-probabilities may be from adding up to 1: 16-bit ones of a large vocabulary are off by
# about 1e-2; what is no distribution is off by more.
SUM_TOLERANCE = 0.1


def generalized_jsd(beta: float) -> kd.JSD:
    """0 is forward KL, 1 reverse KL, and between the mixture is ``beta p + (1 - beta) q``, as in GKD."""
    return kd.JSD(beta)


def labels_of_mask(mask: Optional[Tensor], rows: torch.Size) -> Optional[Tensor]:
    """A mask of rows, true where they count, of their shape or with a last dimension of 1, as labels that only mask."""
    if mask is None:
        return None
    checks.tensor("mask", mask)
    if mask.shape == (*rows, 1):
        mask = mask.squeeze(-1)
    if mask.shape != rows:
        raise ValueError(f"mask must have the shape of the rows {tuple(rows)}, got {tuple(mask.shape)}")
    return torch.where(mask.bool(), 0, -100)


def log_probs(name: str, value: Any) -> Tensor:
    """``value`` is log-probabilities over the last dimension, as far as its first row, read on a CPU, tells."""
    checks.logits(name, value)
    if value.numel() and checks.reads_values(value):
        total = value.detach().reshape(-1, value.shape[-1])[0].double().logsumexp(0).item()
        if not abs(total) <= SUM_TOLERANCE:
            raise ValueError(
                f"{name} must be log-probabilities over its last dimension, as log_softmax gives them, got a first row "
                f"whose logsumexp is {total:.4g}, not 0"
            )
    return value


def no_elements(function: str) -> ValueError:
    """The error of a loss per row and token, which no kernel writes."""
    return ValueError(
        f"reduction 'none' of {function} is one number per row and token of the vocabulary, which is not made here; "
        "kdkernels.kd_loss(..., reduction='none') has one per row"
    )


def denominator(value: Union[float, Tensor, None]) -> dict[str, Any]:
    """The options of a sum that is divided by a number, where there is one, and of a mean elsewhere."""
    return {} if value is None else {"reduction": "sum", "normalizer": value}
