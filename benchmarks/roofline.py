"""``python -m benchmarks.roofline``: what each kernel moves and computes, and the time that a model predicts.

A prediction, not a measurement: no GPU takes part. Bytes are passes over ``[N, V]`` times its size, as counted by
executing the compiled PTX (tests/kernels/test_emulated.py holds the kernels to them byte by byte). Instructions and
transcendental operations are those of tests/kernels/budgets.json and budgets_amd.json. The predicted time is the
longest of four, each between an optimistic and a pessimistic guess where there is one:

- memory: bytes from DRAM at 90 % of the peak bandwidth. A later sweep's reads come from L2 as far as the rows in flight
  fit there: their share is 0.8 of L2 over the bytes of those rows, or half of that;
- issue: instructions at one a clock for each of the lanes that a multiprocessor issues to;
- transcendental operations at their rate;
- rows: a row's phases one after the other (start, latency of memory, transfer, arithmetic, barriers, the last stores)
  over the rows in flight. A kernel that fetches the next row meanwhile waits for arithmetic and reductions alone.

Peers are counted by hand from their source; ``--measure-peers`` also executes those that can be imported.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from matplotlib.figure import Figure
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "tests" / "kernels" / "budgets.json"
BUDGETS_AMD = ROOT / "tests" / "kernels" / "budgets_amd.json"
PAGE = ROOT / "docs" / "internals" / "gpu-performance.md"
PLOT = ROOT / "docs" / "internals" / "gpu-roofline.png"
BEGIN, END = "<!-- roofline: written by python -m benchmarks.roofline -->", "<!-- roofline: end -->"

N, V, ITEMSIZE = 8192, 131072, 2
# Of the peak: what quack's cross entropy reaches on an H100 (3.01 of 3.35 TB/s), and a copy on an H200 (4.3 of 4.8).
BANDWIDTH_SHARE = 0.9


class Range(NamedTuple):
    """An optimistic and a pessimistic guess."""

    low: float
    high: float

    def __str__(self) -> str:
        low, high = f"{self.low:.2f}", f"{self.high:.2f}"
        return low if low == high else f"{low} - {high}"


# Microseconds of a row's phases: guesses, which a profile of one launch would replace.
START = Range(0.5, 0.7)
LATENCY = Range(0.6, 0.9)
CLUSTER_BARRIER = Range(0.2, 0.4)  # with a fence at the scope of the GPU before it, as Triton makes them
TRIP = Range(0.5, 1.0)  # a reduction through the cluster by remote stores, without a fence
DRAIN = Range(0.6, 1.0)
# Of L2 over the bytes of the rows in flight: what a second sweep finds there.
L2_SHARE = Range(0.8, 0.4)
# Bytes a clock that a multiprocessor takes from L2.
PORT = 64


@dataclass(frozen=True)
class Device:
    """Peak rates: TB/s, multiprocessors, clock in GHz, L2 in MB, lanes issued to and transcendental results a clock."""

    name: str
    target: str
    terabytes: float
    multiprocessors: int
    gigahertz: float
    l2: int
    source: str
    lanes: int = 128
    transcendental: int = 16

    @property
    def clocks(self) -> float:
        """Of all multiprocessors in a second."""
        return self.multiprocessors * self.gigahertz * 1e9


# The clock is that of the data sheet's fp32 rate. NVIDIA's multiprocessors issue one instruction to 32 lanes in each of
# four schedulers; CUDA C++ Programming Guide, "Arithmetic Instructions", has the transcendental results a clock. CDNA 3
# instruction set guide: four SIMDs, each a wave of 64 in four clocks, transcendental ones at a quarter of that.
DEVICES = (
    Device("A100", "sm_80", 2.04, 108, 1.41, 40, "NVIDIA A100 data sheet, SXM 80 GB: 19.5 TFLOP/s"),
    Device("H100", "sm_90", 3.35, 132, 1.98, 50, "NVIDIA H100 data sheet, SXM: 67 TFLOP/s"),
    Device("H200", "sm_90", 4.8, 132, 1.98, 60, "NVIDIA H200 data sheet, SXM: 67 TFLOP/s"),
    Device("B200", "sm_100", 7.75, 148, 1.98, 126, "NVIDIA HGX B200 data sheet: 62 TB/s and 600 TFLOP/s of 8"),
    Device("MI300X", "gfx942", 5.3, 304, 2.1, 256, "AMD Instinct MI300X data sheet: 163.4 TFLOP/s, packed", lanes=64),
)
NVIDIA = tuple(device for device in DEVICES if device.target.startswith("sm_"))


@dataclass(frozen=True)
class Rows:
    """How rows are worked on.

    Args:
        blocks: of one row.
        threads: of a block.
        resident: blocks that a multiprocessor holds.
        sweeps: over the row; 1 where it is kept.
        barriers: of the cluster a row, with a fence each.
        trips: reductions through the cluster without one.
        ahead: whether the next row is fetched meanwhile.
        columns: that a thread of a sweep loads before it waits.
    """

    blocks: int
    threads: int
    resident: int
    sweeps: int = 1
    barriers: int = 0
    trips: int = 0
    ahead: bool = False
    columns: float = 16


@dataclass(frozen=True)
class Work:
    """Passes over ``[N, V]`` of the logits' dtype, and operations an element where they are counted.

    tensors: read for the first time; what is read beyond them L2 may serve. None of rows: whole kernels over [N, V] one
    after the other, of which L2 holds nothing.
    """

    reads: float
    writes: float
    instructions: Optional[float] = None
    transcendental: Optional[float] = None
    tensors: int = 2
    rows: Optional[Rows] = None


# Our kernels in the table: name, passes that sweeps read, and sweeps.
OURS = {
    "forward_kl": (3.75, 2),
    "jsd": (6, 3),
    "tvd": (6, 3),
    "alpha_beta": (6, 3),
    "jeffreys-hard": (3.875, 2),
    "dkd": (3.875, 2),
    "mse": (2, 1),
}
# The dense kernels in CUDA C++, counted by tests/cuda/dense_counts.py at V = 128,256 (JSD: 8,192): instructions an
# element, of Hopper's and later ones in one pass, and of the A100's sweeps with the passes these read.
CUDA = {"forward_kl": (26.3, 2.1, (48.6, 4, 2)), "jsd": (63.7, None, (127.4, 6, 3))}
# Passes by hand, from the source at the commit named, with what the caller must run before and after: fp32 passes count
# as two. ATen's softmax of wide rows reads twice; it is counted once. Instructions: executed by ptxrun where the whole
# is one kernel.
PEERS = {
    "eager F.kl_div(log_softmax, softmax)": (Work(13, 8), "counted with a TorchDispatchMode, torch 2.13"),
    "Liger LigerKLDIVLoss + log_softmax": (Work(8, 5), "linkedin/Liger-Kernel ead96b6, ops/kl_div.py"),
    "Liger LigerJSD + log_softmax": (Work(8, 8), "linkedin/Liger-Kernel ead96b6, ops/jsd.py (1R+2W in fp32)"),
    "Liger LigerTVDLoss + softmax": (Work(6, 4), "linkedin/Liger-Kernel ead96b6, ops/tvd.py"),
    "Fast-LLM forward/reverse KL": (
        Work(3.79, 1, 34.4, 6.0, rows=Rows(1, 256, 1, 2, columns=64)),
        "ServiceNow/Fast-LLM 7d61a1b, its Triton kernels, 8 warps",
    ),
}
FLOOR = Work(2, 1)
FLOOR_NAME = "the floor: 2 reads, 1 write"


@functools.cache
def budgets() -> dict[str, Any]:
    """Of both vendors."""
    found: dict[str, Any] = json.loads(BUDGETS.read_text())
    return found | json.loads(BUDGETS_AMD.read_text())


def of_budget(entry: dict[str, Any], swept: float, sweeps: int, tensors: int = 2) -> Work:
    """A Triton kernel on a GPU of NVIDIA's."""
    cluster = entry["pattern"] == "cluster"
    blocks, threads = entry["num_ctas"], 32 * entry["num_warps"]
    barriers = entry["cluster_barriers"] if cluster else 0
    # 16 bytes an access, of each tensor and in each sweep.
    columns = entry["loads"]["16"] * 16 / ITEMSIZE / (tensors * sweeps)
    sweeps = 1 if cluster else sweeps
    rows = Rows(blocks, threads, entry["resident_blocks"], sweeps, barriers, columns=columns)
    reads = tensors if cluster else swept
    return Work(reads, 1, entry["instructions"], entry["transcendental"], tensors, rows)


def ours(device: Device) -> dict[str, Work]:
    """Our dense kernels in Triton as the tuning table has them run on a device."""
    found = {}
    for name, (swept, sweeps) in OURS.items():
        entry = budgets()[f"{device.target}/{name}"]
        if device in NVIDIA:
            found[name] = of_budget(entry, swept, sweeps)
        else:
            # Registers are shared by the waves of a SIMD: a block of 8 waves has two on each.
            resident = max(1, 512 // (-(-entry["registers"] // 8) * 8) // 2)
            rows = Rows(1, 512, resident, sweeps, columns=entry["columns"])
            found[name] = Work(swept, 1, of_amd(entry), None, rows=rows)
    return found


def of_amd(entry: dict[str, Any]) -> float:
    """Vector instructions, each transcendental one as four: they share the SIMD."""
    return float(entry["valu"] + 3 * entry["transcendental"])


def cuda(device: Device) -> dict[str, Work]:
    """Our dense kernels in CUDA C++."""
    found = {}
    for name, (instructions, transcendental, (of_a100, reads, sweeps)) in CUDA.items():
        if device.name == "A100":
            found[name] = Work(reads, 1, of_a100, None, rows=Rows(1, 256, 2, sweeps, columns=32))
        elif device in NVIDIA:
            rows = Rows(16, 128, 2, trips=2, ahead=True)
            found[name] = Work(2, 1, instructions, transcendental, rows=rows)
    return found


def sparse() -> dict[str, dict[str, Work]]:
    """A sparse teacher: one tensor of logits; the teacher's 8 bytes a slot are left out.

    Of the CUDA kernels, which keep a row of this width on chip where there are clusters (docs/internals/cuda.md has the
    instructions), and of the Triton one.
    """
    a100 = Work(2, 1, 20.5, tensors=1, rows=Rows(1, 256, 2, 2, columns=32))
    later = Work(1, 1, 22.9, tensors=1, rows=Rows(4, 256, 2, barriers=4))
    capture = Work(1, 0, 16.5, tensors=1, rows=Rows(1, 256, 2, 1))
    triton = {d.name: of_budget(budgets()[f"{d.target}/topk-bucket"], 2, 2, tensors=1) for d in NVIDIA}
    return {
        "kdkernels topk_kd_loss, CUDA": {d.name: a100 if d.name == "A100" else later for d in NVIDIA},
        "kdkernels topk_kd_loss, Triton": triton,
        "kdkernels capture_topk, CUDA": {d.name: capture for d in NVIDIA},
        "eager log_softmax + gather": {device.name: Work(3, 3) for device in DEVICES},
    }


def predict(work: Work, device: Device) -> tuple[Range, str]:
    """Milliseconds for the whole of ``[N, V]``, and what bounds the pessimistic guess."""
    bounds = {
        "memory": _memory(work, device),
        "issue": _alike((work.instructions or 0.0) * N * V / (device.clocks * device.lanes)),
        "transcendental": _alike((work.transcendental or 0.0) * N * V / (device.clocks * device.transcendental)),
        "rows": _rows(work, device),
    }
    bound = max(bounds, key=lambda name: bounds[name].high)
    return Range(*(1e3 * max(each) for each in zip(*bounds.values(), strict=True))), bound


def _alike(seconds: float) -> Range:
    return Range(seconds, seconds)


def _in_flight(rows: Rows, device: Device) -> float:
    return min(N, max(1, device.multiprocessors * rows.resident // rows.blocks))


def _memory(work: Work, device: Device) -> Range:
    again = max(0.0, work.reads - work.tensors) if work.rows is not None else 0.0
    found = []
    for share in L2_SHARE:
        served = 0.0
        if work.rows is not None and again:
            held = _in_flight(work.rows, device) * work.tensors * V * ITEMSIZE
            served = min(1.0, share * device.l2 * 1e6 / held)
        moved = (work.reads - again * served + work.writes) * ITEMSIZE * N * V
        found.append(moved / (BANDWIDTH_SHARE * device.terabytes * 1e12))
    return Range(*found)


def _rows(work: Work, device: Device) -> Range:
    """The phases of a row in turn, over the rows in flight."""
    rows = work.rows
    if rows is None:
        return _alike(0.0)
    clock = device.gigahertz * 1e9
    transfer = (work.tensors + work.writes) * V * ITEMSIZE / (rows.blocks * PORT * clock)
    alone = (work.instructions or 0.0) * V / (rows.blocks * device.lanes * clock)
    # Instructions of the other blocks of a multiprocessor come in between, or not.
    arithmetic = Range(alone, alone * rows.resident)
    found = []
    for i in range(2):
        trips = rows.trips * TRIP[i] * 1e-6
        if rows.ahead:
            seconds = max(transfer, arithmetic[i] + trips)
        else:
            tiles = rows.sweeps * max(1.0, V / (rows.blocks * rows.threads * rows.columns)) if rows.sweeps > 1 else 1
            waits = START[i] + tiles * LATENCY[i] + rows.barriers * CLUSTER_BARRIER[i] + DRAIN[i]
            seconds = waits * 1e-6 + trips + transfer + arithmetic[i]
        found.append(seconds * N / _in_flight(rows, device))
    return Range(*found)


def rows() -> list[tuple[str, dict[str, Work]]]:
    """Every line: its name, and its work by device."""
    triton = {device.name: ours(device) for device in DEVICES}
    lines = [(f"kdkernels {name}, Triton", {device: found[name] for device, found in triton.items()}) for name in OURS]
    extension = {device.name: cuda(device) for device in NVIDIA}
    lines += [
        (f"kdkernels {name}, CUDA", {device: found[name] for device, found in extension.items()}) for name in CUDA
    ]
    # Instructions of PTX say nothing of an AMD GPU; of whole kernels one after the other only bytes count.
    lines += [
        (name, {device.name: work for device in (DEVICES if work.instructions is None else NVIDIA)})
        for name, (work, _) in PEERS.items()
    ]
    lines.append((FLOOR_NAME, {device.name: FLOOR for device in DEVICES}))
    return lines + list(sparse().items())


def table() -> str:
    cells = []
    for name, works in rows():
        line = [name]
        for device in DEVICES:
            if device.name not in works:
                line.append("none" if "CUDA" in name else "not counted")
                continue
            milliseconds, bound = predict(works[device.name], device)
            line.append(f"{milliseconds}{'' if bound == 'memory' else f' ({bound})'}")
        cells.append(line)
    return tabulate(cells, headers=["", *(device.name for device in DEVICES)], tablefmt="github", disable_numparse=True)


def operations() -> str:
    """Passes and instructions of every row."""
    shown = [device for device in DEVICES if device.name != "H200"]
    cells = []
    for name, works in rows():
        line = [name]
        for device in shown:
            work = works.get(device.name)
            if work is None:
                line.append("-")
                continue
            counted = "not counted" if work.instructions is None else f"{work.instructions:.1f}"
            line.append(f"{work.reads:g}R+{work.writes:g}W" + ("" if work is FLOOR else f", {counted}"))
        cells.append(line)
    headers = ["passes, instructions an element", *(d.name.replace("H100", "H100, H200") for d in shown)]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def constants() -> str:
    cells = [
        [d.name, f"{d.terabytes:g}", d.multiprocessors, f"{d.gigahertz:g}", d.l2, d.lanes, d.transcendental, d.source]
        for d in DEVICES
    ]
    headers = ["", "TB/s", "multiprocessors", "GHz", "L2 MB", "lanes", "transcendental a clock", "source"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def section(measured: str = "") -> str:
    """The part of the page between the markers."""
    listed = {name: source for name, (_, source) in PEERS.items()}
    listed["eager log_softmax + gather"] = (
        "ATen's log_softmax, its backward, and the zeros that gather's backward fills"
    )
    sources = "\n".join(f"- {name}: {source}" for name, source in listed.items())
    return f"""{BEGIN}
## Roofline: a prediction, not a measurement

**No GPU has run these kernels yet.** `scripts/gpu-check` measures on one and leaves a file in
`benchmarks/results/gpu`: the cards that have one there have run them.

Loss and gradient of N = {N}, V = {V}, bf16, in predicted milliseconds, from an optimistic to a pessimistic guess;
what memory does not bound says so. Of our Triton kernels the plan that the table guesses; on a GPU a trial takes the
faster of one pass and sweeps. Below the floor: sparse teachers, which have one tensor of logits (loss and gradient; for
capture_topk its one read).

{table()}

![Predicted times, in those of the floor](gpu-roofline.png)

The model takes the longest of four times:

- memory: bytes at {BANDWIDTH_SHARE:.0%} of the peak bandwidth, less what L2 serves of a later sweep: {L2_SHARE.low:g}
  (or {L2_SHARE.high:g}) of its size over the bytes of the rows in flight;
- issue: instructions at one a clock and lane;
- transcendental operations at their rate;
- rows: the phases of a row in series, over the rows in flight. Start {START} us, {LATENCY} us for each load
  that is waited for, the transfer at {PORT} bytes a clock and multiprocessor, arithmetic, {CLUSTER_BARRIER} us for
  each barrier of a cluster with its fence, {DRAIN} us for the last stores. The dense CUDA kernel has the next row
  on its way meanwhile, and waits for arithmetic and two trips of {TRIP} us through its cluster.

These microseconds are guesses, and the first thing that a profile of one launch replaces.

Passes of our kernels are what `tests/kernels/test_emulated.py` counts by executing the compiled PTX, operations what
`tests/kernels/budgets.json` holds them to (for the CUDA kernels `tests/cuda/test_topk_cuda.py`,
`tests/cuda/dense_counts.py` and `tests/test_capture_cuda.py` count): machine instructions for kernels that keep the
row in registers, PTX for those that sweep. MI300X has its own, vector instructions of the loops in its machine code, a
transcendental one as four (`tests/kernels/budgets_amd.json`); what was not counted there has no milliseconds.

{operations()}

Peers, counted by hand from their source, with what a caller must run before and after; fp32 passes count as two. Where
several kernels make up the whole, instructions are not counted and only memory bounds them:

{sources}
{measured}
Constants:

{constants()}
{END}
"""


SHOWN = (
    "kdkernels forward_kl, Triton",
    "kdkernels forward_kl, CUDA",
    "kdkernels jsd, Triton",
    "kdkernels tvd, Triton",
    "Fast-LLM forward/reverse KL",
    "Liger LigerKLDIVLoss + log_softmax",
    "Liger LigerJSD + log_softmax",
    "eager F.kl_div(log_softmax, softmax)",
)
COLOURS = {"A100": "#7570b3", "H100": "#d95f02", "H200": "#e6ab02", "B200": "#1b9e77", "MI300X": "#a6761d"}


def draw(path: Path) -> None:
    """One panel: times of dense losses in those of each device's floor, so that all devices have one scale."""
    works = dict(rows())
    figure = Figure(figsize=(10, 8), layout="constrained")
    ax = figure.subplots()
    height = 0.8 / len(DEVICES)
    for group, name in enumerate(SHOWN):
        for index, device in enumerate(DEVICES):
            if device.name not in works[name]:
                continue
            milliseconds, _ = predict(works[name][device.name], device)
            floor = predict(FLOOR, device)[0].low
            low, high = (value / floor for value in milliseconds)
            y = group + (index - (len(DEVICES) - 1) / 2) * height
            style: dict[str, Any] = {
                "color": "white",
                "edgecolor": COLOURS[device.name],
                "hatch": "////",
                "linewidth": 0.9,
            }
            ax.barh(y, high, height * 0.86, label=device.name if group == 0 else None, **style)
            ax.plot([low, low], [y - height * 0.43, y + height * 0.43], color="#111111", linewidth=1.6)
            ax.annotate(f"{milliseconds} ms", (high, y), (3, 0), textcoords="offset points", va="center", fontsize=6.5)
    ax.axvline(1, color="#111111", linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set_yticks(
        range(len(SHOWN)), [name.replace(" + ", "\n+ ").replace("(log", "\n(log") for name in SHOWN], fontsize=8
    )
    ax.invert_yaxis()
    ax.set_xlim(0, 9)
    ax.set_xlabel("predicted time, in times of the floor (dashed: 2 reads and 1 write at 90 % of the peak)", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="hatched: predicted, none measured", fontsize=8, title_fontsize=8, loc="upper right")
    title = f"Prediction, no GPU has run it: loss and gradient, N = {N}, V = {V}, bf16"
    ax.set_title(f"{title}\nbar: pessimistic guess; line: optimistic", fontsize=10)
    figure.savefig(path, dpi=110)


def measure_peers() -> str:
    """Liger's Triton kernels, executed by ptxrun: passes and PTX instructions an element; the text for the page."""
    import torch
    from liger_kernel.ops.jsd import LigerJSDFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction
    from ptxrun.triton_bridge import patched

    rows_, columns = 2, 16384
    logq, logp = (torch.randn(rows_, columns).log_softmax(-1).bfloat16() for _ in range(2))
    runs = {
        "Liger kl_div kernel, loss": lambda: LigerKLDivLossFunction.apply(logq, logp, "batchmean", True, 1e-10),
        "Liger jsd kernel, loss and gradient": lambda: LigerJSDFunction.apply(logq, logp, None, 0.5, -100),
    }
    cells = []
    for name, run in runs.items():
        with patched(90, poison_empty=False) as runner:
            run()
        one = rows_ * columns * ITEMSIZE
        loads = sum(report.global_load_bytes for report in runner.reports) / one
        stores = sum(report.global_store_bytes for report in runner.reports) / one
        instructions = sum(report.thread_instr for report in runner.reports) / (rows_ * columns)
        cells.append([name, f"{loads:.1f}R+{stores:.1f}W", f"{instructions:.0f}"])
    listed = tabulate(
        cells, headers=["alone, from log-probabilities", "passes", "PTX instructions an element"], tablefmt="github"
    )
    version = importlib.metadata.version("liger-kernel")
    return f"\nliger-kernel {version}, executed in the same emulator (V = {columns}, bf16, sm_90):\n\n{listed}\n"


def write(page: Path, plot: Path, measured: str = "") -> None:
    """Put the section into the page, in place of the one it has, and draw the plot."""
    old = page.read_text() if page.exists() else "# Performance\n\n" + BEGIN + END + "\n"
    head, rest = old.split(BEGIN)
    tail = rest.split(END)[1].lstrip("\n")
    page.write_text(head + section(measured) + ("\n" + tail if tail else ""))
    draw(plot)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: docs/internals/gpu-performance.md)")
    parser.add_argument("--plot", type=Path, default=PLOT, help="(default: docs/internals/gpu-roofline.png)")
    parser.add_argument("--measure-peers", action="store_true", help="also execute Liger's kernels; needs liger-kernel")
    options = parser.parse_args(arguments)
    write(options.page, options.plot, measure_peers() if options.measure_peers else "")
    print(table())
    print(f"wrote {options.page}\nwrote {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
