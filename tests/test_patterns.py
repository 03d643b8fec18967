"""The losses that are patterns of their own (TAID, DKD, logit MSE) and the transformed teachers, against the oracle."""

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ROWS = 6

dtypes = pytest.mark.parametrize("dtype", DTYPES)
vocabularies = pytest.mark.parametrize("vocab_size", [2, 7, 33, 5000], ids=lambda v: f"V{v}")
# No -inf: DKD's distribution over the other classes has them, the other two patterns have no use for them.
kinds = pytest.mark.parametrize("kind", ["normal", "near", "equal", "flat", "huge", "late", "peaked", "spread"])


def inputs(kind, vocab_size, dtype):
    student, teacher = testing.make_inputs(kind, ROWS, vocab_size, DTYPES[dtype])
    # Labels of which some are the student's and some the teacher's favourites, the first and the last class.
    labels = torch.stack([student.argmax(-1), teacher.argmax(-1)], -1).flatten()[::2]
    labels[0], labels[1], labels[2] = 0, vocab_size - 1, -100
    return student, teacher, labels


def oracle(textbook, student, teacher, unit):
    return testing.Oracle(lambda s, t, exact: textbook(s, t), student, teacher, unit)


# TAID.


@kinds
@dtypes
@pytest.mark.parametrize("interpolation", [0.0, 0.3, 1.0, "rows"])
def test_taid_is_kd_towards_the_interpolated_teacher(kind, dtype, interpolation, backend):
    student, teacher, labels = inputs(kind, 1000, dtype)
    lam = (
        torch.linspace(0, 1, ROWS, dtype=torch.float64)
        if interpolation == "rows"
        else torch.tensor(interpolation, dtype=torch.float64)
    )
    weights = torch.stack([1 - lam, lam], -1).expand(ROWS, 2)
    options = {"temperature": 2.0, "ce_weight": 0.3, "reduction": "none"}

    def textbook(s, t, exact):
        teachers = [s.detach(), t]
        return testing.textbook_loss(
            s, teachers, labels, exact=exact, teacher_weights=weights, mixture="logits", **options
        )

    unit = testing.rounding_unit(
        student.double(),
        [student.double(), teacher.double()],
        labels,
        epsilon=testing.allowed_epsilon(DTYPES[dtype]),
        teacher_weights=weights,
        mixture="logits",
        **options,
    )
    chosen = lam if interpolation == "rows" else interpolation
    with testing.poisoned_memory():
        testing.Oracle(textbook, student, teacher, unit).check(
            lambda s, t: kd.taid_loss(s, t, labels, interpolation=chosen, backend=backend, **options)
        )


def test_taid_begins_at_the_student_and_ends_at_the_teacher(backend):
    student, teacher, labels = inputs("normal", 100, "fp64")
    options = {"temperature": 2.0, "backend": backend}
    start = testing.evaluate(lambda s, t: kd.taid_loss(s, t, labels, interpolation=0.0, **options), student, teacher)
    assert start.loss.abs() < 1e-14 and start.dstudent.abs().max() < 1e-14
    end = testing.evaluate(lambda s, t: kd.taid_loss(s, t, labels, interpolation=1.0, **options), student, teacher)
    kd_loss = testing.evaluate(lambda s, t: kd.kd_loss(s, t, labels, **options), student, teacher)
    torch.testing.assert_close(end.loss, kd_loss.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(end.dstudent, kd_loss.dstudent, rtol=1e-9, atol=1e-14)


def test_taid_gives_the_teacher_its_share_of_the_gradient():
    student, teacher, _ = inputs("normal", 20, "fp64")
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: kd.taid_loss(student, t, interpolation=0.4, reduction="none"), teacher)


# Decoupled distillation.


def others(logits, labels):
    """``[N, V - 1]``: the logits without the label's."""
    keep = torch.arange(logits.shape[-1]) != labels[:, None]
    return logits[keep].reshape(len(logits), -1)


def textbook_dkd(student, teacher, labels, *, alpha=1.0, beta=8.0, temperature=1.0, teacher_temperature=None):
    """Equations 5 to 7 of Zhao et al. 2022: the two-way distributions from the others' total, never from 1 - p."""
    counts = labels != -100
    q, p = student[counts] / temperature, teacher[counts] / (teacher_temperature or temperature)
    classes = labels[counts]

    def two_way(logits):
        total = torch.logsumexp(logits, -1)
        label = logits.gather(-1, classes[:, None]).squeeze(-1)
        return torch.stack([label - total, torch.logsumexp(others(logits, classes), -1) - total], -1)

    def kl(logp, logq):
        return torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq)).sum(-1)

    tckd = kl(two_way(p), two_way(q))
    nckd = kl(F.log_softmax(others(p, classes), -1), F.log_softmax(others(q, classes), -1))
    rows = temperature**2 * (alpha * tckd + beta * nckd)
    return torch.zeros(len(labels), dtype=rows.dtype).masked_scatter(counts, rows)


def dkd_unit(student, teacher, labels, dtype, *, alpha=1.0, beta=8.0, temperature=1.0, teacher_temperature=None):
    """That of the KL over the others, and for the label a number of roundings of its logit's distance to theirs."""
    counts = labels != -100
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    rest = [others(x.double()[counts], labels[counts]) for x in (student, teacher)]
    unit = testing.rounding_unit(*rest, epsilon=testing.allowed_epsilon(DTYPES[dtype]), **options)
    far = [
        2 + (x.double()[counts].gather(-1, labels[counts][:, None]).squeeze(-1) - torch.logsumexp(y, -1)).abs()
        for x, y in zip((student, teacher), rest, strict=True)
    ]
    label = (far[0] + far[1]) * max(1 / temperature, 1.0) * max(1 / (teacher_temperature or temperature), 1.0)
    rows = beta * unit.loss + alpha * temperature**2 * label, beta * unit.dstudent + alpha * temperature * label
    loss, dstudent = (torch.zeros(len(labels), dtype=torch.float64).masked_scatter(counts, x) for x in rows)
    return testing.Unit(loss, dstudent, dstudent)


DKD = {
    "default": {},
    "T4": {"temperature": 4.0},
    "temperatures": {"temperature": 2.0, "teacher_temperature": 0.5, "alpha": 3.0, "beta": 0.5},
    "tckd": {"beta": 0.0, "temperature": 2.0},
    "nckd": {"alpha": 0.0, "temperature": 2.0},
}


def check_dkd(student, teacher, labels, dtype, options, backend):
    unit = dkd_unit(student, teacher, labels, dtype, **options)
    with testing.poisoned_memory():
        oracle(lambda s, t: textbook_dkd(s, t, labels, **options), student, teacher, unit).check(
            lambda s, t: kd.dkd_loss(s, t, labels, reduction="none", backend=backend, **options)
        )


@kinds
@dtypes
@pytest.mark.parametrize("options", DKD.values(), ids=DKD)
def test_dkd(kind, dtype, options, backend):
    check_dkd(*inputs(kind, 1000, dtype), dtype, options, backend)


@vocabularies
@dtypes
@pytest.mark.parametrize("options", DKD.values(), ids=DKD)
def test_dkd_of_any_number_of_classes(vocab_size, dtype, options, backend):
    check_dkd(*inputs("normal", vocab_size, dtype), dtype, options, backend)


@dtypes
@pytest.mark.parametrize("lead", [60.0, 95.0, 300.0])
@pytest.mark.parametrize("options", DKD.values(), ids=DKD)
def test_dkd_beside_a_label_far_ahead(options, lead, dtype, backend):
    """The others' exponentials are 0 beside the label's, and the KL over them is as exact as without it."""
    student, teacher, labels = inputs("normal", 1000, dtype)
    rows = (labels != -100).nonzero().squeeze(1)
    for logits in (student, teacher):
        logits[rows, labels[rows]] = lead
    check_dkd(student, teacher, labels, dtype, options, backend)


def test_dkd_puts_the_kl_together_again(backend):
    """Equation 8: KL = TCKD + (1 - p_label) NCKD."""
    student, teacher, labels = inputs("normal", 50, "fp64")
    labels[2] = 7
    options = {"temperature": 2.0, "reduction": "none", "backend": backend}
    p = torch.softmax(teacher / 2, -1).gather(-1, labels[:, None]).squeeze(-1)
    tckd = kd.dkd_loss(student, teacher, labels, alpha=1.0, beta=0.0, **options)
    nckd = kd.dkd_loss(student, teacher, labels, alpha=0.0, beta=1.0, **options)
    torch.testing.assert_close(tckd + (1 - p) * nckd, kd.kd_loss(student, teacher, **options), rtol=1e-11, atol=0)


def test_dkd_of_one_class_is_0(backend):
    student, teacher = torch.randn(3, 1, requires_grad=True), torch.randn(3, 1)
    loss = kd.dkd_loss(student, teacher, torch.zeros(3, dtype=torch.int64), reduction="none", backend=backend)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6 and not student.grad.any()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_dkd_of_one_class_without_a_distribution_is_nan(value, backend):
    logits = torch.tensor([[1.0], [value], [2.0]])
    for student, teacher in ((logits, torch.ones(3, 1)), (torch.ones(3, 1), logits)):
        loss = kd.dkd_loss(student, teacher, torch.zeros(3, dtype=torch.int64), reduction="none", backend=backend)
        assert loss.isnan().tolist() == [False, True, False]


def test_dkd_options_are_those_of_kd_loss(backend):
    student, teacher, labels = inputs("normal", 90, "fp32")
    student[2], teacher[2] = torch.nan, torch.nan  # ignored
    padded = F.pad(student, (0, 6), value=torch.nan).reshape(2, 3, 96)
    weight = torch.linspace(0.5, 2, ROWS)
    options = {"alpha": 2.0, "temperature": 2.0, "backend": backend}

    def padded_loss(s, t):
        return kd.dkd_loss(
            s, t.reshape(2, 3, 90), labels.reshape(2, 3), vocab_size=90, row_weight=weight.reshape(2, 3), normalizer=3,
            **options,
        )  # fmt: skip

    got = testing.evaluate(padded_loss, padded, teacher)
    rows = testing.evaluate(
        lambda s, t: kd.dkd_loss(s, t, labels, reduction="none", **options), student, teacher, weight / 3
    )
    torch.testing.assert_close(got.loss, (rows.loss * weight).sum() / 3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.dstudent.reshape(ROWS, 96)[:, :90], rows.dstudent, rtol=1e-5, atol=1e-6)
    assert not got.dstudent[..., 90:].any() and not rows.dstudent[2].any() and rows.loss[2] == 0


# Logit matching.


def textbook_mse(student, teacher, labels, centered):
    difference = (student - teacher)[labels != -100]
    if centered:
        difference = difference - difference.mean(-1, keepdim=True)
    rows = (difference**2).mean(-1)
    return torch.zeros(len(labels), dtype=rows.dtype).masked_scatter(labels != -100, rows)


@kinds
@dtypes
@pytest.mark.parametrize("vocab_size", [7, 5000], ids=lambda v: f"V{v}")
@pytest.mark.parametrize("centered", [False, True], ids=["", "centered"])
def test_mse(kind, dtype, vocab_size, centered, backend):
    student, teacher, labels = inputs(kind, vocab_size, dtype)
    size = student.double().abs().amax(-1) + teacher.double().abs().amax(-1)
    unit = testing.Unit(size**2, size / vocab_size, size)
    with testing.poisoned_memory():
        oracle(lambda s, t: textbook_mse(s, t, labels, centered), student, teacher, unit).check(
            lambda s, t: kd.logit_mse_loss(s, t, labels, centered=centered, reduction="none", backend=backend)
        )


def test_mse_is_that_of_pytorch(backend):
    student, teacher, _ = inputs("normal", 100, "fp64")
    got = testing.evaluate(lambda s, t: kd.logit_mse_loss(s, t, backend=backend), student, teacher)
    expected = testing.evaluate(F.mse_loss, student, teacher)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.dstudent, expected.dstudent, rtol=1e-12, atol=0)


def test_centred_mse_does_not_see_a_shift(backend):
    student, teacher, _ = inputs("normal", 100, "fp64")
    shift = torch.linspace(-50, 50, ROWS, dtype=torch.float64)[:, None]
    options = {"reduction": "none", "backend": backend}
    centred = kd.logit_mse_loss(student, teacher, centered=True, **options)
    shifted = kd.logit_mse_loss(student + shift, teacher, centered=True, **options)
    torch.testing.assert_close(shifted, centred, rtol=1e-9, atol=0)
    plain, moved = (kd.logit_mse_loss(s, teacher, **options) for s in (student, student + shift))
    assert (plain - moved).abs().min() > 0.1


def test_mse_pads_strides_and_ignores(backend):
    student, teacher, labels = inputs("normal", 64, "fp32")
    student[2] = torch.nan
    wide = torch.full((ROWS, 80), torch.nan)
    wide[:, :64] = student
    options = {"centered": True, "reduction": "sum", "backend": backend}
    got = testing.evaluate(lambda s, t: kd.logit_mse_loss(s, t, labels, vocab_size=64, **options), wide, teacher)
    view = testing.evaluate(lambda s, t: kd.logit_mse_loss(s, t, labels, **options), wide[:, :64], teacher)
    torch.testing.assert_close(got.loss, view.loss)
    assert torch.equal(got.dstudent[:, :64], view.dstudent) and not got.dstudent[:, 64:].any()
    assert torch.isfinite(got.loss) and not view.dstudent[2].any()


@pytest.mark.parametrize("loss", [kd.dkd_loss, kd.logit_mse_loss, "taid"], ids=["dkd", "mse", "taid"])
@dtypes
def test_a_nan_stays_in_its_row(loss, dtype, backend):
    student, teacher, labels = inputs("normal", 300, dtype)
    labels[2] = 5
    options = {"interpolation": 0.5} if loss == "taid" else {}
    function = kd.taid_loss if loss == "taid" else loss
    student[1, 17], teacher[4, 299] = torch.nan, torch.nan
    got = testing.evaluate(
        lambda s, t: function(s, t, labels, reduction="none", backend=backend, **options),
        student,
        teacher,
        torch.ones(ROWS),
    )
    assert got.loss.isnan().tolist() == [False, True, False, False, True, False]
    assert torch.isfinite(got.dstudent[[0, 2, 3, 5]]).all() and got.dstudent[[1, 4]].isnan().any(-1).all()


@pytest.mark.parametrize("loss", [kd.dkd_loss, kd.logit_mse_loss], ids=["dkd", "mse"])
@dtypes
def test_in_place(loss, dtype, backend):
    student, teacher, labels = inputs("normal", 300, dtype)
    fresh = testing.evaluate(lambda s, t: loss(s, t, labels, backend=backend), student, teacher)
    copy = student.clone()
    there = testing.evaluate(lambda s, t: loss(s, t, labels, inplace=True, backend=backend), copy, teacher)
    assert torch.equal(there.dstudent, fresh.dstudent) and torch.equal(there.loss, fresh.loss)
    if backend == "cpu":
        assert there.dstudent.data_ptr() == copy.data_ptr()


# Standardised logits.


def test_standardised_logits_ignore_scale_and_shift(backend):
    student, teacher, _ = inputs("normal", 200, "fp64")
    options = {"standardize": True, "temperature": 2.0, "reduction": "none", "backend": backend}
    plain = kd.kd_loss(student, teacher, **options)
    torch.testing.assert_close(kd.kd_loss(5 * student - 3, teacher / 7 + 1, **options), plain, rtol=1e-10, atol=0)
    z = [(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (student, teacher)]
    by_hand = kd.kd_loss(*z, temperature=2.0, reduction="none", backend=backend)
    torch.testing.assert_close(plain, by_hand, rtol=1e-10, atol=0)


def test_standardised_logits_of_a_row_without_spread(backend):
    student, teacher, _ = inputs("normal", 20, "fp32")
    student = torch.full_like(student, 3.0)
    outcome = testing.check_kd_loss(student, teacher, standardize=True, temperature=2.0, backend=backend)
    assert torch.isfinite(outcome.loss).all() and torch.isfinite(outcome.dstudent).all()


# Edges of rows.


@pytest.mark.parametrize("vocab_size", [770, 1783], ids=lambda v: f"V{v}")
@pytest.mark.parametrize("loss", ["dkd", "topk", "mse"])
@dtypes
def test_edges_of_rows_that_are_written_around_the_caches(loss, vocab_size, dtype, backend):
    """Rows of a large gradient begin anywhere in a cache line, and labels and ids stand in what fills no vector."""
    rows = 1 + (9 << 20) // (vocab_size * DTYPES[dtype].itemsize)
    student, teacher = testing.make_inputs("normal", rows, vocab_size, torch.float32)
    student, teacher = student.to(DTYPES[dtype]), teacher.to(DTYPES[dtype])
    labels = torch.arange(rows) % vocab_size
    ends = torch.stack([labels, (labels + 7) % vocab_size, vocab_size - 1 - labels % 40], -1)
    if loss != "topk":
        labels = torch.where(labels % 3 == 0, vocab_size - 1 - labels % 40, labels)

    def call(part, s, backend):
        t, mark = teacher[part], labels[part]
        if loss == "dkd":
            return kd.dkd_loss(s, t, mark, reduction="none", backend=backend)
        if loss == "mse":
            return kd.logit_mse_loss(s, t, mark, reduction="none", backend=backend)
        logprobs = torch.log_softmax(t.float(), -1).gather(1, ends[part])
        return kd.topk_kd_loss(s, ends[part], logprobs, mark, ce_weight=0.5, reduction="none", backend=backend)

    def run(part, backend, s):
        s = s.detach().clone().requires_grad_()
        with testing.poisoned_memory():
            values = call(part, s, backend)
            values.sum().backward()
        return values.detach(), s.grad

    values, gradient = run(slice(None), backend, student)
    assert gradient.nbytes > 8 << 20
    for start in (0, rows // 2, rows - 9):
        part = slice(start, start + 9)
        expected, exact = run(part, "torch", student[part].double())
        epsilon = testing.allowed_epsilon(DTYPES[dtype])
        torch.testing.assert_close(values[part].double(), expected, rtol=2e-5, atol=2e-5)
        rounding = torch.finfo(DTYPES[dtype]).eps
        torch.testing.assert_close(gradient[part].double(), exact, rtol=2 * rounding, atol=2 * epsilon)


# Mixtures.


@pytest.mark.parametrize("mixture", ["probs", "logits"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@dtypes
def test_mixtures(mixture, count, dtype, backend):
    student, first, labels = inputs("normal", 1000, dtype)
    teachers = [testing.make_inputs("normal", ROWS, 1000, DTYPES[dtype], seed)[1] for seed in range(1, count)]
    weights = torch.softmax(torch.arange(count, dtype=torch.float64), 0)
    options = {"teacher_weights": weights.tolist(), "mixture": mixture, "temperature": 1.5, "divergence": "jsd"}
    testing.check_kd_loss(student, [first, *teachers], labels, backend=backend, **options)


@pytest.mark.parametrize("mixture", ["probs", "logits"])
def test_a_mixture_of_equals_is_each_of_them(mixture, backend):
    student, teacher, _ = inputs("normal", 300, "fp64")
    options = {"temperature": 2.0, "reduction": "none", "backend": backend}
    got = kd.kd_loss(student, [teacher.clone() for _ in range(4)], mixture=mixture, **options)
    torch.testing.assert_close(got, kd.kd_loss(student, teacher, **options), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mixture", ["probs", "logits"])
def test_a_teacher_of_weight_0_is_not_heard(mixture, backend):
    student, teacher, _ = inputs("normal", 300, "fp32")
    deaf = torch.full_like(teacher, -torch.inf)
    deaf[:, 0] = 1e30
    options = {"mixture": mixture, "temperature": 2.0, "reduction": "none", "backend": backend}
    got = kd.kd_loss(student, [deaf, teacher], teacher_weights=[0.0, 1.0], **options)
    expected = kd.kd_loss(student, teacher, temperature=2.0, reduction="none", backend=backend)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_teachers_may_rule_out_tokens(backend):
    """In a mixture of probabilities a token is impossible only where all teachers say so."""
    student, first, _ = inputs("normal", 300, "fp32")
    second = testing.make_inputs("normal", ROWS, 300, torch.float32, 1)[1]
    first[:, ::2], second[:, ::3] = -torch.inf, -torch.inf
    for divergence in ("forward_kl", "jsd", "skew_reverse_kl"):
        options = {"divergence": divergence, "temperature": 2.0, "teacher_weights": [0.5, 0.5]}
        testing.check_kd_loss(student, [first, second], backend=backend, **options)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("depth", [50.0, 75.0, 150.0])
@dtypes
def test_a_mixture_keeps_the_logarithm_of_what_is_too_small_for_a_float(depth, count, dtype, backend):
    """e^-75 is a float and its share of a mixture hardly one, e^-150 is none: a reverse KL sees its logarithm."""
    student, first, _ = inputs("normal", 300, dtype)
    teachers = [first, *(testing.make_inputs("normal", ROWS, 300, DTYPES[dtype], seed)[1] for seed in (1, 2))][:count]
    for teacher in teachers:
        teacher[:, 5] -= depth
    options = {"divergence": "reverse_kl", "teacher_weights": [1 / count] * count}
    testing.check_kd_loss(student, teachers, backend=backend, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys", "jsd"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_probabilities_below_the_normal_range_have_their_logarithms(divergence, dtype, backend):
    """At a temperature, or where the student has its mass, they count: e^-100 is no float of full precision."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(ROWS, 300, generator=generator).to(DTYPES[dtype])
    teacher = (torch.rand(ROWS, 300, generator=generator) * -104).exp().to(DTYPES[dtype])
    assert bool((teacher.float() < torch.finfo(torch.float32).smallest_normal).any())
    options = {"divergence": divergence, "teacher_form": "unnormalized_probs", "temperature": 20.0}
    testing.check_kd_loss(student, teacher, backend=backend, **options)


@pytest.mark.parametrize("form", ["probs", "log_probs", "probs mixed", "logits mixed", "standardised", "capped"])
@dtypes
def test_a_nan_of_the_teacher_spoils_its_row_only(form, dtype, backend, monkeypatch):
    """Among probabilities too, where their values are not read."""
    monkeypatch.setattr("kdkernels.checks.dense.reads_values", lambda value: False)
    student, teacher, _ = inputs("normal", 300, dtype)
    other = testing.make_inputs("normal", ROWS, 300, DTYPES[dtype], 1)[1]
    options = {
        "probs": {"teacher_form": "probs"},
        "log_probs": {"teacher_form": "log_probs"},
        "logits mixed": {"mixture": "logits"},
        "standardised": {"standardize": True},
        "capped": {"teacher_softcap": 5.0, "student_softcap": 5.0},
    }.get(form, {})
    if form == "probs":
        teacher = torch.softmax(teacher.float(), -1).to(teacher.dtype)
    teacher[1, 7] = torch.nan
    teachers = [[teacher, other], [other, teacher]] if form.endswith("mixed") else [teacher]
    for given in teachers:
        loss = kd.kd_loss(student, given, reduction="none", backend=backend, **options)
        assert loss.isnan().tolist() == [row == 1 for row in range(len(student))]
