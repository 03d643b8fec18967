"""Universal logit distillation counted by bits: the kernel in Triton's interpreter against the reference in fp64."""

import pytest
import torch
from launches import uld

import kdkernels as kd
from kdkernels import reference
from kdkernels.kernels import uld as kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a row takes several of, and fewer programs than rows."""
    monkeypatch.setattr(kernel, "BLOCK", 1024)
    monkeypatch.setattr(kernel, "PROGRAMS", 2)


def run(student, teacher, labels=None, weight=None, temperatures=(1.0, 1.0), **options):
    """Loss and gradient of the kernel and of the reference."""
    of_rows = isinstance(temperatures[0], torch.Tensor)
    grad = torch.full_like(student, torch.nan)
    loss = uld(
        student,
        teacher,
        grad,
        labels,
        weight,
        temperatures if of_rows else (None, None),
        temperature=1.0 if of_rows else temperatures[0],
        teacher_temperature=1.0 if of_rows else temperatures[1],
        **options,
    )
    wide = student.double().requires_grad_()
    sizes = {name: options[name] for name in ("vocab_size", "teacher_vocab_size") if name in options}
    rows = reference.uld_rows(
        wide,
        teacher.double(),
        labels,
        temperature=temperatures[0].double() if of_rows else temperatures[0],
        teacher_temperature=temperatures[1].double() if of_rows else temperatures[1],
        **sizes,
    )
    rows = rows if weight is None else rows * weight
    (expected,) = torch.autograd.grad(rows.sum(), wide)
    return loss, grad, rows.detach(), expected


def check(loss, grad, rows, expected):
    torch.testing.assert_close(loss.double(), rows, rtol=1e-5, atol=2e-6)
    # The interpreter cuts what it stores in bf16.
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[grad.dtype]
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("widths", [(1, 5), (7, 3), (1030, 1500)], ids=str)
@pytest.mark.parametrize("dtypes", [("bf16", "fp16"), ("fp16", "bf16")], ids="-".join)
def test_values_and_gradients(widths, dtypes):
    student, teacher = (3 * torch.randn(3, V) for V in widths)
    # Ties, both zeros, columns without probability, and some far below the others.
    student[1], teacher[1] = (student[1] / 2).round() * 2, (teacher[1] / 2).round() * 2
    student[2, 1::3], teacher[2, 1::4] = -torch.inf, -300.0
    student, teacher = (x.to(DTYPES[name]) for x, name in zip((student, teacher), dtypes, strict=True))
    check(*run(student, teacher, temperatures=(1.5, 0.8)))


def test_masks_weights_temperatures_of_rows_and_padding():
    student, teacher = (3 * torch.randn(5, 2, 400)).bfloat16()[::2, 1:], (3 * torch.randn(3, 300)).bfloat16()[:, None]
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    student[:, 390:], teacher[:, 280:] = 1e4, torch.nan
    student[1, 3] = torch.nan
    labels, weight = torch.tensor([0, -100, 0]), torch.tensor([0.5, 1.0, 2.0])
    temperatures = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([2.0, 1.0, 0.7])
    options = {"vocab_size": 390, "teacher_vocab_size": 280}
    found = run(student, teacher, labels, weight, temperatures, **options)
    check(*found)
    assert (found[1][:, 390:] == 0).all() and found[0][1] == 0


def test_models_that_agree_and_rows_without_a_distribution():
    student = (3 * torch.randn(5, 300)).bfloat16()
    teacher = torch.cat([torch.full((5, 20), -torch.inf), student.flip(-1)], 1).bfloat16()
    student[1, 5], student[2], teacher[3, 40], teacher[4, 40] = torch.nan, -torch.inf, torch.inf, -torch.nan
    loss, grad, _, _ = run(student, teacher)
    assert loss[0] == 0 and not grad[0].any()
    assert loss[1:].isnan().all() and grad[1:].isnan().all()


def test_logits_that_differ_by_a_constant_have_no_gradient():
    teacher = (6 * torch.randn(2, 90)).round().clamp(-12, 12).bfloat16() / 2
    loss, grad, _, _ = run(teacher + 4, teacher)
    assert (loss < 1e-5).all() and not grad.any()


def test_the_public_loss_over_triton_and_in_place():
    student, teacher = (3 * torch.randn(4, 500)).half(), (3 * torch.randn(4, 600)).bfloat16()
    grads = []
    for backend, inplace in (("triton", False), ("triton", True), ("torch", False)):
        leaf = student.clone().requires_grad_()
        kd.uld_loss(leaf * 1, teacher, temperature=2.0, inplace=inplace, backend=backend).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2], rtol=2e-3, atol=1e-6)
    assert kd.uld_loss(student[:0], teacher[:0], backend="triton") == 0
    with pytest.raises(ValueError, match="a GPU counts logits of 16 bits, and sorts others, got float32"):
        kd.uld_loss(student.float(), teacher, backend="triton")
