"""Readers of a cache: each sequence in one rank and one worker, and after a stop the very next one."""

import json

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

pytest.importorskip("safetensors", reason="the cache writes safetensors")
pytest.importorskip("numpy", reason="safetensors saves torch tensors through numpy")

from kdkernels import cache as kd_cache

V, K, COUNT = 40, 3, 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    options = {"tokenizer": "t", "vocab_size": V, "k": K, "extras": {"number": torch.int32}, "shard_bytes": 200}
    with kd_cache.TeacherCacheWriter(folder, **options) as writer:
        for number in range(COUNT):
            length = 2 + number % 3
            logprobs = torch.log_softmax(torch.randn(length, K + 1), -1)
            ids = torch.randint(V, (length, K))
            writer.append(ids, logprobs[:, :K], logprobs[:, K], number=torch.full((length,), number))
    return folder


@pytest.fixture
def cache(folder):
    return kd_cache.TeacherCache(folder, tokenizer="t", vocab_size=V)


def number(sequence):
    return int(sequence["number"][0])


def numbers(batches):
    return [int(row[0]) for batch in batches for row in batch["number"]]


def loader(data, **options):
    return DataLoader(data, **{"batch_size": 3, "collate_fn": kd_cache.collate, **options})


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("world_size, workers", [(1, 0), (3, 0), (2, 2), (4, 3)])
def test_each_sequence_is_in_one_rank_and_worker(cache, world_size, workers, seed):
    streams = [kd_cache.TeacherStream(cache, seed=seed, rank=r, world_size=world_size) for r in range(world_size)]
    # Workers are forked in one case only, which takes a while; what they read is the same function of their number.
    if (world_size, workers) == (2, 2):
        found = [numbers(loader(stream, num_workers=workers)) for stream in streams]
    else:
        found = [
            [n for w in range(max(1, workers)) for n in stream.numbers(0, w, max(1, workers)).tolist()]
            for stream in streams
        ]
    assert sorted(n for of_rank in found for n in of_rank) == list(range(COUNT))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    if seed is None and workers == 0:
        assert found == [list(range(r, COUNT, world_size)) for r in range(world_size)]


def test_ranks_have_as_many_where_the_last_are_left_out(cache):
    found = []
    for rank in range(4):
        stream = kd_cache.TeacherStream(cache, seed=1, rank=rank, world_size=4, drop_last=True)
        found.append([number(sequence) for sequence in stream])
    assert [len(of_rank) for of_rank in found] == [5] * 4 and len({n for of_rank in found for n in of_rank}) == 20


def test_an_epoch_has_an_order_of_its_own_also_in_workers_that_stay(cache):
    stream = kd_cache.TeacherStream(cache, seed=1)
    batches = loader(stream, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append(numbers(batches))
        assert orders[-1] == [number(sequence) for sequence in stream]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(COUNT))


def test_a_sampler_of_ranks_takes_each_sequence_of_the_data_set_once(cache):
    data = kd_cache.TeacherDataset(cache)
    found = []
    for rank in range(3):
        sampler = DistributedSampler(data, num_replicas=3, rank=rank, seed=5, drop_last=True)
        found += numbers(loader(data, sampler=sampler))
    assert len(found) == len(set(found)) == COUNT - COUNT % 3


@pytest.mark.parametrize("seed", [None, 3])
def test_reading_goes_on_at_the_exact_sequence(cache, seed):
    stream = kd_cache.TeacherStream(cache, seed=seed, rank=1, world_size=2)
    stream.set_epoch(4)
    whole = [number(sequence) for sequence in stream]
    for stop in range(len(whole) + 1):
        sequences = iter(stream)
        before = [number(next(sequences)) for _ in range(stop)]
        state = json.loads(json.dumps(sequences.state_dict()))
        # In another process, which does not know the epoch.
        again = iter(kd_cache.TeacherStream(cache, seed=seed, rank=1, world_size=2))
        again.load_state_dict(state)
        assert before + [number(sequence) for sequence in again] == whole


def test_a_read_that_crashed_goes_on_at_the_sequence_that_it_could_not_read(cache, monkeypatch):
    sequences = iter(kd_cache.TeacherStream(cache))
    read = [number(next(sequences)) for _ in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(kd_cache.reader, "checksum", lambda *arguments: -1)
        with pytest.raises(kd_cache.ChecksumError):
            next(sequences)
    state = sequences.state_dict()
    sequences = iter(kd_cache.TeacherStream(cache))
    sequences.load_state_dict(state)
    assert read + [number(sequence) for sequence in sequences] == list(range(COUNT))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 2}, "state must be of seed 2, which reads it, got 1"),
        ({"rank": 1, "world_size": 2}, "of rank 1, which reads it, got 0"),
        ({"rank": 0, "world_size": 2}, "of world_size 2, which reads it, got 1"),
        ({"drop_last": True}, "of drop_last True"),
    ],
)
def test_a_state_of_another_reader_is_refused(cache, options, message):
    state = iter(kd_cache.TeacherStream(cache, seed=1)).state_dict()
    with pytest.raises(ValueError, match=message):
        iter(kd_cache.TeacherStream(cache, **{"seed": 1, **options})).load_state_dict(state)


def test_wrong_options_are_named(cache):
    for options, message in [
        ({"rank": 0}, "rank and world_size must be given together"),
        ({"rank": 2, "world_size": 2}, "rank must be at most 1"),
        ({"rank": 0, "world_size": 0}, "world_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            kd_cache.TeacherStream(cache, **options)
    with pytest.raises(ValueError, match="what state_dict"):
        iter(kd_cache.TeacherStream(cache)).load_state_dict({"position": 3})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["stream", "sampler"])
def test_a_loader_with_a_state_goes_on_at_the_exact_batch(cache, kind, workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="pip install torchdata")

    def made():
        options = {"batch_size": 2, "num_workers": workers, "collate_fn": kd_cache.collate}
        if kind == "stream":
            data = kd_cache.TeacherStream(cache, seed=1, rank=1, world_size=2)
        else:
            data = kd_cache.TeacherDataset(cache)
            options["sampler"] = DistributedSampler(data, num_replicas=2, rank=1, seed=1)
        return stateful.StatefulDataLoader(data, **options)

    whole = [batch["number"][:, 0].tolist() for batch in made()]
    for stop in (1, 4, len(whole)):
        first = made()
        batches = iter(first)
        before = [next(batches)["number"][:, 0].tolist() for _ in range(stop)]
        state = first.state_dict()
        del batches
        again = made()
        again.load_state_dict(state)
        assert before + [batch["number"][:, 0].tolist() for batch in again] == whole, stop
        # The next epoch is whole.
        assert [batch["number"][:, 0].tolist() for batch in again] == whole, stop
