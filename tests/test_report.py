"""The report and the comparison, from stored results."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import edit_record
from test_cli import run
from test_pairs import PAIRS

from mlmkit.errors import UserError
from mlmkit.eval.api import evaluate
from mlmkit.eval.compare import compare

EVIL = "<script>alert('x')</script> & \"quotes\" $\\frac{1}{2}$ </style> {{ 7 * 7 }} <img src=http://evil.example/x>"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import PORTUGUESE, paragraphs

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
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_safe_page(capsys, results):
    code, _, err = run(capsys, "report", results["torch"])
    assert code == 0, err
    text = (results["torch"] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert "<b>evil" not in text
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value is not None and value.startswith("#"), value
    assert not re.search(r"url\((?!#)", text)
    assert page.tags.count("svg") == 8
    shown = "".join(page.text)
    result = json.loads((results["torch"] / "result.json").read_text())
    assert f"{result['metrics']['masked_cross_entropy']['value']:.4f}" in shown
    assert result["mask_digest"] in shown
    before = text
    assert run(capsys, "report", results["torch"])[0] == 0
    assert (results["torch"] / "report.html").read_text(encoding="utf-8") == before


def test_examples_are_the_extremes(results):
    result = json.loads((results["onnx"] / "result.json").read_text())
    tokens = pq.read_table(results["onnx"] / "tokens.parquet").to_pandas()
    tokens = tokens[(tokens.metric == "masked") & (tokens.mask_seed == 0)]
    worst = tokens.sort_values("log_prob").drop_duplicates("document").head(12)
    assert [item["log_prob"] for item in result["examples"]["worst"]] == pytest.approx(worst.log_prob.tolist())
    best = tokens.sort_values("log_prob", ascending=False).drop_duplicates("document").head(12)
    assert [item["log_prob"] for item in result["examples"]["best"]] == pytest.approx(best.log_prob.tolist())
    for item in result["examples"]["worst"]:
        assert item["tokens"][item["target"]]["log_prob"] == item["log_prob"]


def test_pairs_have_a_report_and_a_comparison(capsys, checkpoint, artifact, tmp_path):
    path = tmp_path / "pairs.jsonl"
    keys = ("sentence_good", "sentence_bad", "linguistics_term", "UID")
    path.write_text("".join(json.dumps(dict(zip(keys, pair, strict=True))) + "\n" for pair in PAIRS))
    (tmp_path / "p.toml").write_text(
        'name = "p"\ntask = "pairs"\nlocal = "pairs.jsonl"\n[pairs]\nphenomenon = "linguistics_term"\n'
        '[[reference]]\nmodel = "R<i>ef"\nmetric = "pair_accuracy"\nvalue = 0.5\nsource = "x"\n'
        "phenomena = { agreement = 0.7 }\n"
    )
    for name, model in (("a", checkpoint("bert")), ("b", checkpoint("roberta"))):
        arguments = ["eval", model, "--set", tmp_path / "p.toml", "--output", tmp_path / name]
        code, out, err = run(capsys, *arguments)
        assert code == 0, err
        assert "agreement" in out and "1 ties" in out
    text = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "R&lt;i&gt;ef" in text and "<i>" not in text
    code, out, err = run(capsys, "compare", tmp_path / "a", tmp_path / "b", "--json", "--output", tmp_path / "page")
    assert code == 0, err
    (found,) = json.loads(out)["comparisons"]
    values = [json.loads((tmp_path / name / "result.json").read_text())["metrics"]["pair_accuracy"] for name in "ab"]
    difference = found["metrics"]["pair_accuracy"]
    assert difference["difference"] == pytest.approx(values[1]["value"] - values[0]["value"])
    assert found["pairs"]["phenomena"]["agreement"]["pair_accuracy"]["pairs"] == 3
    alone = found["pairs"]["phenomena"]["order"]["pair_accuracy"]
    assert (alone["pairs"], alone["low"], alone["high"], alone["p_value"]) == (1, None, None, None)
    assert (
        json.loads((tmp_path / "a" / "result.json").read_text())["pairs"]["phenomena"]["order"]["pair_accuracy"]["low"]
        is None
    )
    assert (tmp_path / "page" / "compare.html").exists()
    # a plain file of pairs needs no declaration
    code, out, err = run(capsys, "eval", artifact("bert"), "--set", path, "--metric", "pairs", "--json")
    assert code == 0, err
    assert json.loads(out)["pairs"]["pairs"] == 6
    code, _, err = run(capsys, "eval", artifact("bert"), "--set", tmp_path / "p.toml", "--metric", "masked")
    assert (code, "holds pairs" in err) == (2, True)


# ------------------------------------------------------------------ comparison


def test_a_comparison_is_paired(results):
    comparison = compare([results["torch"], results["onnx"], results["modern"]])
    same, other = comparison["comparisons"]
    assert abs(same["metrics"]["masked_cross_entropy"]["difference"]) < 1e-5
    found = other["metrics"]["masked_cross_entropy"]
    tables = [pq.read_table(results[name] / "tokens.parquet").to_pandas() for name in ("torch", "modern")]
    masked = [table[table.metric == "masked"] for table in tables]
    change = masked[0].log_prob.astype(float).mean() - masked[1].log_prob.astype(float).mean()
    assert found["difference"] == pytest.approx(change)
    # The interval is that of resampling documents with the same draws for both.
    by_document = [table.groupby("document").log_prob.agg(["sum", "size"]) for table in masked]
    generator = np.random.default_rng(1)
    documents, draws = len(by_document[0]), []
    for _ in range(2000):
        rows = generator.integers(documents, size=documents)
        means = [-frame["sum"].to_numpy()[rows].sum() / frame["size"].to_numpy()[rows].sum() for frame in by_document]
        draws.append(means[1] - means[0])
    spread = float(np.std(draws))
    assert found["low"] == pytest.approx(np.quantile(draws, 0.025), abs=0.35 * spread)
    assert found["high"] == pytest.approx(np.quantile(draws, 0.975), abs=0.35 * spread)
    assert found["low"] <= found["difference"] <= found["high"]
    assert 0 < found["p_value"] <= 1
    treatment = other["slices"]["masked"]["treatment"]
    assert sum(group["masked_cross_entropy"]["tokens"][0] for group in treatment.values()) == len(masked[0])
    largest = other["tokens"][0]
    first = [table[table.mask_seed == 0] for table in masked]
    assert abs(largest["difference"]) == pytest.approx(
        np.abs(first[0].log_prob.to_numpy() - first[1].log_prob.to_numpy()).max(), abs=1e-5
    )
    assert len(other["tokens"]) == 20


def test_a_result_compared_with_itself_differs_in_nothing(results):
    (found,) = compare([results["torch"], results["torch"]])["comparisons"]
    for name, difference in found["metrics"].items():
        bounds = (None, None, None) if name == "expected_calibration_error" else (0, 0, 1)
        assert difference["difference"] == 0
        assert (difference["low"], difference["high"], difference["p_value"]) == bounds


def test_what_cannot_be_compared_is_refused_with_the_reason(capsys, results, checkpoint, texts, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Another text of some words.\nAnd another line.\n" * 3)
    evaluate(str(checkpoint("bert")), other, output=tmp_path / "text")
    evaluate(str(checkpoint("bert")), texts, mask_seed=[0, 1], recipe=None, metrics="masked", output=tmp_path / "masks")
    with pytest.raises(UserError, match="different texts"):
        compare([results["torch"], tmp_path / "text"])
    assert compare([results["torch"], tmp_path / "masks"])["comparisons"][0]["metrics"]  # what both measure
    evaluate(str(checkpoint("roberta")), texts, mask_seed=[0, 1], metrics=["masked"], output=tmp_path / "tokens")
    with pytest.raises(UserError, match=r"different positions .*tokenizers differ"):
        compare([results["torch"], tmp_path / "tokens"])
    evaluate(str(checkpoint("bert")), texts, metrics="pseudo", output=tmp_path / "pseudo")
    with pytest.raises(UserError, match="share nothing"):
        compare([tmp_path / "masks", tmp_path / "pseudo"])
    code, _, err = run(capsys, "compare", results["torch"], tmp_path / "none")
    assert (code, "does not exist" in err) == (2, True)
    code, _, err = run(capsys, "compare", results["torch"], results["torch"] / "result.json")
    assert (code, "is a file: name the folder" in err) == (2, True)
    code, _, err = run(capsys, "compare", results["torch"])
    assert (code, "two results" in err) == (2, True)
    path = tmp_path / "masks" / "result.json"
    whole = json.loads(path.read_text())
    for changes, message in (
        ({"files": {**whole["files"], "tokens.parquet": "0"}}, "not that of result.json"),
        ({"format": 1}, "format 1"),
    ):
        edit_record(path, **changes)
        with pytest.raises(UserError, match=message):
            compare([results["torch"], tmp_path / "masks"])
        assert run(capsys, "report", tmp_path / "masks")[0] == 2
    path.write_text(json.dumps({**whole, "model": {}}))
    with pytest.raises(UserError, match="is damaged"):
        compare([results["torch"], tmp_path / "masks"])


def test_flipped_bytes_are_noticed(results, tmp_path):
    folder = tmp_path / "flipped"
    shutil.copytree(results["torch"], folder)
    content = bytearray((folder / "tokens.parquet").read_bytes())
    content[200:220] = bytes(20)
    (folder / "tokens.parquet").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        compare([results["torch"], folder])


def test_tokenizers_that_read_alike_are_compared(checkpoint, texts, tmp_path):
    """Another decoder is another fingerprint, but the same ids and masks."""
    copy = Path(shutil.copytree(checkpoint("bert"), tmp_path / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["decoder"]["cleanup"] = not tokenizer["decoder"]["cleanup"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, model in (("a", checkpoint("bert")), ("b", copy)):
        evaluate(str(model), texts, output=tmp_path / name)
    (found,) = compare([tmp_path / "a", tmp_path / "b"])["comparisons"]
    assert found["metrics"]["masked_cross_entropy"]["difference"] == 0


def test_other_tokenizers_compare_by_bytes(checkpoint, texts, tmp_path):
    for name in ("bert", "roberta"):
        evaluate(str(checkpoint(name)), texts, metrics="pseudo", output=tmp_path / name)
    (found,) = compare([tmp_path / "bert", tmp_path / "roberta"])["comparisons"]
    values = [
        json.loads((tmp_path / name / "result.json").read_text())["metrics"]["bits_per_byte"]["value"]
        for name in ("bert", "roberta")
    ]
    assert found["metrics"]["bits_per_byte"]["difference"] == pytest.approx(values[1] - values[0])
    assert "pseudo_perplexity" not in found["metrics"]
    assert found["tokens"] == []


def test_tokenizers_with_the_same_counts_and_other_tokens_compare_by_bytes_too(checkpoint, texts, tmp_path):
    """The digest covers positions and the mask's id, which they share."""
    copy = Path(shutil.copytree(checkpoint("bert"), tmp_path / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["of"], vocabulary["is"] = vocabulary["is"], vocabulary["of"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "known.txt").write_text("A name is bound.\nThe value of a name.\n")
    for name, model in (("a", checkpoint("bert")), ("b", copy)):
        evaluate(model, tmp_path / "known.txt", metrics="pseudo", output=tmp_path / name)
    (found,) = compare([tmp_path / "a", tmp_path / "b"])["comparisons"]
    assert "bits_per_byte" in found["metrics"] and "pseudo_perplexity" not in found["metrics"]
    assert found["slices"] == {} and found["tokens"] == []


def test_the_comparison_as_lines_and_page(capsys, results, tmp_path):
    code, out, err = run(capsys, "compare", results["torch"], results["modern"], "--output", tmp_path, "--top", 3)
    assert code == 0, err
    lines = out.splitlines()
    (overall,) = (line for line in lines if line.startswith("masked_cross_entropy  "))
    assert overall.split()[1] == "lower" and re.search(r" < 0\.002   [\d,]+ / 32$", overall)
    assert sum(line.startswith("  '") for line in lines) == 3
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "&lt; 0.002" in text and "(lower is better)" in text and re.search(r"\ball \(n: [\d,]+ / 32\)", text)
    assert "<b>evil" not in text
    assert "svg" in Page(text).tags


def test_what_agrees_is_one_line(capsys, results, tmp_path):
    """Engine and checkpoint differ in their last bits alone."""
    code, out, err = run(capsys, "compare", results["torch"], results["onnx"], "--output", tmp_path)
    assert code == 0, err
    *notes, line, page = out.splitlines()
    assert re.fullmatch(r"A and B agree to \de-\d\d in (\d+) of \1 rows", line)
    assert all(note.startswith(("A: ", "B: ", "note: ")) for note in notes) and page.startswith("page: ")
    assert line in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "agree exactly" in run(capsys, "compare", results["torch"], results["torch"])[1]
