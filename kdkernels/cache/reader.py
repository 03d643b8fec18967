"""Reads a cache: shards are mapped into memory when they are first touched, and sequences checked as they are read."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import safetensors
import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.cache.codec import CRC32, OFFSETS, ExpectationSequence, TeacherSequence, checksum
from kdkernels.cache.errors import ChecksumError
from kdkernels.cache.index import Identity, Index, check_sha256, check_size, fingerprint, head_fingerprint
from kdkernels.capture import TeacherExpectation

VERIFY = ("lazy", "full", "none")


class _Cache:
    """The sequences of a cache by their number."""

    def __init__(self, path: Union[str, Path], verify: str, *, expectations: bool, **expected: Any) -> None:
        checks.choice("verify", verify, VERIFY)
        self.path = Path(path)
        self.index = Index.read(self.path)
        self.identity.require(self.path, expectations=expectations, **expected)
        self._layout = self.index.layout
        self._verify = verify
        for shard in self.index.shards:
            (check_sha256 if verify == "full" else check_size)(self.path, shard)
        # Of each shard, the number of its first sequence.
        self._firsts = list(itertools.accumulate((shard.sequences for shard in self.index.shards), initial=0))
        self._mapped: dict[int, dict[str, Tensor]] = {}

    @property
    def identity(self) -> Identity:
        return self.index.identity

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.index.shards)

    def __len__(self) -> int:
        return self._firsts[-1]

    def _sequence(self, item: int) -> Any:
        number = operator.index(item)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {item} of {len(self)}")
        shard = bisect.bisect_right(self._firsts, number) - 1
        tensors, row = self._map(shard), number - self._firsts[shard]
        first, last = tensors[OFFSETS][row : row + 2].tolist()
        # A slice cannot leave the array, whatever the offsets; both are part of the checksum.
        rows = {name: tensors[name][first:last] for name in self._layout.fields}
        if self._verify != "none" and checksum(first, last, rows) != tensors[CRC32][row]:
            raise ChecksumError(
                f"{self.path / self.index.shards[shard].file} is damaged: the CRC-32 of its sequence {row} is not that "
                "of what was written"
            )
        return self._layout.decode(rows)

    def __iter__(self) -> Iterator[Any]:
        return (self._sequence(number) for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def _map(self, number: int) -> dict[str, Tensor]:
        """The arrays of a shard, mapped into memory: nothing of them is read before it is used."""
        if number not in self._mapped:
            self._mapped[number] = map_shard(self.path, self.index, number)
        return self._mapped[number]


def map_shard(folder: Path, index: Index, number: int) -> dict[str, Tensor]:
    """The arrays of a shard, mapped into memory; raises ChecksumError where its header is another's."""
    shard = index.shards[number]
    # Once more: it may have been opened long ago, and a page past the end would kill the process.
    check_size(folder, shard)
    damaged = ChecksumError(f"{folder / shard.file} is damaged: its header is not what was written")
    try:
        with safetensors.safe_open(folder / shard.file, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
    except safetensors.SafetensorError:
        raise damaged from None
    fields = {name: (dtype, (shard.tokens, *shape)) for name, (dtype, shape) in index.layout.fields.items()}
    fields |= {OFFSETS: (torch.int64, (shard.sequences + 1,)), CRC32: (torch.int64, (shard.sequences,))}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != fields or metadata != index.shard_metadata(number):
        raise damaged
    return tensors


class TeacherCache(_Cache):
    """The sequences of a cache by their number: ``cache[i]`` is a ``TeacherSequence``.

    It sees the shards that were closed when it was opened. Pickled or forked, as by the workers of a ``DataLoader``, it
    maps the shards anew where it arrives, and checks nothing twice.

    Args:
        path: the folder.
        tokenizer: the tokenizer, or its fingerprint, whose ids the caller expects. None takes any: say so on purpose.
        vocab_size: the vocabulary that the caller expects; None takes any.
        k, temperature, teacher: checked in the same way where they are given.
        verify: "lazy" checks the index and the size of every shard at once, a shard's header when it is first touched,
            and the CRC-32 of every sequence that is read. "full" reads every shard at once as well, and checks its
            SHA-256. "none" leaves out the CRC-32.

    Raises:
        VocabularyMismatchError: another tokenizer or vocabulary.
        IdentityMismatchError: another k, temperature or teacher.
        CacheFormatError: no cache, or a damaged index.
        MissingShardError, TruncatedShardError, ChecksumError: a damaged shard, here or on reading a sequence.
    """

    def __init__(
        self,
        path: Union[str, Path],
        *,
        tokenizer: Any,
        vocab_size: Optional[int],
        k: Optional[int] = None,
        temperature: Optional[float] = None,
        teacher: Optional[str] = None,
        verify: str = "lazy",
    ) -> None:
        super().__init__(
            path,
            verify,
            expectations=False,
            tokenizer=None if tokenizer is None else fingerprint(tokenizer),
            vocab_size=vocab_size,
            k=k,
            temperature=temperature,
            teacher=teacher,
        )

    def __getitem__(self, item: int) -> TeacherSequence:
        return self._sequence(item)


class ExpectationCache(_Cache):
    """The sequences of a cache of expectations by their number: ``cache[i]`` is an ``ExpectationSequence``.

    As ``TeacherCache`` but for the student's head, to which alone the expectations are of use: any other would learn
    something else, and nothing would tell.

    Args:
        path, tokenizer, vocab_size, temperature, teacher, verify: as in ``TeacherCache``.
        head: the student's head, the module, its weight, weight and bias as a tuple, or its ``head_fingerprint``. None
            takes any: say so on purpose.

    Raises:
        IdentityMismatchError: another head, temperature or teacher, or a cache of ids and log-probabilities.
        CacheError: as ``TeacherCache``.
    """

    def __init__(
        self,
        path: Union[str, Path],
        *,
        tokenizer: Any,
        vocab_size: Optional[int],
        head: Any,
        temperature: Optional[float] = None,
        teacher: Optional[str] = None,
        verify: str = "lazy",
    ) -> None:
        super().__init__(
            path,
            verify,
            expectations=True,
            tokenizer=None if tokenizer is None else fingerprint(tokenizer),
            vocab_size=vocab_size,
            head=None if head is None else head_fingerprint(*(head if isinstance(head, tuple) else (head,))),
            temperature=temperature,
            teacher=teacher,
        )

    def __getitem__(self, item: int) -> ExpectationSequence:
        return self._sequence(item)

    def teacher(self, tensors: Union[ExpectationSequence, Mapping[str, Tensor]]) -> TeacherExpectation:
        """The argument of ``linear_kd_loss``, of a sequence, or of a batch by ``collate``, with the temperature."""
        found = tensors._asdict() if isinstance(tensors, ExpectationSequence) else tensors
        return TeacherExpectation(
            found["expectation"], found["entropy"], found.get("expected_bias"), self.identity.temperature
        )
