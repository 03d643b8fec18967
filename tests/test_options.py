"""The options of the losses as types: equality, memory, signatures, and what type checkers are told."""

import copy
import gc
import inspect
import pickle
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from typing_extensions import get_type_hints

import kdkernels as kd
from kdkernels import choices, objective, ops, options
from kdkernels.divergences import by_name
from kdkernels.reference import divergences as formulas

KINDS = {
    "kd_loss": (kd.kd_loss, objective.Objective, options.ObjectiveOptions),
    "topk_kd_loss": (kd.topk_kd_loss, objective.TopKObjective, options.TopKOptions),
    "taid_loss": (kd.taid_loss, objective.TAIDObjective, options.TAIDOptions),
    "dkd_loss": (kd.dkd_loss, objective.DKDObjective, options.DKDOptions),
    "logit_mse_loss": (kd.logit_mse_loss, objective.MSEObjective, options.MSEOptions),
    "linear_kd_loss": (kd.linear_kd_loss, objective.LinearObjective, options.LinearOptions),
    "linear_topk_kd_loss": (kd.linear_topk_kd_loss, objective.LinearTopKObjective, options.LinearTopKOptions),
    "lk_loss": (kd.lk_loss, objective.LKObjective, options.LKOptions),
    "token_logprobs": (kd.token_logprobs, objective.TokenOptions, options.TokenOptions),
}
MODULES = (kd.KDLoss, kd.TopKKDLoss, kd.LinearKDLoss, kd.LinearTopKKDLoss)


@pytest.mark.parametrize(("function", "kind", "keywords"), KINDS.values(), ids=KINDS)
def test_type_checkers_and_inspect_see_the_fields(function, kind, keywords):
    types = get_type_hints(kind)
    told = get_type_hints(keywords)
    own = {"return_stats"} if "return_stats" in kind.defaults else set()
    own |= {"interpolation"} if "interpolation" in kind.defaults else set()
    assert set(told) == set(kind.defaults) - own
    # A number for all rows is a type of its own where rows cannot have theirs.
    narrower = {"temperature", "teacher_temperature"} if kind is objective.DKDObjective else set()
    assert {name for name in told if told[name] != types[name]} == narrower
    parameters = inspect.signature(function).parameters
    assert kind.function == function.__name__
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in kind.defaults)
    shown = {name: p.default for name, p in parameters.items() if name in kind.defaults}
    assert {k: v for k, v in shown.items() if k != "interpolation"} == {
        k: v for k, v in kind.defaults.items() if k != "interpolation"
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_module_has_the_signature_of_its_options(module):
    assert list(inspect.signature(module).parameters) == list(module.kind.defaults)
    assert repr(module()) == f"{module.__name__}()"


def test_names_of_divergences_are_those_of_the_table():
    assert set(get_args(kd.divergences.DivergenceName)) == set(kd.divergences.names())


def test_a_module_holds_its_options_alone():
    module = kd.KDLoss(divergence=kd.JSD(0.3), temperature=2.0)
    assert module.objective.temperature == 2.0 and module.objective.divergence == kd.JSD(0.3)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.objective == module.objective and repr(again) == repr(module)
    assert eval(repr(module.objective), vars(kd) | vars(objective)) == module.objective


def test_equality_and_hash():
    make = objective.Objective
    assert make(temperature=2.0) == make(temperature=2.0) and hash(make()) == hash(make())
    assert make(temperature=2.0) != make(temperature=3.0)
    assert make() != objective.LinearObjective()
    weight = torch.ones(3)
    assert make(row_weight=weight) == make(row_weight=weight) != make(row_weight=weight.clone())
    assert len({make(), make(teacher_weights=[0.5, 0.5]), make(teacher_weights=(0.5, 0.5))}) == 2
    with pytest.raises(AttributeError):
        make().temperature = 3.0


def test_options_are_built_once_for_all_calls_that_say_the_same():
    of = objective.Objective.of
    assert of({"temperature": 2.0}) is of({"temperature": 2.0})
    assert of({"temperature": 2}) is not of({"temperature": 2.0})
    assert of({"divergence": kd.JSD(0.25)}) is of({"divergence": kd.JSD(0.25)})
    # 1 is equal to True.
    of({"kd_weight": 1})
    with pytest.raises(TypeError, match="kd_weight must be a number"):
        of({"kd_weight": True})
    of({"standardize": False})
    with pytest.raises(TypeError, match="standardize must be a bool"):
        of({"standardize": 0})


def test_nobody_keeps_the_tensors_of_a_call():
    weight = torch.rand(4)
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    kd.kd_loss(student, teacher, row_weight=weight)
    kd.topk_kd_loss(student, torch.zeros(4, 1, dtype=torch.int64), torch.full((4, 1), -0.5))
    kept = [weakref.ref(x) for x in (weight, student, teacher)]
    del weight, student, teacher
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_divergence_taken_out_is_not_remembered():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Twice(kd.Divergence):
        name = "twice_kl"

    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    kd.register_divergence(Twice, lambda p, logp, q, logq, *_: 2 * p * (logp - logq))
    try:
        twice = kd.kd_loss(student, teacher, divergence="twice_kl")
    finally:
        kd.unregister_divergence("twice_kl")
    torch.testing.assert_close(twice, 2 * kd.kd_loss(student, teacher))
    with pytest.raises(ValueError, match="divergence must be one of"):
        kd.kd_loss(student, teacher, divergence="twice_kl")


POINTS = [0.05, 0.2, 0.45, 0.9]
PARAMETERS = {
    "alpha_beta": [kd.AlphaBeta(0.2, 0.7), kd.AlphaBeta(1.5, -0.5), kd.AlphaBeta(0.0, 0.3), kd.AlphaBeta(0.5, 0.0)],
    "jsd": [kd.JSD(0.5), kd.JSD(0.1)],
}


@pytest.mark.parametrize("name", [*kd.divergences.names(), "dual_soft_ce"])
def test_the_flags_of_a_divergence_are_what_its_formula_says(name):
    cls = by_name(name)
    for divergence in PARAMETERS.get(name, [cls()]):

        def f(p, q, divergence=divergence):
            logs = (torch.tensor([[x]], dtype=torch.float64).log() for x in (p, q))
            return formulas.TABLE[name](*logs, *divergence.params()).item()

        scaled = [abs(f(0.3 * p, 0.3 * q) - 0.3 * f(p, q)) < 1e-12 for p in POINTS for q in POINTS]
        assert not cls.homogeneous or all(scaled)
        finite = f(0.0, 1.0) != float("inf")
        assert cls.finite_without_teacher in (None, finite)
        if cls.linear_without_teacher:
            assert finite and all(abs(f(0.0, q) - q * f(0.0, 1.0)) < 1e-12 for q in POINTS)
    # A flag that is not set says that the fact does not hold, for some parameters.
    if not cls.homogeneous:
        assert not all(scaled)
    if not cls.linear_without_teacher:
        assert not finite or any(abs(f(0.0, q) - q * f(0.0, 1.0)) > 1e-12 for q in POINTS)


HEADER = Path(__file__).parents[1] / "csrc" / "include" / "kdkernels" / "options.h"
STRUCTS = {
    "dense_fwd": "Dense",
    "pixel_fwd": "Pixel",
    "topk_fwd": "Topk",
    "dkd_fwd": "Dkd",
    "mse_fwd": "Mse",
    "capture_topk": "Capture",
    "token_fwd": "Token",
    "token_bwd": "Token",
}


@pytest.mark.skipif(not HEADER.exists(), reason="an installed package has no C++ sources beside it")
def test_ops_and_the_cpp_have_one_order_of_numbers_and_choices():
    found = {}
    pattern = r"struct (\w+)(?: : (\w+))? \{\s*\w+ ([^;]+);"
    for name, base, fields in re.findall(pattern, HEADER.read_text()):
        found[name] = (*found.get(base, ()), *re.split(r",\s*", fields))
    for op, name in STRUCTS.items():
        assert found[f"{name}Numbers"] == ops.NUMBERS[op]
        assert found.get(f"{name}Choices", ()) == ops.CHOICES[op]
    # A name's place is its value in C++.
    args = HEADER.with_name("args.h").read_text()
    tails = re.search(r"enum class Tail \{ ([^}]*) \}", args)[1].split(", ")
    spelt = [re.sub(r"(?<!^)([A-Z])", r"_\1", tail[1:]).lower() for tail in tails]
    assert tuple(spelt) == get_args(choices.Tail)


@pytest.mark.parametrize("op", ops.NUMBERS)
def test_options_that_were_packed_have_their_names_again(op):
    options = {name: 0.5 + k for k, name in enumerate(ops.NUMBERS[op])}
    options |= {name: choices.CODES[name][-1] if name in choices.CODES else True for name in ops.CHOICES[op]}
    options["ignore_index"] = -7
    # Of some ops it is an argument of its own.
    packed = ops.packed(op, options if "stats" in options or not ops.CHOICES[op] else {**options, "stats": False})
    assert packed.pop("stats", False) is False
    named = ops.named(op, packed.pop("numbers"), packed.pop("choices"))
    assert {**packed, **named} == options


def test_names_of_other_libraries_and_positional_options_are_answered():
    s = torch.randn(3, 7)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        kd.kd_loss(s, s, T=2.0)
    with pytest.raises(TypeError, match="did you mean 'kd_weight'"):
        kd.KDLoss(alpha=0.5)
    with pytest.raises(TypeError, match="got an unexpected option 'alpha'$"):
        kd.logit_mse_loss(s, s, alpha=0.5)
    with pytest.raises(TypeError, match="labels must be a torch.Tensor, got float; options, temperature among them"):
        kd.kd_loss(s, s, 2.0)
    with pytest.raises(TypeError, match="KDLoss takes keywords alone, such as temperature=2.0, got 2.0"):
        kd.KDLoss(2.0)
    with pytest.raises(TypeError, match="taid_loss needs the option 'interpolation'"):
        kd.taid_loss(s, s)
    with pytest.raises(TypeError, match=r"student must be a torch.Tensor, got SimpleNamespace; pass its \.logits"):
        kd.kd_loss(SimpleNamespace(logits=s), s)
    with pytest.raises(ValueError, match=r"teacher_ids must have shape \(3, K\) with K >= 1"):
        kd.topk_kd_loss(s, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))


def test_a_mask_of_anything_but_0_and_1_is_an_error():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="mask must hold 0 and 1, got -100: are they tokens, or labels"):
        kd.onpolicy.k2(x, x, mask=torch.tensor([[5, 1, -100], [1, 1, 0]]))
    kd.onpolicy.k2(x, x, mask=torch.tensor([[1, 1, 0], [1, 1, 0]]))
