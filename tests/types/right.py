"""Calls as a user writes them: `mypy --strict` and pyright find nothing here. scripts/prove-types runs both."""

import torch

import kdkernels as kd

student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
labels = torch.tensor([1, 2, -100, 3])

loss: torch.Tensor = kd.kd_loss(student, teacher, labels, temperature=2.0, ce_weight=0.5, reduction="batchmean")
value, stats = kd.kd_loss(student, [teacher, teacher], divergence=kd.JSD(0.3), return_stats=True)
acceptance: torch.Tensor = stats.acceptance
captured = kd.capture_topk(teacher, 3)
sparse: torch.Tensor = kd.topk_kd_loss(student, captured.ids, captured.logprobs, tail_logprob=captured.tail_logprob)
module = kd.KDLoss(temperature=2.0, divergence="reverse_kl", return_stats=False)
total = loss + value + sparse + kd.taid_loss(student, teacher, interpolation=0.5)
head = torch.nn.Linear(8, 9)
hidden: torch.Tensor = kd.linear_kd_loss(torch.randn(4, 8), head, torch.randn(4, 8), head, chunk_bytes=2**20)
chosen = kd.token_logprobs(student, torch.arange(4)).logprobs
torch.autograd.backward(total + hidden + chosen.sum())
