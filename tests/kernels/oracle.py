"""The oracle of the kernel tests: fp64 truth, and the error eager PyTorch makes in the same dtype.

A result passes when its error in a row is at most twice eager's plus a margin: ``MARGIN`` of the row's largest value,
the rounding to the dtype of the gradient, and four ulp of the terms that make up a value and may cancel: T^2 for a
loss, or T^2 log(V) / 2 where that is more; T and the loss divided by T for a gradient.
"""

import math
import os

import torch

from kdkernels import reference

MARGIN = 2e-6
# Half an ulp; Triton's interpreter truncates to bf16 where a GPU rounds.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}
# Below it fp16 is subnormal and bf16 and fp32 are flushed.
TINY = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2**-24}


def assert_close(actual, eager, truth, dtype, what, terms=1.0):
    """Compare [N] or [N, V]; where the truth is infinite the sign must agree, where it is NaN nothing is asked.

    terms: size of the terms that make up a value, a number or [N, 1].
    """
    actual, eager = actual.detach().double(), eager.detach().double()
    truth = truth.detach()
    infinite = truth.isinf()
    assert torch.equal(actual[infinite], truth[infinite]), f"{what}: {actual[infinite]} is not {truth[infinite]}"
    known = truth.isfinite()
    zero = torch.zeros_like(truth)
    error = torch.where(known, (actual - truth).abs(), zero)
    eager_error = torch.where(known & eager.isfinite(), (eager - truth).abs(), zero)
    size = torch.where(known, truth.abs(), zero)
    rounding = size * ROUNDING[dtype] + TINY[dtype]
    if truth.dim() == 2 and truth.shape[1]:
        eager_error, size = eager_error.amax(1, keepdim=True), size.amax(1, keepdim=True)
    allowed = 2 * eager_error + MARGIN * size + rounding + 2**-22 * terms
    worst = (error - allowed).nan_to_num(float("inf")).max().item() if error.numel() else 0.0
    assert worst <= 0, f"{what}: error {error.max().item():.3e}, {worst:.3e} above what is allowed"


def rows(function, student, teachers, labels=None, row_weight=None, scale=1.0, dtype=torch.float64, **options):
    """The reference's weighted loss, its gradient of the student's shape, and all it returned, computed in dtype."""
    s = student.detach().reshape(-1, student.shape[-1])
    ts = [t.detach().reshape(-1, t.shape[-1]) for t in teachers]
    if dtype == torch.float64:
        s, ts = s.double(), [t.double() for t in ts]
    s = s.clone().requires_grad_()
    result = function(s, ts, labels, **options)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    weight = scale if row_weight is None else row_weight.to(loss.dtype) * scale
    loss = loss * weight
    if loss.requires_grad:
        loss.sum().backward()
    grad = torch.zeros_like(s) if s.grad is None else s.grad
    return loss.detach(), grad.reshape(student.shape), result


def dense_rows(s, ts, labels, *, param0=0.0, param1=0.0, **options):
    return reference.dense_rows(s, ts, labels, params=(param0, param1), **options)


def dkd_rows(s, ts, labels, **options):
    return reference.dkd_rows(s, ts[0], labels, **options)


def mse_rows(s, ts, labels, **options):
    return reference.mse_rows(s, ts[0], labels, **options)


def topk_rows(s, ts, labels, *, param0=0.0, param1=0.0, **options):
    """The teacher is (ids, log-probabilities)."""
    options = {"tail": "bucket", "divergence": "forward_kl", **options}
    return reference.topk_rows(s, ts[0].long(), ts[1], labels, params=(param0, param1), **options)


def check(launch, function, student, teachers, labels=None, *, inplace=False, **options):
    """Run a launcher with a poisoned gradient and hold loss and gradient against the reference.

    launch(student, teachers, dstudent, labels, **options) -> loss, or (loss, stats); options with ``_rows`` in the name
    are per-row tensors. Returns what launch returned, and the gradient.
    """
    truth_loss, truth_grad, truth = rows(function, student, teachers, labels, **reference_options(options))
    eager = rows(function, student, teachers, labels, dtype=student.dtype, **reference_options(options))
    student = student.clone() if inplace else student
    dstudent = student if inplace else torch.full_like(student, float("nan"))
    result = launch(student, teachers, dstudent, labels, **options)
    loss, stats = result if isinstance(result, tuple) else (result, None)
    flat = [x.reshape(-1, dstudent.shape[-1]) for x in (dstudent, eager[1], truth_grad)]
    T = torch.as_tensor(options.get("temperature_rows", options.get("temperature", 1.0)))
    reach = T if options.get("scale_by_t_squared", True) else 1 / T
    terms = (reach + truth_loss.abs().nan_to_num(posinf=0.0) / T).unsqueeze(-1)
    # Of log p and log q each is rounded once where it is as large as log V.
    terms_loss = (reach * T).expand_as(truth_loss) * max(1.0, math.log(student.shape[-1]) / 2)
    assert loss.dtype == torch.float32
    assert_close(loss, eager[0], truth_loss, torch.float32, "loss", terms_loss)
    assert_close(*flat, student.dtype, "gradient", terms)
    if stats is not None and stats.shape[1]:
        for k, name in enumerate(truth._fields[1:]):
            assert_close(stats[:, k], eager[2][k + 1], truth[k + 1], torch.float32, name)
    return result, dstudent


def reference_options(options):
    """The launcher's options in the reference's words."""
    names = {
        "temperature_rows": "temperature",
        "teacher_temperature_rows": "teacher_temperature",
        "param_rows": "param0",
    }
    renamed = {name: value for name, value in options.items() if name not in (*names, "stats")}
    renamed.update({names[name]: value for name, value in options.items() if name in names})
    return renamed
