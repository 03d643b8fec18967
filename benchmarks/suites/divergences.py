"""Every divergence in kdkernels' table, beside forward KL, its best eager formulation, and torch.compile of that."""

from __future__ import annotations

from typing import Any

from benchmarks import eager
from benchmarks.model import Absent, Candidates, Case, Outcome, Suite
from benchmarks.suites import common
from kdkernels import divergences


def make_candidates(case: Case) -> Candidates:
    found: Candidates = [common.add_probe("forward_kl")]
    for name in divergences.names():
        if name in eager.BEST:
            found += [
                common.eager("eager, as written", name, eager.AS_WRITTEN[name]),
                common.eager("eager, fewest passes", name, eager.BEST[name]),
                common.compiled("torch.compile, fewest passes", name, eager.BEST[name], case),
            ]
        else:
            found.append(Absent("eager", name, "benchmarks/eager.py has no formulation of it"))
        found += common.ours(name, common.kd_loss(name), case)
    return found


def expected(inputs: Any, group: str) -> Outcome:
    # Where p == q TVD's gradient jumps, and differences of bf16 logits are equal for thousands of columns at once.
    return common.truth(inputs, common.kd_loss(group))._replace(jumps=group == "tvd")


SUITE = Suite(
    name="divergences",
    title="Every divergence, loss and gradient",
    shapes=((512, 32000),),
    dtypes=("bf16",),
    make_inputs=common.LogitInputs,
    make_candidates=make_candidates,
    expected=expected,
    baseline_group="forward_kl",
)
