"""Distill the language model of distill_lm.py from a cache on disk: the teacher is captured once and then not needed.

The cache has the teacher's K most likely tokens at every position. A second call finds it complete and only trains.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import kdkernels as kd
from kdkernels.cache import TeacherCache, TeacherCacheWriter, TeacherDataset
from language_model import LENGTH, STUDENT, VOCABULARY, LanguageModel, load_teacher, perplexity, windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the student (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=280, help="of the teacher (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=2.0, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=64, help="tokens kept at every position (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out"), help="of teacher and cache (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, training, held_out = load_teacher(args.folder, args.teacher_steps, device)

    # A cache says whose it is: one of another teacher, tokenizer, K or temperature is refused.
    name = f"lm-teacher-{args.teacher_steps}"
    identity = {"teacher": name, "tokenizer": name, "vocab_size": VOCABULARY}
    identity |= {"k": args.top_k, "temperature": args.temperature}
    folder = args.folder / f"{name}-{args.steps}x{args.batch_size}-top-{args.top_k}-T{args.temperature:g}"
    # Drawn from a seed of their own, so that a capture that was interrupted goes on with the same text.
    torch.manual_seed(1)
    sequences = windows(training, LENGTH, args.steps * args.batch_size)
    with TeacherCacheWriter(folder, **identity, extras={"input_ids": torch.int32}) as writer, torch.no_grad():
        print(f"teacher: {len(writer)} of {len(sequences)} sequences are in {folder}")
        for batch in sequences[len(writer) :].split(args.batch_size):
            captured = kd.capture_topk(teacher(batch), args.top_k, temperature=args.temperature)
            for tokens, *row in zip(batch, *captured, strict=True):
                writer.append(*row, input_ids=tokens)

    cache = TeacherCache(folder, **identity, verify="full")
    size = sum(shard.bytes for shard in cache.index.shards) / cache.num_tokens
    print(f"cache: {size:.0f} bytes a token; its logits in 16 bits are {2 * VOCABULARY}")

    student = LanguageModel(training, **STUDENT)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    loader = DataLoader(TeacherDataset(cache), batch_size=args.batch_size)
    for step, batch in enumerate(loader, 1):
        batch = {key: value.to(device) for key, value in batch.items()}
        # The log-probabilities were taken at this temperature already, so that the teacher's own is 1.
        loss = kd.topk_kd_loss(
            student(batch["input_ids"].long()),
            batch["ids"],
            batch["logprobs"],
            tail_logprob=batch["tail_logprob"],
            temperature=args.temperature,
            teacher_temperature=1.0,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == len(loader):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    print(f"student: perplexity {perplexity(student, held_out):.1f}")


if __name__ == "__main__":
    main()
