"""A ``Trainer`` of Hugging Face transformers that distils.

The loss is ``kd_loss`` of the logits of both models, with any of its options. The labels of a causal model are shifted
here, and -100 masks; the sum is divided by the ``num_items_in_batch`` that the ``Trainer`` counts over accumulated
batches and devices, which is what its own losses do.

Source: transformers 5.24, ``trainer.py`` (``compute_loss_func``, there since 4.46).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.objective import Objective

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("kdkernels.compat.transformers needs the Trainer: pip install transformers accelerate") from error

# Options that are the trainer's.
_OWN = ("reduction", "normalizer", "return_stats")


class KDTrainer(Trainer):
    """A ``Trainer`` with a teacher: ``KDTrainer(model, args, teacher_model=teacher, kd_options={"temperature": 2.0})``.

    Args:
        teacher_model: a model that takes the student's inputs. It is moved to the student's device, in ``eval()`` and
            without gradients.
        kd_options: of ``kd_loss``, such as ``divergence``, ``temperature``, ``kd_weight``, ``ce_weight``; also
            ``vocab_size`` where the two are padded to different widths.
        shift_labels: the logits of a token are about the next one, as those of causal models are. Give False for
            classifiers and masked models.
        args, kwargs: as of ``Trainer``, but for ``compute_loss_func``.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: torch.nn.Module,
        kd_options: Optional[Mapping[str, Any]] = None,
        shift_labels: bool = True,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name in Objective.defaults:
                raise TypeError(f"{name} is an option of kd_loss: pass kd_options={{{name!r}: ...}}")
        options = dict(kd_options or {})
        for name in _OWN:
            if name in options:
                raise TypeError(f"kd_options must not have {name!r}, which the trainer gives itself")
        # A name that is no option is an error here, not at the first batch.
        Objective.of(options)
        if not isinstance(teacher_model, torch.nn.Module):
            raise TypeError(f"teacher_model must be a torch.nn.Module, got {type(teacher_model).__name__}")
        super().__init__(*args, compute_loss_func=self.kd_loss, **kwargs)
        self.kd_options, self.shift_labels = options, shift_labels
        teacher_model.requires_grad_(False).eval()
        self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)
        self._inputs: dict[str, Any] = {}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The ``Trainer``'s own, with the teacher's inputs at hand."""
        self._inputs = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def kd_loss(self, outputs: Any, labels: Optional[Tensor], num_items_in_batch: Any = None) -> Tensor:
        """The loss of a batch; ``num_items_in_batch`` tokens are those of the whole one."""
        if labels is None:
            raise ValueError("labels must be among the inputs of a batch: they are the mask, with -100 in padding")
        with torch.no_grad():
            teacher = self.teacher_model(**self._inputs).logits
        student = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if self.shift_labels:
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        options: dict[str, Any] = dict(self.kd_options)
        if num_items_in_batch is not None:
            count = num_items_in_batch
            options |= {"reduction": "sum", "normalizer": count.flatten()[0] if isinstance(count, Tensor) else count}
        return kd.kd_loss(student, teacher, labels, **options)
