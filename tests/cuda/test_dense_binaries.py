"""The machine code of the dense CUDA kernels, and how many blocks of it a multiprocessor holds."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
pytest.importorskip("triton", reason="triton is not installed")

from dense_emulator import HELD, SOURCES, DenseCall, plan
from emulator import CSRC, DTYPES, LIMITS, need

pytestmark = pytest.mark.slow

KERNEL = """
#include "kdkernels/dense.cuh"
using namespace kdk::cuda;
template __global__ void kdk::cuda::dense_held_kernel<__nv_bfloat16, Held::{name}>(
    const __grid_constant__ DenseLaunch);
"""
# Of forward KL and JSD in bf16: registers a thread at most. Two blocks of 128 threads need 255 or less.
REGISTERS = {"kForwardKl": 216, "kJsd": 240}


@pytest.mark.parametrize("name", REGISTERS)
@pytest.mark.parametrize("arch", [80, 90])
def test_no_fence_of_the_gpu_and_no_barrier_of_the_cluster_in_a_row(name, arch, tmp_path):
    from launches import sass

    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    source.write_text(KERNEL.format(name=name))
    command = [need("nvcc"), "-cubin", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, f"-I{CSRC / 'include'}", "-o", cubin, source], capture_output=True, text=True, check=True
    )
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert int(re.search(r"Used (\d+) registers", done.stderr)[1]) <= REGISTERS[name]
    found = Counter(sass(cubin.read_bytes()))
    assert not [operation for operation in found if operation.startswith("MEMBAR") and "GPU" in operation]
    # That of the launch, after the barriers in shared memory are made.
    assert sum(count for operation, count in found.items() if "UCGABAR_WAIT" in operation) == (arch == 90)
    # The reductions, the gradient's bulk store, and the beginning; hard terms have a reduction of their own.
    assert sum(count for operation, count in found.items() if operation.startswith("BAR.SYNC")) <= 8


# (columns, dtype, compute capability): blocks of a row, their threads, stages, how it comes, and blocks that a
# multiprocessor holds.
PLANS = {
    (1000, "bf16", 90): (1, 32, 2, "bulk", 9),
    (8192, "bf16", 90): (1, 128, 2, "bulk", 2),
    (32000, "bf16", 90): (4, 128, 2, "bulk", 2),
    (50257, "bf16", 90): (8, 128, 2, "copies", 2),
    (128256, "bf16", 90): (16, 128, 2, "bulk", 2),
    (152064, "bf16", 90): (16, 160, 2, "bulk", 1),
    (262144, "bf16", 90): (16, 256, 2, "bulk", 1),
    (128256, "fp32", 90): (16, 128, 2, "bulk", 1),
    (1000, "bf16", 80): (1, 32, 2, "copies", 9),
    (8192, "bf16", 80): (1, 128, 2, "copies", 2),
    (16384, "bf16", 80): (1, 256, 2, "copies", 1),
    (32000, "bf16", 80): (1, 256, 1, "copies", 1),
    (50257, "bf16", 80): (1, 256, 1, "streamed", 2),
}


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plans(case):
    columns, dtype, arch = case
    call = DenseCall(batch=1, length=4096, columns=columns, width=columns, kd_weight=1.0, multiprocessors=132)
    code = DTYPES[{"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]]
    call.student_dtype = call.teacher_dtype = code
    for name in ("student", "teacher", "dstudent"):
        setattr(call, name, 1 << 20)
        setattr(call, f"{name}_stride_l", columns)
    call.shared_per_block, call.shared_per_multiprocessor, call.cluster = LIMITS[arch]
    plan(call)
    registers = 216 if HELD[call.held] else 128
    # The system takes 1 KB of shared memory of each.
    by_registers = 65536 // (registers * call.threads)
    blocks = min(by_registers, LIMITS[arch][1] // (call.shared_bytes + 1024))
    assert (call.plan_cluster, call.threads, call.stages, SOURCES[call.source], blocks) == PLANS[case]


def test_few_rows_are_spread_over_the_multiprocessors():
    def blocks(rows, columns):
        call = DenseCall(batch=1, length=rows, columns=columns, width=columns, kd_weight=1.0, multiprocessors=132)
        call.student_dtype = call.teacher_dtype = DTYPES[torch.bfloat16]
        call.shared_per_block, call.shared_per_multiprocessor, call.cluster = LIMITS[90]
        plan(call)
        return rows * call.plan_cluster

    assert [blocks(rows, 32000) for rows in (1, 8, 16, 64, 4096)] == [16, 128, 128, 256, 4 * 4096]
    assert blocks(16, 152064) == 256
