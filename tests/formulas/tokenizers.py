"""The formulas of docs/reference/recipes/tokenizers.md, written out span by span."""

import math

import torch

# The spans of the inputs: the pieces of text that end together, as student's and teacher's tokens.
SPANS = [([0, 1], [0]), ([2, 3], [1, 2]), ([4], [3, 4]), ([5], [5])]


def logs(logits):
    return logits.log_softmax(-1)


def piece(logits, tokens, places):
    return sum(logs(logits)[i, tokens[i]] for i in places)


def pieces(x):
    for s, t in SPANS:
        yield (
            piece(x.text_logits, x.text_tokens, s),
            piece(x.teacher_text_logits, x.teacher_text_tokens, t).detach(),
        )


def aligned(x):
    return sum((s - t).detach() * s for s, t in pieces(x)) / len(SPANS)


def alm(x):
    total = 0.0
    for s, t in pieces(x):
        q, p = (s / 100 - 1e-6).exp(), (t / 100 - 1e-6).exp()
        total = total - p * q.log() - (1 - p) * (1 - q).log()
    return total / len(SPANS)


def sorted_l1(q, p):
    """Of two lists of probabilities of any lengths."""
    q = sorted(q, key=lambda v: -v.item())
    p = sorted(p, key=lambda v: -v.item())
    width = max(len(q), len(p))
    q, p = q + [torch.tensor(0.0)] * (width - len(q)), p + [torch.tensor(0.0)] * (width - len(p))
    return sum((a - b).abs() for a, b in zip(q, p, strict=True))


def uld(x):
    rows = list(zip(x.text_logits.softmax(-1), x.teacher_text_logits.softmax(-1), strict=False))
    return sum(sorted_l1(list(q), list(p)) for q, p in rows) / len(rows)


def split(row, ids):
    return [row[v] for v in ids], [row[v] for v in range(len(row)) if v not in ids]


def gold_trl(x):
    total, share = 0.0, len(x.common) / x.teacher_text_logits.shape[-1]
    for s, t in SPANS:
        q = logs(x.text_logits)[s[0]].exp()
        for i in s[1:]:
            q = q * x.text_logits.softmax(-1)[i, x.text_tokens[i]]
        p = logs(x.teacher_text_logits)[t[0]].exp()
        for i in t[1:]:
            p = p * x.teacher_text_logits.softmax(-1)[i, x.teacher_text_tokens[i]]
        q_common, q_rest = split(q, x.common[:, 0].tolist())
        p_common, p_rest = split(p, x.common[:, 1].tolist())
        jsd = 0.0
        for a, b in zip(p_common, q_common, strict=True):
            m = (a + b) / 2
            jsd = jsd + (a * (a / m).log() + b * (b / m).log()) / 2
        total = total + share * jsd + (1 - share) * sorted_l1(q_rest, p_rest)
    return total / len(SPANS)


def gold_nemo(x):
    total = 0.0
    for s, t in SPANS:
        q = logs(x.text_logits)[s].mean(0).exp()
        p = logs(x.teacher_text_logits)[t].mean(0).exp()
        q_common, q_rest = split(q, x.common[:, 0].tolist())
        p_common, p_rest = split(p, x.common[:, 1].tolist())
        total = total + sum(a * (a / b).log() for a, b in zip(p_common, q_common, strict=True))
        q_rest, p_rest = (sorted(side, key=lambda v: -v.item()) for side in (q_rest, p_rest))
        total = total + sum((a - b).abs() for a, b in zip(q_rest, p_rest, strict=False))
    return total / len(SPANS)


def edit_distance(x):
    total, count = 0.0, 0
    for i, row in enumerate(x.teacher_row.tolist()):
        if row >= 0:
            pairs = [(v, c) for v, c in enumerate(x.teacher_column.tolist()) if c >= 0]
            p = torch.stack([x.teacher_text_logits[row, c] for _, c in pairs]).softmax(-1)
            logq = logs(x.text_logits)[i]
            total = total + sum(a * (a.log() - logq[v]) for a, (v, _) in zip(p, pairs, strict=True))
            count += 1
    return total / count


def in_common(x):
    s, t = 5, 5  # the one span of a token on both sides
    p, q = x.teacher_text_logits[t, x.common[:, 1]].softmax(-1), x.text_logits[s, x.common[:, 0]].softmax(-1)
    return (p * (p.log() - q.log())).sum()


def dual_space(x):
    attention = (x.queries @ x.keys.T / math.sqrt(x.keys.shape[-1])).softmax(-1)
    in_student = attention @ x.teacher_hidden @ x.to_student
    logits = in_student @ x.head.detach().T
    loss = torch.nn.functional.cross_entropy(logits, x.labels)

    q, p = x.hidden @ x.head.T, logits.detach()
    right = p.argmax(-1) == x.labels
    assert 0 < right.sum() < len(right)
    rows = (p.softmax(-1) * (logs(p) - logs(q))).sum(-1)
    loss = loss + rows[right].mean()

    q, p = x.hidden @ x.to_teacher @ x.teacher_head.T, x.teacher_hidden @ x.teacher_head.T
    return loss + (p.softmax(-1) * (logs(p) - logs(q))).sum(-1).mean()


FORMULAS = {
    "aligned-spans": aligned,
    "approximate-likelihood-matching": alm,
    "uld": uld,
    "gold-in-trl": gold_trl,
    "gold-in-nemo-rl": gold_nemo,
    "minimum-edit-distance": edit_distance,
    "a-vocabulary-in-common": in_common,
    "dual-space-distillation": dual_space,
}
