"""Hidden states and heads, which may be modules, and the options of losses on them."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels.checks.dense import logits
from kdkernels.checks.tensors import dtype_name, floating, is_dtensor, no_tensor, same_device
from kdkernels.checks.values import flag

# Names that adapters are known by: LoRA and its kin in peft, and those that wrap a layer.
ADAPTER_NAMES = ("base_layer", "modules_to_save", "original_module", "trainable_tokens_delta")


def head(
    side: str, hidden: Any, weight: Any, bias: Any, autocast: bool, name: Optional[str] = None, *, least: int = 1
) -> None:
    """Hidden states ``(..., D)``, a head ``[V, D]`` of at least ``least`` rows and a bias ``[V]`` or None, of one
    device and dtype."""
    names = (name or f"{side}hidden", f"{side}weight", f"{side}bias")
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        if value is None and name == names[2]:
            continue
        if not isinstance(value, Tensor):
            raise no_tensor(name, value)
        if is_dtensor(value):
            cure = f"pass {name}.full_tensor()"
            if value.requires_grad:
                cure = (
                    "call the loss in the forward of the module that FSDP2 shards, where the head is gathered, or pass "
                    f'{name}.full_tensor(grad_placements=[Partial("avg")]) where each rank has rows of its own, '
                    f"{name}.full_tensor() where all have the same (docs/guide/hidden-states.md)"
                )
            raise TypeError(f"{name} must be a plain tensor, got a DTensor: {cure}")
        floating(name, value)
        if value.dtype == torch.float64 and value.device.type != "cpu":
            raise TypeError(f"{name} may be float64 on the CPU only, got a tensor on {value.device}")
        same_device(name, value, hidden, f"{names[0]}'s")
        if value.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"{name} must have {names[0]}'s dtype {dtype_name(hidden.dtype)}, got {dtype_name(value.dtype)}: "
                "under torch.autocast, as the model was, they may differ"
            )
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{names[0]} must have shape (..., D) with D >= 1, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] < least or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{names[1]} must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def lone_head(side: str, weight: Any, bias: Any, teacher: Any) -> None:
    """A head without hidden states, on the device of the logits or hidden states ``teacher``."""
    alike = weight[:1] if isinstance(weight, Tensor) and weight.dim() == 2 else teacher
    head(side, alike, weight, bias, autocast=True)
    if isinstance(teacher, Tensor):
        same_device(f"{side}weight", weight, teacher, "the teacher's")


def rows_of_head(weight: Tensor, columns: int, vocab_size: Optional[int]) -> None:
    """A student's head for a teacher of so many columns."""
    if vocab_size is None and weight.shape[0] != columns:
        raise ValueError(
            f"student_weight must have the teacher's {columns} rows, got {weight.shape[0]}; "
            "pass vocab_size=... when the two are padded to different widths"
        )
    if vocab_size is not None and vocab_size > weight.shape[0]:
        raise ValueError(f"vocab_size must be at most student_weight's {weight.shape[0]} rows, got {vocab_size}")


def head_tensors(side: str, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Weight and bias of a head that may be a module: one whose ``forward`` is their product and sum, and no more."""
    if not isinstance(weight, torch.nn.Module):
        return weight, bias
    name, kind = f"{side}weight", type(weight).__name__
    if isinstance(weight, torch.jit.ScriptModule):
        raise TypeError(
            f"{name} must be an nn.Linear with nn.Linear's own forward, or a tied nn.Embedding, got the scripted module"
            f" {kind}, whose forward cannot be known: pass its weight and bias as tensors"
        )
    found = getattr(weight, "weight", None)
    if is_dtensor(found):
        # ``head`` refuses it, and says what to pass.
        return found, bias
    quantised = (
        f"{name} must be a module with a weight of floating point, got {kind}, {{}}: pass the dequantised weight, such "
        "as weight.dequantize(), and the bias apart"
    )
    if callable(found) and not isinstance(found, Tensor):
        # As torch.ao's have it, beside a module of packed parameters.
        raise TypeError(quantised.format("whose weight is a method"))
    _no_adapters(name, weight)
    no_hooks(name, weight)
    if not isinstance(found, Tensor):
        raise TypeError(quantised.format(f"whose weight is {type(found).__name__}"))
    if not found.is_floating_point():
        raise TypeError(quantised.format(f"whose weight is {dtype_name(found.dtype)}"))
    if any(hasattr(found, mark) for mark in ("quant_state", "tensor_impl", "qdata", "SCB")) or found.is_quantized:
        raise TypeError(quantised.format(f"whose weight is a quantised {type(found).__name__}"))
    makes_products = isinstance(weight, torch.nn.Linear) and type(weight).forward is torch.nn.Linear.forward
    is_table = isinstance(weight, torch.nn.Embedding) and type(weight).forward is torch.nn.Embedding.forward
    called = type(weight).__call__ is torch.nn.Module.__call__ and "forward" not in vars(weight)
    if not (makes_products or is_table) or not called:
        raise TypeError(
            f"{name} must be an nn.Linear with nn.Linear's own forward, or a tied nn.Embedding, got {kind}: what its "
            f"forward does beside hidden @ weight.T + bias would be lost. If that is nothing, pass {kind}'s weight and "
            "bias as tensors"
        )
    own = getattr(weight, "bias", None)
    extra = [item for item in weight._parameters if item not in ("weight", "bias")]
    if extra:
        raise TypeError(
            f"{name} must be a module of a weight and a bias alone, got {kind} with the parameters {', '.join(extra)}, "
            f"which would neither count nor learn: if they do nothing, pass {kind}'s weight and bias as tensors"
        )
    if own is None:
        return found, bias
    if bias is not None:
        raise ValueError(f"{side}bias must be None where {name} is a module with a bias of its own")
    return found, own


def _no_adapters(name: str, module: torch.nn.Module) -> None:
    children = [child for child, _ in module.named_children() if child != "parametrizations"]
    adapters = [child for child in children if child in ADAPTER_NAMES or "lora_" in child or "adapter" in child]
    adapters += [own for own in vars(module) if own.startswith("lora_") or own in ADAPTER_NAMES]
    adapters += [own for own in module._parameters if own.startswith("lora_")]
    if adapters:
        listed = ", ".join(dict.fromkeys(adapters))
        raise TypeError(
            f"{name} must be a head whose weight is all of it, got {type(module).__name__} with an adapter ({listed}), "
            "which would neither count nor learn: of adapters only peft's LoRA is known. Merge it: pass the tensor "
            "base.weight + scaling * lora_B.weight @ lora_A.weight, through which the factors get their gradient, or "
            "call merge_and_unload() where they are frozen. Of a module trained in full (modules_to_save) pass "
            "modules_to_save['default'] itself"
        )
    if children:
        raise TypeError(
            f"{name} must be a single layer, got {type(module).__name__} with the modules {', '.join(children)}: pass "
            "the one that multiplies"
        )


def no_hooks(name: str, module: torch.nn.Module) -> None:
    """Nothing beside a module's own forward would run."""
    for kind in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks"):
        if getattr(module, f"_{kind}"):
            raise TypeError(
                f"{name} must be a module without hooks, got {type(module).__name__} with {kind}, which would not run: "
                "the module's forward is never called. Pass its weight and bias as tensors if that is right"
            )


def teacher_head(hidden: Tensor, weight: Tensor, student: Tensor, vocab_size: Any) -> None:
    """A teacher's, for a student whose logits are of the shape of ``student``."""
    same_device("teacher_hidden", hidden, student)
    if hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must have shape {(*student.shape[:-1], 'D')} as the student's, got {tuple(hidden.shape)}"
        )
    if vocab_size is None and weight.shape[0] != student.shape[-1]:
        raise ValueError(
            f"teacher_weight must have the student's {student.shape[-1]} rows, got {weight.shape[0]}; "
            "pass vocab_size=... when the two are padded to different widths"
        )
    if vocab_size is not None and vocab_size > weight.shape[0]:
        raise ValueError(f"vocab_size must be at most teacher_weight's {weight.shape[0]} rows, got {vocab_size}")


def teacher_shard_head(hidden: Tensor, weight: Tensor, student: Tensor, total: int, vocab_size: Any) -> None:
    """A teacher's, of the columns of this rank or of all ``total``, for a student of this rank's ``student``."""
    own, rows = student.shape[-1], weight.shape[0]
    if rows != own and (rows != total if vocab_size is None else rows < total):
        raise ValueError(
            f"teacher_weight must have the student's {own} rows on this rank, or the {total} of the whole vocabulary, "
            f"got {rows}"
        )
    # All else but the rows.
    teacher_head(hidden, weight, student, 0)


def teacher_chunks(value: Any, num_rows: int, columns: int, count: int, device: torch.device) -> list[Tensor]:
    """The results of ``teacher_logits`` for ``num_rows`` rows: one or ``count`` tensors, moved to ``device``."""
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(parts) != count:
        raise ValueError(f"teacher_logits must return {count} tensors, as teacher_weights has, got {len(parts)}")
    for part in parts:
        logits("teacher_logits(rows)", part)
        if part.dim() != 2 or part.shape[0] != num_rows or part.shape[1] < columns:
            raise ValueError(
                f"teacher_logits(rows) must have shape ({num_rows}, V) with V >= {columns}, got {tuple(part.shape)}"
            )
    return [part.detach().to(device) for part in parts]


def teacher_callable(function: Any, *heads: Any) -> None:
    """``teacher_logits`` is a function, and stands alone."""
    if not callable(function):
        raise TypeError(f"teacher_logits must be callable as teacher_logits(rows), got {type(function).__name__}")
    if any(item is not None for item in heads):
        raise ValueError("teacher_logits takes the place of teacher_hidden, teacher_weight and teacher_bias: give one")


def sparse_grad_allowed(value: Any, columns_only: bool) -> None:
    """A head has a gradient in few rows where few of them are multiplied."""
    flag("sparse_grad", value)
    if value and not columns_only:
        raise ValueError(
            "sparse_grad needs tail 'renormalize_both' without ce_weight, z_loss_weight and return_stats: with any of "
            "them every row of the head has a gradient"
        )


def linear_mode_allowed(teacher_callable: bool, sparse_grad: bool, transformed: bool) -> None:
    """Refuse options of the linear losses that do not go with a graph, or a transform of plain PyTorch."""
    if sparse_grad and transformed:
        raise ValueError("sparse_grad works in reverse mode only, outside torch.func and forward mode; leave it out")
    if torch.compiler.is_compiling() and (teacher_callable or sparse_grad):
        name = "teacher_logits" if teacher_callable else "sparse_grad"
        raise ValueError(f"{name} works in eager mode only; under torch.compile leave it out")
