"""Rows of any size, fractions next to 1, weights of 0, and large gradients in fp16, on both dense patterns."""

import pytest
import torch
from shapes import resident, tiles

import kdkernels as kd
from kdkernels.kernels import tuning

INF = float("inf")


@pytest.fixture(params=["sweeps", "cluster"], autouse=True)
def pattern(request, monkeypatch):
    shape = tiles(32, num_warps=4)

    def plans(V, itemsize, *, vec, cut, resident_load, **_):
        if request.param == "sweeps" or resident_load is None:
            return [tuning.Plan("sweeps", *shape(V, itemsize, vec=vec))]
        return [resident(V, vec, cut, 256 // vec)]

    monkeypatch.setattr(tuning, "dense_plans", plans)
    monkeypatch.setattr(tuning, "shape", shape)
    return request.param


def rows(loss, student, teacher, backend, **options):
    """Losses and the gradient of their sum, in fp64."""
    student = student.clone().requires_grad_()
    value = loss(student, teacher, reduction="none", backend=backend, **options)
    return value.detach().double(), torch.autograd.grad(value.sum(), student)[0].double()


@pytest.mark.parametrize("columns", [4, 40, 700])
@pytest.mark.parametrize("factor", [1e-30, 1e-19, 1e19, 1e30, 3e37])
def test_standardised_logits_of_any_size(factor, columns):
    student, teacher = torch.randn(3, columns), torch.randn(3, columns)
    options = {"standardize": True, "temperature": 2.0}
    found = rows(kd.kd_loss, student * factor, teacher * factor, "triton", **options)
    truth = rows(kd.kd_loss, student.double(), teacher.double(), "torch", **options)
    torch.testing.assert_close(found[0], truth[0], rtol=2e-5, atol=1e-7)
    # A gradient of less than 1e-38 has fewer bits.
    atol = 1e-6 * truth[1].abs().max().item() + 8 * 2.0**-149 * factor
    torch.testing.assert_close(found[1] * factor, truth[1], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("fraction", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("kind", [kd.SkewKL, kd.JSD])
def test_the_other_fraction_is_not_that_of_a_rounded_one(kind, fraction):
    student, teacher = torch.randn(4, 17) * 0.01, torch.zeros(4, 17)
    teacher[:, 3] = 50.0
    truth = rows(kd.kd_loss, student.double(), teacher.double(), "torch", divergence=kind(fraction))[1]
    grad = rows(kd.kd_loss, student, teacher, "triton", divergence=kind(fraction))[1]
    assert (grad - truth).abs().max() < 2e-6 * truth.abs().max()


def test_a_fraction_per_row_is_the_same_as_one_for_all():
    student, teacher = torch.randn(4, 40), torch.randn(4, 40)
    for divergence in (kd.SkewKL(0.75), kd.JSD(0.75), kd.SkewReverseKL(0.75)):
        of_rows = rows(
            kd.kd_loss, student, teacher, "triton", divergence=divergence.name, row_param=torch.full((4,), 0.75)
        )
        for found, expected in zip(
            of_rows, rows(kd.kd_loss, student, teacher, "triton", divergence=divergence), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("mixture", ["probs", "logits"])
def test_a_teacher_of_weight_0_counts_nothing(mixture, standardize, bad):
    student, teacher, none = torch.randn(3, 30), torch.randn(3, 30), torch.full((3, 30), bad)
    options = {"mixture": mixture, "standardize": standardize, "teacher_weights": [1.0, 0.0]}
    found = rows(kd.kd_loss, student, [teacher, none], "triton", **options)
    expected = rows(kd.kd_loss, student.double(), teacher.double(), "torch", standardize=standardize)
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)


def test_decoupled_distillation_without_a_term_reads_nothing():
    labels = torch.tensor([0, 3, 29])
    nan = torch.full((3, 30), float("nan"))
    loss, grad = rows(kd.dkd_loss, torch.randn(3, 30), nan, "triton", labels=labels, alpha=0.0, beta=0.0)
    assert not loss.any() and not grad.any()
    student = torch.randn(3, 30)
    student[:, 5] = -INF
    loss, grad = rows(kd.dkd_loss, student, torch.randn(3, 30), "triton", labels=labels, alpha=1.0, beta=0.0)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("divergence", [kd.AlphaBeta(1.0, -0.5), "reverse_kl", "jeffreys"])
def test_a_gradient_that_fits_fp16_fits_it_without_constants(divergence, inplace):
    student, teacher = torch.full((8, 300), -20.0).half(), torch.full((8, 300), -20.0).half()
    student[:, :2], teacher[:, 0], teacher[:, 1] = 0.0, 8000.0, 0.0
    if divergence not in ("reverse_kl", "jeffreys"):
        student, teacher = (torch.randn(8, 300) * 3).half(), (torch.randn(8, 300) * 3).half()
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    options = {"divergence": divergence, "normalizer": 64}
    kd.kd_loss(leaf * 1, teacher, inplace=inplace, backend="triton", **options).backward()
    kd.kd_loss(exact, teacher.double(), backend="torch", **options).backward()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad.double() - exact.grad).norm() < 1e-3 * exact.grad.norm()


def test_vmap_over_what_is_not_the_student_is_refused_in_one_sentence():
    student, teachers, labels = torch.randn(3, 9), torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)
    for loss, given in (
        (lambda t: kd.kd_loss(student, t, backend="triton"), teachers),
        (lambda y: kd.kd_loss(student, student * 2, y, backend="triton"), labels),
        (lambda w: kd.kd_loss(student, student * 2, row_weight=w[:, 0].exp(), backend="triton"), teachers),
    ):
        with pytest.raises(RuntimeError, match='backend="torch" works'):
            torch.func.vmap(loss)(given)
