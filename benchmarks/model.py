"""The parts of a benchmark: a case (the workload), candidates (ways to compute it) and a suite of both."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional, Protocol, Union

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUITES = (
    "dense",
    "divergences",
    "objective",
    "topk",
    "tokens",
    "linear",
    "linear_tokens",
    "linear_memory",
    "gpu",
    "training",
)


class NotHere(Exception):
    """Raised by a run that cannot be had on this case, with the reason: the candidate is absent, not wrong."""


@dataclass(frozen=True)
class Case:
    """One workload: a shape (rows, vocabulary, and what else a suite needs), a dtype and a device."""

    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"


class Outcome(NamedTuple):
    """The results of a candidate: the scalar loss and the gradients of the inputs that have one.

    ``jumps``, of a truth: its gradient is discontinuous. A row within rounding of a jump may be wrong by all of it, so
    that only the norm over all rows is bound.
    """

    loss: Tensor
    gradients: tuple[Tensor, ...]
    jumps: bool = False


class Inputs(Protocol):
    """The tensors of a case; ``reset`` undoes what a run did to them (gradients, logits overwritten in place)."""

    def reset(self) -> None: ...


# One that goes on where it stopped, as a training does, may have a method ``figures(inputs)``: its losses so far, and
# numbers for the table.
Run = Callable[[Any], Outcome]
# From the runs of a case and its inputs to the errors of each by ``Candidate.key``, and a line for each wrong one.
Check = Callable[[Sequence[tuple["Candidate", Run]], Any], tuple[dict[str, dict[str, float]], list[str]]]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a group's loss and gradients.

    Args:
        name: unique within its group.
        group: what is computed; candidates of one group share the expected outcome and the baselines.
        family: "eager", "compile", "peer" (another package), "kdkernels" (through autograd), "kernel" (the op alone),
            "reference" (kdkernels in plain PyTorch), "probe" (a yardstick) or "fixed" (what does not grow with logits).
        build: returns the function to time, compiling it where it must be compiled.
        expected: replaces the suite's expected outcome, for probes that compute something else.
    """

    name: str
    group: str
    family: str
    build: Callable[[], Run]
    expected: Optional[Callable[[Any], Outcome]] = None

    @property
    def key(self) -> str:
        return f"{self.group} / {self.name}"


@dataclass(frozen=True)
class Absent:
    """A candidate that cannot run here, and why: it is listed in the report."""

    name: str
    group: str
    reason: str


Candidates = list[Union[Candidate, Absent]]


def unit_bytes(case: Case) -> int:
    """One ``[N, V]`` gradient."""
    return case.shape[0] * case.shape[1] * case.torch_dtype.itemsize


def floor_bytes(case: Case) -> int:
    """Two reads and one write of ``[N, V]``."""
    return 3 * unit_bytes(case)


@dataclass(frozen=True)
class Suite:
    """A set of candidates over cases.

    Args:
        make_inputs: tensors of a case from a seed.
        make_candidates: what to compare; whatever cannot run is returned as ``Absent``.
        expected: the fp64 outcome of a group, or None for a suite with a check of its own.
        unit_bytes: what peak memory is counted in (one gradient).
        floor_bytes: the least a loss with its gradient has to move, for the share of the bandwidth limit, if any.
        baseline_group: the group that the others are compared with, if any.
        probe, yardstick: the probe in a word, and in full.
        axes: what the numbers of a shape are.
        rounds_logits: candidates make the logits themselves, and all round them to the dtype.
        floor_share: groups that have to move less than floor_bytes, and what share of it.
        bandwidth: the measured limit that the floor is held against, "triad" or "copy".
        check: takes the place of the comparison with ``expected``, for runs that go on where they stopped.
        rounds: how many are timed, and with --quick.
        seconds: for all cases together. Each then has a process and a part of the time; a candidate that fails or is
            wrong is listed and the others go on, and what the time does not allow is left out, and said.
    """

    name: str
    title: str
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[str]
    make_inputs: Callable[[Case, int], Inputs]
    make_candidates: Callable[[Case], Candidates]
    expected: Optional[Callable[[Any, str], Outcome]]
    quick_shapes: Sequence[tuple[int, ...]] = ((256, 8192),)
    unit_bytes: Callable[[Case], int] = unit_bytes
    floor_bytes: Optional[Callable[[Case], int]] = floor_bytes
    unit: str = "[N, V] gradient"
    probe: str = "add"
    yardstick: str = "torch.add(s, t, out=g) on the same tensors"
    baseline_group: Optional[str] = None
    axes: Sequence[str] = ("N", "V")
    rounds_logits: bool = False
    floor_share: Mapping[str, float] = field(default_factory=dict)
    bandwidth: str = "triad"
    check: Optional[Check] = None
    rounds: tuple[int, int] = (15, 5)
    seconds: Optional[float] = None


def load_suite(name: str) -> Suite:
    """Import a suite: one of ``SUITES``, or the dotted path of any module that has a ``SUITE``.

    Raises:
        ValueError: for a name that is neither.
    """
    path = f"benchmarks.suites.{name}" if name in SUITES else name
    suite = None
    try:
        suite = getattr(importlib.import_module(path), "SUITE", None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
    if not isinstance(suite, Suite):
        raise ValueError(f"a suite is one of {', '.join(SUITES)} or a module with a SUITE, got {name!r}")
    return suite
