"""Rounding errors: hard rows beside eager PyTorch, logits of any size, alpha-beta in its corners, weights of 0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from benchmarks import numerics
from kdkernels import testing

# A cell of few rows is a draw: what is as exact as eager passes the bar by up to about this by chance.
TIMES = 2.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "alpha_beta")
INF = float("inf")


def rows(student, teacher, backend, **options):
    """Losses and the gradient of their sum."""
    student = student.clone().requires_grad_()
    loss = kd.kd_loss(student, teacher, options.pop("labels", None), reduction="none", backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def by_the_book(student, teacher, **options):
    student = student.double().requires_grad_()
    loss = testing.textbook_loss(student, teacher.double(), exact=True, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def test_no_hard_row_is_much_worse_than_eager(backend):
    found = numerics.measure_all(backend, **numerics.SMALL)
    assert len(found) > 250 and not numerics.over(found, TIMES)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_nor_on_lesser_instruction_sets(isa, compiled_cpu):
    here = kd.backends.cpu.isa()
    if here == "baseline":
        pytest.skip("this machine has no AVX2, so that all tests ran on the baseline")
    if isa == here:
        pytest.skip("this machine has no AVX-512, so that all tests ran on AVX2")
    command = [sys.executable, "-m", "benchmarks.numerics", "--small", "--output", "-", "--times", str(TIMES)]
    done = subprocess.run(
        command,
        env={**os.environ, "KDKERNELS_CPU_ISA": isa},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"'cpu', {isa}" in done.stdout, done.stdout + done.stderr


TIED = ("ties 5", "ties 10", "ties 20", "near ties 10")


def tied_cells():
    """Each divergence on rows of which both models agree on the tokens that share the mass."""
    kinds = [(kind, temperature) for kind in TIED for temperature in (0.5, 1.0, 3.0)]
    return [
        numerics.Cell(divergence, kind, 1.0, temperature, 1000)
        for kind, temperature in kinds
        for divergence in numerics.DIVERGENCES
    ]


def test_tokens_that_tie_at_the_top_are_as_exact_as_in_eager(compiled_cpu):
    found = {cell: numerics.measure(cell, "cpu", 12) for cell in tied_cells()}
    # TVD's gradient hangs on the sign of a difference, which may be a rounding.
    signs = {cell: errors for cell, errors in found.items() if cell.name == "tvd"}
    assert all(errors.loss_ratio <= TIMES for errors in signs.values())
    assert not numerics.over({cell: errors for cell, errors in found.items() if cell not in signs}, TIMES)


@pytest.mark.parametrize("columns", [1000, 32000])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_5_and_6_far_above_the_rest(dtype, columns, compiled_cpu):
    """No divergence is below 0, and what the tied tokens leave to the others is not lost, at any temperature."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, columns, generator=generator)
    student = teacher + 0.1 * torch.randn(2, columns, generator=generator)
    # The error that exponentials of 16-bit logits may have.
    shorter = 0.0 if dtype == "fp32" else 4e-6
    for height in (5.0, 10.0, 20.0, 40.0):
        s, t = student.to(DTYPES[dtype]), teacher.to(DTYPES[dtype])
        s[:, 5:7] = t[:, 5:7] = height
        for divergence in numerics.DIVERGENCES:
            for temperature in (0.5, 1.0, 3.0):
                options = {"divergence": divergence, "temperature": temperature}
                loss, grad = rows(s, t, "cpu", **options)
                truth, true_grad = by_the_book(s, t, **options)
                eager = testing.textbook_loss(s.float(), t.float(), reduction="none", **options)
                case = (divergence, height, temperature, loss, truth, eager)
                assert (loss >= 0).all(), case
                bar = 2 * (eager - truth).abs().max() + 2 * numerics.EPSILON * truth.max() + temperature**2 * shorter
                assert (loss - truth).abs().max() <= TIMES * bar + 2e-14, case
                # TVD's gradient hangs on signs of differences that may be roundings.
                if dtype == "fp32" and height >= 10 and temperature <= 1 and divergence.name != "tvd":
                    assert (grad - true_grad).norm() <= 2e-3 * true_grad.norm() + 1e-14, case


@pytest.mark.parametrize("kind", ["normal", "peaked", "huge", "both-inf", "flat"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(dtype, kind, compiled_cpu):
    """A loss of 0 and no gradient, to the last bit; but of soft cross entropy the teacher's entropy stays."""
    student, _ = testing.make_inputs(kind, 3, 1100, DTYPES[dtype])
    for divergence in numerics.DIVERGENCES:
        for temperature in (0.5, 1.0, 3.0):
            options = {"divergence": divergence, "temperature": temperature}
            loss, grad = rows(student, student.clone(), "cpu", **options)
            if divergence.name == "soft_ce":
                assert (loss >= 0).all() and grad.abs().max() < 1e-6, (divergence, temperature)
            else:
                assert not loss.any() and not grad.any(), (divergence, temperature, loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_finite_logits_of_any_size(divergence, dtype, backend):
    """Up to the largest number of the dtype; the models share the order of their logits, so that the loss is finite."""
    top = torch.finfo(DTYPES[dtype]).max
    for size in (1e4, 1e9, 3e9, 1e10, 1e30, 1e36, top / 4, top):
        if size > top:
            continue
        line = torch.tensor([[0.0, 1.0, -1.0, 0.5, 0.25] * 8], dtype=torch.float64)
        line[0, -1] = 1.0
        student, teacher = (line * size).to(DTYPES[dtype]), (line * min(size * 0.9, top)).to(DTYPES[dtype])
        loss, grad = rows(student, teacher, backend, divergence=divergence)
        # Nine of 40 tokens share the mass of both.
        assert torch.isfinite(loss).all() and loss.abs().item() < 1e-5, (size, loss)
        assert torch.isfinite(grad).all() and grad.abs().max() < 1e-5, (size, grad)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_large_logits_keep_the_small_ones_beside_them(divergence, dtype, temperature, backend):
    """One model's logits stand 1e10 higher: a softmax knows nothing of that, as far as the dtype holds the rest."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(-8, 9, (3, 300), generator=generator).double() * 2.0**18
    student = (small * 2.0**8 + 2.0**36).to(DTYPES[dtype])
    teacher = torch.randn(3, 300, generator=generator, dtype=torch.float64).to(DTYPES[dtype])
    loss, grad = rows(student, teacher, backend, divergence=divergence, temperature=temperature)
    truth, true_grad = by_the_book(student, teacher, divergence=divergence, temperature=temperature)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    scale = true_grad.abs().max().item()
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-2, atol=max(1e-4 * scale, 1e-9))


def test_a_bounded_divergence_stays_in_its_bounds_at_large_logits(backend):
    loss, _ = rows(torch.tensor([[0.0, 0.1, 0.2]]), torch.tensor([[1e10, 0.0, -1e10]]), backend, divergence="jsd")
    assert loss.item() == pytest.approx(0.3416, abs=1e-4)


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_a_finite_mask_of_one_model(masked, mask, backend):
    """Its cost is finite, as in eager PyTorch, where fp32 can hold it."""
    student, teacher = testing.make_inputs("normal", 4, 300, torch.float32)
    for name, logits in (("student", student), ("teacher", teacher)):
        if masked in (name, "both"):
            logits[:, ::3] = mask
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        loss, grad = rows(student, teacher, backend, divergence=divergence)
        truth, true_grad = by_the_book(student, teacher, divergence=divergence)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        scale = true_grad.abs().max().item()
        torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-5 * scale)


NEAR_LIMITS = [(1e-6, 1.0), (1e-4, 1.0), (1.0, 1e-5), (1e-3, 1e-3), (1e-5, -1e-5), (0.0, 1e-4), (0.5, -0.5 + 2**-16)]


@pytest.mark.parametrize(("alpha", "beta"), [*NEAR_LIMITS, (1.0, -0.5), (2.0, -1.0), (-0.5, 1.0)], ids=str)
def test_alpha_beta_near_its_limits_and_at_negative_parameters(alpha, beta, backend):
    student, teacher = testing.make_inputs("normal", 4, 50, torch.float32)
    loss, grad = rows(student, teacher, backend, divergence=kd.AlphaBeta(alpha, beta))
    truth, true_grad = by_the_book(student, teacher, divergence=kd.AlphaBeta(alpha, beta))
    torch.testing.assert_close(loss.double(), truth, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=2e-5 * true_grad.abs().max().item())


@pytest.mark.parametrize(
    ("alpha", "beta", "student", "teacher", "expected"),
    [
        (1.0, -0.5, [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -INF], 1.0717967),
        (-0.5, 1.0, [0.0, 0.0, 0.0, -INF], [0.0, 0.0, 0.0, 0.0], 1.0717967),
        (2.0, -1.0, [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -120.0], 1 / 6),
        (2.0, -1.0, [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -INF], 1 / 6),
        (2.0, -1.0, [0.0, 0.0, 0.0, -INF], [0.0, 0.0, 0.0, 0.0], INF),
        (-1.0, -1.0, [0.0, 0.0, 0.0, -INF], [0.0, 0.0, 0.0, 0.0], INF),
        (1e-4, 1.0, [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -120.0], 29.5298),
        (0.5, 0.0, [-INF, 0.0, 0.0, 0.0], [-INF, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_alpha_beta_where_a_model_has_no_mass(alpha, beta, student, teacher, expected, backend):
    loss, grad = rows(torch.tensor([student]), torch.tensor([teacher]), backend, divergence=kd.AlphaBeta(alpha, beta))
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    if expected < INF:
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "jeffreys", "alpha_beta"])
def test_a_divergence_of_weight_0_is_left_out(divergence, temperature, stats, backend):
    """A teacher of NaN, or of no mass at all, reaches neither loss nor gradient."""
    student = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 3])
    for value in (torch.nan, -INF):
        x = student.clone().requires_grad_()
        teacher = torch.zeros_like(student)
        teacher[1] = value
        options = {"kd_weight": 0.0, "ce_weight": 1.0, "z_loss_weight": 0.1, "return_stats": stats, "backend": backend}
        found = kd.kd_loss(x, teacher, labels, divergence=divergence, temperature=temperature, **options)
        (found[0] if stats else found).backward()
        y = student.clone().requires_grad_()
        lse = y.logsumexp(-1)
        (torch.nn.functional.cross_entropy(y, labels) + 0.1 * lse.square().mean()).backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_cross_entropy_with_a_common_offset(offset, backend):
    s = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) + offset
    labels = torch.arange(4)
    loss, _ = rows(s, s, backend, labels=labels, kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1)
    truth = torch.nn.functional.cross_entropy(s.double(), labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    # One class has all the probability, whatever its logit.
    alike, _ = rows(
        torch.full((2, 1), 1e4), torch.zeros(2, 1), backend, labels=torch.zeros(2).long(), kd_weight=0.0, ce_weight=1.0
    )
    assert alike.abs().max() < 1e-6


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e5, 1e6])
def test_standardised_logits_with_an_offset(offset, backend):
    s, t = (x.float() for x in testing.make_inputs("normal", 4, 300, torch.float64))
    s, t = s + offset, t + offset
    loss, grad = rows(s, t, backend, standardize=True, temperature=2.0)
    truth, true_grad = by_the_book(s, t, standardize=True, temperature=2.0)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    assert ((grad - true_grad).norm(dim=-1) / true_grad.norm(dim=-1)).max() < 2e-6


@pytest.mark.parametrize("factor", [1e-30, 1e5, 1e12, 1e30, 5e37])
def test_standardised_logits_of_any_size_in_plain_pytorch(factor):
    """A factor is taken out again: neither squares nor sums may pass the largest number."""
    s, t = (x.float() for x in testing.make_inputs("normal", 4, 300, torch.float64))
    s, t = s / 8 * factor, t / 8 * factor
    loss, grad = rows(s, t, "torch", standardize=True, temperature=2.0)
    truth, true_grad = by_the_book(s, t, standardize=True, temperature=2.0)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    # A gradient by such logits may be under the smallest number.
    assert (((grad - true_grad).norm(dim=-1) - 1e-43).clamp(min=0) / true_grad.norm(dim=-1)).max() < 2e-6


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_the_largest_logits_at_any_temperature(temperature, backend):
    """Differences come first: a quotient by a small temperature would be infinite."""
    line = torch.tensor([[1.0, 1.0, 0.75, 0.5, 0.25, -0.01]]) * 3.3e38
    other = torch.tensor([[1.0, 1.0, 0.5, 0.75, 0.0, -0.1]]) * 3e38
    for s, t in ((line, other), (-line, -other)):
        for divergence in ("forward_kl", "jsd", "reverse_kl", "skew_kl"):
            options = {"divergence": divergence, "temperature": temperature, "scale_by_t_squared": False}
            loss, grad = rows(s, t, backend, **options)
            truth, true_grad = by_the_book(s, t, **options)
            torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_of_the_largest_logits(smoothing, backend):
    """It is finite where its value is, though a difference of two logits may not be."""
    s = torch.tensor([[0.0, 1.0, -1.0, 0.5, 0.25] * 8]) * 3e38
    s[0, 7] = 2e38
    for label in (1, 3):
        options = {"labels": torch.tensor([label]), "kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": smoothing}
        loss, grad = rows(s, s, backend, **options)
        labels = options.pop("labels")
        x = s.double().requires_grad_()
        truth = torch.nn.functional.cross_entropy(x, labels, label_smoothing=smoothing, reduction="none")
        assert 0 < truth.item() < 3.4e38 or (label, smoothing) == (1, 0.0)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=10.0)
        torch.testing.assert_close(grad.double(), torch.autograd.grad(truth, x)[0], rtol=1e-5, atol=1e-6)


def sure_rows(kind, ahead, student, rows=16, columns=400):
    """Rows whose first token, or first two alike, stand far above the rest, and a student that knows or does not."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale):
        return scale * torch.randn(rows, columns, generator=generator)

    at = torch.arange(rows)
    t, first = noise(1.0), at * 37 % columns
    t[at, first] += ahead
    if kind == "two":
        t[at, first - 11] = t[at, first]
    if student in ("flat", "other"):
        s = noise(1.0)
        if student == "other":
            s[at, first - 5] += ahead
            s[at, first - 6] = s[at, first - 5] if kind == "two" else s[at, first - 6]
        return s, t
    return t + noise({"equal": 0.0, "nearly": 1e-4, "near": 0.01, "off": 0.1}[student]), t


@pytest.mark.parametrize("name", kd.divergences.names())
@pytest.mark.parametrize("kind", ["one", "two"])
@pytest.mark.parametrize("ahead", [20.0, 40.0])
def test_sure_rows_and_ties_in_plain_pytorch(ahead, kind, name):
    """Never negative, and no worse than the textbook."""
    divergence = kd.divergences.resolve(name)
    for student in ("equal", "nearly", "near", "off", "flat", "other"):
        s, t = sure_rows(kind, ahead, student)
        cell = numerics.Cell(divergence, kind, 1.0, 1.0, s.shape[1])

        def run(loss_of, x):
            x = x.clone().requires_grad_()
            loss = loss_of(x)
            return loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()

        truth, true_grad = run(lambda x, c=cell, t=t: numerics.true_rows(c, x, t.double(), None), s.double())
        top = s.argmax(-1, keepdim=True)
        true_grad.scatter_(-1, top, 0.0).scatter_(-1, top, -true_grad.sum(-1, keepdim=True))
        eager = run(lambda x, t=t: testing.textbook_loss(x, t, reduction="none", divergence=divergence), s)
        loss, grad = run(lambda x, t=t: kd.kd_loss(x, t, reduction="none", divergence=divergence, backend="torch"), s)
        ulp = 2 * torch.finfo(torch.float32).eps
        assert (loss >= 0).all(), (student, loss)
        allowed = 2 * (eager[0] - truth).abs().max() + ulp * truth.abs().max()
        assert (loss - truth).abs().max() <= allowed, student
        # Two probabilities of exactly a half cancel without rounding in the textbook, and only these: half an ulp of 1.
        allowed = 2 * (eager[1] - true_grad).norm(dim=-1).max() + ulp * true_grad.norm(dim=-1).max() + ulp / 4
        assert (grad - true_grad).norm(dim=-1).max() <= allowed, student


@pytest.mark.parametrize(("alpha", "beta"), [(-1.0, 2.0), (2.0, -1.0), (-0.5, 1.0), (1.0, -0.5), (0.2, 0.7)], ids=str)
def test_alpha_beta_of_rows_far_apart(alpha, beta, backend):
    """Scores of 1e27 stand beside a gradient of 1e5, in ``g - q sum(g)`` of the token that has all the probability."""
    s, t = testing.make_inputs("peaked", 4, 50, torch.float32)
    divergence = kd.AlphaBeta(alpha, beta)

    def run(loss_of, dtype):
        x, y = (item.to(dtype).requires_grad_() for item in (s, t))
        loss = loss_of(x, y)
        return [item.double() for item in (loss.detach(), *torch.autograd.grad(loss.sum(), (x, y)))]

    cell = numerics.Cell(divergence, "peaked", 1.0, 1.0, s.shape[1])
    truth, *grads = run(lambda x, y: numerics.true_rows(cell, x, y, None), torch.float64)
    loss, *found = run(
        lambda x, y: kd.kd_loss(x, y, reduction="none", divergence=divergence, backend=backend), torch.float32
    )
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    for got, exact, logits in zip(found, grads, (s, t), strict=True):
        # A gradient adds up to 0.
        top = logits.argmax(-1, keepdim=True)
        exact.scatter_(-1, top, 0.0).scatter_(-1, top, -exact.sum(-1, keepdim=True))
        off = (got - exact).norm(dim=-1)
        assert (off <= 1e-4 * exact.norm(dim=-1) + 1e-6).all(), (off, exact.norm(dim=-1))


def test_derivatives_of_a_sure_row_of_alpha_beta_in_plain_pytorch():
    """First and second ones, of a student that is sure and one that is not, by both models."""
    for s, t in (([5.0, 0.3, -0.2, 0.1], [0.2, 4.0, 0.1, -0.5]), ([0.1, 0.2, 0.3, 0.0], [0.0, 0.5, 0.2, 5.0])):
        inputs = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (s, t)]
        for alpha, beta in ((-1.0, 2.0), (2.0, -1.0), (0.2, 0.7)):

            def loss(x, y, divergence=kd.AlphaBeta(alpha, beta)):  # noqa: B008
                return kd.kd_loss(x, y, divergence=divergence, backend="torch")

            assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(loss, inputs)


def test_standardised_logits_use_the_deviation_of_torch_std(backend):
    s, t = testing.make_inputs("normal", 4, 7, torch.float64)
    z = [(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (s, t)]
    by_hand, _ = rows(*z, backend, temperature=2.0)
    torch.testing.assert_close(rows(s, t, backend, standardize=True, temperature=2.0)[0], by_hand)
    loss, grad = rows(s[:, :1], t[:, :1], backend, standardize=True)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_are_rows_that_add_up_to_1(dtype, backend):
    student, teacher = testing.make_inputs("normal", 4, 3000, torch.float32)
    probs = teacher.softmax(-1).to(DTYPES[dtype])
    exact, _ = rows(student, probs, backend, teacher_form="probs")
    doubled = {"teacher_form": "unnormalized_probs"}
    torch.testing.assert_close(rows(student, probs * 2, backend, **doubled)[0], exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="teacher must hold probabilities that add up to 1 .* a sum of .*unnormalized_probs"
    ):
        rows(student, probs * 2, backend, teacher_form="probs")
    # Of a row that is left out, or of a divergence that is, nothing is asked.
    labels = torch.tensor([1, 2, -100, 3])
    for value in (0.0, -1.0, torch.nan):
        probs[2] = value
        for form in ("probs", "unnormalized_probs"):
            assert torch.isfinite(rows(student, probs, backend, teacher_form=form, labels=labels)[0]).all()


@pytest.mark.parametrize("form", ["probs", "unnormalized_probs"])
@pytest.mark.parametrize("call", ["kd_loss", "mixture", "linear_kd_loss"])
def test_probabilities_are_neither_negative_nor_nan(call, form, backend):
    """They were a NaN loss."""
    good = torch.tensor([[0.5, 0.25, 0.25]] * 3)
    padded = torch.cat([good, torch.full((3, 1), torch.nan)], -1)

    def loss(probs, **options):
        options |= {"teacher_form": form, "vocab_size": 3, "backend": backend}
        if call == "linear_kd_loss":
            hidden, head = torch.ones(3, 2), torch.ones(4, 2)
            return kd.linear_kd_loss(hidden, head, teacher_logits=lambda rows: probs[rows], **options)
        return kd.kd_loss(torch.ones(3, 4), [padded, probs] if call == "mixture" else probs, **options)

    name = {"kd_loss": "teacher", "mixture": r"teacher\[1\]", "linear_kd_loss": r"teacher_logits\(rows\)"}[call]
    assert torch.isfinite(loss(padded))
    for value, shown in ((-0.25, "-0.25"), (torch.nan, "nan"), (-torch.inf, "-inf")):
        bad = padded.clone()
        bad[1, 1] = value
        bad[1, 0] = 1.0
        message = f"{name} must hold probabilities, none negative or NaN, for teacher_form='{form}', got {shown}"
        with pytest.raises(ValueError, match=message):
            loss(bad)
        assert torch.isfinite(loss(bad, labels=torch.tensor([0, -100, 0])))
        loss(bad, row_weight=torch.tensor([1.0, 0.0, 1.0]))
    for value, shown in ((0.0, "0"), (torch.inf, "inf")):
        bad = padded.clone()
        bad[1] = value
        wanted = "add up to 1" if form == "probs" else "hold a finite weight above 0 in every row"
        with pytest.raises(ValueError, match=f"{name} must .*{wanted}.*, got a .* of {shown}"):
            loss(bad)


def test_probabilities_of_a_batch_of_calls_are_not_read():
    """In ``torch.func.vmap`` a tensor stands for others."""
    s, t = torch.randn(3, 4, 10), torch.rand(3, 4, 10)
    t = t / t.sum(-1, keepdim=True)
    for form in ("probs", "unnormalized_probs"):

        def loss(x, y, form=form):
            return kd.kd_loss(x, y, teacher_form=form, backend="torch")

        expected = torch.stack([loss(x, y) for x, y in zip(s, t, strict=True)])
        torch.testing.assert_close(torch.func.vmap(loss)(s, t), expected)


def standardised(student, teacher, factor, backend, **options):
    """Losses, and the gradient times the factor, of rows that many times as large."""
    student = (student * factor).requires_grad_()
    loss = kd.kd_loss(student, teacher * factor, reduction="none", standardize=True, backend=backend, **options)
    return loss.detach().double(), torch.autograd.grad(loss.sum(), student)[0].double() * factor


@pytest.mark.parametrize("columns", [4, 40, 3000])
@pytest.mark.parametrize("factor", [1e-35, 1e-25, 1e-19, 1e15, 1e19, 1e30, 6e37])
def test_standardised_logits_of_any_size(factor, columns, backend):
    """Squares of 1e19 and more pass fp32's range, and those of 1e-19 and less fall below it."""
    student, teacher = torch.randn(3, columns), torch.randn(3, columns)
    options = {"teacher_softcap": None, "temperature": 2.0}
    found = standardised(student, teacher, factor, backend, **options)
    for value, truth in zip(
        found, standardised(student.double(), teacher.double(), 1.0, "torch", **options), strict=True
    ):
        # A gradient of less than 1e-38 has fewer bits.
        atol = 1e-6 * truth.abs().max().item() + 8 * 2.0**-149 * factor
        torch.testing.assert_close(value, truth, rtol=2e-5, atol=atol)


def test_standardised_logits_of_any_size_beside_cross_entropy_and_in_mixtures(backend):
    student, teachers, factor = torch.randn(3, 40), [torch.randn(3, 40), torch.randn(3, 40)], 1e25
    labels = torch.tensor([1, 5, 39])
    for mixture in ("probs", "logits"):
        leaf, exact = (student * factor).requires_grad_(), (student.double() * factor).requires_grad_()
        options = {"standardize": True, "mixture": mixture, "ce_weight": 1e-25}
        loss = kd.kd_loss(leaf, [t * factor for t in teachers], labels, backend=backend, **options)
        truth = kd.kd_loss(exact, [t.double() * factor for t in teachers], labels, backend="torch", **options)
        torch.testing.assert_close(loss.double(), truth, rtol=2e-5, atol=0)
        grads = torch.autograd.grad(loss, leaf)[0].double(), torch.autograd.grad(truth, exact)[0]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * grads[1].abs().max().item())


def test_standardised_logits_of_fp64_of_any_size(compiled_cpu):
    student, teacher = torch.randn(3, 40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    truth = standardised(student, teacher, 1.0, "torch")
    for factor in (1e-200, 1e200, 1e300):
        for value, exact in zip(standardised(student, teacher, factor, "cpu"), truth, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)


FRACTIONS = {
    "skew_kl": lambda x: kd.SkewKL(x),
    "skew_reverse_kl": lambda x: kd.SkewReverseKL(x),
    "jsd": lambda x: kd.JSD(x),
}


@pytest.mark.parametrize("fraction", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("name", FRACTIONS)
def test_the_other_fraction_is_not_that_of_a_rounded_one(name, fraction, backend):
    """1 less alpha in fp32 is off by 3e-5 of itself at 0.999, and so was the gradient by half of that."""
    student, teacher = torch.randn(4, 17) * 0.01, torch.zeros(4, 17)
    teacher[:, 3] = 50.0
    divergence = FRACTIONS[name](fraction)
    truth = rows(student.double(), teacher.double(), "torch", divergence=divergence)[1]
    grad = rows(student, teacher, backend, divergence=divergence)[1]
    # The gradient of skew reverse KL is a difference of numbers up to a thousand times as large, mostly.
    bar = 5e-5 if name == "skew_reverse_kl" else 2e-6
    assert (grad.double() - truth).abs().max() < bar * truth.abs().max()


@pytest.mark.parametrize("parameters", [(-0.5, -0.5), (-0.3, -0.3), (-0.2, -0.7), (-1.0, 0.4), (0.4, -1.0)])
def test_alpha_beta_of_negative_parameters_far_apart(parameters, backend):
    """Where a slope was taken of an exponential's difference from 1, which is all rounding there, half was lost."""
    divergence = kd.AlphaBeta(*parameters)
    student, teacher = torch.tensor([[0.01, -0.02]]), torch.tensor([[50.0, 0.0]])
    truth = rows(student.double(), teacher.double(), "torch", divergence=divergence)
    exact = rows(student.double(), teacher.double(), "cpu", divergence=divergence) if backend == "cpu" else truth
    found = rows(student, teacher, backend, divergence=divergence)
    for value, close, other in zip(found, truth, exact, strict=True):
        torch.testing.assert_close(value.double(), close, rtol=1e-4, atol=0)
        torch.testing.assert_close(other, close, rtol=1e-9, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("mixture", ["probs", "logits"])
def test_a_teacher_of_weight_0_counts_nothing(mixture, standardize, bad, backend):
    student, teacher, none = torch.randn(3, 30), torch.randn(3, 30), torch.full((3, 30), bad)
    options = {"mixture": mixture, "standardize": standardize}
    found = rows(student, [teacher, none], backend, teacher_weights=[1.0, 0.0], **options)
    for value, expected in zip(found, rows(student, teacher, "torch", standardize=standardize), strict=True):
        torch.testing.assert_close(value, expected)


def test_decoupled_distillation_without_a_term_reads_nothing(backend):
    labels = torch.tensor([0, 3, 29])
    student, teacher = torch.randn(3, 30).requires_grad_(), torch.full((3, 30), float("nan"))
    loss = kd.dkd_loss(student, teacher, labels, alpha=0.0, beta=0.0, backend=backend)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()
    # One of two that is infinite.
    student = torch.randn(3, 30)
    student[:, 5] = -INF
    leaf, teacher = student.requires_grad_(), torch.randn(3, 30)
    loss = kd.dkd_loss(leaf, teacher, labels, alpha=1.0, beta=0.0, backend=backend)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()


@pytest.mark.parametrize("divergence", [kd.SkewKL(1.0), kd.SkewReverseKL(1.0)])
def test_a_skew_of_1_is_0_beside_columns_that_are_ruled_out(divergence, backend):
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    student[:, 2], teacher[:, 2], student[0, 4], teacher[1, 5] = -INF, -INF, -INF, -INF
    loss, grad = rows(student, teacher, backend, divergence=divergence)
    assert loss.abs().max() < 1e-7 and grad.abs().max() < 1e-7
