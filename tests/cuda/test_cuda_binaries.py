"""nvcc compiles every kernel as it is shipped; registers and spills are held to a budget."""

import pytest
from emulator import SOURCES, compiled

pytestmark = pytest.mark.slow


# Registers a thread: the most with which two blocks of 256 threads share a multiprocessor (65536 / 2 / 256), eight
# of scale_grad, and two of 128 of the dense kernel that keeps exponentials in registers.
BUDGET = {
    "topk_fwd_kernel": 128,
    "capture_topk_kernel": 128,
    "scale_grad_kernel": 32,
    "dense_held_kernel": 248,
    "dense_swept_kernel": 128,
}
# Files of the binding alone.
WITHOUT_KERNELS = ("dense.cu",)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", SOURCES)
def test_registers_and_spills(source, arch):
    usage = compiled(source, arch)[1]
    assert bool(usage) == (source not in WITHOUT_KERNELS)
    for kernel, (registers, spilled) in usage.items():
        (budget,) = [registers for name, registers in BUDGET.items() if name in kernel]
        assert spilled == 0 and registers <= budget, (kernel, registers, spilled)
