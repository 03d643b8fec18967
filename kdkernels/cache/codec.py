"""The bytes of a token's K ids and log-probabilities, or of its expectations under a student's head.

An id is stored as the code ``id + 1``, 0 for an unused slot: its low 16 bits in one array, the 0, 1, 2, 4 or 8 bits
above them, as the vocabulary needs, packed into another. A log-probability is rounded to fp16, and the row's ``shift``
in fp32 restores the sum of its probabilities to what it was before. Without it rounding moves that sum by up to 5e-4
of the row's entropy, and the tail, which is the rest to 1, by as much: many times its size where the teacher is sure.
"""

from __future__ import annotations

import abc
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Codes have at most 24 bits.
MAX_VOCAB_SIZE = 2**24 - 1
EXTRA = "extra."
OFFSETS, CRC32 = "offsets", "crc32"


class TeacherSequence(NamedTuple):
    """A captured teacher over the L tokens of one sequence.

    ``ids`` int32 ``[L, K]``, -1 in unused slots; ``logprobs`` fp32 ``[L, K]``, -inf there; ``tail_logprob`` fp32
    ``[L]``, None where the cache has none; ``extras`` the other tensors ``[L]`` by name.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Optional[Tensor]
    extras: dict[str, Tensor]


class ExpectationSequence(NamedTuple):
    """A teacher's expectations over the L tokens of one sequence, see ``kdkernels.TeacherExpectation``.

    ``expectation`` ``[L, D]``, ``entropy`` ``[L]`` and ``expected_bias`` ``[L]``, None where the head has no bias, in
    fp32; ``extras`` the other tensors ``[L]`` by name.
    """

    expectation: Tensor
    entropy: Tensor
    expected_bias: Optional[Tensor]
    extras: dict[str, Tensor]


class Rows(abc.ABC):
    """The arrays of a shard, each with one row per token, and how a sequence becomes rows of them."""

    extras: Mapping[str, torch.dtype]

    @property
    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype of each array and the shape of one row of it."""
        return {EXTRA + name: (dtype, ()) for name, dtype in self.extras.items()}

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, exactly."""
        return sum(dtype.itemsize * (shape[0] if shape else 1) for dtype, shape in self.fields.values())

    @abc.abstractmethod
    def decode(self, rows: Mapping[str, Tensor]) -> Any:
        """Turn rows back; nothing that is returned shares memory with them."""


@dataclass(frozen=True)
class Layout(Rows):
    """Of K ids and log-probabilities a token."""

    k: int
    vocab_size: int
    tail: bool
    extras: Mapping[str, torch.dtype]

    @property
    def high_bits(self) -> int:
        """Bits of a code above its low 16, rounded up so that bytes hold whole ones."""
        needed = self.vocab_size.bit_length() - 16
        return next(bits for bits in (0, 1, 2, 4, 8) if needed <= bits)

    @property
    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "ids_low": (torch.int16, (self.k,)),
            "logprobs": (torch.float16, (self.k,)),
            "shift": (torch.float32, ()),
        }
        if self.high_bits:
            fields["ids_high"] = (torch.uint8, (-(-self.k * self.high_bits // 8),))
        if self.tail:
            fields["tail_logprob"] = (torch.float32, ())
        return fields | super().fields

    def encode(
        self, ids: Tensor, logprobs: Tensor, tail_logprob: Optional[Tensor], extras: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Turn a checked sequence into rows of the arrays."""
        codes = ids.to(torch.int32) + 1
        rounded, shift = _round(logprobs.to(torch.float32).masked_fill(codes == 0, -torch.inf))
        rows = {"ids_low": codes.to(torch.int16), "logprobs": rounded, "shift": shift}
        if self.high_bits:
            rows["ids_high"] = _pack(codes >> 16, self.high_bits)
        if tail_logprob is not None:
            rows["tail_logprob"] = tail_logprob.to(torch.float32, copy=True)
        return rows | {EXTRA + name: value.clone() for name, value in extras.items()}

    def decode(self, rows: Mapping[str, Tensor]) -> TeacherSequence:
        codes = rows["ids_low"].to(torch.int32) & 0xFFFF
        if self.high_bits:
            codes |= _unpack(rows["ids_high"], self.high_bits, self.k) << 16
        return TeacherSequence(
            ids=codes.sub_(1),
            logprobs=rows["logprobs"].to(torch.float32).add_(rows["shift"][:, None]),
            tail_logprob=rows["tail_logprob"].clone() if self.tail else None,
            extras={name: rows[EXTRA + name].clone() for name in self.extras},
        )


@dataclass(frozen=True)
class ExpectationLayout(Rows):
    """Of the D expectations a token."""

    hidden_size: int
    dtype: torch.dtype
    bias: bool
    extras: Mapping[str, torch.dtype]

    @property
    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "expectation": (self.dtype, (self.hidden_size,)),
            "entropy": (torch.float32, ()),
        }
        if self.bias:
            fields["expected_bias"] = (torch.float32, ())
        return fields | super().fields

    def encode(
        self, expectation: Tensor, entropy: Tensor, bias: Optional[Tensor], extras: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Turn a checked sequence into rows of the arrays."""
        rows = {
            "expectation": expectation.to(self.dtype, copy=True, memory_format=torch.contiguous_format),
            "entropy": entropy.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
        }
        if bias is not None:
            rows["expected_bias"] = bias.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return rows | {EXTRA + name: value.clone() for name, value in extras.items()}

    def decode(self, rows: Mapping[str, Tensor]) -> ExpectationSequence:
        return ExpectationSequence(
            expectation=rows["expectation"].to(torch.float32, copy=True),
            entropy=rows["entropy"].clone(),
            expected_bias=rows["expected_bias"].clone() if self.bias else None,
            extras={name: rows[EXTRA + name].clone() for name in self.extras},
        )


def checksum(first: int, last: int, rows: Mapping[str, Tensor]) -> int:
    """The CRC-32 of a sequence: of where its rows begin and end in the shard, and of all their bytes."""
    crc = zlib.crc32(struct.pack("<qq", first, last))
    for name in sorted(rows):
        crc = zlib.crc32(rows[name].view(torch.uint8).numpy().data, crc)
    return crc


def _round(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities in fp16, and for each row what to add to keep ``sum(exp(logprobs))``."""
    rounded = logprobs.to(torch.float16)
    shift = logprobs.logsumexp(-1) - rounded.to(torch.float32).logsumexp(-1)
    # A row without any probability has -inf - (-inf).
    return rounded, torch.where(shift.isfinite(), shift, 0.0)


def _pack(values: Tensor, bits: int) -> Tensor:
    """``values`` below ``2^bits`` ``[L, K]`` as bytes ``[L, ceil(K bits / 8)]``, the first in the lowest bits."""
    per_byte = 8 // bits
    padded = F.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    return (padded << torch.arange(0, 8, bits, dtype=torch.int32)).sum(-1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of ``_pack``, int32 ``[L, k]``."""
    values = (packed[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8)) & (2**bits - 1)
    return values.flatten(-2)[:, :k].to(torch.int32)
