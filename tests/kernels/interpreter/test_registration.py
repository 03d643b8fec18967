"""A divergence that is added at run time, by its pair of functions or by its coefficients."""

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from launches import dense
from oracle import check, dense_rows

from kdkernels import divergences as table
from kdkernels.divergences import Divergence
from kdkernels.kernels import divergences
from kdkernels.kernels.rows import fast_log, mul0
from kdkernels.reference import divergences as reference


@triton.jit
def hellinger_value(p, logp, q, logq, param0, param1):
    d = tl.sqrt(p) - tl.sqrt(q)
    return 0.5 * d * d


@triton.jit
def hellinger_score(p, logp, q, logq, param0, param1):
    return 0.5 * (q - tl.sqrt(p * q))


@triton.jit
def le_cam_value(p, logp, q, logq, weight, shift):
    return mul0(p, logp - fast_log(weight * p + (1.0 - weight) * q + shift))


@triton.jit
def le_cam_score(p, logp, q, logq, weight, shift):
    return -(1.0 - weight) * p * q / (weight * p + (1.0 - weight) * q + shift)


@pytest.fixture
def registered(monkeypatch):
    names = []

    def add(name, formula, **entry):
        table.add(dataclass(frozen=True)(type(name, (Divergence,), {"name": name})), on_triton=True)
        divergences.register(name, **entry)
        names.append(name)
        monkeypatch.setitem(reference.TABLE, name, formula)

    yield add
    for name in names:
        divergences.remove(name)
        table.remove(name)


def test_pair(registered):
    def formula(logp, logq, _0, _1):
        return 0.5 * ((logp / 2).exp() - (logq / 2).exp()).square().sum(-1)

    registered("hellinger", formula, value=hellinger_value, score=hellinger_score)
    student, teacher = torch.randn(3, 300) * 3, torch.randn(3, 300) * 3
    check(dense, dense_rows, student, [teacher], divergence="hellinger", temperature=2.0, teacher_temperature=2.0)


def test_pair_with_parameters(registered):
    def formula(logp, logq, weight, shift):
        return (logp.exp() * (logp - (weight * logp.exp() + (1 - weight) * logq.exp() + shift).log())).sum(-1)

    registered("shifted", formula, value=le_cam_value, score=le_cam_score)
    student, teacher = torch.randn(2, 300), torch.randn(2, 300)
    check(dense, dense_rows, student, [teacher], divergence="shifted", param0=0.4, param1=1e-3)
    rows = torch.tensor([0.2, 0.8])
    check(dense, dense_rows, student, [teacher], divergence="shifted", param_rows=rows, param1=1e-3)


def test_coefficients(registered):
    """Half of forward KL and the student's negative entropy."""

    def formula(logp, logq, _0, _1):
        return (0.5 * logp.exp() * (logp - logq) + logq.exp() * logq).sum(-1)

    registered("half", formula, linear=(0.5, -0.5, 0.0, 1.0))
    check(dense, dense_rows, torch.randn(3, 300), [torch.randn(3, 300)], divergence="half")


@pytest.mark.parametrize(
    "name, entry",
    [
        ("forward_kl", {"linear": (1, -1, 0, 0)}),
        ("nothing", {}),
        ("value_only", {"value": hellinger_value}),
        ("score_only", {"score": hellinger_score}),
        ("both", {"linear": (1, -1, 0, 0), "value": hellinger_value, "score": hellinger_score}),
    ],
)
def test_refused(name, entry):
    with pytest.raises(ValueError, match=name):
        divergences.register(name, **entry)


def test_unknown_name():
    with pytest.raises(ValueError, match="unheard_of"):
        dense(torch.randn(1, 3), [torch.randn(1, 3)], divergence="unheard_of")
