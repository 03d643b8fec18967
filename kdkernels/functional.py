"""The public functions: they check, choose a backend, and call the op or the reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, TypeVar, Union

import torch
from torch import Tensor

from kdkernels import backends, checks, distributed, divergences, ops, reduction, reference, symbols, transforms
from kdkernels.autograd import Launch, RowLoss, SummedCall, run, run_reference, run_summed
from kdkernels.divergences import Divergence

PerRow = Union[float, Tensor]


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


_Loss = TypeVar("_Loss", bound=Callable[..., Any])


def _dense_loss(prepare: _Loss) -> _Loss:
    """Make what checks and prepares a call of ``kd_loss`` a function that runs it, and remembers what led to what."""

    @functools.wraps(prepare)
    def loss(student: Any, teacher: Any, labels: Any = None, **options: Any) -> Any:
        key = _call_key("kd_loss", options, (student, teacher), labels is None)
        known = None if key is None else _known_calls.get(key)
        if known is None:
            if distributed.among((student, teacher, labels, *options.values())):
                return distributed.of_all_ranks(loss, student, {"teacher": teacher, "labels": labels, **options})
            call = prepare(student, teacher, labels, **options)
            known = _know_call(key, call, plain=labels is None)
            launch = call.launch
            if known.summed is not None:
                return run_summed(known.summed, student, launch.options["scale"], (teacher, launch.tensors[0]))
            return _dense(call.plan, call.teachers, launch)
        _check_probs(known.plan, (teacher,), labels)
        if known.summed is not None:
            scale, flat = known.scale_and_labels(student, labels)
            return run_summed(known.summed, student, scale, (teacher, flat))
        plan = known.plan._replace(student=student)
        launch = known.launch or _dense_call(plan, labels, None, plan.options["mixture"], known.backend)
        return _dense(plan, (teacher,), launch)

    return loss  # type: ignore[return-value]


def _topk_loss(prepare: _Loss) -> _Loss:
    """As ``_dense_loss``, for ``topk_kd_loss``; the values of a sparse teacher are checked in every call."""

    @functools.wraps(prepare)
    def loss(
        student: Any,
        teacher_ids: Any,
        teacher_logprobs: Any,
        labels: Any = None,
        *,
        tail_logprob: Any = None,
        **options: Any,
    ) -> Any:
        given = (labels is None, tail_logprob is None)
        key = _call_key("topk_kd_loss", options, (student, teacher_ids, teacher_logprobs), *given)
        known = None if key is None else _known_calls.get(key)
        if known is None:
            rest = {"labels": labels, "tail_logprob": tail_logprob, **options}
            if distributed.among((student, teacher_ids, teacher_logprobs, *rest.values())):
                entries = {"teacher_ids": teacher_ids, "teacher_logprobs": teacher_logprobs}
                return distributed.of_all_ranks(loss, student, {**entries, **rest})
            call = prepare(student, teacher_ids, teacher_logprobs, **rest)
            known, plan, launch = _know_call(key, call, plain=all(given)), call.plan, call.launch
        else:
            plan = known.plan._replace(student=student)
            teacher = checks.sparse_entries(teacher_ids, teacher_logprobs, plan.columns, plan.options["tail"])
            if known.launch is not None:
                launch = known.launch._replace(sparse_teacher=teacher)
            else:
                launch = _topk_call(plan, teacher, labels, tail_logprob, known.backend)
        if known.summed is not None:
            operands = (*launch.sparse_teacher, launch.tensors[0], launch.tensors[-1])
            return run_summed(known.summed, student, launch.options["scale"], operands)
        return plan.result(*plan.launch(launch, ()), TopKStats)

    return loss  # type: ignore[return-value]


def _takes_dtensors(loss: _Loss) -> _Loss:
    """As ``_dense_loss`` does, for a loss that remembers nothing."""

    @functools.wraps(loss)
    def call(student: Any, teacher: Any, labels: Any = None, **options: Any) -> Any:
        if distributed.among((student, teacher, labels, *options.values())):
            return distributed.of_all_ranks(loss, student, {"teacher": teacher, "labels": labels, **options})
        return loss(student, teacher, labels, **options)

    return call  # type: ignore[return-value]


@_dense_loss
def kd_loss(
    student: Tensor,
    teacher: Union[Tensor, Sequence[Tensor]],
    labels: Optional[Tensor] = None,
    *,
    divergence: Union[str, Divergence] = "forward_kl",
    temperature: PerRow = 1.0,
    teacher_temperature: Optional[PerRow] = None,
    scale_by_t_squared: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    z_loss_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weight: Optional[PerRow] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[float, Tensor]] = None,
    teacher_form: str = "logits",
    teacher_weights: Optional[Union[Sequence[float], Tensor]] = None,
    mixture: str = "probs",
    vocab_size: Optional[int] = None,
    student_softcap: Optional[float] = None,
    teacher_softcap: Optional[float] = None,
    standardize: bool = False,
    row_param: Optional[Tensor] = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    r"""Distillation loss between the tempered distributions of a student and a teacher, with its gradient in one pass.

    With ``p = softmax(t / T_t)``, ``q = softmax(s / T)``, the weight of a row ``w_i`` and ``lse = logsumexp(s)``::

        loss_i = w_i (kd_weight T^2 D(p, q) + ce_weight CE(s, label) + z_loss_weight lse^2)
        CE     = lse - (1 - label_smoothing) s[label] - label_smoothing mean_v(s_v)

    so that ``kd_loss(s, t, temperature=T, reduction="batchmean")`` equals
    ``F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T * T``.

    Args:
        student: logits ``(..., V)``, float32, bfloat16 or float16 (float64 on the CPU). Any strides with stride 1 in
            the last dimension; nothing is copied.
        teacher: logits of the same leading shape, device and width; its dtype may differ. When it requires grad it gets
            its gradient too. A sequence of 1 to 4 tensors is a mixture of teachers, see ``teacher_weights``.
        labels: int64 or int32 of the leading shape: the classes for ``ce_weight``, and the mask: rows equal to
            ``ignore_index`` give loss 0 and gradient 0, and their logits are not read.
        divergence: a name from ``kdkernels.divergences.names()`` (its default parameters) or an instance such as
            ``JSD(0.3)``.
        temperature: T of the student, > 0, a number or one value per row.
        teacher_temperature: T_t, by default ``temperature``.
        scale_by_t_squared: multiply the divergence by ``temperature**2`` (Hinton et al. 2015), in loss and gradient.
        kd_weight, ce_weight, z_loss_weight: weights of the three terms, >= 0. Cross entropy and z-loss (PaLM,
            Chowdhery et al. 2022) are taken at temperature 1.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        ignore_index: the label of rows that do not count.
        row_weight: a number or one value per row that multiplies the row's loss; it does not enter the denominator.
        reduction: "none" (the shape of the rows), "sum", "mean" (over the rows that count; 0 when there is none), or
            "batchmean" (the sum over ``student.shape[0]``, as ``F.kl_div``).
        normalizer: a number or 0-d tensor > 0 that divides the sum in place of the number of rows ("mean") or of 1
            ("sum"): the tokens of a whole batch under gradient accumulation (``num_items_in_batch``).
        teacher_form: what ``teacher`` holds: "logits", "log_probs" (log-probabilities; a temperature acts on them as on
            logits, and like those they are normalised, so that a constant per row changes nothing), "probs" (rows
            that add up to 1 within the rounding of their dtype) or "unnormalized_probs" (weights >= 0, divided by their
            sum).
        teacher_weights: for a sequence of teachers, M weights >= 0, or a tensor ``(..., M)`` of weights per row; equal
            weights by default.
        mixture: "probs" (``p = sum_k w_k softmax(t_k / T_t)``, the weights divided by their sum) or "logits"
            (``p = softmax(sum_k w_k t_k / T_t)``, the weights as they are given).
        vocab_size: columns from there on are padding: no probability, gradient 0. Student and teacher may then be
            padded to different widths.
        student_softcap, teacher_softcap: cap > 0 of ``cap * tanh(logits / cap)``, applied first (Gemma 2).
        standardize: replace the logits of both in the divergence by ``(x - mean(x)) / std(x)`` per row before the
            temperature (logit standardisation, Sun et al. 2024, arXiv:2403.01427), with ``torch.std``, which divides by
            V - 1, as the authors' code has it. Cross entropy keeps the raw logits.
        row_param: one value per row for the divergence's parameter (JSD's ``beta``, the skew forms' ``alpha``),
            strictly between 0 and 1; overrides the instance's.
        inplace: write the gradient over the student's logits: no ``[N, V]`` allocation at all, and the logits are gone
            after the call. Eager only; needs a student that requires grad, whose rows share no memory. Under
            ``torch.no_grad()`` there is no gradient, and the logits stay.
        return_stats: also return ``KDStats``.
        backend: "auto", "triton", "cpu" (C++) or "torch" (plain PyTorch, the reference).

    Returns:
        The loss: 0-d, or the shape of the rows for "none"; float32 for float32 and 16-bit students, float64 for
        float64. With ``return_stats`` a pair ``(loss, KDStats)``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched. Values inside tensors are read on the
            CPU always, on a GPU only when ``KDKERNELS_DEBUG=1``.
    """
    options = {
        "divergence": divergence,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "scale_by_t_squared": scale_by_t_squared,
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "z_loss_weight": z_loss_weight,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "row_weight": row_weight,
        "reduction": reduction,
        "normalizer": normalizer,
        "teacher_form": teacher_form,
        "teacher_weights": teacher_weights,
        "mixture": mixture,
        "vocab_size": vocab_size,
        "student_softcap": student_softcap,
        "teacher_softcap": teacher_softcap,
        "standardize": standardize,
        "row_param": row_param,
        "inplace": inplace,
        "return_stats": return_stats,
        "backend": backend,
    }
    plan = _plan("kd_loss", options, student)
    teachers = _teachers(teacher)
    for k, item in enumerate(teachers):
        checks.teacher_like("teacher" if len(teachers) == 1 else f"teacher[{k}]", item, student, vocab_size)
    single = isinstance(teacher, Tensor)
    weights = _mixture_weights(teacher_weights, mixture, len(teachers), student, single=single)
    _check_probs(plan, teachers, labels)
    launch = _dense_call(plan, labels, weights, mixture, _dense_backend(plan, teachers, weights))
    return _Call(plan, teachers, launch)


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


@_topk_loss
def topk_kd_loss(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Optional[Tensor] = None,
    *,
    tail: str = "bucket",
    tail_logprob: Optional[Tensor] = None,
    min_tail: Optional[float] = None,
    divergence: Union[str, Divergence] = "forward_kl",
    temperature: PerRow = 1.0,
    teacher_temperature: Optional[PerRow] = None,
    scale_by_t_squared: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    z_loss_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weight: Optional[PerRow] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[float, Tensor]] = None,
    vocab_size: Optional[int] = None,
    student_softcap: Optional[float] = None,
    row_param: Optional[Tensor] = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
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
        scale_by_t_squared, kd_weight, ce_weight, z_loss_weight, label_smoothing, ignore_index, row_weight, reduction,
            normalizer, vocab_size, student_softcap, row_param, inplace: as in ``kd_loss``.
        return_stats: also return ``TopKStats``.
        backend: as in ``kd_loss``.

    Returns:
        The loss: 0-d, or the shape of the rows for "none"; float32 for float32 and 16-bit students, float64 for
        float64. With ``return_stats`` a pair ``(loss, TopKStats)``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched. Values inside tensors are read on the
            CPU always, on a GPU only when ``KDKERNELS_DEBUG=1``; the row of an id out of range that was not seen gives
            NaN.
    """
    options = {
        "tail": tail,
        "min_tail": min_tail,
        "divergence": divergence,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "scale_by_t_squared": scale_by_t_squared,
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "z_loss_weight": z_loss_weight,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "row_weight": row_weight,
        "reduction": reduction,
        "normalizer": normalizer,
        "vocab_size": vocab_size,
        "student_softcap": student_softcap,
        "row_param": row_param,
        "inplace": inplace,
        "return_stats": return_stats,
        "backend": backend,
    }
    plan = _plan("topk_kd_loss", options, student)
    teacher = checks.sparse_teacher(teacher_ids, teacher_logprobs, student, plan.columns, tail)
    name = backends.choose(backend, student, divergence=plan.divergence.name, pattern="topk_fwd")
    checks.reverse_mode_only(name, student)
    return _Call(plan, (), _topk_call(plan, teacher, labels, tail_logprob, name))


@_takes_dtensors
def taid_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    *,
    interpolation: PerRow,
    **options: Any,
) -> Any:
    r"""Distillation towards a teacher interpolated with the student (TAID, Shing et al. 2025, arXiv:2501.16937).

    The target is ``softmax(((1 - lam) stop_gradient(s) + lam t) / T)`` with ``lam = interpolation``, a number in [0,
    1] or one value per row; the other arguments are those of ``kd_loss`` for one teacher of logits.

    Raises:
        TypeError, ValueError: as ``kd_loss``; also for ``teacher_temperature``, ``teacher_form``, ``teacher_weights``
            and ``mixture``, which have no meaning here.
    """
    for name in ("teacher_temperature", "teacher_form", "teacher_weights", "mixture"):
        if name in options:
            raise TypeError(f"taid_loss takes no {name}")
    plan = _plan("taid_loss", options, student)
    checks.teacher_like("teacher", teacher, student, options.get("vocab_size"))
    lam = checks.per_row("interpolation", interpolation, student, low=0.0, high=1.0, exclusive=False)
    if not isinstance(lam, Tensor):
        lam = symbols.as_tensor(lam, checks.sum_dtype(student), student.device)
    lam = lam.expand(_num_rows(student))
    teachers, weights = (student.detach(), teacher), torch.stack([1 - lam, lam], -1)
    launch = _dense_call(plan, labels, weights, "logits", _dense_backend(plan, teachers, weights))
    return _dense(plan, teachers, launch)


@_takes_dtensors
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    teacher_temperature: Optional[float] = None,
    scale_by_t_squared: bool = True,
    ignore_index: int = -100,
    row_weight: Optional[PerRow] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[float, Tensor]] = None,
    vocab_size: Optional[int] = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Decoupled knowledge distillation ``T^2 (alpha TCKD + beta NCKD)`` (Zhao et al. 2022, arXiv:2203.08679).

    ``TCKD = KL`` of the two-way distributions (label, all others) and ``NCKD = KL(p^ || q^)`` of the distributions
    over the other classes, ``p^_v = p_v / (1 - p_label)``. ``labels`` are required; ``alpha`` and ``beta`` are
    numbers >= 0; the other arguments, shapes, dtypes and errors are those of ``kd_loss`` with one temperature for all
    rows. The teacher gets no gradient.
    """
    options = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "scale_by_t_squared": scale_by_t_squared,
        "ignore_index": ignore_index,
        "row_weight": row_weight,
        "reduction": reduction,
        "normalizer": normalizer,
        "vocab_size": vocab_size,
        "inplace": inplace,
        "backend": backend,
    }
    checks.number("alpha", alpha, low=0.0)
    checks.number("beta", beta, low=0.0)
    for name in ("temperature", "teacher_temperature"):
        if isinstance(options[name], Tensor):
            raise TypeError(f"{name} must be a number in dkd_loss, got a tensor")
    if labels is None:
        raise TypeError("labels are required by dkd_loss")
    plan = _plan("dkd_loss", options, student)
    checks.teacher_like("teacher", teacher, student, vocab_size)
    _no_teacher_grad(teacher, "dkd_loss")
    flat = checks.labels_like(labels, student, plan.columns, ignore_index)
    scale, weight = plan.weights(flat)
    name = backends.choose(backend, student)
    checks.reverse_mode_only(name, student, teacher)
    if name == "torch":
        assert flat is not None
        s, t = _flat(student, teacher)
        rows = reference.dkd_rows(
            s,
            t,
            flat,
            alpha=symbols.as_float(alpha),
            beta=symbols.as_float(beta),
            temperature=plan.temperature,
            teacher_temperature=plan.teacher_temperature,
            scale_by_t_squared=scale_by_t_squared,
            vocab_size=plan.columns,
            ignore_index=ignore_index,
        )
        return plan.reduced(rows * scale if weight is None else rows * (scale * weight))
    launch = Launch(
        "dkd_fwd",
        name,
        (flat, weight),
        {
            "alpha": symbols.as_float(alpha),
            "beta": symbols.as_float(beta),
            "temperature": plan.temperature,
            "teacher_temperature": plan.teacher_temperature,
            "vocab_size": plan.columns,
            "ignore_index": ignore_index,
            "scale": scale,
            "scale_by_t_squared": scale_by_t_squared,
        },
        gradient_size=(alpha + beta) * _tempered(plan.temperature, scale_by_t_squared) + 2.0**-100,
    )
    return plan.launch(launch, (teacher,))[0]


@_takes_dtensors
def logit_mse_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor] = None,
    *,
    centered: bool = False,
    ignore_index: int = -100,
    row_weight: Optional[PerRow] = None,
    reduction: str = "mean",
    normalizer: Optional[Union[float, Tensor]] = None,
    vocab_size: Optional[int] = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Squared difference of logits, ``mean_v (s_v - t_v)^2`` per row (Ba & Caruana 2014, arXiv:1312.6184).

    ``centered`` subtracts the row mean of ``s - t`` first, which makes the loss blind to a constant shift of the
    logits, as softmax is (Kim et al. 2021, arXiv:2105.08919). ``labels`` only mask. With no mask and "mean" it equals
    ``F.mse_loss(student, teacher)``. The other arguments, shapes, dtypes and errors are those of ``kd_loss``; the
    teacher gets no gradient.
    """
    options = {
        "ignore_index": ignore_index,
        "row_weight": row_weight,
        "reduction": reduction,
        "normalizer": normalizer,
        "vocab_size": vocab_size,
        "inplace": inplace,
        "backend": backend,
    }
    checks.flag("centered", centered)
    plan = _plan("logit_mse_loss", options, student)
    checks.teacher_like("teacher", teacher, student, vocab_size)
    _no_teacher_grad(teacher, "logit_mse_loss")
    flat = checks.labels_like(labels, student, plan.columns, ignore_index)
    scale, weight = plan.weights(flat)
    name = backends.choose(backend, student)
    checks.reverse_mode_only(name, student, teacher)
    if name == "torch":
        s, t = _flat(student, teacher)
        rows = reference.mse_rows(s, t, flat, centered=centered, vocab_size=plan.columns, ignore_index=ignore_index)
        return plan.reduced(rows * scale if weight is None else rows * (scale * weight))
    scalars = {"centered": centered, "vocab_size": plan.columns, "ignore_index": ignore_index, "scale": scale}
    # 2 (s - t) / V: half of s - t is kept, which fits fp16 however far apart two of its numbers are.
    launch = Launch("mse_fwd", name, (flat, weight), scalars, gradient_size=1024.0 / plan.columns)
    return plan.launch(launch, (teacher,))[0]


DEFAULTS: dict[str, Any] = {
    "divergence": "forward_kl",
    "temperature": 1.0,
    "teacher_temperature": None,
    "scale_by_t_squared": True,
    "kd_weight": 1.0,
    "ce_weight": 0.0,
    "z_loss_weight": 0.0,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "row_weight": None,
    "reduction": "mean",
    "normalizer": None,
    "teacher_form": "logits",
    "teacher_weights": None,
    "mixture": "probs",
    "vocab_size": None,
    "student_softcap": None,
    "teacher_softcap": None,
    "standardize": False,
    "row_param": None,
    "inplace": False,
    "return_stats": False,
    "backend": "auto",
}


# Those of kd_loss that describe a teacher's logits mean nothing to a sparse teacher.
TOPK_DEFAULTS = {
    "tail": "bucket",
    "min_tail": None,
    **{
        name: value
        for name, value in DEFAULTS.items()
        if name not in ("teacher_form", "teacher_weights", "mixture", "teacher_softcap", "standardize")
    },
}


class Settings(NamedTuple):
    """Options after all checks that need no tensor."""

    get: dict[str, Any]  # every option, as given or its default
    divergence: Divergence
    plain: bool  # no option is a tensor
    objective: dict[str, Any]  # those that the ops of an objective take for all rows alike


def check_topk_options(options: dict[str, Any], owner: str = "topk_kd_loss") -> Settings:
    """Check the options of ``topk_kd_loss`` whose check needs no tensor."""
    return check_options(owner, options, TOPK_DEFAULTS)


def check_options(owner: str, options: dict[str, Any], defaults: dict[str, Any] = DEFAULTS) -> Settings:
    """Check all options whose check needs no tensor, and resolve the divergence.

    A training loop asks the same thing in every step: what was accepted is remembered.
    """
    key = _options_key(owner, options)
    # A graph that looked into the memory would be made again whenever another call adds to it.
    found = None if key is None else _accepted.get(key)
    if found is None:
        found = _check_options(owner, options, defaults)
        if key is not None:
            _remember(_accepted, key, found)
    return found


MAX_ACCEPTED = 256
_accepted: dict[Any, Settings] = {}
# Types of values that can be a key; divergences join when they are met.
_remembered: set[type] = {str, int, float, bool, type(None)}


def _options_key(owner: str, options: dict[str, Any]) -> Optional[tuple[Any, ...]]:
    """What tells options apart, or None where a tensor is among them, or a graph is made."""
    # is_compiling() also asks about TorchScript, and about export, where tensors are fake: 5 us of cold code.
    if torch.compiler.is_dynamo_compiling():
        return None
    values = tuple(options.values())
    # Types too: 1 is equal to True, and not a flag.
    types = tuple(map(type, values))
    if not _remembered.issuperset(types):
        if not all(kind in _remembered or issubclass(kind, Divergence) for kind in types):
            return None
        _remembered.update(types)
    return owner, divergences.version, *options, types, values


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= MAX_ACCEPTED:
        memory.clear()
    memory[key] = value


def _check_options(owner: str, options: dict[str, Any], defaults: dict[str, Any]) -> Settings:
    for name in options:
        if name not in defaults:
            raise TypeError(f"{owner} got an unexpected option {name!r}")
    get = {**DEFAULTS, **options}
    resolved = divergences.resolve(get["divergence"])
    for name in ("temperature", "teacher_temperature"):
        if not isinstance(get[name], Tensor) and (name == "temperature" or get[name] is not None):
            checks.number(name, get[name], low=0.0, exclusive_low=True)
    if get["row_weight"] is not None and not isinstance(get["row_weight"], Tensor):
        checks.number("row_weight", get["row_weight"])
    for name in ("scale_by_t_squared", "standardize", "inplace", "return_stats"):
        checks.flag(name, get[name])
    for name in ("kd_weight", "ce_weight", "z_loss_weight"):
        checks.number(name, get[name], low=0.0)
    checks.number("label_smoothing", get["label_smoothing"], low=0.0, high=1.0)
    checks.integer("ignore_index", get["ignore_index"])
    checks.reduction_name(get["reduction"])
    checks.normalizer_like(get["normalizer"], get["reduction"])
    checks.choice("teacher_form", get["teacher_form"], checks.TEACHER_FORMS)
    checks.choice("mixture", get["mixture"], checks.MIXTURES)
    if get["vocab_size"] is not None:
        checks.integer("vocab_size", get["vocab_size"], low=1)
    for name in ("student_softcap", "teacher_softcap"):
        checks.softcap(name, get[name])
    if get["row_param"] is not None and resolved.row_param is None:
        raise ValueError(f"row_param needs a divergence with a parameter per row, got {resolved.name!r}")
    checks.choice("backend", get["backend"], checks.BACKENDS)
    sparse = "tail" in defaults
    if sparse:
        get = {**TOPK_DEFAULTS, **get}
        _check_tail(get, resolved)
    param0, param1 = resolved.params()
    temperature = get["temperature"] if get["teacher_temperature"] is None else get["teacher_temperature"]
    objective = {
        "divergence": resolved.name,
        "param0": param0,
        "param1": param1,
        "temperature": _number(get["temperature"]),
        "teacher_temperature": _number(temperature),
        "scale_by_t_squared": get["scale_by_t_squared"],
        "kd_weight": symbols.as_float(get["kd_weight"]),
        "ce_weight": symbols.as_float(get["ce_weight"]),
        "z_loss_weight": symbols.as_float(get["z_loss_weight"]),
        "label_smoothing": symbols.as_float(get["label_smoothing"]),
        "ignore_index": get["ignore_index"],
        "student_softcap": checks.softcap("student_softcap", get["student_softcap"]),
        "stats": get["return_stats"],
    }
    if sparse:
        objective["tail"] = get["tail"]
        # Where the divergence is finite without it an empty tail is none. topk_launch puts the default in.
        floored = get["tail"] in ("bucket", "uniform") and not _defined_without_teacher(resolved)
        objective["min_tail"] = symbols.as_float(get["min_tail"]) if floored and get["min_tail"] is not None else 0.0
        objective["tail_rounding"] = 1.0 if floored and get["min_tail"] is None else 0.0
    else:
        # The kernels divide by the sum of a row whatever it is.
        objective["teacher_form"] = "probs" if get["teacher_form"] == "unnormalized_probs" else get["teacher_form"]
        objective["teacher_softcap"] = checks.softcap("teacher_softcap", get["teacher_softcap"])
        objective["standardize"] = get["standardize"]
    return Settings(get, resolved, not any(isinstance(value, Tensor) for value in get.values()), objective)


def _defined_without_teacher(divergence: Divergence) -> bool:
    """Whether the divergence is finite where the teacher's probability is 0."""
    # Homogeneous ones are whatever their parameter, which may be a symbol.
    return divergence.name in reference.topk.HOMOGENEOUS or reference.topk.defined_without_teacher(
        divergence.name, *divergence.params()
    )


def _check_probs(plan: _Plan, teachers: tuple[Tensor, ...], labels: Optional[Tensor]) -> None:
    """The values of teachers that are probabilities, in the rows that count."""
    form = plan.options["teacher_form"]
    if form in ("logits", "log_probs") or torch.compiler.is_compiling() or not plan.options["kd_weight"]:
        return
    counted = None if labels is None else (labels != plan.options["ignore_index"]).reshape(-1)
    if isinstance(plan.row_weight, Tensor):
        counted = plan.row_weight != 0 if counted is None else counted & (plan.row_weight != 0)
    for k, teacher in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{k}]"
        checks.teacher_probs(name, teacher, plan.columns, counted, form)


def _check_tail(get: dict[str, Any], divergence: Divergence) -> None:
    tail = get["tail"]
    checks.choice("tail", tail, checks.TAILS)
    if get["min_tail"] is not None:
        checks.number("min_tail", get["min_tail"], low=0.0, high=1.0)
        if tail not in ("bucket", "uniform"):
            raise ValueError(f"min_tail has no meaning with tail {tail!r}, only with 'bucket' and 'uniform'")
    if tail in ("renormalize", "drop") and not _defined_without_teacher(divergence):
        raise ValueError(
            f"tail {tail!r} gives the teacher probability 0 outside its entries, where divergence {divergence.name!r}, "
            f"{divergence.formula}, is infinite; use tail 'bucket', 'uniform' or 'renormalize_both'"
        )
    teacher_temperature = get["temperature"] if get["teacher_temperature"] is None else get["teacher_temperature"]
    if tail in ("bucket", "drop") and (isinstance(teacher_temperature, Tensor) or teacher_temperature != 1):
        got = "a tensor" if isinstance(teacher_temperature, Tensor) else teacher_temperature
        raise ValueError(
            f"teacher_temperature must be 1 with tail {tail!r}, got {got}: K log-probabilities do not tell the mass "
            "outside them at another temperature; take them at the temperature of the loss and pass "
            "teacher_temperature=1.0, or choose another tail"
        )


class _Plan(NamedTuple):
    """A call after its options were checked against the student."""

    student: Tensor
    options: dict[str, Any]
    divergence: Divergence
    objective: dict[str, Any]
    columns: int
    temperature: Any
    teacher_temperature: Any
    row_weight: Optional[PerRow]
    normalizer: Any

    def weights(self, labels: Optional[Tensor]) -> tuple[float, Optional[Tensor]]:
        weight = self.row_weight
        scale, rows = reduction.row_weights(
            self.options["reduction"],
            num_rows=_num_rows(self.student),
            batch_size=self.student.shape[0] if self.student.dim() > 1 else 1,
            labels=labels,
            ignore_index=self.options["ignore_index"],
            row_weight=weight if isinstance(weight, Tensor) else None,
            normalizer=self.normalizer,
            dtype=checks.sum_dtype(self.student),
            device=self.student.device,
        )
        if weight is None or isinstance(weight, Tensor):
            return scale, rows
        if not symbols.is_symbol(weight):
            return scale * weight, rows
        factor = symbols.as_tensor(weight, checks.sum_dtype(self.student), self.student.device)
        return scale, factor.expand(_num_rows(self.student)) if rows is None else rows * factor

    def result(self, loss: Tensor, stats: Optional[Tensor], kind: Any) -> Any:
        """The loss, with the columns of ``stats`` as a named tuple of type ``kind`` where they were asked for."""
        if not self.options["return_stats"]:
            return loss
        assert stats is not None
        return loss, kind(*(column.reshape(self.student.shape[:-1]) for column in stats.unbind(-1)))

    def reduced(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.student.shape[:-1]) if self.options["reduction"] == "none" else rows.sum()

    def launch(
        self, launch: Launch, teachers: tuple[Tensor, ...], dual: Optional[Launch] = None
    ) -> tuple[Tensor, Optional[Tensor]]:
        if launch.backend == "torch":
            # Autograd differentiates the reference, for the teachers too.
            loss, stats = run_reference(launch, _flat(self.student)[0], _flat(*teachers))
            return self.reduced(loss), stats
        per_row = self.options["reduction"] == "none"
        # An exported program is its ops and no more: none of them could hand out what forward leaves for backward.
        with_grad = torch.is_grad_enabled() and (self.student.requires_grad or dual is not None)
        if with_grad and not symbols.traces_ops():
            result = RowLoss.apply(
                self.student,
                teachers[0] if teachers else None,
                teachers[1:],
                launch,
                dual,
                per_row,
                self.options["inplace"],
            )
            loss, stats = result if isinstance(result, tuple) else (result, None)
        else:
            loss, stats = run(launch, self.student.detach(), tuple(item.detach() for item in teachers), None)
            loss = loss if per_row else loss.sum()
        return (loss.reshape(self.student.shape[:-1]) if per_row else loss), stats


class _Call(NamedTuple):
    """A call after all checks."""

    plan: _Plan
    teachers: tuple[Tensor, ...]
    launch: Launch


class _KnownCall(NamedTuple):
    """A call that passed all checks but those of labels, of a teacher's values, and of a captured tail."""

    plan: _Plan  # without the student
    backend: str
    launch: Optional[Launch]  # where the call had no tensors per row, and the launch has none either
    summed: Optional[SummedCall]  # where one op makes all of the loss

    def scale_and_labels(self, student: Tensor, labels: Any) -> tuple[float, Optional[Tensor]]:
        """What a summed call takes beside the logits."""
        if self.launch is not None:
            return self.launch.options["scale"], None
        plan = self.plan._replace(student=student)
        flat, _ = _labels_and_param(plan, labels)
        return plan.weights(flat)[0], flat


def _call_key(owner: str, options: dict[str, Any], tensors: tuple[Any, ...], *given: bool) -> Optional[tuple[Any, ...]]:
    """All that the checks of a call look at and its backend depends on; None where that is more than can be compared.

    In the cold caches of a training step the checks take 0.15 ms. A loop calls with the same options and shapes again
    and again, and what they led to is remembered. On the CPU only: elsewhere the backend may change between calls.
    ``options`` are those that were given: a look at two costs less than one at all 23.
    """
    key = _options_key(owner, options)
    if key is None or transforms.active():
        return None
    if options.get("inplace"):
        given += (torch.is_grad_enabled(), isinstance(tensors[0], Tensor) and tensors[0].requires_grad)
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TENSORS or not tensor.is_cpu or tensor.layout is not _STRIDED:
            return None
        key += (tensor.dtype, tensor.shape, tensor.stride())
    # Teachers that want a gradient are another matter.
    return None if tensors[1].requires_grad or tensors[-1].requires_grad else key + given


def _know_call(key: Any, call: _Call, *, plain: bool) -> _KnownCall:
    # Neither the student nor a sparse teacher: nobody wants their memory kept.
    plan, launch = call.plan._replace(student=None), call.launch  # type: ignore[arg-type]
    bare = launch._replace(sparse_teacher=()) if plain else None
    summed = None if key is None else _summed_call(call)
    known = _KnownCall(plan, launch.backend, bare, summed)
    if key is not None:
        _remember(_known_calls, key, known)
    return known


def _summed_call(call: _Call) -> Optional[SummedCall]:
    """The call of one op that does all of it, on the CPU and where nothing is asked for or given by row but labels."""
    plan, launch = call.plan, call.launch
    if launch.backend != "cpu" or plan.options["reduction"] == "none" or plan.options["return_stats"]:
        return None
    rows = launch.tensors[1:-1] if launch.sparse_teacher else launch.tensors[1:]
    if plan.student.dim() not in (2, 3) or any(item is not None for item in rows):
        return None
    pattern = launch.pattern.removesuffix("_fwd")
    alike = {name: value for name, value in launch.options.items() if name not in ("scale", "stats", "mixture")}
    packed = ops.op(f"{pattern}_call", "cpu")(plan.student.detach(), **alike)
    return SummedCall(ops.op(f"{pattern}_loss", "cpu"), packed, plan.options["inplace"], launch.gradient_size)


_STRIDED = torch.strided
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_known_calls: dict[Any, _KnownCall] = {}


def _plan(owner: str, options: dict[str, Any], student: Any) -> _Plan:
    get, divergence, plain, objective = check_options(owner, options, TOPK_DEFAULTS if "topk" in owner else DEFAULTS)
    checks.logits("student", student)
    columns = student.shape[-1] if get["vocab_size"] is None else checks.vocabulary(get["vocab_size"], student)
    if get["reduction"] == "batchmean":
        checks.reduction_name("batchmean", student)
    if get["inplace"]:
        checks.inplace_allowed(student)
    temperature, teacher_temperature = objective["temperature"], objective["teacher_temperature"]
    weight, normalizer = get["row_weight"], get["normalizer"]
    checks.in_sums("temperature", temperature, student, positive=True)
    checks.in_sums("teacher_temperature", teacher_temperature, student, positive=True)
    for name in ("student_softcap", "teacher_softcap"):
        if get[name] is not None:
            checks.in_sums(name, get[name], student, positive=True)
    if plain and weight is not None:
        checks.in_sums("row_weight", weight, student)
    if plain and normalizer is not None:
        checks.in_sums("normalizer", normalizer, student, positive=True)
    if not plain:
        temperature = checks.per_row("temperature", get["temperature"], student, low=0.0)
        teacher_temperature = temperature
        if get["teacher_temperature"] is not None:
            teacher_temperature = checks.per_row("teacher_temperature", get["teacher_temperature"], student, low=0.0)
        if weight is not None:
            weight = checks.per_row("row_weight", weight, student)
        normalizer = checks.normalizer_like(normalizer, get["reduction"], student)
    return _Plan(student, get, divergence, objective, columns, temperature, teacher_temperature, weight, normalizer)


def _dense_backend(plan: _Plan, teachers: tuple[Tensor, ...], mixture_weights: Optional[Tensor]) -> str:
    get, name = plan.options, plan.divergence.name
    torch_only = _teacher_grad_needs_torch(get, teachers, mixture_weights) if _teacher_grad(teachers) else None
    found = backends.choose(get["backend"], plan.student, divergence=name, torch_only=torch_only)
    checks.reverse_mode_only(found, plan.student, *teachers)
    return found


def _teacher_grad(teachers: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in teachers)


def _dense_call(
    plan: _Plan, labels: Optional[Tensor], mixture_weights: Optional[Tensor], mixture: str, backend: str
) -> Launch:
    flat, row_param = _labels_and_param(plan, labels)
    scale, weight = plan.weights(flat)
    return dense_launch(plan, backend, (flat, weight, row_param), scale, mixture_weights, mixture)


def _topk_call(
    plan: _Plan,
    teacher: tuple[Tensor, ...],
    labels: Optional[Tensor],
    tail_logprob: Optional[Tensor],
    backend: str,
) -> Launch:
    tail_rows = checks.tail_like(tail_logprob, plan.options["tail"], plan.student)
    flat, row_param = _labels_and_param(plan, labels)
    scale, weight = plan.weights(flat)
    return topk_launch(plan, backend, teacher, (flat, weight, row_param, tail_rows), scale)


def _dense(plan: _Plan, teachers: tuple[Tensor, ...], launch: Launch) -> Any:
    dual = _dual(plan, launch, teachers[0]) if launch.backend != "torch" and _teacher_grad(teachers) else None
    return plan.result(*plan.launch(launch, teachers, dual), KDStats)


# A z-loss has a gradient of 2 lse q, which fits fp16 at any lse so; an unbounded divergence has one that grows as the
# difference of log-probabilities.
Z_LOSS_SIZE, UNBOUNDED_SIZE = 512.0, 16.0


def _gradient_size(divergence: Divergence, options: dict[str, Any]) -> float:
    """``Launch.gradient_size`` of an objective."""
    size = 1.0 if divergence.bounded_gradient else UNBOUNDED_SIZE
    size = options["kd_weight"] * size * _tempered(options["temperature"], options["scale_by_t_squared"])
    # With no term at all there is still something to divide by.
    return size + options["ce_weight"] + Z_LOSS_SIZE * options["z_loss_weight"] + 2.0**-100


def _tempered(temperature: float, scale_by_t_squared: bool) -> float:
    """What a gradient by tempered logits is multiplied by."""
    return temperature if scale_by_t_squared else 1.0 / temperature


def dense_launch(
    plan: _Plan,
    backend: str,
    rows: tuple[Optional[Tensor], ...],
    scale: float,
    mixture_weights: Optional[Tensor],
    mixture: str,
) -> Launch:
    """The call of ``kd_loss`` whose ``rows`` are labels, weight and ``row_param``, each ``[N]``."""
    labels, weight, row_param = rows
    return Launch(
        "dense_fwd",
        backend,
        (labels, weight, *_row_tensors(plan.temperature, plan.teacher_temperature), row_param, mixture_weights),
        {**plan.objective, "mixture": mixture, "scale": scale, "vocab_size": plan.columns},
        gradient_size=_gradient_size(plan.divergence, plan.objective),
    )


def topk_launch(
    plan: _Plan,
    backend: str,
    teacher: tuple[Tensor, ...],
    rows: tuple[Optional[Tensor], ...],
    scale: float,
) -> Launch:
    """The call of ``topk_kd_loss`` whose ``rows`` are labels, weight, ``row_param`` and the tail, ``[N]`` each."""
    labels, weight, row_param, tail_rows = rows
    options = {**plan.objective, "scale": scale, "vocab_size": plan.columns}
    if options["tail_rounding"]:
        options |= _rounding_of_tail(teacher[1].dtype, tail_rows is not None)
    return Launch(
        "topk_fwd",
        backend,
        (labels, weight, *_row_tensors(plan.temperature, plan.teacher_temperature), row_param, tail_rows),
        options,
        teacher,
        _gradient_size(plan.divergence, plan.objective),
    )


def _rounding_of_tail(dtype: torch.dtype, given: bool) -> dict[str, float]:
    """The default of ``min_tail``: what ``1 - sum p`` may be off by; nothing where the tail is given."""
    if given:
        return {"min_tail": 0.0, "tail_rounding": 0.0}
    epsilon = torch.finfo(dtype).eps
    return {"min_tail": min(epsilon, torch.finfo(torch.float32).eps), "tail_rounding": epsilon / 2}


def _labels_and_param(plan: _Plan, labels: Optional[Tensor]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Labels and ``row_param`` of an objective, checked, as ``[N]``."""
    get = plan.options
    flat = checks.labels_like(labels, plan.student, plan.columns, get["ignore_index"])
    # This way round a graph with labels serves a weight of 0 too.
    if flat is None and get["ce_weight"]:
        raise ValueError("labels are required when ce_weight is not 0")
    row_param = get["row_param"]
    if row_param is not None:
        row_param = checks.per_row("row_param", row_param, plan.student, low=0.0, high=1.0)
        if not isinstance(row_param, Tensor):
            raise TypeError("row_param must be a tensor; give one number in the divergence itself")
    return flat, row_param


def _dual(plan: _Plan, launch: Launch, teacher: Tensor) -> Launch:
    """The launch whose student is the teacher: roles swapped, without the student's terms."""
    get = plan.options
    dual = plan.divergence.dual().canonical()
    param0, param1 = dual.params()
    # Numbers per row are in the dtype of the sums, which is that of whoever is the student.
    dtype = checks.sum_dtype(teacher)
    labels, *rows, _ = launch.tensors
    weight, student_rows, teacher_rows, row_param = (None if item is None else item.to(dtype) for item in rows)
    scale = launch.options["scale"]
    if row_param is not None and dual.name == plan.divergence.name:
        row_param = 1 - row_param  # JSD's beta weighs the teacher
    if get["scale_by_t_squared"]:
        # T of the factor stays the student's, whose role the teacher plays here.
        if student_rows is None:
            scale = scale * launch.options["temperature"] ** 2
        else:
            weight = student_rows**2 if weight is None else weight * student_rows**2
    options = {
        **launch.options,
        "divergence": dual.name,
        "param0": param0,
        "param1": param1,
        "scale": scale,
        "temperature": launch.options["teacher_temperature"],
        "teacher_temperature": launch.options["temperature"],
        "ce_weight": 0.0,
        "z_loss_weight": 0.0,
        "scale_by_t_squared": False,
        "teacher_form": "logits",
        "student_softcap": launch.options["teacher_softcap"],
        "teacher_softcap": launch.options["student_softcap"],
        "stats": False,
    }
    tensors = (labels, weight, teacher_rows, student_rows, row_param, None)
    size = _gradient_size(dual, options)
    return Launch("dense_fwd", launch.backend, tensors, options, gradient_size=size)


def _teacher_grad_needs_torch(
    options: dict[str, Any], teachers: tuple[Tensor, ...], mixture_weights: Optional[Tensor]
) -> Optional[str]:
    if len(teachers) > 1 or mixture_weights is not None:
        return "a mixture of teachers gets a gradient from plain PyTorch only; detach the teachers"
    if options["teacher_form"] in ("probs", "unnormalized_probs"):
        return "teacher probabilities get a gradient from plain PyTorch only; detach the teacher"
    if options["inplace"]:
        return "inplace cannot be combined with a teacher that requires grad; detach the teacher"
    return None


def _teachers(teacher: Any) -> tuple[Any, ...]:
    if isinstance(teacher, (list, tuple)):
        if not 1 <= len(teacher) <= checks.MAX_TEACHERS:
            raise ValueError(f"teacher must be a tensor or 1 to {checks.MAX_TEACHERS} tensors, got {len(teacher)}")
        return tuple(teacher)
    return (teacher,)


def _mixture_weights(weights: Any, mixture: str, count: int, student: Tensor, *, single: bool) -> Optional[Tensor]:
    """Weights ``[N, M]`` of the teachers, such that those of probabilities sum to 1; None for a single teacher."""
    if single:
        if weights is not None:
            raise ValueError("teacher_weights need a sequence of teachers, got one tensor")
        return None
    if weights is None:
        weights = [1.0 / count] * count
    dtype = checks.sum_dtype(student)
    if not isinstance(weights, (Tensor, list, tuple)):
        raise TypeError(f"teacher_weights must be a tensor or a sequence of numbers, got {type(weights).__name__}")
    if not isinstance(weights, Tensor):
        numbers = [checks.number("teacher_weights", w, low=0.0) for w in weights]
        if any(symbols.is_symbol(w) for w in numbers):
            weights = torch.stack([symbols.as_tensor(w, dtype, student.device) for w in numbers])
        else:
            weights = torch.tensor(numbers, dtype=dtype, device=student.device)
    if weights.shape[-1:] != (count,) or weights.shape[:-1] not in ((), student.shape[:-1]):
        raise ValueError(
            f"teacher_weights must have shape ({count},) or {(*student.shape[:-1], count)}, got {tuple(weights.shape)}"
        )
    if weights.requires_grad:
        raise ValueError("teacher_weights must not require grad: they get no gradient; detach them")
    weights = weights.to(device=student.device, dtype=dtype).reshape(-1, count)
    if checks.reads_values(weights) and weights.numel() and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"teacher_weights must be finite and >= 0 in {str(dtype).removeprefix('torch.')}")
    if mixture == "probs":
        largest = weights.amax(-1, keepdim=True)
        if checks.reads_values(weights) and not bool((largest > 0).all()):
            raise ValueError("teacher_weights must not all be 0")
        # Of the largest, so that their sum is one of this dtype.
        weights = weights / largest
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.expand(_num_rows(student), count)


def _no_teacher_grad(teacher: Tensor, owner: str) -> None:
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"teacher must not require grad in {owner}: it gets no gradient; detach it")


def _row_tensors(student: Any, teacher: Any) -> tuple[Optional[Tensor], Optional[Tensor]]:
    return student if isinstance(student, Tensor) else None, teacher if isinstance(teacher, Tensor) else None


def _number(value: Any) -> float:
    return 1.0 if isinstance(value, Tensor) else symbols.as_float(value)


def _num_rows(student: Tensor) -> int:
    # Not Size.numel(), which would pin symbols to the sizes of the moment.
    return math.prod(student.shape[:-1])


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
