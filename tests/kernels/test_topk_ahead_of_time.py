"""The lines of the sparse kernel in the table of budgets; test_ahead_of_time.py holds the kernel to the table."""

import functools

import pytest
import torch

pytest.importorskip("triton")

import budgets
from budgets import CAPTURE_FORMS, CASES, TOPK_FORMS, key
from launches import recorded, specialisation, topk

from kdkernels.kernels import tuning

SPARSE = [(target, form) for target, form in CASES if form in TOPK_FORMS]


def test_wide_accesses():
    """Two rows on a multiprocessor, or one of 1024 threads: 64 registers; the logits go 16 bytes at a time."""
    table = budgets.read()
    for target, form in SPARSE:
        V, _, _, gradient, _ = TOPK_FORMS[form]
        entry = table[key(target, form)]
        assert entry["spilled"] <= 24, form
        if entry["pattern"] == "sweeps":
            assert entry["registers"] <= 65536 // (32 * max(16, entry["num_warps"])), form
        if entry["pattern"] == "resident":
            # The row once; and where the mass outside is summed anew, once more.
            pieces, lanes, vec = budgets.launch_of(form, target).kwargs["TILE"][:3]
            vectors = pieces * lanes // (32 * entry["num_warps"])
            again = "uniform" not in form
            assert entry["spilled"] == 0 and entry["loads"]["16"] == (1 + again) * vectors, (target, form)
            assert entry["stores"]["16"] >= vectors, (target, form)
        elif V % 16 == 0:
            kind = form.split("-")[1]
            sweeps = 0 if kind == "renormalize_both" else 1 + gradient + (kind in ("uniform", "bucket"))
            vectors = budgets.launch_of(form, target).kwargs["TILE"][0]
            assert entry["loads"].get("16", 0) == sweeps * vectors, (target, form)
            assert not gradient or "16" in entry["stores"], (target, form)


def test_captures():
    """Columns move 16 bytes at a time, and two blocks or more fit on a multiprocessor, or one of 512 threads."""
    table = budgets.read()
    for target, form in CASES:
        if form in CAPTURE_FORMS:
            entry = table[key(target, form)]
            assert entry["loads"]["16"] >= 8 and entry["resident_blocks"] * entry["num_warps"] >= 8, (target, form)


@pytest.mark.parametrize("arch, warp", [(80, 32), (90, 32), (0, 64)])
def test_who_stays_in_registers(arch, warp):
    """Rows of every width that a block holds, by as few warps as hold its entries too."""
    plans = functools.partial(tuning.sparse_plans, arch=arch, warp=warp)
    assert plans(1000, 2, 20, load=tuning.LIGHT)[0].num_warps == 1
    assert plans(1000, 2, 1000, load=tuning.LIGHT)[0].num_warps * warp >= 250
    for V in (1, 7, 255, 1000, 1001, 4097, 16384, 32000):
        for vec, cut in ((8, True), (8, False), (1, False)):
            for load, most in ((tuning.LIGHT, 32768), (tuning.MEDIUM, 16384), (tuning.HEAVY, 8192)):
                plan, *swept = plans(V, 2, 1, load=load, vec=vec, cut=cut)
                pieces, lanes, _ = plan.TILE
                if V > most * warp // 32 - 8:
                    continue
                assert plan.pattern == "resident" and [other.pattern for other in swept] == ["sweeps"]
                assert (pieces - 1) * lanes * vec < V + cut * 7 <= pieces * lanes * vec
                assert pieces <= 8 and lanes % (plan.num_warps * warp) == 0
    # Wider rows, other devices, and a loss that reads no logits.
    for V, options in ((32769, {}), (1000, {"arch": 0, "warp": 32}), (1000, {"swept": False})):
        assert [plan.pattern for plan in plans(V, 2, 1, load=tuning.LIGHT, **options)] == ["sweeps"] or warp == 64


def test_one_binary_for_any_number_of_entries():
    """Up to the next power of two."""
    keys = set()
    for N, K in ((1, 33), (2, 64), (16, 50), (257, 48)):
        student = torch.empty(N, 32000, dtype=torch.bfloat16)
        with recorded() as launches:
            topk(student, torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K), student)
        keys.add((specialisation(launches[0], 90), launches[0].kwargs["K_TILE"]))
    assert len(keys) == 1
