"""Every shipped form of the Triton kernels compiles for NVIDIA and AMD GPUs on a machine that has none.

The specialisation is that of a real call. Of each binary: no tile is spilled, registers stay within a budget, accesses
are 16 bytes wide.
"""

import pytest
import torch

pytest.importorskip("triton")

from launches import compile_for, dense, dkd, mse, recorded, topk

from kdkernels.kernels import divergences, tuning
from kdkernels.kernels.scale import scale_grad

pytestmark = pytest.mark.slow

# 120 is the consumer Blackwell.
CUDA = ("sm_80", "sm_90", "sm_100", "sm_120")
HIP = "gfx942"
# A few scalars of the row may be parked in memory outside the loops; a tile would be hundreds of bytes.
SPILLED = 32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HARD = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 1e-4}
CAP = {"student_softcap": 30.0}
CAPS = {**CAP, "teacher_softcap": 20.0}
# (V, dtype, M teachers, gradient, options): each divergence, each width class and dtype of one, and each part of the
# objective on a linear divergence and on a pair of functions.
FORMS = {
    **{f"{name}": (128256, "bf16", 1, True, {"divergence": name}) for name in divergences.names()},
    **{
        f"forward_kl-V{V}-{dtype}": (V, dtype, 1, True, {})
        for V in (7, 1000, 4096, 32000)
        for dtype in ("bf16", "fp32")
    },
    "forward_kl-V128256-fp16": (128256, "fp16", 1, True, {}),
    "forward_kl-V128256-fp32": (128256, "fp32", 1, True, {}),
    "jsd-V128256-fp32": (128256, "fp32", 1, True, {"divergence": "jsd"}),
    "alpha_beta-V32000-fp32": (32000, "fp32", 1, True, {"divergence": "alpha_beta"}),
}
for _name in ("jeffreys", "jsd"):
    FORMS |= {
        f"{_name}-loss": (128256, "bf16", 1, False, {"divergence": _name}),
        f"{_name}-hard": (128256, "bf16", 1, True, {"divergence": _name, **HARD}),
        f"{_name}-softcap": (128256, "bf16", 1, True, {"divergence": _name, **CAPS}),
        f"{_name}-probs": (128256, "bf16", 1, True, {"divergence": _name, "teacher_form": "probs"}),
        f"{_name}-standardize": (128256, "bf16", 1, True, {"divergence": _name, "standardize": True}),
        f"{_name}-stats": (128256, "fp32", 1, True, {"divergence": _name, "stats": True, **HARD}),
        f"{_name}-mixture": (128256, "bf16", 4, True, {"divergence": _name, "mixture": "logits"}),
    }
FORMS |= {
    "forward_kl-mixture": (128256, "bf16", 2, True, {"mixture": "probs"}),
    "jsd-everything": (
        128256,
        "bf16",
        4,
        True,
        {"divergence": "jsd", "mixture": "probs", "stats": True, "standardize": True, **HARD, **CAPS},
    ),
}
# What the other targets are tried on: their compilers differ, the kernels do not.
SOME = (
    "forward_kl",
    "jsd",
    "alpha_beta",
    "forward_kl-V1000-bf16",
    "forward_kl-V128256-fp32",
    "jeffreys-hard",
    "jsd-stats",
)
# Registers a thread on sm_90 beyond which occupancy falls: 65536 over the threads that should share a multiprocessor.
REGISTERS = {
    "forward_kl": 64,
    "reverse_kl": 64,
    "jeffreys": 64,
    "soft_ce": 64,
    "dual_soft_ce": 64,
    "tvd": 64,
    "jsd": 64,
    "skew_kl": 64,
    "skew_reverse_kl": 64,
    "alpha_beta": 128,
    "forward_kl-V32000-bf16": 64,
    "forward_kl-V32000-fp32": 96,
    "forward_kl-V4096-bf16": 64,
}
# The sparse top-k pattern: (V, dtype, K, gradient, options).
TOPK_FORMS = {
    "bucket": (128256, "bf16", 64, True, {"divergence": "jsd"}),
    "bucket-linear-fp32": (32000, "fp32", 64, True, {"divergence": "jeffreys"}),
    "bucket-everything": (128256, "bf16", 64, True, {"divergence": "alpha_beta", "stats": True, **HARD, **CAP}),
    "bucket-loss": (128256, "bf16", 64, False, {}),
    "bucket-K2048": (128256, "bf16", 2048, True, {}),
    "uniform": (128256, "bf16", 64, True, {"tail": "uniform", "divergence": "alpha_beta", **HARD}),
    "renormalize": (128256, "bf16", 64, True, {"tail": "renormalize"}),
    "renormalize_both": (128256, "bf16", 64, True, {"tail": "renormalize_both"}),
    "V50257": (50257, "bf16", 64, True, {}),
}


@pytest.fixture
def warp(request, monkeypatch):
    """The launchers see the target's warp size."""
    if request.node.callspec.params["target"] == HIP:
        monkeypatch.setitem(tuning.shape.__kwdefaults__, "warp", 64)


def launch_of(form):
    V, dtype, M, gradient, options = FORMS[form]
    student, *teachers = (torch.empty(2, V, dtype=DTYPES[dtype]) for _ in range(M + 1))
    labels = torch.zeros(2, dtype=torch.int64) if "ce_weight" in options else None
    weights = torch.empty(2, M) if M > 1 else None
    with recorded() as launches:
        dense(
            student,
            teachers,
            torch.empty_like(student) if gradient else None,
            labels,
            mixture_weights=weights,
            **options,
        )
    return launches[0]


def check(launch, target, scalars):
    """scalars: how many loads and stores may be narrower than 16 bytes, those of values of the row."""
    binary = compile_for(launch, target)
    if target == HIP:
        assert binary.spilled == 0
        assert "load_dwordx4" in binary.text
        return binary
    assert binary.spilled <= SPILLED
    loads, stores = binary.widths("ld"), binary.widths("st")
    assert sum(width == 16 for width in loads) >= 2
    assert sum(width != 16 for width in loads) <= scalars, loads
    assert sum(width != 16 for width in stores) <= max(scalars, 2), stores
    return binary


@pytest.mark.parametrize(
    "target, form", [("sm_90", form) for form in FORMS] + [("sm_80", form) for form in SOME], ids=str
)
def test_dense(target, form):
    V, _, M, _, options = FORMS[form]
    launch = launch_of(form)
    if V % 16:
        # Rows that are not a multiple of 16 bytes long can only be read element by element.
        assert compile_for(launch, target).spilled <= SPILLED
        return
    scalars = 2 * ("ce_weight" in options) + (M if M > 1 else 0)
    binary = check(launch, target, scalars + 21 * bool(options.get("stats")))
    if target == "sm_90" and form in REGISTERS:
        assert binary.registers <= REGISTERS[form]


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("target", ["sm_100", "sm_120", HIP])
def test_dense_elsewhere(target, form):
    options = FORMS[form][-1]
    launch = launch_of(form)
    if FORMS[form][0] % 16:
        assert compile_for(launch, target).spilled <= SPILLED
        return
    check(launch, target, 2 * ("ce_weight" in options) + 21 * bool(options.get("stats")))


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize("pattern", ["dkd", "mse", "centered-mse", "scale"])
@pytest.mark.parametrize("target", [*CUDA, HIP])
def test_other_patterns(target, pattern):
    student, teacher, grad = (torch.empty(2, 128256, dtype=torch.bfloat16) for _ in range(3))
    labels = torch.zeros(2, dtype=torch.int64)
    with recorded() as launches:
        if pattern == "dkd":
            dkd(student, teacher, grad, labels)
        elif pattern == "scale":
            scale_grad(grad, torch.ones(()))
        else:
            mse(student, teacher, grad, centered=pattern == "centered-mse")
    check(launches[0], target, {"dkd": 3, "scale": 1}.get(pattern, 0))


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize(
    "target, form",
    [("sm_90", form) for form in TOPK_FORMS]
    + [(target, form) for target in ("sm_80", "sm_100", "sm_120", HIP) for form in ("bucket", "uniform")],
    ids=str,
)
def test_topk(target, form):
    """Two rows on a multiprocessor, or one of 1024 threads: 64 registers; the logits go 16 bytes at a time."""
    V, dtype, K, gradient, options = TOPK_FORMS[form]
    student, ids = torch.empty(2, V, dtype=DTYPES[dtype]), torch.zeros(2, K, dtype=torch.int64)
    labels = torch.zeros(2, dtype=torch.int64) if "ce_weight" in options else None
    with recorded() as launches:
        topk(student, ids, torch.zeros(2, K), torch.empty_like(student) if gradient else None, labels, **options)
    binary = compile_for(launches[0], target)
    assert binary.spilled == 0
    if target == HIP:
        assert "load_dwordx4" in binary.text
        return
    assert binary.registers <= 65536 // (32 * max(16, launches[0].kwargs["num_warps"]))
    if V % 16 == 0:
        sweeps = {"renormalize_both": 0}.get(form, 1 + gradient + (form == "uniform" or "bucket" in form))
        assert binary.widths("ld").count(16) == sweeps * 2 * student.element_size() // 2
        assert not gradient or 16 in binary.widths("st")


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_padding_keeps_the_width(divergence):
    """50257 columns padded to 50304: the loads run into the padding rather than go element by element."""
    student, teacher = torch.empty(2, 50304, dtype=torch.bfloat16), torch.empty(2, 50432, dtype=torch.bfloat16)
    with recorded() as launches:
        dense(student, [teacher], torch.empty_like(student), divergence=divergence, vocab_size=50257)
    check(launches[0], "sm_90", 0)


def specialisation(launch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    fn, args, kwargs = launch
    bind = create_function_from_signature(fn.signature, fn.params, make_backend(GPUTarget("cuda", 90, 32)))
    return str(bind(*args, debug=False, **kwargs)[1])


def test_one_binary_for_any_number_of_rows():
    """The number of rows, the ignored label and the weights are run-time values: a new batch compiles nothing."""
    keys = set()
    for N in (1, 2, 16, 257):
        student = torch.empty(N, 32000, dtype=torch.bfloat16)
        labels = torch.zeros(N, dtype=torch.int64)
        for options in (
            {"ignore_index": -100, "scale": 0.5},
            {"ignore_index": 1, "temperature": 2.0, "ce_weight": 1.0},
        ):
            with recorded() as launches:
                dense(student, [student], student, labels, **{"ce_weight": 0.25, **options})
            keys.add(specialisation(launches[0]))
    assert len(keys) == 1


def test_one_binary_for_any_number_of_entries():
    """Up to the next power of two."""
    keys = set()
    for N, K in ((1, 33), (2, 64), (16, 50), (257, 48)):
        student = torch.empty(N, 32000, dtype=torch.bfloat16)
        with recorded() as launches:
            topk(student, torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K), student)
        keys.add((specialisation(launches[0]), launches[0].kwargs["K_TILE"]))
    assert len(keys) == 1
