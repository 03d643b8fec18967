"""Compiles for a GPU, in processes side by side and into Triton's cache, what calls would launch there.

The calls are made on tensors of the CPU, whose shapes, strides and alignments are what a kernel is compiled for, while
Triton takes the GPU's name from a stub of its driver and launches nothing. The tests then find every kernel compiled,
where one after the other they would take minutes.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import triton
from triton.runtime.jit import JITFunction

from kdkernels import backends
from kdkernels.kernels import tuning

LAUNCH = JITFunction.run


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **kwargs):
    return LAUNCH(self, *args, grid=grid, warmup=True, **kwargs)


def begin(target):
    """This process launches nothing from here on: it compiles for the target, and the backend takes CPU tensors."""
    arch = target.arch if target.backend == "cuda" else 0
    triton.runtime.driver.set_active(Driver(target))
    JITFunction.run = compile_only
    tuning.architecture = lambda device: arch
    backends.BACKENDS["triton"].why_not("cuda")  # registers the ops
    backends.BACKENDS["triton"] = SimpleNamespace(why_not=lambda device_type: None)


def call(function, arguments):
    try:
        function(*arguments)
    except Exception as error:  # the test that makes the call on the GPU reports it
        return f"{function.__name__}{arguments}: {type(error).__name__}: {error}"[:300]
    return None


def compile_ahead(calls, target=None, jobs=None):
    """Compile what calls launch, each a function of a module and its arguments. Returns lines for those that raised."""
    target = target or triton.runtime.driver.active.get_current_target()
    jobs = jobs or min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # Not forked: the parent may have a GPU open.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin, (target,)) as pool:
        said = [pool.submit(call, function, arguments) for function, *arguments in calls]
        return [line for line in (future.result() for future in said) if line is not None]
