"""Losses under other libraries' names, against the formulas of their documentation in plain PyTorch."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kdkernels.compat import axolotl, distillkit, liger, mdistiller, modelopt, specforge, speculators, torchdistill
from kdkernels.compat import sentence_transformers as st
from kdkernels.compat import torch as compat_torch
from kdkernels.compat import torchtune as tune

# PyTorch's own mean warns.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
N, V, K, D = 6, 40, 5, 8
LABELS = torch.tensor([3, -100, 0, 39, 7, 3])
MASK = LABELS != -100


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def kl(p, q):
    """Of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def jsd(p, q, beta):
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def tvd(p, q):
    return (p.exp() - q.exp()).abs().sum(-1) / 2


def agree(ours, theirs, *inputs, tolerance=1e-10):
    """The same loss, and the same gradient of every input."""
    leaves = (
        [x.detach().clone().requires_grad_() for x in inputs],
        [x.detach().clone().requires_grad_() for x in inputs],
    )
    found, expected = ours(*leaves[0]), theirs(*leaves[1])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
    weights = torch.arange(1, found.numel() + 1, dtype=torch.float64).reshape(found.shape)
    for loss in (found, expected):
        (loss * weights).sum().backward()
    for own, other in zip(*leaves, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=tolerance, atol=tolerance)


S, T = logits(N, V), logits(N, V, seed=1)
P = T.log_softmax(-1)


# PyTorch


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize("shape", [(N, V), (2, 3, V)])
def test_kl_div_is_pytorch_s(shape, reduction, log_target):
    student, target = S.reshape(shape), (P if log_target else P.exp()).reshape(shape)
    options = {"reduction": reduction, "log_target": log_target}
    agree(
        lambda s: compat_torch.kl_div(s.log_softmax(-1), target, **options),
        lambda s: F.kl_div(s.log_softmax(-1), target, **options),
        student,
    )
    log_q = student.log_softmax(-1)
    expected = torch.nn.KLDivLoss(**options)(log_q, target)
    for found in (
        compat_torch.KLDivLoss(**options)(log_q, target),
        liger.LigerKLDIVLoss(**options)(log_q, target),
        liger.liger_kl_div(log_q, target, **options),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("old", [{"size_average": False}, {"size_average": True}, {"reduce": False}])
def test_kl_div_knows_the_old_arguments(old):
    log_q = S.log_softmax(-1)
    torch.testing.assert_close(compat_torch.kl_div(log_q, P.exp(), **old), F.kl_div(log_q, P.exp(), **old))


def test_kl_div_of_logits_is_an_error():
    with pytest.raises(ValueError, match="input must be log-probabilities over its last dimension"):
        compat_torch.kl_div(S, P.exp())
    with pytest.raises(ValueError, match="input must be log-probabilities"):
        liger.LigerJSD()(S, P)


def test_kl_div_of_a_target_that_is_no_distribution_is_an_error():
    with pytest.raises(ValueError, match="add up to 1"):
        compat_torch.kl_div(S.log_softmax(-1), P.exp() * 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_log_probabilities_are_taken(dtype):
    log_q = logits(N, 32000).to(dtype).log_softmax(-1)
    loss = compat_torch.kl_div(log_q, P.new_full((N, 32000), 1 / 32000).to(torch.float32), reduction="batchmean")
    assert torch.isfinite(loss)


# Liger


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["whole", "masked"])
def test_liger_jsd(beta, labels):
    rows = MASK if labels is not None else torch.ones(N, dtype=torch.bool)
    agree(
        lambda s: liger.LigerJSD(beta)(s.log_softmax(-1), P, labels),
        lambda s: jsd(P, s.log_softmax(-1), beta)[rows].mean(),
        S,
    )


@pytest.mark.parametrize("reduction, divisor", [("batchmean", 5), ("mean", 5 * V), ("sum", 1)])
def test_liger_tvd(reduction, divisor):
    agree(
        lambda s: liger.LigerTVDLoss(reduction)(s.softmax(-1), P.exp(), LABELS),
        lambda s: tvd(P, s.log_softmax(-1))[MASK].sum() / divisor,
        S,
    )


def test_liger_tvd_of_a_student_without_probability():
    student = torch.eye(N, V).requires_grad_()
    liger.liger_tvd(student, P.exp().float()).backward()
    assert torch.isfinite(student.grad).all()


HIDDEN, HEAD, TEACHER_HIDDEN, TEACHER_HEAD = (
    logits(N, D),
    logits(V, D, seed=2),
    logits(N, 5, seed=3),
    logits(V, 5, seed=4),
)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_fused_linear_jsd(temperature):
    def theirs(hidden, head):
        p = (TEACHER_HIDDEN @ TEACHER_HEAD.T / temperature).log_softmax(-1)
        return jsd(p, (hidden @ head.T / temperature).log_softmax(-1), 0.5)[MASK].mean()

    loss = liger.LigerFusedLinearJSD(temperature=temperature)
    agree(lambda h, w: loss(h, w, TEACHER_HIDDEN, TEACHER_HEAD, LABELS), theirs, HIDDEN, HEAD)


def test_liger_chunked_jsd_mixes_half_a_cross_entropy():
    def terms(hidden, head):
        student = hidden @ head.T
        soft = jsd((TEACHER_HIDDEN @ TEACHER_HEAD.T / 2).log_softmax(-1), (student / 2).log_softmax(-1), 0.5)
        return soft[MASK].mean(), F.cross_entropy(student, LABELS)

    call = TEACHER_HIDDEN, TEACHER_HEAD, LABELS
    loss = liger.LigerFusedLinearJSDLoss(temperature=2.0)
    agree(lambda h, w: loss(h, w, *call), lambda h, w: sum(terms(h, w)) / 2, HIDDEN, HEAD)
    parts = liger.LigerFusedLinearJSDLoss(temperature=2.0, return_soft_hard_loss=True)(HIDDEN, HEAD, *call)
    torch.testing.assert_close(torch.stack(parts[1:]), torch.stack(terms(HIDDEN, HEAD)))


@pytest.mark.parametrize(
    "reduction, divisor", [("batchmean", int(MASK.sum())), ("mean", int(MASK.sum()) * V), ("sum", 1)]
)
def test_liger_fused_linear_kl_div(reduction, divisor):
    def theirs(hidden, head):
        return kl(P, (hidden @ head.T / 2).log_softmax(-1))[MASK].sum() / divisor

    loss = liger.LigerFusedLinearKLDivLoss(reduction, temperature=2.0)
    agree(lambda h, w: loss(h, w, P.exp(), LABELS), theirs, HIDDEN, HEAD)


def test_liger_fused_linear_kl_div_has_no_loss_of_each_row():
    with pytest.raises(ValueError, match="reduction must be one of mean, batchmean, sum, got 'none'"):
        liger.LigerFusedLinearKLDivLoss("none")(HIDDEN, HEAD, P.exp())


def test_liger_fused_ce_tvd():
    def theirs(s):
        rows = F.cross_entropy(s, LABELS, reduction="none"), torch.where(MASK, tvd(P, s.log_softmax(-1)), 0.0)
        return torch.stack(rows)

    agree(lambda s: torch.stack(liger.LigerFusedCETVDLoss()(s, T, LABELS)), theirs, S)


def test_padding_of_liger_s_chunked_jsd_has_no_probability():
    wide = torch.cat([TEACHER_HEAD, logits(3, 5, seed=9)])
    loss = liger.LigerFusedLinearJSDLoss(0.0, 1.0)
    narrow = loss(HIDDEN, HEAD, TEACHER_HIDDEN, TEACHER_HEAD, LABELS)
    torch.testing.assert_close(loss(HIDDEN, HEAD, TEACHER_HIDDEN, wide, LABELS), narrow)


# torchtune


def soft_ce(s, rows):
    return -(P.exp() * s.log_softmax(-1)).sum(-1)[rows]


@pytest.mark.parametrize("normalize", [True, False])
def test_torchtune(normalize):
    def reduced(rows):
        return rows.mean() if normalize else rows.sum()

    agree(lambda s: tune.ForwardKLLoss()(s, T, LABELS, normalize), lambda s: reduced(soft_ce(s, MASK)), S)
    reverse = lambda s: reduced(kl(s.log_softmax(-1), P)[MASK])  # noqa: E731
    agree(lambda s: tune.ReverseKLLoss()(s, T, LABELS, normalize), reverse, S)
    agree(
        lambda s: tune.SymmetricKLLoss(0.3)(s, T, LABELS, normalize),
        lambda s: 0.3 * reduced(soft_ce(s, MASK)) + 0.7 * reverse(s),
        S,
    )


@pytest.mark.parametrize("name", ["ForwardKL", "ReverseKL", "SymmetricKL"])
def test_torchtune_in_chunks(name):
    whole, chunked = getattr(tune, f"{name}Loss"), getattr(tune, f"{name}WithChunkedOutputLoss")
    labels = LABELS.reshape(2, 3)
    shape = (2, 3, V)
    agree(
        lambda s: chunked(num_output_chunks=3)(s.reshape(shape).chunk(3, 1), T.reshape(shape).chunk(3, 1), labels),
        lambda s: whole()(s, T, LABELS),
        S,
    )
    nothing = torch.full_like(labels, -100)
    assert chunked(3)(S.reshape(shape).chunk(3, 1), T.reshape(shape).chunk(3, 1), nothing) == 0


# axolotl

IDS = T.topk(K).indices
SLOTS = torch.ones(N, K, dtype=torch.bool)
SLOTS[2, 3:] = SLOTS[4] = False


def batch(*tensors):
    return [x.reshape(2, 3, *x.shape[1:]) for x in tensors]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("items", [-1, 4])
def test_axolotl_divides_by_slots_or_items(temperature, items):
    values = P.gather(-1, IDS).log_softmax(-1)

    def theirs(s):
        q = (s / temperature).log_softmax(-1).gather(-1, IDS)
        return (values.exp() * (values - q))[SLOTS].sum() / (items if items > 0 else SLOTS.sum())

    teacher = batch(IDS, values, SLOTS)
    # The student's padding is longer than the teacher's.
    longer = lambda s: torch.cat([s.reshape(2, 3, V), torch.zeros(2, 2, V)], 1)  # noqa: E731
    agree(lambda s: axolotl.loss(longer(s), *teacher, items, temperature), theirs, S)
    agree(lambda s: axolotl.ChunkedTopKKDLoss(2, temperature)(longer(s), *teacher, items), theirs, S)


def test_an_id_that_stands_twice_has_axolotl_s_gradient():
    ids = torch.tensor([[3, 7, 3]])
    values = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    student = S[:1].clone().requires_grad_()
    theirs = (values.exp() * (values - student.log_softmax(-1).gather(-1, ids))).sum() / 3
    ours = axolotl.loss(student[None], ids[None], values[None], torch.ones(1, 1, 3))
    grads = (torch.autograd.grad(loss, student)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*grads)
    twice = [p * torch.log(torch.tensor(p / 0.5, dtype=torch.float64)) for p in (0.2, 0.3)]
    torch.testing.assert_close(theirs, ours + sum(twice) / 3)


@pytest.mark.parametrize("beta, normalize", [(0.0, True), (0.5, True), (1.0, True), (0.0, False)])
def test_axolotl_s_linear_loss_is_a_sum_whose_labels_it_shifts(beta, normalize):
    values = P.gather(-1, IDS).log_softmax(-1)
    labels = LABELS.reshape(2, 3)

    def theirs(hidden, head):
        student = hidden @ head.T
        q = (student / 2).log_softmax(-1).gather(-1, IDS)
        soft = jsd(values, q.log_softmax(-1), beta) if normalize else kl(values, q)
        hard = F.cross_entropy(student, F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1), reduction="sum")
        return 0.5 * 4 * soft.sum() + 0.5 * hard

    loss = axolotl.LigerFusedLinearKLTopKLogprobLoss(temperature=2.0, beta=beta, normalize_topk=normalize)
    teacher = batch(IDS, values, torch.ones_like(SLOTS))
    agree(lambda h, w: loss(w, h.reshape(2, 3, D), *teacher, labels), theirs, HIDDEN, HEAD)


# DistillKit

DIVERGENCES = {"kl": (kl, distillkit.sparse_kl_div, distillkit.dense_kl_div, distillkit.KLDLoss)}
DIVERGENCES["js"] = (lambda p, q: jsd(p, q, 0.5), distillkit.sparse_js_div, distillkit.dense_js_div, distillkit.JSDLoss)
DIVERGENCES["tv"] = (tvd, distillkit.sparse_tvd, distillkit.dense_tvd, distillkit.TVDLoss)
by_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def with_rest(logprobs, mass):
    return torch.cat([logprobs, (1 - mass).log()[..., None]], -1)


@by_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillkit_by_a_bucket(name, temperature):
    formula, sparse, _, _ = DIVERGENCES[name]
    power = 1 / temperature
    values = P.gather(-1, IDS)
    p = with_rest(values, values.exp().sum(-1)).exp() ** power
    p = (p / p.sum(-1, keepdim=True)).log()

    def theirs(s):
        q = (s / temperature).log_softmax(-1).gather(-1, IDS)
        return formula(p, with_rest(q, q.exp().sum(-1)))[MASK].sum()

    teacher = batch(IDS, values, MASK)
    options = {"missing": "symmetric_uniform", "temperature": temperature}
    # DistillKit's teacher is fp32.
    agree(lambda s: sparse(s.reshape(2, 3, V), *teacher, **options), theirs, S, tolerance=2e-6)


@by_divergence
@pytest.mark.parametrize("log_target", [True, False])
def test_distillkit_by_a_renormalised_teacher(name, log_target):
    formula, sparse, _, _ = DIVERGENCES[name]
    values = (P if log_target else T).gather(-1, IDS)
    # Taken at 3, for a loss at 2, of a student at 1.
    p = torch.full((N, V), -1e4, dtype=torch.float64).scatter(-1, IDS, (values * 3 / 2).log_softmax(-1))
    options = {"temperature": 2.0, "target_generation_temperature": 3.0, "log_target": log_target}
    agree(
        lambda s: sparse(s.reshape(2, 3, V), *batch(IDS, values, MASK[:, None]), **options),
        lambda s: formula(p, (s / 2).log_softmax(-1))[MASK].sum(),
        S,
        tolerance=2e-6,
    )


@by_divergence
def test_distillkit_s_classes_have_t_squared_and_a_mean(name):
    formula, _, dense, loss = DIVERGENCES[name]
    rows = formula((T / 2).log_softmax(-1), (S / 2).log_softmax(-1))
    torch.testing.assert_close(dense(*batch(S, T, MASK), 2.0), rows[MASK].sum())
    outputs, signal = (SimpleNamespace(logits=x) for x in batch(S, T))
    (mask,) = batch(MASK)
    torch.testing.assert_close(loss(2.0)(outputs, signal, mask), 4 * rows[MASK].mean())
    torch.testing.assert_close(loss(2.0)(outputs, signal, num_items_in_batch=3), 4 * rows.sum() / 3)
    values = P.gather(-1, IDS)
    sparse = SimpleNamespace(
        sparse_ids=batch(IDS)[0], sparse_values=batch(values)[0], log_values=True, generation_temperature=2.0
    )
    p = torch.full((N, V), -1e4, dtype=torch.float64).scatter(-1, IDS, values.log_softmax(-1))
    expected = 4 * formula(p, (S / 2).log_softmax(-1))[MASK].mean()
    torch.testing.assert_close(loss(2.0)(outputs, sparse, mask), expected, rtol=1e-6, atol=1e-6)


def test_a_sure_student_has_a_finite_loss_where_distillkit_s_is_not():
    student = torch.zeros(1, 1, V).index_fill(-1, torch.tensor([0]), 60.0).requires_grad_()
    ids, values = torch.arange(K).reshape(1, 1, K), torch.full((1, 1, K), 0.1).log()
    for sparse in (distillkit.sparse_kl_div, distillkit.sparse_js_div):
        loss = sparse(student, ids, values, missing="symmetric_uniform")
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


# Model Optimizer, torchdistill, mdistiller


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_modelopt(reduction):
    def theirs(s):
        loss = F.kl_div((s / 2).log_softmax(-1), (T / 2).softmax(-1), reduction=reduction) * 4
        return loss.sum(-1) if reduction == "none" else loss

    agree(lambda s: modelopt.LogitsDistillationLoss(2.0, reduction)(s, T), theirs, S)


def test_modelopt_s_corrected_teacher_leads_by_the_threshold():
    labels = LABELS.clamp_min(0)
    labels[0] = T[0].argmax()
    loss = modelopt.MFTLoss(2.0, 0.2)
    p = loss.corrected(T, labels)
    torch.testing.assert_close(p.sum(-1), torch.ones(N))
    lead = p.gather(-1, labels[:, None]).squeeze(-1) - p.scatter(-1, labels[:, None], 0.0).amax(-1)
    assert (lead[labels != T.argmax(-1)] - 0.2).abs().max() < 1e-6
    agree(
        lambda s: loss(s, T, labels),
        lambda s: 4 * F.kl_div((s / 2).log_softmax(-1), p, reduction="batchmean"),
        S,
        tolerance=1e-6,
    )


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3])
def test_torchdistill(reduction, alpha):
    labels = LABELS.clamp_min(0)

    def theirs(s):
        soft = F.kl_div((s / 2).log_softmax(-1), (T / 2).softmax(-1), reduction=reduction)
        hard = F.cross_entropy(s, labels, reduction="sum" if reduction == "sum" else "mean")
        return alpha * hard + (1 - alpha) * 4 * soft if alpha else soft

    paths = "fc", "output", "head", "output"
    loss = torchdistill.KDLoss(*paths, 2.0, alpha, reduction=reduction)
    agree(lambda s: loss({"fc": {"output": s}}, {"head": {"output": T}}, labels), theirs, S)


def test_mdistiller():
    labels = LABELS.clamp_min(0)
    agree(
        lambda s: mdistiller.kd_loss(s, T, 4.0),
        lambda s: 16 * F.kl_div((s / 4).log_softmax(-1), (T / 4).softmax(-1), reduction="batchmean"),
        S,
    )
    one_hot = F.one_hot(labels, V).bool()

    def theirs(s):
        log_q, log_p = (s / 4).log_softmax(-1), (T / 4).log_softmax(-1)
        two = [torch.stack([x[one_hot].exp(), 1 - x[one_hot].exp()], -1).log() for x in (log_p, log_q)]
        others = [x[~one_hot].reshape(N, V - 1).log_softmax(-1) for x in (log_p, log_q)]
        return 16 * (1.5 * kl(*two) + 6.0 * kl(*others)).mean()

    agree(lambda s: mdistiller.dkd_loss(s, T, labels, 1.5, 6.0, 4.0), theirs, S)


# sentence-transformers, speculators, SpecForge


def test_sentence_transformers():
    query, scores = logits(N, D), logits(N, 3, seed=7)

    def model(features):
        return {"sentence_embedding": features["x"] @ HEAD[:D]}

    def theirs(*columns):
        query, *others = (column @ HEAD[:D] for column in columns)
        student = torch.stack([(query * other).sum(-1) for other in others], 1)
        return 4 * F.kl_div((student / 2).log_softmax(-1), (scores / 3).softmax(-1), reduction="batchmean")

    loss = st.DistillKLDivLoss(model, temperature=2.0, teacher_temperature=3.0)
    columns = query, *(logits(N, D, seed=i) for i in (4, 5, 6))
    agree(lambda *c: loss([{"x": x} for x in c], scores), theirs, *columns)
    names = {"similarity_fct": "pairwise_dot_score", "temperature": 2.0, "teacher_temperature": 3.0}
    assert loss.get_config_dict() == names
    with pytest.raises(ValueError, match="student_temperature must be > 0"):
        st.DistillKLDivLoss(model, student_temperature=-1.0)
    with pytest.raises(ValueError, match="2 or more candidates"):
        loss.compute_loss_from_embeddings(columns[:2], scores)


DRAFTS = {
    "kl_div_loss": kl,
    "reverse_kl_div_loss": lambda p, q: kl(q, p),
    "js_div_loss": lambda p, q: jsd(p, q, 0.5),
    "ce_loss": lambda p, q: -q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1),
    "tv_loss": tvd,
    "neg_log_acceptance_loss": lambda p, q: -torch.minimum(p.exp(), q.exp()).sum(-1).log(),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_speculators(name):
    agree(
        lambda s: getattr(speculators, name)(s[None], T[None]),
        lambda s: DRAFTS[name](P, s.log_softmax(-1))[None],
        S,
    )


def test_the_blend_of_speculators_takes_no_gradient_of_its_weight():
    def theirs(s):
        q = s.log_softmax(-1)
        weight = torch.exp(-3 * torch.minimum(P.exp(), q.exp()).sum(-1)).detach()
        return weight * kl(P, q) + (1 - weight) * tvd(P, q)

    agree(lambda s: speculators.lk_hybrid_loss(s, T), theirs, S)


def test_specforge():
    mask = MASK.reshape(2, 3, 1)
    target = P.exp().reshape(2, 3, V)
    agree(
        lambda s: specforge.LogSoftmaxLoss.apply(s.reshape(2, 3, V), target, mask),
        lambda s: -(P.exp() * s.log_softmax(-1)).sum(-1)[MASK].sum() / N,
        S,
    )
    call = {"target_probs": target, "position_mask": mask}

    def theirs(s):
        rate = torch.minimum(P.exp(), s.softmax(-1)).sum(-1)[MASK]
        return torch.stack([rate.mean(), rate.log().mean()])

    agree(lambda s: torch.stack(specforge.compute_acceptance_rate(logits=s.reshape(2, 3, V), **call)), theirs, S)
    for kind, expected in (("alpha", 3.0), ("lambda", 0.9 * 2 * torch.exp(torch.tensor(-0.5)) + 1 - 0.5)):
        if kind == "lambda":
            weight = 0.9 * torch.exp(torch.tensor(-0.5))
            expected = weight * 2.0 + (1 - weight) * 0.5
        loss = specforge.compute_lk_loss(
            kl_loss=torch.tensor(2.0),
            acceptance_rate=torch.tensor(0.5),
            log_acceptance_rate=torch.tensor(-3.0),
            lk_loss_type=kind,
            kl_scale=0.9,
            kl_decay=1.0,
        )
        torch.testing.assert_close(loss, torch.as_tensor(expected))


# All of them

MODULES = ["torch", "liger", "torchtune", "axolotl", "distillkit", "modelopt", "torchdistill", "mdistiller"]
MODULES += ["sentence_transformers", "speculators", "specforge"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_names_its_source_and_every_public_name_has_a_docstring(module):
    module = importlib.import_module(f"kdkernels.compat.{module}")
    assert "Source: " in module.__doc__
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__:
            assert value.__doc__ and not value.__doc__.startswith("Initialize"), name


@pytest.mark.parametrize(
    "call",
    [
        lambda: liger.liger_tvd(P.exp(), P.exp(), reduction="none"),
        lambda: torchdistill.KDLoss("a", "output", "b", "output", 1.0, reduction="none"),
    ],
)
def test_a_loss_per_element_is_refused(call):
    with pytest.raises(ValueError, match=r"kd_loss\(..., reduction='none'\) has one per row"):
        call()


def test_signatures_of_pytorch_are_kept():
    assert str(inspect.signature(compat_torch.kl_div)).replace("'", "") == (
        "(input: Tensor, target: Tensor, size_average: Optional[bool] = None, reduce: Optional[bool] = None, "
        "reduction: str = mean, log_target: bool = False) -> Tensor"
    )
    assert list(inspect.signature(compat_torch.kl_div).parameters) == list(inspect.signature(F.kl_div).parameters)
