"""Tensors on the second GPU while the first is the current one: where there are two."""

import pytest
import torch
from one_call import CALLS, check, lacking

pytestmark = pytest.mark.gpu

SOME = {call.name: call for call in CALLS if call.columns in (1000, 4097, 50257)}


@pytest.fixture
def second():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has no GPU beside the first")
    assert torch.cuda.current_device() == 0
    yield "cuda:1"
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", SOME)
def test_the_device_of_the_tensors_runs_the_kernel(second, name, backend):
    reason = lacking(SOME[name], "cuda", backend)
    if reason is not None:
        pytest.skip(reason.splitlines()[0])
    assert check(SOME[name], second, backend) is None
