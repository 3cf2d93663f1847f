"""The table of models by sets: `mlmkit compare --table`."""

import csv
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import edit_record, refusal, run, run_json
from test_intervals import write_tables

from mlmkit.errors import UserError
from mlmkit.eval.compare import metric_draws
from mlmkit.eval.display import model_name
from mlmkit.eval.item_metrics import item_scores, measure_items
from mlmkit.eval.metrics import measure
from mlmkit.eval.result import RESULT_FORMAT
from mlmkit.eval.results_store import load_result
from mlmkit.eval.results_table import as_markdown, results_table
from mlmkit.eval.statistics import percentiles
from mlmkit.files import file_sha256, write_record

DOCUMENTS = 40
NOISE = np.random.default_rng(0).normal(0, 0.3, DOCUMENTS)
LOSSES = {  # nats of each document's only scored token; a and b differ in both directions, c is always worse by 0.5
    "a": 3 + NOISE,
    "b": 3.01 + NOISE + np.where(np.arange(DOCUMENTS) % 2, 0.2, -0.2),
    "c": 3.5 + NOISE,
}


def store(folder: Path, losses: np.ndarray, metric: str = "masked", /, **changes: Any) -> Path:
    """A stored result with these losses; `changes` replace parts of its `model`, `corpus` or `result.json`."""
    folder.mkdir(parents=True)
    write_tables(folder, metric, [[(-loss, 0, -0.1)] for loss in losses])
    seeds = [0] if metric == "masked" else [None]
    model = {"fingerprint": folder.parts[-2], "tokenizer": "t", "precision": "fp32", "architecture": "bert"}
    model |= {"path": f"runs/{folder.parts[-2]}/model", "mask_id": 0}
    source = {"set": folder.name, "location": "text.txt"}
    result = {
        "format": RESULT_FORMAT,
        "metrics": measure(folder, metric, seeds, len(losses), mask_id=0).metrics,
        "digests": {"masked-0" if metric == "masked" else "pseudo": "d"},
        "corpus": {"fingerprint": folder.name, "documents": len(losses), "source": source},
        "model": model | changes.pop("model", {}),
        "backend": {"name": "torch"},
        "pseudo": {"variant": "original", "sample": 1.0} if metric == "pseudo" else None,
        "unknown": {"character_share": 0.0},
        "set": None,
        "files": {name: file_sha256(folder / name) for name in ("tokens.parquet", "documents.parquet")},
    }
    result["corpus"] |= changes.pop("corpus", {})
    write_record(folder / "result.json", result | changes)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three models on the sets wiki and news; c was not measured on news."""
    for model, losses in LOSSES.items():
        store(tmp_path / model / "wiki", losses)
        if model != "c":
            store(tmp_path / model / "news", losses)
    return tmp_path


def ranks(folders: list[Path]) -> dict[str, list[int | None]]:
    table = results_table(folders)
    return {
        column.name: [cell.rank if (cell := column.cells.get(model)) else None for model in table.models]
        for column in table.columns
    }


def test_models_that_cannot_be_told_apart_share_a_rank(results, tmp_path):
    assert ranks([results]) == {"news": [1, 1, None], "wiki": [1, 1, 3]}
    rows = {(row["model"], row["set"]): row for row in results_table([results]).rows()}
    assert [rows[model, "wiki"]["tied"] for model in "abc"] == [True, True, False]
    # a is better than d on every document, b is not: d cannot be told apart from b, but comes after a.
    store(tmp_path / "d" / "wiki", LOSSES["a"] + 0.02)
    assert ranks([results])["wiki"] == [1, 1, 4, 2]


def test_what_differs_by_rounding_is_a_tie(tmp_path):
    for model, shift in (("a", 0.0), ("b", 1e-8)):
        store(tmp_path / model / "wiki", LOSSES["a"] + shift)
    assert ranks([tmp_path]) == {"wiki": [1, 1]}


def test_items_are_ranked_by_the_mean_of_the_paradigms(tmp_path):
    """A pair is right if its first sentence has the lower loss. The perplexity of a side ranks nothing."""
    source = {"set": "pairs", "location": "x", "task": "pairs", "sides": ["good", "bad"], "normalisation": "none"}
    odd = np.arange(DOCUMENTS) % 2
    for model, losses in (("never", 3 - odd), ("always", 3 + odd), ("half", 3 + odd * np.resize([1, 1, -1, -1], 40))):
        folder = store(tmp_path / model / "pairs", losses, "pseudo", corpus={"source": source})
        metrics, items = measure_items(folder, item_scores(folder, "none"), source)
        for metric in ("pair_accuracy_macro", "pseudo_perplexity_good"):
            edit_record(folder / "result.json", metrics=metrics, items=items, set={"metric": metric})
            (column,) = results_table([folder]).columns
            assert (column.metric, column.n, column.unit) == (metric, 20, "items")
        edit_record(folder / "result.json", set={"metric": "pair_accuracy_macro"})
        values, count = metric_draws(load_result(folder), "pair_accuracy_macro")
        stored = metrics["pair_accuracy_macro"]
        assert (values[0], *percentiles(values[1:]), count) == (stored["value"], stored["low"], stored["high"], 20)
    table = results_table([tmp_path])
    found = {row["model"]: (row["value"], row["rank"]) for row in table.rows()}
    assert found == {"always": (1.0, 1), "half": (0.5, 2), "never": (0.0, 3)}
    assert "pairs right, mean of paradigms, % ↑" in as_markdown(table) and "**100.00 (1) [100.00" in as_markdown(table)
    for folder in tmp_path.glob("*/pairs"):
        edit_record(folder / "result.json", set={"metric": "pseudo_perplexity_good"})
    assert ranks([tmp_path]) == {"pairs": [None, None, None]}


def test_higher_is_better_where_it_is(tmp_path):
    for model, losses in LOSSES.items():
        folder = store(tmp_path / model / "wiki", losses, set={"metric": "mean_reciprocal_rank"})
        assert results_table([folder]).columns[0].better == "higher"
    # The rank is 0 for every token, so none is better than another.
    assert ranks([tmp_path]) == {"wiki": [1, 1, 1]}


def test_markdown(capsys, results):
    code, out, err = run(capsys, "compare", results / "a", results / "b", results / "c" / "wiki", "--table")
    assert (code, err) == (0, "")
    assert out == as_markdown(results_table([results]))
    header, rule, metric, n, *models, _, note = out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (header, metric, n, *models)]
    heading = "masked cross-entropy, nats per token ↓"
    assert cells[:3] == [["model", "news", "wiki"], ["*metric*", heading, heading], ["*n*", *["40 documents"] * 2]]
    found = {row["model"]: row for row in results_table([results]).rows() if row["set"] == "wiki"}
    shown = {model: "{value:.4f} ({rank}) [{low:.4f}, {high:.4f}]".format(**row) for model, row in found.items()}
    assert [line[2] for line in cells[3:]] == [f"**{shown['a']}**", f"**{shown['b']}**", shown["c"]]
    assert cells[-1][:2] == ["c", "–"]
    assert set(rule) == set("|- :") and len({len(line) for line in (header, rule, metric, n, *models)}) == 1
    assert "1,000 resamples" in note and "Not corrected" in note


def test_csv_has_every_digit(capsys, results, tmp_path):
    paths = [tmp_path / "new" / "table.csv", tmp_path / "table.md"]
    arguments = ("compare", results, *(f"--table={path}" for path in paths))
    code, out, _ = run(capsys, *arguments)
    assert (code, out) == (0, "".join(f"table: {path}\n" for path in paths))
    found = run_json(capsys, *arguments)["table"]
    read = list(csv.DictReader(io.StringIO(paths[0].read_text())))
    assert read == [{key: "" if value is None else str(value) for key, value in row.items()} for row in found]
    assert [float(row["value"]) for row in read if row["set"] == "wiki"] == pytest.approx(
        [losses.mean() for losses in LOSSES.values()]
    )
    assert paths[1].read_text() == as_markdown(results_table([results]))


def test_the_page_escapes_names(capsys, tmp_path):
    for model in ("<b>one", "two|three"):
        store(tmp_path / model / "wiki", LOSSES["a"])
    assert run(capsys, "compare", tmp_path, "--table", tmp_path / "t.html", "--table", tmp_path / "t.md")[0] == 0
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;one" in text and "<b>one" not in text
    assert "<h1>2 models on 1 set</h1>" in text and text.count("(1)</b>") == 2
    markdown = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "&lt;b>one" in markdown and "two\\|three" in markdown
    (column,) = (table := results_table([tmp_path])).columns
    markdown = as_markdown(replace(table, columns=[replace(column, note="<i>, because a\x1b[2J\n differs")]))
    assert "\n&lt;i>, because a[2J differs.\n" in markdown


def test_results_on_other_text_or_masks_are_refused(results, tmp_path):
    for name, changes, message in (
        ("text", {"corpus": {"fingerprint": "x"}}, "a/wiki and .*text/wiki measure different texts"),
        ("masks", {"digests": {"masked-0": "x"}}, "scored different positions .*same recipe"),
        ("seeds", {"digests": {"masked-0": "d", "masked-1": "d"}}, r"other masks \(masked-0 and masked-0, masked-1\)"),
        ("kind", {"metrics": {}, "digests": {}}, "has no masked_cross_entropy"),
    ):
        other = store(tmp_path / name / "wiki", LOSSES["a"], **changes)
        with pytest.raises(UserError, match=message):
            results_table([results / "a" / "wiki", other])
    again = store(tmp_path / "again" / "a" / "wiki", LOSSES["b"])
    with pytest.raises(UserError, match="both measure a on wiki: leave one out"):
        results_table([results / "a", again])


def test_other_tokenizers_share_bits_per_byte(tmp_path):
    for model in "ab":
        losses = LOSSES[model]
        store(tmp_path / model / "wiki", losses, "pseudo", model={"tokenizer": model}, digests={"pseudo": model})
    (column,) = results_table([tmp_path]).columns
    assert (column.metric, column.note) == ("bits_per_byte", "")
    for model in "ab":
        changes = {"model": {"tokenizer": model}, "digests": {"masked-0": model}}
        store(tmp_path / model / "masked", LOSSES[model], **changes)
    with pytest.raises(UserError, match="their tokenizers differ: compare --metric pseudo"):
        results_table([tmp_path])


def test_variants_of_pseudo_likelihood_have_their_own_columns(tmp_path):
    for model, variant in (("a", "original"), ("b", "within-word"), ("c", "original")):
        pseudo = {"variant": variant, "sample": 1.0}
        store(tmp_path / model / "wiki", LOSSES[model], "pseudo", pseudo=pseudo)
    assert ranks([tmp_path]) == {"wiki, original": [1, None, 2], "wiki, within-word": [None, None, None]}


def test_models_have_the_shortest_names_that_tell_them_apart(tmp_path):
    models = {
        "runs/a/model": {},
        "runs/b/checkpoints/step-00000100": {},
        "old/a": {},
        "/data/runs/c/model": {"precision": "int8"},
        "runs/c/model": {},
    }
    for number, (path, changes) in enumerate(models.items()):
        store(tmp_path / str(number) / "wiki", LOSSES["a"], model={"path": path, **changes})
    assert [model_name(path) for path in models] == ["a", "b/step-00000100", "a", "c", "c"]
    assert [model_name(path) for path in ("model", "/", "r/initial", "artifact")] == [
        "model",
        "/",
        "r/initial",
        "artifact",
    ]
    assert list(results_table([tmp_path]).models) == [
        "runs/a", "b/step-00000100", "old/a", "data/runs/c", "runs/c",
    ]  # fmt: skip
    for number, changes in enumerate(({"precision": "int8"}, {"fingerprint": "0123456789", "precision": "int8"}, {})):
        store(tmp_path / "same" / str(number) / "wiki", LOSSES["a"], model={"path": "m", **changes})
    assert list(results_table([tmp_path / "same"]).models) == [
        "m (int8, torch) (weights 0)", "m (int8, torch) (weights 01234567)", "m (fp32, torch)",
    ]  # fmt: skip


def test_bad_arguments_are_refused(capsys, results, tmp_path):
    a = results / "a" / "wiki"
    assert "end the file's name in .md, .csv or .html" in refusal(capsys, "compare", a, "--table", tmp_path / "t.tex")
    assert "--output is for the page" in refusal(capsys, "compare", a, "--table", "--output", tmp_path)
    assert "does not exist" in refusal(capsys, "compare", tmp_path / "none", "--table")
    assert "cannot write" in refusal(capsys, "compare", a, "--table", a / "result.json" / "t.md")
    assert "put --table after the results" in refusal(capsys, "compare", "--table", a, a)
    assert "--top has no effect with --table" in refusal(capsys, "compare", a, "--table", "--top", 5)


def test_folders_that_a_killed_process_has_left_are_not_searched(results, tmp_path):
    hidden = tmp_path / "a" / ".left.mlmkit-1" / "held-out"
    hidden.parent.mkdir()
    shutil.copytree(tmp_path / "a" / "wiki", hidden)
    assert ranks([results])["wiki"] == [1, 1, 3]
    assert ranks([hidden]) == {"wiki": [None]}
