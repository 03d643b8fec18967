"""``torch.export``, and tensors without values: fake ones and those on "meta"."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

import kdkernels as kd

VOCAB, WIDTH, K = 23, 8, 4

LOSSES = {
    "kd": lambda x, **o: kd.kd_loss(x["student"], x["teacher"], temperature=2.0, **o),
    "kd-labels": lambda x, **o: kd.kd_loss(x["student"], x["teacher"], x["labels"], ce_weight=0.5, **o),
    "kd-rows": lambda x, **o: kd.kd_loss(
        x["student"], x["teacher"], x["labels"], temperature=x["rows"], row_weight=x["rows"], reduction="none", **o
    ),
    "kd-batchmean": lambda x, **o: kd.kd_loss(x["student"], x["teacher"], reduction="batchmean", **o),
    "mixture": lambda x, **o: kd.kd_loss(x["student"], [x["teacher"], x["teacher"]], teacher_weights=[0.3, 0.7], **o),
    "topk": lambda x, **o: kd.topk_kd_loss(x["student"], x["ids"], x["logprobs"], **o),
    "topk-labels": lambda x, **o: kd.topk_kd_loss(
        x["student"], x["ids"], x["logprobs"], x["labels"], tail="uniform", tail_logprob=x["tail"], **o
    ),
    "dkd": lambda x, **o: kd.dkd_loss(x["student"], x["teacher"], x["labels"], **o),
    "mse": lambda x, **o: kd.logit_mse_loss(x["student"], x["teacher"], **o),
    "uld": lambda x, **o: kd.uld_loss(x["student"], x["teacher"], **o),
    "mse-labels": lambda x, **o: kd.logit_mse_loss(x["student"], x["teacher"], x["labels"], centered=True, **o),
    "taid": lambda x, **o: kd.taid_loss(x["student"], x["teacher"], interpolation=0.3, **o),
    "linear": lambda x, **o: kd.linear_kd_loss(x["hidden"], x["head"], x["hidden2"], x["head2"], **o),
    "linear-labels": lambda x, **o: kd.linear_kd_loss(
        x["hidden"], x["head"], x["hidden2"], x["head2"], x["labels"], ce_weight=0.5, **o
    ),
    "linear-topk": lambda x, **o: kd.linear_topk_kd_loss(x["hidden"], x["head"], x["ids"], x["logprobs"], **o),
    "linear-columns": lambda x, **o: kd.linear_topk_kd_loss(
        x["hidden"], x["head"], x["ids"], x["logprobs"], x["labels"], tail="renormalize_both", **o
    ),
    "capture": lambda x, **o: kd.capture_topk(x["teacher"], K, **o).logprobs,
    "tokens": lambda x, **o: kd.token_logprobs(x["student"], x["labels"], temperature=2.0, **o).logprobs,
    "tokens-several": lambda x, **o: (
        kd.token_logprobs(x["student"], x["ids"], temperature=x["rows"], entropy=True, **o).entropy
    ),
    "gather": lambda x, **o: kd.gather_logprobs(x["teacher"], x["ids"], **o).tail_logprob,
}


def inputs(batch=2, length=3):
    """Tensors of every kind that a loss takes; those whose rows are ``[batch, length]`` come first."""
    student, teacher = torch.randn(batch, length, VOCAB), torch.randn(batch, length, VOCAB) * 2
    labels = torch.randint(0, VOCAB, (batch, length))
    labels[0, 0] = -100
    logprobs, ids = torch.log_softmax(teacher, -1).topk(K, -1)
    return {
        "student": student,
        "teacher": teacher,
        "labels": labels,
        "ids": ids,
        "logprobs": logprobs,
        "tail": torch.log1p(-logprobs.exp().sum(-1)),
        "rows": torch.rand(batch, length) + 0.5,
        "hidden": torch.randn(batch, length, WIDTH),
        "hidden2": torch.randn(batch, length, WIDTH),
        "head": torch.randn(VOCAB, WIDTH),
        "head2": torch.randn(VOCAB, WIDTH),
    }


class Loss(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.loss = LOSSES[name]

    def forward(self, x):
        return self.loss(x)


# Strict export takes the way of torch.compile, so that half of them are enough.
PROGRAMS = [(name, False) for name in LOSSES] + [
    (name, True) for name in ("kd", "kd-labels", "topk", "topk-labels", "dkd", "mse", "taid", "linear", "linear-labels")
]


@pytest.mark.parametrize(
    ("name", "strict"), PROGRAMS, ids=[f"{name}-{'strict' if strict else 'non-strict'}" for name, strict in PROGRAMS]
)
def test_a_program_of_a_dynamic_batch_and_length(name, strict):
    example = inputs()
    dims = {0: Dim("batch", min=2, max=4096), 1: Dim("length", min=2, max=4096)}
    shapes = {key: None if key.startswith("head") else dims for key in example}
    program = export(Loss(name), (example,), dynamic_shapes=(shapes,), strict=strict)
    for size in ((2, 3), (4, 2), (3, 7)):
        x = inputs(*size)
        torch.testing.assert_close(program.module()(x), LOSSES[name](x), rtol=1e-5, atol=1e-6)
    # Loading the library and looking what it can do are no part of the program.
    ours = [str(node.target) for node in program.graph.nodes if "kdkernels" in str(node.target)]
    assert len(ours) <= 1, ours


class Model(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.head, self.backend = torch.nn.Linear(WIDTH, VOCAB), backend

    def forward(self, hidden, teacher):
        return kd.kd_loss(self.head(hidden), teacher, temperature=2.0, backend=self.backend)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_has_the_whole_gradient_or_none(strict, backend):
    """Never one that is silently empty: plain PyTorch can be trained, and the loss of a kernel has no graph."""
    model, x = Model(backend), inputs()
    program = export(model, (x["hidden"], x["teacher"]), strict=strict).module()
    loss = program(x["hidden"], x["teacher"])
    expected = model(x["hidden"], x["teacher"])
    torch.testing.assert_close(loss, expected)
    if backend != "torch":
        assert not loss.requires_grad
        return
    grads = torch.autograd.grad(loss, list(program.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(expected, list(model.parameters())))


def with_grad(x):
    return {key: item.requires_grad_(key in ("student", "hidden", "head")) for key, item in x.items()}


def shapes_of(result):
    return [(item.shape, item.dtype) for item in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", LOSSES)
def test_tensors_without_values(name, backend):
    """Shapes and dtypes come out as of real ones, and of the gradients too; no value is asked for."""
    real = with_grad(inputs())
    expected = LOSSES[name](real, backend=backend)
    if expected.requires_grad:
        expected.sum().backward()

    def check(x, backend, device):
        result = LOSSES[name](x, backend=backend)
        assert shapes_of(result) == shapes_of(expected) and result.device.type == device
        if not expected.requires_grad:
            return
        result.sum().backward()
        for key, item in real.items():
            assert (x[key].grad is None) == (item.grad is None)
            assert item.grad is None or (x[key].grad.shape, x[key].grad.dtype) == (item.grad.shape, item.grad.dtype)

    mode = FakeTensorMode()
    fakes = with_grad({key: mode.from_tensor(item.detach()) for key, item in real.items()})
    with mode:
        check(fakes, backend, "cpu")
    if backend == "torch":
        check(with_grad({key: item.detach().to("meta") for key, item in real.items()}), "auto", "meta")


def test_what_needs_values_is_still_checked_where_they_are():
    x = inputs()
    x["labels"][0, 1] = VOCAB
    with pytest.raises(ValueError, match="labels must be in"):
        LOSSES["kd-labels"](x)
