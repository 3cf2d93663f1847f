"""What mlmkit writes is the same to transformers 4.57 and 5: tokenizers, configurations, logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loaded
import numpy as np
import pytest
from test_tokenizer import CLEANED, KINDS, _unigram, _wordpiece
from training import write_config
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    CamembertTokenizer,
    DebertaTokenizer,
    DebertaV2Tokenizer,
    LukeTokenizer,
    RemBertTokenizer,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from mlmkit.average import average
from mlmkit.pretrained import load_tokenizer, save_config, save_tokenizer
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import saved_checkpoints
from mlmkit.train.loop import train

FAMILIES = ("bert", "roberta", "distilbert", "modernbert")


def model_of(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def class_tokenizers() -> dict[str, Callable[[], Any]]:
    """Tokenizers of the architectures' own classes."""
    vocab, bpe = model_of(_wordpiece(lowercase=False))["vocab"], model_of(KINDS["byte-level"]())
    merges = [tuple(pair) for pair in bpe["merges"]]
    pieces: Any = [tuple(piece) for piece in model_of(_unigram())["vocab"]]
    byte_level = {"vocab": bpe["vocab"], "merges": merges}
    return {
        "BERT uncased": lambda: BertTokenizer(vocab=vocab, do_lower_case=True, strip_accents=False),
        "BERT cased": lambda: BertTokenizer(vocab=vocab, do_lower_case=False, extra_special_tokens=["[X]"]),
        "RoBERTa": lambda: RobertaTokenizer(**byte_level),
        "RoBERTa, prefix": lambda: RobertaTokenizer(**byte_level, add_prefix_space=True),
        "DeBERTa": lambda: DebertaTokenizer(**byte_level),
        "LUKE": lambda: LukeTokenizer(**byte_level),
        "XLM-R": lambda: XLMRobertaTokenizer(vocab=pieces),
        "CamemBERT": lambda: CamembertTokenizer(vocab=pieces),
        "DeBERTa-v2": lambda: DebertaV2Tokenizer(vocab=pieces),
        "RemBERT": lambda: RemBertTokenizer(vocab=pieces),
    }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Of every kind: the folder that transformers writes, and ours."""
    folders = {}
    for kind, make in (KINDS | CLEANED | class_tokenizers()).items():
        if not kind.startswith("real"):  # 30,000 entries, and no other class
            folders[kind] = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("ours")
            make().save_pretrained(folders[kind][0])
            save_tokenizer(AutoTokenizer.from_pretrained(folders[kind][0]), folders[kind][1])
    return folders


@pytest.fixture(scope="module")
def models(tmp_path_factory, text_file, checkpoint, artifact) -> dict[str, Path]:
    """A trained model of each family that has a preset, ModernBERT with other bases, an average, and an artifact."""
    folders = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        settings = [f"model.init_from={checkpoint(family)}", "optim.lr=1e-4", "train.steps=2"]
        settings += ["model.rope_theta=500"] if family == "modernbert" else []
        train(write_config(folder, text_file, "", *settings), folder / "run")
        folders[family] = folder / "run" / "model"
    model = folders["modernbert"]
    average([str(model), str(model)], model.parent / "average")
    last = saved_checkpoints(model.parent)[-1]
    return folders | {"checkpoint": last, "average": model.parent / "average", "artifact": artifact("roberta")}


@pytest.fixture(scope="module")
def in_version_4(transformers4, tokenizers, models) -> dict[str, dict[str, Any]]:
    """What transformers 4 makes of all of them, in one process."""
    folders = {kind: ours for kind, (_, ours) in tokenizers.items()} | models
    described = transformers4(Path(loaded.__file__).read_text(encoding="utf-8"), *folders.values())
    return dict(zip(folders, described, strict=True))


def in_version_5(folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(loaded.describe(folder)))


def test_tokenizers_are_the_same(tokenizers, in_version_4):
    for kind, (_, ours) in tokenizers.items():
        assert in_version_5(ours) == in_version_4[kind], kind


def test_models_have_the_same_logits(models, in_version_4):
    for name, folder in models.items():
        new, old = in_version_5(folder), in_version_4[name]
        logits = [values.pop("logits", [0.0]) for values in (new, old)]
        assert new == old, name
        assert np.ptp(logits[0]) > 3 or name == "artifact"  # so sharp that another rotary base or window shows
        np.testing.assert_allclose(*logits, atol=1e-5, err_msg=name)


def test_transformers_5_reads_what_it_read_before(tokenizers):
    """The class, whose code changes what it loads, is left out; what it had loaded is in the folder."""
    for kind, (theirs, ours) in tokenizers.items():
        assert in_version_5(ours) == in_version_5(theirs), kind
        assert load_tokenizer(str(ours)).fingerprint == load_tokenizer(str(theirs)).fingerprint, kind
        assert Tokenizer.from_folder(ours).fingerprint == load_tokenizer(str(ours)).fingerprint, kind


@pytest.mark.parametrize(("layers", "every"), [("ff", 1), ("fsfsf", 2), ("fss", 3), ("ffs", 0), ("ss", 0)])
def test_the_distance_of_global_layers_is_written(tmp_path, layers, every):
    """At 0, transformers 4 fails: it could not have these layers."""
    kinds = [{"f": "full_attention", "s": "sliding_attention"}[kind] for kind in layers]
    save_config(AutoConfig.for_model("modernbert", num_hidden_layers=len(kinds), layer_types=kinds), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["global_attn_every_n_layers"] == every
    assert AutoConfig.from_pretrained(tmp_path).layer_types == kinds


def test_scaled_positions_are_not_for_transformers_4(tmp_path):
    """It would ignore the scale; at 0 it fails."""
    rope = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 160_000.0}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 10_000.0}
    save_config(AutoConfig.for_model("modernbert", rope_parameters=rope), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["global_attn_every_n_layers"] == 0
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope
