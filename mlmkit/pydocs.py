"""Real text without a download: Python's own documentation, the language reference and library docstrings.

A few MB of English technical prose, for the demo and for checking exports when the user names no text.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST_WORDS = 8
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def python_documentation() -> list[str]:
    """Return one text per topic, then per docstring sorted by module. No duplicates; white space is normalised."""
    folded = (" ".join(text.split()) for text in (*topics(), *_docstrings()))
    return [text for text in dict.fromkeys(folded) if len(text.split()) >= SHORTEST_WORDS]


def topics() -> list[str]:
    """Return the texts of `help("LISTS")` and similar topics, sorted by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return []
    return [topics[name] for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(library).parts):
            yield from _docstrings_of(path)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            docstring := ast.get_docstring(node)
        ):
            yield docstring
