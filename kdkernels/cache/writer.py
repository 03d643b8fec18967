"""Writes a cache: sequences gather in memory, shards are closed whole, and only the index makes them count."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Optional, TypeVar, Union

import safetensors.torch
import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.cache.codec import CRC32, MAX_VOCAB_SIZE, OFFSETS, checksum
from kdkernels.cache.errors import CacheFormatError, CacheLockedError, IdentityMismatchError
from kdkernels.cache.index import (
    EXPECTATION_DTYPES,
    INDEX_NAME,
    SHARD_NAME,
    UNFINISHED,
    Identity,
    Index,
    Shard,
    check_size,
    fingerprint,
    head_fingerprint,
    name_of,
    open_no_link,
    replace_file,
    sync_folder,
)
from kdkernels.capture import TeacherExpectation
from kdkernels.checks import sequences

SHARD_BYTES = 64 * 2**20
LOCK_NAME = ".lock"
_Self = TypeVar("_Self", bound="_Writer")
# The writers that are open in this process.
_open_writers: weakref.WeakSet[_Writer] = weakref.WeakSet()


class _Writer:
    """The common part of all writers: sequences gather as rows of arrays, and shards are closed."""

    def __init__(self, path: Union[str, Path], new: Index, shard_bytes: int) -> None:
        self._shard_bytes = checks.integer("shard_bytes", shard_bytes, low=1)
        self._folder = Path(path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock: Optional[BinaryIO] = lock(self._folder)
        self._process = os.getpid()
        _open_writers.add(self)
        try:
            self._index = self._open(new)
            # The process that wrote it may have been killed before it was on the disk.
            sync_folder(self._folder)
        except BaseException:
            self._unlock()
            raise
        self._layout = self._index.layout
        self._sequences = self._durable = sum(shard.sequences for shard in self._index.shards)
        self._open_rows: list[dict[str, Tensor]] = []
        self._open_bytes = 0

    def __len__(self) -> int:
        """Sequences in closed shards, and those appended since."""
        return self._sequences + len(self._open_rows)

    @property
    def closed(self) -> int:
        """Sequences in closed shards: those that a kill leaves."""
        return self._durable

    def _add(self, rows: dict[str, Tensor]) -> None:
        """Add the rows of a sequence, and close the shard if it is full."""
        rows_bytes = _length(rows) * self._layout.token_bytes
        self._open_rows.append(rows)
        self._open_bytes += rows_bytes
        if self._open_bytes < self._shard_bytes:
            return
        try:
            self._close_shard()
        except BaseException:
            # Not so where an interrupt came when the index already named the shard.
            if self._open_rows:
                self._open_rows.pop()
                self._open_bytes -= rows_bytes
            raise
        # The sequence is in the index by now. Where that may not outlive a loss of power yet, it does not count as
        # closed, and the next call raises if it still cannot be helped.
        with contextlib.suppress(OSError):
            self._settle()

    def flush(self) -> None:
        """Close the shard, however small: what was appended so far survives a kill.

        Raises:
            OSError: the disk is full, say; nothing is lost, and a later call tries again.
        """
        self._require_open()
        self._settle()
        if self._open_rows:
            self._close_shard()
            self._settle()

    def _close_shard(self) -> None:
        """Write what was appended as a shard, and the index that names it; where it raises neither counts."""
        number = len(self._index.shards)
        shard = write_shard(self._folder, self._index, number, self._open_rows)
        index = self._index.with_shard(shard)
        index.write(self._folder)
        self._index = index
        self._sequences += shard.sequences
        self._open_rows, self._open_bytes = [], 0

    def _settle(self) -> None:
        """See to it that the index that stands in the folder outlives a loss of power."""
        if self._durable != self._sequences:
            sync_folder(self._folder)
            self._durable = self._sequences

    def close(self) -> None:
        """Close the last shard and let the folder go; further calls do nothing, nor does one in a forked process.

        Raises:
            OSError: the disk is full, say. The writer is still open then, with all that was appended and with the lock:
                a later call tries again. To give up, drop the writer.
        """
        if self._lock is None or self._process != os.getpid():
            return
        self.flush()
        self._unlock()

    def __enter__(self: _Self) -> _Self:
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
        if not os.path.lexists(self._folder / INDEX_NAME):
            if os.path.lexists(self._folder / SHARD_NAME.format(0)):
                raise CacheFormatError(f"{self._folder} has shards and no {INDEX_NAME}: not overwritten")
            new.write(self._folder)
            return new
        index = Index.read(self._folder)
        index.identity.require(self._folder, expectations=bool(new.identity.hidden_size), **vars(new.identity))
        for name in ("tail", "extras", "dtype", "bias"):
            begun, asked = getattr(index, name), getattr(new, name)
            if begun != asked:
                raise IdentityMismatchError(f"{self._folder} was begun with {name} {begun}, and {asked} was asked for")
        for shard in index.shards:
            check_size(self._folder, shard)
        # The remains of a kill: an unfinished file, or a whole shard of which the index does not know yet.
        orphan = SHARD_NAME.format(len(index.shards))
        for name in (orphan, orphan + UNFINISHED, INDEX_NAME + UNFINISHED):
            (self._folder / name).unlink(missing_ok=True)
        return index

    def _require_open(self) -> None:
        if self._process != os.getpid():
            raise CacheLockedError(
                f"{self._folder} is open in a writer of process {self._process}, from which this one was forked: give "
                "each process a folder and a writer of its own"
            )
        if self._lock is None:
            raise ValueError("the writer is closed")

    def _unlock(self) -> None:
        if self._lock is not None:
            # Not by closing alone: a process that is forked at this moment has a copy of the descriptor.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._leave()

    def _leave(self) -> None:
        """Close this process's descriptor of the lock; whoever else has a copy still holds it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def write_shard(folder: Path, index: Index, number: int, rows: Sequence[dict[str, Tensor]]) -> Shard:
    """Put sequences on the disk as the shard of a number, which no index names yet."""
    offsets = list(itertools.accumulate(map(_length, rows), initial=0))
    spans = zip(itertools.pairwise(offsets), rows, strict=True)
    sums = [checksum(first, last, of_sequence) for (first, last), of_sequence in spans]
    tensors = {name: torch.cat([of_sequence[name] for of_sequence in rows]) for name in index.layout.fields}
    tensors |= {OFFSETS: torch.tensor(offsets), CRC32: torch.tensor(sums)}
    content = safetensors.torch.save(tensors, index.shard_metadata(number))
    shard = Shard(
        file=SHARD_NAME.format(number),
        sequences=len(rows),
        tokens=offsets[-1],
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    replace_file(folder / shard.file, content)
    sync_folder(folder)
    return shard


def entries_identity(tokenizer: Any, vocab_size: Any, k: Any, temperature: Any, teacher: Any) -> Identity:
    """Of ids and log-probabilities, from what a user gives."""
    return Identity(
        tokenizer=fingerprint(tokenizer),
        vocab_size=checks.integer("vocab_size", vocab_size, low=1, high=MAX_VOCAB_SIZE),
        k=checks.integer("k", k, low=1),
        temperature=checks.number("temperature", temperature, low=0.0, exclusive_low=True),
        teacher=checks.text("teacher", teacher),
    )


class TeacherCacheWriter(_Writer):
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
        identity = entries_identity(tokenizer, vocab_size, k, temperature, teacher)
        super().__init__(path, Index(identity, tail, _names(extras, sequences.ENTRY_NAMES)), shard_bytes)

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
            logprobs: float ``[L, K]``, natural log-probabilities, at most 0 but for rounding; -inf is allowed. A row
                without a tail may have weights above 1, as samples do. Stored in fp16, such that the sum of a row's
                probabilities stays what it is.
            tail_logprob: float ``[L]``, the log of the mass outside the K ids, at most 0 as well, stored in fp32; to be
                given if and only if the writer was made with ``tail=True``.
            extras: the tensors ``[L]`` that the writer was told of, converted where that changes no value.

        Whatever it raises, the sequence was not added, and the same call may be made again.

        Raises:
            TypeError, ValueError: naming the argument.
            OSError: the shard was full and could not be closed, for the disk is full, say. Nothing that was added
                before is lost; a later ``append``, ``flush`` or ``close`` tries again.
        """
        self._require_open()
        sequence = sequences.captured_sequence(ids, logprobs, tail_logprob, extras, self._layout)
        self._settle()
        self._add(self._layout.encode(*sequence))


class ExpectationCacheWriter(_Writer):
    """Writes ``TeacherExpectation``s of sequences into a folder, or goes on with one that was begun.

    As ``TeacherCacheWriter`` in all but what it stores: D numbers a token and its entropy, of use to one head alone::

        with ExpectationCacheWriter(folder, tokenizer=tokenizer, vocab_size=128256, head=model.lm_head) as writer:
            for tokens in sequences[len(writer):]:
                writer.append(kd.capture_expectation(teacher(tokens), model.lm_head))

    Args:
        path, tokenizer, vocab_size, teacher, shard_bytes: as in ``TeacherCacheWriter``.
        head: the student's head that the expectations are of, the module, its weight ``[V, D]``, or weight and bias as
            a tuple. Its bytes are read once, for a fingerprint that readers compare with theirs.
        temperature: the teacher's, when it was captured.
        dtype: what expectations are stored as: torch.float32, float16 or bfloat16.
        extras: as in ``TeacherCacheWriter``, under other names than "expectation", "entropy" and "expected_bias".

    Raises:
        CacheError: as ``TeacherCacheWriter``.
    """

    def __init__(
        self,
        path: Union[str, Path],
        *,
        tokenizer: Any,
        vocab_size: int,
        head: Any,
        temperature: float = 1.0,
        teacher: str = "",
        dtype: torch.dtype = torch.float32,
        extras: Optional[Mapping[str, torch.dtype]] = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if dtype not in EXPECTATION_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        weight, bias = checks.head_tensors("head_", *(head if isinstance(head, tuple) else (head, None)))
        if not isinstance(weight, Tensor):
            raise TypeError(f"head must be a module, a tensor or a tuple of two, got {type(weight).__name__}")
        name = head_fingerprint(weight, bias)
        identity = Identity(
            tokenizer=fingerprint(tokenizer),
            vocab_size=checks.integer("vocab_size", vocab_size, low=1, high=MAX_VOCAB_SIZE),
            temperature=checks.number("temperature", temperature, low=0.0, exclusive_low=True),
            teacher=checks.text("teacher", teacher),
            hidden_size=weight.shape[1],
            head=name,
        )
        names = _names(extras, sequences.EXPECTATION_NAMES)
        super().__init__(path, Index(identity, False, names, dtype=name_of(dtype), bias=bias is not None), shard_bytes)

    def append(self, teacher: TeacherExpectation, **extras: Tensor) -> None:
        """Add one sequence of L tokens, from any device.

        Args:
            teacher: of ``expectation`` ``[L, D]``, ``entropy`` ``[L]`` and, if and only if the head has one, ``bias``
                ``[L]``; captured at the temperature of the cache.
            extras: the tensors ``[L]`` that the writer was told of, converted where that changes no value.

        Whatever it raises, the sequence was not added, and the same call may be made again.

        Raises:
            TypeError, ValueError: naming the argument.
            OSError: as ``TeacherCacheWriter.append``.
        """
        self._require_open()
        if not isinstance(teacher, TeacherExpectation):
            raise TypeError(f"teacher must be a TeacherExpectation, got {type(teacher).__name__}")
        temperature = self._index.identity.temperature
        if isinstance(teacher.temperature, Tensor) or teacher.temperature != temperature:
            raise ValueError(f"temperature must be the cache's {temperature}, got {teacher.temperature}")
        sequence = sequences.expectation_sequence(*teacher[:3], extras, self._layout)
        self._settle()
        self._add(self._layout.encode(*sequence))


def _length(rows: Mapping[str, Tensor]) -> int:
    return len(next(iter(rows.values())))


def _names(extras: Any, reserved: Sequence[str]) -> dict[str, str]:
    return {name: name_of(dtype) for name, dtype in sequences.extras_of_tokens(extras, reserved).items()}


def lock(folder: Path, *, shared: bool = False) -> BinaryIO:
    """Hold the folder's lock, which the kernel lets go when the process ends, however it ends.

    A shared one lets in others that share it, and no writer.
    """
    try:
        # Over NFS a shared lock asks for a file that may be read.
        file = open(folder / LOCK_NAME, "a+b", opener=open_no_link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheFormatError(f"{folder / LOCK_NAME} is a symbolic link: not written to") from None
        raise
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise CacheLockedError(f"{folder} is open in another writer") from None
        raise
    return file


def _leave_all() -> None:
    for writer in list(_open_writers):
        writer._leave()


# A forked process, such as a worker of a DataLoader, has nothing to write. Its copy of the lock would hold the folder
# after the writer's own process was killed.
os.register_at_fork(after_in_child=_leave_all)
