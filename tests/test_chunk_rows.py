"""How many rows a chunk of the losses on hidden states has."""

import pytest
import torch

import kdkernels as kd
from kdkernels import chunks, memory
from kdkernels.heads import Head, HeadGrad, Scratch

H100, B200 = 50 * 2**20, 126 * 2**20


def rows(l2_bytes, columns, width, teachers=1):
    hidden = torch.empty(1, width, dtype=torch.bfloat16, device="meta")
    products = chunks.Products.of(columns, hidden, torch.bfloat16, [hidden] * teachers, [True, True, False])
    # Of fp32 logits of student and teachers, and the gradient that is rounded.
    row_bytes = 4 * columns * (1 + teachers) + 2 * min(columns, 16384)
    return chunks.gpu_chunk_rows(l2_bytes, row_bytes, products), row_bytes


@pytest.mark.parametrize(
    ("l2_bytes", "columns", "width"),
    [(H100, 800, 4096), (B200, 4096, 2048), (B200, 1000, 8192)],
)
def test_small_heads_have_chunks_that_stay_in_half_of_the_l2_cache(l2_bytes, columns, width):
    count, row_bytes = rows(l2_bytes, columns, width)
    assert count == l2_bytes // 2 // row_bytes >= chunks.GPU_PRODUCT_ROWS


@pytest.mark.parametrize(
    ("l2_bytes", "columns", "width"),
    [
        (H100, 128256, 4096),  # 25 rows in half of the cache
        (H100, 32000, 4096),
        (H100, 2000, 4096),  # the head's sums go through memory
        (B200, 4096, 512),  # products of 27 us
        (B200, 8192, 1024),  # 806 rows
        (0, 800, 4096),  # torch does not say
    ],
)
def test_others_have_the_chunks_of_512_mib(l2_bytes, columns, width):
    count, row_bytes = rows(l2_bytes, columns, width)
    assert count == chunks.GPU_CHUNK_BYTES // row_bytes


def test_what_was_asked_for_is_the_size_of_a_chunk_on_every_device():
    for device in ("cpu", "cuda"):
        assert chunks.chunk_rows(1000, torch.device(device), 10) == 100
    assert chunks.chunk_rows(None, torch.device("cpu"), 2**20) == 96
    assert memory.l2_bytes(torch.device("cpu")) == 0


def test_the_heads_gradient_is_added_to_by_the_product_itself(monkeypatch):
    """On a GPU: 16-bit operands, fp32 sums, no product of its own that would be read and added afterwards."""
    calls = []

    def product(a, b, out, *, add):
        calls.append((a.dtype, b.dtype, out.dtype, add))
        if add:
            out += a.float() @ b.float()
        else:
            torch.mm(a.float(), b.float(), out=out)

    monkeypatch.setattr("kdkernels.heads.products", lambda *_, **__: "mixed")
    monkeypatch.setattr("kdkernels.heads.mixed_product", product)
    hidden, weight, dlogits = torch.randn(6, 5).bfloat16(), torch.randn(40, 5).bfloat16(), torch.randn(6, 40)
    scratch = Scratch(hidden)
    head = Head(weight, None, columns=40, dtype=torch.bfloat16, logits_dtype=torch.float32, scratch=scratch)
    head._on_cpu = False
    sums = HeadGrad(weight, head.blocks)
    for _ in range(2):
        head.backward(dlogits, hidden, wants_dhidden=False, dweight=sums, dbias=None)
    assert calls == 2 * [(torch.bfloat16, torch.bfloat16, torch.float32, True)]
    expected = 2 * dlogits.bfloat16().float().t() @ hidden.float()
    torch.testing.assert_close(sums.sums(head.blocks[0]), expected)


def test_results_do_not_depend_on_the_chunks():
    hidden, head = torch.randn(9, 8), torch.randn(17, 8)
    losses = {kd.linear_kd_loss(hidden, head, hidden * 2, head, chunk_bytes=size).item() for size in (1, 500, None)}
    assert max(losses) - min(losses) < 1e-6
