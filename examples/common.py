"""Shared by the examples: options, a cache for teachers, the timed training loop, the comparison and its plot."""

import argparse
import concurrent.futures
import hashlib
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kdkernels as kd

EAGER, FUSED = "eager PyTorch", "kdkernels"
# First steps load the extension, compile the GPU kernels and fill the allocators' caches.
WARM_UP_STEPS = 5
MIB = 2**20
COLOURS = ("#9aa0a6", "#d95f02")  # eager, fused
# Of the range between the quartiles of a step's time over its median; a quiet machine stays well below.
NOISE = 0.25


def eager_kd_loss(divergence: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as people write it in PyTorch, at its fastest: two log_softmax and ``log_target=True``."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        logq = F.log_softmax(student / temperature, -1).flatten(0, -2)
        logp = F.log_softmax(teacher / temperature, -1).flatten(0, -2)
        return EAGER_DIVERGENCES[divergence](logp, logq) * temperature * temperature

    return loss


def _fused_kd_loss(args: argparse.Namespace) -> nn.Module:
    return kd.KDLoss(divergence=args.divergence, temperature=args.temperature, backend=args.backend)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return F.kl_div(logq, logp, log_target=True, reduction="batchmean")


def _jsd(logp: Tensor, logq: Tensor) -> Tensor:
    logm = torch.logaddexp(logp, logq) - torch.log(torch.tensor(2.0))
    return 0.5 * _kl(logp, logm) + 0.5 * _kl(logq, logm)


EAGER_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda logp, logq: _kl(logq, logp),
    "jsd": _jsd,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all examples have; defaults that differ come from ``parse``."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "triton", "cpu", "torch"),
        default="auto",
        help="who computes kdkernels' loss; auto: the fastest that runs",
    )
    parser.add_argument("--divergence", choices=tuple(EAGER_DIVERGENCES), default="forward_kl", help="what to minimise")
    parser.add_argument("--temperature", type=float, help="T of teacher and student; the loss has Hinton's factor T^2")
    parser.add_argument("--steps", type=int, help="training steps of each student")
    parser.add_argument("--teacher-steps", type=int, help="training steps of the teacher")
    parser.add_argument("--batch-size", type=int, help="examples per step")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; both runs use the same")
    parser.add_argument("--output-dir", type=Path, default=Path("out"), help="where the plot and the JSON file go")
    parser.add_argument("--cache-dir", type=Path, default=_user_cache(), help="where trained teachers are kept")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")


def parse(parser: argparse.ArgumentParser, defaults: dict[str, Any], quick: dict[str, Any]) -> argparse.Namespace:
    """Parse the command line; with --quick, options that were not given take the values of ``quick``."""
    for action in parser._actions:
        if action.dest in defaults:
            with_quick = f"; {quick[action.dest]} with --quick" if action.dest in quick else ""
            action.help = f"{action.help} (default {defaults[action.dest]}{with_quick})"
        elif action.nargs != 0:  # which flags have
            action.help = f"{action.help} (default %(default)s)"
    parser.set_defaults(**defaults)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no GPU")
    for name in ("batch_size", "threads", "teacher_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.steps < WARM_UP_STEPS + 2:
        parser.error(
            f"--steps must be at least {WARM_UP_STEPS + 2}, of which {WARM_UP_STEPS} warm up, got {args.steps}"
        )
    try:
        # Before a teacher is trained for it.
        _fused_kd_loss(args)
        kd.backends.select(args.backend, pick_device(args.device).type)
    except ValueError as error:
        parser.error(str(error))
    return args


def prepare(args: argparse.Namespace) -> torch.device:
    """Set threads and seed, which every process has of its own; return the device."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return pick_device(args.device)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdkernels"


def cached(folder: Path, name: str, config: dict[str, Any], make: Callable[[], dict[str, Any]]) -> tuple[Path, bool]:
    """Save what ``make()`` returns, once for each configuration and torch version.

    Returns:
        The file, for ``torch.load``, and whether it had to be made.
    """
    key = json.dumps({**config, "torch": torch.__version__}, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        print(f"teacher: trained before, from {path}")
        return path, False
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: an interrupted or a second process never leaves half a file.
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(made, unfinished)
    os.replace(unfinished, path)
    print(f"teacher: kept in {path}")
    return path, True


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its peak memory is its own.

    It is forked from a server that has imported what all of them need and run nothing: that takes ten seconds once.
    """
    context = multiprocessing.get_context("forkserver")
    # The first optimizer of a process imports the compiler.
    context.set_forkserver_preload(["__main__", "torch._dynamo"])
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    # A log is not a screen: there, a line every ten seconds.
    return tqdm(items, desc=f"{label:<14}", unit="step", mininterval=0.3 if sys.stderr.isatty() else 10)


def peak_memory(device: torch.device) -> int:
    """The most memory this process has had so far, in bytes: the GPU's allocator, or the resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux not ru_maxrss: a child inherits its parent's.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Marks on the device's own time line: nothing waits for a GPU while it trains."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) if self._on_gpu else 1e3 * (stop - start)


@dataclass
class Run:
    """One training of the student: the curve, the times of each step, the peak memory, and what the student can do."""

    name: str
    backend: str
    losses: list[float]
    loss_ms: list[float]  # forward + backward of the loss
    step_ms: list[float]
    memory_before: int  # peak until the first step, bytes
    memory_peak: int
    score: float

    @property
    def median_loss_ms(self) -> float:
        return statistics.median(self.loss_ms[WARM_UP_STEPS:])

    @property
    def median_step_ms(self) -> float:
        return statistics.median(self.step_ms[WARM_UP_STEPS:])

    @property
    def noise(self) -> float:
        """The range between the quartiles of the step's time, over its median."""
        low, _, high = statistics.quantiles(self.step_ms[WARM_UP_STEPS:], n=4)
        return (high - low) / self.median_step_ms


def distill(
    name: str,
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Tensor],
    args: argparse.Namespace,
    learning_rate: float,
    evaluate: Callable[[nn.Module], float],
) -> Run:
    """Train a student on its teacher's logits with the loss that ``name`` says, and time it."""
    loss_function: Callable[[Tensor, Tensor], Tensor]
    if name == EAGER:
        loss_function, backend = eager_kd_loss(args.divergence, args.temperature), "eager"
    else:
        loss_function, backend = _fused_kd_loss(args), kd.backends.select(args.backend, batches[0].device.type)

    def ask(batch: Tensor) -> tuple[Tensor, Tensor]:
        return batch, teacher(batch)

    return train(name, backend, student, ask, batches, loss_function, learning_rate, evaluate)


def train(
    name: str,
    backend: str,
    student: nn.Module,
    ask: Callable[[Any], tuple[Tensor, Any]],
    batches: Sequence[Any],
    loss_function: Callable[[Tensor, Any], Tensor],
    learning_rate: float,
    evaluate: Callable[[nn.Module], float],
    forward: Optional[Callable[[Tensor], Tensor]] = None,
) -> Run:
    """Train a student and time it.

    ``ask(batch)`` is what it reads, and what the teacher says to that; ``forward`` makes of it what the loss takes, by
    default the student's logits.
    """
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches))
    clock = Clock(device)
    marks, losses = [], []
    memory_before = peak_memory(device)
    for batch in progress(batches, name):
        begin = clock.mark()
        with torch.no_grad():
            inputs, target = ask(batch)
        output = (forward or student)(inputs)

        # A hook on the output runs when its gradient is complete: there the loss's share of the backward pass ends.
        ends: list[Any] = []
        output.register_hook(lambda _, ends=ends: ends.append(clock.mark()))
        start = clock.mark()
        loss = loss_function(output, target)
        loss.backward()

        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        marks.append((begin, start, ends[0], clock.mark()))
        losses.append(loss.detach())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    memory_peak = peak_memory(device)
    return Run(
        name=name,
        backend=backend,
        losses=torch.stack(losses).tolist(),
        loss_ms=[clock.milliseconds(start, end) for _, start, end, _ in marks],
        step_ms=[clock.milliseconds(begin, finish) for begin, _, _, finish in marks],
        memory_before=memory_before,
        memory_peak=memory_peak,
        score=evaluate(student),
    )


def relative_differences(eager: Run, fused: Run) -> list[float]:
    """``|a - b| / |a|`` at each step; infinite where one of the two is not finite."""
    differences = []
    for a, b in zip(eager.losses, fused.losses, strict=True):
        difference = abs(a - b) / max(abs(a), 1e-12)
        differences.append(difference if math.isfinite(difference) else math.inf)
    return differences


@dataclass
class Example:
    """The parts of a report about an example besides its two runs."""

    name: str
    title: str
    score: str  # what the score is, with its unit
    score_format: str
    teacher_score: float
    teacher_trained: bool
    tolerance: float  # of the relative difference of the curves
    shape: str  # of the logits


def report(example: Example, args: argparse.Namespace, eager: Run, fused: Run) -> int:
    """Print the comparison, save it as JSON and as a plot; return the exit status, 0 when the curves agree."""
    differences = relative_differences(eager, fused)
    worst = max(differences)
    agree = worst <= example.tolerance
    print("\n" + _table(example, eager, fused))
    noise = max(eager.noise, fused.noise)
    if noise > NOISE:
        print(
            f"\nThe time of a step varies by {noise:.0%} between its quartiles: the machine is busy, times are rough."
        )
    print(
        f"\nloss curves: largest relative difference {worst:.1e} in {len(differences)} steps, "
        f"tolerance {example.tolerance:.0e}: {'they agree' if agree else 'THEY DO NOT AGREE'}"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot, data = (args.output_dir / f"{example.name}.{suffix}" for suffix in ("png", "json"))
    _draw(example, args, eager, fused, differences, plot)
    data.write_text(json.dumps(_record(example, args, eager, fused, worst, agree), indent=1) + "\n")
    print(f"plot: {plot}\ndata: {data}")
    return 0 if agree else 1


def describe(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _busy(*runs: Run) -> bool:
    return max(run.noise for run in runs) > NOISE


def _table(example: Example, eager: Run, fused: Run) -> str:
    def line(label: str, left: str, right: str, last: str = "") -> str:
        return f"{label:<34}{left:>14}{right:>14}{last:>12}"

    def share(run: Run) -> str:
        return f"{run.median_loss_ms / run.median_step_ms:.0%}"

    def memory(run: Run) -> str:
        return f"{(run.memory_peak - run.memory_before) / MIB:.0f} MiB"

    lines = [
        line("", eager.name, fused.name),
        line("loss, forward + backward, median", *(f"{r.median_loss_ms:.2f} ms" for r in (eager, fused)))
        + f"{eager.median_loss_ms / fused.median_loss_ms:>11.1f}x",
        line("  share of the step", share(eager), share(fused)),
        line("whole step, median", *(f"{r.median_step_ms:.2f} ms" for r in (eager, fused)))
        + f"{eager.median_step_ms / fused.median_step_ms:>11.1f}x",
        line("peak memory", *(f"{r.memory_peak / MIB:.0f} MiB" for r in (eager, fused))),
        line("  of it added by training", memory(eager), memory(fused)),
        line("last loss", *(f"{r.losses[-1]:.5f}" for r in (eager, fused))),
        line(f"{example.score}", *(f"{r.score:{example.score_format}}" for r in (eager, fused)))
        + f"   (teacher {example.teacher_score:{example.score_format}})",
    ]
    return "\n".join(lines)


def _record(
    example: Example, args: argparse.Namespace, eager: Run, fused: Run, worst: float, agree: bool
) -> dict[str, Any]:
    return {
        "example": example.name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "kdkernels": kd.__version__},
        "device": describe(pick_device(args.device), args.threads),
        "logits": example.shape,
        "options": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "teacher": {"score": example.teacher_score, "trained_now": example.teacher_trained},
        "score": example.score,
        "agreement": {"max_relative_difference": worst, "tolerance": example.tolerance, "agree": agree},
        "runs": [
            {
                "name": run.name,
                "backend": run.backend,
                "score": run.score,
                "median_loss_ms": run.median_loss_ms,
                "median_step_ms": run.median_step_ms,
                "step_quartile_range": run.noise,
                "peak_memory_bytes": run.memory_peak,
                "peak_memory_before_training_bytes": run.memory_before,
                "losses": run.losses,
            }
            for run in (eager, fused)
        ],
    }


def _draw(
    example: Example, args: argparse.Namespace, eager: Run, fused: Run, differences: list[float], path: Path
) -> None:
    # Here, not at the top: the processes whose memory is measured need no matplotlib.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    steps = range(1, len(differences) + 1)
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    ((curve, gap), (duration, memory)) = figure.subplots(2, 2, height_ratios=(3, 2))
    figure.suptitle(
        f"{example.title}\n"
        f"logits {example.shape}, {describe(pick_device(args.device), args.threads)}, torch {torch.__version__}, "
        f"kdkernels {kd.__version__} (backend {fused.backend}{', no kernel' if fused.backend == 'torch' else ''})",
        fontsize=10,
    )

    for run, colour, width in ((eager, COLOURS[0], 5.0), (fused, COLOURS[1], 1.2)):
        score = f"{example.score} {run.score:{example.score_format}}"
        curve.plot(steps, run.losses, color=colour, linewidth=width, label=f"{run.name}: {score}")
    curve.plot([], [], " ", label=f"teacher: {example.score} {example.teacher_score:{example.score_format}}")
    curve.set(xlabel="step", ylabel=f"{args.divergence} loss, T = {args.temperature:g}", yscale="log")
    curve.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    curve.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    curve.yaxis.set_minor_formatter(NullFormatter())
    curve.legend(frameon=False, fontsize=9)
    curve.set_title("Loss of both runs", fontsize=11)

    gap.plot(steps, differences, ".", color=COLOURS[1], markersize=4)
    gap.axhline(example.tolerance, color="black", linestyle="--", linewidth=1)
    gap.annotate("tolerance", (1, example.tolerance), xytext=(0, 4), textcoords="offset points", fontsize=9)
    # Linear next to 0, which a logarithmic axis cannot show: many steps give the very same loss.
    gap.set_yscale("symlog", linthresh=1e-8)
    gap.set_ylim(-1e-9, 30 * max(example.tolerance, *filter(math.isfinite, differences)))
    gap.set(xlabel="step", ylabel="relative difference")
    gap.set_title("Relative difference of the two curves", fontsize=11)

    runs = (eager, fused)
    _bars(
        duration,
        "Time of a step: loss (coloured) and the rest" + (" (busy machine)" if _busy(*runs) else ""),
        "ms",
        [run.name for run in runs],
        [run.median_loss_ms for run in runs],
        [run.median_step_ms for run in runs],
        "{part:.3g} of {whole:.3g} ms ({share:.0%})",
    )
    _bars(
        memory,
        "Peak memory: added by training (coloured) and before",
        "MiB",
        [run.name for run in runs],
        [(run.memory_peak - run.memory_before) / MIB for run in runs],
        [run.memory_peak / MIB for run in runs],
        "{part:.0f} of {whole:.0f} MiB",
    )
    for axes in (curve, gap, duration, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee", axis="x" if axes in (duration, memory) else "both")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def _bars(
    axes: Any, title: str, unit: str, names: list[str], parts: list[float], wholes: list[float], text: str
) -> None:
    rests = [whole - part for part, whole in zip(parts, wholes, strict=True)]
    axes.barh(names, parts, color=COLOURS, height=0.55)
    axes.barh(names, rests, left=parts, color="#e8e8e8", height=0.55)
    for row, (part, whole) in enumerate(zip(parts, wholes, strict=True)):
        label = text.format(part=part, whole=whole, share=part / whole)
        axes.annotate(label, (whole, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set(xlabel=unit, xlim=(0, 1.45 * max(wholes)))
    axes.set_title(title, fontsize=11)
    axes.invert_yaxis()
