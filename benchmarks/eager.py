"""Eager PyTorch formulations of every objective: the baselines.

Each function maps ``(student, teacher, labels, temperature)`` to a scalar, reduced by "batchmean" and times T^2.
``AS_WRITTEN`` holds what papers' code and trainers write, ``BEST`` the formulation with the fewest and cheapest passes;
the functions after ``soft_ce_best`` are those of the suite "objective", whose constants they repeat.
Every one is a function of its own, because torch.compile caches by code object.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _named(suffix: str) -> dict[str, Loss]:
    """The functions of this file whose names end so, by what comes before."""
    return {name.removesuffix(suffix): item for name, item in globals().items() if name.endswith(suffix)}


def forward_kl_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    return F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction="batchmean") * T * T


def forward_kl_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    return F.kl_div(logq, logp, log_target=True, reduction="batchmean") * T * T


def kl_log_target_fp32(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq = F.log_softmax(student / T, -1, dtype=torch.float32)
    logp = F.log_softmax(teacher / T, -1, dtype=torch.float32)
    return F.kl_div(logq, logp, log_target=True, reduction="batchmean") * T * T


def reverse_kl_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    q = F.softmax(student / T, -1)
    return (q * (F.log_softmax(student / T, -1) - F.log_softmax(teacher / T, -1))).sum(-1).mean() * T * T


def reverse_kl_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    return F.kl_div(logp, logq, log_target=True, reduction="batchmean") * T * T


def jsd_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    q, p = F.softmax(student / T, -1), F.softmax(teacher / T, -1)
    m = 0.5 * (p + q)
    logm = m.log()
    kl_p, kl_q = F.kl_div(logm, p, reduction="batchmean"), F.kl_div(logm, q, reduction="batchmean")
    return (0.5 * kl_p + 0.5 * kl_q) * T * T


def jsd_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    q, p = logq.exp(), logp.exp()
    logm = (0.5 * (p + q)).log()
    return (torch.sum(p * (logp - logm)) + torch.sum(q * (logq - logm))) * (0.5 * T * T / student.shape[0])


def tvd_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    return 0.5 * (F.softmax(student / T, -1) - F.softmax(teacher / T, -1)).abs().sum(-1).mean() * T * T


def tvd_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    q, p = F.softmax(student / T, -1), F.softmax(teacher / T, -1)
    return F.l1_loss(q, p, reduction="sum") * (0.5 * T * T / student.shape[0])


def skew_kl_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    q, p = F.softmax(student / T, -1), F.softmax(teacher / T, -1)
    return F.kl_div((0.1 * p + 0.9 * q).log(), p, reduction="batchmean") * T * T


def skew_kl_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    q, logp = F.softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    logm = torch.lerp(q, logp.exp(), 0.1).log()
    return F.kl_div(logm, logp, log_target=True, reduction="batchmean") * T * T


def skew_reverse_kl_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    q, p = F.softmax(student / T, -1), F.softmax(teacher / T, -1)
    return F.kl_div((0.1 * q + 0.9 * p).log(), q, reduction="batchmean") * T * T


def skew_reverse_kl_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, p = F.log_softmax(student / T, -1), F.softmax(teacher / T, -1)
    logm = torch.lerp(p, logq.exp(), 0.1).log()
    return F.kl_div(logm, logq, log_target=True, reduction="batchmean") * T * T


def alpha_beta_as_written(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    # In fp32 whatever the logits are: powers below 1 of probabilities in bf16 are off by tens of per cent.
    T, a, b = temperature, 0.2, 0.7
    q, p = (F.softmax(x / T, -1, dtype=torch.float32) for x in (student, teacher))
    inside = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -inside.sum(-1).mean() / (a * b) * T * T


def alpha_beta_best(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    # The pure powers sum to exponentials of a logsumexp: one pass over the logits each, nothing stored.
    T, a, b = temperature, 0.2, 0.7
    logq, logp = (F.log_softmax(x / T, -1, dtype=torch.float32) for x in (student, teacher))
    cross = torch.logsumexp(torch.add(logp, logq, alpha=b / a) * a, -1).exp()
    p_sum = torch.logsumexp(logp * (a + b), -1).exp()
    q_sum = torch.logsumexp(logq * (a + b), -1).exp()
    return -(cross - a / (a + b) * p_sum - b / (a + b) * q_sum).mean() * (T * T / (a * b))


def jeffreys_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    forward = F.kl_div(logq, logp, log_target=True, reduction="batchmean")
    return (forward + F.kl_div(logp, logq, log_target=True, reduction="batchmean")) * T * T


def jeffreys_best(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    # KL(p || q) + KL(q || p) = sum (p - q) (logp - logq).
    T = temperature
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    return torch.sum((logp.exp() - logq.exp()) * (logp - logq)) * (T * T / student.shape[0])


def mixed_kl_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    forward = F.kl_div(logq, logp, log_target=True, reduction="batchmean")
    return (0.5 * forward + 0.5 * F.kl_div(logp, logq, log_target=True, reduction="batchmean")) * T * T


def mixed_kl_best(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    # Half of each is half of Jeffreys.
    return 0.5 * jeffreys_best(student, teacher, labels, temperature)


def triangular_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    q, p = F.softmax(student / T, -1), F.softmax(teacher / T, -1)
    return ((p - q) ** 2 / (p + q)).sum(-1).mean() * T * T


def triangular_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    # p + q less four times their harmonic mean: 2 - 4 sum p q / (p + q).
    q, p = F.softmax(student / T, -1), F.softmax(teacher / T, -1)
    return (2 - 4 * torch.sum(p * q / (p + q)) / student.shape[0]) * (T * T)


def soft_ce_as_written(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    return -(F.softmax(teacher / T, -1) * F.log_softmax(student / T, -1)).sum(-1).mean() * T * T


def soft_ce_best(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    return F.cross_entropy(student / T, F.softmax(teacher / T, -1)) * T * T


def kl_ce(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return forward_kl_best(student, teacher, labels, temperature) + 0.5 * F.cross_entropy(student, labels)


def kl_ce_smoothed(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    # Its sum over the vocabulary overflows fp16.
    ce = F.cross_entropy(student.float() if student.dtype == torch.float16 else student, labels, label_smoothing=0.1)
    return forward_kl_best(student, teacher, labels, temperature) + 0.5 * ce


def kl_ce_z(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    # One logsumexp serves both terms.
    lse = torch.logsumexp(student, -1)
    ce = (lse - student.gather(1, labels.unsqueeze(1)).squeeze(1)).mean()
    return forward_kl_best(student, teacher, labels, temperature) + 0.5 * ce + 1e-4 * lse.square().mean()


def kl_softcapped(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    cap = 30.0
    capped = cap * torch.tanh(student / cap), cap * torch.tanh(teacher / cap)
    return forward_kl_best(*capped, labels, temperature)


def kl_statistics(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    loss = F.kl_div(logq, logp, log_target=True, reduction="batchmean") * T * T
    with torch.no_grad():
        q, p = logq.exp(), logp.exp()
        statistics = (
            torch.logsumexp(student, -1),
            (q * (logq - logp)).sum(-1),
            -(p * logp).sum(-1),
            -(q * logq).sum(-1),
            (student.argmax(-1) == teacher.argmax(-1)).float(),
            torch.minimum(p, q).sum(-1),
        )
    # A compiler would drop results that nothing uses; finite ones add exactly 0.
    return loss + sum(item.sum() for item in statistics).mul(0.0).detach()  # type: ignore[union-attr]


def kl_masked(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    rows = F.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    return (rows * (labels != -100)).sum() * (T * T / student.shape[0])


def kl_selected(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    counted, T = labels != -100, temperature
    logq, logp = F.log_softmax(student[counted] / T, -1), F.log_softmax(teacher[counted] / T, -1)
    return F.kl_div(logq, logp, log_target=True, reduction="sum") * (T * T / student.shape[0])


def kl_row_temperature(student: Tensor, teacher: Tensor, labels: Tensor, temperatures: Tensor) -> Tensor:
    T = temperatures.unsqueeze(1).to(student.dtype)
    logq, logp = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    rows = F.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    return (rows * temperatures.square()).mean()


def kl_from_probs(student: Tensor, probs: Tensor, labels: Tensor, T: float) -> Tensor:
    return F.kl_div(F.log_softmax(student / T, -1), probs, reduction="batchmean") * T * T


def kl_two_teachers(student: Tensor, teacher: Tensor, second_teacher: Tensor, T: float) -> Tensor:
    p = torch.lerp(F.softmax(teacher / T, -1), F.softmax(second_teacher / T, -1), 0.5)
    return F.kl_div(F.log_softmax(student / T, -1), p, reduction="batchmean") * T * T


def kl_standardized(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    scaled = F.layer_norm(student, student.shape[-1:], eps=0.0), F.layer_norm(teacher, teacher.shape[-1:], eps=0.0)
    # layer_norm divides by the population's deviation, and the method by torch.std.
    V = student.shape[-1]
    s, t = (x * ((V - 1) / V) ** 0.5 for x in scaled)
    return forward_kl_best(s, t, labels, temperature)


def taid(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return forward_kl_best(student, torch.lerp(student.detach(), teacher, 0.4), labels, temperature)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    T, alpha, beta = temperature, 1.0, 2.0
    s, t, index = student / T, teacher / T, labels.unsqueeze(1)
    logq, logp = (F.log_softmax(x, -1, dtype=torch.float32).gather(1, index) for x in (s, t))
    q, p = logq.exp(), logp.exp()
    target = p * (logp - logq) + (1 - p) * (torch.log1p(-p) - torch.log1p(-q))
    minus_inf = torch.full((), -1e4, dtype=s.dtype, device=s.device)
    log_hat_q, log_hat_p = (F.log_softmax(x.scatter(1, index, minus_inf.expand_as(index)), -1) for x in (s, t))
    rest = F.kl_div(log_hat_q, log_hat_p, log_target=True, reduction="batchmean")
    return (alpha * target.mean() + beta * rest) * T * T


def logit_mse(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return F.mse_loss(student, teacher)


# Of the teacher: at one temperature two 16-bit logits have one probability where the sums happen to be equal but for a
# rounding, and there the gradient jumps.
ULD_TEACHER = 2.6


def uld(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """In fp32 (fp64), in which a sort of 16-bit logits keeps equal ones in one order."""
    sums = torch.float64 if student.dtype == torch.float64 else torch.float32
    q = (student.to(sums) / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True).values
    p = (teacher.to(sums) / ULD_TEACHER).softmax(-1).sort(dim=-1, descending=True).values
    return (q - p).abs().sum(-1).mean()


def topk_kl(student: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """Forward KL to K log-probabilities and one outcome more for all other tokens, summed in fp32."""
    return _bucketed_kl(F.log_softmax(student, -1, dtype=torch.float32).gather(-1, ids), logprobs, tail)


def topk_kl_logsumexp(student: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    s = student.float()
    return _bucketed_kl(s.gather(-1, ids) - torch.logsumexp(s, -1, keepdim=True), logprobs, tail)


def _bucketed_kl(logq: Tensor, logp: Tensor, tail: Tensor) -> Tensor:
    rest = torch.log1p(-logq.exp().sum(-1).clamp(max=1 - 1e-6))
    return ((logp.exp() * (logp - logq)).sum(-1) + tail.exp() * (tail - rest)).mean()


def capture(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = teacher.topk(k, -1)
    return ids, values - torch.logsumexp(teacher, -1, keepdim=True)


def capture_fp32(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = teacher.topk(k, -1)
    return ids, values.float() - torch.logsumexp(teacher.float(), -1, keepdim=True)


AS_WRITTEN: dict[str, Loss] = _named("_as_written")
BEST: dict[str, Loss] = _named("_best")
