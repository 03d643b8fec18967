"""Documentation that is written by the code must be what the code writes."""

from pathlib import Path

from kdkernels import divergences

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_table_of_divergences_is_the_code_s():
    assert divergences.markdown_table() in (DOCS / "divergences.md").read_text()
