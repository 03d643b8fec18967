"""The CUDA kernel of capture_topk: compiled by nvcc for sm_80 and sm_90, its PTX executed without a GPU by ptxrun."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import kdkernels as kd

ptxrun = pytest.importorskip("ptxrun", reason="the package ptxrun is not installed")
if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not on PATH", allow_module_level=True)
from ptxrun.nvcc_bridge import compile_cuda  # noqa: E402

INCLUDE = Path(__file__).resolve().parent.parent / "csrc" / "include"
TYPES = {"fp32": ("float", torch.float32), "bf16": ("__nv_bfloat16", torch.bfloat16), "fp16": ("__half", torch.float16)}
SOURCE = "#include <kdkernels/capture.cuh>\n" + "".join(
    f"template __global__ void kdk::capture::capture_topk_kernel<{x}>(const {x}*, int64_t, int64_t, int64_t, int, int, "
    "const float*, int64_t, float, int*, float*, float*);\n"
    for x, _ in TYPES.values()
)
THREADS, SLACK, TILE = 256, 1024, 4096
INF = float("inf")


@functools.cache
def module(arch):
    return compile_cuda(SOURCE, arch=arch, include=[str(INCLUDE)])


def kernel(arch, name):
    mangled = {"fp32": "If", "bf16": "I13__nv_bfloat16", "fp16": "I6__half"}[name] + "E"
    return module(arch)[next(entry for entry in module(arch).kernels if mangled in entry)]


def execute(logits, k, *, arch, name, misaligned=0, temperature=1.0, rows=None, columns=None):
    """The report, and ids, log-probabilities and tails; the first row starts ``misaligned`` elements off a vector."""
    memory = ptxrun.Memory()
    number, width = logits.shape
    bits = logits.view(torch.float32 if name == "fp32" else torch.int16).numpy()
    flat = memory.array(np.concatenate([np.zeros(misaligned, bits.dtype), bits.reshape(-1)]))
    ids, logprobs = memory.empty((number, k), np.int32), memory.empty((number, k), np.float32)
    tail = memory.empty(number, np.float32)
    report = ptxrun.launch(
        kernel(arch, name),
        grid=number,
        block=THREADS,
        args=[flat.ptr + misaligned * bits.itemsize, 0, width, number, columns or width, k]
        + [0 if rows is None else memory.array(rows.numpy()), 1, temperature, ids, logprobs, tail],
        shared_bytes=(k + SLACK + TILE) * 8,
        mem=memory,
    )
    assert report.ok, str(report)
    assert ids.valid.all() and logprobs.valid.all() and tail.valid.all()
    return report, [torch.from_numpy(out.numpy().copy()) for out in (ids, logprobs, tail)]


def check(logits, k, *, arch=90, name="fp32", columns=None, **options):
    report, (ids, logprobs, tail) = execute(logits, k, arch=arch, name=name, columns=columns, **options)
    temperature = options.get("temperature", 1.0) if options.get("rows") is None else options["rows"].double()
    want = kd.capture_topk(logits.double(), k, temperature=temperature, vocab_size=columns, backend="torch")
    assert torch.equal(ids, want.ids)
    torch.testing.assert_close(logprobs.double(), want.logprobs, rtol=1e-6, atol=4e-6, equal_nan=True)
    torch.testing.assert_close(tail.double(), want.tail_logprob, rtol=1e-6, atol=4e-6, equal_nan=True)
    return report


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "name,k,width,misaligned",
    [
        ("fp32", 1, 4101, 1),
        ("fp32", 256, 9001, 0),
        ("bf16", 64, 5003, 3),
        ("bf16", 2048, 9000, 0),
        ("fp16", 5, 7, 1),
        ("fp16", 64, 5000, 0),
    ],
)
def test_against_the_reference(name, k, width, misaligned, arch):
    logits = (torch.randn(2, width) * 3).to(TYPES[name][1])
    check(logits, k, arch=arch, name=name, misaligned=misaligned)


def test_rows_out_of_the_ordinary():
    """Ties, rising rows (every logit is a candidate), -inf, NaN, +inf, tails far below 1, zeros of both signs."""
    v = torch.arange(9003)
    logits = torch.stack(
        [
            torch.zeros(9003),
            v / 100.0,
            torch.where(v % 3000 == 0, v / 1e3, -INF),
            torch.where(v == 8000, torch.nan, 0.0),
            torch.where(v == 5, INF, 0.0),
            torch.full((9003,), -INF),
            torch.where(v % 2000 == 7, 200.0, torch.randn(9003)),
            torch.where(v % 2 == 0, 0.0, -0.0),
            (v % 5).float(),
            torch.where(v > 8500, 95.0 + v / 1e4, torch.randn(9003)),
        ]
    )
    check(logits, 5)
    check(logits[[1, 6, 9]], 300)


def test_temperature_and_padding():
    logits = torch.randn(3, 600)
    check(logits, 9, rows=torch.tensor([0.5, 1.0, 7.0]), columns=500)
    check(logits, 9, temperature=2.0)


# One read of the logits, 16 bytes at a time; V = 50257 leaves the rows at every alignment.
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name,width", [("bf16", 32000), ("bf16", 50257), ("fp32", 32000)])
def test_traffic(name, width, arch):
    logits = (torch.randn(2, width) * 3).to(TYPES[name][1])
    report = check(logits, 64, arch=arch, name=name)
    size = logits.numel() * logits.element_size()
    assert report.global_load_bytes == size
    assert 32 * report.load_sectors <= 1.03 * size
    # The floor is 4.6 of bf16: docs/internals/cuda.md.
    assert name != "bf16" or report.thread_instr <= 24 * logits.numel()
    assert report.global_store_bytes == 2 * (64 * 8 + 4)
