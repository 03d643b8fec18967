"""The linear losses held against the full [N, V] formulation in fp64, and in what people build around a head."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import backends, chunked, divergences, heads, ops, testing

pytestmark = pytest.mark.skipif(
    backends.BACKENDS["cpu"].why_not("cpu") is not None, reason="the C++ extension was not built: the loop runs on it"
)

N, V, D, TEACHER_D = 13, 40, 6, 9
K = 5
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On top of eager PyTorch's error in the same dtype, relative to the norm of the truth.
MARGIN = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


NONE_GIVEN = ("chunk_bytes", "product_dtype", "logits_dtype")


def make(dtype=torch.float32, *, rows=(N,), vocab=V, teacher_vocab=V, width=D, seed=0):
    """Student hidden states, head and bias, which require grad; teacher hidden states and head; labels, 2 ignored."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    student = [x.requires_grad_() for x in (normal(*rows, width), normal(vocab, width), normal(vocab))]
    teacher = [normal(*rows, TEACHER_D), normal(teacher_vocab, TEACHER_D)]
    labels = torch.randint(0, min(vocab, teacher_vocab) - 3, rows, generator=g)
    labels.view(-1)[1::7] = -100
    return student, teacher, labels


def sparse_teacher(rows=(N,), vocab=V, seed=1):
    """Ids with a duplicate and unused slots, and log-probabilities of a sum below 1."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(*rows, vocab, generator=g).argsort(-1)[..., :K]
    ids[..., 0, 1] = ids[..., 0, 0]
    ids[..., 1, 2:] = -1
    return ids, torch.log_softmax(torch.randn(*rows, K, generator=g, dtype=torch.float64), -1) - 0.1


def as_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def gradients(loss, inputs):
    """The loss, and its gradients for a grad_output that is not 1."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs, torch.tensor(-1.7, dtype=value.dtype))]


def hold(ours, full, inputs):
    """``ours(hidden, weight, bias)`` against ``full`` of the same on fp64 copies, with ``full`` in fp32 as the bar:

    The bar is in fp32 or wider: that the whole formulation rounds logits to 16 bits excuses nobody.
    """
    dtype = inputs[0].dtype
    with testing.poisoned_memory():
        got = gradients(ours, inputs)
    eager = gradients(full, [x.to(heads.sum_dtype(dtype)) for x in inputs])
    truth = gradients(full, [x.double() for x in inputs])
    for name, a, b, c, like in zip(("loss", "dh", "dw", "db"), got, eager, truth, [None, *inputs], strict=False):
        assert like is None or a.dtype == like.dtype, name
        error, bar = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= 1.1 * bar + MARGIN[dtype] * (c.norm() + c.abs().max()), f"{name}: {error} > {bar}"
    return got


def hold_dense(dtype, *, size=None, chunk_rows=4, bias=True, teacher_vocab=V, backend="cpu", **options):
    student, (teacher_hidden, teacher_weight), labels = make(dtype, teacher_vocab=teacher_vocab, **(size or {}))
    if not options.pop("labels", True):
        labels = None
    chunk_bytes = max(1, chunk_rows * 2 * student[1].shape[0] * dtype.itemsize)

    def ours(hidden, weight, *bias):
        return kd.linear_kd_loss(
            hidden, weight, teacher_hidden, teacher_weight, labels, student_bias=bias[0] if bias else None,
            chunk_bytes=chunk_bytes, backend=backend, **options,
        )  # fmt: skip

    def full(hidden, weight, *bias):
        exact = {name: as_double(value) if hidden.dtype == torch.float64 else value for name, value in options.items()}
        t = F.linear(teacher_hidden.to(hidden.dtype), teacher_weight.to(hidden.dtype))
        return kd.kd_loss(F.linear(hidden, weight, *bias), t, labels, backend="torch", **exact)

    return hold(ours, full, student if bias else student[:2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("divergence", divergences.names())
def test_every_divergence_equals_the_full_formulation(divergence, dtype):
    hold_dense(dtype, divergence=divergence, temperature=2.0, ce_weight=0.5)


OPTIONS = {
    "no-labels": {"labels": False},
    "no-bias": {"bias": False},
    "sum": {"reduction": "sum"},
    "batchmean": {"reduction": "batchmean"},
    "normalizer": {"normalizer": torch.tensor(7.0), "reduction": "sum"},
    "row-weight": {"row_weight": torch.linspace(0, 2, N)},
    "temperatures": {"temperature": torch.linspace(0.5, 4, N), "teacher_temperature": 1.5},
    "no-t-squared": {"temperature": 3.0, "scale_by_t_squared": False},
    "objective": {"kd_weight": 0.3, "ce_weight": 0.5, "z_loss_weight": 1e-2, "label_smoothing": 0.1},
    "softcaps": {"student_softcap": 3.0, "teacher_softcap": 2.0},
    "vocab": {"vocab_size": V - 3, "teacher_vocab": V + 5},
    "standardize": {"standardize": True},
    "row-param": {"divergence": "jsd", "row_param": torch.linspace(0.1, 0.9, N)},
    "one-row-a-chunk": {"chunk_rows": 0},
    "one-chunk": {"chunk_rows": 1000},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_equals_the_full_formulation(options, backend):
    hold_dense(torch.float32, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [heads.CPU_BLOCK_COLUMNS, 2 * heads.CPU_BLOCK_COLUMNS + 3])
def test_a_head_of_several_blocks(dtype, vocab, monkeypatch):
    monkeypatch.setattr(heads, "PIECE_BYTES", 1)  # sums of several pieces
    hold_dense(dtype, size={"vocab": vocab}, teacher_vocab=vocab, vocab_size=vocab - 1, temperature=2.0)


def mixed_on_any_cpu(a, b, out, *, add):
    """Stands in for ``heads.mixed_product`` of a device that has it."""
    assert b.dtype.itemsize == 2 and out.dtype == torch.float32
    product = a.to(b.dtype).float() @ b.float()
    out.copy_(product + out if add else product)


@pytest.mark.parametrize("way", ["mixed", "widened"])
def test_both_ways_of_16_bit_products(way, monkeypatch):
    """Products as on a device with 16-bit units, whatever this one has."""
    monkeypatch.setattr(heads, "products", lambda device, dtype, **_: way if dtype.itemsize == 2 else "plain")
    monkeypatch.setattr(heads, "mixed_product", mixed_on_any_cpu)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        hold_dense(dtype, divergence="jsd", ce_weight=0.5)


def test_16_bit_gradients_of_many_chunks_are_summed_in_fp32():
    """One row a chunk: sums in bf16 would lose a row's share of the head's gradient to rounding."""
    size = {"rows": (600,), "vocab": 8}
    got = hold_dense(torch.bfloat16, size=size, teacher_vocab=8, chunk_rows=0, labels=False)
    once = hold_dense(torch.bfloat16, size=size, teacher_vocab=8, chunk_rows=600, labels=False)
    for a, b in zip(got, once, strict=True):
        assert (a.double() - b.double()).norm() <= 4e-3 * b.double().norm()


def test_leading_dimensions_and_statistics(backend):
    student, teacher, labels = make(rows=(3, 5))
    options = {"labels": labels, "temperature": 2.0, "return_stats": True, "backend": backend}
    loss, stats = kd.linear_kd_loss(
        *student[:2], *teacher, student_bias=student[2], teacher_bias=student[2].detach(), chunk_bytes=1000, **options
    )
    t = F.linear(*teacher, student[2].detach())
    expected, expected_stats = kd.kd_loss(F.linear(*student), t, **options)
    torch.testing.assert_close(loss, expected)
    for name, a, b in zip(kd.KDStats._fields, stats, expected_stats, strict=True):
        assert a.shape == (3, 5) and not a.requires_grad
        torch.testing.assert_close(a, b, msg=name)


def test_a_mixture_of_teachers(backend):
    student, teacher, labels = make()
    other = [torch.randn(N, 3), torch.randn(V, 3)]
    weights = torch.rand(N, 2).softmax(-1)
    options = {"teacher_weights": weights, "temperature": 2.0, "backend": backend}
    call = functools.partial(
        kd.linear_kd_loss, teacher_hidden=[teacher[0], other[0]], teacher_weight=[teacher[1], other[1]], labels=labels
    )
    got = gradients(lambda h, w: call(h, w, chunk_bytes=1000, **options), student[:2])
    pair = [F.linear(*teacher), F.linear(*other)]
    expected = gradients(lambda h, w: kd.kd_loss(F.linear(h, w), pair, labels, **options), student[:2])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    asked = gradients(
        lambda h, w: kd.linear_kd_loss(
            h, w, labels=labels, teacher_logits=lambda rows: [t[rows] for t in pair], chunk_bytes=1000, **options
        ),
        student[:2],
    )
    for a, b in zip(asked, expected, strict=True):
        torch.testing.assert_close(a, b)


class TestTeacherLogits:
    def test_rows_are_asked_for_once_and_those_that_count_only(self, backend):
        student, teacher, labels = make()
        logits, seen = F.linear(*teacher), []

        def answer(rows):
            seen.append(torch.arange(N)[rows])
            return logits[rows]

        for mask in (None, labels):
            seen.clear()
            got = gradients(
                lambda h, w, m=mask: kd.linear_kd_loss(
                    h, w, labels=m, teacher_logits=answer, chunk_bytes=500, backend=backend
                ),
                student[:2],
            )
            expected = gradients(lambda h, w, m=mask: kd.kd_loss(F.linear(h, w), logits, m), student[:2])
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
            counted = torch.arange(N) if mask is None else (labels != -100).nonzero().squeeze(1)
            assert len(seen) > 2 and torch.equal(torch.cat(seen), counted)

    def test_probabilities_of_another_dtype(self):
        student, teacher, _ = make()
        probs = F.linear(*teacher).softmax(-1).bfloat16()
        options = {"teacher_form": "probs", "divergence": "jsd"}
        loss = kd.linear_kd_loss(*student[:2], teacher_logits=probs.__getitem__, **options)
        torch.testing.assert_close(loss, kd.kd_loss(F.linear(*student[:2]), probs, **options))

    @pytest.mark.parametrize(
        ("answer", "error", "message"),
        [
            (lambda rows: torch.zeros(2, V), ValueError, rf"teacher_logits\(rows\) must have shape \({N}, V\)"),
            (lambda rows: torch.zeros(N, V - 1), ValueError, f"with V >= {V}, got"),
            (lambda rows: [torch.zeros(N, V)] * 2, ValueError, "teacher_logits must return 1 tensors"),
            (lambda rows: None, TypeError, r"teacher_logits\(rows\) must be a torch.Tensor"),
            (7, TypeError, "teacher_logits must be callable"),
        ],
        ids=["rows", "columns", "count", "none", "number"],
    )
    def test_a_wrong_answer_is_named(self, answer, error, message):
        student, _, _ = make()
        with pytest.raises(error, match=message):
            kd.linear_kd_loss(*student[:2], teacher_logits=answer)


TOPK = {
    "bucket": {"tail": "bucket", "teacher_temperature": 1.0, "temperature": 2.0},
    "uniform-ce-z": {"tail": "uniform", "ce_weight": 0.5, "z_loss_weight": 1e-2, "label_smoothing": 0.1},
    "renormalize-jsd": {"tail": "renormalize", "divergence": "jsd", "temperature": 2.0},
    "columns": {"tail": "renormalize_both", "temperature": 2.0},
    "columns-reverse-kl": {"tail": "renormalize_both", "divergence": "reverse_kl", "student_softcap": 3.0},
    "columns-jsd-rows": {
        "tail": "renormalize_both", "divergence": "jsd", "row_param": torch.linspace(0.1, 0.9, N),
        "temperature": torch.linspace(0.5, 3, N), "row_weight": torch.linspace(-1, 1, N), "vocab_size": V - 2,
    },
    "columns-with-ce": {"tail": "renormalize_both", "ce_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("options", TOPK.values(), ids=TOPK)
def test_a_sparse_teacher_equals_the_full_formulation(options, dtype, backend):
    student, _, labels = make(dtype)
    ids, logprobs = sparse_teacher(vocab=V - 2)

    def ours(hidden, weight, bias):
        return kd.linear_topk_kd_loss(
            hidden, weight, ids, logprobs, labels, student_bias=bias, chunk_bytes=600, backend=backend, **options
        )

    def full(hidden, weight, bias):
        exact = {name: as_double(value) if hidden.dtype == torch.float64 else value for name, value in options.items()}
        return kd.topk_kd_loss(F.linear(hidden, weight, bias), ids, logprobs, labels, backend="torch", **exact)

    hold(ours, full, student)


def test_only_the_k_columns_are_multiplied(monkeypatch):
    """The rest of the head may be NaN, and no product of all V columns is made."""
    student, _, _ = make()
    ids, logprobs = sparse_teacher(vocab=V // 2)
    monkeypatch.setattr(heads.Head, "project", None)
    with torch.no_grad():
        student[1][V // 2 :] = torch.nan
    loss, *grads = gradients(
        lambda h, w: kd.linear_topk_kd_loss(h, w, ids, logprobs, tail="renormalize_both"), student[:2]
    )
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)


def test_sparse_grad_holds_the_rows_that_have_one():
    student, _, labels = make()
    ids, logprobs = sparse_teacher(vocab=V // 2)

    def call(weight, sparse):
        return kd.linear_topk_kd_loss(
            student[0], weight, ids, logprobs, labels, tail="renormalize_both", sparse_grad=sparse, chunk_bytes=600
        )

    (dense,) = torch.autograd.grad(2 * call(student[1], False), student[1])
    (sparse,) = torch.autograd.grad(2 * call(student[1], True), student[1])
    assert sparse.is_coalesced() and sparse.shape == dense.shape and sparse.indices().shape[1] <= V // 2
    torch.testing.assert_close(sparse.to_dense(), dense)
    weight = student[1].detach().clone().requires_grad_()
    optimizer = torch.optim.SparseAdam([weight])
    call(weight, True).backward()
    optimizer.step()
    moved = (weight != student[1]).any(1)
    assert torch.equal(moved, (dense != 0).any(1))


class TestWhatNeedsAGradient:
    @pytest.mark.parametrize("frozen", range(8))
    def test_each_frozen_argument_costs_nothing(self, frozen, monkeypatch):
        student, teacher, labels = make()
        needs = [not frozen >> k & 1 for k in range(3)]
        expected = gradients(lambda *s: kd.kd_loss(F.linear(*s), F.linear(*teacher), labels), student)
        made = []
        monkeypatch.setattr(heads.HeadGrad, "finish", lambda *a, f=heads.HeadGrad.finish: made.append(1) or f(*a))
        tensors = [x.detach().requires_grad_(need) for x, need in zip(student, needs, strict=True)]
        loss = kd.linear_kd_loss(*tensors[:2], *teacher, labels, student_bias=tensors[2])
        assert loss.requires_grad == any(needs) and len(made) == needs[1] + needs[2]
        if any(needs):
            (-1.7 * loss).backward()
        for x, grad, need in zip(tensors, expected[1:], needs, strict=True):
            assert (x.grad is not None) == need
            if need:
                torch.testing.assert_close(x.grad, grad)

    def test_none_reduction_without_a_gradient(self, backend):
        student, teacher, labels = make()
        options = {"labels": labels, "reduction": "none", "divergence": "jsd", "backend": backend}
        with torch.no_grad():
            rows = kd.linear_kd_loss(*student[:2], *teacher, **options)
            torch.testing.assert_close(rows, kd.kd_loss(F.linear(*student[:2]), F.linear(*teacher), **options))
        assert not rows.requires_grad

    def test_a_kept_graph_gives_its_gradient_again(self):
        student, teacher, _ = make()
        loss = kd.linear_kd_loss(*student[:2], *teacher)
        first = torch.autograd.grad(2 * loss, student[:2], retain_graph=True)
        again = torch.autograd.grad(2 * loss, student[:2])
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


class TestRowsThatDoNotCount:
    @pytest.mark.parametrize("by", ["label", "weight"])
    def test_they_are_left_out_of_the_products(self, by, backend, monkeypatch):
        student, teacher, labels = make()
        counts = torch.arange(N) % 3 == 0
        options = {"labels": torch.where(counts, labels.clamp(min=0), -100)}
        if by == "weight":
            options = {"row_weight": counts.float()}
        expected = gradients(lambda h, w: kd.kd_loss(F.linear(h, w), F.linear(*teacher), **options), student[:2])
        projected = []
        project = heads.Head.project
        monkeypatch.setattr(
            heads.Head, "project", lambda self, h, out: projected.append(len(h)) or project(self, h, out)
        )
        for x in (student[0], teacher[0]):
            x.data[~counts] = torch.nan
        got = gradients(
            lambda h, w: kd.linear_kd_loss(h, w, *teacher, chunk_bytes=1000, backend=backend, **options), student[:2]
        )
        assert sum(projected) == 2 * counts.sum()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_none_counts(self, backend):
        student, teacher, labels = make()
        for grad in gradients(
            lambda *s: kd.linear_kd_loss(*s[:2], *teacher, labels.fill_(-100), student_bias=s[2], backend=backend),
            student,
        ):
            assert not grad.any()

    def test_no_rows(self, backend):
        student, teacher, _ = make(rows=(0,))
        for item in gradients(lambda h, w: kd.linear_kd_loss(h, w, *teacher, backend=backend), student[:2]):
            assert not item.any()

    def test_weight_zero_still_has_statistics(self):
        student, teacher, _ = make()
        weight = (torch.arange(N) % 2).float()
        options = {"row_weight": weight, "return_stats": True}
        with torch.no_grad():
            _, stats = kd.linear_kd_loss(*student[:2], *teacher, **options)
            _, expected = kd.kd_loss(F.linear(*student[:2]), F.linear(*teacher), **options)
        torch.testing.assert_close(stats.divergence, expected.divergence)


class TestAroundTheHead:
    """Frameworks: what a training step does to hidden states and heads before they come here."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_autocast_rounds_operands_and_keeps_fp32_sums(self, dtype, backend):
        student, teacher, labels = make(width=32)
        rounded = [x.detach().to(dtype).float().requires_grad_() for x in student]
        with torch.autocast("cpu", dtype):
            loss, stats = kd.linear_kd_loss(
                *student[:2], *teacher, labels, student_bias=student[2], return_stats=True, backend=backend
            )
        assert loss.dtype == stats.lse.dtype == torch.float32
        t = F.linear(*(x.to(dtype).float() for x in teacher))
        expected = kd.kd_loss(F.linear(*rounded), t, labels, backend=backend)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, rounded), strict=True):
            assert a.dtype == torch.float32 and (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()

    def test_autocast_of_k_columns(self):
        student, _, _ = make(width=32)
        ids, logprobs = sparse_teacher()
        with torch.autocast("cpu", torch.bfloat16):
            loss = kd.linear_topk_kd_loss(*student[:2], ids, logprobs, tail="renormalize_both")
        h, w = (x.detach().bfloat16().double() for x in student[:2])
        torch.testing.assert_close(
            loss.double(), kd.topk_kd_loss(F.linear(h, w), ids, logprobs, tail="renormalize_both")
        )

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant):
        student, teacher, labels = make()

        def call(hidden):
            return kd.linear_kd_loss(hidden.tanh(), student[1], *teacher, labels, ce_weight=0.5)

        expected = torch.autograd.grad(call(student[0]), student[:2])
        checkpoint(call, student[0], use_reentrant=reentrant).backward()
        for x, grad in zip(student[:2], expected, strict=True):
            torch.testing.assert_close(x.grad, grad, rtol=0, atol=0)

    def test_tied_embeddings_and_a_second_use(self):
        """The head is the embedding, and is used by two losses of one step."""
        student, teacher, labels = make()
        tokens = torch.arange(N) % V

        def step(linear):
            weight = student[1].detach().requires_grad_()
            hidden = F.embedding(tokens, weight).tanh()
            kd_part = linear(hidden, weight)
            (kd_part + 0.5 * linear(hidden * 0.3, weight) + hidden.sum()).backward()
            return weight.grad

        t = F.linear(*teacher)
        torch.testing.assert_close(
            step(lambda h, w: kd.linear_kd_loss(h, w, *teacher, labels)),
            step(lambda h, w: kd.kd_loss(F.linear(h, w), t, labels)),
        )

    def test_trl_5676_an_adapter_on_the_head_counts_and_learns(self):
        """Reading ``lm_head.weight`` passes LoRA by: the product is formed by the caller, and its factors learn."""
        student, teacher, _ = make()
        base = student[1].detach()

        def step(linear):
            a, b = torch.full((2, D), 0.3, requires_grad=True), torch.linspace(-1, 1, 2 * V).view(V, 2).requires_grad_()
            loss = linear(student[0], base, a, b)
            return [loss.detach(), *torch.autograd.grad(loss, (a, b))]

        got = step(lambda h, w, a, b: kd.linear_kd_loss(h, w + 0.5 * b @ a, *teacher))
        expected = step(
            lambda h, w, a, b: kd.kd_loss(F.linear(h, w) + 0.5 * F.linear(F.linear(h, a), b), F.linear(*teacher))
        )
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)

    def test_liger_332_a_sharded_head_is_refused_by_name_and_gathered_by_full_tensor(self, tmp_path):
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

        student, teacher, _ = make()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            weight = distribute_tensor(student[1].detach(), init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
            with pytest.raises(TypeError, match="student_weight must be a plain tensor, got a DTensor"):
                kd.linear_kd_loss(student[0], weight, *teacher)
            kd.linear_kd_loss(student[0], weight.full_tensor(), *teacher).backward()
            assert isinstance(weight.grad, DTensor)
            (expected,) = torch.autograd.grad(kd.linear_kd_loss(*student[:2], *teacher), student[1])
            torch.testing.assert_close(weight.grad.full_tensor(), expected)
        finally:
            torch.distributed.destroy_process_group()

    def test_compiled_to_one_graph_for_any_number_of_rows(self, backend):
        def model(hidden, weight, bias, teacher_hidden, teacher_weight, labels):
            return kd.linear_kd_loss(
                hidden.tanh(), weight, teacher_hidden, teacher_weight, labels, student_bias=bias, ce_weight=0.5,
                temperature=2.0, return_stats=True, chunk_bytes=1000, backend=backend,
            )  # fmt: skip

        torch._dynamo.reset()
        traced = torch.compile(model, backend="aot_eager", fullgraph=True)
        for rows in (N, N + 4):
            student, teacher, labels = make(rows=(rows,))
            found = []
            for function in (model, traced):
                loss, stats = function(*student, *teacher, labels)
                found.append((loss, stats.lse, *torch.autograd.grad(-2 * loss, student)))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)

    def test_compiled_sparse_teachers_and_autocast(self):
        student, teacher, _ = make()
        ids, logprobs = sparse_teacher()
        calls = [
            lambda h, w: kd.linear_topk_kd_loss(h, w, ids, logprobs, tail="renormalize_both"),
            lambda h, w: kd.linear_topk_kd_loss(h, w, ids, logprobs, teacher_temperature=1.0),
            lambda h, w: kd.linear_kd_loss(h, w, *teacher),
        ]
        for call in calls:
            torch._dynamo.reset()
            with torch.autocast("cpu", torch.bfloat16):
                traced = torch.compile(call, backend="aot_eager", fullgraph=True)
                for a, b in zip(gradients(traced, student[:2]), gradients(call, student[:2]), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
        wild = ids.clone()
        wild[3, 1] = V
        torch._dynamo.reset()
        call = functools.partial(kd.linear_topk_kd_loss, tail="renormalize_both", reduction="none")
        with torch.no_grad():
            rows = torch.compile(call, backend="aot_eager", fullgraph=True)(*student[:2], wild, logprobs)
        assert rows.isnan().nonzero().tolist() == [[3]]
        with pytest.raises(Exception, match="teacher_logits works in eager mode only"):
            torch.compile(
                lambda h, w: kd.linear_kd_loss(h, w, teacher_logits=lambda rows: h[rows] @ w.T),
                backend="aot_eager",
                fullgraph=True,
            )(*student[:2])

    @pytest.mark.parametrize("needs", [[True, True, True], [False, True, False]], ids=["all", "weight"])
    def test_opcheck(self, needs):
        student, teacher, labels = make()
        captured = {}
        original = chunked.execute

        def spy(call, *tensors):
            captured.update(call=call, tensors=tensors[:3])
            return original(call, *tensors)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kdkernels.linear.execute", spy)
            with torch.no_grad():
                kd.linear_kd_loss(*student[:2], *teacher, labels, student_bias=student[2], return_stats=True)
        call = captured["call"]
        launch = call.launch
        torch.library.opcheck(
            torch.ops.kdkernels.linear_dense_fwd.default,
            (*captured["tensors"], list(call.teacher_hidden), list(call.teacher_weight), [None], *launch.operands()),
            {"backend": "cpu", "needs": needs, **dict.fromkeys(NONE_GIVEN), **ops.packed("dense_fwd", launch.options)},
        )


class TestErrors:
    def call(self, **changes):
        student, teacher, labels = make()
        given = dict(zip(("student_hidden", "student_weight", "student_bias"), student, strict=True))
        given |= dict(zip(("teacher_hidden", "teacher_weight"), teacher, strict=True), labels=labels)
        return kd.linear_kd_loss(**{**given, **changes})

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"student_hidden": 3}, TypeError, "student_hidden must be a torch.Tensor, got int"),
            ({"student_weight": None}, TypeError, "student_weight must be a torch.Tensor, got NoneType"),
            ({"student_weight": torch.zeros(V, D + 1)}, ValueError, rf"student_weight must have shape \(V, {D}\), got"),
            ({"student_weight": torch.zeros(V, D).byte()}, TypeError, "student_weight must be float32, bfl"),
            ({"student_weight": torch.zeros(V, D).half()}, TypeError, "must have student_hidden's dtype float32"),
            ({"student_weight": torch.zeros(V, D, device="meta")}, ValueError, "on student_hidden's device cpu"),
            ({"student_bias": torch.zeros(V + 1)}, ValueError, rf"student_bias must have shape \({V},\), got"),
            ({"teacher_bias": torch.zeros(V, 1)}, ValueError, rf"teacher_bias must have shape \({V},\), got"),
            ({"teacher_hidden": torch.zeros(N + 1, TEACHER_D)}, ValueError, "teacher_hidden must have shape"),
            ({"teacher_weight": torch.zeros(V + 2, TEACHER_D)}, ValueError, "student's 40 rows, got 42; pass"),
            ({"teacher_weight": None}, TypeError, "teacher_weight is required unless teacher_logits is given"),
            ({"teacher_hidden": [torch.zeros(N, TEACHER_D)] * 2}, ValueError, "teacher_weight must be a sequence of 2"),
            ({"teacher_logits": len}, ValueError, "teacher_logits takes the place of teacher_hidden"),
            ({"teacher_form": "probs"}, ValueError, "teacher_form must be 'logits' unless teacher_logits is given"),
            ({"labels": torch.zeros(N - 1).long()}, ValueError, "labels must have shape"),
            ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
            ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes must be an int, got float"),
            ({"vocab_size": V + 1}, ValueError, "vocab_size must be at most student's width 40, got 41"),
            ({"divergence": "kl"}, ValueError, "divergence"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_they_name_the_argument(self, changes, error, message):
        with pytest.raises(error, match=message):
            self.call(**changes)

    @pytest.mark.parametrize("options", [{"tail": "bucket", "teacher_temperature": 1.0}, {"ce_weight": 1.0}])
    def test_a_sparse_gradient_needs_k_columns(self, options):
        student, _, labels = make()
        options = {"tail": "renormalize_both", "sparse_grad": True, **options}
        with pytest.raises(ValueError, match="sparse_grad needs tail 'renormalize_both' without ce_weight"):
            kd.linear_topk_kd_loss(*student[:2], *sparse_teacher(), labels, **options)

    def test_modules_check_their_options_when_built_and_call_the_functions(self):
        student, teacher, labels = make()
        with pytest.raises(TypeError, match="linear_kd_loss got an unexpected option 'inplace'"):
            kd.LinearKDLoss(inplace=True)
        with pytest.raises(ValueError, match="chunk_bytes must be at least 1"):
            kd.LinearTopKKDLoss(chunk_bytes=0, teacher_temperature=1.0)
        with pytest.raises(ValueError, match="teacher_temperature must be 1 with tail 'bucket'"):
            kd.LinearTopKKDLoss(temperature=2.0)
        module = kd.LinearKDLoss(temperature=2.0, chunk_bytes=1000)
        assert repr(module) == "LinearKDLoss(temperature=2.0, chunk_bytes=1000)"
        expected = kd.linear_kd_loss(*student[:2], *teacher, labels, student_bias=student[2], temperature=2.0)
        torch.testing.assert_close(module(*student[:2], *teacher, labels, student_bias=student[2]), expected)
        ids, logprobs = sparse_teacher()
        module = kd.LinearTopKKDLoss(tail="renormalize_both")
        torch.testing.assert_close(
            module(*student[:2], ids, logprobs, labels),
            kd.linear_topk_kd_loss(*student[:2], ids, logprobs, labels, tail="renormalize_both"),
        )
        tail = torch.full(ids.shape[:-1], -3.0)
        captured = kd.LinearTopKKDLoss()(*student[:2], ids, logprobs, labels, tail_logprob=tail)
        assert captured == kd.linear_topk_kd_loss(*student[:2], ids, logprobs, labels, tail_logprob=tail)
        assert captured != kd.linear_topk_kd_loss(*student[:2], ids, logprobs, labels)


class TestPeersBugs:
    def test_fla_1248_a_frozen_head_gets_no_gradient(self, monkeypatch):
        student, teacher, _ = make()
        monkeypatch.setattr(heads, "HeadGrad", None)
        monkeypatch.setattr(chunked, "HeadGrad", None)
        kd.linear_kd_loss(student[0], student[1].detach(), *teacher).backward()
        assert student[0].grad is not None

    def test_liger_634_padding_is_no_probability(self):
        """A teacher padded wider, with logits of 0 in the student's padding: equal models gave 0.018 and a gradient."""
        hidden, weight = torch.randn(N, D), torch.randn(V, D)
        padded = torch.cat([weight, torch.zeros(3, D)])
        for student_weight, teacher_weight in ((weight, padded), (padded, weight)):
            student_weight = student_weight.clone().requires_grad_()
            loss = kd.linear_kd_loss(hidden, student_weight, hidden, teacher_weight, vocab_size=V)
            loss.backward()
            assert loss == 0 and student_weight.grad.abs().max() < 1e-14

    def test_liger_12_nearly_equal_models_in_bf16(self):
        """Sums in bf16 gave a JSD of 1.0e-3 where fp32 gave 7.8e-7."""
        hidden, weight = torch.randn(64, 32).bfloat16(), (torch.randn(500, 32) / 4).bfloat16()
        other = torch.where(torch.rand(500, 32) < 0.01, weight * 1.01, weight)
        loss = kd.linear_kd_loss(hidden, other, hidden, weight, divergence="jsd")
        s, t = (F.linear(hidden.double(), w.double()) for w in (other, weight))
        expected = kd.kd_loss(s, t, divergence="jsd")
        assert 1e-8 < expected < 1e-4 and abs(loss - expected) < 0.1 * expected

    def test_trl_4719_one_normaliser_for_all_microbatches(self):
        student, teacher, labels = make()
        whole = gradients(lambda h, w: kd.linear_kd_loss(h, w, *teacher, labels), student[:2])
        count = (labels != -100).sum()
        parts = [
            gradients(
                lambda h, w, p=p: kd.linear_kd_loss(h[p], w, teacher[0][p], teacher[1], labels[p], normalizer=count),
                student[:2],
            )
            for p in (slice(0, 4), slice(4, N))
        ]
        for expected, *pieces in zip(whole, *parts, strict=True):
            torch.testing.assert_close(sum(pieces), expected)

    def test_trl_6629_softcaps_of_the_model_count(self):
        student, teacher, _ = make()
        loss = kd.linear_kd_loss(*student[:2], *teacher, student_softcap=2.0, teacher_softcap=2.0)
        s, t = (2 * torch.tanh(F.linear(*pair) / 2) for pair in (student[:2], teacher))
        torch.testing.assert_close(loss, kd.kd_loss(s, t))


MEMORY_SCRIPT = """
import sys, torch, kdkernels as kd
from benchmarks import measure
V, D, CHUNK = 32768, 64, 2**20
def run(N, V):
    student = [torch.randn(N, D), torch.randn(V, D) / 8]
    teacher = [torch.randn(N, D).bfloat16(), (torch.randn(V, D) / 8).bfloat16()]
    student = [x.bfloat16().requires_grad_() for x in student]
    before = measure.reset_peak("cpu")
    kd.linear_kd_loss(*student, *teacher, temperature=2.0, chunk_bytes=CHUNK, backend="cpu").backward()
    # The head's gradient counts as it is summed, in fp32.
    return measure.peak("cpu") - before - 2 * student[0].numel() - 4 * student[1].numel()
run(512, V)  # libraries of products keep code and workspace for a shape
print(run(512, V), run(1024, V))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or backends.BACKENDS["cpu"].why_not("cpu") is not None,
    reason="needs Linux's /proc and the C++ extension",
)
def test_liger_1261_peak_memory_does_not_grow_with_the_rows():
    """Peers keep [N, V] losses for a scalar; here it is the chunk, whatever N is: below 1/8 of one [N, V] tensor."""
    # glibc keeps freed blocks up to a threshold that it raises by itself: a fixed one returns every block.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    few, many = map(int, result.stdout.split())
    unit = 1024 * 32768 * 2
    assert 2**20 < many < unit / 8 and abs(many - few) < unit / 64, (few, many)


@pytest.mark.gpu
def test_on_a_gpu_a_16_bit_head_is_summed_in_fp32():
    student, teacher, labels = make(torch.bfloat16, rows=(512,), vocab=1000, teacher_vocab=1000, width=64)
    student = [x.detach().cuda().requires_grad_() for x in student]
    teacher, labels = [x.cuda() for x in teacher], labels.cuda()

    def full(hidden, weight, bias):
        t = F.linear(*(x.to(hidden.dtype) for x in teacher))
        if hidden.dtype == torch.float64:
            return kd.kd_loss(F.linear(hidden, weight, bias).cpu(), t.cpu(), labels.cpu(), backend="torch").cuda()
        return kd.kd_loss(F.linear(hidden, weight, bias), t, labels, backend="torch")

    hold(lambda h, w, b: kd.linear_kd_loss(h, w, *teacher, labels, student_bias=b, chunk_bytes=2**16), full, student)
