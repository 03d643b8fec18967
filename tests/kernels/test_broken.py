"""Tests of the tests: a kernel that is broken on purpose makes the checks of this folder fail."""

import contextlib
import re
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("ptxrun", reason="the package ptxrun, which executes PTX on the CPU, is not installed")

import budgets
import triton
from launches import dense
from oracle import check, dense_rows
from ptxrun import MemoryFault
from test_emulated import assert_clean, executed, make, reads_of

from kdkernels.kernels import tuning

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def edited(pattern, replacement):
    """Edits the PTX of every kernel that is compiled inside."""
    compile_ = triton.compile

    def broken(*args, **kwargs):
        kernel = compile_(*args, **kwargs)
        ptx, edits = re.subn(pattern, replacement, kernel.asm["ptx"])
        assert edits, f"the PTX has no {pattern}"
        kernel.asm["ptx"] = ptx
        return kernel

    with mock.patch.object(triton, "compile", broken):
        yield


def run(arch, V):
    student, teacher = make(2, V, torch.bfloat16)
    with executed(arch) as reports:
        check(dense, dense_rows, student, [teacher], divergence="jsd", param0=0.5)
    return reports[0], student


@pytest.mark.parametrize("arch, V", [(80, 1008), (90, 5008)], ids=str)
def test_missing_mask(arch, V):
    with edited(r"@%p\d+ (ld\.global)", r"\1"), pytest.raises(MemoryFault):
        run(arch, V)


@pytest.mark.parametrize(
    "arch, V, barrier",
    [(80, 2048, r"bar\.sync[^;]*;"), (90, 32768, r"barrier\.cluster\.(arrive|wait)[^;]*;")],
    ids=["block", "cluster"],
)
def test_missing_barrier(arch, V, barrier):
    student, teacher = make(1, V, torch.bfloat16)
    with edited(barrier, ""), executed(arch) as reports:
        dense(student, [teacher], torch.empty_like(student), divergence="jsd", param0=0.5)
    assert not reports[0].ok


def test_one_extra_pass():
    """The same result by sweeps: only the traffic tells."""
    plans = tuning.dense_plans

    def sweeps_only(*args, **options):
        return plans(*args, **{**options, "resident_load": None})

    with mock.patch.object(tuning, "dense_plans", sweeps_only):
        report, student = run(90, 20480)
    assert_clean(report, student, reads_of("jsd", 20480), 1, 20480)
    with pytest.raises(AssertionError):
        assert_clean(report, student, 4, 1, 20480)


@pytest.mark.parametrize(
    "change",
    [
        {"spilled": 8},
        {"resident_blocks": 1},
        {"loads": {"8": 32}},
        {"instructions": 25.0},
        {"transcendental": 2.3},
        {"cluster_reductions": 3},
        {"pattern": "sweeps"},
    ],
    ids=str,
)
def test_over_budget(change):
    budget = budgets.read()["sm_90/forward_kl"]
    assert budgets.excesses(budget, budget) == []
    assert budgets.excesses({**budget, **change}, budget) == list(change)
