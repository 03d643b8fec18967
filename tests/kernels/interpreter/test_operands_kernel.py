"""Operands that change a row's arithmetic, in the Triton kernels."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import test_objective_operands as on_cpu

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture(params=["resident", "swept"])
def plans(request, monkeypatch):
    """Rows that stay in registers, and rows that are swept."""
    from kdkernels.kernels import tuning

    find = tuning.dense_plans

    def chosen(*args, **kwargs):
        wanted = [p for p in find(*args, **kwargs) if (p.pattern == "cluster") == (request.param == "resident")]
        return wanted or find(*args, **kwargs)

    monkeypatch.setattr(tuning, "dense_plans", chosen)


def test_mixed_kl(backend, plans):
    on_cpu.test_mixed_kl_of_a_value_per_row_on_the_closed_interval(backend, torch.float32)
    on_cpu.test_mixed_kl_at_0_and_1_is_forward_and_reverse_kl_where_the_other_is_infinite(backend)


@pytest.mark.parametrize("kind", ["nla", "hybrid"])
@pytest.mark.parametrize("others", ["alone", "hard", "standardize", "mixture"])
def test_lk_loss(backend, kind, others, plans):
    on_cpu.test_lk_loss_beside_other_options(backend, kind, others)


def test_signed_mixtures(backend):
    on_cpu.test_signed_mixtures(backend, torch.float32, (1.0, 0.5, -0.5))
    on_cpu.test_what_a_teacher_rules_out_stays_ruled_out_whatever_its_sign(backend)
    on_cpu.test_a_teacher_of_weight_0_counts_nothing_and_an_infinite_logit_is_no_number(backend)


@pytest.mark.parametrize("part", on_cpu.PARTS)
def test_teacher_lse(backend, part, plans):
    on_cpu.test_teacher_lse_beside_other_options(backend, part, "caps")
    on_cpu.test_teacher_lse_of_a_teacher_that_has_nothing_here(backend, part)


def test_mixed_kl_of_sparse_teachers(backend):
    on_cpu.test_mixed_kl_of_sparse_teachers_is_both_calls(backend, "uniform")
