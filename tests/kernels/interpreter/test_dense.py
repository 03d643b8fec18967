"""The dense pattern against fp64 truth, over the table of divergences."""

import mmap

import pytest
import torch
from launches import dense
from oracle import check, dense_rows

from kdkernels.kernels import divergences

PARAMS = {"jsd": (0.3, 0.0), "skew_kl": (0.1, 0.0), "skew_reverse_kl": (0.1, 0.0), "alpha_beta": (0.2, 0.7)}
PARAMS |= {"mixed_kl": (0.3, 0.0), "lk_nla": (1e-5, 0.0), "lk_hybrid": (3.0, 0.0)}
NAMES = divergences.names()
# One linear divergence with every coefficient, and one pair of functions: all code that is not a divergence's own.
TWO = ("jeffreys", "jsd")
CASES = [*((name, *PARAMS.get(name, (0.0, 0.0))) for name in NAMES)]
LIMITS = [("alpha_beta", a, b) for a, b in ((0.0, 0.5), (0.5, 0.0), (0.5, -0.5), (0.0, 0.0), (1.0, 0.0), (-0.5, 1.0))]


def ids(case):
    return "-".join(str(part) for part in case if part != 0.0) if isinstance(case, tuple) else str(case)


def options_of(case):
    return {"divergence": case[0], "param0": case[1], "param1": case[2]}


def make(N, V, dtype=torch.float32, teacher_dtype=None, scale=3.0):
    student = (torch.randn(N, V) * scale).to(dtype)
    return student, [(torch.randn(N, V) * scale).to(teacher_dtype or dtype)]


@pytest.mark.parametrize("case", CASES + LIMITS, ids=ids)
@pytest.mark.parametrize("V", [1, 2, 3, 7, 1000])
def test_every_divergence(case, V):
    check(dense, dense_rows, *make(2, V), **options_of(case))


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit(case, dtype):
    check(dense, dense_rows, *make(2, 300, dtype), temperature=2.0, teacher_temperature=2.0, **options_of(case))


@pytest.mark.parametrize("case", CASES[:2], ids=ids)
def test_two_dtypes(case):
    check(dense, dense_rows, *make(2, 300, torch.bfloat16, torch.float32), **options_of(case))
    check(dense, dense_rows, *make(2, 300, torch.float32, torch.float16), **options_of(case))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_several_tiles(case):
    student, teachers = make(3, 700)
    # The running maximum rises in every tile of one row, falls in the next, and the student's first tile is all -inf.
    student[0] += torch.arange(700) / 10
    teachers[0][1] -= torch.arange(700) / 10
    student[2, :300] = float("-inf")
    teachers[0][2, :310] = float("-inf")
    check(dense, dense_rows, student, teachers, **options_of(case))


def corner_rows(V):
    """Rows of one kind each: (name, student, teacher, label)."""
    inf = float("inf")
    plain = torch.randn(V) * 3
    some = torch.arange(V) % 3 == 0
    hot = torch.full((V,), -inf)
    hot[V // 2] = 0.0
    lowest = torch.finfo(torch.float32).min
    return {
        "identical": (plain, plain),
        "large": (torch.randn(V) * 1e4, torch.randn(V) * 1e4),
        "student has no mass where the teacher has": (plain.masked_fill(some, -inf), torch.randn(V)),
        "teacher has no mass where the student has": (plain, torch.randn(V).masked_fill(some, -inf)),
        "both masked": (plain.masked_fill(some, -inf), torch.randn(V).masked_fill(some, -inf)),
        "both underflow": (plain.masked_fill(some, -300.0), torch.randn(V).masked_fill(some, -400.0)),
        "one-hot teacher": (plain, hot),
        "masked with the lowest number": (plain.masked_fill(some, lowest), torch.randn(V).masked_fill(some, lowest)),
        "constant": (torch.full((V,), 5.0), torch.full((V,), -7.0)),
        "all -inf student": (torch.full((V,), -inf), plain),
        "all -inf teacher": (plain, torch.full((V,), -inf)),
        "NaN": (plain.masked_fill(some, float("nan")), torch.randn(V)),
    }


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_corners(case):
    rows = corner_rows(300)
    student, teacher = (torch.stack(side) for side in zip(*rows.values(), strict=True))
    known = len(rows) - 3
    (loss, _), grad = check(dense, dense_rows, student[:known], [teacher[:known]], **options_of(case))
    assert not loss.isnan().any()
    row = list(rows).index("identical")
    if "soft_ce" not in case[0]:
        assert abs(loss[row]) < 5e-6
    if case[0] in ("forward_kl", "reverse_kl", "jeffreys", "tvd"):
        assert loss[row] == 0 and not grad[row].any()


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_undefined_rows(case):
    """A row of NaN or of nothing but -inf gives NaN, and leaves its neighbour alone."""
    rows = corner_rows(40)
    chosen = [rows[name] for name in ("all -inf student", "identical", "all -inf teacher", "NaN", "large")]
    student, teacher = (torch.stack(side) for side in zip(*chosen, strict=True))
    grad = torch.empty_like(student)
    loss, _ = dense(student, [teacher], grad, **options_of(case))
    assert loss.isnan().tolist() == [True, False, True, True, False]
    assert grad[0].isnan().all() and grad[3].isnan().all() and grad[1].isfinite().all() and grad[4].isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("temperature", [0.05, 100.0])
def test_temperatures(case, temperature):
    student, teachers = make(2, 200)
    student[1], teachers[0][1] = torch.randn(200) * 1e4, torch.randn(200) * 1e4
    check(
        dense,
        dense_rows,
        student,
        teachers,
        temperature=temperature,
        teacher_temperature=temperature,
        **options_of(case),
    )


OBJECTIVES = {
    "ce": {"ce_weight": 0.5},
    "smoothed": {"ce_weight": 0.5, "label_smoothing": 0.1, "kd_weight": 0.7},
    "z": {"z_loss_weight": 0.1},
    "all": {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 0.1, "scale_by_t_squared": False, "scale": 0.25},
    "no-kd": {"ce_weight": 0.5, "kd_weight": 0.0},
    "softcap": {"student_softcap": 5.0, "teacher_softcap": 3.0, "ce_weight": 0.5, "label_smoothing": 0.1},
    "student-softcap": {"student_softcap": 5.0, "z_loss_weight": 0.1},
    "teacher-softcap": {"teacher_softcap": 3.0},
    "standardize": {"standardize": True, "ce_weight": 0.5},
    "stats": {"stats": True},
    "stats-all": {"stats": True, "ce_weight": 0.5, "z_loss_weight": 0.1, "student_softcap": 5.0, "standardize": True},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective(name, objective):
    student, teachers = make(3, 300)
    labels = torch.tensor([299, -100, 0])
    student[1] = float("nan")
    options = {"temperature": 2.0, "teacher_temperature": 1.5, **options_of((name, 0.3, 0.0)), **OBJECTIVES[objective]}
    (loss, stats), grad = check(dense, dense_rows, student, teachers, labels, **options)
    assert loss[1] == 0 and torch.equal(grad[1], torch.zeros(300)) and not stats[1].any()
    again, again_stats = dense(student, teachers, None, labels, **options)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again_stats, stats, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["probs", "log_probs"])
@pytest.mark.parametrize("name", TWO)
def test_teacher_form(form, name):
    student, teachers = make(2, 300)
    teacher = torch.softmax(teachers[0], -1)
    teacher[0, :100] = 0
    teacher = teacher if form == "probs" else teacher.log()
    options = {"temperature": 2.0, "teacher_temperature": 2.0, "divergence": name, "param0": 0.3, "teacher_form": form}
    check(dense, dense_rows, student, [teacher], **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("M", [2, 3, 4])
@pytest.mark.parametrize("mixture", ["probs", "logits"])
@pytest.mark.parametrize("name", ["forward_kl", *TWO])
def test_mixture(name, mixture, M):
    student, _ = make(2, 300)
    teachers = [make(2, 300)[0] for _ in range(M)]
    weights = torch.rand(2, M)
    weights[1, 1] = 0
    if mixture == "probs":
        weights /= weights.sum(-1, keepdim=True)
    # A teacher of weight 0 must not matter, and a masked column of one teacher only.
    teachers[1][1, :50] = float("-inf")
    teachers[0][0, 200:] -= 400
    options = {"divergence": name, "param0": 0.3, "mixture": mixture, "mixture_weights": weights}
    options |= {"temperature": 2.0, "teacher_temperature": 1.5, "stats": True, "standardize": M == 3}
    if M == 3:
        teachers[1][1, :50] = 0
    check(dense, dense_rows, student, teachers, **options)
    if name == "forward_kl":
        check(dense, dense_rows, student, teachers, **{**options, "stats": False})


def test_constant_row_standardizes_to_zero():
    student, teachers = make(2, 300)
    student[0] = 1e4 / 3
    teachers[0][1] = -0.1
    for name in TWO:
        check(dense, dense_rows, student, teachers, divergence=name, param0=0.3, standardize=True, temperature=2.0)


def test_per_row_values():
    student, teachers = make(3, 300)
    options = {
        "temperature_rows": torch.tensor([0.5, 1.0, 4.0]),
        "teacher_temperature_rows": torch.tensor([1.0, 0.5, 2.0]),
        "param_rows": torch.tensor([0.1, 0.5, 0.9]),
        "row_weight": torch.tensor([0.5, 0.0, 2.0]),
    }
    for name in TWO:
        check(dense, dense_rows, student, teachers, divergence=name, **options)
    options["row_weight"] = torch.tensor(0.3).expand(3)
    check(dense, dense_rows, student, teachers, divergence="jsd", **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TWO)
def test_in_place(name, dtype):
    student, teachers = make(3, 600, dtype)
    labels = torch.tensor([1, -100, 599])
    check(dense, dense_rows, student, teachers, labels, inplace=True, divergence=name, param0=0.3, ce_weight=0.5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("V", [250, 256, 300])
@pytest.mark.parametrize("name", TWO)
def test_padding(name, V):
    """Student and teacher padded to different widths with NaN: none of it enters a sum, and its gradient is 0."""
    student, teacher = torch.full((3, 700), float("nan")), torch.full((3, 304), float("nan"))
    student[:, :V], teacher[:, :V] = torch.randn(3, V), torch.randn(3, V)
    labels = torch.tensor([1, -100, V - 1])
    options = {"divergence": name, "param0": 0.3, "vocab_size": V, "ce_weight": 0.5, "label_smoothing": 0.1}
    for more in ({}, {"standardize": True}, {"student_softcap": 5.0, "teacher_softcap": 5.0}):
        _, grad = check(dense, dense_rows, student, [teacher], labels, **options, **more)
        assert not grad[:, V:].any()


@pytest.mark.parametrize("name", TWO)
def test_strided_rows(name):
    """Views [B, L, V] of larger tensors, as logits[:, :-1] gives them, and rows that start off 16 bytes."""
    student, teacher = torch.randn(2, 4, 310)[:, :-1, 3:303], torch.randn(2, 5, 300)[:, 1:4]
    labels = torch.tensor([1, 2, 3, -100, 4, 5])
    out = torch.full((2, 4, 300), float("nan"))
    loss, _ = dense(student, [teacher], out[:, :-1], labels, divergence=name, param0=0.3, ce_weight=0.5)
    flat = [x.reshape(-1, 300).contiguous() for x in (student, teacher)]
    (expected, _), grad = check(
        dense, dense_rows, flat[0], [flat[1]], labels, divergence=name, param0=0.3, ce_weight=0.5
    )
    # Other places of the rows in memory are other orders of their sums.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[:, :-1].reshape(-1, 300), grad, rtol=1e-5, atol=1e-8)
    assert out[:, -1].isnan().all()


def test_strided_vectors():
    student, teachers = make(3, 40)
    labels = torch.tensor([[1, 7], [-100, 7], [39, 7]])[:, 0]
    options = {
        "temperature_rows": torch.tensor([[0.5, 9.0], [1.0, 9.0], [4.0, 9.0]])[:, 0],
        "teacher_temperature_rows": torch.tensor(2.0).expand(3),
        "param_rows": torch.tensor([0.9, 9.0, 0.5, 9.0, 0.1])[::2],
        "row_weight": torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0])[::2],
    }
    check(dense, dense_rows, student, teachers, labels, divergence="jsd", ce_weight=0.5, **options)


def test_rows_beyond_2_to_the_31():
    stride = 2**31 + 8
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    memory = mmap.mmap(-1, 2 * (stride + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    student = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    student.copy_(torch.randn(2, 40))
    teacher = torch.randn(2, 40, dtype=torch.float32)
    check(dense, dense_rows, student, [teacher.bfloat16()], divergence="jeffreys")
    loss, grad = student.clone(), student.clone()
    expected, _ = dense(loss, [teacher.bfloat16()], grad, divergence="jeffreys")
    actual, _ = dense(student, [teacher.bfloat16()], student, divergence="jeffreys")
    assert torch.equal(actual, expected) and torch.equal(student, grad)


def test_no_rows():
    loss, stats = dense(torch.empty(0, 7), [torch.empty(0, 7)], torch.empty(0, 7), stats=True)
    assert loss.shape == (0,) and stats.shape == (0, 9)


def test_all_rows_ignored():
    student = torch.full((2, 40), float("nan"))
    grad = torch.full_like(student, float("nan"))
    loss, stats = dense(student, [student], grad, torch.tensor([-1, -1]), ignore_index=-1, ce_weight=1.0, stats=True)
    assert not loss.any() and not grad.any() and not stats.any()


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_label_out_of_range(label):
    student, teachers = make(2, 40)
    labels = torch.tensor([label, 3])
    loss, _ = dense(student, teachers, torch.empty_like(student), labels, ce_weight=1.0)
    assert loss[0].isnan() and loss[1].isfinite()
    assert dense(student, teachers, None, labels)[0].isfinite().all()


def test_padded_vocabularies_of_identical_models():
    """151936 and 152064 columns of the same model, in small: loss 0 and gradient 0."""
    student = torch.randn(2, 520)
    teacher = torch.nn.functional.pad(student[:, :512], (0, 64), value=3.0)
    for name in NAMES:
        if "soft_ce" in name:
            continue
        grad = torch.full_like(student, float("nan"))
        loss, _ = dense(student, [teacher], grad, divergence=name, param0=0.5, param1=0.5, vocab_size=512)
        assert loss.abs().max() < 5e-6 and grad.abs().max() < 1e-7, name
