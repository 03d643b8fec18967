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
