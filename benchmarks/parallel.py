"""Losses of a sharded vocabulary beside gathering the logits, in processes of gloo: time, and peak memory of a rank.

    python -m benchmarks.parallel                                     # 2 ranks, a minute
    python -m benchmarks.parallel --ranks 4 --shape 512x32000 --width 256

Every result is held to the reference in fp64 first, and one wrong result refuses all figures. Candidates take turns, in
an order that is drawn for each round; a time is that of the slowest rank, a figure the median of the rounds. Memory is
measured in processes of their own, as the other suites do.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks import measure
from benchmarks.__main__ import shapes
from benchmarks.model import DTYPES
from benchmarks.runner import OWN_TOLERANCE, TOLERANCE
from kdkernels import memory

# The two losses; of each the last is the one that gathers nothing.
NAMES = {
    "logits": ("gathered, eager PyTorch", "gathered, kd_loss", "sharded, kd_loss"),
    "hidden states": ("gathered, eager PyTorch", "gathered, kd_loss", "sharded, linear_kd_loss"),
}


class Inputs(NamedTuple):
    """Of a rank; weights and logits are its columns."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    logits: Tensor
    teacher_logits: Tensor

    def learning(self, group: str) -> list[Tensor]:
        return [self.logits] if group == "logits" else [self.hidden, self.weight]


class Gathered(torch.autograd.Function):
    """The columns of all ranks, of which each makes the same loss: the gradient of its own is its own."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        ctx.first, ctx.columns = dist.get_rank() * mine.shape[1], mine.shape[1]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[:, ctx.first : ctx.first + ctx.columns].contiguous()


class Summed(torch.autograd.Function):
    """Hidden states before a head that is sharded: their gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(logq, logp, reduction="batchmean", log_target=True)


def loss_of(group: str, name: str, x: Inputs) -> Tensor:
    if name == "sharded, linear_kd_loss":
        return kd.linear_kd_loss(*x[:4], process_group=dist.group.WORLD)
    if name == "sharded, kd_loss":
        return kd.kd_loss(x.logits, x.teacher_logits, process_group=dist.group.WORLD)
    student, teacher = x.logits, x.teacher_logits
    if group != "logits":
        student, teacher = Summed.apply(x.hidden) @ x.weight.T, x.teacher_hidden @ x.teacher_weight.T
    loss = eager if "eager" in name else kd.kd_loss
    return loss(Gathered.apply(student), Gathered.apply(teacher))


def inputs_of(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> tuple[Inputs, dict[str, list[Tensor]]]:
    """This rank's, and by group the loss and the gradients of one process in fp64."""
    (num, columns), rank, ranks = shape, dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(size, generator=generator)).to(dtype)

    own = slice(rank * columns // ranks, (rank + 1) * columns // ranks)
    whole = [drawn(num, width), drawn(columns, width, std=width**-0.5)]
    whole += [drawn(num, width), drawn(columns, width, std=width**-0.5)]
    logits, teacher_logits = drawn(num, columns), drawn(num, columns)
    truths = {}
    hidden, weight, *teacher = (x.double() for x in whole)
    loss = kd.linear_kd_loss(hidden.requires_grad_(), weight.requires_grad_(), *teacher)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    truths["hidden states"] = [loss.detach(), hidden.grad, weight.grad[own].clone()]
    student = logits.double().requires_grad_()
    loss = kd.kd_loss(student, teacher_logits.double())
    loss.backward()
    assert student.grad is not None
    truths["logits"] = [loss.detach(), student.grad[:, own].clone()]
    hidden, weight, states, matrix = (x[own].clone() if k % 2 else x for k, x in enumerate(whole))
    logits, teacher_logits = (x[:, own].contiguous() for x in (logits, teacher_logits))
    learning = (x.requires_grad_() for x in (hidden, weight, logits))
    hidden, weight, logits = learning
    return Inputs(hidden, weight, states, matrix, logits, teacher_logits), truths


def run(group: str, name: str, x: Inputs) -> list[Tensor]:
    learning = x.learning(group)
    loss = loss_of(group, name, x)
    return [loss.detach(), *torch.autograd.grad(loss, learning)]


def errors_of(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-300)).item() if b.numel() else 0.0
        for a, b in zip(found, truth, strict=True)
    ]


def work(job: dict[str, Any]) -> Optional[dict[str, Any]]:
    """The measurements of a rank; the first one tells of all."""
    torch.set_num_threads(1)
    store = f"file://{job['folder']}/store-{job['mode']}"
    dist.init_process_group("gloo", init_method=store, rank=job["rank"], world_size=job["ranks"])
    x, truths = inputs_of(tuple(job["shape"]), job["width"], DTYPES[job["dtype"]])
    keys = [(group, name) for group, names in NAMES.items() for name in names]
    figures: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for group, name in keys:
        found = errors_of(run(group, name, x), truths[group])
        limits = (OWN_TOLERANCE if "sharded" in name else TOLERANCE)[job["dtype"]]
        if any(error > limit for error, limit in zip(found, (limits[0], limits[1], limits[1]), strict=False)):
            raise SystemExit(f"rank {job['rank']}: {group}, {name}: relative errors {found}, at most {limits} allowed")
        errors[f"{group}|{name}"] = max(found)
    order = np.random.default_rng(0)
    truths.clear()
    for _ in range(job["rounds"] if job["mode"] == "time" else 1):
        for k in order.permutation(len(keys)):
            group, name = keys[k]
            dist.barrier()
            if job["mode"] == "time":
                value = measure.seconds("cpu", run, group, name, x)
            else:
                gc.collect()
                memory.empty_cache()
                before = measure.reset_peak("cpu")
                outcome = run(group, name, x)
                value = float(measure.peak("cpu") - before)
                del outcome
            slowest = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            figures.setdefault(f"{group}|{name}", []).append(slowest.item())
    dist.destroy_process_group()
    return {"figures": figures, "errors": errors}


def ranks_of(job: dict[str, Any]) -> dict[str, Any]:
    """Start the processes of a job; return what the first one measured."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    if job["mode"] == "memory":
        # As in ``worker``: glibc returns every block.
        environment.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    command = [sys.executable, "-m", "benchmarks.parallel", "--job"]
    started = [
        subprocess.Popen(
            [*command, json.dumps({**job, "rank": rank})], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(job["ranks"])
    ]
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a rank failed: no figures")
    answer: dict[str, Any] = json.loads(texts[0].splitlines()[-1])
    return answer


def table(times: dict[str, Any], peaks: Optional[dict[str, Any]], unit: int) -> str:
    lines = ["| of | way | ms | peak of a rank | error |", "| --- | --- | --- | --- | --- |"]
    for group, names in NAMES.items():
        sharded = f"{group}|{names[-1]}"
        for name in names:
            key = f"{group}|{name}"
            each = times["figures"][key]
            told = f"{1e3 * statistics.median(each):.0f}"
            if key != sharded:
                # Round by round.
                ratio = statistics.median(a / b for a, b in zip(each, times["figures"][sharded], strict=True))
                told += f" ({ratio:.2f} times sharded)"
            peak = "-" if peaks is None else f"{peaks['figures'][key][0] / unit:.2f}"
            lines.append(f"| {group} | {name} | {told} | {peak} | {times['errors'][key]:.0e} |")
    return "\n".join(lines)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--shape", type=shapes, default=[(512, 32000)], help="rows x vocabulary (default: 512x32000)")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.job:
        answer = work(json.loads(args.job))
        print(json.dumps(answer))
        return 0
    [shape] = args.shape
    if shape[1] % args.ranks:
        parser.error("the vocabulary must be a multiple of the ranks: gathering needs equal shards")
    with tempfile.TemporaryDirectory() as folder:
        job = {"shape": shape, "folder": folder}
        job |= {name: getattr(args, name) for name in ("ranks", "width", "dtype", "rounds")}
        times = ranks_of({**job, "mode": "time"})
        peaks = ranks_of({**job, "mode": "memory"}) if measure.peak_can_be_reset() else None
    print(f"{shape[0]} x {shape[1]}, hidden states of {args.width}, {args.dtype}, {args.ranks} ranks of one thread;")
    print("memory in logits [N, V] of the whole vocabulary\n")
    print(table(times, peaks, shape[0] * shape[1] * DTYPES[args.dtype].itemsize))
    return 0


if __name__ == "__main__":
    sys.exit(main())
