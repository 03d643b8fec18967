"""Training in fp16 under ``torch.amp.GradScaler``: gradients as exact as eager PyTorch's, overflow seen and skipped."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdkernels as kd

N, D, V, TOKENS = 48, 16, 600, 2.0e4
LABELS = torch.arange(N) * 7 % V
LABELS[::5] = -100


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, inputs):
        return torch.tanh(self.body(inputs))


def make():
    """A student, its inputs, a teacher's hidden states and head that is not far away."""
    torch.manual_seed(0)
    student, inputs = Student(), torch.randn(N, D)
    with torch.no_grad():
        states = student(inputs) + 0.1 * torch.randn(N, D)
        return student, inputs, states, student.head.weight + 0.05 * torch.randn(V, D)


def of_logits(loss):
    """A loss of logits; eager PyTorch gets them in fp32, as trainers upcast them."""

    def call(student, hidden, states, head, backend):
        logits, teacher = F.linear(hidden, student.head.weight), (states @ head.t()).detach()
        with torch.autocast("cpu", enabled=False):
            if backend == "eager":
                logits, backend = logits if logits.dtype == torch.float64 else logits.float(), "torch"
            return loss(logits, teacher, normalizer=TOKENS, backend=backend)

    return call


def of_hidden(loss):
    def call(student, hidden, states, head, backend):
        if backend == "eager":
            return of_logits(lambda s, t, **o: loss(s, t, **o))(student, hidden, states, head, backend)
        return loss(hidden, student.head.weight, states, head, normalizer=TOKENS, backend=backend)

    return call


def sparse(teacher):
    ids = teacher.topk(8).indices
    return ids, teacher.log_softmax(-1).gather(-1, ids)


def linear(a, b, *teacher, **options):
    """``linear_kd_loss``, or of logits that were made already what it stands for."""
    if teacher:
        return kd.linear_kd_loss(a, b, *teacher, LABELS, ce_weight=0.5, chunk_bytes=40_000, **options)
    return kd.kd_loss(a, b, LABELS, ce_weight=0.5, **options)


def linear_topk(a, b, *teacher, **options):
    if teacher:
        ids, logprobs = sparse((teacher[0] @ teacher[1].t()).detach())
        return kd.linear_topk_kd_loss(a, b, ids, logprobs, chunk_bytes=40_000, **options)
    return kd.topk_kd_loss(a, *sparse(b), **options)


LOSSES = {
    "dense": of_logits(lambda s, t, **o: kd.kd_loss(s, t, LABELS, ce_weight=0.5, temperature=2.0, **o)),
    "jsd": of_logits(lambda s, t, **o: kd.kd_loss(s, t, divergence="jsd", **o)),
    "topk": of_logits(lambda s, t, **o: kd.topk_kd_loss(s, *sparse(t), LABELS, **o)),
    "dkd": of_logits(lambda s, t, **o: kd.dkd_loss(s, t, LABELS, **o)),
    "mse": of_logits(lambda s, t, **o: kd.logit_mse_loss(s, t, **o)),
    "taid": of_logits(lambda s, t, **o: kd.taid_loss(s, t, interpolation=0.7, **o)),
    "linear": of_hidden(linear),
    "linear-topk": of_hidden(linear_topk),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradients(model):
    return torch.cat([p.grad.reshape(-1).double() for p in model.parameters()])


def truth_and_eager(loss, student, batch):
    """Of the model as it is: the gradient in fp64 with fp64 logits, and that of eager PyTorch under autocast."""
    exact = copy.deepcopy(student).double()
    states = [x.double() for x in batch]
    loss(exact, exact(states[0]), *states[1:], "eager").backward()
    eager, scale = copy.deepcopy(student), 65536.0
    eager.zero_grad()
    with torch.autocast("cpu", torch.float16):
        value = loss(eager, eager(batch[0]), *batch[1:], "eager")
    (value * scale).backward()
    return gradients(exact), gradients(eager) / scale


@losses
def test_a_training_loop_has_gradients_as_exact_as_eager_s(loss, backend):
    student, *batch = make()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e3)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=2)
    values, scales = [], []
    for _ in range(5):
        truth, eager = truth_and_eager(loss, student, batch)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(student, student(batch[0]), *batch[1:], backend)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        error, bar = ((x - truth).norm() / truth.norm() for x in (gradients(student), eager))
        assert error <= 2 * bar + 1e-4, f"{error:.2g}, eager {bar:.2g}"
        scaler.step(optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
        values.append(value.item())
    assert scales == [65536.0, 65536.0, 131072.0, 131072.0, 262144.0]
    assert values[-1] < values[0]


@losses
def test_overflow_is_seen_skipped_and_backed_off_from(loss, backend):
    """A gradient beyond fp16 must be infinite: a finite one would be a wrong step."""
    student, *batch = make()
    before = [p.detach().clone() for p in student.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**52, backoff_factor=2.0**-12, growth_interval=1000)
    moved = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(student, student(batch[0]), *batch[1:], backend)
        assert torch.isfinite(value)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True)))
        if moved[-1]:
            break
    assert not moved[0] and moved[-1]
    truth, _ = truth_and_eager(loss, make()[0], batch)
    error = (gradients(student) - truth).norm() / truth.norm()
    assert error < 2e-2 and scaler.get_scale() < 2.0**41


@losses
def test_a_row_that_is_infinite_skips_the_step(loss, backend):
    student, inputs, *teacher = make()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = student.head.weight.detach().clone()
    inputs[3] = torch.nan
    with torch.autocast("cpu", torch.float16):
        value = loss(student, student(inputs), *teacher, backend)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    assert value.isnan() and torch.equal(student.head.weight, before) and scaler.get_scale() == 512.0


@losses
def test_a_graph_that_is_kept_and_accumulated_losses(loss, backend):
    student, *batch = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with torch.autocast("cpu", torch.float16):
        value = loss(student, student(batch[0]), *batch[1:], backend)
    scaler.scale(value).backward(retain_graph=True)
    once = gradients(student)
    scaler.scale(value * 2).backward()
    assert torch.isfinite(once).all() and once.any()
    error = (gradients(student) - 3 * once).norm() / once.norm()
    assert error < 1e-3
