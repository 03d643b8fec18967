"""Some of the columns of rows whose softmax is known, in plain PyTorch: their sums, or their gradient."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kdkernels.ops import SHARD_NUMBERS, SHARD_SUMS
from kdkernels.reference import divergences
from kdkernels.reference.dense import apply_softcap


def shard_rows(
    student: Tensor,
    teacher: Tensor,
    dstudent: Optional[Tensor],
    labels: Optional[Tensor],
    row_numbers: Tensor,
    param_rows: Optional[Tensor],
    *,
    divergence: str,
    param0: float,
    param1: float,
    student_softcap: float,
    teacher_softcap: float,
    vocab_size: int,
    stats: bool,
) -> Tensor:
    """As ``shard_fwd`` of ``kdkernels.ops`` says, on logits ``[B, L, V]``."""
    dtype, width = row_numbers.dtype, student.shape[-1]
    of_row = dict(zip(SHARD_NUMBERS, row_numbers.unsqueeze(-1).unbind(1), strict=True))
    read = of_row["student_unit"] != 0
    s = apply_softcap(student.reshape(-1, width)[:, :vocab_size].to(dtype), student_softcap)
    t = apply_softcap(teacher.reshape(-1, teacher.shape[-1])[:, :vocab_size].to(dtype), teacher_softcap)
    s, t = torch.where(read, s, 0.0), torch.where(read, t, 0.0)
    logq = (s - of_row["student_top"]) * of_row["student_unit"] - of_row["student_log_z"]
    logp = (t - of_row["teacher_top"]) * of_row["teacher_unit"] - of_row["teacher_log_z"]
    param = param0 if param_rows is None else param_rows[:, None, None]

    def summands(logq: Tensor) -> Tensor:
        return divergences.TABLE[divergence](logp[..., None], logq[..., None], param, param1)

    with torch.enable_grad():
        leaf = logq.detach().requires_grad_()
        values = summands(leaf)
        (score,) = torch.autograd.grad(values.sum(), leaf)
    values = values.detach()
    score = torch.where(values.isnan(), values, score)
    if dstudent is None:
        found = [values.sum(-1), score.sum(-1)]
        if stats:
            table = divergences.TABLE
            found += [table[name](logp, logq, 0, 0) for name in ("forward_kl", "reverse_kl")]
            found += [table["soft_ce"](log, log, 0, 0) for log in (logp, logq)]
            found.append(divergences.acceptance(logp, logq))
        return torch.where(read, torch.stack(found, -1), 0.0)
    soft = (of_row["of_score"] != 0) | (of_row["of_q"] != 0) | (of_row["of_p"] != 0)
    of_soft = of_row["of_score"] * score - of_row["of_q"] * logq.exp() + of_row["of_p"] * logp.exp()
    of_hard = of_row["of_hard"] * (s - of_row["student_top"] - of_row["hard_log_z"]).exp()
    gradient = torch.where(soft, of_soft, 0.0) + torch.where(of_row["of_hard"] != 0, of_hard, 0.0)
    gradient = gradient + of_row["constant"]
    if labels is not None:
        here = torch.arange(vocab_size, device=s.device) == labels.unsqueeze(-1)
        gradient = gradient + torch.where(here, of_row["at_label"], 0.0)
    if student_softcap:
        gradient = gradient * (1 - (s / student_softcap).square())
    gradient = torch.nn.functional.pad(gradient, (0, width - vocab_size))
    dstudent.copy_(gradient.reshape(dstudent.shape))
    return row_numbers.new_empty(0, len(SHARD_SUMS) if stats else 2)
