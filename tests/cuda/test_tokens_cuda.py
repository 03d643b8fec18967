"""The CUDA kernels of token log-probabilities, as PTX of sm_80 and sm_90, through the public functions.

Every launch is also checked for accesses out of bounds, reads of what nobody wrote, and races; see emulator.py.
"""

import math

import pytest
import test_tokens
import torch

pytest.importorskip("ptxrun", reason="ptxrun is not installed")

from emulator import Emulator
from test_tokens import N, V, check, check_stats, tokens, with_the_largest

import kdkernels as kd
from kdkernels import backends, ops

pytestmark = pytest.mark.slow

INF = math.inf
DTYPES = {name: dtype for name, dtype in test_tokens.DTYPES.items() if name != "fp64"}


@pytest.fixture(params=[80, 90])
def arch(request):
    return request.param


@pytest.fixture
def emulator(arch):
    with Emulator(arch).registered() as emulator:
        yield emulator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80], indirect=True)
def test_every_width(dtype, emulator):
    """A row that ends, and rows that begin, anywhere in 128 bytes; one, some and all ids; the entropy or not."""
    widths = [*range(1, 20), 31, 33, 63, 65, 127, 129, 257, 511, 1000, 2047, 4096, 4097]
    for i, columns in enumerate(widths):
        k = (None, 1, 3)[i % 3]
        logits = (torch.randn(N, columns) * 3).to(DTYPES[dtype])
        check(logits, tokens(k, columns=columns), backend="cuda", with_entropy=i % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows(dtype, emulator):
    """Whole batches of vectors, and those that fill none: with a row's begin and end on any vector."""
    for columns, width in ((8192, 8192), (50257, 50257), (20483, 20500)):
        whole = (torch.randn(2, width + 3) * 3).to(DTYPES[dtype])
        logits = whole[:, 3:]
        ids = torch.tensor([[0, columns - 1, 17], [columns // 2, -1, columns // 2]])
        check(logits, ids, backend="cuda", vocab_size=columns, atol=1e-5)


@pytest.mark.parametrize("k", [64, 700])
def test_many_ids_among_them_equal_ones(k, emulator):
    ids = torch.randint(0, 3001, (N, k))
    ids[0] = 7
    check(torch.randn(N, 3001), ids, backend="cuda", atol=5e-4)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", test_tokens.OPTIONS)
def test_options(name, k, emulator):
    test_tokens.test_options(name, k, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 17, 1000, 9001])
def test_statistics(dtype, columns, emulator):
    logits = (torch.randn(N, columns) * 3).to(DTYPES[dtype])
    check_stats(logits, with_the_largest(tokens(3, columns=columns), logits), "cuda")


@pytest.mark.parametrize("name", ["rows", "softcap", "padding", "all"])
def test_statistics_with_options(name, emulator):
    test_tokens.test_statistics_with_options(name, "cuda")


CORNERS = [
    test_tokens.test_any_shape_and_strides,
    test_tokens.test_no_rows,
    test_tokens.test_rows_without_a_token_are_not_read,
    test_tokens.test_a_token_of_logit_minus_infinity_has_a_finite_gradient,
    test_tokens.test_rows_without_a_distribution_are_nan,
    test_tokens.test_large_logits,
    test_tokens.test_a_temperature_per_row_is_no_loop_over_rows,
    test_tokens.test_a_loss_scale_reaches_an_fp16_gradient_before_it_is_rounded,
    test_tokens.test_statistics_of_ties_and_of_logits_of_minus_infinity,
    test_tokens.test_statistics_of_rows_without_a_token_or_a_distribution,
    test_tokens.test_a_gathered_tail_far_below_one,
    test_tokens.test_gathering_what_was_captured_gives_the_same,
    test_tokens.test_gathering_from_rows_without_a_distribution,
]


@pytest.mark.parametrize("corner", CORNERS, ids=lambda test: test.__name__.removeprefix("test_"))
def test_corners(corner, emulator):
    corner("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, columns", [(1, 1), (3, 7), (64, 1000), (200, 4101)])
def test_gathered_log_probabilities_and_tail(dtype, k, columns, emulator):
    test_tokens.test_gathered_log_probabilities_and_tail(dtype, k, columns, "cuda")


def test_a_tail_of_a_row_that_is_marked_in_parts():
    logits = torch.randn(2, 270_003).bfloat16()
    ids = torch.tensor([[0, 131_071, 131_072, 270_002], [200_000, -1, 5, 131_073]])
    with Emulator(80).registered():
        found = kd.gather_logprobs(logits, ids, backend="cuda")
    expected = kd.gather_logprobs(logits.double(), ids, backend="torch")
    torch.testing.assert_close(found.logprobs.double(), expected.logprobs, rtol=4e-6, atol=1e-5)
    torch.testing.assert_close(found.tail_logprob.double(), expected.tail_logprob, rtol=4e-6, atol=2e-6)


def test_a_tail_beside_the_entropy_takes_a_launch_of_its_own(emulator):
    logits, ids = torch.randn(3, 300), torch.tensor([[1, 2], [3, -1], [-1, -1]])
    numbers, choices = [1.0, 0.0], [-100, 1, 1, 1]
    options = {"vocab_size": 300, "numbers": numbers, "choices": choices}
    found = torch.ops.kdkernels.token_fwd_cuda(logits[None], ids, None, **options)
    expected = torch.ops.kdkernels.token_fwd_cpu(logits[None], ids, None, **options)
    for index in (0, 1, 2, 3, 5):
        torch.testing.assert_close(found[index], expected[index], rtol=4e-6, atol=4e-6)
    assert len(emulator.reports) == 2


def test_an_id_out_of_range_spoils_its_slot_and_its_gradient(emulator, monkeypatch):
    """On a GPU ids are not read before the launch."""
    monkeypatch.setattr("kdkernels.checks.rows.reads_values", lambda value: False)
    ids = torch.tensor([[V, 1], [2, -2], [10**6, 3], [2**62, 0], [-(2**63), 0], [3, 4]])
    leaf = torch.randn(N, V, requires_grad=True)
    found, stats = kd.token_logprobs(leaf, ids, return_stats=True, backend="cuda")
    found.logprobs.sum().backward()
    bad = (ids < 0) | (ids >= V)
    assert torch.equal(found.logprobs.isnan(), bad) and torch.isfinite(found.lse).all()
    assert not stats.is_argmax[bad].any()
    assert torch.equal(leaf.grad.isnan().all(-1), bad.any(-1)) and torch.equal(leaf.grad.isnan().any(-1), bad.any(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_place_gives_the_same_bits(dtype, emulator):
    """Over rows of a view that begin on no 16 bytes, with padding; what lies between the rows stays."""
    whole = (torch.randn(2, 4, 700) * 2).to(DTYPES[dtype])
    before = whole.clone()
    logits = whole[:, 1:, 3:604].requires_grad_()
    ids = torch.randint(0, 590, (2, 3, 4))
    options = {"entropy": True, "vocab_size": 590, "softcap": 30.0, "backend": "cuda"}
    grads = []
    for leaf, inplace in ((before[:, 1:, 3:604].requires_grad_(), False), (logits, True)):
        found = kd.token_logprobs(leaf, ids, inplace_backward=inplace, **options)
        grads.append(torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), leaf)[0])
    before = before.detach()
    assert torch.equal(*grads) and grads[1].data_ptr() == logits.data_ptr()
    assert torch.equal(whole[:, 0], before[:, 0])
    assert torch.equal(whole[..., :3], before[..., :3]) and torch.equal(whole[..., 604:], before[..., 604:])


def test_rows_that_nothing_asks_for_are_not_read():
    logits = torch.full((3, 4096), torch.nan, dtype=torch.bfloat16)
    leaf = logits.requires_grad_()
    with Emulator(90).registered() as emulator:
        found = kd.token_logprobs(leaf, torch.tensor([-1, -100, -1]), entropy=True, backend="cuda")
        (found.logprobs.sum() + found.entropy.sum()).backward()
        masked = kd.token_logprobs(torch.zeros(3, 4096, requires_grad=True), torch.tensor([1, 2, 3]), backend="cuda")
        (masked.logprobs * 0).sum().backward()
    assert not found.logprobs.any() and not found.entropy.any() and not leaf.grad.any()
    assert all(16 not in emulator.reports[index].width_hist_ld for index in (0, 1, 3))


# The ids, their logits and a few numbers a row come on top of the floor.
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("columns, dtype", [(50256, "bf16"), (50257, "bf16"), (131072, "fp32"), (151937, "fp16")])
def test_traffic_and_instructions(columns, dtype, entropy, emulator):
    """Forward one read, backward one read and one write, 16 bytes at a time and whole sectors, whatever the width."""
    rows = 2
    logits = (torch.randn(rows, columns) * 3).to(DTYPES[dtype]).requires_grad_()
    found = kd.token_logprobs(logits, torch.randint(0, columns, (rows,)), entropy=entropy, backend="cuda")
    (found.logprobs.sum() + (found.entropy.sum() if entropy else 0)).backward()
    forward, backward = emulator.reports[:2]
    once = rows * columns * logits.element_size()
    for report, writes in ((forward, 0), (backward, 1)):
        assert once - 64 * rows <= report.unique_load_bytes <= once + 256 * rows
        assert 32 * report.load_sectors <= 1.015 * once
        assert 32 * report.store_sectors <= 1.005 * writes * once + 32 * 8 * rows
        assert 16 * report.width_hist_ld[16] >= once - 64 * rows
        assert 16 * report.width_hist_st.get(16, 0) >= writes * (once - 64 * rows)
    each, both = (n / (rows * columns) for n in (forward.thread_instr, forward.thread_instr + backward.thread_instr))
    # Of fp16 the PTX has moves that take no instruction on a GPU.
    assert each < (10.5 if entropy else 8) + (dtype == "fp16") and both < 25


def test_it_is_asked_for_by_name_and_by_auto():
    assert not any("cuda" in ops.LACKING.get(pattern, {}) for pattern in ("token_fwd", "token_bwd"))
    with Emulator(80).registered() as emulator:
        assert backends.select("cuda", "cpu", pattern="token_fwd") == "cuda"
        kd.token_logprobs(torch.randn(2, 50), torch.tensor([1, 2]), backend="cuda")
    assert len(emulator.reports) == 1


@pytest.mark.parametrize("k", [None, 3])
def test_from_hidden_states(k, emulator):
    """Chunks of logits through both kernels, the gradient over the logits; rows without a token are left out."""
    hidden, weight = torch.randn(N, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    ids, results = tokens(k), {}
    for backend in ("cuda", "torch"):
        options = {
            "entropy": True,
            "return_stats": True,
            "temperature": 0.7,
            "chunk_bytes": 4 * V * 4,
            "backend": backend,
        }
        found, stats = kd.linear_token_logprobs(hidden, weight, ids, **options)
        grads = torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), (hidden, weight))
        results[backend] = (*(item.detach() for item in (*found, *stats)), *grads)
    torch.testing.assert_close(results["cuda"], results["torch"], rtol=1e-5, atol=2e-5)
    assert len(emulator.reports) == (2 if k is None else 4)  # of one chunk, or two
