"""Suites: several sets, one table, and the predictions that BabyLM's pipeline takes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import paragraphs, refusal, run, run_json

from mlmkit.backends import load
from mlmkit.eval.api import evaluate
from mlmkit.eval.result import main_metric
from mlmkit.files import read_record

PAIRS = [
    ("The keys are on the table.", "The keys is on the table.", "number"),
    ("The statement is executed.", "The statement are executed.", "number"),
    ("A name is bound here.", "A name bound is here.", "order"),
    ("They bind themselves.", "They bind itself.", "number"),
]
EWOK = [
    {"Context1": "The file is open.", "Target1": "It can be read.", "Target2": "It is closed.", "Domain": "a-b"},
    {"Context1": "The file is closed.", "Target1": "It is closed.", "Target2": "It can be read.", "Domain": "a-b"},
]
COMPS = [
    {"prefix_acceptable": "A file", "prefix_unacceptable": "A name", "property_phrase": "can be opened.", "of": of}
    for of in ("comps_base", "comps_wugs_dist-before", "comps_base")
]
WUG = [{"one": "it is wugness", "two": "it is wugity", "ratio": 0.25}, {"one": "a name", "two": "name a", "ratio": 0.5}]
WUG += [{"one": "the value is true", "two": "the value is a", "ratio": 1.0}]
BOXES = [
    {"context": "Box 0 has the file. Box 0 has ", "options": ["the file.", "a name.", "a."], "numops": n}
    for n in (0, 1, 0)
]
READING = [
    {"item": "The name", "word": "is", "prev_item": "The", "prev_word": "name", "time": 1.0},
    {"item": "The", "word": "name", "prev_item": None, "prev_word": None, "time": 2.0},
    {"item": "A value is", "word": "returned", "prev_item": "A value", "prev_word": "is", "time": 4.0},
]
FILES = {
    "blimp": [dict(zip(("sentence_good", "sentence_bad", "UID"), pair, strict=True)) for pair in PAIRS],
    "ewok": EWOK,
    "comps": COMPS,
    "wug": WUG,
    "boxes": BOXES,
    "reading": READING,
}
TABLES = {
    "blimp": 'task = "pairs"\nmetric = "pair_accuracy_macro"\n[pairs]\nparadigm = "UID"\n'
    '[[reference]]\nmodel = "Theirs"\nmetric = "pair_accuracy"\nvalue = 0.5\nsource = "a table"\n'
    '[[reference]]\nmodel = "Ours"\nmetric = "pair_accuracy_macro"\nvalue = 0.75\nsource = "a table"\n',
    "ewok": 'task = "pairs"\n[pairs]\ngood = "Target1"\nbad = "Target2"\ncontext = "Context1"\nparadigm = "Domain"\n',
    "comps": 'task = "pairs"\n[pairs]\ngood = "property_phrase"\nbad = "property_phrase"\nparadigm = "of"\n'
    'context = "prefix_acceptable"\nbad_context = "prefix_unacceptable"\n',
    "wug": 'task = "pairs"\nmetric = "wug_ratio_spearman"\n[pairs]\nfirst = "one"\nsecond = "two"\n'
    '[[correlation]]\nname = "wug"\ncolumns = ["ratio"]\nscore = "probability"\n',
    "boxes": 'task = "choices"\n[choices]\ncontext = "context"\nchoices = "options"\nlabel = 0\njoin = ""\n'
    'paradigm = "regular_{numops}_ops"\n',
    "reading": 'task = "cloze"\n[cloze]\nprefix = "item"\ntarget = "word"\nprevious_prefix = "prev_item"\n'
    'previous_target = "prev_word"\npll = "left-to-right"\nappended_masks = 3\n',
}
PLACES = {
    "blimp": "blimp/blimp_filtered",
    "ewok": "ewok/ewok_filtered",
    "comps": "comps/comps",
    "wug": "wug_adj/wug_adj_nominalization",
    "boxes": "entity_tracking/entity_tracking",
    "reading": "reading",
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of small sets beside its file, in the forms of BabyLM's."""
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nlocal = "{name}.jsonl"\n{TABLES[name]}')
    path = tmp_path / "suite.toml"
    sets, places = (
        [f"{name}.toml" for name in FILES],
        "".join(f'{name} = "{place}"\n' for name, place in PLACES.items()),
    )
    path.write_text(f'name = "mine"\ndescription = "small"\nsets = {json.dumps(sets)}\n[babylm]\n{places}')
    return path


def test_a_suite_is_its_sets_and_a_table(capsys, suite, checkpoint, tmp_path):
    model, output = checkpoint("bert"), tmp_path / "output"
    (tmp_path / "text.txt").write_text("\n".join(paragraphs()[:3]))
    suite.write_text(suite.read_text().replace('"blimp.toml"', '"text.txt", "blimp.toml"'))
    record = run_json(capsys, "eval", model, "--suite", suite, "--output", output)
    assert record == read_record(output / "suite.json", "")
    assert [row["set"] for row in record["sets"]] == ["text", *FILES]
    for row in record["sets"]:
        result = read_record(output / row["set"] / "result.json", "")
        assert {key: row[key] for key in ("value", "low", "high")} == result["metrics"][row["metric"]]
        assert row["n"] == len(FILES.get(row["set"], "123"))
    rows = {row["set"]: row for row in record["sets"]}
    assert rows["blimp"]["published"] == [{"model": "Ours", "value": 0.75, "source": "a table"}]
    assert [rows[name]["metric"] for name in ("text", "blimp", "ewok", "wug", "boxes")] == [
        "masked_cross_entropy", "pair_accuracy_macro", "pair_accuracy", "wug_ratio_spearman", "choice_accuracy",
    ]  # fmt: skip
    alone = evaluate(load(str(model)), tmp_path / "ewok.toml").metrics["pair_accuracy"]
    assert alone == {key: rows["ewok"][key] for key in alone}

    # Called again: what is finished is not measured again, and what is missing is.
    times = {name: (output / name / "result.json").stat().st_mtime_ns for name in FILES}
    shutil.rmtree(output / "wug")
    code, out, _ = run(capsys, "eval", model, "--suite", suite, "--output", output)
    assert code == 0
    assert read_record(output / "suite.json", "") == record
    again = {name: (output / name / "result.json").stat().st_mtime_ns for name in FILES}
    assert {name for name in FILES if again[name] != times[name]} == {"wug"}
    [line] = [line for line in out.splitlines() if line.startswith("blimp ")]
    assert line.split()[:3] == ["blimp", "pair_accuracy_macro", f"{rows['blimp']['value']:.4f}"]
    assert line.split()[-3:] == ["4", "0.7500", "Ours"]


def test_the_first_metric_stands_for_a_set_whose_own_was_not_measured(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(paragraphs()[:2]))
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\ntask = "text"\nlocal = "a.txt"\nmetric = "pseudo_perplexity"\n')
    model = load(str(checkpoint("bert")))
    for metric, name in (("masked", "masked_cross_entropy"), ("pseudo", "pseudo_perplexity")):
        assert main_metric(evaluate(model, path, metrics=metric).result) == name


def test_all_that_is_missing_is_said_before_anything_is_computed(capsys, suite, checkpoint, tmp_path):
    model, output = checkpoint("bert"), tmp_path / "output"
    for name in ("blimp", "boxes"):
        (tmp_path / f"{name}.jsonl").unlink()
    error = refusal(capsys, "eval", model, "--suite", suite, "--output", output)
    assert "the set blimp has no blimp.jsonl beside its declaration" in error
    assert "the set boxes has no boxes.jsonl" in error
    (tmp_path / "blimp.jsonl").write_text('{"sentence_good": "A name."}\n')
    (tmp_path / "boxes.jsonl").write_text('{"context": 1}\n')
    error = refusal(capsys, "eval", model, "--suite", suite, "--output", output)
    assert "blimp.jsonl: line 1 has no field" in error
    assert "boxes.jsonl: line 1 has no field" in error
    assert not output.exists()


def test_bad_suites_are_refused(capsys, suite, checkpoint, tmp_path):
    model = checkpoint("bert")
    assert "either --set or --suite" in refusal(capsys, "eval", model)
    assert "either --set or --suite" in refusal(capsys, "eval", model, "--set", "blimp", "--suite", suite)
    assert "no suite 'babylm'" in refusal(capsys, "eval", model, "--suite", "babylm")
    assert "--by-paradigm has no effect" in refusal(capsys, "eval", model, "--suite", suite, "--by-paradigm")
    assert "needs --suite" in refusal(capsys, "eval", model, "--set", suite, "--babylm-predictions", tmp_path)
    predictions = ("--babylm-predictions", tmp_path / "predictions")
    text = suite.read_text()
    suite.write_text(text + 'other = "blimp/other"\n')
    assert "[babylm] names other" in refusal(capsys, "eval", model, "--suite", suite, *predictions)
    for place in ("../other", "/other"):
        suite.write_text(text.replace(PLACES["ewok"], place))
        assert "is outside the folder of predictions" in refusal(capsys, "eval", model, "--suite", suite, *predictions)
    suite.write_text(text.partition("[babylm]")[0])
    assert "has no table [babylm]" in refusal(capsys, "eval", model, "--suite", suite, *predictions)
    suite.write_text('name = "mine"\nsets = []\n')
    assert "sets is empty" in refusal(capsys, "eval", model, "--suite", suite)


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def test_predictions_are_those_that_babylm_writes(capsys, suite, checkpoint, tmp_path):
    """The files of its `run.py`, whose scores are computed here from documents.parquet and tokens.parquet."""
    model, output, folder = checkpoint("roberta"), tmp_path / "output", tmp_path / "predictions"
    _, out, _ = run(capsys, "eval", model, "--suite", suite, "--output", output, "--babylm-predictions", folder)
    found: dict[str, Any] = {}
    for name, place in PLACES.items():
        path = folder / model.stem / "main" / "zero_shot" / "mlm" / place / "predictions.json"
        assert f"predictions: {path}" in out
        found[name] = {key: table["predictions"] for key, table in json.loads(path.read_text()).items()}

    scores = {}
    for name in FILES:
        evaluation = evaluate(load(str(model)), tmp_path / f"{name}.toml")
        sums = evaluation.tokens.group_by("document", use_threads=False).aggregate([("log_prob", "sum")]).to_pydict()
        by_document = dict(zip(sums["document"], sums["log_prob_sum"], strict=True))
        scores[name] = {}
        for document, (item, option) in enumerate(
            zip(*(evaluation.documents[c].to_pylist() for c in ("item", "option")), strict=True)
        ):
            if document in by_document:  # the first word of a sentence has none before it
                scores[name].setdefault(item, {})[option] = by_document[document]
    best = {name: [max(own, key=own.__getitem__) for own in scores[name].values()] for name in scores}

    assert [(row["id"], row["pred"]) for row in found["blimp"]["number"]] == [
        (f"number_{number}", PAIRS[index][best["blimp"][index]]) for number, index in enumerate((0, 1, 3))
    ]
    assert found["blimp"]["order"] == [{"id": "order_0", "pred": PAIRS[2][best["blimp"][2]]}]
    targets = [f" {row[('Target1', 'Target2')[index]]}" for row, index in zip(EWOK, best["ewok"], strict=True)]
    assert [row["pred"] for row in found["ewok"]["a-b"]] == targets
    prefix = [("prefix_acceptable", "prefix_unacceptable")[index] for index in best["comps"]]
    whole = [f"{row[key]} {row['property_phrase']}" for row, key in zip(COMPS, prefix, strict=True)]
    assert [row["pred"] for row in found["comps"]["base"]] == [whole[0], whole[2]]
    assert found["comps"]["wugs_dist_before"] == [{"id": "wugs_dist_before_0", "pred": whole[1]}]
    assert [row["pred"] for row in found["boxes"]["regular_0_ops"]] == [
        BOXES[0]["options"][best["boxes"][i]] for i in (0, 2)
    ]
    assert set(found["boxes"]) == {"regular_0_ops", "regular_1_ops"}
    wug = found["wug"]["wug_adj"]
    assert [row["pred"] for row in wug] == [row[("one", "two")[i]] for row, i in zip(WUG, best["wug"], strict=True)]
    shares = [softmax([own[0], own[1]])[0] for own in scores["wug"].values()]
    assert [row["prob"] for row in wug] == pytest.approx(shares, rel=1e-5)
    reading = found["reading"]["reading"]
    assert [row["id"] for row in reading] == [0, 1, 2]
    assert [row["pred"] for row in reading] == pytest.approx([-own[0] for own in scores["reading"].values()])
    assert math.isnan(reading[1]["prev_pred"])
    assert reading[2]["prev_pred"] == pytest.approx(-scores["reading"][2][1])
