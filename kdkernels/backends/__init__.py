"""Who can run what, and why not.

A backend is a module with ``why_not(device_type) -> None | str``: None when it runs on such tensors here, else the
reason. "auto" takes the first one that runs, in the order fused first; an explicit request that cannot be met raises.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import divergences, ops
from kdkernels.backends import cpu, cuda, eager, triton

BACKENDS = {"cuda": cuda, "triton": triton, "cpu": cpu, "torch": eager}
# The backends with kernels, by the device type of the tensors, in the order in which "auto" tries them.
KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}
# Not a name: the package may be imported under another one.
_PACKAGE = __name__.partition(".")[0]
# Logits of which plain PyTorch is worth a warning.
LARGE = 1_000_000


class PlainTorchWarning(UserWarning):
    """ "auto" runs large logits through plain PyTorch, where kernels would be several times faster.

    ``warnings.filterwarnings("error", category=kdkernels.backends.PlainTorchWarning)`` makes an error of it.
    """


class Availability(NamedTuple):
    """A backend's answer on a device type: it runs there, or why not."""

    name: str
    ok: bool
    reason: str


def available(device_type: str) -> list[Availability]:
    """Every backend's answer for tensors on ``device_type`` ("cpu", "cuda", ...), in the order "auto" tries them."""
    answers = ((name, backend.why_not(device_type)) for name, backend in BACKENDS.items())
    return [Availability(name, reason is None, reason or "") for name, reason in answers]


def select(
    requested: str,
    device_type: str,
    *,
    divergence: str = "forward_kl",
    torch_only: Optional[str] = None,
    cuda_lacks: Optional[str] = None,
    pattern: str = "dense_fwd",
) -> str:
    """The backend that runs a call.

    Args:
        requested: "auto" or a backend's name.
        device_type: of the student.
        divergence: the canonical name; those registered at run time are not everywhere.
        torch_only: why only plain PyTorch can run this call, or None.
        cuda_lacks: why the CUDA extension cannot run it, or None.
        pattern: the name of the op, which not every backend has.

    Raises:
        ValueError: when the backend that was asked for cannot run the call, with its reason.
    """
    if requested == "auto":
        reserved = ops.BY_NAME_ONLY.get(pattern, ())
        for name in KERNELS.get(device_type, ()):
            if name in reserved:
                continue
            if _refusal(name, device_type, divergence, torch_only, cuda_lacks, pattern) is None:
                return name
        return "torch"
    reason = _refusal(requested, device_type, divergence, torch_only, cuda_lacks, pattern)
    if reason is not None:
        raise ValueError(f"backend {requested!r} cannot run this call: {reason}")
    return requested


def choose(requested: str, logits: Tensor, **call: Any) -> str:
    """As ``select``, for a call on these logits; where "auto" has no kernel for large ones it warns, once a process."""
    name = select(requested, logits.device.type, **call)
    if name == "torch" and requested == "auto" and not torch.compiler.is_compiling():
        _warn_of_plain_torch(logits, **call)
    return name


_warned = False


def _warn_of_plain_torch(
    logits: Tensor,
    divergence: str = "forward_kl",
    torch_only: Optional[str] = None,
    cuda_lacks: Optional[str] = None,
    pattern: str = "dense_fwd",
) -> None:
    global _warned
    kernels = KERNELS.get(logits.device.type, ())
    if _warned or not kernels or logits.numel() < LARGE:
        return

    def reason(name: str) -> Optional[str]:
        refusal = _refusal(name, logits.device.type, divergence, torch_only, cuda_lacks, pattern)
        return refusal or ops.BY_NAME_ONLY.get(pattern, {}).get(name)

    reasons = "".join(f"\n  {name}: {reason(name)}" for name in kernels)
    # The line to show is the user's: modules call the losses through torch.
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (_PACKAGE, "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"logits {tuple(logits.shape)} on {logits.device.type} go through plain PyTorch, several times slower than "
        f'through a kernel of kdkernels.{reasons}\n  backend="torch" asks for plain PyTorch without this warning.',
        PlainTorchWarning,
        stacklevel=level,
    )
    # Not before: where the warning is an error every such call raises.
    _warned = True


# Under torch.compile the answer is asked once, while tracing: it loads libraries, which no graph can hold. This is what
# torch.compiler.assume_constant_result does, which also imports all of torch._dynamo: twice the time of `import torch`.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(
    name: str,
    device_type: str,
    divergence: str,
    torch_only: Optional[str],
    cuda_lacks: Optional[str],
    pattern: str,
) -> Optional[str]:
    reason = ops.LACKING.get(pattern, {}).get(name) or BACKENDS[name].why_not(device_type)
    if reason is None and name == "cuda":
        reason = cuda_lacks
    if reason is None and name != "torch":
        reason = torch_only
    if reason is None and name in ("cpu", "cuda") and divergences.registered(divergence):
        reason = f"divergence {divergence!r} was registered at run time, which compiled code does not see"
    if reason is None and name == "triton" and not divergences.has_triton(divergence):
        reason = f"divergence {divergence!r} was registered without Triton functions"
    return reason
