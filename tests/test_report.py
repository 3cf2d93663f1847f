"""The report and the comparison, from stored results."""

import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import PORTUGUESE, edit_record, paragraphs, run, run_json
from test_pairs import write_pairs

from mlmkit.backends import load
from mlmkit.cli.results import _print_differences
from mlmkit.corpus import tokenize
from mlmkit.errors import UserError
from mlmkit.eval.api import evaluate
from mlmkit.eval.compare import compare
from mlmkit.eval.data import EvalData
from mlmkit.eval.evaluate import run_evaluation
from mlmkit.eval.report import Piece, example_pieces
from mlmkit.eval.rows import Settings
from mlmkit.files import write_record

EVIL = "<script>alert('x')</script> & \"quotes\" $\\frac{1}{2}$ </style> {{ 7 * 7 }} <img src=http://evil.example/x>"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "<b>evil.txt"
    path.write_text("".join(f"{line}\n" for line in [*PORTUGUESE, EVIL, *paragraphs()[:30]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def results(texts: Path, checkpoint, artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bert on torch and on ONNX Runtime, another bert with the same tokenizer (modernbert), each masked and pseudo."""
    folder = tmp_path_factory.mktemp("results")
    models = {"torch": checkpoint("bert"), "onnx": artifact("bert"), "modern": checkpoint("modernbert")}
    for name, model in models.items():
        evaluate(str(model), texts, metrics=["masked", "pseudo"], mask_seed=[0, 1], output=folder / name)
    return {name: folder / name for name in models}


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self.headline = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1] == "h1":
            self.headline += data.strip()


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_the_report_is_one_safe_page(capsys, results):
    pages = []
    for _ in range(2):
        code, _, err = run(capsys, "report", results["torch"])
        assert code == 0, err
        pages.append((results["torch"] / "report.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    page = Page(pages[0])
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert "<b>evil" not in pages[0]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href"))
    assert not re.search(r"url\((?!#)", pages[0])
    assert page.tags.count("svg") == 3
    result = read_result(results["torch"])
    assert page.headline == f"{Path(result['model']['path']).name} on <b>evil.txt" and result["date"][:10] in page.text
    treatment = result["slices"]["masked"]["treatment"]["random"]
    accuracy = treatment["masked_accuracy"]["value"]
    row = ("random", f"{treatment['tokens']:,}", f"{treatment['documents']:,}", f"{accuracy:.2%}")
    assert re.search(".*?".join(map(re.escape, row)), page.text, re.DOTALL)
    assert all("standard_error" not in metric for metric in result["metrics"].values())  # every token was scored
    assert f"{result['metrics']['masked_cross_entropy']['value']:.4f}" in page.text
    assert result["mask_digest"] in page.text
    assert "unigram entropy, nats per token, to beat" in page.text
    assert f"{result['unigram_entropy']:.4f}" in page.text


def test_results_of_older_versions_have_a_report(capsys, results, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(results["torch"], older)
    record = read_result(older)
    del record["unigram_entropy"], record["date"], record["checksum"]
    for example in [*record["examples"]["worst"], *record["examples"]["best"]]:
        del example["text"]
        for token in example["tokens"]:
            del token["span"]
    write_record(older / "result.json", record)
    code, _, err = run(capsys, "report", older)
    assert code == 0, err
    text = Page((older / "report.html").read_text(encoding="utf-8")).text
    assert "to beat" not in text and "its tokens are joined" in text
    assert run(capsys, "compare", older, results["torch"])[0] == 0


def test_the_command_can_be_pasted(capsys, results, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(results["torch"], folder)
    arguments = ["eval", "a model", "--set", "it's $HOME.txt"]
    for program, expected in (
        ("/bin/mlmkit", ["mlmkit"]),
        ("/x/mlmkit/__main__.py", ["mlmkit"]),
        ("a b.py", ["python", "a b.py"]),
    ):
        edit_record(folder / "result.json", command=[program, *arguments])
        assert run(capsys, "report", folder)[0] == 0
        shown = Page((folder / "report.html").read_text(encoding="utf-8")).text.rpartition("command")[2]
        assert shlex.split(shown) == [*expected, *arguments]


def test_examples_show_the_text_of_the_document(results, texts, checkpoint, tmp_path):
    def check(folder: Path, documents: list[str]) -> list[list[Piece]]:
        found = read_result(folder)["examples"]
        shown = []
        for example in [*found["worst"], *found["best"]]:
            pieces = list(example_pieces(example))
            assert "".join(piece.text for piece in pieces) == example["text"]
            assert example["text"] in documents[example["document"]]
            assert sum(piece.is_target for piece in pieces) == 1
            shown.append(pieces)
        return shown

    check(results["torch"], texts.read_text(encoding="utf-8").splitlines())
    documents = ["A  Name is\tbound, É 日本語 too.", "The value of the name “日本” is Bound."] * 2
    evaluate(checkpoint("roberta"), documents, metrics="pseudo", output=tmp_path / "bytes")
    shown = check(tmp_path / "bytes", documents)
    assert any(piece.text == "日" and piece.log_prob for pieces in shown for piece in pieces)  # three tokens or more


def test_examples_do_not_show_another_text(artifact, tmp_path):
    backend, documents = load(str(artifact("bert"))), ["The name is bound.", "A value is a name."]
    for number, texts in enumerate((documents, ["The Name is bound.", "A value."], [])):
        data = EvalData(
            tokenize(documents, backend.tokenizer), {"set": None, "location": "x"}, lambda texts=texts: texts
        )
        result = run_evaluation(backend, data, Settings(metrics=("pseudo",)), tmp_path / str(number))
        assert {"text" in example for example in result["examples"]["worst"]} == {texts is documents}


def test_examples_are_the_extremes(results):
    examples = read_result(results["onnx"])["examples"]
    tokens = pq.read_table(results["onnx"] / "tokens.parquet").to_pandas()
    tokens = tokens[(tokens.metric == "masked") & (tokens.mask_seed == 0)]
    for name, ascending in (("worst", True), ("best", False)):
        expected = tokens.sort_values("log_prob", ascending=ascending).drop_duplicates("document").head(12)
        assert [item["log_prob"] for item in examples[name]] == pytest.approx(expected.log_prob.tolist())
        assert all(item["tokens"][item["target"]]["log_prob"] == item["log_prob"] for item in examples[name])


def test_pairs_have_a_report_and_a_comparison(capsys, checkpoint, artifact, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "p.toml").write_text(
        'name = "p"\ntask = "pairs"\nlocal = "pairs.jsonl"\n[pairs]\nphenomenon = "linguistics_term"\n'
        '[[reference]]\nmodel = "R<i>ef"\nmetric = "pair_accuracy"\nvalue = 0.5\nsource = "x"\n'
        "phenomena = { agreement = 0.7 }\n"
    )
    for name, model in (("a", checkpoint("bert")), ("b", checkpoint("roberta"))):
        code, out, err = run(capsys, "eval", model, "--set", tmp_path / "p.toml", "--output", tmp_path / name)
        assert code == 0, err
        assert "agreement" in out and "1 ties" in out
    text = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "R&lt;i&gt;ef" in text and "<i>" not in text
    code, out, err = run(capsys, "compare", tmp_path / "a", tmp_path / "b", "--json", "--output", tmp_path / "page")
    assert code == 0, err
    (found,) = json.loads(out)["comparisons"]
    values = [read_result(tmp_path / name)["metrics"]["pair_accuracy"] for name in "ab"]
    difference = found["metrics"]["pair_accuracy"]
    assert difference["difference"] == pytest.approx(values[1]["value"] - values[0]["value"])
    assert found["items"]["groups"]["phenomena"]["agreement"]["pair_accuracy"]["items"] == 3
    alone = found["items"]["groups"]["phenomena"]["order"]["pair_accuracy"]
    assert (alone["items"], alone["low"], alone["high"], alone["p_value"]) == (1, None, None, None)
    assert read_result(tmp_path / "a")["items"]["phenomena"]["order"]["pair_accuracy"]["low"] is None
    assert (tmp_path / "page" / "compare.html").exists()
    # a plain file of pairs needs no declaration
    plain = run_json(capsys, "eval", artifact("bert"), "--set", tmp_path / "pairs.jsonl", "--metric", "pairs")
    assert plain["items"]["items"] == 6
    code, _, err = run(capsys, "eval", artifact("bert"), "--set", tmp_path / "p.toml", "--metric", "masked")
    assert (code, "holds pairs" in err) == (2, True)


# ------------------------------------------------------------------ comparison


def test_a_comparison_is_paired(results):
    comparison = compare([results["torch"], results["onnx"], results["modern"]])
    same, other = comparison["comparisons"]
    assert abs(same["metrics"]["masked_cross_entropy"]["difference"]) < 1e-5
    found = other["metrics"]["masked_cross_entropy"]
    assert found["low"] <= found["difference"] <= found["high"]
    assert 0 < found["p_value"] <= 1
    tables = [pq.read_table(results[name] / "tokens.parquet").to_pandas() for name in ("torch", "modern")]
    masked = [table[table.metric == "masked"] for table in tables]
    change = masked[0].log_prob.astype(float).mean() - masked[1].log_prob.astype(float).mean()
    assert found["difference"] == pytest.approx(change)
    # The interval is that of resampling documents with the same draws for both.
    by_document = [table.groupby("document").log_prob.agg(["sum", "size"]) for table in masked]
    rows = np.random.default_rng(1).integers(len(by_document[0]), size=(2000, len(by_document[0])))
    sums, sizes = ([frame[name].to_numpy()[rows].sum(axis=1) for frame in by_document] for name in ("sum", "size"))
    draws = sums[0] / sizes[0] - sums[1] / sizes[1]
    spread = float(np.std(draws))
    assert found["low"] == pytest.approx(np.quantile(draws, 0.025), abs=0.35 * spread)
    assert found["high"] == pytest.approx(np.quantile(draws, 0.975), abs=0.35 * spread)
    treatment = other["slices"]["masked"]["treatment"]
    assert sum(group["masked_cross_entropy"]["tokens"][0] for group in treatment.values()) == len(masked[0])
    first = [table[table.mask_seed == 0].log_prob.to_numpy() for table in masked]
    assert abs(other["tokens"][0]["difference"]) == pytest.approx(np.abs(first[0] - first[1]).max(), abs=1e-5)
    assert len(other["tokens"]) == 20


def test_a_result_compared_with_itself_differs_in_nothing(results):
    (found,) = compare([results["torch"], results["torch"]])["comparisons"]
    for name, difference in found["metrics"].items():
        bounds = (None, None, None) if name == "expected_calibration_error" else (0, 0, 1)
        assert difference["difference"] == 0
        assert (difference["low"], difference["high"], difference["p_value"]) == bounds


def test_what_cannot_be_compared_is_refused_with_the_reason(results, checkpoint, texts, tmp_path):
    other = ["Another text of some words.", "And another line."] * 3
    evaluate(checkpoint("bert"), other, output=tmp_path / "text")
    evaluate(checkpoint("bert"), texts, mask_seed=[0, 1], output=tmp_path / "masks")
    evaluate(checkpoint("roberta"), texts, mask_seed=[0, 1], output=tmp_path / "tokens")
    evaluate(checkpoint("bert"), texts, metrics="pseudo", output=tmp_path / "pseudo")
    assert compare([results["torch"], tmp_path / "masks"])["comparisons"][0]["metrics"]  # what both measure
    for first, second, message in (
        (results["torch"], "text", "different texts"),
        (results["torch"], "tokens", r"different positions .*tokenizers differ"),
        (tmp_path / "masks", "pseudo", "share nothing"),
    ):
        with pytest.raises(UserError, match=message):
            compare([first, tmp_path / second])


def test_what_is_no_result_is_refused_with_the_reason(capsys, results, tmp_path):
    file = results["torch"] / "result.json"
    refusals = ([tmp_path / "none"], "does not exist"), ([file], "is a file: name the folder"), ([], "two results")
    for others, message in refusals:
        code, _, err = run(capsys, "compare", results["torch"], *others)
        assert (code, message in err) == (2, True)
    folder = Path(shutil.copytree(results["torch"], tmp_path / "changed"))
    whole = read_result(folder)
    for changes, message in (
        ({"files": {**whole["files"], "tokens.parquet": "0"}}, "not that of result.json"),
        ({"format": 1}, "format 1"),
    ):
        edit_record(folder / "result.json", **changes)
        with pytest.raises(UserError, match=message):
            compare([results["torch"], folder])
        assert run(capsys, "report", folder)[0] == 2
    (folder / "result.json").write_text(json.dumps({**whole, "model": {}}))
    flipped = Path(shutil.copytree(results["torch"], tmp_path / "flipped"))
    content = bytearray((flipped / "tokens.parquet").read_bytes())
    content[200:220] = bytes(20)
    (flipped / "tokens.parquet").write_bytes(content)
    for damaged, message in ((folder, "is damaged"), (flipped, "tokens.parquet is missing, damaged")):
        with pytest.raises(UserError, match=message):
            compare([results["torch"], damaged])


def compared_with_another_tokenizer(checkpoint, folder: Path, texts: Path, edit, **options: Any) -> dict[str, Any]:
    """The comparison of bert with a copy whose `tokenizer.json` was edited."""
    copy = Path(shutil.copytree(checkpoint("bert"), folder / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    edit(tokenizer)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, model in (("a", checkpoint("bert")), ("b", copy)):
        evaluate(model, texts, output=folder / name, **options)
    (comparison,) = compare([folder / "a", folder / "b"])["comparisons"]
    return comparison


def test_tokenizers_that_give_the_same_ids_are_compared(checkpoint, texts, tmp_path):
    """A different decoder changes the fingerprint, but neither ids nor masks."""

    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["decoder"]["cleanup"] = not tokenizer["decoder"]["cleanup"]

    comparison = compared_with_another_tokenizer(checkpoint, tmp_path, texts, edit)
    assert comparison["metrics"]["masked_cross_entropy"]["difference"] == 0


def test_tokenizers_with_the_same_counts_and_other_tokens_compare_by_bytes(checkpoint, tmp_path):
    """The digest covers positions and the mask's id, which both share."""

    def edit(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["of"], vocabulary["is"] = vocabulary["is"], vocabulary["of"]

    (tmp_path / "known.txt").write_text("A name is bound.\nThe value of a name.\n")
    found = compared_with_another_tokenizer(checkpoint, tmp_path, tmp_path / "known.txt", edit, metrics="pseudo")
    assert "bits_per_byte" in found["metrics"] and "pseudo_perplexity" not in found["metrics"]
    assert found["slices"] == {} and found["tokens"] == []


def test_other_tokenizers_compare_by_bytes(checkpoint, texts, tmp_path):
    folders = [tmp_path / name for name in ("bert", "roberta")]
    one, two = (
        evaluate(checkpoint(folder.name), texts, metrics="pseudo", output=folder).metrics["bits_per_byte"]["value"]
        for folder in folders
    )
    assert one and two
    (found,) = compare(folders)["comparisons"]
    assert found["metrics"]["bits_per_byte"]["difference"] == pytest.approx(two - one)
    assert "pseudo_perplexity" not in found["metrics"]
    assert found["tokens"] == []


def test_the_comparison_as_lines_and_page(capsys, results, tmp_path):
    code, out, err = run(capsys, "compare", results["torch"], results["modern"], "--output", tmp_path, "--top", 3)
    assert code == 0, err
    lines = out.splitlines()
    (overall,) = (line for line in lines if line.startswith("↓ masked_cross_entropy  "))
    assert re.search(r" [\d,]+ / 32  < 0\.002$", overall)
    by_part = lines.index("↓ masked_cross_entropy by part")
    assert lines[by_part + 1].startswith("    treatment masked  ")
    assert sum(line.startswith("'") for line in lines) == 3
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "&lt; 0.002" in text and "(lower is better)" in text and re.search(r">[\d,]+ / 32<", text)
    assert "<td>masked cross-entropy, nats per token&nbsp;↓</td>" in text and "By token frequency" in text
    assert text.count('class="token target"') == 3 and "The sentences are not shown" not in text
    assert text.count('class="dot"') == text.count('class="zero"') + 2  # a dot per row with a difference, and the key's
    assert "<b>evil" not in text


def test_tokens_that_differ_are_shown_in_their_text(results, texts, checkpoint, tmp_path):
    documents = texts.read_text(encoding="utf-8").splitlines()
    (found,) = compare([results["torch"], results["modern"]])["comparisons"]
    assert found["no_context"] == ""
    (bare,) = compare([results["torch"], results["modern"]], with_texts=False)["comparisons"]
    assert [token["offset"] for token in bare["tokens"]] == [token["offset"] for token in found["tokens"]]
    assert not any("text" in token for token in bare["tokens"])
    for token in found["tokens"]:
        begin, end = token["span"]
        assert token["text"][begin:end].strip().lower() == token["token"].lower()
        at = documents[token["document"]].index(token["text"])
        assert token["cut"] == [at > 0, at + len(token["text"]) < len(documents[token["document"]])]
    path = tmp_path / "text.txt"
    path.write_text("The name is bound.\nA value.\n")
    evaluate(checkpoint("bert"), path, metrics="pseudo", output=tmp_path / "file")
    evaluate(checkpoint("bert"), ["The name is bound."], metrics="pseudo", output=tmp_path / "list")
    path.write_text("The name is unbound.\nA value.\n")
    for folder, reason in (("file", "has changed since"), ("list", "not in a local file")):
        (found,) = compare([tmp_path / folder] * 2)["comparisons"]
        assert reason in found["no_context"] and "text" not in found["tokens"][0]


@pytest.mark.parametrize(
    ("columns", "dropped"), [(60, ("p", "n", "A", "95 %")), (80, ("p", "n")), (100, ("p",)), (120, ())]
)
def test_the_comparison_fits_a_terminal(capsys, monkeypatch, results, columns, dropped):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(capsys, "compare", results["torch"], results["modern"], "--top", 3)
    table = out[out.index("metric ") :].partition("tokens that differ")[0].splitlines()
    assert max(map(len, table)) <= columns
    titles = ["metric", "A", "B", "B - A", "95 %", "n", "p"]
    assert re.split(" {2,}", table[0]) == [title for title in titles if title not in dropped]


def test_only_a_metric_with_a_better_direction_has_an_arrow(capsys):
    row = {"a": 0.1, "b": 0.3, "difference": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.1, "items": 9}
    _print_differences([("x_spearman", {**row, "better": "neither"}), ("x", {**row, "better": "higher"})])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines if "+0.2000" in line] == ["  x", "↑ x"]


def test_what_agrees_is_one_line(capsys, results, tmp_path):
    """Engine and checkpoint differ in their last bits alone."""
    code, out, err = run(capsys, "compare", results["torch"], results["onnx"], "--output", tmp_path)
    assert code == 0, err
    *notes, line, page = out.splitlines()
    assert re.fullmatch(r"A and B agree to \de-\d\d in (\d+) of \1 rows", line)
    assert all(note.startswith(("A: ", "B: ", "note: ")) for note in notes) and page.startswith("page: ")
    assert line in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "agree exactly" in run(capsys, "compare", results["torch"], results["torch"])[1]
