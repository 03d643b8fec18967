"""Every option of ``kd_loss`` against the oracle, and inputs of every layout: shapes, strides, padding, labels."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import backends, divergences, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NUM_ROWS, VOCAB = 13, 300
IGNORE = -100

dtypes = pytest.mark.parametrize("dtype", DTYPES)
# One whose gradient needs no logarithm, one that needs both, one of three sweeps.
some_divergences = pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])


def per_row(low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64) * (high - low) + low


OPTIONS = {
    # The exponentials of cross entropy are those of the divergence, a power of them, or others.
    "ce-T1": {"ce_weight": 0.5},
    "ce-T2": {"ce_weight": 0.5, "temperature": 2.0},
    "ce-T3": {"ce_weight": 0.5, "temperature": 3.0},
    "ce-T4": {"ce_weight": 0.5, "temperature": 4.0},
    "ce-T1.7": {"ce_weight": 0.5, "temperature": 1.7},
    "ce-T0.2": {"ce_weight": 0.5, "temperature": 0.2},
    "ce-only": {"ce_weight": 1.5, "kd_weight": 0.0},
    "kd_weight": {"kd_weight": 0.3, "temperature": 2.0},
    "smoothing": {"ce_weight": 0.7, "label_smoothing": 0.1, "temperature": 2.0},
    "smoothing-1": {"ce_weight": 0.7, "label_smoothing": 1.0},
    "z-T1": {"z_loss_weight": 0.01},
    "z-T2": {"z_loss_weight": 0.01, "temperature": 2.0},
    "z-only": {"z_loss_weight": 0.1, "kd_weight": 0.0, "temperature": 3.0},
    "student_softcap": {"student_softcap": 5.0, "temperature": 2.0},
    "teacher_softcap": {"teacher_softcap": 5.0},
    "softcap-ce-z": {"student_softcap": 4.0, "teacher_softcap": 30.0, "ce_weight": 0.5, "z_loss_weight": 0.01},
    "teacher_temperature": {"temperature": 2.0, "teacher_temperature": 0.7},
    "no-T2": {"temperature": 4.0, "scale_by_t_squared": False},
    "log_probs": {"teacher_form": "log_probs", "temperature": 2.0},
    "probs": {"teacher_form": "probs"},
    "probs-T2": {"teacher_form": "probs", "temperature": 2.0, "ce_weight": 0.1},
    "standardize": {"standardize": True, "temperature": 2.0},
    "standardize-ce-z": {"standardize": True, "temperature": 3.0, "ce_weight": 0.5, "z_loss_weight": 0.01},
    "standardize-softcap": {"standardize": True, "student_softcap": 10.0, "teacher_softcap": 10.0},
    "row_weight": {"row_weight": per_row(-1.0, 2.0, 1)},
    "zero-row_weight": {"row_weight": torch.arange(NUM_ROWS) % 2},
    "row-temperature": {"temperature": per_row(0.3, 5.0, 2)},
    "row-temperatures-ce": {
        "temperature": per_row(0.3, 5.0, 2),
        "teacher_temperature": per_row(0.5, 2.0, 3),
        "row_weight": per_row(0.1, 2.0, 1),
        "ce_weight": 0.5,
    },
    "mixture-probs": {"teacher_weights": [0.2, 0.5, 0.3]},
    "mixture-logits": {"teacher_weights": [0.2, 0.5, 0.3], "mixture": "logits", "temperature": 2.0},
    "mixture-default": {"temperature": 2.0, "ce_weight": 0.3},
    "mixture-of-one": {"temperature": 2.0},
    "mixture-rows": {"teacher_weights": torch.softmax(per_row(-1, 1, 4)[:, None] * torch.arange(3), -1)},
    "mixture-zero": {"teacher_weights": [0.0, 1.0, 0.0]},
    "mixture-softcap-standardize": {"teacher_softcap": 8.0, "student_softcap": 8.0, "standardize": True},
    "everything": {
        "kd_weight": 0.8,
        "ce_weight": 0.5,
        "z_loss_weight": 1e-3,
        "label_smoothing": 0.1,
        "temperature": per_row(1.0, 3.0, 5),
        "teacher_temperature": 1.5,
        "row_weight": per_row(0.1, 2.0, 6),
        "student_softcap": 20.0,
        "teacher_softcap": 25.0,
        "vocab_size": VOCAB - 7,
    },
}


def make_case(options, dtype, vocab_size=VOCAB, kind="normal"):
    """Student, teacher or teachers, and labels of which every fourth is ignored."""
    name = next(name for name, value in OPTIONS.items() if value is options)
    count = {"mixture-default": 2, "mixture-of-one": 1}.get(name, 3) if name.startswith("mixture") else 0
    student, teacher = testing.make_inputs(kind, NUM_ROWS, vocab_size, torch.float64)
    if options.get("teacher_form") in ("probs", "log_probs"):
        teacher = torch.log_softmax(teacher, -1)
        teacher = teacher.exp() if options["teacher_form"] == "probs" else teacher
    teachers = [testing.make_inputs(kind, NUM_ROWS, vocab_size, dtype, seed)[1] for seed in range(count)]
    labels = torch.arange(NUM_ROWS) * 7 % (vocab_size - 7)
    labels[::4] = IGNORE
    return student.to(dtype), teachers or teacher.to(dtype), labels


def losses(labels, backend, **options):
    return lambda s, t: kd.kd_loss(s, t, labels, **{**options, "reduction": "none", "backend": backend})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@some_divergences
def test_options(options, dtype, divergence, backend):
    student, teacher, labels = make_case(options, DTYPES[dtype])
    with testing.poisoned_memory():
        testing.check_kd_loss(student, teacher, labels, divergence=divergence, backend=backend, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_options_over_several_tiles(options, dtype, backend):
    student, teacher, labels = make_case(options, DTYPES[dtype], vocab_size=5000)
    options = {key: value for key, value in options.items() if key != "vocab_size"}
    with testing.poisoned_memory():
        testing.check_kd_loss(student, teacher, labels, divergence="jeffreys", backend=backend, **options)


@pytest.mark.parametrize("kind", ["huge", "late", "peaked", "both-inf"])
@pytest.mark.parametrize("name", ["ce-T1", "ce-T2", "ce-T3", "ce-T4", "ce-T1.7", "z-T2", "row-temperatures-ce"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hard_terms_on_hard_inputs(kind, name, dtype, backend):
    student, teacher, labels = make_case(OPTIONS[name], DTYPES[dtype], vocab_size=1000, kind=kind)
    testing.check_kd_loss(student, teacher, labels, divergence="reverse_kl", backend=backend, **OPTIONS[name])


PARAMETRISED = {
    "jsd": kd.JSD,
    "skew_kl": kd.SkewKL,
    "skew_reverse_kl": kd.SkewReverseKL,
    "mixed_kl": kd.MixedKL,
}


@pytest.mark.parametrize("divergence", PARAMETRISED)
@dtypes
def test_a_parameter_of_its_own_for_every_row(divergence, dtype, backend):
    student, teacher = testing.make_inputs("normal", NUM_ROWS, VOCAB, DTYPES[dtype])
    param = per_row(0.05, 0.95, 7)
    options = {"temperature": 2.0, "row_param": param}
    outcome = testing.check_kd_loss(student, teacher, divergence=divergence, backend=backend, **options)
    row = PARAMETRISED[divergence](param[3].item())
    alone = losses(None, backend, divergence=row, temperature=2.0)(student[3:4], teacher[3:4])
    torch.testing.assert_close(outcome.loss[3:4], alone, rtol=2e-6, atol=1e-6)


def test_row_param_is_for_divergences_that_have_one():
    assert {name for name, cls in divergences.table().items() if cls.row_param} == set(PARAMETRISED)


# Statistics.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_statistics_are_their_formulas(options, dtype, backend):
    student, teacher, labels = make_case(options, DTYPES[dtype])
    exact = [testing.to_dtype(x, torch.float64) for x in (student, teacher)]
    expected = testing.textbook_stats(*exact, labels, divergence="jsd", **options)
    function = losses(labels, backend, divergence="jsd", return_stats=True, **options)
    with testing.poisoned_memory():
        loss, stats = function(student.requires_grad_(), teacher)
        without = losses(labels, backend, divergence="jsd", **options)(student, teacher)
    # Statistics ask for more sums: the loss may differ in rounding.
    torch.testing.assert_close(loss, without, rtol=1e-6, atol=1e-6)
    tolerance = 1e-9 if dtype == "fp64" else 3e-5
    for name, got, truth in zip(kd.KDStats._fields, stats, expected, strict=True):
        assert got.dtype == loss.dtype and got.shape == (NUM_ROWS,) and not got.requires_grad
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance, msg=message)
    assert all(not column[labels == IGNORE].any() for column in stats)


@pytest.mark.parametrize("divergence", divergences.table())
def test_statistics_of_every_divergence(divergence, backend):
    student, teacher = testing.make_inputs("normal", NUM_ROWS, 3000, torch.float32)
    loss, stats = losses(None, backend, divergence=divergence, return_stats=True)(student, teacher)
    expected = testing.textbook_stats(student.double(), teacher.double(), divergence=divergence)
    for name, got, truth in zip(kd.KDStats._fields, stats, expected, strict=True):
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5, msg=message)
    torch.testing.assert_close(loss, stats.divergence, rtol=1e-6, atol=1e-6)


def test_agreement_is_of_the_most_likely_tokens(backend):
    student = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 5.0]])
    teacher = torch.tensor([[0.0, 9.0, 1.0], [0.0, 2.0, 1.0], [-torch.inf, 0.0, 5.0]])
    _, stats = losses(None, backend, return_stats=True)(student, teacher)
    assert stats.agreement.tolist() == [1.0, 0.0, 1.0]


@dtypes
@pytest.mark.parametrize("shift", [0.0, -40.0, 40.0])
def test_statistics_where_all_logits_have_one_sign(dtype, shift, backend):
    """bf16 logits are compared as integers, whose order is that of positive numbers only; rows of several tiles."""
    student, teacher = testing.make_inputs("normal", NUM_ROWS, 5001, torch.float64)
    # The likely tokens of half of the rows agree; none are equally likely after rounding.
    rows, top = torch.arange(NUM_ROWS), (torch.arange(NUM_ROWS) * 389) % 5001
    student[rows, top] = student.amax(-1) + 1
    teacher[rows, (top + rows % 2) % 5001] = teacher.amax(-1) + 1
    student, teacher = (x.add(shift).to(DTYPES[dtype]) for x in (student, teacher))
    expected = testing.textbook_stats(student.double(), teacher.double())
    function = losses(None, backend, return_stats=True)
    with_gradient = function(student.clone().requires_grad_(), teacher)[1]
    for stats in (function(student, teacher)[1], with_gradient):
        assert torch.equal(stats.agreement, (rows % 2 == 0).to(stats.agreement.dtype))
        for name, got, truth in zip(kd.KDStats._fields, stats, expected, strict=True):
            message = functools.partial("{}: {}".format, name)
            # Entropies are sums of logits: those of 40 have an error of 40 * 2^-24 each.
            torch.testing.assert_close(got.detach().double(), truth, rtol=1e-4, atol=1e-4, msg=message)


def test_equal_models_accept_everything(backend):
    student, _ = testing.make_inputs("normal", NUM_ROWS, VOCAB, torch.float32)
    _, stats = losses(None, backend, return_stats=True)(student, student.clone())
    torch.testing.assert_close(stats.acceptance, torch.ones(NUM_ROWS), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.teacher_entropy, stats.student_entropy, rtol=1e-6, atol=0)


# Labels.


def test_ignored_rows_are_not_read(backend):
    student, teacher, labels = make_case(OPTIONS["ce-T2"], torch.float32)
    ignored = labels == IGNORE
    student[ignored], teacher[ignored] = torch.nan, -torch.inf
    for divergence in divergences.table():
        function = losses(labels, backend, divergence=divergence, ce_weight=0.5, z_loss_weight=0.1, return_stats=True)
        with testing.poisoned_memory():
            s = student.clone().requires_grad_()
            loss, stats = function(s, teacher)
            (loss * torch.arange(1.0, NUM_ROWS + 1)).sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(s.grad).all() and torch.isfinite(torch.stack(stats)).all()
        assert not loss[ignored].any() and not s.grad[ignored].any() and (s.grad[~ignored] != 0).any(-1).all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32])
def test_ignore_index_and_label_dtype(ignore_index, label_dtype, backend):
    student, teacher = testing.make_inputs("normal", NUM_ROWS, VOCAB, torch.float32)
    labels = torch.full((NUM_ROWS, 2), 99, dtype=label_dtype)
    labels[:, 0] = torch.arange(NUM_ROWS)
    labels[1::3, 0] = ignore_index
    options = {"ce_weight": 0.5, "ignore_index": ignore_index, "backend": backend}
    # A column of a matrix: labels need not be contiguous.
    outcome = testing.check_kd_loss(student, teacher, labels[:, 0], **options)
    assert torch.equal(outcome.loss == 0, labels[:, 0] == ignore_index)


@pytest.mark.parametrize("label", [0, 1, VOCAB // 2, VOCAB - 2, VOCAB - 1])
@dtypes
def test_the_label_may_stand_anywhere(label, dtype, backend):
    student, teacher = testing.make_inputs("normal", 3, VOCAB, DTYPES[dtype])
    for temperature in (1.0, 2.0, 3.0, 4.0, 1.7):
        options = {"divergence": "reverse_kl", "temperature": temperature, "ce_weight": 0.5, "label_smoothing": 0.1}
        testing.check_kd_loss(student, teacher, torch.full((3,), label), backend=backend, **options)


def test_cross_entropy_of_a_token_that_cannot_be(backend):
    student, teacher = testing.make_inputs("both-inf", 3, VOCAB, torch.float32)
    options = {"ce_weight": 1.0, "backend": backend}
    outcome = testing.check_kd_loss(student, teacher, torch.tensor([0, 1, 3]), **options)
    assert torch.isposinf(outcome.loss).tolist() == [True, False, True]


# Shapes and strides.

SHAPES = {"1d": (), "2d": (6,), "3d": (2, 3), "4d": (2, 3, 2), "5d": (1, 2, 1, 3), "no-rows": (0,), "none-of-3": (3, 0)}


@pytest.mark.parametrize("leading", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_any_leading_shape(leading, reduction, backend):
    rows = torch.Size(leading).numel()
    flat = testing.make_inputs("normal", rows, 50, torch.float32)
    student, teacher = (x.reshape(*leading, 50) for x in flat)
    labels = torch.arange(rows) % 50
    row_weight = torch.linspace(0.5, 2.0, rows)
    temperature = torch.linspace(1.0, 3.0, rows)
    options = {"ce_weight": 0.5, "reduction": reduction, "backend": backend, "return_stats": True}

    def run(s, t, shape):
        s = s.clone().requires_grad_()
        per_row = {"row_weight": row_weight.reshape(shape), "temperature": temperature.reshape(shape)}
        loss, stats = kd.kd_loss(s, t, labels.reshape(shape), **options, **per_row)
        loss.backward(torch.linspace(1, 2, loss.numel()).reshape(loss.shape))
        return loss, stats, s.grad

    expected, got = run(*flat, (rows,)), run(student, teacher, leading)
    assert got[0].shape == (leading if reduction == "none" else ())
    assert all(column.shape == leading for column in got[1])
    torch.testing.assert_close(got[0].reshape(expected[0].shape), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2].reshape(rows, 50), expected[2], rtol=1e-6, atol=1e-7)


class Allocations(TorchDispatchMode):
    """The sizes in bytes of all tensors that ops return and that are no views of what they got."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(tree):
            leaves = torch.utils._pytree.tree_leaves(tree)
            return {x.untyped_storage().data_ptr(): x for x in leaves if isinstance(x, torch.Tensor) and x.numel()}

        result = function(*args, **(kwargs or {}))
        known = storages((args, kwargs))
        self.sizes += [x.untyped_storage().nbytes() for key, x in storages(result).items() if key not in known]
        return result


STRIDED = {
    "contiguous": lambda x: x[:, 1:, :40].contiguous(),
    "shifted": lambda x: x[:, :-1, :40].contiguous()[:, :-1],
    "wide-rows": lambda x: x[:, 1:, :40],
    "odd-start": lambda x: x[:, 1:, 3:43],
    "every-second": lambda x: x[:, ::2, :40],
    "first-of-batch": lambda x: x[1, :, :40],
    "transposed-rows": lambda x: x.transpose(0, 1)[:, :, :40],
    "expanded": lambda x: x[:1, :, :40].expand(4, -1, -1),
    "reversed-merge": lambda x: x.reshape(4, 2, 4, 64)[:, :, 1:, :40],
}


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@dtypes
def test_strided_logits_are_not_copied(layout, inplace, dtype):
    """Nothing of the size of the logits is allocated but the gradient, and in place not even that."""
    reason = backends.BACKENDS["cpu"].why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    base = [x.reshape(4, 8, 64) for x in testing.make_inputs("normal", 32, 64, DTYPES[dtype])]
    student, teacher = (layout(x.clone()) for x in base)
    expanded = 0 in student.stride()
    if inplace and (expanded or student.dim() > 3):
        student = student.clone(memory_format=torch.contiguous_format)
    options = {"divergence": "jsd", "temperature": 2.0, "reduction": "none", "backend": "cpu"}
    expected = testing.evaluate(
        lambda s, t: kd.kd_loss(s, t, **options).sum(), student.contiguous(), teacher.contiguous()
    )
    size = student.numel() * student.element_size()
    leaf = student.requires_grad_()
    with Allocations() as allocations:
        loss = kd.kd_loss(leaf, teacher, inplace=inplace, **options)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
    large = [n for n in allocations.sizes if n >= size]
    assert large == ([] if inplace else [size])
    assert not inplace or grad.data_ptr() == student.data_ptr()
    torch.testing.assert_close(loss.detach().sum(), expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected.dstudent, rtol=0, atol=1e-6 if dtype == "fp32" else 1e-3)


def test_leading_dimensions_that_do_not_collapse_are_still_right(backend):
    student, teacher = (x.reshape(2, 3, 2, 5, 40) for x in testing.make_inputs("normal", 60, 40, torch.float64))
    cut = (slice(None), slice(1, None), slice(None), slice(None, -1))
    outcome = testing.check_kd_loss(student[cut], teacher[cut], backend=backend)
    assert outcome.loss.shape == (2, 2, 2, 4)


# Padding.


@pytest.mark.parametrize("widths", [(300, 300), (320, 300), (300, 311), (333, 304)], ids=str)
@dtypes
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_padding_is_not_read_and_gets_no_gradient(widths, dtype, divergence, backend):
    real = testing.make_inputs("normal", NUM_ROWS, 293, DTYPES[dtype])
    padded = [torch.full((NUM_ROWS, width), torch.nan, dtype=DTYPES[dtype]) for width in widths]
    for x, y in zip(padded, real, strict=True):
        x[:, :293] = y
    options = {"divergence": divergence, "ce_weight": 0.5, "label_smoothing": 0.1, "standardize": True}
    labels = torch.arange(NUM_ROWS)
    with testing.poisoned_memory():
        outcome = testing.check_kd_loss(*padded, labels, vocab_size=293, backend=backend, **options)
        alone = testing.check_kd_loss(*real, labels, backend=backend, **options)
    assert outcome.dstudent.shape == (NUM_ROWS, widths[0]) and not outcome.dstudent[:, 293:].any()
    torch.testing.assert_close(outcome.loss, alone.loss, rtol=1e-6, atol=1e-6)


# In place.


@dtypes
@pytest.mark.parametrize("divergence", divergences.table())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_the_gradient_lies_where_the_logits_lay(divergence, dtype, reduction, backend):
    hidden = torch.randn(4, 5, 16, dtype=torch.float64).to(DTYPES[dtype])
    weight = torch.randn(70, 16, dtype=torch.float64).to(DTYPES[dtype])
    teacher = torch.randn(4, 5, 70, dtype=torch.float64).to(DTYPES[dtype])
    labels = torch.arange(20).reshape(4, 5)
    labels[0] = IGNORE

    def run(inplace):
        w = weight.clone().requires_grad_()
        logits = F.linear(hidden, w)
        arrived = []
        logits.register_hook(arrived.append)
        options = {"divergence": divergence, "ce_weight": 0.5, "temperature": 3.0, "vocab_size": 67}
        loss = kd.kd_loss(logits, teacher, labels, reduction=reduction, inplace=inplace, backend=backend, **options)
        loss.backward(torch.linspace(-1, 2, loss.numel()).reshape(loss.shape))
        return loss.detach(), logits, w.grad, arrived[0]

    fresh, there = run(False), run(True)
    assert torch.equal(there[0], fresh[0]) and torch.equal(there[2], fresh[2])
    if backend == "cpu":
        assert there[3].data_ptr() == there[1].data_ptr() and fresh[3].data_ptr() != fresh[1].data_ptr()
        assert torch.equal(there[1].detach(), fresh[3])


def test_in_place_is_noticed_by_whoever_kept_the_logits():
    reason = backends.BACKENDS["cpu"].why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(3, 9, requires_grad=True)
    logits = x.exp()  # its derivative is its result
    kd_loss = kd.kd_loss(logits, torch.randn(3, 9), inplace=True, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kd_loss.backward()


def test_in_place_without_a_gradient_leaves_the_logits(backend):
    student, teacher = testing.make_inputs("normal", 3, 9, torch.float32)
    before = student.clone()
    with torch.no_grad():
        kd.kd_loss(student.requires_grad_(), teacher, inplace=True, backend=backend)
    assert torch.equal(student, before)


# The module.


def test_the_module_is_the_function(backend):
    student, teacher, labels = make_case(OPTIONS["ce-T2"], torch.float32)
    options = {"divergence": kd.JSD(0.3), "temperature": 2.0, "ce_weight": 0.1, "reduction": "none", "backend": backend}
    module = kd.KDLoss(**options)
    assert torch.equal(module(student, teacher, labels), kd.kd_loss(student, teacher, labels, **options))
    assert repr(module).startswith("KDLoss(divergence=JSD(beta=0.3), temperature=2.0, ")
    assert not list(module.parameters()) and not module.state_dict()


def test_auto_is_the_fastest_that_runs_here():
    student, teacher, labels = make_case(OPTIONS["ce-T2"], torch.float32)
    best = next(answer.name for answer in backends.available("cpu") if answer.ok)
    assert torch.equal(losses(labels, "auto")(student, teacher), losses(labels, best)(student, teacher))


def test_mixtures_of_probabilities_are_what_they_say(backend):
    student, _ = testing.make_inputs("normal", NUM_ROWS, VOCAB, torch.float64)
    teachers = [testing.make_inputs("normal", NUM_ROWS, VOCAB, torch.float64, seed)[1] for seed in (1, 2)]
    p = 0.25 * torch.softmax(teachers[0] / 2, -1) + 0.75 * torch.softmax(teachers[1] / 2, -1)
    expected = 4 * F.kl_div(F.log_softmax(student / 2, -1), p, reduction="none").sum(-1)
    options = {"temperature": 2.0, "reduction": "none", "backend": backend}
    got = kd.kd_loss(student, teachers, teacher_weights=[0.25, 0.75], **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    # Any multiple of the weights is the same mixture, for all rows alike or row by row.
    rows = torch.tensor([0.25, 0.75]) * (1 + torch.arange(NUM_ROWS))[:, None]
    for weights in ([1, 3], [1e-3, 3e-3], rows):
        got = kd.kd_loss(student, teachers, teacher_weights=weights, **options)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    # Of logits they say how strong each is.
    doubled = kd.kd_loss(student, teachers, teacher_weights=[0.5, 1.5], mixture="logits", **options)
    strong = kd.kd_loss(student, 0.5 * teachers[0] + 1.5 * teachers[1], **options)
    torch.testing.assert_close(doubled, strong, rtol=1e-10, atol=1e-12)
    mixed = 0.25 * teachers[0] + 0.75 * teachers[1]
    got = kd.kd_loss(student, teachers, teacher_weights=[0.25, 0.75], mixture="logits", **options)
    torch.testing.assert_close(got, kd.kd_loss(student, mixed, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("label_smoothing", [1.0, 0.5])
def test_a_label_without_mass_that_smoothing_spreads_is_infinite_and_no_nan(backend, label_smoothing):
    """Of a smoothing of 1 the label has no part, so that 0 * inf must not arise; the other columns give infinity."""
    student = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]] * 2, requires_grad=True)
    labels = torch.tensor([1, 2])
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": label_smoothing, "reduction": "none"}
    loss = kd.kd_loss(student, torch.zeros(2, 4), labels, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.equal(loss.detach(), torch.full((2,), torch.inf))
    target = F.one_hot(labels, 4) * (1 - label_smoothing) + label_smoothing / 4
    torch.testing.assert_close(gradient, student.detach().softmax(-1) - target)
