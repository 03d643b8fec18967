"""The work a GPU is for: three divergences over wide rows, loss and gradient and the loss alone, beside every peer.

On a machine without a GPU the same candidates run as far as they can, to see that the suite works.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Union

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.model import Absent, Candidate, Candidates, Case, Outcome, Run, Suite
from benchmarks.suites import common

DIVERGENCES = ("forward_kl", "jsd", "tvd")
LOSS_ONLY = ", loss only"
# Classes of liger_kernel.transformers, and whether they take probabilities rather than their logarithms.
LIGER: dict[str, tuple[str, dict[str, Any], bool]] = {
    "forward_kl": ("LigerKLDIVLoss", {"reduction": "batchmean", "log_target": True}, False),
    "jsd": ("LigerJSD", {"beta": 0.5}, False),
    "tvd": ("LigerTVDLoss", {"reduction": "batchmean"}, True),
}


def loss_only(loss: Callable[[Any], Tensor]) -> Run:
    """The loss alone."""

    def run(inputs: Any) -> Outcome:
        with torch.no_grad():
            return Outcome(loss(inputs), ())

    return run


def liger(name: str, case: Case) -> Union[Candidate, Absent]:
    """Liger's Triton kernel with the softmaxes that it leaves to its caller."""
    label = f"Liger {LIGER[name][0]}"
    if importlib.util.find_spec("liger_kernel") is None:
        return Absent(label, name, "liger-kernel is not installed")
    if case.device != "cuda":
        return Absent(label, name, "its kernels need a GPU")

    def build() -> Run:
        from liger_kernel import transformers

        kind, options, probabilities = LIGER[name]
        module = getattr(transformers, kind)(**options)
        normalise = torch.softmax if probabilities else torch.log_softmax

        def loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
            s, t = (normalise(x / temperature, -1) for x in (student, teacher))
            return module(s, t) * temperature * temperature

        return common.autograd(loss)

    return Candidate(label, name, "peer", build)


def make_candidates(case: Case) -> Candidates:
    found: Candidates = [common.add_probe("forward_kl")]
    for name in DIVERGENCES:
        best = eager.BEST[name]
        found += [
            common.eager("eager, fewest passes", name, best),
            common.compiled("torch.compile, fewest passes", name, best, case),
            liger(name, case),
            *common.ours(name, common.kd_loss(name), case),
            *common.ours(name, common.kd_loss(name), case, inplace=True),
        ]
    alone, forward_kl = "forward_kl" + LOSS_ONLY, common.kd_loss("forward_kl")

    def build(backend: str) -> Run:
        return loss_only(lambda inputs: forward_kl(inputs, backend, "batchmean", False))

    def build_eager() -> Run:
        return loss_only(lambda inputs: eager.BEST["forward_kl"](*common.logits_and_labels(inputs)))

    found += common.each_backend(alone, case, "kdkernels {}", build)
    found.append(Candidate("eager, fewest passes", alone, "eager", build_eager))
    return found


def expected(inputs: Any, group: str) -> Outcome:
    found = common.truth(inputs, common.kd_loss(group.removesuffix(LOSS_ONLY)))
    return Outcome(found.loss, ()) if group.endswith(LOSS_ONLY) else found


SUITE = Suite(
    name="gpu",
    title="Wide rows: loss and gradient, and the loss alone",
    shapes=((4096, 32000), (4096, 131072), (4096, 151936)),
    dtypes=("bf16", "fp32"),
    quick_shapes=((64, 8192),),
    make_inputs=common.LogitInputs,
    make_candidates=make_candidates,
    expected=expected,
    floor_share={"forward_kl" + LOSS_ONLY: 2 / 3},
    bandwidth="copy",
)
