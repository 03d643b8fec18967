"""The rounding errors of the dense losses beside those of eager PyTorch, over a grid of hard rows.

    python -m benchmarks.numerics               # measures, and writes docs/reference/numerics.md: minutes
    python -m benchmarks.numerics --small --backend torch --output -

Truth is the textbook formula of ``kdkernels.testing`` in fp64, eager PyTorch the same formula in fp32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence
from kdkernels.reference import divergences as reference
from kdkernels.testing import textbook_loss

EPSILON = torch.finfo(torch.float32).eps
# The bar: twice eager's error, and two units in the last place of what is computed.
TIMES_EAGER, ULPS = 2.0, 2.0
# Losses and gradients below this are taken as this: fp64 knows no more of them.
SMALLEST = 1e-12

DIVERGENCES: tuple[Divergence, ...] = (
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.Jeffreys(),
    kd.JSD(0.5),
    kd.JSD(0.1),
    kd.TVD(),
    kd.SkewKL(0.1),
    kd.SkewReverseKL(0.1),
    kd.AlphaBeta(0.2, 0.7),
    kd.AlphaBeta(1.0, -0.5),
    kd.SoftCE(),
)
SCALED = ("independent", "near")
TIES = ("ties 5", "ties 10", "ties 20", "near ties 10", "student's ties 10", "teacher's ties 10")
SPECIAL = ("confident 20", "confident 40", *TIES, "offset 1e3", "offset 1e5", "apart")
TEMPERATURES = (0.1, 0.5, 1.0, 4.0, 20.0)
SCALES = (0.1, 3.0, 30.0)


class Cell(NamedTuple):
    """A call of the grid: ``kind`` of rows, whose logits have standard deviation ``scale``."""

    divergence: Optional[Divergence]  # None: cross entropy
    kind: str
    scale: float
    temperature: float
    columns: int

    @property
    def name(self) -> str:
        return "cross_entropy" if self.divergence is None else describe(self.divergence)


class Errors(NamedTuple):
    """Root mean square over the rows of the relative errors of a cell, and how often the bar was passed by how much."""

    loss: float
    eager_loss: float
    grad: float
    eager_grad: float

    @property
    def loss_ratio(self) -> float:
        return _ratio(self.loss, self.eager_loss)

    @property
    def grad_ratio(self) -> float:
        return _ratio(self.grad, self.eager_grad)


def _ratio(error: float, eager: float) -> float:
    """1 where an error stands just at the bar."""
    if math.isnan(error) or math.isinf(error):
        return 0.0 if math.isnan(eager) or math.isinf(eager) else math.inf
    bar = ULPS * EPSILON + (TIMES_EAGER * eager if math.isfinite(eager) else math.inf)
    return error / bar


def describe(divergence: Divergence) -> str:
    params = ", ".join(f"{value:g}" for value in divergence.params() if value)
    return f"{divergence.name}({params})" if divergence.name in ("jsd", "alpha_beta") else divergence.name


def make_rows(kind: str, scale: float, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher ``[rows, columns]`` in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    t = normal(scale)
    if kind == "independent":
        return normal(scale), t
    if kind == "near":
        return t + normal(0.01 * scale), t
    if kind.startswith("confident"):
        t[torch.arange(rows), torch.arange(rows) * 37 % columns] += float(kind.split()[1])
        return t + normal(0.1), t
    if kind.startswith("offset"):
        offset = float(kind.split()[1])
        return t + normal(0.3 * scale) + offset, t + offset
    if "ties" in kind:
        return _with_ties(kind, t + normal(0.1), t)
    if kind == "apart":
        s = normal(scale)
        s[:, : columns // 2] -= 40
        t[:, columns // 2 :] -= 40
        return s, t
    raise ValueError(f"no rows of the kind {kind!r}")


def _with_ties(kind: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two, three or ten tokens of each row that far above the others of both models; near ties stand 0.1 apart."""
    *whose, height = kind.split()
    tops = torch.maximum(student.amax(-1), teacher.amax(-1)) + float(height)
    for row, top in enumerate(tops):
        at = (row * 37 + torch.arange((2, 3, 10)[row % 3])) % student.shape[-1]
        raised = top - 0.1 * torch.arange(len(at)) if "near" in whose else top
        if "teacher's" not in whose:
            student[row, at] = raised
        if "student's" not in whose:
            teacher[row, at] = raised
    return student, teacher


def cells(columns: Sequence[int], temperatures: Sequence[float], scales: Sequence[float]) -> Iterator[Cell]:
    for width in columns:
        for kind in SCALED:
            for scale in scales:
                for temperature in temperatures:
                    for divergence in DIVERGENCES:
                        yield Cell(divergence, kind, scale, temperature, width)
        for kind in SPECIAL:
            for loss in (*DIVERGENCES, None):
                yield Cell(loss, kind, 3.0, 1.0, width)


def measure(cell: Cell, backend: Any, rows: int) -> Errors:
    """The errors of a cell on a backend, and of eager PyTorch on the same rows."""
    s, t = make_rows(cell.kind, cell.scale, rows, cell.columns)
    labels = None
    options: dict[str, Any] = {"reduction": "none", "temperature": cell.temperature}
    if cell.divergence is None:
        labels = t.argmax(-1)
        options.update(kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1)
    else:
        options["divergence"] = cell.divergence

    def run(loss_of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        student = s.to(dtype).requires_grad_()
        loss = loss_of(student)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        return loss.detach().double(), grad.double()

    truth, true_grad = run(lambda x: true_rows(cell, x, t.double(), labels), torch.float64)
    top = s.argmax(-1, keepdim=True)
    # A gradient adds up to 0. Where a token has all the probability autograd loses its share to cancellation.
    true_grad.scatter_(-1, top, 0.0)
    true_grad.scatter_(-1, top, -true_grad.sum(-1, keepdim=True))
    found = []
    for loss_of in (
        lambda x: kd.kd_loss(x, t, labels, backend=backend, **options),
        lambda x: textbook_loss(x, t, labels, **options),
    ):
        loss, grad = run(loss_of, torch.float32)
        found.append(_mean_square((loss - truth).abs() / truth.abs().clamp(min=SMALLEST)))
        found.append(_mean_square((grad - true_grad).norm(dim=-1) / true_grad.norm(dim=-1).clamp(min=SMALLEST)))
    return Errors(found[0], found[2], found[1], found[3])


class _Model(NamedTuple):
    """Log-probabilities, probabilities, and these less 1: what a confident row has there is lost in the others."""

    log: Tensor
    p: Tensor
    less_one: Tensor


def _model(logits: Tensor, temperature: float) -> _Model:
    x = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    top = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.argmax(-1, keepdim=True), True)
    # 0, but for its derivative.
    at_top = torch.where(top, x, 0.0).sum(-1, keepdim=True)
    others = (x - at_top).exp().masked_fill(top, 0.0).sum(-1, keepdim=True)
    log = x - at_top - torch.log1p(others)
    return _Model(log, log.exp(), log.expm1())


def _mixed(a: _Model, weight: float, b: _Model) -> Tensor:
    """The logarithm of a mixture."""
    mass, less_one = weight * a.p + (1 - weight) * b.p, weight * a.less_one + (1 - weight) * b.less_one
    high = mass > 0.5
    return torch.where(
        high, torch.where(high, less_one, 0.0).log1p(), torch.where(high, 1.0, mass.clamp(min=1e-300)).log()
    )


def true_rows(cell: Cell, student: Tensor, teacher: Tensor, labels: Optional[Tensor]) -> Tensor:
    """The textbook formulas in fp64, with nothing lost where a token has all the probability."""
    q, p = _model(student, cell.temperature), _model(teacher, cell.temperature)
    if cell.divergence is None:
        assert labels is not None
        hard = _model(student, 1.0).log
        return -(0.9 * hard.gather(-1, labels[:, None]).squeeze(-1) + 0.1 * hard.mean(-1))
    name, (w, b) = cell.divergence.name, cell.divergence.params()
    forward, reverse = p.p * (p.log - q.log), q.p * (q.log - p.log)
    if name == "forward_kl":
        terms = forward
    elif name == "reverse_kl":
        terms = reverse
    elif name == "jeffreys":
        terms = forward + reverse
    elif name == "soft_ce":
        terms = -p.p * q.log
    elif name == "tvd":
        terms = (p.less_one - q.less_one).abs() / 2
    elif name == "jsd":
        m = _mixed(p, w, q)
        terms = w * p.p * (p.log - m) + (1 - w) * q.p * (q.log - m)
    elif name == "skew_kl":
        terms = p.p * (p.log - _mixed(p, w, q))
    elif name == "skew_reverse_kl":
        terms = q.p * (q.log - _mixed(q, w, p))
    elif name != "alpha_beta":
        return cell.temperature**2 * reference.TABLE[name](p.log, q.log, w, b)
    else:
        c = w + b
        terms = (w / c * (c * p.log).expm1() + b / c * (c * q.log).expm1() - (w * p.log + b * q.log).expm1()) / (w * b)
    return cell.temperature**2 * terms.sum(-1)


def _mean_square(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


FULL: dict[str, Any] = {"columns": (32000, 151936), "temperatures": TEMPERATURES, "scales": SCALES, "rows": 16}
SMALL: dict[str, Any] = {"columns": (2000,), "temperatures": (0.1, 1.0, 20.0), "scales": SCALES, "rows": 16}


def measure_all(
    backend: str, columns: Sequence[int], temperatures: Sequence[float], scales: Sequence[float], rows: int
) -> dict[Cell, Errors]:
    return {
        cell: measure(cell, backend, max(2, rows * columns[0] // cell.columns))
        for cell in cells(columns, temperatures, scales)
    }


def over(found: dict[Cell, Errors], times: float) -> list[str]:
    """The cells that pass the bar by more than so many times, in words."""
    return [
        f"{cell.name}, {cell.kind}, scale {cell.scale:g}, T {cell.temperature:g}, V {cell.columns}: loss {e.loss:.1e} "
        f"(eager {e.eager_loss:.1e}), gradient {e.grad:.1e} ({e.eager_grad:.1e})"
        for cell, e in found.items()
        if not max(e.loss_ratio, e.grad_ratio) <= times
    ]


HEADER = """# Rounding errors

Written by `python -m benchmarks.numerics`, which measures them. A cell of the grid is a divergence, a kind of rows, the
standard deviation of the logits ("scale"), a temperature and a width V. Inputs are fp32; truth is the textbook formula
in fp64, eager the same formula in plain PyTorch in fp32. An error is relative, of a loss to the loss and of a gradient
to the norm of its row, both taken as {smallest:g} where they are smaller, and the root mean square over the rows. The
bar is twice eager's error plus two units in the last place. Logits in 16 bits carry errors of 2^-9 and 2^-11
themselves; their exponentials are taken to 3e-6.

Rows: "independent" models; "near", a student whose logits are off by 1 % of the scale; "confident 20" and "confident
40", one token that far above the rest and the student 0.1 off; "offset", both models' logits on top of a common number;
"ties", 2, 3 or 10 tokens of each row that far above the largest other one, in both models or in one, and near ties 0.1
apart; "apart", each model has its mass where the other one has e^-40 of it.

The Triton kernels are held to the bar in Triton's interpreter, by `tests/kernels/interpreter/test_numerics.py`; a GPU's
own exponential, logarithm and reciprocal add an ulp or two. Two kinds of rows stay behind:

- An exponential there is 2^(x log2(e) / T), whose exponent is rounded by 2^-25 of itself, where eager's x / T is exact
  at a temperature that is a power of two. It shows in Jeffreys' divergence where outcomes of e^-20 and less decide:
  between near models of scale 30 at T = 0.5 one row in ten has five to nine times the bar, and with two tokens ahead,
  20 apart, at T = 1 the usual row has three times and one in ten 18 times, at errors of 1e-6 to 3e-5. At T = 0.45,
  0.55, 0.9 and 1.1 the usual row has a tenth of it. Keeping the rest of the exponent takes two instructions an
  exponential, 10 to 20 % of a kernel.
- The gradient of JSD and of skewed reverse KL is q times what two equal constants leave of each other where the models
  hardly overlap: some ulp of q, as in eager, up to 1e-7. The CPU computes such rows in double.

A fraction is known to the divergences as itself and as 1 less it, the second taken in double: `SkewKL(0.999)` and
`JSD(0.999)` have gradients as exact as those of 0.1. Their losses, and the gradient of skewed reverse KL, are
differences of numbers up to a thousand times as large there, and have the error of these, as in eager. One value per
row is a number in fp32, and so is 1 less it.
"""


def markdown(found: dict[Cell, Errors], on: str) -> str:
    """docs/reference/numerics.md."""
    lines = [HEADER.format(smallest=SMALLEST)]
    passed = over(found, 1.0)
    lines.append(f"On {on}, {len(found)} cells, {len(found) - len(passed)} within the bar.\n")
    if passed:
        lines += ["Beyond it:\n", *(f"- {cell}" for cell in passed), ""]
    lines += [
        "The largest errors of each loss on each kind of rows, beside eager's on the same cell, and the largest share",
        "of the bar that any cell takes:\n",
        "| loss | rows | loss error | eager | of the bar | gradient error | eager | of the bar |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[Errors]] = {}
    for cell, errors in found.items():
        groups.setdefault((cell.name, cell.kind), []).append(errors)
    for (name, kind), group in groups.items():
        by_loss = max(group, key=lambda e: e.loss if math.isfinite(e.loss) else 0.0)
        by_grad = max(group, key=lambda e: e.grad if math.isfinite(e.grad) else 0.0)
        loss_share, grad_share = max(e.loss_ratio for e in group), max(e.grad_ratio for e in group)
        lines.append(
            f"| {name} | {kind} | {by_loss.loss:.1e} | {by_loss.eager_loss:.1e} | {loss_share:.2f} "
            f"| {by_grad.grad:.1e} | {by_grad.eager_grad:.1e} | {grad_share:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--small", action="store_true", help="the grid of the tests")
    parser.add_argument(
        "--output", default=str(Path(__file__).resolve().parent.parent / "docs" / "reference" / "numerics.md")
    )
    parser.add_argument("--times", type=float, help="fail where a cell passes the bar by more than so many times")
    chosen = parser.parse_args(arguments)
    found = measure_all(chosen.backend, **(SMALL if chosen.small else FULL))
    isa = f", {kd.backends.cpu.isa()}" if chosen.backend == "cpu" else ""
    page = markdown(found, f"backend {chosen.backend!r}{isa}, PyTorch {torch.__version__}")
    if chosen.output == "-":
        print(page)
    else:
        Path(chosen.output).write_text(page)
    return 1 if chosen.times is not None and over(found, chosen.times) else 0


if __name__ == "__main__":
    raise SystemExit(main())
