"""The benchmarks measure what they say, and refuse to report on a wrong result."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kdkernels as kd
from kdkernels import backends, divergences
from kdkernels.backends import available

# ruff: noqa: E402  the benchmarks cannot be imported where their own dependencies are not installed
for _package in ("matplotlib", "tabulate"):
    pytest.importorskip(_package, reason=f"{_package} is not installed; the extra 'bench' brings it")

from benchmarks import __main__ as command_line
from benchmarks import eager, measure, parallel, plots, report, runner, worker
from benchmarks.model import DTYPES, SUITES, Absent, Candidate, Case, Outcome, load_suite
from benchmarks.suites import dense
from benchmarks.suites.common import FUSED
from benchmarks.summary import Report, rows

ROOT = Path(__file__).resolve().parent.parent
CASE = Case((6, 130), "fp32")


def eager_candidates():
    listed = dense.make_candidates(CASE)
    return [item for item in listed if isinstance(item, Candidate) and item.family == "eager"]


def run_command(*arguments, pythonpath=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(pythonpath), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", "--allow-plain-torch", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_sharded_vocabulary_is_measured_beside_gathering_it():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.parallel", "--shape", "24x256", "--width", "16", "--rounds", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| logits", "| hidden"))]
    assert [row[1] for row in table] == [name for names in parallel.NAMES.values() for name in names]
    assert all(float(row[2].split()[0]) >= 0 and float(row[-1].strip(" |")) < 1e-3 for row in table)


@pytest.mark.slow
def test_quick_run_writes_table_json_and_plot(tmp_path):
    done = run_command("--quick", "--device", "cpu", "--shapes", "16x512", "--rounds", 3, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "dense.json").read_text())

    assert found["suite"] == "dense" and found["options"]["rounds"] == 3
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["kdkernels"].partition("+")[0] == kd.__version__
    assert found["machine"]["processor"] and found["machine"]["cpus"] >= 1
    [(threads, limits)] = found["limits_gb_per_s"].items()
    assert threads == str(found["machine"]["cpus"]) and min(limits[name] for name in ("read", "copy", "triad")) > 0
    assert os.uname().nodename not in json.dumps(found).split('"')

    assert [result["case"] for result in found["results"]] == ["16x512 fp32"]
    fused = [backend for backend in available("cpu") if backend.name in FUSED]
    for result in found["results"]:
        measured = {row["name"]: row for row in result["candidates"]}
        absent = {item["name"]: item["reason"] for item in result["absent"]}
        expected = {"eager, as written", "eager, log_target", "torch.compile, log_target"}
        expected.add("plain PyTorch, the reference")
        expected |= {"torch.add(s, t, out=g)", "torch.add through autograd", "autograd.Function, no work"}
        for backend in fused:
            mine = {f"kdkernels {backend.name}", f"kdkernels {backend.name}, in place"}
            mine |= {f"{backend.name} kernel, output allocated"}
            if backend.name == "cpu" and backend.ok:
                mine.add("kdkernels cpu, fresh pages")
            assert mine <= set(measured if backend.ok else absent)
            expected |= mine
        assert set(measured) | set(absent) == expected and not set(measured) & set(absent)
        assert all(absent.values())
        for row in measured.values():
            assert len(row["rounds"]) == 3 and min(row["rounds"]) > 0
            assert row["seconds"]["q1"] <= row["seconds"]["median"] <= row["seconds"]["q3"]
        fixed = measured["autograd.Function, no work"]
        assert fixed["of_bandwidth"] is None
        seconds = result["bound"]["floor_seconds"] + fixed["seconds"]["median"]
        assert result["bound"]["seconds"]["median"] == pytest.approx(seconds)
        ratio = np.divide(
            measured["torch.compile, log_target"]["rounds"],
            result["bound"]["floor_seconds"] + np.array(fixed["rounds"]),
        )
        assert result["bound"]["faster_than_compile"]["median"] == pytest.approx(np.median(ratio))

    table = (tmp_path / "dense.md").read_text()
    assert "| eager, as written" in table and "GB/s, " in table
    assert "eager, as written" in done.stdout and "Not run here:" in done.stdout
    assert_is_picture(tmp_path / "dense.png")


def assert_is_picture(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width > 500 and height > 200 and len(data) > 10_000


@pytest.mark.parametrize(
    "arguments",
    [["--shapes", "512"], ["--shapes", "8x16x32"], ["--dtypes", "int8"], ["--threads", "0"], ["--suite", "no.such"]],
)
def test_a_wrong_argument_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {arguments[0]}: " in message and repr(arguments[1]) in message


def test_each_thread_count_and_each_peak_has_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    jobs = []

    def run(job):
        jobs.append(job)
        if job["mode"] == "memory":
            return {"peaks": [5 * 2**20] * len(job["cases"])}
        return {
            "limits": {"measured_by": "nothing", "triad": 25.0},
            "results": [{"candidates": fake_measurements(SECONDS), "absent": []} for _ in job["cases"]],
        }

    monkeypatch.setattr(worker, "run", run)
    sizes = ["--shapes", "256x8192,16x512", "--dtypes", "fp32", "--threads", "1,2"]
    options = ["--device", "cpu", "--allow-plain-torch", "--output-dir", str(tmp_path)]
    assert command_line.main([*options, *sizes]) == 0
    assert [job["threads"] for job in jobs if job["mode"] == "time"] == [1, 2]
    memory = [job for job in jobs if job["mode"] == "memory"]
    listed = dense.make_candidates(Case((256, 8192), "fp32"))
    assert [job["name"] for job in memory] == [item.name for item in listed if isinstance(item, Candidate)]
    # A gradient of 32 kB is too small to be seen, so its case is left out.
    assert all([case["shape"] for case in job["cases"]] == [(256, 8192)] for job in memory)
    assert len(capsys.readouterr().out.split("Forward KL")) == 1 + 4


def test_rounds_of_several_processes_are_pooled(monkeypatch, tmp_path):
    seeds = []

    def run(job):
        seeds.append(job["seed"])
        measured = fake_measurements(SECONDS)
        for candidate in measured:
            candidate["seconds"] = [(1 + len(seeds)) * x for x in candidate["seconds"]]
            candidate["errors"] = {"loss": 1e-7 * len(seeds)}
        return {
            "limits": {"measured_by": "nothing", "triad": 20.0 + len(seeds)},
            "results": [{"candidates": measured, "absent": []}],
        }

    monkeypatch.setattr(worker, "run", run)
    arguments = ["--device", "cpu", "--shapes", "256x8192", "--dtypes", "fp32", "--threads", "1", "--no-memory"]
    arguments.append("--allow-plain-torch")
    assert command_line.main([*arguments, "--processes", "3", "--output-dir", str(tmp_path)]) == 0
    assert len(set(seeds)) == 3
    written = json.loads((tmp_path / "dense.json").read_text())
    assert written["options"]["processes"] == 3
    text = json.dumps(written)
    for seconds in SECONDS.values():
        assert json.dumps([factor * x for factor in (2, 3, 4) for x in seconds])[1:-1] in text
    pooled = command_line.pooled([run({"seed": 0}), run({"seed": 1})])
    assert pooled["limits"]["triad"] == 25.0
    assert all(candidate["errors"]["loss"] == pytest.approx(5e-7) for candidate in pooled["results"][0]["candidates"])


def test_plain_torch_is_not_measured_as_kdkernels_unless_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(backends.cpu, "load_error", lambda: "nobody built it. To have it: run `build it`")
    monkeypatch.setattr(worker, "run", lambda job: pytest.fail("something was measured"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command_line.main(["--quick", "--device", "cpu", "--output-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "on cpu tensors kdkernels runs plain PyTorch here" in said.err and "run `build it`" in said.err
    assert "--allow-plain-torch" in said.err and said.out == "" and not list(tmp_path.iterdir())
    names = {item.name for item in dense.make_candidates(CASE) if isinstance(item, Candidate)}
    assert "plain PyTorch, the reference" in names and not [name for name in names if "kdkernels" in name]


WRONG_SUITE = """
    import dataclasses

    from benchmarks.model import Candidate, Outcome
    from benchmarks.suites import dense


    def make_candidates(case):
        right = dense.make_candidates(case)[0]

        def build():
            run = right.build()

            def wrong(inputs):
                outcome = run(inputs)
                outcome.gradients[0][3, 7] += 0.01
                return outcome

            return wrong

        return [right, Candidate("wrong by one element", right.group, "kdkernels", build)]


    SUITE = dataclasses.replace(dense.SUITE, name="wrong", make_candidates=make_candidates)
"""


@pytest.mark.slow
def test_the_command_refuses_figures_on_a_wrong_gradient(tmp_path):
    (tmp_path / "wrong_suite.py").write_text(textwrap.dedent(WRONG_SUITE))
    output = tmp_path / "output"
    options = ["--quick", "--device", "cpu", "--shapes", "16x64", "--threads", 1, "--output-dir", output]
    done = run_command("--suite", "wrong_suite", *options, pythonpath=tmp_path)
    assert done.returncode == 1
    assert "no figures for suite 'wrong'" in done.stderr
    assert "forward_kl / wrong by one element: worst row of gradient is off by" in done.stderr
    assert "eager, as written:" not in done.stderr
    assert done.stdout == "" and not output.exists()


def scaled(outcome):
    return Outcome(outcome.loss, (outcome.gradients[0] * 1.001,))


def one_row_flipped(outcome):
    outcome.gradients[0][2] *= -1
    return outcome


def one_element_left_out(outcome):
    outcome.gradients[0][5, 129] = float("nan")
    return outcome


def wrong_loss(outcome):
    return Outcome(outcome.loss * 1.001, outcome.gradients)


def no_gradient(outcome):
    return Outcome(outcome.loss, (torch.zeros_like(outcome.gradients[0]),))


@pytest.mark.parametrize("spoil", [scaled, one_row_flipped, one_element_left_out, wrong_loss, no_gradient])
@pytest.mark.parametrize("family", ["eager", "kdkernels"])
def test_the_check_sees_a_wrong_result(spoil, family, monkeypatch):
    right = eager_candidates()[0]
    run = right.build()
    candidate = Candidate("spoilt", right.group, family, lambda: lambda inputs: spoil(run(inputs)))
    suite = dataclasses.replace(dense.SUITE, make_candidates=lambda case: [right, candidate])
    monkeypatch.setattr(runner.gc, "disable", lambda: pytest.fail("a check comes before any timing"))
    with pytest.raises(runner.CheckFailed, match="forward_kl / spoilt: ") as caught:
        runner.measure_time(suite, CASE, rounds=1, seed=0)
    assert right.key not in str(caught.value)


def test_the_check_sees_a_result_that_turns_wrong_while_it_is_timed():
    right = eager_candidates()[0]
    run = right.build()
    count = itertools.count()
    # Right in its first run and in the check before the timing.
    candidate = Candidate(
        "drifting",
        right.group,
        "kdkernels",
        lambda: lambda inputs: (run if next(count) < 2 else lambda i: wrong_loss(run(i)))(inputs),
    )
    suite = dataclasses.replace(dense.SUITE, make_candidates=lambda case: [right, candidate])
    with pytest.raises(runner.CheckFailed, match="forward_kl / drifting: loss"):
        runner.measure_time(suite, CASE, rounds=3, seed=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in SUITES if name != "training"])
def test_every_formulation_computes_what_it_stands_for(name, dtype):
    suite = load_suite(name)
    case = Case((24, 515, 16)[: len(suite.axes)], dtype)
    listed = suite.make_candidates(case)
    # Compiling them takes minutes; what is compiled are these functions.
    built = [(item, item.build()) for item in listed if isinstance(item, Candidate) and item.family != "compile"]
    if not built:
        pytest.skip(f"nothing of the suite runs here: {', '.join(item.reason for item in listed)}")
    assert {item.group for item, _ in built} == {item.group for item in listed}
    errors = runner.check(suite, case, built, suite.make_inputs(case, 0))
    assert set(errors) == {item.key for item, _ in built}


def test_every_divergence_has_eager_formulations():
    assert set(divergences.names()) == set(eager.BEST) == set(eager.AS_WRITTEN)


def test_a_divergence_without_a_formulation_is_listed_as_absent(monkeypatch):
    monkeypatch.setattr(eager, "BEST", {})
    absent = [item for item in load_suite("divergences").make_candidates(CASE) if isinstance(item, Absent)]
    missing = {item.group for item in absent if "eager.py" in item.reason}
    assert missing == set(divergences.names())


def test_rounds_are_shuffled_and_every_candidate_is_timed_once_in_each():
    order: list[str] = []

    def watched(candidate):
        run = candidate.build()

        def watched_run(inputs):
            order.append(candidate.name)
            return run(inputs)

        return dataclasses.replace(candidate, build=lambda: watched_run)

    candidates = [watched(dataclasses.replace(c, name=f"{c.name} {k}")) for k in range(2) for c in eager_candidates()]
    names = sorted(candidate.name for candidate in candidates)
    suite = dataclasses.replace(dense.SUITE, make_candidates=lambda case: candidates)
    found = runner.measure_time(suite, CASE, rounds=12, seed=3)
    assert [len(item["seconds"]) for item in found["candidates"]] == [12] * len(names)
    # First runs and a check come before, a check after.
    timed = order[2 * len(names) : -len(names)]
    rounds = [timed[start : start + len(names)] for start in range(0, len(timed), len(names))]
    assert len(rounds) == 12 + runner.SETTLING_ROUNDS
    assert all(sorted(each) == names for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def fake_measurements(seconds, groups=("forward_kl",)):
    families = {"slow": "eager", "fast": "eager", "compiled": "compile", "ours": "kdkernels", "add": "probe"}
    return [
        {
            "name": name,
            "group": group,
            "family": families[name],
            "seconds": [(1 + index) * value for value in values],
            "first_run_seconds": 1.0,
            "errors": {"loss": 0.0},
        }
        for index, group in enumerate(groups)
        for name, values in seconds.items()
    ]


def synthetic_report(seconds, *, memory=None, groups=("forward_kl",), suite=dense.SUITE):
    measured = fake_measurements(seconds, groups)
    absent = [{"name": "kdkernels triton", "group": "forward_kl", "reason": "no GPU"}]
    limits = {"measured_by": "nothing", "read": 10.0, "copy": 20.0, "triad": 25.0}
    return Report(
        suite=suite,
        machine={
            "processor": "a processor",
            "vector_isa": "none",
            "cpus": 1,
            "system": "none",
            "transparent_huge_pages": "never",
            "load_average_before": 0.0,
        },
        versions={"torch": "0"},
        options={"rounds": 3, "threads": [1], "seed": 0, "device": "cpu"},
        cases=[Case((100, 1000), "fp32")],
        timed={1: {"limits": limits, "results": [{"candidates": measured, "absent": absent}]}},
        memory=memory or {},
        memory_note=None if memory else "not asked for",
    )


SECONDS = {
    "slow": [9.0, 9.0, 9.0],
    "fast": [6.0, 4.0, 8.0],
    "compiled": [3.0, 3.0, 3.0],
    "ours": [1.0, 2.0, 4.0],
    "add": [0.5, 0.5, 0.5],
}


def test_ratios_are_taken_per_round_against_the_fastest_of_a_family():
    memory = {"100x1000 fp32": {"forward_kl / ours": 400_000, "forward_kl / slow": 2_000_000}}
    slow, _, _, ours, add = rows(synthetic_report(SECONDS, memory=memory), Case((100, 1000), "fp32"), 1)
    assert ours.faster_than_eager is not None and ours.faster_than_compile is not None and ours.of_probe is not None
    # Rounds 6/1, 4/2, 8/4: the median is 2, where the ratio of medians would be 3.
    assert ours.faster_than_eager.median == 2.0
    assert ours.faster_than_compile.median == 1.5
    assert ours.of_probe.median == 4.0
    assert (ours.seconds.q1, ours.seconds.median, ours.seconds.q3) == (1.5, 2.0, 3.0)
    assert (ours.peak_units, slow.peak_units) == (1.0, 5.0)
    # 3 x 400 kB at 25 GB/s are 48 microseconds.
    assert ours.of_bandwidth == pytest.approx(48e-6 / 2.0)
    assert add.faster_than_eager is None and ours.of_baseline is None


def test_table_and_plot_of_several_groups(tmp_path):
    suite = dataclasses.replace(dense.SUITE, baseline_group="forward_kl")
    found = synthetic_report(SECONDS, groups=("forward_kl", "jsd"), suite=suite)
    ours = {row.group: row for row in rows(found, found.cases[0], 1) if row.name == "ours"}
    assert ours["jsd"].of_baseline is not None and ours["jsd"].of_baseline.median == 2.0
    lines = report.text(found, tablefmt="github").splitlines()
    [line] = [line for line in lines if re.match(r"\| jsd +\| ours ", line)]
    assert [cell.strip() for cell in line.strip("|").split("|")][2] == "4000.00"
    assert "- kdkernels triton: no GPU" in lines
    assert "Peak memory was not measured: not asked for." in lines
    plots.draw(found, tmp_path / "plot.png")
    assert_is_picture(tmp_path / "plot.png")


@pytest.mark.parametrize("cpus, load, busy", [(2, 0.7, False), (2, 1.0, True), (64, 20.0, False), (64, 40.0, True)])
def test_the_picture_says_that_the_machine_was_busy(cpus, load, busy):
    found = synthetic_report(SECONDS)
    found.machine.update(cpus=cpus, load_average_before=load)
    assert plots.busy(found) == busy


def test_curves_of_several_groups_have_their_names():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    found = [SimpleNamespace(group=name, figures={"losses": [3.0, end]}) for name, end in (("a", 1.0), ("b", 2.0))]
    plots._name_curves(ax, [*found, SimpleNamespace(group="c", figures={})])
    assert {(text.get_text(), text.xy) for text in ax.texts} == {("a", (1, 1.0)), ("b", (1, 2.0))}
    ax = Figure().subplots()
    plots._name_curves(ax, found[:1])
    assert not ax.texts


@pytest.mark.slow
@pytest.mark.parametrize("backend", [item.name for item in available("cpu") if item.name == "cpu"])
def test_peak_memory_of_one_gradient_and_of_none(backend):
    if not measure.peak_can_be_reset():
        pytest.skip("this machine does not let a process reset its peak memory")
    [reason] = [item.reason for item in available("cpu") if item.name == backend]
    if reason:
        pytest.skip(reason)
    case = {"shape": [256, 16000], "dtype": "fp32"}
    unit = dense.SUITE.unit_bytes(Case((256, 16000), "fp32"))
    peaks = {}
    for name in ("eager, as written", f"kdkernels {backend}", f"kdkernels {backend}, in place"):
        job = {"mode": "memory", "suite": "dense", "device": "cpu", "seed": 0, "threads": 1, "cases": [case]}
        [peak] = worker.run({**job, "group": dense.GROUP, "name": name})["peaks"]
        peaks[name] = peak / unit
    assert 3 < peaks["eager, as written"] < 8
    assert 0.9 < peaks[f"kdkernels {backend}"] < 1.1
    assert peaks[f"kdkernels {backend}, in place"] < 0.1


@pytest.mark.slow
def test_a_failing_process_is_an_error_and_not_an_empty_result():
    job = {"mode": "memory", "suite": "dense", "device": "cpu", "seed": 0, "threads": 1}
    with pytest.raises(worker.WorkerFailed, match="ended with status 1"):
        worker.run(
            {**job, "cases": [{"shape": [4, 8], "dtype": "fp32"}], "group": "forward_kl", "name": "no such name"}
        )


def test_seconds_are_seconds(monkeypatch):
    clock = iter(np.arange(0.0, 100.0, 0.25))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    right = eager_candidates()[0]
    suite = dataclasses.replace(dense.SUITE, make_candidates=lambda case: [right])
    [item] = runner.measure_time(suite, CASE, rounds=2, seed=0)["candidates"]
    assert item["seconds"] == [0.25, 0.25]


@pytest.mark.slow
def test_students_trained_with_any_loss_have_one_curve(tmp_path):
    """On the models of the examples."""
    for package in ("tokenizers", "safetensors"):
        pytest.importorskip(package, reason=f"{package} is not installed; the extra 'examples' brings it")
    options = ["--shapes", "128x10,256x8192", "--rounds", 12, "--threads", 1, "--no-memory", "--output-dir", tmp_path]
    done = run_command("--suite", "training", "--device", "cpu", *options)
    assert done.returncode == 0, done.stderr
    digits, models = json.loads((tmp_path / "training.json").read_text())["results"]
    for result in (digits, models):
        students = [row for row in result["candidates"] if row["family"] not in ("probe", "alone")]
        [alone] = [row for row in result["candidates"] if row["family"] == "alone"]
        # A loss of another kind: it has a score beside the others', and is held against none of them.
        assert not alone["errors"] and list(alone["figures"]) == [x for x in students[0]["figures"] if x != "losses"]
        first: dict = {}
        for row in students:
            curve = first.setdefault(row["group"], row["figures"]["losses"])
            # Not the record's own error: from the curves again.
            tolerance = 1e-2 if "cache" in row["name"] else 1e-3
            assert row["figures"]["losses"] == pytest.approx(curve, rel=tolerance) and curve[-1] < 0.6 * curve[0]
            assert len(row["figures"]["losses"]) == 12 + 1 + runner.SETTLING_ROUNDS
            assert set(row["errors"]) == {"first loss", "loss curve"}
        assert len(first) == len({row["group"] for row in students})
    scores = [value for row in models["candidates"] for name, value in row["figures"].items() if "perplexity" in name]
    assert len(scores) == len(students) + 1 and all(1 < score < 8192 / 4 for score in scores)
    assert "accuracy (teacher: 0.9" in done.stdout
    assert_is_picture(tmp_path / "training.png")
    if any(backend.name == "cpu" and backend.ok for backend in available("cpu")) and measure.peak_can_be_reset():
        # The loss of hidden states never stores the logits of either model.
        names = ("eager, log_target", "kdkernels cpu, linear_kd_loss")
        job = {"suite": "training", "device": "cpu", "mode": "memory", "threads": 1, "seed": 0}
        job |= {"cases": [{"shape": [256, 8192], "dtype": "fp32"}], "group": "language models"}
        whole, chunked = (worker.run({**job, "name": name})["peaks"][0] for name in names)
        assert whole - chunked > 3 * 256 * 8192 * 4


@pytest.mark.parametrize("change, agree", [(1.0, True), (1.0005, True), (1.01, False), (float("nan"), False)], ids=str)
@pytest.mark.parametrize("step", [0, 13])
def test_a_curve_that_leaves_the_eager_one_is_wrong(change, agree, step):
    for package in ("tokenizers", "safetensors"):
        pytest.importorskip(package, reason=f"{package} is not installed; the extra 'examples' brings it")
    training = load_suite("training")
    make_run = sys.modules["benchmarks.suites.training"].Training
    curve = [1.0 / (1 + number) for number in range(20)]
    changed = [loss * change if number == step else loss for number, loss in enumerate(curve)]
    runs = []
    for name, family, losses in (("eager", "eager", curve), ("ours", "kdkernels", changed)):
        run = make_run(lambda *_: pytest.fail("nothing is trained"))
        run.losses = [torch.tensor(loss) for loss in losses]
        runs.append((Candidate(name, "digits", family, make_run), run))
    inputs = SimpleNamespace(rest={"digits": torch.tensor(1.0, dtype=torch.float64)})
    if agree and (step or change == 1):
        errors = runner.check(training, CASE, runs, inputs)
        assert errors["digits / ours"]["loss curve"] == pytest.approx(change - 1, abs=1e-6)
        return
    with pytest.raises(runner.CheckFailed, match="digits / ours: ") as caught:
        runner.check(training, CASE, runs, inputs)
    assert "digits / eager" not in str(caught.value)
    assert ("first loss" in str(caught.value)) == (step == 0)
