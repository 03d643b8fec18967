"""Distances of feature vectors in plain PyTorch: the textbook formulas, which autograd differentiates."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this a vector has no direction.
NORM_EPS = 1e-12
LAYERNORM_EPS = 1e-5


def normalized(x: Tensor, how: Optional[str]) -> Tensor:
    """Vectors ``[N, D]``, each over its length, or less its mean over its standard deviation."""
    if how == "l2":
        norm = x.norm(dim=-1, keepdim=True)
        directed = norm > NORM_EPS
        return torch.where(directed, x / torch.where(directed, norm, 1.0), 0.0)
    return F.layer_norm(x, x.shape[-1:], eps=LAYERNORM_EPS) if how == "layernorm" else x


def feature_rows(student: Tensor, teacher: Tensor, *, kind: str, normalize: Optional[str], beta: float) -> Tensor:
    """The distance of each pair of vectors ``[N, D]``, in the dtype of the sums."""
    sums = torch.float64 if student.dtype == torch.float64 else torch.float32
    a, b = (normalized(item.to(sums), normalize) for item in (student, teacher))
    if kind == "cosine":
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        directed = norms > NORM_EPS
        cosine = (a * b).sum(-1) / torch.where(directed, norms, 1.0)
        return torch.where(directed, 1 - cosine, torch.ones_like(cosine))
    if kind == "mse":
        return (a - b).square().mean(-1)
    if kind == "l1":
        return (a - b).abs().mean(-1)
    return F.smooth_l1_loss(a, b, beta=beta, reduction="none").mean(-1)
