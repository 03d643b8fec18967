"""Options of ``pytest benchmarks``: which suites, shapes and dtypes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import __main__ as command_line
from benchmarks.model import Absent, Case, load_suite


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kdkernels benchmarks")
    group.addoption("--suite", action="append", default=[], help="a suite, may be repeated (default: dense)")
    group.addoption("--shapes", type=_usage(command_line.shapes), help="NxV,... (default: the suite's quick shapes)")
    group.addoption("--dtypes", type=_usage(command_line.dtypes), help="NAME,... (default: the suite's)")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _usage(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_usage_error(text: str) -> Any:
        try:
            return parse(text)
        except argparse.ArgumentTypeError as error:
            raise pytest.UsageError(str(error)) from error

    return parse_or_usage_error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "candidate" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    device = command_line.resolve_device(option("--device"))
    parameters = []
    for name in option("--suite") or ["dense"]:
        suite = load_suite(name)
        for shape in option("--shapes") or suite.quick_shapes:
            for dtype in option("--dtypes") or suite.dtypes:
                case = Case(shape, dtype, device)
                for item in suite.make_candidates(case):
                    marks = [pytest.mark.skip(reason=item.reason)] if isinstance(item, Absent) else []
                    label = f"{suite.name}-{case}-{item.group}-{item.name}".replace(" ", "_")
                    parameters.append(pytest.param(suite, case, item, id=label, marks=marks))
    metafunc.parametrize("suite, case, candidate", parameters)
