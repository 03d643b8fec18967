"""Losses that one op of the CPU makes from end to end, against the ways they take otherwise."""

import pytest
import torch

import kdkernels as kd
from kdkernels import checks, functional, ops, testing
from kdkernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.load_error() is not None, reason=f"the CPU extension: {cpu.load_error()}")

B, L, V, K = 3, 5, 70, 4
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def nothing_known():
    """And an output that is not written shows."""
    functional._known_calls.clear()
    with testing.poisoned_memory():
        yield


def make(shape=(B, L, V), dtype=FLOAT):
    student, teacher = testing.make_inputs("normal", B * L, V, dtype)
    return student.reshape(shape), teacher.reshape(shape)


def make_labels():
    labels = torch.randint(0, V, (B, L))
    labels[0, 1] = labels[2, 4] = -100
    return labels


def make_sparse(student, dtype=FLOAT):
    ids = torch.stack([torch.randperm(student.shape[-1])[:K] for _ in range(B * L)]).reshape(B, L, K)
    ids[0, 0, 1] = -1
    return ids, (torch.randn(B, L, K).log_softmax(-1) - 0.1).to(dtype)


def taken():
    """True if one op made the calls of this test."""
    [known] = functional._known_calls.values()
    return known.summed is not None


def otherwise(monkeypatch):
    """From here on no call is."""
    functional._known_calls.clear()
    monkeypatch.setattr(functional, "_summed_call", lambda call: None)


def compare(monkeypatch, loss, student):
    """Loss and gradient of a call and of the next like it, beside those of the general way."""

    def evaluate():
        leaf = student.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        return value.detach(), leaf.grad

    found = [evaluate() for _ in range(2)]
    assert taken()
    otherwise(monkeypatch)
    expected, gradient = evaluate()
    assert not taken()
    for value, grad in found:
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(grad, gradient), "the same kernel with the same arguments"
    assert torch.equal(found[0][0], found[1][0])


OPTIONS = {
    "": {},
    "divergence": {"divergence": kd.AlphaBeta(0.4, 0.7)},
    "temperature": {"temperature": 1.7, "teacher_temperature": 0.6},
    "no T^2": {"temperature": 3.0, "scale_by_t_squared": False},
    "weights": {"kd_weight": 0.25, "z_loss_weight": 0.01, "row_weight": 0.5},
    "sum": {"reduction": "sum"},
    "batchmean": {"reduction": "batchmean"},
    "normalizer": {"normalizer": 7.0},
    "vocab_size": {"vocab_size": V - 3},
    "softcap": {"student_softcap": 4.0},
}
DENSE = {
    **OPTIONS,
    "log_probs": {"teacher_form": "log_probs"},
    "teacher_softcap": {"teacher_softcap": 2.0},
    "standardize": {"standardize": True},
}
LABELLED = {
    "": {},
    "ce": {"ce_weight": 0.3, "label_smoothing": 0.1},
    "ignore_index": {"ce_weight": 0.3, "ignore_index": 2},
    "sum": {"ce_weight": 0.3, "reduction": "sum", "row_weight": 2.0},
    "normalizer": {"normalizer": 7.0},
}
TAILS = {
    "bucket": {"tail": "bucket"},
    "renormalize": {"tail": "renormalize", "temperature": 2.0},
    "renormalize_both": {"tail": "renormalize_both", "temperature": 2.0, "divergence": "reverse_kl"},
    "uniform": {"tail": "uniform", "teacher_temperature": 0.7},
    "drop": {"tail": "drop", "divergence": kd.JSD(0.3)},
}


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE)
def test_every_option_of_kd_loss(options, monkeypatch):
    student, teacher = make()
    compare(monkeypatch, lambda s: kd.kd_loss(s, teacher, **options), student)


def test_probabilities_of_a_teacher(monkeypatch):
    student, teacher = make()
    teacher = teacher.softmax(-1)
    compare(monkeypatch, lambda s: kd.kd_loss(s, teacher, teacher_form="probs"), student)


@pytest.mark.parametrize("options", LABELLED.values(), ids=LABELLED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_labels(options, dtype, monkeypatch):
    student, teacher = make()
    labels = make_labels().to(dtype)
    labels[labels == -100] = options.get("ignore_index", -100)
    compare(monkeypatch, lambda s: kd.kd_loss(s, teacher, labels, **options), student)
    # Others in the next step of a loop count otherwise.
    functional._known_calls.clear()
    monkeypatch.undo()
    results = []
    for count in (B, 1):
        labels[count:] = options.get("ignore_index", -100)
        results.append(kd.kd_loss(student, teacher, labels=labels, **options))
    assert taken()
    otherwise(monkeypatch)
    torch.testing.assert_close(results[-1], kd.kd_loss(student, teacher, labels, **options), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [*OPTIONS.values(), *TAILS.values()], ids=[*OPTIONS, *TAILS])
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
def test_every_option_of_topk_kd_loss(options, labelled, monkeypatch):
    student, _ = make()
    ids, logprobs = make_sparse(student[..., : V - 3])
    options = {"tail": "uniform", **options}
    labels = make_labels().clamp(max=V - 4) if labelled else None
    options |= {"ce_weight": 0.4} if labelled else {}
    compare(monkeypatch, lambda s: kd.topk_kd_loss(s, ids, logprobs, labels, **options), student)


def test_a_captured_tail(monkeypatch):
    student, teacher = make()
    ids, logprobs, tail = kd.capture_topk(teacher, K)
    compare(monkeypatch, lambda s: kd.topk_kd_loss(s, ids, logprobs, tail_logprob=tail), student)
    functional._known_calls.clear()
    monkeypatch.undo()
    # One with a tail is not taken for one without, nor for one with another tail.
    losses = [kd.topk_kd_loss(student, ids, logprobs, tail_logprob=t) for t in (tail, None, tail - 1.0, tail)]
    assert losses[0] == losses[3] and losses[0] != losses[2] != losses[1]
    with pytest.raises(ValueError, match="tail_logprob must have shape"):
        kd.topk_kd_loss(student, ids, logprobs, tail_logprob=tail[:1])
    with pytest.raises(ValueError, match="tail_logprob"):
        kd.topk_kd_loss(student, ids, logprobs, tail_logprob=torch.full_like(tail, float("nan")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, teacher_dtype, monkeypatch):
    student, teacher = make(dtype=dtype)
    teacher = teacher.to(teacher_dtype)
    loss = kd.kd_loss(student, teacher)
    assert loss.dtype == checks.sum_dtype(student) and loss.shape == ()
    functional._known_calls.clear()
    compare(monkeypatch, lambda s: kd.kd_loss(s, teacher, temperature=2.0), student)


VIEWS = {
    "two dimensions": lambda x: x.reshape(B * L, V),
    "a slice": lambda x: torch.cat([x, x], 1)[:, 2 : 2 + L],
    "padded rows": lambda x: torch.cat([x, x], -1)[..., :V],
    "rows first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one row": lambda x: x[:1, :1],
    "no rows": lambda x: x[:0],
    "one column": lambda x: x[..., 1:2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("inplace", [False, True])
def test_shapes_and_strides(view, inplace, monkeypatch):
    base, teacher = make()
    teacher = view(teacher)

    def call():
        student = view(base.clone()).requires_grad_()
        loss = kd.kd_loss(student, teacher, reduction="sum", inplace=inplace)
        loss.backward()
        assert student.grad.shape == student.shape
        if inplace:
            assert torch.equal(student.detach(), student.grad) and student._version > 0
        return loss.detach(), student.grad.clone()

    found = [call(), call()]
    assert taken()
    otherwise(monkeypatch)
    loss, grad = call()
    assert torch.isfinite(loss)
    for got in found:
        torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=1e-7)
        assert torch.equal(got[1], grad)


def test_what_takes_the_general_way():
    student, teacher = make()
    calls = {
        "rows": lambda: kd.kd_loss(student, teacher, reduction="none"),
        "statistics": lambda: kd.kd_loss(student, teacher, return_stats=True),
        "one dimension": lambda: kd.kd_loss(student[0, 0], teacher[0, 0]),
        "four": lambda: kd.kd_loss(student[None], teacher[None]),
        "plain PyTorch": lambda: kd.kd_loss(student, teacher, backend="torch"),
    }
    for name, call in calls.items():
        functional._known_calls.clear()
        call()
        assert not taken(), name
    functional._known_calls.clear()
    kd.kd_loss(student, [teacher, teacher])
    kd.kd_loss(student, teacher, temperature=torch.ones(B, L))
    kd.kd_loss(student, teacher.clone().requires_grad_())
    assert not functional._known_calls


@pytest.mark.parametrize("remembered", [False, True])
def test_one_tensor_as_both_models_gets_both_gradients(remembered):
    student = make((B * L, V))[0].requires_grad_()
    if remembered:
        kd.kd_loss(student.detach(), student.detach(), temperature=1.0, teacher_temperature=2.0)
    kd.kd_loss(student, student, temperature=1.0, teacher_temperature=2.0).backward()
    exact = student.detach().clone().requires_grad_()
    kd.kd_loss(exact, exact, temperature=1.0, teacher_temperature=2.0, backend="torch").backward()
    torch.testing.assert_close(student.grad, exact.grad, rtol=1e-4, atol=1e-8)


def test_without_a_gradient():
    student, teacher = make()
    with_grad = kd.kd_loss(student.clone().requires_grad_(), teacher)
    assert with_grad.grad_fn is not None
    with torch.no_grad():
        without = kd.kd_loss(student.clone().requires_grad_(), teacher)
    with torch.inference_mode():
        inference = kd.kd_loss(student, teacher)
    plain = kd.kd_loss(student, teacher)
    assert taken() and not any(x.requires_grad for x in (without, inference, plain))
    assert torch.equal(with_grad, without) and torch.equal(with_grad, inference) and torch.equal(with_grad, plain)


def test_backward_in_all_its_forms():
    base, teacher = make()
    student = base.clone().requires_grad_()
    kd.kd_loss(student, teacher).backward()
    once = student.grad.clone()
    student.grad = None
    loss = kd.kd_loss(student, teacher)
    assert taken()
    # The graph is kept: every backward has a gradient of its own.
    grads = [torch.autograd.grad(loss * factor, student, retain_graph=True)[0] for factor in (1.0, 3.0, 1.0)]
    for grad, factor in zip(grads, (1.0, 3.0, 1.0), strict=True):
        torch.testing.assert_close(grad, factor * once, rtol=1e-6, atol=0)
    assert len({grad.data_ptr() for grad in grads}) == 3
    (0.5 * loss).backward()
    torch.testing.assert_close(student.grad, 0.5 * once, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    # Accumulation over two losses.
    student.grad = None
    (kd.kd_loss(student, teacher) + kd.kd_loss(student, teacher)).backward()
    torch.testing.assert_close(student.grad, 2 * once, rtol=1e-6, atol=0)


def test_nan_stays_in_its_row():
    student, teacher = make()
    student = student.clone()
    student[1, 2, 3] = float("nan")
    student.requires_grad_()
    loss = kd.kd_loss(student, teacher)
    loss.backward()
    assert taken() and loss.isnan()
    wrong = student.grad.isnan().any(-1)
    assert wrong[1, 2] and wrong.sum() == 1


def test_sums_are_made_in_fp64():
    """Many rows of one loss add up to it: a sum in fp32 one after the other would be off by 1e-4."""
    student, teacher = torch.tensor([[0.3, 0.0]]), torch.tensor([[0.0, 0.1]])
    one = kd.kd_loss(student, teacher, reduction="sum")
    rows = 2**20 + 3
    many = kd.kd_loss(student.expand(rows, 2), teacher.expand(rows, 2), reduction="sum")
    assert many.item() == pytest.approx(rows * one.double().item(), rel=1e-7)


def pack(student, **changes):
    alike = {
        "divergence": "forward_kl", "param0": 0.0, "param1": 0.0, "vocab_size": V, "ignore_index": -100,
        "temperature": 2.0, "teacher_temperature": 2.0, "kd_weight": 1.0, "ce_weight": 0.0, "z_loss_weight": 0.0,
        "label_smoothing": 0.0, "scale_by_t_squared": True, "student_softcap": 0.0,
    }  # fmt: skip
    dense = {"teacher_form": "logits", "teacher_softcap": 0.0, "standardize": False}
    if "tail" in changes:
        return ops.op("topk_call", "cpu")(student, **{**alike, "min_tail": 0.0, "tail_rounding": 0.0, **changes})
    return ops.op("dense_call", "cpu")(student, **{**alike, **dense, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"call": torch.zeros(8, dtype=torch.uint8)}, "call must be what the op for calls returned"),
        ({"student": torch.zeros(V)}, r"student must be \[B, L, V\] or \[N, V\]"),
        ({"student": torch.zeros(B, L, V - 1)}, "vocab_size must be in"),
        ({"teacher": torch.zeros(B, L + 1, V)}, "teacher must have the student's rows"),
        ({"teacher": torch.zeros(B * L, V)}, "teacher must have the student's rows"),
        ({"teacher": torch.zeros(B, L, V - 1)}, "teacher must have .* at least vocab_size columns"),
        ({"teacher": torch.zeros(B, L, 2 * V)[..., ::2]}, "unit stride"),
        ({"dstudent": torch.zeros(B, L, V + 1)}, "dstudent must have the student's shape"),
        ({"dstudent": torch.zeros(B, L, V).double()}, "dstudent must have the student's shape and dtype"),
        ({"labels": torch.zeros(B * L, dtype=torch.int32)}, "labels must be contiguous int64"),
        ({"ce_weight": 1.0}, "ce_weight needs labels"),
        ({"divergence": "unknown"}, "does not know the divergence unknown"),
    ],
)
def test_the_op_itself_refuses_what_would_break_memory(change, message):
    """Below kd_loss, where nothing has been checked yet."""
    student, teacher = make()
    call = {"student": student, "dstudent": None, "teacher": teacher, "labels": None}
    call |= {name: value for name, value in change.items() if name in call}
    with pytest.raises(RuntimeError, match=message):
        packed = change.get("call")
        if packed is None:
            packed = pack(student, **{name: value for name, value in change.items() if name not in call})
        ops.op("dense_loss", "cpu")(
            call["student"], call["dstudent"], packed, 1.0, True, call["teacher"], call["labels"]
        )


def test_a_packed_call_of_the_other_kind_is_refused():
    student, teacher = make()
    with pytest.raises(RuntimeError, match="call must be what"):
        ops.op("dense_loss", "cpu")(student, None, pack(student, tail="bucket"), 1.0, True, teacher, None)
    with pytest.raises(RuntimeError, match="does not know the tail"):
        pack(student, tail="unknown")


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["", "dstudent"])
def test_opcheck(needs_grad, given):
    student, teacher = make()
    ids, logprobs = (x.reshape(B * L, K) for x in make_sparse(student))
    common = (torch.zeros_like(student) if given else None,)
    labels = make_labels().reshape(-1)
    call = pack(student)
    torch.library.opcheck(ops.op("dense_loss", "cpu"), (student, *common, call, 0.5, needs_grad, teacher, labels))
    call = pack(student, tail="uniform")
    arguments = (student, *common, call, 0.5, needs_grad, ids, logprobs, labels, None)
    torch.library.opcheck(ops.op("topk_loss", "cpu"), arguments)
