"""``python -m benchmarks.roofline``: what each kernel moves and computes, and the time that a model predicts.

A prediction, not a measurement: no GPU takes part. Bytes are passes over ``[N, V]`` times its size, as counted by
executing the compiled PTX (tests/kernels/test_emulated.py holds the kernels to them byte by byte). Instructions and
transcendental operations are those of tests/kernels/budgets.json. The predicted time is the longest of three: the
bytes at 90 % of the peak bandwidth, the instructions at one a clock and fp32 lane, the transcendental operations at 16
a clock and multiprocessor. Sweeps are charged to memory in full, though L2 may serve a part of the second one.

Peers are counted by hand from their source; ``--measure-peers`` also executes those that can be imported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "tests" / "kernels" / "budgets.json"
PAGE = ROOT / "docs" / "internals" / "gpu-performance.md"
PLOT = ROOT / "docs" / "internals" / "gpu-roofline.png"
BEGIN, END = "<!-- roofline: written by python -m benchmarks.roofline -->", "<!-- roofline: end -->"

N, V, ITEMSIZE = 8192, 131072, 2
# Of the peak: what quack's cross entropy reaches on an H100 (3.01 of 3.35 TB/s).
BANDWIDTH_SHARE = 0.9


@dataclass(frozen=True)
class Device:
    """Peak rates: TB/s, multiprocessors, clock in GHz, fp32 lanes and transcendental results a clock of each."""

    name: str
    target: str
    terabytes: float
    multiprocessors: int
    gigahertz: float
    source: str
    lanes: int = 128
    transcendental: int = 16


# The clock is that of the data sheet's fp32 rate. Lanes and transcendental results a clock: CUDA C++ Programming Guide,
# "Arithmetic Instructions"; for CDNA 3 its instruction set guide: four SIMDs, each a wave of 64 in four clocks,
# transcendental ones at a quarter of that.
DEVICES = (
    Device("A100", "sm_80", 2.04, 108, 1.41, "NVIDIA A100 data sheet, SXM 80 GB: 19.5 TFLOP/s", lanes=64),
    Device("H100", "sm_90", 3.35, 132, 1.98, "NVIDIA H100 data sheet, SXM: 67 TFLOP/s"),
    Device("H200", "sm_90", 4.8, 132, 1.98, "NVIDIA H200 data sheet, SXM: 67 TFLOP/s"),
    Device("B200", "sm_100", 7.75, 148, 1.98, "NVIDIA HGX B200 data sheet: 62 TB/s and 600 TFLOP/s of 8"),
    Device("MI300X", "gfx942", 5.3, 304, 2.1, "AMD Instinct MI300X data sheet: 163.4 TFLOP/s, packed", lanes=64),
)


@dataclass(frozen=True)
class Work:
    """Passes over ``[N, V]`` of the logits' dtype, and operations an element where they are known."""

    reads: float
    writes: float
    instructions: Optional[float] = None
    transcendental: Optional[float] = None

    @property
    def bytes_per_element(self) -> float:
        return (self.reads + self.writes) * ITEMSIZE


# Our kernels in the table: name, and passes that two sweeps read.
OURS = {
    "forward_kl": 3.75,
    "jsd": 6,
    "tvd": 6,
    "alpha_beta": 6,
    "jeffreys-hard": 3.875,
    "dkd": 3.875,
    "mse": 2,
}
# Passes by hand, from the source at the commit named, with what the caller must run before and after: fp32 passes count
# as two. ATen's softmax of wide rows reads twice; it is counted once.
PEERS = {
    "eager F.kl_div(log_softmax, softmax)": (Work(13, 8), "counted with a TorchDispatchMode, torch 2.13"),
    "Liger LigerKLDIVLoss + log_softmax": (Work(8, 5), "linkedin/Liger-Kernel ead96b6, ops/kl_div.py"),
    "Liger LigerJSD + log_softmax": (Work(8, 8), "linkedin/Liger-Kernel ead96b6, ops/jsd.py (1R+2W in fp32)"),
    "Liger LigerTVDLoss + softmax": (Work(6, 4), "linkedin/Liger-Kernel ead96b6, ops/tvd.py"),
    "Fast-LLM forward/reverse KL": (Work(4, 1), "ServiceNow/Fast-LLM 7d61a1b, its Triton kernels"),
}
FLOOR = Work(2, 1)
# A sparse teacher: one tensor of logits. Of the CUDA kernels, which keep a row of this width on chip where there are
# clusters and are not built for AMD, and of the Triton one. The teacher's 8 bytes a slot are left out.
NVIDIA = tuple(device.name for device in DEVICES if device.target.startswith("sm_"))
SPARSE: dict[str, dict[str, Work]] = {
    "kdkernels topk_kd_loss, CUDA": {name: Work(2 if name == "A100" else 1, 1) for name in NVIDIA},
    "kdkernels topk_kd_loss, Triton": {device.name: Work(2, 1) for device in DEVICES},
    "kdkernels capture_topk, CUDA": {name: Work(1, 0) for name in NVIDIA},
    "eager log_softmax + gather": {device.name: Work(3, 3) for device in DEVICES},
}


def ours(device: Device) -> dict[str, Work]:
    """Our kernels as the tuning table has them run on a device; AMD's take the operations of NVIDIA's two sweeps."""
    budgets: dict[str, Any] = json.loads(BUDGETS.read_text())
    found = {}
    for name, swept in OURS.items():
        target = device.target if device.target.startswith("sm_") else "sm_80"
        entry = budgets[f"{target}/{name}"]
        reads = 2 if entry["pattern"] == "cluster" else swept
        found[name] = Work(reads, 1, entry["instructions"], entry["transcendental"])
    return found


def predict(work: Work, device: Device) -> tuple[float, str]:
    """Milliseconds for the whole of ``[N, V]``, and what bounds them."""
    elements = N * V
    clocks = device.multiprocessors * device.gigahertz * 1e9
    bounds = {
        "memory": work.bytes_per_element * elements / (BANDWIDTH_SHARE * device.terabytes * 1e12),
        "issue": (work.instructions or 0.0) * elements / (clocks * device.lanes),
        "transcendental": (work.transcendental or 0.0) * elements / (clocks * device.transcendental),
    }
    bound = max(bounds, key=bounds.__getitem__)
    return 1e3 * bounds[bound], bound


def rows() -> list[tuple[str, dict[str, Work]]]:
    """Every line: its name, and its work by device."""
    by_device = {device.name: ours(device) for device in DEVICES}
    lines = [(f"kdkernels {name}", {device: found[name] for device, found in by_device.items()}) for name in OURS]
    lines += [(name, {device.name: work for device in DEVICES}) for name, (work, _) in PEERS.items()]
    lines.append(("the floor: 2 reads, 1 write", {device.name: FLOOR for device in DEVICES}))
    return lines + list(SPARSE.items())


def table() -> str:
    cells = []
    for name, works in rows():
        line = [name]
        for device in DEVICES:
            if device.name not in works:
                line.append("not built")
                continue
            work = works[device.name]
            milliseconds, bound = predict(work, device)
            line.append(
                f"{work.reads:g}R+{work.writes:g}W {milliseconds:.2f}{'' if bound == 'memory' else f' ({bound})'}"
            )
        cells.append(line)
    return tabulate(cells, headers=["", *(device.name for device in DEVICES)], tablefmt="github", disable_numparse=True)


def operations() -> str:
    cells = []
    devices = {device.name: ours(device) for device in DEVICES}
    for name in OURS:
        line = [name]
        for device in ("A100", "H100", "B200"):
            work = devices[device][name]
            line.append(f"{work.instructions:.1f} / {work.transcendental:.1f}")
        cells.append(line)
    headers = ["instructions / transcendental an element", "A100", "H100, H200", "B200"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def section(measured: str = "") -> str:
    """The generated part of docs/internals/gpu-performance.md."""
    constants = tabulate(
        [[d.name, d.terabytes, d.multiprocessors, d.gigahertz, d.lanes, d.transcendental, d.source] for d in DEVICES],
        headers=["", "TB/s", "multiprocessors", "GHz", "lanes", "transcendental a clock", "source"],
        tablefmt="github",
        disable_numparse=True,
    )
    listed = {name: source for name, (_, source) in PEERS.items()}
    listed["eager log_softmax + gather"] = (
        "ATen's log_softmax, its backward, and the zeros that gather's backward fills"
    )
    sources = "\n".join(f"- {name}: {source}" for name, source in listed.items())
    return f"""{BEGIN}
## Roofline: a prediction, not a measurement

Loss and gradient of N = {N}, V = {V}, bf16. Each cell: passes over [N, V] that are read and written, and the
predicted milliseconds: the longest of bytes at {BANDWIDTH_SHARE:.0%} of the peak bandwidth, instructions at one a clock
and lane, and transcendental operations at their rate; what memory does not bound says so. Launches, synchronisation and
what L2 serves of a second sweep are left out. No GPU took part. Below the floor: sparse teachers, which have one tensor
of logits (loss and gradient; for capture_topk its one read).

{table()}

![Predicted milliseconds](gpu-roofline.png)

Passes of our kernels are what `tests/kernels/test_emulated.py` counts by executing the compiled PTX, operations what
`tests/kernels/budgets.json` holds them to (for the CUDA kernels `tests/cuda/test_topk_cuda.py` and
`tests/test_capture_cuda.py` count): machine instructions for kernels that keep the row in registers (H100, H200,
B200), PTX for those that sweep. MI300X takes the operations of the A100's.

{operations()}

Peers, counted by hand from their source, with what a caller must run before and after; fp32 passes count as two:

{sources}
{measured}
Constants:

{constants}
{END}
"""


def draw(path: Path) -> None:
    lines = rows()
    figure = Figure(figsize=(11, 0.42 * len(lines) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(DEVICES), sharey=True)
    for ax, device in zip(axes, DEVICES, strict=True):
        values = [predict(works[device.name], device)[0] if device.name in works else 0.0 for _, works in lines]
        floor = predict(FLOOR, device)[0]
        colours = ["#d95f02" if name.startswith("kdkernels") else "#9aa0a6" for name, _ in lines]
        ax.barh(range(len(lines)), values, color=colours, edgecolor="#555555", linewidth=0.6)
        ax.axvline(floor, color="#111111", linestyle=(0, (4, 3)), linewidth=0.9)
        for position, value in enumerate(values):
            text = f"{value:.1f}" if value else "not built"
            ax.annotate(text, (value, position), (3, 0), textcoords="offset points", va="center", fontsize=7)
        ax.set_xlim(0, max(values) * 1.2)
        ax.set_title(device.name, fontsize=10)
        ax.set_xlabel("predicted ms", fontsize=8)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.tick_params(labelsize=7.5)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(lines)), [name for name, _ in lines])
    axes[0].invert_yaxis()
    figure.suptitle(f"Prediction: loss and gradient, N = {N}, V = {V}, bf16 (dashed: 2 reads and 1 write)", fontsize=10)
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
