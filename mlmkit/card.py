"""The model card, README.md, that the Hugging Face Hub shows for a checkpoint or an artifact.

model ────> weights, tokenizer, training run ─┐
results ──> metrics with their intervals ─────┼──> front matter and body ──> README.md, which ends with its own digest
text ─────> an example: a sentence ───────────┘
"""

import json
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mlmkit.artifact import CARD, FLAVOURS, Manifest, is_artifact, report_rows
from mlmkit.backends import ModelInfo
from mlmkit.backends.protocol import open_artifact
from mlmkit.documents import read_documents
from mlmkit.errors import UserError, as_user_error, require
from mlmkit.eval.result import Metric, Result
from mlmkit.eval.results_store import load_result
from mlmkit.export.parity import DOCUMENTS, held_out_text
from mlmkit.files import RUN, file_sha256, locate_model, read_record, write_text
from mlmkit.hub import HUB
from mlmkit.locations import Source
from mlmkit.overlap import run_of, training_texts
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
SEAL = "\n<!-- mlmkit card: "
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n")
WORDS = range(5, 26)  # of a sentence that makes a good example
BEGINNING = 10_000  # characters of a document among which an example is looked for
CHECKPOINT = re.compile(r"model|step-\d{8}")  # of a run
UNPUBLISHED = ("optimizer*", "trainer.json", "held-out*")  # what a run's checkpoint holds besides the model


@dataclass(frozen=True)
class Card:
    """What `write_card` wrote: its `path`, the example with a mask ("" if none), the `command` that publishes both."""

    path: Path
    example: str
    command: str


@dataclass(frozen=True)
class _Model:
    """What the card describes: an artifact, with its `manifest`, or a checkpoint, with the `run` that trained it."""

    folder: Path
    info: ModelInfo
    tokenizer: Tokenizer
    weights: int = 0
    manifest: Manifest | None = None
    run: Path | None = None


def write_card(
    model: str,
    *,
    license: str | None = None,
    languages: Sequence[str] = (),
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    results: Sequence[Path] = (),
    text: Source | None = None,
    overwrite: bool = False,
) -> Card:
    """Write the README.md of a run's model, a checkpoint or an artifact. It is not hashed, so its owner may edit it.

    `results` are folders that `mlmkit eval` wrote; the evaluations that training made of these weights are added. The
    example is a sentence of `text`, by default of the run's held-out text. Raises `UserError` for a model that cannot
    be read, a result of other weights, names that the Hub does not take, and, unless `overwrite` is set, a README.md
    that is not as mlmkit wrote it.
    """
    _check("--license", [license], LICENSE, "an identifier of the Hub, such as apache-2.0")
    _check("--language", languages, LANGUAGE, "an ISO 639 code without a country, such as pt")
    _check("--dataset", datasets, REPOSITORY, "a name on the Hub, USER/NAME")
    _check("--base-model", [base_model], REPOSITORY, "a name on the Hub, USER/NAME")
    folder = Path(locate_model(model))
    if not folder.is_dir():
        raise UserError(f"{model} is not a folder: download the model first, hf download {model} --local-dir FOLDER")
    path = folder / CARD
    if path.exists() and not overwrite and not _is_sealed(path.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{path} is not as mlmkit wrote it: replace it with --overwrite")
    subject = _open(folder)
    measured = {each.resolve(): load_result(each).result for each in results}
    for result in measured.values():
        if result["model"]["fingerprint"] != subject.info.fingerprint:
            raise UserError(f"the result of {result['model']['path']} was not measured on the weights of {model}")
    shown = [*(_held_out_results(subject) | measured).values()]
    text = text or (held_out_text(folder.resolve()) if subject.run else None)
    example, sentence = find_example(text, subject.tokenizer, subject.info) if text else ("", "")
    began_elsewhere = any(phase["model"]["init_from"] for phase in _phases(subject))
    given = {"license": license, "language": languages, "dataset": datasets, "text": example}
    given |= {"base-model": base_model} if began_elsewhere else {}
    if missing := [f"--{name}" for name, value in given.items() if not value]:
        log.warning("the Hub will miss what %s would say", ", ".join(missing))
    front = {
        "language": [*languages],
        "license": license,
        "library_name": "mlmkit" if subject.manifest else "transformers",
        "pipeline_tag": "fill-mask",
        "mask_token": subject.tokenizer.mask_token,
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model and subject.info.precision != "fp32" else "",
        "datasets": [*datasets],
        "tags": _tags(subject),
        "widget": [{"text": example}] if example else [],
        "model-index": _model_index((subject.run or folder).resolve().name, shown),
    }
    usage = _usage(subject, base_model, example, sentence)
    body = [usage, _metrics(shown), _training(subject), _parity(subject), _digests(subject)]
    _write(path, front, "\n".join(filter(None, body)))
    excluded = [f"--exclude={pattern}" for pattern in UNPUBLISHED if any(folder.glob(pattern))]
    return Card(path, example, shlex.join(["hf", "upload", "USER/NAME", str(folder), *excluded]))


def _check(option: str, values: Iterable[str | None], pattern: re.Pattern[str], kind: str) -> None:
    if wrong := [value for value in values if value is not None and not pattern.fullmatch(value)]:
        raise UserError(f"{option} {wrong[0]!r}: give {kind}")


def _open(folder: Path) -> _Model:
    if is_artifact(folder):
        manifest, _, tokenizer, info = open_artifact(str(folder))
        return _Model(folder, info, tokenizer, manifest=manifest)
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.backends.torch import TorchBackend

    backend = TorchBackend(str(folder), "cpu")
    weights = sum(weight.numel() for weight in backend.model.parameters())
    is_of_run = CHECKPOINT.fullmatch(folder.resolve().name)  # other folders inside a run may hold any model
    return _Model(folder, backend.info, backend.tokenizer, weights, run=run_of(folder) if is_of_run else None)


def _write(path: Path, front: Mapping[str, Any], body: str) -> None:
    """Write the card atomically, after the Hub's own library has read it. Raises `UserError` if it cannot."""
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import yaml_dump

    yaml = yaml_dump({name: value for name, value in front.items() if value}, sort_keys=False, width=1 << 16)
    text = f"---\n{yaml}---\n\n{body}"
    with as_user_error(path, "the Hub would not read it"):
        ModelCard(text)
    write_text(path, f"{text}{SEAL}{sha256(text.encode()).hexdigest()} -->\n")


def _is_sealed(text: str) -> bool:
    """Whether a card is what `_write` wrote, without an edit."""
    content, _, seal = text.rpartition(SEAL)
    return seal == f"{sha256(content.encode()).hexdigest()} -->\n"


# ---------------------------------------------------------------- the example, and what shows it


def find_example(text: Source, tokenizer: Tokenizer, info: ModelInfo) -> tuple[str, str]:
    """The first sentence that suits, with and without a mask for its longest word of one token; empty if none suits."""
    special = [tokenizer.token(id) for id in tokenizer.special_ids]
    for document in islice(read_documents(text), DOCUMENTS):
        for part in SENTENCE_END.split(document[:BEGINNING]):
            sentence = " ".join(part.split())
            suits = sentence.isprintable() and not any(token in sentence for token in special)
            if suits and (masked := _mask_word(sentence, tokenizer, info.max_length)):
                return masked, sentence
    log.warning("%s has no sentence of 5 to 25 words that suits as an example", text.name)
    return "", ""


def _mask_word(sentence: str, tokenizer: Tokenizer, max_length: int) -> str:
    """The sentence with a mask for its longest word of one token; "" if it does not suit.

    The model then sees the ids of the sentence with a mask among them: in some byte-level vocabularies the space before
    a word is part of its token, and so goes with it.
    """
    tokens = tokenizer.encode([sentence])
    begins: Any = tokens.word_begins
    if begins.sum() not in WORDS or len(begins) + tokenizer.added_tokens > max_length:
        return ""
    spans = next(tokenizer.spans([sentence])).tolist()
    whole = np.flatnonzero(begins & np.append(begins[1:], True)).tolist()
    words = {index: sentence[slice(*spans[index])].strip() for index in whole}
    for index in sorted(words, key=lambda index: -len(words[index])):
        before, after = sentence[: spans[index][1] - len(words[index])], sentence[spans[index][1] :]
        wanted = tokenizer.frame(np.where(np.arange(len(begins)) == index, tokenizer.mask_id, tokens.ids)).tolist()
        for masked in (f"{head}{tokenizer.mask_token}{after}" for head in (before, before.rstrip())):
            if words[index][:1].isalpha() and tokenizer.encode_control(masked).ids == wanted:
                return masked
    return ""


def _usage(subject: _Model, base: str | None, example: str, sentence: str) -> str:
    """What the model is and how it is run. Without an example there are placeholders, which are in no language."""
    manifest, mask = subject.manifest, subject.tokenizer.mask_token
    templates = ["artifact.md" if manifest else "checkpoint.md", *(["onnx.md"] if _has_onnx(subject) else [])]
    text = "".join((Path(__file__).parent / "cards" / name).read_text(encoding="utf-8") for name in templates)
    example, sentence = (example, sentence) if example else (f"... {mask} ...", "...")
    python = {"mask": mask, "masked": example, "sentence": sentence}
    return Template(text).substitute(
        asdict(subject.info) | {name: json.dumps(value, ensure_ascii=False) for name, value in python.items()},
        shell_masked=shlex.quote(example),
        source=f", from [{base}](https://huggingface.co/{base})" if base else "",
        plan=f", and a plan of {FLAVOURS[manifest.tensorrt.flavour]}" if manifest and manifest.tensorrt else "",
        weights=f"{subject.weights:,}",
    )


# ---------------------------------------------------------------- results


def _held_out_results(subject: _Model) -> dict[Path, Result]:
    """The evaluations that training made of these weights, by folder."""
    if not subject.run:
        return {}
    from mlmkit.train.checkpoints import saved_checkpoints

    results = {}
    holders = (subject.folder, *saved_checkpoints(subject.run)[-1:])
    for path in sorted(each.resolve() for holder in holders for each in holder.glob("held-out*")):
        try:
            result = load_result(path).result
        except UserError as error:
            log.warning("not on the card: %s", error)
            continue
        if result["model"]["fingerprint"] == subject.info.fingerprint:
            results[path] = result
    return results


def _model_index(name: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as `modelcard.md` of huggingface/hub-docs specifies them.

    An interval has no field there, so it is in the metric's `name`, which the Hub shows, and in its `args`.
    """
    entries = []
    for result in results:
        name_of_text, metrics = _measured_on(result), []
        for metric, figures in result["metrics"].items():
            if figures["value"] is not None:
                entry = {"type": metric, "value": figures["value"], "name": metric.replace("_", " ")}
                if figures["low"] is not None:
                    entry["name"] += f" (95 % interval {_interval(figures)})"
                    entry["args"] = {"low": figures["low"], "high": figures["high"]}
                metrics.append(entry)
        kind = re.sub(r"[^a-z0-9]+", "-", name_of_text.lower()).strip("-") or "text"
        digests = {"fingerprint": result["corpus"]["fingerprint"], "mask_digest": result["mask_digest"]}
        dataset = {"name": name_of_text, "type": kind, "args": digests}
        entries.append({"task": {"type": "fill-mask"}, "dataset": dataset, "metrics": metrics})
    return [{"name": name, "results": entries}] if entries else []


def _metrics(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        run_by = f"{result['backend']['name']} on {result['backend']['device']}, {result['model']['precision']}"
        digests = result["corpus"]["fingerprint"], result["mask_digest"]
        for metric, figures in result["metrics"].items():
            value, interval = _number(figures["value"]), _interval(figures)
            rows.append((_measured_on(result), metric.replace("_", " "), value, interval, run_by, *digests))
    head = ("set", "metric", "value", "95 % interval", "run by", "text's fingerprint", "mask digest")
    note = "Logarithms are natural; intervals are over documents.\n\n"
    return f"## Metrics\n\n{note}{_table(head, rows)}" if rows else ""


def _measured_on(result: Result) -> str:
    source = result["corpus"]["source"]
    return source["set"] or _text_name(source["location"] or "texts")


def _interval(figures: Metric) -> str:
    return "-" if figures["low"] is None else f"{_number(figures['low'])} to {_number(figures['high'])}"


# ---------------------------------------------------------------- the training run


def _phases(subject: _Model) -> list[dict[str, Any]]:
    remedy = "copy the model to another folder, and describe it there"
    return read_record(subject.run / RUN, remedy).get("phases", []) if subject.run else []


def _training(subject: _Model) -> str:
    """How far these weights were trained, on which texts, with which settings."""
    if not subject.run:
        return ""
    from mlmkit.train.evaluations import kept_checkpoints

    kept = kept_checkpoints(subject.run)
    at = next((each for each in kept if each.folder.name == subject.folder.resolve().name), kept[-1])
    seen = f"{at.tokens:,} tokens, special tokens included, and {at.words:,} words"
    parts = [f"## Training\n\n{at.step:,} steps. Every pass over the text counted, {seen}.\n"]
    rows = []
    for text in training_texts(subject.run):
        sizes = f"{len(text):,}", f"{text.tokens:,}", f"{text.sizes['words']:,}"
        rows.append((_text_name(text.name), *sizes, text.fingerprint))
    if rows:
        parts.append(_table(("text", "documents", "tokens", "words", "fingerprint"), rows))
    else:
        log.warning("the card does not count the training text: its tokens are not in the cache")
    settings = ["\n".join(["```toml", *_settings(phase), "```\n"]) for phase in _phases(subject)]
    return "\n".join([*parts, *settings])


def _settings(tables: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines of TOML for the settings that have a value. Of a path only the last part is shown."""
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        elif value not in (None, "", []) and name != "constant_until":
            shown = Path(value).name if isinstance(value, str) else value
            yield f"{prefix}{name} = {json.dumps(shown, ensure_ascii=False)}"


def _text_name(location: str) -> str:
    return location if location.startswith(HUB) else Path(location.partition("?")[0]).name  # a URL may have a key


# ---------------------------------------------------------------- the other sections


def _has_onnx(subject: _Model) -> bool:
    """Whether transformers.js finds a graph, as `mlmkit export --layout transformers` writes it."""
    return (subject.folder / "onnx" / "model.onnx").is_file()


def _tags(subject: _Model) -> list[str]:
    manifest = subject.manifest
    engines = ["onnx", *(["tensorrt"] if manifest.tensorrt else []), manifest.precision] if manifest else []
    engines += ["onnx", "transformers.js"] if _has_onnx(subject) else []
    return ["mlmkit", "masked-lm", *engines, subject.info.architecture]


def _parity(subject: _Model) -> str:
    if not subject.manifest:
        return ""
    verdict = "Within the bounds that the export demands."
    if subject.manifest.drift_allowed:
        verdict = "**Beyond the bounds that the export demands**; exported anyway, with `--allow-drift`."
    return (
        "## Parity with the checkpoint\n\nThe engine against the checkpoint in float32, on real text; differences of "
        f"log-probabilities in nats. {verdict}\n\n" + _table(("", "value"), report_rows(subject.manifest.parity))
    )


def _hashes(subject: _Model) -> dict[str, str]:
    if subject.manifest:
        return subject.manifest.files
    paths = [path for pattern in ("*", "onnx/*") for path in sorted(subject.folder.glob(pattern)) if path.is_file()]
    names = {path.relative_to(subject.folder).as_posix(): path for path in paths}
    return {name: file_sha256(path) for name, path in names.items() if name not in (CARD, *UNPUBLISHED)}


def _digests(subject: _Model) -> str:
    rows = [(f"`{name}`", f"`{sha256}`") for name, sha256 in _hashes(subject).items()]
    rows += [("the weights", f"`{subject.info.fingerprint}`"), ("the tokenizer", f"`{subject.tokenizer.fingerprint}`")]
    return "## Digests\n\n" + _table(("", "SHA-256"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot break out of its cell or act as HTML: the names of sets come from users."""
    return "".join(char for char in text.replace("|", "\\|").replace("<", "&lt;") if char.isprintable())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
