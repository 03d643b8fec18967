"""A launch on the GPU looks for the kernels that are compiled ahead: no kernel is compiled twice."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from ahead import LAUNCH, Driver, compile_ahead
from test_gpu import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kdkernels.kernels import dense_cluster

HOPPER = GPUTarget("cuda", 90, 32)
LAUNCHED = []


class Stub(Driver):
    """A GPU that loads and launches, and does nothing."""

    class utils:
        @staticmethod
        def load_binary(name, kernel, shared, device):
            return None, 0, 64, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 227 << 10}

    def launcher_cls(self, src, metadata):
        return lambda *args, **kwargs: LAUNCHED.append(metadata.name)


def launch_on_a_stub(*arguments):
    """The same call as of a process with a GPU: from Triton's own launch on, and nothing compiled in memory."""
    triton.runtime.driver.set_active(Stub(HOPPER))
    JITFunction.run = LAUNCH
    dense_cluster.dense_cluster_fwd_kernel.device_caches.clear()
    LAUNCHED.clear()
    before = binaries()
    launch(*arguments)
    assert len(LAUNCHED) == 1, LAUNCHED
    assert binaries() == before, "a kernel was compiled anew"


def binaries():
    return sorted(Path(triton.knobs.cache.dir).rglob("*.cubin"))


def test_a_launch_finds_what_was_compiled_ahead(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = ("cpu", "bf16", 1000, "forward_kl")
    ahead = [(launch, *case), (launch, "cpu", "bf16", 1000, "no_such_divergence")]
    later = [(launch_on_a_stub, *case), (launch_on_a_stub, "cpu", "fp16", 1000, "forward_kl")]
    wrong, anew = compile_ahead([*ahead, *later], HOPPER, jobs=1)
    assert "no_such_divergence" in wrong
    assert "'fp16'" in anew and "compiled anew" in anew
