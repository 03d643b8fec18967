"""torch.library schemas and fakes of every op, and nothing else.

One op per access pattern and backend, ``kdkernels::<pattern>_<backend>``; all backends of a pattern share one schema.
Beside them stand those of the CPU that make a whole loss in one call.
The CPU and CUDA implementations are registered by the compiled libraries ``_C`` and ``_C_cuda`` when they are loaded,
the Triton ones by ``kdkernels.backends.triton``.

Tensors of logits are ``[B, L, V]`` views (rows ``i = b * L + l``), so that ``logits[:, :-1]`` needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import symbols
from kdkernels.choices import CODES
from kdkernels.stats import KDStats, TopKStats

NAMESPACE = "kdkernels"
PATTERN_BACKENDS = ("cpu", "cuda", "triton")
# The id of a token whose column another rank has, see token_bwd.
ELSEWHERE = -(2**62) - 1
# Of a row for shard_fwd; csrc/include/kdkernels/args.h has the same names.
SHARD_NUMBERS = (
    "student_unit",
    "student_top",
    "student_log_z",
    "teacher_unit",
    "teacher_top",
    "teacher_log_z",
    "of_score",
    "of_q",
    "of_p",
    "of_hard",
    "hard_log_z",
    "constant",
    "at_label",
)
# Columns of its sums; all behind the first two where the choice "stats" asks for them.
SHARD_SUMS = (
    "value",
    "score",
    "forward_kl",
    "reverse_kl",
    "teacher_entropy",
    "student_entropy",
    "acceptance",
)
# Columns of the second results of dense_fwd and topk_fwd.
STATS, TOPK_STATS = KDStats._fields, TopKStats._fields

# Beside its tensors an op takes numbers and choices, in the order of these names; csrc/include/kdkernels/options.h has
# the same names. A choice is an int, a bool, or the place of a name in kdkernels.choices.CODES.
_NUMBERS = (
    "scale",
    "param0",
    "param1",
    "temperature",
    "teacher_temperature",
    "kd_weight",
    "ce_weight",
    "z_loss_weight",
    "label_smoothing",
    "student_softcap",
)
NUMBERS = {
    "dense_fwd": (*_NUMBERS, "teacher_softcap"),
    "pixel_fwd": (*_NUMBERS, "teacher_softcap"),
    "topk_fwd": (*_NUMBERS, "min_tail", "tail_rounding"),
    "dkd_fwd": ("scale", "alpha", "beta", "temperature", "teacher_temperature"),
    "mse_fwd": ("scale",),
    "uld_fwd": ("scale", "temperature", "teacher_temperature"),
    "topp_count": ("p", "temperature"),
    "capture_topk": ("temperature",),
    "shard_fwd": ("param0", "param1", "student_softcap", "teacher_softcap"),
    "token_fwd": ("temperature", "softcap"),
    "token_bwd": ("temperature", "softcap"),
}
CHOICES = {
    "dense_fwd": ("ignore_index", "scale_by_t_squared", "teacher_form", "mixture", "standardize", "student_form"),
    "pixel_fwd": ("ignore_index", "scale_by_t_squared", "teacher_form", "student_form"),
    "topk_fwd": ("ignore_index", "scale_by_t_squared", "tail"),
    "dkd_fwd": ("ignore_index", "scale_by_t_squared"),
    "mse_fwd": ("ignore_index", "centered"),
    "uld_fwd": ("ignore_index", "exact"),
    "topp_count": (),
    "capture_topk": (),
    "shard_fwd": ("stats",),
    "token_fwd": ("ignore_index", "entropy", "tail_mass", "stats"),
    "token_bwd": ("ignore_index", "entropy", "tail_mass", "stats"),
}
_ROWS = (
    "Tensor(a!)? dstudent, Tensor? labels, Tensor? row_weight, Tensor? student_temperature_rows, "
    "Tensor? teacher_temperature_rows, Tensor? param_rows, Tensor? kd_weight_rows, Tensor? ce_weight_rows, "
    "Tensor? z_loss_weight_rows"
)
# Of all rows, one for each column: numbers added to the logits, in the dtype of the sums, and the teacher's column,
# int32, -1 for none.
_COLUMNS = "Tensor? student_offsets, Tensor? teacher_offsets, Tensor? teacher_columns"
_ALIKE = "int vocab_size, float[] numbers, int[] choices"

SCHEMAS = {
    # Writes the gradient of sum_i loss_i to dstudent, which may be the student itself, and returns (loss [N], stats
    # [N, S]).
    "dense_fwd": (
        f"(Tensor student, Tensor[] teachers, {_ROWS}, Tensor? mixture_weights, Tensor? teacher_lse_rows, "
        f"{_COLUMNS}, *, str divergence, {_ALIKE}, bool stats) -> (Tensor, Tensor)"
    ),
    # As dense_fwd of one teacher, for [B, L, V] whose stride is 1 in L: the rows lie next to each other.
    "pixel_fwd": (
        f"(Tensor student, Tensor teacher, {_ROWS}, {_COLUMNS}, *, str divergence, {_ALIKE}, bool stats) "
        "-> (Tensor, Tensor)"
    ),
    # A teacher of ids [N, K] and log-probabilities [N, K]; a slot of id -1, or of -9000 or less, is unused. tail_rows
    # [N] is the log of its mass outside them, where that is known better than by 1 - sum; that mass counts as at least
    # min_tail + tail_rounding * sum p |log p|. Otherwise as dense_fwd.
    "topk_fwd": (
        f"(Tensor student, Tensor teacher_ids, Tensor teacher_logprobs, {_ROWS}, Tensor? tail_rows, *, "
        f"str divergence, {_ALIKE}, bool stats) -> (Tensor, Tensor)"
    ),
    # The k largest of each row of logits: ids int32 [N, K], log-probabilities [N, K], and the log of the mass outside
    # them [N].
    "capture_topk": (f"(Tensor teacher, Tensor? temperature_rows, *, int k, {_ALIKE}) -> (Tensor, Tensor, Tensor)"),
    "dkd_fwd": (
        "(Tensor student, Tensor teacher, Tensor(a!)? dstudent, Tensor labels, Tensor? row_weight, *, "
        f"{_ALIKE}) -> Tensor"
    ),
    "mse_fwd": (
        "(Tensor student, Tensor teacher, Tensor(a!)? dstudent, Tensor? labels, Tensor? row_weight, *, "
        f"{_ALIKE}) -> Tensor"
    ),
    # As dense_fwd, of probabilities in order, the largest first, whose teacher may have another width. The gradient of
    # columns of one logit is that of the mean sign of their ranks. Unless ``exact``, of logits in fp32 those within
    # T / 256 of each other may count as equal ones.
    "uld_fwd": (
        "(Tensor student, Tensor teacher, Tensor(a!)? dstudent, Tensor? labels, Tensor? row_weight, "
        "Tensor? student_temperature_rows, Tensor? teacher_temperature_rows, *, int vocab_size, "
        "int teacher_vocab_size, float[] numbers, int[] choices) -> Tensor"
    ),
    # How many columns of each row, the most probable first, have a mass of p together: int64 [N], at least 1. All that
    # are above -inf where p is 1, and 1 where a row has no distribution.
    "topp_count": (f"(Tensor logits, Tensor? temperature_rows, *, {_ALIKE}) -> Tensor"),
    # Some of the columns of rows whose softmax is known: row_numbers [N, 13] are SHARD_NUMBERS in the dtype of sums.
    # With log q = (s - student_top) student_unit - student_log_z and log p likewise, both of softcapped logits, returns
    # sum f and sum df/dlogq over the columns, [N, 2], and with the choice "stats" the other SHARD_SUMS behind them; or
    # where there is a dstudent, which may be the student, writes
    #
    #     of_score df/dlogq - of_q q + of_p p + of_hard e^(s - student_top - hard_log_z) + constant
    #
    # and at_label more in the column of labels [N] (-1: none), through the softcap, and returns no row. A row of
    # student_unit 0 is not read for the sums. Of one without a factor the gradient is 0, and it is not read for it; nor
    # is the teacher's where of_score, of_q and of_p are 0.
    "shard_fwd": (
        "(Tensor student, Tensor teacher, Tensor(a!)? dstudent, Tensor? labels, Tensor row_numbers, "
        f"Tensor? param_rows, *, str divergence, {_ALIKE}) -> Tensor"
    ),
    # Log-probabilities of the ids [N, K] of each row, in one read. With x the logits below vocab_size after the softcap
    # (0: none), m the largest of them, z = sum_v exp((x_v - m) / T), which is at least 1, and q = exp((x - m) / T) / z,
    #
    #     logprobs [N, K]   (x_id - m) / T - log z          entropy [N]   log z - sum_v q_v (x_v - m) / T
    #     lse [N]           m / T + log z                   tail [N]      log of the sum of q outside the row's ids
    #     norm [N, 2]       m and z, for token_bwd          stats [N, 2 + K]  log sum_v q_v^2, mean_v x_v, and for each
    #                                                       slot 1 where x_id is m, 0 where not or without an id
    #
    # in the dtype of the sums. entropy is [0] unless the choice "entropy" asks for it, tail unless "tail_mass" does,
    # and stats unless "stats" does.
    # x - m is made first, so that logits of 1e4 keep their bits and those of 3e38 overflow to -inf alone.
    # A row of -inf alone has a norm of the lowest number and 0, which a shard of a row may have beside others.
    # ids: int64, contiguous; -1 and ignore_index (which may be a column's number) are slots without an id, whose
    # logprob is 0. A row in which no slot has an id is not read: all its results are 0. The logprob of an id out of
    # range is NaN, without a read. With tail_mass no id stands twice in a row, and the mass outside is summed for
    # itself: 1 less the others would lose it; -inf where nothing is outside. A row with NaN or +inf, or of -inf alone,
    # has NaN for logprobs (where there is an id), entropy, lse, tail, z and stats, which say of no id that it is the
    # largest. An id whose logit is -inf has -inf, and q log q is 0 where q is.
    # temperature_rows: [N] in the dtype of the sums, of any stride, in place of temperature.
    "token_fwd": (
        f"(Tensor logits, Tensor ids, Tensor? temperature_rows, *, {_ALIKE}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # Writes the gradient of sum dlogprobs logprobs + sum dentropy entropy in one read and one write of [N, V]:
    #
    #     dlogits_v = c_v / T (sum_j dlogprobs_j [v = id_j] - q_v sum_j dlogprobs_j - dentropy q_v (log q_v + entropy))
    #
    # with c_v = 1 - (x_v / softcap)^2, or 1; equal ids add up, and slots without an id count nothing, whatever their
    # dlogprobs. dlogits has the shape and dtype of the logits, may be the logits themselves, and is rounded once; its
    # columns from vocab_size on get 0. norm and entropy [N] are those of token_fwd, dlogprobs [N, K] and dentropy [N]
    # contiguous in the dtype of the sums. entropy and dentropy are both there where the choice "entropy" says so, or
    # neither is; "tail_mass" and "stats" say nothing here. A row without an id, or with nothing but zeros in dentropy
    # and in the dlogprobs of its ids, gets 0 in all columns and is not read. A row whose z is NaN, or with an id out of
    # range, gets NaN below vocab_size; ELSEWHERE is not out of range: it has no column, and its dlogprobs count in the
    # sum. Where q_v is 0 the last term is 0, though log q_v is -inf: the gradient is finite beside a logit of -inf, and
    # at its id.
    "token_bwd": (
        "(Tensor logits, Tensor ids, Tensor norm, Tensor? entropy, Tensor dlogprobs, Tensor? dentropy, "
        f"Tensor(a!) dlogits, Tensor? temperature_rows, *, {_ALIKE}) -> ()"
    ),
    # Multiplies the rows of grad [B, L, V] by grad_output (0-d, or [N]) in place; returns at once where it is 1.
    "scale_grad": "(Tensor(a!) grad, Tensor grad_output) -> ()",
}

# The tensors of a pattern after dstudent.
ROW_TENSORS = {
    pattern: tuple(
        item.split()[1]
        for item in schema.partition("dstudent")[2].partition(" *,")[0].split(",")
        if item.strip().startswith("Tensor")
    )
    for pattern, schema in SCHEMAS.items()
}

# The whole loss of the compiled CPU backend, its rows summed: the call of a training loop, again and again, with no
# tensor per row but labels and a sparse teacher's tail. ``call`` is the result of <pattern>_call_cpu for the numbers
# and names that all rows share. Logits are [B, L, V] or [N, V]. Returns the loss (0-d), and the gradient of the
# student's logits where needs_grad asks for it and there is no dstudent to write it to; else that is empty.
_SUMMED = "Tensor student, Tensor(a!)? dstudent, Tensor call, float scale, bool needs_grad"
SUMMED_SCHEMAS = {
    "dense_call": f"(Tensor student, *, str divergence, {_ALIKE}) -> Tensor",
    "topk_call": f"(Tensor student, *, str divergence, {_ALIKE}) -> Tensor",
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
    # The last three are of a teacher known by its expectations, beside a sparse one without entries: see
    # chunked.Expectation.
    "topk_fwd": (
        "Tensor teacher_ids, Tensor teacher_logprobs, Tensor? expectation, Tensor? expected_bias, Tensor? entropy"
    ),
}

# Patterns that a backend lacks, and why.
_NOT_IN_CUDA = {"cuda": "the CUDA extension has the losses with a divergence and tokens only"}
LACKING = {
    "pixel_fwd": {"cuda": "the CUDA extension has no losses of rows that lie next to each other"},
    "dkd_fwd": _NOT_IN_CUDA,
    "mse_fwd": _NOT_IN_CUDA,
    "uld_fwd": _NOT_IN_CUDA,
    "topp_count": {name: f"capture_topp has no kernel of {name}'s to count with" for name in ("cuda", "triton")},
    "shard_fwd": _NOT_IN_CUDA,
}

# Patterns of which a backend runs calls that ask for it by name, and "auto" takes another one: why.
BY_NAME_ONLY = {
    # Until a file in benchmarks/results/gpu shows them right and faster (benchmarks/evidence.py).
    "dense_fwd": {"cuda": 'its dense losses have not been timed on a GPU yet; backend="cuda" asks for them'},
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


def _pixel_fake(
    student: Tensor, teacher: Tensor, *args: object, stats: bool, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return _dense_fake(student, [teacher], stats=stats)


def _topk_fake(student: Tensor, *args: object, stats: bool, **kwargs: object) -> tuple[Tensor, Tensor]:
    return _rows(student), _rows(student, len(TOPK_STATS) if stats else 0)


def _rows_fake(student: Tensor, *args: object, **kwargs: object) -> Tensor:
    return _rows(student)


def _shard_fake(
    student: Tensor,
    teacher: Tensor,
    dstudent: Optional[Tensor],
    *args: object,
    choices: Sequence[int],
    **kwargs: object,
) -> Tensor:
    columns = len(SHARD_SUMS) if choices[0] else 2
    return _rows(student, columns) if dstudent is None else _sums(student, 0, columns)


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


def _counts_fake(logits: Tensor, *args: object, **kwargs: object) -> Tensor:
    return logits.new_empty(logits.shape[0] * logits.shape[1], dtype=torch.int64)


def _token_fake(
    logits: Tensor, ids: Tensor, *args: object, choices: Sequence[int], **kwargs: object
) -> tuple[Tensor, ...]:
    _, entropy, tail_mass, stats = choices
    none, K = _sums(logits, 0), ids.shape[1]
    return (
        _rows(logits, K),
        _rows(logits) if entropy else none,
        _rows(logits),
        _rows(logits) if tail_mass else none.clone(),
        _rows(logits, 2),
        _rows(logits, 2 + K) if stats else none.clone(),
    )


def _call_fake(student: Tensor, **shared: object) -> Tensor:
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
    "pixel_fwd": _pixel_fake,
    "topk_fwd": _topk_fake,
    "capture_topk": _capture_fake,
    "dkd_fwd": _rows_fake,
    "mse_fwd": _rows_fake,
    "uld_fwd": _rows_fake,
    "topp_count": _counts_fake,
    "shard_fwd": _shard_fake,
    "token_fwd": _token_fake,
    "token_bwd": _none_fake,
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


# The same loop for log-probabilities of tokens. Backward returns (dhidden, dweight, dbias, factors); a gradient that
# needs does not ask for is empty, and head and bias in fp16 are still to be multiplied by their factor.
_LOOP = (
    "str backend, int? chunk_bytes, ScalarType? product_dtype, ScalarType? logits_dtype, "
    "int vocab_size, float[] numbers, int[] choices"
)
LINEAR_TOKENS = {
    "token_fwd": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor? temperature_rows, *, {_LOOP}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "token_bwd": (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor norm, Tensor? entropy, Tensor dlogprobs, "
        f"Tensor? dentropy, Tensor? temperature_rows, *, {_LOOP}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _linear_token_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    ids: Tensor,
    temperature_rows: Optional[Tensor],
    *_: object,
    choices: Sequence[int],
    **kwargs: object,
) -> tuple[Tensor, ...]:
    return _token_fake(hidden[None], ids, temperature_rows, choices=choices)


def _linear_token_bwd_fake(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], *args: object, needs: Sequence[bool], **kwargs: object
) -> tuple[Tensor, ...]:
    grads = (
        torch.empty_like(item) if need and item is not None else hidden.new_empty(0)
        for item, need in zip((hidden, weight, bias), needs, strict=True)
    )
    return *grads, _sums(hidden, 2)


_LINEAR_TOKEN_FAKES: dict[str, Callable[..., Any]] = {
    "token_fwd": _linear_token_fake,
    "token_bwd": _linear_token_bwd_fake,
}
for _pattern, _schema in LINEAR_TOKENS.items():
    _library.define(f"linear_{_pattern}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::linear_{_pattern}", _LINEAR_TOKEN_FAKES[_pattern], lib=_library)


# The blocks of attention scores, in one op. Returns (loss, dquery, dkey), in the dtype of the sums where the operand is
# in fp16; a gradient that needs (of query and key) does not ask for is empty.
_library.define(
    "attention_loop(Tensor query, Tensor key, Tensor teacher_query, Tensor teacher_key, Tensor? mask, *, bool causal, "
    "str kind, float student_scale, float teacher_scale, str reduction, str backend, int? chunk_bytes, bool[] needs, "
    "str divergence, int vocab_size, float[] numbers, int[] choices, bool stats) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _attention_fake(
    query: Tensor, key: Tensor, *args: object, needs: Sequence[bool], **kwargs: object
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _sums(query)
    grads = [
        torch.empty_like(
            item,
            dtype=loss.dtype if item.dtype == torch.float16 else item.dtype,
            memory_format=torch.contiguous_format,
        )
        if need
        else _sums(query, 0)
        for item, need in zip((query, key), needs, strict=True)
    ]
    return loss, grads[0], grads[1]


torch.library.register_fake(f"{NAMESPACE}::attention_loop", _attention_fake, lib=_library)


def packed(pattern: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an op, of options by name."""
    numbers, choices = NUMBERS[pattern], CHOICES[pattern]
    rest = {name: value for name, value in options.items() if name not in numbers and name not in choices}
    rest["numbers"] = [options[name] for name in numbers]
    rest["choices"] = [_code(name, options[name]) for name in choices]
    return rest


def named(pattern: str, numbers: Sequence[float], choices: Sequence[int]) -> dict[str, Any]:
    """Options by name, of what an op was given."""
    options: dict[str, Any] = dict(zip(NUMBERS[pattern], numbers, strict=True))
    for name, code in zip(CHOICES[pattern], choices, strict=True):
        options[name] = CODES[name][code] if name in CODES else code if name == "ignore_index" else bool(code)
    return options


def _code(name: str, value: Any) -> int:
    return CODES[name].index(value) if name in CODES else int(value)


# The patterns once more, for graphs in which one of their numbers is a symbol: numbers are the elements of a tensor,
# and the backend is an argument.
def _define_numbers(pattern: str, schema: str, fake: Callable[..., Any]) -> None:
    backend = "" if " str backend" in schema else "str backend, "
    schema = schema.replace(", float[] numbers", "").replace(" *, ", f" Tensor numbers, *, {backend}")
    _library.define(f"{pattern}_numbers{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{pattern}_numbers", fake, lib=_library)

    def impl(*operands: Any, backend: str, **options: Any) -> Any:
        *tensors, numbers = operands
        if pattern.startswith("linear_"):
            return linear_op(pattern)(*tensors, numbers=numbers.tolist(), backend=backend, **options)
        return op(pattern, backend)(*tensors, numbers=numbers.tolist(), **options)

    implement(f"{pattern}_numbers", impl)


def implement(name: str, function: Callable[..., Any]) -> None:
    """Enter an implementation in Python that calls other ops."""
    _library.impl(name, function, "CompositeExplicitAutograd")


def call(pattern: str, backend: str, operands: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Call ``<pattern>_<backend>``."""
    arguments = packed(pattern, options)
    if torch.compiler.is_dynamo_compiling() and any(map(symbols.is_symbol, arguments["numbers"])):
        return _call_with_numbers(pattern, operands, {**arguments, "backend": backend})
    return op(pattern, backend)(*operands, **arguments)


def call_linear(pattern: str, operands: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Call ``linear_<pattern>``; the backend is among the options."""
    arguments = packed(pattern, options)
    if torch.compiler.is_dynamo_compiling() and any(map(symbols.is_symbol, arguments["numbers"])):
        return _call_with_numbers(f"linear_{pattern}", operands, arguments)
    return linear_op(f"linear_{pattern}")(*operands, **arguments)


def _call_with_numbers(pattern: str, operands: Sequence[Any], arguments: dict[str, Any]) -> Any:
    numbers = symbols.packed(arguments.pop("numbers"))
    return getattr(getattr(torch.ops, NAMESPACE), f"{pattern}_numbers").default(*operands, numbers, **arguments)


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
    if _pattern in NUMBERS:
        _define_numbers(_pattern, _schema, _FAKES[_pattern])
for _pattern, _schema in LINEAR_TOKENS.items():
    _define_numbers(f"linear_{_pattern}", _schema, _LINEAR_TOKEN_FAKES[_pattern])
for _pattern in LINEAR_TEACHERS:
    _schema = str(linear_op(f"linear_{_pattern}")._schema).partition(f"linear_{_pattern}")[2]
    _define_numbers(f"linear_{_pattern}", _schema, _linear_fake(STATS if _pattern == "dense_fwd" else TOPK_STATS))
