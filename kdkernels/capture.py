"""Teachers of K ids and log-probabilities a row, made from logits: the input of ``topk_kd_loss``."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union, get_args

import torch
from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.choices import Backend
from kdkernels.launch import as_rows

PerRow = Union[float, Tensor]
# The buffer of candidates in a GPU's shared memory holds as many.
MAX_K_ON_GPU = 2048
# capture_samples works through the rows in blocks of about this many logits, for it needs several fp64 copies of them.
SAMPLE_BLOCK = 2**22


class TeacherTopK(NamedTuple):
    """A sparse teacher, for ``topk_kd_loss(student, *teacher[:2], tail_logprob=teacher.tail_logprob)``.

    ids: int32 ``(..., K)``, -1 in slots that are not used. logprobs: natural log-probabilities ``(..., K)``.
    tail_logprob: ``(...)``, the log of the probability of all other ids together.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor


class TeacherExpectation(NamedTuple):
    """A teacher by what a student with a frozen head needs of it, for ``linear_kd_loss(..., teacher_expectation=...)``.

    With the teacher's p, and the student's head W and bias b: expectation ``(..., D)`` is ``p W``, entropy ``(...)``
    that of p in nats, bias ``(...)`` is ``p b``, or None where the head has no bias. temperature is the teacher's, a
    number or one value per row.
    """

    expectation: Tensor
    entropy: Tensor
    bias: Optional[Tensor] = None
    temperature: PerRow = 1.0


def capture_topk(
    teacher_logits: Tensor,
    k: int,
    *,
    temperature: PerRow = 1.0,
    vocab_size: Optional[int] = None,
    backend: str = "auto",
) -> TeacherTopK:
    r"""The k most likely tokens of each row, and the mass of all others, in one read of the logits.

    With ``p = softmax(t / T)`` and S the k largest logits::

        ids, logprobs = topk(t), log p there        tail_logprob = log sum_{v not in S} p_v

    in the order of the logits, equal ones by the lower id. The tail is summed over the ids outside S, so that it is
    exact however small it is. No gradient flows to the logits.

    Args:
        teacher_logits: ``(..., V)``, float32, bfloat16 or float16 (float64 on the CPU), with stride 1 in the last
            dimension.
        k: from 1 to V (to ``vocab_size``).
        temperature: T > 0, a number or one value per row; for the tail "bucket", that of the loss.
        vocab_size: columns from there on are padding: no probability.
        backend: "auto", "cuda", "triton" (k up to 2048 each; two reads of rows over 32768), "cpu" (C++), "torch" (plain
            PyTorch: a full sort).

    Returns:
        ``TeacherTopK`` of ids int32 ``(..., k)``, logprobs ``(..., k)`` and tail_logprob ``(...)``, float32 (float64
        for float64). Tokens of logit -inf are never among the ids: a row with fewer than k others ends in slots of id
        -1 and log-probability -inf. A row with NaN or +inf, or of -inf only, has no distribution: its log-probabilities
        and its tail are NaN, at the ids 0 to k - 1, so that a loss on it is NaN too.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched.
    """
    columns, temperature = _checked(teacher_logits, vocab_size, temperature)
    checks.integer("k", k, low=1)
    if k > columns:
        raise ValueError(f"k must be at most the vocabulary's size {columns}, got {k}")
    checks.choice("backend", backend, get_args(Backend))
    teacher = teacher_logits.detach()
    too_many = f"a GPU captures at most {MAX_K_ON_GPU} entries a row" if k > MAX_K_ON_GPU else None
    torch_only = None if teacher.device.type == "cpu" else too_many
    name = backends.choose(backend, teacher, torch_only=torch_only, pattern="capture_topk")
    if name == "torch":
        flat = teacher.reshape(-1, teacher.shape[-1])
        found = reference.capture_rows(flat, k=k, temperature=temperature, vocab_size=columns)
    else:
        rows, number = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
        options = {"k": k, "vocab_size": columns, "temperature": number}
        found = ops.call("capture_topk", name, (as_rows((teacher,))[0], rows), options)
    return _shaped(teacher, *found)


@torch.no_grad()
def capture_samples(
    teacher_logits: Tensor,
    n: int,
    *,
    proposal_power: float = 1.0,
    temperature: PerRow = 1.0,
    generator: Optional[torch.Generator] = None,
    vocab_size: Optional[int] = None,
) -> TeacherTopK:
    r"""n tokens a row drawn from the teacher, weighted to be an unbiased estimate of it (random-sampling KD).

    With ``p = softmax(t / T)``, n ids are drawn with replacement from ``q ~ p^proposal_power``. An id drawn ``c`` times
    has one slot, with the weight::

        w_v = c_v / n * p_v / q_v          E[w_v] = p_v for every v of the vocabulary

    which with ``proposal_power=1`` is ``c_v / n``. The weights are not normalised: their sum is 1 on average, and
    exactly 1 only for power 1; dividing by it would bias them. ``topk_kd_loss(student, *samples[:2], tail="drop")``
    then has the gradient of the full forward KL on average.

    Args:
        teacher_logits: ``(..., V)``, as in ``capture_topk``; any device, through PyTorch.
        n: the number of draws, and of slots, of each row.
        proposal_power: >= 0. Under 1 rare tokens are drawn more often, with lower weights; 0 draws all alike.
        temperature: T > 0, a number or one value per row.
        generator: of the logits' device, for results that can be had again; by default PyTorch's own.
        vocab_size: columns from there on are padding: never drawn.

    Returns:
        ``TeacherTopK`` of ids int32 ``(..., n)`` in ascending order, then -1 in slots that are left; logprobs
        ``(..., n)``, the logs of the weights, -inf in those slots; and a tail_logprob of -inf, for "drop" has no tail.
        A row without a distribution has NaN weights.

    Raises:
        TypeError, ValueError: naming the argument.

    Reference:
        Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", arXiv:2503.16870.
    """
    columns, temperature = _checked(teacher_logits, vocab_size, temperature)
    checks.integer("n", n, low=1)
    checks.number("proposal_power", proposal_power, low=0.0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != teacher_logits.device.type:
        raise ValueError(f"generator must be on the logits' device {teacher_logits.device}, got {generator.device}")
    flat = teacher_logits.reshape(-1, teacher_logits.shape[-1])
    step = max(1, SAMPLE_BLOCK // max(columns, n))
    blocks = [
        reference.sample_rows(
            flat[start : start + step],
            n=n,
            proposal_power=float(proposal_power),
            temperature=temperature[start : start + step] if isinstance(temperature, Tensor) else temperature,
            vocab_size=columns,
            generator=generator,
        )
        for start in range(0, max(len(flat), 1), step)
    ]
    ids, logprobs = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return _shaped(teacher_logits, ids, logprobs, logprobs.new_full((len(flat),), -torch.inf))


def _checked(logits: Tensor, vocab_size: Optional[int], temperature: PerRow) -> tuple[int, PerRow]:
    checks.logits("teacher_logits", logits)
    columns = checks.vocabulary(vocab_size, logits, "teacher_logits")
    return columns, checks.per_row("temperature", temperature, logits, low=0.0)


def _shaped(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> TeacherTopK:
    leading = logits.shape[:-1]
    return TeacherTopK(
        ids.reshape(*leading, ids.shape[1]), logprobs.reshape(*leading, ids.shape[1]), tail.reshape(leading)
    )
