"""The kernel of sharded vocabularies in the interpreter, and the CPU's beside it, against plain PyTorch in fp64."""

import pytest
import torch
from oracle import ROUNDING

from kdkernels import backends, divergences, ops
from kdkernels.reference.shards import shard_rows

N = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARAMS = {"jsd": (0.3, 0.0), "skew_kl": (0.1, 0.0), "skew_reverse_kl": (0.9, 0.0), "alpha_beta": (0.2, 0.7)}
BACKENDS = ("triton", "cpu") if backends.cpu.load_error() is None else ("triton",)


def numbers(student, teacher, temperature=2.0):
    """Of rows of which these columns are most, with all factors there."""
    s, t = (x.double().amax(-1) for x in (student, teacher))
    z = [
        torch.logsumexp(x.double() / temperature, -1) - top / temperature + 0.2
        for x, top in ((student, s), (teacher, t))
    ]
    z1 = torch.logsumexp(student.double(), -1) - s + 0.2
    one = torch.ones(N, dtype=torch.float64)
    rows = [one / temperature, s, z[0], one / temperature, t, z[1], 1.5 * one, -0.4 * one, 0.3 * one, 0.7 * one, z1]
    return torch.stack([*rows, 0.01 * one, -0.6 * one], -1)


def run(backend, student, teacher, dstudent, labels, rows, params, name, cap=0.0, columns=None, stats=False):
    param0, param1 = PARAMS.get(name, (0.3, 0.0))
    options = {
        "divergence": name,
        "param0": param0,
        "param1": param1,
        "student_softcap": cap,
        "teacher_softcap": cap,
        "vocab_size": columns or student.shape[-1],
        "stats": stats,
    }
    operands = (student, teacher, dstudent, labels, rows, params)
    return shard_rows(*operands, **options) if backend == "torch" else ops.call("shard_fwd", backend, operands, options)


def check(student, teacher, name, **options):
    for name_of in BACKENDS:
        backends.select(name_of, "cpu", pattern="shard_fwd")
    labels = torch.tensor([2, -1, 0, ops.ELSEWHERE, student.shape[-1] - 1])
    rows = numbers(student, teacher)
    params = torch.linspace(0.1, 0.8, N) if name in ("jsd", "skew_kl") else None
    wide = None if params is None else params.double()
    exact = [x.double()[None] for x in (student, teacher)]
    expected = run("torch", *exact, None, None, rows, wide, name, stats=True, **options)
    dexact, narrow = torch.empty_like(exact[0]), (student[None], teacher[None])
    run("torch", *exact, dexact, labels, rows, wide, name, **options)
    for backend in BACKENDS:
        found = run(backend, *narrow, None, None, rows.float(), params, name, stats=True, **options)
        torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=3e-5)
        assert torch.equal(run(backend, *narrow, None, None, rows.float(), params, name, **options), found[:, :2])
        for inplace in (False, True):
            source = student.clone()[None]
            gradient = source if inplace else torch.full_like(source, torch.nan)
            run(backend, source, teacher[None], gradient, labels, rows.float(), params, name, **options)
            rtol = ROUNDING[student.dtype] + 3e-5
            torch.testing.assert_close(gradient.double(), dexact, rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("name", divergences.names())
def test_every_divergence(name, small_tiles):
    check(torch.randn(N, 300) * 3, torch.randn(N, 300) * 3, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 257, 1100])
def test_widths(dtype, columns, small_tiles):
    student, teacher = ((torch.randn(N, columns) * 3).to(DTYPES[dtype]) for _ in range(2))
    for name in ("forward_kl", "jsd"):
        check(student, teacher, name)
        check(student, teacher, name, cap=4.0, columns=columns - 1 if columns > 5 else columns)


def test_rows_that_nothing_asks_for_are_not_read(small_tiles):
    for name_of in BACKENDS:
        backends.select(name_of, "cpu", pattern="shard_fwd")
    student = torch.full((1, N, 300), torch.nan)
    rows = torch.zeros(N, len(ops.SHARD_NUMBERS))
    for backend in BACKENDS:
        assert not run(backend, student, student, None, None, rows, None, "jsd").any()
        gradient = torch.full_like(student, torch.nan)
        run(backend, student, student, gradient, None, rows, None, "jsd")
        assert not gradient.any()
        # The teacher alone.
        hard = rows.clone()
        hard[:, ops.SHARD_NUMBERS.index("of_hard")] = 1.0
        run(backend, torch.zeros_like(student), student, gradient, None, hard, None, "jsd")
        assert torch.equal(gradient, torch.ones_like(gradient))
