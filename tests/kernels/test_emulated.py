"""The compiled PTX, executed by ptxrun: correct, no race, nothing uninitialised, and the traffic it was built for."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("ptxrun", reason="the package ptxrun, which executes PTX on the CPU, is not installed")

from launches import dense, dkd, mse, topk
from oracle import check, dense_rows, dkd_rows, mse_rows, topk_rows
from ptxrun.triton_bridge import patched

from kdkernels.kernels import divergences, tuning
from kdkernels.kernels.scale import scale_grad

pytestmark = pytest.mark.slow

ARCHS = [80, 90]
PARAMS = {"jsd": (0.3, 0.0), "skew_kl": (0.1, 0.0), "skew_reverse_kl": (0.1, 0.0), "alpha_beta": (0.2, 0.7)}
# Reads of both logits together, in passes over [N, V], with the gradient and without; then there is one write.
PASSES = {True: (4, 2), False: (6, 4)}


def make(N, V, dtype, width=None):
    student, teacher = (torch.full((N, width or V), float("nan"), dtype=dtype) for _ in range(2))
    student[:, :V], teacher[:, :V] = torch.randn(N, V) * 3, torch.randn(N, V) * 3
    return student, teacher


def assert_traffic(report, tensor, reads, writes, N, V):
    """Bytes within 2 % and a few hundred bytes of the row, wide accesses, and nothing reported."""
    assert report.ok, report
    one = N * V * tensor.element_size()
    # Scalars of a row are loaded by every thread; they are counted as bytes, but are one sector.
    sectors = report.load_sectors * 32
    assert abs(sectors - reads * one) <= 0.02 * max(reads, 1) * one + 8192 * N, report
    assert abs(report.global_store_bytes - writes * one) <= 0.02 * writes * one + 64 * N, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", divergences.names())
def test_every_divergence(arch, name):
    N, V = 2, 20480
    student, teacher = make(N, V, torch.bfloat16)
    param0, param1 = PARAMS.get(name, (0.0, 0.0))
    options = {"divergence": name, "param0": param0, "param1": param1, "temperature": 2.0, "teacher_temperature": 2.0}
    with patched(arch) as run:
        check(dense, dense_rows, student, [teacher], **options)
        dense(student, [teacher], None, **options)
    linear = divergences.lookup(name).linear is not None
    with_gradient, without = PASSES[linear]
    assert_traffic(run.reports[0], student, with_gradient, 1, N, V)
    assert_traffic(run.reports[1], student, without, 0, N, V)
    assert set(run.reports[0].width_hist_ld) == {16}


@pytest.mark.parametrize("V, dtype", [(128256, torch.bfloat16), (4096, torch.float32), (1008, torch.float16)], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_widths(name, V, dtype):
    student, teacher = make(1, V, dtype)
    with patched(90) as run:
        check(dense, dense_rows, student, [teacher], divergence=name, param0=0.5)
    assert_traffic(run.reports[0], student, 6 if name == "jsd" else 4, 1, 1, V)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("V", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", ["jeffreys", "jsd"])
def test_narrow_in_place(arch, name, V):
    """In place over rows that do not start on 16 bytes, with labels, an ignored row of NaN and a label out of range."""
    student, teacher = make(4, V, torch.float32)
    student[1] = float("nan")
    labels = torch.tensor([V - 1, -100, 0, V])
    options = {"divergence": name, "param0": 0.3, "ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 0.1}
    with patched(arch) as run:
        check(dense, dense_rows, student[:3], [teacher[:3]], labels[:3], inplace=True, **options)
        loss, _ = dense(student, [teacher], student.clone(), labels, **options)
    assert all(report.ok for report in run.reports)
    assert loss[3].isnan() and loss[1] == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_whole_objective(arch):
    N, V, width = 3, 5003, 5024
    student, teacher = make(N, V, torch.bfloat16, width)
    labels = torch.tensor([7, -100, V - 1])
    options = {
        "divergence": "jsd",
        "param_rows": torch.tensor([0.2, 0.5, 0.7]),
        "temperature_rows": torch.tensor([1.0, 2.0, 0.5]),
        "row_weight": torch.tensor(0.5).expand(3),
        "ce_weight": 0.5,
        "label_smoothing": 0.1,
        "z_loss_weight": 1e-3,
        "student_softcap": 20.0,
        "teacher_softcap": 30.0,
        "vocab_size": V,
        "stats": True,
    }
    with patched(arch) as run:
        _, grad = check(dense, dense_rows, student, [teacher], labels, **options)
        check(dense, dense_rows, student, [teacher], labels, inplace=True, **options, standardize=True)
    assert not grad[:, V:].any() and not grad[1].any()
    assert all(report.ok for report in run.reports)
    # Reading into the padding keeps 16 bytes: what is narrower are scalars of a row.
    widths = run.reports[0].width_hist_ld
    assert widths[16] * 16 > 0.8 * run.reports[0].global_load_bytes


@pytest.mark.parametrize("mixture, passes", [("probs", 6), ("logits", 6)])
def test_mixture(mixture, passes):
    """Two teachers are streamed: three tensors, two sweeps."""
    student, first = make(2, 8192, torch.bfloat16)
    second, _ = make(2, 8192, torch.bfloat16)
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    with patched(90) as run:
        options = {"divergence": "forward_kl", "mixture": mixture, "mixture_weights": weights}
        check(dense, dense_rows, student, [first, second], **options)
    assert_traffic(run.reports[0], student, passes, 1, 2, 8192)


@pytest.mark.parametrize("arch", ARCHS)
def test_other_patterns(arch):
    N, V = 2, 20480
    student, teacher = make(N, V, torch.bfloat16)
    labels = torch.tensor([3, V - 1])

    def run_dkd(s, ts, d, labels, **options):
        return dkd(s, ts[0], d, labels, **options)

    def run_mse(s, ts, d, labels, **options):
        return mse(s, ts[0], d, labels, **options)

    with patched(arch) as run:
        check(run_dkd, dkd_rows, student, [teacher], labels, alpha=1.0, beta=2.0)
        check(run_mse, mse_rows, student, [teacher])
        check(run_mse, mse_rows, student, [teacher], inplace=True, centered=True)
    # The centred form looks at one tile of both before it starts.
    (ROLL, LANES, VEC), _ = tuning.shape(V, 2)
    for report, reads in zip(run.reports, (4, 2, 4 + 2 * ROLL * LANES * VEC / V), strict=True):
        assert_traffic(report, student, reads, 1, N, V)


@pytest.mark.parametrize("arch", ARCHS)
def test_scaling_by_one_moves_nothing(arch):
    grad = torch.randn(4, 20480).bfloat16()
    before = grad.clone()
    with patched(arch) as run:
        scale_grad(grad, torch.tensor(1.0))
        scale_grad(grad, torch.tensor([1.0, 1.0, 2.0, 1.0]))
    assert_traffic(run.reports[0], grad, 0, 0, 4 * 256, 20480)
    assert run.reports[0].global_store_bytes == 0
    assert run.reports[1].global_store_bytes == before[0].nbytes
    assert torch.equal(grad, before * torch.tensor([1, 1, 2, 1])[:, None].bfloat16())


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_ignored_rows_are_not_read(divergence):
    student, teacher = make(2, 20480, torch.bfloat16)
    grad = torch.full_like(student, float("nan"))
    with patched(90) as run:
        loss, _ = dense(student, [teacher], grad, torch.tensor([-100, -100]), divergence=divergence)
    assert not loss.any() and not grad.any()
    assert run.reports[0].width_hist_ld.keys() == {8}


def test_equal_logits_give_exactly_zero():
    """Identical models, differently padded: no rounding of one side that the other does not have."""
    student, _ = make(2, 5000, torch.bfloat16, 5008)
    teacher = torch.nn.functional.pad(student, (0, 16))
    for name in ("forward_kl", "reverse_kl", "jeffreys", "tvd"):
        grad = torch.full_like(student, float("nan"))
        with patched(90):
            loss, _ = dense(
                student, [teacher], grad, divergence=name, vocab_size=5000, temperature=0.7, teacher_temperature=0.7
            )
        assert not loss.any() and not grad.any(), name


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_no_barrier_in_the_loops(name):
    """Twice the tiles, the same number of barriers."""
    barriers = []
    for V in (65536 + 16384, 65536 + 3 * 16384):
        student, teacher = make(1, V, torch.bfloat16)
        with patched(90) as run:
            dense(student, [teacher], torch.empty_like(student), divergence=name, param0=0.5)
        barriers.append(run.reports[0].by_class["barrier"])
    assert barriers[0] == barriers[1]


def sparse(N, V, K, dtype, lead=0.0):
    """Student logits, and the ids and log-probabilities of a teacher that the student follows, by so many nats."""
    student, teacher = make(N, V, dtype)
    logprobs, ids = torch.log_softmax(teacher.float() + 0.5 * student.float(), -1).topk(K)
    return student.scatter_add(1, ids, torch.full(ids.shape, lead, dtype=dtype)), ids, logprobs


def run_topk(s, ts, d, labels, **options):
    return topk(s, *ts, d, labels, **options)


# Passes over [N, V], and what the student's lead asks of the bucket.
SWEEPS = {
    "bucket": ({}, 0.0, 2),
    "bucket-swept-again": ({}, 50.0, 3),
    "bucket-behind": ({"divergence": "jsd", "param0": 0.3}, -50.0, 2),
    "renormalize": ({"tail": "renormalize", "divergence": "tvd"}, 0.0, 2),
    "renormalize_both": ({"tail": "renormalize_both"}, 0.0, 0),
    "uniform": ({"tail": "uniform", "divergence": "reverse_kl"}, 0.0, 3),
}


@pytest.mark.parametrize(
    "arch, form, V",
    [*((90, form, 20480) for form in SWEEPS), (80, "bucket", 20480), (90, "bucket", 128256)],
    ids=str,
)
def test_topk(arch, form, V):
    """Each sweep reads the logits once in 16-byte pieces; all else a row costs is a few bytes an entry."""
    options, lead, reads = SWEEPS[form]
    N, K = 2, 64
    student, ids, logprobs = sparse(N, V, K, torch.bfloat16, lead)
    with patched(arch) as run:
        check(run_topk, topk_rows, student, [ids, logprobs], **options)
    (report,) = run.reports
    assert report.ok, report
    one = student.nbytes
    assert abs(report.width_hist_ld.get(16, 0) * 16 - reads * one) <= 0.03 * one
    # Warps ask for the same entries; distinct sectors are what leaves the cache: ids, log-probabilities, K logits.
    assert report.unique_load_bytes <= (reads > 0) * one + N * (K * (8 + 4 + 32) + 64)
    assert one <= report.global_store_bytes <= one + N * (K * 2 + 64)


@pytest.mark.parametrize("tail, V, K", [("renormalize_both", 1, 1), ("bucket", 7, 5), ("uniform", 1000, 200)])
def test_topk_in_place(tail, V, K):
    """Over rows that do not start on 16 bytes, with labels, an ignored row of NaN, ids out of range and given twice."""
    student, ids, logprobs = sparse(4, V, K, torch.float32)
    student[1] = float("nan")
    ids[2, -1] = ids[2, 0]
    ids[3, 0] = V
    labels = torch.tensor([V - 1, -100, 0, 0])
    options = {"tail": tail, "ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 0.1}
    with patched(80) as run:
        check(run_topk, topk_rows, student[:3], [ids[:3], logprobs[:3]], labels[:3], inplace=True, **options)
        loss, _ = topk(student, ids, logprobs, student.clone(), labels, **options)
    assert all(report.ok for report in run.reports), [str(report) for report in run.reports if not report.ok]
    assert loss[3].isnan() and loss[1] == 0


def test_topk_large_k():
    student, ids, logprobs = sparse(1, 20480, 2048, torch.bfloat16, 20.0)
    ids[0, 1000] = ids[0, 3]
    with patched(90) as run:
        check(run_topk, topk_rows, student, [ids, logprobs])
    assert run.reports[0].ok, run.reports[0]
