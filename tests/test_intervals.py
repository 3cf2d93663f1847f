"""Intervals and p-values: where there are none, and that a value lies in its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmkit.eval.compare import paired_difference
from mlmkit.eval.display import p_value
from mlmkit.eval.item_metrics import item_scores, measure_items
from mlmkit.eval.metrics import measure
from mlmkit.eval.statistics import Bootstrap

SCORE = st.tuples(st.floats(-20, -1e-4), st.integers(0, 30), st.floats(-8, -1e-4))  # log P, rank, the best's log P


def write_tables(folder: Path, metric: str, documents: list[list[tuple[float, int, float]]]) -> None:
    """`tokens.parquet` and `documents.parquet` with these scores; each two documents are a pair."""
    counts, number = [len(tokens) for tokens in documents], np.arange(len(documents))
    log_prob, rank, best = np.array([score for tokens in documents for score in tokens]).T
    rank, offset = rank.astype(np.int32), np.concatenate([np.arange(count) for count in counts])
    tokens = {
        "document": np.repeat(number, counts),
        "log_prob": log_prob,
        "rank": rank,
        "top_log_prob": best,
        "metric": [metric] * len(rank),
        "mask_seed": pa.array([0 if metric == "masked" else None] * len(rank), pa.uint64()),
        "token_id": offset,
        "offset": offset,
        "frequency": offset + 1,
        "length": np.repeat(counts, counts),
        "input_id": rank % 3,
        "piece": rank % 3,
    }
    pq.write_table(pa.table(tokens), folder / "tokens.parquet")
    sizes = {"scorable": counts, "words": number % 3 + 1, "characters": number % 5 + 3, "bytes": number % 5 + 4}
    groups = {"phenomenon": [f"p{n // 4}" for n in number], "paradigm": [f"q{n // 8}" for n in number]}
    items = {"item": number // 2, "option": number % 2, "is_right": number % 2 == 0, "same_ids": number < 0}
    table = pa.table({"document": number, **sizes, **items, "scored_characters": number % 5 + 3, **groups})
    pq.write_table(table, folder / "documents.parquet")


def each_interval(found: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every metric in a nested result, with its name."""
    if "low" in found:
        yield name, found
    for key, value in found.items():
        if isinstance(value, dict):
            yield from each_interval(value, key)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(SCORE, max_size=6), min_size=1, max_size=20).filter(any), st.sampled_from(["masked", "pseudo"])
)
def test_a_value_lies_in_its_interval(documents, metric):
    documents = [*documents, *[[]] * (len(documents) % 2)]
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), metric, documents)
        measured = measure(Path(folder), metric, [0 if metric == "masked" else None], len(documents), mask_id=0)
        source = {"task": "pairs", "sides": ["good", "bad"]}
        scores = item_scores(Path(folder), "none") if metric == "pseudo" else None
        pairs = measure_items(Path(folder), scores, source) if scores else ({}, {})
    for name, found in each_interval({"all": measured.metrics, "pairs": pairs[0], **pairs[1]}):
        if name == "expected_calibration_error":
            assert found["value"] >= 0 and found["low"] is found["high"] is None
        elif found["low"] is not None and found["high"] is not None:
            rounding = 1e-9 * abs(found["value"])
            assert found["low"] - rounding <= found["value"] <= found["high"] + rounding
    assert not list(each_interval(measured.slices))  # slices have intervals only in comparisons
    for slices in measured.slices.values():
        assert sum(found["tokens"] for found in slices.values()) == sum(map(len, documents))


def mean(totals: np.ndarray) -> np.ndarray:
    return totals[..., 1] / totals[..., 0]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({7: 1.0}, None),  # of one document there is nothing to draw
        ({7: 1.0, 9: 2.0}, 0.14 * 2),  # (1 - 2 / 20)^20 = 0.12 of the draws have neither and count for both sides
        ({number: 1.0 + number for number in range(20)}, 2 / 1001),
    ],
)
def test_a_p_value_needs_documents(scores, expected):
    """One side is 0 everywhere, so every draw with a scored token says that the other is larger."""
    draws, rows = Bootstrap(20, 4), np.zeros((20, 4))
    for document, score in scores.items():
        rows[document] = 1, 0, 1, score
    draws.add(rows)
    found = paired_difference("masked_accuracy", mean, draws, slice(0, 2), slice(2, 4))
    assert (found["better"], found["documents"], found["a"]) == ("higher", len(scores), 0)
    assert found["difference"] == pytest.approx(np.mean(list(scores.values())))
    if expected is None:
        assert found["low"] is found["high"] is found["p_value"] is None
    else:
        assert 0 < found["low"] <= found["difference"] <= found["high"]
        assert found["p_value"] == pytest.approx(expected, rel=0.3)


def test_the_smallest_p_value_is_shown_as_a_bound():
    assert [p_value(value) for value in (2 / 1001, 4 / 1001, 1.0, None)] == ["< 0.002", "0.004", "1.000", "–"]
