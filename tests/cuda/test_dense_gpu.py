"""The dense losses of the CUDA backend on a GPU, through the public function, against plain PyTorch in fp64 there."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.testing import float64_anywhere

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "tvd", "skew_kl", "alpha_beta")
HARD = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 1e-3}


@pytest.fixture(autouse=True)
def needs_extension():
    reason = backends.cuda.why_not("cuda")
    if reason is not None:
        pytest.skip(reason)


def both(student, teacher, labels, **options):
    """Loss and gradient of the kernels and of the reference."""

    def evaluate(s, t, backend):
        leaf = s.detach().clone().requires_grad_()
        loss = kd.kd_loss(leaf, t, labels, reduction="none", backend=backend, **options)
        loss.backward(torch.linspace(-1.5, 2.0, len(s), device=s.device, dtype=loss.dtype))
        return loss.detach().double(), leaf.grad.double()

    got = evaluate(student, teacher, "cuda")
    with float64_anywhere():
        return got, evaluate(student.double(), teacher.double(), "torch")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [7, 1000, 4097, 32000, 50257, 128256, 262144])
def test_against_the_reference(columns, dtype):
    """More rows than clusters fit on a GPU where they are narrow, so that each takes several; in turn plain and not."""
    rows = min(2048, 2**22 // columns)
    student, teacher = ((torch.randn(rows, columns, device="cuda") * 3).to(DTYPES[dtype]) for _ in range(2))
    labels = torch.randint(columns, (rows,), device="cuda")
    labels[::5] = -100
    for number, name in enumerate(NAMES):
        options = {"divergence": name, "temperature": 2.0, **(HARD if number % 2 else {})}
        (loss, grad), (want, dwant) = both(student, teacher, labels, **options)
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
        if name == "tvd":
            # Where the two are as likely to a rounding, the gradient may lie on either side of its jump.
            p, q = (torch.log_softmax(x.double() / 2.0, -1) for x in (teacher, student))
            grad = torch.where((p - q).abs() < 1e-5, dwant, grad)
        # Rounded when it is stored, and again when grad_output multiplies it; fp16 has no numbers below 6e-8.
        eps = torch.finfo(DTYPES[dtype]).eps
        torch.testing.assert_close(grad, dwant, rtol=3 * eps + 1e-4, atol=1e-6)


def test_stream_in_place_and_deterministic():
    student, teacher = (torch.randn(300, 32000, device="cuda").bfloat16() for _ in range(2))
    with float64_anywhere():
        want = kd.kd_loss(student.double(), teacher.double(), backend="torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = student.clone()
        first = kd.kd_loss(late, teacher, backend="cuda")
        again = kd.kd_loss(late, teacher, backend="cuda")
        leaf = late.clone().requires_grad_()
        logits = leaf * 1
        (grad,) = torch.autograd.grad(kd.kd_loss(logits, teacher, inplace=True, backend="cuda"), logits)
        other = late.clone().requires_grad_()
        kd.kd_loss(other, teacher, backend="cuda").backward()
    stream.synchronize()
    assert torch.equal(first, again) and torch.equal(grad, other.grad)
    torch.testing.assert_close(first.double(), want, rtol=1e-4, atol=1e-5)


def test_threads_whose_rows_are_of_other_widths():
    """The shared memory that a kernel may have is a state of it: one thread must not take another's away."""
    calls = []
    for columns in (640, 8192, 128256, 32000):
        student, teacher = (torch.randn(16, columns, device="cuda").bfloat16() for _ in range(2))
        ids = torch.arange(64, device="cuda").expand(16, 64).contiguous()
        calls.append((student, teacher, ids, torch.full((16, 64), -5.0, device="cuda")))

    def run(call):
        student, teacher, ids, logprobs = call
        found = []
        for _ in range(30):
            found.append(kd.kd_loss(student, teacher, backend="cuda"))
            found.append(kd.topk_kd_loss(student, ids, logprobs, backend="cuda"))
            found.append(kd.capture_topk(student, student.shape[-1] // 64, backend="cuda").tail_logprob)
        return all(torch.equal(x, y) for x, y in zip(found, found[3:], strict=False))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, calls))
