"""The index of a cache: whose teacher it is, and which shards are closed, of which size and checksum."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.cache.codec import MAX_VOCAB_SIZE, ExpectationLayout, Layout, as_bytes
from kdkernels.cache.errors import (
    CacheFormatError,
    ChecksumError,
    IdentityMismatchError,
    MissingShardError,
    TruncatedShardError,
    VocabularyMismatchError,
)
from kdkernels.checks import sequences

FORMAT = "kdkernels-teacher-cache"
# Of the entries of a teacher, and of its expectations under a student's head.
ENTRIES, EXPECTATIONS = VERSIONS = 1, 2
EXPECTATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_NAME = "index.json"
SHARD_NAME = "teacher-{:05d}.safetensors"
# Of what a capture by several processes was begun with.
CAPTURE_NAME = "capture.json"
# A file under a name that ends like this is not, or not yet, part of the cache.
UNFINISHED = ".part"
READ_BYTES = 2**20
# The errors of opening a path that is not there, or no file: a folder on its way is a file, or links lead in a circle.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class Identity:
    """Whose log-probabilities these are: two caches of equal identity may be read one for the other.

    A cache of expectations has no ``k``, but a ``hidden_size`` and the ``head`` of the student, see
    ``head_fingerprint``.
    """

    tokenizer: str
    vocab_size: int
    k: int = 0
    temperature: float = 1.0
    teacher: str = ""
    hidden_size: int = 0
    head: str = ""

    @property
    def version(self) -> int:
        """Of the format that has it."""
        return EXPECTATIONS if self.hidden_size else ENTRIES

    def content(self) -> dict[str, Any]:
        """Its fields in a file."""
        left_out = ("k",) if self.hidden_size else ("hidden_size", "head")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def require(self, path: Path, *, expectations: bool, **expected: Any) -> None:
        """Raise for the first of the fields ``expected`` that is not None and not this one's."""
        if expectations != bool(self.hidden_size):
            kinds = ("ids and log-probabilities", "expectations under a student's head")
            reader = "ExpectationCache" if self.hidden_size else "TeacherCache"
            raise IdentityMismatchError(
                f"{path} has {kinds[not expectations]}, and {kinds[expectations]} were asked for: {reader} reads it"
            )
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
    # Of expectations: as what they are stored, and whether there are those of a bias.
    dtype: str = ""
    bias: bool = False

    @property
    def layout(self) -> Union[Layout, ExpectationLayout]:
        extras = {name: getattr(torch, dtype) for name, dtype in self.extras.items()}
        if self.identity.hidden_size:
            return ExpectationLayout(self.identity.hidden_size, getattr(torch, self.dtype), self.bias, extras)
        return Layout(self.identity.k, self.identity.vocab_size, self.tail, extras)

    def shard_metadata(self, number: int) -> dict[str, str]:
        """A shard's name for itself, so that it cannot stand in for another.

        One entry, for safetensors writes several in random order, and equal content gives equal files.
        """
        identity = self.identity
        content = {"version": identity.version, "shard": number, "identity": identity.content()}
        return {FORMAT: canonical_json(content)}

    def with_shard(self, shard: Shard) -> Index:
        return dataclasses.replace(self, shards=(*self.shards, shard))

    def write(self, folder: Path) -> None:
        """Put this index in the place of the folder's; it is sure to be on the disk after ``sync_folder``."""
        fields = _FIELDS[self.identity.version]
        content = {name: value for name, value in dataclasses.asdict(self).items() if name in fields}
        content |= {"identity": self.identity.content()}
        content = {"format": FORMAT, "version": self.identity.version, **content}
        text = json.dumps({**content, "sha256": _sha256(canonical_json(content))}, indent=1)
        replace_file(folder / INDEX_NAME, text.encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read and check the index. Nothing that it names has been touched when this returns.

        Raises:
            CacheFormatError: there is none, it is of another version, or it is damaged.
        """
        path = folder / INDEX_NAME
        if not is_file(path):
            if is_file(folder / CAPTURE_NAME):
                raise CacheFormatError(f"{folder} has a capture that is not finished: go on with it by the same call")
            raise CacheFormatError(f"{folder} has no {INDEX_NAME}: it is not a teacher cache")
        # A text may be nested more deeply than the parser or the writer of JSON can follow.
        try:
            content = json.loads(path.read_bytes(), parse_constant=_no_number)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise CacheFormatError(f"{path} is not the index of a teacher cache, or it is damaged")
            version = content.get("version")
            if type(version) is not int or version not in VERSIONS:
                raise CacheFormatError(f"{path} has version {version!r}, and {ENTRIES} and {EXPECTATIONS} can be read")
            if content.pop("sha256", None) != _sha256(canonical_json(content)):
                raise CacheFormatError(f"{path} is damaged: its checksum is not that of its content")
            return cls._of(content)
        except (TypeError, ValueError, RecursionError) as error:
            raise CacheFormatError(f"{path} is damaged: {error}") from None

    @classmethod
    def _of(cls, content: Any) -> Index:
        """An index of the content of a file, which may be anything; TypeError or ValueError where it is no index."""
        of_expectations = content["version"] == EXPECTATIONS
        _keys("index", content, ("format", "version", *_FIELDS[content["version"]]))
        identity, shards = content["identity"], content["shards"]
        sizes: tuple[str, ...] = ("k",)
        texts: tuple[str, ...] = ("tokenizer", "teacher")
        if of_expectations:
            sizes, texts = ("hidden_size",), (*texts, "head")
        _keys("identity", identity, ("vocab_size", "temperature", *sizes, *texts))
        for name in texts:
            checks.text(name, identity[name])
        checks.integer("vocab_size", identity["vocab_size"], low=1, high=MAX_VOCAB_SIZE)
        for name in sizes:
            checks.integer(name, identity[name], low=1, high=sys.maxsize)
        # An int would be another text than the shards have.
        if not isinstance(identity["temperature"], float):
            raise TypeError(f"temperature must be a float, got {type(identity['temperature']).__name__}")
        checks.number("temperature", identity["temperature"], low=0.0, exclusive_low=True)
        if of_expectations:
            checks.flag("bias", content["bias"])
            checks.choice("dtype", content["dtype"], [name_of(dtype) for dtype in EXPECTATION_DTYPES])
        else:
            checks.flag("tail", content["tail"])
        if not isinstance(content["extras"], dict):
            raise TypeError(f"extras must be an object, got {type(content['extras']).__name__}")
        dtypes = {name_of(dtype): dtype for dtype in sequences.EXTRA_DTYPES}
        for name, dtype in content["extras"].items():
            checks.choice(f"extras[{name!r}]", dtype, tuple(dtypes))
        names = sequences.EXPECTATION_NAMES if of_expectations else sequences.ENTRY_NAMES
        sequences.extras_of_tokens({name: dtypes[dtype] for name, dtype in content["extras"].items()}, names)
        if not isinstance(shards, list):
            raise TypeError(f"shards must be a list, got {type(shards).__name__}")
        for number, shard in enumerate(shards):
            _check_shard(number, shard)
        if sum(shard["sequences"] for shard in shards) > sys.maxsize:
            raise ValueError("shards have more sequences than can be counted")
        return cls(
            identity=Identity(**identity),
            tail=content.get("tail", False),
            extras=content["extras"],
            shards=tuple(Shard(**shard) for shard in shards),
            dtype=content.get("dtype", ""),
            bias=content.get("bias", False),
        )


# The keys of an index beside the format and its version, by the version.
_FIELDS = {
    ENTRIES: ("identity", "tail", "extras", "shards"),
    EXPECTATIONS: ("identity", "dtype", "bias", "extras", "shards"),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_shard(number: int, shard: Any) -> None:
    name = f"shards[{number}]"
    _keys(name, shard, [field.name for field in dataclasses.fields(Shard)])
    # Its number in the cache says which file it is: an index cannot send a reader to another place, nor have a writer
    # remove a shard that it names.
    checks.choice(f"{name}.file", shard["file"], (SHARD_NAME.format(number),))
    checks.integer(f"{name}.sequences", shard["sequences"], low=1, high=sys.maxsize)
    checks.integer(f"{name}.tokens", shard["tokens"], low=0, high=sys.maxsize)
    checks.integer(f"{name}.bytes", shard["bytes"], low=0, high=sys.maxsize)
    if not re.fullmatch("[0-9a-f]{64}", checks.text(f"{name}.sha256", shard["sha256"])):
        raise ValueError(f"{name}.sha256 must be 64 hexadecimal digits")


def _keys(name: str, value: Any, expected: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be an object, got {type(value).__name__}")
    if value.keys() != set(expected):
        raise ValueError(f"{name} must have the keys {sorted(expected)}, got {sorted(value)}")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


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


def head_fingerprint(weight: Any, bias: Optional[Tensor] = None) -> str:
    """The identity of a student's head, ``sha256:`` and the digest of dtypes, shapes and bytes of weight and bias.

    Args:
        weight: ``[V, D]``, or the module, as ``capture_expectation`` takes it. A string is taken to be a fingerprint
            already and returned as it is.
        bias: ``[V]`` or None.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(weight, str):
        return weight
    weight, bias = checks.head_tensors("head_", weight, bias)
    checks.lone_head("head_", weight, bias, weight)
    digest = hashlib.sha256()
    for item in (weight, bias):
        if item is not None:
            digest.update(f"{name_of(item.dtype)}{list(item.shape)}".encode())
            for part in item.detach().split(2**16):
                digest.update(as_bytes(part.cpu()))
    return f"sha256:{digest.hexdigest()}"


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def is_file(path: Path) -> bool:
    """True if a regular file is there, or a link to one: opening anything else might never end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise


def check_size(folder: Path, shard: Shard) -> None:
    """Raise MissingShardError, TruncatedShardError, or ChecksumError for a shard of another size than it was closed."""
    path = folder / shard.file
    if not is_file(path):
        raise MissingShardError(f"{path} is missing")
    size = path.stat().st_size
    if size != shard.bytes:
        error = TruncatedShardError if size < shard.bytes else ChecksumError
        raise error(f"{path} has {size} bytes, and {shard.bytes} were written")


def check_sha256(folder: Path, shard: Shard) -> None:
    """Read the whole shard; raise as ``check_size``, or ChecksumError where one of its bytes has changed."""
    check_size(folder, shard)
    if file_sha256(folder / shard.file) != shard.sha256:
        raise ChecksumError(f"{folder / shard.file} is damaged: its SHA-256 is not that of what was written")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def replace_file(path: Path, content: Union[bytes, memoryview]) -> None:
    """Write a file such that, whenever the machine stops, the old one or the whole new one is there.

    Where it raises the old file is there, and nothing else is left.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb", opener=open_no_link) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        # A full disk needs the room.
        unfinished.unlink(missing_ok=True)
        raise


def open_no_link(path: Any, flags: int) -> int:
    """An opener of files to write to, which follows no link: one in a cache's folder may point to another's file."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


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
