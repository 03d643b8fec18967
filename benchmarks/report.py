"""Reports for people: tables and a JSON file; ``plots`` draws the plot."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from benchmarks import plots
from benchmarks.model import Case, Suite
from benchmarks.summary import Report, Spread, bound, processor, rows, where

SCHEMA = 1
LEGEND = (
    '"ms": median of the rounds, then the quartiles. "x eager", "x compile": how many times faster than the fastest '
    'eager and the fastest compiled formulation of the same loss. "of {probe}": time beside {yardstick}. "memory": '
    "peak of forward and backward beyond the inputs, in units of one {unit}. Ratios are taken per round, then their "
    "median."
)
LIMIT = (
    ' "of {limit}": the least time that the {bandwidth} bandwidth allows for the bytes that must move, over the time '
    "taken (more than 100 % is cache: a gradient written in place may stay there)."
)


def text(report: Report, *, tablefmt: str) -> str:
    """Every table, with the machine and the limits it was measured against."""
    suite, parts = report.suite, [heading(report)]
    for case in report.cases:
        for threads in report.options["threads"]:
            parts.append(
                f"{suite.title}: {case}, {where(report, threads)}\n\n{_table(report, case, threads, tablefmt)}"
            )
            least = bound(report, case, threads)
            if least is not None:
                eager, compiled = (_ratio(x) or "-" for x in (least.faster_than_eager, least.faster_than_compile))
                parts.append(
                    f"The limit, {least.floor_seconds * 1e3:.2f} ms, and an autograd.Function that does nothing "
                    f"together: {least.seconds.median * 1e3:.2f} ms, {eager} x eager, {compiled} x compile."
                )
    failed = failures(report)
    if failed:
        parts.append("Failed or wrong, and no figure:\n" + "\n".join(f"- {line}" for line in failed))
    absent: dict[str, dict[str, None]] = {}
    for answer in report.timed.values():
        for result in answer["results"]:
            for item in result["absent"]:
                absent.setdefault(item["reason"], {})[item["name"]] = None
    if absent:
        parts.append("Not run here:\n" + "\n".join(f"- {', '.join(names)}: {why}" for why, names in absent.items()))
    if report.memory_note:
        parts.append(f"Peak memory was not measured: {report.memory_note}.")
    legend = LEGEND + ("" if suite.floor_bytes is None else LIMIT)
    parts.append(textwrap.fill(legend.format(**vars(suite), limit=_limit(suite)), 120))
    return "\n\n".join(parts) + "\n"


def failures(report: Report) -> list[str]:
    """A line for each candidate that raised or was wrong, in suites that go on without them."""
    return [
        f"{case}, {item['group']} / {item['name']}: {item['reason']}"
        for answer in report.timed.values()
        for case, result in zip(report.cases, answer["results"], strict=True)
        for item in result.get("failed", ())
    ]


def heading(report: Report) -> str:
    """Versions, machine and bandwidths in a few lines."""
    about = report.machine
    lines = [
        f"{processor(report)}; {about['system']}; transparent huge pages: {about['transparent_huge_pages']}; "
        f"load before the run {about['load_average_before']}",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    ]
    for threads, answer in report.timed.items():
        bandwidth = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in answer["limits"].items() if k != "measured_by")
        lines.append(f"GB/s, {where(report, threads)}: {bandwidth}")
    return "\n".join(lines)


def _table(report: Report, case: Case, threads: int, tablefmt: str) -> str:
    """A column for each figure that any candidate has."""
    found = rows(report, case, threads)
    several = len({row.group for row in found}) > 1
    lines = []
    for row in found:
        line = {
            "of": row.group if several else "",
            "candidate": row.name,
            "ms": f"{row.seconds.median * 1e3:.2f}",
            "quartiles": f"{row.seconds.q1 * 1e3:.2f} - {row.seconds.q3 * 1e3:.2f}",
            "x eager": _ratio(row.faster_than_eager),
            "x compile": _ratio(row.faster_than_compile),
            f"of {report.suite.probe}": _ratio(row.of_probe),
            f"of {_limit(report.suite)}": "" if row.of_bandwidth is None else f"{row.of_bandwidth:.0%}",
            f"of {report.suite.baseline_group}": _ratio(row.of_baseline) if several else "",
            "memory": "" if row.peak_units is None else f"{row.peak_units:.2f}",
        }
        lines.append(line | {name: f"{value:.4g}" for name, value in row.figures.items() if isinstance(value, float)})
    if not lines:
        return "nothing was measured"
    columns = [name for name in dict.fromkeys(key for line in lines for key in line) if any(x.get(name) for x in lines)]
    cells = [[line.get(name, "") for name in columns] for line in lines]
    align = ["left" if name in ("of", "candidate") else "right" for name in columns]
    return tabulate(cells, headers=columns, tablefmt=tablefmt, colalign=align, disable_numparse=True)


def write(report: Report, folder: Path) -> list[Path]:
    """Write SUITE.json, SUITE.md and SUITE.png and return their paths; on a GPU its name follows SUITE."""
    folder.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", report.machine.get("gpu", "").lower()).strip("-")
    base = "-".join(filter(None, [report.suite.name, card]))
    data, table, plot = (folder / f"{base}.{kind}" for kind in ("json", "md", "png"))
    data.write_text(json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    table.write_text(text(report, tablefmt="github"))
    plots.draw(report, plot)
    return [data, table, plot]


def as_json(report: Report) -> dict[str, Any]:
    """Everything, raw rounds included."""
    suite, results = report.suite, []
    for case in report.cases:
        for threads in report.options["threads"]:
            least = bound(report, case, threads)
            results.append(
                {
                    "case": str(case),
                    **asdict(case),
                    "threads": threads,
                    "unit_bytes": suite.unit_bytes(case),
                    "floor_bytes": suite.floor_bytes and suite.floor_bytes(case),
                    "candidates": [asdict(row) for row in rows(report, case, threads)],
                    "bound": None if least is None else asdict(least),
                    "absent": report.result(case, threads)["absent"],
                    "failed": report.result(case, threads).get("failed", []),
                }
            )
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "title": suite.title,
        "options": report.options,
        "memory_note": report.memory_note,
        "versions": report.versions,
        "machine": report.machine,
        "limits_gb_per_s": {str(threads): answer["limits"] for threads, answer in report.timed.items()},
        "results": results,
    }


def _limit(suite: Suite) -> str:
    """The limit in a word: a share of the copy bandwidth is called that."""
    return "copy" if suite.bandwidth == "copy" else "limit"


def _ratio(value: Optional[Spread]) -> str:
    return "" if value is None else f"{value.median:.2f}"
