"""The bytes of a token's K ids and log-probabilities: in the shards of a cache, and in a buffer to be sent.

An id is stored as the code ``id + 1``, 0 for an unused slot: its low 16 bits in one array, the 0, 1, 2, 4 or 8 bits
above them, as the vocabulary needs, packed into another. A log-probability is rounded to fp16, and the row's ``shift``
in fp32 restores the sum of its probabilities to what it was before. Without it rounding moves that sum by up to 5e-4
of the row's entropy, and the tail, which is the rest to 1, by as much: many times its size where the teacher is sure.
"""

from __future__ import annotations

import abc
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import checks

# Codes have at most 24 bits.
MAX_VOCAB_SIZE = 2**24 - 1
EXTRA = "extra."
FORMAT = "kdkernels-topk"
# Arrays of a buffer begin at multiples of the widest number.
ALIGNMENT = 8
MAX_HEADER = 2**16


class TeacherSequence(NamedTuple):
    """A captured teacher over the L tokens of one sequence.

    ``ids`` int32 ``[L, K]``, -1 in unused slots; ``logprobs`` fp32 ``[L, K]``, -inf there; ``tail_logprob`` fp32
    ``[L]``, None where the cache has none; ``extras`` the other tensors ``[L]`` by name.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Optional[Tensor]
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
    """Of K ids and log-probabilities a token.

    ``dtype`` is that of the log-probabilities as they come back. 16 bits are stored as they are, and so are
    float32 ones where ``exact`` says so.
    """

    k: int
    vocab_size: int
    tail: bool
    extras: Mapping[str, torch.dtype]
    dtype: torch.dtype = torch.float32
    exact: bool = False

    @property
    def high_bits(self) -> int:
        """Bits of a code above its low 16, rounded up so that bytes hold whole ones."""
        needed = self.vocab_size.bit_length() - 16
        return next(bits for bits in (0, 1, 2, 4, 8) if needed <= bits)

    @property
    def _stored(self) -> torch.dtype:
        return torch.float16 if self.dtype == torch.float32 and not self.exact else self.dtype

    @property
    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "ids_low": (torch.int16, (self.k,)),
            "logprobs": (self._stored, (self.k,)),
        }
        if self._stored != self.dtype:
            fields["shift"] = (torch.float32, ())
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
        kept = logprobs.to(self.dtype).masked_fill(codes == 0, -torch.inf)
        rows = {"ids_low": codes.to(torch.int16), "logprobs": kept}
        if self._stored != self.dtype:
            rows["logprobs"], rows["shift"] = _round(kept)
        if self.high_bits:
            rows["ids_high"] = _pack(codes >> 16, self.high_bits)
        if tail_logprob is not None:
            rows["tail_logprob"] = tail_logprob.to(torch.float32, copy=True)
        return rows | {EXTRA + name: value.clone() for name, value in extras.items()}

    def decode(self, rows: Mapping[str, Tensor]) -> TeacherSequence:
        codes = rows["ids_low"].to(torch.int32) & 0xFFFF
        if self.high_bits:
            codes |= _unpack(rows["ids_high"], self.high_bits, self.k) << 16
        logprobs = rows["logprobs"].to(self.dtype, copy=True)
        if self._stored != self.dtype:
            logprobs.add_(rows["shift"][:, None])
        return TeacherSequence(
            ids=codes.sub_(1),
            logprobs=logprobs,
            tail_logprob=rows["tail_logprob"].clone() if self.tail else None,
            extras={name: rows[EXTRA + name].clone() for name in self.extras},
        )


class TopKLayout:
    """Where the ids, log-probabilities and tails of a ``TeacherTopK`` are in one buffer of bytes, which can be sent.

    A buffer begins with what the layout is made of, and is of one size for one layout: who receives it makes the layout
    to know how many bytes will come. Ids take 16, 17, 18, 20 or 24 bits, by the vocabulary, as in a cache.

    Args:
        rows: shape of the rows, such as ``(B, L)``.
        k: entries of a row.
        vocab_size: V, below 2^24; ids are below it.
        dtype: of the log-probabilities: bfloat16 and float16 ones come back as they are. float32 ones are rounded to
            float16, 2^-11 of their size, and come with 4 bytes a row that restore the sum of its probabilities to 5e-7.
        exact: float32 log-probabilities come back as they are, in twice the bytes.
        extras: names and dtypes of further tensors of one number a row, such as ``{"labels": torch.int64}``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> layout = TopKLayout((4, 512), 64, 128256)
        >>> layout.token_bytes, layout.nbytes
        (272, 557192)
    """

    def __init__(
        self,
        rows: Sequence[int],
        k: int,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        exact: bool = False,
        extras: Optional[Mapping[str, torch.dtype]] = None,
    ) -> None:
        self.rows, dtypes = checks.packed_layout(rows, dtype, exact, extras)
        self._layout = Layout(
            checks.integer("k", k, low=1),
            checks.integer("vocab_size", vocab_size, low=1, high=MAX_VOCAB_SIZE),
            True,
            dtypes,
            dtype,
            exact,
        )
        content = {
            "format": FORMAT,
            "version": 1,
            "rows": list(self.rows),
            "k": k,
            "vocab_size": vocab_size,
            "dtype": _name(dtype),
            "exact": exact,
            "extras": {name: _name(of_extra) for name, of_extra in self._layout.extras.items()},
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        self._header = struct.pack("<q", len(text)) + text + b" " * (-len(text) % ALIGNMENT)

    @property
    def token_bytes(self) -> int:
        """Bytes of one row, exactly."""
        return self._layout.token_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer."""
        return len(self._header) + math.prod(self.rows) * self.token_bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TopKLayout) and self._header == other._header

    def __hash__(self) -> int:
        return hash(self._header)

    def __repr__(self) -> str:
        layout = self._layout
        return (
            f"TopKLayout({self.rows}, {layout.k}, {layout.vocab_size}, dtype={layout.dtype}, exact={layout.exact}, "
            f"extras={dict(layout.extras)})"
        )

    @classmethod
    def of(cls, buffer: Tensor) -> TopKLayout:
        """The layout that a buffer begins with; a buffer on a GPU is waited for.

        Raises:
            ValueError: it begins with none, or is not as long as its layout.
        """
        checks.packed_buffer(buffer, None)
        try:
            (length,) = struct.unpack("<q", bytes(buffer[:8].tolist()))
            content = json.loads(bytes(buffer[8 : 8 + min(length, MAX_HEADER)].tolist()))
            checks.choice("format", content.pop("format"), (FORMAT,))
            checks.integer("version", content.pop("version"), low=1, high=1)
            content["dtype"] = getattr(torch, content["dtype"])
            content["extras"] = {name: getattr(torch, dtype) for name, dtype in content["extras"].items()}
            layout = cls(content.pop("rows"), content.pop("k"), content.pop("vocab_size"), **content)
        except (AttributeError, KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
            raise ValueError(f"buffer must be a packed TeacherTopK: it does not begin as one ({error})") from None
        checks.packed_buffer(buffer, layout.nbytes)
        return layout

    def pack(self, ids: Tensor, logprobs: Tensor, tail_logprob: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """A buffer uint8 ``[nbytes]`` on the device of the tensors, which are of this layout."""
        checks.to_be_packed(ids, logprobs, tail_logprob, extras, self.rows, self._layout)
        found = {name: value.detach().reshape(-1) for name, value in extras.items()}
        k = self._layout.k
        arrays = self._layout.encode(
            ids.detach().reshape(-1, k), logprobs.detach().reshape(-1, k), tail_logprob.detach().reshape(-1), found
        )
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=ids.device)
        buffer[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8).to(ids.device)
        for name, part in self._parts(buffer).items():
            part.copy_(arrays[name])
        return buffer

    def unpack(self, buffer: Tensor) -> TeacherSequence:
        """Ids, log-probabilities, tails and extras in the shape of the rows; none shares memory with the buffer.

        The beginning of a buffer on a CPU is compared with this layout; a GPU would have to be waited for.

        Raises:
            ValueError: the buffer is of another layout.
        """
        checks.packed_buffer(buffer, self.nbytes)
        if buffer.is_cpu and bytes(buffer[: len(self._header)].tolist()) != self._header:
            raise ValueError(f"buffer must be of the layout {self}, got one of {TopKLayout.of(buffer)}")
        found = self._layout.decode(self._parts(buffer))
        tail = found.tail_logprob
        return TeacherSequence(
            found.ids.reshape(*self.rows, self._layout.k),
            found.logprobs.reshape(*self.rows, self._layout.k),
            None if tail is None else tail.reshape(self.rows),
            {name: value.reshape(self.rows) for name, value in found.extras.items()},
        )

    def _parts(self, buffer: Tensor) -> dict[str, Tensor]:
        """The arrays as they are in a buffer, the widest numbers first."""
        if buffer.storage_offset() % ALIGNMENT or not buffer.is_contiguous():
            buffer = buffer.clone(memory_format=torch.contiguous_format)
        fields = sorted(self._layout.fields.items(), key=lambda field: -field[1][0].itemsize)
        first, count, parts = len(self._header), math.prod(self.rows), {}
        for name, (dtype, shape) in fields:
            last = first + count * math.prod(shape) * dtype.itemsize
            parts[name] = buffer[first:last].view(dtype).view(count, *shape)
            first = last
        return parts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    return (padded << torch.arange(0, 8, bits, dtype=torch.int32, device=values.device)).sum(-1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of ``_pack``, int32 ``[L, k]``."""
    values = (packed[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)) & (2**bits - 1)
    return values.flatten(-2)[:, :k].to(torch.int32)
