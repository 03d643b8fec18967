"""Weights of the loss's terms, one per row: distillation here, labels there, or no teacher at all."""

import pytest
import torch

import kdkernels as kd
from kdkernels import backends, testing

N, V = 7, 133
BACKENDS = ["cpu", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = backends.BACKENDS[request.param].why_not("cpu")
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def rows():
    torch.manual_seed(0)
    student, teacher = torch.randn(N, V) * 3, torch.randn(N, V) * 3
    labels = torch.randint(0, V, (N,))
    labels[3] = -100
    weights = {"kd_weight": torch.rand(N), "ce_weight": torch.rand(N), "z_loss_weight": torch.rand(N) / 10}
    weights["kd_weight"][1] = weights["ce_weight"][2] = weights["z_loss_weight"][0] = 0
    return student, teacher, labels, weights


def graded(loss, student, *args, **options):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *args, **options)
    value.sum().backward()
    return value.detach().double(), leaf.grad.double()


def close(found, expected, dtype=torch.float32):
    rtol, atol = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (1e-2, 2e-3), torch.float16: (2e-3, 2e-4)}[dtype]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "jeffreys"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
def test_losses_and_gradients_by_the_book(backend, rows, dtype, divergence, temperature):
    student, teacher, labels, weights = rows
    student, teacher = student.to(dtype), teacher.to(dtype)
    options = {"divergence": divergence, "temperature": temperature, "label_smoothing": 0.1, "reduction": "none"}
    found = graded(kd.kd_loss, student, teacher, labels, **options, **weights, backend=backend)
    wide = graded(testing.textbook_loss, student.double(), teacher.double(), labels, **options, **weights)
    close(found, wide, dtype)


@pytest.mark.parametrize("name", ["kd_weight", "ce_weight", "z_loss_weight"])
def test_one_value_for_all_rows_is_a_number(backend, rows, name):
    student, teacher, labels, _ = rows
    options = {"ce_weight": 0.3, "backend": backend}
    for tensor in (torch.tensor(0.7), torch.full((N,), 0.7)):
        close(
            graded(kd.kd_loss, student, teacher, labels, **{**options, name: tensor}),
            graded(kd.kd_loss, student, teacher, labels, **{**options, name: 0.7}),
        )


def test_rows_of_distillation_beside_rows_of_labels(backend, rows):
    """The loss that masks make of two calls."""
    student, teacher, labels, _ = rows
    distilled = (torch.arange(N) % 2).float()
    both = {"kd_weight": distilled, "ce_weight": 1 - distilled, "reduction": "sum", "backend": backend}

    def two_calls(student, *args):
        counted = (labels != -100) * distilled
        kl = kd.kd_loss(student, teacher, row_weight=counted, reduction="sum", backend=backend)
        only = torch.where(distilled == 0, labels, -100)
        return kl + torch.nn.functional.cross_entropy(student, only, reduction="sum")

    close(graded(kd.kd_loss, student, teacher, labels, **both), graded(two_calls, student))


def test_a_term_of_weight_0_counts_nothing_be_it_nan(backend, rows):
    student, teacher, labels, weights = rows
    teacher[1] = torch.nan
    loss, gradient = graded(kd.kd_loss, student, teacher, labels, reduction="none", backend=backend, **weights)
    assert loss.isfinite().all() and gradient.isfinite().all()
    weights["kd_weight"][1] = 1e-3
    loss, gradient = graded(kd.kd_loss, student, teacher, labels, reduction="none", backend=backend, **weights)
    assert loss.isnan().nonzero().flatten().tolist() == [1] and gradient[1].isnan().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_teacher_s_gradient_is_weighed_alike(backend, rows, divergence):
    student, teacher, labels, weights = rows
    options = {"divergence": divergence, "temperature": 2.0}

    def gradient(loss, student, teacher, **backend):
        leaf = teacher.clone().requires_grad_()
        loss(student.clone().requires_grad_(), leaf, labels, **options, **weights, **backend).backward()
        return leaf.grad.double()

    found = gradient(kd.kd_loss, student, teacher, backend=backend)
    close([found], [gradient(testing.textbook_loss, student.double(), teacher.double())])


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_both", "uniform", "drop"])
def test_sparse_teachers(backend, rows, tail):
    student, teacher, labels, weights = rows
    ids, logprobs, _ = kd.capture_topk(teacher, 9)
    options = {"tail": tail, "label_smoothing": 0.1, "reduction": "none", "backend": backend}
    call = {"loss": kd.topk_kd_loss, "student": student}
    # A loss is linear in its weights.
    parts = []
    for name in weights:
        alone = {"kd_weight": 0.0, "ce_weight": 0.0, "z_loss_weight": 0.0, name: 1.0}
        loss, gradient = graded(**call, **options, **alone, labels=labels, teacher_ids=ids, teacher_logprobs=logprobs)
        parts.append((loss * weights[name], gradient * weights[name][:, None]))
    expected = [sum(part) for part in zip(*parts, strict=True)]
    close(graded(**call, **options, **weights, labels=labels, teacher_ids=ids, teacher_logprobs=logprobs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_states(backend, rows, dtype):
    _, _, labels, weights = rows
    hidden, head = torch.randn(N, 8).to(dtype), (torch.randn(V, 8) / 4).to(dtype)
    of_teacher = torch.randn(N, 8).to(dtype), (torch.randn(V, 8) / 4).to(dtype)
    options = {**weights, "reduction": "sum", "temperature": 2.0}

    def of_logits(hidden, *_, labels, backend):
        logits, targets = hidden @ head.double().T, of_teacher[0].double() @ of_teacher[1].double().T
        return testing.textbook_loss(logits, targets, labels, **options)

    found = graded(kd.linear_kd_loss, hidden, head, *of_teacher, labels=labels, backend=backend, **options)
    close(found, graded(of_logits, hidden.double(), labels=labels, backend=backend), dtype)


def test_statistics_are_of_terms_without_their_weights(backend, rows):
    student, teacher, labels, weights = rows
    options = {"return_stats": True, "reduction": "none", "backend": backend}
    _, found = kd.kd_loss(student, teacher, labels, **options, **weights)
    _, expected = kd.kd_loss(student, teacher, labels, ce_weight=1.0, **options)
    counted = (labels != -100) & (weights["ce_weight"] != 0)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x[counted], y[counted], rtol=1e-5, atol=1e-6)


def test_what_is_no_weight_is_an_error(backend, rows):
    student, teacher, labels, _ = rows
    for name in ("kd_weight", "ce_weight", "z_loss_weight"):
        for bad, message in (
            (torch.full((N,), -1.0), f"{name} must"),
            (torch.full((N,), torch.inf), f"{name} must"),
            (torch.ones(N + 1), f"{name} must be a number or have one value per row"),
            (torch.ones(N, requires_grad=True), f"{name} must not require grad"),
        ):
            with pytest.raises(ValueError, match=message):
                kd.kd_loss(student, teacher, labels, backend=backend, **{name: bad})
    with pytest.raises(ValueError, match="labels are required"):
        kd.kd_loss(student, teacher, backend=backend, ce_weight=torch.ones(N))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_teacher(backend, rows, smoothing, inplace):
    student, _, labels, _ = rows
    options = {"kd_weight": 0.0, "ce_weight": 0.7, "label_smoothing": smoothing, "backend": backend}

    def ours(student):
        student = student * 1.0 if inplace else student
        return kd.kd_loss(student, None, labels, inplace=inplace, **options)

    def eager(student):
        return 0.7 * torch.nn.functional.cross_entropy(student, labels, label_smoothing=smoothing)

    close(graded(ours, student), graded(eager, student))
    loss, stats = kd.KDLoss(return_stats=True, z_loss_weight=0.1, **options)(student, None, labels)
    assert loss > 0 and stats.divergence.isnan().all() and stats.acceptance.isnan().all()
    torch.testing.assert_close(stats.lse[labels != -100], student.logsumexp(-1)[labels != -100])


def test_hidden_states_without_a_teacher(backend, rows):
    _, _, labels, _ = rows
    hidden, head = torch.randn(N, 8), (torch.randn(V, 8) / 4).requires_grad_()
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "backend": backend}

    def grads(loss):
        leaf, head.grad = hidden.clone().requires_grad_(), None
        value = loss(leaf)
        value.backward()
        return value.detach(), leaf.grad, head.grad

    found = grads(lambda leaf: kd.linear_kd_loss(leaf, head, labels=labels, **options))
    expected = grads(lambda leaf: torch.nn.functional.cross_entropy(leaf @ head.T, labels))
    rows_of_gradient = grads(lambda leaf: kd.linear_kd_loss(leaf, head, None, None, labels, **options))
    close(found, expected)
    close(rows_of_gradient, expected)
    none = kd.linear_kd_loss(hidden.requires_grad_(), head, labels=labels, reduction="none", **options)
    close([none.sum() / (labels != -100).sum()], [expected[0]])


def test_a_teacher_that_has_a_say_must_be_there(backend, rows):
    student, _, labels, _ = rows
    for kd_weight in (1.0, torch.zeros(N)):
        with pytest.raises(TypeError, match="teacher is required unless kd_weight is the number 0"):
            kd.kd_loss(student, None, labels, kd_weight=kd_weight, backend=backend)
    with pytest.raises(ValueError, match="teacher_form has no meaning without a teacher"):
        kd.kd_loss(student, None, labels, kd_weight=0, ce_weight=1, teacher_form="probs", backend=backend)
    with pytest.raises(TypeError, match="teacher_weight is required|teacher is required"):
        kd.linear_kd_loss(torch.randn(N, 8), torch.randn(V, 8), torch.randn(N, 8), labels=labels, backend=backend)


def test_the_cross_entropy_is_told_whatever_it_weighs(backend, rows):
    student, teacher, labels, _ = rows
    counted = labels != -100
    expected = torch.nn.functional.cross_entropy(student[counted], labels[counted], reduction="none")
    _, stats = kd.kd_loss(student, teacher, labels, return_stats=True, backend=backend)
    torch.testing.assert_close(stats.ce[counted], expected)
    ids, logprobs, _ = kd.capture_topk(teacher, 5)
    _, stats = kd.topk_kd_loss(student, ids, logprobs, labels, return_stats=True, backend=backend)
    torch.testing.assert_close(stats.ce[counted], expected)
    _, stats = kd.kd_loss(student, teacher, return_stats=True, backend=backend)
    assert (stats.ce == 0).all()


def test_hidden_states_of_a_row_without_a_term_are_not_read(backend):
    hidden, head = torch.randn(3, 8), torch.randn(V, 8).requires_grad_()
    hidden[1] = torch.nan
    weight = torch.tensor([1.0, 0.0, 2.0])
    teacher = torch.randn(3, 8), torch.randn(V, 8)
    loss = kd.linear_kd_loss(
        hidden.requires_grad_(), head, *teacher, kd_weight=weight, reduction="sum", backend=backend
    )
    loss.backward()
    assert loss.isfinite() and head.grad.isfinite().all() and (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_graph(backend, rows, reduction):
    student, teacher, labels, weights = rows
    options = {"reduction": reduction, "backend": backend}
    student.requires_grad_()

    def loss(student, teacher, labels, weights):
        return kd.kd_loss(student, teacher, labels, **options, **weights).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (f(student, teacher, labels, weights) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (found, expected)))
