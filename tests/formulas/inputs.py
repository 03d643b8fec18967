"""The tensors that the recipes name, in fp64: small, generic, and of sizes that differ from each other."""

import torch

N, V = 6, 11


def inputs():
    """Names and tensors, drawn from the seed of the test; what a student makes requires grad."""

    def normal(*shape, scale=2.0):
        return scale * torch.randn(*shape, dtype=torch.float64)

    def student(*shape, scale=2.0):
        return normal(*shape, scale=scale).requires_grad_()

    given = {
        # Logits of classifiers and language models.
        "student": student(N, V),
        "peer": student(N, V),
        "teacher": normal(N, V),
        "teacher_b": normal(N, V),
        "teacher_c": normal(N, V),
        "labels": torch.tensor([3, 0, 10, 7, 3, 5]),
        "wrote_teacher": torch.tensor([True, False, True, True, False, False]),
        "alpha": torch.tensor([0.1, 0.3, 0.2, 0.5, 0.7, 0.1], dtype=torch.float64),
        "lam": torch.tensor([0.0, 0.3, 1.0, 0.5, 0.7, 0.1], dtype=torch.float64),
        "domain": torch.tensor([0, 1, 1, 0, 0, 1]),
        "student_ce": torch.rand(N, dtype=torch.float64) + 0.5,
        "teacher_ce": torch.rand(N, dtype=torch.float64) + 0.5,
        "tau": torch.tensor(0.4, dtype=torch.float64, requires_grad=True),
        "router_logits": student(3, 5, 4),
        "teacher_router_logits": normal(3, 5, 4),
        # Hidden states and heads.
        "hidden": student(N, 5, scale=1.0),
        "head": student(V, 5, scale=1.0),
        "teacher_hidden": normal(N, 7, scale=1.0),
        "teacher_head": normal(V, 7, scale=1.0),
        # Sampled tokens: two answers, one shorter.
        "logits": student(2, 5, V),
        "teacher_logits": normal(2, 5, V),
        "reference_logits": normal(2, 5, V),
        "tokens": torch.tensor([[3, 1, 10, 0, 7], [2, 2, 9, -100, -100]]),
        "advantages": torch.tensor([[0.7], [-1.2]], dtype=torch.float64),
        "long_logits": normal(2, 8, V),
        "answer": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool),
        "long_answer": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool),
        # Entries from a server, with two kinds of padding.
        "served_ids": torch.tensor([[3, 1, 4], [0, 2, -1], [5, 6, 7], [10, 9, 0], [1, 0, 8], [2, 3, 4]]),
        "served_logprobs": torch.tensor(
            [[-1, -2, -3], [-0.5, -1.5, 0], [-2, -2, -2], [-0.1, -3, -9999], [-1, -1, -4], [-1, -1.5, -2]],
            dtype=torch.float64,
        ),
        # Drafters: 7 of the target's columns, heads that look ahead, blocks.
        "confidence": student(N),
        "columns": torch.tensor([10, 0, 3, 4, 7, 8, 1]),
        "draft_logits": student(N, 7),
        "draft_head": student(7, 5, scale=1.0),
        "head_logits": student(3, N, V),
        "head_targets": normal(3, N, V),
        "blocks": student(2, 4, V),
        "block_tokens": torch.tensor([[3, 1, 10, 0], [2, 2, 9, 5]]),
        # One text, "two tokenisations": pieces (0, 5), (5, 9), (9, 12) and (12, 14), and at the teacher an end token.
        "text_logits": student(6, V),
        "text_tokens": torch.tensor([3, 1, 10, 0, 7, 2]),
        "text_offsets": torch.tensor([[0, 2], [2, 5], [5, 6], [6, 9], [9, 12], [12, 14]]),
        "teacher_text_logits": normal(7, 9),
        "teacher_text_tokens": torch.tensor([8, 2, 2, 5, 0, 1, 6]),
        "teacher_text_offsets": torch.tensor([[0, 5], [5, 7], [7, 9], [9, 10], [10, 12], [12, 14], [14, 14]]),
        "common": torch.tensor([[0, 1], [3, 4], [5, 0], [8, 8]]),
        "teacher_row": torch.tensor([0, -1, 1, 2, 4, 5]),
        "teacher_column": torch.tensor([1, 2, -1, 4, -1, 0, 3, -1, 8, 7, -1]),
        "queries": student(N, 4, scale=1.0),
        "keys": student(N, 4, scale=1.0),
        "to_student": student(7, 5, scale=1.0),
        "to_teacher": student(5, 7, scale=1.0),
        # Attention and caches: 2 samples, 3 heads, 4 tokens.
        **{name: student(2, 3, 4, 5, scale=1.0) for name in ("q", "k", "v", "cache_k", "cache_v")},
        **{f"teacher_{name}": normal(2, 3, 4, 6, scale=1.0) for name in ("q", "k", "v")},
        **{f"teacher_{name}": normal(2, 3, 4, 5, scale=1.0) for name in ("cache_k", "cache_v")},
        "log_variance": student(7, scale=0.5),
        # Contrast: a bank of the teacher's features, the row's own first.
        "z": student(N, 5, scale=0.1),
        "bank": normal(20, 5, scale=0.1),
        "ids": torch.tensor([[i, *[(7 * i + j) % 20 for j in (6, 11, 13)]] for i in range(N)]),
        "Z": torch.tensor(30.0, dtype=torch.float64),
        "scores_of_queries": student(N, 4),
        "teacher_scores_of_queries": normal(N, 4),
        # Vision.
        "maps": student(2, 3, 4, 5),
        "teacher_maps": normal(2, 3, 4, 5),
        "pixel_labels": torch.tensor([0, 1, 2, 255, 1]).expand(2, 4, 5).contiguous(),
        "bins": student(3, 4, 8),
        "teacher_bins": normal(3, 4, 8),
        "box_weight": torch.tensor([0.2, 1.0, 0.7], dtype=torch.float64),
        "queue": normal(9, 5, scale=0.3),
        "teacher_queue": normal(9, 7, scale=0.3),
        "center": normal(V),
        "patches_in_image": torch.tensor([2, 2, 3, 3, 3, 1]),
        "images": 3,
        "log_probs": normal(N, V).log_softmax(-1).requires_grad_(),
    }
    # A sampler near the student, but for two tokens outside every band; a sure teacher and an unsure one beside others.
    picked = given["logits"].detach().log_softmax(-1).gather(-1, given["tokens"].clamp_min(0)[..., None])[..., 0]
    given["old"] = picked - torch.tensor([[0.1, -0.3, 0.5, 1.8, -0.1], [-1.5, 0.05, -0.15, 0.0, 0.0]])
    given["teacher"][0] *= 5
    given["teacher"][1] *= 0.1
    # Rows on which a teacher is right, beside others.
    with torch.no_grad():
        attention = (given["queries"] @ given["keys"].T / 2).softmax(-1)
        predicted = attention @ given["teacher_hidden"] @ given["to_student"] @ given["head"].T
    given["labels"][:3] = predicted[:3].argmax(-1)
    given["labels"][3] = given["teacher"][3].argmax(-1)
    return given
