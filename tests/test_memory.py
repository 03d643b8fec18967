"""Peak memory of forward and backward, each measured in a process of its own, in units of one [N, V] gradient."""

import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels import backends

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, torch, kdkernels as kd
from benchmarks import measure
inplace, dtype = sys.argv[1] == "inplace", getattr(torch, sys.argv[2])
N, V = 128, 131072
def run(student, teacher):
    kd.kd_loss(student, teacher, temperature=2.0, inplace=inplace, backend="cpu").backward()
run(torch.randn(2, V).to(dtype).requires_grad_(), torch.randn(2, V).to(dtype))  # scratch and libraries
student = torch.randn(N, V).to(dtype).requires_grad_()
teacher = torch.randn(N, V).to(dtype)
before = measure.reset_peak("cpu")
run(student, teacher)
print((measure.peak("cpu") - before) / (student.numel() * student.element_size()))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(a.ok and a.name == "cpu" for a in backends.available("cpu")),
    reason="needs Linux's /proc and the C++ extension",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "most"), [("fresh", 1.1), ("inplace", 0.1)])
def test_peak_memory(mode, most, dtype):
    command = [sys.executable, "-c", SCRIPT, mode, dtype]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= most
