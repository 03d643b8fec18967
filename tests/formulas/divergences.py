"""The formulas of docs/reference/recipes/divergences.md, written out."""

import torch
import torch.nn.functional as F


def softmaxes(x, T=1.0):
    p, q = (x.teacher / T).softmax(-1), (x.student / T).softmax(-1)
    return p, p.log(), q, q.log()


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum(-1)


def forward_kl(x):
    logq, p = F.log_softmax(x.student / 2, -1), F.softmax(x.teacher / 2, -1)
    return F.kl_div(logq, p, reduction="batchmean") * 4


def log_prob_leaf(x):
    return F.kl_div(x.log_probs, F.softmax(x.teacher, -1), reduction="batchmean")


def with_labels(x):
    _, logp, _, logq = softmaxes(x, 4.0)
    return 0.9 * 16 * kl(logp, logq).mean() + 0.1 * F.cross_entropy(x.student, x.labels)


def hidden(x):
    s, t = x.hidden @ x.head.T, x.teacher_hidden @ x.teacher_head.T
    term = kl((t / 2).log_softmax(-1), (s / 2).log_softmax(-1)).mean() * 4
    return 0.5 * term + 0.5 * F.cross_entropy(s, x.labels)


def reverse_kl(x):
    _, logp, _, logq = softmaxes(x)
    return kl(logq, logp).mean()


def jsd(x):
    p, logp, q, logq = softmaxes(x)
    m = 0.1 * p + 0.9 * q
    return (0.1 * kl(logp, m.log()) + 0.9 * kl(logq, m.log())).mean()


def tvd(x):
    p, _, q, _ = softmaxes(x)
    return (p - q).abs().sum(-1).mean() / 2


def skew(x):
    p, logp, q, _ = softmaxes(x)
    return kl(logp, (0.1 * p + 0.9 * q).log()).mean()


def skew_reverse(x):
    p, _, q, logq = softmaxes(x)
    return kl(logq, (0.1 * q + 0.9 * p).log()).mean()


def distillm2(x):
    p, logp, q, logq = softmaxes(x)
    a = x.alpha[:, None]
    rows = torch.where(x.wrote_teacher, kl(logp, (a * p + (1 - a) * q).log()), kl(logq, (a * q + (1 - a) * p).log()))
    return rows.mean()


def alpha_beta(x):
    p, _, q, _ = softmaxes(x)
    a, b = 0.2, 0.7
    return (-(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)).sum(-1).mean()


def renyi(x):
    p, _, q, _ = softmaxes(x)
    return ((p**0.7 * q**0.3).sum(-1).log() / (0.7 - 1)).mean()


def triangular(x):
    p, _, q, _ = softmaxes(x)
    return ((p - q) ** 2 / (p + q)).sum(-1).mean()


def jeffreys(x):
    p, logp, q, logq = softmaxes(x)
    return ((p - q) * (logp - logq)).sum(-1).mean()


def both(x, lam):
    _, logp, _, logq = softmaxes(x)
    return ((1 - lam) * kl(logp, logq) + lam * kl(logq, logp)).mean()


def adaptive(x):
    p, _, q, _ = softmaxes(x)
    weights = []
    for teacher, student in zip(p.tolist(), q.tolist(), strict=True):
        mass, head, tail = 0.0, 0.0, 0.0
        for place, v in enumerate(sorted(range(len(teacher)), key=lambda v: -teacher[v])):
            mass += teacher[v]
            gap = abs(teacher[v] - student[v])
            head, tail = (head + gap, tail) if place == 0 or mass <= 0.5 else (head, tail + gap)
        weights.append(head / (head + tail))
    return both(x, 1 - torch.tensor(weights, dtype=torch.float64))


def entropy_aware(x):
    p, logp, _, logq = softmaxes(x)
    unsure = -(p * logp).sum(-1) > 1.0
    assert 0 < unsure.sum() < len(unsure)
    return (kl(logq, logp) + torch.where(unsure, kl(logp, logq), 0.0)).mean()


def todi(x):
    p, logp, q, logq = softmaxes(x)
    a = (p / (p + q)).detach()
    return (a * p * (logp - logq) + (1 - a) * q * (logq - logp)).sum(-1).mean()


def amid(x):
    p, logp, q, _ = softmaxes(x)
    r = (0.1 * p**2 + 0.9 * q**2) ** 0.5
    return kl(logp, (r / r.sum(-1, keepdim=True)).log()).mean()


def amid_geometric(x):
    p, logp, q, _ = softmaxes(x)
    r = p**0.1 * q**0.9
    return kl(logp, (r / r.sum(-1, keepdim=True)).log()).mean()


def pairs(x, weights):
    d = x.student - x.teacher
    return ((weights * (d[:, :, None] - d[:, None, :]) ** 2).sum((1, 2)) / 4).mean()


def concrete_student(x):
    q = x.student.softmax(-1).detach()
    return (pairs(x, q[:, :, None] * q[:, None, :]),)


def concrete_teacher(x):
    p, q = x.teacher.softmax(-1), x.student.softmax(-1).detach()
    return (pairs(x, p[:, :, None] * q[:, None, :]),)


def mse(x):
    return F.mse_loss(x.student, x.teacher)


def centered_mse(x):
    d = x.student - x.teacher
    return d.var(-1, correction=0).mean()


def dist(x):
    p, _, q, _ = softmaxes(x, 2.0)

    def corr(a, b):
        return torch.corrcoef(torch.stack([a, b]))[0, 1]

    rows = torch.stack([corr(a, b) for a, b in zip(p, q, strict=True)]).mean()
    columns = torch.stack([corr(a, b) for a, b in zip(p.T, q.T, strict=True)]).mean()
    return 4 * (2 - rows - columns)


def ranked(s, order, weights):
    """Minus the weighted log-likelihood of an order under Plackett and Luce."""
    return sum(weights[v] * (s[order[k:]].exp().sum().log() - s[v]) for k, v in enumerate(order))


def pld(x):
    total = 0.0
    for s, t, y in zip(x.student, x.teacher, x.labels.tolist(), strict=True):
        others = [v for v in t.argsort(descending=True).tolist() if v != y]
        total = total + ranked(s, [y, *others], t.softmax(-1))
    return total / len(x.labels)


def listmle(x):
    orders = x.teacher.argsort(descending=True).tolist()
    return sum(ranked(s, order, [1.0] * len(s)) for s, order in zip(x.student, orders, strict=True)) / len(orders)


FORMULAS = {
    "forward-kl": forward_kl,
    "log-probabilities-as-the-leaf": log_prob_leaf,
    "forward-kl-with-labels": with_labels,
    "from-hidden-states": hidden,
    "reverse-kl": reverse_kl,
    "generalised-jsd": jsd,
    "total-variation": tvd,
    "skew-kl": skew,
    "skew-reverse-kl": skew_reverse,
    "distillm-2": distillm2,
    "alpha-beta-divergence": alpha_beta,
    "renyi-divergence": renyi,
    "triangular-discrimination": triangular,
    "jeffreys-divergence": jeffreys,
    "a-mixture-of-both-kls": lambda x: both(x, x.lam),
    "adaptive-kl": adaptive,
    "entropy-aware-kl": entropy_aware,
    "token-wise-adaptive-divergence": todi,
    "alpha-mixture-assistant": (amid, amid_geometric),
    "concrete-score-distillation": (concrete_student, concrete_teacher),
    "logit-mse": (mse, centered_mse),
    "dist": dist,
    "ranking-losses": (pld, listmle),
}
