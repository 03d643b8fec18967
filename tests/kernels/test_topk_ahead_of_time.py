"""The lines of the sparse kernel in the table of budgets; test_ahead_of_time.py holds the kernel to the table."""

import pytest
import torch

pytest.importorskip("triton")

import budgets
from budgets import CASES, TOPK_FORMS, key
from launches import recorded, specialisation, topk

SPARSE = [(target, form) for target, form in CASES if form in TOPK_FORMS]


def test_wide_accesses():
    """Two rows on a multiprocessor, or one of 1024 threads: 64 registers; the logits go 16 bytes at a time."""
    table = budgets.read()
    for target, form in SPARSE:
        V, _, _, gradient, _ = TOPK_FORMS[form]
        entry = table[key(target, form)]
        assert entry["spilled"] <= 24 and entry["registers"] <= 65536 // (32 * max(16, entry["num_warps"])), form
        if V % 16 == 0:
            kind = form.split("-")[1]
            sweeps = 0 if kind == "renormalize_both" else 1 + gradient + (kind in ("uniform", "bucket"))
            vectors = budgets.launch_of(form, target).kwargs["TILE"][0]
            assert entry["loads"].get("16", 0) == sweeps * vectors, (target, form)
            assert not gradient or "16" in entry["stores"], (target, form)


def test_one_binary_for_any_number_of_entries():
    """Up to the next power of two."""
    keys = set()
    for N, K in ((1, 33), (2, 64), (16, 50), (257, 48)):
        student = torch.empty(N, 32000, dtype=torch.bfloat16)
        with recorded() as launches:
            topk(student, torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K), student)
        keys.add((specialisation(launches[0], 90), launches[0].kwargs["K_TILE"]))
    assert len(keys) == 1
