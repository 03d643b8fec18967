"""The CUDA kernels of token log-probabilities on a GPU, against plain PyTorch in fp64 there."""

import pytest
import test_tokens
import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.testing import float64_anywhere

pytestmark = pytest.mark.gpu

DTYPES = {name: dtype for name, dtype in test_tokens.DTYPES.items() if name != "fp64"}


@pytest.fixture(autouse=True)
def needs_extension():
    reason = backends.cuda.why_not("cuda")
    if reason is not None:
        pytest.skip(reason)


def results(logits, ids, **options):
    leaf = logits.detach().requires_grad_()
    found, stats = kd.token_logprobs(leaf, ids, entropy=True, return_stats=True, **options)
    (grad,) = torch.autograd.grad(found.logprobs.sum() - found.entropy.sum(), leaf)
    return [item.detach().double() for item in (*found, *stats, grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 61, 4099, 50257, 128256, 262144])
def test_against_the_reference(columns, dtype):
    logits = (torch.randn(6, columns, device="cuda") * 3).to(DTYPES[dtype])
    for k in (None, 1, 50):
        ids = test_tokens.tokens(k, columns=columns).cuda()
        for options in ({}, {"temperature": 0.7, "softcap": 30.0}):
            *got, grad = results(logits, ids, backend="cuda", **options)
            with float64_anywhere():
                *want, exact = results(logits.double(), ids, backend="torch", **options)
            for value, wanted in zip(got, want, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(grad, exact, rtol=2 * torch.finfo(DTYPES[dtype]).eps + 1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [3, 2048])
def test_tails_against_the_reference(k):
    logits = torch.randn(4, 151937, device="cuda").bfloat16()
    ids = torch.stack([torch.randperm(151937, device="cuda")[:k] for _ in range(4)])
    got = kd.gather_logprobs(logits, ids, backend="cuda")
    with float64_anywhere():
        want = kd.gather_logprobs(logits.double(), ids, backend="torch")
    for value, wanted in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_stream_and_device_are_respected():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    logits, ids = torch.randn(6, 1000, device=device), torch.arange(6, device=device)
    want = kd.token_logprobs(logits, ids, backend="torch").logprobs
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = logits.clone()
        found = kd.token_logprobs(late, ids, backend="cuda").logprobs
    stream.synchronize()
    assert found.device == logits.device
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_deterministic_in_place_and_taken_by_auto():
    logits, ids = torch.randn(64, 50257, device="cuda").bfloat16(), torch.randint(0, 50257, (64, 5), device="cuda")
    assert backends.select("auto", "cuda", pattern="token_fwd") == "cuda"
    grads = []
    for inplace in (False, False, True):
        leaf = logits.clone().requires_grad_()
        found = kd.token_logprobs(leaf, ids, entropy=True, inplace_backward=inplace)
        grads.append(torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), leaf)[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
