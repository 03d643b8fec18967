"""Arguments without a value yet: Python numbers that a compiler knows by a symbol, and tensors that have a shape alone.

One graph serves all values of a symbol.

Dynamo makes a number a symbol when it meets its second value, or at once with ``dynamic=True``; a number of rows is one
in ``torch.export`` too. The ``float`` of an op would pin the symbol to the value of the moment, and the next one would
be compiled again. A tensor does not pin it, where it is made by a sum, product or quotient of a tensor and the symbol:
these torch rewrites so that the number enters the graph as a tensor. ``torch.full`` it does not rewrite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_symbol(value: Any) -> bool:
    """True if a number may have another value when the graph that is being made runs."""
    if torch.compiler.is_dynamo_compiling():
        # To code that Dynamo traces, a symbol is a float or an int as any other; this function sees the difference.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return not has_static_value(value)
    return isinstance(value, (torch.SymFloat, torch.SymInt))


def as_float(value: Any) -> float:
    """``float(value)``, where a symbol stays one."""
    return torch.sym_float(value) if isinstance(value, (torch.SymFloat, torch.SymInt)) else float(value)


def shown(value: Any) -> str:
    """A number in a message; a graph cannot write down a symbol."""
    return "another value" if is_symbol(value) else str(value)


def as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, symbol or not, as a 0-d tensor."""
    if is_symbol(value):
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def packed(values: Any) -> Tensor:
    """Numbers, symbols among them, as a tensor of the CPU that an op reads without waiting for a GPU."""
    return torch.stack([as_tensor(value, torch.float64, torch.device("cpu")) for value in values])


def traces_ops() -> bool:
    """True while a program is being made of the ops that are called, without the Python between them.

    Dynamo sees autograd functions, with and without strict export; and below torch 2.12 it takes every graph for one of
    an export.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def has_values(tensor: Tensor) -> bool:
    """True if there are numbers in a tensor; in one on "meta" and in a fake one there are none."""
    if type(tensor) in _PLAIN:
        return not tensor.is_meta
    from torch._subclasses.fake_tensor import is_fake

    return not (tensor.is_meta or is_fake(tensor))


_PLAIN = (Tensor, torch.nn.Parameter)
