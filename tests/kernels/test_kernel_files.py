"""How kdkernels/kernels is laid out: names in one table, no Triton before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels.kernels

FILES = sorted(Path(kdkernels.kernels.__file__).parent.glob("*.py"))


def test_no_kernel_file_names_a_divergence():
    pytest.importorskip("triton")
    from kdkernels.kernels import divergences

    readers = [path for path in FILES if path.name != "divergences.py"]
    assert len(readers) > 5
    for path in readers:
        text = path.read_text()
        assert not [name for name in divergences.names() if name in text], path


def test_importing_imports_no_triton():
    code = "import sys, kdkernels, kdkernels.kernels; print({'triton', 'kdkernels.kernels.dense'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_pattern_has_a_launcher():
    pytest.importorskip("triton")
    from kdkernels import ops

    missing = {pattern for pattern, backends in ops.LACKING.items() if "triton" in backends}
    assert set(kdkernels.kernels.launchers()) == set(ops.SCHEMAS) - missing


def test_launches_name_every_argument_and_say_what_may_be_fused():
    """The ahead-of-time tests compile with the options of the launch: they see the code that runs."""
    pytest.importorskip("triton")
    import budgets

    for target, form in (("sm_90", "jsd"), *(("sm_80", form) for form in ("jsd", *budgets.OTHERS, "topk-bucket"))):
        launch = budgets.launch_of(form, target)
        assert launch.args == (), form
        assert launch.kwargs["enable_fp_fusion"] is (form in ("mse", "centered-mse", "scale", "topk-bucket")), form


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles(itemsize, warp):
    """Powers of two, a 16-byte access a lane, a lane a thread, at most 16384 columns, and no idle warp."""
    pytest.importorskip("triton")
    from kdkernels.kernels import tuning

    for V in (1, 2, 511, 512, 513, 1000, 4096, 8192, 8193, 32000, 65536, 65537, 128256, 262144):
        for load in (tuning.LIGHT, tuning.MEDIUM, tuning.HEAVY):
            (ROLL, LANES, VEC), num_warps = tuning.shape(V, itemsize, load=load, warp=warp)
            assert all(n & (n - 1) == 0 for n in (ROLL, LANES, VEC, num_warps))
            assert VEC * itemsize == 16 and LANES == num_warps * warp <= tuning.MAX_THREADS[load]
            block = ROLL * LANES * VEC
            assert block <= 16384
            assert block < 2 * V or num_warps == 1
