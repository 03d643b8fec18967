"""A teacher known by its expectations over the Triton kernels, which see a uniform one."""

import pytest
import test_expectation


@pytest.mark.parametrize("name, dtype", [("terms", "bf16"), ("a temperature a row", "fp32")])
def test_loss_and_gradient(name, dtype):
    test_expectation.test_loss_and_gradient(name, True, dtype, "triton")


def test_rows_without_a_distribution_stay_by_themselves():
    test_expectation.test_rows_without_a_distribution_stay_by_themselves("triton")


def test_no_row_that_counts_and_no_row():
    test_expectation.test_no_row_that_counts_and_no_row("triton")
