"""capture_topk against sorting in fp64, capture_samples against the distribution it estimates, and both in the loss."""

import math

import pytest
import torch

import kdkernels as kd
from kdkernels import backends, ops, testing

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INF = math.inf


@pytest.fixture(autouse=True)
def poisoned_memory():
    """An output that is not written shows."""
    with testing.poisoned_memory():
        yield


def expected(logits, k, temperature=1.0):
    """Ids, log-probabilities and tail of one row of logits ``[V]``, by Python's sort and sums in fp64."""
    x = logits.double()
    order = sorted(range(len(x)), key=lambda v: (-float(logits[v]), v))
    logp = torch.log_softmax(x / temperature, -1)
    ids = [v if logits[v] > -INF else -1 for v in order[:k]]
    return ids, logp[order[:k]], torch.logsumexp(logp[order[k:]], -1) if k < len(x) else torch.tensor(-INF).double()


def check(logits, k, *, backend, temperature=1.0, atol=None):
    got = kd.capture_topk(logits, k, temperature=temperature, backend=backend)
    sums = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert (got.ids.dtype, got.logprobs.dtype, got.tail_logprob.dtype) == (torch.int32, sums, sums)
    assert got.ids.shape == got.logprobs.shape == (*logits.shape[:-1], k)
    assert got.tail_logprob.shape == logits.shape[:-1]
    # Kernels use a polynomial of lower degree for 16-bit logits.
    atol = {torch.float64: 1e-12, torch.float32: 1e-6}.get(logits.dtype, 6e-6) if atol is None else atol
    for i, row in enumerate(logits):
        t = float(temperature[i]) if isinstance(temperature, torch.Tensor) else temperature
        ids, logprobs, tail = expected(row, k, t)
        assert got.ids[i].tolist() == ids
        rtol = torch.finfo(sums).eps * 4
        torch.testing.assert_close(got.logprobs[i].double(), logprobs, rtol=rtol, atol=atol)
        torch.testing.assert_close(got.tail_logprob[i].double(), tail, rtol=rtol, atol=atol)
    return got


# On either side of a vector, a tile, the buffer of candidates and the vocabulary; 16-bit logits have many ties.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,columns", [(1, 1), (3, 7), (1, 5000), (64, 2047), (256, 4101), (2048, 4500), (900, 900)])
def test_against_sorting(k, columns, dtype, backend):
    check((torch.randn(3, columns) * 3).to(DTYPES[dtype]), k, backend=backend)


@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize(
    "name,row",
    [
        ("equal", torch.zeros(4200)),
        ("rising", torch.arange(4200.0)),
        ("falling", -torch.arange(4200.0) / 50),
        ("zeros of both signs", torch.where(torch.arange(4200) % 3 == 0, 0.0, -0.0)),
        ("large", torch.randn(4200, generator=torch.Generator().manual_seed(1)) * 1e4),
        (
            "late peaks",
            torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(2)), torch.full((200,), 90.0)]),
        ),
        ("mostly -inf", torch.where(torch.arange(4200) % 40 == 0, torch.arange(4200.0) % 7, -INF)),
        ("one-hot", torch.where(torch.arange(4200) == 17, 300.0, 0.0)),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "row",
)
def test_patterns(name, row, k, backend):
    check(torch.stack([row, row.flip(0)]), k, backend=backend, atol=1e-3 if name in ("large", "rising") else None)


@pytest.mark.parametrize("temperature", [0.25, torch.tensor([0.5, 1.0, 7.0])], ids=["number", "rows"])
def test_temperature(temperature, backend):
    check(torch.randn(3, 300), 9, temperature=temperature, backend=backend, atol=5e-6)


def test_tail_far_below_one(backend):
    """As a difference from 1 it would be 0 from 40 nats on, in fp64 too."""
    logits = torch.randn(4, 500)
    logits[:, 100:103] += torch.tensor([10.0, 60.0, 300.0, 3000.0])[:, None]
    got = check(logits, 3, backend=backend, atol=1e-3)
    assert bool((got.tail_logprob[1:] < -40).all()) and bool(torch.isfinite(got.tail_logprob).all())


def test_rows_without_a_distribution(backend):
    logits = torch.randn(5, 70)
    logits[0, 50], logits[1, 3], logits[2] = torch.nan, INF, -INF
    logits[3, 4:] = -INF
    got = kd.capture_topk(logits, 6, backend=backend)
    assert got.logprobs[:3].isnan().all() and got.tail_logprob[:3].isnan().all()
    assert got.ids[:3].tolist() == [list(range(6))] * 3
    assert got.ids[3, 4:].tolist() == [-1, -1] and got.logprobs[3, 4:].tolist() == [-INF, -INF]
    assert got.tail_logprob[3] == -INF
    check(logits[4:], 6, backend=backend)
    with pytest.raises(ValueError, match="teacher_logprobs must not be NaN"):
        kd.topk_kd_loss(logits, *got[:2], backend=backend)


def test_any_strides_padding_and_no_rows(backend):
    logits = torch.randn(2, 3, 5, 90)[:, :2, ::2, 7:]
    got = kd.capture_topk(logits, 4, vocab_size=80, backend=backend)
    want = kd.capture_topk(logits[..., :80].contiguous().double(), 4, backend="torch")
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.tail_logprob.double(), want.tail_logprob, rtol=0, atol=1e-6)
    empty = kd.capture_topk(torch.randn(0, 3, 9), 2, backend=backend)
    assert [tuple(t.shape) for t in empty] == [(0, 3, 2), (0, 3, 2), (0, 3)]
    one = kd.capture_topk(torch.randn(9), 2, backend=backend)
    assert [tuple(t.shape) for t in one] == [(2,), (2,), ()]
    assert not kd.capture_topk(torch.randn(3, 9, requires_grad=True), 2, backend=backend).logprobs.requires_grad


def test_as_torch_does_it(backend):
    logits = torch.randn(4, 3000)
    got = kd.capture_topk(logits, 50, backend=backend)
    values, ids = logits.topk(50)
    assert torch.equal(got.ids.long(), ids)
    torch.testing.assert_close(got.logprobs, values - torch.logsumexp(logits, -1, keepdim=True))


def test_rows_are_divided_among_threads():
    logits = torch.randn(50, 3000)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(kd.capture_topk(logits, 20))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_captured_teacher_in_the_loss(divergence, dtype, backend):
    """The bucket of a dense teacher in fp64; captured log-probabilities rounded to 16 bits keep their exact tail."""
    student, teacher = torch.randn(5, 200).to(DTYPES[dtype]), (torch.randn(5, 200) * 4).to(DTYPES[dtype])
    captured = kd.capture_topk(teacher, 8, backend=backend)
    ids = captured.ids.long()

    def bucketed(logits):
        logp = torch.log_softmax(logits.double(), -1)
        rest = torch.logsumexp(logp.scatter(1, ids, -INF), -1, keepdim=True)
        return torch.cat([logp.gather(1, ids), rest], 1)

    def losses(x):
        yield kd.topk_kd_loss(
            x, *captured[:2], tail_logprob=captured.tail_logprob, divergence=divergence, backend=backend
        )
        yield kd.kd_loss(bucketed(x), bucketed(teacher), divergence=divergence, backend="torch")

    found = []
    for index in range(2):
        x = student.detach().clone().requires_grad_()
        loss = list(losses(x))[index]
        loss.backward()
        found.append((loss.detach().double(), x.grad.double()))
    tolerance = 1e-5 if dtype == "fp32" else 1e-4
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.01 if dtype == "bf16" else 1e-4, atol=1e-6)
    half = captured.logprobs.bfloat16()
    rounded = kd.topk_kd_loss(student, captured.ids, half, tail_logprob=captured.tail_logprob, backend=backend)
    assert math.isfinite(float(rounded))


def test_op_is_registered_as_torch_wants_it():
    if reason := backends.BACKENDS["cpu"].why_not("cpu"):
        pytest.skip(reason)
    options = {"k": 3, "vocab_size": 28, "temperature": 1.0}
    arguments = (torch.randn(2, 4, 30), torch.full((8,), 2.0))
    torch.library.opcheck(torch.ops.kdkernels.capture_topk_cpu.default, arguments, ops.packed("capture_topk", options))


# Inductor takes 20 seconds for the sort of the reference.
@pytest.mark.parametrize(
    "compiler,backend",
    [("eager", "cpu"), ("eager", "torch"), pytest.param("inductor", "cpu", marks=pytest.mark.slow)],
    indirect=["backend"],
)
def test_in_one_graph(compiler, backend):
    def capture_and_learn(student, teacher):
        captured = kd.capture_topk(teacher, 5, backend=backend)
        return kd.topk_kd_loss(student, *captured[:2], tail_logprob=captured.tail_logprob, backend=backend)

    student, teacher = torch.randn(2, 4, 60, requires_grad=True), torch.randn(2, 4, 60)
    loss = torch.compile(capture_and_learn, fullgraph=True, backend=compiler)(student, teacher)
    loss.backward()
    want = capture_and_learn(student.detach(), teacher)
    torch.testing.assert_close(loss.detach(), want)
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize(
    "error,message,arguments,options",
    [
        (TypeError, "teacher_logits must be a torch.Tensor, got list", ([[1.0]], 1), {}),
        (TypeError, "teacher_logits must be float32, .* got int64", (torch.zeros(2, 9).long(), 1), {}),
        (ValueError, "teacher_logits must have stride 1", (torch.zeros(9, 2).t(), 1), {}),
        (ValueError, "k must be at most the vocabulary's size 9, got 10", (torch.zeros(2, 9), 10), {}),
        (ValueError, "k must be at most the vocabulary's size 5, got 6", (torch.zeros(2, 9), 6), {"vocab_size": 5}),
        (ValueError, "k must be at least 1, got 0", (torch.zeros(2, 9), 0), {}),
        (TypeError, "k must be an int, got float", (torch.zeros(2, 9), 2.0), {}),
        (ValueError, "vocab_size must be at most teacher_logits's width 9", (torch.zeros(2, 9), 1), {"vocab_size": 10}),
        (ValueError, "temperature must be > 0, got 0", (torch.zeros(2, 9), 1), {"temperature": 0.0}),
        (
            ValueError,
            "temperature must be a number or .* shape",
            (torch.zeros(2, 9), 1),
            {"temperature": torch.ones(3)},
        ),
        (ValueError, "backend must be one of", (torch.zeros(2, 9), 1), {"backend": "gpu"}),
        (
            ValueError,
            "'triton' cannot run this call: it runs on GPU tensors",
            (torch.zeros(2, 9), 1),
            {"backend": "triton"},
        ),
    ],
)
def test_errors(error, message, arguments, options):
    with pytest.raises(error, match=message):
        kd.capture_topk(*arguments, **options)


def dense_weights(samples, columns):
    """The estimate of p: ``[N, V]``."""
    used = samples.ids >= 0
    weights = torch.where(used, samples.logprobs.exp(), 0.0)
    return torch.zeros(len(samples.ids), columns, dtype=weights.dtype).scatter_add(
        1, samples.ids.clamp(min=0).long(), weights
    )


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_samples_are_unbiased(power):
    """Over 4000 rows alike the mean estimate of p, and of the gradient of the full KL, within 5 standard errors."""
    rows, columns, temperature = 4000, 30, 2.0
    student, teacher = torch.randn(columns).double(), (torch.randn(columns) * 3).double()
    teacher[3] = -INF
    p = torch.softmax(teacher / temperature, -1)
    generator = torch.Generator().manual_seed(7)
    samples = kd.capture_samples(
        teacher.expand(rows, -1), 6, proposal_power=power, temperature=temperature, generator=generator
    )
    estimates = dense_weights(samples, columns)
    error = (estimates.mean(0) - p).abs()
    assert bool((error <= 5 * estimates.std(0) / math.sqrt(rows) + 1e-12).all())
    assert bool((estimates[:, 3] == 0).all())
    if power == 1.0:
        torch.testing.assert_close(estimates.sum(-1), torch.ones(rows).double())

    s = student.expand(rows, -1).clone().requires_grad_()
    kd.topk_kd_loss(s, *samples[:2], tail="drop", reduction="sum", backend="torch").backward()
    full = torch.softmax(student, -1) - p
    error = (s.grad.mean(0) - full).abs()
    assert bool((error <= 5 * s.grad.std(0) / math.sqrt(rows) + 1e-12).all())


def test_samples_and_their_slots():
    logits = torch.randn(3, 4, 50)
    draw = lambda seed: kd.capture_samples(logits, 20, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    samples = draw(0)
    assert all(torch.equal(a, b) for a, b in zip(samples, draw(0), strict=True))
    assert not torch.equal(samples.ids, draw(1).ids)
    assert samples.ids.dtype == torch.int32 and samples.logprobs.dtype == torch.float32
    assert samples.ids.shape == samples.logprobs.shape == (3, 4, 20) and bool((samples.tail_logprob == -INF).all())
    used = samples.ids >= 0
    rows = (t.flatten(0, 1) for t in (samples.ids, samples.logprobs, used))
    for ids, logprobs, inside in zip(*rows, strict=True):
        found = ids[inside].tolist()
        assert found == sorted(set(found)) and bool((logprobs[~inside] == -INF).all())
        # Counts over n.
        torch.testing.assert_close(logprobs[inside].exp() * 20, (logprobs[inside].exp() * 20).round())
    torch.manual_seed(3)
    first = kd.capture_samples(logits, 20).ids
    torch.manual_seed(3)
    assert torch.equal(first, kd.capture_samples(logits, 20).ids)
    assert int(kd.capture_samples(logits, 20, vocab_size=5).ids.max()) < 5
    assert kd.capture_samples(logits[:0], 6).ids.shape == (0, 4, 6)


def test_samples_of_every_block_of_rows_have_their_own_temperatures(monkeypatch):
    monkeypatch.setattr("kdkernels.capture.SAMPLE_BLOCK", 100)
    logits, cold = torch.randn(6, 50), torch.tensor([True, False, False, False, True, True])
    samples = kd.capture_samples(logits, 20, temperature=torch.where(cold, 1e-4, 100.0))
    used = (samples.ids >= 0).sum(-1)
    assert bool((samples.ids[cold].amax(-1) == logits[cold].argmax(-1)).all())
    assert bool((used[cold] == 1).all()) and bool((used[~cold] > 8).all())


def test_rare_tokens_are_drawn_at_their_rate():
    """262144 alike: an fp32 running sum would round most of their shares away."""
    samples = kd.capture_samples(torch.zeros(1, 262144), 20000, generator=torch.Generator().manual_seed(0))
    ids = samples.ids[samples.ids >= 0].double()
    # Uniform over the vocabulary: the mean's standard error is V / sqrt(12 n).
    assert abs(float(ids.mean()) - 262143 / 2) < 5 * 262144 / math.sqrt(12 * len(ids))
    assert len(ids) > 18000


def test_samples_of_rows_without_a_distribution():
    logits = torch.randn(3, 9)
    logits[0, 4], logits[1] = torch.nan, -INF
    samples = kd.capture_samples(logits, 3)
    assert samples.logprobs[:2].isnan().all() and bool((samples.ids[:2] == 0).all())
    assert not samples.logprobs[2].isnan().any()


@pytest.mark.parametrize(
    "error,message,options",
    [
        (ValueError, "n must be at least 1, got 0", {"n": 0}),
        (ValueError, "proposal_power must be >= 0, got -1", {"proposal_power": -1.0}),
        (TypeError, "generator must be a torch.Generator, got int", {"generator": 3}),
        (ValueError, "temperature must be > 0", {"temperature": -1}),
    ],
)
def test_errors_of_samples(error, message, options):
    with pytest.raises(error, match=message):
        kd.capture_samples(torch.zeros(2, 9), **{"n": 4, **options})
