"""A loss scale reaches gradients in fp16 from Triton's kernels too, and what they cannot do is refused."""

import pytest
import torch

import kdkernels as kd

N, V, SCALE = 6, 700, 65536.0
LABELS = torch.tensor([0, 5, 9, 300, 699, 2])
ROWS = torch.linspace(1e-5, 2e-5, N)
LOSSES = {
    "kd_loss": lambda s, t, **o: kd.kd_loss(s, t, normalizer=1e5, **o),
    "kd_loss-row_weight": lambda s, t, **o: kd.kd_loss(s, t, row_weight=ROWS, temperature=2.0, reduction="none", **o),
    "topk_kd_loss": lambda s, t, **o: kd.topk_kd_loss(s, *kd.capture_topk(t.float(), 8)[:2], normalizer=1e5, **o),
    "dkd_loss": lambda s, t, **o: kd.dkd_loss(s, t, LABELS, normalizer=1e5, **o),
    "logit_mse_loss": lambda s, t, **o: kd.logit_mse_loss(s, t, normalizer=1e5, **o),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_scale_brings_back_small_gradients(name):
    student, teacher = torch.randn(N, V).half(), torch.randn(N, V).half()
    grads, losses = {}, {}
    for backend, dtype in (("triton", torch.float16), ("torch", torch.float64)):
        leaf = student.to(dtype, copy=True).requires_grad_()
        loss = LOSSES[name](leaf, teacher.to(dtype), backend=backend)
        losses[backend] = loss.detach().double()
        (grads[backend],) = torch.autograd.grad(loss, leaf, torch.full_like(loss, SCALE))
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=2e-5, atol=0)
    error = (grads["triton"].double() - grads["torch"]).norm() / grads["torch"].norm()
    rounded = (grads["torch"].half().double() - grads["torch"]).norm() / grads["torch"].norm()
    assert error < 1.5 * rounded + 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_the_graph_may_be_kept_and_second_derivatives_are_refused(name):
    student, teacher = torch.randn(N, V).half().requires_grad_(), torch.randn(N, V).half()
    loss = LOSSES[name](student, teacher, backend="triton").sum()
    first, second = (torch.autograd.grad(loss * SCALE, student, retain_graph=True)[0] for _ in range(2))
    assert torch.isfinite(first).all() and torch.equal(first, second)
    with pytest.raises(RuntimeError, match='backend="torch"'):
        torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="torch"'):
        torch.func.jvp(lambda s: LOSSES[name](s, teacher, backend="triton").sum(), (student.detach(),), (student,))
