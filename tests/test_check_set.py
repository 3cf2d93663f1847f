"""`eval MODEL --check-set FILE`: what is shown is what is scored, and all problems are named at once."""

import json
from pathlib import Path

import pytest
from conftest import refusal, run

from mlmkit.eval.api import evaluate

PAIRS = """start,good,bad,kind
The names,are bound.,is bound.,number
The statement,is read.,are read.,number
The names,are bound.,is bound.,number
A name,is bound.,is  bound.,spaces
"""
COLUMNS = 'good = "good"\nbad = "bad"\ncontext = "start"\nparadigm = "kind"\n'


@pytest.fixture
def declare(tmp_path):
    def write(task: str, table: str, name: str = "rows.csv", content: str = PAIRS) -> Path:
        (tmp_path / name).write_text(content)
        declared = f'name = "own"\ntask = "{task}"\nlocal = "{name}"\n[{task}]\n{table}'
        (tmp_path / "set.toml").write_text(declared)
        return tmp_path / "set.toml"

    return write


@pytest.mark.parametrize("pll", ["original", "within-word", "together", "left-to-right"])
def test_what_is_shown_is_what_is_scored(capsys, checkpoint, declare, pll):
    declared = declare("pairs", f'{COLUMNS}pll = "{pll}"\n')
    code, out, err = run(capsys, "eval", checkpoint("bert"), "--check-set", declared)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == ["item 0 / number", "  good: The names are bound."]
    masked = {
        "original": "[CLS] The names [MASK] bound . [SEP]",
        "within-word": "[CLS] The names [MASK] bound . [SEP]",
        "together": "[CLS] The names [MASK] [MASK] [MASK] [SEP]",
        "left-to-right": "[CLS] The names [MASK] [MASK] [MASK] [SEP]",
    }
    assert lines[2:4] == ["    scored: are bound .", f"    the model reads, for the first of these: {masked[pll]}"]
    evaluated = evaluate(str(checkpoint("bert")), str(declared)).tokens.to_pylist()
    shown = [line.removeprefix("    scored: ").split() for line in lines if line.startswith("    scored: ")]
    for document, tokens in enumerate(shown):
        scored = [row["token"] for row in evaluated if row["document"] == document]
        assert [token.removeprefix("##") for token in tokens] == scored
    assert len(shown) == 6


def test_counts_groups_and_what_is_odd(capsys, checkpoint, declare):
    code, out, _ = run(capsys, "eval", checkpoint("bert"), "--check-set", declare("pairs", COLUMNS), "--json")
    report = json.loads(out)
    assert (code, report["problems"]) == (0, [])
    assert report["report"][-7:] == [
        "4 items with 8 options",
        "score: the sum of the log-probabilities of the scored tokens, each masked alone",
        "compared: an item counts if its good option has the greatest score",
        "number: 3 items",
        "spaces: 1 items",
        "warning: 1 of 4 items have options with the same tokens, which tie; the first is item 3",
        "warning: 2 of 4 items have a copy in the set; the first is item 0",
    ]


def test_choices_and_cloze_with_long_empty_and_unknown_texts(capsys, checkpoint, declare):
    rows = [{"q": "The", "a": ["name", "names"], "n": "B"}, {"q": "A \U0001f642", "a": ["name", "names"], "n": "A"}]
    rows += [{"q": "The name " * 40, "a": ["is", "are"], "n": "A"}, {"q": "A", "a": ["", "x"], "n": 0}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    table = 'choices = "a"\ncontext = "q"\nlabel = "n"\nnormalisation = "tokens"\n'
    _, out, _ = run(capsys, "eval", checkpoint("bert"), "--check-set", declare("choices", table, "a.jsonl", content))
    assert "  choice 0: The name\n" in out and "  choice 1 (right): The names\n" in out
    assert "each masked alone, divided by the number of scored tokens\n" in out
    assert "compared: an item counts if its right option has the greatest score\n" in out
    assert (
        "1 of 3 items have an option longer than the model takes, which is read in windows; the first is item 2" in out
    )
    assert "1 of 3 items have characters that the tokenizer does not know; the first is item 1" in out
    assert "warning: 1 items with an empty text are left out" in out
    table = 'prefix = "start"\ntarget = "good"\npll = "left-to-right"\nappended_masks = 3\n'
    _, out, _ = run(capsys, "eval", checkpoint("bert"), "--check-set", declare("cloze", table))
    assert "  target: The names are bound.\n" in out and "compared" not in out
    assert "for the first of these: [CLS] The names [MASK] [MASK] [MASK] [SEP]" in out


def test_all_problems_are_named_at_once(capsys, checkpoint, declare):
    rows = [{"good": "a", "bad": "b", "p": "x"}, {"good": "a"}, {"good": 3, "bad": "b"}, {"good": "a"}]
    content = "".join(json.dumps(row) + "\n" for row in rows) + "{\n" + json.dumps(rows[0]) + "\n"
    table = 'good = "good"\nbad = "bad"\nparadigm = "p|good"\n[phenomena]\ny = ["z*"]\n'
    declared = declare("pairs", table, "a.jsonl", content)
    code, out, err = run(capsys, "eval", checkpoint("bert"), "--check-set", declared)
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    path = declared.parent / "a.jsonl"
    assert code == 2 and err == f"mlmkit: {declared} cannot be evaluated: 4 problems, see above\n"
    for line, expected in zip(
        sorted(problems),
        (
            f"{path}: line 2 has no field 'bad' (it has good, file)",
            f"{path}: line 3, field 'good' holds int, not text",
            f"{path}: line 5 is not JSON",
            "phenomena.y: no paradigm is called 'z*': there are x",
        ),
        strict=True,
    ):
        assert line.startswith(f"problem: {expected}")
    assert "(and 1 more like it)" in out and "(what follows was not read)" in out
    assert "1 items with 2 options" in out


def test_what_cannot_be_checked_is_one_line(capsys, checkpoint, declare, text_file):
    model = checkpoint("bert")
    assert "holds text" in refusal(capsys, "eval", model, "--check-set", text_file)
    declared = declare("pairs", COLUMNS)
    assert "leave out --set" in refusal(capsys, "eval", model, "--check-set", declared, "--set", declared)
    blank = declare("pairs", COLUMNS, content="start,good,bad,kind\nA,,x,y\n")
    code, out, err = run(capsys, "eval", model, "--check-set", blank)
    assert (code, "holds no items that can be scored" in out, "1 problems" in err) == (2, True, True)
    missing = declare("pairs", COLUMNS.replace('"kind"', '"sort"'))
    code, out, err = run(capsys, "eval", model, "--check-set", missing)
    assert (code, out.count("has no field 'sort'"), out.count("and 3 more like it")) == (2, 1, 1)
