"""Distances of hidden states: each block of rows is read once, and its gradient written while the caches hold it."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import backends, checks, memory, transforms
from kdkernels.autograd import graph_is_kept, has_saved_tensor_hooks, refuse_second_derivative, scaled
from kdkernels.chunked import no_autocast
from kdkernels.functional import pair
from kdkernels.launch import flat
from kdkernels.objective import MSEObjective
from kdkernels.reference.features import LAYERNORM_EPS, NORM_EPS, feature_rows

KINDS = ("mse", "l1", "smooth_l1", "cosine")
NORMALIZATIONS = ("l2", "layernorm")
REDUCTIONS = ("mean", "sum", "none")
IGNORED = -100
# Of a block's student vectors in fp32, of which some copies are in the caches at a time.
CPU_BLOCK_BYTES = 2**19
GPU_BLOCK_BYTES = 2**26


def feature_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "mse",
    normalize: Optional[str] = None,
    beta: float = 1.0,
    mask: Optional[Tensor] = None,
    row_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""A distance between hidden states of student and teacher, vector by vector.

    With a and b the vectors of D numbers, normalised where ``normalize`` says so::

        "mse"         mean (a - b)^2
        "l1"          mean |a - b|
        "smooth_l1"   mean of (a - b)^2 / (2 beta) where |a - b| < beta, |a - b| - beta / 2 elsewhere
        "cosine"      1 - <a, b> / (|a| |b|)

    "mse" of vectors as they are is the kernel of ``logit_mse_loss``, on a GPU too. For all others rows are taken in
    blocks. On a CPU the caches hold a block: both inputs are read from memory once, the gradient is written once, and
    nothing else of their size is made, where eager PyTorch reads 21 times for a cosine and 25 for normalised vectors.
    On a GPU a block is larger and saves memory, not time: there is no kernel yet, and ``torch.compile`` around the call
    is what fuses the formula.

    Args:
        student: ``(..., D)``, float32, bfloat16 or float16 (float64 on the CPU), projected to the teacher's width by
            the caller where they differ.
        teacher: ``(..., D)``, of the same shape. It must not require grad.
        kind: "mse", "l1", "smooth_l1" or "cosine".
        normalize: None; "l2", each vector over its length; or "layernorm", less its mean and over its standard
            deviation (``eps`` 1e-5, no weights). Of both, with the gradient through the student's.
        beta: of "smooth_l1", > 0.
        mask: bool, of the shape of the rows, True for those that count; what is in the others is not looked at.
        row_weight: one number per row. It does not count in the mean.
        reduction: "mean" over the rows that count, "sum", or "none" for ``(...)``.
        backend: "auto": as above, the blocks in PyTorch's operations with a gradient written by hand; or "torch": the
            formula under autograd, with second derivatives, as under ``torch.compile`` and ``torch.func``.

    Returns:
        The loss, float32 (float64 for float64). A vector of length 0 has no direction: its cosine distance is 1, and
        its gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, before anything is computed.

    Reference:
        Romero et al. 2015 (FitNets), arXiv:1412.6550, "mse"; Sun et al. 2019 (PKD), arXiv:1908.09355, "mse" of "l2";
        Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, "cosine".

    Example:
        >>> feature_loss(torch.ones(2, 3, 4), 2 * torch.ones(2, 3, 4), kind="cosine").item()
        0.0
    """
    checks.features(student, teacher)
    checks.choice("kind", kind, KINDS)
    if normalize is not None:
        checks.choice("normalize", normalize, NORMALIZATIONS)
    checks.number("beta", beta, low=0.0, exclusive_low=True)
    if kind != "smooth_l1" and beta != 1:
        raise ValueError(f"beta has no meaning with kind {kind!r}, only with 'smooth_l1'")
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.choice("backend", backend, ("auto", "torch"))
    if mask is not None:
        checks.sample_mask(mask, student)
    weight: Optional[Tensor] = None
    if row_weight is not None:
        checks.tensor("row_weight", row_weight)
        of_rows = checks.per_row("row_weight", row_weight, student)
        assert isinstance(of_rows, Tensor)
        weight = of_rows
    as_formula = backend == "torch" or torch.compiler.is_compiling()
    if not as_formula and transforms.active():
        as_formula = transforms.takes_part(student) or transforms.takes_part(teacher)
    if kind == "mse" and normalize is None and not as_formula:
        labels = None if mask is None else torch.where(mask, 0, IGNORED)
        objective = MSEObjective.of({"row_weight": row_weight, "reduction": reduction, "ignore_index": IGNORED})
        return pair("mse_fwd", objective, _by_rows(student), _by_rows(teacher.detach()), labels)
    factor = _factor(student, mask, weight, reduction)
    call = _Call(kind, normalize, beta, None if mask is None else mask.reshape(-1), factor)
    rows, target = flat(student), flat(teacher.detach())
    if as_formula:
        with no_autocast(student):
            losses = _formula(rows, target, call)
    elif torch.is_grad_enabled() and student.requires_grad:
        losses = _FeatureLoss.apply(rows, target, call, reduction == "none")
        if reduction != "none":
            return losses
    else:
        losses = _run(rows, target, call, None)
    return losses.reshape(student.shape[:-1]) if reduction == "none" else losses.sum()


def _by_rows(vectors: Tensor) -> Tensor:
    """The kernels take rows whose numbers stand side by side."""
    return vectors if vectors.stride(-1) == 1 or vectors.shape[-1] == 1 else vectors.contiguous()


class _Call(NamedTuple):
    kind: str
    normalize: Optional[str]
    beta: float
    mask: Optional[Tensor]  # [N]
    factor: Optional[Tensor]  # [N] or 0-d, what multiplies the losses of the rows


def _factor(student: Tensor, mask: Optional[Tensor], weight: Optional[Tensor], reduction: str) -> Optional[Tensor]:
    if reduction != "mean":
        return weight
    sums = checks.sum_dtype(student)
    if mask is None:
        number = student.numel() // student.shape[-1]
        share = torch.full((), 1 / max(number, 1), dtype=sums, device=student.device)
    else:
        share = 1 / mask.sum().clamp(min=1).to(sums)
    return share if weight is None else weight * share


def _formula(student: Tensor, teacher: Tensor, call: _Call) -> Tensor:
    """Losses ``[N]`` with their factors, which autograd differentiates."""
    if call.mask is not None:
        student = torch.where(call.mask[:, None], student, 0.0)
        teacher = torch.where(call.mask[:, None], teacher, 0.0)
    rows = feature_rows(student, teacher, kind=call.kind, normalize=call.normalize, beta=call.beta)
    if call.mask is not None:
        rows = torch.where(call.mask, rows, 0.0)
    return rows if call.factor is None else rows * call.factor


class _FeatureLoss(torch.autograd.Function):
    """The gradient is complete when ``forward`` ends; ``backward`` multiplies it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, call: _Call, by_row: bool) -> Tensor:
        grad = memory.empty_like(student)
        losses = _run(student, teacher, call, grad)
        # fp16 waits for a loss scale before it takes constants that it may not hold.
        factor = call.factor if student.dtype == torch.float16 else None
        ctx.save_for_backward(grad, factor)
        ctx.shared, ctx.backend = has_saved_tensor_hooks(), backends.select("auto", student.device.type)
        return losses if by_row else losses.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        grad, factor = ctx.saved_tensors
        shared = ctx.shared or graph_is_kept()
        return scaled(grad, dloss, factor, ctx.backend, shared=shared), None, None, None


def _run(student: Tensor, teacher: Tensor, call: _Call, grad: Optional[Tensor]) -> Tensor:
    """Losses ``[N]`` with their factors; their gradient is written to ``grad [N, D]``, in fp16 without the factors."""
    sums = checks.sum_dtype(student)
    losses = student.new_empty(len(student), dtype=sums)
    room = CPU_BLOCK_BYTES if student.device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(room // (student.shape[-1] * sums.itemsize), 1)
    with torch.no_grad(), no_autocast(student):
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            # Copies, which are written over.
            a, b = student[rows].to(sums, copy=True), teacher[rows].to(sums, copy=True)
            mask = None if call.mask is None else call.mask[rows, None]
            if mask is not None:
                a, b = a.masked_fill_(~mask, 0.0), b.masked_fill_(~mask, 0.0)
            found, da = _block(a, b, call, grad is not None)
            factor = call.factor
            if factor is not None and factor.dim():
                factor = factor[rows]
            if mask is not None:
                found.masked_fill_(~mask[:, 0], 0.0)
            losses[rows] = found if factor is None else found * factor
            if grad is None or da is None:
                continue
            if mask is not None:
                da.masked_fill_(~mask, 0.0)
            if factor is None or grad.dtype == torch.float16:
                grad[rows] = da
            else:
                torch.mul(da, factor[:, None] if factor.dim() else factor, out=da)
                grad[rows] = da
    return losses


def _block(a: Tensor, b: Tensor, call: _Call, with_grad: bool) -> tuple[Tensor, Optional[Tensor]]:
    """Distances ``[R]`` and their gradients by ``a [R, D]``, whose places are written over."""
    (a, by), (b, _) = (_normalized(item, call.normalize) for item in (a, b))
    width = a.shape[-1]
    if call.kind == "cosine":
        norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        norms = norm * torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        directed = norms > NORM_EPS
        inverse = torch.where(directed, 1 / norms, 0.0)
        cosine = (a * b).sum(-1, keepdim=True) * inverse
        found = (1 - cosine).squeeze(-1)
        if with_grad:
            da = b.mul_(-inverse).addcmul_(a, torch.where(directed, cosine / norm.square(), 0.0))
    else:
        da = torch.sub(a, b, out=b)
        if call.kind == "mse":
            found = torch.linalg.vector_norm(da, dim=-1).square() / width
        elif call.kind == "l1":
            found = torch.linalg.vector_norm(da, 1, dim=-1) / width
        else:
            size = da.abs()
            near = size.clamp(max=call.beta)
            # near^2 / (2 beta) + |d| - near: the parabola up to beta, and its tangent from there.
            found = size.addcmul_(near, near / (2 * call.beta) - 1).mean(-1)
        if with_grad and call.kind == "mse":
            da.mul_(2 / width)
        elif with_grad:
            da = da.sign_().div_(width) if call.kind == "l1" else da.div_(call.beta).clamp_(-1, 1).div_(width)
    if not with_grad:
        return found, None
    if call.normalize == "layernorm":
        da -= da.mean(-1, keepdim=True)
    if by is not None:
        share = (da * a).sum(-1, keepdim=True)
        da.addcmul_(a, share / (width if call.normalize == "layernorm" else 1), value=-1).mul_(by)
    return found, da


def _normalized(x: Tensor, how: Optional[str]) -> tuple[Tensor, Optional[Tensor]]:
    """Vectors normalised in place, and what they were multiplied by ``[R, 1]``; 0 where there is no direction."""
    if how is None:
        return x, None
    if how == "l2":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        by = torch.where(norm > NORM_EPS, 1 / norm, 0.0)
    else:
        x.sub_(x.mean(-1, keepdim=True))
        by = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + LAYERNORM_EPS).rsqrt()
    return x.mul_(by), by
