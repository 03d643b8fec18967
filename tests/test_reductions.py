"""Reductions, weights, normalisers: loss and gradient are those of the rows, weighted and divided as documented."""

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import divergences, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BATCH, LENGTH, VOCAB = 3, 7, 90
LABELS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
LABELS[0] = -100
LABELS[2, ::2] = -100
COUNTED = LABELS != -100
ROW_WEIGHT = torch.linspace(-0.5, 2.0, BATCH * LENGTH).reshape(BATCH, LENGTH)


def logits(dtype=torch.float32):
    return [x.reshape(BATCH, LENGTH, VOCAB) for x in testing.make_inputs("normal", BATCH * LENGTH, VOCAB, dtype)]


def run(student, teacher, labels=None, grad_output=None, **options):
    student = student.detach().clone().requires_grad_()
    with testing.poisoned_memory():
        loss = kd.kd_loss(student, teacher, labels, **{"temperature": 2.0, **options})
        loss.backward(grad_output)
    return loss.detach(), student.grad


DIVISORS = {
    ("none", "unmasked"): None,
    ("sum", "unmasked"): 1,
    ("mean", "unmasked"): BATCH * LENGTH,
    ("batchmean", "unmasked"): BATCH,
    ("none", "masked"): None,
    ("sum", "masked"): 1,
    ("mean", "masked"): int(COUNTED.sum()),
    ("batchmean", "masked"): BATCH,
}


@pytest.mark.parametrize(("reduction", "mask"), DIVISORS, ids=["-".join(key) for key in DIVISORS])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_reduction_is_the_sum_over_rows_by_its_divisor(reduction, mask, weighted, dtype, divergence, backend):
    student, teacher = logits(DTYPES[dtype])
    labels = LABELS if mask == "masked" else None
    options = {"divergence": divergence, "backend": backend, "row_weight": ROW_WEIGHT if weighted else None}
    # row_weight multiplies and does not enter the divisor.
    rows = testing.textbook_loss(
        student.double(), teacher.double(), labels, reduction="none", temperature=2.0, **options
    )
    divisor = DIVISORS[reduction, mask]
    factor = ROW_WEIGHT * 0 + 1.7
    if divisor is not None:
        rows, factor = rows.sum() / divisor, torch.tensor(1.7)
    loss, grad = run(student, teacher, labels, factor, reduction=reduction, **options)
    _, of_rows = run(student, teacher, labels, torch.full((BATCH, LENGTH), 1.7), reduction="none", **options)
    tolerance = 1e-10 if dtype == "fp64" else 1e-5
    torch.testing.assert_close(loss.double(), rows, rtol=tolerance, atol=tolerance)
    expected = of_rows.double() / (divisor or 1)
    # The gradient is rounded when it is stored, and again when it is multiplied by grad_output.
    rounding = 4 * torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=rounding * expected.abs().max().item())


def test_batchmean_is_that_of_kl_div(backend):
    """The line of the README: the same number and the same gradient."""
    student, teacher = logits(torch.float64)
    for temperature in (0.5, 1.0, 4.0):
        s = student.clone().requires_grad_()
        options = {"reduction": "batchmean"}
        written = F.kl_div(F.log_softmax(s / temperature, -1), F.softmax(teacher / temperature, -1), **options)
        written = written * temperature**2
        (expected,) = torch.autograd.grad(written, s)
        loss, grad = run(student, teacher, temperature=temperature, backend=backend, **options)
        torch.testing.assert_close(loss, written.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_cross_entropy_alone_is_that_of_pytorch(backend):
    student, teacher = logits(torch.float64)
    for reduction in ("mean", "sum", "none"):
        s = student.clone().requires_grad_()
        options = {"label_smoothing": 0.1, "reduction": reduction}
        written = F.cross_entropy(s.flatten(0, 1), LABELS.flatten(), **options)
        (expected,) = torch.autograd.grad(written.sum(), s)
        loss, grad = run(
            student, teacher, LABELS, torch.ones_like(written).reshape(LABELS.shape if written.dim() else ()),
            kd_weight=0.0, ce_weight=1.0, backend=backend, **options,
        )  # fmt: skip
        torch.testing.assert_close(loss.flatten(), written.detach().flatten(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalizer", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0])], ids=repr)
@pytest.mark.parametrize("labels", [None, LABELS], ids=["unmasked", "masked"])
def test_the_normalizer_takes_the_place_of_the_divisor(reduction, normalizer, labels, backend):
    student, teacher = logits()
    options = {"row_weight": ROW_WEIGHT, "backend": backend}
    loss, grad = run(student, teacher, labels, reduction=reduction, normalizer=normalizer, **options)
    total, of_total = run(student, teacher, labels, reduction="sum", **options)
    assert loss.shape == ()
    torch.testing.assert_close(loss, total / 7, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, of_total / 7, rtol=1e-5, atol=1e-8)


def test_the_mean_counts_rows_by_their_labels_not_by_their_weights(backend):
    student, teacher = logits()
    weights = torch.zeros(BATCH, LENGTH)
    weights[1, 0] = 3.0
    loss, grad = run(student, teacher, LABELS, row_weight=weights, backend=backend)
    rows, _ = run(student, teacher, LABELS, torch.ones(BATCH, LENGTH), reduction="none", backend=backend)
    torch.testing.assert_close(loss, 3 * rows[1, 0] / COUNTED.sum(), rtol=1e-6, atol=0)
    assert (grad[1, 0] != 0).all() and int((grad != 0).any(-1).sum()) == 1


def test_a_scalar_row_weight_is_a_factor(backend):
    student, teacher = logits()
    for weight in (2.5, torch.tensor(2.5)):
        loss, grad = run(student, teacher, row_weight=weight, backend=backend)
        plain, of_plain = run(student, teacher, backend=backend)
        torch.testing.assert_close(loss, 2.5 * plain, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, 2.5 * of_plain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("divergence", divergences.table())
def test_with_every_row_ignored_the_loss_and_the_gradient_are_0(reduction, divergence, backend):
    student, teacher = logits()
    student[0, 0] = torch.nan
    labels = torch.full((BATCH, LENGTH), -100)
    options = {"divergence": divergence, "ce_weight": 0.5, "z_loss_weight": 0.1, "backend": backend}
    grad_output = torch.ones(BATCH, LENGTH) if reduction == "none" else None
    loss, grad = run(student, teacher, labels, grad_output, reduction=reduction, **options)
    assert not loss.any() and not grad.any()  # and no NaN of 0 / 0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("leading", [(0,), (0, 5), (4, 0)], ids=str)
def test_without_rows_the_loss_is_0(reduction, leading, backend):
    student, teacher = torch.randn(*leading, 9), torch.randn(*leading, 9)
    grad_output = torch.ones(leading) if reduction == "none" else None
    for labels in (None, torch.empty(leading, dtype=torch.int64)):
        loss, grad = run(student, teacher, labels, grad_output, reduction=reduction, backend=backend)
        assert loss.shape == (leading if reduction == "none" else ()) and not loss.any()
        assert grad.shape == student.shape


GRAD_OUTPUTS = {
    "ones": torch.ones(BATCH, LENGTH),
    "zeros": torch.zeros(BATCH, LENGTH),
    "some-zeros": torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 2 * 1.0,
    "one-row": F.one_hot(torch.tensor(11), BATCH * LENGTH).reshape(BATCH, LENGTH) * 1.0,
    "any": ROW_WEIGHT * 3,
    "expanded": torch.tensor(0.3).expand(BATCH, LENGTH),
    "transposed": ROW_WEIGHT.t().contiguous().t(),
    "strided": torch.stack([ROW_WEIGHT, ROW_WEIGHT + 9], -1)[..., 0],
}


@pytest.mark.parametrize("grad_output", GRAD_OUTPUTS.values(), ids=GRAD_OUTPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_has_the_gradient_of_its_own_grad_output(grad_output, dtype, backend):
    """Both of the ways in which backward scales the gradient: in place, and into a copy where the graph is kept."""
    student, teacher = logits(DTYPES[dtype])
    oracle = testing.kd_oracle(student, teacher, LABELS, divergence="jsd", grad_output=grad_output)
    options = {"divergence": "jsd", "reduction": "none", "backend": backend}
    outcome = oracle.check(lambda s, t: kd.kd_loss(s, t, LABELS, **options))
    assert not outcome.dstudent[grad_output == 0].any() and not outcome.dstudent[~COUNTED].any()
    s = student.clone().requires_grad_()
    loss = kd.kd_loss(s, teacher, LABELS, **options)
    loss.backward(grad_output.to(loss.dtype), retain_graph=True)
    rounding = torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(s.grad, outcome.dstudent, rtol=rounding, atol=0)


def test_a_weighted_sum_of_rows_by_the_caller_is_row_weight(backend):
    """Per-token weights that are known only after the loss, as in policy gradients."""
    student, teacher = logits()
    s = student.clone().requires_grad_()
    rows = kd.kd_loss(s, teacher, reduction="none", temperature=2.0, backend=backend)
    ((rows * ROW_WEIGHT).sum() * 0.7).backward()
    loss, grad = run(student, teacher, row_weight=0.7 * ROW_WEIGHT, reduction="sum", backend=backend)
    torch.testing.assert_close((rows * ROW_WEIGHT).sum().detach() * 0.7, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.grad, grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("grad_output", [0.0, 1.0, -3.0, 2.0**16])
def test_a_scalar_grad_output_scales(grad_output, backend):
    """2^16 as loss scalers of mixed-precision training start with."""
    student, teacher = logits()
    _, grad = run(student, teacher, grad_output=torch.tensor(grad_output), backend=backend)
    _, one = run(student, teacher, backend=backend)
    torch.testing.assert_close(grad, grad_output * one, rtol=1e-5, atol=1e-8 * abs(grad_output))
