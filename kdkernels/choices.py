"""The names that options may have as their values."""

from __future__ import annotations

from typing import Literal, get_args

Reduction = Literal["none", "sum", "mean", "batchmean"]
StudentForm = Literal["logits", "log_probs"]
TeacherForm = Literal["logits", "log_probs", "probs", "unnormalized_probs"]
Mixture = Literal["probs", "logits"]
Tail = Literal["bucket", "renormalize", "renormalize_both", "uniform", "drop"]
Backend = Literal["auto", "cuda", "triton", "cpu", "torch"]

Acceptance = Literal["nla", "hybrid"]

# Of an op: "signed" are logits some of whose weights may be below 0.
MIXTURES = (*get_args(Mixture), "signed")
# Ops know these by their place.
CODES = {
    "teacher_form": get_args(TeacherForm),
    "mixture": MIXTURES,
    "tail": get_args(Tail),
    "student_form": get_args(StudentForm),
}
