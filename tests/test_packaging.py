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
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

import kdkernels
from kdkernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
HOOK = "import sys; sys.path.insert(0, 'scripts'); import build_backend"
BUILD = f"{HOOK}; print(getattr(build_backend, 'build_' + sys.argv[1])('dist'))"
REQUIRED = (
    f"{HOOK}; print(build_backend.get_requires_for_build_wheel(), build_backend.get_requires_for_build_editable())"
)


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


def pages():
    """All that a user may read a command in: documentation, messages, help."""
    folders = ("kdkernels", "benchmarks", "examples", "docs", "scripts", ".ci")
    listed = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".md", ".py")]
    return [path for path in [*ROOT.glob("*.md"), ROOT / "setup.py", *listed] if path.is_file()]


def faults(line, extras):
    """The commands that a line tells to run and that are not there."""
    for command in re.findall(r"\bpip3? install\b([^`]*)", line):
        # An index has nothing of this name, neither bare nor with a version or extras.
        yield from re.findall(r"(?<![\w/+:-])(?<!-m )kdkernels(?![\w/])\S*", command)
        yield from (
            name for names in re.findall(r"\.\[([\w,]+)\]", command) for name in names.split(",") if name not in extras
        )
    for module in re.findall(r"-m ((?:kdkernels|benchmarks)(?:\.\w+)*)", line):
        path = ROOT.joinpath(*module.split("."))
        if not (path / "__main__.py").is_file() and not path.with_suffix(".py").is_file():
            yield module
    for script in re.findall(r"(?<![\w./-])(?:\./)?((?:scripts|\.ci)/[\w-]+(?:\.\w+)?)", line):
        if not (ROOT / script).is_file():
            yield script


def test_no_page_prints_a_command_that_does_not_work():
    if not (ROOT / "kdkernels").is_dir():
        pytest.skip("not a checkout: the package's source is not here")
    table = (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2].partition("[project")[0]
    extras = re.findall(r"^(\w+) = \[", table, flags=re.M)
    found = {
        (path.name, item) for path in pages() for line in path.read_text().splitlines() for item in faults(line, extras)
    }
    assert "bench" in extras and len(pages()) > 60 and not found


@pytest.mark.parametrize(
    "line, fault",
    [
        ("`pip install kdkernels`", "kdkernels"),
        ("needs more: pip install 'kdkernels[cache]'", "kdkernels[cache]'"),
        ("pip install -e '.[bench,nothing]'", "nothing"),
        ("python -m kdkernels.nothing", "kdkernels.nothing"),
        ("run scripts/nothing first", "scripts/nothing"),
    ],
)
def test_a_command_that_does_not_work_is_noticed(line, fault):
    assert list(faults(line, ["bench"])) == [fault]


def test_the_version_has_a_date_and_is_the_one_to_cite():
    version = re.escape(kdkernels.__version__)
    [date] = re.findall(rf"^## \[{version}\] - (\d{{4}}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    cited = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {version}$", cited, flags=re.M) and f"\ndate-released: {date}\n" in cited
    assert f"version = {{{kdkernels.__version__}}}" in README and f"year = {{{date[:4]}}}" in README


def test_readme_has_one_picture_above_the_fold_and_one_block_of_code():
    pictures = re.findall(r"^!\[[^\]]*\]\((.*)\)", README, flags=re.M)
    assert pictures == ["docs/assets/speed.png"] and README.index(pictures[0]) < README.index("```")
    assert len(code_blocks("python")) == 1 and len(README.split("```bibtex")[0].split()) < 900


def test_the_readme_counts_right():
    from kdkernels import divergences

    words = {4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}
    scripts = [path for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()]
    assert f"{words[len(divergences.names())]} divergences" in README
    assert f"[Examples](examples): {words[len(scripts)]} training scripts" in README


def test_the_picture_has_the_figures_of_the_table(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")
    from benchmarks import picture

    found = picture.read(README)
    assert len(found.milliseconds) == len(found.memory) == 3
    for other, ratio in zip(found.milliseconds, found.ratios, strict=False):
        # A median of ratios is not quite the ratio of the medians.
        assert float(ratio.rstrip("x")) == pytest.approx(other / found.milliseconds[2], rel=0.15)
    picture.draw(found, tmp_path / "speed.png")
    # Its size and its letters vary with the version of matplotlib: it is drawn, and nothing else is held.
    assert (tmp_path / "speed.png").stat().st_size > 5000 and picture.PICTURE.stat().st_size > 5000


def test_forms_ask_for_the_environment_and_workflows_call_what_is_there():
    yaml = pytest.importorskip("yaml", reason="workflows are read with PyYAML")
    folder = ROOT / ".github"
    if not folder.is_dir():
        pytest.skip("not a checkout: the workflows are not here")
    forms = [yaml.safe_load(path.read_text()) for path in folder.glob("ISSUE_TEMPLATE/*.yml")]
    assert sum("kdkernels env --json" in str(form) for form in forms) == 2
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("workflows/*.yml")}
    assert set(workflows) == {"tests", "packages", "docs", "cuda", "gpu"}
    for workflow in workflows.values():
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] and all("uses" in step or step["run"] for step in job["steps"])
            for file in re.findall(r"(?:scripts|\.ci|tests)/[\w-]+(?:\.py)?", str(job)):
                assert (ROOT / file).is_file(), file
    # Whoever has a GPU leaves the file that is the evidence for it.
    assert "scripts/gpu-check" in str(workflows["gpu"]) and "benchmarks/results/gpu" in str(workflows["gpu"])


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 150


def test_metadata_agrees_with_the_package():
    version, _, label = importlib.metadata.version("kdkernels").partition("+")
    assert version == kdkernels.__version__ and label in ("", "no.cpu.kernels")
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
    for name in ("kdkernels", "csrc", "tests", "scripts"):
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
        ({"KDKERNELS_BUILD": "none"}, "KDKERNELS_BUILD=none asked for none"),
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler found (looked for /nonexistent/c++)"),
        ({"CXX": "false"}, "false does not compile C++17"),
    ],
    ids=["none", "auto-without-compiler", "auto-with-broken-compiler"],
)
def test_a_build_without_extension_is_a_pure_wheel_and_says_why(source, environment, outcome):
    done = build(source, **environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("kdkernels:")]
    assert said[-1].startswith(f"kdkernels: built no C++ extension (CPU kernels): {outcome}"), done.stdout
    # pip shows of a build that succeeds the version alone.
    name, files = contents(source)
    assert (
        name == f"kdkernels-{kdkernels.__version__}+no.cpu.kernels-py3-none-any.whl" and "kdkernels/py.typed" in files
    )
    (wheel,) = (source / "dist").glob("*.whl")
    record = json.loads(zipfile.ZipFile(wheel).read("kdkernels/_build_info.json"))
    assert record["cpu"]["built"] is False and record["cpu"]["reason"].startswith(outcome)
    assert record["cuda"] == {"built": False, "reason": record["cuda"]["reason"], "cure": ""}
    assert record["choice"] == environment.get("KDKERNELS_BUILD", "auto")
    assert ("install a C++17 compiler" in record["cpu"]["cure"]) == ("CXX" in environment)
    assert not [file for file in files if "_C." in file]
    packages = {path.parent.relative_to(source) for path in (source / "kdkernels").rglob("*.py")}
    assert {Path(file).parent for file in files if file.endswith(".py")} == packages


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, complaint",
    [
        (
            {"KDKERNELS_BUILD": "cpu", "CXX": "/nonexistent/c++"},
            "KDKERNELS_BUILD=cpu cannot be had: no C++ compiler found",
        ),
        ({"KDKERNELS_BUILD": "gpu"}, "KDKERNELS_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"),
    ],
    ids=["cpu-without-compiler", "unknown-value"],
)
def test_a_build_that_cannot_do_as_asked_fails_and_says_why(source, environment, complaint):
    done = build(source, **environment)
    assert done.returncode != 0 and complaint in done.stdout + done.stderr


@pytest.fixture
def compiler(tmp_path):
    """A command that answers as a C++ compiler does when the build looks for one."""
    path = tmp_path / "bin" / "c++"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def isolated(tmp_path):
    """Runs code as pip's isolated builds do: no package but setuptools, in this environment or in one without torch."""
    only = tmp_path / "isolated"
    only.mkdir()
    here = Path(importlib.util.find_spec("setuptools").origin).parent.parent
    for path in [here / "_distutils_hack", here / "setuptools", *here.glob("setuptools-*.dist-info")]:
        (only / path.name).symlink_to(path)
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)

    def run(code, *arguments, torch, cwd, **environment):
        executable = sys.executable if torch else str(bare / "bin" / "python")
        hidden = ("CXX", "KDKERNELS_BUILD", "PYTHONHOME")
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        variables |= {"PYTHONPATH": str(only), "PYTHONNOUSERSITE": "1", **environment}
        command = [executable, "-S", "-c", code, *arguments]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "torch, environment, wanted",
    [
        (True, {}, []),
        (False, {}, ["torch>=2.10"]),
        (False, {"KDKERNELS_BUILD": "cpu"}, ["torch>=2.10"]),
        (False, {"KDKERNELS_BUILD": "none"}, []),
        (False, {"CXX": "/nonexistent/c++"}, []),
    ],
    ids=["torch-beside", "no-torch", "no-torch-cpu", "no-torch-none", "no-torch-no-compiler"],
)
def test_an_isolated_build_fetches_torch_only_where_there_is_none_and_a_use_for_it(
    source, isolated, compiler, torch, environment, wanted
):
    done = isolated(REQUIRED, cwd=source, torch=torch, **{"CXX": compiler, **environment})
    assert done.stdout.split("\n")[0] == f"{wanted} {wanted}", done.stderr


def test_an_isolated_build_compiles_against_the_torch_that_pip_hides(source, isolated):
    code = f"{HOOK}, runpy; print(runpy.run_path('setup.py', run_name='kdkernels_setup')['find_torch']())"
    done = isolated(code, cwd=source, torch=True)
    assert Path(done.stdout.strip()) == Path(importlib.util.find_spec("torch").origin).parent, done.stderr
    # The search through the environment found it, not the path of the build.
    assert isolated("import torch", cwd=source, torch=True).returncode != 0


@pytest.mark.parametrize("version", [None, "2.9.1"], ids=["no-torch", "an-old-one"])
def test_a_build_that_sees_no_torch_fails_and_names_the_ways_on(source, isolated, compiler, version):
    reason = "there is no torch to compile against"
    if version is not None:
        old = source / "isolated" / "torch"
        old.mkdir()
        (old / "__init__.py").write_text("")
        (old / "version.py").write_text(f"__version__ = '{version}'\n")
        reason = f"torch {version} is older than 2.10"
        assert "torch>=2.10" in isolated(REQUIRED, cwd=source, torch=False, CXX=compiler).stdout
    done = isolated(BUILD, "wheel", cwd=source, torch=False, CXX=compiler)
    assert done.returncode != 0 and not list(source.glob("dist/*"))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"kdkernels: no kernels can be built: {reason}. Install torch 2.10 or newer first")
    assert "--no-build-isolation" in last and "KDKERNELS_BUILD=none" in last


def test_without_a_compiler_an_isolated_build_needs_no_torch(source, isolated):
    done = isolated(BUILD, "wheel", cwd=source, torch=False, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "+no.cpu.kernels-py3-none-any.whl" in done.stdout


def test_a_source_archive_needs_neither_torch_nor_compiler(source, isolated):
    done = isolated(BUILD, "sdist", cwd=source, torch=False, CXX="/nonexistent/c++", KDKERNELS_BUILD="cuda")
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    assert archive.name == f"kdkernels-{kdkernels.__version__}.tar.gz"
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert "scripts/build_backend.py" in names and "kdkernels/_build_info.json" not in names


@pytest.fixture
def setup_module(monkeypatch, tmp_path):
    """setup.py on a machine that has a CUDA build of torch and nvcc 13, which knows no sm_100."""
    path = ROOT / "setup.py"
    if not (ROOT / "kdkernels").is_dir():
        pytest.skip("not a checkout: the package's source is not here")
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
    assert extension.record["targets"] == names.split(", ") and extension.record["compiler"] == "nvcc 13.0"
    assert extension.record["torch"] == "2.14.1+cu130"
    codes = [flag for flag in extension.extra_compile_args if flag.startswith("arch=")]
    assert len(codes) == names.count("sm_") + names.count("PTX")
    assert all(source.endswith(".cu") for source in extension.sources) and len(extension.sources) >= 2


@pytest.mark.parametrize(
    "broken, reason",
    [
        ("torch", "torch 2.14.1[+]cpu is not a CUDA build"),
        ("nvcc", "no nvcc found in .*/none/bin"),
        ("release", "nvcc is of CUDA 13.0, torch 2.14.1[+]cu128 of CUDA 12.8"),
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
    with pytest.raises(setup_module.CannotBuild, match=reason) as caught:
        setup_module.cuda_extension()
    assert caught.value.cure.endswith(", then") or broken in ("8.6", "Ampere")


def test_another_compiler_is_taken_where_the_first_does_not_work(setup_module, monkeypatch, tmp_path):
    good = tmp_path / "bin" / "clang++"
    good.write_text("#!/bin/sh\n")
    bad = tmp_path / "bin" / "g++"
    bad.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    for path in (good, bad):
        path.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(setup_module.sysconfig, "get_config_var", lambda name: "gone++ -pthread")
    assert setup_module.find_compiler() == ("clang++", False)
    good.unlink()
    with pytest.raises(setup_module.CannotBuild, match="g[+][+] does not compile C[+][+]17: fatal error: no headers"):
        setup_module.find_compiler()
    bad.unlink()
    with pytest.raises(
        setup_module.CannotBuild, match=r"no C.. compiler found \(looked for gone.., c.., g.., clang..\)"
    ):
        setup_module.find_compiler()


def test_a_library_is_built_again_where_its_record_would_not_be_true(setup_module, tmp_path):
    command = setup_module.BuildExt(setuptools.Distribution())
    package = tmp_path / "kdkernels"
    package.mkdir()
    extension = setup_module.NativeExtension("kdkernels._C", [])
    extension.record = {"built": True, "compiler": "g++ 12"}
    assert not command.was_built_alike(extension, package)
    setup_module.write_record(package, {"cpu": dict(extension.record), "cuda": {"built": False}})
    assert command.was_built_alike(extension, package)
    extension.record["compiler"] = "g++ 13"
    assert not command.was_built_alike(extension, package)


def test_a_build_without_an_extension_takes_the_one_of_an_earlier_build_away(setup_module, tmp_path):
    for name in ("_C.abi3.so", "_C_cuda.abi3.so"):
        (tmp_path / name).write_text("")
    setup_module.write_record(tmp_path, {"cpu": {"built": True}, "cuda": {"built": False}})
    assert sorted(path.name for path in tmp_path.glob("_*")) == ["_C.abi3.so", "_build_info.json"]


def test_a_build_says_how_many_minutes_are_left(setup_module):
    assert setup_module.minutes_left(1, 4, 100.0) == "; about 5 min left"
    assert setup_module.minutes_left(3, 4, 100.0) == "; less than a minute left"
    assert setup_module.minutes_left(4, 4, 100.0) == ""


@pytest.mark.slow
def test_sdist_has_the_native_sources(source):
    done = build(source, "sdist", KDKERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    native = {path.relative_to(source).as_posix() for path in (source / "csrc").rglob("*") if path.is_file()}
    assert native and native <= names
    assert {"setup.py", "LICENSE", "CHANGELOG.md", "tests/conftest.py", "kdkernels/py.typed"} <= names
