"""From seconds to figures: medians with their spread, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from benchmarks.model import Case, Suite


@dataclass(frozen=True)
class Report:
    """A suite's measurements: ``timed`` by thread count as ``worker`` returns it, ``memory`` by case and candidate."""

    suite: Suite
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    cases: Sequence[Case]
    timed: dict[int, dict[str, Any]]
    memory: dict[str, dict[str, int]]
    memory_note: Optional[str]  # why there is none


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        q1, median, q3 = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(q1), float(q3))


@dataclass(frozen=True)
class Row:
    """One candidate of one case and thread count.

    ``faster_than_eager`` and ``faster_than_compile`` divide the time of the fastest eager (compiled) candidate of the
    group by this one's; ``of_probe`` and ``of_baseline`` divide this one's by the probe's and by the same candidate's
    in the suite's baseline group. All are taken round by round. ``of_bandwidth`` is the least time that the suite's
    bandwidth allows for the bytes that must move, over the median time.
    """

    name: str
    group: str
    family: str
    seconds: Spread
    faster_than_eager: Optional[Spread]
    faster_than_compile: Optional[Spread]
    of_probe: Optional[Spread]
    of_baseline: Optional[Spread]
    of_bandwidth: Optional[float]
    peak_bytes: Optional[int]
    peak_units: Optional[float]
    errors: dict[str, float]
    rounds: list[float]
    first_run_seconds: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Bound:
    """``floor_seconds``, the least time for a loss's bytes, and the fixed cost around it; only caches beat it."""

    seconds: Spread
    floor_seconds: float
    faster_than_eager: Optional[Spread]
    faster_than_compile: Optional[Spread]


def floor_seconds(report: Report, case: Case, threads: int) -> Optional[float]:
    """The least time that the suite's bandwidth allows for the bytes that must move; None where it states none."""
    if report.suite.floor_bytes is None:
        return None
    bandwidth = report.timed[threads]["limits"][report.suite.bandwidth]
    return report.suite.floor_bytes(case) / (bandwidth * 1e9)


def bound(report: Report, case: Case, threads: int) -> Optional[Bound]:
    """The bound of a case whose suite measures the fixed cost (a candidate of the family "fixed"); else None."""
    measured = report.timed[threads]["results"][report.cases.index(case)]["candidates"]
    fixed = next((item for item in measured if item["family"] == "fixed"), None)
    floor = floor_seconds(report, case, threads)
    if fixed is None or floor is None:
        return None
    least = floor + np.asarray(fixed["seconds"])
    eager, compiled = (_fastest(measured, fixed["group"], family) for family in ("eager", "compile"))
    return Bound(
        seconds=Spread.of(least),
        floor_seconds=floor,
        faster_than_eager=None if eager is None else Spread.of(eager / least),
        faster_than_compile=None if compiled is None else Spread.of(compiled / least),
    )


def _fastest(measured: Sequence[dict[str, Any]], group: str, family: str) -> Optional[np.ndarray]:
    members = [np.asarray(item["seconds"]) for item in measured if (item["group"], item["family"]) == (group, family)]
    return min(members, key=lambda values: float(np.median(values)), default=None)


def rows(report: Report, case: Case, threads: int) -> list[Row]:
    """The candidates of a case, in the order in which the suite lists them."""
    answer = report.timed[threads]
    measured = answer["results"][report.cases.index(case)]["candidates"]
    seconds = {(item["group"], item["name"]): np.asarray(item["seconds"]) for item in measured}
    probe = next((seconds[item["group"], item["name"]] for item in measured if item["family"] == "probe"), None)
    floor = floor_seconds(report, case, threads)
    peaks = report.memory.get(str(case), {})

    found = []
    for item in measured:
        own = seconds[item["group"], item["name"]]
        loss = item["family"] != "probe"
        eager, compiled = (
            _fastest(measured, item["group"], family) if loss else None for family in ("eager", "compile")
        )
        baseline = seconds.get((report.suite.baseline_group or "", item["name"])) if loss else None
        peak = peaks.get(f"{item['group']} / {item['name']}")
        share = report.suite.floor_share.get(item["group"], 1.0)
        found.append(
            Row(
                name=item["name"],
                group=item["group"],
                family=item["family"],
                seconds=Spread.of(own),
                faster_than_eager=None if eager is None else Spread.of(eager / own),
                faster_than_compile=None if compiled is None else Spread.of(compiled / own),
                of_probe=None if probe is None else Spread.of(own / probe),
                of_baseline=None if baseline is None else Spread.of(own / baseline),
                of_bandwidth=None
                if floor is None or item["family"] == "fixed"
                else floor * share / float(np.median(own)),
                peak_bytes=peak,
                peak_units=None if peak is None else peak / report.suite.unit_bytes(case),
                errors=item["errors"],
                rounds=item["seconds"],
                first_run_seconds=item["first_run_seconds"],
                figures=item.get("figures", {}),
            )
        )
    return found


def where(report: Report, threads: int) -> str:
    """The thread count in words; a GPU has none."""
    return "GPU" if report.options["device"] == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
