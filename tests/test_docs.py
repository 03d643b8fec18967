"""Documentation: text that the code writes is the code's, links lead somewhere, names exist, and lines are short."""

import ast
import doctest
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import divergences, memory

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "benchmarks") for path in (ROOT / folder).rglob("*.md"))]
)
pages = pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])


def prose(text, tables=False):
    """The numbered lines of a page that are no code, and without ``tables`` no table either."""
    code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and (tables or not line.lstrip().startswith("|")):
            yield number, line


def anchors(text):
    """The names that a page's headings have in links: words in lower case, joined by hyphens."""
    found = []
    for _, line in prose(text):
        if heading := re.match(r"#+ (.*)", line):
            name = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
            found.append(name if name not in found else f"{name}-{found.count(name)}")
    return found


def broken_links(page, text):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", "\n".join(line for _, line in prose(text, tables=True))):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists():
            yield link
        elif anchor and anchor not in anchors(text if path == page else path.read_text()):
            yield link


def missing_names(text):
    """Paths of this repository, and tests by ``file::name``, that stand between backticks and are not there."""
    for name in re.findall(r"`((?:tests|docs|scripts|benchmarks|csrc|examples)/[\w./*-]*(?:::\w+)*)", text):
        file, *parts = name.split("::")
        paths = list(ROOT.glob(file.rstrip("/")))
        if not paths:
            yield name
        for part, path in ((part, path) for part in parts for path in paths):
            defined = (ast.FunctionDef, ast.ClassDef)
            if not any(isinstance(x, defined) and x.name == part for x in ast.walk(ast.parse(path.read_text()))):
                yield name


def long_lines(text):
    return [number for number, line in prose(text) if len(line) > 120]


@pages
def test_every_link_leads_somewhere(page):
    assert not list(broken_links(page, page.read_text()))


@pages
def test_every_file_and_test_that_a_page_names_exists(page):
    assert not list(missing_names(page.read_text()))


@pages
def test_no_line_of_prose_is_longer_than_120_characters(page):
    assert not long_lines(page.read_text())


def test_faults_of_a_page_are_noticed():
    page = DOCS / "internals" / "cuda.md"
    good = "# A, b `c`\n[1](#a-b-c) [2](cpu.md#floor) [3](https://x.org/y) `tests/test_docs.py::long_lines`"
    assert not list(broken_links(page, good)) and not list(missing_names(good))
    bad = "# A\n[1](#b) [2](cpu.md#nothing) [3](nothing.md) `tests/nothing.py` `tests/test_docs.py::nothing`"
    assert list(broken_links(page, bad)) == ["#b", "cpu.md#nothing", "nothing.md"]
    assert list(missing_names(bad)) == ["tests/nothing.py", "tests/test_docs.py::nothing"]
    wide = "x" * 121
    assert long_lines(f"{wide}\n| {wide} |\n```\n{wide}\n```\n{wide}") == [1, 6]


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/reference/reliability.md", "benchmarks/README.md"} <= {
        path.relative_to(ROOT).as_posix() for path in PAGES
    }


def examples(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def test_the_line_of_the_installation_page_makes_a_slow_fallback_an_error():
    (code,) = examples(DOCS / "guide" / "install.md")
    with warnings.catch_warnings():
        names: dict = {}
        exec(code, names)
        with pytest.raises(names["kd"].backends.PlainTorchWarning):
            warnings.warn("slow", names["kd"].backends.PlainTorchWarning, stacklevel=1)


def test_the_examples_of_a_training_loop_run():
    names: dict = {}
    *others, accumulation = examples(DOCS / "guide" / "training.md")
    for code in others:
        exec(code, names)
    weight, loss = names["student"].weight, names["kd"].kd_loss
    weight.grad = None
    exec(accumulation, names)
    accumulated, weight.grad = weight.grad, None
    loss(names["student"](names["inputs"]), names["teacher_logits"], names["labels"]).backward()
    torch.testing.assert_close(accumulated, weight.grad)


@pytest.mark.parametrize("page", ["README", "guide/five-minutes", "guide/vocabularies", "guide/memory", "guide/faq"])
def test_the_examples_of_a_page_run(page):
    blocks, names, known = examples(DOCS / f"{page}.md"), {}, set(divergences.names())
    for code in blocks:
        exec(code, names)
    for name in set(divergences.names()) - known:
        kdkernels.unregister_divergence(name)
    assert blocks
    if page == "guide/five-minutes":
        assert names["distilled"] > names["alone"] + 0.05


def test_every_page_with_examples_has_a_test_that_runs_them():
    pages = {path for path in PAGES if DOCS in path.parents or path.parent == ROOT}
    with_examples = {path for path in pages if examples(path)}
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(with_examples) > 15
    for path in with_examples:
        # tests/test_recipes.py takes every page of recipes.
        known = (
            path.parent.name == "recipes" or f'"{path.name}"' in tests or f'"{path.parent.name}/{path.stem}"' in tests
        )
        assert known, path


def test_the_example_of_the_first_page_is_the_loss_that_it_says():
    (code,) = examples(ROOT / "README.md")
    names: dict = {}
    # Fewer rows than there, and the comment that says what the call stands for.
    (said,) = re.findall(r"^# (F\.kl_div\(.*)$", code, flags=re.M)
    exec(code.replace("512", "4"), names)
    torch.testing.assert_close(names["loss"], eval(said, names))
    assert names["s"].grad.any()


def test_the_examples_of_several_devices_run():
    """In a process of its own: they make a process group."""
    code = "".join(examples(DOCS / "guide" / "devices.md"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert code.count(".backward()") == 6 and done.returncode == 0, done.stderr[-2000:]


def documented():
    """Modules of the package whose docstrings have examples."""
    names = {getattr(kdkernels, name).__module__ for name in kdkernels.__all__ if callable(getattr(kdkernels, name))}
    return sorted(names | {"kdkernels.memory", "kdkernels.onpolicy", "kdkernels.alignment"})


@pytest.mark.parametrize("module", documented())
def test_the_examples_of_docstrings_are_right(module):
    assert not doctest.testmod(importlib.import_module(module)).failed


def test_every_public_function_and_module_has_an_example():
    public = {name: getattr(kdkernels, name) for name in kdkernels.__all__}
    wanted = {
        name: item
        for name, item in public.items()
        if inspect.isfunction(item) or inspect.isclass(item) and issubclass(item, torch.nn.Module)
    }
    assert len(wanted) > 20
    assert not [name for name, item in wanted.items() if ">>> " not in item.__doc__ and name != "unregister_divergence"]


def test_every_public_name_is_on_the_page_of_the_api():
    text = (DOCS / "reference" / "api.md").read_text()
    listed = set(re.findall(r"^::: kdkernels\.([\w.]+)$", text, flags=re.M))
    assert listed | set(divergences.__all__) >= set(kdkernels.__all__)


def test_the_site_is_built_beside_the_formatter_that_breaks_signatures():
    """Without one a signature is a single line of any length."""
    pins = [
        re.findall(r"^ruff==\S+$", (ROOT / "requirements" / f"{name}.txt").read_text(), re.M)
        for name in ("docs", "lint")
    ]
    assert pins[0] == pins[1] and len(pins[0]) == 1


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"[\w/-]+\.md", menu)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_environment_variable_is_listed():
    folders = [Path(kdkernels.__file__).parent, *(ROOT / name for name in ("csrc", "tests", "benchmarks"))]
    files = [ROOT / "setup.py", *(path for folder in folders for path in folder.rglob("*.*"))]
    text = "".join(path.read_text() for path in files if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))
    read = set(re.findall(r"KDKERNELS_[A-Z]+(?:_[A-Z]+)*", text))
    listed = set(re.findall(r"^\| `(KDKERNELS_\w+)`", (DOCS / "reference" / "environment.md").read_text(), flags=re.M))
    assert listed == read


def test_the_tables_of_support_are_made_of_the_records():
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "scripts" / "support_matrix.py")
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    records = json.loads(matrix.RECORDS.read_text())
    assert matrix.generated(records) in matrix.PAGE.read_text()
    assert all(record["passed"] > 500 for record in records)
    assert matrix.cell(records, "3.14", "2.10") == "not tested"
    wrong = [{"python": "3.11.1", "torch": "2.13.0+cpu", "passed": 9, "failed": 2}]
    assert matrix.cell(wrong, "3.11", "2.13") == "2 fail"


def test_the_ladder_of_memory_is_the_code_s():
    assert memory.ladder_table() in (DOCS / "guide" / "memory.md").read_text()
    one = 8192 * 151936 * 2
    sizes = memory.estimate(8192, 151936, hidden_size=4096, k=8, chunk_bytes=2**20)
    assert sizes["kd_loss"] == 3 * one and sizes["topk_kd_loss"] == 2 * one + 8192 * 8 * (4 + 4)
    assert sizes["linear_kd_loss"] == 2**20 + 151936 * 4096 * 4 + 8192 * 4096 * 2
    assert "linear_kd_loss" not in memory.estimate(8192, 151936)


def test_the_examples_of_hidden_states_run():
    names: dict = {}
    for code in examples(DOCS / "guide" / "hidden-states.md"):
        exec(code, names)
    assert names["rows"].shape == (64,) and names["states"].grad.any() and names["heads"][1].grad.any()


def test_the_table_of_divergences_is_the_code_s():
    assert divergences.markdown_table() in (DOCS / "reference" / "divergences.md").read_text()


def test_the_example_of_the_cache_runs(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="the cache writes safetensors")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, expectations, sampler, stream, state, loader = examples(DOCS / "guide" / "cache.md")
    names: dict = {}
    exec(code, names)
    assert len(names["cache"]) == 8 and names["batch"]["ids"].shape == (4, 100, 64)
    readers = dict(names)
    for part in (sampler, stream):
        exec(part, readers)
        assert sum(len(batch["ids"]) for batch in readers["loader"]) == 4
    exec(state, readers)
    assert [len(item["ids"]) for item in readers["sequences"]] == [100] * 3
    if importlib.util.find_spec("torchdata"):
        exec(loader, readers)
        assert sum(len(batch["ids"]) for batch in readers["loader"]) == 2
    exec(expectations, names)
    assert len(names["cache"]) == 8 and names["batch"]["expectation"].shape == (4, 100, 64)
    names["loss"].backward()
    assert names["hidden"].grad.any()


def test_the_examples_of_sampled_tokens_run():
    sampled, *others = examples(DOCS / "guide" / "on-policy.md")
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(sampled, names)
        assert names["logits"].grad is not None and not names["logits"].grad[0, 6:].any()
        for code in others:
            exec(code, names)
    assert names["student"].logprobs.shape == names["x"].shape == (4, 10) and names["loss"].requires_grad


def test_the_sizes_of_the_cache_are_the_code_s():
    pytest.importorskip("safetensors", reason="the cache writes safetensors")
    from kdkernels.cache.codec import ExpectationLayout, Layout

    edges = {0: 2**16 - 1, 1: 2**17 - 1, 2: 2**18 - 1, 4: 2**20 - 1, 8: 2**24 - 1}
    layouts = [Layout(64, vocab_size, True, {}) for vocab_size in edges.values()]
    assert [layout.high_bits for layout in layouts] == list(edges)
    text = (DOCS / "guide" / "cache.md").read_text()
    for width in (896, 2048, 4096):
        halved, full = (
            f"{ExpectationLayout(width, dtype, False, {}).token_bytes:,}" for dtype in (torch.float16, torch.float32)
        )
        assert f"D = {width:,} | {halved} | {full} |" in text
    assert f"| top-1024 | {Layout(1024, 128256, True, {}).token_bytes:,} |" in text
    sizes = [str(layout.token_bytes) for layout in layouts]
    assert f"takes {', '.join(sizes[:-1])} and {sizes[-1]} bytes for h = 0, 1, 2, 4 and 8" in " ".join(
        (DOCS / "guide" / "cache.md").read_text().split()
    )
