"""The Python of docs/use.md, run as it stands: its vectors, predictions and scores are those of the model."""

import math
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KINDS
from test_docs import ROOT, read_page
from transformers import AutoConfig

import mlmkit
from mlmkit.fill import fill

RUN_HERE, RUN_IN_4 = "run by: tests/test_use.py -->", "run by: tests/test_use.py, with transformers 4 -->"


def blocks(mark: str) -> list[str]:
    """The blocks of the page that have this mark."""
    tokens = read_page(ROOT / "docs" / "use.md").tokens
    return [fence.content for before, fence in pairwise(tokens) if fence.type == "fence" and mark in before.content]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint) -> dict[str, Path]:
    """Working folders with a `run/model` of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        shutil.copytree(checkpoint(kind), folder / "run" / "model")
    return folders


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders["bert"]


@pytest.fixture(scope="module")
def page(folder) -> dict[str, Any]:
    """The variables that the blocks leave, run one after another."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: make setup")
    before, names = Path.cwd(), {}
    os.chdir(folder)
    try:
        for block in blocks(RUN_HERE):
            exec(compile(block, "docs/use.md", "exec"), names)
    finally:
        os.chdir(before)
    return names


def test_every_marked_block_is_run():
    assert len(blocks("run by:")) == len(blocks(RUN_HERE)) + len(blocks(RUN_IN_4)) == 7


def test_vectors_are_means_over_a_texts_own_tokens(page):
    alone = [
        page["encoder"](**page["tokenizer"](text, return_tensors="pt")).last_hidden_state for text in page["texts"]
    ]
    expected = torch.cat([hidden.mean(1) for hidden in alone]).detach().numpy()
    np.testing.assert_allclose(page["vectors"], expected, atol=1e-5)
    assert not np.allclose(page["hidden"].mean(1), expected, atol=1e-2)  # with padding
    np.testing.assert_allclose(page["embedder"].encode(page["texts"]), expected, atol=1e-5)
    assert page["embedder"].max_seq_length == page["tokenizer"].model_max_length == 64


def test_masks_are_filled_as_by_mlmkit(page, folder):
    (mine,) = fill(mlmkit.load(folder / "run" / "model", device="cpu"), "Return the [MASK] of the file.", top_k=3)
    tokens, scores = ([answer[key] for answer in page["answers"]] for key in ("token", "score"))
    assert [candidate["token"] for candidate in mine] == tokens == page["log_probs"].topk(3).indices[0].tolist()
    assert [candidate["score"] for candidate in mine] == pytest.approx(scores, abs=1e-5)


def test_the_classifier_is_trained_with_dropout(page, folder):
    rates = {module.p for module in page["classifier"].modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.1}
    assert math.isfinite(page["trainer"].state.log_history[-1]["train_loss"])
    assert AutoConfig.from_pretrained(folder / "with-dropout").hidden_dropout_prob == 0.1
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (folder / "classifier").iterdir()}


def test_a_sparse_vector_is_the_largest_logit_of_each_entry(page):
    text = "Return the name of the file."
    with torch.inference_mode():
        logits = page["model"](**page["tokenizer"](text, return_tensors="pt")).logits
    np.testing.assert_allclose(page["sparse"].to_dense(), logits.relu().log1p().amax(1), atol=1e-5)


MINICONS = """
import json, os, sys
scores = []
for folder in sys.argv[2:]:
    os.chdir(folder)
    exec(sys.argv[1])
    scores.append([sentences, original, within_word])
print(json.dumps(scores))
"""


def test_minicons_gives_the_same_scores(transformers4, folders):
    (block,) = blocks(RUN_IN_4)
    for folder, (sentences, *scores) in zip(
        folders.values(), transformers4(MINICONS, block, *folders.values()), strict=True
    ):
        for variant, theirs in zip(("original", "within-word"), scores, strict=True):
            ours = mlmkit.pseudo_log_likelihood(folder / "run" / "model", sentences, variant=variant, device="cpu")
            assert [score.pseudo_log_likelihood for score in ours] == pytest.approx(theirs, abs=1e-4), (folder, variant)
