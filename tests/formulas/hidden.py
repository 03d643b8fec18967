"""The formulas of docs/reference/recipes/hidden.md, written out row by row."""

import math
from itertools import product

import torch
import torch.nn.functional as F


def projected(x):
    return x.hidden @ x.to_teacher, x.teacher_hidden


def unit(row):
    return row / row.square().sum().sqrt()


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def hints(x):
    return F.mse_loss(*projected(x))


def cosine(x):
    return sum(1 - unit(a) @ unit(b) for a, b in zip(*projected(x), strict=True)) / len(x.hidden)


def patient(x):
    return sum((unit(a) - unit(b)).square().mean() for a, b in zip(*projected(x), strict=True)) / len(x.hidden)


def scaled(x):
    d = (x.hidden @ x.to_teacher - x.teacher_hidden).abs()
    huber = torch.where(d < 1, d**2 / 2, d - 0.5).mean()
    mean = x.teacher_hidden.mean()
    return huber / ((x.teacher_hidden - mean).square().sum() / (x.teacher_hidden.numel() - 1)).sqrt()


def caches(x):
    parts = [(s - t).abs().sum() for s, t in ((x.cache_k, x.teacher_cache_k), (x.cache_v, x.teacher_cache_v))]
    return sum(parts) / (2 * x.cache_k.numel())


def vid(x):
    s, t = projected(x)
    v = x.log_variance.exp()
    return (v.log() / 2 + (t - s) ** 2 / (2 * v)).mean()


def attention_transfer(x):
    total = 0.0
    for s, t in zip(x.maps, x.teacher_maps, strict=True):
        a, b = ((m**2).sum(0).reshape(-1) for m in (s, t))
        total = total + (unit(a) - unit(b)).square().sum()
    return total / (len(x.maps) * x.maps[0, 0].numel())


def each_head(x, *pairs):
    """The mean over samples, heads and queries of a KL between rows of scores."""
    total, count = 0.0, 0
    for (a, b), (c, d) in pairs:
        for i, j in product(range(2), range(3)):
            s = a[i, j] @ b[i, j].T / math.sqrt(a.shape[-1])
            t = c[i, j] @ d[i, j].T / math.sqrt(c.shape[-1])
            total = total + kl(t.softmax(-1), s.softmax(-1)).sum()
            count += len(s)
    return total / count


def attention(x):
    return each_head(x, ((x.q, x.k), (x.teacher_q, x.teacher_k)))


def scores(x):
    s = torch.einsum("bhid,bhjd->bhij", x.q, x.k) / 5**0.5
    t = torch.einsum("bhid,bhjd->bhij", x.teacher_q, x.teacher_k) / 6**0.5
    return F.mse_loss(s, t)


def relations(x):
    pairs = ((x.q, x.teacher_q), (x.k, x.teacher_k), (x.v, x.teacher_v))
    return 3 * each_head(x, *(((s, s), (t, t)) for s, t in pairs))


def infonce(x):
    s, t = projected(x)
    logits = torch.stack([torch.stack([unit(a) @ unit(b) for b in t]) for a in s]) / 0.07
    return F.cross_entropy(logits, torch.arange(len(s)))


def crd(x):
    total, c = 0.0, 3 / 20
    for z, ids in zip(x.z, x.ids.tolist(), strict=True):
        for place, i in enumerate(ids):
            P = (z @ x.bank[i] / 0.07).exp() / x.Z
            total = total - (P / (P + c) if place == 0 else c / (P + c)).log()
    return total / len(x.z)


def huber(a, b):
    d = torch.stack(a) - torch.stack(b)
    return torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5).mean()


def rkd(x):
    n = len(x.hidden)

    def distances(h):
        found = [(h[i] - h[j]).square().sum().sqrt() if i != j else h.sum() * 0 for i in range(n) for j in range(n)]
        mean = sum(found) / (n * n - n)
        return [d / mean for d in found]

    def angles(h):
        def edge(i, j):
            return unit(h[j] - h[i]) if i != j else h[0] * 0

        return [edge(i, j) @ edge(i, k) for i in range(n) for j in range(n) for k in range(n)]

    distance = huber(distances(x.hidden), distances(x.teacher_hidden))
    return 25 * distance + 50 * huber(angles(x.hidden), angles(x.teacher_hidden))


def similarity(x):
    def rows(h):
        return torch.stack([unit(h @ row) for row in h])

    return (rows(x.hidden) - rows(x.teacher_hidden)).square().sum() / len(x.hidden) ** 2


def cka(x):
    n = len(x.hidden)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    K, L = H @ x.hidden @ x.hidden.T @ H, H @ x.teacher_hidden @ x.teacher_hidden.T @ H
    return 1 - (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()


def pkt(x):
    def rows(h):
        p = torch.stack([torch.stack([(unit(a) @ unit(b) + 1) / 2 for b in h]) for a in h])
        return p / p.sum(-1, keepdim=True)

    p, q = rows(x.teacher_hidden), rows(x.hidden)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).sum() / len(p) ** 2


def sinkhorn(x):
    p, q = x.teacher.softmax(-1), x.student.softmax(-1)
    cost = (q[:, None] - p[None]).abs().sum(-1)
    kernel = (-cost / 0.1).exp()
    v = torch.ones(len(p), dtype=torch.float64)
    for _ in range(20):
        u = 1 / (kernel @ v)
        v = 1 / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    assert torch.allclose(plan.sum(0), torch.ones_like(v)) and torch.allclose(plan.sum(1), torch.ones_like(v), atol=0.1)
    return (plan * cost).sum() / len(p)


def gaussians(x):
    total = 0.0
    for s, t in zip(*(y.T for y in projected(x)), strict=True):
        deviations = [((y - y.mean()) ** 2).mean().sqrt() for y in (s, t)]
        total = total + (s.mean() - t.mean()) ** 2 + (deviations[0] - deviations[1]) ** 2
    return total


def boundaries(x):
    s, t = projected(x)
    below = torch.where((s > -1) & (t <= 0), (s + 1) ** 2, 0.0)
    above = torch.where((s <= 1) & (t > 0), (s - 1) ** 2, 0.0)
    return (below + above).sum() / len(s)


def overhaul(x):
    # The released code's three cases, each with its own target.
    s, t = projected(x)
    m = -0.5
    rows = torch.where((s > m) & (t <= m), (s - m) ** 2, 0.0)
    rows = rows + torch.where((s > t) & (t > m) & (t <= 0), (s - t) ** 2, 0.0)
    rows = rows + torch.where(t > 0, (s - t) ** 2, 0.0)
    return rows.mean(0).sum()


def listwise(x):
    p, q = (x.teacher_scores_of_queries / 2).softmax(-1), (x.scores_of_queries / 2).softmax(-1)
    return 4 * kl(p, q).sum() / len(p)


def margins(x):
    d = x.scores_of_queries - x.teacher_scores_of_queries
    return torch.stack([(d[:, 0] - d[:, j]) ** 2 for j in (1, 2, 3)]).mean()


def dirichlet(x):
    total = 0.0
    for teacher in (x.teacher, x.teacher_b, x.teacher_c):
        for s, t in zip(x.student, teacher, strict=True):
            total = total - torch.distributions.Dirichlet(s.exp(), validate_args=False).log_prob(t.softmax(-1))
    return total / (3 * len(x.student))


FORMULAS = {
    "hints": hints,
    "cosine": cosine,
    "patient-distillation": patient,
    "scaled-features": (scaled, caches),
    "variational-information-distillation": vid,
    "attention-transfer": attention_transfer,
    "attention-distributions": (attention, scores),
    "self-attention-relations": relations,
    "infonce": infonce,
    "contrastive-representations": crd,
    "relational-distances-and-angles": rkd,
    "similarity-preserving": similarity,
    "centred-kernel-alignment": cka,
    "probabilistic-knowledge-transfer": pkt,
    "optimal-transport": (sinkhorn, gaussians),
    "activation-boundaries": boundaries,
    "overhaul-of-features": overhaul,
    "retrieval-scores": (listwise, margins),
    "distributions-of-ensembles": dirichlet,
}
