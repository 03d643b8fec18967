"""The sparse top-k kernel compiled for GPUs that need not be here: registers, spills, and the width of its accesses."""

import pytest
import torch

pytest.importorskip("triton")

import budgets
from launches import compile_for, recorded, topk

HIP = "gfx942"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HARD = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 1e-4}
CAP = {"student_softcap": 30.0}
# (V, dtype, K, gradient, options).
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


@pytest.mark.slow
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
    with budgets.on(target), recorded() as launches:
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


def specialisation(launch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    fn, args, kwargs = launch
    bind = create_function_from_signature(fn.signature, fn.params, make_backend(GPUTarget("cuda", 90, 32)))
    return str(bind(*args, debug=False, **kwargs)[1])


def test_one_binary_for_any_number_of_entries():
    """Up to the next power of two."""
    keys = set()
    for N, K in ((1, 33), (2, 64), (16, 50), (257, 48)):
        student = torch.empty(N, 32000, dtype=torch.bfloat16)
        with recorded() as launches:
            topk(student, torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K), student)
        keys.add((specialisation(launches[0]), launches[0].kwargs["K_TILE"]))
    assert len(keys) == 1
