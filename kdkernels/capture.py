"""Teachers of K ids and log-probabilities a row, made from logits: the input of ``topk_kd_loss``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union, cast, get_args

import torch
from torch import Tensor

from kdkernels import backends, checks, distributed, ops, reference, servers
from kdkernels.choices import Backend
from kdkernels.launch import as_rows
from kdkernels.packing import TopKLayout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PerRow = Union[float, Tensor]
# The buffer of candidates in a GPU's shared memory holds as many.
MAX_K_ON_GPU = 2048
# capture_samples works through the rows in blocks of about this many logits, for it needs several fp64 copies of them.
SAMPLE_BLOCK = 2**22


class TeacherTopK(NamedTuple):
    """A sparse teacher, for ``topk_kd_loss(student, *teacher[:2], tail_logprob=teacher.tail_logprob)``.

    ids: int32 ``(..., K)``, -1 in slots that are not used. logprobs: natural log-probabilities ``(..., K)``.
    tail_logprob: ``(...)``, the log of the probability of all other ids together.

    ``capture_topk`` makes one of logits, and the class methods of what servers and data sets have. Their tail is what
    the entries leave, and no less than the rounding of float32 leaves open; a row without entries is all tail.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor

    @classmethod
    def from_vllm(cls, prompt_logprobs: Any, k: Optional[int] = None, *, device: Any = None) -> TeacherTopK:
        r"""Of vLLM's ``prompt_logprobs``, for the logits ``[:-1]`` of the same tokens.

        The first position, None, is left out, so that row i is about token i + 1: what the logits of token i are about.
        vLLM adds the token of the text to its K likeliest ones. It is an entry like the others, and a row then has
        K + 1; with ``k`` those of a rank above it are left out.

        Args:
            prompt_logprobs: of a ``RequestOutput`` of ``SamplingParams(prompt_logprobs=K)``, or of a server's JSON:
                a list of None or dicts from id to ``Logprob`` or ``{"logprob": ..., "rank": ...}``. ``logprobs`` of a
                ``CompletionOutput``, which has no None, has the rows of the generated tokens. A list of such lists is a
                batch, padded by rows without entries.
            k: keep the k likeliest entries.
            device: where the tensors are made.

        Returns:
            ``TeacherTopK`` of ``(L - 1, K)`` or ``(B, L - 1, K)``, the likeliest first.

        Raises:
            TypeError, ValueError: naming what is not as above.
        """
        texts, several = servers.vllm_texts(prompt_logprobs, k)
        return cls(*servers.tensors(texts, several=several, k=k, device=device))

    @classmethod
    def from_sglang(cls, input_top_logprobs: Any, k: Optional[int] = None, *, device: Any = None) -> TeacherTopK:
        r"""Of SGLang's ``meta_info["input_top_logprobs"]``, for the logits ``[:-1]`` of the same tokens.

        Args:
            input_top_logprobs: of ``return_logprob=True, top_logprobs_num=K, logprob_start_len=0``: a list of None or
                lists of ``(logprob, token id, text)``. ``output_top_logprobs``, which has no None, has the rows of the
                generated tokens. A list of such lists is a batch.
            k, device: as of ``from_vllm``.

        Returns:
            As ``from_vllm``.

        Raises:
            TypeError, ValueError: naming what is not as above.
        """
        texts, several = servers.sglang_texts(input_top_logprobs)
        return cls(*servers.tensors(texts, several=several, k=k, device=device))

    @classmethod
    def from_openai(
        cls, logprobs: Any, token_ids: Any, k: Optional[int] = None, *, missing: str = "error", device: Any = None
    ) -> TeacherTopK:
        r"""Of ``choice.logprobs`` of an API like OpenAI's, which names tokens by their texts.

        Rows are those of the generated tokens, for the logits of the positions before them; of a completion with
        ``echo=True`` also those of the prompt, whose first, None, is left out. Entries of -9999, by which such servers
        say that they have no number, are left out.

        Args:
            logprobs: ``choice.logprobs`` of a chat (``logprobs=True, top_logprobs=20``) or of a completion
                (``logprobs=20``), as an object or as a dict; or a list of them, which is a batch.
            token_ids: the tokenizer of the teacher, whose ids must be the student's; or a mapping from tokens to ids,
                by bytes or by text; or a function of the text. ``"token_id:17"``, as vLLM writes tokens with
                ``return_tokens_as_token_ids``, is 17 without it.
            k, device: as of ``from_vllm``.
            missing: "error", or "tail", which leaves tokens that ``token_ids`` does not know to the tail.

        Returns:
            As ``from_vllm``.

        Raises:
            TypeError, ValueError: naming what is not as above.
        """
        texts, several = servers.openai_texts(logprobs, token_ids, missing)
        return cls(*servers.tensors(texts, several=several, k=k, device=device))

    @classmethod
    def from_mask(cls, ids: Tensor, logprobs: Tensor, mask: Tensor) -> TeacherTopK:
        r"""Of ids and log-probabilities ``(..., K)`` with a mask of the slots that are used, as collators have them.

        Args:
            ids: int64 or int32; what stands in unused slots is not looked at.
            logprobs: natural log-probabilities, of the same shape; those of -9000 or less are unused too.
            mask: bool or 0 and 1, of the same shape, or of the shape of the rows.

        Returns:
            ``TeacherTopK`` with id -1 and log-probability -inf in unused slots.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        for name, value in (("ids", ids), ("logprobs", logprobs), ("mask", mask)):
            checks.tensor(name, value)
        if ids.dim() == 0 or ids.shape != logprobs.shape:
            raise ValueError(f"logprobs must have the shape of ids {tuple(ids.shape)}, got {tuple(logprobs.shape)}")
        if mask.shape == ids.shape[:-1]:
            mask = mask.unsqueeze(-1)
        elif mask.shape != ids.shape:
            raise ValueError(
                f"mask must have the shape of ids {tuple(ids.shape)} or of its rows, got {tuple(mask.shape)}"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
        used = mask.bool() & (logprobs > servers.LEAST_LOGPROB) & (ids >= 0)
        values = torch.where(used, logprobs.detach(), -torch.inf)
        return cls(torch.where(used, ids, -1).int(), values, servers.tail(values).to(checks.sum_dtype(values)))

    def pack(self, vocab_size: int, *, exact: bool = False, **extras: Tensor) -> Tensor:
        r"""All of it in one buffer of bytes, to be sent to another process: 272 a row for 64 of 128,256 tokens.

        Args:
            vocab_size: V, which says how many bits an id takes.
            exact: as in ``TopKLayout``, which says what is rounded: float32 log-probabilities, unless this is True, and
                float64.
            extras: further tensors of one number a row, such as ``labels``.

        Returns:
            uint8 ``(nbytes,)`` on the device of the tensors.

        Raises:
            TypeError, ValueError: naming the argument.

        Example:
            >>> teacher = capture_topk(torch.tensor([[2.0, 0, 1, -9]], dtype=torch.bfloat16), 2)
            >>> TeacherTopK.unpack(teacher.pack(4)).ids.tolist()
            [[0, 2]]
        """
        ids, logprobs, tail_logprob = self
        for name, value in (("ids", ids), ("logprobs", logprobs), *extras.items()):
            checks.tensor(name, value)
        layout = TopKLayout(
            ids.shape[:-1],
            ids.shape[-1] if ids.dim() else 0,
            vocab_size,
            dtype=torch.float32 if logprobs.dtype == torch.float64 else logprobs.dtype,
            exact=exact,
            extras={name: value.dtype for name, value in extras.items()},
        )
        return layout.pack(ids, logprobs, tail_logprob, extras)

    @classmethod
    def unpack(cls, buffer: Tensor, layout: Optional[TopKLayout] = None) -> TeacherTopK:
        r"""The teacher that ``pack`` made a buffer of. Extras are in ``TopKLayout.unpack(buffer).extras``.

        Args:
            buffer: uint8 ``(nbytes,)``.
            layout: what the buffer must be of. On a GPU it spares waiting for the buffer, which says it itself.

        Returns:
            ``TeacherTopK`` on the buffer's device, with int32 ids; none of it shares memory with the buffer.

        Raises:
            TypeError, ValueError: it is no packed teacher, or of another layout.
        """
        found = (TopKLayout.of(buffer) if layout is None else layout).unpack(buffer)
        return cls(found.ids, found.logprobs, cast(Tensor, found.tail_logprob))


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
    process_group: Optional[ProcessGroup] = None,
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

    Example:
        >>> teacher = capture_topk(torch.tensor([[0.0, 2, 1, 0]]), 2)
        >>> teacher.ids.tolist(), [round(x, 2) for x in teacher.logprobs[0].exp().tolist()]
        ([[1, 2]], [0.61, 0.22])
    """
    if distributed.among((teacher_logits, temperature)):
        options = {"k": k, "temperature": temperature, "vocab_size": vocab_size, "backend": backend}
        return distributed.of_tokens(capture_topk, teacher_logits, None, {**options, "process_group": process_group})
    if process_group is not None:
        from kdkernels.parallel import calls

        return calls.capture_topk(process_group, teacher_logits, k, temperature, vocab_size, backend)
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
def capture_topp(
    teacher_logits: Tensor,
    p: float,
    *,
    min_k: int = 1,
    max_k: Optional[int] = None,
    temperature: PerRow = 1.0,
    vocab_size: Optional[int] = None,
    backend: str = "auto",
) -> TeacherTopK:
    r"""The fewest tokens of each row that have a mass of p together, and the mass of all others (a nucleus).

    With ``p_v = softmax(t / T)`` in descending order, equal ones by the lower id, a row has::

        K = min k such that sum_{r <= k} p_(r) >= p          tail_logprob = log of the mass of all others

    tokens: the one that crosses p is among them. There is no bound on K but the vocabulary's size, unless ``max_k``
    sets one. The number of slots is the largest K of the rows; the others of a row are not used. The compiled backend
    finds K without a sort, and then takes the K largest as ``capture_topk`` does. The tail is summed, never subtracted.

    Args:
        teacher_logits: ``(..., V)``, as in ``capture_topk``. No gradient flows to them.
        p: in (0, 1]; with 1 a row has all tokens whose logit is above -inf.
        min_k: the fewest slots of a row, as far as it has tokens of a logit above -inf.
        max_k: the most slots of a row; the mass of what does not fit is in the tail.
        temperature: T > 0, a number or one value per row; for the tail "bucket", that of the loss.
        vocab_size: columns from there on are padding: no probability.
        backend: "auto", "cpu" (C++), "torch" (plain PyTorch: a full sort). On a GPU the sort finds K, and
            ``capture_topk`` does the rest. The largest K is read, which waits for the device.

    Returns:
        ``TeacherTopK`` of ids int32 ``(..., K)``, -1 in slots that are not used, logprobs ``(..., K)``, -inf there, and
        tail_logprob ``(...)``, for ``topk_kd_loss`` and ``kdkernels.cache``. Rows without a distribution as in
        ``capture_topk``.

    Raises:
        TypeError, ValueError: naming the argument, before anything is launched.

    Example:
        A teacher's 99 %, of at most 512 tokens, and the rest as one ghost token::

            teacher = kd.capture_topp(teacher_logits, 0.99, max_k=512)
            loss = kd.topk_kd_loss(student, *teacher[:2], tail_logprob=teacher.tail_logprob, tail="bucket")

        >>> capture_topp(torch.tensor([[0.0, 2, 1, 0]]), 0.8).ids.tolist()
        [[1, 2]]

    Reference:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, for the nucleus.
    """
    columns, temperature = _checked(teacher_logits, vocab_size, temperature)
    p = checks.number("p", p, low=0.0, high=1.0, exclusive_low=True)
    checks.integer("min_k", min_k, low=1)
    most = columns
    if max_k is not None:
        checks.integer("max_k", max_k, low=1)
        if min_k > max_k:
            raise ValueError(f"min_k must be at most max_k {max_k}, got {min_k}")
        most = min(max_k, columns)
    checks.choice("backend", backend, get_args(Backend))
    logits = teacher_logits.detach()
    name = backends.choose(backend, logits, pattern="topp_count")
    if name == "torch":
        counts = _counted_in_blocks(logits.reshape(-1, logits.shape[-1]), p, temperature, columns)
    else:
        rows, number = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
        options = {"p": p, "temperature": number, "vocab_size": columns}
        counts = ops.call("topp_count", name, (as_rows((logits,))[0], rows), options)
    counts = counts.clamp(min=min_k).clamp(max=most)
    k = int(counts.max()) if counts.numel() else min(min_k, most)
    of_rows = temperature.reshape(logits.shape[:-1]) if isinstance(temperature, Tensor) else temperature
    found = capture_topk(logits, k, temperature=of_rows, vocab_size=vocab_size, backend=backend)
    used = torch.arange(k, device=logits.device) < counts.reshape(*logits.shape[:-1], 1)
    others = torch.logsumexp(torch.where(used, -torch.inf, found.logprobs), -1)
    return TeacherTopK(
        torch.where(used, found.ids, -1),
        torch.where(used, found.logprobs, -torch.inf),
        torch.logaddexp(found.tail_logprob, others).clamp(max=0.0),
    )


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

    Example:
        >>> teacher = capture_samples(torch.tensor([[0.0, 99, 0, 0]]), 8)
        >>> teacher.ids[teacher.ids >= 0].unique().tolist()
        [1]
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


def _counted_in_blocks(logits: Tensor, p: float, temperature: PerRow, columns: int) -> Tensor:
    """Some rows at a time: sorting takes copies of the logits."""
    step = max(1, SAMPLE_BLOCK // logits.shape[-1])
    counts = []
    for start in range(0, max(len(logits), 1), step):
        rows = slice(start, start + step)
        of_rows = temperature[rows] if isinstance(temperature, Tensor) else temperature
        counts.append(reference.topp_rows(logits[rows], p=p, temperature=of_rows, vocab_size=columns))
    return torch.cat(counts)


def _checked(logits: Tensor, vocab_size: Optional[int], temperature: PerRow) -> tuple[int, PerRow]:
    checks.logits("teacher_logits", logits)
    columns = checks.vocabulary(vocab_size, logits, "teacher_logits")
    return columns, checks.per_row("temperature", temperature, logits, low=0.0)


def _shaped(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> TeacherTopK:
    leading = logits.shape[:-1]
    return TeacherTopK(
        ids.reshape(*leading, ids.shape[1]), logprobs.reshape(*leading, ids.shape[1]), tail.reshape(leading)
    )
