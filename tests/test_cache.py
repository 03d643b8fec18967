"""The teacher cache: what was written comes back, a kill loses nothing that was closed, and damage has a name.

Run as a script this file is the writer that the tests kill; see ``die``.
"""

import contextlib
import copy
import errno
import functools
import gc
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the cache writes safetensors")
pytest.importorskip("numpy", reason="safetensors saves torch tensors through numpy")

from dying import die_at

import kdkernels as kd
from kdkernels import cache as kd_cache
from kdkernels import cli
from kdkernels.cache import codec, index

V, K = 70_000, 5  # ids of 17 bits, and bytes of high bits that are not full
TOKENS = 17
NUM_SEQUENCES = 9
IDENTITY = {"tokenizer": {"<s>": 0, "a": 1}, "vocab_size": V}
# Two of the sequences below, so that there are five shards, the last one with a single sequence.
SHARD_BYTES = 1250
NUM_SHARDS = 5
WRITER = {**IDENTITY, "k": K, "extras": {"input_ids": torch.int32}, "shard_bytes": SHARD_BYTES}


@functools.cache
def captured(number):
    """A captured sequence, the same on every call: ids, log-probabilities, tail, input ids; some slots unused."""
    generator = torch.Generator().manual_seed(number)
    length = TOKENS + 5 * (number % 3)
    logits = torch.randn(length, K + 1, generator=generator) * 4
    logprobs = torch.log_softmax(logits, -1)
    ids = torch.randint(V, (length, K), generator=generator)
    ids[::4, -1] = -1
    return ids.to(torch.int32), logprobs[:, :K], logprobs[:, K], ids[:, 0] + 1


def append(writer, number):
    ids, logprobs, tail, input_ids = captured(number)
    writer.append(ids, logprobs, tail, input_ids=input_ids)


def write(folder, count=NUM_SEQUENCES):
    with kd_cache.TeacherCacheWriter(folder, **WRITER) as writer:
        for number in range(len(writer), count):
            append(writer, number)
    return folder


def check_sequence(found, number):
    """Exact but for fp16: half a unit of its last place, and the shift of the row, which is no larger."""
    ids, logprobs, tail, input_ids = captured(number)
    logprobs = logprobs.masked_fill(ids < 0, -torch.inf)
    assert found.ids.dtype == torch.int32 and torch.equal(found.ids, ids)
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs, logprobs, rtol=2**-11, atol=2**-11 * 30)
    torch.testing.assert_close(found.logprobs.logsumexp(-1), logprobs.logsumexp(-1), rtol=0, atol=1e-6)
    assert torch.equal(found.tail_logprob, tail)
    assert found.extras.keys() == {"input_ids"} and torch.equal(found.extras["input_ids"], input_ids.to(torch.int32))


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache that was written without interruption; not to be changed."""
    return write(tmp_path_factory.mktemp("caches") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def shards(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


# Reading


def test_random_access_gives_what_was_written(whole):
    cache = kd_cache.TeacherCache(whole, **IDENTITY)
    assert len(shards(whole)) == NUM_SHARDS and len(cache) == NUM_SEQUENCES
    assert cache.num_tokens == sum(len(captured(number)[0]) for number in range(NUM_SEQUENCES))
    for number in (8, 0, 3, 5, 1, 7, 2, 6, 4):
        check_sequence(cache[number], number)
    check_sequence(cache[-1], NUM_SEQUENCES - 1)
    for number, sequence in enumerate(cache):
        check_sequence(sequence, number)
    for number in (NUM_SEQUENCES, -NUM_SEQUENCES - 1):
        with pytest.raises(IndexError):
            cache[number]


def test_what_is_returned_does_not_write_through(whole):
    cache = kd_cache.TeacherCache(whole, **IDENTITY)
    for tensor in (cache[0].ids, cache[0].logprobs, cache[0].tail_logprob, cache[0].extras["input_ids"]):
        tensor.zero_()
    check_sequence(cache[0], 0)


@pytest.mark.parametrize(
    "vocab_size", [1, 255, 2**16 - 1, 2**16, 2**17 - 1, 2**17, 2**18, 2**20 - 1, 2**20, codec.MAX_VOCAB_SIZE], ids=str
)
def test_packed_ids_at_the_edges_of_their_bits(vocab_size):
    edges = [-1, 0, 1, 254, 255, 2**16 - 2, 2**16 - 1, 2**16, 2**17 - 2, 2**17 - 1, 2**20 - 1, vocab_size - 1]
    edges = [edge for edge in edges if edge < vocab_size]
    for k in (len(edges), 1, 8):
        ids = torch.tensor([edges[i : i + k] for i in range(len(edges) - k + 1)] or [[0] * k])
        layout = codec.Layout(k, vocab_size, False, {})
        rows = layout.encode(ids, torch.zeros(ids.shape), None, {})
        for name, (dtype, shape) in layout.fields.items():
            assert (rows[name].dtype, rows[name].shape) == (dtype, (len(ids), *shape)), name
        assert torch.equal(layout.decode(rows).ids, ids.to(torch.int32))


@pytest.mark.parametrize(
    "vocab_size, k, token_bytes", [(32000, 64, 264), (128256, 64, 272), (262144, 64, 296)], ids=str
)
def test_a_million_tokens_of_64_take_under_450_mb(tmp_path, vocab_size, k, token_bytes):
    """From a smaller cache: a shard is so many bytes per token and per sequence and a header, exactly."""
    length, count = 500, 8
    with kd_cache.TeacherCacheWriter(tmp_path, tokenizer="t", vocab_size=vocab_size, k=k) as writer:
        for _ in range(count):
            ids = torch.randint(vocab_size, (length, k))
            writer.append(ids, torch.full((length, k), -5.0), torch.zeros(length))
    (shard,) = shards(tmp_path)
    size = shard.stat().st_size
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    assert size - header == count * length * token_bytes + 16 * count + 8
    assert header < 1024
    million = 1_000_000 / (count * length) * size
    assert million < 450e6, f"{million / 1e6:.0f} MB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_corners_of_log_probabilities(tmp_path, dtype):
    """A row that is sure, one without any probability, one of unused slots, a large range; a sequence of nothing."""
    logprobs = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [torch.nan, 3.0], [-1e-4, -3e4]], dtype=dtype)
    ids = torch.tensor([[5, 6], [0, 1], [-1, -1], [8, 9]])
    with kd_cache.TeacherCacheWriter(tmp_path, tokenizer="t", vocab_size=10, k=2, tail=False) as writer:
        writer.append(ids, logprobs)
        writer.append(ids[:0], logprobs[:0])
    cache = kd_cache.TeacherCache(tmp_path, tokenizer="t", vocab_size=10)
    expected = logprobs.float().masked_fill(ids < 0, -torch.inf)
    torch.testing.assert_close(cache[0].logprobs, expected, rtol=2**-11, atol=1e-7)
    assert cache[0].tail_logprob is None and cache[0].extras == {}
    assert cache[1].ids.shape == (0, 2)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("lead", [0.0, 30.0], ids=["spread", "sure"])
def test_error_of_the_loss(tmp_path, divergence, lead):
    """Per token below 5e-4 nats, and 2e-5 in the mean; a sure teacher's tiny tail is not made by rounding."""
    teacher, student = torch.randn(512, 4096) * 3, torch.randn(512, 4096) * 3
    teacher[:, 0] += lead
    # Sure, but with an entropy: the second token has a tenth.
    teacher[:, 1] = teacher[:, 0] - 2 if lead else teacher[:, 1]
    student = teacher + torch.randn_like(teacher)
    logprobs, ids = torch.log_softmax(teacher, -1).topk(64)
    with kd_cache.TeacherCacheWriter(tmp_path, tokenizer="t", vocab_size=4096, k=64, tail=False) as writer:
        writer.append(ids, logprobs)
    found = kd_cache.TeacherCache(tmp_path, tokenizer="t", vocab_size=4096)[0]
    loss = functools.partial(kd.topk_kd_loss, student, divergence=divergence, reduction="none")
    difference = loss(found.ids, found.logprobs) - loss(ids, logprobs)
    assert difference.abs().max() < 5e-4 and difference.mean().abs() < 2e-5
    if lead:
        unshifted = loss(ids, logprobs.half()) - loss(ids, logprobs)
        assert unshifted.abs().mean() > 10 * difference.abs().mean()


@pytest.mark.parametrize("length", [1, 4])
def test_sequences_of_any_strides(tmp_path, length):
    logprobs = torch.log_softmax(torch.randn(K + 1, length), 0).T
    ids, tail = torch.randint(V, (2 * K, length)).T[:, ::2], torch.cat([logprobs, logprobs], 1)[:, K]
    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        writer.append(ids, logprobs[:, :K], tail, input_ids=ids[:, 0].int())
    (found,) = kd_cache.TeacherCache(tmp_path, **IDENTITY, verify="full")
    assert torch.equal(found.ids, ids.int()) and torch.equal(found.tail_logprob, tail)
    torch.testing.assert_close(found.logprobs.float(), logprobs[:, :K], rtol=1e-2, atol=1e-3)
    assert torch.equal(found.extras["input_ids"], ids[:, 0].int())
    assert kd_cache.head_fingerprint(logprobs[:, :K]) == kd_cache.head_fingerprint(logprobs[:, :K].contiguous())


def test_wrong_input_adds_nothing(tmp_path):
    ids, logprobs, tail, input_ids = captured(0)
    wrong = [
        (TypeError, "ids must be int64 or int32", (ids.float(), logprobs, tail), {"input_ids": input_ids}),
        (ValueError, "ids must have shape", (ids[:, :-1], logprobs, tail), {"input_ids": input_ids}),
        (ValueError, "ids must be in", (ids + V, logprobs, tail), {"input_ids": input_ids}),
        (ValueError, "logprobs must have the shape", (ids, logprobs[:-1], tail), {"input_ids": input_ids}),
        (ValueError, "at most 0 and not NaN where", (ids, logprobs / 0 * 0, tail), {"input_ids": input_ids}),
        (ValueError, "tail_logprob must be given", (ids, logprobs), {"input_ids": input_ids}),
        (ValueError, "tail_logprob must have one value", (ids, logprobs, tail[:-1]), {"input_ids": input_ids}),
        (ValueError, "tail_logprob must be log-prob", (ids, logprobs, tail * torch.nan), {"input_ids": input_ids}),
        (TypeError, "tail_logprob must be of floating", (ids, logprobs, tail.int()), {"input_ids": input_ids}),
        (ValueError, "extras must be", (ids, logprobs, tail), {}),
        (ValueError, "input_ids must fit int32, got int64", (ids, logprobs, tail), {"input_ids": input_ids + 2**40}),
    ]
    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        for error, message, arguments, extras in wrong:
            with pytest.raises(error, match=message):
                writer.append(*arguments, **extras)
        assert len(writer) == 0
        append(writer, 0)
    check_sequence(kd_cache.TeacherCache(tmp_path, **IDENTITY)[0], 0)
    with pytest.raises(ValueError, match="closed"):
        append(writer, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 65504.0, 0.5], ids=str)
@pytest.mark.parametrize("name", ["logprobs", "tail_logprob"])
def test_what_is_no_log_probability_is_refused(tmp_path, name, value, dtype):
    """Probabilities, for one. A few roundings above 0, at the size of the logits, are a mass of 1."""
    ids, logprobs, tail, input_ids = captured(0)
    given = {n: x.to(dtype, copy=True).contiguous() for n, x in (("logprobs", logprobs), ("tail_logprob", tail))}
    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        given[name].view(-1)[-2] = value
        with pytest.raises(ValueError, match=f"{name} must be log-probabilities, at most 0 and not NaN"):
            writer.append(ids, input_ids=input_ids, **given)
        assert len(writer) == 0
        given[name].view(-1)[-2] = 8 * torch.finfo(dtype).eps
        writer.append(ids, input_ids=input_ids, **given)
        given[name].fill_(-torch.inf)
        writer.append(ids, input_ids=input_ids, **given)
    found = kd_cache.TeacherCache(tmp_path, **IDENTITY)[1]
    assert (getattr(found, name) == -torch.inf).all()


@pytest.mark.parametrize("tail", [True, False])
def test_samples_may_weigh_more_than_1(tmp_path, tail):
    """Ids that were drawn have no tail, and those that were drawn too seldom weigh more."""
    samples = kd.capture_samples(torch.randn(40, 30) * 4, 8, proposal_power=0.0)
    assert (samples.logprobs > 0.5).any()
    with kd_cache.TeacherCacheWriter(tmp_path, tokenizer="t", vocab_size=30, k=8, tail=tail) as writer:
        writer.append(*(samples if tail else samples[:2]))
        for value in (torch.inf, torch.nan, 1e5):
            wrong = torch.where(samples.ids < 0, samples.logprobs, value)
            with pytest.raises(ValueError, match="logprobs must not be NaN or above 65504"):
                writer.append(samples.ids, wrong, *([samples.tail_logprob] if tail else []))
    found = kd_cache.TeacherCache(tmp_path, tokenizer="t", vocab_size=30)[0]
    torch.testing.assert_close(found.logprobs, samples.logprobs, rtol=2**-10, atol=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 2**24}, "vocab_size must be at most 16777215"),
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"teacher": None}, "teacher must be a string"),
        ({"tokenizer": 3}, "tokenizer must be a string"),
        ({"extras": {"logprobs": torch.int32}}, "extras must not have the name"),
        ({"extras": {"labels": "int32"}}, "extras\\['labels'\\] must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_options_leave_no_cache(tmp_path, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kd_cache.TeacherCacheWriter(tmp_path / "new", **{**WRITER, **change})
    assert not (tmp_path / "new").exists()


# Data sets


def read_back(number, item):
    tail, input_ids = item["tail_logprob"], item["input_ids"]
    check_sequence(kd_cache.TeacherSequence(item["ids"], item["logprobs"], tail, {"input_ids": input_ids}), number)


@pytest.mark.parametrize("workers, context", [(0, None), (2, "fork"), (1, "spawn")], ids=["0", "2-fork", "1-spawn"])
def test_data_loader(whole, workers, context):
    dataset = kd_cache.TeacherDataset(kd_cache.TeacherCache(whole, **IDENTITY))
    # Some shards are mapped before the workers start.
    dataset[0], dataset[NUM_SEQUENCES - 1]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=workers, multiprocessing_context=context, collate_fn=kd_cache.collate
    )
    number = 0
    for batch in loader:
        longest = int(batch["length"].max())
        for row, length in enumerate(batch["length"].tolist()):
            item = {name: tensor[row] for name, tensor in batch.items() if name != "length"}
            assert all(len(tensor) == longest for tensor in item.values())
            read_back(number, {name: tensor[:length] for name, tensor in item.items()})
            assert (item["ids"][length:] == -1).all() and (item["logprobs"][length:] == -torch.inf).all()
            number += 1
    assert number == NUM_SEQUENCES


def test_padded_rows_have_no_loss(whole):
    dataset = kd_cache.TeacherDataset(kd_cache.TeacherCache(whole, **IDENTITY))
    batch = kd_cache.collate([dataset[0], dataset[1]], padding={"input_ids": 7})
    length, longest = batch["length"].tolist()
    assert length < longest and (batch["input_ids"][0, length:] == 7).all()
    loss = kd.topk_kd_loss(torch.randn(2, longest, V), batch["ids"], batch["logprobs"], reduction="none")
    assert (loss[0, length:].abs() < 1e-5).all() and (loss[0, :length] > 1e-3).all()


def test_pickle_takes_no_shard_along(whole):
    cache = kd_cache.TeacherCache(whole, **IDENTITY)
    cache[0]
    pickled = pickle.dumps(cache)
    assert len(pickled) < 5000
    check_sequence(pickle.loads(pickled)[4], 4)


# Damage


@pytest.mark.parametrize("verify", ["lazy", "full"])
def test_a_flipped_bit_anywhere_is_a_checksum_error(folder, verify):
    """Never a wrong sequence: what can still be read is right."""
    for path in shards(folder)[1:3]:
        intact = path.read_bytes()
        for position in range(0, len(intact), 41):
            flip(path, position, position % 8)
            noticed = 0
            try:
                cache = kd_cache.TeacherCache(folder, **IDENTITY, verify=verify)
            except kd_cache.ChecksumError as error:
                assert path.name in str(error)
                noticed += 1
            else:
                for number in range(len(cache)):
                    try:
                        check_sequence(cache[number], number)
                    except kd_cache.ChecksumError as error:
                        assert path.name in str(error)
                        noticed += 1
            assert noticed, (path.name, position)
            path.write_bytes(intact)


def test_a_flipped_bit_in_the_index_is_an_error(folder):
    path = folder / "index.json"
    for position in range(0, path.stat().st_size, 7):
        before = json.loads(path.read_bytes())
        flip(path, position, position % 7)
        try:
            same = json.loads(path.read_bytes()) == before
        except ValueError:
            same = False
        # White space is not content.
        if not same:
            with pytest.raises(kd_cache.CacheFormatError):
                kd_cache.TeacherCache(folder, **IDENTITY)
        flip(path, position, position % 7)


@pytest.mark.parametrize("verify", ["lazy", "full", "none"])
@pytest.mark.parametrize(
    "damage, error",
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), kd_cache.TruncatedShardError),
        (lambda path: os.truncate(path, 0), kd_cache.TruncatedShardError),
        (lambda path: path.unlink(), kd_cache.MissingShardError),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), kd_cache.ChecksumError),
    ],
    ids=["a-byte-short", "empty", "missing", "a-byte-long"],
)
def test_a_shard_of_another_size_is_an_error_by_name(folder, damage, error, verify):
    path = shards(folder)[2]
    opened = kd_cache.TeacherCache(folder, **IDENTITY, verify=verify)
    damage(path)
    with pytest.raises(error, match=path.name):
        kd_cache.TeacherCache(folder, **IDENTITY, verify=verify)
    with pytest.raises(error, match=path.name):
        opened[4]
    with pytest.raises(error, match=path.name):
        kd_cache.TeacherCacheWriter(folder, **WRITER)


def test_a_shard_cannot_stand_in_for_another(tmp_path):
    """Two shards of equal size and intact checksums, exchanged."""
    with kd_cache.TeacherCacheWriter(tmp_path, **{**WRITER, "shard_bytes": 1}) as writer:
        append(writer, 0)
        append(writer, 3)
    first, second = shards(tmp_path)
    assert first.stat().st_size == second.stat().st_size
    os.rename(first, tmp_path / "aside")
    os.rename(second, first)
    os.rename(tmp_path / "aside", second)
    cache = kd_cache.TeacherCache(tmp_path, **IDENTITY, verify="none")
    with pytest.raises(kd_cache.ChecksumError, match="header"):
        cache[0]


def test_not_a_cache(tmp_path, folder):
    with pytest.raises(kd_cache.CacheFormatError, match="not a teacher cache"):
        kd_cache.TeacherCache(tmp_path, **IDENTITY)
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 3'))
    with pytest.raises(kd_cache.CacheFormatError, match="version 3, and 1 and 2 can be read"):
        kd_cache.TeacherCache(folder, **IDENTITY)
    path.unlink()
    with pytest.raises(kd_cache.CacheFormatError, match="not overwritten"):
        kd_cache.TeacherCacheWriter(folder, **WRITER)


# A damaged or hostile index whose own checksum is right


def sealed(content):
    """An index of any content, with the checksum that goes with it."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def nodes(value, path=()):
    """The paths to everything in a value of JSON."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*path, key))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


JUNK = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**200, 0.0, 1.0, -0.5, 1e300, float("nan"), float("inf")),
    *("", "x", "float32", "load", "\ud800", "\0", "/etc/passwd", "../x", "teacher-00001.safetensors", "f" * 64),
    *([], [1], {}, {"file": "x"}, nested(300)),
)


def mutations(content):
    """Every node removed, doubled, or replaced by every piece of junk; the path, what it was and what it is."""
    for path in nodes(content):
        for kind, junk in [("replace", junk) for junk in JUNK] + [("remove", None), ("add", 1), ("double", None)]:
            root = {"all": copy.deepcopy(content)}
            *above, key = ("all", *path)
            parent = root
            for step in above:
                parent = parent[step]
            before = parent[key]
            if kind == "replace":
                if (type(junk), junk) == (type(before), before):
                    continue
                parent[key] = junk
            elif kind == "remove":
                del parent[key]
            elif kind == "add" and isinstance(before, dict):
                before["more"] = junk
            elif kind == "double" and isinstance(before, list):
                before.append(before[0] if before else 1)
            else:
                continue
            if isinstance(root.get("all"), dict):
                yield path, kind, before, root["all"]


def may_stay(kind, path, before, after):
    """True if this is an index as well: of another teacher, or of shards that are not there."""
    if kind == "remove":
        return path == ("extras", "input_ids") or path == ("shards", 1)
    if kind == "add" or kind == "double" or type(after) is not type(before):
        return False
    if path[:1] == ("shards",) and len(path) == 3:
        return path[-1] in ("sequences", "tokens", "bytes") and 0 <= after < 2**63 or after == "f" * 64
    if path[-1] in ("vocab_size", "k"):
        return after > 0
    return path[-1] in ("tokenizer", "teacher", "tail", "temperature") or after in ([], {}, "float32")


def test_every_malformed_index_is_a_format_error(folder):
    """Types, missing and further keys, huge and nested values, in every place."""
    path = folder / "index.json"
    content = json.loads(path.read_bytes())
    del content["sha256"], content["shards"][2:]
    count, stayed = 0, set()
    for where, kind, before, mutated in mutations(content):
        path.write_text(sealed(mutated))
        count += 1
        try:
            found = index.Index.read(folder)
        except kd_cache.CacheFormatError as error:
            assert str(path) in str(error)
            continue
        after = mutated
        for step in where[: len(where) - (kind == "remove")]:
            after = after[step]
        assert may_stay(kind, where, before, after), f"{kind} at {where}: {before!r} became {after!r}"
        # The identity is the one in the file, and using the cache works or says what is wrong.
        assert json.loads(json.dumps(found.identity.content())) == mutated["identity"]
        stayed.add(where[0] if len(where) == 1 else where[-1])
        with contextlib.suppress(kd_cache.CacheError):
            cache = kd_cache.TeacherCache(folder, **IDENTITY)
            list(cache)
    assert count > 700 and {"teacher", "k", "tokens", "shards"} <= stayed


def test_two_faults_in_an_index_are_a_format_error_as_one(folder):
    path = folder / "index.json"
    content = json.loads(path.read_bytes())
    del content["sha256"], content["shards"][2:]
    draws = random.Random(0)
    once = [mutated for _, _, _, mutated in mutations(content)]
    for first in draws.sample(once, 8):
        for _, _, _, second in draws.sample(list(mutations(first)), 50):
            path.write_text(sealed(second))
            with contextlib.suppress(kd_cache.CacheError):
                list(kd_cache.TeacherCache(folder, tokenizer=None, vocab_size=None))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0" * 64, b"\xff\xfe{}", b"\x80", b"null", b"[]", b'"x"', b"{", b"NaN", b"[" * 100_000, b"9" * 10_000),
        *(
            b'{"a":' * 100_000,
            b'{"format": "kdkernels-teacher-cache", "version": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        ),
        *("{}".encode("utf-16"), b'{"format": "kdkernels-teacher-cache", "version": 1, "sha256": Infinity}'),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_an_index_that_is_no_json_is_a_format_error(folder, content):
    (folder / "index.json").write_bytes(content)
    for open_it in (
        lambda: kd_cache.TeacherCache(folder, **IDENTITY),
        lambda: kd_cache.TeacherCacheWriter(folder, **WRITER),
    ):
        with pytest.raises(kd_cache.CacheFormatError):
            open_it()
    assert cli.main(["cache", "info", str(folder)]) == cli.main(["cache", "verify", str(folder)]) == 1


@pytest.mark.parametrize("kind", ["folder", "loop", "nowhere", "fifo", "not-in-a-folder", "null-device"])
def test_an_index_that_is_no_file_is_a_format_error(folder, kind):
    """And nothing waits for what will never be written."""
    path = folder / "index.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("index.json")
    elif kind == "nowhere":
        path.symlink_to("not-there")
    elif kind == "null-device":
        path.symlink_to(os.devnull)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        folder = shards(folder)[0]
    with pytest.raises(kd_cache.CacheFormatError):
        kd_cache.TeacherCache(folder, **IDENTITY)
    if kind != "not-in-a-folder":
        with pytest.raises(kd_cache.CacheFormatError):
            kd_cache.TeacherCacheWriter(folder, **WRITER)
        assert os.path.lexists(path)


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../elsewhere", "sub/teacher-00000.safetensors", "./teacher-00000.safetensors", "", ".", ".."),
        *("teacher-00001.safetensors", "teacher-00000.safetensors.part", "index.json", ".lock", "\0", "..\\x"),
    ],
    ids=repr,
)
def test_an_index_names_its_own_shards_and_nothing_else(folder, name, monkeypatch):
    """Nothing but the index is looked at, not even whether it is there."""
    path = folder / "index.json"
    content = json.loads(path.read_bytes())
    content["shards"][0]["file"] = name
    path.write_text(sealed(content))
    seen = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **options: (seen.append(self.name), stat(self, **options))[1])
    for verify in ("lazy", "full", "none"):
        with pytest.raises(kd_cache.CacheFormatError, match=r"shards\[0\].file must be one of teacher-00000"):
            kd_cache.TeacherCache(folder, **IDENTITY, verify=verify)
    with pytest.raises(kd_cache.CacheFormatError, match=r"shards\[0\].file"):
        kd_cache.TeacherCacheWriter(folder, **WRITER)
    assert set(seen) <= {"index.json", folder.name}


@pytest.mark.parametrize("kind", ["folder", "loop", "nowhere", "fifo", "null-device"])
def test_a_shard_that_is_no_file_is_missing(folder, kind):
    path = shards(folder)[1]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": path.name, "nowhere": "not-there", "null-device": os.devnull}[kind])
    for verify in ("lazy", "full"):
        with pytest.raises(kd_cache.MissingShardError, match=path.name):
            kd_cache.TeacherCache(folder, **IDENTITY, verify=verify)
    assert cli.main(["cache", "verify", str(folder)]) == 1


def test_shards_may_be_links(folder, tmp_path):
    """As the download folders of model hubs have them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate([*shards(folder), folder / "index.json"]):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    for number, sequence in enumerate(kd_cache.TeacherCache(folder, **IDENTITY, verify="full")):
        check_sequence(sequence, number)


# Identity


@pytest.mark.parametrize(
    "change, error",
    [
        ({"tokenizer": {"<s>": 0, "b": 1}}, kd_cache.VocabularyMismatchError),
        ({"vocab_size": V + 1}, kd_cache.VocabularyMismatchError),
        ({"k": K + 1}, kd_cache.IdentityMismatchError),
        ({"temperature": 2.0}, kd_cache.IdentityMismatchError),
        ({"teacher": "other"}, kd_cache.IdentityMismatchError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_foreign_teacher_is_an_error_by_name(folder, change, error):
    before = files(folder)
    with pytest.raises(error, match=next(iter(change))):
        kd_cache.TeacherCache(folder, **{**IDENTITY, **change})
    with pytest.raises(error, match=next(iter(change))):
        kd_cache.TeacherCacheWriter(folder, **{**WRITER, **change})
    assert files(folder) == before


def test_other_extras_are_refused(folder):
    for change in ({"extras": None}, {"extras": None, "tail": False}):
        with pytest.raises(kd_cache.IdentityMismatchError, match="was begun with"):
            kd_cache.TeacherCacheWriter(folder, **{**WRITER, **change})


class FastTokenizer:
    def __init__(self, **content):
        self.content = content

    def to_str(self):
        return json.dumps(self.content)


class SlowTokenizer:
    def get_vocab(self):
        return {"a": 1, "b": 0}


def test_fingerprint():
    fingerprint = kd_cache.fingerprint
    assert fingerprint("any text") == "any text"
    assert re.fullmatch("sha256:[0-9a-f]{64}", fingerprint({"a": 0}))
    assert fingerprint({"a": 1, "b": 0}) == fingerprint({"b": 0, "a": 1}) == fingerprint(SlowTokenizer())
    assert fingerprint({"a": 0}) != fingerprint({"a": 1})
    fast = FastTokenizer(model={"vocab": {"a": 0}}, truncation=None)
    # The truncation and padding that a call asked for do not change the meaning of an id.
    assert fingerprint(fast) == fingerprint(FastTokenizer(model={"vocab": {"a": 0}}, truncation={"max_length": 5}))
    assert fingerprint(fast) != fingerprint(FastTokenizer(model={"vocab": {"b": 0}}))
    wrapped = type("Wrapped", (), {"backend_tokenizer": fast})()
    assert fingerprint(wrapped) == fingerprint(fast)
    with pytest.raises(TypeError, match="tokenizer must be"):
        fingerprint(3)


# Writers that stop


def die(point, folder, report):
    """Write the cache and kill this process at the ``point``-th of: half of a write, an fsync, a rename.

    After each sequence the number of those that are closed goes into ``report``, which outlives the process. The exit
    status is 0 if the process got to the end.
    """
    die_at(point)
    with kd_cache.TeacherCacheWriter(folder, **WRITER) as writer:
        for number in range(len(writer), NUM_SEQUENCES):
            append(writer, number)
            Path(report).write_text(str(writer.closed))
            if point < 0:
                time.sleep(0.01)
    Path(report).write_text(str(NUM_SEQUENCES))


def die_at_every_point(root):
    """Kill one process for each point, forked from here, so that torch is imported once; print how many there were."""
    for point in itertools.count():
        child = os.fork()
        if child == 0:
            die(point, Path(root, str(point)), Path(root, f"{point}.closed"))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            print(point)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status


def script(*arguments):
    """This file as a program of its own, which imports the kdkernels under test."""
    path = os.pathsep.join([str(Path(kd.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
    )


def check_killed(folder, report, whole):
    """Closed sequences are there and right; going on gives the very files of a writer that nobody killed."""
    closed = int(report.read_text() or 0) if report.exists() else 0
    if (folder / "index.json").exists():
        cache = kd_cache.TeacherCache(folder, **IDENTITY, verify="full")
        assert len(cache) >= closed
        for number, sequence in enumerate(cache):
            check_sequence(sequence, number)
        assert cli.main(["cache", "verify", str(folder)]) == 0
        closed = len(cache)
    else:
        assert closed == 0
    with kd_cache.TeacherCacheWriter(folder, **WRITER) as writer:
        assert len(writer) == writer.closed == closed
    assert files(write(folder)) == files(whole)
    return closed


def test_kill_at_every_step_of_writing(whole, tmp_path, monkeypatch):
    process = script("every-point", tmp_path)
    points = int(process.communicate(timeout=120)[0])
    assert process.returncode == 0
    # Index and shards, each: half written, before fsync, before the rename, before the folder's fsync.
    assert points == 4 * (1 + 2 * len(shards(whole)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    closed = [check_killed(tmp_path / str(p), tmp_path / f"{p}.closed", whole) for p in range(points)]
    # The kills came at every stage, from nothing to everything.
    assert closed[0] == 0 and closed[-1] == NUM_SEQUENCES and len(set(closed)) == 1 + len(shards(whole))
    assert closed == sorted(closed)


def test_kill_from_outside(whole, tmp_path):
    folder, report = tmp_path / "cache", tmp_path / "closed"
    process = script("slowly", folder, report)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not report.exists() or report.read_text() in ("", "0")):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < check_killed(folder, report, whole) < NUM_SEQUENCES


def test_order_of_durable_writes(tmp_path, monkeypatch):
    """A rename only of what is on the disk, and the index only after its shard."""
    order, fsync, replace = [], os.fsync, os.replace

    def traced_fsync(descriptor):
        order.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def traced_replace(source, target):
        order.append(("rename", Path(target).name))
        replace(source, target)

    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        append(writer, 0)
        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(os, "replace", traced_replace)
        writer.flush()
        monkeypatch.undo()
    shard = shards(tmp_path)[0].name
    assert order == [
        step
        for name in (shard, "index.json")
        for step in (("fsync", name + ".part"), ("rename", name), ("fsync", tmp_path.name))
    ]


def test_an_exception_closes_the_shard(tmp_path):
    with pytest.raises(ZeroDivisionError), kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        append(writer, 0)
        raise ZeroDivisionError
    check_sequence(kd_cache.TeacherCache(tmp_path, **IDENTITY)[0], 0)


def test_a_full_disk_is_an_error_and_the_shard_can_be_closed_later(tmp_path, monkeypatch, whole):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        append(writer, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                writer.flush()
        assert (len(writer), writer.closed) == (1, 0)
        for number in range(1, NUM_SEQUENCES):
            append(writer, number)
    assert files(tmp_path) == files(whole)


class FullDisk:
    """Raises ENOSPC at one step of writing: half of a write, an fsync or a rename, counted from the last ``fail``."""

    def __init__(self, monkeypatch):
        self.steps, self.point = 0, None
        fsync, replace, disk = os.fsync, os.replace, self

        class HalfWritten:
            def __init__(self, *arguments, **options):
                self.file = open(*arguments, **options)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, content):
                self.file.write(content[: len(content) // 2])
                disk.step()
                self.file.write(content[len(content) // 2 :])

        monkeypatch.setattr(index, "open", HalfWritten, raising=False)
        monkeypatch.setattr(os, "fsync", lambda descriptor: (disk.step(), fsync(descriptor)))
        monkeypatch.setattr(os, "replace", lambda *paths: (disk.step(), replace(*paths)))

    def fail(self, point):
        self.steps, self.point = 0, point

    def step(self):
        self.steps += 1
        if self.point is not None and self.steps > self.point:
            raise OSError(errno.ENOSPC, "No space left on device")


# A shard and then the index, each: half written, before fsync, before the rename, before the folder's fsync.
@pytest.mark.parametrize("point", range(8))
def test_an_append_that_raises_has_added_nothing(tmp_path, monkeypatch, whole, point):
    disk = FullDisk(monkeypatch)
    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        failed = 0
        for number in range(NUM_SEQUENCES):
            for _ in range(3):
                before = len(writer), writer.closed
                disk.fail(point)
                try:
                    append(writer, number)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    failed += 1
                    assert (len(writer), writer.closed) == before
                    assert not list(tmp_path.glob("*.part"))
                    assert len(kd_cache.TeacherCache(tmp_path, **IDENTITY, verify="full")) == before[1]
                else:
                    break
            disk.fail(None)
            if len(writer) == number:
                append(writer, number)
            assert len(writer) == number + 1
        assert failed or point == 7
        writer.flush()
        assert writer.closed == NUM_SEQUENCES
    assert files(tmp_path) == files(whole)


def test_a_shard_counts_as_closed_when_the_rename_is_on_the_disk(tmp_path, monkeypatch):
    """The index names the sequence and the folder's fsync fails: the sequence was added, and is not yet safe."""
    disk = FullDisk(monkeypatch)
    with kd_cache.TeacherCacheWriter(tmp_path, **{**WRITER, "shard_bytes": 1}) as writer:
        disk.fail(7)
        append(writer, 0)
        assert (len(writer), writer.closed) == (1, 0)
        disk.fail(0)
        for call in (lambda: append(writer, 1), writer.flush):
            with pytest.raises(OSError, match="No space"):
                call()
            assert (len(writer), writer.closed) == (1, 0)
        disk.fail(None)
        append(writer, 1)
        assert (len(writer), writer.closed) == (2, 2)
    for number, sequence in enumerate(kd_cache.TeacherCache(tmp_path, **IDENTITY, verify="full")):
        check_sequence(sequence, number)


def test_a_file_that_may_not_grow_loses_no_sequence_and_doubles_none(tmp_path, whole):
    """The limit is the kernel's own. An append after one that was given up works as well once there is room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        append(writer, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        try:
            for number in (1, 2, 1):
                with pytest.raises(OSError):
                    append(writer, number)
                assert (len(writer), writer.closed) == (1, 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for number in range(1, NUM_SEQUENCES):
            append(writer, number)
    assert files(tmp_path) == files(whole)


def forked(action):
    """Run ``action`` in a forked process; its exit status, 0 where it returned true."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if action() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_closed_writer_lets_go_of_the_folder_while_a_forked_process_lives(tmp_path):
    begun, end = os.pipe(), os.pipe()
    writer = kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
    append(writer, 0)
    child = os.fork()
    if child == 0:
        os.write(begun[1], b"1")
        os.close(end[1])
        os.read(end[0], 1)
        os._exit(0)
    try:
        os.read(begun[0], 1)
        with pytest.raises(kd_cache.CacheLockedError):
            kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
        writer.close()
        with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as again:
            assert len(again) == 1
        # One that was forgotten, too.
        forgotten = kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
        with pytest.warns(ResourceWarning):
            del forgotten
            gc.collect()
        kd_cache.TeacherCacheWriter(tmp_path, **WRITER).close()
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.close(end[1])
        os.waitpid(child, 0)
        for descriptor in (*begun, end[0]):
            os.close(descriptor)


def test_a_forked_process_neither_writes_nor_unlocks(tmp_path):
    """The child may use the writer, close it, leave its ``with`` block, or let the collector have it."""
    writer = kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
    append(writer, 0)
    before = files(tmp_path)

    def refused(call):
        try:
            call()
        except kd_cache.CacheLockedError as error:
            return f"process {os.getppid()}" in str(error)
        return False

    def left():
        with writer:
            pass
        writer.close()
        return True

    def forgotten():
        nonlocal writer
        writer = None
        gc.collect()
        return True

    for action in (lambda: refused(lambda: append(writer, 1)), lambda: refused(writer.flush), left, forgotten):
        assert forked(action) == 0
        assert files(tmp_path) == before
        with pytest.raises(kd_cache.CacheLockedError, match="another writer"):
            kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
    append(writer, 1)
    writer.close()
    assert len(kd_cache.TeacherCache(tmp_path, **IDENTITY, verify="full")) == 2


def test_a_killed_writer_lets_go_of_the_folder_while_a_forked_process_lives(tmp_path):
    """A worker that outlives the capture loop does not keep the next run out."""
    read, write_ = os.pipe()
    capture = os.fork()
    if capture == 0:
        os.close(read)
        writer = kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
        append(writer, 0)
        writer.flush()
        worker = os.fork()
        if worker == 0:
            os.write(write_, str(os.getpid()).encode())
            time.sleep(60)
            os._exit(0)
        os.close(write_)
        time.sleep(60)
        os._exit(0)
    os.close(write_)
    worker = int(os.read(read, 20))
    try:
        os.kill(capture, signal.SIGKILL)
        os.waitpid(capture, 0)
        with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
            assert len(writer) == 1
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)


@pytest.mark.parametrize("name", [".lock", "index.json", "index.json.part", "teacher-00000.safetensors.part"])
def test_a_link_in_the_folder_leads_no_writer_to_another_file(tmp_path, name):
    folder, precious = tmp_path / "cache", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("do not lose")
    (folder / name).symlink_to(precious)
    with contextlib.suppress(OSError, kd_cache.CacheError), kd_cache.TeacherCacheWriter(folder, **WRITER) as writer:
        append(writer, 0)
    assert precious.read_text() == "do not lose"


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path):
    with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
        append(writer, 0)
        writer.flush()
        with pytest.raises(kd_cache.CacheLockedError, match="another writer"):
            kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
        reader = kd_cache.TeacherCache(tmp_path, **IDENTITY)
        append(writer, 1)
    assert len(reader) == 1
    check_sequence(reader[0], 0)
    assert len(kd_cache.TeacherCache(tmp_path, **IDENTITY)) == 2


# The command


def test_info(whole, capsys):
    assert cli.main(["cache", "info", str(whole)]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    tokens = sum(len(captured(number)[0]) for number in range(NUM_SEQUENCES))
    size = sum(path.stat().st_size for path in shards(whole))
    assert facts["vocabulary"] == f"{V:,}" and facts["top-k"] == str(K)
    assert (facts["shards"], facts["sequences"], facts["tokens"]) == (str(NUM_SHARDS), str(NUM_SEQUENCES), str(tokens))
    assert facts["tokenizer"] == kd_cache.fingerprint(IDENTITY["tokenizer"])
    assert facts["bytes/token"] == f"{size / tokens:.2f}" and facts["extras"] == "input_ids (int32)"


def test_verify_names_every_damaged_shard(folder, capsys):
    assert cli.main(["cache", "verify", str(folder)]) == 0
    assert "5 shards, 0 damaged" in capsys.readouterr().out
    paths = shards(folder)
    flip(paths[0], -1)
    os.truncate(paths[1], 100)
    paths[3].unlink()
    assert cli.main(["cache", "verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    outcomes = ["ChecksumError", "TruncatedShardError", "ok", "MissingShardError", "ok"]
    assert [line.split()[1].rstrip(":") for line in lines[:5]] == outcomes
    assert all(line.startswith(path.name) for line, path in zip(lines, paths, strict=False))
    assert lines[5] == "5 shards, 3 damaged"


@pytest.mark.parametrize("action", ["info", "verify"])
def test_the_command_on_a_folder_that_is_no_cache(action, tmp_path, capsys):
    assert cli.main(["cache", action, str(tmp_path)]) == 1
    assert "CacheFormatError" in capsys.readouterr().err


def test_the_command_is_installed_and_helps(capsys):
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nkdkernels = "kdkernels.cli:main"\n' in text
    for arguments in (["--help"], ["cache", "--help"], ["cache", "verify", "--help"]):
        assert cli.main(arguments) == 0
    assert "exit status is 1" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["cache", "mend", "somewhere"]) == 2


# Packages


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['safetensors'] = None; import kdkernels; print('imported'); import kdkernels.cache"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == "imported\n"
    assert "kdkernels.cache needs the package safetensors: pip install numpy safetensors" in done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "every-point":
        die_at_every_point(sys.argv[2])
    else:
        die(-1, *sys.argv[2:])


def test_a_close_that_fails_keeps_the_lock_and_what_was_appended(tmp_path, monkeypatch, whole):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    writer = kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
    append(writer, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                writer.close()
        with pytest.raises(kd_cache.CacheLockedError):
            kd_cache.TeacherCacheWriter(tmp_path, **WRITER)
    assert (len(writer), writer.closed) == (1, 0)
    for number in range(1, NUM_SEQUENCES):
        append(writer, number)
    writer.close()
    assert files(tmp_path) == files(whole)
    kd_cache.TeacherCacheWriter(tmp_path, **WRITER).close()


def test_a_with_block_that_fails_to_close_can_be_closed_later(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        with kd_cache.TeacherCacheWriter(tmp_path, **WRITER) as writer:
            append(writer, 0)
            patch.setattr(os, "fsync", full)
    writer.close()
    check_sequence(kd_cache.TeacherCache(tmp_path, **IDENTITY)[0], 0)
