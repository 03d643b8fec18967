"""The plot of a report: a line of panels per case, one per thread count, one for memory and one for losses."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from benchmarks.summary import Report, Row, floor_seconds, processor, rows, where

# By family: a colour and its meaning. One strong colour for what this project does, grey for eager; the hues stay apart
# for colour-blind readers.
FAMILIES = {
    "eager": ("#9aa0a6", "eager PyTorch"),
    "compile": ("#4a7fb5", "torch.compile"),
    "peer": ("#7b9e6b", "other packages"),
    "kdkernels": ("#d95f02", "kdkernels"),
    "kernel": ("#f5b37d", "its op alone"),
    "reference": ("#fbe6d5", "its reference in plain PyTorch"),
    "probe": ("#ffffff", "yardstick"),
    "fixed": ("#e6e3b8", "what any loss costs"),
    "alone": ("#b9a7d6", "no teacher"),
}
EDGE: dict[str, Any] = {"edgecolor": "#555555", "linewidth": 0.6}
# Width of a letter of a bar's label beside a panel's width: labels make room for themselves.
LETTER = 0.0142


def draw(report: Report, path: Path) -> None:
    """Draw a report into a PNG file."""
    threads = report.options["threads"]
    every = [[rows(report, case, count) for count in threads] for case in report.cases]
    first = [row for line in every for row in line[0]]
    memory = any(row.peak_units is not None for row in first)
    losses = any(row.figures.get("losses") for row in first)
    heights = [max(2.2, 0.75 + 0.27 * (len(line[0]) + len({row.group for row in line[0]}))) for line in every]
    scores = any(_score(row) for row in first)
    panels = len(threads) + memory + losses + scores
    # A Figure of its own, not pyplot's: no window system, no state shared with the caller.
    figure = Figure(figsize=(2.7 + 4.1 * panels, sum(heights) + 1.8), layout="constrained")
    axes = figure.subplots(len(every), panels, squeeze=False, height_ratios=heights)
    for case, line, row_of_axes in zip(report.cases, every, axes, strict=True):
        panel = iter(row_of_axes)
        for count, found in zip(threads, line, strict=True):
            floor = floor_seconds(report, case, count)
            limit = None if floor is None else 1e3 * floor
            unit = "ms" if limit is None else f"ms (dashed: the bandwidth limit, {_digits(limit)} ms)"
            times = [tuple(1e3 * x for x in (r.seconds.median, r.seconds.q1, r.seconds.q3)) for r in found]
            ax = next(panel)
            _bars(ax, found, times, partial(_label, report), limit, named=count == threads[0])
            _frame(ax, unit, f"{case}, {where(report, count)}")
        if memory:
            units = [(row.peak_units or 0.0,) * 3 for row in line[0]]
            ax = next(panel)
            _bars(ax, line[0], units, lambda row: f"{row.peak_units:.2f}" if row.peak_units is not None else "", 1)
            _frame(ax, f"in units of one {report.suite.unit}", f"{case}, peak extra memory")
        if losses:
            ax = next(panel)
            for row in line[0]:
                # Where the curves agree, eager's broad line has the others on it.
                width = 5.0 if row.family == "eager" else 1.0
                ax.plot(row.figures.get("losses", []), color=FAMILIES[row.family][0], linewidth=width)
            _name_curves(ax, line[0])
            ax.set_yscale("log")
            for format_ticks in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                format_ticks(StrMethodFormatter("{x:g}"))
            _frame(ax, "step", f"{case}, loss of every student")
        if scores:
            ax = next(panel)
            scored = [(row, score) for row in line[0] if (score := _score(row)) is not None]
            _scores(ax, scored)
            name = scored[0][1][0]
            better = "lower" if name == "perplexity" else "higher"
            _frame(ax, "after the steps above, on data that no student saw", f"{case}, {name} ({better} is better)")
    shown = [family for family in FAMILIES if any(row.family == family for row in first)]
    handles = [Patch(facecolor=FAMILIES[family][0], label=FAMILIES[family][1], **EDGE) for family in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
    caption = (
        f"{processor(report)}, torch {report.versions['torch']}. Medians of {report.options['rounds']} interleaved "
        "rounds, whiskers: quartiles. Factors: how many times faster than the best eager and the best compiled "
        "formulation."
    )
    if busy(report):
        caption += f" Other jobs ran: load {report.machine['load_average_before']}."
    figure.suptitle(f"{report.suite.title}\n{textwrap.fill(caption, int(15 * (2.7 + 4.1 * panels)))}", fontsize=9)
    figure.savefig(path, dpi=130)


def busy(report: Report) -> bool:
    """True if the machine had other work for half of its processors or more when the run began."""
    return bool(report.machine["load_average_before"] >= max(1.0, report.machine["cpus"] / 2))


def _name_curves(ax: Axes, found: Sequence[Row]) -> None:
    """The name of a group beside the end of its curve, where there are several groups."""
    ends = {row.group: row.figures["losses"] for row in found if row.figures.get("losses")}
    if len(ends) > 1:
        for group, losses in ends.items():
            # Curves fall: there is room below their ends.
            end = len(losses) - 1, losses[-1]
            ax.annotate(group, end, (0, -6), textcoords="offset points", ha="right", va="top", fontsize=8)
        ax.margins(y=0.1)


def _score(row: Row) -> Optional[tuple[str, float, float]]:
    """The name of a trained student's score, the teacher's, and its own; None where there is none."""
    for name, value in row.figures.items():
        if found := re.fullmatch(r"(\w+) \(teacher: (.*)\)", name):
            return found[1], float(found[2]), value
    return None


def _scores(ax: Axes, scored: Sequence[tuple[Row, tuple[str, float, float]]]) -> None:
    """One bar for the teacher and one for every kind of student: those of a kind agree, as their losses do."""
    shown: dict[str, tuple[str, float]] = {}
    for row, score in scored:
        shown.setdefault("teacher", ("#dddddd", score[1]))
        words = {"alone": "no teacher", "eager": "distilled, eager"}.get(row.family, "distilled, kdkernels")
        shown.setdefault(words, (FAMILIES[row.family][0], score[2]))
    for position, (name, (color, value)) in enumerate(shown.items()):
        ax.barh(position, value, 0.76, color=color, **EDGE)
        ax.text(0, position, f"  {name}: {f'{value:.1%}' if value <= 1 else f'{value:.0f}'}", va="center", fontsize=8)
    ax.set_yticks([])
    ax.set_ylim(len(shown) - 0.3, -0.7)


def _label(report: Report, row: Row) -> str:
    label = f"{_digits(1e3 * row.seconds.median)} ms"
    if row.family in ("kdkernels", "kernel"):
        for name, ratio in (("eager", row.faster_than_eager), ("compile", row.faster_than_compile)):
            label += "" if ratio is None else f", {_digits(ratio.median)}x {name}"
        if report.suite.probe == "rest" and (alone := _of_the_loss_alone(row)) is not None:
            label += f" (its loss: {_digits(alone)}x)"
        if row.of_baseline is not None and row.group != report.suite.baseline_group:
            label += f", {row.of_baseline.median:.2f} of {report.suite.baseline_group}"
    return label


def _of_the_loss_alone(row: Row) -> Optional[float]:
    """How many times faster than eager without the step around the loss; None where noise is larger than the loss."""
    if row.faster_than_eager is None or row.of_probe is None or row.of_probe.median <= 1.02:
        return None
    return (row.faster_than_eager.median * row.of_probe.median - 1) / (row.of_probe.median - 1)


def _bars(
    ax: Axes,
    found: Sequence[Row],
    figures: Sequence[Sequence[float]],
    label: Callable[[Row], str],
    limit: Optional[float],
    named: bool = False,
) -> None:
    """Bars from the top, with quartiles and words; the axis ends where all but the reference's fit, and cuts it off."""
    ends = [(high, label(row), row.family) for (_, _, high), row in zip(figures, found, strict=True)]
    end = max((x / (1 - LETTER * (len(words) + 2)) for x, words, of in ends if of != "reference"), default=0) or 1.0
    position, group, ticks = 0.0, None, []
    for row, (middle, low, high) in zip(found, figures, strict=True):
        if row.group != group and len({item.group for item in found}) > 1:
            position += 1
            ax.text(0.01, position - 0.5, row.group, fontsize=8, weight="bold", transform=ax.get_yaxis_transform())
        group = row.group
        ax.barh(position, min(middle, end), 0.76, color=FAMILIES[row.family][0], **EDGE)
        if high > end:
            ax.text(end, position, f"{label(row)} >", va="center", ha="right", fontsize=7.5)
        else:
            ax.text(high + 0.01 * end, position, label(row), va="center", fontsize=7.5)
            ax.errorbar(middle, position, xerr=[[middle - low], [high - middle]], color="#222222", lw=0.9, capsize=2)
        ticks.append(position)
        position += 1
    ax.set_yticks(ticks, [row.name if named else "" for row in found], fontsize=8)
    ax.set(xlim=(0, end), ylim=(position, -0.8))
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    if limit is not None:
        ax.axvline(limit, color="#111111", linestyle=(0, (4, 3)), linewidth=0.9)


def _frame(ax: Axes, unit: str, title: str) -> None:
    ax.tick_params(axis="x", which="both", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(unit, fontsize=8)
    ax.set_title(title, fontsize=10)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
