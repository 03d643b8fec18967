"""The options of every loss, said once: dataclasses that check their values and hold what the ops take.

A function builds one from its keywords, a module holds one. Two are equal where all options are: tensors among them are
compared by identity.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Optional, TypeVar, Union, get_args

import torch
from torch import Tensor

from kdkernels import checks, divergences, reference, symbols
from kdkernels.choices import Acceptance, Backend, Mixture, Reduction, StudentForm, Tail, TeacherForm
from kdkernels.divergences import Divergence, DivergenceName

PerRow = Union[float, Tensor]

# Names of other libraries for an option.
ALIASES = {"T": "temperature", "tau": "temperature", "temp": "temperature", "alpha": "kd_weight"}
# Values of ours that stand for an option of another library, where that is no option's name.
ELSEWHERE = {
    "beta": "divergence=kdkernels.JSD(beta)",
    "jsd_beta": "divergence=kdkernels.JSD(beta)",
    "reverse": "divergence=kdkernels.MixedKL(reverse)",
    "sym_kd_ratio": "divergence=kdkernels.MixedKL(reverse=1 - sym_kd_ratio)",
    "lmbda": "nothing: it is a trainer's share of on-policy data",
    "log_target": "teacher_form='log_probs'",
    "size_average": "reduction",
    "reduce": "reduction",
    "num_items_in_batch": "normalizer",
    "weight_soft_loss": "kd_weight",
    "weight_hard_loss": "ce_weight",
    "mask": "labels, with -100 where a row does not count",
    "attention_mask": "labels, with -100 where a row does not count",
    "loss_mask": "labels, with -100 where a row does not count",
    "completion_mask": "labels, with -100 where a row does not count",
    "weight": "row_weight",
    "class_weight": "row_weight=w[labels], a weight of each row",
    "class_weights": "row_weight=w[labels], a weight of each row",
    "eps": "nothing: no epsilon is needed",
    "dim": "nothing: the classes are the last dimension, as in x.movedim(dim, -1).contiguous()",
    "top_k": "kdkernels.topk_kd_loss",
    "topk": "kdkernels.topk_kd_loss",
}
# Tensors that are arguments of ``kd_loss`` and of few others.
OF_KD_LOSS = ("student_bias", "teacher_bias", "teacher_columns")
# The weights of a loss's terms.
TERMS = ("kd_weight", "ce_weight", "z_loss_weight")
# A z-loss has a gradient of 2 lse q, which fits fp16 at any lse so.
Z_LOSS_SIZE = 512.0

_SelfT = TypeVar("_SelfT", bound="Options")
_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])


if TYPE_CHECKING:
    from typing_extensions import dataclass_transform

    @dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
    def _options(cls: type[_SelfT]) -> type[_SelfT]: ...

else:

    def _options(cls):
        """A frozen dataclass of keywords, with the ``defaults`` of those that a call may give."""
        cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
        own = (field for field in dataclasses.fields(cls) if field.init and field.name not in cls.without)
        cls.defaults = {field.name: field.default for field in own}
        return cls


@_options
class Options:
    """The base of all kinds, without an option of its own."""

    # Options that are tensors.
    tensors: tuple[Tensor, ...] = dataclasses.field(init=False)
    # The op's numbers and choices, but for the width and what depends on the number of rows.
    scalars: dict[str, Any] = dataclasses.field(init=False)
    # About the largest entry of a row's gradient before ``scale`` and the row's weight; None where that has no bound.
    gradient_size: Optional[float] = dataclasses.field(init=False)
    # The loss is a sum of rows that differ in nothing but logits, labels and a sparse teacher.
    sums_alike: bool = dataclasses.field(init=False)
    # ``scalars`` as the CPU's ops for whole losses take them, by all that a call adds.
    packed: dict[Any, Tensor] = dataclasses.field(init=False)

    # The function that has these options, and what it takes none of.
    function: ClassVar[str] = ""
    without: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        self._check()
        values = [getattr(self, name) for name in self.defaults]
        object.__setattr__(self, "tensors", tuple(value for value in values if isinstance(value, Tensor)))
        object.__setattr__(self, "scalars", self._scalars())
        object.__setattr__(self, "gradient_size", self._gradient_size())
        reduced = getattr(self, "reduction", "none") != "none"
        # Not ``not self.tensors``, which Dynamo does not trace for a tuple of tensors.
        alike = reduced and len(self.tensors) == 0 and not self.scalars.get("stats")
        object.__setattr__(self, "sums_alike", alike)
        object.__setattr__(self, "packed", {})

    @classmethod
    def of(cls: type[_SelfT], options: Mapping[str, Any]) -> _SelfT:
        """The object of a call's keywords; that of an earlier call where these are numbers and names alone."""
        if torch.compiler.is_dynamo_compiling():
            return cls._new(options)
        for value in options.values():
            if type(value) not in _KEYS and not isinstance(value, Divergence):
                return cls._new(options)
        return _known(cls, divergences.version, **options)  # type: ignore[arg-type, return-value]

    @classmethod
    def _new(cls: type[_SelfT], options: Mapping[str, Any]) -> _SelfT:
        for name in options:
            if name not in cls.defaults:
                meant = ALIASES.get(name) or next(iter(difflib.get_close_matches(name, cls.defaults, 1)), None)
                hint = f"; did you mean {meant!r}?" if meant in cls.defaults else ""
                if name not in ALIASES and (name in Objective.defaults or name in OF_KD_LOSS):
                    hint = "; kdkernels.kd_loss has it"
                if name in ELSEWHERE and ALIASES.get(name) not in cls.defaults:
                    hint = f"; here it is {ELSEWHERE[name]}"
                raise TypeError(f"{cls.function} got an unexpected option {name!r}{hint}")
        for name, default in cls.defaults.items():
            if default is dataclasses.MISSING and name not in options:
                raise TypeError(f"{cls.function} needs the option {name!r}")
        return cls(**options)

    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        values = {name: getattr(self, name) for name in self.defaults}
        return {name: value for name, value in values.items() if not _same(value, self.defaults[name])}

    def _check(self) -> None:
        """Raise an error that names an option whose value is none."""

    def _scalars(self) -> dict[str, Any]:
        return {}

    def _gradient_size(self) -> Optional[float]:
        return 1.0

    def _key(self) -> tuple[Any, ...]:
        values = [getattr(self, name) for name in self.defaults]
        # Types too: 1 is equal to True, and not a flag.
        return type(self), *((type(v), id(v) if isinstance(v, Tensor) else v) for v in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> Any:
        return _again, (type(self), self.given())

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.given().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


@_options
class RowOptions(Options):
    """Options of all losses: which rows count, and for how much."""

    ignore_index: int = -100
    row_weight: Optional[PerRow] = None
    reduction: Reduction = "mean"
    normalizer: Optional[PerRow] = None
    vocab_size: Optional[int] = None
    backend: Backend = "auto"

    def _check(self) -> None:
        super()._check()
        if self.row_weight is not None and not isinstance(self.row_weight, Tensor):
            checks.number("row_weight", self.row_weight)
            checks.in_sums("row_weight", self.row_weight)
        checks.reduction_name(self.reduction)
        checks.normalizer_like(self.normalizer, self.reduction)
        checks.integer("ignore_index", self.ignore_index)
        if self.vocab_size is not None:
            checks.integer("vocab_size", self.vocab_size, low=1)
        checks.choice("backend", self.backend, get_args(Backend))

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "ignore_index": self.ignore_index}


@_options
class _OnLogits(Options):
    """Options of losses that are given the student's logits."""

    inplace: bool = False

    def _check(self) -> None:
        super()._check()
        checks.flag("inplace", self.inplace)


@_options
class _OnShards(Options):
    """Options of losses whose vocabulary may be sharded."""

    process_group: Optional[torch.distributed.ProcessGroup] = None


@_options
class _OnHidden(Options):
    """Options of losses that are given hidden states."""

    chunk_bytes: Optional[int] = None
    logits_dtype: Optional[torch.dtype] = None

    def _check(self) -> None:
        super()._check()
        if self.chunk_bytes is not None:
            checks.integer("chunk_bytes", self.chunk_bytes, low=1)
        checks.logits_dtype(self.logits_dtype)


@_options
class _Temperatures(Options):
    temperature: PerRow = 1.0
    teacher_temperature: Optional[PerRow] = None

    def _check(self) -> None:
        super()._check()
        for name in ("temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (name == "temperature" or value is not None):
                checks.number(name, value, low=0.0, exclusive_low=True)
                checks.in_sums(name, value, positive=True)

    def _scalars(self) -> dict[str, Any]:
        return {
            **super()._scalars(),
            "temperature": _number(self.temperature),
            "teacher_temperature": _number(self.of_teacher),
        }

    @property
    def of_teacher(self) -> PerRow:
        """The teacher's temperature."""
        return self.temperature if self.teacher_temperature is None else self.teacher_temperature


@_options
class _Tempered(_Temperatures):
    scale_by_t_squared: bool = True

    def _check(self) -> None:
        super()._check()
        checks.flag("scale_by_t_squared", self.scale_by_t_squared)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "scale_by_t_squared": self.scale_by_t_squared}


@_options
class _Divergence(Options):
    divergence: Union[DivergenceName, Divergence] = "forward_kl"

    # The divergence that is computed.
    resolved: Divergence = dataclasses.field(init=False)

    def _check(self) -> None:
        super()._check()
        object.__setattr__(self, "resolved", self._resolve())

    def _resolve(self) -> Divergence:
        return divergences.resolve(self.divergence)


@_options
class _Terms(_Tempered, _Divergence):
    """Options of a divergence beside cross entropy and z-loss."""

    kd_weight: PerRow = 1.0
    ce_weight: PerRow = 0.0
    z_loss_weight: PerRow = 0.0
    label_smoothing: float = 0.0
    student_softcap: Optional[float] = None
    row_param: Optional[Tensor] = None
    return_stats: bool = False

    def _check(self) -> None:
        super()._check()
        for name in TERMS:
            if not isinstance(getattr(self, name), Tensor):
                checks.number(name, getattr(self, name), low=0.0)
        checks.number("label_smoothing", self.label_smoothing, low=0.0, high=1.0)
        checks.softcap("student_softcap", self.student_softcap)
        checks.flag("return_stats", self.return_stats)
        if self.row_param is not None and not isinstance(self.row_param, Tensor):
            raise TypeError("row_param must be a tensor; give one number in the divergence itself")
        if self.row_param is not None and self.resolved.row_param is None:
            raise ValueError(f"row_param needs a divergence with a parameter per row, got {self.resolved.name!r}")

    def _scalars(self) -> dict[str, Any]:
        param0, param1 = self.resolved.params()
        return {
            **super()._scalars(),
            "divergence": self.resolved.name,
            "param0": param0,
            "param1": param1,
            # A tensor has 1 here, for a term that is there, and its numbers in the call's tensors.
            **{name: _number(getattr(self, name)) for name in TERMS},
            "label_smoothing": symbols.as_float(self.label_smoothing),
            "student_softcap": checks.softcap("student_softcap", self.student_softcap),
            "stats": self.return_stats,
        }

    def _gradient_size(self) -> Optional[float]:
        given = (self.temperature, *(getattr(self, name) for name in TERMS))
        return gradient_size(self.resolved, self.scalars, rows=any(isinstance(value, Tensor) for value in given))


@_options
class _Dense(_Terms):
    """Options of a teacher, or a mixture of some, of which all V numbers of a row are known."""

    teacher_form: TeacherForm = "logits"
    teacher_weights: Optional[Union[Sequence[float], Tensor]] = None
    mixture: Mixture = "probs"
    teacher_softcap: Optional[float] = None
    standardize: bool = False
    teacher_lse: Optional[PerRow] = None

    def _check(self) -> None:
        super()._check()
        checks.choice("teacher_form", self.teacher_form, get_args(TeacherForm))
        checks.choice("mixture", self.mixture, get_args(Mixture))
        checks.softcap("teacher_softcap", self.teacher_softcap)
        checks.flag("standardize", self.standardize)
        if isinstance(self.teacher_weights, list):
            object.__setattr__(self, "teacher_weights", tuple(self.teacher_weights))
        checks.cap_of_teacher(self)
        checks.part_of_teacher(self)

    def _scalars(self) -> dict[str, Any]:
        return {
            **super()._scalars(),
            # The kernels divide by the sum of a row whatever it is.
            "teacher_form": "probs" if self.teacher_form == "unnormalized_probs" else self.teacher_form,
            "teacher_softcap": checks.softcap("teacher_softcap", self.teacher_softcap),
            "standardize": self.standardize,
            "student_form": "logits",
        }


@_options
class _Sparse(_Terms):
    """Options of a teacher of which K entries of a row are known."""

    tail: Tail = "bucket"
    min_tail: Optional[float] = None

    def _check(self) -> None:
        super()._check()
        tail = self.tail
        checks.choice("tail", tail, get_args(Tail))
        if self.min_tail is not None:
            checks.number("min_tail", self.min_tail, low=0.0, high=1.0)
            if tail not in ("bucket", "uniform"):
                raise ValueError(f"min_tail has no meaning with tail {tail!r}, only with 'bucket' and 'uniform'")
        if tail in ("renormalize", "drop") and not reference.topk.finite_without_teacher(self.resolved):
            raise ValueError(
                f"tail {tail!r} gives the teacher probability 0 outside its entries, where divergence "
                f"{self.resolved.name!r}, {self.resolved.formula}, is infinite; use tail 'bucket', 'uniform' or "
                "'renormalize_both'"
            )
        if tail in ("bucket", "drop") and (isinstance(self.of_teacher, Tensor) or self.of_teacher != 1):
            got = "a tensor" if isinstance(self.of_teacher, Tensor) else self.of_teacher
            raise ValueError(
                f"teacher_temperature must be 1 with tail {tail!r}, got {got}: K log-probabilities do not tell the "
                "mass outside them at another temperature; take them at the temperature of the loss (a server's have "
                "temperature 1) and pass teacher_temperature=1.0, or choose tail 'uniform', 'renormalize' or "
                "'renormalize_both'"
            )

    def _scalars(self) -> dict[str, Any]:
        # Where the divergence is finite without it an empty tail is none. ``floor`` puts the default in.
        floored = self.tail in ("bucket", "uniform") and not reference.topk.finite_without_teacher(self.resolved)
        return {
            **super()._scalars(),
            "tail": self.tail,
            "min_tail": symbols.as_float(self.min_tail) if floored and self.min_tail is not None else 0.0,
            "tail_rounding": 1.0 if floored and self.min_tail is None else 0.0,
        }

    def floor(self, dtype: torch.dtype, *, tail_is_given: bool) -> dict[str, Any]:
        """``scalars`` for log-probabilities of a dtype: with the default of ``min_tail``, what ``1 - sum p`` may be off
        by; nothing where the tail is given."""
        if not self.scalars["tail_rounding"]:
            return self.scalars
        if tail_is_given:
            return {**self.scalars, "tail_rounding": 0.0}
        epsilon = torch.finfo(dtype).eps
        return {
            **self.scalars,
            "min_tail": min(epsilon, torch.finfo(torch.float32).eps),
            "tail_rounding": epsilon / 2,
        }


@_options
class _Acceptance(_Dense):
    """Options of an objective of the acceptance rate, in place of a divergence."""

    kind: Acceptance = "nla"
    eta: float = 3.0
    eps: float = 1e-5

    def _resolve(self) -> Divergence:
        checks.choice("kind", self.kind, get_args(Acceptance))
        checks.number("eta", self.eta, low=0.0)
        checks.in_sums("eta", self.eta)
        checks.number("eps", self.eps, low=0.0, high=1.0, exclusive_low=True)
        checks.in_sums("eps", self.eps, positive=True)
        unused = "eta" if self.kind == "nla" else "eps"
        if getattr(self, unused) != self.defaults[unused]:
            raise ValueError(f"{unused} has no meaning with kind {self.kind!r}")
        return divergences.of_acceptance(self.kind, self.eps if self.kind == "nla" else self.eta)


@_options
class Objective(_OnLogits, _OnShards, RowOptions, _Dense):
    """The options of ``kd_loss``."""

    student_form: StudentForm = "logits"
    dim: int = -1

    function = "kd_loss"

    def _check(self) -> None:
        super()._check()
        checks.choice("student_form", self.student_form, get_args(StudentForm))
        checks.integer("dim", self.dim)
        if self.student_form == "log_probs":
            checks.log_probs_alone(self)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "student_form": self.student_form}


@_options
class TopKObjective(_OnLogits, _OnShards, RowOptions, _Sparse):
    """The options of ``topk_kd_loss``."""

    function = "topk_kd_loss"


@_options
class LinearObjective(_OnHidden, _OnShards, RowOptions, _Dense):
    """The options of ``linear_kd_loss``."""

    function = "linear_kd_loss"


@_options
class LinearTopKObjective(_OnHidden, _OnShards, RowOptions, _Sparse):
    """The options of ``linear_topk_kd_loss``."""

    sparse_grad: bool = False

    function = "linear_topk_kd_loss"

    def _check(self) -> None:
        super()._check()
        checks.flag("sparse_grad", self.sparse_grad)


@_options
class TokenOptions(Options):
    """The options of ``token_logprobs``."""

    temperature: PerRow = 1.0
    entropy: bool = False
    return_stats: bool = False
    softcap: Optional[float] = None
    vocab_size: Optional[int] = None
    ignore_index: int = -100
    inplace_backward: bool = False
    process_group: Optional[torch.distributed.ProcessGroup] = None
    backend: Backend = "auto"

    function = "token_logprobs"

    def _check(self) -> None:
        super()._check()
        if not isinstance(self.temperature, Tensor):
            checks.number("temperature", self.temperature, low=0.0, exclusive_low=True)
            checks.in_sums("temperature", self.temperature, positive=True)
        checks.flag("entropy", self.entropy)
        checks.flag("return_stats", self.return_stats)
        checks.softcap("softcap", self.softcap)
        if self.vocab_size is not None:
            checks.integer("vocab_size", self.vocab_size, low=1)
        checks.integer("ignore_index", self.ignore_index)
        checks.flag("inplace_backward", self.inplace_backward)
        checks.choice("backend", self.backend, get_args(Backend))

    def _scalars(self) -> dict[str, Any]:
        return {
            **super()._scalars(),
            "temperature": _number(self.temperature),
            "softcap": checks.softcap("softcap", self.softcap),
            "ignore_index": self.ignore_index,
            "entropy": self.entropy,
            "tail_mass": False,
            "stats": self.return_stats,
        }


@_options
class LinearTokenOptions(_OnHidden, TokenOptions):
    """The options of ``linear_token_logprobs``."""

    function = "linear_token_logprobs"
    without = ("inplace_backward",)


@_options
class TAIDObjective(Objective):
    """The options of ``taid_loss``: those of ``kd_loss`` for one teacher of logits, and the interpolation."""

    interpolation: PerRow

    function = "taid_loss"
    without = (
        "teacher_temperature",
        "teacher_form",
        "teacher_weights",
        "mixture",
        "teacher_lse",
        "student_form",
        "dim",
    )


@_options
class LKObjective(Objective, _Acceptance):
    """The options of ``lk_loss``: those of ``kd_loss`` but for the divergence, and the kind."""

    function = "lk_loss"
    without = ("divergence", "row_param", "student_form", "dim")


@_options
class LinearLKObjective(LinearObjective, _Acceptance):
    """The options of ``linear_lk_loss``."""

    function = "linear_lk_loss"
    without = ("divergence", "row_param")


@_options
class DKDObjective(_OnLogits, _OnShards, RowOptions, _Tempered):
    """The options of ``dkd_loss``."""

    alpha: float = 1.0
    beta: float = 8.0

    function = "dkd_loss"

    def _check(self) -> None:
        for name in ("temperature", "teacher_temperature"):
            if isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a number in dkd_loss, got a tensor")
        super()._check()
        checks.number("alpha", self.alpha, low=0.0)
        checks.number("beta", self.beta, low=0.0)

    def _scalars(self) -> dict[str, Any]:
        return {
            **super()._scalars(),
            "alpha": symbols.as_float(self.alpha),
            "beta": symbols.as_float(self.beta),
        }

    def _gradient_size(self) -> Optional[float]:
        # With no term at all there is still something to divide by.
        return (self.alpha + self.beta) * _tempered(self.scalars) + 2.0**-100


@_options
class MSEObjective(_OnLogits, _OnShards, RowOptions):
    """The options of ``logit_mse_loss``."""

    centered: bool = False

    function = "logit_mse_loss"

    def _check(self) -> None:
        super()._check()
        checks.flag("centered", self.centered)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "centered": self.centered}


@_options
class ULDObjective(_OnLogits, RowOptions, _Temperatures):
    """The options of ``uld_loss``."""

    teacher_vocab_size: Optional[int] = None
    exact: bool = False

    function = "uld_loss"

    def _check(self) -> None:
        super()._check()
        if self.teacher_vocab_size is not None:
            checks.integer("teacher_vocab_size", self.teacher_vocab_size, low=1)
        checks.flag("exact", self.exact)

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "exact": self.exact}

    def _gradient_size(self) -> Optional[float]:
        # Temperatures of rows leave room from 0.004 on; a copy in fp32 would not be counted by its bits.
        return 1.0 / self.scalars["temperature"]


def gradient_size(divergence: Divergence, scalars: dict[str, Any], *, rows: bool) -> Optional[float]:
    """``Options.gradient_size`` of a divergence beside its terms.

    An unbounded divergence has a gradient that grows with the distance of the models, and the standard deviation of a
    row divides it; ``rows`` have temperatures or weights of terms of their own.
    """
    if not divergence.bounded_gradient or scalars.get("standardize") or rows:
        return None
    size = scalars["kd_weight"] * _tempered(scalars)
    # With no term at all there is still something to divide by.
    return size + scalars["ce_weight"] + Z_LOSS_SIZE * scalars["z_loss_weight"] + 2.0**-100


def takes(options: type[Options]) -> Callable[[_FunctionT], _FunctionT]:
    """Give a function of ``**options`` the signature that says which."""

    def with_signature(function: _FunctionT) -> _FunctionT:
        own = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        types = {field.name: field.type for field in dataclasses.fields(options)}
        keywords = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=types[name],
            )
            for name, default in options.defaults.items()
        ]
        function.__signature__ = inspect.Signature([*own, *keywords])  # type: ignore[attr-defined]
        return function

    return with_signature


# Keywords that tell calls apart; a number that a compiler knows by a symbol, a list and a tensor do not.
_KEYS = frozenset({str, int, float, bool, type(None), torch.dtype})


@functools.lru_cache(maxsize=256, typed=True)
def _known(cls: type[Options], version: int, /, **options: Any) -> Options:
    return cls._new(options)


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and not isinstance(value, Tensor) and value == default)


def _again(cls: type[Options], options: dict[str, Any]) -> Options:
    return cls(**options)


def _number(value: Any) -> float:
    return 1.0 if isinstance(value, Tensor) else symbols.as_float(value)


def _tempered(scalars: dict[str, Any]) -> float:
    """The factor of a gradient by tempered logits."""
    temperature = scalars["temperature"]
    return temperature if scalars["scale_by_t_squared"] else 1.0 / temperature
