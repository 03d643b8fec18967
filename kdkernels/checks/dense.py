"""Logits ``(..., V)``: a student's, and those of one or several teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import symbols, transforms
from kdkernels.checks.memory import inplace_allowed
from kdkernels.checks.rows import batch_dimension
from kdkernels.checks.tensors import FLOATING, dtype_name, no_tensor, plain, reads_values, sum_dtype
from kdkernels.checks.values import in_sums, integer, number

MAX_TEACHERS = 4
# Kernels of GPUs have no float64. ``kdkernels.testing.float64_anywhere`` widens this for the truth of a test.
FLOAT64_DEVICES: tuple[str, ...] = ("cpu",)


def logits(name: str, value: Any, *, least: int = 1, strided: bool = False) -> None:
    """A floating tensor ``(..., V)`` with V >= ``least`` and unit stride in the last dimension, unless it may be
    ``strided``; fp64 on the CPU only."""
    if not isinstance(value, Tensor):
        raise no_tensor(name, value)
    plain(name, value)
    dtype, shape = value.dtype, value.shape
    if dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype_name(dtype)}")
    if dtype == torch.float64 and value.device.type not in FLOAT64_DEVICES:
        raise TypeError(f"{name} may be float64 on the CPU only, got a tensor on {value.device}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if not shape or shape[-1] < least:
        raise ValueError(f"{name} must have shape (..., V) with V >= 1, got {tuple(shape)}")
    if not strided and shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 in the last dimension, got strides {tuple(value.stride())}")


def shard(name: str, value: Any) -> None:
    """The logits of this rank's columns, of which there may be none."""
    logits(name, value, least=0)


def teacher_shard(name: str, teacher: Any, student: Tensor) -> None:
    """The teacher's columns of this rank, which are the student's."""
    shard(name, teacher)
    if teacher.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {teacher.device}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name} must have the columns of the student on every rank, and its shape {tuple(student.shape)}, got "
            f"{tuple(teacher.shape)}"
        )


def student_of(options: Any, student: Any, *, strided: bool = False) -> int:
    """The student's logits suit options; the number of columns that count."""
    logits("student", student, strided=strided)
    if options.reduction == "batchmean":
        batch_dimension(student)
    if getattr(options, "inplace", False):
        inplace_allowed(student, two_dims=strided)
    return vocabulary(options.vocab_size, student)


def vocabulary(vocab_size: Optional[int], student: Tensor, of: str = "student") -> int:
    """The number of real columns."""
    width = student.shape[-1]
    if vocab_size is None:
        return width
    integer("vocab_size", vocab_size, low=1)
    if vocab_size > width:
        raise ValueError(f"vocab_size must be at most {of}'s width {width}, got {vocab_size}")
    return vocab_size


def teacher_like(
    name: str,
    teacher: Any,
    student: Tensor,
    vocab_size: Optional[int],
    *,
    strided: bool = False,
    mapped: bool = False,
    mappable: bool = False,
) -> None:
    """The teacher's leading shape and device are the student's; so is its width, unless ``vocab_size`` is given or its
    columns are ``mapped``, as those of a ``mappable`` loss may be."""
    logits(name, teacher, strided=strided)
    if teacher.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {teacher.device}")
    any_width = mapped or vocab_size is not None
    same = teacher.shape[:-1] == student.shape[:-1] if any_width else teacher.shape == student.shape
    if not same:
        hint = ""
        if teacher.shape[:-1] == student.shape[:-1]:
            hint = "; pass vocab_size=... when the two are padded to different widths"
            hint += ", teacher_columns=... when their columns differ" if mappable else ""
        raise ValueError(
            f"{name} must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}{hint}"
        )
    if vocab_size is not None and not mapped and vocab_size > teacher.shape[-1]:
        raise ValueError(f"vocab_size must be at most {name}'s width {teacher.shape[-1]}, got {vocab_size}")


def teacher_of_width(name: str, teacher: Any, student: Tensor, vocab_size: Optional[int]) -> int:
    """The teacher's leading shape and device are the student's, and its width its own; the columns that count."""
    logits(name, teacher)
    if teacher.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {teacher.device}")
    if teacher.shape[:-1] != student.shape[:-1]:
        leading = ", ".join([*map(str, student.shape[:-1]), "V"])
        raise ValueError(f"{name} must have shape ({leading}), the student's rows, got {tuple(teacher.shape)}")
    width = teacher.shape[-1]
    if vocab_size is None:
        return width
    if vocab_size > width:
        raise ValueError(f"teacher_vocab_size must be at most {name}'s width {width}, got {vocab_size}")
    return vocab_size


def why_not_counted(*tensors: Tensor) -> Optional[str]:
    """Why a GPU cannot count these logits by their bits, where it cannot."""
    wide = [tensor.dtype for tensor in tensors if tensor.dtype not in (torch.bfloat16, torch.float16)]
    return f"a GPU counts logits of 16 bits, and sorts others, got {dtype_name(wide[0])}" if wide else None


def teachers_of(
    options: Any, teacher: Any, student: Tensor, *, strided: bool = False, mapped: bool = False
) -> tuple[Tensor, ...]:
    """A teacher, or a sequence of some, beside the student."""
    known: dict[str, Any] = {"strided": strided, "mapped": mapped, "mappable": options.function == "kd_loss"}
    if not isinstance(teacher, (list, tuple)):
        teacher_like("teacher", teacher, student, options.vocab_size, **known)
        return (teacher,)
    several(teacher)
    for k, item in enumerate(teacher):
        name = "teacher" if len(teacher) == 1 else f"teacher[{k}]"
        teacher_like(name, item, student, options.vocab_size, **known)
    return tuple(teacher)


def without_teacher(options: Any, name: str = "teacher") -> None:
    """A loss in which no teacher, whose argument is called ``name``, has a say."""
    if options.scalars["kd_weight"] != 0:
        raise TypeError(f"{name} is required unless kd_weight is the number 0")
    for name in ("teacher_weights", "teacher_form", "teacher_lse"):
        if getattr(options, name) not in (None, "logits"):
            raise ValueError(f"{name} has no meaning without a teacher")


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
    # A sum of logits may have any weights.
    low = 0.0 if options.mixture == "probs" else -math.inf
    if not isinstance(weights, (Tensor, list, tuple)):
        raise TypeError(f"teacher_weights must be a tensor or a sequence of numbers, got {type(weights).__name__}")
    if not isinstance(weights, Tensor):
        numbers = [number("teacher_weights", w) for w in weights]
        for w in numbers:
            if w < low:
                got = symbols.shown(w)
                raise ValueError(f'teacher_weights must be >= 0, got {got}; those of mixture="logits" may be below 0')
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
    if reads_values(weights) and weights.numel() and not bool((torch.isfinite(weights) & (weights >= low)).all()):
        positive = "" if low else " and >= 0"
        hint = "" if low else '; those of mixture="logits" may be below 0'
        raise ValueError(f"teacher_weights must be finite{positive} in {dtype_name(dtype)}{hint}")
    if options.mixture == "probs":
        largest = weights.amax(-1, keepdim=True)
        if reads_values(weights) and not bool((largest > 0).all()):
            raise ValueError("teacher_weights must not all be 0")
        # Of the largest, so that their sum is one of this dtype.
        weights = weights / largest
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.expand(math.prod(student.shape[:-1]), count)


def mixture_of(options: Any) -> str:
    """The mixture as the ops know it: weights of logits that may be below 0 need a rule of their own for -inf."""
    weights = options.teacher_weights
    if options.mixture == "probs" or weights is None:
        return options.mixture
    known = not isinstance(weights, Tensor) and not any(symbols.is_symbol(w) for w in weights)
    return "logits" if known and min(weights) >= 0 else "signed"


def cap_of_teacher(options: Any) -> None:
    """A teacher's softcap beside the form of its numbers."""
    name, form = "teacher_softcap", f"teacher_form={options.teacher_form!r}"
    if options.teacher_softcap is not None and options.teacher_form in ("probs", "unnormalized_probs"):
        raise ValueError(f"{name} has no meaning with {form}: it acts on logits")


def part_of_teacher(options: Any) -> None:
    """``teacher_lse`` beside the options that it goes with, but for its values per row and the number of teachers."""
    lse = options.teacher_lse
    if lse is None:
        return
    if not isinstance(lse, Tensor):
        in_sums("teacher_lse", number("teacher_lse", lse))
    if not options.resolved.takes_part_of_teacher:
        raise ValueError(
            "teacher_lse needs a divergence that a teacher with less mass than 1 has: forward_kl, soft_ce, tvd, or "
            f"lk_loss; got {options.resolved.name!r}"
        )
    for name in ("standardize", "return_stats"):
        if getattr(options, name):
            raise ValueError(f"teacher_lse cannot be combined with {name}")
    if options.teacher_weights is not None:
        raise ValueError("teacher_lse needs one teacher, got teacher_weights")


def why_no_teacher_grad(options: Any, *, mixed: bool, mapped: bool = False) -> Optional[str]:
    """Why the kernels have no gradient for the teachers, if they have none."""
    if mixed:
        return "a mixture of teachers gets a gradient from plain PyTorch only; detach the teachers"
    if options.student_form == "log_probs":
        return "beside log-probabilities of a student a teacher gets a gradient from plain PyTorch only; detach it"
    if mapped:
        return "with teacher_columns a teacher gets a gradient from plain PyTorch only; detach it"
    if options.teacher_form in ("probs", "unnormalized_probs"):
        return "teacher probabilities get a gradient from plain PyTorch only; detach the teacher"
    if options.resolved.of_acceptance or options.teacher_lse is not None:
        what = "teacher_lse" if options.teacher_lse is not None else options.function
        return f"with {what} the teacher gets a gradient from plain PyTorch only; detach the teacher"
    if options.inplace:
        return "inplace cannot be combined with a teacher that requires grad; detach the teacher"
    return None


def teacher_gets_none(function: str, teacher: Tensor) -> None:
    """The teacher of a loss that has no gradient for one."""
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"teacher must not require grad in {function}: it gets no gradient; detach it")


def reverse_mode_only(backend: Optional[str], *tensors: Optional[Tensor]) -> None:
    """The kernels give a gradient in reverse mode: no tangents, and no tensors that stand for others.

    ``backend`` is None where the vocabulary is sharded: no backend has more there.
    """
    if backend == "torch" or torch.compiler.is_compiling() or not transforms.active():
        return
    for tensor in tensors:
        if tensor is not None and transforms.takes_part(tensor):
            if backend is None:
                raise RuntimeError(
                    "a loss of a sharded vocabulary has a gradient in reverse mode only, outside torch.func (grad, "
                    "vmap, jvp, ...) and forward-mode differentiation"
                )
            raise RuntimeError(
                f"backend {backend!r} has a gradient in reverse mode only, outside torch.func (grad, vmap, jvp, ...) "
                'and forward-mode differentiation; there, backend="torch" works'
            )


def one_gradient(*gradients: Tensor) -> None:
    """A backward over a sharded vocabulary takes no batch of gradients."""
    if any(map(transforms.stands_for_others, gradients)):
        raise RuntimeError(
            "a loss of hidden states over a sharded vocabulary takes one gradient at a time: leave out "
            "is_grads_batched=True"
        )


def probabilities(
    options: Any, teachers: Sequence[Tensor], columns: int, labels: Optional[Tensor], weight: Optional[Tensor]
) -> None:
    """The values of teachers that are probabilities, in the rows that count; ``labels`` and ``weight`` are ``[N]``."""
    form = options.teacher_form
    if form == "logits" or torch.compiler.is_compiling() or not options.scalars["kd_weight"]:
        return
    if form == "log_probs":
        for k, teacher in enumerate(teachers):
            no_probabilities("teacher" if len(teachers) == 1 else f"teacher[{k}]", teacher, columns)
        return
    counted = None if labels is None else labels != options.ignore_index
    if weight is not None:
        counted = weight != 0 if counted is None else counted & (weight != 0)
    if counted is not None and not reads_values(counted):
        return
    for k, teacher in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{k}]"
        teacher_probs(name, teacher, columns, counted, form)


def no_probabilities(name: str, value: Tensor, columns: int) -> None:
    """Log-probabilities that are not probabilities: those are known by the first row, which adds up to 1."""
    if not reads_values(value) or value.numel() == 0:
        return
    row = value.detach()[(0,) * (value.dim() - 1)][:columns]
    if float(row.amin()) >= 0 and abs(float(row.sum(dtype=sum_dtype(value))) - 1) < 1e-2:
        form = f"{name.partition('[')[0]}_form"
        raise ValueError(
            f"{name} must hold log-probabilities for {form}='log_probs', got probabilities: pass their logarithm"
        )


def shard_of_probabilities(options: Any, name: str, teacher: Tensor, labels: Optional[Tensor]) -> None:
    """As ``probabilities`` of some columns of a teacher, whose sums nobody knows here."""
    form = options.teacher_form
    if form in ("logits", "log_probs") or not reads_values(teacher) or teacher.numel() == 0:
        return
    low = teacher.detach().amin(-1).reshape(-1)
    low = low if labels is None else torch.where(labels != options.ignore_index, low, torch.ones_like(low))
    _none_negative(name, low, form)


def _none_negative(name: str, low: Tensor, form: str) -> None:
    # NaN fails the comparison too.
    wrong = ~(low >= 0)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must hold probabilities, none negative or NaN, for teacher_form={form!r}, got "
            f"{float(low[wrong][0]):.6g}; those of log-probabilities are teacher_form='log_probs'"
        )


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
    _none_negative(name, low, form)
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
