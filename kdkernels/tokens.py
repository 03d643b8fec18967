"""Log-probabilities of given tokens: with a gradient for whoever samples, without one for a teacher's answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, Union, overload

import torch
from torch import Tensor

from kdkernels import backends, checks, distributed, reference, symbols
from kdkernels.autograd import TokenCall, token_values
from kdkernels.capture import MAX_K_ON_GPU, SAMPLE_BLOCK, TeacherTopK
from kdkernels.launch import flat
from kdkernels.objective import PerRow, TokenOptions, takes
from kdkernels.reduction import num_rows
from kdkernels.stats import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from kdkernels import options as keywords


class TokenLogprobs(NamedTuple):
    """The results of ``token_logprobs``.

    logprobs: natural log-probabilities of the shape of the ids. entropy: in nats, of the shape of the rows, or None.
    lse: ``logsumexp(logits / T)`` of the shape of the rows; it passes no gradient.
    """

    logprobs: Tensor
    entropy: Optional[Tensor]
    lse: Tensor


@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[keywords.TokenOptions],
) -> TokenLogprobs: ...
@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[keywords.TokenOptions],
) -> tuple[TokenLogprobs, TokenStats]: ...
@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    return_stats: bool,
    **options: Unpack[keywords.TokenOptions],
) -> Union[TokenLogprobs, tuple[TokenLogprobs, TokenStats]]: ...
@takes(TokenOptions)
def token_logprobs(logits: Tensor, ids: Tensor, **options: Any) -> Any:
    r"""Log-probabilities of given tokens, and the entropy, with a gradient from whatever a loss makes of them.

    With ``u = cap(logits) / T``, ``lse = logsumexp(u)`` and ``q = softmax(u)``::

        logprobs = u[id] - lse          entropy = lse - sum_v q_v u_v

    and from their gradients ``g`` and ``h``, in backward::

        dlogits_v = 1/T (sum_j g_j [v = id_j] - q_v sum_j g_j - h q_v (log q_v + entropy))

    Forward reads the logits once, backward reads them once and writes their gradient; beside the logits a few numbers a
    row are kept in between. Every loss on samples is a function of the result: policy gradients and their ratios, the
    estimators of a reverse KL, cross entropy with a weight per token.

    Args:
        logits: ``(..., V)``, float32, bfloat16 or float16 (float64 on the CPU). Any strides with stride 1 in the last
            dimension; nothing is copied.
        ids: int64 or int32, a token a row ``(...)`` or K of them ``(..., K)``, which may be equal; any strides. -1 and
            ``ignore_index`` stand for no token: log-probability 0, no gradient. A row without a token has entropy and
            lse 0 too, and its logits are not read.
        temperature: T > 0, a number or one value per row.
        entropy: also return the entropy of q, with its gradient.
        return_stats: also return ``TokenStats``, from the same read: ``log sum_v q_v^2``, the mean logit, and whether
            an id has the largest logit of its row. They pass no gradient.
        softcap: cap > 0 of ``cap * tanh(logits / cap)``, applied first (Gemma 2).
        vocab_size: columns from there on are padding: no probability, gradient 0.
        ignore_index: an id that is no token, besides -1.
        inplace_backward: backward writes the gradient over the logits: it allocates no ``[N, V]``, and the logits are
            gone then. Eager only; needs logits that require grad, whose rows share no memory. Where their values are
            still needed, for ``retain_graph=True`` or hooks on saved tensors have them, backward allocates as usual.
        backend: "auto", "cuda" or "triton" (K up to 2048), "cpu" (C++) or "torch" (plain PyTorch, the reference).

    Returns:
        ``TokenLogprobs(logprobs, entropy, lse)``, float32 (float64 for float64); with ``return_stats`` a pair
        ``(TokenLogprobs, TokenStats)``. A token of logit -inf has log-probability -inf and a finite gradient. A row
        with NaN or +inf, or of -inf only, is NaN in all results and in its gradient. A row whose upstream gradients are
        all 0 gets a gradient of 0 without being read; plain PyTorch reads it, be it NaN.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched. Values inside tensors are read on the
            CPU always, on a GPU only when ``KDKERNELS_DEBUG=1``: unread, an id out of range gives NaN.
        RuntimeError: a second derivative, or a transform of ``torch.func``, where the backend is not "torch".

    Example:
        A policy gradient with the reverse KL to a teacher as its reward, on tokens that the student sampled::

            student = kd.token_logprobs(logits, tokens).logprobs
            teacher = kd.token_logprobs(teacher_logits.detach(), tokens).logprobs
            loss = ((student - teacher).detach() * student)[mask].mean()

    Example:
        >>> found = token_logprobs(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(found.logprobs.item(), 4)  # log 1/4
        -1.3863
    """
    given = TokenOptions.of(options)
    if distributed.among((logits, ids, *given.tensors)):
        return distributed.of_tokens(token_logprobs, logits, ids, given.given())
    if given.process_group is not None:
        from kdkernels.parallel import calls

        return calls.token_logprobs(given, logits, ids)
    checks.logits("logits", logits)
    if given.inplace_backward:
        checks.inplace_allowed(logits, "inplace_backward", "logits tensor")
    columns = checks.vocabulary(given.vocab_size, logits, "logits")
    tokens = checks.token_ids(ids, logits, columns, given.ignore_index)
    call = token_call(given, logits, tokens, columns)
    checks.reverse_mode_only(call.backend, logits, ids, *given.tensors)
    found = token_values(call, logits, tokens, inplace=given.inplace_backward)
    return shaped(found.logprobs, found.entropy, found.lse, found.stats, logits.shape[:-1], ids.shape)


def shaped(
    logprobs: Tensor,
    entropy: Optional[Tensor],
    lse: Tensor,
    stats: Optional[Tensor],
    rows: torch.Size,
    ids: torch.Size,
) -> Any:
    """Results of rows ``[N]`` and slots ``[N, K]`` in the shapes of the rows and of the ids; a pair with statistics."""
    entropy = None if entropy is None else entropy.reshape(rows)
    found = TokenLogprobs(logprobs.reshape(ids), entropy, lse.reshape(rows))
    if stats is None:
        return found
    return found, TokenStats(stats[:, 0].reshape(rows), stats[:, 1].reshape(rows), (stats[:, 2:] != 0).reshape(ids))


def gather_logprobs(
    teacher_logits: Tensor,
    ids: Tensor,
    *,
    temperature: PerRow = 1.0,
    vocab_size: Optional[int] = None,
    softcap: Optional[float] = None,
    process_group: Optional[ProcessGroup] = None,
    backend: str = "auto",
) -> TeacherTopK:
    r"""A teacher's log-probabilities at ids of somebody's choice, and the mass of all others, as a ``TeacherTopK``.

    With ``p = softmax(cap(t) / T)`` and S the ids of a row::

        logprobs = log p there        tail_logprob = log sum_{v not in S} p_v

    The tail is summed over the ids outside S, so that it is exact however small it is. No gradient flows to the logits.

    Args:
        teacher_logits: ``(..., V)``, as in ``token_logprobs``.
        ids: int64 or int32 ``(..., K)``; -1 in slots that are not used.
        temperature: T > 0, a number or one value per row; for the tail "bucket", that of the loss.
        vocab_size: columns from there on are padding: no probability.
        softcap: cap > 0 of ``cap * tanh(logits / cap)``, applied first.
        backend: "auto", "cuda" or "triton" (K up to 2048), "cpu" (C++) or "torch" (plain PyTorch, some rows at a time).

    Returns:
        ``TeacherTopK`` of ids int32 ``(..., K)``, logprobs ``(..., K)`` and tail_logprob ``(...)``, float32 (float64
        for float64). Slots that are not used have log-probability -inf. Of an id that stands more than once in a row
        the first slot is used, the others get -1, so that its mass counts once. A row with NaN or +inf, or of -inf
        only, has no distribution: its log-probabilities and its tail are NaN. In a row without ids the tail is 0.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched.

    Example:
        Reverse KL on the student's own top K, as on-policy self-distillation has it (SDFT, SDPO)::

            ids = kd.capture_topk(logits, 100).ids
            teacher = kd.gather_logprobs(teacher_logits, ids)
            loss = kd.topk_kd_loss(logits, *teacher[:2], tail_logprob=teacher.tail_logprob, divergence="reverse_kl")

    Example:
        >>> found = gather_logprobs(torch.zeros(1, 4), torch.tensor([[0, 2]]))
        >>> [round(x.exp().item(), 4) for x in (*found.logprobs[0], found.tail_logprob)]
        [0.25, 0.25, 0.5]
    """
    given = TokenOptions.of(
        {
            "temperature": temperature,
            "vocab_size": vocab_size,
            "softcap": softcap,
            "process_group": process_group,
            "backend": backend,
        }
    )
    if distributed.among((teacher_logits, ids, *given.tensors)):
        return distributed.of_tokens(gather_logprobs, teacher_logits, ids, given.given())
    if process_group is not None:
        from kdkernels.parallel import calls

        return calls.gather_logprobs(given, teacher_logits, ids)
    checks.logits("teacher_logits", teacher_logits)
    columns = checks.vocabulary(vocab_size, teacher_logits, "teacher_logits")
    tokens = checks.token_ids(ids, teacher_logits, columns, -1)
    checks.slots_of_rows(ids, teacher_logits)
    tokens, logits = first_of_equals(tokens), teacher_logits.detach()
    call = token_call(given, logits, tokens, columns)
    call = call._replace(options={**call.options, "tail_mass": True, "ignore_index": -1})
    tail: Optional[Tensor]
    if call.backend == "torch":
        logprobs, tail = _gathered_in_blocks(call, flat(logits), tokens)
    else:
        logprobs, _, _, outside, _ = token_values(call, logits, tokens)
        assert outside is not None
        tail = outside
    logprobs = torch.where(tokens == -1, -torch.inf, logprobs)
    return TeacherTopK(
        tokens.to(torch.int32).reshape(ids.shape),
        logprobs.reshape(ids.shape),
        tail.reshape(logits.shape[:-1]),
    )


def token_call(given: TokenOptions, logits: Tensor, tokens: Tensor, columns: int) -> TokenCall:
    too_many = None
    if logits.device.type != "cpu" and tokens.shape[1] > MAX_K_ON_GPU:
        too_many = f"a GPU takes at most {MAX_K_ON_GPU} ids a row"
    backend = backends.choose(given.backend, logits, torch_only=too_many, pattern="token_fwd")
    rows = None
    options = {**given.scalars, "vocab_size": columns}
    if isinstance(given.temperature, Tensor):
        value = checks.per_row("temperature", given.temperature, logits, low=0.0)
        assert isinstance(value, Tensor)
        rows = value
    elif symbols.is_symbol(given.temperature):
        # A tensor, which backward may keep.
        value = symbols.as_tensor(given.temperature, checks.sum_dtype(logits), logits.device)
        rows, options["temperature"] = value.expand(num_rows(logits)), 1.0
    return TokenCall(backend, rows, options)


def first_of_equals(ids: Tensor) -> Tensor:
    """The ids ``[N, K]``, with -1 for those that stood in an earlier slot of their row."""
    found, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(found, dtype=torch.bool)
    again[:, 1:] = found[:, 1:] == found[:, :-1]
    return torch.where(torch.zeros_like(again).scatter(1, order, again), -1, ids)


def _gathered_in_blocks(call: TokenCall, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows at a time: the mass outside the ids takes copies of the logits."""
    options = call.reference_options()
    if torch.compiler.is_compiling():
        # The number of rows may be a symbol, of which no loop is made.
        whole = reference.token_rows(logits, tokens, **options)
        assert whole.tail is not None
        return whole.logprobs, whole.tail
    step = max(1, SAMPLE_BLOCK // logits.shape[-1])
    temperature = options.pop("temperature")
    blocks = []
    for start in range(0, max(len(logits), 1), step):
        rows = slice(start, start + step)
        of_rows = temperature[rows] if isinstance(temperature, Tensor) else temperature
        blocks.append(reference.token_rows(logits[rows], tokens[rows], temperature=of_rows, **options))
    tails: Any = [block.tail for block in blocks]
    return torch.cat([block.logprobs for block in blocks]), torch.cat(tails)
