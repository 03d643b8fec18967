"""Two and four processes (gloo), each with some columns of a vocabulary, against one process with all of them.

This file is also the program of the processes. Each runs every function ``check_*`` in turn and writes down what came
of it; the tests read that.
"""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import kdkernels as kd
from kdkernels import backends
from kdkernels.parallel import shards

SECONDS = 300
# A machine need not know its own name.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
# Both; the compiled one only where it was built, which other tests insist on.
BACKENDS = ("cpu", "torch") if backends.cpu.load_error() is None else ("torch",)
VOCABULARY = 37
# Columns of each rank: uneven, one alone, none.
WIDTHS = {2: ((20, 17), (36, 1), (37, 0)), 4: ((10, 9, 9, 9), (1, 0, 35, 1))}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "soft_ce",
    "jsd",
    "tvd",
    kd.SkewKL(0.1),
    kd.SkewReverseKL(0.3),
    kd.AlphaBeta(0.3, 0.7),
    kd.AlphaBeta(0.0, 1.2),
    kd.MixedKL(0.25),
    kd.Triangular(),
)
ROWS = 6
BY_ROW = torch.tensor([0.0, 1, 2, 3, 4, 0])


def group():
    return dist.group.WORLD


def widths():
    return WIDTHS[dist.get_world_size()]


def columns_of_rank(of_ranks):
    first = sum(of_ranks[: dist.get_rank()])
    return slice(first, first + of_ranks[dist.get_rank()])


def inputs(seed, dtype=torch.float32, size=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((3 * torch.randn(ROWS, size, generator=generator)).to(dtype) for _ in range(2))
    labels = torch.randint(size, (ROWS,), generator=generator)
    labels[3] = -100
    student[3] = torch.nan
    return student, teacher, labels


def bars(dtype):
    """Of values and of gradients."""
    if dtype == torch.float64:
        return {"rtol": 1e-10, "atol": 1e-11}, {"rtol": 1e-9, "atol": 1e-11}
    gradient = {"rtol": 3e-5, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    return {"rtol": 5e-6, "atol": 5e-6}, gradient


def same(one, sharded, student, of_ranks, what):
    """Hold loss and gradient of the shards to those of one process."""
    columns, (of_value, of_gradient) = columns_of_rank(of_ranks), bars(student.dtype)
    whole = student.clone().requires_grad_()
    mine = student[:, columns].clone().requires_grad_()
    expected, got = one(whole), sharded(mine, columns)
    told = {"msg": lambda text: f"{what}: {text}", "equal_nan": True}
    torch.testing.assert_close(got, expected, **of_value, **told)
    upstream = torch.linspace(0.5, 1.5, expected.numel()).to(expected.dtype).view(expected.shape)
    expected.backward(upstream)
    got.backward(upstream)
    torch.testing.assert_close(mine.grad, whole.grad[:, columns], **of_gradient, **told)


DENSE_OPTIONS = (
    {},
    {
        "temperature": 2.0,
        "teacher_temperature": 1.5,
        "ce_weight": 0.3,
        "z_loss_weight": 1e-2,
        "label_smoothing": 0.1,
        "kd_weight": 0.7,
        "student_softcap": 5.0,
        "teacher_softcap": 6.0,
    },
    {
        "ce_weight": BY_ROW,
        "kd_weight": torch.tensor([0.0, 1, 2, 0, 1, 0]),
        "temperature": torch.tensor([1.0, 2, 3, 1, 2, 1]),
        "reduction": "none",
        "row_weight": BY_ROW,
    },
)


def dense(student, teacher, labels, of_ranks, backend, options):
    same(
        lambda s: kd.kd_loss(s, teacher, labels, backend="torch", **options),
        lambda s, c: kd.kd_loss(
            s, teacher[:, c].contiguous(), labels, backend=backend, process_group=group(), **options
        ),
        student,
        of_ranks,
        (of_ranks, student.dtype, backend, options),
    )


def check_every_divergence_with_its_options():
    for seed, of_ranks in enumerate(widths()):
        for k, divergence in enumerate(DIVERGENCES):
            for j, options in enumerate(DENSE_OPTIONS):
                # Plain PyTorch with the options in turn.
                for backend in BACKENDS if (k + j + seed) % 3 == 0 else BACKENDS[:1]:
                    dense(*inputs(seed), of_ranks, backend, {**options, "divergence": divergence})
            for dtype in (torch.bfloat16, torch.float64):
                # Of the shards in turn, which every dtype has alike.
                if k % len(widths()) == seed:
                    dense(*inputs(seed, dtype), of_ranks, BACKENDS[0], {**DENSE_OPTIONS[1], "divergence": divergence})


def check_rows_without_a_distribution():
    """NaN, and a row of -inf alone, on one side or the other, of one rank's columns or of all."""
    for of_ranks in widths():
        columns = columns_of_rank(of_ranks)
        student, teacher, labels = inputs(2)
        student[0, 1], teacher[1, 30], student[2, :20], teacher[4] = torch.nan, torch.nan, -torch.inf, -torch.inf
        for divergence in DIVERGENCES[:9]:
            options = {"divergence": divergence, "reduction": "none"}
            for teachers, more in ((teacher, {}), ([teacher, inputs(3)[1]], {"mixture": "probs"})):
                whole, mine = student.clone().requires_grad_(), student[:, columns].clone().requires_grad_()
                expected, truth = kd.kd_loss(whole, teachers, labels, return_stats=True, **options, **more)
                here = [x[:, columns] for x in teachers] if more else teachers[:, columns]
                for told in (False, True):
                    call = {"return_stats": told, "process_group": group(), **options, **more}
                    found = kd.kd_loss(mine, here, labels, **call)
                    close(found[0] if told else found, expected, (of_ranks, options, more))
                for name, one, other in zip(truth._fields, found[1], truth, strict=True):
                    close(one, other, (name, of_ranks, options, more))
                expected.sum().backward()
                found[0].sum().backward()
                spoilt = expected.isnan()
                assert mine.grad[spoilt].isnan().all() and whole.grad[spoilt].isnan().all()


def check_cross_entropy_alone():
    student, _, labels = inputs(1)
    for of_ranks in widths():
        for options in ({"ce_weight": 1.0}, {"ce_weight": 1.0, "label_smoothing": 0.2, "z_loss_weight": 0.1}):
            same(
                lambda s, o=options: kd.kd_loss(s, None, labels, kd_weight=0.0, backend="torch", **o),
                lambda s, c, o=options: kd.kd_loss(s, None, labels, kd_weight=0.0, process_group=group(), **o),
                student,
                of_ranks,
                options,
            )


def check_padded_columns_at_the_end_of_the_vocabulary():
    student, teacher, labels = inputs(2)
    labels = labels.clamp(max=29)
    for of_ranks in widths():
        options = {"vocab_size": 30, "ce_weight": 0.5, "divergence": "jsd", "label_smoothing": 0.1}
        same(
            lambda s, o=options: kd.kd_loss(s, teacher, labels, **o),
            lambda s, c, o=options: kd.kd_loss(s, teacher[:, c].contiguous(), labels, process_group=group(), **o),
            student,
            of_ranks,
            of_ranks,
        )


TAILS = ("bucket", "renormalize", "renormalize_both", "uniform", "drop")


def sparse(student, ids, logprobs, labels, of_ranks, backend, options):
    same(
        lambda s: kd.topk_kd_loss(s, ids, logprobs, labels, backend="torch", **options),
        lambda s, c: kd.topk_kd_loss(s, ids, logprobs, labels, backend=backend, process_group=group(), **options),
        student,
        of_ranks,
        (of_ranks, backend, options),
    )


def check_sparse_teachers_of_every_tail():
    for seed, of_ranks in enumerate(widths()):
        student, teacher, labels = inputs(seed)
        top = kd.capture_topk(teacher, 5)
        ids = top.ids.clone()
        ids[2, 3:], ids[5], ids[1, 1] = -1, -1, ids[1, 0]
        labels[0] = ids[0, 2]
        for tail in TAILS:
            for k, divergence in enumerate(("forward_kl", "jsd", "tvd", kd.SkewKL(0.1), kd.AlphaBeta(0.3, 0.7))):
                options = {"ce_weight": 0.5, "z_loss_weight": 0.01}
                if k % 2:
                    options = {"temperature": 2.0, "teacher_temperature": 1.0, "ce_weight": 0.3, "label_smoothing": 0.1}
                for backend in BACKENDS[: 1 + (seed == 0)]:
                    every = {**options, "tail": tail, "divergence": divergence}
                    sparse(student, ids, top.logprobs, labels, of_ranks, backend, every)


def check_a_student_that_is_sure_of_the_ids():
    """What is left outside them is too little for a number, or all but nothing beside 1."""
    of_ranks = widths()[0]
    ids = torch.arange(0, VOCABULARY, 9).expand(ROWS, -1).contiguous()
    for gap in (14.0, 130.0):
        student, teacher, labels = inputs(7)
        student[3], labels[1] = 0.0, ids[1, 2]
        student = student.scatter_add(1, ids, torch.full(ids.shape, gap))
        logprobs = torch.log_softmax(teacher, -1).gather(1, ids)
        expected = kd.gather_logprobs(student.double(), ids, backend="torch").tail_logprob.float()
        for k, divergence in enumerate(("forward_kl", "jsd")):
            options = {"divergence": divergence, "reduction": "none", "ce_weight": 0.1 * (k % 2)}
            wide = student.double().requires_grad_()
            loss = kd.topk_kd_loss(wide, ids, logprobs, labels, backend="torch", **options)
            loss.sum().backward()
            for backend in BACKENDS:
                mine = student[:, columns_of_rank(of_ranks)].clone().requires_grad_()
                got = kd.topk_kd_loss(mine, ids, logprobs, labels, backend=backend, process_group=group(), **options)
                got.sum().backward()
                told = {"msg": lambda text, what=(gap, divergence, backend): f"{what}: {text}"}
                torch.testing.assert_close(got, loss.float(), rtol=2e-5, atol=1e-5, **told)
                gradient = wide.grad[:, columns_of_rank(of_ranks)].float()
                torch.testing.assert_close(mine.grad, gradient, rtol=1e-4, atol=4e-6, **told)
                if not k:
                    found = kd.gather_logprobs(mine.detach(), ids, backend=backend, process_group=group()).tail_logprob
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, **told)
                    found = kd.capture_topk(mine.detach(), ids.shape[1], backend=backend, process_group=group())
                    of_all = kd.capture_topk(student.double(), ids.shape[1], backend="torch").tail_logprob.float()
                    torch.testing.assert_close(found.tail_logprob, of_all, rtol=1e-5, atol=1e-5, **told)


def check_a_student_that_is_sure_far_into_a_row_at_two_temperatures():
    """A kernel's top of a row is but near the largest logit, the nearer the lower the temperature."""
    of_ranks = (301, *[7] * (dist.get_world_size() - 1))
    student, teacher, labels = inputs(8, size=sum(of_ranks))
    student[:, 200] += 100
    options = {"temperature": 4.0, "ce_weight": 0.5, "z_loss_weight": 0.01, "label_smoothing": 0.1}
    for backend in BACKENDS:
        for divergence in ("forward_kl", "jsd"):
            dense(student, teacher, labels, of_ranks, backend, {"divergence": divergence, **options})


def check_gradients_of_16_bits_are_rounded_once():
    """A tail that looks at every column has two parts of a gradient, which cancel where the student is sure."""
    of_ranks = widths()[0]
    ids, columns = torch.tensor([[5]]).expand(ROWS, -1).contiguous(), columns_of_rank(of_ranks)
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher, _ = inputs(9, dtype)
        student[3] = 0.0
        student[:, 11] += 20
        logprobs = torch.log_softmax(teacher.float(), -1).gather(1, ids)
        for tail, divergence in (("renormalize", kd.AlphaBeta(0.3, 0.7)), ("uniform", kd.Triangular())):
            options = {"tail": tail, "divergence": divergence, "temperature": 2.0, "reduction": "sum"}
            options["teacher_temperature"] = 1.0
            wide = student.double().requires_grad_()
            kd.topk_kd_loss(wide, ids, logprobs, backend="torch", **options).backward()
            largest = wide.grad.abs().amax(-1, keepdim=True)
            for backend in BACKENDS:
                mine = student[:, columns].clone().requires_grad_()
                kd.topk_kd_loss(mine, ids, logprobs, backend=backend, process_group=group(), **options).backward()
                error = (mine.grad - wide.grad[:, columns]).abs() / largest
                assert mine.numel() == 0 or error.max() < 0.02, (dtype, tail, backend, error.max())


def check_sparse_teachers_of_all_columns_of_no_row_and_of_no_term():
    of_ranks = (1, 1, *[0] * (dist.get_world_size() - 2))
    student, teacher, labels = inputs(3, size=2)
    student[3], ids = 0.0, torch.tensor([[1, 0]]).expand(ROWS, -1).contiguous()
    logprobs = torch.log_softmax(teacher, -1).gather(1, ids)
    for backend in BACKENDS:
        for options in (
            *({"divergence": divergence} for divergence in ("forward_kl", "jsd", kd.SkewKL(0.1))),
            {"kd_weight": 0.0},
            {"kd_weight": 0.0, "tail": "uniform"},
        ):
            sparse(student, ids, logprobs, labels, of_ranks, backend, options)
        # The label is all that there is outside the ids, and the student excludes it.
        masked, lone = student.clone(), torch.zeros(ROWS, 1, dtype=torch.long)
        masked[:2, 1], aside = -torch.inf, torch.ones_like(labels)
        options = {"divergence": "jsd", "ce_weight": torch.tensor([0.0, 0.0, 1, 1, 1, 1])}
        sparse(masked, lone, logprobs[:, 1:], aside, of_ranks, backend, options)
        nothing = student[:0, columns_of_rank(of_ranks)].clone().requires_grad_()
        loss, stats = kd.topk_kd_loss(nothing, ids[:0], logprobs[:0], return_stats=True, process_group=group())
        loss.backward()
        assert loss == 0 and stats.overlap.shape == (0,) and nothing.grad.shape == nothing.shape


def check_tokens_gathered_and_captured():
    for seed, of_ranks in enumerate(widths()):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for backend in BACKENDS:
                for temperature in (1.0, 2.5):
                    _tokens(seed, of_ranks, dtype, {"backend": backend, "temperature": temperature})


def _tokens(seed, of_ranks, dtype, options):
    columns, (of_value, _) = columns_of_rank(of_ranks), bars(dtype)
    logits, _, _ = inputs(seed, dtype)
    logits[2, : of_ranks[0]] = -torch.inf
    ids = torch.randint(VOCABULARY, (ROWS, 4), generator=torch.Generator().manual_seed(seed))
    ids[0, 1], ids[4], ids[5, 1] = -1, -1, ids[5, 0]

    def all_of(logits, **more):
        found, stats = kd.token_logprobs(logits, ids, entropy=True, return_stats=True, **options, **more)
        return torch.cat([found.logprobs.flatten(), found.entropy, found.lse, *(item.flatten() for item in stats)])

    def graded(logits, **more):
        found = kd.token_logprobs(logits, ids, entropy=True, **options, **more)
        return torch.cat([found.logprobs, found.entropy[:, None]], 1)[[0, 1, 4, 5]]

    mine = logits[:, columns]
    torch.testing.assert_close(all_of(mine, process_group=group()), all_of(logits), equal_nan=True, **of_value)
    # Plain PyTorch has NaN for a row without a distribution whose upstream gradient is 0.
    without = logits.isnan() | logits.isneginf().all(-1, keepdim=True)
    finite = torch.where(without, 1.0, logits).to(dtype)
    same(graded, lambda s, c: graded(s, process_group=group()), finite, of_ranks, (of_ranks, options))
    expected = kd.gather_logprobs(logits, ids, **options)
    for got, truth in zip(kd.gather_logprobs(mine, ids, process_group=group(), **options), expected, strict=True):
        torch.testing.assert_close(got, truth, equal_nan=True, **of_value)
    # Equal logits on both sides of a cut.
    logits[1, 5 : of_ranks[0] + 3] = 7.0
    for k in (1, 5, 30, VOCABULARY):
        expected = kd.capture_topk(logits, k, **options)
        got = kd.capture_topk(mine, k, process_group=group(), **options)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, **of_value)


def check_over_the_logits_and_twice_the_same_bits():
    student, teacher, labels = inputs(5)
    columns = columns_of_rank(widths()[0])
    found = []
    for inplace in (False, False, True):
        leaf = student[:, columns].clone().requires_grad_()
        # Not a leaf, which autograd guards against writing.
        logits = leaf * 1
        loss = kd.kd_loss(
            logits,
            teacher[:, columns].contiguous(),
            labels,
            divergence="jsd",
            ce_weight=0.5,
            inplace=inplace,
            process_group=group(),
        )
        loss.backward()
        assert not inplace or torch.equal(logits.detach(), leaf.grad)
        found.append((loss.detach(), leaf.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])
    ranks = [torch.empty_like(found[0][0]) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, found[0][0])
    assert all(torch.equal(item, ranks[0]) for item in ranks)


@contextlib.contextmanager
def counted_collectives():
    """A list of what this rank sends: names, and how many numbers."""
    sent, kept = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def all_reduce(tensor, *rest, **options):
        sent.append(("all_reduce", tensor.numel()))
        return kept["all_reduce"](tensor, *rest, **options)

    def all_gather(tensors, tensor, **options):
        sent.append(("all_gather", tensor.numel()))
        return kept["all_gather"](tensors, tensor, **options)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield sent
    finally:
        dist.all_reduce, dist.all_gather = kept["all_reduce"], kept["all_gather"]


def check_what_travels_does_not_grow_with_the_vocabulary():
    found = []
    # No call is known.
    shards._seen.clear()
    world = dist.get_world_size()
    for size in (40, 4000):
        student, teacher, labels = inputs(6, size=size)
        columns = columns_of_rank((size // world,) * world)
        mine, its = student[:, columns].clone().requires_grad_(), teacher[:, columns].contiguous()
        top = kd.capture_topk(teacher, 4)
        calls = {
            "forward_kl": lambda s, t, y=labels: kd.kd_loss(s, t, y, ce_weight=0.5, process_group=group()),
            "jsd": lambda s, t, y=labels: kd.kd_loss(s, t, y, divergence="jsd", process_group=group()),
            "topk": lambda s, t, y=labels, k=top: kd.topk_kd_loss(
                s, k.ids, k.logprobs, y, ce_weight=0.5, process_group=group()
            ),
            "tokens": lambda s, t, y=labels: kd.token_logprobs(s, y, process_group=group()).logprobs.sum(),
            "linear": lambda s, t, y=labels: kd.linear_kd_loss(
                torch.ones(ROWS, 3, requires_grad=True), s.T[:, :3], t[:, :3], t.T[:, :3], process_group=group()
            ),
        }
        with counted_collectives() as sent:
            for call in calls.values():
                call(mine, its).backward()
        numbers = [entry for entry in sent if entry[0] == "all_reduce"]
        # A maximum and a sum each; a second sum where the scores need the normalisers, and one of hidden states.
        assert len(numbers) == 2 + 3 + 2 + 2 + 3, numbers
        found.append(sent)
        more = {
            "statistics": lambda s, t: kd.kd_loss(s, t, return_stats=True, process_group=group())[0],
            "probabilities": lambda s, t: kd.kd_loss(s, [t, t], mixture="probs", process_group=group()),
            "logits": lambda s, t: kd.kd_loss(s, [t, t], mixture="logits", process_group=group()),
            "label": lambda s, t, y=labels: kd.dkd_loss(s, t, y, process_group=group()),
            "acceptance": lambda s, t: kd.lk_loss(s, t, process_group=group()),
        }
        counts = {}
        for name, call in more.items():
            with counted_collectives() as sent:
                call(mine, its).backward()
            found.append(sent)
            counts[name] = len(sent) - 2
        # After two gatherings at a first call; the second sum of statistics is a gathering too.
        assert counts == {"statistics": 3, "probabilities": 3, "logits": 2, "label": 2, "acceptance": 3}, counts
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


def check_ranks_that_disagree_are_told():
    student, teacher, labels = inputs(7)
    columns, rank = columns_of_rank(widths()[0]), dist.get_rank()
    s, t = student[:, columns].clone(), teacher[:, columns].contiguous()
    here = {"process_group": group()}
    rows = ROWS - (rank == 1)
    refused(
        ValueError,
        "rows must be the same .*6 on rank 0 and 5 on rank 1",
        lambda: kd.kd_loss(s[:rows], t[:rows], **here),
    )
    temperature = 1.0 + rank
    refused(ValueError, "options must be the same", lambda: kd.kd_loss(s, t, temperature=temperature, **here))
    refused(
        ValueError,
        "dtype must be the same",
        lambda: kd.kd_loss(s.to((torch.float32, torch.bfloat16)[rank == 1]), t, **here),
    )
    # Calls that tell as many facts, and others.
    for other in (kd.lk_loss, kd.logit_mse_loss, lambda s, t, **more: kd.gather_logprobs(s, labels[:, None], **more)):
        refused(
            ValueError, "function must be the same", lambda call=(kd.kd_loss if rank else other): call(s, t, **here)
        )
    # Backward has a sum over the ranks, which a rank without a gradient would not come to.
    top = kd.capture_topk(teacher, 3)
    mine = s.clone().requires_grad_(rank == 0)
    refused(
        ValueError,
        "student.requires_grad must be the same",
        lambda: kd.topk_kd_loss(mine, top.ids, top.logprobs, tail="uniform", **here),
    )
    # An error of one rank alone.
    wrong = labels.clone()
    if rank == 1:
        wrong[0] = VOCABULARY
    error, text = (ValueError, "labels") if rank == 1 else (RuntimeError, "rank 1 of process_group refused")
    refused(error, text, lambda: kd.kd_loss(s, t, wrong, ce_weight=1.0, **here))
    # And on, also where the facts are known, or are known of other widths.
    expected = kd.kd_loss(student, teacher, labels, ce_weight=1.0)
    close(kd.kd_loss(s, t, labels, ce_weight=1.0, **here), expected, "all")
    refused(error, text, lambda: kd.kd_loss(s, t, wrong, ce_weight=1.0, **here))
    columns = columns_of_rank((*widths()[0][:-2], *reversed(widths()[0][-2:])))
    s, t = student[:, columns].clone(), teacher[:, columns].contiguous()
    for _ in range(2):
        close(kd.kd_loss(s, t, labels, ce_weight=1.0, **here), expected, "other widths")
    with counted_collectives() as sent:
        kd.kd_loss(s, t, labels, ce_weight=1.0, **here)
    # Of one gathering all know that all agree.
    assert [name for name, _ in sent] == ["all_gather", "all_reduce", "all_reduce"]
    longer = (student[:, : s.shape[1] + (rank == 0)], teacher[:, : s.shape[1] + (rank == 0)])
    refused(ValueError, "labels", lambda: kd.kd_loss(*longer, labels + VOCABULARY, ce_weight=1.0, **here))


TEACHERS_OF_OPTIONS = (
    # The number of teachers, and options beside.
    (2, {"mixture": "probs", "teacher_weights": [0.3, 0.7], "temperature": 2.0, "teacher_softcap": 6.0}),
    (3, {"mixture": "logits", "teacher_weights": [1.0, 0.5, -0.5], "teacher_temperature": 1.5, "ce_weight": 0.3}),
    (2, {"teacher_weights": torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(0)), "reduction": "none"}),
    (2, {"teacher_form": "unnormalized_probs", "temperature": torch.tensor([1.0, 2, 3, 1, 2, 1])}),
    (0, {"teacher_form": "probs", "teacher_temperature": 0.5, "z_loss_weight": 0.01}),
    (0, {"teacher_form": "log_probs", "temperature": 2.0}),
)


def check_mixtures_and_forms_of_teachers():
    for seed, of_ranks in enumerate(widths()):
        student, _, labels = inputs(seed)
        for k, (count, options) in enumerate(TEACHERS_OF_OPTIONS):
            every = [inputs(20 + seed + j)[1] for j in range(count or 1)]
            every[0][1, 4] = -torch.inf
            form = options.get("teacher_form", "logits")
            every = [x.softmax(-1) if "probs" in form else x for x in every]
            every = [x.log() for x in every] if form == "log_probs" else every
            for divergence in ("forward_kl", "jsd"):
                for backend in BACKENDS[: 1 + (k % 2 == 0)]:
                    of_all = {**options, "divergence": divergence}
                    student = student.to((torch.float32, torch.bfloat16)[divergence == "jsd"])
                    held(kd.kd_loss, student, every if count else every[0], labels, of_ranks, backend, of_all)


def held(loss, student, teacher, labels, of_ranks, backend, options, cut=()):
    """``same`` of a loss whose teachers are cut as the student is, and the options of these names."""

    def sharded(s, columns):
        here = [x[:, columns] for x in teacher] if isinstance(teacher, list) else teacher[:, columns]
        local = {name: value[columns] if name in cut else value for name, value in options.items()}
        return loss(s, here, labels, backend=backend, process_group=group(), **local)

    told = (of_ranks, student.dtype, loss.__name__, backend, options)
    same(lambda s: loss(s, teacher, labels, backend="torch", **options), sharded, student, of_ranks, told)


def check_mixtures_of_many_blocks():
    from kdkernels import autograd

    student, teacher, labels = inputs(3)
    kept, autograd.PIECE_BYTES = autograd.PIECE_BYTES, 300
    try:
        for of_ranks in widths():
            options = {"mixture": "probs", "ce_weight": 0.5}
            held(kd.kd_loss, student, [teacher, inputs(4)[1]], labels, of_ranks, BACKENDS[0], options)
    finally:
        autograd.PIECE_BYTES = kept


def check_statistics():
    bias = torch.linspace(-1, 1, VOCABULARY)
    cases = (
        (0, {"ce_weight": 0.5, "label_smoothing": 0.1, "temperature": 2.0}),
        (0, {"divergence": "jsd", "teacher_softcap": 6.0, "student_softcap": 5.0, "kd_weight": BY_ROW}),
        (2, {"mixture": "probs", "teacher_temperature": 1.5}),
        (0, {"student_bias": bias, "kd_weight": 0.0, "ce_weight": 1.0}),
        (-1, {"kd_weight": 0.0, "ce_weight": 1.0, "temperature": 2.0}),
        (0, {"student_form": "log_probs"}),
    )
    for seed, of_ranks in enumerate(widths()):
        columns = columns_of_rank(of_ranks)
        student, teacher, labels = inputs(seed)
        # The largest on both sides of a cut, and twice.
        student[0, [3, 30]], teacher[0, [3, 36]] = 20.0, 20.0
        student[1, [3, 30]], teacher[1, 30] = 20.0, 20.0
        student[2, 36], teacher[2, 36] = 20.0, 20.0
        for count, options in cases:
            every = [teacher, inputs(9)[1]][: max(count, 1)]
            local = {name: value[columns] if name == "student_bias" else value for name, value in options.items()}
            for backend in BACKENDS:
                whole = every if count == 2 else every[0] if count == 0 else None
                mine = [x[:, columns] for x in every]
                mine = mine if count == 2 else mine[0] if count == 0 else None
                source = student.log_softmax(-1) if "student_form" in options else student
                expected, truth = kd.kd_loss(source, whole, labels, return_stats=True, backend="torch", **options)
                got, stats = kd.kd_loss(
                    source[:, columns], mine, labels, return_stats=True, backend=backend, process_group=group(), **local
                )
                close(got, expected, (of_ranks, backend, options))
                for name, one, other in zip(stats._fields, stats, truth, strict=True):
                    close(one, other, (name, of_ranks, backend, options))
        assert truth.agreement[1:3].tolist() == [0.0, 1.0]
        ids = teacher.topk(5).indices
        logprobs = teacher.log_softmax(-1).gather(1, ids)
        ids[4, 3:], ids[5] = -1, -1
        for backend in BACKENDS:
            for options in ({}, {"ce_weight": 0.3, "temperature": 2.0, "teacher_temperature": 1.0, "tail": "uniform"}):
                call = {"return_stats": True, **options}
                expected, truth = kd.topk_kd_loss(student, ids, logprobs, labels, backend="torch", **call)
                got, stats = kd.topk_kd_loss(
                    student[:, columns], ids, logprobs, labels, backend=backend, process_group=group(), **call
                )
                for name, one, other in zip(("loss", *stats._fields), (got, *stats), (expected, *truth), strict=True):
                    close(one, other, (name, of_ranks, backend, options))


def close(got, expected, what):
    of_value, _ = bars(expected.dtype)
    torch.testing.assert_close(got, expected, equal_nan=True, **of_value, msg=lambda text: f"{what}: {text}")


def check_operands_beside_the_logits():
    generator = torch.Generator().manual_seed(2)
    for seed, of_ranks in enumerate(widths()):
        student, teacher, labels = inputs(seed)
        log_probs = student.log_softmax(-1)
        columns = columns_of_rank(of_ranks)
        of_teacher = torch.randn(VOCABULARY, generator=generator)
        lse = torch.logsumexp(teacher, -1) + 0.3
        teacher[4] = -torch.inf
        plain, ends = {"ce_weight": 0.5, "label_smoothing": 0.1}, BACKENDS[: 1 + (seed == 0)]
        cases = [
            (log_probs, {"student_form": "log_probs", "divergence": name, "teacher_temperature": 2.0, **plain})
            for name in ("forward_kl", "reverse_kl", "jsd")
        ]
        cases += [(student, {"teacher_lse": lse, "divergence": name}) for name in ("forward_kl", "soft_ce", "tvd")]
        cases += [(student, {"teacher_bias": of_teacher, "teacher_softcap": 5.0, **plain})]
        for source, options in cases:
            # A teacher whose normaliser is elsewhere need not have any mass here.
            given = teacher if "teacher_lse" in options else teacher.clamp(min=-9)
            for backend in ends:
                held(kd.kd_loss, source, given, labels, of_ranks, backend, options, cut=("teacher_bias",))
        # A bias that learns, in bf16 too: the sums of the columns of a rounded gradient.
        for dtype in (torch.float32, torch.bfloat16):
            whole = torch.randn(VOCABULARY, generator=generator).requires_grad_()
            mine = whole.detach()[columns].clone().requires_grad_()
            s = student.to(dtype)
            options = {"temperature": 2.0, "student_softcap": 8.0, "divergence": "jsd", **plain}
            expected = kd.kd_loss(s, given, labels, student_bias=whole, **options)
            got = kd.kd_loss(
                s[:, columns], given[:, columns], labels, student_bias=mine, process_group=group(), **options
            )
            close(got, expected, of_ranks)
            expected.backward()
            got.backward()
            torch.testing.assert_close(mine.grad, whole.grad[columns], **bars(dtype)[1])


def check_gradients_of_the_teacher():
    for seed, of_ranks in enumerate(widths()):
        student, teacher, labels = inputs(seed)
        for name in ("forward_kl", "jsd", kd.SkewKL(0.1)):
            options = {"divergence": name, "temperature": 2.0, "kd_weight": BY_ROW, "ce_weight": 0.5}
            for dtype in (torch.float32, torch.bfloat16):
                held(by_teacher, teacher.to(dtype), student, labels, of_ranks, "auto", options)


def by_teacher(teacher, student, labels, **options):
    return kd.kd_loss(student, teacher, labels, **options)


def check_other_losses():
    for seed, of_ranks in enumerate(widths()):
        student, teacher, labels = inputs(seed)
        lse = torch.logsumexp(teacher, -1) + 0.3
        # Of sure models too.
        sure = torch.where(torch.arange(VOCABULARY) == labels.unsqueeze(-1), 30.0, teacher)
        student[5] = sure[5] + 1
        weight = {"row_weight": BY_ROW, "reduction": "none"}
        calls = [
            (kd.lk_loss, {"ce_weight": 0.5, "temperature": 2.0}),
            (kd.lk_loss, {"kind": "hybrid", "eta": 2.0, **weight}),
            (kd.lk_loss, {"teacher_lse": lse}),
            (kd.lk_loss, {"teacher_lse": lse, "kind": "hybrid"}),
            (kd.taid_loss, {"interpolation": 0.4, "temperature": 2.0, "ce_weight": 0.5}),
            (kd.taid_loss, {"interpolation": BY_ROW / 5, "divergence": "jsd", **weight}),
            (kd.dkd_loss, {"temperature": 2.0}),
            (kd.dkd_loss, {"alpha": 2.0, "beta": 0.5, "teacher_temperature": 0.7, **weight}),
            (kd.logit_mse_loss, {}),
            (kd.logit_mse_loss, weight),
        ]
        for loss, options in calls:
            for backend, dtype in (*((name, torch.float32) for name in BACKENDS), (BACKENDS[0], torch.bfloat16)):
                for t in (teacher, sure) if loss is kd.dkd_loss else (teacher,):
                    held(loss, student.to(dtype), t, labels, of_ranks, backend, options)
        columns = columns_of_rank(of_ranks)
        s, t = student[:, columns], teacher[:, columns]
        for name in ("nla", "hybrid"):
            _, truth = kd.lk_loss(student, teacher, labels, kind=name, return_stats=True, backend="torch")
            _, stats = kd.lk_loss(s, t, labels, kind=name, return_stats=True, process_group=group())
            for one, other in zip(stats, truth, strict=True):
                close(one, other, (of_ranks, name))
        bias = torch.linspace(-1, 1, VOCABULARY)[columns]
        over = [
            (kd.taid_loss, t, {"interpolation": 0.4}),
            (kd.dkd_loss, t, {}),
            (kd.kd_loss, [t, t + 1], {"mixture": "probs", "divergence": "jsd"}),
            (kd.kd_loss, t, {"student_bias": bias, "ce_weight": 0.5}),
        ]
        for loss, of_teacher, options in over:
            found = []
            for inplace in (False, True):
                leaf = s.bfloat16().requires_grad_()
                loss(leaf * 1, of_teacher, labels, inplace=inplace, process_group=group(), **options).backward()
                found.append(leaf.grad)
            assert torch.equal(*found), loss


def copies_of(size, profile):
    """The names of ops that copied as much as a tensor of ``size`` numbers."""
    names = ("aten::clone", "aten::copy_", "aten::cat")
    shapes = [(event.name, event.input_shapes) for event in profile.function_events if event.name in names]
    return [name for name, given in shapes if any(torch.Size(shape).numel() >= size for shape in given if shape)]


def check_logits_of_megatron_are_not_copied():
    """``[s, b, V / tp]`` as a column-parallel head leaves them, and the batch-first view that a loss is given."""
    world, (s, b, size) = dist.get_world_size(), (3, 4, 40)
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(s, b, size, generator=generator) for _ in range(2))
    labels = torch.randint(size, (b, s), generator=generator)
    labels[2, 1] = -100
    top = kd.capture_topk(teacher.transpose(0, 1), 3)
    columns = columns_of_rank((size // world,) * world)
    calls = {
        "kd_loss": lambda s, t, **more: kd.kd_loss(s, t, labels, ce_weight=0.5, divergence="jsd", **more),
        "topk_kd_loss": lambda s, t, **more: kd.topk_kd_loss(s, top.ids, top.logprobs, labels, ce_weight=0.5, **more),
        "token_logprobs": lambda s, t, **more: kd.token_logprobs(s, labels, **more).logprobs.sum(),
    }
    for name, call in calls.items():
        whole = student.clone().requires_grad_()
        mine = student[..., columns].clone().requires_grad_()
        its = teacher[..., columns].contiguous()
        expected = call(whole.transpose(0, 1), teacher.transpose(0, 1))
        expected.backward()
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            got = call(mine.transpose(0, 1), its.transpose(0, 1), process_group=group())
            got.backward()
        # The measure sees the copy that there is.
        with torch.autograd.profiler.profile(record_shapes=True) as of_copy:
            mine.detach().transpose(0, 1).contiguous()
        assert copies_of(mine.numel(), of_copy)
        if BACKENDS[0] == "cpu":
            assert not copies_of(mine.numel(), profile), name
        close(got, expected, name)
        torch.testing.assert_close(mine.grad, whole.grad[..., columns], **bars(torch.float32)[1])


def check_a_column_parallel_head_and_loss_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

    torch.manual_seed(0)
    size = 40
    head, x = torch.nn.Linear(8, size), torch.randn(2, 3, 8)
    teacher, labels = 3 * torch.randn(2, 3, size), torch.randint(size, (2, 3))
    expected, truth = kd.kd_loss(head(x), teacher, labels, ce_weight=0.5, return_stats=True)
    expected.backward()
    weight = head.weight.grad.clone()
    head.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    head = parallelize_module(head, mesh, plan)
    with loss_parallel():
        loss, stats = kd.kd_loss(head(x), teacher, labels, ce_weight=0.5, return_stats=True)
        loss.backward()
    close(loss.full_tensor(), expected, "loss")
    for one, other in zip(stats, truth, strict=True):
        close(one.full_tensor(), other, "statistics")
    torch.testing.assert_close(head.weight.grad.full_tensor(), weight, **bars(torch.float32)[1])


def check_rows_of_a_context_parallel_group():
    """Rows on some ranks, columns on others: the count of all rows divides the sum of a rank's own."""
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("rows", "columns"))
    student, teacher, labels = inputs(11)
    of_rows = (slice(0, 2), slice(2, ROWS))[mesh.get_local_rank("rows")]
    of_ranks = (VOCABULARY,) if world == 2 else (20, 17)
    first = sum(of_ranks[: mesh.get_local_rank("columns")])
    here = (of_rows, slice(first, first + of_ranks[mesh.get_local_rank("columns")]))
    whole, mine = student.clone().requires_grad_(), student[here].clone().requires_grad_()
    expected = kd.kd_loss(whole, teacher, labels, ce_weight=0.5)
    expected.backward()
    count = (labels[of_rows] != -100).sum()
    dist.all_reduce(count, group=mesh.get_group("rows"))
    columns = mesh.get_group("columns")
    loss = kd.kd_loss(mine, teacher[here], labels[of_rows], ce_weight=0.5, normalizer=count, process_group=columns)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh.get_group("rows"))
    close(total, expected.detach(), "loss")
    torch.testing.assert_close(mine.grad, whole.grad[here], **bars(torch.float32)[1])


def check_what_is_missing_is_named():
    student, teacher, labels = inputs(8)
    columns = columns_of_rank(widths()[0])
    s, t = student[:, columns].clone().requires_grad_(), teacher[:, columns].contiguous()
    here = {"process_group": group()}
    refused(
        ValueError,
        "standardize cannot be combined with process_group",
        lambda: kd.kd_loss(s, t, standardize=True, **here),
    )
    refused(ValueError, "dim=0 cannot be", lambda: kd.kd_loss(s, t, dim=0, **here))
    mapped = torch.arange(s.shape[1])
    refused(ValueError, "teacher_columns cannot be", lambda: kd.kd_loss(s, t, teacher_columns=mapped, **here))
    refused(ValueError, "inplace cannot be", lambda: kd.topk_kd_loss(s, labels, labels, inplace=True, **here))
    refused(ValueError, "centered cannot be", lambda: kd.logit_mse_loss(s, t, centered=True, **here))
    refused(TypeError, "unexpected option 'process_group'", lambda: kd.uld_loss(s, t, **here))
    wants = t.clone().requires_grad_()
    refused(ValueError, "a mixture of teachers gets a gradient from plain", lambda: kd.kd_loss(s, [t, wants], **here))
    refused(ValueError, "in taid_loss: it gets no gradient", lambda: kd.taid_loss(s, wants, interpolation=0.5, **here))
    refused(ValueError, "none negative", lambda: kd.kd_loss(s, t - 100, teacher_form="probs", **here))
    refused(
        TypeError, "process_group must be a torch.distributed.ProcessGroup", lambda: kd.kd_loss(s, t, process_group=1)
    )
    refused(ValueError, "columns of the student on every rank", lambda: kd.kd_loss(s, teacher, **here))
    refused(ValueError, "vocab_size must be at most", lambda: kd.kd_loss(s, t, vocab_size=VOCABULARY + 1, **here))
    for backend in BACKENDS:
        loss = kd.kd_loss(s, t, labels, backend=backend, **here)
        with pytest.raises(RuntimeError, match="of a sharded vocabulary has no second derivative"):
            torch.autograd.grad(loss, s, create_graph=True)
        with pytest.raises(RuntimeError, match="of a sharded vocabulary has a gradient in reverse mode only"):
            torch.func.grad(lambda x, b=backend: kd.kd_loss(x, t, labels, backend=b, **here))(s.detach())


def check_graphs_of_torch_compile_break_at_the_loss():
    if dist.get_world_size() > 2:
        return  # more ranks show nothing more, and compile each
    student, teacher, labels = inputs(9)
    top = kd.capture_topk(teacher, 5)
    calls = (
        lambda s, t, **here: kd.kd_loss(2 * s, t, labels, temperature=2.0, **here) * 3,
        lambda s, t, **here: kd.topk_kd_loss(2 * s, top.ids, top.logprobs, labels, **here) * 3,
        lambda s, t, **here: kd.token_logprobs(2 * s, labels, **here).logprobs.sum() * 3,
    )
    for call in calls:
        compiled = torch.compile(call, backend="aot_eager")
        shards = lambda s, c, f=compiled: f(s, teacher[:, c].contiguous(), process_group=group())  # noqa: E731
        for _ in range(2):
            same(lambda s, f=call: f(s, teacher), shards, student, widths()[0], "compiled")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = distribute_tensor(student, mesh, [Shard(-1)]), distribute_tensor(teacher, mesh, [Shard(-1)])
    compiled = torch.compile(calls[0], backend="aot_eager")
    torch.testing.assert_close(compiled(*columns).full_tensor(), calls[0](student, teacher))


def check_dtensors_sharded_by_columns_and_rows():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 2, VOCABULARY, generator=generator) for _ in range(2))
    labels = torch.randint(VOCABULARY, (4, 2), generator=generator)
    labels[1, 0] = -100
    top = kd.capture_topk(teacher, 5)
    layouts = [((world,), [Shard(-1)]), ((1, world), [Shard(0), Shard(-1)]), ((world, 1), [Shard(0), Shard(2)])]
    layouts += [((2, world // 2), [Replicate(), Shard(2)]), ((2, world // 2), [Shard(0), Shard(2)])]
    for shape, placements in layouts:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rows", "columns")[: len(shape)])
        placements = distribute_tensor(student, mesh, placements).placements
        by_rows = [Replicate() if getattr(p, "dim", 0) == 2 else p for p in placements]
        y = distribute_tensor(labels, mesh, by_rows)
        for reduction in ("mean", "none"):
            for of_teacher in (placements, by_rows):
                t = distribute_tensor(teacher, mesh, of_teacher)
                captured = kd.capture_topk(t, 5)
                torch.testing.assert_close(captured.logprobs.full_tensor(), top.logprobs)
                assert torch.equal(captured.ids.full_tensor(), top.ids)
                for call in (
                    lambda s, t, y, k, r=reduction: kd.kd_loss(s, t, y, ce_weight=0.5, divergence="jsd", reduction=r),
                    lambda s, t, y, k, r=reduction: kd.topk_kd_loss(
                        s, k.ids, k.logprobs, y, ce_weight=0.5, reduction=r
                    ),
                ):
                    whole = student.clone().requires_grad_()
                    mine = distribute_tensor(student, mesh, placements).requires_grad_()
                    expected, got = call(whole, teacher, labels, top), call(mine, t, y, captured)
                    torch.testing.assert_close(got.full_tensor(), expected)
                    (expected * expected).sum().backward()
                    (got * got).sum().backward()
                    assert mine.grad.placements == placements
                    torch.testing.assert_close(mine.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-6)
        found = kd.token_logprobs(distribute_tensor(student, mesh, placements), y, entropy=True)
        expected = kd.token_logprobs(student, labels, entropy=True)
        torch.testing.assert_close(found.logprobs.full_tensor(), expected.logprobs)
        torch.testing.assert_close(found.entropy.full_tensor(), expected.entropy)


def heads(seed, dtype=torch.float32):
    """Hidden states, head and bias of a student, the same of a teacher, and labels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, 8), (VOCABULARY, 8), (VOCABULARY,), (ROWS, 5), (VOCABULARY, 5), (VOCABULARY,))
    student_and_teacher = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[3] = -100
    return student_and_teacher[:3], student_and_teacher[3:], labels


def same_of_heads(one, shards, student, of_ranks, what):
    """As ``same``, of functions of hidden states, head and bias: the gradient of the hidden states is the whole."""
    columns, (of_value, of_gradient) = columns_of_rank(of_ranks), bars(student[0].dtype)
    whole = [item.clone().requires_grad_() for item in student]
    mine = [item[columns if k else slice(None)].clone().requires_grad_() for k, item in enumerate(student)]
    expected, got = one(*whole), shards(*mine, columns)
    told = {"msg": lambda text: f"{what}: {text}"}
    torch.testing.assert_close(got, expected, **of_value, **told)
    upstream = torch.linspace(0.5, 1.5, expected.numel()).to(expected.dtype).view(expected.shape)
    expected.backward(upstream)
    got.backward(upstream)
    torch.testing.assert_close(mine[0].grad, whole[0].grad, **of_gradient, **told)
    for its, truth in zip(mine[1:], whole[1:], strict=True):
        if truth.grad is None:  # of a bias that is left out
            continue
        torch.testing.assert_close(its.grad, truth.grad[columns], **of_gradient, **told)
    gathered = [torch.empty_like(mine[0].grad) for _ in of_ranks]
    dist.all_gather(gathered, mine[0].grad)
    values = [torch.empty_like(got) for _ in of_ranks]
    dist.all_gather(values, got.detach())
    assert all(torch.equal(item, gathered[0]) for item in gathered) and all(torch.equal(x, values[0]) for x in values)


# One or two rows of the widest shard: two chunks of student and teacher are there at a time.
SMALL_CHUNKS = {"chunk_bytes": 2 * 2 * 4 * 20}
LINEAR_OPTIONS = (
    {"ce_weight": 0.5, "z_loss_weight": 1e-2, **SMALL_CHUNKS},
    {**DENSE_OPTIONS[1], "divergence": "jsd", **SMALL_CHUNKS},
    {**DENSE_OPTIONS[2], "divergence": "reverse_kl", **SMALL_CHUNKS},
    {"divergence": kd.AlphaBeta(0.3, 0.7), "vocab_size": 30, "row_weight": BY_ROW},
)


def check_linear_losses_of_sharded_heads():
    for seed, of_ranks in enumerate(widths()):
        for k, options in enumerate(LINEAR_OPTIONS):
            for dtype in (torch.float32, (torch.bfloat16, torch.float64)[k % 2]):
                for backend in BACKENDS if dtype == torch.float32 else BACKENDS[:1]:
                    _linear(seed, of_ranks, dtype, backend, options, whole_teacher=k % 2 == 1)


def _linear(seed, of_ranks, dtype, backend, options, *, whole_teacher):
    student, (states, matrix, offset), labels = heads(seed, dtype)
    labels = labels.clamp(max=options.get("vocab_size", VOCABULARY) - 1)

    def shards(hidden, weight, bias, columns):
        teacher = (matrix, offset) if whole_teacher else (matrix[columns], offset[columns])
        more = {"student_bias": bias, "teacher_bias": teacher[1], "backend": backend, "process_group": group()}
        return kd.linear_kd_loss(hidden, weight, states, teacher[0], labels, **more, **options)

    same_of_heads(
        lambda h, w, b: kd.linear_kd_loss(
            h, w, states, matrix, labels, student_bias=b, teacher_bias=offset, backend="torch", **options
        ),
        shards,
        student,
        of_ranks,
        (of_ranks, dtype, backend, options),
    )


def check_linear_losses_of_mixtures_and_their_statistics():
    student, (states, matrix, offset), labels = heads(8)
    other = [0.5 * item.flip(0) for item in (states, matrix, offset)]
    two = {"teacher_weights": [0.3, 0.7], "mixture": "logits", "divergence": "jsd", "ce_weight": 0.5}
    for of_ranks in widths():
        columns = columns_of_rank(of_ranks)
        for several, options in (
            (True, {**two, "return_stats": True}),
            (True, {**two, "mixture": "probs"}),
            (False, {"return_stats": True, "temperature": 2.0, "ce_weight": 0.3}),
            (False, {"teacher_lse": 4.0}),
            (False, {"kind": "hybrid"}),
        ):
            loss = kd.linear_lk_loss if "kind" in options else kd.linear_kd_loss

            def all_of(hidden, weight, bias, own, several=several, loss=loss, options=options, **more):
                teacher = [states, matrix[own]], [other[0], other[1][own]]
                heads = zip(*teacher, strict=True) if several else teacher[0]
                biases = (offset[own], other[2][own]) if several else offset[own]
                found = loss(
                    *(hidden, weight), *heads, labels, student_bias=bias, teacher_bias=biases, **options, **more
                )
                return found if isinstance(found, tuple) else (found, ())

            whole, mine = slice(None), {"process_group": group(), **SMALL_CHUNKS}
            same_of_heads(
                lambda h, w, b, f=all_of: f(h, w, b, slice(None), backend="torch")[0],
                lambda h, w, b, c, f=all_of, m=mine: f(h, w, b, c, **m)[0],
                student,
                of_ranks,
                (of_ranks, options),
            )
            expected = all_of(*student, whole)[1]
            part = [item[columns] if k else item for k, item in enumerate(student)]
            for got, truth in zip(all_of(*part, columns, **mine)[1], expected, strict=True):
                torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
        ids, logprobs, _ = kd.capture_topk(states @ matrix.T, 4)
        expected = kd.linear_topk_kd_loss(*student[:2], ids, logprobs, labels, return_stats=True)
        got = kd.linear_topk_kd_loss(student[0], student[1][columns], ids, logprobs, labels, return_stats=True, **mine)
        for its, truth in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(its, truth, rtol=1e-5, atol=1e-5)


def check_linear_losses_without_a_teacher_or_a_gradient():
    (hidden, matrix, bias), (states, of_teacher, _), labels = heads(3)
    for of_ranks in widths():
        columns = columns_of_rank(of_ranks)
        same_of_heads(
            lambda h, w, b: kd.linear_kd_loss(h, w, labels=labels, student_bias=b, kd_weight=0.0, ce_weight=1.0),
            lambda h, w, b, c: kd.linear_kd_loss(
                h, w, labels=labels, student_bias=b, kd_weight=0.0, ce_weight=1.0, process_group=group()
            ),
            (hidden, matrix, bias),
            of_ranks,
            of_ranks,
        )
        expected = kd.linear_kd_loss(hidden, matrix, states, of_teacher)
        leaf = matrix[columns].clone().requires_grad_()
        # A head that learns behind hidden states that do not.
        got = kd.linear_kd_loss(hidden, leaf, states, of_teacher[columns], process_group=group(), **SMALL_CHUNKS)
        got.backward()
        assert hidden.grad is None and leaf.grad.isfinite().all()
        torch.testing.assert_close(got, expected)


def check_linear_losses_of_sparse_teachers():
    for seed, of_ranks in enumerate(widths()):
        for k, tail in enumerate((*TAILS, "renormalize_both")):
            # Of the shards in turn, which every dtype has alike.
            for dtype in (torch.float32, torch.bfloat16)[: 1 + (k % len(widths()) == seed)]:
                student, _, labels = heads(seed, dtype)
                top = kd.capture_topk(inputs(seed)[1], 5)
                ids = top.ids.clone()
                ids[2, 3:], ids[5], ids[1, 1] = -1, -1, ids[1, 0]
                # Of the last tail the K columns alone are multiplied.
                options = {"tail": tail, "reduction": "none" if k % 2 else "mean", **SMALL_CHUNKS}
                options |= {"ce_weight": 0.5, "label_smoothing": 0.1} if k < len(TAILS) else {"temperature": 2.0}
                given = (ids, top.logprobs, labels)
                same_of_heads(
                    lambda h, w, b, g=given, o=options: kd.linear_topk_kd_loss(
                        h, w, *g, student_bias=b, backend="torch", **o
                    ),
                    lambda h, w, b, c, g=given, o=options: kd.linear_topk_kd_loss(
                        h, w, *g, student_bias=b, process_group=group(), **o
                    ),
                    student,
                    of_ranks,
                    (of_ranks, dtype, options),
                )


def check_tokens_of_hidden_states():
    ids = torch.randint(VOCABULARY, (ROWS, 4), generator=torch.Generator().manual_seed(0))
    ids[0, 1], ids[4], ids[5, 1] = -1, -1, ids[5, 0]

    def graded(hidden, weight, bias, **more):
        found = kd.linear_token_logprobs(hidden, weight, ids, bias=bias, entropy=True, temperature=1.5, **more)
        return torch.cat([found.logprobs, found.entropy.unsqueeze(-1)], 1)

    for seed, of_ranks in enumerate(widths()):
        columns = columns_of_rank(of_ranks)
        for dtype in (torch.float32, torch.bfloat16):
            student, _, _ = heads(seed, dtype)
            for backend in BACKENDS:
                same_of_heads(
                    lambda h, w, b: graded(h, w, b, backend="torch"),
                    lambda h, w, b, c, k=backend: graded(h, w, b, backend=k, process_group=group(), **SMALL_CHUNKS),
                    student,
                    of_ranks,
                    (of_ranks, dtype, backend),
                )
            hidden, weight, bias = student
            mine = {"teacher_bias": bias[columns], "process_group": group(), **SMALL_CHUNKS}
            expected = kd.linear_gather_logprobs(hidden, weight, ids, teacher_bias=bias)
            for got, truth in zip(
                kd.linear_gather_logprobs(hidden, weight[columns], ids, **mine), expected, strict=True
            ):
                torch.testing.assert_close(got, truth, rtol=5e-6, atol=5e-6)


def check_heads_that_are_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    student, (states, matrix, offset), labels = heads(6)
    ids, logprobs, _ = kd.capture_topk(states @ matrix.T, 4)
    layouts = ((Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(0)))
    for placements, reduction in zip(layouts, ("mean", "none", "mean"), strict=True):
        whole = [item.clone().requires_grad_() for item in student]
        of_student = [Replicate(), placements[0], placements[0]]
        mine = [distribute_tensor(x, mesh, [p]).requires_grad_() for x, p in zip(student, of_student, strict=True)]
        its = [distribute_tensor(item, mesh, [placements[1]]) for item in (matrix, offset)]
        y = distribute_tensor(labels, mesh, [Replicate()])

        def losses(given, teacher, labels, reduction=reduction):
            h, w, b = given
            options = {"student_bias": b, "ce_weight": 0.5, "reduction": reduction}
            dense = kd.linear_kd_loss(h, w, states, teacher[0], labels, teacher_bias=teacher[1], **options)
            return dense + kd.linear_topk_kd_loss(h, w, ids, logprobs, labels, **options)

        expected, got = losses(whole, (matrix, offset), labels), losses(mine, its, y)
        torch.testing.assert_close(got.full_tensor(), expected)
        (expected * expected).sum().backward()
        (got * got).sum().backward()
        for truth, item in zip(whole, mine, strict=True):
            assert item.grad.placements == item.placements
            torch.testing.assert_close(item.grad.full_tensor(), truth.grad, rtol=1e-4, atol=1e-5)
    tokens = kd.linear_token_logprobs(mine[0], mine[1], ids, return_stats=True)
    for got, truth in zip(tokens, kd.linear_token_logprobs(whole[0], whole[1], ids, return_stats=True), strict=True):
        torch.testing.assert_close(got[0].full_tensor(), truth[0])
    gathered = kd.linear_gather_logprobs(mine[0], mine[1], ids)
    torch.testing.assert_close(gathered[1].full_tensor(), kd.linear_gather_logprobs(whole[0], whole[1], ids)[1])
    # A head of FSDP2 is sharded so too, and its ranks have rows of their own.
    refused(
        TypeError,
        "student_weight must be a plain tensor",
        lambda: kd.linear_kd_loss(student[0], mine[1], states, its[0]),
    )
    refused(
        TypeError, "student_weight must be a DTensor as", lambda: kd.linear_kd_loss(mine[0], matrix, states, its[0])
    )
    refused(
        ValueError,
        "process_group must not be given where student_hidden is a DTensor",
        lambda: kd.linear_kd_loss(mine[0], mine[1], states, its[0], process_group=group()),
    )
    sharded = distribute_tensor(student[0], mesh, [Shard(1)])
    refused(ValueError, "student_hidden must have one of", lambda: kd.linear_kd_loss(sharded, mine[1], states, its[0]))


def check_a_chunk_is_projected_while_numbers_of_the_one_before_travel():
    from kdkernels.heads import Head

    (hidden, matrix, _), (states, of_teacher, _), _ = heads(4)
    columns = columns_of_rank(widths()[0])
    told, kept = [], (dist.all_reduce, Head.project)

    class Logged:
        def __init__(self, work, elements):
            self.work, self.elements = work, elements

        def wait(self):
            told.append(("ended", self.elements))
            return self.work.wait()

    def all_reduce(tensor, *rest, **options):
        told.append(("begun", tensor.numel()))
        return Logged(kept[0](tensor, *rest, **options), tensor.numel())

    def project(*arguments):
        told.append(("product", 0))
        kept[1](*arguments)

    dist.all_reduce, Head.project = all_reduce, project
    try:
        leaf = hidden.clone().requires_grad_()
        kd.linear_kd_loss(leaf, matrix[columns], states, of_teacher[columns], process_group=group(), **SMALL_CHUNKS)
    finally:
        dist.all_reduce, Head.project = kept
    names = [name for name, _ in told]
    chunks = names.count("product") // 2
    assert chunks >= 3
    # Student's and teacher's, of all chunks but the first.
    assert "".join(name[0] for name in names).count("bppe") == chunks - 1, names
    # A maximum and a sum of numbers of rows; of hidden states a sum whose end is in the next chunk.
    assert names.count("begun") == names.count("ended") == 3 * chunks
    sums = [k for k, (name, elements) in enumerate(told) if name == "begun" and elements % hidden.shape[1] == 0]
    assert sum(elements for k, (name, elements) in enumerate(told) if k in sums) >= hidden.numel()
    assert any(names[k + 1] == "begun" for k in sums[:-1]), told


def check_heads_that_do_not_fit_are_refused():
    (hidden, matrix, bias), (states, of_teacher, _), labels = heads(5)
    columns, rank, here = columns_of_rank(widths()[0]), dist.get_rank(), {"process_group": group()}
    mine, its = matrix[columns], of_teacher[columns]
    for options, text in (
        ({"standardize": True}, "standardize cannot be combined with process_group in linear_kd_loss"),
        ({"teacher_form": "probs"}, "teacher_form='probs' cannot be"),
    ):
        refused(ValueError, text, lambda o=options: kd.linear_kd_loss(hidden, mine, states, its, **o, **here))
    refused(
        ValueError, "teacher_logits cannot be", lambda: kd.linear_kd_loss(hidden, mine, teacher_logits=print, **here)
    )
    refused(
        ValueError, "of the whole vocabulary", lambda: kd.linear_kd_loss(hidden, mine, states, of_teacher[1:], **here)
    )
    top = kd.capture_topk(hidden @ matrix.T, 3)
    refused(
        ValueError,
        "sparse_grad cannot be combined with process_group in linear_topk_kd_loss",
        lambda: kd.linear_topk_kd_loss(hidden, mine, *top[:2], sparse_grad=True, tail="renormalize_both", **here),
    )
    # Ranks that disagree, in a count of rows and in the gradient that is asked for.
    wrong = labels.clone()
    wrong[0] = -100 if rank == 1 else labels[0]
    refused(
        ValueError,
        "rows that count must be the same",
        lambda: kd.linear_kd_loss(hidden, mine, states, its, wrong, ce_weight=1.0, **here),
    )
    refused(
        ValueError,
        "hidden.requires_grad must be the same",
        lambda: kd.linear_kd_loss(hidden.clone().requires_grad_(rank == 1), mine, states, its, **here),
    )
    refused(
        ValueError,
        "weight.requires_grad must be the same",
        lambda: kd.linear_kd_loss(hidden, mine.clone().requires_grad_(rank == 1), states, its, **here),
    )
    leaf = hidden.clone().requires_grad_()
    for backend in BACKENDS:
        for reduction in ("sum", "none"):
            loss = kd.linear_kd_loss(leaf, mine, states, its, backend=backend, reduction=reduction, **here).sum()
            with pytest.raises(RuntimeError, match="of a sharded vocabulary has no second derivative"):
                torch.autograd.grad(loss, leaf, create_graph=True)
        rows = kd.linear_kd_loss(leaf, mine, states, its, backend=backend, reduction="none", **here)
        tokens = kd.linear_token_logprobs(leaf, mine, labels, backend=backend, **here).logprobs
        for found in (rows, tokens):
            with pytest.raises(RuntimeError, match="takes one gradient at a time"):
                torch.autograd.grad(found, leaf, torch.eye(ROWS), is_grads_batched=True)
        with pytest.raises(RuntimeError, match="of a sharded vocabulary has a gradient in reverse mode only"):
            torch.func.grad(lambda x, b=backend: kd.linear_kd_loss(x, mine, states, its, backend=b, **here))(hidden)


def check_a_graph_breaks_at_a_linear_loss():
    student, (states, matrix, _), labels = heads(7)
    compiled = torch.compile(
        lambda h, w, t, **here: kd.linear_kd_loss(2 * h, w, states, t, labels, **here) * 3, backend="aot_eager"
    )
    same_of_heads(
        lambda h, w, _: kd.linear_kd_loss(2 * h, w, states, matrix, labels) * 3,
        lambda h, w, _, c: compiled(h, w, matrix[c], process_group=group()),
        student,
        widths()[0],
        "compiled",
    )


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def start(rank, world, folder, seconds):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )


def main(rank, world, folder):
    start(rank, world, folder, 60)
    results, broken = {}, None
    for name, check in CHECKS.items():
        # The other ranks may wait in a collective for one that failed: nothing after it means anything.
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


def die(rank, world, folder):
    """The last rank ends before the others' second loss."""
    start(rank, world, folder, 20)
    student, teacher, labels = inputs(0)
    columns = columns_of_rank(widths()[0])
    s, t = student[:, columns].clone(), teacher[:, columns].contiguous()
    kd.kd_loss(s, t, labels, process_group=group())
    if rank == world - 1:
        os._exit(7)
    try:
        kd.kd_loss(s, t, labels, process_group=group())
        text = "no error"
    except RuntimeError as error:
        text = str(error)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(text))
    os._exit(0)


def run(program, world, folder):
    """The results that each rank wrote down."""
    # The package that this process tests, wherever it is.
    path = os.pathsep.join([str(Path(kd.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, program, str(rank), str(world), str(folder)],
            env={**os.environ, "PYTHONPATH": path, **LOOPBACK},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        texts = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = {}
    for rank, text in enumerate(texts):
        file = folder / f"rank{rank}.json"
        if program == "die" and rank == world - 1:
            continue
        assert file.exists(), f"rank {rank} ended without results:\n{text}"
        found[rank] = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The result of each check on each rank, by the number of ranks; one run serves all tests of this file."""
    found = {}

    def of(world):
        if world not in found:
            found[world] = run("main", world, tmp_path_factory.mktemp(f"ranks{world}"))
        return found[world]

    return of


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", WIDTHS)
def test_processes(world, check, results):
    for rank, found in results(world).items():
        assert found[check] is None, f"rank {rank}: {found[check]}"


def test_a_group_that_begins_anew_is_asked_anew():
    names = []
    for width in (4, 5):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        names.append(group().group_name)
        assert not shards._seen_by(group())
        kd.kd_loss(torch.randn(2, width), torch.randn(2, width), process_group=group())
        assert list(shards._seen_by(group()).values()) == [(width,)]
        dist.destroy_process_group()
    assert names[0] == names[1]


def test_a_rank_that_dies_is_named(tmp_path):
    for text in run("die", 2, tmp_path).values():
        assert "lost the other ranks of its process_group [0, 1]" in text, text
        assert "rank 1 does not answer" in text, text


if __name__ == "__main__":
    {"main": main, "die": die}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
