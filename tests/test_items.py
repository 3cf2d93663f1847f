"""Items in a context, choices, cloze targets, and correlations with human numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run, run_json
from test_eval import Dense

from mlmkit.backends import load
from mlmkit.errors import UserError
from mlmkit.eval.api import Evaluation, evaluate
from mlmkit.eval.item_metrics import RIGHT, TIE, ItemScores, accuracy_columns
from mlmkit.eval.items import ChoiceColumns, ClozeColumns, Item, ItemColumns, PairColumns
from mlmkit.eval.sets import read_set

WORDS = ("name", "statement", "expression", "function", "module", "value", "keyword", "object")


def declare(folder: Path, rows: list[dict[str, Any]], declaration: str) -> Path:
    """A set of these rows; `declaration` begins with its task."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.toml").write_text(f'name = "mine"\nlocal = "rows.jsonl"\n{declaration}')
    return folder / "mine.toml"


def scored(dense: Dense, text: str, begin: int, end: int, variant: str = "original") -> list[float]:
    """Log-probabilities of the tokens that overlap the characters from `begin` up to `end`, with the plain model."""
    encoding = dense.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoding["input_ids"], encoding["offset_mapping"]
    targets = [i for i, (a, b) in enumerate(spans) if b > begin and a < end]
    values = []
    for i in targets:
        masked = {"original": [i], "together": targets, "left-to-right": [j for j in targets if j >= i]}[variant]
        shown = [dense.tokenizer.mask_token_id if j in masked else id for j, id in enumerate(ids)]
        values.append(dense.log_probs(shown)[i, ids[i]].item())
    return values


def by_option(evaluation: Evaluation) -> dict[tuple[int, int], list[float]]:
    """The stored log-probabilities of each item and option."""
    keys = [(row["item"], row["option"]) for row in evaluation.documents.to_pylist()]
    found: dict[tuple[int, int], list[float]] = {key: [] for key in keys}
    for row in evaluation.tokens.to_pylist():
        found[keys[row["document"]]].append(row["log_prob"])
    return found


# ------------------------------------------------------------------ scores, against the plain model


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_only_the_continuation_is_scored_in_its_context(kind, checkpoint, tmp_path):
    """As in BabyLM's pipeline: the tokens that reach into the continuation, each masked alone in the whole text."""
    rows = [
        {
            "c1": f"The {word} is bound.",
            "c2": f"No {word} is bound.",
            "good": f"It has a {word}.",
            "bad": "It has none.",
        }
        for word in WORDS
    ]
    columns = '[pairs]\ngood = "good"\nbad = "bad"\ncontext = "c1"\nbad_context = "c2"\n'
    evaluation = evaluate(str(checkpoint(kind)), declare(tmp_path, rows, f'task = "pairs"\n{columns}'))
    dense, right = Dense(checkpoint(kind)), []
    for item, row in enumerate(rows):
        sums = []
        for option, (context, side) in enumerate([("c1", "good"), ("c2", "bad")]):
            text = f"{row[context]} {row[side]}"
            expected = scored(dense, text, len(row[context]), len(text))
            assert by_option(evaluation)[item, option] == pytest.approx(expected, abs=1e-4)
            sums.append(sum(expected))
        right.append(sums[0] > sums[1])
    assert evaluation.metrics["pair_accuracy"]["value"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("normalisation", ["none", "tokens", "characters"])
def test_choices_are_ranked_by_the_declared_score(normalisation, checkpoint, tmp_path):
    rows = [
        {
            "question": f"What is a {word}?",
            "options": ["It is bound.", f"It is a {word} of the language.", "No."],
            "a": i % 3,
        }
        for i, word in enumerate(WORDS)
    ]
    columns = f'[choices]\nchoices = "options"\nlabel = "a"\ncontext = "question"\nnormalisation = "{normalisation}"\n'
    model = checkpoint("bert")
    evaluation = evaluate(str(model), declare(tmp_path, rows, f'task = "choices"\n{columns}'))
    dense, right = Dense(model), 0
    for item, row in enumerate(rows):
        scores = []
        for option, choice in enumerate(row["options"]):
            text = f"{row['question']} {choice}"
            values = scored(dense, text, len(row["question"]), len(text))
            assert by_option(evaluation)[item, option] == pytest.approx(values, abs=1e-4)
            size = {"none": 1, "tokens": len(values), "characters": len(choice)}[normalisation]
            scores.append(sum(values) / size)
        right += int(np.argmax(scores)) == row["a"]
    assert evaluation.metrics["choice_accuracy"]["value"] == right / len(rows)
    assert evaluation.result.get("items", {})["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("variant", ["original", "together", "left-to-right"])
def test_a_cloze_target_is_masked_as_its_set_says(variant, checkpoint, tmp_path):
    rows = [{"before": f"A {word} is", "word": "representable", "after": " in the grammar."} for word in WORDS]
    columns = f'[cloze]\nprefix = "before"\ntarget = "word"\nsuffix = "{{after}}"\npll = "{variant}"\n'
    evaluation = evaluate(str(checkpoint("bert")), declare(tmp_path, rows, f'task = "cloze"\n{columns}'))
    dense, sums = Dense(checkpoint("bert")), []
    for item, row in enumerate(rows):
        begin, end = len(row["before"]), len(row["before"]) + 1 + len(row["word"])
        expected = scored(dense, f"{row['before']} {row['word']}{row['after']}", begin, end, variant)
        assert len(expected) > 2
        assert by_option(evaluation)[item, 0] == pytest.approx(expected, abs=1e-4)
        sums.append(sum(expected))
    assert evaluation.metrics["cloze_log_probability"]["value"] == pytest.approx(np.mean(sums), abs=1e-4)
    assert evaluation.metrics["cloze_probability"]["value"] == pytest.approx(np.mean(np.exp(sums)), rel=1e-3)
    assert (evaluation.result["pseudo"] or {})["variant"] == variant


def test_appended_masks_hide_all_that_follows(checkpoint, tmp_path):
    """BabyLM's reading task: the text so far and three masks, of which the first is scored."""
    rows = [{"item": f"The {word} is not", "word": "representable"} for word in WORDS] + [
        {"item": "", "word": "A name"}
    ]
    columns = '[cloze]\nprefix = "item"\ntarget = "word"\npll = "left-to-right"\nappended_masks = 3\n'
    model = load(str(checkpoint("bert")))
    evaluation = evaluate(model, declare(tmp_path, rows, f'task = "cloze"\n{columns}'))
    dense = Dense(checkpoint("bert"))
    for item, row in enumerate(rows):
        known, expected = dense.ids(row["item"]), []
        for id in dense.ids(row["word"]):
            expected.append(dense.log_probs([*known, *[dense.tokenizer.mask_token_id] * 3])[len(known), id].item())
            known.append(id)
        assert by_option(evaluation)[item, 0] == pytest.approx(expected, abs=1e-4)
    long = [{"item": "The statement is executed. " * 60, "word": "representable"}]
    result = evaluate(model, declare(tmp_path, long, f'task = "cloze"\n{columns}')).result
    assert result["timing"]["pseudo"]["rows"] == len(dense.ids("representable"))
    assert result["corpus"]["windowed_documents"] == 1


def test_settings_that_a_set_cannot_be_measured_with_are_refused(checkpoint, tmp_path):
    model = load(str(checkpoint("bert")))
    declared = declare(tmp_path, [{"t": "a name"}], 'task = "cloze"\n[cloze]\ntarget = "t"\n')
    with pytest.raises(UserError, match="mine holds cloze, whose tokens must all be scored"):
        evaluate(model, declared, pseudo_sample=0.5)
    masks = 'task = "cloze"\n[cloze]\ntarget = "t"\npll = "left-to-right"\nappended_masks = 62\n'
    with pytest.raises(UserError, match="appended_masks = 62 leaves no room for text: the model takes 62 tokens"):
        evaluate(model, declare(tmp_path, [{"t": "a name"}], masks))


def test_a_column_without_numbers_and_an_unknown_main_metric_are_refused(checkpoint, tmp_path):
    declaration = 'task = "cloze"\n[cloze]\ntarget = "t"\n[[correlation]]\nname = "x"\ncolumns = "n"\n'
    declared = declare(tmp_path, [{"t": "a name", "m": 1}], declaration)
    with pytest.raises(UserError, match=r"rows\.jsonl: no row has a number in 'n'"):
        evaluate(str(checkpoint("bert")), declared)
    declared = declare(tmp_path, [{"t": "a name", "n": 1}], f'metric = "accuracy"\n{declaration}')
    with pytest.raises(UserError, match="cannot have the main metric 'accuracy'"):
        evaluate(str(checkpoint("bert")), declared)


def test_a_baseline_that_is_zero_in_a_draw_leaves_a_gain(checkpoint, tmp_path):
    """A column that is rarely 1 is all 0 in some draws, where a division by its size stopped the fit."""
    rows = [{"w": word, "n": i * i, "rare": int(i == 0)} for i, word in enumerate(WORDS)]
    declaration = (
        'task = "cloze"\n[cloze]\ntarget = "w"\n[[correlation]]\nname = "x"\ncolumns = "n"\nbaseline = "rare"\n'
    )
    gain = evaluate(str(checkpoint("bert")), declare(tmp_path, rows, declaration)).metrics["x"]
    assert gain["value"] is not None and gain["low"] is not None and gain["high"] is not None
    assert 0 <= gain["low"] <= gain["value"] <= gain["high"] <= 100


def test_options_with_the_same_ids_tie_whatever_the_last_bits_say():
    values = np.array([[-2.0, -2.0 + 1e-6, -9.0], [-2.0, -2.0 - 1e-6, -9.0], [-2.0, -2.0, -1.0], [-2.0, -3.0, -4.0]])
    same = np.zeros((4, 3), dtype=bool)
    same[:3, 1] = True
    three = np.full(4, 3)
    scores = ItemScores(np.ones((4, 3)), values, values, values, same, same, np.zeros(4, dtype=np.int64), three)
    right, tie = accuracy_columns(scores)[:, [RIGHT, TIE]].T.tolist()
    assert (right, tie) == ([0, 0, 0, 1], [1, 1, 0, 0])


# ------------------------------------------------------------------ correlations


def test_a_result_with_another_correlation_is_refused(checkpoint, tmp_path):
    """A finished result is returned as it is, so the formula is part of what identifies it."""
    rows = [{"w": word, "n": i} for i, word in enumerate(WORDS)]
    model = load(str(checkpoint("bert")))
    declaration = 'task = "cloze"\n[cloze]\ntarget = "w"\n[[correlation]]\nname = "x"\ncolumns = "n"\n'
    first = evaluate(model, declare(tmp_path, rows, declaration), output=tmp_path / "result").metrics
    again = evaluate(model, declare(tmp_path, rows, declaration), output=tmp_path / "result").metrics
    assert again == first
    with pytest.raises(UserError, match="an evaluation with another correlation"):
        changed = declare(tmp_path, rows, f'{declaration}score = "surprisal"\n')
        evaluate(model, changed, output=tmp_path / "result")


def test_correlations_with_human_numbers(checkpoint, tmp_path):
    """Against pandas and the written-out formula of BabyLM's reading task; items without a number are left out."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(24):
        names = ("time", "frequency", "length", "self", "other")
        row: dict[str, Any] = dict(zip(names, generator.normal(size=5).tolist(), strict=True))
        row |= {"item": f"The {WORDS[i % 8]} is", "word": WORDS[(3 * i) % 8], "before": "The", "previous": WORDS[i % 8]}
        row["time"] = round(row["time"]) if i else "NA"
        rows.append(row | ({"before": None, "previous": None} if i == 5 else {}))
    declaration = (
        'task = "cloze"\nmetric = "reading"\n[cloze]\nprefix = "item"\ntarget = "word"\n'
        'previous_prefix = "before"\nprevious_target = "previous"\n'
        '[[correlation]]\nname = "reading"\ncolumns = ["time"]\nscore = "surprisal"\n'
        'baseline = ["frequency", "length"]\n'
        '[[correlation]]\nname = "spill"\ncolumns = ["self", "other"]\nscore = "surprisal"\n'
        'baseline = ["frequency"]\nprevious_score = true\n'
    )
    evaluation = evaluate(str(checkpoint("bert")), declare(tmp_path, rows, declaration))
    own, metrics = by_option(evaluation), evaluation.metrics
    surprisal, previous = (np.array([-sum(own[i, option]) for i in range(24)]) for option in (0, 1))
    columns = {name: np.array([row[name] for row in rows[1:]]) for name in ("time", "frequency", "length")}

    def gain(human: np.ndarray, score: np.ndarray, *baseline: np.ndarray) -> float:
        design = np.column_stack([np.ones(len(human)), *baseline, baseline[0] * baseline[1]])
        unexplained = []
        for matrix in (design, np.column_stack([design, score])):
            fitted = matrix @ np.linalg.lstsq(matrix, human)[0]
            unexplained.append(1 - (1 - ((human - fitted) ** 2).sum() / ((human - human.mean()) ** 2).sum()))
        return 100 * (unexplained[0] - unexplained[1]) / unexplained[0]

    time = columns["time"]
    assert evaluation.result.get("items", {})["correlated"]["reading_time_spearman"] == 23
    ranks = [pd.Series(values).rank().to_numpy() for values in (surprisal[1:], time)]
    for kind, sides in (("pearson", (surprisal[1:], time)), ("spearman", ranks)):
        assert metrics[f"reading_time_{kind}"]["value"] == pytest.approx(np.corrcoef(sides[0], sides[1])[0, 1])
    expected = gain(time, surprisal[1:], columns["frequency"], columns["length"])
    assert metrics["reading"]["value"] == pytest.approx(expected)
    kept = np.arange(24) != 5
    frequency, gains = np.array([row["frequency"] for row in rows])[kept], []
    for name in ("self", "other"):
        human = np.array([row[name] for row in rows])[kept]
        gains.append(gain(human, surprisal[kept], frequency, previous[kept]))
        assert metrics[f"spill_{name}_r2_gain"]["value"] == pytest.approx(gains[-1] / 100)
    assert metrics["spill"]["value"] == pytest.approx(np.mean(gains))
    for metric in metrics.values():
        assert metric["low"] is not None and metric["high"] is not None and metric["low"] <= metric["high"]


def test_the_share_of_a_first_option_against_human_shares(checkpoint, tmp_path):
    """BabyLM's wug tasks: softmax over the two log-probabilities, Spearman against the humans' ratio."""
    rows = [{"sentences": [f"A {word}.", f"The {word}."], "ratio": i / 7} for i, word in enumerate(WORDS)]
    declaration = (
        'task = "pairs"\n[pairs]\nfirst = "sentences.0"\nsecond = "sentences.1"\n'
        '[[correlation]]\nname = "wug"\ncolumns = ["ratio"]\nscore = "probability"\n'
    )
    evaluation = evaluate(str(checkpoint("bert")), declare(tmp_path, rows, declaration))
    own = by_option(evaluation)
    logits = torch.tensor([[sum(own[i, 0]), sum(own[i, 1])] for i in range(8)], dtype=torch.float64)
    expected = pd.Series(logits.softmax(1)[:, 0].numpy()).rank().corr(pd.Series(range(8)))
    assert evaluation.metrics["wug_ratio_spearman"]["value"] == pytest.approx(expected)
    assert "first_preferred" in evaluation.metrics and "pair_accuracy" not in evaluation.metrics
    assert "pseudo_perplexity_second" in evaluation.metrics


# ------------------------------------------------------------------ reading rows


def items(columns: ItemColumns, *rows: dict[str, Any], numbers: tuple[str, ...] = ()) -> list[Item]:
    return list(columns.items(((f"row {i}", row) for i, row in enumerate(rows)), numbers))


def test_a_column_may_be_a_path_an_alternative_or_a_template():
    row = {"a": {"b": ["x", "y"]}, "n": 3, "who": "She"}
    columns = PairColumns(good="{who} has {n}.", bad="a.b.1", context="missing|a.b.0", paradigm="{n}_ops", join="")
    [item] = items(columns, row)
    assert [option.text for option in item.options] == ["xShe has 3.", "xy"]
    assert [(option.begin, option.end) for option in item.options] == [(1, 11), (1, 2)]
    assert item.paradigm == "3_ops"


def test_choices_may_be_templates_or_one_list_of_any_length():
    row = {"who": "She", "verb": "sleeps", "all": ["a", "b", "c"]}
    [item] = items(ChoiceColumns(choices=("{who} {verb}", "{verb}?"), label=1), row)
    assert [option.text for option in item.options] == ["She sleeps", "sleeps?"]
    assert len(items(ChoiceColumns(choices=("all",), label=1), row)[0].options) == 3


@pytest.mark.parametrize("label", [1, "1", "b", "B", "the text"])
def test_a_label_is_an_index_a_letter_or_a_text(label):
    [item] = items(ChoiceColumns(choices=("x", "y"), label="l"), {"x": "other", "y": "the text", "l": label})
    assert item.label == 1


def test_a_word_without_context_has_no_score_as_the_word_before():
    """As in BabyLM's reading task, where the word that begins a sentence is not scored."""
    columns = ClozeColumns(target="w", previous_prefix="p", previous_target="v")
    rows = [{"w": "b", "p": p, "v": v} for p, v in (("", "The"), (None, "The"), ("The", ""), ("The", "a"))]
    assert [item.options[1].text for item in items(columns, *rows)] == ["", "", "", "The a"]
    alone = ClozeColumns(target="w", previous_target="v")
    assert items(alone, rows[0])[0].options[1].text == "The"


def test_rows_of_one_item_are_grouped():
    columns = PairColumns(first="s", second="s", group_by="{o}-{t}", variant="g", variants=("she", "he"), id="o")
    rows = [
        {"o": o, "t": 1, "g": g, "s": f"{o} {g}", "share": 0.5}
        for o in ("nurse", "cook")
        for g in ("he", "she", "they")
    ]
    found = items(columns, *rows, numbers=("share",))
    assert [item.options[0].text for item in found] == ["nurse she", "cook she"]
    assert [item.options[1].text for item in found] == ["nurse he", "cook he"]
    assert (found[0].id, found[0].numbers) == ("nurse", {"share": 0.5})
    with pytest.raises(UserError, match="'cook-1' has no row with g 'she', only he"):
        items(columns, *rows[:4])
    with pytest.raises(UserError, match="row 1: g 'he' occurs twice in one item: add columns to"):
        items(columns, rows[0], rows[0])


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (ChoiceColumns(choices=("x",), label="l"), {"x": ["a"], "l": 0}, "row 0 has 1 choice.*needs two"),
        (ChoiceColumns(choices=("x",), label="l"), {"x": ["a", "b"], "l": 2}, "label 2 is none of the 2 choices"),
        (ChoiceColumns(choices=("x",), label=-1), {"x": ["a", "b"]}, "label -1 is none of the 2 choices"),
        (ChoiceColumns(choices=("x", "y"), label=0), {"x": "a", "y": 3}, "holds int, not text"),
        (ClozeColumns(target="t"), {"t": 3}, "field 't' holds int, not text"),
        (ClozeColumns(target="{u}"), {"t": "a"}, "no field 'u'"),
        (ClozeColumns(target="a {t}"), {"t": ["b"]}, "field 't' holds list, not text"),
        (ClozeColumns(target="t", prefix="p"), {"t": "a", "p": ["b"]}, "field 'p' holds list, not text"),
    ],
)
def test_rows_without_an_item_are_named(columns, row, message):
    with pytest.raises(UserError, match=message):
        items(columns, row)


def test_a_number_that_is_none_is_named():
    assert math.isnan(items(ClozeColumns(target="t"), {"t": "a", "n": "NA"}, numbers=("n",))[0].numbers["n"])
    assert math.isnan(items(ClozeColumns(target="t"), {"t": "a"}, numbers=("n",))[0].numbers["n"])
    for value in ("fast", "inf", "1e999"):
        with pytest.raises(UserError, match=f"field 'n' holds '{value}', not a number"):
            items(ClozeColumns(target="t"), {"t": "a", "n": value}, numbers=("n",))


CLOZE = 'task = "cloze"\n[cloze]\ntarget = "t"\n'


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ('task = "cloze"\n', r"needs a table \[cloze\]"),
        ('task = "pairs"\n[cloze]\ntarget = "t"\n', r"table \[cloze\] has no effect"),
        ('task = "pairs"\n[pairs]\ngood = "a"\n', "mine.toml: pairs need good and bad"),
        ('task = "pairs"\n[pairs]\nfirst = "a"\nbad = "a"\n', "pairs need good and bad, or first and second"),
        ('task = "pairs"\n[pairs]\nscoring = "shared"\ncontext = "c"\n', "is for whole sentences"),
        ('task = "pairs"\n[pairs]\nbad_context = "c"\n', "bad_context needs context"),
        ('task = "pairs"\n[pairs]\ngroup_by = "c"\n', "group_by needs variant"),
        ('task = "pairs"\n[pairs]\nvariant = "c"\n', "need group_by"),
        ('task = "pairs"\n[pairs]\ngroup_by = "g"\nvariant = "c"\nvariants = ["a", "a"]\n', "variants, its two values"),
        ('task = "choices"\n[choices]\nchoices = "c"\n', "choices need label"),
        ('task = "choices"\n[choices]\nlabel = 0\n', "choices need choices"),
        ('task = "cloze"\n[cloze]\nprefix = "t"\n', "cloze needs target"),
        (f'{CLOZE}normalisation = "words"\n', "no normalisation 'words'"),
        (f'{CLOZE}pll = "l2r"\n', "no pseudo-likelihood variant 'l2r'"),
        (f"{CLOZE}appended_masks = 3\n", "appended_masks must be at least 1.*left-to-right"),
        (f'{CLOZE}previous_prefix = "p"\n', "previous_prefix needs previous_target"),
        (f'{CLOZE}[[correlation]]\nname = ""\ncolumns = "n"\n', r"each \[\[correlation\]\] needs a name of its own"),
        (CLOZE + 2 * '[[correlation]]\nname = "x"\ncolumns = "n"\n', r"each \[\[correlation\]\] needs a name"),
        (f'{CLOZE}[[correlation]]\nname = "x"\ncolumns = []\n', "columns must be the columns of human numbers"),
        (
            f'{CLOZE}[[correlation]]\nname = "x"\ncolumns = "n"\nscore = "difference"\n',
            "'difference' of .* is for pairs",
        ),
        (f'{CLOZE}[[correlation]]\nname = "x"\ncolumns = "n"\nprevious_score = true\n', "needs previous_target"),
        ('task = "text"\n[[correlation]]\nname = "x"\ncolumns = "n"\n', "needs items"),
    ],
)
def test_mistakes_in_a_declaration_of_items_are_named(declaration, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read_set(declare(tmp_path, [], declaration))
    assert "mine.toml" in str(caught.value)


# ------------------------------------------------------------------ the command line


def test_results_of_items_are_printed_reported_and_compared(checkpoint, artifact, capsys, tmp_path):
    rows = [
        {"x": ["a name", "the name"], "n": i, "m": i % 3, "g": f"g{i % 2}", "w": word} for i, word in enumerate(WORDS)
    ]
    declaration = (
        'task = "choices"\n[choices]\nchoices = "x"\nlabel = 0\nparadigm = "g"\ncontext = "{w}"\n'
        '[[correlation]]\nname = "x"\ncolumns = "n"\nbaseline = "m"\n'
    )
    declared = declare(tmp_path, rows, declaration)
    for model, name in ((checkpoint("bert"), "a"), (artifact("bert"), "b")):
        code, out, _ = run(capsys, "eval", model, "--set", declared, "--output", tmp_path / name, "--by-paradigm")
        assert code == 0 and "chance level: 0.5000" in out and "choice_accuracy_macro" in out
        assert [line.split()[0] for line in out.splitlines() if line.endswith("4 items")] == ["g0", "g1"]
        assert "x n, Spearman&#39;s correlation" in (tmp_path / name / "report.html").read_text()
    found = run_json(capsys, "compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "compare")
    metrics = found["comparisons"][0]["metrics"]
    assert {"choice_accuracy", "choice_accuracy_macro", "x", "x_n_spearman", "x_n_pearson", "x_n_r2_gain"} == set(
        metrics
    )
    assert metrics["x_n_spearman"]["items"] == 8
    assert [metrics[name]["better"] for name in ("x", "x_n_r2_gain", "x_n_spearman")] == ["higher", "higher", "neither"]
    assert found["comparisons"][0]["items"]["groups"]["paradigms"]["g1"]["choice_accuracy"]["items"] == 4


def test_a_set_decides_how_it_is_scored(checkpoint, capsys, tmp_path):
    declared = declare(tmp_path, [{"t": "a name"}], f'{CLOZE}pll = "together"\n')
    arguments = ("eval", checkpoint("bert"), "--set", declared)
    code, _, err = run(capsys, *arguments, "--pll", "within-word")
    assert code == 2 and "mine is scored with pll = 'together'" in err
    code, _, err = run(capsys, *arguments, "--metric", "pairs")
    assert code == 2 and "mine holds cloze, which only --metric cloze can measure" in err
    code, _, err = run(capsys, *arguments, "--mask-prob", "0.3")
    assert code == 2 and "need --metric masked" in err
    found = run_json(capsys, *arguments, "--metric", "cloze", "--output", tmp_path / "result")
    assert found["pseudo"]["variant"] == "together"
    assert "Scored tokens, all masked at once" in (tmp_path / "result" / "report.html").read_text()
