"""Limits on what an untrusted model folder may ask for, checked before a library reads it.

Each function raises `UserError` for what exceeds its limit; malformed files may raise any `Exception`.
"""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError

READ = re.compile(
    r"tokenizer.*|.*(config|vocab|merges|special_tokens|added_tokens).*|.*\.(index\.json|model|jinja|codes)|word_.*\.json"
)
# Trained models have at most about 200 layers and 22,000 labels; each costs time and memory before weights are read.
COUNT = re.compile("(^n_|.*num).*(layer|group|block|expert|network|stage)|.*layers$")
MOST = ((COUNT, 1000), (re.compile(".*labels"), 1 << 20))
# These make transformers read files or run code that were not checked.
REFUSED = re.compile("quantization_config|configuration_files|fast_tokenizer_files")
# Steps that lengthen a text no more than Unicode normalisation does; any other step is assumed to double it.
KEEP_LENGTH = re.compile("NFK?[CD]|Nmt|Lowercase|Strip.*|Bert.*|White.*|.*Split|Punct.*|Digits|Fixed.*|Fuse|Byte.*k")
# The highest known is 72, XLM-R's: "ﷺ" becomes 18 characters, spaces are replaced (x 2) and marked (x 2).
MOST_GROWTH = 256
MOST_IDS = 1 << 24  # ranks are exact up to here; the tokenizers library allocates a table up to the largest id


def check_folder(folder: Path) -> dict[str, Any]:
    """Check the size of every file that a loader may read, and return the content of `config.json`, or {}."""
    for path in folder.iterdir():
        most = largest_file(path.name)
        if READ.fullmatch(path.name) and not path.is_dir() and not (path.is_file() and path.stat().st_size <= most):
            raise UserError(f"{path.name} must be a file of at most {most >> 20} MiB")
    if (folder / "adapter_config.json").exists():
        raise UserError("it is an adapter (adapter_config.json): merge it into the model, and save that")
    if (folder / "tokenizer_config.json").is_file():
        read_config(folder / "tokenizer_config.json")
    return read_config(folder / "config.json") if (folder / "config.json").is_file() else {}


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration of transformers. Also raises `OSError` and `ValueError` if it cannot be read."""
    most, entries = largest_file("config"), []
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path.name} is larger than {most >> 20} MiB, the limit for a configuration")
    config = json.loads(content, object_pairs_hook=lambda pairs: entries.extend(pairs) or dict(pairs))
    for key, value in entries:
        if (REFUSED.fullmatch(key) and value) or (key.endswith("_implementation") and "/" in str(value)):
            raise UserError(f"its configuration has {key}, which mlmkit does not accept: save the model without it")
        if isinstance(value, int) and any(pattern.match(key) and value > most for pattern, most in MOST):
            raise UserError(f"its configuration asks for {value} {key}, more than any known model")
    return config


def largest_file(name: str) -> int:
    """Return how many bytes a file may have, if it holds no weights."""
    # The largest known tokenizer.json has 60 MB, the largest configuration (labels, templates) about 3.
    return 16 << 20 if "config" in name else 128 << 20


def weight_names(folder: Path, usual: str, config: dict[str, Any]) -> list[str]:
    """Return the files in the folder, of the type of the `usual` one, from which transformers will load the weights."""
    index, kind = folder / f"{usual}.index.json", usual.partition(".")[2]
    names = [config.get("transformers_weights") or usual]
    if names == [usual] and not (folder / usual).exists() and index.exists():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    for name in names:
        if not re.fullmatch(rf"[^/\\:]+\.{kind}", name):
            raise UserError(f"the weights would be read from {name!r}, which is not a {kind} file in the folder")
    return names


def check_tokenizer(values: dict[str, Any]) -> None:
    """Refuse a `tokenizer.json` that expands text so far, or has ids so large, that memory would run out."""
    vocabulary = values["model"]["vocab"]  # a list for Unigram models
    if isinstance(vocabulary, dict) and (last := max(vocabulary.values(), default=0)) > MOST_IDS:
        raise UserError(f"its tokenizer has ids up to {last}, above the limit of {MOST_IDS}")
    grown = _growth(values.get("normalizer")) * _growth(values.get("pre_tokenizer"))
    worst = max(grown, _growth(values.get("post_processor")), _growth(values.get("decoder")))
    added = sum(len(token["content"]) for token in values.get("added_tokens") or ())
    if max(worst, added * grown / 262_144) > MOST_GROWTH:  # 64 Mi characters in added tokens; real ones have 100,000
        raise UserError(
            f"its tokenizer turns one character into up to {worst:.4g} (limit {MOST_GROWTH}), and has {added:,} "
            "characters in added tokens"
        )


def _growth(step: Any) -> float:
    """Bound the characters per character of a normalizer, pre-tokenizer or decoder, or a post-processor's tokens."""
    if not isinstance(step, dict):
        return 1.0
    for key in step.keys() & {"normalizers", "pretokenizers", "processors", "decoders"}:  # "type" is optional
        return math.prod(map(_growth, step[key]), start=1.0)
    if "single" in step:  # a template
        tokens = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        return 0.0 + sum(tokens.get(piece.get("SpecialToken", {}).get("id"), 1) for piece in step["single"])
    if "precompiled_charsmap" in step:  # its size, a trie, and the replacements
        content = base64.b64decode(step["precompiled_charsmap"])
        replacements = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
        return max(1.0, *(len(each.decode("utf-8", "replace")) for each in replacements))
    if "pattern" in step and "content" in step:  # Replace; a regular expression may match between any two characters
        replaced = len(step["pattern"].get("String", ""))
        return max(1.0, len(step["content"]) / replaced) if replaced else 1.0 + len(step["content"])
    return 1.0 + len(step.get("prepend", "" if KEEP_LENGTH.fullmatch(str(step.get("type"))) else " "))
