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

    def result(self, case: Case, threads: int) -> dict[str, Any]:
        """The candidates of a case that were measured, and those that were absent."""
        found: dict[str, Any] = self.timed[threads]["results"][self.cases.index(case)]
        return found


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        q1, median, q3 = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median, q1, q3)


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
    measured = report.result(case, threads)["candidates"]
    fixed = next((item for item in measured if item["family"] == "fixed"), None)
    floor = floor_seconds(report, case, threads)
    if fixed is None or floor is None:
        return None
    least = floor + np.asarray(fixed["seconds"])
    eager, compiled = (_ratio(_fastest(measured, family, fixed["group"]), least) for family in ("eager", "compile"))
    return Bound(Spread.of(least), floor, eager, compiled)


def _fastest(measured: Sequence[dict[str, Any]], family: str, group: Optional[str] = None) -> Optional[np.ndarray]:
    members = [item for item in measured if item["family"] == family and group in (None, item["group"])]
    return min((np.asarray(item["seconds"]) for item in members), key=np.median, default=None)


def _ratio(above: Optional[np.ndarray], below: Optional[np.ndarray]) -> Optional[Spread]:
    return None if above is None or below is None else Spread.of(above / below)


def rows(report: Report, case: Case, threads: int) -> list[Row]:
    """The candidates of a case, in the order in which the suite lists them."""
    measured, suite = report.result(case, threads)["candidates"], report.suite
    seconds = {(item["group"], item["name"]): np.asarray(item["seconds"]) for item in measured}
    probe, floor = _fastest(measured, "probe"), floor_seconds(report, case, threads)
    found = []
    for item in measured:
        name, group, family = item["name"], item["group"], item["family"]
        own, spread = seconds[group, name], Spread.of(seconds[group, name])
        eager, compiled = (_ratio(_fastest(measured, kind, group), own) for kind in ("eager", "compile"))
        baseline = _ratio(own, seconds.get((suite.baseline_group or "", name)))
        if family == "probe":
            eager = compiled = baseline = None
        peak = report.memory.get(str(case), {}).get(f"{group} / {name}")
        share = None if floor is None or family == "fixed" else floor * suite.floor_share.get(group, 1) / spread.median
        found.append(
            Row(
                name=name,
                group=group,
                family=family,
                seconds=spread,
                faster_than_eager=eager,
                faster_than_compile=compiled,
                of_probe=_ratio(own, probe),
                of_baseline=baseline,
                of_bandwidth=share,
                peak_bytes=peak,
                peak_units=None if peak is None else peak / suite.unit_bytes(case),
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


def processor(report: Report) -> str:
    """The processor in words."""
    about = report.machine
    return about.get("gpu") or f"{about['processor']} ({about['vector_isa']}), {about['cpus']} CPUs"
