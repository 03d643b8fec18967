"""``linear_token_logprobs`` over the Triton kernels."""

import pytest
import test_linear_tokens as on_hidden

import kdkernels as kd


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["entropy", "a temperature a row"])
def test_values_and_gradients(name, dtype):
    on_hidden.test_values_and_gradients(name, None, dtype, "triton")


def test_several_tokens_a_row():
    on_hidden.test_values_and_gradients("a softcap", 3, "fp32", "triton")


def test_gathered_from_hidden_states():
    on_hidden.test_gathered_from_hidden_states("triton")


def test_the_backend_ran():
    hidden, weight, bias, ids = on_hidden.operands()
    assert kd.backends.choose("triton", hidden, pattern="token_fwd") == "triton"
