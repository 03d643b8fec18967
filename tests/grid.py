"""Parts of a grid of tests that lose no pair."""

from itertools import combinations, product

import pytest


def pairwise(names, *axes):
    """A mark with the product of the first two axes, along which the others run: every two values of any two axes meet.

    The rule for a grid: whole in the axes that choose code together (one kernel is compiled for each dtype, memory and
    form of the objective), pairwise in those that do not interact, as sizes and what is compiled. A value that is a
    tuple stands for several names.
    """
    first, second, *others = [list(axis) for axis in axes]
    cases = [
        (a, b, *(axis[(i + k * j) % len(axis)] for k, axis in enumerate(others, 1)))
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
    ]
    for one, two in combinations(range(len(axes)), 2):
        met = {(case[one], case[two]) for case in cases}
        assert met == set(product(axes[one], axes[two])), "two values never meet: longer axes first"
    flat = [[x for value in case for x in (value if isinstance(value, tuple) else (value,))] for case in cases]
    return pytest.mark.parametrize(names, flat, ids=["-".join(str(x) for x in case) for case in flat])
