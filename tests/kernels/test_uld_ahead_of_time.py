"""The kernel of universal logit distillation compiles for every target, without a spill."""

import pytest
import torch

pytest.importorskip("triton")

from budgets import HIP
from launches import compile_for, recorded, specialisation, uld


def launch(rows=4, V=32000, teacher_V=128256):
    student, teacher = torch.empty(rows, V, dtype=torch.bfloat16), torch.empty(rows, teacher_V, dtype=torch.float16)
    with recorded() as launches:
        uld(student, teacher, torch.empty_like(student), torch.zeros(rows, dtype=torch.int64))
    return launches[0]


@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_120", HIP[0]))
def test_it_compiles_without_a_spill(target):
    found = compile_for(launch(), target)
    # A block has 512 threads, on AMD 1024.
    assert found.spilled == 0 and found.registers <= 128, found
    assert found.shared <= 64 << 10


def test_one_binary_for_any_number_of_rows():
    assert len({specialisation(launch(rows), 90) for rows in (1, 2, 16, 257)}) == 1
