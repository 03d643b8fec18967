"""A process that measures: ``python -m benchmarks.worker RESULT`` with a job in JSON on its standard input.

Each thread count, and each candidate's peak memory, is measured in a process of its own, which ``run`` starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import torch

from benchmarks import machine, runner
from benchmarks.model import Case, load_suite

CHECK_FAILED = 3


class WorkerFailed(Exception):
    """A measuring process ended without a result."""


def run(job: dict[str, Any], limit: Optional[float] = None) -> dict[str, Any]:
    """Do a job in a fresh process, which is ended after ``limit`` seconds, and return its result.

    Raises:
        runner.CheckFailed: when a candidate's result is wrong.
        WorkerFailed: when the process fails in any other way.
    """
    threads = str(job["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if job["mode"] == "memory":
        # glibc keeps freed blocks up to a threshold that it raises by itself: a fixed one returns every block.
        environment.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.worker", str(result)]
        try:
            done = subprocess.run(command, input=json.dumps(job), text=True, env=environment, timeout=limit)
            code = done.returncode
        except subprocess.TimeoutExpired:
            reason = f"the process was ended after {limit:.0f} s"
            if not result.exists():
                raise WorkerFailed(reason) from None
            # As far as it came.
            saved: dict[str, Any] = json.loads(result.read_text())
            saved["result"]["failed"].append({"name": "the next", "group": "all", "reason": reason})
            return saved
        answer = json.loads(result.read_text()) if result.exists() else {}
    if code == CHECK_FAILED:
        raise runner.CheckFailed(answer["check_failed"])
    if code:
        raise WorkerFailed(f"the process measuring {job['mode']} at {threads} threads ended with status {code}")
    return answer


def _work(job: dict[str, Any], target: Path) -> dict[str, Any]:
    suite = load_suite(job["suite"])
    torch.set_num_threads(job["threads"])
    cases = [Case(tuple(item["shape"]), item["dtype"], job["device"]) for item in job["cases"]]
    if job["mode"] == "memory":
        peaks = [runner.measure_memory(suite, case, job["group"], job["name"], seed=job["seed"]) for case in cases]
        return {"peaks": peaks}
    if job["mode"] == "limits":
        return {"limits": machine.limits(job["device"], job["threads"])}
    if job["mode"] == "within":
        [case] = cases
        print(f"[{suite.name}] {case}: at most {job['seconds']:.0f} s", file=sys.stderr, flush=True)
        asked = {name: job[name] for name in ("rounds", "seed", "seconds", "without")}

        def save(result: dict[str, Any]) -> None:
            part = target.with_suffix(".part")
            part.write_text(json.dumps({"result": result}))
            part.replace(target)

        return {"result": runner.measure_within(suite, case, save=save, **asked)}
    results = []
    for case in cases:
        print(f"[{suite.name}] {case}, {job['threads']} threads: {job['rounds']} rounds", file=sys.stderr, flush=True)
        results.append(runner.measure_time(suite, case, rounds=job["rounds"], seed=job["seed"]))
    return {"limits": machine.limits(job["device"], job["threads"]), "results": results}


def main() -> int:
    target = Path(sys.argv[1])
    try:
        answer = _work(json.load(sys.stdin), target)
    except runner.CheckFailed as error:
        target.write_text(json.dumps({"check_failed": str(error)}))
        return CHECK_FAILED
    target.write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
