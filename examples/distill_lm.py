"""Distill a transformer language model into a smaller one.

The teacher is trained first, on English prose that ships with Python, and kept in a file for the next call.
"""

import argparse
from pathlib import Path

import torch

import kdkernels as kd
from language_model import LENGTH, STUDENT, LanguageModel, load_teacher, perplexity, windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the student (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=280, help="of the teacher (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=2.0, help="(default: %(default)s)")
    parser.add_argument("--fused-linear", action="store_true", help="never store the logits: the loss of hidden states")
    parser.add_argument("--folder", type=Path, default=Path("out"), help="of the teacher's file (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, training, held_out = load_teacher(args.folder, args.teacher_steps, device)
    print(f"teacher: perplexity {perplexity(teacher, held_out):.1f}")

    student = LanguageModel(training, **STUDENT)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    for step in range(1, args.steps + 1):
        batch = windows(training, LENGTH, args.batch_size)
        if args.fused_linear:
            heads = {"student_bias": student.bias, "teacher_bias": teacher.bias}
            states = student.hidden(batch), student.tokens.weight, teacher.hidden(batch), teacher.tokens.weight
            loss = kd.linear_kd_loss(*states, **heads, temperature=args.temperature)
        else:
            loss = kd.kd_loss(student(batch), teacher(batch), temperature=args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    print(f"student: perplexity {perplexity(student, held_out):.1f}")


if __name__ == "__main__":
    main()
