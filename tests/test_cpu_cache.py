"""The memory that is kept between steps on the CPU: who uses it, and that two tensors never share it."""

import gc
import os
import subprocess
import sys

import pytest
import torch

import kdkernels as kd
from kdkernels import memory, testing
from kdkernels.backends import cpu

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only"),
    pytest.mark.skipif(cpu.load_error() is not None, reason=f"the compiled CPU backend keeps it: {cpu.load_error()}"),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch before 2.11 cannot make such tensors"
    ),
]

ROWS, COLUMNS = 130, 65536  # 34 MB in fp32
HUGE_PAGE = 2 * 2**20
SMALL_BLOCKS = 4  # that are kept of less than 32 MiB
USES = ("gradient", "logits", "student logits", "teacher logits 0")


@pytest.fixture(autouse=True)
def fresh_cache():
    memory.empty_cache()
    yield
    memory.empty_cache()


def like(rows=ROWS, dtype=torch.float32):
    return torch.empty(rows, COLUMNS, dtype=dtype)


def kept():
    """How many blocks are kept for each use."""
    return {use: len(memory.kept_blocks(use)) for use in USES if memory.kept_blocks(use)}


def test_the_next_tensor_gets_the_pages_of_the_last():
    first = memory.empty_like(like())
    assert first.shape == (ROWS, COLUMNS) and first.is_contiguous() and first.dtype == torch.float32
    address = first.data_ptr()
    first.fill_(1.0)
    view = first[3:5]
    del first
    assert not kept(), "a view still holds the memory"
    assert (view == 1.0).all()
    del view
    assert kept() == {"gradient": 1}
    second = memory.empty_like(like(dtype=torch.bfloat16).new_empty(2 * ROWS, COLUMNS))
    assert second.data_ptr() == address and second.dtype == torch.bfloat16 and not kept()


def test_the_storage_of_a_kept_gradient_has_a_fixed_size():
    """As kdkernels.memory says; it may be shrunk, and is what it was when its storage refuses."""
    student = torch.randn(ROWS, COLUMNS, requires_grad=True)
    kd.kd_loss(student, torch.zeros(ROWS, COLUMNS), backend="cpu").backward()
    before = student.grad.clone()
    with pytest.raises(RuntimeError, match="not resizable"):
        student.grad.untyped_storage().resize_(0)
    assert torch.equal(student.grad, before)
    assert student.grad.resize_(ROWS // 2, COLUMNS).shape == (ROWS // 2, COLUMNS)
    del before
    student.grad = None
    assert kept() == {"gradient": 1}


def test_tensors_that_are_alive_do_not_share():
    tensors = [memory.empty_like(like()) for _ in range(3)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [tensor.unique().item() for tensor in tensors] == [0.0, 1.0, 2.0]
    del tensors, tensor
    assert kept() == {"gradient": 1}, "one block is kept"
    memory.empty_cache()
    assert not kept()


def test_a_block_of_another_size_is_given_back():
    address = memory.empty_like(like()).data_ptr()
    slightly_less = memory.empty_like(like(ROWS - 1))
    assert slightly_less.data_ptr() == address
    del slightly_less
    # More than there is, and less than half of it.
    for rows in (ROWS + 1, 3 * ROWS, ROWS):
        tensor = memory.empty_like(like(rows))
        tensor.fill_(2.0)
        assert (tensor == 2.0).all() and not kept()
        del tensor


def test_several_small_blocks_are_kept():
    """Two losses of a step have their gradients at once: both get their pages again, each its own."""
    rows = (60, 40)  # 16 and 10 MB
    first = [memory.empty_like(like(n)) for n in rows]
    addresses = [tensor.data_ptr() for tensor in first]
    first.clear()
    assert kept() == {"gradient": 2}
    second = [memory.empty_like(like(n)) for n in rows]
    assert [tensor.data_ptr() for tensor in second] == addresses and not kept()
    more = [memory.empty_like(like(rows[0])).fill_(value) for value in range(SMALL_BLOCKS)]
    assert [tensor.unique().item() for tensor in more] == list(range(SMALL_BLOCKS))
    second.clear()
    more.clear()
    assert kept() == {"gradient": SMALL_BLOCKS}
    tensor = memory.empty_like(like(2 * rows[0] - 2))
    assert not kept(), "blocks of which none is of use are given back"
    del tensor


def test_a_block_begins_with_a_huge_page():
    """Two tensors of one block, one after the other, and of another, begin where the system can put huge pages."""
    for rows in (40, 60, ROWS):
        first, second = memory.empty_like(like(rows)), memory.empty_like(like(rows))
        assert first.data_ptr() % HUGE_PAGE == second.data_ptr() % HUGE_PAGE == 0
        first.fill_(1.0), second.fill_(2.0)
        assert (first == 1.0).all() and (second == 2.0).all()


def test_a_block_is_kept_for_each_use():
    shape = (ROWS, COLUMNS)
    addresses = {}
    for use in ("logits", "gradient", "logits", "gradient"):
        tensor = memory.empty(like(), shape, torch.float32, use)
        assert addresses.setdefault(use, tensor.data_ptr()) == tensor.data_ptr()
        del tensor
    assert kept() == {"logits": 1, "gradient": 1}


def test_losses_on_hidden_states_reuse_their_chunks_and_the_gradient_of_the_head():
    hidden, teacher = torch.randn(ROWS, 130), torch.randn(ROWS, 8)
    head, teacher_head = torch.randn(COLUMNS, 130, requires_grad=True), torch.randn(COLUMNS, 8)
    grads = []
    for _ in range(2):
        head.grad = None
        kd.linear_kd_loss(hidden, head, teacher, teacher_head).backward()
        grads.append((head.grad.data_ptr(), head.grad.clone()))
        # The gradient of the head is in use; plain PyTorch scales a copy of it.
        assert set(kept()) - {"gradient"} == {"student logits", "teacher logits 0"}
    if kd.backends.select("auto", "cpu") == "cpu":
        assert "gradient" not in kept()
        assert grads[0][0] == grads[1][0]
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("reason", ["small", "compiled", "poisoned", pytest.param("fake", id="fake tensors")])
def test_what_is_left_to_torch(reason, monkeypatch):
    logits = like(2 if reason == "small" else ROWS)
    if reason == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if reason == "poisoned":
        with testing.poisoned_memory():
            assert memory.empty_like(logits).isnan().all()
    elif reason == "fake":
        with torch._subclasses.FakeTensorMode() as mode:
            assert isinstance(memory.empty_like(mode.from_tensor(logits)), torch._subclasses.FakeTensor)
    else:
        assert memory.empty_like(logits).shape == logits.shape
    assert not kept()


@pytest.mark.parametrize("shape", [[-1, 4], [2**40, 2**40], [2**61, 2], [1] * 9], ids=str)
def test_the_op_itself_refuses_shapes_that_are_none(shape):
    with pytest.raises(RuntimeError, match="the shape of a tensor|too many bytes|at most 8 dimensions"):
        torch.ops.kdkernels.kept_empty(shape, torch.float64, "gradient")


def test_nothing_is_kept_where_the_environment_says_so():
    script = """
import torch
from kdkernels import memory
for _ in range(2):
    memory.empty_like(torch.empty(130, 65536)).fill_(1.0)
assert not memory.kept_blocks()
"""
    environment = {**os.environ, "KDKERNELS_CPU_CACHE": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)


def test_gradients_of_training_steps_are_right_and_their_own():
    """Two steps that hold their gradients, and one after they are freed, against plain PyTorch."""
    teacher = torch.randn(ROWS, COLUMNS)
    students = [torch.randn(ROWS, COLUMNS).requires_grad_() for _ in range(3)]
    for student in students[:2]:
        kd.kd_loss(student, teacher).backward()
    held = [student.grad.clone() for student in students[:2]]
    assert students[0].grad.data_ptr() != students[1].grad.data_ptr()
    address = students[0].grad.data_ptr()
    students[0].grad = None
    kd.kd_loss(students[2], teacher).backward()
    if kd.backends.select("auto", "cpu") == "cpu":
        assert students[2].grad.data_ptr() == address
    torch.testing.assert_close(students[1].grad, held[1], rtol=0, atol=0)
    for student, grad in ((students[0], held[0]), (students[2], students[2].grad)):
        exact = student.detach().clone().requires_grad_()
        kd.kd_loss(exact, teacher, backend="torch").backward()
        torch.testing.assert_close(grad, exact.grad, rtol=1e-4, atol=1e-10)


def test_a_forked_process_has_pages_of_its_own():
    tensor = memory.empty_like(like()).fill_(1.0)
    if (child := os.fork()) == 0:
        tensor[0, 0] = 2.0  # one element: the threads of a parallel loop are not there after a fork
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tensor == 1.0).all()


def test_gradients_that_outlive_the_interpreter_do_no_harm():
    script = """
import threading, torch, kdkernels as kd
student = torch.randn(130, 65536).requires_grad_()
def step():
    student.grad = None
    kd.kd_loss(student, torch.randn(130, 65536)).backward()
threads = [threading.Thread(target=step) for _ in range(3)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
torch.kept_until_the_end = student.grad
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_kept_memory_is_the_systems_to_take():
    """Kept memory counts as LazyFree: the kernel drops it when memory gets scarce."""

    def lazy_free():
        with open("/proc/self/smaps_rollup") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree"))

    before = lazy_free()
    memory.empty_like(like()).fill_(1.0)
    gc.collect()
    assert lazy_free() - before >= 0.9 * ROWS * COLUMNS * 4
    memory.empty_cache()
    assert lazy_free() - before <= 0.1 * ROWS * COLUMNS * 4
