"""``python -m benchmarks.evidence FILE...``: whether a results file shows the CUDA dense losses right and faster.

``backend="auto"`` leaves dense losses on a GPU to Triton until a file that ``scripts/gpu-check`` wrote on a real card
is committed under ``benchmarks/results/gpu`` and passes this. Then ``kdkernels.ops.BY_NAME_ONLY`` loses its entry, and
tests/gpu/test_gpu_check.py holds the two together. Standard library only.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
MUST_PASS = ("build", "cuda, one call of each", "cuda tests", "measure", "graphs")
# Not on every machine; where they ran they found nothing.
MUST_NOT_FAIL = ("cuda, memcheck", "cuda, racecheck", "two devices")
OURS, THEIRS = "kdkernels cuda", "kdkernels triton"
# Of Triton's time, at the shape where it is worst.
MOST = 1.05


def committed() -> list[Path]:
    return sorted(RESULTS.glob("*.json"))


def why_not(result: dict[str, Any]) -> list[str]:
    """Why the results are no reason for "auto" to take the CUDA extension for dense losses; none where they are."""
    reasons = [] if result["device"] == "cuda" and result["card"] != "unknown" else ["no GPU took part"]
    status = {record["name"]: record["status"] for record in result["steps"]}
    reasons += [f"{name}: {status.get(name, 'not run')}" for name in MUST_PASS if status.get(name) != "passed"]
    reasons += [f"{name}: {status[name]}" for name in MUST_NOT_FAIL if status.get(name) in ("failed", "timed out")]
    if result.get("commit", "unknown") == "unknown":
        reasons.append("nobody knows of which commit")
    if result.get("changed", True):
        reasons.append("the sources were changed after their commit")
    ratios = dict(times(result))
    cases = {case for case, *_ in measured(result)}
    if not cases or {case for case, _ in ratios} != cases:
        reasons.append(f"both were measured at {len({case for case, _ in ratios})} of {len(cases)} shapes")
    slow = {key: ratio for key, ratio in ratios.items() if ratio > MOST}
    reasons += [f"{case}, {group}: {ratio:.2f} of Triton's time" for (case, group), ratio in slow.items()]
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else math.inf
    if not mean < 1:
        reasons.append(f"in the mean it takes {mean:.2f} of Triton's time")
    return reasons


def measured(result: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Case, group, candidate and median seconds of every row."""
    for record in result["steps"]:
        for case in record.get("measured", {}).get("results", ()):
            for row in case["candidates"]:
                yield case["case"], row["group"], row["name"], row["seconds"]["median"]


def times(result: dict[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """Case and group, and the extension's time in those of Triton, as "auto" has it run."""
    rows = {(case, group, name): seconds for case, group, name, seconds in measured(result)}
    for (case, group, name), seconds in rows.items():
        if name == OURS and (case, group, THEIRS) in rows:
            yield (case, group), seconds / rows[case, group, THEIRS]


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]] or committed()
    if missing := [str(path) for path in files if not path.is_file()]:
        print(f"no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    found = {path: why_not(json.loads(path.read_text())) for path in files}
    for path, reasons in found.items():
        print(f"{path}: " + ("; ".join(reasons) or "the CUDA dense losses are right and faster here"))
    if not files:
        print("no results of a GPU are committed yet")
    return int(not any(not reasons for reasons in found.values()))


if __name__ == "__main__":
    sys.exit(main())
