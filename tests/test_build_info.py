"""An installation's record of its build, where a library is looked for, and the cure where there is none."""

import json
import sys

import pytest
import torch

from kdkernels import build_info
from kdkernels.backends import cpu, cuda

BUILT = {"built": True, "targets": ["baseline", "avx2"], "compiler": "g++ 12.2.0", "torch": "2.13.0"}
NO_COMPILER = {"built": False, "reason": "no C++ compiler found", "cure": "install one, then"}


def make_package(folder, part=None, library=False, sources="none"):
    """A package ``folder/kdkernels`` with a record and, where it was built, a library."""
    package = folder / "kdkernels"
    package.mkdir(parents=True, exist_ok=True)
    if part is not None:
        (package / build_info.FILE).write_text(json.dumps({"cpu": part, "sources": sources}))
    if library:
        (package / "_C.abi3.so").write_text("")
    return package.resolve()


def make_installation(site, origin=None, **keywords):
    """As pip leaves one in a folder of ``sys.path``."""
    package = make_package(site, **keywords)
    metadata = site / "kdkernels-0.1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kdkernels\nVersion: 0.1.0\n")
    if origin is not None:
        (metadata / "direct_url.json").write_text(json.dumps(origin))
    return package


def make_source_tree(root, text="int x;", **keywords):
    (root / "csrc").mkdir(parents=True, exist_ok=True)
    (root / "csrc" / "ops.cpp").write_text(text)
    (root / "setup.py").write_text("")
    package = make_package(root, **keywords)
    (package / "ops.py").write_text("SCHEMAS = {}\n")
    return package


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site-packages that Python looks into, and no other."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


def test_the_hash_covers_native_sources_and_schemas_alone(tmp_path):
    root = make_source_tree(tmp_path).parent
    before = build_info.source_hash(root)
    (root / "csrc" / "notes.txt").write_text("")
    (root / "kdkernels" / "env.py").write_text("")
    assert build_info.source_hash(root) == before
    (root / "kdkernels" / "ops.py").write_text("SCHEMAS = {1: 2}\n")
    changed = build_info.source_hash(root)
    (root / "csrc" / "ops.cpp").rename(root / "csrc" / "other.cpp")
    assert len({before, changed, build_info.source_hash(root)}) == 3


def test_a_source_tree_borrows_the_library_of_an_installed_build_of_the_same_sources(site, tmp_path):
    package = make_source_tree(tmp_path / "clone")
    same = build_info.source_hash(tmp_path / "clone")
    installed = make_installation(site, part=BUILT, library=True, sources=same)
    assert build_info.find.__wrapped__("cpu", package) == installed / "_C.abi3.so"
    assert build_info.find.__wrapped__("cuda", package) is None


def test_a_source_tree_takes_no_library_of_other_sources_and_says_that_it_hides_one(site, tmp_path):
    package = make_source_tree(tmp_path / "clone")
    installed = make_installation(site, part=BUILT, library=True, sources="of another commit")
    assert build_info.find.__wrapped__("cpu", package) is None
    said = build_info.why_missing("cpu", package)
    assert f"was not built in the source tree {package.parent}, which hides the one installed in {installed}" in said
    assert f"leave the source tree, or run `KDKERNELS_BUILD=cpu {sys.executable} -m pip install" in said
    assert said.endswith(f" -e {package.parent}`")


def test_a_source_tree_installed_to_be_edited_lends_its_library_to_another(site, tmp_path):
    first = make_source_tree(tmp_path / "first", part=BUILT, library=True)
    record = {"cpu": BUILT, "sources": build_info.source_hash(tmp_path / "first")}
    (first / build_info.FILE).write_text(json.dumps(record))
    make_installation(site, origin={"url": (tmp_path / "first").as_uri(), "dir_info": {"editable": True}})
    second = make_source_tree(tmp_path / "second")
    assert build_info.find.__wrapped__("cpu", second) == first / "_C.abi3.so"
    assert list(build_info.installed(first)) == []


def test_a_source_tree_built_without_kernels_on_purpose_borrows_none(site, tmp_path):
    asked = {"built": False, "reason": "KDKERNELS_BUILD=none asked for none", "cure": ""}
    package = make_source_tree(tmp_path / "clone", part=asked)
    make_installation(site, part=BUILT, library=True, sources=build_info.source_hash(tmp_path / "clone"))
    assert build_info.find.__wrapped__("cpu", package) is None
    assert "was not built: KDKERNELS_BUILD=none asked for none. To have it: run `" in build_info.why_missing(
        "cpu", package
    )


COMMAND = f"KDKERNELS_BUILD=cpu {sys.executable} -m pip install --no-deps --force-reinstall --no-cache-dir"


@pytest.mark.parametrize(
    "origin, source",
    [
        ({"url": "https://example.org/kd.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://example.org/kd.git@abc"),
        ({"url": "https://example.org/kd.tar.gz", "archive_info": {}}, "https://example.org/kd.tar.gz"),
        ({"url": "https://example.org/kdkernels-0.1.0-py3-none-any.whl", "archive_info": {}}, None),
        ({"url": "file:///nowhere/to/be/found", "dir_info": {}}, None),
        (None, None),
    ],
    ids=["git", "archive", "wheel", "folder-gone", "unknown"],
)  # fmt: skip
def test_the_cure_of_an_installation_is_the_command_with_its_source(site, origin, source):
    package = make_installation(site, origin, part=NO_COMPILER)
    said = build_info.why_missing("cpu", package)
    assert "was not built: no C++ compiler found. To have it: install one, then run `" in said
    assert said.endswith(f"run `{COMMAND} {source}`" if source else f"run `{COMMAND} .` in the folder of the sources")


def test_an_installation_from_a_folder_is_built_from_that_folder_again(site, tmp_path):
    package = make_installation(site, {"url": tmp_path.as_uri(), "dir_info": {}}, part=NO_COMPILER)
    (tmp_path / "setup.py").write_text("")
    assert build_info.why_missing("cpu", package).endswith(f"run `{COMMAND} {tmp_path}`")


def test_a_library_that_went_and_a_record_that_never_was(site):
    assert "was built, but is no longer in" in build_info.why_missing("cpu", make_installation(site, part=BUILT))
    (site / "kdkernels" / build_info.FILE).write_text("{")
    assert "there is no record why" in build_info.why_missing("cpu", site / "kdkernels")


def test_a_library_that_does_not_load_is_reported_with_both_torches_and_the_cure(tmp_path):
    path = make_package(tmp_path, part={**BUILT, "torch": "9.9"}, library=True) / "_C.abi3.so"
    said = cpu.load(path, "cpu")
    assert said.startswith(f"{path} does not load (built against torch 9.9, this is ")
    assert "To build it again: run `KDKERNELS_BUILD=cpu " in said


def test_a_library_that_lacks_an_op_is_older_than_the_python_that_calls_it():
    """As after a pull without a build: the first call would be an error of torch's dispatcher."""
    path = cpu.library_path()
    if path is None:
        pytest.skip(build_info.why_missing("cpu"))
    library = torch.library.Library("kdkernels", "FRAGMENT")
    library.define("of_tomorrow_cpu(Tensor x) -> Tensor")
    try:
        said = cpu.load(path, "cpu")
    finally:
        library._destroy()
    assert said.startswith(f"{path} is older than kdkernels' Python, which calls kdkernels::of_tomorrow_cpu too.")
    assert "To build it again: run `KDKERNELS_BUILD=cpu " in said and cpu.load(path, "cpu") is None


@pytest.mark.parametrize("backend", [cpu, cuda], ids=["cpu", "cuda"])
def test_a_reason_ends_in_a_command(backend):
    """Of what is not there on this machine."""
    reason = backend.load_error()
    assert reason is None or f"`KDKERNELS_BUILD={backend.__name__.rpartition('.')[2]} " in reason


def test_the_instruction_set_of_a_missing_library_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(cpu, "load_error", lambda: "nobody built it")
    with pytest.raises(RuntimeError, match="nobody built it$"):
        cpu.isa()


def test_the_record_of_this_build_is_true():
    library = cpu.library_path()
    if library is None:
        assert not build_info.read().get("cpu", {}).get("built")
        return
    part = build_info.read(library.parent)["cpu"]
    assert part["built"] and part["compiler"] and part["torch"].split(".")[0] == "2" and "-O3" in part["flags"]
    contained = library.read_bytes()
    assert all(target.encode() in contained for target in part["targets"])
