"""The one-pass kernel against fp64 truth: what test_dense.py asks of two sweeps, in pieces of 256 columns."""

import pytest
import torch
from launches import dense
from oracle import check, dense_rows
from shapes import resident
from test_dense import CASES, OBJECTIVES, TWO, corner_rows, ids, make, options_of

from kdkernels.kernels import tuning


@pytest.fixture(autouse=True, params=["one row", "several rows"])
def form(request, monkeypatch):
    """A row in a cluster, and several rows in a block, whose exponentials are computed twice."""

    def plans(V, itemsize, *, vec, cut, **_):
        if request.param == "one row":
            return [resident(V, vec, cut, 256 // vec, num_ctas=2)]
        return [resident(V, vec, cut, 128 // vec, rows=4, keep=False)]

    monkeypatch.setattr(tuning, "dense_plans", plans)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_corners(case):
    rows = corner_rows(300)
    student, teacher = (torch.stack(side) for side in zip(*rows.values(), strict=True))
    known = len(rows) - 3
    (loss, _), grad = check(dense, dense_rows, student[:known], [teacher[:known]], **options_of(case))
    assert not loss.isnan().any()
    row = list(rows).index("identical")
    if "soft_ce" not in case[0]:
        assert abs(loss[row]) < 5e-6
    if case[0] in ("forward_kl", "reverse_kl", "jeffreys", "tvd"):
        assert loss[row] == 0 and not grad[row].any()
    loss, _ = dense(student[known:], [teacher[known:]], torch.empty_like(student[known:]), **options_of(case))
    assert loss.isnan().all()


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("temperature", [0.05, 100.0])
def test_temperatures(case, temperature):
    student, teachers = make(2, 200)
    student[1], teachers[0][1] = torch.randn(200) * 1e4, torch.randn(200) * 1e4
    temperatures = {"temperature": temperature, "teacher_temperature": temperature}
    check(dense, dense_rows, student, teachers, **temperatures, **options_of(case))


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "standardize" not in OBJECTIVES[name]])
def test_objective(name, objective):
    student, teachers = make(3, 300)
    labels = torch.tensor([299, -100, 0])
    student[1] = float("nan")
    options = {"temperature": 2.0, "teacher_temperature": 1.5, **options_of((name, 0.3, 0.0)), **OBJECTIVES[objective]}
    (loss, stats), grad = check(dense, dense_rows, student, teachers, labels, **options)
    assert loss[1] == 0 and torch.equal(grad[1], torch.zeros(300)) and not stats[1].any()
    again, again_stats = dense(student, teachers, None, labels, **options)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again_stats, stats, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TWO)
def test_padding_views_and_rows(name):
    """Padded widths, probabilities, values a row, and views [B, L, V] whose rows are not evenly spaced."""
    student, teacher = torch.full((3, 700), float("nan")), torch.full((3, 304), float("nan"))
    student[:, :250], teacher[:, :250] = torch.randn(3, 250), torch.randn(3, 250)
    labels = torch.tensor([1, -100, 249])
    options = {"divergence": name, "param_rows": torch.tensor([0.1, 0.5, 0.9]), "vocab_size": 250, "ce_weight": 0.5}
    options["temperature_rows"] = torch.tensor([0.5, 1.0, 4.0])
    for inplace in (False, True):
        _, grad = check(dense, dense_rows, student, [teacher], labels, inplace=inplace, **options)
        assert not grad[:, 250:].any()
    probs = torch.softmax(teacher[:, :250], -1)
    probs[0, :100] = 0
    check(dense, dense_rows, student[:, :250].clone(), [probs], divergence=name, param0=0.3, teacher_form="probs")
    student, teacher = torch.randn(2, 4, 310)[:, :-1, 3:303], torch.randn(2, 5, 300)[:, 1:4]
    out = torch.full((2, 4, 300), float("nan"))
    loss, _ = dense(student, [teacher], out[:, :-1], divergence=name, param0=0.3)
    flat = [x.reshape(-1, 300).contiguous() for x in (student, teacher)]
    (expected, _), grad = check(dense, dense_rows, flat[0], [flat[1]], divergence=name, param0=0.3)
    # Other places of the rows in memory are other orders of their sums.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[:, :-1].reshape(-1, 300), grad, rtol=1e-5, atol=1e-8)
    assert out[:, -1].isnan().all()
