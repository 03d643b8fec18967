"""``attention_kd_loss`` and ``relation_kd_loss`` beside autograd of their formulas in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import attention, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
B, H, LENGTH = 3, 4, 7
ROUNDING = {"fp32": 5e-6, "bf16": 4e-3, "fp16": 5e-4, "fp64": 1e-12}
LENGTHS = (7, 4, 0)


def operands(dtype="fp32", key_heads=H):
    generator = torch.Generator().manual_seed(0)
    shapes = ((H, 6), (key_heads, 6), (H, 10), (H // 2, 10))
    made = [torch.randn(B, LENGTH, h, d, generator=generator).to(DTYPES[dtype]) * 1.5 for h, d in shapes]
    # As models have them: heads are a transposed view.
    return [item.transpose(1, 2) for item in made]


def padding():
    return torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]


def scores(query, key, scale=None):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)


def textbook(query, key, teacher_query, teacher_key, **options):
    """The loss, one query at a time, over the keys that it sees."""
    kind, reduction = options.get("kind", "divergence"), options.get("reduction", "mean")
    mask = options.get("mask")
    mask = torch.ones(B, LENGTH, dtype=torch.bool) if mask is None else mask
    s = scores(query, key, options.get("student_scale"))
    t = scores(teacher_query, teacher_key, options.get("teacher_scale"))
    of_sequences = []
    for b in range(B):
        rows = []
        for i in range(LENGTH):
            seen = mask[b] & (torch.arange(LENGTH) <= i) if options.get("causal") else mask[b]
            if not mask[b, i]:
                continue
            student, teacher = s[b, :, i, seen], t[b, :, i, seen]
            if kind == "mse":
                rows.append((student - teacher).square().mean(-1))
                continue
            loss = {"divergence": options.get("divergence", "forward_kl")}
            loss["temperature"] = options.get("temperature", 1.0)
            rows.append(kd.kd_loss(student, teacher.detach(), reduction="none", backend="torch", **loss))
        of_sequences.append(torch.stack(rows, -1) if rows else s.new_zeros(H, 0))
    if reduction == "sequence_mean":
        means = [item.mean() if item.numel() else item.sum() for item in of_sequences]
        return torch.stack(means).mean()
    everything = torch.cat([item.flatten() for item in of_sequences])
    return everything.sum() if reduction == "sum" else everything.mean()


def off(got, expected):
    return ((got.detach().double() - expected.detach()).norm() / expected.norm().clamp(min=1e-30)).item()


def check(dtype, backend, key_heads=H, **options):
    query, key, *teacher = operands(dtype, key_heads)
    exact = [item.double().requires_grad_() for item in (query, key)]
    expected = textbook(*exact, *(item.double() for item in teacher), **options)
    gradients = torch.autograd.grad(expected * 3, exact)
    inputs = [item.clone().requires_grad_() for item in (query, key)]
    with testing.poisoned_memory():
        loss = kd.attention_kd_loss(*inputs, *teacher, backend=backend, **options)
        found = torch.autograd.grad(loss * 3, inputs)
    assert loss.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    assert off(loss, expected) < min(ROUNDING[dtype], 1e-5)
    for got, gradient, item in zip(found, gradients, inputs, strict=True):
        assert got.dtype == item.dtype and off(got, gradient) < ROUNDING[dtype]


CASES = {
    "mean": {},
    "padded": {"mask": padding()},
    "padded, by sequences": {"mask": padding(), "reduction": "sequence_mean"},
    "causal": {"causal": True, "reduction": "sum", "temperature": 2.0},
    "causal, padded": {"causal": True, "mask": padding(), "divergence": kd.JSD(0.3), "student_scale": 0.7},
    "reverse": {"divergence": "reverse_kl", "mask": padding(), "teacher_scale": 0.1},
    "scores": {"kind": "mse"},
    "scores, padded": {"kind": "mse", "mask": padding(), "causal": True},
}
# All at once, some sequences, some heads, some queries, one query.
CHUNKS = {"whole": None, "heads": 2 * LENGTH * LENGTH * 8, "queries": 3 * LENGTH * 8, "one": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, dtype, backend):
    check(dtype, backend, **CASES[name])


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", ["causal, padded", "scores, padded", "padded, by sequences"])
@pytest.mark.parametrize("key_heads", [H, 2, 1])
def test_in_chunks_and_with_shared_keys(name, chunk, key_heads):
    check("fp32", "auto", key_heads, chunk_bytes=chunk, **CASES[name])


def test_no_more_scores_than_a_chunk(monkeypatch):
    query, key, *teacher = operands()
    seen = []
    product = attention._product

    def recorded(a, b, *args, **kwargs):
        made = product(a, b, *args, **kwargs)
        seen.append(made.numel() if made.shape[-1] == LENGTH else 0)
        return made

    monkeypatch.setattr(attention, "_product", recorded)
    for rows in (1, 3, LENGTH, 2 * LENGTH, 2 * H * LENGTH):
        seen.clear()
        kd.attention_kd_loss(query.requires_grad_(), key, *teacher, chunk_bytes=rows * LENGTH * 8).backward()
        assert 0 < max(seen) <= rows * LENGTH and sum(seen) == 2 * B * H * LENGTH**2


def test_what_is_masked_is_not_looked_at(backend):
    mask = padding()
    query, key, *teacher = operands()
    spoilt = [torch.where(mask[:, None, :, None], item, torch.nan) for item in (query, key, *teacher)]
    for options in ({}, {"kind": "mse"}, {"causal": True}):
        losses, gradients = [], []
        for tensors in ((query, key, *teacher), spoilt):
            inputs = [item.clone().requires_grad_() for item in tensors[:2]]
            loss = kd.attention_kd_loss(*inputs, *tensors[2:], mask=mask, backend=backend, **options)
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, inputs))
        torch.testing.assert_close(*losses)
        for clean, other in zip(*gradients, strict=True):
            torch.testing.assert_close(clean, other)


def test_nothing_counts():
    query, key, *teacher = operands()
    loss = kd.attention_kd_loss(query.requires_grad_(), key, *teacher, mask=torch.zeros(B, LENGTH, dtype=torch.bool))
    assert loss == 0 and not torch.autograd.grad(loss, query)[0].any()
    empty = [item[:0] for item in (query, key, *teacher)]
    for reduction in attention.REDUCTIONS:
        assert kd.attention_kd_loss(*empty, reduction=reduction) == 0


def test_only_what_requires_grad_gets_one():
    query, key, *teacher = operands()
    for needs in ((True, False), (False, True)):
        inputs = [item.clone().requires_grad_(need) for item, need in zip((query, key), needs, strict=True)]
        kd.attention_kd_loss(*inputs, *teacher).backward()
        assert [item.grad is not None for item in inputs] == list(needs)
    assert not kd.attention_kd_loss(query, key, *teacher).requires_grad
    for k, name in enumerate(("teacher_query", "teacher_key")):
        learning = [item.clone().requires_grad_(j == k) for j, item in enumerate(teacher)]
        with pytest.raises(ValueError, match=f"{name} must not require grad"):
            kd.attention_kd_loss(query, key, *learning)


def test_a_second_derivative_is_refused():
    query, key, *teacher = operands()
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(kd.attention_kd_loss(query, key, *teacher), query, create_graph=True)


@pytest.mark.parametrize("name", ["causal, padded", "scores, padded"])
def test_one_graph(name, backend):
    query, key, *teacher = operands(key_heads=2)
    options = {"chunk_bytes": 2 * LENGTH * LENGTH * 8, "backend": backend, **CASES[name]}

    def loss(q, k):
        return kd.attention_kd_loss(q * 2, k, *teacher, **options) * 3

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [item.clone().requires_grad_() for item in (query, key)]
        value = function(*inputs)
        found.append((value.detach(), *torch.autograd.grad(value, inputs)))
    torch._dynamo.reset()
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)


def test_one_graph_of_the_relations_of_a_tensor_with_itself(backend):
    hidden, other = torch.randn(2, 7, 12, requires_grad=True), torch.randn(2, 7, 8)

    def loss(x):
        return kd.relation_kd_loss([x, x * 2], [other, other], heads=2, pairs=((0, 0), (1, 1), (0, 1)), backend=backend)

    found = [torch.autograd.grad(loss(hidden), hidden)[0]]
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found.append(torch.autograd.grad(traced(hidden), hidden)[0])
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_loss_scale_in_fp16_underflows_nothing():
    query, key, *teacher = operands("fp16")
    inputs = [item.clone().requires_grad_() for item in (query, key)]
    exact = [item.double().requires_grad_() for item in (query, key)]
    tiny = {"student_scale": 1e-4, "teacher_scale": 0.4}
    expected = torch.autograd.grad(textbook(*exact, *(x.double() for x in teacher), **tiny) * 1e-4 * 2.0**20, exact)
    found = torch.autograd.grad(kd.attention_kd_loss(*inputs, *teacher, **tiny) * 1e-4 * 2.0**20, inputs)
    for got, gradient in zip(found, expected, strict=True):
        assert off(got, gradient) < 1e-3


# Relations


def vectors(dtype="fp32"):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(B, LENGTH, d, generator=generator).to(DTYPES[dtype]) for _ in range(3)] for d in (12, 20)]


def minilm(student, teacher, heads, mask=None):
    """As microsoft/unilm and its copies: log-softmax of relations, a mean over sequences of the mean of each."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = (item.view(B, LENGTH, heads, -1).transpose(1, 2) for item in (s, t))
        of_sequences = []
        for b in range(B):
            n = LENGTH if mask is None else int(mask[b].sum())
            if n == 0:
                of_sequences.append(s.new_zeros(()))
                continue
            a, c = (item[b, :, :n] @ item[b, :, :n].mT / math.sqrt(item.shape[-1]) for item in (s, t))
            kl = F.kl_div(a.log_softmax(-1), c.softmax(-1), reduction="sum")
            of_sequences.append(kl / (heads * n))
        total = total + torch.stack(of_sequences).mean()
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, padding()], ids=["whole", "padded"])
def test_minilm(mask, dtype, backend):
    student, teacher = vectors(dtype)
    exact = [item.double().requires_grad_() for item in student]
    expected = minilm(exact, [item.double() for item in teacher], 4, mask)
    gradients = torch.autograd.grad(expected, exact)
    student = [item.requires_grad_() for item in student]
    loss = kd.relation_kd_loss(
        student, teacher, heads=4, mask=mask, reduction="sequence_mean", backend=backend, chunk_bytes=900
    )
    assert off(loss, expected) < min(ROUNDING[dtype], 1e-5)
    for got, gradient in zip(torch.autograd.grad(loss, student), gradients, strict=True):
        assert off(got, gradient) < 2 * ROUNDING[dtype]


def test_pairs_and_weights():
    student, teacher = vectors()
    sides = [[item.unflatten(-1, (2, -1)).transpose(1, 2) for item in side] for side in (student, teacher)]
    one = kd.attention_kd_loss(sides[0][0], sides[0][1], sides[1][0], sides[1][1], causal=True)
    two = kd.attention_kd_loss(sides[0][2], sides[0][2], sides[1][2], sides[1][2], causal=True)
    found = kd.relation_kd_loss(student, teacher, heads=2, pairs=[(0, 1), (2, 2)], weights=[0.5, 2.0], causal=True)
    torch.testing.assert_close(found, 0.5 * one + 2 * two)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student_query": [1]}, TypeError, "student_query must be a torch.Tensor, got list"),
        ({"student_key": torch.zeros(B, H, LENGTH, 5)}, ValueError, r"student_key must have shape \(3, \"H'\", 7, 6\)"),
        ({"student_key": torch.zeros(B, 3, LENGTH, 6)}, ValueError, "a number of heads that divides student_query's 4"),
        (
            {"student_key": torch.zeros(B, H, LENGTH, 6).half()},
            TypeError,
            "student_key must have student_query's dtype",
        ),
        ({"teacher_query": torch.zeros(B, 2, LENGTH, 6)}, ValueError, "teacher_query must have student_query's B, H"),
        ({"teacher_query": torch.zeros(B, LENGTH, 6)}, ValueError, r"teacher_query must have shape \(B, H, n, d\)"),
        ({"teacher_key": torch.zeros(1).int()}, TypeError, "teacher_key must be float32"),
        ({"mask": torch.ones(B, LENGTH)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(B, 2).bool()}, ValueError, r"mask must have shape \(3, 7\), got \(3, 2\)"),
        ({"kind": "kl"}, ValueError, "kind must be one of"),
        ({"kind": "mse", "temperature": 2.0}, ValueError, "kind 'mse' compares scores as they are"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"causal": 1}, TypeError, "causal must be a bool"),
        ({"temperature": torch.ones(3)}, TypeError, "temperature must be a number, got Tensor"),
        ({"divergence": "kl"}, ValueError, "divergence"),
        ({"student_scale": "1"}, TypeError, "student_scale must be a number"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, message):
    names = ("student_query", "student_key", "teacher_query", "teacher_key")
    with pytest.raises(error, match=message):
        kd.attention_kd_loss(**{**dict(zip(names, operands(), strict=True)), **change})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student": torch.zeros(2)}, TypeError, "student must be a sequence of tensors, got Tensor"),
        ({"teacher": vectors()[1][:2]}, ValueError, "teacher must have as many tensors as student, 3, got 2"),
        ({"heads": 5}, ValueError, r"heads must divide the width of student\[0\], 12, got 5"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"pairs": []}, ValueError, "pairs must not be empty"),
        ({"pairs": [(0, 3)]}, ValueError, "pairs must be at most 2, got 3"),
        ({"pairs": [1]}, ValueError, "pairs must be pairs of indices, got 1"),
        ({"weights": [1.0]}, ValueError, "weights must have a number for each of the 3 pairs, got 1"),
        ({"mask": 3}, TypeError, "mask must be a torch.Tensor, got int"),
    ],
)
def test_errors_of_relations(change, error, message):
    student, teacher = vectors()
    with pytest.raises(error, match=message):
        kd.relation_kd_loss(**{"student": student, "teacher": teacher, "heads": 4, **change})
