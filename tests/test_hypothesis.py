"""Every loss and the capture on calls that hypothesis draws: shapes, strides, dtypes, values and options together.

The truth is written here once more, in NumPy and fp64, with gradients in closed form: it shares no line with the package,
its reference or its oracle. Bounds are those of a wrong formula, index or stride and not of the last bits, which the tests
of each loss hold. ``KDKERNELS_HYPOTHESIS=deep`` draws 10,000 calls, new ones every time, and not 150 that never change;
``KDKERNELS_HYPOTHESIS=n`` draws n.
"""

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels import backends, checks, testing

PROFILE = os.environ.get("KDKERNELS_HYPOTHESIS", "150")
DEEP = PROFILE == "deep"
CALLS = 10_000 if DEEP else int(PROFILE)
BACKENDS = tuple(name for name in ("cpu", "torch") if backends.BACKENDS[name].why_not("cpu") is None)

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16, FP64)
# Around the widths of vectors, blocks and tiles, and any small one.
WIDTHS = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129, 255, 257, 300, 1000, 1023, 2047, 2049, 4097, 6145])
)


def calls(share):
    """So many of the calls of a run, the same ones every time unless the run is a deep one."""
    return settings(
        max_examples=max(1, round(CALLS * share)),
        deadline=None,
        derandomize=not DEEP,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=[phase for phase in Phase if phase.name not in os.environ.get("NOPHASE", "explain").split(",")],
        suppress_health_check=list(HealthCheck),
    )


# The truth, in rows of NumPy.


def log_softmax(x):
    with np.errstate(invalid="ignore", divide="ignore"):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))


def times(weight, value):
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, 0.0, weight * value)


def value_and_score(divergence, logp, logq):
    """``f`` and ``df / dlogq`` of each outcome."""
    name, (a, b) = divergence.name, divergence.params()
    p, q = np.exp(logp), np.exp(logq)
    with np.errstate(all="ignore"):
        if name in ("forward_kl", "soft_ce"):
            return -times(p, logq) + (times(p, logp) if name == "forward_kl" else 0.0), -p
        if name == "reverse_kl":
            return times(q, logq - logp), times(q, logq - logp + 1)
        if name == "jeffreys":
            return times(p, logp - logq) + times(q, logq - logp), times(q, logq - logp + 1) - p
        if name == "tvd":
            return np.abs(p - q) / 2, q * np.sign(q - p) / 2
        if name == "jsd":
            logm = np.log(a * p + (1 - a) * q)
            return times(a * p, logp - logm) + times((1 - a) * q, logq - logm), times((1 - a) * q, logq - logm)
        if name == "skew_kl":
            m = a * p + (1 - a) * q
            return times(p, logp - np.log(m)), -times(p, (1 - a) * q / m)
        if name == "skew_reverse_kl":
            m = a * q + (1 - a) * p
            return times(q, logq - np.log(m)), times(q, logq - np.log(m) + 1 - a * q / m)
        assert name == "alpha_beta" and a > 0 and b > 0
        mixed, c = p**a * q**b, a + b
        return -(mixed - a / c * p**c - b / c * q**c) / (a * b), -(mixed - q**c) / a


class Rows(NamedTuple):
    """Losses ``[N]`` and gradients ``[N, V]``, and the sizes of what was added up in each."""

    loss: np.ndarray
    grad: np.ndarray
    size: np.ndarray
    unit: np.ndarray

    def weighted(self, weight):
        return Rows(
            *(np.where(weight == 0, 0, x.T * weight).T for x in self[:2]), *((x.T * abs(weight)).T for x in self[2:])
        )


def size_of(*logs):
    """How much a relative rounding of logits can change: probabilities times their logarithms."""
    return 2 + sum(times(np.exp(x), 2 + np.abs(np.nan_to_num(x, neginf=0.0))).sum(-1) for x in logs)


def distilled(divergence, logp, s, temperature):
    """``D(p, softmax(s / T))`` over ``[N, V]`` and its gradient."""
    logq = log_softmax(s / temperature[:, None])
    f, score = value_and_score(divergence, logp, logq)
    p, q = np.exp(logp), np.exp(logq)
    grad = (score - q * score.sum(-1, keepdims=True)) / temperature[:, None]
    # What moves by one rounding of a logit moves by as many as its distance to the largest.
    size = size_of(logp, logq) * (
        1 + np.ptp(np.where(np.isfinite(s), s, s.max(-1, keepdims=True)), -1) / temperature / 8
    )
    unit = (p + q + np.abs(score) + q * np.abs(score).sum(-1, keepdims=True)) / temperature[:, None]
    return Rows(f.sum(-1), grad, size, unit * size[:, None])


def hard_terms(s, labels, ce_weight, smoothing, z_loss_weight):
    """Weighted cross entropy and z-loss, at temperature 1."""
    logq = log_softmax(s)
    q, n, v = np.exp(logq), *s.shape
    target = np.full((n, v), smoothing / v)
    if labels is not None:
        target[np.arange(n), np.where((labels >= 0) & (labels < v), labels, 0)] += 1 - smoothing
    lse = (s - logq)[np.arange(n), s.argmax(-1)]
    loss = (ce_weight * -times(target, logq).sum(-1) if ce_weight else 0.0) + z_loss_weight * lse**2
    grad = ce_weight * (q - target) + 2 * z_loss_weight * lse[:, None] * q
    size = (ce_weight + z_loss_weight * (1 + np.abs(lse))) * (4 + np.abs(lse) + np.abs(s).mean(-1) + np.ptp(s, -1))
    return Rows(loss + np.zeros(n), grad, size, (q + target) * size[:, None])


def added(*terms):
    return Rows(*(sum(parts) for parts in zip(*terms, strict=True)))


# What is drawn.


def laid_out(draw, x):
    """The same numbers as a view of another layout: rows that lie apart, in steps, transposed, or off by a few numbers.

    What lies between them is NaN.
    """
    kind = draw(st.sampled_from(["contiguous", "padded", "shifted", "stepped", "transposed"]))
    if kind == "padded" and x.dim() > 1:
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + draw(st.integers(1, 9))), torch.nan)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if kind == "shifted":
        flat = x.new_full((x.numel() + 8,), torch.nan)
        view = flat[draw(st.integers(1, 7)) :][: x.numel()].view(x.shape)
        view.copy_(x)
        return view
    if kind == "stepped" and x.dim() > 1:
        wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), torch.nan)
        wide[..., ::2, :] = x
        return wide[..., ::2, :]
    if kind == "transposed" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


class Call(NamedTuple):
    shape: tuple  # of the rows
    width: int
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def rows(self):
        return int(np.prod(self.shape))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=FP64)

    def logits(self, draw, kind, width, dtype, like=None):
        x = self.normal(*self.shape, width) * 3
        if kind == "near" and like is not None:
            near = min(width, like.shape[-1])
            x[..., :near] = like[..., :near].double() + x[..., :near] / 30
        elif kind == "flat":
            x = x * 0
        elif kind == "offset":
            x = x + 40
        elif kind == "peaked":
            x[..., self.width // 2] += 12
        return x.to(dtype)


@st.composite
def a_call(draw, dtypes=DTYPES, least=1):
    shape = draw(st.sampled_from([(1,), (2,), (5,), (17,), (0,), (), (2, 3), (3, 1), (1, 4), (2, 0), (2, 2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return Call(shape, max(least, draw(WIDTHS)), draw(st.sampled_from(dtypes)), generator)


def labels_of(draw, call, columns, ignore_index):
    labels = torch.randint(columns, call.shape, generator=call.generator)
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    labels = torch.where(torch.rand(call.shape, generator=call.generator) < share, ignore_index, labels)
    return labels.to(draw(st.sampled_from([torch.int64, torch.int32])))


KINDS = st.sampled_from(["normal", "near", "flat", "offset", "peaked"])
DIVERGENCES = st.one_of(
    st.sampled_from([cls() for cls in kd.divergences.table().values()]),
    st.builds(kd.JSD, st.floats(0.05, 0.95)),
    st.builds(kd.SkewKL, st.floats(0.05, 0.95)),
    st.builds(kd.SkewReverseKL, st.floats(0.05, 0.95)),
    st.builds(kd.AlphaBeta, st.floats(0.25, 1.5), st.floats(0.25, 1.5)),
)
TEMPERATURES = st.sampled_from([0.5, 0.7, 1, 1.0, 1.5, 2.0, 4.0, 10.0])


def per_row(draw, call, numbers, low, high):
    """A number, one number in a tensor, or one for each row."""
    kind = draw(st.sampled_from(["number", "tensor", "rows"]))
    if kind == "number":
        return draw(numbers)
    dtype = draw(st.sampled_from([FP32, FP64]))
    rows = torch.rand(call.shape if kind == "rows" else (), generator=call.generator, dtype=FP64) * (high - low) + low
    return rows.to(dtype)


def rows_of(x, call):
    return x.detach().double().reshape(call.rows, x.shape[-1]).numpy()


def as_rows(value, call, sums):
    """In the precision that the sums know it in."""
    value = torch.as_tensor(value, dtype=FP64).to(sums).double()
    return (value.reshape(-1) if value.dim() and value.numel() == call.rows else value.expand(call.rows)).numpy()


def common_options(draw, call, labels, divergence):
    """Options that all losses of logits share."""
    options = {}
    if draw(st.booleans()):
        options["row_weight"] = torch.rand(call.shape, generator=call.generator, dtype=FP64).to(FP32) * 2
    options["reduction"] = draw(st.sampled_from(["none", "sum", "mean", "batchmean"][: 4 if len(call.shape) else 3]))
    if options["reduction"] in ("sum", "mean") and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([3, 0.25, 1000.0, torch.tensor(7), torch.tensor(2.5, dtype=FP64)]))
    return options


def soft_options(draw, call, sums):
    """Temperatures and the scale that comes of them."""
    options = {"temperature": per_row(draw, call, TEMPERATURES, 0.4, 4.0)}
    if draw(st.booleans()):
        options["scale_by_t_squared"] = draw(st.booleans())
    t = as_rows(options["temperature"], call, sums)
    tau = t**2 if options.get("scale_by_t_squared", True) else np.ones_like(t)
    return options, t, tau


def hard_options(draw, labels, least=0.0):
    options = {}
    if labels is not None and draw(st.booleans()):
        options["ce_weight"] = draw(st.sampled_from([0.1, 1, 2.0]))
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        options["z_loss_weight"] = draw(st.sampled_from([1e-4, 0.01]))
    if draw(st.booleans()):
        options["kd_weight"] = draw(st.sampled_from([0.0, 0.3, 2]))
    return options


# How it is compared.


def reduced(rows, options, call, counts, grad_output):
    """Losses and gradients as ``reduction`` and its kin have them, for ``grad_output``."""
    weight = counts.astype(float)
    if options.get("row_weight") is not None:
        weight = weight * options["row_weight"].double().reshape(-1).numpy()
    rows = rows.weighted(weight)
    if options["reduction"] == "none":
        return rows._replace(grad=(rows.grad.T * grad_output).T, unit=(rows.unit.T * abs(grad_output)).T)
    divisor = 1.0
    if options.get("normalizer") is not None:
        divisor = float(options["normalizer"])
    elif options["reduction"] == "mean":
        divisor = max(int(counts.sum()), 1)
    elif options["reduction"] == "batchmean":
        divisor = max(call.shape[0], 1)
    factor = float(grad_output) / divisor
    size = rows.size.sum() / divisor
    return Rows(rows.loss.sum() / divisor, rows.grad * factor, size, rows.unit * abs(factor))


def tolerance(dtype):
    """A multiple of the roundings of the sums; kernels use shorter polynomials for 16-bit logits."""
    return {FP64: 1e-12, FP32: 3e-6, BF16: 2e-5, FP16: 2e-5}[dtype]


def hold(call, student, loss, truth, options, counts, columns):
    """``loss(student)`` and its gradient are the truth, for a ``grad_output`` that is not 1."""
    sums = FP64 if call.dtype == FP64 else FP32
    leaf = student.detach().requires_grad_()
    with testing.poisoned_memory():
        value = loss(leaf)
        none = options["reduction"] == "none"
        grad_output = np.resize([0.5, -2.0, 1.25], call.rows) if none else np.array(-1.5)
        output = torch.as_tensor(grad_output).to(sums)
        (grad,) = torch.autograd.grad(value, leaf, output.reshape(call.shape) if none else output)
    want = reduced(truth, options, call, counts, grad_output)
    assert value.dtype == sums and value.shape == (call.shape if none else ())
    assert grad.dtype == call.dtype and grad.shape == student.shape
    eps = tolerance(call.dtype)
    found = value.detach().double().reshape(-1).numpy()
    error, bound = np.abs(found - np.reshape(want.loss, -1)), eps * (1 + np.abs(want.loss) + want.size)
    assert (error <= bound).all(), f"loss {found}, truth {want.loss}, {(error / bound).max():.3g} of the bound"
    info = torch.finfo(call.dtype)
    grad = rows_of(grad, call)
    assert not grad[:, columns:].any() and not grad[~counts].any(), "rows and columns that do not count have a gradient"
    if want.grad.size:
        error = np.abs(grad[:, :columns] - want.grad)
        # Rounded when it is stored, and once more when grad_output multiplies it.
        bound = eps * want.unit + 1.5 * info.eps * np.abs(want.grad) + 4 * info.eps * info.smallest_normal
        if sums != call.dtype:
            bound = bound + 1e-30
        assert (error <= bound).all(), f"gradient: {(error / bound).max():.3g} of the bound, by {error.max():.3g}"


def dense_teacher(draw, call, student, columns):
    """A teacher or several, as they are passed; options; their tempered log-probabilities for rows of temperatures."""
    width = max(columns, call.width + draw(st.sampled_from([0, 0, 3]))) if columns != call.width else call.width
    form = draw(st.sampled_from(["logits", "logits", "log_probs", "probs", "mixture"]))
    count = draw(st.integers(1, 4)) if form == "mixture" else 1
    kinds, dtype = [draw(KINDS) for _ in range(count)], draw(st.sampled_from([call.dtype, *DTYPES]))
    teachers = [call.logits(draw, kind, width, dtype, student) for kind in kinds]
    options = {}
    if form in ("log_probs", "probs"):
        logp = torch.log_softmax(teachers[0].double()[..., :columns], -1)
        given = torch.zeros_like(teachers[0])
        given[..., :columns] = (logp if form == "log_probs" else logp.exp()).to(dtype)
        teachers, options["teacher_form"] = [given], form
    teachers = [laid_out(draw, teacher) for teacher in teachers]
    cap = None
    if form == "logits" and draw(st.integers(0, 4)) == 0:
        cap = options["teacher_softcap"] = draw(st.sampled_from([2.0, 30.0]))
    raw = [rows_of(teacher, call)[:, :columns] for teacher in teachers]
    if cap:
        raw = [cap * np.tanh(x / cap) for x in raw]
    if form == "mixture":
        options["mixture"] = draw(st.sampled_from(["probs", "logits"]))
        weights = None
        if draw(st.booleans()):
            shape = (count,) if draw(st.booleans()) else (*call.shape, count)
            weights = torch.rand(shape, generator=call.generator, dtype=FP64).to(FP32) + 0.1
            options["teacher_weights"] = weights
        weights = np.full(count, 1 / count) if weights is None else weights.double().numpy()
        weights = np.broadcast_to(weights.reshape(-1, count), (call.rows, count))

    def logp(temperature):
        with np.errstate(divide="ignore"):
            x = [np.log(raw[0])] if form == "probs" else raw
        x = [one / temperature[:, None] for one in x]
        if form != "mixture":
            return log_softmax(x[0])
        stacked = np.stack(x, -1)
        if options["mixture"] == "logits":
            return log_softmax((stacked * weights[:, None]).sum(-1))
        share = weights / weights.sum(-1, keepdims=True)
        return np.log((np.exp(log_softmax(np.moveaxis(stacked, -1, 1))) * share[:, :, None]).sum(1))

    return (teachers if form == "mixture" else teachers[0]), options, logp


@calls(0.35)
@given(st.data(), a_call(), st.sampled_from(BACKENDS))
def test_kd_loss(data, call, backend):
    draw = data.draw
    sums = FP64 if call.dtype == FP64 else FP32
    student = laid_out(draw, call.logits(draw, draw(KINDS), call.width, call.dtype))
    options, t, tau = soft_options(draw, call, sums)
    columns = call.width
    if draw(st.integers(0, 3)) == 0:
        columns = options["vocab_size"] = draw(st.integers(1, call.width))
    teacher, of_teacher, teacher_logp = dense_teacher(draw, call, student, columns)
    divergence = options["divergence"] = draw(DIVERGENCES)
    ignore_index = draw(st.sampled_from([-100, -1, 0, 10**12]))
    labels = None
    if draw(st.booleans()) or ignore_index != -100:
        labels = labels_of(draw, call, columns, ignore_index if ignore_index < 2**31 else -100)
        options["ignore_index"] = ignore_index if ignore_index < 2**31 else -100
    hard = hard_options(draw, labels)
    options |= of_teacher | hard | common_options(draw, call, labels, divergence)
    teacher_t = t
    if draw(st.booleans()):
        options["teacher_temperature"] = per_row(draw, call, TEMPERATURES, 0.4, 4.0)
        teacher_t = as_rows(options["teacher_temperature"], call, sums)
    s = rows_of(student, call)[:, :columns]
    if draw(st.integers(0, 4)) == 0:
        options["student_softcap"] = draw(st.sampled_from([2.0, 30.0]))
    cap, slope = options.get("student_softcap"), 1.0
    if cap:
        slope = 1 - np.tanh(s / cap) ** 2
        s = cap * np.tanh(s / cap)
    soft = distilled(divergence, teacher_logp(teacher_t), s, t)
    soft = soft.weighted(tau * options.get("kd_weight", 1.0))
    smoothing, z = options.get("label_smoothing", 0.0), options.get("z_loss_weight", 0.0)
    flat = None if labels is None else labels.reshape(-1).numpy()
    counts = np.ones(call.rows, bool) if flat is None else flat != options.get("ignore_index", -100)
    truth = added(soft, hard_terms(s, flat, options.get("ce_weight", 0.0), smoothing, z))
    truth = truth._replace(grad=truth.grad * slope)
    stats = draw(st.booleans())
    options["return_stats"] = stats

    def loss(x):
        found = kd.kd_loss(x, teacher, labels, backend=backend, **options)
        return found[0] if stats else found

    hold(call, student, loss, truth, options, counts, columns)
