"""The package as a newcomer meets it: the README, what an installation contains, builds that fall back."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kdkernels
from kdkernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, 'build_' + sys.argv[1])('dist'))"


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def python(*arguments, **keywords):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **keywords)


def test_readme_code_runs():
    """The blocks in their order, as a reader would type them; each ends in a backward pass."""
    blocks = code_blocks("python")
    assert blocks and all(block.rstrip().endswith("loss.backward()") for block in blocks)
    check = (
        "leaves = [x for x in vars().copy().values() if torch.is_tensor(x) and x.is_leaf and x.grad is not None]\n"
        "assert torch.isfinite(loss) and leaves and all(x.grad.isfinite().all() and x.grad.any() for x in leaves)\n"
        "for leaf in leaves: leaf.grad = None\n\n"
    )
    done = python("-c", "".join(block + check for block in blocks))
    assert done.returncode == 0, done.stderr


def test_readme_names_only_what_exists():
    commands = [line for block in code_blocks("bash") for line in block.splitlines() if not line.startswith("#")]
    assert "./scripts/demo" in " ".join(commands) and "./scripts/test" in " ".join(commands)
    for line in commands:
        for script in re.findall(r"(?:\./|\b)((?:scripts|\.ci|examples)/[\w.-]+)", line):
            assert (ROOT / script).is_file(), line
            assert script.endswith(".py") or os.access(ROOT / script, os.X_OK), line
        for module in re.findall(r"-m ((?:kdkernels|benchmarks)[\w.]*)", line):
            assert (ROOT / module / "__main__.py").is_file() or importlib.util.find_spec(module), line
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 150


def test_metadata_agrees_with_the_package():
    assert importlib.metadata.version("kdkernels") == kdkernels.__version__
    assert importlib.metadata.metadata("kdkernels")["License-Expression"] == "Apache-2.0"
    assert (Path(kdkernels.__file__).parent / "py.typed").is_file()


IMPORT = """
import json, os, sys, time, torch
before, begun = set(sys.modules), time.process_time()
import kdkernels
took = time.process_time() - begun
mapped = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
print(json.dumps([took, sorted(set(sys.modules) - before), "_C.abi3" in mapped]))
"""


def test_import_needs_torch_only_and_loads_no_backend():
    took, modules, library_is_loaded = json.loads(python("-c", IMPORT, check=True).stdout)
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert packages <= {"kdkernels", "torch"}, packages
    assert not [name for name in modules if name.startswith("kdkernels.kernels.")]
    assert not library_is_loaded
    # Of processor time, which other work on the machine does not lengthen; importing torch takes seconds.
    assert took < 0.5, f"importing kdkernels took {took:.2f} s over importing torch"


def test_the_extension_uses_the_stable_abi_only():
    """Every symbol it wants comes from LibTorch's stable C shims, the C++ runtime or libc."""
    library, nm = cpu.library_path(), shutil.which("nm")
    if library is None:
        pytest.skip("the C++ extension is not built here")
    if nm is None:
        pytest.skip("nm is not installed")
    command = [nm, "-D", "-C", "--undefined-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=1)[1].strip() for line in listed.stdout.splitlines()]
    assert any(symbol.startswith("torch_library_impl") for symbol in symbols), symbols
    assert not [symbol for symbol in symbols if re.match(r"_?Py|.*\b(at|c10|torch)::", symbol)]
    assert library.name.startswith("_C.abi3."), library.name


@pytest.fixture
def source(tmp_path):
    """The files of the repository that a build reads, without what was built in place."""
    if not (ROOT / "kdkernels").is_dir():
        pytest.skip("not a checkout: the package's source is not here")
    for name in ("kdkernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / name for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE")),
    ]:
        shutil.copy(path, tmp_path)
    return tmp_path


def build(source, kind="wheel", **environment):
    variables = {name: value for name, value in os.environ.items() if name not in ("CXX", "KDKERNELS_BUILD")}
    return python("-c", BUILD, kind, cwd=source, env={**variables, **environment})


def contents(source):
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, outcome",
    [
        ({"KDKERNELS_BUILD": "none"}, "no extension, as KDKERNELS_BUILD=none asks"),
        ({"CXX": "/nonexistent/c++"}, "no extension: no C++ compiler found (looked for /nonexistent/c++)"),
        ({"CXX": "false"}, "no extension: false does not compile C++17"),
    ],
    ids=["none", "auto-without-compiler", "auto-with-broken-compiler"],
)
def test_a_build_without_extension_is_a_pure_wheel_and_says_why(source, environment, outcome):
    done = build(source, **environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("kdkernels:")]
    assert said[-1].startswith(f"kdkernels: built {outcome}"), done.stdout
    name, files = contents(source)
    assert name.endswith("-py3-none-any.whl") and "kdkernels/py.typed" in files
    assert not [file for file in files if "_C." in file]
    packages = {path.parent.relative_to(source) for path in (source / "kdkernels").rglob("*.py")}
    assert {Path(file).parent for file in files if file.endswith(".py")} == packages


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, complaint",
    [
        ({"KDKERNELS_BUILD": "cpu", "CXX": "/nonexistent/c++"}, "KDKERNELS_BUILD=cpu: no C++ compiler found"),
        ({"KDKERNELS_BUILD": "gpu"}, "KDKERNELS_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"),
    ],
    ids=["cpu-without-compiler", "unknown-value"],
)
def test_a_build_that_cannot_do_as_asked_fails_and_says_why(source, environment, complaint):
    done = build(source, **environment)
    assert done.returncode != 0 and complaint in done.stdout + done.stderr


@pytest.fixture
def setup_module(monkeypatch, tmp_path):
    """setup.py on a machine that has a CUDA build of torch and nvcc 13, which knows no sm_100."""
    path = ROOT / "setup.py"
    if not path.is_file():
        pytest.skip("not a checkout: setup.py is not here")
    spec = importlib.util.spec_from_file_location("kdkernels_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch, nvcc = tmp_path / "torch", tmp_path / "bin" / "nvcc"
    torch.mkdir()
    nvcc.parent.mkdir()
    (torch / "version.py").write_text("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\n")
    said = '[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" || echo sm_80 sm_90 sm_120'
    nvcc.write_text(f"#!/bin/sh\n{said}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(module, "find_torch", lambda: torch)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return module


@pytest.mark.parametrize(
    "asked, names",
    [
        ("", "sm_80, sm_90, sm_120+PTX"),
        ("8.0", "sm_80"),
        ("8.0;9.0a+PTX", "sm_80, sm_90a+PTX"),
        ("8.0 12.0", "sm_80, sm_120"),
    ],
)
def test_cuda_architectures(setup_module, monkeypatch, asked, names):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    extension = setup_module.cuda_extension()
    assert extension.outcome.startswith(f"the CUDA extension for {names}, with ")
    codes = [flag for flag in extension.extra_compile_args if flag.startswith("arch=")]
    assert len(codes) == names.count("sm_") + names.count("PTX")
    assert all(source.endswith(".cu") for source in extension.sources) and len(extension.sources) >= 2


@pytest.mark.parametrize(
    "broken, reason",
    [
        ("torch", "this torch is not a CUDA build"),
        ("nvcc", "no nvcc found in .*/none/bin"),
        ("release", "nvcc is of CUDA 13.0, this torch of CUDA 12.8"),
        ("8.6", "TORCH_CUDA_ARCH_LIST asks for 8.6, which .*nvcc does not know"),
        ("Ampere", "TORCH_CUDA_ARCH_LIST must be like '8.0;9.0a;12.0[+]PTX', got 'Ampere'"),
    ],
)
def test_why_there_is_no_cuda_extension(setup_module, monkeypatch, tmp_path, broken, reason):
    version = tmp_path / "torch" / "version.py"
    if broken == "torch":
        version.write_text("__version__ = '2.14.1+cpu'\ncuda: Optional[str] = None\n")
    elif broken == "nvcc":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    elif broken == "release":
        version.write_text("__version__ = '2.14.1+cu128'\ncuda = '12.8'\n")
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", broken)
    with pytest.raises(setup_module.CannotBuild, match=reason):
        setup_module.cuda_extension()


@pytest.mark.slow
def test_sdist_has_the_native_sources(source):
    done = build(source, "sdist", KDKERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    native = {path.relative_to(source).as_posix() for path in (source / "csrc").rglob("*") if path.is_file()}
    assert native and native <= names
    assert {"setup.py", "LICENSE", "CHANGELOG.md", "tests/conftest.py", "kdkernels/py.typed"} <= names
