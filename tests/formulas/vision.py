"""The formulas of docs/reference/recipes/vision.md, written out."""

from itertools import product

import torch.nn.functional as F


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def pixels(x):
    total, count = 0.0, 0
    for b, i, j in product(range(2), range(4), range(5)):
        if (y := int(x.pixel_labels[b, i, j])) != 255:
            s, t = x.maps[b, :, i, j], x.teacher_maps[b, :, i, j]
            total = total + 16 * kl((t / 4).softmax(-1), (s / 4).softmax(-1)) - s.log_softmax(-1)[y]
            count += 1
    return total / count


def channels(x):
    rows = [
        kl((x.teacher_maps[b, c].reshape(-1) / 4).softmax(-1), (x.maps[b, c].reshape(-1) / 4).softmax(-1))
        for b, c in product(range(2), range(3))
    ]
    return 16 * sum(rows) / len(rows)


def hard_labels(x):
    return (F.cross_entropy(x.student, x.labels) + F.cross_entropy(x.student, x.teacher.argmax(-1))) / 2


def bins(x):
    rows = 100 * kl((x.teacher_bins / 10).softmax(-1), (x.bins / 10).softmax(-1))
    return sum(w * row.sum() for w, row in zip(x.box_weight, rows, strict=True)) / rows.numel()


def queue(x):
    s = x.hidden / x.hidden.norm(dim=-1, keepdim=True) @ x.queue.T
    t = x.teacher_hidden / x.teacher_hidden.norm(dim=-1, keepdim=True) @ x.teacher_queue.T
    return -((t / 0.01).softmax(-1) * (s / 0.2).log_softmax(-1)).sum(-1).mean()


def dino(x):
    rows = -(((x.teacher - x.center) / 0.04).softmax(-1) * (x.student / 0.1).log_softmax(-1)).sum(-1)
    return rows


def ibot(x):
    return sum(row / n for row, n in zip(dino(x), x.patches_in_image.tolist(), strict=True)) / 3


def balanced(x):
    # The loop over the matrix itself: columns to 1 / K, rows to 1 / B.
    B, K = x.teacher.shape
    Q = (x.teacher / 0.07 - (x.teacher / 0.07).max()).exp()
    Q = Q / Q.sum()
    for _ in range(3):
        Q = Q / Q.sum(0, keepdim=True) / K
        Q = Q / Q.sum(1, keepdim=True) / B
    return -(Q * B * (x.student / 0.1).log_softmax(-1)).sum(-1).mean()


FORMULAS = {
    "pixels": pixels,
    "channels": channels,
    "hard-labels-of-a-teacher": hard_labels,
    "bins-of-a-box": bins,
    "similarity-to-a-queue": queue,
    "prototypes": lambda x: dino(x).mean(),
    "masked-patches": ibot,
    "balanced-prototypes": balanced,
}
