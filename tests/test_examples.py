"""The examples run as a user runs them, with --quick, and what they write says what it must."""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
pytest.importorskip("tqdm", reason="the examples show their progress with tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(name, cache_dir, output_dir, *options):
    """Run an example and return what it printed and the record it wrote, which a form names after itself."""
    command = [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--cache-dir", cache_dir, "--output-dir", output_dir]
    command += ["--threads", "1"]
    path = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    form = "".join(f"_{form}" for form in ("offline", "fused_linear") if f"--{form.replace('_', '-')}" in options)
    return done, json.loads((output_dir / f"{name}{form}.json").read_text())


def check(record, stdout, plot, names=("eager PyTorch", "kdkernels")):
    """True of both examples: the curves agree and fall, times and memory are those of a process that trains."""
    eager, fused = record["runs"]
    assert (eager["name"], fused["name"]) == names
    assert record["agreement"]["agree"] and "they agree" in stdout
    assert len(eager["losses"]) == len(fused["losses"]) == record["options"]["steps"]
    # Not the record's own figure: from the curves again.
    differences = [abs(a - b) / abs(a) for a, b in zip(eager["losses"], fused["losses"], strict=True)]
    assert max(differences) == pytest.approx(record["agreement"]["max_relative_difference"])
    assert max(differences) <= record["agreement"]["tolerance"] <= 1e-2
    for one in (eager, fused):
        assert all(math.isfinite(loss) and loss > 0 for loss in one["losses"])
        assert one["losses"][-1] < 0.6 * one["losses"][0]
        assert 0 < one["median_loss_ms"] < one["median_step_ms"]
        assert 50e6 < one["peak_memory_before_training_bytes"] <= one["peak_memory_bytes"]
    assert plot.read_bytes().startswith(PNG_SIGNATURE)
    assert plot.stat().st_size > 20_000


@pytest.mark.slow
def test_digits(cache_dir, tmp_path):
    pytest.importorskip("sklearn", reason="distill_digits takes its images from scikit-learn")
    done, record = run("distill_digits", cache_dir, tmp_path)
    check(record, done.stdout, tmp_path / "distill_digits.png")
    eager, fused = record["runs"]
    assert record["teacher"]["score"] > 0.95
    assert min(eager["score"], fused["score"]) > 0.9
    assert abs(eager["score"] - fused["score"]) < 0.01


@pytest.mark.slow
def test_language_model_keeps_its_teacher(cache_dir, tmp_path):
    pytest.importorskip("tokenizers", reason="distill_lm trains its vocabulary with tokenizers")
    first, record = run("distill_lm", cache_dir, tmp_path)
    check(record, first.stdout, tmp_path / "distill_lm.png")
    eager, fused = record["runs"]
    assert record["teacher"]["trained_now"]
    vocabulary = record["options"]["vocabulary"]
    assert vocabulary >= 8192
    for perplexity in (record["teacher"]["score"], eager["score"], fused["score"]):
        assert 1 < perplexity < vocabulary / 4
    assert eager["score"] == pytest.approx(fused["score"], rel=1e-2)

    again, repeated = run("distill_lm", cache_dir, tmp_path / "again", "--divergence", "reverse_kl")
    check(repeated, again.stdout, tmp_path / "again" / "distill_lm.png")
    assert not repeated["teacher"]["trained_now"]
    assert repeated["teacher"]["score"] == record["teacher"]["score"]
    assert "teacher       :" not in again.stderr, "the teacher was trained again"
    # The same start, another divergence: the option reaches both losses.
    assert repeated["runs"][0]["losses"] != eager["losses"]


@pytest.mark.slow
def test_language_model_from_hidden_states(cache_dir, tmp_path):
    """The same curve, and less memory: neither model's logits are ever there as a whole."""
    pytest.importorskip("tokenizers", reason="distill_lm trains its vocabulary with tokenizers")
    done, record = run("distill_lm", cache_dir, tmp_path, "--fused-linear", "--chunk-mib", "2")
    check(record, done.stdout, tmp_path / "distill_lm_fused_linear.png")
    eager, fused = record["runs"]
    assert eager["score"] == pytest.approx(fused["score"], rel=1e-2)
    added = [one["peak_memory_bytes"] - one["peak_memory_before_training_bytes"] for one in (eager, fused)]
    # Eager holds at least the logits of both, one log_softmax and the gradient, each [4, 128, 8192] in fp32.
    assert added[0] - added[1] > 3 * 4 * 128 * 8192 * 4


@pytest.mark.slow
def test_language_model_from_a_cache_of_its_teacher(cache_dir, tmp_path):
    pytest.importorskip("tokenizers", reason="distill_lm trains its vocabulary with tokenizers")
    pytest.importorskip("safetensors", reason="the teacher's cache is of safetensors")
    plot, names = tmp_path / "distill_lm_offline.png", ("online teacher", "teacher cache")
    options = ["--offline", "--top-k", "32"]
    first, record = run("distill_lm", cache_dir, tmp_path, *options)
    check(record, first.stdout, plot, names)
    online, cached = record["runs"]
    assert online["losses"] != cached["losses"], "the cache rounds"
    assert online["losses"][0] == pytest.approx(cached["losses"][0], rel=1e-4)
    assert online["score"] == pytest.approx(cached["score"], rel=1e-2)
    (folder,) = cache_dir.glob("lm-captured-*")
    assert f"teacher: to be captured in {folder}" in first.stdout and "capture " in first.stderr

    # The next run does not ask the teacher again; damage is an error by name there, and not a curve.
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(AssertionError, match="ChecksumError") as failure:
        run("distill_lm", cache_dir, tmp_path, *options)
    assert f"teacher: captured before, in {folder}" in str(failure.value) and "capture " not in str(failure.value)


@pytest.fixture
def common():
    specification = importlib.util.spec_from_file_location("examples_common", EXAMPLES / "common.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules[specification.name]


@pytest.mark.parametrize("change, status", [(1.0, 0), (1.0005, 0), (1.01, 1), (math.nan, 1), (math.inf, 1)], ids=str)
def test_exit_status_says_whether_the_curves_agree(common, tmp_path, capsys, change, status):
    def make_run(name, losses):
        times = [2.0] * len(losses)
        return common.Run(name, "torch", losses, [t / 2 for t in times], times, 10**8, 2 * 10**8, 0.9)

    curve = [1.0 / step for step in range(1, 21)]
    changed = [loss * change if step == 13 else loss for step, loss in enumerate(curve)]
    args = argparse.Namespace(output_dir=tmp_path, device="cpu", divergence="forward_kl", temperature=1.0, threads=1)
    example = common.Example("fake", "Fake", "accuracy", ".1%", 0.95, False, 1e-3, "[2, 10]")
    assert common.report(example, args, make_run("eager PyTorch", curve), make_run("kdkernels", changed)) == status
    assert ("THEY DO NOT AGREE" in capsys.readouterr().out) == (status == 1)
    assert json.loads((tmp_path / "fake.json").read_text())["agreement"]["agree"] == (status == 0)
    assert (tmp_path / "fake.png").read_bytes().startswith(PNG_SIGNATURE)


def test_teachers_are_kept_by_configuration(common, tmp_path):
    made = []

    def make():
        made.append(1)
        return {"weights": torch.ones(2)}

    path, trained = common.cached(tmp_path, "teacher", {"width": 1}, make)
    assert trained and torch.equal(torch.load(path, weights_only=True)["weights"], torch.ones(2))
    assert common.cached(tmp_path, "teacher", {"width": 1}, make) == (path, False)
    other, trained = common.cached(tmp_path, "teacher", {"width": 2}, make)
    assert trained and other != path
    assert len(made) == 2
    assert sorted(tmp_path.iterdir()) == sorted([path, other]), "an unfinished file was left behind"


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_eager_side_is_the_same_divergence(common, divergence):
    """The eager loss that kdkernels is compared with, against the textbook formula in float64."""
    student, teacher = torch.randn(2, 2, 3, 7, dtype=torch.float64).unbind()
    p, q = (torch.softmax(logits / 2.0, -1) for logits in (teacher, student))
    m = (p + q) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    expected = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[divergence]
    torch.testing.assert_close(common.eager_kd_loss(divergence, 2.0)(student, teacher), 4.0 * expected.mean())
