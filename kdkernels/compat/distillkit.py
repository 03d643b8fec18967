"""The losses of DistillKit: sparse and dense KL, JSD and TVD.

Functions are sums over the rows that the mask has, with no T^2; the classes multiply by T^2 and divide by
``num_items_in_batch``, or the tokens of the mask. Sparse teachers are ids and log-probabilities
(``log_target=True``) or logits, taken at ``target_generation_temperature``. ``missing`` is ``"zero"``, the default: the
teacher is renormalised over its ids and the student is not; or ``"symmetric_uniform"``: the mass outside the ids is one
more outcome of both. A teacher at another temperature is ``p ** (its T / T)``, for the mass outside too.

Where DistillKit is wrong: with ``"symmetric_uniform"`` its clamp ``1 - 1e-8`` is 1 in fp32, and losses or gradients are
inf or NaN once the student is sure of one id; here they are finite. The hinge and ranking losses have no counterpart.

Source: arcee-ai/DistillKit a61c2e7, ``distillkit/lossfuncs/``.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks
from kdkernels.compat import _common

MISSING = ("zero", "symmetric_uniform")


def _sparse(
    divergence: Any,
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Optional[Tensor],
    missing: Any,
    log_target: bool,
    temperature: float,
    target_temperature: float,
    student_temperature: float,
) -> Tensor:
    missing = getattr(missing, "value", missing)
    checks.choice("missing", missing, MISSING)
    if missing == "symmetric_uniform" and not log_target:
        raise ValueError("missing 'symmetric_uniform' needs log_target=True: logits say nothing of the mass outside")
    values = target_values.detach().float()
    power = target_temperature / temperature
    options: dict[str, Any] = {"tail": "renormalize", "teacher_temperature": 1 / power}
    if not log_target:
        values = values.log_softmax(-1)
    if missing == "symmetric_uniform":
        options = {"tail": "bucket", "teacher_temperature": 1.0}
        if power != 1:
            outside = power * torch.log1p(-values.exp().sum(-1).clamp(max=1.0))
            total = torch.logaddexp((power * values).logsumexp(-1), outside)
            values, options["tail_logprob"] = power * values - total[..., None], outside - total
    return kd.topk_kd_loss(
        logits,
        target_ids,
        values,
        _common.labels_of_mask(mask, logits.shape[:-1]),
        divergence=divergence,
        temperature=temperature / student_temperature,
        scale_by_t_squared=False,
        reduction="sum",
        **options,
    )


def sparse_kl_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Optional[Tensor] = None,
    eps: float = 1e-8,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: Optional[int] = None,
) -> Tensor:
    """``sparse_kl_div``: a sum over the rows. ``eps`` and ``chunk_length`` change nothing."""
    temperatures = temperature, target_generation_temperature, student_generation_temperature
    teacher = target_ids, target_values, mask, missing, log_target
    return _sparse("forward_kl", logits, *teacher, *temperatures)


def sparse_js_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Optional[Tensor] = None,
    eps: float = 1e-8,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: Optional[int] = None,
) -> Tensor:
    """``sparse_js_div``: JSD with ``beta = 0.5``, a sum over the rows."""
    temperatures = temperature, target_generation_temperature, student_generation_temperature
    teacher = target_ids, target_values, mask, missing, log_target
    return _sparse("jsd", logits, *teacher, *temperatures)


def sparse_tvd(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Optional[Tensor] = None,
    eps: float = 1e-8,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: Optional[int] = None,
) -> Tensor:
    """``sparse_tvd``: a sum over the rows."""
    temperatures = temperature, target_generation_temperature, student_generation_temperature
    teacher = target_ids, target_values, mask, missing, log_target
    return _sparse("tvd", logits, *teacher, *temperatures)


def _dense(divergence: Any, logits: Tensor, teacher: Tensor, mask: Optional[Tensor], temperature: float) -> Tensor:
    return kd.kd_loss(
        logits,
        teacher,
        _common.labels_of_mask(mask, logits.shape[:-1]),
        divergence=divergence,
        temperature=temperature,
        scale_by_t_squared=False,
        reduction="sum",
    )


def dense_kl_div(
    logits: Tensor, target_logits: Tensor, mask: Optional[Tensor] = None, temperature: float = 1.0
) -> Tensor:
    """``dense_kl_div``: a sum over the rows."""
    return _dense("forward_kl", logits, target_logits, mask, temperature)


def dense_js_div(
    logits: Tensor, target_logits: Tensor, mask: Optional[Tensor] = None, temperature: float = 1.0
) -> Tensor:
    """``dense_js_div``: JSD with ``beta = 0.5``, a sum over the rows."""
    return _dense("jsd", logits, target_logits, mask, temperature)


def dense_tvd(logits: Tensor, target_logits: Tensor, mask: Optional[Tensor] = None, temperature: float = 1.0) -> Tensor:
    """``dense_tvd``: a sum over the rows."""
    return _dense("tvd", logits, target_logits, mask, temperature)


class _Loss:
    """A loss of DistillKit's trainer, of a teacher's ``signal`` that is dense (``logits``) or sparse."""

    divergence = ""

    def __init__(
        self,
        temperature: float,
        missing_probability_handling: Any = "zero",
        sparse_chunk_length: Optional[int] = None,
    ) -> None:
        self.temperature, self.missing = temperature, missing_probability_handling

    def requires_hidden_states(self) -> bool:
        return False

    def __call__(
        self,
        student_outputs: Any,
        signal: Any,
        mask: Optional[Tensor] = None,
        hidden_state_mapping: Any = None,
        num_items_in_batch: Union[int, Tensor, None] = None,
    ) -> Tensor:
        logits, temperature = student_outputs.logits, self.temperature
        if num_items_in_batch is None:
            num_items_in_batch = logits.shape[:-1].numel() if mask is None else mask.sum().clamp_min(1)
        if hasattr(signal, "logits"):
            total = _dense(self.divergence, logits, signal.logits, mask, temperature)
        else:
            taken_at = signal.generation_temperature
            teacher = signal.sparse_ids, signal.sparse_values, mask, self.missing, signal.log_values
            total = _sparse(self.divergence, logits, *teacher, temperature, taken_at, 1.0)
        return total * temperature**2 / num_items_in_batch


class KLDLoss(_Loss):
    """``KLDLoss``, times T^2."""

    divergence = "forward_kl"


class JSDLoss(_Loss):
    """``JSDLoss``, times T^2."""

    divergence = "jsd"


class TVDLoss(_Loss):
    """``TVDLoss``, times T^2."""

    divergence = "tvd"
