"""Bugs that users of other packages reported, each held off here. Named after the report."""

import pytest
import torch

import kdkernels as kd
from kdkernels import backends

BACKENDS = [answer.name for answer in backends.available("cpu") if answer.ok]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def loss_and_grad(student, teacher, *args, **options):
    student = student.clone().requires_grad_()
    loss = kd.kd_loss(student, teacher, *args, **options)
    loss.sum().backward()
    return loss.detach(), student.grad


def test_liger_1453_jsd_is_finite_where_both_sides_underflow(backend):
    student = torch.tensor([[0.0, -200.0, -250.0, 1.0]])
    teacher = torch.tensor([[0.5, -210.0, -300.0, 0.0]])
    loss, grad = loss_and_grad(student, teacher, divergence=kd.JSD(0.5), backend=backend)
    truth, truth_grad = loss_and_grad(student.double(), teacher.double(), divergence=kd.JSD(0.5), backend="torch")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), truth_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_1373_tvd_has_no_gradient_where_the_models_agree(backend, dtype):
    torch.manual_seed(0)
    logits = torch.randn(4, 1000).to(dtype)
    loss, grad = loss_and_grad(logits, logits.clone(), divergence="tvd", backend=backend)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd"])
def test_liger_968_unreduced_rows_get_their_own_grad_output(backend, divergence):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 50), torch.randn(3, 50)
    weights = torch.tensor([0.0, 2.0, -3.0])
    leaf = student.clone().requires_grad_()
    kd.kd_loss(leaf, teacher, divergence=divergence, reduction="none", backend=backend).backward(weights)
    for row, weight in enumerate(weights):
        _, grad = loss_and_grad(
            student[row : row + 1], teacher[row : row + 1], divergence=divergence, reduction="sum", backend=backend
        )
        torch.testing.assert_close(leaf.grad[row], weight * grad[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_swift_10156_a_bf16_teacher_gives_no_negative_divergence(backend, divergence):
    torch.manual_seed(0)
    student = torch.randn(64, 4096) * 5
    loss, _ = loss_and_grad(student, student.bfloat16(), divergence=divergence, reduction="none", backend=backend)
    assert loss.min() >= -2e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", "jeffreys"])
def test_modelopt_2489_vocabularies_padded_to_different_widths(backend, divergence):
    torch.manual_seed(0)
    real, narrow, wide = 151_643, 151_936, 152_064
    logits = torch.randn(1, real) * 3
    student, teacher = torch.full((1, narrow), 7.0), torch.full((1, wide), float("nan"))
    student[:, :real] = teacher[:, :real] = logits
    loss, grad = loss_and_grad(student, teacher, divergence=divergence, vocab_size=real, backend=backend)
    exact = backend != "torch"
    assert loss == 0 if exact else abs(loss) <= 1e-6
    assert grad.abs().max() <= (0 if exact else 1e-6) and not grad[:, real:].any()
    with pytest.raises(ValueError, match="vocab_size"):
        kd.kd_loss(student, teacher, backend=backend)


def test_trl_6629_the_softcap_is_respected(backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 40) * 20, torch.randn(3, 40) * 20
    loss, grad = loss_and_grad(student, teacher, student_softcap=30.0, teacher_softcap=30.0, backend=backend)
    leaf = student.double().requires_grad_()
    capped = [30 * torch.tanh(x / 30) for x in (leaf, teacher.double())]
    truth = torch.nn.functional.kl_div(
        capped[0].log_softmax(-1), capped[1].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    truth.backward()
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)


def test_trl_4719_the_normalizer_under_gradient_accumulation(backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 30), torch.randn(8, 30)
    labels = torch.tensor([1, -100, 2, 3, -100, -100, 4, 5])
    whole, whole_grad = loss_and_grad(student, teacher, labels, ce_weight=0.5, backend=backend)
    tokens = (labels != -100).sum()
    leaf = student.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 3), slice(3, 8)):
        loss = kd.kd_loss(leaf[part], teacher[part], labels[part], ce_weight=0.5, normalizer=tokens, backend=backend)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(leaf.grad, whole_grad)


def test_axolotl_t_squared_is_in_the_gradient_as_in_the_loss(backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    plain = loss_and_grad(student, teacher, temperature=2.0, scale_by_t_squared=False, backend=backend)
    scaled = loss_and_grad(student, teacher, temperature=2.0, backend=backend)
    for before, after in zip(plain, scaled, strict=True):
        torch.testing.assert_close(after, 4 * before)


def test_lmops_38_a_batch_of_ignored_rows_is_zero(backend):
    student, teacher = torch.full((2, 5), float("nan")), torch.randn(2, 5)
    loss, grad = loss_and_grad(student, teacher, torch.tensor([-100, -100]), ce_weight=1.0, backend=backend)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "jeffreys", "skew_reverse_kl"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_soup_719_low_temperatures_have_finite_gradients(backend, divergence, temperature):
    """Reverse KL through ``F.kl_div`` with a differentiable target: a finite loss, and NaN in the gradient."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 200) * 10, torch.randn(4, 200) * 10
    loss, grad = loss_and_grad(student, teacher, divergence=divergence, temperature=temperature, backend=backend)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    # Where the two have nothing in common a bounded divergence has no slope that fp32 can hold.
    assert grad.any() or divergence in ("jsd", "skew_reverse_kl", "tvd")


def test_liger_12_nearly_equal_models_in_bf16_are_nearly_equal(backend):
    """Sums in bf16 gave 1.0e-3 where fp32 gave 7.8e-7: the inputs are rounded, the arithmetic must not be."""
    torch.manual_seed(0)
    teacher = (torch.randn(16, 5000) * 3).bfloat16()
    student = torch.where(torch.rand(16, 5000) < 0.01, teacher * 1.01, teacher)
    loss, _ = loss_and_grad(student, teacher, divergence="jsd", backend=backend)
    truth, _ = loss_and_grad(student.double(), teacher.double(), divergence="jsd", backend="torch")
    assert abs(loss.double() - truth) < 1e-6 and 1e-7 < truth < 1e-3


def test_pytorch_57459_forward_kl_is_of_the_teacher_to_the_student(backend):
    """``F.kl_div(input, target)`` is ``KL(target || input)``: the teacher is the target of forward KL."""
    teacher, student = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    there = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    back = 0.5 * torch.tensor(0.5 / 0.9).log() + 0.5 * torch.tensor(0.5 / 0.1).log()
    torch.testing.assert_close(kd.kd_loss(student, teacher, backend=backend), there)
    torch.testing.assert_close(kd.kd_loss(student, teacher, divergence="reverse_kl", backend=backend), back)


def test_trl_5731_labels_alone_mix_no_cross_entropy_in(backend):
    """Defaults that mixed half a cross entropy in, at another temperature, trained another objective for months."""
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 30), torch.randn(4, 30), torch.tensor([1, 2, 3, 4])
    with_labels = loss_and_grad(student, teacher, labels, backend=backend)
    without = loss_and_grad(student, teacher, backend=backend)
    # The divisor is a tensor with labels and a number without: equal to rounding.
    for one, other in zip(with_labels, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_axolotl_2692_losses_are_not_negative(backend):
    torch.manual_seed(0)
    teacher = torch.randn(64, 3000) * 4
    student = teacher + torch.randn(64, 3000) * 1e-3
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "jeffreys"):
        loss, _ = loss_and_grad(student, teacher, divergence=divergence, reduction="none", backend=backend)
        assert loss.min() >= -1e-6, divergence
