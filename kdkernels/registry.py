"""Divergences of the user's own, entered at run time for the Triton and the plain PyTorch backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from torch import Tensor

from kdkernels import divergences
from kdkernels.divergences import Divergence
from kdkernels.reference import divergences as reference

Pointwise = Callable[[Tensor, Tensor, Tensor, Tensor, Any, Any], Tensor]


def register_divergence(
    cls: type[Divergence],
    value: Pointwise,
    *,
    triton_value: Optional[Any] = None,
    triton_score: Optional[Any] = None,
) -> None:
    r"""Enter a divergence ``D(p, q) = sum_v f(p_v, logp_v, q_v, logq_v)`` under ``cls.name``.

    Args:
        cls: a frozen dataclass derived from ``kdkernels.Divergence`` with a ``name`` of its own; its ``params()`` are
            the two numbers handed to the functions.
        value: f in PyTorch, ``value(p, logp, q, logq, param0, param1)``, elementwise over ``[N, V]``; autograd takes
            its gradient. Infinite logarithms of zero probabilities are its business, as is ``0 * inf``.
        triton_value, triton_score: f and ``df/dlogq`` (with ``dq/dlogq = q``) as ``@triton.jit`` functions of the same
            six arguments, fp32 blocks. Without them a GPU falls back to PyTorch, and asking for "triton" raises.

    The "cpu" backend knows only what was compiled into it, so that CPU tensors go to PyTorch.

    Raises:
        TypeError: when ``cls`` is no subclass of ``Divergence``, or no frozen dataclass of its own.
        ValueError: when the name is taken or no identifier, or only one of the Triton functions is given.

    Example:
        >>> import dataclasses, torch, kdkernels as kd
        >>> @dataclasses.dataclass(frozen=True)
        ... class Hellinger(kd.Divergence):
        ...     name = "hellinger"
        >>> kd.register_divergence(Hellinger, lambda p, logp, q, logq, a, b: 0.5 * (p.sqrt() - q.sqrt()) ** 2)
        >>> kd.kd_loss(torch.zeros(1, 4), torch.zeros(1, 4), divergence="hellinger").item()
        0.0
        >>> kd.unregister_divergence("hellinger")
    """
    if not (isinstance(cls, type) and issubclass(cls, Divergence)):
        raise TypeError(f"cls must be a subclass of kdkernels.Divergence, got {cls!r}")
    if (triton_value is None) != (triton_score is None):
        raise ValueError("triton_value and triton_score come together, got only one of them")
    divergences.add(cls, on_triton=triton_value is not None)

    def rows(logp: Tensor, logq: Tensor, param0: Any, param1: Any) -> Tensor:
        return value(logp.exp(), logp, logq.exp(), logq, param0, param1).sum(-1)

    reference.TABLE[cls.name] = rows
    if triton_value is not None:
        from kdkernels.kernels import divergences as triton_divergences

        triton_divergences.register(cls.name, value=triton_value, score=triton_score)


def unregister_divergence(name: str) -> None:
    """Take out what ``register_divergence`` entered.

    Raises:
        ValueError: when no divergence of that name was registered.
    """
    if not divergences.registered(name):
        raise ValueError(f"no divergence {name!r} was registered")
    if divergences.has_triton(name):
        from kdkernels.kernels import divergences as triton_divergences

        triton_divergences.remove(name)
    del reference.TABLE[name]
    divergences.remove(name)
