"""Row losses of the dense patterns in plain PyTorch; gradients come from autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from kdkernels.reference import divergences

PerRow = Union[float, Tensor]


class DenseRows(NamedTuple):
    """Unreduced and unweighted: the objective of each row and the statistics of ``kdkernels.KDStats``, all ``[N]``."""

    loss: Tensor
    divergence: Optional[Tensor] = None
    ce: Optional[Tensor] = None
    lse: Optional[Tensor] = None
    forward_kl: Optional[Tensor] = None
    reverse_kl: Optional[Tensor] = None
    teacher_entropy: Optional[Tensor] = None
    student_entropy: Optional[Tensor] = None
    agreement: Optional[Tensor] = None
    acceptance: Optional[Tensor] = None


def column(value: PerRow) -> PerRow:
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() == 1 else value


def apply_softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


def highest(logits: Tensor) -> Tensor:
    return logits.detach().amax(-1, keepdim=True)


def half_less(logits: Tensor, common: Tensor) -> Tensor:
    """Half of what logits are less a number that their row has in common: the whole may pass the largest number."""
    return logits / 2 - common / 2


def log_softmax(logits: Tensor, temperature: PerRow = 1.0, *, steep: bool = False) -> Tensor:
    """Of ``logits / temperature``.

    A large common part is taken off before anything is rounded: a multiple of 64, whose difference is exact.

    For a divergence whose gradient is ``steep`` a probability above 3/4 is 1 less all others: in ``g - q sum(g)`` these
    would be lost beside it.
    """
    common = (highest(logits) / 64).trunc() * 64
    log_probs = torch.log_softmax((logits - common) / temperature, -1)
    if not steep:
        return log_probs
    top = log_probs.detach().argmax(-1, keepdim=True)
    others = log_probs.scatter(-1, top, -torch.inf).exp().sum(-1, keepdim=True)
    sure = others < 0.25
    of_top = torch.where(sure, torch.log1p(-torch.where(sure, others, 0.0)), log_probs.gather(-1, top))
    return log_probs.scatter(-1, top, of_top)


def _standardized(logits: Tensor) -> Tensor:
    """Less their mean, over their deviation as ``torch.std`` has it: of V - 1 degrees of freedom."""
    below = half_less(logits, highest(logits))
    # Neither a common offset nor a common factor changes them.
    extent = -below.detach().amin(-1, keepdim=True)
    below = below / torch.where(extent == 0, torch.full_like(extent, 0.5), extent)
    centred = below - below.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    return centred / torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()


def _teacher_log_probs(
    teachers: Sequence[Tensor],
    weights: Optional[Tensor],
    *,
    mixture: str,
    temperature: PerRow,
    form: str,
    softcap: float,
    standardize: bool,
    steep: bool,
    lse: Optional[Tensor] = None,
    offsets: Optional[Tensor] = None,
    missing: Optional[Tensor] = None,
) -> Tensor:
    logits = [teacher.log() if form == "probs" else teacher for teacher in teachers]
    if offsets is not None:
        logits = [item + offsets for item in logits]
    if form != "probs":
        logits = [apply_softcap(item, softcap) for item in logits]
    if missing is not None:
        # A softcap would make a number of them.
        logits = [item.masked_fill(missing, -torch.inf) for item in logits]
    if standardize:
        logits = [_standardized(item) for item in logits]
    if lse is not None:
        return logits[0] / temperature - lse[:, None]
    if weights is None:
        return log_softmax(logits[0], temperature, steep=steep)
    columns = [weights[:, k : k + 1].to(logits[0].dtype) for k in range(len(logits))]
    if mixture != "probs":
        # An outcome that one teacher rules out stays ruled out, whatever the sign of its weight.
        ruled_out = [torch.isneginf(item) for item in logits]
        logits = [half_less(item, highest(item)) for item in logits]
        mixed = sum(
            torch.where(w != 0, torch.where(out, -torch.inf, w * item), torch.zeros_like(item))
            for w, item, out in zip(columns, logits, ruled_out, strict=True)
        )
        assert isinstance(mixed, Tensor)
        return log_softmax(mixed, temperature / 2)
    # A teacher of weight 0 counts nothing, be it NaN.
    rows = [torch.where(w != 0, item, torch.zeros_like(item)) for w, item in zip(columns, logits, strict=True)]
    terms = [w.log() + log_softmax(item, temperature) for w, item in zip(columns, rows, strict=True)]
    return torch.logsumexp(torch.stack(terms), 0)


def nll(log_probs: Tensor, labels: Tensor, counted: Tensor, label_smoothing: float) -> Tensor:
    """As ``cross_entropy``, of log-probabilities, which nothing normalises."""
    columns = log_probs.shape[-1]
    inside = (labels >= 0) & (labels < columns)
    picked = log_probs.gather(1, labels.clamp(0, columns - 1)[:, None]).squeeze(1)
    picked = torch.where(inside | ~counted, picked, torch.full_like(picked, float("nan")))
    of_label = -(1 - label_smoothing) * _with_a_part(picked, label_smoothing)
    return of_label - (log_probs * (label_smoothing / columns)).sum(-1) if label_smoothing else of_label


def _with_a_part(picked: Tensor, label_smoothing: float) -> Tensor:
    """The labels' logits; 0 for those of -inf where smoothing leaves the label no part, so that 0 * inf is no NaN."""
    return torch.where(torch.isneginf(picked), 0.0, picked) if label_smoothing == 1 else picked


def _of_columns(teacher: Tensor, columns: Tensor, form: str) -> Tensor:
    """The teacher's columns that the student's are compared with; nothing where there is none, and NaN out of range."""
    inside = (columns >= 0) & (columns < teacher.shape[-1])
    nothing = torch.where(columns == -1, 0.0 if form == "probs" else -torch.inf, torch.nan).to(teacher.dtype)
    picked = teacher.index_select(-1, torch.where(inside, columns, 0).long())
    return torch.where(inside, picked, nothing)


def cross_entropy(logits: Tensor, labels: Tensor, counted: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy of each row ``[N]``; NaN for a label out of range in a row that counts."""
    columns = logits.shape[-1]
    inside = (labels >= 0) & (labels < columns)
    # All relative to the largest logit: of logits of 1e4 a logsumexp less one of them would leave three digits.
    below = half_less(logits, highest(logits))
    picked = below.gather(1, labels.clamp(0, columns - 1)[:, None]).squeeze(1)
    picked = torch.where(inside | ~counted, picked, torch.full_like(picked, float("nan")))
    log_z = (2 * below).exp().sum(-1).log()
    ce = log_z - 2 * (1 - label_smoothing) * _with_a_part(picked, label_smoothing)
    return ce - (below * (2 * label_smoothing / columns)).sum(-1) if label_smoothing else ce


def dense_rows(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Optional[Tensor] = None,
    *,
    divergence: str,
    params: tuple[Union[float, Tensor], float] = (0.0, 0.0),
    temperature: PerRow = 1.0,
    teacher_temperature: PerRow = 1.0,
    scale_by_t_squared: bool = True,
    kd_weight: PerRow = 1.0,
    ce_weight: PerRow = 0.0,
    z_loss_weight: PerRow = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    teacher_form: str = "logits",
    vocab_size: Optional[int] = None,
    student_softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    standardize: bool = False,
    mixture: str = "probs",
    mixture_weights: Optional[Tensor] = None,
    teacher_lse: Optional[Tensor] = None,
    student_form: str = "logits",
    student_offsets: Optional[Tensor] = None,
    teacher_offsets: Optional[Tensor] = None,
    teacher_columns: Optional[Tensor] = None,
    stats: bool = True,
) -> DenseRows:
    """The objective of each row, by the formulas in ``kdkernels.kd_loss``.

    Args:
        student: logits ``[N, V]``. teachers: tensors ``[N, V']``; more than one needs ``mixture_weights [N, M]``.
        labels: ``[N]`` int64; rows equal to ``ignore_index`` give 0 everywhere and pass no gradient.
        temperature, teacher_temperature, params[0], the weights of terms: a float or ``[N]``.
        teacher_lse: ``[N]``, the teacher's log-normaliser where that is not the one of its logits here.
        student_offsets, teacher_offsets: added to the logits ``[V]``.
        teacher_columns: integers ``[V]``, the columns of the teacher that the student's are compared with, -1 for none.

    Returns:
        ``DenseRows``; statistics are detached, and None unless ``stats``.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if teacher_columns is not None:
        teachers = [_of_columns(teacher, teacher_columns, teacher_form) for teacher in teachers]
    columns = min([vocab_size or student.shape[-1], student.shape[-1], *(t.shape[-1] for t in teachers)])
    s = student[:, :columns].to(dtype)
    ts = [teacher[:, :columns].to(dtype) for teacher in teachers]
    counted = torch.ones(s.shape[0], dtype=torch.bool, device=s.device) if labels is None else labels != ignore_index
    # Ignored rows are replaced before any arithmetic, so that their NaN or -inf reach neither loss nor gradient.
    s = torch.where(counted[:, None], s, torch.zeros_like(s))
    ts = [torch.where(counted[:, None], t, torch.ones_like(t)) for t in ts]

    if student_offsets is not None:
        s = s + student_offsets[:columns].to(dtype)
    # Log-probabilities are taken as they are: nothing is done to their sum, nor to their gradient.
    free = student_form == "log_probs"
    capped = apply_softcap(s, student_softcap)
    tempered = _standardized(capped) if standardize else capped
    steep = divergence == "alpha_beta"
    logq = tempered if free else log_softmax(tempered, column(temperature), steep=steep)
    logp = _teacher_log_probs(
        ts,
        mixture_weights,
        mixture=mixture,
        temperature=column(teacher_temperature),
        form=teacher_form,
        softcap=teacher_softcap,
        standardize=standardize,
        steep=steep,
        lse=teacher_lse,
        offsets=None if teacher_offsets is None else teacher_offsets[:columns].to(dtype),
        missing=None if teacher_columns is None else teacher_columns[:columns] == -1,
    )

    # A loss without any term is 0, and so is its gradient, which is there.
    loss = capped[:, :0].sum(-1)
    if is_there(kd_weight):
        scale = squared(temperature) if scale_by_t_squared else 1.0
        # In a row of weight 0 the teacher may be anything; a copy of the student has no derivative that is none.
        weighed = torch.where(kd_weight[:, None] != 0, logp, logq.detach()) if isinstance(kd_weight, Tensor) else logp
        part = teacher_lse is not None
        table = divergences.PART_OF_TEACHER if part else divergences.TABLE
        d = table[divergence](weighed, logq, column(params[0]), params[1])
        if divergence in divergences.BUILT_IN and not part and not free:
            # Of two distributions none is negative: that is rounding, and has no gradient of its own.
            d = d - d.detach().clamp(max=0)
        # The derivative of a NaN need not be NaN (that of abs is 0): the gradient must show what the loss shows.
        d = d * torch.where(torch.isnan(d), d.detach(), torch.ones_like(d))
        loss = term(kd_weight, scale * d)
    # torch.logsumexp asks whether there are rows, which a graph of rows that a mask picks cannot say.
    lse = torch.logsumexp(capped, -1) if is_there(z_loss_weight) or stats else torch.zeros_like(loss)
    ce = torch.zeros_like(loss)
    if labels is not None and (is_there(ce_weight) or stats):
        ce = (nll if free else cross_entropy)(capped, labels, counted, label_smoothing)
    if is_there(ce_weight) and labels is not None:
        loss = loss + term(ce_weight, ce)
    if is_there(z_loss_weight):
        loss = loss + term(z_loss_weight, lse.square())
    zero = torch.zeros_like(loss)
    if not stats:
        return DenseRows(torch.where(counted, loss, zero))

    with torch.no_grad():
        table = divergences.TABLE
        found = [
            table[divergence](logp, logq, column(params[0]), params[1]),
            ce,
            lse,
            table["forward_kl"](logp, logq, 0, 0),
            table["reverse_kl"](logp, logq, 0, 0),
            table["soft_ce"](logp, logp, 0, 0),
            table["soft_ce"](logq, logq, 0, 0),
            (tempered.argmax(-1) == logp.argmax(-1)).to(dtype),
            torch.minimum(logp.exp(), logq.exp()).sum(-1),
        ]
        found = [torch.where(counted, item.detach(), zero) for item in found]
    return DenseRows(torch.where(counted, loss, zero), *found)


def is_there(weight: PerRow) -> bool:
    """True if a term has a weight: not the number 0."""
    return isinstance(weight, Tensor) or bool(weight)


def term(weight: PerRow, values: Tensor) -> Tensor:
    """A term's part of the losses of rows; of weight 0 it counts nothing, be it NaN."""
    if not isinstance(weight, Tensor):
        return weight * values
    counts = weight != 0
    return weight * torch.where(counts, values, torch.zeros_like(values))


def squared(temperature: PerRow) -> PerRow:
    return temperature * temperature


def dkd_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    scale_by_t_squared: bool = True,
    vocab_size: Optional[int] = None,
    ignore_index: int = -100,
) -> Tensor:
    """Decoupled distillation per row, ``[N]``: ``alpha KL(binary) + beta KL(non-target)`` (Zhao et al. 2022)."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = min(vocab_size or student.shape[-1], student.shape[-1], teacher.shape[-1])
    counted = labels != ignore_index
    s = torch.where(counted[:, None], student[:, :columns].to(dtype), torch.zeros((), dtype=dtype))
    t = torch.where(counted[:, None], teacher[:, :columns].to(dtype), torch.zeros((), dtype=dtype))
    logq, logp = log_softmax(s, temperature), log_softmax(t, teacher_temperature)
    target = torch.zeros_like(s, dtype=torch.bool).scatter_(1, labels.clamp(0, max(columns - 1, 0))[:, None], True)
    minus_inf = torch.full_like(s, float("-inf"))

    def binary(log_probs: Tensor) -> Tensor:
        rest = torch.logsumexp(torch.where(target, minus_inf, log_probs), -1)
        return torch.stack([log_probs.masked_fill(~target, 0.0).sum(-1), rest], -1)

    hat_q = log_softmax(torch.where(target, minus_inf, s), temperature) if columns > 1 else torch.zeros_like(s)
    hat_p = log_softmax(torch.where(target, minus_inf, t), teacher_temperature) if columns > 1 else torch.zeros_like(s)
    scale = temperature**2 if scale_by_t_squared else 1.0
    # A loss without any term is 0, and so is its gradient, which is there.
    loss = s[:, :0].sum(-1)
    if alpha:
        loss = loss + scale * alpha * divergences.TABLE["forward_kl"](binary(logp), binary(logq), 0, 0)
    if beta:
        loss = loss + scale * beta * divergences.TABLE["forward_kl"](hat_p, hat_q, 0, 0)
    return torch.where(counted, loss, torch.zeros_like(loss))


def mse_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    *,
    centered: bool = False,
    vocab_size: Optional[int] = None,
    ignore_index: int = -100,
) -> Tensor:
    """Mean over the vocabulary of the squared difference of logits, ``[N]``, less its row mean if ``centered``."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = min(vocab_size or student.shape[-1], student.shape[-1], teacher.shape[-1])
    difference = student[:, :columns].to(dtype) - teacher[:, :columns].to(dtype)
    counted = torch.ones(student.shape[0], dtype=torch.bool) if labels is None else labels != ignore_index
    counted = counted.to(student.device)
    difference = torch.where(counted[:, None], difference, torch.zeros_like(difference))
    if centered:
        difference = difference - difference.mean(-1, keepdim=True)
    return difference.square().mean(-1)
