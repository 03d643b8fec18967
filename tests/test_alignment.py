"""Spans of two tokenisations of one text."""

import doctest
import random

import pytest
import torch

import kdkernels as kd
from kdkernels import alignment
from kdkernels.alignment import byte_spans


def cut(length, ends):
    """Offsets of tokens with these ends."""
    ends = sorted({*ends, length})
    return list(zip([0, *ends[:-1]], ends, strict=True))


def pieces(spans):
    return [((s.start, s.stop), (t.start, t.stop)) for s, t in spans]


def test_the_spans_are_the_finest_that_end_together():
    for _ in range(200):
        length = random.randint(1, 30)
        sides = [cut(length, random.choices(range(1, length + 1), k=random.randint(0, 12))) for _ in range(2)]
        spans = byte_spans(*sides)
        common = sorted({end for _, end in sides[0]} & {end for _, end in sides[1]})
        for side, of_side in zip(sides, zip(*spans, strict=True), strict=True):
            # Together they are all tokens, once and in order, and each ends at a common end, with none within.
            assert [i for s in of_side for i in range(s.start, s.stop)] == list(range(len(side)))
            assert [side[s.stop - 1][1] for s in of_side] == common


def test_only_where_tokens_end_counts():
    # "a bc": one side leaves the space out, the other has it with the word.
    assert pieces(byte_spans([(0, 1), (2, 4)], [(0, 1), (1, 4)])) == [((0, 1), (0, 1)), ((1, 2), (1, 2))]


def test_tokens_without_text_are_in_no_span_of_their_own():
    spans = byte_spans([(0, 0), (0, 3), (3, 5), (0, 0)], [(0, 2), (2, 2), (2, 3), (3, 5), (5, 5)])
    assert pieces(spans) == [((1, 2), (0, 3)), ((2, 3), (3, 4))]


def test_bytes_of_one_character_stay_together():
    spans = byte_spans([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)])
    assert pieces(spans) == [((0, 1), (0, 1)), ((1, 4), (1, 2)), ((4, 5), (2, 3))]


def test_what_follows_the_last_common_end_is_left_out():
    assert pieces(byte_spans([(0, 2), (2, 4), (4, 7)], [(0, 4), (4, 6)])) == [((0, 2), (0, 1))]
    assert byte_spans([(0, 3)], [(0, 2)]) == [] == byte_spans([], [(0, 2)])


def test_tensors_of_a_tokenizer_are_taken():
    offsets = torch.tensor([[0, 2], [2, 3]])
    assert byte_spans(offsets, offsets.int()) == byte_spans([(0, 2), (2, 3)], [[0, 2], [2, 3]])


@pytest.mark.parametrize(
    "offsets, error, words",
    [
        (3, TypeError, "student_offsets must be pairs of a start and an end, got int"),
        ([(0, 1), 2], TypeError, "student_offsets must be pairs of two integers.* got 2 at 1"),
        ([(0, 1.0)], TypeError, "got \\(0, 1.0\\) at 0"),
        (torch.zeros(2), TypeError, "got 0.0 at 0"),
        ([(3, 1)], ValueError, "got \\(3, 1\\) at 0"),
        ([(0, 4), (1, 3)], ValueError, "got \\(1, 3\\) at 1 behind one that ends at 4"),
    ],
)
def test_errors_name_the_argument(offsets, error, words):
    with pytest.raises(error, match=words):
        kd.alignment.byte_spans(offsets, [(0, 1)])
    with pytest.raises(error, match=words.replace("student", "teacher")):
        kd.alignment.byte_spans([(0, 1)], offsets)


def test_the_example_is_right():
    assert doctest.testmod(alignment).failed == 0
