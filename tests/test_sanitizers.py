"""Faults that sanitizers find in seconds; ``scripts/sanitize`` has the long form.

Under them the kernels take the compiler minutes, so that this file has the memory kept between steps alone,
and the flags that a build may have.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import backends, functional
from kdkernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the C++ sources are not here"),
    pytest.mark.skipif(cpu.load_error() is not None, reason=f"no compiled backend: {cpu.load_error()}"),
    pytest.mark.skipif(shutil.which(shlex.split(COMPILER)[0]) is None, reason=f"no compiler {COMPILER}"),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")
def test_the_kept_memory_under_sanitizers(tmp_path):
    """Four threads that take tensors, hand them on and give them back; neither sanitizer has anything to say."""
    environment = {**os.environ, "PYTHON": sys.executable, "CXX": COMPILER}
    done = subprocess.run(
        [ROOT / "scripts" / "sanitize", "shelf", tmp_path], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0 and done.stdout.count("sound; ") == 2, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "fuses"),
    [
        ("-O3 -ffp-contract=fast", True),
        ("-O1 -fexpensive-optimizations -ffp-contract=fast", True),
        ("-O1 -ffp-contract=fast", False),
        ("-O0 -ffp-contract=fast", False),
        ("-O3 -ffp-contract=off", False),
    ],
)
def test_a_build_knows_whether_it_fuses_multiplications_with_additions(tmp_path, flags, fuses):
    """GCC's builds that do not fuse lose up to 1 in a loss, and the library refuses to run them."""
    if cpu.isa() == "baseline":
        pytest.skip("this machine has no AVX2")
    version = subprocess.run([*shlex.split(COMPILER), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip(f"{COMPILER} is not GCC, whose levels of optimisation these are")
    main = tmp_path / "main.cpp"
    main.write_text('#include "contraction.h"\nint main() { return kdk::avx2::contracts() ? 0 : 3; }\n')
    kernels = tmp_path / "kernels.o"
    source, isa = ROOT / "csrc" / "cpu" / "contraction_avx2.cpp", ["-mavx2", "-mfma", "-mf16c"]
    command = [*shlex.split(COMPILER), "-std=c++17", *flags.split(), *isa, "-w", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([*command, "-c", source, "-o", kernels], check=True)
    program = tmp_path / "program"
    include = f"-I{ROOT / 'csrc' / 'cpu'}"
    subprocess.run([*shlex.split(COMPILER), "-std=c++17", main, kernels, include, "-o", program], check=True)
    assert subprocess.run([program]).returncode == (0 if fuses else 3)


def test_a_build_that_does_not_fuse_is_no_backend(monkeypatch):
    """The reason stands where other reasons stand, and "auto" goes to plain PyTorch."""

    class Library:
        def __getattr__(self, name):
            return (lambda: "compiled without fused multiply-adds") if name == "cpu_fault" else getattr(ops, name)

    ops = torch.ops.kdkernels
    cpu.load_error.cache_clear()
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(functional, "_known_calls", {})
    try:
        monkeypatch.setattr(torch.ops, "kdkernels", Library())
        assert cpu.load_error() == cpu.why_not("cpu") == "compiled without fused multiply-adds"
        with pytest.raises(RuntimeError, match="no instruction set is in use: compiled without fused"):
            cpu.isa()
        with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: compiled without fused"):
            kd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), backend="cpu")
    finally:
        monkeypatch.undo()
        cpu.load_error.cache_clear()
    assert cpu.load_error() is None
