"""Three times on this machine: loss and gradient by eager PyTorch, by torch.compile and by kdkernels."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import backends, divergences, testing
from kdkernels.functional import kd_loss

# Relative errors of the whole gradient against fp64. Eager PyTorch in 16 bits rounds its log-probabilities first.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SETTLING = 2
TEMPERATURE = 2.0

Run = Callable[[Tensor, Tensor], Tensor]


class WrongResult(Exception):
    """A gradient is wrong, so that no time is worth reading."""


@dataclass(frozen=True)
class Result:
    """Seconds of a step, the median of interleaved rounds, and the median ratio of a round to eager PyTorch."""

    rows: int
    vocab_size: int
    dtype: str
    divergence: str
    device: str
    backend: str
    threads: int
    rounds: int
    seconds: dict[str, float]
    ratios: dict[str, float]
    absent: list[str]

    @property
    def title(self) -> str:
        where = self.device if self.device != "cpu" else f"cpu, {self.threads} threads"
        return (
            f"{self.divergence}, {self.rows:,} x {self.vocab_size:,} {self.dtype}, loss and gradient on {where} "
            f"(backend {self.backend}), medians of {self.rounds}"
        )

    def ratio(self, name: str) -> float:
        return self.ratios[name]

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    divergence: str = "forward_kl",
    device: Optional[str] = None,
    rounds: int = 21,
    compiled: bool = True,
) -> Result:
    """Time a shape; every candidate's gradient is held against fp64 before.

    Raises:
        WrongResult: a gradient is off by more than its dtype's tolerance.
        ValueError: no such divergence.
    """
    device = device or default_device()
    parsed = divergences.resolve(divergence)
    student, teacher = (x.to(device) for x in testing.make_inputs("normal", rows, vocab_size, dtype))
    student.requires_grad_()

    def eager(s: Tensor, t: Tensor) -> Tensor:
        return written_out(parsed, s, t)

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return kd_loss(s, t, divergence=parsed, temperature=TEMPERATURE)

    candidates: dict[str, Run] = {"eager PyTorch": eager}
    absent = []
    if compiled:
        fused = torch.compile(eager, dynamic=False)
        try:
            _step(fused, student, teacher)
            candidates["torch.compile"] = fused
        except Exception as error:
            absent.append(f"torch.compile does not run here: {type(error).__name__}")
    candidates["kdkernels"] = ours
    _check(candidates, parsed, student, teacher)

    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for number in range(SETTLING + rounds):
        for name in order.sample(sorted(candidates), len(candidates)):
            seconds = _timed(candidates[name], student, teacher)
            if number >= SETTLING:
                times[name].append(seconds)
    base = times["eager PyTorch"]
    return Result(
        rows=rows,
        vocab_size=vocab_size,
        dtype=NAMES.get(dtype, str(dtype)),
        divergence=divergence,
        device=device if device == "cpu" else torch.cuda.get_device_name(device),
        backend=backends.select("auto", student.device.type, divergence=parsed.canonical().name),
        threads=torch.get_num_threads(),
        rounds=rounds,
        seconds={name: statistics.median(values) for name, values in times.items()},
        ratios={
            name: statistics.median(b / own for b, own in zip(base, values, strict=True))
            for name, values in times.items()
        },
        absent=absent,
    )


def written_out(divergence: divergences.Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as a user writes it: the mean over rows, times T squared."""
    if isinstance(divergence, divergences.ForwardKL):
        log_q = torch.log_softmax(student / TEMPERATURE, -1)
        p = torch.softmax(teacher / TEMPERATURE, -1)
        return torch.nn.functional.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2
    log_p, log_q = (torch.log_softmax(x / TEMPERATURE, -1) for x in (teacher, student))
    rows = testing.textbook_divergence(divergence, log_p, log_q)
    return rows.mean() * TEMPERATURE**2


def _step(loss: Run, student: Tensor, teacher: Tensor) -> Tensor:
    student.grad = None
    loss(student, teacher).backward()
    assert student.grad is not None
    return student.grad


def _check(candidates: dict[str, Run], divergence: divergences.Divergence, student: Tensor, teacher: Tensor) -> None:
    exact = student.detach().double().requires_grad_()
    truth = _step(lambda s, t: written_out(divergence, s, t), exact, teacher.double())
    for name, loss in candidates.items():
        error = ((_step(loss, student, teacher).double() - truth).norm() / truth.norm()).item()
        if not error <= TOLERANCE[student.dtype]:
            raise WrongResult(f"the gradient of {name} is off by {error:.1%} of its norm: nothing was timed")


def _timed(loss: Run, student: Tensor, teacher: Tensor) -> float:
    _synchronize(student)
    begun = time.perf_counter()
    _step(loss, student, teacher)
    _synchronize(student)
    return time.perf_counter() - begun


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
