"""torch.library schemas and fakes of every op, and nothing else.

One op per access pattern and backend, ``kdkernels::<pattern>_<backend>``; all backends of a pattern share one schema.
Beside them stand those of the CPU that make a whole loss in one call.
The CPU and CUDA implementations are registered by the compiled libraries ``_C`` and ``_C_cuda`` when they are loaded,
the Triton ones by ``kdkernels.backends.triton``.

Tensors of logits are ``[B, L, V]`` views (rows ``i = b * L + l``), so that ``logits[:, :-1]`` needs no copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import symbols

NAMESPACE = "kdkernels"
PATTERN_BACKENDS = ("cpu", "cuda", "triton")
# Columns of the second result of dense_fwd, at the tempered p and q; the parts of the objective are unweighted.
STATS = (
    "divergence",
    "ce",
    "lse",
    "forward_kl",
    "reverse_kl",
    "teacher_entropy",
    "student_entropy",
    "agreement",
    "acceptance",
)
# Columns of the second result of topk_fwd.
TOPK_STATS = ("divergence", "ce", "lse", "teacher_mass", "student_mass", "overlap")

SCHEMAS = {
    # Writes the gradient of sum_i loss_i to dstudent, which may be the student itself, and returns (loss [N], stats
    # [N, S]).
    "dense_fwd": (
        "(Tensor student, Tensor[] teachers, Tensor(a!)? dstudent, Tensor? labels, Tensor? row_weight, "
        "Tensor? student_temperature_rows, Tensor? teacher_temperature_rows, Tensor? param_rows, "
        "Tensor? mixture_weights, *, "
        "str divergence, float param0, float param1, str mixture, int vocab_size, int ignore_index, float scale, "
        "float temperature, float teacher_temperature, float kd_weight, float ce_weight, float z_loss_weight, "
        "float label_smoothing, bool scale_by_t_squared, str teacher_form, float student_softcap, "
        "float teacher_softcap, bool standardize, bool stats) -> (Tensor, Tensor)"
    ),
    # A teacher of ids [N, K] and log-probabilities [N, K]; a slot of id -1, or of -9000 or less, is unused. tail_rows
    # [N] is the log of its mass outside them, where that is known better than by 1 - sum; that mass counts as at least
    # min_tail + tail_rounding * sum p |log p|. Otherwise as dense_fwd.
    "topk_fwd": (
        "(Tensor student, Tensor teacher_ids, Tensor teacher_logprobs, Tensor(a!)? dstudent, Tensor? labels, "
        "Tensor? row_weight, Tensor? student_temperature_rows, Tensor? teacher_temperature_rows, Tensor? param_rows, "
        "Tensor? tail_rows, *, str tail, float min_tail, float tail_rounding, str divergence, float param0, "
        "float param1, int vocab_size, int ignore_index, float scale, float temperature, float teacher_temperature, "
        "float kd_weight, float ce_weight, float z_loss_weight, float label_smoothing, bool scale_by_t_squared, "
        "float student_softcap, bool stats) -> (Tensor, Tensor)"
    ),
    # The k largest of each row of logits: ids int32 [N, K], log-probabilities [N, K], and the log of the mass outside
    # them [N].
    "capture_topk": (
        "(Tensor teacher, Tensor? temperature_rows, *, int k, int vocab_size, float temperature) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "dkd_fwd": (
        "(Tensor student, Tensor teacher, Tensor(a!)? dstudent, Tensor labels, Tensor? row_weight, *, "
        "float alpha, float beta, float temperature, float teacher_temperature, int vocab_size, int ignore_index, "
        "float scale, bool scale_by_t_squared) -> Tensor"
    ),
    "mse_fwd": (
        "(Tensor student, Tensor teacher, Tensor(a!)? dstudent, Tensor? labels, Tensor? row_weight, *, bool centered, "
        "int vocab_size, int ignore_index, float scale) -> Tensor"
    ),
    # Multiplies the rows of grad [B, L, V] by grad_output (0-d, or [N]) in place; returns at once where it is 1.
    "scale_grad": "(Tensor(a!) grad, Tensor grad_output) -> ()",
}

# The whole loss of the compiled CPU backend, its rows summed: what a training loop calls again and again, with no
# tensor per row but labels and a sparse teacher's tail. ``call`` is what <pattern>_call_cpu returns for the numbers and
# names that all rows share. Logits are [B, L, V] or [N, V]. Returns the loss (0-d), and the gradient of the student's
# logits where needs_grad asks for it and there is no dstudent to write it to; else that is empty.
_ALIKE = (
    "str divergence, float param0, float param1, int vocab_size, int ignore_index, float temperature, "
    "float teacher_temperature, float kd_weight, float ce_weight, float z_loss_weight, float label_smoothing, "
    "bool scale_by_t_squared, float student_softcap"
)
_SUMMED = "Tensor student, Tensor(a!)? dstudent, Tensor call, float scale, bool needs_grad"
SUMMED_SCHEMAS = {
    "dense_call": f"(Tensor student, *, {_ALIKE}, str teacher_form, float teacher_softcap, bool standardize) -> Tensor",
    "topk_call": f"(Tensor student, *, {_ALIKE}, str tail, float min_tail, float tail_rounding) -> Tensor",
    "dense_loss": f"({_SUMMED}, Tensor teacher, Tensor? labels) -> (Tensor, Tensor)",
    "topk_loss": (
        f"({_SUMMED}, Tensor teacher_ids, Tensor teacher_logprobs, Tensor? labels, Tensor? tail_rows) "
        "-> (Tensor, Tensor)"
    ),
}

# The loop of a pattern over chunks of rows whose logits are products. Returns (loss [N], stats [N, S], dhidden,
# dweight, dbias); a gradient that needs (of hidden, weight and bias) does not ask for is empty.
LINEAR_TEACHERS = {
    "dense_fwd": "Tensor[] teacher_hidden, Tensor[] teacher_weight, Tensor?[] teacher_bias",
    "topk_fwd": "Tensor teacher_ids, Tensor teacher_logprobs",
}

# Patterns that a backend lacks, and why.
_NOT_IN_CUDA = {"cuda": "the CUDA extension has the sparse top-k losses only"}
LACKING = {
    "dense_fwd": _NOT_IN_CUDA,
    "dkd_fwd": _NOT_IN_CUDA,
    "mse_fwd": _NOT_IN_CUDA,
    "capture_topk": {"triton": "capture_topk has no Triton kernel"},
}

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("cpu_fault() -> str")
_library.define("cpu_isa() -> str")
# The memory behind kdkernels.memory.
_library.define("kept_empty(int[] shape, ScalarType dtype, str use) -> Tensor")
_library.define("kept_blocks(str use) -> int[]")
_library.define("kept_release() -> ()")
_library.define("poison_memory(bool on) -> ()")  # what the library makes from here on is NaN: for tests
# The product of bf16 matrices with an fp32 result, which torch lacks on a CPU: out = a @ b, or += that. An fp32 ``a``
# is rounded to bf16. There is none on a processor without the instructions, or beside a torch without what it calls.
_library.define("has_bf16_product() -> bool")
_library.define("bf16_product(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
# Checks of values on the CPU. Labels int64 and contiguous; ids and log-probabilities contiguous and of one size.
_library.define("labels_are_sound(Tensor labels, int columns, int ignore_index) -> bool")
_library.define("sparse_teacher_is_sound(Tensor ids, Tensor logprobs, int columns, float highest) -> bool")


def _sums(student: Tensor, *shape: int) -> Tensor:
    return student.new_empty(shape, dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)


def _rows(student: Tensor, columns: Optional[int] = None) -> Tensor:
    num_rows = student.shape[0] * student.shape[1]
    return _sums(student, num_rows) if columns is None else _sums(student, num_rows, columns)


def _dense_fake(
    student: Tensor, teachers: Sequence[Tensor], *args: object, stats: bool, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return _rows(student), _rows(student, len(STATS) if stats else 0)


def _topk_fake(student: Tensor, *args: object, stats: bool, **kwargs: object) -> tuple[Tensor, Tensor]:
    return _rows(student), _rows(student, len(TOPK_STATS) if stats else 0)


def _rows_fake(student: Tensor, *args: object, **kwargs: object) -> Tensor:
    return _rows(student)


def _linear_fake(columns: Sequence[str]) -> Callable[..., Any]:
    def fake(
        hidden: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        *args: object,
        stats: bool,
        needs: Sequence[bool],
        **kwargs: object,
    ) -> tuple[Tensor, ...]:
        rows = hidden[None]
        grads = [
            torch.empty_like(item) if need and item is not None else hidden.new_empty(0)
            for item, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        if needs[0] and hidden.dtype == torch.float16:
            grads[0] = torch.empty_like(hidden, dtype=torch.float32)
        return _rows(rows), _rows(rows, len(columns) if stats else 0), *grads, _sums(hidden, 2)

    return fake


def _capture_fake(teacher: Tensor, *args: object, k: int, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = _rows(teacher, k)
    return torch.empty_like(logprobs, dtype=torch.int32), logprobs, _rows(teacher)


def _call_fake(student: Tensor, **alike: object) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return student.new_empty(size, dtype=torch.uint8)


def _summed_fake(
    student: Tensor, dstudent: Optional[Tensor], call: Tensor, scale: float, needs_grad: bool, *args: object
) -> tuple[Tensor, Tensor]:
    if needs_grad and dstudent is None:
        return _sums(student), torch.empty_like(student, memory_format=torch.contiguous_format)
    return _sums(student), _sums(student, 0)


def _none_fake(*args: object, **kwargs: object) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "dense_fwd": _dense_fake,
    "topk_fwd": _topk_fake,
    "capture_topk": _capture_fake,
    "dkd_fwd": _rows_fake,
    "mse_fwd": _rows_fake,
    "scale_grad": _none_fake,
    "dense_call": _call_fake,
    "topk_call": _call_fake,
    "dense_loss": _summed_fake,
    "topk_loss": _summed_fake,
}

# A tensor without values counts as sound. Ops that take no tensor work as ever beside fake tensors.
_OTHER_FAKES: dict[str, Callable[..., Any]] = {
    "kept_empty": lambda shape, dtype, use: torch.empty(shape, dtype=dtype, device="cpu"),
    "bf16_product": _none_fake,
    "labels_are_sound": lambda *args: True,
    "sparse_teacher_is_sound": lambda *args: True,
}
for _name, _fake in _OTHER_FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

for _backend in PATTERN_BACKENDS:
    for _pattern, _schema in {**SCHEMAS, **(SUMMED_SCHEMAS if _backend == "cpu" else {})}.items():
        if _backend in LACKING.get(_pattern, {}):
            continue
        _name = f"{_pattern}_{_backend}"
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKES[_pattern], lib=_library)

for _pattern, _teacher in LINEAR_TEACHERS.items():
    # The arguments behind the gradient are those of the pattern itself.
    _objective = SCHEMAS[_pattern].partition("dstudent, ")[2].partition(") -> ")[0]
    _library.define(
        f"linear_{_pattern}(Tensor hidden, Tensor weight, Tensor? bias, {_teacher}, {_objective}, str backend, "
        "int? chunk_bytes, ScalarType? product_dtype, ScalarType? logits_dtype, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(
        f"{NAMESPACE}::linear_{_pattern}", _linear_fake(STATS if _pattern == "dense_fwd" else TOPK_STATS), lib=_library
    )


# The patterns once more, for graphs in which one of their numbers is a symbol: all floats of an op are the elements of
# one tensor, in the order of its schema, and the backend is an argument.
_FLOAT = re.compile(r"float (\w+)(?:, )?")
_floats: dict[str, list[str]] = {}  # by pattern, with "linear_" before it for the loops


def _define_numbers(pattern: str, schema: str, fake: Callable[..., Any]) -> None:
    _floats[pattern] = _FLOAT.findall(schema)
    schema = _FLOAT.sub("", schema).replace(", )", ")")
    backend = "" if " str backend" in schema else "str backend, "
    schema = schema.replace(" *, ", f" Tensor numbers, *, {backend}")
    _library.define(f"{pattern}_numbers{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{pattern}_numbers", fake, lib=_library)

    def impl(*operands: Any, backend: str, **options: Any) -> Any:
        *tensors, numbers = operands
        options.update(zip(_floats[pattern], numbers.tolist(), strict=True))
        if pattern.startswith("linear_"):
            return linear_op(pattern)(*tensors, backend=backend, **options)
        return op(pattern, backend)(*tensors, **options)

    implement(f"{pattern}_numbers", impl)


def implement(name: str, function: Callable[..., Any]) -> None:
    """Enter an implementation in Python that calls other ops."""
    _library.impl(name, function, "CompositeExplicitAutograd")


def call(pattern: str, backend: str, operands: Sequence[Any], options: dict[str, Any]) -> Any:
    """Call ``<pattern>_<backend>``."""
    if torch.compiler.is_dynamo_compiling() and _has_symbols(pattern, options):
        return _call_with_numbers(pattern, operands, {**options, "backend": backend})
    return op(pattern, backend)(*operands, **options)


def call_linear(pattern: str, operands: Sequence[Any], options: dict[str, Any]) -> Any:
    """Call ``linear_<pattern>``; the backend is among the options."""
    pattern = f"linear_{pattern}"
    if torch.compiler.is_dynamo_compiling() and _has_symbols(pattern, options):
        return _call_with_numbers(pattern, operands, options)
    return linear_op(pattern)(*operands, **options)


def _has_symbols(pattern: str, options: dict[str, Any]) -> bool:
    return any(symbols.is_symbol(options[name]) for name in _floats[pattern])


def _call_with_numbers(pattern: str, operands: Sequence[Any], options: dict[str, Any]) -> Any:
    names = _floats[pattern]
    numbers = symbols.packed([options[name] for name in names])
    others = {name: value for name, value in options.items() if name not in names}
    return getattr(getattr(torch.ops, NAMESPACE), f"{pattern}_numbers").default(*operands, numbers, **others)


def linear_op(name: str) -> torch._ops.OpOverload:
    """The overload of a loop, ``linear_dense_fwd`` or ``linear_topk_fwd``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def op(pattern: str, backend: str) -> torch._ops.OpOverload:
    """The overload ``torch.ops.kdkernels.<pattern>_<backend>.default``."""
    # A graph that looked into the memory would be made again whenever another call adds to it; and torch 2.10 refuses
    # to write to it from within an autograd function.
    if torch.compiler.is_dynamo_compiling():
        return getattr(getattr(torch.ops, NAMESPACE), f"{pattern}_{backend}").default
    found = _overloads.get((pattern, backend))
    if found is None:
        found = getattr(getattr(torch.ops, NAMESPACE), f"{pattern}_{backend}").default
        _overloads[pattern, backend] = found
    return found


_overloads: dict[tuple[str, str], torch._ops.OpOverload] = {}

for _pattern, _schema in SCHEMAS.items():
    if _FLOAT.search(_schema):
        _define_numbers(_pattern, _schema, _FAKES[_pattern])
for _pattern in LINEAR_TEACHERS:
    _schema = str(linear_op(f"linear_{_pattern}")._schema).partition(f"linear_{_pattern}")[2]
    _define_numbers(f"linear_{_pattern}", _schema, _linear_fake(STATS if _pattern == "dense_fwd" else TOPK_STATS))
