"""The matrix products of a language model's head with one chunk of rows, and the head's gradient over all chunks."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import memory
from kdkernels.backends import cpu

# Columns of the head that a CPU multiplies at a time: the block then stays in the cache through packing and product.
CPU_BLOCK_COLUMNS = 512
# The same for products that pack both operands themselves, and round the gradient of the logits as they do.
MIXED_BLOCK_COLUMNS = 4096
# Columns of an fp32 gradient that a GPU rounds to 16 bits at a time for the products of backward.
GPU_BLOCK_COLUMNS = 16384
CACHE_LINE_BYTES = 64
# Of the sums that are rounded and freed at a time. Of more than 32 MiB, which glibc's malloc gives back when freed.
PIECE_BYTES = 33 * 2**20


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Scratch:
    """Buffers by name that live through the chunks, on the device of ``like``.

    Fresh pages cost a CPU more than the conversion they hold; those of large buffers are kept for the next call.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, and overwritten by the next call of the same name."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = memory.empty(self._like, (size,), dtype, name)
        elif memory.is_poisoned():
            buffer.fill_(torch.nan)
        return buffer[:size].view(shape)

    def logits(self, name: str, num_rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """As ``empty``, of a chunk. On a CPU rows are an odd number of cache lines apart: the product writes a few
        columns of many rows at a time, which then do not fall on the same few places of the cache.

        Memory between rows is 0. A product of 16-bit matrices may read it, up to a whole tile, and multiply it by 0.
        """
        stride = columns
        if self._like.device.type == "cpu":
            line = CACHE_LINE_BYTES // dtype.itemsize
            stride = (-(-columns // line) | 1) * line
        buffer = self.empty(name, (num_rows, stride), dtype)
        buffer[:, columns:] = 0
        return buffer[:, :columns]

    def converted(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """``source`` itself, or a copy of another dtype."""
        if source.dtype == dtype:
            return source
        return self.empty(name, tuple(source.shape), dtype).copy_(source)


class Fp16Range(NamedTuple):
    """Powers of two that keep the gradient of the logits within fp16, in its chunk or as an operand of products.

    fp16 loses precision below 2^-14 and is 0 below 2^-25, and this gradient holds 1/N, weights and small probabilities.
    """

    # The factor of sums of products with the gradient: one number for all chunks, which makes the gradient of
    # a usual row about 2^8 large.
    sums: Tensor
    # True if the gradient in the chunk has this factor already.
    in_chunk: bool

    def of_chunk(self, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a chunk's gradient, and of the hidden states in the product of both.

        The first makes the largest number of this chunk about 2^14, the second makes up for the difference to ``sums``.
        """
        largest = torch.linalg.vector_norm(dlogits, torch.inf, dtype=self.sums.dtype)
        one = torch.ones_like(largest)
        rest = one if self.in_chunk else self.sums
        # Hidden states of about 1 bear that: they keep their precision, and do not overflow.
        shift = (14 - torch.frexp(largest * rest)[1]).clamp(-10, 8)
        return rest * torch.ldexp(one, shift), torch.ldexp(one, -shift)


class HeadGrad:
    """The gradient of a head ``[V, D]`` or bias ``[V]``, summed in fp32 (fp64 for fp64).

    Where that is the dtype of the head, sums stay where they are. Otherwise they are made in pieces, each freed as soon
    as it is rounded: at no time are there more bytes than those of the sums and of one piece.
    """

    def __init__(self, weight: Tensor, blocks: list[slice]) -> None:
        self._weight = weight
        dtype = sum_dtype(weight.dtype)
        self._rows = max(len(weight), 1)
        if weight.dtype != dtype and blocks:
            # A piece holds whole blocks.
            block = blocks[0].stop
            block_bytes = block * weight[0].numel() * dtype.itemsize
            self._rows = block * -(-PIECE_BYTES // block_bytes)
        if weight.dtype == dtype:
            self._sums = [memory.empty_like(weight).zero_()]
            return
        self._sums = [
            torch.zeros(len(part), *weight.shape[1:], dtype=dtype, device=weight.device)
            for part in weight.split(self._rows)
        ]

    def sums(self, block: slice) -> Tensor:
        """The sums of the rows of a block, to be added to."""
        piece, start = divmod(block.start, self._rows)
        return self._sums[piece][start : start + block.stop - block.start]

    def finish(self, scale: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """The gradient in the head's dtype, 0 in the padding, and the number that it is still to be multiplied by.

        That number is 1 but for fp16, which holds the gradient as large as it can: a loss scale that comes in backward
        then finds all of it. ``scale`` is what the sums are to be multiplied by. They are gone afterwards.
        """
        factor = self._sums[0].new_ones(())
        if self._weight.dtype == torch.float16:
            sizes = [torch.linalg.vector_norm(part, torch.inf) for part in self._sums if part.numel()]
            largest = torch.stack(sizes or [factor]).amax()
            # fp16 ends below 2^16. Powers beyond these would not be exact in fp32, nor would their reciprocals.
            room = (15 - torch.frexp(largest)[1]).clamp(-120, 120)
            factor = torch.ldexp(factor, -room)
            for part in self._sums:
                part.mul_(torch.ldexp(torch.ones_like(factor), room))
        if scale is not None:
            if self._weight.dtype == torch.float16:
                factor *= scale
            else:
                for part in self._sums:
                    part *= scale
        if len(self._sums) == 1:
            return self._sums.pop().to(self._weight.dtype), factor
        grad = torch.empty(self._weight.shape, dtype=self._weight.dtype, device=self._weight.device)
        for part in grad.split(self._rows):
            part.copy_(self._sums.pop(0))
        return grad, factor


class Head:
    """``logits = hidden @ weight.T + bias`` over the first ``columns`` rows of ``weight [V, D]``, a chunk at a time.

    ``dtype`` is that of the products: operands are rounded to it, the gradient of the logits too. Logits and sums are
    fp32 or wider, unless ``logits_dtype`` has 16 bits. See ``products`` for how that is done.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Optional[Tensor],
        *,
        columns: int,
        dtype: torch.dtype,
        logits_dtype: torch.dtype,
        scratch: Scratch,
    ) -> None:
        self.logits_dtype, self._rounded = logits_dtype, dtype
        self._rounds = logits_dtype.itemsize == 2
        self._on_cpu = weight.device.type == "cpu"
        self.way = products(weight.device, dtype, rounded_logits=self._rounds)
        self.weight = weight.detach()[:columns]
        # Blocks are rounded and widened one by one.
        if self.way != "widened":
            self.weight = self.weight.to(dtype)
        if self.way in ("mixed", "native"):
            # A product of 16-bit matrices may read what lies between rows.
            self.weight = self.weight.contiguous()
        self._widened = sum_dtype(dtype) if self.way == "widened" else dtype
        self.bias = None if bias is None else bias.detach()[:columns].to(dtype)
        self._scratch = scratch
        whole = self.way == "mixed" and not self._rounds
        self._projected = _blocks(columns, CPU_BLOCK_COLUMNS if self._on_cpu and not whole else columns)
        self.blocks = _blocks(columns, self._block_columns(columns))

    def _block_columns(self, columns: int) -> int:
        if self.way == "mixed":
            return MIXED_BLOCK_COLUMNS if self._on_cpu else GPU_BLOCK_COLUMNS
        return CPU_BLOCK_COLUMNS if self.way == "widened" else columns

    def row_bytes(self, columns: int) -> int:
        """Of a row of a chunk: the logits, and what its gradient is rounded to for the products of backward."""
        size = columns * self.logits_dtype.itemsize
        if self.way == "mixed" and not (self._on_cpu or self._rounds):
            size += min(columns, GPU_BLOCK_COLUMNS) * self._rounded.itemsize
        return size

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits of ``hidden [R, D]`` to ``out [R, V]``."""
        if self.way == "mixed" and not self._rounds:
            mixed_product(hidden, self.weight.t(), out, add=False)
            if self.bias is not None:
                out += self.bias
            return
        hidden = self._wide("hidden", hidden)
        bias = None if self.bias is None else self.bias.to(self._widened)
        for block in self._projected:
            weight = self._block(block)
            target = out[:, block]
            if out.dtype != self._widened:
                target = self._scratch.empty("logits", tuple(target.shape), self._widened)
            if bias is None:
                torch.mm(hidden, weight.t(), out=target)
            else:
                torch.addmm(bias[block], hidden, weight.t(), out=target)
            if out.dtype != self._widened:
                out[:, block] = target

    def backward(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        *,
        wants_dhidden: bool,
        dweight: Optional[HeadGrad],
        dbias: Optional[HeadGrad],
        fp16_range: Optional[Fp16Range] = None,
        with_residual: bool = False,
    ) -> Optional[Tensor]:
        """Add the gradients of a chunk to ``dweight`` and ``dbias``; return that of ``hidden``, until the next call.

        With ``fp16_range`` the sums of ``dweight`` come out multiplied by ``fp16_range.sums``. ``with_residual``, for
        that of ``hidden`` alone: what the operands of products lose of ``dlogits`` in rounding is multiplied too, and
        ``dlogits`` is gone afterwards.
        """
        dhidden = scale = total = None
        if wants_dhidden:
            kept = self._rounded if self.way == "native" else sum_dtype(self._rounded)
            dhidden = self._scratch.empty("dhidden", tuple(hidden.shape), kept)
        hidden = self._wide("hidden", hidden)
        if fp16_range is not None:
            total = fp16_range.sums
            if self.way != "widened":
                scale, hidden_scale = fp16_range.of_chunk(dlogits)
                hidden = hidden * hidden_scale.to(hidden.dtype)
                total = total / hidden_scale
        for block in self.blocks:
            dblock = dlogits[:, block]
            if dbias is not None:
                sums = dbias.sums(block)
                sums += dblock.sum(0, dtype=sums.dtype)
            dblock = self._operand(dblock, scale)
            if dhidden is not None:
                weight = self._block(block)
                self._add(dhidden, dblock, weight, first=block.start == 0)
                if with_residual and self.way == "mixed":
                    self._add(dhidden, self._residual(dlogits[:, block], dblock, scale), weight)
            if dweight is not None:
                self._add(dweight.sums(block), dblock.t(), hidden)
        if dhidden is not None and total is not None:
            dhidden = dhidden.to(total.dtype) / total
        return dhidden

    def _operand(self, dblock: Tensor, scale: Optional[Tensor]) -> Tensor:
        """A block of dlogits as the products of backward take it."""
        if scale is not None:
            return torch.mul(dblock, scale, out=self._scratch.empty("dlogits", tuple(dblock.shape), self._rounded))
        if self.way == "mixed":
            # The CPU's product rounds what it packs.
            return dblock if self._on_cpu else self._scratch.converted("dlogits", dblock, self._rounded)
        return self._wide("logits", dblock)

    def _residual(self, dblock: Tensor, operand: Tensor, scale: Optional[Tensor]) -> Tensor:
        """The rest that an operand lacks of the block that it was rounded from, whose place it takes."""
        if scale is not None:
            dblock *= scale
        dblock -= operand.to(self._rounded)
        return self._operand(dblock, None)

    def _add(self, sums: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
        """``sums += a @ b``; the ``first`` time what is there counts as 0."""
        if self.way == "mixed":
            mixed_product(a, b, sums, add=not first)
        elif sums.dtype == a.dtype:
            sums.addmm_(a, b, beta=0 if first else 1)
        else:
            for part, rows in zip(sums.split(CPU_BLOCK_COLUMNS), a.split(CPU_BLOCK_COLUMNS), strict=True):
                part += torch.mm(rows, b)

    def _block(self, block: slice) -> Tensor:
        """Rows of the head, rounded to the dtype of the products and widened again."""
        return self._wide("weight", self._scratch.converted("rounded", self.weight[block], self._rounded))

    def mean(self) -> tuple[Tensor, Optional[Tensor]]:
        """The mean of the head's rows ``[D]`` and of its bias, as the products know them, in the dtype of the sums."""
        sums = sum_dtype(self._rounded)
        total = torch.zeros(self.weight.shape[1], dtype=sums, device=self.weight.device)
        for block in self.blocks:
            total += self._block(block).sum(0, dtype=sums)
        return total / len(self.weight), None if self.bias is None else self.bias.to(sums).mean()

    def _wide(self, name: str, source: Tensor) -> Tensor:
        return self._scratch.converted(name, source, self._widened)


def _blocks(columns: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, columns)) for start in range(0, columns, max(size, 1))]


def products(device: torch.device, dtype: torch.dtype, *, rounded_logits: bool) -> str:
    """How products of operands of a dtype are made.

    - "plain": in their dtype, which is fp32 or fp64.
    - "mixed": of 16-bit operands, with fp32 results.
    - "native": of 16-bit operands, with results of 16 bits; only where ``rounded_logits`` are asked for.
    - "widened": blocks of 16-bit operands are converted to fp32, whose products are exact all the same. The CPU that
      this was measured on (Zen 2) has no 16-bit product worth the name: 60 to 85 GFLOP/s a core in fp32, 0.7 to 10 in
      bf16.
    """
    if dtype.itemsize > 2:
        return "plain"
    if device.type == "cuda" or (device.type == "cpu" and dtype == torch.bfloat16 and has_bf16_product()):
        return "mixed"
    return "native" if rounded_logits and _multiplies(device, dtype) else "widened"


def has_bf16_product() -> bool:
    """True if the CPU has a product of bf16 operands with fp32 results: oneDNN's, which can be turned off."""
    return cpu.load_error() is None and bool(torch.backends.mkldnn.enabled) and torch.ops.kdkernels.has_bf16_product()


def mixed_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """``out = a @ b``, or ``+=`` that: 16-bit operands, sums and result in fp32."""
    if out.device.type == "cpu":
        torch.ops.kdkernels.bf16_product(a, b, out, add)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """True if torch's own product of 16-bit operands is worth the name."""
    if device.type != "cpu":
        return True
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and has_bf16
