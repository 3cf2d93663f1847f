"""Minimal pairs and declared sets."""

import csv
import difflib
import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import paragraphs
from test_eval import Dense
from test_export import with_scores

from mlmkit.backends import Scored, load
from mlmkit.errors import UserError
from mlmkit.eval.api import evaluate
from mlmkit.eval.items import Item, Option, PairColumns, keep_items, read_items
from mlmkit.eval.score_texts import pseudo_log_likelihood
from mlmkit.eval.set_files import set_rows
from mlmkit.eval.sets import Request, built_in_sets, find_set, read_set

PAIRS = [
    ("The keys are on the table.", "The keys is on the table.", "agreement", "number"),
    ("The statement is executed.", "The statement are executed.", "agreement", "number"),
    ("A name is bound here.", "A name bound is here.", "order", "participle"),
    ("They bind themselves.", "They bind itself.", "binding", "anaphor"),
    ("The same words.", "The same words.", "binding", "none"),
    ("Every expression has a value.", "Every expression have a value.", "agreement", "verb"),
]


def pair(good: str, bad: str, phenomenon: str = "", paradigm: str = "", id: str = "") -> Item:
    """A pair of whole sentences."""
    return Item((Option.of("", good), Option.of("", bad)), 0, phenomenon, paradigm, id)


def read_pairs(location: str, columns: PairColumns) -> list[Item]:
    return read_items(set_rows(location), columns, location)


def write_pairs(path: Path, pairs: Sequence[tuple[str, ...]] = PAIRS) -> None:
    keys = ("sentence_good", "sentence_bad", "linguistics_term", "UID")
    path.write_text("".join(json.dumps(dict(zip(keys, pair, strict=False))) + "\n" for pair in pairs))


@pytest.fixture
def pair_set(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ntask = "pairs"\nlocal = "pairs.jsonl"\n'
        '[pairs]\nphenomenon = "linguistics_term"\nparadigm = "UID"\n'
    )
    return tmp_path / "mine.toml"


@pytest.mark.parametrize("variant", ["original", "within-word"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pairs_are_counted_as_defined(kind, variant, checkpoint, pair_set, tmp_path):
    """Each sentence scored alone with the plain model; strictly greater is right; the twins tie."""
    dense = Dense(checkpoint(kind))
    scores = [dense.pseudo(text, variant) for pair in PAIRS for text in pair[:2]]
    sums, means = [sum(each) for each in scores], [sum(each) / len(each) for each in scores]
    evaluation = evaluate(str(checkpoint(kind)), pair_set, variant=variant, output=tmp_path / "result")
    right, right_per_token = (
        [each[2 * i] > each[2 * i + 1] and pair[0] != pair[1] for i, pair in enumerate(PAIRS)] for each in (sums, means)
    )
    assert evaluation.metrics["pair_accuracy"]["value"] == pytest.approx(np.mean(right))
    assert evaluation.metrics["pair_accuracy_per_token"]["value"] == pytest.approx(np.mean(right_per_token))
    assert "items" in evaluation.result
    pairs = evaluation.result["items"]
    assert (pairs["items"], pairs["ties"]) == (6, 1)
    agreement = pairs["phenomena"]["agreement"]
    assert agreement["items"] == 3
    assert agreement["pair_accuracy"]["value"] == pytest.approx(np.mean([right[0], right[1], right[5]]))
    by_paradigm = [np.mean(right[:2]), right[2], right[3], right[4], right[5]]
    assert evaluation.metrics["pair_accuracy_macro"]["value"] == pytest.approx(np.mean(by_paradigm))
    good = -sum(sums[::2]) / sum(len(dense.ids(pair[0])) for pair in PAIRS)
    assert math.log(evaluation.metrics["pseudo_perplexity_good"]["value"] or 0) == pytest.approx(good, abs=1e-4)
    assert evaluation.documents["is_right"].to_pylist() == [True, False] * 6


def test_a_constant_model_gets_no_pair_right(checkpoint, pair_set):
    """Ties count as wrong: some pipelines give such a model full marks."""

    def with_equal_scores(scored: Scored) -> Scored:
        return scored._replace(log_prob=np.full(len(scored.rank), -0.0, np.float32))

    constant = with_scores(load(str(checkpoint("bert"))), with_equal_scores)
    evaluation = evaluate(constant, find_set(str(pair_set)))
    assert evaluation.metrics["pair_accuracy"]["value"] == 0
    assert "items" in evaluation.result
    assert evaluation.result["items"]["ties"] == 6


def test_crows_pairs_masks_only_what_both_share(checkpoint, tmp_path):
    """Against the published script's own logic: difflib over ids, one shared token masked at a time."""
    path = tmp_path / "crows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "bias_type"])
        writer.writerows([[i, *pair[:2], pair[2]] for i, pair in enumerate(PAIRS)])
    columns = PairColumns(first="sent_more", second="sent_less", phenomenon="bias_type", scoring="shared")
    dense, model = Dense(checkpoint("bert")), load(str(checkpoint("bert")))
    declared = tmp_path / "crows.toml"
    declared.write_text(
        'name = "crows"\ntask = "pairs"\nlocal = "crows.csv"\n[pairs]\nfirst = "sent_more"\nsecond = "sent_less"\n'
        'phenomenon = "bias_type"\nscoring = "shared"\n'
    )
    evaluation = evaluate(model, declared)
    assert read_pairs(str(path), columns)[0] == pair(PAIRS[0][0], PAIRS[0][1], "agreement")
    tokens = evaluation.tokens.to_pylist()
    for i, given in enumerate(PAIRS):
        ids = [dense.ids(text) for text in given[:2]]
        framed = [[dense.tokenizer.cls_token_id, *side, dense.tokenizer.sep_token_id] for side in ids]
        blocks = difflib.SequenceMatcher(None, framed[0], framed[1]).get_matching_blocks()
        for side in (0, 1):
            shared = [block[side] + k - 1 for block in blocks for k in range(block.size)]
            shared = [offset for offset in shared if 0 <= offset < len(ids[side])]
            rows = [row for row in tokens if row["document"] == 2 * i + side]
            assert [row["offset"] for row in rows] == shared
            for row in rows:
                masked = list(ids[side])
                masked[row["offset"]] = dense.tokenizer.mask_token_id
                expected = dense.log_probs(masked)[row["offset"], ids[side][row["offset"]]].item()
                assert row["log_prob"] == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------ reading


def test_pairs_from_every_kind_of_file(tmp_path):
    rows = [{"good": f"good {i}", "bad": f"bad {i}", "group": "g", "n": {"id": i}} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("data/a.jsonl", lines)
        archive.writestr("__MACOSX/data/._a.jsonl", b"\xff\xfe")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/train.jsonl").write_text(lines)
    expected = [pair(f"good {i}", f"bad {i}", "g", "", str(i)) for i in range(4)]
    columns = PairColumns(good="good", bad="bad", phenomenon="group", id="missing|n.id")
    locations = [str(tmp_path / name) for name in ("a.jsonl", "a.parquet", "a.zip")]
    for location in (*locations, f"hub:{tmp_path / 'dataset'}@train"):
        assert read_pairs(location, columns) == expected
    (tmp_path / "a.tsv").write_text('good\tbad\nx y\tz "w\n')
    assert read_pairs(str(tmp_path / "a.tsv"), PairColumns(good="good", bad="bad"))[0].options[0].text == "x y"


def test_labelled_sentences_as_stereoset_has_them(tmp_path):
    row = {"bias": "b", "sentences": {"sentence": ["anti", "stereo", "other"], "gold_label": [0, 1, 2]}}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    columns = PairColumns(
        good="sentences.sentence", bad="sentences.sentence", phenomenon="bias", label="sentences.gold_label"
    )
    assert read_pairs(str(tmp_path / "s.jsonl"), columns) == [pair("stereo", "anti", "b")]


def test_unusable_pairs_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, message in (
        ('{"sentence_good": "a"}\n', r"line 1 has no field 'sentence_bad' \(it has sentence_good, file\)"),
        ('{"sentence_good": 1, "sentence_bad": "b"}\n', "holds int, not text"),
        ('{"sentence_good": "a \\ud800", "sentence_bad": "b"}\n', "surrogate"),
        ('{"a": "b"}\n', "no field 'sentence_good' .it has a, file.: name the columns in a set"),
        ("[1]\n", "not a JSON object"),
        ("{\n", "not JSON"),
        ("", "no items"),
        ('{"sentence_good": " ", "sentence_bad": "b"}\n', "no items"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_pairs(str(path), PairColumns())
    (tmp_path / "a.csv").write_text("sentence_good,sentence_bad\nThe keys, and the door, are.,The keys, and is.\n")
    with pytest.raises(UserError, match="more fields than the header"):
        read_pairs(str(tmp_path / "a.csv"), PairColumns())
    for content in ('{"s": "ab", "l": [1, 0]}', '{"s": ["a"], "l": [1, 0]}', '{"s": ["a", "b"], "l": 1}'):
        path.write_text(content)
        with pytest.raises(UserError, match="not lists of the same length"):
            read_pairs(str(path), PairColumns(good="s", bad="s", label="l"))
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError, match="read from"):
        read_pairs(str(tmp_path / "a.txt"), PairColumns())


def _zipped(path: Path, kind: int) -> bytearray:
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a.JSONL", "".join(f'{{"sentence_good": "{i}", "sentence_bad": "b"}}\n' for i in range(300)))
    assert len(read_pairs(str(path), PairColumns())) == 300
    return bytearray(path.read_bytes())


def _in_both_headers(content: bytearray, offset: int, value: int) -> None:
    """Set a byte of the first file's local header, and of its entry in the directory."""
    content[content.index(b"PK\x03\x04") + offset] = value
    content[content.index(b"PK\x01\x02") + offset + 2] = value


def test_an_archive_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.zip"
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    damaged = {kind: _zipped(path, kind) for kind in kinds}
    for content in damaged.values():
        content[80:120] = b"\xff" * 40
    encrypted, deflate64 = _zipped(path, zipfile.ZIP_DEFLATED), _zipped(path, zipfile.ZIP_DEFLATED)
    _in_both_headers(encrypted, 6, 1)
    _in_both_headers(deflate64, 8, 9)
    causes = (*((content, ".") for content in damaged.values()), (b"no archive", "not a zip"))
    for content, cause in (*causes, (encrypted, "encrypted"), (deflate64, "compression method")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.zip: unpack it yourself .* cannot be read here: .*{cause}"):
            read_pairs(str(path), PairColumns())


def test_keeping_a_subset(tmp_path):
    pairs = [pair("a", "b", paradigm="p", id=str(i)) for i in range(5)]
    (tmp_path / "keep.tsv").write_text("file\tUID\tn\tpairIDs\np\tp\t2\t1,3\n")
    assert [item.id for item in keep_items(pairs, "keep.tsv", set_rows(str(tmp_path / "keep.tsv")))] == ["1", "3"]
    (tmp_path / "keep.tsv").write_text("file\tUID\tn\tpairIDs\np\tp\t2\t1,9\n")
    with pytest.raises(UserError, match="lists 2 pairs, of which 1"):
        keep_items(pairs, "keep.tsv", set_rows(str(tmp_path / "keep.tsv")))


# ------------------------------------------------------------------ declared sets

TEXT_SET = 'task = "text"\nlocal = "a"\n'


def test_every_declared_set_can_be_read_and_says_what_it_is():
    sets = {item.name: item for item in built_in_sets()}
    wanted = {"wikitext-2", "wikitext-103", "penn-treebank", "lambada", "c4", "blimp", "blimp-filtered", "crows-pairs"}
    wanted |= {"stereoset", "multiblimp", "ud-pt-bosque"}
    assert wanted <= sets.keys()
    assert sum(item.language == "pt" and item.task == "text" for item in sets.values()) >= 3
    for item in sets.values():
        assert item.description and item.licence and item.citation and item.homepage, item.name
        for reference in item.reference:
            assert reference.source, item.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('name = "x"\ntask = "text"\n', "hub or local"),
        ('name = "x"\ntask = "poem"\nlocal = "a"\n', "no task 'poem'"),
        ('name = "x"\ntask = "pairs"\nlocal = "a"\n[pairs]\nscoring = "half"\n', "no scoring 'half'"),
        ("name = \n", "TOML"),
        (f"name = {'[' * 5000}{']' * 5000}\n", "not valid TOML"),
        (TEXT_SET, "name is missing"),
        (f'name = "../x"\n{TEXT_SET}', "may only have letters"),
        (f"name = 3\n{TEXT_SET}", "name must be text"),
        (f'name = "x"\n{TEXT_SET}locale = 1\n', "unknown setting .*locale: did you mean .*local"),
        (f'name = "x"\n{TEXT_SET}[text]\nstrip = "yes"\n', "must be true or false"),
        (f'name = "x"\n{TEXT_SET}reference = 3\n', "reference must be a table"),
        (f'name = "x"\n{TEXT_SET}[[reference]]\nvalue = nan\n', "must be a number"),
        (f'name = "x"\n{TEXT_SET}[[reference]]\nphenomena = {{a = "z"}}\n', "a must be a number"),
    ],
)
def test_mistakes_in_a_declaration_are_named(content, message, tmp_path):
    (tmp_path / "x.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_set(tmp_path / "x.toml")


def test_a_set_that_is_not_known_is_named():
    with pytest.raises(UserError, match="did you mean wikitext-2"):
        find_set("wikitex-2")
    with pytest.raises(UserError, match="the sets are"):
        find_set("xyz")


def test_a_set_with_strip_is_the_same_from_a_file_and_from_rows(checkpoint, tmp_path):
    """WikiText's lines have a blank at either end; the hub's rows an LF besides."""
    (tmp_path / "a.txt").write_text(" = Title = \n \n one two \n")
    pq.write_table(pa.table({"text": [" = Title = \n", "", " one two \n"]}), tmp_path / "a.parquet")
    model, results = load(str(checkpoint("bert"))), []
    for name in ("a.txt", "a.parquet"):
        path = tmp_path / f"{name}.toml"
        path.write_text(f'name = "a"\ntask = "text"\nlocal = "{name}"\n[text]\nstrip = true\n')
        results.append(evaluate(model, path, recipe=None, metrics="pseudo").result)
    assert results[0]["mask_digest"] == results[1]["mask_digest"]
    assert results[0]["corpus"]["empty_texts"] == results[1]["corpus"]["empty_texts"] == 1


DATA = Path(os.environ.get("MLMKIT_DATA", "missing"))


@pytest.mark.skipif(not (DATA / "blimp" / "BLiMP.zip").exists(), reason="needs MLMKIT_DATA with blimp/BLiMP.zip")
def test_blimp_and_its_filter_are_whole():
    for name, size in (("blimp", 67000), ("blimp-filtered", 59875)):
        items = find_set(name, DATA).items()
        assert len(items) == size
        assert len({item.paradigm for item in items}) == 67
        assert len({(item.paradigm, item.id) for item in items}) == size


@pytest.mark.skipif(not (DATA / "crows_pairs").exists(), reason="needs MLMKIT_DATA with crows_pairs")
def test_local_sets_are_evaluated(checkpoint, monkeypatch):
    """CrowS-Pairs is read as a whole, and one pair in twenty is evaluated."""
    model, request = load(str(checkpoint("bert"))), find_set("crows-pairs", DATA)
    items = request.items()
    assert (len(items), len({item.phenomenon for item in items})) == (1508, 9)
    monkeypatch.setattr(Request, "items", lambda self: items[::20])
    evaluation = evaluate(model, request)
    assert "items" in evaluation.result
    pairs = evaluation.result["items"]
    assert (pairs["items"], set(pairs["phenomena"])) == (76, {item.phenomenon for item in items[::20]})
    bosque = evaluate(model, find_set("ud-pt-bosque", DATA))
    assert bosque.result["corpus"]["documents"] == 1167
    assert (bosque.result["set"] or {})["name"] == "ud-pt-bosque"


def test_texts_from_python(checkpoint):
    model = load(str(checkpoint("bert")))
    evaluation = evaluate(model, ["The statement.", "", "A name is bound."], metrics=["masked", "pseudo"])
    assert evaluation.documents["document"].to_pylist() == [0, 1, 2]
    assert evaluation.result["corpus"]["documents_without_tokens"] == 1
    assert 1 not in evaluation.tokens["document"].to_pylist()
    assert evaluation.tokens.to_pandas()["log_prob"].max() <= 0
    scores = pseudo_log_likelihood(model, (text for text in ("The statement.", "A name is bound.")))
    total = sum(score.pseudo_log_likelihood or 0 for score in scores)
    assert evaluation.metrics["pseudo_log_likelihood"]["value"] == pytest.approx(total, abs=1e-4)
    assert evaluate(model, paragraphs()[:5], mask_seed=np.arange(2)).result["masking"]["seeds"] == [0, 1]
    for text in ("a \ud800", None):
        with pytest.raises(UserError, match="text 1 holds"):
            evaluate(model, ["one", text])  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError, match="text 0 holds"):
            pseudo_log_likelihood(model, [text])  # pyright: ignore[reportArgumentType]


def test_a_pair_with_an_empty_sentence_is_left_out_and_counted(checkpoint, tmp_path):
    write_pairs(tmp_path / "a.jsonl", [(good, "The words.") for good in ("A word.", " ", "")])
    result = evaluate(str(checkpoint("bert")), find_set(str(tmp_path / "a.jsonl"), pairs=True)).result
    assert "items" in result
    assert result["items"]["items"] == 1
    assert result["corpus"]["empty_texts"] == 2


def test_a_file_of_pairs_from_python(checkpoint, tmp_path):
    model, path = load(str(checkpoint("bert"))), tmp_path / "pairs.tsv"
    path.write_text("sentence_good\tsentence_bad\n" + "".join(f"{good}\t{bad}\n" for good, bad, *_ in PAIRS))
    evaluation = evaluate(model, path, metrics=["pairs"])
    assert evaluation.result.get("items", {})["items"] == len(PAIRS)
    assert evaluation.metrics == evaluate(model, find_set(str(path), pairs=True)).metrics
    with pytest.raises(UserError, match="these are pairs, which --metric pairs measures"):
        evaluate(model, path)
    with pytest.raises(UserError, match="for a file or set of pairs, and this is text"):
        evaluate(model, ["The statement."], metrics="pairs")
