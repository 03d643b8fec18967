"""Every Python with this folder in PYTHONPATH has the stub device: ``PYTHONPATH=tests/gpu/stub scripts/gpu-check``."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[3])]

import stub_device  # noqa: E402, F401
