"""The roofline report: its model, and that docs/internals/gpu-performance.md is what the command writes."""

import dataclasses

import pytest

# ruff: noqa: E402  the benchmarks cannot be imported where their own dependencies are not installed
for _package in ("matplotlib", "tabulate"):
    pytest.importorskip(_package, reason=f"{_package} is not installed; the extra 'bench' brings it")

from benchmarks import report, roofline
from benchmarks.model import Absent, Candidate, Case
from benchmarks.runner import check
from benchmarks.suites import gpu
from benchmarks.summary import Report


def test_page_is_up_to_date():
    page = roofline.PAGE.read_text()
    fixed = roofline.section().split("Constants:")
    assert all(part.strip() in page for part in fixed), "run python -m benchmarks.roofline"
    assert "a prediction, not a measurement" in page


def test_prediction():
    H100 = next(device for device in roofline.DEVICES if device.name == "H100")
    floor, bound = roofline.predict(roofline.FLOOR, H100)
    assert bound == "memory"
    # 3 passes of 2 GiB at 90 % of 3.35 TB/s.
    assert floor == pytest.approx(3 * 2 * 2**30 / (0.9 * 3.35e12) * 1e3)
    assert roofline.predict(roofline.Work(2, 1, instructions=1000.0), H100)[1] == "issue"
    assert roofline.predict(roofline.Work(2, 1, 1.0, transcendental=100.0), H100)[1] == "transcendental"
    twice = dataclasses.replace(H100, terabytes=2 * H100.terabytes)
    assert roofline.predict(roofline.FLOOR, twice)[0] == pytest.approx(floor / 2)
    for device in roofline.DEVICES:
        for work in roofline.ours(device).values():
            assert roofline.predict(work, device)[0] >= roofline.predict(roofline.FLOOR, device)[0]


def test_command(tmp_path):
    page, plot = tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text(f"# Before\n\n{roofline.BEGIN}STALE{roofline.END}\n\n## After\n")
    assert roofline.main(["--page", str(page), "--plot", str(plot)]) == 0
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\n## After\n") and "STALE" not in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert roofline.main(["--page", str(page), "--plot", str(plot)]) == 0
    assert page.read_text() == text


def test_gpu_suite_on_the_cpu():
    """Every candidate that needs no compiler computes the right loss and gradient."""
    case = Case((6, 130), "fp32")
    listed = gpu.make_candidates(case)
    runs = [(item, item.build()) for item in listed if isinstance(item, Candidate) and item.family != "compile"]
    errors = check(gpu.SUITE, case, runs, gpu.SUITE.make_inputs(case, 1))
    groups = {candidate.group for candidate, _ in runs}
    assert groups == {*gpu.DIVERGENCES, "forward_kl" + gpu.LOSS_ONLY}
    assert "gradient" not in errors[f"forward_kl{gpu.LOSS_ONLY} / eager, fewest passes"]
    absent = {item.name for item in listed if isinstance(item, Absent)}
    assert {f"Liger {kind}" for kind, *_ in gpu.LIGER.values()} <= absent


def test_results_carry_the_name_of_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(report.plots, "draw", lambda found, path: path.write_bytes(b""))
    monkeypatch.setattr(report, "text", lambda found, tablefmt: "")
    found = Report(gpu.SUITE, {"gpu": "NVIDIA H100 80GB HBM3"}, {}, {"threads": []}, [], {}, {}, None)
    names = [path.name for path in report.write(found, tmp_path)]
    assert names == [f"gpu-nvidia-h100-80gb-hbm3.{kind}" for kind in ("json", "md", "png")]
