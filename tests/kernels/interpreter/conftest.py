"""Tests that run the Triton kernels in Triton's interpreter; tests/kernels/test_interpreter.py starts them."""

import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(TESTS / "kernels"), str(TESTS)]

# A kernel's decorator reads TRITON_INTERPRET when its module is imported: these tests need a process of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config):
    # numpy warns of what a GPU does silently: infinities and NaN of masked columns.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_once()


def _patch_once():
    """The interpreter patches triton.language anew in every call of a device function, which is 60 % of its time."""
    from triton.runtime.interpreter import InterpretedFunction

    patched = set()
    call = InterpretedFunction.__call__

    def fast_call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            patched.add(module)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = fast_call


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that one the kernel forgot shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 256 columns, so that a few hundred columns take several."""
    from shapes import tiles

    from kdkernels.kernels import tuning

    monkeypatch.setattr(tuning, "shape", tiles(32, columns=8))
