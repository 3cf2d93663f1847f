"""`mlmkit fill --file`: the candidates for each text are those for the text alone."""

import json
from pathlib import Path

import pytest
from conftest import paragraphs, refusal, run, run_json

from mlmkit.backends import load
from mlmkit.fill import fill

MASKS = {"bert": "[MASK]", "roberta": "<mask>", "convbert": "[MASK]"}


def masked(kind: str) -> list[str]:
    """Real texts of all lengths with one or two masks, more than fit in one batch."""
    words = [text.split()[:12] for text in paragraphs() if len(text.split()) > 3][:150]
    for number, text in enumerate(words):
        text[number % 3] = MASKS[kind]
        text[-1] = MASKS[kind] if number % 5 == 0 else text[-1]
    return [" ".join(text) for text in words]


@pytest.mark.parametrize("kind", MASKS)  # convbert's scores change with padding
@pytest.mark.parametrize("targets", [(), ("the", "of", "xyzzy")])
def test_a_file_is_filled_text_by_text(capsys, caplog, kind, targets, checkpoint, tmp_path):
    texts = masked(kind)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts), encoding="utf-8")
    arguments = [part for target in targets for part in ("--targets", target)]
    command = ("fill", checkpoint(kind), "--file", path, "--text-field", "sentence", "--top-k", 2, *arguments)
    _, out, _ = run(capsys, *command, "--json")
    assert caplog.text.count("'xyzzy' has several tokens") == len(targets) // 3
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    model = load(str(checkpoint(kind)))
    for answer, text in zip(answers, texts, strict=True):
        expected = fill(model, text, top_k=2, targets=targets)
        assert [[c["sequence"] for c in mask] for mask in answer["masks"]] == [
            [c["sequence"] for c in mask] for mask in expected
        ]
        scores = [c["score"] for mask in expected for c in mask]
        assert [c["score"] for mask in answer["masks"] for c in mask] == pytest.approx(scores, rel=1e-4)


def test_a_file_for_people(capsys, checkpoint, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("O rato [MASK] a roupa.\n\nA [MASK] voa.\n", encoding="utf-8")
    _, out, _ = run(capsys, "fill", checkpoint("bert"), "--file", path, "--top-k", 1)
    lines = out.splitlines()
    assert (len(lines), lines[0], lines[2]) == (4, "O rato [MASK] a roupa.", "A [MASK] voa.")
    [[best]] = run_json(capsys, "fill", checkpoint("bert"), "A [MASK] voa.", "--top-k", 1)["masks"]
    assert lines[3].split()[0] == f"{best['score']:.4f}"


def test_bad_files_are_refused_before_anything_is_computed(capsys, checkpoint, tmp_path):
    model, path = checkpoint("bert"), Path(tmp_path / "texts.txt")
    path.write_text("O rato [MASK].\n\nA voa.\n", encoding="utf-8")
    error = refusal(capsys, "fill", model, "--file", path)
    assert f"{path}: text 3, 'A voa.': the text has no [MASK]: put it" in error
    path.write_text("[MASK] " + "long " * 100, encoding="utf-8")
    assert "text 1, '[MASK] long" in refusal(capsys, "fill", model, "--file", path)
    path.write_text("\n\n", encoding="utf-8")
    assert "there is no text to fill" in refusal(capsys, "fill", model, "--file", path)
    assert "either TEXT or --file" in refusal(capsys, "fill", model)
    assert "either TEXT or --file" in refusal(capsys, "fill", model, "A [MASK].", "--file", path)
    assert "--text-field and --blank-line say" in refusal(capsys, "fill", model, "A [MASK].", "--blank-line")
