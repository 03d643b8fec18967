"""The losses of TRL's trainers that distil, and ``patch()``, which puts them into the trainers.

    import kdkernels.compat.trl
    kdkernels.compat.trl.patch()      # before training; unpatch() takes it back

``beta`` is GKD's: 0 is forward KL, 1 reverse KL, and between the mixture is ``beta p + (1 - beta) q``. Labels are
shifted outside, and -100 masks. No loss is multiplied by T^2. ``"batchmean"``, the default, divides by the tokens that
count where there are labels, and by the first dimension elsewhere; ``num_items_in_batch`` replaces both.

Patched are, where the installed release has them:

- ``GKDTrainer``, ``GOLDTrainer``, ``IWOPDTrainer`` and the experimental ``DistillationTrainer`` of releases up to 1.9:
  ``generalized_jsd_loss``, and the sparse losses of teachers on a server;
- the stable ``DistillationTrainer`` (1.10 and later): its loss on hidden states, ``_chunked_divergence_loss``;
- ``SDFTTrainer``, ``SDPOTrainer`` (1.6 and later): the losses of all logits and of the student's top k;
- ``ServerDistillationTrainer``, ``AsyncDistillationTrainer``.

Losses of sampled tokens (``iw_opd``, ``sampled_token``, MiniLLM) read one number per token and stay TRL's. So does
GOLD's loss of tokens matched between vocabularies, whose probabilities do not add up to 1.

Differences: ``reduction="none"``, one number per row and token of the vocabulary, is refused, and no trainer asks for
it. An empty tail has at least the probability that rounding leaves open, where TRL has at least 1e-7. Tokens of logit
-inf in both models give NaN in TRL, and count nothing here.

Source: trl 1.0 to 1.16.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import checks
from kdkernels.compat import _common

REDUCTIONS = ("none", "mean", "batchmean", "sum")
LAST_MINOR = 16
Items = Union[int, float, Tensor, None]


def _reduced(labels: Optional[Tensor], reduction: str, items: Items, like: Tensor) -> dict[str, Any]:
    """The options that make TRL's reduction."""
    if items is not None:
        return _common.denominator(items.to(like.device) if isinstance(items, Tensor) else items)
    checks.choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        raise _common.no_elements("TRL's generalized_jsd_loss")
    if reduction == "batchmean" and labels is not None:
        return {"reduction": "mean"}
    return {"reduction": reduction}


def _sparse(student: Tensor, ids: Tensor, logprobs: Tensor, add_tail: bool, beta: float, **options: Any) -> Any:
    """A divergence on some ids: with all others as one outcome, or within the ids alone."""
    return kd.topk_kd_loss(
        student,
        ids,
        logprobs,
        divergence=_common.generalized_jsd(beta),
        tail="bucket" if add_tail else "renormalize_both",
        teacher_temperature=1.0,
        scale_by_t_squared=False,
        **options,
    )


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Items = None,
) -> Tensor:
    """``GKDTrainer.generalized_jsd_loss``."""
    loss = kd.kd_loss(
        student_logits,
        teacher_logits,
        labels,
        divergence=_common.generalized_jsd(beta),
        temperature=temperature,
        scale_by_t_squared=False,
        **_reduced(labels, reduction, num_items_in_batch, student_logits),
    )
    # TRL's mean is over rows and columns.
    whole = num_items_in_batch is None and reduction == "mean"
    return loss / student_logits.shape[-1] if whole else loss


def generalized_jsd_loss_on_support(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    top_k: int = 0,
    add_tail: bool = True,
    num_items_in_batch: Items = None,
) -> Tensor:
    """``IWOPDTrainer.generalized_jsd_loss``: on the teacher's top k (``beta`` 0), the student's (1) or both."""
    if not 0 < top_k < student_logits.shape[-1]:
        call = labels, beta, temperature, reduction, num_items_in_batch
        return generalized_jsd_loss(student_logits, teacher_logits, *call)
    ids = [x.detach().topk(top_k).indices for x, skip in ((teacher_logits, 1), (student_logits, 0)) if beta != skip]
    teacher = kd.gather_logprobs(teacher_logits, torch.cat(ids, -1), temperature=temperature)
    options = _reduced(labels, reduction, num_items_in_batch, student_logits)
    if add_tail:
        options["tail_logprob"] = teacher.tail_logprob
    loss = _sparse(student_logits, *teacher[:2], add_tail, beta, labels=labels, temperature=temperature, **options)
    # TRL's mean is over rows and slots, of which some may be unused.
    whole = num_items_in_batch is None and reduction == "mean"
    return loss / (top_k * len(ids) + add_tail) if whole else loss


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Items = None,
    student_lm_head_bias: Optional[Tensor] = None,
    teacher_lm_head_bias: Optional[Tensor] = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: Optional[float] = None,
    teacher_final_logit_softcapping: Optional[float] = None,
    temperature: float = 1.0,
    chunk_size: Optional[int] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``_chunked_divergence_loss`` of the stable ``DistillationTrainer``: (loss, sum of entropies, tokens)."""
    student = _operands(student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    teacher = _operands(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    if teacher[0].dtype != student[0].dtype:
        student, teacher = (
            _operands(*side, other[0].dtype) for side, other in ((student, teacher), (teacher, student))
        )
    labels = _common.labels_of_mask(completion_mask, student_hidden_states.shape[:-1])
    cap, scaled = _scaled(student_final_logit_softcapping, temperature, student_logit_scale)
    teacher_cap, teacher_scaled = _scaled(teacher_final_logit_softcapping, temperature, teacher_logit_scale)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(student[0].device)
    loss, stats = kd.linear_kd_loss(
        *student[:2],
        *teacher[:2],
        labels,
        student_bias=student[2],
        teacher_bias=teacher[2],
        divergence=_common.generalized_jsd(beta),
        temperature=scaled,
        teacher_temperature=teacher_scaled,
        student_softcap=cap,
        teacher_softcap=teacher_cap,
        scale_by_t_squared=False,
        return_stats=True,
        **_common.denominator(num_items_in_batch),
    )
    return loss, stats.student_entropy.sum(), (completion_mask != 0).sum()


def _operands(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], dtype: Optional[torch.dtype] = None
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Hidden states and head of one dtype, the wider one, and whole where the head is sharded."""
    if checks.is_dtensor(weight):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()  # type: ignore[attr-defined]
    for value in (weight, bias):
        if value is not None:
            dtype = torch.promote_types(dtype or hidden.dtype, torch.promote_types(hidden.dtype, value.dtype))
    dtype = dtype or hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _scaled(softcap: Optional[float], temperature: float, scale: float) -> tuple[Optional[float], float]:
    """The cap and temperature of logits that are multiplied by ``scale`` first: no multiplication is left."""
    if not scale > 0:
        raise ValueError(f"logit_scale must be > 0, got {scale}")
    return None if softcap is None else softcap / scale, temperature / scale


def compute_full_logit_self_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float
) -> Tensor:
    """``compute_full_logit_self_distillation_loss`` of SDFT and SDPO: one number per token."""
    divergence = _common.generalized_jsd(distillation_alpha)
    return kd.kd_loss(student_logits, teacher_logits, divergence=divergence, reduction="none")


def compute_topk_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """``compute_topk_self_distillation_loss`` of SDFT and SDPO: on the student's top k, one number per token."""
    teacher = kd.gather_logprobs(teacher_logits, student_logits.detach().topk(distillation_topk).indices)
    options: dict[str, Any] = {"tail_logprob": teacher.tail_logprob} if distillation_add_tail else {}
    call = student_logits, *teacher[:2], distillation_add_tail, distillation_alpha
    return _sparse(*call, reduction="none", **options)


def server_forward_kl_loss(
    trainer: Any, teacher_result: dict[str, Tensor], student_log_probs: Tensor, labels: Tensor
) -> Tensor:
    """``_compute_server_forward_kl_loss``: slots of log-probability -inf are unused; the mean is this rank's own."""
    ids, logprobs = teacher_result["topk_token_ids"], teacher_result["topk_logprobs"]
    # Log-probabilities are logits whose logsumexp is 0.
    return _sparse(student_log_probs, ids, logprobs, trainer.loss_add_tail, 0.0, labels=labels)


def sparse_top_1_divergence_loss(
    trainer: Any,
    student_log_probs: Tensor,
    teacher_top1_token_ids: Tensor,
    teacher_top1_logprobs: Tensor,
    reverse_token_ids: Tensor,
    reverse_teacher_logprobs: Tensor,
    labels: Tensor,
    num_items_in_batch: Items = None,
) -> Tensor:
    """``_compute_sparse_top_1_divergence_loss``: the sampled token, and the teacher's first one where ``beta < 1``."""
    ids, logprobs = reverse_token_ids[..., None], reverse_teacher_logprobs[..., None]
    if trainer.beta != 1:
        first = teacher_top1_token_ids[..., None]
        ids = torch.cat([first, torch.where(ids == first, -1, ids)], -1)
        logprobs = torch.cat([teacher_top1_logprobs[..., None], logprobs], -1)
    options = _reduced(labels, "batchmean", num_items_in_batch, student_log_probs)
    call = student_log_probs, ids, logprobs, trainer.loss_add_tail, trainer.beta
    return _sparse(*call, labels=labels, **options)


def chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Optional[Tensor],
    logit_scale: float,
    final_logit_softcapping: Optional[float],
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Optional[Tensor],
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``_chunked_jsd_loss`` of ``AsyncDistillationTrainer``: sums of losses and entropies, also by teacher."""
    hidden, weight, bias = _operands(hidden_valid, lm_head_weight, lm_head_bias)
    cap, scaled = _scaled(final_logit_softcapping, temperature, logit_scale)
    ids = torch.where(valid_candidate_mask, target_ids, -1)
    options: dict[str, Any] = {"temperature": scaled, "student_softcap": cap, "scale_by_t_squared": False}
    loss, stats = kd.linear_topk_kd_loss(
        hidden,
        weight,
        ids,
        teacher_target_logps,
        student_bias=bias,
        divergence=_common.generalized_jsd(beta),
        tail="bucket" if add_tail_bucket else "renormalize_both",
        teacher_temperature=1.0,
        reduction="sum",
        return_stats=True,
        **options,
    )
    with torch.no_grad():
        some = torch.zeros_like(ids[..., 0])
        entropy = kd.linear_token_logprobs(
            hidden, weight, some, bias=bias, temperature=scaled, softcap=cap, entropy=True
        ).entropy
        assert entropy is not None
        logprobs = torch.where(ids >= 0, teacher_target_logps.float(), -torch.inf)
        if add_tail_bucket:
            rest = torch.log1p(-logprobs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
            logprobs = torch.cat([logprobs, rest], -1)
        else:
            logprobs = logprobs - logprobs.logsumexp(-1, keepdim=True)
        of_teacher = -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(-1)
        per_teacher = stats.divergence.new_zeros(3 * num_teachers)
        if teacher_id_idx is not None:
            one_hot = torch.nn.functional.one_hot(teacher_id_idx, num_teachers).to(per_teacher.dtype)
            columns = torch.stack([torch.ones_like(of_teacher), stats.divergence, of_teacher], -1)
            per_teacher = (one_hot.T @ columns).reshape(-1)
    return loss, stats.divergence.sum(), entropy.sum(), of_teacher.sum(), per_teacher


def _gold(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """GOLD's loss, with TRL's own for what is no distribution."""

    def loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Optional[Tensor] = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        logits_are_probs: bool = False,
        num_items_in_batch: Items = None,
    ) -> Tensor:
        if logits_are_probs:
            return original(student_logits, teacher_logits, labels, beta, temperature, reduction, True)
        call = labels, beta, temperature, reduction, num_items_in_batch
        return generalized_jsd_loss(student_logits, teacher_logits, *call)

    return loss


_JSD = ("generalized_jsd_loss", generalized_jsd_loss)
_ON_SUPPORT = ("generalized_jsd_loss", generalized_jsd_loss_on_support)
_GOLD = ("generalized_jsd_loss", _gold(generalized_jsd_loss))
_CHUNKED = ("_chunked_divergence_loss", chunked_divergence_loss)
_ASYNC = ("_chunked_jsd_loss", chunked_jsd_loss)
_SERVER = (
    ("_compute_server_forward_kl_loss", server_forward_kl_loss),
    ("_compute_sparse_top_1_divergence_loss", sparse_top_1_divergence_loss),
)
_SELF = tuple((f.__name__, f) for f in (compute_full_logit_self_distillation_loss, compute_topk_self_distillation_loss))

# By module: its class, where the functions are a class's, and of each its name and what takes its place.
_PLACES: dict[str, tuple[Optional[str], tuple[tuple[str, Callable[..., Any]], ...]]] = {
    "trl.trainer.distillation_trainer": (None, (_CHUNKED,)),
    "trl.experimental.gkd.gkd_trainer": ("GKDTrainer", (_JSD,)),
    "trl.experimental.gold.gold_trainer": ("GOLDTrainer", (_GOLD,)),
    "trl.experimental.distillation.distillation_trainer": ("DistillationTrainer", (_ON_SUPPORT, *_SERVER)),
    "trl.experimental.iw_opd.iw_opd_trainer": ("IWOPDTrainer", (_ON_SUPPORT, *_SERVER)),
    "trl.experimental.server_distillation.server_distillation_trainer": ("ServerDistillationTrainer", _SERVER),
    "trl.experimental.sdft.sdft_trainer": (None, _SELF),
    "trl.experimental.sdpo.sdpo_trainer": (None, _SELF),
    "trl.experimental.async_distillation.async_distillation_trainer": (None, (_ASYNC,)),
}
# The functions of TRL that were replaced, by owner and name.
_originals: dict[tuple[Any, str], Any] = {}


def patch() -> list[str]:
    """Put the losses into the trainers of the installed TRL, in this process; return what was replaced.

    Trainers that this release lacks, or whose own requirements are not installed, are left out of the list. Calling it
    again changes nothing.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: the release is not known, or a function of it takes other arguments than are known.
    """
    version = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None
    if version is None:
        raise ImportError("kdkernels.compat.trl.patch needs TRL: pip install trl")
    known = re.match(r"1\.(\d+)", version)
    if known is None or int(known[1]) > LAST_MINOR:
        raise RuntimeError(
            f"kdkernels.compat.trl.patch knows trl 1.0 to 1.{LAST_MINOR}, got {version}: install one of these, a newer "
            "kdkernels, or replace the trainer's loss by hand, see docs/guide/compat.md"
        )
    found = [place for module in _PLACES for place in _functions(module, version)]
    for owner, name, loss in found:
        if (owner, name) not in _originals:
            original = inspect.getattr_static(owner, name)
            _originals[owner, name] = original
            static = isinstance(original, staticmethod)
            if loss is _GOLD[1]:
                loss = _gold(original.__func__)
            setattr(owner, name, staticmethod(loss) if static else loss)
    return [_path(owner, name) for owner, name, _ in found]


def unpatch() -> list[str]:
    """Put TRL's own losses back; return what was put back."""
    names = []
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
        names.append(_path(owner, name))
    _originals.clear()
    return names


def _functions(module: str, version: str) -> list[tuple[Any, str, Callable[..., Any]]]:
    """The functions of a module that have a counterpart here, each with the class or module that it belongs to."""
    kind, functions = _PLACES[module]
    try:
        owner = importlib.import_module(module)
    except ImportError:
        return []
    owner = getattr(owner, kind) if kind else owner
    found = []
    for name, known in functions:
        if not hasattr(owner, name):
            continue
        original = _originals.get((owner, name), inspect.getattr_static(owner, name))
        original = original.__func__ if isinstance(original, staticmethod) else original
        wanted, there = (
            [p for p in inspect.signature(f).parameters if p not in ("self", "trainer")] for f in (known, original)
        )
        if not set(there) <= set(wanted):
            strange = ", ".join(sorted(set(there) - set(wanted)))
            raise RuntimeError(
                f"kdkernels.compat.trl.patch does not know {_path(owner, name)} of trl {version} with {strange}: "
                "nothing was replaced"
            )
        found.append((owner, name, known))
    return found


def _path(owner: Any, name: str) -> str:
    return ".".join((*((owner.__module__, owner.__name__) if isinstance(owner, type) else (owner.__name__,)), name))
