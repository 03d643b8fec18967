"""A process group whose ranks have the columns of one vocabulary, and the words they exchange."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kdkernels import checks, ops

# Seconds for which a rank waits for the others to say that they are there.
PATIENCE = 5.0
# Numbers that a rank tells of a call, at most.
FACTS = 16

_ResultT = TypeVar("_ResultT")


_CallableT = TypeVar("_CallableT", bound=Callable[..., Any])


def outside_graphs(function: _CallableT) -> _CallableT:
    """A function at which a graph of ``torch.compile`` breaks: its collectives and its checks over ranks run eagerly.

    ``torch.compiler.disable`` imports the compiler, for seconds, so that it is asked only where there is a graph.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_CallableT, called)


@dataclasses.dataclass(frozen=True)
class Shards:
    """The columns of a vocabulary, in the order of the ranks."""

    group: Any
    rank: int
    # Columns of each rank that are no padding.
    widths: tuple[int, ...]
    # Run while numbers travel.
    meanwhile: Callable[[], None] = dataclasses.field(default=lambda: None, compare=False)

    @property
    def first(self) -> int:
        """The vocabulary's number of this rank's first column."""
        return sum(self.widths[: self.rank])

    @property
    def columns(self) -> int:
        """How many columns this rank has."""
        return self.widths[self.rank]

    @property
    def total(self) -> int:
        """The size of the vocabulary."""
        return sum(self.widths)

    def here(self, ids: Tensor) -> Tensor:
        """True for ids that are columns of this rank."""
        return (ids >= self.first) & (ids < self.first + self.columns)

    def local(self, ids: Tensor, ignore_index: int = -1) -> Tensor:
        """Ids of the vocabulary as columns of this rank: those of others are ``ELSEWHERE``, those that are none -1.

        An id that no rank has is ``ELSEWHERE`` too.
        """
        mapped = torch.where(self.here(ids), ids - self.first, ops.ELSEWHERE)
        return torch.where((ids == -1) | (ids == ignore_index), -1, mapped)

    def largest(self, *values: Tensor) -> list[Tensor]:
        """Of each tensor the largest numbers over all ranks, by one reduction."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum(self, *values: Tensor) -> list[Tensor]:
        """The sum of each tensor over all ranks, by one reduction."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Sequence[Tensor], op: Any) -> list[Tensor]:
        packed = torch.cat([value.detach().reshape(-1) for value in values])
        if packed.numel():
            wait = self.started(packed, op)
            self.meanwhile()
            wait()
        parts = packed.split([value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

    def started(self, packed: Tensor, op: Any = dist.ReduceOp.SUM) -> Callable[[], None]:
        """Begin to reduce a tensor in place; the function that is returned ends it."""
        work: Any = _together(self.group, lambda: dist.all_reduce(packed, op, group=self.group, async_op=True))
        return lambda: _together(self.group, work.wait)

    def agree(self, name: str, number: int, device: torch.device) -> None:
        """Hold a number that all ranks have made of their arguments to be the same."""
        parts = self.gathered(torch.tensor([number], device=device))
        _same_on_all(self.group, [name], [part.tolist() for part in parts])

    def gathered(self, value: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape."""
        mine = value.contiguous()
        found = [torch.empty_like(mine) for _ in self.widths]
        if mine.numel():
            _together(self.group, lambda: dist.all_gather(found, mine, group=self.group))
        return found


def shards_of(
    group: Any,
    logits: Tensor,
    vocab_size: Optional[int],
    facts: Mapping[str, Any],
    check: Callable[[int], _ResultT],
) -> tuple[Shards, _ResultT]:
    """The shards of a call, and what ``check(total)`` says of its other arguments, on all ranks or on none.

    An error of a rank's own is raised there, and is an error on all other ranks too, so that none of them waits for
    what will not come. Ranks that have met the facts before check first, and tell both at once. On a GPU all that is
    asked once for every set of facts, unless ``KDKERNELS_DEBUG=1``: each time it would wait for the device.

    Args:
        logits: this rank's columns.
        vocab_size: the vocabulary's size without its padding; None: all columns of all ranks.
        facts: numbers and texts that all ranks have in common, by name.
    """
    checks.group_of_ranks(group)
    width = logits.shape[-1]
    known = {name: fact if isinstance(fact, int) else zlib.crc32(str(fact).encode()) for name, fact in facts.items()}
    key, seen = (width, vocab_size, *known.values()), _seen_by(group)
    widths = seen.get(key)
    fault: Optional[Exception] = None
    result: Any = None
    # For how many columns the arguments have been checked.
    checked_for = -1
    if widths is not None:
        checked_for = sum(_without_padding(widths, vocab_size))
        result, fault = _checked(check, checked_for)
    if widths is None or checks.reads_values(logits):
        told = _told(group, logits.device, [fault is not None, checked_for, width, *known.values()])
        _same_on_all(group, list(facts), [row[3:] for row in told])
        widths, refused = tuple(row[2] for row in told), [row[0] for row in told]
        total = sum(_without_padding(widths, vocab_size))
        if any(row[1] != total for row in told):
            # The facts are new to a rank, or the widths.
            result, fault = _checked(check, total)
            refused = [row[0] for row in _told(group, logits.device, [fault is not None])]
        ranks = [str(dist.get_global_rank(group, r)) for r, flag in enumerate(refused) if flag]
        if fault is None and ranks:
            raise RuntimeError(
                f"rank {', '.join(ranks)} of process_group refused its arguments: its own error says why"
            )
    if fault is not None:
        raise fault
    if len(seen) > 1024:
        seen.clear()
    seen[key] = widths
    return Shards(group, dist.get_rank(group), _without_padding(widths, vocab_size)), result


def _checked(check: Callable[[int], _ResultT], total: int) -> tuple[Any, Optional[Exception]]:
    try:
        return check(total), None
    except Exception as error:
        return None, error


# Widths of the shards by the facts of a call, which all ranks have asked for, by the name of their group. A group's are
# forgotten by all of its ranks at the same call, or some would ask the others, who would not answer.
_seen: dict[str, dict[Any, tuple[int, ...]]] = {}
_world: Optional[weakref.ref[Any]] = None


def _seen_by(group: Any) -> dict[Any, tuple[int, ...]]:
    global _world
    if _world is None or _world() is not dist.group.WORLD:
        # Names begin anew with every init_process_group.
        _seen.clear()
        _world = weakref.ref(dist.group.WORLD)
    return _seen.setdefault(group.group_name, {})


def _without_padding(widths: tuple[int, ...], vocab_size: Optional[int]) -> tuple[int, ...]:
    total = sum(widths)
    if vocab_size is not None and vocab_size > total:
        raise ValueError(f"vocab_size must be at most the number of columns of all ranks {total}, got {vocab_size}")
    left = total if vocab_size is None else vocab_size
    real = []
    for width in widths:
        real.append(min(width, left))
        left -= real[-1]
    return tuple(real)


def _same_on_all(group: Any, names: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    for k, name in enumerate(names):
        for rank, row in enumerate(rows):
            if row[k] != rows[0][k]:
                first, other = (dist.get_global_rank(group, r) for r in (0, rank))
                told = f", got {rows[0][k]} on rank {first} and {row[k]} on rank {other}"
                text = name in _TEXTS
                raise ValueError(
                    f"{name} must be the same on all ranks of process_group"
                    + (f": rank {other} has others than rank {first}" if text else told)
                )


# Facts of which the number says nothing.
_TEXTS = ("function", "side", "options", "dtype", "temperature", "vocab_size", "ids")


def _told(group: Any, device: torch.device, numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of all ranks."""
    # Of one size, also where ranks have called different functions.
    mine = torch.tensor([*numbers, *[0] * (FACTS - len(numbers))], dtype=torch.int64, device=device)
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    _together(group, lambda: dist.all_gather(table, mine, group=group))
    return [row.tolist() for row in table]


def _together(group: Any, collective: Callable[[], Any]) -> Any:
    """Run a collective; where it fails, say who does not answer."""
    try:
        return collective()
    except Exception as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} lost the other ranks of its process_group "
            f"{dist.get_process_group_ranks(group)}: {_who_is_missing(group) or error}"
        ) from error


def _who_is_missing(group: Any) -> str:
    """A roll call in the store through which the ranks found each other."""
    global _calls
    _calls += 1
    missing = []
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"kdkernels/{_calls}/{dist.get_rank()}", "here")
        until = time.monotonic() + PATIENCE
        for rank in dist.get_process_group_ranks(group):
            left = datetime.timedelta(seconds=max(until - time.monotonic(), 0.1))
            try:
                store.wait([f"kdkernels/{_calls}/{rank}"], left)
            except Exception:
                missing.append(str(rank))
    except Exception:
        # The store was the lost rank's.
        return ""
    return f"rank {', '.join(missing)} does not answer" if missing else ""


_calls = 0
