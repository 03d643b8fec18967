"""On the CPU a gradient is written while the next row is read: what comes after a row, and how it ends, is none of its
business."""

import pytest
import torch
from grid import pairwise

import kdkernels as kd
from kdkernels import testing

pytestmark = pytest.mark.usefixtures("compiled_cpu")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IGNORE = -100
LARGE = 8 << 20  # bytes of a gradient beyond which it is written around the caches
# With each of them something else is pending between two rows, or nothing is.
OBJECTIVES = {
    "forward KL": {},
    "no T^2, row weights": {"scale_by_t_squared": False, "temperature": 2.0, "row_weight": "ramp"},
    "a temperature for every row": {"temperature": "ramp"},
    "CE at T=1": {"ce_weight": 0.5},
    "CE at T=2": {"ce_weight": 0.5, "temperature": 2.0},
    "CE at T=3": {"ce_weight": 0.5, "temperature": 3.0},
    "CE at T=4": {"ce_weight": 0.5, "temperature": 4.0},
    "CE at T=5": {"ce_weight": 0.5, "temperature": 5.0},
    "label smoothing": {"ce_weight": 0.5, "temperature": 2.0, "label_smoothing": 0.1},
    "z-loss": {"z_loss_weight": 0.1, "temperature": 3.0},
    "CE alone": {"kd_weight": 0.0, "ce_weight": 1.0},
    "soft CE": {"divergence": "soft_ce"},
    "soft CE, CE at T=2": {"divergence": "soft_ce", "ce_weight": 0.5, "temperature": 2.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "reverse KL, two temperatures": {"divergence": "reverse_kl", "temperature": 2.0, "teacher_temperature": 1.5},
    "reverse KL, CE at T=2": {"divergence": "reverse_kl", "ce_weight": 0.5, "temperature": 2.0},
    "Jeffreys": {"divergence": "jeffreys", "temperature": 2.0},
    "JSD": {"divergence": "jsd"},
    "JSD, CE at T=1": {"divergence": "jsd", "ce_weight": 0.5},
    "JSD, CE at T=2": {"divergence": "jsd", "ce_weight": 0.5, "temperature": 2.0},
    "TVD": {"divergence": "tvd"},
    "Jeffreys, CE at T=1": {"divergence": "jeffreys", "ce_weight": 0.5},
    "Jeffreys, CE at T=2": {"divergence": "jeffreys", "temperature": 2.0, "ce_weight": 0.5},
    "Jeffreys, statistics": {"divergence": "jeffreys", "temperature": 2.0, "return_stats": True},
    "reverse KL, statistics": {"divergence": "reverse_kl", "return_stats": True},
    "reverse KL, statistics, CE at T=5": {
        "divergence": "reverse_kl",
        "return_stats": True,
        "temperature": 5.0,
        "ce_weight": 0.5,
    },
    "statistics": {"return_stats": True},
    "statistics, CE at T=2": {"return_stats": True, "ce_weight": 0.5, "temperature": 2.0},
}
# One element of a row, the label's, is left out of its sums.
DECOUPLED = {
    "DKD": {"loss_of": kd.dkd_loss},
    "DKD at T=2, row weights": {"loss_of": kd.dkd_loss, "temperature": 2.0, "row_weight": "ramp"},
    "DKD, target class alone": {"loss_of": kd.dkd_loss, "beta": 0.0},
    "DKD, other classes alone": {"loss_of": kd.dkd_loss, "alpha": 0.0},
}
ROWS = {**OBJECTIVES, **DECOUPLED}
SPARSE = {
    "bucket": {},
    "forward KL, row weights": {"divergence": "forward_kl", "scale_by_t_squared": False, "row_weight": "ramp"},
    "a temperature for every row": {"temperature": "ramp", "teacher_temperature": 1.0},
    "CE at T=1": {"ce_weight": 0.5},
    "CE at T=2": {"ce_weight": 0.5, "temperature": 2.0, "teacher_temperature": 1.0},
    "label smoothing": {"ce_weight": 0.5, "label_smoothing": 0.1},
    "z-loss": {"z_loss_weight": 0.1, "temperature": 3.0, "teacher_temperature": 1.0},
    "CE alone": {"kd_weight": 0.0, "ce_weight": 1.0},
    "JSD": {"divergence": "jsd"},
    "uniform": {"tail": "uniform"},
    "uniform, CE at T=2": {"tail": "uniform", "ce_weight": 0.5, "temperature": 2.0},
    "renormalize": {"tail": "renormalize"},
    "renormalize both": {"tail": "renormalize_both"},
    "renormalize both, CE": {"tail": "renormalize_both", "ce_weight": 0.5},
    "drop": {"tail": "drop"},
    "statistics": {"return_stats": True},
}
# Teachers that are not logits of the student's dtype.
TEACHERS = {
    "fp32": lambda t: (t.float(), {}),
    "bf16": lambda t: (t.bfloat16(), {}),
    "fp16": lambda t: (t.half(), {}),
    "probabilities": lambda t: (
        torch.softmax(t.float(), -1).clamp(min=1e-5).to(t.dtype),
        {"teacher_form": "unnormalized_probs"},
    ),
    "capped": lambda t: (t, {"teacher_softcap": 30.0}),
    "two": lambda t: ([t, t.roll(1, -1)], {}),
    "two, logits mixed": lambda t: ([t, t.roll(1, -1)], {"mixture": "logits"}),
}
BESIDE_TEACHERS = ("reverse KL, statistics", "forward KL", "reverse KL", "Jeffreys", "JSD", "CE at T=5", "statistics")
# Bodies of rows differ by a block from one to the next, by how far they begin from a cache line; 2,081 elements are one
# tile or two.
VOCABULARIES = [7, 130, 1001, 1029, 2081]
WIDE = [300, 1001, 4101]
# Kernels are compiled for each dtype and way to write; the width turns with them.
WRITTEN = ([(dtype, memory) for dtype in DTYPES for memory in ("stored", "streamed", "in place")], WIDE)
KINDS = ["normal", "late", "near", "huge", "peaked", "equal", "spread"]


def options_of(objective, rows):
    ramp = torch.linspace(0.5, 3.0, rows)
    return {name: ramp if value == "ramp" else value for name, value in objective.items()}


def rows_of_all_kinds(rows, vocab_size, dtype):
    """Rows that are swept without clamps, and such as are not, or twice; labels of which some are ignored."""
    pairs = [testing.make_inputs(kind, -(-rows // len(KINDS)), vocab_size, dtype) for kind in KINDS]
    student, teacher = (torch.stack(side, 1).flatten(0, 1)[:rows].contiguous() for side in zip(*pairs, strict=True))
    labels = (torch.arange(rows) * 5 - 1) % vocab_size
    labels[4::9] = IGNORE
    return student, teacher, labels


def many_rows(rows, vocab_size, dtype):
    """Ordinary rows, of which the first come again and again."""
    sides = testing.make_inputs("normal", min(rows, 67), vocab_size, torch.float32)
    return tuple(side.to(dtype).repeat(-(-rows // len(side)), 1)[:rows] for side in sides)


def sparse_teacher(rows, vocab_size, entries=5):
    """Ids of which one may come twice and one may be none, on both sides of a row's middle."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (rows, entries), generator=generator)
    ids[::3, -1] = -1
    logprobs = torch.log_softmax(torch.randn(rows, entries + 1, generator=generator), -1)[:, :entries]
    return ids, logprobs


def run(student, teacher, labels, *, inplace=False, loss_of=kd.kd_loss, **options):
    """Loss, gradient and statistics of every row."""
    student = student.detach().clone().requires_grad_()
    with testing.poisoned_memory():
        result = loss_of(
            student * 1 if inplace else student,
            *(teacher if isinstance(teacher, tuple) else (teacher,)),
            labels,
            reduction="none",
            backend="cpu",
            inplace=inplace,
            **options,
        )
        loss, stats = result if options.get("return_stats") else (result, ())
        loss.sum().backward()
    return [loss.detach(), student.grad, *stats]


@pairwise("objective,vocab_size,dtype", OBJECTIVES, VOCABULARIES, DTYPES)
def test_rows_of_all_kinds(objective, vocab_size, dtype):
    rows = 3 * len(KINDS) + 2
    student, teacher, labels = rows_of_all_kinds(rows, vocab_size, DTYPES[dtype])
    options = options_of(ROWS[objective], rows)
    if options.pop("return_stats", False):
        expected = testing.textbook_stats(student.double(), teacher.double(), labels, **options)
        _, _, *stats = run(student, teacher, labels, return_stats=True, **options)
        # Not of rows of logits up to 1e4, whose logarithms are large.
        ordinary = torch.arange(rows) % len(KINDS) != KINDS.index("huge")
        for name, got, truth in zip(kd.KDStats._fields, stats, expected, strict=True):
            message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(got.double()[ordinary], truth[ordinary], rtol=1e-4, atol=2e-4, msg=message)
    with testing.poisoned_memory():
        testing.check_kd_loss(student, teacher, labels, backend="cpu", **options)


@pairwise("objective,dtype,memory,vocab_size", ROWS, *WRITTEN)
def test_a_row_does_not_depend_on_what_is_around_it(objective, vocab_size, memory, dtype):
    row_bytes = vocab_size * DTYPES[dtype].itemsize
    rows = 1 + LARGE // row_bytes if memory == "streamed" else 67
    student, teacher = many_rows(rows, vocab_size, DTYPES[dtype])
    labels = (torch.arange(rows) * 5 - 1) % vocab_size
    options = {**options_of(ROWS[objective], rows), "inplace": memory == "in place"}
    plain = run(student, teacher, labels, **options)
    assert (plain[1].nbytes > LARGE) == (memory == "streamed")

    others = torch.arange(rows) % 3 == 1
    strange_student, strange_teacher, strange_labels = student.clone(), teacher.clone(), labels.clone()
    for k, number in enumerate(others.nonzero().flatten()):
        if k % 5 == 3:
            strange_teacher[number, k % vocab_size :] = -torch.inf
        elif k % 5 == 4:
            strange_student[number], strange_teacher[number] = -300.0, 40.0
        else:
            make_strange(k, strange_student[number], strange_labels[number : number + 1])
    strange = run(strange_student, strange_teacher, strange_labels, **options)
    assert_same_but(others, plain, strange)


def make_strange(kind, student, label):
    """One row that is ignored, or holds a NaN, or logits that a sweep without clamps does not take."""
    if kind % 5 == 0:
        label[0] = IGNORE
    elif kind % 5 == 1:
        student[kind % len(student)] = torch.nan
    elif kind % 5 == 2:
        student[::2] = 3e4


def assert_same_but(others, plain, strange):
    for before, after in zip(plain, strange, strict=True):
        assert torch.equal(before[~others], after[~others])
    assert torch.equal(strange[1][others][::5], torch.zeros_like(strange[1][others][::5]))


@pairwise("objective,kind,dtype,memory", BESIDE_TEACHERS, TEACHERS, [x for x in WRITTEN[0] if x[1] != "in place"])
def test_rows_beside_a_teacher_of_another_kind(kind, objective, memory, dtype):
    vocab_size = 1001
    rows = 1 + LARGE // (vocab_size * DTYPES[dtype].itemsize) if memory == "streamed" else 67
    student, logits = many_rows(rows, vocab_size, DTYPES[dtype])
    labels = (torch.arange(rows) * 5 - 1) % vocab_size
    teacher, how = TEACHERS[kind](logits)
    options = {**options_of(ROWS[objective], rows), **how}
    plain = run(student, teacher, labels, **options)

    others = torch.arange(rows) % 3 == 1
    strange_student, strange_logits, strange_labels = student.clone(), logits.clone(), labels.clone()
    for k, number in enumerate(others.nonzero().flatten()):
        if k % 5 == 3:
            strange_logits[number] = strange_logits[number].flip(0) - 30
        make_strange(k, strange_student[number], strange_labels[number : number + 1])
    strange = run(strange_student, TEACHERS[kind](strange_logits)[0], strange_labels, **options)
    assert_same_but(others, plain, strange)

    options.pop("return_stats", None)
    part = slice(rows - 25, rows)
    teachers = [x[part] for x in teacher] if isinstance(teacher, list) else teacher[part]
    outcome = testing.check_kd_loss(student[part], teachers, labels[part], backend="cpu", **options)
    torch.testing.assert_close(plain[0][part], outcome.loss, rtol=1e-4, atol=1e-4)


@pairwise("objective,dtype,memory,vocab_size", SPARSE, *WRITTEN)
def test_a_row_with_a_sparse_teacher_does_not_depend_on_what_is_around_it(objective, vocab_size, memory, dtype):
    rows = 1 + LARGE // (vocab_size * DTYPES[dtype].itemsize) if memory == "streamed" else 67
    student, _ = many_rows(rows, vocab_size, DTYPES[dtype])
    ids, logprobs = sparse_teacher(rows, vocab_size)
    labels = (torch.arange(rows) * 5 - 1) % vocab_size
    labels[::4] = ids[::4, 0]
    options = {**options_of(SPARSE[objective], rows), "inplace": memory == "in place", "loss_of": kd.topk_kd_loss}
    plain = run(student, (ids, logprobs), labels, **options)

    others = torch.arange(rows) % 3 == 1
    strange_student, strange_ids, strange_logprobs, strange_labels = (
        x.clone() for x in (student, ids, logprobs, labels)
    )
    for k, number in enumerate(others.nonzero().flatten()):
        if k % 5 == 3:
            strange_ids[number] = -1
        elif k % 5 == 4:
            strange_logprobs[number, 1:] = -torch.inf
            strange_student[number] = -300.0
        else:
            make_strange(k, strange_student[number], strange_labels[number : number + 1])
    strange = run(strange_student, (strange_ids, strange_logprobs), strange_labels, **options)
    assert_same_but(others, plain, strange)


@pairwise("objective,vocab_size,dtype", SPARSE, WIDE, DTYPES)
def test_a_large_gradient_of_a_sparse_teacher_is_that_of_its_parts(objective, vocab_size, dtype):
    rows = 1 + LARGE // (vocab_size * DTYPES[dtype].itemsize)
    student, _ = many_rows(rows, vocab_size, DTYPES[dtype])
    ids, logprobs = sparse_teacher(rows, vocab_size)
    labels = (torch.arange(rows) * 5 - 1) % vocab_size
    labels[::4] = ids[::4, 0]
    labels[4::9] = IGNORE
    options = options_of(SPARSE[objective], rows)
    loss, gradient, *_ = run(student, (ids, logprobs), labels, loss_of=kd.topk_kd_loss, **options)
    for start in (0, rows // 2 - 7, rows - 25):
        part = slice(start, start + 25)
        some = {name: value[part] if torch.is_tensor(value) else value for name, value in options.items()}
        some.pop("return_stats", None)
        exact = student[part].double().requires_grad_()
        expected = kd.topk_kd_loss(
            exact, ids[part], logprobs[part].double(), labels[part], reduction="none", backend="torch", **some
        )
        expected.sum().backward()
        epsilon = testing.allowed_epsilon(DTYPES[dtype])
        torch.testing.assert_close(loss[part].double(), expected.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            gradient[part].double(), exact.grad, rtol=2 * torch.finfo(DTYPES[dtype]).eps, atol=30 * epsilon
        )


@pairwise("objective,vocab_size,dtype", ROWS, WIDE, DTYPES)
def test_a_large_gradient_is_that_of_its_parts(objective, vocab_size, dtype):
    rows = 1 + LARGE // (vocab_size * DTYPES[dtype].itemsize)
    student, teacher = many_rows(rows, vocab_size, DTYPES[dtype])
    labels = (torch.arange(rows) * 5 - 1) % vocab_size
    labels[4::9] = IGNORE
    options = options_of(ROWS[objective], rows)
    whole = run(student, teacher, labels, **options)
    for start in (0, rows // 2 - 7, rows - 25):
        part = slice(start, start + 25)
        some = {name: value[part] if torch.is_tensor(value) else value for name, value in options.items()}
        if some.pop("return_stats", False):
            for got, expected in zip(
                whole[2:], run(student[part], teacher[part], labels[part], return_stats=True, **some)[2:], strict=True
            ):
                torch.testing.assert_close(got[part], expected, rtol=1e-4, atol=1e-5)
        exact = student[part].double().requires_grad_()
        loss_of = some.pop("loss_of", kd.kd_loss)
        loss = loss_of(exact, teacher[part].double(), labels[part], reduction="none", backend="torch", **some)
        loss.sum().backward()
        epsilon = testing.allowed_epsilon(DTYPES[dtype])
        rounding = torch.finfo(DTYPES[dtype]).eps
        torch.testing.assert_close(whole[0][part].double(), loss.detach(), rtol=1e-4, atol=1e-4)
        # TVD's gradient jumps where p and q are equal to rounding.
        jump = 1e-4 if some.get("divergence") == "tvd" else 0.0
        torch.testing.assert_close(whole[1][part].double(), exact.grad, rtol=2 * rounding, atol=max(jump, 30 * epsilon))
