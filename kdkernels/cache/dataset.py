"""A cache as torch data sets, by number or one sequence after the other, and batches of sequences of any length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from kdkernels import checks
from kdkernels.cache.codec import ExpectationSequence
from kdkernels.cache.reader import ExpectationCache, TeacherCache

# A padded row has no entry and all its mass in the tail: with tail="bucket" its divergence is 0.
PADDING = {"ids": -1, "logprobs": -torch.inf, "tail_logprob": 0.0, "labels": -100}


class TeacherDataset(Dataset[dict[str, Tensor]]):
    """The sequences of a cache as dicts: ``ids``, ``logprobs``, ``tail_logprob`` where there is one, and the extras.

    Of a cache of expectations ``expectation``, ``entropy``, ``expected_bias`` where there is one, and the extras.

    Works with any number of ``DataLoader`` workers, forked or spawned. Sequences of one length go into batches by
    themselves, others with ``collate_fn=kdkernels.cache.collate``.
    """

    def __init__(self, cache: Union[TeacherCache, ExpectationCache]) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        sequence = self.cache[item]
        if isinstance(sequence, ExpectationSequence):
            found = {"expectation": sequence.expectation, "entropy": sequence.entropy}
            if sequence.expected_bias is not None:
                found["expected_bias"] = sequence.expected_bias
            return found | sequence.extras
        tensors = {"ids": sequence.ids, "logprobs": sequence.logprobs}
        if sequence.tail_logprob is not None:
            tensors["tail_logprob"] = sequence.tail_logprob
        return tensors | sequence.extras


class TeacherStream(IterableDataset[dict[str, Tensor]]):
    """The sequences of a cache one after the other, each in one rank and in one worker of its ``DataLoader``.

    Rank r of R and its worker w of W have each (R W)-th sequence. An iterator of it has ``state_dict`` and
    ``load_state_dict``, and goes on at the very sequence that would have come next. ``StatefulDataLoader`` of the
    package torchdata asks the iterators of its workers for them, and minds what was fetched ahead::

        loader = StatefulDataLoader(TeacherStream(cache, seed=0), batch_size=4, num_workers=2, collate_fn=collate)

    Args:
        cache: a ``TeacherCache`` or ``ExpectationCache``.
        seed: of the order, another in every epoch and the same on all ranks; None is the order of the cache.
        rank, world_size: of this process; by default those of torch.distributed, or 0 of 1.
        drop_last: leave out the few sequences that would give some ranks one more than others.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> stream = TeacherStream(cache, seed=0)  # doctest: +SKIP
        >>> sequences = iter(stream)  # doctest: +SKIP
        >>> first, state = next(sequences), sequences.state_dict()  # doctest: +SKIP
        >>> sequences = iter(stream)  # doctest: +SKIP
        >>> sequences.load_state_dict(state)  # doctest: +SKIP
    """

    def __init__(
        self,
        cache: Union[TeacherCache, ExpectationCache],
        *,
        seed: Optional[int] = None,
        rank: Optional[int] = None,
        world_size: Optional[int] = None,
        drop_last: bool = False,
    ) -> None:
        self.sequences = TeacherDataset(cache)
        self.seed = None if seed is None else checks.integer("seed", seed, low=0)
        self.rank, self.world_size = checks.sequences.rank_of_readers(rank, world_size)
        checks.flag("drop_last", drop_last)
        self.drop_last = drop_last
        # In shared memory: workers that stay from epoch to epoch see which it is.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iterator is of: its order follows from ``seed`` and this number."""
        self._epoch.fill_(checks.integer("epoch", epoch, low=0))

    def __iter__(self) -> SequenceIterator:
        info = get_worker_info()
        return SequenceIterator(self, *((info.id, info.num_workers) if info is not None else (0, 1)))

    def numbers(self, epoch: int, worker: int, num_workers: int) -> Tensor:
        """The numbers of a worker's sequences, in their order."""
        count = len(self.sequences)
        if self.seed is None:
            order = torch.arange(count)
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + epoch))
        if self.drop_last:
            order = order[: count - count % self.world_size]
        return order[self.rank :: self.world_size][worker::num_workers]


class SequenceIterator(Iterator[dict[str, Tensor]]):
    """The sequences of one worker of a ``TeacherStream`` in one epoch, from any of them on."""

    def __init__(self, stream: TeacherStream, worker: int, num_workers: int) -> None:
        self._stream, self._worker, self._num_workers = stream, worker, num_workers
        self._begin(stream.epoch)

    def _begin(self, epoch: int, position: int = 0) -> None:
        self._epoch, self._position = epoch, position
        self._numbers = self._stream.numbers(epoch, self._worker, self._num_workers)

    def __next__(self) -> dict[str, Tensor]:
        if self._position >= len(self._numbers):
            raise StopIteration
        found = self._stream.sequences[int(self._numbers[self._position])]
        self._position += 1
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where it is: numbers, flags and None."""
        stream = self._stream
        return {
            "epoch": self._epoch,
            "position": self._position,
            "sequences": len(stream.sequences),
            "seed": stream.seed,
            "drop_last": stream.drop_last,
            "rank": stream.rank,
            "world_size": stream.world_size,
            "worker": self._worker,
            "num_workers": self._num_workers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the iterator was of which this is the state, in its epoch.

        Raises:
            ValueError: it was of another cache, order, rank or worker: what came before cannot be known.
        """
        checks.sequences.state_of_reader(state, self.state_dict())
        self._begin(state["epoch"], state["position"])


def collate(
    sequences: Sequence[Mapping[str, Tensor]], padding: Optional[Mapping[str, float]] = None
) -> dict[str, Tensor]:
    """A batch ``[B, L, ...]`` of sequences padded to the longest, with ``length`` int64 ``[B]``.

    Args:
        sequences: items of a ``TeacherDataset``.
        padding: what fills a tensor, by name; by default -1 for ``ids``, -inf for ``logprobs``, 0 (all of the mass) for
            ``tail_logprob``, -100 for ``labels`` and 0 for other extras.
    """
    values = {**PADDING, **(padding or {})}
    batch = {
        name: pad_sequence([s[name] for s in sequences], batch_first=True, padding_value=values.get(name, 0))
        for name in sequences[0]
    }
    first = "ids" if "ids" in sequences[0] else "expectation"
    batch["length"] = torch.tensor([len(s[first]) for s in sequences])
    return batch
