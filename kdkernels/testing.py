"""The oracle of the tests, for users too: any loss held against fp64 truth, with eager PyTorch's own error as the bar.

The formulas are written from the papers, in probabilities, and share no line with ``kdkernels.reference``: a mistake
there is not a mistake here. They compute in the student's dtype, so that one text is the truth (on fp64 copies of the
inputs) and eager PyTorch (on fp32 copies, which is eager at its best for 16-bit inputs). A user checks a call on their
own tensors with::

    kdkernels.testing.check_kd_loss(student, teacher, labels, divergence=kdkernels.JSD(0.3), temperature=2.0)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional, Union
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import checks, divergences
from kdkernels.backends import cpu
from kdkernels.divergences import Divergence
from kdkernels.functional import KDStats, kd_loss, lk_loss
from kdkernels.reference import divergences as reference_divergences

Teacher = Union[Tensor, Sequence[Tensor]]
Loss = Callable[[Tensor, Teacher], Tensor]
Textbook = Callable[[Tensor, Teacher, bool], Tensor]
# The margin on top of eager PyTorch's error, as a multiple of the epsilon of the sums (fp32's for 16-bit inputs)
# times the size of the summands: 2e-6, and 4e-6 for 16-bit inputs, whose exponentials may be shorter.
MARGIN = {torch.float64: 32.0, torch.float32: 16.0, torch.bfloat16: 32.0, torch.float16: 32.0}

KINDS = {
    "normal": "as after some training",
    "near": "a student close to its teacher",
    "equal": "a student that is its teacher",
    "flat": "a student that knows nothing",
    "huge": "logits up to +-1e4",
    "late": "the largest logits stand last, hundreds above the first",
    "peaked": "each is sure of another token",
    "spread": "probabilities over all of fp32's range, denormal numbers included",
    "underflow": "the same tokens are out of fp32's range on both sides",
    "student-inf": "-inf in the student",
    "teacher-inf": "-inf in the teacher",
    "both-inf": "-inf in the same places",
    "mixed-inf": "-inf in different places",
    "one-hot": "a teacher that is -inf but for one token",
}


@contextlib.contextmanager
def float64_anywhere() -> Iterator[None]:
    """Inside, ``backend="torch"`` takes float64 logits on a GPU too: the truth of a test on that GPU.

    Ask for no other backend inside: the kernels of GPUs have no float64.
    """
    with mock.patch.object(checks.dense, "FLOAT64_DEVICES", ("cpu", "cuda", "xpu", "meta")):
        yield


def make_inputs(kind: str, num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits ``[num_rows, vocab_size]`` of one of ``KINDS``, the same on every call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) * scale

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num_rows, vocab_size, generator=generator, dtype=torch.float64) * (high - low) + low

    s, t = normal(3.0), normal(3.0)
    if kind == "near":
        s = t + normal(0.01)
    elif kind == "equal":
        s = t.clone()
    elif kind == "flat":
        s = torch.zeros_like(s)
    elif kind == "huge":
        s, t = uniform(-1e4, 1e4), uniform(-1e4, 1e4)
    elif kind == "late":
        slope = torch.linspace(-300, 300, vocab_size, dtype=torch.float64)
        s, t = s + slope, t + slope
    elif kind == "peaked":
        s[:, vocab_size // 2] += 60
        t[:, vocab_size // 3] += 60
    elif kind == "spread":
        s, t = uniform(-110, 0), uniform(-110, 0)
    elif kind == "underflow":
        s[:, ::2] -= 250
        t[:, ::2] -= 250
    elif kind == "one-hot":
        t = torch.full_like(t, -torch.inf)
        t[:, vocab_size // 2] = 1.0
    if kind in ("student-inf", "both-inf", "mixed-inf"):
        s[:, ::3] = -torch.inf
    if kind in ("teacher-inf", "both-inf", "mixed-inf"):
        t[:, kind == "mixed-inf" :: 3] = -torch.inf
    return s.to(dtype), t.to(dtype)


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value``, 0 where the weight is 0, whatever the value."""
    return weight * torch.where(weight == 0, 0.0, value)


def _kl(p: Tensor, logp: Tensor, m: Tensor) -> Tensor:
    """``KL(p || m)`` of probabilities."""
    return _times(p, logp - torch.where(m > 0, m, 1.0).log()).sum(-1)


def _alpha_beta(a: float, b: float, logp: Tensor, logq: Tensor) -> Tensor:
    both = torch.isneginf(logp) & torch.isneginf(logq)
    x, y = logp.masked_fill(both, 0.0), logq.masked_fill(both, 0.0)
    if a == 0 and b == 0:
        terms = (x - y) ** 2 / 2
    elif a == 0:
        terms = (_times((b * y).exp(), b * (y - x)) - (b * y).exp() + (b * x).exp()) / b**2
    elif b == 0:
        terms = (_times((a * x).exp(), a * (x - y)) - (a * x).exp() + (a * y).exp()) / a**2
    elif a + b == 0:
        terms = (a * (y - x) + (a * (x - y)).exp() - 1) / a**2
    else:
        c = a + b
        mixed = torch.where(
            torch.isneginf(x) | torch.isneginf(y), -torch.inf if min(a, b) > 0 else a * x + b * y, a * x + b * y
        )
        terms = -(mixed.exp() - a / c * (c * x).exp() - b / c * (c * y).exp()) / (a * b)
    return torch.where(both, 0.0, terms).sum(-1)


def textbook_divergence(
    divergence: Divergence, logp: Tensor, logq: Tensor, row_param: Optional[Tensor] = None
) -> Tensor:
    """``D(p, q) [N]`` of log-probabilities ``[N, V]`` by the formula in its class; ``row_param`` is ``[N]``."""
    p, q = logp.exp(), logq.exp()
    name = divergence.name
    w: Any = divergence.params()[0] if row_param is None else row_param[:, None]
    if name == "forward_kl":
        return _times(p, logp - logq).sum(-1)
    if name == "reverse_kl":
        return _times(q, logq - logp).sum(-1)
    if name == "jeffreys":
        return (_times(p, logp - logq) + _times(q, logq - logp)).sum(-1)
    if name == "soft_ce":
        return -_times(p, logq).sum(-1)
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "jsd":
        m = w * p + (1 - w) * q
        return _kl(w * p, logp, m) + _kl((1 - w) * q, logq, m)
    if name == "skew_kl":
        return _kl(p, logp, w * p + (1 - w) * q)
    if name == "skew_reverse_kl":
        return _kl(q, logq, w * q + (1 - w) * p)
    if name == "alpha_beta":
        return _alpha_beta(*divergence.params(), logp, logq)
    if name == "mixed_kl":
        return (_times((1 - w) * p, logp - logq) + _times(w * q, logq - logp)).sum(-1)
    # A newly added divergence has one textbook line, and this is it.
    return reference_divergences.TABLE[name](logp, logq, w, divergence.params()[1])


def _of_options(options: Any, logp: Tensor, logq: Tensor, row_param: Optional[Tensor]) -> Tensor:
    """The number ``[N]`` in the place of ``D(p, q)`` for options of ``kd_loss`` or, with a ``kind``, of ``lk_loss``."""
    p, q = logp.exp(), logq.exp()
    part = options.get("teacher_lse") is not None
    rate, distance = torch.minimum(p, q).sum(-1), 0.5 * (p - q).abs().sum(-1)
    if part:
        distance = 1 - rate
    if options.get("kind") == "hybrid":
        share = torch.exp(-options.get("eta", 3.0) * rate.detach())
        return share * _times(p, logp - logq).sum(-1) + (1 - share) * distance
    if options.get("kind") == "nla":
        floored, near = rate.detach().clamp(min=options.get("eps", 1e-5)), rate > 0.5
        of_far = -floored.log() - (rate - rate.detach()) / floored
        return torch.where(near, -torch.log1p(-torch.where(near, distance, 0.0)), of_far)
    divergence = divergences.resolve(options.get("divergence", "forward_kl"))
    if part and divergence.name == "tvd":
        return distance
    return textbook_divergence(divergence, logp, logq, row_param)


def _capped(logits: Tensor, cap: Optional[float]) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _tempered(logits: Tensor, temperature: Tensor, exact: bool) -> Tensor:
    if exact:
        # A constant per row is nothing to a softmax, and in 1e4 / 0.05 fp64 would round small differences away.
        logits = logits - logits.detach().amax(-1, keepdim=True)
    return logits / temperature[:, None]


def _z_scores(logits: Tensor) -> Tensor:
    variance, mean = torch.var_mean(logits, -1, correction=min(1, logits.shape[-1] - 1), keepdim=True)
    return (logits - mean) / torch.where(variance > 0, variance, 1.0).sqrt()


class Objective(NamedTuple):
    """One call of ``kd_loss`` by the book, for the rows that count ``[M]``: unweighted parts, and ``counts [N]``."""

    counts: Tensor
    divergence: Tensor
    ce: Tensor
    lse: Tensor
    logp: Tensor  # [M, V], tempered
    logq: Tensor
    tau: Tensor  # what multiplies the divergence
    temperature: Tensor
    teacher_temperature: Tensor


def textbook_objective(
    student: Tensor, teacher: Teacher, labels: Optional[Tensor] = None, *, exact: bool = False, **options: Any
) -> Objective:
    """The parts of ``kdkernels.kd_loss`` for its options; backend and reduction are of no concern here.

    ``exact`` takes the maximum off the logits before they are divided by the temperature, as the truth must.
    """
    get = options.get
    dtype, width = student.dtype, get("vocab_size") or student.shape[-1]
    student = student.reshape(-1, student.shape[-1])
    counts = torch.ones(len(student), dtype=torch.bool, device=student.device)
    if labels is not None:
        counts = labels.reshape(-1) != get("ignore_index", -100)

    def rows(value: Any, default: Any = 1.0) -> Tensor:
        value = default if value is None else value
        value = torch.as_tensor(value, dtype=dtype, device=student.device)
        return (value.reshape(-1) if value.numel() == len(counts) else value.expand(len(counts)))[counts]

    def logits(tensor: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        rows = tensor.reshape(-1, tensor.shape[-1])[counts, :width].to(dtype)
        return rows if bias is None else rows + bias.to(dtype)[:width]

    def of_columns(teacher: Tensor) -> Tensor:
        columns = get("teacher_columns")
        if columns is None:
            return teacher
        nothing = 0.0 if get("teacher_form") in ("probs", "unnormalized_probs") else -torch.inf
        return torch.where(columns >= 0, teacher[..., columns.clamp(min=0)], nothing)

    temperature = rows(get("temperature"))
    teacher_temperature = rows(get("teacher_temperature"), get("temperature", 1.0))
    scores: Callable[[Tensor], Tensor] = _z_scores if get("standardize") else (lambda x: x)
    s = _capped(logits(student, get("student_bias")), get("student_softcap"))
    free = get("student_form") == "log_probs"
    logq = s if free else torch.log_softmax(_tempered(scores(s), temperature, exact), -1)

    teachers = [of_columns(t) for t in ([teacher] if isinstance(teacher, Tensor) else teacher)]
    teacher_bias = get("teacher_bias")
    as_logits = [
        logits(t.log(), teacher_bias)
        if get("teacher_form") in ("probs", "unnormalized_probs")
        else _capped(logits(t, teacher_bias), get("teacher_softcap"))
        for t in teachers
    ]
    tempered = [_tempered(scores(t), teacher_temperature, exact) for t in as_logits]
    if get("teacher_lse") is not None:
        logp = as_logits[0] / teacher_temperature[:, None] - rows(get("teacher_lse"))[:, None]
    elif isinstance(teacher, Tensor):
        logp = torch.log_softmax(tempered[0], -1)
    else:
        weights = get("teacher_weights")
        weights = [1 / len(teachers)] * len(teachers) if weights is None else weights
        weights = torch.as_tensor(weights, dtype=dtype, device=student.device).reshape(-1, len(teachers))
        weights = weights.expand(len(counts), -1)[counts]
        stacked = torch.stack(tempered, -1)  # [M, V, K]
        if get("mixture") == "logits":
            weighed = _times(weights[:, None], stacked)
            weighed = torch.where(torch.isneginf(stacked) & (weights[:, None] != 0), -torch.inf, weighed)
            logp = torch.log_softmax(weighed.sum(-1), -1)
        else:
            weights = weights / weights.sum(-1, keepdim=True)
            logp = _times(weights[:, None], torch.softmax(stacked, 1)).sum(-1).log()

    d = _of_options(options, logp, logq, None if get("row_param") is None else rows(get("row_param")))
    ce = torch.zeros_like(d)
    if labels is not None:
        smoothing = get("label_smoothing", 0.0)
        classes = labels.reshape(-1)[counts].long()
        if free:
            ce = (1 - smoothing) * F.nll_loss(s, classes, reduction="none") - smoothing * s.mean(-1)
        else:
            ce = F.cross_entropy(s, classes, label_smoothing=smoothing, reduction="none")
    tau = temperature**2 if get("scale_by_t_squared", True) else torch.ones_like(temperature)
    return Objective(counts, d, ce, torch.logsumexp(s, -1), logp, logq, tau, temperature, teacher_temperature)


def _weighted_rows(value: Tensor, counts: Tensor, row_weight: Any) -> Tensor:
    rows = torch.zeros(len(counts), dtype=value.dtype, device=value.device).masked_scatter(counts, value)
    if row_weight is None:
        return rows
    return rows * torch.as_tensor(row_weight, dtype=value.dtype, device=value.device).reshape(-1)


def _term_weight(options: Any, name: str, counts: Tensor) -> Any:
    """A number, or one value for every row that counts."""
    weight = options.get(name, 1.0 if name == "kd_weight" else 0.0)
    return weight.reshape(-1).double().expand(len(counts))[counts] if isinstance(weight, Tensor) else weight


def _weighs(weight: Any) -> bool:
    return isinstance(weight, Tensor) or bool(weight)


def textbook_loss(student: Tensor, teacher: Teacher, labels: Optional[Tensor] = None, **options: Any) -> Tensor:
    """``kdkernels.kd_loss(student, teacher, labels, **options)`` by the book, computed in the student's dtype.

    Autograd gives its gradients. Only for valid calls: nothing is checked.
    """
    parts = textbook_objective(student, teacher, labels, **options)
    rows = torch.zeros_like(parts.divergence)
    for name, value in (
        ("kd_weight", parts.tau * parts.divergence),
        ("ce_weight", parts.ce),
        ("z_loss_weight", parts.lse**2),
    ):
        weight = _term_weight(options, name, parts.counts)
        if _weighs(weight):
            rows = rows + weight * value
    return reduce_rows(_weighted_rows(rows, parts.counts, options.get("row_weight")), parts.counts, student, **options)


def reduce_rows(rows: Tensor, counts: Tensor, student: Tensor, **options: Any) -> Tensor:
    """``reduction`` and ``normalizer`` of ``kd_loss`` for losses ``[N]`` of which ``counts [N]`` count."""
    reduction, normalizer = options.get("reduction", "mean"), options.get("normalizer")
    if reduction == "none":
        return rows.reshape(student.shape[:-1])
    if normalizer is not None:
        return rows.sum() / normalizer
    if reduction == "mean":
        return rows.sum() / max(int(counts.sum()), 1)
    return rows.sum() / student.shape[0] if reduction == "batchmean" else rows.sum()


def textbook_stats(student: Tensor, teacher: Teacher, labels: Optional[Tensor] = None, **options: Any) -> KDStats:
    """The statistics of ``return_stats=True``, by the formulas in ``kdkernels.KDStats``, in the student's dtype."""
    with torch.no_grad():
        parts = textbook_objective(student, teacher, labels, **options)
        p, q = parts.logp.exp(), parts.logq.exp()
        columns = (
            parts.divergence,
            parts.ce,
            parts.lse,
            textbook_divergence(divergences.ForwardKL(), parts.logp, parts.logq),
            textbook_divergence(divergences.ReverseKL(), parts.logp, parts.logq),
            -_times(p, parts.logp).sum(-1),
            -_times(q, parts.logq).sum(-1),
            (p.argmax(-1) == q.argmax(-1)).to(p.dtype),
            torch.minimum(p, q).sum(-1),
        )
        return KDStats(*(_weighted_rows(column, parts.counts, None).reshape(student.shape[:-1]) for column in columns))


class Unit(NamedTuple):
    """The change that a relative rounding error of 1 makes in each row ``[N]``: the condition of the sums, in fp64."""

    loss: Tensor
    dstudent: Tensor
    dteacher: Tensor


def rounding_unit(
    student: Tensor, teacher: Teacher, labels: Optional[Tensor] = None, *, epsilon: float, **options: Any
) -> Unit:
    """The unit of ``MARGIN`` for a call of ``kd_loss`` on fp64 inputs, of which ``epsilon`` will be allowed.

    With ``score = dD/dlogq`` and ``dual = dD/dlogp`` the divergence is known to as many roundings as
    ``sum |score logq| + |dual logp| + p + q``, an element of its gradient to the largest of those terms. The rest of
    the objective are simple sums.
    """
    get = options.get
    parts = textbook_objective(student.detach(), teacher, labels, **options)
    divergence = divergences.resolve(get("divergence", "forward_kl"))
    row_param = get("row_param")
    if row_param is not None:
        row_param = torch.as_tensor(row_param).reshape(-1).expand(len(parts.counts))[parts.counts].double()
    logp, logq = parts.logp.detach().requires_grad_(), parts.logq.detach().requires_grad_()
    with torch.enable_grad():
        d = _of_options(options, logp, logq, row_param)
        dual, score = torch.autograd.grad(d.sum(), (logp, logq), allow_unused=True, materialize_grads=True)
    logp, logq = logp.detach(), logq.detach()
    p, q = logp.exp(), logq.exp()
    far_p, far_q = 1 + _finite(logp).abs(), 1 + _finite(logq).abs()
    of_q, of_p = _finite(score).abs() * far_q, _finite(dual).abs() * far_p
    size = of_p + of_q + p * far_p + q * far_q
    cancelled = 1.0
    if divergence.name == "alpha_beta":
        a, b = divergence.params()
        powers = torch.stack([a * logp + b * logq, (a + b) * logp, (a + b) * logq]).exp().sum(0)
        size = size + _finite(powers) * torch.maximum(far_p, far_q)
        cancelled = abs(a * b) or a * a or b * b or 1.0
    in_s, in_t = size.amax(-1) + q.amax(-1) * of_q.sum(-1), size.amax(-1) + p.amax(-1) * of_p.sum(-1)
    if divergence.name == "tvd" or "kind" in options:
        # Where p and q agree to rounding, either sign of q - p is right.
        undecided = (logp - logq).abs() <= 2 * epsilon * (far_p + far_q)
        steep = 1 / torch.minimum(p, q).sum(-1).clamp(min=get("eps", 1e-5)) if get("kind") == "nla" else 1.0
        in_s = in_s + steep * (q * undecided).sum(-1) / epsilon
        in_t = in_t + steep * (p * undecided).sum(-1) / epsilon

    scale = _term_weight(options, "kd_weight", parts.counts) * parts.tau
    loss = scale * (size.sum(-1) / cancelled + _finite(d.detach()).abs())
    dstudent, dteacher = scale / parts.temperature * in_s, scale / parts.teacher_temperature * in_t
    width = get("vocab_size") or student.shape[-1]
    s = student.reshape(-1, student.shape[-1])[parts.counts, :width]
    if get("standardize"):
        dstudent, dteacher = dstudent / _deviation(s), dteacher / _deviation(s)
        if isinstance(teacher, Tensor):
            t = teacher.reshape(-1, teacher.shape[-1])[parts.counts, :width]
            dteacher = dteacher * _deviation(s) / _deviation(t)
    ce, z_loss = (_term_weight(options, name, parts.counts) for name in ("ce_weight", "z_loss_weight"))
    hard = ce + 2 * z_loss * parts.lse.abs()
    of_label = parts.ce.abs() if _weighs(ce) else 0.0
    loss = loss + hard * (1 + parts.lse.abs() + of_label + _finite(s).abs().mean(-1))
    rows = (_weighted_rows(_finite(x), parts.counts, get("row_weight")) for x in (loss, dstudent + hard, dteacher))
    return Unit(*(row.abs() for row in rows))


def _deviation(logits: Tensor) -> Tensor:
    return logits.std(-1, correction=0).clamp(min=1e-30)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, 0.0, 0.0, 0.0)


class Outcome(NamedTuple):
    """A loss and what it gave to student and teacher; no gradient is None."""

    loss: Tensor
    dstudent: Optional[Tensor]
    dteacher: Optional[Tensor]


def evaluate(loss: Loss, student: Tensor, teacher: Teacher, grad_output: Optional[Tensor] = None) -> Outcome:
    """Forward and backward; the teacher gets a gradient where it is one tensor that requires grad."""
    student = student.detach().requires_grad_()
    wants = [student]
    if isinstance(teacher, Tensor) and teacher.requires_grad:
        teacher = teacher.detach().requires_grad_()
        wants.append(teacher)
    value = loss(student, teacher)
    grads = torch.autograd.grad(value, wants, None if grad_output is None else grad_output.to(value.dtype))
    return Outcome(value.detach(), grads[0], grads[1] if len(grads) > 1 else None)


def to_dtype(teacher: Teacher, dtype: torch.dtype) -> Any:
    """A copy of one or several tensors in another dtype, which require grad where the originals do."""
    if isinstance(teacher, Tensor):
        return teacher.detach().to(dtype).requires_grad_(teacher.requires_grad)
    return [to_dtype(t, dtype) for t in teacher]


def allowed_epsilon(dtype: torch.dtype) -> float:
    """``MARGIN`` as a relative error."""
    return MARGIN[dtype] * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


class Oracle:
    """The truth about one loss per row, and how far eager PyTorch is from it.

    Args:
        textbook: ``textbook(student, teacher, exact) -> [..., rows]``, which computes in the student's dtype.
            ``exact`` is true for the truth, false for what people write.
        student, teacher: the inputs. The teacher's gradient is compared where it is one tensor that requires grad.
        unit: what a relative rounding error of 1 changes; see ``rounding_unit``.
        doubtful: rows ``[N]`` whose loss may also be infinite, with any gradient.
        grad_output: for the loss, of its shape; a random one in [-2, -0.5] or [0.5, 2] by default.
    """

    def __init__(
        self,
        textbook: Textbook,
        student: Tensor,
        teacher: Teacher,
        unit: Unit,
        *,
        grad_output: Optional[Tensor] = None,
        doubtful: Optional[Tensor] = None,
    ) -> None:
        if grad_output is None:
            generator = torch.Generator().manual_seed(student.numel())
            sign = torch.randint(0, 2, student.shape[:-1], generator=generator) * 2 - 1
            grad_output = (sign * 2 ** (torch.rand(student.shape[:-1], generator=generator) * 2 - 1)).to(student.device)
        self.student, self.teacher, self.unit, self.grad_output = student, teacher, unit, grad_output
        self.doubtful = doubtful
        self.sums = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.truth = evaluate(
            lambda s, t: textbook(s, t, True),
            to_dtype(student, torch.float64),
            to_dtype(teacher, torch.float64),
            grad_output,
        )
        self.eager = evaluate(
            lambda s, t: textbook(s, t, False), to_dtype(student, self.sums), to_dtype(teacher, self.sums), grad_output
        )

    def check(self, loss: Loss) -> Outcome:
        """Compare ``loss(student, teacher)`` and its gradients.

        A row's error must be at most the largest error of eager PyTorch on any of the rows, plus ``MARGIN`` epsilons
        of ``unit``; an element of a gradient may also be off by one unit in the last place of its dtype, for it is
        rounded once when it is stored and once when ``backward`` multiplies it by ``grad_output``. A loss must be
        infinite or NaN where the truth is; a gradient of an infinite loss counts only where its row has a finite one.

        Raises:
            AssertionError: with the row, its error and the bound.
        """
        outcome = evaluate(loss, self.student, self.teacher, self.grad_output)
        assert outcome.loss.dtype == self.sums, f"the loss is {outcome.loss.dtype}, not {self.sums}"
        assert outcome.loss.shape == self.student.shape[:-1], f"the loss has shape {tuple(outcome.loss.shape)}"
        epsilon = allowed_epsilon(self.student.dtype)
        factor = self.grad_output.reshape(-1).abs().double()
        exempt = torch.isinf(self.truth.loss.reshape(-1)) & torch.isinf(outcome.loss.reshape(-1))
        losses = [x.loss.reshape(-1, 1) for x in (outcome, self.eager, self.truth)]
        if self.doubtful is not None:
            infinite = self.doubtful & torch.isinf(outcome.loss.reshape(-1))
            losses = [x.masked_fill(infinite[:, None], torch.inf) for x in losses]
            exempt = exempt | infinite
        _assert_close("loss", losses, epsilon * self.unit.loss, rounding=None)
        grads = [("dstudent", self.student, self.unit.dstudent, 1)]
        if outcome.dteacher is not None:
            assert isinstance(self.teacher, Tensor)
            grads.append(("dteacher", self.teacher, self.unit.dteacher, 2))
        for name, tensor, unit, index in grads:
            grad, eager, truth = outcome[index], self.eager[index], self.truth[index]
            assert grad is not None and eager is not None and truth is not None
            assert grad.dtype == tensor.dtype, f"{name} is {grad.dtype}, not {tensor.dtype}"
            assert grad.shape == tensor.shape, f"{name} has shape {tuple(grad.shape)}, not {tuple(tensor.shape)}"
            rows = [x.reshape(-1, tensor.shape[-1]) for x in (grad, eager.to(tensor.dtype), truth)]
            nowhere = exempt & ~torch.isfinite(rows[2]).all(-1)
            if self.doubtful is not None:
                nowhere = nowhere | infinite
            rows = [x.masked_fill(nowhere[:, None], 0.0) for x in rows]
            _assert_close(name, rows, epsilon * factor * unit, rounding=tensor.dtype)
        return outcome


def _assert_close(name: str, rows: list[Tensor], margin: Tensor, rounding: Optional[torch.dtype]) -> None:
    """``rows`` are what came, what eager gave and the truth in fp64, each ``[N, M]``; ``margin`` is ``[N]``."""
    got, eager, truth = rows
    if truth.numel() == 0:
        return
    error, of_eager = _error(got, truth), _error(eager, truth)
    bound = (_finite(of_eager).max() + margin)[:, None]
    if rounding is not None:
        info = torch.finfo(rounding)
        bound = bound + info.eps * _finite(truth).abs() + info.eps * info.smallest_normal
    # An error that is NaN fails.
    bad = ~(error <= bound)
    if bool(bad.any()):
        row, column = divmod(
            int(torch.where(bad, error - bound, -torch.inf).nan_to_num(torch.inf).argmax()), truth.shape[1]
        )
        raise AssertionError(
            f"{name}[{row}, {column}] is {got[row, column].item():.9g}, truth {truth[row, column].item():.9g}: "
            f"error {error[row, column].item():.3g} > {bound[row, column].item():.3g} "
            f"(eager PyTorch's largest {_finite(of_eager).max().item():.3g}, margin {margin[row].item():.3g}); "
            f"{int(bad.any(1).sum())} of {len(bad)} rows are wrong"
        )


def _error(got: Tensor, truth: Tensor) -> Tensor:
    got = got.double()
    same = (got == truth) | (torch.isnan(got) & torch.isnan(truth))
    return torch.where(same, 0.0, (got - truth).abs())


def kd_oracle(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor] = None,
    *,
    grad_output: Optional[Tensor] = None,
    **options: Any,
) -> Oracle:
    """The oracle of ``kd_loss`` with ``reduction="none"``."""
    options = {**options, "reduction": "none"}
    epsilon = allowed_epsilon(student.dtype)
    lost: dict[str, Tensor] = {}
    doubtful = None
    if isinstance(teacher, Tensor) and student.dtype != torch.float64 and options.get("teacher_columns") is None:
        parts = textbook_objective(student.double(), teacher.double(), labels, exact=True, **options)
        lost = _lost(parts, student, teacher)
        doubtful = lost["student"].any(-1) | lost["teacher"].any(-1)

    def textbook(student: Tensor, teacher: Teacher, exact: bool) -> Tensor:
        if exact and lost and isinstance(teacher, Tensor):
            student = student.masked_fill(lost["student"].reshape(student.shape), -torch.inf)
            nothing = 0.0 if options.get("teacher_form") in ("probs", "unnormalized_probs") else -torch.inf
            teacher = teacher.masked_fill(lost["teacher"].reshape(teacher.shape), nothing)
        return textbook_loss(student, teacher, labels, exact=exact, **options)

    copies = to_dtype(student, torch.float64), to_dtype(teacher, torch.float64)
    unit = rounding_unit(*copies, labels, epsilon=epsilon, **options)
    return Oracle(textbook, student, teacher, unit, grad_output=grad_output, doubtful=doubtful)


def _lost(parts: Objective, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Where one side is 0 and the other less than fp32's smallest normal number: infinitely much of nothing, or 0."""
    tiny = torch.finfo(torch.float32).smallest_normal
    p, q = parts.logp.exp(), parts.logq.exp()
    masks = {
        "student": (q < tiny) & torch.isneginf(parts.logp) & ~torch.isneginf(parts.logq),
        "teacher": (p < tiny) & torch.isneginf(parts.logq) & ~torch.isneginf(parts.logp),
    }
    lost = {}
    for name, tensor in (("student", student), ("teacher", teacher)):
        lost[name] = torch.zeros(len(parts.counts), tensor.shape[-1], dtype=torch.bool, device=tensor.device)
        lost[name][parts.counts, : p.shape[1]] = masks[name]
    return lost


def check_kd_loss(
    student: Tensor, teacher: Teacher, labels: Optional[Tensor] = None, *, backend: str = "auto", **options: Any
) -> Outcome:
    """Hold ``kd_loss(student, teacher, labels, **options)`` row by row against the truth; ``reduction`` is "none".

    With a ``kind`` among the options it is ``lk_loss``.

    Raises:
        AssertionError: where loss or gradient are worse than ``Oracle.check`` allows.
    """
    dim = options.pop("dim", -1)
    moved = [x.movedim(dim, -1) for x in ([student, teacher] if isinstance(teacher, Tensor) else [student, *teacher])]
    oracle = kd_oracle(moved[0], moved[1] if isinstance(teacher, Tensor) else moved[1:], labels, **options)
    options = {**options, "reduction": "none", "backend": backend}
    if dim != -1:
        options["dim"] = dim
    loss: Any = lk_loss if "kind" in options else kd_loss

    def as_given(x: Any) -> Any:
        if dim == -1:
            return x
        return x.movedim(-1, dim).contiguous() if isinstance(x, Tensor) else [as_given(item) for item in x]

    return oracle.check(lambda s, t: loss(as_given(s), as_given(t), labels, **options))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it ``torch.empty`` and its kin return NaN, so that a kernel that forgets to write an output shows.

    So do the outputs that the compiled CPU backend makes.
    """
    memory: Any = torch.utils.deterministic
    before = memory.fill_uninitialized_memory
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    compiled = cpu.load_error() is None
    if compiled:
        torch.ops.kdkernels.poison_memory(True)
    try:
        yield
    finally:
        if compiled:
            torch.ops.kdkernels.poison_memory(False)
        memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
