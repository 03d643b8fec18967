"""The losses as ``torch.nn.Module``: they store keyword arguments and call ``kdkernels.functional``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kdkernels import functional, linear


class TopKKDLoss(torch.nn.Module):
    """``topk_kd_loss`` as a module: ``TopKKDLoss(**options)(student, teacher_ids, teacher_logprobs, labels)``.

    See ``kdkernels.topk_kd_loss`` for the options; they are checked when the module is built, tensors when it is
    called. A captured ``tail_logprob`` goes to the call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        functional.check_topk_options(options)
        self.options = options

    def forward(
        self,
        student: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        labels: Optional[Tensor] = None,
        *,
        tail_logprob: Optional[Tensor] = None,
    ) -> Any:
        return functional.topk_kd_loss(
            student, teacher_ids, teacher_logprobs, labels, tail_logprob=tail_logprob, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KDLoss(torch.nn.Module):
    """``kd_loss`` as a module: ``KDLoss(**options)(student, teacher, labels)``, with the options of ``kd_loss``.

    Options are checked when the module is built, tensors when it is called.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        functional.check_options("kd_loss", options)
        self.options = options

    def forward(self, student: Tensor, teacher: Tensor, labels: Optional[Tensor] = None) -> Any:
        return functional.kd_loss(student, teacher, labels, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearKDLoss(torch.nn.Module):
    """``linear_kd_loss`` as a module: ``LinearKDLoss(**options)(student_hidden, student_weight, teacher_hidden, ...)``.

    See ``kdkernels.linear_kd_loss`` for the options; they are checked when the module is built, tensors when it is
    called. It holds no weight: heads are handed in, as tensors or as the modules that they are the weights of.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        linear.check_linear_options(options)
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Union[Tensor, torch.nn.Module],
        teacher_hidden: Any = None,
        teacher_weight: Any = None,
        labels: Optional[Tensor] = None,
        *,
        student_bias: Optional[Tensor] = None,
        teacher_bias: Any = None,
        teacher_logits: Optional[Callable[..., Any]] = None,
    ) -> Any:
        return linear.linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearTopKKDLoss(torch.nn.Module):
    """``linear_topk_kd_loss`` as a module: ``LinearTopKKDLoss(**options)(student_hidden, student_weight, ...)``.

    See ``kdkernels.linear_topk_kd_loss`` for the options; they are checked when the module is built, tensors when it is
    called. It holds no weight: the head is handed in, as a tensor or as a module. A captured ``tail_logprob`` goes to
    the call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        linear.check_linear_topk_options(options)
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Union[Tensor, torch.nn.Module],
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        labels: Optional[Tensor] = None,
        *,
        student_bias: Optional[Tensor] = None,
        tail_logprob: Optional[Tensor] = None,
    ) -> Any:
        return linear.linear_topk_kd_loss(
            student_hidden,
            student_weight,
            teacher_ids,
            teacher_logprobs,
            labels,
            student_bias=student_bias,
            tail_logprob=tail_logprob,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
