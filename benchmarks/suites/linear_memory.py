"""Peak memory of the loss on hidden states at a large vocabulary, for few and for many rows.

Nothing else is measured beside it: formulations in bf16 that multiply as PyTorch's CPU does take minutes here.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.suites import linear

SUITE = replace(
    linear.SUITE,
    name="linear_memory",
    title="Losses on hidden states: peak memory at a large vocabulary",
    shapes=((1024, 128256, 512), (4096, 128256, 512)),
    dtypes=("bf16",),
    quick_shapes=((256, 32768, 32),),
    make_candidates=lambda case: linear.ours(linear.FORWARD_KL, case),
)
