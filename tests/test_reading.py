"""Operands of kd_loss that change how rows are read: log-probabilities as the leaf, biases, other columns, classes
before the last dimension."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from grid import pairwise

import kdkernels as kd
from kdkernels import autograd, backends, testing

DIVERGENCES = kd.divergences.names()
# Of the numbers of tests that compare last digits.
EXACT = torch.float64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
WIDTHS = (1, 7, 16, 150, 2100)
HARD_OR_NOT = [(dtype, hard) for dtype in DTYPES for hard in (False, True)]
# Every operand in two dtypes, one of them of 16 bits.
GIVEN = [
    *(("fp32", "student"), ("bf16", "student"), ("fp64", "teacher"), ("fp16", "teacher")),
    *(("fp32", "both"), ("bf16", "both"), ("fp32", "columns"), ("fp16", "columns")),
]


def some(rows, columns, dtype=torch.float32, **options):
    return testing.make_inputs(options.pop("kind", "normal"), rows, columns, dtype, **options)


def log_probs(logits):
    return logits.double().log_softmax(-1).to(logits.dtype)


def gradient(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


# Log-probabilities as the leaf.


@pairwise("divergence, dtype, hard, width", DIVERGENCES, HARD_OR_NOT, WIDTHS)
def test_log_probs_against_the_oracle(backend, divergence, dtype, hard, width):
    student, teacher = some(9, width, DTYPES[dtype])
    labels, options = None, {}
    if hard:
        labels = torch.randint(width, (9,))
        labels[4] = -100
        options = {"ce_weight": 0.7, "label_smoothing": 0.1, "kd_weight": torch.rand(9)}
    with testing.poisoned_memory():
        testing.check_kd_loss(
            log_probs(student),
            teacher,
            labels,
            backend=backend,
            divergence=divergence,
            student_form="log_probs",
            teacher_temperature=2.0,
            **options,
        )


def test_log_probs_are_the_leaf_of_kl_div(backend):
    student, teacher = some(5, 300, EXACT)
    leaf, p = log_probs(student).requires_grad_(), teacher.softmax(-1)
    ours = kd.kd_loss(leaf, teacher, student_form="log_probs", reduction="batchmean", backend=backend)
    theirs = F.kl_div(leaf, p, reduction="batchmean")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*gradient(ours, leaf), *gradient(theirs, leaf))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_log_probs_are_free_of_their_sum(backend, divergence):
    """The gradient is that of the value, also where the x do not add up to probabilities."""
    leaf = torch.randn(2, 5, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 5, dtype=torch.float64)

    def loss(x):
        return kd.kd_loss(x, teacher, divergence=divergence, student_form="log_probs", backend=backend)

    assert torch.autograd.gradcheck(loss, (leaf,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_log_probs_of_the_teacher_itself_have_no_sign(backend, dtype):
    # Of one column, and of many of which one has everything.
    for width in (1, 40):
        teacher = torch.linspace(-9, 9, 7, dtype=DTYPES[dtype])[:, None] + torch.zeros(width, dtype=DTYPES[dtype])
        teacher[:, 1:] -= 1000
        leaf = torch.zeros_like(teacher)
        leaf[:, 1:] = -torch.inf
        leaf.requires_grad_()
        loss = kd.kd_loss(leaf, teacher, divergence="tvd", student_form="log_probs", reduction="sum", backend=backend)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert (gradient(loss, leaf)[0] == 0).all()


def test_log_probs_give_logits_the_gradient_of_logits(backend):
    student, teacher = some(4, 33, torch.float64)
    student.requires_grad_()
    direct = kd.kd_loss(student, teacher, divergence="jsd", backend=backend)
    through = kd.kd_loss(student.log_softmax(-1), teacher, divergence="jsd", student_form="log_probs", backend=backend)
    torch.testing.assert_close(direct, through)
    torch.testing.assert_close(*gradient(direct, student), *gradient(through, student))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha_beta"])
def test_log_probs_with_a_nan_or_an_infinity(backend, divergence):
    student, teacher = some(5, 40)
    student, grad = log_probs(student), []
    student[1, 3], teacher[2, 5], student[3, 1] = torch.nan, torch.nan, -torch.inf
    for name in (backend, "torch"):
        leaf = student.clone().requires_grad_()
        loss = kd.kd_loss(
            leaf, teacher, divergence=divergence, student_form="log_probs", reduction="none", backend=name
        )
        grad.append((loss, *gradient(loss.sum(), leaf)))
    torch.testing.assert_close(grad[0], grad[1], equal_nan=True)
    assert torch.equal(grad[0][1][1:3].isnan().any(-1), torch.tensor([True, True]))
    assert grad[0][0][0].isfinite() and grad[0][1][[0, 4]].isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 2.0}, "temperature must be 1 with student_form='log_probs', got 2.0"),
        ({"temperature": torch.ones(3)}, "temperature must be 1 with student_form='log_probs', got a tensor"),
        ({"z_loss_weight": 0.1}, "z_loss_weight has no meaning"),
        ({"student_softcap": 30.0}, "student_softcap has no meaning"),
        ({"standardize": True}, "standardize has no meaning"),
        ({"student_bias": torch.zeros(5)}, "student_bias has no meaning"),
        ({"student_form": "probs"}, "student_form must be one of logits, log_probs, got 'probs'"),
    ],
)
def test_what_log_probs_have_no_use_for(options, message):
    student, teacher = some(3, 5)
    with pytest.raises(ValueError, match=message):
        kd.kd_loss(student, teacher, **{"student_form": "log_probs", **options})


# Biases and other columns.


@pairwise("divergence, dtype, given, width", DIVERGENCES, GIVEN, WIDTHS)
def test_operands_of_columns_against_the_oracle(backend, divergence, dtype, given, width):
    student, teacher = some(9, width, DTYPES[dtype])
    options = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.3, "z_loss_weight": 1e-3}
    if given in ("student", "both"):
        options["student_bias"] = torch.randn(width)
    if given in ("teacher", "both", "columns"):
        options["teacher_bias"] = torch.randn(width)
    if given == "columns":
        teacher = torch.cat([teacher, torch.full_like(teacher, 9.0)], -1)
        options |= {"teacher_columns": torch.randperm(width), "teacher_softcap": 20.0}
    if given == "both":
        options["student_softcap"] = 15.0
    labels = torch.randint(width, (9,))
    labels[2] = -100
    with testing.poisoned_memory():
        testing.check_kd_loss(student, teacher, labels, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_columns_without_a_teacher_s_has_no_probability(backend, dtype):
    student, teacher = some(6, 50, DTYPES[dtype])
    columns = torch.randperm(80)[:50] % 50
    columns[[0, 13, 49]] = -1
    for divergence in ("forward_kl", "jsd", "tvd", "skew_kl"):
        testing.check_kd_loss(
            student, teacher, backend=backend, divergence=divergence, teacher_columns=columns, temperature=1.5
        )
    p = torch.softmax(teacher.double(), -1).to(teacher.dtype)
    testing.check_kd_loss(student, p, backend=backend, teacher_columns=columns.int(), teacher_form="unnormalized_probs")


def test_a_draft_vocabulary(backend):
    """Another width than the student's, which is padded."""
    student, teacher = some(6, 40)[0].requires_grad_(), torch.randn(6, 1000)
    columns = torch.randperm(1000)[:37]
    options = {"vocab_size": 37, "backend": backend}
    ours = kd.kd_loss(student, teacher, teacher_columns=columns, **options)
    copied = kd.kd_loss(student, teacher[:, columns], **options)
    torch.testing.assert_close(ours, copied)
    grad = gradient(ours, student)[0]
    torch.testing.assert_close(grad, gradient(copied, student)[0], atol=1e-7, rtol=1e-5)
    assert not grad[:, 37:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_a_bias_is_the_sum_of_the_logits_(backend, dtype, reduction):
    student, teacher = some(64, 37, DTYPES[dtype])
    student.requires_grad_()
    bias = torch.randn(37, dtype=torch.float64 if dtype == "fp64" else torch.float32).requires_grad_()
    weight = torch.rand(64) if reduction == "none" else torch.tensor(3.0)

    def run(leaves):
        loss = kd.kd_loss(
            student, teacher, student_bias=bias, temperature=2.0, reduction=reduction, backend=backend, divergence="jsd"
        )
        return torch.autograd.grad(loss, leaves, weight.to(loss.dtype))

    dstudent, dbias = run([student, bias])
    torch.testing.assert_close(dbias, dstudent.to(bias.dtype).sum(0), rtol=1e-4, atol=1e-3 if "16" in dtype else 1e-6)
    assert dbias.dtype == bias.dtype and dbias.abs().max() > 1e-3
    assert torch.equal(dbias, run([student, bias])[1])
    assert torch.equal(dbias, run([bias])[0])


def test_a_bias_alone_may_get_a_gradient(backend):
    student, teacher = some(8, 21)
    bias = torch.zeros(21, requires_grad=True)
    (grad,) = gradient(kd.kd_loss(student, teacher, student_bias=bias, backend=backend), bias)
    expected = (student.softmax(-1) - teacher.softmax(-1)).mean(0)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4)


def test_a_teacher_beside_biases_gets_its_gradient(backend):
    (student, teacher), bias, other = some(8, 21, torch.float64), torch.randn(21).double(), torch.randn(21).double()
    student.requires_grad_(), teacher.requires_grad_()
    ours = kd.kd_loss(
        student, teacher, student_bias=bias, teacher_bias=other, divergence="skew_kl", temperature=2.0, backend=backend
    )
    added = kd.kd_loss(student + bias, teacher + other, divergence="skew_kl", temperature=2.0, backend=backend)
    torch.testing.assert_close(ours, added)
    for a, b in zip(gradient(ours, student, teacher), gradient(added, student, teacher), strict=True):
        torch.testing.assert_close(a, b)


def test_statistics_beside_operands_of_columns(backend):
    student, teacher = some(6, 50)
    bias, other, columns = torch.randn(50), torch.randn(50), torch.randperm(50)
    labels = torch.randint(50, (6,))
    options = {"divergence": "jsd", "temperature": 1.5, "return_stats": True, "backend": backend}
    given = {"student_bias": bias, "teacher_bias": other, "teacher_columns": columns}
    ours = kd.kd_loss(student, teacher, labels, **given, **options)
    copied = kd.kd_loss(student + bias, teacher[:, columns] + other, labels, **options)
    torch.testing.assert_close(ours, copied, rtol=1e-4, atol=1e-5)
    free = kd.kd_loss(log_probs(student), teacher, labels, student_form="log_probs", **{**options, "temperature": 1.0})
    usual = kd.kd_loss(log_probs(student), teacher, labels, **{**options, "temperature": 1.0})
    torch.testing.assert_close(free, usual, rtol=1e-4, atol=2e-5)


REFUSED = {
    "bias-shape": ({"student_bias": torch.zeros(4)}, ValueError, r"student_bias must have shape \(5,\)"),
    "bias-dtype": ({"teacher_bias": torch.zeros(5).int()}, TypeError, "teacher_bias must be float32"),
    "bias-grad": (
        {"teacher_bias": torch.zeros(5, requires_grad=True)},
        ValueError,
        "teacher_bias must not require grad: it gets no gradient",
    ),
    "bias-mixture": (
        {"teacher": [torch.randn(3, 5)] * 2, "student_bias": torch.zeros(5)},
        ValueError,
        "student_bias cannot be combined with a mixture of teachers in the kernels; backend='torch' computes it",
    ),
    "bias-standardize": (
        {"teacher_bias": torch.zeros(5), "standardize": True},
        ValueError,
        "teacher_bias cannot be combined with standardize",
    ),
    "bias-alone": (
        {"teacher": None, "kd_weight": 0.0, "teacher_bias": torch.zeros(5)},
        ValueError,
        "teacher_bias has no meaning without a teacher",
    ),
    "columns-shape": ({"teacher_columns": torch.arange(4)}, ValueError, r"teacher_columns must have shape \(5,\)"),
    "columns-dtype": ({"teacher_columns": torch.zeros(5)}, TypeError, "teacher_columns must be int64 or int32"),
    "columns-range": (
        {"teacher_columns": torch.tensor([0, 1, 2, 3, 5])},
        ValueError,
        r"teacher_columns must be in \[0, 5\), or -1 for none, got 5",
    ),
    "columns-none": ({"teacher_columns": torch.full((5,), -1)}, ValueError, "teacher_columns must not all be -1"),
    "columns-teacher-grad": (
        {
            "teacher": torch.randn(3, 5, requires_grad=True),
            "teacher_columns": torch.arange(5),
            "backend": "cpu",
        },
        ValueError,
        "with teacher_columns a teacher gets a gradient from plain PyTorch only",
    ),
    "width": ({"teacher": torch.randn(3, 6)}, ValueError, "teacher_columns=... when their columns differ"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operands_that_are_refused(name, compiled_cpu):
    options, error, message = REFUSED[name]
    options = {"teacher": torch.randn(3, 5), **options}
    with pytest.raises(error, match=message):
        kd.kd_loss(torch.randn(3, 5, requires_grad=True), **options)


def test_plain_pytorch_computes_what_the_kernels_refuse():
    student, teachers, bias = torch.randn(3, 5), [torch.randn(3, 5), torch.randn(3, 5)], torch.randn(5)
    ours = kd.kd_loss(student, teachers, student_bias=bias, teacher_bias=bias, backend="torch")
    torch.testing.assert_close(ours, kd.kd_loss(student + bias, [t + bias for t in teachers], backend="torch"))


@pytest.mark.parametrize("options", [{"dim": 1}, {"teacher_bias": torch.zeros(5)}], ids=["dim", "bias"])
def test_dtensors_are_refused(options, monkeypatch):
    from kdkernels import distributed

    monkeypatch.setattr(distributed, "among", lambda values: True)
    with pytest.raises(ValueError, match="takes plain tensors, got DTensors among the logits"):
        kd.kd_loss(torch.randn(3, 5, 2), torch.randn(3, 5, 2), **options)


# Classes before the last dimension.


SHAPES = ["2x5x3x4", "1x19x7x13", "3x300x2x9", "2x1x3x3", "2x64x1x1", "4x6x70", "31x130"]


@pairwise("divergence, dtype, hard, shape", DIVERGENCES, HARD_OR_NOT, SHAPES)
def test_classes_in_the_middle_against_the_oracle(backend, divergence, dtype, hard, shape):
    shape = [int(n) for n in shape.split("x")]
    dim = 0 if len(shape) == 2 else 1
    columns, rows = shape[dim], [n for d, n in enumerate(shape) if d != dim]
    student, teacher = some(torch.Size(rows).numel(), columns, DTYPES[dtype])
    student, teacher = (x.reshape(*rows, columns).movedim(-1, dim).contiguous() for x in (student, teacher))
    labels, options = None, {"temperature": 0.5 + torch.rand(rows)}
    if hard:
        labels = torch.randint(columns, rows)
        labels.view(-1)[::4] = 255
        options = {
            "temperature": 2.0,
            "ce_weight": torch.rand(rows),
            "label_smoothing": 0.1,
            "z_loss_weight": 1e-3,
            "student_softcap": 20.0,
            "row_weight": torch.rand(rows),
            "ignore_index": 255,
        }
    with testing.poisoned_memory():
        testing.check_kd_loss(student, teacher, labels, backend=backend, divergence=divergence, dim=dim, **options)


@pytest.mark.parametrize("kind", [kind for kind in testing.KINDS if kind != "huge"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd", "skew_kl"])
def test_classes_in_the_middle_at_the_corners(compiled_cpu, divergence, kind):
    student, teacher = (x.t().contiguous() for x in some(20, 33, kind=kind))
    testing.check_kd_loss(student, teacher, backend="cpu", divergence=divergence, dim=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_classes_in_the_middle_with_other_operands(backend, dtype):
    rows, columns = (2, 5, 9), 21
    student, teacher = some(90, columns, DTYPES[dtype])
    student, teacher = (x.reshape(*rows, columns).movedim(-1, 1).contiguous() for x in (student, teacher.float()))
    picked = torch.randperm(columns)
    given = {"teacher_bias": torch.randn(columns), "teacher_columns": picked, "dim": 1, "backend": backend}
    testing.check_kd_loss(student, teacher, student_bias=torch.randn(columns), temperature=2.0, **given)
    testing.check_kd_loss(student.log_softmax(1), teacher, student_form="log_probs", divergence="jsd", **given)
    testing.check_kd_loss(student, teacher.softmax(1), teacher_form="unnormalized_probs", **given)
    picked[3] = -1
    testing.check_kd_loss(student, teacher, divergence="tvd", **given)


def test_channels_last_is_a_view(compiled_cpu, monkeypatch):
    """Its classes lie next to each other: the kernels of all other losses take them."""
    ran = []
    run = autograd.run
    monkeypatch.setattr(autograd, "run", lambda launch, *rest: (ran.append(launch.pattern), run(launch, *rest))[1])
    maps, teacher = torch.randn(2, 21, 5, 7), torch.randn(2, 21, 5, 7)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        s, t = (x.to(memory_format=layout).detach() for x in (maps, teacher))
        s.requires_grad_()
        loss = kd.kd_loss(s, t, dim=1, reduction="none", backend="cpu")
        (grad,) = gradient(loss.sum(), s)
        assert grad.is_contiguous(memory_format=layout)
        found.append((loss, grad))
    assert ran == ["pixel_fwd", "dense_fwd"]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "none"])
def test_classes_in_the_middle_may_be_summed_and_scaled(compiled_cpu, reduction):
    maps, teacher = torch.randn(3, 9, 4, 5, requires_grad=True), torch.randn(3, 9, 4, 5, requires_grad=True)
    found = []
    for name in ("cpu", "torch"):
        loss = kd.kd_loss(maps, teacher, dim=1, temperature=3.0, reduction=reduction, backend=name)
        weight = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
        found.append((loss, *torch.autograd.grad(loss, (maps, teacher), weight, retain_graph=name == "cpu")))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    if reduction == "batchmean":
        log_q, p = (maps / 3).log_softmax(1), (teacher / 3).softmax(1)
        torch.testing.assert_close(found[0][0], 9 * F.kl_div(log_q, p, reduction="batchmean"))


def test_classes_in_the_middle_in_place(compiled_cpu):
    maps, teacher = torch.randn(2, 9, 4, 5), torch.randn(2, 9, 4, 5)
    found = []
    for inplace in (False, True):
        leaf = maps.clone().requires_grad_()
        student = leaf * 1
        loss = kd.kd_loss(student, teacher, dim=1, inplace=inplace, backend="cpu")
        found.append(gradient(loss, leaf)[0])
    assert torch.equal(*found)


def test_some_images_of_a_batch_are_no_copy(compiled_cpu):
    maps, teacher = torch.randn(4, 9, 4, 5, requires_grad=True), torch.randn(4, 9, 4, 5)
    loss = kd.kd_loss(maps[1::2, :7], teacher[::2, 1:8], dim=1, backend="cpu")
    wanted = kd.kd_loss(maps[1::2, :7], teacher[::2, 1:8], dim=1, backend="torch")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient(loss, maps)[0], gradient(wanted, maps)[0], atol=1e-7, rtol=1e-4)


def test_half_precision_without_a_bound_keeps_small_gradients(compiled_cpu):
    maps, teacher = (torch.randn(2, 9, 40, 50) * 2).half().requires_grad_(), torch.randn(2, 9, 40, 50)
    loss = kd.kd_loss(maps, teacher, dim=1, divergence="reverse_kl", backend="cpu") * 2**14
    wide = maps.detach().double().requires_grad_()
    wanted = kd.kd_loss(wide, teacher.double(), dim=1, divergence="reverse_kl", backend="torch") * 2**14
    torch.testing.assert_close(gradient(loss, maps)[0].double(), gradient(wanted, wide)[0], rtol=2e-3, atol=1e-6)


def test_a_module_of_pixels_is_compiled(compiled_cpu):
    module = kd.KDLoss(dim=1, temperature=2.0, backend="cpu")
    maps, teacher = torch.randn(2, 9, 4, 5, requires_grad=True), torch.randn(2, 9, 4, 5)
    bias = torch.randn(9)
    eager = module(maps, teacher, teacher_bias=bias)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(maps, teacher, teacher_bias=bias)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradient(compiled, maps)[0], gradient(eager, maps)[0])


@pytest.mark.parametrize(
    "student, teacher, options, message",
    [
        (torch.randn(2, 5, 4), torch.randn(2, 5, 4), {"dim": 3}, r"dim must be in \[-3, 3\)"),
        (torch.randn(2, 5, 4), torch.randn(2, 4), {"dim": 1}, "teacher must have the student's shape"),
        (
            torch.randn(2, 5, 4, 4)[..., ::2],
            torch.randn(2, 5, 4, 2),
            {"dim": 1},
            r"student must have the rows behind dimension 1 next to each other, .*movedim\(1, -1\).contiguous\(\)",
        ),
        (
            torch.randn(2, 5, 4, 4),
            torch.randn(2, 5, 4, 4).to(memory_format=torch.channels_last),
            {"dim": 1},
            "teacher must have the rows behind dimension 1 next to each other",
        ),
        (
            torch.randn(2, 5, 4, 4),
            [torch.randn(2, 5, 4, 4)] * 2,
            {"dim": 1},
            "dim=1 cannot be combined with a mixture of teachers",
        ),
        (torch.randn(2, 5, 4), torch.randn(2, 5, 4), {"dim": 1, "standardize": True}, "dim=1 cannot be combined with"),
    ],
)
def test_layouts_that_are_refused(compiled_cpu, student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        kd.kd_loss(student, teacher, **options)
    if "cannot" in message or "next to" in message:
        assert kd.kd_loss(student, teacher, backend="torch", **options).isfinite()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa, compiled_cpu):
    """The oracle's tests again, on what the machine would not choose."""
    here = backends.cpu.isa()
    if here == "baseline":
        pytest.skip("this machine has no AVX2, so that all tests ran on the baseline")
    if isa == here:
        pytest.skip("this machine has no AVX-512, so that all tests ran on AVX2")
    part = "(against_the_oracle or corners or no_probability or nan_or_an) and not torch"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", part]
    done = subprocess.run(command, env={**os.environ, "KDKERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 100, done.stdout[-3000:]


def test_a_column_that_is_missing_has_no_mass_behind_a_softcap():
    student, columns = torch.zeros(1, 3, requires_grad=True), torch.tensor([0, 1, -1])
    options = {"teacher_columns": columns, "teacher_softcap": 1.0}
    loss = kd.kd_loss(student, torch.tensor([[1.0, 2.0]]), backend="torch", **options)
    p = torch.tensor([1.0, 2.0]).tanh().softmax(-1)
    torch.testing.assert_close(loss, (p * (p * 3).log()).sum())
    loss.backward()
    torch.testing.assert_close(student.grad, 1 / 3 - torch.tensor([[*p, 0.0]]))
    with pytest.raises(ValueError, match="cannot be combined with teacher_softcap in the kernels"):
        kd.kd_loss(student, torch.tensor([[1.0, 2.0]]), **options)
    kd.kd_loss(student, torch.tensor([[1.0, 2.0]]), teacher_columns=torch.tensor([0, 1, 1]), teacher_softcap=1.0)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4)])
def test_maps_without_a_row(shape):
    student = torch.randn(shape, requires_grad=True)
    loss = kd.kd_loss(student, torch.randn(shape), dim=1)
    loss.backward()
    assert loss == 0 and student.grad.shape == shape
