"""Writes a cache: sequences gather in memory, shards are closed whole, and only the index makes them count."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Optional, TextIO, Union

import safetensors.torch
import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.cache.codec import CRC32, MAX_VOCAB_SIZE, OFFSETS, checksum
from kdkernels.cache.errors import CacheFormatError, CacheLockedError, IdentityMismatchError
from kdkernels.cache.index import (
    INDEX_NAME,
    UNFINISHED,
    Identity,
    Index,
    Shard,
    check_size,
    fingerprint,
    write_atomically,
)

SHARD_BYTES = 64 * 2**20
SHARD_NAME = "teacher-{:05d}.safetensors"
LOCK_NAME = ".lock"


class TeacherCacheWriter:
    """Writes captured sequences into a folder, or goes on with one that was begun.

    ``len(writer)`` is the number of sequences that are there: after a kill those of the closed shards, so that the
    caller goes on with sequence ``len(writer)``::

        with TeacherCacheWriter(folder, tokenizer=tokenizer, vocab_size=128256, k=64) as writer:
            for tokens in sequences[len(writer):]:
                writer.append(*capture(teacher(tokens)))

    A shard is closed when it has reached ``shard_bytes``, by ``flush`` and by ``close``; an exception in the ``with``
    block closes it too. Then the shard and the index naming it are on the disk, and no kill takes them away. One writer
    at a time: a folder per process, and ``torch.utils.data.ConcatDataset``, if several write.

    Args:
        path: the folder, made where it is not there.
        tokenizer: what ids mean: a tokenizer, or a string, see ``fingerprint``.
        vocab_size: V, the teacher's real columns, below 2^24.
        k: K, slots a token; rows may have fewer entries, with -1 in unused slots.
        temperature: the teacher's, when it was captured.
        teacher: its name, free text that readers can ask for.
        tail: whether there are tail log-probabilities.
        extras: further tensors of one number per token, such as ``{"input_ids": torch.int32}``.
        shard_bytes: size at which a shard is closed. It is gathered in memory, and takes three times that while it is
            closed; a kill loses what is not closed.

    Raises:
        VocabularyMismatchError, IdentityMismatchError: the folder has another teacher, or other extras or tails.
        CacheFormatError, MissingShardError, TruncatedShardError, ChecksumError: what it has is damaged.
        CacheLockedError: another writer has it open.
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        path: Union[str, Path],
        *,
        tokenizer: Any,
        vocab_size: int,
        k: int,
        temperature: float = 1.0,
        teacher: str = "",
        tail: bool = True,
        extras: Optional[Mapping[str, torch.dtype]] = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        checks.flag("tail", tail)
        identity = Identity(
            tokenizer=fingerprint(tokenizer),
            vocab_size=checks.integer("vocab_size", vocab_size, low=1, high=MAX_VOCAB_SIZE),
            k=checks.integer("k", k, low=1),
            temperature=checks.number("temperature", temperature, low=0.0, exclusive_low=True),
            teacher=checks.text("teacher", teacher),
        )
        names = {name: str(dtype).removeprefix("torch.") for name, dtype in checks.extras_of_tokens(extras).items()}
        self._shard_bytes = checks.integer("shard_bytes", shard_bytes, low=1)
        self._folder = Path(path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock: Optional[TextIO] = _lock(self._folder)
        try:
            self._index = self._open(Index(identity, tail, names))
        except BaseException:
            self._unlock()
            raise
        self._layout = self._index.layout
        self._sequences = sum(shard.sequences for shard in self._index.shards)
        self._open_rows: list[dict[str, Tensor]] = []
        self._open_bytes = 0

    def __len__(self) -> int:
        """Sequences in closed shards, and those appended since."""
        return self._sequences + len(self._open_rows)

    @property
    def closed(self) -> int:
        """Sequences in closed shards: those that a kill leaves."""
        return self._sequences

    def append(
        self,
        ids: Tensor,
        logprobs: Tensor,
        tail_logprob: Optional[Tensor] = None,
        **extras: Tensor,
    ) -> None:
        """Add one sequence of L tokens, from any device.

        Args:
            ids: int32 or int64 ``[L, K]``, each in ``[0, V)`` or -1 for an unused slot.
            logprobs: float ``[L, K]``, natural log-probabilities; -inf is allowed. Stored in fp16, such that the sum of
                a row's probabilities stays what it is.
            tail_logprob: float ``[L]``, the log of the mass outside the K ids, stored in fp32; to be given if and only
                if the writer was made with ``tail=True``.
            extras: the tensors ``[L]`` that the writer was told of, converted where that changes no value.

        Raises:
            TypeError, ValueError: naming the argument; nothing was added.
        """
        if self._lock is None:
            raise ValueError("the writer is closed")
        sequence = checks.captured_sequence(ids, logprobs, tail_logprob, extras, self._layout)
        rows = self._layout.encode(*sequence)
        # Last, and in one go: an interruption leaves the whole sequence or none of it.
        self._open_rows.append(rows)
        self._open_bytes += len(rows["shift"]) * self._layout.token_bytes
        if self._open_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Close the shard, however small: what was appended so far survives a kill."""
        if not self._open_rows:
            return
        number = len(self._index.shards)
        offsets = list(itertools.accumulate((len(rows["shift"]) for rows in self._open_rows), initial=0))
        spans = zip(itertools.pairwise(offsets), self._open_rows, strict=True)
        sums = [checksum(first, last, rows) for (first, last), rows in spans]
        tensors = {name: torch.cat([rows[name] for rows in self._open_rows]) for name in self._layout.fields}
        tensors |= {OFFSETS: torch.tensor(offsets), CRC32: torch.tensor(sums)}
        content = safetensors.torch.save(tensors, self._index.shard_metadata(number))
        shard = Shard(
            file=SHARD_NAME.format(number),
            sequences=len(self._open_rows),
            tokens=offsets[-1],
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        write_atomically(self._folder / shard.file, content)
        index = self._index.with_shard(shard)
        index.write(self._folder)
        self._index = index
        self._sequences += shard.sequences
        self._open_rows, self._open_bytes = [], 0

    def close(self) -> None:
        """Close the last shard and let the folder go; further calls do nothing."""
        try:
            self.flush()
        finally:
            self._unlock()

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def _open(self, new: Index) -> Index:
        """The index to go on with: the folder's if it has one that fits, else ``new``, written."""
        if not (self._folder / INDEX_NAME).exists():
            if (self._folder / SHARD_NAME.format(0)).exists():
                raise CacheFormatError(f"{self._folder} has shards and no {INDEX_NAME}: not overwritten")
            new.write(self._folder)
            return new
        index = Index.read(self._folder)
        index.identity.require(self._folder, **vars(new.identity))
        for name in ("tail", "extras"):
            begun, asked = getattr(index, name), getattr(new, name)
            if begun != asked:
                raise IdentityMismatchError(f"{self._folder} was begun with {name} {begun}, and {asked} was asked for")
        for shard in index.shards:
            check_size(self._folder, shard)
        # What a kill has left: an unfinished file, or a whole shard of which the index does not know yet.
        orphan = SHARD_NAME.format(len(index.shards))
        for name in (orphan, orphan + UNFINISHED, INDEX_NAME + UNFINISHED):
            (self._folder / name).unlink(missing_ok=True)
        return index

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(folder: Path) -> TextIO:
    """Hold the folder's lock, which the kernel lets go when the process ends, however it ends."""
    file = open(folder / LOCK_NAME, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise CacheLockedError(f"{folder} is open in another writer") from None
        raise
    return file
