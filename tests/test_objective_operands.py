"""Operands that change a row's arithmetic: mixed KL, losses of the acceptance rate, signed mixtures, a teacher that is
normalised elsewhere, a temperature that is learned."""

import math

import pytest
import torch

import kdkernels as kd
from kdkernels import backends, testing

N, V = 9, 133
BACKENDS = ["cpu", "torch"]
DTYPES = [torch.float32, torch.float16, torch.float64]
# Distances of the teacher from the student, of the rows; equal rows among them, and rows that hardly overlap.
SPREAD = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.02, 0.0, 6.0, 10.0, 2.0])[:, None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = backends.BACKENDS[request.param].why_not("cpu")
    if reason:
        pytest.skip(reason)
    return request.param


def models(dtype=torch.float32, width=V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(N, width, generator=generator) * 2
    teacher = student + torch.randn(N, width, generator=generator) * SPREAD
    labels = torch.randint(0, width - 5, (N,), generator=generator)
    labels[4] = -100
    return student.to(dtype), teacher.to(dtype), labels


def of_rows(*numbers):
    return torch.tensor([*numbers, *[0.4] * N][:N])


def normaliser(teacher, temperature=1.0):
    """Of a teacher with more columns than are here: some rows have nearly all of it, one hardly anything."""
    temperature = torch.as_tensor(temperature, dtype=torch.float64).expand(N)[:, None]
    return (teacher.double() / temperature).logsumexp(-1) + torch.linspace(0, 3, N) ** 2


def graded(loss, student, *args, **options):
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *args, **options)
    value.sum().backward()
    return value.detach(), leaf.grad


LK = {"nla": {"kind": "nla"}, "hybrid": {"kind": "hybrid"}, "nla-eps": {"kind": "nla", "eps": 0.3}}
LK |= {"eta0": {"kind": "hybrid", "eta": 0.0}, "eta9": {"kind": "hybrid", "eta": 9.0}}
OTHERS = {
    "alone": {},
    "T2": {"temperature": 2.0},
    "rows": {"temperature": of_rows(0.5, 3.0), "row_weight": of_rows(0.0, 2.0), "kd_weight": of_rows(1.0, 1.0, 0.0)},
    "hard": {"ce_weight": 0.5, "z_loss_weight": 0.01, "label_smoothing": 0.1, "temperature": 3.0},
    "caps": {"student_softcap": 8.0, "teacher_softcap": 9.0, "teacher_temperature": 0.7},
    "vocab": {"vocab_size": V - 5, "scale_by_t_squared": False},
    "probs": {"teacher_form": "probs"},
    "standardize": {"standardize": True, "temperature": 2.0},
    "mixture": {"teacher_weights": [0.7, 0.3]},
}


def held(backend, dtype, options, width=V):
    student, teacher, labels = models(dtype, width)
    if options.get("teacher_form") == "probs":
        teacher = torch.softmax(teacher.double(), -1).to(dtype)
    if "teacher_weights" in options:
        teacher = [teacher, models(dtype, width, seed=1)[1]]
    if options.get("teacher_lse") is True:
        temperature = options.get("teacher_temperature", options.get("temperature", 1.0))
        cap = options.get("teacher_softcap")
        capped = teacher.double() if cap is None else cap * torch.tanh(teacher.double() / cap)
        options = {**options, "teacher_lse": normaliser(capped[:, : options.get("vocab_size", width)], temperature)}
    with testing.poisoned_memory():
        testing.check_kd_loss(student, teacher, labels, backend=backend, **options)


# Mixed KL.


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_kl_of_a_value_per_row_on_the_closed_interval(backend, dtype):
    held(backend, dtype, {"divergence": "mixed_kl", "row_param": of_rows(0.0, 1.0, 0.5, 0.0, 1.0, 0.3, 0.0, 1.0, 1e-3)})


def test_mixed_kl_at_0_and_1_is_forward_and_reverse_kl_where_the_other_is_infinite(backend):
    student, teacher, _ = models()
    teacher[0, ::3] = student[1, ::3] = -torch.inf
    loss, grad = graded(
        kd.kd_loss,
        student,
        teacher,
        divergence="mixed_kl",
        row_param=of_rows(0.0, 1.0),
        reduction="none",
        backend=backend,
    )
    for row, name in enumerate(("forward_kl", "reverse_kl")):
        alone = graded(kd.kd_loss, student[row], teacher[row], divergence=name, reduction="none", backend=backend)
        assert torch.isfinite(loss[row])
        torch.testing.assert_close(loss[row], alone[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad[row], alone[1], rtol=1e-5, atol=1e-6)
    assert kd.MixedKL(0.0).canonical() == kd.ForwardKL() and kd.MixedKL(1.0).canonical() == kd.ReverseKL()


def test_mixed_kl_gives_the_teacher_the_gradient_of_its_dual(backend):
    student, teacher, _ = models(torch.float64)
    for divergence, param in ((kd.MixedKL(0.3), None), (kd.MixedKL(), of_rows(0.0, 1.0, 0.9))):
        teacher.requires_grad_()
        options = {"divergence": divergence, "row_param": param}
        testing.check_kd_loss(student, teacher, backend=backend, temperature=2.0, **options)


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both", "uniform"])
def test_mixed_kl_of_sparse_teachers_is_both_calls(backend, tail):
    student, teacher, _ = models()
    captured = kd.capture_topk(teacher, 20, backend="torch")
    r = of_rows(0.0, 1.0, 0.5, 0.25)
    options = {"tail": tail, "reduction": "none", "backend": backend, "tail_logprob": captured.tail_logprob}
    if tail == "renormalize_both":
        del options["tail_logprob"]
    args = (captured.ids, captured.logprobs)
    found = graded(kd.topk_kd_loss, student, *args, divergence="mixed_kl", row_param=r, **options)
    forward = graded(kd.topk_kd_loss, student, *args, **options)
    reverse = graded(kd.topk_kd_loss, student, *args, divergence="reverse_kl", **options)
    for k in range(2):
        share = r if k == 0 else r[:, None]
        torch.testing.assert_close(found[k], (1 - share) * forward[k] + share * reverse[k], rtol=2e-5, atol=2e-6)


def test_mixed_kl_refuses_what_is_outside():
    student, teacher, _ = models()
    with pytest.raises(ValueError, match=r"MixedKL: reverse must lie in \[0, 1\], got 1.5"):
        kd.MixedKL(1.5)
    with pytest.raises(ValueError, match="row_param must be finite and between 0 and 1, got 1.5"):
        kd.kd_loss(student, teacher, divergence="mixed_kl", row_param=torch.full((N,), 1.5))
    with pytest.raises(ValueError, match="row_param must be finite and between 0 and 1, got 1.0"):
        kd.kd_loss(student, teacher, divergence="jsd", row_param=torch.ones(N))


# Losses of the acceptance rate.


@pytest.mark.parametrize("kind", LK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lk_loss(backend, kind, dtype):
    held(backend, dtype, LK[kind])


@pytest.mark.parametrize("kind", ["nla", "hybrid"])
@pytest.mark.parametrize("others", OTHERS)
def test_lk_loss_beside_other_options(backend, kind, others):
    held(backend, torch.float32, {**LK[kind], **OTHERS[others]})


@pytest.mark.parametrize("kind", ["nla", "hybrid"])
def test_lk_loss_over_several_tiles(backend, kind):
    held(backend, torch.bfloat16, {**LK[kind], "temperature": 2.0, "ce_weight": 0.1}, width=5003)


@pytest.mark.parametrize("kind", ["nla", "hybrid"])
def test_lk_loss_is_its_composition(backend, kind):
    """As it was written before: by calls of kd_loss, for any reduction and mask."""
    student, teacher, labels = models(torch.float64)
    rows = {"labels": labels, "reduction": "none", "backend": backend}

    def composed(s, t):
        tvd = kd.kd_loss(s, t, divergence="tvd", **rows)
        if kind == "nla":
            return torch.where(labels == -100, 0, -torch.log1p(-tvd)).sum() / 3
        share = torch.exp(-3 * (1 - tvd.detach()))
        return torch.where(labels == -100, 0, share * kd.kd_loss(s, t, **rows) + (1 - share) * tvd).sum() / 3

    found = graded(kd.lk_loss, student, teacher, labels, kind=kind, normalizer=3, backend=backend)
    for x, y in zip(found, graded(composed, student, teacher), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_the_gradient_of_nla_does_not_end_below_eps(backend):
    student, teacher = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    student[0, 0] = teacher[0, 1] = 40.0
    loss, grad = graded(kd.lk_loss, student, teacher, eps=1e-3, backend=backend)
    assert loss.item() == pytest.approx(6.907755, abs=1e-5)
    of_rate = graded(lambda s: -torch.minimum(s.softmax(-1), teacher.softmax(-1)).sum(), student)[1]
    torch.testing.assert_close(grad, of_rate / 1e-3, rtol=1e-6, atol=1e-18)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["nla", "hybrid"])
def test_lk_loss_with_statistics_in_place_and_from_hidden_states(backend, kind):
    student, teacher, labels = models()
    options = {"kind": kind, "backend": backend, "temperature": 2.0}
    loss, grad = graded(kd.lk_loss, student, teacher, labels, **options)
    alone, stats = kd.lk_loss(student, teacher, labels, return_stats=True, **options)
    torch.testing.assert_close(alone, loss)
    p, q = (x.div(2).softmax(-1) for x in (teacher, student))
    rate = torch.where(labels == -100, 0, torch.minimum(p, q).sum(-1))
    torch.testing.assert_close(stats.acceptance, rate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(4 * stats.divergence.sum() / 8, loss, rtol=1e-5, atol=1e-6)
    leaf = student.clone().requires_grad_()
    kd.lk_loss(leaf * 1, teacher, labels, inplace=True, **options).backward()
    torch.testing.assert_close(leaf.grad, grad)
    eye = torch.eye(V)
    hidden = student.clone().requires_grad_()
    of_hidden = kd.linear_lk_loss(hidden, eye, teacher, eye, labels, chunk_bytes=4000, **options)
    of_hidden.backward()
    torch.testing.assert_close(of_hidden, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, grad, rtol=1e-4, atol=1e-7)


def test_lk_loss_gives_a_teacher_its_gradient_in_plain_pytorch():
    student, teacher, _ = models(torch.float64)
    teacher.requires_grad_()
    for kind in ("nla", "hybrid"):
        options = {"kind": kind, "temperature": 2.0}
        testing.check_kd_loss(student, teacher, backend="torch", **options)
        testing.check_kd_loss(student, teacher, backend="auto", **options)
    if backends.BACKENDS["cpu"].why_not("cpu") is None:
        with pytest.raises(ValueError, match="with lk_loss the teacher gets a gradient from plain PyTorch only"):
            kd.lk_loss(student.requires_grad_(), teacher, backend="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tv"}, "kind must be one of nla, hybrid, got 'tv'"),
        ({"eps": 0.0}, r"eps must be in \(0, 1\], got 0.0"),
        ({"eps": 2.0}, r"eps must be .*, got 2.0"),
        ({"kind": "hybrid", "eta": -1.0}, "eta must be >= 0, got -1.0"),
        ({"eta": 2.0}, "eta has no meaning with kind 'nla'"),
        ({"kind": "hybrid", "eps": 0.1}, "eps has no meaning with kind 'hybrid'"),
        ({"divergence": "tvd"}, "lk_loss got an unexpected option 'divergence'"),
    ],
)
def test_lk_loss_refuses_by_name(options, message):
    student, teacher, _ = models()
    for call in (lambda: kd.lk_loss(student, teacher, **options),):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_what_lk_loss_computes_is_no_divergence():
    student, teacher, _ = models()
    for name in ("lk_nla", "lk_hybrid"):
        assert name not in kd.divergences.names()
        with pytest.raises(ValueError, match="divergence"):
            kd.kd_loss(student, teacher, divergence=name)
        with pytest.raises(ValueError, match="divergence"):
            kd.kd_loss(student, teacher, divergence=kd.divergences.by_name(name)())


# Signed mixtures of logits.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1.0, 0.5, -0.5), (-0.4, 1.2, 0.0), (2.0, 1.0, -3.0)])
def test_signed_mixtures(backend, dtype, weights):
    student, teacher, labels = models(dtype)
    teachers = [teacher, *(models(dtype, seed=k)[1] for k in (1, 2))]
    options = {"teacher_weights": weights, "mixture": "logits", "temperature": 2.0}
    testing.check_kd_loss(student, teachers, labels, backend=backend, **options)
    per_row = torch.tensor(weights) * of_rows(1.0, -1.0, 0.0, 0.5)[:, None]
    testing.check_kd_loss(student, teachers, labels, backend=backend, **{**options, "teacher_weights": per_row})


def test_what_a_teacher_rules_out_stays_ruled_out_whatever_its_sign(backend):
    student, teacher, _ = models()
    other = models(seed=1)[1]
    teacher[:, ::4], other[:, 1::4] = -torch.inf, -torch.inf
    for weights, out in (((1.0, -0.5), (0, 1)), ((-1.0, 0.5), (0, 1)), ((1.0, 0.0), (0,)), ((0.0, -2.0), (1,))):
        finite = [torch.where(torch.isneginf(x), 0.0, x) for x in (teacher, other)]
        target = weights[0] * finite[0] + weights[1] * finite[1]
        for k in out:
            target[:, k::4] = -torch.inf
        options = {"reduction": "none", "backend": backend}
        found = graded(kd.kd_loss, student, [teacher, other], teacher_weights=weights, mixture="logits", **options)
        for x, y in zip(found, graded(kd.kd_loss, student, target, **options), strict=True):
            assert torch.isfinite(y).all()
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


def test_a_teacher_of_weight_0_counts_nothing_and_an_infinite_logit_is_no_number(backend):
    student, teacher, _ = models()
    options = {"mixture": "logits", "reduction": "none", "backend": backend}
    bad = torch.full_like(teacher, torch.nan)
    loss, grad = graded(kd.kd_loss, student, [teacher, bad], teacher_weights=(-1.0, 0.0), **options)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    other = teacher.clone()
    other[2, 3] = torch.inf
    loss, _ = graded(kd.kd_loss, student, [teacher, other], teacher_weights=(1.0, -1.0), **options)
    assert torch.isnan(loss[2]) and not torch.isnan(loss[3])


def test_weights_of_probabilities_stay_positive():
    student, teacher, _ = models()
    with pytest.raises(ValueError, match="teacher_weights must be >= 0"):
        kd.kd_loss(student, [teacher, teacher], teacher_weights=(1.0, -0.5))
    with pytest.raises(ValueError, match='those of mixture="logits" may be below 0'):
        kd.kd_loss(student, [teacher, teacher], teacher_weights=torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match="teacher_weights must be finite"):
        kd.kd_loss(student, [teacher, teacher], teacher_weights=torch.tensor([1.0, torch.inf]), mixture="logits")


# A teacher that is normalised elsewhere.

PARTS = {name: {"divergence": name} for name in ("forward_kl", "soft_ce", "tvd")}
PARTS |= {"nla": {"kind": "nla"}, "hybrid": {"kind": "hybrid"}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", PARTS)
def test_teacher_lse(backend, part, dtype):
    held(backend, dtype, {**PARTS[part], "teacher_lse": True})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("others", ["rows", "hard", "caps", "vocab"])
def test_teacher_lse_beside_other_options(backend, part, others):
    held(backend, torch.float32, {**PARTS[part], **OTHERS[others], "teacher_lse": True})


def test_teacher_lse_is_a_column_more_of_the_teacher(backend):
    """The true acceptance rate: all outcomes that are not here are one, to which the student gives nothing."""
    student, teacher, _ = models(torch.float64)
    lse = normaliser(teacher)
    rest = torch.log((lse.exp() - teacher.exp().sum(-1)).clamp(min=0))[:, None]
    nothing = torch.full((N, 1), -torch.inf, dtype=torch.float64)
    for loss in (kd.lk_loss, lambda *a, **k: kd.kd_loss(*a, divergence="tvd", **k)):
        found = graded(loss, student, teacher, teacher_lse=lse, reduction="none", backend=backend)
        wide = graded(loss, torch.cat([student, nothing], -1), torch.cat([teacher, rest], -1), reduction="none")
        torch.testing.assert_close(found[0], wide[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[1], wide[1][:, :V], rtol=1e-9, atol=1e-12)


def test_teacher_lse_of_log_probabilities_that_are_a_part(backend):
    """They are taken as they are, by a normaliser of 0."""
    student, teacher, _ = models(torch.float64)
    part = (teacher - normaliser(teacher)[:, None]).detach()
    options = {"reduction": "none", "backend": backend}
    found = graded(kd.kd_loss, student, part, teacher_form="log_probs", teacher_lse=0.0, **options)
    p = part.exp()
    loss, grad = graded(lambda s: (p * (part - s.log_softmax(-1))).sum(-1), student)
    torch.testing.assert_close(found[0], loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], grad, rtol=1e-9, atol=1e-12)
    assert (found[0] < 0).any()
    of_probs = kd.kd_loss(student, p, teacher_form="unnormalized_probs", teacher_lse=0.0, **options)
    torch.testing.assert_close(of_probs, loss, rtol=1e-9, atol=1e-12)


def test_teacher_lse_of_its_own_columns_changes_nothing(backend):
    student, teacher, labels = models()
    # Of equal models nothing says which p is the larger.
    student, teacher, labels = (x[SPREAD[:, 0] > 0] for x in (student, teacher, labels))
    for options in PARTS.values():
        options = {**options, "labels": labels, "reduction": "none", "backend": backend}
        loss = kd.lk_loss if "kind" in options else kd.kd_loss
        found = graded(loss, student, teacher, teacher_lse=teacher.logsumexp(-1), **options)
        for x, y in zip(found, graded(loss, student, teacher, **options), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("part", PARTS)
def test_teacher_lse_of_a_teacher_that_has_nothing_here(backend, part):
    """All columns of some rows are -inf, as where top p left tokens alone that a draft vocabulary has not."""
    student, teacher, labels = models()
    teacher[::2] = -torch.inf
    teacher[6, 3] = torch.nan
    options = {"labels": labels, "ce_weight": 0.5, "teacher_lse": 3.0, "reduction": "none", "backend": backend}
    loss = kd.lk_loss if "kind" in PARTS[part] else kd.kd_loss
    found = graded(loss, student, teacher, **PARTS[part], **options)
    hard = graded(kd.kd_loss, student, None, **{**options, "kd_weight": 0.0, "teacher_lse": None})
    constant = {"tvd": 1.0, "nla": -math.log(1e-5)}.get(PARTS[part].get("divergence") or PARTS[part].get("kind"), 0.0)
    for row in (0, 2, 8):
        torch.testing.assert_close(found[0][row], hard[0][row] + constant, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1][row], hard[1][row], rtol=1e-4, atol=1e-6)
    assert found[0][6].isnan() and found[0][[1, 3, 5, 7]].isfinite().all()
    assert found[0][4] == 0 and not found[1][4].any()


@pytest.mark.parametrize("width", [V, 3003])
def test_teacher_lse_far_below_that_of_its_columns(backend, width):
    """Nobody's normaliser, but a row has its numbers all the same: no difference of large ones is taken."""
    student, teacher, _ = models(torch.float64, width)
    lse = teacher.logsumexp(-1) - torch.linspace(0, 20, N, dtype=torch.float64)
    p = (teacher - lse[:, None]).exp()

    def acceptance(s):
        return torch.minimum(s.softmax(-1), p).sum(-1)

    textbook = {"tvd": lambda s: 1 - acceptance(s), "lk": lambda s: -acceptance(s).log()}
    losses = {"tvd": lambda *a, **k: kd.kd_loss(*a, divergence="tvd", **k), "lk": kd.lk_loss}
    apart = SPREAD[:, 0] > 0
    for dtype, error in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        for name, loss in losses.items():
            s, t = student.to(dtype), teacher.to(dtype)
            found = graded(loss, s, t, teacher_lse=lse.to(dtype), reduction="none", backend=backend)
            wanted = graded(textbook[name], student)
            torch.testing.assert_close(found[0].double(), wanted[0], rtol=error, atol=error)
            torch.testing.assert_close(found[1].double()[apart], wanted[1][apart], rtol=10 * error, atol=error)


def test_teacher_lse_from_hidden_states(backend):
    student, teacher, labels = models()
    lse, eye = normaliser(teacher), torch.eye(V)
    options = {"teacher_lse": lse, "backend": backend}
    loss, grad = graded(kd.kd_loss, student, teacher, labels, **options)
    of_hidden = graded(lambda s: kd.linear_kd_loss(s, eye, teacher, eye, labels, chunk_bytes=4000, **options), student)
    torch.testing.assert_close(of_hidden[0], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_hidden[1], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "reverse_kl"}, "teacher_lse needs a divergence .* got 'reverse_kl'"),
        ({"divergence": "jsd"}, "teacher_lse needs a divergence .* got 'jsd'"),
        ({"divergence": "mixed_kl"}, "teacher_lse needs a divergence .* got 'mixed_kl'"),
        ({"standardize": True}, "teacher_lse cannot be combined with standardize"),
        ({"return_stats": True}, "teacher_lse cannot be combined with return_stats"),
        ({"teacher_weights": [1.0]}, "teacher_lse needs one teacher, got teacher_weights"),
        ({"teacher_lse": torch.zeros(N + 1)}, "teacher_lse must be a number or have one value per row"),
        ({"teacher_lse": torch.full((N,), torch.inf)}, "teacher_lse must be finite"),
        ({"teacher_lse": torch.zeros(N, requires_grad=True)}, "teacher_lse must not require grad"),
        ({"teacher_lse": "full"}, "teacher_lse must be a number"),
    ],
)
def test_teacher_lse_refuses_by_name(options, message):
    student, teacher, _ = models()
    options = {"teacher_lse": torch.zeros(N), **options}
    with pytest.raises((TypeError, ValueError), match=message):
        kd.kd_loss(student, teacher, **options)


def test_teacher_lse_needs_one_teacher():
    student, teacher, _ = models()
    with pytest.raises(ValueError, match="teacher_lse needs one teacher, got a sequence"):
        kd.kd_loss(student, [teacher, teacher], teacher_lse=0.0)
    with pytest.raises(ValueError, match="teacher_lse has no meaning without a teacher"):
        kd.kd_loss(student, None, torch.zeros(N, dtype=torch.long), kd_weight=0.0, ce_weight=1.0, teacher_lse=0.0)


# A temperature that is learned.


@pytest.mark.parametrize("requested", ["torch", "auto"])
@pytest.mark.parametrize("shape", [(), (1,), (N,)])
def test_a_temperature_gets_its_gradient_in_plain_pytorch(requested, shape):
    student, teacher, labels = models(torch.float64)
    temperature = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
    options = {"divergence": "jsd", "reduction": "sum", "backend": requested}
    loss = kd.kd_loss(student.requires_grad_(), teacher, labels, temperature=temperature, **options)
    found = torch.autograd.grad(loss, (temperature, student))
    plain = testing.textbook_loss(student, teacher, labels, temperature=2.0, divergence="jsd", reduction="sum")
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found[1], torch.autograd.grad(plain, student)[0])
    h = 1e-5
    for k in range(temperature.numel()):
        moved = [temperature.detach().clone() for _ in range(2)]
        for t, step in zip(moved, (h, -h), strict=True):
            t.reshape(-1)[k] += step
        high, low = (kd.kd_loss(student.detach(), teacher, labels, temperature=t, **options) for t in moved)
        torch.testing.assert_close(found[0].reshape(-1)[k], (high - low) / (2 * h), rtol=1e-6, atol=1e-8)


def test_a_teacher_s_temperature_is_learned_alone():
    student, teacher, _ = models(torch.float64)
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for loss in (kd.kd_loss, kd.lk_loss):
        value = loss(student, teacher, temperature=2.0, teacher_temperature=temperature)
        (grad,) = torch.autograd.grad(value, temperature)
        assert grad.isfinite() and grad != 0


def test_kernels_say_that_a_temperature_gets_no_gradient_from_them():
    student, teacher, _ = models()
    temperature = torch.tensor(2.0, requires_grad=True)
    captured = kd.capture_topk(teacher, 5, backend="torch")
    if backends.BACKENDS["cpu"].why_not("cpu") is None:
        with pytest.raises(ValueError, match="temperature requires grad, which only plain PyTorch gives it"):
            kd.kd_loss(student, teacher, temperature=temperature, backend="cpu")
        with torch.no_grad():
            kd.kd_loss(student, teacher, temperature=temperature, backend="cpu")
    for call in (
        lambda: kd.topk_kd_loss(
            student, captured.ids, captured.logprobs, temperature=temperature, teacher_temperature=1.0
        ),
        lambda: kd.linear_kd_loss(student, torch.eye(V), teacher, torch.eye(V), temperature=temperature),
    ):
        with pytest.raises(ValueError, match="temperature must not require grad: only kd_loss"):
            call()
