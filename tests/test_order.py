"""Functions of the order of a row: ULD, top p, and the weight of adaptive KL, against fp64 and sorts."""

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
# Student and teacher.
widths = pytest.mark.parametrize("widths", [(1, 1), (1, 5), (33, 20), (1000, 1501)], ids=lambda w: f"V{w[0]}-{w[1]}")
LABELS = torch.tensor([0, 0, -100, 0, 0, 0])
ROWS = len(LABELS)
UPSTREAM = torch.tensor([1.0, -0.5, 2.0, 0.25, 3.0, 1.5], dtype=torch.float64)


def logits(dtype, width, kind="normal", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x = (x / 2).round() * 2
    elif kind == "inf":
        x[:, 1::3] = -torch.inf
    elif kind == "flat":
        x = x * 0
    elif kind == "far":
        x = 300 * x + 1e4
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0).double()
    return x.to(DTYPES[dtype])


def truth(student, teacher, temperature=1.0, teacher_temperature=1.0):
    """Loss and gradient of every row in fp64, by ranks."""
    s, t = student.detach().double(), teacher.double()
    losses, grads = [], []
    for row, other, one, two in zip(
        s,
        t,
        torch.as_tensor(temperature).expand(len(s)),
        torch.as_tensor(teacher_temperature).expand(len(s)),
        strict=True,
    ):
        width = max(len(row), len(other))
        q, p = (row / one).softmax(0), (other / two).softmax(0)
        order = row.argsort(descending=True)
        ranked = F.pad(q[order], (0, width - len(row)))
        difference = ranked - F.pad(p.sort(descending=True).values, (0, width - len(other)))
        losses.append(difference.abs().sum())
        # Rounding tells nothing of numbers that are equal.
        sign = torch.where(difference.abs() < 1e-13 * ranked, 0.0, difference.sign())
        e = torch.empty_like(q)
        e[order] = sign[: len(row)]
        e = torch.stack([e[row == x].mean() for x in row])
        grads.append(q * (e - (q * e).sum()) / one)
    return torch.stack(losses), torch.stack(grads)


def check(got, student, teacher, labels=None, **temperatures):
    loss, grad = truth(student, teacher, **temperatures)
    counted = torch.ones(len(loss)) if labels is None else (labels != -100).double()
    loss = loss * counted
    grad = grad * (counted * UPSTREAM)[:, None]
    wide = student.dtype == torch.float64
    error = 1e-12 if wide else 4e-6
    torch.testing.assert_close(got[0].double(), loss, rtol=error, atol=error)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(student.dtype, error)
    torch.testing.assert_close(got[1].double(), grad, rtol=rounding + (0 if wide else 1e-5), atol=error)


def evaluated(student, teacher, labels=None, **options):
    with testing.poisoned_memory():
        return testing.evaluate(
            lambda s, t: kd.uld_loss(s, t, labels, reduction="none", **options),
            student,
            teacher,
            UPSTREAM[: len(student)],
        )


@widths
@dtypes
@pytest.mark.parametrize("kind", ["normal", "ties", "inf", "flat", "far", "zeros"])
def test_uld_is_the_distance_of_sorted_probabilities(kind, dtype, widths, backend):
    student, teacher = logits(dtype, widths[0], kind), logits(dtype, widths[1], kind, seed=1)
    check(evaluated(student, teacher, LABELS, exact=True, backend=backend), student, teacher, LABELS)


@pytest.mark.parametrize(
    "dtypes", [("bf16", "fp32"), ("fp32", "fp16"), ("fp16", "fp64"), ("fp64", "bf16")], ids="-".join
)
def test_uld_of_two_dtypes_at_temperatures_of_rows(dtypes, backend):
    student, teacher = logits(dtypes[0], 300), logits(dtypes[1], 200, seed=1)
    temperatures = {"temperature": torch.linspace(0.3, 4, ROWS), "teacher_temperature": torch.linspace(2, 0.5, ROWS)}
    check(evaluated(student, teacher, exact=True, backend=backend, **temperatures), student, teacher, **temperatures)


@dtypes
def test_uld_of_rows_that_are_views_with_padding(dtype, backend):
    # Every second row, less the last position, of odd widths, with padded columns that would be the largest.
    wide, far = (logits(dtype, width, seed=seed).repeat(2, 1).view(4, 3, width) for width, seed in ((41, 0), (35, 1)))
    student, teacher = wide[::2, :-1].clone(), far[::2, :-1]
    student[..., 37:], teacher[..., 30:] = 1e4, 1e4
    padded = torch.cat([student, student], 1)[:, :2]
    assert not padded.is_contiguous()
    got = testing.evaluate(
        lambda s, t: kd.uld_loss(
            s, t, vocab_size=37, teacher_vocab_size=30, reduction="none", exact=True, backend=backend
        ),
        padded,
        teacher,
        torch.ones(2, 2),
    )
    loss, grad = truth(student[..., :37].reshape(4, 37), teacher[..., :30].reshape(4, 30))
    torch.testing.assert_close(got[0].double(), loss.view(2, 2), rtol=0, atol=2e-6)
    torch.testing.assert_close(got[1][..., :37].double(), grad.view(2, 2, 37), rtol=2**-7, atol=2e-6)
    assert (got[1][..., 37:] == 0).all()


@pytest.mark.parametrize("width", [50, 3000, 20000])
@pytest.mark.parametrize("kind", ["normal", "ties", "inf", "flat", "far"])
def test_uld_of_fp32_in_bins_is_within_its_bound(kind, width, compiled_cpu):
    student, teacher = logits("fp32", width, kind), logits("fp32", width - 7, kind, seed=1)
    loss, grad = evaluated(student, teacher)[:2]
    exact, slope = evaluated(student, teacher, exact=True)[:2]
    assert (loss - exact).abs().max() < 2**-8
    if width == 20000 and kind == "normal":
        assert (loss - exact).abs().max() < 2e-5
    # A sign is that of the columns within a bin: each gradient stays below twice the column's probability.
    q = student.double().softmax(-1)
    assert ((grad - slope).abs() <= 2.01 * q * UPSTREAM.abs()[:, None] + 1e-6).all()
    # Rows of gradients add up to 0 as those of every function of a softmax do.
    assert grad.double().sum(-1).abs().max() < 1e-5


def test_uld_of_fp32_in_bins_has_the_signs_of_probabilities_that_are_apart(compiled_cpu):
    student = torch.linspace(5, -5, 21).expand(3, 21).contiguous()
    teacher = torch.linspace(4, -6, 21).expand(3, 21) * torch.tensor([[0.5], [1.5], [3.0]])
    got = testing.evaluate(lambda s, t: kd.uld_loss(s, t, reduction="none"), student, teacher, torch.ones(3))
    loss, grad = truth(student, teacher)
    torch.testing.assert_close(got[0].double(), loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(got[1].double(), grad, rtol=1e-5, atol=2e-6)


@dtypes
def test_uld_of_logits_that_differ_by_a_constant_has_no_gradient(dtype, backend):
    # Of numbers that hold the sum exactly.
    teacher = (logits(dtype, 1501) * 2).round().clamp(-12, 12) / 2
    student = teacher + 4
    for exact in (True, False):
        loss, grad, *_ = evaluated(student, teacher, exact=exact, backend=backend)
        assert (loss.abs() < 1e-5).all()
        assert (grad == 0).all()


@dtypes
def test_uld_does_not_see_the_order_of_columns(dtype, backend):
    student, teacher = logits(dtype, 200, "ties"), logits(dtype, 300, seed=1)
    first = evaluated(student, teacher, backend=backend)
    moved = evaluated(student, teacher.flip(-1), backend=backend)
    assert torch.equal(first[0], moved[0]) and torch.equal(first[1], moved[1])
    # The model itself, its tokens renamed, and some without any probability.
    renamed = F.pad(student.flip(-1), (5, 0), value=-torch.inf)
    same = evaluated(student, renamed, backend=backend)
    assert (same[0] == 0).all() and (same[1] == 0).all()


@dtypes
def test_uld_of_a_row_without_a_distribution_is_nan(dtype, backend):
    for side in (0, 1):
        for value, everywhere in ((torch.nan, False), (-torch.nan, False), (torch.inf, False), (-torch.inf, True)):
            pair = [logits(dtype, 40), logits(dtype, 40, seed=1)]
            pair[side][1, :: 1 if everywhere else 50] = value
            loss, grad = evaluated(*pair, backend=backend)[:2]
            assert loss[1].isnan() and grad[1].isnan().all()
            others = torch.arange(ROWS) != 1
            assert loss[others].isfinite().all() and grad[others].isfinite().all()
            # Nor is one read that does not count.
            labels = torch.where(others, 0, -100)
            loss, grad = evaluated(*pair, labels, backend=backend)[:2]
            assert loss.isfinite().all() and grad.isfinite().all() and (grad[1] == 0).all()


def test_uld_of_no_rows_and_reduced(backend):
    nothing = torch.zeros(0, 9, requires_grad=True)
    loss = kd.uld_loss(nothing, torch.zeros(0, 4), backend=backend)
    assert loss == 0 and torch.autograd.grad(loss, nothing)[0].shape == (0, 9)
    student, teacher = logits("bf16", 90).requires_grad_(), logits("bf16", 70, seed=1)
    weight = torch.linspace(0, 2, ROWS)
    rows = kd.uld_loss(student, teacher, LABELS, row_weight=weight, reduction="none", backend=backend)
    mean = kd.uld_loss(student, teacher, LABELS, row_weight=weight, backend=backend)
    part = kd.uld_loss(student, teacher, LABELS, row_weight=weight, normalizer=7.0, backend=backend)
    torch.testing.assert_close(mean, rows.sum() / 5)
    torch.testing.assert_close(part, rows.sum() / 7)
    assert kd.uld_loss(student[0], teacher[0], backend=backend).shape == ()


def test_uld_in_place_is_the_same(compiled_cpu):
    for dtype in DTYPES:
        teacher = logits(dtype, 70, seed=1)
        grads = []
        for inplace in (False, True):
            leaf = logits(dtype, 90).requires_grad_()
            student = leaf * 1
            kept = []
            student.register_hook(kept.append)
            kd.uld_loss(student, teacher, inplace=inplace).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_the_reference_of_uld_can_be_differentiated_again():
    # With every q above or below its p the signs are fixed.
    student = torch.tensor([[3.0, 1.0, 0.0, -2.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.3, 0.1, -0.1, -0.3]], dtype=torch.float64)

    def loss(s):
        return kd.uld_loss(s, teacher, backend="torch")

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


ERRORS = {
    "teacher-rows": (lambda s: kd.uld_loss(s, torch.zeros(3, 5)), ValueError, r"teacher must have shape \(2, V\)"),
    "teacher-dims": (lambda s: kd.uld_loss(s, torch.zeros(5)), ValueError, "teacher must have shape"),
    "teacher-width": (
        lambda s: kd.uld_loss(s, torch.zeros(2, 5), teacher_vocab_size=6),
        ValueError,
        "teacher_vocab_size must be at most",
    ),
    "teacher-width-0": (
        lambda s: kd.uld_loss(s, torch.zeros(2, 5), teacher_vocab_size=0),
        ValueError,
        "teacher_vocab_size must be",
    ),
    "teacher-grad": (
        lambda s: kd.uld_loss(s, torch.zeros(2, 5, requires_grad=True)),
        ValueError,
        "must not require grad in uld_loss",
    ),
    "exact": (lambda s: kd.uld_loss(s, torch.zeros(2, 5), exact=1), TypeError, "exact must be a bool"),
    "temperature": (
        lambda s: kd.uld_loss(s, torch.zeros(2, 5), temperature=0.0),
        ValueError,
        "temperature must be > 0",
    ),
    "option": (lambda s: kd.uld_loss(s, torch.zeros(2, 5), tau=2.0), TypeError, "did you mean 'temperature'"),
    "cuda": (
        lambda s: kd.uld_loss(s, torch.zeros(2, 5), backend="cuda"),
        ValueError,
        "the CUDA extension has the losses with a divergence",
    ),
    "p-0": (lambda s: kd.capture_topp(s, 0.0), ValueError, r"p must be in \(0, 1\], got 0"),
    "p-2": (lambda s: kd.capture_topp(s, 1.5), ValueError, r"p must be in \(0, 1\], got 1.5"),
    "min-k": (lambda s: kd.capture_topp(s, 0.5, min_k=4, max_k=3), ValueError, "min_k must be at most max_k 3, got 4"),
    "max-k": (lambda s: kd.capture_topp(s, 0.5, max_k=0), ValueError, "max_k must be at least 1"),
    "mu": (lambda s: kd.akl_ratio(s, s, mu=0.0), ValueError, r"mu must be in \(0, 1\), got 0"),
    "akl-shape": (lambda s: kd.akl_ratio(s, torch.zeros(2, 9)), ValueError, "teacher must have the student's shape"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(torch.zeros(2, 7, requires_grad=True))


# Top p.


def nucleus(row, p, min_k=1, max_k=None):
    """Ids in order, log-probabilities and tail of one row, in fp64."""
    logp = row.double().log_softmax(0)
    order = row.double().argsort(descending=True, stable=True)
    mass = logp[order].exp().cumsum(0)
    k = min(max(int((mass < p).sum()) + 1, min_k), int((row > -torch.inf).sum()), max_k or len(row))
    return (
        order[:k],
        logp[order[:k]],
        torch.logsumexp(logp[order[k:]], 0) if k < len(row) else logp.new_tensor(-torch.inf),
    )


@dtypes
@pytest.mark.parametrize("kind", ["normal", "ties", "inf", "flat"])
@pytest.mark.parametrize("width", [1, 9, 2000])
def test_topp_has_the_fewest_tokens_of_that_mass(kind, width, dtype, backend):
    x = logits(dtype, width, kind)
    for p, bounds in ((0.3, {}), (0.9, {"max_k": 7}), (0.99, {"min_k": 5})):
        got = kd.capture_topp(x, p, backend=backend, **bounds)
        slots = []
        for row, ids, logprobs, tail in zip(x, *got, strict=True):
            wanted = nucleus(row, p, **bounds)
            used = int((ids >= 0).sum())
            if used != len(wanted[0]):
                # A rounding of the sum, where it passes p.
                fewer = nucleus(row, p, min(used, len(wanted[0])), min(used, len(wanted[0])))[1]
                assert abs(used - len(wanted[0])) == 1 and abs(fewer.exp().sum() - p) < 1e-6
                continue
            assert torch.equal(ids[:used].long(), wanted[0])
            torch.testing.assert_close(logprobs[:used].double(), wanted[1], rtol=1e-5, atol=1e-5)
            assert (logprobs[used:] == -torch.inf).all() and (ids[used:] == -1).all()
            torch.testing.assert_close(tail.double(), wanted[2], rtol=1e-5, atol=3e-5)
            slots.append(used)
        assert got.ids.shape[-1] >= max(slots, default=1) and (got.ids.shape[-1] <= 7 or "max_k" not in bounds)


def test_topp_of_1_has_all_that_can_be(backend):
    got = kd.capture_topp(logits("fp32", 90, "inf"), 1.0, backend=backend)
    assert got.ids.shape == (ROWS, 60) and (got.ids >= 0).all()
    assert (got.tail_logprob == -torch.inf).all()


def test_topp_at_a_temperature_of_rows_and_of_padded_views(backend):
    x = logits("bf16", 64).view(2, 3, 64)[:, 1:]
    temperature = torch.tensor([[0.2, 1.0], [3.0, 10.0]])
    got = kd.capture_topp(x, 0.8, temperature=temperature, vocab_size=50, backend=backend)
    assert got.ids.shape[:-1] == (2, 2)
    for row in range(4):
        ids, logprobs, tail = nucleus(x.reshape(4, 64)[row, :50].double() / temperature.view(4)[row].double(), 0.8)
        assert got.ids.flatten(0, 1)[row][got.ids.flatten(0, 1)[row] >= 0].tolist() == ids.tolist()
        torch.testing.assert_close(got.tail_logprob.view(4)[row].double(), tail, rtol=1e-5, atol=1e-5)
    assert kd.capture_topp(x[:0], 0.8, backend=backend).ids.shape == (0, 2, 1)


def test_topp_of_a_row_without_a_distribution_is_nan(backend):
    x = logits("fp32", 40)
    x[1, 3], x[2], x[3, 5] = torch.nan, -torch.inf, torch.inf
    got = kd.capture_topp(x, 0.9, backend=backend)
    bad = torch.tensor([False, True, True, True, False, False])
    assert torch.equal(got.tail_logprob.isnan(), bad)
    assert torch.equal(got.logprobs.isnan().any(-1), bad)


def test_topp_is_a_teacher_of_the_sparse_loss(backend):
    x, student = logits("fp32", 300), logits("fp32", 300, seed=1).requires_grad_()
    got = kd.capture_topp(x, 0.95, backend=backend)
    loss = kd.topk_kd_loss(student, *got[:2], tail_logprob=got.tail_logprob, tail="bucket", reduction="none")
    p, q = x.double().softmax(-1), student.detach().double().softmax(-1)
    for row in range(ROWS):
        inside = got.ids[row][got.ids[row] >= 0].long()
        tail = 1 - p[row, inside].sum(), 1 - q[row, inside].sum()
        wanted = (p[row, inside] * (p[row, inside] / q[row, inside]).log()).sum() + tail[0] * (tail[0] / tail[1]).log()
        torch.testing.assert_close(loss[row].double(), wanted, rtol=1e-4, atol=1e-5)


# The weight of adaptive KL.


@pytest.mark.parametrize("kind", ["normal", "ties", "inf"])
@dtypes
@pytest.mark.parametrize("mu", [0.5, 0.05, 0.97])
def test_akl_ratio_is_the_share_of_the_head(mu, dtype, kind, backend):
    student, teacher = logits(dtype, 400, "inf" if kind == "inf" else "normal", seed=1), logits(dtype, 400, kind)
    got = kd.akl_ratio(student, teacher, mu=mu, temperature=1.5, backend=backend)
    assert got.shape == (ROWS,) and not got.requires_grad
    p, q = (teacher.double() / 1.5).softmax(-1), (student.double() / 1.5).softmax(-1)
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    gap = (ordered - q.gather(-1, order)).abs()
    sums = ordered.cumsum(-1)
    # The head ends where rounding does not matter.
    clear = (sums - mu).abs().amin(-1) > 1e-5
    head = sums <= mu + 1e-9
    head[:, 0] = True
    wanted = (gap * head).sum(-1) / gap.sum(-1)
    torch.testing.assert_close(got.double()[clear], wanted[clear], rtol=1e-4, atol=1e-5)


def test_akl_ratio_of_equal_models_is_a_half_and_of_nan_is_nan(backend):
    x = logits("fp32", 30)
    assert (kd.akl_ratio(x, x, backend=backend) == 0.5).all()
    y = logits("fp32", 30, seed=1)
    y[2, 4] = torch.nan
    assert torch.equal(kd.akl_ratio(x, y, backend=backend).isnan(), torch.arange(ROWS) == 2)
    assert torch.equal(kd.akl_ratio(y, x, backend=backend).isnan(), torch.arange(ROWS) == 2)
    assert kd.akl_ratio(x[:0], x[:0], backend=backend).shape == (0,)


def test_adaptive_kl_is_two_losses_with_the_ratio(backend):
    student, teacher = logits("fp64", 50, seed=1), logits("fp64", 50)
    w = kd.akl_ratio(student, teacher, backend=backend)
    forward, reverse = (
        kd.kd_loss(student, teacher, divergence=name, row_weight=weight, reduction="none", backend=backend)
        for name, weight in (("forward_kl", w), ("reverse_kl", 1 - w))
    )
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    wanted = w * (logp.exp() * (logp - logq)).sum(-1) + (1 - w) * (logq.exp() * (logq - logp)).sum(-1)
    torch.testing.assert_close(forward + reverse, wanted)
