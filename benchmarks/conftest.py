"""The option of ``pytest benchmarks``: which suites. ``-k`` chooses among their quick shapes, dtypes and candidates."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import resolve_device
from benchmarks.model import SUITES, Absent, Case, load_suite


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", action="append", choices=SUITES, help="may be repeated (default: dense)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "candidate" not in metafunc.fixturenames:
        return
    parameters, device = [], resolve_device("auto")
    for suite in map(load_suite, metafunc.config.getoption("--suite") or ["dense"]):
        for case in [Case(shape, dtype, device) for shape in suite.quick_shapes for dtype in suite.dtypes]:
            for item in suite.make_candidates(case):
                marks = [pytest.mark.skip(reason=item.reason)] if isinstance(item, Absent) else []
                label = f"{suite.name}-{case}-{item.group}-{item.name}".replace(" ", "_")
                parameters.append(pytest.param(suite, case, item, id=label, marks=marks))
    metafunc.parametrize("suite, case, candidate", parameters)
