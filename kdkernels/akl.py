"""The weight of adaptive KL: how much of the distance of two models is in the head of the teacher."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.capture import PerRow, capture_topp
from kdkernels.functional import kd_loss
from kdkernels.tokens import token_logprobs


@torch.no_grad()
def akl_ratio(
    student: Tensor,
    teacher: Tensor,
    *,
    mu: float = 0.5,
    temperature: PerRow = 1.0,
    vocab_size: Optional[int] = None,
    backend: str = "auto",
) -> Tensor:
    r"""The share of the distance between student and teacher that lies in the teacher's head, for adaptive KL (AKL).

    With ``p = softmax(t / T)``, ``q = softmax(s / T)``, and the head the most probable tokens of p whose masses add up
    to at most mu, in descending order and always the first one; equal ones by the lower id::

        w = g_head / (g_head + g_tail)          g = sum |p_v - q_v| over the head, or over all others

    and 1/2 where p and q are equal. AKL is ``w KL(p || q) + (1 - w) KL(q || p)`` with w held fixed. It has
    the rounding of the probabilities: of fp32 it is off by about ``3e-7 / sum |p - q|``, and says nothing where the
    models are within 1e-6 of each other. Both divergences have the same gradient there, and any w is as good.

    Nothing is sorted but the head itself: the compiled backend finds how many tokens it has by counting the columns by
    their bits, and one pass over both models has the whole distance.

    Args:
        student: logits ``(..., V)``, as in ``kd_loss``.
        teacher: logits of the same shape, or with ``vocab_size`` of the same leading shape.
        mu: the head's mass, in (0, 1).
        temperature: T > 0, a number or one value per row.
        vocab_size: columns from there on are padding: no probability.
        backend: "auto", "cpu" (C++) or "torch" (plain PyTorch).

    Returns:
        w of each row ``(...)``, float32 (float64 for float64), without a graph. A row without a distribution is NaN.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched.

    Example:
        ::

            w = kd.akl_ratio(student, teacher)
            loss = kd.kd_loss(student, teacher, divergence="mixed_kl", row_param=1 - w)

        >>> akl_ratio(torch.zeros(1, 3), torch.zeros(1, 3)).item()
        0.5

    Reference:
        Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
        arXiv:2404.02657.
    """
    checks.logits("student", student)
    checks.vocabulary(vocab_size, student)
    checks.teacher_like("teacher", teacher, student, vocab_size)
    checks.number("mu", mu, low=0.0, high=1.0, exclusive_low=True, exclusive_high=True)
    student, teacher = student.detach(), teacher.detach()
    alike: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    # The token that crosses mu is the last of its row.
    head = capture_topp(teacher, mu, **alike)
    distance = 2 * kd_loss(
        student,
        teacher,
        divergence="tvd",
        scale_by_t_squared=False,
        reduction="none",
        **alike,
    )
    own = token_logprobs(student, head.ids, **alike)
    p, q = head.logprobs.double().exp(), own.logprobs.double().exp()
    inside = p.cumsum(-1) <= mu
    inside[..., 0] = True
    of_head = torch.where(inside & (head.ids >= 0), (p - q).abs(), 0.0).sum(-1).to(distance.dtype)
    # Masked by 0 a NaN would be no more.
    of_head = of_head + 0 * distance
    return torch.where(distance == 0, 0.5, of_head / distance).clamp(max=1.0)
