"""The "torch" backend: the reference in plain PyTorch, on any device."""

from __future__ import annotations

from typing import Optional


def why_not(device_type: str) -> Optional[str]:
    """Plain PyTorch runs everywhere."""
    return None
