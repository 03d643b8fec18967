"""The formulas of docs/reference/recipes/sampled.md, written out token by token."""

import torch


def of_tokens(x, formula):
    """The mean over tokens of a formula of (x, a, o, r) with the token's place."""
    total, count = 0.0, 0
    for b, line in enumerate(x.tokens.tolist()):
        for i, y in enumerate(line):
            if y != -100:
                of_student = x.logits[b, i].log_softmax(-1)[y]
                of_teacher = x.teacher_logits[b, i].log_softmax(-1)[y]
                o = x.old[b, i]
                total = total + formula(of_student, of_teacher, o, (of_student - o).exp(), (b, i))
                count += 1
    return total / count


def kl(p, q):
    return (p * (p.log() - q.log())).sum()


def rows(x, formula):
    def of_row(_, __, o, r, place):
        return formula(x.teacher_logits[place].softmax(-1), x.logits[place].softmax(-1), r)

    return of_tokens(x, of_row)


def jsd(p, q):
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def rewards(x, b):
    """a - o along an answer."""
    return [
        (x.teacher_logits[b, i].log_softmax(-1)[y] - x.old[b, i]) if y != -100 else torch.tensor(0.0)
        for i, y in enumerate(x.tokens[b].tolist())
    ]


def weighted(x, a, o, place):
    b, i = place
    sizes = [abs(float(r)) for r in rewards(x, b)]
    return (1 + 0.5 * (1 - sum(sizes[:i]) / sum(sizes))) * (a - o)


def ppo(r, A, c=None):
    value = r.item()
    bound = max(-A * value, -A * min(max(value, 0.8), 1.2))
    if c is not None and A < 0 and bound > -c * A:
        return torch.tensor(-c * A, dtype=torch.float64)
    unclipped = (A > 0 and value < 1.2) or (A < 0 and value > 0.8)
    return -A * r if unclipped else torch.tensor(bound, dtype=torch.float64)


def minillm(x):
    return of_tokens(x, lambda s, a, o, r, place: ppo(r, float(sum(rewards(x, place[0])[place[1] :])), c=3.0))


def kdrl(x):
    return of_tokens(x, lambda s, a, o, r, place: ppo(r, float(x.advantages[place[0], 0])) + 0.1 * (s - a) ** 2 / 2)


def entropy_bonus(x):
    def loss(s, a, o, r, place):
        logq = x.logits[place].log_softmax(-1)
        return -x.advantages[place[0], 0] * s + 1e-3 * (logq.exp() * logq).sum()

    return of_tokens(x, loss)


def extrapolated(x):
    def loss(s, a, o, r, place):
        a0 = x.reference_logits[place].log_softmax(-1)[x.tokens[place]]
        return -(1.25 * (a - a0) - (o - a0)) * s

    return of_tokens(x, loss)


def ref_kl(s, a, o, r, _):
    m = float(s.exp() - o.exp() >= -0.2)
    return -m * (a - s).detach() * r + 1e-3 * (s - o) ** 2


def icepop(s, a, o, r, _):
    return -(a - o) * r if 0.5 <= r.item() <= 5.0 else 0 * r


def k3(s, a, o, r, _):
    return (a - s).exp() - 1 - (a - s)


def k3_plus(s, a, *_):
    return (s - a) ** 2 / 2 - (s - a).detach() ** 2 / 2 + ((a - s).exp() - 1 - (a - s)).detach()


def privileged(x):
    pairs = [((0, 2), (0, 5)), ((0, 3), (0, 6)), ((0, 4), (0, 7)), ((1, 1), (1, 2)), ((1, 2), (1, 3))]
    return sum(jsd(x.long_logits[t].softmax(-1), x.logits[s].softmax(-1)) for s, t in pairs) / 5


FORMULAS = {
    "whole-rows-on-policy": lambda x: rows(x, lambda p, q, r: jsd(p, q)),
    "sequence-level-kd": lambda x: of_tokens(x, lambda s, *_: -s),
    "policy-gradient": lambda x: of_tokens(x, lambda s, a, *_: (s - a).detach() * s),
    "estimators-of-the-kl": (
        lambda x: of_tokens(x, lambda s, a, *_: (s - a) ** 2 / 2),
        lambda x: of_tokens(x, k3),
        lambda x: of_tokens(x, k3_plus),
    ),
    "clipped-importance-weights": lambda x: rows(x, lambda p, q, r: kl(q, p) * r.detach().clamp(max=2.0)),
    "advantages": lambda x: of_tokens(x, lambda s, a, o, r, place: -weighted(x, a, o, place) * s),
    "importance-ratio": lambda x: of_tokens(x, lambda s, a, o, r, place: -0.5 * (a - o) * r),
    "ppo-with-a-teachers-reward": minillm,
    "a-reward-beside-the-teacher": kdrl,
    "an-entropy-bonus": entropy_bonus,
    "extrapolated-rewards": extrapolated,
    "reference-kl": lambda x: of_tokens(x, ref_kl),
    "engines-that-disagree": lambda x: of_tokens(x, icepop),
    "privileged-teachers": privileged,
}
