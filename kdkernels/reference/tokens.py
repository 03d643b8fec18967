"""Log-probabilities of given tokens in plain PyTorch: autograd differentiates ``token_rows``.

``token_gradient`` is the same gradient as a formula, from what the kernels keep of a row.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels.ops import ELSEWHERE
from kdkernels.reference.dense import PerRow, apply_softcap, column, log_softmax


class TokenRows(NamedTuple):
    """Log-probabilities ``[N, K]``; entropy, log-sum-exp and the log of the mass outside the ids, ``[N]`` each; and
    ``[N, 2 + K]`` of log sum q^2, the mean logit, and for each slot 1 where its id has the largest logit."""

    logprobs: Tensor
    entropy: Optional[Tensor]
    lse: Tensor
    tail: Optional[Tensor]
    stats: Optional[Tensor]


def token_rows(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: PerRow = 1.0,
    softcap: float = 0.0,
    vocab_size: Optional[int] = None,
    ignore_index: int = -100,
    entropy: bool = False,
    tail_mass: bool = False,
    stats: bool = False,
) -> TokenRows:
    """Log-probabilities of tokens, as ``kdkernels.token_logprobs`` says.

    Args:
        logits: ``[N, V]``.
        ids: int64 ``[N, K]``.
        temperature: a float or ``[N]``.
        entropy, tail_mass, stats: the further results; for the tail no id stands twice in a row.
    """
    columns = vocab_size or logits.shape[-1]
    used = _used(ids, ignore_index)
    counted = used.any(-1)
    inside = (ids >= 0) & (ids < columns)
    # A row that does not count may hold NaN, of which even a gradient of 0 would make more.
    x = torch.where(counted.unsqueeze(-1), _capped(logits, columns, softcap), 0.0)
    logp = log_softmax(x, column(temperature))
    # A factor, so that a token out of range spoils the gradient too.
    factor = torch.where(used & ~inside & (ids != ELSEWHERE), torch.nan, 1.0).to(logp.dtype)
    logprobs = torch.where(used, logp.gather(1, ids.clamp(0, columns - 1)) * factor, 0.0)
    of_entropy = tail = of_stats = None
    if entropy:
        finite = logp.masked_fill(torch.isneginf(logp), 0.0)
        of_entropy = torch.where(counted, -(logp.exp() * finite).sum(-1), 0.0)
    if tail_mass:
        outside = torch.ones(x.shape[0], columns + 1, dtype=torch.bool, device=x.device)
        outside = outside.scatter(1, torch.where(used & inside, ids, columns), False)[:, :columns]
        tail = torch.logsumexp(logp.masked_fill(~outside, -torch.inf), -1).clamp(max=0.0)
    top = x.detach().argmax(-1, keepdim=True)
    lse = x.gather(1, top) / column(temperature) - logp.gather(1, top)
    if stats:
        # Of a row without a distribution each sum is NaN.
        log_squares = torch.logsumexp(2 * logp.detach(), -1, keepdim=True).clamp(max=0.0)
        mean = (x.detach() / columns).sum(-1, keepdim=True) + 0 * lse.detach()
        largest = used & inside & (x.gather(1, ids.clamp(0, columns - 1)) == x.gather(1, top)) & ~lse.isnan()
        of_stats = torch.cat([log_squares, mean, largest.to(logp.dtype)], 1)
        of_stats = torch.where(counted.unsqueeze(-1), of_stats, 0.0)
    return TokenRows(logprobs, of_entropy, torch.where(counted, lse.detach().squeeze(1), 0.0), tail, of_stats)


def token_gradient(
    logits: Tensor,
    ids: Tensor,
    norm: Tensor,
    entropy: Optional[Tensor],
    dlogprobs: Tensor,
    dentropy: Optional[Tensor],
    *,
    temperature: PerRow,
    softcap: float,
    vocab_size: int,
    ignore_index: int,
) -> Tensor:
    """The gradient in the logits ``[N, V]``, as ``token_bwd`` of ``kdkernels.ops`` says."""
    used = _used(ids, ignore_index)
    x = _capped(logits, vocab_size, softcap)
    scaled = (x - norm[:, :1]) / column(temperature)
    q = scaled.exp() / norm[:, 1:]
    g = torch.where(used, dlogprobs, 0.0)
    known = (ids >= 0) & (ids < vocab_size)
    g = torch.where(used & ~known & (ids != ELSEWHERE), torch.nan, g)
    own = torch.where(known, g, 0.0)
    grad = torch.zeros_like(x).scatter_add(1, ids.clamp(0, vocab_size - 1), own) - q * g.sum(-1, keepdim=True)
    counted = (g != 0).any(-1)
    if dentropy is not None and entropy is not None:
        logq = scaled - norm[:, 1:].log()
        grad = grad - dentropy.unsqueeze(-1) * torch.where(q == 0, 0.0, q * (logq + entropy.unsqueeze(-1)))
        counted = counted | ((dentropy != 0) & used.any(-1))
    if softcap:
        grad = grad * (1 - (x / softcap).square())
    grad = torch.where(counted.unsqueeze(-1), grad / column(temperature), 0.0)
    return torch.nn.functional.pad(grad, (0, logits.shape[-1] - vocab_size)).to(logits.dtype)


def _used(ids: Tensor, ignore_index: int) -> Tensor:
    return (ids != -1) & (ids != ignore_index)


def _capped(logits: Tensor, columns: int, softcap: float) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return apply_softcap(logits[:, :columns].to(dtype), softcap)
