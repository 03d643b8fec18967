"""The Sinkhorn-Knopp centering of self-supervised distillation, as a bias of the teacher's logits."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.chunked import no_autocast
from kdkernels.launch import flat

# Of the logits of a block in fp32: a CPU's caches hold it through all that an iteration does with it.
CPU_BLOCK_BYTES = 2**20
GPU_BLOCK_BYTES = 128 * 2**20


@torch.no_grad()
def sinkhorn_bias(
    teacher: Tensor,
    temperature: float,
    *,
    iterations: int = 3,
    mask: Optional[Tensor] = None,
    group: Any = None,
) -> Tensor:
    r"""The bias ``[V]`` of the teacher's logits that gives every prototype the same share of the batch.

    Sinkhorn-Knopp alternates between columns and rows of ``exp(t / T)``: each prototype's column is divided by its sum
    over the samples, then each sample's row by its sum. The result is a softmax with one bias::

        softmax((t + bias) / T)        bias / T -= logsumexp_samples((t + bias) / T - lse_row), each iteration

    so that the teacher of DINOv2 and iBOT is a loss of logits as any other::

        bias = kd.sinkhorn_bias(teacher, 0.07)
        loss = kd.kd_loss(student, teacher + bias, temperature=0.1, teacher_temperature=0.07, divergence="soft_ce",
                          scale_by_t_squared=False)

    In ``linear_kd_loss`` it is added to ``teacher_bias``. Logits are read once an iteration, in blocks of rows, and no
    probabilities are stored. Plain PyTorch; no gradient flows.

    Args:
        teacher: logits ``(..., V)``, float32, bfloat16 or float16 (float64 on the CPU); rows are samples.
        temperature: the teacher's T > 0.
        iterations: as many as the method has.
        mask: bool, of the shape of the rows; the samples that count. By default all do.
        group: the process group over whose ranks the samples are spread, such as ``torch.distributed.group.WORLD``; two
            numbers a prototype are exchanged in each iteration. A rank may have no sample. None: this process alone.

    Returns:
        The bias ``[V]``, float32 (float64 for float64). Softmaxes know it up to a constant: its mean is 0. A prototype
        that no sample has any share of (its logits are -inf) keeps the bias 0 before that.

    Raises:
        TypeError, ValueError: naming the argument.

    Reference:
        Caron et al. 2020 (SwAV), arXiv:2006.09882; Oquab et al. 2023 (DINOv2), arXiv:2304.07193.

    Example:
        >>> scores = torch.randn(8, 4)
        >>> balanced = scores + sinkhorn_bias(scores, temperature=0.1)
        >>> balanced.shape
        torch.Size([8, 4])
    """
    checks.logits("teacher", teacher)
    temperature = checks.number("temperature", temperature, low=0.0, exclusive_low=True)
    checks.in_sums("temperature", temperature, positive=True)
    checks.integer("iterations", iterations, low=0)
    if mask is not None:
        checks.sample_mask(mask, teacher)
    rows = flat(teacher.detach())
    counted = None if mask is None else mask.reshape(-1)
    sums, columns = checks.sum_dtype(teacher), teacher.shape[-1]
    room = CPU_BLOCK_BYTES if teacher.device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(room // (columns * sums.itemsize), 1)
    bias = torch.zeros(columns, dtype=sums, device=teacher.device)
    with no_autocast(teacher):
        for iteration in range(iterations):
            total = torch.full_like(bias, -torch.inf)
            for start in range(0, len(rows), step):
                scores = rows[start : start + step].to(sums) / temperature + bias
                if iteration:
                    scores -= scores.logsumexp(-1, keepdim=True)
                if counted is not None:
                    scores.masked_fill_(~counted[start : start + step, None], -torch.inf)
                total = torch.logaddexp(total, scores.logsumexp(0))
            if group is not None:
                total = _over_ranks(total, group)
            bias = bias - torch.where(torch.isneginf(total), 0.0, total)
    bias *= temperature
    return bias - bias.mean()


def _over_ranks(total: Tensor, group: Any) -> Tensor:
    """The logsumexp over the ranks, of each column."""
    import torch.distributed as dist

    largest = total.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    largest = torch.where(torch.isneginf(largest), 0.0, largest)
    share = (total - largest).exp()
    dist.all_reduce(share, group=group)
    return share.log() + largest
