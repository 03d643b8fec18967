"""Log-probabilities of tokens over a sharded vocabulary, by the kernels that a whole one has.

Of rows [N] a shard tells its largest logit m and z, the sum of exponentials relative to it. With the largest M of all
shards and Z = sum z e^((m - M) / T), a column's q is e^((x - M) / T) / Z wherever it is, so that backward is the kernel
of a whole vocabulary with M and Z for its norm: an id of another shard is a token without a column, ``ELSEWHERE``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from kdkernels import memory, ops, reference
from kdkernels.autograd import TokenCall, graph_is_kept, has_saved_tensor_hooks, refuse_second_derivative
from kdkernels.launch import as_rows
from kdkernels.parallel.shards import Shards
from kdkernels.reference.dense import PerRow, apply_softcap, column


class Values(NamedTuple):
    """The results of rows and slots over all shards; ``log_outside`` is that of the mass outside the ids."""

    logprobs: Tensor  # [N, K]
    entropy: Tensor  # [N], or [0]
    lse: Tensor  # [N]
    log_outside: Tensor  # [N], or [0]
    stats: Tensor  # [N, 2 + K], or [0]
    norm: Tensor  # [N, 2]


class ShardedTokens(torch.autograd.Function):
    """``Values`` of this rank's logits ``[..., V]``, with the gradient that all ranks together have in them.

    All ranks make the same of the results, and so have the same gradients of them: backward sends nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, rows: Optional[Tensor], call: TokenCall, shards: Shards, inplace: bool
    ) -> tuple[Tensor, ...]:
        found = values_of(call, logits.detach(), ids, shards)
        entropy, tail = call.options["entropy"], call.options["tail_mass"]
        kept_tail = found.log_outside if tail else None
        ctx.save_for_backward(
            logits, ids, found.norm, found.entropy if entropy else None, rows, found.logprobs, kept_tail
        )
        ctx.call, ctx.shards = call, shards
        ctx.inplace, ctx.shared = inplace, has_saved_tensor_hooks()
        without = [found.stats, *([] if entropy else [found.entropy]), *([] if tail else [found.log_outside])]
        ctx.mark_non_differentiable(*without)
        ctx.set_materialize_grads(False)
        return found.logprobs, found.entropy, found.lse, found.log_outside, found.stats

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        refuse_second_derivative(sharded=True)
        dlogprobs, dentropy, dlse, dtail, _ = given
        nothing = (None,) * 5
        if all(item is None for item in (dlogprobs, dentropy, dlse, dtail)):
            return None, *nothing
        logits, ids, norm, entropy, rows, logprobs, tail = ctx.saved_tensors
        shards = ctx.shards
        upstream = torch.zeros_like(logprobs) if dlogprobs is None else dlogprobs
        call, local, upstream = of_own_columns(ctx.call, shards, ids, upstream)
        call = call._replace(temperature_rows=rows, options={**call.options, "entropy": dentropy is not None})
        if dtail is not None:
            dlse = torch.zeros_like(dtail) if dlse is None else dlse
            local, norm, upstream, of_ids = _of_tail(ctx.call, logits, local, norm, upstream, dtail, dlse, tail)
        elif dlse is not None:
            # A token that no rank has, of which all columns take their part.
            local = torch.cat([local, torch.full_like(local[:, :1], ops.ELSEWHERE)], 1)
            upstream = torch.cat([upstream, -dlse.unsqueeze(-1)], 1)
        over = ctx.inplace and not ctx.shared and not graph_is_kept()
        entropy = None if dentropy is None else entropy
        gradient = _gradient(call, shards, logits, local, norm, entropy, upstream.contiguous(), dentropy, over=over)
        if dtail is not None and shards.columns:
            of_ids.write(gradient)
        return gradient, *nothing


class _OfIds(NamedTuple):
    """Columns of this rank ``[N, K]``, where ``here``, and their gradient."""

    columns: Tensor
    here: Tensor
    gradient: Tensor

    def write(self, gradient: Tensor) -> None:
        """Put them in their places."""
        # A slot that is of another rank says the same as the first one of this rank; without one nothing changes.
        first = self.here.to(torch.int8).argmax(-1, keepdim=True)
        some = self.here.any(-1, keepdim=True)
        columns = torch.where(self.here, self.columns, torch.where(some, self.columns.gather(1, first), 0))
        values = torch.where(self.here, self.gradient, self.gradient.gather(1, first)).to(gradient.dtype)
        columns = columns.reshape(*gradient.shape[:-1], columns.shape[1])
        values = torch.where(some, values, rows_of(gradient[..., :1]))
        gradient.scatter_(-1, columns, values.reshape(columns.shape))


def _of_tail(
    call: TokenCall,
    logits: Tensor,
    local: Tensor,
    norm: Tensor,
    upstream: Tensor,
    dtail: Tensor,
    dlse: Tensor,
    tail: Tensor,
) -> tuple[Tensor, Tensor, Tensor, _OfIds]:
    """Ids, norm and upstream gradients for the kernel, which writes columns outside the ids, and those of the ids.

    The tail's gradient is q / Q - q outside, of mass Q, and -q at the ids. There it must not be the difference of two
    numbers of the size of 1 / Q: where the student is sure of the ids nothing would be left of it.
    """
    temperature, softcap = column(call.reference_options()["temperature"]), call.options["softcap"]
    top, z = norm.unbind(-1)
    upstream = torch.where(local == -1, 0.0, upstream)
    some = torch.isneginf(tail).logical_not() & (local != -1).any(-1)
    share = torch.where(some, dtail, 0.0)
    of_all = upstream.sum(-1) - dlse + share
    counted = (upstream != 0).any(-1) | (dlse != 0) | (share != 0)
    # Outside a column counts by its part of Q: as if Q were all there is.
    of_each = temperature.squeeze(-1) if isinstance(temperature, Tensor) else temperature
    log_mass = torch.where(some, z.log() + tail, 0.0)
    of_outside = torch.where(some, top + of_each * log_mass, top)
    rest = (log_mass - (of_outside - top) / of_each).exp()
    kernel_norm = torch.stack([of_outside, torch.where(some, rest, z)], -1)
    factor = torch.where(some, of_all * tail.exp() - share, of_all)
    factor = torch.where(counted, factor, 0.0)
    slot = torch.where((local != -1).any(-1), ops.ELSEWHERE, -1).unsqueeze(-1)

    here = local >= 0
    x = torch.where(here, picked_logits(logits.detach(), local, softcap, z.dtype), 0.0)
    q = ((x - top.unsqueeze(-1)) / temperature).exp() / z.unsqueeze(-1)
    gradient = (upstream - q * of_all.unsqueeze(-1)) / temperature
    if softcap:
        gradient = gradient * (1 - (x / softcap).square())
    gradient = torch.where(counted.unsqueeze(-1), gradient, 0.0)
    return slot.to(local.dtype), kernel_norm, factor.unsqueeze(-1), _OfIds(local, here, gradient)


def of_own_columns(call: TokenCall, shards: Shards, ids: Tensor, upstream: Tensor) -> tuple[TokenCall, Tensor, Tensor]:
    """For the gradient of this rank's columns: the call, ids, and their upstream gradients."""
    local = shards.local(ids, call.options["ignore_index"])
    missing = (local == ops.ELSEWHERE) & (ids != ops.ELSEWHERE) & ((ids < 0) | (ids >= shards.total))
    options = {**call.options, "vocab_size": shards.columns, "ignore_index": -1, "stats": False, "tail_mass": False}
    # A kernel takes a column that is alone for a sure one.
    backend = "torch" if shards.columns <= 1 else call.backend
    return call._replace(backend=backend, options=options), local, torch.where(missing, torch.nan, upstream)


def _gradient(
    call: TokenCall,
    shards: Shards,
    logits: Tensor,
    ids: Tensor,
    norm: Tensor,
    entropy: Optional[Tensor],
    dlogprobs: Tensor,
    dentropy: Optional[Tensor],
    *,
    over: bool,
) -> Tensor:
    """That of this rank's columns, ``over`` its logits or not."""
    if shards.columns == 0:
        return torch.zeros_like(logits)
    if call.backend == "torch":
        found = reference.token_gradient(
            rows_of(logits), ids, norm, entropy, dlogprobs, dentropy, **call.gradient_options()
        ).reshape(logits.shape)
        return logits.detach().copy_(found) if over else found
    gradient = logits.detach() if over else empty_gradient(logits)
    source, destination = as_rows((logits.detach(), gradient))
    dentropy = None if dentropy is None else dentropy.contiguous()
    operands = (source, ids, norm, entropy, dlogprobs, dentropy, destination, call.temperature_rows)
    ops.call("token_bwd", call.backend, operands, call.options)
    if over:
        torch.autograd.graph.increment_version(logits)
    return gradient


class Part(NamedTuple):
    """A shard's own: m, z and what else of its rows is relative to them, all ``[N]``; ``picked [N, K]``."""

    top: Tensor
    z: Tensor
    weighted: Optional[Tensor]  # sum e^a a, a = (x - m) / T
    outside: Optional[Tensor]  # log of the sum of e^a outside the ids
    squares: Optional[Tensor]  # sum e^2a
    mean: Optional[Tensor]  # the sum of its logits over the size of the vocabulary


def values_of(call: TokenCall, logits: Tensor, ids: Tensor, shards: Shards) -> Values:
    """The results of logits ``(..., V)``."""
    options = call.options
    local = shards.local(ids, options["ignore_index"])
    temperature = call.reference_options()["temperature"]
    part = part_of(call, logits, local, shards)
    picked = torch.where(local >= 0, picked_logits(logits, local, options["softcap"], part.z.dtype), 0.0)
    counted = (local != -1).any(-1)
    # Of which m is but near.
    highest = [_highest(logits[..., : shards.columns], options["softcap"], part.z.dtype)] if options["stats"] else []
    # The mass outside may be too small a part of all for a number: a shard tells it relative to the largest.
    levels = [] if part.outside is None else [part.top / temperature + part.outside]
    top, *maxima = shards.largest(part.top, *highest, *levels)
    shift, level = (part.top - top) / temperature, torch.zeros_like(top)
    outside_here = []
    if part.outside is not None:
        level = torch.where(torch.isneginf(maxima[-1]), level, maxima[-1] - top / temperature)
        outside_here = [(part.outside + shift - level).exp()]
    fall = torch.where(part.z == 0, 0.0, shift.exp())

    def relative(value: Optional[Tensor], factor: Tensor) -> list[Tensor]:
        return [] if value is None else [torch.where(part.z == 0, 0.0, value * factor)]

    # Of a shard far below the others e^shift is 0, and shift may be -inf.
    shift = torch.where(fall == 0, 0.0, shift)
    weighted = None if part.weighted is None else part.weighted + part.z * shift
    mean = [] if part.mean is None else [part.mean]
    x = torch.where(local >= 0, picked - top.unsqueeze(-1), 0.0)
    sums = [
        part.z * fall,
        x,
        *relative(weighted, fall),
        *outside_here,
        *relative(part.squares, fall.square()),
        *mean,
    ]
    z, x, *others = shards.sum(*sums)
    rest = iter(others)
    z = torch.where(z == 0, torch.nan, z)  # nothing in the row is finite
    log_z = z.log()
    nothing, zero = z.new_empty(0), torch.zeros_like(z)
    known = (ids >= 0) & (ids < shards.total)
    logprobs = x / column(temperature) - log_z.unsqueeze(-1)
    if shards.total == 1:
        logprobs = logprobs - logprobs  # one class alone is certain
    logprobs = torch.where(known, logprobs.clamp(max=0.0), torch.nan)
    logprobs = torch.where((local == -1) | (ids == ops.ELSEWHERE), 0.0, logprobs)
    lse = torch.where(counted, top / temperature + log_z, zero)
    entropy, outside, stats = nothing, nothing.clone(), nothing.clone()
    if weighted is not None:
        entropy = torch.where(counted, (log_z - next(rest) / z).clamp(min=0.0), zero)
    if part.outside is not None:
        outside = torch.where(counted, (level + next(rest).log() - log_z).clamp(max=0.0), zero)
    if part.squares is not None:
        squares = torch.where(counted, (next(rest).log() - 2 * log_z).clamp(max=0.0), zero)
        of_mean = torch.where(counted, next(rest) + 0 * log_z, zero)
        largest = (local != -1) & known & (x + top.unsqueeze(-1) == maxima[0].unsqueeze(-1)) & ~z.isnan().unsqueeze(-1)
        stats = torch.cat([squares.unsqueeze(-1), of_mean.unsqueeze(-1), largest.to(z.dtype)], 1)
    norm = torch.stack([torch.where(counted, top, zero), torch.where(counted, z, zero)], -1)
    return Values(logprobs, entropy, lse, outside, stats, norm)


def part_of(call: TokenCall, logits: Tensor, local: Tensor, shards: Shards) -> Part:
    """The numbers of every row that this rank's columns tell."""
    options, columns = call.options, shards.columns
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entropy, tail, stats = options["entropy"], options["tail_mass"], options["stats"]
    if columns == 0:
        zero = torch.zeros(len(local), dtype=dtype, device=logits.device)
        lowest = torch.full_like(zero, torch.finfo(dtype).min)
        return Part(
            lowest,
            zero,
            zero if entropy else None,
            torch.full_like(zero, -torch.inf) if tail else None,
            zero if stats else None,
            zero if stats else None,
        )
    if call.backend == "torch":
        return _part_in_torch(call, rows_of(logits)[:, :columns], local, shards.total)
    taken = {**options, "vocab_size": columns, "ignore_index": -1}
    operands = (as_rows((logits,))[0], local, call.temperature_rows)
    _, of_entropy, _, of_tail, norm, of_stats = ops.call("token_fwd", call.backend, operands, taken)
    top, z = norm.unbind(-1)
    mean = None
    if stats:
        # Of columns of -inf alone the kernel tells nothing.
        mean = torch.where(z == 0, -torch.inf, of_stats[:, 1] * (columns / shards.total))
    return Part(
        top,
        z,
        z * (z.log() - of_entropy) if entropy else None,
        torch.where(z == 0, -torch.inf, z.log() + of_tail) if tail else None,
        z.square() * of_stats[:, 0].exp() if stats else None,
        mean,
    )


def _part_in_torch(call: TokenCall, rows: Tensor, local: Tensor, total: int) -> Part:
    options, temperature = call.options, column(call.reference_options()["temperature"])
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    counted = (local != -1).any(-1, keepdim=True)
    x = torch.where(counted, apply_softcap(rows.to(dtype), options["softcap"]), 0.0)
    top = x.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    a = (x - top) / temperature
    e = a.exp()
    weighted = outside = squares = mean = None
    if options["entropy"]:
        weighted = (e * torch.where(e == 0, 0.0, a)).sum(-1)
    if options["tail_mass"]:
        among = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
        among = among.scatter(1, torch.where(local >= 0, local, x.shape[1]), True)[:, :-1]
        outside = torch.where(among, -torch.inf, a).logsumexp(-1)
    if options["stats"]:
        squares, mean = e.square().sum(-1), (x / total).sum(-1)
    return Part(top.squeeze(-1), e.sum(-1), weighted, outside, squares, mean)


def _highest(logits: Tensor, softcap: float, dtype: torch.dtype) -> Tensor:
    """The largest logit of each row ``[N]``; a cap keeps their order."""
    if logits.shape[-1] == 0:
        count = logits.shape[:-1].numel()
        return torch.full((count,), torch.finfo(dtype).min, dtype=dtype, device=logits.device)
    return apply_softcap(logits.amax(-1).reshape(-1).to(dtype), softcap)


def picked_logits(logits: Tensor, local: Tensor, softcap: float, dtype: torch.dtype) -> Tensor:
    """The logits of the ids ``[N, K]`` that are columns here; those of column 0 for others."""
    if logits.shape[-1] == 0:
        return torch.zeros(local.shape, dtype=dtype, device=logits.device)
    # Not of a view [N, V], which logits of any strides need not have.
    ids = local.clamp(min=0).reshape(*logits.shape[:-1], local.shape[1])
    return apply_softcap(logits.gather(-1, ids).reshape(local.shape).to(dtype), softcap)


def call_of(
    backend: str, temperature: PerRow, softcap: float, *, tail_mass: bool = False, stats: bool = False
) -> TokenCall:
    """The call of an objective for its student or teacher, whose ids that are none are -1."""
    of_rows = temperature if isinstance(temperature, Tensor) else None
    options = {
        "temperature": temperature if of_rows is None else 1.0,
        "softcap": softcap,
        "ignore_index": -1,
        "entropy": False,
        "tail_mass": tail_mass,
        "stats": stats,
    }
    return TokenCall(backend, of_rows, options)


def empty_gradient(logits: Tensor) -> Tensor:
    """Memory for a gradient, laid out as logits are that are the view ``[b, s, V]`` of ``[s, b, V]``: the product that
    they come from has no copy to make of it then."""
    if logits.dim() == 3 and not logits.is_contiguous() and logits.transpose(0, 1).is_contiguous():
        return memory.empty_like(logits.transpose(0, 1)).transpose(0, 1)
    return memory.empty_like(logits)


def rows_of(logits: Tensor) -> Tensor:
    """``[N, V]``, also of no columns."""
    return logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])


def sharded_values(
    call: TokenCall, logits: Tensor, ids: Tensor, shards: Shards, *, inplace: bool = False
) -> tuple[Tensor, ...]:
    """Log-probabilities, entropy, lse, the log of the mass outside the ids, and statistics."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return ShardedTokens.apply(logits, ids, call.temperature_rows, call, shards, inplace)
    logits = logits.detach()
    return tuple(values_of(call, logits, ids, shards)[:-1])
