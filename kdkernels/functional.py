"""The public losses of logits: their documentation, the checks of their tensors, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, overload

import torch
from torch import Tensor

from kdkernels import backends, checks, distributed, symbols
from kdkernels.autograd import evaluate
from kdkernels.launch import (
    Launch,
    dense_launch,
    dual,
    row_tensors,
    topk_launch,
    why_temperatures_learn,
    with_stats,
    without_teacher,
)
from kdkernels.objective import (
    DKDObjective,
    LKObjective,
    MSEObjective,
    Objective,
    PerRow,
    TAIDObjective,
    TopKObjective,
    ULDObjective,
    takes,
)
from kdkernels.reduction import num_rows
from kdkernels.stats import KDStats, TopKStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.options import (
        DKDOptions,
        LKOptions,
        MSEOptions,
        ObjectiveOptions,
        TAIDOptions,
        TopKOptions,
        ULDOptions,
    )

Teachers = Union[Tensor, Sequence[Tensor], None]


@overload
def kd_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Tensor] = None,
    teacher_columns: Optional[Tensor] = None,
    return_stats: Literal[False] = False,
    **options: Unpack[ObjectiveOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Tensor] = None,
    teacher_columns: Optional[Tensor] = None,
    return_stats: Literal[True],
    **options: Unpack[ObjectiveOptions],
) -> tuple[Tensor, KDStats]: ...
@overload
def kd_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Tensor] = None,
    teacher_columns: Optional[Tensor] = None,
    return_stats: bool,
    **options: Unpack[ObjectiveOptions],
) -> Union[Tensor, tuple[Tensor, KDStats]]: ...
@takes(Objective)
def kd_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Tensor] = None,
    teacher_columns: Optional[Tensor] = None,
    **options: Any,
) -> Any:
    r"""Distillation loss between the tempered distributions of a student and a teacher, with its gradient in one pass.

    With ``p = softmax(t / T_t)``, ``q = softmax(s / T)``, the weight of a row ``w_i`` and ``lse = logsumexp(s)``::

        loss_i = w_i (kd_weight T^2 D(p, q) + ce_weight CE(s, label) + z_loss_weight lse^2)
        CE     = lse - (1 - label_smoothing) s[label] - label_smoothing mean_v(s_v)

    so that ``kd_loss(s, t, temperature=T, reduction="batchmean")`` equals
    ``F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T * T``.

    Args:
        student: logits ``(..., V)``, float32, bfloat16 or float16 (float64 on the CPU). Any strides with stride 1 in
            the last dimension; nothing is copied. As they come from the model: no softmax, not divided by T.
        teacher: logits of the same leading shape, device and width; its dtype may differ. When it requires grad it gets
            its gradient too. A sequence of 1 to 4 tensors is a mixture of teachers, see ``teacher_weights``. None where
            ``kd_weight`` is the number 0: cross entropy and z-loss alone.
        labels: int64 or int32 of the leading shape: the classes for ``ce_weight``, and the mask: rows equal to
            ``ignore_index`` give loss 0 and gradient 0, and their logits are not read.
        divergence: a name from ``kdkernels.divergences.names()`` (its default parameters) or an instance such as
            ``JSD(0.3)``.
        temperature: T of the student, > 0, a number or one value per row. A tensor that requires grad (CTKD, Li et al.
            2022, arXiv:2211.16231) gets its gradient from plain PyTorch, which "auto" takes then.
        teacher_temperature: T_t, by default ``temperature``.
        scale_by_t_squared: multiply the divergence by ``temperature**2`` (Hinton et al. 2015), in loss and gradient.
        kd_weight, ce_weight, z_loss_weight: weights of the three terms, >= 0, each a number or one value per row: a
            row's term of weight 0 counts nothing. Cross entropy and z-loss (PaLM, Chowdhery et al. 2022) are taken at
            temperature 1.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        ignore_index: the label of rows that do not count.
        row_weight: a number or one value per row that multiplies the row's loss; it does not enter the denominator. A
            weight of 0 is a factor as any other: NaN and infinity stay, and rows that hold them are masked by
            ``labels``.
        reduction: "none" (the shape of the rows), "sum", "mean" (over the rows that count; 0 when there is none), or
            "batchmean" (the sum over ``student.shape[0]``, as ``F.kl_div``).
        normalizer: a number or 0-d tensor > 0 that divides the sum in place of the number of rows ("mean") or of 1
            ("sum"): the tokens of a whole batch under gradient accumulation (``num_items_in_batch``).
        teacher_form: what ``teacher`` holds: "logits", "log_probs" (log-probabilities; a temperature acts on them as on
            logits, and like those they are normalised, so that a constant per row changes nothing), "probs" (rows
            that add up to 1 within the rounding of their dtype) or "unnormalized_probs" (weights >= 0, divided by their
            sum).
        teacher_weights: for a sequence of teachers, M weights, or a tensor ``(..., M)`` of weights per row; equal
            weights by default. None is below 0 but for ``mixture="logits"``.
        mixture: "probs" (``p = sum_k w_k softmax(t_k / T_t)``, the weights divided by their sum) or "logits"
            (``p = softmax(sum_k w_k t_k / T_t)``, the weights as they are given, which may be of any sign and sum:
            contrastive targets such as ``(1, a, -a)``). A column where a teacher whose weight is not 0 has -inf has
            probability 0, whatever the sign, and a teacher of weight 0 counts nothing.
        vocab_size: columns from there on are padding: no probability, gradient 0. Student and teacher may then be
            padded to different widths.
        student_softcap, teacher_softcap: cap > 0 of ``cap * tanh(logits / cap)``, applied first (Gemma 2).
            Probabilities of a teacher have none.
        student_bias, teacher_bias: ``[V]``, one number for each column, added to the logits of every row before the
            softcap (DINO's centre is ``teacher_bias=-center``, logit adjustment ``student_bias=log prior``). The
            student's gets a gradient where it requires one: the sums of the columns of the logits' gradient as it is
            rounded, in a fixed order, for one more read of it; the teacher's gets none.
        teacher_columns: int64 or int32 ``[V]``: column v of the student is compared with the teacher's column
            ``teacher_columns[v]``, or with none (-1: ``p = 0``). The teacher may then have any width: a draft
            vocabulary, an extended or a permuted one. ``p`` is normalised over the columns that are named, as
            ``teacher[..., teacher_columns]`` would be; ``teacher_bias`` belongs to the student's columns. The
            divergences that are infinite at ``p = 0`` are so in a row with such a column. Of -1 beside a
            ``teacher_softcap`` there is no kernel, but for backend "torch".
        student_form: what ``student`` holds: "logits", or "log_probs", log-probabilities that are themselves the leaf,
            as users of ``F.kl_div`` have them: ``q = exp(x)`` of each x by itself, nothing is normalised, and the
            gradient of D is ``df/dlogq`` (of forward KL ``-p``), without the part ``- q sum(df/dlogq)`` that a softmax
            adds. ``CE = -(1 - label_smoothing) x[label] - label_smoothing mean_v(x_v)``, as ``F.nll_loss``. They have
            been taken at a temperature already: ``temperature`` must be 1, the teacher's is ``teacher_temperature``,
            and T^2 goes into ``kd_weight``. No z-loss, softcap, standardize and ``student_bias``. D may be negative
            where the x are no log-probabilities. A teacher gets a gradient from backend "torch" only.
        dim: the dimension of the classes, in all tensors of logits; labels and other values of rows have the remaining
            ones. Where the classes of ``(B, C, *spatial)`` lie next to each other, as in ``channels_last``, this is a
            view and costs nothing. Where the rows do, as in a contiguous tensor, ``dim=1`` has a kernel of its own
            (CPU and Triton): no copy is made, and the gradient is laid out as the student. Of other layouts nothing is
            copied silently: they are an error that says what to pass.
        standardize: replace the logits of both in the divergence by ``(x - mean(x)) / std(x)`` per row before the
            temperature (logit standardisation, Sun et al. 2024, arXiv:2403.01427), with ``torch.std``, which divides by
            V - 1, as the authors' code has it. Cross entropy keeps the raw logits. Neither it nor a mixture of teachers
            nor ``teacher_lse`` goes with a bias, ``teacher_columns``, log-probabilities of a student, or rows next to
            each other, but for backend "torch".
        teacher_lse: the teacher's log-normaliser, where that is not the logsumexp of the columns given: a number or
            one value per row, of ``t / T_t`` over all columns that the teacher has. Then ``p_v = exp(t_v / T_t -
            teacher_lse)``, whose sum P may be below 1, as where the student has a part of the teacher's vocabulary.
            For "forward_kl" and "soft_ce", summed over the columns given, with the gradient ``(P q - p) / T``, and for
            "tvd", ``1 - sum min(p, q)`` then: outcomes that are not here have no mass of the student's. A teacher's row
            of -inf alone has all of its mass elsewhere: ``p = 0``, and no gradient. Other divergences, mixtures,
            ``standardize`` and statistics do not go with it.
        row_param: one value per row for the divergence's parameter (JSD's ``beta``, the skew forms' ``alpha``,
            ``MixedKL``'s ``reverse``), strictly between 0 and 1, but that ``reverse`` may be 0 and 1; overrides the
            instance's.
        inplace: write the gradient over the student's logits: no ``[N, V]`` allocation at all, and the logits are gone
            after the call. Eager only; needs a student that requires grad, whose rows share no memory. A teacher may
            be the student's own rows, one for one; any other memory in common with a tensor of the call is an error.
            Under ``torch.no_grad()`` there is no gradient, and the logits stay.
        process_group: the ranks of a vocabulary that is sharded: each has some columns of the logits, in the order of
            the ranks, and all have the same loss. Labels and ``vocab_size`` are those of the whole vocabulary.
        return_stats: also return ``KDStats``.
        backend: "auto", "triton", "cuda" (C++, where it was built; by name only), "cpu" (C++) or "torch" (plain
            PyTorch, the reference).

    Returns:
        The loss: 0-d, or the shape of the rows for "none"; float32 for float32 and 16-bit students, float64 for
        float64. With ``return_stats`` a pair ``(loss, KDStats)``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched. Values inside tensors are read on the
            CPU always, on a GPU only when ``KDKERNELS_DEBUG=1``.

    Example:
        >>> student, teacher = torch.zeros(2, 4, requires_grad=True), torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 9.0]])
        >>> loss = kd_loss(student, teacher, temperature=2.0, divergence="forward_kl")
        >>> loss.backward()
        >>> round(loss.item(), 3), student.grad.argmin(-1).tolist()
        (4.834, [0, 3])
    """
    if student_bias is None and teacher_bias is None and teacher_columns is None:
        return dense(Objective.of(options), student, teacher, labels)
    of_columns = (student_bias, teacher_bias, teacher_columns)
    return dense(Objective.of(options), student, teacher, labels, of_columns)


@overload
def topk_kd_loss(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    tail_logprob: Optional[Tensor] = None,
    return_stats: Literal[False] = False,
    **options: Unpack[TopKOptions],
) -> Tensor: ...
@overload
def topk_kd_loss(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    tail_logprob: Optional[Tensor] = None,
    return_stats: Literal[True],
    **options: Unpack[TopKOptions],
) -> tuple[Tensor, TopKStats]: ...
@overload
def topk_kd_loss(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    tail_logprob: Optional[Tensor] = None,
    return_stats: bool,
    **options: Unpack[TopKOptions],
) -> Union[Tensor, tuple[Tensor, TopKStats]]: ...
@takes(TopKObjective)
def topk_kd_loss(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    tail_logprob: Optional[Tensor] = None,
    **options: Any,
) -> Any:
    r"""Distillation from a teacher of which only K ids and log-probabilities a row are known.

    The objective is that of ``kd_loss``: ``loss_i = w_i (kd_weight T^2 D + ce_weight CE + z_loss_weight lse^2)``. With
    ``q = softmax(s / T)`` over the V columns, ``P`` the given probabilities, ``S`` the set of their ids and ``m`` their
    sum, ``D = sum f(p, q)`` is taken over the outcomes of ``tail``::

        tail                teacher p                                student q             outcomes
        "bucket"            P on S, max(0, 1 - m) in the bucket      1 - sum_S q there     S and a bucket of all others
        "renormalize"       P / m on S, 0 elsewhere                  q                     all V
        "renormalize_both"  P / m on S                               q / sum_S q           S
        "uniform"           P on S, (1 - m) / (V - |S|) elsewhere    q                     all V
        "drop"              P on S, 0 elsewhere                      q                     all V

    The student's masses are exact in loss and gradient however small they are. Where S is the whole vocabulary there is
    no bucket, and no other id to spread mass over. A mass m above 1 leaves nothing to the tail, and "uniform" scales it
    back to 1. With "drop" p need not sum to 1: ``sum p (log p - log q)`` may then be negative; it
    is an unbiased estimate where the P are the weights of sampled ids (random sampling KD, Anshumann et al. 2025,
    arXiv:2503.16870).

    Where the teacher has probability 0 (outside S with "renormalize" and "drop", or in an empty tail) forward KL, soft
    cross entropy and skew KL have no term; JSD, TVD, skew reverse KL, and alpha-beta with ``alpha > 0`` and
    ``alpha + beta > 0`` have one in q alone; reverse KL, Jeffreys and the other alpha-beta divergences are infinite:
    with "renormalize" and "drop" they are refused, and for them the tail of "bucket" and "uniform" has at least the
    probability ``min_tail``. For the others an empty tail is empty, and ``min_tail`` changes nothing.

    A row without entries, as padding is, is all tail, whatever ``tail_logprob`` says there: "bucket" gives 0 with no
    gradient, "uniform" has the uniform teacher (mask such rows by ``labels`` or ``row_weight`` where they are padding),
    and "drop" has p = 0. "renormalize" and "renormalize_both" have no teacher there and give ``D = 0`` with no
    gradient.

    Args:
        student: logits ``(..., V)``, as in ``kd_loss``.
        teacher_ids: int32 or int64 ``(..., K)`` with the student's leading shape, in any order. A slot whose id is -1,
            or whose log-probability is -9000 or less, is unused, so that rows may have fewer entries; what else stands
            there is not looked at. (Collators and servers put -inf, -1e9 or -9999 where they have none.) An id given
            twice counts once, with the sum of its probabilities.
        teacher_logprobs: natural log-probabilities ``(..., K)``, float32, bfloat16, float16 or float64. They get no
            gradient. One above 0 by more than rounding (1e-3, and 16 epsilons of a 16-bit dtype) is refused; with
            "drop", whose weights may be above 1, it is not.
        labels: as in ``kd_loss``: the classes for ``ce_weight``, and the mask.
        tail: see above.
        tail_logprob: for "bucket" and "uniform", the log of the teacher's mass outside S, of the shape of the rows,
            which replaces ``1 - m``: exact however small it is, and free of the rounding of 16-bit log-probabilities.
            ``capture_topk`` returns it. It gets no gradient.
        min_tail: for "bucket" and "uniform", with a divergence that is infinite at p = 0: the least probability of the
            tail, in [0, 1]. Log-probabilities are rounded, so that ``1 - m`` is off by a little, and often 0 where the
            teacher is sure: reverse KL would be infinite. By default the floor is what that rounding may be,
            ``eps32 + eps / 2 * sum P |log P|`` with eps of the dtype of ``teacher_logprobs`` and eps32 = 1.2e-7 of the
            float32 softmax that they come from (float64: 2.2e-16); of a ``tail_logprob``, which is exact, nothing. A
            number holds for both. Log-probabilities with 4 decimals need ``min_tail=5e-5``; 0 gives the limit, ``inf``.
        divergence: a name or an instance, as in ``kd_loss``.
        temperature: T of the student, > 0, a number or one value per row. By itself it does nothing to the teacher.
        teacher_temperature: T_t, applied to the teacher as it was given; by default ``temperature``. With a teacher
            taken at temperature 1, ``p`` on S becomes proportional to ``P^(1 / T_t)``. For "renormalize" and
            "renormalize_both" that is exactly the teacher at T_t, given S; "uniform" raises each of its ``V - |S|``
            equal probabilities to ``1 / T_t`` as well. With "bucket" and "drop" the mass outside S at T_t cannot be
            known, and T_t must be 1: take the log-probabilities at the temperature of the loss, and pass
            ``teacher_temperature=1.0``.
        scale_by_t_squared, kd_weight, ce_weight, z_loss_weight, label_smoothing, ignore_index: as in ``kd_loss``.
        row_weight, reduction, normalizer, vocab_size, student_softcap, row_param, inplace: as in ``kd_loss``.
        return_stats: also return ``TopKStats``.
        backend: "auto", "cuda" (C++, where it was built), "triton", "cpu" (C++) or "torch" (plain PyTorch, the
            reference).

    Returns:
        The loss: 0-d, or the shape of the rows for "none"; float32 for float32 and 16-bit students, float64 for
        float64. With ``return_stats`` a pair ``(loss, TopKStats)``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched. Values inside tensors are read on the
            CPU always, on a GPU only when ``KDKERNELS_DEBUG=1``; the row of an id out of range that was not seen gives
            NaN.

    Example:
        >>> ids, logprobs = torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.3]]).log()
        >>> round(topk_kd_loss(torch.zeros(1, 10), ids, logprobs).item(), 3)
        1.197
    """
    objective = TopKObjective.of(options)
    return topk(objective, student, teacher_ids, teacher_logprobs, labels, tail_logprob=tail_logprob)


@overload
def taid_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    *,
    interpolation: PerRow,
    return_stats: Literal[False] = False,
    **options: Unpack[TAIDOptions],
) -> Tensor: ...
@overload
def taid_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    *,
    interpolation: PerRow,
    return_stats: Literal[True],
    **options: Unpack[TAIDOptions],
) -> tuple[Tensor, KDStats]: ...
@overload
def taid_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    *,
    interpolation: PerRow,
    return_stats: bool,
    **options: Unpack[TAIDOptions],
) -> Union[Tensor, tuple[Tensor, KDStats]]: ...
@takes(TAIDObjective)
def taid_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    **options: Any,
) -> Any:
    r"""Distillation towards a teacher interpolated with the student (TAID, Shing et al. 2025, arXiv:2501.16937).

    The target is ``softmax(((1 - lam) stop_gradient(s) + lam t) / T)`` with ``lam = interpolation``; the objective
    around it is that of ``kd_loss``.

    Args:
        student: logits ``(..., V)``, as in ``kd_loss``.
        teacher: logits of the same leading shape, device and width; its dtype may differ. When it requires grad it gets
            its gradient too, from plain PyTorch only.
        labels: as in ``kd_loss``: the classes for ``ce_weight``, and the mask.
        interpolation: lam in [0, 1], a number or one value per row: 0 is the student itself, 1 the teacher.
        options: the other keyword arguments of ``kd_loss``, but for ``teacher_temperature``, ``teacher_form``,
            ``teacher_weights``, ``mixture``, ``teacher_lse``, ``student_form`` and ``dim``.

    Returns:
        As ``kd_loss``.

    Raises:
        TypeError, ValueError: as ``kd_loss``; also for ``teacher_temperature``, ``teacher_form``, ``teacher_weights``,
            ``mixture``, ``teacher_lse``, ``student_form`` and ``dim``, which have no meaning here.

    Example:
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[4.0, 2, 0, 0]])
        >>> taid_loss(student, teacher, interpolation=0.0).item()  # the student itself is the target
        0.0
    """
    return taid(TAIDObjective.of(options), student, teacher, labels)


@overload
def lk_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LKOptions],
) -> Tensor: ...
@overload
def lk_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LKOptions],
) -> tuple[Tensor, KDStats]: ...
@overload
def lk_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    *,
    return_stats: bool,
    **options: Unpack[LKOptions],
) -> Union[Tensor, tuple[Tensor, KDStats]]: ...
@takes(LKObjective)
def lk_loss(
    student: Tensor,
    teacher: Teachers = None,
    labels: Optional[Tensor] = None,
    **options: Any,
) -> Any:
    r"""Loss of a drafter by the rate at which its tokens are accepted (Samarin et al. 2026, arXiv:2602.23881).

    With ``p = softmax(t / T_t)``, ``q = softmax(s / T)`` and the acceptance rate ``A = sum min(p, q) = 1 - TVD(p, q)``
    of a row, the objective is that of ``kd_loss`` with, in place of a divergence::

        "nla"       -log max(A, eps)                       gradient -dA / max(A, eps)
        "hybrid"    w KL(p || q) + (1 - w) (1 - A)         w = exp(-eta A) of the row, without a gradient

    Args:
        student: the drafter's logits ``(..., V)``, as in ``kd_loss``.
        teacher: the target model's, as in ``kd_loss``. It gets a gradient from plain PyTorch only. Where the drafter
            has a part of its vocabulary, ``teacher_lse`` makes ``A`` the true rate of all of it.
        labels: as in ``kd_loss``: the classes for ``ce_weight``, and the mask.
        kind: "nla", the negative log acceptance, or "hybrid".
        eta: of "hybrid", >= 0: 0 is forward KL; a drafter that is accepted often goes over to TVD.
        eps: of "nla", in (0, 1]: the least rate that the logarithm sees. The gradient does not end there: it is
            that of ``-A / eps``.
        options: the other keyword arguments of ``kd_loss``, but for ``divergence``, ``row_param``, ``student_form``,
            ``dim``, and the biases and ``teacher_columns``, which have one number for each column.
            Weights of positions, as drafters have them, are ``row_weight``. Of a draft vocabulary give
            ``teacher[..., columns]``, or the rows of the teacher's head, and ``teacher_lse``.

    Returns:
        As ``kd_loss``; ``KDStats.divergence`` is what stands in the place of the divergence, and ``acceptance`` is A.

    Raises:
        TypeError, ValueError: as ``kd_loss``; also for an ``eta`` of "nla" and an ``eps`` of "hybrid".

    The formulas and defaults are those of ``vllm-project/speculators``, which takes eta = 3 and eps = 1e-5; there a row
    with A below eps has no gradient.

    Example:
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[2.0, 1, 0, 0]])
        >>> round(lk_loss(student, teacher).item(), 3)  # -log sum min(p, q)
        0.447
    """
    return dense(LKObjective.of(options), student, teacher, labels)


@takes(DKDObjective)
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    **options: Unpack[DKDOptions],
) -> Tensor:
    r"""Decoupled knowledge distillation ``T^2 (alpha TCKD + beta NCKD)`` (Zhao et al. 2022, arXiv:2203.08679).

    ``TCKD = KL`` of the two-way distributions (label, all others) and ``NCKD = KL(p^ || q^)`` of the distributions
    over the other classes, ``p^_v = p_v / (1 - p_label)``.

    Args:
        student: logits ``(..., V)``, as in ``kd_loss``.
        teacher: logits of the same leading shape, device and width, which must not require grad; its dtype may differ.
        labels: int64 or int32 of the leading shape, required: the class that is split off. Rows equal to
            ``ignore_index`` give loss 0 and gradient 0, and their logits are not read.
        alpha: weight of TCKD, a number >= 0.
        beta: weight of NCKD, a number >= 0.
        temperature: T of the student, > 0, one number for all rows.
        teacher_temperature: T of the teacher, one number, by default ``temperature``.
        scale_by_t_squared: multiply the loss by ``temperature**2``.
        ignore_index, row_weight, reduction, normalizer, vocab_size, inplace, process_group: as in ``kd_loss``.
        backend: "auto", "triton", "cpu" (C++) or "torch" (plain PyTorch, the reference).

    Returns:
        The loss: 0-d, or the shape of the rows for "none"; float32 for float32 and 16-bit students, float64 for
        float64.

    Raises:
        TypeError, ValueError: as ``kd_loss``.

    Example:
        >>> student, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[4.0, 2, 0, 0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0).backward()
        >>> student.grad.argmin().item()  # the second class, which the teacher prefers among the others
        1
    """
    if labels is None:
        raise TypeError("labels are required by dkd_loss")
    return pair("dkd_fwd", DKDObjective.of(options), student, teacher, labels)


@takes(MSEObjective)
def logit_mse_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    **options: Unpack[MSEOptions],
) -> Tensor:
    r"""Squared difference of logits, ``mean_v (s_v - t_v)^2`` per row (Ba & Caruana 2014, arXiv:1312.6184).

    With no mask and "mean" it equals ``F.mse_loss(student, teacher)``.

    Args:
        student: logits ``(..., V)``, as in ``kd_loss``.
        teacher: logits of the same leading shape, device and width, which must not require grad; its dtype may differ.
        labels: int64 or int32 of the leading shape; only a mask: rows equal to ``ignore_index`` give loss 0 and
            gradient 0.
        centered: subtract the row mean of ``s - t`` first: the loss is then blind to a constant shift of the logits, as
            softmax is (Kim et al. 2021, arXiv:2105.08919).
        ignore_index, row_weight, reduction, normalizer, inplace, process_group: as in ``kd_loss``.
        vocab_size: as in ``kd_loss``; the mean is over the columns below it.
        backend: "auto", "triton", "cpu" (C++) or "torch" (plain PyTorch, the reference).

    Returns:
        The loss: 0-d, or the shape of the rows for "none"; float32 for float32 and 16-bit students, float64 for
        float64.

    Raises:
        TypeError, ValueError: as ``kd_loss``.

    Example:
        >>> logit_mse_loss(torch.zeros(1, 4), torch.tensor([[2.0, 0, 0, 0]])).item()
        1.0
    """
    return pair("mse_fwd", MSEObjective.of(options), student, teacher, labels)


@takes(ULDObjective)
def uld_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    **options: Unpack[ULDOptions],
) -> Tensor:
    r"""Universal logit distillation: the distance of the two distributions with their tokens forgotten.

    With ``q = softmax(s / T)`` and ``p = softmax(t / T_t)``, each in descending order, and 0 where the smaller
    vocabulary has ended::

        loss = sum_r |q_(r) - p_(r)|          dloss/ds_v = q_v / T (e_v - sum_u q_u e_u)

    ``e_v`` is the sign of ``q_(r) - p_(r)`` at the rank of column v, 0 where they are equal but for rounding (64
    epsilons of q in the dtype of the sums: logits that differ by a constant have no gradient); columns of one logit
    have the mean sign of their ranks, so that it does not matter in which order a sort would leave them. The
    vocabularies need not have one token in common, nor one size. Which rows belong together is the caller's to say: see
    ``kdkernels.alignment``.

    The kernels sort nothing: they count the columns by the bits of a 16-bit logit, and go over the values that a row
    has, some thousands. That is exact. On a CPU fp32 logits are counted in bins of T / 256 unless ``exact``: the loss
    is then off by less than 0.004, by some 1e-5 as a rule and 5e-4 where the models are within 1 % of each other, and
    logits closer to each other than T / 256 may share a sign as equal ones do.

    Args:
        student: logits ``(..., V)``, as in ``kd_loss``.
        teacher: logits ``(..., V_t)`` of the same leading shape and device, which must not require grad; its width and
            dtype may differ.
        labels: int64 or int32 of the leading shape; only a mask: rows equal to ``ignore_index`` give loss 0 and
            gradient 0, and their logits are not read.
        temperature: T > 0 of the student, a number or one value per row.
        teacher_temperature: T_t > 0, by default ``temperature``.
        ignore_index, row_weight, reduction, normalizer, inplace: as in ``kd_loss``.
        vocab_size: columns of the student from there on are padding: no probability, gradient 0.
        teacher_vocab_size: the same of the teacher's.
        exact: sort logits in fp32 instead, at about four times the time. 16-bit logits, float64 and the "torch"
            backend are exact anyway.
        backend: "auto", "triton" (16-bit logits; it takes half a MB and 8 bytes a column for each multiprocessor),
            "cpu" (C++) or "torch" (plain PyTorch, two sorts: on a GPU for logits in fp32).

    Returns:
        The loss, from 0 to 2 a row: 0-d, or the shape of the rows for "none"; float32 for float32 and 16-bit students,
        float64 for float64. A row of either model with NaN or +inf, or of -inf only, gives NaN.

    Raises:
        TypeError, ValueError: as ``kd_loss``.

    Example:
        A teacher of another tokenizer, on the positions where both texts' tokens end together::

            loss = kd.uld_loss(logits[own_ends], teacher_logits[teacher_ends])

        Tokens are forgotten:

        >>> uld_loss(torch.tensor([[0.0, 2, 1]]), torch.tensor([[2.0, 1, 0]])).item()
        0.0

    Reference:
        Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        arXiv:2402.12030.
    """
    return pair("uld_fwd", ULDObjective.of(options), student, teacher, labels)


def dense(
    objective: Objective,
    student: Any,
    teacher: Any,
    labels: Any = None,
    of_columns: Optional[tuple[Any, Any, Any]] = None,
) -> Any:
    """``kd_loss`` of an objective; ``of_columns`` are its biases and ``teacher_columns``, if one of them is there."""
    tensors = (student, teacher, labels, objective.teacher_weights, *objective.tensors)
    if distributed.among(tensors if of_columns is None else (*tensors, *of_columns)):
        options = {"teacher": teacher, "labels": labels, **objective.given()}
        checks.not_sharded(objective, dict(zip(_OF_COLUMNS, of_columns or (), strict=False)))
        loss = lk_loss if isinstance(objective, LKObjective) else kd_loss
        return distributed.of_all_ranks(loss, student, options)
    if objective.process_group is not None:
        from kdkernels.parallel.dense import kd_loss as of_shards

        return of_shards(objective, student, teacher, labels, of_columns or ())
    class_dim, strided = -1, False
    if objective.dim != -1:
        class_dim = checks.class_dimension(objective, student)
    if class_dim != -1:
        student, teacher, strided = _classes_last(objective, class_dim, student, teacher)
    columns = checks.student_of(objective, student, strided=strided)
    weights: Optional[Tensor] = None
    teachers: tuple[Tensor, ...]
    if teacher is None:
        checks.without_teacher(objective)
        teachers = (student.detach(),)
    else:
        mapped = of_columns is not None and of_columns[2] is not None
        if isinstance(teacher, Tensor) and objective.teacher_weights is None:
            # The common case in few steps.
            mappable = objective.function == "kd_loss"
            checks.teacher_like(
                "teacher", teacher, student, objective.vocab_size, strided=strided, mapped=mapped, mappable=mappable
            )
            teachers = (teacher,)
        else:
            teachers = checks.teachers_of(objective, teacher, student, strided=strided, mapped=mapped)
            single = not isinstance(teacher, (list, tuple))
            weights = checks.mixture_weights(objective, len(teachers), student, single=single)
    shared: dict[str, Tensor] = {}
    if of_columns is not None:
        given_teachers = () if teacher is None else teachers
        shared = checks.of_columns(objective, student, given_teachers, columns, *of_columns)
    if objective.inplace:
        others = dict(zip(("labels", *_OF_COLUMNS), (labels, *(of_columns or (None,) * 3)), strict=True))
        checks.apart_in_place(objective, student, others, teachers)
    mixture = objective.mixture if weights is None else checks.mixture_of(objective)
    dim = class_dim if strided else -1
    found = _dense(objective, student, teachers, labels, columns, weights, mixture, teachers, shared, dim)
    return without_teacher(found) if teacher is None else found


def _classes_last(objective: Objective, dim: int, student: Any, teacher: Any) -> tuple[Any, Any, bool]:
    """Views whose classes come last, and whether it is the rows that lie next to each other."""
    several = teacher if isinstance(teacher, (list, tuple)) else () if teacher is None else (teacher,)
    names = ["teacher"] if len(several) == 1 else [f"teacher[{k}]" for k in range(len(several))]
    for name, item in zip(names, several, strict=True):
        checks.same_dims(name, item, student, dim)
    tensors = [("student", student), *zip(names, several, strict=True)]
    if student.numel() == 0:
        # Without a row there is nothing to copy.
        views = (item.movedim(dim, -1) for _, item in tensors)
        strided, (student, *moved) = False, [x.clone(memory_format=torch.contiguous_format) for x in views]
    else:
        strided = checks.rows_are_neighbours(dim, tensors, objective.backend)
        student, *moved = (item.movedim(dim, -1) for _, item in tensors)
    return student, moved if isinstance(teacher, (list, tuple)) else next(iter(moved), None), strided


def taid(objective: TAIDObjective, student: Any, teacher: Any, labels: Any = None) -> Any:
    """``taid_loss`` of an objective: a mixture of logits, one of them the student's own."""
    if distributed.among((student, teacher, labels, *objective.tensors)):
        return distributed.of_all_ranks(taid_loss, student, {"teacher": teacher, "labels": labels, **objective.given()})
    if objective.process_group is not None:
        from kdkernels.parallel.dense import taid_loss as of_shards

        return of_shards(objective, student, teacher, labels)
    columns = checks.student_of(objective, student)
    checks.teacher_like("teacher", teacher, student, objective.vocab_size)
    share = checks.per_row("interpolation", objective.interpolation, student, low=0.0, high=1.0, exclusive=False)
    if not isinstance(share, Tensor):
        share = symbols.as_tensor(share, checks.sum_dtype(student), student.device)
    weights = torch.stack([1 - share, share], -1).expand(num_rows(student), 2)
    checks.apart_in_place(objective, student, {"labels": labels}, (teacher,))
    teachers = (student.detach(), teacher)
    return _dense(objective, student, teachers, labels, columns, weights, "logits", (teacher,))


def _dense(
    objective: Objective,
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Any,
    columns: int,
    weights: Optional[Tensor],
    mixture: str,
    given: tuple[Tensor, ...],
    of_columns: Optional[dict[str, Tensor]] = None,
    class_dim: int = -1,
) -> Any:
    """``given`` are the teachers of the call itself; ``of_columns`` the tensors ``launch.OF_COLUMNS`` that it has.

    ``class_dim`` is where the classes stood, if the rows lie next to each other.
    """
    of_columns, mixed = of_columns or {}, weights is not None
    changed: list[str] = []
    if of_columns or class_dim != -1 or objective.student_form != "logits":
        changed = checks.changes_of_reading(objective, of_columns, class_dim, mixed=mixed)
    learns = teachers[0].requires_grad or (mixed and any(teacher.requires_grad for teacher in teachers))
    teacher_grad = learns and torch.is_grad_enabled()
    mapped = "teacher_columns" in of_columns
    torch_only = checks.why_no_teacher_grad(objective, mixed=mixed, mapped=mapped) if teacher_grad else None
    if len(objective.tensors):
        torch_only = torch_only or why_temperatures_learn(objective)
    cuda_lacks = None
    if objective.backend == "cuda":
        cuda_lacks = backends.cuda.lacks_dense(objective, student, teachers, mixed=mixed, changed=changed)
    backend = backends.choose(
        objective.backend,
        student,
        divergence=objective.resolved.name,
        torch_only=torch_only,
        cuda_lacks=cuda_lacks,
        pattern="dense_fwd" if class_dim == -1 else "pixel_fwd",
    )
    checks.reverse_mode_only(backend, student, *given, labels, *of_columns.values(), *objective.tensors)
    launch = dense_launch(
        objective, student, labels, columns, backend, weights, mixture, of_columns, class_dim, learns=backend == "torch"
    )
    checks.probabilities(objective, teachers, columns, launch.rows.labels, launch.rows.row_weight)
    if objective.student_form == "log_probs":
        checks.no_probabilities("student", student, columns)
    swapped = dual(launch, objective, teachers[0]) if teacher_grad and backend != "torch" else None
    return with_stats(*evaluate(launch, objective, student, teachers, swapped), student, KDStats)


_OF_COLUMNS = ("student_bias", "teacher_bias", "teacher_columns")


def topk(
    objective: TopKObjective, student: Any, ids: Any, logprobs: Any, labels: Any = None, *, tail_logprob: Any = None
) -> Any:
    """``topk_kd_loss`` of an objective."""
    if distributed.among((student, ids, logprobs, labels, tail_logprob, *objective.tensors)):
        tensors = {"teacher_ids": ids, "teacher_logprobs": logprobs, "labels": labels, "tail_logprob": tail_logprob}
        return distributed.of_all_ranks(topk_kd_loss, student, {**tensors, **objective.given()})
    if objective.process_group is not None:
        from kdkernels.parallel.topk import topk_kd_loss as of_shards

        return of_shards(objective, student, ids, logprobs, labels, tail_logprob)
    columns = checks.student_of(objective, student)
    launch = topk_launch(objective, student, (ids, logprobs), labels, tail_logprob, columns)
    checks.reverse_mode_only(launch.backend, student, ids, logprobs, labels, tail_logprob, *objective.tensors)
    others = {"teacher_ids": ids, "teacher_logprobs": logprobs, "labels": labels, "tail_logprob": tail_logprob}
    checks.apart_in_place(objective, student, others)
    return with_stats(*evaluate(launch, objective, student, ()), student, TopKStats)


def pair(pattern: str, options: Any, student: Any, teacher: Any, labels: Any) -> Tensor:
    """The loss of one teacher that gets no gradient: ``dkd_loss``, ``logit_mse_loss`` or ``uld_loss``."""
    if distributed.among((student, teacher, labels, *options.tensors)):
        return distributed.of_all_ranks(
            _PAIRS[pattern], student, {"teacher": teacher, "labels": labels, **options.given()}
        )
    if getattr(options, "process_group", None) is not None:
        from kdkernels.parallel import pairs

        return pairs.LOSSES[pattern](options, student, teacher, labels)
    columns = checks.student_of(options, student)
    widths = {}
    if pattern == "uld_fwd":
        widths["teacher_vocab_size"] = checks.teacher_of_width("teacher", teacher, student, options.teacher_vocab_size)
    else:
        checks.teacher_like("teacher", teacher, student, options.vocab_size)
    checks.teacher_gets_none(options.function, teacher)
    checks.apart_in_place(options, student, {"labels": labels}, (teacher,))
    torch_only = None
    if pattern == "uld_fwd" and (student.device.type != "cpu" or options.backend == "triton"):
        torch_only = checks.why_not_counted(student, teacher)
    backend = backends.choose(options.backend, student, pattern=pattern, torch_only=torch_only)
    checks.reverse_mode_only(backend, student, teacher, labels, *options.tensors)
    labels = checks.labels_like(labels, student, columns, options.ignore_index)
    scale, rows = row_tensors(options, student, labels)
    scalars = {**options.scalars, "scale": scale, "vocab_size": columns, **widths}
    # 2 (s - t) / V: half of s - t is kept, which fits fp16 however far apart two of its numbers are.
    size = 1024.0 / columns if pattern == "mse_fwd" else options.gradient_size
    launch = Launch(pattern, backend, rows, scalars, gradient_size=size)
    return evaluate(launch, options, student, (teacher,))[0]


_PAIRS: dict[str, Any] = {"dkd_fwd": dkd_loss, "mse_fwd": logit_mse_loss, "uld_fwd": uld_loss}
