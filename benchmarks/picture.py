"""``python -m benchmarks.picture``: docs/assets/speed.png, one row of README's table as two panels of three bars.

The table is what ``python -m benchmarks`` measured. Nothing is measured here, and no number stands here: the picture
and the table cannot differ.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.plots import EDGE, FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "assets" / "speed.png"
SHOWN = "256 x 128,256 bf16"
BARS = ("eager", "compile", "kdkernels")


class Figures(NamedTuple):
    """Milliseconds, ratios to the bars above, and peak memory in gradients, of eager, torch.compile and kdkernels."""

    milliseconds: tuple[float, ...]
    ratios: tuple[str, str]
    memory: tuple[float, ...]


def read(text: str, case: str = SHOWN) -> Figures:
    """The figures of a row of the table in README.md."""
    [line] = re.findall(rf"^\| {re.escape(case)} \|(.*)\|$", text, flags=re.M)
    *milliseconds, ratios, memory = (cell.strip() for cell in line.split("|"))
    of_eager, of_compile = ratios.split(", ")
    return Figures(
        tuple(float(x) for x in milliseconds), (of_eager, of_compile), tuple(float(x) for x in memory.split(", "))
    )


def draw(found: Figures, path: Path) -> None:
    figure = Figure(figsize=(8.4, 2.3), layout="constrained")
    times, memory = figure.subplots(1, 2)
    ratios = (*(f", kdkernels is {ratio} faster" for ratio in found.ratios), "")
    for ax, values, words, title in (
        (times, found.milliseconds, [f"{x:g} ms{r}" for x, r in zip(found.milliseconds, ratios, strict=True)], "time"),
        (memory, found.memory, [f"{x:g}" for x in found.memory], "peak memory beyond the inputs, in tensors [N, V]"),
    ):
        for position, (family, value, said) in enumerate(zip(BARS, values, words, strict=True)):
            color, name = FAMILIES[family]
            ax.barh(position, value, 0.72, color=color, **EDGE)
            inside = value > 0.6 * max(values)
            ax.text(
                value - 0.01 * max(values) if inside else value + 0.015 * max(values),
                position,
                said,
                va="center",
                ha="right" if inside else "left",
                fontsize=9,
            )
            if ax is times:
                ax.text(-0.02 * max(values), position, name, va="center", ha="right", fontsize=9.5)
        ax.set(ylim=(2.6, -0.6), xlim=(0, 1.02 * max(values)))
        ax.set_yticks([])
        ax.set_xticks([])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.set_title(title, fontsize=10, loc="left")
    figure.suptitle(
        f"Forward KL with its gradient, {SHOWN.replace('x', 'tokens x a vocabulary of')}, 2 cores", fontsize=10.5
    )
    figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    draw(read((ROOT / "README.md").read_text()), PICTURE)
    print(f"wrote {PICTURE}")
