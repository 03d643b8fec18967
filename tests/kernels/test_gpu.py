"""The Triton kernels on a GPU: ``pytest -m gpu``. The same tests run in the emulator, smaller, as a dry run."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from launches import dense
from oracle import check, dense_rows

from kdkernels.kernels import divergences, tuning

EMULATED = pytest.param("cpu", marks=pytest.mark.slow)
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), EMULATED]
PARAMS = {"jsd": (0.3, 0.0), "skew_kl": (0.1, 0.0), "skew_reverse_kl": (0.1, 0.0), "alpha_beta": (0.2, 0.7)}
PARAMS |= {"mixed_kl": (0.3, 0.0), "lk_nla": (1e-5, 0.0), "lk_hybrid": (3.0, 0.0)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=DEVICES)
def device(request):
    with contextlib.ExitStack() as stack:
        if request.param == "cpu":
            pytest.importorskip("ptxrun", reason="the package ptxrun, which executes PTX on the CPU, is not installed")
            from test_emulated import executed

            stack.enter_context(executed(90))
        yield request.param


def make(device, N, V, dtype):
    return tuple((torch.randn(N, V) * 3).to(dtype).to(device) for _ in range(2))


def options_of(name, **more):
    param0, param1 = PARAMS.get(name, (0.0, 0.0))
    return {"divergence": name, "param0": param0, "param1": param1, **more}


def names(device):
    return divergences.names() if device == "cuda" else ("forward_kl", "jsd")


@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(device, dtype):
    """Narrow, odd, and wide rows of every divergence."""
    widths = (1, 1000, 4097, 32000, 131072, 151936, 262144) if device == "cuda" else (7, 4097)
    for V in widths:
        for name in names(device):
            student, teacher = make(device, 3 if V < 100000 else 2, V, DTYPES[dtype])
            check(dense, dense_rows, student, [teacher], **options_of(name, temperature=2.0, teacher_temperature=2.0))


def test_every_plan(device):
    """Each way to run a row that the tuning table knows, not only the one it would take."""
    V = 131072 if device == "cuda" else 4096
    student, teacher = make(device, 2, V, torch.bfloat16)
    choose = tuning.fastest
    for number in range(4):
        tuning.fastest = lambda plans, *_, number=number: plans[min(number, len(plans) - 1)]
        try:
            for name in names(device):
                check(dense, dense_rows, student, [teacher], **options_of(name))
        finally:
            tuning.fastest = choose


def test_whole_objective_in_place(device):
    N, V = 4, 50000 if device == "cuda" else 2500
    student, teacher = make(device, N, V, torch.bfloat16)
    labels = torch.tensor([3, -100, V - 1, 0], device=device)
    options = options_of(
        "jsd",
        ce_weight=0.5,
        label_smoothing=0.1,
        z_loss_weight=1e-3,
        student_softcap=20.0,
        teacher_softcap=30.0,
        stats=True,
        temperature_rows=torch.tensor([1.0, 2.0, 0.5, 1.0], device=device),
        row_weight=torch.tensor([1.0, 2.0, 0.5, 0.0], device=device),
    )
    check(dense, dense_rows, student, [teacher], labels, inplace=True, **options)


def test_trials(device, monkeypatch, tmp_path):
    """On a GPU the shortlist is timed once and the choice is kept; elsewhere the first plan is taken."""
    monkeypatch.setattr(tuning, "WORTH_A_TRIAL", 0)
    monkeypatch.setattr(tuning, "_cache_file", lambda: tmp_path / "plans.json")
    tuning._chosen.cache_clear()
    student, teacher = make(device, 4, 8192, torch.bfloat16)
    for _ in range(2):
        check(dense, dense_rows, student, [teacher], inplace=True, **options_of("forward_kl"))
    tuning._chosen.cache_clear()
    assert len(tuning._chosen()) == (device == "cuda")
    tuning._chosen.cache_clear()


@pytest.mark.gpu
def test_public_function():
    import kdkernels as kd

    student, teacher = make("cuda", 64, 32000, torch.bfloat16)
    student.requires_grad_()
    kd.kd_loss(student, teacher, temperature=2.0, backend="triton").backward()
    ours = student.grad.float()
    student.grad = None
    kd.kd_loss(student, teacher, temperature=2.0, backend="torch").backward()
    torch.testing.assert_close(ours, student.grad.float(), rtol=2e-2, atol=1e-6)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("this machine has no GPU of 20 GiB")
    V = 131072
    N = 2**31 // V + 2
    student = torch.zeros(N, V, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros(1, V, dtype=torch.bfloat16, device="cuda").expand(N, V)
    student[-1, 5] = 3.0
    loss, _ = dense(student, [teacher], student, **options_of("forward_kl"))
    assert loss[:-1].abs().max() < 1e-5 and loss[-1] > 0 and student[-1, 5] > 0
