"""The bytes of a sequence in a shard: a teacher's expectations under a student's head, and the checksum of both kinds.

The codec of K ids and log-probabilities a token is in ``kdkernels.packing``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels.packing import EXTRA, MAX_VOCAB_SIZE, Layout, Rows, TeacherSequence

__all__ = [
    "CRC32",
    "MAX_VOCAB_SIZE",
    "OFFSETS",
    "ExpectationLayout",
    "ExpectationSequence",
    "Layout",
    "TeacherSequence",
    "checksum",
]

OFFSETS, CRC32 = "offsets", "crc32"


class ExpectationSequence(NamedTuple):
    """A teacher's expectations over the L tokens of one sequence, see ``kdkernels.TeacherExpectation``.

    ``expectation`` ``[L, D]``, ``entropy`` ``[L]`` and ``expected_bias`` ``[L]``, None where the head has no bias, in
    fp32; ``extras`` the other tensors ``[L]`` by name.
    """

    expectation: Tensor
    entropy: Tensor
    expected_bias: Optional[Tensor]
    extras: dict[str, Tensor]


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
        crc = zlib.crc32(as_bytes(rows[name]), crc)
    return crc


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on a CPU, row by row, whatever its strides are."""
    if not tensor.is_contiguous() or (tensor.dim() and tensor.stride(-1) != 1):
        # One number of a column passes for contiguous, and has no view as bytes.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.uint8).numpy().data
