"""Sparse teachers of 64 ids and log-probabilities a row: the loss with its tail in a bucket, and their capture."""

from __future__ import annotations

from functools import partial
from typing import Any, Union

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Absent, Candidate, Case, Outcome, Run, Suite
from benchmarks.suites import common
from kdkernels import ops
from kdkernels.objective import TopKObjective

K = 64
LOSS, CAPTURE = f"topk_kd_loss, K = {K}", f"capture_topk, K = {K}"


class SparseInputs(common.LogitInputs):
    """Also the teacher's K most likely tokens, as captured in fp32."""

    PER_ROW = (*common.LogitInputs.PER_ROW, "ids", "logprobs", "tail")

    def __init__(self, case: Case, seed: int) -> None:
        super().__init__(case, seed)
        captured = kd.capture_topk(self.teacher.float(), min(K, case.shape[1]))
        self.ids, self.logprobs, self.tail = captured.ids.long(), captured.logprobs, captured.tail_logprob


def bucket(inputs: Any, backend: str, reduction: str, inplace: bool) -> Tensor:
    options = {"tail_logprob": inputs.tail, "reduction": reduction, "inplace": inplace, "backend": backend}
    return kd.topk_kd_loss(inputs.student, inputs.ids, inputs.logprobs, **options)


def loss_arguments(inputs: Any) -> tuple[Any, ...]:
    return inputs.student, inputs.ids, inputs.logprobs, inputs.tail


def _build_kernel(backend: str) -> Run:
    op = ops.op("topk_fwd", backend)
    objective = TopKObjective(min_tail=0.0)

    def run(inputs: Any) -> Outcome:
        rows, columns = inputs.pristine.shape
        student, out = (t.detach().unsqueeze(0) for t in (inputs.student, inputs.out))
        per_row = (None,) * 5  # labels, row_weight, temperatures and the divergence's parameter
        numbers = {"vocab_size": columns, "scale": 1.0 / rows}
        loss, _ = op(student, inputs.ids, inputs.logprobs, out, *per_row, inputs.tail, **objective.scalars, **numbers)
        return Outcome(loss.sum(), (inputs.out,))

    return run


def _capture(found: Tensor) -> Outcome:
    """Log-probabilities stand for the gradient; ids are not compared, for torch.topk takes any of equal logits."""
    return Outcome(found.mean(), (found,))


def _build_eager_capture(function: Any) -> Run:
    return lambda inputs: _capture(function(inputs.teacher, K)[1])


def _build_capture(backend: str) -> Run:
    return lambda inputs: _capture(kd.capture_topk(inputs.teacher, K, backend=backend).logprobs)


def _captures(case: Case) -> list[Union[Candidate, Absent]]:
    formulations = {"topk + logsumexp": eager.capture}
    if case.dtype in ("bf16", "fp16"):
        formulations["topk + logsumexp, fp32 sums"] = eager.capture_fp32
    found: list[Union[Candidate, Absent]] = []
    for name, function in formulations.items():
        found.append(Candidate(f"eager, {name}", CAPTURE, "eager", partial(_build_eager_capture, function)))
    for backend in common.availability(case, common.FUSED, pattern="capture_topk"):
        name = f"kdkernels {backend.name}"
        if backend.ok:
            found.append(Candidate(name, CAPTURE, "kdkernels", partial(_build_capture, backend.name)))
        else:
            found.append(Absent(name, CAPTURE, backend.reason))
    return found


def make_candidates(case: Case) -> list[Union[Candidate, Absent]]:
    formulations = {"log_softmax + gather": eager.topk_kl, "gather - logsumexp": eager.topk_kl_logsumexp}
    return [
        *(common.eager(f"eager, {name}", LOSS, loss, loss_arguments) for name, loss in formulations.items()),
        *(
            common.compiled(f"torch.compile, {name}", LOSS, loss, case, loss_arguments)
            for name, loss in formulations.items()
        ),
        *common.ours(LOSS, bucket, case, backends=common.FUSED, pattern="topk_fwd"),
        *common.ours(LOSS, bucket, case, backends=common.FUSED, inplace=True, pattern="topk_fwd"),
        *common.kernels(LOSS, case, _build_kernel, pattern="topk_fwd"),
        common.add_probe(LOSS),
        *_captures(case),
    ]


def expected(inputs: Any, group: str) -> Outcome:
    if group == LOSS:
        return common.truth(inputs, bucket)
    return _capture(torch.log_softmax(inputs.teacher.cpu().double(), -1).topk(K, -1).values)


SUITE = Suite(
    name="topk",
    title="Sparse teachers: loss and gradient, and capture",
    shapes=((512, 32000), (256, 128256)),
    dtypes=("fp32", "bf16"),
    quick_shapes=((256, 8192),),
    make_inputs=SparseInputs,
    make_candidates=make_candidates,
    expected=expected,
    unit_bytes=common.unit_bytes,
    # One read and one write of [N, V]; a capture is a single read, half of that.
    floor_bytes=lambda case: 2 * common.unit_bytes(case),
)
