"""``feature_loss`` beside autograd of PyTorch's own losses in fp64."""

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import backends, features, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ROUNDING = {"fp32": 5e-6, "bf16": 4e-3, "fp16": 5e-4, "fp64": 1e-12}
SHAPE = (3, 5, 24)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(features, "CPU_BLOCK_BYTES", 4 * 24 * 4)


def vectors(dtype="fp32"):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(SHAPE, generator=generator) + 0.3).to(DTYPES[dtype]) for _ in range(2)]


def counted():
    mask = torch.ones(SHAPE[:-1], dtype=torch.bool)
    mask[0, 2:], mask[2] = False, False
    return mask


def textbook(student, teacher, kind="mse", normalize=None, beta=1.0, mask=None, row_weight=None, reduction="mean"):
    if normalize == "l2":
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if normalize == "layernorm":
        student, teacher = (F.layer_norm(item, item.shape[-1:]) for item in (student, teacher))
    if kind == "cosine":
        rows = 1 - F.cosine_similarity(student, teacher, -1)
    else:
        loss = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind]
        rows = loss(student, teacher, reduction="none", **({"beta": beta} if kind == "smooth_l1" else {})).mean(-1)
    mask = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask
    rows = torch.where(mask, rows, 0.0) * (1.0 if row_weight is None else row_weight)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.sum() / mask.sum()


def weighted(loss):
    return (loss * torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum() + loss.sum() * 2


def off(got, expected):
    return ((got.detach().double() - expected.detach()).norm() / expected.norm().clamp(min=1e-30)).item()


def check(dtype, backend, **options):
    student, teacher = vectors(dtype)
    exact = student.double().requires_grad_()
    expected = textbook(exact, teacher.double(), **options)
    student.requires_grad_()
    before = student.detach().clone(), teacher.clone()
    with testing.poisoned_memory():
        loss = kd.feature_loss(student, teacher, backend=backend, **options)
        (found,) = torch.autograd.grad(weighted(loss), student)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert loss.dtype == (torch.float64 if dtype == "fp64" else torch.float32) and loss.shape == expected.shape
    assert off(loss, expected) < min(ROUNDING[dtype], 5e-6)
    assert found.dtype == student.dtype
    assert off(found, torch.autograd.grad(weighted(expected), exact)[0]) < ROUNDING[dtype]
    assert torch.equal(kd.feature_loss(student.detach(), teacher, backend=backend, **options), loss)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [None, "l2", "layernorm"])
@pytest.mark.parametrize("kind", features.KINDS)
def test_loss_and_gradient(kind, normalize, dtype, backend):
    check(dtype, backend, kind=kind, normalize=normalize, **({"beta": 0.4} if kind == "smooth_l1" else {}))


@BACKENDS
@pytest.mark.parametrize("reduction", features.REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_reductions(reduction, masked, dtype, backend):
    mask = counted() if masked else None
    check(dtype, backend, kind="cosine", normalize="layernorm", mask=mask, reduction=reduction)
    check(dtype, backend, mask=mask, reduction=reduction, row_weight=torch.linspace(-1, 2, 15).view(3, 5))


@BACKENDS
@pytest.mark.parametrize("kind", features.KINDS)
@pytest.mark.parametrize("normalize", [None, "l2", "layernorm"])
def test_what_is_masked_is_not_looked_at(kind, normalize, backend):
    student, teacher = vectors()
    mask, found = counted(), []
    for fill in (0.0, torch.nan):
        inputs = [torch.where(mask[..., None], item, fill) for item in (student, teacher)]
        inputs[0].requires_grad_()
        loss = kd.feature_loss(*inputs, kind=kind, normalize=normalize, mask=mask, backend=backend)
        found.append((loss.detach(), torch.autograd.grad(loss, inputs[0])[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not found[1][1][~mask].any() and found[1][1][mask].any()
    assert kd.feature_loss(student, teacher, mask=torch.zeros_like(mask), backend=backend) == 0


@BACKENDS
@pytest.mark.parametrize("normalize", [None, "l2"])
def test_a_vector_of_length_0_has_no_direction(normalize, backend):
    student, teacher = vectors()
    student[0, 0], teacher[1, 1] = 0.0, 0.0
    student.requires_grad_()
    options = {"kind": "cosine", "normalize": normalize, "reduction": "none", "backend": backend}
    loss = kd.feature_loss(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss[0, 0] == loss[1, 1] == 1 and not grad[0, 0].any() and not grad[1, 1].any() and grad.isfinite().all()
    zero = torch.zeros(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(kd.feature_loss(zero, torch.ones(2, 4), normalize="l2", backend=backend), zero)
    assert not grad.any()


@pytest.mark.parametrize("kind", features.KINDS)
def test_any_stride_will_do(kind):
    student, teacher = (item.transpose(0, 2).contiguous().transpose(0, 2) for item in vectors())
    loss = kd.feature_loss(student.requires_grad_(), teacher, kind=kind)
    loss.backward()
    assert student.grad.any()
    torch.testing.assert_close(loss, kd.feature_loss(*vectors(), kind=kind))
    assert not kd.feature_loss(student.detach(), teacher, kind=kind).requires_grad


def test_a_teacher_that_would_learn_is_refused():
    student, teacher = vectors()
    teacher.requires_grad_()
    with pytest.raises(ValueError, match="teacher must not require grad: vectors of a teacher get no gradient"):
        kd.feature_loss(student, teacher)
    with torch.no_grad():
        kd.feature_loss(student, teacher)


def test_vectors_of_any_stride_and_several_backwards():
    student, teacher = vectors()
    other = student.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    loss = kd.feature_loss(other, teacher.expand(3, 5, 24), kind="cosine")
    first = torch.autograd.grad(loss, other, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss * 3, other)[0]
    torch.testing.assert_close(second, 3 * first)
    torch.testing.assert_close(loss, kd.feature_loss(student, teacher, kind="cosine"))
    assert kd.feature_loss(student[:0], teacher[:0]) == 0


def test_a_loss_scale_in_fp16_underflows_nothing():
    student, teacher = (item.half() for item in vectors("fp32"))
    teacher = student + 0.01 * teacher
    exact = student.double().requires_grad_()
    weight = torch.full(SHAPE[:-1], 1e-4)
    expected = textbook(exact, teacher.double(), row_weight=weight.double())
    loss = kd.feature_loss(student.requires_grad_(), teacher, row_weight=weight)
    found, gradient = (torch.autograd.grad(a * 2.0**22, b)[0] for a, b in ((loss, student), (expected, exact)))
    assert off(found, gradient) < 1e-3


def test_derivatives_beyond_the_first():
    student, teacher = (item.double() for item in vectors())
    student = student[0, :2].clone().requires_grad_()
    loss = lambda x: kd.feature_loss(x, teacher[0, :2], kind="cosine", normalize="layernorm", backend="torch")  # noqa: E731
    assert torch.autograd.gradgradcheck(loss, (student,))
    if backends.BACKENDS["cpu"].why_not("cpu") is None:
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(kd.feature_loss(student, teacher[0, :2]), student, create_graph=True)
    found = torch.func.grad(lambda x: kd.feature_loss(x, teacher[0, :2]))(student.detach())
    torch.testing.assert_close(found, torch.autograd.grad(kd.feature_loss(student, teacher[0, :2]), student)[0])


def test_one_graph():
    student, teacher = vectors()
    call = torch.compile(
        lambda x: kd.feature_loss(x, teacher, kind="cosine", mask=counted()), fullgraph=True, backend="aot_eager"
    )
    inputs = [student.clone().requires_grad_() for _ in range(2)]
    call(inputs[0]).backward()
    kd.feature_loss(inputs[1], teacher, kind="cosine", mask=counted()).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student": 1}, TypeError, "student must be a torch.Tensor, got int"),
        ({"student": torch.ones(SHAPE).int()}, TypeError, "student must be float32, .* got int32"),
        ({"teacher": torch.zeros(3, 5, 9)}, ValueError, r"teacher must have the student's shape .* got \(3, 5, 9\)"),
        ({"teacher": torch.tensor(1.0)}, ValueError, r"teacher must have shape \(\.\.\., D\)"),
        ({"kind": "l3"}, ValueError, "kind must be one of"),
        ({"normalize": "std"}, ValueError, "normalize must be one of"),
        ({"beta": 0.0}, ValueError, "beta must be > 0"),
        ({"beta": 0.5}, ValueError, "beta has no meaning with kind 'mse'"),
        ({"mask": torch.ones(3, 5)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(3).bool()}, ValueError, r"mask must have shape \(3, 5\), got \(3,\)"),
        ({"row_weight": 2.0}, TypeError, "row_weight must be a torch.Tensor, got float"),
        ({"row_weight": torch.ones(4)}, ValueError, "row_weight must be a number or have one value per row"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"backend": "triton"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, message):
    student, teacher = vectors()
    with pytest.raises(error, match=message):
        kd.feature_loss(**{"student": student, "teacher": teacher, **change})
