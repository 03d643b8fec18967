"""The commands that need Typer and rich, and the capture of a teacher from a causal language model."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import bench, cli, divergences, testing

pytest.importorskip("typer", reason="the command line needs the package typer")
pytest.importorskip("safetensors", reason="the cache writes safetensors")

from kdkernels import cache as kd_cache  # noqa: E402
from kdkernels.cache import capture  # noqa: E402

V, K = 40, 5


# Without the packages


@pytest.mark.parametrize("arguments", [["--version"], ["env"], ["env", "--json"]])
def test_what_a_report_needs_works_without_the_packages(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(arguments) == 0
    assert kd.__version__ in capsys.readouterr().out


def test_another_command_without_the_packages_names_them(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == f"kdkernels: {cli.NEEDS}\n"


@pytest.mark.parametrize("arguments, status", [([], 2), (["--help"], 0), (["-h"], 0)])
def test_the_help_needs_no_packages_and_names_every_command(arguments, status, monkeypatch, capsys):
    from kdkernels.commands import app

    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(arguments) == status
    out, err = capsys.readouterr()
    names = [command.callback.__name__ for command in app.registered_commands] + ["cache"]
    assert len(names) == 4 and all(f"\n  {name} " in out for name in names) and not err
    assert "pip install typer rich" in out


def test_a_missing_package_of_the_cache_is_a_line_and_no_traceback(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("kdkernels.cache")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kd, "cache", raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    for command in ("info", "verify"):
        assert cli.main(["cache", command, "folder"]) == 1
        said = capsys.readouterr().err
        assert said == "kdkernels: kdkernels.cache needs the package numpy: pip install numpy safetensors\n"


def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-m", "kdkernels", "env"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and "BrokenPipe" not in said and "Traceback" not in said, said


def test_the_version_is_also_an_option_of_the_app(capsys):
    assert cli.main(["--version", "env"]) == 0
    assert capsys.readouterr().out == f"kdkernels {kd.__version__}\n"


# bench and check


def test_bench_has_three_bars_and_the_ratios_of_rounds(capsys, monkeypatch):
    # Without the half minute of a compiler.
    monkeypatch.setattr(bench.torch, "compile", lambda loss, **options: loss)
    assert cli.main(["bench", "--shape", "32x500", "--dtype", "fp32", "--rounds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "32 x 500 fp32" in lines[0] and "medians of 3" in lines[0]
    bars = {line[:13].strip(): line.count("#") for line in lines[1:]}
    assert set(bars) == {"eager PyTorch", "torch.compile", "kdkernels"} and max(bars.values()) == 32


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_bench_as_json(divergence, capsys):
    asked = ["bench", "--shape", "8x50", "--dtype", "fp32", "--rounds", "3", "--no-compile", "--json"]
    assert cli.main([*asked, "--divergence", divergence]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert result["divergence"] == divergence and list(result["seconds"]) == ["eager PyTorch", "kdkernels"]
    assert result["ratios"]["eager PyTorch"] == 1.0 and result["backend"] == kd.backends.select("auto", "cpu")


@pytest.mark.parametrize("name", divergences.names())
def test_what_bench_compares_with_is_the_loss(name):
    student, teacher = testing.make_inputs("normal", 4, 30, torch.float64)
    mine = bench.written_out(divergences.resolve(name), student, teacher)
    torch.testing.assert_close(mine, kd.kd_loss(student, teacher, divergence=name, temperature=bench.TEMPERATURE))


def test_bench_times_nothing_where_a_gradient_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(bench, "kd_loss", lambda s, t, **options: 1.01 * kd.kd_loss(s, t, **options))
    assert cli.main(["bench", "--shape", "8x50", "--dtype", "fp32", "--no-compile"]) == 1
    out, err = capsys.readouterr()
    assert "the gradient of kdkernels is off by 1.0%" in err and not out


def test_check_passes_and_notices_a_wrong_loss(monkeypatch, capsys):
    asked = ["check", "--shape", "4x33", "--dtype", "fp32"]
    assert cli.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(divergences.names()) + 1 and lines[-1].endswith(" 0 wrong")
    monkeypatch.setattr(testing, "kd_loss", lambda s, t, *rest, **options: 1.01 * kd.kd_loss(s, t, *rest, **options))
    assert cli.main([*asked, "--divergence", "jsd"]) == 1
    assert "4 x 33 fp32 jsd  WRONG: " in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["12", "x5", "0x5", "2xa"])
def test_a_shape_that_is_none_is_wrong_usage(shape, capsys):
    assert cli.main(["check", "--shape", shape]) == 2
    assert "a shape is NxV" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["bench", "check", "cache capture nowhere --model m --data d"])
@pytest.mark.parametrize("device", ["gpu0", "cuda:99"])
def test_a_device_that_is_none_is_wrong_usage(command, device, capsys):
    assert cli.main([*command.split(), "--device", device]) == 2
    assert f"{device!r} is no device that" in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_an_unknown_divergence_is_an_error_and_no_traceback(capsys):
    assert cli.main(["bench", "--divergence", "kl", "--no-compile"]) == 1
    assert capsys.readouterr().err.startswith("kdkernels: ValueError: ")


# capture, of any model

WEIGHTS = torch.randn(V, V + 8, generator=torch.Generator().manual_seed(0))
SEQUENCES = [torch.randint(0, V, (3 + i % 4,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(23)]


def model(ids, mask):
    assert ids.shape == mask.shape and mask.any(-1).all()
    return WEIGHTS[ids]


def run(folder, sequences=SEQUENCES, model=model, **options):
    return capture.run(model, sequences, folder, tokenizer="t", vocab_size=V, k=K, **{"batch_size": 4, **options})


def check_cache(folder):
    found = list(kd_cache.TeacherCache(folder, tokenizer="t", vocab_size=V, verify="full"))
    assert len(found) == len(SEQUENCES)
    for sequence, ids in zip(found, SEQUENCES, strict=True):
        assert sequence.extras["input_ids"].tolist() == ids
        wanted = kd.capture_topk(WEIGHTS[torch.tensor(ids)], K, vocab_size=V)
        assert sequence.ids.sort(-1).values.tolist() == wanted.ids.sort(-1).values.tolist()
        torch.testing.assert_close(sequence.tail_logprob, wanted.tail_logprob)


def test_a_capture_has_every_sequence_and_no_padding(tmp_path):
    lines = []
    assert run(tmp_path / "cache", tell=lines.append)
    check_cache(tmp_path / "cache")
    assert lines[-2].endswith("23 of 23 sequences") and lines[-1].endswith("whole, 6 shards") and 5 <= len(lines) <= 11


def test_a_capture_that_was_stopped_goes_on(tmp_path, capsys):
    calls = []

    def stopped(ids, mask):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(ids, mask)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model=stopped)
    with pytest.raises(kd_cache.CacheFormatError, match="not finished"):
        check_cache(tmp_path)
    assert cli.main(["cache", "info", str(tmp_path)]) == 1 and cli.main(["cache", "verify", str(tmp_path)]) == 1
    assert "6 shards, 4 damaged" in capsys.readouterr().out
    rest, lines = [], []
    run(tmp_path, model=lambda ids, mask: rest.append(len(ids)) or model(ids, mask), tell=lines.append)
    assert sum(rest) == len(SEQUENCES) - 8 and lines[0].endswith("goes on after 8 of 23 sequences")
    check_cache(tmp_path)


def test_a_capture_may_go_on_with_smaller_batches(tmp_path):
    def stopped(ids, mask):
        if ids[0, 0] == SEQUENCES[8][0]:
            raise KeyboardInterrupt
        return model(ids, mask)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model=stopped)
    run(tmp_path, batch_size=3)
    check_cache(tmp_path)


def test_another_text_or_setting_is_refused(tmp_path):
    run(tmp_path, settings={"length": 8})
    with pytest.raises(capture.CaptureError, match="begun with sha256"):
        run(tmp_path, [*SEQUENCES[:-1], [1, 2]], settings={"length": 8})
    with pytest.raises(capture.CaptureError, match="begun with length 8, and 9"):
        run(tmp_path, settings={"length": 9})
    with pytest.raises(kd_cache.IdentityMismatchError):
        run(tmp_path, settings={"length": 8}, temperature=2.0)


# capture, of a model of transformers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny random model with a tokenizer, padded to a width that is not its vocabulary."""
    transformers = pytest.importorskip("transformers", reason="the command captures models of transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="the command captures models of transformers")
    folder = tmp_path_factory.mktemp("teacher")
    words = {word: i for i, word in enumerate(["[UNK]", *"abcdefghij"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=16, **sizes)).save_pretrained(folder)
    (folder / "texts.txt").write_text("a b c d\n\nj i h\nb b b b b b\n")
    (folder / "rows.jsonl").write_text('{"text": "a b c"}\n{"input_ids": [1, 2, 3, 4]}\n')
    return folder


def test_the_command_captures_a_model(teacher, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "cache"
    asked = ["cache", "capture", str(folder), "--model", str(teacher), "--data", str(teacher / "texts.txt")]
    asked += ["--k", "4", "--length", "5", "--batch-size", "2", "--dtype", "fp32", "--device", "cpu"]
    assert cli.main(asked) == 0
    cache = kd_cache.TeacherCache(folder, tokenizer=AutoTokenizer.from_pretrained(teacher), vocab_size=11)
    assert [len(item.ids) for item in cache] == [4, 3, 5] and cache.identity.vocab_size == 11
    ids = cache[1].extras["input_ids"][None].long()
    assert ids.tolist() == [[10, 9, 8]]
    logits = AutoModelForCausalLM.from_pretrained(teacher)(ids).logits.detach()[0]
    wanted = kd.capture_topk(logits, 4, vocab_size=11)
    torch.testing.assert_close(cache[1].tail_logprob, wanted.tail_logprob, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert cli.main(asked) == 0  # nothing is left to do
    assert "after 3 of 3 sequences" in capsys.readouterr().out
    assert cli.main([*asked, "--temperature", "2"]) == 1
    assert "temperature" in capsys.readouterr().err


def test_the_processes_of_torchrun_write_one_cache(teacher, tmp_path, capsys, monkeypatch):
    """As torchrun starts them: each knows its number, and they do not speak with each other."""
    from transformers import AutoTokenizer

    asked = ["--model", str(teacher), "--data", str(teacher / "rows.jsonl"), "--batch-size", "1"]
    asked += ["--k", "4", "--dtype", "fp32", "--device", "cpu"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert cli.main(["cache", "capture", one, *asked]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["cache", "capture", two, *asked]) == 0
    own = {"tokenizer": AutoTokenizer.from_pretrained(teacher), "vocab_size": 11}
    whole = [item.extras["input_ids"].tolist() for item in kd_cache.TeacherCache(two, **own)]
    assert whole == [[1, 2, 3], [1, 2, 3, 4]]
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    assert cli.main(["cache", "verify", two]) == 0
    assert "2 shards, 0 damaged" in capsys.readouterr().out


TEXTS = {
    "empty.txt": ("\n", "there is no sequence to capture"),
    "words.jsonl": ('{"words": 1}\n', "row 0 of .*words.jsonl has neither text nor input_ids"),
    "list.jsonl": ("[1]\n", "neither text nor input_ids"),
    "cut.jsonl": ('{"text": "a"}\n\n{"text": \n', "line 3 of .*cut.jsonl is no JSON"),
    "null.jsonl": ('{"text": null}\n', "must have a text, or a list of integers"),
    "letters.jsonl": ('{"input_ids": "abc"}\n', "must have a text, or a list of integers"),
    "halves.jsonl": ('{"input_ids": [0.5]}\n', "must have a text, or a list of integers"),
    "high.jsonl": ('{"input_ids": [1]}\n{"input_ids": [2, 16]}\n', "sequence 1 of .* has the id 16"),
    "low.jsonl": ('{"input_ids": [1, -1]}\n', "has the id -1, and .* knows those below 16"),
    "long.jsonl": (
        json.dumps({"input_ids": [1] * 33}),
        "does not take a sequence of 33 tokens .* says 32: give --length",
    ),
    "latin.txt": (b"\xe4\n", "is no text in UTF-8"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_of_no_use_are_an_error(teacher, tmp_path, capsys, name):
    content, message = TEXTS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = ["cache", "capture", str(tmp_path / "cache"), "--model", str(teacher), "--data", str(tmp_path / name)]
    assert cli.main([*asked, "--device", "cpu", "--k", "4"]) == 1
    assert re.search(f"kdkernels: CaptureError: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--data": "missing.jsonl"}, "there is no file missing.jsonl"),
        ({"--k": "12"}, "k must be at most 11, got 12"),
        ({"--vocab-size": "17"}, "has logits of 16 tokens, and a vocabulary of 17"),
        ({"--temperature": "0"}, "temperature must be > 0"),
        ({"--model": "cut"}, "the model of .*cut cannot be loaded: SafetensorError"),
        ({"--model": "mute"}, "mute has no tokenizer"),
        ({"DIR": "file"}, "file is a file: name a folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_capture_that_cannot_begin_leaves_nothing_behind(teacher, tmp_path, capsys, change, message):
    (tmp_path / "file").touch()
    for name in ("cut", "mute"):
        shutil.copytree(teacher, tmp_path / name)
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"1" * 20)
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    given = {"--model": str(teacher), "--data": str(teacher / "rows.jsonl"), "--k": "4", "--device": "cpu"}
    given |= {key: str(tmp_path / value) if key == "--model" else value for key, value in change.items()}
    folder = tmp_path / given.pop("DIR", "cache")
    assert cli.main(["cache", "capture", str(folder), *itertools.chain(*given.items())]) == 1
    assert re.search(f"kdkernels: .*{message}", capsys.readouterr().err)
    assert not folder.is_dir()


def test_a_line_of_a_file_ends_at_its_end(tmp_path):
    """Unicode has further characters that break lines."""
    (tmp_path / "a.jsonl").write_text('{"text": "x\u2028y\x85z"}\r\n{"input_ids": [3]}', encoding="utf-8")
    (tmp_path / "a.txt").write_text("x\x0cy\nz\n", encoding="utf-8")

    def tokenizer(text):
        return {"input_ids": list(map(ord, text))}

    assert capture.read(str(tmp_path / "a.jsonl"), tokenizer, 9) == [list(map(ord, "x\u2028y\x85z")), [3]]
    assert capture.read(str(tmp_path / "a.txt"), tokenizer, 2) == [list(map(ord, "x\x0c")), [ord("z")]]


def test_an_interrupt_says_that_the_same_call_goes_on(teacher, tmp_path, monkeypatch, capsys):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(capture, "run", stopped)
    asked = ["cache", "capture", str(tmp_path), "--model", str(teacher), "--data", str(teacher / "rows.jsonl")]
    assert cli.main([*asked, "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("kdkernels: stopped; the same call goes on\n")


def test_a_shape_that_does_not_fit_into_memory_is_no_traceback(capsys):
    assert cli.main(["check", "--shape", "99999999x99999999"]) == 1
    assert capsys.readouterr().err.startswith("kdkernels: RuntimeError: ")


def test_a_reader_of_a_cache_s_shards_that_has_enough_is_no_error(tmp_path):
    """The error comes from a line's own write here, amid those of files that cannot be read."""
    run(tmp_path)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(kd.__file__).parent.parent)}
    command = [sys.executable, "-m", "kdkernels", "cache", "verify", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_missing_package_of_the_capture_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    asked = ["cache", "capture", str(tmp_path), "--model", "m", "--data", "d.txt"]
    assert cli.main(asked) == 1
    assert "pip install transformers" in capsys.readouterr().err
