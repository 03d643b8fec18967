"""Gradients in double precision by finite differences, and the manners of a good ``torch.autograd.Function``."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import divergences, testing

ROWS, VOCAB = 4, 9
ROW = torch.arange(ROWS, dtype=torch.float64)
LABELS = torch.tensor([3, -100, 0, 8])
DIVERGENCES = {name: cls() for name, cls in divergences.table().items()}
DIVERGENCES |= {
    "jsd-0.1": kd.JSD(0.1),
    "skew_kl-0.9": kd.SkewKL(0.9),
    "skew_reverse_kl-0.9": kd.SkewReverseKL(0.9),
    "alpha_beta-0.5-0": kd.AlphaBeta(0.5, 0.0),
    "alpha_beta-0-0.5": kd.AlphaBeta(0.0, 0.5),
    "alpha_beta-0.5--0.5": kd.AlphaBeta(0.5, -0.5),
    "alpha_beta-0-0": kd.AlphaBeta(0.0, 0.0),
    "alpha_beta-1.5--0.5": kd.AlphaBeta(1.5, -0.5),
}
all_divergences = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def logits(seed=0, dtype=torch.float64):
    student, teacher = testing.make_inputs("normal", ROWS, VOCAB, torch.float64, seed)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def gradcheck(function, *inputs):
    """By finite differences, in fp64."""
    return torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_a_loss_without_any_term_has_a_gradient_of_0(backend):
    student, teacher = logits(dtype=torch.float32)
    logprobs, ids = torch.log_softmax(teacher, -1).topk(3)
    options = {"kd_weight": 0.0, "temperature": 2.0, "backend": backend}
    for loss in (
        lambda: kd.kd_loss(student, teacher, LABELS, **options),
        lambda: kd.topk_kd_loss(student, ids, logprobs, LABELS, teacher_temperature=1.0, **options),
    ):
        value = loss()
        (grad,) = torch.autograd.grad(value, student)
        assert value == 0 and not grad.any()


@all_divergences
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck_of_every_divergence(divergence, reduction, backend):
    student, teacher = logits()
    options = {"divergence": divergence, "temperature": 1.5, "reduction": reduction, "backend": backend}
    assert gradcheck(lambda s: kd.kd_loss(s, teacher, LABELS, **options), student)


@all_divergences
def test_gradcheck_of_student_and_teacher_at_once(divergence, backend):
    """Mutual learning: the teacher learns too, by the dual of the divergence, at a temperature of its own."""
    student, teacher = logits()
    options = {"divergence": divergence, "temperature": 1.5, "teacher_temperature": 0.8, "reduction": "none"}
    options |= {"row_weight": ROW + 0.5, "ce_weight": 0.3, "backend": backend}
    assert gradcheck(lambda s, t: kd.kd_loss(s, t, LABELS, **options), student, teacher.requires_grad_())
    # The teacher alone.
    assert gradcheck(lambda t: kd.kd_loss(student.detach(), t, LABELS, **options), teacher)


OPTIONS = {
    "temperature-rows": {"temperature": 0.5 + ROW, "teacher_temperature": 2.0 - 0.4 * ROW},
    "row_weight": {"row_weight": ROW - 1.0},
    "row_param": {"divergence": "jsd", "row_param": 0.2 + 0.2 * ROW},
    "row_param-skew": {"divergence": "skew_reverse_kl", "row_param": 0.2 + 0.2 * ROW},
    "ce": {"ce_weight": 0.7, "temperature": 3.0},
    "ce-T1": {"ce_weight": 0.7, "divergence": "reverse_kl"},
    "ce-T2": {"ce_weight": 0.7, "temperature": 2.0, "divergence": "jsd"},
    "ce-only": {"ce_weight": 0.7, "kd_weight": 0.0},
    "smoothing": {"ce_weight": 0.7, "label_smoothing": 0.2},
    "z": {"z_loss_weight": 0.3, "temperature": 2.0},
    "no-T2": {"temperature": 2.0, "scale_by_t_squared": False},
    "softcap": {"student_softcap": 3.0, "teacher_softcap": 4.0, "ce_weight": 0.5, "z_loss_weight": 0.1},
    "standardize": {"standardize": True, "temperature": 2.0, "ce_weight": 0.5},
    "standardize-softcap": {"standardize": True, "student_softcap": 5.0, "divergence": "reverse_kl"},
    "vocab_size": {"vocab_size": VOCAB - 2, "ce_weight": 0.0},
    "normalizer": {"normalizer": torch.tensor(17), "reduction": "sum"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_every_option(options, backend):
    student, teacher = logits()
    labels = torch.where(LABELS == 8, 2, LABELS)
    options = {"reduction": "none", **options, "backend": backend}
    assert gradcheck(lambda s: kd.kd_loss(s, teacher, labels, **options), student)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_the_teacher_with_every_option(options, backend):
    student, teacher = logits()
    labels = torch.where(LABELS == 8, 2, LABELS)
    options = {"reduction": "none", **options, "backend": backend}
    if options.get("kd_weight") == 0:
        loss = kd.kd_loss(student, teacher.requires_grad_(), labels, **options).sum()
        (grad,) = torch.autograd.grad(loss, teacher, allow_unused=True, materialize_grads=True)
        assert not grad.any()
    else:
        assert gradcheck(lambda t: kd.kd_loss(student.detach(), t, labels, **options), teacher.requires_grad_())


@pytest.mark.parametrize("form", ["log_probs", "probs"])
def test_gradcheck_of_a_teacher_given_by_probabilities(form):
    student, teacher = logits()
    # Flat, so that no probability is small beside the step of finite differences.
    given = torch.log_softmax(teacher, -1) if form == "log_probs" else torch.softmax(teacher / 5, -1)
    options = {"divergence": "jsd", "temperature": 1.5, "teacher_form": form, "reduction": "none"}
    assert gradcheck(lambda s, t: kd.kd_loss(s, t, **options), student, given.requires_grad_())


@pytest.mark.parametrize("mixture", ["probs", "logits"])
def test_gradcheck_of_a_mixture_of_teachers(mixture, backend):
    student, first = logits()
    second = logits(1)[1]
    options = {"teacher_weights": [0.3, 0.7], "mixture": mixture, "temperature": 1.5, "reduction": "none"}
    assert gradcheck(lambda s: kd.kd_loss(s, [first, second], backend=backend, **options), student)
    teachers = first.requires_grad_(), second.requires_grad_()
    assert gradcheck(lambda s, t, u: kd.kd_loss(s, [t, u], **options), student, *teachers)


PATTERNS = {
    "taid": lambda s, t, b: kd.taid_loss(s, t, LABELS, interpolation=0.3, ce_weight=0.2, reduction="none", backend=b),
    "taid-rows": lambda s, t, b: kd.taid_loss(
        s, t, interpolation=ROW / 4, temperature=2.0, reduction="none", backend=b
    ),
    "dkd": lambda s, t, b: kd.dkd_loss(s, t, LABELS, temperature=2.0, reduction="none", backend=b),
    "dkd-teacher_temperature": lambda s, t, b: kd.dkd_loss(
        s, t, LABELS, alpha=2.0, beta=0.5, teacher_temperature=3.0, row_weight=ROW, reduction="none", backend=b
    ),
    "mse": lambda s, t, b: kd.logit_mse_loss(s, t, LABELS, reduction="none", backend=b),
    "mse-centered": lambda s, t, b: kd.logit_mse_loss(s, t, centered=True, vocab_size=7, backend=b),
    "uld": lambda s, t, b: kd.uld_loss(s, t, LABELS, temperature=2.0, reduction="none", backend=b),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_gradcheck_of_the_other_losses(name, backend):
    student, teacher = logits()
    if name.startswith("taid"):
        # The target moves with the student but passes no gradient, which finite differences would see.
        loss = PATTERNS[name](student, teacher, backend)
        lam = torch.full((ROWS,), 0.3, dtype=torch.float64) if name == "taid" else ROW / 4
        mixed = ((1 - lam)[:, None] * student + lam[:, None] * teacher).detach()
        options = {"labels": LABELS, "ce_weight": 0.2} if name == "taid" else {"temperature": 2.0}
        expected = testing.textbook_loss(student, mixed, reduction="none", **options)
        (grad,), (slope,) = (torch.autograd.grad(x, student, ROW - 1.5) for x in (loss, expected))
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-12)
    else:
        assert gradcheck(lambda s: PATTERNS[name](s, teacher, backend), student)


# The manners of a Function.


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_may_be_called_again_where_the_graph_is_kept(reduction, dtype, backend):
    student, teacher = logits(dtype=dtype)
    loss = kd.kd_loss(student, teacher, temperature=2.0, reduction=reduction, backend=backend)
    grad_output = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape)
    grads = [torch.autograd.grad(loss, student, k * grad_output, retain_graph=True)[0] for k in (1, 2, -1)]
    kept = [grad.clone() for grad in grads]
    last = torch.autograd.grad(loss, student, grad_output)[0]
    # The last call may use the kept gradient up; those handed out before stay as they are.
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, kept, strict=True))
    assert torch.equal(last, kept[0])
    torch.testing.assert_close(kept[1], 2 * kept[0], rtol=1e-2, atol=0)
    assert torch.equal(kept[2], -kept[0])


def test_backward_without_the_graph_raises_the_second_time(backend):
    student, teacher = logits()
    loss = kd.kd_loss(student, teacher, backend=backend)
    loss.backward()
    first = student.grad.clone()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert torch.equal(student.grad, first)


def test_losses_of_one_student_add_up(backend):
    """Two losses share logits, and an earlier gradient is there already: buffers must not be mixed up."""
    student, teacher = logits()
    other = logits(1)[1]
    student.grad = torch.ones_like(student)
    first = kd.kd_loss(student, teacher, divergence="jsd", backend=backend)
    second = kd.kd_loss(student, other, temperature=2.0, backend=backend)
    (3 * first + second + student.square().sum()).backward()
    expected = testing.evaluate(
        lambda s, t: (
            3 * testing.textbook_loss(s, t, divergence="jsd")
            + testing.textbook_loss(s, other, temperature=2.0)
            + s.square().sum()
        ),
        student,
        teacher,
    )
    torch.testing.assert_close(student.grad, expected.dstudent + 1, rtol=1e-10, atol=1e-12)


def test_gradients_flow_through_what_made_the_logits(backend):
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(3, VOCAB).double()
    teacher = torch.randn(5, VOCAB, dtype=torch.float64)

    def loss(hidden, weight, bias):
        student = torch.nn.functional.linear(hidden, weight, bias)
        return kd.kd_loss(student, teacher, divergence="reverse_kl", temperature=2.0, backend=backend)

    assert gradcheck(loss, hidden, head.weight, head.bias)


def test_nothing_is_computed_for_who_needs_no_gradient(backend):
    student, teacher = logits()
    with torch.no_grad():
        loss = kd.kd_loss(student, teacher, backend=backend)
    assert not loss.requires_grad and loss.grad_fn is None
    loss = kd.kd_loss(student.detach(), teacher, backend=backend)
    assert not loss.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(kd.kd_loss(student.detach(), teacher, backend=backend), loss)
    # A teacher under no_grad gets none, and costs nothing.
    with torch.no_grad():
        assert not kd.kd_loss(student, teacher.clone().requires_grad_(), backend=backend).requires_grad


def test_the_teacher_gets_a_gradient_only_when_it_asks(backend):
    student, teacher = logits()
    kd.kd_loss(student, teacher, backend=backend).backward()
    assert teacher.grad is None
    teacher.requires_grad_()
    kd.kd_loss(student, teacher, backend=backend).backward()
    assert teacher.grad.any()
    only = teacher.detach().requires_grad_()
    kd.kd_loss(student.detach(), only, backend=backend).backward()
    torch.testing.assert_close(only.grad, teacher.grad)


def test_statistics_have_no_gradient(backend):
    student, teacher = logits()
    loss, stats = kd.kd_loss(student, teacher, return_stats=True, backend=backend)
    assert loss.requires_grad and not any(column.requires_grad for column in stats)
    loss.backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, backend):
    student, teacher = logits()
    (expected,) = torch.autograd.grad(kd.kd_loss(student, teacher, backend=backend), student)
    loss = checkpoint(lambda s: kd.kd_loss(s * 1.0, teacher, backend=backend), student, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close(student.grad, expected)


def test_saved_tensors_may_be_moved_away(backend):
    student, teacher = logits()
    (expected,) = torch.autograd.grad(kd.kd_loss(student, teacher, backend=backend), student)
    with torch.autograd.graph.save_on_cpu():
        loss = kd.kd_loss(student, teacher, backend=backend)
    loss.backward()
    torch.testing.assert_close(student.grad, expected)


def test_threads_do_not_disturb_each_other(backend):
    cases = [logits(seed) for seed in range(8)]
    expected = [torch.autograd.grad(kd.kd_loss(s, t, backend=backend), s)[0] for s, t in cases]
    found = [None] * len(cases)

    def work(index):
        student, teacher = cases[index]
        for _ in range(20):
            found[index] = torch.autograd.grad(kd.kd_loss(student, teacher, backend=backend), student)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("divergence", divergences.table())
def test_the_number_of_threads_does_not_change_the_result(divergence):
    """A row is one thread's work: its sums are made in one order."""
    student, teacher = testing.make_inputs("normal", 64, 3000, torch.float32)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(testing.evaluate(lambda s, t: kd.kd_loss(s, t, divergence=divergence), student, teacher))
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome.loss, outcomes[0].loss, rtol=1e-6, atol=0)
        assert torch.equal(outcome.dstudent, outcomes[0].dstudent)


def test_autocast_leaves_the_arithmetic_alone(backend):
    student, teacher = logits(dtype=torch.float32)
    plain = kd.kd_loss(student, teacher, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd.kd_loss(student, teacher, backend=backend)
        head = torch.nn.Linear(VOCAB, VOCAB)
        half = kd.kd_loss(head(student), teacher, backend=backend)  # bf16 student, fp32 teacher
    assert loss.dtype == half.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    half.backward()
    assert head.weight.grad.dtype == torch.float32 and torch.isfinite(head.weight.grad).all()
