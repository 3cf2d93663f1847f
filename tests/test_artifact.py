"""Artifacts that refuse to lie: a changed file, a fuzzed manifest, weights and names that lead elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import edit_record
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import random_batch

from mlmkit.artifact import FILE_NAME, MANIFEST, Manifest, hash_files, parse_manifest, read_manifest, write_manifest
from mlmkit.backends import load
from mlmkit.errors import CheckError, UserError
from mlmkit.files import sealed


def change(folder: Path, **values: object) -> None:
    edit_record(folder / MANIFEST, **values)


def rehash(folder: Path) -> None:
    """Make the manifest tell the truth about files that were changed."""
    change(folder, files=hash_files(folder))


def refused(folder: Path) -> str:
    """The message, one line of a bearable length, with which loading refuses the folder."""
    with pytest.raises(UserError) as error:
        load(str(folder), device="cpu")
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_changed_or_missing_file_is_refused(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert re.search(f"{name} is not the file that was exported.*mlmkit export", refused(copy))
    (copy / name).unlink()
    assert f"{name} is missing" in refused(copy)


@pytest.mark.parametrize(
    "values",
    [
        {"format": 1}, {"format": None}, {"top_k": "100"}, {"max_length": -1}, {"vocabulary_size": True}, {"files": {}},
        {"files": []}, {"files": {"model.onnx": 3}}, {"parity": None},
        "", "[]", "{", '"text"', "[" * 100_000, '{"format": 1}',
    ],
)  # fmt: skip
def test_a_wrong_or_broken_manifest_is_refused(copy, values):
    if isinstance(values, str):
        (copy / MANIFEST).write_text(values)
    else:
        change(copy, **values)
    assert "mlmkit export" in refused(copy)


def test_a_manifest_that_promises_too_much_is_refused(copy):
    change(copy, top_k=200)
    with pytest.raises(UserError, match="gives 100 candidates"):
        load(str(copy)).score(random_batch(1, 5, 1))
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({known: value for known, value in values.items() if known != key}))
    rehash(copy)
    change(copy, top_k=100, max_length=128)
    with pytest.raises(CheckError, match=r"ONNX Runtime failed on a batch of shape \(1, 100\)"):
        load(str(copy)).score(random_batch(1, 100, 1))


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../config.json", "a/b", "/etc/passwd", "a\\b", "C:config.json", "config.json:stream", "CON",
        "nul.txt", "Com1.bin", "name.", "name ", " name", ".hidden", "a\0b", "a\nb", "a\x1b[31mb", "\u202ea",
        "caf\u00e9", "\ud800", "\udcff", "MODEL.ONNX", "mlmkit.json", "MLMKIT.json", "x" * 129, "~", "-rf", "\u017fa",
    ],
)  # fmt: skip
def test_a_name_that_is_no_plain_file_is_refused(copy, name):
    files = json.loads((copy / "mlmkit.json").read_text())["files"]
    change(copy, files={**files, name: files["config.json"]})
    refused(copy)


def test_the_names_that_exports_write_are_taken():
    names = "model.onnx model.onnx.data model.plan special_tokens_map.json vocab.txt sentencepiece.bpe.model merges.txt"
    assert all(FILE_NAME.fullmatch(name) for name in [*names.split(), "added_tokens.json", "chat_template.jinja", "a"])


@pytest.mark.parametrize("make", ["folder", "link", "broken link", "pipe", "device"])
def test_what_is_not_a_plain_file_is_refused_at_once(copy, make):
    path = copy / "config.json"
    content = path.read_bytes()
    path.unlink()
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    else:
        (copy.parent / "config.json").write_bytes(content)
        path.symlink_to({"link": "../config.json", "broken link": "nowhere", "device": "/dev/zero"}[make])
    assert "config.json is not a plain file" in refused(copy)


@pytest.mark.parametrize("name", ["README.md", ".git", "notes", "tokenizer.model", "\x1b[31m"])
def test_files_that_are_not_listed_are_left_alone(copy, name):
    (copy / name).write_text("anything")
    batch = random_batch(1, 5, 2)
    assert len(load(str(copy)).score(batch).log_prob) == 2
    assert (name in hash_files(copy)) == (name != "README.md")


# ------------------------------------------------------------------ weights beside the graph


def external(folder: Path, location: str) -> None:
    """Move one weight of the graph to model.onnx.data, but name `location` in the graph. List every file."""
    import onnx
    from onnx.external_data_helper import set_external_data

    model = onnx.load(folder / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (folder / "model.onnx.data").write_bytes(largest.raw_data)
    set_external_data(largest, location, 0, len(largest.raw_data))
    largest.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rehash(folder)


def test_weights_beside_the_graph_are_loaded_and_held_to_their_hash(copy, artifact):
    external(copy, "model.onnx.data")
    batch = random_batch(3, 9, 5)
    expected, scored = load(str(artifact("bert"))).score(batch), load(str(copy)).score(batch)
    np.testing.assert_allclose(scored.log_prob, expected.log_prob, atol=1e-6, rtol=0)
    weights = bytearray((copy / "model.onnx.data").read_bytes())
    weights[100] ^= 1
    (copy / "model.onnx.data").write_bytes(weights)
    assert "model.onnx.data is not the file that was exported" in refused(copy)


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/hostname", "", "missing", "sub/../../secret", "*/_ORT_MEM_ADDR_/*", "secret\0", "C:\\secret",
     "\x1b[31m", "link"],
)  # fmt: skip
def test_weights_from_outside_the_folder_are_refused(copy, tmp_path, location):
    external(copy, location)
    (tmp_path / "secret").write_bytes((copy / "model.onnx.data").read_bytes())
    (copy / "sub").mkdir()
    (copy / "link").symlink_to("../secret")
    assert "ONNX Runtime cannot load it" in refused(copy)


@pytest.mark.parametrize("location", ["model.onnx.data", "mlmkit.json", "config.json"])
def test_a_graph_reads_no_file_where_the_manifest_lists_no_weights(copy, location):
    external(copy, location)
    files = hash_files(copy)
    del files["model.onnx.data"]
    change(copy, files=files)
    assert "ONNX Runtime cannot load it" in refused(copy)


def test_a_link_to_weights_is_refused(copy, tmp_path):
    external(copy, "model.onnx.data")
    (copy / "model.onnx.data").rename(tmp_path / "weights")
    (copy / "model.onnx.data").symlink_to("../weights")
    assert "model.onnx.data is not a plain file" in refused(copy)


MUTATE = """
import random, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from mlmkit.artifact import hash_files, parse_manifest, write_manifest
from mlmkit.backends import Batch, load
from mlmkit.errors import CheckError, UserError

folder, generator, refused = Path(sys.argv[1]), random.Random(0), 0
original, manifest = (folder / "model.onnx").read_bytes(), parse_manifest(folder)
ids = np.arange(5, 25).reshape(2, 10)
batch = Batch(ids, np.ones_like(ids), np.array([1, 5, 12]), np.array([7, 8, 9]))
for _ in range(60):
    content = bytearray(original)
    for _ in range(generator.choice([1, 4, 20])):
        start = generator.randrange(len(content))
        content[start : start + generator.choice([0, 1, 1, 3])] = generator.randbytes(generator.choice([0, 1, 1, 2]))
    (folder / "model.onnx").write_bytes(content)
    write_manifest(folder, replace(manifest, files=hash_files(folder)))
    try:
        load(str(folder), device="cpu").score(batch)
    except (UserError, CheckError) as error:
        refused += 1
        assert len(str(error).splitlines()) == 1
print(refused)
"""


def test_a_mutated_graph_under_a_true_hash_is_refused_or_runs(copy):
    """In a process of its own, because ONNX Runtime itself parses these bytes."""
    done = subprocess.run([sys.executable, "-c", MUTATE, copy], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 5 < int(done.stdout) <= 60  # and nothing else is on standard output


# ------------------------------------------------------------------ other contents under true hashes


def special(tokenizer: dict[str, Any]) -> dict[str, Any]:
    return tokenizer["post_processor"]["special_tokens"]


TOO_MANY_IDS = "the tokenizer has ids up to 600 but the model's vocabulary has 600"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tokenizer: tokenizer["model"]["vocab"].update(another=600), TOO_MANY_IDS),
        (lambda tokenizer: special(tokenizer)["[CLS]"].update(ids=[600]), TOO_MANY_IDS),
        (lambda tokenizer: special(tokenizer).clear(), "the tokenizer cannot be read"),  # makes the library panic
    ],
)
def test_a_tokenizer_of_another_model_is_refused(copy, spoil, message):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    spoil(tokenizer)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(copy)
    assert message in refused(copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", content) for content in
     ('{"vocab_size": 601}', '{"vocab_size": "600"}', "[]", "{", "\xff", "[" * 99_999)]
    + [("tokenizer_config.json", content) for content in
       ("{}", "[]", '{"mask_token": {}}', '{"mask_token": "nowhere"}', "{", "null")],
)  # fmt: skip
def test_an_odd_configuration_is_refused(copy, name, content):
    (copy / name).write_bytes(content.encode("latin-1"))
    rehash(copy)
    assert {"config.json": "config.json", "tokenizer_config.json": "tokeni"}[name] in refused(copy)


@pytest.mark.parametrize(("part", "name"), [("input", "targets"), ("output", "rank")])
def test_a_graph_of_another_contract_is_refused(copy, part, name):
    import onnx

    model = onnx.load(copy / "model.onnx")
    next(item for item in getattr(model.graph, part) if item.name == name).name = "other"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["other" if known == name else known for known in names]
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    rehash(copy)
    assert f"does not have the {part}s" in refused(copy)


# ------------------------------------------------------------------ any manifest at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
JUNK: list[Any] = [None, True, 0, -1, 2.5, 1e308, 10**30, 1 << 31, "", "x" * 9999, "\ud800", "\x1b[0m", [], {}, [[]]]


def outcome(folder: Path, content: bytes) -> Manifest | None:
    """The manifest, or None if it was refused in one line; anything else fails the test."""
    (folder / MANIFEST).write_bytes(content)
    try:
        return parse_manifest(folder)
    except UserError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 600
        return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(deadline=None)
@given(content=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_in_one_line(content, scratch):
    assert outcome(scratch, content) is None


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_manifest_is_refused_or_sound(data, scratch, artifact):
    valid: dict[str, Any] = json.loads((artifact("bert") / MANIFEST).read_text())
    valid["tensorrt"] = {
        "flavour": "tensorrt_rtx", "version": "1.7", "targets": ["8.9", "12.0+"], "gpu": "H100",
        "parity": {"bound": 1.0}, "layers": {"latency": {"fp32": 3}},
        "fused_attention": {"latency": 2}, "scratch_mib": {"latency": 1.5},
        "profiles": [{"name": "latency", "batch": [1, 1, 2], "seq": [1, 8, 64], "masked": [1, 2, 3]}],
    }  # fmt: skip
    valid["files"]["model.plan"] = "0" * 64
    del valid["checksum"]
    assert outcome(scratch, json.dumps(sealed(valid)).encode())
    place: Any = valid
    while data.draw(st.booleans()) and (keys := list(place if isinstance(place, dict) else range(len(place)))):
        inner = place[data.draw(st.sampled_from(keys))]
        if not isinstance(inner, dict | list):
            break
        place = inner
    change = data.draw(st.sampled_from(["replace", "remove", "add", "bytes"]))
    value = data.draw(st.sampled_from(JUNK) | json_values)
    keys = list(place if isinstance(place, dict) else range(len(place)))
    if change == "add" and isinstance(place, dict):
        place[data.draw(st.text(max_size=10))] = value
    elif keys and change == "remove":
        del place[data.draw(st.sampled_from(keys))]
    elif keys:
        place[data.draw(st.sampled_from(keys))] = value
    content = bytearray(json.dumps(sealed(valid)).encode())
    if change == "bytes":
        place, value = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
        whole = outcome(scratch, bytes(content))
        content[place] = value
        assert outcome(scratch, bytes(content)) in (None, whole)  # another space may stand between two values
    found = outcome(scratch, bytes(content))
    if found:  # then it can be used: numbers are counts, strings can be shown, and it can be written again
        assert all(0 < value < 1 << 31 for value in (found.vocabulary_size, found.max_length, found.opset, found.top_k))
        write_manifest(scratch, found)
        assert parse_manifest(scratch) == found


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace('"masked"', '"x": NaN, "masked"'),
        lambda text: text.replace('"masked"', '"x": 1e999, "masked"'),
        lambda text: text.replace('"masked"', '"x": 1' + "0" * 5000 + ', "masked"'),
        lambda text: text.replace('"masked"', '"x": ' + "[" * 20 + "]" * 20 + ', "masked"'),
        lambda text: text.replace('"calibration": null', '"calibration": {"text": "\\u001b[31m"}'),
        lambda text: text.replace('"bert"', '"\\u202ebert"'),
        lambda text: text + " " * (65 << 20),
        lambda text: text.replace('"fp32"', '"fp64"'),
        lambda text: text + "{}",
    ],
)
def test_what_json_would_let_pass_is_refused(artifact, scratch, spoil):
    text = (artifact("bert") / MANIFEST).read_text()
    assert outcome(scratch, text.encode())
    spoiled = spoil(text)
    assert spoiled != text
    assert outcome(scratch, spoiled.encode()) is None
    assert outcome(scratch, text.replace('"bert"', '"b\xe9rt"').encode("latin-1")) is None


def test_a_manifest_that_could_not_be_read_is_not_written(artifact, tmp_path):
    from dataclasses import replace

    manifest = read_manifest(artifact("bert"))
    with pytest.raises(CheckError, match="not finite"):
        write_manifest(tmp_path, replace(manifest, parity={"max_log_prob_difference": float("nan")}))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ others' conventions


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_transformers_reads_the_tokenizer_and_the_configuration(kind, artifact):
    from transformers import AutoConfig, AutoTokenizer

    ours, theirs = load(str(artifact(kind))).tokenizer, AutoTokenizer.from_pretrained(artifact(kind))
    assert theirs("O rato roeu a roupa.")["input_ids"] == ours.encode_control("O rato roeu a roupa.").ids
    assert (theirs.mask_token_id, theirs.pad_token_id) == (ours.mask_id, ours.pad_id)
    assert AutoConfig.from_pretrained(artifact(kind)).vocab_size == 600
