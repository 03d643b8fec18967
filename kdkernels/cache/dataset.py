"""A cache as a torch data set, and batches of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional, Union

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

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
