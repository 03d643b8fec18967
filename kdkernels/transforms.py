"""Tensors as ``torch.func`` and forward-mode differentiation wrap them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """True while a transform of ``torch.func`` or forward-mode differentiation is under way."""
    return _functorch_is_active() or forward_ad._current_level >= 0


# Where torch does not tell, the tensors do.
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def stands_for_others(tensor: Tensor) -> bool:
    """True if a tensor is one of a transform's, or a batch of gradients (``is_grads_batched=True``)."""
    return _is_wrapped(tensor) or _is_batched(tensor)


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def takes_part(tensor: Tensor) -> bool:
    """True if a transform sees a tensor: as one of its own, by its direction, or by the graph that it asks for."""
    if not active():
        return False
    return stands_for_others(tensor) or has_tangent(tensor) or (_in_functorch() and _wants_graph(tensor))


def _wants_graph(tensor: Tensor) -> bool:
    # torch.func runs no autograd.Function of the kind that the losses are, whatever it transforms.
    return tensor.requires_grad and torch.is_grad_enabled()


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_tangent(tensor: Tensor) -> bool:
    """True if forward-mode differentiation wants the derivative along a tensor's direction."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
