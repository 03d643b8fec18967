"""``distill_lm.py --offline``: the teacher is captured into a cache, and a student trained from the cache alone."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import common
import distill_lm as lm
import kdkernels as kd
from kdkernels.cache import CacheFormatError, TeacherCache, TeacherCacheWriter, TeacherDataset

ONLINE, OFFLINE = "online teacher", "teacher cache"
# Of the relative difference of the curves: rounding log-probabilities to fp16 gives 1e-5 in the first steps, which
# training carries to 1e-3 in a hundred.
TOLERANCE = 1e-2


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that the offline run cannot have, before a teacher is trained for it."""
    if not 1 <= args.top_k <= args.vocabulary:
        raise ValueError(f"--top-k must be in [1, {args.vocabulary}], got {args.top_k}")
    loss_backend(args)


def loss_backend(args: argparse.Namespace) -> str:
    device = common.pick_device(args.device)
    return kd.backends.select(args.backend, device.type, divergence=args.divergence, pattern="topk_fwd")


def cache_identity(args: argparse.Namespace, teacher_path: Path) -> dict[str, Any]:
    """Whose log-probabilities the cache has. The teacher's file is named by all that made it and its vocabulary."""
    return {
        "tokenizer": teacher_path.stem,
        "teacher": teacher_path.stem,
        "vocab_size": args.vocabulary,
        "k": args.top_k,
        "temperature": args.temperature,
    }


def cache_folder(args: argparse.Namespace, teacher_path: Path) -> Path:
    """A folder for each teacher and each sequence of batches."""
    content = {**cache_identity(args, teacher_path), "batches": [args.steps, args.batch_size, lm.LENGTH, args.seed]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return args.cache_dir / f"lm-captured-{digest[:16]}"


def capture_teacher(args: argparse.Namespace, teacher_path: Path, folder: Path) -> None:
    """Write what the teacher says to every window into the cache, or what is missing there."""
    device = common.prepare(args)
    saved = torch.load(teacher_path, map_location=device, weights_only=True)
    teacher = lm.load_teacher(args, saved, device)
    windows = torch.cat(lm.student_windows(args, saved))
    identity = cache_identity(args, teacher_path)
    extras = {"input_ids": torch.int32}
    with TeacherCacheWriter(folder, **identity, extras=extras) as writer, torch.no_grad():
        if len(writer):
            print(f"teacher: {len(writer)} of {len(windows)} sequences were captured before")
        for batch in common.progress(windows[len(writer) :].split(args.batch_size), "capture"):
            captured = kd.capture_topk(teacher(batch), args.top_k, temperature=args.temperature)
            for ids, logprobs, tail_logprob, tokens in zip(*captured, batch, strict=True):
                writer.append(ids, logprobs, tail_logprob, input_ids=tokens)


def distill_top_k(name: str, args: argparse.Namespace, teacher_path: Path, folder: Path) -> common.Run:
    """Train a student on the teacher's top k, asked in every step or read from the cache."""
    device = common.prepare(args)
    # Mapped: whoever reads the cache touches no weight of the teacher.
    saved = torch.load(teacher_path, map_location=device, weights_only=True, mmap=True)
    # Before a teacher is made, which takes its weights from the same generator: both students start as one.
    student = lm.make_student(args, saved, device)
    batches: Sequence[Any]
    if name == ONLINE:
        teacher = lm.load_teacher(args, saved, device)
        batches = lm.student_windows(args, saved)

        def ask(batch: Any) -> tuple[Tensor, Any]:
            return batch, kd.capture_topk(teacher(batch), args.top_k, temperature=args.temperature)

    else:
        cache = TeacherCache(folder, **cache_identity(args, teacher_path))
        loaded = iter(DataLoader(TeacherDataset(cache), batch_size=args.batch_size))
        batches = range(args.steps)

        def ask(batch: Any) -> tuple[Tensor, Any]:
            read = {key: value.to(device) for key, value in next(loaded).items()}
            return read["input_ids"].long(), kd.TeacherTopK(read["ids"], read["logprobs"], read["tail_logprob"])

    # Both have been taken at this temperature already.
    loss_module = kd.TopKKDLoss(
        divergence=args.divergence, temperature=args.temperature, teacher_temperature=1.0, backend=args.backend
    )
    return common.train(
        name,
        loss_backend(args),
        student,
        ask,
        batches,
        lambda logits, captured: loss_module(logits, *captured[:2], tail_logprob=captured.tail_logprob),
        lm.LEARNING_RATE,
        lambda model: lm.perplexity(model, saved["held_out"]),
    )


def run(args: argparse.Namespace, teacher_path: Path) -> tuple[common.Run, common.Run]:
    """Capture the teacher where that has not been done, and train both students."""
    folder = cache_folder(args, teacher_path)
    identity = cache_identity(args, teacher_path)
    try:
        missing = len(TeacherCache(folder, **identity)) < args.steps * args.batch_size
    except CacheFormatError:
        missing = True
    print(f"teacher: {'to be captured' if missing else 'captured before,'} in {folder}")
    if missing:
        common.in_own_process(capture_teacher, args, teacher_path, folder)
    cache = TeacherCache(folder, **identity, verify="full")
    size = sum(shard.bytes for shard in cache.index.shards)
    print(
        f"teacher: {len(cache)} sequences, {cache.num_tokens} tokens, {size / common.MIB:.1f} MiB, "
        f"{size / cache.num_tokens:.1f} bytes a token; its logits in 16 bits are {2 * args.vocabulary}"
    )
    online, from_cache = (
        common.in_own_process(distill_top_k, name, args, teacher_path, folder) for name in (ONLINE, OFFLINE)
    )
    return online, from_cache
