"""Errors that teach: the page that lists them is the code's, and names that were meant are told."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kdkernels as kd

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "errors.md"
# Kernels and programs; what they raise is no error of a public function.
WITHOUT = ("kernels", "testing.py", "__main__.py", "cli.py", "bench", "build_info.py")


def text_of(node, names):
    """The text of an expression, with ``…`` for what is known when it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, names) + text_of(node.right, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{\w*\}", "…", text_of(node.func.value, names))
    return names.get(node.id, "…") if isinstance(node, ast.Name) else "…"


def errors_of(source):
    """The kind and text of every error that a module makes."""
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and len(node.targets) == 1]
        names = {
            node.targets[0].id: text_of(node.value, {}) for node in assigned if isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(function):
            call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and call.func.id.endswith("Error")
                and call.args
            ):
                text = re.sub("…+", "…", text_of(call.args[0], names))
                if text != "…":
                    yield call.func.id, text


def errors():
    folder = Path(kd.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        if path.relative_to(folder).parts[0] not in WITHOUT:
            yield from errors_of(path.read_text())


def rows(text):
    """Kind, text and cure of the page's tables."""
    for line in text.splitlines():
        if match := re.fullmatch(r"\| (\w+Error) \| (.+?) \| (.+?) \|", line):
            yield match[1], match[2].replace("\\|", "|").strip("`"), match[3]


def test_the_page_has_every_error_with_its_cure_and_no_other():
    listed = list(rows(PAGE.read_text()))
    raised = set(errors())
    # As the page writes it, but for the cure.
    missing = [
        f"| {kind} | `{text.replace('|', chr(92) + '|')}` | cure |" for kind, text in raised - {r[:2] for r in listed}
    ]
    assert sorted(missing) == []
    assert sorted({row[:2] for row in listed} - raised) == []
    assert len(listed) == len({row[:2] for row in listed}) > 200
    assert all(len(cure) > 8 for _, _, cure in listed)


def test_the_reading_of_errors():
    source = """
def f(x):
    m = f"{x} is small"
    if x:
        raise ValueError(m + f", got {x}{y}")
    return TypeError("a {} b".format(x))
"""
    assert set(errors_of(source)) == {("ValueError", "… is small, got …"), ("TypeError", "a … b")}
    assert list(rows("| ValueError | `a \\| b` | Do that. |\n| no | error | here |")) == [
        ("ValueError", "a | b", "Do that.")
    ]


S, T = torch.randn(2, 3, 5)
OPTIONS = {
    "average": ({"reduction": "average"}, "got 'average'; did you mean 'mean'?"),
    "kl": ({"divergence": "kl"}, "got 'kl'; did you mean 'forward_kl'?"),
    "forward-kl": ({"divergence": "forward-kl"}, "got 'forward-kl'; did you mean 'forward_kl'?"),
    "TVD": ({"divergence": "TVD"}, "got 'TVD'; did you mean 'tvd'?"),
    "logprobs": ({"teacher_form": "logprobs"}, "got 'logprobs'; did you mean 'log_probs'?"),
    "eager": ({"backend": "eager"}, "got 'eager'; did you mean 'torch'?"),
    "akl": ({"divergence": "akl"}, "got 'akl'; did you mean 'mixed_kl'?"),
    "nothing": ({"reduction": "xyzzy"}, "got 'xyzzy'$"),
}
KEYWORDS = {
    "T": "unexpected option 'T'; did you mean 'temperature'?",
    "temprature": "did you mean 'temperature'?",
    "alpha": "did you mean 'kd_weight'?",
    "beta": r"unexpected option 'beta'; here it is divergence=kdkernels.JSD\(beta\)",
    "reverse": r"unexpected option 'reverse'; here it is divergence=kdkernels.MixedKL\(reverse\)",
    "lmbda": "here it is nothing: it is a trainer's share of on-policy data",
    "log_target": "here it is teacher_form='log_probs'",
    "num_items_in_batch": "here it is normalizer",
    "weight_hard_loss": "here it is ce_weight",
    "xyzzy": "got an unexpected option 'xyzzy'$",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_choice_that_was_meant_is_told(name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        kd.kd_loss(S, T, **options)


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_that_was_meant_is_told(name):
    with pytest.raises(TypeError, match=KEYWORDS[name].replace("?", r"\?")):
        kd.kd_loss(S, T, **{name: 1.0})


def test_dkd_has_an_alpha_and_a_beta_of_its_own():
    assert kd.dkd_loss(S, T, torch.tensor([0, 1, 2]), alpha=1.0, beta=8.0) > 0


def test_a_function_that_was_meant_is_told():
    with pytest.raises(AttributeError, match=r"has no attribute 'kdloss'; did you mean '\w+'\?"):
        kd.kdloss  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'xyzzy'$"):
        kd.xyzzy  # noqa: B018
    assert not hasattr(kd, "__path_of_nothing__")


MAPS, LABELS = torch.randn(2, 2, 5, 4, 6), torch.zeros(2, 4, 6, dtype=torch.long)
H, W = torch.randn(3, 4), torch.randn(5, 4)
Output = SimpleNamespace
CALLS = {
    "maps without dim": (lambda: kd.kd_loss(*MAPS, LABELS), "where classes are in dimension 1, kd_loss takes dim=1"),
    "maps of two sizes": (
        lambda: kd.kd_loss(MAPS[0], MAPS[1, :, :, :2], dim=1),
        r"the student's shape \(2, 5, 4, 6\), got \(2, 5, 2, 6\)",
    ),
    "maps of another loss": (
        lambda: kd.dkd_loss(*MAPS, LABELS, dim=1),
        r"the classes are the last dimension, as in x.movedim\(dim, -1\).contiguous\(\)",
    ),
    "soft labels": (lambda: kd.kd_loss(S, T, T.softmax(-1)), "a teacher, with teacher_form='probs'"),
    "one-hot labels": (lambda: kd.kd_loss(S, T, T.long()), r"of one-hot rows labels.argmax\(-1\)"),
    "a tail as labels": (
        lambda: kd.topk_kd_loss(S, *kd.capture_topk(T, 2)),
        "numbers of rows go by their names, such as row_weight or tail_logprob",
    ),
    "class weights": (lambda: kd.kd_loss(S, T, class_weight=T[0]), r"here it is row_weight=w\[labels\]"),
    "a teacher's probabilities": (
        lambda: kd.kd_loss(S, T.softmax(-1), teacher_form="log_probs"),
        "teacher must hold log-probabilities for teacher_form='log_probs', got probabilities: pass their logarithm",
    ),
    "the second teacher's": (
        lambda: kd.kd_loss(S, [T.log_softmax(-1), T.bfloat16().softmax(-1)], teacher_form="log_probs"),
        r"teacher\[1\] must hold log-probabilities for teacher_form='log_probs'",
    ),
    "a student's probabilities": (
        lambda: kd.kd_loss(S.softmax(-1), T, student_form="log_probs"),
        "student must hold log-probabilities for student_form='log_probs'",
    ),
    "logits in place of hidden states": (
        lambda: kd.linear_kd_loss(S, T),
        "teacher_hidden is required unless kd_weight is the number 0",
    ),
    "a model's output": (
        lambda: kd.linear_kd_loss(Output(last_hidden_state=H, logits=S), W, H, W),
        "student_hidden must be a torch.Tensor, got SimpleNamespace; pass its .last_hidden_state",
    ),
    "another's": (
        lambda: kd.linear_kd_loss(H, W, Output(hidden_states=(H, H), logits=S), W),
        r"pass its .hidden_states\[-1\]",
    ),
    "all layers": (lambda: kd.linear_kd_loss((H, H), W, H, W), r"got tuple; pass the last of them, \[-1\]"),
    "a mask of columns": (
        lambda: kd.kd_loss(S, torch.randn(3, 9), teacher_columns=torch.arange(9) < 5),
        r"teacher_columns must be int64 or int32, got bool: of a mask they are mask.nonzero\(\)\[:, 0\]",
    ),
    "an id of the teacher's padding": (
        lambda: kd.topk_kd_loss(S, *kd.capture_topk(torch.randn(3, 900), 8)[:2]),
        r"got \d+; capture a teacher that is padded wider with vocab_size=...$",
    ),
    "another width": (
        lambda: kd.logit_mse_loss(S, torch.randn(3, 6)),
        "pass vocab_size=... when the two are padded to different widths$",
    ),
    "another width of kd_loss": (
        lambda: kd.kd_loss(S, torch.randn(3, 6)),
        "to different widths, teacher_columns=... when their columns differ$",
    ),
    "probabilities of tokens": (
        lambda: kd.onpolicy.policy_gradient(S, S.softmax(-1)),
        "teacher_logprobs must be natural log-probabilities, at most 0, got only numbers above 0: pass p.log",
    ),
    "a mask of floats": (
        lambda: kd.onpolicy.k2(S, T, mask=torch.ones(3, 5)),
        r"got float32: pass mask.bool\(\) where it is 0 and 1; weights multiply the losses instead",
    ),
    "a server's temperature": (
        lambda: kd.topk_kd_loss(S, *kd.capture_topk(T, 2)[:2], temperature=2.0),
        r"a server's have temperature 1\) and pass teacher_temperature=1.0, or choose tail 'uniform', 'renormalize' or",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_was_meant_otherwise_is_told_how(call):
    function, message = CALLS[call]
    with pytest.raises((TypeError, ValueError), match=message):
        function()


@pytest.mark.parametrize("log_probs", [torch.tensor([[0.0]]), torch.tensor([[0.0, -torch.inf]]), S.relu() + 0.1])
def test_log_probabilities_are_none_by_their_sum_alone(log_probs):
    """A sure teacher, one of a single class, and logits that are all above 0: nothing of them adds up to 1."""
    student = torch.zeros_like(log_probs)
    assert torch.isfinite(kd.kd_loss(student, log_probs, teacher_form="log_probs"))


@pytest.mark.parametrize("name", ["teacher_columns", "standardize", "teacher_bias"])
def test_an_option_of_kd_loss_alone_is_told_as_that(name):
    with pytest.raises(TypeError, match=f"^dkd_loss got an unexpected option {name!r}; kdkernels.kd_loss has it$"):
        kd.dkd_loss(S, T, torch.tensor([0, 1, 2]), **{name: None})
