"""The language models of distill_lm.py, offline.py and on_policy.py, and their text.

The text is the English prose that ships with Python (language reference and docstrings), cut into the tokens of a BPE
vocabulary trained on it; no download.
"""

import ast
import math
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, HEADS = 8192, 128, 4
TEACHER, STUDENT = {"width": 128, "layers": 3}, {"width": 64, "layers": 2}


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

    def __init__(self, training: Tensor, width: int, layers: int) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        # The log-frequencies of the tokens, which otherwise cost the first hundred steps to learn.
        counts = torch.bincount(training, minlength=VOCABULARY) + 0.5
        self.bias = nn.Parameter((counts / counts.sum()).log())
        self.to(training.device)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = (self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]) * self.scale
        return self.norm(self.blocks(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.tokens.weight, self.bias)


def read_text() -> tuple[Tensor, Tensor]:
    """Train a vocabulary; return the tokens of the training and of the held-out text."""
    texts = list(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"}.isdisjoint(path.relative_to(library).parts):
            nodes = ast.walk(ast.parse(path.read_bytes()))
            texts += [ast.get_docstring(x) or "" for x in nodes if isinstance(x, (ast.ClassDef, ast.FunctionDef))]
    paragraphs = [" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")]
    # Overridden methods repeat their docstrings: a paragraph seen in training must not come back in the held-out text.
    paragraphs = list(dict.fromkeys(paragraph for paragraph in paragraphs if len(paragraph) > 60))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(paragraphs, VOCABULARY, show_progress=False)
    tokens = [torch.tensor(encoded.ids) for encoded in tokenizer.encode_batch(paragraphs)]
    return torch.cat([x for number, x in enumerate(tokens) if number % 16]), torch.cat(tokens[::16])


def windows(tokens: Tensor, length: int, batch_size: int) -> Tensor:
    starts = torch.randint(len(tokens) - length + 1, (batch_size, 1))
    return tokens[starts.to(tokens.device) + torch.arange(length, device=tokens.device)]


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    nats, rows = 0.0, tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1).split(4)
    for x in rows:
        nats += F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
    return math.exp(nats / sum(x[:, 1:].numel() for x in rows))


def load_teacher(folder: Path, steps: int, device: str) -> tuple[LanguageModel, Tensor, Tensor]:
    """Return the teacher, which is trained where that has not been done, and the tokens to train on and held out."""
    path = folder / f"lm-teacher-{steps}.pt"
    if path.exists():
        saved = torch.load(path, map_location=device)
        teacher = LanguageModel(saved["training"], **TEACHER)
        teacher.load_state_dict(saved["weights"])
        return teacher.requires_grad_(False), saved["training"], saved["held_out"]
    training, held_out = (tokens.to(device) for tokens in read_text())
    print(f"teacher: {steps} steps on {len(training)} tokens, to be kept in {path}", flush=True)
    teacher = LanguageModel(training, **TEACHER)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = windows(training, LENGTH + 1, 4)
        loss = F.cross_entropy(teacher(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 70 == 0:
            print(f"teacher, step {step}: loss {loss.item():.2f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": teacher.state_dict(), "training": training, "held_out": held_out}, path)
    return teacher.requires_grad_(False), training, held_out
