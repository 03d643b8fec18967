"""A teacher run over texts into a cache: what ``kdkernels cache capture`` does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kdkernels.cache.index import canonical_json, replace_file
from kdkernels.cache.writer import TeacherCacheWriter
from kdkernels.capture import capture_topk

SETTINGS = "capture.json"
EXTRAS = {"input_ids": torch.int32}
Tell = Callable[[str], None]
# Token ids [B, L] and mask [B, L] to logits [B, L, V].
Model = Callable[[Tensor, Tensor], Tensor]


class CaptureError(Exception):
    """A capture that cannot begin, or go on, as it was asked for."""


def share(total: int, rank: int, world_size: int) -> range:
    """The sequences of a process: one after the other, so that the parts in their order are the whole in its."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


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
    settings: Optional[dict[str, Any]] = None,
    tell: Tell = lambda line: None,
) -> Path:
    """Capture ``sequences`` of token ids into a cache, or go on with one that was begun with the same.

    Each token's entry is the teacher's distribution of the next one; ``input_ids`` are kept as an extra.

    Args:
        model: gives the logits of a padded batch.
        folder: of the cache; with ``world_size`` above 1 each process writes ``part-<rank>-of-<world_size>`` in it.
        tokenizer, vocab_size, k, temperature, teacher: as in ``TeacherCacheWriter``.
        settings: further facts that a call which goes on must agree in.
        tell: gets lines of progress.

    Returns:
        The folder that this process wrote.

    Raises:
        CaptureError: the folder was begun with other sequences, settings or processes.
    """
    if not sequences:
        raise CaptureError("there is no sequence to capture")
    folder = Path(folder)
    if world_size > 1 or any(folder.glob("part-*-of-*")):
        _same_number_of_processes(folder, world_size)
        folder = folder / f"part-{rank:05d}-of-{world_size:05d}"
    mine = [list(sequences[i]) for i in share(len(sequences), rank, world_size)]
    _begun_with(folder, {**(settings or {}), "sequences": len(mine), "sha256": _digest(mine)})
    writer = TeacherCacheWriter(
        folder,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        k=k,
        temperature=temperature,
        teacher=teacher,
        extras=EXTRAS,
    )
    said = 0
    with writer, torch.inference_mode():
        if len(writer):
            tell(f"{folder}: goes on after {len(writer):,} of {len(mine):,} sequences")
        while len(writer) < len(mine):
            batch = mine[len(writer) : len(writer) + batch_size]
            for ids, entry in zip(batch, _captured(model, batch, k, temperature, vocab_size, device), strict=True):
                writer.append(*entry, input_ids=torch.tensor(ids))
            # Ten lines, whatever the length of the run.
            if (tenth := 10 * len(writer) // len(mine)) > said:
                said = tenth
                tell(f"{folder}: {len(writer):,} of {len(mine):,} sequences")
    return folder


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


def _same_number_of_processes(folder: Path, world_size: int) -> None:
    if (folder / SETTINGS).exists():
        raise CaptureError(f"{folder} was begun by one process: go on with one")
    for part in folder.glob("part-*-of-*"):
        begun = int(part.name.rpartition("-")[2])
        if begun != world_size:
            raise CaptureError(f"{folder} was begun by {begun} processes, and this is one of {world_size}")


def _begun_with(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what the capture is of, or hold it against what was written down."""
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(settings, indent=1) + "\n").encode())
        return
    begun = json.loads(path.read_text())
    for name in settings.keys() | begun.keys():
        if begun.get(name) != settings.get(name):
            raise CaptureError(
                f"{folder} was begun with {name} {begun.get(name)!r}, and {settings.get(name)!r} was asked for: give "
                "another folder, or the same texts and settings"
            )


def _digest(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(canonical_json(sequences).encode()).hexdigest()


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
) -> Path:
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
