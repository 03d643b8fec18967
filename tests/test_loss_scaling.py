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
    "uld_loss": lambda s, t, **o: kd.uld_loss(s, t, normalizer=1e5, **o),
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


def far(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(64, 3200, generator=generator) * 3).half() for _ in range(2)]


def sure():
    student, teacher = torch.full((64, 3200), -20.0).half(), torch.full((64, 3200), -20.0).half()
    student[:, :2], teacher[:, 0], teacher[:, 1] = 0.0, 30000.0, 0.0
    return student, teacher


# Gradients far above 1 that fit fp16 with the constants of the loss, and not without them.
LARGE = {
    "alpha_beta-1": (far, {"divergence": kd.AlphaBeta(1.0, -0.5)}),
    "alpha_beta-2": (far, {"divergence": kd.AlphaBeta(0.5, -0.5)}),
    "reverse_kl": (sure, {"divergence": "reverse_kl"}),
    "jeffreys": (sure, {"divergence": "jeffreys"}),
    "jeffreys-tensor": (sure, {"divergence": "jeffreys", "row_weight": torch.linspace(0.1, 1.0, 64)}),
    "temperatures": (far, {"temperature": torch.full((64,), 2000.0), "teacher_temperature": 1.0}),
    "standardize": (lambda: [x * 1e-4 for x in far()], {"standardize": True}),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_a_gradient_that_fits_fp16_fits_it_without_constants(name, inplace, compiled_cpu):
    rows, options = LARGE[name]
    student, teacher = rows()
    leaf = student.clone().requires_grad_()
    kd.kd_loss(leaf * 1, teacher, inplace=inplace, backend="cpu", **options).backward()
    exact = student.double().requires_grad_()
    kd.kd_loss(exact, teacher.double(), backend="torch", **options).backward()
    assert exact.grad.abs().max() < 65504
    assert torch.isfinite(leaf.grad).all()
    assert error(leaf.grad, exact.grad) < 1e-3


@pytest.mark.parametrize("rows", [slice(None), (slice(None), slice(1, None))])
def test_pieces_of_rows_give_what_all_rows_give(rows, compiled_cpu, monkeypatch):
    """Of a batch, of positions, and of a view of them; a loss scale brings small entries back."""
    student, teacher = (x.reshape(4, 16, 3200)[rows] for x in far())
    labels, weight = torch.zeros(student.shape[:-1], dtype=torch.int64), torch.rand(student.shape[:-1]) * 1e-5
    found = []
    for size in (2**25, 3 * 4 * 3200, 40 * 4 * 3200):
        monkeypatch.setattr("kdkernels.autograd.PIECE_BYTES", size)
        leaf = student.clone().requires_grad_()
        loss, stats = kd.kd_loss(
            leaf, teacher, labels, divergence="reverse_kl", row_weight=weight, return_stats=True, backend="cpu"
        )
        (loss * 65536).backward()
        found.append((loss.detach(), stats.divergence, leaf.grad))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
    exact = student.double().requires_grad_()
    options = {"divergence": "reverse_kl", "row_weight": weight.double(), "backend": "torch"}
    (kd.kd_loss(exact, teacher.double(), labels, **options) * 65536).backward()
    assert error(found[0][2], exact.grad) < 1e-3


def test_a_teacher_in_fp16_gets_its_large_gradient(compiled_cpu):
    teacher, student = sure()
    leaf, exact = teacher.clone().requires_grad_(), teacher.double().requires_grad_()
    kd.kd_loss(student, leaf, backend="cpu").backward()
    kd.kd_loss(student.double(), exact, backend="torch").backward()
    assert torch.isfinite(leaf.grad).all() and error(leaf.grad, exact.grad) < 1e-3
