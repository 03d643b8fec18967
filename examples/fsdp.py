"""Distill a language model that FSDP2 shards, with the loss of hidden states. Every rank has sequences of its own:

    torchrun --nproc-per-node 2 examples/fsdp.py

One process has the same losses.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import kdkernels as kd
from language_model import LENGTH, STUDENT, LanguageModel, load_teacher, perplexity, windows


class Student(LanguageModel):
    def distill(self, tokens: Tensor, teacher: LanguageModel) -> Tensor:
        """The head is gathered here, and its gradient averaged over the ranks and scattered."""
        heads = {"student_bias": self.bias, "teacher_bias": teacher.bias}
        states = self.hidden(tokens), self.tokens.weight, teacher.hidden(tokens), teacher.tokens.weight
        return kd.linear_kd_loss(*states, **heads, temperature=2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the student (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=280, help="of the teacher (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of all ranks (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out"), help="of the teacher's file (default: %(default)s)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    for turn in (True, False):  # the first rank trains the teacher
        if turn == (rank == 0):
            torch.manual_seed(0)
            teacher, training, held_out = load_teacher(args.folder, args.teacher_steps, device)
        dist.barrier()
    torch.manual_seed(0)
    student = Student(training, **STUDENT)
    mesh = dist.init_device_mesh(device, (ranks,))
    for module in (*student.blocks, student):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(student, "distill")
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    for step in range(1, args.steps + 1):
        # Drawn alike on all ranks, which then take their own.
        batch = windows(training, LENGTH, args.batch_size)[rank::ranks]
        loss = student.distill(batch, teacher)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0 and (step % 10 == 0 or step == args.steps):
            print(f"step {step}: loss {mean.item():.5f}", flush=True)
    reached = perplexity(student, held_out[: 64 * (LENGTH + 1)])
    if rank == 0:
        print(f"student: sharded over {ranks} ranks, perplexity {reached:.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
