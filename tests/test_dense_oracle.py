"""``kd_loss`` against the oracle of ``kdkernels.testing``: shapes, dtypes, temperatures, hard inputs, divergences.

Loss and gradient of every row may err by no more than eager PyTorch in fp32 on the same inputs, plus the margin stated
in ``testing.MARGIN``; every row has a grad_output of its own, and all outputs are allocated full of NaN.
"""

import functools
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from grid import pairwise

import kdkernels as kd
from kdkernels import backends, divergences, testing
from kdkernels.backends import cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Small vocabularies in many rows, large ones in few: every edge of the kernels' tiles and vectors, in seconds.
SHAPES = [(0, 7), (1, 1), (3, 1), (1, 2), (3, 2), (257, 3), (3, 7), (257, 7), (3, 1000), (3, 32000)]
SHAPES += [(1, 50257), (1, 128256)]
# The table with default parameters, and parameters that take other paths.
DIVERGENCES = {name: cls() for name, cls in divergences.table().items()}
DIVERGENCES |= {
    "jsd-0.1": kd.JSD(0.1),
    "skew_kl-0.9": kd.SkewKL(0.9),
    "skew_reverse_kl-0.9": kd.SkewReverseKL(0.9),
    "alpha_beta-0.5-0": kd.AlphaBeta(0.5, 0.0),
    "alpha_beta-0-0.5": kd.AlphaBeta(0.0, 0.5),
}
# Infinite already for probabilities of 0, so for ordinary logits only.
NEGATIVE_POWERS = {"alpha_beta-0.5--0.5": kd.AlphaBeta(0.5, -0.5), "alpha_beta-0-0": kd.AlphaBeta(0.0, 0.0)}

dtypes = pytest.mark.parametrize("dtype", DTYPES)
all_divergences = pytest.mark.parametrize("divergence", DIVERGENCES)
# The mark at the top varies fastest: what is true of a case is then computed once for all backends.
all_backends = pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)


@functools.lru_cache(maxsize=2)
def oracle(kind, num_rows, vocab_size, dtype, divergence, temperature):
    student, teacher = testing.make_inputs(kind, num_rows, vocab_size, DTYPES[dtype])
    chosen = {**DIVERGENCES, **NEGATIVE_POWERS}[divergence]
    return testing.kd_oracle(student, teacher, divergence=chosen, temperature=temperature)


def check(backend, kind, num_rows, vocab_size, dtype, divergence, temperature):
    truth = oracle(kind, num_rows, vocab_size, dtype, divergence, temperature)
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    with testing.poisoned_memory():
        truth.check(lambda s, t: kd.kd_loss(s, t, divergence={**DIVERGENCES, **NEGATIVE_POWERS}[divergence], **options))


@all_backends
@pairwise("divergence,num_rows,vocab_size,dtype", DIVERGENCES, SHAPES, DTYPES)
def test_shapes(num_rows, vocab_size, dtype, divergence, backend):
    check(backend, "normal", num_rows, vocab_size, dtype, divergence, temperature=1.5)


@all_backends
@pairwise("divergence,temperature,dtype", DIVERGENCES, [0.05, 0.5, 2.0, 100.0], DTYPES)
def test_temperatures(temperature, dtype, divergence, backend):
    check(backend, "normal", 5, 1000, dtype, divergence, temperature)


@all_backends
@pairwise(
    "divergence,kind,dtype,temperature",
    DIVERGENCES,
    testing.KINDS,
    [("fp32", 0.05), ("bf16", 0.05), ("fp64", 0.05), ("fp32", 1.0), ("fp16", 1.0)],
)
def test_hard_inputs(kind, dtype, temperature, divergence, backend):
    check(backend, kind, 3, 1000, dtype, divergence, temperature)


@all_backends
@pairwise("divergence,kind,vocab_size", DIVERGENCES, testing.KINDS, [7, 5000])
def test_hard_inputs_in_one_vector_and_in_several_tiles(kind, vocab_size, divergence, backend):
    check(backend, kind, 3, vocab_size, "fp32", divergence, temperature=2.0)


@all_backends
@pytest.mark.parametrize("divergence", NEGATIVE_POWERS)
@dtypes
@pytest.mark.parametrize("temperature", [1.0, 4.0], ids=lambda t: f"T{t:g}")
@pytest.mark.parametrize("shape", [(257, 7), (3, 1000)], ids=["N257-V7", "N3-V1000"])
def test_negative_powers(shape, temperature, dtype, divergence, backend):
    check(backend, "normal", *shape, dtype, divergence, temperature)


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_student_and_teacher_of_different_dtypes(student, teacher, divergence, backend):
    s, t = testing.make_inputs("normal", 5, 300, torch.float64)
    testing.check_kd_loss(s.to(DTYPES[student]), t.to(DTYPES[teacher]), divergence=divergence, backend=backend)


@dtypes
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("width", [1777, 32000, 50257])
def test_a_gradient_too_large_for_the_caches(dtype, divergence, width):
    """Such gradients are written around the caches, from the first aligned element of a row on."""
    if backends.BACKENDS["cpu"].why_not("cpu"):
        pytest.skip(backends.BACKENDS["cpu"].why_not("cpu"))
    itemsize = DTYPES[dtype].itemsize
    rows = (9 << 20) // (width * itemsize) + 1
    s, t = testing.make_inputs("normal", rows, width, torch.float32)
    s, t = s.to(DTYPES[dtype]), t.to(DTYPES[dtype])
    options = {"divergence": divergence, "vocab_size": width - 3, "reduction": "none", "backend": "cpu"}

    def run(s, t):
        return testing.evaluate(lambda s, t: kd.kd_loss(s, t, **options), s, t, torch.ones(len(s)))

    with testing.poisoned_memory():
        whole = run(s, t)
        parts = [run(s[i : i + 8], t[i : i + 8]) for i in range(0, rows, 8)]
    assert all(part.dstudent.nbytes < 8 << 20 <= whole.dstudent.nbytes for part in parts)
    epsilon = testing.allowed_epsilon(DTYPES[dtype])
    torch.testing.assert_close(whole.loss, torch.cat([p.loss for p in parts]), rtol=epsilon, atol=epsilon)
    # TVD's gradient jumps where p and q are equal to rounding.
    jump = 1e-4 if divergence == "tvd" else 0.0
    expected = torch.cat([p.dstudent for p in parts])
    rounding = torch.finfo(DTYPES[dtype]).eps
    # Both runs have errors of their own, in units of the logarithms of what is most likely.
    torch.testing.assert_close(whole.dstudent, expected, rtol=2 * rounding, atol=max(jump, 8 * epsilon))
    assert torch.equal(whole.dstudent[:, -3:], torch.zeros(rows, 3, dtype=DTYPES[dtype]))


@all_divergences
@dtypes
def test_what_is_in_one_row_stays_there(divergence, dtype, backend):
    """A row of NaN or of infinities leaves its neighbours what they are alone."""
    s, t = testing.make_inputs("normal", 12, 700, DTYPES[dtype])
    bad_s, bad_t = s.clone(), t.clone()
    bad_s[1, 3] = bad_t[3, 500] = torch.nan
    bad_s[5, 699] = bad_t[7, 0] = -torch.inf
    bad_s[9] = -torch.inf
    options = {"divergence": DIVERGENCES[divergence], "reduction": "none", "backend": backend}

    def run(s, t):
        with testing.poisoned_memory():
            return testing.evaluate(lambda s, t: kd.kd_loss(s, t, **options), s, t, torch.ones(12))

    good, bad = run(s, t), run(bad_s, bad_t)
    for row in range(12):
        if row in (1, 3, 9):
            assert bad.loss[row].isnan(), row
            # A row of -inf only has no gradient to speak of.
            assert row == 9 or bad.dstudent[row].isnan().all(), row
        elif row not in (5, 7):
            # -inf in a row before it may have put it on another path of the kernel.
            torch.testing.assert_close(bad.loss[row], good.loss[row], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(bad.dstudent[row], good.dstudent[row], rtol=1e-2, atol=1e-6)


@dtypes
@all_divergences
def test_rows_of_minus_infinity_only_are_nan(dtype, divergence, backend):
    s, t = testing.make_inputs("normal", 3, 50, DTYPES[dtype])
    s[0], t[1] = -torch.inf, -torch.inf
    loss = kd.kd_loss(s, t, divergence=DIVERGENCES[divergence], reduction="none", backend=backend)
    assert loss.isnan().tolist() == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_the_same_on_lesser_instruction_sets(isa):
    """Machines without AVX-512, and without any of it, run other code: a part of the grid again with each."""
    reason = backends.BACKENDS["cpu"].why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    here = backends.cpu.isa()
    if here == "baseline":
        pytest.skip("this machine has no AVX2, so that all tests ran on the baseline")
    if isa == here:
        pytest.skip("this machine has no AVX-512, so that all tests ran on AVX2")
    part = "isa_of or ((hard_inputs or different_dtypes or (caches and 1777)) and not torch)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", part]
    done = subprocess.run(
        command, env={**os.environ, "KDKERNELS_CPU_ISA": isa, "EXPECTED_ISA": isa}, capture_output=True, text=True
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 400, done.stdout[-5000:]


def test_isa_of_hard_inputs_is_the_one_asked_for():
    reason = backends.cpu.load_error()
    if reason is not None:
        pytest.skip(reason)
    assert backends.cpu.isa() in os.environ.get("EXPECTED_ISA", "baseline avx2 avx512").split()


# The oracle itself.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_textbook_is_what_people_write(temperature):
    s, t = testing.make_inputs("normal", 6, 40, torch.float64)
    labels = torch.randint(0, 40, (6,))
    logp, logq = F.log_softmax(t / temperature, -1), F.log_softmax(s / temperature, -1)
    p, q, m = logp.exp(), logq.exp(), (0.3 * logp.exp() + 0.7 * logq.exp()).log()
    written = {
        "forward_kl": F.kl_div(logq, p, reduction="batchmean"),
        "reverse_kl": F.kl_div(logp, q, reduction="batchmean"),
        "jeffreys": F.kl_div(logq, p, reduction="batchmean") + F.kl_div(logp, q, reduction="batchmean"),
        "soft_ce": F.cross_entropy(s / temperature, p),
        "tvd": torch.dist(p, q, 1) / 2 / 6,
        kd.JSD(0.3): 0.3 * F.kl_div(m, p, reduction="batchmean") + 0.7 * F.kl_div(m, q, reduction="batchmean"),
        kd.SkewKL(0.3): F.kl_div(m, p, reduction="batchmean"),
        kd.SkewReverseKL(0.7): F.kl_div(m, q, reduction="batchmean"),
        kd.AlphaBeta(2.0, 1.0): -((p**2 * q - (2 * p**3 + q**3) / 3) / 2).sum(-1).mean(),
    }
    for divergence, value in written.items():
        got = testing.textbook_loss(s, t, divergence=divergence, temperature=temperature)
        torch.testing.assert_close(got, value * temperature**2, rtol=1e-12, atol=1e-14)
    hard = testing.textbook_loss(s, t, labels, kd_weight=0.0, ce_weight=2.0, z_loss_weight=0.5, label_smoothing=0.1)
    expected = 2 * F.cross_entropy(s, labels, label_smoothing=0.1) + 0.5 * torch.logsumexp(s, -1).square().mean()
    torch.testing.assert_close(hard, expected, rtol=1e-12, atol=0.0)


def test_the_oracle_sees_what_is_wrong():
    s, t = testing.make_inputs("normal", 4, 100, torch.float32)
    oracle = testing.kd_oracle(s, t, temperature=2.0)

    def loss(s, t, **options):
        return kd.kd_loss(s, t, **{"temperature": 2.0, "reduction": "none", "backend": "torch", **options})

    oracle.check(loss)

    class Lost(torch.autograd.Function):
        """Passes the sum of all grad_output to every row, as a kernel that reads only the first would."""

        @staticmethod
        def forward(ctx, rows):
            return rows.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad[:1].expand_as(grad)

    wrong = {
        "another temperature": lambda s, t: loss(s, t, temperature=2.001),
        "no T^2": lambda s, t: loss(s, t, scale_by_t_squared=False),
        "T^2 in the loss only": lambda s, t: loss(s, t, scale_by_t_squared=False) + 3 * loss(s, t).detach() / 4,
        "another divergence": lambda s, t: loss(s, t, divergence="soft_ce"),
        "16-bit arithmetic": lambda s, t: loss(s.bfloat16(), t.bfloat16()),
        "one grad_output for all": lambda s, t: Lost.apply(loss(s, t)),
        "NaN in one row": lambda s, t: loss(s.masked_fill(torch.arange(400).reshape(4, 100) == 0, torch.nan), t),
    }
    for name, function in wrong.items():
        with pytest.raises(AssertionError):
            oracle.check(function)
            pytest.fail(f"accepted: {name}", pytrace=False)


def test_poisoned_memory_is_nan_and_only_there():
    with testing.poisoned_memory():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        # Memory of the compiled library is poisoned too, kept or not.
        if cpu.load_error() is None:
            for size in (5, 2**22):
                torch.ops.kdkernels.kept_empty([size], torch.float32, "test").zero_()
                assert torch.ops.kdkernels.kept_empty([size], torch.float32, "test").isnan().all()
    if cpu.load_error() is None:
        zeros = torch.ops.kdkernels.kept_empty([2**22], torch.float32, "test").zero_()
        del zeros
        assert not torch.ops.kdkernels.kept_empty([2**22], torch.float32, "test").isnan().any()
    assert not torch.are_deterministic_algorithms_enabled()
