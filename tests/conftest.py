"""For every test: seeds of its own, a sensible number of threads, and skips that cannot hide a failure.

With ``KDKERNELS_REQUIRE_ALL=1`` a skip is a failure, unless its reason says that the hardware is not there:
"this machine has no GPU", "... no AVX2", "... no AVX-512".
"""

import os
import random
import re
import zlib

import pytest
import torch

from kdkernels import backends

HARDWARE = re.compile(r"(Skipped: )?this machine has no (GPU|AVX2|AVX-512)\b")
REQUIRE_ALL = os.environ.get("KDKERNELS_REQUIRE_ALL", "0") not in ("", "0")


def pytest_configure(config):
    # Two threads, so that work is divided; more only make these small shapes slower.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))


def pytest_collection_modifyitems(items):
    # Files with slow tests first: of several processes none is left alone with one at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="this machine has no GPU"))


@pytest.fixture(autouse=True)
def seed(request):
    """A seed that depends on the test's name only, whatever runs before it."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    torch.manual_seed(value)


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    """Every backend that takes CPU tensors; the Triton one has tests of its own, in the interpreter."""
    _skip_without(request.param)
    return request.param


@pytest.fixture
def compiled_cpu():
    """For tests of the compiled CPU backend alone."""
    _skip_without("cpu")


def _skip_without(backend):
    reason = backends.BACKENDS[backend].why_not("cpu")
    if reason is not None:
        pytest.skip(reason)


def _fail_if_avoidable(report):
    if REQUIRE_ALL and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not HARDWARE.match(reason):
            report.outcome = "failed"
            report.longrepr = f"KDKERNELS_REQUIRE_ALL=1 allows no skip, and this one says: {reason}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    return _fail_if_avoidable((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):
    return _fail_if_avoidable((yield))
