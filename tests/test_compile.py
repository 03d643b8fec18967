"""torch.compile with fullgraph=True, and the custom ops as torch.library wants them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

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
        "uld": lambda s, t: kd.uld_loss(s, t[:, 1:], labels, temperature=2.0),
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


def student_and_teacher(count=ROWS):
    """Leaves of every kind that a loss takes, with labels and a sparse teacher."""
    logprobs, ids = torch.log_softmax(torch.randn(count, VOCAB) * 2, -1).topk(4, -1)
    labels = torch.arange(count) % VOCAB
    labels[1] = -100
    return {
        "student": torch.randn(count, VOCAB).requires_grad_(),
        "teacher": torch.randn(count, VOCAB) * 2,
        "labels": labels,
        "ids": ids,
        "logprobs": logprobs,
        "hidden": torch.randn(count, WIDTH).requires_grad_(),
        "head": torch.randn(VOCAB, WIDTH).requires_grad_(),
        "hidden2": torch.randn(count, WIDTH),
        "head2": torch.randn(VOCAB, WIDTH),
    }


def numbers_of(k, *left_out):
    """The numbers of an objective that schedules change; no two k share one."""
    numbers = {
        "temperature": 1.5 + k,
        "teacher_temperature": 1.25 + k / 2,
        "kd_weight": 0.1 + k / 20,
        "ce_weight": 0.2 + k / 20,
        "z_loss_weight": 0.01 + k / 500,
        "label_smoothing": 0.05 + k / 50,
        "row_weight": 0.5 + k,
        "student_softcap": 20.5 + k,
        "normalizer": 7.5 + k,
        "parameter": 0.15 + k / 20,
    }
    return {name: value for name, value in numbers.items() if name not in left_out}


def of(divergence, numbers):
    """The arguments of a call, of which ``parameter`` is the divergence's."""
    others = {name: value for name, value in numbers.items() if name != "parameter"}
    return {**others, "divergence": divergence(numbers["parameter"])}


# A loss of inputs and numbers, and the numbers of step k. They are made outside the graph: before 2.13 torch pins a
# symbol that Python calculates with.
NUMBERS = {
    "kd": (lambda x, n: kd.kd_loss(x["student"], x["teacher"], x["labels"], **of(kd.JSD, n)), numbers_of),
    "kd-torch": (
        lambda x, n: kd.kd_loss(x["student"], x["teacher"], x["labels"], backend="torch", **of(kd.SkewReverseKL, n)),
        numbers_of,
    ),
    "topk": (
        lambda x, n: kd.topk_kd_loss(
            x["student"], x["ids"], x["logprobs"], x["labels"], teacher_temperature=1.0, **of(kd.SkewKL, n)
        ),
        lambda k: numbers_of(k, "teacher_temperature"),
    ),
    "topk-tail": (
        lambda x, n: kd.topk_kd_loss(x["student"], x["ids"], x["logprobs"], tail="renormalize", **of(kd.JSD, n)),
        lambda k: {"temperature": 1.5 + k, "parameter": 0.15 + k / 20},
    ),
    "dkd": (
        lambda x, n: kd.dkd_loss(x["student"], x["teacher"], x["labels"], **n),
        lambda k: {"alpha": 0.5 + k, "beta": 8.5 - k / 4, "temperature": 1.5 + k, "normalizer": 7.5 + k},
    ),
    "mse": (
        lambda x, n: kd.logit_mse_loss(x["student"], x["teacher"], **n),
        lambda k: {"row_weight": 0.5 + k, "normalizer": 7.5 + k},
    ),
    "taid": (
        lambda x, n: kd.taid_loss(x["student"], x["teacher"], **n),
        lambda k: {"interpolation": 0.05 + k / 20, "temperature": 1.5 + k, "normalizer": 7.5 + k},
    ),
    "mixture": (
        lambda x, n: kd.kd_loss(x["student"], [x["teacher"], x["teacher"] + 1], teacher_weights=[n["first"], 1.0]),
        lambda k: {"first": 0.5 + k},
    ),
    "linear": (
        lambda x, n: kd.linear_kd_loss(x["hidden"], x["head"], x["hidden2"], x["head2"], x["labels"], **of(kd.JSD, n)),
        numbers_of,
    ),
    "linear-topk": (
        lambda x, n: kd.linear_topk_kd_loss(
            x["hidden"], x["head"], x["ids"], x["logprobs"], x["labels"], **of(kd.JSD, n)
        ),
        lambda k: numbers_of(k, "temperature", "teacher_temperature"),
    ),
}


def loss_and_gradients(function, x, *numbers):
    for item in x.values():
        item.grad = None
    loss = function(x, *numbers)
    loss.sum().backward()
    return [loss.detach(), *(item.grad for item in x.values() if item.grad is not None)]


def hold_compiled(function, calls, dynamic, frames=2):
    """Every call in a graph gives what it gives outside, and all of them need no more than so many graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for x, *numbers in calls:
        expected = loss_and_gradients(function, x, *numbers)
        found = loss_and_gradients(compiled, x, *numbers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert 1 <= counter.frame_count <= frames


DYNAMIC = {"automatic": None, "dynamic": True}


def automatic_and_dynamic(names, dynamic):
    """All of them with symbols from the second value on, and some with symbols at once."""
    pairs = [(name, None) for name in names] + [(name, True) for name in dynamic]
    ids = [f"{name}-{'dynamic' if always else 'automatic'}" for name, always in pairs]
    return pytest.mark.parametrize(("name", "dynamic"), pairs, ids=ids)


# Plain PyTorch calculates with them.
if torch.__version__ < (2, 13):
    del NUMBERS["kd-torch"]


@automatic_and_dynamic(NUMBERS, ("kd", "topk", "dkd", "taid", "linear"))
def test_one_graph_serves_all_values_of_the_numbers(name, dynamic):
    """The first call may have its own; a number that is not the first of its kind is a symbol."""
    x = student_and_teacher()
    loss, numbers = NUMBERS[name]
    hold_compiled(loss, [(x, numbers(k)) for k in range(12)], dynamic)


IN_SHARES = {
    "alpha-beta": lambda x, a: kd.kd_loss(x["student"], x["teacher"], divergence=kd.AlphaBeta(a, 1 - a)),
    "weights": lambda x, a: kd.kd_loss(x["student"], x["teacher"], x["labels"], kd_weight=a, ce_weight=1 - a),
    "topk-weights": lambda x, a: kd.topk_kd_loss(
        x["student"], x["ids"], x["logprobs"], x["labels"], kd_weight=a, ce_weight=1 - a
    ),
}


# Plain PyTorch has a graph for each side of an "if".
@needs_library
@automatic_and_dynamic(IN_SHARES, ("alpha-beta", "weights"))
def test_one_graph_serves_all_shares_0_and_1_among_them(name, dynamic):
    hold_compiled(IN_SHARES[name], [(student_and_teacher(), a) for a in (0.3, 0.7, 0.0, 1.0, 0.2, 0.0, 1.0)], dynamic)


def test_alpha_beta_of_symbols_in_plain_pytorch():
    """Its nodes are sorted, whatever their order is."""
    loss = torch.compile(
        lambda s, t, a: kd.kd_loss(s, t, divergence=kd.AlphaBeta(a, 1.2 - a), backend="torch"),
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    x = student_and_teacher()
    for a in (0.3, 0.7, -0.4, 1.7):
        expected = kd.kd_loss(x["student"], x["teacher"], divergence=kd.AlphaBeta(a, 1.2 - a), backend="torch")
        torch.testing.assert_close(loss(x["student"], x["teacher"], a), expected)


@pytest.mark.parametrize("dynamic", DYNAMIC.values(), ids=DYNAMIC)
def test_one_graph_serves_all_numbers_of_items_in_a_batch(dynamic):
    """``num_items_in_batch`` of trainers, an int."""
    x = student_and_teacher()

    def loss(x, items):
        return kd.kd_loss(x["student"], x["teacher"], x["labels"], reduction="sum", normalizer=items)

    hold_compiled(loss, [(x, 1000 + 37 * k) for k in range(12)], dynamic)


ROW_COUNTS = {
    "kd": lambda x: kd.kd_loss(x["student"], x["teacher"]),
    "kd-labels": lambda x: kd.kd_loss(x["student"], x["teacher"], x["labels"]),
    "kd-batchmean": lambda x: kd.kd_loss(x["student"], x["teacher"], reduction="batchmean"),
    "kd-torch": lambda x: kd.kd_loss(x["student"], x["teacher"], backend="torch"),
    "kd-none": lambda x: kd.kd_loss(x["student"], x["teacher"], temperature=2.0, reduction="none"),
    "topk": lambda x: kd.topk_kd_loss(x["student"], x["ids"], x["logprobs"]),
    "dkd": lambda x: kd.dkd_loss(x["student"], x["teacher"], x["labels"]),
    "mse": lambda x: kd.logit_mse_loss(x["student"], x["teacher"], row_weight=2.0),
    "uld": lambda x: kd.uld_loss(x["student"], x["teacher"]),
    "taid": lambda x: kd.taid_loss(x["student"], x["teacher"], interpolation=0.3),
    "linear": lambda x: kd.linear_kd_loss(x["hidden"], x["head"], x["hidden2"], x["head2"]),
    "linear-topk": lambda x: kd.linear_topk_kd_loss(x["hidden"], x["head"], x["ids"], x["logprobs"], x["labels"]),
}


@automatic_and_dynamic(ROW_COUNTS, ("kd", "kd-labels", "topk", "linear"))
def test_one_graph_serves_all_numbers_of_rows(name, dynamic):
    hold_compiled(ROW_COUNTS[name], [(student_and_teacher(count),) for count in range(ROWS, ROWS + 12)], dynamic)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_a_mask_picks_in_the_graph(backend):
    """How many they are nobody knows before the graph runs."""

    def loss(x, mask):
        rows = mask.nonzero().squeeze(1)
        return kd.kd_loss(x["student"][rows], x["teacher"][rows], x["labels"][rows], ce_weight=0.5, backend=backend)

    masks = [torch.arange(ROWS) % k != 0 for k in (2, 3, 4)]
    hold_compiled(loss, [(student_and_teacher(), mask) for mask in masks], None, frames=1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"kd_weight": -1.0}, "kd_weight must be >= 0"),
        ({"ce_weight": float("nan")}, "ce_weight must be finite"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ({"normalizer": 0}, "normalizer must be > 0"),
        ({"row_weight": float("inf")}, "row_weight must be finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("known", [False, True], ids=["first", "symbol"])
def test_a_bad_number_is_refused_in_a_graph_too(bad, message, known):
    x = student_and_teacher()
    (name,) = bad
    good = 2 if isinstance(bad[name], int) else 0.25
    call = torch.compile(
        lambda x, value: kd.kd_loss(x["student"], x["teacher"], x["labels"], **{name: value}),
        backend="aot_eager",
        fullgraph=True,
    )
    if known:
        for step in range(3):
            call(x, good + step * good)
    with pytest.raises(Exception, match=message):
        call(x, bad[name])


VARIANTS = {
    "fp16": lambda x: kd.kd_loss(x["student"].half(), x["teacher"].half(), temperature=2.0) * 1024,
    "fp16-rows": lambda x: kd.kd_loss(x["student"].half(), x["teacher"], x["labels"], reduction="none"),
    "bf16": lambda x: kd.topk_kd_loss(x["student"].bfloat16(), x["ids"], x["logprobs"].bfloat16()),
    "autocast": lambda x: autocast(torch.bfloat16, lambda: linear(x)),
    "autocast-fp16": lambda x: autocast(torch.float16, lambda: linear(x)) * 1024,
    "KDLoss": lambda x: MODULES["kd"](x["student"], x["teacher"], x["labels"]),
    "TopKKDLoss": lambda x: MODULES["topk"](x["student"], x["ids"], x["logprobs"], x["labels"]),
    "LinearKDLoss": lambda x: MODULES["linear"](x["hidden"], x["head"], x["hidden2"], x["head2"], x["labels"]),
    "LinearTopKKDLoss": lambda x: MODULES["linear-topk"](x["hidden"], x["head"], x["ids"], x["logprobs"]),
    "capture": lambda x: kd.topk_kd_loss(x["student"], *kd.capture_topk(x["teacher"], 4)[:2]),
}
MODULES = {
    "kd": kd.KDLoss(divergence="jsd", temperature=2.0, ce_weight=0.5, reduction="none"),
    "topk": kd.TopKKDLoss(tail="uniform", reduction="sum"),
    "linear": kd.LinearKDLoss(temperature=3.0, ce_weight=0.1),
    "linear-topk": kd.LinearTopKKDLoss(tail="renormalize_both"),
}


def linear(x):
    return kd.linear_kd_loss(x["hidden"], x["head"], x["hidden2"], x["head2"], x["labels"])


def autocast(dtype, call):
    with torch.autocast("cpu", dtype):
        return call()


@pytest.mark.parametrize("name", VARIANTS)
def test_other_dtypes_autocast_and_modules(name):
    """Two calls of different numbers of rows."""
    loose = {"rtol": 2e-2, "atol": 1e-3} if "16" in name or "cast" in name else {"rtol": 1e-4, "atol": 1e-6}
    compiled = torch.compile(VARIANTS[name], backend="aot_eager", fullgraph=True)
    for count in (ROWS, ROWS + 1):
        x = student_and_teacher(count)
        expected = loss_and_gradients(VARIANTS[name], x)
        torch.testing.assert_close(loss_and_gradients(compiled, x), expected, **loose)


def test_eager_calls_between_do_not_make_a_graph_again():
    """They fill the memories of accepted options and of calls, which a graph does not look into."""
    counter = CompileCounterWithBackend("eager")
    x = student_and_teacher()
    compiled = torch.compile(lambda x: kd.kd_loss(x["student"], x["teacher"]), backend=counter, fullgraph=True)
    for k in range(4):
        compiled(x)
        kd.kd_loss(x["student"], x["teacher"], temperature=1.5 + k)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", DYNAMIC.values(), ids=DYNAMIC)
def test_every_loss_compiles_with_inductor(dynamic):
    """All of them in one graph, which costs one compilation and not seven; the numbers are symbols in the second."""

    losses = {name: both for name, both in NUMBERS.items() if name != "kd-torch"}

    def loss(x, numbers):
        return sum(losses[name][0](x, numbers[name]) for name in losses)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for k, count in enumerate((ROWS, ROWS + 3, ROWS + 5)):
        x, numbers = student_and_teacher(count), {name: both[1](k) for name, both in losses.items()}
        expected = loss_and_gradients(loss, x, numbers)
        torch.testing.assert_close(loss_and_gradients(compiled, x, numbers), expected, rtol=1e-4, atol=1e-5)


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
    """The arguments of ``dense_fwd`` beyond its three tensors of logits."""
    defaults = {
        "divergence": "forward_kl", "param0": 0.0, "param1": 0.0, "mixture": "probs", "vocab_size": VOCAB,
        "ignore_index": -100, "scale": 0.5, "temperature": 2.0, "teacher_temperature": 2.0, "kd_weight": 1.0,
        "ce_weight": 0.0, "z_loss_weight": 0.0, "label_smoothing": 0.0, "scale_by_t_squared": True,
        "teacher_form": "logits", "student_form": "logits", "student_softcap": 0.0, "teacher_softcap": 0.0,
        "standardize": False, "stats": False,
    }  # fmt: skip
    return (labels, torch.rand(num_rows), *[None] * (len(ops.ROW_TENSORS["dense_fwd"]) - 2)), {**defaults, **options}


@needs_library
@pytest.mark.parametrize("label", WILD)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_the_op_reads_and_writes_nothing_outside_for_a_wild_label(label, temperature):
    """The rows lie in the middle of a tensor of NaN, whose other rows must stay as they are."""
    student, teacher = (x.reshape(1, 3, VOCAB) for x in testing.make_inputs("normal", 3, VOCAB, torch.float32))
    room = torch.full((1, 9, VOCAB), 7.0)
    tensors, options = arguments(3, torch.tensor([0, label, 2]), ce_weight=1.0, temperature=temperature)
    loss, _ = ops.op("dense_fwd", "cpu")(student, [teacher], room[:, 3:6], *tensors, **ops.packed("dense_fwd", options))
    assert loss.isnan().tolist() == [False, True, False]
    assert (room[:, :3] == 7).all() and (room[:, 6:] == 7).all() and torch.isfinite(room[0, [3, 5]]).all()
    dkd = {key: options[key] for key in ("temperature", "teacher_temperature", "vocab_size", "ignore_index", "scale")}
    dkd |= {"alpha": 1.0, "beta": 8.0, "scale_by_t_squared": True}
    loss = ops.op("dkd_fwd", "cpu")(student, teacher, room[:, 3:6], tensors[0], None, **ops.packed("dkd_fwd", dkd))
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
        ops.op("dense_fwd", "cpu")(*call.values(), *rest, **ops.packed("dense_fwd", options))


def test_fakes_know_shapes_and_dtypes():
    """Without the library: meta tensors stand for those of any device."""
    student = torch.empty(2, 3, VOCAB, device="meta", dtype=torch.bfloat16)
    tensors, options = arguments(6)
    tensors = tuple(None if x is None else x.to("meta") for x in tensors)
    for backend in (name for name in ops.PATTERN_BACKENDS if name not in ops.LACKING.get("dense_fwd", {})):
        for stats, width in ((False, 0), (True, len(kd.KDStats._fields))):
            loss, table = ops.op("dense_fwd", backend)(
                student, [student], None, *tensors, **ops.packed("dense_fwd", {**options, "stats": stats})
            )
            assert loss.shape == (6,) and table.shape == (6, width) and loss.dtype == table.dtype == torch.float32
    assert ops.STATS == kd.KDStats._fields
