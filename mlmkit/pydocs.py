"""Real text that every Python carries: the language reference's topics and the standard library's docstrings.

A few MB of English technical prose, for the demo and for checking exports where the user names no text.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST_WORDS = 8
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def python_documentation() -> list[str]:
    """One text a topic, docstring, sorted by module and without repeats; white space runs folded to one space."""
    folded = (" ".join(text.split()) for text in (*topics(), *_docstrings()))
    return [text for text in dict.fromkeys(folded) if len(text.split()) >= SHORTEST_WORDS]


def topics() -> list[str]:
    """The texts behind `help("LISTS")` and its like."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions part it from Python
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
