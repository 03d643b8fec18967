"""Wrong calls: `mypy --strict` and pyright report each line that ends in ``# wrong``, and no other one."""

import torch

import kdkernels as kd

student, teacher = torch.randn(4, 9), torch.randn(4, 9)

kd.kd_loss(student, teacher, temprature=2.0)  # wrong
kd.kd_loss(student, teacher, reduction="avg")  # wrong
kd.kd_loss(student, teacher, divergence="kl")  # wrong
text: str = kd.kd_loss(student, teacher)  # wrong
kd.KDLoss(temprature=2.0)  # wrong
kd.topk_kd_loss(student, teacher, tail="buckets")  # wrong
kd.kd_loss(student, teacher, return_stats=True).backward()  # wrong
