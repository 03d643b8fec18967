"""The Triton kernels on a GPU: ``pytest -m gpu``. The same tests run in the emulator, smaller, as a dry run."""

import contextlib
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from ahead import compile_ahead
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
    return tuple((torch.randn(N, V, device=device) * 3).to(dtype) for _ in range(2))


def options_of(name, **more):
    param0, param1 = PARAMS.get(name, (0.0, 0.0))
    return {"divergence": name, "param0": param0, "param1": param1, **more}


def names(device):
    return divergences.names() if device == "cuda" else ("forward_kl", "jsd")


WIDTHS = {"cuda": (1, 1000, 4097, 32000, 131072, 151936, 262144), "cpu": (7, 4097)}
# Of test_every_plan.
WIDE = {"cuda": 131072, "cpu": 4096}
PLANS = 4
TEMPERATURES = {"temperature": 2.0, "teacher_temperature": 2.0}


def launch(device, dtype, V, name, plan=None):
    """The launch of a check, with nothing to compare: what is compiled for it is the same."""
    student, teacher = make(device, 3 if V < 100000 else 2, V, DTYPES[dtype])
    with planned(plan):
        dense(student, [teacher], torch.empty_like(student), **options_of(name, **({} if plan else TEMPERATURES)))


def planned(number):
    """Inside, the plan of this number, from 1 on, runs, or the last where there are fewer."""

    def pick(plans, *_):
        return plans[min(number, len(plans)) - 1]

    return contextlib.nullcontext() if number is None else mock.patch.object(tuning, "fastest", pick)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """On a GPU every kernel of the two tests that have hundreds, from all processors and not from one."""
    if torch.cuda.is_available():
        widths = [("cpu", dtype, V, name) for V in WIDTHS["cuda"] for dtype in DTYPES for name in divergences.names()]
        plans = [("cpu", "bf16", WIDE["cuda"], name, 1 + plan) for plan in range(PLANS) for name in divergences.names()]
        compile_ahead([(launch, *arguments) for arguments in (*widths, *plans)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(device, dtype):
    """Narrow, odd, and wide rows of every divergence."""
    for V in WIDTHS[device]:
        for name in names(device):
            student, teacher = make(device, 3 if V < 100000 else 2, V, DTYPES[dtype])
            check(dense, dense_rows, student, [teacher], **options_of(name, **TEMPERATURES))


def test_every_plan(device):
    """Each way to run a row that the tuning table knows, not only the one it would take."""
    student, teacher = make(device, 2, WIDE[device], torch.bfloat16)
    for number in range(PLANS):
        with planned(1 + number):
            for name in names(device):
                check(dense, dense_rows, student, [teacher], **options_of(name))


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
    """On a GPU the shortlist, one pass in a block or a cluster and two sweeps, is timed once and the choice is kept."""
    monkeypatch.setattr(tuning, "WORTH_A_TRIAL", 0)
    monkeypatch.setattr(tuning, "_cache_file", lambda: tmp_path / "plans.json")
    monkeypatch.setattr(tuning, "_CHOSEN_NOW", {})
    monkeypatch.delenv("KDKERNELS_AUTOTUNE", raising=False)
    listed, fastest = [], tuning.fastest

    def watched(plans, *rest):
        listed.append(plans)
        return fastest(plans, *rest)

    monkeypatch.setattr(tuning, "fastest", watched)
    tuning._chosen.cache_clear()
    student, teacher = make(device, 4, 8192, torch.bfloat16)
    for _ in range(2):
        check(dense, dense_rows, student, [teacher], inplace=True, **options_of("forward_kl"))
    tuning._chosen.cache_clear()
    kept = list(tuning._chosen().values())
    tuning._chosen.cache_clear()
    # One block has such a row whatever the GPU and the Triton, so that there is something to choose from.
    assert all(len(plans) >= 2 and plans[-1].pattern == "sweeps" for plans in listed) or device == "cpu"
    assert len(kept) == (device == "cuda") and set(kept) <= {str(tuple(plan)) for plan in listed[0]}


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
