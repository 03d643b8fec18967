"""The suite "gpu", whose time is limited: a candidate that fails costs nothing but its own row."""

import dataclasses
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

# ruff: noqa: E402  the benchmarks cannot be imported where their own dependencies are not installed
for _package in ("matplotlib", "tabulate"):
    pytest.importorskip(_package, reason=f"{_package} is not installed; the extra 'bench' brings it")
pytest.importorskip("triton")

from benchmarks import __main__ as command_line
from benchmarks import runner, worker
from benchmarks.model import Candidate, Case, NotHere, Outcome
from benchmarks.suites import common, dense, gpu
from kdkernels.kernels import tuning

CASE = Case((6, 130), "fp32")
RIGHT = next(item for item in dense.make_candidates(CASE) if isinstance(item, Candidate) and item.family == "eager")


def candidates(**functions):
    """Of a name and what it makes of a right outcome."""

    def build(spoil):
        run = RIGHT.build()
        return lambda inputs: spoil(run(inputs))

    return [
        dataclasses.replace(RIGHT, name=name.replace("_", " "), family="kdkernels", build=lambda s=spoil: build(s))
        for name, spoil in functions.items()
    ]


def within(listed, seconds=60.0, rounds=4, **options):
    suite = dataclasses.replace(gpu.SUITE, make_candidates=lambda case: listed)
    return runner.measure_within(suite, CASE, rounds=rounds, seed=0, seconds=seconds, **options)


def test_each_row_stands_alone():
    calls = iter(range(100))

    def raises(outcome):
        raise RuntimeError("an illegal memory access\nand more")

    def absent(outcome):
        raise NotHere("no plan")

    def drifts(outcome):
        return outcome if next(calls) < 4 else Outcome(outcome.loss * 2, outcome.gradients)

    listed = candidates(
        right=lambda outcome: outcome,
        wrong=lambda outcome: Outcome(outcome.loss, (outcome.gradients[0] * 1.01,)),
        raises=raises,
        absent=absent,
        drifts=drifts,
        kdkernels_cuda=raises,
    )
    saved = []
    found = within(listed, without=["cuda"], save=saved.append)
    assert [item["name"] for item in found["candidates"]] == ["right"]
    assert len(found["candidates"][0]["seconds"]) == 4 and found["candidates"][0]["errors"]["loss"] < 1e-6
    failed = {item["name"]: item["reason"] for item in found["failed"]}
    assert failed.keys() == {"wrong", "raises", "drifts"}
    assert failed["raises"] == "RuntimeError: an illegal memory access"
    assert failed["wrong"].startswith("gradient is off by 1") and failed["drifts"].startswith("loss is off by 1")
    absent = {item["name"]: item["reason"] for item in found["absent"]}
    assert absent == {"absent": "no plan", "kdkernels cuda": "left out: cuda"}
    # So far as it had come at each candidate, with one run each.
    assert [len(item["candidates"]) for item in saved] == [1, 1, 1, 1, 2]
    assert all(len(item["seconds"]) == 1 for item in saved[0]["candidates"])


def test_time_that_is_over(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock.now)

    def slow(outcome):
        clock.now += 1.0
        return outcome

    listed = candidates(first=slow, second=slow, third=slow, fourth=slow)
    found = within(listed, seconds=14.0, rounds=50)
    # Three runs each until 0.6 of the time, a round of two settling and one more at least, and the check.
    assert [item["name"] for item in found["candidates"]] == ["first", "second", "third"]
    assert [item["reason"] for item in found["absent"]] == [runner.OVER]
    assert {len(item["seconds"]) for item in found["candidates"]} == {1} and found["failed"] == []


def test_what_a_process_has_saved_is_taken_when_it_is_ended(monkeypatch):
    def run(command, **options):
        if saved:
            with open(command[-1], "w") as file:
                json.dump({"result": {"candidates": ["one"], "absent": [], "failed": []}}, file)
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    saved = True
    found = worker.run({"mode": "within", "threads": 1}, limit=3.0)["result"]
    assert found["candidates"] == ["one"] and found["failed"][0]["reason"] == "the process was ended after 3 s"
    saved = False
    with pytest.raises(worker.WorkerFailed, match="ended after 3 s"):
        worker.run({"mode": "within", "threads": 1}, limit=3.0)


def test_the_command_divides_its_time_and_goes_on(monkeypatch, tmp_path, capsys):
    jobs = []

    def run(job, limit=None):
        jobs.append(job)
        if job["mode"] == "limits":
            return {"limits": {"measured_by": "nothing", "copy": 4300.0}}
        if job["cases"][0]["shape"][0] == 8:
            raise worker.WorkerFailed("it ended with status -11")
        row = {"name": "right", "group": "forward_kl", "family": "kdkernels", "seconds": [0.002] * 3}
        row |= {"first_run_seconds": 1.0, "errors": {"loss": 0.0}}
        return {"result": {"candidates": [row], "absent": [], "failed": []}}

    monkeypatch.setattr(worker, "run", run)
    options = ["--suite", "gpu", "--device", "cpu", "--allow-plain-torch", "--output-dir", str(tmp_path)]
    options += ["--shapes", "4x1000,8x1000,16x1000", "--seconds", "90", "--without", "cuda"]
    assert command_line.main(options) == 1
    assert [job["mode"] for job in jobs] == ["limits", "within", "within", "within"]
    assert [round(job["seconds"], 1) for job in jobs[1:]] == [22.0, 37.0, 82.0]
    assert all(job["without"] == ["cuda"] for job in jobs[1:])
    said = capsys.readouterr().out
    assert said.startswith("copy 4300.0 GB/s") and "of copy" in said
    assert "- 8x1000 bf16, 8x1000 / every candidate: it ended with status -11" in said
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [len(result["candidates"]) for result in written["results"]] == [1, 0, 1]
    assert written["results"][1]["failed"][0]["reason"] == "it ended with status -11"


def test_patterns_are_forced():
    swept, one = tuning.Plan("sweeps", (4, 512, 8), 16), tuning.Plan("cluster", (8, 512, 8), 16)
    for pattern, plan in (("sweeps", swept), ("cluster", one)):
        with gpu.planned(pattern):
            assert tuning.fastest([one, swept], ("key",), None, 0, None, None) == plan
    with gpu.planned("cluster"), pytest.raises(NotHere):
        tuning.fastest([swept], ("key",), None, 0, None, None)
    assert tuning.fastest([swept], ("key",), None, 0, None, None) == swept


def test_inputs_in_blocks_are_like_others(monkeypatch):
    """As on a GPU, whose generator is another: the same numbers in whatever blocks they are made and checked."""
    whole = common.LogitInputs(CASE, 1)
    assert torch.equal(common.LogitInputs(CASE, 1).pristine, whole.pristine)
    want = gpu.expected(whole, "jsd")
    monkeypatch.setattr(common, "CPU_BLOCK", 130 * 4)
    for got, value in zip(gpu.expected(whole, "jsd")[:2], want[:2], strict=True):
        for x, y in zip(*((z,) if isinstance(z, torch.Tensor) else z for z in (got, value)), strict=True):
            torch.testing.assert_close(x, y)
    assert whole.pristine.argmax(1).eq(whole.labels).float().mean() > 0.5
