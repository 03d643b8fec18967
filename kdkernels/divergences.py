"""The divergences a user can name: frozen dataclasses that hold parameters, and no mathematics.

Notation: teacher ``p`` with log-probabilities ``logp``, student ``q`` with ``logq``; sums run over the vocabulary.
Every class states its formula; the pointwise functions live in ``kdkernels.reference.divergences`` (plain PyTorch),
``kdkernels.kernels.divergences`` (Triton) and ``csrc/include/kdkernels/divergences.h`` (C++), keyed by ``name``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional, Union

from kdkernels import symbols

# The classes and the names, for `import *` and for type checkers, which look at no table.
__all__ = [
    "JSD",
    "TVD",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "MixedKL",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SoftCE",
    "Triangular",
]
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skew_kl",
    "skew_reverse_kl",
    "alpha_beta",
    "jeffreys",
    "mixed_kl",
    "triangular",
    "soft_ce",
]


@dataclass(frozen=True)
class Divergence:
    """Base class: ``D(p, q) = sum_v f(p_v, logp_v, q_v, logq_v)`` with at most two float parameters."""

    name: ClassVar[str] = ""
    # The field that may also be given as one value per row, always params()[0].
    row_param: ClassVar[Optional[str]] = None
    # True where that value may be 0 or 1 too.
    row_param_closed: ClassVar[bool] = False
    formula: ClassVar[str] = ""
    gradient: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    # Sweeps over the logits of a two-sweep kernel: (reads of each logits tensor) when the row is not resident on chip.
    sweeps: ClassVar[int] = 3
    # True if an entry of the gradient by the student's tempered logits stays near 1 however far apart the models are.
    # Others grow with the difference of log-probabilities: a gradient in fp16 is kept at a scale of each row's own.
    bounded_gradient: ClassVar[bool] = False
    # True where ``f(c p, c q) = c f(p, q)``.
    homogeneous: ClassVar[bool] = False
    # True where f is finite at p = 0; None where the parameters decide, by the formula.
    finite_without_teacher: ClassVar[Optional[bool]] = None
    # True where ``f(0, q) = q f(0, 1)``, so that outcomes without a teacher are known by their mass.
    linear_without_teacher: ClassVar[bool] = False
    # w where ``D = -E_p[log q] - w H(p)``: linear in log q, so that expectations are all it needs of p. None elsewhere.
    entropy_weight: ClassVar[Optional[float]] = None
    # True where p may have its normaliser, and mass, in columns that are not here.
    takes_part_of_teacher: ClassVar[bool] = False
    # True where a function of the row's sums is differentiated, and not a sum over the vocabulary.
    of_acceptance: ClassVar[bool] = False

    def params(self) -> tuple[float, float]:
        """The two run-time numbers handed to the kernels; unused ones are 0."""
        return (0.0, 0.0)

    def canonical(self) -> Divergence:
        """The divergence that is computed: limits of a family resolve to the closed form of the limit."""
        return self

    def dual(self) -> Divergence:
        """The divergence ``D*`` with ``D*(q, p) = D(p, q)``, used for the gradient to the teacher."""
        raise ValueError(f"divergence {self.name!r} has no dual: it gives no gradient to the teacher")


def _check_number(owner: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    # A comparison, not math.isfinite: Dynamo traces it for a number that it keeps as a symbol. NaN fails it too, and an
    # int beyond all floats is larger than the largest.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{owner}: {name} must be finite, got {symbols.shown(value)}")
    return float(value)


def _check_fraction(owner: str, name: str, value: float) -> float:
    value = _check_number(owner, name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{owner}: {name} must lie in [0, 1], got {symbols.shown(value)}")
    return value


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """``KL(p || q) = sum p (logp - logq)``: the classic distillation loss (Hinton et al. 2015)."""

    name = "forward_kl"
    formula = "sum p (log p - log q)"
    gradient = "(q - p) / T"
    paper = "Hinton et al. 2015, arXiv:1503.02531"
    homogeneous = True
    finite_without_teacher = True
    linear_without_teacher = True
    bounded_gradient = True
    entropy_weight = 1.0
    takes_part_of_teacher = True
    sweeps = 2

    def dual(self) -> Divergence:
        return ReverseKL()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """``KL(q || p) = sum q (logq - logp)``: mode seeking (MiniLLM, Gu et al. 2024)."""

    name = "reverse_kl"
    formula = "sum q (log q - log p)"
    gradient = "q (log q - log p - D) / T"
    paper = "Gu et al. 2024 (MiniLLM), arXiv:2306.08543"
    homogeneous = True
    finite_without_teacher = False
    sweeps = 2

    def dual(self) -> Divergence:
        return ForwardKL()


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence ``beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``.

    The convention is GKD's (Agarwal et al. 2024). The formula itself is 0 at ``beta = 0`` and ``beta = 1``; as in TRL
    and
    Liger-Kernel, those two values mean its limits up to scale: ``JSD(0)`` is forward KL and ``JSD(1)`` is reverse KL.
    axolotl's top-k loss uses the same reading but defaults to ``beta = 1``. Per-row ``beta`` must lie strictly between.
    """

    beta: float = 0.5

    name = "jsd"
    row_param = "beta"
    formula = "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q"
    gradient = "(1 - beta) q (log q - log m - KL(q || m)) / T"
    paper = "Agarwal et al. 2024 (GKD), arXiv:2306.13649"
    homogeneous = True
    finite_without_teacher = True
    linear_without_teacher = True
    bounded_gradient = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _check_fraction("JSD", "beta", self.beta))

    def params(self) -> tuple[float, float]:
        return (self.beta, 0.0)

    def canonical(self) -> Divergence:
        if self.beta == 0.0:
            return ForwardKL()
        if self.beta == 1.0:
            return ReverseKL()
        return self

    def dual(self) -> Divergence:
        return JSD(1.0 - self.beta)


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation distance ``1/2 sum |p - q|``; its gradient is 0 where ``p == q`` (Wen et al. 2023)."""

    name = "tvd"
    formula = "1/2 sum |p - q|"
    gradient = "q (sign(q - p) - sum q sign(q - p)) / (2 T)"
    paper = "Wen et al. 2023 (f-DISTILL), arXiv:2307.15190"
    homogeneous = True
    finite_without_teacher = True
    linear_without_teacher = True
    bounded_gradient = True
    takes_part_of_teacher = True

    def dual(self) -> Divergence:
        return TVD()


@dataclass(frozen=True)
class SkewKL(Divergence):
    """Skew KL ``KL(p || alpha p + (1 - alpha) q)`` (DistiLLM, Ko et al. 2024); ``alpha = 0`` is forward KL."""

    alpha: float = 0.1

    name = "skew_kl"
    row_param = "alpha"
    formula = "KL(p || m), m = alpha p + (1 - alpha) q"
    gradient = "(1 - alpha) q (sum p q / m - p / m) / T"
    paper = "Ko et al. 2024 (DistiLLM), arXiv:2402.03898"
    homogeneous = True
    finite_without_teacher = True
    linear_without_teacher = True
    bounded_gradient = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _check_fraction("SkewKL", "alpha", self.alpha))

    def params(self) -> tuple[float, float]:
        return (self.alpha, 0.0)

    def canonical(self) -> Divergence:
        return ForwardKL() if self.alpha == 0.0 else self

    def dual(self) -> Divergence:
        return SkewReverseKL(self.alpha)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """Skew reverse KL ``KL(q || alpha q + (1 - alpha) p)`` (DistiLLM, Ko et al. 2024); ``alpha = 0`` is reverse KL."""

    alpha: float = 0.1

    name = "skew_reverse_kl"
    row_param = "alpha"
    formula = "KL(q || m), m = alpha q + (1 - alpha) p"
    gradient = "q (log q - log m - alpha q / m - D + alpha sum q^2 / m) / T"
    paper = "Ko et al. 2024 (DistiLLM), arXiv:2402.03898"
    homogeneous = True
    finite_without_teacher = True
    linear_without_teacher = True
    bounded_gradient = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _check_fraction("SkewReverseKL", "alpha", self.alpha))

    def params(self) -> tuple[float, float]:
        return (self.alpha, 0.0)

    def canonical(self) -> Divergence:
        return ReverseKL() if self.alpha == 0.0 else self

    def dual(self) -> Divergence:
        return SkewKL(self.alpha)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Alpha-beta divergence ``-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]`` (ABKD, Wang et al. 2025).

    ``a = alpha``, ``b = beta``; ``(1, 0)`` is forward KL, ``(0, 1)`` reverse KL, and ``a = 0``, ``b = 0``, ``a + b =
    0`` take the limits. Negative powers give ``inf`` where a probability is 0.
    """

    alpha: float = 0.2
    beta: float = 0.7

    name = "alpha_beta"
    formula = "-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]"
    gradient = "(g - q sum g) / T, g = q^b (q^a - p^a) / a"
    paper = "Wang et al. 2025 (ABKD), arXiv:2505.04560"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _check_number("AlphaBeta", "alpha", self.alpha))
        object.__setattr__(self, "beta", _check_number("AlphaBeta", "beta", self.beta))

    def params(self) -> tuple[float, float]:
        return (self.alpha, self.beta)

    def canonical(self) -> Divergence:
        if symbols.is_symbol(self.alpha) or symbols.is_symbol(self.beta):
            # The limits are in the formula too, and one graph serves all values.
            return self
        if (self.alpha, self.beta) == (1.0, 0.0):
            return ForwardKL()
        if (self.alpha, self.beta) == (0.0, 1.0):
            return ReverseKL()
        return self

    def dual(self) -> Divergence:
        return AlphaBeta(self.beta, self.alpha)


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """Symmetric KL ``KL(p || q) + KL(q || p)`` (Jeffreys 1946)."""

    name = "jeffreys"
    formula = "KL(p || q) + KL(q || p)"
    gradient = "(q - p + q (log q - log p - KL(q || p))) / T"
    paper = "Jeffreys 1946, doi:10.1098/rspa.1946.0056"
    homogeneous = True
    finite_without_teacher = False
    sweeps = 2

    def dual(self) -> Divergence:
        return Jeffreys()


@dataclass(frozen=True)
class MixedKL(Divergence):
    """Both Kullback-Leibler divergences, ``(1 - r) KL(p || q) + r KL(q || p)`` with ``r = reverse`` in [0, 1].

    With a value per row (``row_param``, 0 and 1 included) it is AKL (Wu et al. 2024), and any other choice between the
    two by token. ``reverse = 0`` and ``reverse = 1`` are forward and reverse KL themselves: a term of weight 0 counts
    nothing, be it infinite. torchtune's ``SymmetricKLLoss(sym_kd_ratio=w)`` and NeMo-RL's ``mixed_kl_weight=w`` weigh
    forward KL: ``r = 1 - w``.
    """

    reverse: float = 0.5

    name = "mixed_kl"
    row_param = "reverse"
    row_param_closed = True
    formula = "(1 - r) KL(p || q) + r KL(q || p), r = reverse"
    gradient = "((1 - r) (q - p) + r q (log q - log p - KL(q || p))) / T"
    paper = "Wu et al. 2024 (AKL), arXiv:2404.02657"
    homogeneous = True
    finite_without_teacher = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "reverse", _check_fraction("MixedKL", "reverse", self.reverse))

    def params(self) -> tuple[float, float]:
        return (self.reverse, 0.0)

    def canonical(self) -> Divergence:
        if symbols.is_symbol(self.reverse):
            return self
        if self.reverse == 0.0:
            return ForwardKL()
        if self.reverse == 1.0:
            return ReverseKL()
        return self

    def dual(self) -> Divergence:
        return MixedKL(1.0 - self.reverse)


@dataclass(frozen=True)
class Triangular(Divergence):
    """Triangular discrimination ``sum (p - q)^2 / (p + q)``, between ``2 TVD^2`` and ``2 TVD`` (Topsoe 2000)."""

    name = "triangular"
    formula = "sum (p - q)^2 / (p + q)"
    gradient = "(g - q sum g) / T, g = q (q - p) (3 p + q) / (p + q)^2"
    paper = "Topsoe 2000, doi:10.1109/18.850703"
    homogeneous = True
    finite_without_teacher = True
    linear_without_teacher = True
    bounded_gradient = True

    def dual(self) -> Divergence:
        return Triangular()


@dataclass(frozen=True)
class SoftCE(Divergence):
    """Soft cross entropy ``-sum p logq``: forward KL plus the teacher's entropy, the same gradient to the student."""

    name = "soft_ce"
    formula = "-sum p log q"
    gradient = "(q - p) / T"
    paper = "Hinton et al. 2015, arXiv:1503.02531"
    finite_without_teacher = True
    linear_without_teacher = True
    bounded_gradient = True
    entropy_weight = 0.0
    takes_part_of_teacher = True
    sweeps = 2

    def dual(self) -> Divergence:
        return _DualSoftCE()


@dataclass(frozen=True)
class _DualSoftCE(Divergence):
    """``-sum q logp``: soft cross entropy with the roles swapped, used for its gradient to the teacher."""

    name = "dual_soft_ce"
    formula = "-sum q log p"
    gradient = "q (-log p + sum q log p) / T"
    paper = SoftCE.paper
    finite_without_teacher = False
    sweeps = 2

    def dual(self) -> Divergence:
        return SoftCE()


@dataclass(frozen=True)
class _NegativeLogAcceptance(Divergence):
    """``-log A``, ``A = sum min(p, q)``, of ``lk_loss``: kernels take ``TVD = 1 - A`` and differentiate through it."""

    least: float = 1e-5

    name = "lk_nla"
    formula = "-log sum min(p, q)"
    gradient = "q (sum q [q < p] - [q < p]) / (A T)"
    paper = "Samarin et al. 2026 (LK losses), arXiv:2602.23881"
    homogeneous = True
    finite_without_teacher = True
    takes_part_of_teacher = True
    of_acceptance = True

    def params(self) -> tuple[float, float]:
        return (self.least, 0.0)


@dataclass(frozen=True)
class _LKHybrid(Divergence):
    """``w KL(p || q) + (1 - w) TVD`` of ``lk_loss``, ``w = exp(-eta A)`` of the row and without a gradient."""

    eta: float = 3.0

    name = "lk_hybrid"
    formula = "w KL(p || q) + (1 - w) TVD, w = exp(-eta A)"
    gradient = "(w (q - p) + (1 - w) q (sign(q - p) - sum q sign(q - p)) / 2) / T"
    paper = "Samarin et al. 2026 (LK losses), arXiv:2602.23881"
    homogeneous = True
    finite_without_teacher = True
    bounded_gradient = True
    takes_part_of_teacher = True
    of_acceptance = True

    def params(self) -> tuple[float, float]:
        return (self.eta, 0.0)


_TABLE: dict[str, type[Divergence]] = {cls.name: cls for cls in Divergence.__subclasses__()}


def names() -> tuple[str, ...]:
    """The names accepted by ``divergence=``, built in and registered."""
    return tuple(name for name, cls in _TABLE.items() if not cls.__name__.startswith("_"))


def table() -> dict[str, type[Divergence]]:
    """A copy of the table from name to class."""
    return {name: _TABLE[name] for name in names()}


def by_name(name: str) -> type[Divergence]:
    """The class of a name; the ops know a divergence by nothing else."""
    return _TABLE[name]


# Names registered at run time, and whether they came with Triton functions.
_registered: dict[str, bool] = {}


# How often the table was changed: what was found out about a name holds for one value of it.
version = 0


def add(cls: type[Divergence], *, on_triton: bool) -> None:
    """Enter a dataclass into the table; ``kdkernels.register_divergence`` calls this."""
    if not cls.name.isidentifier():
        raise ValueError(f"a divergence's name must be an identifier, got {cls.name!r}")
    if cls.name in _TABLE:
        raise ValueError(f"divergence {cls.name!r} is registered already")
    dataclass_params = cls.__dict__.get("__dataclass_params__")
    if dataclass_params is None or not (dataclass_params.frozen and dataclass_params.eq):
        # Instances that compare equal stand for one another: those of a class that only inherits the base's comparison
        # do, whatever numbers they hold.
        raise TypeError(
            f"cls must be decorated with @dataclass(frozen=True) itself, with its numbers as fields; {cls.__name__} "
            f"{'is not' if dataclass_params is None else 'is another kind of dataclass'}"
        )
    global version
    version += 1
    _TABLE[cls.name] = cls
    _registered[cls.name] = on_triton


def remove(name: str) -> None:
    """Take a registered divergence out of the table."""
    global version
    version += 1
    del _registered[name]
    del _TABLE[name]


def registered(name: str) -> bool:
    """True if the divergence was entered at run time, so that compiled code does not know it."""
    return name in _registered


def has_triton(name: str) -> bool:
    """True if the Triton kernels know the divergence."""
    return _registered.get(name, True)


def resolve(divergence: Union[str, Divergence]) -> Divergence:
    """Turn a name (with its default parameters) or an instance into the canonical divergence that is computed.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything but a string or a ``Divergence``.
    """
    if isinstance(divergence, str):
        if divergence not in names():
            # Not at the top: the checks know divergences.
            from kdkernels.checks.values import meant

            hint = meant(divergence, names())
            raise ValueError(f"divergence must be one of {', '.join(names())} or an instance, got {divergence!r}{hint}")
        divergence = _TABLE[divergence]()
    if not isinstance(divergence, Divergence):
        got = getattr(divergence, "__name__", divergence)
        raise TypeError(f"divergence must be a name or an instance such as JSD(0.5), got {got!r}")
    if _TABLE.get(divergence.name) is not type(divergence) or divergence.of_acceptance:
        raise ValueError(
            f"divergence of the class {type(divergence).__name__} is unknown: its name {divergence.name!r} "
            "is not registered for this class; kdkernels.register_divergence enters one"
        )
    return divergence.canonical()


def of_acceptance(kind: str, number: float) -> Divergence:
    """The loss of ``lk_loss``: with the least rate that a logarithm sees, or with eta."""
    return _NegativeLogAcceptance(number) if kind == "nla" else _LKHybrid(number)


def markdown_table() -> str:
    """The table of docs/reference/divergences.md: name, formula, gradient, sweeps of a two-pass kernel, paper."""
    rows = [
        "| name | class | D | gradient to the student's logits | sweeps | paper |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cls in table().items():
        formula, gradient = (text.replace("|", "\\|") for text in (cls.formula, cls.gradient))
        rows.append(f"| `{name}` | `{cls()}` | {formula} | {gradient} | {cls.sweeps} | {cls.paper} |")
    return "\n".join(rows) + "\n"
