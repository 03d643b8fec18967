"""The formulas of docs/reference/recipes/targets.md, written out."""

import math

import torch
import torch.nn.functional as F


def kl(p, logq):
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - logq), 0.0).sum(-1)


def forward(x, target, T=1.0):
    """T^2 KL of a target's logits."""
    return (T**2 * kl((target / T).softmax(-1), (x.student / T).log_softmax(-1))).mean()


def taid(x):
    return forward(x, 0.6 * x.student.detach() + 0.4 * x.teacher)


def dkd(x):
    total = 0.0
    for s, t, y in zip(x.student / 4, x.teacher / 4, x.labels.tolist(), strict=True):
        p, q = t.softmax(-1), s.softmax(-1)
        p2, q2 = torch.stack([p[y], 1 - p[y]]), torch.stack([q[y], 1 - q[y]])
        others = [v for v in range(len(s)) if v != y]
        p3, q3 = p[others] / (1 - p[y]), q[others] / (1 - q[y])
        total = total + 16 * (kl(p2, q2.log()) + 8 * kl(p3, q3.log()))
    return total / len(x.labels)


def standardised(x):
    def z(a):
        return (a - a.mean(-1, keepdim=True)) / a.std(-1, keepdim=True)

    return (4 * kl((z(x.teacher) / 2).softmax(-1), (z(x.student) / 2).log_softmax(-1))).mean()


def sort_kd(x):
    target = torch.empty_like(x.teacher)
    for row, t, y in zip(target, x.teacher, x.labels.tolist(), strict=True):
        values, order = t.sort(descending=True)
        row[[y, *(v for v in order.tolist() if v != y)]] = values
    return forward(x, target, 4.0)


def swap(x):
    target = x.teacher.clone()
    for row, t, y in zip(target, x.teacher, x.labels.tolist(), strict=True):
        top = int(t.argmax())
        row[top], row[y] = t[y], t[top]
    return forward(x, target, 4.0)


def mft(x):
    total = 0.0
    for t, logq, y in zip(x.teacher, x.student.log_softmax(-1), x.labels.tolist(), strict=True):
        p = t.softmax(-1)
        top = p.max()
        if int(p.argmax()) != y:
            m = (top - p[y] + 0.2) / (1 + top - p[y])
        else:
            m = (min(1.0, p[y] + 0.2) - top) / (1 - top)
        target = (1 - m) * p
        target[y] += m
        total = total - (target * logq).sum()
    return total / len(x.labels)


def smoothing(x):
    V = x.student.shape[-1]
    target = 0.9 * F.one_hot(x.labels, V).double() + 0.1 / V
    return -(target * x.student.log_softmax(-1)).sum(-1).mean()


def virtual(x):
    V = x.student.shape[-1]
    hot = F.one_hot(x.labels, V).double()
    teacher = 0.99 * hot + 0.01 / (V - 1) * (1 - hot)
    return 0.95 * forward(x, teacher.log(), 20.0) + 0.05 * F.cross_entropy(x.student, x.labels)


def self_distillation(x):
    target = 0.4 * F.one_hot(x.labels, x.student.shape[-1]).double() + 0.6 * x.teacher.softmax(-1)
    return -(target * x.student.log_softmax(-1)).sum(-1).mean()


def mutual(x):
    a, b = x.student, x.peer
    one = F.cross_entropy(a, x.labels) + kl(b.detach().softmax(-1), a.log_softmax(-1)).mean()
    two = F.cross_entropy(b, x.labels) + kl(a.detach().softmax(-1), b.log_softmax(-1)).mean()
    return one + two


def mean_of_probs(x):
    p = 0.75 * (x.teacher / 2).softmax(-1) + 0.25 * (x.teacher_b / 2).softmax(-1)
    return (4 * kl(p, (x.student / 2).log_softmax(-1))).mean()


def mean_of_logits(x):
    return forward(x, (x.teacher + x.teacher_b) / 2, 2.0)


def signed(x):
    return forward(x, x.teacher + 0.5 * (x.teacher_b - x.teacher_c))


def contrastive(x):
    p, amateur = x.teacher.softmax(-1), x.teacher_b.softmax(-1)
    scores = torch.where(p >= 0.1 * p.max(-1, keepdim=True).values, p * (p / amateur) ** 0.5, 0.0)
    assert (scores == 0).any()
    return kl(scores / scores.sum(-1, keepdim=True), x.student.log_softmax(-1)).mean()


def routing(x):
    return forward(x, torch.where((x.domain == 0)[:, None], x.teacher, x.teacher_b))


def temperature_per_row(x):
    gap = ((x.teacher.softmax(-1) - x.student.softmax(-1)).abs().sum(-1) / 2).tolist()
    ranks = [sorted(gap).index(g) / (len(gap) - 1) for g in gap]
    total = 0.0
    for s, t, h in zip(x.student, x.teacher, ranks, strict=True):
        T = math.exp(0.5 - h)
        total = total + T**2 * kl((t / T).softmax(-1), (s / T).log_softmax(-1))
    return total / len(gap)


def learned_temperature(x):
    T = x.tau.exp()
    return T.detach() ** 2 * kl((x.teacher / T).softmax(-1), (x.student / T).log_softmax(-1)).mean()


def weights_per_row(x):
    w = 1 - torch.exp(-x.student_ce / x.teacher_ce)
    return (w * 4 * kl((x.teacher / 2).softmax(-1), (x.student / 2).log_softmax(-1))).mean()


def balance(x):
    ce = F.cross_entropy(x.student, x.labels)
    kd = forward(x, x.teacher)
    return kd + kd.detach() / ce.detach() * ce


def router(x):
    return kl(x.teacher_router_logits.softmax(-1), x.router_logits.log_softmax(-1)).mean()


def quantised(x):
    s, t = x.hidden @ x.head.T, x.teacher_hidden @ x.teacher_head.T
    return kl(t.softmax(-1), s.log_softmax(-1)).mean()


FORMULAS = {
    "taid": taid,
    "decoupled-kd": dkd,
    "logit-standardisation": standardised,
    "corrected-teachers": (sort_kd, swap),
    "minimal-fix-of-the-teacher": mft,
    "label-smoothing-as-a-teacher": (smoothing, virtual),
    "self-distillation": self_distillation,
    "mutual-learning": mutual,
    "several-teachers": (mean_of_probs, mean_of_logits),
    "signed-mixtures": signed,
    "contrastive-targets": contrastive,
    "a-teacher-for-each-domain": routing,
    "temperature-per-row": temperature_per_row,
    "a-learned-temperature": learned_temperature,
    "weights-per-row": weights_per_row,
    "balance-of-two-terms": balance,
    "router-distillation": router,
    "quantisation-aware-distillation": quantised,
}
