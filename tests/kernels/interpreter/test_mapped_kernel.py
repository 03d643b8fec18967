"""Operands that change how rows are read, in the Triton kernel."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import test_reading as on_cpu

import kdkernels as kd
from kdkernels import testing


@pytest.fixture
def backend():
    return "triton"


@pytest.mark.parametrize("divergence", kd.divergences.names())
def test_log_probs(backend, divergence):
    on_cpu.test_log_probs_against_the_oracle(backend, divergence, "fp32", divergence != "jsd", 37)


@pytest.mark.parametrize("dtype, given", [(dtype, given) for dtype, given in on_cpu.GIVEN if dtype == "fp32"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_operands_of_columns(backend, divergence, dtype, given):
    on_cpu.test_operands_of_columns_against_the_oracle(backend, divergence, dtype, given, 37)


@pytest.mark.parametrize("divergence", kd.divergences.names())
def test_classes_in_the_middle(backend, divergence):
    on_cpu.test_classes_in_the_middle_against_the_oracle(backend, divergence, "fp32", divergence != "jsd", "2x19x3x7")


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_rows_of_several_tiles(backend, divergence, dim, monkeypatch):
    from kdkernels.kernels import mapped

    monkeypatch.setattr(mapped, "TILE", 64)
    monkeypatch.setattr(mapped, "WIDEST", 64)
    student, teacher = testing.make_inputs("normal", 9, 150, torch.float32)
    labels = torch.randint(150, (9,))
    labels[3] = -100
    options = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 1e-3, "temperature": 2.0}
    given = {"student_bias": torch.randn(150), "teacher_columns": torch.randperm(150), "divergence": divergence}
    if dim == 0:
        student, teacher = student.t().contiguous(), teacher.t().contiguous()
    testing.check_kd_loss(student, teacher, labels, backend=backend, dim=dim, **given, **options)


@pytest.mark.parametrize(
    "name",
    [
        "test_log_probs_are_the_leaf_of_kl_div",
        "test_a_draft_vocabulary",
        "test_a_bias_alone_may_get_a_gradient",
        "test_statistics_beside_operands_of_columns",
    ],
)
def test_the_same_as_on_a_cpu(backend, name, monkeypatch):
    # fp64 is the CPU's alone.
    monkeypatch.setattr(on_cpu, "EXACT", torch.float32)
    getattr(on_cpu, name)(backend)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits(backend, dtype):
    """Within the rounding of the interpreter, which truncates to bf16."""
    student, teacher = (torch.randn(2, 9, 3, 5) * 2).to(on_cpu.DTYPES[dtype]).requires_grad_(), torch.randn(2, 9, 3, 5)
    loss = kd.kd_loss(student, teacher.to(student.dtype), dim=1, temperature=2.0, backend=backend)
    wide = student.detach().double().requires_grad_()
    wanted = kd.kd_loss(wide, teacher.to(student.dtype).double(), dim=1, temperature=2.0, backend="torch")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)
    grads = (torch.autograd.grad(value, leaf)[0].double() for value, leaf in ((loss, student), (wanted, wide)))
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-6)
