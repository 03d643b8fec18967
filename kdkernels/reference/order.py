"""Statistics of the order of a row in plain PyTorch, by sorting it."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.reference.dense import PerRow, column, log_softmax

# Epsilons of a probability that another is off by and has no sign.
NO_DIFFERENCE = 64


def uld_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    *,
    temperature: PerRow = 1.0,
    teacher_temperature: PerRow = 1.0,
    ignore_index: int = -100,
    vocab_size: Optional[int] = None,
    teacher_vocab_size: Optional[int] = None,
    exact: bool = True,
) -> Tensor:
    """``sum_r |q_(r) - p_(r)|`` of rows ``[N, V]``, as ``kdkernels.uld_loss`` says; always exact."""
    sums = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student[:, :vocab_size].to(sums), teacher[:, :teacher_vocab_size].to(sums)
    if labels is not None:
        # A row that does not count may hold NaN, of which even a gradient of 0 would make more.
        ignored = (labels == ignore_index).unsqueeze(-1)
        s, t = torch.where(ignored, 0.0, s), torch.where(ignored, 0.0, t)
    width = max(s.shape[-1], t.shape[-1])
    s, order = s.sort(dim=-1, descending=True, stable=True)
    t = t.sort(dim=-1, descending=True).values
    # A column that is not there has no probability; both sums are then of the same terms where the models agree.
    s, t = (F.pad(row, (0, width - row.shape[-1]), value=-torch.inf) for row in (s, t))
    q = log_softmax(s, column(temperature)).exp()
    p = log_softmax(t, column(teacher_temperature)).exp()
    difference = (q - p).detach()
    # Equal but for rounding is equal, as where the logits of the models differ by a constant. NaN has a sign of 0.
    same = difference.abs() <= NO_DIFFERENCE * torch.finfo(sums).eps * q.detach()
    signs = _mean_of_equals(s.detach(), torch.where(same, 0.0, difference.sign()) + 0 * difference)
    # The signs are those of the ranks: what is left to differentiate is q.
    rows = difference.abs().sum(-1) + (signs * (q - q.detach())).sum(-1)
    return rows if labels is None else torch.where(ignored.squeeze(-1), 0.0, rows)


def _mean_of_equals(ordered: Tensor, values: Tensor) -> Tensor:
    """Values ``[N, V]``, each replaced by their mean over the places that equal it in ``ordered``."""
    begins = torch.ones_like(ordered, dtype=torch.int64)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = begins.cumsum(-1) - 1
    nothing = torch.zeros_like(values)
    total = nothing.scatter_add(-1, group, values)
    count = nothing.scatter_add(-1, group, torch.ones_like(values))
    return total.gather(-1, group) / count.gather(-1, group)


def topp_rows(logits: Tensor, *, p: float, temperature: PerRow = 1.0, vocab_size: Optional[int] = None) -> Tensor:
    """How many columns of rows ``[N, V]`` it takes to a mass of p, as ``topp_count`` of ``kdkernels.ops`` says."""
    x = logits[:, :vocab_size].double()
    outcomes = (x > -torch.inf).sum(-1)
    if p < 1:
        ordered = x.sort(dim=-1, descending=True).values
        mass = log_softmax(ordered, column(temperature)).exp().cumsum(-1)
        outcomes = torch.minimum((mass < p).sum(-1) + 1, outcomes)
    sound = x.amax(-1).isfinite()
    return torch.where(sound, outcomes, 1)
