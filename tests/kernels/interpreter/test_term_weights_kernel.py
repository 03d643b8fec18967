"""Weights of terms per row, and the cross entropy of statistics, in the Triton kernels."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import test_term_weights as on_cpu
from test_term_weights import rows  # noqa: F401, a fixture

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def backend():
    return "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_losses_and_gradients(backend, rows, dtype, divergence):  # noqa: F811
    on_cpu.test_losses_and_gradients_by_the_book(backend, rows, dtype, divergence, 2.0)


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both", "uniform"])
def test_sparse_teachers(backend, rows, tail):  # noqa: F811
    on_cpu.test_sparse_teachers(backend, rows, tail)


@pytest.mark.parametrize(
    "name",
    [
        "test_a_term_of_weight_0_counts_nothing_be_it_nan",
        "test_rows_of_distillation_beside_rows_of_labels",
        "test_statistics_are_of_terms_without_their_weights",
        "test_the_cross_entropy_is_told_whatever_it_weighs",
    ],
)
def test_the_same_as_on_a_cpu(backend, rows, name):  # noqa: F811
    getattr(on_cpu, name)(backend, rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_teacher(backend, rows, smoothing):  # noqa: F811
    on_cpu.test_without_a_teacher(backend, rows, smoothing, inplace=False)


def test_the_teacher_s_gradient(backend, rows):  # noqa: F811
    on_cpu.test_the_teacher_s_gradient_is_weighed_alike(backend, rows, "jsd")
