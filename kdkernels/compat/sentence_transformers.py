"""``DistillKLDivLoss`` of sentence-transformers.

The student's scores are similarities of a query with its candidates, the teacher's are the labels. KL is a mean over
the batch, times the student's T^2, with a temperature of each side. Gradients go to the embeddings.

Its ``MarginMSELoss`` is a mean over one number per pair, and needs no kernel.

Source: sentence-transformers 6.2.0, ``sentence_transformer/losses/distill_kl_div.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks


def pairwise_dot_score(a: Tensor, b: Tensor) -> Tensor:
    """The dot products of the rows."""
    return (a * b).sum(-1)


class DistillKLDivLoss(torch.nn.Module):
    """``DistillKLDivLoss``, for a ``SentenceTransformerTrainer`` or called on columns of features."""

    def __init__(
        self,
        model: Any,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = pairwise_dot_score,
        temperature: float = 1.0,
        student_temperature: Optional[float] = None,
        teacher_temperature: Optional[float] = None,
    ) -> None:
        super().__init__()
        self.model, self.similarity_fct, self.temperature = model, similarity_fct, temperature
        self.student_temperature = temperature if student_temperature is None else student_temperature
        self.teacher_temperature = temperature if teacher_temperature is None else teacher_temperature

        for name in ("temperature", "student_temperature", "teacher_temperature"):
            checks.number(name, getattr(self, name), low=0.0, exclusive_low=True)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss as a model card has it."""
        name = getattr(self.similarity_fct, "__name__", repr(self.similarity_fct))
        found = {"similarity_fct": name, "temperature": self.temperature}
        for side in ("student_temperature", "teacher_temperature"):
            if getattr(self, side) != self.temperature:
                found[side] = getattr(self, side)
        return found

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of the embeddings of a query, a positive and negatives."""
        query, *candidates = embeddings
        if len(candidates) < 2:
            raise ValueError(f"embeddings must be of a query and 2 or more candidates, got {len(candidates)}")
        scores = torch.stack([self.similarity_fct(query, candidate) for candidate in candidates], dim=1)
        return kd.kd_loss(
            scores,
            labels.detach().to(scores.dtype),
            temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
