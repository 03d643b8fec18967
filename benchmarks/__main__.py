"""Command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from kdkernels import backends

try:
    from benchmarks import machine, measure, report, runner, worker
    from benchmarks.model import DTYPES, SUITES, Candidate, Case, Suite, load_suite
    from benchmarks.summary import Report
except ModuleNotFoundError as error:
    if __name__ != "__main__" or (error.name or "").partition(".")[0] not in ("matplotlib", "numpy", "tabulate"):
        raise
    packages = f"`{sys.executable} -m pip install matplotlib numpy tabulate`"
    sys.exit(f"python -m benchmarks needs the package {error.name}; run {packages}")

SEED = 20240607
SMALLEST_MEMORY_UNIT = 4 * 2**20
# Seconds that a process takes before it measures, and by which it may be late.
STARTING = 8.0

DESCRIPTION = """\
Times loss + backward of kdkernels beside eager PyTorch and torch.compile.

Every candidate's loss and gradient are checked against an fp64 reference before and after it is timed; when
one is wrong, no figure is printed and the exit status is 1. All candidates run once per round, in shuffled
order; a figure is the median over the rounds with the quartiles beside it, and a ratio is taken per round
before its median. Each number of threads, and each candidate's peak memory, is measured in a process of its own.
"""
EPILOG = """\
examples:
  python -m benchmarks --quick                        one small shape, to see that everything runs
  python -m benchmarks                                the dense suite, all shapes, 1 thread and all
  python -m benchmarks --suite divergences objective  every divergence; every term of the objective
  python -m benchmarks --suite training               students trained side by side: the same loss curve, and its cost
  python -m benchmarks --shapes 512x32000 --dtypes bf16 --threads 1 --rounds 30
  pytest benchmarks --benchmark-only                  the same candidates through pytest-benchmark
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        device = resolve_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    for _, suite in options.suite:
        for shape in options.shapes or ():
            if len(shape) != len(suite.axes):
                written = "x".join(map(str, shape))
                parser.error(f"argument --shapes: suite {suite.name!r} takes {'x'.join(suite.axes)}, got {written!r}")
    without = None if options.allow_plain_torch else why_only_plain_torch(device)
    if without is not None:
        print(without, file=sys.stderr)
        return 1
    failed = False
    for name, suite in options.suite:
        try:
            found = _run_suite(name, suite, device, options)
        except (runner.CheckFailed, worker.WorkerFailed) as error:
            print(f"no figures for suite {suite.name!r}: {error}", file=sys.stderr)
            return 1
        paths = report.write(found, options.output_dir)
        print(report.text(found, tablefmt="simple"))
        print("\n".join(f"wrote {path}" for path in paths))
        failed |= bool(report.failures(found))
    return int(failed)


def resolve_device(name: str) -> str:
    """ "auto" is CUDA where there is one; an explicit "cuda" without one is a ValueError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def why_only_plain_torch(device: str) -> Optional[str]:
    """Why no figure of this device would be one of a kernel, or None: plain PyTorch must not be taken for kdkernels."""
    answers = backends.available(device)
    if any(answer.ok for answer in answers if answer.name != "torch"):
        return None
    wanted = [answer for answer in answers if not answer.ok and answer.name in backends.KERNELS[device]]
    reasons = "".join(f"\n  {answer.name}: {answer.reason}" for answer in wanted)
    return (
        f"no figures: on {device} tensors kdkernels runs plain PyTorch here, no kernel.{reasons}\n"
        "--allow-plain-torch measures all the same, without kernels."
    )


def _run_suite(name: str, suite: Suite, device: str, options: argparse.Namespace) -> Report:
    cases, threads, rounds = _plan(suite, device, options)
    listed = [{"shape": case.shape, "dtype": case.dtype} for case in cases]
    about, asked = machine.describe(device), {"rounds": rounds, "processes": options.processes, "threads": threads}
    job: dict[str, Any] = {"suite": name, "device": device, "seed": SEED}
    timed = {}
    seconds = options.seconds or suite.seconds
    if seconds is not None and not options.quick:
        threads = asked["threads"] = threads[-1:]
        job |= {"threads": threads[0], "without": options.without}
        timed[threads[0]] = _within(suite, listed, seconds, {**job, "rounds": rounds})
        threads = []
    for count in threads:
        task = {**job, "mode": "time", "cases": listed, "threads": count, "rounds": rounds}
        timed[count] = pooled([worker.run({**task, "seed": SEED + index}) for index in range(options.processes)])
    memory: dict[str, dict[str, int]] = {}
    memory_note = _why_no_memory(suite, cases, device, options)
    if memory_note is None:
        memory = _memory(suite, cases, job, max(timed))
    return Report(
        suite=suite,
        machine=about,
        versions=machine.versions(),
        options={**asked, "seed": SEED, "device": device},
        cases=cases,
        timed=timed,
        memory=memory,
        memory_note=memory_note,
    )


def _within(suite: Suite, cases: list[dict[str, Any]], seconds: float, job: dict[str, Any]) -> dict[str, Any]:
    """The answer for some seconds: bandwidths first, then each case in a process, with its part of what is left."""
    begun = time.monotonic()
    limits = worker.run({**job, "mode": "limits", "cases": []})["limits"]
    print(", ".join(f"{name} {value} GB/s" for name, value in limits.items() if name != "measured_by"), flush=True)
    results = []
    for number, case in enumerate(cases):
        part = max(1.0, (seconds - time.monotonic() + begun) / (len(cases) - number))
        task = {**job, "mode": "within", "cases": [case], "seconds": max(1.0, part - STARTING)}
        try:
            results.append(worker.run(task, limit=part + STARTING)["result"])
        except worker.WorkerFailed as error:
            failure = {"name": "every candidate", "group": "x".join(map(str, case["shape"])), "reason": str(error)}
            results.append({"candidates": [], "absent": [], "failed": [failure]})
    return {"limits": limits, "results": results}


def pooled(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of several processes as those of one: all seconds, the largest errors, the highest limits."""
    first, *others = answers
    for other in others:
        for name, value in other["limits"].items():
            if isinstance(value, (int, float)):
                first["limits"][name] = max(first["limits"][name], value)
        for mine, theirs in zip(first["results"], other["results"], strict=True):
            for candidate, again in zip(mine["candidates"], theirs["candidates"], strict=True):
                candidate["seconds"] += again["seconds"]
                errors = candidate["errors"]
                candidate["errors"] = {what: max(error, again["errors"][what]) for what, error in errors.items()}
    return first


def _plan(suite: Suite, device: str, options: argparse.Namespace) -> tuple[list[Case], list[int], int]:
    sizes = options.shapes or (suite.quick_shapes if options.quick else suite.shapes)
    types = options.dtypes or (suite.dtypes[:1] if options.quick else suite.dtypes)
    every = machine.usable_cpus()
    threads = options.threads or ([every] if options.quick or device == "cuda" else sorted({1, every}))
    rounds = options.rounds or suite.rounds[options.quick]
    return [Case(shape, dtype, device) for shape in sizes for dtype in types], threads, rounds


def _why_no_memory(suite: Suite, cases: list[Case], device: str, options: argparse.Namespace) -> Optional[str]:
    if options.memory is False:
        return "--no-memory"
    if options.memory is None and suite.seconds is not None:
        return "--memory asks for it"
    if device == "cpu" and not measure.peak_can_be_reset():
        return "this system does not let a process reset its peak"
    if all(suite.unit_bytes(case) < SMALLEST_MEMORY_UNIT for case in cases):
        return f"a gradient under {SMALLEST_MEMORY_UNIT >> 20} MiB is lost in what threads and allocators take"
    return None


def _memory(suite: Suite, cases: list[Case], job: dict[str, Any], threads: int) -> dict[str, dict[str, int]]:
    """Peak bytes by case and ``Candidate.key``, of the cases that are large enough."""
    found: dict[str, dict[str, int]] = {}
    members: dict[str, tuple[Candidate, list[Case]]] = {}
    for case in cases:
        if suite.unit_bytes(case) >= SMALLEST_MEMORY_UNIT:
            for item in suite.make_candidates(case):
                if isinstance(item, Candidate):
                    members.setdefault(item.key, (item, []))[1].append(case)
    for number, (key, (candidate, its_cases)) in enumerate(members.items(), start=1):
        print(f"[{suite.name}] peak memory {number}/{len(members)}: {key}", file=sys.stderr, flush=True)
        listed = [{"shape": case.shape, "dtype": case.dtype} for case in its_cases]
        identity = {"group": candidate.group, "name": candidate.name, "threads": threads}
        answer = worker.run({**job, **identity, "mode": "memory", "cases": listed})
        for case, peak in zip(its_cases, answer["peaks"], strict=True):
            found.setdefault(str(case), {})[key] = peak
    return found


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )

    def add(name: str, of: Any, metavar: str, help: str, **more: Any) -> None:
        parser.add_argument(name, type=of, metavar=metavar, help=help, **more)

    listed = f"{', '.join(SUITES)}, or the dotted path of a module with a SUITE of your own (default: dense)"
    add("--suite", _suite, "NAME", listed, nargs="+", default=[_suite("dense")])
    add("--shapes", shapes, "NxV,...", "rows x vocabulary, comma separated (default: the suite's)")
    add("--dtypes", dtypes, "NAME,...", f"of {', '.join(DTYPES)} (default: the suite's)")
    add("--threads", _counts, "N,...", "CPU threads (default: 1 and all; quick: all)")
    add("--rounds", _count, "N", "timed rounds (default: 15; quick: 5; training: 60 and 12 steps)")
    apart = "take the rounds in each of N processes: what allocates may be 4 times slower in one than in the next"
    add("--processes", _count, "N", f"{apart} (default: %(default)s)", default=1)
    results = "for SUITE.json, SUITE.md and SUITE.png (default: %(default)s)"
    add("--output-dir", Path, "DIR", results, default=Path("out/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="one small shape, one dtype, few rounds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    apart = "peak memory, each in a process of its own (default: of suites that have no limit of time)"
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help=apart)
    within = (
        "for a suite's cases together: what they do not allow is left out, and said (default: gpu 230, others none)"
    )
    add("--seconds", _count, "N", within)
    word = "leave out candidates with this word in their name; may be repeated"
    parser.add_argument("--without", action="append", default=[], metavar="WORD", help=word)
    plain = "measure also where no kernel of kdkernels runs on the device"
    parser.add_argument("--allow-plain-torch", action="store_true", help=plain)
    return parser


def _suite(text: str) -> tuple[str, Suite]:
    try:
        return text, load_suite(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ModuleNotFoundError as error:
        needed = f"suite {text!r} needs the package {error.name}; `pip install -e '.[bench]'` brings it"
        raise argparse.ArgumentTypeError(needed) from error


def shapes(text: str) -> list[tuple[int, ...]]:
    """Parse ``512x32000,4096x1000``."""
    found = []
    for item in text.split(","):
        try:
            shape = tuple(int(size) for size in item.lower().split("x"))
        except ValueError:
            shape = ()
        if len(shape) < 2 or min(shape) < 1:
            raise argparse.ArgumentTypeError(f"a shape is written 512x32000, got {item!r}")
        found.append(shape)
    return found


def dtypes(text: str) -> list[str]:
    """Parse ``fp32,bf16``."""
    for item in text.split(","):
        if item not in DTYPES:
            raise argparse.ArgumentTypeError(f"a dtype is one of {', '.join(DTYPES)}, got {item!r}")
    return text.split(",")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(item) for item in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
