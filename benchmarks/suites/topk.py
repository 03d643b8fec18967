"""Sparse teachers of 64 ids and log-probabilities a row: the loss with its tail in a bucket, and their capture."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Candidate, Candidates, Case, Outcome, Run, Suite, unit_bytes
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
    op, scalars = ops.op("topk_fwd", backend), TopKObjective().scalars

    def run(inputs: Any) -> Outcome:
        rows, columns = inputs.pristine.shape
        student, out = (t.detach().unsqueeze(0) for t in (inputs.student, inputs.out))
        per_row = (None,) * 8  # labels, row_weight, temperatures, the divergence's parameter, the terms' weights
        arguments = ops.packed("topk_fwd", {**scalars, "scale": 1.0 / rows, "vocab_size": columns})
        loss, _ = op(student, inputs.ids, inputs.logprobs, out, *per_row, inputs.tail, **arguments)
        return Outcome(loss.sum(), (inputs.out,))

    return run


def _capture(found: Tensor) -> Outcome:
    """Log-probabilities stand for the gradient; ids are not compared, for torch.topk takes any of equal logits."""
    return Outcome(found.mean(), (found,))


def _build_eager_capture(function: Any) -> Run:
    return lambda inputs: _capture(function(inputs.teacher, K)[1])


def _build_capture(backend: Any) -> Run:
    return lambda inputs: _capture(kd.capture_topk(inputs.teacher, K, backend=backend).logprobs)


def make_candidates(case: Case) -> Candidates:
    formulations = {"log_softmax + gather": eager.topk_kl, "gather - logsumexp": eager.topk_kl_logsumexp}
    captures = {"topk + logsumexp": eager.capture}
    if case.dtype in ("bf16", "fp16"):
        captures["topk + logsumexp, fp32 sums"] = eager.capture_fp32
    listed = formulations.items()
    return [
        *(common.eager(f"eager, {name}", LOSS, loss, loss_arguments) for name, loss in listed),
        *(common.compiled(f"torch.compile, {name}", LOSS, loss, case, loss_arguments) for name, loss in listed),
        *common.ours(LOSS, bucket, case, pattern="topk_fwd"),
        *common.ours(LOSS, bucket, case, inplace=True, pattern="topk_fwd"),
        *common.kernels(LOSS, case, _build_kernel, pattern="topk_fwd"),
        common.add_probe(LOSS),
        *(
            Candidate(f"eager, {name}", CAPTURE, "eager", partial(_build_eager_capture, function))
            for name, function in captures.items()
        ),
        *common.each_backend(CAPTURE, case, "kdkernels {}", _build_capture, pattern="capture_topk"),
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
    make_inputs=SparseInputs,
    make_candidates=make_candidates,
    expected=expected,
    # One read and one write of [N, V]; a capture is a single read, half of that.
    floor_bytes=lambda case: 2 * unit_bytes(case),
)
