"""The matrix products of a language model's head with one chunk of rows, and the head's gradient over all chunks."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

# Columns of the head that a CPU multiplies at a time: the block then stays in the cache through packing and product.
CPU_BLOCK_COLUMNS = 1024


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Scratch:
    """Buffers by name that live through the chunks: fresh pages cost a CPU more than the conversion they hold."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised, and overwritten by the next call of the same name."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def converted(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """``source`` itself, or a copy of another dtype."""
        if source.dtype == dtype:
            return source
        return self.empty(name, tuple(source.shape), dtype, source.device).copy_(source)


class HeadGrad:
    """The gradient of a head's rows ``[V, D]``, summed in fp32 (fp64 for fp64) block by block.

    A head of that dtype gets its gradient summed where it stays. Another gets sums in blocks of their own, each freed
    as soon as it is rounded: at no time are there more bytes than those of the sums and one block.
    """

    def __init__(self, weight: Tensor, blocks: list[slice]) -> None:
        dtype = sum_dtype(weight.dtype)
        self._grad: Optional[Tensor] = None
        if weight.dtype == dtype:
            self._grad = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self._like, self._blocks = weight, blocks
        self.sums: list[Tensor] = []
        for block in blocks:
            if self._grad is not None:
                self.sums.append(self._grad[block])
            else:
                size = (block.stop - block.start, *weight.shape[1:])
                self.sums.append(torch.zeros(size, dtype=dtype, device=weight.device))

    def finish(self) -> Tensor:
        """The gradient in the head's dtype; the sums are gone."""
        if self._grad is not None:
            return self._grad
        weight = self._like
        grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        grad[self._blocks[-1].stop :].zero_()  # padding
        self.sums.reverse()
        for block in self._blocks:
            grad[block] = self.sums.pop()
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
        self.weight = weight.detach()[:columns].to(dtype)
        self.dtype = sum_dtype(dtype) if _widens(weight.device, dtype) else dtype
        self.bias = None if bias is None else bias.detach()[:columns].to(dtype).to(self.dtype)
        self._scratch = scratch
        # One block where sums of blocks would be rounded to 16 bits, or where there is no cache to block for.
        size = CPU_BLOCK_COLUMNS if weight.device.type == "cpu" and self.dtype.itemsize > 2 else columns
        self.blocks = [slice(start, min(start + size, columns)) for start in range(0, columns, size)]

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits of ``hidden [R, D]`` to ``out [R, V]``."""
        hidden = self._wide("hidden", hidden)
        for block in self.blocks:
            weight = self._wide("weight", self.weight[block])
            target = out[:, block]
            if out.dtype != self.dtype:
                target = self._scratch.empty("logits", tuple(target.shape), self.dtype, out.device)
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
            dhidden = self._scratch.empty("dhidden", tuple(hidden.shape), self.dtype, hidden.device)
        hidden = self._wide("hidden", hidden)
        for k, block in enumerate(self.blocks):
            dblock = self._wide("logits", dlogits[:, block])
            if dhidden is not None:
                dhidden.addmm_(dblock, self._wide("weight", self.weight[block]), beta=1 if k else 0)
            if dweight is not None:
                _add_product(dweight.sums[k], dblock.t(), hidden)
            if dbias is not None:
                dbias.sums[k] += dblock.sum(0, dtype=dbias.sums[k].dtype)
        return dhidden

    def _wide(self, name: str, source: Tensor) -> Tensor:
        return self._scratch.converted(name, source, self.dtype)


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums += a @ b`` with sums of at least the operands' precision."""
    if sums.dtype == a.dtype:
        sums.addmm_(a, b)
    elif sums.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(sums, a, b, sums.dtype, out=sums)
    else:
        sums += torch.mm(a, b)


def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype.itemsize > 2:
        return False
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not (dtype == torch.bfloat16 and has_bf16)
