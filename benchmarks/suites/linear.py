"""The losses on hidden states beside the same with all logits stored, and the other packages' chunked losses.

Liger's and TRL's are imported where they are installed (``pip install liger-kernel trl``), and are listed as absent
where they are not. The yardstick is the four matrix products that every formulation with stored logits needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks import eager
from benchmarks.model import Absent, Candidate, Candidates, Case, Outcome, Run, Suite
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
        hidden, weight, *teacher = (item.detach().cpu().double() for item in _heads(inputs))
        hidden.requires_grad_(), weight.requires_grad_()
        rows, total = len(hidden), torch.zeros((), dtype=torch.float64)
        step = max(1, 2**23 // len(weight))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            logits = F.linear(hidden[part], weight), F.linear(teacher[0][part], teacher[1])
            value = kd.kd_loss(*logits, **_options(divergence), normalizer=rows, backend="torch")
            value.backward()
            total += value.detach()
        assert hidden.grad is not None and weight.grad is not None
        inputs.truths[divergence] = Outcome(total, (hidden.grad, weight.grad))
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


def ours(divergence: str, case: Case) -> Candidates:
    build = functools.partial(linear, divergence)
    return common.each_backend(divergence, case, "kdkernels {}, linear_kd_loss", build)


def ours_stored(divergence: str, case: Case) -> Candidates:
    build = functools.partial(unfused, divergence)
    return common.each_backend(divergence, case, "kdkernels {}, kd_loss of stored logits", build)


def products(group: str) -> Candidate:
    """The four products alone, to memory that is there already."""

    def build() -> Run:
        space: list[Tensor] = []

        def run(inputs: Any) -> Outcome:
            hidden, weight, teacher_hidden, teacher_weight = (item.detach() for item in _heads(inputs))
            if not space:
                logits = hidden.new_empty(2, len(hidden), len(weight))
                space.extend((*logits, torch.empty_like(hidden), torch.empty_like(weight)))
            teacher, student, dhidden, dweight = space
            torch.mm(teacher_hidden, teacher_weight.T, out=teacher)
            torch.mm(hidden, weight.T, out=student)
            torch.mm(student, weight, out=dhidden)
            torch.mm(student.T, hidden, out=dweight)
            return Outcome(torch.zeros(()), (dhidden, dweight))

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


def make_candidates(case: Case) -> Candidates:
    kl, jsd = stored(eager.forward_kl_best), stored(eager.jsd_best)
    return [
        products(FORWARD_KL),
        common.eager("eager, fewest passes", FORWARD_KL, kl, _heads),
        common.compiled("torch.compile, fewest passes", FORWARD_KL, kl, case, _heads),
        *ours(FORWARD_KL, case),
        *ours_stored(FORWARD_KL, case),
        common.eager("eager, fewest passes", JSD, jsd, _heads),
        liger(JSD),
        trl(JSD),
        *ours(JSD, case),
        *ours_stored(JSD, case),
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
    floor_bytes=floor_bytes,
    unit="[N, V] tensor of logits",
    probe="products",
    yardstick="the four matrix products alone",
    baseline_group=FORWARD_KL,
    axes=("N", "V", "D"),
    rounds_logits=True,
)
