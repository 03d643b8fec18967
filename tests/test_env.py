"""``python -m kdkernels env`` and the hook in conftest that keeps skips honest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import backends, build_info, cli, env, ops

ROOT = Path(__file__).resolve().parent.parent


def test_the_command_has_a_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kdkernels {kdkernels.__version__}\n"


@pytest.mark.parametrize("command", ["kdkernels env", "kdkernels.env"])
def test_the_command_prints_the_report(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True, check=True)
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith(" "))
    assert facts["kdkernels"].split()[0].partition("+")[0] == kdkernels.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert facts["package"].startswith(str(Path(kdkernels.__file__).parent))
    assert set(facts) >= {"python", "triton", "extension", "threads", "gpu", "cpu", "cuda"}
    assert not done.stderr


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """Writes the metadata of an editable installation of this package, the first that Python finds."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(version, folder=build_info.PACKAGE.parent, installer="pip"):
        metadata = tmp_path / "kdkernels-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kdkernels\nVersion: {version}\n")
        (metadata / "direct_url.json").write_text(json.dumps({"url": folder.as_uri(), "dir_info": {"editable": True}}))
        if installer is not None:
            (metadata / "INSTALLER").write_text(f"{installer}\n")

    return write


def first_line():
    return env.report().splitlines()[0].split(maxsplit=1)[1]


def test_the_version_is_the_one_that_pip_lists(installation):
    version = f"{kdkernels.__version__}+no.cpu.kernels"
    installation(version)
    assert first_line() == version


def test_an_editable_installation_of_another_version_is_named_beside_it(installation):
    installation("0.0.9+no.cpu.kernels")
    assert first_line() == f"{kdkernels.__version__} (pip lists 0.0.9+no.cpu.kernels)"


@pytest.mark.parametrize("other", [{"folder": ROOT / "tests"}, {"installer": None}], ids=["elsewhere", "not-installed"])
def test_the_version_of_no_other_package_is_told(installation, other):
    before = first_line()
    installation("0.0.9", **other)
    assert first_line() == before


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_backend_is_named_with_the_choice_and_the_reason(device_type):
    header, *lines = env._choice(device_type)
    answers = backends.available(device_type)
    assert header.startswith(f"{device_type} tensors")
    by_name = ops.BY_NAME_ONLY["dense_fwd"]
    assert header.endswith(f'"auto" takes {next(a.name for a in answers if a.ok and a.name not in by_name)!r}')
    for line, answer in zip(lines, answers, strict=True):
        assert line.split(maxsplit=1) == [answer.name, env._runs(answer.name) if answer.ok else f"no: {answer.reason}"]
    assert all(a.reason for a in answers if not a.ok)


def test_the_report_as_json_has_no_path_of_the_user(capsys):
    assert cli.main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert facts["torch"].startswith(torch.__version__) and facts["extension"]["loads"] == (
        not backends.cpu.load_error()
    )
    for device_type in ("cpu", "cuda"):
        assert facts["devices"][device_type]["auto"] == backends.select("auto", device_type)
        losses = facts["devices"][device_type]["losses"]
        assert losses["capture_topk"] == backends.select("auto", device_type, pattern="capture_topk")
    assert set(env.LOSSES.values()) == ops.SCHEMAS.keys() - {"token_bwd", "scale_grad"}
    assert str(ROOT) not in text and str(Path.home()) not in text.replace("~", "")


def test_losses_have_a_line_each_where_they_differ(monkeypatch):
    monkeypatch.setattr(env, "_of_losses", lambda device: dict.fromkeys(env.LOSSES, device))
    assert env._losses_lines("cpu") == ["  every loss takes 'cpu'"]
    monkeypatch.setattr(env, "_of_losses", lambda device: {"a, b": "cpu", "c": "torch"})
    assert env._losses_lines("cpu") == ["  a, b take 'cpu'", "  c takes 'torch'"]
    assert all(len(line) < 80 for line in env._losses_lines("cuda"))


def test_what_auto_leaves_to_another_backend_is_said():
    assert env._runs("triton") == "runs"
    assert env._runs("cuda") == f'runs; not by "auto": {ops.BY_NAME_ONLY["dense_fwd"]["cuda"]}'


def test_a_missing_extension_is_reported_with_its_reason(monkeypatch):
    monkeypatch.setattr(backends.cpu, "load_error", lambda: "it was not built")
    assert "extension  it was not built" in env.report()
    assert "  cpu     no: it was not built" in env.report()


PROBE = """
import pytest

def test_lazy():
    pytest.skip("some package is not installed")

def test_bare():
    pytest.skip("this machine has no GPU")

@pytest.mark.gpu
def test_gpu():
    assert {has_gpu}, "this needs a GPU and ran without one"

@pytest.mark.skipif(True, reason="this machine has no wish to run it")
def test_marked():
    pass
"""


@pytest.mark.parametrize("require_all", [False, True], ids=["skips-allowed", "skips-fail"])
def test_require_all_turns_avoidable_skips_into_failures(tmp_path, require_all):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    (tmp_path / "test_probe.py").write_text(PROBE.format(has_gpu=torch.cuda.is_available()))
    (tmp_path / "test_module.py").write_text('import pytest\npytest.importorskip("no_such_module")\n')
    environment = {
        **os.environ,
        "KDKERNELS_REQUIRE_ALL": str(int(require_all)),
        "PYTHONPATH": str(Path(kdkernels.__file__).parent.parent),
    }
    # Continue past the module that cannot be collected, so that both kinds of skip are seen in one run.
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    gpu = torch.cuda.is_available()
    if require_all:
        # test_lazy fails in its call, test_marked in its set-up, test_module when it is collected.
        assert "1 failed" in done.stdout and "2 errors" in done.stdout, done.stdout
        assert f"{1 if gpu else 2} skipped" in done.stdout, done.stdout
        assert "allows no skip, and this one says: Skipped: some package is not installed" in done.stdout
        assert done.returncode == 1
    else:
        assert f"{4 if gpu else 5} skipped" in done.stdout, done.stdout
        assert "failed" not in done.stdout and "error" not in done.stdout, done.stdout
        assert done.returncode == 0 if gpu else done.returncode in (0, 5)
