"""The divergences: what each is by its documentation, its limits, its dual, and those that users register."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import divergences, testing

TABLE = divergences.table()
NUM_ROWS, VOCAB = 5, 60


def logits(seed=0):
    return testing.make_inputs("normal", NUM_ROWS, VOCAB, torch.float64, seed)


def log_probs(*tensors, temperature=1.0):
    return [F.log_softmax(t / temperature, -1) for t in tensors]


def rows(student, teacher, divergence, backend, **options):
    return kd.kd_loss(student, teacher, divergence=divergence, reduction="none", backend=backend, **options)


def gradient(student, teacher, divergence, backend, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(rows(student, teacher, divergence, backend, **options).sum(), student)[0]


# The formulas that the classes document, transcribed: the value, and the gradient to the student's logits times T.
def _mix(w, p, q):
    return w * p + (1 - w) * q


def _centred(score, q):
    return score - q * score.sum(-1, keepdim=True)


DOCUMENTED = {
    "forward_kl": (lambda p, q: (p * (p / q).log()).sum(-1), lambda p, q: q - p),
    "reverse_kl": (lambda p, q: (q * (q / p).log()).sum(-1), lambda p, q: _centred(q * (q / p).log(), q)),
    "jsd": (
        lambda p, q: 0.5 * (p * (p / _mix(0.5, p, q)).log()).sum(-1) + 0.5 * (q * (q / _mix(0.5, p, q)).log()).sum(-1),
        lambda p, q: _centred(0.5 * q * (q / _mix(0.5, p, q)).log(), q),
    ),
    "tvd": (
        lambda p, q: (p - q).abs().sum(-1) / 2,
        lambda p, q: q * ((q - p).sign() - (q * (q - p).sign()).sum(-1, keepdim=True)) / 2,
    ),
    "skew_kl": (
        lambda p, q: (p * (p / _mix(0.1, p, q)).log()).sum(-1),
        lambda p, q: 0.9 * q * ((p * q / _mix(0.1, p, q)).sum(-1, keepdim=True) - p / _mix(0.1, p, q)),
    ),
    "skew_reverse_kl": (
        lambda p, q: (q * (q / _mix(0.1, q, p)).log()).sum(-1),
        lambda p, q: _centred(q * (q / _mix(0.1, q, p)).log() - 0.1 * q * q / _mix(0.1, q, p), q),
    ),
    "alpha_beta": (
        lambda p, q: -(p**0.2 * q**0.7 - 0.2 / 0.9 * p**0.9 - 0.7 / 0.9 * q**0.9).sum(-1) / 0.14,
        lambda p, q: _centred(q**0.7 * (q**0.2 - p**0.2) / 0.2, q),
    ),
    "jeffreys": (
        lambda p, q: ((p - q) * (p / q).log()).sum(-1),
        lambda p, q: q - p + _centred(q * (q / p).log(), q),
    ),
    "mixed_kl": (
        lambda p, q: 0.5 * ((p - q) * (p / q).log()).sum(-1),
        lambda p, q: 0.5 * (q - p) + 0.5 * _centred(q * (q / p).log(), q),
    ),
    "triangular": (
        lambda p, q: ((p - q) ** 2 / (p + q)).sum(-1),
        lambda p, q: _centred(q * (q - p) * (3 * p + q) / (p + q) ** 2, q),
    ),
    "soft_ce": (lambda p, q: -(p * q.log()).sum(-1), lambda p, q: q - p),
}


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_documented(name, temperature, backend):
    s, t = logits()
    p, q = (x.exp() for x in log_probs(t, s, temperature=temperature))
    value, slope = DOCUMENTED[name]
    got = rows(s, t, name, backend, temperature=temperature, scale_by_t_squared=False)
    torch.testing.assert_close(got, value(p, q), rtol=1e-10, atol=1e-13)
    got = gradient(s, t, name, backend, temperature=temperature, scale_by_t_squared=False)
    torch.testing.assert_close(got, slope(p, q) / temperature, rtol=1e-9, atol=1e-13)


def test_the_documentation_covers_the_table():
    assert set(DOCUMENTED) <= set(TABLE) == set(divergences.names())
    for name, cls in TABLE.items():
        assert cls.name == name and cls.sweeps in (2, 3)
        assert cls.formula and cls.gradient and ("arXiv" in cls.paper or "doi" in cls.paper), name


@pytest.mark.parametrize("name", TABLE)
def test_a_name_is_the_class_with_its_defaults(name, backend):
    s, t = logits()
    assert torch.equal(rows(s, t, name, backend), rows(s, t, TABLE[name](), backend))


@pytest.mark.parametrize("name", TABLE)
def test_equal_models_have_no_loss_and_no_gradient(name, backend):
    s, _ = logits()
    loss, slope = rows(s, s.clone(), name, backend), gradient(s, s.clone(), name, backend)
    if name == "soft_ce":
        loss = loss - torch.distributions.Categorical(logits=s).entropy()
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in TABLE if name != "soft_ce"])
@pytest.mark.parametrize("kind", ["normal", "near", "huge", "peaked", "one-hot"])
def test_a_divergence_is_not_negative(name, kind, backend):
    s, t = testing.make_inputs(kind, 50, VOCAB, torch.float32)
    assert (rows(s, t, name, backend) > -1e-6).all()


@pytest.mark.parametrize("kind", ["normal", "huge", "peaked", "one-hot", "mixed-inf"])
def test_bounded_ones_keep_their_bounds(kind, backend):
    s, t = testing.make_inputs(kind, 50, VOCAB, torch.float32)
    bounds = {"tvd": 1.0, "jsd": math.log(2), kd.SkewKL(0.2): math.log(5), kd.SkewReverseKL(0.2): math.log(5)}
    for divergence, bound in bounds.items():
        assert (rows(s, t, divergence, backend) <= bound * (1 + 1e-6)).all(), divergence


@pytest.mark.parametrize(
    "divergence", [*(cls() for cls in TABLE.values()), kd.JSD(0.2), kd.AlphaBeta(1.5, -0.5)], ids=str
)
def test_the_dual_swaps_the_roles(divergence):
    s, t = logits()
    logp, logq = log_probs(t, s)
    swapped = testing.textbook_divergence(divergence.dual().canonical(), logq, logp)
    torch.testing.assert_close(swapped, testing.textbook_divergence(divergence, logp, logq), rtol=1e-10, atol=1e-14)
    twice = divergence.dual().dual()
    assert type(twice) is type(divergence) and twice.params() == pytest.approx(divergence.params())


# JSD: GKD's convention, with the limits that TRL and Liger-Kernel take.


def test_jsd_is_gkds():
    """As TRL's generalized_jsd_loss writes it: beta weighs the teacher in the mixture and its own KL to it."""
    s, t = logits()
    logp, logq = log_probs(t, s)
    for beta in (0.1, 0.5, 0.9):
        logm = torch.logsumexp(torch.stack([logq + math.log1p(-beta), logp + math.log(beta)]), 0)
        kl_teacher = F.kl_div(logm, logp, reduction="none", log_target=True)
        kl_student = F.kl_div(logm, logq, reduction="none", log_target=True)
        expected = (beta * kl_teacher + (1 - beta) * kl_student).sum(-1)
        for backend in ("torch", "auto"):
            torch.testing.assert_close(rows(s, t, kd.JSD(beta), backend), expected, rtol=1e-10, atol=1e-13)


def test_jsd_at_0_is_forward_kl_and_at_1_reverse_kl(backend):
    s, t = logits()
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert torch.equal(rows(s, t, kd.JSD(beta), backend), rows(s, t, name, backend))
        # They are the limits of JSD / (beta (1 - beta)).
        near = kd.JSD(abs(beta - 1e-6))
        scaled = rows(s, t, near, backend) / (1e-6 * (1 - 1e-6))
        torch.testing.assert_close(scaled, rows(s, t, name, backend), rtol=1e-2, atol=1e-6)


def test_jsd_is_symmetric_at_one_half_only(backend):
    s, t = logits()
    for beta in (0.5, 0.2):
        there, back = rows(s, t, kd.JSD(beta), backend), rows(t, s, kd.JSD(1 - beta), backend)
        torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-13)
    assert (rows(s, t, kd.JSD(0.2), backend) - rows(t, s, kd.JSD(0.2), backend)).abs().min() > 1e-6


def test_skewed_divergences_end_at_the_kls_and_at_0(backend):
    s, t = logits()
    assert torch.equal(rows(s, t, kd.SkewKL(0.0), backend), rows(s, t, "forward_kl", backend))
    assert torch.equal(rows(s, t, kd.SkewReverseKL(0.0), backend), rows(s, t, "reverse_kl", backend))
    for divergence in (kd.SkewKL(1.0), kd.SkewReverseKL(1.0)):
        assert rows(s, t, divergence, backend).abs().max() < 1e-14
        assert gradient(s, t, divergence, backend).abs().max() < 1e-14


# The alpha-beta family.


@pytest.mark.parametrize(("alpha", "beta", "name"), [(1, 0, "forward_kl"), (0, 1, "reverse_kl")])
def test_alpha_beta_ends_at_the_kls(alpha, beta, name, backend):
    s, t = logits()
    divergence = kd.AlphaBeta(alpha, beta)
    assert divergence.canonical() == TABLE[name]()
    assert torch.equal(rows(s, t, divergence, backend), rows(s, t, name, backend))
    near = kd.AlphaBeta(alpha + 1e-5, beta + 1e-5)
    torch.testing.assert_close(rows(s, t, near, backend), rows(s, t, name, backend), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("limit", "near"),
    [
        ((0.0, 0.7), (1e-5, 0.7)),
        ((0.0, 0.7), (-1e-5, 0.7)),
        ((0.7, 0.0), (0.7, 1e-5)),
        ((0.7, 0.0), (0.7, -1e-5)),
        ((0.4, -0.4), (0.4, -0.4 + 1e-5)),
        ((0.4, -0.4), (0.4, -0.4 - 1e-5)),
        ((0.0, 0.0), (1e-4, 1e-4)),
        ((0.0, 0.0), (1e-4, -1e-4)),
    ],
    ids=str,
)
def test_alpha_beta_is_continuous_in_its_limits(limit, near, backend):
    s, t = logits()
    at, by = kd.AlphaBeta(*limit), kd.AlphaBeta(*near)
    torch.testing.assert_close(rows(s, t, by, backend), rows(s, t, at, backend), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(gradient(s, t, by, backend), gradient(s, t, at, backend), rtol=1e-2, atol=1e-5)


def test_alpha_beta_contains_the_named_ones(backend):
    """(1/2, 1/2) is four times the squared Hellinger distance, (1, 1) half the squared Euclidean distance."""
    s, t = logits()
    p, q = (x.exp() for x in log_probs(t, s))
    hellinger = 2 * (p.sqrt() - q.sqrt()).square().sum(-1)
    torch.testing.assert_close(rows(s, t, kd.AlphaBeta(0.5, 0.5), backend), hellinger, rtol=1e-9, atol=1e-12)
    euclidean = (p - q).square().sum(-1) / 2
    torch.testing.assert_close(rows(s, t, kd.AlphaBeta(1.0, 1.0), backend), euclidean, rtol=1e-9, atol=1e-12)


# Construction.


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: kd.JSD(-0.1), ValueError, r"JSD: beta must lie in \[0, 1\], got -0.1"),
        (lambda: kd.JSD(1.5), ValueError, r"JSD: beta must lie in \[0, 1\], got 1.5"),
        (lambda: kd.JSD(float("nan")), ValueError, "JSD: beta must be finite, got nan"),
        (lambda: kd.JSD("0.5"), TypeError, "JSD: beta must be a number, got str"),
        (lambda: kd.JSD(torch.tensor(0.5)), TypeError, "JSD: beta must be a number, got Tensor"),
        (lambda: kd.JSD(True), TypeError, "JSD: beta must be a number, got bool"),
        (lambda: kd.SkewKL(2), ValueError, r"SkewKL: alpha must lie in \[0, 1\], got 2"),
        (lambda: kd.SkewReverseKL(-1e-9), ValueError, r"SkewReverseKL: alpha must lie in \[0, 1\]"),
        (lambda: kd.AlphaBeta(float("inf"), 0), ValueError, "AlphaBeta: alpha must be finite, got inf"),
        (lambda: kd.AlphaBeta(0.1, None), TypeError, "AlphaBeta: beta must be a number, got NoneType"),
    ],
)
def test_parameters_are_checked_at_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_divergences_are_values():
    assert kd.JSD(0.3) == kd.JSD(0.3) != kd.JSD(0.4) and len({kd.TVD(), kd.TVD(), kd.JSD(1), kd.JSD(1.0)}) == 2
    assert repr(kd.JSD(0.3)) == "JSD(beta=0.3)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        kd.JSD(0.3).beta = 0.4


# A user's own.


@dataclasses.dataclass(frozen=True)
class ChiSquared(kd.Divergence):
    """Pearson's chi squared ``sum (p - q)^2 / q`` less one parameter's share."""

    weight: float = 1.0
    name = "chi_squared_of_the_tests"

    def params(self):
        return (self.weight, 0.0)


@pytest.fixture
def chi_squared():
    kd.register_divergence(ChiSquared, lambda p, logp, q, logq, weight, _: weight * (p - q).square() / q)
    yield
    kd.unregister_divergence(ChiSquared.name)


def test_a_registered_divergence_is_one_of_them(chi_squared):
    s, t = logits()
    p, q = (x.exp() for x in log_probs(t, s))
    assert ChiSquared.name in divergences.names()
    expected = (p * p / q).sum(-1) - 1
    torch.testing.assert_close(kd.kd_loss(s, t, divergence=ChiSquared.name, reduction="none"), expected)
    torch.testing.assert_close(kd.kd_loss(s, t, divergence=ChiSquared(0.5), reduction="none"), expected / 2)
    testing.check_kd_loss(s, t, divergence=ChiSquared(), temperature=2.0, ce_weight=0.5, labels=torch.arange(NUM_ROWS))
    assert torch.autograd.gradcheck(lambda s: kd.kd_loss(s, t, divergence=ChiSquared()), s.clone().requires_grad_())
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: .*(registered at run time|not built)"):
        kd.kd_loss(s, t, divergence=ChiSquared(), backend="cpu")
    with pytest.raises(ValueError, match="is registered already"):
        kd.register_divergence(ChiSquared, lambda *_: _[0])
    # Its teacher's gradient needs no dual: PyTorch differentiates the function.
    assert torch.autograd.gradcheck(lambda t: kd.kd_loss(s, t, divergence=ChiSquared()), t.clone().requires_grad_())


class Plain(kd.Divergence):
    """Its instances compare equal, whatever their weight: it inherits the comparison of a class without fields."""

    name = "plain_of_the_tests"

    def __init__(self, weight):
        object.__setattr__(self, "weight", weight)

    def params(self):
        return (self.weight, 0.0)


class Weighted(kd.JSD):
    """Adds a number that the comparison of a registered dataclass does not see."""

    def __init__(self, weight):
        super().__init__(0.5)
        object.__setattr__(self, "weight", weight)

    def params(self):
        return (self.weight, 0.0)


def test_only_a_frozen_dataclass_of_its_own_is_registered():
    """Another's instances would stand for one another: the first one's loss for every weight."""
    with pytest.raises(TypeError, match=r"@dataclass\(frozen=True\) itself.* Plain is not"):
        kd.register_divergence(Plain, lambda p, logp, q, logq, w, _: w * p * (logp - logq))
    assert Plain.name not in divergences.names()
    with pytest.raises(ValueError, match="class Weighted is unknown.* 'jsd' is not registered for this class"):
        kd.kd_loss(*logits(), divergence=Weighted(0.3))
    with pytest.raises(ValueError, match="class ChiSquared is unknown.*register_divergence"):
        kd.kd_loss(*logits(), divergence=ChiSquared())


def test_what_was_unregistered_is_unknown():
    with pytest.raises(ValueError, match="divergence must be one of forward_kl, .* got 'chi_squared_of_the_tests'"):
        kd.kd_loss(*logits(), divergence=ChiSquared.name)
    with pytest.raises(ValueError, match="no divergence 'chi_squared_of_the_tests' was registered"):
        kd.unregister_divergence(ChiSquared.name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((int, None), TypeError, "cls must be a subclass of kdkernels.Divergence"),
        ((type("Named", (kd.Divergence,), {"name": "not an identifier"}), None), ValueError, "must be an identifier"),
        ((type("Taken", (kd.Divergence,), {"name": "tvd"}), None), ValueError, "'tvd' is registered already"),
    ],
    ids=["no-divergence", "no-identifier", "taken"],
)
def test_registration_is_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        kd.register_divergence(*arguments)
    with pytest.raises(ValueError, match="triton_value and triton_score come together"):
        kd.register_divergence(ChiSquared, lambda *_: _[0], triton_value=object())
    assert ChiSquared.name not in divergences.names()
