"""Losses on log-probabilities of sampled tokens: on-policy distillation, plain PyTorch on tensors of any shape.

In all formulas, for a token y that was sampled: x = log q(y) of the student that learns (``student_logprobs``), a =
log p(y) of the teacher (``teacher_logprobs``), o = log q(y) of whoever sampled it (``old_logprobs``: the student some
steps ago, or as an inference engine computes it), A an advantage (``advantages``), r = exp(x - o), sg = no gradient.
Only x gets a gradient; ``kdkernels.token_logprobs`` makes it from logits, and takes it back to them. All log-probs of a
token are to be taken at one temperature.

Rules that hold for every function:

- ``mask`` is bool or of integers, of the shape of the tokens, and True where a token counts. Behind it anything may
  stand, infinities and NaN too: it is replaced by 0 on both sides before the first exponential.
- 16-bit log-probs are widened to float32 first; results are float32, or float64 where ``student_logprobs`` are.
- exp(d) continues as its tangent beyond d = 20, so that neither a value nor a gradient overflows where policies are far
  apart. Beyond it the gradient keeps the sign that it has before, and the size e^20.
- One rule reduces the tokens' losses, see ``reduce``: "mean" divides their sum by the number of tokens that count, over
  the whole batch, or by ``normalizer``.

``expected gradient`` means that over tokens that the student itself samples, ``o = x``: the sum over y of q(y) times
the gradient.
"""

from __future__ import annotations

import math
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kdkernels import checks

# exp(20) is 4.9e8: its product with any sensible difference of log-probs is far from float32's end.
LARGEST_EXPONENT = 20.0

__all__ = [
    "advantage",
    "discounted_returns",
    "dpace_weights",
    "icepop",
    "importance_clip",
    "iw_weights",
    "k1",
    "k2",
    "k3",
    "k3_plus",
    "policy_gradient",
    "ppo",
    "ratio",
    "reduce",
    "ref_kl",
    "teacher_advantages",
]

Normalizer = Optional[Union[int, float, Tensor]]


def reduce(
    losses: Tensor, mask: Optional[Tensor] = None, *, reduction: str = "mean", normalizer: Normalizer = None
) -> Tensor:
    """The losses of tokens as one number: the rule of every loss of this module.

    - "mean": their sum divided by the number of tokens that count, over all dimensions; 0 where there is none.
    - "sum": their sum.
    - "none": the losses, 0 where a token does not count.

    ``normalizer``, a number or a tensor of one, takes the place of the count in "mean" and divides "sum": with the
    count of all microbatches of a step, or of all ranks, their losses add up to that of the whole; with the number of
    sequences, each sequence weighs as much as it is long.

    Projects differ here more than in their formulas. TRL and verl have modes that average within each sequence first
    (then short sequences' tokens weigh more): that is ``reduction="none"``, and the two means by hand.

    >>> losses, mask = torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([1, 1, 0])
    >>> reduce(losses, mask), reduce(losses, mask, normalizer=4), reduce(losses, mask, reduction="none")
    (tensor(1.5000), tensor(0.7500), tensor([1., 2., 0.]))
    """
    checks.token_numbers("losses", losses)
    return _reduced(losses, checks.token_mask(mask, losses), reduction, normalizer)


def k1(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """x - a, without a gradient: an estimate of the reverse KL to report, or, negated, a reward.

    Its mean over the student's samples is KL(q || p), exactly. Its gradient would be 1 for every token, whatever the
    teacher says, and its expected gradient is 0: minimised as a loss it teaches nothing but noise. So the result has no
    gradient, and ``backward`` on it raises torch's error. ``policy_gradient`` and ``k2`` have the one of reverse KL.

    J. Schulman, "Approximating KL divergence" (2020). verl's ``kl_penalty="k1"`` (or "kl") is this with a gradient: it
    is meant for rewards.

    >>> k1(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), reduction="none")
    tensor([ 0.5000, -1.0000])
    """
    mask, x, a = _tokens(mask, student_logprobs, teacher_logprobs=teacher_logprobs)
    return _reduced(x.detach() - a, mask, reduction, normalizer)


def k2(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """(x - a)^2 / 2. Gradient: x - a. Expected gradient: that of the reverse KL(q || p).

    The value is 0 or more, and is a biased estimate of the KL; the gradient is unbiased, and the same as
    ``policy_gradient``'s.

    J. Schulman (2020); verl's ``kl_penalty="k2"`` (or "mse").

    >>> k2(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    tensor(0.3125)
    """
    mask, x, a = _tokens(mask, student_logprobs, teacher_logprobs=teacher_logprobs)
    return _reduced((x - a).square() / 2, mask, reduction, normalizer)


def k3(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """exp(a - x) - 1 - (a - x). Gradient: 1 - exp(a - x). Expected gradient: that of the FORWARD KL(p || q).

    The value is 0 or more, and its mean is the reverse KL with little variance; but its gradient is another
    divergence's, and heavy-tailed where the student gives a token much less than the teacher. ``k3_plus`` has this
    value and reverse KL's gradient.

    J. Schulman (2020); the KL term of GRPO (arXiv 2402.03300); verl's ``kl_penalty="k3"`` (or "low_var_kl"). verl
    clamps a - x to within 20 and the value to within 10, so that tokens beyond have no gradient; here the largest
    differences have the largest.

    >>> k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), reduction="none")
    tensor([0.1065, 0.7183])
    """
    mask, x, a = _tokens(mask, student_logprobs, teacher_logprobs=teacher_logprobs)
    return _reduced(_k3(x, a), mask, reduction, normalizer)


def k3_plus(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """The value of ``k3`` with the gradient of ``k2``: k2 - sg(k2) + sg(k3). Gradient: x - a.

    Expected gradient: that of the reverse KL. A curve to look at, of little variance, and the right gradient.

    verl's ``kl_penalty="k3+"``, where the value is clamped as in ``k3``.

    >>> x = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> loss = k3_plus(x, torch.tensor([-1.5, -1.0]), reduction="sum")
    >>> round(loss.item(), 4), torch.autograd.grad(loss, x)[0]
    (0.8248, tensor([ 0.5000, -1.0000]))
    """
    mask, x, a = _tokens(mask, student_logprobs, teacher_logprobs=teacher_logprobs)
    # The second term is 0, and has the gradient; an infinite one is the largest number there.
    slope = torch.nan_to_num((x - a).detach(), nan=torch.nan)
    return _reduced(_k3(x.detach(), a) + (x - x.detach()) * slope, mask, reduction, normalizer)


def policy_gradient(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """sg(x - a) x. Gradient: x - a. Expected gradient: that of the reverse KL(q || p).

    REINFORCE of the reward a - x for the token itself. The value says nothing: report ``k1``.

    TRL's SDFT and SDPO trainers with sampled tokens.

    >>> x = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> torch.autograd.grad(policy_gradient(x, torch.tensor([-1.5, -1.0]), reduction="sum"), x)[0]
    tensor([ 0.5000, -1.0000])
    """
    mask, x, a = _tokens(mask, student_logprobs, teacher_logprobs=teacher_logprobs)
    return _reduced((x - a).detach() * x, mask, reduction, normalizer)


def importance_clip(
    losses: Tensor,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    clip: float = 2.0,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """l * sg(min(r, clip)): any loss of tokens l, weighted by how likelier its token has become since it was sampled.

    Gradient: that of l, times the weight. Expected gradient over tokens of the OLD student: that of l over the new
    student's tokens, where no ratio is above ``clip``; on policy it is l's own.

    ``losses`` have ``reduction="none"``: of this module, or of ``kd_loss`` and ``linear_kd_loss``.

    TRL's ``distillation_is_clip``.

    >>> importance_clip(torch.ones(2), torch.tensor([-1.0, -3.0]), torch.tensor([-4.0, -2.0]), reduction="none")
    tensor([2.0000, 0.3679])
    """
    clip = checks.number("clip", clip, low=0.0, exclusive_low=True)
    counted, x, o = _tokens(mask, student_logprobs, old_logprobs=old_logprobs)
    checks.token_numbers("losses", losses, student_logprobs)
    losses = _cleared(losses.to(x.dtype), counted)
    return _reduced(losses * _exp(x.detach() - o).clamp(max=clip), counted, reduction, normalizer)


def teacher_advantages(teacher_logprobs: Tensor, old_logprobs: Tensor, *, mask: Optional[Tensor] = None) -> Tensor:
    """A = sg(a - o): by how much the teacher likes a token better than who sampled it; 0 where it does not count.

    The sum over a sequence estimates -KL(q || p) of whole sequences. On policy, ``advantage``, ``ratio`` and ``ppo``
    with it have reverse KL's expected gradient. ``discounted_returns`` of it counts what a token leads to.

    >>> teacher_advantages(torch.tensor([-1.5, -torch.inf]), torch.tensor([-1.0, -2.0]), mask=torch.tensor([1, 0]))
    tensor([-0.5000,  0.0000])
    """
    checks.token_numbers("old_logprobs", old_logprobs)
    counted = checks.token_mask(mask, old_logprobs)
    checks.token_numbers("teacher_logprobs", teacher_logprobs, old_logprobs)
    o = _cleared(_wide(old_logprobs.detach()), counted)
    return _cleared(teacher_logprobs.detach().to(o.dtype), counted) - o


def advantage(
    student_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """-A x, with A detached. Gradient: -A. Expected gradient, of A = a - o on policy: that of the reverse KL.

    ``advantages`` have the shape of the tokens, or 1 in some dimensions (one per sequence: ``(B, 1)``). Tokens that an
    older student sampled are taken as they come: ``ratio`` corrects for it.

    NeMo-RL's MOPD without a PPO ratio; IW-OPD (arXiv 2606.22600) with ``iw_weights(A) * A``.

    >>> advantage(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.0]), reduction="none")
    tensor([0.5000, 2.0000])
    """
    mask, x = _tokens(mask, student_logprobs)
    return _reduced(-_advantages(advantages, x, mask) * x, mask, reduction, normalizer)


def ratio(
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """-A r. Gradient: -A r. Expected gradient over the OLD student's tokens: that of ``advantage`` over
    the new student's.

    On policy r is 1, and the gradient that of ``advantage``. Nothing bounds r: ``ppo`` and ``icepop`` do.

    Tinker's "importance_sampling", with A = coef * (a - o).

    >>> ratio(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]), torch.tensor([0.5, 1.0]), reduction="none")
    tensor([-0.5000, -0.3679])
    """
    mask, x, o = _tokens(mask, student_logprobs, old_logprobs=old_logprobs)
    weight = _advantages(advantages, x, mask)
    return _reduced(-weight * _exp(x - o), mask, reduction, normalizer)


def ppo(
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: Optional[float] = None,
    dual_clip: Optional[float] = None,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); with ``dual_clip`` c at most -c A where A < 0.

    Gradient: -A r; 0 where the clip is what counts: r above 1 + clip_high for A > 0, below 1 - clip_low for A < 0, and
    above c for A < 0. Expected gradient on policy: that of ``advantage``, as r is 1.

    Args:
        clip_low: in [0, 1]. clip_high: the same as ``clip_low`` where it is None.
        dual_clip: above 1; 3 is usual. Without it a token of A < 0 that has become much likelier has an unbounded loss.

    Proximal policy optimisation (arXiv 1707.06347), dual clip (arXiv 1912.09729). verl's ``use_policy_gradient`` gives
    it A = -sg(loss) of an estimator (its dual clip is always on, with c = 3); TRL's MiniLLM A = a - o summed over the
    tokens to come, see ``discounted_returns``.

    >>> x, o, A = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0]), torch.tensor([1.0, -1.0])
    >>> ppo(x, o, A, reduction="none"), ppo(x, o, A, dual_clip=3.0, reduction="none")
    (tensor([-1.0000,  7.3891]), tensor([-1.,  3.]))
    """
    low = checks.number("clip_low", clip_low, low=0.0, high=1.0)
    high = low if clip_high is None else checks.number("clip_high", clip_high, low=0.0)
    mask, x, o = _tokens(mask, student_logprobs, old_logprobs=old_logprobs)
    weight = _advantages(advantages, x, mask)
    r = _exp(x - o)
    losses = torch.maximum(-weight * r, -weight * r.clamp(1 - low, 1 + high))
    if dual_clip is not None:
        bound = checks.number("dual_clip", dual_clip, low=1.0, exclusive_low=True)
        losses = torch.where(weight < 0, torch.minimum(losses, -bound * weight), losses)
    return _reduced(losses, mask, reduction, normalizer)


def ref_kl(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    max_drop: float = 0.2,
    penalty: float = 1e-3,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """-m sg(a - x) r + penalty (x - o)^2, with m = 1 unless a token's probability fell by more than ``max_drop``.

    m = [exp(x) - exp(o) >= -max_drop]. Gradient: -m (a - x) r + 2 penalty (x - o). Expected gradient: on policy that of
    the reverse KL, as r is 1 and the penalty's is 0; over the OLD student's tokens that of the reverse KL at the new
    student, but for m and the penalty.

    prime-rl's ``ref_kl`` loss component. There each component of a batch has a denominator of its own, the number of
    its tokens: call this with the mask of these. Some of its versions have no penalty: ``penalty=0``.

    >>> x = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> loss = ref_kl(x, torch.tensor([-1.5, -1.0]), x.detach(), reduction="sum")
    >>> torch.autograd.grad(loss, x)[0]
    tensor([ 0.5000, -1.0000])
    """
    max_drop = checks.number("max_drop", max_drop, low=0.0)
    penalty = checks.number("penalty", penalty, low=0.0)
    mask, x, a, o = _tokens(mask, student_logprobs, teacher_logprobs=teacher_logprobs, old_logprobs=old_logprobs)
    kept = x.detach().exp() - o.exp() >= -max_drop
    # Where m is 0 nothing counts, be it infinite: a product of 0 and an infinite number would spoil the gradient.
    pull = torch.where(kept, (a - x).detach(), 0.0)
    losses = -pull * _exp(torch.where(kept, x - o, 0.0))
    if penalty:
        losses = losses + penalty * (x - o).square()
    return _reduced(losses, mask, reduction, normalizer)


def icepop(
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    low: float = 0.5,
    high: float = 5.0,
    with_ratio: bool = True,
    mask: Optional[Tensor] = None,
    reduction: str = "mean",
    normalizer: Normalizer = None,
) -> Tensor:
    """``ratio``, or ``advantage`` without the ratio, and 0 where r is outside [low, high]: such tokens teach nothing.

    Gradient: -A r (-A without the ratio) within, 0 outside. Expected gradient on policy: that of ``advantage``. Tokens
    outside count in the denominator of the mean.

    IcePop, as in NeMo-RL's clipped policy loss: where the engine that sampled and the trainer disagree, a token's
    gradient is noise. ``old_logprobs`` are the engine's.

    >>> x, o = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -3.0, -1.0])
    >>> icepop(x, o, torch.ones(3), reduction="none")
    tensor([-1.,  0.,  0.])
    """
    low = checks.number("low", low, low=0.0)
    high = checks.number("high", high, low=low)
    checks.flag("with_ratio", with_ratio)
    mask, x, o = _tokens(mask, student_logprobs, old_logprobs=old_logprobs)
    weight = _advantages(advantages, x, mask)
    log_ratio = (x - o).detach()
    inside = (log_ratio >= (math.log(low) if low > 0 else -math.inf)) & (log_ratio <= math.log(high))
    # Outside nothing counts, be it infinite: a product of 0 and an infinite weight would spoil the gradient.
    weight = torch.where(inside, weight, 0.0)
    losses = -weight * (_exp(torch.where(inside, x - o, 0.0)) if with_ratio else x)
    return _reduced(torch.where(inside, losses, 0.0), mask, reduction, normalizer)


def iw_weights(
    advantages: Tensor, *, gamma: float = 0.5, eps: float = 1e-8, mask: Optional[Tensor] = None, dim: int = -1
) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{j<t} |A_j| / max(sum_j |A_j|, eps)) along a sequence, detached; 0 behind the mask.

    Early tokens, on which all others depend, weigh up to 1 + gamma, the last one 1 or a little more:
    ``advantage(student_logprobs, iw_weights(A, mask=mask) * A, mask=mask)``.

    IW-OPD (arXiv 2606.22600), TRL's trainer of that name.

    >>> iw_weights(torch.tensor([1.0, -1.0, 2.0]))
    tensor([1.5000, 1.3750, 1.2500])
    """
    gamma = checks.number("gamma", gamma, low=0.0)
    eps = checks.number("eps", eps, low=0.0, exclusive_low=True)
    checks.token_numbers("advantages", advantages)
    counted = checks.token_mask(mask, advantages)
    size = _cleared(_wide(advantages.detach()), counted).abs()
    before = size.cumsum(dim) - size
    return _cleared(1 + gamma * (1 - before / size.sum(dim, keepdim=True).clamp(min=eps)), counted)


def discounted_returns(rewards: Tensor, *, gamma: float, mask: Optional[Tensor] = None, dim: int = -1) -> Tensor:
    """A_t = sum_{i>=t} gamma^(i-t) R_i along a sequence, detached: what a token leads to, not its own reward alone.

    With R = ``teacher_advantages`` and gamma = 1, ``advantage`` has the expected gradient of the reverse KL of whole
    sequences; gamma = 0 is the token's own. Masked rewards are 0 and their places still count as steps; a masked token
    gets 0.

    Tinker's ``kl_discount_factor``; MiniLLM (arXiv 2306.08543). TRL's MiniLLM code weighs a reward by gamma^i, not
    gamma^(i-t) as its docstring says, and as here: equal for gamma = 1 or with its length normalisation.

    >>> discounted_returns(torch.tensor([1.0, 1.0, 2.0]), gamma=0.5)
    tensor([2., 2., 2.])
    """
    gamma = checks.number("gamma", gamma, low=0.0, high=1.0)
    checks.token_numbers("rewards", rewards)
    counted = checks.token_mask(mask, rewards)
    returns = _cleared(_wide(rewards.detach()), counted).movedim(dim, -1)
    # After a step each entry is the sum over twice as many rewards from its place on: log2(T) steps.
    step, length = 1, returns.shape[-1]
    while step < length:
        later = torch.nn.functional.pad(returns[..., step:], (0, step))
        returns = returns + gamma**step * later
        step *= 2
    return _cleared(returns.movedim(-1, dim), counted)


def dpace_weights(student_logprobs: Tensor, *, alpha: float, mask: Optional[Tensor] = None) -> Tensor:
    """w_k = sum_{j>=k} prod_{l<=j} c_l with c = (1 - alpha) exp(x) + alpha, along the last dimension, detached.

    The last dimension is a block of tokens drafted in a row, x the drafter's log-prob of the right ones. prod_{l<=j}
    c_l is the chance that the drafts up to j are accepted, so that w_k is the expected number of tokens that pass
    through k: ``reduce(-x * dpace_weights(x, alpha=alpha), mask)``, a cross entropy that counts what acceptance counts.
    ``alpha`` in [0, 1] keeps a token behind an unlikely one from being forgotten; 1 weighs by position alone. A masked
    token is passed with certainty (c = 1) and is not one to be counted; its weight is 0.

    D-PACE, in SpecForge, Model-Optimizer and speculators.

    >>> dpace_weights(torch.tensor([0.5, 0.5, 1.0]).log(), alpha=0.0)
    tensor([1.0000, 0.5000, 0.2500])
    """
    alpha = checks.number("alpha", alpha, low=0.0, high=1.0)
    checks.token_numbers("student_logprobs", student_logprobs)
    counted = checks.token_mask(mask, student_logprobs)
    # Masked log-probs are 0, whose probability is 1.
    x = _cleared(_wide(student_logprobs.detach()), counted)
    passed = _cleared(((1 - alpha) * x.exp() + alpha).cumprod(-1), counted)
    return _cleared(passed.flip(-1).cumsum(-1).flip(-1), counted)


def _tokens(mask: Optional[Tensor], student: Tensor, **others: Tensor) -> tuple[Any, ...]:
    """The mask, and log-probs as the formulas take them: 0 where a token does not count; only the student's learn."""
    checks.token_numbers("student_logprobs", student)
    for name, value in others.items():
        checks.token_numbers(name, value, student)
    counted = checks.token_mask(mask, student)
    x = _wide(student)
    return counted, *(
        _cleared(item, counted) for item in (x, *(value.detach().to(x.dtype) for value in others.values()))
    )


def _advantages(advantages: Tensor, x: Tensor, counted: Optional[Tensor]) -> Tensor:
    checks.token_numbers("advantages", advantages, x, expand=True)
    return _cleared(advantages.detach().to(x.dtype).expand_as(x), counted)


def _wide(values: Tensor) -> Tensor:
    return values.to(checks.sum_dtype(values))


def _cleared(values: Tensor, counted: Optional[Tensor]) -> Tensor:
    # The gradient of what is replaced is 0, whatever stood there: nothing is multiplied by 0.
    return values if counted is None else torch.where(counted, values, 0.0)


def _exp(values: Tensor) -> Tensor:
    """exp, continued as its tangent beyond the largest exponent."""
    top = math.exp(LARGEST_EXPONENT)
    beyond = top * (1 + (values - LARGEST_EXPONENT))
    return torch.where(values > LARGEST_EXPONENT, beyond, values.clamp(max=LARGEST_EXPONENT).exp())


def _k3(x: Tensor, a: Tensor) -> Tensor:
    d, slope = a - x, math.expm1(LARGEST_EXPONENT)
    beyond = slope - LARGEST_EXPONENT + slope * (d - LARGEST_EXPONENT)
    # expm1: of near policies the value is a difference of near numbers.
    return torch.where(d > LARGEST_EXPONENT, beyond, d.clamp(max=LARGEST_EXPONENT).expm1() - d)


def _reduced(losses: Tensor, counted: Optional[Tensor], reduction: str, normalizer: Normalizer) -> Tensor:
    checks.choice("reduction", reduction, ("none", "sum", "mean"))
    normalizer = checks.normalizer_like(normalizer, reduction, losses)
    losses = _cleared(_wide(losses), counted)
    if reduction == "none":
        return losses
    total = losses.sum()
    if normalizer is not None:
        return total / (normalizer.reshape(()) if isinstance(normalizer, Tensor) else normalizer)
    if reduction == "sum":
        return total
    if counted is None:
        return total / max(losses.numel(), 1)
    return total / counted.sum().clamp(min=1)
