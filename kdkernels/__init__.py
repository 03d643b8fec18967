"""kdkernels: fused distillation losses for PyTorch."""

from typing import TYPE_CHECKING

from kdkernels import alignment, divergences, onpolicy
from kdkernels.akl import akl_ratio
from kdkernels.attention import attention_kd_loss, relation_kd_loss
from kdkernels.capture import TeacherExpectation, TeacherTopK, capture_samples, capture_topk, capture_topp
from kdkernels.divergences import *  # noqa: F403
from kdkernels.features import feature_loss
from kdkernels.functional import dkd_loss, kd_loss, lk_loss, logit_mse_loss, taid_loss, topk_kd_loss, uld_loss
from kdkernels.linear import linear_kd_loss, linear_lk_loss, linear_topk_kd_loss
from kdkernels.linear_capture import capture_expectation
from kdkernels.linear_tokens import linear_gather_logprobs, linear_token_logprobs
from kdkernels.losses import KDLoss, LinearKDLoss, LinearTopKKDLoss, TopKKDLoss
from kdkernels.packing import TopKLayout
from kdkernels.registry import register_divergence, unregister_divergence
from kdkernels.sinkhorn import sinkhorn_bias
from kdkernels.stats import KDStats, TokenStats, TopKStats
from kdkernels.tokens import TokenLogprobs, gather_logprobs, token_logprobs

__version__ = "0.2.0"

__all__ = [
    "KDLoss",
    "KDStats",
    "LinearKDLoss",
    "LinearTopKKDLoss",
    "TeacherExpectation",
    "TeacherTopK",
    "TokenLogprobs",
    "TokenStats",
    "TopKKDLoss",
    "TopKLayout",
    "TopKStats",
    "akl_ratio",
    "alignment",
    "attention_kd_loss",
    "capture_expectation",
    "capture_samples",
    "capture_topk",
    "capture_topp",
    "dkd_loss",
    "feature_loss",
    "gather_logprobs",
    "kd_loss",
    "linear_gather_logprobs",
    "linear_kd_loss",
    "linear_lk_loss",
    "linear_token_logprobs",
    "linear_topk_kd_loss",
    "lk_loss",
    "logit_mse_loss",
    "onpolicy",
    "register_divergence",
    "relation_kd_loss",
    "sinkhorn_bias",
    "taid_loss",
    "token_logprobs",
    "topk_kd_loss",
    "uld_loss",
    "unregister_divergence",
]
__all__ += divergences.__all__

if not TYPE_CHECKING:
    # Hidden from type checkers, to which every name would exist.
    def __getattr__(name):
        from kdkernels.checks import meant

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{meant(name, __all__)}")
