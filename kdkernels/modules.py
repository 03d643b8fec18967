"""Heads that are modules and more than a weight: adapters, copies that are trained, scaled and capped logits.

A student's head becomes a weight, a bias and hidden states whose product is what the module computes; what cannot be
written so is an error. A teacher's head is called, where it is no plain one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import checks

# Names of a factor of the logits in the configurations of models.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class Resolved(NamedTuple):
    """``logits = cap(hidden @ weight.T + bias)``; the weight may still be a module that ``checks`` takes."""

    hidden: Any
    weight: Any
    bias: Any
    softcap: Optional[float] = None


def student(objective: Any, hidden: Any, weight: Any, bias: Any, side: str = "student_") -> tuple[Any, Any, Any, Any]:
    """The objective, hidden states, head and bias of a call whose head may be a module, or a whole model."""
    if not isinstance(weight, torch.nn.Module):
        return objective, hidden, weight, bias
    found = resolved(side, hidden, weight, bias)
    name = f"{side}softcap" if hasattr(objective, f"{side}softcap") else "softcap"
    return with_softcap(objective, name, found.softcap), found.hidden, found.weight, found.bias


def with_softcap(objective: Any, name: str, cap: Optional[float]) -> Any:
    """The objective with the cap of a model, which a cap of the call must not contradict."""
    if cap is None:
        return objective
    given = getattr(objective, name)
    if given is not None and given != cap:
        raise ValueError(f"{name} must be None or the model's own, {cap:g}, got {given:g}")
    return dataclasses.replace(objective, **{name: cap})


def resolved(side: str, hidden: Any, module: torch.nn.Module, bias: Any) -> Resolved:
    """The tensors of a model's head, or of a module with adapters; other modules as they are."""
    if not isinstance(hidden, Tensor):
        return Resolved(hidden, module, bias)
    if callable(getattr(module, "get_output_embeddings", None)) and hasattr(module, "config"):
        return _of_model(side, hidden, module, bias)
    if _is_saved_copy(module):
        return resolved(side, hidden, _active_copy(module), bias)
    if _is_lora(module):
        return _of_lora(side, hidden, module, bias)
    return Resolved(hidden, module, bias)


def _of_model(side: str, hidden: Tensor, model: Any, bias: Any) -> Resolved:
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise TypeError(
            f"{side}weight must be a model with a head, got {type(model).__name__}, whose get_output_embeddings() is "
            f"{type(head).__name__}: pass the head itself"
        )
    scale, cap = scale_of(model.config), cap_of(model.config)
    found = resolved(side, hidden, head, bias)
    if scale == 1:
        return found._replace(softcap=cap)
    weight, bias = checks.head_tensors(side, found.weight, found.bias)
    return Resolved(found.hidden * scale, weight, None if bias is None else bias * scale, cap)


def scale_of(config: Any) -> float:
    """The factor by which a model multiplies its logits, by its configuration."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in FACTORS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # Granite and MiniCPM3 divide by what HyperCLOVA X multiplies by.
    return float(divisor) if getattr(config, "model_type", "") == "hyperclovax" else 1 / float(divisor)


def cap_of(config: Any) -> Optional[float]:
    """The softcap of a model's logits, by its configuration."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def _is_saved_copy(module: Any) -> bool:
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module") and bool(_active(module))


def _active_copy(module: Any) -> torch.nn.Module:
    """The copy that peft trains in place of a layer, or the layer where its adapters are off."""
    _, *others = _active(module)
    if getattr(module, "disable_adapters", False):
        return module.original_module
    if others:
        raise TypeError(f"a head with one active copy is needed, got {type(module).__name__} with {_active(module)}")
    return module.modules_to_save[_active(module)[0]]


def _active(module: Any) -> list[str]:
    found = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None) or []
    return [found] if isinstance(found, str) else list(found)


def _is_lora(module: Any) -> bool:
    """A layer of peft's LoRA, whose forward is known: ``base(x) + sum of scaling B(A(dropout(x)))``."""
    if not all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "scaling", "lora_dropout")):
        return False
    names = [name for name in _active(module) if name in module.lora_A]
    # DoRA and other variants do something else with the factors.
    variants = (getattr(module, "use_dora", {}), getattr(module, "lora_variant", {}))
    plain = not any(variant.get(name) for variant in variants for name in names)
    factors = [factor[name] for factor in (module.lora_A, module.lora_B) for name in names]
    return plain and all(type(factor) is torch.nn.Linear for factor in factors)


def _of_lora(side: str, hidden: Tensor, module: Any, bias: Any) -> Resolved:
    """Columns beside those of the base's weight, and what they are multiplied by beside the hidden states.

    The sum of the two is never rounded: 16 bits would lose most of an adapter that is small beside its base.
    """
    for layer in (module, module.base_layer):
        checks.no_hooks(f"{side}weight", layer)
    weight, bias = checks.head_tensors(side, module.base_layer, bias)
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return Resolved(hidden, weight, bias)
    states, columns = [hidden], [weight]
    for name in _active(module):
        if name in module.lora_A:
            a, b, scale = module.lora_A[name], module.lora_B[name], module.scaling[name]
            inner = F.linear(module.lora_dropout[name](hidden.to(a.weight.dtype)), a.weight, a.bias)
            states.append((scale * inner).to(hidden.dtype))
            columns.append(b.weight.to(weight.dtype))
            if b.bias is not None:
                offset = scale * b.bias.to(weight.dtype)
                bias = offset if bias is None else bias + offset
    return Resolved(torch.cat(states, -1), torch.cat(columns, -1), bias)


def teachers(objective: Any, hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any, Any]:
    """As ``student`` of a teacher or of several, whose common softcap is the call's."""
    several = isinstance(weight, (list, tuple)) and isinstance(hidden, (list, tuple)) and len(weight) == len(hidden)
    given = [(hidden, weight, bias)]
    if several:
        offsets = bias if isinstance(bias, (list, tuple)) and len(bias) == len(weight) else [None] * len(weight)
        if bias is not None and offsets is not bias:
            return objective, hidden, weight, bias
        given = list(zip(hidden, weight, offsets, strict=True))
    if not any(isinstance(module, torch.nn.Module) for _, module, _ in given):
        return objective, hidden, weight, bias
    found = [
        resolved("teacher_", *item)
        if isinstance(item[1], torch.nn.Module) and not _is_called(item[1])
        else Resolved(*item)
        for item in given
    ]
    caps = {item.softcap for item in found}
    if len(caps) > 1:
        raise ValueError("teacher_weight must be models of one softcap: a mixture caps the logits of all alike")
    objective = with_softcap(objective, "teacher_softcap", caps.pop())
    states, heads, offsets = (list(part) for part in list(zip(*found, strict=True))[:3])
    if several:
        return objective, states, heads, offsets
    return objective, states[0], heads[0], offsets[0]


def _is_called(module: Any) -> bool:
    """True for a head that is known by its forward alone, and not by its tensors."""
    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.nn.Embedding):
        return False
    if hasattr(module, "get_output_embeddings"):
        return False
    own = isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward
    # Parameters that this forward does not know are somebody's who multiplies by them elsewhere.
    if own and set(module._parameters) - {"weight", "bias"}:
        return False
    try:
        checks.head_tensors("teacher_", module, None)
    except TypeError:
        return True
    return False


def called(hidden: Any, weight: Any, bias: Any, rows: torch.Size) -> Optional[tuple[Callable[[Any], Any], int]]:
    """A function of rows that calls the teachers' heads, and their number, where one of them is no plain head."""
    several = isinstance(weight, (list, tuple))
    if several and not (isinstance(hidden, (list, tuple)) and len(hidden) == len(weight)):
        return None
    heads = list(weight) if several else [weight]
    if not any(map(_is_called, heads)):
        return None
    states = list(hidden) if several else [hidden]
    if bias is not None and not (several and all(item is None for item in bias)):
        raise ValueError("teacher_bias must be None where teacher_weight is a module that is called: it has its own")
    for value in states:
        checks.tensor("teacher_hidden", value)
        if value.shape[:-1] != rows:
            raise ValueError(
                f"teacher_hidden must have shape {(*rows, 'D')} as the student's, got {tuple(value.shape)}"
            )
    flat = [value.detach().reshape(-1, value.shape[-1]) for value in states]

    known = [head if _is_called(head) else checks.head_tensors("teacher_", head, None) for head in heads]

    @torch.no_grad()
    def logits(which: Any) -> Any:
        parts = [
            F.linear(value[which], *head) if isinstance(head, tuple) else head(value[which])
            for value, head in zip(flat, known, strict=True)
        ]
        return parts if several else parts[0]

    return logits, len(heads)
