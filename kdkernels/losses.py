"""The losses as ``torch.nn.Module``: each holds its options, and the rest is ``kdkernels.functional``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from kdkernels import functional, linear
from kdkernels.capture import TeacherExpectation
from kdkernels.objective import LinearObjective, LinearTopKObjective, Objective, Options, TopKObjective, takes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.options import LinearOptions, LinearTopKOptions, ObjectiveOptions, TopKOptions


class _Loss(torch.nn.Module):
    """Options are checked when the module is built, tensors when it is called."""

    kind: ClassVar[type[Options]]

    def __init__(self, *positional: Any, **options: Any) -> None:
        if positional:
            raise TypeError(
                f"{type(self).__name__} takes keywords alone, such as temperature=2.0, got {positional[0]!r}"
            )
        super().__init__()
        self.objective: Any = self.kind.of(options)

    def extra_repr(self) -> str:
        return str(self.objective)


class KDLoss(_Loss):
    """``kd_loss`` as a module: ``KDLoss(**options)(student, teacher, labels)``, with the options of ``kd_loss``.

    Options are checked when the module is built, tensors when it is called. ``objective`` holds them.

    Example:
        >>> loss = KDLoss(temperature=2.0, reduction="batchmean")
        >>> loss(torch.zeros(2, 4), torch.zeros(2, 4)).item()
        0.0
    """

    kind = Objective

    if TYPE_CHECKING:

        def __init__(self, *, return_stats: bool = False, **options: Unpack[ObjectiveOptions]) -> None: ...

    def forward(
        self,
        student: Tensor,
        teacher: functional.Teachers = None,
        labels: Optional[Tensor] = None,
        *,
        student_bias: Optional[Tensor] = None,
        teacher_bias: Optional[Tensor] = None,
        teacher_columns: Optional[Tensor] = None,
    ) -> Any:
        if student_bias is None and teacher_bias is None and teacher_columns is None:
            return functional.dense(self.objective, student, teacher, labels)
        of_columns = (student_bias, teacher_bias, teacher_columns)
        return functional.dense(self.objective, student, teacher, labels, of_columns)


class TopKKDLoss(_Loss):
    """``topk_kd_loss`` as a module: ``TopKKDLoss(**options)(student, teacher_ids, teacher_logprobs, labels)``.

    See ``kdkernels.topk_kd_loss`` for the options; they are checked when the module is built, tensors when it is
    called. A captured ``tail_logprob`` goes to the call.

    Example:
        >>> loss = TopKKDLoss(tail="renormalize")
        >>> round(loss(torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log()).item(), 4)  # log 2
        0.6931
    """

    kind = TopKObjective

    if TYPE_CHECKING:

        def __init__(self, *, return_stats: bool = False, **options: Unpack[TopKOptions]) -> None: ...

    def forward(
        self,
        student: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        labels: Optional[Tensor] = None,
        *,
        tail_logprob: Optional[Tensor] = None,
    ) -> Any:
        return functional.topk(
            self.objective, student, teacher_ids, teacher_logprobs, labels, tail_logprob=tail_logprob
        )


class LinearKDLoss(_Loss):
    """``linear_kd_loss`` as a module: ``LinearKDLoss(**options)(student_hidden, student_weight, teacher_hidden, ...)``.

    See ``kdkernels.linear_kd_loss`` for the options; they are checked when the module is built, tensors when it is
    called. It holds no weight: heads are handed in, as tensors or as the modules that they are the weights of.

    Example:
        >>> hidden, head = torch.randn(8, 16), torch.nn.Linear(16, 100)
        >>> LinearKDLoss(temperature=2.0)(hidden, head, hidden, head).item() < 1e-6
        True
    """

    kind = LinearObjective

    if TYPE_CHECKING:

        def __init__(self, *, return_stats: bool = False, **options: Unpack[LinearOptions]) -> None: ...

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
        teacher_expectation: Optional[TeacherExpectation] = None,
    ) -> Any:
        return linear.dense(
            self.objective,
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            teacher_expectation=teacher_expectation,
        )


class LinearTopKKDLoss(_Loss):
    """``linear_topk_kd_loss`` as a module: ``LinearTopKKDLoss(**options)(student_hidden, student_weight, ...)``.

    See ``kdkernels.linear_topk_kd_loss`` for the options; they are checked when the module is built, tensors when it is
    called. It holds no weight: the head is handed in, as a tensor or as a module. A captured ``tail_logprob`` goes to
    the call.

    Example:
        >>> hidden, head = torch.randn(2, 16), torch.nn.Linear(16, 100)
        >>> LinearTopKKDLoss()(hidden, head, torch.tensor([[1], [2]]), torch.zeros(2, 1)).shape
        torch.Size([])
    """

    kind = LinearTopKObjective

    if TYPE_CHECKING:

        def __init__(self, *, return_stats: bool = False, **options: Unpack[LinearTopKOptions]) -> None: ...

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
        return linear.topk(
            self.objective,
            student_hidden,
            student_weight,
            teacher_ids,
            teacher_logprobs,
            labels,
            student_bias=student_bias,
            tail_logprob=tail_logprob,
        )


for _module in (KDLoss, TopKKDLoss, LinearKDLoss, LinearTopKKDLoss):
    takes(_module.kind)(_module)
