"""``reduction="none"`` of the linear losses over the Triton kernels: the rows' gradients are made in backward."""

import pytest
import test_linear_rows
import torch
import torch.nn.functional as F
from test_linear import make, sparse_teacher

import kdkernels as kd


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dense(dtype):
    test_linear_rows.hold_dense(dtype, divergence="jsd", temperature=2.0, ce_weight=0.5, backend="triton")


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_sparse_teachers(tail):
    student, _, labels = make()
    ids, logprobs = sparse_teacher()
    options = {"tail": tail, "reduction": "none"}
    test_linear_rows.hold(
        lambda h, w, b: kd.linear_topk_kd_loss(
            h, w, ids, logprobs, labels, student_bias=b, chunk_bytes=1000, backend="triton", **options
        ),
        lambda h, w, b: kd.topk_kd_loss(F.linear(h, w, b), ids, logprobs, labels, backend="torch", **options),
        student,
    )
