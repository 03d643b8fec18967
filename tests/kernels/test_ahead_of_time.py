"""Every shipped form of the Triton kernels compiles, on a machine without a GPU, to what ``budgets.json`` says.

The specialisation is that of a real call. ``python tests/kernels/budgets.py`` writes the table anew; its docstring says
what is counted and how.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

import budgets
from budgets import CASES, CASES_HIP, FORMS, HIP, TOKEN_FORMS, key, measure, measure_amd
from launches import dense, dkd, mse, recorded, specialisation, topk

from kdkernels.kernels import tuning
from kdkernels.kernels.scale import scale_grad

TABLE, TABLE_AMD = budgets.read(), budgets.read_amd()


@pytest.mark.slow
@pytest.mark.parametrize("target, form", CASES, ids=str)
def test_budget(target, form):
    found = measure(form, target)
    assert budgets.excesses(found, TABLE[key(target, form)]) == [], found


def test_table_is_complete():
    assert list(TABLE) == [key(*case) for case in CASES] and list(TABLE_AMD) == [key(*case) for case in CASES_HIP]


def test_nothing_spills():
    """A few scalars of the row may be parked in memory outside the loops of two sweeps; a tile is hundreds of bytes."""
    swept = {name: entry["spilled"] for name, entry in TABLE.items() if entry["pattern"] == "sweeps"}
    assert all(spilled <= 64 for spilled in swept.values()), swept
    spilled = {name: entry["spilled"] for name, entry in TABLE.items() if entry["pattern"] != "sweeps"}
    # Alpha-beta takes all 255 registers, and on sm_100 a dozen values more.
    assert spilled.pop("sm_100/alpha_beta") <= 56
    # The logits of half the registers of a multiprocessor, and of the other half all that is made of them.
    assert spilled.pop("sm_80/reverse_kl-V32000-bf16") <= 16
    # A few scalars, for a second block of 512 threads.
    assert spilled.pop("sm_80/capture-V32000") <= 40 and spilled.pop("sm_90/capture-V32000") <= 40
    assert not any(spilled.values())


def test_targets():
    """The one-pass kernel on the case it was built for: bf16, 131072 columns, with gradient, on sm_90."""
    forward = TABLE["sm_90/forward_kl"]
    assert forward["pattern"] == "cluster"
    assert list(forward["loads"]) == ["16"] and forward["stores"].keys() == {"16", "4"}
    threads = 32 * forward["num_warps"] * forward["num_ctas"]
    one_pass = 2 * 131072
    assert forward["loads"]["16"] * 16 * threads == 2 * one_pass
    assert forward["stores"]["16"] * 16 * threads == one_pass and forward["stores"]["4"] == 1
    assert forward["instructions"] <= 24 and forward["transcendental"] <= 2.1
    assert forward["cluster_reductions"] <= 2 and forward["resident_blocks"] >= 3
    assert TABLE["sm_90/reverse_kl"]["instructions"] <= 26 and TABLE["sm_90/reverse_kl"]["resident_blocks"] >= 3
    # One block takes a row on any architecture, and several rows where they are narrow.
    for target in ("sm_80", "sm_90"):
        for form, most in (("V1000", 27), ("V1001", 33), ("V8192", 24), ("V32000", 30)):
            entry = TABLE[f"{target}/forward_kl-{form}-bf16"]
            assert entry["pattern"] == "cluster" and entry["instructions"] <= most and entry["spilled"] == 0
    # JSD leaves the terms of first order out of every element, and keeps two blocks resident with it.
    for name, most in (("jsd", 47), ("tvd", 45)):
        assert TABLE[f"sm_90/{name}"]["instructions"] <= most
    assert TABLE["sm_90/jsd"]["resident_blocks"] >= 2


def test_wide_accesses():
    """Where V and the strides are multiples of 16 bytes, what is narrower are scalars of a row."""
    for name, entry in TABLE.items():
        if name.split("/")[1] in {**budgets.TOPK_FORMS, **budgets.CAPTURE_FORMS, **TOKEN_FORMS}:
            continue  # test_topk_ahead_of_time.py: entries of the teacher are narrow; tokens have a test of their own
        V, dtype, M, _, options = FORMS.get(name.split("/")[1], (131072, "bf16", 1, True, {}))
        if V * budgets.DTYPES[dtype].itemsize % 16:
            continue
        scalars = 2 * ("ce_weight" in options) + (M if M > 1 else 0) + 21 * bool(options.get("stats"))
        scalars += {"dkd": 3, "scale": 1}.get(name.split("/")[1], 0)
        narrow = {kind: sum(n for width, n in entry[kind].items() if int(width) < 16) for kind in ("loads", "stores")}
        assert narrow["loads"] <= scalars, name
        assert narrow["stores"] <= 2 + 21 * bool(options.get("stats")), name
        assert entry["loads"]["16"] >= 2 or "scale" in name, name


def test_tokens():
    """Few instructions, all columns in 16-byte pieces, and room for several rows beside each other."""
    for name, entry in TABLE.items():
        form = name.split("/")[1]
        if form not in TOKEN_FORMS:
            continue
        back, more = "back" in form, bool({"entropy", "stats"} & set(TOKEN_FORMS[form][4]))
        # Many ids are compared with each other, and a tail's are marked: those loops count too.
        if TOKEN_FORMS[form][2] == 1:
            assert entry["instructions"] <= (6.5 if back else 7) + (3 if more else 0), name
            assert entry["transcendental"] <= 1.1, name
        # A row of 1000 columns has one tile.
        assert (
            entry["loads"]["16"] >= (2 if form == "token-V1000" else 4) and (entry["stores"].get("16", 0) >= 4) == back
        ), name
        least = 512 if "-V" in form or "stats" in form else 1024
        assert entry["resident_blocks"] * entry["num_warps"] * 32 >= least, name


@pytest.mark.slow
@pytest.mark.parametrize("target, form", CASES_HIP, ids=str)
def test_amd(target, form):
    found, budget = measure_amd(form, target), TABLE_AMD[key(target, form)]
    assert target in HIP and found["spilled"] == 0
    # No loop that loads 16 bytes at a time would have none.
    assert 0 < found["valu"] <= 1.02 * budget["valu"] and found["memory"] <= 1.02 * budget["memory"]
    assert found["transcendental"] <= budget["transcendental"] and found["registers"] <= budget["registers"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_one_binary_for_any_number_of_rows(target):
    """The number of rows, the ignored label and the weights are run-time values: a new batch compiles nothing."""
    keys = set()
    for N in (1, 2, 16, 257):
        student = torch.empty(N, 32000, dtype=torch.bfloat16)
        labels = torch.zeros(N, dtype=torch.int64)
        for options in (
            {"ignore_index": -100, "scale": 0.5},
            {"ignore_index": 1, "temperature": 2.0, "ce_weight": 1.0},
        ):
            with budgets.on(target), recorded() as launches:
                dense(student, [student], student, labels, **{"ce_weight": 0.25, **options})
            keys.add(specialisation(launches[0], int(target[3:])))
    assert len(keys) == 1


@pytest.mark.parametrize("pattern", ["dense", "topk", "dkd", "mse", "scale"])
def test_one_binary_for_any_length_of_sequences(pattern):
    """Of rows that are not evenly spaced L is a run-time value, and no integer of a tuple changes with it."""
    keys = set()
    for L, ignore_index, weight in ((16, -100, 0.5), (17, 1, 0.25), (1, 16, 1.0)):
        student = torch.empty(2, L + 8, 1024)[:, :L]
        labels, row_weight = torch.zeros(2 * L, dtype=torch.int64), torch.empty(2 * L)
        options = {"ignore_index": ignore_index, "scale": weight}
        with budgets.on("sm_80"), recorded() as launches:
            if pattern == "dense":
                dense(student, [student], student, labels, row_weight, ce_weight=weight, **options)
            elif pattern == "topk":
                ids = torch.zeros(2 * L, 16, dtype=torch.int32)
                topk(student, ids, torch.zeros(2 * L, 16), student, labels, row_weight, ce_weight=weight, **options)
            elif pattern == "scale":
                scale_grad(student, row_weight)
            else:
                {"dkd": dkd, "mse": mse}[pattern](student, student, student, labels, row_weight, **options)
        keys.add(specialisation(launches[0], 80))
    assert len(keys) == 1


def plan(V=131072, itemsize=2, load=tuning.LIGHT, resident_load=tuning.LIGHT, arch=90):
    return tuning.dense_plans(V, itemsize, load=load, resident_load=resident_load, arch=arch)[0]


def test_who_sweeps(monkeypatch):
    assert plan().pattern == "cluster"
    for other in ({"arch": 80}, {"arch": 0}, {"resident_load": None}, {"V": 524288}):
        assert plan(**other).pattern == "sweeps", other
    assert plan(arch=120).num_ctas <= 8
    # Several rows in a block, and rows in one block, want no cluster.
    for arch in (80, 90):
        assert plan(V=1000, arch=arch).rows == 4
    monkeypatch.setattr(tuning.triton, "__version__", "3.7.1")
    assert plan().pattern == "sweeps"
    for V in (2048, 4097, 16384, 32768):
        for load in (tuning.LIGHT, tuning.LIGHT_Q):
            one = plan(V=V, resident_load=load)
            assert one == plan(V=V, resident_load=load, arch=80)
            assert one.pattern == "cluster" and one.num_ctas == 1 and 4 <= one.num_warps <= 32


def test_plans_cover_the_row():
    """Powers of two that Triton can lay out, no empty piece, no more columns a thread than the tables say."""
    for V in (1, 7, 100, 1000, 1001, 2048, 4096, 5003, 32000, 50257, 128256, 151936, 262144):
        for itemsize in (2, 4):
            for load in tuning.CLUSTER:
                for cut in (False, True) if V % 8 and V >= 256 else (False,):
                    assert_plans_cover(V, itemsize, load, cut)


def assert_plans_cover(V, itemsize, load, cut):
    vec = 16 // itemsize if cut else math.gcd(16 // itemsize, V)
    options = {"load": tuning.LIGHT, "resident_load": load, "vec": vec, "cut": cut}
    *plans, last = tuning.dense_plans(V, itemsize, arch=90, **options)
    assert last.pattern == "sweeps"
    for pattern, (pieces, lanes, width), num_warps, num_ctas, rows, keep in plans:
        assert pattern == "cluster" and width == vec and num_ctas <= 16
        assert all(n & (n - 1) == 0 for n in (lanes, vec, num_warps, num_ctas, rows))
        assert (pieces - 1) * lanes * vec < V + cut * (vec - 1) <= pieces * lanes * vec
        columns = pieces * lanes * vec * rows // (32 * num_warps * num_ctas)
        assert columns <= max(
            most for *_, most, _ in [*tuning.ONE_BLOCK[load], *((*x, 0) for x in tuning.CLUSTER[load])]
        )
        assert keep or columns > 48
