"""Decoupled distillation, logit MSE and the scaling of a gradient."""

import pytest
import torch
from launches import dkd, mse
from oracle import ROUNDING, TINY, check, dkd_rows, mse_rows

from kdkernels.kernels.scale import scale_grad


def run_dkd(student, teachers, dstudent, labels, **options):
    return dkd(student, teachers[0], dstudent, labels, **options)


def run_mse(student, teachers, dstudent, labels, **options):
    return mse(student, teachers[0], dstudent, labels, **options)


@pytest.mark.parametrize("V", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_dkd(V, dtype):
    student, teacher = (torch.randn(3, V) * 3).to(dtype), (torch.randn(3, V) * 3).to(dtype)
    options = {"alpha": 0.7, "beta": 2.0, "temperature": 2.0, "teacher_temperature": 1.5, "scale": 0.5}
    check(run_dkd, dkd_rows, student, [teacher], torch.tensor([0, -100, V - 1]), **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("inplace", [False, True])
def test_dkd_corners(inplace):
    V = 600
    some = torch.arange(V) % 3 == 0
    student, teacher = torch.randn(6, V) * 3, torch.randn(6, V) * 3
    student[1], teacher[1] = torch.randn(V) * 1e4, torch.randn(V) * 1e4
    student[2], teacher[2] = student[2].masked_fill(some, float("-inf")), teacher[2].masked_fill(some, float("-inf"))
    teacher[3] = student[3]
    student[4, 7] += 60  # the label takes all the student's mass
    student[5] = float("nan")
    labels = torch.tensor([3, 599, 1, 5, 7, -100])
    options = {"alpha": 1.0, "beta": 8.0, "row_weight": torch.rand(6), "scale_by_t_squared": False}
    loss, grad = check(run_dkd, dkd_rows, student, [teacher], labels, inplace=inplace, **options)
    assert loss[3] == 0 and not grad[3].any() and loss[5] == 0 and not grad[5].any()
    torch.testing.assert_close(dkd(student, teacher, None, labels, **options), loss, rtol=1e-6, atol=1e-6)


def test_dkd_label_out_of_range():
    student, teacher = torch.randn(2, 40), torch.randn(2, 40)
    loss = dkd(student, teacher, torch.empty_like(student), torch.tensor([40, 3]))
    assert loss[0].isnan() and loss[1].isfinite()


@pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("V", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_mse(V, dtype, centered):
    student, teacher = (torch.randn(3, V) * 3).to(dtype), (torch.randn(3, V) * 3).to(dtype)
    labels = torch.tensor([0, -100, V - 1])
    check(run_mse, mse_rows, student, [teacher], labels, centered=centered, scale=0.5)
    check(run_mse, mse_rows, student, [teacher], centered=centered, row_weight=torch.rand(3))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("inplace", [False, True])
def test_centered_mse_of_shifted_logits(inplace):
    """A constant shift of the logits does not matter, however large."""
    student = torch.randn(2, 600)
    teacher = student + torch.tensor([[1e4], [3.0]])
    teacher[1, 5] += 1
    loss, grad = check(run_mse, mse_rows, student, [teacher], inplace=inplace, centered=True)
    assert loss[0] < 1e-5
    torch.testing.assert_close(mse(student, teacher, centered=True), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("V", [250, 300])
def test_padding(V):
    student, teacher = torch.full((3, 700), float("nan")), torch.full((3, 304), float("nan"))
    student[:, :V], teacher[:, :V] = torch.randn(3, V), torch.randn(3, V)
    labels = torch.tensor([1, -100, V - 1])
    for run, function, options in (
        (run_dkd, dkd_rows, {"alpha": 1.0, "beta": 2.0}),
        (run_mse, mse_rows, {"centered": True}),
    ):
        _, grad = check(run, function, student, [teacher], labels, vocab_size=V, **options)
        assert not grad[:, V:].any()


def test_no_rows():
    empty = torch.empty(0, 7)
    assert dkd(empty, empty, empty, torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert mse(empty, empty, empty).shape == (0,)
    scale_grad(empty, torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("V", [1, 300, 9000])
def test_scale_grad(dtype, V):
    grad = torch.randn(2, 2, V).to(dtype)
    for grad_output in (torch.tensor(2.5), torch.tensor([0.0, -1.0, 0.5, 3.0]), torch.tensor(0.3).expand(4)):
        scaled = grad.clone()
        scale_grad(scaled, grad_output)
        factor = grad_output if grad_output.dim() == 0 else grad_output.reshape(2, 2, 1)
        expected = grad.float() * factor
        assert ((scaled.float() - expected).abs() <= expected.abs() * ROUNDING[dtype] + TINY[dtype]).all()
    rows = torch.full((4, 2 * V), 7.0).to(dtype)
    scale_grad(rows[:, :V], torch.tensor([1.0, 2.0, 1.0, 2.0]))
    assert torch.equal(
        rows.float(), torch.tensor([7.0, 14, 7, 14])[:, None].where(torch.arange(2 * V) < V, torch.tensor(7.0))
    )


def test_scale_by_one_writes_nothing():
    grad = torch.full((2, 40), float("nan"))
    read_only = grad.view(torch.int32).clone()
    scale_grad(grad, torch.tensor(1.0))
    assert torch.equal(grad.view(torch.int32), read_only)
