"""The suites' candidates through pytest-benchmark: ``pytest benchmarks --benchmark-only``.

pytest-benchmark times candidates one after the other, which a noisy machine shows in the ratios: for figures to quote
use ``python -m benchmarks``, for comparing two commits ``--benchmark-autosave`` and ``--benchmark-compare`` here.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import measure, runner
from benchmarks.__main__ import SEED
from benchmarks.model import Candidate, Case, Suite


def test_speed(benchmark: Any, suite: Suite, case: Case, candidate: Candidate) -> None:
    torch.compiler.reset()
    inputs = suite.make_inputs(case, SEED)
    run = candidate.build()
    errors = runner.check(suite, case, [(candidate, run)], inputs)
    benchmark.group = f"{suite.name} {case} {candidate.group}"
    benchmark.extra_info.update(errors=errors[candidate.key], family=candidate.family)

    def once() -> None:
        run(inputs)
        measure.synchronize(case.device)

    benchmark.pedantic(once, setup=inputs.reset, rounds=10, warmup_rounds=2)
