"""Python values: choices, flags, numbers, texts."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import symbols
from kdkernels.checks.tensors import dtype_name

LARGEST = sys.float_info.max
INT64 = torch.iinfo(torch.int64)
FP32 = torch.finfo(torch.float32)


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """``value`` must be one of the strings ``allowed``."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{meant(value, allowed)}")


# Other libraries' words for a choice.
SYNONYMS = {
    "average": "mean",
    "avg": "mean",
    "gpu": "cuda",
    "eager": "torch",
    "pytorch": "torch",
    "probabilities": "probs",
    "logprobs": "log_probs",
    "zero": "renormalize",
    "symmetric_uniform": "bucket",
    "kl": "forward_kl",
    "fkl": "forward_kl",
    "kl_div": "forward_kl",
    "rkl": "reverse_kl",
    "js": "jsd",
    "js_div": "jsd",
    "generalized_jsd": "jsd",
    "tv": "tvd",
    "akl": "mixed_kl",
    "ce": "soft_ce",
}


def meant(value: str, allowed: Sequence[str]) -> str:
    """A question after the name that was meant by one that is none, or nothing."""
    plain = value.lower().replace("-", "_").replace(" ", "_")
    found = [SYNONYMS.get(plain, plain), *difflib.get_close_matches(plain, allowed, 1)]
    best = next((name for name in found if name in allowed), None)
    return f"; did you mean {best!r}?" if best else ""


def flag(name: str, value: object) -> None:
    """``value`` must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def group_of_ranks(group: Any) -> None:
    """A process group of torch.distributed that this process is in."""
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        hint = "; dist.group.WORLD is that of all ranks" if dist.is_available() else ""
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}{hint}")
    if dist.get_rank(group) < 0:
        raise ValueError("process_group must be a group that this process is in")


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive_low: bool = False,
    exclusive_high: bool = False,
) -> float:
    """``value`` must be a finite Python number (a symbol counts) in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # A comparison, not math.isfinite: Dynamo traces it for a number that it keeps as a symbol. NaN fails it too, and an
    # int beyond all floats is larger than the largest.
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be finite, got {symbols.shown(value)}")
    # Not ``== low``: that would pin a symbol, of which the message has no name.
    outside = value < low or value > high
    if outside or (exclusive_low and not value > low) or (exclusive_high and not value < high):
        if high == math.inf:
            expected = f"{'>' if exclusive_low else '>='} {low:g}"
        else:
            expected = f"in {'(' if exclusive_low else '['}{low:g}, {high:g}{')' if exclusive_high else ']'}"
        raise ValueError(f"{name} must be {expected}, got {symbols.shown(value)}")
    return symbols.as_float(value)


def in_sums(name: str, value: float, *, positive: bool = False) -> None:
    """A Python number stays finite in fp32, where sums are made; one that must be ``positive`` has an inverse there."""
    if not -FP32.max <= value <= FP32.max:
        raise ValueError(f"{name} must be finite in float32, got {symbols.shown(value)}")
    if positive and value < FP32.smallest_normal:
        raise ValueError(f"{name} must be at least {FP32.smallest_normal:.3g} in float32, got {symbols.shown(value)}")


def integer(name: str, value: Any, *, low: int = INT64.min, high: int = INT64.max) -> int:
    """``value`` must be an int (``torch.SymInt`` counts) in ``[low, high]``, which are by default those of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
    return value  # type: ignore[return-value]


def text(name: str, value: Any) -> str:
    """``value`` must be a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    return value


def softcap(name: str, value: Optional[float]) -> float:
    """None means no cap, which the kernels know as 0."""
    if value is None:
        return 0.0
    in_sums(name, number(name, value, low=0.0, exclusive_low=True), positive=True)
    return symbols.as_float(value)


def logits_dtype(value: Any, product: Optional[torch.dtype] = None) -> None:
    """None, float32, or the 16-bit dtype of the products; which that is is known with the tensors."""
    if value is None:
        return
    if not isinstance(value, torch.dtype):
        raise TypeError(f"logits_dtype must be a torch.dtype or None, got {type(value).__name__}")
    if value not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits_dtype must be float32, bfloat16, float16 or None, got {dtype_name(value)}")
    if product is None or value in (product, torch.float32 if product.itemsize == 2 else product):
        return
    products = dtype_name(product)
    wanted = f"float32, {products}" if product.itemsize == 2 else products
    raise ValueError(
        f"logits_dtype must be {wanted} or None where the products are of {products}, got {dtype_name(value)}"
    )


def offsets(name: str, value: Any) -> list[tuple[int, int]]:
    """The starts and ends of tokens in a text, in its order."""
    pairs = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(pairs, (list, tuple)):
        raise TypeError(f"{name} must be pairs of a start and an end, got {type(value).__name__}")
    last = 0
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(x) is int for x in pair):
            raise TypeError(f"{name} must be pairs of two integers, a start and an end, got {pair!r} at {i}")
        start, end = pair
        if not 0 <= start <= end:
            raise ValueError(f"{name} must start at 0 or later and end no earlier than they start, got {pair!r} at {i}")
        if end > start and end < last:
            raise ValueError(f"{name} must follow the text, got {pair!r} at {i} behind one that ends at {last}")
        last = end if end > start else last
    return [(start, end) for start, end in pairs]
