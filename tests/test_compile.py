"""torch.compile with fullgraph=True, and the custom ops as torch.library wants them."""

import functools

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import backends, ops, testing

ROWS, WIDTH, VOCAB = 6, 16, 50

needs_library = pytest.mark.skipif(
    backends.cpu.load_error() is not None, reason=backends.cpu.load_error() or "the library is there"
)


class Student(torch.nn.Module):
    """A model that ends in the loss, as people compile it."""

    def __init__(self, **options):
        super().__init__()
        self.body = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB)
        self.loss = kd.KDLoss(**options)

    def forward(self, x, teacher, labels=None):
        return self.loss(self.head(F.gelu(self.body(x))), teacher, labels)


def rows(count=ROWS):
    labels = torch.arange(count) % VOCAB
    labels[1] = -100
    return torch.randn(count, WIDTH), torch.randn(count, VOCAB) * 3, labels


OPTIONS = {
    "mean": {"temperature": 2.0},
    "objective": {
        "divergence": kd.JSD(0.3),
        "temperature": 3.0,
        "ce_weight": 0.5,
        "z_loss_weight": 1e-3,
        "label_smoothing": 0.1,
        "student_softcap": 30.0,
        "vocab_size": VOCAB - 3,
        "return_stats": True,
    },
    "rows": {"divergence": "reverse_kl", "reduction": "none"},
}


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_model_that_ends_in_the_loss_compiles_to_one_graph(options):
    model = Student(**options)
    compiled = torch.compile(model, fullgraph=True)
    # Twice, with another number of rows: the second compilation makes it a symbol.
    for count in (ROWS, ROWS + 3):
        inputs = rows(count)
        found = []
        for function in (model, compiled):
            model.zero_grad()
            result = function(*inputs)
            loss, stats = result if options.get("return_stats") else (result, ())
            (loss * torch.linspace(-1, 2, loss.numel()).reshape(loss.shape)).sum().backward()
            found.append((loss.detach(), *stats, *(p.grad for p in model.parameters())))
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


def test_the_other_losses_and_inplace_trace():
    """With the backend that only traces: cheap, and what breaks a graph breaks it there."""
    student, teacher, labels = torch.randn(ROWS, VOCAB, requires_grad=True), torch.randn(ROWS, VOCAB), rows()[2]
    temperature = torch.linspace(1, 3, ROWS)
    calls = {
        "taid": lambda s, t: kd.taid_loss(s, t, interpolation=0.3, temperature=2.0),
        "dkd": lambda s, t: kd.dkd_loss(s, t, labels),
        "mse": lambda s, t: kd.logit_mse_loss(s, t, labels, centered=True),
        "mixture": lambda s, t: kd.kd_loss(s, [t, t + 1], teacher_weights=[0.3, 0.7]),
        "per-row": lambda s, t: kd.kd_loss(s, t, labels, temperature=temperature, row_weight=temperature),
        "torch": lambda s, t: kd.kd_loss(s, t, labels, divergence="tvd", backend="torch"),
        "normalizer": lambda s, t: kd.kd_loss(s, t, labels, normalizer=torch.tensor(9)),
        "teacher-grad": lambda s, t: kd.kd_loss(s, t, divergence="jsd"),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        traced = torch.compile(call, backend="aot_eager", fullgraph=True)
        teacher.requires_grad_(name == "teacher-grad")
        expected, got = (testing.evaluate(f, student, teacher) for f in (call, traced))
        torch.testing.assert_close(
            got.loss, expected.loss, rtol=1e-5, atol=1e-6, msg=functools.partial("{}: {}".format, name)
        )
        torch.testing.assert_close(got.dstudent, expected.dstudent, rtol=1e-4, atol=1e-6)
        if name == "teacher-grad":
            torch.testing.assert_close(got.dteacher, expected.dteacher, rtol=1e-4, atol=1e-6)
    with pytest.raises(Exception, match="inplace=True works in eager mode only"):
        torch.compile(lambda s, t: kd.kd_loss(s, t, inplace=True), backend="aot_eager", fullgraph=True)(
            student, teacher
        )


WILD = [VOCAB, -1, 10**6, -(10**6), 2**62, -(2**63)]


def test_a_label_out_of_range_is_nan_when_compiled():
    """Under torch.compile labels are not read before the launch: no row but theirs may suffer."""
    student, teacher = testing.make_inputs("normal", len(WILD) + 1, VOCAB, torch.float32)
    labels = torch.tensor([*WILD, 3])

    def call(s, t):
        return kd.kd_loss(s, t, labels, ce_weight=0.5, temperature=2.0, reduction="none")

    got = testing.evaluate(torch.compile(call, backend="aot_eager", fullgraph=True), student, teacher, torch.ones(7))
    assert got.loss.isnan().tolist() == [True] * len(WILD) + [False]
    expected = kd.kd_loss(student[-1:], teacher[-1:], labels[-1:], ce_weight=0.5, temperature=2.0)
    torch.testing.assert_close(got.loss[-1], expected)


def arguments(num_rows, labels=None, **options):
    """What ``dense_fwd`` takes beyond its three tensors of logits."""
    defaults = {
        "divergence": "forward_kl", "param0": 0.0, "param1": 0.0, "mixture": "probs", "vocab_size": VOCAB,
        "ignore_index": -100, "scale": 0.5, "temperature": 2.0, "teacher_temperature": 2.0, "kd_weight": 1.0,
        "ce_weight": 0.0, "z_loss_weight": 0.0, "label_smoothing": 0.0, "scale_by_t_squared": True,
        "teacher_form": "logits", "student_softcap": 0.0, "teacher_softcap": 0.0, "standardize": False, "stats": False,
    }  # fmt: skip
    return (labels, torch.rand(num_rows), None, None, None, None), {**defaults, **options}


@needs_library
@pytest.mark.parametrize("label", WILD)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_the_op_reads_and_writes_nothing_outside_for_a_wild_label(label, temperature):
    """The rows lie in the middle of a tensor of NaN, whose other rows must stay as they are."""
    student, teacher = (x.reshape(1, 3, VOCAB) for x in testing.make_inputs("normal", 3, VOCAB, torch.float32))
    room = torch.full((1, 9, VOCAB), 7.0)
    tensors, options = arguments(3, torch.tensor([0, label, 2]), ce_weight=1.0, temperature=temperature)
    loss, _ = ops.op("dense_fwd", "cpu")(student, [teacher], room[:, 3:6], *tensors, **options)
    assert loss.isnan().tolist() == [False, True, False]
    assert (room[:, :3] == 7).all() and (room[:, 6:] == 7).all() and torch.isfinite(room[0, [3, 5]]).all()
    dkd = {key: options[key] for key in ("temperature", "teacher_temperature", "vocab_size", "ignore_index", "scale")}
    dkd |= {"alpha": 1.0, "beta": 8.0, "scale_by_t_squared": True}
    loss = ops.op("dkd_fwd", "cpu")(student, teacher, room[:, 3:6], tensors[0], None, **dkd)
    assert loss.isnan().tolist() == [False, True, False]
    assert (room[:, :3] == 7).all() and (room[:, 6:] == 7).all() and torch.isfinite(room[0, [3, 5]]).all()


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": VOCAB + 1}, "vocab_size must be in"),
        ({"divergence": "nonsense"}, "does not know the divergence nonsense"),
        ({"labels": torch.arange(5)}, "labels must be contiguous int64"),
        ({"labels": torch.arange(6, dtype=torch.int32)}, "labels must be contiguous int64"),
        ({"dstudent": torch.empty(2, 3, VOCAB - 1)}, "dstudent must have the student's shape and dtype"),
        ({"dstudent": torch.empty(2, 3, VOCAB).double()}, "dstudent must have the student's shape and dtype"),
        ({"teachers": []}, "1 to 4 teachers, got 0"),
        ({"teachers": [torch.empty(2, 3, VOCAB)] * 2}, "a mixture needs mixture_weights"),
        ({"teachers": [torch.empty(2, 2, VOCAB)]}, "teacher must have the student's rows"),
        ({"teachers": [torch.empty(2, 3, 2 * VOCAB)[..., ::2]]}, "unit stride in the last dimension"),
        ({"student": torch.empty(VOCAB)}, r"student must be \[B, L, V\]"),
        ({"ce_weight": 1.0}, "ce_weight needs labels"),
        ({"row_weight": torch.ones(6).double()}, "row_weight must hold one value per row in the dtype of the sums"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_op_itself_refuses_what_would_break_memory(change, message):
    """Below kd_loss, where nothing has been checked yet."""
    tensors, options = arguments(6)
    labels, row_weight, *rest = tensors
    call = {"student": torch.empty(2, 3, VOCAB), "teachers": [torch.empty(2, 3, VOCAB)], "dstudent": None}
    call |= {"labels": labels, "row_weight": row_weight}
    call |= {key: value for key, value in change.items() if key in call}
    options |= {key: value for key, value in change.items() if key in options}
    with pytest.raises(RuntimeError, match=message):
        ops.op("dense_fwd", "cpu")(*call.values(), *rest, **options)


def test_fakes_know_shapes_and_dtypes():
    """Without the library: meta tensors stand for those of any device."""
    student = torch.empty(2, 3, VOCAB, device="meta", dtype=torch.bfloat16)
    tensors, options = arguments(6)
    tensors = tuple(None if x is None else x.to("meta") for x in tensors)
    for backend in (name for name in ops.PATTERN_BACKENDS if name not in ops.LACKING["dense_fwd"]):
        for stats, width in ((False, 0), (True, len(kd.KDStats._fields))):
            loss, table = ops.op("dense_fwd", backend)(
                student, [student], None, *tensors, **{**options, "stats": stats}
            )
            assert loss.shape == (6,) and table.shape == (6, width) and loss.dtype == table.dtype == torch.float32
    assert ops.STATS == kd.KDStats._fields
