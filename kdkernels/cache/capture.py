"""A teacher run over texts into a cache: what ``kdkernels cache capture`` does."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kdkernels.cache.index import Index, canonical_json, name_of
from kdkernels.cache.shared import CaptureError, SharedFolder, planned
from kdkernels.cache.writer import entries_identity
from kdkernels.capture import capture_topk
from kdkernels.checks import integer
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
            so that there are shards for many processes. A kill loses the shard of each process.
        settings: further facts that a call which goes on must agree in.
        tell: gets lines of progress.

    Returns:
        True if the cache is whole, False if other processes are still at it.

    Raises:
        CaptureError: the folder was begun with other sequences or settings.
        MissingShardError, TruncatedShardError, ChecksumError: the cache was whole, and a shard is not there any more.
    """
    if not sequences:
        raise CaptureError("there is no sequence to capture")
    # Before the folder is begun: what is wrong in it would have to be taken away again.
    integer("k", k, low=1, high=vocab_size)
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
    if folder.exists() and not folder.is_dir():
        raise CaptureError(f"{folder} is a file: name a folder")
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        # transformers would take it for a name, and say that it is none.
        raise CaptureError(f"there is no folder {model}")
    # Its types say less than it takes.
    hub: Any = transformers
    tokenizer = _loaded(hub.AutoTokenizer, "tokenizer", model)
    # Where there is no file of one, transformers makes one up that has hardly a token.
    if len(tokenizer) < 2:
        raise CaptureError(f"{model} has no tokenizer")
    sequences = read(data, tokenizer, length, split)
    network = _loaded(hub.AutoModelForCausalLM, "model", model, dtype=dtype).to(device).eval()
    width = network.get_output_embeddings().weight.shape[0]
    vocab_size = vocab_size or min(len(tokenizer), width)
    if vocab_size > width:
        raise CaptureError(f"{model} has logits of {width:,} tokens, and a vocabulary of {vocab_size:,} was asked for")
    known = network.get_input_embeddings().weight.shape[0]
    for number, ids in enumerate(sequences):
        if min(ids) < 0 or max(ids) >= known:
            raise CaptureError(
                f"sequence {number} of {data} has the id {min(ids) if min(ids) < 0 else max(ids)}, and {model} knows "
                f"those below {known:,}"
            )

    def logits(ids: Tensor, mask: Tensor) -> Any:
        try:
            return network(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        except IndexError as error:
            # Learned positions end somewhere.
            limit = getattr(network.config, "max_position_embeddings", None)
            raise CaptureError(
                f"{model} does not take a sequence of {ids.shape[1]} tokens ({error}); its configuration says {limit}: "
                "give --length"
            ) from None

    return run(
        logits,
        sequences,
        folder,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
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
    if path.suffix in (".jsonl", ".txt"):
        rows = _rows(path)
    else:
        try:
            import datasets
        except ImportError as error:
            raise CaptureError("a data set by name needs the package datasets: pip install datasets") from error
        rows = datasets.load_dataset(data, split=split)
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not ("input_ids" in row or "text" in row):
            raise CaptureError(f"row {number} of {data} has neither text nor input_ids: {reprlib.repr(row)}")
        ids = row["input_ids"] if "input_ids" in row else row["text"]
        if isinstance(ids, str) and "input_ids" not in row:
            ids = tokenizer(ids)["input_ids"]
        if not isinstance(ids, Sequence) or not all(type(token) is int for token in ids):
            raise CaptureError(f"row {number} of {data} must have a text, or a list of integers: {reprlib.repr(row)}")
        if ids:
            found.append(list(ids[:length]))
    return found


def _rows(path: Path) -> Iterator[Any]:
    """Of a file, line by line; a line ends where a file's does, and not at a character that Unicode breaks lines at."""
    if not path.is_file():
        raise CaptureError(f"there is no file {path}")
    number = 0
    with open(path, encoding="utf-8") as file:
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line) if path.suffix == ".jsonl" else {"text": line.rstrip("\n")}
        except UnicodeDecodeError as error:
            raise CaptureError(f"{path} is no text in UTF-8: {error}") from None
        except json.JSONDecodeError as error:
            raise CaptureError(f"line {number} of {path} is no JSON: {error}") from None


def _loaded(kind: Any, name: str, model: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(model, **options)
    # A file that is cut off raises errors of other packages.
    except Exception as error:
        raise CaptureError(f"the {name} of {model} cannot be loaded: {type(error).__name__}: {error}") from error
