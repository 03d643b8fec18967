"""The kernel of operands that change how rows are read, compiled and executed by ptxrun: clean, and with the traffic
that it was built for."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("ptxrun", reason="the package ptxrun, which executes PTX on the CPU, is not installed")

from launches import mapped
from ptxrun.triton_bridge import patched

from kdkernels.kernels import mapped as kernel
from kdkernels.kernels import tuning

pytestmark = pytest.mark.slow

SECTOR = 32
# (B, L, V), dtype, whether the rows are neighbours, options; reads of the student and of the teacher, in passes.
CASES = {
    "segmentation": ((2, 32, 19), torch.float32, True, {}, (1, 1)),
    "150-classes": ((1, 16, 150), torch.bfloat16, True, {"divergence": "jsd", "param0": 0.5}, (1, 1)),
    "detection": ((1, 64, 70), torch.float32, True, {}, (2, 2)),
    "detection-jsd": ((1, 64, 70), torch.float32, True, {"divergence": "jsd", "param0": 0.5}, (3, 3)),
    "log-probs": ((1, 1, 2048), torch.float32, False, {"student_form": "log_probs"}, (1, 1)),
    "log-probs-wide": ((1, 1, 5000), torch.float32, False, {"student_form": "log_probs"}, (1, 2)),
}


@pytest.mark.parametrize("name, arch", [*((name, 90) for name in CASES), ("segmentation", 80)])
def test_traffic(name, arch, monkeypatch):
    # Rows of 70 classes as those of 300: in several tiles.
    monkeypatch.setattr(kernel, "WIDEST", 64 if name.startswith("detection") else 256)
    (B, L, V), dtype, neighbours, options, (of_student, of_teacher) = CASES[name]
    shape = (B, V, L) if neighbours else (B, L, V)
    student, teacher = (torch.randn(shape).mul(2).to(dtype) for _ in range(2))
    if neighbours:
        student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
    gradient = torch.full_like(student, torch.nan)
    with mock.patch.object(tuning, "architecture", lambda device: arch), patched(arch) as run:
        loss, _ = mapped(student, teacher, gradient, **options)
    (report,) = run.reports
    assert report.ok, report
    one = B * L * V * student.element_size()
    assert report.global_load_bytes == (of_student + of_teacher) * one
    assert report.global_store_bytes == one + 4 * B * L
    # Neighbours fill whole sectors.
    assert report.load_sectors <= 1.03 * (of_student + of_teacher) * one / SECTOR
    assert report.store_sectors <= 1.03 * (one + 4 * B * L) / SECTOR + B * L
    p, q = (x.double().softmax(-1) for x in (teacher, student))
    if options == {}:
        expected = (p * (p.log() - q.log())).sum(-1).reshape(-1)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(gradient.double(), q - p, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and loss.isfinite().all()
