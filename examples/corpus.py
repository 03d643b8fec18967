"""English prose that ships with every Python: the language reference and the docstrings of the standard library."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}
MIN_PROSE_SHARE = 0.85
MIN_PARAGRAPH_CHARACTERS = 60


def _docstrings(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that are sentences: code, tables and doctests have too few letters and spaces."""
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < MIN_PARAGRAPH_CHARACTERS or words.startswith(">>>"):
            continue
        letters = sum(character.isalpha() or character == " " for character in words)
        if letters / len(words) >= MIN_PROSE_SHARE:
            yield words


def english_documents() -> list[str]:
    """Return one text per help topic and per standard library module, about 1.5 million characters in all."""
    texts = [text for _, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            texts.append("\n\n".join(_docstrings(path.read_bytes())))

    documents = []
    # Overridden methods repeat their docstrings: a paragraph seen in training must not come back in the held-out text.
    seen: set[str] = set()
    for text in texts:
        fresh = [paragraph for paragraph in _paragraphs(text) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n".join(fresh))
    return documents
