"""Every error a caller can get: its type, its message, and that nothing was touched before it was raised."""

import inspect

import pytest
import torch

import kdkernels as kd
from kdkernels import backends, checks

N, L, V = 2, 3, 8
NAN, INF = float("nan"), float("inf")


def logits(*shape, dtype=torch.float32):
    return torch.randn(shape or (N, L, V)).to(dtype)


def labels(*values, dtype=torch.int64):
    return torch.tensor(values or [0, 1, 2, 3, 4, 5], dtype=dtype).reshape(N, L)


# The change to a valid call, the error and its message.
CALLS = {
    # Student.
    "student-list": ({"student": [[1.0]]}, TypeError, "student must be a torch.Tensor, got list"),
    "student-none": ({"student": None}, TypeError, "student must be a torch.Tensor, got NoneType"),
    "student-int": (
        {"student": torch.ones(N, L, V, dtype=torch.int64)},
        TypeError,
        "student must be float32, bfloat16, float16 or float64, got int64",
    ),
    "student-complex": ({"student": logits().to(torch.complex64)}, TypeError, "student must be float32, .*complex64"),
    "student-fp8": (
        {"student": logits().to(torch.float8_e4m3fn)},
        TypeError,
        "student must be float32, .*float8_e4m3fn",
    ),
    "student-sparse": ({"student": logits(N, V).to_sparse()}, TypeError, "student must be a dense tensor, got layout"),
    "student-0d": (
        {"student": torch.tensor(1.0)},
        ValueError,
        r"student must have shape \(\.\.\., V\) with V >= 1, got \(\)",
    ),
    "student-V0": (
        {"student": logits(N, L, 0)},
        ValueError,
        r"student must have shape \(\.\.\., V\) with V >= 1, got \(2, 3, 0\)",
    ),
    "student-strided": (
        {"student": logits(N, L, 2 * V)[..., ::2]},
        ValueError,
        r"student must have stride 1 in the last dimension, got strides \(48, 16, 2\)",
    ),
    "student-transposed": (
        {"student": logits(N, V, L).transpose(1, 2)},
        ValueError,
        r"student must have stride 1 in the last dimension, got strides \(24, 1, 3\)",
    ),
    # Teacher.
    "teacher-none": ({"teacher": None}, TypeError, "teacher is required unless kd_weight is the number 0"),
    "teacher-bool": (
        {"teacher": torch.ones(N, L, V, dtype=torch.bool)},
        TypeError,
        "teacher must be float32, .* got bool",
    ),
    "teacher-rows": (
        {"teacher": logits(N, L + 1, V)},
        ValueError,
        r"teacher must have the student's shape \(2, 3, 8\), got \(2, 4, 8\)$",
    ),
    "teacher-width": (
        {"teacher": logits(N, L, V + 4)},
        ValueError,
        r"teacher must have the student's shape \(2, 3, 8\), got \(2, 3, 12\); pass vocab_size=",
    ),
    "teacher-dims": (
        {"teacher": logits(N * L, V)},
        ValueError,
        r"teacher must have the student's shape .* got \(6, 8\)",
    ),
    "teacher-strided": (
        {"teacher": logits(N, L, 2 * V)[..., 1::2]},
        ValueError,
        "teacher must have stride 1 in the last dimension, got strides",
    ),
    "teacher-device": (
        {"teacher": torch.empty(N, L, V, device="meta")},
        ValueError,
        "teacher must be on the student's device cpu, got meta",
    ),
    "no-teachers": ({"teacher": []}, ValueError, "teacher must be a tensor or 1 to 4 tensors, got 0"),
    "five-teachers": ({"teacher": [logits()] * 5}, ValueError, "teacher must be a tensor or 1 to 4 tensors, got 5"),
    "second-teacher": (
        {"teacher": [logits(), logits(N, L, V - 1)]},
        ValueError,
        r"teacher\[1\] must have the student's shape \(2, 3, 8\), got \(2, 3, 7\)",
    ),
    # Labels.
    "labels-list": ({"labels": [1, 2]}, TypeError, "labels must be a torch.Tensor, got list"),
    "labels-float": ({"labels": labels(dtype=torch.float32)}, TypeError, "labels must be int64 or int32, got float32"),
    "labels-int8": ({"labels": labels(dtype=torch.int8)}, TypeError, "labels must be int64 or int32, got int8"),
    "labels-shape": ({"labels": labels().flatten()}, ValueError, r"labels must have shape \(2, 3\), got \(6,\)"),
    "labels-device": (
        {"labels": torch.empty(N, L, dtype=torch.int64, device="meta")},
        ValueError,
        "labels must be on the student's device cpu, got meta",
    ),
    "label-high": (
        {"labels": labels(0, 1, 2, 8, 4, 5)},
        ValueError,
        r"labels must be in \[0, 8\) or equal to ignore_index -100, got 8",
    ),
    "label-low": ({"labels": labels(0, 1, 2, -1, 4, 5)}, ValueError, r"labels must be in \[0, 8\) .* -100, got -1"),
    "label-in-padding": (
        {"labels": labels(0, 1, 2, 7, 4, 5), "vocab_size": 7},
        ValueError,
        r"labels must be in \[0, 7\) or equal to ignore_index -100, got 7",
    ),
    "label-other-ignore": (
        {"labels": labels(0, 1, 2, -100, 4, 5), "ignore_index": -1},
        ValueError,
        "ignore_index -1, got -100",
    ),
    "ce-without-labels": (
        {"labels": None, "ce_weight": 0.5},
        ValueError,
        "labels are required when ce_weight is not 0",
    ),
    # Temperatures.
    "temperature-0": ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
    "temperature-negative": ({"temperature": -1}, ValueError, "temperature must be > 0, got -1"),
    "temperature-nan": ({"temperature": NAN}, ValueError, "temperature must be finite, got nan"),
    "temperature-inf": ({"temperature": INF}, ValueError, "temperature must be finite, got inf"),
    "temperature-str": ({"temperature": "2"}, TypeError, "temperature must be a number, got str"),
    "temperature-bool": ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
    "temperature-none": ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    "temperature-rows": (
        {"temperature": torch.ones(N)},
        ValueError,
        r"temperature must be a number or have one value per row, shape \(2, 3\), got \(2,\)",
    ),
    "temperature-row-0": (
        {"temperature": torch.tensor([1.0, 2, 3, 4, 0, 6]).reshape(N, L)},
        ValueError,
        "temperature must be finite and > 0, got 0.0",
    ),
    "temperature-row-nan": (
        {"temperature": torch.full((N, L), NAN)},
        ValueError,
        "temperature must be finite and > 0, got nan",
    ),
    "temperature-row-bool": (
        {"temperature": torch.ones(N, L, dtype=torch.bool)},
        TypeError,
        "temperature must be a number or a tensor of numbers, got bool",
    ),
    "temperature-device": (
        {"temperature": torch.ones(N, L, device="meta")},
        ValueError,
        "temperature must be on the student's device cpu, got meta",
    ),
    "teacher_temperature-0": ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be > 0, got 0.0"),
    "teacher_temperature-rows": (
        {"teacher_temperature": torch.ones(N, L + 1)},
        ValueError,
        "teacher_temperature must be a number or have one value per row",
    ),
    "scale_by_t_squared": ({"scale_by_t_squared": 1}, TypeError, "scale_by_t_squared must be a bool, got int"),
    # Weights of the terms and of the rows.
    **{
        f"{name}-{value}": ({name: value}, ValueError, f"{name} must be {expected}, got {value}")
        for name in ("kd_weight", "ce_weight", "z_loss_weight")
        for value, expected in ((-0.5, ">= 0"), (NAN, "finite"), (INF, "finite"))
    },
    "ce_weight-str": ({"ce_weight": "half"}, TypeError, "ce_weight must be a number, got str"),
    "label_smoothing-high": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.1"),
    "label_smoothing-low": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    "row_weight-str": ({"row_weight": "all"}, TypeError, "row_weight must be a number, got str"),
    "row_weight-nan": ({"row_weight": torch.full((N, L), NAN)}, ValueError, "row_weight must be finite, got nan"),
    "row_weight-shape": ({"row_weight": torch.ones(L, N)}, ValueError, r"row_weight .* shape \(2, 3\), got \(3, 2\)"),
    "row_weight-grad": (
        {"row_weight": torch.ones(N, L, requires_grad=True)},
        ValueError,
        "row_weight must not require grad",
    ),
    # Reductions.
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, batchmean, got 'avg'"),
    "reduction-none": (
        {"reduction": None},
        TypeError,
        "reduction must be one of none, sum, mean, batchmean, got NoneType",
    ),
    "batchmean-1d": (
        {"student": logits(V), "teacher": logits(V), "labels": None, "reduction": "batchmean"},
        ValueError,
        r"reduction 'batchmean' needs a batch dimension, got student of shape \(8,\)",
    ),
    "normalizer-none": (
        {"normalizer": 4, "reduction": "none"},
        ValueError,
        "normalizer needs reduction 'sum' or 'mean', got 'none'",
    ),
    "normalizer-batchmean": (
        {"normalizer": 4, "reduction": "batchmean"},
        ValueError,
        "normalizer needs .* got 'batchmean'",
    ),
    "normalizer-0": ({"normalizer": 0}, ValueError, "normalizer must be > 0, got 0"),
    "normalizer-str": ({"normalizer": "4"}, TypeError, "normalizer must be a number, got str"),
    "normalizer-tensor-0": ({"normalizer": torch.tensor(0)}, ValueError, "normalizer must be finite and > 0, got 0.0"),
    "normalizer-rows": (
        {"normalizer": torch.ones(3)},
        ValueError,
        r"normalizer must be a number or a tensor of one element, got shape \(3,\)",
    ),
    "normalizer-grad": (
        {"normalizer": torch.tensor(3.0, requires_grad=True)},
        ValueError,
        "normalizer must not require grad",
    ),
    # Divergences.
    "divergence": (
        {"divergence": "kl"},
        ValueError,
        "divergence must be one of forward_kl, reverse_kl, jsd, .* or an instance, got 'kl'",
    ),
    "divergence-hidden": (
        {"divergence": "dual_soft_ce"},
        ValueError,
        "divergence must be one of .* got 'dual_soft_ce'",
    ),
    "divergence-class": ({"divergence": kd.JSD}, TypeError, r"a name or an instance such as JSD\(0.5\), got 'JSD'"),
    "divergence-none": ({"divergence": None}, TypeError, "divergence must be a name or an instance .* got None"),
    "row_param-none": (
        {"row_param": torch.full((N, L), 0.5), "divergence": "tvd"},
        ValueError,
        "row_param needs a divergence with a parameter per row, got 'tvd'",
    ),
    "row_param-number": (
        {"row_param": 0.5, "divergence": "jsd"},
        TypeError,
        "row_param must be a tensor; give one number in the divergence itself",
    ),
    "row_param-1": (
        {"row_param": torch.ones(N, L), "divergence": "jsd"},
        ValueError,
        "row_param must be finite and between 0 and 1, got 1.0",
    ),
    "row_param-shape": (
        {"row_param": torch.full((L,), 0.5), "divergence": "jsd"},
        ValueError,
        r"row_param .* got \(3,\)",
    ),
    # The teacher's form.
    "teacher_form": (
        {"teacher_form": "logprobs"},
        ValueError,
        "teacher_form must be one of logits, log_probs, probs, unnormalized_probs, got 'logprobs'",
    ),
    "teacher_form-sums": (
        {"teacher": torch.full_like(logits(), 0.5), "teacher_form": "probs"},
        ValueError,
        r"teacher must hold probabilities that add up to 1 .* got a sum of .*teacher_form='unnormalized_probs'",
    ),
    "teacher_form-softcap": (
        {"teacher": torch.softmax(logits(), -1), "teacher_form": "probs", "teacher_softcap": 5.0},
        ValueError,
        "teacher_softcap has no meaning with teacher_form='probs': it acts on logits",
    ),
    "teacher_weights-single": (
        {"teacher_weights": [1.0]},
        ValueError,
        "teacher_weights need a sequence of teachers, got one tensor",
    ),
    "teacher_weights-count": (
        {"teacher": [logits()] * 2, "teacher_weights": [0.2, 0.3, 0.5]},
        ValueError,
        r"teacher_weights must have shape \(2,\) or \(2, 3, 2\), got \(3,\)",
    ),
    "teacher_weights-rows": (
        {"teacher": [logits()] * 2, "teacher_weights": torch.ones(L, 2)},
        ValueError,
        r"teacher_weights must have shape \(2,\) or \(2, 3, 2\), got \(3, 2\)",
    ),
    "teacher_weights-negative": (
        {"teacher": [logits()] * 2, "teacher_weights": [-0.5, 1.5]},
        ValueError,
        'teacher_weights must be >= 0, got -0.5; those of mixture="logits" may be below 0',
    ),
    "teacher_weights-zero": (
        {"teacher": [logits()] * 2, "teacher_weights": torch.ones(N, L, 2).index_fill(1, torch.tensor([1]), 0.0)},
        ValueError,
        "teacher_weights must not all be 0",
    ),
    "teacher_weights-nan": (
        {"teacher": [logits()] * 2, "teacher_weights": torch.tensor([NAN, 1.0])},
        ValueError,
        "teacher_weights must be finite and >= 0",
    ),
    "teacher_weights-grad": (
        {"teacher": [logits()] * 2, "teacher_weights": torch.ones(2, requires_grad=True)},
        ValueError,
        "teacher_weights must not require grad",
    ),
    "mixture": ({"mixture": "sum"}, ValueError, "mixture must be one of probs, logits, got 'sum'"),
    # Widths and caps.
    "vocab_size-0": ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
    "vocab_size-float": ({"vocab_size": 8.0}, TypeError, "vocab_size must be an int, got float"),
    "vocab_size-bool": ({"vocab_size": True}, TypeError, "vocab_size must be an int, got bool"),
    "vocab_size-student": ({"vocab_size": 9}, ValueError, "vocab_size must be at most student's width 8, got 9"),
    "vocab_size-teacher": (
        {"vocab_size": 8, "teacher": logits(N, L, 7)},
        ValueError,
        "vocab_size must be at most teacher's width 7, got 8",
    ),
    "student_softcap": ({"student_softcap": 0.0}, ValueError, "student_softcap must be > 0, got 0.0"),
    "teacher_softcap": ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be > 0, got -1.0"),
    # Switches.
    "standardize": ({"standardize": "yes"}, TypeError, "standardize must be a bool, got str"),
    "inplace": ({"inplace": None}, TypeError, "inplace must be a bool, got NoneType"),
    "return_stats": ({"return_stats": 1}, TypeError, "return_stats must be a bool, got int"),
    "inplace-strided-4d": (
        {
            "student": logits(2, 2, 3, 2 * V)[..., :V],
            "teacher": logits(2, 2, 3, V),
            "labels": None,
            "inplace": True,
        },
        ValueError,
        "inplace needs a contiguous student or at most 3 dimensions, got strides",
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of auto, cuda, triton, cpu, torch, got 'gpu'"),
    "backend-triton": (
        {"backend": "triton"},
        ValueError,
        "backend 'triton' cannot run this call: it runs on GPU tensors, not on cpu",
    ),
    # The teacher's gradient.
    "probs-grad": (
        {"teacher": torch.softmax(logits(), -1).requires_grad_(), "teacher_form": "probs", "backend": "cpu"},
        ValueError,
        "backend 'cpu' cannot run this call: (teacher probabilities get a gradient from plain PyTorch only|the C)",
    ),
    "mixture-grad": (
        {"teacher": [logits().requires_grad_(), logits()], "backend": "cpu"},
        ValueError,
        "backend 'cpu' cannot run this call: (a mixture of teachers gets a gradient from plain PyTorch only|the C)",
    ),
    "inplace-grad": (
        {"teacher": logits().requires_grad_(), "inplace": True, "backend": "cpu"},
        ValueError,
        "backend 'cpu' cannot run this call: (inplace cannot be combined with a teacher that requires grad|the C)",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_calls(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = {"student": logits(), "teacher": logits(), "labels": labels(), **change}
    tensors = [x for x in (call["student"], call["teacher"], call["labels"]) if isinstance(x, torch.Tensor)]
    tensors = [x for x in tensors if x.device.type == "cpu" and x.layout == torch.strided and x.numel()]
    if isinstance(call["student"], torch.Tensor) and call["student"].is_floating_point():
        call["student"].requires_grad_()
    before = [(x.detach().clone(), x._version) for x in tensors]
    with pytest.raises(error, match=message):
        kd.kd_loss(**call)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version


# Numbers of fp64 that are 0, infinite, or without an inverse in fp32, in which the sums are.
BEYOND_FP32 = {
    **{
        f"{name}-{value:g}": ({name: value}, f"{name} must be {expected} in float32, got {value}".replace("+", r"\+"))
        for name in ("temperature", "teacher_temperature", "student_softcap", "teacher_softcap", "normalizer")
        for value, expected in ((1e-46, "at least 1.18e-38"), (1e-39, "at least 1.18e-38"), (1e300, "finite"))
    },
    "row_weight": ({"row_weight": -1e300}, r"row_weight must be finite in float32, got -1e\+300"),
    "temperature-tensor": (
        {"temperature": torch.tensor(1e-46, dtype=torch.float64)},
        "temperature must be finite and > 0 in float32, got 1e-46",
    ),
    "temperature-rows": (
        {"temperature": torch.full((N, L), 1e-39, dtype=torch.float64)},
        "temperature must be finite and > 0 in float32, got 1e-39",
    ),
    "row_weight-rows": (
        {"row_weight": torch.full((N, L), 1e300, dtype=torch.float64)},
        r"row_weight must be finite in float32, got 1e\+300",
    ),
    "row_param-rows": (
        {"row_param": torch.full((N, L), 1e-50, dtype=torch.float64), "divergence": "jsd"},
        "row_param must be finite and between 0 and 1 in float32, got 1e-50",
    ),
    "normalizer-tensor-low": (
        {"normalizer": torch.tensor(3e-50, dtype=torch.float64)},
        "normalizer must be at least 1.18e-38 in float32, got 3e-50",
    ),
    "normalizer-tensor-high": (
        {"normalizer": torch.tensor(1e300, dtype=torch.float64)},
        r"normalizer must be finite in float32, got 1e\+300",
    ),
    "teacher_weights": (
        {"teacher": [logits(), logits()], "teacher_weights": [1e300, 1.0]},
        "teacher_weights must be finite and >= 0 in float32",
    ),
}


@pytest.mark.parametrize(("change", "message"), BEYOND_FP32.values(), ids=BEYOND_FP32)
def test_numbers_that_the_sums_do_not_know(change, message, backend):
    call = {"student": logits(), "teacher": logits(), **change}
    with pytest.raises(ValueError, match=message):
        kd.kd_loss(**call, backend=backend)


def test_numbers_beyond_64_bits():
    student, hidden, head = logits(2, V), logits(2, 4), logits(V, 4)
    for value in (2**70, -(2**70)):
        for options in ({}, {"labels": torch.tensor([1, 2])}):
            with pytest.raises(
                ValueError, match=f"ignore_index must be at (most|least) -?92233720368547758.., got {value}"
            ):
                kd.kd_loss(student, logits(2, V), ignore_index=value, **options)
    with pytest.raises(ValueError, match="chunk_bytes must be at most 9223372036854775807, got 11805916"):
        kd.linear_kd_loss(hidden, head, hidden, head, chunk_bytes=2**70)
    with pytest.raises(ValueError, match="n must be at most 9223372036854775807, got 11805916"):
        kd.capture_samples(student, 2**70)
    for call in (
        lambda: kd.kd_loss(student, student, temperature=10**400),
        lambda: kd.kd_loss(student, student, kd_weight=10**400),
        lambda: kd.kd_loss(student, student, divergence=kd.AlphaBeta(10**400, 1)),
    ):
        with pytest.raises(ValueError, match="must be finite, got 1000"):
            call()


@pytest.mark.parametrize("weights", [[3e38, 3e38], [3e38, 1e38], [1e-44, 1e-44], torch.tensor([3e38, 3e38])], ids=str)
def test_teacher_weights_whose_sum_is_no_number_of_fp32(weights, backend):
    student, teachers = logits(3, V), [logits(3, V), logits(3, V)]
    share = torch.as_tensor(weights, dtype=torch.float64)
    share = (share / share.sum()).tolist()
    found = kd.kd_loss(student, teachers, teacher_weights=weights, backend=backend)
    torch.testing.assert_close(found, kd.kd_loss(student, teachers, teacher_weights=share, backend=backend))


AT_ONCE = {
    name: case
    for name, case in CALLS.items()
    if not {"student", "teacher", "labels"} & set(case[0])
    and not any(isinstance(value, torch.Tensor) and value.dim() for value in case[0].values())
    and name not in ("vocab_size-student", "teacher_weights-single", "row_param-number", "backend-triton")
}


@pytest.mark.parametrize(("change", "error", "message"), AT_ONCE.values(), ids=AT_ONCE)
def test_the_module_finds_bad_options_when_it_is_built(change, error, message):
    with pytest.raises(error, match=message):
        kd.KDLoss(**change)


def test_unknown_options_are_named():
    message = "got an unexpected option 'temprature'; did you mean 'temperature'"
    with pytest.raises(TypeError, match=f"kd_loss {message}"):
        kd.KDLoss(temprature=2.0)
    with pytest.raises(TypeError, match=f"kd_loss {message}"):
        kd.kd_loss(logits(), logits(), temprature=2.0)
    with pytest.raises(TypeError, match=f"taid_loss {message}"):
        kd.taid_loss(logits(), logits(), interpolation=0.5, temprature=2.0)
    with pytest.raises(TypeError, match="unexpected option 'inplace'; kdkernels.kd_loss has it$"):
        kd.LinearKDLoss(inplace=True)


PATTERNS = {
    "taid-teacher_form": (
        lambda: kd.taid_loss(logits(), logits(), interpolation=0.5, teacher_form="probs"),
        TypeError,
        "taid_loss got an unexpected option 'teacher_form'",
    ),
    "taid-teacher_temperature": (
        lambda: kd.taid_loss(logits(), logits(), interpolation=0.5, teacher_temperature=1.0),
        TypeError,
        "taid_loss got an unexpected option 'teacher_temperature'",
    ),
    "taid-high": (
        lambda: kd.taid_loss(logits(), logits(), interpolation=1.5),
        ValueError,
        r"interpolation must be in \[0, 1\], got 1.5",
    ),
    "taid-row": (
        lambda: kd.taid_loss(logits(), logits(), interpolation=torch.full((N, L), -0.1)),
        ValueError,
        "interpolation must be finite and between 0 and 1, got -0.1",
    ),
    "taid-shape": (
        lambda: kd.taid_loss(logits(), logits(N, L, V - 1), interpolation=0.5),
        ValueError,
        "teacher must have the student's shape",
    ),
    "dkd-labels": (lambda: kd.dkd_loss(logits(), logits(), None), TypeError, "labels are required by dkd_loss"),
    "dkd-alpha": (
        lambda: kd.dkd_loss(logits(), logits(), labels(), alpha=-1),
        ValueError,
        "alpha must be >= 0, got -1",
    ),
    "dkd-beta": (
        lambda: kd.dkd_loss(logits(), logits(), labels(), beta="8"),
        TypeError,
        "beta must be a number, got str",
    ),
    "dkd-rows": (
        lambda: kd.dkd_loss(logits(), logits(), labels(), temperature=torch.ones(N, L)),
        TypeError,
        "temperature must be a number in dkd_loss, got a tensor",
    ),
    "dkd-label": (
        lambda: kd.dkd_loss(logits(), logits(), labels(0, 1, 2, 3, 4, 99)),
        ValueError,
        r"labels must be in \[0, 8\) .* got 99",
    ),
    "dkd-grad": (
        lambda: kd.dkd_loss(logits(), logits().requires_grad_(), labels()),
        ValueError,
        "teacher must not require grad in dkd_loss: it gets no gradient; detach it",
    ),
    "mse-centered": (
        lambda: kd.logit_mse_loss(logits(), logits(), centered=1),
        TypeError,
        "centered must be a bool, got int",
    ),
    "mse-shape": (
        lambda: kd.logit_mse_loss(logits(), logits(N, L, V + 1)),
        ValueError,
        "teacher must have the student's shape",
    ),
    "mse-grad": (
        lambda: kd.logit_mse_loss(logits(), logits().requires_grad_()),
        ValueError,
        "teacher must not require grad in logit_mse_loss",
    ),
    "mse-normalizer": (
        lambda: kd.logit_mse_loss(logits(), logits(), reduction="none", normalizer=3),
        ValueError,
        "normalizer needs reduction 'sum' or 'mean'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), PATTERNS.values(), ids=PATTERNS)
def test_bad_calls_of_the_other_losses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_is_not_there_says_why(monkeypatch):
    monkeypatch.setattr(backends.cpu, "load_error", lambda: "the C++ extension was not built")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: the C.. extension was not built"):
        kd.kd_loss(logits(), logits(), backend="cpu")
    # "auto" goes on to the next, and gives the same.
    student, teacher = logits(), logits()
    assert torch.equal(kd.kd_loss(student, teacher), kd.kd_loss(student, teacher, backend="torch"))


def test_stride_does_not_matter_where_there_is_one_column(backend):
    student, teacher = logits(N, L, 4)[..., 1:2], logits(N, L, 1)
    assert kd.kd_loss(student, teacher, backend=backend).abs() < 1e-6


def test_a_label_out_of_range_is_no_label_when_it_is_ignored(backend):
    wild = labels(0, 1, 10**15, 3, 4, 10**15)
    loss = kd.kd_loss(logits(), logits(), wild, ce_weight=1.0, ignore_index=10**15, reduction="none", backend=backend)
    assert torch.isfinite(loss).all() and (loss == 0).flatten().tolist() == [False, False, True] * 2


def test_values_on_a_gpu_are_read_in_debug_mode_only(monkeypatch):
    """Reading them waits for the device. A tensor on the meta device has none to read, whoever asks."""

    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    there, nowhere = torch.empty(3).as_subclass(OnGPU), torch.empty(3, device="meta")
    assert checks.reads_values(torch.empty(3)) and not checks.reads_values(there)
    monkeypatch.setenv("KDKERNELS_DEBUG", "1")
    assert checks.reads_values(there) and not checks.reads_values(nowhere)


def test_options_that_were_accepted_once_are_still_checked():
    student, teacher = torch.zeros(2, 5), torch.zeros(2, 5)
    kd.kd_loss(student, teacher, kd_weight=1.0, standardize=False)
    with pytest.raises(TypeError, match="standardize must be a bool"):
        kd.kd_loss(student, teacher, kd_weight=1.0, standardize=0)
    with pytest.raises(TypeError, match="kd_weight must be a number"):
        kd.kd_loss(student, teacher, kd_weight=True, standardize=False)
    for temperature in (2.0, -2.0, 2.0, float("nan")):
        if temperature == 2.0:
            kd.kd_loss(student, teacher, temperature=temperature)
            continue
        with pytest.raises(ValueError, match="temperature must be"):
            kd.kd_loss(student, teacher, temperature=temperature)


WIDE = torch.zeros(2, 10)
DIFFERENCES = {
    "dtype": ((torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5)), TypeError, "student must be float32"),
    "stride": ((WIDE[:, ::2], torch.zeros(2, 5)), ValueError, "student must have stride 1"),
    "teacher's stride": ((torch.zeros(2, 5), WIDE[:, ::2]), ValueError, "teacher must have stride 1"),
    "shape": ((torch.zeros(2, 5), torch.zeros(2, 6)), ValueError, "teacher must have the student's shape"),
    "layout": ((torch.zeros(2, 5).to_sparse(), torch.zeros(2, 5)), TypeError, "student must be a dense tensor"),
    "device": ((torch.zeros(2, 5), torch.zeros(2, 5, device="meta")), ValueError, "teacher must be on the student's"),
    "type": ((torch.zeros(2, 5), [0.0] * 5), (TypeError, ValueError), "teacher"),
    "labels": ((torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 5])), ValueError, "labels must be in"),
    "labels' shape": ((torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0])), ValueError, "labels must have shape"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_call_like_one_that_was_accepted_is_still_checked_where_it_differs(arguments, error, message):
    for _ in range(2):
        kd.kd_loss(torch.zeros(2, 5), torch.zeros(2, 5), reduction="sum")
    with pytest.raises(error, match=message):
        kd.kd_loss(*arguments, reduction="sum")


def test_a_sparse_teacher_has_its_values_checked_in_every_call():
    student, logprobs = torch.zeros(2, 5), torch.full((2, 2), -1.0)
    for _ in range(2):
        kd.topk_kd_loss(student, torch.tensor([[0, 1], [2, -1]]), logprobs)
    with pytest.raises(ValueError, match="teacher_ids must be in"):
        kd.topk_kd_loss(student, torch.tensor([[0, 1], [2, 5]]), logprobs)
    with pytest.raises(ValueError, match="teacher_logprobs must not be NaN"):
        kd.topk_kd_loss(student, torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="teacher_logprobs must not require grad"):
        kd.topk_kd_loss(student, torch.tensor([[0, 1], [2, 3]]), logprobs.clone().requires_grad_())
    with pytest.raises(ValueError, match="tail_logprob must have shape"):
        kd.topk_kd_loss(student, torch.tensor([[0, 1], [2, 3]]), logprobs, tail_logprob=torch.zeros(3))


def test_a_tensor_among_the_options_has_the_value_of_the_moment():
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    plain = kd.kd_loss(student, teacher)
    temperature = torch.tensor([1.0, 2.0])
    first = kd.kd_loss(student, teacher, temperature=temperature)
    temperature.fill_(1.0)
    second = kd.kd_loss(student, teacher, temperature=temperature)
    assert first != plain and second == plain
    wanting = teacher.clone().requires_grad_()
    kd.kd_loss(student, wanting).backward()
    assert wanting.grad is not None and wanting.grad.abs().sum() > 0


OPTIONS_OF = {
    "kd_loss": lambda **o: kd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), **o),
    "topk_kd_loss": lambda **o: kd.topk_kd_loss(torch.zeros(2, 3), *sparse_zeros(), **o),
    "dkd_loss": lambda **o: kd.dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), **o),
    "logit_mse_loss": lambda **o: kd.logit_mse_loss(torch.zeros(2, 3), torch.zeros(2, 3), **o),
    "uld_loss": lambda **o: kd.uld_loss(torch.zeros(2, 3), torch.zeros(2, 4), **o),
    "linear_kd_loss": lambda **o: kd.linear_kd_loss(*[torch.zeros(2, 3), torch.zeros(5, 3)] * 2, **o),
    "linear_topk_kd_loss": lambda **o: kd.linear_topk_kd_loss(
        torch.zeros(2, 3), torch.zeros(5, 3), *sparse_zeros(), **o
    ),
}


def sparse_zeros():
    return torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("function", "option"),
    [
        (function, name)
        for function in OPTIONS_OF
        for name, parameter in inspect.signature(getattr(kd, function)).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ],
)
def test_every_option_is_looked_at(function, option):
    """A nonsense value of any option is an error that names it: an option that is dropped would take anything."""
    with pytest.raises((TypeError, ValueError), match=option):
        OPTIONS_OF[function](**{option: object()})


class Nonsense:
    """Of no type that any argument has."""


LOGITS = torch.zeros(3, 7)
IDS, LOGPROBS = torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), -2.0)
CALLS = {
    kd.kd_loss: (LOGITS, LOGITS),
    kd.topk_kd_loss: (LOGITS, IDS, LOGPROBS),
    kd.dkd_loss: (LOGITS, LOGITS, IDS[:, 0]),
    kd.logit_mse_loss: (LOGITS, LOGITS),
    kd.uld_loss: (LOGITS, LOGITS),
    kd.linear_kd_loss: (LOGITS, LOGITS, LOGITS, LOGITS),
    kd.linear_topk_kd_loss: (LOGITS, LOGITS, IDS.clamp(max=1), LOGPROBS),
}
KEYWORDS = [
    (loss, name)
    for loss in CALLS
    for name, parameter in inspect.signature(loss).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]


@pytest.mark.parametrize(("loss", "name"), KEYWORDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_argument_arrives_where_it_is_checked(loss, name):
    """The losses hand on their arguments by name: one that is forgotten there would have its default, whatever came."""
    loss(*CALLS[loss])
    with pytest.raises((TypeError, ValueError), match=name):
        loss(*CALLS[loss], **{name: Nonsense()})


OVERLAPPING = {
    "the-row-before": lambda x: (x[1:4], x[0:3]),
    "the-row-after": lambda x: (x[0:3], x[1:4]),
    "shifted-columns": lambda x: (x[:3, :-1], x[:3, 1:]),
    "another-stride": lambda x: (x[0:3], x[::2][:3]),
    "positions": lambda x: (x.view(2, 4, -1)[:, 1:], x.view(2, 4, -1)[:, :-1]),
}
APART = {
    "the-same-rows": lambda x: (x[1:4], x[1:4]),
    "other-rows": lambda x: (x[:4], x[4:]),
    "every-other-row": lambda x: (x[::2], x[1::2]),
    "halves-of-rows": lambda x: (x[:, :8], x[:, 8:]),
    "halves-of-a-batch": lambda x: (x.view(2, 4, -1)[:, :2], x.view(2, 4, -1)[:, 2:]),
}
IN_PLACE = {
    "kd_loss": lambda s, t, **o: kd.kd_loss(s, t, **o),
    "kd_loss-mixture": lambda s, t, **o: kd.kd_loss(s, [t.clone(), t], **o),
    "kd_loss-probs": lambda s, t, **o: kd.kd_loss(s, t, teacher_form="unnormalized_probs", **o),
    "taid_loss": lambda s, t, **o: kd.taid_loss(s, t, interpolation=0.3, **o),
    "dkd_loss": lambda s, t, **o: kd.dkd_loss(s, t, torch.zeros(s.shape[:-1], dtype=torch.int64), **o),
    "logit_mse_loss": lambda s, t, **o: kd.logit_mse_loss(s, t, **o),
    "uld_loss": lambda s, t, **o: kd.uld_loss(s, t, **o),
}


@pytest.mark.parametrize("loss", IN_PLACE)
@pytest.mark.parametrize("views", OVERLAPPING)
def test_in_place_over_a_teacher_in_other_rows_is_refused(views, loss, backend):
    whole = torch.rand(8, 16).requires_grad_() * 1
    student, teacher = OVERLAPPING[views](whole)
    before = whole.detach().clone()
    with pytest.raises(ValueError, match=r"teacher(\[1\])? may share memory with other rows"):
        IN_PLACE[loss](student, teacher.detach(), inplace=True, backend=backend)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("loss", IN_PLACE)
@pytest.mark.parametrize("views", APART)
def test_in_place_beside_a_teacher_in_the_same_rows_or_none_of_them_is_right(views, loss, compiled_cpu):
    leaf = torch.rand(8, 16).requires_grad_()
    grads = []
    for inplace in (False, True):
        student, teacher = APART[views](leaf * 1)
        teacher = teacher.detach() if inplace else teacher.detach().clone()
        grads += torch.autograd.grad(IN_PLACE[loss](student, teacher, inplace=inplace, backend="cpu"), leaf)
    torch.testing.assert_close(*grads)


def test_in_place_over_what_a_sparse_teacher_is_read_from_is_refused(backend):
    whole = torch.randn(4, 16).requires_grad_() * 1
    ids, logprobs = torch.arange(3).expand(3, 3), whole.detach()[1:, :3]
    with pytest.raises(ValueError, match="teacher_logprobs may share memory"):
        kd.topk_kd_loss(whole[:3], ids, logprobs, tail="drop", inplace=True, backend=backend)
    with pytest.raises(ValueError, match="row_weight may share memory"):
        kd.kd_loss(whole[:3], whole.detach()[:3] * 2, row_weight=whole.detach()[:3, 0], inplace=True, backend=backend)
