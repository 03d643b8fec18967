"""Calls of kd_loss whose options, shapes, dtypes and strides are drawn at random, the same ones every time: what no
grid of tests thinks of together. (A hundred thousand such calls found the logarithms of subnormal probabilities wrong.)
"""

import random

import pytest
import torch

import kdkernels as kd
from kdkernels import testing

pytestmark = pytest.mark.usefixtures("compiled_cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where every term and every option may be asked for; of other kinds the oracle does not know, for instance, that a
# student without mass at the label costs infinitely much at one temperature and not at the other.
TAME = ("normal", "near", "equal", "flat", "late", "peaked")
WIDTHS = (2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 100, 127, 129, 255, 300, 1000, 1001, 2047, 2049, 2081, 4097, 6145)
CALLS = 12


def strided(logits, pad):
    """The same logits in rows that lie further apart; NaN between them."""
    wide = torch.full((logits.shape[0], logits.shape[1] + pad), torch.nan, dtype=logits.dtype)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]]


def draw(seed):
    """Student, teacher, labels and options of one call."""
    draws = random.Random(seed)
    chance = lambda share: draws.random() < share  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    rows, columns, dtype = draws.randint(1, 13), draws.choice(WIDTHS), draws.choice(DTYPES)
    kind = draws.choice(list(testing.KINDS))
    if kind == "huge" and dtype == torch.float16:
        kind = "normal"  # at a high temperature the gradient is no float16
    tame = kind in TAME
    student, teacher = testing.make_inputs(kind, rows, columns, dtype, seed)
    options = {"divergence": draws.choice(list(kd.divergences.table()))}
    labels = None
    if chance(0.6):
        labels = torch.randint(columns, (rows,), generator=generator)
        labels[draws.randint(0, 2) :: 3] = -100
    if chance(0.6):
        options["temperature"] = draws.choice([0.05 if tame else 0.5, 0.7, 1.5, 2.0, 3.0, 4.0, 5.0, 20.0])
    elif chance(0.2):
        options["temperature"] = 0.3 + 3 * torch.rand(rows, generator=generator)
    if chance(0.25):
        options["teacher_temperature"] = draws.choice([0.5, 1.0, 2.0, 3.0])
    if chance(0.2):
        options["scale_by_t_squared"] = False
    if chance(0.2):
        options["row_weight"] = torch.rand(rows, generator=generator)
    if tame and labels is not None and chance(0.6):
        options["ce_weight"] = draws.choice([0.1, 1.0])
        options["label_smoothing"] = draws.choice([0.0, 0.1, 1.0])
        if chance(0.2):
            options["kd_weight"] = 0.0
    if tame and chance(0.2):
        options["z_loss_weight"] = 0.01
    if tame and chance(0.1):
        options["student_softcap"] = 30.0
    if tame and chance(0.1):
        options["teacher_softcap"] = 30.0
    if tame and chance(0.1):
        options["standardize"] = True
    if chance(0.15):
        teacher = teacher.to(draws.choice(DTYPES))
    elif tame and chance(0.15):
        teacher = [teacher, testing.make_inputs("normal", rows, columns, dtype, seed + 1)[1]]
        options["mixture"] = draws.choice(["probs", "logits"])
        if options["mixture"] == "logits" and chance(0.5):
            options["teacher_weights"] = [draws.uniform(-1, 2), draws.uniform(-1, 2)]
    elif not options.keys() & {"ce_weight", "z_loss_weight", "standardize"} and kind != "huge" and chance(0.15):
        teacher = torch.softmax(teacher.double(), -1).to(dtype)
        options["teacher_form"] = "probs"
        options.pop("student_softcap", None)
        options.pop("teacher_softcap", None)
    if options["divergence"] == "mixed_kl" and chance(0.7):
        options["row_param"] = (1.4 * torch.rand(rows, generator=generator) - 0.2).clamp(0, 1)
    if tame and chance(0.15):
        del options["divergence"]
        options.pop("row_param", None)
        options["kind"] = draws.choice(["nla", "hybrid"])
        options |= {"eta": draws.uniform(0, 6)} if options["kind"] == "hybrid" else {"eps": draws.choice([1e-5, 0.1])}
    part = options.get("divergence") in ("forward_kl", "soft_ce", "tvd") or "kind" in options
    if tame and part and isinstance(teacher, torch.Tensor) and "standardize" not in options and chance(0.3):
        inverse = options.get("teacher_temperature", options.get("temperature", 1.0))
        inverse = torch.as_tensor(inverse, dtype=torch.float64).expand(rows)[:, None]
        given = teacher.double().log() if options.get("teacher_form") == "probs" else teacher.double()
        cap = options.get("teacher_softcap")
        given = given if cap is None else cap * torch.tanh(given / cap)
        options["teacher_lse"] = (given / inverse).logsumexp(-1) + 2 * torch.rand(rows, generator=generator)
    for name in ("kd_weight", "ce_weight", "z_loss_weight"):
        if tame and options.get(name, name == "kd_weight") and chance(0.1):
            weight = torch.rand(rows, generator=generator)
            options[name] = torch.where(weight < 0.2, 0.0, weight)
    student = strided(student, draws.choice([0, 0, 1, 3, 8]))
    if tame and isinstance(teacher, torch.Tensor) and not options.keys() & {"standardize", "teacher_lse", "kind"}:
        return change_reading(random.Random(seed + 10**6), generator, student, teacher, labels, options)
    return student, teacher, labels, options


def change_reading(draws, generator, student, teacher, labels, options):
    """The call with operands that change how its rows are read, and numbers of its own for these."""
    columns = student.shape[1]
    if draws.random() < 0.15:
        student = student.double().log_softmax(-1).to(student.dtype)
        options.setdefault("teacher_temperature", options.pop("temperature", 1.0))
        options.pop("z_loss_weight", None), options.pop("student_softcap", None)
        options["student_form"] = "log_probs"
    elif draws.random() < 0.2:
        options["student_bias"] = torch.randn(columns, generator=generator)
    if draws.random() < 0.2:
        options["teacher_bias"] = torch.randn(columns, generator=generator)
    if draws.random() < 0.2:
        # Finite everywhere: a column without a teacher's has its tests in test_columns.py.
        options["teacher_columns"] = torch.randint(columns, (columns,), generator=generator)
    if draws.random() < 0.25:
        options["dim"] = 0
        # The planes of classes, whose rows lie next to each other.
        student, teacher = student.t().contiguous(), teacher.t().contiguous()
    return student, teacher, labels, options


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed):
    for number in range(CALLS):
        student, teacher, labels, options = draw(seed * CALLS + number)
        with testing.poisoned_memory():
            try:
                testing.check_kd_loss(student, teacher, labels, backend="cpu", **options)
            except AssertionError as error:
                raise AssertionError(f"draw({seed * CALLS + number}), {tuple(student.shape)}: {options}") from error
