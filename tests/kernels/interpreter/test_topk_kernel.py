"""The sparse top-k pattern by the checks and the fp64 oracle of tests/test_topk.py, and what a launcher can be given.

Swept in tiles of 256 columns and marks of 2048, so that a few thousand columns take several of both; and in one pass
over rows that stay in registers, in pieces of 32 vectors.
"""

import pytest
import test_topk
import torch
import triton
from launches import topk
from oracle import check as check_launch
from oracle import topk_rows
from shapes import resident
from test_topk import CASES, DIVERGENCES, DTYPES, check, no_worse_than_eager, of_kind, ragged, temperatures

import kdkernels as kd
from kdkernels.choices import CODES
from kdkernels.kernels import tuning

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(params=["sweeps", "resident"])
def pattern(request, monkeypatch):
    """Rows are swept, as where nobody knows what fits into the registers, or stay in them."""
    if request.param == "resident":
        monkeypatch.setattr(tuning, "sparse_plans", resident_plans)
    return request.param


def resident_plans(V, itemsize, K, *, load, vec, cut, swept=True, **_):
    """Pieces of one vector a lane, of which eight or sixteen make up a row."""
    if not swept:
        return [tuning.Plan("sweeps", *tuning.shape(V, itemsize, vec=vec))]
    columns = V + cut * (vec - 1)
    lanes = max(32, triton.next_power_of_2(triton.cdiv(columns, 16 * vec)))
    return [resident(V, vec, cut, lanes, keep=load == tuning.LIGHT)._replace(pattern="resident")]


# No kernel knows a divergence: two tails try all of them, the others one that is linear and two that are not.
FEW = ("forward_kl", "skew_reverse_kl", "alpha_beta")
OWN = [case for case in CASES if case.values[0] in ("bucket", "uniform") or case.values[1] in FEW]
NAMES = list(DTYPES)[1:]
FAR = [("bucket", name) for name in ("forward_kl", "reverse_kl", "jsd", "tvd")]
FAR += [("uniform", "forward_kl"), ("renormalize", "jsd"), ("renormalize_both", "jsd")]


def plain(student):
    """Rows that can be used without labels: the ignored one of NaN is replaced."""
    student[-1] = 0.5
    return student


@pytest.mark.parametrize("tail,name", OWN)
def test_every_divergence(tail, name):
    dtype = NAMES[list(DIVERGENCES).index(name) % len(NAMES)]
    s, ids, logprobs, labels = ragged(6, 300, 5, DTYPES[dtype])
    check(
        s, ids, logprobs, labels, backend="triton", tail=tail, divergence=DIVERGENCES[name], **temperatures(tail, 1.5)
    )


@pytest.mark.parametrize("tail", CODES["tail"])
def test_dtypes(tail):
    """Of ids and log-probabilities."""
    s, ids, logprobs, labels = ragged(6, 300, 5, torch.bfloat16)
    rounded = logprobs.to(DTYPES[{"bucket": "fp64", "drop": "fp16", "uniform": "bf16"}.get(tail, "fp32")])
    check(s, ids.int(), rounded, labels, backend="triton", tail=tail, divergence="jsd")


@pytest.mark.parametrize(
    "tail,k", [*((tail, 1) for tail in CODES["tail"]), ("bucket", 64), ("uniform", 64), ("drop", 100)]
)
@pytest.mark.usefixtures("pattern")
def test_sizes(tail, k):
    """2500 columns take two spans of marks."""
    s, ids, logprobs, labels = ragged(6, 2500 if k == 64 else 300, k, torch.float32)
    check(s, ids, logprobs, labels, backend="triton", tail=tail, divergence="forward_kl")


# 100 nats are beyond the range of fp32 exponentials.
@pytest.mark.parametrize("nats", [50, -50, 100])
@pytest.mark.parametrize("tail,name", FAR)
@pytest.mark.usefixtures("pattern")
def test_student_far_ahead_or_behind_on_the_set(tail, name, nats):
    s, ids, logprobs, _ = ragged(5, 600, 5, torch.float32, spread=1.0)
    plain(s)
    s.scatter_add_(1, ids.clamp(min=0), float(nats) * (ids >= 0))
    loss, grad = check(s, ids, logprobs, backend="triton", tail=tail, divergence=name)
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("lead", [2.0, 8.0, 14.0, 20.0])
@pytest.mark.usefixtures("pattern")
def test_mass_outside_by_difference_or_by_a_sweep(lead):
    """It passes from most of the row to a billionth, the teacher's along with it or not."""
    s, ids, logprobs, _ = ragged(5, 600, 5, torch.float32, spread=1.0)
    plain(s)
    ids[3] = ids[0]
    logprobs[3] = torch.log_softmax(torch.arange(5.0), -1) + torch.tensor(-(2.0**-lead)).log1p()
    s.scatter_add_(1, ids.clamp(min=0), lead * (ids >= 0))
    check(s, ids, logprobs, backend="triton", tail="bucket", divergence="jsd")


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_teacher_mass_of_one(name, tail):
    test_topk.test_teacher_mass_of_one(tail, name, 1e-6, "triton")


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("tail,name", [("bucket", "jeffreys"), ("uniform", "reverse_kl")])
def test_the_floor_of_the_tail_is_the_rounding_of_the_log_probabilities(tail, name, dtype):
    s, ids = torch.randn(2, 40), torch.tensor([[0, 5], [7, -1]])
    logprobs = torch.tensor([[-0.5, -0.4], [0.0, 0.0]]).to(DTYPES[dtype])
    check(s, ids, logprobs, backend="triton", tail=tail, divergence=name)
    check(s, ids, logprobs, backend="triton", tail=tail, divergence=name, min_tail=1e-3)
    tails = torch.tensor([-50.0, -torch.inf])
    check(s, ids, logprobs, backend="triton", tail=tail, divergence=name, tail_logprob=tails)
    check(s, ids, logprobs, backend="triton", tail=tail, divergence=name, tail_logprob=tails, min_tail=1e-3)


def test_a_served_teacher_that_is_sure_has_a_finite_loss():
    _, ids, logprobs = test_topk.served(24, 300, 8)
    for tail in ("bucket", "uniform"):
        loss, grad = check(torch.randn(24, 300), ids, logprobs, backend="triton", tail=tail, divergence="reverse_kl")
        assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("form", test_topk.PADDING)
@pytest.mark.parametrize("tail", CODES["tail"])
def test_ragged_rows_as_others_pad_them(tail, form):
    dtype = ["fp32", "bf16", "fp16"][CODES["tail"].index(tail) % 3]
    test_topk.test_ragged_rows_as_others_pad_them(tail, "skew_reverse_kl", form, dtype, "triton")


@pytest.mark.parametrize("tail", CODES["tail"])
@pytest.mark.usefixtures("pattern")
def test_unused_slots_among_equal_ids_and_marks(tail):
    """The padded id is one of the entries, or a column outside that is marked and looked at again."""
    s, ids, logprobs, _ = ragged(5, 300, 5, torch.float32)
    plain(s)
    ids[3] = ids[0]
    logprobs = torch.where(ids == -1, -torch.inf, logprobs.nan_to_num(-1.0))
    s.scatter_add_(1, ids.clamp(min=0), 14.0 * (ids >= 0))
    ids = torch.where(ids == -1, ids[:, :1].clamp(min=0), ids)
    logprobs[3, :3] = torch.tensor([-1e9, -torch.inf, -9999.0])
    for name in ("jsd", "alpha_beta"):
        check(s, ids, logprobs, backend="triton", tail=tail, divergence=name)


@pytest.mark.parametrize("captured", [-3.0, -torch.inf])
def test_a_row_without_entries_is_all_tail_whatever_its_tail_says(captured):
    for name in ("forward_kl", "reverse_kl"):
        test_topk.test_a_row_without_entries_is_all_tail_whatever_its_tail_says(captured, name, "triton")


def test_a_distillation_term_of_weight_0_is_not_computed(monkeypatch):
    test_topk.test_a_distillation_term_of_weight_0_is_not_computed("triton", monkeypatch)


@pytest.mark.parametrize("tail", CODES["tail"])
def test_all_slots_unused(tail):
    s = torch.randn(2, 300)
    ids, logprobs = torch.full((2, 4), -1), torch.full((2, 4), torch.nan)
    loss, grad = check(s, ids, logprobs, backend="triton", tail=tail, divergence="forward_kl")
    if tail not in ("uniform", "drop"):
        assert loss.abs().max() < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize("tail", CODES["tail"])
@pytest.mark.usefixtures("pattern")
def test_set_is_the_whole_vocabulary(tail):
    s = torch.randn(3, 24)
    logprobs, ids = torch.log_softmax(torch.randn(3, 24) * 3, -1).sort(-1)
    check(s, ids, logprobs, backend="triton", tail=tail, divergence="jsd")


@pytest.mark.parametrize("tail", CODES["tail"])
def test_equal_ids_add_up(tail):
    """Among 40 slots, which are compared in several pieces."""
    s = torch.randn(2, 300)
    ids, logprobs = torch.randint(0, 12, (2, 40)), torch.log_softmax(torch.randn(2, 41), -1)[:, :40]
    ids[0, ::3] = -1
    check(s, ids, logprobs, backend="triton", tail=tail, divergence="jsd", **temperatures(tail, 2.0))


@pytest.mark.parametrize("tail", CODES["tail"])
@pytest.mark.usefixtures("pattern")
def test_whole_objective(tail):
    s, ids, logprobs, labels = ragged(6, 300, 4, torch.float32)
    labels[0] = ids[0, 1]
    s = torch.cat([s, torch.full((6, 20), torch.nan)], -1)
    options = {
        "kd_weight": 0.7,
        "ce_weight": 0.3,
        "z_loss_weight": 1e-3,
        "label_smoothing": 0.1,
        "student_softcap": 20.0,
    }
    options |= {"temperature": torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 1.0]), "teacher_temperature": 1.0}
    weight = torch.rand(6).double()
    options |= {"backend": "triton", "tail": tail, "vocab_size": 300, "row_weight": weight, "divergence": "tvd"}
    _, grad = check(s, ids, logprobs, labels, **options)
    assert not grad[:, 300:].any()
    # Without distillation nothing is left of the tail.
    options |= {"kd_weight": 0.0, "temperature": 1.0}
    check(s, ids, logprobs, labels, **options)


@pytest.mark.parametrize("kind", ["offset 1e5", "sure 20", "scale 0.1", "up to 1e9", "up to 1.7e38"])
@pytest.mark.parametrize(
    "tail,name",
    [
        ("bucket", "forward_kl"),
        ("bucket", "jeffreys"),
        ("uniform", "jeffreys"),
        ("uniform", "jsd"),
        ("renormalize_both", "tvd"),
    ],
)
def test_shifted_sure_near_and_large_rows_are_no_worse_than_eager(tail, name, kind):
    s, ids, logprobs, labels = of_kind(kind, rows=3, columns=300)
    no_worse_than_eager(s, ids, logprobs, backend="triton", tail=tail, divergence=name)
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": 0.0 if kind == "up to 1.7e38" else 0.1}
    options |= {"temperature": 2.0, "teacher_temperature": 1.0} if name == "tvd" else {}
    no_worse_than_eager(s, ids, logprobs, labels, backend="triton", tail=tail, divergence=name, **options)


@pytest.mark.parametrize("name", ["forward_kl", "jeffreys", "soft_ce"])
def test_a_uniform_tail_of_the_largest_logits(name):
    """In base 2 the difference of two of them is infinite."""
    s, ids, logprobs, _ = of_kind("up to 1.7e38", rows=3, columns=300)
    divergence = kd.divergences.resolve(name)
    loss = kd.topk_kd_loss(s, ids, logprobs, tail="uniform", divergence=divergence, reduction="none", backend="triton")
    truth = test_topk.oracle(s.double(), ids, logprobs, tail="uniform", divergence=divergence)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


def test_cross_entropy_is_relative_to_the_maximum():
    test_topk.test_cross_entropy_is_relative_to_the_maximum("offset 1e5", 0.1, 1.0, "triton")


def launch(student, teacher, dstudent, labels, **options):
    return topk(student, *teacher, dstudent, labels, **options)


# Rows of 301 start at every distance from a vector's boundary.
@pytest.mark.parametrize("columns", [300, 301])
@pytest.mark.parametrize("tail", CODES["tail"])
@pytest.mark.usefixtures("pattern")
def test_in_place(tail, columns):
    s, ids, logprobs, labels = ragged(6, columns, 5, torch.float32)
    options = {"tail": tail, "divergence": "jsd", "ce_weight": 0.5, "param_rows": torch.rand(6) * 0.8 + 0.1}
    _, grad = check_launch(launch, topk_rows, s, [ids, logprobs], labels, inplace=True, **options)
    assert not grad[-1].any()
    apart = torch.full_like(s, torch.nan)
    topk(s, ids, logprobs, apart, labels, **options)
    assert torch.equal(apart, grad)


def test_strided_rows():
    """Views of a larger [B, L, V], and rows that start off 16 bytes."""
    student = torch.randn(2, 4, 310)[:, :-1, 3:303]
    logprobs, ids = torch.log_softmax(torch.randn(6, 300), -1).topk(4)
    out = torch.full((2, 4, 300), torch.nan)
    loss, _ = topk(student, ids, logprobs, out[:, :-1])
    flat = student.reshape(6, 300).contiguous()
    (expected, _), grad = check_launch(launch, topk_rows, flat, [ids, logprobs])
    # Other places of the rows in memory are other orders of their sums.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[:, :-1].reshape(6, 300), grad, rtol=1e-5, atol=1e-8)
    assert out[:, -1].isnan().all()


@pytest.mark.parametrize("tail", CODES["tail"])
@pytest.mark.usefixtures("pattern")
def test_statistics(tail):
    s, ids, logprobs, labels = ragged(6, 300, 5, torch.float32)
    options = {"tail": tail, "ce_weight": 0.5, "return_stats": True, "reduction": "none", **temperatures(tail, 2.0)}
    got, want = (kd.topk_kd_loss(s, ids, logprobs, labels, backend=name, **options) for name in ("triton", "torch"))
    for name in want[1]._fields:
        torch.testing.assert_close(getattr(got[1], name), getattr(want[1], name), atol=2e-6, rtol=2e-6, msg=name)


@pytest.mark.parametrize("tail", CODES["tail"])
@pytest.mark.usefixtures("pattern")
def test_nan_stays_in_its_row(tail):
    """A logit of NaN on the set, nothing but -inf, and ids out of range."""
    s, ids, logprobs, _ = ragged(6, 300, 5, torch.float32)
    plain(s)
    s[1, ids[1, 0]] = torch.nan
    s[2] = -torch.inf
    ids[2], logprobs[2] = ids[0], logprobs[0]
    ids[4, 2], ids[5, 0] = 300, 2**40
    grad = torch.full_like(s, torch.nan)
    loss, _ = topk(s, ids, logprobs, grad, tail=tail)
    assert loss.isnan().tolist() == [False, True, True, False, True, True]
    assert grad[[0, 3]].isfinite().all() and grad[1, ids[1]].isnan().all()
    assert torch.equal(topk(s, ids, logprobs, None, tail=tail)[0].nan_to_num(7.0), loss.nan_to_num(7.0))


def test_label_out_of_range():
    s, ids, logprobs, _ = ragged(6, 300, 5, torch.float32)
    loss, _ = topk(s[:2], ids[:2], logprobs[:2], None, torch.tensor([300, 3]), ce_weight=1.0)
    assert loss[0].isnan() and loss[1].isfinite()


def test_no_rows():
    empty = torch.empty(0, 7)
    loss, stats = topk(empty, torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3), empty, stats=True)
    assert loss.shape == (0,) and stats.shape == (0, 6)
