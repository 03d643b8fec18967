"""Distill a transformer language model into a smaller one, with eager PyTorch and with kdkernels.

The text is the English prose that ships with Python (language reference and docstrings), cut into the tokens of a BPE
vocabulary trained on it; no download. The teacher is trained first and kept for the next call.

With --fused-linear kdkernels takes hidden states and heads in place of logits, and never stores these whole.

With --offline the teacher is captured once, its K most likely tokens at every position, into a cache on disk, and a
student is trained from the cache alone; the comparison is with a student that asks the teacher itself in every step.
"""

import argparse
import math
import platform
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import corpus
import kdkernels as kd

DEFAULTS = {
    "steps": 80,
    "batch_size": 8,
    "temperature": 2.0,
    "teacher_steps": 280,
    "threads": torch.get_num_threads(),
}
QUICK = {"steps": 12, "batch_size": 4, "teacher_steps": 20}
TEACHER = {"width": 128, "layers": 3}
STUDENT = {"width": 64, "layers": 2}
HEADS = 4
LENGTH = 128
LEARNING_RATE = 5e-3  # of the students
TEACHER_BATCH = 4  # a small batch: more steps for the same work
END = "<|end|>"
# Every 16th document is held out.
HELD_OUT = 16
# Of the relative difference of the curves. Rounding alone gives 1e-6; a wrong gradient shows in the first steps.
TOLERANCE = 1e-3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, HEADS, L, D / HEADS]
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """A causal transformer: tokens [B, L] to logits [B, L, V]; input and output share their embedding."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def start_from(self, tokens: Tensor) -> None:
        """Set the bias to the log-frequencies of tokens, which otherwise costs the first hundred steps to learn."""
        counts = torch.bincount(tokens, minlength=len(self.bias)) + 0.5
        with torch.no_grad():
            self.bias.copy_((counts / counts.sum()).log())

    def hidden(self, tokens: Tensor) -> Tensor:
        x = (self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]) * self.scale
        return self.norm(self.blocks(x))

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.tokens.weight, self.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def tokenize(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Train a byte-level BPE on the training text; return the tokens of the training and of the held-out text."""
    documents = corpus.english_documents()
    held_out = documents[::HELD_OUT]
    training = [text for index, text in enumerate(documents) if index % HELD_OUT]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the text gives a vocabulary of {tokenizer.get_vocab_size()} only, wanted {vocabulary}")

    def encode(texts: list[str]) -> Tensor:
        return torch.tensor([token for text in tokenizer.encode_batch(texts) for token in (*text.ids, 0)])

    return encode(training), encode(held_out)


def random_windows(tokens: Tensor, length: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (steps, batch_size, 1), generator=generator)
    windows = starts.to(tokens.device) + torch.arange(length, device=tokens.device)
    return [tokens[window] for window in windows]


def perplexity(model: nn.Module, tokens: Tensor) -> float:
    windows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    nats = 0.0
    with torch.no_grad():
        # A few windows at a time: less memory than a training step.
        for window in windows.split(4):
            logits = model(window[:, :-1])
            nats += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
    return math.exp(nats / windows[:, 1:].numel())


def train_teacher(args: argparse.Namespace) -> dict[str, Any]:
    device = common.prepare(args)
    print("teacher: reading the text and training the vocabulary")
    training, held_out = (tokens.to(device) for tokens in tokenize(args.vocabulary))
    print(f"teacher: {len(training)} tokens to train on, {len(held_out)} held out")
    model = LanguageModel(args.vocabulary, **TEACHER)
    model.to(device).start_from(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.teacher_steps, pct_start=0.1)
    batches = random_windows(training, LENGTH + 1, TEACHER_BATCH, args.teacher_steps, args.seed)
    for batch in common.progress(batches, "teacher"):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {
        "weights": {name: weight.cpu() for name, weight in model.state_dict().items()},
        "training": training.cpu(),
        "held_out": held_out.cpu(),
        "perplexity": perplexity(model, held_out),
    }


def distill(name: str, args: argparse.Namespace, teacher_path: Path) -> common.Run:
    device = common.prepare(args)
    saved = torch.load(teacher_path, map_location=device, weights_only=True)
    teacher = load_teacher(args, saved, device)
    return common.distill(
        name,
        make_student(args, saved, device),
        teacher,
        student_windows(args, saved),
        args,
        learning_rate=LEARNING_RATE,
        evaluate=lambda model: perplexity(model, saved["held_out"]),
    )


def distill_hidden(name: str, args: argparse.Namespace, teacher_path: Path) -> common.Run:
    """Train a student on its teacher's hidden states; the heads of both, and their products, belong to the loss."""
    device = common.prepare(args)
    saved = torch.load(teacher_path, map_location=device, weights_only=True)
    teacher = load_teacher(args, saved, device).requires_grad_(False)
    student = make_student(args, saved, device)
    eager = common.eager_kd_loss(args.divergence, args.temperature)
    fused = kd.LinearKDLoss(
        divergence=args.divergence,
        temperature=args.temperature,
        backend=args.backend,
        chunk_bytes=args.chunk_mib * common.MIB,
    )

    def eager_loss(hidden: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher.head(target)
        return eager(student.head(hidden), teacher_logits)

    def fused_loss(hidden: Tensor, target: Tensor) -> Tensor:
        heads = {"student_bias": student.bias, "teacher_bias": teacher.bias}
        loss: Tensor = fused(hidden, student.tokens.weight, target, teacher.tokens.weight, **heads)
        return loss

    return common.train(
        name,
        "eager" if name == common.EAGER else kd.backends.select(args.backend, device.type),
        student,
        lambda batch: (batch, teacher.hidden(batch)),
        student_windows(args, saved),
        eager_loss if name == common.EAGER else fused_loss,
        LEARNING_RATE,
        lambda model: perplexity(model, saved["held_out"]),
        student.hidden,
    )


def load_teacher(args: argparse.Namespace, saved: dict[str, Any], device: torch.device) -> LanguageModel:
    teacher = LanguageModel(args.vocabulary, **TEACHER).to(device).eval()
    teacher.load_state_dict(saved["weights"])
    return teacher


def make_student(args: argparse.Namespace, saved: dict[str, Any], device: torch.device) -> LanguageModel:
    student = LanguageModel(args.vocabulary, **STUDENT).to(device)
    student.start_from(saved["training"])
    return student


def student_windows(args: argparse.Namespace, saved: dict[str, Any]) -> list[Tensor]:
    """The batches that a student is trained on, one a step."""
    return random_windows(saved["training"], LENGTH, args.batch_size, args.steps, args.seed + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser)
    parser.add_argument("--vocabulary", type=int, default=8192, help="size of the BPE vocabulary")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fused-linear", action="store_true", help="never store the logits: the loss of hidden states")
    what.add_argument("--offline", action="store_true", help="train from a cache of the teacher's top k")
    parser.add_argument("--chunk-mib", type=int, default=4, help="with --fused-linear: of logits at a time, in MiB")
    parser.add_argument("--top-k", type=int, default=64, help="with --offline: tokens kept at every position")
    args = common.parse(parser, DEFAULTS, QUICK)
    if args.chunk_mib < 1:
        parser.error(f"--chunk-mib must be at least 1, got {args.chunk_mib}")
    if args.offline:
        # Here, not at the top: it imports this file, and what it needs besides.
        import offline

        try:
            offline.check(args)
        except ValueError as error:
            parser.error(str(error))

    config = {
        "model": TEACHER,
        "heads": HEADS,
        "length": LENGTH,
        "batch": TEACHER_BATCH,
        "held_out": HELD_OUT,
        "steps": args.teacher_steps,
        "vocabulary": args.vocabulary,
        "seed": args.seed,
        # They decide what the text and its tokens are.
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
    }
    path, trained = common.cached(args.cache_dir, "lm-teacher", config, lambda: train_teacher(args))
    form = "offline" if args.offline else "fused_linear" if args.fused_linear else "logits"
    if args.offline:
        left, right = offline.run(args, path)
    else:
        function = distill_hidden if args.fused_linear else distill
        left, right = (common.in_own_process(function, name, args, path) for name in (common.EAGER, common.FUSED))
    title = {
        "logits": "Language model: a small transformer distilled from a larger one, twice",
        "fused_linear": "Language model distilled twice: from whole logits, and from hidden states in chunks",
        "offline": f"Language model: a student of its teacher's top {args.top_k}, asked each time and captured once",
    }[form]
    example = common.Example(
        name="distill_lm" if form == "logits" else f"distill_lm_{form}",
        title=title,
        score="perplexity of held-out text",
        score_format=".1f",
        teacher_score=torch.load(path, weights_only=True)["perplexity"],
        teacher_trained=trained,
        tolerance=offline.TOLERANCE if args.offline else TOLERANCE,
        shape=f"[{args.batch_size}, {LENGTH}, {args.vocabulary}]",
    )
    return common.report(example, args, left, right)


if __name__ == "__main__":
    sys.exit(main())
