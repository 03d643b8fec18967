"""The machine code of the dense CUDA kernels, and how many blocks of it a multiprocessor holds."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import dense_budgets
from dense_emulator import DenseCall, plan
from emulator import DTYPES, LIMITS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("call", dense_budgets.CALLS, ids=lambda call: dense_budgets.key(*call))
def test_budget(call):
    found, budget = dense_budgets.measured(*call), dense_budgets.read()[dense_budgets.key(*call)]
    assert not dense_budgets.excesses(found, budget), (found, budget)
    assert found["spilled"] == found["gpu_fences"] == found["cluster_barriers"] == 0


def test_the_table_has_these_calls_alone():
    assert list(dense_budgets.read()) == [dense_budgets.key(*call) for call in dense_budgets.CALLS]


@pytest.mark.parametrize(
    "change",
    [{"spilled": 4}, {"resident_blocks": 1}, {"blocks": 1}, {"source": "copies"}]
    + [{"registers": 230}, {"cluster_barriers": 1}, {"gpu_fences": 1}, {"block_barriers": 20}],
    ids=str,
)
def test_over_budget(change):
    budget = dense_budgets.read()["sm_90/forward_kl-V128256"]
    assert dense_budgets.excesses(budget, budget) == []
    assert dense_budgets.excesses({**budget, **change}, budget) == list(change)


def test_few_rows_are_spread_over_the_multiprocessors():
    def blocks(rows, columns):
        call = DenseCall(batch=1, length=rows, columns=columns, width=columns, kd_weight=1.0, multiprocessors=132)
        call.student_dtype = call.teacher_dtype = DTYPES[torch.bfloat16]
        call.shared_per_block, call.shared_per_multiprocessor, call.cluster = LIMITS[90]
        plan(call)
        return rows * call.plan_cluster

    assert [blocks(rows, 32000) for rows in (1, 8, 16, 64, 4096)] == [16, 128, 128, 256, 4 * 4096]
    assert blocks(16, 152064) == 256
