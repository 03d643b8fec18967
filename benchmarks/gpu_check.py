"""``scripts/gpu-check``: the first minutes on a GPU in one command, and one file of what they showed.

Builds the CUDA extension for the card while the Triton tests run, then tests, calls each kernel once, measures,
captures graphs, and looks for accesses out of bounds. Each step is a process with a limit of its own; one that fails,
hangs or cannot be had is recorded and the next one goes on. The file is written after every step.

This module imports nothing but the standard library: it runs where a step's packages are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
SCHEMA = 1
TAIL_LINES = 30
# The exit status of a compute-sanitizer that found something; the calls themselves end with other numbers.
SANITIZER_FOUND = 86
# The status of benchmarks.machine where there is no device to look at.
NO_DEVICE = 3


@dataclass(frozen=True)
class Step:
    """A process, and what it needs.

    Args:
        command: after the interpreter, or with a tool of its own before it.
        limit: seconds.
        least: seconds that are kept for it while earlier steps run; with less it is not started.
        after: steps that must have passed, and are waited for.
        tool: a program that runs the command.
        background: the next step begins beside it.
        read: the results of a step that ended, from its output; None has none.
        more: arguments that follow from the records of earlier steps and the seconds it has.
    """

    name: str
    command: Sequence[str]
    limit: float
    least: float = 5.0
    after: Sequence[str] = ()
    tool: Sequence[str] = ()
    background: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    read: Optional[Callable[[str], dict[str, Any]]] = None
    more: Optional[Callable[[list[dict[str, Any]], float], list[str]]] = None


def steps(folder: Path, device: str, capability: str) -> list[Step]:
    """The plan, most valuable first. A rehearsal on the CPU ("cpu") runs the same one."""

    def tests(name: str, paths: Sequence[str], limit: float, **more: Any) -> Step:
        report = folder / f"{name.replace(' ', '-')}.xml"
        # A test that hangs shows where.
        command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
        command += [f"--junitxml={report}", *paths]
        return Step(name, command, limit, read=lambda output: read_tests(report), **more)

    def one_call(name: str, backend: str, limit: float, **more: Any) -> Step:
        command = ["tests/gpu/one_call.py", "--device", device, "--backend", backend]
        command += ["--compiled"] if "tool" in more else []
        return Step(name, command, limit, read=read_calls, **more)

    # torch's allocator hides the ends of tensors from the sanitizer.
    bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    memcheck, racecheck = (
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND))
        for tool in ("memcheck", "racecheck")
    )
    measure = ["-m", "benchmarks", "--suite", "gpu", "--device", device]
    measure += ["--output-dir", str(folder / "measured")] + (["--quick"] if device == "cpu" else [])
    files = gpu_tests()
    return [
        Step(
            "build",
            ["setup.py", "build_ext", "--inplace"],
            limit=220,
            background=True,
            environment={"KDKERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability},
        ),
        tests("triton tests", [path for path in files if path.startswith("tests/kernels/")], 170),
        one_call("triton, one call of each", "triton", 60),
        one_call("cuda, one call of each", "cuda", 40, after=["build"]),
        tests("cuda tests", [path for path in files if path.startswith("tests/cuda/")], 100, after=["build"]),
        Step(
            "measure",
            measure,
            limit=190,
            least=60,
            read=lambda output: read_measured(folder / "measured"),
            more=within,
        ),
        tests("graphs", ["tests/gpu/test_graphs.py"], 45, least=20),
        one_call("cuda, memcheck", "cuda", 60, least=15, after=["build"], tool=memcheck, environment=bare),
        one_call("triton, memcheck", "triton", 60, least=15, tool=memcheck, environment=bare),
        tests("two devices", ["tests/gpu/test_two_devices.py"], 40, least=10),
        tests("other tests", [path for path in files if path.count("/") == 1], 60, least=10),
        one_call("cuda, racecheck", "cuda", 60, after=["build"], tool=racecheck, environment=bare),
    ]


def gpu_tests() -> list[str]:
    """The files that have a test for a GPU."""
    marked = re.compile(r"^\s*(@pytest\.mark\.gpu|pytestmark = pytest\.mark\.gpu|DEVICES = .*mark\.gpu)", re.MULTILINE)
    found = (path for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text()))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def read_tests(report: Path) -> dict[str, Any]:
    """Counts of a JUnit report, the tests that failed, and the reasons of those skipped."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed, skipped = {}, Counter[str]()
    for case in cases:
        for problem in (*case.iter("failure"), *case.iter("error")):
            failed[f"{case.get('classname')}::{case.get('name')}"] = (problem.get("message") or "")[:300]
        skipped.update((item.get("message") or "") for item in case.iter("skipped"))
    passed = len(cases) - len(failed) - sum(skipped.values())
    return {"passed": passed, "failed": failed, "skipped": dict(skipped)}


def read_calls(output: str) -> dict[str, Any]:
    """The lines "ok NAME", "wrong NAME: WHY" and "absent NAME: WHY" of tests/gpu/one_call.py."""
    found = re.findall(r"^(ok|wrong|absent) ([^:\n]+)(?:: (.*))?$", output, re.MULTILINE)
    of = {kind: {name: why for word, name, why in found if word == kind} for kind in ("wrong", "absent")}
    errors = re.findall(r"^=+ (ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)$", output, re.MULTILINE)
    summary = {"sanitizer": errors[-1]} if errors else {}
    return {
        "passed": sum(word == "ok" for word, *_ in found),
        "failed": of["wrong"],
        "skipped": of["absent"],
        **summary,
    }


def within(records: list[dict[str, Any]], limit: float) -> list[str]:
    """Of the suite: its seconds, and to leave out a backend that did not come back from a call: it would not again."""
    names = {record["name"].split()[0].strip(",") for record in records if record["status"] == "timed out"}
    without = [word for name in ("cuda", "triton") if name in names for word in ("--without", name)]
    # Each case may be late by what a process takes to start.
    return ["--seconds", str(max(10, round(limit - 30))), *without]


def read_measured(folder: Path) -> dict[str, Any]:
    """The suite's own file."""
    [path] = folder.glob("*.json")
    return {"measured": json.loads(path.read_text())}


class Run:
    """The steps in turn, within a deadline, and their records."""

    def __init__(self, python: str, folder: Path, deadline: float, write: Callable[[list[dict[str, Any]]], None]):
        self.python, self.folder, self.deadline, self.write = python, folder, deadline, write
        self.records: list[dict[str, Any]] = []
        self.running: dict[str, _Process] = {}

    def all(self, plan: Sequence[Step]) -> None:
        try:
            for number, step in enumerate(plan):
                self.one(step, kept=sum(later.least for later in plan[number + 1 :]))
            for name in list(self.running):
                self.wait(name)
        finally:
            for process in self.running.values():
                process.end()

    def one(self, step: Step, kept: float = 0.0) -> None:
        """Start a step and, unless it is one of the background, wait for its end."""
        record: dict[str, Any] = {"name": step.name, "status": "not started"}
        self.records.append(record)
        reason = self.why_not(step)
        if reason is None:
            # Time that later steps need is not taken from them, unless so little is left that each has only its least.
            left = self.deadline - time.monotonic()
            limit = min(step.limit, max(left - kept, min(left, step.least)))
            if limit < step.least:
                reason = "the time was over"
        if reason is not None:
            record["reason"] = reason
            print(f"{step.name}: not started: {reason}", flush=True)
            self.write(self.records)
            return
        print(f"{step.name}: at most {limit:.0f} s", flush=True)
        more = step.more(self.records[:-1], limit) if step.more is not None else ()
        self.running[step.name] = _Process(step, record, limit, self.python, self.folder, more)
        if not step.background:
            self.wait(step.name)

    def why_not(self, step: Step) -> Optional[str]:
        for name in step.after:
            if name in self.running:
                self.wait(name)
            before = next((record for record in self.records if record["name"] == name), None)
            if before is None or before["status"] != "passed":
                return f"{name} did not pass"
        if step.tool and shutil.which(step.tool[0]) is None:
            return f"{step.tool[0]} is not on PATH"
        return None

    def wait(self, name: str) -> None:
        process = self.running.pop(name)
        try:
            process.wait()
        finally:
            process.end()
        print(f"{name}: {process.record['status']} in {process.record['seconds']} s", flush=True)
        self.write(self.records)


class _Process:
    """A step that runs; its output goes into a file, for a pipe would keep it from being ended."""

    def __init__(
        self, step: Step, record: dict[str, Any], limit: float, python: str, folder: Path, more: Sequence[str] = ()
    ):
        self.step, self.record = step, record
        self.begun, self.limit = time.monotonic(), limit
        self.code: Optional[int] = None
        self.log = folder / f"{re.sub('[^a-z0-9]+', '-', step.name)}.log"
        command = [*step.tool, python, *step.command, *more]
        record |= {
            "command": ["python" if part == python else portable(part) for part in command],
            "limit": round(limit),
        }
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("wb") as log:
            # A group of its own, so that what a step has started ends with it.
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.ended: Optional[float] = None
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """One of the background ends long before anybody waits for it."""
        self.process.wait()
        self.ended = time.monotonic()

    def wait(self) -> None:
        over = False
        try:
            self.process.wait(max(0.1, self.begun + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            over = True
            self.end()
        output = self.log.read_text(errors="replace")
        code = self.code = self.process.returncode
        found: dict[str, Any] = {}
        reason = f"it took longer than {self.limit:.0f} s" if over else f"it ended with status {code}"
        status = "timed out" if over else "failed" if code else "passed"
        if self.step.read is not None:
            try:
                found = self.step.read(output)
            except (OSError, ValueError, xml.etree.ElementTree.ParseError) as error:
                if status == "passed":
                    status, reason = "failed", f"its results cannot be read: {error}"
            else:
                # pytest's status for no test is 5; a skip of everything is 0 there.
                if not over and not found.get("failed") and found.get("passed") == 0 and code in (0, 5):
                    status, reason = "nothing ran", "; ".join(found["skipped"]) or "there was nothing to run"
        self.record |= {"status": status, "seconds": round((self.ended or time.monotonic()) - self.begun, 1), **found}
        if status != "passed":
            self.record |= {"reason": reason, "tail": [portable(x) for x in output.splitlines()[-TAIL_LINES:]]}

    def end(self) -> None:
        """End the step's processes, first kindly."""
        for how, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(patience)
            except ProcessLookupError:
                return  # none is left
            except subprocess.TimeoutExpired:
                pass  # a kernel that never ends keeps its process, whatever it is sent


def portable(text: str) -> str:
    """Without the folders of this machine."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def about(python: str, device: str, folder: Path) -> dict[str, Any]:
    """Card, versions and copy bandwidth, from ``python -m benchmarks.machine``; {"reason": ...} where that fails."""
    record: dict[str, Any] = {"name": "about"}
    step = Step("about", ["-m", "benchmarks.machine", device], limit=60)
    process = _Process(step, record, step.limit, python, folder)
    process.wait()
    process.end()
    if record["status"] == "passed":
        try:
            found: dict[str, Any] = json.loads(process.log.read_text().splitlines()[-1])
            return found
        except (ValueError, IndexError) as error:
            record["reason"] = f"its answer cannot be read: {error}"
    return {"reason": record["reason"], "tail": record.get("tail", []), "no_device": process.code == NO_DEVICE}


def commit(named: Optional[str]) -> dict[str, Any]:
    """The commit of the sources, and whether they were changed since: as far as git knows."""
    if named is not None:
        return {"commit": named, "changed": False}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD") or "unknown", "changed": bool(git("status", "--porcelain", "-uno"))}
    except OSError:
        return {"commit": "unknown", "changed": True}


def card_name(name: str) -> str:
    """A file's name of a card's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=(__doc__ or "").split("\n\n")[1])
    where = "the file (default: benchmarks/results/gpu/CARD.json; of a rehearsal out/gpu-check/rehearsal.json)"
    parser.add_argument("--output", type=Path, help=where)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    which = "names of steps, separated by semicolons; a wrong one lists them (default: all)"
    parser.add_argument("--only", default="", help=which)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the steps")
    parser.add_argument("--commit", help="of the sources, where this is a copy without .git")
    rehearse = "cpu rehearses: the same steps on a machine without a GPU, whose results are no evidence"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=rehearse)
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    folder = ROOT / "out" / "gpu-check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = about(options.python, options.device, folder)
    card = found.get("machine", {}).get("gpu", "unknown")
    if options.device == "cpu":
        output = options.output or folder / "rehearsal.json"
    else:
        output = options.output or (RESULTS if "machine" in found else folder) / f"{card_name(card)}.json"
    if found.get("no_device"):
        print(f"{found['tail'][-1]}; --device cpu rehearses without one", file=sys.stderr)
        return 2
    print(f"card: {card}; {'; '.join(f'{k} {v}' for k, v in found.get('limits_gb_per_s', {}).items())}", flush=True)
    head = {"schema": SCHEMA, "device": options.device, "card": card, **commit(options.commit), "about": found}

    def write(records: list[dict[str, Any]]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        body = {**head, "seconds": round(time.monotonic() - begun, 1), "steps": records}
        text = json.dumps(body, indent=1) + "\n"
        temporary = output.with_suffix(".part")
        temporary.write_text(text)
        temporary.replace(output)

    plan = steps(folder, options.device, found.get("capability", ""))
    names = [name.strip() for name in options.only.split(";") if name.strip()]
    unknown = [name for name in names if name not in [step.name for step in plan]]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: the steps are {'; '.join(step.name for step in plan)}")
    run = Run(options.python, folder, begun + 60 * options.minutes, write)
    write(run.records)
    run.all([step for step in plan if not names or step.name in names])
    print(f"\n{'step':<28}{'seconds':>8}  outcome")
    for record in run.records:
        more = record.get("reason", "")
        if record.get("failed"):
            more = f"{len(record['failed'])} failed, {next(iter(record['failed']))} first"
        print(f"{record['name']:<28}{record.get('seconds', 0):>8}  {record['status']}{more and ': ' + more}")
    print(f"wrote {output}")
    return int("machine" not in found or any(record["status"] in ("failed", "timed out") for record in run.records))


if __name__ == "__main__":
    sys.exit(main())
