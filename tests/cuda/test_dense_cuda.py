"""The dense CUDA kernels, as PTX of sm_80 and sm_90, against fp64 truth: dense_emulator.py executes them.

Every launch is also checked for accesses out of bounds, reads of what nobody wrote, races, copies used before they are
complete, and shared memory that the copies' proxy may not see yet.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
pytest.importorskip("ptxrun", reason="ptxrun is not installed")

from dense_emulator import HELD, SOURCES, DenseEmulator
from oracle import check, dense_rows

import kdkernels as kd
from kdkernels import backends

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PARAMS = {"jsd": (0.3, 0.0), "skew_kl": (0.1, 0.0), "skew_reverse_kl": (0.9, 0.0), "alpha_beta": (0.2, 0.7)}
LINEAR = ("forward_kl", "reverse_kl", "jeffreys", "soft_ce", "dual_soft_ce")
NAMES = (*LINEAR, "tvd", *PARAMS)
LIMITS_OF_FAMILY = [(0.0, 0.5), (0.5, 0.0), (0.5, -0.5), (0.0, 0.0), (1.0, 0.0), (-0.5, 1.0)]
# Operations complete as late or as early as they may, or blocks and warps fall behind at random.
SCHEDULES = ({"late": True}, {"late": False}, {"seed": 1}, {"seed": 2, "late": False})
HARD = {"kd_weight": 0.7, "ce_weight": 0.3, "z_loss_weight": 1e-3, "label_smoothing": 0.1}


def rows(N, V, dtype=BF16, scale=3.0, offset=0):
    """Student and teacher; ``offset`` elements before each row's first, so that rows begin off 16 bytes."""
    return [(torch.randn(N, V + offset) * scale).to(dtype)[:, offset:] for _ in range(2)]


def options_of(name):
    param0, param1 = PARAMS.get(name, (0.0, 0.0))
    return {"divergence": name, "param0": param0, "param1": param1}


def run(
    student, teacher, labels=None, *, arch=90, cluster=1, limits=None, clusters=2, schedule=SCHEDULES[0], **options
):
    """Holds a launch against the truth. cluster: the blocks that work on a row."""
    emulator = DenseEmulator(arch, limits, clusters, cluster * len(student), **schedule)
    result, grad = check(emulator, dense_rows, student, [teacher], labels, **{"divergence": "forward_kl", **options})
    assert emulator.plans[0].plan_cluster == cluster
    return emulator, result, grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["bulk", "copies", "cluster"])
def test_every_divergence(name, form):
    """Four rows a cluster, so that both stages are used again; in one of four blocks each has two warps."""
    schedule = SCHEDULES[NAMES.index(name) % len(SCHEDULES)]
    student, teacher = rows(*((4, 8456) if form == "cluster" else (7, 1000)), offset=form == "copies")
    temperatures = {"temperature": 2.0, "teacher_temperature": 1.5}
    options = {"cluster": 4 if form == "cluster" else 1, "clusters": 1 if form == "cluster" else 2}
    options |= {"schedule": schedule, **temperatures}
    emulator, _, _ = run(student, teacher, **options, **options_of(name))
    call = emulator.plans[0]
    assert SOURCES[call.source] == ("copies" if form == "copies" else "bulk") and call.stages == 2
    assert HELD[call.held] == (name if name in HELD else None)


@pytest.mark.parametrize("a,b", LIMITS_OF_FAMILY)
def test_limits_of_alpha_beta(a, b):
    student, teacher = rows(3, 300, scale=2.0)
    run(student, teacher, divergence="alpha_beta", param0=a, param1=b)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes(name, dtype):
    for V, offset in ((1000, 0), (777, 1)):
        student, teacher = rows(2, V, dtype, offset=offset)
        run(student, teacher, temperature=2.0, teacher_temperature=2.0, **options_of(name))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("V", [1, 2, 3, 7, 8, 9, 63, 65, 511, 1023, 1025, 4096, 4097])
def test_widths(V, arch):
    """Odd widths, strides and offsets; one row, and three."""
    schedule = SCHEDULES[V % len(SCHEDULES)]
    for N, offset in ((1, 0), (3, 5)):
        student, teacher = rows(N, V, offset=offset)
        run(student, teacher, arch=arch, schedule=schedule, clusters=1)
        run(student, rows(N, V)[1], arch=arch, schedule=schedule, **options_of("jsd"))


def corner_rows(V):
    inf = float("inf")
    plain, some = torch.randn(V) * 3, torch.arange(V) % 3 == 0
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
        "far below": (plain - 1e20, plain + 1e20),
        "all -inf student": (torch.full((V,), -inf), plain),
        "all -inf teacher": (plain, torch.full((V,), -inf)),
        "NaN": (plain.masked_fill(some, float("nan")), torch.randn(V)),
    }


@pytest.mark.parametrize("swept", [False, True], ids=["held", "swept"])
@pytest.mark.parametrize("name", NAMES)
def test_corners(name, swept):
    """The swept kernel is asked for by statistics, which only it makes."""
    pairs = corner_rows(300)
    student, teacher = (torch.stack(side) for side in zip(*pairs.values(), strict=True))
    known = len(pairs) - 3
    _, (loss, _), grad = run(student[:known], teacher[:known], stats=swept, **options_of(name))
    assert not loss.isnan().any()
    row = list(pairs).index("identical")
    if "soft_ce" not in name:
        assert abs(loss[row]) < 5e-6
    if name in ("forward_kl", "reverse_kl", "jeffreys", "tvd"):
        assert loss[row] == 0 and not grad[row].any()
    loss, _ = DenseEmulator(90)(student[known:], [teacher[known:]], stats=swept, **options_of(name))
    assert loss.isnan().all()


OBJECTIVES = {
    "ce": {"ce_weight": 1.0},
    "ce alone": {"ce_weight": 1.0, "kd_weight": 0.0, "label_smoothing": 0.2},
    "everything": HARD,
    "z alone": {"z_loss_weight": 1e-2, "kd_weight": 0.0},
    "all smoothing": {"ce_weight": 0.5, "label_smoothing": 1.0},
    "stats": {"stats": True, **HARD},
    "softcaps": {"student_softcap": 3.0, "teacher_softcap": 2.0, **HARD},
    "no t squared": {"scale_by_t_squared": False, **HARD},
}


# In a cluster what else is summed over it: of a linear divergence, of the swept kernel, and of a pair with all terms.
OBJECTIVE_CASES = [
    (form, objective, name)
    for form in ("bulk", "copies", "cluster")
    for objective in OBJECTIVES
    for name in ("jeffreys", "jsd", "alpha_beta")
    if form != "cluster" or name != "jsd" or objective == "everything"
]


@pytest.mark.parametrize("form,objective,name", OBJECTIVE_CASES)
def test_objective(name, objective, form):
    """Labels at both ends and an ignored row, which is not read."""
    V = 6144 if form == "cluster" else 296
    student, teacher = rows(5, V, offset=form == "copies")
    labels = torch.tensor([V - 1, -100, 0, 100, -100])
    student[1] = float("nan")
    options = {"temperature": 2.0, "teacher_temperature": 1.5, **options_of(name), **OBJECTIVES[objective]}
    cluster = 4 if form == "cluster" else 1
    emulator, (loss, stats), grad = run(student, teacher, labels, cluster=cluster, **options)
    assert loss[1] == 0 and not grad[1].any() and not stats[1].any()
    again, again_stats = emulator(student, [teacher], None, labels, **options)
    assert torch.equal(again, loss) and torch.equal(again_stats.nan_to_num(), stats.nan_to_num())


@pytest.mark.parametrize("name", ["reverse_kl", "skew_kl", "soft_ce"])
def test_padding_views_and_numbers_of_rows(name):
    """Padded widths, probabilities, numbers of a row, in place, and views [B, L, V] with gaps between batches."""
    student, teacher = torch.full((3, 704), float("nan")), torch.full((3, 304), float("nan"))
    student[:, :256], teacher[:, :256] = torch.randn(3, 256), torch.randn(3, 256)
    labels = torch.tensor([1, -100, 249])
    options = {"divergence": name, "param_rows": torch.tensor([0.1, 0.5, 0.9]), "ce_weight": 0.5, "param1": 0.4}
    options["temperature_rows"] = torch.tensor([0.5, 1.0, 4.0])
    options["teacher_temperature_rows"] = torch.tensor([0.5, 2.0, 3.0])
    options["row_weight"] = torch.tensor([[0.5, 9.0], [1.0, 9.0], [2.0, 9.0]])[:, 0]
    for vocab_size in (250, 256):
        for inplace in (False, True):
            emulator = DenseEmulator(90)
            given = {"vocab_size": vocab_size, "inplace": inplace, **options}
            _, grad = check(emulator, dense_rows, student, [teacher], labels, **given)
            assert not grad[:, vocab_size:].any()
    probs = torch.softmax(teacher[:, :250], -1)
    probs[0, :100] = 0
    run(student[:, :250].clone(), probs, teacher_form="probs", **options_of(name))
    student, teacher = torch.randn(2, 4, 310)[:, :-1, 3:303], torch.randn(2, 5, 300)[:, 1:4]
    out = torch.full((2, 4, 300), float("nan"))
    loss, _ = DenseEmulator(90)(student, [teacher], out[:, :-1], **options_of(name))
    flat = [x.reshape(-1, 300).contiguous() for x in (student, teacher)]
    _, (expected, _), grad = run(*flat, **options_of(name))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[:, :-1].reshape(-1, 300), grad, rtol=1e-5, atol=1e-7)
    assert out[:, -1].isnan().all()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["forward_kl", "jeffreys", "jsd", "skew_kl", "alpha_beta"])
def test_rows_too_wide_for_shared_memory(name, arch):
    """Two or three sweeps over global memory, one block or a cluster; the running maximum rises in one row."""
    student, teacher = rows(2, 8197)
    student[0] += torch.arange(8197) / 500
    student[1, :3000] = float("-inf")
    teacher[1, :3100] = float("-inf")
    limits = (6000, 16384, 1 if arch == 80 else 4)
    emulator, _, _ = run(student, teacher, arch=arch, limits=limits, cluster=limits[2], **options_of(name))
    assert SOURCES[emulator.plans[0].source] == "streamed"


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=str)
@pytest.mark.parametrize("stats", [False, True], ids=["held", "swept"])
def test_in_place_by_a_cluster(stats, schedule):
    """Every block reads the label's logit, and the one that has its column writes the gradient over it. That a part of
    the row's maxima is sent after the read ptxrun does not know: it does not look at accesses of several blocks here.
    """
    V = 4103
    student, teacher = rows(3, V, offset=1)
    labels = torch.tensor([V - 1, 0, V // 2])
    emulator = DenseEmulator(90, clusters=1, multiprocessors=12, check_global_races=False, **schedule)
    check(emulator, dense_rows, student, [teacher], labels, inplace=True, stats=stats, divergence="forward_kl", **HARD)
    call = emulator.plans[0]
    assert call.plan_cluster == 4 and HELD[call.held] == (None if stats else "forward_kl")


def test_in_place_from_the_public_function():
    student, teacher = rows(5, 1000)
    labels = torch.tensor([3, -100, 999, 0, 7])
    options = {"temperature": 2.0, "ce_weight": 0.5, "backend": "cuda"}
    with DenseEmulator(90).registered():
        leaf = student.clone().requires_grad_()
        kd.kd_loss(leaf, teacher, labels, **options).backward()
        again = student.clone().requires_grad_()
        logits = again * 1
        loss = kd.kd_loss(logits, teacher, labels, inplace=True, **options)
        (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, leaf.grad)
    want = student.clone().requires_grad_()
    kd.kd_loss(want, teacher, labels, **{**options, "backend": "torch"}).backward()
    torch.testing.assert_close(leaf.grad, want.grad, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "tvd"])
@pytest.mark.parametrize("per_row", [("kd_weight", "ce_weight", "z_loss_weight"), ("ce_weight", "z_loss_weight")])
def test_weights_of_terms_per_row(name, per_row):
    """A weight of 0 shuts out a teacher that is NaN and a label without mass."""
    student, teacher = rows(6, 1000, FP32)
    labels = torch.tensor([3, -100, 999, 0, 7, 8])
    weights = {key: torch.rand(6) for key in per_row}
    if "kd_weight" in weights:
        weights["kd_weight"][2] = 0
        teacher[2, 5] = torch.nan
    weights["ce_weight"][3] = 0
    student[3, 0] = -torch.inf
    weights["z_loss_weight"][4] = weights["ce_weight"][4] = 0
    options = {**HARD, **weights, "divergence": name, "temperature": 2.0}

    def evaluate(logits, given, backend):
        of_rows = kd.kd_loss(logits, given, labels, reduction="none", backend=backend, **options)
        leaf = logits.clone().requires_grad_()
        loss = kd.kd_loss(leaf, given, labels, reduction="sum", backend=backend, **options)
        return of_rows.double(), torch.autograd.grad(loss, leaf)[0].double()

    with DenseEmulator(90).registered() as emulator:
        found = evaluate(student, teacher, "cuda")
    held = name if name in HELD and "kd_weight" not in weights else None
    assert HELD[emulator.plans[0].held] == held
    expected = evaluate(student.double(), teacher.double(), "torch")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_what_it_lacks_is_refused_by_name_and_auto_takes_another():
    student, teacher = rows(2, 64, FP32)
    refused = [
        ({"teacher": [teacher, teacher], "teacher_weights": [0.5, 0.5]}, "a mixture"),
        ({"teacher": teacher, "standardize": True}, "no standardize"),
        ({"teacher": teacher.bfloat16()}, "of the student's dtype"),
    ]
    with DenseEmulator(90).registered():
        for given, reason in refused:
            with pytest.raises(ValueError, match=f"backend 'cuda' cannot run this call: .*{reason}"):
                kd.kd_loss(student, backend="cuda", **given)
        with pytest.raises(ValueError, match="float64"):
            kd.kd_loss(student.double(), teacher.double(), backend="cuda")
        with pytest.raises(ValueError, match="losses with a divergence and tokens only"):
            kd.dkd_loss(student, teacher, torch.tensor([0, 1]), backend="cuda")
        assert backends.select("auto", "cuda") != "cuda" and backends.select("cuda", "cuda") == "cuda"
