"""A teacher's most likely tokens in plain PyTorch: a stable sort, and the log-sum-exp of what it leaves."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kdkernels.reference.dense import PerRow, column


def capture_rows(
    teacher: Tensor, *, k: int, temperature: PerRow = 1.0, vocab_size: Optional[int] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and the log of the mass outside them, as ``kdkernels.capture_topk`` says.

    Args:
        teacher: logits ``[N, V]``.
        temperature: a float or ``[N]``.

    Returns:
        ids ``[N, K]`` int32, log-probabilities ``[N, K]`` and the log of the tail ``[N]``.
    """
    dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    logits = teacher[:, : vocab_size or teacher.shape[-1]].to(dtype)
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    logp = torch.log_softmax(logits / column(temperature), -1)
    logprobs = logp.gather(1, ids)
    tail = torch.logsumexp(logp.scatter(1, ids, -torch.inf), -1).clamp(max=0.0)
    # A row without a distribution is NaN, at ids that are there.
    spoilt = logp[:, :1].isnan()
    ids = torch.where(torch.isneginf(logits.gather(1, ids)), -1, ids)
    ids = torch.where(spoilt, torch.arange(k, device=ids.device), ids)
    nan = torch.where(spoilt, torch.nan, 0.0).to(dtype)
    return ids.to(torch.int32), torch.where(ids < 0, -torch.inf, logprobs) + nan, tail + nan.squeeze(1)


def sample_rows(
    teacher: Tensor,
    *,
    n: int,
    proposal_power: float = 1.0,
    temperature: PerRow = 1.0,
    vocab_size: Optional[int] = None,
    generator: Optional[torch.Generator] = None,
) -> tuple[Tensor, Tensor]:
    """Ids ``[N, n]`` and log-weights ``[N, n]``, as ``kdkernels.capture_samples`` says."""
    dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    # Sums over the vocabulary in fp64: in fp32 a token of probability under 6e-8 could never be drawn.
    exact = dtype if teacher.device.type == "mps" else torch.float64
    logp = torch.log_softmax(teacher[:, : vocab_size or teacher.shape[-1]].to(exact) / column(temperature), -1)
    scores = torch.where(torch.isneginf(logp), -torch.inf, proposal_power * logp)
    logq = torch.log_softmax(scores, -1)
    cumulative = logq.exp().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    uniform = torch.rand(len(logp), n, dtype=exact, device=logp.device, generator=generator)
    drawn = torch.searchsorted(cumulative, uniform * total, right=True)
    # The product may round up to the total itself: the last token that can be drawn.
    drawn = torch.minimum(drawn, torch.searchsorted(cumulative, total)).clamp(max=logp.shape[1] - 1)

    ids = drawn.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(-1) - 1
    count = torch.zeros_like(uniform).scatter_add(1, place, torch.ones_like(uniform))
    ids = torch.full_like(ids, -1).scatter(1, place, ids)
    at = ids.clamp(min=0)
    weight = (count / n).log() + logp.gather(1, at) - logq.gather(1, at)
    spoilt = logp[:, :1].isnan()
    ids = torch.where(spoilt, torch.arange(n, device=ids.device).clamp(max=0), ids)
    return ids.to(torch.int32), (torch.where(ids < 0, -torch.inf, weight) + torch.where(spoilt, torch.nan, 0.0)).to(
        dtype
    )
