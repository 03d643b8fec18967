"""The losses on hidden states beside the same with all logits stored, and the other packages' chunked losses.

Liger's and TRL's are imported where they are installed (``pip install liger-kernel trl``), and are listed as absent
where they are not. The yardstick is the four matrix products that every formulation with stored logits needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Absent, Candidate, Case, Outcome, Run, Suite
from benchmarks.suites import common

FORWARD_KL, JSD = "forward_kl", "jsd"


class HiddenInputs:
    """Hidden states and heads whose logits spread as those of ``LogitInputs`` do; student and teacher are related."""

    def __init__(self, case: Case, seed: int) -> None:
        rows, columns, width = case.shape
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        teacher_hidden, teacher_weight = normal(rows, width), normal(columns, width).mul_(2 / width**0.5)
        hidden = teacher_hidden + normal(rows, width).mul_(0.3)
        weight = teacher_weight + normal(columns, width).mul_(0.5 / width**0.5)
        made = (hidden, weight, teacher_hidden, teacher_weight)
        self.hidden, self.weight, self.teacher_hidden, self.teacher_weight = (
            item.to(case.torch_dtype).to(case.device) for item in made
        )
        self.labels = torch.randint(0, columns, (rows,), generator=generator).to(case.device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.leaves = (self.hidden, self.weight)
        self.truths: dict[str, Outcome] = {}

    def reset(self) -> None:
        self.hidden.grad = self.weight.grad = None


def truth(inputs: Any, divergence: str) -> Outcome:
    """Loss and gradients of the reference in fp64, in blocks of rows; kept, for it takes its time."""
    if divergence not in inputs.truths:
        hidden, weight, teacher_hidden, teacher_weight = (
            item.detach().cpu().double()
            for item in (inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight)
        )
        rows = len(hidden)
        step = max(1, 2**23 // len(weight))
        total, dhidden, dweight = (
            torch.zeros((), dtype=torch.float64),
            torch.empty_like(hidden),
            torch.zeros_like(weight),
        )
        for start in range(0, rows, step):
            part = slice(start, start + step)
            logits = (hidden[part] @ weight.T).requires_grad_()
            teacher = teacher_hidden[part] @ teacher_weight.T
            value = kd.kd_loss(logits, teacher, **_options(divergence), normalizer=rows, backend="torch")
            value.backward()
            assert logits.grad is not None
            total += value.detach()
            dhidden[part] = logits.grad @ weight
            dweight.addmm_(logits.grad.T, hidden[part])
        inputs.truths[divergence] = Outcome(total, (dhidden, dweight))
    return inputs.truths[divergence]


def _options(divergence: str) -> dict[str, Any]:
    # Without T^2, which the other packages leave out.
    return {"divergence": divergence, "temperature": common.TEMPERATURE, "scale_by_t_squared": False}


def autograd(loss: Callable[[Any], Tensor]) -> Run:
    return common.autograd(loss, lambda inputs: (inputs,))


def stored(loss: eager.Loss) -> Callable[..., Tensor]:
    """A formulation on stored logits, of hidden states and heads."""

    def formulation(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.empty(0)  # not looked at
        with torch.no_grad():
            teacher = F.linear(teacher_hidden, teacher_weight)
        T = common.TEMPERATURE
        return loss(F.linear(hidden, weight), teacher, labels, T) / (T * T)

    return formulation


def _heads(inputs: Any) -> tuple[Tensor, ...]:
    return inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight


def linear(divergence: str, backend: Any) -> Run:
    return autograd(lambda inputs: kd.linear_kd_loss(*_heads(inputs), **_options(divergence), backend=backend))


def unfused(divergence: str, backend: Any) -> Run:
    def loss(inputs: Any) -> Tensor:
        teacher = F.linear(inputs.teacher_hidden, inputs.teacher_weight)
        student = F.linear(inputs.hidden, inputs.weight)
        return kd.kd_loss(student, teacher, **_options(divergence), backend=backend)

    return autograd(loss)


def ours(divergence: str, case: Case, *, all_logits: bool = True) -> list[Union[Candidate, Absent]]:
    found: list[Union[Candidate, Absent]] = []
    for answer in common.availability(case, common.FUSED):
        ways = {f"kdkernels {answer.name}, linear_kd_loss": linear}
        if all_logits:
            ways[f"kdkernels {answer.name}, kd_loss of stored logits"] = unfused
        for name, way in ways.items():
            if answer.ok:
                build = functools.partial(way, divergence, answer.name)
                found.append(Candidate(name, divergence, "kdkernels", build))
            else:
                found.append(Absent(name, divergence, answer.reason))
    return found


def products(group: str) -> Candidate:
    """The four products alone, to memory that is there already."""

    def build() -> Run:
        space = SimpleNamespace(student=None)

        def run(inputs: Any) -> Outcome:
            hidden, weight, teacher_hidden, teacher_weight = (item.detach() for item in _heads(inputs))
            if space.student is None:
                space.student = hidden.new_empty(len(hidden), len(weight))
                space.teacher = torch.empty_like(space.student)
                space.dhidden, space.dweight = torch.empty_like(hidden), torch.empty_like(weight)
            torch.mm(teacher_hidden, teacher_weight.T, out=space.teacher)
            torch.mm(hidden, weight.T, out=space.student)
            torch.mm(space.student, weight, out=space.dhidden)
            torch.mm(space.student.T, hidden, out=space.dweight)
            return Outcome(torch.zeros(()), (space.dhidden, space.dweight))

        return run

    def expected(inputs: Any) -> Outcome:
        hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
        return Outcome(torch.zeros(()), (hidden @ (weight.T @ weight), weight @ (hidden.T @ hidden)))

    return Candidate("the four products", group, "probe", build, expected)


def liger(divergence: str) -> Union[Candidate, Absent]:
    name = "Liger, LigerFusedLinearJSDLoss"
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        return Absent(name, divergence, f"not installed ({error})")

    def build() -> Run:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, temperature=common.TEMPERATURE, compiled=False
        )
        return autograd(lambda inputs: loss(*_heads(inputs), inputs.labels))

    return Candidate(name, divergence, "peer", build)


def trl(divergence: str) -> Union[Candidate, Absent]:
    name = "TRL, ChunkedDivergenceFunction"
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        return Absent(name, divergence, f"not installed ({error})")

    def loss(inputs: Any) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = _heads(inputs)
        rows, _ = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, 0.5, common.TEMPERATURE
        )
        return rows.mean()

    return Candidate(name, divergence, "peer", lambda: autograd(loss))


def make_candidates(case: Case) -> list[Union[Candidate, Absent]]:
    kl, jsd = stored(eager.kl_log_target), stored(eager.jsd_best)
    return [
        products(FORWARD_KL),
        common.eager("eager, fewest passes", FORWARD_KL, kl, _heads),
        common.compiled("torch.compile, fewest passes", FORWARD_KL, kl, case, _heads),
        *ours(FORWARD_KL, case),
        common.eager("eager, fewest passes", JSD, jsd, _heads),
        liger(JSD),
        trl(JSD),
        *ours(JSD, case),
    ]


def floor_bytes(case: Case) -> int:
    """Each head is read twice or once and one gradient written, and so are hidden states."""
    rows, columns, width = case.shape
    return 4 * (rows + columns) * width * case.torch_dtype.itemsize


SUITE = Suite(
    name="linear",
    title="Losses on hidden states: logits in chunks and stored, loss and gradients",
    shapes=((2048, 32000, 512),),
    dtypes=("fp32",),
    quick_shapes=((256, 8192, 64),),
    make_inputs=HiddenInputs,
    make_candidates=make_candidates,
    expected=truth,
    unit_bytes=common.unit_bytes,
    floor_bytes=floor_bytes,
    unit="[N, V] tensor of logits",
    probe="products",
    yardstick="the four matrix products alone",
    baseline_group=FORWARD_KL,
    axes=("N", "V", "D"),
    rounds_logits=True,
)
