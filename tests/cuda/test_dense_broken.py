"""The tests of the dense CUDA kernels can fail: each slip in a copy of the sources is seen by the emulator's checks."""

import shutil

import pytest
import torch

pytest.importorskip("ptxrun", reason="ptxrun is not installed")

import ptxrun
from dense_emulator import DenseEmulator
from emulator import CSRC, need
from ptxrun.nvcc_bridge import compile_cuda

pytestmark = pytest.mark.slow

KERNEL = """
#include "kdkernels/dense.cuh"
using namespace kdk::cuda;
template __global__ void kdk::cuda::dense_held_kernel<__nv_bfloat16, Held::kForwardKl>(
    const __grid_constant__ DenseLaunch);
"""
# Text of a header of the dense kernels, and the slip that takes its place.
SLIPS = {
    "none": ("", ""),
    "no wait for a stage": ("barrier_wait<false>(team.full(stage), unsigned(uses / launch.plan.stages) & 1);", ""),
    "wrong parity of a stage": (
        "unsigned(uses / launch.plan.stages) & 1",
        "unsigned(uses / launch.plan.stages + 1) & 1",
    ),
    "a stage used again too early": ("fetch(next, stage ^ 1);", "fetch(next, stage);"),
    "the gradient's stores not waited for": (
        "if (bulk && args.wants_grad && team.thread == 0) bulk_stores_have_read();\n    fetch(next, stage ^ 1);",
        "fetch(next, stage ^ 1);",
    ),
    "no fence before the gradient leaves": ("publish_to_bulk_copies();", ""),
    "no barrier before the gradient leaves": ("publish_to_bulk_copies();\n        __syncthreads();", ""),
    "one slot for all reductions": ("round % kReductionSlots", "0 * (round % kReductionSlots)"),
    "wrong parity of a reduction": ("round / kReductionSlots & 1", "round / kReductionSlots + 1 & 1"),
    "too few bytes expected": ("(blocks - 1) * warps * int(sizeof(T))", "(blocks - 1) * int(sizeof(T))"),
    "no barrier after the barriers are made": (
        "if (blocks > 1) {\n        cluster_arrive_relaxed();\n        cluster_wait();\n      } else {",
        "if (blocks == 1) {",
    ),
    "stores not complete at the end": ("if (bulk && team.thread == 0) bulk_stores_done();", ""),
}
# Operations complete as late or as early as they may, or blocks and warps fall behind at random.
SCHEDULES = ({"late": True}, {"late": False}, {"seed": 1}, {"seed": 2, "late": False})
IN_EVERY_SCHEDULE = ("none", "no wait for a stage", "wrong parity of a stage", "a stage used again too early")
IN_EVERY_SCHEDULE += ("no fence before the gradient leaves",)


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_seen(slip, tmp_path):
    need("nvcc")
    include = shutil.copytree(CSRC / "include", tmp_path / "include")
    if slip != "none":
        before, after = SLIPS[slip]
        (header,) = [path for path in (include / "kdkernels").glob("*.cuh") if before in path.read_text()]
        text = header.read_text()
        assert text.count(before) == 1
        header.write_text(text.replace(before, after))
    compiled = compile_cuda(KERNEL, arch="90a", include=[include])
    student, teacher = (torch.randn(6, 12288).bfloat16() for _ in range(2))
    for schedule in SCHEDULES if slip in IN_EVERY_SCHEDULE else SCHEDULES[:1]:
        emulator = DenseEmulator(90, multiprocessors=4 * 6, compiled=compiled, **schedule)
        seen = None
        try:
            emulator(student, [teacher], torch.empty_like(student))
        except (AssertionError, ptxrun.PTXError) as error:
            seen = str(error)
        assert emulator.plans[0].plan_cluster == 4 and emulator.plans[0].stages == 2
        assert (seen is None) == (slip == "none"), (schedule, seen)
