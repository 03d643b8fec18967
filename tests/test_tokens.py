"""token_logprobs and gather_logprobs against autograd of the textbook formula in fp64."""

import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels import backends, testing

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INF = math.inf
N, V = 6, 37
PER_ROW = torch.linspace(0.5, 3.0, N)
# The Triton kernels have tests of their own, in the interpreter.
BACKENDS = ["cpu", "torch"]
FUSED = [name for name in BACKENDS if name != "torch"]
fused = pytest.mark.parametrize("backend", FUSED, indirect=True)


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = backends.BACKENDS[request.param].why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """An output that is not written shows."""
    with testing.poisoned_memory():
        yield


def textbook(logits, ids, *, temperature=1.0, softcap=None, vocab_size=None, ignore_index=-100):
    """Log-probabilities ``[N, K]``, entropy and lse ``[N]``, a row and a token at a time, in the logits' own dtype."""
    rows = []
    for i, row in enumerate(logits[:, : vocab_size or logits.shape[1]]):
        u = softcap * torch.tanh(row / softcap) if softcap else row
        u = u / (temperature[i] if isinstance(temperature, torch.Tensor) else temperature)
        slots = [int(v) for v in ids[i]]
        taken = [v for v in slots if v not in (-1, ignore_index)]
        zero = u.new_zeros(())
        if not taken:
            rows.append((torch.stack([zero] * len(slots)), zero, zero))
            continue
        logq = torch.log_softmax(u, -1)
        finite = logq[logq > -INF] if not logq.isnan().any() else logq
        entropy = -(finite.exp() * finite).sum()
        picked = [logq[v] if v not in (-1, ignore_index) else zero for v in slots]
        rows.append((torch.stack(picked), entropy, torch.logsumexp(u, -1)))
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def weights(ids):
    """Upstream gradients of either sign, of log-probabilities and of the entropy."""
    slots = torch.linspace(-1.5, 2.0, ids.numel(), dtype=torch.float64).reshape(ids.shape)
    return slots, torch.linspace(1.0, -0.7, ids.shape[0], dtype=torch.float64)


def truth(logits, ids, with_entropy=True, scale=1.0, **options):
    """Log-probabilities, entropy, lse and the gradient, in fp64."""
    leaf = logits.detach().double().requires_grad_()
    slots = ids if ids.dim() == 2 else ids[:, None]
    logprobs, entropy, lse = textbook(leaf, slots, **options)
    g, h = weights(slots)
    loss = (g * logprobs).sum() + (h * entropy).sum() * with_entropy
    (grad,) = torch.autograd.grad(loss * scale, leaf)
    return logprobs.detach().reshape(ids.shape), entropy.detach(), lse.detach(), grad


def evaluate(logits, ids, *, with_entropy=True, scale=1.0, **options):
    """The results of token_logprobs, and the gradient for the same upstream gradients."""
    leaf = logits.detach().requires_grad_()
    found = kd.token_logprobs(leaf, ids, entropy=with_entropy, **options)
    slots = ids if ids.dim() == logits.dim() else ids[..., None]
    results = [item for item in found[:2] if item is not None]
    upstream = weights(slots.reshape(-1, slots.shape[-1]))
    given = [(scale * u).reshape(item.shape).to(item.dtype) for u, item in zip(upstream, results, strict=False)]
    (grad,) = torch.autograd.grad(results, leaf, given)
    return found, grad


# Margins of log-probabilities, and of a gradient before it is rounded to its dtype.
ATOL = {"fp64": 1e-12, "fp32": 4e-6, "bf16": 1e-5, "fp16": 1e-5}


def check(logits, ids, *, backend, atol=None, with_entropy=True, **options):
    """Values and gradients against fp64 on the same numbers."""
    name = next(key for key, dtype in DTYPES.items() if dtype == logits.dtype)
    atol = ATOL[name] if atol is None else atol
    found, grad = evaluate(logits, ids, backend=backend, with_entropy=with_entropy, **options)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact.pop("inplace_backward", None)
    logprobs, entropy, lse, dlogits = truth(logits, ids, with_entropy, **exact)
    sums = torch.float64 if name == "fp64" else torch.float32
    assert found.logprobs.dtype == found.lse.dtype == sums and grad.dtype == logits.dtype
    assert found.logprobs.shape == ids.shape and found.lse.shape == logits.shape[:-1]
    assert not found.lse.requires_grad
    near = {"rtol": 1e-12 if name == "fp64" else 4e-6, "atol": atol}
    torch.testing.assert_close(found.logprobs.detach().double(), logprobs, **near)
    torch.testing.assert_close(found.lse.double(), lse, **near)
    if with_entropy:
        torch.testing.assert_close(found.entropy.detach().double(), entropy, **near)
    else:
        assert found.entropy is None
    # Half an ulp of what is stored, and of fp16 the smallest number.
    rounding = {"fp64": 0.0, "fp32": 2**-23, "bf16": 2**-8, "fp16": 2**-10}[name]
    torch.testing.assert_close(
        grad.double(), dlogits, rtol=rounding + near["rtol"], atol=atol + (2**-24 if name == "fp16" else 0)
    )
    return found, grad


def tokens(k=None, rows=N, columns=V):
    """Ids with every kind of slot: taken twice, -1, ignored, and in the second row none at all."""
    ids = torch.randint(0, columns, (rows,) if k is None else (rows, k))
    ids[1] = -100
    ids[3 % rows, ...] = -1 if k is None else ids[3 % rows]
    if k is not None and k > 1:
        ids[0, 1] = ids[0, 0]
        ids[2, 0] = -1
        ids[4, -1] = -100
    return ids


@pytest.mark.parametrize("k", [None, 1, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_every_gradient(dtype, k, backend):
    check((torch.randn(N, V) * 3).to(DTYPES[dtype]), tokens(k), backend=backend)


OPTIONS = {
    "temperature": {"temperature": 2.5},
    "rows": {"temperature": PER_ROW},
    "cold": {"temperature": 0.05},
    "softcap": {"softcap": 5.0},
    "padding": {"vocab_size": V - 5},
    "ignored-0": {"ignore_index": 0},
    "no-entropy": {"with_entropy": False},
    "all": {"temperature": PER_ROW, "softcap": 20.0, "vocab_size": V - 5, "ignore_index": 3},
}


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, k, backend):
    ids = tokens(k, columns=V - 5)
    if name == "ignored-0":
        ids[ids == -100] = 0
    if name == "all":
        ids[ids == -100] = 3
    cold = {"atol": 1e-4} if name == "cold" else {}
    _, grad = check(torch.randn(N, V) * 3, ids, backend=backend, **cold, **OPTIONS[name])
    if "vocab_size" in OPTIONS[name]:
        assert not grad[:, V - 5 :].any()


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 1000, 4099])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_widths(dtype, columns, backend):
    found, _ = check((torch.randn(N, columns) * 2).to(DTYPES[dtype]), tokens(2, columns=columns), backend=backend)
    if columns == 1:
        assert not found.logprobs.any() and not found.entropy.any()


def test_any_shape_and_strides(backend):
    logits = torch.randn(2, 3, 5, 90)[:, :2, ::2, 7:]
    ids = torch.randint(0, 80, (3, 2, 2)).transpose(0, 2)[:, :, :3]
    found, grad = evaluate(logits, ids, vocab_size=80, backend=backend)
    flat, dflat = evaluate(logits.reshape(-1, 83), ids.reshape(-1), vocab_size=80, backend="torch")
    assert found.logprobs.shape == ids.shape and grad.shape == logits.shape
    torch.testing.assert_close(found.logprobs.flatten(), flat.logprobs)
    torch.testing.assert_close(grad.reshape(dflat.shape), dflat, rtol=1e-5, atol=1e-6)
    shifted = torch.randn(2, 6, 9).requires_grad_()
    several = kd.token_logprobs(shifted[:, :-1], torch.randint(0, 9, (2, 5, 4), dtype=torch.int32), backend=backend)
    assert several.logprobs.shape == (2, 5, 4) and several.lse.shape == (2, 5)
    one = kd.token_logprobs(torch.randn(9), torch.tensor(3), entropy=True, backend=backend)
    assert [tuple(item.shape) for item in one[:3]] == [(), (), ()]


def test_no_rows(backend):
    logits = torch.randn(0, 3, V, requires_grad=True)
    found = kd.token_logprobs(logits, torch.zeros(0, 3, dtype=torch.int64), entropy=True, backend=backend)
    assert [tuple(item.shape) for item in found[:3]] == [(0, 3)] * 3
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_rows_without_a_token_are_not_read(backend):
    logits = torch.randn(N, V)
    logits[[1, 4]] = torch.tensor([torch.nan, INF])[:, None]
    ids = torch.tensor([[3, 5], [-1, -100], [2, -1], [7, 7], [-100, -100], [1, 0]])
    found, grad = evaluate(logits, ids, backend=backend)
    for item in found[:3]:
        assert not item[[1, 4]].any() and torch.isfinite(item).all()
    assert not grad[[1, 4]].any() and torch.isfinite(grad).all()
    assert found.logprobs[2, 1] == 0


def test_a_token_of_logit_minus_infinity_has_a_finite_gradient(backend):
    logits = torch.randn(3, V)
    logits[:, ::4] = -INF
    ids = torch.tensor([[4, 1], [8, 8], [3, 2]])
    found, grad = evaluate(logits, ids, backend=backend)
    assert found.logprobs[:2].tolist()[0][0] == -INF and (found.logprobs[1] == -INF).all()
    assert torch.isfinite(found.entropy).all() and torch.isfinite(grad).all()
    g, h = weights(ids)
    q = logits.softmax(-1)
    logq = torch.where(q > 0, q.log(), 0.0)
    expected = -q * g.sum(-1, keepdim=True) - h[:, None] * q * (logq + found.entropy.detach()[:, None])
    expected = expected.scatter_add(1, ids, g)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_without_a_distribution_are_nan(backend):
    logits = torch.randn(4, V)
    logits[0, 7], logits[1, 3], logits[2] = torch.nan, INF, -INF
    found, grad = evaluate(logits, torch.tensor([[1, 2]] * 4), backend=backend)
    for item in (found.logprobs, found.entropy, found.lse, grad):
        assert item[:3].isnan().all() and torch.isfinite(item[3]).all()


def test_large_logits(backend):
    """Of +-1e4 the probabilities keep their bits; the largest finite logits overflow to probability 0 alone."""
    ids = tokens(3)
    check((torch.rand(N, V) * 2 - 1) * 1e4, ids, backend=backend, atol=2e-3)
    # A large number that a row has in common is no part of its distribution; these sums are exact.
    common = torch.tensor([1e4, -1e4, 8192.0, -8192.0, 9e3, 0.0])[:, None]
    near = torch.randn(N, V).mul(8).round() / 8 + common
    check(near, ids, backend=backend, atol=2e-3)
    _, grad = evaluate(near, ids, backend=backend)
    torch.testing.assert_close(grad.double(), truth(near, ids)[3], rtol=1e-5, atol=1e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        extreme = torch.full((2, 5), -largest, dtype=dtype)
        extreme[:, 1] = largest
        extreme[1, 2] = largest
        found, grad = evaluate(extreme, torch.tensor([1, 2]), backend=backend)
        assert found.logprobs.tolist() == pytest.approx([0.0, -math.log(2)], abs=1e-6)
        assert found.entropy.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
        assert torch.isfinite(grad).all() and torch.isfinite(found.lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_are_never_above_0(dtype, backend):
    """A fused kernel of another package returned +123 (verl#2656)."""
    for kind in ("normal", "huge", "late", "peaked", "spread", "one-hot"):
        logits, teacher = testing.make_inputs(kind, 8, 1003, DTYPES[dtype])
        for rows in (logits, teacher):
            found = kd.token_logprobs(rows, rows.topk(8).indices, entropy=True, backend=backend)
            assert (found.logprobs <= 1e-6).all(), kind
            assert (found.logprobs.exp().sum(-1) <= 1 + 1e-5).all(), kind
            assert (found.entropy >= -1e-6).all() and (found.entropy <= math.log(1003) + 1e-5).all(), kind


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_entropy_of_16_bit_logits_is_that_of_their_exact_values(dtype, backend):
    """Made in bf16, as in another package, it is off by 0.01 and more."""
    logits = (torch.randn(8, 4000) * 2).to(DTYPES[dtype])
    found = kd.token_logprobs(logits, torch.zeros(8, dtype=torch.int64), entropy=True, backend=backend)
    logq = torch.log_softmax(logits.double(), -1)
    exact = -(logq.exp() * logq).sum(-1)
    assert found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.entropy.double(), exact, rtol=0, atol=1e-4)
    if dtype == "bf16":
        rounded = torch.log_softmax(logits, -1)
        assert (-(rounded.exp() * rounded).sum(-1) - exact).abs().max() > 1e-3


def test_a_temperature_per_row_is_no_loop_over_rows(backend):
    """Others take one float for all rows."""
    logits, ids = torch.randn(N, V), tokens()
    found, grad = evaluate(logits, ids, temperature=PER_ROW, backend=backend)
    for i, temperature in enumerate(PER_ROW.tolist()):
        if int(ids[i]) < 0:
            continue
        one = kd.token_logprobs(logits[i], ids[i], temperature=temperature, entropy=True, backend=backend)
        torch.testing.assert_close(found.logprobs[i], one.logprobs)
        torch.testing.assert_close(found.entropy[i], one.entropy)


def test_a_loss_scale_reaches_an_fp16_gradient_before_it_is_rounded(backend):
    """The gradient of a mean over 65,536 tokens is below fp16's smallest number; times 2^16 it is not."""
    logits, ids = torch.randn(N, V).half(), tokens(2)
    _, grad = evaluate(logits, ids, scale=1.0, backend=backend)
    _, scaled = evaluate(logits, ids, scale=2.0**-8, backend=backend)
    torch.testing.assert_close(scaled.double() * 2**8, grad.double(), rtol=2**-9, atol=2**-16)
    _, _, _, exact = truth(logits, ids, scale=2.0**-8)
    torch.testing.assert_close(scaled.double(), exact, rtol=2**-10, atol=2**-24)
    leaf = logits.clone().requires_grad_()
    loss = kd.token_logprobs(leaf, ids, backend=backend).logprobs.sum() / 65536
    (loss * 65536.0).backward()
    unscaled = logits.clone().requires_grad_()
    kd.token_logprobs(unscaled, ids, backend=backend).logprobs.sum().backward()
    assert torch.equal(leaf.grad, unscaled.grad)


def test_upstream_gradients_of_one_result_alone(backend):
    """Only log-probabilities, only the entropy, or neither."""
    logits, ids = torch.randn(N, V, dtype=torch.float64), tokens(2)
    leaf = logits.clone().requires_grad_()
    exact = logits.clone().requires_grad_()
    for pick in (lambda logprobs, entropy: logprobs.sum(), lambda logprobs, entropy: entropy.square().sum()):
        found = kd.token_logprobs(leaf, ids, entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(pick(found.logprobs, found.entropy), leaf)
        (expected,) = torch.autograd.grad(pick(*textbook(exact, ids)[:2]), exact)
        torch.testing.assert_close(grad, expected)
    assert not found.lse.requires_grad


def test_a_row_whose_upstream_gradients_are_0_gets_0(backend):
    logits, ids = torch.randn(N, V), tokens(2)
    leaf = logits.requires_grad_()
    found = kd.token_logprobs(leaf, ids, entropy=True, backend=backend)
    mask = (torch.arange(N) % 2 == 0).float()
    ((found.logprobs.sum(-1) + found.entropy) * mask).sum().backward()
    assert not leaf.grad[1::2].any() and leaf.grad[::4].abs().amax(-1).min() > 0


@pytest.mark.parametrize("k", [None, 3])
def test_gradcheck(k, backend):
    logits = torch.randn(N, 7, dtype=torch.float64, requires_grad=True)
    ids = tokens(k, columns=7)

    def values(x):
        return kd.token_logprobs(x, ids, entropy=True, temperature=PER_ROW, softcap=4.0, backend=backend)[:2]

    assert torch.autograd.gradcheck(values, logits)
    if backend == "torch":
        assert torch.autograd.gradgradcheck(values, logits)


def test_batched_gradients(backend):
    """vmap over grad_output, as ``torch.autograd.functional.jacobian(vectorize=True)`` does."""
    logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    ids = tokens(2)
    found = kd.token_logprobs(logits, ids, entropy=True, backend=backend)
    upstream = [torch.randn(3, *item.shape, dtype=torch.float64) for item in found[:2]]
    (batched,) = torch.autograd.grad(found[:2], logits, upstream, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        (one,) = torch.autograd.grad(found[:2], logits, [item[k] for item in upstream], retain_graph=True)
        torch.testing.assert_close(batched[k], one)


@pytest.mark.parametrize("transform", ["double", "forward-mode", "func.grad", "vmap"])
def test_what_kernels_cannot_do_is_right_or_refused(transform, backend):
    logits, ids = torch.randn(N, V, dtype=torch.float64), tokens()

    def loss(x):
        found = kd.token_logprobs(x, ids, entropy=True, backend=backend)
        return (found.logprobs * found.entropy).sum()

    def apply():
        if transform == "double":
            leaf = logits.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), leaf)[0]
        if transform == "forward-mode":
            return torch.func.jvp(loss, (logits,), (torch.ones_like(logits),))[1]
        if transform == "func.grad":
            return torch.func.grad(loss)(logits)
        return torch.func.vmap(loss)(torch.stack([logits, logits]))

    if backend == "torch":
        assert torch.isfinite(apply()).all()
        return
    with pytest.raises(RuntimeError, match='backend="torch"'):
        apply()


@pytest.mark.parametrize("change", ["logits", "entropy"])
def test_a_change_in_place_before_backward_is_noticed(change, backend):
    logits = torch.randn(N, V, requires_grad=True)
    hidden = logits * 1.0
    found = kd.token_logprobs(hidden, tokens(), entropy=True, backend=backend)
    loss = found.logprobs.sum() + found.entropy.sum()
    with torch.no_grad():
        (hidden if change == "logits" else found.entropy).add_(1.0)
    if backend == "torch":
        loss.backward()  # which has copies of the logits, and needs no entropy for its gradient
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@fused
def test_saved_are_the_logits_and_a_few_numbers_a_row(backend):
    logits, ids = torch.randn(N, 4000, requires_grad=True), tokens(3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kd.token_logprobs(logits, ids, entropy=True, temperature=PER_ROW, backend=backend)
    others = [x for x in kept if x.data_ptr() != logits.data_ptr()]
    assert len(kept) == len(others) + 1 and sum(x.numel() for x in others) <= N * (3 + 1 + 2 + 1)


@fused
def test_the_results_do_not_keep_themselves_alive(backend):
    logits = torch.randn(N, V, requires_grad=True)
    hidden = logits * 1.0
    found = kd.token_logprobs(hidden, tokens(), entropy=True, backend=backend)
    kept = weakref.ref(hidden)
    del hidden
    assert kept() is not None
    # The entropy is among what backward keeps; no collector has to find that out.
    del found
    assert kept() is None


@pytest.mark.parametrize("layout", ["plain", "shifted", "padded"])
def test_in_place_backward_writes_over_the_logits(layout, backend):
    whole = torch.randn(2, 5, V + 3)
    logits = {"plain": whole, "shifted": whole[:, :-1], "padded": whole[..., :V]}[layout]
    ids = torch.randint(0, V, logits.shape[:-1])
    ids[0, 1] = -1
    before = whole.clone()
    leaf = logits.requires_grad_()
    hidden = leaf.view_as(leaf)
    found = kd.token_logprobs(hidden, ids, entropy=True, inplace_backward=True, backend=backend)
    assert torch.equal(whole, before)
    loss = found.logprobs.sum() + found.entropy.square().sum()
    (grad,) = torch.autograd.grad(loss, hidden)
    copy = before[:, :-1] if layout == "shifted" else before[..., :V] if layout == "padded" else before
    other = copy.clone().requires_grad_()
    again = kd.token_logprobs(other, ids, entropy=True, backend="torch")
    (expected,) = torch.autograd.grad(again.logprobs.sum() + again.entropy.square().sum(), other)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    if backend != "torch":
        assert grad.data_ptr() == logits.data_ptr() and torch.equal(logits.detach(), grad)
    if layout == "shifted":
        assert torch.equal(whole[:, -1], before[:, -1])
    if layout == "padded":
        assert torch.equal(whole[..., V:], before[..., V:])


@fused
def test_in_place_backward_never_takes_what_others_still_need(backend):
    logits = torch.randn(N, V, requires_grad=True)
    before, ids = logits.detach().clone(), tokens()

    def loss():
        return kd.token_logprobs(logits, ids, inplace_backward=True, backend=backend).logprobs.sum()

    # Another backward may come.
    kept = loss()
    (first,) = torch.autograd.grad(kept, logits, retain_graph=True)
    assert torch.equal(logits, before)
    # Hooks have the tensor.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        hooked = loss()
    (second,) = torch.autograd.grad(hooked, logits)
    assert torch.equal(logits, before) and torch.equal(first, second)
    # Another loss that saved the logits is told.
    square = (logits * logits).sum()
    (third,) = torch.autograd.grad(kept, logits)
    assert torch.equal(first, third) and not torch.equal(logits, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_in_place_backward_is_refused_where_it_cannot_be(backend):
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="inplace_backward=True needs a logits tensor that requires grad"):
        kd.token_logprobs(torch.randn(3, V), ids, inplace_backward=True, backend=backend)
    shared = torch.randn(1, V).requires_grad_().expand(3, V)
    with pytest.raises(ValueError, match="inplace_backward needs a logits tensor whose rows share no memory"):
        kd.token_logprobs(shared, ids, inplace_backward=True, backend=backend)
    with torch.no_grad():
        kd.token_logprobs(torch.randn(3, V), ids, inplace_backward=True, backend=backend)


def expected_stats(logits, ids, *, temperature=1.0, softcap=None, vocab_size=None, ignore_index=-100):
    """Of the formulas, a row at a time in fp64; equal logits all count as the largest."""
    squares, means, largest = [], [], []
    for i, row in enumerate(logits[:, : vocab_size or logits.shape[1]].double()):
        x = softcap * torch.tanh(row / softcap) if softcap else row
        q = (x / (temperature[i] if isinstance(temperature, torch.Tensor) else temperature)).softmax(-1)
        used = [int(v) not in (-1, ignore_index) for v in ids[i]]
        zero = x.new_zeros(())
        squares.append(q.square().sum().log() if any(used) else zero)
        means.append(x.mean() if any(used) else zero)
        # The softcap in the dtype of the sums may make two logits equal: by the logits themselves.
        first = logits[i, : len(x)]
        largest.append([u and bool(first[int(v)] == first.max()) for u, v in zip(used, ids[i], strict=True)])
    return torch.stack(squares), torch.stack(means), torch.tensor(largest)


def check_stats(logits, ids, backend, atol=4e-6, **options):
    found, stats = kd.token_logprobs(logits, ids, return_stats=True, backend=backend, **options)
    squares, means, largest = expected_stats(logits, ids, **options)
    sums = torch.float64 if logits.dtype == torch.float64 else torch.float32
    near = {"rtol": 4e-6, "atol": atol}
    assert found.entropy is None and stats.log_sum_squares.dtype == stats.mean_logit.dtype == sums
    torch.testing.assert_close(stats.log_sum_squares.double(), squares, **near)
    torch.testing.assert_close(stats.mean_logit.double(), means, **near)
    assert torch.equal(stats.is_argmax, largest)
    # The same values as without them.
    plain = kd.token_logprobs(logits, ids, entropy=True, backend=backend, **options)
    again, _ = kd.token_logprobs(logits, ids, entropy=True, return_stats=True, backend=backend, **options)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=4e-6)
    return stats


def with_the_largest(ids, logits, vocab_size=None):
    """Every other row's first slot is its likeliest token."""
    ids = ids.clone()
    ids[::2, 0] = logits[::2, :vocab_size].argmax(-1)
    return ids


@pytest.mark.parametrize("columns", [1, 2, 17, 1000, 4101])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype, columns, backend):
    logits = (torch.randn(N, columns) * 3).to(DTYPES[dtype])
    stats = check_stats(logits, with_the_largest(tokens(3, columns=columns), logits), backend)
    if columns == 1:
        assert not stats.log_sum_squares.any()
    assert (stats.log_sum_squares <= 0).all()


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "no-entropy"])
def test_statistics_with_options(name, backend):
    logits, ids = torch.randn(N, V) * 3, tokens(3, columns=V - 5)
    ignored = OPTIONS[name].get("ignore_index", -100)
    ids[ids == -100] = ignored
    ids = with_the_largest(ids, logits, OPTIONS[name].get("vocab_size"))
    check_stats(logits, ids, backend, atol=1e-4 if name == "cold" else 4e-6, **OPTIONS[name])


def test_statistics_of_ties_and_of_logits_of_minus_infinity(backend):
    """Of several largest logits each counts, so that no order of columns matters; a mean with -inf in it is -inf."""
    logits = torch.tensor([[1.0, 5.0, 5.0, -INF], [7.0, 7.0, 7.0, 7.0], [-INF, -INF, 2.0, 1.0]])
    ids = torch.tensor([[0, 1, 2], [3, 0, -1], [0, 2, 2]])
    stats = check_stats(logits, ids, backend)
    assert stats.is_argmax.tolist() == [[False, True, True], [True, True, False], [False, True, True]]
    assert stats.mean_logit.tolist() == [-INF, 7.0, -INF]
    # The last bit decides.
    near = torch.full((2, 40), 1.0)
    near[:, 30] = 1.0 + 2**-23
    assert check_stats(near, torch.tensor([[30, 29], [0, 30]]), backend).is_argmax.tolist() == [
        [True, False],
        [False, True],
    ]


def test_statistics_of_rows_without_a_token_or_a_distribution(backend):
    logits = torch.randn(5, V)
    logits[0, 7], logits[1, 3], logits[2], logits[3] = torch.nan, INF, -INF, torch.nan
    ids = torch.tensor([[7, 2], [3, 1], [0, 1], [-1, -100], [4, 2]])
    _, stats = kd.token_logprobs(logits, ids, return_stats=True, backend=backend)
    assert stats.log_sum_squares[:3].isnan().all() and stats.mean_logit[:3].isnan().all()
    assert not stats.is_argmax[:4].any() and not stats.log_sum_squares[3] and not stats.mean_logit[3]
    assert torch.isfinite(stats.log_sum_squares[4]) and torch.isfinite(stats.mean_logit[4])
    _, empty = kd.token_logprobs(torch.randn(0, 3, V), torch.zeros(0, 3, 2).long(), return_stats=True, backend=backend)
    assert [tuple(item.shape) for item in empty] == [(0, 3), (0, 3), (0, 3, 2)]


@pytest.mark.parametrize("kind", ["late", "huge", "peaked", "spread"])
def test_statistics_of_extreme_rows(kind, backend):
    """The likeliest tokens stand last, or far ahead of the first ones; the largest finite logits have a mean."""
    logits, _ = testing.make_inputs(kind, 8, 5003, torch.float32)
    check_stats(logits, with_the_largest(torch.randint(0, 5003, (8, 2)), logits), backend, atol=2e-3)
    late = torch.zeros(2, 5003)
    late[0, 4000:], late[1, 5002] = 80.0, 1e4
    check_stats(late, torch.tensor([[4000, 0], [5002, 1]]), backend)
    extreme = torch.full((1, 5), torch.finfo(torch.float32).max)
    _, stats = kd.token_logprobs(extreme, torch.tensor([3]), return_stats=True, backend=backend)
    assert float(stats.mean_logit) == pytest.approx(float(extreme[0, 0]), rel=1e-6)
    assert float(stats.log_sum_squares) == pytest.approx(-math.log(5), abs=1e-6) and bool(stats.is_argmax)


def test_statistics_pass_no_gradient_and_change_none(backend):
    logits, ids = torch.randn(N, V), tokens(2)
    leaf = logits.clone().requires_grad_()
    found, stats = kd.token_logprobs(leaf, ids, entropy=True, return_stats=True, backend=backend)
    assert not any(item.requires_grad for item in stats)
    (grad,) = torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), leaf)
    plain = kd.token_logprobs(leaf, ids, entropy=True, backend=backend)
    (expected,) = torch.autograd.grad(plain.logprobs.sum() + plain.entropy.sum(), leaf)
    torch.testing.assert_close(grad, expected)


def test_statistics_compile(backend, forget):
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x, ids):
        found, stats = kd.token_logprobs(x, ids, return_stats=True, backend=backend)
        return (found.logprobs * stats.is_argmax).sum() + stats.mean_logit.sum(), stats

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for rows in range(N, N + 4):
        logits, ids = torch.randn(rows, V), tokens(3, rows=rows)
        torch.testing.assert_close(compiled(logits, ids), loss(logits, ids), rtol=1e-5, atol=1e-5)
        leaf = logits.requires_grad_()
        torch.testing.assert_close(compiled(leaf, ids), loss(leaf, ids), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 4


BAD = [
    (TypeError, "logits must be a torch.Tensor", {"logits": [1.0]}),
    (TypeError, "ids must be a torch.Tensor, got list", {"ids": [1, 2]}),
    (TypeError, "ids must be int64 or int32, got float32", {"ids": torch.zeros(N)}),
    (ValueError, r"ids must have shape \(6,\) or \(6, K\) with K >= 1, got \(5,\)", {"ids": torch.zeros(5).long()}),
    (ValueError, r"with K >= 1, got \(6, 0\)", {"ids": torch.zeros(N, 0).long()}),
    (
        ValueError,
        r"ids must be in \[0, 37\), or -1 or ignore_index -100 for none, got 37",
        {"ids": torch.full((N,), V)},
    ),
    (ValueError, r"for none, got -2", {"ids": torch.full((N,), -2)}),
    (ValueError, r"ids must be in \[0, 30\)", {"ids": torch.full((N,), 30), "vocab_size": 30}),
    (ValueError, "vocab_size must be at most logits's width 37, got 38", {"vocab_size": V + 1}),
    (ValueError, "temperature must be > 0, got 0", {"temperature": 0}),
    (ValueError, "temperature must be finite and > 0, got 0.0", {"temperature": torch.zeros(N)}),
    (ValueError, r"temperature must be a number or have one value per row", {"temperature": torch.ones(N + 1)}),
    (TypeError, "entropy must be a bool", {"entropy": 1}),
    (TypeError, "return_stats must be a bool", {"return_stats": None}),
    (ValueError, "softcap must be > 0", {"softcap": 0.0}),
    (TypeError, "ignore_index must be an int", {"ignore_index": None}),
    (TypeError, "did you mean 'temperature'", {"temprature": 2.0}),
    (ValueError, "backend must be one of", {"backend": "gpu"}),
]


@pytest.mark.parametrize(("error", "message", "bad"), BAD, ids=[case[1][:40] for case in BAD])
def test_errors_name_the_argument(error, message, bad):
    given = {"logits": torch.randn(N, V), "ids": torch.zeros(N, dtype=torch.int64), **bad}
    with pytest.raises(error, match=message):
        kd.token_logprobs(given.pop("logits"), given.pop("ids"), **given)


@pytest.fixture
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_loss(backend, **fixed):
    def loss(x, ids, **options):
        found = kd.token_logprobs(x, ids, entropy=True, backend=backend, **fixed, **options)
        return (found.logprobs.reshape(len(x), -1).sum(-1) * found.lse + found.entropy).sum()

    return loss


def hold_compiled(loss, calls, frames=2):
    """Every call in a graph gives what it gives outside, and all of them need no more than so many graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for logits, ids, options in calls:
        results = []
        for function in (loss, compiled):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, ids, **options)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert 1 <= counter.frame_count <= frames


@pytest.mark.parametrize("k", [None, 3])
def test_one_graph_serves_all_numbers_of_rows(k, backend, forget):
    calls = [(torch.randn(n, V), tokens(k, rows=n), {}) for n in range(N, N + 8)]
    hold_compiled(compiled_loss(backend), calls)


@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_one_graph_serves_all_values_of_a_number(name, backend, forget):
    calls = [(torch.randn(N, V), tokens(), {name: 4.5 + step}) for step in range(6)]
    hold_compiled(compiled_loss(backend), calls)


def test_a_temperature_per_row_compiles(backend, forget):
    calls = [(torch.randn(n, V), tokens(rows=n), {"temperature": torch.rand(n) + 1}) for n in range(N, N + 3)]
    hold_compiled(compiled_loss(backend), calls)


def test_a_token_out_of_range_is_nan_when_compiled(backend, forget):
    """Under torch.compile ids are not read before the launch: no row but theirs may suffer."""
    wild = torch.tensor([[V, 1], [2, -2], [10**6, 3], [2**62, 0], [-(2**63), 0], [3, 4]])
    logits = torch.randn(N, V)
    leaf = logits.clone().requires_grad_()
    compiled = torch.compile(
        lambda x: kd.token_logprobs(x, wild, entropy=True, backend=backend), backend="aot_eager", fullgraph=True
    )
    found = compiled(leaf)
    found.logprobs.sum().backward()
    bad = (wild < 0) | (wild >= V)
    assert torch.equal(found.logprobs.isnan(), bad)
    assert torch.isfinite(found.entropy).all() and torch.isfinite(found.lse).all()
    assert torch.equal(leaf.grad.isnan().any(-1), bad.any(-1))


def test_gathering_compiles(backend, forget):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, ids: kd.gather_logprobs(x, ids, backend=backend), backend=counter, fullgraph=True
    )
    for rows in range(N, N + 4):
        logits, ids = torch.randn(rows, V), tokens(3, rows=rows).clamp(min=-1)
        torch.testing.assert_close(compiled(logits, ids), kd.gather_logprobs(logits, ids, backend="torch"))
    assert counter.frame_count <= 2


def test_in_place_backward_is_for_eager_mode(forget):
    compiled = torch.compile(
        lambda x: kd.token_logprobs(x, torch.zeros(N).long(), inplace_backward=True).logprobs,
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="inplace_backward=True works in eager mode only"):
        compiled(torch.randn(N, V, requires_grad=True))


def expected_topk(logits, ids, temperature=1.0):
    """Log-probabilities and tail of one row, in fp64; an id counts in its first slot."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    outside = torch.ones(len(logp), dtype=torch.bool)
    kept, values = [], []
    for v in ids.tolist():
        v = -1 if v in kept else v
        kept.append(v)
        values.append(float(logp[v]) if v >= 0 else -INF)
        if v >= 0:
            outside[v] = False
    tail = float(torch.logsumexp(logp[outside], -1)) if outside.any() else -INF
    return kept, values, tail


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, columns", [(1, 1), (3, 7), (64, 1000), (200, 4101)])
def test_gathered_log_probabilities_and_tail(dtype, k, columns, backend):
    logits = (torch.randn(5, columns) * 3).to(DTYPES[dtype])
    ids = torch.randint(0, columns, (5, k))
    ids[1] = -1
    ids[2, 0] = -1
    ids[3, -1] = ids[3, 0]
    temperature = torch.linspace(0.5, 2, 5)
    found = kd.gather_logprobs(logits, ids, temperature=temperature, backend=backend)
    sums = torch.float64 if dtype == "fp64" else torch.float32
    assert (found.ids.dtype, found.logprobs.dtype, found.tail_logprob.dtype) == (torch.int32, sums, sums)
    for i in range(5):
        kept, values, tail = expected_topk(logits[i], ids[i], float(temperature[i]))
        assert found.ids[i].tolist() == kept
        assert found.logprobs[i].tolist() == pytest.approx(values, rel=4e-6, abs=1e-5)
        assert float(found.tail_logprob[i]) == pytest.approx(0.0 if i == 1 else tail, rel=1e-5, abs=1e-5)


def test_a_gathered_tail_far_below_one(backend):
    """As a difference from 1 it would be 0 from 40 nats on, in fp64 too."""
    logits = torch.randn(4, 500)
    logits[:, 100:103] += torch.tensor([10.0, 60.0, 300.0, 3000.0])[:, None]
    ids = torch.tensor([[102, 100, 101]] * 4)
    found = kd.gather_logprobs(logits, ids, backend=backend)
    captured = kd.capture_topk(logits, 3, backend="torch")
    torch.testing.assert_close(found.tail_logprob, captured.tail_logprob, rtol=1e-6, atol=1e-4)
    assert bool((found.tail_logprob[1:] < -40).all())


def test_gathering_what_was_captured_gives_the_same(backend):
    logits = torch.randn(2, 3, 300) * 2
    captured = kd.capture_topk(logits, 9, temperature=1.7, vocab_size=290, backend="torch")
    found = kd.gather_logprobs(logits, captured.ids, temperature=1.7, vocab_size=290, backend=backend)
    assert torch.equal(found.ids, captured.ids)
    torch.testing.assert_close(found[1:], captured[1:], rtol=1e-5, atol=1e-5)


def test_gathering_from_rows_without_a_distribution(backend):
    logits = torch.randn(4, 70)
    logits[0, 50], logits[1, 3], logits[2] = torch.nan, INF, -INF
    found = kd.gather_logprobs(logits, torch.tensor([[3, 5]] * 4), backend=backend)
    assert found.logprobs[:3].isnan().all() and found.tail_logprob[:3].isnan().all()
    assert torch.isfinite(found.logprobs[3]).all() and not found.logprobs.requires_grad
    assert not kd.gather_logprobs(logits.requires_grad_(), torch.tensor([[3]] * 4), backend=backend)[1].requires_grad
    with pytest.raises(ValueError, match=r"ids must have shape \(4, K\)"):
        kd.gather_logprobs(logits, torch.tensor([3] * 4), backend=backend)


def test_reverse_kl_on_the_students_own_top_k(backend):
    """As the docstring has it, against the K + 1 outcomes written out."""
    student, teacher = torch.randn(5, 200, dtype=torch.float64), torch.randn(5, 200, dtype=torch.float64) * 2
    ids = kd.capture_topk(student, 12).ids
    top = kd.gather_logprobs(teacher, ids, backend=backend)
    loss = kd.topk_kd_loss(student, *top[:2], tail_logprob=top.tail_logprob, divergence="reverse_kl")
    q, p = student.softmax(-1), teacher.softmax(-1)
    qs, ps = (x.gather(1, ids.long()) for x in (q, p))
    qs, ps = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], 1) for x in (qs, ps))
    torch.testing.assert_close(loss, F.kl_div(ps.log(), qs, reduction="batchmean"))


PEAK = """
import sys, torch, kdkernels as kd
from benchmarks import measure
inplace, backend = sys.argv[1] == "inplace", sys.argv[2]
N, V = 128, 65536
def run(logits, count):
    ids = torch.arange(count)
    found = kd.token_logprobs(logits, ids, entropy=True, inplace_backward=inplace, backend=backend)
    (found.logprobs.sum() + found.entropy.sum()).backward()
run(torch.randn(2, V).requires_grad_(), 2)  # scratch and libraries
logits = torch.randn(N, V).requires_grad_()
before = measure.reset_peak("cpu")
run(logits, N)
print((measure.peak("cpu") - before) / logits.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
@pytest.mark.parametrize(("mode", "most"), [("fresh", 1.1), ("inplace", 0.1)])
@fused
def test_peak_memory(mode, most, backend):
    """In units of one [N, V], beside the logits."""
    command = [sys.executable, "-c", PEAK, mode, backend]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= most


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("k", [None, 2])
def test_a_graph_has_the_gradient_with_and_without_an_entropy(backend, entropy, k, forget):
    logits, ids = torch.randn(N, V), tokens(k)
    head = torch.randn(V, 8)

    def of_logits(x):
        return kd.token_logprobs(x, ids, entropy=entropy, backend=backend).logprobs.sum()

    def of_hidden(x):
        return kd.linear_token_logprobs(x[:, :8], head, ids, entropy=entropy, backend=backend).logprobs.sum()

    for loss in (of_logits, of_hidden):
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
