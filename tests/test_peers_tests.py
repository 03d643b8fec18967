"""Tests that other packages of this kind have: point masses, exact zeros from above, no fallback, bytes held, -inf."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import kdkernels as kd
from kdkernels import divergences, launch, reference, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
N, V, K = 6, 50, 4
LABELS = torch.tensor([3, -100, 0, 49, 7, 3])


def sparse(teacher):
    return kd.capture_topk(teacher, K)[:2]


# Every loss of logits, as ``loss(student, teacher, **options)``.
LOSSES = {
    "kd": lambda s, t, **o: kd.kd_loss(s, t, **o),
    "kd-labels": lambda s, t, **o: kd.kd_loss(s, t, LABELS, ce_weight=0.5, temperature=2.0, **o),
    "jsd": lambda s, t, **o: kd.kd_loss(s, t, divergence="jsd", **o),
    "rows": lambda s, t, **o: kd.kd_loss(s, t, row_weight=torch.linspace(1, 2, N), **o),
    "topk": lambda s, t, **o: kd.topk_kd_loss(s, *sparse(t), LABELS, **o),
    "topk-both": lambda s, t, **o: kd.topk_kd_loss(s, *sparse(t), tail="renormalize_both", **o),
    "dkd": lambda s, t, **o: kd.dkd_loss(s, t, LABELS, **o),
    "mse": lambda s, t, **o: kd.logit_mse_loss(s, t, LABELS, **o),
    "taid": lambda s, t, **o: kd.taid_loss(s, t, LABELS, interpolation=0.3, **o),
}
MASKED = ["kd-labels", "topk", "dkd", "mse", "taid"]
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def logits(dtype, rows=N):
    return (x.to(DTYPES[dtype]) for x in testing.make_inputs("normal", rows, V, torch.float32))


# Point masses.


def point_masses(dtype, low=-torch.inf):
    """Both sure of one token and agreed, both sure and not agreed, only the teacher sure, only the student."""
    student, teacher = logits(dtype, rows=4)
    for rows, tensor, token in (((0, 1, 3), student, 5), ((0, 2), teacher, 5), ((1,), teacher, 8)):
        for row in rows:
            tensor[row] = low
            tensor[row, token] = 1.0
    return student, teacher


@pytest.mark.parametrize("low", [-torch.inf, -1e4], ids=["-inf", "-1e4"])
@pytest.mark.parametrize("divergence", divergences.names())
@dtypes
def test_point_masses_by_the_textbook(divergence, dtype, low, backend):
    testing.check_kd_loss(*point_masses(dtype, low), divergence=divergence, backend=backend)


# The value of a formula for one point against the same point, and for two different points.
TWO_POINTS = {
    "forward_kl": (0.0, math.inf),
    "reverse_kl": (0.0, math.inf),
    "jeffreys": (0.0, math.inf),
    "soft_ce": (0.0, math.inf),
    "jsd": (0.0, math.log(2)),
    "tvd": (0.0, 1.0),
    "skew_kl": (0.0, -math.log(0.1)),
    "skew_reverse_kl": (0.0, -math.log(0.1)),
}


@pytest.mark.parametrize("divergence", TWO_POINTS)
@dtypes
def test_point_masses_by_hand(divergence, dtype, backend):
    student, teacher = point_masses(dtype)
    agree, apart = TWO_POINTS[divergence]
    found = testing.evaluate(
        lambda s, t: kd.kd_loss(s, t, divergence=divergence, reduction="none", backend=backend),
        student,
        teacher,
        torch.ones(4),
    )
    assert abs(found.loss[0] - agree) < 2e-6
    assert found.loss[1] == apart or abs(found.loss[1] - apart) < 2e-6
    # Nothing can move a student that has no probability to give.
    assert found.dstudent[0].abs().max() < 1e-6
    if math.isfinite(apart):
        assert torch.isfinite(found.dstudent).all()


@dtypes
def test_point_masses_of_the_other_losses(dtype, backend):
    student, teacher = point_masses(dtype)
    options = {"reduction": "none", "backend": backend}
    for tail, apart in (("bucket", math.inf), ("renormalize_both", 0.0), ("drop", math.inf), ("renormalize", math.inf)):
        # One id with all mass.
        ids, logprobs = torch.tensor([[5], [8], [5], [8]]), torch.zeros(4, 1)
        rows = kd.topk_kd_loss(student, ids, logprobs, tail=tail, **options)
        alone = -torch.log_softmax(student[2].double(), -1)[5] if tail != "renormalize_both" else 0.0
        assert abs(rows[0]) < 1e-6 and abs(rows[2] - alone) < 1e-5
        if tail != "renormalize_both":
            assert rows[1] == apart and rows[3] == apart
    taid = kd.taid_loss(student[:1], teacher[:1], interpolation=0.3, **options)
    assert taid == 0
    # Sure of the label alone, and as far as finite logits go: no other class is left to differ in.
    student, teacher = point_masses(dtype, low=-1e4)
    labels = torch.tensor([5, 5, 5, 5])
    rows = kd.dkd_loss(student, teacher, labels, alpha=1.0, beta=8.0, **options)
    assert rows[0].abs() < 1e-4 and torch.isfinite(rows).all() and rows[1] > 1e3
    assert kd.logit_mse_loss(student, teacher, **options)[0] == 0


# Exact zeros from above.


@losses
@dtypes
def test_a_grad_output_of_0_gives_0(loss, dtype, backend):
    student, teacher = logits(dtype)
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, -0.0])
    with testing.poisoned_memory():
        rows = testing.evaluate(lambda s, t: loss(s, t, reduction="none", backend=backend), student, teacher, upstream)
        ones = testing.evaluate(
            lambda s, t: loss(s, t, reduction="none", backend=backend), student, teacher, upstream * 0 + 1
        )
        none = testing.evaluate(lambda s, t: loss(s, t, backend=backend), student, teacher, torch.tensor(0.0))
    assert not rows.dstudent[upstream == 0].any() and not none.dstudent.any()
    expected = ones.dstudent.double() * upstream.double()[:, None]
    torch.testing.assert_close(rows.dstudent.double(), expected, rtol=2 * torch.finfo(student.dtype).eps, atol=1e-7)
    assert rows.dstudent[0].any() and rows.dstudent[3].any()


@pytest.mark.parametrize("graph", [False, True], ids=["", "retained"])
@pytest.mark.parametrize("loss", [LOSSES[name] for name in MASKED], ids=MASKED)
@dtypes
def test_rows_that_do_not_count_give_0_whatever_comes_from_above(loss, dtype, graph, backend):
    student, teacher = logits(dtype)
    student[1] = torch.nan
    leaf = student.requires_grad_()
    with testing.poisoned_memory():
        rows = loss(leaf, teacher, reduction="none", backend=backend)
        rows.backward(torch.tensor([1.0, 3.0, 0.0, 1.0, 1.0, 1.0]), retain_graph=graph)
    assert rows[1] == 0 and not leaf.grad[1:3].any() and torch.isfinite(leaf.grad).all() and leaf.grad[0].any()


# No fallback.


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Ops(TorchDispatchMode):
    """The ops that run, those with a result as large as logits, and what went in and out of those of a loss."""

    def __init__(self):
        super().__init__()
        self.names, self.large, self.calls = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        self.names.append(name)
        computes = name.startswith("kdkernels.") and ("_fwd_" in name or "_loss_" in name)
        given = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), (args, kwargs)) if computes else None
        result = function(*args, **kwargs)
        results = tensors(result)
        self.large += [name for x in results if x.numel() == N * V]
        if computes:
            self.calls.append((function, given, [x.detach().clone() for x in results]))
        return result


def ops_of(loss, student, teacher, **options):
    leaf = student.clone().requires_grad_()
    with Ops() as ran:
        value = loss(leaf, teacher, **options)
        value = value if value.dim() == 0 else value.sum()
        (grad,) = torch.autograd.grad(value, leaf)
    return ran, value.detach(), grad


# Plain PyTorch's way to a distribution, or to a distance.
ARITHMETIC = re.compile(r"aten\.(_log_softmax|_softmax|exp|log|mul|sub)\.")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@losses
@dtypes
def test_the_op_that_ran_is_the_one_asked_for(loss, dtype, reduction, compiled_cpu):
    student, teacher = logits(dtype)
    options = {"reduction": reduction}
    for name in ("cpu", "auto"):
        ran, value, grad = ops_of(loss, student, teacher, backend=name, **options)
        mine = {op for op in ran.names if op.startswith("kdkernels.") and "capture" not in op}
        patterns = [op for op in mine if "_fwd_" in op or "_loss_" in op]
        assert len(ran.calls) == 1 and len(patterns) == 1 and patterns[0].endswith("_cpu.default")
        assert not any(map(ARITHMETIC.match, ran.large)), ran.large
        # The same call again, by hand: the same bits.
        function, (args, kwargs), result = ran.calls[0]
        again = function(*args, **kwargs)
        assert len(result) == len(tensors(again)) and all(map(torch.equal, result, tensors(again)))
        if dtype != "fp16":
            # In fp16 the loss's constants are applied to what the op made.
            buffers = [x for x in tensors((args, again)) if x.numel() == student.numel()]
            assert any(torch.equal(x.reshape_as(grad), grad) for x in buffers)
    plain, expected, slow = ops_of(loss, student, teacher, backend="torch", **options)
    assert not plain.calls and any(map(ARITHMETIC.match, plain.large))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad.double(), slow.double(), rtol=1e-2, atol=2e-3)


@losses
def test_the_reference_is_not_even_called(loss, monkeypatch, compiled_cpu):
    forbid_the_reference(monkeypatch)
    student, teacher = logits("fp32")
    for name in ("cpu", "auto"):
        testing.evaluate(lambda s, t, name=name: loss(s, t, backend=name), student, teacher)
    with pytest.raises(AssertionError, match="plain PyTorch"):
        loss(student, teacher, backend="torch")


def test_the_reference_is_not_even_called_by_the_losses_on_hidden_states(monkeypatch, compiled_cpu):
    forbid_the_reference(monkeypatch)
    hidden, head = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    ids, logprobs = sparse(torch.randn(N, V))
    for call in (
        lambda **o: kd.linear_kd_loss(hidden, head, hidden.detach(), head.detach() * 2, **o),
        lambda **o: kd.linear_topk_kd_loss(hidden, head, ids, logprobs, **o),
        lambda **o: kd.linear_topk_kd_loss(hidden, head, ids, logprobs, tail="renormalize_both", **o),
    ):
        for name in ("cpu", "auto"):
            torch.autograd.grad(call(backend=name), (hidden, head))
        with pytest.raises(AssertionError, match="plain PyTorch"):
            call(backend="torch")


def forbid_the_reference(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("plain PyTorch was asked")

    for name in ("dense_rows", "topk_rows"):
        monkeypatch.setattr(reference, name, forbidden)
    for pattern in launch._PAIRS:
        monkeypatch.setitem(launch._PAIRS, pattern, forbidden)


# Bytes that are held between forward and backward.


class Held(TorchDispatchMode):
    """Every storage that an op made, by weak reference, and its size."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tensors(result):
            storage = x.untyped_storage()
            self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self, *without):
        mine = {x.untyped_storage()._cdata for x in without}
        return sum(size for key, (ref, size) in self.made.items() if not ref.expired() and key not in mine)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "taid"])
@dtypes
def test_only_the_gradient_is_held_after_forward(loss, dtype, inplace, compiled_cpu):
    student, teacher = logits(dtype)
    leaf = student.clone().requires_grad_()
    logits_of_a_model, saved = leaf * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        value = LOSSES[loss](logits_of_a_model, teacher, backend="cpu", inplace=inplace)
    expected = 0 if inplace else student.nbytes
    distinct = {x.untyped_storage().data_ptr(): x.nbytes for x in saved}
    distinct.pop(logits_of_a_model.untyped_storage().data_ptr(), None)
    rest = sum(distinct.values()) - expected
    # A number, or one per row.
    assert 0 <= rest <= 8 * N
    value.backward()
    assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("loss", LOSSES)
@dtypes
def test_no_other_storage_outlives_the_forward(loss, dtype, compiled_cpu):
    student, teacher = logits(dtype)
    leaf = student.clone().requires_grad_()
    LOSSES[loss](leaf, teacher, backend="cpu")  # what is remembered of a call is so now
    with Held() as held:
        value = LOSSES[loss](leaf, teacher, backend="cpu")
    assert student.nbytes <= held.bytes(value, leaf, teacher, LABELS) <= student.nbytes + 8 * N
    (grad,) = torch.autograd.grad(value, leaf)
    del value
    assert held.bytes(grad, leaf, teacher, LABELS) <= 8


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_only_gradients_are_held_by_the_losses_on_hidden_states(bias, compiled_cpu):
    hidden, head, shift = torch.randn(40, 8), torch.randn(300, 8), torch.randn(300) if bias else None
    leaves = [x.requires_grad_() for x in (hidden, head, shift) if x is not None]
    teacher = torch.randn(40, 8), torch.randn(300, 8)
    with Held() as held:
        value = kd.linear_kd_loss(hidden, head, *teacher, student_bias=shift, chunk_bytes=5000, backend="cpu")
    assert sum(x.nbytes for x in leaves) <= held.bytes(value, *leaves, *teacher) <= sum(x.nbytes for x in leaves) + 64
    value.backward()


# Columns that are -inf in both models, beside the formulas of other packages.


def kl_div(student, teacher):
    """The code of tutorials: ``F.kl_div`` of log-probabilities."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(s, t, reduction="none", log_target=True).sum(-1)


def generalized_jsd(beta):
    """The generalised JSD in log-probabilities, the mixture by logsumexp, as GKD trainers have it."""

    def loss(student, teacher):
        s, t = student.log_softmax(-1), teacher.log_softmax(-1)
        m = torch.logsumexp(torch.stack([s + math.log(1 - beta), t + math.log(beta)]), 0)
        return (beta * (t.exp() * (t - m)) + (1 - beta) * (s.exp() * (s - m))).sum(-1)

    return loss


def jsd_in_probabilities(beta):
    """The same in probabilities, the mixture by its logarithm, as fused JSD kernels have it."""

    def loss(student, teacher):
        q, p = student.softmax(-1), teacher.softmax(-1)
        m = beta * p + (1 - beta) * q
        return (beta * p * p.log() + (1 - beta) * q * q.log() - m * m.log()).sum(-1)

    return loss


PEERS = {
    "forward_kl": (kd.ForwardKL(), kl_div),
    "reverse_kl": (kd.ReverseKL(), lambda s, t: kl_div(t, s)),
    "jsd-0.5": (kd.JSD(0.5), generalized_jsd(0.5)),
    "jsd-0.1": (kd.JSD(0.1), generalized_jsd(0.1)),
    "jsd-probs-0.9": (kd.JSD(0.9), jsd_in_probabilities(0.9)),
    "tvd": (kd.TVD(), lambda s, t: 0.5 * (s.softmax(-1) - t.softmax(-1)).abs().sum(-1)),
    "soft_ce": (kd.SoftCE(), lambda s, t: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)),
}


@pytest.mark.parametrize("low", ["-inf", "lowest"])
@pytest.mark.parametrize("peer", PEERS)
@dtypes
def test_columns_that_both_models_rule_out(peer, dtype, low, backend):
    """The result is the peer's formula on the other columns; over all of them most of the formulas are NaN."""
    divergence, formula = PEERS[peer]
    student, teacher = logits(dtype)
    out = torch.arange(V) % 3 == 1
    out[[0, V - 1]] = True
    student[:, out] = teacher[:, out] = -torch.inf if low == "-inf" else torch.finfo(student.dtype).min
    got = testing.evaluate(
        lambda s, t: kd.kd_loss(s, t, divergence=divergence, reduction="none", backend=backend),
        student, teacher, torch.linspace(1, 2, N),
    )  # fmt: skip
    truth = testing.evaluate(formula, student[:, ~out].double(), teacher[:, ~out].double(), torch.linspace(1, 2, N))
    rounding = torch.finfo(student.dtype).eps
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.dstudent[:, ~out].double(), truth.dstudent, rtol=2 * rounding, atol=2e-6)
    assert not got.dstudent[:, out].any()
    if low == "-inf" and peer != "tvd":
        assert formula(student.double(), teacher.double()).isnan().all()


@dtypes
def test_columns_that_both_models_rule_out_in_the_other_losses(dtype, backend):
    student, teacher = logits(dtype)
    out = torch.arange(V) % 3 == 1
    labels = torch.tensor([3, -100, 0, 48, 6, 3])
    places = (~out).long().cumsum(0) - 1
    student[:, out] = teacher[:, out] = -torch.inf
    calls = {
        "dkd": lambda s, t, y: kd.dkd_loss(s, t, y, reduction="none", backend=backend),
        "taid": lambda s, t, y: kd.taid_loss(s, t, y, interpolation=0.3, reduction="none", backend=backend),
        "topk": lambda s, t, y: kd.topk_kd_loss(s, *sparse(t), y, ce_weight=0.5, reduction="none", backend=backend),
    }
    for name, call in calls.items():
        got = testing.evaluate(lambda s, t, call=call: call(s, t, labels), student, teacher, torch.ones(N))
        kept = torch.where(labels == -100, -100, places[labels.clamp(min=0)])
        few = [x[:, ~out].contiguous() for x in (student, teacher)]
        truth = testing.evaluate(lambda s, t, call=call, y=kept: call(s, t, y), *few, torch.ones(N))
        rounding = torch.finfo(student.dtype).eps
        torch.testing.assert_close(got.loss, truth.loss, rtol=1e-5, atol=2e-6, msg=name)
        torch.testing.assert_close(got.dstudent[:, ~out], truth.dstudent, rtol=2 * rounding, atol=2e-6, msg=name)
        assert not got.dstudent[:, out].any(), name


# Log-probabilities of tokens, as TRL tests its `selective_log_softmax` and its chunked head.


@dtypes
@pytest.mark.parametrize("k", [None, 1, 8])
def test_selected_log_probabilities(k, dtype, backend):
    """Those of the softmax in fp64 to 1e-6, of 16-bit logits too, where TRL's are rounded to 16 bits."""
    x = torch.randn(4, 32, 1024).to(DTYPES[dtype])
    ids = torch.randint(0, 1024, (4, 32) if k is None else (4, 32, k))
    found = kd.token_logprobs(x, ids, backend=backend).logprobs
    expected = x.double().log_softmax(-1).gather(-1, ids if k else ids[..., None]).reshape(ids.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_log_probabilities_from_hidden_states_in_chunks(dtype, temperature, backend):
    """Values, entropy and both gradients; of the entropy too, which in TRL's chunks has none."""
    hidden = torch.randn(64, 32).to(DTYPES[dtype]).requires_grad_()
    weight = torch.randn(128, 32).to(DTYPES[dtype]).requires_grad_()
    ids = torch.randint(0, 128, (64,))
    found = kd.linear_token_logprobs(
        hidden, weight, ids, temperature=temperature, entropy=True, chunk_bytes=20 * 128 * 4, backend=backend
    )
    logp = (hidden.double() @ weight.double().t() / temperature).log_softmax(-1)
    expected = logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    margin = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 1e-2}[dtype]
    for value, exact in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=min(margin, 1e-6), atol=min(margin, 1e-5))
    for results in ((found.logprobs, expected[0]), (found.entropy, expected[1])):
        grads = [torch.autograd.grad(item.sum(), (hidden, weight), retain_graph=True) for item in results]
        for grad, exact in zip(*grads, strict=True):
            assert (grad.double() - exact.double()).norm() < margin * exact.double().norm()


def over_support(student, teacher, k, beta, tail):
    """The loss of TRL's IW-OPD trainer, a row at a time, on the top k of the teacher, the student, or of both."""
    losses = []
    for q, p in zip(student.softmax(-1), teacher.softmax(-1), strict=True):
        tops = [set(x.topk(k).indices.tolist()) for x, used in ((p, beta < 1), (q, beta > 0)) if used]
        support = sorted(set.union(*tops))
        q, p = q[support], p[support]
        if tail:
            q, p = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (q, p))
        else:
            q, p = q / q.sum(), p / p.sum()
        m = p if beta == 1 else q if beta == 0 else beta * p + (1 - beta) * q
        kl_p, kl_q = (p * (p / m).log()).sum(), (q * (q / m).log()).sum()
        losses.append(kl_p if beta == 0 else kl_q if beta == 1 else beta * kl_p + (1 - beta) * kl_q)
    return torch.stack(losses)


def teachers_top(student, teacher, k, backend):
    return kd.capture_topk(teacher, k, backend=backend)


def students_top(student, teacher, k, backend):
    ids = kd.capture_topk(student, k, backend=backend).ids
    return kd.gather_logprobs(teacher, ids, backend=backend)


def union_of_tops(student, teacher, k, backend):
    ids = torch.cat([kd.capture_topk(logits, k, backend=backend).ids for logits in (teacher, student)], -1)
    return kd.gather_logprobs(teacher, ids, backend=backend)  # an id of both counts once


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
@pytest.mark.parametrize("support, beta", [(teachers_top, 0.0), (students_top, 1.0), (union_of_tops, 0.3)])
def test_supports_of_the_teacher_the_student_and_both(support, beta, tail, backend):
    """As docs/guide/on-policy.md has them."""
    student, teacher = (x.double().requires_grad_() for x in testing.make_inputs("normal", N, V, torch.float32))
    top = support(student.detach(), teacher.detach(), K, backend)
    given = {"tail_logprob": top.tail_logprob} if tail == "bucket" else {}
    options = {"divergence": kd.JSD(beta), "tail": tail, "reduction": "none", "backend": backend, **given}
    loss = kd.topk_kd_loss(student, top.ids, top.logprobs, **options)
    expected = over_support(student, teacher, K, beta, tail == "bucket")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    grads = [torch.autograd.grad(item.sum(), student, retain_graph=True)[0] for item in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
