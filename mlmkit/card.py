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
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mlmkit.artifact import CARD, FLAVOURS, GRAPH, MANIFEST, ONNX_FOLDER, Manifest, is_artifact
from mlmkit.backends import ModelInfo
from mlmkit.backends.protocol import open_artifact
from mlmkit.documents import read_documents
from mlmkit.errors import UserError, as_user_error, require
from mlmkit.eval.display import markdown_cell, markdown_table, number, span
from mlmkit.eval.report import scored_tokens
from mlmkit.eval.result import Metric, Result
from mlmkit.eval.results_store import load_result
from mlmkit.export.parity import DOCUMENTS, held_out_text, parity_line
from mlmkit.files import locate_model, write_text
from mlmkit.locations import Source, last_part
from mlmkit.overlap import run_of, training_texts
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
FORM = "{:.4f}"  # of a metric
SEAL = "\n<!-- mlmkit card: "
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n")
WORDS = range(5, 26)  # of a sentence that makes a good example
BEGINNING = 10_000  # characters of a document among which an example is looked for
CHECKPOINT = re.compile(r"model|step-\d{8}")  # of a run
# What a checkpoint of a run holds besides the model, and what a killed export left there.
UNPUBLISHED = ("optimizer*", "trainer.json", "held-out*", ".*.mlmkit-*")


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
    name: str
    info: ModelInfo
    tokenizer: Tokenizer
    parameters: int = 0
    manifest: Manifest | None = None
    run: Path | None = None
    checkpoints: Sequence[Any] = ()  # of the run, up to this one

    @property
    def has_onnx(self) -> bool:
        """Whether transformers.js finds a graph."""
        return (self.folder / ONNX_FOLDER / GRAPH).is_file()

    @property
    def phases(self) -> dict[str, Any]:
        """The configuration of each phase of the run up to these weights, by the phase's name."""
        return {each.state.phase: each.state.config for each in self.checkpoints if each.state}


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
    be read, a result of other weights, names that the Hub does not accept, and, unless `overwrite` is set, a README.md
    that has changed since mlmkit wrote it.
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
    shown = [load_result(each).result for each in dict.fromkeys(results)]
    for result in shown:
        if result["model"]["fingerprint"] != subject.info.fingerprint:
            raise UserError(f"the result of {result['model']['path']} was not measured on the weights of {model}")
    measured = set[Any]().union(*map(_measured, shown))
    shown = [*(each for each in _held_out_results(subject) if not _measured(each) <= measured), *shown]
    text = text or (held_out_text(folder.resolve()) if subject.run else None)
    example, sentence = find_example(text, subject.tokenizer, subject.info) if text else ("", "")
    given = {"license": license, "language": languages, "dataset": datasets}
    given |= {"base-model": base_model} if any(each.model.init_from for each in subject.phases.values()) else {}
    if missing := [f"--{name}" for name, value in given.items() if not value]:
        log.warning("the card lacks fields that the Hub shows: give %s", ", ".join(missing))
    if not example:
        log.warning("no example and no widget: pass --text FILE")
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
        "model-index": _model_index(subject.name, shown),
    }
    usage = _usage(subject, base_model, example, sentence)
    body = [usage, _metrics(shown), _training(subject), _proof(subject)]
    _write(path, front, "\n".join(filter(None, body)))
    excluded = [f"--exclude={pattern}" for pattern in UNPUBLISHED if any(folder.glob(pattern))]
    return Card(path, example, shlex.join(["hf", "upload", "USER/NAME", str(folder), *excluded]))


def _check(option: str, values: Iterable[str | None], pattern: re.Pattern[str], kind: str) -> None:
    if wrong := [value for value in values if value is not None and not pattern.fullmatch(value)]:
        raise UserError(f"{option} {wrong[0]!r}: give {kind}")


def _open(folder: Path) -> _Model:
    if is_artifact(folder):
        manifest, _, tokenizer, info = open_artifact(str(folder))
        return _Model(folder, folder.resolve().name, info, tokenizer, manifest=manifest)
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.backends.torch import TorchBackend
    from mlmkit.train.evaluations import kept_checkpoints

    backend, name = TorchBackend(str(folder), "cpu"), folder.resolve().name
    parameters = sum(weight.numel() for weight in backend.model.parameters())
    opened = _Model(folder, name, backend.info, backend.tokenizer, parameters)
    if not (CHECKPOINT.fullmatch(name) and (run := run_of(folder))):  # other folders in a run may hold any model
        return opened
    kept = [each for each in kept_checkpoints(run) if name == "model" or each.folder.name <= name]
    return replace(opened, name=run.name, run=run, checkpoints=kept)


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
    """What the model is and how it is run. Without an example there are placeholders without words of any language."""
    manifest, mask = subject.manifest, subject.tokenizer.mask_token
    templates = ["artifact.md" if manifest else "checkpoint.md", *(["onnx.md"] if subject.has_onnx else [])]
    text = "".join((Path(__file__).parent / "cards" / name).read_text(encoding="utf-8") for name in templates)
    example, sentence = (example, sentence) if example else (f"... {mask} ...", "...")
    article = "an" if subject.info.architecture[0] in "aeiou" else "a"
    figures = {name: f"{value:,}" if type(value) is int else value for name, value in asdict(subject.info).items()}
    python = {"mask": mask, "masked": example, "sentence": sentence}
    return Template(text).substitute(
        figures | {name: json.dumps(value, ensure_ascii=False) for name, value in python.items()},
        title=f"{markdown_cell(subject.name)}: {article} {subject.info.architecture} masked language model",
        shell_masked=shlex.quote(example),
        source=f", from [{base}](https://huggingface.co/{base})" if base else "",
        plan=f", and a plan of {FLAVOURS[manifest.tensorrt.flavour]}" if manifest and manifest.tensorrt else "",
        parameters=f"{subject.parameters:,}",
    )


# ---------------------------------------------------------------- results


def _held_out_results(subject: _Model) -> Iterator[Result]:
    """The evaluations that training made of these weights."""
    folders = {subject.folder.resolve(), *(each.folder for each in subject.checkpoints[-1:])}
    for path in sorted(path for folder in folders for path in folder.glob("held-out*")):
        try:
            result = load_result(path).result
        except UserError as error:
            log.warning("not on the card: %s", error)
            continue
        if result["model"]["fingerprint"] == subject.info.fingerprint:
            yield result


def _measured(result: Result) -> set[tuple[str, ...]]:
    """What each pass measured: the text, the scored positions and the variant of pseudo-likelihood."""
    variants, digests = {"pseudo": repr(result["pseudo"])}, result["digests"].items()
    return {(result["corpus"]["fingerprint"], digest, variants.get(name, "")) for name, digest in digests}


def _model_index(name: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as `modelcard.md` of huggingface/hub-docs specifies them.

    An interval has no field there, so it is in the metric's `name`, which the Hub shows, and in its `args`.
    """
    entries = []
    for result in results:
        metrics, known = [], {name: it for name, it in result["metrics"].items() if it["value"] is not None}
        for metric, figures in known.items():
            entry = {"type": metric, "value": figures["value"], "name": _label(metric, figures)}
            if figures["low"] is not None:
                entry["name"] += f" (95 % interval {span(figures, FORM)})"
                entry["args"] = {"low": figures["low"], "high": figures["high"]}
            metrics.append(entry)
        kind = re.sub(r"[^a-z0-9]+", "-", _set_name(result).lower()).strip("-") or "text"
        digests = {"fingerprint": result["corpus"]["fingerprint"], "mask_digest": result["mask_digest"]}
        dataset = {"name": _set_name(result), "type": kind, "args": digests | scored_tokens(result)}
        entries.append({"task": {"type": "fill-mask"}, "dataset": dataset, "metrics": metrics})
    return [{"name": name, "results": entries}] if entries else []


def _metrics(results: Sequence[Result]) -> str:
    """For each result a table, and what was scored under it."""
    parts = ["## Metrics\n\nLogarithms are natural. Intervals are over documents; in a set of items, over items.\n"]
    for result in results:
        rows = [(_label(name, it), number(it["value"]), span(it, FORM)) for name, it in result["metrics"].items()]
        if "items" not in result and "unigram_entropy" in result:  # older results lack it
            rows.insert(1, ("unigram entropy, to beat", number(result["unigram_entropy"]), "–"))
        corpus, run_by = result["corpus"], f"{result['backend']['name']} on {result['backend']['device']}"
        sizes = f"{corpus['documents']:,} documents, {corpus['tokens']:,} tokens"
        facts = {"text": f"{sizes}, fingerprint `{corpus['fingerprint']}`", **scored_tokens(result)}
        facts |= {"mask digest": f"`{result['mask_digest']}`", "run by": f"{run_by}, {result['model']['precision']}"}
        parts += [
            f"### {markdown_cell(_set_name(result))}\n",
            markdown_table(("metric", "value", "95 % interval"), rows),
        ]
        parts.append("".join(f"- {name}: {fact}\n" for name, fact in facts.items()))
    return "\n".join(parts) if results else ""


def _label(metric: str, figures: Metric) -> str:
    return metric.replace("_", " ").replace("top5", "top-5") + (", of a sample" if "standard_error" in figures else "")


def _set_name(result: Result) -> str:
    source = result["corpus"]["source"]
    return source["set"] or last_part(source["location"] or "texts")


# ---------------------------------------------------------------- the other sections


def _training(subject: _Model) -> str:
    """How far these weights were trained, on which texts, with which settings."""
    if not subject.run:
        return ""
    from mlmkit.train.config import to_toml

    at = subject.checkpoints[-1]
    seen = f"{at.tokens:,} tokens (special tokens included) and {at.words:,} words, counting repeated passes"
    parts = [f"## Training\n\n{at.step:,} steps: {seen}.\n"]
    rows = [
        (last_part(text.name), f"{len(text):,}", f"{text.tokens:,}", f"{text.sizes['words']:,}", text.fingerprint)
        for text in training_texts(subject.run)
    ]
    if rows:
        parts.append(markdown_table(("text", "documents", "tokens", "words", "fingerprint"), rows))
    else:
        log.warning("the card does not count the training text: its tokens are not in the cache")
    if not subject.phases:
        log.warning("the card does not show the settings of the training: no checkpoint of the run is left")
    for name, config in subject.phases.items():
        title = f"The configuration{name and f' of phase {name}'}, for `mlmkit train`; lines with # are defaults:"
        parts.append(f"{title}\n\n```toml\n{to_toml(config)}```\n")
    return "\n".join(parts)


def _tags(subject: _Model) -> list[str]:
    manifest = subject.manifest
    engines = ["onnx", *(["tensorrt"] if manifest.tensorrt else []), manifest.precision] if manifest else []
    engines += ["onnx", "transformers.js"] if subject.has_onnx else []
    return ["mlmkit", "masked-lm", *engines, subject.info.architecture]


def _proof(subject: _Model) -> str:
    """The parity of an artifact, and the digests."""
    rows = [("weights", subject.info.fingerprint), ("tokenizer", subject.tokenizer.fingerprint)]
    digests = f"## Digests\n\n{markdown_table(('', 'SHA-256'), rows)}"
    if not (manifest := subject.manifest):
        return digests
    # A text is named by its path, or as "the run's held-out text (PATH)".
    parity = manifest.parity | {"text": re.sub(r"(^|\()[^()]*/", r"\1", str(manifest.parity.get("text")))}
    drift = " **Exported with `--allow-drift`.**" if manifest.drift_allowed else ""
    line = f"The engine against the checkpoint in float32, {markdown_cell(parity_line(parity))}.{drift}"
    return f"## Parity with the checkpoint\n\n{line}\n\n{digests}\nFor those of the files see `{MANIFEST}`.\n"
