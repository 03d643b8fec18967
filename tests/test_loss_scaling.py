"""Gradients in fp16 under a loss scale: as exact as eager PyTorch's whose logits were upcast, and never lost to 0."""

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd

N, V, SCALE = 256, 4000, 65536.0
LABELS = torch.arange(N) % 7 * 100
ROWS = torch.linspace(1e-5, 2e-5, N)


def make(seed=0, distance=0.3):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(N, V, generator=generator)
    student = teacher + distance * torch.randn(N, V, generator=generator)
    return student.half(), teacher.half()


def sparse(teacher):
    return kd.capture_topk(teacher.float(), 32)


# The constants are far below 1: as of many tokens, or of a small weight.
LOSSES = {
    "kd_loss": lambda s, t, **o: kd.kd_loss(s, t, normalizer=1e5, **o),
    "kd_loss-labels": lambda s, t, **o: kd.kd_loss(s, t, LABELS, ce_weight=0.5, normalizer=1e5, **o),
    "kd_loss-weights": lambda s, t, **o: kd.kd_loss(s, t, kd_weight=1e-5, **o),
    "kd_loss-normalizer": lambda s, t, **o: kd.kd_loss(s, t, normalizer=torch.tensor(1e5), **o),
    "kd_loss-row_weight": lambda s, t, **o: kd.kd_loss(s, t, row_weight=ROWS, temperature=2.0, **o),
    "kd_loss-none": lambda s, t, **o: (kd.kd_loss(s, t, reduction="none", **o) * ROWS).sum(),
    "kd_loss-jsd": lambda s, t, **o: kd.kd_loss(s, t, divergence="jsd", normalizer=1e5, **o),
    "kd_loss-reverse": lambda s, t, **o: kd.kd_loss(s, t, divergence="reverse_kl", normalizer=1e5, **o),
    "kd_loss-stats": lambda s, t, **o: kd.kd_loss(s, t, normalizer=1e5, return_stats=True, **o)[0],
    "topk_kd_loss": lambda s, t, **o: kd.topk_kd_loss(s, *sparse(t)[:2], normalizer=1e5, **o),
    "dkd_loss": lambda s, t, **o: kd.dkd_loss(s, t, LABELS, normalizer=1e5, **o),
    "logit_mse_loss": lambda s, t, **o: kd.logit_mse_loss(s, t, **o),
    "taid_loss": lambda s, t, **o: kd.taid_loss(s, t, interpolation=0.5, normalizer=1e5, **o),
}
names = pytest.mark.parametrize("name", LOSSES)


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


def gradients(name, **options):
    """The scaled gradient of fp16 logits by kdkernels and by eager PyTorch with fp32 copies, and the truth."""
    student, teacher = make()
    leaf = student.clone().requires_grad_()
    (LOSSES[name](leaf, teacher, **options) * SCALE).backward()
    results = [leaf.grad]
    for dtype in (torch.float32, torch.float64):
        leaf = student.clone().to(torch.float64 if dtype == torch.float64 else torch.float16).requires_grad_()
        (LOSSES[name](leaf.to(dtype), teacher.to(dtype), backend="torch") * SCALE).backward()
        results.append(leaf.grad)
    return results


@names
def test_a_loss_scale_brings_back_small_gradients(name, backend):
    found, eager, truth = gradients(name, backend=backend)
    assert found.dtype == torch.float16
    assert error(found, truth) <= 1.5 * error(eager, truth) + 1e-5
    zeros = (found == 0).double().mean() - (eager == 0).double().mean()
    assert zeros < 1e-2, "entries were flushed to 0"


@names
def test_the_loss_is_that_of_fp32_logits(name, backend):
    student, teacher = make()
    loss = LOSSES[name](student.clone().requires_grad_(), teacher, backend=backend)
    expected = LOSSES[name](student.double(), teacher.double(), backend="torch")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)


@names
def test_a_loss_scale_beyond_fp16_where_the_graph_is_kept(name, backend):
    """65536 is infinite in fp16: the product is made in fp32."""
    student, teacher = make()
    leaf = student.clone().requires_grad_()
    loss = LOSSES[name](leaf, teacher, backend=backend) * SCALE
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(first).all() and torch.equal(first, kept)
    assert torch.equal(first, second)


def test_the_teacher_too(backend):
    student, teacher = make()
    grads = {}
    for dtype in (torch.float16, torch.float64):
        s, t = (x.to(dtype, copy=True).requires_grad_() for x in (student, teacher))
        used = backend if dtype == torch.float16 else "torch"
        (kd.kd_loss(s, t, divergence="jsd", normalizer=1e2, temperature=2.0, backend=used) * SCALE).backward()
        grads[dtype] = s.grad, t.grad
    for found, truth in zip(grads[torch.float16], grads[torch.float64], strict=True):
        assert found.dtype == torch.float16 and error(found, truth) < 6e-4


def test_in_place(backend):
    student, teacher = make()
    grads = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        (kd.kd_loss(leaf, teacher, normalizer=1e5, inplace=inplace, backend=backend) * SCALE).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("weight", [0.0, -2.0, 3e4])
def test_weights_of_any_size_and_sign(weight, backend):
    student, teacher = make()
    grads = {}
    for dtype in (torch.float16, torch.float64):
        leaf = student.to(dtype, copy=True).requires_grad_()
        used = backend if dtype == torch.float16 else "torch"
        options = {"row_weight": weight} if weight == -2.0 else {"row_weight": torch.full((N,), weight)}
        kd.kd_loss(leaf, teacher.to(dtype), reduction="sum", backend=used, **options).backward()
        grads[dtype] = leaf.grad
    torch.testing.assert_close(grads[torch.float16].double(), grads[torch.float64], rtol=2e-3, atol=2e-3 * abs(weight))


def test_rows_far_apart_do_not_overflow_the_buffer(backend):
    """Reverse KL grows with the difference of log-probabilities; the buffer keeps room for it."""
    student, teacher = torch.zeros(2, 4), torch.tensor([[0.0, 0.0, -1e4, 0.0], [0.0, -3e3, 0.0, 0.0]])
    grads = {}
    for dtype in (torch.float16, torch.float64):
        leaf = student.to(dtype, copy=True).requires_grad_()
        used = backend if dtype == torch.float16 else "torch"
        kd.kd_loss(leaf, teacher.to(dtype), divergence="reverse_kl", backend=used).backward()
        grads[dtype] = leaf.grad
    torch.testing.assert_close(grads[torch.float16].double(), grads[torch.float64], rtol=2e-3, atol=0)


def test_autocast_to_fp16(backend):
    """fp32 parameters, fp16 logits of their product."""
    torch.manual_seed(0)
    hidden, head = torch.randn(N, 16), torch.randn(V, 16) / 4
    teacher = hidden @ head.t() + 0.1 * torch.randn(N, V)

    def gradient(loss, dtype):
        weight = head.clone().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float32):
            logits = F.linear(hidden.to(dtype), weight)
        (loss(logits) * SCALE).backward()
        return weight.grad

    truth = gradient(lambda x: kd.kd_loss(x, teacher.double(), normalizer=1e5, backend="torch"), torch.float64)
    eager = gradient(lambda x: kd.kd_loss(x.float(), teacher, normalizer=1e5, backend="torch"), torch.float32)
    found = gradient(lambda x: kd.kd_loss(x, teacher, normalizer=1e5, backend=backend), torch.float32)
    assert error(found, truth) <= 1.5 * error(eager, truth)
