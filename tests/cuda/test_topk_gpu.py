"""The CUDA backend on a GPU, through the public function, against plain PyTorch in fp64 there."""

import pytest
import torch
from test_topk import DIVERGENCES, evaluate, ragged, temperatures

import kdkernels as kd
from kdkernels import backends
from kdkernels.choices import CODES
from kdkernels.testing import float64_anywhere

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("forward_kl", "reverse_kl", "jsd", "tvd", "alpha_beta")


@pytest.fixture(autouse=True)
def needs_extension():
    reason = backends.cuda.why_not("cuda")
    if reason is not None:
        pytest.skip(reason)


def both(s, ids, logprobs, labels, **options):
    """Loss and gradient on the GPU, and those of the reference."""
    grad_output = torch.linspace(-1.5, 2.0, len(s), device=s.device)

    def loss(x, backend):
        return kd.topk_kd_loss(x, ids, logprobs, labels, reduction="none", backend=backend, **options)

    got = evaluate(lambda x: loss(x, "cuda"), s, grad_output)
    with float64_anywhere():
        want = evaluate(lambda x: loss(x, "torch"), s.double(), grad_output)
    return [tensor.double() for tensor in got], want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", CODES["tail"])
@pytest.mark.parametrize("columns", [61, 4099, 50257, 128256, 262144])
def test_against_the_reference(columns, tail, dtype):
    s, ids, logprobs, labels = (tensor.cuda() for tensor in ragged(6, columns, 50, DTYPES[dtype]))
    for name in NAMES:
        if tail in ("renormalize", "drop") and name == "reverse_kl":
            continue
        options = {"tail": tail, "divergence": DIVERGENCES[name], "ce_weight": 0.5, **temperatures(tail, 2.0)}
        (loss, grad), (want, dwant) = both(s, ids, logprobs, labels, **options)
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
        # Rounded when it is stored, and again when grad_output multiplies it.
        torch.testing.assert_close(grad, dwant, rtol=3 * torch.finfo(DTYPES[dtype]).eps + 1e-4, atol=1e-6)


def test_stream_and_device_are_respected():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    s, ids, logprobs, labels = (tensor.to(device) for tensor in ragged(6, 1000, 5, torch.bfloat16))
    want = kd.topk_kd_loss(s, ids, logprobs, labels, backend="torch")
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = s.clone()
        loss = kd.topk_kd_loss(late, ids, logprobs, labels, backend="cuda")
    stream.synchronize()
    assert loss.device == s.device
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)


def test_deterministic_and_taken_by_auto():
    s, ids, logprobs, labels = (tensor.cuda() for tensor in ragged(64, 50257, 64, torch.bfloat16))
    assert backends.select("auto", "cuda", pattern="topk_fwd") == "cuda"
    results = [
        evaluate(lambda x: kd.topk_kd_loss(x, ids, logprobs, labels), s, torch.ones((), device="cuda"))
        for _ in range(3)
    ]
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad.nan_to_num(), results[0][1].nan_to_num())
