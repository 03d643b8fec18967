"""``linear_token_logprobs`` and ``linear_gather_logprobs`` beside ``token_logprobs`` of all logits in fp64."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels import testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
N, D, V = 23, 16, 301
# Of results in the dtype of the sums, and of gradients rounded once, beside the rounding of the logits' gradient.
ROUNDING = {"fp32": 5e-6, "bf16": 4e-3, "fp16": 5e-4, "fp64": 1e-13}


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    reason = kd.backends.BACKENDS[request.param].why_not("cpu")
    if reason:
        pytest.skip(reason)
    return request.param


def operands(dtype="fp32", k=None, rows=N):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(DTYPES[dtype]).requires_grad_()
        for shape in ((rows, D), (V, D), (V,))
    )
    ids = torch.randint(0, V, (rows,) if k is None else (rows, k), generator=generator)
    ids[3], ids[5] = -1, -100
    return hidden, weight, bias, ids


def upstream(found):
    """A gradient for every log-probability and entropy; in two rows it is 0."""
    generator = torch.Generator().manual_seed(1)
    of_logprobs, of_entropy = (torch.randn(x.shape, generator=generator) for x in (found.logprobs, found.lse))
    of_logprobs[7], of_entropy[7], of_logprobs[8], of_entropy[9] = 0, 0, 0, 0
    return of_logprobs, of_entropy


def differentiate(found, inputs, scale=1.0):
    of_logprobs, of_entropy = upstream(found)
    loss = (found.logprobs * of_logprobs).sum()
    if found.entropy is not None:
        loss = loss + (found.entropy * of_entropy).sum()
    return torch.autograd.grad(loss * scale, [item for item in inputs if item is not None and item.requires_grad])


def truth(hidden, weight, bias, ids, **options):
    inputs = [None if item is None else item.detach().double().requires_grad_() for item in (hidden, weight, bias)]
    logits = inputs[0] @ inputs[1].t() + (0 if bias is None else inputs[2])
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    found = kd.token_logprobs(logits, ids, backend="torch", **options)
    return found, differentiate(found, inputs)


def off(got, expected):
    return ((got.detach().double() - expected.detach()).norm() / expected.norm().clamp(min=1e-30)).item()


CASES = {
    "a token a row": {},
    "entropy": {"entropy": True},
    "a temperature a row": {"entropy": True, "temperature": torch.linspace(0.5, 2.0, N)},
    "a softcap": {"entropy": True, "softcap": 5.0, "temperature": 0.7},
    "a padded head": {"vocab_size": V - 45, "entropy": True},
}


@dtypes
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, k, dtype, backend):
    hidden, weight, bias, ids = operands(dtype, k)
    options = CASES[name]
    ids = ids.clamp(max=options.get("vocab_size", V) - 1)
    with testing.poisoned_memory():
        found = kd.linear_token_logprobs(
            hidden, weight, ids, bias=bias, chunk_bytes=5 * V * 4, backend=backend, **options
        )
        grads = differentiate(found, (hidden, weight, bias))
    expected, true_grads = truth(hidden, weight, bias, ids, **options)
    for got, exact in zip(found, expected, strict=True):
        assert got is None or off(got, exact) < min(ROUNDING[dtype], 5e-6)
    for got, exact, item in zip(grads, true_grads, (hidden, weight, bias), strict=True):
        assert got.dtype == item.dtype and off(got, exact) < ROUNDING[dtype]


@pytest.mark.parametrize("k", [None, 3])
def test_statistics_are_those_of_the_logits(k, backend):
    hidden, weight, bias, ids = operands(k=k)
    options = {"temperature": torch.linspace(0.5, 2.0, N), "vocab_size": V - 45, "return_stats": True}
    logits = hidden.detach() @ weight.detach().t() + bias.detach()
    ids = ids.clamp(max=V - 46)
    ids.view(N, -1)[::2, 0] = logits[::2, : V - 45].argmax(-1)
    options |= {"backend": backend}
    found, of_chunks = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, chunk_bytes=5 * V * 4, **options)
    with torch.no_grad():
        _, without_grad = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, **options)
    _, expected = kd.token_logprobs(logits, ids, **{**options, "backend": "torch"})
    for stats in (of_chunks, without_grad):
        torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-5)
        assert not stats.log_sum_squares.requires_grad and stats.is_argmax.any()
    (grad,) = torch.autograd.grad(found.logprobs.sum(), hidden)
    plain = kd.linear_token_logprobs(
        hidden, weight, ids, bias=bias, chunk_bytes=5 * V * 4, **{**options, "return_stats": False}
    )
    torch.testing.assert_close(grad, torch.autograd.grad(plain.logprobs.sum(), hidden)[0])


def test_only_what_requires_grad_gets_one(backend):
    hidden, weight, bias, ids = operands()
    for part in ((hidden,), (weight,), (bias,), (hidden, bias)):
        for item in (hidden, weight, bias):
            item.requires_grad_(any(item is other for other in part))
        found = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, entropy=True, backend=backend)
        _, expected = truth(hidden, weight, bias, ids, entropy=True)
        for got, item in zip(differentiate(found, part), part, strict=True):
            index = [item is other for other in (hidden, weight, bias)].index(True)
            assert off(got, expected[index]) < 1e-5


def test_a_module_as_a_head_and_adapters(backend):
    hidden, _, _, ids = operands()
    head = torch.nn.Linear(D, V)
    found = kd.linear_token_logprobs(hidden, head, ids, backend=backend)
    again = kd.linear_token_logprobs(hidden, head.weight, ids, bias=head.bias, backend=backend)
    assert torch.equal(found.logprobs, again.logprobs)

    class Adapted(torch.nn.Linear):
        """A base whose weight hides what its forward adds, as LoRA's."""

        def __init__(self):
            super().__init__(D, V)
            self.lora_A = torch.nn.Parameter(torch.zeros(2, D))

        def forward(self, x):
            return super().forward(x)

    with pytest.raises((TypeError, ValueError), match="weight"):
        kd.linear_token_logprobs(hidden, Adapted(), ids, backend=backend)


def test_a_head_tied_to_the_embedding(backend):
    _, weight, _, ids = operands()
    tokens = torch.arange(N)
    found = kd.linear_token_logprobs(torch.nn.functional.embedding(tokens, weight), weight, ids, backend=backend)
    (grad,) = differentiate(found, (weight,))
    exact = weight.detach().double().requires_grad_()
    expected = kd.token_logprobs(exact[:N] @ exact.t(), ids, backend="torch")
    assert off(grad, differentiate(expected, (exact,))[0]) < 1e-5


def test_rows_that_do_not_count_are_not_multiplied(backend):
    hidden, weight, bias, ids = operands(k=2)
    with torch.no_grad():
        hidden[3], hidden[5] = torch.nan, torch.nan
    found = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, entropy=True, backend=backend)
    assert not found.logprobs[3].any() and found.entropy[5] == 0 and found.lse[5] == 0
    dhidden, dweight, dbias = differentiate(found, (hidden, weight, bias))
    assert torch.equal(dhidden[[3, 5, 7]], torch.zeros(3, D))
    assert torch.isfinite(dweight).all() and torch.isfinite(dbias).all()


def test_a_loss_scale_keeps_an_fp16_gradient(backend):
    """1/N and a weight leave fp16's range, and a GradScaler's factor brings them back before anything is rounded."""
    hidden, weight, bias, ids = operands("fp16")
    found = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend)
    grads = differentiate(found, (hidden, weight, bias), scale=1e-7 * 65536)
    _, expected = truth(hidden, weight, bias, ids)
    for got, exact in zip(grads, expected, strict=True):
        assert off(got / 6.5536e-3, exact) < 1e-2


def test_bf16_autocast_rounds_operands_alone(backend):
    hidden, weight, bias, ids = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend)
    rounded = [x.detach().bfloat16().double() for x in (hidden, weight, bias)]
    logits = rounded[0] @ rounded[1].t() + rounded[2]
    assert off(found.logprobs, kd.token_logprobs(logits, ids, backend="torch").logprobs) < 1e-5
    assert all(grad.dtype == torch.float32 for grad in differentiate(found, (hidden, weight, bias)))


def test_gradients_beyond_the_first_are_refused_or_right(backend):
    hidden, weight, bias, ids = (x.detach() for x in operands("fp64", rows=6))

    def loss(hidden):
        found = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, entropy=True, backend=backend)
        return (found.logprobs.square() + found.entropy).sum()

    leaf = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=backend == "torch")
    if backend == "torch":
        assert torch.autograd.gradgradcheck(loss, (leaf,))
        assert torch.func.hessian(loss)(hidden).shape == (6, D, 6, D)
        return
    with pytest.raises(RuntimeError, match='backend="torch"'):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="torch"'):
        torch.func.jvp(loss, (hidden,), (hidden,))


def test_batched_gradients(backend):
    hidden, weight, bias, ids = operands("fp64")
    found = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, entropy=True, backend=backend)
    given = torch.randn(3, N, dtype=torch.float64)
    batched = torch.autograd.grad(found.entropy, (hidden, weight), given, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        one = torch.autograd.grad(found.entropy, (hidden, weight), given[k], retain_graph=True)
        for got, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(got[k], expected)


def test_gradcheck(backend):
    hidden, weight, bias, ids = operands("fp64", k=2, rows=6)

    def loss(hidden, weight, bias):
        found = kd.linear_token_logprobs(
            hidden, weight, ids, bias=bias, entropy=True, temperature=1.3, chunk_bytes=2 * V * 8, backend=backend
        )
        return found.logprobs, found.entropy

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)


def test_one_graph_serves_any_number_of_rows(backend):
    def loss(hidden, weight, ids, temperature):
        found = kd.linear_token_logprobs(hidden, weight, ids, entropy=True, temperature=temperature, backend=backend)
        return found.logprobs.sum() + found.entropy.sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for rows, temperature in ((23, 1.0), (17, 0.7), (31, 1.3), (11, 0.9)):
        hidden, weight, _, ids = operands(rows=rows)
        got = torch.autograd.grad(compiled(hidden, weight, ids, temperature), (hidden, weight))
        expected = torch.autograd.grad(loss(hidden, weight, ids, temperature), (hidden, weight))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("pattern", ["token_fwd", "token_bwd"])
def test_opcheck(pattern):
    reason = kd.backends.BACKENDS["cpu"].why_not("cpu")
    if reason:
        pytest.skip(reason)
    hidden, weight, bias, ids = (x.detach() for x in operands(k=2))
    options = {
        "backend": "cpu",
        "chunk_bytes": 5 * V * 4,
        "product_dtype": None,
        "logits_dtype": None,
        "vocab_size": V,
        "numbers": [1.0, 0.0],
        "choices": [-100, 1, 0, 1],
    }
    namespace = torch.ops.kdkernels
    operands_of_op = (hidden, weight, bias, ids, None)
    if pattern == "token_bwd":
        logprobs, entropy, _, _, norm, _ = namespace.linear_token_fwd(*operands_of_op, **options)
        given = (torch.randn_like(logprobs), torch.randn_like(entropy))
        operands_of_op = (hidden, weight, bias, ids, norm, entropy, *given, None)
        options["needs"] = [True, True, True]
    torch.library.opcheck(getattr(namespace, f"linear_{pattern}").default, operands_of_op, options)


def test_memory_does_not_grow_with_the_rows():
    """A few numbers a row stay from forward to backward; nothing of size [N, V] is among it."""
    hidden, weight, bias, ids = operands()
    sizes = []

    def pack(item):
        sizes.append(item.numel())
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
        kd.linear_token_logprobs(hidden, weight, ids, bias=bias, entropy=True)
    assert max(sizes) == V * D and sum(sizes) < V * D + V + N * (D + 6)


def test_gathered_from_hidden_states(backend):
    hidden, weight, bias, ids = operands(k=4)
    ids = ids.clamp(min=-1)
    found = kd.linear_gather_logprobs(
        hidden, weight, ids, teacher_bias=bias, temperature=1.5, chunk_bytes=5 * V * 4, backend=backend
    )
    logits = (hidden @ weight.t() + bias).detach()
    expected = kd.gather_logprobs(logits.double(), ids, temperature=1.5, backend="torch")
    assert torch.equal(found.ids, expected.ids) and not found.logprobs.requires_grad
    torch.testing.assert_close(found.logprobs.double(), expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.tail_logprob.double(), expected.tail_logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(N - 1, dtype=torch.long)}, ValueError, "ids must have shape"),
        ({"ids": torch.zeros(N)}, TypeError, "ids must be int64 or int32"),
        ({"ids": torch.full((N,), V)}, ValueError, "ids must be in"),
        ({"weight": torch.zeros(V, D + 1)}, ValueError, "weight"),
        ({"bias": torch.zeros(V - 1)}, ValueError, "bias"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"entropi": True}, TypeError, "entropy"),
        ({"inplace_backward": True}, TypeError, "inplace_backward"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument(change, error, message):
    hidden, weight, bias, ids = operands()
    arguments = {"hidden": hidden, "weight": weight, "ids": ids, "bias": bias, **change}
    with pytest.raises(error, match=message):
        kd.linear_token_logprobs(**arguments)
