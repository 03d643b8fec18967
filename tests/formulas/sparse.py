"""The formulas of docs/reference/recipes/sparse.md, written out row by row."""

import torch

from kdkernels import capture_samples


def kl(p, q):
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def bucket(p, q, ids):
    """The probabilities of the ids, and of all others together."""
    others = [v for v in range(len(p)) if v not in ids]
    return [*p[ids], p[others].sum()], [*q[ids], q[others].sum()]


def mean(x, formula, T=1.0):
    p, q = (x.teacher / T).softmax(-1), (x.student / T).softmax(-1)
    return sum(formula(a, b) for a, b in zip(p, q, strict=True)) / len(p)


def likeliest(p, k):
    return p.argsort(descending=True)[:k].tolist()


def teacher_topk(x):
    return mean(x, lambda p, q: 4 * kl(*bucket(p, q, likeliest(p, 4))), 2.0)


def renormalised(p, q):
    ids = likeliest(p, 4)
    return kl(p[ids] / p[ids].sum(), q[ids])


def random_sampling(x):
    generator = torch.Generator().manual_seed(0)
    p, logq = x.teacher.softmax(-1), x.student.log_softmax(-1)
    drawn = capture_samples(x.teacher, 50, generator=generator)
    total = 0.0
    for i, (ids, logs) in enumerate(zip(drawn.ids.tolist(), drawn.logprobs, strict=True)):
        used = [(v, log) for v, log in zip(ids, logs, strict=True) if v >= 0]
        weights = torch.stack([log.exp() for _, log in used])
        assert torch.isclose(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
        # Draws of the teacher: an often drawn id is a likely one.
        assert sum(p[i, v].item() for v, _ in used) > 0.5
        total = total + sum(w * (log - logq[i, v]) for w, (v, log) in zip(weights, used, strict=True))
    return total / len(p)


def student_topk(x):
    def row(p, q):
        a, b = bucket(p, q, likeliest(q, 4))
        return kl(b, a)

    return mean(x, row)


def student_topk_renormalised(x):
    def row(p, q):
        ids = likeliest(q, 4)
        return kl(q[ids] / q[ids].sum(), p[ids] / p[ids].sum())

    return mean(x, row)


def top_p(x):
    def row(p, q):
        ids, mass = [], 0.0
        for v in likeliest(p, 8):
            if mass < 0.8:
                ids.append(v)
                mass += p[v].item()
        return kl(*bucket(p, q, ids))

    return mean(x, row)


def served(x):
    total = 0.0
    for ids, logs, s in zip(x.served_ids.tolist(), x.served_logprobs.tolist(), x.student, strict=True):
        used = {v: torch.tensor(log, dtype=torch.float64).exp() for v, log in zip(ids, logs, strict=True) if v >= 0}
        used = {v: p for v, p in used.items() if p > 0}
        q = s.softmax(-1)
        others = [v for v in range(len(s)) if v not in used]
        p = torch.stack([*used.values(), 1 - sum(used.values())])
        q = torch.stack([*q[list(used)], q[others].sum()])
        m = (p + q) / 2
        total = total + (kl(p, m) + kl(q, m)) / 2
    return total / len(x.student)


FORMULAS = {
    "the-teachers-top-k": (teacher_topk, lambda x: mean(x, renormalised)),
    "random-sampling": random_sampling,
    "the-students-top-k": (student_topk, student_topk_renormalised),
    "top-p": top_p,
    "served-log-probabilities": served,
}
