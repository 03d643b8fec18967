"""Log-probabilities of one token a row, with a loss on them: of logits, and of hidden states and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks.model import Candidate, Candidates, Case, Outcome, Run, Suite
from benchmarks.suites import common, linear

LOGPROBS, ENTROPY = "log-probabilities", "log-probabilities and entropy"
Values = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_of(logprobs: Tensor, entropy: Any) -> Tensor:
    """A stand-in for a loss on samples: its gradient differs from row to row, and its rows do not cancel."""
    # In fp32, beside log-probabilities that eager PyTorch leaves in bf16 too.
    weights = torch.linspace(0.5, 1.5, len(logprobs), device=logprobs.device)
    loss = -(logprobs * weights).mean()
    return loss if entropy is None else loss - 0.1 * entropy.mean()


def log_softmax(logits: Tensor, ids: Tensor, entropy: bool) -> Tensor:
    logq = F.log_softmax(logits, -1)
    return loss_of(logq.gather(-1, ids[:, None]).squeeze(-1), -(logq.exp() * logq).sum(-1) if entropy else None)


def logsumexp(logits: Tensor, ids: Tensor, entropy: bool) -> Tensor:
    lse = logits.logsumexp(-1)
    logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - lse
    return loss_of(logprobs, lse - (F.softmax(logits, -1) * logits).sum(-1) if entropy else None)


FORMULATIONS = {"log_softmax + gather": log_softmax, "gather - logsumexp": logsumexp}


def _arguments(entropy: bool) -> Callable[[Any], tuple[Any, ...]]:
    return lambda inputs: (inputs.student, inputs.labels, entropy)


def _ours(entropy: bool, inputs: Any, backend: Any, reduction: str, inplace: bool) -> Tensor:
    found = kd.token_logprobs(inputs.student, inputs.labels, entropy=entropy, inplace_backward=inplace, backend=backend)
    return loss_of(found.logprobs, found.entropy)


def make_candidates(case: Case) -> Candidates:
    found: Candidates = []
    for group, entropy in ((LOGPROBS, False), (ENTROPY, True)):
        for name, loss in FORMULATIONS.items():
            found.append(common.eager(f"eager, {name}", group, loss, _arguments(entropy)))
            found.append(common.compiled(f"torch.compile, {name}", group, loss, case, _arguments(entropy)))
        for inplace in (False, True):
            ours = partial(_ours, entropy)
            found += common.ours(group, ours, case, inplace=inplace, pattern="token_fwd")
        found.append(common.add_probe(group))
    return found


def expected(inputs: Any, group: str) -> Outcome:
    logits = inputs.pristine.cpu().double().requires_grad_()
    loss = logsumexp(logits, inputs.labels.cpu(), group == ENTROPY)
    loss.backward()
    assert logits.grad is not None
    return Outcome(loss.detach(), (logits.grad,))


SUITE = Suite(
    name="tokens",
    title="Log-probabilities of sampled tokens: values and gradient",
    shapes=((2048, 32000), (512, 151936)),
    dtypes=("fp32", "bf16"),
    make_inputs=common.LogitInputs,
    make_candidates=make_candidates,
    expected=expected,
)


def _stored(inputs: Any) -> Tensor:
    return logsumexp(F.linear(inputs.hidden, inputs.weight), inputs.labels, False)


def _linear(backend: Any, inputs: Any) -> Tensor:
    found = kd.linear_token_logprobs(inputs.hidden, inputs.weight, inputs.labels, backend=backend)
    return loss_of(found.logprobs, None)


def make_linear_candidates(case: Case) -> Candidates:
    def build(backend: str) -> Run:
        return linear.autograd(partial(_linear, backend))

    return [
        linear.products(LOGPROBS),
        Candidate("eager, gather - logsumexp", LOGPROBS, "eager", lambda: linear.autograd(_stored)),
        *common.each_backend(LOGPROBS, case, "kdkernels {}, linear_token_logprobs", build, pattern="token_fwd"),
    ]


def linear_expected(inputs: Any, group: str) -> Outcome:
    hidden, weight = (item.detach().cpu().double().requires_grad_() for item in (inputs.hidden, inputs.weight))
    loss = logsumexp(hidden @ weight.T, inputs.labels.cpu(), False)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Outcome(loss.detach(), (hidden.grad, weight.grad))


LINEAR = replace(
    linear.SUITE,
    name="linear_tokens",
    title="Log-probabilities of sampled tokens from hidden states: values and gradients",
    make_candidates=make_linear_candidates,
    expected=linear_expected,
    baseline_group=LOGPROBS,
)
