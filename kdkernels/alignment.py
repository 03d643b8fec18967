"""Two tokenisations of one text, side by side: for distillation between models whose tokens differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from torch import Tensor

from kdkernels import checks

Offsets = Union[Tensor, Sequence[Sequence[int]]]

__all__ = ["byte_spans"]


def byte_spans(student_offsets: Offsets, teacher_offsets: Offsets) -> list[tuple[slice, slice]]:
    r"""The smallest groups of tokens that end together in two tokenisations of one text.

    A cut is a place of the text where a token ends on both sides. Between two cuts stand one or more tokens of each
    side, which say the same piece of text: a span is the slice of the one and the slice of the other.

    Args:
        student_offsets, teacher_offsets: ``(L, 2)``, the start and the end of each token in the text, in its order:
            bytes, or characters where both are (``return_offsets_mapping=True`` of a fast tokenizer). Tokens without
            text, of equal start and end, such as special tokens, belong to no span. Only where tokens end must agree:
            a space that one tokenizer leaves out between two tokens does no harm. Of a batch, one sample a call.

    Returns:
        A list of pairs ``(student's slice, teacher's slice)`` in the order of the text, none of them empty. Tokens
        after the last cut, as where one side was cut off, are in none. A token without text amid a span stands within
        its slice.

    Raises:
        TypeError, ValueError: naming the argument, where offsets are no pairs of integers or go backwards.

    Example:
        The log-probability of each piece of text, at the student::

            spans = kd.alignment.byte_spans(student_offsets, teacher_offsets)
            pieces = torch.stack([logprobs[s].sum() for s, _ in spans])

    >>> byte_spans([(0, 2), (2, 5), (5, 6)], [(0, 5), (5, 5), (5, 6)])
    [(slice(0, 2, None), slice(0, 1, None)), (slice(2, 3, None), slice(2, 3, None))]
    """
    student = _with_text("student_offsets", student_offsets)
    teacher = _with_text("teacher_offsets", teacher_offsets)
    # Bytes of one character are several tokens of one end in offsets of characters: the last one closes the group.
    last_student = {end: place for place, (_, end) in enumerate(student)}
    last_teacher = {end: place for place, (_, end) in enumerate(teacher)}
    spans, s, t = [], 0, 0
    for end in last_student:
        if end in last_teacher:
            s_last, t_last = last_student[end], last_teacher[end]
            spans.append((slice(student[s][0], student[s_last][0] + 1), slice(teacher[t][0], teacher[t_last][0] + 1)))
            s, t = s_last + 1, t_last + 1
    return spans


def _with_text(name: str, value: Offsets) -> list[tuple[int, int]]:
    """Index and end of the tokens that have text."""
    return [(i, end) for i, (start, end) in enumerate(checks.offsets(name, value)) if end > start]
