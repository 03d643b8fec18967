"""Two processes (gloo) against one: DTensor logits, DDP, FSDP2, gradient accumulation.

This file is also the program of the two processes. Each runs every function ``check_*`` in turn and writes down what
came of it; the tests read that.
"""

import datetime
import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import kdkernels as kd
from kdkernels import backends

WORLD = 2
SECONDS = 300
# A machine need not know its own name.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
# Both; the compiled one only where it was built, which other tests insist on.
BACKENDS = ("cpu", "torch") if backends.cpu.load_error() is None else ("torch",)


# Shared by both processes.


def tensors():
    from torch.distributed import tensor

    return tensor


def mesh(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (WORLD,), mesh_dim_names=("a", "b")[: len(shape or (1,))])


def placed(tensor, on, *placements, requires_grad=False):
    return tensors().distribute_tensor(tensor, on, list(placements)).requires_grad_(requires_grad)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def close(got, expected, what=""):
    torch.testing.assert_close(whole(got), expected, rtol=2e-5, atol=2e-6, msg=lambda text: f"{what}: {text}")


def of_rank(tensor, dim=0):
    """This process's half of a batch."""
    return tensor.chunk(WORLD, dim)[dist.get_rank()]


def check_sinkhorn_of_all_ranks():
    teacher = 3 * torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(7) != 2
    expected = kd.sinkhorn_bias(teacher, 0.3, mask=mask)
    found = kd.sinkhorn_bias(of_rank(teacher), 0.3, mask=of_rank(mask), group=dist.group.WORLD)
    close(found, expected)
    # All samples are of one rank.
    share = slice(0, 7 if dist.get_rank() else 0)
    close(kd.sinkhorn_bias(teacher[share], 0.3, mask=mask[share], group=dist.group.WORLD), expected)


# DTensor logits.


def inputs(*rows, vocab_size=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*rows, vocab_size, generator=generator) for _ in range(2))
    labels = torch.randint(vocab_size, rows, generator=generator)
    labels.view(-1)[1::3] = -100
    return student, teacher, labels


def losses(student, teacher, labels):
    """By name: the function, and its arguments that have something for every row."""
    top = kd.capture_topk(teacher, 5)
    weight = torch.linspace(0.5, 2, labels.numel()).view(labels.shape)
    shares = torch.stack([weight, 3 - weight], -1)
    per_row = {"row_weight": weight, "temperature": 1 + weight}
    sparse = {"teacher_ids": top.ids, "teacher_logprobs": top.logprobs, "labels": labels, "teacher_temperature": 1.0}
    return {
        "kd": (kd.kd_loss, {"teacher": teacher}),
        "kd labels": (kd.kd_loss, {"teacher": teacher, "labels": labels, "ce_weight": 0.5, "divergence": "jsd"}),
        "kd rows": (kd.kd_loss, {"teacher": teacher, "labels": labels, **per_row}),
        "kd param": (kd.kd_loss, {"teacher": teacher, "divergence": "jsd", "row_param": weight / 3}),
        "kd mixture": (kd.kd_loss, {"teacher": [teacher, teacher.flip(-1)], "teacher_weights": shares}),
        "topk": (kd.topk_kd_loss, sparse),
        "topk tail": (kd.topk_kd_loss, {**sparse, "tail_logprob": top.tail_logprob, "divergence": "reverse_kl"}),
        "dkd": (kd.dkd_loss, {"teacher": teacher, "labels": labels}),
        "mse": (kd.logit_mse_loss, {"teacher": teacher, "labels": labels}),
        "uld": (kd.uld_loss, {"teacher": teacher[..., 1:], "labels": labels}),
        "taid": (kd.taid_loss, {"teacher": teacher, "labels": labels, "interpolation": weight / 2}),
    }


def compare(loss, student, arguments, on, placements, *, same=(), **options):
    """Loss and gradient of a call of DTensors and of one process, for a loss that is used twice and not alone."""

    def step(student, arguments):
        value = loss(student, **arguments, **options)
        value, stats = value if isinstance(value, tuple) else (value, ())
        result = (value * value + 2 * value).sum()
        return [value, *stats, *torch.autograd.grad(result, student)]

    def place(name, value):
        if isinstance(value, list):
            return [place(name, item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        return placed(value, on, *([tensors().Replicate()] * on.ndim if name in same else placements))

    got = step(
        placed(student, on, *placements, requires_grad=True), {name: place(name, v) for name, v in arguments.items()}
    )
    expected = step(student.clone().requires_grad_(), arguments)
    for mine, truth in zip(got, expected, strict=True):
        assert mine.shape == truth.shape
        close(mine, truth, f"{loss.__name__} {placements} {options}")
    everywhere = tuple(tensors().Replicate() for _ in placements)
    assert got[-1].placements == tuple(placements)
    assert got[0].placements == (tuple(placements) if options.get("reduction") == "none" else everywhere)


def check_every_loss_of_sharded_rows_in_every_reduction():
    t, on = tensors(), mesh()
    for backend in BACKENDS:
        for reduction in ("mean", "sum", "batchmean", "none"):
            # 5 rows: 3 on one rank and 2 on the other.
            student, teacher, labels = inputs(5)
            for name, (loss, arguments) in losses(student, teacher, labels).items():
                if name != "kd mixture" or reduction == "mean":
                    compare(loss, student, arguments, on, [t.Shard(0)], reduction=reduction, backend=backend)


def check_replicas_give_what_one_process_gives_with_plain_tensors_too():
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(5)
    for name, (loss, arguments) in losses(student, teacher, labels).items():
        for reduction in ("mean", "none"):
            compare(loss, student, arguments, on, [t.Replicate()], reduction=reduction)
        leaf, plain = placed(student, on, t.Replicate(), requires_grad=True), student.clone().requires_grad_()
        loss(leaf, **arguments).backward()
        loss(plain, **arguments).backward()
        close(leaf.grad, plain.grad, name)


def check_batches_of_sequences_sharded_in_either_dimension_or_both():
    t = tensors()
    student, teacher, labels = inputs(3, 4)
    for shape, placements in (
        ((2,), [t.Shard(1)]),
        ((2, 1), [t.Shard(0), t.Shard(1)]),
        ((2, 1), [t.Shard(0), t.Replicate()]),
        ((1, 2), [t.Shard(0), t.Shard(1)]),
        ((1, 2), [t.Shard(0), t.Shard(0)]),
        ((1, 2), [t.Replicate(), t.Shard(-2)]),
    ):
        on = mesh(*shape)
        placements = list(placed(student, on, *placements).placements)
        for name in ("kd labels", "kd rows", "topk tail", "taid"):
            loss, arguments = losses(student, teacher, labels)[name]
            for reduction in ("mean", "batchmean", "none"):
                compare(loss, student, arguments, on, placements, reduction=reduction)


def check_a_rank_without_rows():
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(1)
    assert placed(student, on, t.Shard(0)).to_local().shape[0] == (dist.get_rank() == 0)
    for backend in BACKENDS:
        for reduction in ("mean", "sum", "none"):
            for name, (loss, arguments) in losses(student, teacher, labels).items():
                if "rows" not in name:
                    compare(loss, student, arguments, on, [t.Shard(0)], reduction=reduction, backend=backend)


def check_rows_that_count_may_all_be_on_one_rank_or_nowhere():
    t, on = tensors(), mesh()
    student, teacher, _ = inputs(4)
    for labels in (torch.tensor([3, 4, -1, -1]), torch.full((4,), -1)):
        arguments = {"teacher": teacher, "labels": labels, "ignore_index": -1, "ce_weight": 1.0}
        compare(kd.kd_loss, student, arguments, on, [t.Shard(0)])


def check_statistics_are_sharded_as_the_rows():
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(5)
    for name in ("kd labels", "topk"):
        loss, arguments = losses(student, teacher, labels)[name]
        for placements in ([t.Shard(0)], [t.Replicate()]):
            compare(loss, student, arguments, on, placements, return_stats=True)
    stats = kd.kd_loss(placed(student, on, t.Shard(0)), placed(teacher, on, t.Shard(0)), return_stats=True)[1]
    assert isinstance(stats, kd.KDStats) and stats.lse.placements == (t.Shard(0),) and not stats.lse.requires_grad


def check_several_tokens_of_sharded_rows():
    t, on = tensors(), mesh()
    (logits, _, _), ids = inputs(7), torch.arange(21).view(7, 3)
    for of_ids in (t.Shard(0), t.Replicate()):
        student = placed(logits, on, t.Shard(0), requires_grad=True)
        found = kd.token_logprobs(student, placed(ids, on, of_ids)).logprobs
        assert found.placements == (t.Shard(0),)
        close(found, kd.token_logprobs(logits, ids).logprobs)
        taken = kd.gather_logprobs(student.detach(), placed(ids, on, of_ids))
        for got, expected in zip(taken, kd.gather_logprobs(logits, ids), strict=True):
            close(got, expected)


def check_replicas_beside_sharded_rows_are_sliced():
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(5)
    for name, (loss, arguments) in losses(student, teacher, labels).items():
        rows = [key for key, value in arguments.items() if isinstance(value, (torch.Tensor, list))]
        for some in (rows[:1], rows):
            compare(loss, student, arguments, on, [t.Shard(0)], same=some)
        assert rows, name


def check_numbers_for_all_rows():
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(5)
    s, p = placed(student, on, t.Shard(0)), placed(teacher, on, t.Shard(0))
    y = placed(labels, on, t.Shard(0))
    tokens = (labels != -100).sum()
    expected = kd.kd_loss(student, teacher, labels, temperature=2.0, normalizer=tokens)
    for two in (2.0, torch.tensor(2.0), torch.tensor([2.0]), placed(torch.tensor(2.0), on, t.Replicate())):
        for n in (int(tokens), tokens, placed(tokens, on, t.Replicate())):
            for reduction in ("mean", "sum"):
                got = kd.kd_loss(s, p, y, temperature=two, normalizer=n, reduction=reduction)
                close(got, expected)
    mixture = {"mixture": "logits", "teacher_weights": torch.tensor([0.5, 2.0])}
    close(kd.kd_loss(s, [p, s], **mixture), kd.kd_loss(student, [teacher, student], **mixture))


def check_the_teacher_gets_its_gradient():
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(5)
    truth = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
    kd.kd_loss(*truth, labels, divergence="jeffreys").backward()
    for placement in (t.Shard(0), t.Replicate()):
        leaves = [placed(x, on, p, requires_grad=True) for x, p in ((student, t.Shard(0)), (teacher, placement))]
        kd.kd_loss(*leaves, placed(labels, on, t.Shard(0)), divergence="jeffreys").backward()
        for leaf, plain in zip(leaves, truth, strict=True):
            close(leaf.grad, plain.grad)


def check_in_place_and_without_gradient():
    t, on = tensors(), mesh()
    student, teacher, _ = inputs(5)
    leaf, plain = placed(student, on, t.Shard(0), requires_grad=True), student.clone().requires_grad_()
    target = placed(teacher, on, t.Shard(0))
    logits = leaf * 1
    memory = logits.to_local().data_ptr()
    (grad,) = torch.autograd.grad(kd.kd_loss(logits, target, inplace=True, backend=BACKENDS[0]), logits)
    loss = kd.kd_loss(plain, teacher)
    loss.backward()
    close(grad, plain.grad)
    assert BACKENDS[0] == "torch" or grad.to_local().data_ptr() == memory
    with torch.no_grad():
        close(kd.kd_loss(leaf, target), loss.detach())
    with torch.inference_mode():
        close(kd.kd_loss(placed(student, on, t.Shard(0)), target), loss.detach())


def check_logits_made_by_a_sharded_model():
    """A head whose rows of hidden states are sharded, and one that gathers a vocabulary before the loss."""
    t, on = tensors(), mesh()
    hidden, head = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), inputs(40, vocab_size=8)[0]
    teacher, labels = inputs(6)[1:]
    plain = [x.clone().requires_grad_() for x in (hidden, head)]
    kd.kd_loss(F.linear(*plain), teacher, labels, ce_weight=1.0).backward()
    target, marks = placed(teacher, on, t.Shard(0)), placed(labels, on, t.Shard(0))
    for placements in ((t.Shard(0), t.Replicate()), (t.Replicate(), t.Shard(0))):
        leaves = [placed(x, on, p, requires_grad=True) for x, p in zip((hidden, head), placements, strict=True)]
        logits = F.linear(*leaves)
        if logits.placements == (t.Shard(1),):
            logits = logits.redistribute(placements=[t.Replicate()], async_op=True)
            loss = kd.kd_loss(logits, teacher, labels, ce_weight=1.0)
        else:
            loss = kd.kd_loss(logits, target, marks, ce_weight=1.0)
        loss.backward()
        for leaf, truth in zip(leaves, plain, strict=True):
            close(leaf.grad, truth.grad)


def refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


def check_an_error_of_one_rank_keeps_the_other_from_waiting():
    """The values of its rows are a rank's own affair: it raises, and the sum that the other one waits for is NaN."""
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(4)
    labels[3] = 1000
    leaf = placed(student, on, t.Shard(0), requires_grad=True)
    p, y = placed(teacher, on, t.Shard(0)), placed(labels, on, t.Shard(0))
    for backend in BACKENDS:
        for reduction in ("mean", "sum", "batchmean"):
            call = functools.partial(kd.kd_loss, leaf, p, y, ce_weight=1.0, reduction=reduction, backend=backend)
            if dist.get_rank() == 1:
                refused(ValueError, r"labels must be in \[0, 40\) .* got 1000", call)
                continue
            loss = call()
            assert whole(loss).isnan()
            loss.backward()
            leaf.grad = None
    # All are right again afterwards.
    close(kd.kd_loss(leaf, p), kd.kd_loss(student, teacher))


def check_a_graph_breaks_where_a_vocabulary_is_sharded():
    t, on = tensors(), mesh()
    student, teacher, _ = inputs(4)
    torch._dynamo.reset()
    loss = torch.compile(kd.kd_loss, backend="aot_eager")
    classes, rows = ([placed(x, on, t.Shard(dim)) for x in (student, teacher)] for dim in (1, 0))
    close(loss(*classes), kd.kd_loss(student, teacher))
    close(loss(*rows), kd.kd_loss(student, teacher))


def check_what_cannot_be_computed_is_refused_with_the_cure():
    t, on = tensors(), mesh()
    student, teacher, labels = inputs(4)
    s, p, y = (placed(x, on, t.Shard(0)) for x in (student, teacher, labels))
    classes, replicas = placed(student, on, t.Shard(1)), placed(student, on, t.Replicate())
    hidden, head, weight = torch.ones(4, 3), torch.ones(40, 3), y.float()

    cure = r"one dimension of the mesh; pass student.redistribute\(placements=\[Replicate\(\)\]\)"
    refused(ValueError, cure, lambda: kd.uld_loss(classes, teacher))
    # The others take them.
    close(kd.dkd_loss(classes, teacher, labels), kd.dkd_loss(student, teacher, labels))
    close(kd.logit_mse_loss(classes, teacher), kd.logit_mse_loss(student, teacher))
    close(kd.taid_loss(classes, teacher, interpolation=0.5), kd.taid_loss(student, teacher, interpolation=0.5))
    close(kd.lk_loss(classes, [teacher, student]), kd.lk_loss(student, [teacher, student]))
    close(kd.kd_loss(classes.redistribute(placements=[t.Replicate()]), teacher), kd.kd_loss(student, teacher))
    both = placed(student, mesh(1, 2), t.Shard(0), t.Shard(1))
    cure = r"pass student.redistribute\(placements=\[Shard\(dim=0\), Replicate\(\)\]\)"
    refused(ValueError, cure, lambda: kd.uld_loss(both, both))

    terms = t.DTensor.from_local(student, on, [t.Partial()])
    refused(ValueError, "student must not be a sum over ranks that is still to", lambda: kd.kd_loss(terms, teacher))
    refused(TypeError, "teacher must be a DTensor as the student is", lambda: kd.kd_loss(s, teacher))
    refused(TypeError, "labels must be a DTensor as the student is", lambda: kd.kd_loss(s, p, labels))
    refused(TypeError, "student must be a DTensor as teacher is, got a plain", lambda: kd.kd_loss(student, p))
    refused(TypeError, "student must be a DTensor as teacher is, got a NoneType", lambda: kd.kd_loss(None, p))
    for _ in range(2):  # Also where the rest of the call is known.
        kd.kd_loss(student, teacher, labels)
        refused(TypeError, "labels", lambda: kd.kd_loss(student, teacher, y))
    refused(ValueError, "teacher must have the student's placements", lambda: kd.kd_loss(replicas, p))
    refused(ValueError, "teacher must be on the student's mesh", lambda: kd.kd_loss(s, both))
    refused(ValueError, r"student's leading shape \(4,\), got \(3, 40\)", lambda: kd.kd_loss(s, p[:3]))
    tokens = t.DTensor.from_local(torch.tensor(2), on, [t.Partial()])
    refused(ValueError, "normalizer must have .* the same on all ranks", lambda: kd.kd_loss(s, p, normalizer=tokens))
    refused(ValueError, "normalizer needs reduction", lambda: kd.kd_loss(s, p, normalizer=2, reduction="none"))
    refused(ValueError, "reduction must be one of", lambda: kd.kd_loss(s, p, reduction="average"))
    refused(TypeError, "'temp'", lambda: kd.kd_loss(s, p, temp=1.0))
    close(kd.capture_topk(p, 2).logprobs, kd.capture_topk(teacher, 2).logprobs)
    heads = (hidden, head, hidden, head)
    refused(TypeError, "labels must be a plain tensor", lambda: kd.linear_kd_loss(*heads, labels=y))
    refused(TypeError, "row_weight must be a plain tensor", lambda: kd.linear_kd_loss(*heads, row_weight=weight))


# A language model in data parallel.

TOKENS, WIDTH, VOCABULARY = 16, 8, 29


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = Head(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids, loss=None):
        """Logits, or what ``loss(hidden, head)`` is where it is given."""
        hidden = self.body(self.embed(ids))
        return self.head(hidden) if loss is None else loss(hidden, self.head.weight)

    def distill(self, ids, loss):
        return self(ids, loss)

    def hidden(self, ids):
        return self(ids, lambda hidden, _: hidden)


class Head(nn.Linear):
    def distill(self, hidden, loss):
        return loss(hidden, self.weight)


def data(seed, even=True):
    """Tokens, labels, a teacher's hidden states and head; ``even``: the halves have as many labels that count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    labels = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    labels[:, ::4] = -100
    if not even:
        labels[0, 5:] = -100
    hidden, head = torch.randn(2, TOKENS, 5, generator=generator), torch.randn(VOCABULARY, 5, generator=generator)
    return ids, labels, hidden, head


def dense(ids, labels, hidden, head, **options):
    target = F.linear(hidden, head)
    return lambda model: kd.kd_loss(model(ids), target, labels, ce_weight=0.5, temperature=2.0, **options)


def sparse(ids, labels, hidden, head, **options):
    top = kd.capture_topk(F.linear(hidden, head), 4)
    return lambda model: kd.topk_kd_loss(
        model(ids), top.ids, top.logprobs, labels, tail_logprob=top.tail_logprob, ce_weight=0.5, **options
    )


def fused(ids, labels, hidden, head, **options):
    def loss(states, weight):
        return kd.linear_kd_loss(states, weight, hidden, head, labels, ce_weight=0.5, chunk_bytes=1000, **options)

    return lambda model: model(ids, loss)


def train(model, loss_of, steps, *, of_rows, accumulate=1):
    """Gradients of the first step and weights after the last; the batch is cut into ``accumulate`` parts."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = None
    for step in range(steps):
        ids, labels, hidden, head = data(step, even=accumulate == 1)
        tokens = int((labels != -100).sum())
        parts = zip(*(of_rows(x).chunk(accumulate, 1) for x in (ids, labels, hidden)), strict=True)
        for k, part in enumerate(parts):
            last = k == accumulate - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with model.no_sync() if not last and hasattr(model, "no_sync") else torch.enable_grad():
                loss_of(*part, head, tokens=tokens)(model).backward()
        if first is None:
            first = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return first, {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def gradients(model):
    return {name.removeprefix("module."): whole(p.grad).clone() for name, p in model.named_parameters()}


def base():
    torch.manual_seed(0)
    return Model()


def with_mean(make):
    return lambda *batch, tokens: make(*batch)


def with_normalizer(make, share):
    return lambda *batch, tokens: make(*batch, normalizer=tokens / share)


def hold(parallel, make, name):
    """Three steps of two processes and of one: with "mean", and in two parts of the batch with a normalizer."""
    for parts, loss_of, alone in (
        (1, with_mean(make), with_mean(make)),
        # The gradients of the ranks are averaged, so that each divides by its share of the tokens.
        (2, with_normalizer(make, WORLD), with_normalizer(make, 1)),
    ):
        expected = train(base(), alone, 3, of_rows=lambda x: x, accumulate=parts)
        got = train(parallel(base()), loss_of, 3, of_rows=of_rank, accumulate=parts)
        for mine, truth in zip(got, expected, strict=True):
            for (key, value), right in zip(mine.items(), truth.values(), strict=True):
                close(value, right, f"{name}, {parts} parts: {key}")


def check_ddp_equals_one_process():
    from torch.nn.parallel import DistributedDataParallel

    for name, make in (("dense", dense), ("sparse", sparse), ("fused", fused)):
        hold(DistributedDataParallel, make, name)


def sharded(model, head_alone=False):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.body)
    if head_alone:
        fully_shard(model.head)
    return fully_shard(model)


def check_fsdp2_equals_one_process():
    for name, make in (("dense", dense), ("sparse", sparse), ("fused", fused)):
        hold(sharded, make, name)


def head_gradient(step, model):
    """That of two processes over the right one, for ``step(model, ids, loss)``."""
    ids, _, hidden, head = data(0)

    def loss(states, weight, part=of_rank):
        return kd.linear_kd_loss(states, weight, part(hidden), head)

    alone = base()
    alone(ids, lambda states, weight: loss(states, weight, part=lambda x: x)).backward()
    step(model, of_rank(ids), loss)
    got, truth = whole(model.head.weight.grad), alone.head.weight.grad
    close(model.embed.weight.grad, alone.embed.weight.grad)
    return float(got.norm() / truth.norm()), float((got - truth).abs().max() / truth.abs().max())


def check_an_fsdp2_head_as_the_docs_say():
    from torch.distributed.fsdp import register_fsdp_forward_method

    t = tensors()

    def in_forward(model, ids, loss):
        model(ids, loss).backward()

    def by_a_method(model, ids, loss):
        register_fsdp_forward_method(model, "distill")
        model.distill(ids, loss).backward()

    def by_a_method_of_the_head(model, ids, loss):
        register_fsdp_forward_method(model.head, "distill")
        register_fsdp_forward_method(model, "hidden")
        model.head.distill(model.hidden(ids), loss).backward()

    def gathered_by_the_module(model, ids, loss):
        register_fsdp_forward_method(model, "hidden")
        states = model.hidden(ids)
        model.head.unshard()
        loss(states, model.head.weight).backward()

    def gathered_by_hand(grad_placements):
        def step(model, ids, loss):
            register_fsdp_forward_method(model, "hidden")
            states = model.hidden(ids)
            loss(states, model.head.weight.full_tensor(grad_placements=grad_placements)).backward()

        return step

    for step, alone in (
        (in_forward, False),
        (by_a_method, False),
        (by_a_method_of_the_head, True),
        (gathered_by_the_module, True),
        (gathered_by_hand([t.Partial("avg")]), True),
    ):
        ratio, error = head_gradient(step, sharded(base(), head_alone=alone))
        assert abs(ratio - 1) < 1e-4 and error < 1e-4, (step.__name__, ratio, error)
    # Nothing is added up over the ranks, or nothing divided: the docs warn of both.
    ratio, error = head_gradient(gathered_by_hand(None), sharded(base(), head_alone=True))
    assert error > 0.1, (ratio, error)
    ratio, error = head_gradient(gathered_by_hand([t.Partial()]), sharded(base(), head_alone=True))
    assert abs(ratio - WORLD) < 1e-4, (ratio, error)
    weight = sharded(base(), head_alone=True).head.weight
    hidden = torch.ones(3, WIDTH)
    refused(
        TypeError,
        "student_weight must be a plain tensor, got a DTensor.* forward .*Partial",
        lambda: kd.linear_kd_loss(hidden, weight, hidden, torch.ones(VOCABULARY, WIDTH)),
    )
    refused(
        TypeError,
        r"teacher_weight must be a plain tensor, got a DTensor: pass teacher_weight.full_tensor\(\)$",
        lambda: kd.linear_kd_loss(hidden, torch.ones(VOCABULARY, WIDTH), hidden, weight.detach()),
    )


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    results, broken = {}, None
    for name, check in CHECKS.items():
        # The other rank may wait in a collective for one that failed: nothing after it means anything.
        results[name] = broken and f"not run after {broken} failed"
        if broken is None:
            try:
                check()
                dist.barrier()
            except BaseException:
                results[name], broken = traceback.format_exc(), name
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))
    if broken is None:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The result of each check on each rank; both processes run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    # The package that this process tests, wherever it is.
    path = os.pathsep.join([str(Path(kd.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": path, **LOOPBACK},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        texts = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = {}
    for rank, text in enumerate(texts):
        file = folder / f"rank{rank}.json"
        assert file.exists(), f"rank {rank} ended without results:\n{text}"
        found[rank] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check, results):
    for rank, found in results.items():
        assert found[check] is None, f"rank {rank}: {found[check]}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
