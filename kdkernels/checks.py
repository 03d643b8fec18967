"""Every error a caller can get, raised before anything is launched and before any tensor is touched.

Messages name the argument, what was expected and what came. Values that live in tensors (labels, temperatures) are read
on the CPU, where that costs nothing; on a GPU only when the environment variable ``KDKERNELS_DEBUG=1`` is set, because
reading them waits for the device. Under ``torch.compile`` values are not read at all. The kernels themselves never
read or write out of bounds, whatever the labels.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union, get_args

import torch
from torch import Tensor

from kdkernels import symbols, transforms
from kdkernels.backends import cpu
from kdkernels.choices import Reduction
from kdkernels.reference.topk import unused

LARGEST = sys.float_info.max
INT64 = torch.iinfo(torch.int64)
FP32 = torch.finfo(torch.float32)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_TEACHERS = 4
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


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """``value`` must be one of the strings ``allowed``."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def flag(name: str, value: object) -> None:
    """``value`` must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, exclusive_low: bool = False
) -> float:
    """``value`` must be a finite Python number (a symbol counts) in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # A comparison, not math.isfinite: Dynamo traces it for a number that it keeps as a symbol. NaN fails it too, and an
    # int beyond all floats is larger than the largest.
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be finite, got {symbols.shown(value)}")
    # Not ``== low``: that would pin a symbol, of which the message has no name.
    if value < low or value > high or (exclusive_low and not value > low):
        expected = f"> {low:g}" if exclusive_low else (f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]")
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


def logits(name: str, value: Any) -> None:
    """A floating tensor ``(..., V)`` with unit stride in the last dimension; fp64 on the CPU only."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    plain(name, value)
    dtype = value.dtype
    if dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_dtype(value)}")
    if dtype == torch.float64 and value.device.type != "cpu":
        raise TypeError(f"{name} may be float64 on the CPU only, got a tensor on {value.device}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    shape = value.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., V) with V >= 1, got {tuple(shape)}")
    if shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 in the last dimension, got strides {tuple(value.stride())}")


def is_dtensor(value: Any) -> bool:
    """True if a value is a DTensor. This imports nothing, and costs next to nothing where it is a plain tensor."""
    kind = type(value)
    return kind is not Tensor and issubclass(kind, Tensor) and hasattr(kind, "full_tensor")


def plain(name: str, value: Any) -> None:
    """A value is no DTensor, where only the numbers of this rank are of use."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor here, got a DTensor with placements {_listed(value.placements)}; pass "
            f"{name}.to_local() for what this rank has, or {name}.full_tensor()"
        )


def sharded_student(student: Any, others: Sequence[str]) -> None:
    """The student is a DTensor as ``others`` are, whole on every rank or sharded in dimensions of its rows."""
    if not is_dtensor(student):
        kind = "plain tensor" if isinstance(student, Tensor) else type(student).__name__
        raise TypeError(
            f"student must be a DTensor as {others[0]} is, got a {kind}; pass DTensor.from_local(student, ...), or "
            f"{others[0]}.to_local() for what this rank has"
        )
    if student.dim() == 0:
        raise ValueError("student must have shape (..., V) with V >= 1, got ()")
    _sharded_by_rows("student", student, student.dim() - 1)


def sharded_argument(name: str, value: Any, student: Any, *, by_row: bool) -> None:
    """A tensor of a call whose student is a DTensor: placed as its rows are where ``by_row``, else the same anywhere.

    Shapes are compared here, and not by the loss of a rank's rows alone: an error must come to all ranks, or those that
    it does not come to wait for the others.
    """
    whole, rows = _whole(student), tuple(student.shape[:-1])
    if not is_dtensor(value):
        if by_row and not whole:
            placements = _listed(student.placements)
            raise TypeError(
                f"{name} must be a DTensor as the student is, whose placements are {placements}, got a plain tensor; "
                f"pass DTensor.from_local({name}, mesh, {placements}) where it is this rank's part, or "
                f"distribute_tensor({name}, mesh, {placements}) where it is all of it"
            )
        return
    if value.device_mesh != student.device_mesh:
        raise ValueError(f"{name} must be on the student's mesh {student.device_mesh}, got {value.device_mesh}")
    if not by_row:
        if not _whole(value):
            raise ValueError(
                f"{name} must have the student's rows {rows} or be the same on all ranks, got shape "
                f"{tuple(value.shape)} with placements {_listed(value.placements)}; pass {name}.full_tensor()"
            )
        return
    if tuple(value.shape[: len(rows)]) != rows:
        raise ValueError(f"{name} must have the student's leading shape {rows}, got {tuple(value.shape)}")
    _sharded_by_rows(name, value, len(rows))
    if any(not p.is_replicate() and p != q for p, q in zip(value.placements, student.placements, strict=True)):
        wanted = _listed(student.placements)
        raise ValueError(
            f"{name} must have the student's placements {wanted}, got {_listed(value.placements)}; pass "
            f"{name}.redistribute(placements={wanted})"
        )


def _sharded_by_rows(name: str, value: Any, num_dims: int) -> None:
    """Of a DTensor whose first dimensions are those of rows no other is cut, and nothing is left to be summed."""
    placements = value.placements
    wrong = [placement.is_partial() or getattr(placement, "dim", -1) >= num_dims for placement in placements]
    if not any(wrong):
        return
    wanted = ", ".join("Replicate()" if bad else _placement(p) for bad, p in zip(wrong, placements, strict=True))
    state, reason = "a sum over ranks that is still to be made", ""
    if not any(placement.is_partial() for placement in placements):
        state = "sharded in its last dimension"
        reason = ": losses of a sharded vocabulary (vocabulary-parallel) are not there yet"
    raise ValueError(
        f"{name} must not be {state}, got placements {_listed(placements)}{reason}; pass "
        f"{name}.redistribute(placements=[{wanted}])"
    )


def _whole(value: Any) -> bool:
    return all(placement.is_replicate() for placement in value.placements)


def _listed(placements: Sequence[Any]) -> str:
    return f"[{', '.join(map(_placement, placements))}]"


def _placement(value: Any) -> str:
    if not torch.compiler.is_compiling():
        return repr(value)
    # Dynamo does not trace the repr of a placement.
    return "Replicate()" if value.is_replicate() else "Partial()" if value.is_partial() else f"Shard(dim={value.dim})"


def teacher_like(name: str, teacher: Any, student: Tensor, vocab_size: Optional[int]) -> None:
    """The teacher's leading shape and device are the student's; so is its width, unless ``vocab_size`` is given."""
    logits(name, teacher)
    if teacher.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {teacher.device}")
    same = teacher.shape == student.shape if vocab_size is None else teacher.shape[:-1] == student.shape[:-1]
    if not same:
        hint = ""
        if teacher.shape[:-1] == student.shape[:-1]:
            hint = "; pass vocab_size=... when the two are padded to different widths"
        raise ValueError(
            f"{name} must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}{hint}"
        )
    if vocab_size is not None and vocab_size > teacher.shape[-1]:
        raise ValueError(f"vocab_size must be at most {name}'s width {teacher.shape[-1]}, got {vocab_size}")


def student_of(options: Any, student: Any) -> int:
    """The student's logits suit options; the number of columns that count."""
    logits("student", student)
    if options.reduction == "batchmean":
        batch_dimension(student)
    if getattr(options, "inplace", False):
        inplace_allowed(student)
    return vocabulary(options.vocab_size, student)


def teachers_of(options: Any, teacher: Any, student: Tensor) -> tuple[Tensor, ...]:
    """A teacher, or a sequence of some, beside the student."""
    if not isinstance(teacher, (list, tuple)):
        teacher_like("teacher", teacher, student, options.vocab_size)
        return (teacher,)
    several(teacher)
    for k, item in enumerate(teacher):
        teacher_like("teacher" if len(teacher) == 1 else f"teacher[{k}]", item, student, options.vocab_size)
    return tuple(teacher)


def several(teachers: Sequence[Any]) -> None:
    """A mixture of as many teachers as the kernels take."""
    if not 1 <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(f"teacher must be a tensor or 1 to {MAX_TEACHERS} tensors, got {len(teachers)}")


def mixture_weights(options: Any, count: int, student: Tensor, *, single: bool) -> Optional[Tensor]:
    """Weights ``[N, M]`` of the teachers, such that those of probabilities sum to 1; None for a single teacher."""
    weights = options.teacher_weights
    if single:
        if weights is not None:
            raise ValueError("teacher_weights need a sequence of teachers, got one tensor")
        return None
    if weights is None:
        weights = [1.0 / count] * count
    dtype = sum_dtype(student)
    if not isinstance(weights, (Tensor, list, tuple)):
        raise TypeError(f"teacher_weights must be a tensor or a sequence of numbers, got {type(weights).__name__}")
    if not isinstance(weights, Tensor):
        numbers = [number("teacher_weights", w, low=0.0) for w in weights]
        if any(symbols.is_symbol(w) for w in numbers):
            weights = torch.stack([symbols.as_tensor(w, dtype, student.device) for w in numbers])
        else:
            weights = torch.tensor(numbers, dtype=dtype, device=student.device)
    if weights.shape[-1:] != (count,) or weights.shape[:-1] not in ((), student.shape[:-1]):
        raise ValueError(
            f"teacher_weights must have shape ({count},) or {(*student.shape[:-1], count)}, got {tuple(weights.shape)}"
        )
    if weights.requires_grad:
        raise ValueError("teacher_weights must not require grad: they get no gradient; detach them")
    weights = weights.to(device=student.device, dtype=dtype).reshape(-1, count)
    if reads_values(weights) and weights.numel() and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"teacher_weights must be finite and >= 0 in {_name(dtype)}")
    if options.mixture == "probs":
        largest = weights.amax(-1, keepdim=True)
        if reads_values(weights) and not bool((largest > 0).all()):
            raise ValueError("teacher_weights must not all be 0")
        # Of the largest, so that their sum is one of this dtype.
        weights = weights / largest
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.expand(math.prod(student.shape[:-1]), count)


def why_no_teacher_grad(options: Any, *, mixed: bool) -> Optional[str]:
    """Why the kernels have no gradient for the teachers, if they have none."""
    if mixed:
        return "a mixture of teachers gets a gradient from plain PyTorch only; detach the teachers"
    if options.teacher_form in ("probs", "unnormalized_probs"):
        return "teacher probabilities get a gradient from plain PyTorch only; detach the teacher"
    if options.inplace:
        return "inplace cannot be combined with a teacher that requires grad; detach the teacher"
    return None


def probabilities(
    options: Any, teachers: Sequence[Tensor], columns: int, labels: Optional[Tensor], weight: Optional[Tensor]
) -> None:
    """The values of teachers that are probabilities, in the rows that count; ``labels`` and ``weight`` are ``[N]``."""
    form = options.teacher_form
    if form in ("logits", "log_probs") or torch.compiler.is_compiling() or not options.kd_weight:
        return
    counted = None if labels is None else labels != options.ignore_index
    if weight is not None:
        counted = weight != 0 if counted is None else counted & (weight != 0)
    if counted is not None and not reads_values(counted):
        return
    for k, teacher in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{k}]"
        teacher_probs(name, teacher, columns, counted, form)


def teacher_probs(
    name: str, teacher: Tensor, columns: int, counted: Optional[Tensor] = None, form: str = "probs"
) -> None:
    """Rows of probabilities, of those that are ``counted [N]``: none is negative or NaN, and they add up to 1 as far as
    their dtype can hold them. Of "unnormalized_probs" one is above 0, and all are finite.
    """
    if not reads_values(teacher) or teacher.numel() == 0:
        return
    finfo = torch.finfo(teacher.dtype)
    rows = teacher.detach()[..., :columns]
    if form == "probs":
        low, top, sums = rows.amin(-1), None, rows.sum(-1, dtype=sum_dtype(teacher)).reshape(-1)
    else:
        # Not torch.aminmax, which takes five times as long as both.
        low, top = rows.amin(-1), rows.amax(-1)
        sums = top.reshape(-1)
    low = low.reshape(-1)
    if counted is not None:
        counted = counted.reshape(-1)
        low, sums = (torch.where(counted, item, torch.ones_like(item)) for item in (low, sums))
    # NaN fails the comparison too.
    wrong = ~(low >= 0)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must hold probabilities, none negative or NaN, for teacher_form={form!r}, got "
            f"{float(low[wrong][0]):.6g}; those of log-probabilities are teacher_form='log_probs'"
        )
    if top is not None:
        wrong = ~((sums > 0) & (sums < torch.inf))
        if bool(wrong.any()):
            raise ValueError(
                f"{name} must hold a finite weight above 0 in every row for teacher_form={form!r}, got a largest of "
                f"{float(sums[wrong][0]):.6g}"
            )
        return
    # A sum of roundings, of which small ones are to the spacing of subnormal numbers; 1e-5 for what fp32 computed.
    allowed = max(2 * finfo.eps + columns * finfo.tiny * finfo.eps, 1e-5)
    off = (sums - 1).abs()
    worst = int(off.argmax())
    if off[worst] > allowed:
        raise ValueError(
            f"{name} must hold probabilities that add up to 1 in every row for teacher_form='probs', got a sum of "
            f"{float(sums[worst]):.6g}; teacher_form='unnormalized_probs' divides every row by its sum"
        )


def sparse_teacher(ids: Any, logprobs: Any, student: Tensor, columns: int, tail: str) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the student's leading shape with K slots, returned as contiguous ``[N, K]``."""
    for name, value in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        plain(name, value)
        if value.device != student.device:
            raise ValueError(f"{name} must be on the student's device {student.device}, got {value.device}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher_ids must be int32 or int64, got {_dtype(ids)}")
    if logprobs.dtype not in FLOATING:
        raise TypeError(f"teacher_logprobs must be float32, bfloat16, float16 or float64, got {_dtype(logprobs)}")
    leading = tuple(student.shape[:-1])
    if ids.dim() != student.dim() or tuple(ids.shape[:-1]) != leading or ids.shape[-1] == 0:
        raise ValueError(f"teacher_ids must have shape {(*leading, 'K')} with K >= 1, got {tuple(ids.shape)}")
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"teacher_logprobs must have the shape of teacher_ids {tuple(ids.shape)}, got {tuple(logprobs.shape)}"
        )
    if logprobs.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_logprobs must not require grad: they get no gradient; detach them")
    return sparse_entries(ids, logprobs, columns, tail)


def sparse_entries(ids: Tensor, logprobs: Tensor, columns: int, tail: str) -> tuple[Tensor, Tensor]:
    """The results of ``sparse_teacher``, with the values checked alone."""
    k = ids.shape[-1]
    ids, logprobs = ids.reshape(-1, k).contiguous(), logprobs.detach().reshape(-1, k).contiguous()
    if reads_values(ids) and reads_values(logprobs) and ids.numel():
        _values_of_sparse_teacher(ids, logprobs, columns, highest_logprob(logprobs.dtype, tail))
    return ids, logprobs


def highest_logprob(dtype: torch.dtype, tail: str) -> float:
    """The largest log-probability that may be the rounding of one that is at most 0.

    A logit of up to 32 less a logsumexp of that size, in 16 bits, is off by up to 16 epsilons; wider dtypes get the
    allowance of ``tail_logprob``. The weights of sampled ids (tail "drop") may be above 1.
    """
    info = torch.finfo(dtype)
    return info.max if tail == "drop" else max(1e-3, 16 * info.eps)


def _values_of_sparse_teacher(ids: Tensor, logprobs: Tensor, columns: int, highest: float) -> None:
    sound = torch.ops.kdkernels.sparse_teacher_is_sound
    if cpu.why_not(ids.device.type) is None and sound(ids, logprobs, columns, highest):
        return
    # Unused slots may hold anything else.
    used = ~unused(ids, logprobs)
    low, high = (int(v) for v in torch.aminmax(torch.where(used, ids, 0)))
    if low < 0 or high >= columns:
        worst = low if low < 0 else high
        raise ValueError(f"teacher_ids must be in [0, {columns}) or -1 for an unused slot, got {worst}")
    logprobs = torch.where(used, logprobs, -torch.inf)
    if not (logprobs < torch.inf).all():
        raise ValueError("teacher_logprobs must not be NaN or +inf, where teacher_ids is not -1")
    if not (logprobs <= highest).all():
        raise ValueError(
            f"teacher_logprobs must be natural log-probabilities, at most 0, got {float(logprobs.amax()):.4g}: "
            "are they probabilities, or logits?"
        )


# What a cache has beside its extras: of entries, and of expectations.
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
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {_dtype(ids)}")
    if logprobs.dtype not in FLOATING:
        raise TypeError(f"logprobs must be float32, bfloat16, float16 or float64, got {_dtype(logprobs)}")
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
            raise TypeError(f"tail_logprob must be of floating point, got {_dtype(tail_logprob)}")
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
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_dtype(value)}")
        if name == "expectation" and (value.dim() != 2 or value.shape[1] != layout.hidden_size):
            raise ValueError(f"expectation must have shape (L, {layout.hidden_size}), got {tuple(value.shape)}")
        found[name] = value.detach().cpu() if name == "expectation" else _of_tokens(name, value, len(expectation))
        dtype = layout.dtype if name == "expectation" else torch.float32
        if not bool(found[name].to(dtype).isfinite().all()):
            raise ValueError(f"{name} must be finite in {_name(dtype)}, in which it is stored")
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
            raise ValueError(f"{name} must fit {_dtype(converted[name])}, got {_dtype(value)} values that do not")
    return converted


def _no_more_than_certain(name: str, logprobs: Tensor, where: str = "") -> None:
    """Log-probabilities, of which 0 may have been rounded up: a logit of 32 less a logsumexp of that size, say."""
    # NaN fails the comparison too.
    bad = ~(logprobs <= max(1e-3, 16 * torch.finfo(logprobs.dtype).eps))
    if bool(bad.any()):
        worst = logprobs[bad].reshape(-1)[0].item()
        raise ValueError(f"{name} must be log-probabilities, at most 0 and not NaN{where}, got {worst:g}")


def _of_tokens(name: str, value: Any, length: int) -> Tensor:
    """A tensor of one number per token, brought to the CPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) != (length,):
        raise ValueError(f"{name} must have one value per token, shape ({length},), got {tuple(value.shape)}")
    return value.detach().cpu()


def head(side: str, hidden: Any, weight: Any, bias: Any, autocast: bool, name: Optional[str] = None) -> None:
    """Hidden states ``(..., D)``, a head ``[V, D]`` and a bias ``[V]`` or None, of one device, and of one dtype."""
    names = (name or f"{side}hidden", f"{side}weight", f"{side}bias")
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        if value is None and name == names[2]:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if is_dtensor(value):
            cure = f"pass {name}.full_tensor()"
            if value.requires_grad:
                cure = (
                    "call the loss in the forward of the module that FSDP2 shards, where the head is gathered, or pass "
                    f'{name}.full_tensor(grad_placements=[Partial("avg")]) where each rank has rows of its own, '
                    f"{name}.full_tensor() where all have the same (docs/guide/hidden-states.md)"
                )
            raise TypeError(f"{name} must be a plain tensor, got a DTensor: {cure}")
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_dtype(value)}")
        if value.dtype == torch.float64 and value.device.type != "cpu":
            raise TypeError(f"{name} may be float64 on the CPU only, got a tensor on {value.device}")
        if value.device != hidden.device:
            raise ValueError(f"{name} must be on {names[0]}'s device {hidden.device}, got {value.device}")
        if value.dtype != hidden.dtype and not autocast:
            raise TypeError(f"{name} must have {names[0]}'s dtype {_dtype(hidden)}, got {_dtype(value)}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{names[0]} must have shape (..., D) with D >= 1, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{names[1]} must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def lone_head(side: str, weight: Any, bias: Any, teacher: Any) -> None:
    """A head without hidden states, on the device of the logits or hidden states ``teacher``."""
    alike = weight[:1] if isinstance(weight, Tensor) and weight.dim() == 2 else teacher
    head(side, alike, weight, bias, autocast=True)
    if isinstance(teacher, Tensor) and teacher.device != weight.device:
        raise ValueError(f"{side}weight must be on the teacher's device {teacher.device}, got {weight.device}")


def rows_of_head(weight: Tensor, columns: int, vocab_size: Optional[int]) -> None:
    """A student's head for a teacher of so many columns."""
    if vocab_size is None and weight.shape[0] != columns:
        raise ValueError(
            f"student_weight must have the teacher's {columns} rows, got {weight.shape[0]}; "
            "pass vocab_size=... when the two are padded to different widths"
        )
    if vocab_size is not None and vocab_size > weight.shape[0]:
        raise ValueError(f"vocab_size must be at most student_weight's {weight.shape[0]} rows, got {vocab_size}")


def logits_dtype(value: Any, product: Optional[torch.dtype] = None) -> None:
    """None, float32, or the 16-bit dtype of the products; which that is is known with the tensors."""
    if value is None:
        return
    if not isinstance(value, torch.dtype):
        raise TypeError(f"logits_dtype must be a torch.dtype or None, got {type(value).__name__}")
    if value not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits_dtype must be float32, bfloat16, float16 or None, got {_name(value)}")
    if product is None or value in (product, torch.float32 if product.itemsize == 2 else product):
        return
    wanted = f"float32, {_name(product)}" if product.itemsize == 2 else _name(product)
    raise ValueError(
        f"logits_dtype must be {wanted} or None where the products are of {_name(product)}, got {_name(value)}"
    )


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
        # That is the first thing to be told, and is told with the tensors.
        return found, bias
    _no_adapters(name, weight)
    _no_hooks(name, weight)
    quantised = (
        f"{name} must be a module with a weight of floating point, got {kind}, {{}}: pass the dequantised weight, such "
        "as weight.dequantize(), and the bias apart"
    )
    if not isinstance(found, Tensor):
        raise TypeError(quantised.format(f"whose weight is {type(found).__name__}"))
    if not found.is_floating_point():
        raise TypeError(quantised.format(f"whose weight is {_dtype(found)}"))
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


# Names that adapters are known by: LoRA and its kin in peft, and those that wrap a layer.
_ADAPTER_NAMES = ("base_layer", "modules_to_save", "original_module", "trainable_tokens_delta")


def _no_adapters(name: str, module: torch.nn.Module) -> None:
    children = [child for child, _ in module.named_children() if child != "parametrizations"]
    adapters = [child for child in children if child in _ADAPTER_NAMES or "lora_" in child or "adapter" in child]
    adapters += [own for own in vars(module) if own.startswith("lora_") or own in _ADAPTER_NAMES]
    adapters += [own for own in module._parameters if own.startswith("lora_")]
    if adapters:
        listed = ", ".join(dict.fromkeys(adapters))
        raise TypeError(
            f"{name} must be a head whose weight is all of it, got {type(module).__name__} with an adapter ({listed}), "
            "which would neither count nor learn. Merge it: pass the tensor base.weight + scaling * lora_B.weight @ "
            "lora_A.weight, through which the factors get their gradient, or call merge_and_unload() where they are "
            "frozen. Of a module trained in full (modules_to_save) pass modules_to_save['default'] itself"
        )
    if children:
        raise TypeError(
            f"{name} must be a single layer, got {type(module).__name__} with the modules {', '.join(children)}: pass "
            "the one that multiplies"
        )


def _no_hooks(name: str, module: torch.nn.Module) -> None:
    for kind in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks"):
        if getattr(module, f"_{kind}"):
            raise TypeError(
                f"{name} must be a module without hooks, got {type(module).__name__} with {kind}, which would not run: "
                "the module's forward is never called. Pass its weight and bias as tensors if that is right"
            )


def teacher_head(hidden: Tensor, weight: Tensor, student: Tensor, vocab_size: Any) -> None:
    """A teacher's, for a student whose logits are of the shape of ``student``."""
    if hidden.device != student.device:
        raise ValueError(f"teacher_hidden must be on the student's device {student.device}, got {hidden.device}")
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


def expectation_alone(options: Any, *others: Any) -> None:
    """``teacher_expectation`` stands alone, with options that a linear function of the log-probabilities bears."""
    name = "teacher_expectation"
    if any(item is not None for item in others):
        raise ValueError(
            f"{name} takes the place of teacher_hidden, teacher_weight, teacher_bias and teacher_logits: give one"
        )
    if options.resolved.entropy_weight is None:
        raise ValueError(
            f"divergence must be 'forward_kl' or 'soft_ce' with {name}, got {options.resolved.name!r}: others need all "
            "of the teacher's probabilities"
        )
    reasons = {
        "standardize": "no product of the head with the teacher's probabilities is left then",
        "student_softcap": "no product of the head with the teacher's probabilities is left then",
        "teacher_softcap": "that is an option of capture_expectation",
        "teacher_weights": "average the probabilities of several teachers before they are captured",
        "return_stats": "they need all of the teacher's probabilities",
    }
    for option, reason in reasons.items():
        if (value := getattr(options, option)) is not None and value is not False:
            raise ValueError(f"{option} does not go with {name}, got {value!r}: {reason}")
    if options.teacher_form != "logits":
        raise ValueError(f"teacher_form must be 'logits' with {name}, got {options.teacher_form!r}")
    if options.logits_dtype is not None and options.logits_dtype.itemsize == 2:
        raise ValueError(
            f"logits_dtype must be float32 or None with {name}, got {_name(options.logits_dtype)}: the gradient is the "
            "difference of two products as large as the head"
        )


def frozen_head(weight: Tensor, bias: Optional[Tensor]) -> None:
    """A student's head that gets no gradient, with a bias that no product makes NaN."""
    for name, value in (("student_weight", weight), ("student_bias", bias)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad with teacher_expectation: its gradient needs all of the teacher's "
                "probabilities, and the expectation is of the head as it was; freeze it with requires_grad_(False), or "
                "pass it detached"
            )
    finite_bias("student_bias", bias)


def finite_bias(name: str, bias: Optional[Tensor]) -> None:
    """A bias of which an expectation can be taken."""
    if bias is not None and reads_values(bias) and not bool(bias.isfinite().all()):
        raise ValueError(
            f"{name} must be finite where expectations are taken; leave columns without a token out with vocab_size=..."
        )


def expectation(value: Any, temperature: Any, hidden: Tensor, student: Tensor, bias: Optional[Tensor]) -> None:
    """A teacher's expectations suit the student's hidden states, its head's ``bias`` and the teacher's temperature."""
    name = "teacher_expectation"
    # Any NamedTuple of these names: pickles and collators make others.
    if not all(hasattr(value, field) for field in ("expectation", "entropy", "bias", "temperature")):
        raise TypeError(f"{name} must be a TeacherExpectation, got {type(value).__name__}")
    rows = hidden.shape[:-1]
    for field, shape in (("expectation", hidden.shape), ("entropy", rows), ("bias", rows)):
        item = getattr(value, field)
        if item is None and field == "bias":
            continue
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}.{field} must be a torch.Tensor, got {type(item).__name__}")
        plain(f"{name}.{field}", item)
        if item.dtype not in FLOATING:
            raise TypeError(f"{name}.{field} must be float32, bfloat16, float16 or float64, got {_dtype(item)}")
        if item.device != hidden.device:
            raise ValueError(f"{name}.{field} must be on student_hidden's device {hidden.device}, got {item.device}")
        if item.shape != shape:
            raise ValueError(f"{name}.{field} must have shape {tuple(shape)}, got {tuple(item.shape)}")
    if (value.bias is None) != (bias is None):
        has, had = ("no", "a") if bias is None else ("a", "no")
        raise ValueError(f"{name} was captured with {had} bias of the student's head, and the head has {has} bias")
    captured = value.temperature
    if isinstance(captured, Tensor) != isinstance(temperature, Tensor):
        kinds = ("one per row", "a number") if isinstance(captured, Tensor) else ("a number", "one per row")
        raise ValueError(f"teacher_temperature must be {name}'s, which is {kinds[0]}, got {kinds[1]}")
    same = captured is temperature
    if isinstance(captured, Tensor):
        known, asked = (per_row("temperature", item, student) for item in (captured, temperature))
        assert isinstance(known, Tensor) and isinstance(asked, Tensor)
        same = same or not (reads_values(captured) and reads_values(temperature)) or torch.equal(known, asked)
        if not same:
            raise ValueError(f"teacher_temperature must be the one per row that {name} was captured at, got others")
    elif not same and captured != temperature:
        raise ValueError(
            f"teacher_temperature must be {captured}, at which {name} was captured, got {symbols.shown(temperature)}; "
            "it is temperature where it is not given"
        )


def attention_operands(names: Sequence[str], operands: Sequence[Any]) -> None:
    """Queries and keys ``(B, H, n, d)`` of student and teacher, in the order of the names."""
    for name, value in zip(names, operands, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        plain(name, value)
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_dtype(value)}")
        if value.dim() != 4 or 0 in value.shape[1:]:
            raise ValueError(f"{name} must have shape (B, H, n, d), none of them 0 but B, got {tuple(value.shape)}")
        if value.device != operands[0].device:
            raise ValueError(f"{name} must be on {names[0]}'s device {operands[0].device}, got {value.device}")
    query = operands[0]
    for k in (0, 2):
        a, b = operands[k], operands[k + 1]
        if (a.shape[0], a.shape[1], a.shape[2]) != query.shape[:3]:
            raise ValueError(
                f"{names[k]} must have {names[0]}'s B, H and n {tuple(query.shape[:3])}, got {tuple(a.shape[:3])}"
            )
        if b.dtype != a.dtype:
            raise TypeError(f"{names[k + 1]} must have {names[k]}'s dtype {_dtype(a)}, got {_dtype(b)}")
        if (b.shape[0], b.shape[2], b.shape[3]) != (a.shape[0], a.shape[2], a.shape[3]):
            expected = (a.shape[0], "H'", *a.shape[2:])
            raise ValueError(f"{names[k + 1]} must have shape {expected}, got {tuple(b.shape)}")
        if a.shape[1] % b.shape[1]:
            raise ValueError(
                f"{names[k + 1]} must have a number of heads that divides {names[k]}'s {a.shape[1]}, got {b.shape[1]}"
            )
    if (query.dtype == torch.float64) != (operands[2].dtype == torch.float64):
        raise TypeError(f"{names[2]} must be float64 where {names[0]} is, and only there, got {_dtype(operands[2])}")


def attention_mask(mask: Any, query: Tensor) -> None:
    """One bool for each token of each sequence."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for tokens that count, got {_dtype(mask)}")
    expected = (query.shape[0], query.shape[2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
    if mask.device != query.device:
        raise ValueError(f"mask must be on the student's device {query.device}, got {mask.device}")


def sample_mask(mask: Any, logits: Tensor) -> None:
    """One bool for each row."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for rows that count, got {_dtype(mask)}")
    if mask.shape != logits.shape[:-1]:
        raise ValueError(f"mask must have shape {tuple(logits.shape[:-1])}, got {tuple(mask.shape)}")
    if mask.device != logits.device:
        raise ValueError(f"mask must be on the device of the rows, {logits.device}, got {mask.device}")


def features(student: Any, teacher: Any) -> None:
    """Hidden states ``(..., D)`` of one shape and device."""
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        plain(name, value)
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_dtype(value)}")
        if value.dim() == 0 or value.shape[-1] == 0:
            raise ValueError(f"{name} must have shape (..., D) with D >= 1, got {tuple(value.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}; project the "
            "student to the teacher's width where they differ"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher must be on the student's device {student.device}, got {teacher.device}")


def relation_vectors(name: str, value: Any, heads: int) -> None:
    """Vectors ``(B, n, d)`` that split into heads."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != 3 or 0 in value.shape[1:]:
        raise ValueError(f"{name} must have shape (B, n, d), none of them 0 but B, got {tuple(value.shape)}")
    if value.shape[-1] % heads:
        raise ValueError(f"heads must divide the width of {name}, {value.shape[-1]}, got {heads}")


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


def tail_like(value: Any, tail: str, student: Tensor) -> Optional[Tensor]:
    """The log of the teacher's mass outside its entries, one per row, in the dtype of the sums."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"tail_logprob must be a torch.Tensor, got {type(value).__name__}")
    plain("tail_logprob", value)
    if tail not in ("bucket", "uniform"):
        raise ValueError(f"tail_logprob has no meaning with tail {tail!r}, only with 'bucket' and 'uniform'")
    if value.dtype not in FLOATING:
        raise TypeError(f"tail_logprob must be float32, bfloat16, float16 or float64, got {_dtype(value)}")
    if value.device != student.device:
        raise ValueError(f"tail_logprob must be on the student's device {student.device}, got {value.device}")
    if value.shape != student.shape[:-1]:
        raise ValueError(f"tail_logprob must have shape {tuple(student.shape[:-1])}, got {tuple(value.shape)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError("tail_logprob must not require grad: it gets no gradient; detach it")
    # A mass of 1 may come out of a sum a few roundings above it.
    if reads_values(value) and value.numel() and not float(value.amax()) <= 1e-3:
        raise ValueError("tail_logprob must hold log-probabilities, at most 0 and not NaN")
    return value.detach().to(sum_dtype(student)).reshape(-1)


def token_numbers(name: str, value: Any, like: Optional[Tensor] = None, *, expand: bool = False) -> None:
    """A floating tensor with one number per token, of any shape or that of ``like``; 1 expands where it may."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    plain(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_dtype(value)}")
    if like is None:
        return
    _of_token_shape(name, value, like, expand)


def token_mask(value: Any, like: Tensor) -> Optional[Tensor]:
    """A mask of the tokens, which is True where one counts, as bool and of the shape of ``like``."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(value).__name__}")
    plain("mask", value)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(f"mask must be bool or of integers, got {_dtype(value)}: weights multiply the losses instead")
    _of_token_shape("mask", value, like, True)
    return value.bool().expand_as(like)


def _of_token_shape(name: str, value: Tensor, like: Tensor, expand: bool) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on the tokens' device {like.device}, got {value.device}")
    same = value.dim() == like.dim()
    for size, wanted in zip(value.shape, like.shape, strict=False):
        same = same and (size == wanted or (expand and size == 1))
    if not same:
        some = ", or 1 in some dimensions" if expand else ""
        raise ValueError(f"{name} must have the tokens' shape {tuple(like.shape)}{some}, got {tuple(value.shape)}")


def vocabulary(vocab_size: Optional[int], student: Tensor, of: str = "student") -> int:
    """The number of real columns."""
    width = student.shape[-1]
    if vocab_size is None:
        return width
    integer("vocab_size", vocab_size, low=1)
    if vocab_size > width:
        raise ValueError(f"vocab_size must be at most {of}'s width {width}, got {vocab_size}")
    return vocab_size


def labels_like(value: Any, student: Tensor, columns: int, ignore_index: int) -> Optional[Tensor]:
    """Integer labels of the student's leading shape, each ``ignore_index`` or in ``[0, columns)``."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(value).__name__}")
    plain("labels", value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {_dtype(value)}")
    if value.device != student.device:
        raise ValueError(f"labels must be on the student's device {student.device}, got {value.device}")
    if value.shape != student.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(student.shape[:-1])}, got {tuple(value.shape)}")
    flat = value.reshape(-1).to(torch.int64).contiguous()
    if reads_values(value) and value.numel():
        _values_of_labels(flat, columns, ignore_index)
    return flat


def labels_of(options: Any, value: Any, student: Tensor, columns: int) -> Optional[Tensor]:
    """As ``labels_like``, of an objective that may need them."""
    flat = labels_like(value, student, columns, options.ignore_index)
    # This way round a graph with labels serves a weight of 0 too.
    if flat is None and options.ce_weight:
        raise ValueError("labels are required when ce_weight is not 0")
    return flat


def _values_of_labels(labels: Tensor, columns: int, ignore_index: int) -> None:
    if cpu.why_not(labels.device.type) is None and torch.ops.kdkernels.labels_are_sound(labels, columns, ignore_index):
        return
    counted = torch.where(labels == ignore_index, torch.zeros_like(labels), labels)
    low, high = (int(v) for v in torch.aminmax(counted))
    if low < 0 or high >= columns:
        worst = low if low < 0 else high
        raise ValueError(f"labels must be in [0, {columns}) or equal to ignore_index {ignore_index}, got {worst}")


def token_ids(value: Any, logits: Tensor, columns: int, ignore_index: int) -> Tensor:
    """Integer ids of the logits' leading shape, or of that and K slots: int64 ``[N, K]``, contiguous.

    Each is in ``[0, columns)``, or -1 or ``ignore_index`` for no token.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"ids must be a torch.Tensor, got {type(value).__name__}")
    plain("ids", value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {_dtype(value)}")
    if value.device != logits.device:
        raise ValueError(f"ids must be on the logits' device {logits.device}, got {value.device}")
    leading = tuple(logits.shape[:-1])
    several = value.dim() == logits.dim()
    if not (value.shape == leading or (several and value.shape[:-1] == leading and value.shape[-1] > 0)):
        raise ValueError(f"ids must have shape {leading} or {(*leading, 'K')} with K >= 1, got {tuple(value.shape)}")
    flat = value.reshape(-1, value.shape[-1] if several else 1).to(torch.int64).contiguous()
    if reads_values(value) and value.numel():
        _values_of_tokens(flat, columns, ignore_index)
    return flat


def _values_of_tokens(ids: Tensor, columns: int, ignore_index: int) -> None:
    sound = torch.ops.kdkernels.labels_are_sound
    if cpu.why_not(ids.device.type) is None and sound(ids.view(-1), columns, ignore_index):
        return
    low, high = (int(v) for v in torch.aminmax(torch.where((ids == ignore_index) | (ids == -1), 0, ids)))
    if low < 0 or high >= columns:
        worst = low if low < 0 else high
        raise ValueError(f"ids must be in [0, {columns}), or -1 or ignore_index {ignore_index} for none, got {worst}")


def per_row(
    name: str,
    value: Any,
    student: Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive: bool = True,
) -> Union[float, Tensor]:
    """A Python number, or a tensor of one value per row (or one value), returned as a float or as ``[N]``."""
    positive = exclusive and low == 0.0 and high == math.inf
    if not isinstance(value, Tensor):
        value = number(name, value, low=low, high=high, exclusive_low=exclusive and low > -math.inf)
        in_sums(name, value, positive=positive)
        return value
    plain(name, value)
    if not value.dtype.is_floating_point and value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be a number or a tensor of numbers, got {_dtype(value)}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: it gets no gradient; detach it")
    if value.device != student.device and value.dim() > 0:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {value.device}")
    rows = student.shape[:-1]
    if value.numel() != 1 and value.shape != rows:
        raise ValueError(
            f"{name} must be a number or have one value per row, shape {tuple(rows)}, got {tuple(value.shape)}"
        )
    flat = value.detach().to(device=student.device, dtype=sum_dtype(student))
    if reads_values(value) and value.numel():
        # As the sums know them: numbers of fp64 may be 0 or infinite in fp32.
        known = flat.to(value.device)
        bad = ~torch.isfinite(known) | (known < low) | (known > high)
        if exclusive:
            bad |= (known == low) | (known == high)
        if positive:
            bad |= known < torch.finfo(flat.dtype).smallest_normal
        if bool(bad.any()):
            worst = value[bad].reshape(-1)[0].item()
            expected = f"> {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            sums = "" if not math.isfinite(worst) or value.dtype == flat.dtype else f" in {_name(flat.dtype)}"
            raise ValueError(
                f"{name} must be finite{'' if low == -math.inf else f' and {expected}'}{sums}, got {worst}"
            )
    num_rows = student.numel() // student.shape[-1]
    return flat.reshape(()).expand(num_rows) if value.numel() == 1 and num_rows != 1 else flat.reshape(-1)


def normalizer_like(value: Any, reduction: str, student: Optional[Tensor] = None) -> Any:
    """A positive number or a tensor of one, for the reductions that it can stand in for."""
    if value is None:
        return None
    if reduction not in ("sum", "mean"):
        raise ValueError(f"normalizer needs reduction 'sum' or 'mean', got {reduction!r}")
    if not isinstance(value, Tensor):
        value = number("normalizer", value, low=0.0, exclusive_low=True)
        in_sums("normalizer", value, positive=True)
        return value
    if student is None and is_dtensor(value):
        # The loss of all ranks sees to it.
        return value
    plain("normalizer", value)
    if value.numel() != 1:
        raise ValueError(f"normalizer must be a number or a tensor of one element, got shape {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError("normalizer must not require grad: it gets no gradient; detach it")
    if reads_values(value):
        if not 0.0 < float(value) < math.inf:
            raise ValueError(f"normalizer must be finite and > 0, got {float(value)}")
        in_sums("normalizer", float(value), positive=True)
    return value.detach().to(value.device if student is None else student.device)


def inplace_allowed(student: Tensor, option: str = "inplace", name: str = "student") -> None:
    """``inplace`` is for eager mode, for a student that gets a gradient, and for rows that are views of their own."""
    if torch.compiler.is_compiling():
        raise ValueError(f"{option}=True works in eager mode only; under torch.compile leave it out")
    if torch.is_grad_enabled() and not student.requires_grad:
        raise ValueError(f"{option}=True needs a {name} that requires grad: there is no gradient to write otherwise")
    if student.dim() > 3 and not student.is_contiguous():
        raise ValueError(
            f"{option} needs a contiguous {name} or at most 3 dimensions, got strides {tuple(student.stride())}"
        )
    extent = 1
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1 and stride < extent and student.numel() > 0:
            raise ValueError(
                f"{option} needs a {name} whose rows share no memory, for they are overwritten one by one; got shape "
                f"{tuple(student.shape)} with strides {tuple(student.stride())}: pass {name}.contiguous()"
            )
        extent += (size - 1) * stride


def apart_in_place(options: Any, student: Tensor, others: Mapping[str, Any], teachers: Sequence[Tensor] = ()) -> None:
    """Where the gradient is written over the student's rows, no other tensor of the call has memory of these.

    A teacher's row may be the student's own row of that number: it is read before it is written.
    """
    if not getattr(options, "inplace", False) or not torch.is_grad_enabled():
        return
    named = {"teacher" if len(teachers) == 1 else f"teacher[{k}]": item for k, item in enumerate(teachers)}
    tensors = {**named, **others, **{name: getattr(options, name) for name in options.defaults}}
    tensors = {name: item for name, item in tensors.items() if isinstance(item, Tensor)}
    if not all(_has_memory(item) for item in (student, *tensors.values())):
        return
    first, last = _bytes_of(student)
    for name, item in tensors.items():
        start, end = _bytes_of(item)
        if (
            end <= first
            or last <= start
            or (name in named and _same_rows(item, student))
            or _interleaved(item, student)
        ):
            continue
        raise ValueError(
            f"inplace=True overwrites the student's rows one by one, and {name} may share memory with other rows of "
            f"it: {name} of shape {tuple(item.shape)} and strides {tuple(item.stride())} has bytes {start} to {end}, "
            f"the student of shape {tuple(student.shape)} and strides {tuple(student.stride())} has {first} to {last}; "
            f"pass {name}.clone()"
        )


def _has_memory(tensor: Tensor) -> bool:
    return symbols.has_values(tensor) and not (transforms.active() and transforms.stands_for_others(tensor))


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor to past the last one."""
    start = tensor.data_ptr()
    return start, start + _extent(tensor) * tensor.element_size()


def _extent(tensor: Tensor, below: float = math.inf) -> int:
    """The elements from the first to past the last one, of the dimensions whose stride is ``below`` a number."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum(
        (size - 1) * stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride < below
    )


def _same_rows(teacher: Tensor, student: Tensor) -> bool:
    """True if every row of the teacher begins where the student's row of that number does."""
    leading = zip(teacher.shape[:-1], teacher.stride()[:-1], student.stride()[:-1], strict=True)
    return (
        teacher.data_ptr() == student.data_ptr()
        and teacher.dtype == student.dtype
        and all(mine == other for size, mine, other in leading if size > 1)
    )


def _interleaved(other: Tensor, student: Tensor) -> bool:
    """True if both repeat after a common number of bytes, and lie in different parts of it."""
    size, other_size = student.element_size(), other.element_size()
    strides = {n * size for length, n in zip(student.shape, student.stride(), strict=True) if length > 1 and n > 1}
    others = {n * other_size for length, n in zip(other.shape, other.stride(), strict=True) if length > 1 and n > 1}
    for period in strides & others:
        if any(n > period and n % period for n in strides | others):
            continue
        ahead = (other.data_ptr() - student.data_ptr()) % period
        width = _extent(student, period / size) * size
        if ahead >= width and ahead + _extent(other, period / other_size) * other_size <= period:
            return True
    return False


def reverse_mode_only(backend: str, *tensors: Optional[Tensor]) -> None:
    """The kernels give a gradient in reverse mode: no tangents, and no tensors that stand for others."""
    if backend == "torch" or torch.compiler.is_compiling() or not transforms.active():
        return
    for tensor in tensors:
        if tensor is not None and transforms.takes_part(tensor):
            raise RuntimeError(
                f"backend {backend!r} has a gradient in reverse mode only, outside torch.func (grad, vmap, jvp, ...) "
                'and forward-mode differentiation; there, backend="torch" works'
            )


def reduction_name(reduction: Any, student: Optional[Tensor] = None) -> None:
    """One of the four reductions; "batchmean" needs a batch dimension."""
    choice("reduction", reduction, get_args(Reduction))
    if reduction == "batchmean" and student is not None:
        batch_dimension(student)


def batch_dimension(student: Tensor) -> None:
    """Logits that "batchmean" can divide by the first dimension of."""
    if student.dim() < 2:
        raise ValueError(f"reduction 'batchmean' needs a batch dimension, got student of shape {tuple(student.shape)}")


def sum_dtype(student: Tensor) -> torch.dtype:
    """The dtype of sums, losses and per-row numbers: fp64 for fp64, else fp32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def reads_values(value: Tensor) -> bool:
    """True if the values of a tensor may be read for a check."""
    if torch.compiler.is_compiling() or not symbols.has_values(value):
        return False
    if transforms.active() and transforms.stands_for_others(value):
        return False
    return value.device.type == "cpu" or os.environ.get("KDKERNELS_DEBUG") == "1"


def _dtype(value: Tensor) -> str:
    return _name(value.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")
