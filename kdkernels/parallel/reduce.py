"""Numbers that all ranks have, and sums over the ranks, for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.parallel.shards import Shards


class SumOfShards(torch.autograd.Function):
    """The sum of a tensor over all ranks, which make the same of it: the gradient is that of each rank's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shards: Shards) -> Tensor:
        return shards.sum(part)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient, None


class OfAllShards(torch.autograd.Function):
    """Numbers that are the same on all ranks, of which each rank makes a part of its own: gradients are added up."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return ctx.shards.sum(gradient)[0], None
