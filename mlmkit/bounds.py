"""Bounds on what a stranger's model folder may ask for, checked before a library reads it.

Each function raises `UserError` for what is beyond its bound; garbage may raise any `Exception`.
"""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError

READ = re.compile(r"tokenizer.*|.*(config|vocab|merges|special_tokens|added_tokens).*|.*\.(index\.json|model|jinja)")
# Nothing trained has more than some 200 layers or 22,000 labels; each costs time and memory before a weight is read.
COUNT = re.compile("(^n_|.*num).*(layer|group|block|expert|network|stage)|.*layers$")
MOST = ((COUNT, 1000), (re.compile(".*labels"), 1 << 20))
# They make transformers read other files, or run other code, than what is checked.
REFUSED = re.compile("quantization_config|configuration_files|fast_tokenizer_files")
# Steps that lengthen no text beyond what Unicode does to a character; others not known here may double it.
KEEP_LENGTH = re.compile("NFK?[CD]|Nmt|Lowercase|Strip.*|Bert.*|White.*|.*Split|Punct.*|Digits|Fixed.*|Fuse|Byte.*k")
# 72 is the highest known, XLM-R's: "ﷺ" becomes 18 characters, spaces are replaced (2) and marked (2).
MOST_GROWTH = 256
MOST_IDS = 1 << 24  # ranks are exact up to there; the tokenizers library makes a table of every id that there may be


def check_folder(folder: Path) -> dict[str, Any]:
    """What `config.json` holds, {} without one, once the size of every file that a loader may read is checked."""
    for path in folder.iterdir():
        most = largest_file(path.name)
        if READ.fullmatch(path.name) and not path.is_dir() and not (path.is_file() and path.stat().st_size <= most):
            raise UserError(
                f"{path.name} is no file of at most {most >> 20} MiB, which it is in every model known to us"
            )
    if (folder / "adapter_config.json").exists():
        raise UserError("it holds an adapter (adapter_config.json): merge it into the model, and save that")
    if (folder / "tokenizer_config.json").is_file():
        read_config(folder / "tokenizer_config.json")
    return read_config(folder / "config.json") if (folder / "config.json").is_file() else {}


def read_config(path: Path) -> dict[str, Any]:
    """What a configuration of transformers holds. Raises `OSError` and `ValueError` too, for what cannot be read."""
    most, entries = largest_file("config"), []
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path.name} has more than {most >> 20} MiB, which no configuration has")
    config = json.loads(content, object_pairs_hook=lambda pairs: entries.extend(pairs) or dict(pairs))
    for key, value in entries:
        if (REFUSED.fullmatch(key) and value) or (key.endswith("_implementation") and "/" in str(value)):
            raise UserError(f"its configuration has {key}, which mlmkit does not take: save the model without it")
        if isinstance(value, int) and any(pattern.match(key) and value > most for pattern, most in MOST):
            raise UserError(f"its configuration asks for {value} {key}, more than any model known to us has")
    return config


def largest_file(name: str) -> int:
    """How many bytes a file may have that is no weights, and is read at once."""
    # The largest tokenizer.json known to us has 60 MB, the largest configuration (labels, templates) about 3.
    return 16 << 20 if "config" in name else 128 << 20


def weight_names(folder: Path, config: dict[str, Any]) -> list[str]:
    """The files that transformers will take the weights from: safetensors files of the folder, or links there."""
    index = folder / "model.safetensors.index.json"
    names = [config.get("transformers_weights") or "model.safetensors"]
    if names == ["model.safetensors"] and not (folder / names[0]).exists() and index.exists():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    for name in names:
        if not re.fullmatch(r"[^/\\:]+\.safetensors", name):
            raise UserError(f"the weights are to be read from {name!r}, which is no safetensors file of the folder")
    return names


def check_tokenizer(values: dict[str, Any]) -> None:
    """Refuse a `tokenizer.json` that makes so much of a text, or of its ids, that memory would run out."""
    vocabulary = values["model"]["vocab"]  # of a Unigram model a list
    if isinstance(vocabulary, dict) and (last := max(vocabulary.values(), default=0)) > MOST_IDS:
        raise UserError(f"its tokenizer has ids up to {last}, and at most {MOST_IDS} is taken")
    grown = _growth(values.get("normalizer")) * _growth(values.get("pre_tokenizer"))
    worst = max(grown, _growth(values.get("post_processor")), _growth(values.get("decoder")))
    added = sum(len(token["content"]) for token in values.get("added_tokens") or ())
    if max(worst, added * grown / 262_144) > MOST_GROWTH:  # 64 Mi characters of added tokens; real ones have 100,000
        raise UserError(f"its tokenizer makes up to {worst:.4g} characters of one, beside {added:,} of added tokens")


def _growth(step: Any) -> float:
    """How many characters may come of one, in a normalizer, pre-tokenizer or decoder; tokens, in a post-processor."""
    if not isinstance(step, dict):
        return 1.0
    for key in step.keys() & {"normalizers", "pretokenizers", "processors", "decoders"}:  # the type may be left out
        return math.prod(map(_growth, step[key]), start=1.0)
    if "single" in step:  # a template
        tokens = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        return 0.0 + sum(tokens.get(piece.get("SpecialToken", {}).get("id"), 1) for piece in step["single"])
    if "precompiled_charsmap" in step:  # a trie behind its size, and what it leads to
        content = base64.b64decode(step["precompiled_charsmap"])
        spelled = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
        return max(1.0, *(len(each.decode("utf-8", "replace")) for each in spelled))
    if "pattern" in step and "content" in step:  # Replace; an expression may match between any two characters
        replaced = len(step["pattern"].get("String", ""))
        return max(1.0, len(step["content"]) / replaced) if replaced else 1.0 + len(step["content"])
    return 1.0 + len(step.get("prepend", "" if KEEP_LENGTH.fullmatch(str(step.get("type"))) else " "))
