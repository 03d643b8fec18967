"""Numbers that rounding, overflow or cancellation spoils: both dense kernels, dkd and mse against fp64 truth.

The bar is the textbook formula in fp32 PyTorch ("eager"): at most twice its error and two ulp of the loss.
"""

import pytest
import torch
from launches import dense, dkd, mse
from shapes import resident, tiles

from kdkernels import reference
from kdkernels.kernels import divergences, tuning
from kdkernels.reference.divergences import TABLE

PARAMS = {"jsd": (0.5, 0.0), "skew_kl": (0.1, 0.0), "skew_reverse_kl": (0.1, 0.0), "alpha_beta": (0.2, 0.7)}
PARAMS |= {"mixed_kl": (0.3, 0.0), "lk_nla": (1e-5, 0.0), "lk_hybrid": (3.0, 0.0)}
DISTANCES = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "tvd", "skew_kl", "skew_reverse_kl")
ULP = 2.0**-23
INF = float("inf")
NAN = float("nan")
# The largest number of a dtype that three of bf16's steps do not carry past fp32's.
HUGE = 3.3e38


@pytest.fixture(params=["sweeps", "cluster"], autouse=True)
def pattern(request, monkeypatch):
    shape = tiles(128, num_warps=4)

    def plans(V, itemsize, *, vec, cut, **_):
        if request.param == "sweeps":
            return [tuning.Plan("sweeps", *shape(V, itemsize, vec=vec))]
        return [resident(V, vec, cut, (256 if V <= 2048 else 1024) // vec)]

    monkeypatch.setattr(tuning, "dense_plans", plans)
    monkeypatch.setattr(tuning, "shape", shape)
    return request.param


def log_softmax(x):
    """In fp64 to the last bits also of a row whose first outcome has all but 1e-17 of the mass."""
    if x.dtype != torch.float64:
        return torch.log_softmax(x, -1)
    best, at = x.max(-1, keepdim=True)
    below = x - best.detach()
    return below - torch.log1p(below.exp().scatter(-1, at, 0.0).sum(-1, keepdim=True))


def textbook(name, student, teacher, temperature=1.0, params=None, dtype=torch.float64):
    """Loss and gradient as the papers write them; in fp64 the likeliest token's gradient is less the others' sum."""
    s = student.to(dtype, copy=True).requires_grad_()
    p0, p1 = PARAMS.get(name, (0.0, 0.0)) if params is None else params
    loss = TABLE[name](log_softmax(teacher.to(dtype) / temperature), log_softmax(s / temperature), p0, p1)
    loss = loss * temperature**2
    loss.sum().backward()
    grad = s.grad
    if dtype == torch.float64:
        at = student.argmax(-1, keepdim=True)
        grad = grad.scatter(-1, at, 0.0)
        grad = grad.scatter(-1, at, -grad.sum(-1, keepdim=True))
    return loss.detach(), grad


def kernel(name, student, teacher, temperature=1.0, params=None, **options):
    p0, p1 = PARAMS.get(name, (0.0, 0.0)) if params is None else params
    grad = torch.full_like(student, NAN)
    temperatures = {"temperature": temperature, "teacher_temperature": temperature}
    loss, _ = dense(student, [teacher], grad, divergence=name, param0=p0, param1=p1, **temperatures, **options)
    return loss, grad


def rms(x):
    return x.double().square().mean().sqrt().item()


def pair_of(kind, scale, N=3, V=2000):
    """Student and teacher of logits so large: independent ("apart"), 1 % apart ("near"), of masses that hardly overlap
    ("disjoint"); or alike, with one token so far ahead ("lead"), or two that tie ("tie") or are 20 apart ("two")."""
    teacher = torch.randn(N, V) * 3
    if kind in ("lead", "tie", "two"):
        rows, ahead = torch.arange(N), teacher.amax(1) + scale
        teacher[rows, rows * 7] = ahead
        if kind != "lead":
            teacher[rows, rows * 7 + 3] = ahead - (20.0 if kind == "two" else 0.0)
        student = teacher + 0.1 * torch.randn(N, V)
        if kind == "tie":
            student[rows, rows * 7 + 3] = student[rows, rows * 7]
        return student, teacher
    if kind == "disjoint":
        student = torch.randn(N, V) * scale
        student[:, : V // 2] -= 40
        teacher[:, V // 2 :] -= 40
        return student, teacher
    teacher *= scale / 3
    noise = torch.randn(N, V) * scale
    return (noise, teacher) if kind == "apart" else (teacher + 0.01 * noise, teacher)


def eager_jsd(student, teacher, T, beta=PARAMS["jsd"][0]):
    logp, logq = torch.log_softmax(teacher / T, -1), torch.log_softmax(student / T, -1)
    p, q = logp.exp(), logq.exp()
    logm = (beta * p + (1 - beta) * q).clamp(min=torch.finfo(torch.float32).tiny).log()
    return (beta * p * (logp - logm) + (1 - beta) * q * (logq - logm)).sum(-1) * T * T


CELLS = [(kind, scale, (0.5, 20.0)) for kind in ("apart", "near") for scale in (0.1, 3.0, 30.0)]
CELLS += [("lead", lead, (1.0, 20.0)) for lead in (20.0, 40.0)]
CELLS += [("tie", 20.0, (1.0, 20.0)), ("two", 20.0, (1.0, 20.0)), ("disjoint", 3.0, (1.0,))]
# Their value is not of second order in an error of the normalisers, which are rounded as eager's are.
FIRST_ORDER = ("forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl")


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def test_no_worse_than_eager(name, cell):
    """Errors of a few rows at two temperatures, together: of so few numbers each has its luck."""
    kind, scale, temperatures = cell
    losses, grads = [], []
    for T in temperatures:
        student, teacher = pair_of(kind, scale, V=1000)
        truth, true_grad = textbook(name, student, teacher, T)
        if truth.abs().min() < 1e-14:
            # Here the textbook's fp64 has no digit left.
            continue
        eager, eager_grad = textbook(name, student, teacher, T, dtype=torch.float32)
        if name == "jsd":
            # The reference takes ratios, where eager code takes logarithms of the mixture.
            eager = eager_jsd(student, teacher, T)
        loss, grad = kernel(name, student, teacher, T)
        floor = 2 * ULP + (ULP / 2 * T * T / truth.abs().min().item() if name in FIRST_ORDER else 0.0)
        losses.append(rms((loss - truth) / truth) / (2 * rms((eager - truth) / truth) + floor))
        # A score is rounded relative to 1, and an exponential relative to its exponent.
        at = true_grad.abs().argmax(1, keepdim=True)
        exponent = (student.amax(1) - student.gather(1, at)[:, 0]) / T
        floor = (2 * ULP * T + (exponent + 2) * ULP * true_grad.abs().amax(1)).max()
        grads.append((grad - true_grad).abs().max() / (2 * (eager_grad - true_grad).abs().max() + floor))
    assert all(rms(torch.tensor(ratios)) <= 1.1 for ratios in (losses, grads) if ratios), (losses, grads)


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_jsd_of_near_models(T):
    """The terms of first order cancel in every element: six digits where eager has two, or none."""
    for scale in (0.1, 3.0):
        student, teacher = pair_of("near", scale)
        truth, true_grad = textbook("jsd", student, teacher, T)
        loss, grad = kernel("jsd", student, teacher, T)
        assert rms((loss - truth) / truth) < 1e-4
        assert ((grad - true_grad).abs().amax(1) <= 5e-3 * true_grad.abs().amax(1)).all()


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_jsd_of_any_weight(beta):
    for kind in ("near", "apart"):
        student, teacher = pair_of(kind, 3.0, N=2)
        truth, _ = textbook("jsd", student, teacher, 2.0, params=(beta, 0.0))
        loss, _ = kernel("jsd", student, teacher, 2.0, params=(beta, 0.0))
        assert rms((loss - truth) / truth) < 2e-5


@pytest.mark.parametrize("lead", [20.0, 40.0])
@pytest.mark.parametrize("kind", ["lead", "tie", "two"])
@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "tvd"])
def test_confident_rows_are_not_negative(name, kind, lead):
    student, teacher = pair_of(kind, lead, N=4, V=300)
    loss, _ = kernel(name, student, teacher)
    assert (loss >= 0).all()
    assert (loss <= 1e-6).all()


@pytest.mark.parametrize("kind, lead", [("lead", 20.0), ("lead", 40.0), ("tie", 20.0), ("two", 20.0), ("two", 40.0)])
def test_confident_rows_are_exact(kind, lead):
    """Each row to 2e-4, though q - p is 1e-9 of what it is a difference of."""
    student, teacher = pair_of(kind, lead, V=1000)
    for name in ("jeffreys", "jsd", "skew_kl", "skew_reverse_kl"):
        truth, true_grad = textbook(name, student, teacher)
        loss, grad = kernel(name, student, teacher)
        # fp64's textbook knows no more of a loss than 1e-16.
        assert ((loss - truth).abs() <= 2e-4 * truth + 1e-15).all(), name
        assert ((grad - true_grad).abs().amax(1) <= 2e-4 * true_grad.abs().amax(1)).all(), name


def without_overlap(name, student, teacher):
    """The gradient in fp64, from a score that is small where only the student has mass."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    of_p = PARAMS.get(name, (0.0, 0.0))[0]
    if name == "skew_reverse_kl":
        of_p = 1 - of_p
    m = of_p * p + (1 - of_p) * q
    share = of_p * p / m
    log_rest = torch.where(share < 0.5, torch.log1p(-share.clamp(max=0.5)), torch.log((1 - of_p) * q / m))
    slope = {
        "tvd": torch.where(q > p, 0.0, -1.0),
        "skew_kl": (of_p - 1) * p / m,
        "jsd": (1 - of_p) * log_rest,
        "skew_reverse_kl": log_rest + share,
    }[name]
    return q * (slope - (q * slope).sum(-1, keepdim=True)), q


def test_models_that_hardly_overlap():
    """TVD and skewed KL know their gradient of e^-40; of the others ulps of q are left where two constants cancel."""
    student, teacher = pair_of("disjoint", 3.0, V=1000)
    for name in ("tvd", "skew_kl", "jsd", "skew_reverse_kl"):
        true_grad, q = without_overlap(name, student, teacher)
        loss, grad = kernel(name, student, teacher)
        size = true_grad.abs().amax(1, keepdim=True)
        assert (size < 1e-11).all()
        noise = 0.0 if name in ("tvd", "skew_kl") else 8 * ULP * q
        assert ((grad - true_grad).abs() <= 1e-4 * size + noise).all(), name


@pytest.mark.parametrize("T", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("name", [*DISTANCES, "alpha_beta"])
def test_equal_rows_give_nothing(name, T):
    """A loss of exactly 0, and of the gradient at most what an ulp of the score leaves of q."""
    student = torch.randn(3, 700) * 3
    student[1, 5] = student[2, 7] = student[2, 8] = 30.0
    q = (student.double() / T).softmax(-1)
    weights = (0.1, 0.5, 0.9) if name in ("jsd", "skew_kl", "skew_reverse_kl") else PARAMS.get(name, (0.0, 0.0))[:1]
    for weight in weights:
        loss, grad = kernel(name, student, student.clone(), T, params=(weight, PARAMS.get(name, (0.0, 0.0))[1]))
        assert (loss == 0).all() and not loss.signbit().any()
        # Below 1e-30 what keeps a mixture from 0 shows in its share.
        assert (grad.abs() <= 2 * ULP * T * (q + 1e-30)).all()
        if name not in ("jsd", "skew_reverse_kl"):
            assert not grad.any()


def test_confident_rows_leave_no_noise():
    """Forward and reverse KL of rows that agree to 1e-17: a gradient of that size, not of 1e-8."""
    student, teacher = pair_of("lead", 40.0)
    for name in ("forward_kl", "reverse_kl"):
        _, true_grad = textbook(name, student, teacher)
        _, grad = kernel(name, student, teacher)
        assert (grad.abs().amax(1) <= 3 * true_grad.abs().amax(1)).all(), name


@pytest.mark.parametrize("T", [0.5, 1.0])
def test_jeffreys_at_scale_30(T):
    student, teacher = pair_of("near", 30.0)
    truth, true_grad = textbook("jeffreys", student, teacher, T)
    loss, grad = kernel("jeffreys", student, teacher, T)
    # 3e-5 is the rounding of exponents of 60.
    assert rms((loss - truth) / truth) < 1e-4
    assert ((grad - true_grad).abs().amax(1) <= 1e-4 * true_grad.abs().amax(1)).all()


@pytest.mark.parametrize("size", [1e9, 1e20, HUGE])
@pytest.mark.parametrize("name", divergences.names())
def test_large_logits(name, size):
    """One row of random numbers so large, and one that shares its largest; the loss is infinite only past fp32."""
    V = 16
    student, teacher = (torch.rand(2, V) * 2 - 1) * size, (torch.rand(2, V) * 2 - 1) * size
    teacher[1] = student[1]
    teacher[1, student[1].argmin()] *= 0.5
    for T in (1.0, 100.0):
        truth, true_grad = textbook(name, student, teacher, T)
        loss, grad = kernel(name, student, teacher, T)
        past = truth.abs() > 2e38
        assert torch.allclose(loss.double()[~past], truth[~past], rtol=1e-5, atol=1e-6 * T * T), (loss, truth)
        assert not loss[past].isnan().any() and (loss[past] > 1e38).all()
        finite = (true_grad.abs().amax(1) < 1e38) & ~past
        assert torch.allclose(grad.double()[finite], true_grad[finite], rtol=1e-5, atol=1e-6 * T), T


def test_large_logits_example():
    """JSD of log 2 at most, where sums of a maximum that was rounded gave NaN."""
    loss, grad = kernel("jsd", torch.tensor([[0.0, 0.1, 0.2]]), torch.tensor([[1e10, 0.0, -1e10]]))
    assert abs(loss.item() - 0.34164) < 1e-4 and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("T", [0.05, 1.0, 100.0])
def test_masked_with_the_lowest_number_in_one_model(dtype, T):
    """Where only the teacher masks, a column is as good as dead; where only the student does, the loss is huge."""
    some = torch.arange(40) % 3 == 0
    student, teacher = torch.randn(1, 40).to(dtype), torch.randn(1, 40).to(dtype)
    lowest = torch.finfo(dtype).min
    for name in ("forward_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl"):
        masked = teacher.masked_fill(some, lowest)
        truth, true_grad = textbook(name, student, masked, T)
        loss, grad = kernel(name, student, masked, T)
        assert torch.allclose(loss.double(), truth, rtol=1e-5), name
        assert ((grad - true_grad).abs() <= 0.01 * true_grad.abs().max() + 4 * T * ULP).all(), name
    masked = student.masked_fill(some, lowest)
    for name in ("forward_kl", "jeffreys", "jsd"):
        truth, true_grad = textbook(name, masked, teacher, T)
        loss, grad = kernel(name, masked, teacher, T)
        # Above 1e36 sums of the row may pass fp32's range before they are divided, or before T^2 makes them smaller.
        past = truth / min(T * T, 1.0) > 1e36
        assert torch.allclose(loss.double(), truth, rtol=1e-5) or past, (name, loss, truth)
        if name != "jeffreys":
            assert ((grad - true_grad).abs() <= 0.01 * true_grad.abs().max() + 4 * T * ULP).all(), name


@pytest.mark.parametrize("a, b", [(1.0, -0.5), (2.0, -1.0), (-0.5, 1.0), (-0.5, 2.0), (0.5, -0.5), (0.0, 0.7)])
def test_alpha_beta_of_any_sign(a, b):
    """Ordinary rows, rows whose least p or q is 1e-80, and zeros on the side where they are finite."""
    student, teacher = torch.randn(3, 60) * 3, torch.randn(3, 60) * 3
    teacher[1, 5], student[1, 5] = -180.0, -100.0
    teacher[2, :20] -= 60.0
    if a > 0 and a + b > 0:
        teacher[0, 7] = -INF
    if b > 0 and a + b > 0:
        student[2, 30] = -INF
    truth, true_grad = textbook("alpha_beta", student.double(), teacher.double(), params=(a, b))
    loss, grad = kernel("alpha_beta", student, teacher, params=(a, b))
    known = truth.isfinite() & (truth < 1e37)
    assert known[0] and torch.allclose(loss.double()[known], truth[known], rtol=1e-4)
    known &= true_grad.isfinite().all(1)
    size = true_grad[known].abs().amax(1, keepdim=True)
    assert ((grad[known] - true_grad[known]).abs() <= 1e-4 * size).all()


def test_alpha_beta_where_the_teacher_has_nothing():
    student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, -INF]])
    loss, grad = kernel("alpha_beta", student, teacher, params=(1.0, -0.5))
    assert abs(loss.item() - 1.0718) < 1e-4 and grad.isfinite().all()
    loss, grad = kernel("alpha_beta", student, torch.tensor([[0.0, 0.0, 0.0, -120.0]]), params=(2.0, -1.0))
    assert abs(loss.item() - 1 / 6) < 1e-5 and grad.isfinite().all()


@pytest.mark.parametrize("e", [1e-7, 1e-4, 1e-2])
def test_alpha_beta_near_its_limits(e):
    """Next to where a, b or their sum is 0 the loss is next to the limit's, whatever 1 / (a b) is."""
    student, teacher = torch.randn(2, 50) * 2, torch.randn(2, 50) * 2
    for a, b, limit in ((e, 1.0, (0, 1)), (1.0, e, (1, 0)), (0.7, e - 0.7, (0.7, -0.7)), (e, e, (0, 0))):
        loss, grad = kernel("alpha_beta", student, teacher, params=(a, b))
        # fp64 has digits to lose at 1e-2 and 1e-4, and 1e-7 is the limit itself to six.
        params = tuple(float(x) for x in limit) if e < 1e-6 else (a, float(torch.tensor(b)))
        truth, true_grad = textbook("alpha_beta", student.double(), teacher.double(), params=params)
        assert torch.allclose(loss.double(), truth, rtol=2e-5), (a, b)
        assert ((grad - true_grad).abs() <= 2e-5 * true_grad.abs().amax(1, keepdim=True)).all(), (a, b)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("standardize", [False, True])
def test_a_term_of_weight_0_is_not_computed(name, standardize, pattern):
    """With kd_weight=0 neither loss nor gradient knows a teacher of NaN, or of nothing but -inf."""
    if standardize and pattern == "cluster":
        return
    student, labels = torch.randn(2, 40), torch.tensor([3, 5])
    expected = torch.softmax(student, -1)
    expected[torch.arange(2), labels] -= 1
    for teacher in (torch.full((2, 40), NAN), torch.full((2, 40), -INF)):
        grad = torch.full_like(student, NAN)
        options = {"kd_weight": 0.0, "ce_weight": 1.0, "divergence": name, "standardize": standardize}
        loss, _ = dense(student, [teacher], grad, labels, **options)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, labels, reduction="none"))
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5, -1e6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_a_common_offset(offset, smoothing):
    student = torch.randn(3, 300) * 3 + offset
    student[2] = offset
    labels = torch.tensor([3, 299, 0])
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": smoothing}
    grad = torch.full_like(student, NAN)
    loss, _ = dense(student, [student], grad, labels, **options)
    exact = student.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(exact, labels, label_smoothing=smoothing, reduction="none")
    truth.sum().backward()
    assert torch.allclose(loss.double(), truth, rtol=5e-7)
    assert torch.allclose(grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_cross_entropy_of_one_column_is_not_negative():
    for columns in (1, 2):
        student = torch.full((2, columns), 1e4)
        grad = torch.empty_like(student)
        labels = torch.zeros(2, dtype=torch.int64)
        loss, _ = dense(student, [student], grad, labels, kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1)
        truth = torch.full((2,), float(columns)).log()
        assert torch.allclose(loss, truth, rtol=5e-7, atol=0) and (loss >= 0).all()


def standardized(x, temperature):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) / temperature


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_standardize_is_torch_std_at_any_offset(name, offset, pattern):
    if pattern == "cluster":
        return
    student, teacher = torch.randn(2, 700) * 3 + offset, torch.randn(2, 700) * 3 - offset

    def formula(dtype):
        s = student.to(dtype, copy=True).requires_grad_()
        logp = torch.log_softmax(standardized(teacher.to(dtype), 0.5), -1)
        loss = TABLE[name](logp, torch.log_softmax(standardized(s, 0.5), -1), *PARAMS.get(name, (0.0, 0.0))) / 4
        loss.sum().backward()
        return loss.detach(), s.grad

    (truth, true_grad), (eager, eager_grad) = formula(torch.float64), formula(torch.float32)
    loss, grad = kernel(name, student, teacher, 0.5, standardize=True)
    assert rms((loss - truth) / truth) <= 2 * rms((eager - truth) / truth) + 4 * ULP
    error, allowed = (grad - true_grad).abs().amax(1), 2 * (eager_grad - true_grad).abs().amax(1)
    assert (error <= allowed + 2e-6 * true_grad.abs().amax(1)).all()


def test_standardize_of_few_columns(pattern):
    """One column has no deviation and is 0; two always standardise to the same pair, so that nothing moves them."""
    if pattern == "cluster":
        return
    one = torch.tensor([[3.0], [-7e4]])
    for name in ("forward_kl", "jsd"):
        loss, grad = kernel(name, one, one + 1, standardize=True)
        assert not loss.any() and not grad.any()
    two = torch.tensor([[499.25732, 499.26035]])
    _, grad = kernel("forward_kl", two, torch.tensor([[1.0, 3.0]]), standardize=True)
    # A rounding of the score over a deviation of 0.002.
    assert grad.abs().max() < 2e-4


def dkd_truth(student, teacher, labels, dtype=torch.float64, **options):
    s = student.to(dtype, copy=True).requires_grad_()
    loss = reference.dkd_rows(s, teacher.to(dtype), labels, **options)
    loss.sum().backward()
    return loss.detach(), s.grad


@pytest.mark.parametrize("lead", [5.0, 20.0, 40.0])
def test_dkd_of_confident_rows(lead, pattern):
    """The label's odds are known by the less likely side, and no part is negative."""
    if pattern == "cluster":
        return
    labels = torch.arange(4) * 7
    teacher = torch.randn(4, 300)
    teacher[torch.arange(4), labels] = teacher.amax(1) + lead
    student = teacher + 0.1 * torch.randn(4, 300)
    options = {"alpha": 1.0, "beta": 0.0}
    grad = torch.full_like(student, NAN)
    loss = dkd(student, teacher, grad, labels, **options)
    truth, true_grad = dkd_truth(student, teacher, labels, **options)
    assert (loss >= 0).all() and torch.allclose(loss.double(), truth, rtol=1e-3, atol=1e-7)
    if lead < 30:
        assert ((grad - true_grad).abs().amax(1) <= 1e-4 * true_grad.abs().amax(1)).all()


@pytest.mark.parametrize("size", [1e9, 1e20, 1e37])
def test_large_logits_of_dkd_and_mse(size, pattern):
    if pattern == "cluster":
        return
    student, teacher = (torch.rand(2, 16) * 2 - 1) * size, (torch.rand(2, 16) * 2 - 1) * size
    labels = torch.tensor([3, 5])
    options = {"alpha": 1.0, "beta": 2.0}
    grad = torch.full_like(student, NAN)
    loss = dkd(student, teacher, grad, labels, **options)
    truth, true_grad = dkd_truth(student, teacher, labels, **options)
    assert torch.allclose(loss.double(), truth, rtol=1e-5)
    assert torch.allclose(grad.double(), true_grad, rtol=1e-5, atol=1e-6)
    if size < 1e18:
        for centered in (False, True):
            s = student.double().requires_grad_()
            truth = reference.mse_rows(s, teacher.double(), centered=centered)
            truth.sum().backward()
            loss = mse(student, teacher, grad, centered=centered)
            assert torch.allclose(loss.double(), truth, rtol=1e-5)
            assert torch.allclose(grad.double(), s.grad, rtol=1e-5, atol=1e-5 * s.grad.abs().max().item())


def test_probabilities_that_need_not_sum_to_1():
    student, teacher = torch.randn(2, 40), torch.rand(2, 40)
    expected = kernel("jsd", student, teacher / teacher.sum(-1, keepdim=True), teacher_form="probs")
    for form in ("probs", "unnormalized_probs"):
        loss, grad = kernel("jsd", student, teacher * 5, teacher_form=form)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(grad, expected[1])
