"""The kernels of token log-probabilities in the interpreter, through the public functions."""

import math

import pytest
import torch
from oracle import ROUNDING

import kdkernels as kd
from kdkernels import ops
from kdkernels.kernels import tokens as kernels

N = 6
INF = math.inf
PER_ROW = torch.linspace(0.5, 3.0, N)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def evaluate(logits, ids, backend, **options):
    """Results and gradient, of upstream gradients of either sign."""
    leaf = logits.detach().clone().requires_grad_()
    found = kd.token_logprobs(leaf, ids, entropy=True, backend=backend, **options)
    upstream = [torch.linspace(-1.5, 2, x.numel(), dtype=x.dtype).reshape(x.shape) for x in found[:2]]
    (grad,) = torch.autograd.grad(found[:2], leaf, upstream)
    return *(item.detach() for item in found[:3]), grad


def check(logits, ids, atol=4e-6, **options):
    """Against the reference in fp64 on the same numbers."""
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact.pop("inplace_backward", None)
    *values, grad = evaluate(logits, ids, "triton", **options)
    *expected, dlogits = evaluate(logits.double(), ids, "torch", **exact)
    for found, value in zip(values, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), value, rtol=4e-6, atol=atol, equal_nan=True)
    smallest = 2**-24 if logits.dtype == torch.float16 else 0.0
    rtol = ROUNDING[logits.dtype] + 4e-6
    torch.testing.assert_close(grad.double(), dlogits, rtol=rtol, atol=atol + smallest, equal_nan=True)
    return (*values, grad)


def some_ids(k, columns):
    """Ids with every kind of slot; the second row has none."""
    ids = torch.randint(0, columns, (N,) if k is None else (N, k))
    ids[1] = -100
    if k is None:
        ids[3] = -1
    elif k > 1:
        ids[0, 1], ids[2, 0], ids[4, -1] = ids[0, 0], -1, -100
        ids[5] = ids[5, 0]
    return ids


@pytest.mark.parametrize("columns", [1, 257, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(dtype, columns, small_tiles):
    for k in (None, 3):
        check((torch.randn(N, columns) * 3).to(DTYPES[dtype]), some_ids(k, columns))


OPTIONS = {
    "rows": {"temperature": PER_ROW},
    "softcap": {"softcap": 5.0},
    "padding": {"vocab_size": 600},
    "padding-in-place": {"vocab_size": 600, "inplace_backward": True},
    "all": {"temperature": PER_ROW, "softcap": 20.0, "vocab_size": 601, "ignore_index": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, small_tiles):
    ids = some_ids(5, 600)
    if name == "all":
        ids[ids == -100] = 3
    *_, grad = check(torch.randn(N, 1216) * 3, ids, **OPTIONS[name])
    if "vocab_size" in OPTIONS[name]:
        assert not grad[:, OPTIONS[name]["vocab_size"] :].any()


@pytest.mark.parametrize("columns", [1, 257, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype, columns, small_tiles):
    """With ties, -inf, padding and temperatures per row; against the reference in fp64."""
    logits = (torch.randn(N, columns) * 3).to(DTYPES[dtype])
    logits[2, columns // 2] = -INF
    logits[4] = logits[4].round()
    ids = some_ids(3, columns)
    ids[[0, 4, 5], 2] = logits[[0, 4, 5]].argmax(-1)
    padded = torch.cat([logits, torch.full((N, 3), torch.nan, dtype=logits.dtype)], 1)
    options = {
        "vocab_size": columns,
        "return_stats": True,
        "entropy": True,
        "softcap": 40.0 if columns == 257 else None,
    }
    found, stats = kd.token_logprobs(padded, ids, temperature=PER_ROW, backend="triton", **options)
    truth = kd.token_logprobs(padded.double(), ids, temperature=PER_ROW.double(), backend="torch", **options)
    expected, of_truth = truth
    for value, exact in zip(stats[:2], of_truth[:2], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=4e-6, atol=4e-6, equal_nan=True)
    assert torch.equal(stats.is_argmax, of_truth.is_argmax) and stats.is_argmax[[0, 4, 5], 2].all()
    torch.testing.assert_close(found.entropy.double(), expected.entropy, rtol=4e-6, atol=4e-6, equal_nan=True)


def test_statistics_of_rows_without_a_distribution(small_tiles):
    logits = torch.randn(5, 700)
    logits[0, 7], logits[1, 3], logits[2], logits[3] = torch.nan, INF, -INF, torch.nan
    ids = torch.tensor([[7, 2], [3, 1], [0, 1], [-1, -100], [4, 2]])
    _, stats = kd.token_logprobs(logits, ids, return_stats=True, backend="triton")
    assert stats.log_sum_squares[:3].isnan().all() and stats.mean_logit[:3].isnan().all()
    assert not stats.is_argmax[:4].any() and not stats.log_sum_squares[3] and not stats.mean_logit[3]
    assert torch.isfinite(stats.log_sum_squares[4]) and torch.isfinite(stats.mean_logit[4])


def test_in_place_over_views(small_tiles):
    whole = torch.randn(2, 4, 700)
    before = whole.clone()
    logits = whole[:, 1:, :601].requires_grad_()
    ids = torch.randint(0, 601, (2, 3, 4))
    found = kd.token_logprobs(logits, ids, entropy=True, inplace_backward=True, backend="triton")
    (grad,) = torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), logits)
    copy = before[:, 1:, :601].clone().requires_grad_()
    again = kd.token_logprobs(copy, ids, entropy=True, backend="torch")
    (expected,) = torch.autograd.grad(again.logprobs.sum() + again.entropy.sum(), copy)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(whole[:, 0], before[:, 0]) and torch.equal(whole[..., 601:], before[..., 601:])


def test_many_ids_among_them_equal_ones(small_tiles):
    logits, ids = torch.randn(N, 900), torch.randint(0, 900, (N, 300))
    check(logits, ids, atol=2e-5)


def test_corners(small_tiles):
    """-inf in logits and picks, rows without a token that hold NaN, rows without a distribution, large logits."""
    logits = torch.randn(N, 700)
    logits[:3, ::4] = -INF
    logits[3], logits[4, 650] = -INF, torch.nan
    ids = torch.tensor([[4, 1], [-1, -100], [8, 8], [0, 1], [1, 2], [699, 0]])
    logits[1] = torch.nan
    logprobs, entropy, lse, grad = evaluate(logits, ids, "triton")
    assert logprobs[0, 0] == -INF and (logprobs[2] == -INF).all()
    assert torch.isfinite(grad[[0, 1, 2, 5]]).all() and torch.isfinite(entropy[[0, 1, 2, 5]]).all()
    assert not (logprobs[1].any() or entropy[1] or lse[1] or grad[1].any())
    for item in (logprobs, entropy, lse, grad):
        assert item[3:5].isnan().all()
    # The same with -inf alone is exact; a token of probability 0 has no finite value to compare.
    logits = torch.where(torch.arange(700) % 4 == 0, -INF, torch.randn(N, 700))
    check(logits, torch.tensor([[5, 1], [-1, -100], [9, 9], [2, 1], [1, 3], [699, 2]]))
    check(torch.randn(N, 700).round() + torch.tensor([1e4, -1e4, 8192.0, -8192.0, 9e3, 0.0])[:, None], ids, atol=2e-3)
    for dtype in DTYPES.values():
        largest = torch.finfo(dtype).max
        extreme = torch.full((2, 700), -largest, dtype=dtype)
        extreme[:, 600] = largest
        extreme[1, 2] = largest
        logprobs, entropy, lse, grad = evaluate(extreme, torch.tensor([600, 2]), "triton")
        assert logprobs.tolist() == pytest.approx([0.0, -math.log(2)], abs=1e-6)
        assert entropy.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
        assert torch.isfinite(grad).all() and torch.isfinite(lse).all()


def test_an_id_out_of_range_spoils_its_slot_and_its_gradient(small_tiles):
    """On a GPU ids are not read before the launch."""
    logits = torch.randn(N, 700)
    ids = torch.tensor([[700, 1], [2, -2], [10**6, 3], [2**62, 0], [-(2**63), 0], [3, 4]])
    options = {"temperature": 1.0, "softcap": 0.0, "ignore_index": -100, "entropy": False}
    options |= {"tail_mass": False, "stats": False}
    logprobs, _, lse, _, norm, _ = kernels.token_fwd(logits, ids, None, vocab_size=700, **options)
    bad = (ids < 0) | (ids >= 700)
    assert torch.equal(logprobs.isnan(), bad) and torch.isfinite(lse).all()
    grad = torch.full_like(logits, torch.nan)
    kernels.token_bwd(logits, ids, norm, None, torch.ones(N, 2), None, grad, None, vocab_size=700, **options)
    assert torch.equal(grad.isnan().all(-1), bad.any(-1)) and torch.equal(grad.isnan().any(-1), bad.any(-1))


def test_rows_without_an_upstream_gradient_are_not_read(small_tiles):
    logits = torch.randn(N, 700)
    ids = torch.randint(0, 700, (N, 2))
    leaf = logits.clone().requires_grad_()
    found = kd.token_logprobs(leaf, ids, entropy=True, backend="triton")
    mask = (torch.arange(N) % 2 == 0).float()
    ((found.logprobs.sum(-1) + found.entropy) * mask).sum().backward()
    assert not leaf.grad[1::2].any() and leaf.grad[::2].abs().amax(-1).min() > 0


def test_what_a_kernel_cannot_do_is_refused():
    logits = torch.randn(N, 50, requires_grad=True)
    ids = torch.zeros(N, dtype=torch.int64)
    found = kd.token_logprobs(logits, ids, entropy=True, backend="triton")
    with pytest.raises(RuntimeError, match='backend="torch"'):
        torch.autograd.grad(found.logprobs.sum(), logits, create_graph=True)
    upstream = torch.eye(N)
    (batched,) = torch.autograd.grad(found.entropy, logits, upstream, is_grads_batched=True, retain_graph=True)
    for row in range(N):
        (one,) = torch.autograd.grad(found.entropy, logits, upstream[row], retain_graph=True)
        torch.testing.assert_close(batched[row], one)
    with torch.no_grad():
        logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.logprobs.sum().backward()


@pytest.mark.parametrize("columns, k", [(1, 1), (300, 7), (20000, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_tails(dtype, columns, k, small_tiles):
    """20000 columns are more than the 4096 for which a lane has bits at a time."""
    logits = (torch.randn(3, columns) * 3).to(DTYPES[dtype])
    ids = torch.randint(0, columns, (3, k))
    ids[0, 0], ids[1], ids[2] = -1, -1, logits[2].topk(k).indices
    for options in ({}, {"temperature": torch.tensor([0.5, 1.0, 2.0]), "softcap": 10.0, "vocab_size": columns}):
        found = kd.gather_logprobs(logits, ids, backend="triton", **options)
        exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        expected = kd.gather_logprobs(logits.double(), ids, backend="torch", **exact)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.logprobs.double(), expected.logprobs, rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(found.tail_logprob.double(), expected.tail_logprob, rtol=4e-6, atol=4e-6)


def test_a_gathered_tail_far_below_one():
    logits = torch.randn(5, 500)
    logits[:4, 100:103] += torch.tensor([10.0, 60.0, 300.0, 3000.0])[:, None]
    logits[4] = -INF
    found = kd.gather_logprobs(logits, torch.tensor([[102, 100, 101]] * 5), backend="triton")
    expected = kd.gather_logprobs(logits.double(), torch.tensor([[102, 100, 101]] * 5), backend="torch")
    torch.testing.assert_close(found.tail_logprob.double(), expected.tail_logprob, rtol=4e-6, atol=1e-4, equal_nan=True)
    assert found.tail_logprob[3] < -2000 and found.tail_logprob[4].isnan()
    everything = kd.gather_logprobs(torch.zeros(1, 4), torch.arange(4)[None], backend="triton")
    assert everything.tail_logprob.tolist() == [-INF]


def test_both_ops_are_there():
    assert not any("triton" in ops.LACKING.get(pattern, {}) for pattern in ("token_fwd", "token_bwd"))
