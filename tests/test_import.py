"""When modules load: nothing but torch on import, the extension with the first call, Triton never on a CPU."""

import subprocess
import sys

from kdkernels import backends

SCRIPT = """
import sys, torch
before = set(sys.modules)
import kdkernels as kd
HEAVY = ("triton", "torch._dynamo", "torch._inductor", "numpy.testing", "sympy")
def new():
    return sorted(name for name in HEAVY if name in sys.modules and name not in before)
print("import", *new())
print("library", "kdkernels::dense_fwd_cpu" in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
for call in (
    lambda: kd.kd_loss(student, teacher),
    lambda: kd.KDLoss(divergence="jsd", temperature=2.0)(student, teacher),
    lambda: kd.dkd_loss(student, teacher, torch.arange(3)),
    lambda: kd.logit_mse_loss(student, teacher),
    lambda: kd.taid_loss(student, teacher, interpolation=0.5),
):
    call().backward()
print("calls", *new())
print("library", "kdkernels::dense_fwd_cpu" in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
"""


def test_nothing_heavy_is_loaded_by_the_import_or_by_a_call_on_the_cpu():
    """That the import is quick is held in test_packaging; this is why it is, and why the first call is too."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = backends.cpu.library_path() is not None
    assert done.stdout.splitlines() == ["import", "library False", "calls", f"library {built}"]


def test_the_public_names_are_there():
    import kdkernels

    assert len(set(kdkernels.__all__)) == len(kdkernels.__all__)
    assert all(getattr(kdkernels, name).__doc__ for name in kdkernels.__all__)
