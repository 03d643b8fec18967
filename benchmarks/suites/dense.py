"""Forward KL over whole rows: ``F.kl_div(log_softmax(s / T), softmax(t / T)) * T * T`` and all that replaces it."""

from __future__ import annotations

from typing import Any, Union

from torch import Tensor

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Absent, Candidate, Case, Outcome, Suite
from benchmarks.suites import common

GROUP = "forward_kl"


def forward_kl(inputs: Any, backend: Any, reduction: Any, inplace: bool) -> Tensor:
    return kd.kd_loss(
        inputs.student,
        inputs.teacher,
        temperature=common.TEMPERATURE,
        reduction=reduction,
        inplace=inplace,
        backend=backend,
    )


def make_candidates(case: Case) -> list[Union[Candidate, Absent]]:
    formulations = {"log_target": eager.kl_log_target}
    if case.dtype in ("bf16", "fp16"):
        # Careful code sums 16-bit logits in fp32; on some machines it is also the faster form.
        formulations["log_target, fp32 sums"] = eager.kl_log_target_fp32
    return [
        common.eager("eager, as written", GROUP, eager.kl_as_written),
        *(common.eager(f"eager, {name}", GROUP, loss) for name, loss in formulations.items()),
        *(common.compiled(f"torch.compile, {name}", GROUP, loss, case) for name, loss in formulations.items()),
        *common.ours(GROUP, forward_kl, case, backends=common.FUSED),
        *common.ours(GROUP, forward_kl, case, backends=common.FUSED, inplace=True),
        *common.fresh_pages(GROUP, forward_kl, case),
        *common.kernels(GROUP, case),
        *common.ours(GROUP, forward_kl, case, backends=("torch",)),
        common.add_through_autograd(GROUP),
        *common.nothing_through_autograd(GROUP, case),
        common.add_probe(GROUP),
    ]


def expected(inputs: Any, group: str) -> Outcome:
    return common.truth(inputs, forward_kl)


SUITE = Suite(
    name="dense",
    title="Forward KL, loss and gradient",
    shapes=((512, 32000), (256, 128256), (4096, 1000)),
    dtypes=("fp32", "bf16"),
    quick_shapes=((256, 8192),),
    make_inputs=common.LogitInputs,
    make_candidates=make_candidates,
    expected=expected,
    unit_bytes=common.unit_bytes,
    floor_bytes=common.floor_bytes,
)
