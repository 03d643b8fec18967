"""Triton's share of tests/test_peers_tests.py: in the interpreter a call takes long, so that each is made once."""

import pytest
import test_peers_tests as peers
import torch


@pytest.mark.parametrize("divergence", peers.TWO_POINTS)
def test_point_masses(divergence):
    peers.test_point_masses_by_hand(divergence, "fp32", "triton")


def test_point_masses_of_the_other_losses():
    peers.test_point_masses_of_the_other_losses("bf16", "triton")


@pytest.mark.parametrize("name", peers.LOSSES)
def test_a_grad_output_of_0_gives_0(name):
    peers.test_a_grad_output_of_0_gives_0(peers.LOSSES[name], "fp32", "triton")


@pytest.mark.parametrize("name", peers.MASKED)
def test_rows_that_do_not_count_give_0_whatever_comes_from_above(name):
    peers.test_rows_that_do_not_count_give_0_whatever_comes_from_above(peers.LOSSES[name], "fp32", False, "triton")


@pytest.mark.parametrize("name", peers.LOSSES)
def test_the_op_that_ran_is_the_one_asked_for_and_only_the_gradient_is_held(name, monkeypatch):
    peers.forbid_the_reference(monkeypatch)
    student, teacher = peers.logits("fp32")
    ran, value, grad = peers.ops_of(peers.LOSSES[name], student, teacher, backend="triton")
    ((function, (args, kwargs), result),) = ran.calls
    assert str(function).endswith("_triton.default") and not any(map(peers.ARITHMETIC.match, ran.large))
    again = peers.tensors(function(*args, **kwargs))
    assert len(again) == len(result) and all(map(torch.equal, result, again))
    assert any(torch.equal(x.reshape_as(grad), grad) for x in peers.tensors(args) if x.numel() == grad.numel())
    with peers.Held() as held:
        leaf = student.clone().requires_grad_()
        value = peers.LOSSES[name](leaf, teacher, backend="triton")
    # The interpreter keeps the small arguments of its last launch.
    assert student.nbytes <= held.bytes(value, leaf, teacher, peers.LABELS) < 1.5 * student.nbytes


@pytest.mark.parametrize("peer", peers.PEERS)
def test_columns_that_both_models_rule_out(peer):
    peers.test_columns_that_both_models_rule_out(peer, "fp32", "-inf", "triton")
