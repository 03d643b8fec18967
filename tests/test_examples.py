"""The examples run as a user runs them, in a few steps, and print what they must."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = ("--steps", "12", "--teacher-steps", "20", "--batch-size", "4")


def run(name, *options, ranks=0):
    """In one process, or in so many of torchrun."""
    path = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launcher = []
    if ranks:
        # A machine need not know its own name.
        environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launcher += ["--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, EXAMPLES / f"{name}.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def printed(done, before):
    """The numbers that follow a text, in their order."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(x) for x in re.findall(re.escape(before) + r" ([\d.]+)", done.stdout)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the language models' teacher, which is trained once."""
    pytest.importorskip("tokenizers", reason="the examples train a vocabulary with tokenizers")
    return tmp_path_factory.mktemp("teacher")


def losses(done):
    found = [float(x) for x in re.findall(r"^step \d+: loss ([\d.]+)$", done.stdout, flags=re.M)]
    assert done.returncode == 0 and len(found) > 1, done.stdout + done.stderr
    return found


@pytest.mark.slow
def test_digits():
    done = run("distill_digits", "--steps", 400, "--teacher-steps", 300)
    assert printed(done, "teacher:")[0] > 93 and printed(done, "student:")[0] > 90
    first, *_, last = losses(done)
    assert last < 0.6 * first


@pytest.mark.slow
def test_language_model_keeps_its_teacher_and_has_one_loss_of_logits_and_of_hidden_states(folder):
    done = run("distill_lm", *FEW, "--folder", folder)
    teacher, student = printed(done, "perplexity")
    assert "to be kept in" in done.stdout and 1 < teacher < 8192 / 4 and 1 < student < 8192 / 4
    assert losses(done)[-1] > 0
    again = run("distill_lm", *FEW, "--folder", folder, "--temperature", 1)
    assert "to be kept in" not in again.stdout and printed(again, "perplexity")[0] == teacher
    hidden = run("distill_lm", *FEW, "--folder", folder, "--temperature", 1, "--fused-linear")
    # The same start but for the draws of the teacher's training, which both of these left out.
    assert losses(hidden) == pytest.approx(losses(again), rel=1e-2)
    assert losses(again) != pytest.approx(losses(done), rel=1e-2)


@pytest.mark.slow
def test_offline_asks_the_teacher_once_and_refuses_a_damaged_cache(folder):
    pytest.importorskip("safetensors", reason="the teacher's cache is of safetensors")
    options = (*FEW, "--folder", folder, "--top-k", 32)
    first = run("offline", *options)
    (cache,) = folder.glob("*-top-32-*")
    assert f"teacher: 0 of 48 sequences are in {cache}" in first.stdout
    assert printed(first, "cache:")[0] < 200 and 1 < printed(first, "perplexity")[0] < 8192 / 4
    second = run("offline", *options)
    assert f"teacher: 48 of 48 sequences are in {cache}" in second.stdout
    assert losses(second)[0] < 100
    (shard,) = cache.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    damaged = run("offline", *options)
    assert damaged.returncode != 0 and "ChecksumError" in damaged.stderr and "step" not in damaged.stdout


@pytest.mark.slow
def test_on_policy_compares_its_losses_from_one_start(folder):
    options = ("--steps", 4, "--first-steps", 4, "--teacher-steps", 20, "--batch-size", 4, "--length", 24)
    done = run("on_policy", *options, "--folder", folder)
    perplexities, divergences = printed(done, "perplexity"), printed(done, "reverse KL")
    assert len(perplexities) == len(divergences) == 3 * 5
    assert len(set(perplexities[::5])) == len(set(divergences[::5])) == 1 and min(divergences) >= 0
    # Each goes its own way.
    assert len({perplexities[0], *perplexities[4::5]}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded_head", "fsdp"])
def test_two_ranks_have_the_losses_of_one_process(name, folder):
    options = ("--steps", 11, "--teacher-steps", 20, "--batch-size", 4, "--folder", folder)
    two, one = run(name, *options, ranks=2), run(name, *options, ranks=1)
    assert losses(two) == pytest.approx(losses(one), rel=1e-2)
    assert printed(two, "perplexity") == pytest.approx(printed(one, "perplexity"), rel=1e-2)
    assert 1 < printed(two, "perplexity")[0] < 8192 / 4
    assert "on each of 2 ranks" in two.stdout or "over 2 ranks" in two.stdout


def test_examples_are_short_enough_to_copy():
    assert {path.name: n for path in EXAMPLES.glob("*.py") if (n := len(path.read_text().splitlines())) > 115} == {}
