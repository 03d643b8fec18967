"""The faults of a cache's shards, one by one, as ``kdkernels cache verify`` prints them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from kdkernels.cache.errors import CacheError
from kdkernels.cache.index import (
    CAPTURE_NAME,
    INDEX_NAME,
    SHARD_NAME,
    Index,
    Shard,
    check_sha256,
    check_size,
    file_sha256,
    is_file,
)
from kdkernels.cache.reader import map_shard
from kdkernels.cache.shared import RECORD_NAME, CaptureError, read_capture


def verify(folder: Path) -> Iterator[tuple[str, Optional[str]]]:
    """The name of each shard with its fault, None where it has none; of files that are no shard of the cache too.

    Of a capture that is not finished the shards that are not there yet are missing.

    Raises:
        CacheFormatError: the index is damaged, or there is none.
        CaptureError: of a capture that is not finished, what it was begun with is damaged.
    """
    if not is_file(folder / INDEX_NAME) and is_file(folder / CAPTURE_NAME):
        yield from _unfinished(folder)
        return
    index = Index.read(folder)
    plan = None
    # The index is enough to read by; an earlier version began captures without a plan.
    if is_file(folder / CAPTURE_NAME):
        with contextlib.suppress(CaptureError):
            plan = read_capture(folder)[2]
    names = {shard.sha256: shard.file for shard in reversed(index.shards)}
    for number, shard in enumerate(index.shards):
        try:
            digest = file_sha256(folder / shard.file) if is_file(folder / shard.file) else ""
            if digest != shard.sha256 and digest in names:
                yield shard.file, f"ChecksumError: it is {names[digest]} for a second time"
                continue
            check_size(folder, shard)
            if digest != shard.sha256:
                yield shard.file, "ChecksumError: its SHA-256 is not that of what was written"
                continue
            map_shard(folder, index, number)
        except CacheError as error:
            yield shard.file, f"{type(error).__name__}: {error}"
            continue
        # A writer may have added some since.
        if plan is not None and number < len(plan) and plan[number] != shard.sequences:
            yield shard.file, f"it has {shard.sequences:,} sequences, and the capture was begun with another number"
        else:
            yield shard.file, None
    for number in range(len(index.shards), len(plan or ())):
        yield SHARD_NAME.format(number), "missing: the index does not name it, and the capture was begun with it"
    yield from _strays(folder, len(index.shards))


def _unfinished(folder: Path) -> Iterator[tuple[str, Optional[str]]]:
    plan = read_capture(folder)[2]
    for number in range(len(plan)):
        name, fault = SHARD_NAME.format(number), None
        try:
            check_sha256(folder, Shard(**json.loads((folder / RECORD_NAME.format(number)).read_text())))
        except FileNotFoundError:
            fault = "missing: the capture is not finished, go on with it by the same call"
        except (CacheError, TypeError, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
        yield name, fault
    yield from _strays(folder, len(plan))


def _strays(folder: Path, count: int) -> Iterator[tuple[str, Optional[str]]]:
    """Shards that belong to nothing: such as those of another cache, copied here."""
    # The one behind the last may be what a killed writer left, which the next one removes.
    names = {SHARD_NAME.format(number) for number in range(count + 1)}
    for path in sorted(folder.glob("teacher-*.safetensors")):
        if path.name not in names:
            yield path.name, "no shard of this cache: the index does not name it"
