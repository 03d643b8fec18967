"""``sinkhorn_bias`` beside the loop that it stands for, in fp64."""

import pytest
import torch

import kdkernels as kd
from kdkernels import sinkhorn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
N, V = 23, 37


def logits(dtype="fp32", scale=1.0):
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * scale).to(DTYPES[dtype])


def published(teacher, temperature, iterations):
    """The assignments ``[N, V]``: columns, then rows, divided by their sums, as the published loops do."""
    q = torch.exp(teacher.double() / temperature)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def assigned(teacher, temperature, bias):
    return torch.softmax((teacher.double() + bias.double()) / temperature, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_the_softmax_with_the_bias_is_what_the_loop_gives(iterations, dtype, monkeypatch):
    monkeypatch.setattr(sinkhorn, "CPU_BLOCK_BYTES", 5 * V * 4)
    teacher = logits(dtype)
    bias = kd.sinkhorn_bias(teacher, 0.07, iterations=iterations)
    assert bias.dtype == (torch.float64 if dtype == "fp64" else torch.float32) and bias.mean().abs() < 1e-6
    expected = published(teacher, 0.07, iterations)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == "fp64" else 2e-5}
    torch.testing.assert_close(assigned(teacher, 0.07, bias), expected, **tolerance)


def test_prototypes_share_the_batch():
    found = assigned(logits(), 0.5, kd.sinkhorn_bias(logits(), 0.5, iterations=50))
    torch.testing.assert_close(found.sum(0), torch.full((V,), N / V, dtype=torch.float64), rtol=1e-4, atol=0)


def test_samples_that_do_not_count_are_as_if_absent():
    teacher, mask = logits(), torch.arange(N) % 3 != 0
    spoilt = torch.where(mask[:, None], teacher, torch.nan).view(1, N, V)
    found = kd.sinkhorn_bias(spoilt, 0.07, mask=mask.view(1, N))
    torch.testing.assert_close(found, kd.sinkhorn_bias(teacher[mask], 0.07), rtol=1e-5, atol=1e-6)
    assert torch.equal(kd.sinkhorn_bias(teacher, 0.07, mask=torch.zeros(N, dtype=torch.bool)), torch.zeros(V))
    assert torch.equal(kd.sinkhorn_bias(teacher[:0], 0.07), torch.zeros(V))
    assert torch.equal(kd.sinkhorn_bias(teacher, 0.07, iterations=0), torch.zeros(V))


def test_large_logits_and_a_small_temperature():
    """exp(t / T) itself would overflow."""
    teacher = logits(scale=100.0)
    found = assigned(teacher, 0.04, kd.sinkhorn_bias(teacher, 0.04))
    assert found.isfinite().all()
    x = teacher.double() / 0.04
    rows = torch.zeros(N, 1, dtype=torch.float64)
    columns = torch.zeros(V, dtype=torch.float64)
    for _ in range(3):
        columns = columns - (x + columns - rows).logsumexp(0)
        rows = (x + columns).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(found, (x + columns - rows).exp(), rtol=0, atol=1e-3)


def test_a_prototype_that_no_sample_has_stays_out():
    teacher = logits()
    teacher[:, 4] = -torch.inf
    found = assigned(teacher, 0.07, kd.sinkhorn_bias(teacher, 0.07))
    others = torch.arange(V) != 4
    alone = teacher[:, others]
    torch.testing.assert_close(found[:, others], published(alone, 0.07, 3), rtol=0, atol=2e-5)


def test_in_the_loss_of_a_self_supervised_student():
    teacher, student = logits(), logits().flip(0).requires_grad_()
    bias = kd.sinkhorn_bias(teacher, 0.07)
    options = {"divergence": "soft_ce", "scale_by_t_squared": False}
    loss = kd.kd_loss(student, teacher + bias, temperature=0.1, teacher_temperature=0.07, **options)
    expected = -(published(teacher, 0.07, 3) * torch.log_softmax(student.double() / 0.1, -1)).sum(-1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"teacher": [1.0]}, TypeError, "teacher must be a torch.Tensor, got list"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"temperature": torch.ones(1)}, TypeError, "temperature must be a number, got Tensor"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
        ({"mask": torch.ones(N)}, TypeError, "mask must be bool, True for rows that count, got float32"),
        ({"mask": torch.ones(2).bool()}, ValueError, r"mask must have shape \(23,\), got \(2,\)"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        kd.sinkhorn_bias(**{"teacher": logits(), "temperature": 0.07, **change})
