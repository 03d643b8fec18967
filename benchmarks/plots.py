"""The plot of a report: one line of panels per case, with one panel per thread count and one for memory."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.model import Case
from benchmarks.summary import Report, Row, floor_seconds, rows, where

# One strong colour for what this project does, grey for eager; the hues stay apart for colour-blind readers.
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#4a7fb5",
    "peer": "#7b9e6b",
    "kdkernels": "#d95f02",
    "kernel": "#f5b37d",
    "reference": "#fbe6d5",
    "probe": "#ffffff",
    "fixed": "#e6e3b8",
}
MEANING = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "peer": "other packages",
    "kdkernels": "kdkernels",
    "kernel": "its op alone",
    "reference": "its reference in plain PyTorch",
    "probe": "yardstick",
    "fixed": "what any loss costs",
}
EDGE = "#555555"
PANEL_INCHES, LABEL_INCHES, BAR_INCHES = 4.1, 2.7, 0.26
CAPTION_LETTERS_PER_INCH, TITLE_LETTERS_PER_INCH = 15, 8
# Width of a letter of a bar's label beside a panel's width: labels make room for themselves.
LETTER = 0.0142


@dataclass(frozen=True)
class Bar:
    """A bar at ``position`` from the top."""

    position: float
    row: Row

    @property
    def key(self) -> tuple[str, str]:
        return self.row.group, self.row.name


def draw(report: Report, path: Path) -> None:
    """Draw a report into a PNG file."""
    layouts = [_bars(report, case, report.options["threads"][0]) for case in report.cases]
    every = [bar.row for bars in layouts for bar in bars]
    panels: list[Union[int, str]] = list(report.options["threads"])
    panels += ["memory"] if any(row.peak_units is not None for row in every) else []
    panels += ["losses"] if any(row.figures.get("losses") for row in every) else []
    least = 2.2 if "losses" in panels else 0.0
    heights = [max(least, BAR_INCHES * (bars[-1].position + 1) + 0.75) for bars in layouts]
    width = LABEL_INCHES + PANEL_INCHES * len(panels)
    caption = textwrap.fill(_caption(report), int(width * CAPTION_LETTERS_PER_INCH))
    title = textwrap.fill(report.suite.title, int(width * TITLE_LETTERS_PER_INCH))
    below_title = 0.2 + 0.24 * (title.count("\n") + 1)
    top = below_title + 0.13 + 0.16 * (caption.count("\n") + 1)
    height = sum(heights) + top + 0.7
    # A Figure of its own, not pyplot's: no window system, no state shared with the caller.
    figure = Figure(figsize=(width, height), layout="constrained")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0.01, 0, 0.98, 1 - top / height), hspace=0.06)  # type: ignore[call-arg]
    axes = figure.subplots(len(report.cases), len(panels), squeeze=False, height_ratios=heights)
    for case, bars, line in zip(report.cases, layouts, axes, strict=True):
        for panel, ax in zip(panels, line, strict=True):
            if panel == "losses":
                _loss_panel(ax, case, bars)
                continue
            _frame(ax, bars, labelled=ax is line[0])
            if panel == "memory":
                _memory_panel(ax, report, case, bars)
            else:
                _time_panel(ax, report, case, int(panel), bars)
    families = [family for family in COLOURS if any(bar.row.family == family for bars in layouts for bar in bars)]
    figure.legend(
        handles=[Patch(facecolor=COLOURS[f], edgecolor=EDGE, linewidth=0.6, label=MEANING[f]) for f in families],
        loc="outside lower center",
        ncols=len(families),
        frameon=False,
        fontsize=9,
    )
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=13, fontweight="bold")
    figure.text(0.5, 1 - below_title / height, caption, ha="center", va="top", fontsize=8.5, color="#444444")
    figure.savefig(path, dpi=130)


def _caption(report: Report) -> str:
    about = report.machine
    processor = about.get("gpu") or f"{about['processor']} ({about['vector_isa']}, {about['cpus']} CPUs)"
    return (
        f"{processor}, torch {report.versions['torch']}. Medians of {report.options['rounds']} interleaved rounds, "
        "whiskers: quartiles. Factors: how many times faster than the best eager and the best compiled formulation."
    )


def _bars(report: Report, case: Case, threads: int) -> list[Bar]:
    """The bars of a panel; where there are several groups, a gap before each, and no yardstick among them."""
    found: list[Bar] = []
    listed = rows(report, case, threads)
    several = len({row.group for row in listed}) > 1
    position = 0.0
    for row in listed:
        if several and row.family == "probe":
            continue
        if several and (not found or found[-1].row.group != row.group):
            position += 0.9
        found.append(Bar(position, row))
        position += 1.0
    return found


def _frame(ax: Axes, bars: Sequence[Bar], *, labelled: bool) -> None:
    ax.set_yticks([bar.position for bar in bars], [bar.row.name for bar in bars] if labelled else [""] * len(bars))
    ax.set_ylim(bars[-1].position + 0.9, bars[0].position - (1.5 if bars[0].position else 0.8))
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    if not bars[0].position:
        return
    for index, bar in enumerate(bars):
        if index == 0 or bars[index - 1].row.group != bar.row.group:
            ax.annotate(
                bar.row.group,
                (0, bar.position - 0.45),
                (4, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=8,
                fontweight="bold",
                va="bottom",
            )


def _time_panel(ax: Axes, report: Report, case: Case, threads: int, bars: Sequence[Bar]) -> None:
    timed = {(row.group, row.name): row for row in rows(report, case, threads)}
    found = [Bar(bar.position, timed[bar.key]) for bar in bars]
    several = bool(bars[0].position)
    labels = [_time_label(report, bar.row, several) for bar in found]
    _draw_bars(
        ax,
        found,
        [1e3 * bar.row.seconds.median for bar in found],
        [(1e3 * bar.row.seconds.q1, 1e3 * bar.row.seconds.q3) for bar in found],
        labels,
    )
    floor = floor_seconds(report, case, threads)
    if floor is not None:
        ax.axvline(1e3 * floor, color="#111111", linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set_xlabel("ms" if floor is None else f"ms (dashed: the bandwidth limit, {_digits(1e3 * floor)} ms)", fontsize=8)
    ax.set_title(f"{case}, {where(report, threads)}", fontsize=10)


def _time_label(report: Report, row: Row, several: bool) -> str:
    label = f"{_digits(1e3 * row.seconds.median)} ms"
    if row.family in ("kdkernels", "kernel"):
        if row.faster_than_eager is not None:
            label += f", {_digits(row.faster_than_eager.median)}x eager"
        if row.faster_than_compile is not None:
            label += f", {_digits(row.faster_than_compile.median)}x compile"
        if several and row.of_baseline is not None and row.group != report.suite.baseline_group:
            label += f", {row.of_baseline.median:.2f} of {report.suite.baseline_group}"
    return label


def _memory_panel(ax: Axes, report: Report, case: Case, bars: Sequence[Bar]) -> None:
    found = [bar for bar in bars if bar.row.peak_units is not None]
    if not found:
        ax.set_axis_off()
        return
    lengths = [bar.row.peak_units or 0.0 for bar in found]
    _draw_bars(ax, found, lengths, [(length, length) for length in lengths], [f"{length:.2f}" for length in lengths])
    ax.axvline(1, color="#111111", linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set_xlabel(f"in units of one {report.suite.unit}", fontsize=8)
    ax.set_title(f"{case}, peak extra memory", fontsize=10)


def _loss_panel(ax: Axes, case: Case, bars: Sequence[Bar]) -> None:
    """The curves of all students: where they agree, eager's broad line has the others on it."""
    for bar in bars:
        losses = bar.row.figures.get("losses", [])
        width = 5.0 if bar.row.family == "eager" else 1.0
        ax.plot(range(1, len(losses) + 1), losses, color=COLOURS[bar.row.family], linewidth=width)
    ax.set_yscale("log")
    ax.tick_params(which="both", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("step", fontsize=8)
    ax.set_title(f"{case}, loss of every student", fontsize=10)


def _draw_bars(
    ax: Axes,
    bars: Sequence[Bar],
    lengths: Sequence[float],
    whiskers: Sequence[tuple[float, float]],
    labels: Sequence[str],
) -> None:
    """Bars with their labels; the axis ends where all but the reference fit, and what is longer is cut off there."""
    ends = [max(length, high) for length, (_, high) in zip(lengths, whiskers, strict=True)]
    fitting = [
        end / (1 - LETTER * (len(label) + 2))
        for bar, end, label in zip(bars, ends, labels, strict=True)
        if bar.row.family != "reference"
    ]
    limit = max(fitting or ends) or 1.0
    ax.set_xlim(0, limit)
    for bar, length, (low, high), end, label in zip(bars, lengths, whiskers, ends, labels, strict=True):
        colour = COLOURS[bar.row.family]
        ax.barh(bar.position, min(length, limit), 0.76, color=colour, edgecolor=EDGE, linewidth=0.6)
        if end > limit:
            inside = (limit, bar.position), (-4, 0)
            ax.annotate(f"{label} >", *inside, textcoords="offset points", va="center", ha="right", fontsize=7.5)
            continue
        if high > low:
            ax.errorbar(
                length, bar.position, xerr=[[length - low], [high - length]], color="#222222", lw=0.9, capsize=2
            )
        ax.annotate(label, (end, bar.position), (5, 0), textcoords="offset points", va="center", fontsize=7.5)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
