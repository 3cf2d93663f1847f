"""Distinct rows: each is given to the model once, and every token gets the score that its row has alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlmkit.backends import Backend, Batch, Scored, load
from mlmkit.batching import BATCH_TOKENS
from mlmkit.corpus import Corpus, tokenize
from mlmkit.eval import scoring
from mlmkit.eval.rows import VARIANTS, Rows, pseudo_rows
from mlmkit.eval.scoring import STRETCH_TOKENS, build_batch, distinct_batches, score_rows

WORDS = ("the", "cat", "cats", "sleep", "sleeps", "[MASK]", "statement")
sentences = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)


class Recorder:
    """A backend that keeps the batches that it scores."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.batches = backend, list[Batch]()
        self.name, self.device, self.info, self.tokenizer = backend.name, "cpu", backend.info, backend.tokenizer
        self.manifest = backend.manifest

    def score(self, batch: Batch) -> Scored:
        self.batches.append(batch)
        return self.backend.score(batch)

    def rows(self) -> list[tuple[int, ...]]:
        """The ids of all rows so far, without padding."""
        masks = [zip(batch.input_ids, batch.attention_mask, strict=True) for batch in self.batches]
        return [tuple(ids[mask == 1].tolist()) for rows in masks for ids, mask in rows]


def one_by_one(backend: Backend, corpus: Corpus, rows: Rows) -> list[Scored]:
    return [backend.score(build_batch(corpus, rows, np.array([row]), backend.tokenizer)[0]) for row in range(len(rows))]


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest, artifact: Callable[[str], Path]) -> Backend:
    return load(str(artifact(request.param)))


@pytest.mark.parametrize("backend", ["bert", "convbert"], indirect=True)
@given(
    texts=st.lists(sentences, min_size=1, max_size=8),
    budget=st.sampled_from([0, 1, 20, 60]),
    stretch=st.sampled_from([1, 40, STRETCH_TOKENS]),
    room=st.sampled_from([4, 62]),
    variant=st.sampled_from([*VARIANTS]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_distinct_row_is_scored_once_and_to_the_bit(backend, texts, budget, stretch, room, variant, monkeypatch):
    """Also where a text is cut into windows, or scores depend on padding (ConvBERT)."""
    backend = Recorder(backend)
    monkeypatch.setattr(scoring, "STRETCH_TOKENS", stretch)
    corpus = tokenize(texts, backend.tokenizer)
    rows = pseudo_rows(corpus, backend.tokenizer, room, variant)
    scores = score_rows(backend, corpus, rows, budget)
    given, batches = backend.rows(), [*backend.batches]
    alone = one_by_one(backend, corpus, rows)
    assert {*given} == {*backend.rows()[len(given) :]}
    if stretch == STRETCH_TOKENS:
        assert len(given) == len({*given})
    for batch in batches:
        assert batch.input_ids.size <= (budget or BATCH_TOKENS["cpu"]) or len(batch.input_ids) == 1
        assert batch.attention_mask.all() or not backend.info.sees_padding
    for name in ("log_prob", "rank"):
        assert np.array_equal(getattr(scores, name), [getattr(scored, name)[0] for scored in alone])
    assert np.array_equal(scores.top_id, [scored.top_id[0, 0] for scored in alone])


def test_a_pair_shares_the_row_of_the_word_that_differs(checkpoint):
    backend = Recorder(load(str(checkpoint("bert"))))
    texts = ["it is a list", "it is a set", "it is a list"]
    corpus = tokenize(texts, backend.tokenizer)
    rows = pseudo_rows(corpus, backend.tokenizer, 62)
    advanced: list[float] = []
    scores = score_rows(backend, corpus, rows, advance=advanced.append)
    words = [len(corpus.ids[a:b]) for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)]
    assert words[0] == words[1] == words[2] == len(rows) // 3
    assert len(backend.rows()) == 2 * words[0] - 1  # the third sentence repeats the first
    assert sum(advanced) == pytest.approx(3)
    assert np.array_equal(scores.log_prob[: words[0]], scores.log_prob[2 * words[0] :])


def test_a_padding_id_in_a_text_is_not_padding():
    """Rows of equal ids but other lengths stay apart; the targets of merged rows stay in their columns."""
    ids, mask = np.array([[5, 0, 0], [5, 0, 0], [5, 0, 0]]), np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0]])
    padded = Batch(ids, mask, np.array([1, 3, 6]), np.array([7, 8, 9]))
    ((batch, targets),) = distinct_batches(padded, 64, equal=False, call_tokens=9)
    assert batch.input_ids.tolist() == [[5, 0], [5, 0]] and batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.positions.tolist() == [1, 0, 2] and batch.targets.tolist() == [7, 9, 8]
    assert targets.tolist() == [0, 2, 1]
