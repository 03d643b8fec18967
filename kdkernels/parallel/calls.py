"""The public functions of tokens and captures, where ``process_group`` says that the vocabulary is sharded."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.autograd import TokenCall
from kdkernels.capture import MAX_K_ON_GPU, TeacherTopK
from kdkernels.launch import as_rows
from kdkernels.objective import Options, TokenOptions
from kdkernels.parallel.shards import Shards, outside_graphs, shards_of
from kdkernels.parallel.tokens import part_of, picked_logits, rows_of, sharded_values
from kdkernels.reference.dense import column
from kdkernels.tokens import first_of_equals, shaped, token_call


def facts_of(function: str, options: Options, logits: Tensor, **more: Any) -> dict[str, Any]:
    """Of a call, what all ranks must have in common, by name."""
    given = {name: value for name, value in options.given().items() if name != "process_group"}
    told = sorted((name, "tensor" if isinstance(value, Tensor) else str(value)) for name, value in given.items())
    return {"function": function, "rows": logits.shape[:-1].numel(), "dtype": logits.dtype, "options": told, **more}


@outside_graphs
def token_logprobs(given: TokenOptions, logits: Tensor, ids: Any) -> Any:
    """``kdkernels.token_logprobs`` of a shard."""
    checks.shard("logits", logits)
    if given.inplace_backward:
        checks.inplace_allowed(logits, "inplace_backward", "logits tensor")
    facts = facts_of("token_logprobs", given, logits, ids=getattr(ids, "shape", None))

    def check(total: int) -> tuple[Tensor, TokenCall]:
        tokens = checks.token_ids(ids, logits, total, given.ignore_index)
        call = token_call(given, logits, tokens, total)
        checks.reverse_mode_only(None, logits, ids, *given.tensors)
        return tokens, call

    shards, (tokens, call) = shards_of(given.process_group, logits, given.vocab_size, facts, check)
    logprobs, entropy, lse, _, stats = sharded_values(call, logits, tokens, shards, inplace=given.inplace_backward)
    of_entropy = entropy if given.entropy else None
    of_stats = stats if given.return_stats else None
    return shaped(logprobs, of_entropy, lse.detach(), of_stats, logits.shape[:-1], ids.shape)


@outside_graphs
def gather_logprobs(given: TokenOptions, teacher_logits: Tensor, ids: Any) -> TeacherTopK:
    """``kdkernels.gather_logprobs`` of a shard."""
    checks.shard("teacher_logits", teacher_logits)
    logits = teacher_logits.detach()

    def check(total: int) -> tuple[Tensor, TokenCall]:
        tokens = checks.token_ids(ids, logits, total, -1)
        checks.slots_of_rows(ids, logits)
        tokens = first_of_equals(tokens)
        call = token_call(given, logits, tokens, total)
        return tokens, call._replace(options={**call.options, "tail_mass": True, "ignore_index": -1})

    facts = facts_of("gather_logprobs", given, logits, ids=getattr(ids, "shape", None))
    shards, (tokens, call) = shards_of(given.process_group, logits, given.vocab_size, facts, check)
    logprobs, _, _, tail, _ = sharded_values(call, logits, tokens, shards)
    logprobs = torch.where(tokens == -1, -torch.inf, logprobs)
    return TeacherTopK(
        tokens.to(torch.int32).reshape(ids.shape), logprobs.reshape(ids.shape), tail.reshape(logits.shape[:-1])
    )


class _Candidates:
    """The k largest of a shard's columns ``[N, k]``."""

    def __init__(self, shards: Shards, logits: Tensor, ids: Tensor, k: int) -> None:
        """``ids [N, <= k]`` are columns of this rank in the order of their ``logits``, -1 where there is none."""
        none = ids == -1
        logits = torch.where(none, -torch.inf, logits)
        ids = torch.where(none, -1, ids + shards.first)
        missing = k - ids.shape[1]
        self.logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        self.ids = torch.nn.functional.pad(ids, (0, missing), value=-1)

    def packed(self, *numbers: Tensor) -> Tensor:
        """Beside some numbers of the rows, for the other ranks: an id is the bits of a float."""
        of_ids = self.ids.to(torch.int32).view(torch.float32) if self.logits.dtype == torch.float32 else self.ids
        return torch.cat([self.logits, of_ids.to(self.logits.dtype), *(x.unsqueeze(-1) for x in numbers)], 1)


@outside_graphs
def capture_topk(
    group: Any,
    teacher_logits: Tensor,
    k: int,
    temperature: Any,
    vocab_size: Optional[int],
    backend: str,
) -> TeacherTopK:
    """``kdkernels.capture_topk`` of a shard: the largest of the shards' largest."""
    checks.shard("teacher_logits", teacher_logits)
    checks.integer("k", k, low=1)
    logits = teacher_logits.detach()

    def check(total: int) -> Any:
        if k > total:
            raise ValueError(f"k must be at most the vocabulary's size {total}, got {k}")
        too_many = f"a GPU captures at most {MAX_K_ON_GPU} entries a row" if k > MAX_K_ON_GPU else None
        torch_only = None if logits.device.type == "cpu" else too_many
        name = backends.choose(backend, logits, torch_only=torch_only, pattern="capture_topk")
        given = TokenOptions.of({"temperature": temperature, "backend": name})
        nowhere = torch.full((logits.shape[:-1].numel(), 1), ops.ELSEWHERE, dtype=torch.int64, device=logits.device)
        return given, name, nowhere, token_call(given, logits, nowhere, total)

    of_rows = "tensor" if isinstance(temperature, Tensor) else temperature
    facts = facts_of("capture_topk", TokenOptions(), logits, temperature=of_rows, k=k, vocab_size=vocab_size)
    shards, (_, name, nowhere, call) = shards_of(group, logits, vocab_size, facts, check)
    local_k = min(k, shards.columns)
    part = part_of(call, logits, nowhere, shards)
    none = part.z == 0  # nothing of the row is finite here
    if local_k == 0:
        ids = torch.empty((len(nowhere), 0), dtype=torch.int64, device=logits.device)
        outside = torch.full_like(part.z, -torch.inf)
    else:
        ids, tail = _captured(name, logits, local_k, call, shards.columns)
        ids = torch.where(none.unsqueeze(-1), -1, ids)
        outside = torch.where(none, -torch.inf, part.z.log() + tail)
    found = _Candidates(shards, picked_logits(logits, ids, 0.0, part.z.dtype), ids, k)
    parts = shards.gathered(found.packed(part.top, part.z, outside))
    x = torch.cat([item[:, :k] for item in parts], 1)
    ids = torch.cat([_ids_of(item[:, k : 2 * k]) for item in parts], 1)
    top, z, outside = (torch.stack([item[:, 2 * k + j] for item in parts], 1) for j in range(3))
    return _merged(x, ids, top, z, outside, column(call.reference_options()["temperature"]), k, logits)


def _ids_of(packed: Tensor) -> Tensor:
    bits = packed.contiguous().view(torch.int32) if packed.dtype == torch.float32 else packed
    return bits.to(torch.int64)


def _captured(name: str, logits: Tensor, k: int, call: TokenCall, columns: int) -> tuple[Tensor, Tensor]:
    """The ids ``[N, k]`` of this rank's largest columns and the log of the mass of its others, of its own."""
    temperature = call.options["temperature"]
    if name == "torch":
        of_rows = temperature if call.temperature_rows is None else call.temperature_rows
        ids, _, tail = reference.capture_rows(rows_of(logits), k=k, temperature=of_rows, vocab_size=columns)
    else:
        options = {"k": k, "vocab_size": columns, "temperature": temperature}
        ids, _, tail = ops.call("capture_topk", name, (as_rows((logits,))[0], call.temperature_rows), options)
    return ids.to(torch.int64), tail


def _merged(
    x: Tensor, ids: Tensor, top: Tensor, z: Tensor, outside: Tensor, temperature: Any, k: int, logits: Tensor
) -> TeacherTopK:
    """Of the candidates ``[N, R k]`` and of what the shards tell of their rows ``[N, R]`` the k largest of all."""
    highest = top.amax(-1, keepdim=True)
    fall = torch.where(z == 0, 0.0, ((top - highest) / temperature).exp())
    total = (z * fall).sum(-1, keepdim=True)
    total = torch.where(total == 0, torch.nan, total)
    # Equal ones in the order of their ids, in which they stand.
    x, order = x.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    scaled = (x - highest) / temperature
    # In logarithms: the mass outside may be too small a part of all for a number.
    left = torch.where(ids[:, k:] == -1, -torch.inf, scaled[:, k:])
    outside = torch.where(torch.isneginf(outside), outside, outside + (top - highest) / temperature)
    tail = (torch.cat([outside, left], 1).logsumexp(-1, keepdim=True) - total.log()).clamp(max=0.0)
    ids, logprobs = ids[:, :k], (scaled[:, :k] - total.log()).clamp(max=0.0)
    logprobs = torch.where(ids == -1, -torch.inf, logprobs)
    # A row without a distribution.
    spoilt = total.isnan()
    ids = torch.where(spoilt, torch.arange(k, device=ids.device), ids)
    logprobs, tail = torch.where(spoilt, torch.nan, logprobs), torch.where(spoilt, torch.nan, tail)
    rows = logits.shape[:-1]
    return TeacherTopK(ids.to(torch.int32).reshape(*rows, k), logprobs.reshape(*rows, k), tail.reshape(rows))
