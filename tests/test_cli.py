"""The command line: in a process of its own where that matters, otherwise through `main`."""

import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import PORTUGUESE, PROOF, process, refusal, run, run_json

from mlmkit.backends import load
from mlmkit.cli import MODULES, main
from mlmkit.console import print_table
from mlmkit.demo import demo_config
from mlmkit.errors import UserError
from mlmkit.files import read_record
from mlmkit.fill import fill
from mlmkit.train.config import Config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", MODULES)
def test_each_command_has_help(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, command, "-h")
    assert code == 0
    assert out.startswith(f"Usage: mlmkit {command} ")
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"RANGE|INTEGER|FLOAT|PATH|<=|>=|Default:|default: None", out)


def test_no_short_help_is_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "--help")
    _, commands = out.split("Commands:\n")
    assert [line.split()[0] for line in commands.splitlines()] == list(MODULES)
    assert all(re.fullmatch(r"  \w+ +\S.*[^.]\.", line) for line in commands.splitlines())


@pytest.mark.parametrize("arguments", [["-v", "inspect", "nowhere"], ["inspect", "nowhere", "-v"]])
def test_verbose_is_taken_before_and_after_the_command(caplog, arguments):
    caplog.set_level("INFO", logger="mlmkit")  # restored afterwards
    with pytest.raises(UserError):  # which Python shows with its traceback
        main(arguments)
    assert logging.getLogger("mlmkit").level == logging.DEBUG


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mod", []),
        ("eval ru", ["dir,ru"]),
        ("average one tw", ["dir,tw"]),
        ("compare a b c", ["dir,c"]),
        ("card r", ["dir,r"]),
        ("train conf", ["file,conf"]),
        ("score model", ["dir,model"]),
        ("score model te", ["file,te"]),
        ("fill model te", []),
        ("train config.toml --from r", ["dir,r"]),
        ("train config.toml --sweep masking.r", ["plain,masking.replace_prob=", "plain,masking.random_prob="]),
        ("export model --precision int", ["plain,int8", "plain,int8-dynamic"]),
        ("eval model --set wikitext", ["plain,wikitext-103", "plain,wikitext-2", "file,wikitext"]),
        ("eval model --suite babylm-s", ["plain,babylm-strict", "file,babylm-s"]),
        ("eval model --pll w", ["plain,within-word"]),
        ("eval model --mask-seed 1", []),
    ],
)
def test_completion_offers_what_fits(capsys, monkeypatch, words, expected):
    words = ["mlmkit", *words.split()]
    monkeypatch.setenv("_MLMKIT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    code, out, err = run(capsys)
    assert (code, out.split(), err) == (0, expected, "")


def test_a_table_aligns_wide_characters_and_escapes_control_characters(capsys):
    print_table([("日本", 1.5, "[b]"), ("a\x1b", 22, "x" * 200)], ("name", "value", ""), align="lr")
    header, rule, first, second = capsys.readouterr().out.splitlines()
    assert header == "name   value"
    assert set(rule) == {"─"}
    assert first == "日本     1.5  [b]"
    assert second == f"a\\x1b     22  {'x' * 200}"  # whole, because this is not a terminal
    print_table([("one", "1"), ("three", "3")])
    assert capsys.readouterr().out == "one    1\nthree  3\n"


def test_a_table_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "32")
    row, header = ("first", "12,345,678", "words that do not fit"), ("name", "number", "text")
    print_table([row], header, align="lr")
    assert capsys.readouterr().out.splitlines() == [
        "name       number  text",
        "─" * 32,
        "first  12,345,678  words that do",
        "                   not fit",
    ]
    print_table([row], header, align="lr", crop=True)
    assert capsys.readouterr().out.splitlines()[2] == "first  12,345,678  words that d…"
    print_table([row], header, align="lr", expendable=("number", "name"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["first  words that do not fit", "A wider terminal also shows: number."]
    print_table([("日本", "語" * 20), ("blank", " " * 40)])
    assert capsys.readouterr().out == f"日本   {'語' * 12}\n       {'語' * 8}\nblank\n"
    print_table([])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_portuguese_sentences_are_scored_and_evaluated(capsys, kind, artifact, tmp_path):
    path = tmp_path / "pt.txt"
    path.write_text("".join(f"{text}\n" for text in PORTUGUESE), encoding="utf-8")
    scored = run_json(capsys, "score", artifact(kind), path, "--per-token")["texts"]
    assert [item["text"] for item in scored] == list(PORTUGUESE)
    for item in scored:
        log_probs = [token["log_prob"] for token in item["per_token"]]
        assert (item["pseudo_log_likelihood"], item["tokens"]) == (pytest.approx(sum(log_probs)), len(log_probs))

    result = run_json(capsys, "eval", artifact(kind), "--set", path, "--output", tmp_path / "result")
    assert result == read_record(tmp_path / "result" / "result.json", "")
    table = pq.read_table(tmp_path / "result" / "tokens.parquet")
    assert table.column_names == [
        "document", "offset", "token_id", "input_id", "word", "log_prob", "rank", "metric",
        "mask_seed", "top_id", "top_log_prob", "token", "piece", "length", "frequency",
    ]  # fmt: skip
    assert len(table) == result["masking"]["selected"] > 0
    assert len(result["mask_digest"]) == 32
    assert set(result["metrics"]["masked_cross_entropy"]) == {"value", "low", "high"}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_fill_agrees_with_the_pipeline(capsys, kind, checkpoint, artifact):
    from transformers import pipeline

    pipe: Any = pipeline("fill-mask", model=str(checkpoint(kind)))
    for text in ("O rato {} a roupa do rei de Roma.", "A {} voa alto no {} azul.", "{}", "a{}, {} {}b {}"):
        masked = text.replace("{}", "<mask>" if kind == "roberta" else "[MASK]")
        expected = pipe(masked, top_k=7)
        found = run_json(capsys, "fill", artifact(kind), masked, "--top-k", 7)["masks"]
        rows = zip(found, [expected] if text.count("{}") == 1 else expected, strict=True)
        for row, expected_row in rows:
            for key in ("token", "token_str", "sequence"):
                assert [c[key] for c in row] == [c[key] for c in expected_row]
            assert [c["score"] for c in row] == pytest.approx([c["score"] for c in expected_row], abs=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_fill_ranks_targets_as_the_pipeline_does(capsys, caplog, kind, checkpoint, artifact):
    from transformers import AutoTokenizer, pipeline

    targets = ["statement", " the", "the", ",", " of", "of", "the", "xyzzy", "a,b"]
    masked = "The <mask> is" if kind == "roberta" else "The [MASK] is"
    expected = pipeline("fill-mask", model=str(checkpoint(kind)))(masked, targets=targets, top_k=9)
    arguments = [part for target in targets for part in ("--targets", target)]
    [row] = run_json(capsys, "fill", artifact(kind), masked, *arguments, "--top-k", 9)["masks"]
    assert [c["token"] for c in row] == [c["token"] for c in expected]
    assert [c["score"] for c in row] == pytest.approx([c["score"] for c in expected], abs=1e-4)
    pieces = AutoTokenizer.from_pretrained(checkpoint(kind)).tokenize
    replaced = [target for target in dict.fromkeys(targets) if len(pieces(target)) > 1]
    messages = [record.getMessage() for record in caplog.records if record.name == "mlmkit.fill"]
    several = [text.removeprefix("the target ").partition(" has several")[0] for text in messages]
    assert several == [repr(target) for target in replaced]
    assert (" the" in replaced, "the" in replaced) == (False, kind == "roberta")


def test_fill_cleans_spaces_up_as_the_pipeline_does(checkpoint, tmp_path):
    """Checkpoints of transformers 4 say `clean_up_tokenization_spaces`; the artifact knows it without transformers."""
    from transformers import pipeline

    from mlmkit.export.export import export

    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "checkpoint"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": True}))
    export(str(folder), tmp_path / "artifact", text=PROOF)
    pipe: Any = pipeline("fill-mask", model=str(folder))
    backend, differs = load(str(tmp_path / "artifact")), 0
    for text in ("[MASK] , don't ! we've . it 's [MASK] ?", "(a [MASK] ) . [MASK] 'm", "He 's [MASK] ' s n't ."):
        expected = pipe(text, top_k=20)
        found = fill(backend, text, top_k=20)
        assert [[c["sequence"] for c in row] for row in found] == [
            [c["sequence"] for c in row] for row in (expected if text.count("[MASK]") > 1 else [expected])
        ]
        differs += sum(" ." in c["sequence"] or " ," in c["sequence"] for row in found for c in row)
    assert not differs


def test_score_reads_standard_input_and_prints_a_line_a_text(artifact):
    result = process("score", artifact("bert"), input="The statement\n\nRoma\n")
    assert result.returncode == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[2] for line in lines] == ["The statement", "Roma"]
    assert all(float(line[0]) < 0 and int(line[1]) > 0 for line in lines)
    assert result.stderr == ""


def test_several_sets_have_a_folder_each(capsys, artifact, tmp_path):
    arguments: list[object] = ["eval", artifact("bert"), "--output", tmp_path / "results"]
    for name in ("text", "other"):  # different lines, because equal texts get equal masks
        (tmp_path / f"{name}.txt").write_text("".join(f"The {name}, number {number}\n" for number in range(30)))
        arguments += ["--set", tmp_path / f"{name}.txt"]
    first = run_json(capsys, *arguments)
    assert len(first["results"]) == 2
    assert (tmp_path / "results" / "text" / "result.json").exists()
    assert (tmp_path / "results" / "other" / "tokens.parquet").exists()
    assert run_json(capsys, *arguments) == first  # nothing is computed twice
    arguments += ["--mask-seed", "5"]
    code, _, err = run(capsys, *arguments)
    assert (code, "another masking" in err, "--overwrite" in err) == (2, True, True)
    replaced = run_json(capsys, *arguments, "--overwrite")
    assert replaced["results"][0]["mask_digest"] != first["results"][0]["mask_digest"]


def test_built_in_sets_are_listed(capsys):
    listed = run_json(capsys, "eval", "--list-sets")["sets"]
    _, out, _ = run(capsys, "eval", "--list-sets")
    table, _, legend = out.partition("\n\n")
    assert [item["name"].partition(":")[0] for item in listed] == [line.split()[0] for line in table.splitlines()[2:]]
    assert {"local", "hub", "missing"} <= {line.split()[0] for line in legend.splitlines()}


def mistakes(folder: Path, checkpoint: Path, artifact: Path) -> dict[str, list[object]]:
    """Return commands that must fail, by a part of their message."""
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("ação\n".encode("latin-1"))
    (folder / "good.txt").write_text("The statement of the text\n" * 5)
    (folder / "bad.jsonl").write_text('{"text": 1}\n')
    (folder / "bad.toml").write_text("[train]\nstep = 3\n")
    (folder / "no-model").mkdir()
    (folder / "no-text").mkdir()
    half = Path(shutil.copytree(checkpoint, folder / "half"))
    (half / "model.safetensors").unlink()
    good, output = folder / "good.txt", folder / "out"
    (folder / "good.toml").write_text(f'[data]\ntrain = "{good}"\n')
    train = ["train", folder / "good.toml", "--output", output, "--set"]
    return {
        "Missing argument 'MODEL'": ["eval"],
        "Give either --set or --suite": ["eval", artifact],
        "holds text, not pairs": ["eval", artifact, "--set", "wikitext-2", "--metric", "pairs"],
        "exclude each other": ["eval", artifact, "--set", good, "--mask-seed", 1, "--mask-seeds", "1,2"],
        "numbers separated by commas": ["eval", artifact, "--set", good, "--mask-seeds", "1;2"],
        "two sets have the same name": ["eval", artifact, "--set", good, "--set", good, "--output", output],
        "there is no text to score": ["score", artifact, folder / "empty.txt"],
        "unknown device": ["fill", artifact, "a [MASK]", "--device", "tpu"],
        "--max-batch applies to a TensorRT plan": ["export", checkpoint, "--output", output, "--max-batch", 2],
        "empty.txt has no documents": ["export", checkpoint, "--output", output, "--text", folder / "empty.txt"],
        "name the checkpoint it was exported from": [*train, f"model.init_from={artifact}"],
        "No such command": ["evaluate"],
        "No such option": ["fill", artifact, "x", "--topk", 3],
        "no such folder": ["fill", folder / "none", "a [MASK]"],
        f"{folder / 'nope'}: no such folder": ["export", folder / "nope", "--output", output],
        "has no config.json": ["fill", folder / "no-model", "a [MASK]"],
        "artfact: no such folder, and the Hub has no": ["fill", "artfact", "a [MASK]"],
        "is a file": ["score", good, good],
        "half has no model.safetensors": ["export", half, "--output", output],
        "tokenizer.json is a file: name the folder": [*train, f"tokenizer.path={checkpoint}/tokenizer.json"],
        "model.safetensors is a file: name the folder": [*train, f"model.init_from={checkpoint}/model.safetensors"],
        "has no [MASK]": ["fill", artifact, "nothing to fill"],
        "the target '' has no token": ["fill", artifact, "a [MASK]", "--targets", ""],
        "not valid UTF-8": ["fill", artifact, "a [MASK] \udcff"],
        "is an artifact: add": ["export", artifact, "--output", output],
        "name too long": ["score", artifact, "x" * 5000],
        "top_k must be": ["fill", artifact, "a [MASK]", "--top-k", 0],
        "tokens, and at most 64 are taken": ["fill", artifact, "a [MASK] " * 70],
        "a text has 6407 characters, and at most 6400": ["fill", artifact, "[MASK] " + "1" * 6400],
        "a target has 6401 characters, and at most 6400": ["fill", artifact, "[MASK]", "--targets", "1" * 6401],
        "no documents": ["eval", artifact, "--set", folder / "empty.txt", "--output", output],
        "is not UTF-8": ["eval", artifact, "--set", folder / "latin.txt", "--output", output],
        "holds int": ["eval", artifact, "--set", folder / "bad.jsonl", "--output", output],
        "no such file": ["eval", artifact, "--set", folder / "none.txt", "--output", output],
        "has no file to read": ["eval", artifact, "--set", folder / "no-text", "--output", output],
        "mask_prob must be": ["eval", artifact, "--set", good, "--mask-prob", "nan", "--output", output],
        "must not exceed 1": ["eval", artifact, "--set", good, "--random-prob", "0.5", "--output", output],
        "no metric": ["eval", artifact, "--set", good, "--metric", "bleu", "--output", output],
        "choose auto": ["eval", artifact, "--set", good, "--backend", "jax", "--output", output],
        "mask seed must": ["eval", artifact, "--set", good, "--mask-seed", "-1", "--output", output],
        "is not a folder": ["eval", artifact, "--set", good, "--output", good],
        "empty.txt: no documents in it": [*train, f"data.train={folder / 'empty.txt'}"],
        "did you mean bert-tiny?": [*train, "model.architecture=bert-tyni"],
        "name the folder that `mlmkit eval` wrote": ["compare", artifact, artifact],
        "did you mean train.steps": ["train", folder / "bad.toml", "--output", output],
        "cannot be read": ["train", folder / "none.toml", "--output", output],
        "variant": ["score", artifact, good, "--pll", "l2r"],
        "too few to hold": ["demo", "--text", good, "--output", output],
    }


def test_mistakes_end_in_one_line_and_write_nothing(capsys, tmp_path, checkpoint, artifact):
    cases = mistakes(tmp_path, checkpoint("bert"), artifact("bert"))
    for message, arguments in cases.items():
        assert message in refusal(capsys, *arguments), arguments
        assert not (tmp_path / "out").exists(), arguments


def test_ranks_need_a_folder_to_share(capsys, monkeypatch, artifact):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "name one with --output" in refusal(capsys, "eval", artifact("bert"), "--set", "wikitext-2")


def test_overwriting_spares_what_is_not_its_own(capsys, tmp_path, checkpoint, artifact):
    (tmp_path / "text.txt").write_text("The statement of the text\nanother text\nand a third\n")
    copy = Path(shutil.copytree(checkpoint("bert"), tmp_path / "copy"))
    before = sorted(path.name for path in copy.iterdir())
    for arguments in (
        ["eval", artifact("bert"), "--set", tmp_path / "text.txt", "--output", copy, "--overwrite"],
        ["export", copy, "--output", copy, "--overwrite"],
    ):
        code, _, err = run(capsys, *arguments)
        assert (code, "leaves it alone" in err) == (2, True)
        assert sorted(path.name for path in copy.iterdir()) == before


def test_an_output_that_is_a_link_is_written_where_it_leads(capsys, tmp_path, artifact):
    (tmp_path / "text.txt").write_text("The statement of the text\nanother text\nand a third\n")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    arguments = ["eval", artifact("bert"), "--set", tmp_path / "text.txt", "--metric", "pseudo"]
    code, _, err = run(capsys, *arguments, "--output", tmp_path / "link")
    assert code == 0, err
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "result.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target", "text.txt"]


def test_scores_that_are_not_finite_are_not_shown(capsys, tmp_path, checkpoint):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(checkpoint("bert"), tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run(capsys, "fill", broken, "a [MASK]")
    assert (code, out, "not finite" in err) == (1, "", True)


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ('"$0" -m mlmkit score "$1" <(cat text.txt)', 0, ""),
        ('"$0" -m mlmkit eval "$1" --set <(cat text.txt)', 2, "is a pipe"),
        ('"$0" -m mlmkit score "$1" text.txt | true', 0, ""),
    ],
    ids=["scored", "not evaluated", "closed"],
)
def test_pipes(artifact, tmp_path, script, code, message):
    (tmp_path / "text.txt").write_text("The statement\n" * 3)
    command = ["bash", "-c", script, sys.executable, artifact("bert")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_extra_is_named(capsys, tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr("mlmkit.errors.find_spec", lambda name: None if name == "torch" else object())
    (tmp_path / "a.toml").write_text('[data]\ntrain = "a.txt"\n')
    for arguments in (
        ["train", tmp_path / "a.toml", "--output", tmp_path / "run"],
        ["export", checkpoint("bert"), "--output", tmp_path / "artifact"],
        ["fill", checkpoint("bert"), "a [MASK]"],
        ["demo", "--output", tmp_path / "demo"],
        ["average", checkpoint("bert"), checkpoint("bert"), "--output", tmp_path / "mean"],
    ):
        assert "pip install '.[train]' in a clone" in refusal(capsys, *arguments)


def test_a_missing_optimiser_is_named_before_the_text_is_read(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mlmkit.errors.find_spec", lambda name: None if name == "optimi" else object())
    (tmp_path / "a.toml").write_text('[data]\ntrain = "none.txt"\n[optim]\nname = "stable_adamw"\n')
    for arguments in (["--dry-run"], ["--output", tmp_path / "run"]):
        said = refusal(capsys, "train", tmp_path / "a.toml", *arguments)
        assert said == "mlmkit: optim.name: this needs optimi: pip install '.[stable-adamw]' in a clone of mlmkit\n"


def test_a_causal_or_headless_checkpoint_is_refused(capsys, tmp_path, checkpoint):
    from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=600, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert "no masked LM" in refusal(capsys, "fill", tmp_path / "gpt2", "a [MASK]")
    headless = Path(shutil.copytree(checkpoint("bert"), tmp_path / "headless"))
    AutoModel.from_pretrained(checkpoint("bert"), add_pooling_layer=False).save_pretrained(headless)
    assert "lacks weights" in refusal(capsys, "fill", headless, "a [MASK]")


def test_interrupting_says_so(capsys, monkeypatch, artifact):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlmkit.backends.load", interrupted)
    code, _, err = run(capsys, "fill", artifact("bert"), "a [MASK]")
    assert (code, err.strip()) == (130, "mlmkit: interrupted")


def test_demo_on_own_text_goes_the_whole_way(capsys, caplog, tmp_path, text_file, monkeypatch):
    """The whole demo, with ten small training steps instead of hundreds, and a short proof."""

    def short(text: Path) -> Config:
        config = demo_config(text)
        size = {"steps": 10, "save_every": 5, "global_batch_tokens": 512, "micro_batch_tokens": 512}
        return replace(config, train=replace(config.train, **size))

    output, text = tmp_path / "demo", tmp_path / "text.txt"
    text.write_text("".join(text_file.read_text(encoding="utf-8").splitlines(keepends=True)[:250]), encoding="utf-8")
    monkeypatch.setattr("mlmkit.demo.demo_config", short)
    monkeypatch.setattr("mlmkit.export.parity.MOST_TOKENS", 1024)
    code, out, err = run(capsys, "demo", "--text", text, "--output", output)
    assert code == 0, err
    assert "unigram entropy" in out
    assert "\n\nFinished in" in out and "\n\nTry next:" in out
    results = [json.loads((output / f"eval-{name}" / "result.json").read_text()) for name in ("checkpoint", "artifact")]
    assert results[0]["mask_digest"] == results[1]["mask_digest"]
    assert results[0]["model"]["fingerprint"] == results[1]["model"]["fingerprint"]
    assert results[0]["mask_digest"][:12] in out
    for part in ("run/model", "artifact", "eval-checkpoint/report.html"):
        assert str(output / part) in out
        assert (output / part).exists()
    train, heldout = ((output / name).read_text().splitlines() for name in ("train.txt", "heldout.txt"))
    assert not set(train) & set(heldout)

    with caplog.at_level("INFO", logger="mlmkit"):
        code, _, _ = run(capsys, "demo", "--text", text, "--output", output)
    assert code == 0
    assert "nothing to train" in caplog.text
    code, _, err = run(capsys, "demo", "--output", output)
    assert (code, "another" in err) == (2, True)


def test_json_leaves_standard_output_to_the_object(artifact, tmp_path):
    (tmp_path / "text.txt").write_text("The statement of the text\n" * 20)
    result = process("eval", artifact("bert"), "--set", tmp_path / "text.txt", "--json", "--metric", "pseudo")
    assert result.returncode == 0
    assert json.loads(result.stdout)["metrics"]["pseudo_perplexity"]["value"] > 1
    assert result.stderr == ""
