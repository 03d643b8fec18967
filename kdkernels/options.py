"""The fields of ``kdkernels.objective`` as keywords of a function, for type checkers and editors.

They know no other way to say which ``**options`` a function takes. A test holds names and types to those of the
dataclasses. ``return_stats`` is in the signatures, where it decides on the result's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, TypedDict, Union

import torch
from torch import Tensor

from kdkernels.choices import Acceptance, Backend, Mixture, Reduction, StudentForm, Tail, TeacherForm
from kdkernels.divergences import Divergence, DivergenceName
from kdkernels.objective import PerRow


class RowOptions(TypedDict, total=False):
    row_weight: Optional[PerRow]
    reduction: Reduction
    normalizer: Optional[PerRow]
    ignore_index: int
    vocab_size: Optional[int]
    backend: Backend


class _OnLogits(TypedDict, total=False):
    inplace: bool


class _OnShards(TypedDict, total=False):
    process_group: Optional[torch.distributed.ProcessGroup]


class _OnHidden(TypedDict, total=False):
    chunk_bytes: Optional[int]
    logits_dtype: Optional[torch.dtype]


class _Weighed(RowOptions, total=False):
    temperature: PerRow
    scale_by_t_squared: bool
    kd_weight: PerRow
    ce_weight: PerRow
    z_loss_weight: PerRow
    label_smoothing: float
    student_softcap: Optional[float]


class _Terms(_Weighed, total=False):
    divergence: Union[DivergenceName, Divergence]
    row_param: Optional[Tensor]


class _Logits(TypedDict, total=False):
    teacher_softcap: Optional[float]
    standardize: bool


class _Teacher(_Logits, total=False):
    teacher_temperature: Optional[PerRow]
    teacher_form: TeacherForm
    teacher_weights: Optional[Union[Sequence[float], Tensor]]
    mixture: Mixture
    teacher_lse: Optional[PerRow]


class _Sparse(_Terms, total=False):
    teacher_temperature: Optional[PerRow]
    tail: Tail
    min_tail: Optional[float]


class _Acceptance(_Teacher, _Weighed, total=False):
    kind: Acceptance
    eta: float
    eps: float


class ObjectiveOptions(_OnLogits, _OnShards, _Teacher, _Terms, total=False):
    """Of ``kd_loss``."""

    student_form: StudentForm
    dim: int


class TopKOptions(_OnLogits, _OnShards, _Sparse, total=False):
    """Of ``topk_kd_loss``."""


class LinearOptions(_OnHidden, _OnShards, _Teacher, _Terms, total=False):
    """Of ``linear_kd_loss``."""


class LinearTopKOptions(_OnHidden, _OnShards, _Sparse, total=False):
    """Of ``linear_topk_kd_loss``."""

    sparse_grad: bool


class TAIDOptions(_OnLogits, _OnShards, _Logits, _Terms, total=False):
    """Of ``taid_loss``, beside the interpolation."""


class LKOptions(_OnLogits, _OnShards, _Acceptance, total=False):
    """Of ``lk_loss``."""


class LinearLKOptions(_OnHidden, _OnShards, _Acceptance, total=False):
    """Of ``linear_lk_loss``."""

    return_stats: bool


class DKDOptions(_OnLogits, _OnShards, RowOptions, total=False):
    """Of ``dkd_loss``."""

    alpha: float
    beta: float
    temperature: float
    teacher_temperature: Optional[float]
    scale_by_t_squared: bool


class MSEOptions(_OnLogits, _OnShards, RowOptions, total=False):
    """Of ``logit_mse_loss``."""

    centered: bool


class ULDOptions(_OnLogits, RowOptions, total=False):
    """Of ``uld_loss``."""

    temperature: PerRow
    teacher_temperature: Optional[PerRow]
    teacher_vocab_size: Optional[int]
    exact: bool


class _Tokens(TypedDict, total=False):
    temperature: PerRow
    entropy: bool
    softcap: Optional[float]
    vocab_size: Optional[int]
    ignore_index: int
    backend: Backend


class TokenOptions(_Tokens, total=False):
    """Of ``token_logprobs``."""

    inplace_backward: bool
    process_group: Optional[torch.distributed.ProcessGroup]


class LinearTokenOptions(_OnHidden, _OnShards, _Tokens, total=False):
    """Of ``linear_token_logprobs``."""
