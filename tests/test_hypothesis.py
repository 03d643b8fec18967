"""Every loss and the capture on calls that hypothesis draws: shapes, strides, dtypes, values and options together.

The truth is written here once more, in NumPy and fp64, with gradients in closed form: it shares no line with the
package, its reference or its oracle. Bounds are those of a wrong formula, index or stride and not of the last bits,
which the tests of each loss hold. ``KDKERNELS_HYPOTHESIS=deep`` draws 10,000 calls, new ones every time, and not 150
that never change; ``KDKERNELS_HYPOTHESIS=n`` draws n.
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
from kdkernels import backends, testing

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
        phases=[phase for phase in Phase if phase != Phase.explain],
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


def slope_of_teacher(divergence, logp, logq):
    """``df / dlogp`` of each outcome."""
    name, (a, b) = divergence.name, divergence.params()
    p, q = np.exp(logp), np.exp(logq)
    if name == "forward_kl":
        return p * (logp - logq + 1)
    if name == "soft_ce":
        return -p * logq
    if name == "reverse_kl":
        return -q
    if name == "jeffreys":
        return p * (logp - logq + 1) - q
    if name == "mixed_kl":
        return (1 - a) * p * (logp - logq + 1) - a * q
    if name == "triangular":
        return p * (p - q) * (3 * q + p) / np.maximum(p + q, 1e-300) ** 2
    if name == "tvd":
        return p * np.sign(p - q) / 2
    if name == "jsd":
        return a * p * (logp - np.log(a * p + (1 - a) * q))
    if name == "skew_kl":
        m = a * p + (1 - a) * q
        return p * (logp - np.log(m) + 1 - a * p / m)
    if name == "skew_reverse_kl":
        return -q * (1 - a) * p / (a * q + (1 - a) * p)
    return (p ** (a + b) - p**a * q**b) / b


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
        if name == "mixed_kl":
            value = times((1 - a) * p, logp - logq) + times(a * q, logq - logp)
            return value, times(a * q, logq - logp + 1) - (1 - a) * p
        if name == "triangular":
            share = (q - p) / np.maximum(p + q, 1e-300)
            return (q - p) * share, q * share * (3 * p + q) / np.maximum(p + q, 1e-300)
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
    # A term that moves by one rounding of a logit moves by as many as its distance to the largest.
    size = size_of(logp, logq) * (
        1 + np.ptp(np.where(np.isfinite(s), s, s.max(-1, keepdims=True)), -1) / temperature / 8
    )
    terms = np.abs(score)
    if divergence.name == "alpha_beta":
        # Cancelling parts of a score: powers below 1 make more of a probability than it is.
        a, b = divergence.params()
        terms = terms + (p**a * q**b + q ** (a + b)) / a
    unit = (p + q + terms + q * terms.sum(-1, keepdims=True)) / temperature[:, None]
    return Rows(f.sum(-1), grad, size, unit * size[:, None])


def taught(divergence, logp, logq, teacher_temperature, size):
    """The gradient of ``D`` to the teacher's logits, as rows."""
    slope = slope_of_teacher(divergence, logp, logq)
    p, t = np.exp(logp), teacher_temperature[:, None]
    unit = (p + np.exp(logq) + np.abs(slope) + p * np.abs(slope).sum(-1, keepdims=True)) / t * size[:, None]
    return Rows(0 * size, (slope - p * slope.sum(-1, keepdims=True)) / t, size, unit)


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


# The calls that are drawn.


def laid_out(draw, x):
    """The same numbers as a view of another layout: rows that lie apart, in steps, transposed, or off by a few numbers.

    Memory between them is NaN.
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
    st.builds(kd.MixedKL, st.floats(0.0, 1.0)),
    st.builds(kd.AlphaBeta, st.floats(0.25, 1.5), st.floats(0.25, 1.5)),
)
# Where the teacher has no mass.
INFINITE = ("reverse_kl", "jeffreys", "mixed_kl")
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


def slots_of(ids, call):
    return ids.reshape(call.rows, ids.shape[-1]).numpy()


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


def hold(call, student, loss, truth, options, counts, columns, teacher=None, teacher_truth=None):
    """``loss(student)`` and its gradients are the truth, for a ``grad_output`` that is not 1."""
    sums = FP64 if call.dtype == FP64 else FP32
    leaf = student.detach().requires_grad_()
    with testing.poisoned_memory():
        value = loss(leaf)
        none = options["reduction"] == "none"
        grad_output = np.resize([0.5, -2.0, 1.25], call.rows) if none else np.array(-1.5)
        output = torch.as_tensor(grad_output).to(sums)
        wanted = [leaf] if teacher is None else [leaf, teacher]
        output = output.reshape(call.shape) if none else output
        # With kd_weight=0 plain PyTorch has no use for a teacher.
        grads = torch.autograd.grad(value, wanted, output, materialize_grads=True)
    want = reduced(truth, options, call, counts, grad_output)
    assert value.dtype == sums and value.shape == (call.shape if none else ())
    eps = tolerance(call.dtype)
    found = value.detach().double().reshape(-1).numpy()
    error, bound = np.abs(found - np.reshape(want.loss, -1)), eps * (1 + np.abs(want.loss) + want.size)
    assert (error <= bound).all(), f"loss {found}, truth {want.loss}, {(error / bound).max():.3g} of the bound"
    hold_gradient(call, grads[0], leaf, want, counts, columns)
    if teacher is not None:
        hold_gradient(
            call, grads[1], teacher, reduced(teacher_truth, options, call, counts, grad_output), counts, columns
        )


def hold_gradient(call, grad, leaf, want, counts, columns):
    assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
    info = torch.finfo(leaf.dtype)
    grad = rows_of(grad, call)
    assert not grad[:, columns:].any() and not grad[~counts].any(), "rows and columns that do not count have a gradient"
    if want.grad.size:
        error = np.abs(grad[:, :columns] - want.grad)
        # Rounded when it is stored, and once more when grad_output multiplies it.
        eps = max(tolerance(call.dtype), tolerance(leaf.dtype))
        bound = eps * want.unit + 1.5 * info.eps * np.abs(want.grad) + 4 * info.eps * info.smallest_normal
        if call.dtype != FP64:
            bound = bound + 1e-30
        assert (error <= bound).all(), f"gradient: {(error / bound).max():.3g} of the bound, by {error.max():.3g}"


def dense_teacher(draw, call, student, columns):
    """A teacher or several, as they are passed; options; their tempered log-probabilities for rows of temperatures."""
    width = max(columns, call.width + draw(st.sampled_from([0, 0, 3]))) if columns != call.width else call.width
    form = draw(st.sampled_from(["logits", "logits", "log_probs", "probs", "mixture"]))
    count = draw(st.integers(1, 4)) if form == "mixture" else 1
    kinds = [draw(KINDS) for _ in range(count)]
    # Probabilities in fp16 would be 0 here and there, and some divergences infinite.
    dtype = draw(st.sampled_from([FP32, FP64, BF16] if form == "probs" else [call.dtype, *DTYPES]))
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
    taught_rows = None
    # A mixture and probabilities give a teacher's gradient through plain PyTorch alone.
    if isinstance(teacher, torch.Tensor) and not of_teacher and draw(st.booleans()):
        teacher = teacher.detach().requires_grad_()
        logp, logq = teacher_logp(teacher_t), log_softmax(s / t[:, None])
        taught_rows = taught(divergence, logp, logq, teacher_t, size_of(logp, logq) * (1 + np.ptp(s, -1) / t / 8))
        taught_rows = taught_rows.weighted(tau * options.get("kd_weight", 1.0))
    stats = draw(st.booleans())
    options["return_stats"] = stats

    def loss(x):
        found = kd.kd_loss(x, teacher, labels, backend=backend, **options)
        return found[0] if stats else found

    hold(call, student, loss, truth, options, counts, columns, teacher if taught_rows else None, taught_rows)


# Losses of their own. Their truths are as those above: closed forms in NumPy.


def sparse_teacher(draw, call, columns):
    """Ids and log-probabilities of K slots a row, of which some are unused, and an id may stand twice."""
    k = draw(st.integers(1, min(columns, 40)))
    teacher = call.normal(*call.shape, columns) * draw(st.sampled_from([0.5, 3.0]))
    logprobs, ids = torch.log_softmax(teacher, -1).topk(k)
    shuffled = torch.rand(ids.shape, generator=call.generator).argsort(-1)
    ids, logprobs = ids.gather(-1, shuffled), logprobs.gather(-1, shuffled)
    if draw(st.booleans()) and k > 1:
        twice = torch.rand(call.shape, generator=call.generator) < 0.5
        ids[..., 1] = torch.where(twice, ids[..., 0], ids[..., 1])
        # The two together have the mass that there is for them.
        logprobs[..., :2] -= twice[..., None] * 0.7
    unused = torch.rand(ids.shape, generator=call.generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    ids[unused] = -1
    logprobs = logprobs.to(draw(st.sampled_from(DTYPES)))
    logprobs[unused] = torch.nan
    return ids.to(draw(st.sampled_from([torch.int64, torch.int32]))), logprobs


def one_sparse_row(divergence, s, ids, logprobs, tail, t, teacher_t, log_rest, least=0.0):
    """``D`` of one row ``[V]`` over the outcomes of ``tail``, its gradient, size and unit."""
    mass = {}
    for v, lp in zip(ids, logprobs, strict=True):
        if v >= 0:
            mass[v] = np.logaddexp(mass.get(v, -np.inf), lp)
    inside = np.array(sorted(mass), int)
    logp = np.array([mass[v] for v in inside])
    outside = np.setdiff1d(np.arange(len(s)), inside)
    nothing = Rows(0.0, np.zeros_like(s), 1.0, np.zeros_like(s))
    if log_rest is None:
        with np.errstate(divide="ignore"):
            log_rest = np.log(max(0.0, 1 - np.exp(logp).sum()))
    if least:
        log_rest = max(log_rest, np.log(least))
    where = slice(None)
    if tail in ("renormalize", "renormalize_both"):
        if not len(inside):
            return nothing
        logp = log_softmax(logp / teacher_t)
    if tail == "renormalize_both":
        where, full = inside, logp
    elif tail == "uniform":
        full = np.full(len(s), log_rest - np.log(max(len(outside), 1)))
        full[inside] = logp
        full = log_softmax(full / teacher_t)
    else:
        full = np.full(len(s), -np.inf)
        full[inside] = logp
    if tail != "bucket" or not len(outside):
        rows = distilled(divergence, full[None], s[None, where], np.array([t]))
        grad, unit = np.zeros_like(s), np.zeros_like(s)
        grad[where], unit[where] = rows.grad[0], rows.unit[0]
        if tail == "renormalize_both":
            # Plain PyTorch divides by the share of the ids, and what cancels in it leaves its rounding outside them.
            unit += np.exp(log_softmax(s[None] / t)[0]) * rows.size[0] / t
        if tail == "uniform":
            unit[outside] += rows.size[0] / max(len(outside), 1) / t
        return Rows(rows.loss[0], grad, rows.size[0], unit)
    # The outcomes are the ids, and the bucket of all others.
    logq = log_softmax(s[None] / t)[0]
    rest = logq[outside]
    log_bucket = rest.max() + np.log(np.exp(rest - rest.max()).sum())
    lp, lq = np.append(logp, log_rest), np.append(logq[inside], log_bucket)
    f, score = value_and_score(divergence, lp, lq)
    share = np.zeros_like(s)
    share[inside] = score[:-1]
    share[outside] = score[-1] * np.exp(rest - log_bucket)
    q = np.exp(logq)
    size = size_of(lp, lq) * (1 + np.ptp(s) / t / 8)
    unit = (q + np.abs(share) + q * np.abs(score).sum()) / t * size
    unit[inside] += np.exp(logp) / t * size
    # The rest to 1 is known to a rounding of 1.
    unit[outside] += np.exp(rest - log_bucket) / t * size
    return Rows(f.sum(), (share - q * score.sum()) / t, size, unit)


@calls(0.25)
@given(st.data(), a_call(), st.sampled_from(BACKENDS))
def test_topk_kd_loss(data, call, backend):
    draw = data.draw
    sums = FP64 if call.dtype == FP64 else FP32
    student = laid_out(draw, call.logits(draw, draw(KINDS), call.width, call.dtype))
    options, t, tau = soft_options(draw, call, sums)
    columns = call.width
    if draw(st.integers(0, 3)) == 0:
        columns = options["vocab_size"] = draw(st.integers(1, call.width))
    ids, logprobs = sparse_teacher(draw, call, columns)
    tail = options["tail"] = draw(st.sampled_from(["bucket", "renormalize", "renormalize_both", "uniform", "drop"]))
    divergence = draw(DIVERGENCES.filter(lambda d: d.name not in INFINITE or tail not in ("renormalize", "drop")))
    options["divergence"] = divergence
    if divergence.name in INFINITE and tail in ("bucket", "uniform"):
        options["min_tail"] = 1e-3
    teacher_t = t
    if tail in ("bucket", "drop"):
        options["teacher_temperature"], teacher_t = 1.0, np.ones_like(t)
    elif draw(st.booleans()):
        options["teacher_temperature"] = per_row(draw, call, TEMPERATURES, 0.4, 4.0)
        teacher_t = as_rows(options["teacher_temperature"], call, sums)
    rest = None
    if tail in ("bucket", "uniform") and draw(st.booleans()):
        rest = torch.rand(call.shape, generator=call.generator, dtype=FP64).log() - 1
        # A row without entries is all tail.
        rest = options["tail_logprob"] = torch.where((ids >= 0).any(-1), rest, 0.0).to(sums)
    labels = labels_of(draw, call, columns, -100) if draw(st.booleans()) else None
    options |= hard_options(draw, labels) | common_options(draw, call, labels, divergence)
    s = rows_of(student, call)[:, :columns]
    flat_ids, flat_logprobs = slots_of(ids, call), rows_of(logprobs, call)
    log_rest = [None] * call.rows if rest is None else rest.double().reshape(-1).tolist()
    least = options.get("min_tail", 0.0)
    each = [
        one_sparse_row(divergence, s[i], flat_ids[i], flat_logprobs[i], tail, t[i], teacher_t[i], log_rest[i], least)
        for i in range(call.rows)
    ]
    empty = Rows(np.zeros(0), np.zeros((0, columns)), np.zeros(0), np.zeros((0, columns)))
    soft = Rows(*map(np.array, zip(*each, strict=True))) if each else empty
    soft = soft.weighted(tau * options.get("kd_weight", 1.0))
    flat = None if labels is None else labels.reshape(-1).numpy()
    counts = np.ones(call.rows, bool) if flat is None else flat != -100
    smoothing, z = options.get("label_smoothing", 0.0), options.get("z_loss_weight", 0.0)
    truth = added(soft, hard_terms(s, flat, options.get("ce_weight", 0.0), smoothing, z))
    hold(
        call, student, lambda x: kd.topk_kd_loss(x, ids, logprobs, labels, backend=backend, **options), truth, options,
        counts, columns,
    )  # fmt: skip


@calls(0.1)
@given(st.data(), a_call(least=2), st.sampled_from(BACKENDS))
def test_dkd_loss(data, call, backend):
    draw = data.draw
    student = laid_out(draw, call.logits(draw, draw(KINDS), call.width, call.dtype))
    teacher = laid_out(draw, call.logits(draw, draw(KINDS), call.width, draw(st.sampled_from(DTYPES)), student))
    labels = labels_of(draw, call, call.width, -100)
    options = {"alpha": draw(st.sampled_from([0.0, 1.0, 3])), "beta": draw(st.sampled_from([0.0, 1.0, 8.0]))}
    options |= {"temperature": draw(TEMPERATURES), "scale_by_t_squared": draw(st.booleans())}
    if draw(st.booleans()):
        options["teacher_temperature"] = draw(TEMPERATURES)
    t, teacher_t = options["temperature"], options.get("teacher_temperature", options["temperature"])
    options |= common_options(draw, call, labels, None)
    s, p = rows_of(student, call) / t, rows_of(teacher, call) / teacher_t
    flat = labels.reshape(-1).numpy()
    counts, label = flat != -100, np.where(flat == -100, 0, flat)
    others = np.arange(call.width) != label[:, None]
    tau = t * t if options["scale_by_t_squared"] else 1.0

    def parts(x):
        """Log-probabilities of the label and of the rest, and of each of the others among them."""
        logits = np.where(others, x, -np.inf)
        top = logits.max(-1)
        rest = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        own = x[np.arange(len(x)), label]
        return log_softmax(np.stack([own, rest], -1)), logits - rest[:, None]

    (p_two, p_rest), (q_two, q_rest) = parts(p), parts(s)
    target = times(np.exp(p_two), p_two - q_two).sum(-1)
    rest = np.where(others, times(np.exp(p_rest), np.where(others, p_rest, 0) - np.where(others, q_rest, 0)), 0).sum(-1)
    of_two = np.exp(q_two) - np.exp(p_two)
    grad = options["alpha"] * np.where(others, of_two[:, 1:] * np.exp(q_rest), of_two[:, :1])
    grad = grad + options["beta"] * (np.exp(q_rest) - np.exp(p_rest))
    size = tau * (options["alpha"] + options["beta"]) * (4 + np.ptp(s, -1) + np.ptp(p, -1)) ** 2
    loss = tau * (options["alpha"] * target + options["beta"] * rest)
    whole = np.where(others, np.exp(q_rest) + np.exp(p_rest), 1.0)
    truth = Rows(loss, tau / t * grad, size, whole * size[:, None] / t)
    hold(
        call, student, lambda x: kd.dkd_loss(x, teacher, labels, backend=backend, **options), truth, options, counts,
        call.width,
    )  # fmt: skip


@calls(0.1)
@given(st.data(), a_call(), st.sampled_from(BACKENDS))
def test_logit_mse_loss(data, call, backend):
    draw = data.draw
    student = laid_out(draw, call.logits(draw, draw(KINDS), call.width, call.dtype))
    teacher = laid_out(draw, call.logits(draw, draw(KINDS), call.width, draw(st.sampled_from(DTYPES)), student))
    labels = labels_of(draw, call, call.width, -100) if draw(st.booleans()) else None
    options = {"centered": draw(st.booleans())} | common_options(draw, call, labels, None)
    s, p = rows_of(student, call), rows_of(teacher, call)
    difference = s - p
    size = (np.abs(s).max(-1, initial=1) + np.abs(p).max(-1, initial=1)) ** 2
    if options["centered"]:
        difference = difference - difference.mean(-1, keepdims=True)
    counts = np.ones(call.rows, bool) if labels is None else labels.reshape(-1).numpy() != -100
    unit = np.broadcast_to(size[:, None] / call.width, difference.shape)
    truth = Rows((difference**2).mean(-1), 2 / call.width * difference, size, unit)
    hold(
        call, student, lambda x: kd.logit_mse_loss(x, teacher, labels, backend=backend, **options), truth, options,
        counts, call.width,
    )  # fmt: skip


def by_sorting(row, k, temperature):
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))
    logp = log_softmax(row[None] / temperature)[0]
    rest = np.exp(logp[order[k:]])
    return [v if row[v] > -np.inf else -1 for v in order[:k]], logp[order[:k]], rest.sum()


@calls(0.1)
@given(st.data(), a_call(), st.sampled_from(BACKENDS))
def test_capture_topk(data, call, backend):
    draw = data.draw
    logits = call.logits(draw, draw(KINDS), call.width, call.dtype)
    if draw(st.booleans()):
        logits[..., :: draw(st.integers(2, 5))] = -torch.inf
        logits[..., -1] = 1.0
    columns = draw(st.integers(1, call.width)) if draw(st.booleans()) else call.width
    logits[..., columns - 1] = 0.5
    logits = laid_out(draw, logits)
    k = draw(st.integers(1, min(columns, 300)))
    sums = FP64 if call.dtype == FP64 else FP32
    temperature = per_row(draw, call, TEMPERATURES, 0.4, 4.0)
    t = as_rows(temperature, call, sums)
    with testing.poisoned_memory():
        found = kd.capture_topk(logits, k, temperature=temperature, vocab_size=columns, backend=backend)
    assert found.ids.shape == found.logprobs.shape == (*call.shape, k) and found.tail_logprob.shape == call.shape
    ids, logprobs = found.ids.reshape(call.rows, k).tolist(), found.logprobs.double().reshape(call.rows, k).numpy()
    tails, atol = found.tail_logprob.double().reshape(-1).exp().tolist(), 10 * tolerance(call.dtype)
    for i, row in enumerate(rows_of(logits, call)[:, :columns]):
        wanted, logp, rest = by_sorting(row, k, t[i])
        assert ids[i] == wanted
        np.testing.assert_allclose(logprobs[i], logp, rtol=atol, atol=atol)
        np.testing.assert_allclose(tails[i], rest, rtol=1e3 * atol, atol=atol)


@calls(0.1)
@given(st.data(), a_call(dtypes=(FP32, FP64)), st.sampled_from(BACKENDS))
def test_linear_losses(data, call, backend):
    """Hidden states in: the gradients of the head and of the states are products of the one of the logits."""
    draw = data.draw
    sparse, d, divergence = draw(st.booleans()), draw(st.integers(1, 12)), draw(DIVERGENCES)
    width, rows = min(call.width, 600), call.rows
    hidden = laid_out(draw, call.normal(*call.shape, d).to(call.dtype))
    weight, bias = call.normal(width, d).to(call.dtype), call.normal(width).to(call.dtype)
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    with_bias, temperature = draw(st.booleans()), draw(TEMPERATURES)
    options = {"temperature": temperature, "divergence": divergence}
    options["chunk_bytes"] = draw(st.sampled_from([None, 1, 5000, 10**6]))
    labels = labels_of(draw, call, width, -100) if draw(st.booleans()) else None
    options |= hard_options(draw, labels) | common_options(draw, call, labels, divergence)
    if options["reduction"] == "none":
        options["reduction"] = "sum"
    t = np.full(rows, float(temperature))
    h, w = rows_of(hidden, call), weight.double().numpy()
    s = h @ w.T + (bias.double().numpy() if with_bias else 0.0)
    if sparse:
        if divergence.name in INFINITE:
            return
        call = call._replace(width=width)
        ids, logprobs = sparse_teacher(draw, call, width)
        options["tail"], options["teacher_temperature"] = "bucket", 1.0
        flat_ids, flat = slots_of(ids, call), rows_of(logprobs, call)
        each = [one_sparse_row(divergence, s[i], flat_ids[i], flat[i], "bucket", t[i], 1.0, None) for i in range(rows)]
        empty = Rows(np.zeros(0), np.zeros((0, width)), np.zeros(0), np.zeros((0, width)))
        soft = Rows(*map(np.array, zip(*each, strict=True))) if each else empty
    else:
        teacher_d = draw(st.integers(1, 12))
        teacher_hidden = call.normal(*call.shape, teacher_d).to(call.dtype)
        teacher_weight = call.normal(width, teacher_d).to(call.dtype)
        p = rows_of(teacher_hidden, call) @ teacher_weight.double().numpy().T
        soft = distilled(divergence, log_softmax(p / t[:, None]), s, t)
    soft = soft.weighted(t**2 * options.get("kd_weight", 1.0))
    flat_labels = None if labels is None else labels.reshape(-1).numpy()
    smoothing, z = options.get("label_smoothing", 0.0), options.get("z_loss_weight", 0.0)
    truth = added(soft, hard_terms(s, flat_labels, options.get("ce_weight", 0.0), smoothing, z))
    counts = np.ones(rows, bool) if flat_labels is None else flat_labels != -100
    want = reduced(truth, options, call, counts, np.array(1.0))

    leaves = [x.detach().requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]
    keywords = {**options, "student_bias": leaves[2] if with_bias else None, "backend": backend}
    with testing.poisoned_memory():
        if sparse:
            loss = kd.linear_topk_kd_loss(leaves[0], leaves[1], ids, logprobs, labels, **keywords)
        else:
            loss = kd.linear_kd_loss(leaves[0], leaves[1], teacher_hidden, teacher_weight, labels, **keywords)
        grads = torch.autograd.grad(loss, leaves)
    # Sums over rows, columns and hidden numbers.
    eps = tolerance(call.dtype) * 20
    assert abs(loss.item() - want.loss) <= eps * (1 + abs(want.loss) + want.size)
    products = (want.grad @ w, want.grad.T @ h, want.grad.sum(0))
    bounds = (want.unit @ np.abs(w), want.unit.T @ np.abs(h), want.unit.sum(0))
    for leaf, grad, truth_of, bound in zip(leaves, grads, products, bounds, strict=False):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
        error = np.abs(grad.double().numpy().reshape(truth_of.shape) - truth_of)
        assert (error <= eps * (bound + np.abs(truth_of)) + 1e-30).all(), f"off by {error.max():.3g}"
