"""A cache that any number of processes write together, on one machine or on several that share a folder.

Which sequences a shard has is known before the first is captured, from their lengths alone: a shard is the same whoever
writes it and however often all began anew, and so is the whole. A process claims a shard by a lock that the kernel
takes away from the dead, writes it, and leaves a record of it; whoever finds all records writes the index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Optional

from torch import Tensor

from kdkernels.cache.errors import CacheError
from kdkernels.cache.index import (
    CAPTURE_NAME,
    INDEX_NAME,
    SHARD_NAME,
    Index,
    Shard,
    check_size,
    is_file,
    open_no_link,
    replace_file,
    sync_folder,
)
from kdkernels.cache.writer import SHARD_BYTES, lock, write_shard

RECORD_NAME = "teacher-{:05d}.json"
CLAIMS_NAME = ".claims"
# A process that dies loses the shard it is at, and several share the work by shards: each is a small part of the whole.
PARTS = 256


class CaptureError(Exception):
    """A capture that cannot begin, or go on, as it was asked for."""


def planned(lengths: Sequence[int], batch_size: int, token_bytes: int, shard_bytes: Optional[int]) -> list[int]:
    """The number of sequences of each shard: whole batches, until they have ``shard_bytes``."""
    if shard_bytes is None:
        shard_bytes = min(SHARD_BYTES, sum(lengths) * token_bytes // PARTS)
    plan, count, size = [], 0, 0
    for first in range(0, len(lengths), batch_size):
        batch = lengths[first : first + batch_size]
        count, size = count + len(batch), size + sum(batch) * token_bytes
        if size >= shard_bytes:
            plan.append(count)
            count = size = 0
    return [*plan, count] if count else plan


class SharedFolder:
    """The shards of a capture that was begun, and those of them that are still to be written.

    Args:
        folder: that all processes see.
        index: without shards.
        plan: the number of sequences of each shard. That of the call that began the capture goes before it.
        settings: what calls must agree in to go on with each other's work.

    Raises:
        CaptureError: the folder was begun with other settings, or has something else in it.
        CacheError: it was begun with another identity, is open in a writer, or was whole and has lost a shard.
    """

    def __init__(self, folder: Path, index: Index, plan: Sequence[int], settings: dict[str, Any]) -> None:
        self.folder, self._index = folder, index
        folder.mkdir(parents=True, exist_ok=True)
        self._held = lock(folder, shared=True)
        self._claims: BinaryIO
        try:
            self._claims = open(folder / CLAIMS_NAME, "a+b", opener=open_no_link)
        except BaseException:
            self._held.close()
            raise
        try:
            with self._alone():
                self.plan = self._begin(list(plan), settings)
        except BaseException:
            self.close()
            raise

    def _begin(self, plan: list[int], settings: dict[str, Any]) -> list[int]:
        path = self.folder / CAPTURE_NAME
        if any(self.folder.glob("part-*-of-*")):
            raise CaptureError(f"{self.folder} was begun by an earlier version, a folder for each process")
        if not path.exists():
            if any(os.path.lexists(self.folder / name) for name in (INDEX_NAME, SHARD_NAME.format(0))):
                raise CaptureError(f"{self.folder} has a cache that no capture began: give another folder")
            content = {"settings": settings, "identity": self._index.identity.content(), "shards": plan}
            replace_file(path, (json.dumps(content) + "\n").encode())
            return plan
        begun, identity, plan = read_capture(self.folder)
        for name in settings.keys() | begun.keys():
            if begun.get(name) != settings.get(name):
                raise CaptureError(
                    f"{self.folder} was begun with {name} {begun.get(name)!r}, and {settings.get(name)!r} was asked "
                    "for: give another folder, or the same texts and settings"
                )
        found = dataclasses.replace(self._index.identity, **identity)
        found.require(self.folder, expectations=False, **vars(self._index.identity))
        if self.finished:
            # The records went when the index came, so that a shard which was lost since cannot be written for itself.
            for shard in Index.read(self.folder).shards:
                check_size(self.folder, shard)
        return plan

    @property
    def finished(self) -> bool:
        """True where the index is there: then there is nothing more to write."""
        return is_file(self.folder / INDEX_NAME)

    @property
    def written(self) -> int:
        """Sequences in shards that are on the disk, whoever wrote them."""
        if self.finished:
            return sum(self.plan)
        return sum(n for number, n in enumerate(self.plan) if is_file(self.folder / RECORD_NAME.format(number)))

    def to_write(self, rank: int, world_size: int) -> Iterator[int]:
        """Numbers of shards that nobody has written or writes; each is claimed until the next is asked for.

        First come those of this process, then those that others have not come to.
        """
        for number in sorted(range(len(self.plan)), key=lambda number: (number - rank) % world_size):
            if self._is_written(number):
                continue
            with self._claimed(number) as mine:
                # Once more: it may have been written, and its claim let go, since.
                if mine and not self._is_written(number):
                    yield number

    def write(self, number: int, rows: Sequence[dict[str, Tensor]]) -> None:
        """Put the sequences of a claimed shard on the disk, as rows of the layout."""
        shard = write_shard(self.folder, self._index, number, rows)
        content = json.dumps(dataclasses.asdict(shard)).encode()
        replace_file(self.folder / RECORD_NAME.format(number), content)
        sync_folder(self.folder)

    def finish(self) -> bool:
        """Write the index if every shard is there; say if it is."""
        with self._alone():
            if not self.finished:
                shards = []
                for number in range(len(self.plan)):
                    shard = self._record(number)
                    if shard is None:
                        return False
                    shards.append(shard)
                dataclasses.replace(self._index, shards=tuple(shards)).write(self.folder)
                sync_folder(self.folder)
            # A kill before the last of them leaves some to the next call.
            for number in range(len(self.plan)):
                (self.folder / RECORD_NAME.format(number)).unlink(missing_ok=True)
        return True

    def _is_written(self, number: int) -> bool:
        # In this order: when the index stands, records go.
        return self._record(number) is not None or self.finished

    def _record(self, number: int) -> Optional[Shard]:
        """The record of a shard that is on the disk, whole; None where it is to be written, again perhaps."""
        path = self.folder / RECORD_NAME.format(number)
        try:
            shard = Shard(**json.loads(path.read_text()))
            check_size(self.folder, shard)
        except (FileNotFoundError, TypeError, ValueError, CacheError):
            return None
        return shard if (shard.file, shard.sequences) == (SHARD_NAME.format(number), self.plan[number]) else None

    @contextlib.contextmanager
    def _claimed(self, number: int) -> Iterator[bool]:
        """Hold the byte of a shard, if nobody else does."""
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 + number)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            yield False
            return
        try:
            yield True
        finally:
            if not self._claims.closed:
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, 1 + number)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the first byte, when it is free."""
        fcntl.lockf(self._claims, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, 0)

    def close(self) -> None:
        """Let all claims go."""
        # Another process may hold claims in the file, or in one that it makes anew: where the index is they claim
        # nothing that counts.
        if self.finished:
            (self.folder / CLAIMS_NAME).unlink(missing_ok=True)
        self._claims.close()
        # Not by closing alone, see the writer.
        if not self._held.closed:
            fcntl.flock(self._held, fcntl.LOCK_UN)
        self._held.close()

    def __enter__(self) -> SharedFolder:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()


def read_capture(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Settings, identity and plan of what a folder was begun with.

    Raises:
        CaptureError: they are damaged, or of an earlier version.
    """
    path = folder / CAPTURE_NAME
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not _is_plan(content):
        raise CaptureError(f"{path} is damaged, or of an earlier version: give another folder")
    return content["settings"], content["identity"], content["shards"]


def _is_plan(content: dict[str, Any]) -> bool:
    plan = content.get("shards")
    if not all(isinstance(content.get(name), dict) for name in ("settings", "identity")) or not isinstance(plan, list):
        return False
    return bool(plan) and all(type(count) is int and count > 0 for count in plan)
