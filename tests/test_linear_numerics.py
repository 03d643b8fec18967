"""The linear losses in 16 bits: near teachers, loss scales, and what lies between the rows of a buffer."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import backends, chunked, heads, testing

pytestmark = pytest.mark.skipif(
    backends.BACKENDS["cpu"].why_not("cpu") is not None, reason="the C++ extension was not built: the loop runs on it"
)

N, V, D = 96, 600, 32
DISTANCES = {"1%": 0.01, "10%": 0.1, "far": None}
SCALE = 65536.0


def make(dtype, distance, *, rows=N, vocab=V, width=D, seed=0):
    """Hidden states, head and bias that require grad, and the teacher's: another's, or the same with its head moved."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    student = [normal(rows, width), normal(vocab, width, scale=3 * width**-0.5), normal(vocab)]
    if distance is None:
        teacher = [normal(rows, width), normal(vocab, width, scale=3 * width**-0.5), normal(vocab)]
    else:
        teacher = [student[0], student[1] * (1 + normal(vocab, width, scale=distance)), student[2]]
    return [x.to(dtype).requires_grad_() for x in student], [x.to(dtype) for x in teacher]


def sparse(teacher, k=16):
    return torch.log_softmax(F.linear(*(x.double() for x in teacher)), -1).topk(k)


def errors(ours, full, inputs, factor=1.0):
    """Relative errors of the gradients of ``ours`` against those of ``full`` on fp64 copies, by norm."""
    with testing.poisoned_memory():
        got = torch.autograd.grad(ours(*inputs) * factor, inputs)
    copies = [x.detach().double().requires_grad_() for x in inputs]
    truth = torch.autograd.grad(full(*copies) * factor, copies)
    for a, x in zip(got, inputs, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]


def dense(inputs, teacher, options, factor=1.0, **more):
    def ours(hidden, weight, bias):
        bytes_of_a_row = 2 * len(weight) * 4
        return kd.linear_kd_loss(
            hidden, weight, *teacher[:2], student_bias=bias, teacher_bias=teacher[2],
            chunk_bytes=31 * bytes_of_a_row, **options, **more,
        )  # fmt: skip

    def full(hidden, weight, bias):
        t = F.linear(*(x.double() for x in teacher))
        return kd.kd_loss(F.linear(hidden, weight, bias), t, **{**options, "backend": "torch"})

    return errors(ours, full, inputs, factor)


def mixed_on_any_cpu(a, b, out, *, add):
    """Stands in for ``heads.mixed_product`` of a device that has it; operands of 16 bits, as a GPU takes them."""
    assert b.dtype.itemsize == 2 and out.dtype == torch.float32
    product = a.to(b.dtype).float() @ b.float()
    out.copy_(product + out if add else product)


@pytest.fixture(params=["here", "mixed", "widened"])
def way(request, monkeypatch):
    """How this machine makes 16-bit products, and what others do."""
    if request.param != "here":
        monkeypatch.setattr(
            heads, "products", lambda device, dtype, **_: request.param if dtype.itemsize == 2 else "plain"
        )
        monkeypatch.setattr(heads, "mixed_product", mixed_on_any_cpu)
    return request.param


class TestNearTeachers:
    """The gradient is a difference of near distributions: logits rounded to 16 bits leave little of it."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
    @pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
    def test_dense_gradients_are_as_exact_at_every_distance(self, divergence, distance, dtype, way):
        found = dense(*make(dtype, distance), {"divergence": divergence})
        assert max(found) < 4e-3, found

    @pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
    @pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
    @pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
    def test_sparse_gradients_are_as_exact_at_every_distance(self, tail, divergence, distance, backend):
        inputs, teacher = make(torch.bfloat16, distance)
        options = {"tail": tail, "divergence": divergence}
        logprobs, ids = sparse(teacher)

        def ours(hidden, weight, bias):
            return kd.linear_topk_kd_loss(
                hidden, weight, ids, logprobs, student_bias=bias, chunk_bytes=100_000, backend=backend, **options
            )

        def full(hidden, weight, bias):
            return kd.topk_kd_loss(F.linear(hidden, weight, bias), ids, logprobs, backend="torch", **options)

        found = errors(ours, full, inputs)
        assert max(found) < 4e-3, found

    def test_autocast(self):
        inputs, teacher = make(torch.float32, 0.01)

        def ours(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return kd.linear_kd_loss(*inputs[:2], *teacher[:2], student_bias=inputs[2], teacher_bias=teacher[2])

        def full(*inputs):
            inputs, t = (F.linear(*(x.bfloat16().double() for x in group)) for group in (inputs, teacher))
            return kd.kd_loss(inputs, t, backend="torch")

        found = errors(ours, full, inputs)
        assert max(found) < 4e-3, found

    def test_compiled_plain_pytorch_rounds_no_logits_either(self):
        inputs, teacher = make(torch.bfloat16, 0.01)
        torch._dynamo.reset()
        compiled = torch.compile(kd.linear_kd_loss, backend="aot_eager", fullgraph=True)
        found = errors(
            lambda h, w, b: compiled(h, w, *teacher[:2], student_bias=b, teacher_bias=teacher[2], backend="torch"),
            lambda h, w, b: kd.kd_loss(F.linear(h, w, b), F.linear(*(x.double() for x in teacher))),
            inputs,
        )
        assert max(found) < 4e-3, found


class TestLogitsDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_rounded_logits_are_those_of_a_16_bit_product(self, dtype, backend, way):
        """Harmless for a far teacher, and the end of the gradient of a near one (docs/guide/hidden-states.md)."""
        far = dense(*make(dtype, None), {"backend": backend}, logits_dtype=dtype)
        near = dense(*make(dtype, 0.01), {"backend": backend}, logits_dtype=dtype)
        eps = torch.finfo(dtype).eps
        assert max(far) < 4 * eps < 8 * eps < max(near[:2]), (far, near)

    def test_float32_is_the_default(self):
        inputs, teacher = make(torch.bfloat16, 0.1)
        given = [
            torch.autograd.grad(kd.linear_kd_loss(*inputs[:2], *teacher[:2], **options), inputs[:2])
            for options in ({}, {"logits_dtype": torch.float32})
        ]
        for a, b in zip(*given, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(("logits_dtype", "rows"), [(None, 8), (torch.bfloat16, 16)])
    def test_the_logits_of_a_chunk_are_within_chunk_bytes(self, logits_dtype, rows, monkeypatch):
        inputs, teacher = make(torch.bfloat16, 0.1)
        sizes = []
        project = heads.Head.project

        def spy(self, hidden, out):
            sizes.append(out.numel() * out.element_size())
            project(self, hidden, out)

        monkeypatch.setattr(heads.Head, "project", spy)
        kd.linear_kd_loss(*inputs[:2], *teacher[:2], chunk_bytes=2 * V * 4 * 8, logits_dtype=logits_dtype)
        assert len(sizes) == 2 * N // rows and max(sizes) == V * 4 * 8

    @pytest.mark.parametrize(
        ("value", "dtype", "error", "message"),
        [
            ("bf16", torch.bfloat16, TypeError, "logits_dtype must be a torch.dtype or None, got str"),
            (torch.int8, torch.bfloat16, ValueError, "logits_dtype must be float32, bfloat16, float16 or None, got in"),
            (torch.float16, torch.bfloat16, ValueError, "must be float32, bfloat16 or None where the products are"),
            (torch.bfloat16, torch.float32, ValueError, "must be float32 or None where the products are of float32"),
            (torch.float32, torch.float64, ValueError, "must be float64 or None where the products are of float64"),
        ],
    )  # fmt: skip
    def test_what_it_may_be(self, value, dtype, error, message):
        inputs, teacher = make(dtype, 0.1)
        with pytest.raises(error, match=message):
            kd.linear_kd_loss(*inputs[:2], *teacher[:2], logits_dtype=value)
        logprobs, ids = sparse(teacher)
        with pytest.raises(error, match=message):
            kd.linear_topk_kd_loss(*inputs[:2], ids, logprobs, logits_dtype=value)

    def test_modules_check_it_when_they_are_built(self):
        for module in (kd.LinearKDLoss, kd.LinearTopKKDLoss):
            module(logits_dtype=torch.bfloat16)
            with pytest.raises(TypeError, match="logits_dtype must be a torch.dtype or None, got str"):
                module(logits_dtype="float32")

    def test_autocast_is_what_counts(self):
        inputs, teacher = make(torch.float32, 0.1)
        with torch.autocast("cpu", torch.bfloat16):
            kd.linear_kd_loss(*inputs[:2], *teacher[:2], logits_dtype=torch.bfloat16)


class TestLossScale:
    """fp16 holds 6e-8 to 65504: a scale of the loss must come before anything is rounded to it."""

    @pytest.mark.parametrize("distance", [0.01, None], ids=["1%", "far"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"normalizer": 1e6}, {"row_weight": torch.linspace(1e-5, 3e-5, N)}, {"divergence": "jeffreys"}],
        ids=["mean", "normalizer", "row-weight", "unbounded"],
    )
    def test_a_scaled_fp16_gradient_is_exact(self, options, distance, way, backend):
        # A factor that leaves the result within fp16.
        factor = SCALE if "divergence" not in options else 64.0
        found = dense(*make(torch.float16, distance), {**options, "backend": backend}, factor)
        assert max(found) < 1e-3, found

    @pytest.mark.parametrize(
        "options",
        [{}, {"normalizer": 1e6}, {"row_weight": torch.linspace(1e-5, 3e-5, N)}],
        ids=["mean", "normalizer", "row-weight"],
    )
    def test_rounded_logits_leave_room_for_it(self, options, way, backend):
        """The gradient then takes their place in fp16."""
        inputs, teacher = make(torch.float16, None)
        found = dense(inputs, teacher, {**options, "backend": backend}, SCALE, logits_dtype=torch.float16)
        assert max(found) < 4e-3, found
        losses = [
            kd.linear_kd_loss(*inputs[:2], *teacher[:2], backend=backend, logits_dtype=dtype, **options)
            for dtype in (torch.float16, None)
        ]
        torch.testing.assert_close(*losses, rtol=2e-3, atol=0)

    def test_so_it_is_of_k_columns(self, backend):
        inputs, teacher = make(torch.float16, 0.01)
        logprobs, ids = sparse(teacher)
        options = {"tail": "renormalize_both", "normalizer": 1e6}
        found = errors(
            lambda h, w, b: kd.linear_topk_kd_loss(
                h, w, ids, logprobs, student_bias=b, chunk_bytes=100_000, backend=backend, **options
            ),
            lambda h, w, b: kd.topk_kd_loss(F.linear(h, w, b), ids, logprobs, backend="torch", **options),
            inputs,
            SCALE,
        )
        assert max(found) < 1e-3, found

    def test_a_sparse_gradient_too(self):
        inputs, teacher = make(torch.float16, 0.01)
        logprobs, ids = sparse(teacher)
        grads = []
        for sparse_grad in (False, True):
            loss = kd.linear_topk_kd_loss(
                *inputs[:2], ids, logprobs, tail="renormalize_both", normalizer=1e6, sparse_grad=sparse_grad
            )
            grads.append(torch.autograd.grad(loss * SCALE, inputs[1])[0])
        assert grads[1].is_sparse and (grads[0] != 0).any()
        torch.testing.assert_close(grads[1].to_dense(), grads[0])

    def test_a_scaled_gradient_under_fp16_autocast(self, way):
        inputs, teacher = make(torch.float32, 0.01)

        def ours(hidden, weight, bias):
            with torch.autocast("cpu", torch.float16):
                return kd.linear_kd_loss(
                    hidden, weight, *teacher[:2], student_bias=bias, teacher_bias=teacher[2], normalizer=1e6
                )

        def full(*inputs):
            inputs, t = (F.linear(*(x.half().double() for x in group)) for group in (inputs, teacher))
            return kd.kd_loss(inputs, t, backend="torch", normalizer=1e6)

        found = errors(ours, full, inputs, SCALE)
        assert max(found) < 1e-3, found

    def test_a_kept_graph_takes_a_scale_beyond_fp16(self, backend):
        inputs, teacher = make(torch.float16, 0.01)
        loss = kd.linear_kd_loss(*inputs[:2], *teacher[:2], student_bias=inputs[2], normalizer=1e6, backend=backend)
        loss = loss * (2 * SCALE)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs)
        for a, b in zip(first, again, strict=True):
            assert a.isfinite().all() and a.any() and torch.equal(a, b)

    def test_compiled(self):
        inputs, teacher = make(torch.float16, 0.01)
        torch._dynamo.reset()
        compiled = torch.compile(kd.linear_kd_loss, backend="aot_eager", fullgraph=True)
        options = {"student_bias": inputs[2], "normalizer": 1e6}
        found = [
            torch.autograd.grad(function(*inputs[:2], *teacher[:2], **options) * SCALE, inputs)
            for function in (kd.linear_kd_loss, compiled)
        ]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_grad_scaler_trains(self):
        """With a gradient of zeros the weights would not move."""
        inputs, teacher = make(torch.float32, 0.01)
        weight = inputs[1].detach().clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=1e9)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        with torch.autocast("cpu", torch.float16):
            loss = kd.linear_kd_loss(
                inputs[0].detach().half(), weight, *(x.half() for x in teacher[:2]), normalizer=1e9
            )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = (weight - inputs[1]).norm()
        (truth,) = torch.autograd.grad(
            kd.linear_kd_loss(inputs[0].detach(), inputs[1], *teacher[:2], normalizer=1e9), inputs[1]
        )
        assert abs(moved - 1e9 * truth.norm()) < 0.05 * moved

    @pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
    def test_products_in_fp16_bear_gradients_of_any_size(self, size, monkeypatch):
        """On a GPU the gradient of the logits is rounded to fp16 as an operand."""
        monkeypatch.setattr(heads, "products", lambda device, dtype, **_: "mixed")
        monkeypatch.setattr(heads, "mixed_product", mixed_on_any_cpu)
        inputs, teacher = make(torch.float16, None)
        found = dense(inputs, teacher, {"kd_weight": size, "normalizer": 1e4}, 1e4 / size)
        assert max(found) < 1e-3, found


SHAPES = [(41, 20, 63), (1001, 64, 256), (143, 37, 86), (64, 32, 8), (7, 3, 5)]


class Operands(TorchDispatchMode):
    """Looks at all memory that a product could read as it runs over its operands, between their rows too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "bf16_product"):
            operands = args[:2] if func.overloadpacket.__name__ in ("mm", "bmm", "bf16_product") else args[1:3]
            for tensor in operands:
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                span = torch.as_strided(tensor, (last + 1,), (1,), tensor.storage_offset())
                assert span.isfinite().all(), f"{func}: {tuple(tensor.shape)} {tensor.stride()}"
            self.count += 1
        return func(*args, **(kwargs or {}))


class TestBetweenRows:
    """A CPU's bf16 product may read what lies between the rows of an operand, and NaN times 0 is NaN."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            ("here", torch.bfloat16),
            ("here", torch.float32),
            ("native", torch.bfloat16),
            ("native", torch.float16),
            ("widened", torch.bfloat16),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("pattern", ["dense", "sparse"])
    def test_no_operand_has_an_uninitialised_number_in_it(self, pattern, kind, dtype, shape, monkeypatch):
        vocab, width, rows = shape
        inputs, teacher = make(dtype, 0.1, rows=rows, vocab=vocab, width=width)
        if kind != "here":
            monkeypatch.setattr(heads, "products", lambda device, dtype, **_: kind if dtype.itemsize == 2 else "plain")
        options = {"chunk_bytes": vocab * 4 * 2 * 31, "logits_dtype": dtype if kind == "native" else None}
        # The function keeps the loop out of an op, into which no mode looks.
        monkeypatch.setattr(chunked, "execute", lambda call, *tensors: chunked._run(call, *tensors))
        with testing.poisoned_memory(), Operands() as seen:
            if pattern == "dense":
                loss = kd.linear_kd_loss(*inputs[:2], *teacher[:2], student_bias=inputs[2], **options)
            else:
                logprobs, ids = sparse(teacher, k=3)
                loss = kd.linear_topk_kd_loss(*inputs[:2], ids, logprobs, student_bias=inputs[2], **options)
        assert seen.count >= 3
        for grad in torch.autograd.grad(loss, inputs):
            assert grad.isfinite().all()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_a_bf16_step_after_others_has_no_nan(self, shape, backend):
        """The steps leave finite and other numbers in the memory that the next one gets."""
        vocab, width, rows = shape
        inputs, teacher = make(torch.bfloat16, 0.1, rows=rows, vocab=vocab, width=width)
        for _ in range(3):
            del [torch.full((rows * (vocab + 64) // 2,), torch.nan) for _ in range(3)][:]
            loss = kd.linear_kd_loss(*inputs[:2], *teacher[:2], backend=backend)
            for grad in torch.autograd.grad(loss, inputs[:2]):
                assert grad.isfinite().all()

    def test_hidden_states_between_whose_rows_is_nan(self, backend):
        inputs, teacher = make(torch.bfloat16, 0.1, vocab=41, width=21)
        wide = torch.full((N, 64), torch.nan, dtype=torch.bfloat16)
        views = [wide[:, :21].copy_(inputs[0].detach()).requires_grad_(), inputs[1]]
        table = torch.full((41, 64), torch.nan, dtype=torch.bfloat16)[:, :21].copy_(teacher[1])
        found = []
        for (hidden, weight), head in ((inputs[:2], teacher[1]), (views, table)):
            loss = kd.linear_kd_loss(hidden, weight, teacher[0], head, backend=backend)
            found.append(torch.autograd.grad(loss, (hidden, weight)))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    def test_scratch_is_poisoned_anew_at_every_use(self):
        with testing.poisoned_memory():
            scratch = heads.Scratch(torch.empty(0))
            first = scratch.logits("logits", 3, 41, torch.bfloat16).fill_(1.0)
            second = scratch.logits("logits", 2, 41, torch.bfloat16)
            assert second.data_ptr() == first.data_ptr() and second.isnan().all()
            between = torch.as_strided(second, (2, second.stride(0) - 41), (second.stride(0), 1), 41)
            assert between.numel() > 0 and not between.any()
            assert scratch.empty("other", (4,), torch.float32).isnan().all()


def bf16_product():
    kd.backends.cpu.load_error()
    if not torch.cpu._is_avx512_bf16_supported() or kd.backends.cpu.isa() != "avx512":
        pytest.skip("this machine has no AVX-512 for bf16, or is told to do without")
    assert torch.ops.kdkernels.has_bf16_product(), "this torch has no block product of bf16, or has another"
    return torch.ops.kdkernels.bf16_product


class TestBf16Product:
    @pytest.mark.parametrize("add", [False, True])
    @pytest.mark.parametrize("layout", ["rows", "columns"])
    @pytest.mark.parametrize("kind", ["bf16", "fp32", "bf16-t", "fp32-t"])
    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1), (5, 7, 3), (63, 41, 20), (65, 129, 37), (200, 70, 33), (70, 30, 2100), (3, 300, 1056)],
        ids=str,
    )
    def test_it_is_the_product_of_rounded_operands_in_fp32(self, shape, kind, layout, add):
        product = bf16_product()
        m, n, k = shape
        a = torch.randn(k, m).t() if kind.endswith("-t") else torch.randn(m, k)
        if kind.startswith("bf16"):
            a = a.bfloat16()
        b = torch.randn(k, n).bfloat16() if layout == "rows" else torch.randn(n, k).bfloat16().t()
        store = torch.full((m, n + 3), torch.nan)
        out = store[:, :n]
        before = torch.zeros(m, n)
        if add:
            before = torch.randn(m, n)
            out.copy_(before)
        with testing.poisoned_memory():
            product(a, b, out, add)
        truth = before.double() + a.bfloat16().double() @ b.double()
        size = before.abs().double() + a.bfloat16().double().abs() @ b.double().abs()
        assert ((out.double() - truth).abs() <= 2e-6 * size).all()
        assert store[:, n:].isnan().all()

    def test_nan_and_infinity_go_where_they_belong(self):
        product = bf16_product()
        a, b = torch.randn(40, 33), torch.randn(33, 17).bfloat16()
        a[3, 32], a[5, 0] = torch.nan, torch.inf
        out = torch.empty(40, 17)
        product(a, b, out, False)
        wrong = ~out.isfinite().all(-1)
        assert wrong.nonzero().squeeze(1).tolist() == [3, 5]

    def test_opcheck(self):
        bf16_product()
        torch.library.opcheck(
            torch.ops.kdkernels.bf16_product.default,
            (torch.randn(5, 6), torch.randn(6, 7).bfloat16(), torch.zeros(5, 7), True),
        )

    def test_it_refuses_what_does_not_fit(self):
        product = bf16_product()
        a, b, out = torch.zeros(4, 6), torch.zeros(6, 5).bfloat16(), torch.zeros(4, 5)
        with pytest.raises(RuntimeError, match="must be matrices that fit"):
            product(a[:, :5], b, out, False)
        with pytest.raises(RuntimeError, match="b bfloat16, out float32"):
            product(a, b.float(), out, False)
        with pytest.raises(RuntimeError, match="a must have a stride of 1"):
            product(torch.zeros(8, 12)[::2, ::2], b, out, False)

    def test_it_is_left_alone_where_onednn_is_off(self):
        bf16_product()
        with torch.backends.mkldnn.flags(enabled=False):
            assert heads.products(torch.device("cpu"), torch.bfloat16, rounded_logits=False) == "widened"
            found = dense(*make(torch.bfloat16, 0.01), {})
        assert max(found) < 4e-3 and heads.has_bf16_product()


@pytest.mark.gpu
@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_on_a_gpu(dtype, distance, monkeypatch):
    """Its own products of 16-bit operands with fp32 results, a block of columns at a time, under a loss scale."""
    monkeypatch.setattr(heads, "GPU_BLOCK_COLUMNS", 256)
    inputs, teacher = make(dtype, distance)
    device = [x.detach().cuda().requires_grad_() for x in inputs]
    heads_of_teacher = [x.cuda() for x in teacher]
    loss = kd.linear_kd_loss(
        *device[:2], *heads_of_teacher[:2], student_bias=device[2], teacher_bias=heads_of_teacher[2],
        chunk_bytes=31 * 2 * V * 4, normalizer=1e6,
    )  # fmt: skip
    got = torch.autograd.grad(loss * SCALE, device)
    copies = [x.detach().double().requires_grad_() for x in inputs]
    t = F.linear(*(x.double() for x in teacher))
    truth = torch.autograd.grad(SCALE * kd.kd_loss(F.linear(*copies), t, normalizer=1e6), copies)
    for a, b in zip(got, truth, strict=True):
        assert (a.cpu().double() - b).norm() < (4e-3 if dtype == torch.bfloat16 else 1e-3) * b.norm()
