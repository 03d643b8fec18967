"""The one warning of "auto" where large logits find no kernel."""

import warnings

import pytest
import torch

import kdkernels as kd
from kdkernels import backends

REASON = "the C++ extension was not built: nobody did. To have it: run `build it`"
STUDENT, TEACHER = torch.randn(40, 32000), torch.randn(40, 32000)


@pytest.fixture
def without_kernels(monkeypatch):
    """An installation without the compiled CPU backend, in a process that has not warned yet."""
    monkeypatch.setattr(backends.cpu, "load_error", lambda: REASON)
    monkeypatch.setattr(backends, "_warned", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def topk():
    logprobs, ids = TEACHER.log_softmax(-1).topk(4)
    return kd.topk_kd_loss(STUDENT, ids, logprobs)


def linear():
    return kd.linear_kd_loss(torch.randn(40, 2), torch.randn(32000, 2), torch.randn(40, 2), torch.randn(32000, 2))


CALLS = {
    "kd_loss": lambda: kd.kd_loss(STUDENT, TEACHER),
    "KDLoss": lambda: kd.KDLoss()(STUDENT, TEACHER),
    "dkd_loss": lambda: kd.dkd_loss(STUDENT, TEACHER, torch.zeros(40).long()),
    "logit_mse_loss": lambda: kd.logit_mse_loss(STUDENT, TEACHER),
    "uld_loss": lambda: kd.uld_loss(STUDENT, TEACHER),
    "capture_topp": lambda: kd.capture_topp(TEACHER, 0.5, max_k=4),
    "taid_loss": lambda: kd.taid_loss(STUDENT, TEACHER, interpolation=0.5),
    "topk_kd_loss": topk,
    "linear_kd_loss": linear,
    "capture_topk": lambda: kd.capture_topk(TEACHER, 4),
    "token_logprobs": lambda: kd.token_logprobs(STUDENT, torch.zeros(40).long()),
    "gather_logprobs": lambda: kd.gather_logprobs(TEACHER, torch.zeros(40, 1).long()),
}


@pytest.mark.parametrize("name", CALLS)
def test_large_logits_without_a_kernel_warn_once_at_the_users_line(without_kernels, name):
    with pytest.warns(backends.PlainTorchWarning) as caught:
        CALLS[name]()
        CALLS[name]()
    [warning] = caught
    assert warning.filename == __file__
    assert "(40, 32000) on cpu go through plain PyTorch" in str(warning.message)
    assert f"cpu: {REASON}" in str(warning.message)


@pytest.mark.parametrize(
    "call",
    [
        lambda: kd.kd_loss(STUDENT, TEACHER, backend="torch"),
        lambda: kd.kd_loss(STUDENT[:30], TEACHER[:30]),
        lambda: torch.compile(kd.kd_loss, backend="eager", fullgraph=True)(STUDENT, TEACHER),
        lambda: kd.kd_loss(STUDENT.to("meta"), TEACHER.to("meta")),
    ],
    ids=["asked-for", "small", "traced", "no-kernel-could-be"],
)
def test_what_was_asked_for_is_small_or_is_traced_does_not_warn(without_kernels, call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", backends.PlainTorchWarning)
        call()


def test_a_filter_makes_an_error_of_every_such_call(without_kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error", backends.PlainTorchWarning)
        for _ in range(2):
            with pytest.raises(backends.PlainTorchWarning, match="nobody did"):
                kd.kd_loss(STUDENT, TEACHER)


def test_a_kernel_that_runs_does_not_warn(compiled_cpu, monkeypatch):
    monkeypatch.setattr(backends, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", backends.PlainTorchWarning)
        for call in CALLS.values():
            call()
