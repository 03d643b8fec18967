"""Forward KL over whole rows: ``F.kl_div(log_softmax(s / T), softmax(t / T)) * T * T`` and all that replaces it."""

from __future__ import annotations

from benchmarks import eager
from benchmarks.model import Candidates, Case, Suite
from benchmarks.suites import common

GROUP = "forward_kl"
forward_kl = common.kd_loss(GROUP)


def make_candidates(case: Case) -> Candidates:
    formulations = {"log_target": eager.forward_kl_best}
    if case.dtype in ("bf16", "fp16"):
        # Careful code sums 16-bit logits in fp32; on some machines it is also the faster form.
        formulations["log_target, fp32 sums"] = eager.kl_log_target_fp32
    return [
        common.eager("eager, as written", GROUP, eager.forward_kl_as_written),
        *(common.eager(f"eager, {name}", GROUP, loss) for name, loss in formulations.items()),
        *(common.compiled(f"torch.compile, {name}", GROUP, loss, case) for name, loss in formulations.items()),
        *common.ours(GROUP, forward_kl, case),
        *common.ours(GROUP, forward_kl, case, inplace=True),
        *common.fresh_pages(GROUP, forward_kl, case),
        *common.kernels(GROUP, case),
        *common.reference(GROUP, forward_kl, case),
        common.add_through_autograd(GROUP),
        *common.nothing_through_autograd(GROUP, case),
        common.add_probe(GROUP),
    ]


SUITE = Suite(
    name="dense",
    title="Forward KL, loss and gradient",
    shapes=((512, 32000), (256, 128256), (4096, 1000)),
    dtypes=("fp32", "bf16"),
    make_inputs=common.LogitInputs,
    make_candidates=make_candidates,
    expected=lambda inputs, group: common.truth(inputs, forward_kl),
)
