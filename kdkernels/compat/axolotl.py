"""The top-k distillation losses of axolotl.

The teacher is ids and log-probabilities with a mask of the slots that count; the log-probabilities are taken at the
temperature of the loss and add up to 1 over the slots. The student is normalised over the whole vocabulary
(``loss``, ``ChunkedTopKKDLoss``) or within the slots too (``LigerFusedLinearKLTopKLogprobLoss`` by its default
``normalize_topk=True``), and longer than the teacher where the padding of a batch makes it so. ``loss`` divides by
``num_items_in_batch``, or by the number of slots, not of tokens, where that is not above 0;
``LigerFusedLinearKLTopKLogprobLoss`` is a sum and shifts its labels. Its ``beta`` is 1 by default, reverse KL, while
axolotl's own trainer passes 0.

Where axolotl is wrong: ``LigerFusedLinearKLTopKLogprobLoss`` multiplies the reported divergence by T^2 and not its
gradient; here both have the factor. Reverse KL and JSD with ``normalize_topk=False`` compare sums that are no
distributions, and are refused here. Slots outside the mask, which its ``normalize_topk`` counts, are left out here. An
id that stands twice in a row counts once, with the sum of its probabilities: the gradient is axolotl's, the value less.

Source: axolotl 0.19.0, ``integrations/kd/topk_logprob/forward_kl.py`` and ``integrations/kd/kernels/liger.py``.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.compat import _common


def loss(
    student_logits: Tensor,
    target_token_ids: Tensor,
    target_logprobs: Tensor,
    target_mask: Tensor,
    num_items_in_batch: int = -1,
    kd_temperature: float = 1.0,
) -> Tensor:
    """``axolotl.integrations.kd.topk_logprob.forward_kl.loss``: forward KL on the slots."""
    slots = target_mask.bool()
    divisor = num_items_in_batch if num_items_in_batch > 0 else slots.sum().clamp_min(1)
    return kd.topk_kd_loss(
        student_logits[:, : target_token_ids.shape[1]],
        torch.where(slots, target_token_ids, -1),
        target_logprobs,
        tail="drop",
        temperature=kd_temperature,
        teacher_temperature=1.0,
        scale_by_t_squared=False,
        reduction="sum",
        normalizer=divisor,
    )


class ChunkedTopKKDLoss(torch.nn.Module):
    """``ChunkedTopKKDLoss``: one call for all chunks, since nothing is upcast."""

    def __init__(self, num_output_chunks: int = 8, kd_temperature: float = 1.0) -> None:
        super().__init__()
        self.num_output_chunks, self.kd_temperature = num_output_chunks, kd_temperature

    def forward(
        self,
        student_logits: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        num_items_in_batch: int = -1,
    ) -> Tensor:
        teacher = target_token_ids, target_logprobs, target_mask
        return loss(student_logits, *teacher, num_items_in_batch, self.kd_temperature)


class LigerFusedLinearKLTopKLogprobLoss(torch.nn.Module):
    """``LigerFusedLinearKLTopKLogprobLoss``: the head comes first, and the result is a sum over tokens."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        temperature: float = 1.0,
        beta: float = 1.0,
        ignore_index: int = -100,
        compiled: bool = True,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
    ) -> None:
        super().__init__()
        if not normalize_topk and beta != 0:
            raise ValueError(
                f"beta must be 0 where normalize_topk is False, got {beta}: the student's slots alone do not add up to "
                "1, and are no distribution to compare"
            )
        self.ignore_index = ignore_index
        self.hard = weight_hard_loss if compute_ce_loss else 0.0
        self.options: dict[str, Any] = {
            "divergence": _common.generalized_jsd(beta),
            "kd_weight": weight_soft_loss,
            "temperature": temperature,
            "teacher_temperature": 1.0,
            "tail": "renormalize_both" if normalize_topk else "drop",
            "reduction": "sum",
        }

    def forward(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
        student_bias: Optional[Tensor] = None,
    ) -> Tensor:
        length = target_token_ids.shape[1]
        slots = target_mask.bool()
        # Rows learn from their slots whatever their label is.
        labels = torch.zeros_like(slots[..., 0], dtype=torch.int64)
        head = student_hidden_states[:, :length], lm_head_weight
        teacher = torch.where(slots, target_token_ids, -1), target_logprobs
        result = kd.linear_topk_kd_loss(*head, *teacher, labels, student_bias=student_bias, **self.options)
        if not self.hard:
            return result
        shifted = torch.nn.functional.pad(true_labels[:, 1:], (0, 1), value=self.ignore_index)
        return result + kd.linear_kd_loss(
            student_hidden_states,
            lm_head_weight,
            labels=shifted,
            student_bias=student_bias,
            kd_weight=0.0,
            ce_weight=self.hard,
            ignore_index=self.ignore_index,
            reduction="sum",
        )
