"""The matrix products of a language model's head with one chunk of rows, and the head's gradient over all chunks."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kdkernels import memory

# Columns of the head that a CPU multiplies at a time: the block then stays in the cache through packing and product.
CPU_BLOCK_COLUMNS = 512
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
        return buffer[:size].view(shape)

    def logits(self, name: str, num_rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """As ``empty``, of a chunk. On a CPU rows are an odd number of cache lines apart: the product writes a few
        columns of many rows at a time, which then do not fall on the same few places of the cache."""
        stride = columns
        if self._like.device.type == "cpu":
            line = CACHE_LINE_BYTES // dtype.itemsize
            stride = (-(-columns // line) | 1) * line
        return self.empty(name, (num_rows, stride), dtype)[:, :columns]

    def converted(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """``source`` itself, or a copy of another dtype."""
        if source.dtype == dtype:
            return source
        return self.empty(name, tuple(source.shape), dtype).copy_(source)


class HeadGrad:
    """The gradient of a head ``[V, D]`` or bias ``[V]``, summed in fp32 (fp64 for fp64).

    Where that is the dtype of the head, sums stay where they are. Otherwise they are made in pieces, each freed as soon
    as it is rounded: at no time are there more bytes than those of the sums and of one piece.
    """

    def __init__(self, weight: Tensor, blocks: list[slice]) -> None:
        self._weight = weight
        dtype = sum_dtype(weight.dtype)
        self._rows = len(weight)
        if weight.dtype != dtype:
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

    def finish(self) -> Tensor:
        """The gradient in the head's dtype, 0 in the padding; the sums are gone."""
        if len(self._sums) == 1:
            return self._sums.pop().to(self._weight.dtype)
        grad = torch.empty(self._weight.shape, dtype=self._weight.dtype, device=self._weight.device)
        for part in grad.split(self._rows):
            part.copy_(self._sums.pop(0))
        return grad


class Head:
    """``logits = hidden @ weight.T + bias`` over the first ``columns`` rows of ``weight [V, D]``, a chunk at a time.

    ``dtype`` is that of the products: operands are rounded to it, and sums are fp32 or wider. Where a device has no
    16-bit product worth the name, blocks of 16-bit operands are converted to fp32: exact products, and the CPU that
    this was measured on (Zen 2) does 60 to 85 GFLOP/s a core in fp32 and 0.7 to 10 in bf16.
    """

    def __init__(
        self, weight: Tensor, bias: Optional[Tensor], *, columns: int, dtype: torch.dtype, scratch: Scratch
    ) -> None:
        self._rounded, self.dtype = dtype, sum_dtype(dtype) if _widens(weight.device, dtype) else dtype
        self.weight = weight.detach()[:columns]
        if self.dtype == dtype:
            self.weight = self.weight.to(dtype)
        self.bias = None if bias is None else bias.detach()[:columns].to(dtype).to(self.dtype)
        self._scratch = scratch
        on_cpu = weight.device.type == "cpu"
        self._projected = _blocks(columns, CPU_BLOCK_COLUMNS if on_cpu else columns)
        self.blocks = _blocks(columns, CPU_BLOCK_COLUMNS if self.dtype != dtype else columns)

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits of ``hidden [R, D]`` to ``out [R, V]``."""
        hidden = self._wide("hidden", hidden)
        for block in self._projected:
            weight = self._block(block)
            target = out[:, block]
            if out.dtype != self.dtype:
                target = self._scratch.empty("logits", tuple(target.shape), self.dtype)
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=target)
            else:
                torch.addmm(self.bias[block], hidden, weight.t(), out=target)
            if out.dtype != self.dtype:
                out[:, block] = target

    def backward(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        *,
        wants_dhidden: bool,
        dweight: Optional[HeadGrad],
        dbias: Optional[HeadGrad],
    ) -> Optional[Tensor]:
        """Add the gradients of a chunk to ``dweight`` and ``dbias``; return that of ``hidden``, until the next call."""
        dhidden = None
        if wants_dhidden:
            dhidden = self._scratch.empty("dhidden", tuple(hidden.shape), self.dtype)
        hidden = self._wide("hidden", hidden)
        for block in self.blocks:
            dblock = self._wide("logits", dlogits[:, block])
            if dhidden is not None:
                dhidden.addmm_(dblock, self._block(block), beta=1 if block.start else 0)
            if dweight is not None:
                _add_product(dweight.sums(block), dblock.t(), hidden)
            if dbias is not None:
                sums = dbias.sums(block)
                sums += dblock.sum(0, dtype=sums.dtype)
        return dhidden

    def _block(self, block: slice) -> Tensor:
        """Rows of the head, rounded to the dtype of the products and widened again."""
        return self._wide("weight", self._scratch.converted("rounded", self.weight[block], self._rounded))

    def _wide(self, name: str, source: Tensor) -> Tensor:
        return self._scratch.converted(name, source, self.dtype)


def _blocks(columns: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums += a @ b`` with sums of at least the operands' precision."""
    if sums.dtype == a.dtype:
        sums.addmm_(a, b)
    elif sums.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(sums, a, b, sums.dtype, out=sums)
    else:
        for part, rows in zip(sums.split(CPU_BLOCK_COLUMNS), a.split(CPU_BLOCK_COLUMNS), strict=True):
            part += torch.mm(rows, b)


def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype.itemsize > 2:
        return False
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not (dtype == torch.bfloat16 and has_bf16)
