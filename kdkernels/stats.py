"""The statistics of rows, by name; their order is that of the columns the ops return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KDStats(NamedTuple):
    """Per-row statistics of the shape of the rows, detached; rows that do not count are 0.

    ``divergence``, ``ce`` and ``lse`` are the parts of the objective before weights and T^2; the others are taken at
    the tempered distributions. Entropies and KLs are in nats. ``acceptance`` is ``sum_v min(p_v, q_v)``, the chance
    that speculative decoding accepts a draft of the student; ``agreement`` is 1 where both have the same most likely
    token.
    """

    divergence: Tensor
    ce: Tensor
    lse: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    agreement: Tensor
    acceptance: Tensor


class TopKStats(NamedTuple):
    """Per-row statistics of ``topk_kd_loss`` of the shape of the rows, detached; rows that do not count are 0.

    ``divergence``, ``ce`` and ``lse`` are the parts of the objective before weights and T^2. ``teacher_mass`` is the
    sum of the teacher's probabilities as they were given, ``student_mass`` what the tempered student gives to the same
    ids. ``overlap`` is the fraction of the teacher's distinct ids that are among the student's own top K', K' being
    their number: those whose logit is at least its K'-th largest; 0 where K' is 0.
    """

    divergence: Tensor
    ce: Tensor
    lse: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    overlap: Tensor


class TokenStats(NamedTuple):
    """Statistics of ``token_logprobs``, detached; rows without a token are 0.

    With ``x = cap(logits)`` and ``q = softmax(x / T)`` over ``vocab_size`` columns: ``log_sum_squares`` is
    ``log sum_v q_v^2`` of the shape of the rows, less the Renyi entropy of order 2; ``mean_logit`` is the mean of x, so
    that ``mean_logit / T - lse`` is the mean log-probability. ``is_argmax`` is a bool of the shape of the ids: no logit
    of the row is larger than the id's; of several largest ones each is.
    """

    log_sum_squares: Tensor
    mean_logit: Tensor
    is_argmax: Tensor
