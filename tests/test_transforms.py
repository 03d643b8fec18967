"""Second derivatives, forward mode, ``torch.func`` and hooks: right with plain PyTorch, else an error that says so."""

import pytest
import torch
from torch.autograd import forward_ad

import kdkernels as kd

N, V, K = 4, 9, 3
LABELS = torch.tensor([3, -100, 0, 8])


def sparse(teacher):
    return teacher.detach().log_softmax(-1).topk(K)[::-1]


LOSSES = {
    "kd_loss": lambda s, t, **o: kd.kd_loss(s, t, temperature=2.0, **o),
    "kd_loss-none": lambda s, t, **o: kd.kd_loss(s, t, reduction="none", **o).sum(),
    "kd_loss-stats": lambda s, t, **o: kd.kd_loss(s, t, return_stats=True, **o)[0],
    "topk_kd_loss": lambda s, t, **o: kd.topk_kd_loss(s, *sparse(t), **o),
    "dkd_loss": lambda s, t, **o: kd.dkd_loss(s, t, LABELS, **o),
    "logit_mse_loss": lambda s, t, **o: kd.logit_mse_loss(s, t, **o),
    "uld_loss": lambda s, t, **o: kd.uld_loss(s, t, **o),
    "taid_loss": lambda s, t, **o: kd.taid_loss(s, t, interpolation=0.3, **o),
}
names = pytest.mark.parametrize("name", LOSSES)
NAMES_THE_WAY_OUT = 'backend="torch"'


def make(dtype=torch.float64):
    return torch.randn(N, V, dtype=dtype, requires_grad=True), torch.randn(N, V, dtype=dtype)


@names
def test_a_gradient_penalty_is_right_or_refused(name, backend):
    """loss + |dloss/ds|^2, whose second term has a gradient of its own."""
    student, teacher = make()

    def penalised(backend):
        loss = LOSSES[name](student, teacher, backend=backend)
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        assert grad.requires_grad
        return torch.autograd.grad(loss + grad.square().sum(), student)[0]

    if backend == "torch":
        if name != "taid_loss":  # its target moves with the student and passes no gradient: finite differences see that
            assert torch.autograd.gradgradcheck(lambda s: LOSSES[name](s, teacher, backend=backend), student)
        assert torch.isfinite(penalised(backend)).all()
        return
    with pytest.raises(RuntimeError, match=NAMES_THE_WAY_OUT):
        penalised(backend)


@names
def test_a_step_that_is_differentiated_is_right_or_refused(name, backend):
    """MAML: the loss after a step of gradient descent, by the parameters before it."""
    weight = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)
    inputs, teacher = torch.randn(N, 5, dtype=torch.float64), torch.randn(N, V, dtype=torch.float64)

    def after_a_step(weight, backend):
        loss = LOSSES[name](inputs @ weight.t(), teacher, backend=backend)
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        return LOSSES[name](inputs @ (weight - 0.5 * grad).t(), teacher, backend=backend)

    if backend != "torch":
        with pytest.raises(RuntimeError, match=NAMES_THE_WAY_OUT):
            after_a_step(weight, backend).backward()
        return
    if name == "taid_loss":
        return  # as above
    assert torch.autograd.gradcheck(lambda w: after_a_step(w, backend), weight)


@names
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_right_or_refused(name, requires_grad, backend):
    student, teacher = make()
    direction = torch.randn_like(student)
    (grad,) = torch.autograd.grad(LOSSES[name](student, teacher, backend="torch"), student)
    student = student.detach().requires_grad_(requires_grad)

    def along():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(student, direction)
            return forward_ad.unpack_dual(LOSSES[name](dual, teacher, backend=backend)).tangent

    if backend == "torch":
        torch.testing.assert_close(along(), (grad * direction).sum())
    else:
        with pytest.raises(RuntimeError, match=NAMES_THE_WAY_OUT):
            along()
    # Tensors without a tangent may stand beside one that has it.
    with forward_ad.dual_level():
        LOSSES[name](student, teacher, backend=backend)


TRANSFORMS = {
    "grad": lambda f, s, v: torch.func.grad(f)(s),
    "jvp": lambda f, s, v: torch.func.jvp(f, (s,), (v,))[1],
    "vjp": lambda f, s, v: torch.func.vjp(f, s)[1](torch.ones((), dtype=s.dtype))[0],
    "jacrev": lambda f, s, v: torch.func.jacrev(f)(s),
    "jacfwd": lambda f, s, v: torch.func.jacfwd(f)(s),
    "hessian": lambda f, s, v: torch.func.hessian(f)(s),
    "vmap": lambda f, s, v: torch.func.vmap(f)(torch.stack([s, v])),
    "vmap-grad": lambda f, s, v: torch.func.vmap(torch.func.grad(f))(torch.stack([s, v])),
}


@pytest.mark.parametrize("name", ["kd_loss", "kd_loss-none", "logit_mse_loss"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_are_right_or_refused(transform, name, backend):
    student, teacher = make()
    student, direction = student.detach(), torch.randn_like(student)
    apply = TRANSFORMS[transform]
    if backend != "torch":
        with pytest.raises(RuntimeError, match=NAMES_THE_WAY_OUT):
            apply(lambda s: LOSSES[name](s, teacher, backend=backend), student, direction)
        with pytest.raises(RuntimeError, match=NAMES_THE_WAY_OUT):
            apply(lambda s: LOSSES[name](s, teacher), student, direction)
        return
    found = apply(lambda s: LOSSES[name](s, teacher, backend="torch"), student, direction)
    leaf = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(LOSSES[name](leaf, teacher, backend="torch"), leaf)
    if transform in ("grad", "vjp", "jacrev", "jacfwd"):
        torch.testing.assert_close(found, grad)
    elif transform == "jvp":
        torch.testing.assert_close(found, (grad * direction).sum())
    elif transform == "hessian":
        expected = torch.autograd.functional.hessian(lambda s: LOSSES[name](s, teacher, backend="torch"), student)
        torch.testing.assert_close(found, expected)
    elif transform == "vmap":
        torch.testing.assert_close(found[0], LOSSES[name](student, teacher, backend="torch"))
    else:
        torch.testing.assert_close(found[0], grad)


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_batched_gradients(name, dtype, backend):
    """vmap over grad_output, as ``torch.autograd.functional.jacobian(vectorize=True)`` does."""
    student, teacher = make(dtype)
    factors = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss = LOSSES[name](student, teacher, backend=backend)
    (batched,) = torch.autograd.grad(loss, student, factors, is_grads_batched=True, retain_graph=True)
    for factor, found in zip(factors, batched, strict=True):
        (expected,) = torch.autograd.grad(loss, student, factor, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_batched_gradients_of_rows(backend):
    student, teacher = make()
    rows = kd.kd_loss(student, teacher, reduction="none", backend=backend)
    (jacobian,) = torch.autograd.grad(rows, student, torch.eye(N, dtype=torch.float64), is_grads_batched=True)
    summed = kd.kd_loss(student, teacher, reduction="sum", backend=backend)
    (expected,) = torch.autograd.grad(summed, student)
    torch.testing.assert_close(jacobian.sum(0), expected)
    assert not jacobian[0, 1:].any()


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hooks_on_saved_tensors_keep_what_they_were_given(name, dtype, backend):
    """An offload cache hands out the tensor that it keeps, and must find it as it was."""
    student, teacher = make(dtype)
    kept = []

    def pack(tensor):
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        loss = LOSSES[name](student, teacher, backend=backend)
    (grad,) = torch.autograd.grad(loss, student, torch.tensor(3.0))
    grad.add_(1.0)
    assert kept
    for tensor, copy in kept:
        assert torch.equal(tensor, copy)


def test_a_teacher_in_another_precision_gets_its_gradient(backend):
    """Numbers per row are in the dtype of the student's sums, and the teacher plays the student's part."""
    rows = torch.linspace(0.5, 1.5, N)
    for dtypes in [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)]:
        student, teacher = (torch.randn(N, V).to(dtype).requires_grad_() for dtype in dtypes)
        options = {"temperature": rows, "teacher_temperature": rows + 1, "row_weight": rows, "divergence": "jsd"}
        options |= {"row_param": rows / 4, "normalizer": torch.tensor(7.0)}
        kd.kd_loss(student, teacher, backend=backend, **options).backward()
        leaves = [x.detach().double().requires_grad_() for x in (student, teacher)]
        kd.kd_loss(*leaves, backend="torch", **options).backward()
        for tensor, leaf in zip((student, teacher), leaves, strict=True):
            tolerance = 1e-2 if tensor.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(tensor.grad.double(), leaf.grad, rtol=tolerance, atol=tolerance * 1e-2)


OVERLAPPING = {
    "expanded": lambda: torch.zeros(1, V).expand(3, V),
    "rows in steps of one": lambda: torch.zeros(40).as_strided((3, V), (1, 1)),
    "rows that overlap": lambda: torch.zeros(200).as_strided((2, 3, V), (30, V - 1, 1)),
    "batches that overlap": lambda: torch.zeros(200).as_strided((2, 3, V), (2 * V, V, 1)),
    "one column": lambda: torch.zeros(3, 1, 1).expand(3, 2, 1),
}


@pytest.mark.parametrize("layout", OVERLAPPING)
def test_in_place_refuses_a_student_whose_rows_share_memory(layout):
    student = OVERLAPPING[layout]().requires_grad_()
    before = student.detach().clone()
    with pytest.raises(ValueError, match="share no memory"):
        kd.kd_loss(student, torch.randn(student.shape), inplace=True)
    assert torch.equal(student, before)


SEPARATE = {
    "transposed": lambda: torch.randn(4, 3, V).transpose(0, 1),
    "a slice": lambda: torch.randn(3, 5, V)[:, 1:4],
    "padded": lambda: torch.randn(3, V + 4)[:, :V],
    "one row, expanded over nothing": lambda: torch.randn(1, V).expand(1, V),
    "no row": lambda: torch.randn(1, V).expand(0, V),
}


@pytest.mark.parametrize("layout", SEPARATE)
def test_in_place_takes_rows_of_any_layout(layout):
    student = SEPARATE[layout]()
    teacher = torch.randn(student.shape)
    expected = student.detach().clone().requires_grad_()
    kd.kd_loss(expected, teacher).backward()
    leaf = student.requires_grad_()
    (grad,) = torch.autograd.grad(kd.kd_loss(leaf, teacher, inplace=True), leaf)
    torch.testing.assert_close(grad, expected.grad)


@pytest.mark.parametrize("loss", ["kd_loss", "dkd_loss", "logit_mse_loss", "topk_kd_loss"])
def test_in_place_needs_a_student_that_requires_grad(loss):
    student, teacher = torch.randn(N, V), torch.randn(N, V)
    before = student.clone()
    with pytest.raises(ValueError, match="requires grad"):
        LOSSES[loss](student, teacher, inplace=True)
    # No gradient is asked for: nothing is overwritten.
    with torch.no_grad():
        LOSSES[loss](student, teacher, inplace=True)
        LOSSES[loss](student.requires_grad_(), teacher, inplace=True)
    assert torch.equal(student, before)


BATCH = 3
BATCHED = torch.Generator().manual_seed(3)


def batch(*shape):
    return torch.randn(BATCH, N, *shape, generator=BATCHED, dtype=torch.float64)


def entries(logits):
    return logits.log_softmax(-1).topk(K)[::-1]


HEADS = [torch.randn(V, 5, generator=BATCHED, dtype=torch.float64) for _ in range(2)]
MASK = torch.randint(0, V, (BATCH, N), generator=BATCHED)
WITH_LABELS = MASK.masked_fill(torch.arange(N) == 1, -100)
# A call on tensors of one sample each, and these tensors.
PER_SAMPLE = {
    "labels": (lambda s, t, y, **o: kd.kd_loss(s, t, y, ce_weight=0.5, **o), [batch(V), batch(V), WITH_LABELS]),
    "row_weight": (lambda s, t, w, **o: kd.kd_loss(s, t, row_weight=w.sigmoid(), **o), [batch(V), batch(V), batch()]),
    "temperature": (lambda s, t, w, **o: kd.kd_loss(s, t, temperature=w.exp(), **o), [batch(V), batch(V), batch()]),
    "probs": (
        lambda s, t, y, **o: kd.kd_loss(s, t.softmax(-1), y, teacher_form="probs", **o),
        [batch(V), batch(V), WITH_LABELS],
    ),
    "mixture": (
        lambda s, t, w, **o: kd.kd_loss(s, [t, 2 * t], teacher_weights=w.sigmoid(), **o),
        [batch(V), batch(V), batch(2)],
    ),
    "taid_loss": (
        lambda s, t, w, **o: kd.taid_loss(s, t, interpolation=w.sigmoid(), **o),
        [batch(V), batch(V), batch()],
    ),
    "dkd_loss": (kd.dkd_loss, [batch(V), batch(V), MASK]),
    "logit_mse_loss": (kd.logit_mse_loss, [batch(V), batch(V), WITH_LABELS]),
    "topk_kd_loss": (lambda s, i, p, **o: kd.topk_kd_loss(s, i, p, **o), [batch(V), *entries(batch(V))]),
    "linear_kd_loss": (
        lambda h, t, y, **o: kd.linear_kd_loss(h, HEADS[0], t, HEADS[1], y, **o),
        [batch(5), batch(5), WITH_LABELS],
    ),
    "linear_kd_loss-row_weight": (
        lambda h, t, w, **o: kd.linear_kd_loss(h, HEADS[0], t, HEADS[1], row_weight=w.sigmoid(), **o),
        [batch(5), batch(5), batch()],
    ),
    "linear_topk_kd_loss": (
        lambda h, i, p, y, **o: kd.linear_topk_kd_loss(h, HEADS[0], i, p, y, **o),
        [batch(5), *entries(batch(V)), WITH_LABELS],
    ),
    "token_logprobs": (lambda s, i, **o: kd.token_logprobs(s, i, **o).logprobs.sum(), [batch(V), MASK]),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("wants_grad", [False, True])
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_vmap_over_any_of_the_tensors_is_right_or_refused(name, wants_grad, backend):
    """Over each alone, over all but each, and over all: the student's among them or not."""
    loss, tensors = PER_SAMPLE[name]

    def of_sample(student, *others):
        def value(student):
            return loss(student, *others, backend=backend)

        return torch.func.grad(value)(student) if wants_grad else value(student)

    count = len(tensors)
    masks = [[k == j for k in range(count)] for j in range(count)]
    for mask in [*masks, *([not batched for batched in mask] for mask in masks), [True] * count]:
        given = [item if batched else item[0] for item, batched in zip(tensors, mask, strict=True)]
        mapped = torch.func.vmap(of_sample, in_dims=tuple(0 if batched else None for batched in mask))
        if backend != "torch":
            with pytest.raises(RuntimeError, match=NAMES_THE_WAY_OUT):
                mapped(*given)
            continue
        each = [of_sample(*(t[k] if b else t for t, b in zip(given, mask, strict=True))) for k in range(BATCH)]
        torch.testing.assert_close(mapped(*given), torch.stack(each))


def test_a_loss_that_a_transform_has_nothing_to_do_with_is_a_number_there(backend):
    """Metrics within a function that is transformed; a student that wants a gradient cannot have it there."""
    student, teacher, head = torch.randn(N, V), torch.randn(N, V), torch.randn(V, V)
    losses = {
        "kd_loss": lambda s: kd.kd_loss(s, teacher, LABELS, backend=backend),
        "mixture": lambda s: kd.kd_loss(s, [teacher, student], backend=backend),
        "taid_loss": lambda s: kd.taid_loss(s, teacher, interpolation=0.3, backend=backend),
        "linear_kd_loss": lambda s: kd.linear_kd_loss(s, head, teacher, head, backend=backend),
    }
    for loss in losses.values():
        want = loss(student)
        found = torch.func.grad(lambda w, loss=loss: (w * loss(student)).sum())(torch.ones(()))
        torch.testing.assert_close(found, want)
        if backend != "torch":
            leaf = student.clone().requires_grad_()
            with pytest.raises(RuntimeError, match=NAMES_THE_WAY_OUT):
                torch.func.grad(lambda w, loss=loss, leaf=leaf: (w * loss(leaf)).sum())(torch.ones(()))
