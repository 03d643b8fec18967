"""The work a GPU is for: forward KL and JSD, loss and gradient and the loss alone, beside every peer, in minutes.

The shapes: the largest vocabulary, one whose second sweep L2 may serve, ImageNet's rows, rows that begin between
vectors, and fewer rows than multiprocessors. On a machine without a GPU the same candidates run as far as they can, to
see that the suite works.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Union
from unittest import mock

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.model import Absent, Candidate, Candidates, Case, NotHere, Outcome, Run, Suite
from benchmarks.suites import common

DIVERGENCES = ("forward_kl", "jsd")
BACKENDS = ("cpu", "triton", "cuda")
# Of Triton's dense kernel; "auto" runs what its trial finds faster.
PATTERNS = {"one pass": "cluster", "sweeps": "sweeps"}
LOSS_ONLY = ", loss only"
# Classes of liger_kernel.transformers, and whether they take probabilities rather than their logarithms.
LIGER: dict[str, tuple[str, dict[str, Any], bool]] = {
    "forward_kl": ("LigerKLDIVLoss", {"reduction": "batchmean", "log_target": True}, False),
    "jsd": ("LigerJSD", {"beta": 0.5}, False),
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


@contextlib.contextmanager
def planned(pattern: str) -> Iterator[None]:
    """Inside, Triton's dense kernel runs by the first plan of a pattern, untried.

    Raises:
        NotHere: from the call, where no plan for its rows is of that pattern.
    """
    from kdkernels.kernels import tuning

    def pick(plans: list[Any], *_: Any) -> Any:
        for plan in plans:
            if plan.pattern == pattern:
                return plan
        raise NotHere("rows of this width have no such plan here")

    with mock.patch.object(tuning, "fastest", pick):
        yield


def by_pattern(name: str, case: Case) -> Candidates:
    """Triton's kernel in one pass and in sweeps."""
    loss = common.kd_loss(name)

    def build(pattern: str, backend: str) -> Run:
        run = common.autograd(lambda inputs: loss(inputs, backend, "batchmean", False), lambda inputs: (inputs,))

        def in_this_pattern(inputs: Any) -> Outcome:
            with planned(pattern):
                return run(inputs)

        return in_this_pattern

    found: Candidates = []
    for words, pattern in PATTERNS.items():
        label = f"kdkernels {{}}, {words}"
        found += common.each_backend(name, case, label, partial(build, pattern), backends=("triton",))
    return found


def make_candidates(case: Case) -> Candidates:
    found: Candidates = [common.add_probe("forward_kl")]
    for name in DIVERGENCES:
        best = eager.BEST[name]
        found += [
            *common.ours(name, common.kd_loss(name), case, backends=BACKENDS),
            *by_pattern(name, case),
            *common.ours(name, common.kd_loss(name), case, inplace=True, backends=BACKENDS),
            common.eager("eager, fewest passes", name, best),
            common.compiled("torch.compile, fewest passes", name, best, case),
            liger(name, case),
        ]
    alone, forward_kl = "forward_kl" + LOSS_ONLY, common.kd_loss("forward_kl")

    def build(backend: str) -> Run:
        return loss_only(lambda inputs: forward_kl(inputs, backend, "batchmean", False))

    def build_eager() -> Run:
        return loss_only(lambda inputs: eager.BEST["forward_kl"](*common.logits_and_labels(inputs)))

    found += common.each_backend(alone, case, "kdkernels {}", build, backends=BACKENDS)
    found.append(Candidate("eager, fewest passes", alone, "eager", build_eager))
    return found


def expected(inputs: Any, group: str) -> Outcome:
    found = common.truth(inputs, common.kd_loss(group.removesuffix(LOSS_ONLY)))
    return Outcome(found.loss, ()) if group.endswith(LOSS_ONLY) else found


SUITE = Suite(
    name="gpu",
    title="Loss and gradient, and the loss alone",
    shapes=((8192, 128256), (32768, 32000), (65536, 1000), (8192, 50257), (16, 152064)),
    dtypes=("bf16",),
    quick_shapes=((64, 8192),),
    make_inputs=common.LogitInputs,
    make_candidates=make_candidates,
    expected=expected,
    floor_share={"forward_kl" + LOSS_ONLY: 2 / 3},
    bandwidth="copy",
    seconds=230.0,
)
