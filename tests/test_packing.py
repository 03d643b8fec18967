"""Teachers in one buffer: what comes back, of how many bytes, and a student that is taught from another process.

Run as a script this file is the two processes.
"""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import kdkernels as kd
from kdkernels import packing

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
EDGES = [1, 2**16 - 1, 2**16, 2**17 - 1, 2**17, 2**18, 2**20, packing.MAX_VOCAB_SIZE]


def teacher(rows=(2, 3), k=5, vocab_size=70_000, dtype=torch.float32, seed=0):
    """Ids from one end to the other, slots without an entry, and a row that is sure."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn((*rows, k + 1), generator=generator)
    logits.view(-1, k + 1)[0] = torch.tensor([30.0] + [0.0] * k)
    logprobs = torch.log_softmax(logits, -1)
    ids = torch.randint(vocab_size, (*rows, k), generator=generator, dtype=torch.int32)
    ids[..., 0], ids[..., 1], ids[..., 2] = 0, vocab_size - 1, -1
    return kd.TeacherTopK(ids, logprobs[..., :k].masked_fill(ids < 0, -torch.inf).to(dtype), logprobs[..., k])


def same(found, wanted):
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in zip(found, wanted, strict=True))
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


# The buffer


@pytest.mark.parametrize("vocab_size", EDGES)
def test_ids_of_every_width_come_back(vocab_size):
    for rows, k in [((3,), 4), ((2, 3), 5), ((), 9), ((0,), 3)]:
        wanted = teacher(rows, k, vocab_size) if 0 not in rows else teacher((1,), k, vocab_size)
        wanted = kd.TeacherTopK(*(value[: rows[0]] if 0 in rows else value for value in wanted))
        found = kd.TeacherTopK.unpack(wanted.pack(vocab_size))
        assert found.ids.dtype == torch.int32 and torch.equal(found.ids, wanted.ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_in_16_bits_come_back_as_they_are(dtype):
    wanted = teacher(dtype=dtype)
    # The smallest and largest of the dtype, which the other one does not have.
    wanted.logprobs.view(-1, 5)[1:4, 0] = torch.tensor([-torch.finfo(dtype).tiny, torch.finfo(dtype).min, -0.0])
    assert same(kd.TeacherTopK.unpack(wanted.pack(70_000)), wanted)


def test_float32_log_probabilities_come_back_exactly_where_that_is_asked_for():
    wanted = teacher()
    assert same(kd.TeacherTopK.unpack(wanted.pack(70_000, exact=True)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_float32_log_probabilities(dtype):
    wanted = teacher((64, 8), 33, dtype=dtype)
    found = kd.TeacherTopK.unpack(wanted.pack(70_000))
    assert found.logprobs.dtype == torch.float32 and torch.equal(found.tail_logprob, wanted.tail_logprob)
    # Half a unit of fp16's last place, and the shift, which is no larger; the sum of a row is what it was.
    assert torch.equal(found.logprobs == -torch.inf, wanted.logprobs == -torch.inf)
    used = wanted.logprobs > -torch.inf
    off = (found.logprobs - wanted.logprobs)[used].abs()
    assert bool((off <= 2**-11 * (wanted.logprobs[used].abs() + 30)).all())
    torch.testing.assert_close(
        found.logprobs.logsumexp(-1), wanted.logprobs.logsumexp(-1).to(torch.float32), rtol=0, atol=1e-6
    )


def test_a_cache_and_a_buffer_round_alike(tmp_path):
    pytest.importorskip("safetensors", reason="the cache writes safetensors")
    from kdkernels import cache as kd_cache

    wanted = teacher((7,))
    with kd_cache.TeacherCacheWriter(tmp_path, tokenizer="t", vocab_size=70_000, k=5) as writer:
        writer.append(*wanted)
    cached = kd_cache.TeacherCache(tmp_path, tokenizer="t", vocab_size=70_000)[0]
    assert same(kd.TeacherTopK.unpack(wanted.pack(70_000)), cached[:3])


def test_further_tensors_travel_along():
    extras = {
        "labels": torch.arange(6).view(2, 3) - 100,
        "mask": torch.tensor([[True, False, True], [False, True, True]]),
        "weight": torch.linspace(0, 1, 6, dtype=torch.bfloat16).view(2, 3),
    }
    wanted = teacher()
    buffer = wanted.pack(70_000, exact=True, **extras)
    layout = kd.TopKLayout((2, 3), 5, 70_000, exact=True, extras={name: value.dtype for name, value in extras.items()})
    assert kd.TopKLayout.of(buffer) == layout and len(buffer) == layout.nbytes
    found = layout.unpack(buffer)
    assert same(found[:3], wanted)
    assert found.extras.keys() == extras.keys()
    assert all(torch.equal(found.extras[name], value) for name, value in extras.items())


def test_nothing_shares_memory_with_the_buffer():
    for dtype in (torch.float32, torch.bfloat16):
        for exact in (False, True):
            wanted = teacher(dtype=dtype)
            buffer = wanted.pack(70_000, exact=exact)
            found = kd.TeacherTopK.unpack(buffer)
            before = [value.clone() for value in found]
            buffer.fill_(255)
            assert same(found, before)


def test_a_buffer_may_be_a_part_of_another():
    wanted = teacher(dtype=torch.bfloat16)
    buffer = wanted.pack(70_000)
    for first, step in ((3, 1), (8, 1), (0, 2)):
        larger = torch.zeros(2 * len(buffer) + 16, dtype=torch.uint8)
        part = larger[first : first + step * len(buffer) : step]
        part.copy_(buffer)
        assert same(kd.TeacherTopK.unpack(part), wanted)


@pytest.mark.parametrize(
    "vocab_size, k, dtype, exact, expected",
    [
        (32_000, 64, torch.float32, False, 264),
        (128_256, 64, torch.float32, False, 272),
        (128_256, 64, torch.bfloat16, False, 268),
        (128_256, 64, torch.float32, True, 396),
        (262_144, 64, torch.float32, False, 296),
        (128_256, 64, torch.bfloat16, True, 268),
        (32_000, 64, torch.bfloat16, False, 260),
        (262_144, 64, torch.float16, False, 292),
        (32_000, 64, torch.float32, True, 388),
        (262_144, 64, torch.float32, True, 420),
        (32_000, 20, torch.float32, False, 88),
        (128_256, 20, torch.float32, False, 91),
        (262_144, 20, torch.float32, False, 98),
    ],
)
def test_bytes_a_row(vocab_size, k, dtype, exact, expected):
    layout = kd.TopKLayout((512,), k, vocab_size, dtype=dtype, exact=exact)
    assert layout.token_bytes == expected
    assert 512 * expected < layout.nbytes < 512 * expected + 256
    page = (Path(__file__).parent.parent / "docs" / "guide" / "sparse-teachers.md").read_text()
    column = 2 + [32_000, 128_256, 262_144].index(vocab_size)
    assert str(expected) in [line.split("|")[column].strip() for line in page.splitlines() if line.startswith("| K = ")]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"vocab_size": 69_999}, ValueError, r"ids must be in \[0, 69999\) or -1 for an unused slot, got 69999"),
        ({"vocab_size": 2**24}, ValueError, "vocab_size must be at most"),
        ({"exact": 1}, TypeError, "exact must be a bool"),
        ({"labels": torch.zeros(2)}, ValueError, r"labels must have shape \(2, 3\), got \(2,\)"),
        ({"labels": [1]}, TypeError, "labels must be a torch.Tensor"),
        ({"ids": torch.zeros(2, 3)}, ValueError, "must not have the name 'ids'"),
    ],
)
def test_what_cannot_be_packed_is_named(change, error, message):
    with pytest.raises(error, match=message):
        teacher().pack(**{"vocab_size": 70_000, **change})


def test_tensors_that_do_not_fit_together_are_named():
    ids, logprobs, tail = teacher()
    for given, error, message in [
        ((ids[..., :4], logprobs, tail), ValueError, r"logprobs must have shape \(2, 3, 4\), got \(2, 3, 5\)"),
        ((ids, logprobs, tail[0]), ValueError, r"tail_logprob must have shape \(2, 3\)"),
        ((ids.float(), logprobs, tail), TypeError, "ids must be"),
        ((ids, logprobs.int(), tail), ValueError, "dtype must be float32"),
        ((ids - 1, logprobs, tail), ValueError, "got -2"),
        ((ids, logprobs, None), TypeError, "tail_logprob must be a torch.Tensor"),
    ]:
        with pytest.raises(error, match=message):
            kd.TeacherTopK(*given).pack(70_000)


def test_a_buffer_of_another_layout_is_refused():
    buffer = teacher().pack(70_000)
    layout = kd.TopKLayout.of(buffer)
    for bad, message in [
        (buffer.int(), "buffer must be uint8 of one dimension, got int32"),
        (buffer[:-1], f"must have the {layout.nbytes} bytes of its layout, got {layout.nbytes - 1}"),
        (buffer[8:], "must be a packed TeacherTopK"),
        (torch.zeros(0, dtype=torch.uint8), "must be a packed TeacherTopK"),
        (torch.full((99,), 255, dtype=torch.uint8), "must be a packed TeacherTopK"),
    ]:
        with pytest.raises(ValueError, match=message):
            kd.TeacherTopK.unpack(bad)
    # Of as many bytes: a vocabulary of another size.
    with pytest.raises(ValueError, match=r"of the layout TopKLayout\(\(2, 3\), 5, 70001.*got one of .* 70000"):
        kd.TeacherTopK.unpack(buffer, kd.TopKLayout((2, 3), 5, 70_001))


def test_a_header_that_is_not_one_is_refused_and_nothing_else_happens():
    buffer = teacher().pack(70_000)
    length = int.from_bytes(bytes(buffer[:8].tolist()), "little")
    for place in range(length + 8):
        for bit in (0, 3, 6):
            damaged = buffer.clone()
            damaged[place] ^= 1 << bit
            try:
                kd.TeacherTopK.unpack(damaged)
            except ValueError:
                continue
            # Numbers of another size of as many bytes.
            assert kd.TopKLayout.of(damaged).nbytes == len(buffer)


# A teacher in another process

STEPS, ROWS, WIDTH, V, K = 4, 6, 8, 50, 5


def batch(step):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def model(seed):
    made = torch.nn.Linear(WIDTH, V)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return made


def trained(loss_of):
    """Losses and weights of a student, whose teacher for a step is somewhere."""
    student = model(1)
    losses = []
    for step in range(STEPS):
        loss = loss_of(step, student)
        # By hand: an optimizer's import takes as long as all of this.
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for value, gradient in zip(student.parameters(), gradients, strict=True):
                value -= 0.1 * gradient
        losses.append(float(loss.detach()))
    return losses, [value.detach().clone() for value in student.parameters()]


def topk_loss(student, step, teacher):
    return kd.topk_kd_loss(student(batch(step)), *teacher[:2], tail_logprob=teacher.tail_logprob)


def captured(step):
    with torch.no_grad():
        return kd.capture_topk(model(0)(batch(step)), K)


def send_while_the_student_trains(rank, exact):
    layout = kd.TopKLayout((ROWS,), K, V, exact=exact)
    if rank == 1:
        for work in [dist.isend(captured(step).pack(V, exact=exact), 0, tag=step) for step in range(STEPS)]:
            work.wait()
        return
    # The next teacher is on its way while the student learns from this one.
    buffers = [torch.empty(layout.nbytes, dtype=torch.uint8) for _ in range(2)]
    works = {0: dist.irecv(buffers[0], 1, tag=0)}

    def loss_of(step, student):
        works.pop(step).wait()
        if step + 1 < STEPS:
            works[step + 1] = dist.irecv(buffers[(step + 1) % 2], 1, tag=step + 1)
        return topk_loss(student, step, kd.TeacherTopK.unpack(buffers[step % 2], layout))

    def local(step, student):
        teacher = captured(step)
        return topk_loss(student, step, teacher if exact else kd.TeacherTopK.unpack(teacher.pack(V)))

    equal(trained(loss_of), trained(local))
    if not exact:
        # Rounding of what was sent moves a loss by little.
        losses, _ = trained(lambda step, student: topk_loss(student, step, captured(step)))
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(trained(local)[0]), rtol=2e-3, atol=2e-3)


def broadcast_of_topk(rank):
    """The same bits on every rank, of which one has the teacher."""
    layout = kd.TopKLayout((ROWS,), K, V, extras={"labels": torch.int64})

    def loss_of(step, student):
        if rank == 1:
            buffer = captured(step).pack(V, labels=torch.arange(ROWS))
        else:
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        dist.broadcast(buffer, 1)
        found = layout.unpack(buffer)
        assert found.extras["labels"].tolist() == list(range(ROWS))
        return kd.topk_kd_loss(
            student(batch(step)), found.ids, found.logprobs, found.extras["labels"], tail_logprob=found.tail_logprob
        )

    losses = trained(loss_of)[0]
    everywhere = [torch.empty(STEPS) for _ in range(2)]
    dist.all_gather(everywhere, torch.tensor(losses))
    assert torch.equal(*everywhere)


def broadcast_of_hidden_states(rank):
    """The recipe of the guide."""
    head = model(2)

    def loss_of(step, student):
        hidden = torch.tanh(batch(step)) if rank == 1 else torch.empty(ROWS, WIDTH)
        dist.broadcast(hidden, 1)
        return kd.linear_kd_loss(batch(step), student, hidden, head)

    def local(step, student):
        return kd.linear_kd_loss(batch(step), student, torch.tanh(batch(step)), head)

    equal(trained(loss_of), trained(local))


def equal(found, wanted):
    assert found[0] == wanted[0], (found[0], wanted[0])
    assert all(torch.equal(x, y) for x, y in zip(found[1], wanted[1], strict=True))


def process(rank, store):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    send_while_the_student_trains(rank, True)
    send_while_the_student_trains(rank, False)
    broadcast_of_topk(rank)
    broadcast_of_hidden_states(rank)
    # The example of the guide.
    page = (Path(__file__).parent.parent / "docs" / "guide" / "sparse-teachers.md").read_text()
    topk, hidden = page.partition("## A teacher in another process")[2].split("```python\n")[1:]
    names: dict = {}
    # There is a group here already.
    group = 'dist.init_process_group("gloo")\n'
    assert group in topk
    exec(topk.split("```")[0].replace(group, ""), names)
    assert rank == 1 or names["model"].weight.grad.any()
    exec(hidden.split("```")[0], names)
    assert names["student"].weight.grad.any()
    dist.barrier()
    dist.destroy_process_group()


def test_a_teacher_in_another_process_teaches_as_one_in_this(tmp_path):
    path = os.pathsep.join([str(Path(kd.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "store")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    # Gloo of some versions says there that it is connected.
    assert done.returncode == 0 and done.stdout.endswith("both are done\n"), done.stderr[-3000:]


if __name__ == "__main__":
    # Both are forked from here, so that torch is imported once.
    child = os.fork()
    status = 1
    try:
        process(int(child == 0), sys.argv[1])
        status = 0
    finally:
        if child == 0:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    print("both are done")
