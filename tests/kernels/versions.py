"""The binaries of the Triton at hand of every form of ``budgets.py``: ``python tests/kernels/versions.py RESULT.json``.

The budgets are those of one version of Triton. Of any other one it is asked that every form compiles for every target,
and that a tile is not spilled. ``scripts/test-triton-versions`` runs this in an environment for each version.
"""

import argparse
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parents[2]
# Bytes (AMD: registers) a thread: a few scalars of a row. Alpha-beta in one pass takes all registers there are.
MOST_SPILLED = 64
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "requirements" / "triton.txt").read_text(), re.MULTILINE)[1]
INTERPRETED = "tests/kernels/interpreter"


def compiled(case):
    """The entry of one case, or its failure in a line."""
    import budgets
    from launches import compile_for

    target, form = case
    try:
        if target in budgets.HIP:
            binary = compile_for(budgets.launch_of(form, target), target)
            return {"pattern": pattern_of(target, form), "registers": binary.registers, "spilled": binary.spilled}
        found = budgets.measure(form, target)
        wrong = budgets.excesses(found, budgets.read()[budgets.key(*case)]) if version() == PINNED else []
        return {**found, "over_budget": wrong}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[-1]}"[:300]}


def pattern_of(target, form):
    import budgets

    return "cluster" if "dense_cluster" in str(budgets.launch_of(form, target).fn) else "sweeps"


def version():
    return metadata.version("triton")


def faults(result):
    """A line for each case that fails, spills or is over its budget, and one where a test failed."""
    found = []
    for name, entry in result["forms"].items():
        if "failed" in entry:
            found.append(f"{name}: {entry['failed']}")
        elif entry["spilled"] > MOST_SPILLED:
            found.append(f"{name}: {entry['spilled']} spilled")
        elif entry.get("over_budget"):
            found.append(f"{name}: over its budget of {', '.join(entry['over_budget'])}")
    tests = result["interpreter"]
    if tests is not None and tests["status"]:
        found.append(f"interpreter: {tests['line']}")
    return found


def row(result):
    """The line of a version in the table of docs/reference/triton.md."""
    forms = result["forms"].values()
    good = [entry for entry in forms if "failed" not in entry]
    one_pass = sum(entry["pattern"] == "cluster" for entry in good)
    tests = result["interpreter"]
    return [
        result["triton"],
        f"{len(good)} of {len(forms)}",
        str(one_pass),
        str(max((entry["spilled"] for entry in good), default=0)),
        "not run" if tests is None else tests["line"],
    ]


def interpreter_tests(arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", INTERPRETED, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), flush=True)
    return {"status": done.returncode, "line": re.sub(r" in [\d.]+s.*|=+", "", lines[-1]).strip()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--targets", default="", help="comma separated (default: all)")
    parser.add_argument("--forms", default="", help="a regular expression (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--no-interpreter", action="store_true", help="only compile")
    parser.add_argument("--tests", default="", help="more arguments of the interpreter's tests")
    options = parser.parse_args()
    import budgets

    targets = options.targets.split(",") if options.targets else [*budgets.CUDA, *budgets.HIP]
    cases = [case for case in (*budgets.CASES, *budgets.CASES_HIP) if case[0] in targets]
    cases = [case for case in cases if re.search(options.forms, case[1])]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        entries = list(pool.map(compiled, cases))
    forms = {budgets.key(*case): entry for case, entry in zip(cases, entries, strict=True)}
    tests = None if options.no_interpreter else interpreter_tests(shlex.split(options.tests))
    result = {"triton": version(), "pinned": version() == PINNED, "forms": forms, "interpreter": tests}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    wrong = faults(result)
    print("\n".join([" | ".join(row(result)), *wrong]), flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
