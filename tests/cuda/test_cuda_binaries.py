"""nvcc compiles every kernel as it is shipped; registers and spills are held to a budget."""

import pytest
from emulator import NAMES, SOURCES, compiled

pytestmark = pytest.mark.slow


# Registers a thread: the most with which two blocks of 256 threads share a multiprocessor (65536 / 2 / 256), eight
# of scale_grad, four of the token kernels (three where they sum the statistics or the tail), and two of 128 of the
# dense kernel that keeps exponentials in registers.
BUDGET = {
    "topk_fwd_kernel": 128,
    "capture_topk_kernel": 128,
    "scale_grad_kernel": 32,
    "token_bwd_kernel": 64,
    "dense_held_kernel": 248,
    "dense_swept_kernel": 128,
}
BUDGET |= {
    f"token_fwd_kernelI{dtype}Lb{entropy}ELb{stats}ELb{tail}E": 80 if stats or tail else 64
    for dtype in NAMES.values()
    for entropy in (0, 1)
    for stats in (0, 1)
    for tail in (0, 1)
}
# Files of the binding alone.
WITHOUT_KERNELS = ("dense.cu",)


CASES = [(source, arch) for source in SOURCES for arch in (80, 90)]
CASES += [("tokens.cu", 100), ("tokens.cu", 120)]


@pytest.mark.parametrize(("source", "arch"), CASES)
def test_registers_and_spills(source, arch):
    usage = compiled(source, arch)[1]
    assert bool(usage) == (source not in WITHOUT_KERNELS)
    for kernel, (registers, spilled) in usage.items():
        (budget,) = [registers for name, registers in BUDGET.items() if name in kernel]
        assert spilled == 0 and registers <= budget, (kernel, registers, spilled)
