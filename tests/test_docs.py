"""Documentation that is written by the code must be what the code writes."""

import re
import tempfile
from pathlib import Path

import pytest

from kdkernels import divergences

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_table_of_divergences_is_the_code_s():
    assert divergences.markdown_table() in (DOCS / "divergences.md").read_text()


def test_the_example_of_the_cache_runs(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="the cache writes safetensors")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "cache.md").read_text(), flags=re.M | re.S)
    names: dict = {}
    exec(code, names)
    assert len(names["cache"]) == 8 and names["batch"]["ids"].shape == (4, 100, 64)


def test_the_sizes_of_the_cache_are_the_code_s():
    pytest.importorskip("safetensors", reason="the cache writes safetensors")
    from kdkernels.cache.codec import Layout

    edges = {0: 2**16 - 1, 1: 2**17 - 1, 2: 2**18 - 1, 4: 2**20 - 1, 8: 2**24 - 1}
    layouts = [Layout(64, vocab_size, True, {}) for vocab_size in edges.values()]
    assert [layout.high_bits for layout in layouts] == list(edges)
    sizes = [str(layout.token_bytes) for layout in layouts]
    assert f"takes {', '.join(sizes[:-1])} and {sizes[-1]} bytes for h = 0, 1, 2, 4 and 8" in " ".join(
        (DOCS / "cache.md").read_text().split()
    )
