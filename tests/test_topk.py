"""topk_kd_loss against an fp64 oracle written here, row by row: the sparse teacher spread over the vocabulary."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import backends, checks, ops, testing
from kdkernels.objective import Tail

BACKENDS = ("torch", "cpu")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIVERGENCES = {
    **{name: cls() for name, cls in kd.divergences.table().items()},
    "jsd0.1": kd.JSD(0.1),
    "ab_b<0": kd.AlphaBeta(1.5, -0.5),
    "ab_a=0": kd.AlphaBeta(0.0, 1.0 / 3),
    "ab_b=0": kd.AlphaBeta(0.5, 0.0),
    "ab_a+b=0": kd.AlphaBeta(0.5, -0.5),
    "ab_0": kd.AlphaBeta(0.0, 0.0),
}
# Divergences that are infinite where the teacher has no mass and the student has some.
NEEDS_TEACHER = ("reverse_kl", "jeffreys", "mixed_kl", "ab_a=0", "ab_a+b=0", "ab_0")
TAILS_WITHOUT_TEACHER = ("renormalize", "drop")
CASES = [
    pytest.param(tail, name, id=f"{tail}-{name}")
    for tail in get_args(Tail)
    for name in DIVERGENCES
    if not (tail in TAILS_WITHOUT_TEACHER and name in NEEDS_TEACHER)
]
KL_CASES = [case for case in CASES if case.values[1] in ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_reverse_kl")]


def needs_backend(name):
    reason = backends.BACKENDS[name].why_not("cpu")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=BACKENDS)
def backend(request):
    needs_backend(request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """An output that is not written shows."""
    with testing.poisoned_memory():
        yield


def infinite_without_teacher(divergence):
    if divergence.name == "alpha_beta":
        alpha, beta = divergence.params()
        return alpha <= 0 or alpha + beta <= 0
    return divergence.name in ("reverse_kl", "jeffreys", "mixed_kl")


def rounding_of_mass(logp, dtype):
    """The rounding of ``1 - sum p`` for log-probabilities of that dtype; as the docstring says."""
    eps = torch.finfo(dtype).eps
    return min(eps, 2.0**-23) + eps / 2 * math.fsum(math.exp(x) * abs(x) for x in logp.tolist())


def row_divergence(s, ids, logprobs, tail, divergence, temperature, teacher_temperature, log_rest=None, min_tail=None):
    """``D`` of one row of logits ``[V]``, computed in its dtype."""
    logq = torch.log_softmax(s / temperature, -1)
    mass = {}
    for v, lp in zip(ids.tolist(), logprobs.double().tolist(), strict=True):
        if v != -1 and not lp < -9000:
            mass.setdefault(v, []).append(lp)
    inside = torch.tensor(sorted(mass), dtype=torch.long)
    outside = torch.tensor([v for v in range(len(s)) if v not in mass], dtype=torch.long)
    sums = (mass[v][0] if len(mass[v]) == 1 else math.log(math.fsum(map(math.exp, mass[v]))) for v in sorted(mass))
    logp = torch.tensor(list(sums), dtype=torch.float64)
    floor = min_tail
    if floor is None:
        floor = rounding_of_mass(logp, logprobs.dtype) if log_rest is None else 0.0
    if log_rest is None:
        log_rest = torch.tensor(max(0.0, 1 - math.fsum(logp.exp().tolist())), dtype=torch.float64).log()
    if floor and infinite_without_teacher(divergence):
        log_rest = log_rest.clamp(min=math.log(floor))
    if not mass:
        log_rest = torch.zeros((), dtype=torch.float64)

    def total(logp, logq):
        return testing.textbook_divergence(divergence, logp[None], logq[None])[0]

    if tail == "drop":
        full = torch.full_like(logq, -torch.inf).index_put((inside,), logp.to(logq))
        return total(full, logq)
    if tail == "bucket":
        if not len(outside):
            return total(logp.to(logq), logq)
        logq_rest = torch.logsumexp(logq[outside], 0, keepdim=True)
        return total(torch.cat([logp, log_rest.reshape(1)]).to(logq), torch.cat([logq[inside], logq_rest]))
    if tail == "uniform":
        full = torch.full((len(s),), float(log_rest) - math.log(max(len(outside), 1)), dtype=torch.float64)
        full[inside] = logp
        return total(torch.log_softmax(full / teacher_temperature, -1).to(logq), logq)
    if not mass or logp.max() == -torch.inf:
        return 0.0 * s.nan_to_num().sum()
    logp = torch.log_softmax(logp / teacher_temperature, -1).to(logq)
    if tail == "renormalize_both":
        return total(logp, torch.log_softmax(s[inside] / temperature, -1))
    return total(torch.full_like(logq, -torch.inf).index_put((inside,), logp), logq)


def oracle(s, ids, logprobs, labels=None, *, tail, divergence, temperature=1.0, teacher_temperature=None, **options):
    """Loss of each row ``[N]`` in the dtype of ``s``."""
    columns = options.get("vocab_size") or s.shape[-1]
    cap, rows = options.get("student_softcap"), []
    for i in range(len(s)):
        if labels is not None and labels[i] == -100:
            rows.append(s.new_zeros(()))
            continue
        row = s[i, :columns]
        row = cap * torch.tanh(row / cap) if cap else row
        t = float(temperature[i]) if isinstance(temperature, torch.Tensor) else temperature
        tt = t if teacher_temperature is None else teacher_temperature
        log_rest = None if options.get("tail_logprob") is None else options["tail_logprob"][i].double()
        loss = row.new_zeros(())
        if options.get("kd_weight", 1.0):
            min_tail = options.get("min_tail")
            loss = row_divergence(row, ids[i], logprobs[i], tail, divergence, t, tt, log_rest, min_tail)
            loss = loss * options.get("kd_weight", 1.0)
        loss = loss * (t * t if options.get("scale_by_t_squared", True) else 1.0)
        if options.get("ce_weight"):
            smoothing = options.get("label_smoothing", 0.0)
            loss = loss + options["ce_weight"] * F.cross_entropy(row, labels[i], label_smoothing=smoothing)
        if options.get("z_loss_weight"):
            loss = loss + options["z_loss_weight"] * torch.logsumexp(row, -1) ** 2
        rows.append(loss if options.get("row_weight") is None else loss * float(options["row_weight"][i]))
    return torch.stack(rows)


def evaluate(loss, s, grad_output):
    s = s.detach().requires_grad_()
    value = loss(s)
    value.backward(grad_output.to(value.dtype))
    return value.detach(), s.grad


def check(s, ids, logprobs, labels=None, *, backend, **options):
    """Errors are at most those of the textbook in the dtype of sums, plus a margin, and roundings of the gradient."""
    divergence = kd.divergences.resolve(options.pop("divergence"))
    sums = torch.float64 if s.dtype == torch.float64 else torch.float32
    grad_output = torch.linspace(-1.5, 2.0, len(s)).double()

    def textbook(x):
        return oracle(x, ids, logprobs, labels, divergence=divergence, **options)

    truth, dtruth = evaluate(textbook, s.double(), grad_output)
    eager, deager = evaluate(textbook, s.to(sums), grad_output)
    arguments = {**options, "divergence": divergence, "reduction": "none", "backend": backend}
    if "row_weight" in arguments:
        arguments["row_weight"] = arguments["row_weight"].to(sums)
    loss, grad = evaluate(lambda x: kd.topk_kd_loss(x, ids, logprobs, labels, **arguments), s, grad_output)
    assert loss.dtype == sums and grad.dtype == s.dtype
    # Kernels use a polynomial of lower degree for 16-bit logits; log p and log q are as large as the logits.
    size = 2 + s.double().nan_to_num().abs().amax() / 4
    epsilon = torch.finfo(sums).eps * (256 if s.dtype.itemsize == 2 else 64) * size
    finite = torch.isfinite(truth)
    assert torch.equal(loss[~finite].double(), truth[~finite]), "infinite losses differ"
    if not bool(finite.any()):
        return loss, grad
    truth, dtruth, weight = truth[finite], dtruth[finite], 1 + truth[finite].abs()
    error, margin = (loss.double()[finite] - truth).abs(), (eager.double()[finite] - truth).abs().nan_to_num().max()
    assert bool((error <= margin + epsilon * weight).all()), f"loss {loss}: error {error}"
    error, margin = (grad.double()[finite] - dtruth).abs(), (deager.double()[finite] - dtruth).abs().nan_to_num().max()
    # The terms that cancel are of the size of p and q: on the set that of the row, outside that of each one's share, at
    # T and, for cross entropy, at 1.
    columns = s.shape[-1]
    slots = torch.where(ids < 0, columns, ids)[finite].long()
    outside = F.pad(s.double()[finite].nan_to_num(), (0, 1), value=-1e4).scatter(1, slots, -1e4)
    temperature = torch.as_tensor(options.get("temperature", 1.0)).double().expand(len(s))[finite].unsqueeze(-1)
    share = torch.maximum(torch.softmax(outside, -1), torch.softmax(outside / temperature, -1))
    unit = share.scatter(1, slots, 1.0)[:, :columns]
    # Rounded when it is stored, and once more when grad_output multiplies it.
    info = torch.finfo(s.dtype)
    # Triton's interpreter truncates to bf16.
    rounding = info.eps * (2 if backend == "triton" and s.dtype == torch.bfloat16 else 1)
    bound = margin + epsilon * weight[:, None] * (dtruth.abs() + unit) + rounding * dtruth.abs() + info.smallest_normal
    assert bool((error <= bound).all()), f"gradient: {error.max():.3g}, {(error - bound).max():.3g} too much"
    return loss, grad


def ragged(n, columns, k, dtype, spread=3.0):
    """Rows with all slots, some, none, equal ids, in order and not; the last is ignored and holds NaN."""
    s = (torch.randn(n, columns) * spread).to(dtype)
    teacher = torch.randn(n, columns) * spread + 0.5 * s.float()
    logprobs, ids = torch.log_softmax(teacher, -1).topk(k)
    order = torch.randperm(k)
    logprobs[1], ids[1] = logprobs[1, order], ids[1, order]
    ids[2, torch.rand(k) < 0.5] = -1
    ids[3] = -1
    logprobs[2:4][ids[2:4] == -1] = torch.nan
    if k > 1:
        ids[4, k // 2] = ids[4, 0]
    labels = torch.randint(0, columns, (n,))
    labels[-1] = -100
    s[-1] = torch.nan
    return s, ids, logprobs, labels


def temperatures(tail, temperature):
    return {"temperature": temperature, **({"teacher_temperature": 1.0} if tail in ("bucket", "drop") else {})}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail,name", CASES)
def test_every_divergence(tail, name, dtype, backend):
    s, ids, logprobs, labels = ragged(6, 61, 5, DTYPES[dtype])
    check(s, ids, logprobs, labels, backend=backend, tail=tail, divergence=DIVERGENCES[name], **temperatures(tail, 1.5))


# K on either side of a vector and of the vocabulary; 4101 columns need three tiles and a padded block.
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 64, 256, 2048])
@pytest.mark.parametrize("tail,name", [case for case in KL_CASES if case.values[1] in ("forward_kl", "jsd")])
def test_sizes(tail, name, k, dtype, backend):
    s, ids, logprobs, labels = ragged(6, 4101 if k == 2048 else 600, k, DTYPES[dtype])
    check(s, ids, logprobs, labels, backend=backend, tail=tail, divergence=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail,name", [("bucket", "forward_kl"), ("renormalize", "jsd"), ("uniform", "tvd")])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_objective(tail, name, temperature, dtype, backend):
    s, ids, logprobs, labels = ragged(7, 53, 4, DTYPES[dtype])
    labels[0] = ids[0, 1]
    check(
        s,
        ids,
        logprobs,
        labels,
        backend=backend,
        tail=tail,
        divergence=name,
        **temperatures(tail, temperature),
        kd_weight=0.7,
        ce_weight=0.3,
        z_loss_weight=1e-3,
        label_smoothing=0.1,
        row_weight=torch.rand(7).double(),
    )


@pytest.mark.parametrize("tail", get_args(Tail))
def test_hard_terms_alone(tail, backend):
    s, ids, logprobs, labels = ragged(6, 41, 4, torch.float32)
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": 0.2}
    check(s, ids, logprobs, labels, backend=backend, tail=tail, divergence="forward_kl", **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tail", get_args(Tail))
def test_padding_softcap_and_rows_of_their_own_temperature(tail, dtype, backend):
    s, ids, logprobs, labels = ragged(6, 45, 4, DTYPES[dtype])
    s = torch.cat([s, torch.full((6, 19), torch.nan, dtype=s.dtype)], -1)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 1.0])
    _, grad = check(
        s,
        ids,
        logprobs,
        labels,
        backend=backend,
        tail=tail,
        divergence="forward_kl",
        temperature=temperature,
        teacher_temperature=1.0,
        vocab_size=45,
        student_softcap=20.0 if dtype == "fp32" else None,
        ce_weight=0.5,
    )
    assert bool((grad[:, 45:] == 0).all())


def test_row_param(backend):
    s, ids, logprobs, _ = ragged(6, 41, 4, torch.float64)
    s[-1] = 0.0
    beta = torch.tensor([0.1, 0.2, 0.5, 0.7, 0.9, 0.3])
    got = kd.topk_kd_loss(s, ids, logprobs, divergence="jsd", row_param=beta, reduction="none", backend=backend)
    for i, b in enumerate(beta.tolist()):
        want = row_divergence(s[i], ids[i], logprobs[i], "bucket", kd.JSD(b), 1.0, 1.0)
        torch.testing.assert_close(got[i], want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("tail,name", CASES)
def test_gradcheck(tail, name, backend):
    s, ids, logprobs, labels = ragged(5, 9, 3, torch.float64, spread=1.0)
    s = torch.where(torch.isnan(s), 0.0, s).requires_grad_()

    def loss(x):
        return kd.topk_kd_loss(
            x * 1.0,
            ids,
            logprobs,
            labels,
            tail=tail,
            divergence=DIVERGENCES[name],
            **temperatures(tail, 1.3),
            ce_weight=0.2,
            reduction="none",
            backend=backend,
        )

    assert torch.autograd.gradcheck(loss, (s,), fast_mode=True)


# 100 nats are beyond the range of fp32 exponentials: the outcomes outside have to be taken relative to each other.
@pytest.mark.parametrize(
    "nats,dtype",
    [(50, "fp64"), (50, "bf16"), (50, "fp32"), (-50, "fp32"), (-50, "bf16"), (100, "fp32"), (-100, "fp32")],
)
@pytest.mark.parametrize("tail,name", KL_CASES)
def test_student_far_ahead_or_behind_on_the_set(tail, name, nats, dtype, backend):
    s, ids, logprobs, _ = ragged(6, 300, 5, DTYPES[dtype], spread=1.0)
    s[-1] = 0.0
    ids[3] = ids[0]
    logprobs[3] = logprobs[0]
    s.scatter_add_(1, ids.clamp(min=0), torch.full(ids.shape, float(nats), dtype=s.dtype) * (ids >= 0))
    loss, grad = check(s, ids, logprobs, backend=backend, tail=tail, divergence=name)
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad).all())


def mass_of_one(above):
    """Rows of mass 1 and a little more: no rounding of a logarithm decides on which side of 1 they are."""
    ids = torch.tensor([[20, -1], [3, 7]])
    logprobs = torch.tensor([[0.0, torch.nan], [math.log(0.25) + 1e-6, math.log(0.75) + 1e-6]])
    return torch.randn(2, 30), ids, logprobs + above


@pytest.mark.parametrize("above", [0.0, 1e-6])
@pytest.mark.parametrize("tail,name", KL_CASES)
def test_teacher_mass_of_one(tail, name, above, backend):
    """An empty tail is one of the size of the rounding where the divergence would be infinite; ``min_tail=0`` is that
    limit."""
    s, ids, logprobs = mass_of_one(above)
    loss, grad = check(s, ids, logprobs, backend=backend, tail=tail, divergence=name)
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad).all())
    if tail in ("bucket", "uniform"):
        loss, _ = check(s, ids, logprobs, backend=backend, tail=tail, divergence=name, min_tail=0.0)
        assert bool(torch.isinf(loss).all() if name == "reverse_kl" else torch.isfinite(loss).all())


FLOORED = [case for case in CASES if case.values[0] in ("bucket", "uniform") and case.values[1] in NEEDS_TEACHER]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail,name", [case for case in FLOORED if case.values[1] in ("reverse_kl", "jeffreys")])
def test_the_floor_of_the_tail_is_the_rounding_of_the_log_probabilities(tail, name, dtype, backend):
    """With a teacher of mass 1 in each dtype; also through the loss of rows that are summed, and with T_t."""
    s, ids = torch.randn(3, 40), torch.tensor([[0, 5], [7, -1], [1, 2]])
    logprobs = torch.tensor([[-0.5, -0.4], [0.0, 0.0], [-(2.0**-6), -6.0]]).to(DTYPES[dtype])
    floor = [rounding_of_mass(row[i != -1], logprobs.dtype) for i, row in zip(ids, logprobs.double(), strict=True)]
    # The third row has more than its rounding left.
    left = 1 - float(logprobs[2].double().exp().sum())
    assert left > floor[2]
    options = {"tail": tail, "divergence": name, "backend": backend, "teacher_temperature": 1.0}
    if tail == "uniform":
        options |= {"temperature": 2.0, "teacher_temperature": 2.0}
    given = torch.tensor([*floor[:2], left], dtype=torch.float64).log()
    exact = s.double()
    want, got = (
        evaluate(
            lambda x, o=o: kd.topk_kd_loss(x, ids, logprobs, reduction="none", **options, **o), exact, torch.ones(3)
        )
        for o in ({"tail_logprob": given}, {})
    )
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    summed = kd.topk_kd_loss(exact, ids, logprobs, reduction="sum", **options)
    torch.testing.assert_close(summed, got[0].sum())


@pytest.mark.parametrize("tail,name", FLOORED)
def test_gradient_is_that_of_the_floor(tail, name, backend):
    s = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 4, 5], [7, -1, -1], [1, 2, 8]])
    logprobs = torch.tensor([[0.5, 0.3, 0.2001], [1.0, 0.0, 0.0], [0.5, 0.2, 0.1]], dtype=torch.float64).log()
    options = {"tail": tail, "divergence": DIVERGENCES[name], "min_tail": 1e-3, "reduction": "none"}
    check(s.detach(), ids, logprobs, backend=backend, **{k: v for k, v in options.items() if k != "reduction"})
    assert torch.autograd.gradcheck(lambda x: kd.topk_kd_loss(x * 1.0, ids, logprobs, backend=backend, **options), (s,))


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "tvd", "skew_reverse_kl"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_floor_changes_nothing_where_the_divergence_needs_none(tail, name, backend):
    s, ids, logprobs = mass_of_one(0.0)
    options = {"tail": tail, "divergence": DIVERGENCES[name], "reduction": "none", "backend": backend}
    results = [
        evaluate(lambda x, f=f: kd.topk_kd_loss(x, ids, logprobs, min_tail=f, **options), s, torch.ones(2))
        for f in (None, 0.0, 0.1)
    ]
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_captured_tail_is_exact_unless_a_floor_is_asked_for(tail, backend):
    s, ids, logprobs = mass_of_one(0.0)
    options = {"tail": tail, "divergence": "reverse_kl", "backend": backend}
    for given, infinite in (([-50.0, -300.0], False), ([-torch.inf, -torch.inf], True)):
        loss, _ = check(s, ids, logprobs, tail_logprob=torch.tensor(given), **options)
        assert loss.isinf().tolist() == [infinite] * 2
    floored, _ = check(s, ids, logprobs, tail_logprob=torch.tensor([-50.0, -torch.inf]), min_tail=1e-4, **options)
    computed = kd.topk_kd_loss(s, ids, logprobs, min_tail=1e-4, reduction="none", **options)
    torch.testing.assert_close(floored, computed)


def served(rows, columns, k):
    """Log-softmax of teachers that are ever surer, and the k likeliest as a server gives them: fp32."""
    teacher = torch.randn(rows, columns)
    teacher[torch.arange(rows), torch.randint(0, columns, (rows,))] += torch.linspace(0, 30, rows)
    logprobs, ids = torch.log_softmax(teacher, -1).topk(k)
    return teacher, ids, logprobs


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp16", "4 decimals"])
@pytest.mark.parametrize("name", ["reverse_kl", "jeffreys"])
def test_a_served_teacher_that_is_sure_has_a_finite_loss(name, form, backend):
    """Rounded log-probabilities whose mass reaches 1 gave inf, and NaN in the gradient: one row ruins the batch."""
    teacher, ids, logprobs = served(150, 3000, 20)
    rounded = (logprobs * 1e4).round() / 1e4 if form == "4 decimals" else logprobs.to(DTYPES[form])
    floor = 5e-5 if form == "4 decimals" else None
    s = teacher + 0.3 * torch.randn_like(teacher)
    options = {"divergence": name, "reduction": "none", "backend": backend}
    bare = kd.topk_kd_loss(s, ids, rounded, min_tail=0.0, **options)
    assert 5 < int(bare.isinf().sum()) < 75
    for tail in ("bucket", "uniform"):
        loss, grad = check(s, ids, rounded, tail=tail, divergence=name, backend=backend, min_tail=floor)
        assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad).all())
        if tail == "bucket":
            # It coarsens the divergence of all tokens.
            whole = kd.kd_loss(s, teacher, divergence=name, backend="torch")
            assert 0 < float(loss.mean()) < 1.02 * float(whole)


# How collators and servers write a slot that they have nothing for, and which ids stand there.
PADDING = {"TRL": (0, -torch.inf), "axolotl": (0, -1e9), "OpenAI": (0, -9999.0), "past the end": (10**6, -torch.inf)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", PADDING)
@pytest.mark.parametrize("tail,name", KL_CASES)
def test_ragged_rows_as_others_pad_them(tail, name, form, dtype, backend):
    """Numbers were silently others: the padded id was one that the teacher gave no probability."""
    s, ids, logprobs, _ = ragged(6, 50, 5, torch.float32)
    s[-1] = 0.5
    logprobs = logprobs.nan_to_num(-1.0).to(DTYPES[dtype])
    padded, number = PADDING[form]
    others = torch.where(ids == -1, padded, ids), torch.where(ids == -1, number, logprobs).to(logprobs.dtype)
    options = {"tail": tail, "divergence": name, "backend": backend}
    got, want = (
        evaluate(lambda x, t=t: kd.topk_kd_loss(x, *t, reduction="none", **options), s, torch.ones(6))
        for t in (others, (ids, logprobs))
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    got, want = (kd.topk_kd_loss(s, *t, return_stats=True, **options)[1] for t in (others, (ids, logprobs)))
    for column, expected in zip(got, want, strict=True):
        assert torch.equal(column, expected)


@pytest.mark.parametrize("tail", get_args(Tail))
def test_ragged_rows_of_a_head(tail, backend):
    """And through the loss of hidden states, which gathers the rows of the head by the ids."""
    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    _, ids, logprobs, _ = ragged(6, 50, 5, torch.float32)
    results = []
    for padded, number in ((-1, -1.0), *PADDING.values()):
        teacher = torch.where(ids == -1, padded, ids), torch.where(ids == -1, number, logprobs)
        loss = kd.linear_topk_kd_loss(hidden, head, *teacher, tail=tail, divergence="jsd", backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_servers_entries_of_k_plus_one():
    """vLLM's dicts hold the token of the prompt besides the k likeliest, which it may be among: rows are ragged."""
    rows = [{4: -0.2, 9: -2.5, 7: -4.0}, {4: -0.1, 9: -3.0}, {1: -9.0, 4: -0.2, 9: -2.5}]
    ids, logprobs = torch.zeros(3, 3, dtype=torch.long), torch.full((3, 3), -torch.inf)
    for i, row in enumerate(rows):
        ids[i, : len(row)], logprobs[i, : len(row)] = torch.tensor(list(row)), torch.tensor(list(row.values()))
    check(torch.randn(3, 12), ids, logprobs, backend="torch", tail="bucket", divergence="forward_kl")
    loss = kd.topk_kd_loss(torch.randn(3, 12), ids, logprobs, return_stats=True)[1]
    torch.testing.assert_close(loss.teacher_mass[1], logprobs[1, :2].exp().sum())


def test_a_capture_of_fewer_tokens_than_k_is_padded_alike(backend):
    """Tokens of logit -inf are no entries, whether they come from a capture or from ``topk``."""
    s, t = torch.randn(3, 12), torch.randn(3, 12)
    t[0, 3:], t[1, 1:] = -torch.inf, -torch.inf
    captured = kd.capture_topk(t, 6, backend=backend)
    logprobs, ids = torch.log_softmax(t, -1).topk(6)
    assert bool((captured.ids[0, 3:] == -1).all())
    for divergence in ("forward_kl", "jsd"):
        options = {"divergence": divergence, "reduction": "none", "backend": backend}
        got = kd.topk_kd_loss(s, *captured[:2], tail_logprob=captured.tail_logprob, **options)
        want = kd.topk_kd_loss(s, ids, logprobs, **options)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[:2], kd.kd_loss(s, t, **options)[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "alpha_beta", "ab_0"])
@pytest.mark.parametrize("captured", [-3.0, 0.0, -torch.inf])
def test_a_row_without_entries_is_all_tail_whatever_its_tail_says(captured, name, backend):
    """A padded batch whose tails are not exactly 0 trained on its padding."""
    s, ids, logprobs, _ = ragged(6, 40, 4, torch.float32)
    s[-1] = 0.5
    tails = torch.full((6,), -1.0)
    tails[3] = captured
    for tail in ("bucket", "uniform"):
        options = {"tail": tail, "divergence": DIVERGENCES[name], "reduction": "none", "backend": backend}
        loss, grad = evaluate(
            lambda x, o=options: kd.topk_kd_loss(x, ids, logprobs, tail_logprob=tails, **o), s, torch.ones(6)
        )
        alone = evaluate(lambda x, o=options: kd.topk_kd_loss(x, ids[3:4], logprobs[3:4], **o), s[3:4], torch.ones(1))
        torch.testing.assert_close((loss[3:4], grad[3:4]), alone)
        if tail == "bucket":
            assert float(loss[3].abs()) < 1e-6 and float(grad[3].abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "alpha_beta"])
def test_all_slots_unused(name, backend):
    s = torch.randn(3, 40, requires_grad=True)
    ids, logprobs = torch.full((3, 4), -1), torch.full((3, 4), torch.nan)
    for tail in get_args(Tail):
        if tail in TAILS_WITHOUT_TEACHER and name == "reverse_kl":
            continue
        s.grad = None
        loss = kd.topk_kd_loss(s, ids, logprobs, tail=tail, divergence=name, reduction="none", backend=backend)
        loss.sum().backward()
        if tail in ("bucket", "renormalize", "renormalize_both"):
            torch.testing.assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)
            torch.testing.assert_close(s.grad, torch.zeros(3, 40), atol=1e-6, rtol=0)
        elif tail == "uniform":
            want = kd.kd_loss(s, torch.zeros(3, 40), divergence=name, reduction="none", backend="torch")
            torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("tail,name", CASES)
def test_equal_ids_add_up(tail, name, backend):
    s = torch.randn(1, 20, dtype=torch.float64)
    twice = torch.tensor([[4, 9, 4, -1, 4]]), torch.tensor([[0.1, 0.3, 0.2, 0.0, 0.05]], dtype=torch.float64).log()
    once = torch.tensor([[9, 4]]), torch.tensor([[0.3, 0.35]], dtype=torch.float64).log()
    grad_output = torch.ones(1)
    options = {"tail": tail, "divergence": DIVERGENCES[name], "reduction": "none", "backend": backend}
    got, want = (evaluate(lambda x, t=t: kd.topk_kd_loss(x, *t, **options), s, grad_output) for t in (twice, once))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tail", get_args(Tail))
def test_set_is_the_whole_vocabulary(tail, dtype, backend):
    """Then every mode is dense distillation, and what the log-probabilities lack of 1 by rounding is no tail."""
    s, t = (torch.randn(4, 24) * 3).to(DTYPES[dtype]), torch.randn(4, 24) * 3
    logprobs, ids = torch.log_softmax(t, -1).sort(-1)
    for name in ("forward_kl", "jsd"):
        got = kd.topk_kd_loss(
            s, ids, logprobs.bfloat16() if dtype == "bf16" else logprobs, tail=tail, divergence=name, backend=backend
        )
        want = kd.kd_loss(s, t, divergence=name, backend="torch")
        torch.testing.assert_close(
            got, want, atol=2e-2 if dtype == "bf16" else 1e-5, rtol=2e-2 if dtype == "bf16" else 1e-5
        )


def test_dtypes_of_ids_and_log_probabilities(backend):
    s, ids, logprobs, labels = ragged(6, 50, 5, torch.float32)
    options = {"reduction": "none", "backend": backend}
    for dtype in DTYPES.values():
        rounded = logprobs.to(dtype)
        want = kd.topk_kd_loss(s, ids, rounded.double(), labels, **options)
        for id_dtype in (torch.int32, torch.int64):
            got = kd.topk_kd_loss(s, ids.to(id_dtype), rounded, labels, **options)
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tail", get_args(Tail))
def test_sequences_cut_short_are_views(tail, backend):
    """``logits[:, :-1]`` of ``[B, L, V]``: nothing is out of place, and the last position gets a gradient of 0."""
    logits = torch.randn(2, 5, 30, requires_grad=True)
    lp, ids = torch.log_softmax(torch.randn(2, 5, 30), -1).topk(3)
    labels = torch.randint(0, 30, (2, 5))
    labels[1, 2] = -100
    options = {"tail": tail, "ce_weight": 0.5, "reduction": "none", "backend": backend}
    loss = kd.topk_kd_loss(logits[:, :-1], ids[:, 1:], lp[:, 1:], labels[:, 1:], **options)
    assert loss.shape == (2, 4)
    weight = torch.rand(2, 4)
    (loss * weight).sum().backward()
    flat = logits.detach()[:, :-1].reshape(-1, 30).requires_grad_()
    want = kd.topk_kd_loss(
        flat, ids[:, 1:].reshape(-1, 3), lp[:, 1:].reshape(-1, 3), labels[:, 1:].reshape(-1), **options
    )
    (want * weight.reshape(-1)).sum().backward()
    torch.testing.assert_close(loss.reshape(-1), want)
    torch.testing.assert_close(logits.grad[:, :-1].reshape(-1, 30), flat.grad)
    assert bool((logits.grad[:, -1] == 0).all())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tail", get_args(Tail))
def test_in_place(tail, dtype):
    needs_backend("cpu")
    s, ids, logprobs, labels = ragged(6, 77, 5, DTYPES[dtype])
    options = {"tail": tail, "ce_weight": 0.5, "backend": "cpu", **temperatures(tail, 2.0)}
    for name in ("forward_kl", "jsd"):
        want = evaluate(
            lambda x, n=name: kd.topk_kd_loss(x, ids, logprobs, labels, divergence=n, **options), s, torch.ones(())
        )
        leaf = s.clone().requires_grad_()
        logits = leaf * 1
        address = logits.data_ptr()
        loss = kd.topk_kd_loss(logits, ids, logprobs, labels, divergence=name, inplace=True, **options)
        grad = torch.autograd.grad(loss, logits)[0]
        assert grad.data_ptr() == address
        torch.testing.assert_close((loss.detach(), grad), want)


def test_statistics(backend):
    s, ids, logprobs, labels = ragged(6, 50, 5, torch.float64)
    for tail in get_args(Tail):
        options = {"tail": tail, "reduction": "none", "backend": backend, **temperatures(tail, 2.0)}
        loss, stats = kd.topk_kd_loss(s, ids, logprobs, labels, ce_weight=0.5, return_stats=True, **options)
        counted = torch.tensor([True] * 5 + [False])
        q = torch.softmax(s / 2, -1)
        for i in range(5):
            distinct = sorted({v for v in ids[i].tolist() if v != -1})
            used = ids[i] != -1
            torch.testing.assert_close(stats.student_mass[i], q[i, distinct].sum())
            torch.testing.assert_close(stats.teacher_mass[i], logprobs[i][used].double().exp().sum())
        torch.testing.assert_close(stats.lse[counted], torch.logsumexp(s[counted], -1))
        torch.testing.assert_close(stats.ce[counted], F.cross_entropy(s[counted], labels[counted], reduction="none"))
        torch.testing.assert_close(loss, 4 * stats.divergence + 0.5 * stats.ce)
        assert all(bool((column[~counted] == 0).all()) and not column.requires_grad for column in stats)


def test_reductions(backend):
    s, ids, logprobs, labels = ragged(6, 50, 5, torch.float32)
    rows = kd.topk_kd_loss(s, ids, logprobs, labels, reduction="none", backend=backend)
    for reduction, divisor in (("sum", 1), ("mean", 5), ("batchmean", 6)):
        got = kd.topk_kd_loss(s, ids, logprobs, labels, reduction=reduction, backend=backend)
        torch.testing.assert_close(got, rows.sum() / divisor)
    got = kd.topk_kd_loss(s, ids, logprobs, labels, normalizer=torch.tensor(7.0), backend=backend)
    torch.testing.assert_close(got, rows.sum() / 7)
    got = kd.TopKKDLoss(reduction="mean", backend=backend)(s, ids, logprobs, labels)
    torch.testing.assert_close(got, rows.sum() / 5)


def test_no_rows_and_no_counted_rows(backend):
    s = torch.empty(0, 20, requires_grad=True)
    loss = kd.topk_kd_loss(s, torch.empty(0, 3, dtype=torch.long), torch.empty(0, 3), backend=backend)
    loss.backward()
    assert loss == 0 and s.grad.shape == (0, 20)
    s = torch.full((2, 20), torch.nan, requires_grad=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    loss = kd.topk_kd_loss(s, ids, torch.zeros(2, 3), torch.full((2,), -100), backend=backend)
    loss.backward()
    assert loss == 0 and bool((s.grad == 0).all())


@pytest.mark.parametrize("tail", get_args(Tail))
def test_nan_stays_in_its_row(tail, backend):
    s, ids, logprobs, _ = ragged(6, 50, 5, torch.float32)
    s[-1] = 1.0
    s[1, ids[1, 0]] = torch.nan
    for name in ("forward_kl", "jsd", "tvd"):
        options = {"tail": tail, "divergence": name, "reduction": "none", "backend": backend}
        loss, grad = evaluate(lambda x, o=options: kd.topk_kd_loss(x, ids, logprobs, **o), s, torch.ones(6))
        assert loss.isnan().nonzero().reshape(-1).tolist() == [1]
        assert bool(grad[1, ids[1]].isnan().all()) and not bool(grad[[0, 2, 3, 4, 5]].isnan().any())


@pytest.mark.parametrize("nats", [20.0, 30.0, 60.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_distillkit_45_sure_student_has_a_finite_gradient(name, dtype, nats, backend):
    """arcee-ai/DistillKit#45: ``clamp(1 - 1e-8)`` of the student's mass gave inf and NaN from a lead of 20 nats on."""
    s = torch.zeros(1, 100, dtype=DTYPES[dtype])
    s[0, :4] = nats
    ids, logprobs = torch.arange(4)[None], torch.tensor([[0.4, 0.3, 0.2, 0.05]]).log()
    for tail in ("bucket", "uniform"):
        _, grad = check(s, ids, logprobs, backend=backend, tail=tail, divergence=name)
        assert bool(torch.isfinite(grad).all())
        # The teacher has 5 % outside, the student next to nothing: it is pulled there (grad_output < 0).
        assert bool((grad[0, 4:] > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_both", "uniform"])
def test_verl_7855_kl_is_not_negative(tail, dtype, backend):
    """verl#7855: ``sum p (log p - log q)`` over K entries alone is negative where the student has more mass on them."""
    teacher = torch.randn(64, 200) * 3
    logprobs, ids = torch.log_softmax(teacher, -1).topk(5)
    nearly = teacher + 1e-3 * torch.randn_like(teacher)
    ahead = teacher.scatter_add(1, ids, torch.full(ids.shape, 1.0))
    truncated = kd.topk_kd_loss(ahead, ids, logprobs, tail="drop", reduction="none", backend=backend)
    assert bool((truncated < 0).any())
    for student in (teacher, nearly, ahead):
        s = student.to(DTYPES[dtype]).requires_grad_()
        loss = kd.topk_kd_loss(s, ids, logprobs, tail=tail, reduction="none", backend=backend)
        assert bool((loss >= -4e-6).all())
    loss.sum().backward()
    if tail != "renormalize_both":
        # No clamp: every row has a gradient.
        assert bool((s.grad.abs().amax(-1) > 1e-3).all())


@pytest.mark.parametrize("tail", get_args(Tail))
def test_axolotl_t_squared_is_in_loss_and_gradient(tail, backend):
    """axolotl had T^2 in the loss and not in the gradient: finite differences and autograd differed by 4."""
    s, ids, logprobs, _ = ragged(5, 30, 4, torch.float64)
    s[-1] = 0.5
    ids[2:4], logprobs[2:4] = ids[0], logprobs[0]
    grad_output = torch.ones(5)
    options = {"tail": tail, "teacher_temperature": 1.0, "temperature": 2.0, "reduction": "none", "backend": backend}
    loss, grad = evaluate(lambda x: kd.topk_kd_loss(x, ids, logprobs, **options), s, grad_output)
    plain, dplain = evaluate(
        lambda x: kd.topk_kd_loss(x, ids, logprobs, scale_by_t_squared=False, **options), s, grad_output
    )
    torch.testing.assert_close((loss, grad), (4 * plain, 4 * dplain))
    direction, step = torch.randn_like(s), 1e-6
    moved = [kd.topk_kd_loss(s + h * direction, ids, logprobs, **options).sum() for h in (step, -step)]
    torch.testing.assert_close((moved[0] - moved[1]) / (2 * step), (grad * direction).sum(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_both"])
def test_teacher_temperature_is_that_of_the_dense_teacher(tail, backend):
    """Log-probabilities taken at T = 1 and tempered are the dense teacher at T, given the set."""
    s, t = torch.randn(3, 40).double(), torch.randn(3, 40).double() * 3
    logprobs, ids = torch.log_softmax(t, -1).topk(6)
    dense = torch.full_like(t, -torch.inf).scatter(1, ids, t.gather(1, ids))
    student = s
    if tail == "renormalize_both":
        student = torch.full_like(s, -torch.inf).scatter(1, ids, s.gather(1, ids))
    got = kd.topk_kd_loss(s, ids, logprobs, tail=tail, temperature=3.0, backend=backend)
    torch.testing.assert_close(got, kd.kd_loss(student, dense, temperature=3.0, backend="torch"))


def test_teacher_at_the_temperature_of_the_loss_keeps_its_tail(backend):
    """Coarsening to a bucket can only lower a KL: the captured tail belongs to the captured temperature."""
    s, t = torch.randn(8, 40).double(), torch.randn(8, 40).double() * 3
    whole = kd.kd_loss(s, t, temperature=2.0, reduction="none", backend="torch")
    logprobs, ids = torch.log_softmax(t / 2, -1).topk(6)
    options = {"temperature": 2.0, "teacher_temperature": 1.0, "reduction": "none", "backend": backend}
    got = kd.topk_kd_loss(s, ids, logprobs, **options)
    assert bool((got < whole).all()) and bool((got > 0).all())
    everything, all_ids = torch.log_softmax(t / 2, -1).topk(39)
    torch.testing.assert_close(kd.topk_kd_loss(s, all_ids, everything, **options), whole)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_captured_tail(tail, name, backend):
    """The mass outside as it was captured, not what rounded log-probabilities leave of 1; also far below 1e-16."""
    s, ids, logprobs, labels = ragged(6, 61, 5, torch.float32)
    captured = torch.tensor([-0.5, -40.0, -700.0, 0.0, -torch.inf, -1.0])
    options = {"divergence": name, "tail_logprob": captured, "backend": backend}
    check(s, ids, logprobs, labels, tail=tail, **options)
    # At a temperature a bucket has none of its own.
    if tail == "uniform":
        check(s, ids, logprobs, labels, tail=tail, temperature=1.5, **options)


def test_overlap_with_the_students_own(backend):
    s = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5], [torch.nan] * 6])
    ids = torch.tensor([[0, 1, 5, -1], [5, 0, 0, 2], [-1, -1, -1, -1], [0, 1, 2, 3]])
    logprobs = torch.full((4, 4), -3.0)
    stats = kd.topk_kd_loss(s, ids, logprobs, return_stats=True, backend=backend)[1]
    # Of ties with the K'-th largest all are among them.
    torch.testing.assert_close(stats.overlap, torch.tensor([2 / 3, 1.0, 0.0, torch.nan]), equal_nan=True)


def test_drop_is_unbiased_for_sampled_ids(backend):
    """The mean over all draws of one id of weight 1, by their probability, is the dense gradient."""
    s, t = torch.randn(1, 12).double(), torch.randn(1, 12).double()
    p = torch.softmax(t, -1)

    def gradient(v):
        one = torch.tensor([[v]]), torch.zeros(1, 1)
        return evaluate(lambda x: kd.topk_kd_loss(x, *one, tail="drop", backend=backend), s, torch.ones(()))[1]

    total = sum(p[0, v] * gradient(v) for v in range(12))
    torch.testing.assert_close(total, torch.softmax(s, -1) - p)


def test_no_gradient_no_buffer(backend):
    s, ids, logprobs, labels = ragged(6, 50, 5, torch.float32)
    want = evaluate(lambda x: kd.topk_kd_loss(x, ids, logprobs, labels, backend=backend), s, torch.ones(()))[0]
    assert torch.equal(kd.topk_kd_loss(s, ids, logprobs, labels, backend=backend), want)


def test_rows_are_divided_among_threads():
    needs_backend("cpu")
    s, ids, logprobs, labels = ragged(97, 1000, 7, torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(evaluate(lambda x: kd.topk_kd_loss(x, ids, logprobs, labels, backend="cpu"), s, torch.ones(())))
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_op_is_registered_as_torch_wants_it():
    needs_backend("cpu")
    s = torch.randn(1, 4, 30)
    logprobs, ids = torch.log_softmax(torch.randn(4, 30), -1).topk(3)
    numbers = dict.fromkeys(("scale", "temperature", "teacher_temperature", "kd_weight"), 1.0)
    numbers |= dict.fromkeys(
        ("param0", "param1", "ce_weight", "z_loss_weight", "label_smoothing", "student_softcap"), 0.0
    )
    options = {"tail": "bucket", "divergence": "forward_kl", "vocab_size": 30, "ignore_index": -100}
    options |= {"scale_by_t_squared": True, "stats": True, "min_tail": 0.0, "tail_rounding": 0.5, **numbers}
    arguments = (s, ids, logprobs, torch.empty_like(s), *(None,) * 8, torch.full((4,), -1.0))
    torch.library.opcheck(torch.ops.kdkernels.topk_fwd_cpu.default, arguments, ops.packed("topk_fwd", options))


@pytest.mark.parametrize("path", ["as built", "plain PyTorch"])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_of_a_sparse_teacher_are_checked_alike(dtype, id_dtype, path, monkeypatch):
    """The compiled check reads 16-bit numbers by their bits; without the extension plain PyTorch decides."""
    if path == "plain PyTorch":
        monkeypatch.setattr(backends.cpu, "load_error", lambda: "the C++ extension was not built")
    student, nan, inf = torch.zeros(2, 9), torch.nan, torch.inf

    def accepts(ids, logprobs, tail="bucket"):
        ids, logprobs = torch.tensor(ids, dtype=id_dtype), torch.tensor(logprobs, dtype=dtype)
        try:
            checks.sparse_teacher(ids, logprobs, student, 9, tail)
        except ValueError:
            return False
        return True

    ids, info = [[0, -1, 8], [3, 4, 5]], torch.finfo(dtype)
    highest = max(1e-3, 16 * info.eps)
    assert accepts(ids, [[-1.0, nan, -inf], [0.0, -0.0, info.min]])
    assert accepts(ids, [[highest * 0.99, inf, -1.0], [-info.tiny, info.tiny, -8900.0]])
    assert accepts(ids, [[info.max, inf, -1.0], [-1.0] * 3], tail="drop")
    for value in (nan, -nan, inf):
        assert not accepts(ids, [[-1.0] * 3, [-1.0, -1.0, value]])
        assert not accepts(ids, [[-1.0] * 3, [-1.0, -1.0, value]], tail="drop")
    for value in (highest * 1.02, 1.0, 300.0, info.max):
        assert not accepts(ids, [[-1.0] * 3, [-1.0, -1.0, value]])
    for wild in (9, -2, 2**31 - 1, -(2**31)):
        assert not accepts([[0, -1, 8], [3, 4, wild]], [[-1.0] * 3] * 2)
        assert not accepts([[0, -1, 8], [3, 4, wild]], [[-1.0] * 3, [-1.0, -1.0, -8900.0]])
        assert accepts([[0, -1, 8], [3, 4, wild]], [[-1.0] * 3, [-1.0, -1.0, -9100.0]])
        assert accepts([[0, -1, 8], [3, 4, wild]], [[-1.0] * 3, [-1.0, -1.0, -inf]])
    if id_dtype == torch.int64:
        assert not accepts([[2**32, -1, 8], [3, 4, 5]], [[-1.0] * 3] * 2)


@pytest.mark.parametrize("path", ["as built", "plain PyTorch"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_are_checked_alike(dtype, path, monkeypatch):
    if path == "plain PyTorch":
        monkeypatch.setattr(backends.cpu, "load_error", lambda: "the C++ extension was not built")
    student = torch.zeros(2, 2, 9)

    def accepts(labels, ignore_index=-100):
        try:
            checks.labels_like(torch.tensor(labels, dtype=dtype), student, 9, ignore_index)
        except ValueError:
            return False
        return True

    assert accepts([[0, 8], [-100, 3]]) and accepts([[-100, -100], [-100, -100]])
    assert accepts([[0, 8], [20, 3]], ignore_index=20) and accepts([[0, 8], [-1, 3]], ignore_index=-1)
    for wild in (9, -1, 2**31 - 1, -(2**31)):
        assert not accepts([[0, 8], [wild, 3]])
    assert not accepts([[0, 8], [-100, 3]], ignore_index=-1)
    if dtype == torch.int64:
        assert not accepts([[0, 2**32], [1, 3]])


def test_backends_of_a_gpu():
    pytest.importorskip("triton")
    built = backends.cuda.load_error() is None
    assert backends.select("auto", "cuda", pattern="topk_fwd") == ("cuda" if built else "triton")
    with pytest.raises(ValueError, match="'cuda' cannot run this call: the CUDA extension has the losses with a div"):
        kd.logit_mse_loss(torch.zeros(1, 3), torch.zeros(1, 3), backend="cuda")
    with pytest.raises(ValueError, match="'cuda' cannot run this call: it runs on CUDA tensors, not on cpu"):
        kd.topk_kd_loss(torch.zeros(1, 3), torch.zeros(1, 1).long(), torch.zeros(1, 1), backend="cuda")
    s, ids, logprobs, _ = ragged(6, 50, 5, torch.float32)
    with pytest.raises(ValueError, match="'triton' cannot run this call: it runs on GPU tensors, not on cpu"):
        kd.topk_kd_loss(s, ids, logprobs, backend="triton")


GOOD = {"teacher_ids": torch.zeros(2, 3, dtype=torch.long), "teacher_logprobs": torch.full((2, 3), -2.0)}


@pytest.mark.parametrize(
    "error,message,change",
    [
        (ValueError, "tail must be one of bucket, renormalize, .* got 'top'", {"tail": "top"}),
        (
            ValueError,
            "tail 'renormalize' .* divergence 'reverse_kl'",
            {"tail": "renormalize", "divergence": "reverse_kl"},
        ),
        (ValueError, "tail 'drop' .* divergence 'jeffreys'", {"tail": "drop", "divergence": "jeffreys"}),
        (ValueError, "tail 'drop' .* divergence 'reverse_kl'", {"tail": "drop", "divergence": kd.JSD(1.0)}),
        (ValueError, "tail 'drop' .* 'alpha_beta'", {"tail": "drop", "divergence": kd.AlphaBeta(-0.5, 1.0)}),
        (ValueError, "teacher_temperature must be 1 with tail 'bucket', got 2.0: K log-prob", {"temperature": 2.0}),
        (
            ValueError,
            "teacher_temperature must be 1 with tail 'drop', got a tensor",
            {"tail": "drop", "temperature": torch.ones(2)},
        ),
        (TypeError, "unexpected option 'teacher_form'", {"teacher_form": "probs"}),
        (TypeError, "teacher_ids must be int64 or int32, got float32", {"teacher_ids": torch.zeros(2, 3)}),
        (TypeError, "teacher_ids must be a torch.Tensor, got list", {"teacher_ids": [[0, 1, 2]]}),
        (TypeError, "teacher_logprobs must be float32, .* got int64", {"teacher_logprobs": torch.zeros(2, 3).long()}),
        (
            ValueError,
            r"teacher_ids must have shape \(2, K\) with K >= 1, got \(3, 3\)",
            {"teacher_ids": torch.zeros(3, 3).long()},
        ),
        (ValueError, r"teacher_ids must have shape \(2, K\)", {"teacher_ids": torch.zeros(2, 0).long()}),
        (
            ValueError,
            r"teacher_logprobs must have the shape of teacher_ids \(2, 3\)",
            {"teacher_logprobs": torch.zeros(2, 4)},
        ),
        (
            ValueError,
            r"teacher_ids must be in \[0, 9\) or -1 for an unused slot, got 9",
            {"teacher_ids": torch.full((2, 3), 9)},
        ),
        (ValueError, "got -2", {"teacher_ids": torch.full((2, 3), -2)}),
        (ValueError, r"in \[0, 5\)", {"teacher_ids": torch.full((2, 3), 5), "vocab_size": 5}),
        (ValueError, "teacher_logprobs must not be NaN", {"teacher_logprobs": torch.full((2, 3), torch.nan)}),
        (
            ValueError,
            "teacher_logprobs must be natural log-prob.* at most 0, got 0.7: are they probabilities, or logits",
            {"teacher_logprobs": torch.tensor([[0.7, 0.2, 0.05], [0.5, 0.3, 0.1]])},
        ),
        (ValueError, "are they probabilities", {"teacher_logprobs": torch.full((2, 3), 2e-3), "tail": "renormalize"}),
        (ValueError, "are they probabilities", {"teacher_logprobs": torch.full((2, 3), 0.2).bfloat16()}),
        (ValueError, "min_tail must be in \\[0, 1\\], got -1.0", {"min_tail": -1.0}),
        (ValueError, "min_tail must be finite, got nan", {"min_tail": math.nan}),
        (TypeError, "min_tail must be a number, got Tensor", {"min_tail": torch.zeros(2)}),
        (ValueError, "min_tail has no meaning with tail 'drop'", {"min_tail": 0.0, "tail": "drop"}),
        (
            ValueError,
            "teacher_logprobs must not require grad",
            {"teacher_logprobs": torch.zeros(2, 3, requires_grad=True)},
        ),
        (ValueError, "labels are required when ce_weight is not 0", {"ce_weight": 1.0}),
        (TypeError, "tail_logprob must be a torch.Tensor, got float", {"tail_logprob": -1.0}),
        (TypeError, "tail_logprob must be float32, .* got int64", {"tail_logprob": torch.zeros(2).long()}),
        (ValueError, r"tail_logprob must have shape \(2,\), got \(2, 1\)", {"tail_logprob": torch.zeros(2, 1)}),
        (ValueError, "tail_logprob must hold log-probabilities", {"tail_logprob": torch.full((2,), 0.1)}),
        (ValueError, "tail_logprob must hold log-probabilities", {"tail_logprob": torch.full((2,), torch.nan)}),
        (
            ValueError,
            "tail_logprob has no meaning with tail 'drop', only with 'bucket' and 'uniform'",
            {"tail": "drop", "tail_logprob": torch.zeros(2)},
        ),
        (ValueError, "tail_logprob must not require grad", {"tail_logprob": torch.zeros(2, requires_grad=True)}),
    ],
)
def test_errors(error, message, change):
    with pytest.raises(error, match=message):
        kd.topk_kd_loss(torch.randn(2, 9), **{**GOOD, **change})


def test_module_checks_its_options_when_built():
    with pytest.raises(ValueError, match="teacher_temperature must be 1"):
        kd.TopKKDLoss(temperature=2.0)
    with pytest.raises(TypeError, match="topk_kd_loss got an unexpected option 'teacher_form'"):
        kd.TopKKDLoss(teacher_form="probs")
    with pytest.raises(TypeError, match="kd_loss got an unexpected option 'tail'"):
        kd.KDLoss(tail="bucket")
    assert "tail='drop'" in repr(kd.TopKKDLoss(tail="drop"))


def test_an_id_that_was_not_checked_spoils_its_row_only(backend, monkeypatch):
    """On a GPU and under torch.compile ids are not read before the launch: a wrong one must touch no other memory."""
    monkeypatch.setattr("kdkernels.checks.sparse.reads_values", lambda value: False)
    s, ids, logprobs, _ = ragged(6, 50, 5, torch.float32)
    s[-1] = 0.0
    ids[0, 2], ids[1, 0] = 50, 2**40
    for tail in get_args(Tail):
        loss = kd.topk_kd_loss(s, ids, logprobs, tail=tail, reduction="none", backend=backend)
        assert loss.isnan().tolist() == [True, True, False, False, False, False]


def test_log_probabilities_that_round_to_more_than_0_are_accepted(backend):
    """And weights above 1 with "drop", as ``capture_samples`` gives rare draws."""
    ids = torch.tensor([[1, 2]])
    for dtype, value in ((torch.float32, 1e-6), (torch.float16, 0.0078), (torch.bfloat16, 0.0625)):
        kd.topk_kd_loss(torch.randn(1, 9), ids, torch.tensor([[value, -5.0]], dtype=dtype), backend=backend)
    kd.topk_kd_loss(torch.randn(1, 9), ids, torch.tensor([[2.0, -5.0]]), tail="drop", backend=backend)


def test_options_of_a_floor_reach_modules_and_hidden_states(backend):
    s, ids, logprobs = mass_of_one(0.0)
    options = {"divergence": "reverse_kl", "min_tail": 1e-3, "backend": backend}
    want = kd.topk_kd_loss(s, ids, logprobs, **options)
    assert 0 < float(want) < 20
    torch.testing.assert_close(kd.TopKKDLoss(**options)(s, ids, logprobs), want)
    head = torch.eye(30)
    torch.testing.assert_close(kd.linear_topk_kd_loss(s, head, ids, logprobs, **options), want)
    torch.testing.assert_close(kd.LinearTopKKDLoss(**options)(s, head, ids, logprobs), want)
    for again in (1e-5, None, 1e-3):
        # The cache of calls knows the floor.
        other = kd.topk_kd_loss(s, ids, logprobs, **{**options, "min_tail": again})
        assert (other == want) == (again == 1e-3)


def test_a_distillation_term_of_weight_0_is_not_computed(backend, monkeypatch):
    """Beside log-probabilities and tails of NaN, and ids out of range, which a GPU does not look at before."""
    monkeypatch.setattr("kdkernels.checks.sparse.reads_values", lambda value: False)
    s, ids, logprobs, labels = ragged(6, 50, 5, torch.float32)
    logprobs[0, 1], ids[1, 2], tails = torch.nan, 99, torch.full((6,), torch.nan)
    for tail in get_args(Tail):
        options = {"tail": tail, "ce_weight": 1.0, "z_loss_weight": 0.1, "label_smoothing": 0.1, "reduction": "none"}
        if tail in ("bucket", "uniform"):
            options["tail_logprob"] = tails
        loss, grad = evaluate(
            lambda x, o=options: kd.topk_kd_loss(x, ids, logprobs, labels, kd_weight=0.0, backend=backend, **o),
            s,
            torch.ones(6),
        )
        want = F.cross_entropy(s[:-1], labels[:-1], reduction="none", label_smoothing=0.1)
        want += 0.1 * torch.logsumexp(s[:-1], -1) ** 2
        torch.testing.assert_close(loss[:-1], want)
        assert bool(grad.isfinite().all())


def of_kind(kind, rows=6, columns=400, k=12):
    """Logits on which fp32 loses digits or its range, and a teacher of k entries from near them."""
    s, noise = torch.randn(rows, columns), torch.randn(rows, columns)
    if kind.startswith("offset"):
        t, s = 3 * s + 0.3 * noise, 3 * s + float(kind.split()[-1])
    elif kind.startswith("sure"):
        s = 3 * s
        s[torch.arange(rows), torch.randint(0, columns, (rows,))] += float(kind.split()[-1])
        t = s + 0.1 * noise
    elif kind.startswith("scale"):
        scale = float(kind.split()[-1])
        s, t = scale * s, scale * (s + 0.01 * noise)
    else:
        t, s = 30 * s + 0.3 * noise, s / s.abs().amax() * float(kind.split()[-1])
    logprobs, ids = torch.log_softmax(t.double(), -1).topk(k)
    labels = torch.where(torch.arange(rows) % 2 == 0, s.argmax(-1), torch.randint(0, columns, (rows,)))
    return s, ids, logprobs.float(), labels


KINDS = ("offset 1e3", "offset 1e5", "sure 20", "sure 40", "scale 0.1", "scale 30")
LARGE = ("up to 1e9", "up to 1e12", "up to 1e30", "up to 1.7e38")
BESIDE_EAGER = [
    case for case in CASES if case.values[1] in ("forward_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "ab_b<0")
]
BESIDE_EAGER += [case for case in FLOORED if case.values[1] in ("reverse_kl", "jeffreys")]


def no_worse_than_eager(s, ids, logprobs, labels=None, *, backend, **options):
    """Errors, the largest of all rows, are at most twice those of the textbook in fp32 and two ulp.

    Beside that stands the rounding of the entries' numbers, which are near 1: of doubles on the CPU, else of floats.
    """
    divergence = kd.divergences.resolve(options.pop("divergence"))

    def textbook(x):
        return oracle(x, ids, logprobs, labels, divergence=divergence, **options)

    def mine(x):
        return kd.topk_kd_loss(
            x, ids, logprobs, labels, divergence=divergence, reduction="none", backend=backend, **options
        )

    grad_output = torch.ones(len(s))
    truth, eager, got = (evaluate(f, x, grad_output) for f, x in ((textbook, s.double()), (textbook, s), (mine, s)))
    assert bool(torch.isfinite(truth[0]).all())
    for what, exact, theirs, ours in zip(("loss", "gradient"), truth, eager, got, strict=True):
        assert bool(torch.isfinite(ours).all()), f"{what}: {ours}"
        # Autograd of the textbook is NaN where q is exactly one token's, or p 0: there its own error is not known, and
        # the gradient is 0 or next to it.
        unknown = not bool(torch.isfinite(theirs).all())
        exact = exact.nan_to_num()
        error, margin = ((x.double() - exact).reshape(len(s), -1).norm(dim=-1) for x in (ours, theirs))
        margin = margin.nan_to_num(0.0, posinf=0.0)
        rounding = 2.0**-52 if backend == "cpu" else 2.0**-22
        allowed = 2 * margin.max() + rounding * (2 + float(s.abs().max().clamp(max=100)))
        allowed = allowed + (32 if unknown else 2) * 2.0**-23 * exact.reshape(len(s), -1).norm(dim=-1).max()
        assert float(error.max()) <= float(allowed), (
            f"{what}: {error.max():.3g} where eager is off by {margin.max():.3g}"
        )
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail,name", BESIDE_EAGER)
def test_shifted_sure_and_near_rows_are_no_worse_than_eager(tail, name, kind, backend):
    s, ids, logprobs, _ = of_kind(kind)
    no_worse_than_eager(s, ids, logprobs, backend=backend, tail=tail, divergence=DIVERGENCES[name])


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("tail,name", [case for case in BESIDE_EAGER if case.values[1] != "ab_b<0"])
def test_finite_logits_up_to_the_largest(tail, name, kind, backend):
    """From 1e9 on losses were NaN, -inf, or finite and wrong."""
    s, ids, logprobs, _ = of_kind(kind)
    no_worse_than_eager(s, ids, logprobs, backend=backend, tail=tail, divergence=DIVERGENCES[name])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", (*KINDS, "up to 1e30"))
def test_cross_entropy_is_relative_to_the_maximum(kind, smoothing, temperature, backend):
    """Of logits of 1e5 it was off by 2e-4, and could be negative."""
    s, ids, logprobs, labels = of_kind(kind)
    labels[1] = ids[1, 3]
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": smoothing, "backend": backend}
    options |= {"temperature": temperature, "teacher_temperature": 1.0, "divergence": "forward_kl"}
    for tail in ("bucket", "renormalize_both"):
        loss, _ = no_worse_than_eager(s, ids, logprobs, labels, tail=tail, **options)
        assert bool((loss >= 0).all())
    # A loss beyond the largest number is infinite, as in eager code.
    far = kd.topk_kd_loss(s / s.abs().max() * 1.7e38, ids, logprobs, labels, reduction="none", **options)
    assert bool((far >= 0).all())
    alone = torch.full((1, 1), float(s.max())), torch.zeros(1, 1).long(), torch.zeros(1, 1), torch.zeros(1).long()
    assert 0 <= float(kd.topk_kd_loss(*alone, **options)) < 1e-10


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_the_largest_logits_of_each_dtype(dtype, backend):
    largest = torch.finfo(DTYPES[dtype]).max
    s = torch.tensor(
        [[largest, 0.5 * largest, -0.5 * largest], [-largest, -largest, -largest], [1.0, -largest, 0.5]],
        dtype=torch.float64,
    )
    s, ids = s.to(DTYPES[dtype]), torch.tensor([[0], [1], [2]])
    for name in ("jsd", "tvd", "skew_reverse_kl"):
        for tail in ("bucket", "uniform", "renormalize"):
            options = {"tail": tail, "divergence": name, "backend": backend, "reduction": "none"}
            loss, grad = evaluate(
                lambda x, o=options: kd.topk_kd_loss(x, ids, torch.full((3, 1), 0.7).log(), **o), s, torch.ones(3)
            )
            want = oracle(
                s.double(), ids, torch.full((3, 1), 0.7).log(), tail=tail, divergence=kd.divergences.resolve(name)
            )
            torch.testing.assert_close(loss.double(), want, atol=2e-6, rtol=2e-6)
            assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ce_weight", [0.0, 1e18])
def test_a_bucket_far_below_the_range_of_its_factor(ce_weight, backend):
    """The factor of exponentials of 1e-22 passes fp32's range, and its product with them does not."""
    student = torch.zeros(1, 11)
    student[:, :4] = 50.0
    ids, logprobs = torch.arange(4)[None], torch.tensor([[0.4, 0.2, 0.1, 0.1]]).log()
    found = []
    for dtype, where in ((torch.float64, "torch"), (torch.float32, backend)):
        leaf = student.to(dtype).requires_grad_()
        options = {"divergence": kd.AlphaBeta(2.0, -1.0), "ce_weight": ce_weight, "backend": where}
        loss = kd.topk_kd_loss(leaf, ids, logprobs, torch.tensor([7]), **options)
        found.append((loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()))
    for value, truth in zip(*reversed(found), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "alpha_beta"])
def test_a_row_without_entries_has_a_gradient_of_exactly_0(divergence, backend):
    student = (torch.randn(5, 40) * 4).requires_grad_()
    loss = kd.topk_kd_loss(student, torch.full((5, 3), -1), torch.zeros(5, 3), divergence=divergence, backend=backend)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()
    spoilt = torch.randn(1, 40)
    spoilt[0, 7] = float("nan")
    assert kd.topk_kd_loss(spoilt, torch.full((1, 3), -1), torch.zeros(1, 3), backend=backend).isnan()
