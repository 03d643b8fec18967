"""Sequences of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels.checks.sparse import highest_logprob
from kdkernels.checks.tensors import dtype_name, floating, integers, tensor
from kdkernels.checks.values import integer

EXTRA_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
)


# The tensors of a cache beside its extras: of entries, and of expectations.
ENTRY_NAMES = ("ids", "logprobs", "tail_logprob", "length")
EXPECTATION_NAMES = ("expectation", "entropy", "expected_bias", "length")


def extras_of_tokens(extras: Any, names: Sequence[str] = ENTRY_NAMES) -> dict[str, torch.dtype]:
    """The further tensors of a cache: a mapping of names to dtypes, none of them a name of the cache's own."""
    if extras is None:
        return {}
    if not isinstance(extras, Mapping):
        raise TypeError(f"extras must be a mapping of names to dtypes, got {type(extras).__name__}")
    for name, dtype in extras.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"extras must have names that are identifiers, got {name!r}")
        if name in names:
            raise ValueError(f"extras must not have the name {name!r}, which the cache uses")
        if dtype not in EXTRA_DTYPES:
            raise TypeError(f"extras[{name!r}] must be one of {', '.join(map(str, EXTRA_DTYPES))}, got {dtype!r}")
    return dict(extras)


def captured_sequence(
    ids: Any, logprobs: Any, tail_logprob: Any, extras: Mapping[str, Any], layout: Any
) -> tuple[Tensor, Tensor, Optional[Tensor], dict[str, Tensor]]:
    """One sequence for a cache: ids and log-probabilities ``[L, K]``, tail and extras ``[L]``; returned on the CPU."""
    for name, value in (("ids", ids), ("logprobs", logprobs)):
        tensor(name, value)
    integers("ids", ids)
    floating("logprobs", logprobs)
    if ids.dim() != 2 or ids.shape[1] != layout.k:
        raise ValueError(f"ids must have shape (L, {layout.k}), got {tuple(ids.shape)}")
    if logprobs.shape != ids.shape:
        raise ValueError(f"logprobs must have the shape of ids {tuple(ids.shape)}, got {tuple(logprobs.shape)}")
    if (tail_logprob is not None) != layout.tail:
        raise ValueError(f"tail_logprob must {'' if layout.tail else 'not '}be given: the cache has tail={layout.tail}")
    if extras.keys() != layout.extras.keys():
        raise ValueError(f"extras must be {sorted(layout.extras)}, got {sorted(extras)}")
    ids, logprobs = ids.detach().cpu(), logprobs.detach().cpu()
    bad = (ids < -1) | (ids >= layout.vocab_size)
    if bool(bad.any()):
        raise ValueError(f"ids must be in [0, {layout.vocab_size}) or -1 for an unused slot, got {int(ids[bad][0])}")
    used = torch.where(ids < 0, -torch.inf, logprobs)
    weights = torch.ones(len(ids), dtype=torch.bool)
    if tail_logprob is not None:
        tail_logprob = _of_tokens("tail_logprob", tail_logprob, len(ids))
        if not tail_logprob.is_floating_point():
            raise TypeError(f"tail_logprob must be of floating point, got {dtype_name(tail_logprob.dtype)}")
        _no_more_than_certain("tail_logprob", tail_logprob)
        weights = tail_logprob == -torch.inf
    _no_more_than_certain("logprobs", used[~weights], " where ids is not -1")
    # Nothing is left to the ids that are not here, so that these may be samples: their weights may be above 1. fp16 is
    # what they are stored in; NaN fails the comparison too.
    if not bool((used <= torch.finfo(torch.float16).max).all()):
        raise ValueError("logprobs must not be NaN or above 65504, where ids is not -1")
    return ids, logprobs, tail_logprob, _converted(extras, layout, len(ids))


def expectation_sequence(
    expectation: Any, entropy: Any, bias: Any, extras: Mapping[str, Any], layout: Any
) -> tuple[Tensor, Tensor, Optional[Tensor], dict[str, Tensor]]:
    """One sequence for a cache: expectations ``[L, D]``, entropy, that of the bias and extras ``[L]``; on the CPU."""
    given = {"expectation": expectation, "entropy": entropy}
    if (bias is not None) != layout.bias:
        raise ValueError(f"bias must {'' if layout.bias else 'not '}be given: the cache has bias={layout.bias}")
    if bias is not None:
        given["bias"] = bias
    if extras.keys() != layout.extras.keys():
        raise ValueError(f"extras must be {sorted(layout.extras)}, got {sorted(extras)}")
    found = {}
    for name, value in given.items():
        tensor(name, value)
        floating(name, value)
        if name == "expectation" and (value.dim() != 2 or value.shape[1] != layout.hidden_size):
            raise ValueError(f"expectation must have shape (L, {layout.hidden_size}), got {tuple(value.shape)}")
        found[name] = value.detach().cpu() if name == "expectation" else _of_tokens(name, value, len(expectation))
        dtype = layout.dtype if name == "expectation" else torch.float32
        if not bool(found[name].to(dtype).isfinite().all()):
            raise ValueError(f"{name} must be finite in {dtype_name(dtype)}, in which it is stored")
    if bool((found["entropy"] < -1e-3).any()):
        raise ValueError(f"entropy must be at least 0, got {found['entropy'].min().item():g}")
    converted = _converted(extras, layout, len(expectation))
    return found["expectation"], found["entropy"], found.get("bias"), converted


def _converted(extras: Mapping[str, Any], layout: Any, length: int) -> dict[str, Tensor]:
    """The further tensors of a sequence, in the dtypes of the cache, where that changes no value."""
    converted = {}
    for name, dtype in layout.extras.items():
        value = _of_tokens(name, extras[name], length)
        converted[name] = value.to(dtype)
        if value.dtype != dtype and not torch.equal(converted[name].to(value.dtype), value):
            raise ValueError(f"{name} must fit {dtype_name(dtype)}, got {dtype_name(value.dtype)} values that do not")
    return converted


def _no_more_than_certain(name: str, logprobs: Tensor, where: str = "") -> None:
    """Log-probabilities, of which 0 may have been rounded up."""
    # NaN fails the comparison too.
    bad = ~(logprobs <= highest_logprob(logprobs.dtype))
    if bool(bad.any()):
        worst = logprobs[bad].reshape(-1)[0].item()
        raise ValueError(f"{name} must be log-probabilities, at most 0 and not NaN{where}, got {worst:g}")


def _of_tokens(name: str, value: Any, length: int) -> Tensor:
    """A tensor of one number per token, brought to the CPU."""
    tensor(name, value)
    if tuple(value.shape) != (length,):
        raise ValueError(f"{name} must have one value per token, shape ({length},), got {tuple(value.shape)}")
    return value.detach().cpu()


def rank_of_readers(rank: Any, world_size: Any) -> tuple[int, int]:
    """Which reader of how many this process is: as it says, or as torch.distributed knows."""
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size must be given together, or neither")
    if rank is None:
        import torch.distributed as dist

        together = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    return integer("rank", rank, low=0, high=integer("world_size", world_size, low=1) - 1), world_size


def state_of_reader(state: Any, own: Mapping[str, Any]) -> None:
    """The state of an iterator over sequences that are the same, in the same order."""
    if not isinstance(state, Mapping) or state.keys() != own.keys():
        raise ValueError(f"state must be what state_dict() returned, with {sorted(own)}")
    for name, value in own.items():
        if name in ("epoch", "position"):
            integer(f"state[{name!r}]", state[name], low=0)
        elif state[name] != value:
            raise ValueError(f"state must be of {name} {value!r}, which reads it, got {state[name]!r}")
