"""``capture_expectation`` and the loss that trains from it, beside the loss of all logits in fp64."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels import backends, heads, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
N, D, V = 23, 16, 301
# Of gradients, rounded once.
ROUNDING = {"fp32": 5e-6, "bf16": 4e-3, "fp16": 5e-4, "fp64": 1e-12}
# Of sums, relative to the terms: a loss is the difference of numbers of about log V.
SUMS = {"fp32": 3e-6, "bf16": 3e-6, "fp16": 3e-6, "fp64": 1e-14}


def operands(dtype="fp32", distance=1.0, rows=N):
    """Hidden states, a head, its bias, a teacher's logits and labels of which two do not count."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = (x.to(DTYPES[dtype]) for x in (normal(rows, D), normal(V, D) / 2, normal(V)))
    teacher = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double()) * (1 + distance / 2)
    teacher = (teacher + distance * normal(rows, V)).to(torch.float64 if dtype == "fp64" else torch.float32)
    labels = torch.randint(0, V - 45, (rows,), generator=generator)
    labels[3], labels[7] = -100, -100
    return hidden, weight, bias, teacher, labels


def truth(hidden, weight, bias, teacher, labels, **options):
    """Loss and gradient of the logits in fp64, by the textbook."""
    hidden = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(hidden, weight.double(), None if bias is None else bias.double())
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    loss = kd.kd_loss(logits, teacher.double(), labels, backend="torch", **options)
    return loss.detach(), torch.autograd.grad(weighted(loss), hidden)[0]


def weighted(loss):
    if loss.dim() == 0:
        return loss
    return (loss * torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum()


def off(got, expected):
    return ((got.detach().double() - expected.detach()).norm() / expected.norm().clamp(min=1e-30)).item()


def of_capture(options):
    """The options of the capture for those of a loss."""
    temperature = options.get("teacher_temperature", options.get("temperature", 1.0))
    return {"temperature": temperature, "vocab_size": options.get("vocab_size")}


CASES = {
    "mean": {},
    "a temperature": {"temperature": 2.0},
    "two temperatures": {"temperature": 0.7, "teacher_temperature": 3.0, "scale_by_t_squared": False},
    "a temperature a row": {"temperature": torch.linspace(0.5, 3, N), "reduction": "none"},
    "terms": {"ce_weight": 0.5, "z_loss_weight": 1e-2, "label_smoothing": 0.1, "kd_weight": 0.7, "temperature": 2.0},
    "cross entropy alone": {"kd_weight": 0.0, "ce_weight": 1.0},
    "weights": {"row_weight": torch.linspace(-1, 1, N), "normalizer": 7.0, "reduction": "sum"},
    "soft cross entropy": {"divergence": "soft_ce", "temperature": 2.0, "reduction": "batchmean"},
    "a padded head": {"vocab_size": V - 45, "ce_weight": 0.5},
    "weights of terms": {
        "kd_weight": torch.linspace(0, 2, N),
        "ce_weight": torch.linspace(1, 0, N),
        "temperature": 2.0,
    },
    "rows": {"reduction": "none", "row_weight": torch.linspace(-1, 1, N), "ce_weight": 0.5},
}


@dtypes
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name, with_bias, dtype, backend):
    hidden, weight, bias, teacher, labels = operands(dtype)
    bias, options = bias if with_bias else None, CASES[name]
    expected, gradient = truth(hidden, weight, bias, teacher, labels, **options)
    hidden.requires_grad_()
    with testing.poisoned_memory():
        captured = kd.capture_expectation(teacher, weight, student_bias=bias, chunk_bytes=9000, **of_capture(options))
        loss = kd.linear_kd_loss(
            hidden,
            weight,
            labels=labels,
            student_bias=bias,
            teacher_expectation=captured,
            chunk_bytes=5 * V * 4,
            backend=backend,
            **options,
        )
        (found,) = torch.autograd.grad(weighted(loss), hidden)
    assert found.dtype == hidden.dtype and not found[labels == -100].any()
    assert (loss - expected).abs().max() < SUMS[dtype] * 9 and off(found, gradient) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_beside_a_near_teacher_as_exact_as_the_full_loss(dtype, backend):
    """Two products as large as the head are subtracted before they are rounded."""
    hidden, weight, bias, teacher, labels = operands(dtype, distance=0.02)
    expected, gradient = truth(hidden, weight, bias, teacher, labels)
    captured = kd.capture_expectation(teacher, weight, student_bias=bias)
    hidden.requires_grad_()
    call = {"labels": labels, "student_bias": bias, "backend": backend}
    loss = kd.linear_kd_loss(hidden, weight, teacher_expectation=captured, **call)
    full = kd.linear_kd_loss(hidden, weight, teacher_logits=lambda rows: teacher[rows], **call)
    found, of_full = (torch.autograd.grad(item, hidden)[0] for item in (loss, full))
    assert off(found, gradient) < max(1.5 * off(of_full, gradient), 2e-4)
    # The loss is the difference of numbers of about log V.
    assert abs(loss.double() - expected) < 3e-6


def mixed_on_any_cpu(a, b, out, *, add):
    """Stands in for ``heads.mixed_product`` of a device that has it; operands of 16 bits, as a GPU takes them."""
    product = a.to(b.dtype).float() @ b.float()
    out.copy_(product + out if add else product)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("distance", [0.02, 1.0])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_products_of_16_bit_operands_lose_nothing_of_q(dtype, distance, on_gpu, monkeypatch):
    """The part that the rounding of an operand takes off is multiplied too, in the capture and in the loss."""
    monkeypatch.setattr(heads, "products", lambda device, dtype, **_: "mixed" if dtype.itemsize == 2 else "plain")
    monkeypatch.setattr(heads, "mixed_product", mixed_on_any_cpu)
    init = heads.Head.__init__

    def as_on_a_gpu(self, weight, *args, **kwargs):
        init(self, weight, *args, **kwargs)
        if on_gpu:
            self._on_cpu = False
            self.blocks = heads._blocks(kwargs["columns"], 128)

    monkeypatch.setattr(heads.Head, "__init__", as_on_a_gpu)
    hidden, weight, bias, teacher, labels = operands(dtype, distance)
    expected, gradient = truth(hidden, weight, bias, teacher, labels)
    captured = kd.capture_expectation(teacher, weight, student_bias=bias)
    p = torch.softmax(teacher.double(), -1)
    assert off(captured.expectation, p @ weight.double()) < (2e-5 if dtype == "bf16" else 3e-6)
    hidden.requires_grad_()
    loss = kd.linear_kd_loss(hidden, weight, labels=labels, student_bias=bias, teacher_expectation=captured)
    (found,) = torch.autograd.grad(loss, hidden)
    assert off(found, gradient) < ROUNDING[dtype] and abs(loss.double() - expected) < 2e-5


@dtypes
def test_what_is_captured(dtype):
    hidden, weight, bias, teacher, _ = operands(dtype)
    teacher[:, 5], teacher[2, 9:] = -torch.inf, -torch.inf
    temperature = torch.linspace(0.5, 3, N)
    found = kd.capture_expectation(
        teacher.view(1, N, V), weight, student_bias=bias, temperature=temperature.view(1, N), chunk_bytes=9000
    )
    logp = torch.log_softmax(teacher.double() / temperature.double()[:, None], -1)
    p = logp.exp()
    sums = torch.float64 if dtype == "fp64" else torch.float32
    assert {x.dtype for x in found} == {sums} and found.expectation.shape == (1, N, D) and found.bias.shape == (1, N)
    assert torch.equal(found.temperature, temperature.view(1, N).to(sums))
    assert off(found.expectation[0], p @ weight.double()) < SUMS[dtype]
    assert off(found.bias[0], p @ bias.double()) < SUMS[dtype]
    assert off(found.entropy[0], torch.special.entr(p).sum(-1)) < SUMS[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_a_teacher_of_hidden_states(dtype):
    _, weight, _, _, _ = operands(dtype)
    states, head = torch.randn(N, 24).to(DTYPES[dtype]), torch.nn.Linear(24, V).to(DTYPES[dtype])
    student = torch.nn.Linear(D, V).to(DTYPES[dtype]).requires_grad_(False)
    options = {"softcap": 5.0, "temperature": 2.0, "vocab_size": V - 45}
    found = kd.capture_expectation(states, student, teacher_weight=head, chunk_bytes=9000, **options)
    logits = torch.nn.functional.linear(states.double(), head.weight.double(), head.bias.double())
    p = torch.softmax(5 * torch.tanh(logits / 5)[:, : V - 45] / 2, -1)
    assert off(found.expectation, p @ student.weight[: V - 45].double()) < 5e-6
    assert off(found.bias, p @ student.bias[: V - 45].double()) < 5e-6
    assert not any(item.requires_grad for item in found[:3])


def test_under_autocast_both_know_the_rounded_head(backend):
    hidden, weight, bias, teacher, labels = operands()
    rounded = [item.bfloat16() for item in (hidden, weight, bias)]
    expected, gradient = truth(*rounded, teacher, labels)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = kd.capture_expectation(teacher, weight, student_bias=bias)
        loss = kd.linear_kd_loss(
            hidden, weight, labels=labels, student_bias=bias, teacher_expectation=captured, backend=backend
        )
    (found,) = torch.autograd.grad(loss, hidden)
    assert off(loss, expected) < 3e-6 and off(found, gradient) < ROUNDING["bf16"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_expectations_in_16_bits(stored):
    hidden, weight, bias, teacher, labels = operands("bf16")
    _, gradient = truth(hidden, weight, bias, teacher, labels)
    captured = kd.capture_expectation(teacher, weight, student_bias=bias)
    captured = captured._replace(expectation=captured.expectation.to(stored))
    hidden.requires_grad_()
    loss = kd.linear_kd_loss(hidden, weight, labels=labels, student_bias=bias, teacher_expectation=captured)
    assert off(torch.autograd.grad(loss, hidden)[0], gradient) < 2 * ROUNDING["bf16"]


def test_rows_without_a_distribution_stay_by_themselves(backend):
    hidden, weight, bias, teacher, labels = operands()
    teacher[3], teacher[9], teacher[12] = torch.nan, -torch.inf, torch.inf  # row 3 has no label
    captured = kd.capture_expectation(teacher, weight, student_bias=bias)
    hidden.requires_grad_()
    call = {"labels": labels, "student_bias": bias, "backend": backend, "teacher_expectation": captured}
    loss = kd.linear_kd_loss(hidden, weight, reduction="none", **call)
    assert loss.isnan().nonzero().squeeze(1).tolist() == [9, 12]
    (found,) = torch.autograd.grad(loss.sum(), hidden)
    assert found.isnan().any(-1).nonzero().squeeze(1).tolist() == [9, 12] and not found[3].any()
    weight_of_rows = torch.ones(N)
    weight_of_rows[[9, 12]] = 0
    assert kd.linear_kd_loss(hidden, weight, row_weight=weight_of_rows, **call).isfinite()
    of_term = kd.linear_kd_loss(hidden, weight, kd_weight=weight_of_rows, ce_weight=0.5, **call)
    assert of_term.isfinite() and torch.autograd.grad(of_term, hidden)[0].isfinite().all()


def test_no_row_that_counts_and_no_row(backend):
    hidden, weight, _, teacher, labels = operands()
    hidden.requires_grad_()
    captured = kd.capture_expectation(teacher, weight)
    call = {"teacher_expectation": captured, "backend": backend}
    loss = kd.linear_kd_loss(hidden, weight, labels=torch.full_like(labels, -100), **call)
    assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any()
    nothing = kd.capture_expectation(teacher[:0], weight)
    assert nothing.expectation.shape == (0, D)
    call["teacher_expectation"] = nothing
    assert kd.linear_kd_loss(hidden[:0], weight, reduction="sum", **call) == 0


def test_rows_that_do_not_count_are_not_multiplied(monkeypatch, backend):
    hidden, weight, _, teacher, labels = operands()
    captured = kd.capture_expectation(teacher, weight)
    seen = []
    project = heads.Head.project

    def recorded(self, states, out):
        seen.append(len(states))
        return project(self, states, out)

    monkeypatch.setattr(heads.Head, "project", recorded)
    labels[10:] = -100
    hidden.requires_grad_()
    call = {"teacher_expectation": captured, "backend": backend, "chunk_bytes": 4 * V * 4}
    kd.linear_kd_loss(hidden, weight, labels=labels, **call).backward()
    assert seen == [4, 4]
    seen.clear()
    loss = kd.linear_kd_loss(hidden, weight, reduction="none", **call)
    assert max(seen) <= 4 and sum(seen) == N
    seen.clear()
    loss[5:8].sum().backward()
    assert seen == [3]


def test_the_module_and_a_frozen_head(backend):
    hidden, _, _, teacher, labels = operands()
    head = torch.nn.Linear(D, V)
    captured = kd.capture_expectation(teacher, head, temperature=2.0)
    module = kd.LinearKDLoss(temperature=2.0, backend=backend)
    call = {"labels": labels, "teacher_expectation": captured}
    with pytest.raises(ValueError, match="student_weight must not require grad with teacher_expectation"):
        module(hidden.requires_grad_(), head, **call)
    with torch.no_grad():
        value = module(hidden, head, **call)
    head.requires_grad_(False)
    loss = module(hidden, head, **call)
    assert loss.requires_grad and off(loss, value.double()) < 1e-6
    expected, _ = truth(hidden, head.weight, head.bias, teacher, labels, temperature=2.0)
    assert off(value, expected) < 3e-6


def test_a_loss_scale_in_fp16_underflows_nothing(backend):
    """The gradient of a mean over many rows is below the least number of fp16, until the scale comes."""
    hidden, weight, _, teacher, labels = operands("fp16", distance=0.1)
    _, gradient = truth(hidden, weight, None, teacher, labels, normalizer=1e7)
    captured = kd.capture_expectation(teacher, weight)
    hidden.requires_grad_()
    loss = kd.linear_kd_loss(
        hidden, weight, labels=labels, teacher_expectation=captured, normalizer=1e7, backend=backend
    )
    (found,) = torch.autograd.grad(loss * 2.0**22, hidden)
    assert off(found, gradient * 2.0**22) < 2e-3


def test_derivatives_beyond_the_first():
    hidden, weight, bias, teacher, labels = operands("fp64")
    hidden.requires_grad_()
    captured = kd.capture_expectation(teacher, weight, student_bias=bias, temperature=2.0)

    def loss(states, backend="torch"):
        call = {"labels": labels, "student_bias": bias, "teacher_expectation": captured, "temperature": 2.0}
        return kd.linear_kd_loss(states, weight, backend=backend, **call)

    few, some = hidden[:2].detach().requires_grad_(), kd.capture_expectation(teacher[:2], weight)
    assert torch.autograd.gradgradcheck(
        lambda states: kd.linear_kd_loss(states, weight, teacher_expectation=some, backend="torch"), (few,)
    )
    _, gradient = truth(hidden, weight, bias, teacher, labels, temperature=2.0)
    assert off(torch.func.grad(loss)(hidden.detach()), gradient) < 1e-12
    if backends.BACKENDS["cpu"].why_not("cpu") is None:
        with pytest.raises(RuntimeError, match="second derivative"):
            (first,) = torch.autograd.grad(loss(hidden, "cpu"), hidden, create_graph=True)
            first.sum().backward()


@pytest.mark.parametrize("reduction, backend", [("mean", "auto"), ("none", "auto"), ("mean", "torch")])
def test_one_graph(reduction, backend):
    hidden, weight, bias, teacher, labels = operands()
    captured = kd.capture_expectation(teacher, weight, student_bias=bias, temperature=2.0)

    def loss(states):
        return weighted(
            kd.linear_kd_loss(
                states,
                weight,
                labels=labels,
                student_bias=bias,
                teacher_expectation=captured,
                temperature=2.0,
                reduction=reduction,
                backend=backend,
            )
        )

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    states = hidden.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend=counter)(states).backward()
    hidden.requires_grad_()
    loss(hidden).backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(states.grad, hidden.grad, rtol=1e-4, atol=1e-6)


HIDDEN, WEIGHT, BIAS, TEACHER, LABELS = operands()
CAPTURED = kd.capture_expectation(TEACHER, WEIGHT, temperature=2.0)
PER_ROW = torch.linspace(1, 2, N)
WRONG = {
    "a tensor": ({"teacher_expectation": TEACHER}, TypeError, "must be a TeacherExpectation, got Tensor"),
    "a second teacher": ({"teacher_hidden": HIDDEN, "teacher_weight": WEIGHT}, ValueError, "takes the place of"),
    "a divergence": ({"divergence": "jsd"}, ValueError, "must be 'forward_kl' or 'soft_ce' .*, got 'jsd'"),
    "standardize": ({"standardize": True}, ValueError, "standardize does not go with teacher_expectation"),
    "softcap": ({"student_softcap": 30.0}, ValueError, "student_softcap does not go with .*, got 30.0"),
    "teacher softcap": ({"teacher_softcap": 3.0}, ValueError, "teacher_softcap .*an option of capture_expectation"),
    "mixture": ({"teacher_weights": (0.5, 0.5)}, ValueError, "teacher_weights does not go with"),
    "form": ({"teacher_form": "probs"}, ValueError, "teacher_form must be 'logits' with teacher_expectation"),
    "statistics": ({"return_stats": True}, ValueError, "return_stats does not go with teacher_expectation"),
    "temperature": ({"temperature": 1.0}, ValueError, "teacher_temperature must be 2.0, at which .* got 1.0"),
    "temperatures": ({"temperature": PER_ROW}, ValueError, "which is a number, got one per row"),
    "other rows": (
        {"teacher_expectation": CAPTURED._replace(temperature=PER_ROW), "temperature": PER_ROW + 1},
        ValueError,
        "must be the one per row that",
    ),
    "a bias": ({"student_bias": BIAS}, ValueError, "captured with no bias of .*, and the head has a bias"),
    "no bias": (
        {"teacher_expectation": CAPTURED._replace(bias=CAPTURED.entropy)},
        ValueError,
        "captured with a bias of .* has no bias",
    ),
    "an infinite bias": (
        {
            "teacher_expectation": CAPTURED._replace(bias=CAPTURED.entropy),
            "student_bias": torch.where(BIAS > 1, -torch.inf, BIAS),
        },
        ValueError,
        "student_bias must be finite",
    ),
    "shape": (
        {"teacher_expectation": CAPTURED._replace(expectation=CAPTURED.expectation[1:])},
        ValueError,
        r"expectation must have shape \(23, 16\), got \(22, 16\)",
    ),
    "entropy": (
        {"teacher_expectation": CAPTURED._replace(entropy=None)},
        TypeError,
        "teacher_expectation.entropy must be a torch.Tensor, got NoneType",
    ),
    "dtype": (
        {"teacher_expectation": CAPTURED._replace(entropy=CAPTURED.entropy.int())},
        TypeError,
        "teacher_expectation.entropy must be float32, .* got int32",
    ),
    "a head that learns": ({"student_weight": WEIGHT.clone().requires_grad_()}, ValueError, "must not require grad"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_the_loss(name):
    change, error, message = WRONG[name]
    call = {
        "student_hidden": HIDDEN,
        "student_weight": WEIGHT,
        "teacher_expectation": CAPTURED,
        "temperature": 2.0,
        **change,
    }
    with pytest.raises(error, match=message):
        kd.linear_kd_loss(**call)


def test_rounded_logits_are_refused():
    captured = kd.capture_expectation(TEACHER, WEIGHT.bfloat16())
    with pytest.raises(ValueError, match="logits_dtype must be float32 or None with teacher_expectation, got bfloat16"):
        kd.linear_kd_loss(
            HIDDEN.bfloat16(), WEIGHT.bfloat16(), teacher_expectation=captured, logits_dtype=torch.bfloat16
        )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"teacher": [1.0]}, TypeError, "teacher must be a torch.Tensor"),
        ({"student_weight": None}, TypeError, "student_weight must be a torch.Tensor"),
        ({"student_weight": WEIGHT[:-1]}, ValueError, "must have the teacher's 301 rows, got 300; pass vocab_size"),
        ({"student_weight": WEIGHT[:5], "vocab_size": 9}, ValueError, "vocab_size must be at most student_weight's 5"),
        ({"student_weight": WEIGHT[0]}, ValueError, "student_weight must have shape"),
        ({"vocab_size": V + 1}, ValueError, "vocab_size must be"),
        ({"student_bias": BIAS[1:]}, ValueError, "student_bias must have shape"),
        ({"student_bias": BIAS / 0}, ValueError, "student_bias must be finite where expectations are taken"),
        ({"teacher_bias": BIAS}, ValueError, "teacher_bias goes with teacher_weight"),
        ({"teacher_weight": WEIGHT}, ValueError, r"teacher_weight must have shape \(V, 301\), got \(301, 16\)"),
        ({"teacher": PER_ROW[None], "teacher_weight": WEIGHT}, ValueError, r"teacher_weight must have shape \(V, 23\)"),
        ({"teacher": 3, "teacher_weight": WEIGHT}, TypeError, "teacher must be a torch.Tensor, got int"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"temperature": PER_ROW[1:]}, ValueError, "temperature must be a number or have one value per row"),
        ({"softcap": -1.0}, ValueError, "softcap must be > 0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1"),
    ],
)
def test_errors_of_the_capture(change, error, message):
    with pytest.raises(error, match=message):
        kd.capture_expectation(**{"teacher": TEACHER, "student_weight": WEIGHT, **change})
