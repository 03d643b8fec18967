"""A cache that several processes write: whoever dies, and whoever goes on, it is the cache of one process.

Run as a script this file is the processes that the tests kill.
"""

import collections
import itertools
import json
import os
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
from kdkernels.cache import capture, index, shared

V, K, BATCH = 40, 5, 2
IDENTITY = {"tokenizer": "t", "vocab_size": V}
SHARDS = 6


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EMBEDDING, MIXING, HEAD = random(0, V, 16), random(1, 16, 16) / 4, random(2, 16, V + 8)
SEQUENCES = [torch.randint(0, V, (3 + i % 4,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(23)]


def model(ids, mask):
    """Rows see what is before them, and products of batches of other shapes may round otherwise."""
    hidden = EMBEDDING[ids].cumsum(1)
    return (hidden @ MIXING).tanh() @ HEAD


def run(folder, model=model, **options):
    # Two batches make a shard, but for the last.
    return capture.run(
        model, SEQUENCES, folder, **IDENTITY, k=K, **{"batch_size": BATCH, "shard_bytes": 500, **options}
    )


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes have it: their number is a part of what a product rounds to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """Of one process that nobody stopped; not to be changed."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    assert run(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cache"))


# The processes


def forked(action):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return child


def die_at_every_point(root):
    """A folder for each point at which process 1 of 2 died; print how many there were."""
    for point in itertools.count():

        def one_of_two(point=point):
            die_at(point)
            run(Path(root, str(point)), rank=1, world_size=2)

        if (status := os.waitpid(forked(one_of_two), 0)[1]) == 0:
            print(point)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status


def die(mark):
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(mark):
    """Others must not have done all the work before."""
    deadline = time.monotonic() + 120
    while mark and not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def at_once(folder, world_size, killed):
    """Some processes at once, of which one dies in its third batch; print how each ended."""

    def process(rank):
        count = itertools.count()

        def slow(ids, mask):
            with open(Path(folder, f"batches-{rank}"), "a") as file:
                file.write(json.dumps(ids[:, 0].tolist()) + "\n")
            if rank == killed and next(count) == 2:
                die(Path(folder, "dead"))
            wait_for(rank != killed and Path(folder, "dead"))
            time.sleep(0.02)
            return model(ids, mask)

        run(Path(folder, "cache"), slow, rank=rank, world_size=world_size)

    children = [forked(lambda rank=rank: process(rank)) for rank in range(world_size)]
    print(json.dumps([os.waitpid(child, 0)[1] for child in children]))


def of_torchrun(folder, killed):
    """One process of torchrun."""
    rank = int(os.environ["RANK"])
    count = itertools.count()

    def killing(ids, mask):
        if rank == killed and next(count) == 2:
            die(Path(folder).with_name("dead"))
        if rank != killed:
            wait_for(Path(folder).with_name("dead"))
            # Longer than torchrun needs to notice.
            time.sleep(2)
        return model(ids, mask)

    run(folder, killing, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))


def script(*arguments, launcher=()):
    """This file as a program of its own, which imports the kdkernels under test."""
    path = os.pathsep.join([str(Path(kd.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, __file__, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# Writing


def test_the_plan_has_every_sequence_in_whole_batches():
    assert shared.planned([1] * 10, 3, 10, 1) == [3, 3, 3, 1]
    assert shared.planned([1] * 10, 3, 10, 31) == [6, 4]
    assert shared.planned([5, 1, 1], 1, 10, 50) == [1, 2]
    # Shards for many processes, none larger than a writer makes them.
    few, many = (shared.planned([100] * count, 2, 272, None) for count in (5000, 40_000_000 // 100))
    assert sum(few) == 5000 and len(few) > 200
    assert sum(many) == 400_000 and max(many) * 100 * 272 < 65 * 2**20


def test_a_rank_that_dies_anywhere_leaves_what_others_go_on_with(whole, tmp_path, monkeypatch):
    done = script("every-point", tmp_path)
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    # Of each shard the file and its record, and the index: half written, before fsync, the rename, the folder's fsync.
    # Of the settings, which are written again where they are missing, all but the last.
    assert points == 3 + 4 * (2 * SHARDS + 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    kept = set()
    for point in range(points):
        calls = []

        def counted(ids, mask, calls=calls):
            calls.append(len(ids))
            return model(ids, mask)

        # By one process, by as many as before, by more.
        world_size = 1 + point % 3
        for rank in range(world_size):
            assert run(tmp_path / str(point), counted, rank=rank, world_size=world_size), point
        assert files(tmp_path / str(point)) == files(whole), point
        kept.add(len(SEQUENCES) - sum(calls))
    # From nothing to everything, and nothing that was closed was captured again.
    assert len(kept) == SHARDS + 1 and {0, len(SEQUENCES)} < kept


def test_the_living_take_what_a_dead_process_had_not_come_to(whole, tmp_path):
    done = script("at-once", tmp_path, 3, 1)
    assert json.loads(done.stdout) == [0, signal.SIGKILL, 0], done.stderr
    begun = [json.loads(line) for path in tmp_path.glob("batches-*") for line in path.read_text().splitlines()]
    plan = json.loads((tmp_path / "cache" / "capture.json").read_text())["shards"]
    # The dead one had written a shard and begun another. That one is captured a second time, by whom it was left to or
    # by the next call; no other is.
    whole_at = run(tmp_path / "cache")
    assert whole_at and files(tmp_path / "cache") == files(whole)
    batches = sum(-(-count // BATCH) for count in plan)
    assert batches - 2 <= len(begun) <= batches + 1
    counts = collections.Counter(map(tuple, begun))
    assert sorted(counts.values())[:-1] == [1] * (len(counts) - 1) and max(counts.values()) <= 2


@pytest.mark.slow
def test_other_ranks_go_on_after_torchrun_lost_one(whole, tmp_path, capsys):
    folder = tmp_path / "cache"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = script("torchrun", folder, 1, launcher=launcher)
    assert done.returncode != 0 and "Signal 9" in done.stderr
    assert not (folder / "index.json").exists()
    assert cli.main(["cache", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"{SHARDS} shards, " in out and "missing: the capture is not finished" in out
    assert run(folder, rank=2, world_size=3) and files(folder) == files(whole)
    assert cli.main(["cache", "verify", str(folder)]) == 0


def test_a_damaged_record_or_shard_is_written_again(whole, tmp_path):
    def stopped(ids, mask):
        if ids[0, 0] == SEQUENCES[12][0]:
            raise KeyboardInterrupt
        return model(ids, mask)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stopped)
    os.truncate(tmp_path / "teacher-00000.safetensors", 100)
    (tmp_path / "teacher-00001.json").write_text("{")
    assert run(tmp_path)
    assert files(tmp_path) == files(whole)


def test_a_whole_cache_that_lost_a_shard_is_not_called_whole(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cache")
    (tmp_path / "cache" / "teacher-00002.safetensors").unlink()
    with pytest.raises(kd_cache.MissingShardError, match=r"teacher-00002\.safetensors is missing"):
        run(tmp_path / "cache")
    (tmp_path / "cache" / "index.json").unlink()
    assert run(tmp_path / "cache")
    assert files(tmp_path / "cache") == files(whole)


def test_a_writer_and_a_capture_keep_out_of_each_other_s_folder(whole, tmp_path):
    begun = {**IDENTITY, "k": K, "extras": {"input_ids": torch.int32}}

    def beside(ids, mask):
        with pytest.raises(kd_cache.CacheLockedError):
            kd_cache.TeacherCacheWriter(tmp_path, **begun)
        return model(ids, mask)

    run(tmp_path, beside)
    with kd_cache.TeacherCacheWriter(tmp_path / "other", **begun) as writer:
        with pytest.raises(kd_cache.CacheLockedError):
            run(tmp_path / "other")
        assert len(writer) == 0
    with pytest.raises(capture.CaptureError, match="no capture began"):
        run(tmp_path / "other")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"temperature": 2.0}, kd_cache.IdentityMismatchError, "temperature"),
        ({"k": 4}, kd_cache.IdentityMismatchError, "with k 5, and 4"),
        ({"settings": {"length": 9}}, capture.CaptureError, "length None, and 9"),
    ],
)
def test_a_rank_that_disagrees_is_refused(folder, change, error, message):
    before = files(folder)
    with pytest.raises(error, match=message):
        capture.run(model, SEQUENCES, folder, **{**IDENTITY, "k": K, "rank": 1, "world_size": 2, **change})
    assert files(folder) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}', '{"settings": {}, "identity": {}, "shards": [0]}'])
def test_what_a_capture_was_begun_with_may_be_damaged(folder, content):
    (folder / "capture.json").write_text(content)
    with pytest.raises(capture.CaptureError, match=r"capture.json is damaged"):
        run(folder)
    # Nothing that readers need.
    assert len(kd_cache.TeacherCache(folder, **IDENTITY)) == len(SEQUENCES)
    assert cli.main(["cache", "verify", str(folder)]) == 0


def test_folders_of_an_earlier_version_are_refused_and_read(whole, tmp_path, capsys):
    for rank in range(2):
        part = Path(shutil.copytree(whole, tmp_path / f"part-0000{rank}-of-00002"))
        (part / "capture.json").write_text('{"length": 9, "sequences": 23, "sha256": "0"}')
    with pytest.raises(capture.CaptureError, match="earlier version"):
        run(tmp_path)
    assert cli.main(["cache", "verify", str(tmp_path)]) == 0
    assert f"{2 * SHARDS} shards, 0 damaged" in capsys.readouterr().out


def test_a_writer_may_go_on_with_what_was_captured(folder, capsys):
    wanted = kd.capture_topk(random(9, 4, V), K)
    with kd_cache.TeacherCacheWriter(folder, **IDENTITY, k=K, extras={"input_ids": torch.int32}) as writer:
        assert len(writer) == len(SEQUENCES)
        writer.append(*wanted, input_ids=torch.arange(4))
    assert cli.main(["cache", "verify", str(folder)]) == 0
    assert f"{SHARDS + 1} shards, 0 damaged" in capsys.readouterr().out
    assert run(folder) and len(kd_cache.TeacherCache(folder, **IDENTITY)) == len(SEQUENCES) + 1


def test_verify_names_shards_that_are_missing_doubled_torn_or_of_another_cache(folder, capsys):
    paths = [folder / f"teacher-{number:05d}.safetensors" for number in range(SHARDS + 1)]
    paths[0].unlink()
    os.truncate(paths[1], 100)
    shutil.copy(paths[3], paths[2])
    shutil.copy(paths[3], paths[SHARDS])
    # Of the index itself: a shard twice, and the last one left out.
    content = index.Index.read(folder)
    doubled = [*content.shards[:4], content.shards[3], *content.shards[5:]]
    doubled[4] = type(doubled[4])(**{**vars(doubled[4]), "file": paths[4].name})
    type(content)(**{**vars(content), "shards": tuple(doubled[:-1])}).write(folder)
    shutil.copy(paths[3], paths[4])
    assert cli.main(["cache", "verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    expected = [
        ("00000", "MissingShardError"),
        ("00001", "TruncatedShardError"),
        ("00002", "it is teacher-00003.safetensors for a second time"),
        ("00003", "  ok"),
        ("00004", "its header is not what was written"),
        ("00005", "missing: the index does not name it"),
        ("00006", "no shard of this cache"),
        ("7 shards", "6 damaged"),
    ]
    assert len(lines) == len(expected)
    assert all(name in line and fault in line for line, (name, fault) in zip(lines, expected, strict=True)), lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "every-point":
        die_at_every_point(sys.argv[2])
    elif sys.argv[1] == "at-once":
        at_once(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        of_torchrun(sys.argv[2], int(sys.argv[3]))
