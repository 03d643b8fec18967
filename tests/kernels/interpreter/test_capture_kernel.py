"""The kernel of capture_topk by the checks of tests/test_capture.py: rows swept in small tiles, and in registers."""

import math

import pytest
import test_capture
import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.kernels import capture, tuning

INF = math.inf
# Columns, k and dtype; two to five times as many columns as a small tile has.
CASES = [(7, 3, "fp16"), (90, 90, "fp32"), (1100, 1, "bf16"), (1101, 20, "bf16"), (1500, 64, "fp16")]
RISING = torch.arange(1100.0) / 50
ROWS = {
    "equal": torch.zeros(1100),
    "falling": -RISING,
    "zeros of both signs": torch.where(torch.arange(1100) % 3 == 0, 0.0, -0.0),
    "late peaks": torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(2)), torch.full((100,), 90.0)]),
    "mostly -inf": torch.where(torch.arange(1100) % 100 == 0, torch.arange(1100.0) % 7, -INF),
    "one-hot": torch.where(torch.arange(1100) == 17, 300.0, 0.0),
}


@pytest.fixture(params=["sweeps", "kept"], autouse=True)
def small(request, monkeypatch):
    def plan(V, k, *, vec, cut, **_):
        lanes = 32
        if request.param == "kept":
            while V + cut * (vec - 1) > 64 * lanes:
                lanes *= 2
        roll = 16 // vec
        columns = V + cut * (vec - 1)
        tiles = -(-columns // (roll * lanes * vec))
        return tuning.CapturePlan((roll, lanes, vec), 1, tiles if request.param == "kept" else 0)

    monkeypatch.setattr(tuning, "capture_plan", plan)
    return request.param


@pytest.mark.parametrize("columns, k, dtype", CASES)
def test_against_sorting(columns, k, dtype):
    test_capture.test_against_sorting(k, columns, dtype, "triton")


@pytest.mark.parametrize("name", ROWS)
def test_patterns(name, small):
    """Ties and orders that make more candidates than the list has room for."""
    k = 5 if small == "sweeps" else 40
    test_capture.check(torch.stack([ROWS[name], ROWS[name].flip(0)]), k, backend="triton")


def test_many_candidates_are_sorted():
    test_capture.check((torch.randn(1, 700) * 3).half(), 260, backend="triton")


def test_rows_and_views():
    test_capture.test_temperature(torch.tensor([0.5, 1.0, 7.0]), "triton")
    test_capture.test_tail_far_below_one("triton")
    test_capture.test_any_strides_padding_and_no_rows("triton")


def test_rows_without_a_distribution():
    test_capture.test_rows_without_a_distribution("triton")


def test_ids_are_those_of_the_cpu_backend():
    logits = (torch.randn(8, 1100) * 3).bfloat16()
    found, expected = (kd.capture_topk(logits, 33, backend=name) for name in ("triton", "torch"))
    assert torch.equal(found.ids, expected.ids)


def test_auto_takes_it_where_there_is_no_cuda_extension(monkeypatch):
    monkeypatch.setattr(backends.cuda, "why_not", lambda device: "not built")
    for device in ("cuda", "xpu"):
        assert backends.select("auto", device, pattern="capture_topk") == "triton"
    assert backends.select("auto", "cuda", pattern="capture_topk", torch_only="too many") == "torch"


def test_thresholds_are_reached_by_k_peaks():
    """Also where there are fewer peaks than k, and where they are -inf or negative."""
    import triton
    import triton.language as tl

    @triton.jit
    def threshold_kernel(x_ptr, out_ptr, k, SIZE: tl.constexpr):
        tl.store(out_ptr, capture.threshold_of(tl.load(x_ptr + tl.arange(0, SIZE)), k))

    for x in (torch.randn(64) * 1e3, -torch.rand(64), torch.full((64,), -INF), torch.tensor([-INF] * 60 + [1.0] * 4)):
        for k in (1, 4, 63, 64, 65):
            out = torch.empty(1)
            threshold_kernel[(1,)](x, out, k, 64)
            largest = x.sort(descending=True).values
            at = torch.finfo(torch.float32).min if k > 64 else largest[k - 1].clamp(min=torch.finfo(torch.float32).min)
            assert out <= at and out >= at - at.abs() * 2**-7 if k <= 64 else out == at
