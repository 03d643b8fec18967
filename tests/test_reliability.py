"""docs/reference/reliability.md: what it names exists; and the promises that no other file holds."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch

import kdkernels as kd

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reference" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)*)`", PAGE)))
ROWS, V = 64, 1003
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LABELS = torch.arange(ROWS) % 9


def sparse(teacher):
    return kd.capture_topk(teacher, 8)[:2]


LOSSES = {
    "kd": lambda s, t, **o: kd.kd_loss(s, t, temperature=2.0, **o),
    "jsd": lambda s, t, **o: kd.kd_loss(s, t, LABELS, divergence="jsd", ce_weight=0.5, **o),
    "rows": lambda s, t, **o: kd.kd_loss(s, t, row_weight=torch.linspace(1, 2, ROWS), **o),
    "topk": lambda s, t, **o: kd.topk_kd_loss(s, *sparse(t), LABELS, **o),
    "dkd": lambda s, t, **o: kd.dkd_loss(s, t, LABELS, **o),
    "mse": lambda s, t, **o: kd.logit_mse_loss(s, t, **o),
    "uld": lambda s, t, **o: kd.uld_loss(s, t, **o),
    "taid": lambda s, t, **o: kd.taid_loss(s, t, interpolation=0.3, **o),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.mark.parametrize("name", NAMED)
def test_what_the_page_names_exists(name):
    file, *path = name.split("::")
    body = ast.parse((ROOT / file).read_text()).body
    for part in path:
        found = [x for x in body if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and x.name == part]
        assert found, f"{file} has no {part}"
        body = found[0].body


def test_every_promise_has_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert len(rows) >= 20 and all("`tests/" in row.split("|")[2] for row in rows)


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    return ((2 * torch.randn(ROWS, V, generator=generator)).to(DTYPES[dtype]) for _ in range(2))


def run(loss, student, teacher, **options):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, **options)
    value.backward()
    return value.detach(), leaf.grad


@losses
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(loss, dtype, backend):
    student, teacher = inputs(dtype)
    threads = torch.get_num_threads()
    first = run(loss, student, teacher, backend=backend)
    try:
        for number in (threads, 1, 2, 3) if backend == "cpu" else (threads, threads):
            torch.set_num_threads(number)
            for inplace in (False, True) if loss is not LOSSES["taid"] else (False,):
                again = run(lambda s, t, **o: loss(s * 1, t, **o), student, teacher, backend=backend, inplace=inplace)
                assert all(map(torch.equal, first, again)), (number, inplace)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_computes_the_same(backend):
    student, teacher = inputs("fp32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before = run(LOSSES["kd"], student, teacher, backend=backend)
        child = os.fork()
        if child == 0:
            same = False
            try:
                torch.set_num_threads(1)
                same = all(map(torch.equal, before, run(LOSSES["kd"], student, teacher, backend=backend)))
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(map(torch.equal, before, run(LOSSES["kd"], student, teacher, backend=backend)))
    finally:
        torch.set_num_threads(threads)
