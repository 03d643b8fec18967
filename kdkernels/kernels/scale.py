"""Multiply a gradient that is already there by grad_output, without asking the GPU what grad_output is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kdkernels.kernels.arguments import Logits, evenly_spaced, logits, num_rows, on_device_of, vectors
from kdkernels.kernels.rows import Span, end_of, grid_pointer, load_tile, row_skew, store_tile, widen

BLOCK_V = 4096


@triton.jit(do_not_specialize=["L"])
def scale_grad_kernel(
    grad: Logits,  # [B, L, V]
    grad_output_ptr,  # [N]
    stride_on,
    L,
    V,
    TILE: tl.constexpr,
):
    factor = tl.load(grad_output_ptr + tl.program_id(0).to(tl.int64) * stride_on).to(tl.float32)
    # The usual end of a loss: backward() hands in 1, and nothing is read or written.
    if factor == 1.0:
        return
    index = tl.program_id(0).to(tl.int64)
    skew = row_skew(grad, index, L, TILE)
    span = Span(skew, end_of(skew, V, TILE))
    grad_ptr = grid_pointer(grad, index, skew, L, TILE)
    BLOCK_V: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    for start in range(tl.program_id(1) * BLOCK_V, span.stop, tl.num_programs(1) * BLOCK_V):
        store_tile(grad_ptr, start, span, widen(load_tile(grad_ptr, start, span, TILE)) * factor, TILE)


def scale_grad(grad: Tensor, grad_output: Tensor) -> None:
    """Multiply the rows of grad [B, L, V] or [N, V] by grad_output (0-d, or [N]) in place; no host sync."""
    V = grad.shape[-1]
    N = num_rows(grad)
    if grad.numel() == 0:
        return
    # Few rows are cut into pieces, so that they still fill a GPU.
    pieces = max(1, min(triton.cdiv(V, BLOCK_V), 1024 // N))
    vec, cut = vectors(V, grad)
    columns = min(BLOCK_V, max(128 * vec, triton.next_power_of_2(V)))
    with on_device_of(grad):
        scale_grad_kernel[(N, pieces)](
            grad=logits(grad),
            grad_output_ptr=grad_output,
            stride_on=0 if grad_output.dim() == 0 else grad_output.stride(0),
            L=None if evenly_spaced(grad) else grad.shape[-2],
            V=V,
            TILE=(columns // (128 * vec), 128, vec, cut),
            num_warps=4,
            enable_fp_fusion=True,
        )
