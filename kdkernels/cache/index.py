"""The index of a cache: whose teacher it is, and which shards are closed, of which size and checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch

from kdkernels.cache.codec import Layout
from kdkernels.cache.errors import (
    CacheFormatError,
    ChecksumError,
    IdentityMismatchError,
    MissingShardError,
    TruncatedShardError,
    VocabularyMismatchError,
)

FORMAT, VERSION = "kdkernels-teacher-cache", 1
INDEX_NAME = "index.json"
# What stands in a folder under this name is not, or not yet, part of the cache.
UNFINISHED = ".part"
READ_BYTES = 2**20


@dataclass(frozen=True)
class Identity:
    """Whose log-probabilities these are: two caches of equal identity may be read one for the other."""

    tokenizer: str
    vocab_size: int
    k: int
    temperature: float = 1.0
    teacher: str = ""

    def require(self, path: Path, **expected: Any) -> None:
        """Raise for the first of the fields ``expected`` that is not None and not this one's."""
        for name, value in expected.items():
            mine = getattr(self, name)
            if value is not None and value != mine:
                foreign = name in ("tokenizer", "vocab_size")
                raise (VocabularyMismatchError if foreign else IdentityMismatchError)(
                    f"{path} was captured with {name} {mine!r}, and {value!r} was asked for"
                )


@dataclass(frozen=True)
class Shard:
    """A closed file of sequences."""

    file: str
    sequences: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """All that is known of a cache without opening a shard."""

    identity: Identity
    tail: bool
    extras: dict[str, str]
    shards: tuple[Shard, ...] = ()

    @property
    def layout(self) -> Layout:
        extras = {name: getattr(torch, dtype) for name, dtype in self.extras.items()}
        return Layout(self.identity.k, self.identity.vocab_size, self.tail, extras)

    def shard_metadata(self, number: int) -> dict[str, str]:
        """What a shard says of itself, so that it cannot stand in for another.

        One entry, for safetensors writes several in an order of chance: equal content is to give equal files.
        """
        content = {"version": VERSION, "shard": number, "identity": dataclasses.asdict(self.identity)}
        return {FORMAT: canonical_json(content)}

    def with_shard(self, shard: Shard) -> Index:
        return dataclasses.replace(self, shards=(*self.shards, shard))

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps({**content, "sha256": _sha256(canonical_json(content))}, indent=1)
        write_atomically(folder / INDEX_NAME, text.encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read and check the index.

        Raises:
            CacheFormatError: there is none, it is of another version, or it is damaged.
        """
        path = folder / INDEX_NAME
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise CacheFormatError(f"{folder} has no {INDEX_NAME}: it is not a teacher cache") from None
        except ValueError as error:
            raise CacheFormatError(f"{path} is damaged: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CacheFormatError(f"{path} is not the index of a teacher cache, or it is damaged")
        if content.get("version") != VERSION:
            raise CacheFormatError(f"{path} has version {content.get('version')!r}, and {VERSION} can be read")
        if content.pop("sha256", None) != _sha256(canonical_json(content)):
            raise CacheFormatError(f"{path} is damaged: its checksum is not that of its content")
        return cls(
            identity=Identity(**content["identity"]),
            tail=content["tail"],
            extras=content["extras"],
            shards=tuple(Shard(**shard) for shard in content["shards"]),
        )


def fingerprint(tokenizer: Any) -> str:
    """The identity of a tokenizer, ``sha256:`` and the digest of its canonical JSON.

    Args:
        tokenizer: one of the packages tokenizers or transformers (fast: all of it but truncation and padding, which
            are settings of a call; slow: its vocabulary), or a mapping, such as token to id. A string is taken to be a
            fingerprint already and returned as it is.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(tokenizer, str):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(backend, Mapping):
        content = dict(backend)
    elif hasattr(backend, "to_str"):
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    elif hasattr(backend, "get_vocab"):
        content = backend.get_vocab()
    else:
        raise TypeError(
            f"tokenizer must be a string, a mapping, or have to_str or get_vocab, got {type(tokenizer).__name__}"
        )
    return f"sha256:{_sha256(canonical_json(content))}"


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def check_size(folder: Path, shard: Shard) -> None:
    """Raise MissingShardError, TruncatedShardError, or ChecksumError for a shard of another size than it was closed."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise MissingShardError(f"{path} is missing") from None
    if size != shard.bytes:
        error = TruncatedShardError if size < shard.bytes else ChecksumError
        raise error(f"{path} has {size} bytes, and {shard.bytes} were written")


def check_sha256(folder: Path, shard: Shard) -> None:
    """Read the whole shard; raise as ``check_size``, or ChecksumError where one of its bytes has changed."""
    check_size(folder, shard)
    digest = hashlib.sha256()
    with open(folder / shard.file, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        raise ChecksumError(f"{folder / shard.file} is damaged: its SHA-256 is not that of what was written")


def write_atomically(path: Path, content: Union[bytes, memoryview]) -> None:
    """Write a file such that, whenever the machine stops, the old one or the whole new one is there."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A rename is safe when the folder is on the disk too."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
