"""Distill a language model whose head is sharded by its vocabulary. Every rank has some of its rows, and all else:

    torchrun --nproc-per-node 2 examples/sharded_head.py

One process has the same losses.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import kdkernels as kd
from language_model import LENGTH, STUDENT, VOCABULARY, LanguageModel, load_teacher, windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the student (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=280, help="of the teacher (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out"), help="of the teacher's file (default: %(default)s)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    # Alike on all ranks: the draws too, for all have the same tokens.
    torch.manual_seed(0)
    for turn in (True, False):  # the first rank trains the teacher
        if turn == (rank == 0):
            teacher, training, held_out = load_teacher(args.folder, args.teacher_steps, device)
        dist.barrier()
    torch.manual_seed(0)
    student = LanguageModel(training, **STUDENT)
    rows = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    # Its own rows of the head. All before it is whole on every rank, and so is its gradient.
    head, bias = (nn.Parameter(x.detach()[rows].clone()) for x in (student.tokens.weight, student.bias))
    learning = [p for name, p in student.named_parameters() if name != "bias"]
    optimizer = torch.optim.AdamW([*learning, head, bias], lr=5e-3)
    group = dist.group.WORLD
    for step in range(1, args.steps + 1):
        batch = windows(training, LENGTH, args.batch_size)
        # The teacher's head is whole here: each rank takes its rows.
        states = student.hidden(batch), head, teacher.hidden(batch), teacher.tokens.weight
        biases = {"student_bias": bias, "teacher_bias": teacher.bias}
        loss = kd.linear_kd_loss(*states, **biases, temperature=2.0, process_group=group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == args.steps):
            print(f"step {step}: loss {loss.item():.5f}", flush=True)
    with torch.no_grad():
        x = held_out[: 64 * (LENGTH + 1)].view(-1, LENGTH + 1)
        hidden, labels = student.hidden(x[:, :-1]), x[:, 1:].contiguous()
        nats = kd.linear_kd_loss(
            hidden, head, labels=labels, student_bias=bias, kd_weight=0.0, ce_weight=1.0, process_group=group
        )
    if rank == 0:
        print(f"student: {len(head)} of {VOCABULARY} rows of the head on each of {ranks} ranks, ", end="")
        print(f"perplexity {math.exp(nats.item()):.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
