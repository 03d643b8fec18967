"""Distill a language model on text that the student writes itself: the teacher only judges it.

Three losses start from one student, which has read a little text: reverse KL of whole distributions, reverse KL on the
student's K likeliest tokens, and on the sampled token alone, for which a teacher gives one number a token.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels import onpolicy
from language_model import STUDENT, LanguageModel, load_teacher, perplexity, windows

PROMPT, TOP_K = 16, 64


def whole(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    return kd.kd_loss(student, teacher, divergence="reverse_kl")


def top_k(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    chosen = kd.gather_logprobs(teacher, kd.capture_topk(student.detach(), TOP_K).ids)
    return kd.topk_kd_loss(student, *chosen[:2], tail_logprob=chosen.tail_logprob, divergence="reverse_kl")


def sampled(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    x, a = (kd.token_logprobs(logits, ids).logprobs for logits in (student, teacher))
    return onpolicy.policy_gradient(x, a)


# With learning rates: the gradient of one token in place of all is noisy.
LOSSES = {"whole": (whole, 2e-3), "top-k": (top_k, 2e-3), "sampled": (sampled, 5e-4)}


@torch.no_grad()
def write(student: LanguageModel, prompts: Tensor, length: int) -> Tensor:
    """Prompts with what the student goes on to say, ``length`` tokens in all."""
    tokens = prompts
    while tokens.shape[1] < length:
        logits = F.linear(student.hidden(tokens)[:, -1], student.tokens.weight, student.bias)
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


def written(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits of the tokens behind the prompt."""
    return model(tokens[:, :-1])[:, PROMPT - 1 :]


@torch.no_grad()
def judge(student: LanguageModel, teacher: LanguageModel, held_out: Tensor, length: int) -> tuple[float, float]:
    """Perplexity on the held-out text, and reverse KL a token on what the student writes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokens = write(student, windows(held_out, PROMPT, 32), length)
    return perplexity(student, held_out), whole(written(student, tokens), written(teacher, tokens), tokens).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="on the student's own text (default: %(default)s)")
    parser.add_argument("--first-steps", type=int, default=30, help="on given text, before (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=280, help="of the teacher (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out"), help="of the teacher's file (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a picture of the curves, drawn with matplotlib")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, training, held_out = load_teacher(args.folder, args.teacher_steps, device)

    first = LanguageModel(training, **STUDENT)
    optimizer = torch.optim.AdamW(first.parameters(), lr=5e-3)
    for _ in range(args.first_steps):
        batch = windows(training, args.length, args.batch_size)
        optimizer.zero_grad()
        kd.kd_loss(first(batch), teacher(batch)).backward()
        optimizer.step()

    curves: dict[str, list[tuple[float, ...]]] = {}
    for name, (loss_of, rate) in LOSSES.items():
        student, curve = copy.deepcopy(first), curves.setdefault(name, [])
        optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
        for step in range(args.steps + 1):
            if step % max(args.steps // 4, 1) == 0:
                curve.append((step, *judge(student, teacher, held_out, args.length)))
                print(f"{name}, step {step}: perplexity {curve[-1][1]:.1f}, reverse KL {curve[-1][2]:.3f}", flush=True)
            if step == args.steps:
                break
            tokens = write(student, windows(training, PROMPT, args.batch_size), args.length)
            loss = loss_of(written(student, tokens), written(teacher, tokens), tokens[:, PROMPT:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if args.plot:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        for axis, column, title in zip(axes, (1, 2), ("held-out perplexity", "reverse KL a token"), strict=True):
            axis.set(xlabel="step", title=title)
            for name, curve in curves.items():
                axis.plot([point[0] for point in curve], [point[column] for point in curve], label=name)
        axes[1].legend()
        figure.savefig(args.plot)


if __name__ == "__main__":
    main()
