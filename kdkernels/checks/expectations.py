"""A teacher's expectations under a student's head that is frozen."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import symbols
from kdkernels.checks.rows import per_row
from kdkernels.checks.tensors import dtype_name, floating, reads_values, same_device, tensor


def expectation_alone(options: Any, *others: Any) -> None:
    """``teacher_expectation`` stands alone, with options that a linear function of the log-probabilities bears."""
    name = "teacher_expectation"
    if any(item is not None for item in others):
        raise ValueError(
            f"{name} takes the place of teacher_hidden, teacher_weight, teacher_bias and teacher_logits: give one"
        )
    if options.resolved.entropy_weight is None:
        raise ValueError(
            f"divergence must be 'forward_kl' or 'soft_ce' with {name}, got {options.resolved.name!r}: others need all "
            "of the teacher's probabilities"
        )
    reasons = {
        "standardize": "no product of the head with the teacher's probabilities is left then",
        "student_softcap": "no product of the head with the teacher's probabilities is left then",
        "teacher_softcap": "that is an option of capture_expectation",
        "teacher_lse": "its normaliser is that of the capture",
        "teacher_weights": "average the probabilities of several teachers before they are captured",
        "return_stats": "they need all of the teacher's probabilities",
    }
    for option, reason in reasons.items():
        if (value := getattr(options, option)) is not None and value is not False:
            raise ValueError(f"{option} does not go with {name}, got {value!r}: {reason}")
    if options.teacher_form != "logits":
        raise ValueError(f"teacher_form must be 'logits' with {name}, got {options.teacher_form!r}")
    if options.logits_dtype is not None and options.logits_dtype.itemsize == 2:
        raise ValueError(
            f"logits_dtype must be float32 or None with {name}, got {dtype_name(options.logits_dtype)}: the gradient "
            "is the difference of two products as large as the head"
        )


def frozen_head(weight: Tensor, bias: Optional[Tensor]) -> None:
    """A student's head that gets no gradient, with a bias that no product makes NaN."""
    for name, value in (("student_weight", weight), ("student_bias", bias)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad with teacher_expectation: its gradient needs all of the teacher's "
                "probabilities, and the expectation is of the head as it was; freeze it with requires_grad_(False), or "
                "pass it detached"
            )
    finite_bias("student_bias", bias)


def finite_bias(name: str, bias: Optional[Tensor]) -> None:
    """A bias of which an expectation can be taken."""
    if bias is not None and reads_values(bias) and not bool(bias.isfinite().all()):
        raise ValueError(
            f"{name} must be finite where expectations are taken; leave columns without a token out with vocab_size=..."
        )


def expectation(value: Any, temperature: Any, hidden: Tensor, student: Tensor, bias: Optional[Tensor]) -> None:
    """A teacher's expectations suit the student's hidden states, its head's ``bias`` and the teacher's temperature."""
    name = "teacher_expectation"
    # Any NamedTuple of these names: pickles and collators make others.
    if not all(hasattr(value, field) for field in ("expectation", "entropy", "bias", "temperature")):
        raise TypeError(f"{name} must be a TeacherExpectation, got {type(value).__name__}")
    rows = hidden.shape[:-1]
    for field, shape in (("expectation", hidden.shape), ("entropy", rows), ("bias", rows)):
        item = getattr(value, field)
        if item is None and field == "bias":
            continue
        tensor(f"{name}.{field}", item)
        floating(f"{name}.{field}", item)
        same_device(f"{name}.{field}", item, hidden, "student_hidden's")
        if item.shape != shape:
            raise ValueError(f"{name}.{field} must have shape {tuple(shape)}, got {tuple(item.shape)}")
    if (value.bias is None) != (bias is None):
        has, had = ("no", "a") if bias is None else ("a", "no")
        raise ValueError(f"{name} was captured with {had} bias of the student's head, and the head has {has} bias")
    captured = value.temperature
    if isinstance(captured, Tensor) != isinstance(temperature, Tensor):
        kinds = ("one per row", "a number") if isinstance(captured, Tensor) else ("a number", "one per row")
        raise ValueError(f"teacher_temperature must be {name}'s, which is {kinds[0]}, got {kinds[1]}")
    same = captured is temperature
    if isinstance(captured, Tensor):
        known, asked = (per_row("temperature", item, student) for item in (captured, temperature))
        assert isinstance(known, Tensor) and isinstance(asked, Tensor)
        same = same or not (reads_values(captured) and reads_values(temperature)) or torch.equal(known, asked)
        if not same:
            raise ValueError(f"teacher_temperature must be the one per row that {name} was captured at, got others")
    elif not same and captured != temperature:
        raise ValueError(
            f"teacher_temperature must be {captured}, at which {name} was captured, got {symbols.shown(temperature)}; "
            "it is temperature where it is not given"
        )
