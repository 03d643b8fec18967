"""One call of each kernel on a GPU, through the public functions, against plain PyTorch in fp64."""

import pytest
import torch
from one_call import CALLS, check, compile_calls, lacking

from kdkernels import ops

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if torch.cuda.is_available():
        compile_calls()


# Of patterns that a backend never has there is nothing to skip.
PAIRS = [
    (call, backend)
    for backend in ("triton", "cuda")
    for call in CALLS
    if backend not in ops.LACKING.get(call.pattern, {})
]


@pytest.mark.parametrize(("call", "backend"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_against_the_reference(call, backend):
    reason = lacking(call, "cuda", backend)
    if reason is not None:
        pytest.skip(reason.splitlines()[0])
    assert check(call, "cuda", backend) is None
