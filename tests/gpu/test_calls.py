"""One call of each kernel on a GPU, through the public functions, against plain PyTorch in fp64."""

import pytest
import torch
from one_call import CALLS, check, compile_calls, lacking

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if torch.cuda.is_available():
        compile_calls()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_against_the_reference(call, backend):
    reason = lacking(call, "cuda", backend)
    if reason is not None:
        pytest.skip(reason.splitlines()[0])
    assert check(call, "cuda", backend) is None
