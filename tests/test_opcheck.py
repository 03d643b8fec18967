"""``torch.library.opcheck`` of every op that runs on a CPU, on the arguments with which the losses call it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import kdkernels as kd
from kdkernels import backends, heads, memory, objective, ops

pytestmark = pytest.mark.usefixtures("compiled_cpu")

ROWS, VOCAB, WIDTH, K = 6, 19, 8, 3
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# New memory has no values to compare, and what tells of the processor or of kept memory has no tensor that is traced.
WITHOUT_VALUES = (
    "kept_empty",
    "kept_blocks",
    "kept_release",
    "poison_memory",
    "cpu_isa",
    "cpu_fault",
    "has_bf16_product",
)


class Recorder(TorchDispatchMode):
    """Notes which op was called with which arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == ops.NAMESPACE:
            kept = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs or {}))
            self.calls.append((func, *kept))
        return func(*args, **(kwargs or {}))


def tensors(dtype=torch.float32, shape=(ROWS,)):
    student = torch.randn(*shape, VOCAB, dtype=dtype).requires_grad_()
    teacher = torch.randn(*shape, VOCAB, dtype=dtype) * 2
    labels = torch.randint(0, VOCAB, shape)
    labels.view(-1)[0] = -100
    logprobs, ids = torch.log_softmax(teacher.float(), -1).topk(K, -1)
    return student, teacher, labels, ids, logprobs


def hidden(dtype=torch.float32):
    return (
        torch.randn(ROWS, WIDTH, dtype=dtype).requires_grad_(),
        torch.randn(VOCAB, WIDTH, dtype=dtype).requires_grad_(),
    )


def dense(**options):
    student, teacher, labels, *_ = tensors()
    return kd.kd_loss(student, teacher, labels, **options)


def pixels(**options):
    """Rows that lie next to each other, with all that has one number for each column."""
    student, teacher, labels, *_ = tensors(shape=(2, 6))
    given = {name: torch.randn(VOCAB) for name in ("student_bias", "teacher_bias")}
    maps = (x.detach().transpose(1, 2).contiguous() for x in (student, teacher))
    student, teacher = (x.requires_grad_(k == 0) for k, x in enumerate(maps))
    return kd.kd_loss(student, teacher, labels, dim=1, teacher_columns=torch.randperm(VOCAB), **given, **options)


def shard(with_gradient):
    """The phases of a sharded vocabulary, which public functions call in a process group alone."""
    backends.select("cpu", "cpu", pattern="shard_fwd")
    student, teacher = (x.detach()[None] for x in tensors()[:2])
    names = ("param0", "param1", "student_softcap", "teacher_softcap")
    options = {"divergence": "jsd", "vocab_size": VOCAB - 1, "stats": with_gradient, **dict.fromkeys(names, 0.5)}
    gradient, labels = (torch.empty_like(student), torch.arange(ROWS)) if with_gradient else (None, None)
    numbers, params = torch.rand(ROWS, len(ops.SHARD_NUMBERS)), torch.full((ROWS,), 0.3)
    return ops.call("shard_fwd", "cpu", (student, teacher, gradient, labels, numbers, params), options)


def topk(**options):
    student, _, labels, ids, logprobs = tensors()
    return kd.topk_kd_loss(student, ids, logprobs, labels, **options)


def linear_dense(**options):
    return kd.linear_kd_loss(*hidden(), *(item.detach() for item in hidden()), tensors()[2], **options)


def linear_topk(**options):
    _, _, labels, ids, logprobs = tensors()
    return kd.linear_topk_kd_loss(*hidden(), ids, logprobs, labels, **options)


def linear_expectation(**options):
    states, head = (item.detach() for item in hidden())
    teacher = kd.capture_expectation(tensors()[1], head, student_bias=head[:, 0])
    call = {"labels": tensors()[2], "student_bias": head[:, 0], "teacher_expectation": teacher}
    return kd.linear_kd_loss(states.requires_grad_(), head, **call, **options)


def linear_tokens(of_rows=False, **options):
    found = kd.linear_token_logprobs(*hidden(), tensors()[2], **options)
    return found if of_rows else found.logprobs


def attention(**options):
    query, key = (torch.randn(2, 4, 5, 6).requires_grad_() for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    return kd.attention_kd_loss(query, key, query.detach() * 2, key.detach(), mask=mask, **options)


PER_ROW = torch.linspace(0.5, 2.0, ROWS)
TERMS = {"ce_weight": 0.5, "z_loss_weight": 0.1, "label_smoothing": 0.1, "divergence": kd.JSD(0.3)}
LOSSES = {
    "dense": lambda: dense(**TERMS),
    "dense-rows": lambda: dense(reduction="none", temperature=PER_ROW, row_weight=PER_ROW, return_stats=True)[0],
    "dense-fp64": lambda: kd.kd_loss(*tensors(torch.float64)[:2], reduction="none", temperature=2.0),
    "dense-bf16": lambda: kd.kd_loss(*tensors(torch.bfloat16, (2, 3))[:2], row_weight=PER_ROW.view(2, 3)),
    "columns": lambda: dense(student_bias=torch.randn(VOCAB), teacher_columns=torch.arange(VOCAB)),
    "log-probs": lambda: kd.kd_loss(*tensors()[:2], student_form="log_probs"),
    "pixels": lambda: pixels(**TERMS),
    "mixture": lambda: kd.kd_loss(tensors()[0], [tensors()[1], tensors()[1]]),
    "shard": lambda: shard(False),
    "shard-gradient": lambda: shard(True),
    "topk": lambda: topk(**TERMS),
    "topk-rows": lambda: topk(reduction="none", tail="uniform", row_weight=PER_ROW, return_stats=True)[0],
    "dkd": lambda: kd.dkd_loss(*tensors()[:3]),
    "mse": lambda: kd.logit_mse_loss(*tensors()[:3], centered=True),
    "uld": lambda: kd.uld_loss(*tensors()[:2], temperature=PER_ROW),
    "topp": lambda: kd.capture_topp(tensors()[1], 0.7, temperature=2.0).logprobs,
    "taid": lambda: kd.taid_loss(*tensors()[:3], interpolation=0.3),
    "linear": lambda: linear_dense(**TERMS),
    "linear-stats": lambda: linear_dense(return_stats=True)[0],
    "linear-rows": lambda: linear_dense(reduction="none", temperature=PER_ROW, row_weight=PER_ROW),
    "linear-topk": lambda: linear_topk(**TERMS),
    "linear-topk-rows": lambda: linear_topk(reduction="none", return_stats=True)[0],
    "linear-expectation": lambda: linear_expectation(ce_weight=0.5),
    "linear-expectation-rows": lambda: linear_expectation(reduction="none", divergence="soft_ce"),
    "linear-columns": lambda: linear_topk(tail="renormalize_both"),
    "attention": lambda: attention(causal=True, divergence=kd.JSD(0.3)),
    "attention-mse": lambda: attention(kind="mse", chunk_bytes=300),
    "capture": lambda: kd.capture_topk(tensors()[1], K, temperature=2.0).logprobs,
    "capture-rows": lambda: kd.capture_topk(tensors()[1], K, temperature=PER_ROW).logprobs,
    "tokens": lambda: kd.token_logprobs(tensors()[0], tensors()[2], temperature=2.0, softcap=5.0).logprobs,
    "tokens-several": lambda: sum(
        item.sum() for item in kd.token_logprobs(tensors()[0], tensors()[3], temperature=PER_ROW, entropy=True)[:2]
    ),
    "tokens-bf16": lambda: kd.token_logprobs(tensors(torch.bfloat16, (2, 3))[0], tensors(shape=(2, 3))[2]).logprobs,
    "gather": lambda: kd.gather_logprobs(tensors()[1], tensors()[3]).tail_logprob,
    "linear-tokens": lambda: linear_tokens(temperature=2.0),
    "linear-tokens-entropy": lambda: sum(
        item.sum() for item in linear_tokens(of_rows=True, temperature=PER_ROW, entropy=True)[:2]
    ),
}


def calls_of(loss):
    """The calls of ops in a loss and its backward, called twice: the second may take a shorter way."""
    objective._known.cache_clear()
    with Recorder() as recorder:
        for _ in range(2):
            result = loss()
            if result.requires_grad:
                (result * torch.linspace(2, 3, result.numel()).view_as(result)).sum().backward()
    return recorder.calls


def with_numbers(func, args, kwargs):
    """The same call with its numbers in a tensor; None for an op that takes none."""
    pattern, _, backend = func._schema.name.removeprefix(f"{ops.NAMESPACE}::").rpartition("_")
    if pattern.startswith("linear_"):
        pattern, backend = f"{pattern}_{backend}", kwargs["backend"]
    if pattern.removeprefix("linear_") not in ops.NUMBERS:
        return None
    kwargs = dict(kwargs)
    numbers = torch.tensor(kwargs.pop("numbers"), dtype=torch.float64)
    op = getattr(torch.ops.kdkernels, f"{pattern}_numbers").default
    return op, (*args, numbers), {**kwargs, "backend": backend}


def check(func, args, kwargs):
    # An op may write to new memory, which holds anything.
    mutable = [argument.alias_info is not None for argument in func._schema.arguments]
    for argument, value in zip(mutable, args, strict=False):
        if argument and value is not None and func._schema.name != "kdkernels::scale_grad_cpu":
            value.zero_()
    torch.library.opcheck(func, args, kwargs, test_utils=CHECKS)


@pytest.mark.parametrize("name", LOSSES)
def test_ops_of_a_loss(name):
    seen = set()
    for func, args, kwargs in calls_of(LOSSES[name]):
        # The loop of a linear loss is called in forward and, for rows, in backward.
        kind = f"{func._schema.name} {kwargs.get('needs', '')}"
        if kind in seen or kind.partition(" ")[0].split("::")[1] in WITHOUT_VALUES:
            continue
        seen.add(kind)
        check(func, args, kwargs)
        again = with_numbers(func, args, kwargs)
        if again is not None:
            numbers_op, numbers_args, numbers_kwargs = again
            check(numbers_op, numbers_args, numbers_kwargs)
            given, results = (tree_map_only(torch.Tensor, torch.clone, args), func(*args, **kwargs))
            found = numbers_op(*given, numbers_args[-1], **numbers_kwargs)
            torch.testing.assert_close(found, results, rtol=0, atol=0)
    assert seen


def test_ops_of_values_and_memory():
    _, _, labels, ids, logprobs = tensors()
    check(torch.ops.kdkernels.labels_are_sound.default, (labels, VOCAB, -100), {})
    check(torch.ops.kdkernels.sparse_teacher_is_sound.default, (ids.int(), logprobs, VOCAB, 1e-3), {})
    shape = (3, memory.MIN_BYTES)
    for name, args in (
        ("kept_empty", (shape, torch.float32, "gradient")),
        ("kept_blocks", ("gradient",)),
        ("kept_release", ()),
        ("poison_memory", (False,)),
    ):
        op = getattr(torch.ops.kdkernels, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration"))
    with FakeTensorMode():
        found = torch.ops.kdkernels.kept_empty(shape, torch.float32, "gradient")
    assert isinstance(found, FakeTensor) and found.shape == shape and found.dtype == torch.float32
    if heads.has_bf16_product():
        a, b = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(8, 3, dtype=torch.bfloat16)
        check(torch.ops.kdkernels.bf16_product.default, (a, b, torch.zeros(4, 3), False), {})


def test_every_op_is_checked():
    """By the tests above, or it has no tensor; those of GPUs are checked where one is."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdkernels::")}
    names = {name for name in names if not name.endswith(("_cuda", "_triton"))}
    names -= {f"{pattern}_numbers" for pattern, lacking in ops.LACKING.items() if "cpu" in lacking}
    checked = {"labels_are_sound", "sparse_teacher_is_sound", "bf16_product", *WITHOUT_VALUES}
    for loss in LOSSES.values():
        for func, args, kwargs in calls_of(loss):
            again = with_numbers(func, args, kwargs)
            checked |= {op._schema.name.split("::")[1] for op in (func, *(again or ())[:1])}
    assert names == checked & names, names - checked
