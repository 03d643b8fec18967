"""The formulas of docs/reference/recipes/drafters.md, written out."""

import torch
import torch.nn.functional as F


def distributions(x):
    return x.teacher.softmax(-1), x.student.softmax(-1)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def acceptance(p, q):
    return torch.minimum(p, q).sum(-1)


def log_acceptance(x):
    return -acceptance(*distributions(x)).log().mean()


def hybrid(x):
    p, q = distributions(x)
    A = acceptance(p, q)
    lam = (-3 * A.detach()).exp()
    return (lam * kl(p, q) + (1 - lam) * (1 - A)).mean()


def hybrid_of_batch(x):
    p, q = distributions(x)
    A = acceptance(p, q).mean()
    lam = (-3 * A.detach()).exp()
    return lam * kl(p, q).mean() + (1 - lam) * (1 - A)


def confidence(x):
    p, q = distributions(x)
    A, c = acceptance(p, q).detach(), x.confidence.sigmoid()
    bce = -(A * c.log() + (1 - A) * (1 - c).log()).mean()
    return 0.1 * F.cross_entropy(x.student, x.labels) + 0.9 * (p - q).abs().sum(-1).mean() + bce


def draft_vocabulary(x):
    p = x.teacher.softmax(-1)[:, x.columns]
    return kl(p / p.sum(-1, keepdim=True), x.draft_logits.softmax(-1)).mean()


def draft_head(x):
    p = (x.teacher_hidden @ x.teacher_head.T).softmax(-1)[:, x.columns]
    return kl(p / p.sum(-1, keepdim=True), (x.hidden @ x.draft_head.T).softmax(-1)).mean()


def true_acceptance(x):
    return (1 - acceptance(x.teacher.softmax(-1)[:, x.columns], x.draft_logits.softmax(-1))).mean()


def heads(x):
    rows = kl(x.head_targets.softmax(-1), x.head_logits.softmax(-1))
    return sum(0.8**k * rows[k].sum() for k in range(3)) / rows.numel()


def dpace(x):
    total = 0.0
    for logits, tokens in zip(x.blocks, x.block_tokens.tolist(), strict=True):
        logq = torch.stack([row.log_softmax(-1)[y] for row, y in zip(logits, tokens, strict=True)])
        chance = [0.9 * q + 0.1 for q in logq.detach().exp().tolist()]
        passed = [torch.tensor(chance[: j + 1], dtype=torch.float64).prod() for j in range(len(chance))]
        total = total - sum(sum(passed[k:]) * logq[k] for k in range(len(chance)))
    return total / x.block_tokens.numel()


FORMULAS = {
    "acceptance": lambda x: (1 - acceptance(*distributions(x))).mean(),
    "negative-log-acceptance": log_acceptance,
    "hybrid": (hybrid, hybrid_of_batch),
    "the-targets-choice-as-label": lambda x: F.cross_entropy(x.student, x.teacher.argmax(-1)),
    "drafts-with-a-confidence": confidence,
    "a-draft-vocabulary": (draft_vocabulary, draft_head, true_acceptance),
    "several-heads": heads,
    "position-aware-cross-entropy": dpace,
}
