"""The cost of each further term, form of target and statistic beside forward KL alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Candidate, Candidates, Case, Outcome, Suite
from benchmarks.suites import common

CE_WEIGHT, SMOOTHING, Z_WEIGHT, SOFTCAP, INTERPOLATION, DKD_ALPHA, DKD_BETA = 0.5, 0.1, 1e-4, 30.0, 0.4, 1.0, 2.0


class ObjectiveInputs(common.LogitInputs):
    """Also teacher probabilities, a second teacher, a mask of labels and a temperature per row."""

    PER_ROW = (*common.LogitInputs.PER_ROW, "teacher_probs", "second_teacher", "masked_labels", "temperatures")

    def __init__(self, case: Case, seed: int) -> None:
        super().__init__(case, seed)
        rows = case.shape[0]
        generator = torch.Generator().manual_seed(seed + 1)
        self.teacher_probs = torch.softmax(self.teacher.float(), -1).to(case.torch_dtype)
        self.second_teacher = self.teacher.roll(1, -1)
        masked = torch.rand(rows, generator=generator).to(case.device) < 0.5
        self.masked_labels = torch.where(masked, torch.full_like(self.labels, -100), self.labels)
        self.temperatures = torch.rand(rows, generator=generator).add_(1.5).to(case.device)


def _fixed(inputs: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Variation:
    """One objective: options of ``kd_loss`` (or another of kdkernels' losses) and its eager formulation."""

    formulation: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Any], dict[str, Any]] = _fixed
    function: Callable[..., Any] = kd.kd_loss
    arguments: common.Arguments = common.logits_and_labels
    eager_only: Optional[Callable[..., Tensor]] = None  # a formulation that no compiler takes whole
    pattern: str = "dense_fwd"
    # Eager PyTorch has a gradient of its own, that of the order in which a sort leaves equal logits.
    ordered: bool = False

    def ours(self, inputs: Any, backend: str, reduction: str, inplace: bool) -> Tensor:
        call = {"reduction": reduction, "inplace": inplace, "backend": backend, **self.options}
        if self.function is not kd.logit_mse_loss:
            call["temperature"] = common.TEMPERATURE
        call.update(student=inputs.student, teacher=inputs.teacher)
        call.update(self.tensors(inputs))
        result = self.function(**call)
        return result[0] if isinstance(result, tuple) else result


def _labels(inputs: Any) -> dict[str, Any]:
    return {"labels": inputs.labels}


VARIATIONS: dict[str, Variation] = {
    "forward KL": Variation(eager.forward_kl_best),
    "+ cross entropy": Variation(eager.kl_ce, {"ce_weight": CE_WEIGHT}, _labels),
    "+ cross entropy, label smoothing": Variation(
        eager.kl_ce_smoothed, {"ce_weight": CE_WEIGHT, "label_smoothing": SMOOTHING}, _labels
    ),
    "+ cross entropy, z-loss": Variation(eager.kl_ce_z, {"ce_weight": CE_WEIGHT, "z_loss_weight": Z_WEIGHT}, _labels),
    "+ softcaps": Variation(eager.kl_softcapped, {"student_softcap": SOFTCAP, "teacher_softcap": SOFTCAP}),
    "+ statistics": Variation(eager.kl_statistics, {"return_stats": True}),
    "half of the rows ignored": Variation(
        eager.kl_masked,
        tensors=lambda inputs: {"labels": inputs.masked_labels},
        arguments=lambda inputs: (inputs.student, inputs.teacher, inputs.masked_labels, common.TEMPERATURE),
        eager_only=eager.kl_selected,
    ),
    "temperature per row": Variation(
        eager.kl_row_temperature,
        tensors=lambda inputs: {"temperature": inputs.temperatures},
        arguments=lambda inputs: (inputs.student, inputs.teacher, inputs.labels, inputs.temperatures),
    ),
    "teacher probabilities": Variation(
        eager.kl_from_probs,
        {"teacher_form": "unnormalized_probs", "teacher_temperature": 1.0},
        lambda inputs: {"teacher": inputs.teacher_probs},
        arguments=lambda inputs: (inputs.student, inputs.teacher_probs, inputs.labels, common.TEMPERATURE),
    ),
    "two teachers, mixed probabilities": Variation(
        eager.kl_two_teachers,
        tensors=lambda inputs: {"teacher": [inputs.teacher, inputs.second_teacher]},
        arguments=lambda inputs: (inputs.student, inputs.teacher, inputs.second_teacher, common.TEMPERATURE),
    ),
    "standardised logits": Variation(eager.kl_standardized, {"standardize": True}),
    "TAID": Variation(eager.taid, {"interpolation": INTERPOLATION}, function=kd.taid_loss),
    "DKD": Variation(eager.dkd, {"alpha": DKD_ALPHA, "beta": DKD_BETA}, _labels, function=kd.dkd_loss),
    "logit MSE": Variation(eager.logit_mse, function=kd.logit_mse_loss),
    "ULD": Variation(
        eager.uld,
        # In fp32 too what the formula says; 16-bit logits are exact anyway.
        {"exact": True, "teacher_temperature": eager.ULD_TEACHER},
        function=kd.uld_loss,
        pattern="uld_fwd",
        ordered=True,
    ),
}


def _in_fp64(formulation: Callable[..., Tensor], inputs: Any) -> Outcome:
    logits = inputs.pristine.cpu().double().requires_grad_()
    loss = formulation(logits, inputs.teacher.cpu().double(), inputs.labels, common.TEMPERATURE)
    return Outcome(loss.detach(), torch.autograd.grad(loss, logits))


def make_candidates(case: Case) -> Candidates:
    found: Candidates = [common.add_probe("forward KL")]
    for name, variation in VARIATIONS.items():
        others: Candidates = [
            common.eager("eager, fewest passes", name, variation.formulation, variation.arguments),
            common.compiled("torch.compile, fewest passes", name, variation.formulation, case, variation.arguments),
        ]
        if variation.ordered:
            expected = partial(_in_fp64, variation.formulation)
            others = [replace(c, expected=expected) if isinstance(c, Candidate) else c for c in others]
        found.append(others[0])
        if variation.eager_only is not None:
            found.append(common.eager("eager, counted rows selected", name, variation.eager_only, variation.arguments))
        found += [
            others[1],
            *common.ours(name, variation.ours, case, pattern=variation.pattern),
        ]
    return found


SUITE = Suite(
    name="objective",
    title="Terms, targets and statistics beside forward KL, loss and gradient",
    shapes=((512, 32000),),
    dtypes=("bf16",),
    make_inputs=ObjectiveInputs,
    make_candidates=make_candidates,
    expected=lambda inputs, group: common.truth(inputs, VARIATIONS[group].ours),
    baseline_group="forward KL",
)
