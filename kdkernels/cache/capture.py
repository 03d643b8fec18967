"""A teacher run over texts into a cache: what ``kdkernels cache capture`` does."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kdkernels.cache.index import Index, canonical_json, name_of
from kdkernels.cache.shared import CaptureError, SharedFolder, planned
from kdkernels.cache.writer import entries_identity
from kdkernels.capture import capture_topk
from kdkernels.checks import sequences as checks

EXTRAS = {"input_ids": torch.int32}
Tell = Callable[[str], None]
# Token ids [B, L] and mask [B, L] to logits [B, L, V].
Model = Callable[[Tensor, Tensor], Tensor]


def run(
    model: Model,
    sequences: Sequence[Sequence[int]],
    folder: Union[str, Path],
    *,
    tokenizer: Any,
    vocab_size: int,
    k: int,
    temperature: float = 1.0,
    teacher: str = "",
    batch_size: int = 8,
    device: Union[str, torch.device] = "cpu",
    rank: int = 0,
    world_size: int = 1,
    shard_bytes: Optional[int] = None,
    settings: Optional[dict[str, Any]] = None,
    tell: Tell = lambda line: None,
) -> bool:
    """Capture ``sequences`` of token ids into a cache, or go on with one that was begun with the same.

    Each token's entry is the teacher's distribution of the next one; ``input_ids`` are kept as an extra. Any number of
    processes may call it at once with one folder: each writes some of the shards, the last one the index. They, and
    those of a later call, may be more or fewer than began; where the model gives a batch the same logits every time,
    the files are the same bit by bit.

    Args:
        model: gives the logits of a padded batch.
        folder: of the cache; processes on several machines must share it.
        tokenizer, vocab_size, k, temperature, teacher: as in ``TeacherCacheWriter``.
        batch_size: sequences in a call of the model. A call that goes on may have another one.
        rank, world_size: of this process among those that work at the same time; they only say where it begins.
        shard_bytes: size at which a shard is closed, after a whole batch: at most 64 MiB, and less for a small cache,
            so that there are shards for many processes. What a kill loses is the shard of each process.
        settings: further facts that a call which goes on must agree in.
        tell: gets lines of progress.

    Returns:
        True if the cache is whole, False if other processes are still at it.

    Raises:
        CaptureError: the folder was begun with other sequences or settings.
    """
    if not sequences:
        raise CaptureError("there is no sequence to capture")
    identity = entries_identity(tokenizer, vocab_size, k, temperature, teacher)
    index = Index(identity, True, {name: name_of(dtype) for name, dtype in EXTRAS.items()})
    total, layout = len(sequences), index.layout
    plan = planned([len(sequence) for sequence in sequences], batch_size, layout.token_bytes, shard_bytes)
    facts = {**(settings or {}), "sequences": total, "sha256": _digest(sequences)}
    with SharedFolder(Path(folder), index, plan, facts) as shared, torch.inference_mode():
        if done := shared.written:
            tell(f"{folder}: goes on after {done:,} of {total:,} sequences")
        firsts = list(itertools.accumulate(shared.plan, initial=0))
        said = 10 * done // total
        for number in shared.to_write(rank, world_size):
            rows = []
            for first in range(firsts[number], firsts[number + 1], batch_size):
                batch = sequences[first : min(first + batch_size, firsts[number + 1])]
                for ids, entry in zip(batch, _captured(model, batch, k, temperature, vocab_size, device), strict=True):
                    extras = {"input_ids": torch.tensor(list(ids))}
                    rows.append(layout.encode(*checks.captured_sequence(*entry, extras, layout)))
            shared.write(number, rows)
            done += len(rows)
            # Ten lines at most, whatever the length of the run; others write too.
            if 10 * done // total > said:
                done = shared.written
                said = 10 * done // total
                tell(f"{folder}: {done:,} of {total:,} sequences")
        if whole := shared.finish():
            tell(f"{folder}: whole, {len(shared.plan):,} shards")
        else:
            tell(f"{folder}: {shared.written:,} of {total:,} sequences; other processes have the rest")
    return whole


def _captured(
    model: Model,
    batch: Sequence[Sequence[int]],
    k: int,
    temperature: float,
    vocab_size: int,
    device: Union[str, torch.device],
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    width = max(map(len, batch))
    ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in batch], device=device)
    lengths = torch.tensor([len(sequence) for sequence in batch], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    found = capture_topk(model(ids, mask), k, temperature=temperature, vocab_size=vocab_size)
    for row, sequence in enumerate(batch):
        part = slice(len(sequence))
        yield found.ids[row, part], found.logprobs[row, part], found.tail_logprob[row, part]


def _digest(sequences: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(canonical_json(list(sequence)).encode())
    return digest.hexdigest()


def from_hub(
    folder: Path,
    model: str,
    data: str,
    *,
    k: int,
    temperature: float = 1.0,
    length: int = 2048,
    batch_size: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    device: Optional[str] = None,
    split: str = "train",
    vocab_size: Optional[int] = None,
    tell: Tell = lambda line: None,
) -> bool:
    """As ``run``, with a causal language model of transformers and texts of a file or a data set.

    Raises:
        CaptureError: a package is missing, or the texts are not there or of no use.
    """
    try:
        import transformers
    except ImportError as error:
        raise CaptureError(f"capturing a model needs the package {error.name}: pip install transformers") from error
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        # transformers would take it for a name, and say that it is none.
        raise CaptureError(f"there is no folder {model}")
    # Its types say less than it takes.
    hub: Any = transformers
    tokenizer = hub.AutoTokenizer.from_pretrained(model)
    sequences = read(data, tokenizer, length, split)
    network = hub.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    width = network.get_output_embeddings().weight.shape[0]
    return run(
        lambda ids, mask: network(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits,
        sequences,
        folder,
        tokenizer=tokenizer,
        vocab_size=vocab_size or min(len(tokenizer), width),
        k=k,
        temperature=temperature,
        teacher=Path(model).name,
        batch_size=batch_size,
        device=device,
        rank=rank,
        world_size=world_size,
        settings={"length": length, "dtype": str(dtype).removeprefix("torch.")},
        tell=tell,
    )


def read(data: str, tokenizer: Any, length: int, split: str = "train") -> list[list[int]]:
    """Token ids, cut at ``length``, of a .jsonl or .txt file, or of a data set of the package datasets."""
    path = Path(data)
    rows: Iterable[Any]
    if path.suffix == ".jsonl" and path.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    elif path.suffix == ".txt" and path.is_file():
        rows = [{"text": line} for line in path.read_text().splitlines() if line.strip()]
    elif path.suffix in (".jsonl", ".txt"):
        raise CaptureError(f"there is no file {path}")
    else:
        try:
            import datasets
        except ImportError as error:
            raise CaptureError("a data set by name needs the package datasets: pip install datasets") from error
        rows = datasets.load_dataset(data, split=split)
    found = []
    for number, row in enumerate(rows):
        if "input_ids" in row:
            ids = list(row["input_ids"])
        elif "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
        else:
            raise CaptureError(f"row {number} of {data} has neither text nor input_ids: {sorted(row)}")
        if ids:
            found.append([int(x) for x in ids[:length]])
    return found
