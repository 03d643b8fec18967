"""A stub of a CUDA device, for rehearsals of what needs one: ``PYTHONPATH=tests/gpu pytest -p stub_device -m gpu``.

Tensors asked for on "cuda" are made on the CPU, streams and events do nothing, and the ops of the CUDA extension and of
Triton are those of the CPU extension. So the GPU's tests and tools run from their first line to their last, and find
what is wrong in them before a GPU does. Nothing that runs here says anything about a kernel.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from kdkernels import backends, ops

CARD = SimpleNamespace(
    name="Stub", total_memory=8 << 30, L2_cache_size=1 << 20, multi_processor_count=4, major=9, minor=0
)


def on_cpu(value):
    """A device's name in place of a GPU's."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class OnCpu(TorchFunctionMode):
    """Calls of torch that name the GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: on_cpu(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if function is torch.Tensor.to:
            args = tuple(map(on_cpu, args))
        return function(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, on_cpu(device))


class Event:
    def __init__(self, **options):
        self.at = 0.0

    def record(self, *_):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Stream(contextlib.nullcontext):
    def __init__(self, *_, **__):
        super().__init__()

    def __getattr__(self, name):
        return lambda *_: None


def install():
    """For the rest of the process."""
    OnCpu().__enter__()
    torch.Generator = Generator
    stubs = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: CARD,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: CARD.name,
        "current_stream": Stream,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": Event,
        "synchronize": lambda *_: None,
        "_sleep": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
    }
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    assert backends.cpu.load_error() is None, backends.cpu.load_error()
    library = torch.library.Library("kdkernels", "IMPL")
    for backend in ("cuda", "triton"):
        for pattern in ops.SCHEMAS:
            if backend in ops.LACKING.get(pattern, {}):
                continue
            of_cpu = getattr(torch.ops.kdkernels, f"{pattern}_cpu")
            library.impl(f"{pattern}_{backend}", lambda *args, op=of_cpu, **kwargs: op(*args, **kwargs), "CPU")
        backends.BACKENDS[backend] = SimpleNamespace(why_not=lambda device_type: None)
    backends.KERNELS["cpu"] = ("cuda", "triton", "cpu")
    backends.cuda.why_not = lambda device_type: None
    _kept.append(library)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import ahead

    ahead.compile_ahead = lambda calls, **options: []


_kept = []
if os.environ.get("KDKERNELS_STUB_DEVICE") != "0":
    install()
