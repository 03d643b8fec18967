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
    assert "a prediction, not a measurement" in page and "No GPU has run these kernels yet" in page


def device(name):
    return next(device for device in roofline.DEVICES if device.name == name)


def test_prediction():
    H100 = device("H100")
    (floor, same), bound = roofline.predict(roofline.FLOOR, H100)
    assert bound == "memory" and floor == same
    # 3 passes of 2 GiB at 90 % of 3.35 TB/s.
    assert floor == pytest.approx(3 * 2 * 2**30 / (0.9 * 3.35e12) * 1e3)
    assert roofline.predict(roofline.Work(2, 1, instructions=1000.0), H100)[1] == "issue"
    assert roofline.predict(roofline.Work(2, 1, 1.0, transcendental=100.0), H100)[1] == "transcendental"
    twice = dataclasses.replace(H100, terabytes=2 * H100.terabytes)
    assert roofline.predict(roofline.FLOOR, twice)[0].low == pytest.approx(floor / 2)
    for each in roofline.DEVICES:
        for work in roofline.ours(each).values():
            low, high = roofline.predict(work, each)[0]
            assert high >= low >= roofline.predict(roofline.FLOOR, each)[0].low


def test_what_l2_serves_is_not_read_again():
    """Two sweeps of so few rows in flight that they fit cost what one does; of many, nearly both."""
    few, many = (roofline.Work(4, 1, rows=roofline.Rows(1, 1024, resident, 2)) for resident in (1, 64))
    H100, floor = device("H100"), roofline.predict(roofline.FLOOR, device("H100"))[0].low
    large = dataclasses.replace(H100, l2=10_000)
    assert roofline._memory(few, large).high * 1e3 == pytest.approx(floor)
    low, high = roofline._memory(many, H100)
    assert 5 / 3 * floor > high * 1e3 > low * 1e3 > 1.6 * floor


def test_phases_of_a_row():
    """More rows in flight hide them, barriers add to them, and what fetches ahead has no start, latency or end."""
    H200 = device("H200")

    def seconds(**more):
        rows = roofline.Rows(**{"blocks": 16, "threads": 128, "resident": 2, **more})
        return roofline._rows(roofline.Work(2, 1, 22.0, rows=rows), H200)

    one = seconds()
    assert one.low < one.high and seconds(resident=4).low == pytest.approx(one.low * 16 / 33)
    added = seconds(barriers=7)
    # 8192 rows, 16 at a time.
    assert added.low - one.low == pytest.approx(512 * 7 * roofline.CLUSTER_BARRIER.low * 1e-6)
    ahead = seconds(ahead=True, trips=2)
    assert ahead.low == pytest.approx(512 * (22 * 131072 / (16 * 128 * 1.98e9) + 2 * roofline.TRIP.low * 1e-6))


def test_every_time_of_ours_has_an_instruction_count():
    for name, works in roofline.rows():
        if name.startswith("kdkernels"):
            assert all(work.instructions for work in works.values()), name
    by_name = dict(roofline.rows())
    # Rows without a count of an AMD GPU's own have no milliseconds there.
    assert "MI300X" not in by_name["kdkernels topk_kd_loss, Triton"]
    assert "MI300X" not in by_name["Fast-LLM forward/reverse KL"]
    amd = roofline.ours(device("MI300X"))["forward_kl"]
    entry = roofline.budgets()["gfx942/forward_kl"]
    assert amd.instructions == entry["valu"] + 3 * entry["transcendental"]


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
