"""``reduction="none"`` of the linear losses: backward repeats the products, with each row's ``grad_output``."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_linear import DTYPES, MARGIN, OPTIONS, TEACHER_D, TOPK, D, N, V, make, sparse_teacher
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import backends, heads, testing

pytestmark = pytest.mark.skipif(
    backends.BACKENDS["cpu"].why_not("cpu") is not None, reason="the C++ extension was not built: the loop runs on it"
)

# Factors of the gradients of the rows: of both signs, and 0 for some.
FACTORS = torch.linspace(-2, 3, N, dtype=torch.float64) * (torch.arange(N) % 4 != 2)


def gradients(loss, inputs, factors=FACTORS):
    """The rows' losses, and the gradients of their sum times ``factors``."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = loss(*inputs)
    grads = torch.autograd.grad(value, inputs, factors.to(value.dtype).reshape(value.shape))
    return [value.detach(), *(grad.to_dense() for grad in grads)]


def widened(options, dtype):
    """Options as fp64 logits take them."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and dtype == torch.float64 else value
        for name, value in options.items()
    }


def hold(ours, full, inputs):
    """As ``hold`` of test_linear.py, for rows: errors of at most fp32's of the whole formulation, and one rounding."""
    dtype = inputs[0].dtype
    with testing.poisoned_memory():
        got = gradients(ours, inputs)
    eager = gradients(full, [x.to(heads.sum_dtype(dtype)) for x in inputs])
    truth = gradients(full, [x.double() for x in inputs])
    for name, a, b, c, like in zip(("loss", "dh", "dw", "db"), got, eager, truth, [None, *inputs], strict=False):
        assert like is None or (a.dtype == like.dtype and a.shape == like.shape), name
        error, bar = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= 1.1 * bar + MARGIN[dtype] * (c.norm() + c.abs().max()), f"{name}: {error} > {bar}"


def hold_dense(dtype, *, chunk_rows=4, bias=True, teacher_vocab=V, backend="cpu", labels=True, **options):
    student, (states, head), targets = make(dtype, teacher_vocab=teacher_vocab)
    targets = targets if labels else None
    options = {**options, "reduction": "none"}
    chunk_bytes = max(1, chunk_rows * 2 * V * dtype.itemsize)

    def ours(hidden, weight, offset=None):
        return kd.linear_kd_loss(
            hidden, weight, states, head, targets, student_bias=offset, chunk_bytes=chunk_bytes, backend=backend,
            **options,
        )  # fmt: skip

    def full(hidden, weight, offset=None):
        teacher = F.linear(states.to(hidden.dtype), head.to(hidden.dtype))
        return kd.kd_loss(
            F.linear(hidden, weight, offset), teacher, targets, backend="torch", **widened(options, hidden.dtype)
        )

    hold(ours, full, student if bias else student[:2])


OF_ROWS = {name: options for name, options in OPTIONS.items() if "reduction" not in options}


@pytest.mark.parametrize("options", OF_ROWS.values(), ids=OF_ROWS)
def test_every_option_equals_the_full_formulation(options, backend):
    hold_dense(torch.float32, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd"])
def test_every_dtype_equals_the_full_formulation(divergence, dtype, backend):
    hold_dense(dtype, divergence=divergence, temperature=2.0, ce_weight=0.5, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("options", TOPK.values(), ids=TOPK)
def test_a_sparse_teacher_equals_the_full_formulation(options, dtype, backend):
    student, _, labels = make(dtype)
    ids, logprobs = sparse_teacher(vocab=V - 2)
    options = {**options, "reduction": "none"}

    def ours(hidden, weight, bias):
        return kd.linear_topk_kd_loss(
            hidden, weight, ids, logprobs, labels, student_bias=bias, chunk_bytes=1000, backend=backend, **options
        )

    def full(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        return kd.topk_kd_loss(logits, ids, logprobs, labels, backend="torch", **widened(options, logits.dtype))

    hold(ours, full, student)


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_gradcheck(tail):
    student, teacher, labels = make(torch.float64)
    ids, logprobs = sparse_teacher()
    # The ignored rows and a weight per row among them.
    weight = torch.linspace(0, 2, N, dtype=torch.float64)
    dense = functools.partial(kd.linear_kd_loss, reduction="none", row_weight=weight, chunk_bytes=2000)
    sparse = functools.partial(kd.linear_topk_kd_loss, reduction="none", tail=tail, chunk_bytes=2000)
    if tail == "bucket":
        assert torch.autograd.gradcheck(lambda h, w, b: dense(h, w, *teacher, labels, student_bias=b), student)
    assert torch.autograd.gradcheck(lambda h, w, b: sparse(h, w, ids, logprobs, labels, student_bias=b), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_with_a_grad_output_of_one_it_is_the_sum(dtype, backend):
    student, teacher, labels = make(dtype)
    call = functools.partial(kd.linear_kd_loss, divergence="jsd", backend=backend, chunk_bytes=1000)
    rows = call(*student[:2], *teacher, labels, student_bias=student[2], reduction="none")
    total = call(*student[:2], *teacher, labels, student_bias=student[2], reduction="sum")
    torch.testing.assert_close(rows.sum(), total)
    got, expected = (torch.autograd.grad(x, student) for x in (rows.sum(), total))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(N,), (3, 5), (2, 1, 4)])
def test_losses_have_the_shape_of_the_rows(shape):
    student, teacher, labels = make(rows=shape)
    rows, stats = kd.linear_kd_loss(*student[:2], *teacher, labels, reduction="none", return_stats=True)
    assert rows.shape == shape == stats.lse.shape and not stats.lse.requires_grad
    (rows * 2).mean().backward()
    expected = kd.kd_loss(F.linear(*student[:2]), F.linear(*teacher), labels, reduction="none")
    for x, grad in zip(student[:2], torch.autograd.grad((expected * 2).mean(), student[:2]), strict=True):
        torch.testing.assert_close(x.grad, grad)


def test_a_clip_a_mask_and_an_importance_ratio_from_hidden_states():
    """Functions of each row's loss, a mask behind which everything is NaN among them."""
    student, teacher, labels = make(torch.float64)
    mask = torch.arange(N) % 3 != 1
    labels = torch.where(mask, labels.clamp(min=0), -100)
    ratio = torch.linspace(0.2, 3, N, dtype=torch.float64)

    def of(rows):
        return (torch.where(mask, rows * ratio.clamp(max=2.0), 0.0).clamp(max=1.5).sum() / mask.sum()).square()

    expected = kd.kd_loss(F.linear(*student), F.linear(*teacher), labels, reduction="none")
    expected = torch.autograd.grad(of(expected), student)
    for x in (student[0], teacher[0]):
        x.data[~mask] = torch.nan
    rows = kd.linear_kd_loss(*student[:2], *teacher, labels, student_bias=student[2], reduction="none")
    got = torch.autograd.grad(of(rows), student)
    torch.testing.assert_close(got[1:], expected[1:])
    torch.testing.assert_close(got[0], expected[0])


class TestRowsWithoutAGradient:
    def spy(self, monkeypatch):
        projected, project = [], heads.Head.project
        monkeypatch.setattr(
            heads.Head, "project", lambda self, h, out: projected.append(len(h)) or project(self, h, out)
        )
        return projected

    def test_they_are_left_out_of_the_products_of_backward(self, backend, monkeypatch):
        student, teacher, labels = make()
        rows = kd.linear_kd_loss(*student[:2], *teacher, labels, reduction="none", backend=backend)
        chosen = torch.arange(N) % 3 == 0
        projected = self.spy(monkeypatch)
        torch.where(chosen, rows, 0).sum().backward()
        assert sum(projected) == 2 * (chosen & (labels != -100)).sum()
        assert not student[0].grad[~chosen].any() and student[0].grad[chosen & (labels != -100)].any(1).all()

    def test_a_row_of_an_infinite_loss_is_left_out_by_a_mask(self, backend):
        student, teacher, _ = make()
        student[0].data[3] = torch.inf
        rows = kd.linear_kd_loss(*student[:2], *teacher, reduction="none", backend=backend)
        assert rows.isnan().nonzero().tolist() == [[3]]
        torch.where(rows.isfinite(), rows, 0).sum().backward()
        assert student[1].grad.isfinite().all() and not student[0].grad[3].any()

    def test_none_has_one(self, backend):
        student, teacher, labels = make()
        rows = kd.linear_kd_loss(*student[:2], *teacher, labels, reduction="none", backend=backend)
        for grad in torch.autograd.grad(rows, student[:2], torch.zeros(N)):
            assert not grad.any()

    def test_no_rows(self, backend):
        student, teacher, _ = make(rows=(0,))
        rows = kd.linear_kd_loss(*student[:2], *teacher, reduction="none", backend=backend)
        assert rows.shape == (0,)
        for x, grad in zip(student, torch.autograd.grad(rows.sum(), student[:2]), strict=False):
            assert grad.shape == x.shape and not grad.any()

    def test_rows_of_weight_zero_have_statistics_and_no_product_in_backward(self, monkeypatch):
        student, teacher, _ = make()
        weight = (torch.arange(N) % 2).float()
        options = {"row_weight": weight, "reduction": "none", "return_stats": True}
        rows, stats = kd.linear_kd_loss(*student[:2], *teacher, **options)
        assert (stats.divergence > 0).all() and torch.equal(rows != 0, weight != 0)
        projected = self.spy(monkeypatch)
        rows.sum().backward()
        assert sum(projected) == 2 * weight.sum()

    @pytest.mark.parametrize("frozen", range(8))
    def test_each_frozen_argument_costs_nothing(self, frozen, monkeypatch):
        student, teacher, labels = make()
        needs = [not frozen >> k & 1 for k in range(3)]
        rows = kd.kd_loss(F.linear(*student), F.linear(*teacher), labels, reduction="none")
        expected = torch.autograd.grad(rows, student, FACTORS.float())
        made = []
        monkeypatch.setattr(heads.HeadGrad, "finish", lambda *a, f=heads.HeadGrad.finish: made.append(1) or f(*a))
        tensors = [x.detach().requires_grad_(need) for x, need in zip(student, needs, strict=True)]
        rows = kd.linear_kd_loss(*tensors[:2], *teacher, labels, student_bias=tensors[2], reduction="none")
        assert rows.requires_grad == any(needs) and not made
        if any(needs):
            rows.backward(FACTORS.float())
        assert len(made) == needs[1] + needs[2]
        for x, grad, need in zip(tensors, expected, needs, strict=True):
            assert (x.grad is not None) == need
            if need:
                torch.testing.assert_close(x.grad, grad)


class TestSixteenBits:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_autocast_in_forward_holds_in_backward(self, dtype, backend):
        student, teacher, labels = make(width=32)
        rounded = [x.detach().to(dtype).double().requires_grad_() for x in student]
        with torch.autocast("cpu", dtype):
            rows = kd.linear_kd_loss(
                *student[:2], *teacher, labels, student_bias=student[2], reduction="none", backend=backend
            )
        assert rows.dtype == torch.float32
        t = F.linear(*(x.to(dtype).double() for x in teacher))
        expected = kd.kd_loss(F.linear(*rounded), t, labels, reduction="none", backend="torch")
        torch.testing.assert_close(rows, expected.float())
        got = torch.autograd.grad(rows, student, FACTORS.float())
        for a, b in zip(got, torch.autograd.grad(expected, rounded, FACTORS), strict=True):
            assert a.dtype == torch.float32 and (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()

    @pytest.mark.parametrize("way", ["mixed", "widened"])
    def test_a_loss_scale_saves_a_gradient_below_fp16(self, way, monkeypatch):
        """1/N and the weights make the gradient 1e-9: only with the loss scale does it fit fp16."""
        from test_linear_numerics import mixed_on_any_cpu

        monkeypatch.setattr(heads, "products", lambda device, dtype, **_: way if dtype.itemsize == 2 else "plain")
        monkeypatch.setattr(heads, "mixed_product", mixed_on_any_cpu)
        student, teacher, _ = make(torch.float16, width=32)
        exact = [x.detach().double().requires_grad_() for x in student]
        rows = kd.linear_kd_loss(
            *student[:2], *teacher, student_bias=student[2], reduction="none", row_weight=torch.full((N,), 1e-8)
        )
        got = torch.autograd.grad(rows.sum() * 2.0**20, student)
        t = F.linear(*(x.double() for x in teacher))
        truth = torch.autograd.grad(kd.kd_loss(F.linear(*exact), t, reduction="sum") * 1e-8 * 2.0**20, exact)
        for a, b in zip(got, truth, strict=True):
            assert a.dtype == torch.float16 and (a - b).norm() <= 1e-3 * b.norm()

    def test_an_overflowing_loss_scale_is_seen_by_the_scaler(self, backend):
        student, teacher, _ = make(torch.float16, width=32)
        rows = kd.linear_kd_loss(*student[:2], *teacher, reduction="none", backend=backend)
        for grad in torch.autograd.grad(rows.sum() * torch.tensor(3e38), student[:2]):
            assert not grad.isfinite().all()


class TestAroundTheHead:
    def test_modules_and_biases_as_heads(self):
        head, teacher = torch.nn.Linear(D, V), torch.nn.Linear(TEACHER_D, V)
        student, (states, _), labels = make()
        rows = kd.linear_kd_loss(student[0], head, states, teacher, labels, reduction="none")
        expected = kd.kd_loss(head(student[0]), teacher(states).detach(), labels, reduction="none")
        wanted = (student[0], *head.parameters())
        for a, b in zip(*(torch.autograd.grad(x, wanted, FACTORS.float()) for x in (rows, expected)), strict=True):
            torch.testing.assert_close(a, b)
        assert teacher.weight.grad is None

    def test_the_module_of_the_loss(self):
        student, teacher, labels = make()
        rows = kd.LinearKDLoss(reduction="none", divergence="jsd")(*student[:2], *teacher, labels)
        expected = kd.linear_kd_loss(*student[:2], *teacher, labels, reduction="none", divergence="jsd")
        assert rows.requires_grad and torch.equal(rows, expected)

    def test_tied_embeddings(self):
        _, teacher, labels = make()
        tokens = torch.arange(N) % V

        def step(rows_of):
            weight = make()[0][1].detach().requires_grad_()
            rows = rows_of(F.embedding(tokens, weight).tanh(), weight)
            (rows * FACTORS.float()).sum().backward()
            return weight.grad

        torch.testing.assert_close(
            step(lambda h, w: kd.linear_kd_loss(h, w, *teacher, labels, reduction="none")),
            step(lambda h, w: kd.kd_loss(F.linear(h, w), F.linear(*teacher), labels, reduction="none")),
        )

    @pytest.mark.parametrize("mixture", ["probs", "logits"])
    def test_a_mixture_of_teachers(self, mixture):
        student, teacher, labels = make()
        weights = torch.rand(N, 2) + 0.1
        options = {"teacher_weights": weights / weights.sum(-1, True), "mixture": mixture, "reduction": "none"}
        other = [torch.randn(N, 4), torch.randn(V, 4)]
        pairs = list(zip(teacher, other, strict=True))
        rows = kd.linear_kd_loss(*student[:2], *pairs, labels, chunk_bytes=1000, **options)
        full = kd.kd_loss(F.linear(*student[:2]), [F.linear(*teacher), F.linear(*other)], labels, **options)
        for a, b in zip(*(torch.autograd.grad(x, student[:2], FACTORS.float()) for x in (rows, full)), strict=True):
            torch.testing.assert_close(a, b)

    def test_teacher_logits_are_asked_for_again_for_the_rows_with_a_gradient(self, backend):
        student, teacher, _ = make()
        logits, asked = F.linear(*teacher), []

        def of(rows):
            asked.append(torch.arange(N)[rows])
            return logits[rows]

        rows = kd.linear_kd_loss(*student[:2], teacher_logits=of, reduction="none", backend=backend)
        assert torch.equal(torch.cat(asked), torch.arange(N))
        asked.clear()
        got = torch.autograd.grad(rows, student[:2], FACTORS.float())
        assert torch.equal(torch.cat(asked), FACTORS.nonzero().squeeze(1))
        full = kd.kd_loss(F.linear(*student[:2]), logits, reduction="none")
        torch.testing.assert_close(got, torch.autograd.grad(full, student[:2], FACTORS.float()))

    def test_a_sparse_gradient_holds_the_rows_that_have_one(self, backend):
        student, _, _ = make()
        ids, logprobs = sparse_teacher()
        call = functools.partial(
            kd.linear_topk_kd_loss, tail="renormalize_both", reduction="none", backend=backend, chunk_bytes=500
        )
        found = []
        for sparse_grad in (True, False):
            rows = call(*student[:2], ids, logprobs, sparse_grad=sparse_grad)
            found.append(torch.autograd.grad(rows, student[:2], FACTORS.float()))
        assert found[0][1].is_sparse and found[0][1].is_coalesced()
        torch.testing.assert_close(found[0][1].to_dense(), found[1][1])
        torch.testing.assert_close(found[0][0], found[1][0])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant):
        student, teacher, labels = make()

        def call(hidden):
            rows = kd.linear_kd_loss(hidden.tanh(), student[1], *teacher, labels, reduction="none")
            return (rows * FACTORS.float()).sum()

        expected = torch.autograd.grad(call(student[0]), student[:2])
        checkpoint(call, student[0], use_reentrant=reentrant).backward()
        for x, grad in zip(student[:2], expected, strict=True):
            torch.testing.assert_close(x.grad, grad, rtol=0, atol=0)

    def test_saved_tensors_may_be_moved_away(self):
        student, teacher, labels = make()
        expected = kd.linear_kd_loss(*student[:2], *teacher, labels, reduction="none")
        expected = torch.autograd.grad(expected, student[:2], FACTORS.float())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            rows = kd.linear_kd_loss(*student[:2], *teacher, labels, reduction="none")
        torch.testing.assert_close(torch.autograd.grad(rows, student[:2], FACTORS.float()), expected)

    @pytest.mark.parametrize("changed", ["student_weight", "teacher_hidden", "labels", "row_weight"])
    def test_what_was_given_and_is_overwritten_before_backward_is_noticed(self, changed):
        student, teacher, labels = make()
        given = {
            "student_hidden": student[0],
            "student_weight": student[1] * 1.0,
            "teacher_hidden": teacher[0],
            "teacher_weight": teacher[1],
            "labels": labels,
            "row_weight": torch.ones(N),
        }
        rows = kd.linear_kd_loss(**given, reduction="none")
        with torch.no_grad():
            given[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rows.sum().backward()


class TestGraphsAndTransforms:
    def test_compiled_to_one_graph_for_any_number_of_rows(self, backend):
        def model(hidden, weight, bias, states, head, labels, temperature):
            rows, stats = kd.linear_kd_loss(
                hidden.tanh(), weight, states, head, labels, student_bias=bias, ce_weight=0.5, reduction="none",
                temperature=temperature, return_stats=True, chunk_bytes=1000, backend=backend,
            )  # fmt: skip
            return rows.clamp(max=3.0), stats.lse

        torch._dynamo.reset()
        traced = torch.compile(model, backend="aot_eager", fullgraph=True)
        for count in (N, N + 4):
            student, teacher, labels = make(rows=(count,))
            temperature, factors = torch.linspace(0.5, 4, count), torch.linspace(-1, 2, count)
            found = []
            for function in (model, traced):
                rows, lse = function(*student, *teacher, labels, temperature)
                found.append((rows, lse, *torch.autograd.grad(rows, student, factors)))
            torch.testing.assert_close(found[1], found[0])

    @pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_compiled_sparse_teachers_and_autocast(self, tail, dtype):
        student, _, _ = make()
        ids, logprobs = sparse_teacher()

        def call(hidden, weight):
            return kd.linear_topk_kd_loss(hidden, weight, ids, logprobs, tail=tail, reduction="none")

        torch._dynamo.reset()
        with torch.autocast("cpu", dtype):
            traced = torch.compile(call, backend="aot_eager", fullgraph=True)
            for a, b in zip(gradients(traced, student[:2]), gradients(call, student[:2]), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_compiled_fp16_heads(self):
        student, teacher, _ = make(torch.float16)
        torch._dynamo.reset()
        call = functools.partial(kd.linear_kd_loss, reduction="none")
        found = []
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            rows = function(*student[:2], *teacher, student_bias=student[2])
            found.append(torch.autograd.grad(rows, student, FACTORS.float()))
        torch.testing.assert_close(found[1], found[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
    @pytest.mark.parametrize("vmap", ["is_grads_batched", "torch.func.vmap"])
    def test_batches_of_gradients(self, vmap, dtype, backend):
        student, teacher, labels = make(dtype)
        rows = kd.linear_kd_loss(
            *student[:2], *teacher, labels, student_bias=student[2], reduction="none", backend=backend
        )
        factors = torch.stack([FACTORS, torch.ones(N), torch.eye(N)[3]]).float()
        if vmap == "is_grads_batched":
            batch = torch.autograd.grad(rows, student, factors, is_grads_batched=True, retain_graph=True)
        else:
            batch = torch.func.vmap(lambda f: torch.autograd.grad(rows, student, f, retain_graph=True))(factors)
        for k, factor in enumerate(factors):
            one = torch.autograd.grad(rows, student, factor, retain_graph=True)
            for a, b in zip(batch, one, strict=True):
                torch.testing.assert_close(a[k], b)

    def test_a_kept_graph_gives_its_gradient_again(self):
        student, teacher, labels = make()
        rows = kd.linear_kd_loss(*student[:2], *teacher, labels, reduction="none")
        first = torch.autograd.grad(rows, student[:2], FACTORS.float(), retain_graph=True)
        again = torch.autograd.grad(rows, student[:2], FACTORS.float())
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("options", [{}, {"labels": True}, {"row_weight": torch.linspace(0, 1, N).double()}])
    def test_plain_pytorch_has_second_derivatives(self, options):
        student, teacher, labels = make(torch.float64)
        options = {**options, "backend": "torch", "reduction": "none"}
        if options.pop("labels", False):
            options["labels"] = labels

        def penalised(rows):
            value = (rows.square() * FACTORS.abs()).sum()
            grads = torch.autograd.grad(value, student, create_graph=True)
            return torch.autograd.grad(value + sum(grad.square().sum() for grad in grads), student)

        torch.testing.assert_close(
            penalised(kd.linear_kd_loss(*student[:2], *teacher, student_bias=student[2], **options)),
            penalised(kd.kd_loss(F.linear(*student), F.linear(*teacher), **options)),
        )

    def test_the_kernels_refuse_them(self):
        student, teacher, _ = make()
        rows = kd.linear_kd_loss(*student[:2], *teacher, reduction="none", backend="cpu")
        with pytest.raises(RuntimeError, match='backend="torch" can be differentiated again'):
            torch.autograd.grad(rows.sum(), student[0], create_graph=True)
        ids, logprobs = sparse_teacher()
        rows = kd.linear_topk_kd_loss(
            *student[:2], ids, logprobs, tail="renormalize_both", sparse_grad=True, reduction="none", backend="torch"
        )
        with pytest.raises(RuntimeError, match="sparse_grad=True has no second derivative"):
            torch.autograd.grad(rows.sum(), student[1], create_graph=True)

    @pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp", "vmap"])
    def test_transforms_are_right_or_refused(self, transform):
        student, teacher, _ = make(torch.float64)
        hidden, weight = student[0].detach(), student[1].detach()
        run = {
            "grad": lambda call: torch.func.grad(lambda h: (call(h) * FACTORS).sum())(hidden),
            "jacrev": lambda call: torch.func.jacrev(call)(hidden),
            "jvp": lambda call: torch.func.jvp(call, (hidden,), (hidden.sin(),))[1],
            "vmap": lambda call: torch.func.vmap(call)(torch.stack([hidden, hidden.sin()])),
        }[transform]
        call = functools.partial(kd.linear_kd_loss, reduction="none")
        torch.testing.assert_close(
            run(lambda h: call(h, weight, *teacher, backend="torch")),
            run(lambda h: kd.kd_loss(F.linear(h, weight), F.linear(*teacher), reduction="none", backend="torch")),
        )
        with pytest.raises(RuntimeError, match='backend="torch"'):
            run(lambda h: call(h, weight, *teacher, backend="cpu"))


MEMORY_SCRIPT = """
import sys, torch, kdkernels as kd
from benchmarks import measure
V, D, CHUNK = 32768, 64, 2**20
def run(N):
    student = [torch.randn(N, D).bfloat16().requires_grad_(), (torch.randn(V, D) / 8).bfloat16().requires_grad_()]
    teacher = [torch.randn(N, D).bfloat16(), (torch.randn(V, D) / 8).bfloat16()]
    before = measure.reset_peak("cpu")
    rows = kd.linear_kd_loss(*student, *teacher, temperature=2.0, chunk_bytes=CHUNK, backend="cpu", reduction="none")
    forward = measure.peak("cpu") - before
    rows.clamp(max=1.0).square().sum().backward()
    # The head's gradient counts as it is summed, in fp32.
    return forward, measure.peak("cpu") - before - 2 * student[0].numel() - 4 * student[1].numel()
run(512)  # libraries of products keep code and workspace for a shape
print(*run(512), *run(1024))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_peak_memory_does_not_grow_with_the_rows():
    """Neither forward nor backward has anything of size [N, V]: below 1/8 of one such tensor."""
    # glibc keeps freed blocks up to a threshold that it raises by itself: a fixed one returns every block.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], cwd=root, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    few_forward, few, many_forward, many = map(int, result.stdout.split())
    unit = 1024 * 32768 * 2
    assert many_forward < unit / 8 and abs(many_forward - few_forward) < unit / 64, result.stdout
    assert 2**19 < many < unit / 8 and abs(many - few) < unit / 64, result.stdout
