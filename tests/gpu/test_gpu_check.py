"""The control flow of scripts/gpu-check, rehearsed with a stub for each program that it starts, and what it reads.

The stub interpreter writes what the real programs write: JUnit reports, lines of calls, the suite's JSON. It fails,
hangs or crashes where a test asks for that.
"""

import dataclasses
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from one_call import CALLS, check, lacking

import kdkernels as kd
from benchmarks import evidence, gpu_check, machine
from kdkernels import ops, testing

STUB = """#!{python} -SE
import json, os, signal, subprocess, sys, time
arguments, plan = sys.argv[1:], json.loads(os.environ["STUB"])
kinds = {{"benchmarks.machine": "about", "setup.py": "build", "pytest": "pytest", "tests/gpu/one_call.py": "call",
         "benchmarks": "measure"}}
kind = next(kinds[word] for word in arguments[:2] if word in kinds)
name = kind + "".join(" " + word for word in ("cuda", "triton") if any(word in x for x in arguments[2:] if "/" in x))
name += "".join(" " + arguments[n + 1] for n, word in enumerate(arguments) if word == "--backend")
def log(what):
    with open(plan["log"], "a") as file:
        file.write(json.dumps([what, name, time.time(), arguments, os.environ.get("TORCH_CUDA_ARCH_LIST")]) + "\\n")
log("begin")
does = plan.get(name, plan.get(kind, ""))
if does == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    log(child.pid)
    time.sleep(600)
if does == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if does.startswith("beside "):
    # Until the other has begun, too.
    for _ in range(400):
        if json.dumps(does[7:]) in open(plan["log"]).read():
            break
        time.sleep(0.05)
if kind == "about":
    print(plan["about"])
if kind == "pytest" and does != "nothing written":
    report = next(x for x in arguments if x.startswith("--junitxml=")).partition("=")[2]
    inside = {{"fail": "<failure message='wrong by 1'/>", "skip": "<skipped message='no such thing'/>"}}.get(does, "")
    with open(report, "w") as file:
        file.write(f"<testsuites><testsuite><testcase classname='a' name='b'>{{inside}}</testcase></testsuite>"
                   "</testsuites>")
if kind == "call":
    print("begin x", "wrong x: by 1" if does == "fail" else "ok x", "absent y: not built", sep="\\n")
if kind == "measure":
    folder = arguments[arguments.index("--output-dir") + 1]
    os.makedirs(folder)
    with open(folder + "/gpu-card.json", "w") as file:
        json.dump(plan["measured"], file)
log("end")
sys.exit(plan["status"] if kind == "about" else does == "fail")
"""
SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift 2; done
"$@"; code=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $code
"""
ABOUT = {"machine": {"gpu": "NVIDIA H200"}, "capability": "9.0", "limits_gb_per_s": {"copy": 4300.0}}
NAMES = [step.name for step in gpu_check.steps(gpu_check.ROOT, "cuda", "9.0")]


def suite(ours=0.9, theirs=1.0, cases=("8192x128256 bf16", "16x152064 bf16")):
    def row(name, median):
        return {"name": name, "group": "forward_kl", "seconds": {"median": median}}

    rows = [row("kdkernels cuda", ours), row("kdkernels triton", theirs)]
    return {"results": [{"case": case, "candidates": rows} for case in cases]}


def program(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Runs gpu-check on a stub that does as it is told; returns its status, the file, and the log of the stubs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "commit", lambda named: {"commit": "0" * 40, "changed": False})
    python, real = program(tmp_path / "python", STUB.format(python=sys.executable)), gpu_check.steps
    limits = {}

    def shorter(step):
        limit = limits.get(step.name, step.limit)
        return dataclasses.replace(step, limit=limit, least=min(step.least, limit))

    monkeypatch.setattr(gpu_check, "steps", lambda *given: [shorter(step) for step in real(*given)])

    def run(*arguments, sanitizer=True, about=ABOUT, status=0, measured=None, limit=(), **does):
        if sanitizer:
            program(tools / "compute-sanitizer", SANITIZER)
        limits.update(limit)
        log = tmp_path / "log"
        plan = {"log": str(log), "status": status, "measured": measured or suite()}
        plan["about"] = json.dumps(about) if isinstance(about, dict) else about
        monkeypatch.setenv("STUB", json.dumps(plan | {name.replace("_", " "): what for name, what in does.items()}))
        code = gpu_check.main(["--python", python, *arguments])
        files = list((tmp_path / "results").glob("*.json"))
        calls = [
            SimpleNamespace(what=w, name=n, at=t, arguments=a, archs=x) for w, n, t, a, x in map(json.loads, open(log))
        ]
        return code, json.loads(files[0].read_text()) if files else None, calls

    return run


def statuses(found):
    return {record["name"]: record["status"] for record in found["steps"]}


def test_everything_passes(rehearse):
    code, found, calls = rehearse(build="beside pytest triton", pytest_triton="beside build")
    assert code == 0 and found["card"] == "NVIDIA H200" and statuses(found) == dict.fromkeys(NAMES, "passed")
    begun = {call.name: call.at for call in calls if call.what == "begin"}
    ended = {call.name: call.at for call in calls if call.what == "end"}
    took = {record["name"]: record["seconds"] for record in found["steps"]}
    assert took["build"] < found["seconds"] / 2
    # The build is for the card alone, runs beside the Triton tests, and is waited for.
    assert [call.archs for call in calls if call.name == "build"] == ["9.0", "9.0"]
    assert begun["pytest triton"] < ended["build"] and begun["build"] < ended["pytest triton"]
    assert begun["call cuda"] > ended["build"]
    steps = {record["name"]: record for record in found["steps"]}
    assert steps["cuda, memcheck"]["sanitizer"] == "ERROR SUMMARY: 0 errors"
    assert steps["triton tests"]["passed"] == 1 and steps["cuda, one call of each"]["skipped"] == {"y": "not built"}
    assert evidence.why_not(found) == []
    assert str(gpu_check.ROOT) not in json.dumps(found)


def test_a_build_that_fails_costs_the_cuda_steps_alone(rehearse):
    code, found, _ = rehearse(build="fail")
    assert code == 1
    for record in found["steps"]:
        wanted = "failed" if record["name"] == "build" else "not started" if "cuda" in record["name"] else "passed"
        assert record["status"] == wanted, record
    assert found["steps"][NAMES.index("cuda tests")]["reason"] == "build did not pass"
    assert "build: failed" in evidence.why_not(found)


def test_a_step_that_hangs_is_ended_with_all_that_it_started(rehearse):
    code, found, calls = rehearse(call_triton="hang", limit={"triton, one call of each": 1, "triton, memcheck": 1})
    assert code == 1
    assert [name for name, status in statuses(found).items() if status == "timed out"] == [
        "triton, one call of each",
        "triton, memcheck",
    ]
    for child in (call.what for call in calls if isinstance(call.what, int)):
        for _ in range(50):
            state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout
            if not state.strip() or state.startswith("Z"):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {child} outlived its step")
    # A backend that does not come back is not measured.
    [measure] = (call for call in calls if call.name == "measure" and call.what == "begin")
    assert measure.arguments[-4:] == ["--seconds", "160", "--without", "triton"]


@pytest.mark.parametrize("how", ["fail", "crash", "skip", "nothing written"])
def test_the_outcome_of_tests(rehearse, how):
    _, found, _ = rehearse("--only", "cuda tests;build;graphs", pytest_cuda=how)
    record = found["steps"][1]
    assert statuses(found)["graphs"] == "passed" and record["tail"] is not None
    status, reason = {
        "fail": ("failed", "it ended with status 1"),
        "crash": ("failed", f"it ended with status {-signal.SIGSEGV}"),
        "skip": ("nothing ran", "no such thing"),
        "nothing written": ("failed", "its results cannot be read: "),
    }[how]
    assert record["status"] == status and record["reason"].startswith(reason)
    assert how != "fail" or record["failed"] == {"a::b": "wrong by 1"}


def test_a_tool_that_is_not_there(rehearse):
    code, found, _ = rehearse(sanitizer=False)
    assert code == 0
    missing = [record for record in found["steps"] if record["status"] == "not started"]
    assert {record["reason"] for record in missing} == {"compute-sanitizer is not on PATH"} and len(missing) == 3
    assert evidence.why_not(found) == []


def test_no_device(rehearse, capsys):
    code, found, calls = rehearse(about="torch 2.13.0 finds no CUDA device", status=gpu_check.NO_DEVICE)
    assert (code, found) == (2, None) and {call.name for call in calls} == {"about"}
    assert "finds no CUDA device; --device cpu rehearses" in capsys.readouterr().err


def test_time_that_later_steps_need_is_kept_for_them(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock.now)

    class Slow:
        """Takes all that it is given."""

        def __init__(self, step, record, limit, *_):
            self.record, self.limit, self.code = record, limit, 0

        def wait(self):
            clock.now += self.limit
            self.record |= {"status": "passed", "seconds": self.limit}

        def end(self):
            pass

    monkeypatch.setattr(gpu_check, "_Process", Slow)
    plan = [
        gpu_check.Step(name, [], limit, least) for name, limit, least in [("a", 60, 5), ("b", 90, 5), ("c", 50, 20)]
    ]
    run = gpu_check.Run(sys.executable, tmp_path, 100.0, lambda records: None)
    run.all([*plan, gpu_check.Step("d", [], 10)])
    got = {record["name"]: record.get("seconds", record.get("reason")) for record in run.records}
    assert got == {"a": 60, "b": 15, "c": 20, "d": 5} and clock.now == 100
    run.one(gpu_check.Step("e", [], 10))
    assert run.records[-1] == {"name": "e", "status": "not started", "reason": "the time was over"}


@pytest.mark.parametrize(
    "measured, reason",
    [
        (suite(ours=1.2), "8192x128256 bf16, forward_kl: 1.20 of Triton's time"),
        (suite(ours=1.01), "in the mean it takes 1.01 of Triton's time"),
        ({"results": [*suite()["results"], {"case": "1x1 bf16", "candidates": []}]}, None),
        ({"results": []}, "both were measured at 0 of 0 shapes"),
    ],
)
def test_results_that_are_no_evidence(rehearse, measured, reason):
    _, found, _ = rehearse("--only", "build;measure", measured=measured)
    reasons = evidence.why_not(found)
    assert {"cuda tests: not run", "graphs: not run"} < set(reasons)
    assert reason is None or reason in reasons
    assert "the sources were changed after their commit" in evidence.why_not({**found, "changed": True})
    assert "nobody knows of which commit" in evidence.why_not({**found, "commit": "unknown"})
    assert "no GPU took part" in evidence.why_not({**found, "device": "cpu"})


def test_auto_takes_dense_losses_of_cuda_as_soon_as_committed_results_show_them_faster():
    shown = [path.name for path in evidence.committed() if not evidence.why_not(json.loads(path.read_text()))]
    by_name_only = "cuda" in ops.BY_NAME_ONLY.get("dense_fwd", {})
    assert by_name_only == (not shown), f"{shown or 'no results'} beside kdkernels.ops.BY_NAME_ONLY"


def test_reports_of_pytest_are_read(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('why not')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('none')\n"
        "def test_error(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_it.py"]
    subprocess.run(
        command, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    )
    found = gpu_check.read_tests(report)
    assert found["passed"] == 1 and found["skipped"] == {"why not": 1}
    assert {name: "1 == 2" in why for name, why in found["failed"].items()} == {
        "test_it::test_bad": True,
        "test_it::test_error": False,
    }


def test_every_file_with_a_test_for_a_gpu_is_run():
    planned = {word for step in gpu_check.steps(gpu_check.ROOT, "cuda", "9.0") for word in step.command}
    for path in (gpu_check.ROOT / "tests").rglob("test_*.py"):
        name, text = path.relative_to(gpu_check.ROOT).as_posix(), path.read_text()
        # The calls of test_calls.py are those of one_call.py.
        if "pytest.mark.gpu" in text and name not in ("tests/gpu/test_gpu_check.py", "tests/gpu/test_calls.py"):
            assert name in planned
    assert {"tests/kernels/test_gpu.py", "tests/gpu/test_graphs.py", "tests/test_linear.py"} < planned


def test_what_is_asked_of_a_machine(monkeypatch, capsys):
    """Of a stub GPU; and without one that there is none."""
    monkeypatch.setattr(sys, "argv", ["machine", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.main() == gpu_check.NO_DEVICE and "finds no CUDA device" in capsys.readouterr().out
    card = SimpleNamespace(
        name="NVIDIA H200", total_memory=141 << 30, L2_cache_size=60 << 20, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "limits", lambda device, threads: {"copy": 4300.0})
    assert machine.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["gpu"] == "NVIDIA H200" and found["capability"] == "9.0" and found["devices"] == 2
    assert found["limits_gb_per_s"] == {"copy": 4300.0}


@pytest.mark.parametrize("call", [call for call in CALLS if call.columns < 60000], ids=lambda call: call.name)
def test_the_calls_are_right_on_the_cpu(call):
    reason = lacking(call, "cpu", "cpu")
    if reason is not None:
        pytest.skip(reason)
    assert check(call, "cpu", "cpu") is None
    # A result that is wrong is noticed.
    broken = call._replace(run=lambda x, backend: [y * (1 + 0.1 * (backend == "cpu")) for y in call.run(x, backend)])
    assert check(broken, "cpu", "cpu") is not None


def test_truth_in_float64_on_a_device_that_users_are_refused():
    student, teacher = (torch.randn(3, 50, device="meta", dtype=torch.float64) for _ in range(2))
    with pytest.raises(TypeError, match="float64 on the CPU only"):
        kd.kd_loss(student, teacher, backend="torch")
    with testing.float64_anywhere():
        assert kd.kd_loss(student, teacher, backend="torch").dtype == torch.float64
    with pytest.raises(TypeError, match="float64 on the CPU only"):
        kd.kd_loss(student, teacher, backend="torch")


def test_the_gpu_tests_run_to_their_end_on_a_stub_device(compiled_cpu):
    """Some of them, on the CPU's kernels: a slip in a test shows here, and not in the first minutes on a GPU."""
    environment = {**os.environ, "PYTHONPATH": f"{gpu_check.ROOT}:{gpu_check.ROOT / 'tests/gpu'}"}
    tests = ["tests/gpu/test_calls.py", "tests/cuda/test_dense_gpu.py", "tests/cuda/test_topk_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-p", "stub_device", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests]
    command += ["-k", "1001 or mse or dkd or 61-bucket-fp32 or 7-fp32 or (stream and device)"]
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\b\d+ passed", done.stdout), done.stdout[-2000:]
