"""Every divergence in kdkernels' table, beside forward KL, its best eager formulation, and torch.compile of that."""

from __future__ import annotations

from typing import Any, Union

from torch import Tensor

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Absent, Candidate, Case, Outcome, Suite
from benchmarks.suites import common
from kdkernels import divergences


def loss_of(name: Any) -> common.Ours:
    def loss(inputs: Any, backend: Any, reduction: Any, inplace: bool) -> Tensor:
        return kd.kd_loss(
            inputs.student,
            inputs.teacher,
            divergence=name,
            temperature=common.TEMPERATURE,
            reduction=reduction,
            inplace=inplace,
            backend=backend,
        )

    return loss


def make_candidates(case: Case) -> list[Union[Candidate, Absent]]:
    found: list[Union[Candidate, Absent]] = [common.add_probe("forward_kl")]
    for name in divergences.names():
        if name in eager.BEST:
            found += [
                common.eager("eager, as written", name, eager.AS_WRITTEN[name]),
                common.eager("eager, fewest passes", name, eager.BEST[name]),
                common.compiled("torch.compile, fewest passes", name, eager.BEST[name], case),
            ]
        else:
            found.append(Absent("eager", name, "benchmarks/eager.py has no formulation of it"))
        found += common.ours(name, loss_of(name), case, backends=common.FUSED)
    return found


def expected(inputs: Any, group: str) -> Outcome:
    # Where p == q TVD's gradient jumps, and differences of bf16 logits are equal for thousands of columns at once.
    return common.truth(inputs, loss_of(group))._replace(jumps=group == "tvd")


SUITE = Suite(
    name="divergences",
    title="Every divergence, loss and gradient",
    shapes=((512, 32000),),
    dtypes=("bf16",),
    quick_shapes=((256, 8192),),
    make_inputs=common.LogitInputs,
    make_candidates=make_candidates,
    expected=expected,
    unit_bytes=common.unit_bytes,
    floor_bytes=common.floor_bytes,
    baseline_group="forward_kl",
)
