"""The CUDA kernels, as PTX of sm_80 and sm_90, through the public function against the oracle of test_topk.

Every launch is also checked for accesses out of bounds, reads of what nobody wrote, and races; see emulator.py.
"""

import math

import pytest
import test_topk
import torch

pytest.importorskip("ptxrun", reason="ptxrun is not installed")

from emulator import DTYPES, LIMITS, Call, Emulator, plan
from test_topk import (
    DIVERGENCES,
    PADDING,
    check,
    evaluate,
    mass_of_one,
    no_worse_than_eager,
    of_kind,
    ragged,
    temperatures,
)

import kdkernels as kd
from kdkernels.choices import CODES

pytestmark = pytest.mark.slow

ROWS = 6
KEYS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def planned(columns, k=5, dtype=torch.bfloat16, tail="bucket", divergence="forward_kl", limits=LIMITS[90]):
    call = Call(batch=1, length=1, columns=columns, width=columns, entries=k, student_dtype=DTYPES[dtype])
    call.tail = CODES["tail"].index(tail)
    call.shared_per_block, call.shared_per_multiprocessor, call.cluster = limits
    plan(call, divergence)
    return call


def limits_for(form, columns, k, dtype):
    """Limits under which a row takes a form: "resident", "streamed", or "cluster<blocks>"."""
    if form == "resident":
        return LIMITS[80]
    if form == "streamed":
        return (0, 0, 1)
    blocks = int(form.removeprefix("cluster"))
    for room in range(1 << 10, 256 << 10, 64):
        limits = (room, 2 * room + 2048, 16)
        call = planned(columns, k, dtype, limits=limits)
        if call.resident and call.plan_cluster == blocks:
            return limits
    raise AssertionError(f"no room makes {columns} columns {form}")


def run(form, arch, s, ids, logprobs, labels=None, **options):
    divergence = kd.divergences.resolve(options.get("divergence", "forward_kl"))
    # A gradient without a bound is made in fp32 where the logits are fp16, as is one of temperatures per row.
    wide = not divergence.bounded_gradient or isinstance(options.get("temperature"), torch.Tensor)
    dtype = torch.float32 if s.dtype == torch.float16 and wide else s.dtype
    limits = limits_for(form, options.get("vocab_size") or s.shape[-1], ids.shape[-1], dtype)
    with Emulator(arch, limits).registered() as emulator:
        check(s, ids, logprobs, labels, backend="cuda", **options)
    taken = emulator.plans[0].resident, emulator.plans[0].plan_cluster
    assert taken == (0 if form == "streamed" else 1, int(form.partition("cluster")[2] or 1))
    return emulator.reports[0]


# Every divergence and tail once: each in one form and dtype, so that all forms and dtypes meet all tails.
FORMS = [("resident", 80, "fp32"), ("cluster2", 90, "bf16"), ("streamed", 80, "bf16"), ("cluster4", 90, "fp16")]
FORMS += [("streamed", 90, "fp32"), ("cluster8", 90, "fp32")]
NAMES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "alpha_beta", "ab_b<0", "ab_a=0")
NAMES += ("ab_b=0", "ab_a+b=0", "ab_0", "jeffreys", "soft_ce")
WITH_TEACHER = ("reverse_kl", "jeffreys", "ab_a=0", "ab_a+b=0", "ab_0")
CASES = [
    pytest.param(tail, name, *FORMS[(i + j) % len(FORMS)], id=f"{tail}-{name}")
    for j, tail in enumerate(CODES["tail"])
    for i, name in enumerate(NAMES)
    if tail in ("bucket", "uniform") or (i % 3 == j % 3 and not (tail != "renormalize_both" and name in WITH_TEACHER))
]


@pytest.mark.parametrize("tail,name,form,arch,dtype", CASES)
def test_every_divergence(tail, name, form, arch, dtype):
    s, ids, logprobs, labels = ragged(ROWS, 229, 5, KEYS[dtype])
    run(form, arch, s, ids, logprobs, labels, tail=tail, divergence=DIVERGENCES[name], **temperatures(tail, 1.5))


@pytest.mark.parametrize(
    "form,arch,tail,name,k,columns",
    [
        ("resident", 80, "bucket", "forward_kl", 1, 1001),
        ("cluster4", 90, "bucket", "jsd", 64, 2003),
        ("streamed", 80, "renormalize", "jsd", 256, 2003),
        ("cluster16", 90, "uniform", "forward_kl", 256, 4101),
        ("resident", 90, "renormalize_both", "forward_kl", 2048, 4101),
        ("streamed", 90, "bucket", "forward_kl", 2048, 4101),
        ("streamed", 80, "bucket", "forward_kl", 3000, 3001),
        ("streamed", 80, "bucket", "forward_kl", 64, 270_003),
    ],
    ids=str,
)
def test_sizes(form, arch, tail, name, k, columns):
    """K = 3000 has its entries in global memory; a row of 270,003 columns is marked in two parts."""
    s, ids, logprobs, labels = ragged(ROWS, columns, k, torch.bfloat16)
    if k >= 2048 or columns > 5000:
        s, ids, logprobs, labels = s[1:3], ids[1:3], logprobs[1:3], labels[1:3]
    run(form, arch, s, ids, logprobs, labels, tail=tail, divergence=name)


HARD = {"kd_weight": 0.7, "ce_weight": 0.3, "z_loss_weight": 1e-3, "label_smoothing": 0.1}


@pytest.mark.parametrize("form,arch,dtype", FORMS)
@pytest.mark.parametrize("tail,name", [("bucket", "forward_kl"), ("uniform", "tvd")])
def test_whole_objective(tail, name, form, arch, dtype):
    """All terms, padding columns of NaN, a softcap, temperatures and weights of rows, labels in and out of the set."""
    s, ids, logprobs, labels = ragged(ROWS, 229, 4, KEYS[dtype])
    labels[0] = ids[0, 1]
    s = torch.cat([s, torch.full((ROWS, 26), torch.nan, dtype=s.dtype)], -1)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 1.0])
    options = {"tail": tail, "divergence": name, "temperature": temperature, "teacher_temperature": 1.0, **HARD}
    options |= {"vocab_size": 229, "row_weight": torch.rand(ROWS).double()}
    run(form, arch, s, ids, logprobs, labels, student_softcap=20.0 if dtype == "fp32" else None, **options)


@pytest.mark.parametrize("form,arch,dtype", FORMS[:3])
def test_weights_of_terms_per_row(form, arch, dtype):
    s, ids, logprobs, labels = ragged(ROWS, 229, 4, KEYS[dtype])
    weights = {name: torch.rand(ROWS) for name in ("kd_weight", "ce_weight", "z_loss_weight")}
    weights["kd_weight"][1] = weights["ce_weight"][2] = 0
    options = {**HARD, **weights, "reduction": "sum"}

    def evaluate(student, backend):
        leaf = student.clone().requires_grad_()
        loss = kd.topk_kd_loss(leaf, ids, logprobs, labels, backend=backend, **options)
        return loss.double(), torch.autograd.grad(loss, leaf)[0].double()

    with Emulator(arch, limits_for(form, 229, 4, KEYS[dtype])).registered():
        found = evaluate(s, "cuda")
    tolerance = 1e-5 if dtype == "fp32" else 1e-2
    torch.testing.assert_close(found, evaluate(s.double(), "torch"), rtol=tolerance, atol=tolerance / 10)


def test_statistics_have_the_cross_entropy_wherever_there_are_labels():
    s, ids, logprobs, labels = ragged(ROWS, 229, 4, torch.float32)
    options = {"label_smoothing": 0.1, "return_stats": True, "reduction": "none"}
    with Emulator(80, limits_for("resident", 229, 4, torch.float32)).registered():
        _, stats = kd.topk_kd_loss(s, ids, logprobs, labels, backend="cuda", **options)
    _, expected = kd.topk_kd_loss(s.double(), ids, logprobs, labels, backend="torch", **options)
    torch.testing.assert_close(stats.ce.double(), expected.ce, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_both", "drop"])
def test_hard_terms_alone(tail):
    s, ids, logprobs, labels = ragged(ROWS, 41, 4, torch.float32)
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": 0.2}
    run("resident", 80, s, ids, logprobs, labels, tail=tail, divergence="forward_kl", **options)


# 100 nats are beyond the range of fp32 exponentials.
@pytest.mark.parametrize(
    "tail,name,form,arch,nats",
    [
        ("bucket", "forward_kl", "cluster2", 90, 50.0),
        ("bucket", "forward_kl", "cluster2", 90, -100.0),
        ("bucket", "reverse_kl", "streamed", 80, -50.0),
        ("bucket", "reverse_kl", "streamed", 80, 100.0),
        ("renormalize", "jsd", "resident", 80, 50.0),
        ("renormalize", "jsd", "resident", 80, -50.0),
        ("renormalize_both", "tvd", "cluster2", 90, 50.0),
        ("uniform", "reverse_kl", "streamed", 90, 50.0),
        ("uniform", "reverse_kl", "streamed", 90, -50.0),
        ("uniform", "forward_kl", "resident", 90, 100.0),
        ("drop", "skew_reverse_kl", "resident", 90, 50.0),
        ("drop", "skew_reverse_kl", "resident", 90, -100.0),
    ],
)
def test_student_far_ahead_or_behind_on_the_set(tail, name, form, arch, nats):
    dtype = torch.bfloat16 if abs(nats) == 50 else torch.float32
    s, ids, logprobs, _ = ragged(ROWS, 229, 5, dtype, spread=1.0)
    s, ids, logprobs = s[:3], ids[:3], logprobs[:3]
    s.scatter_add_(1, ids.clamp(min=0), torch.full(ids.shape, nats, dtype=dtype) * (ids >= 0))
    run(form, arch, s, ids, logprobs, tail=tail, divergence=name)


@pytest.mark.parametrize("tail,name", [("bucket", "forward_kl"), ("bucket", "reverse_kl"), ("uniform", "reverse_kl")])
def test_teacher_mass_of_one(tail, name):
    """Its floor where the divergence would be infinite; with none that limit, as of a captured tail."""
    s, ids, logprobs = mass_of_one(1e-6)
    for floor in (None, 0.0, 1e-3):
        run("resident", 80, s, ids, logprobs, tail=tail, divergence=name, min_tail=floor)
    tails = torch.tensor([-50.0, -torch.inf])
    run("resident", 80, s, ids, logprobs, tail=tail, divergence=name, tail_logprob=tails)
    run("resident", 80, s, ids, logprobs.bfloat16(), tail=tail, divergence=name, tail_logprob=tails, min_tail=1e-4)


@pytest.mark.parametrize("form", PADDING)
@pytest.mark.parametrize("tail", CODES["tail"])
def test_ragged_rows_as_others_pad_them(tail, form):
    dtype = list(KEYS)[CODES["tail"].index(tail) % 3]
    with Emulator(80).registered():
        test_topk.test_ragged_rows_as_others_pad_them(tail, "skew_reverse_kl", form, dtype, "cuda")


@pytest.mark.parametrize("captured", [-3.0, -torch.inf])
def test_a_row_without_entries_is_all_tail_whatever_its_tail_says(captured):
    with Emulator(80).registered():
        test_topk.test_a_row_without_entries_is_all_tail_whatever_its_tail_says(captured, "reverse_kl", "cuda")


def test_a_distillation_term_of_weight_0_is_not_computed(monkeypatch):
    with Emulator(80).registered():
        test_topk.test_a_distillation_term_of_weight_0_is_not_computed("cuda", monkeypatch)


@pytest.mark.parametrize("kind", ["offset 1e5", "sure 20", "up to 1e9", "up to 1.7e38"])
@pytest.mark.parametrize("tail,name", [("bucket", "reverse_kl"), ("uniform", "forward_kl"), ("drop", "tvd")])
def test_shifted_sure_and_large_logits(tail, name, kind):
    for form, arch in (("cluster2", 90), ("streamed", 80)):
        s, ids, logprobs, labels = of_kind(kind, rows=3, columns=229)
        with Emulator(arch, limits_for(form, 229, 12, s.dtype)).registered():
            no_worse_than_eager(s, ids, logprobs, backend="cuda", tail=tail, divergence=name)
            options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": 0.0 if kind == "up to 1.7e38" else 0.1}
            options |= {"temperature": 2.0, "teacher_temperature": 1.0} if name == "tvd" else {}
            no_worse_than_eager(s, ids, logprobs, labels, backend="cuda", tail=tail, divergence=name, **options)


@pytest.mark.parametrize("tail", CODES["tail"])
def test_minus_infinity_and_nan_logits(tail):
    """-inf on and outside the set, NaN in one row, a row of -inf: nothing leaves its row."""
    s, ids, logprobs, _ = ragged(ROWS, 50, 5, torch.float32)
    s[-1] = 1.0
    s[0, ::3] = -torch.inf
    s[0, ids[0]] = 0.5
    s[1, ids[1, 0]] = torch.nan
    s[2] = -torch.inf
    ids[2] = ids[0]
    logprobs[2] = logprobs[0]
    for form, arch in (("cluster2", 90), ("streamed", 80)):
        with Emulator(arch, limits_for(form, 50, 5, s.dtype)).registered():
            for name in ("forward_kl", "tvd"):
                options = {"tail": tail, "divergence": name, "reduction": "none"}
                got, want = (
                    evaluate(
                        lambda x, b=backend, o=options: kd.topk_kd_loss(x, ids, logprobs, backend=b, **o),
                        s,
                        torch.ones(6),
                    )
                    for backend in ("cuda", "torch")
                )
                assert got[0].isnan().tolist() == [False, True, True, False, False, False]
                rows = [0, 3, 4, 5]
                torch.testing.assert_close(got[0][rows], want[0][rows], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(got[1][rows], want[1][rows], rtol=1e-4, atol=1e-6)
                assert bool(got[1][1, ids[1]].isnan().all())


def test_a_uniform_teacher_has_no_entry_and_all_of_its_mass_in_the_tail():
    """The teacher that stands in for one known by its expectations."""
    s = torch.randn(ROWS, 50) * 3
    ids, logprobs = torch.full((ROWS, 1), -1), torch.full((ROWS, 1), -torch.inf)
    options = {"tail": "uniform", "tail_logprob": torch.zeros(ROWS), "temperature": 2.0, "teacher_temperature": 1.0}
    for form, arch in (("cluster2", 90), ("resident", 90), ("streamed", 80)):
        with Emulator(arch, limits_for(form, 50, 1, s.dtype)).registered():
            loss, grad = evaluate(
                lambda x: kd.topk_kd_loss(x, ids, logprobs, reduction="none", backend="cuda", **options),
                s,
                torch.ones(ROWS),
            )
        logq = torch.log_softmax(s.double() / 2, -1)
        torch.testing.assert_close(loss.double(), -4 * (logq.mean(-1) + math.log(50)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), 2 * (logq.exp() - 1 / 50), rtol=1e-5, atol=1e-6)


def test_an_id_out_of_range_spoils_its_row_only(monkeypatch):
    monkeypatch.setattr("kdkernels.checks.sparse.reads_values", lambda value: False)
    s, ids, logprobs, _ = ragged(ROWS, 50, 5, torch.float32)
    s[-1] = 0.0
    ids[0, 2], ids[1, 0], ids[4, 1] = 50, 2**40, -7
    with Emulator(80).registered():
        for tail in CODES["tail"]:
            options = {"tail": tail, "reduction": "none", "backend": "cuda"}
            loss, grad = evaluate(lambda x, o=options: kd.topk_kd_loss(x, ids, logprobs, **o), s, torch.ones(6))
            assert loss.isnan().tolist() == [True, True, False, False, True, False]
            assert grad.isnan().all(-1).tolist() == loss.isnan().tolist()


@pytest.mark.parametrize("dtype", [*KEYS.values(), torch.float64], ids=[*KEYS, "fp64"])
def test_dtypes_statistics_and_views(dtype):
    """ids of 32 bits, log-probabilities of each dtype; rows of a view, whose gradient lies on other vectors."""
    logits = torch.randn(2, 4, 53)
    logprobs, ids = torch.log_softmax(torch.randn(2, 4, 53), -1).topk(3)
    labels = torch.randint(0, 53, (2, 4))
    labels[1, 2] = -100
    teacher = ids[:, 1:].int(), logprobs[:, 1:].to(dtype), labels[:, 1:]
    options = {"ce_weight": 0.5, "temperature": 2.0, "teacher_temperature": 1.0, "reduction": "none"}

    def results(backend):
        loss, stats = kd.topk_kd_loss(logits[:, :-1], *teacher, return_stats=True, backend=backend, **options)
        again, grad = evaluate(
            lambda x: kd.topk_kd_loss(x[:, :-1], *teacher, backend=backend, **options), logits, torch.ones(2, 3)
        )
        torch.testing.assert_close(loss, again)  # the sums are divided among threads as the gradient lies
        return loss, *stats, grad

    with Emulator(90).registered():
        got = results("cuda")
    torch.testing.assert_close(got, results("torch"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form,arch", [("resident", 80), ("cluster4", 90), ("streamed", 80)])
@pytest.mark.parametrize("tail,name", [("bucket", "forward_kl"), ("uniform", "jsd")])
def test_in_place_and_deterministic(tail, name, form, arch):
    """Rows that do not start on 16 bytes; the same call in place and not gives the same bits.

    In a cluster every block reads the logits of all entries, then a barrier, then each overwrites its share.
    """
    s, ids, logprobs, labels = ragged(ROWS, 229, 5, torch.bfloat16)
    options = {"tail": tail, "divergence": name, "ce_weight": 0.5, "backend": "cuda", **temperatures(tail, 2.0)}
    with Emulator(arch, limits_for(form, 229, 5, s.dtype), check_global_races=form != "cluster4").registered():
        want = evaluate(lambda x: kd.topk_kd_loss(x, ids, logprobs, labels, **options), s, torch.ones(()))
        leaf = s.clone().requires_grad_()
        logits = leaf * 1
        loss = kd.topk_kd_loss(logits, ids, logprobs, labels, inplace=True, **options)
        grad = torch.autograd.grad(loss, logits)[0]
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(loss.detach(), want[0]) and torch.equal(grad.nan_to_num(), want[1].nan_to_num())


def test_ignored_rows_are_not_read():
    s = torch.full((2, 4096), torch.nan, dtype=torch.bfloat16, requires_grad=True)
    with Emulator(90).registered() as emulator:
        loss = kd.topk_kd_loss(
            s, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.full((2,), -100), backend="cuda"
        )
        loss.backward()
    assert loss == 0 and bool((s.grad == 0).all())
    assert emulator.reports[0].global_load_bytes <= 2 * 256 * 8  # each thread looks at the label


def test_scaling_reads_grad_output_on_the_device():
    grad = torch.randn(3, 1, 1003).bfloat16()
    before = grad.clone()
    with Emulator(80).registered() as emulator:
        torch.ops.kdkernels.scale_grad_cuda(grad, torch.ones(()))
        assert emulator.reports[0].global_store_bytes == 0 and torch.equal(grad, before)
        torch.ops.kdkernels.scale_grad_cuda(grad, torch.tensor([2.0, 1.0, -0.5]))
    assert torch.equal(grad, before * torch.tensor([2.0, 1.0, -0.5]).reshape(3, 1, 1).bfloat16())


# The sparse teacher (8 bytes a slot, read by every block) and the entries' own logits and gradients come on top of the
# floor; for rows of these widths all of it is within 3 %.
@pytest.mark.parametrize(
    "arch,reads,columns,dtype",
    [
        (90, 1, 50256, "bf16"),
        (90, 1, 50257, "bf16"),
        (90, 1, 128256, "bf16"),
        (90, 1, 50257, "fp32"),
        (80, 2, 50256, "bf16"),
        (80, 2, 50257, "bf16"),
    ],
    ids=str,
)
def test_traffic(arch, reads, columns, dtype):
    rows, k = 2, 64
    s = torch.randn(rows, columns).to(KEYS[dtype])
    logprobs, ids = torch.log_softmax(torch.randn(rows, columns), -1).topk(k)
    with Emulator(arch).registered() as emulator:
        kd.topk_kd_loss(s.requires_grad_(), ids.int(), logprobs, backend="cuda")
    report, bytes_of_rows = emulator.reports[0], rows * columns * s.element_size()
    assert emulator.plans[0].resident == (reads == 1)
    assert report.global_load_bytes + report.global_store_bytes <= 1.03 * (reads + 1) * bytes_of_rows
    sectors = 32 * (report.load_sectors + report.store_sectors)
    assert sectors <= 1.03 * (reads + 1) * bytes_of_rows
    assert report.unique_load_bytes + report.unique_store_bytes <= 1.03 * 2 * bytes_of_rows
    # All but the ends of the rows and the entries moves 16 bytes at a time.
    wide = 16 * (report.width_hist_ld.get(16, 0) + report.width_hist_st.get(16, 0))
    assert wide >= 0.97 * (reads + 1) * bytes_of_rows


@pytest.mark.parametrize("arch,columns", [(90, 32000), (90, 128256), (80, 32000), (80, 128256)])
def test_instructions(arch, columns):
    """An element, of loss and gradient. The floor is 9.5: docs/internals/cuda.md."""
    s = torch.randn(1, columns).bfloat16()
    logprobs, ids = torch.log_softmax(torch.randn(1, columns), -1).topk(64)
    with Emulator(arch).registered() as emulator:
        kd.topk_kd_loss(s.requires_grad_(), ids.int(), logprobs, backend="cuda")
    assert emulator.reports[0].thread_instr <= 23.5 * columns


def test_plans():
    """Two blocks a multiprocessor; rows on chip up to 262144 columns of bf16 where there are clusters."""
    for columns, blocks in ((32000, 1), (50257, 1), (128256, 4), (151936, 4), (262144, 8)):
        call = planned(columns, 64)
        assert (call.resident, call.plan_cluster) == (1, blocks), columns
        assert 2 * (call.shared_bytes + 1024) <= LIMITS[90][1]
    assert planned(262144, 64, torch.float32).plan_cluster == 16
    assert not planned(1_000_000, 64).resident and planned(32000, 64, limits=LIMITS[80]).resident
    assert planned(100, 64).threads == 32 and planned(128256, 64).threads == 256
